"""Flow-Anchored Consistency Models (Peng et al. 2025, arXiv:2507.03738v1), in one file.

DIRECTION OF TIME: t=0 noise, t=1 data. x_t = (1-t) x_0 + t x_1, x_0 ~ N(0, I), x_1 data.
A consistency model alone forgets the flow that it shortcuts, and training collapses. FACM trains
one network on two tasks, told apart by the time it is conditioned on: the shortcut to the data
(CM, the accelerator) and the velocity of the flow (FM, the anchor).

    f(x_t, t) = x_t + (1-t) F(x_t, c_CM)                   `sample`: predicts x_1         Eq. 3
    L         = L_FM + L_CM                                `facm_loss`: Algorithm 1       Eq. 8
    v         = v_uncond + w (v_cond - v_uncond)           `guided_velocity`              Eq. 9
    L_FM      = |F(x_t, c_FM) - v|^2 + 1 - cos(F, v)       `fm_loss`: the anchor          Eq. 10
    g         = F(x_t, c_CM) - (v + (1-t) dF/dt)           `cm_target`: clamped residual  Eq. 11
    v_tar     = F(x_t, c_CM) - alpha(t) g                  `cm_target`: relaxed target    Eq. 12
    L_CM      = beta(t) e / sqrt(e+c), e = |F - v_tar|^2   `norm_l2`: the accelerator     Eq. 14, 18

    x1, x0, xt, t   x_1, x_0, x_t, t        c_cm, c_fm  conditions (t, s): (t, None), (2-t, None)
    F_cm, F_fm      F(x_t, c_CM), ...                   or, auxiliary, (t, 1), (t, t)   (3.2.2)
    dF_dt           total derivative        teacher     F_delta, frozen; None: from scratch

Launch:
    python facm.py                                               # laptop: pretrain, distil
    python facm.py --data cifar10                                # 1 GPU
    torchrun --nproc_per_node=8 facm.py --data imagenet_latents  # 8 GPUs

Results and details: docs/facm.md. A departure stands at its line: "paper: ...; here: ...".
"""

import functools
import math

import torch
from torch.nn.functional import cosine_similarity

import data
import flags
import models
import run
import weights
from dryrun import DryRun
from jvp import JVP, in_one_pass, select

METHOD = "facm"

# A row for each data set; a flag given by hand beats it. Values are Table 5's, but where "ours".
# No paper has a warm-up of the rate, nor clipping of the gradient at norm 1.
PRESETS = {
    "glyphs": dict(                        # ours: minutes on a laptop want high rates that fall
        resolution=16, steps=1600, pretrain=2000, batch=8, lr=2.5e-3, lr_final=0.0, warmup=200,
        pretrain_batch=16, pretrain_lr=8e-3, pretrain_P=(0.0, 1.2), betas=(0.9, 0.99),
        ema_sigma=0.1, jvp="fd",           # faster here than the others
        net=dict(name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), sigma_data=0.6,
                 adaptive_scale=True, time_scale=8.0),
        P_mean=-0.8, P_std=1.6, w=1.75, t_low=0.125),
    "cifar10": dict(
        resolution=32, steps=200_000, pretrain=400_000,    # ours
        precision="tf32", micro_batch=64,                  # ours: 24 GB
        batch=128, lr=1e-4, lr_final=1.0,
        warmup=1000,                       # ours
        betas=(0.9, 0.995), ema_sigma=0.2, jvp="fused", xflip=True, uncond=True,
        net=dict(name="DDPM++", dropout=0.1, sigma_data=0.5),
        P_mean=-1.0, P_std=1.4, w=1.0, t_low=0.125),
    "imagenet_latents": dict(
        steps=313_000, pretrain=1_001_000,                 # 250 epochs, after 800 (Table 3)
        precision="bf16", micro_batch=32,                  # the authors' code; ours: 80 GB
        batch=1024, lr=1e-4, lr_final=1.0,
        warmup=1000,                       # ours
        betas=(0.9, 0.999), ema_sigma=0.2, jvp="fused",
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        P_mean=-0.8, P_std=1.6, w=1.75, t_low=0.125),
}
PRESETS["mnist"] = PRESETS["glyphs"] | dict(               # ours
    resolution=None, batch=16, pretrain_batch=32,
    net=PRESETS["glyphs"]["net"] | dict(width=16, mult=(1, 2, 4)))


def parse_args():
    parser = flags.Parser(description="Flow-Anchored Consistency Models; defaults by preset.")
    flags.add_flags(parser, PRESETS)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    flag("--P-mean", float, help="mean of ln(sigma) (Eq. 20, Table 5)")
    flag("--P-std", float, 0, help="standard deviation of ln(sigma) (Eq. 20, Table 5)")
    flag("--w", float, help="guidance scale; 1 is none (Eq. 9, Table 5)")
    flag("--t-low", float, 0, 1, help="time before which there is no guidance (Table 5)")
    flag("--jvp", choices=list(JVP), help="dF/dt: in one pass with F, by torch.func.jvp, or by a "
         "central difference (A.1)")
    flag("--condition", choices=["expanded", "auxiliary"], default="expanded", help="how the "
         "network tells the two tasks apart (3.2.2)")
    flag("--alpha", choices=list(WEIGHTS), default="1-t^p", help="relaxation (Eq. 12, Table 4)")
    flag("--beta", choices=list(WEIGHTS), default="cos", help="weight of L_CM (Eq. 14, Table 4)")
    flag("--power", float, 0, default=0.5, help="the exponent p in 1-t^p (Table 4)")
    flag("--c", float, 0, default=1e-3, help="the constant in the norm L2 loss (Eq. 18, Table 5)")
    flag("--anchor", float, 0, default=1.0, help="weight of L_FM; 0: no anchor (Eq. 8)")
    return flags.parse(parser, METHOD, PRESETS)


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions: x1, x0, xt, v, F_cm, ... [B, C, H, W]; t, s [B]; y int64 [B] or None.

def facm_loss(net, jvp, x1, x0, t, y, *, alpha, beta, c=1e-3, condition="expanded", teacher=None,
              y_null=None, w=1.0, t_low=0.125):
    """L_FM and L_CM, means over the batch, whose sum is Eq. 8 (Algorithm 1).

    net        F_theta, any callable net(x, t, s, y); DDP's wrapper, if there is one, so that the
               backward pass averages the gradient; s is None unless condition is "auxiliary"
    jvp        one of jvp.JVP
    alpha, beta   functions of t [B] (Table 4); c: the constant in Eq. 18
    teacher    F_delta, the same kind of callable, frozen; None: from scratch
    y_null, w, t_low   the null label; guidance of scale w from time t_low on (Eq. 9)
    """
    c_cm, c_fm = conditions(t, condition)                                      # line 2
    xt = interpolate(x1, x0, t)                                                # line 3
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y,                    # line 4, Eq. 9
                      y_null=y_null, w=w, t_low=t_low)
    F_cm, dF_dt, F_fm = jvp(net, xt, *c_cm, y, v, 1, 0, (xt, *c_fm, y))        # lines 5, 6, Eq. 17
    v_tar = cm_target(F_cm.detach(), v, dF_dt, t, alpha(t))                    # lines 7, 8
    L_cm = beta(t) * norm_l2(F_cm, v_tar, c)                                   # Eq. 14
    return fm_loss(F_fm, v).mean(), L_cm.mean()                                # line 9


def conditions(t, condition):
    """c_CM and c_FM, each a pair (time, second time or None): they tell the tasks apart (3.2.2)."""
    if condition == "expanded":
        return (t, None), (2 - t, None)
    # A copy: before 2.15 torch.compile fails on the same tensor in two places
    return (t, torch.ones_like(t)), (t, t.clone())


def interpolate(x1, x0, t):
    """x_t on the straight line from noise x0 to data x1."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * x1


@torch.no_grad()
def flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, **guidance):
    """v at x_t, guided: the teacher's, or from scratch that of the pair (x0, x1) (Eq. 9)."""
    if teacher is None:
        # paper: does not say how v_uncond is asked, the authors' code at c_CM; here: at c_FM,
        # because there the network learns the velocity.
        return guided_velocity(net, xt, t, c_fm, y, v_cond=x1 - x0, **guidance)
    # paper: the teacher sees c_FM; here: t, because every flow-matching network knows t, but 2 - t
    # only one that was pretrained with the mixed conditions of A.3(a).
    c_teacher = (t, t if getattr(teacher, "second_time", False) else None)
    return guided_velocity(teacher, xt, t, c_teacher, y, **guidance)


@torch.no_grad()
def guided_velocity(net, xt, t, condition, y, *, y_null, w, t_low, v_cond=None):
    """The velocity at x_t, guided with scale w where t >= t_low (Eq. 9). Net is the teacher, and
    gives v_cond too; from scratch it is the network itself. condition: net's, (time, second)."""
    if w == 1 or y is None:
        return net(xt, *condition, y) if v_cond is None else v_cond
    null = torch.full_like(y, y_null)
    if v_cond is None:
        v_cond, v_uncond = in_one_pass(net, (xt, *condition, y), (xt, *condition, null))
    else:
        v_uncond = net(xt, *condition, null)
    # paper: from scratch x_1 - x_0 + w (v_cond - v_uncond), both from the network; here: x_1 - x_0
    # takes the place of v_cond, because the authors' code does so, and w = 1 is then no guidance.
    v = v_uncond + w * (v_cond - v_uncond)                             # Eq. 9
    # paper: says t_low alone (Table 5), and from scratch the authors' code guides away from the
    # network's own v_cond below it and for null labels; here: v is then x_1 - x_0, unguided.
    guided = (t >= t_low) & (y != y_null)
    return torch.where(guided[:, None, None, None], v, v_cond)


def cm_target(F_cm, v, dF_dt, t, alpha):
    """v_tar: a step of size alpha from F_cm (without gradient) to the consistent F (Eq. 13)."""
    t, alpha = t[:, None, None, None], alpha[:, None, None, None]
    g = F_cm - (v + (1 - t) * dF_dt)                                   # line 7, Eq. 11
    return F_cm - alpha * g.clamp(-1, 1)                               # line 8, Eq. 12


def norm_l2(F_cm, v_tar, c):
    """Norm L2 loss [B]. paper: e is a sum; here: a mean over C, H, W, because the authors' code has
    it so with this c. As there, no gradient flows into the root: it is an adaptive weight."""
    e = (F_cm - v_tar).square().mean(dim=(1, 2, 3))
    return e / (e + c).sqrt().detach()                                 # Eq. 18


def fm_loss(F_fm, v):
    """The anchor's loss [B]. paper: norms and cosine of whole samples; here: the mean over pixels
    of both, the cosine being that of a pixel's channels, because the authors' code does so."""
    mse = (F_fm - v).square().mean(dim=(1, 2, 3))
    return mse + 1 - cosine_similarity(F_fm, v, dim=1).mean(dim=(1, 2))            # Eq. 10


WEIGHTS = {                                                            # Table 4, Figure 3(a)
    "1": lambda t, p: torch.ones_like(t),
    "1-t^p": lambda t, p: 1 - t ** p,
    "cos": lambda t, p: torch.cos(t * math.pi / 2),
}


def sample_t(normal, P_mean, P_std):
    """Times in (0, 1), denser near the data, from standard normal draws [B]."""
    sigma = torch.exp(P_mean + P_std * normal)
    return 1 - 2 / math.pi * torch.atan(sigma)                         # Eq. 20


def pretrain_loss(net, x1, x0, t, y, *, condition, mixed):
    """Flow matching under both of FACM's conditions, c_FM where mixed [B] bool (A.3(a))."""
    pairs = zip(*conditions(t, condition))
    both = [None if cm is None else torch.where(mixed, fm, cm) for cm, fm in pairs]
    return (net(interpolate(x1, x0, t), *both, y) - (x1 - x0)).square().mean()     # Eq. 1


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, C, H, W], standard normal; y [B] labels; -> images [B, C, H, W].

@torch.no_grad()
def sample(net, noise, y, nfe, condition="expanded"):
    """nfe one-step predictions at equal steps of time, fresh noise in between (A.3(b)); K = nfe."""
    xt = noise[0]
    for i in range(nfe):
        t = torch.full_like(noise[0, :, 0, 0, 0], i / nfe)
        c_cm, _ = conditions(t, condition)
        x1 = xt + (1 - i / nfe) * net(xt, *c_cm, y)                    # Eq. 3
        if i + 1 < nfe:
            t_next = (i + 1) / nfe
            xt = t_next * x1 + (1 - t_next) * noise[i + 1]             # Eq. 19
    return x1


@torch.no_grad()
def sample_euler(net, noise, y, nfe, condition="expanded", w=1.0, t_low=0.125):
    """nfe Euler steps along the velocity F(x_t, c_FM), guided by w (two passes a step); K = 1."""
    xt = noise[0]
    for i in range(nfe):
        t = torch.full_like(noise[0, :, 0, 0, 0], i / nfe)
        _, c_fm = conditions(t, condition)
        v = guided_velocity(net, xt, t, c_fm, y, y_null=net.num_classes, w=w, t_low=t_low)
        xt = xt + v / nfe
    return xt


SAMPLERS = {"cm": sample, "euler": sample_euler}
DETERMINISTIC = ("euler",)                 # these take noise of K = 1, the others K = nfe


def default_sampler(nfe, args):
    """The sampler that suits an NFE (A.3(b)); args: the training's, a dict."""
    return "cm"


def sampler_options(args):
    """{sampler: its options} for a run with these args (a dict)."""
    condition = "auxiliary" if args["net"].get("second_time") else "expanded"
    return {name: dict(condition=condition) for name in SAMPLERS}


def velocity(net, args):
    """v(x, t, y) of a network that is pretrained and not yet distilled. Both conditions, c_CM and
    c_FM, give it; this one asks under c_FM, as one asks the distilled network."""
    condition = sampler_options(args)["euler"]["condition"]
    return lambda x, t, y: net(x, *conditions(t, condition)[1], y)


def preview(net, stage, noise, args):
    """Two rows of NFE 1 over two of NFE 2; while pretraining two rows of 20 guided Euler steps."""
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    if stage == "pretrain":
        return sample_euler(net, noise, y, 20, args.condition, args.w, args.t_low)
    return torch.cat([sample(net, noise, y, nfe, args.condition) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------

def check(args, net):
    """Raises ValueError for flags that do not go together."""
    if args.w != 1 and not net.num_classes:
        raise ValueError(f"--w {args.w}: guidance needs a network with classes; take --w 1")
    if args.condition == "expanded" and not net.expandable:
        raise ValueError("this network's time ends at 1; take --condition auxiliary")


@run.program(run.LESS_MEMORY)
def main():
    args = parse_args()
    job = (DryRun if args.dry_run else run.Run)(args, METHOD)

    # Data, network, teacher; the state in which the run stands
    with run.errors_in_one_line():
        dataset = data.load_for(args)
        args.net = data.fit_network_to(dataset, args.net) | dict(
            second_time=args.condition == "auxiliary")
        net = models.create(**args.net, seed=run.seed_of(args.seed, "init")).to(job.device)
        check(args, net)
        job.open_folder()
        teacher = weights.load_teacher(job.teacher_path(), net, args, job.device)
        job.resume(net, models.shard)
    jvp = select(args.jvp, args.compile)
    alpha, beta = (functools.partial(WEIGHTS[name], p=args.power)
                   for name in (args.alpha, args.beta))
    preview_noise = data.preview_noise(args.seed, dataset.shape).to(job.device)

    while job.step < job.total:
        # Stage: flow matching, then FACM from its averaged weights, which are its teacher
        if job.step == args.pretrain > 0:
            teacher = weights.load_teacher(job.end_pretraining(), net, args, job.device)
        stage, P = job.stage(), (args.P_mean, args.P_std)
        pretrains = stage.name == "pretrain"
        P = pretrains and args.pretrain_P or P

        # Seed: random numbers of the global batch; neither processes nor pieces change them
        random = run.generator(job.device, args.seed, "step", job.step)
        x0_all = torch.randn(
            (stage.batch, *dataset.shape), generator=random, device=job.device)         # line 1
        normal = torch.randn(stage.batch, generator=random, device=job.device)
        drop, mix = torch.rand((2, stage.batch), generator=random, device=job.device)

        terms, pieces = torch.zeros(2, device=job.device), job.pieces(stage.batch)
        for part, (rows, share) in enumerate(pieces):
            # Batch
            with job.data_errors_end_the_run():
                x1, y = run.to_device(
                    dataset.batch(args.seed, stage.first, stage.batch, rows), job.device)
            x0, t = x0_all[rows], sample_t(normal[rows], *P)
            if teacher is None:
                y = torch.where(drop[rows] < args.label_drop, net.num_classes, y)

            # Loss
            run.synchronise(job.trained, last=part + 1 == len(pieces))
            models.seed_dropout(
                net, run.seed_of(args.seed, "dropout", job.step, job.rank, part), rows=len(y))
            L_fm = L_cm = torch.zeros((), device=job.device)
            with job.autocast():
                if pretrains:
                    L_fm = pretrain_loss(job.trained, x1, x0, t, y, condition=args.condition,
                                         mixed=mix[rows] < 0.5)
                else:
                    L_fm, L_cm = facm_loss(
                        job.trained, jvp, x1, x0, t, y, alpha=alpha, beta=beta, c=args.c,
                        condition=args.condition, teacher=teacher, y_null=net.num_classes,
                        w=args.w, t_low=args.t_low)

            # Backward: summed over the pieces
            anchor = 1 if pretrains else args.anchor
            ((anchor * L_fm + L_cm) * share).backward()                # Eq. 8
            terms += torch.stack([L_fm, L_cm]).detach() * share

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
