"""What a run will take, without data or GPU: --dry-run [PROCESSES] of the training scripts.

One step of the script's own loop runs on fake tensors, which have shapes and no content, so that
the figures follow the code. Memory is the sum of the living tensors at its highest; the allocator's
own reserve, CUDA's context (about 0.5 GiB) and NCCL's buffers come on top.
"""

import copy
import gc
import math
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import run

GIB = 2 ** 30
SHARE = 0.4                                # of a GPU's rate, which well-run training reaches
H100 = {"bf16": 989e12, "tf32": 495e12, "float32": 67e12}              # dense FLOPs a second


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of the living tensors: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.collected = math.inf          # the bytes at the last collection of garbage
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        """Counts a storage, unless it is known, until it dies."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        weakref.finalize(storage, self.forget, key, size)
        self.now += size
        if self.now > 1.05 * self.collected:               # fake tensors hold each other
            gc.collect()
            self.collected = max(self.collected, self.now)
        self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        """A storage has died."""
        self.known.discard(key)
        self.now -= size


def size(tensors):
    """The bytes of tensors."""
    return sum(a.numel() * a.element_size() for a in tensors)


class NoData:
    """Replaces a data set: zeros in the shape of the preset's data."""

    def __init__(self, args):
        grey = args.preset == "mnist"
        side = args.resolution or (28 if grey else 32)
        shape = (1 if grey else 3, side, side)
        if args.preset == "imagenet_latents":              # the VA-VAE's, or the SD-VAE's
            light = args.net["name"].startswith("LightningDiT")
            shape = (32, 16, 16) if light else (4, 32, 32)
        classes = 1000 if args.preset.startswith("imagenet") else 10
        self.shape, self.num_classes = shape, 0 if args.uncond else args.num_classes or classes

    def batch(self, seed, first, batch, rows=slice(None)):
        """Images float32 [B, C, H, W] and labels int64 [B] of a batch's rows."""
        n = len(range(batch)[rows])
        return torch.zeros((n, *self.shape)), torch.zeros(n, dtype=torch.int64)


class DryRun(run.Run):
    """A run that stands before the first step of its method (of its pretraining, if --steps is 0)
    and ends after it, with a report. It writes no file."""

    def __init__(self, args, method, stage_name=None):
        super().__init__(args, method, stage_name)
        self.device, self.rank, self.world = torch.device("cpu"), 0, args.dry_run
        self.step = args.pretrain if args.steps else 0
        torch.nn.Module.to = lambda net, *_, **__: net     # it fails on fake parameters
        self.fake, self.living = FakeTensorMode(), LivingBytes()
        self.flops = FlopCounterMode(display=False)
        self.fake.__enter__()
        self.living.__enter__()

    def open_folder(self):
        """A dry run has none."""

    def teacher_path(self):
        """--teacher, whose file need not exist."""
        return self.args.teacher

    def end_pretraining(self):
        """The name of the teacher that a first stage would have left."""
        return "teacher.pt"

    def resume(self, net, shard, extra=()):
        """As Run's, from the beginning; neither sharded nor in processes."""
        self.net, self.trained, self.extra, self.signals = net, net, extra, []
        self.ema = copy.deepcopy(net, {id(self.fake): self.fake}).eval().requires_grad_(False)
        net.grad_checkpoint = self.args.grad_checkpoint
        self.new_optimizer()

    def pieces(self, batch, multiple=1):
        """The first piece alone: the others are like it."""
        pieces = super().pieces(batch, multiple)
        self.count, self.images = len(pieces), pieces[0][0].stop - pieces[0][0].start
        return pieces[:1]

    def stage(self):
        """As Run's; from here on memory and FLOPs are counted."""
        gc.freeze()                        # what is there now need not be looked at again
        self.before = self.living.peak = self.living.collected = self.living.now
        self.flops.__enter__()
        return super().stage()

    def clip_gradient(self):
        """As Run's; the passes of the step are over."""
        self.passes = self.living.peak - self.before       # what a forward and backward pass add
        return super().clip_gradient()

    def after_step(self, stage, figures):
        """Reports and ends the program."""
        for mode in (self.flops, self.living, self.fake):
            mode.__exit__(None, None, None)
        self.report(stage)
        sys.exit(0)

    def report(self, stage):
        """Prints the figures, a line each."""
        args, states = self.args, self.optimizer.state.values()
        moments = size(a for entry in states for a in entry.values() if torch.is_tensor(a))
        gradient = size(p for p in self.net.parameters() if p.requires_grad)
        networks = self.before
        passes = self.passes + (self.count > 1) * gradient         # they are kept between pieces
        shared = self.world if args.fsdp else 1
        buckets = gradient if self.world > 1 and not args.fsdp else 0
        kept = (networks + moments) / shared + buckets
        if args.fsdp:                                      # gradients in parts, one block gathered
            blocks = [size(m.parameters()) for m in self.net.modules() if m is not self.net]
            passes += 2 * max(b for b in blocks if b < gradient) - gradient * (1 - 1 / shared)
        flops = self.flops.get_total_flops() * self.count * self.world
        rate = self.world * SHARE * H100[args.precision]
        steps = args.pretrain if stage.name == "pretrain" else args.steps
        count = sum(p.numel() for p in self.net.parameters())
        print(f"{self.method}.py, {args.data}, stage {stage.name}, {self.world} processes, fake "
              f"tensors of PyTorch {torch.__version__}")
        for name, text in (
                ("options", " ".join(f"{k}={v}" for k, v in sorted(vars(args).items())
                                     if v is not None and k not in ("dry_run", "out"))),
                ("parameters", f"{count / 1e6:.1f} M"),
                ("images", f"{stage.batch} a step, {stage.batch // self.world} a process, "
                 f"{self.images} at once"),
                ("memory", f"{(kept + passes) / GIB:.3g} GiB a process: {kept / GIB:.3g} kept "
                 f"(weights, EMA, teacher, optimiser{', buckets of DDP' if buckets else ''}), "
                 f"{passes / GIB:.3g} in the passes (activations, gradient)"),
                ("work", f"{flops / 1e12:.4g} TFLOP a step; {rate * stage.batch / flops:.4g} "
                 f"images/s at {SHARE:.0%} of an H100's {args.precision} rate"),
                ("time", f"{steps * flops / rate / 3600:.4g} hours for {steps:,} steps at this "
                 "rate")):
            print(f"{name:12}{text}")
