"""For how long does a save stop training, and how much memory does it need?

    python benchmarks/saving.py
    python benchmarks/saving.py --width 384 --json saving.json

A DiT with its average and AdamW's moments is saved as a training script saves it: the state is
copied, and a thread writes it. "Written at once" is the time of writing the same checkpoint without
a thread, for which training would stop. Memory is the peak of the process, beyond what it held
before the save. Two processes with --fsdp are started by torchrun --nproc_per_node=2.
"""

import copy
import json
import os
import pathlib
import sys
import tempfile
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import quickstart

import models
from common import checkpoints, flags, processes
from common.run import Run


def memory(name):
    """VmRSS or VmHWM of this process: its memory now, or at most, in bytes (Linux)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def reset_peak():
    """Makes VmHWM the memory of now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def main():
    parser = flags.Parser(description="How long a save stops training.")
    parser.add_argument("--width", type=int, default=768, help="width of the DiT, with 12 blocks")
    parser.add_argument("--fsdp", action="store_true", help="shard over torchrun's processes")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file as well")
    args = parser.parse_args()
    device, rank, world = processes.start("cpu")
    net = models.create("DiT", input_size=32, width=args.width, depth=12, heads=args.width // 64, seed=0)
    ema = copy.deepcopy(net).requires_grad_(False)
    if args.fsdp:
        models.shard(net)
        models.shard(ema)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        settings = flags.argparse.Namespace(
            out=folder, fresh=False, steps=10, log_every=1, save_every=1, keep_every=None, preview_every=1,
            vae=None, eval_every=None, tensorboard=False, net=dict(in_channels=4, input_size=32))
        run = Run(settings, "flow", device, rank, world)
        run.resume(net, ema, optimizer)
        reset_peak()
        before = memory("VmRSS")
        begun = time.perf_counter()
        run.start_writing(snapshot=False)
        stopped = time.perf_counter() - begun
        run.finish_writing()
        written = time.perf_counter() - begun
        peak = memory("VmHWM") - before
        processes.barrier()
        size = os.path.getsize(pathlib.Path(folder) / "ckpt.pt")
        if rank == 0:
            checkpoint = checkpoints.read(pathlib.Path(folder) / "ckpt.pt")
            begun = time.perf_counter()
            checkpoints.save(pathlib.Path(folder) / "again.pt", checkpoint)
            at_once = time.perf_counter() - begun
        run.close()
    print(f"process {rank} of {world}: training stops for {stopped:.2f} s, the file is whole after "
          f"{written:.2f} s; memory rises by {peak / 2 ** 20:.0f} MiB")
    if rank == 0:
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{parameters / 1e6:.0f} M parameters, checkpoint of {size / 2 ** 20:.0f} MiB, written "
              f"at once in {at_once:.2f} s: training stops for {stopped / at_once:.0%} of that")
        if args.json:
            args.json.write_text(json.dumps(dict(
                parameters=parameters, bytes=size, stopped_s=stopped, written_s=written,
                at_once_s=at_once, peak_bytes=peak, processes=world, fsdp=args.fsdp,
                **quickstart.provenance()), indent=2) + "\n")
    processes.end()


if __name__ == "__main__":
    main()
