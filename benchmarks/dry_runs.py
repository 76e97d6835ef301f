"""What every preset takes: the table of docs/runs.md, by --dry-run of the training scripts.

    python benchmarks/dry_runs.py
    python benchmarks/dry_runs.py --measure          # the memory that is told, beside what is taken

A row is a preset with 1 and with 8 processes: parameters, memory of a process, images a second and
hours, both at the share of an H100's rate that --dry-run names. No data and no GPU are needed; all
rows take a quarter of an hour on 2 busy cores. --steps 0 is the pretraining alone, which has its
own hours.
"""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = [
    ("facm.py", "--data cifar10"), ("facm.py", "--data cifar10 --steps 0"), ("decm.py", "--data cifar10"), ("gcm.py", "--data cifar10"),
    ("gcm.py", "--data cifar10 --row L"), ("gcm.py", "--data cifar10 --preset cifar10_finetune"),
    ("baselines.py", "--data cifar10"), ("facm.py", "--data imagenet_latents"),
    ("facm.py", "--data imagenet_latents --steps 0"), ("facm.py", "--data imagenet_latents --grad-checkpoint"), ("decm.py", "--data imagenet_latents"),
    ("facm.py", "--data imagenet_latents --net name=LightningDiT-1p6B/1 --fsdp --grad-checkpoint"),
    ("gcm.py", "--data imagenet64.zip --preset imagenet64_finetune"),
    ("gcm.py", "--data imagenet64.zip --preset imagenet64_finetune --lr 7e-4 --net name=EDM2-XL dropout=0.5 dropout_res=16"),
    ("gcm.py", "--data imagenet_latents"), ("gcm.py", "--data imagenet_latents --net name=DiT-XL/2 --w 2.5 --kappa 0.92 "
                                                      "--guide 0 0.75 --steps 200000"),
    ("baselines.py", "--data imagenet_latents"), ("baselines.py", "--data imagenet_latents --objective scm")]


def figures(script, options, processes):
    """The numbers of a dry run, as text: parameters, GiB, images/s, hours."""
    command = [sys.executable, "-W", "ignore", str(ROOT / script), *options.split(), "--dry-run", str(processes)]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        raise SystemExit(said.stderr)
    return [re.search(pattern, said.stdout).group(1) for pattern in (
        r"parameters +([\d.]+) M", r"memory +([\d.]+) GiB", r"; ([\d.e+-]+) images/s", r"time +([\d.e+-]+) hours")]


MEASURED = [
    ("facm.py", "--data cifar10 --batch 64 --pretrain 0 --w 1 --net name=DDPM++ width=64 mult=1,2 blocks=1"),
    ("gcm.py", "--data imagenet_latents --batch 64 --net name=DiT-S/4 --w 1 --precision float32"),
    ("decm.py", "--data imagenet_latents --batch 16 --pretrain 0 --w 1 --precision float32 "
                "--net name=LightningDiT patch=1 width=384 depth=12 heads=6")]


def measure(script, options):
    """GiB of a process on the CPU: as --dry-run tells it, and as a process holds it at most in one step on zeros, beyond
    what it held before. glibc gives back at once what is freed: what it keeps for later is no need of the tensors."""
    options = ["--device", "cpu", "--steps", "1", "--preview-every", "2", "--out", "runs/memory", "--fresh", *options.split()]
    told = float(figures(script, " ".join(options), 1)[1])
    code = f"""
import resource, sys
import data, dryrun, run, {script[:-3]} as script
from common import dryrun
class NoFiles(Run):
    def save(self, name): pass
sys.argv, Run, run.ctypes = {[script, *options]}, NoFiles, None      # without ctypes glibc keeps these settings
data.load_for, data.save_preview = dryrun.NoData, lambda *a: None
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
script.main()
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)"""
    settings = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | settings)
    if done.returncode:
        raise SystemExit(done.stderr)
    return told, int(re.search(r"peak (\d+)", done.stdout).group(1)) / 2 ** 30


def main():
    if "--measure" in sys.argv:
        print("| command | GiB told | GiB taken |\n|---|---|---|")
        for script, options in MEASURED:
            told, took = measure(script, options)
            print(f"| `{script} {options}` | {told:.2f} | {took:.2f} |", flush=True)
        return
    print("| command | parameters (M) | GiB, 1 process | hours, 1 process | GiB, 8 processes | hours, 8 processes |\n"
          "|---|---|---|---|---|---|")
    for script, options in ROWS:
        one = figures(script, options, 1) if "--fsdp" not in options else ["", "", "", ""]
        eight = figures(script, options, 8)
        print(f"| `{script} {options}` | {eight[0]} | {one[1] or '-'} | {one[3] and f'{float(one[3]):.0f}' or '-'} | "
              f"{eight[1]} | {float(eight[3]):.0f} |", flush=True)


if __name__ == "__main__":
    main()
