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

import argparse
import copy
import functools
import math
import pathlib

import torch
from torch.nn.functional import cosine_similarity
from torch.nn.parallel import DistributedDataParallel

import data
import models
from common import checkpoints, flags, processes, weights
from common.ema import gamma_of
from common.messages import say_once
from common.run import Run, launch
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
        micro_batch=64,                    # ours: 24 GB
        save_every=1000,                   # ours
        xflip=True,
        uncond=True,
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
        ema_sigma=0.2,                     # the authors' code
        precision="bf16",                  # the authors' code
        micro_batch=32,                    # ours: 80 GB
        save_every=5000,                   # ours
        net=dict(name="LightningDiT-XL/1", qknorm=True),
        times="uniform",                   # the authors' code
        P_mean=-0.8,                       # without effect
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
    if v.shape[1] == 1:                    # one channel has no direction: the whole sample's
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
DETERMINISTIC = ("euler", "heun")          # noise of K = 1 is enough, whatever the NFE


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
    y = torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)
    rows = [integrate(net, noise, y, nfe=20)]
    if net.num_classes:
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
    gamma = gamma_of(args.ema_sigma)

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
        # Learning rate: it rises linearly, then falls linearly to lr_final
        rise = min(1, (step + 1) / max(args.warmup, 1))
        fall = 1 - (1 - args.lr_final) * step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(rise, fall)

        # Draw noise and times for the whole batch. They depend only on the seed and the step, not
        # on the number of processes or micro-batches
        random = generator(device, args.seed, "step", step)
        x0_all = torch.randn(shape, generator=random, device=device)
        normal = torch.randn(args.batch, generator=random, device=device)
        t_all = sample_t(normal, args.times, args.P_mean, args.P_std)
        drop_all = torch.rand(args.batch, generator=random, device=device) < args.label_drop
        mixed_all = torch.rand(args.batch, generator=random, device=device) < 0.5
        if not net.expandable:             # it cannot tell t from 2 - t
            mixed_all = torch.zeros_like(mixed_all)

        # Accumulate the gradient over the micro-batches. With the last one, it is averaged over the
        # processes. EDM2's networks normalise their weights first
        if hasattr(net, "force_weight_norm"):
            net.force_weight_norm()
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
            loss = L_fm * (len(y) / (args.batch // world))
            loss.backward()
            total += loss.detach()

        # Clip, step, and update the average of the weights (EDM2's power function). A step whose
        # gradient is not finite is skipped
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        if args.fsdp:
            grad_norm = grad_norm.full_tensor()
        if grad_norm.isfinite():
            optimizer.step()
            beta = (1 - 1 / (step + 1)) ** (gamma + 1)
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
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


# --------------------------------------------------------------------------------------------------
# FOR STUDENTS: the teacher of a run of another script.

# The flags that a student's run shares with the run of its default teacher
SHARED = ("data", "data_dir", "resolution", "num_classes", "uncond", "xflip", "channels",
          "skip_broken", "net", "net_given")
MACHINE = ("device", "micro_batch", "precision", "compile", "fsdp", "grad_checkpoint")


def find_or_train(args, dataset, run):
    """The teacher of a student's run, frozen, and the options of the student's network.

    args.teacher: a checkpoint; "none" for no teacher; or None for runs/flow-DATA/ckpt.pt, which is
    first trained in the same processes, unless its training is finished. Raises ValueError if the
    teacher does not fit the data or the flag --net.
    """
    if args.teacher == "none":
        return None, data.fit_network_to(dataset, args.net)
    path = pathlib.Path(args.teacher) if args.teacher else default_teacher(args, dataset, run)
    if path.is_dir():
        path = path / "ckpt.pt"
    if args.dry_run and args.teacher is None and not path.exists():
        options = data.fit_network_to(dataset, args.net)
        return models.create(**options).eval().requires_grad_(False), options
    say_if_unfinished(path)
    start, options = weights.read_start(path, args)
    options = data.fit_network_to(dataset, options)
    teacher = models.create(**options, device=run.device)
    checkpoints.load_weights(teacher, start, path)
    args.teacher_id = checkpoints.fingerprint(path)
    return teacher.eval().requires_grad_(False), options


def load_into(net, teacher):
    """Copies the teacher's weights into its student. A student may have a second time that its
    teacher lacks, and keeps its weights for it. Raises ValueError if other weights are missing."""
    checkpoints.load_weights(net, teacher.state_dict(), "the teacher", weights.MAY_BEGIN_ANEW)


def default_teacher(args, dataset, run):
    """Trains the default teacher unless it is finished, and returns the path of its checkpoint."""
    own = parse_args(["--preset", args.preset, "--data", args.data])
    path = pathlib.Path(own.out) / "ckpt.pt"
    finished = False
    if path.exists():
        checkpoint = checkpoints.read(path)
        finished = checkpoint["step"] >= checkpoint["args"]["steps"]
        own = argparse.Namespace(**vars(own) | checkpoint["args"])
        if checkpoint["method"] != METHOD:
            raise ValueError(f"{path} is a run of {checkpoint['method']}.py, which cannot be a "
                             "teacher; name a run of flow.py by --teacher")
        different = weights.first_difference(own.net, data.fit_network_to(dataset, args.net))
        if different:
            key, held, expected = different
            raise ValueError(f"{path} has a network with {key}={held}, and this run {key}="
                             f"{expected}; use --net {key}={held}, or train another teacher with "
                             "flow.py --out and name it by --teacher")
        del checkpoint                     # Windows does not replace a file that is mapped
        if not (args.dry_run or args.skip_broken) and own.samples != args.samples:
            raise ValueError(f"{path} was trained on other data, {own.samples}, not "
                             f"{args.samples}; name a teacher by --teacher, or train one with "
                             "flow.py --out")
    else:
        for name in SHARED:
            setattr(own, name, getattr(args, name))
    if finished or args.dry_run:
        return path
    for name in MACHINE:
        setattr(own, name, getattr(args, name))
    own.data, own.data_dir, own.fresh, own.dry_run = args.data, args.data_dir, False, None
    own.out = str(path.parent)             # also if the folder was moved
    own.vae, own.tensorboard = args.vae, args.tensorboard
    own.eval_every = None                  # evaluations are those of the student
    run.prepare(dataset.shape)             # a mistake there is reported before the teacher's hours
    processes.barrier()                    # all have read it before it is written
    Run(own, METHOD, run.device, run.rank, run.world, announcement=f"the teacher, {path}, is not "
        "finished: it is trained first, as by flow.py").call(train)
    processes.barrier()
    return path


def say_if_unfinished(path):
    """Prints a line if a checkpoint of this script has not reached its last step."""
    checkpoint = checkpoints.read_if_ours(path)
    if checkpoint and checkpoint["method"] == METHOD:
        step, steps = checkpoint["step"], checkpoint["args"]["steps"]
        if step < steps:
            say_once(f"the teacher, {path}, is not finished: it has {step} of {steps} steps")


if __name__ == "__main__":
    main()
