"""Measures how much the FID of a checkpoint varies with the seed of the samples.

    python benchmarks/fid_repeat.py runs/facm-glyphs/ckpt.pt --ref glyphs:2 --features net.pt
    python benchmarks/fid_repeat.py CKPT --ref cifar10-32x32.npz --n 50000 --nfe 1 2 --seeds 3

For each NFE and each seed, fid.py measures --n samples, with the same number of samples of each
class, as sample.py draws them by default. The figure is the FID, or with --features the Frechet
distance of the features of a TorchScript network. The script prints the mean and the standard
deviation (with n - 1) over the seeds. A difference between two checkpoints that is not larger than
this deviation has no meaning. All figures have the same bias, which is larger for fewer samples.
"""

import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import quickstart

import fid
import sample
from common import evaluation, flags, folders, processes
from common.messages import fail


def distances(args, device):
    """{NFE: a distance for every seed}, and what the distance is called.

    Raises ValueError for a checkpoint, reference or network that cannot be read.
    """
    if args.features and args.inception:
        raise ValueError("--features replaces Inception; leave out --inception")
    if args.ref_n is not None and not fid.is_glyphs(args.ref):
        raise ValueError(f"--ref-n is the number of glyphs, but the reference is {args.ref}; leave it out")
    net, checkpoint = sample.load(args.ckpt, device)
    size = checkpoint["args"]["net"]["input_size"]
    if checkpoint["args"]["net"]["in_channels"] not in (1, 3):
        raise ValueError(f"{args.ckpt} draws latents; sample them by sample.py --vae, and compare by fid.py")
    decode, _, _ = sample.load_decoder(None, None, checkpoint, device)
    glyphs = evaluation.GLYPHS if args.ref_n is None else args.ref_n
    judge = evaluation.load_judge(args.ref, args.features, args.inception, size=size, glyphs=glyphs, device=device)
    found = {nfe: [] for nfe in args.nfe}
    for nfe in args.nfe:
        chosen = sample.choose_sampler(net, checkpoint, nfe)
        for seed in range(args.seed, args.seed + args.seeds):
            figures = evaluation.measure(net, checkpoint, chosen, args.n, judge, decode, device, seed=seed)
            found[nfe] += figures.values()
            print(f"NFE {nfe}, seed {seed}: {found[nfe][-1]:.4f}", flush=True)
    return found, "FID" if judge.name == fid.INCEPTION else f"Frechet distance ({judge.name})"


@processes.program("use a smaller network")
def main():
    p = flags.Parser(description="Mean and deviation of a checkpoint's FID over the seeds of its samples.")
    p.add_argument("ckpt", type=pathlib.Path, help="checkpoint of a script here")
    p.add_argument("--ref", required=True, help="reference, as for fid.py")
    p.add_argument("--ref-n", type=int, help="number of glyphs, if they are the reference (default: 20000)")
    p.add_argument("--features", type=pathlib.Path, help="TorchScript file in place of Inception; it is executed")
    p.add_argument("--inception", type=pathlib.Path, help="file of Inception's weights")
    p.add_argument("--n", type=int, default=2000, help="samples for each figure")
    p.add_argument("--nfe", type=int, nargs="+", default=[1, 2], help="numbers of function evaluations")
    p.add_argument("--seeds", type=int, default=3, help="number of seeds")
    p.add_argument("--seed", type=int, default=0, help="the first seed")
    p.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    p.add_argument("--json", type=pathlib.Path, help="file to which the figures are also written")
    args = p.parse_args()
    folders.check_output(args.json)
    if min(args.n, args.seeds) < 2 or min(args.nfe) < 1:
        fail("--n and --seeds must be at least 2, --nfe at least 1")
    device, _, _ = processes.start(args.device)
    try:
        found, name = distances(args, device)
    except ValueError as e:
        fail(" ".join(str(e).split()))
    print(f"{args.ckpt}: {name} to {args.ref}, {args.n} samples, {args.seeds} seeds from {args.seed} on")
    figures = {}
    for nfe, values in found.items():
        figures[f"NFE {nfe}"] = dict(mean=statistics.mean(values), std=statistics.stdev(values), values=values)
        print(f"NFE {nfe:<4}{statistics.mean(values):10.4f} +- {statistics.stdev(values):.4f}")
    if args.json:
        args.json.write_text(json.dumps(dict(
            figures=figures, distance=name, ref=args.ref, n=args.n, seed=args.seed,
            **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
