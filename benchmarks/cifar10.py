"""A small network on CIFAR-10 in equal seconds on two cores: does a student reach its teacher?

    python benchmarks/cifar10.py --features resnet56.pt
    python benchmarks/cifar10.py --features resnet56.pt --picture samples.png --curve curve.png

FACM and DE-CM distil one teacher, a run of flow.py. GCM is trained twice: from scratch ("gcm"), for
as long as the teacher and a student together, and from the teacher's weights ("gcm_finetune"), for
as long as a student. Each run uses one thread. 100 steps show how fast it is, and the number of its
steps follows. --teacher-images and --images set how many images a run sees instead, for comparisons
with earlier runs. A run is stopped by SIGTERM now and then and resumed by the same command, so that
it leaves checkpoints on its way. Runs are kept in --out, and the same command resumes a benchmark
that was interrupted.

The measure is the Frechet distance of n samples to all training images, in the features of a
classifier of CIFAR-10: TorchScript, uint8 [N, 3, 32, 32] -> float [N, D]. It is no FID.
"""

import concurrent.futures
import importlib
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
import bakeoff
import quickstart

import data
import facm
import fid
import sample
from common import checkpoints, folders
from common.flags import Parser
from common.log import read_lines
from common.messages import fail

# The presets of MNIST, for a network of 3 M parameters. gcm.py has its own preconditioning, so that
# a network that it trains from scratch needs no sigma_data
FLAGS = ["--device", "cpu", "--xflip", "--log-every", "20"]
NETWORK = ["--net", "width=16", "mult=1,2,4,8"]
PRECONDITIONED = [*NETWORK, "sigma_data=0.5"]
METHODS = ["facm", "gcm", "gcm_finetune", "decm"]
PIECES = 4


# --------------------------------------------------------------------------------------------------
# Training.

def python(*words, seconds=None):
    """Runs a script on one thread. Returns whether it came to its end; else SIGTERM stopped it
    after so many seconds."""
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(f"{words}\n{errors[-2000:]}")
    return True


def step_of(path):
    """The step of a checkpoint."""
    return checkpoints.read(path)["step"]


def train(name, args):
    """Trains the run `name`, and keeps its checkpoints on the way as NAME-piece1.pt, ...; returns
    their paths."""
    method, preset, seconds, images = name, "mnist", args.seconds, args.images
    flags, teacher = [*FLAGS, "--data", args.data], args.out / "flow/ckpt.pt"
    if name == "flow":
        flags += PRECONDITIONED
        seconds, images = args.teacher_seconds, args.teacher_images
    elif name == "gcm":
        flags += [*NETWORK, "--sigma-data", "0.5"]
        seconds = args.teacher_seconds + args.seconds
        images = images and args.teacher_images + images
    elif name == "gcm_finetune":
        method, preset = "gcm", "mnist_finetune"
        flags += [*PRECONDITIONED, "--sigma-data", "0.5", "--init", teacher]
    else:
        flags += [*PRECONDITIONED, "--teacher", teacher]
    flags += ["--preset", preset]
    script, folder, probe = ROOT / f"{method}.py", args.out / name, args.out / f"probe-{name}"

    if not images:                         # the first line of the log has what PyTorch does once
        python(script, *flags, "--steps", 100, "--out", probe)
        lines = [line for line in read_lines(probe / "log.jsonl") if "images_per_s" in line]
        images = seconds * statistics.median_high([line["images_per_s"] for line in lines[1:]])
    batch = importlib.import_module(method).PRESETS[preset]["batch"]
    steps = 50 * max(1, round(images / batch / 50))
    if method == "gcm":
        flags += ["--curriculum", bakeoff.curriculum(preset, steps)]

    pieces, finished = sorted(args.out.glob(f"{name}-piece*.pt"), key=step_of), False
    while not finished:
        finished = python(script, *flags, "--steps", steps, "--out", folder,
                          seconds=seconds / PIECES)
        checkpoint = folder / "ckpt.pt"
        if not pieces or step_of(pieces[-1]) < step_of(checkpoint):
            pieces.append(args.out / f"{name}-piece{len(pieces) + 1}.pt")
            shutil.copy(checkpoint, pieces[-1])
    return pieces


def train_all(args):
    """{run: the paths of its checkpoints}. GCM needs no teacher and begins beside it."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {"flow": pool.submit(train, "flow", args)}
        if "gcm" in args.methods:
            runs["gcm"] = pool.submit(train, "gcm", args)
        runs["flow"].result()
        for name in args.methods:
            if name != "gcm":
                runs[name] = pool.submit(train, name, args)
        return {name: job.result() for name, job in runs.items()}


# --------------------------------------------------------------------------------------------------
# Figures and pictures.

@torch.no_grad()
def moments(features, images):
    """Mean and covariance of the features of uint8 images [N, 32, 32, 3]."""
    batches = torch.as_tensor(images).permute(0, 3, 1, 2).split(500)
    h = torch.cat([features(batch) for batch in batches]).double()
    return h.mean(dim=0), h.T.cov()


def choices_of(name):
    """[(NFE, options of sample.draw), ...] that are measured of a run."""
    if name != "flow":
        return [(1, {}), (2, {})]
    preset = facm.PRESETS["mnist"]         # the guidance that its students follow
    guided = dict(sampler="euler", cfg=preset["w"], cfg_interval=(preset["t_low"], 1.0))
    return [(1, guided), (20, guided)]


def judge_all(args, pieces, real):
    """{label: figures} of all checkpoints, of flow.py's the last alone, and the samples for the
    picture, {label: images}. Each figure is kept in --out as it is measured."""
    features, labels = torch.jit.load(args.features).eval(), torch.arange(args.n) % 10
    reference = moments(features, real)
    kept, figures = args.out / f"figures-{args.n}.json", {}
    if kept.exists():
        figures = json.loads(kept.read_text())
    shown = {"training images": torch.as_tensor(real[:10])}
    for name, paths in pieces.items():
        if name == "flow":
            paths = paths[-1:]
        for path in paths:
            net, checkpoint = sample.load(path)
            images_seen = checkpoint["step"] * checkpoint["args"]["batch"]
            for nfe, options in choices_of(name):
                key = f"{path.stem}, NFE {nfe}"
                if key not in figures:
                    images = sample.draw(net, checkpoint, nfe, labels, **options)
                    distance = fid.frechet_distance(*moments(features, images), *reference)
                    figures[key] = dict(run=name, images=images_seen, nfe=nfe, distance=distance)
                    kept.write_text(json.dumps(figures))
                    print(f"{key}: {images_seen:,} images, {distance:.2f}", flush=True)
                if path == paths[-1]:
                    images = sample.draw(net, checkpoint, nfe, labels[:10], **options)
                    shown[f"{name}\nNFE {nfe}"] = torch.as_tensor(images)
    floor = fid.frechet_distance(*moments(features, real[:args.n]), *reference)
    return figures, shown, floor


def draw_curve(path, rows):
    """Distance over images seen, a line for each run and NFE; the teacher's are points."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {}
    for row in rows:
        line = lines.setdefault((row["run"], row["nfe"]), ([], []))
        line[0].append(row["images"] / 1000)
        line[1].append(row["distance"])
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for (name, nfe), (images, distances) in lines.items():
        style = "o-" if nfe == 1 else "s--"
        axis.plot(images, distances, style, label=f"{name}, NFE {nfe}")
    axis.set(xlabel="images seen in the run, thousands", ylabel="Frechet distance", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    p = Parser(description="A small network on CIFAR-10 in equal seconds on two cores.")
    p.add_argument("--features", required=True, help="TorchScript, uint8 [N, 3, 32, 32] -> [N, D]")
    p.add_argument("--data", default="cifar10", help="cifar10, or an npz of its training images")
    p.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS,
                   help="what is trained and measured")
    p.add_argument("--teacher-seconds", type=float, default=1440, help="of flow matching")
    p.add_argument("--seconds", type=float, default=1440, help="of a method, after the teacher")
    p.add_argument("--teacher-images", type=int, help="images of flow matching, not seconds")
    p.add_argument("--images", type=int, help="images of a method, not seconds")
    p.add_argument("--n", type=int, default=10_000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--out", type=pathlib.Path, default="runs/cifar10", help="folder of the runs")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file as well")
    p.add_argument("--picture", type=pathlib.Path, help="draw samples into this PNG")
    p.add_argument("--curve", type=pathlib.Path, help="draw the distances over images seen, with "
                   "matplotlib, into this PNG")
    args = p.parse_args()
    if bool(args.images) != bool(args.teacher_images):
        fail("--images and --teacher-images belong together")
    for path in (args.json, args.picture, args.curve):
        folders.check_output(path)
    if args.n < 1000 or args.jobs < 1 or min(args.seconds, args.teacher_seconds) < 60:
        fail("--n must be at least 1000, --jobs at least 1, the seconds at least 60")
    if not os.path.exists(args.features):
        fail(f"--features {args.features} is not there")
    if args.curve and not importlib.util.find_spec("matplotlib"):
        fail("--curve draws with matplotlib: pip install matplotlib")
    args.out.mkdir(parents=True, exist_ok=True)
    pieces = train_all(args)

    torch.set_num_threads(args.jobs)
    if args.data == "cifar10":
        real, _ = data.read_torchvision("cifar10", "data")
    else:
        real, _ = data.read_npz(args.data)
    figures, shown, floor = judge_all(args, pieces, real)

    print(f"\nFrechet distance, {args.n} samples; {args.n} training images: {floor:.2f}\n")
    print("| run | images seen | NFE | distance |")
    print("|---|---|---|---|")
    for row in figures.values():
        print(f"| {row['run']} | {row['images']:,} | {row['nfe']} | {row['distance']:.2f} |")
    if args.curve:
        draw_curve(args.curve, figures.values())
    if args.picture:
        images = torch.cat(list(shown.values()))
        data.save_grid(args.picture, images, 10, scale=2, labels=list(shown))
    if args.json:
        text = json.dumps(dict(
            n=args.n, seconds=args.seconds, teacher_seconds=args.teacher_seconds,
            images=args.images, teacher_images=args.teacher_images, figures=figures,
            training_images=floor, **quickstart.provenance()), indent=2)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
