"""How good is a run on glyphs or MNIST? Share of digits recognised and Frechet distance, beside the
teacher's and those of real digits.

    python benchmarks/quickstart.py runs/facm-glyphs
    python benchmarks/quickstart.py runs/facm-mnist

A small classifier is trained on real digits (some minutes on 2 cores, then kept in runs/): on 20,000
glyphs of seed 1, or on MNIST's training images. It judges n samples of each sampler, n/10 of each
digit: the share whose digit it recognises, and the Frechet distance of its 64 features to those of
real digits: 20,000 glyphs of seed 2, or MNIST's training images. Blurred digits are recognised too,
so the distance is the figure that counts. The teacher's 20 Euler steps with the guidance that was
distilled are the yardstick. The last row is n other real digits: glyphs of seed 3, or test images.
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

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import data
import fid
import sample
from common import checkpoints, flags, folders
from common.messages import fail


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
        h = self.body(torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
        return h if features else self.head(h)


def real_images(name, size, part, n=20_000):
    """uint8 images [N, size, size, C] and labels int64 [N] of the data set `name`. part: "classifier",
    "reference" or "test"; n: so many glyphs."""
    if name == "glyphs":
        return data.glyphs(n, size, seed=dict(classifier=1, reference=2, test=3)[part])
    return data.read_torchvision(name, "data", train=part != "test")


def train_classifier(images, labels, seen=160_000, batch=128):
    """seen: images in training, which are 8 epochs of glyphs and 2 of MNIST."""
    torch.manual_seed(0)
    n, labels = len(images), torch.as_tensor(labels)
    images = torch.as_tensor(images)
    net, epochs = Classifier(images.shape[3]), seen // n
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (n // batch))
    for _ in range(epochs):
        for index in torch.randperm(n)[: n - n % batch].view(-1, batch):
            F.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return net.eval()


def load_classifier(name, size):
    """The classifier of this data set's images of this size: from runs/, or trained and put there."""
    path, real = pathlib.Path("runs") / f"{name}{size}-classifier.pt", real_images(name, size, "classifier")
    if path.exists():
        net = Classifier(real[0].shape[3])
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    print(f"training the classifier, once, for some minutes; it is kept as {path}")
    net = train_classifier(*real)
    path.parent.mkdir(exist_ok=True)
    checkpoints.save(path, net.state_dict())
    return net


@torch.no_grad()
def judge(net, images, labels):
    """The share recognised, and mean and covariance of the features."""
    h = torch.cat([net(part, features=True) for part in torch.as_tensor(images).split(1000)])
    share = (net.head(h).argmax(1) == torch.as_tensor(labels)).double().mean().item()
    h = h.double().numpy()
    return share, h.mean(0), np.cov(h, rowvar=False)


def measure(net, images, labels, reference):
    """The share recognised, and the Frechet distance to the reference (mean, covariance)."""
    share, *moments = judge(net, images, labels)
    with contextlib.redirect_stderr(io.StringIO()):    # a note that some features are always 0
        return share, fid.frechet_distance(*moments, *reference)


def provenance():
    """What a file of figures says about where they come from."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return dict(torch=torch.__version__, cores=os.cpu_count(), machine=platform.machine(),
                command=shlex.join(["python", *sys.argv]),
                commit=subprocess.run(git, text=True, capture_output=True).stdout.strip())


# The samplers that are measured, with their NFE
SAMPLERS = {
    "facm": [(None, 1), (None, 2)],        # None: the method's own
    "decm": [("cm", 1), ("cm", 2), *((s, n) for n in (4, 8, 16) for s in ("cm", "mix", "euler")),
             ("euler", 50)],
    "gcm": [(None, 1), (None, 2)],
    "baselines": [(None, 1), (None, 2)]}


def main():
    p = flags.Parser(description="Recognised share and Frechet distance of a run on glyphs or MNIST.")
    p.add_argument("run", type=pathlib.Path, help="run folder of a script's --data glyphs or mnist")
    p.add_argument("--n", type=int, default=2000, help="samples for each row")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    p.add_argument("--log", action="store_true", help="add a line to RUN/distance.jsonl: the step, and "
                   "the student's figures alone")
    args = p.parse_args()
    folders.check_output(args.json)
    if args.n < 100:
        fail(f"--n {args.n}: 64 features want 100 samples or more")
    try:
        student, teacher = sample.load(args.run / "ckpt.pt"), None     # network and checkpoint
        method, train = student[1]["method"], student[1]["args"]
        if train["data"] not in ("glyphs", "mnist", "fashion"):
            raise ValueError(f"{args.run} is a run on {train['data']}; this judges glyphs and MNIST")
        if train["teacher"] or train["pretrain"]:
            teacher = sample.load(train["teacher"] or args.run / "teacher.pt")
    except ValueError as e:
        fail(e)
    rows = [(f"student, NFE {nfe}" + (method == "decm") * f", {sampler}", student, sampler, nfe, None)
            for sampler, nfe in SAMPLERS[method]]
    if teacher and not args.log:
        w = train["w"]
        rows += [(f"teacher, 20 Euler steps, w {w}", teacher, "euler", 20, w)]
        rows += [(f"teacher, 50 Euler steps, w {w}", teacher, "euler", 50, w)] * (method == "decm")
        rows += [("teacher, 20 Euler steps", teacher, "euler", 20, 1),
                 ("teacher, 1 Euler step", teacher, "euler", 1, 1)]
    name, size, labels = train["data"], train["net"]["input_size"], torch.arange(args.n) % 10
    net = load_classifier(name, size)
    _, *reference = judge(net, *real_images(name, size, "reference"))

    print(f"{args.run}: {args.n} samples a row, seed {args.seed}\n{'':32}recognised  distance")
    figures = {}
    tests = real_images(name, size, "test", args.n)
    for row, weights, sampler, nfe, w in [*rows, ("other real digits", None, None, None, None)]:
        judged = tests if weights is None else (sample.draw(
            *weights, nfe, labels, args.seed, sampler=sampler, cfg=w), labels)
        share, distance = measure(net, *judged, reference)
        figures[row] = dict(recognised=share, distance=distance)
        print(f"{row:32}{share:10.1%}{distance:10.2f}", flush=True)
    if args.log:
        with open(args.run / "distance.jsonl", "a") as f:
            f.write(json.dumps(dict(step=student[1]["step"], figures=figures)) + "\n")
    if args.json:
        args.json.write_text(json.dumps(dict(
            figures=figures, n=args.n, seed=args.seed, steps=train["steps"], batch=train["batch"],
            pretrain=train.get("pretrain"), **provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
