"""Measures the speed of fid.py, compared with code in common use.

    python benchmarks/fid_speed.py
    python benchmarks/fid_speed.py --size 256 --json fid_speed.json

- Features: the Inception of fid.py is compared with the class of pytorch-fid if that is installed,
  and otherwise with inception_v3 of torchvision, which does nearly the same work. The weights are
  random, which does not change the time.
- Distance: fid.frechet_distance is compared with scipy.linalg.sqrtm, on two covariances of 2,048
  features whose eigenvalues fall.
- Neighbours: fid.distances, for precision and recall, is compared with distances from differences.

Both sides alternate on the same device, after a warm-up. The figures are medians with their range,
and the ratios are medians of the ratios of neighbouring calls.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import quickstart

import fid
from common import flags, folders, processes
from common.messages import fail


def other_network(device):
    """The other network, as a function of uint8 images, and its name."""
    try:
        import pytorch_fid.inception
    except ImportError:
        import torchvision
        net = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
        name = "torchvision inception_v3 (stand-in)"

        def prepare(x):
            return 2 * torch.nn.functional.interpolate(
                x.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
    else:
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: fid.Inception().state_dict()
        net, name = pytorch_fid.inception.InceptionV3(), "pytorch-fid"

        def prepare(x):
            return x.float() / 255         # its forward resizes
    net = net.to(device).eval()
    return lambda x: net(prepare(x)), name


def alternate(functions, repeats, device):
    """The seconds of every call of the functions, which alternate `repeats` times after a warm-up."""
    seconds = [[] for _ in functions]
    for k in range(repeats + 1):
        for taken, function in zip(seconds, functions):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [taken[1:] for taken in seconds]


def spectrum(seed, d=2048):
    """A covariance of d features whose eigenvalues fall by four orders of magnitude."""
    x = np.random.default_rng(seed).standard_normal((3 * d, d))
    return np.cov(x * np.exp(-4.6 * np.arange(d) / d), rowvar=False)


def with_sqrtm(mu1, sigma1, mu2, sigma2):
    """The distance in its textbook form."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)


def by_differences(a, b):
    """Euclidean distances from differences, which are exactly 0 between equal samples."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def main():
    p = flags.Parser(description="Speed of fid.py.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--batch", type=int, default=16, help="images at once")
    p.add_argument("--size", type=int, default=32, help="height and width of the images")
    p.add_argument("--repeats", type=int, default=5, help="calls of each side")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    p.add_argument("--json", type=pathlib.Path, help="file to which the figures are also written")
    args = p.parse_args()
    folders.check_output(args.json)
    if min(args.batch, args.size, args.repeats) < 1:
        fail("--batch, --size and --repeats must be at least 1")
    device, _, _ = processes.start(args.device)
    if device.type == "mps":
        fail("--device mps has no float64, which the distances need; use cpu or cuda")
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)

    ours = fid.fuse(fid.Inception()).to(device)
    theirs, name = other_network(device)
    images = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8).to(device)
    with torch.no_grad():
        taken = alternate([lambda: ours(images), lambda: theirs(images)], args.repeats, device)
    rates = [sorted(args.batch / s for s in side) for side in taken]
    ratios = dict(features=statistics.median(b / a for a, b in zip(*taken)))
    moments = [np.zeros(2048), spectrum(0), np.full(2048, 0.1), spectrum(1)]
    distances = []
    taken = alternate([lambda: distances.append(fid.frechet_distance(*moments)),
                       lambda: distances.append(with_sqrtm(*moments))], min(args.repeats, 3), torch.device("cpu"))
    seconds = [sorted(side) for side in taken]
    ratios["distance"] = statistics.median(a / b for a, b in zip(*taken))
    a, b = (torch.rand(n, 2048, dtype=torch.float64, device=device) for n in (500, 1000))
    taken = alternate([lambda: fid.distances(a, b), lambda: by_differences(a, b)], args.repeats, device)
    neighbours = [sorted(1000 * s for s in side) for side in taken]
    ratios["neighbours"] = statistics.median(a / b for a, b in zip(*taken))

    figures = {}
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; median (least to most)")
    for label, side, unit in (("features, fid.py", rates[0], "images/s"), (f"features, {name}", rates[1], "images/s"),
                              ("distance, fid.py", seconds[0], "s"), ("distance, sqrtm", seconds[1], "s"),
                              ("neighbours, fid.py", neighbours[0], "ms"),
                              ("neighbours, differences", neighbours[1], "ms")):
        figures[label] = statistics.median(side)
        print(f"{label:48}{figures[label]:8.2f} {unit} ({side[0]:.2f} to {side[-1]:.2f})")
    print(f"features: {ratios['features']:.2f} times the speed; distance: {ratios['distance']:.3f} of the time, "
          f"and they differ by {abs(distances[0] / distances[1] - 1):.1e} of it; "
          f"neighbours: {ratios['neighbours']:.3f} of the time")
    if args.json:
        args.json.write_text(json.dumps(dict(
            figures=figures, ratios=ratios, batch=args.batch, size=args.size, device=str(device),
            threads=torch.get_num_threads(), **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
