"""log.jsonl and the progress bar."""

import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.messages import fail

TOO_MANY = 20                              # so many skipped steps in a row end a run


def line_step(line):
    """The step of a line of log.jsonl, or infinity for a line that is incomplete or invalid."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def read_lines(path):
    """The lines of a log.jsonl, a list of dicts, without those that are incomplete or invalid. The
    list is empty if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line_step(line) < math.inf]


class TensorBoard:
    """Writes the lines of log.jsonl into a folder for TensorBoard: numbers as scalars, other values
    as text. Events after the step, which a killed run has left, are hidden."""

    def __init__(self, folder, step):
        from torch.utils.tensorboard import SummaryWriter  # here: the package need not be there
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def add(self, row):
        """Writes a line of the log. Figures of an evaluation have names such as fid/NFE 1."""
        for name, value in row.items():
            if name == "step":
                continue
            parts = value if isinstance(value, dict) else {"": value}
            for part, figure in parts.items():
                tag = f"{name}/{part}" if part else name
                if isinstance(figure, (int, float)):
                    self.writer.add_scalar(tag, figure, row["step"])
                else:
                    self.writer.add_text(tag, str(figure), row["step"])
        self.writer.flush()


class Log:
    """log.jsonl and the progress bar. A line has the means of the figures since the previous line.

    step: the number of steps that are done. Later lines, which a killed run has left, are removed.
    total: the steps of the run. every: steps between two lines. quiet: whether this process writes
    and shows nothing. tensorboard: whether to write the lines for TensorBoard as well, into a
    folder beside the file.
    """

    def __init__(self, path, step, total, every, quiet=False, tensorboard=False):
        self.path, self.every, self.quiet = path, every, quiet
        self.window = []                   # (step, number of images, figures) since the last line
        self.tick = time.perf_counter()
        self.skipped_in_a_row = 0
        self.bar = tqdm(total=total, initial=step, disable=quiet, unit="step", dynamic_ncols=True)
        if not quiet:
            old = path.read_text().splitlines(keepends=True) if path.exists() else []
            part = path.with_suffix(".part")           # a kill meanwhile leaves the log as it was
            part.write_text("".join(line for line in old if line_step(line) <= step))
            os.replace(part, path)
            self.file = open(path, "a", buffering=1)
        self.tensorboard = None
        if tensorboard and not quiet:
            self.tensorboard = TensorBoard(path.parent / "tensorboard", step)

    def add(self, step, images, figures, signals, now=False):
        """Adds a step: its number of images, its figures {name: tensor []}, and the
        signals that this process has received.

        If a line is due, or with `now`, this waits for the device, writes the line and returns the
        number of signals of all processes. Otherwise it returns 0 without waiting. Raises
        FloatingPointError after TOO_MANY steps in a row whose figures are not finite.
        """
        self.bar.update()
        self.window.append((step, images, figures))
        alone = not dist.is_initialized()
        if not (now or step % self.every == 0 or (alone and signals)):
            return 0
        means, votes = self.average(len(signals))
        skipped = self.count_skipped(means)
        self.write(step, means, skipped)
        return votes

    def average(self, votes):
        """[(step, {name: mean over the processes}), ...] of the window, and the sum of the votes,
        from one reduction."""
        own = torch.stack([a.float() for _, _, figures in self.window for a in figures.values()])
        both = torch.cat([own, own.new_tensor([votes])])
        if dist.is_initialized():
            dist.all_reduce(both)
            both[:-1] /= dist.get_world_size()
        *values, votes = both.tolist()
        values = iter(values)
        means = [(step, {name: next(values) for name in figures})
                 for step, _, figures in self.window]
        return means, int(votes)

    def count_skipped(self, means):
        """The number of steps in which an update was skipped because a figure was not finite. Each
        of these steps is printed."""
        skipped = 0
        for step, figures in means:
            if all(math.isfinite(value) for value in figures.values()):
                self.skipped_in_a_row = 0
                continue
            skipped += 1
            terms = ", ".join(f"{name} {value:g}" for name, value in figures.items())
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == TOO_MANY:
                raise FloatingPointError(
                    f"{TOO_MANY} steps in a row were not finite, the last is step {step - 1}: "
                    f"{terms}; the checkpoints before stay in {self.path.parent}; use a smaller "
                    "--lr or a longer --warmup")
            if not self.quiet:
                self.bar.write(f"step {step - 1} is skipped, it is not finite: {terms}", sys.stderr)
        return skipped

    def write(self, step, means, skipped):
        """Writes a line: the means of the finite figures over the steps since the last line."""
        columns = {}
        for _, figures in means:
            for name, value in figures.items():
                if math.isfinite(value):
                    columns.setdefault(name, []).append(value)
        row = {name: round(float(np.mean(values)), 6) for name, values in columns.items()}
        if skipped:
            row["skipped"] = skipped
        images = sum(images for _, images, _ in self.window)
        row["images_per_s"] = round(images / (time.perf_counter() - self.tick), 1)
        self.window, self.tick = [], time.perf_counter()
        self.write_line(dict(step=step) | row)
        self.bar.set_postfix(row)

    def write_line(self, row):
        """Adds a line, a dict with the step, to the file. It is also used for lines without
        training figures, such as those of an evaluation."""
        if self.quiet:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as e:
            fail(f"{self.path}: {e}; the checkpoints stay, and the same command resumes the run",
                 always=True)
        if self.tensorboard:
            self.tensorboard.add(row)

    def note(self, row, seconds):
        """Adds a line to the file, and shows it, after something other than training. The seconds
        that it took do not count in images_per_s."""
        self.tick += seconds
        self.write_line(row)
        if not self.quiet:
            self.bar.write(json.dumps(row), sys.stderr)

    def close(self):
        """Closes the progress bar. Each line of the file is already written through."""
        self.bar.close()
