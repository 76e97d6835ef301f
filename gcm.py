"""A Guide to Training Consistency Models (GCM; openreview.net/forum?id=1SHdqm7Eaa), in one file.

DIRECTION OF TIME: t=0 data, t=1 noise. x_t = (1-t) x + t z, x data, z ~ N(0, sigma_d^2 I), and
t_0 = 0.006 <= t <= t_T = 0.994. Consistency training without a teacher, with each choice studied
separately: the distance between the two points of a pair (h), the time scaling of the network (c),
the weight of each time (w), the density of the times (p), and the time s at which a jump ends: t_0
(CU), or any s below t (VU).

    g(x_t, t, s) = x_t + (s-t) f(x_t, t, s)                    `sample`: jump from t to s Eq. 3
    f_tar        = u + (s-r) (f(x_t,t,s) - f(x_r,r,s)) / (t-r) `gcm_loss`, difference     Eq. 39
                 = u + (s-t) df/dt                             --jvp exact, fused         Eq. 6
                   with x_r = x_t + (r-t) u, u = z - x, r = max(t - h, s)
    L            = w(t) / p(t|s) |f(x_t, t, s) - f_tar|        no gradient in f_tar       Eq. 39
    h(t), c(t)   = eps e^(-mu t), (e^(mu t) - 1) / mu          `STEPS`, `TIME_SCALINGS`   Eq. 36, 37
    w(t)         = t^gamma e^(-lambda t)                       `WEIGHTS`                  Eq. 14
    p(t|s), p(s) = p_sine on [s, t_T], p_up                    `sample_times`             Eq. 15, 17
    M > 1: |.| is the energy distance of M jumps from t and M from r, `mmd_loss`          Eq. 44, 46

    x, z, xt, u, t, r, s, h   as above        F   f(x_t, t, s), with gradient
Launch:
    python gcm.py                                                              # laptop
    python gcm.py --data cifar10 --row L                                       # 1 GPU
    torchrun --nproc_per_node=8 gcm.py --data imagenet_latents                 # 8 GPUs

Results and details: docs/gcm.md. Comments mark every departure from the paper: "paper: ...; here:
...".
"""

import copy
import functools
import math
import os

import torch
from torch.nn.parallel import DistributedDataParallel

import data
import models
from common import checkpoints, flags, processes, weights
from common.augment import augment
from common.ema import gamma_of
from common.messages import fail
from common.run import launch
from common.seeds import generator, seed_of
from jvp import JVP, in_one_pass, select, with_tangent

METHOD = "gcm"

# The paper's values: Table 1 and G, without the MMD, which --row F or L adds. The paper does not
# mention clipping; the code that G.2 names for ImageNet 256 clips the gradient at norm 1, as here.
PAPER = dict(
    variant="CU",
    ht="exp",
    epsilon=0.005,
    mu=3.5,
    ct="exp",
    scheme="gcm",
    gamma=1.0,
    lam=6.0,
    pt="sine",
    pt_ab=(1.0, 0.01),
    nu_s=4.0,
    equal=0.0,
    P_mean=-0.4,
    P_std=1.0,
    group=1,
    kernel_sigma=0.1,
    jvp="fd",
    w=1.0,
    kappa=0.0,
    guide=(0.0, 1.0),
    sigma_data=0.5,
    q=2.0,
    t_mid=(0.6,),
    optimizer="RAdam",
    lr=1e-4,
    lr_final=1.0,
    warmup=0,
    betas=(0.9, 0.999),
    ema_beta=0.9999,
    ema_sigma=0.1,
)

# The presets, one for each data set and use. --row overrides their values, and so does a flag on
# the command line.
PRESETS = {
    "glyphs": PAPER | dict(                # ours: high rates that fall; weights and times of G.2
        resolution=16,
        steps=4000,
        batch=8,
        lr=2e-3,
        lr_final=0.0,
        warmup=200,
        betas=(0.9, 0.99),
        ema_beta=0.0,
        sigma_data=0.6,
        epsilon=0.02,
        curriculum=650,
        lam=3.0,
        pt="uniform",
        variant="VU",
        equal=0.5,
        w=2.0,
        kappa=0.5,
        net=dict(
            name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), adaptive_scale=True),
    ),
    "cifar10": PAPER | dict(
        resolution=32,
        steps=400_000,
        batch=512,
        xflip=True,
        uncond=True,
        precision="tf32",
        micro_batch=64,                    # ours: fits a GPU of 24 GB
        save_every=1000,                   # ours
        net=dict(name="DDPM++", dropout=0.2),
    ),
    "cifar10_finetune": PAPER | dict(      # for --init: ECT's released settings, G.2's weights
        resolution=32,
        steps=200_000,
        batch=128,
        uncond=True,
        precision="tf32",
        micro_batch=64,                    # ours: fits a GPU of 24 GB
        save_every=1000,                   # ours
        lam=3.0,
        pt="uniform",
        ht="ect",
        curriculum=25_000,
        net=dict(name="DDPM++", dropout=0.2),
    ),
    "imagenet64_finetune": PAPER | dict(   # also G.2; for EDM2-XL: --lr 7e-4 --net dropout=0.5
        resolution=64,
        steps=100_000,
        batch=128,
        micro_batch=32,                    # ours: fits a GPU of 24 GB
        save_every=1000,                   # ours
        optimizer="AdamW",
        lr=1e-3,
        lr_decay=2000,
        betas=(0.9, 0.99),
        lam=3.0,
        pt="uniform",
        ht="ect",                          # G.2 changes two things in ECT's loss, not h
        curriculum=25_000,
        q=4.0,
        t_mid=(0.798,),
        net=dict(name="EDM2-S", dropout=0.4, dropout_res=16),
    ),
    # G.2; XL/2: --net name=DiT-XL/2 --w 2.5 --kappa 0.92 --guide 0 0.75 --steps 200000
    "imagenet_latents": PAPER | dict(
        steps=400_000,
        batch=256,
        precision="bf16",
        micro_batch=64,                    # ours: XL/2 fits a GPU of 80 GB
        save_every=1000,                   # ours
        optimizer="AdamW",
        betas=(0.9, 0.95),
        variant="VU",
        sigma_data=1.0,
        epsilon=0.02,
        nu_s=1.0,
        gamma=0.2,
        equal=0.75,
        w=3.0,
        net=dict(name="DiT-B/4"),
    ),
}
PRESETS["mnist"] = PRESETS["glyphs"] | dict(               # ours
    resolution=None, batch=16, net=PRESETS["glyphs"]["net"] | dict(width=16, mult=(1, 2, 4)))

# For --init with a teacher that flow.py trained on this data (ours): fewer steps; a curriculum that
# ends at eps = 2^-8 (from scratch: 2^-7); and lambda 0, the better of 0 and 3 (docs/gcm.md)
FINETUNE = dict(steps=1600, curriculum=200, lam=0.0)
PRESETS["glyphs_finetune"] = PRESETS["glyphs"] | FINETUNE
PRESETS["mnist_finetune"] = PRESETS["mnist"] | FINETUNE

# What --row sets: the configurations of Tables 2, 3 and 10. A to F are CU, G to L are VU, and each
# line adds a choice to the line before it. M is D with s-sampling (Table 10), which equals J.
BASIC = dict(scheme="gcm", equal=0.0, w=1.0, curriculum=0)
UNIFORM, SINE = dict(gamma=0.0, lam=0.0, pt="uniform"), dict(gamma=1.0, lam=6.0, pt="sine")
WEIGHTED = dict(gamma=1.0, lam=6.0, pt="uniform")
ROWS = {
    "A": BASIC | UNIFORM | dict(variant="CU", ht="const", ct="t", group=1),
    "B": BASIC | UNIFORM | dict(variant="CU", ht="exp", ct="t", group=1),
    "C": BASIC | UNIFORM | dict(variant="CU", ht="exp", ct="exp", group=1),
    "D": BASIC | WEIGHTED | dict(variant="CU", ht="exp", ct="exp", group=1),
    "E": BASIC | SINE | dict(variant="CU", ht="exp", ct="exp", group=1),
    "F": BASIC | SINE | dict(variant="CU", ht="exp", ct="exp", group=4, kernel_sigma=0.05),
    "G": BASIC | UNIFORM | dict(variant="VU", ht="const", ct="t", group=1),
    "H": BASIC | UNIFORM | dict(variant="VU", ht="exp", ct="t", group=1),
    "I": BASIC | UNIFORM | dict(variant="VU", ht="exp", ct="exp", group=1),
    "J": BASIC | WEIGHTED | dict(variant="VU", ht="exp", ct="exp", group=1),
    "K": BASIC | SINE | dict(variant="VU", ht="exp", ct="exp", group=1),
    "L": BASIC | SINE | dict(variant="VU", ht="exp", ct="exp", group=2, kernel_sigma=0.1),
    "M": BASIC | WEIGHTED | dict(variant="VU", ht="exp", ct="exp", group=1),
}


def parse_args():
    parser = flags.Parser(description="A Guide to Training Consistency Models. The defaults of "
                          "most flags are those of the preset.")
    flags.add_flags(parser, PRESETS)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    # The numbers after a type are the smallest and the largest value. Flags without a default have
    # that of the preset
    flag("--init", metavar="FILE", help="velocity network to start from, of flow.py or EDM's "
         "(G.2; default: train from scratch)")
    flag("--row", choices=list(ROWS), help="configuration of Tables 2, 3 and 10")
    flag("--variant", choices=["CU", "VU"], help="upper limit s: t_0, or drawn (3.4)")
    flag("--jvp", choices=list(JVP), help="how df/dt is computed: fused, in one pass with f; "
         "exact, by torch.func.jvp; fd, by a finite difference over h(t) (Table 7j)")
    flag("--ht", choices=list(STEPS), help="step h(t) (C.3, Table 7b)")
    flag("--epsilon", float, 1e-9, help="eps of h(t) 'exp'; the integral of the others is "
         "that of eps (1-t)^2")
    flag("--curriculum", int, 0, help="steps after which eps, at first 1/q, falls (G.1, Table 7d)")
    flag("--q", float, 1, help="what eps is divided by at the end of each --curriculum (G.1)")
    flag("--ct", choices=list(TIME_SCALINGS), help="time scaling c(t), without --init and for "
         "networks that do not scale themselves (Eq. 9)")
    flag("--mu", float, 1e-9, help="exponent of h(t) and c(t) (Eqs. 36, 37)")
    flag("--scheme", choices=list(WEIGHTS), help="method whose weights and times are used "
         "(Tables 7e, 11)")
    flag("--gamma", float, help="gamma in w(t) = t^gamma e^(-lambda t) (Eq. 14)")
    flag("--lambda", float, dest="lam", help="lambda in w(t) (Eq. 14)")
    flag("--pt", choices=list(DENSITIES), help="density of t (Eqs. 15, 16, Table 7g)")
    flag("--pt-ab", float, nargs=2, help="a and b of the density (Eqs. 15, 16)")
    flag("--nu-s", float, 1e-9, help="nu in the density of s (Eq. 17)")
    flag("--equal", float, 0, 1, help="fraction of samples with s = t, at log-normal times (G.2)")
    flag("--P-mean", float, help="mean of the log-normal times of --equal and --scheme (G.2)")
    flag("--P-std", float, 0, help="standard deviation of the log-normal times (G.2)")
    flag("--group", int, 1, help="M of the time-aware MMD; 1: the norm instead (Eq. 46, Table 7i)")
    flag("--kernel-sigma", float, 1e-9, math.inf, help="sigma of the MMD's kernel (Eq. 44)")
    flag("--share-time", action="store_true", help="one time for each group, as in IMM (Table 7i)")
    flag("--w", float, help="guidance scale omega / (1 - kappa) of MeanFlow; 1 is none (G.2)")
    flag("--kappa", float, 0, 1, help="kappa of MeanFlow's guidance (G.2)")
    flag("--guide", float, 0, 1, nargs=2, help="first and last time with guidance (G.2)")
    flag("--label-drop", float, 0, 1, default=0.1, help="fraction of null labels, with guidance")
    flag("--sigma-data", float, 1e-9, help="sigma_d, the data's standard deviation (3.1)")
    flag("--augment", action="store_true", help="EDM's augmentation (Tables 8, 9)")
    flag("--t-mid", float, nargs="+", help="times between the steps (G.1)")
    flag("--optimizer", choices=["AdamW", "RAdam"], help="optimiser (G.1, G.2)")
    flag("--lr-decay", int, 1, help="steps after which the learning rate falls as the inverse "
         "square root of the step (ECT)")
    flag("--ema-beta", float, 0, 1, help="constant rate of the EMA, instead of --ema-sigma; 0 "
         "means --ema-sigma")
    args = flags.parse_words(parser)
    preset = flags.choose_preset(args, PRESETS)
    if args.row:
        preset = preset | ROWS[args.row]
    if "epsilon" in args.given:            # a step that is given replaces the preset's curriculum
        preset = preset | dict(curriculum=0)
    if "ema-sigma" in args.given:          # a width that is given replaces the preset's rate
        preset = preset | dict(ema_beta=0.0)
    args = flags.fill_in(args, METHOD, preset)
    if args.preset.endswith("_finetune") and args.init is None:
        fail(f"--preset {args.preset} continues from trained weights: name their file by --init")
    log_normal = args.equal > 0 or args.scheme in ("meanflow", "facm", "ect")
    flags.check_effect(
        args,
        ("epsilon", not args.curriculum, "--curriculum 0"),
        ("q", args.curriculum, "--curriculum"),
        ("mu", "exp" in (args.ht, args.ct) or args.ht == "exp-equal", "--ht exp or --ct exp"),
        ("ct", args.init is None, "a network from scratch, without --init"),
        ("gamma lambda pt pt-ab nu-s", args.scheme == "gcm", "--scheme gcm"),
        ("pt-ab", args.pt != "uniform", "--pt sine or cosh"),
        ("nu-s", args.variant == "VU", "--variant VU"),
        ("P-mean P-std", log_normal, "--equal, or --scheme meanflow, facm or ect"),
        ("kernel-sigma share-time", args.group > 1, "--group 2 or more"),
        ("kappa guide label-drop", args.w != 1, "guidance, --w other than 1"),
        ("weights", args.init, "--init"))
    return args


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions of any shape: x, z, xt, u, F, ... [B, ...]; t, r, s, h, weight, density
# [B] float; y [B] int64 or None. They need only torch and jvp.py.

T_MIN, T_MAX = 0.006, 0.994                # t_0 and t_T (G.1)


def gcm_loss(f, jvp, x, z, t, s, density, y, *, difference=True, ht="exp", k=0.005, mu=3.5,
             scheme="gcm", gamma=1.0, lam=6.0, M=1, sigma=0.1, w=1.0, kappa=0.0, guide=(0.0, 1.0),
             y_null=None):
    """Mean over the batch of Eq. 39, which has the gradient of Eq. 5, the paper's loss.

    f          see precondition; under DDP, its network is the DDP wrapper
    jvp        a value of jvp.JVP; with `difference` it is not used and may be None
    x, z       data, and noise of the data's standard deviation
    t, s, density   as sample_times returns them
    y          labels or None
    difference use the paper's difference between x_t and x_r as derivative (Table 7j), not jvp
    ht, k, mu  step h(t) of STEPS; scheme, gamma, lam: w(t) of WEIGHTS; M, sigma: see mmd_loss
    w, kappa, guide, y_null   see guided_velocity
    """
    xt = wide(1 - t, x) * x + wide(t, x) * z                                       # 2.1
    u = guided_velocity(f, xt, z - x, t, y, w=w, kappa=kappa, guide=guide, y_null=y_null)
    h = step_size(t, ht, k, mu)                                                    # Eqs. 26-36
    r = torch.maximum(t - h, s)
    if difference:
        F = f(xt, t, s, y)
        change = pair_difference(f, F.detach(), xt, t, r, s, y, u)
        ratio = torch.where(r > s, (s - r) / (t - r), 0)                           # not 0/0
        target = u + wide(ratio, x) * change                                       # Eq. 39
    else:
        F, df_dt = jvp(f, at=(xt, t, s, y), along=(u, 1, 0))
        target = u + wide(s - t, x) * df_dt                                        # Eq. 6
    weight = WEIGHTS[scheme](t, s, h, gamma, lam) / density                        # Eq. 14, 3.3
    if M == 1:
        error = F - target
        return (weight * rms(error, dim=tuple(range(1, error.dim())))).mean()      # Eq. 39
    base = xt + wide(s - r, x) * F.detach()
    return mmd_loss(F, target, base, t, r, s, h, weight, M, sigma).mean()


def wide(t, x):
    """t [B], reshaped to as many dimensions as x, so that it broadcasts over the samples."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def step_size(t, ht, k, mu):
    """h(t) [B]. paper: some h have a zero at 0, 1/2 or 1 (C.3); here: h is at least 1e-5, because
    smaller steps are lost in the rounding of float32."""
    precise = t.cpu() if t.device.type == "mps" else t     # Apple's GPUs have no float64
    return STEPS[ht](precise.double(), k, mu).clamp(min=1e-5).to(t)


@torch.no_grad()
def guided_velocity(f, xt, u, t, y, *, w, kappa, guide, y_null):
    """MeanFlow's mixture (Geng et al. 2025, Eq. 19) of u and f(x_t, t, t) with label y and without,
    where omega is w (1 - kappa), at times in the interval `guide`; at other times, u. w = 1 is no
    guidance. Raises ValueError if w is not 1 and y or y_null is None."""
    if w == 1:
        return u
    if y is None or y_null is None:
        raise ValueError("guidance (w other than 1) needs the labels y and the null label y_null")
    omega, null = w * (1 - kappa), torch.full_like(y, y_null)
    f_cond, f_null = in_one_pass(f, (xt, t, t, y), (xt, t, t, null))
    mixture = omega * u + kappa * f_cond + (1 - omega - kappa) * f_null
    guided = (guide[0] <= t) & (t <= guide[1]) & (y != y_null)
    return torch.where(wide(guided, u), mixture, u)


@torch.no_grad()
def pair_difference(f, F, xt, t, r, s, y, u):
    """f(x_t, t, s), which is F, minus f(x_r, r, s). Under autocast, both are computed again
    in float32, because their difference would be lost in bfloat16. With --precision bf16 these two
    passes take most of the time of a step."""
    xr = xt + wide(r - t, xt) * u
    if not torch.is_autocast_enabled(xt.device.type):
        return F - f(xr, r, s, y)
    with torch.autocast(xt.device.type, enabled=False):
        f_t, f_r = in_one_pass(f, (xt, t, s, y), (xr, r, s, y))
        return f_t - f_r


def precondition(net, *, ct="exp", mu=3.5, sigma_d=0.5, second_time=False, velocity=False,
                 augment=None):
    """f(x_t, t, s, y) = c_out net(c_in x_t, c(t), c(s), y) (3.1), which also accepts tangent=.

    net        any callable net(x, t, s, y); s is c(s) if second_time, else None
    velocity   whether net is a velocity network as in models.py, with time from noise to data and
               noise of standard deviation 1. f is then computed from its output at k x_t, where
               the ratio of noise to data is the same. The networks of --init, and those that
               scale themselves, are of this kind
    augment    the labels [B, D] of the augmentation, which are net's fifth argument, or None

    paper: z ~ N(0, I) (2.1); here: its standard deviation is sigma_d, because only then do c_in and
    c_out give unit variance (3.1).
    """
    def f(xt, t, s, y):
        more = ()
        if augment is not None:
            more = (augment.repeat(xt.shape[0] // len(augment), 1),)
        if velocity:
            # scale x_t lies on the flow of net at the time (1-t) scale. With the data x_1 and the
            # noise x_0 that net predicts there, the output is sigma_d x_0 - x_1
            scale = (1 - t + sigma_d * t) ** -1
            end = (1 - s) / (1 - s + sigma_d * s) if second_time else None
            v = net(wide(scale, xt) * xt, (1 - t) * scale, end, y, *more)
            return -wide(scale, xt) * ((1 - sigma_d) * xt + sigma_d * v)
        c_in = wide((1 - t) ** 2 + t ** 2, xt).rsqrt() / sigma_d
        c_out = sigma_d * math.sqrt(2)
        c_t = TIME_SCALINGS[ct](t, mu)
        c_s = TIME_SCALINGS[ct](s, mu) if second_time else None
        return c_out * net(c_in * xt, c_t, c_s, y, *more)
    return with_tangent(f)


def rms(a, dim):
    """Root mean square over dim, with gradient 0 at 0. paper: the norm, the root of a sum; here:
    the root of a mean, because the log and --clip then have the same meaning at any size. RAdam
    does not depend on this factor."""
    return torch.linalg.vector_norm(a, dim=dim) / math.sqrt(math.prod(a.shape[d] for d in dim))


def mmd_loss(F, target, base, t, r, s, h, weight, M, sigma):
    """Time-aware energy distance [B], in groups of M, between base - h F, the end of the jump from
    t, and base - h f_tar, that of the jump from r. base: x_t + (s-r) f(x_t, t, s), no gradient.
    paper: Eq. 46 has no factor 1 / h, and the form of Eq. 40, which G.1 names, has one; here: half
    of the latter, because M = 1 is then the norm, except for e^(-(t-r) / sigma).
    paper: t - r for h; here: h, because t - r is smaller, and may be 0, where r is s.
    paper: IMM's sharing of times has Eq. 5's form (G.1); here: it has this form (--share-time)."""
    def group(a):
        return a.unflatten(0, (-1, M))                                   # [B/M, M, ...]

    a = group((base - wide(h, base) * F).flatten(1))                               # Eq. 40
    b = group((base - wide(h, base) * target).flatten(1))
    t, r, s = group(t), group(r), group(s)
    h, weight = group(h), group(weight)

    def kernel(x1, x2, t1, t2):
        distance = rms(x1[:, :, None] - x2[:, None], dim=(-1,))          # [B/M, M, M]
        time_gap = (t1[:, :, None] - t2[:, None]).abs() + (s[:, :, None] - s[:, None]).abs()
        return -distance * torch.exp(-time_gap / sigma)                            # Eq. 44

    # paper: |t_j - r_k| in all three kernels; here: the times of each kernel, because of Eq. 44.
    pairs = kernel(a, a, t, t) + kernel(b, b, r, r) - 2 * kernel(a, b, t, r)
    return (weight / h * pairs.mean(2) / 2).flatten()                              # Eq. 46


def sigma_ratio(t):
    """EDM's ratio sigma / sigma_d at time t."""
    return torch.tan(math.pi / 2 * t)                                              # Eq. 24


def time_of_ratio(ratio):
    """The time t of a ratio sigma / sigma_d."""
    return 2 / math.pi * torch.atan(ratio)                                         # Eq. 24


STEPS = {                                  # h(t) with its constant k and mu (C.3)
    "const": lambda t, k, mu: k + 0 * t,                                           # Eq. 26
    "edm": lambda t, k, mu: (
        time_of_ratio(((0.5 * sigma_ratio(t)) ** (1 / 7) + k) ** 7 / 0.5) - t),    # Eq. 27
    "ect": lambda t, k, mu: t - time_of_ratio(
        sigma_ratio(t) * (1 - k * (1 + 8 / (1 + torch.exp(0.5 * sigma_ratio(t)))))),   # Eqs. 25, 28
    "imm": lambda t, k, mu: k * (1 - t) ** 2 / (1 - k * (1 - t)),                  # Eq. 29
    "linear": lambda t, k, mu: k * (1 - t),                                        # Eq. 30
    "quadratic": lambda t, k, mu: k * (1 - t) ** 2,                                # Eq. 31
    "cubic": lambda t, k, mu: k * (1 - t) ** 3,                                    # Eq. 32
    "quad-inc": lambda t, k, mu: k * t ** 2,                                       # Eq. 33
    "quad-concave": lambda t, k, mu: k * t * (1 - t),                              # Eq. 34
    "quad-convex": lambda t, k, mu: k * (0.5 - t) ** 2,                            # Eq. 35
    "exp": lambda t, k, mu: k * torch.exp(-mu * t),                                # Eqs. 8, 36
}
STEPS["exp-equal"] = STEPS["exp"]          # "exp" takes k = eps itself (end of C.3)
TIME_SCALINGS = {                          # c(t)
    "t": lambda t, mu: t,
    "1000t": lambda t, mu: 1000 * t,
    # paper: also (eps e^(mu t) - 1) / mu (3.2) and e^(-3.5 t) (Table 7c); here: the form of C.4,
    # because only this form is near t for small t, from which C.4 derives it.
    "exp": lambda t, mu: torch.expm1(mu * t) / mu,                                 # Eqs. 9, 37
}

WEIGHTS = {                                # w(t); of GCM and, for Tables 7e and 11, of others
    "gcm": lambda t, s, h, gamma, lam: t ** gamma * torch.exp(-lam * t),           # Eq. 14
    "imm": lambda t, s, h, *_: (           # its a = 1, b = 5
        torch.sigmoid(5 + 2 * torch.log(t / (1 - t))) / t / ((1 - t) ** 2 + t ** 2)),
    "meanflow": lambda t, s, h, *_: torch.ones_like(t),
    "facm": lambda t, s, h, *_: torch.where(s == t, 1.0, torch.sin(math.pi / 2 * t)),
    # 1 / (sigma_t - sigma_r), times t, because ECT weights the denoiser x_t - t f.
    "ect": lambda t, s, h, *_: t / (sigma_ratio(t) - sigma_ratio((t - h).clamp(min=0))),
}


def equal_integral(ht, epsilon, mu):
    """The constant k for which h(t) has the integral of epsilon (1-t)^2 over [0, 1] (C.3)."""
    t = (torch.arange(20_000).double() + 0.5) / 20_000
    low, high = 0.0, 1.0
    for _ in range(60):                    # bisection, as every h grows with k
        k = (low + high) / 2
        if STEPS[ht](t, k, mu).mean() < epsilon / 3:
            low = k
        else:
            high = k
    return k


def sine(u, a, b):
    """Quantiles at u of p_sine on [0, 1], and its density there (E.1)."""
    first, last = math.cos(math.pi / 2 * b), math.cos(math.pi / 2 * a)
    phase = torch.arccos((first - u * (first - last)).clamp(-1, 1))
    t = (2 / math.pi * phase - b) / (a - b)                                        # Eq. 41
    return t, math.pi / 2 * (a - b) / (first - last) * torch.sin(phase)            # Eq. 15


def cosh(u, a, b):
    """Quantiles at u of p_cosh on [0, 1], and its density there (E.1)."""
    span = math.sinh(a) - math.sinh(b)
    phase = torch.arcsinh(math.sinh(b) + u * span)
    return (phase - b) / (a - b), (a - b) / span * torch.cosh(phase)               # Eqs. 42, 16


def uniform(u, a, b):
    """Quantiles at u of the uniform distribution on [0, 1], and its density there."""
    return u, torch.ones_like(u)


def uniform_power(u, v, nu):
    """Samples of p_up on [0, 1] from uniform u, v (E.2)."""
    return u * (1 - (1 - v) ** (1 / nu))                                           # Eq. 17


DENSITIES = {"uniform": uniform, "sine": sine, "cosh": cosh}


def sample_times(u, *, scheme="gcm", variant="CU", pt="sine", ab=(1.0, 0.01), nu=4.0, equal=0.0,
                 P_mean=-0.4, P_std=1.0, sigma_d=0.5):
    """t, s and the density of t, from uniform u [4, B]. A fraction `equal` of the samples has s = t
    and log-normal times t, which are sigmoid(n) for normal numbers n (G.2). The density is 1 there,
    because the paper uses the choice of these times as the weight.
    paper: w(t) / p(t|s); here: p(t|s) is relative to the uniform density on [s, t_T], which removes
    a factor t_T - s from the weight, because uniform times have the weight w(t) in 3.3. This makes
    a difference for VU only."""
    uniform = u.cpu() if u.device.type == "mps" else u     # Apple's GPUs have no ndtri
    normal = P_mean + P_std * torch.special.ndtri(uniform).to(u)
    density = torch.ones_like(u[0])
    s, same = torch.full_like(u[0], T_MIN), u[3] < equal
    if scheme == "gcm":
        if variant == "VU":
            s = T_MIN + (T_MAX - T_MIN) * uniform_power(u[0], u[1], nu)
        place, density = DENSITIES[pt](u[2], *ab)
        t = torch.where(same, torch.sigmoid(normal[0]), s + (T_MAX - s) * place)
        density = torch.where(same, 1.0, density)
    elif scheme == "imm":                  # t uniform, then s uniform below it (E.2)
        t = T_MIN + (T_MAX - T_MIN) * u[0]
        s = T_MIN + (t - T_MIN) * u[1]
    elif scheme == "meanflow":
        s, t = torch.sigmoid(normal[:2]).sort(dim=0)[0]
    else:                                  # FACM's Eq. 20 with time reversed; ECT's sigma
        ratio = torch.exp(normal[0])
        if scheme == "ect":
            ratio = ratio / sigma_d
        t = time_of_ratio(ratio)
    t = t.clamp(T_MIN, T_MAX)
    return t, torch.where(same, t, s.clamp(T_MIN, T_MAX)), density


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, ...], standard normal; y [B] labels or None; -> samples [B, ...].

@torch.no_grad()
def sample(net, noise, y, *, nfe, restart, mid=(0.6,), sigma_d=0.5, times=None, **options):
    """nfe jumps from t_T to t_0, by way of nfe - 1 falling times.

    restart    whether each jump ends at t_0, and fresh noise leads back to the next time (CU;
               K = nfe); otherwise, each jump ends at the next time (pushforward, VU; K = 1)
    times      the times in between (default: `mid` if their number fits, else equal steps)
    options    the options of `precondition`

    Raises ValueError if the times do not fit.
    """
    f = precondition(net, sigma_d=sigma_d, **options)
    inner = times
    if inner is None and len(mid) == nfe - 1:
        inner = mid
    if inner is None:
        inner = [T_MAX + (T_MIN - T_MAX) * i / nfe for i in range(1, nfe)]
    at = [T_MAX, *inner, T_MIN]
    if len(inner) != nfe - 1 or any(a <= b for a, b in zip(at, at[1:])):
        raise ValueError(f"--times: NFE {nfe} needs {nfe - 1} times between {T_MAX} and {T_MIN}, "
                         "in falling order")
    xt = sigma_d * noise[0]
    for i in range(nfe):
        end = T_MIN if restart else at[i + 1]
        t, s = xt.new_full(xt.shape[:1], at[i]), xt.new_full(xt.shape[:1], end)
        xt = xt + wide(s - t, xt) * f(xt, t, s, y)                                 # Eq. 3
        if restart and i + 1 < nfe:
            xt = (1 - at[i + 1]) * xt + at[i + 1] * sigma_d * noise[i + 1]
    return xt


SAMPLERS = {"restart": functools.partial(sample, restart=True),
            "pushforward": functools.partial(sample, restart=False)}
DETERMINISTIC = ("pushforward",)  # these need one noise, K = 1, whatever the NFE


def default_sampler(nfe, args):
    """The default sampler (G.1). args: the flags of the run, a dict."""
    only_jumps_to_the_end = args["variant"] == "CU" or args["scheme"] in ("facm", "ect")
    return "restart" if only_jumps_to_the_end else "pushforward"


def scalings(args):
    """The options of `precondition`. args: the flags of the run, a dict."""
    return dict(ct=args["ct"], mu=args["mu"], sigma_d=args["sigma_data"],
                second_time=args["variant"] == "VU",
                velocity=args["init"] is not None or scales_itself(args["net"]))


def scales_itself(net):
    """Whether a network with these options, a dict, scales its input and output by itself, and has
    its own times."""
    return (net.get("sigma_data") is not None or net.get("edm_time", False)
            or net["name"].startswith("EDM2"))


def sampler_options(args):
    """{sampler: its options}. args: the flags of the run, a dict."""
    return {name: dict(scalings(args), mid=tuple(args["t_mid"])) for name in SAMPLERS}


def preview(net, noise, args):
    """Two rows of samples at NFE 1, above two rows at NFE 2."""
    y = data.preview_labels(net, noise, args.uncond)
    name = default_sampler(2, vars(args))
    options = sampler_options(vars(args))[name]
    return torch.cat([SAMPLERS[name](net, noise, y, nfe=nfe, **options) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------
# TRAINING.

def check(args, net):
    """Raises ValueError for flags that cannot be combined. net: the options of the network."""
    if args.variant == "CU":
        other_ends = args.equal or args.scheme in ("imm", "meanflow", "facm")
        if args.w != 1 or other_ends:
            raise ValueError("--variant CU needs --w 1, --equal 0, and --scheme gcm or ect")
    if args.w != 1 and (args.uncond or not net["num_classes"]):
        raise ValueError(f"--w {args.w}: guidance needs labels and a network with classes; use "
                         "--w 1")
    if "ct" in args.given and scales_itself(net):
        raise ValueError("--ct has no effect here: this network has its own times")
    if args.pt != "uniform" and len(set(args.pt_ab)) == 1:
        raise ValueError("--pt-ab A B: A and B must differ")
    if args.pt == "sine" and not all(0 <= value <= 2 for value in args.pt_ab):
        raise ValueError("--pt-ab A B: with --pt sine, A and B must lie between 0 and 2, so that "
                         "the density is not negative")
    if args.guide[0] > args.guide[1]:
        raise ValueError("--guide FIRST LAST: FIRST must not be after LAST")
    times = [T_MAX, *args.t_mid, T_MIN]
    if any(a <= b for a, b in zip(times, times[1:])):
        raise ValueError(f"--t-mid needs times between {T_MAX} and {T_MIN}, in falling order")


def train(args, run):
    """Trains with the flags args. run (common/run.py) manages the checkpoints and the log."""
    device, rank, world = run.device, run.rank, run.world

    # Data, network and its average. With --init, the network starts from the weights of that file
    dataset = data.load_for(args)
    warm_start = args.init is not None
    if warm_start and args.dry_run:
        warm_start = os.path.exists(args.init)
    if warm_start:
        start, args.net = weights.read_start(args.init, args)
    args.net = data.fit_network_to(dataset, args.net) | dict(second_time=args.variant == "VU")
    if args.augment:
        args.net = args.net | dict(augment_dim=9)
    check(args, args.net)
    net = models.create(**args.net, seed=seed_of(args.seed, "init"), device=device)
    net.grad_checkpoint = args.grad_checkpoint
    if warm_start:
        checkpoints.load_weights(net, start, args.init, weights.MAY_BEGIN_ANEW)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema_gamma = gamma_of(args.ema_sigma)   # the exponent of EDM2's average

    # The micro-batches of this process, the optimiser, and the newest checkpoint
    micro_batches = processes.split_batch(args.batch, rank, world, args.micro_batch, args.group)
    if args.fsdp:
        models.shard(net)
        models.shard(ema)
    settings = dict(lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    if args.optimizer == "RAdam":
        optimizer = torch.optim.RAdam(net.parameters(), **settings)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), fused=device.type != "mps", **settings)
    run.resume(net, ema, optimizer)

    # The network as the loss calls it: compiled, and wrapped in DDP
    model = net
    if args.compile:
        model = torch.compile(net)
    if world > 1 and not args.fsdp:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    jvp = select(args.jvp, args.compile)
    constant = args.epsilon
    if args.ht != "exp":
        constant = equal_integral(args.ht, args.epsilon, args.mu)
    shape = (args.batch, *dataset.shape)
    preview_noise = data.preview_noise(args.seed, dataset.shape).to(device)

    for step in range(run.step, args.steps):
        # Learning rate: ECT's decay, times the smaller of a linear warm-up and a linear decay from
        # 1 to lr_final
        lr = args.lr
        if args.lr_decay:
            lr *= max(1, step / args.lr_decay) ** -0.5
        warmup = min(1, (step + 1) / max(args.warmup, 1))
        decay = 1 - (1 - args.lr_final) * step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(warmup, decay)

        # The constant of h(t). paper: k falls without end (G.1); here: to 2^-10, because smaller
        # steps are lost in the rounding of float32
        k = constant
        if args.curriculum:
            k = max(args.q ** -(1 + step // args.curriculum), 2 ** -10)

        # Draw noise and times for the whole batch. They depend only on the seed and the step, not
        # on the number of processes or micro-batches
        random = generator(device, args.seed, "step", step)
        z_all = args.sigma_data * torch.randn(shape, generator=random, device=device)
        draws = torch.rand((5, args.batch), generator=random, device=device)
        u, drop_all = draws[:4], draws[4]
        if args.share_time:                # the first of a group draws the time of the group
            first = torch.arange(args.batch, device=device) // args.group * args.group
            u = u[:, first]
        t_all, s_all, density_all = sample_times(
            u, scheme=args.scheme, variant=args.variant, pt=args.pt, ab=args.pt_ab, nu=args.nu_s,
            equal=args.equal, P_mean=args.P_mean, P_std=args.P_std, sigma_d=args.sigma_data)

        # Accumulate the gradient over the micro-batches. With the last one, it is averaged over the
        # processes
        if hasattr(net, "force_weight_norm"):
            net.force_weight_norm()        # of EDM2's networks, before each step
        total = torch.zeros((), device=device)
        for i, samples in enumerate(micro_batches):
            x, y = run.batch(dataset, step, samples)
            z, t, s, density = z_all[samples], t_all[samples], s_all[samples], density_all[samples]
            if args.w != 1:
                y = torch.where(drop_all[samples] < args.label_drop, net.num_classes, y)
            augment_labels = None
            if args.augment:
                x, augment_labels = augment(x, generator("cpu", args.seed, "augment", step),
                                    batch=args.batch, rows=samples)
            # The same dropout mask in all passes of this micro-batch
            models.seed_dropout(net, seed_of(args.seed, "dropout", step, rank, i), rows=len(y))
            last = i == len(micro_batches) - 1
            if args.fsdp:
                net.set_requires_gradient_sync(last)
            elif world > 1:
                model.require_backward_grad_sync = last                # what DDP's no_sync() sets
            f = precondition(model, **scalings(vars(args)), augment=augment_labels)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss = gcm_loss(
                    f, jvp, x, z, t, s, density, y, difference=args.jvp == "fd", ht=args.ht, k=k,
                    mu=args.mu, scheme=args.scheme, gamma=args.gamma, lam=args.lam, M=args.group,
                    sigma=args.kernel_sigma, w=args.w, kappa=args.kappa, guide=args.guide,
                    y_null=net.num_classes)
            share = len(y) / (args.batch // world)     # of the samples of this process
            loss = loss * share
            loss.backward()
            total += loss.detach()

        # Clip, step, and update the average of the weights: with EDM2's power function, or a
        # constant rate. A step whose gradient is not finite is skipped
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        if args.fsdp:
            grad_norm = grad_norm.full_tensor()
        if grad_norm.isfinite():
            optimizer.step()
            ema_beta = (1 - 1 / (step + 1)) ** (ema_gamma + 1)
            if args.ema_beta:
                ema_beta = args.ema_beta
            with torch.no_grad():              # ema += (1 - ema_beta) * (net - ema)
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()),
                                     1 - ema_beta)
        optimizer.zero_grad()

        # Log. At intervals, draw a preview, save a checkpoint, and measure the FID of samples
        run.log(step, loss=total, grad_norm=grad_norm)
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
