"""--dry-run [PROCESSES] of the training scripts: estimates what a run needs, without data or GPU.

One step of the script's own training function, or two if they differ, runs on fake tensors, which
have shapes but no values, so the figures follow the code. The memory is the highest sum of the
tensors that exist at the same time. It does not include the reserve of the allocator, CUDA's
context (about 0.5 GiB) and NCCL's buffers.
"""

import collections
import copy
import gc
import math
import warnings
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from common.processes import split_batch
from common.run import Run

GIB = 2 ** 30
SHARE = 0.4                                # the part of the peak rate that is reached
H100 = {"bf16": 989e12, "tf32": 495e12, "float32": 67e12}              # dense FLOPs a second


class FakeTensors(FakeTensorMode):
    """Makes all tensors fake. A copy of a network shares the mode of the original."""

    def __deepcopy__(self, memo):
        return self


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, and their maximum, and the floating-point
    operations for each dtype. Fake tensors have no values, so a question such as "is the gradient
    finite?" is answered with yes."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.flops = collections.Counter() # {dtype: operations}
        self.collected = math.inf          # the bytes at the last collection of garbage
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            return True
        result = func(*args, **(kwargs or {}))
        operations = flop_registry.get(func.overloadpacket)        # PyTorch's formula for the FLOPs
        if operations:
            self.flops[args[0].dtype] += operations(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        """Counts a storage, unless it is known, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        weakref.finalize(storage, self.forget, key, size)
        self.now += size
        if self.now > 1.05 * self.collected:               # fake tensors form reference cycles
            gc.collect()
            self.collected = max(self.collected, self.now)
        self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        """Subtracts a storage that was freed."""
        self.known.discard(key)
        self.now -= size


def size(tensors):
    """The bytes of tensors."""
    return sum(a.numel() * a.element_size() for a in tensors)


class DryRun(Run):
    """A run of steps with one micro-batch in one process. It has no run folder, and measures memory
    and work."""

    def __init__(self, args, method, meter):
        super().__init__(args, method, torch.device("cpu"), rank=0, world=1)
        self.meter = meter
        self.passes = 0                    # the bytes that forward and backward pass need
        self.work = []                     # {dtype: operations} of each step

    def open_folder(self):
        """Opens no folder."""

    def close(self):
        """Closes nothing."""

    def resume(self, net, ema, optimizer, extra=()):
        """Counts memory and work from here on, where the networks exist."""
        self.net, self.ema, self.optimizer, self.extra = net, ema, optimizer, extra
        self.begun = True
        gc.freeze()                        # later collections skip the objects that exist now
        meter = self.meter
        self.networks = self.base = meter.now
        meter.peak = meter.collected = meter.now
        meter.flops.clear()
        optimizer.register_step_pre_hook(self.after_passes)
        optimizer.register_step_post_hook(self.after_update)

    def after_passes(self, *_):
        """Notes the memory of the forward and backward passes, before an update."""
        self.passes = max(self.passes, self.meter.peak - self.base)

    def after_update(self, *_):
        """Prepares for a second update of the step, which begins with the state of the optimiser in
        memory."""
        gradient = size(p.grad for p in self.net.parameters() if p.grad is not None)
        self.base = self.meter.now - gradient
        self.meter.peak = self.meter.now

    def log(self, step, **figures):
        """Notes the work of a step."""
        self.work.append(dict(self.meter.flops))
        self.meter.flops.clear()

    def preview_is_due(self):
        """Returns False: a dry run has no previews."""
        return False

    def evaluation_is_due(self):
        """Returns False: a dry run has no evaluations."""
        return False

    def save(self):
        """Saves nothing."""


def report(train, method, args):
    """Runs train(args, run) for a step on fake tensors and prints what the run needs. A script with
    a second update in every freq-th step runs for two steps, one with it and one without."""
    fake, meter = FakeTensors(), Meter()
    freq = getattr(args, "freq", 1) if "n2n" in getattr(args, "objectives", ()) else 1
    slices = split_batch(args.batch, 0, args.dry_run, args.micro_batch, getattr(args, "group", 1))
    one = copy.copy(args)
    one.steps, one.batch, one.micro_batch = min(freq, 2), slices[0].stop - slices[0].start, None
    one.compile = one.fsdp = False
    run = DryRun(one, method, meter)
    with fake, meter, warnings.catch_warnings():
        # Copying a network reads the addresses of its parameters, which do not matter here
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        run.call(train)
    first, other = run.work[0], run.work[-1]
    work = {dtype: (first[dtype] + (freq - 1) * other.get(dtype, 0)) / freq for dtype in first}
    print_report(args, run, one, len(slices), work)


def print_report(args, run, one, count, work):
    """Prints the figures. one: the flags of the step; count: the number of micro-batches; work:
    {dtype: operations} of a micro-batch, the mean over the steps."""
    world = args.dry_run
    moments = size(a for entry in run.optimizer.state.values() for a in entry.values()
                   if torch.is_tensor(a))
    gradient = size(p for p in run.net.parameters() if p.requires_grad)
    passes = run.passes
    if count > 1:                          # the gradient is kept between micro-batches
        passes += gradient
    kept = run.networks + moments
    buckets = ""
    if args.fsdp:                          # gradients are sharded, and one block is gathered
        blocks = [size(m.parameters()) for m in run.net.modules() if m is not run.net]
        passes += 2 * max(b for b in blocks if b < gradient) - gradient * (1 - 1 / world)
        kept = kept / world
    elif world > 1:
        kept += gradient
        buckets = ", buckets of DDP"
    rates = {torch.bfloat16: H100["bf16"], torch.float32: H100["float32"]}
    if args.precision == "tf32":
        rates[torch.float32] = H100["tf32"]
    flops = sum(work.values()) * count * world
    seconds = sum(work[dtype] / rates[dtype] for dtype in work) * count / SHARE    # of a step
    kinds = f"{args.precision} rate"
    share = work.get(torch.float32, 0) / sum(work.values())
    if args.precision == "bf16" and share > 0.01:
        kinds = f"bf16 and float32 rates ({share:.0%} of the work is in float32)"
    parameters = sum(p.numel() for p in run.net.parameters())
    hidden = ("dry_run", "given", "net", "net_given", "out")
    options = " ".join(f"{k}={v}" for k, v in sorted(vars(args).items())
                       if v is not None and k not in hidden)
    print(f"{run.method}.py, {args.data}, {world} processes, fake tensors of PyTorch "
          f"{torch.__version__}")
    for name, text in (
            ("options", f"{options} net={one.net}"),
            ("parameters", f"{parameters / 1e6:.1f} M"),
            ("images", f"{args.batch} in a step, {args.batch // world} of a process, {one.batch} "
             "in a micro-batch"),
            ("memory", f"{(kept + passes) / GIB:.3g} GiB a process: {kept / GIB:.3g} kept "
             f"(weights, EMA, teacher, optimiser{buckets}), {passes / GIB:.3g} in the passes "
             "(activations, gradient)"),
            ("work", f"{flops / 1e12:.4g} TFLOP a step; {args.batch / seconds:.4g} images/s at "
             f"{SHARE:.0%} of an H100's {kinds}"),
            ("time", f"{args.steps * seconds / 3600:.4g} hours for {args.steps:,} steps at this "
             "rate")):
        print(f"{name:12}{text}")
