"""How good is a run on glyphs or MNIST? The fraction of recognised digits and a Frechet distance,
beside those of its teacher and of real digits.

    python benchmarks/quickstart.py runs/facm-glyphs
    python benchmarks/quickstart.py runs/facm-mnist
    python benchmarks/quickstart.py runs/flow-glyphs       # only a teacher

A small classifier is trained on real digits: on 20,000 glyphs of seed 1, or on MNIST's training
images. This takes some minutes on 2 cores, and the classifier is kept in runs/. For n samples of
each sampler, n/10 of each digit, we measure the fraction whose digit the classifier recognises, and
the Frechet distance of its 64 features to those of real digits, which are 20,000 glyphs of seed 2
or MNIST's training images. The classifier also recognises blurred digits, so the distance is the
figure that matters.

The goal of a student is the distance of its teacher's 20 Euler steps with guidance, which it was
trained to follow. Because the distance depends on the number of samples, the last row shows it for
n real digits that neither network has seen: glyphs of seed 3 or MNIST's test images.
"""

import contextlib
import io
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import facm
import fid
import sample
from common import checkpoints, flags, folders
from common.messages import fail

RESULTS = ROOT / "benchmarks" / "results"
# A run is compared with the default run of its script if these flags are the same
COMPARED = ["data", "preset", "steps", "batch", "lr", "seed"]

# --------------------------------------------------------------------------------------------------
# The classifier and its figures.

class Classifier(nn.Module):
    """uint8 images [N, H, W, C] -> logits [N, 10], or 64 features with features=True."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images, features=False):
        x = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        h = self.body(x)
        return h if features else self.head(h)


def real_images(name, size, part, n=20_000):
    """uint8 images [N, size, size, C] and labels int64 [N] of the data set `name`.

    part: "classifier", "reference" or "test". n: the number of glyphs; MNIST ignores it.
    """
    if name == "glyphs":
        seeds = dict(classifier=1, reference=2, test=3)
        return data.glyphs(n, size, seed=seeds[part])
    images, labels = data.read_torchvision(name, "data", train=part != "test")
    if images.shape[1] != size:
        images = data.scale_arrays(images, size)
    return images, labels


def train_classifier(images, labels, seen=160_000, batch=128):
    """Trains a classifier of these images. seen: the number of images in training, which is 8
    epochs of glyphs or about 2 of MNIST."""
    torch.manual_seed(0)
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    net = Classifier(images.shape[3])
    epochs, steps = seen // len(images), len(images) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))[:steps * batch]
        for index in order.view(steps, batch):
            loss = F.cross_entropy(net(images[index]), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return net.eval()


def load_classifier(name, size):
    """The classifier of this data set's images of this size, from runs/ or trained and saved there.
    """
    path = pathlib.Path("runs") / f"{name}{size}-classifier.pt"
    images, labels = real_images(name, size, "classifier")
    if path.exists():
        net = Classifier(images.shape[3])
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    print(f"training the classifier, once, for some minutes; it is kept as {path}")
    net = train_classifier(images, labels)
    path.parent.mkdir(exist_ok=True)
    checkpoints.save(path, net.state_dict())
    return net


@torch.no_grad()
def judge(net, images, labels):
    """The fraction of images that are recognised, and mean and covariance of their features."""
    batches = torch.as_tensor(images).split(1000)
    h = torch.cat([net(batch, features=True) for batch in batches])
    right = net.head(h).argmax(dim=1) == torch.as_tensor(labels)
    h = h.double().numpy()
    return right.double().mean().item(), h.mean(0), np.cov(h, rowvar=False)


def reference_of(net, name, size):
    """Mean and covariance of the features of real digits, with which samples are compared."""
    _, mean, covariance = judge(net, *real_images(name, size, "reference"))
    return mean, covariance


def measure(net, images, labels, reference):
    """The fraction of images that are recognised, and the Frechet distance to the reference."""
    share, mean, covariance = judge(net, images, labels)
    with contextlib.redirect_stderr(io.StringIO()):    # a note that some features are always 0
        return share, fid.frechet_distance(mean, covariance, *reference)


# --------------------------------------------------------------------------------------------------
# Runs and their teachers.

def teacher_of(train):
    """The network and the checkpoint of a student's teacher; None if it has none.

    train: the flags of the student's run, a dict. Raises ValueError if the teacher is missing or
    has changed since.
    """
    if "teacher" not in train or train["teacher"] == "none":           # gcm.py's runs have none
        return None
    if train["teacher"] is None:
        path = pathlib.Path("runs") / f"flow-{train['data']}" / "ckpt.pt"
    else:
        path = pathlib.Path(train["teacher"])
    if path.is_dir():
        path = path / "ckpt.pt"
    teacher = sample.load(path)
    if checkpoints.fingerprint(path) != train.get("teacher_id"):
        raise ValueError(f"{path} has changed since this run was trained with it")
    return teacher


def guidance_of(train):
    """The options of a teacher's guided Euler steps: the guidance with which its student was
    trained. For a run of flow.py they are those of FACM's preset for glyphs.

    train: the flags of the run, a dict.
    """
    w, t_low = train.get("w"), train.get("t_low", 0.0)
    if w is None:
        w, t_low = facm.PRESETS["glyphs"]["w"], facm.PRESETS["glyphs"]["t_low"]
    if w == 1:
        return dict(sampler="euler")
    return dict(sampler="euler", cfg=w, cfg_interval=(t_low, 1.0))


def provenance():
    """What a file of figures records about their origin."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return dict(torch=torch.__version__, cores=os.cpu_count(), machine=platform.machine(),
                command=shlex.join(["python", *sys.argv]),
                commit=subprocess.run(git, text=True, capture_output=True).stdout.strip())


# --------------------------------------------------------------------------------------------------
# The rows of the table.

class Row(NamedTuple):
    """A row of the table, and the samples that it measures."""

    label: str
    network: tuple         # a network and its checkpoint, as sample.load returns them
    nfe: int
    options: dict          # the sampler and its options, for sample.draw


def rows_of_student(student, method):
    """The rows of a run of facm.py, decm.py, gcm.py or baselines.py."""
    if method != "decm":
        return [Row(f"student, NFE {nfe}", student, nfe, {}) for nfe in (1, 2)]
    choices = [("cm", 1), ("cm", 2)]
    for nfe in (4, 8, 16):
        choices += [("cm", nfe), ("mix", nfe), ("euler", nfe)]
    choices.append(("euler", 50))
    return [Row(f"student, NFE {nfe}, {name}", student, nfe, dict(sampler=name))
            for name, nfe in choices]


def rows_of_teacher(teacher, guidance, guided_steps=(20,)):
    """The rows of a run of flow.py."""
    rows = []
    if "cfg" in guidance:
        for nfe in guided_steps:
            label = f"teacher, {nfe} Euler steps, w {guidance['cfg']}"
            rows.append(Row(label, teacher, nfe, guidance))
    plain = dict(sampler="euler")
    rows.append(Row("teacher, 20 Euler steps", teacher, 20, plain))
    rows.append(Row("teacher, 1 Euler step", teacher, 1, plain))
    return rows


def rows_of_checkpoint(path, student_alone=False):
    """The rows of a checkpoint of a run, and its contents. Raises ValueError for a run that cannot
    be measured."""
    network = sample.load(path)
    _, checkpoint = network
    method, train = checkpoint["method"], checkpoint["args"]
    if train["data"] not in ("glyphs", "mnist", "fashion"):
        raise ValueError(f"{path} is of a run on {train['data']}; this judges glyphs and MNIST")
    if method == "flow":
        return rows_of_teacher(network, guidance_of(train)), checkpoint
    rows = rows_of_student(network, method)
    teacher = None if student_alone else teacher_of(train)
    if teacher is not None:
        guided_steps = (20, 50) if method == "decm" else (20,)
        rows += rows_of_teacher(teacher, guidance_of(train), guided_steps)
    return rows, checkpoint


def expected_figures(method, train, n):
    """{label: figures} of the default run of a script, if this run has the same settings; else {}.

    The figures are those of benchmarks/results, if they were measured on `n` samples.
    """
    path = RESULTS / f"default-{method}.json"
    if not path.exists():
        return {}
    expected = json.loads(path.read_text())
    alike = [expected["n"] == n]
    alike += [train.get(name) == value for name, value in expected["flags"].items()]
    return expected["figures"] if all(alike) else {}


# --------------------------------------------------------------------------------------------------
# The program.

class Judge:
    """The classifier of a data set, and the reference with which it compares samples."""

    def __init__(self, name, size):
        self.name, self.size = name, size
        self.classifier = load_classifier(name, size)
        self.reference = reference_of(self.classifier, name, size)

    def judge_rows(self, rows, n, seed, expected):
        """{label: figures} of the rows and of n real digits. Prints each when it is measured."""
        labels = torch.arange(n) % 10
        figures = {}
        for row in rows:
            images = sample.draw(*row.network, row.nfe, labels, seed, **row.options)
            figures[row.label] = self.show(row.label, images, labels, expected)
        real, real_labels = real_images(self.name, self.size, "test", n)
        label = f"{len(real[:n]):,} real digits"
        figures[label] = self.show(label, real[:n], real_labels[:n], expected)
        return figures

    def show(self, label, images, labels, expected):
        """The figures of images. Prints them beside the expected ones."""
        share, distance = measure(self.classifier, images, labels, self.reference)
        line = f"{label:32}{share:10.1%}{distance:10.2f}"
        if label in expected:
            line += "     {recognised:10.1%}{distance:10.2f}".format(**expected[label])
        print(line, flush=True)
        return dict(recognised=share, distance=distance)


def print_head(expected):
    """Prints the header of the table."""
    head = f"{'':32}recognised  distance"
    if expected:
        head += "       expected: recognised, distance"
    print(head)


def log_distances(folder, judge, n, seed):
    """Adds a line to FOLDER/distance.jsonl for each snapshot of a run, and for ckpt.pt, unless it
    has one. A line has the step, and the figures without those of the teacher."""
    path = folder / "distance.jsonl"
    done = set()
    if path.exists():
        done = {json.loads(line)["step"] for line in path.read_text().splitlines()}
    for snapshot in [*sorted(folder.glob("step-*.pt")), folder / "ckpt.pt"]:
        rows, checkpoint = rows_of_checkpoint(snapshot, student_alone=True)
        step = checkpoint["step"]
        if step in done:
            continue
        done.add(step)
        print(f"{snapshot}, step {step}")
        figures = judge.judge_rows(rows, n, seed, {})
        with open(path, "a") as file:
            file.write(json.dumps(dict(step=step, figures=figures)) + "\n")


def main():
    p = flags.Parser(description="Recognised share and Frechet distance of a run on glyphs or "
                     "MNIST.")
    p.add_argument("run", type=pathlib.Path, help="run folder, with --data glyphs or mnist")
    p.add_argument("--n", type=int, default=2000, help="samples for each row")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples")
    p.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    p.add_argument("--log", action="store_true", help="measure the run's snapshots (from "
                   "--keep-every) and its last checkpoint, without the teacher, and add a line for "
                   "each to RUN/distance.jsonl, which curves.py draws")
    args = p.parse_args()
    folders.check_output(args.json)
    if args.n < 100:
        fail(f"--n {args.n}: 64 features need 100 samples or more")
    try:
        rows, checkpoint = rows_of_checkpoint(args.run / "ckpt.pt", student_alone=args.log)
        train = checkpoint["args"]
        if train.get("uncond"):
            fail(f"{args.run} was trained without labels (--uncond), so that there is no digit to "
                 "recognise")
        judge = Judge(train["data"], train["net"]["input_size"])
        if args.log:
            log_distances(args.run, judge, args.n, args.seed)
            return
    except ValueError as e:
        fail(e)

    print(f"{args.run}: {args.n} samples a row, seed {args.seed}")
    expected = expected_figures(checkpoint["method"], train, args.n)
    print_head(expected)
    figures = judge.judge_rows(rows, args.n, args.seed, expected)
    if expected:
        print("Runs with other numbers of threads or other processors round differently, and their "
              "figures differ from the expected ones by chance: docs/evaluation.md says how much.")
    if args.json:
        text = json.dumps(dict(
            figures=figures, n=args.n, seed=args.seed, steps=train["steps"], batch=train["batch"],
            teacher=train.get("teacher"), flags={name: train.get(name) for name in COMPARED},
            **provenance()), indent=2)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
