"""Flow-Anchored Consistency Models (Peng et al. 2025, arXiv:2507.03738v1), in one file.

DIRECTION OF TIME: t=0 noise, t=1 data. x_t = (1-t) x_0 + t x_1, x_0 ~ N(0, I), x_1 data.
A network that only learns the consistency task forgets the flow that it shortcuts, and training
collapses. FACM trains one network on two tasks, which the time condition distinguishes: the
shortcut to the data (CM, the accelerator) and the velocity of the flow (FM, the anchor).

    f(x_t, t) = x_t + (1-t) F(x_t, c_CM)                   `sample`: predicts x_1         Eq. 3
    L         = L_FM + L_CM                                `train`, `facm_loss`           Eq. 8
    v         = v_uncond + w (v_cond - v_uncond)           `guide`                        Eq. 9
    L_FM      = |F(x_t, c_FM) - v|^2 + 1 - cos(F, v)       `fm_loss`: the anchor          Eq. 10
    g         = F(x_t, c_CM) - (v + (1-t) dF/dt)           `cm_target`: residual          Eq. 11
    v_tar     = F(x_t, c_CM) - alpha(t) clamp(g, -1, 1)    `cm_target`: relaxed target    Eq. 12
    L_CM      = beta(t) e / sqrt(e+c), e = |F - v_tar|^2   `norm_l2`: the accelerator     Eq. 14, 18

    x1, x0, xt, t   x_1, x_0, x_t, t        dF_dt       total derivative
    F_cm, F_fm      F(x_t, c_CM), ...       teacher     F_delta, frozen; None: from scratch
    c_cm, c_fm      the conditions, pairs (t, s): (t, None) and (2-t, None) with the expanded
                    interval, (t, 1) and (t, t) with the auxiliary condition (3.2.2)

Launch:
    python facm.py                                               # laptop: teacher and student
    python facm.py --data cifar10                                # 1 GPU
    torchrun --nproc_per_node=8 facm.py --data imagenet_latents  # 8 GPUs

Without --teacher, the script uses the teacher of flow.py in runs/flow-DATA, and trains it first if
it is missing. Results and details: docs/facm.md. Comments mark every departure from the paper:
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

METHOD = "facm"

# The presets, one for each data set. A flag on the command line overrides its value. The values are
# those of Table 5, except where a comment says that they are ours. The warm-up of the learning rate
# is ours, too. The gradient is clipped at norm 1, as in the authors' code.
PRESETS = {
    "glyphs": dict(                        # ours: minutes on a laptop need high rates that fall
        resolution=16,
        steps=1600,
        batch=8,
        lr=2.5e-3,
        lr_final=0.0,
        warmup=200,
        betas=(0.9, 0.99),
        ema_sigma=0.1,
        jvp="fd",                          # the fastest of the three for so small a network
        net=dict(
            name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), sigma_data=0.6,
            adaptive_scale=True, time_scale=8.0),
        P_mean=-0.8,
        P_std=1.6,
        w=1.75,
        t_low=0.125,
    ),
    "cifar10": dict(
        resolution=32,
        steps=200_000,                     # ours
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
        xflip=True,                        # ours
        uncond=True,
        # sigma_data is ours: Table 5 says "Simple-EDM", which the paper does not define
        net=dict(name="DDPM++", dropout=0.1, sigma_data=0.5),
        P_mean=-1.0,
        P_std=1.4,
        w=1.0,
        t_low=0.125,
    ),
    "imagenet_latents": dict(
        steps=313_000,                     # 250 epochs (Table 3)
        batch=1024,
        lr=1e-4,
        lr_final=1.0,
        warmup=1000,                       # ours
        betas=(0.9, 0.999),
        ema_sigma=0.2,
        precision="bf16",                  # the authors' code
        micro_batch=32,                    # ours: fits a GPU of 80 GB
        save_every=5000,                   # ours
        jvp="fused",
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        P_mean=-0.8,
        P_std=1.6,
        w=1.75,
        t_low=0.125,
    ),
}
PRESETS["mnist"] = PRESETS["glyphs"] | dict(               # ours
    resolution=None, batch=16, net=PRESETS["glyphs"]["net"] | dict(width=16, mult=(1, 2, 4)))


def parse_args():
    parser = flags.Parser(description="Flow-Anchored Consistency Models. The defaults of most "
                          "flags are those of the preset.")
    flags.add_flags(parser, PRESETS, teacher=True)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    # The numbers after a type are the smallest and the largest value. Flags without a default have
    # that of the preset
    flag("--P-mean", float, help="mean of ln(sigma), where t = 1 - 2/pi atan(sigma) (Eq. 20, "
         "Table 5)")
    flag("--P-std", float, 0, help="standard deviation of ln(sigma) (Eq. 20, Table 5)")
    flag("--w", float, help="guidance scale; 1 is none (Eq. 9, Table 5)")
    flag("--t-low", float, 0, 1, help="time before which there is no guidance (Table 5)")
    flag("--jvp", choices=list(JVP), help="how dF/dt (A.1) is computed: fused, in one pass with F; "
         "exact, by torch.func.jvp; fd, by a central difference")
    flag("--condition", choices=["expanded", "auxiliary"], default="expanded", help="how the "
         "network distinguishes the two tasks (3.2.2)")
    flag("--alpha", choices=list(WEIGHTS), default="1-t^p", help="relaxation alpha(t) of the "
         "target (Eq. 12, Table 4)")
    flag("--beta", choices=list(WEIGHTS), default="cos", help="weight of L_CM (Eq. 14, Table 4)")
    flag("--power", float, 0.01, default=0.5, help="the exponent p in 1-t^p (Table 4)")
    flag("--c", float, 1e-9, default=1e-3, help="the constant in the norm L2 loss (Eq. 18, "
         "Table 5)")
    flag("--anchor", float, 0, default=1.0, help="weight of L_FM; 0: no anchor (Eq. 8)")
    flag("--label-drop", float, 0, 1, default=0.1, help="fraction of labels replaced by the null "
         "label, for a network that is trained from scratch and learns its own guidance")
    args = flags.parse(parser, METHOD, PRESETS)
    flags.check_effect(
        args,
        ("t-low", args.w != 1, "guidance, --w other than 1"),
        ("power", "1-t^p" in (args.alpha, args.beta), "--alpha or --beta 1-t^p"),
        ("label-drop", args.teacher == "none" and not args.uncond, "--teacher none and labels"))
    return args


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions of any shape: x1, x0, xt, v, F_cm, ... [B, ...], with channels in
# dimension 1; t, s [B] float; y [B] int64 or None. They need only torch and jvp.py.

def facm_loss(net, jvp, x1, x0, t, y, *, teacher=None, condition="expanded", alpha="1-t^p",
              beta="cos", p=0.5, c=1e-3, w=1.0, t_low=0.125, y_null=None):
    """L_FM and L_CM, means over the batch, whose sum is Eq. 8 (Algorithm 1).

    net        F_theta, any callable net(x, t, s, y); under DDP, the DDP wrapper, so that the
               backward pass averages the gradient. Times are in [0, 2]; s is None for the
               condition "expanded", and a second time in [0, 1] for "auxiliary"
    jvp        a value of jvp.JVP; "fused" also calls net with tangent=, see jvp.with_tangent
    x1, x0, t, y   data, noise, times in [0, 1], labels or None
    teacher    F_delta, frozen: a callable teacher(x, t, None, y) that predicts the velocity; None
               if the network is trained from scratch
    alpha, beta, p   the weights, keys of WEIGHTS, and their exponent (Table 4)
    c          the constant in Eq. 18
    w, t_low, y_null   guidance of scale w from the time t_low on, with the null label y_null
               (Eq. 9)

    Raises ValueError if w is not 1 and y or y_null is None.
    """
    c_cm, c_fm = conditions(t, condition)                                      # line 2
    xt = interpolate(x1, x0, t)                                                # line 3
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y,                    # line 4, Eq. 9
                      w=w, t_low=t_low, y_null=y_null)
    F_cm, dF_dt, F_fm = jvp(net, at=(xt, *c_cm, y), along=(v, 1, 0),           # line 6, Eq. 17
                            also=(xt, *c_fm, y))                               # line 5
    v_tar = cm_target(F_cm.detach(), v, dF_dt, t, WEIGHTS[alpha](t, p))        # lines 7, 8
    L_cm = WEIGHTS[beta](t, p) * norm_l2(F_cm, v_tar, c)                       # Eq. 14
    L_fm = fm_loss(F_fm, v)
    return L_fm.mean(), L_cm.mean()                                            # line 9


def wide(t, x):
    """t [B], reshaped to as many dimensions as x, so that it broadcasts over the samples."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def mean(a):
    """The mean over all dimensions except the first: [B, ...] -> [B]."""
    return a.mean(dim=tuple(range(1, a.dim())))


def conditions(t, condition):
    """The conditions c_CM and c_FM of the two tasks, pairs (time, second time or None) (3.2.2)."""
    if condition == "expanded":
        return (t, None), (2 - t, None)
    # t.clone(), because before 2.15 torch.compile fails if one tensor is passed twice
    return (t, torch.ones_like(t)), (t, t.clone())


def interpolate(x1, x0, t):
    """x_t on the straight line from noise x0 to data x1."""
    t = wide(t, x1)
    return (1 - t) * x0 + t * x1


@torch.no_grad()
def flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, *, w, t_low, y_null):
    """The guided v at x_t: the teacher's or, from scratch, that of the pair (x0, x1) (Eq. 9)."""
    if teacher is not None:
        # paper: the teacher's condition is c_FM, which is 2 - t with the expanded interval;
        # here: t, as in the authors' code, because all flow-matching networks are trained at t, but
        # only those with the mixed conditions of A.3(a) at 2 - t.
        return guided_velocity(teacher, xt, t, (t, None), y, w=w, t_low=t_low, y_null=y_null)
    v_cond = x1 - x0
    if w == 1:
        return v_cond
    # paper: does not give the condition of v_uncond, and the authors' code evaluates it at t, which
    # is c_CM with the expanded interval; here: c_FM, because the network learns the velocity there.
    v_uncond = net(xt, *c_fm, null_labels(y, y_null))
    # paper: from scratch x_1 - x_0 + w (v_cond - v_uncond), both from the network; here: x_1 - x_0
    # replaces v_cond, because the authors' code does so, and w = 1 then means no guidance, as 3.2.1
    # says.
    return guide(v_cond, v_uncond, t, y, w=w, t_low=t_low, y_null=y_null)


@torch.no_grad()
def guided_velocity(net, xt, t, c, y, *, w=1.0, t_low=0.125, y_null=None):
    """The velocity F(x_t, c) of a network, guided with scale w where t >= t_low (Eq. 9). c: a pair
    (time, second time or None), see conditions."""
    if w == 1:
        return net(xt, *c, y)
    null = null_labels(y, y_null)
    v_cond, v_uncond = in_one_pass(net, (xt, *c, y), (xt, *c, null))
    return guide(v_cond, v_uncond, t, y, w=w, t_low=t_low, y_null=y_null)


def null_labels(y, y_null):
    """The null label for every label of y. Raises ValueError if y or y_null is None."""
    if y is None or y_null is None:
        raise ValueError("guidance (w other than 1) needs the labels y and the null label y_null")
    return torch.full_like(y, y_null)


def guide(v_cond, v_uncond, t, y, *, w, t_low, y_null):
    """The guided velocity where t >= t_low and y is not the null label; elsewhere v_cond."""
    v = v_uncond + w * (v_cond - v_uncond)                             # Eq. 9
    # paper: only names t_low (Table 5), and from scratch the authors' code guides away from the
    # network's own v_cond below t_low and for null labels; here: v is v_cond there, unguided.
    guided = (t >= t_low) & (y != y_null)
    return torch.where(wide(guided, v), v, v_cond)


def cm_target(F_cm, v, dF_dt, t, alpha):
    """v_tar: a step of size alpha from F_cm (without gradient) to the consistent F (Eq. 12).
    paper: Algorithm 1 and Eq. 13 have no clamp; here: g is clamped, because the text before Eq. 12
    says so, and the authors' code does so. Where |g| <= 1, the two are equal."""
    t, alpha = wide(t, v), wide(alpha, v)
    g = F_cm - (v + (1 - t) * dF_dt)                                   # line 7, Eq. 11
    return F_cm - alpha * g.clamp(-1, 1)                               # line 8, Eq. 12


def norm_l2(F_cm, v_tar, c):
    """Norm L2 loss [B]. paper: e is a sum; here: the mean over all dimensions except the batch,
    because the authors' code does so with this c. As in that code, the root is detached: it is an
    adaptive weight."""
    e = mean((F_cm - v_tar).square())
    return e / (e + c).sqrt().detach()                                 # Eq. 18


def fm_loss(F_fm, v):
    """The anchor's loss [B]. paper: the squared norm is a sum; here: the mean over all dimensions
    except the batch, because the authors' code does so."""
    mse = mean((F_fm - v).square())
    return mse + 1 - cosine(F_fm, v)                                   # Eq. 10


def cosine(a, b):
    """The cosine of the angle between a and b [B]. paper: over whole samples; here: over the
    channels of a pixel, averaged over the pixels, because the authors' code does so. With one
    channel, which has no direction, it is over whole samples."""
    if a.shape[1] == 1:
        a, b = a.flatten(1), b.flatten(1)
    return cosine_similarity(a, b, dim=1).reshape(len(a), -1).mean(dim=1)


WEIGHTS = {                                                            # Table 4, Figure 3(a)
    "1": lambda t, p: torch.ones_like(t),
    "1-t^p": lambda t, p: 1 - t ** p,
    "cos": lambda t, p: torch.cos(t * math.pi / 2),
}


def sample_t(normal, P_mean=-0.8, P_std=1.6):
    """Times in (0, 1), denser near the data, from standard normal numbers [B]."""
    sigma = torch.exp(P_mean + P_std * normal)
    return 1 - 2 / math.pi * torch.atan(sigma)                         # Eq. 20


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, ...], standard normal; y [B] labels or None; -> samples [B, ...].

@torch.no_grad()
def sample(net, noise, y, *, nfe, condition="expanded"):
    """nfe one-step predictions at equal steps of time, with fresh noise in between (A.3(b)).
    K = nfe."""
    xt = noise[0]
    for i in range(nfe):
        t = xt.new_full(xt.shape[:1], i / nfe)
        c_cm, _ = conditions(t, condition)
        x1 = xt + (1 - i / nfe) * net(xt, *c_cm, y)                    # Eq. 3
        if i + 1 < nfe:
            t_next = (i + 1) / nfe
            xt = t_next * x1 + (1 - t_next) * noise[i + 1]             # Eq. 19
    return x1


@torch.no_grad()
def sample_euler(net, noise, y, *, nfe, condition="expanded", w=1.0, t_low=0.125, y_null=None):
    """nfe Euler steps along the velocity F(x_t, c_FM). Guidance (w) needs two passes. K = 1."""
    xt = noise[0]
    for i in range(nfe):
        t = xt.new_full(xt.shape[:1], i / nfe)
        _, c_fm = conditions(t, condition)
        v = guided_velocity(net, xt, t, c_fm, y, w=w, t_low=t_low, y_null=y_null)
        xt = xt + v / nfe
    return xt


SAMPLERS = {"cm": sample, "euler": sample_euler}
DETERMINISTIC = ("euler",)  # these need one noise, K = 1, whatever the NFE


def default_sampler(nfe, args):
    """The default sampler for an NFE (A.3(b)). args: the flags of the run, a dict."""
    return "cm"


def sampler_options(args):
    """{sampler: its options}. args: the flags of the run, a dict."""
    condition = "auxiliary" if args["net"].get("second_time") else "expanded"
    return {name: dict(condition=condition) for name in SAMPLERS}


def preview(net, noise, args):
    """Two rows of samples at NFE 1, above two rows at NFE 2."""
    y = data.preview_labels(net, noise, args.uncond)
    return torch.cat([sample(net, noise, y, nfe=nfe, condition=args.condition) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------
# TRAINING.

def check(args, net):
    """Raises ValueError for flags that cannot be combined. net: the options of the network."""
    if args.w != 1 and (args.uncond or not net["num_classes"]):
        raise ValueError(f"--w {args.w}: guidance needs labels and a network with classes; use "
                         "--w 1")


def train(args, run):
    """Trains with the flags args. run (common/run.py) manages the checkpoints and the log."""
    device, rank, world = run.device, run.rank, run.world

    # Data and teacher (None with --teacher none)
    dataset = data.load_for(args)
    check(args, data.fit_network_to(dataset, args.net))    # before a teacher is trained for hours
    teacher, args.net = find_or_train(args, dataset, run)
    check(args, args.net)                  # with the teacher's network

    # Network: it starts from the teacher's weights. The weights of a second time start at zero
    args.net = args.net | dict(second_time=args.condition == "auxiliary")
    net = models.create(**args.net, seed=seed_of(args.seed, "init"), device=device)
    net.grad_checkpoint = args.grad_checkpoint
    if args.condition == "expanded" and not net.expandable:
        raise ValueError("this network accepts times up to 1, but --condition expanded uses times "
                         "up to 2; use --condition auxiliary")
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
        x0_all = torch.randn(shape, generator=random, device=device)                     # line 1
        normal = torch.randn(args.batch, generator=random, device=device)
        t_all = sample_t(normal, args.P_mean, args.P_std)                                # line 1
        drop_all = torch.rand(args.batch, generator=random, device=device)

        # Accumulate the gradient over the micro-batches. With the last one, it is averaged over the
        # processes
        if hasattr(net, "force_weight_norm"):
            net.force_weight_norm()        # of EDM2's networks, before each step
        losses = torch.zeros(2, device=device)
        for i, samples in enumerate(micro_batches):
            x1, y = run.batch(dataset, step, samples)                                    # line 1
            x0, t = x0_all[samples], t_all[samples]
            if teacher is None:
                y = torch.where(drop_all[samples] < args.label_drop, net.num_classes, y)
            # The same dropout mask in all passes of this micro-batch
            models.seed_dropout(net, seed_of(args.seed, "dropout", step, rank, i), rows=len(y))
            last = i == len(micro_batches) - 1
            if args.fsdp:
                net.set_requires_gradient_sync(last)
            elif world > 1:
                model.require_backward_grad_sync = last                # what DDP's no_sync() sets
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                L_fm, L_cm = facm_loss(
                    model, jvp, x1, x0, t, y, teacher=teacher, condition=args.condition,
                    alpha=args.alpha, beta=args.beta, p=args.power, c=args.c, w=args.w,
                    t_low=args.t_low, y_null=net.num_classes)
            share = len(y) / (args.batch // world)     # of the samples of this process
            loss = (args.anchor * L_fm + L_cm) * share                                 # Eq. 8
            loss.backward()
            losses += torch.stack([L_fm, L_cm]).detach() * share

        # Clip, step, and update the average of the weights (EDM2's power function). A step whose
        # gradient is not finite is skipped
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        if args.fsdp:
            grad_norm = grad_norm.full_tensor()
        if grad_norm.isfinite():
            optimizer.step()
            ema_beta = (1 - 1 / (step + 1)) ** (ema_gamma + 1)
            with torch.no_grad():              # ema += (1 - ema_beta) * (net - ema)
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()),
                                     1 - ema_beta)
        optimizer.zero_grad()

        # Log. At intervals, draw a preview, save a checkpoint, and measure the FID of samples
        run.log(step, L_fm=losses[0], L_cm=losses[1], grad_norm=grad_norm)
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
