"""Dual-End Consistency Model (Dong et al. 2026, arXiv 2602.10764), in one file.

DIRECTION OF TIME: t=0 noise, t=1 data. x_t = (1-t) x_0 + t x_1, x_0 ~ N(0, I), x_1 data.
One network F(x, t, s) jumps from time t to time s. Only three clusters of pairs (t, s) are trained:
to the data (s=1, for few steps), in place (s=t, for stability and for many steps), and from the
noise to any time (t near 0, for the first step of samplers that do not jump to the data first).

    f(x_t, t, s) = x_t + (s-t) F(x_t, t, s)              `sample`: jump from t to s       Eq. 9
    v     = v_cond + (w-1) D, D = v_cond - v_uncond      `guided_velocity`                Eq. 18
    L_CM  = |F - v_tar|^2, v_tar = F - w_1(t) g, s = 1   `decm_loss`: consistency         Eq. 10
            g = F - v - (1-t) JVP(F; (v, 1, 0))          `cm_target`                      Eq. 11
    L_N2N = the same at (x_r, r, t), with w_2(r, t) and  `n2n_loss`: noise to noisy       Eq. 15
            g = (lam+gam) F - (gam v_r + lam v_psi) - (t-r) JVP(F; (gam v_r, gam, -lam))
    L_FM  = |F(x_t, t, t) - v|^2 + 1 - cos(F, v)         `fm_loss`: instantaneous         Eq. 17
    Each squared error e is used as e / (e+c)^p          `adaptive`                       4.4

    x1, x0, xt, t   z_ref, z, z_t, t        lam, gam  weights of the right end t and the left end r
    F_cm, F_fm      F at s=1 and at s=t     v_psi     velocity at the right end, at f(x_r, r, t)
    dF_dt, dF       JVPs, without gradient  teacher   F_tea, frozen; None: from scratch

Launch:
    python decm.py                                               # laptop: teacher and student
    python decm.py --data cifar10                                # 1 GPU
    torchrun --nproc_per_node=8 decm.py --data imagenet_latents  # 8 GPUs

Without --teacher, the script uses the teacher of flow.py in runs/flow-DATA, and trains it first if
it is missing. Results and details: docs/decm.md. Comments mark every departure from the paper:
"paper: ...; here: ...". "line 4" is line 4 of the paper's Algorithm 1.
"""

import copy
import functools
import math

import torch
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

import data
import models
from common import flags, processes
from common.ema import gamma_of
from common.run import launch
from common.seeds import generator, seed_of
from common.teachers import find_or_train, load_into
from jvp import JVP, in_one_pass, select

METHOD = "decm"

# The presets, one for each data set. A flag on the command line overrides its value. The paper
# gives lr, freq and p = 0.5, and w for the teacher. Batch, betas, EMA, network, P_mean, P_std and c
# are FACM's. N, eta, lam, gam, w_1, w_2 and r are not given, so these are ours. So are the warm-up
# of the learning rate and the clipping of the gradient at norm 1.
PRESETS = {
    "glyphs": dict(                        # ours: minutes on a laptop need high rates that fall
        resolution=16,
        steps=1400,
        batch=8,
        lr=5e-3,
        lr_final=0.0,
        warmup=300,
        betas=(0.9, 0.99),
        ema_sigma=0.1,
        jvp="fd",                          # the fastest of the three for so small a network
        net=dict(
            name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), sigma_data=0.6,
            adaptive_scale=True, time_scale=8.0),
        P_mean=-0.8,
        P_std=1.6,
        w=1.75,
        freq=5,
        c=1e-2,
    ),
    "cifar10": dict(                       # not in the paper: FACM's values
        resolution=32,
        steps=200_000,
        batch=128,
        lr=1e-4,
        lr_final=1.0,
        warmup=1000,                       # ours
        betas=(0.9, 0.995),
        ema_sigma=0.2,
        precision="tf32",                  # ours
        micro_batch=64,                    # ours: fits a GPU of 24 GB
        save_every=1000,                   # ours
        jvp="fused",
        xflip=True,
        uncond=True,
        net=dict(name="DDPM++", dropout=0.1, sigma_data=0.5),
        P_mean=-1.0,
        P_std=1.4,
        w=1.0,
        freq=3,
        c=1e-3,
    ),
    "imagenet_latents": dict(
        steps=313_000,                     # 250 epochs (section 6)
        batch=1024,
        lr=1e-4,
        lr_final=1.0,
        warmup=1000,                       # ours
        betas=(0.9, 0.999),
        ema_sigma=0.2,
        precision="bf16",                  # as FACM's code
        micro_batch=32,                    # ours: fits a GPU of 80 GB
        save_every=5000,                   # ours
        jvp="fused",
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        P_mean=-0.8,
        P_std=1.6,
        w=1.75,
        freq=3,
        c=1e-3,
    ),
}
PRESETS["mnist"] = PRESETS["glyphs"] | dict(               # ours
    resolution=None, steps=800, batch=16,
    net=PRESETS["glyphs"]["net"] | dict(width=16, mult=(1, 2, 4)))


def parse_args():
    parser = flags.Parser(description="Dual-End Consistency Model. The defaults of most flags are "
                          "those of the preset.")
    flags.add_flags(parser, PRESETS, teacher=True)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    # The numbers after a type are the smallest and the largest value. Flags without a default have
    # that of the preset
    flag("--P-mean", float, help="mean of ln(sigma), for --times arctan and lognorm")
    flag("--P-std", float, 0, help="standard deviation of ln(sigma)")
    flag("--w", float, help="guidance scale of the teacher; 1 is none (Eq. 18)")
    flag("--jvp", choices=list(JVP), help="how dF/dt is computed: fused, in one pass with F; "
         "exact, by torch.func.jvp; fd, by a central difference (Eq. 11)")
    flag("--objectives", nargs="+", choices=["fm", "cd", "n2n"], default=["fm", "cd", "n2n"],
         help="the losses to train with (Table 3 c to g)")
    flag("--vel-norm", float, 1e-9, metavar="ETA", help="length to which D is "
         "scaled (Table 3 h; default: D is not scaled)")
    flag("--vel-clip", action="store_true", help="scale only those D that are longer than ETA "
         "(not in the paper)")
    flag("--times", choices=["nseg", "arctan", "lognorm"], default="nseg", help="how t is drawn "
         "(Table 3 j to l)")
    flag("--segments", int, 1, default=64, help="N, the number of segments at whose ends t "
         "lies (nseg)")
    flag("--freq", int, 1, help="steps between N2N updates (Table 3 m to o)")
    flag("--lam", float, 0, default=0.5, help="lambda, weight of N2N's right end t (Eq. 14)")
    flag("--gam", float, 0, default=0.5, help="gamma, weight of N2N's left end r (Eq. 14)")
    flag("--vpsi", choices=["model", "data"], default="model", help="where v_psi is "
         "evaluated: at f(x_r, r, t) (model) or at x_t (data)")
    flag("--r-max", float, default=0.02, help="r is uniform from 0 to R_MAX (r -> 0 in Eq. 12)")
    flag("--r-fall", int, 1, metavar="STEPS", help="r is R_MAX at first, and falls linearly to 0 "
         "in STEPS steps (not in the paper; default: r is drawn)")
    flag("--w1", choices=list(WEIGHTS), default="1", help="w_1(t) (Algorithm 1, line 10)")
    flag("--w2", choices=list(WEIGHTS), default="1", help="w_2(r, t), at the time 1 - (t-r)")
    flag("--power", float, 0, default=0.5, help="p of the adaptive weight (4.4)")
    flag("--c", float, 1e-9, help="the constant in the adaptive weight")
    flag("--label-drop", float, 0, 1, default=0.1, help="fraction of labels replaced by the null "
         "label, for a network that is trained from scratch")
    args = flags.parse(parser, METHOD, PRESETS)
    flags.check_effect(
        args,
        ("P-mean P-std", args.times != "nseg", "--times arctan or lognorm"),
        ("segments", args.times == "nseg", "--times nseg"),
        ("vel-norm", args.w != 1, "guidance, --w other than 1"),
        ("vel-clip", args.vel_norm is not None, "--vel-norm ETA"),
        ("freq lam gam vpsi r-max r-fall w2", "n2n" in args.objectives, "n2n among --objectives"),
        ("w1", "cd" in args.objectives, "cd among --objectives"),
        ("label-drop", args.teacher == "none" and not args.uncond, "--teacher none and labels"))
    return args


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions of any shape: x1, x0, xt, v, F_cm, ... [B, ...], with channels in
# dimension 1; r, t, s [B] float; y [B] int64 or None. They need only torch and jvp.py.

def decm_loss(net, jvp, x1, x0, t, y, *, teacher=None, w1="1", p=0.5, c=1e-3, w=1.0, eta=None,
              vel_clip=False, y_null=None):
    """L_FM and L_CM, means over the batch, and the pair x_t, v (Algorithm 1, lines 4 to 14).

    net        F_theta, any callable net(x, t, s, y) with two times in [0, 1]; under DDP, the DDP
               wrapper, so that the backward pass averages the gradient
    jvp        a value of jvp.JVP; "fused" also calls net with tangent=, see jvp.with_tangent
    x1, x0, t, y   data, noise, times in [0, 1], labels or None
    teacher    F_tea, frozen: a callable teacher(x, t, None, y) that predicts the velocity; None if
               the network is trained from scratch
    w1         w_1(t), a key of WEIGHTS; p, c: see adaptive
    w, eta, vel_clip, y_null   guidance, its velocity normalisation, the null label: guided_velocity

    Raises ValueError if w is not 1, and teacher, y or y_null is None.
    """
    xt = interpolate(x1, x0, t)                                                # line 4
    v = flow_velocity(teacher, x1, x0, xt, t, y, w=w, eta=eta,                 # lines 5, 6
                      vel_clip=vel_clip, y_null=y_null)
    # t.clone(), because before 2.15 torch.compile fails if one tensor is passed twice
    one, s = torch.ones_like(t), t.clone()
    F_cm, dF_dt, F_fm = jvp(net, at=(xt, t, one, y), along=(v, 1, 0),          # line 8, Eq. 11
                            also=(xt, t, s, y))                                # line 13
    v_tar = cm_target(F_cm.detach(), v, dF_dt, t, WEIGHTS[w1](t))              # lines 9, 10
    L_cm = adaptive(F_cm, v_tar, p, c)                                         # line 11, Eq. 10
    L_fm = fm_loss(F_fm, v, p, c)                                              # line 14, Eq. 17
    return L_fm.mean(), L_cm.mean(), (xt, v)


def n2n_loss(net, jvp, x1, x0, xt, v, r, t, y, *, teacher=None, lam=0.5, gam=0.5, w2="1",
             vpsi="model", p=0.5, c=1e-3, w=1.0, eta=None, vel_clip=False, y_null=None):
    """L_FM and L_N2N, means over the batch (Algorithm 1, lines 18 to 27).

    xt, v      as decm_loss returns them; if they are None, L_FM is 0
    r, t       times with 0 <= r <= t <= 1, r near 0
    lam, gam   weights of the right end t and of the left end r
    w2         w_2(r, t), a key of WEIGHTS, as a function of the time 1 - (t-r)
    vpsi       where v_psi is evaluated: "model" for f(x_r, r, t), "data" for x_t, which needs v

    For the other arguments, see decm_loss. Raises ValueError for another vpsi, and for "data"
    without v.
    """
    if vpsi not in ("model", "data") or (vpsi == "data" and v is None):
        raise ValueError(f'vpsi={vpsi!r}: use "model" or, with v, "data"')
    guidance = dict(w=w, eta=eta, vel_clip=vel_clip, y_null=y_null)
    xr = interpolate(x1, x0, r)                                                # line 19
    v_r = torch.zeros_like(xr)             # not used if gam = 0
    if gam != 0:
        v_r = flow_velocity(teacher, x1, x0, xr, r, y, **guidance)             # lines 20, 21
    at, along = (xr, r, t, y), (gam * v_r, gam, -lam)
    if v is None:
        F_n2n, dF = jvp(net, at=at, along=along)                               # line 22
    else:
        F_n2n, dF, F_fm = jvp(net, at=at, along=along,                         # line 22
                              also=(xt, t, t.clone(), y))                      # line 26
    if vpsi == "data":
        v_psi = v
    else:
        v_psi = right_end_velocity(net, teacher, xr, F_n2n.detach(), r, t, y, **guidance)  # Eq. 13
    v_tar = n2n_target(F_n2n.detach(), v_r, v_psi, dF, r, t, lam=lam, gam=gam, # lines 23, 24
                       w2=WEIGHTS[w2](1 - t + r))
    L_n2n = adaptive(F_n2n, v_tar, p, c)                                       # line 25, Eq. 15
    if v is None:
        return torch.zeros_like(L_n2n).mean(), L_n2n.mean()
    L_fm = fm_loss(F_fm, v, p, c)                                              # line 27, Eq. 17
    return L_fm.mean(), L_n2n.mean()


def wide(t, x):
    """t [B], reshaped to as many dimensions as x, so that it broadcasts over the samples."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def mean(a):
    """The mean over all dimensions except the first: [B, ...] -> [B]."""
    return a.mean(dim=tuple(range(1, a.dim())))


def interpolate(x1, x0, t):
    """x_t on the straight line from noise x0 to data x1."""
    t = wide(t, x1)
    return (1 - t) * x0 + t * x1


def flow_velocity(teacher, x1, x0, xt, t, y, *, w, eta, vel_clip, y_null):
    """v at x_t: the teacher's, guided (Eq. 18), or, from scratch, that of the pair (x0, x1)."""
    if teacher is not None:
        return guided_velocity(teacher, xt, t, y, w=w, eta=eta, vel_clip=vel_clip,
                               y_null=y_null)
    if w != 1:
        raise ValueError("guidance (w other than 1) needs a teacher")
    return x1 - x0


@torch.no_grad()
def guided_velocity(teacher, xt, t, y, *, w, eta=None, vel_clip=False, y_null=None):
    """The teacher's velocity at x_t, guided with scale w. eta: the length to which the difference D
    of each sample is scaled (velocity normalisation, Algorithm 1 line 6); None: D is not scaled.
    vel_clip: scale only those D that are longer than eta (not in the paper).
    """
    if w == 1:
        return teacher(xt, t, None, y)
    if y is None or y_null is None:
        raise ValueError("guidance (w other than 1) needs the labels y and the null label y_null")
    null = torch.full_like(y, y_null)
    v_cond, v_uncond = in_one_pass(teacher, (xt, t, None, y), (xt, t, None, null))
    D = v_cond - v_uncond
    if eta is not None:
        norm = D.square().sum(dim=tuple(range(1, D.dim())), keepdim=True).sqrt()
        scale = eta / norm.clamp_min(1e-8)
        if vel_clip:
            scale = scale.clamp_max(1)
        D = scale * D
    return v_cond + (w - 1) * D                                        # Eq. 18


@torch.no_grad()
def right_end_velocity(net, teacher, xr, F_n2n, r, t, y, **guidance):
    """v_psi at f(x_r, r, t). paper: the teacher's velocity, and nothing for training from scratch;
    here: the network's own F(x, t, t) from scratch, because the point is not on the line of a pair.
    """
    f = xr + wide(t - r, xr) * F_n2n                                   # Eq. 9
    if teacher is None:
        return net(f, t, t.clone(), y)
    return guided_velocity(teacher, f, t, y, **guidance)


def cm_target(F_cm, v, dF_dt, t, w1):
    """The target v_tar for the jump to the data, s = 1. w1 [B]."""
    t, w1 = wide(t, v), wide(w1, v)
    g = F_cm - v - (1 - t) * dF_dt                                     # line 9
    return F_cm - w1 * g                                               # line 10, Eq. 10


def n2n_target(F_n2n, v_r, v_psi, dF, r, t, *, lam, gam, w2):
    """The target v_tar for the jump from r to t. dF = JVP(F; (gam v_r, gam, -lam)); w2 [B].

    The left end needs F = v_r + (t-r) dF/dr along the path, the right end F + (t-r) dF/ds = v_psi.
    g is gam times the first residual plus lam times the second, as in Eq. 14.
    """
    r, t, w2 = wide(r, v_r), wide(t, v_r), wide(w2, v_r)
    # paper: Eq. 15 swaps lam and gam in the tangents, and Algorithm 1 also in the velocities, and
    # multiplies the derivative by lam twice; here: what follows from Eq. 14, because this residual
    # is 0 for a network whose jumps are exact (tests/test_decm.py). Eq. 15 is equal for lam = gam.
    g = (lam + gam) * F_n2n - (gam * v_r + lam * v_psi) - (t - r) * dF # line 23
    return F_n2n - w2 * g                                              # line 24, Eq. 15


def adaptive(F_theta, v_tar, p, c):
    """e / (e+c)^p [B]; no gradient flows into the weight. p = 0.5 gives twice the gradient of the
    Pseudo-Huber loss, which 4.4 names. paper: no formula of the weight; here: MeanFlow's, which 4.4
    cites, and e is the mean over all dimensions except the batch, as in the code of FACM."""
    e = mean((F_theta - v_tar).square())
    return e / (e + c).pow(p).detach()


def fm_loss(F_fm, v, p, c):
    """Squared error plus cosine distance [B]. paper: Eq. 17 has no weight, and 4.4 has one for
    losses in general; here: the error has the adaptive weight as well, because the losses of the
    jumps outweigh it otherwise (docs/decm.md)."""
    distance = 1 - cosine(F_fm, v)
    return adaptive(F_fm, v, p, c) + distance                          # Eq. 17


def cosine(a, b):
    """The cosine of the angle between a and b [B]. paper: does not say over which dimensions;
    here: over the channels of a pixel, averaged over the pixels, because FACM's code does so. With
    one channel, which has no direction, it is over whole samples."""
    if a.shape[1] == 1:
        a, b = a.flatten(1), b.flatten(1)
    return cosine_similarity(a, b, dim=1).reshape(len(a), -1).mean(dim=1)


WEIGHTS = {
    "1": lambda t: torch.ones_like(t),
    "1-t": lambda t: 1 - t,
    "1-sqrt": lambda t: 1 - t.sqrt(),
}


def sample_t(times, normal, uniform, P_mean, P_std, segments):
    """Times in [0, 1] (line 3). normal, uniform: standard normal and uniform numbers [B]. paper:
    from U(0, 1), but in 4.4 at the ends of N segments; here: the latter, because Table 3
    favours it."""
    if times == "nseg":
        return (uniform * (segments + 1)).floor() / segments
    sigma = torch.exp(P_mean + P_std * normal)
    if times == "arctan":
        return 1 - 2 / math.pi * torch.atan(sigma)
    return 1 / (1 + sigma)


def sample_r(uniform, t, step, r_max, r_fall):
    """The left ends r of the jumps from the noise (line 18), at most t, because no jump goes back
    in time. paper: r goes to 0 in a way that is not given; here: uniform from 0 to r_max or, with
    r_fall, r_max at first, which falls linearly to 0 in r_fall steps. uniform: random numbers [B].
    """
    if r_fall is None:
        r = r_max * uniform
    else:
        r = torch.full_like(t, r_max * max(0, 1 - step / r_fall))
    return torch.minimum(r, t)


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, ...], standard normal; y [B] labels or None; -> samples [B, ...].

@torch.no_grad()
def sample(net, noise, y, *, nfe):
    """nfe jumps to the data at equal steps of time, with fresh noise in between (Figure 5b).
    K = nfe."""
    return sample_mix(net, noise, y, nfe=nfe, n_ode=0)


@torch.no_grad()
def sample_euler(net, noise, y, *, nfe):
    """nfe Euler steps along F(x_t, t, t) (Figure 5a). K = 1."""
    xt = noise[0]
    for i in range(nfe):
        t = xt.new_full(xt.shape[:1], i / nfe)
        xt = xt + net(xt, t, t, y) / nfe                               # Eq. 4
    return xt


@torch.no_grad()
def sample_mix(net, noise, y, *, nfe, n_ode=None):
    """Follows the ODE first and then the CM sampler, at nfe equal steps of time (4.5, Figure 5c).
    The first n_ode steps are a jump from the noise and Euler steps. The others are jumps to the
    data, with fresh noise in between. K = nfe - n_ode.

    n_ode: from 0 to nfe - 1 (default: half of the NFE, or all but 4, whichever is larger). Raises
    ValueError for other values.
    """
    if n_ode is None:
        n_ode = max(nfe // 2, nfe - 4)
    if not 0 <= n_ode < nfe:
        raise ValueError(f"--n-ode {n_ode}: use 0 to {nfe - 1}, which is one less than the NFE")
    xt = noise[0]
    for i in range(nfe):
        t = xt.new_full(xt.shape[:1], i / nfe)
        t_next = xt.new_full(xt.shape[:1], (i + 1) / nfe)
        if i == 0 and n_ode > 0:
            xt = xt + net(xt, t, t_next, y) / nfe                      # Eq. 9
        elif i < n_ode:
            xt = xt + net(xt, t, t, y) / nfe                           # Eq. 4
        else:
            x1 = xt + (1 - i / nfe) * net(xt, t, torch.ones_like(t), y)        # Eq. 9
            if i + 1 < nfe:
                xt = interpolate(x1, noise[i + 1 - n_ode], t_next)
    return x1


SAMPLERS = {"cm": sample, "euler": sample_euler, "mix": sample_mix}
DETERMINISTIC = ("euler",)  # these need one noise, K = 1, whatever the NFE


def default_sampler(nfe, args):
    """The default sampler for an NFE (4.5). Without n2n it is not mix, and without fm not euler.
    args: the flags of the run, a dict."""
    objectives = args.get("objectives", ["fm", "cd", "n2n"])
    if objectives == ["fm"]:
        return "euler"
    if 4 <= nfe <= 16 and "n2n" in objectives:
        return "mix"
    if nfe > 16 and "fm" in objectives:
        return "euler"
    return "cm"


def sampler_options(args):
    """{sampler: its options}. args: the flags of the run, a dict."""
    return {name: {} for name in SAMPLERS}


def preview(net, noise, args):
    """Two rows of samples at NFE 1, above two rows at NFE 2."""
    y = data.preview_labels(net, noise, args.uncond)
    return torch.cat([sample(net, noise, y, nfe=nfe) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------
# TRAINING.

def check(args, net):
    """Raises ValueError for flags that cannot be combined. net: the options of the network."""
    if args.w != 1 and (args.uncond or not net["num_classes"]):
        raise ValueError(f"--w {args.w}: guidance needs labels and a network with classes; use "
                         "--w 1")
    if args.w != 1 and args.teacher == "none":
        raise ValueError(f"--w {args.w}: guidance needs a teacher; use --w 1 with --teacher none")
    if args.lam + args.gam <= 0:
        raise ValueError("the sum of --lam and --gam must be positive")
    if not 0 <= args.r_max < 1:
        raise ValueError(f"--r-max {args.r_max}: use a number from 0 to below 1")
    if set(args.objectives) == {"n2n"}:    # FreeFlow's predictor, with the flags in docs/decm.md
        if args.freq != 1:
            raise ValueError("--objectives n2n alone needs --freq 1, because the other steps would "
                             "train nothing")
        if args.vpsi == "data":
            raise ValueError("--objectives n2n alone needs --vpsi model: it computes no velocity "
                             "at x_t")


def train(args, run):
    """Trains with the flags args. run (common/run.py) manages the checkpoints and the log."""
    device, rank, world = run.device, run.rank, run.world

    # Data and teacher (None with --teacher none)
    dataset = data.load_for(args)
    check(args, data.fit_network_to(dataset, args.net))    # before a teacher is trained for hours
    teacher, args.net = find_or_train(args, dataset, run)
    check(args, args.net)                  # with the teacher's network

    # Network: it starts from the teacher's weights (line 1). The weights of its second time start
    # at zero
    args.net = args.net | dict(second_time=True)
    net = models.create(**args.net, seed=seed_of(args.seed, "init"), device=device)
    net.grad_checkpoint = args.grad_checkpoint
    if teacher is not None:
        load_into(net, teacher)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema_gamma = gamma_of(args.ema_sigma)   # the exponent of EDM2's average

    # The micro-batches of this process, the optimiser, and the newest checkpoint
    micro_batches = processes.split_batch(args.batch, rank, world, args.micro_batch)
    if args.fsdp:
        for network in (net, ema, teacher):
            if network is not None:
                models.shard(network)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas,
                                  weight_decay=args.weight_decay, fused=device.type != "mps")
    run.resume(net, ema, optimizer)

    # The network as the loss calls it: compiled, and wrapped in DDP
    model = net
    if args.compile:
        model = torch.compile(net)
    if world > 1 and not args.fsdp:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    if args.compile and teacher is not None:
        teacher.compile()
    jvp = select(args.jvp, args.compile)
    fm_weight = 1 if "fm" in args.objectives else 0
    cd_weight = 1 if "cd" in args.objectives else 0
    has_first_update = fm_weight + cd_weight > 0       # not with --objectives n2n alone
    shape = (args.batch, *dataset.shape)
    preview_noise = data.preview_noise(args.seed, dataset.shape).to(device)

    for step in range(run.step, args.steps):
        # Learning rate: args.lr times the smaller of a linear warm-up and a linear decay from 1 to
        # lr_final
        warmup = min(1, (step + 1) / max(args.warmup, 1))
        decay = 1 - (1 - args.lr_final) * step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(warmup, decay)

        # Draw noise and times for the whole batch. They depend only on the seed and the step, not
        # on the number of processes or micro-batches
        random = generator(device, args.seed, "step", step)
        x0_all = torch.randn(shape, generator=random, device=device)                     # line 2
        normal = torch.randn(args.batch, generator=random, device=device)
        # The second of these four is not used; without it, old runs could not be repeated
        drop_all, _, uniform_t, uniform_r = torch.rand(
            (4, args.batch), generator=random, device=device)
        t_all = sample_t(args.times, normal, uniform_t, args.P_mean, args.P_std,         # line 3
                         args.segments)
        r_all = sample_r(uniform_r, t_all, step, args.r_max, args.r_fall)                # line 18

        # The batch, in micro-batches
        batches = []
        for samples in micro_batches:
            x1, y = run.batch(dataset, step, samples)                                    # line 2
            if teacher is None:
                y = torch.where(drop_all[samples] < args.label_drop, net.num_classes, y)
            batches.append((x1, x0_all[samples], t_all[samples], y))

        # First update: L_CM and L_FM. Accumulate the gradient over the micro-batches. With the last
        # one, it is averaged over the processes
        metrics, first_xt_v = {}, []
        if has_first_update:
            if hasattr(net, "force_weight_norm"):
                net.force_weight_norm()    # of EDM2's networks, before each update
            losses = torch.zeros(2, device=device)
            for i, (x1, x0, t, y) in enumerate(batches):
                # The same dropout mask in all passes of this micro-batch
                models.seed_dropout(net, seed_of(args.seed, "dropout", step, rank, i), rows=len(y))
                last = i == len(batches) - 1
                if args.fsdp:
                    net.set_requires_gradient_sync(last)
                elif world > 1:
                    model.require_backward_grad_sync = last            # what DDP's no_sync() sets
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    L_fm, L_cm, xt_v = decm_loss(
                        model, jvp, x1, x0, t, y, teacher=teacher, w1=args.w1, p=args.power,
                        c=args.c, w=args.w, eta=args.vel_norm, vel_clip=args.vel_clip,
                        y_null=net.num_classes)
                first_xt_v.append(xt_v)                # for the second update
                share = len(y) / (args.batch // world)         # of the samples of this process
                loss = (fm_weight * L_fm + cd_weight * L_cm) * share
                loss.backward()
                losses += torch.stack([L_fm, L_cm]).detach() * share

            # Clip and step. A step whose gradient is not finite is skipped
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
            if args.fsdp:
                grad_norm = grad_norm.full_tensor()
            if grad_norm.isfinite():
                optimizer.step()                                                         # line 15
            optimizer.zero_grad()
            metrics = dict(L_fm=losses[0], L_cm=losses[1], grad_norm=grad_norm)

        # Second update, in every freq-th step: L_N2N, and L_FM again
        if "n2n" in args.objectives and step % args.freq == 0:                           # line 17
            if hasattr(net, "force_weight_norm"):
                net.force_weight_norm()
            losses = torch.zeros(2, device=device)
            for i, (x1, x0, t, y) in enumerate(batches):
                xt, v = first_xt_v[i] if first_xt_v else (None, None)
                r = r_all[micro_batches[i]]
                models.seed_dropout(net, seed_of(args.seed, "dropout", step, rank, i), rows=len(y))
                last = i == len(batches) - 1
                if args.fsdp:
                    net.set_requires_gradient_sync(last)
                elif world > 1:
                    model.require_backward_grad_sync = last
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    L_fm, L_n2n = n2n_loss(
                        model, jvp, x1, x0, xt, v, r, t, y, teacher=teacher, lam=args.lam,
                        gam=args.gam, w2=args.w2, vpsi=args.vpsi, p=args.power, c=args.c,
                        w=args.w, eta=args.vel_norm, vel_clip=args.vel_clip,
                        y_null=net.num_classes)
                share = len(y) / (args.batch // world)
                loss = (fm_weight * L_fm + L_n2n) * share
                loss.backward()
                losses += torch.stack([L_fm, L_n2n]).detach() * share
            grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
            if args.fsdp:
                grad_norm = grad_norm.full_tensor()
            if grad_norm.isfinite():
                optimizer.step()                                                         # line 28
            optimizer.zero_grad()
            metrics |= dict(L_n2n=losses[1], grad_norm_n2n=grad_norm)

        # Update the average of the weights (EDM2's power function). paper: after each update; here:
        # after both, because the power function then counts steps
        ema_beta = (1 - 1 / (step + 1)) ** (ema_gamma + 1)
        with torch.no_grad():              # ema += (1 - ema_beta) * (net - ema)
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()),
                                 1 - ema_beta)

        # Log. At intervals, draw a preview, save a checkpoint, and measure the FID of samples
        run.log(step, **metrics)                                                         # line 30
        if run.preview_is_due():
            images = run.decode(preview(ema, preview_noise, args))
            data.save_preview(run.preview_path(), images)
        run.save()
        if run.evaluation_is_due():
            run.evaluate(ema)


def main():
    launch(train, METHOD, parse_args())


if __name__ == "__main__":
    main()
