"""Dual-End Consistency Model (Dong et al. 2026, arXiv 2602.10764), in one file.

DIRECTION OF TIME: t=0 noise, t=1 data. x_t = (1-t) x_0 + t x_1, x_0 ~ N(0, I), x_1 data.
One network F(x, t, s) jumps from time t to time s. Not all pairs (t, s) are trained, only three
clusters: to the data (s=1, few steps), in place (s=t, stability, and many steps), and from the
noise to any time (t near 0, the first step of samplers that do not start with a jump to the data).

    f(x_t, t, s) = x_t + (s-t) F(x_t, t, s)              samplers: jump from t to s       Eq. 9
    v     = v_cond + (w-1) D, D = v_cond - v_uncond      `guided_velocity`                Eq. 18
    L_CM  = |F - v_tar|^2, v_tar = F - w_1(t) g, s = 1   `decm_loss`: consistency         Eq. 10
            g = F - v - (1-t) JVP(F; (v, 1, 0))          `cm_target`                      Eq. 11
    L_N2N = the same at (x_r, r, t), with w_2(r, t) and  `n2n_loss`: noise to noisy       Eq. 15
            g = (lam+gam) F - (gam v_r + lam v_psi) - (t-r) JVP(F; (gam v_r, gam, -lam))
    L_FM  = |F(x_t, t, t) - v|^2 + 1 - cos(F, v)         `fm_loss`: instantaneous         Eq. 17

    x1, x0, xt, t   z_ref, z, z_t, t        lam, gam  weights of the right end t and the left end r
    F_cm, F_fm      F at s=1 and at s=t     v_psi     velocity at the right end, at f(x_r, r, t)
    dF_dt, dF       JVPs, without gradient  teacher   F_tea, frozen; None: from scratch

Launch:
    python decm.py                                               # laptop: pretrain, distil
    python decm.py --data cifar10                                # 1 GPU
    torchrun --nproc_per_node=8 decm.py --data imagenet_latents  # 8 GPUs

Results and details: docs/decm.md. A departure stands at its line: "paper: ...; here: ...".
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

METHOD = "decm"

# A row for each data set; a flag given by hand beats it. The paper gives w, lr, freq and p = 0.5,
# but neither N, eta, lam, gam, w_1, w_2, r nor c, which are ours; batch, EMA, network are FACM's.
# No paper has a warm-up of the rate, nor clipping of the gradient at norm 1.
PRESETS = {
    "glyphs": dict(                        # ours: minutes on a laptop want high rates that fall
        resolution=16, steps=1400, pretrain=2000, batch=8, lr=5e-3, lr_final=0.0, warmup=300,
        pretrain_batch=16, pretrain_lr=8e-3, pretrain_P=(0.0, 1.2), betas=(0.9, 0.99),
        ema_sigma=0.1, jvp="fd",
        net=dict(name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), sigma_data=0.6,
                 adaptive_scale=True, time_scale=8.0),
        P_mean=-0.8, P_std=1.6, w=1.75, freq=5, c=1e-2),
    "cifar10": dict(                       # not in the paper: FACM's row
        precision="tf32", micro_batch=64,                  # 24 GB
        resolution=32, steps=200_000, pretrain=400_000, batch=128, lr=1e-4, lr_final=1.0,
        warmup=1000, betas=(0.9, 0.995), ema_sigma=0.2, jvp="fused", xflip=True, uncond=True,
        net=dict(name="DDPM++", dropout=0.1, sigma_data=0.5),
        P_mean=-1.0, P_std=1.4, w=1.0, freq=3, c=1e-3),
    "imagenet_latents": dict(              # 250 epochs (section 5), from FACM's teacher
        precision="bf16", micro_batch=32,                  # FACM's code; 80 GB
        steps=313_000, pretrain=1_001_000, batch=1024, lr=1e-4, lr_final=1.0, warmup=1000,
        betas=(0.9, 0.999), ema_sigma=0.2, jvp="fused",
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        P_mean=-0.8, P_std=1.6, w=1.75, freq=3, c=1e-3),
}
PRESETS["mnist"] = PRESETS["glyphs"] | dict(               # ours
    resolution=None, steps=800, batch=16, pretrain_batch=32,
    net=PRESETS["glyphs"]["net"] | dict(width=16, mult=(1, 2, 4)))


def parse_args():
    parser = flags.Parser(description="Dual-End Consistency Model. Defaults: the preset's row.")
    flags.add_flags(parser, PRESETS)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    flag("--P-mean", float, help="mean of ln(sigma), for --times arctan and lognorm")
    flag("--P-std", float, 0, help="standard deviation of ln(sigma)")
    flag("--w", float, help="guidance scale of the teacher; 1 is none (Eq. 18)")
    flag("--jvp", choices=list(JVP), help="dF/dt: in one pass with F, by torch.func.jvp, or by a "
         "central difference (Eq. 11)")
    flag("--objectives", nargs="+", choices=["fm", "cd", "n2n"], default=["fm", "cd", "n2n"],
         help="the losses that are trained (Table 3 c to g)")
    flag("--vel-norm", float, 1e-9, metavar="ETA", help="length to which D is "
         "scaled (Table 3 h; default: D keeps its own)")
    flag("--times", choices=["nseg", "arctan", "lognorm"], default="nseg", help="how t is drawn "
         "(Table 3 j to l)")
    flag("--segments", int, 1, default=64, help="N, the segments at whose ends t lies (nseg)")
    flag("--freq", int, 1, help="steps between N2N updates (Table 3 m to o)")
    flag("--lam", float, default=0.5, help="lambda, weight of N2N's right end t (Eq. 14)")
    flag("--gam", float, default=0.5, help="gamma, weight of N2N's left end r (Eq. 14)")
    flag("--vpsi", choices=["model", "data"], default="model", help="where v_psi is "
         "taken: at f(x_r, r, t) (model) or at x_t (data)")
    flag("--r-max", float, default=0.02, help="r is uniform from 0 to this (r -> 0 in Eq. 12)")
    flag("--w1", choices=list(WEIGHTS), default="1", help="w_1(t) (Algorithm 1, line 10)")
    flag("--w2", choices=list(WEIGHTS), default="1", help="w_2(r, t), at the time 1 - (t-r)")
    flag("--power", float, 0, default=0.5, help="p of the adaptive weight (4.4)")
    flag("--c", float, 0, help="the constant in the adaptive weight")
    return flags.parse(parser, METHOD, PRESETS)


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions: x1, x0, xt, v, F_cm, ... [B, C, H, W]; r, t [B]; y int64 [B] or None.

def decm_loss(net, jvp, x1, x0, t, y, *, w1, p=0.5, c=1e-3, teacher=None, y_null=None, w=1.0,
              eta=None):
    """L_FM and L_CM, means over the batch, and the pair x_t, v (Algorithm 1, lines 4 to 14).

    net        F_theta, any callable net(x, t, s, y); DDP's wrapper, if there is one, so that the
               backward pass averages the gradient
    jvp        one of jvp.JVP; w1: a function of t [B]; p, c: see adaptive
    teacher    F_tea, the same kind of callable, frozen; None: from scratch
    y_null, w, eta   the null label; guidance of scale w, velocity normalisation (Eq. 18)
    """
    xt = interpolate(x1, x0, t)                                                # line 4
    v = flow_velocity(teacher, x1, x0, xt, t, y, y_null=y_null, w=w, eta=eta)  # lines 5, 6
    # A copy: before 2.15 torch.compile fails on the same tensor in two places
    one, s = torch.ones_like(t), t.clone()
    F_cm, dF_dt, F_fm = jvp(net, xt, t, one, y, v, 1, 0, (xt, t, s, y))        # lines 8, 13, Eq. 11
    v_tar = cm_target(F_cm.detach(), v, dF_dt, t, w1(t))                       # lines 9, 10
    L_cm = adaptive(F_cm, v_tar, p, c)                                         # line 11, Eq. 10
    L_fm = fm_loss(F_fm, v, p, c)                                              # line 14, Eq. 17
    return L_fm.mean(), L_cm.mean(), (xt, v)


def n2n_loss(net, jvp, x1, x0, xt, v, r, t, y, *, lam, gam, w2, vpsi="model", p=0.5, c=1e-3,
             teacher=None, y_null=None, w=1.0, eta=None):
    """L_FM and L_N2N, means over the batch (Algorithm 1, lines 18 to 27). xt, v: as decm_loss gives
    them; lam, gam: weights of the right end t and of the left end r; w2: a function of the time
    1 - (t-r); vpsi: v_psi at "model" f(x_r, r, t) or at "data" x_t; the others: see decm_loss."""
    guidance = dict(y_null=y_null, w=w, eta=eta)
    xr = interpolate(x1, x0, r)                                                # line 19
    v_r = flow_velocity(teacher, x1, x0, xr, r, y, **guidance)                 # lines 20, 21
    F_n2n, dF, F_fm = jvp(net, xr, r, t, y, gam * v_r, gam, -lam,              # lines 22, 26
                          (xt, t, t.clone(), y))
    v_psi = v if vpsi == "data" else right_end_velocity(
        net, teacher, xr, F_n2n.detach(), r, t, y, **guidance)                 # Eq. 13
    v_tar = n2n_target(F_n2n.detach(), v_r, v_psi, dF, r, t, lam=lam, gam=gam, # lines 23, 24
                       w2=w2(1 - t + r))
    L_n2n = adaptive(F_n2n, v_tar, p, c)                                       # line 25, Eq. 15
    L_fm = fm_loss(F_fm, v, p, c)                                              # line 27, Eq. 17
    return L_fm.mean(), L_n2n.mean()


def interpolate(x1, x0, t):
    """x_t on the straight line from noise x0 to data x1."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * x1


def flow_velocity(teacher, x1, x0, xt, t, y, **guidance):
    """v at x_t: the teacher's, guided (Eq. 18), or from scratch that of the pair (x0, x1)."""
    return x1 - x0 if teacher is None else guided_velocity(teacher, xt, t, y, **guidance)


@torch.no_grad()
def guided_velocity(teacher, xt, t, y, *, y_null, w, eta=None):
    """The teacher's velocity at x_t, guided with scale w. eta: the length, over C, H, W, that the
    difference D is given (velocity normalisation, Algorithm 1 line 6); None: D as it is."""
    s = t if getattr(teacher, "second_time", False) else None
    if w == 1 or y is None:
        return teacher(xt, t, s, y)
    null = torch.full_like(y, y_null)
    v_cond, v_uncond = in_one_pass(teacher, (xt, t, s, y), (xt, t, s, null))
    D = v_cond - v_uncond
    if eta is not None:
        D = eta * D / D.square().sum(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-8)
    return v_cond + (w - 1) * D                                        # Eq. 18


@torch.no_grad()
def right_end_velocity(net, teacher, xr, F_n2n, r, t, y, **guidance):
    """v_psi at f(x_r, r, t). paper: the teacher's, none from scratch; here: from scratch the
    network's own F(x, t, t), because the point is not on the line of a pair."""
    f = xr + (t - r)[:, None, None, None] * F_n2n                      # Eq. 9
    return (net(f, t, t.clone(), y) if teacher is None else
            guided_velocity(teacher, f, t, y, **guidance))


def cm_target(F_cm, v, dF_dt, t, w1):
    """v_tar of the jump to the data, s = 1. w1 [B]."""
    t, w1 = t[:, None, None, None], w1[:, None, None, None]
    g = F_cm - v - (1 - t) * dF_dt                                     # line 9
    return F_cm - w1 * g                                               # line 10, Eq. 10


def n2n_target(F_n2n, v_r, v_psi, dF, r, t, *, lam, gam, w2):
    """v_tar of the jump from r to t. dF = JVP(F; (gam v_r, gam, -lam)); w2 [B].

    The left end wants F = v_r + (t-r) dF/dr along the path, the right end F + (t-r) dF/ds = v_psi;
    gam times the first and lam times the second residual, as in Eq. 14, give g.
    """
    r, t, w2 = r[:, None, None, None], t[:, None, None, None], w2[:, None, None, None]
    # paper: Eq. 15 has lam and gam the other way round in the tangents, and Algorithm 1 also in v,
    # with lam twice before the derivative; here: what follows from Eq. 14, because only that is 0
    # for a network whose jumps are exact (tests/test_decm.py).
    g = (lam + gam) * F_n2n - (gam * v_r + lam * v_psi) - (t - r) * dF # line 23
    return F_n2n - w2 * g                                              # line 24, Eq. 15


def adaptive(F_theta, v_tar, p, c):
    """e / (e+c)^p [B]; no gradient flows into the weight. p = 0.5 gives the gradient of the
    Pseudo-Huber loss (4.4). paper: e is a squared norm; here: the mean over C, H, W, because FACM's
    authors, whose weight it is, have it so."""
    e = (F_theta - v_tar).square().mean(dim=(1, 2, 3))
    return e / (e + c).pow(p).detach()


def fm_loss(F_fm, v, p, c):
    """Squared error plus cosine distance [B]: that of a pixel's channels, mean over the pixels.
    paper: Eq. 17 has no weight, 4.4 one for losses in general; here: the adaptive weight on the
    error, too, because the jumps' losses drown it otherwise (docs/decm.md)."""
    cosine = cosine_similarity(F_fm, v, dim=1).mean(dim=(1, 2))
    return adaptive(F_fm, v, p, c) + 1 - cosine                        # Eq. 17


WEIGHTS = {"1": torch.ones_like, "1-t": lambda t: 1 - t, "1-sqrt": lambda t: 1 - t.sqrt()}


def sample_t(times, normal, uniform, P_mean, P_std, segments):
    """Times in [0, 1] from standard normal and uniform draws [B] (line 3). paper: from U(0, 1), but
    in 4.4 at the ends of N segments; here: the latter, because Table 3 prefers it."""
    if times == "nseg":
        return (uniform * (segments + 1)).floor() / segments
    sigma = torch.exp(P_mean + P_std * normal)             # noise to data: tan, or as it is
    return 1 - 2 / math.pi * torch.atan(sigma) if times == "arctan" else 1 / (1 + sigma)


def pretrain_loss(net, x1, x0, t, s, y):
    """Flow matching at any s: F is the velocity, whatever s says, as if there were none."""
    return (net(interpolate(x1, x0, t), t, s, y) - (x1 - x0)).square().mean()      # Eq. 3


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, C, H, W], standard normal; y [B] labels; -> images [B, C, H, W].

@torch.no_grad()
def sample(net, noise, y, nfe):
    """nfe jumps to the data at equal steps of time, fresh noise in between; K = nfe (Figure 5b)."""
    return sample_mix(net, noise, y, nfe, n_ode=0)


@torch.no_grad()
def sample_euler(net, noise, y, nfe):
    """nfe Euler steps along F(x_t, t, t); K = 1 (Figure 5a)."""
    xt = noise[0]
    for i in range(nfe):
        t = torch.full_like(noise[0, :, 0, 0, 0], i / nfe)
        xt = xt + net(xt, t, t, y) / nfe                               # Eq. 4
    return xt


@torch.no_grad()
def sample_mix(net, noise, y, nfe, n_ode=None):
    """Begins as an ODE and ends as CM, at nfe equal steps of time (4.5, Figure 5c): a jump from the
    noise, Euler steps up to n_ode of both together, then jumps to the data with fresh noise in
    between. n_ode: 0 to nfe - 1 (else ValueError; default: half, or all but 4); K = nfe - n_ode."""
    n_ode, xt = max(nfe // 2, nfe - 4) if n_ode is None else n_ode, noise[0]
    if not 0 <= n_ode < nfe:
        raise ValueError(f"--n-ode {n_ode}: want 0 to {nfe - 1}, one less than the NFE")
    for i in range(nfe):
        t, t_next, one = (torch.full_like(noise[0, :, 0, 0, 0], time)
                          for time in (i / nfe, (i + 1) / nfe, 1))
        if i < n_ode:
            xt = xt + net(xt, t, t_next if i == 0 else t, y) / nfe     # Eq. 9, then Eq. 4
        else:
            x1 = xt + (1 - i / nfe) * net(xt, t, one, y)               # Eq. 9
            if i + 1 < nfe:
                xt = interpolate(x1, noise[i + 1 - n_ode], t_next)
    return x1


SAMPLERS = {"cm": sample, "euler": sample_euler, "mix": sample_mix}
DETERMINISTIC = ("euler",)                 # one noise, whatever the NFE


def default_sampler(nfe, args):
    """The sampler that suits an NFE (4.5); args: the training's, a dict."""
    return "cm" if nfe < 4 else "mix" if nfe <= 16 else "euler"


def sampler_options(args):
    """{sampler: keyword arguments from the training's args, a dict}."""
    return {name: {} for name in SAMPLERS}


def preview(net, stage, noise, args):
    """Two rows of NFE 1 over two of NFE 2; while pretraining two rows of 20 Euler steps."""
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    if stage == "pretrain":
        return sample_euler(net, noise, y, 20)
    return torch.cat([sample(net, noise, y, nfe) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------

def check(args, net):
    """Raises ValueError for flags that do not go together."""
    if args.w != 1 and not net.num_classes:
        raise ValueError(f"--w {args.w}: guidance needs a network with classes; take --w 1")
    if args.w != 1 and not args.teacher and not args.pretrain:
        raise ValueError(f"--w {args.w}: there is no guidance from scratch; take --w 1")
    if args.lam + args.gam <= 0 or not 0 <= args.r_max < 1:
        raise ValueError("want --lam + --gam > 0, 0 <= --r-max < 1")
    if args.objectives == ["n2n"]:
        raise ValueError("--objectives n2n: it stands beside fm or cd, not alone")


@run.program(run.LESS_MEMORY)
def main():
    args = parse_args()
    job = (DryRun if args.dry_run else run.Run)(args, METHOD)

    # Data, network, teacher; the state in which the run stands
    with run.errors_in_one_line():
        dataset = data.load_for(args)
        args.net = data.fit_network_to(dataset, args.net) | dict(second_time=True)
        net = models.create(**args.net, seed=run.seed_of(args.seed, "init")).to(job.device)
        check(args, net)
        job.open_folder()
        teacher = weights.load_teacher(job.teacher_path(), net, args, job.device)
        job.resume(net, models.shard)                                          # line 1
    jvp, w1, w2 = select(args.jvp, args.compile), WEIGHTS[args.w1], WEIGHTS[args.w2]
    preview_noise = data.preview_noise(args.seed, dataset.shape).to(job.device)

    while job.step < job.total:
        # Stage: flow matching, then DE-CM from its averaged weights, which are its teacher
        if job.step == args.pretrain > 0:
            teacher = weights.load_teacher(job.end_pretraining(), net, args, job.device)
        stage, times, P = job.stage(), args.times, (args.P_mean, args.P_std)
        if stage.name == "pretrain":
            times, P = "arctan", args.pretrain_P or P

        # Seed: random numbers of the global batch; neither processes nor pieces change them
        random = run.generator(job.device, args.seed, "step", job.step)
        x0_all = torch.randn(
            (stage.batch, *dataset.shape), generator=random, device=job.device)        # line 2
        normal = torch.randn(stage.batch, generator=random, device=job.device)
        drop, s_all, u, r_all = torch.rand((4, stage.batch), generator=random, device=job.device)

        # Batch, in pieces; seen: the x_t and v of each
        pieces, figures, seen = job.pieces(stage.batch), {}, {}
        with job.data_errors_end_the_run():
            batches = [run.to_device(dataset.batch(args.seed, stage.first, stage.batch, rows),
                                     job.device) for rows, _ in pieces]

        # Algorithm 1: the noise-to-noisy objective is an update of its own, every --freq steps
        n2n = "n2n" in args.objectives and stage.k % args.freq == 0            # line 17
        for update in [METHOD, "n2n"] if n2n and stage.name == METHOD else [stage.name]:
            terms = torch.zeros(2, device=job.device)
            for part, (rows, share) in enumerate(pieces):
                x1, y = batches[part]
                x0, t = x0_all[rows], sample_t(times, normal[rows], u[rows], *P, args.segments)
                r = torch.minimum(args.r_max * r_all[rows], t)         # line 18; never back in time
                if teacher is None:
                    y = torch.where(drop[rows] < args.label_drop, net.num_classes, y)

                # Loss
                run.synchronise(job.trained, last=part + 1 == len(pieces))
                models.seed_dropout(
                    net, run.seed_of(args.seed, "dropout", job.step, job.rank, part), rows=len(y))
                L_fm = L_jump = torch.zeros((), device=job.device)
                common = dict(p=args.power, c=args.c, teacher=teacher, y_null=net.num_classes,
                              w=args.w, eta=args.vel_norm)
                with job.autocast():
                    if update == "pretrain":
                        L_fm = pretrain_loss(job.trained, x1, x0, t, s_all[rows], y)
                    elif update == METHOD:
                        L_fm, L_jump, seen[part] = decm_loss(
                            job.trained, jvp, x1, x0, t, y, w1=w1, **common)
                    else:
                        L_fm, L_jump = n2n_loss(
                            job.trained, jvp, x1, x0, *seen[part], r, t, y, lam=args.lam,
                            gam=args.gam, w2=w2, vpsi=args.vpsi, **common)

                # Backward: summed over the pieces
                fm = update == "pretrain" or "fm" in args.objectives
                jump = update == "n2n" or "cd" in args.objectives
                ((fm * L_fm + jump * L_jump) * share).backward()
                terms += torch.stack([L_fm, L_jump]).detach() * share

            # Clip, optimiser
            grad_norm = job.clip_gradient()
            figures |= (dict(L_n2n=terms[1], grad_norm_n2n=grad_norm) if update == "n2n" else
                        dict(L_fm=terms[0], L_cm=terms[1], grad_norm=grad_norm))
            job.set_lr(stage.lr)
            job.optimizer.step()                                               # lines 15, 28
            job.optimizer.zero_grad()

        # EMA. paper: after either update; here: after both, so that k counts steps
        run.ema_update(job.ema, net, stage.k + 1, job.gamma, args.ema_beta)

        # Log, save, preview
        signalled = job.after_step(stage, figures)                             # line 30
        if job.shows:
            data.save_preview(job.preview_path(), preview, job.ema, stage.name, preview_noise, args)
        if signalled:
            break
    job.finish()


if __name__ == "__main__":
    main()
