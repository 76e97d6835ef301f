"""Processes: the device, the processes of torchrun, the part of the batch that each of them has,
and how a program ends."""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import sys
import warnings

import torch
import torch.distributed as dist

from common import folders, torchrun
from common.messages import fail

# --------------------------------------------------------------------------------------------------
# Beginning and end of a program.

def start(device, compile=False, precision=None):
    """Joins the other processes if torchrun started this one, with NCCL on CUDA, and with gloo on
    the CPU and where NCCL is not available.

    device: "cpu", "cuda", "cuda:N", "mps", or None for CUDA if there is a GPU and else the CPU.
    Returns (device, rank, world). Ends the program with one line if the device does not exist.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        fail(f"--device {device}: choose cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: there is no Apple GPU here; use --device cpu")
    if device.type == "mps" and (compile or precision not in (None, "float32")):
        fail("--device mps needs --precision float32, and runs without --compile")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {device}: there is no such CUDA GPU here; use --device cpu")
    local = torchrun.local_rank()
    if device.type == "cuda" and local >= torch.cuda.device_count():
        fail(f"process {local} has no GPU of its own; start {torch.cuda.device_count()} processes",
             always=True)
    set_globals(device, compile, precision)
    if not torchrun.started():
        return device, 0, 1
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if dist.is_nccl_available():       # not on Windows
            backend = "nccl"
    try:
        # Processes may finish their parts of the samples or the images many minutes apart
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        fail(f"process {torchrun.rank()} cannot join the others ({reason[:200]}); is the port of "
             "MASTER_PORT in use, or another process not started?", always=True)
    return device, dist.get_rank(), dist.get_world_size()


def set_globals(device, compile=False, precision=None):
    """Makes all settings of this project that are global to the process. Ctrl-C then ends the
    program with one line.

    compile: Dynamo does not split graphs at DDP's buckets, because that loses gradients of a fused
    pass. precision: "tf32" switches TF32 on, another value switches it off, and None does not
    change PyTorch's setting.
    """
    def report(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
    warnings.filterwarnings("ignore", message="`broadcast_buffers`")   # renamed after torch 2.11
    if compile:
        torch._dynamo.config.optimize_ddp = False
    if precision:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory():
    """Lets glibc keep freed memory, because new pages cost a tenth or more of a training step on a
    CPU. Does nothing with another C library."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3   # glibc's names for the three options
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2 ** 31 - 1)
        mallopt(top_pad, 2 ** 26)
        mallopt(mmap_threshold, 2 ** 25)


def barrier():
    """Waits for all processes. If one of them has ended with an error, the others end as well."""
    try:
        if dist.is_initialized():
            dist.barrier()
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        print(f"process {dist.get_rank()}: another process is gone ({reason})", file=sys.stderr)
        sys.exit(2)


def from_first(compute):
    """What compute() returns on process 0, on all processes. Only process 0 calls it, because other
    computers may see new files late. Its ValueError is raised on all processes."""
    found = [None, None]                   # the value, the text of an error
    if torchrun.rank() == 0:
        try:
            found[0] = compute()
        except ValueError as e:
            found[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[1]:
        raise_on_all(found[1])
    return found[0]


def raise_on_all(text):
    """Raises a ValueError that all processes raise, see leave_with."""
    error = ValueError(text)
    error.on_all_processes = True
    raise error


def same_everywhere(value):
    """Whether all processes have the same value."""
    if not dist.is_initialized():
        return True
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


def end():
    """Leaves the process group, together with the other processes, because a process that leaves
    alone may crash."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_with(error):
    """Leaves the process group, together with the other processes, if they all have this error."""
    if getattr(error, "on_all_processes", False):
        end()


def program(advice):
    """Decorates the main function of a program. If memory runs out or numbers are not finite, the
    program ends with one line and exit code 2. At the end it releases the folders that it owns.

    advice: the end of the line that is printed when memory runs out, after PyTorch's message.
    """
    def decorate(main):
        @functools.wraps(main)
        def wrapped(*args):
            try:
                main(*args)
            except FloatingPointError as e:
                fail(e, always=True)
            except BrokenPipeError:        # as in `... | head -1`, which closes the pipe
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except (MemoryError, RuntimeError) as e:
                if not is_out_of_memory(e):
                    raise
                words = " ".join(str(e).split("\n")[0].split("Allocator: ")[-1].split())
                fail(f"out of memory ({words[:200]}); {advice}", always=True)
            finally:
                folders.disown_all()
        return wrapped
    return decorate


def is_out_of_memory(error):
    """Whether an error means that memory ran out, in Python, in CUDA or in PyTorch on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error)


# --------------------------------------------------------------------------------------------------
# The part of a batch that a process has.

@contextlib.contextmanager
def one_process_first():
    """One process of each machine runs the body first, and then the others, so that only the first
    one downloads."""
    first = torchrun.local_rank() == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def split_batch(batch, rank, world, micro_batch=None, group=1):
    """The micro-batches of a process: slices of the global batch.

    Each process has batch / world consecutive samples. They are split into micro-batches of at most
    micro_batch samples (None: all at once), whose sizes differ by at most one group. group: the
    number of consecutive samples that have to stay in one micro-batch. Raises ValueError if this is
    impossible, or if the batch is not a multiple of the number of processes.
    """
    if batch % world:
        raise ValueError(f"--batch {batch} is not a multiple of {world}, the number of processes")
    own = batch // world
    most = min(micro_batch or own, own)
    if own % group or most < group:
        raise ValueError(f"--group {group}: a process has {own} samples in a step, and {most} in a "
                         "micro-batch; use at least one group, and whole groups")
    most = most // group * group
    groups = own // group
    count = math.ceil(own / most)
    ends = [rank * own + groups * i // count * group for i in range(count + 1)]
    return [slice(first, end) for first, end in zip(ends, ends[1:])]


def to_device(tensors, device):
    """Copies of CPU tensors on the device. The copies to a GPU are asynchronous."""
    if device.type == "cuda":
        tensors = [a.pin_memory() for a in tensors]
    return [a.to(device, non_blocking=True) for a in tensors]
