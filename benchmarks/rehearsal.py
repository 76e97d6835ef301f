"""A long run, rehearsed with small networks: does a disturbed run end like an undisturbed one?

    python benchmarks/rehearsal.py
    python benchmarks/rehearsal.py --keep rehearsal        # keeps the files for inspection

This repository is designed for runs of days on eight GPUs. This program rehearses such a run in
some minutes on two CPU cores: with the same scripts, started by the same commands, and two
processes of torchrun. Each act prints what it did and what it checked. The exit code is 0 if all
checks pass.

    act 1    a folder of images becomes latents, by encode.py
    act 2    flow.py trains a teacher on them
    act 3    facm.py --fsdp trains a student twice: undisturbed, and killed five times
    act 4    a student whose flags change during the run, with a step that is not finite
    act 5    benchmarks/sweep.py measures all snapshots
    act 6    the command that a run prints at its end

It needs Linux or macOS, because it finds the processes with the command ps.
"""

import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import models
from common import checkpoints, flags
from common.messages import fail

IMAGES, SIZE = 200, 32                     # glyphs, 20 of each class, and their height and width
STEPS = 40                                 # of a student
SAMPLES = 64                               # for a figure
LATENTS = ["--preset", "imagenet_latents", "--device", "cpu", "--batch", "8", "--micro-batch", "4"]
TEACHER = ["--net", "name=LightningDiT", "patch=1", "width=128", "depth=2", "heads=4", "qknorm=True",
           "--steps", "60", "--lr", "2e-3", "--warmup", "10", "--save-every", "30", "--log-every", "10"]
STUDENT = ["--steps", str(STEPS), "--warmup", "10", "--lr", "2e-4", "--save-every", "10",
           "--keep-every", "20", "--log-every", "5", "--preview-every", "20"]
FILES = ["ckpt.pt", "log.jsonl", "previews", "step-0000020.pt", "step-0000040.pt"]

# facm.py with data that are NaN in one step
WRAPPER = """
import facm
from common.run import Run

honest = Run.batch


def batch(run, dataset, step, samples):
    x, y = honest(run, dataset, step, samples)
    if step == 12:
        x = x * float("nan")
    return x, y


Run.batch = batch
facm.main()
"""

FAULTS = []                                # the checks that did not hold
PROGRAMS = []                              # all that were started


def check(what, holds):
    """Prints whether a check passes, and adds it to FAULTS if it does not."""
    print(f"  {'ok   ' if holds else 'FAULT'}  {what}", flush=True)
    if not holds:
        FAULTS.append(what)


# --------------------------------------------------------------------------------------------------
# Processes.

class Program:
    """A running command. Its output is written to a file.

    words: the script and its flags. processes: the number for torchrun; 0: without torchrun.
    """

    def __init__(self, folder, *words, processes=0):
        self.words = [str(word) for word in words]
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        launcher = [sys.executable, "-W", "ignore"]
        if processes:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        more = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        with open(self.output, "w") as file:
            self.process = subprocess.Popen([*launcher, *self.words], cwd=ROOT, env=os.environ | more,
                                            stdout=file, stderr=subprocess.STDOUT)
        PROGRAMS.append(self)

    def said(self):
        """What the command has printed."""
        return self.output.read_text()

    def finish(self):
        """Waits for the end and returns the exit code."""
        return self.process.wait(timeout=300)

    def children(self):
        """The ids of the processes that torchrun has started, beginning with the first process."""
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        pairs = [line.split() for line in table.splitlines()]
        return sorted(int(pid) for pid, parent in pairs if int(parent) == self.process.pid)

    def wait_until_it_trains(self):
        """Waits until the first step is shown. By then, log lines after the checkpoint and partly
        written files of an earlier start have been removed."""
        self.wait_for(lambda: re.search(r"/s(tep)?[],]", self.said()))

    def wait_for(self, happened):
        """Waits until happened() is true. Raises RuntimeError if the program ends first."""
        while not happened():
            if self.process.poll() is not None:
                raise RuntimeError(f"{shlex.join(self.words)} ended early:\n{self.said()}")
            time.sleep(0.0005)

    def kill_all(self, workers):
        """Kills torchrun and its processes (kill -9), as when the machine loses power."""
        for pid in [self.process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while set(workers) & set(self.alive()):
            time.sleep(0.01)

    def alive(self):
        """The ids of all processes of the machine that have not ended."""
        table = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True).stdout
        pairs = [line.split() for line in table.splitlines()]
        return [int(pid) for pid, state in pairs if not state.startswith("Z")]


def run(folder, *words, processes=0):
    """Runs a command to its end, checks its exit code, and returns its output."""
    begun = time.perf_counter()
    program = Program(folder, *words, processes=processes)
    code = program.finish()
    name = pathlib.Path(words[0]).name
    check(f"{name} ends with exit code 0 ({time.perf_counter() - begun:.0f} s)", code == 0)
    if code:
        print(program.said(), flush=True)
        sys.exit(1)
    return program.said()


# --------------------------------------------------------------------------------------------------
# Run folders.

def rows(out):
    """The complete lines of a run's log."""
    path = out / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reached(out, step):
    """Whether the log has reached a step."""
    return any(row["step"] >= step for row in rows(out))


def timeless(out):
    """The lines of a log without the figure that differs between two equal runs."""
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in rows(out)]


def parts(out):
    """The files of a run folder that are being written."""
    return list(out.glob("*.part"))


def same(a, b):
    """Whether nested dicts and lists of tensors and plain values are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b


def every_step_once(steps):
    """Whether these are the steps 5, 10, ... up to the last, each of them once."""
    return steps == list(range(5, STEPS + 1, 5))


def finite(tensors):
    """Whether all tensors of a dict are finite."""
    return all(bool(a.isfinite().all()) for a in tensors.values())


# --------------------------------------------------------------------------------------------------
# The acts.

def make_images(folder):
    """A folder with a subfolder of glyphs for each digit."""
    images, labels = data.glyphs(IMAGES, SIZE)
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / f"digit-{label}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def make_autoencoder(path):
    """A small autoencoder with random weights, which makes images four times smaller."""
    vae = models.create("AutoencoderKL", z_channels=4, mult=(1, 1, 1), width=32, blocks=1,
                        attention=(), seed=0)
    torch.save(vae.state_dict(), path)


def make_features(path):
    """A small TorchScript network in place of Inception: uint8 [N, 3, H, W] -> [N, 24]."""
    torch.manual_seed(0)
    pool = torch.nn.AdaptiveAvgPool2d(4)
    body = torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(48, 24), torch.nn.Tanh())

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x.float() / 64 - 2)

    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # TorchScript is deprecated, and fid.py still reads it
        torch.jit.save(torch.jit.trace(Features(), images), path)


def encode_images(folder):
    """Act 1."""
    print("Act 1: a folder of images becomes latents", flush=True)
    make_images(folder / "images")
    make_autoencoder(folder / "vae.pt")
    make_features(folder / "features.pt")
    run(folder, "encode.py", "--images", folder / "images", "--vae", folder / "vae.pt", "--out",
        folder / "latents", "--resolution", SIZE, "--device", "cpu", processes=2)
    latents = data.load(str(folder / "latents"))
    check(f"there are {IMAGES} latents of 4x8x8 in 10 classes",
          (len(latents.labels), latents.shape, latents.num_classes) == (IMAGES, (4, 8, 8), 10))
    run(folder, "fid.py", folder / "images", "--features", folder / "features.pt", "--save-stats",
        folder / "ref.npz", "--device", "cpu")


def train_teacher(folder):
    """Act 2."""
    print("Act 2: flow.py trains a teacher", flush=True)
    out = folder / "flow"
    run(folder, "flow.py", "--data", folder / "latents", *LATENTS, *TEACHER, "--out", out, processes=2)
    losses = [row["L_fm"] for row in rows(out)]
    check(f"its loss falls, from {losses[0]:.2f} to {losses[-1]:.2f}", losses[-1] < losses[0])


def student(folder, out):
    """The arguments of a student's command, without its script."""
    evaluation = ["--vae", folder / "vae.pt", "--eval-every", 20, "--eval-n", SAMPLES, "--ref",
                  folder / "ref.npz", "--features", folder / "features.pt"]
    return ["--data", folder / "latents", *LATENTS, "--teacher", folder / "flow", *STUDENT, *evaluation,
            "--out", out]


def kill_at_a_random_time(program, out):
    """Kills all processes (kill -9) at a random time in a step."""
    program.wait_until_it_trains()
    program.wait_for(lambda: reached(out, 15))
    time.sleep(random.uniform(0, 0.5))
    program.kill_all(program.children())
    lines = rows(out)
    saved = checkpoints.read(out / "ckpt.pt")["step"]
    print(f"  killed after step {lines[-1]['step']} of the log; the checkpoint has step {saved}", flush=True)


def kill_in_a_save(program, out, name):
    """Kills all processes (kill -9) while a file with this name is written. Returns whether this
    was in time, so that the file was not finished."""
    part = (out / name).with_suffix(".part")
    content = checkpoints.fingerprint(out / "ckpt.pt")
    program.wait_until_it_trains()
    workers = program.children()
    program.wait_for(part.exists)
    program.kill_all(workers)
    in_time = part.exists()
    if in_time:
        print(f"  killed when {part.name} had {part.stat().st_size:,} bytes", flush=True)
        check("the checkpoint before is whole and unchanged",
              checkpoints.fingerprint(out / "ckpt.pt") == content)
    return in_time


def disturb(folder, command, out):
    """Starts a command repeatedly, and ends it in five ways."""
    def start():
        return Program(folder, *command, processes=2)

    kill_at_a_random_time(start(), out)
    for name in ("step-0000020.pt", "ckpt.pt"):
        for attempt in range(3):
            if kill_in_a_save(start(), out, name):
                break
        else:
            check(f"a kill came while {name} was written", False)

    # Kill only one process, as the kernel does when memory is full
    program = start()
    program.wait_until_it_trains()
    program.wait_for(lambda: reached(out, 25))
    workers = program.children()
    os.kill(workers[1], signal.SIGKILL)
    code = program.finish()
    check(f"kill -9 for the second process ends the first as well (torchrun's exit code {code})",
          code != 0 and not set(workers) & set(program.alive()))

    # SIGTERM to one process
    program = start()
    program.wait_until_it_trains()
    program.wait_for(lambda: reached(out, 25))
    os.kill(program.children()[1], signal.SIGTERM)
    code = program.finish()
    saved, logged = checkpoints.read(out / "ckpt.pt")["step"], rows(out)[-1]["step"]
    exits = set(re.findall(r"exitcode *: *(-?\d+)", program.said()))
    check(f"SIGTERM to one process ends the run with exit code 143, which torchrun prints, and with "
          f"{code} itself", code != 0 and "143" in exits)
    check(f"it saved the step that the log ends with ({saved}, {logged})", saved == logged < STEPS)
    check("nothing is left of the kills: no file that was half written, and no owner",
          not parts(out) and not (out / ".owner").exists())


def compare_with_reference(folder, out, reference):
    """Checks that the disturbed run equals the undisturbed one."""
    a, b = checkpoints.read(out / "ckpt.pt"), checkpoints.read(reference / "ckpt.pt")
    for part in ("model", "ema", "optimizer"):
        check(f"{part}: equal to the last bit", same(a[part], b[part]))
    check("log.jsonl: the same lines, but for images_per_s", timeless(out) == timeless(reference))
    steps = [row["step"] for row in rows(out) if "L_cm" in row]
    check(f"log.jsonl: {len(steps)} lines of training, each step once", every_step_once(steps))
    measured = [row["step"] for row in rows(out) if "eval_n" in row]
    check("log.jsonl: an evaluation after the steps 20 and 40", measured == [20, 40])
    for run_folder in (out, reference):
        names = sorted(path.name for path in run_folder.iterdir())
        check(f"{run_folder.name}: the files are those that docs/runs.md lists", names == FILES)
    for path in sorted(out.glob("step-*.pt")):
        kept, other = checkpoints.read(path), checkpoints.read(reference / path.name)
        check(f"{path.name}: whole, and equal to the undisturbed run's",
              same(kept["model"], other["model"]) and same(kept["ema"], other["ema"]))
    for path in sorted((out / "previews").iterdir()):
        check(f"previews/{path.name}: equal to the undisturbed run's",
              path.read_bytes() == (reference / "previews" / path.name).read_bytes())


def train_students(folder):
    """Act 3."""
    print("Act 3: facm.py --fsdp, undisturbed", flush=True)
    reference, out = folder / "undisturbed", folder / "disturbed"
    run(folder, "facm.py", *student(folder, reference), "--fsdp", processes=2)
    print("Act 3: facm.py --fsdp, killed and resumed by the same command", flush=True)
    command = ["facm.py", *student(folder, out), "--fsdp"]
    disturb(folder, command, out)
    run(folder, *command, processes=2)
    compare_with_reference(folder, out, reference)
    run(folder, "sample.py", "--ckpt", out / "step-0000020.pt", "--vae", folder / "vae.pt", "--n", 4,
        "--device", "cpu", "--out", folder / "snapshot.png")


def change_flags(folder):
    """Act 4."""
    print("Act 4: a step that is not finite, other processes and another learning rate", flush=True)
    out = folder / "changed"
    wrapper = folder / "with_nan.py"
    wrapper.write_text(WRAPPER)
    program = Program(folder, wrapper, *student(folder, out), "--fsdp", processes=2)
    program.wait_for(lambda: reached(out, 15))
    program.process.send_signal(signal.SIGTERM)
    program.finish()
    said = program.said()
    saved, logged = checkpoints.read(out / "ckpt.pt")["step"], rows(out)[-1]["step"]
    check(f"SIGTERM to torchrun: the run saved the step that the log ends with ({saved}, {logged})",
          saved == logged < STEPS)
    check("the step that is not finite is printed", "step 12 is skipped, it is not finite: L_fm nan" in said)

    # From here on, the run has one process, without --fsdp, which a SIGTERM ends as well
    command = ["facm.py", *student(folder, out), "--lr", "1e-4"]
    program = Program(folder, *command)
    program.wait_until_it_trains()
    program.wait_for(lambda: reached(out, saved + 5))
    program.process.send_signal(signal.SIGTERM)
    code = program.finish()
    check(f"one process instead of two, --lr 1e-4, then SIGTERM: exit code {code}", code == 143)
    check("the change is printed", f"step {saved}: lr 0.0002 is now 0.0001" in program.said())
    run(folder, *command)
    changes = [row for row in rows(out) if "changed" in row]
    check("the change is one line of the log",
          changes == [dict(step=saved, changed=dict(lr=[2e-4, 1e-4]))])
    skipped = [(row["step"], row["skipped"]) for row in rows(out) if "skipped" in row]
    check("the skipped step is counted in its line of the log", skipped == [(15, 1)])
    steps = [row["step"] for row in rows(out) if "L_cm" in row]
    check(f"training ends with step {STEPS}, and no step is in the log twice",
          steps[-1] == STEPS and steps == sorted(set(steps)))
    last = checkpoints.read(out / "ckpt.pt")
    check("all weights are finite", finite(last["model"]) and finite(last["ema"]))


def sweep_snapshots(folder):
    """Act 5."""
    print("Act 5: benchmarks/sweep.py over the snapshots", flush=True)
    out = folder / "disturbed"
    run(folder, "benchmarks/sweep.py", out, "--ref", folder / "ref.npz", "--features",
        folder / "features.pt", "--vae", folder / "vae.pt", "--n", SAMPLES, "--device", "cpu")
    found = json.loads((out / "sweep.json").read_text())["rows"]
    check("it has a row for each of two snapshots and two NFE",
          [(row["step"], row["nfe"]) for row in found] == [(20, 1), (20, 2), (40, 1), (40, 2)])
    logged = {row["step"]: row["fd"] for row in rows(out) if "eval_n" in row}
    for row in found:
        (name,) = [name for name in row if name.startswith("Frechet distance")]
        during = logged[row["step"]][f"NFE {row['nfe']}"]
        check(f"step {row['step']}, NFE {row['nfe']}: {row[name]:.4f}, and {during:.4f} in the log",
              abs(row[name] - during) < 1e-3 * during)


def follow_the_hint(folder):
    """Act 6."""
    print("Act 6: the command that a run prints at its end", flush=True)
    said = run(folder, "facm.py", *student(folder, folder / "disturbed"), "--fsdp", processes=2)
    hint = re.search(r"now: python (.*)", said).group(1)
    print(f"  python {hint}", flush=True)
    run(folder, *shlex.split(hint))
    picture = folder / "disturbed" / "nfe1.png"
    with Image.open(picture) as image:
        check(f"nfe1.png has 64 images of {SIZE} pixels", image.size == (8 * 2 * SIZE, 8 * 2 * SIZE))


def main():
    parser = flags.Parser(description="A long run, rehearsed with small networks.")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FOLDER", help="a new folder for all files, "
                        "which stays (default: a temporary one)")
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.keep:
        folder = args.keep.resolve()
        if folder.exists():
            fail(f"--keep {args.keep} is there already; give a new folder")
        folder.mkdir(parents=True)
    else:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="a rehearsal "))
    try:
        for act in (encode_images, train_teacher, train_students, change_flags, sweep_snapshots,
                    follow_the_hint):
            act(folder)
    finally:
        for program in PROGRAMS:           # those that are left if an act has failed
            if program.process.poll() is None:
                program.kill_all(program.children())
        if not args.keep:
            shutil.rmtree(folder)
    print(f"{len(FAULTS)} faults, in {time.perf_counter() - begun:.0f} s")
    for fault in FAULTS:
        print(f"  {fault}")
    sys.exit(bool(FAULTS))


if __name__ == "__main__":
    main()
