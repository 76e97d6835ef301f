"""Measures the cost of the exact derivative in a GCM step, compared with the finite difference.

    python benchmarks/derivative.py             # CPU: CIFAR-10's DDPM++ and DiT-B/4, batch 4
    python benchmarks/derivative.py --device cuda --batch 512     # needs a GPU

This is the comparison of GCM's Table 7j. A step has the loss, the backward pass and the optimiser
(VU, w = 1), and each case runs in a separate process. The time is the median of the steps after the
first, for 1000 images. The memory is the peak of the tensors on a GPU. On the CPU it is the peak of
the whole process, and the part that the interpreter and PyTorch need is printed as "before".
"""

import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import gcm
import models
from common import flags
from common.messages import fail
from jvp import JVP

NETWORKS = {
    "DDPM++": dict(name="DDPM++", input_size=32, in_channels=3, dropout=0.2),
    "DiT-B/4": dict(name="DiT-B/4", input_size=32, in_channels=4, num_classes=1000),
}


def parse_args():
    p = flags.Parser(description="Time and memory of the exact derivative and of the difference.")
    p.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=list(NETWORKS),
                   help="networks")
    p.add_argument("--net", nargs="+", default=[], metavar="K=V", help="options of both networks")
    p.add_argument("--batch", type=int, default=4, help="images in a step")
    p.add_argument("--steps", type=int, default=5, help="steps that are timed, after one more")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--case", nargs=2, help="one case in this process: network and --jvp")
    args = p.parse_args()
    if min(args.batch, args.steps) < 1:
        fail("--batch and --steps must be at least 1")
    return args


def peak(device):
    """The highest memory so far, in bytes: of tensors on a GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name, way, args):
    """Seconds for 1000 images and peak bytes of training steps with --jvp fused, exact or fd."""
    device = torch.device(args.device)
    before = peak(device)
    options = NETWORKS[name] | flags.parse_net_options(args.net)
    torch.manual_seed(0)
    net = models.create(**options, second_time=True, device=device)
    optimizer = torch.optim.RAdam(net.parameters(), 1e-4)
    f = gcm.precondition(net, second_time=True)
    shape = (args.batch, options["in_channels"], options["input_size"], options["input_size"])
    seconds = []
    for step in range(args.steps + 1):
        start = time.perf_counter()
        x = torch.randn(shape, device=device)
        z = 0.5 * torch.randn(shape, device=device)
        t, s, density = gcm.sample_times(torch.rand(4, args.batch, device=device), variant="VU")
        y = torch.zeros(args.batch, dtype=torch.int64, device=device)
        models.seed_dropout(net, step, rows=args.batch)
        loss = gcm.gcm_loss(f, JVP[way], x, z, t, s, density, y, difference=way == "fd")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    sec_per_kimg = statistics.median(seconds[1:]) * 1000 / args.batch
    return dict(sec_per_kimg=sec_per_kimg, peak=peak(device), before=before)


def main():
    args = parse_args()
    if args.case:
        print(json.dumps(measure(*args.case, args)))
        return
    print(f"{args.device}, batch {args.batch}, torch {torch.__version__}")
    print(f"{'network':10}{'derivative':>12}{'s/1000 images':>15}{'peak MiB':>10}{'before':>8}")
    for name in args.nets:
        for way in ("fused", "exact", "fd"):
            done = subprocess.run([sys.executable, *sys.argv, "--case", name, way],
                                  capture_output=True, text=True)
            if done.returncode:
                fail(f"{name}, {way}: {done.stderr.strip().splitlines()[-1]}")
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:10}{way:>12}{row['sec_per_kimg']:15.2f}{row['peak'] / 2 ** 20:10.0f}"
                  f"{row['before'] / 2 ** 20:8.0f}", flush=True)


if __name__ == "__main__":
    main()
