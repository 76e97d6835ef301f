"""Dual-End Consistency Model (Dong et al. 2026), in one file.

DIRECTION OF TIME: t=0 noise, t=1 data. x_t = (1-t) x_0 + t x_1, x_0 ~ N(0, I), x_1 data.
One network F(x, t, s) jumps from time t to time s. Not all pairs (t, s) are trained, only three
clusters: to the data (s=1, few steps), in place (s=t, stability, and many steps), and from the
noise to any time (t near 0, the first step of samplers that do not start with a jump to the data).

    f(x_t, t, s) = x_t + (s-t) F(x_t, t, s)                        jump from t to s          Eq. 9
    v     = v_cond + (w-1) D, D = v_cond - v_uncond                guided velocity           Eq. 18
    L_CM  = |F - v_tar|^2, v_tar = F - w_1(t) g, at s = 1          consistency               Eq. 10
            g = F - v - (1-t) JVP(F; (v, 1, 0))                                              Eq. 11
    L_N2N = the same at (x_r, r, t), r near 0, with w_2(r, t) and  noise to noisy            Eq. 15
            g = (lam+gam) F - (gam v_r + lam v_psi) - (t-r) JVP(F; (gam v_r, gam, -lam))
    L_FM  = |F(x_t, t, t) - v|^2 + 1 - cos(F, v)                   instantaneous             Eq. 17

    x1, x0, xt, t   z_ref, z, z_t, t        lam, gam  weights of the right end t and the left end r
    F_cm, F_fm      F at s=1 and at s=t     v_psi     velocity at the right end, at f(x_r, r, t)
    dF_dt, dF       JVPs, without gradient  teacher   F_tea, frozen; None: from scratch

Launch:
    python decm.py                                               # laptop: pretrain, distil
    python decm.py --resolution 32 --jvp fused --bf16 --compile  # 1 GPU
    torchrun --nproc_per_node=8 decm.py --batch 1024             # 8 GPUs; --batch is global

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
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

import data
import models

METHOD = "decm"

# A row for each data set; a flag given by hand beats it. The paper gives w, lr, freq and p = 0.5,
# but neither N, eta, lam, gam, w_1, w_2, r nor c, which are ours; batch, EMA, network are FACM's.
PRESETS = {
    "glyphs": dict(
        resolution=16, steps=1400, pretrain=2000, batch=8, lr=5e-3, lr_final=0.0, warmup=300,
        pretrain_batch=16, pretrain_lr=8e-3, pretrain_P=(0.0, 1.2), betas=(0.9, 0.99),
        ema_sigma=0.1, jvp="fd",
        net=dict(name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), sigma_data=0.6,
                 adaptive_scale=True, time_scale=8.0),
        P_mean=-0.8, P_std=1.6, w=1.75, freq=5, c=1e-2),
    "cifar10": dict(                       # not in the paper: FACM's row
        resolution=32, steps=200_000, pretrain=400_000, batch=128, lr=1e-4, lr_final=1.0,
        warmup=1000, betas=(0.9, 0.995), ema_sigma=0.2, jvp="fused", xflip=True, uncond=True,
        net=dict(name="DDPM++", dropout=0.1, sigma_data=0.5),
        P_mean=-1.0, P_std=1.4, w=1.0, freq=3, c=1e-3),
    "imagenet_latents": dict(              # 250 epochs (section 5), from FACM's teacher
        steps=313_000, pretrain=1_001_000, batch=1024, lr=1e-4, lr_final=1.0, warmup=1000,
        betas=(0.9, 0.999), ema_sigma=0.2, jvp="fused",
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        P_mean=-0.8, P_std=1.6, w=1.75, freq=3, c=1e-3),
}


def parse_args():
    p = data.Parser(description="Dual-End Consistency Model. Defaults: the preset's row.")
    a = p.add_argument
    a("--data", default="glyphs", help="glyphs, cifar10, imagenet_latents, or a path")
    a("--data-dir", help="folder of cifar10 or imagenet_latents")
    a("--preset", choices=list(PRESETS), help="row of hyper-parameters (default: the data set's)")
    a("--out", help="run directory; the same command resumes it (default: runs/SCRIPT-DATA)")
    a("--steps", type=int, help="steps of the method, after those of --pretrain")
    a("--pretrain", type=int, help="steps of flow matching first (Eq. 3)")
    a("--teacher", help="checkpoint to distil, in place of --pretrain; neither: from scratch")
    a("--batch", type=int, help="global batch: over all processes and --accum")
    a("--accum", type=int, default=1, help="pieces that a batch is computed in, to save memory")
    a("--lr", type=float, help="learning rate")
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
    a("--optimizer", choices=["AdamW", "RAdam"], default="AdamW", help="optimiser (section 5)")
    a("--betas", type=float, nargs=2, help="the optimiser's beta_1 and beta_2")
    a("--weight-decay", type=float, default=0.0, help="the optimiser's weight decay")
    a("--warmup", type=int, help="steps in which the learning rate rises, in each stage")
    a("--pretrain-lr", type=float, help="that of --pretrain (default: the preset's, else --lr)")
    a("--pretrain-batch", type=int, help="global batch of --pretrain (default: --batch)")
    a("--pretrain-P", type=float, nargs=2, help="--P-mean, --P-std of --pretrain (default: same)")
    a("--lr-final", type=float, help="share of --lr to which it then falls, linearly; 1: constant")
    a("--clip", type=float, default=1.0, help="largest norm of the gradient")
    a("--ema-sigma", type=float, help="relative width sigma_rel of the EMA")
    a("--ema-beta", type=float, help="constant rate of the EMA instead; 0: --ema-sigma's")
    a("--label-drop", type=float, default=0.1, help="share of null labels without a teacher")
    a("--log-every", type=int, default=20, help="steps between lines of log.jsonl")
    a("--preview-every", type=int, default=200, help="steps between preview grids")
    a("--P-mean", type=float, help="mean of ln(sigma), of --times arctan and lognorm")
    a("--P-std", type=float, help="standard deviation of ln(sigma)")
    a("--w", type=float, help="guidance scale of the teacher; 1 is none (Eq. 18)")
    a("--jvp", choices=["fused", "exact", "fd"], help="dF/dt: with F in one pass (Chain-JVP), by "
      "torch.func.jvp, or a central difference (Eq. 11)")
    a("--objectives", nargs="+", choices=["fm", "cd", "n2n"], default=["fm", "cd", "n2n"],
      help="Table 3 (c) to (g)")
    a("--vel-norm", type=float, metavar="ETA", help="length of D (Table 3 h); default: its own")
    a("--times", choices=["nseg", "arctan", "lognorm"], default="nseg", help="Table 3 (j) to (l)")
    a("--segments", type=int, default=64, help="N, the segments at whose ends t lies (nseg)")
    a("--freq", type=int, help="steps between N2N updates (Table 3 m to o)")
    a("--lam", type=float, default=0.5, help="lambda, weight of N2N's right end t (Eq. 14)")
    a("--gam", type=float, default=0.5, help="gamma, weight of N2N's left end r (Eq. 14)")
    a("--vpsi", choices=["model", "data"], default="model", help="v_psi at f(x_r, r, t), or at x_t")
    a("--r-max", type=float, default=0.02, help="r is uniform from 0 to this (r -> 0 in Eq. 12)")
    a("--w1", choices=list(WEIGHTS), default="1", help="w_1(t) (Algorithm 1, line 10)")
    a("--w2", choices=list(WEIGHTS), default="1", help="w_2(r, t), at the time 1 - (t-r)")
    a("--power", type=float, default=0.5, help="p of the adaptive weight (section 4.4)")
    a("--c", type=float, help="the constant in the adaptive weight")
    return p.parse(METHOD, PRESETS)


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions: x1, x0, xt, v, F_cm, ... [B, C, H, W]; r, t, s, w1, w2 [B].

WEIGHTS = {"1": torch.ones_like, "1-t": lambda t: 1 - t, "1-sqrt": lambda t: 1 - t.sqrt()}


def sample_t(times, normal, uniform, P_mean, P_std, segments):
    """Times in [0, 1] from standard normal and uniform draws [B] (section 4.4)."""
    if times == "nseg":
        return (uniform * (segments + 1)).floor() / segments
    sigma = torch.exp(P_mean + P_std * normal)             # noise to data: tan, or as it is
    return 1 - 2 / math.pi * torch.atan(sigma) if times == "arctan" else 1 / (1 + sigma)


def interpolate(x1, x0, t):
    """x_t on the straight line from noise x0 to data x1."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * x1


@torch.no_grad()
def guided_velocity(teacher, xt, t, y, y_null, w, eta=None):
    """The teacher's velocity at x_t, guided with scale w. eta: the length, over C, H, W, that the
    difference D is given (velocity normalisation, Algorithm 1 line 6); None: D as it is."""
    s, null = t if teacher.second_time else None, torch.full_like(y, y_null)
    if w == 1:
        return teacher(xt, t, s, y)
    v_cond, v_uncond = joint(teacher, (xt, t, s, y), (xt, t, s, null))
    D = v_cond - v_uncond
    if eta is not None:
        D = eta * D / D.square().sum(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-8)
    return v_cond + (w - 1) * D                                        # Eq. 18


@torch.no_grad()
def total_derivative(net, x, t, s, y, dx, dt, ds, mode="exact", h=5e-3):
    """JVP(F; (dx, dt, ds)) [B, C, H, W]: the derivative of F(x, t, s) in the direction of dx and of
    the numbers dt and ds. mode: "exact", one forward-mode pass, or "fd", a central difference with
    an error of order h^2."""
    if mode == "exact":
        tangents = (dx, torch.full_like(t, dt), torch.full_like(s, ds))
        with sdpa_kernel(SDPBackend.MATH):                 # the others have no forward mode
            return torch.func.jvp(lambda x, t, s: net(x, t, s, y), (x, t, s), tangents)[1]  # Eq. 11
    with torch.autocast(x.device.type, enabled=False):     # bfloat16 would round the difference off
        ahead, behind = joint(net, (x + h * dx, t + h * dt, s + h * ds, y),
                              (x - h * dx, t - h * dt, s - h * ds, y))
        return (ahead - behind) / (2 * h)


def value_and_derivative(net, derivative, x, t, s, y, dx, dt, ds, other):
    """F(x, t, s), with gradient, JVP(F; (dx, dt, ds)), without, and the output of net for other =
    (x, t, s, y). derivative: total_derivative of net; None: both come from one pass of net."""
    if derivative is None:
        tangent = dx, torch.full_like(t, dt), torch.full_like(s, ds)
        return *net(x, t, s, y, tangent=tangent), net(*other)
    F, F_other = joint(net, (x, t, s, y), other)
    return F, derivative(x, t, s, y, dx, dt, ds), F_other


def adaptive(F_theta, v_tar, p, c):
    """e / (e+c)^p [B], e the mean of |F - v_tar|^2 over C, H, W; no gradient flows into the weight.
    p = 0.5 gives the gradient of the Pseudo-Huber loss (section 4.4)."""
    e = (F_theta - v_tar).square().mean(dim=(1, 2, 3))
    return e / (e + c).pow(p).detach()


def fm_loss(F_fm, v, p, c):
    """Squared error plus cosine distance [B]: that of a pixel's channels, mean over the pixels.
    paper: Eq. 17 has no weight, section 4.4 one for losses in general; here: the adaptive weight on
    the error, too, because the jumps' losses drown it otherwise (README.md)."""
    cosine = cosine_similarity(F_fm, v, dim=1).mean(dim=(1, 2))
    return adaptive(F_fm, v, p, c) + 1 - cosine                        # Eq. 17


def cm_target(F_cm, v, dF_dt, t, w1):
    """v_tar of the jump to the data, s = 1. w1 [B]."""
    t, w1 = t[:, None, None, None], w1[:, None, None, None]
    g = F_cm - v - (1 - t) * dF_dt
    return F_cm - w1 * g                                               # Eq. 10


def n2n_target(F_n2n, v_r, v_psi, dF, r, t, lam, gam, w2):
    """v_tar of the jump from r to t. dF = JVP(F; (gam v_r, gam, -lam)); w2 [B].

    The left end wants F = v_r + (t-r) dF/dr along the path, the right end F + (t-r) dF/ds = v_psi;
    gam times the first and lam times the second residual, as in Eq. 14, give g.
    """
    r, t, w2 = r[:, None, None, None], t[:, None, None, None], w2[:, None, None, None]
    # paper: Eq. 15 has lam and gam the other way round in the tangents, and Algorithm 1 also in v,
    # with lam twice before the derivative; here: what follows from Eq. 14, because only that is 0
    # for a network whose jumps are exact (tests/test_decm.py).
    g = (lam + gam) * F_n2n - (gam * v_r + lam * v_psi) - (t - r) * dF
    return F_n2n - w2 * g                                              # Eq. 15


def flow_velocity(teacher, x1, x0, xt, t, y, y_null, w, eta):
    """v at x_t: the teacher's, guided (Eq. 18), or from scratch that of the pair (x0, x1)."""
    return x1 - x0 if teacher is None else guided_velocity(teacher, xt, t, y, y_null, w, eta)


def decm_loss(net, derivative, xt, v, t, y, w1, p, c):
    """L_FM and L_CM, means over the batch (Algorithm 1, lines 4 to 14). net: F_theta, with
    gradient; derivative: see value_and_derivative."""
    # A copy: before 2.15 torch.compile fails on the same tensor in two places
    one, s = torch.ones_like(t), t.clone()
    F_cm, dF_dt, F_fm = value_and_derivative(
        net, derivative, xt, t, one, y, v, 1, 0, (xt, t, s, y))
    v_tar = cm_target(F_cm.detach(), v, dF_dt, t, w1)
    return fm_loss(F_fm, v, p, c).mean(), adaptive(F_cm, v_tar, p, c).mean()


def n2n_loss(net, derivative, teacher, x1, x0, xt, v, r, t, y, guidance, lam, gam, vpsi, w2, p, c):
    """L_FM and L_N2N, means over the batch (Algorithm 1, lines 18 to 27). v: that at x_t; guidance:
    y_null, w and eta of guided_velocity."""
    xr = interpolate(x1, x0, r)
    v_r = flow_velocity(teacher, x1, x0, xr, r, y, *guidance)
    F_n2n, dF, F_fm = value_and_derivative(
        net, derivative, xr, r, t, y, gam * v_r, gam, -lam, (xt, t, t.clone(), y))
    v_psi = v
    if vpsi == "model":
        with torch.no_grad():
            f = xr + (t - r)[:, None, None, None] * F_n2n.detach()     # Eq. 9
            v_psi = (net(f, t, t.clone(), y) if teacher is None else
                     guided_velocity(teacher, f, t, y, *guidance))
    v_tar = n2n_target(F_n2n.detach(), v_r, v_psi, dF, r, t, lam, gam, w2)
    return fm_loss(F_fm, v, p, c).mean(), adaptive(F_n2n, v_tar, p, c).mean()


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
    """The sampler that suits an NFE (section 4.5); args: the training's, a dict."""
    return "cm" if nfe < 4 else "mix" if nfe <= 16 else "euler"


def sampler_options(args):
    """{sampler: keyword arguments from the training's args, a dict}."""
    return {name: {} for name in SAMPLERS}


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


def preview(path, net, stage, noise, args):
    """A grid of two rows of NFE 1 over two of NFE 2; while pretraining of 20 Euler steps."""
    if noise.shape[2] != 3:
        return                             # latents: sample.py decodes them
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    if stage == "pretrain":
        images = [sample_euler(net, noise, y, 20)]
    else:
        images = [sample(net, noise, y, nfe) for nfe in (1, 2)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.parent.mkdir(exist_ok=True)
        data.save_grid(path, data.to_uint8(torch.cat(images)), columns=10, scale=3)


def main():
    args = parse_args()
    device, rank, world = data.start_processes(args.device)

    def prepare(teacher):                  # as the flags say
        if args.fsdp:
            models.shard(teacher)
        if args.compile:
            teacher.compile()

    # Data, networks, and the step at which the run stands
    try:
        dataset = data.load(args.data, args.resolution, args.data_dir, args.num_classes,
                            args.uncond, args.xflip, args.skip_broken)
        args.net = data.fit(args.net, dataset) | dict(second_time=True)
        torch.manual_seed(data.seed_of(args.seed, "init"))
        net, teacher = models.create(**args.net).to(device), None
        if args.w != 1 and not net.num_classes:
            raise ValueError(f"--w {args.w}: guidance needs a network with classes; take --w 1")
        if args.w != 1 and not args.teacher and not args.pretrain:
            raise ValueError(f"--w {args.w}: there is no guidance from scratch; take --w 1")
        if args.lam + args.gam <= 0 or not 0 <= args.r_max < 1:
            raise ValueError("want --lam + --gam > 0, 0 <= --r-max < 1")
        if args.objectives == ["n2n"]:
            raise ValueError("--objectives n2n comes beside fm or cd, every --freq of their steps")
        out, checkpoint = data.open_run(args, METHOD, rank)
        step = checkpoint["step"] if checkpoint else 0
        if path := args.teacher or (out / "teacher.pt" if step > args.pretrain > 0 else None):
            teacher = models.load_teacher(path, net, args.net).to(device).requires_grad_(False)
            prepare(teacher)
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
    gamma = ema_gamma(args.ema_sigma)
    random = data.generator("cpu", args.seed, "preview")
    preview_noise = torch.randn((2, 20, *dataset.shape), generator=random).to(device)

    def save(name):
        data.save_run(out / name, METHOD, args, step, net, ema, optimizer)

    # The network in its two roles: with gradient, and bare for the derivative
    compiled = functools.partial(torch.compile, options=dict(fallback_random=True))  # eager's masks
    bare = compiled(net) if args.compile else net
    trained = bare
    if world > 1 and not args.fsdp:
        torch._dynamo.config.optimize_ddp = False          # its cuts lose gradients of a fused pass
        trained = DistributedDataParallel(trained, broadcast_buffers=False)
    differentiate = functools.partial(total_derivative, mode=args.jvp)
    if args.compile and args.jvp == "exact":
        differentiate = compiled(differentiate)

    total, stop = args.pretrain + args.steps, data.watch_signals()
    log = data.Log(out / "log.jsonl", step, total, args.log_every, quiet=rank > 0)
    while step < total:
        # The second stage begins with the averaged weights of the first, its teacher
        if step == args.pretrain > 0:
            save("teacher.pt")
            teacher = models.create(**args.net).to(device).eval().requires_grad_(False)
            prepare(teacher)
            for network in (teacher, net):
                network.load_state_dict(ema.state_dict())
            optimizer = make_optimizer(net, args)
        stage, k = ("pretrain", step) if step < args.pretrain else (METHOD, step - args.pretrain)
        times, P, batch, lr = args.times, (args.P_mean, args.P_std), args.batch, args.lr
        first = args.pretrain * args.pretrain_batch + k * batch        # images before this step
        if stage == "pretrain":
            P, batch, lr = args.pretrain_P or P, args.pretrain_batch, args.pretrain_lr or lr
            times, first = "arctan", k * batch

        # Seed: random numbers of the global batch; neither processes nor --accum change them
        random = data.generator(device, args.seed, "step", step)
        x0_all = torch.randn((batch, *dataset.shape), generator=random, device=device)
        normal = torch.randn(batch, generator=random, device=device)
        drop, s_all, u, r_all = torch.rand((4, batch), generator=random, device=device)

        # Batch, in pieces
        piece = batch // (args.accum * world)
        pieces = [slice(i * piece, (i + 1) * piece) for i in range(rank, args.accum * world, world)]
        try:
            batches = [data.to_device(dataset.batch(args.seed, first, batch, rows), device)
                       for rows in pieces]
        except ValueError as e:
            log.close()
            data.fail(f"step {step}: {e}; the checkpoints before stay in {out}", always=True)

        # Algorithm 1: the N2N objective is an update of its own, every --freq steps
        n2n_follows = stage == METHOD and "n2n" in args.objectives and k % args.freq == 0
        figures, kept = {}, {}             # kept: x_t and v of each piece, for both updates
        for update in [stage, "n2n"] if n2n_follows else [stage]:
            terms = torch.zeros(2, device=device)
            for part, rows in enumerate(pieces):
                x1, y = batches[part]
                x0, t = x0_all[rows], sample_t(times, normal[rows], u[rows], *P, args.segments)
                r = torch.minimum(args.r_max * r_all[rows], t)         # noise to noisy, never back
                if teacher is None:
                    y = torch.where(drop[rows] < args.label_drop, net.num_classes, y)

                # Loss
                synchronise(trained, last=part + 1 == args.accum)
                seed = data.seed_of(args.seed, "dropout", step, rank, part)
                F_theta = same_dropout(trained, piece, seed)
                F_bare = net if args.jvp == "exact" else same_dropout(bare, piece, seed)

                def derivative(*inputs):           # seeded out here, where --compile does not reach
                    torch.manual_seed(seed)
                    return differentiate(F_bare, *inputs)

                roles = F_theta, None if args.jvp == "fused" else derivative
                guidance = net.num_classes, args.w, args.vel_norm
                L_fm = L_jump = torch.zeros((), device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    if update == "pretrain":
                        L_fm = pretrain_loss(F_theta, x1, x0, t, s_all[rows], y)
                    elif update == METHOD:
                        xt = interpolate(x1, x0, t)
                        v = flow_velocity(teacher, x1, x0, xt, t, y, *guidance)
                        kept[part] = xt, v
                        L_fm, L_jump = decm_loss(
                            *roles, xt, v, t, y, WEIGHTS[args.w1](t), args.power, args.c)
                    else:
                        L_fm, L_jump = n2n_loss(
                            *roles, teacher, x1, x0, *kept[part], r, t, y, guidance, args.lam,
                            args.gam, args.vpsi, WEIGHTS[args.w2](1 - t + r), args.power, args.c)
                terms += torch.stack([L_fm, L_jump]).detach() / args.accum

                # Backward: summed over the pieces
                fm = update == "pretrain" or "fm" in args.objectives
                jump = update == "n2n" or "cd" in args.objectives
                ((fm * L_fm + jump * L_jump) / args.accum).backward()

            # Clip, step
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
            norm = norm.full_tensor() if args.fsdp else norm
            figures |= (dict(L_n2n=terms[1], grad_norm_n2n=norm) if update == "n2n" else
                        dict(L_fm=terms[0], L_cm=terms[1], grad_norm=norm))
            fall = (1 - args.lr_final) * k / (args.pretrain if stage == "pretrain" else args.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((k + 1) / max(args.warmup, 1), 1 - fall)
            optimizer.step()
            optimizer.zero_grad()

        # EMA. paper: after either update; here: after both, so that k counts steps
        ema_update(ema, net, k + 1, gamma, args.ema_beta)
        step += 1

        # Log, save, preview. The finite check is the log's: before anything is saved
        ends = step in (args.pretrain, total)
        saves, shows = (ends or step % n == 0 for n in (args.save_every, args.preview_every))
        signalled = log.add(step, stage, batch, figures, stop, now=saves)
        if saves or signalled:
            save("ckpt.pt")
        if (rank == 0 or args.fsdp) and (shows or signalled):
            preview(out / "previews" / f"{step:07d}.png", ema, stage, preview_noise, args)
        if signalled:
            break

    log.close()
    if world > 1:
        dist.destroy_process_group()
    if step < total:
        sys.exit(128 + (stop or [signal.SIGTERM])[-1])
    if rank == 0:
        path = out / "ckpt.pt"
        print(f"{path}, step {step}; now: python sample.py --ckpt {path} --nfe 1 --out grid.png")


if __name__ == "__main__":
    main()
