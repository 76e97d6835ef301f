"""A small network on CIFAR-10 in equal seconds on two cores: does a student reach its teacher?

    python benchmarks/cifar10.py --features resnet56.pt
    python benchmarks/cifar10.py --features resnet56.pt --picture samples.png --curve curve.png

FACM and DE-CM start from one teacher; GCM trains from scratch, for the teacher's and a student's
seconds together. Each run uses one thread. 100 steps say how fast it is, and the number of steps
follows. A run is cut into four pieces by SIGTERM; the same command resumes it. Runs are kept in
--out, and an interrupted benchmark goes on where it stopped.

The measure is the Frechet distance of n samples to all training images, in the features of a
classifier of CIFAR-10: TorchScript, uint8 [N, 3, 32, 32] -> float [N, D]. It is no FID.
"""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quickstart

import data
import fid
import sample
from common import checkpoints, folders
from common.flags import Parser
from common.messages import fail

# The preset of MNIST, for a network of 3 M parameters
COMMON = ["--device", "cpu", "--preset", "mnist", "--xflip", "--log-every", "20",
          "--net", "width=16", "mult=1,2,4,8", "sigma_data=0.5"]
PIECES = 4


def python(*words, seconds=None):
    """Runs a script on one thread. True: to its end; False: SIGTERM stopped it after `seconds`."""
    process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(f"{words}\n{errors[-2000:]}")
    return True


def train(name, args):
    """Trains the run `name` and keeps its pieces as NAME-piece1.pt, ...; returns their paths."""
    script = ROOT / ("facm.py" if name == "teacher" else f"{name}.py")
    flags, count, batch, seconds = ["--data", args.data, *COMMON], "--steps", 16, args.seconds
    if name == "teacher":
        flags, count, batch, seconds = [*flags, "--steps", 0], "--pretrain", 32, args.teacher_seconds
    elif name == "gcm":
        seconds += args.teacher_seconds
    else:
        flags += ["--teacher", args.out / "teacher/ckpt.pt"]
    probe, folder = args.out / f"probe-{name}", args.out / name
    python(script, *flags, count, 100, "--out", probe)
    speeds = [line["images_per_s"] for line in map(json.loads, open(probe / "log.jsonl"))]
    steps = round(statistics.median_high(speeds[1:]) * seconds / batch / 50) * 50
    step_of = lambda path: checkpoints.read(path)["step"]  # noqa: E731
    pieces, finished = sorted(args.out.glob(f"{name}-piece*.pt"), key=step_of), False
    while not finished:
        finished = python(script, *flags, count, steps, "--out", folder, seconds=seconds / PIECES)
        if not pieces or step_of(pieces[-1]) < step_of(folder / "ckpt.pt"):
            pieces.append(args.out / f"{name}-piece{len(pieces) + 1}.pt")
            shutil.copy(folder / "ckpt.pt", pieces[-1])
    return pieces


def moments(features, images):
    """Mean and covariance of the features of uint8 images [N, 32, 32, 3]."""
    with torch.no_grad():
        h = torch.cat([features(part.permute(0, 3, 1, 2)) for part in torch.as_tensor(images).split(500)])
    return h.double().mean(0), h.double().T.cov()


def draw_curve(path, rows):
    """Distance over images seen, a line for each run and NFE; the teacher's are points."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, nfe in dict.fromkeys((row["run"], row["nfe"]) for row in rows):
        line = [(row["images"] / 1000, row["distance"]) for row in rows
                if (row["run"], row["nfe"]) == (name, nfe)]
        axis.plot(*zip(*line), "o-" if nfe == 1 else "s--", label=f"{name}, NFE {nfe}")
    axis.set(xlabel="images seen in the run, thousands", ylabel="Frechet distance", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    p = Parser(description="A small network on CIFAR-10 in equal seconds on two cores.")
    p.add_argument("--features", required=True, help="TorchScript, uint8 [N, 3, 32, 32] -> [N, D]")
    p.add_argument("--data", default="cifar10", help="cifar10, or an npz of its training images")
    p.add_argument("--methods", nargs="+", default=["facm", "gcm", "decm"],
                   choices=["facm", "gcm", "decm"], help="what is trained and measured")
    p.add_argument("--teacher-seconds", type=float, default=1440, help="of flow matching")
    p.add_argument("--seconds", type=float, default=1440, help="of each method, after the teacher")
    p.add_argument("--n", type=int, default=10_000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--out", type=pathlib.Path, default="runs/cifar10", help="folder of the runs")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    p.add_argument("--picture", type=pathlib.Path, help="draw samples into this PNG")
    p.add_argument("--curve", type=pathlib.Path, help="draw the distances over the images seen into "
                   "this PNG, with matplotlib")
    args = p.parse_args()
    for path in (args.json, args.picture, args.curve):
        folders.check_output(path)
    if args.n < 1000 or args.jobs < 1 or min(args.seconds, args.teacher_seconds) <= 0:
        fail("--n must be at least 1000, --jobs at least 1, the seconds above 0")
    if not os.path.exists(args.features):
        fail(f"--features {args.features} is not there")
    if args.curve and not importlib.util.find_spec("matplotlib"):
        fail("--curve draws with matplotlib: pip install matplotlib")
    args.out.mkdir(parents=True, exist_ok=True)

    # Train: GCM needs no teacher and begins beside it
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: pool.submit(train, name, args) for name in ("teacher", "gcm")
                if name == "teacher" or name in args.methods}
        runs["teacher"].result()
        runs |= {name: pool.submit(train, name, args) for name in args.methods if name != "gcm"}
        pieces = {name: job.result() for name, job in runs.items()}

    # Judge: each figure is kept as it is measured
    torch.set_num_threads(args.jobs)
    features, labels = torch.jit.load(args.features).eval(), torch.arange(args.n) % 10
    real, _ = (data.read_torchvision("cifar10", "data") if args.data == "cifar10"
               else data.read_npz(args.data))
    reference = moments(features, real)
    kept = args.out / f"figures-{args.n}.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}
    shown = {"training images": torch.as_tensor(real[:10])}
    for name, paths in pieces.items():
        for path in paths[-1:] if name == "teacher" else paths:
            net, checkpoint = sample.load(path)
            images_seen = checkpoint["step"] * (32 if name == "teacher" else 16)
            guided = dict(sampler="euler", cfg=checkpoint["args"]["w"])
            for nfe in (1, 20) if name == "teacher" else (1, 2):
                key, choice = f"{path.stem}, NFE {nfe}", guided if name == "teacher" else {}
                if key not in figures:
                    images = sample.draw(net, checkpoint, nfe, labels, **choice)
                    figures[key] = dict(run=name, images=images_seen, nfe=nfe,
                                        distance=fid.frechet_distance(*moments(features, images), *reference))
                    kept.write_text(json.dumps(figures))
                    print(f"{key}: {images_seen:,} images, {figures[key]['distance']:.2f}", flush=True)
                if path == paths[-1]:
                    shown[f"{name}\nNFE {nfe}"] = torch.as_tensor(
                        sample.draw(net, checkpoint, nfe, labels[:10], **choice))
    floor = fid.frechet_distance(*moments(features, real[:args.n]), *reference)

    print(f"\nFrechet distance, {args.n} samples; {args.n} training images: {floor:.2f}\n")
    print("| run | images seen | NFE | distance |\n|---|---|---|---|")
    for row in figures.values():
        print(f"| {row['run']} | {row['images']:,} | {row['nfe']} | {row['distance']:.2f} |")
    if args.curve:
        draw_curve(args.curve, figures.values())
    if args.picture:
        data.save_grid(args.picture, torch.cat(list(shown.values())), 10, scale=2, labels=list(shown))
    if args.json:
        args.json.write_text(json.dumps(dict(
            n=args.n, seconds=args.seconds, teacher_seconds=args.teacher_seconds, figures=figures,
            training_images=floor, **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
