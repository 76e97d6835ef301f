"""How long does saving a checkpoint stop training, and how much memory does it need?

    python benchmarks/saving.py
    python benchmarks/saving.py --width 384 --json saving.json

A DiT with its average and AdamW's moments is saved in two ways. "now" is the way of the training
scripts: the state is copied, and a thread writes the copy while training continues. "in the loop"
is the way of version 0.2: every process gathers the whole state, and training waits until the first
process has written it. Both are measured in one process, and in two processes with --fsdp.

Each case runs in a separate program. Times are medians over several saves: the seconds for which
training stops, in the process that waits longest, and the seconds until the file is complete.
Memory is that of each process, before the first save and at its peak, without the file cache of the
system.
"""

import argparse
import copy
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import quickstart

import models
from common import checkpoints, flags, processes
from common.messages import fail
from common.run import Run

WAYS = ("in the loop", "now")
SAVES = 3                                  # of each case


def memory(name):
    """VmRSS or VmHWM of this process: its current or its peak memory, in bytes (Linux)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def reset_peak():
    """Resets VmHWM to the current memory."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


# --------------------------------------------------------------------------------------------------
# One case: a program that measures itself.

def begin_run(folder, width, fsdp, device, rank, world):
    """A Run whose network, average and optimiser can be saved."""
    net = models.create("DiT", input_size=32, width=width, depth=12, heads=width // 64, seed=0)
    ema = copy.deepcopy(net).requires_grad_(False)
    if fsdp:
        models.shard(net)
        models.shard(ema)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    settings = argparse.Namespace(
        out=folder, fresh=False, steps=10, log_every=1, save_every=1, keep_every=None, preview_every=1,
        vae=None, eval_every=None, tensorboard=False, net=dict(in_channels=4, input_size=32))
    run = Run(settings, "flow", device, rank, world)
    run.resume(net, ema, optimizer)
    return run


def save_now(run):
    """Saves as Run.save does. Returns the seconds for which training stops, and those until the
    file is complete."""
    begun = time.perf_counter()
    run.start_writing(snapshot=False)
    stopped = time.perf_counter() - begun
    run.finish_writing()
    return stopped, time.perf_counter() - begun


def whole(state):
    """A nested dict in which sharded tensors are gathered, in every process."""
    if isinstance(state, dict):
        return {name: whole(part) for name, part in state.items()}
    if hasattr(state, "full_tensor"):
        return state.full_tensor()
    return state


def save_in_the_loop(run):
    """Saves as version 0.2 did (commit c576019). Returns the same as save_now. The other processes
    wait in the next step, where the gradients are averaged."""
    begun = time.perf_counter()
    checkpoint = whole(dict(
        model=run.net.state_dict(), ema=run.ema.state_dict(), optimizer=run.optimizer.state_dict()))
    if run.rank == 0:
        checkpoints.save(run.folder / "ckpt.pt", run.as_checkpoint() | checkpoint)
    processes.barrier()
    stopped = time.perf_counter() - begun
    return stopped, stopped


def measure(way, width, fsdp):
    """Measures one case. Process 0 prints the figures as JSON."""
    device, rank, world = processes.start("cpu")
    folder = tempfile.mkdtemp() if rank == 0 else None
    if world > 1:
        folders = [folder]
        dist.broadcast_object_list(folders)
        folder = folders[0]
    run = begin_run(folder, width, fsdp, device, rank, world)
    reset_peak()
    before = memory("VmRSS")
    save = save_now if way == "now" else save_in_the_loop
    times = []
    for _ in range(SAVES):
        processes.barrier()
        times.append(save(run))
    own = dict(stopped=statistics.median(stopped for stopped, _ in times),
               written=statistics.median(written for _, written in times),
               before=before, peak=memory("VmHWM"))
    found = [own]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, own)
    run.close()
    if rank == 0:
        path = run.folder / "ckpt.pt"
        parameters = sum(p.numel() for p in run.net.parameters())
        print(json.dumps(dict(
            way=way, processes=world, fsdp=fsdp, parameters=parameters, bytes=os.path.getsize(path),
            stopped_s=max(one["stopped"] for one in found), written_s=found[0]["written"],
            before_bytes=[one["before"] for one in found], peak_bytes=[one["peak"] for one in found])))
        for path in sorted(run.folder.rglob("*"), reverse=True):
            path.unlink()
        run.folder.rmdir()
    processes.end()


# --------------------------------------------------------------------------------------------------
# All cases.

def start(way, width, count):
    """Measures a case in a separate program with `count` processes. Returns its figures."""
    launcher = [sys.executable]
    if count > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    words = [*launcher, __file__, "--way", way, "--width", str(width)]
    if count > 1:
        words.append("--fsdp")
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        fail(f"{way}, {count} processes: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def gib(sizes):
    """A text for the bytes of each process."""
    return " and ".join(f"{size / 2 ** 30:.2f}" for size in sizes)


def main():
    parser = flags.Parser(description="How long a save stops training.")
    parser.add_argument("--width", type=int, default=1088, help="width of the DiT, with 12 blocks")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--way", choices=WAYS, help="measure one case in this process")
    parser.add_argument("--fsdp", action="store_true", help="with --way: shard across the "
                        "processes of torchrun")
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.width, args.fsdp)
        return
    cases = []
    for count in (1, 2):
        for way in WAYS:
            case = start(way, args.width, count)
            cases.append(case)
            print(f"{count} processes, {way}: training stops for {case['stopped_s']:.2f} s, the file is "
                  f"complete after {case['written_s']:.2f} s; GiB before {gib(case['before_bytes'])}, at "
                  f"most {gib(case['peak_bytes'])}", flush=True)
    print(f"{cases[0]['parameters'] / 1e6:.0f} M parameters, checkpoint of {gib([cases[0]['bytes']])} GiB")
    if args.json:
        figures = dict(cases=cases, saves=SAVES, threads=torch.get_num_threads())
        args.json.write_text(json.dumps(figures | quickstart.provenance(), indent=2) + "\n")


if __name__ == "__main__":
    main()
