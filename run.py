"""A run: what is the same around every step of the training scripts.

    start_processes        torchrun's processes and their devices
    seed_of, generator     random numbers that follow from a key alone
    own, save_checkpoint   folders with one owner, files that a kill leaves whole
    Run, Log               a run's folder, state, networks and optimiser; its log
    ema_update             the average of the weights
    program                decorates a main: short memory or a loss of NaN ends it in one line
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import signal
import socket
import sys
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flags import MAY_CHANGE, fail

# --------------------------------------------------------------------------------------------------
# Seeds: what is random follows from a key, so no random state needs to be saved.

def seed_of(*key):
    """A seed, 0 to 2^63 - 1, that follows from the key (plain values) alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(device, *key):
    """A random generator on a device, seeded by the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


# --------------------------------------------------------------------------------------------------
# Processes.

LESS_MEMORY = ("--micro-batch, --grad-checkpoint, --precision bf16 and --fsdp need less; the "
               "checkpoints are kept")


def program(advice):
    """Decorates a main. If memory runs out, or a loss is not finite, the program ends with one line
    and exit code 2. For memory, the line quotes torch's sizes and gives `advice`. The folders that
    the program owned are free again."""
    def decorate(main):
        @functools.wraps(main)
        def wrapped():
            try:
                main()
            except FloatingPointError as e:
                fail(e, always=True)
            except BrokenPipeError:        # as in `... | head -1`, which has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except (MemoryError, RuntimeError) as e:       # torch.OutOfMemoryError is one of these
                if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and (
                        "can't allocate memory" not in str(e)):
                    raise
                said = " ".join(str(e).split("\n")[0].split("Allocator: ")[-1].split())
                fail(f"out of memory ({said[:200]}); {advice}", always=True)
            finally:
                disown_all()
        return wrapped
    return decorate


def set_globals(device, compile=False, precision=None):
    """Everything that this project sets for the whole process. Ctrl-C ends it in one line. On a CPU
    glibc keeps the memory that is freed: new pages cost a tenth or more of a training step.
    compile: Dynamo's cuts at DDP's buckets are off, because they lose gradients of a fused pass.
    precision: "tf32" switches TF32 on, others off (None: it stays as PyTorch has it)."""
    def report(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
    warnings.filterwarnings("ignore", message="`broadcast_buffers`")   # whose new name 2.11 lacks
    if compile:
        torch._dynamo.config.optimize_ddp = False
    if precision:
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cpu":
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in ((-1, 2 ** 31 - 1), (-2, 2 ** 26), (-3, 2 ** 25)):
                mallopt(option, value)     # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def start_processes(device, compile=False, precision=None):
    """Joins torchrun's processes, if it started this one: NCCL on CUDA, gloo on the CPU.

    device: "cpu", "cuda", "cuda:N", "mps" or None for the best there is. Returns (device, rank,
    world).
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        fail(f"--device {device}: want cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: no Apple GPU here; use --device cpu")
    if device.type == "mps" and (compile or precision not in (None, "float32")):
        fail("--device mps: want --precision float32, and no --compile")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {device}: no such CUDA GPU here; use --device cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda" and local >= torch.cuda.device_count():
        fail(f"process {local} has no GPU of its own; start {torch.cuda.device_count()} of them",
             always=True)
    set_globals(device, compile, precision)
    if "WORLD_SIZE" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def barrier():
    """All processes meet here; one that ended before, and said why, ends the others, too."""
    try:
        if dist.is_initialized():
            dist.barrier()
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        print(f"process {dist.get_rank()}: another one is gone ({reason})", file=sys.stderr)
        sys.exit(2)


def end_processes():
    """All processes leave torchrun's group together. One that leaves alone may crash at its end."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def one_process_first():
    """One process of each machine goes through alone, then the others, who find its download."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield
    if first:
        barrier()


def synchronise(net, last):
    """Before a pass through net: its gradient is averaged over the processes only if it is the last
    of a step. DDP takes note of that in the forward pass, FSDP in the backward pass."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = last              # as its no_sync() does
    elif hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)


def to_device(tensors, device):
    """Copies of CPU tensors on the device; a GPU gets them without being waited for."""
    return [(a.pin_memory() if device.type == "cuda" else a).to(device, non_blocking=True)
            for a in tensors]


# --------------------------------------------------------------------------------------------------
# Files.

LOCKS = []                                 # (file, its path); a lock ends with its file


def own(folder):
    """Makes a folder, unless it is there, and makes this program its owner until the program ends,
    even by a kill. One process of a torchrun does it. ValueError if another program owns it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; take another --out")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:                    # Windows has none: its folders have no owner
        return
    path = folder / ".owner"
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise ValueError(f"{folder} belongs to a running program, {file.read().strip()}; wait for "
                         "it, stop it, or take another --out") from None
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return own(folder)                 # its last owner has just removed this file
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    LOCKS.append((file, path))


def disown_all():
    """Gives up the folders that this program owns."""
    while LOCKS:
        file, path = LOCKS.pop()
        path.unlink(missing_ok=True)
        file.close()


def check_output(*paths):
    """Makes the folders of these files (pathlib.Path or None), and ends the program, before its
    work, if one of the files cannot be written. Process 0 does both."""
    for path in filter(None, paths) if os.environ.get("RANK", "0") == "0" else ():
        try:
            new = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            open(path, "ab").close()
            if new:
                path.unlink()
        except OSError as e:
            fail(f"{path} cannot be written ({type(e).__name__})")


def save_checkpoint(path, checkpoint):
    """Writes a dict of plain values and tensors to a file beside `path` (a pathlib.Path), then
    renames it: a kill at any moment leaves the old checkpoint or the new one. Ends the program if
    the disk is full."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:   # RuntimeError: torch.save's own
        part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        fail(f"{path} could not be written ({reason}); what was there is kept", always=True)


def read_safetensors(path):
    """The tensors of a .safetensors file, {name: tensor}; of one that sample.py --export wrote, a
    checkpoint: method, args and step, which its metadata tell, and the tensors as model and ema."""
    with safe_open(path, "pt") as f:
        weights, told = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    if "method" not in told:
        return weights
    return {k: json.loads(text) for k, text in told.items()} | dict(model=weights, ema=weights)


def read_checkpoint(path):
    """What a checkpoint file holds, on the CPU; nothing in it is executed. Returns a dict with
    method, args, step, model, ema, optimizer and torch_version; without the last two for what
    sample.py --export wrote. ValueError if the file is missing, damaged or of another kind."""
    try:
        if str(path).endswith(".safetensors"):
            checkpoint = read_safetensors(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as e:
        raise ValueError(f"{path} is no readable checkpoint, truncated or foreign "
                         f"({type(e).__name__})") from None
    needed = {"method", "args", "step", "model", "ema"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of a training script here")
    return checkpoint


def cut_like(a, p):
    """The tensor a, cut among the processes as the parameter p is, if it is (--fsdp)."""
    if not hasattr(p, "placements"):
        return a
    from torch.distributed.tensor import distribute_tensor  # here: this takes a second
    return distribute_tensor(a, p.device_mesh, p.placements)


def load_weights(net, weights, path, may_lack=()):
    """net.load_state_dict, strict but for missing names that begin with one of `may_lack`.

    Raises ValueError, before net is changed, with the first parameter of the file `path` that is
    missing, unexpected or of another shape.
    """
    own = net.state_dict()
    problems = {
        "lacks": [k for k in own if k not in weights and not k.startswith(tuple(may_lack))],
        "has the unknown": [k for k in weights if k not in own],
        "has another shape of": [
            k for k in weights if k in own and own[k].shape != weights[k].shape],
    }
    for what, names in problems.items():
        if names:
            shapes = [list(a[names[0]].shape) for a in (weights, own) if names[0] in a]
            raise ValueError(f"{path} does not fit this network: it {what} {names[0]}, "
                             f"{' and not '.join(map(str, shapes))} (and {len(names) - 1} more)")
    net.load_state_dict({k: cut_like(a, own[k]) for k, a in weights.items()}, strict=False)


def load_optimizer(optimizer, state):
    """Loads a checkpoint's state, in the memory layout of the parameters: fused optimisers pair
    elements by their place in memory. Raises ValueError if it does not fit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def part(i, a):
        if i >= len(params) or a.shape != params[i].shape:
            return a
        return torch.empty_like(params[i], dtype=a.dtype).copy_(cut_like(a, params[i]))

    entries = {i: {name: part(i, a) for name, a in entry.items()}
               for i, entry in state["state"].items()}
    optimizer.load_state_dict(state | dict(state=entries))


# --------------------------------------------------------------------------------------------------
# EMA.

def ema_gamma(sigma_rel):
    """The exponent whose power-function EMA has the relative width sigma_rel (EDM2, Karras et al.
    2024): the largest root gamma of sigma_rel^2 (gamma+2)^2 (gamma+3) = gamma+1."""
    variance = sigma_rel ** -2
    return max(np.roots([1, 7, 16 - variance, 12 - variance]).real)


@torch.no_grad()
def ema_update(ema, net, k, gamma, beta=None):
    """Averages net after step k = 1, 2, ... into ema, in which a past step j weighs j^gamma, or,
    with a constant rate beta, beta^(k-j)."""
    beta = beta or (1 - 1 / k) ** (gamma + 1)
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


# --------------------------------------------------------------------------------------------------
# The run.

class Stage(NamedTuple):
    """Where the next step stands."""

    name: str              # "pretrain" or the method's
    k: int                 # steps of this stage before it
    batch: int             # its images, of all processes
    first: int             # images of the run before it
    lr: float              # its learning rate


class Run:
    """A training run, in this process. Its network, EMA and optimiser come with `resume`.

    device, rank, world    this process and the number of processes
    step, total            steps done, and to do in all
    folder, checkpoint     the run folder, and what its newest checkpoint held, or None
    shows                  whether a preview is due after the step that was just finished
    """

    def __init__(self, args, method, stage_name=None):
        self.args, self.method, self.stage_name = args, method, stage_name or method
        self.device, self.rank, self.world = start_processes(
            args.device, args.compile, args.precision)
        self.step, self.total, self.checkpoint = 0, args.pretrain + args.steps, None
        self.gamma = ema_gamma(args.ema_sigma)

    def open_folder(self):
        """Owns the run's folder and finds its newest checkpoint. Raises ValueError if the run is
        another method's, was begun with other flags, or goes on in another program."""
        args, self.folder = self.args, pathlib.Path(self.args.out)
        if self.rank == 0:
            own(self.folder)
        barrier()
        path = self.folder / "ckpt.pt"
        if args.fresh or not path.exists():
            return
        checkpoint = read_checkpoint(path)
        if checkpoint["method"] != self.method:
            raise ValueError(f"{self.folder} is a run of {checkpoint['method']}.py; use --out or "
                             "--fresh")
        if "optimizer" not in checkpoint:
            raise ValueError(f"{path} has no optimiser to go on with; use --out or --fresh")
        falls = args.lr_final < 1 and checkpoint["step"] > args.pretrain       # by --steps
        for name, old in checkpoint["args"].items():
            new = getattr(args, name, None)
            old, new = (list(a) if isinstance(a, tuple) else a for a in (old, new))
            if name == "samples" and new != old and args.skip_broken:
                print(f"{self.folder} was begun with samples {old}, now they are {new}: from here "
                      "on the images come in another order", file=sys.stderr)
            elif new != old and (name not in MAY_CHANGE or name == "steps" and falls):
                raise ValueError(f"{self.folder} was begun with {name} {old}, not {new}; use --out "
                                 "or --fresh")
        self.checkpoint, self.step = checkpoint, checkpoint["step"]

    def begin_anew(self):
        """--fresh: renames the old folder to NAME.old-K, after all that may refuse the run."""
        if self.rank == 0 and {p.name for p in self.folder.iterdir()} - {".owner"}:
            names = (self.folder.with_name(f"{self.folder.name}.old-{k}")
                     for k in itertools.count(1))
            disown_all()
            old = self.folder.rename(next(name for name in names if not name.exists()))
            print(f"--fresh: the old run is now {old}")
            own(self.folder)
        barrier()

    def teacher_path(self):
        """The teacher that the run has now: --teacher, that of its first stage, or None."""
        own = self.folder / "teacher.pt" if self.step > self.args.pretrain > 0 else None
        return self.args.teacher or own

    def resume(self, net, shard, extra=()):
        """Makes EMA and optimiser for net, and brings all three to where the run stands. shard:
        what --fsdp does to a network; extra: parameters outside of net that are trained, too.
        Begins the log; from here on SIGTERM and SIGINT wait for the end of a step."""
        args, path = self.args, self.folder / "ckpt.pt"
        self.net, self.ema, self.extra = net, copy.deepcopy(net).eval().requires_grad_(False), extra
        if self.checkpoint:
            load_weights(self.net, self.checkpoint["model"], path)
            load_weights(self.ema, self.checkpoint["ema"], path)
            for p, saved in zip(extra, self.checkpoint.get("extra", ())):
                p.data.copy_(saved)
        for network in (self.net, self.ema) if args.fsdp else ():
            shard(network)
        net.grad_checkpoint = args.grad_checkpoint
        self.new_optimizer()
        if self.checkpoint:
            load_optimizer(self.optimizer, self.checkpoint["optimizer"])
        self.trained = torch.compile(net) if args.compile else net     # as losses call it
        if self.world > 1 and not args.fsdp:
            self.trained = DistributedDataParallel(self.trained, broadcast_buffers=False)
        if args.fresh:
            self.begin_anew()
        self.signals = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.signals.append(number))
        self.log = Log(self.folder / "log.jsonl", self.step, self.total, args.log_every,
                       quiet=self.rank > 0)

    def new_optimizer(self):
        """The optimiser at the first step of a stage."""
        args = self.args
        # RAdam has no fused form, nor has AdamW on an Apple GPU
        fused = dict(fused=True) if args.optimizer == "AdamW" and self.device.type != "mps" else {}
        self.optimizer = getattr(torch.optim, args.optimizer)(
            self.net.parameters(), lr=args.lr, betas=args.betas, weight_decay=args.weight_decay,
            **fused)
        if self.extra:
            self.optimizer.add_param_group(dict(params=list(self.extra)))
        if hasattr(self.net, "force_weight_norm"):
            self.optimizer.register_step_post_hook(lambda *_: self.net.force_weight_norm())

    def end_pretraining(self):
        """Keeps the network as teacher.pt; the method begins with its averaged weights."""
        self.save("teacher.pt")
        barrier()
        self.net.load_state_dict(self.ema.state_dict())
        self.new_optimizer()
        return self.folder / "teacher.pt"

    def stage(self):
        """Where the next step stands."""
        args, k = self.args, self.step - self.args.pretrain
        name, batch, lr, steps = self.stage_name, args.batch, args.lr, args.steps
        first = args.pretrain * args.pretrain_batch + k * batch
        if k < 0:
            name, k, batch, steps = "pretrain", self.step, args.pretrain_batch, args.pretrain
            first, lr = k * batch, args.pretrain_lr or args.lr
        fall = (1 - args.lr_final) * k / steps
        lr *= max(1, k / (args.lr_decay or math.inf)) ** -0.5
        return Stage(name, k, batch, first, lr * min((k + 1) / max(args.warmup, 1), 1 - fall))

    def pieces(self, batch, multiple=1):
        """The rows of a batch that this process takes, in pieces of at most --micro-batch images,
        nearly alike: (slice, share of this process's images) each. multiple: so many images stay in
        one piece. Raises ValueError if that cannot be."""
        own = batch // self.world
        most = min(self.args.micro_batch or own, own)
        if own % multiple or most < multiple:
            raise ValueError(f"--group {multiple}: a process takes {own} images, {most} at once; "
                             "want more, and a multiple")
        most = most // multiple * multiple
        groups, count = own // multiple, -(-own // most)
        ends = [self.rank * own + groups * i // count * multiple for i in range(count + 1)]
        return [(slice(i, j), (j - i) / own) for i, j in zip(ends, ends[1:])]

    def autocast(self):
        """The precision in which a loss is computed."""
        bf16 = self.args.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def clip_gradient(self):
        """Scales the gradient to a norm of at most --clip; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.args.clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def set_lr(self, lr):
        """Gives the optimiser a learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def save(self, name):
        """Writes a checkpoint, as read_checkpoint gives it back. Called by all processes, which put
        together what is sharded; the first one writes it."""
        def whole(state):
            if isinstance(state, dict):
                return {name: whole(part) for name, part in state.items()}
            return state.full_tensor() if hasattr(state, "full_tensor") else state

        checkpoint = whole(dict(
            method=self.method, args=vars(self.args), step=self.step, model=self.net.state_dict(),
            ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict(),
            torch_version=str(torch.__version__)))
        checkpoint |= dict(extra=[p.detach() for p in self.extra]) if self.extra else {}
        if self.rank == 0:
            save_checkpoint(self.folder / name, checkpoint)

    def after_step(self, stage, figures):
        """Counts a step, logs its figures {name: tensor []}, and saves where it is time. Returns
        whether a signal ends the run. The log first checks that the figures are finite."""
        self.step += 1
        ends = self.step in (self.args.pretrain, self.total)
        saves, self.shows = (ends or self.step % n == 0
                             for n in (self.args.save_every, self.args.preview_every))
        signalled = self.log.add(self.step, stage.name, stage.batch, figures, self.signals, saves)
        if saves or signalled:
            self.save("ckpt.pt")
        self.shows = (self.shows or signalled) and (self.rank == 0 or self.args.fsdp)
        return signalled

    def preview_path(self):
        """The PNG of the step that was just finished; None in processes that write none."""
        return self.folder / "previews" / f"{self.step:07d}.png" if self.rank == 0 else None

    @contextlib.contextmanager
    def data_errors_end_the_run(self):
        """A ValueError while a batch is read ends the program in one line, which names the step."""
        try:
            yield
        except ValueError as e:
            self.log.close()
            fail(f"step {self.step}: {e}; the checkpoints before stay in {self.folder}", True)

    def finish(self):
        """Ends the processes, or the program if a signal cut the run short; says what comes now."""
        self.log.close()
        end_processes()
        if self.step < self.total:
            sys.exit(128 + (self.signals or [signal.SIGTERM])[-1])
        if self.rank == 0:
            path = self.folder / "ckpt.pt"
            print(f"{path}, step {self.step}; now: python sample.py --ckpt {path} --nfe 1")


@contextlib.contextmanager
def errors_in_one_line():
    """A ValueError or OSError within ends the program as a user's mistake."""
    try:
        yield
    except (ValueError, OSError) as e:
        fail(e)


def line_step(line):
    """The step of a line of log.jsonl; infinite for one that is torn or foreign."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


class Log:
    """log.jsonl and the progress bar: every `every` steps the means of the figures since the last.

    Lines of a run that was killed, past `step`, are dropped. Silent if `quiet` (other processes).
    """

    def __init__(self, path, step, total, every, quiet=False):
        self.path, self.every, self.quiet = path, every, quiet
        self.window, self.tick = [], time.perf_counter()
        self.bar = tqdm(total=total, initial=step, disable=quiet, unit="step", dynamic_ncols=True)
        if not quiet:
            old = path.read_text().splitlines(keepends=True) if path.exists() else []
            keep = [line for line in old if line_step(line) <= step]
            path.write_text("".join(keep))
            self.file = open(path, "a", buffering=1)

    def add(self, step, stage, images, figures, signals, now=False):
        """Takes what a step has brought: its number of images, its figures {name: tensor []}, which
        may differ from step to step, and the signals of this process. The device is waited for now
        or when it is time, not with every step: then a line is written, and the number of signals
        of all processes is returned, else 0. Raises FloatingPointError with the step and its
        figures if one is not finite."""
        self.bar.update()
        self.window.append((step, images, figures))
        if not (now or step % self.every == 0 or not dist.is_initialized() and signals):
            return 0
        names = [(at, name) for at, _, figures in self.window for name in figures]
        own = torch.stack([a for *_, figures in self.window for a in figures.values()])
        means, votes = self.average(own, len(signals))
        self.check_finite(names, means, own.tolist())
        self.write(step, stage, names, means)
        return votes

    def average(self, own, votes):
        """The figures' means over the processes, and the sum of their votes, from one reduction."""
        both = torch.cat([own, own.new_tensor([votes])])
        if dist.is_initialized():
            dist.all_reduce(both)
            both[:-1] /= dist.get_world_size()
        *means, votes = both.tolist()
        return means, votes

    def check_finite(self, names, means, own):
        """FloatingPointError for the first step with a figure that is not finite."""
        for (broken, _), value in zip(names, means):
            if not math.isfinite(value):
                terms = [f"{name} {a}" for (at, name), a in zip(names, own) if at == broken]
                rank = dist.get_rank() if dist.is_initialized() else 0
                raise FloatingPointError(
                    f"not finite in step {broken - 1}, process {rank}: {', '.join(terms)}; the "
                    f"checkpoints before stay in {self.path.parent}")

    def write(self, step, stage, names, means):
        """A line of the file: the means over the steps since the last one."""
        columns = {}
        for (_, name), value in zip(names, means):
            columns.setdefault(name, []).append(value)
        row = {name: round(float(np.mean(column)), 6) for name, column in columns.items()}
        images = sum(images for _, images, _ in self.window)
        row["images_per_s"] = round(images / (time.perf_counter() - self.tick), 1)
        self.window, self.tick = [], time.perf_counter()
        if self.quiet:
            return
        try:
            self.file.write(json.dumps(dict(step=step, stage=stage) | row) + "\n")
        except OSError as e:
            fail(f"{self.path}: {e}; checkpoints stay, the same command goes on", always=True)
        self.bar.set_postfix(row)

    def close(self):
        """Ends the bar; the file is written through at each line."""
        self.bar.close()
