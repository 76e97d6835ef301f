"""A Guide to Training Consistency Models (GCM; openreview.net/forum?id=1SHdqm7Eaa), in one file.

DIRECTION OF TIME: t=0 data, t=1 noise. x_t = (1-t) x + t z, x data, z ~ N(0, sigma_d^2 I), and
t_0 = 0.006 <= t <= t_T = 0.994. Consistency training from data alone, its choices taken apart: how
far apart the points of a pair lie (h), how the network sees time (c), what each time weighs (w),
which times are drawn (p), and to which end s it jumps: t_0 (CU), or any s below t (VU).

    g(x_t, t, s) = x_t + (s-t) f(x_t, t, s)                    `sample`: jump from t to s Eq. 3
    f_tar        = u + (s-r) (f(x_t,t,s) - f(x_r,r,s)) / (t-r) `gcm_loss`, --jvp fd       Eq. 39
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
    torchrun --nproc_per_node=8 gcm.py --data cifar10 --batch 1024 --augment   # 8 GPUs

Results and details: docs/gcm.md. A departure stands at its line: "paper: ...; here: ...".
"""

import functools
import math
import os

import torch

import data
import flags
import models
import run
import weights
from augment import augment
from dryrun import DryRun
from jvp import JVP, fd, in_one_pass, select, with_tangent

METHOD = "gcm"

# A row for each data set; a flag given by hand beats it, and --row too. Table 1 and G without the
# MMD (--row F or L has it). No paper has the clipping of the gradient at norm 1.
PAPER = dict(
    variant="CU", ht="exp", epsilon=0.005, mu=3.5, ct="exp", scheme="gcm", gamma=1.0, lam=6.0,
    pt="sine", pt_ab=(1.0, 0.01), nu_s=4.0, equal=0.0, P_mean=-0.4, P_std=1.0, group=1, jvp="fd",
    kernel_sigma=0.1, w=1.0, kappa=0.0, guide=(0.0, 1.0), sigma_data=0.5, lr=1e-4, lr_final=1.0,
    warmup=0, betas=(0.9, 0.999), optimizer="RAdam", ema_beta=0.9999, ema_sigma=0.1, q=2.0,
    t_mid=(0.6,))
PRESETS = {
    "glyphs": PAPER | dict(                # ours: high rates that fall, G.2's weights and times
        resolution=16, steps=4000, batch=8, lr=2e-3, lr_final=0.0, warmup=200, betas=(0.9, 0.99),
        ema_beta=0.0, sigma_data=0.6, epsilon=0.02, curriculum=650, lam=3.0, pt="uniform",
        variant="VU", equal=0.5, w=2.0, kappa=0.5,
        net=dict(name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(),
                 adaptive_scale=True)),
    "cifar10": PAPER | dict(
        resolution=32, steps=400_000, batch=512, xflip=True, uncond=True, precision="tf32",
        micro_batch=64, net=dict(name="DDPM++", dropout=0.2)),
    "cifar10_finetune": PAPER | dict(      # for --init: ECT's released settings, G.2's weights
        resolution=32, steps=200_000, batch=128, uncond=True, precision="tf32", lam=3.0,
        pt="uniform", ht="ect", curriculum=25_000,
        micro_batch=64, net=dict(name="DDPM++", dropout=0.2)),     # ours: 24 GB
    "imagenet64_finetune": PAPER | dict(   # the same; XL: --lr 7e-4 --net dropout=0.5
        resolution=64, steps=100_000, batch=128, micro_batch=32, optimizer="AdamW", lr=1e-3,
        lr_decay=2000, betas=(0.9, 0.99), lam=3.0, pt="uniform", ht="ect", curriculum=25_000,
        q=4.0, t_mid=(0.798,), net=dict(name="EDM2-S", dropout=0.4, dropout_res=16)),
    # G.2; XL/2: --net name=DiT-XL/2 --w 2.5 --kappa 0.92 --guide 0 0.75 --steps 200000
    "imagenet_latents": PAPER | dict(
        precision="bf16", variant="VU", micro_batch=64,    # ours: XL/2 fits 80 GB
        steps=400_000, batch=256, optimizer="AdamW", betas=(0.9, 0.95), sigma_data=1.0,
        epsilon=0.02, nu_s=1.0, gamma=0.2, equal=0.75, w=3.0, net=dict(name="DiT-B/4")),
}
PRESETS["mnist"] = PRESETS["glyphs"] | dict(               # ours
    resolution=None, batch=16, net=PRESETS["glyphs"]["net"] | dict(width=16, mult=(1, 2, 4)))


def configurations():
    """What --row takes: {letter in Tables 2, 3 and 10: flags}."""
    rows, row = {}, dict(scheme="gcm", ht="const", ct="t", gamma=0.0, lam=0.0, pt="uniform",
                         group=1, equal=0.0, w=1.0, curriculum=0)
    for cu, vu, adds in (("A", "G", {}), ("B", "H", dict(ht="exp")), ("C", "I", dict(ct="exp")),
                         ("D", "J", dict(gamma=1.0, lam=6.0)), ("E", "K", dict(pt="sine"))):
        row = row | adds
        rows[cu], rows[vu] = row | dict(variant="CU"), row | dict(variant="VU")
    rows["F"] = rows["E"] | dict(group=4, kernel_sigma=0.05)
    rows["L"] = rows["K"] | dict(group=2, kernel_sigma=0.1)
    return rows | dict(M=rows["J"])        # D with s-sampling (Table 10) is J


def parse_args():
    parser = flags.Parser(description="A Guide to Training Consistency Models; defaults by preset.")
    flags.add_flags(parser, PRESETS, two_stages=False)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    flag("--init", help="velocity network to begin with, ours or EDM's (G.2); else: from scratch")
    flag("--row", choices=list(configurations()), help="configuration of Tables 2, 3 and 10")
    flag("--variant", choices=["CU", "VU"], help="upper limit s: t_0, or drawn (3.4)")
    flag("--jvp", choices=list(JVP), help="df/dt: in one pass with f, by torch.func.jvp, or a "
         "finite difference over h(t) (Table 7j)")
    flag("--ht", choices=list(STEPS), help="step h(t) (C.3, Table 7b)")
    flag("--epsilon", float, 1e-9, help="eps of h(t) 'exp'; the others: integral of eps (1-t)^2")
    flag("--curriculum", int, 0, help="steps after which eps, first 1/q, falls (G.1, Table 7d)")
    flag("--q", float, 1, help="what eps is divided by at the end of each --curriculum (G.1)")
    flag("--ct", choices=list(TIME_SCALINGS), help="time scaling c(t), but of --init (Eq. 9)")
    flag("--mu", float, 1e-9, help="exponent of h(t) and c(t) (Eqs. 36, 37)")
    flag("--scheme", choices=list(WEIGHTS), help="whose weights and times (Tables 7e, 11)")
    flag("--gamma", float, help="gamma in w(t) = t^gamma e^(-lambda t) (Eq. 14)")
    flag("--lambda", float, dest="lam", help="lambda in w(t) (Eq. 14)")
    flag("--pt", choices=list(DENSITIES), help="density of t (Eqs. 15, 16, Table 7g)")
    flag("--pt-ab", float, nargs=2, help="a and b of the density (Eqs. 15, 16)")
    flag("--nu-s", float, 1e-9, help="nu in the density of s (Eq. 17)")
    flag("--equal", float, 0, 1, help="share of s = t, at log-normal times (G.2)")
    flag("--P-mean", float, help="mean of the log-normal times of --equal and --scheme (G.2)")
    flag("--P-std", float, 0, help="standard deviation of the log-normal times (G.2)")
    flag("--group", int, 1, help="M of the time-aware MMD; 1: the norm instead (Eq. 46, Table 7i)")
    flag("--kernel-sigma", float, 1e-9, math.inf, help="sigma of the MMD's kernel (Eq. 44)")
    flag("--share-time", action="store_true", help="one time for each group, as IMM (Table 7i)")
    flag("--w", float, help="guidance scale omega / (1 - kappa) of MeanFlow; 1 is none (G.2)")
    flag("--kappa", float, 0, 1, help="kappa of MeanFlow's guidance (G.2)")
    flag("--guide", float, 0, 1, nargs=2, help="guidance at the times from ... to ... (G.2)")
    flag("--sigma-data", float, 1e-9, help="sigma_d, the data's standard deviation (3.1)")
    flag("--augment", action="store_true", help="EDM's augmentation (Tables 8, 9)")
    flag("--t-mid", float, nargs="+", help="times between the steps (G.1)")
    given = parser.parse_known_args()[0]
    row = configurations().get(given.row, {})
    row |= dict(curriculum=0) if given.epsilon is not None else {}     # one goes before the other
    row |= dict(ema_beta=0.0) if given.ema_sigma is not None else {}
    return flags.parse(parser, METHOD, {name: preset | row for name, preset in PRESETS.items()})


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions: x, z, xt, u, F, ... [B, C, H, W]; t, r, s, h, w [B]; y [B] or None.

T_MIN, T_MAX = 0.006, 0.994                # t_0 and t_T (G.1)


def wide(t):
    """[B] -> [B, 1, 1, 1]."""
    return t[:, None, None, None]


def gcm_loss(f, jvp, x, z, t, s, density, y, *, ht="exp", k=0.005, mu=3.5, scheme="gcm", gamma=1.0,
             lam=6.0, M=1, sigma=0.1, y_null=None, w=1.0, kappa=0.0, guide=(0.0, 1.0)):
    """Mean over the batch of Eq. 39, which has the gradient of Eq. 5, the paper's loss.

    f          see precondition; its network is DDP's wrapper, if there is one
    jvp        one of jvp.JVP; fd: the paper's difference of the pair x_t, x_r (Table 7j)
    x, z       data, and noise of the data's standard deviation
    t, s, density   as sample_times gives them
    ht, k, mu  step h(t) of STEPS; scheme, gamma, lam: w(t) of WEIGHTS; M, sigma: see mmd_loss
    y_null, w, kappa, guide   the null label; see guided_velocity
    """
    xt = wide(1 - t) * x + wide(t) * z                                             # 2.1
    u = guided_velocity(f, xt, z - x, t, y, y_null=y_null, w=w, kappa=kappa, guide=guide)
    # paper: h goes to 0 with 1 - t (C.3); here: to 1e-5, because float32 rounds less off
    precise = (t.cpu() if t.device.type == "mps" else t).double()          # Apple's GPUs have none
    h = STEPS[ht](precise, k, mu).clamp(min=1e-5).to(t)                            # Eqs. 26-36
    r = torch.maximum(t - h, s)
    if jvp is fd:
        F = f(xt, t, s, y)
        slope = wide(torch.where(r > s, (s - r) / (t - r), 0))             # t = s: 0, not 0/0
        target = u + slope * difference(f, F.detach(), xt, t, r, s, y, u)          # Eq. 39
    else:
        F, df_dt = jvp(f, xt, t, s, y, u, 1, 0)
        target = u + wide(s - t) * df_dt                                           # Eq. 6
    weight = WEIGHTS[scheme](t, s, h, gamma, lam) / density                        # Eq. 14, 3.3
    if M == 1:
        return (weight * rms(F - target, dim=(1, 2, 3))).mean()                    # Eq. 39
    base = xt + wide(s - r) * F.detach()
    return mmd_loss(F, target, base, t, r, s, h, weight, M, sigma).mean()


@torch.no_grad()
def guided_velocity(f, xt, u, t, y, *, y_null, w, kappa, guide):
    """MeanFlow's mixture (Geng et al. 2025, Eq. 19) of u and f(x_t, t, t) with label y and without,
    omega being w (1 - kappa), at times in the interval `guide`; else u."""
    if w == 1 or y is None:
        return u
    omega, null = w * (1 - kappa), torch.full_like(y, y_null)
    f_cond, f_null = in_one_pass(f, (xt, t, t, y), (xt, t, t, null))
    guided = (guide[0] <= t) & (t <= guide[1]) & (y != y_null)
    return torch.where(wide(guided), omega * u + kappa * f_cond + (1 - omega - kappa) * f_null, u)


@torch.no_grad()
def difference(f, F, xt, t, r, s, y, u):
    """f(x_t, t, s), which is F, minus f(x_r, r, s); under autocast both anew in float32."""
    xr = xt + wide(r - t) * u
    if not torch.is_autocast_enabled(xt.device.type):
        return F - f(xr, r, s, y)
    with torch.autocast(xt.device.type, enabled=False):    # bfloat16 would round the difference off
        near, far = in_one_pass(f, (xt, t, s, y), (xr, r, s, y))
        return near - far


def precondition(net, *, ct, mu, sigma_d, second_time, velocity=False, augment=None):
    """f(x_t, t, s, y): c_out net(c_in x_t, c(t), c(s), y), c(s) if second_time (3.1).
    velocity: net is a velocity network as models.py has them (time from noise to data, noise of
    deviation 1): its answer at k x_t, where the ratio of noise to data is the same, becomes f.
    augment: the labels [B, D] of the augmentation. paper: z ~ N(0, I) (2.1); here: its deviation is
    sigma_d, because c_in and c_out have unit variance (3.1) only then."""
    def f(xt, t, s, y):
        more = () if augment is None else (augment.repeat(xt.shape[0] // len(augment), 1),)
        if velocity:
            k, end = (1 - t + sigma_d * t) ** -1, (1 - s) / (1 - s + sigma_d * s)
            F = net(wide(k) * xt, (1 - t) * k, end if second_time else None, y, *more)
            return -wide(k) * ((1 - sigma_d) * xt + sigma_d * F)
        var = wide((1 - t) ** 2 + t ** 2)
        at = TIME_SCALINGS[ct](t, mu), TIME_SCALINGS[ct](s, mu) if second_time else None
        return sigma_d * math.sqrt(2) * net(var.rsqrt() / sigma_d * xt, *at, y, *more)
    return with_tangent(f)


def rms(a, dim):
    """Root mean square over dim, with gradient 0 at 0. paper: the norm, a root of a sum; here: of a
    mean, because the log and --clip then mean the same at any size; RAdam does not notice."""
    return torch.linalg.vector_norm(a, dim=dim) / math.sqrt(math.prod(a.shape[d] for d in dim))


def mmd_loss(F, target, base, t, r, s, h, weight, M, sigma):
    """Time-aware energy distance [B], in groups of M, of base - h F, the jump's end from t, to base
    - h f_tar, that from r; base: x_t + (s-r) f(x_t, t, s), without gradient.
    paper: twice this; here: half, because M = 1 is then the norm, but for e^(-h / sigma).
    paper: t - r for h; here: h, which is t - r but where s cuts it short, there it may be 0.
    paper: IMM's sharing of times has Eq. 5's form (G.1); here: this one, too (--share-time)."""
    a, b = ((base - wide(h) * part).flatten(1).unflatten(0, (-1, M))
            for part in (F, target))                                               # Eq. 40
    t, r, s, h, weight = (part.unflatten(0, (-1, M)) for part in (t, r, s, h, weight))

    def kernel(x1, x2, t1, t2):
        apart = rms(x1[:, :, None] - x2[:, None], dim=(-1,))             # [B/M, M, M]
        times = (t1[:, :, None] - t2[:, None]).abs() + (s[:, :, None] - s[:, None]).abs()
        return -apart * torch.exp(-times / sigma)                                  # Eq. 44

    # paper: |t_j - r_k| in all three kernels; here: each kernel's own times, because Eq. 44 has so.
    pairs = kernel(a, a, t, t) + kernel(b, b, r, r) - 2 * kernel(a, b, t, r)
    return (weight / h * pairs.mean(2) / 2).flatten()                              # Eq. 46


def sigma_ratio(t):
    """sigma / sigma_d of EDM at time t."""
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
    # paper: also (eps e^(mu t) - 1) / mu (3.2) and e^(-3.5 t) (Table 7c); here: C.4's form, because
    # it alone is near t for small t, from which C.4 derives it.
    "exp": lambda t, mu: torch.expm1(mu * t) / mu,                                 # Eqs. 9, 37
}

WEIGHTS = {                                # w(t); of GCM and, for Tables 7e and 11, of others
    "gcm": lambda t, s, h, gamma, lam: t ** gamma * torch.exp(-lam * t),           # Eq. 14
    "imm": lambda t, s, h, *_: (           # its a = 1, b = 5
        torch.sigmoid(5 + 2 * torch.log(t / (1 - t))) / t / ((1 - t) ** 2 + t ** 2)),
    "meanflow": lambda t, s, h, *_: torch.ones_like(t),
    "facm": lambda t, s, h, *_: torch.where(s == t, 1.0, torch.sin(math.pi / 2 * t)),
    # 1 / (sigma_t - sigma_r), times t, because it was for the denoiser x_t - t f.
    "ect": lambda t, s, h, *_: t / (sigma_ratio(t) - sigma_ratio((t - h).clamp(min=0))),
}


def equal_integral(ht, epsilon, mu):
    """The constant k for which h(t) has the integral of epsilon (1-t)^2 over [0, 1] (C.3)."""
    t, low, high = (torch.arange(20_000).double() + 0.5) / 20_000, 0.0, 1.0
    for _ in range(60):
        k = (low + high) / 2               # every h grows with k
        low, high = (k, high) if STEPS[ht](t, k, mu).mean() < epsilon / 3 else (low, k)
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


def uniform_power(u, v, nu):
    """Draws of p_up on [0, 1] from uniform u, v (E.2)."""
    return u * (1 - (1 - v) ** (1 / nu))                                           # Eq. 17


DENSITIES = {"uniform": lambda u, a, b: (u, torch.ones_like(u)), "sine": sine, "cosh": cosh}


def sample_times(u, scheme, variant, pt, ab, nu, equal, P_mean, P_std, sigma_d):
    """t, s and the density of t, from uniform u [4, B]. A share `equal` has s = t, at log-normal
    times (G.2); the density there is 1, because the paper means that draw as a weight.
    paper: w(t) / p(t|s); here: p(t|s) relative to uniform on [s, t_T], which leaves out a factor
    t_T - s of the weight, because by 3.3 uniform times have the weight w(t). It matters for VU."""
    normal, density = P_mean + P_std * torch.special.ndtri(u), torch.ones_like(u[0])
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
        t = time_of_ratio(torch.exp(normal[0]) / (sigma_d if scheme == "ect" else 1))
    t = t.clamp(T_MIN, T_MAX)
    return t, torch.where(same, t, s.clamp(T_MIN, T_MAX)), density


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, C, H, W], standard normal; y [B] labels; -> images [B, C, H, W].

@torch.no_grad()
def sample(net, noise, y, nfe, restart, mid, sigma_d, times=None, **options):
    """nfe jumps, from t_T and nfe - 1 `times` (else ValueError; default: `mid`, or equal steps).
    restart: each to t_0, from where fresh noise leads back (CU; K = nfe); else: pushforward, from
    each time to the next and at last t_0 (VU; K = 1). options: those of `precondition`."""
    f = precondition(net, sigma_d=sigma_d, **options)
    equal = [T_MAX + (T_MIN - T_MAX) * i / nfe for i in range(1, nfe)]
    inner = times or (mid if len(mid) == nfe - 1 else equal)
    at, xt = [T_MAX, *inner, T_MIN], sigma_d * noise[0]
    if len(inner) != nfe - 1 or any(a <= b for a, b in zip(at, at[1:])):
        raise ValueError(f"--times: NFE {nfe} wants {nfe - 1} falling times, {T_MAX} to {T_MIN}")
    for i in range(nfe):
        end = T_MIN if restart else at[i + 1]
        t, s = (torch.full_like(noise[0, :, 0, 0, 0], time) for time in (at[i], end))
        xt = xt + wide(s - t) * f(xt, t, s, y)                                     # Eq. 3
        if restart and i + 1 < nfe:
            xt = (1 - at[i + 1]) * xt + at[i + 1] * sigma_d * noise[i + 1]
    return xt


SAMPLERS = {"restart": functools.partial(sample, restart=True),
            "pushforward": functools.partial(sample, restart=False)}
DETERMINISTIC = ("pushforward",)           # one noise is enough


def default_sampler(nfe, args):
    """The name in SAMPLERS for a run with these args (a dict; G.1)."""
    ends = args["variant"] == "CU" or args["scheme"] in ("facm", "ect")    # jumps to t_0 alone
    return "restart" if ends else "pushforward"


def scalings(args):
    """The options of `precondition` for a run with these args (a dict)."""
    return dict(ct=args["ct"], mu=args["mu"], sigma_d=args["sigma_data"],
                second_time=args["variant"] == "VU", velocity=args["init"] is not None)


def sampler_options(args):
    """{name in SAMPLERS: its keyword arguments} for a run with these args (a dict)."""
    return {name: dict(scalings(args), mid=tuple(args["t_mid"])) for name in SAMPLERS}


def preview(net, stage, noise, args):
    """Two rows of NFE 1 over two of NFE 2."""
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    name = default_sampler(2, vars(args))
    options = sampler_options(vars(args))[name]
    return torch.cat([SAMPLERS[name](net, noise, y, nfe, **options) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------

def check(args, net):
    """Raises ValueError for flags that do not go together."""
    others = args.w != 1 or args.equal or args.scheme in ("imm", "meanflow", "facm")
    for wrong, message in (
            (args.variant == "CU" and others, "--variant CU wants --w 1 --equal 0, gcm or ect"),
            (args.w != 1 and not net.num_classes,
             f"--w {args.w}: guidance needs classes; take --w 1"),
            (args.pt != "uniform" and len(set(args.pt_ab)) == 1, "--pt-ab: a and b must differ"),
            (any(a <= b for a, b in zip([T_MAX, *args.t_mid], [*args.t_mid, T_MIN])),
             f"--t-mid: falling times between {T_MAX} and {T_MIN}")):
        if wrong:
            raise ValueError(message)


@run.program(run.LESS_MEMORY)
def main():
    args = parse_args()
    constant = args.epsilon if args.ht == "exp" else equal_integral(args.ht, args.epsilon, args.mu)
    job = (DryRun if args.dry_run else run.Run)(args, METHOD)

    # Data and network; the state in which the run stands
    with run.errors_in_one_line():
        dataset = data.load_for(args)
        args.net = data.fit_network_to(dataset, args.net)
        begins = args.init and (os.path.exists(args.init) or not args.dry_run)
        if begins:
            start, args.net = weights.read_start(args.init, args.net, args.weights)
            args.net = data.fit_network_to(dataset, args.net)
        args.net |= dict(second_time=args.variant == "VU")
        args.net |= dict(augment_dim=9) if args.augment else {}
        net = models.create(**args.net, seed=run.seed_of(args.seed, "init")).to(job.device)
        check(args, net)
        pieces = job.pieces(args.batch, args.group)
        job.open_folder()
        if begins:
            run.load_weights(net, start, args.init, weights.MAY_BEGIN_ANEW)
        job.resume(net, models.shard)
    jvp = select(args.jvp, args.compile)
    preview_noise = data.preview_noise(args.seed, dataset.shape).to(job.device)

    while job.step < job.total:
        stage = job.stage()

        # Seed: random numbers of the global batch; neither processes nor pieces change them
        random = run.generator(job.device, args.seed, "step", job.step)
        z_all = torch.randn((args.batch, *dataset.shape), generator=random, device=job.device)
        *u, drop = torch.rand((5, args.batch), generator=random, device=job.device)
        if args.share_time:
            u = [a[torch.arange(args.batch) // args.group * args.group] for a in u]
        t_all, s_all, density = sample_times(
            torch.stack(u), args.scheme, args.variant, args.pt, args.pt_ab, args.nu_s, args.equal,
            args.P_mean, args.P_std, args.sigma_data)
        # paper: k falls for ever; here: to 2^-10, because float32 rounds less off
        k = (max(args.q ** -(1 + job.step // args.curriculum), 2 ** -10) if args.curriculum
             else constant)

        terms = torch.zeros(1, device=job.device)
        for part, (rows, share) in enumerate(pieces):
            # Batch
            with job.data_errors_end_the_run():
                x, y = run.to_device(
                    dataset.batch(args.seed, stage.first, args.batch, rows), job.device)
            z, t, s, labels = args.sigma_data * z_all[rows], t_all[rows], s_all[rows], None
            if args.w != 1:
                y = torch.where(drop[rows] < args.label_drop, net.num_classes, y)
            if args.augment:
                x, labels = augment(x, run.generator("cpu", args.seed, "augment", job.step),
                                    batch=args.batch, rows=rows)

            # Loss
            run.synchronise(job.trained, last=part + 1 == len(pieces))
            models.seed_dropout(
                net, run.seed_of(args.seed, "dropout", job.step, job.rank, part), rows=len(y))
            f = precondition(job.trained, **scalings(vars(args)), augment=labels)
            with job.autocast():
                loss = gcm_loss(
                    f, jvp, x, z, t, s, density[rows], y, ht=args.ht, k=k, mu=args.mu,
                    scheme=args.scheme, gamma=args.gamma, lam=args.lam, M=args.group,
                    sigma=args.kernel_sigma, y_null=net.num_classes, w=args.w, kappa=args.kappa,
                    guide=args.guide)

            # Backward: summed over the pieces
            (loss * share).backward()
            terms += loss.detach() * share

        # Clip, optimiser, EMA
        grad_norm = job.clip_gradient()
        job.set_lr(stage.lr)
        job.optimizer.step()
        job.optimizer.zero_grad()
        run.ema_update(job.ema, net, stage.k + 1, job.gamma, args.ema_beta)

        # Log, save, preview
        signalled = job.after_step(stage, dict(loss=terms[0], grad_norm=grad_norm))
        if job.shows:
            data.save_preview(job.preview_path(), preview, job.ema, stage.name, preview_noise, args)
        if signalled:
            break
    job.finish()


if __name__ == "__main__":
    main()
