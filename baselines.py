"""sCM and MeanFlow, the two methods that FACM's tables compare with, as FACM's A.3(c) has them.

DIRECTION OF TIME: t=0 noise, t=1 data, as in facm.py, from which everything comes that these rows
are to have in common with FACM: flow, teacher, guidance, times, network and presets.

--objective scm       Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models
                      (Lu & Song 2024, arXiv:2410.11081), on the linear flow
    g = cos(pi t/2) (F - v - q (1-t) dF/dt)            `scm_loss`; q rises to 1: tangent warm-up
    L = e exp(-a(t)) + a(t), e = |g / (rms(g) + 0.1)|^2    a(t) is learned, `log_weight`

--objective meanflow  Mean Flows for One-step Generative Modeling (Geng et al. 2025,
                      arXiv:2505.13447)
    F(x_t, t, r) = v + (r-t) dF/dt                     `meanflow_loss`: average velocity from t to r
    L = e / (e+c)^p, e = |F - v - (r-t) dF/dt|^2       r = t for a share of the samples

    x1, x0, xt, t   x_1, x_0, x_t, t        teacher   F_delta, frozen; None: from scratch
    F_cm, F_r       F with gradient         phi       the coefficients of a(t)

Launch:
    python baselines.py                                                          # laptop: MeanFlow
    python baselines.py --objective scm --net pixelnorm=True                     # laptop: sCM
    torchrun --nproc_per_node=8 baselines.py --data imagenet_latents             # 8 GPUs

Results and details: docs/baselines.md. A departure stands at its line: "paper: ...; here: ...".
"""

import functools
import math

import torch
import torch.distributed as dist

import data
import facm
import flags
import models
import run
import weights
from dryrun import DryRun
from facm import conditions, flow_velocity, interpolate, pretrain_loss, sample_t
from jvp import JVP, select

METHOD = "baselines"
PRESETS = {name: row | dict(tangent_warmup=100 if name in ("glyphs", "mnist") else 10_000)
           for name, row in facm.PRESETS.items()}                      # A.3(c)


def parse_args():
    parser = flags.Parser(description="sCM and MeanFlow. Defaults: FACM's preset's row.")
    flags.add_flags(parser, PRESETS)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    flag("--objective", choices=["scm", "meanflow"], default="meanflow", help="the method")
    flag("--P-mean", float, help="mean of ln(sigma) (FACM's Eq. 20, Table 5)")
    flag("--P-std", float, 0, help="standard deviation of ln(sigma) (FACM's Eq. 20, Table 5)")
    flag("--w", float, help="guidance scale; 1 is none (FACM's Eq. 9, Table 5)")
    flag("--t-low", float, 0, 1, help="time before which there is no guidance (FACM's Table 5)")
    flag("--jvp", choices=list(JVP), help="dF/dt: in one pass with F, by torch.func.jvp, or by a "
         "central difference (FACM's A.1)")
    flag("--c", float, 0, default=1e-3, help="meanflow: the constant in its adaptive weight")
    flag("--equal", float, 0, 1, help="meanflow: share of r = t (A.3(c): 0.75 from scratch, else "
         "0)")
    flag("--tangent-warmup", int, 0, help="scm: steps in which dF/dt comes in (A.3(c))")
    args = flags.parse(parser, METHOD, PRESETS)
    if args.equal is None:
        args.equal = 0.0 if args.teacher or args.pretrain else 0.75
    return args


# --------------------------------------------------------------------------------------------------
# THE METHODS. Pure functions: x1, x0, xt, v, F, ... [B, C, H, W]; t, r [B]; y int64 [B] or None.

def scm_loss(net, jvp, x1, x0, t, y, *, warm, phi, teacher=None, y_null=None, w=1.0, t_low=0.125):
    """sCM's loss, mean over the batch. warm: the share q of dF/dt, which rises to 1; phi: see
    log_weight; the others as in facm_loss. The pixel normalisation is the network's."""
    xt, (c_cm, c_fm) = interpolate(x1, x0, t), conditions(t, "expanded")
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, y_null=y_null, w=w, t_low=t_low)
    F_cm, dF_dt = jvp(net, xt, *c_cm, y, v, 1, 0)
    g = F_cm.detach() - v - warm * (1 - t)[:, None, None, None] * dF_dt          # FACM's Eq. 11
    # paper: A.3(c) gives no weight of t; here: cos(pi t/2), because the authors' code has it so.
    g = torch.cos(math.pi / 2 * t)[:, None, None, None] * g
    g = g / (g.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.1)          # normalisation
    e, a = (F_cm - (F_cm.detach() - g)).square().mean(dim=(1, 2, 3)), log_weight(t, phi)
    return (e * torch.exp(-a) + a).mean()


def log_weight(t, phi):
    """a(t) [B] of sCM's adaptive weight, a sum of cosines with the learned coefficients phi [K].
    paper: not given, and in the authors' code a layer on an embedding of t; here: 8 cosines."""
    waves = torch.cos(math.pi * t[:, None] * torch.arange(len(phi), device=t.device))
    return (waves * phi).sum(dim=1)        # by @ it would be bfloat16 under autocast


def meanflow_loss(net, jvp, x1, x0, t, r, y, *, c=1e-3, p=1.0, teacher=None, y_null=None, w=1.0,
                  t_low=0.125):
    """MeanFlow's loss, mean over the batch: F(x_t, t, r) is the average velocity from t to r >= t,
    therefore v + (r-t) dF/dt, which at r = t is flow matching. Options as in facm_loss."""
    xt, (_, c_fm) = interpolate(x1, x0, t), conditions(t, "auxiliary")
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, y_null=y_null, w=w, t_low=t_low)
    F_r, dF_dt = jvp(net, xt, t, r, y, v, 1, 0)
    e = (F_r - v - (r - t)[:, None, None, None] * dF_dt).square().mean(dim=(1, 2, 3))
    return (e / (e + c).pow(p).detach()).mean()


def sample_t_r(normal, same, P_mean, P_std):
    """MeanFlow's times t <= r from draws [2, B]; r = t where same [B] bool (A.3(c)). paper: their
    log-normal density has no parameters given; here: FACM's Eq. 20 for both times."""
    t, r = sample_t(normal, P_mean, P_std).sort(dim=0)[0]
    return t, torch.where(same, t, r)


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, C, H, W], standard normal; y [B] labels; -> images [B, C, H, W].

@torch.no_grad()
def sample_jumps(net, noise, y, nfe):
    """MeanFlow's: nfe jumps from t to r along the average velocity F(x_t, t, r); K = 1."""
    xt = noise[0]
    for i in range(nfe):
        t, r = (torch.full_like(noise[0, :, 0, 0, 0], j / nfe) for j in (i, i + 1))
        xt = xt + net(xt, t, r, y) / nfe
    return xt


SAMPLERS = facm.SAMPLERS | {"jumps": sample_jumps}
DETERMINISTIC = ("euler", "jumps")         # these take noise of K = 1, the others K = nfe
velocity = facm.velocity


def default_sampler(nfe, args):
    """The sampler that suits a method; args: the training's, a dict."""
    return "jumps" if args["objective"] == "meanflow" else "cm"


def sampler_options(args):
    """{sampler: its options} for a run with these args (a dict)."""
    jumps = dict(jumps={}) if args["objective"] == "meanflow" else {}
    return facm.sampler_options(args) | jumps


def preview(net, stage, noise, args):
    """Two rows of NFE 1 over two of NFE 2; while pretraining as facm.py."""
    name, options = default_sampler(1, vars(args)), sampler_options(vars(args))
    if stage == "pretrain":
        args.condition = options["cm"]["condition"]
        return facm.preview(net, stage, noise, args)
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    return torch.cat([SAMPLERS[name](net, noise, y, nfe, **options[name]) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------

def check(args, net):
    """Raises ValueError for flags that do not go together."""
    if args.w != 1 and not net.num_classes:
        raise ValueError(f"--w {args.w}: guidance needs a network with classes; take --w 1")
    if args.objective == "scm" and args.w != 1 and not (args.pretrain or args.teacher):
        raise ValueError("--objective scm from scratch knows no velocity to guide; take --w 1")


@run.program(run.LESS_MEMORY)
def main():
    args = parse_args()
    job = (DryRun if args.dry_run else run.Run)(args, METHOD, stage_name=args.objective)
    condition = "auxiliary" if args.objective == "meanflow" else "expanded"

    # Data, network, teacher; the state in which the run stands
    with run.errors_in_one_line():
        dataset = data.load_for(args)
        args.net = data.fit_network_to(dataset, args.net) | dict(
            second_time=args.objective == "meanflow")
        net = models.create(**args.net, seed=run.seed_of(args.seed, "init")).to(job.device)
        check(args, net)
        job.open_folder()
        teacher = weights.load_teacher(job.teacher_path(), net, args, job.device)
        phi = torch.zeros(8, device=job.device, requires_grad=True)    # sCM's a(t)
        job.resume(net, models.shard, extra=[phi])
    jvp = select(args.jvp, args.compile)
    preview_noise = data.preview_noise(args.seed, dataset.shape).to(job.device)

    while job.step < job.total:
        # Stage: flow matching, then the method from its averaged weights, which are its teacher
        if job.step == args.pretrain > 0:
            teacher = weights.load_teacher(job.end_pretraining(), net, args, job.device)
        stage, P = job.stage(), (args.P_mean, args.P_std)
        pretrains = stage.name == "pretrain"
        P = pretrains and args.pretrain_P or P

        # Seed: random numbers of the global batch; neither processes nor pieces change them
        random = run.generator(job.device, args.seed, "step", job.step)
        x0_all = torch.randn(
            (stage.batch, *dataset.shape), generator=random, device=job.device)
        normal = torch.randn(stage.batch, generator=random, device=job.device)
        drop, mix = torch.rand((2, stage.batch), generator=random, device=job.device)
        normal = torch.stack(
            [normal, torch.randn(stage.batch, generator=random, device=job.device)])
        same = torch.arange(stage.batch, device=job.device) < args.equal * stage.batch

        terms, pieces = torch.zeros(2, device=job.device), job.pieces(stage.batch)
        for part, (rows, share) in enumerate(pieces):
            # Batch
            with job.data_errors_end_the_run():
                x1, y = run.to_device(
                    dataset.batch(args.seed, stage.first, stage.batch, rows), job.device)
            x0, t = x0_all[rows], sample_t(normal[0, rows], *P)
            if teacher is None:
                y = torch.where(drop[rows] < args.label_drop, net.num_classes, y)

            # Loss
            run.synchronise(job.trained, last=part + 1 == len(pieces))
            models.seed_dropout(
                net, run.seed_of(args.seed, "dropout", job.step, job.rank, part), rows=len(y))
            common = dict(teacher=teacher, y_null=net.num_classes, w=args.w, t_low=args.t_low)
            L_fm = L_cm = torch.zeros((), device=job.device)
            with job.autocast():
                if pretrains:
                    L_fm = pretrain_loss(job.trained, x1, x0, t, y, condition=condition,
                                         mixed=mix[rows] < 0.5)
                elif args.objective == "scm":
                    L_cm = scm_loss(job.trained, jvp, x1, x0, t, y, phi=phi, **common,
                                    warm=min(1, (stage.k + 1) / max(args.tangent_warmup, 1)))
                else:
                    t, r = sample_t_r(normal[:, rows], same[rows], *P)
                    L_cm = meanflow_loss(job.trained, jvp, x1, x0, t, r, y, c=args.c, **common)

            # Backward: summed over the pieces
            ((L_fm + L_cm) * share).backward()
            terms += torch.stack([L_fm, L_cm]).detach() * share
        if dist.is_initialized() and phi.grad is not None:             # not among the network's
            dist.all_reduce(phi.grad.div_(job.world))

        # Clip, optimiser, EMA
        grad_norm = job.clip_gradient()
        job.set_lr(stage.lr)
        job.optimizer.step()
        job.optimizer.zero_grad()
        run.ema_update(job.ema, net, stage.k + 1, job.gamma, args.ema_beta)

        # Log, save, preview
        signalled = job.after_step(
            stage, dict(L_fm=terms[0], L_cm=terms[1], grad_norm=grad_norm))
        if job.shows:
            data.save_preview(job.preview_path(), preview, job.ema, stage.name, preview_noise, args)
        if signalled:
            break
    job.finish()


if __name__ == "__main__":
    main()
