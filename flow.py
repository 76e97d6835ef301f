"""Flow matching (Lipman et al. 2023, Liu et al. 2023): the teacher of the other scripts.

DIRECTION OF TIME: t=0 noise, t=1 data. x_t = (1-t) x_0 + t x_1, x_0 ~ N(0, I), x_1 data.
The network learns the velocity v(x_t, t) of the flow that turns noise into data. Many small steps
along it draw a sample. FACM, DE-CM and the baselines distil it into a network that needs one step.

    L     = |F(x_t, t) - (x_1 - x_0)|^2                   `flow_loss`                FACM's Eq. 1
            and, on ImageNet, plus 1 - cos(F, x_1 - x_0), as in the code of FACM's authors
    dx/dt = v(x_t, t), guided: v_uncond + w (v_cond - v_uncond)    `integrate`       FACM's Eq. 9

Half of the samples are trained at the time 2 - t instead of t. The network has to predict the same
velocity there. FACM's students use these times for their anchor (FACM A.3(a)).

    x1, x0, xt, t   x_1, x_0, x_t, t        mixed   which samples are trained at 2 - t

Launch:
    python flow.py                                               # laptop
    python flow.py --data cifar10                                # 1 GPU
    torchrun --nproc_per_node=8 flow.py --data imagenet_latents  # 8 GPUs

The other scripts use the teacher in runs/flow-DATA/ckpt.pt, and train it first if it is missing.
Results and details: docs/flow.md.
"""

import copy
import functools
import math

import torch
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

import data
import models
from common import checkpoints, flags, processes, weights
from common.ema import gamma_of
from common.run import launch
from common.seeds import generator, seed_of

METHOD = "flow"

# The presets, one for each data set. A flag on the command line overrides its value. FACM's paper
# says little about its teachers: values without a comment are those of its students (Table 5).
PRESETS = {
    "glyphs": dict(                        # ours
        resolution=16,
        steps=2000,
        batch=16,
        lr=8e-3,
        lr_final=0.0,
        warmup=200,
        betas=(0.9, 0.99),
        ema_sigma=0.1,
        net=dict(
            name="DDPM++", width=32, mult=(1, 1, 2), blocks=1, attention=(), sigma_data=0.6,
            adaptive_scale=True, time_scale=8.0),
        times="arctan",
        P_mean=0.0,
        P_std=1.2,
        cosine=0.0,
    ),
    "cifar10": dict(
        resolution=32,
        steps=400_000,                     # ours
        batch=128,
        lr=1e-4,
        lr_final=1.0,
        warmup=1000,                       # ours
        betas=(0.9, 0.995),
        ema_sigma=0.2,
        precision="tf32",                  # ours
        micro_batch=64,                    # ours: fits a GPU of 24 GB
        save_every=1000,                   # ours
        xflip=True,                        # ours
        uncond=True,
        # sigma_data is ours: Table 5 says "Simple-EDM", which the paper does not define
        net=dict(name="DDPM++", dropout=0.1, sigma_data=0.5),
        times="arctan",
        P_mean=-1.0,
        P_std=1.4,
        cosine=0.0,
    ),
    "imagenet_latents": dict(
        steps=1_001_000,                   # 800 epochs (Table 3)
        batch=1024,
        lr=2e-4,                           # the authors' code
        lr_final=1.0,
        warmup=1000,                       # ours
        betas=(0.9, 0.95),                 # the authors' code
        ema_sigma=0.2,
        precision="bf16",                  # the authors' code
        micro_batch=32,                    # ours: fits a GPU of 80 GB
        save_every=5000,                   # ours
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        times="uniform",                   # the authors' code
        P_mean=-0.8,                       # used only with --times arctan, as P_std
        P_std=1.6,
        cosine=1.0,                        # the authors' code
    ),
}
PRESETS["mnist"] = PRESETS["glyphs"] | dict(               # ours
    resolution=None, batch=32, net=PRESETS["glyphs"]["net"] | dict(width=16, mult=(1, 2, 4)))


def parse_args(argv=None):
    parser = flags.Parser(description="Flow matching, which trains a teacher. The defaults of most "
                          "flags are those of the preset.")
    flags.add_flags(parser, PRESETS)
    flag = functools.partial(flags.flag, parser.add_argument_group("method"))
    # The numbers after a type are the smallest and the largest value. Flags without a default have
    # that of the preset
    flag("--init", metavar="FILE", help="checkpoint of a velocity network to start from, of "
         "flow.py or public; training teaches it the times from 1 to 2 as well")
    flag("--times", choices=["arctan", "uniform"], help="how t is drawn: as in FACM's Eq. 20, or "
         "uniformly, as in the code of FACM's authors")
    flag("--P-mean", float, help="mean of ln(sigma), where t = 1 - 2/pi atan(sigma), for "
         "--times arctan (FACM's Eq. 20)")
    flag("--P-std", float, 0, help="standard deviation of ln(sigma) (FACM's Eq. 20)")
    flag("--cosine", float, 0, help="weight of 1 - cos(F, x_1 - x_0) in the loss")
    flag("--label-drop", float, 0, 1, default=0.1, help="fraction of labels replaced by the null "
         "label, which guidance needs")
    args = flags.parse(parser, METHOD, PRESETS, argv)
    flags.check_effect(
        args,
        ("P-mean P-std", args.times == "arctan", "--times arctan"),
        ("label-drop", not args.uncond, "labels, without --uncond"),
        ("weights", args.init, "--init"))
    return args


# --------------------------------------------------------------------------------------------------
# THE METHOD. Pure functions of any shape: x1, x0, ... [B, ...]; t [B] float; y [B] int64 or None.

def flow_loss(net, x1, x0, t, y, *, mixed=None, cosine=0.0):
    """Mean squared error of the velocity (FACM's Eq. 1), mean over the batch and the elements.

    net        any callable net(x, t, s, y), called with s=None; under DDP, the DDP wrapper
    x1, x0, t, y   data, noise, times in [0, 1], labels or None
    mixed      bool [B] or None: the samples that are trained at 2 - t instead of t (A.3(a))
    cosine     weight of the cosine distance that is added: over the channels of a pixel, averaged
               over the pixels, as in facm.fm_loss
    """
    xt = wide(1 - t, x0) * x0 + wide(t, x1) * x1
    time = t if mixed is None else torch.where(mixed, 2 - t, t)
    F, v = net(xt, time, None, y), x1 - x0
    mse = (F - v).square().mean()                                      # FACM's Eq. 1
    if cosine == 0:
        return mse
    if v.shape[1] == 1:                    # a single channel has no direction: whole samples
        F, v = F.flatten(1), v.flatten(1)
    return mse + cosine * (1 - cosine_similarity(F, v, dim=1).mean())


def wide(t, x):
    """t [B], reshaped to as many dimensions as x, so that it broadcasts over the samples."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def sample_t(normal, times="arctan", P_mean=0.0, P_std=1.2):
    """Times in (0, 1), uniform or as in FACM's Eq. 20. normal: standard normal numbers [B]."""
    if times == "uniform":
        return torch.special.ndtr(normal)  # the normal distribution function
    sigma = torch.exp(P_mean + P_std * normal)
    return 1 - 2 / math.pi * torch.atan(sigma)


# --------------------------------------------------------------------------------------------------
# SAMPLERS. noise [1, B, ...], standard normal; y [B] labels or None; -> samples [B, ...].

@torch.no_grad()
def integrate(net, noise, y, *, nfe, cfg=1.0, cfg_interval=(0.0, 1.0), cfg_channels=None,
              y_null=None, shift=1.0, heun=False):
    """Integrates the velocity net(x, t, None, y) from noise to data, by Euler's or Heun's method.

    nfe           evaluations of the velocity. Heun's method needs two in each step and one in the
                  last step, as in EDM, so nfe is odd
    cfg           guidance: v_uncond + cfg (v_cond - v_uncond) at the times in cfg_interval, in the
                  first cfg_channels channels (None: in all of them); y_null is the null label
    shift         equal steps in u become the times shift u / (1 + (shift-1) u); for shift
                  below 1, steps are shorter near the noise. LightningDiT's timestep_shift is the
                  same number, and SD3's alpha is 1 / shift (Esser et al. 2024, Eq. 23, where
                  sigma = 1-t)

    Raises ValueError for an even nfe with Heun's method, and for guidance without y or y_null.
    """
    if cfg != 1 and (y is None or y_null is None):
        raise ValueError("guidance (cfg other than 1) needs the labels y and the null label y_null")
    if heun and nfe % 2 == 0:
        raise ValueError(f"Heun's method needs an odd nfe, not {nfe}")

    def velocity(x, t):
        time = x.new_full(x.shape[:1], t)
        if cfg == 1 or not cfg_interval[0] <= t <= cfg_interval[1]:
            return net(x, time, None, y)
        null = torch.full_like(y, y_null)
        both = net(torch.cat([x, x]), torch.cat([time, time]), None, torch.cat([y, null]))
        v_cond, v_uncond = both.chunk(2)
        v = v_uncond + cfg * (v_cond - v_uncond)                       # FACM's Eq. 9
        if cfg_channels is None:
            return v
        return torch.cat([v[:, :cfg_channels], v_cond[:, cfg_channels:]], dim=1)

    steps = (nfe + 1) // 2 if heun else nfe
    us = [i / steps for i in range(steps + 1)]
    times = [shift * u / (1 + (shift - 1) * u) for u in us]
    xt = noise[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        per_time = 1 / (t_next - t)        # a division, so that equal steps round as v / nfe does
        v = velocity(xt, t)
        if heun and i + 1 < steps:
            v = (v + velocity(xt + v / per_time, t_next)) / 2
        xt = xt + v / per_time
    return xt


SAMPLERS = {"euler": integrate, "heun": functools.partial(integrate, heun=True)}
DETERMINISTIC = ("euler", "heun")  # these need one noise, K = 1, whatever the NFE


def default_sampler(nfe, args):
    """The default sampler, which is the same for all NFEs."""
    return "euler"


def sampler_options(args):
    """{sampler: its options} for a network. args: the flags it was trained with, a dict. Teachers
    that earlier versions of facm.py trained are guided from its --t-low on."""
    options = dict(y_null=args["net"].get("num_classes", 0),
                   cfg_interval=(args.get("t_low", 0.0), 1.0))
    return {name: options for name in SAMPLERS}


def preview(net, noise, args):
    """Two rows of samples in 20 Euler steps, above two rows with FACM's guidance for ImageNet."""
    y = data.preview_labels(net, noise, args.uncond)
    rows = [integrate(net, noise, y, nfe=20)]
    if net.num_classes and not args.uncond:
        rows.append(integrate(net, noise, y, nfe=20, y_null=net.num_classes, cfg=1.75,
                              cfg_interval=(0.125, 1.0)))
    return torch.cat(rows)


# --------------------------------------------------------------------------------------------------
# TRAINING.

def train(args, run):
    """Trains with the flags args. run (common/run.py) manages the checkpoints and the log."""
    device, rank, world = run.device, run.rank, run.world

    # Data, network and its average
    dataset = data.load_for(args)
    if args.init:
        start, args.net = weights.read_start(args.init, args)
    args.net = data.fit_network_to(dataset, args.net)
    net = models.create(**args.net, seed=seed_of(args.seed, "init"), device=device)
    net.grad_checkpoint = args.grad_checkpoint
    if args.init:
        checkpoints.load_weights(net, start, args.init)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema_gamma = gamma_of(args.ema_sigma)   # the exponent of EDM2's average

    # The micro-batches of this process, the optimiser, and the newest checkpoint
    micro_batches = processes.split_batch(args.batch, rank, world, args.micro_batch)
    if args.fsdp:
        models.shard(net)
        models.shard(ema)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=args.betas,
                                  weight_decay=args.weight_decay, fused=device.type != "mps")
    run.resume(net, ema, optimizer)

    # The network as the loss calls it: compiled, and wrapped in DDP
    model = net
    if args.compile:
        model = torch.compile(net)
    if world > 1 and not args.fsdp:
        model = DistributedDataParallel(model, broadcast_buffers=False)
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
        normal = torch.randn(args.batch, generator=random, device=device)
        t_all = sample_t(normal, args.times, args.P_mean, args.P_std)
        drop_all = torch.rand(args.batch, generator=random, device=device) < args.label_drop
        mixed_all = torch.rand(args.batch, generator=random, device=device) < 0.5
        if not net.expandable:             # for this network, t and 2 - t are the same time
            mixed_all = torch.zeros_like(mixed_all)

        # Accumulate the gradient over the micro-batches. With the last one, it is averaged over the
        # processes
        if hasattr(net, "force_weight_norm"):
            net.force_weight_norm()        # of EDM2's networks, before each step
        total = torch.zeros((), device=device)
        for i, samples in enumerate(micro_batches):
            x1, y = run.batch(dataset, step, samples)
            y = torch.where(drop_all[samples], net.num_classes, y)
            models.seed_dropout(net, seed_of(args.seed, "dropout", step, rank, i), rows=len(y))
            last = i == len(micro_batches) - 1
            if args.fsdp:
                net.set_requires_gradient_sync(last)
            elif world > 1:
                model.require_backward_grad_sync = last                # what DDP's no_sync() sets
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                L_fm = flow_loss(model, x1, x0_all[samples], t_all[samples], y,
                                 mixed=mixed_all[samples], cosine=args.cosine)
            share = len(y) / (args.batch // world)     # of the samples of this process
            loss = L_fm * share
            loss.backward()
            total += loss.detach()

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
        run.log(step, L_fm=total, grad_norm=grad_norm)
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
