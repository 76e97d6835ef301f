"""Flow-Anchored Consistency Models (Peng et al. 2025, arXiv:2507.03738), in one file.

DIRECTION OF TIME: t=0 noise, t=1 data. x_t = (1-t) x_0 + t x_1, x_0 ~ N(0, I), x_1 data.
A consistency model alone forgets the flow that it shortcuts, and training collapses. FACM trains
one network on two tasks, told apart by the time it is conditioned on: the shortcut to the data
(CM, the accelerator) and the velocity of the flow (FM, the anchor).

    f(x_t, t) = x_t + (1-t) F(x_t, c_CM)                   one-step prediction of x_1     Eq. 3
    v         = v_uncond + w (v_cond - v_uncond)           guided velocity                Eq. 9
    L_FM      = |F(x_t, c_FM) - v|^2 + 1 - cos(F, v)       anchor                         Eq. 10
    g         = F(x_t, c_CM) - (v + (1-t) dF/dt)           residual, clamped to [-1, 1]   Eq. 11
    v_tar     = F(x_t, c_CM) - alpha(t) g                  relaxed target                 Eq. 12
    L_CM      = beta(t) e / sqrt(e+c), e = |F - v_tar|^2   accelerator                    Eq. 14, 18
--objective scm, meanflow: the two methods that the paper compares with (A.3(c)).

    x1, x0, xt, t   x_1, x_0, x_t, t        c_cm, c_fm  conditions (t, s): (t, None), (2-t, None)
    F_cm, F_fm      F(x_t, c_CM), ...                   or, auxiliary, (t, 1), (t, t)   (3.2.2)
    dF_dt           total derivative        teacher     F_delta, frozen; None: from scratch

Launch:
    python facm.py                                               # laptop: pretrain, distil
    python facm.py --resolution 32 --jvp fused --bf16 --compile  # 1 GPU
    torchrun --nproc_per_node=8 facm.py --batch 1024             # 8 GPUs; --batch is global

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

METHOD = "facm"

# A row for each data set; a flag given by hand beats it. Table 5, but for the glyphs' small run:
# minutes on a laptop want high rates that fall, and fd is faster there than torch.func.jvp.
PRESETS = {
    "glyphs": dict(
        resolution=16, steps=1600, pretrain=2000, batch=8, lr=2.5e-3, lr_final=0.0, warmup=200,
        pretrain_batch=16, pretrain_lr=8e-3, pretrain_P=(0.0, 1.2), betas=(0.9, 0.99),
        ema_sigma=0.1, jvp="fd",
        net=dict(name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), sigma_data=0.6,
                 adaptive_scale=True, time_scale=8.0),
        P_mean=-0.8, P_std=1.6, w=1.75, t_low=0.125, tangent_warmup=100),
    "cifar10": dict(                       # the numbers of steps are ours
        resolution=32, steps=200_000, pretrain=400_000, batch=128, lr=1e-4, lr_final=1.0,
        warmup=1000, betas=(0.9, 0.995), ema_sigma=0.2, jvp="fused", xflip=True, uncond=True,
        net=dict(name="DDPM++", dropout=0.1, sigma_data=0.5),
        P_mean=-1.0, P_std=1.4, w=1.0, t_low=0.125, tangent_warmup=10_000),
    "imagenet_latents": dict(              # 800 epochs, then 250 (Table 3)
        steps=313_000, pretrain=1_001_000, batch=1024, lr=1e-4, lr_final=1.0, warmup=1000,
        betas=(0.9, 0.999), ema_sigma=0.2, jvp="fused",
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        P_mean=-0.8, P_std=1.6, w=1.75, t_low=0.125, tangent_warmup=10_000),
}


def parse_args():
    p = data.Parser(description="Flow-Anchored Consistency Models. Defaults: the preset's row.")
    a = p.add_argument
    a("--data", default="glyphs", help="glyphs, cifar10, imagenet_latents, or a path")
    a("--data-dir", help="folder of cifar10 or imagenet_latents")
    a("--preset", choices=list(PRESETS), help="row of hyper-parameters (default: the data set's)")
    a("--out", help="run directory; the same command resumes it (default: runs/SCRIPT-DATA)")
    a("--steps", type=int, help="steps of the method, after those of --pretrain")
    a("--pretrain", type=int, help="steps of flow matching first (Eq. 1)")
    a("--teacher", help="checkpoint to distil, in place of --pretrain; neither: from scratch")
    a("--batch", type=int, help="global batch: over all processes and --accum (Table 5)")
    a("--accum", type=int, default=1, help="pieces that a batch is computed in, to save memory")
    a("--lr", type=float, help="learning rate (Table 5)")
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
    a("--optimizer", choices=["AdamW", "RAdam"], default="AdamW", help="optimiser (Table 5)")
    a("--betas", type=float, nargs=2, help="the optimiser's beta_1 and beta_2 (Table 5)")
    a("--weight-decay", type=float, default=0.0, help="the optimiser's weight decay (Table 5)")
    a("--warmup", type=int, help="steps in which the learning rate rises, in each stage")
    a("--pretrain-lr", type=float, help="that of --pretrain (default: the preset's, else --lr)")
    a("--pretrain-batch", type=int, help="global batch of --pretrain (default: --batch)")
    a("--pretrain-P", type=float, nargs=2, help="--P-mean, --P-std of --pretrain (default: same)")
    a("--lr-final", type=float, help="share of --lr to which it then falls, linearly; 1: constant")
    a("--clip", type=float, default=1.0, help="largest norm of the gradient")
    a("--ema-sigma", type=float, help="relative width sigma_rel of the EMA (Table 5)")
    a("--ema-beta", type=float, help="constant rate of the EMA instead; 0: --ema-sigma's")
    a("--label-drop", type=float, default=0.1, help="share of null labels without a teacher")
    a("--log-every", type=int, default=20, help="steps between lines of log.jsonl")
    a("--preview-every", type=int, default=200, help="steps between preview grids")
    a("--P-mean", type=float, help="mean of ln(sigma) (Eq. 20, Table 5)")
    a("--P-std", type=float, help="standard deviation of ln(sigma) (Eq. 20, Table 5)")
    a("--w", type=float, help="guidance scale; 1 is none (Eq. 9, Table 5)")
    a("--t-low", type=float, help="no guidance before this time (Table 5)")
    a("--jvp", choices=["fused", "exact", "fd"], help="dF/dt: with F in one pass (Chain-JVP), by "
      "torch.func.jvp, or a central difference (A.1)")
    a("--objective", choices=["facm", "scm", "meanflow"], default="facm", help="Tables 2 and 3")
    a("--condition", choices=["expanded", "auxiliary"], default="expanded", help="section 3.2.2; "
      "meanflow has the auxiliary one")
    a("--alpha", choices=list(WEIGHTS), default="1-t^p", help="facm: relaxation (Eq. 12, Table 4)")
    a("--beta", choices=list(WEIGHTS), default="cos", help="facm: weight of L_CM (Eq. 14, Table 4)")
    a("--power", type=float, default=0.5, help="the exponent p in 1-t^p (Table 4)")
    a("--c", type=float, default=1e-3, help="the constant in the norm L2 loss (Eq. 18, Table 5)")
    a("--anchor", type=float, default=1.0, help="facm: weight of L_FM; 0: no anchor (Eq. 8)")
    a("--tangent-warmup", type=int, help="scm: steps in which dF/dt comes in (A.3(c))")
    a("--equal", type=float, help="meanflow: share of r = t (A.3(c): 0.75 from scratch, else 0)")
    args = p.parse(METHOD, PRESETS)
    if args.objective == "meanflow":
        args.condition = "auxiliary"       # (t, 1) and (t, t) are two of its (t, r)
    if args.equal is None:
        args.equal = 0.0 if args.teacher or args.pretrain else 0.75
    return args


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions: x1, x0, xt, v, F_cm, ... [B, C, H, W]; t, s, alpha, beta [B].

WEIGHTS = {                                                            # Table 4, Figure 3(a)
    "1": lambda t, p: torch.ones_like(t),
    "1-t^p": lambda t, p: 1 - t ** p,
    "cos": lambda t, p: torch.cos(t * math.pi / 2),
}


def sample_t(normal, P_mean, P_std):
    """Times in (0, 1), denser near the data, from standard normal draws [B]."""
    sigma = torch.exp(P_mean + P_std * normal)
    return 1 - 2 / math.pi * torch.atan(sigma)                         # Eq. 20


def sample_t_r(normal, same, P_mean, P_std):
    """MeanFlow's times t <= r from draws [2, B]; r = t where same [B] bool (A.3(c))."""
    t, r = sample_t(normal, P_mean, P_std).sort(dim=0)[0]
    return t, torch.where(same, t, r)


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
def guided_velocity(net, xt, t, c, y, y_null, w, t_low, v_cond=None):
    """The velocity at x_t, guided with scale w where t >= t_low (Eq. 9); c is net's condition. Net
    is the teacher, and gives v_cond too; from scratch it is the network itself."""
    null = torch.full_like(y, y_null)
    if w == 1:
        return net(xt, *c, y) if v_cond is None else v_cond
    if v_cond is None:
        v_cond, v_uncond = joint(net, (xt, *c, y), (xt, *c, null))
    else:
        v_uncond = net(xt, *c, null)
    # paper: from scratch x_1 - x_0 + w (v_cond - v_uncond), both from the network; here: x_1 - x_0
    # takes the place of v_cond, because the authors' code does so, and w = 1 is then no guidance.
    v = v_uncond + w * (v_cond - v_uncond)                             # Eq. 9
    guided = (t >= t_low) & (y != y_null)
    return torch.where(guided[:, None, None, None], v, v_cond)


@torch.no_grad()
def total_derivative(net, xt, c, y, v, mode="exact", h=5e-3):
    """dF/dt along the flow: the derivative of F(x_t, c) in the direction (v, 1) of (x_t, t). mode:
    "exact", one forward-mode pass, or "fd", a central difference with an error of order h^2."""
    t, s = c
    if mode == "exact":
        tangents = (v, torch.ones_like(t))
        with sdpa_kernel(SDPBackend.MATH):                 # the others have no forward mode
            return torch.func.jvp(lambda x, t: net(x, t, s, y), (xt, t), tangents)[1]  # Eqs. 16, 17
    with torch.autocast(xt.device.type, enabled=False):    # bfloat16 would round the difference off
        ahead, behind = joint(net, (xt + h * v, t + h, s, y), (xt - h * v, t - h, s, y))
        return (ahead - behind) / (2 * h)


def value_and_derivative(net, derivative, xt, c, y, v, *others):
    """F(x_t, c), with gradient, dF/dt, without, and the outputs of net for others (x, t, s, y).
    derivative(xt, c, y, v): total_derivative; None: dF/dt comes with F, from one pass of net."""
    if derivative is None:
        t, s = c
        tangent = v, torch.ones_like(t), None if s is None else torch.zeros_like(s)
        return *net(xt, t, s, y, tangent=tangent), *(net(*inputs) for inputs in others)
    F, *rest = joint(net, (xt, *c, y), *others)
    return F, derivative(xt, c, y, v), *rest


def fm_loss(F_fm, v):
    """The anchor's loss [B]. paper: norms and cosine of whole samples; here: the mean over pixels
    of both, the cosine being that of a pixel's channels, because the authors' code does so."""
    mse = (F_fm - v).square().mean(dim=(1, 2, 3))
    return mse + 1 - cosine_similarity(F_fm, v, dim=1).mean(dim=(1, 2))            # Eq. 10


def cm_target(F_cm, v, dF_dt, t, alpha):
    """v_tar: a step of size alpha from F_cm (without gradient) to the consistent F (Eq. 13)."""
    t, alpha = t[:, None, None, None], alpha[:, None, None, None]
    g = F_cm - (v + (1 - t) * dF_dt)                                   # Eq. 11
    return F_cm - alpha * g.clamp(-1, 1)                               # Eq. 12


def norm_l2(F_cm, v_tar, c):
    """Norm L2 loss [B]. paper: e is a sum; here: a mean over C, H, W, because the authors' code has
    it so with this c. As there, no gradient flows into the root: it is an adaptive weight."""
    e = (F_cm - v_tar).square().mean(dim=(1, 2, 3))
    return e / (e + c).sqrt().detach()                                 # Eq. 18


@torch.no_grad()
def flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, y_null, w, t_low):
    """v at x_t, guided: the teacher's, or from scratch that of the pair (x0, x1) (Eq. 9)."""
    if teacher is None:
        return guided_velocity(net, xt, t, c_fm, y, y_null, w, t_low, v_cond=x1 - x0)
    # paper: the teacher sees c_FM; here: t, because every flow-matching network knows t, but 2 - t
    # only one that was pretrained with the mixed conditions of A.3(a).
    c_teacher = (t, t if teacher.second_time else None)
    return guided_velocity(teacher, xt, t, c_teacher, y, y_null, w, t_low)


def facm_loss(net, derivative, xt, v, t, y, c_cm, c_fm, alpha, beta, c):
    """The two terms of Eq. 8, means over the batch (Algorithm 1). net: F_theta, with gradient;
    derivative: see value_and_derivative."""
    F_cm, dF_dt, F_fm = value_and_derivative(net, derivative, xt, c_cm, y, v, (xt, *c_fm, y))
    L_fm = fm_loss(F_fm, v)
    v_tar = cm_target(F_cm.detach(), v, dF_dt, t, alpha)
    L_cm = beta * norm_l2(F_cm, v_tar, c)                              # Eq. 14
    return L_fm.mean(), L_cm.mean()


def log_weight(t, phi):
    """a(t) [B] of sCM's adaptive weight, a sum of cosines with the learned coefficients phi [K]."""
    waves = torch.cos(math.pi * t[:, None] * torch.arange(len(phi), device=t.device))
    return (waves * phi).sum(dim=1)        # by @ it would be bfloat16 under autocast


def scm_loss(net, derivative, xt, v, t, y, c_cm, warm, phi):
    """sCM (Lu & Song 2024) on the linear flow (A.3(c)). warm: the share of dF/dt, which rises to 1;
    phi: see log_weight; the pixel normalisation is the network's."""
    F_cm, dF_dt = value_and_derivative(net, derivative, xt, c_cm, y, v)
    g = F_cm.detach() - v - warm * (1 - t)[:, None, None, None] * dF_dt          # tangent, Eq. 11
    g = torch.cos(math.pi / 2 * t)[:, None, None, None] * g            # the authors' code has it so
    g = g / (g.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.1)
    e, a = (F_cm - (F_cm.detach() - g)).square().mean(dim=(1, 2, 3)), log_weight(t, phi)
    return (e * torch.exp(-a) + a).mean()


def meanflow_loss(net, derivative, xt, v, t, r, y, c, p=1.0):
    """MeanFlow (Geng et al. 2025) with its adaptive weight: F(x_t, t, r) is the average velocity
    from t to r >= t, therefore v + (r-t) dF/dt, which at r = t is flow matching."""
    F_r, dF_dt = value_and_derivative(net, derivative, xt, (t, r), y, v)
    e = (F_r - v - (r - t)[:, None, None, None] * dF_dt).square().mean(dim=(1, 2, 3))
    return (e / (e + c).pow(p).detach()).mean()


def pretrain_loss(net, x1, x0, t, y, condition, mixed):
    """Flow matching under both of FACM's conditions, c_FM where mixed [B] bool (A.3(a))."""
    pairs = zip(*conditions(t, condition))
    c = [None if cm is None else torch.where(mixed, fm, cm) for cm, fm in pairs]
    return (net(interpolate(x1, x0, t), *c, y) - (x1 - x0)).square().mean()        # Eq. 1


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
        xt = xt + guided_velocity(net, xt, t, c_fm, y, net.num_classes, w, t_low) / nfe
    return xt


@torch.no_grad()
def sample_jumps(net, noise, y, nfe):
    """MeanFlow's: nfe jumps from t to r along the average velocity F(x_t, t, r); K = 1."""
    xt = noise[0]
    for i in range(nfe):
        t, r = (torch.full_like(noise[0, :, 0, 0, 0], j / nfe) for j in (i, i + 1))
        xt = xt + net(xt, t, r, y) / nfe
    return xt


SAMPLERS = {"cm": sample, "euler": sample_euler, "jumps": sample_jumps}
DETERMINISTIC = ("euler", "jumps")         # these take noise of K = 1, the others K = nfe


def default_sampler(nfe, args):
    """The sampler that suits an NFE (A.3(b)); args: the training's, a dict."""
    return "jumps" if args.get("objective") == "meanflow" else "cm"


def sampler_options(args):
    """{sampler: its options}, of those that a run with these args (a dict) has."""
    condition = "auxiliary" if args["net"].get("second_time") else "expanded"
    meanflow = dict(jumps={}) if args.get("objective") == "meanflow" else {}
    return dict(cm=dict(condition=condition), euler=dict(condition=condition)) | meanflow


def velocity(net, args):
    """v(x, t, y) of a network that is pretrained and not yet distilled."""
    condition = sampler_options(args)["euler"]["condition"]
    return lambda x, t, y: net(x, *conditions(t, condition)[1], y)


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
    """A grid of two rows of NFE 1 over two of NFE 2; while pretraining of 20 guided Euler steps."""
    if noise.shape[2] != 3:
        return                             # latents: sample.py decodes them
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    if stage == "pretrain":
        images = [sample_euler(net, noise, y, 20, args.condition, args.w, args.t_low)]
    else:
        name = default_sampler(1, vars(args))
        options = sampler_options(vars(args))[name]
        images = [SAMPLERS[name](net, noise, y, nfe, **options) for nfe in (1, 2)]
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
        args.net = data.fit(args.net, dataset) | dict(second_time=args.condition == "auxiliary")
        torch.manual_seed(data.seed_of(args.seed, "init"))
        net, teacher = models.create(**args.net).to(device), None
        if args.w != 1 and not net.num_classes:
            raise ValueError(f"--w {args.w}: guidance needs a network with classes; take --w 1")
        if args.condition == "expanded" and not net.expandable:
            raise ValueError("this network's time ends at 1; take --condition auxiliary")
        if args.objective == "scm" and args.w != 1 and not (args.pretrain or args.teacher):
            raise ValueError("--objective scm from scratch knows no velocity to guide; take --w 1")
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
        phi = torch.zeros(8, device=device, requires_grad=True)        # sCM's a(t)
        optimizer = make_optimizer(net, args)
        optimizer.add_param_group(dict(params=[phi]))
        if checkpoint:
            data.load_optimizer(optimizer, checkpoint["optimizer"])
            phi.data.copy_(checkpoint.get("phi", phi))
    except (ValueError, OSError) as e:
        data.fail(e)
    gamma = ema_gamma(args.ema_sigma)
    random = data.generator("cpu", args.seed, "preview")
    preview_noise = torch.randn((2, 20, *dataset.shape), generator=random).to(device)

    def save(name):
        data.save_run(out / name, METHOD, args, step, net, ema, optimizer, phi=phi.detach())

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
            optimizer.add_param_group(dict(params=[phi]))
        stage, k = "pretrain", step
        if step >= args.pretrain:
            stage, k = args.objective, step - args.pretrain
        P, batch, lr = (args.P_mean, args.P_std), args.batch, args.lr
        first = args.pretrain * args.pretrain_batch + k * batch        # images before this step
        if stage == "pretrain":
            P, batch, lr = args.pretrain_P or P, args.pretrain_batch, args.pretrain_lr or lr
            first = k * batch

        # Seed: random numbers of the global batch; neither processes nor --accum change them
        random = data.generator(device, args.seed, "step", step)
        x0_all = torch.randn((batch, *dataset.shape), generator=random, device=device)
        normal = torch.randn(batch, generator=random, device=device)
        drop, mix = torch.rand((2, batch), generator=random, device=device)
        normal_r = torch.randn(batch, generator=random, device=device)
        same = torch.arange(batch, device=device) < args.equal * batch

        terms, piece = torch.zeros(2, device=device), batch // (args.accum * world)
        for part in range(args.accum):
            # Batch
            rows = slice((part * world + rank) * piece, (part * world + rank + 1) * piece)
            try:
                x1, y = data.to_device(dataset.batch(args.seed, first, batch, rows), device)
            except ValueError as e:
                log.close()
                data.fail(f"step {step}: {e}; the checkpoints before stay in {out}", always=True)
            x0, t = x0_all[rows], sample_t(normal[rows], *P)
            if teacher is None:
                y = torch.where(drop[rows] < args.label_drop, net.num_classes, y)

            # Loss
            synchronise(trained, last=part + 1 == args.accum)
            seed = data.seed_of(args.seed, "dropout", step, rank, part)
            F_theta = same_dropout(trained, piece, seed)
            L_fm = L_cm = torch.zeros((), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                if stage == "pretrain":
                    L_fm = pretrain_loss(F_theta, x1, x0, t, y, args.condition, mix[rows] < 0.5)
                else:
                    F_bare = net if args.jvp == "exact" else same_dropout(bare, piece, seed)

                    def derivative(*inputs):       # seeded out here, where --compile does not reach
                        torch.manual_seed(seed)
                        return differentiate(F_bare, *inputs)

                    roles = F_theta, None if args.jvp == "fused" else derivative
                    if args.objective == "meanflow":
                        pair = torch.stack([normal[rows], normal_r[rows]])
                        t, r = sample_t_r(pair, same[rows], *P)
                    xt, (c_cm, c_fm) = interpolate(x1, x0, t), conditions(t, args.condition)
                    v = flow_velocity(F_theta, teacher, x1, x0, xt, t, c_fm, y, net.num_classes,
                                      args.w, args.t_low)
                    if args.objective == "facm":
                        L_fm, L_cm = facm_loss(
                            *roles, xt, v, t, y, c_cm, c_fm, WEIGHTS[args.alpha](t, args.power),
                            WEIGHTS[args.beta](t, args.power), args.c)
                    elif args.objective == "scm":
                        warm = min(1, (k + 1) / max(args.tangent_warmup, 1))
                        L_cm = scm_loss(*roles, xt, v, t, y, c_cm, warm, phi)
                    else:
                        L_cm = meanflow_loss(*roles, xt, v, t, r, y, args.c)
            terms += torch.stack([L_fm, L_cm]).detach() / args.accum

            # Backward: summed over the pieces
            anchor = 1 if stage == "pretrain" else args.anchor
            ((anchor * L_fm + L_cm) / args.accum).backward()           # Eq. 8
        if world > 1 and phi.grad is not None:                         # not among the network's
            dist.all_reduce(phi.grad.div_(world))

        # Clip, step, EMA
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        figures = dict(L_fm=terms[0], L_cm=terms[1],
                       grad_norm=norm.full_tensor() if args.fsdp else norm)
        fall = (1 - args.lr_final) * k / (args.pretrain if stage == "pretrain" else args.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((k + 1) / max(args.warmup, 1), 1 - fall)
        optimizer.step()
        optimizer.zero_grad()
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
