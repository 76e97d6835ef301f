"""A Guide to Training Consistency Models (GCM; anonymous, under review), in one file.

DIRECTION OF TIME: t=0 data, t=1 noise. x_t = (1-t) x + t z, x data, z ~ N(0, sigma_d^2 I), and
t_0 = 0.006 <= t <= t_T = 0.994. Consistency training from data alone, its choices taken apart: how
far apart the points of a pair lie (h), how the network sees time (c), what each time weighs (w),
which times are drawn (p), and to which end s it jumps: t_0 (CU), or any s below t (VU).

    g(x_t, t, s) = x_t + (s-t) f(x_t, t, s)                          jump from t to s     Eq. 3
    x_r          = x_t + (r-t) u,  u = z - x,  r = max(t - h, s)     the pair's other point
    f_tar        = u + (s-r) (f(x_t,t,s) - f(x_r,r,s)) / (t-r)       finite difference    Eq. 39
                 = u + (s-t) df/dt                                   --jvp exact, fused   Eq. 6
    L            = w(t) / p(t|s) |f(x_t, t, s) - f_tar|              no gradient in f_tar Eq. 39
    h(t), c(t)   = eps e^(-mu t), (e^(mu t) - 1) / mu                step, time's scale   Eq. 36, 37
    w(t)         = t^gamma e^(-lambda t)                             weight               Eq. 14
    p(t|s), p(s) = p_sine on [s, t_T], p_up                          densities            Eq. 15, 17
    --group M: |.| is the energy distance of M jumps from t and M from r                  Eq. 44, 46

    x, z, xt, u, t, r, s, h, w   as above        F   f(x_t, t, s), with gradient
Launch:
    python gcm.py                                                              # laptop
    python gcm.py --data cifar10 --row L                                       # 1 GPU
    torchrun --nproc_per_node=8 gcm.py --data cifar10 --batch 1024 --augment   # 8 GPUs

Measured: README.md. A departure from the paper stands at its line: "paper: ...; here: ...".
"""

import argparse
import copy
import functools
import math
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import data
import models

METHOD = "gcm"

# A row for each data set; a flag given by hand beats it, and --row too. Table 1 and G without the
# MMD (--row F or L has it), but for the glyphs' small run: minutes want high rates that fall, the
# curriculum, and G.2's weights and times.
PAPER = dict(
    variant="CU", ht="exp", epsilon=0.005, mu=3.5, ct="exp", scheme="gcm", gamma=1.0, lam=6.0,
    pt="sine", pt_ab=(1.0, 0.01), nu_s=4.0, equal=0.0, P_mean=-0.4, P_std=1.0, group=1, jvp="fd",
    kernel_sigma=0.1, w=1.0, kappa=0.0, guide=(0.0, 1.0), sigma_data=0.5, lr=1e-4,
    lr_final=1.0, warmup=0, betas=(0.9, 0.999), optimizer="RAdam", ema_beta=0.9999, ema_sigma=0.1)
PRESETS = {
    "glyphs": PAPER | dict(
        resolution=16, steps=4000, batch=8, lr=2e-3, lr_final=0.0, warmup=200, betas=(0.9, 0.99),
        ema_beta=0.0, sigma_data=0.6, epsilon=0.02, curriculum=650, lam=3.0, pt="uniform",
        variant="VU", equal=0.5, w=2.0, kappa=0.5,
        net=dict(name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(),
                 adaptive_scale=True)),
    "cifar10": PAPER | dict(
        resolution=32, steps=400_000, batch=512, xflip=True, uncond=True, tf32=True,
        net=dict(name="DDPM++", dropout=0.2)),
    "cifar10_finetune": PAPER | dict(      # for --init: ECT's released settings, G.2's weights
        resolution=32, steps=200_000, batch=128, uncond=True, tf32=True, lam=3.0, pt="uniform",
        ht="ect", curriculum=25_000, net=dict(name="DDPM++", dropout=0.2)),
    # G.2; XL/2: --net name=DiT-XL/2 --w 2.5 --kappa 0.92 --guide 0 0.75 --steps 200000
    "imagenet_latents": PAPER | dict(
        steps=400_000, batch=256, optimizer="AdamW", betas=(0.9, 0.95), sigma_data=1.0,
        variant="VU", epsilon=0.02, nu_s=1.0, gamma=0.2, equal=0.75, w=3.0,
        net=dict(name="DiT-B/4")),
}


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
    p = data.Parser(description="A Guide to Training Consistency Models. Defaults: the preset's.")
    a = p.add_argument
    a("--data", default="glyphs", help="glyphs, cifar10, imagenet_latents, or a path")
    a("--data-dir", help="folder of cifar10 or imagenet_latents")
    a("--preset", choices=list(PRESETS), help="row of hyper-parameters (default: the data set's)")
    a("--out", help="run directory; the same command resumes it (default: runs/SCRIPT-DATA)")
    a("--steps", type=int, help="steps of the method")
    a("--init", help="velocity network to begin with, ours or EDM's (G.2); else: from scratch")
    a("--batch", type=int, help="global batch: over all processes and --accum (Table 5)")
    a("--accum", type=int, default=1, help="pieces that a batch is computed in, to save memory")
    a("--lr", type=float, help="learning rate (G.1)")
    a("--seed", type=int, default=0, help="everything random follows from it")
    a("--save-every", type=int, default=200, help="steps between checkpoints")
    a("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    a("--bf16", action="store_true", help="autocast to bfloat16; the time path stays float32")
    a("--compile", action="store_true", help="torch.compile the network and the derivative")
    a("--fsdp", action="store_true", help="shard networks and optimiser over the processes")
    a("--grad-checkpoint", action="store_true", help="recompute blocks in backward: less memory")
    a("--fresh", action="store_true", help="start over; an old run is renamed, never deleted")
    a("--resolution", type=int, help="height and width; images are cropped and scaled to it")
    a("--num-classes", type=int, help="number of classes (default: the data's)")
    a("--uncond", action=argparse.BooleanOptionalAction, help="leave labels out")
    a("--xflip", action=argparse.BooleanOptionalAction, help="mirror half of them (never glyphs)")
    a("--skip-broken", action="store_true", help="list and leave out images that do not decode")
    a("--net", nargs="+", default=[], metavar="K=V", help="network options: width=64 dropout=0.1")
    a("--optimizer", choices=["AdamW", "RAdam"], help="optimiser (G.1)")
    a("--betas", type=float, nargs=2, help="the optimiser's beta_1 and beta_2 (G.1)")
    a("--weight-decay", type=float, default=0.0, help="the optimiser's weight decay")
    a("--warmup", type=int, help="steps in which the learning rate rises, in each stage")
    a("--lr-final", type=float, help="share of --lr to which it then falls, linearly; 1: constant")
    a("--clip", type=float, default=1.0, help="largest norm of the gradient")
    a("--ema-sigma", type=float, help="relative width sigma_rel of the EMA")
    a("--ema-beta", type=float, help="constant rate of the EMA instead (G.1); 0: --ema-sigma's")
    a("--label-drop", type=float, default=0.1, help="share of null labels, with guidance")
    a("--log-every", type=int, default=20, help="steps between lines of log.jsonl")
    a("--preview-every", type=int, default=200, help="steps between preview grids")
    a("--P-mean", type=float, help="mean of the log-normal times of --equal and --scheme (G.2)")
    a("--P-std", type=float, help="their standard deviation (G.2)")
    a("--w", type=float, help="guidance scale omega / (1 - kappa) of MeanFlow; 1 is none (G.2)")
    a("--kappa", type=float, help="MeanFlow's kappa (G.2)")
    a("--guide", type=float, nargs=2, help="guidance at the times from ... to ... (G.2)")
    a("--jvp", choices=["fused", "exact", "fd"], help="df/dt: with f in one pass, by "
      "torch.func.jvp, or a finite difference (Table 7j)")
    a("--row", choices=list(configurations()), help="configuration of Tables 2, 3 and 10")
    a("--variant", choices=["CU", "VU"], help="upper limit s: t_0, or drawn (3.4)")
    a("--ht", choices=list(H), help="step h(t) (C.3, Table 7b)")
    a("--epsilon", type=float, help="eps of 'exp'; others: integral of eps (1-t)^2")
    a("--curriculum", type=int, help="eps is 0.5, halved every so many steps, "
      "in place of --epsilon (G.1, Table 7d)")
    a("--ct", choices=list(C), help="time preconditioning c(t) (Eq. 9, Table 7c); --init "
      "keeps its network's own")
    a("--mu", type=float, help="exponent of h(t) and c(t) (Eqs. 36, 37)")
    a("--scheme", choices=list(W), help="whose weights and times (Tables 7e, 11)")
    a("--gamma", type=float, help="w(t) = t^gamma e^(-lambda t) (Eq. 14)")
    a("--lambda", type=float, dest="lam", help="the same (Eq. 14)")
    a("--pt", choices=list(P), help="density of t (Eqs. 15, 16, Table 7g)")
    a("--pt-ab", type=float, nargs=2, help="its a and b (Eqs. 15, 16)")
    a("--nu-s", type=float, help="nu in the density of s (Eq. 17)")
    a("--equal", type=float, help="share of s = t, at log-normal times (G.2)")
    a("--group", type=int, help="M of the time-aware MMD; 1: the norm instead (Eq. 46, Table 7i)")
    a("--kernel-sigma", type=float, help="sigma of its kernel; inf: times do not matter (Eq. 44)")
    a("--share-time", action="store_true", help="one time for each group, as IMM (Table 7i)")
    a("--sigma-data", type=float, help="sigma_d, the data's standard deviation (3.1)")
    a("--augment", action="store_true", help="EDM's augmentation (Tables 8, 9)")
    a("--tf32", action=argparse.BooleanOptionalAction, help="TF32 on a GPU (G.1)")
    a("--t-mid", type=float, nargs="+", default=[0.6], help="times between the steps (G.1)")
    p.set_defaults(pretrain=0, pretrain_batch=None, teacher=None)
    given = p.parse_known_args()[0]
    row = configurations().get(given.row, {})
    row |= dict(curriculum=0) if given.epsilon is not None else {}     # one goes before the other
    row |= dict(ema_beta=0.0) if given.ema_sigma is not None else {}
    return p.parse(METHOD, {name: preset | row for name, preset in PRESETS.items()})


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions: x, z, xt, u, F, ... [B, C, H, W]; t, r, s, h, w [B].

T0, TT = 0.006, 0.994                      # t_0 and t_T (G.1)
wide = lambda t: t[:, None, None, None]                    # noqa: E731 - [B] -> [B, 1, 1, 1]
tan = lambda t: torch.tan(math.pi / 2 * t)                 # noqa: E731 - sigma / sigma_d, Eq. 24
angle = lambda ratio: 2 / math.pi * torch.atan(ratio)      # noqa: E731 - the t of a ratio, Eq. 24

H = {                                      # h(t) with its constant k and mu (C.3)
    "const": lambda t, k, mu: k + 0 * t,                                           # Eq. 26
    "edm": lambda t, k, mu: angle(((0.5 * tan(t)) ** (1 / 7) + k) ** 7 / 0.5) - t,  # Eq. 27
    "ect": lambda t, k, mu: (
        t - angle(tan(t) * (1 - k * (1 + 8 / (1 + torch.exp(0.5 * tan(t))))))),    # Eq. 28
    "imm": lambda t, k, mu: k * (1 - t) ** 2 / (1 - k * (1 - t)),                  # Eq. 29
    "linear": lambda t, k, mu: k * (1 - t),                                        # Eq. 30
    "quadratic": lambda t, k, mu: k * (1 - t) ** 2,                                # Eq. 31
    "cubic": lambda t, k, mu: k * (1 - t) ** 3,                                    # Eq. 32
    "quad-inc": lambda t, k, mu: k * t ** 2,                                       # Eq. 33
    "quad-concave": lambda t, k, mu: k * t * (1 - t),                              # Eq. 34
    "quad-convex": lambda t, k, mu: k * (0.5 - t) ** 2,                            # Eq. 35
    "exp": lambda t, k, mu: k * torch.exp(-mu * t),                                # Eq. 36
}
H["exp-equal"] = H["exp"]                  # "exp" takes k = eps itself (end of C.3)

C = {                                      # c(t)
    "t": lambda t, mu: t,
    "1000t": lambda t, mu: 1000 * t,
    # paper: also (eps e^(mu t) - 1) / mu (3.2) and e^(-3.5 t) (Table 7c); here: C.4's form, because
    # it alone is near t for small t, from which C.4 derives it.
    "exp": lambda t, mu: torch.expm1(mu * t) / mu,                                 # Eqs. 9, 37
}

W = {                                      # w(t); of GCM and, for Tables 7e and 11, of others
    "gcm": lambda t, s, h, gamma, lam: t ** gamma * torch.exp(-lam * t),           # Eq. 14
    "imm": lambda t, s, h, *_: (           # its a = 1, b = 5
        torch.sigmoid(5 + 2 * torch.log(t / (1 - t))) / t / ((1 - t) ** 2 + t ** 2)),
    "meanflow": lambda t, s, h, *_: torch.ones_like(t),
    "facm": lambda t, s, h, *_: torch.where(s == t, 1.0, torch.sin(math.pi / 2 * t)),
    # 1 / (sigma_t - sigma_r), times t, because it was for the denoiser x_t - t f.
    "ect": lambda t, s, h, *_: t / (tan(t) - tan((t - h).clamp(min=0))),
}


def equal_integral(ht, epsilon, mu):
    """The constant k for which h(t) has the integral of epsilon (1-t)^2 over [0, 1] (C.3)."""
    t, low, high = (torch.arange(20_000).double() + 0.5) / 20_000, 0.0, 1.0
    for _ in range(60):
        k = (low + high) / 2               # every h grows with k
        low, high = (k, high) if H[ht](t, k, mu).mean() < epsilon / 3 else (low, k)
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


P = {"uniform": lambda u, a, b: (u, torch.ones_like(u)), "sine": sine, "cosh": cosh}   # p(t|s)
uniform_power = lambda u, v, nu: (                         # noqa: E731 - draws of p_up (E.2)
    u * (1 - (1 - v) ** (1 / nu)))                                                 # Eq. 17


def sample_times(u, scheme, variant, pt, ab, nu, equal, P_mean, P_std, sigma_d):
    """t, s and the density of t, relative to uniform on [s, t_T], from uniform u [4, B]. A share
    `equal` has s = t, at log-normal times (G.2); what their density weighs is left to them."""
    normal, density = P_mean + P_std * torch.special.ndtri(u), torch.ones_like(u[0])
    s, same = torch.full_like(u[0], T0), u[3] < equal
    if scheme == "gcm":
        if variant == "VU":
            s = T0 + (TT - T0) * uniform_power(u[0], u[1], nu)
        place, density = P[pt](u[2], *ab)
        t = torch.where(same, torch.sigmoid(normal[0]), s + (TT - s) * place)
        density = torch.where(same, 1.0, density)
    elif scheme == "imm":                  # t uniform, then s uniform below it (E.2)
        t = T0 + (TT - T0) * u[0]
        s = T0 + (t - T0) * u[1]
    elif scheme == "meanflow":
        s, t = torch.sigmoid(normal[:2]).sort(dim=0)[0]
    else:                                  # FACM's Eq. 20 with time reversed; ECT's sigma
        t = angle(torch.exp(normal[0]) / (sigma_d if scheme == "ect" else 1))      # Eq. 24
    t = t.clamp(T0, TT)
    return t, torch.where(same, t, s.clamp(T0, TT)), density


def precondition(net, ct, mu, sigma_d, second_time, velocity=False):
    """f(x_t, t, s, y, aug=None): c_out net(c_in x_t, c(t), c(s), y), c(s) if second_time (3.1).
    velocity: net is a velocity network as models.py has them (time from noise to data, noise of
    deviation 1): its answer at k x_t, where the ratio of noise to data is the same, becomes f."""
    def f(xt, t, s, y, aug=None):
        more = () if aug is None else (aug,)
        if velocity:
            k, end = (1 - t + sigma_d * t) ** -1, (1 - s) / (1 - s + sigma_d * s)
            F = net(wide(k) * xt, (1 - t) * k, end if second_time else None, y, *more)
            return -wide(k) * ((1 - sigma_d) * xt + sigma_d * F)
        var = wide((1 - t) ** 2 + t ** 2)
        at = C[ct](t, mu), C[ct](s, mu) if second_time else None
        return sigma_d * math.sqrt(2) * net(var.rsqrt() / sigma_d * xt, *at, y, *more)
    return f


@torch.no_grad()
def guided_velocity(f, xt, u, t, y, aug, y_null, w, kappa, guide):
    """MeanFlow's mixture (Geng et al. 2025, Eq. 19) of u and f(x_t, t, t) with label y and without,
    omega being w (1 - kappa), at times in the interval `guide`; else u."""
    if w == 1:
        return u
    omega, null = w * (1 - kappa), torch.full_like(y, y_null)
    f_cond, f_null = joint(f, (xt, t, t, y, aug), (xt, t, t, null, aug))
    guided = (guide[0] <= t) & (t <= guide[1]) & (y != y_null)
    return torch.where(wide(guided), omega * u + kappa * f_cond + (1 - omega - kappa) * f_null, u)


@torch.no_grad()
def total_derivative(f, xt, t, s, y, aug, u):
    """df/dt along the flow: forward mode in the direction (u, 1) of (x_t, t)."""
    tangents = (u, torch.ones_like(t))
    with sdpa_kernel(SDPBackend.MATH):                     # the others have no forward mode
        return torch.func.jvp(lambda x, t: f(x, t, s, y, aug), (xt, t), tangents)[1]


def value_and_derivative(f, xt, t, s, y, aug, u):
    """f(x_t, t, s), with gradient, and df/dt along the flow, without, from one pass."""
    both = f(models.Dual(xt, u), models.Dual(t, torch.ones_like(t)), s, y, aug)
    return both.value, both.tangent


@torch.no_grad()
def difference(f, F, xt, t, r, s, y, aug, u):
    """f(x_t, t, s) - f(x_r, r, s). F: the former, or None: then both come in float32."""
    xr = xt + wide(r - t) * u
    if F is not None:
        return F - f(xr, r, s, y, aug)
    with torch.autocast(xt.device.type, enabled=False):    # bfloat16 would round the difference off
        near, far = joint(f, (xt, t, s, y, aug), (xr, r, s, y, aug))
        return near - far


def rms(a, dim):
    """Root mean square over dim, with gradient 0 at 0. paper: the norm, a root of a sum; here: of a
    mean, because the log and --clip then mean the same at any size; RAdam does not notice."""
    return torch.linalg.vector_norm(a, dim=dim) / math.sqrt(math.prod(a.shape[d] for d in dim))


def mmd_loss(F, target, base, t, r, s, h, w, M, sigma):
    """Time-aware energy distance [B], in groups of M, of base - h F, the jump's end from t, to base
    - h f_tar, that from r; base: x_t + (s-r) f(x_t, t, s), without gradient.
    paper: twice this; here: half, because M = 1 is then the norm, but for e^(-h / sigma).
    paper: t - r for h; here: h, which is t - r but where s cuts it short, there it may be 0."""
    a, b = ((base - wide(h) * f).flatten(1).unflatten(0, (-1, M)) for f in (F, target))   # Eq. 40
    t, r, s, h, w = (part.unflatten(0, (-1, M)) for part in (t, r, s, h, w))

    def kernel(x1, x2, t1, t2):
        apart = rms(x1[:, :, None] - x2[:, None], dim=(-1,))             # [B/M, M, M]
        times = (t1[:, :, None] - t2[:, None]).abs() + (s[:, :, None] - s[:, None]).abs()
        return -apart * torch.exp(-times / sigma)                                  # Eq. 44

    # paper: |t_j - r_k| in all three kernels; here: each kernel's own times, because Eq. 44 has so.
    pairs = kernel(a, a, t, t) + kernel(b, b, r, r) - 2 * kernel(a, b, t, r)
    return (w / h * pairs.mean(2) / 2).flatten()                                   # Eq. 46


def gcm_loss(f, f_bare, derivative, x, z, t, s, h, w, y, aug, y_null, guidance, M, sigma, reuse):
    """Mean over the batch. f: with gradient; f_bare: without, for the pair's other point and for
    guidance = (w, kappa, interval); derivative: value_and_derivative, or like it, or None: fd;
    reuse: F serves as its f(x_t, t, s), too; M, sigma: see mmd_loss."""
    xt = wide(1 - t) * x + wide(t) * z
    u = guided_velocity(f_bare, xt, z - x, t, y, aug, y_null, *guidance)
    r = torch.maximum(t - h, s)
    if derivative:
        F, df_dt = derivative(f, xt, t, s, y, aug, u)
        target = u + wide(s - t) * df_dt                                           # Eq. 6
    else:
        F = f(xt, t, s, y, aug)
        near = F.detach() if reuse else None
        slope = wide(torch.where(r > s, (s - r) / (t - r), 0))             # t = s: 0, not 0/0
        target = u + slope * difference(f_bare, near, xt, t, r, s, y, aug, u)      # Eq. 39
    if M == 1:
        return (w * rms(F - target, dim=(1, 2, 3))).mean()                         # Eq. 39
    base = xt + wide(s - r) * F.detach()
    return mmd_loss(F, target, base, t, r, s, h, w, M, sigma).mean()


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, C, H, W], standard normal; y [B] labels; -> images [B, C, H, W].

@torch.no_grad()
def sample(net, noise, y, nfe, restart, mid, sigma_d, times=None, **options):
    """nfe jumps, from t_T and nfe - 1 `times` (else ValueError; default: `mid`, or equal steps).
    restart: each to t_0, from where fresh noise leads back (CU; K = nfe); else: pushforward, from
    each time to the next and at last t_0 (VU; K = 1). options: those of `precondition`."""
    f = precondition(net, sigma_d=sigma_d, **options)
    equal = [TT + (T0 - TT) * i / nfe for i in range(1, nfe)]
    inner = times or (mid if len(mid) == nfe - 1 else equal)
    at, xt = [TT, *inner, T0], sigma_d * noise[0]
    if len(inner) != nfe - 1 or any(late <= early for late, early in zip(at, at[1:])):
        raise ValueError(f"--times: NFE {nfe} wants {nfe - 1}, falling, between {TT} and {T0}")
    for i in range(nfe):
        end = T0 if restart else at[i + 1]
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


def sampler_options(args):
    """{name in SAMPLERS: its keyword arguments} for a run with these args (a dict)."""
    options = dict(ct=args["ct"], mu=args["mu"], sigma_d=args["sigma_data"],
                   second_time=args["variant"] == "VU", velocity=args["init"] is not None)
    return {name: dict(options, mid=tuple(args["t_mid"])) for name in SAMPLERS}


# --------------------------------------------------------------------------------------------------
# Blocks that stand to the letter in all three scripts, so that one can be copied away whole.

# --- shared: joint ---
def joint(net, *inputs):
    """The outputs of net for several inputs (x, t, s, y, ...), from one pass, which costs less."""
    joined = [None if part[0] is None else torch.cat(part) for part in zip(*inputs)]
    return net(*joined).chunk(len(inputs))
# --- end shared ---


# --- shared: dropout ---
def same_dropout(net, rows, seed):
    """net with one and the same mask of nn.Dropout for every `rows` of its batch and every call."""
    if not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in net.modules()):
        return net

    def seeded(*inputs, **tangent):        # a tangent goes with `rows` rows alone
        outputs = []
        for i in range(0, inputs[0].shape[0], rows):
            torch.manual_seed(seed)
            outputs.append(net(*(a if a is None else a[i:i + rows] for a in inputs), **tangent))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return seeded
# --- end shared ---


# --- shared: processes ---
def synchronise(net, last):
    """Before a pass through net: its gradient is averaged over the processes only if it is the last
    of a step. DDP takes note of that in the forward pass, FSDP in the backward pass."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = last              # as its no_sync() does
    elif hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
# --- end shared ---


# --- shared: optimizer, EMA ---
def make_optimizer(net, args):
    """The optimiser at the first step of a stage."""
    fused = dict(fused=True) if args.optimizer == "AdamW" else {}      # RAdam has no such form
    return getattr(torch.optim, args.optimizer)(
        net.parameters(), lr=args.lr, betas=args.betas, weight_decay=args.weight_decay, **fused)


def ema_gamma(sigma_rel):
    """The exponent whose power-function EMA has the relative width sigma_rel (EDM2, Karras et al.
    2024): the largest root gamma of sigma_rel^2 (gamma+2)^2 (gamma+3) = gamma+1."""
    k = sigma_rel ** -2
    return max(np.roots([1, 7, 16 - k, 12 - k]).real)


@torch.no_grad()
def ema_update(ema, net, k, gamma, beta=None):
    """Averages net after step k = 1, 2, ... into ema, in which a past step j weighs j^gamma, or,
    with a constant rate beta, beta^(k-j)."""
    beta = beta or (1 - 1 / k) ** (gamma + 1)
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
# --- end shared ---


def preview(path, net, noise, args):
    """A grid of two rows of NFE 1 over two of NFE 2."""
    if noise.shape[2] != 3:
        return                             # latents: sample.py decodes them
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    name = default_sampler(2, args)
    images = [SAMPLERS[name](net, noise, y, nfe, **sampler_options(args)[name]) for nfe in (1, 2)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.parent.mkdir(exist_ok=True)
        data.save_grid(path, data.to_uint8(torch.cat(images)), columns=10, scale=3)


def check(args, num_classes, piece):
    """Raises ValueError for flags that do not go together."""
    others = args.w != 1 or args.equal or args.scheme in ("imm", "meanflow", "facm")
    for wrong, message in (
            (piece % args.group, f"--group {args.group} must divide {piece}, the images of a "
             "process and piece: --batch / (processes x --accum)"),
            (args.variant == "CU" and others, "--variant CU wants --w 1 --equal 0, gcm or ect"),
            (args.w != 1 and not num_classes, f"--w {args.w}: guidance needs classes; take --w 1"),
            (args.pt != "uniform" and len(set(args.pt_ab)) == 1, "--pt-ab: a and b must differ"),
            (any(a <= b for a, b in zip([TT, *args.t_mid], [*args.t_mid, T0])),
             f"--t-mid: falling times between {TT} and {T0}")):
        if wrong:
            raise ValueError(message)


def main():
    args = parse_args()
    device, rank, world = data.start_processes(args.device)
    piece = args.batch // (args.accum * world)

    # Data, networks, and the step at which the run stands
    try:
        dataset = data.load(args.data, args.resolution, args.data_dir, args.num_classes,
                            args.uncond, args.xflip, args.skip_broken)
        args.net = data.fit(args.net, dataset)
        if args.init:
            weights, own = models.read_weights(args.init, velocity=True)
            kept = {k: v for k, v in args.net.items() if k in (*models.UNSEEN, "dropout")}
            args.net = data.fit((own or models.infer(weights)) | kept, dataset)
        args.net |= dict(second_time=args.variant == "VU")
        args.net |= dict(augment_dim=9) if args.augment else {}
        torch.manual_seed(data.seed_of(args.seed, "init"))
        net = models.create(**args.net).to(device)
        check(args, net.num_classes, piece)
        out, checkpoint = data.open_run(args, METHOD, rank)
        step = checkpoint["step"] if checkpoint else 0
        if args.init:
            models.load_weights(net, weights, args.init, ["map_second", "r_embed", "map_augment"])
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        if checkpoint:
            models.load_weights(net, checkpoint["model"], out / "ckpt.pt")
            models.load_weights(ema, checkpoint["ema"], out / "ckpt.pt")
        for network in (net, ema) if args.fsdp else ():
            models.shard(network)
        net.grad_checkpoint = args.grad_checkpoint
        optimizer = make_optimizer(net, args)
        if checkpoint:
            data.load_optimizer(optimizer, checkpoint["optimizer"])
    except (ValueError, OSError) as e:
        data.fail(e)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(args.tf32)
    gamma = ema_gamma(args.ema_sigma)
    random = data.generator("cpu", args.seed, "preview")
    preview_noise = torch.randn((2, 20, *dataset.shape), generator=random).to(device)

    def save(name):
        data.save_run(out / name, METHOD, args, step, net, ema, optimizer)

    # The network in its two roles: with gradient, and bare for the other point or the derivative
    compiled = functools.partial(torch.compile, options=dict(fallback_random=True))  # eager's masks
    bare = compiled(net) if args.compile else net
    trained = bare
    if world > 1 and not args.fsdp:
        torch._dynamo.config.optimize_ddp = False          # its cuts lose gradients of a fused pass
        trained = DistributedDataParallel(trained, broadcast_buffers=False)
    options = sampler_options(vars(args))["restart"]
    scaled = functools.partial(precondition, **{k: options[k] for k in options if k != "mid"})
    differentiate = functools.partial(total_derivative, scaled(net))
    if args.compile and args.jvp == "exact":
        differentiate = compiled(differentiate)
    constant = args.epsilon if args.ht == "exp" else equal_integral(args.ht, args.epsilon, args.mu)

    stop = data.watch_signals()
    log = data.Log(out / "log.jsonl", step, args.steps, args.log_every, quiet=rank > 0)
    while step < args.steps:
        # Seed: random numbers of the global batch; neither processes nor --accum change them
        random = data.generator(device, args.seed, "step", step)
        z_all = torch.randn((args.batch, *dataset.shape), generator=random, device=device)
        *u, drop = torch.rand((5, args.batch), generator=random, device=device)
        if args.share_time:
            u = [a[torch.arange(args.batch) // args.group * args.group] for a in u]
        t_all, s_all, density = sample_times(
            torch.stack(u), args.scheme, args.variant, args.pt, args.pt_ab, args.nu_s, args.equal,
            args.P_mean, args.P_std, args.sigma_data)
        # paper: k is halved for ever, h goes to 0 with 1-t; here: k to 2^-10, h to 1e-5, because
        # float32 rounds differences over less off
        k = 0.5 ** min(1 + step // args.curriculum, 10) if args.curriculum else constant
        h_all = H[args.ht](t_all.double(), k, args.mu).clamp(min=1e-5).to(t_all)
        w_all = W[args.scheme](t_all, s_all, h_all, args.gamma, args.lam) / density

        terms = torch.zeros(1, device=device)
        for part in range(args.accum):
            # Batch
            rows = slice((part * world + rank) * piece, (part * world + rank + 1) * piece)
            try:
                x, y = data.to_device(
                    dataset.batch(args.seed, step * args.batch, args.batch, rows), device)
            except ValueError as e:
                log.close()
                data.fail(f"step {step}: {e}; the checkpoints before stay in {out}", always=True)
            z, t, s, h, w = (a[rows] for a in (args.sigma_data * z_all, t_all, s_all, h_all, w_all))
            aug = None
            if args.w != 1:
                y = torch.where(drop[rows] < args.label_drop, net.num_classes, y)
            if args.augment:
                random = data.generator("cpu", args.seed, "augment", step)
                x, aug = data.augment(x, random, batch=args.batch, rows=rows)

            # Loss
            synchronise(trained, last=part + 1 == args.accum)
            seed = data.seed_of(args.seed, "dropout", step, rank, part)
            f, f_bare = (scaled(same_dropout(role, piece, seed)) for role in (trained, bare))

            def exact(f, *inputs):                 # seeded out here, where --compile does not reach
                F = f(*inputs[:-1])
                torch.manual_seed(seed)
                return F, differentiate(*inputs)

            derivative = dict(fused=value_and_derivative, exact=exact, fd=None)[args.jvp]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = gcm_loss(
                    f, f_bare, derivative, x, z, t, s, h, w, y, aug, net.num_classes,
                    (args.w, args.kappa, args.guide), args.group, args.kernel_sigma,
                    reuse=not args.bf16)
            terms += loss.detach() / args.accum

            # Backward: summed over the pieces
            (loss / args.accum).backward()

        # Clip, step, EMA
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        figures = dict(loss=terms[0], grad_norm=norm.full_tensor() if args.fsdp else norm)
        fall = (1 - args.lr_final) * step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / max(args.warmup, 1), 1 - fall)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(ema, net, step + 1, gamma, args.ema_beta)
        step += 1

        # Log, save, preview. The finite check is the log's: before anything is saved
        ends = step == args.steps
        saves, shows = (ends or step % n == 0 for n in (args.save_every, args.preview_every))
        signalled = log.add(step, METHOD, args.batch, figures, stop, now=saves)
        if saves or signalled:
            save("ckpt.pt")
        if (rank == 0 or args.fsdp) and (shows or signalled):
            preview(out / "previews" / f"{step:07d}.png", ema, preview_noise, vars(args))
        if signalled:
            break

    log.close()
    if world > 1:
        dist.destroy_process_group()
    if step < args.steps:
        sys.exit(128 + (stop or [signal.SIGTERM])[-1])
    if rank == 0:
        path = out / "ckpt.pt"
        print(f"{path}, step {step}; now: python sample.py --ckpt {path} --nfe 1 --out grid.png")


if __name__ == "__main__":
    main()
