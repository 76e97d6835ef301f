"""Prints what every preset needs, which is the table of docs/runs.md, by --dry-run of the scripts.

    python benchmarks/dry_runs.py
    python benchmarks/dry_runs.py --measure          # compares the estimated memory with a measured one

A row is a preset with 1 and with 8 processes: the parameters, the memory of a process, and the
hours, for the rate of an H100 that --dry-run prints. Neither data nor a GPU are needed. All rows
take a quarter of an hour on 2 busy cores. The hours of a student do not include those of its
teacher, which are in a row of flow.py.
"""

import importlib
import os
import pathlib
import re
import resource
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import flags
from common.run import Run
from data import Zeros

ROWS = [
    "flow.py --data cifar10",
    "facm.py --data cifar10",
    "decm.py --data cifar10",
    "gcm.py --data cifar10",
    "gcm.py --data cifar10 --row L",
    "gcm.py --data cifar10 --preset cifar10_finetune --init edm-cifar10-32x32-uncond-vp.pkl",
    "baselines.py --data cifar10",
    "flow.py --data imagenet_latents",
    "facm.py --data imagenet_latents",
    "facm.py --data imagenet_latents --grad-checkpoint",
    "decm.py --data imagenet_latents",
    "facm.py --data imagenet_latents --net name=LightningDiT-1p6B/1 --fsdp --grad-checkpoint",
    "gcm.py --data imagenet64.zip --preset imagenet64_finetune "
    "--init edm2-img64-s-1073741-0.075.pkl",
    "gcm.py --data imagenet64.zip --preset imagenet64_finetune "
    "--init edm2-img64-xl-0671088-0.040.pkl --lr 7e-4 --net name=EDM2-XL dropout=0.5 dropout_res=16",
    "gcm.py --data imagenet_latents",
    "gcm.py --data imagenet_latents --net name=DiT-XL/2 --w 2.5 --kappa 0.92 --guide 0 0.75 "
    "--steps 200000",
    "baselines.py --data imagenet_latents",
    "baselines.py --data imagenet_latents --objective scm",
]

MEASURED = [
    "facm.py --data cifar10 --batch 64 --teacher none "
    "--net name=DDPM++ width=64 mult=1,2 blocks=1",
    "gcm.py --data imagenet_latents --batch 64 --net name=DiT-S/4 --w 1 --precision float32",
    "decm.py --data imagenet_latents --batch 16 --teacher none --w 1 --precision float32 "
    "--net name=LightningDiT patch=1 width=384 depth=12 heads=6",
    "facm.py --data imagenet_latents --batch 16 --teacher none --w 1 --precision float32 "
    "--grad-checkpoint --net name=LightningDiT patch=1 width=384 depth=12 heads=6",
]


def run(words, env=None):
    """The output of a Python program. Ends this program if it fails."""
    done = subprocess.run([sys.executable, "-W", "ignore", *words], capture_output=True, text=True,
                          cwd=ROOT, env=os.environ | (env or {}))
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def dry_run(command, processes):
    """The figures of a dry run, {name: text}."""
    printed = run([*command.split(), "--dry-run", str(processes)])
    patterns = dict(parameters=r"parameters +([\d.]+) M", memory=r"memory +([\d.]+) GiB",
                    hours=r"time +([\d.e+-]+) hours")
    return {name: re.search(pattern, printed).group(1) for name, pattern in patterns.items()}


def print_table():
    """Prints a row for each of ROWS. --fsdp needs several processes."""
    print("| command | parameters (M) | GiB, 1 process | hours, 1 process | GiB, 8 processes "
          "| hours, 8 processes |")
    print("|---|---|---|---|---|---|")
    for command in ROWS:
        eight = dry_run(command, 8)
        memory_of_one, hours_of_one = "-", "-"
        if "--fsdp" not in command:
            one = dry_run(command, 1)
            memory_of_one, hours_of_one = one["memory"], f"{float(one['hours']):.0f}"
        print(f"| `{command}` | {eight['parameters']} | {memory_of_one} | {hours_of_one} "
              f"| {eight['memory']} | {float(eight['hours']):.0f} |", flush=True)


# --------------------------------------------------------------------------------------------------
# --measure: the memory of a real process.

class OneStep(Run):
    """A run in this process without files."""

    def open_folder(self):
        """Opens no folder."""

    def close(self):
        """Closes nothing."""

    def resume(self, net, ema, optimizer, extra=()):
        """Resumes nothing."""
        self.net, self.begun = net, True

    def log(self, step, **figures):
        """Logs nothing."""

    def save(self):
        """Saves nothing."""

    def preview_is_due(self):
        """Returns False: there are no previews."""
        return False

    def evaluation_is_due(self):
        """Returns False: there are no evaluations."""
        return False


def measure_here(words):
    """Runs one step of a training script on zeros in this process, and prints by how many bytes the
    peak of its memory exceeds its memory before the step.

    words: the script, such as facm.py, and its flags.
    """
    script = importlib.import_module(words[0].removesuffix(".py"))
    sys.argv = [*words, "--device", "cpu", "--steps", "1"]
    args = script.parse_args()
    script.data.load_for = Zeros
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    OneStep(args, script.METHOD, torch.device("cpu"), rank=0, world=1).call(script.train)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak {peak - before}")


def print_measured():
    """Prints a row for each of MEASURED. glibc returns freed memory at once, because memory that it
    keeps would be counted."""
    settings = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536",
                    MALLOC_ARENA_MAX="1")
    print("| command | GiB, estimated | GiB, measured |")
    print("|---|---|---|")
    for command in MEASURED:
        estimated = float(dry_run(command, 1)["memory"])
        printed = run([__file__, "--measure-here", *command.split()], settings)
        measured = int(re.search(r"peak (\d+)", printed).group(1)) / 2 ** 30
        print(f"| `{command}` | {estimated:.2f} | {measured:.2f} |", flush=True)


def main():
    if sys.argv[1:2] == ["--measure-here"]:
        measure_here(sys.argv[2:])
        return
    p = flags.Parser(description="What every preset needs, by --dry-run of the training scripts.")
    p.add_argument("--measure", action="store_true", help="compare the estimated memory with that "
                   "of a real process")
    if p.parse_args().measure:
        print_measured()
    else:
        print_table()


if __name__ == "__main__":
    main()
