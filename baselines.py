"""Five methods to compare FACM and DE-CM with, on FACM's flow, teacher, times and networks.

DIRECTION OF TIME: t=0 noise, t=1 data, as in facm.py. The parts that these methods share
with FACM are imported from there: flow, guidance, density of the times, presets.

--objective scm       Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models
                      (Lu & Song 2024, arXiv:2410.11081), on the linear flow as in FACM's A.3(c)
    g = cos(pi t/2) (F - v - q (1-t) dF/dt)            `scm_loss`; q rises to 1: tangent warm-up
    L = e exp(-a(t)) + a(t), e = |g / (rms(g) + 0.1)|^2    a(t) is learned, `log_weight`

--objective meanflow  Mean Flows for One-step Generative Modeling (Geng et al. 2025,
                      arXiv:2505.13447), as in FACM's A.3(c)
    F(x_t, t, r) = v + (r-t) dF/dt                     `meanflow_loss`: average velocity from t to r
    L = e / (e+c)^p, e = |F - v - (r-t) dF/dt|^2       r = t for a fraction of the samples

--objective imf       Improved Mean Flows (Geng et al. 2025, arXiv:2512.02012), from scratch
    like MeanFlow, but with dF/dt along the network's own velocity F(x_t, t, t)       `imf_loss`

--objective ayf       Align Your Flow, its AYF-EMD (Sabour et al. 2025, arXiv:2506.14603)
    L = |g / (rms(g) + 0.1)|^2, g = F - v - q (r-t) dF/dt  `ayf_loss`: sCM's tangent for any end r

--objective alphaflow AlphaFlow (Zhang et al. 2025, arXiv:2510.20771)
    L = alpha e / (e+c)^p, e = |F - alpha v - (1-alpha) F(x_s, s, r)|^2 / alpha^2   `alphaflow_loss`
    with s = t + alpha (r-t), x_s = x_t + (s-t) v      alpha falls from 1 to 0.005: no derivative

Launch:
    python baselines.py                                                          # laptop: MeanFlow
    python baselines.py --objective scm                                          # laptop: sCM
    torchrun --nproc_per_node=8 baselines.py --data imagenet_latents             # 8 GPUs

Without --teacher, the script uses the teacher of flow.py in runs/flow-DATA, and trains it first if
it is missing. Results and details: docs/baselines.md. Comments mark every departure from a paper:
"paper: ...; here: ...". We had no access to the papers of iMF, AYF and AlphaFlow;
docs/baselines.md says what their losses were checked against.
"""

import copy
import functools
import math

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import facm
import models
from common import flags, processes
from common.ema import gamma_of
from common.run import launch
from common.seeds import generator, seed_of
from common.teachers import find_or_train, load_into
from facm import conditions, flow_velocity, interpolate, mean, sample_t, wide
from jvp import JVP, select

METHOD = "baselines"
OBJECTIVES = ["scm", "meanflow", "imf", "ayf", "alphaflow"]

# FACM's presets, and the steps of the tangent warm-up of sCM and AYF (FACM's A.3(c))
PRESETS = {name: preset | dict(tangent_warmup=10_000) for name, preset in facm.PRESETS.items()}
PRESETS["glyphs"]["tangent_warmup"] = PRESETS["mnist"]["tangent_warmup"] = 100         # ours


def parse_args():
    parser = flags.Parser(description="sCM, MeanFlow, iMF, AYF and AlphaFlow. The defaults of most "
                          "flags are those of FACM's preset.")
    flags.add_flags(parser, PRESETS, teacher=True)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    # The numbers after a type are the smallest and the largest value. Flags without a default have
    # that of the preset
    flag("--objective", choices=OBJECTIVES, default="meanflow", help="the method")
    flag("--P-mean", float, help="mean of ln(sigma) (FACM's Eq. 20, Table 5)")
    flag("--P-std", float, 0, help="standard deviation of ln(sigma) (FACM's Eq. 20, Table 5)")
    flag("--w", float, help="guidance scale; 1 is none (FACM's Eq. 9, Table 5)")
    flag("--t-low", float, 0, 1, help="time before which there is no guidance (FACM's Table 5)")
    flag("--jvp", choices=list(JVP), help="how dF/dt is computed: fused, in one pass with F; "
         "exact, by torch.func.jvp; fd, by a central difference (FACM's A.1)")
    flag("--c", float, 1e-9, default=1e-3, help="the constant in the adaptive weight of meanflow, "
         "imf and alphaflow")
    flag("--equal", float, 0, 1, help="fraction of samples with r = t, for all except scm (FACM's "
         "A.3(c); default: 0.75 from scratch, else 0)")
    flag("--tangent-warmup", int, 0, help="scm, ayf: steps over which the factor of dF/dt "
         "rises (FACM's A.3(c))")
    flag("--alpha-steps", int, 1, help="alphaflow: steps over which alpha falls (default: --steps)")
    flag("--label-drop", float, 0, 1, default=0.1, help="fraction of labels replaced by the null "
         "label, for a network that is trained from scratch and learns its own guidance")
    args = flags.parse(parser, METHOD, PRESETS)
    flags.check_effect(
        args,
        ("t-low", args.w != 1, "guidance, --w other than 1"),
        ("c", args.objective in ("meanflow", "imf", "alphaflow"), "--objective meanflow, imf or "
         "alphaflow"),
        ("equal", args.objective != "scm", "an --objective other than scm"),
        ("tangent-warmup", args.objective in ("scm", "ayf"), "--objective scm or ayf"),
        ("alpha-steps", args.objective == "alphaflow", "--objective alphaflow"),
        ("jvp", args.objective != "alphaflow", "an --objective other than alphaflow"),
        ("label-drop", args.teacher == "none" and not args.uncond, "--teacher none and labels"))
    if args.equal is None:
        args.equal = 0.75 if args.teacher == "none" else 0.0
    if args.objective == "alphaflow" and args.alpha_steps is None:
        args.alpha_steps = args.steps
    return args


# --------------------------------------------------------------------------------------------------
# THE METHODS. Pure functions of any shape: x1, x0, xt, v, F, ... [B, ...]; t, r [B] float; y [B]
# int64 or None. They need only torch, jvp.py and the functions of facm.py that are imported above.

def scm_loss(net, jvp, x1, x0, t, y, *, phi, warm=1.0, teacher=None, w=1.0, t_low=0.125,
             y_null=None):
    """sCM's loss, mean over the batch. warm: the factor q of dF/dt, which rises to 1; phi: see
    log_weight; the others as in facm_loss. Pixel normalisation is an option of the network."""
    xt = interpolate(x1, x0, t)
    c_cm, c_fm = conditions(t, "expanded")
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, w=w, t_low=t_low, y_null=y_null)
    F_cm, dF_dt = jvp(net, at=(xt, *c_cm, y), along=(v, 1, 0))
    g = F_cm.detach() - v - warm * wide(1 - t, v) * dF_dt                        # FACM's Eq. 11
    # paper: A.3(c) gives no weight of t; here: cos(pi t/2), because the authors' code uses it.
    g = normalised(wide(torch.cos(math.pi / 2 * t), v) * g)
    e = mean((F_cm - (F_cm.detach() - g)).square())
    a = log_weight(t, phi)
    return (e * torch.exp(-a) + a).mean()


def normalised(g):
    """The tangent g divided by its root mean square plus 0.1 (tangent normalisation)."""
    rms = mean(g.square()).sqrt()
    return g / (wide(rms, g) + 0.1)


def log_weight(t, phi):
    """a(t) [B] of sCM's adaptive weight, a sum of cosines with the learned coefficients phi [K].
    paper: does not define a(t), and the authors' code has a layer on an embedding of t; here: 8
    cosines."""
    waves = torch.cos(math.pi * t[:, None] * torch.arange(len(phi), device=t.device))
    return (waves * phi).sum(dim=1)        # not @, which is bfloat16 under autocast


def meanflow_loss(net, jvp, x1, x0, t, r, y, *, p=1.0, c=1e-3, teacher=None, w=1.0, t_low=0.125,
                  y_null=None):
    """MeanFlow's loss, mean over the batch: F(x_t, t, r) is the average velocity from t to r >= t,
    so it equals v + (r-t) dF/dt. At r = t this is flow matching. Options as in facm_loss."""
    xt = interpolate(x1, x0, t)
    _, c_fm = conditions(t, "auxiliary")
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, w=w, t_low=t_low, y_null=y_null)
    F_r, dF_dt = jvp(net, at=(xt, t, r, y), along=(v, 1, 0))
    e = mean((F_r - v - wide(r - t, v) * dF_dt).square())
    return (e / (e + c).pow(p).detach()).mean()


def imf_loss(net, jvp, x1, x0, t, r, y, *, p=1.0, c=1e-3, teacher=None, w=1.0, t_low=0.125,
             y_null=None):
    """iMF's loss, mean over the batch: MeanFlow's loss, with the derivative along the network's own
    velocity F(x_t, t, t). This velocity is the mean over all pairs (x0, x1) through x_t, while v is
    that of one pair. A teacher's v is this mean already. Options as in facm_loss."""
    xt = interpolate(x1, x0, t)
    _, c_fm = conditions(t, "auxiliary")
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, w=w, t_low=t_low, y_null=y_null)
    with torch.no_grad():
        own = net(xt, *c_fm, y)
    F_r, dF_dt = jvp(net, at=(xt, t, r, y), along=(own, 1, 0))
    e = mean((F_r - v - wide(r - t, v) * dF_dt).square())
    return (e / (e + c).pow(p).detach()).mean()


def ayf_loss(net, jvp, x1, x0, t, r, y, *, warm=1.0, teacher=None, w=1.0, t_low=0.125, y_null=None):
    """AYF-EMD's loss, mean over the batch: sCM's normalised tangent for jumps from t to any r >= t.
    warm: the factor q of dF/dt; the others as in facm_loss."""
    xt = interpolate(x1, x0, t)
    _, c_fm = conditions(t, "auxiliary")
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, w=w, t_low=t_low, y_null=y_null)
    F_r, dF_dt = jvp(net, at=(xt, t, r, y), along=(v, 1, 0))
    g = normalised(F_r.detach() - v - warm * wide(r - t, v) * dF_dt)
    return mean((F_r - (F_r.detach() - g)).square()).mean()


def alphaflow_loss(net, x1, x0, t, r, y, *, alpha, p=1.0, c=1e-3, teacher=None, w=1.0, t_low=0.125,
                   y_null=None):
    """AlphaFlow's loss, mean over the batch. The target of the jump from t to r is a step along
    v over the fraction alpha of the way, and the network's own jump over the rest. alpha is in
    (0, 1]: 1 is flow matching with F(x_t, t, r), and for alpha -> 0 the gradient becomes that of
    MeanFlow. Options as in facm_loss."""
    xt = interpolate(x1, x0, t)
    _, c_fm = conditions(t, "auxiliary")
    v = flow_velocity(net, teacher, x1, x0, xt, t, c_fm, y, w=w, t_low=t_low, y_null=y_null)
    s = t + alpha * (r - t)
    xs = xt + wide(s - t, v) * v
    # Without autocast, because the difference of the two passes would be lost in bfloat16
    with torch.autocast(xt.device.type, enabled=False):
        with torch.no_grad():
            F_s = net(xs, s, r, y)
        F_r = net(xt, t, r, y)
    target = alpha * v + (1 - alpha) * F_s
    e = mean((F_r - target).square())
    # paper's code: the weight is alpha / (e+c); here: alpha / (e + alpha^2 c) at p = 1, because
    # F - target is proportional to alpha, and the weight then becomes MeanFlow's for alpha -> 0.
    return (e / alpha / (e / alpha ** 2 + c).pow(p).detach()).mean()


def alpha_after(share):
    """AlphaFlow's alpha after a fraction of its schedule: it falls from 1 to 0.005 along a sigmoid.
    share: the fraction, from 0 to 1. paper's code: MeanFlow's loss below 0.005; here: 0.005 to the
    end, because the loss then needs no derivative."""
    alpha = 1 / (1 + math.exp(25 * (share - 0.5)))         # 25 is the slope in its authors' code
    if alpha > 0.995:
        return 1.0
    return max(alpha, 0.005)


def sample_t_r(normal, same, P_mean=-0.8, P_std=1.6):
    """Times t <= r of a jump, from standard normal numbers [2, B]; r = t where same [B] is True
    (FACM's A.3(c)). paper: does not give the parameters of their log-normal density; here: FACM's
    Eq. 20 for both times."""
    t, r = sample_t(normal, P_mean, P_std).sort(dim=0)[0]
    return t, torch.where(same, t, r)


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [K, B, ...], standard normal; y [B] labels or None; -> samples [B, ...].

@torch.no_grad()
def sample_jumps(net, noise, y, *, nfe):
    """nfe jumps from t to r along the average velocity F(x_t, t, r). K = 1."""
    xt = noise[0]
    for i in range(nfe):
        t, r = xt.new_full(xt.shape[:1], i / nfe), xt.new_full(xt.shape[:1], (i + 1) / nfe)
        xt = xt + net(xt, t, r, y) / nfe
    return xt


SAMPLERS = facm.SAMPLERS | {"jumps": sample_jumps}
DETERMINISTIC = ("euler", "jumps")  # these need one noise, K = 1, whatever the NFE


def default_sampler(nfe, args):
    """The default sampler for a method. args: the flags of the run, a dict."""
    return "cm" if args["objective"] == "scm" else "jumps"


def sampler_options(args):
    """{sampler: its options}. args: the flags of the run, a dict."""
    options = facm.sampler_options(args)
    if args["objective"] != "scm":
        options["jumps"] = {}
    return options


def preview(net, noise, args):
    """Two rows of samples at NFE 1, above two rows at NFE 2."""
    y = data.preview_labels(net, noise, args.uncond)
    name = default_sampler(1, vars(args))
    options = sampler_options(vars(args))[name]
    return torch.cat([SAMPLERS[name](net, noise, y, nfe=nfe, **options) for nfe in (1, 2)])


# --------------------------------------------------------------------------------------------------
# TRAINING.

def check(args, net):
    """Raises ValueError for flags that cannot be combined. net: the options of the network."""
    if args.w != 1 and (args.uncond or not net["num_classes"]):
        raise ValueError(f"--w {args.w}: guidance needs labels and a network with classes; use "
                         "--w 1")
    if args.objective == "scm" and args.w != 1 and args.teacher == "none":
        raise ValueError("--objective scm has no guidance from scratch; use --w 1")
    if args.objective == "ayf" and args.teacher == "none":
        raise ValueError("--objective ayf needs a teacher; leave out --teacher none")
    if args.objective == "imf" and args.teacher != "none":
        raise ValueError("--objective imf trains from scratch, because with a teacher it is "
                         "MeanFlow; use --teacher none")


def train(args, run):
    """Trains with the flags args. run (common/run.py) manages the checkpoints and the log."""
    device, rank, world = run.device, run.rank, run.world

    # Data and teacher (None with --teacher none)
    dataset = data.load_for(args)
    check(args, data.fit_network_to(dataset, args.net))    # before a teacher is trained for hours
    teacher, args.net = find_or_train(args, dataset, run)
    check(args, args.net)                  # with the teacher's network

    # Network: it starts from the teacher's weights. The weights of a second time start at zero
    args.net = args.net | dict(second_time=args.objective != "scm")
    net = models.create(**args.net, seed=seed_of(args.seed, "init"), device=device)
    net.grad_checkpoint = args.grad_checkpoint
    phi = torch.zeros(8, device=device, requires_grad=True)            # sCM's a(t)
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
    optimizer.add_param_group(dict(params=[phi]))
    run.resume(net, ema, optimizer, extra=[phi])

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
        x0_all = torch.randn(shape, generator=random, device=device)
        normal_t = torch.randn(args.batch, generator=random, device=device)
        # The second of these two is not used; without it, old runs could not be repeated
        drop_all, _ = torch.rand((2, args.batch), generator=random, device=device)
        normal_r = torch.randn(args.batch, generator=random, device=device)
        if args.objective == "scm":
            t_all = sample_t(normal_t, args.P_mean, args.P_std)
        else:
            same = torch.arange(args.batch, device=device) < args.equal * args.batch
            t_all, r_all = sample_t_r(
                torch.stack([normal_t, normal_r]), same, args.P_mean, args.P_std)

        # Accumulate the gradient over the micro-batches. With the last one, it is averaged over the
        # processes
        if hasattr(net, "force_weight_norm"):
            net.force_weight_norm()        # of EDM2's networks, before each step
        guidance = dict(w=args.w, t_low=args.t_low, y_null=net.num_classes)
        warm = min(1, (step + 1) / max(args.tangent_warmup, 1))
        total = torch.zeros((), device=device)
        for i, samples in enumerate(micro_batches):
            x1, y = run.batch(dataset, step, samples)
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
                if args.objective == "scm":
                    loss = scm_loss(model, jvp, x1, x0, t, y, phi=phi, warm=warm, teacher=teacher,
                                    **guidance)
                elif args.objective == "meanflow":
                    loss = meanflow_loss(model, jvp, x1, x0, t, r_all[samples], y, c=args.c,
                                         teacher=teacher, **guidance)
                elif args.objective == "imf":
                    loss = imf_loss(model, jvp, x1, x0, t, r_all[samples], y, c=args.c, **guidance)
                elif args.objective == "ayf":
                    # AYF's regularised warm-up ends at 0.99
                    loss = ayf_loss(model, jvp, x1, x0, t, r_all[samples], y,
                                    warm=min(warm, 0.99), teacher=teacher, **guidance)
                else:
                    alpha = alpha_after(min(1, step / args.alpha_steps))
                    loss = alphaflow_loss(model, x1, x0, t, r_all[samples], y, alpha=alpha,
                                          c=args.c, teacher=teacher, **guidance)
            share = len(y) / (args.batch // world)     # of the samples of this process
            loss = loss * share
            loss.backward()
            total += loss.detach()
        if world > 1 and phi.grad is not None:             # phi is no part of the network
            dist.all_reduce(phi.grad.div_(world))

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
        run.log(step, L_cm=total, grad_norm=grad_norm)
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
