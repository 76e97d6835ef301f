"""Measures the difference D = v_cond - v_uncond of a teacher, for the ETA of decm.py --vel-norm.

    python benchmarks/eta.py --teacher runs/flow-glyphs
    python benchmarks/eta.py --data imagenet_latents --teacher TEACHER.pt      # needs both

The flags are those of decm.py. The program prints percentiles of the length |D|, the norm over all
pixels and channels, for 16 batches with the noise and the times of decm.py: for all times, and for
four intervals of them. With --vel-norm ETA every D gets the length ETA.
"""

import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import decm
from common import processes, teachers
from common.messages import fail
from common.seeds import generator
from jvp import in_one_pass

BATCHES = 16


@torch.no_grad()
def lengths(teacher, args, dataset, device):
    """Times t [N] and the lengths |D| [N] of the samples of BATCHES batches."""
    times, norms = [], []
    for step in range(BATCHES):
        x1, y = processes.to_device(
            dataset.batch(args.seed, step * args.batch, args.batch, slice(None)), device)
        random = generator(device, args.seed, "step", step)
        x0 = torch.randn(x1.shape, generator=random, device=device)
        normal = torch.randn(args.batch, generator=random, device=device)
        uniform = torch.rand((4, args.batch), generator=random, device=device)[2]      # as in train
        t = decm.sample_t(args.times, normal, uniform, args.P_mean, args.P_std, args.segments)
        xt = decm.interpolate(x1, x0, t)
        null = torch.full_like(y, teacher.num_classes)
        v_cond, v_uncond = in_one_pass(teacher, (xt, t, None, y), (xt, t, None, null))
        times.append(t)
        norms.append((v_cond - v_uncond).flatten(1).norm(dim=1))
    return torch.cat(times).cpu(), torch.cat(norms).cpu()


def print_row(name, norms):
    """Prints the percentiles 10, 50 and 90 of a row."""
    low, median, high = norms.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"| {name} | {len(norms)} | {low:.2f} | {median:.2f} | {high:.2f} |")


@processes.program("use a smaller --batch")
def main():
    args = decm.parse_args()
    if args.teacher in (None, "none"):
        fail("name the teacher by --teacher")
    device, _, _ = processes.start(args.device, precision="float32")
    path = pathlib.Path(args.teacher)
    try:
        dataset = data.load_for(args)
        decm.check(args, data.fit_network_to(dataset, args.net))
        teacher, _ = teachers.load(path / "ckpt.pt" if path.is_dir() else path, args, dataset, device)
    except (ValueError, OSError) as e:
        fail(" ".join(str(e).split()))
    t, norms = lengths(teacher, args, dataset, device)
    print("| times | samples | 10% | 50% | 90% |")
    print("|---|---|---|---|---|")
    print_row("all", norms)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (low <= t) & ((t < low + 0.25) | (low == 0.75))
        if inside.any():
            print_row(f"{low} to {low + 0.25}", norms[inside])


if __name__ == "__main__":
    main()
