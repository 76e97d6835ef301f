"""FID of every checkpoint of a run, at several guidance scales: a table, a JSON file, a curve.

    python benchmarks/sweep.py runs/facm-imagenet_latents --ref VIRTUAL_imagenet256_labeled.npz --vae VAE --nfe 1 2 --n 5000
    python benchmarks/sweep.py runs/flow-cifar10 --ref cifar10 --nfe 50 --w 1 1.5 2 --is
    torchrun --nproc_per_node=8 benchmarks/sweep.py RUN --ref REF --samples 50000

The checkpoints are step-*.pt, which --keep-every writes, and ckpt.pt. Sample i is drawn from --seed
and i, as in sample.py, so all rows have the same noise. RUN/sweep.json keeps the rows. The same
command measures only rows that are missing there: those of new or changed checkpoints, and those
that new flags add. So it can be interrupted, and repeated while the run trains. If matplotlib is
installed, it also draws a curve, RUN/sweep.png.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import fid
import sample
from common import checkpoints, evaluation, flags, folders, processes, weights
from common.messages import fail

SCORES = ("IS", "IS std")


def parse_args():
    p = flags.Parser(description="FID of every checkpoint of a run, at several NFEs and guidance scales.")
    a = p.add_argument
    a("run", type=pathlib.Path, help="run folder of a training script")
    a("--ref", required=True, help="reference, as for fid.py")
    a("--nfe", type=flags.number(int, 1), nargs="+", default=[1, 2], help="numbers of function evaluations")
    a("--w", type=flags.number(float), nargs="+", default=[None], help="guidance scales, for a run of flow.py; 1 is none")
    a("--cfg-interval", type=float, nargs=2, metavar=("T0", "T1"), help="guide from time T0 to T1, "
      "as in sample.py")
    a("--sampler", help="sampler, as for sample.py (default: the method's)")
    a("--n", "--samples", type=flags.number(int, 2), default=5000, help="samples for each row; torchrun needs the long "
      "name, because it reads --n as the beginning of its own flags")
    a("--is", action="store_true", dest="score", help="also measure the Inception Score")
    a("--features", type=pathlib.Path, help="TorchScript network instead of Inception, "
      "such as DINOv2; the file is executed")
    a("--inception", type=pathlib.Path, help="Inception's weights, as for fid.py")
    a("--vae", help="checkpoint of the autoencoder that makes images from latents")
    a("--seed", type=int, default=0, help="seed of the samples")
    a("--out", type=pathlib.Path, help="NAME.json for the rows; NAME.png beside it is the curve (default: RUN/sweep.json)")
    a("--device", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    args = p.parse_args()
    if args.features and (args.score or args.inception):
        fail("--is and --inception belong to Inception, which --features replaces; leave them out")
    args.out = args.out or args.run / "sweep.json"
    if args.out.suffix != ".json":
        fail(f"--out {args.out}: the name must end in .json")
    return args


# --------------------------------------------------------------------------------------------------
# The rows, and which of them are finished.

def checkpoints_of(run):
    """[(path, its checkpoint), ...] of a run folder, in the order of their steps. If a snapshot has
    the step of ckpt.pt, it has the same weights, and ckpt.pt is left out."""
    paths = sorted(run.glob("step-*.pt"))
    if (run / "ckpt.pt").exists():
        paths.append(run / "ckpt.pt")
    found = {}
    for path in paths:
        checkpoint = checkpoints.read(path)
        found.setdefault(checkpoint["step"], (path, checkpoint))
    if not found:
        raise ValueError(f"{run}: neither ckpt.pt nor step-*.pt is there")
    return [found[step] for step in sorted(found)]


def content(path):
    """An identifier of a file's contents, the name of a folder or data set, or None for None."""
    if path is None or not os.path.isfile(path):
        return path and str(path)
    return f"{pathlib.Path(path).name} {checkpoints.fingerprint(path)}"


def rows_asked_for(args, device):
    """The settings of each requested row, dicts without figures. Raises ValueError for flags that
    do not fit the checkpoints."""
    common = dict(sampler=args.sampler, cfg_interval=args.cfg_interval, n=args.n, seed=args.seed, device=device.type,
                  ref=content(args.ref), vae=content(args.vae), features=content(args.features))
    rows = []
    for path, checkpoint in checkpoints_of(args.run):
        guided = weights.is_velocity(checkpoint)
        if not guided and (args.w != [None] or args.cfg_interval):
            raise ValueError(f"--w and --cfg-interval guide a flow-matching network; {path} is one of "
                             f"{checkpoint['method']}.py, which is sampled without guidance; leave them out")
        if args.cfg_interval and all(w in (None, 1) for w in args.w):
            raise ValueError("--cfg-interval has no effect without guidance; add --w")
        for w in args.w:
            for nfe in args.nfe:
                rows.append(dict(checkpoint=path.name, step=checkpoint["step"],
                                 fingerprint=checkpoints.fingerprint(path), w=w, nfe=nfe, **common))
    return rows


def read_rows(path):
    """The rows of a JSON file; none if there is no file. Raises ValueError for other files."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        return [dict(row) for row in rows]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} does not hold rows of this program; remove it, or use another --out") from None


def find(row, finished, score):
    """The finished row with the same settings, or None. score: it must have the Inception Score."""
    for old in finished:
        if all(old.get(key) == value for key, value in row.items()) and ("IS" in old or not score):
            return old
    return None


def write_rows(path, rows):
    """Writes the rows into a file beside `path`, then renames it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dict(rows=rows), indent=1) + "\n")
    os.replace(part, path)


# --------------------------------------------------------------------------------------------------
# The measurements.

def sweep(args, device, rank, world):
    """Measures the rows that are not finished, and writes each one immediately. Returns all
    requested rows, with their figures."""
    # The first process looks, because a run that trains may save between two processes' looks
    asked, kept = processes.from_first(lambda: (rows_asked_for(args, device), read_rows(args.out)))
    todo = [row for row in asked if not find(row, kept, args.score)]
    if rank == 0:
        print(f"{args.run}: {len(asked)} rows, {len(todo)} of them to be measured", flush=True)
    judge, path = None, None
    for row in todo:
        if path != args.run / row["checkpoint"]:
            path = args.run / row["checkpoint"]
            net, checkpoint = load(path, row["fingerprint"], device, world)
            decode, factor, _ = sample.load_decoder(args.vae, None, checkpoint, device)
        if judge is None:
            size = factor * checkpoint["args"]["net"]["input_size"]
            judge = evaluation.load_judge(args.ref, args.features, args.inception, size=size, device=device,
                                          data_dir=checkpoint["args"].get("data_dir"), rank=rank, world=world)
        chosen = sample.choose_sampler(net, checkpoint, row["nfe"], args.sampler, cfg=row["w"],
                                       cfg_interval=args.cfg_interval if row["w"] not in (None, 1) else None)
        figures = evaluation.measure(net, checkpoint, chosen, args.n, judge, decode, device, rank, world, args.seed,
                                     args.score)
        kept.append(row | figures)
        if rank == 0:
            write_rows(args.out, kept)
            shown = ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items())
            print(f"{row['checkpoint']}, {name_of(row)}: {shown}", flush=True)
    return [find(row, kept, args.score) for row in asked]


def load(path, fingerprint, device, world):
    """The network of a checkpoint, and the checkpoint. Raises ValueError, on all processes, if the
    run has saved in the meantime, so that a process has read a different file than the first."""
    net, checkpoint = sample.load(path, device)
    problem = None
    if checkpoints.fingerprint(path) != fingerprint:
        problem = f"{path} was replaced while it was read; the same command continues"
    fid.raise_together(problem, world)
    return net, checkpoint


# --------------------------------------------------------------------------------------------------
# Table and curve.

def name_of(row):
    """The name of a row's settings, such as "NFE 2" or "NFE 2, w 1.5"."""
    name = f"NFE {row['nfe']}"
    if row["w"] is not None:
        name += f", w {row['w']:g}"
    return name


def figures_in(rows):
    """The names of the figures, in order."""
    return [name for name in rows[0] if name in ("FID", "IS") or name.startswith("Frechet distance")]


def print_table(rows):
    """Prints a line for each row."""
    names = figures_in(rows)
    print(f"{'checkpoint':18}{'step':>9}  {'':16}" + "".join(f"{name:>12}" for name in names))
    for row in rows:
        figures = "".join(f"{row[name]:>{max(12, len(name))}.3f}" for name in names)
        print(f"{row['checkpoint']:18}{row['step']:>9}  {name_of(row):16}{figures}")


def draw_curve(path, rows):
    """Draws a panel for each figure: over the steps, or over the guidance scales of a single step.
    Prints a note if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no curve without matplotlib: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    over_w = len({row["step"] for row in rows}) == 1 and rows[0]["w"] is not None
    names = figures_in(rows)
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names):
        curves = {}                        # {label: [(x, figure), ...]}
        for row in rows:
            label, x = name_of(row), row["step"]
            if over_w:
                label, x = f"NFE {row['nfe']}", row["w"]
            curves.setdefault(label, []).append((x, row[name]))
        for label, points in curves.items():
            axis.plot(*zip(*sorted(points)), marker="o", label=label)
        axis.set(title=f"{name}, {rows[0]['n']:,} samples", xlabel="guidance scale" if over_w else "step")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


@processes.program("use a smaller network; the rows that are finished are kept")
def main():
    args = parse_args()
    if not args.run.is_dir():
        fail(f"{args.run}: no such run folder")
    folders.check_output(args.out)
    device, rank, world = processes.start(args.device, precision="float32")
    try:
        with evaluation.apart(device):
            rows = sweep(args, device, rank, world)
    except (ValueError, OSError) as e:
        fail(" ".join(str(e).split()))
    processes.end()
    if rank == 0:
        print_table(rows)
        draw_curve(args.out.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
