"""A run: its folder, its checkpoints, its log, and what happens between two steps.

    launch(train, method, args)    joins the processes and calls train(args, run)
    Run                            the methods that train calls: resume, batch, log, save
"""

import itertools
import pathlib
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from common import checkpoints, folders, processes, torchrun
from common.flags import MAY_CHANGE
from common.log import Log, read_lines
from common.messages import as_argument, fail, say_once

# After one of these signals a run saves and ends. Slurm sends SIGUSR1, a closing terminal SIGHUP
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]       # Windows has the first two
# These flags change the result, but may change when a run is resumed: this is printed and logged
MAY_CHANGE_WITH_A_NOTE = {"lr", "clip", "warmup", "precision", "jvp", "compile"}
# The entries of the flags that a training function sets from the data and from the teacher
FILLED_IN = {"net", "samples", "uncond", "class_names", "latent_stats", "teacher_id"}


@processes.program("--micro-batch, --grad-checkpoint, --precision bf16 and --fsdp need less "
                   "memory; the checkpoints are kept")
def launch(train, method, args):
    """Runs a training script: joins torchrun's processes, opens the run folder, and calls
    train(args, run). With --dry-run it prints what the run needs instead.

    method: the name of the script, which is saved in the checkpoints.
    """
    try:                                   # before a teacher is trained, and before processes wait
        processes.split_batch(args.batch, 0, args.dry_run or torchrun.world_size(),
                              args.micro_batch, getattr(args, "group", 1))
    except ValueError as e:
        fail(e)
    device, rank, world = processes.start(args.device, args.compile, args.precision)
    if args.dry_run:
        from common.dryrun import report  # here: it needs this module
        report(train, method, args)
        return
    run = Run(args, method, device, rank, world)
    run.call(train)
    processes.end()
    if rank == 0:
        path = run.folder / "ckpt.pt"
        words = f"--ckpt {as_argument(path)}"
        if args.net["in_channels"] not in (1, 3):
            words += f" --vae {as_argument(args.vae or 'VAE')}"
        print(f"{path}, step {run.step}; now: python sample.py {words} --nfe 1")


class Run:
    """A training run in this process.

    device, rank, world    the device, the rank of this process, the number of processes
    step                   the number of steps that are done
    folder, checkpoint     the run folder, and the contents of its newest checkpoint, or None
    """

    def __init__(self, args, method, device, rank, world, announcement=None):
        self.args, self.method = args, method
        self.announcement = announcement   # printed when the first step comes
        self.device, self.rank, self.world = device, rank, world
        self.folder = pathlib.Path(args.out)
        self.step, self.checkpoint, self.begun = 0, None, False
        self.changed = {}                  # {flag: [what it was, what it is]}
        self.made = []                     # the folders that did not exist before
        self.writer, self.writing = ThreadPoolExecutor(1), None        # the thread, and its task
        self.evaluation = None             # see prepare

    def call(self, train):
        """Opens the folder and calls train(args, run). An error before the first step is a user
        error, which ends the program with one line."""
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            self.open_folder()
            train(self.args, self)
        except (ValueError, OSError) as e:
            e.in_a_step = self.begun or getattr(e, "in_a_step", False)
            if e.in_a_step:
                raise
            processes.leave_with(e)
            fail(e)
        finally:
            for number, handler in handlers.items():
                if handler is not None:    # it is None if it is not Python's
                    signal.signal(number, handler)
            self.close()

    def close(self):
        """Closes the log and releases the folder. It removes a new folder if no step was begun."""
        if self.begun:
            self.log_file.close()
            self.writer.shutdown()
        folders.disown(self.folder)
        if not self.begun:
            folders.remove_empty(self.made)

    def open_folder(self):
        """Becomes the owner of the run folder and reads its newest checkpoint.

        Raises ValueError if the run belongs to another method, was begun with other flags, or is
        running in another program.
        """
        if self.rank == 0:
            self.made = folders.own(self.folder)
        processes.barrier()
        self.read_newest()
        if not processes.same_everywhere(self.step):
            raise ValueError(f"{self.folder}: the processes find different checkpoints there; it "
                             "must be the same folder on all computers")

    def read_newest(self):
        """Reads the newest checkpoint, if there is one. Raises ValueError as open_folder does."""
        path = self.folder / "ckpt.pt"
        if self.args.fresh or not path.exists():
            return
        checkpoint = checkpoints.read(path)
        if checkpoint["method"] != self.method:
            raise ValueError(f"{self.folder} is a run of {checkpoint['method']}.py; use --out or "
                             "--fresh")
        if "optimizer" not in checkpoint:
            raise ValueError(f"{path} has no optimiser to resume with; use --out or --fresh")
        self.checkpoint, self.step = checkpoint, checkpoint["step"]
        self.check_flags([name for name in checkpoint["args"] if name not in FILLED_IN])

    def check_flags(self, names):
        """Raises ValueError if a flag that changes the result differs from the start of the run.
        Flags in MAY_CHANGE_WITH_A_NOTE may differ, which is printed and logged."""
        falls = self.args.lr_final < 1     # the learning rate then depends on --steps
        for name in names:
            old, new = self.checkpoint["args"][name], getattr(self.args, name, None)
            old, new = as_list(old), as_list(new)
            if new == old:
                continue
            if name == "samples" and self.args.skip_broken:
                say_once(f"{self.folder} was begun with samples {old}, now they are {new}: from "
                         "here on the images come in another order")
            elif name in MAY_CHANGE_WITH_A_NOTE:
                self.changed[name] = [old, new]
            elif name not in MAY_CHANGE or (name == "steps" and falls):
                raise ValueError(f"{self.folder} was begun with {name} {old}, not {new}; use --out "
                                 "or --fresh")

    def resume(self, net, ema, optimizer, extra=()):
        """Loads the newest checkpoint, if there is one, into network, average and optimiser, and
        opens the log. From here on, SIGNALS are handled at the end of a step.

        extra: parameters outside of the network that are trained as well. Raises ValueError if the
        run was begun with other flags, or if the checkpoint does not fit.
        """
        self.net, self.ema, self.optimizer, self.extra = net, ema, optimizer, extra
        size = self.args.net["input_size"]
        self.prepare((self.args.net["in_channels"], size, size))
        if self.args.eval_every:           # of step 1, because that of step 0 is no student yet
            self.evaluation.choose_samplers(net, self.as_checkpoint() | dict(step=1))
        if self.checkpoint:
            names = [name for name in self.checkpoint["args"] if name in FILLED_IN]
            if not net.num_classes and "uncond" in names:
                names.remove("uncond")     # it makes no difference then
            self.check_flags(names)
            path = self.folder / "ckpt.pt"
            checkpoints.load_weights(net, self.checkpoint["model"], path)
            checkpoints.load_weights(ema, self.checkpoint["ema"], path)
            for p, saved in zip(extra, self.checkpoint.get("extra", ())):
                p.data.copy_(saved)
            checkpoints.load_optimizer(optimizer, self.checkpoint["optimizer"])
            self.checkpoint = None
        if self.args.fresh:
            self.begin_anew()
        self.signals, self.stopped = [], False
        for number in SIGNALS:
            hangs_up = hasattr(signal, "SIGHUP") and number == signal.SIGHUP
            if hangs_up and signal.getsignal(number) == signal.SIG_IGN:
                continue                   # started by nohup, which the run shall survive
            signal.signal(number, lambda number, frame: self.signals.append(number))
        missed = self.evaluation_is_due() and not self.was_evaluated()
        processes.barrier()                # all have read the log before it is written
        if self.rank == 0:
            self.remove_parts()
        self.log_file = Log(self.folder / "log.jsonl", self.step, self.args.steps,
                            self.args.log_every, quiet=self.rank > 0,
                            tensorboard=self.args.tensorboard)
        if self.changed and self.rank == 0:
            self.note_changes()
        self.begun = True
        if self.announcement:
            say_once(self.announcement)
        if missed:                         # the run was killed between the save and the figures
            self.evaluate(ema)

    def prepare(self, shape):
        """Loads, in the first call, what previews of latents and evaluations need, so that an error
        is reported before training begins. shape: (C, H, W) of the samples."""
        if self.evaluation or not (self.args.vae or self.args.eval_every):
            return
        from common.evaluation import Evaluation  # here: it needs a second
        self.evaluation = Evaluation(self.args, shape, self.device, self.rank, self.world)

    def as_checkpoint(self):
        """The entries of a checkpoint at this step that are not tensors."""
        return dict(method=self.method, step=self.step, args=dict(vars(self.args)))

    def note_changes(self):
        """Prints which flags have changed, and adds a line to the log, so that the record of the
        run is complete."""
        text = ", ".join(f"{name} {old} is now {new}" for name, (old, new) in self.changed.items())
        say_once(f"{self.folder}, step {self.step}: {text}")
        self.log_file.write_line(dict(step=self.step, changed=self.changed))

    def begin_anew(self):
        """--fresh: renames the old folder to NAME.old-K, after all checks that may stop the run."""
        if self.rank == 0 and {p.name for p in self.folder.iterdir()} - {".owner"}:
            real = self.folder.resolve()   # a link stays, and the folders lie beside each other
            names = (real.with_name(f"{real.name}.old-{k}") for k in itertools.count(1))
            folders.disown(self.folder)
            old = real.rename(next(name for name in names if not name.exists()))
            print(f"--fresh: the old run is now {old}")
            folders.own(real)
        processes.barrier()

    def batch(self, dataset, step, samples):
        """The images x [b, ...] and the labels y [b] of a slice of a step's batch, on the device.
        If an image cannot be read, the program ends with one line that names the step."""
        size = self.args.batch
        try:
            tensors = dataset.batch(self.args.seed, step * size, size, samples)
        except ValueError as e:
            self.log_file.close()
            fail(f"step {step}: {e}; the checkpoints before stay in {self.folder}", always=True)
        x, y = processes.to_device(tensors, self.device)
        if self.args.uncond:               # the network may have classes all the same
            y = torch.full_like(y, self.net.num_classes)
        return x, y

    def log(self, step, **figures):
        """Adds the figures of a step, tensors with one number each, to the log."""
        self.step = step + 1
        self.stopped = self.log_file.add(
            self.step, self.args.batch, figures, self.signals, now=self.save_is_due())

    def save_is_due(self):
        """Whether a checkpoint is due after the step that was just logged."""
        return self.step == self.args.steps or self.step % self.args.save_every == 0

    def preview_is_due(self):
        """Whether this process draws a preview now. With --fsdp, all processes draw it together.
        Previews of latents need --vae."""
        if self.args.net["in_channels"] not in (1, 3) and not self.args.vae:
            return False
        due = self.step == self.args.steps or self.step % self.args.preview_every == 0
        return due and (self.rank == 0 or self.args.fsdp)

    def preview_path(self):
        """The PNG of the step that was just logged; None in processes that write none."""
        return self.folder / "previews" / f"{self.step:07d}.png" if self.rank == 0 else None

    def decode(self, samples):
        """The images of samples: the samples themselves if they are pixels. The process that writes
        previews decodes latents by --vae."""
        if self.evaluation is None or self.rank > 0:
            return samples
        return self.evaluation.decode_rows(samples)

    def evaluation_is_due(self):
        """Whether --eval-every requires that all processes measure the FID now."""
        if not self.args.eval_every or self.step == 0:
            return False
        return self.step == self.args.steps or self.step % self.args.eval_every == 0

    def was_evaluated(self):
        """Whether the log already has the figures of the newest checkpoint."""
        lines = read_lines(self.folder / "log.jsonl")
        return any(line["step"] == self.step and "eval_n" in line for line in lines)

    def evaluate(self, ema):
        """Draws samples of the averaged network and adds their FID to the log. All processes call
        this together. It changes neither the weights nor the random numbers of training."""
        begun = time.perf_counter()
        row = dict(step=self.step) | self.evaluation.figures(ema, self.as_checkpoint())
        self.log_file.note(row, time.perf_counter() - begun)

    def save(self):
        """Writes a checkpoint if one is due. After one of SIGNALS, it is, and the program ends."""
        keep_every = self.args.keep_every
        snapshot = keep_every is not None and self.step % keep_every == 0
        if self.save_is_due() or self.stopped or snapshot:
            self.start_writing(snapshot)
        if self.stopped or self.step == self.args.steps:
            self.finish_writing()
        if self.stopped:
            processes.end()
            sys.exit(128 + (self.signals or [signal.SIGTERM])[-1])

    def start_writing(self, snapshot):
        """Copies the state, which a thread writes into ckpt.pt while training continues, in the
        form that checkpoints.read returns. snapshot: also write it, without the optimiser, into a
        separate file that is kept. All processes call this, because they gather what FSDP has
        sharded; only the first one writes."""
        self.finish_writing()              # at most one copy is held
        state = dict(model=self.net.state_dict(), ema=self.ema.state_dict(),
                     optimizer=self.optimizer.state_dict())
        if self.extra:
            state["extra"] = list(self.extra)
        checkpoint = self.as_checkpoint() | dict(torch_version=str(torch.__version__))
        checkpoint |= checkpoints.copy_to_cpu(state, keep=self.rank == 0)
        if self.rank == 0:
            self.writing = self.writer.submit(self.write, checkpoint, snapshot)

    def write(self, checkpoint, snapshot):
        """Writes a checkpoint, in the thread. The snapshot is written first: a run that is killed
        between the two resumes from an earlier step, and writes both again."""
        if snapshot:
            kept = {key: value for key, value in checkpoint.items() if key != "optimizer"}
            checkpoints.save(self.folder / f"step-{checkpoint['step']:07d}.pt", kept)
        checkpoints.save(self.folder / "ckpt.pt", checkpoint)

    def remove_parts(self):
        """Removes checkpoints that were only partly written when the run was killed."""
        for path in [self.folder / "ckpt.part", *self.folder.glob("step-*.part")]:
            path.unlink(missing_ok=True)

    def finish_writing(self):
        """Waits for the thread. An error in it, such as a full disk, is raised here."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()


def as_list(value):
    """A tuple as a list, as a checkpoint may have saved it; other values unchanged."""
    return list(value) if isinstance(value, tuple) else value
