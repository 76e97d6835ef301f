"""How good is a glyphs run? Share of digits recognised and Frechet distance, beside the teacher's.

    python benchmarks/quickstart.py runs/facm-glyphs

A small classifier is trained on real glyphs (seed 1; a minute on 2 cores, then kept in runs/). It
judges n samples of each sampler, n/10 of each digit: the share whose digit it recognises, and the
Frechet distance of its 64 features to those of 20,000 real glyphs (seed 2). Blurred digits are
recognised too, so the distance is the figure that counts. The teacher's 20 Euler steps with the
guidance that was distilled are the yardstick.
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
import flags
import run
import sample


class Classifier(nn.Module):
    """uint8 images [N, H, W, 3] -> logits [N, 10], and 64 features with features=True."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images, features=False):
        h = self.body(torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
        return h if features else self.head(h)


def train_classifier(size, epochs=8, n=20_000, batch=128):
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a) for a in data.glyphs(n, size, seed=1))
    net, steps = Classifier(), epochs * (n // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(n)[: n - n % batch].view(-1, batch):
            F.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return net.eval()


def load_classifier(size):
    """The classifier of glyphs of this size: from runs/, or trained and put there."""
    path = pathlib.Path("runs") / f"glyphs{size}-classifier.pt"
    net = Classifier()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    print(f"training the classifier, once, for a minute; it is kept as {path}")
    net = train_classifier(size)
    path.parent.mkdir(exist_ok=True)
    run.save_checkpoint(path, net.state_dict())
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
    with contextlib.redirect_stderr(io.StringIO()):    # a note that some features are 0 for all glyphs
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
    p = flags.Parser(description="Recognised share and Frechet distance of a glyphs run.")
    p.add_argument("run", type=pathlib.Path, help="run directory of a script's --data glyphs")
    p.add_argument("--n", type=int, default=2000, help="samples for each row")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    args = p.parse_args()
    run.check_output(args.json)
    if args.n < 100:
        run.fail(f"--n {args.n}: 64 features want 100 samples or more")
    try:
        student, teacher = sample.load(args.run / "ckpt.pt"), None     # network and checkpoint
        method, train = student[1]["method"], student[1]["args"]
        if train["data"] != "glyphs":
            raise ValueError(f"{args.run} is a run on {train['data']}; this judges glyphs")
        if train["teacher"] or train["pretrain"]:
            teacher = sample.load(train["teacher"] or args.run / "teacher.pt")
    except ValueError as e:
        run.fail(e)
    rows = [(f"student, NFE {nfe}" + (method == "decm") * f", {sampler}", student, sampler, nfe, None)
            for sampler, nfe in SAMPLERS[method]]
    if teacher:
        w = train["w"]
        rows += [(f"teacher, 20 Euler steps, w {w}", teacher, "euler", 20, w)]
        rows += [(f"teacher, 50 Euler steps, w {w}", teacher, "euler", 50, w)] * (method == "decm")
        rows += [("teacher, 20 Euler steps", teacher, "euler", 20, 1),
                 ("teacher, 1 Euler step", teacher, "euler", 1, 1)]
    size, labels = train["net"]["input_size"], torch.arange(args.n) % 10
    net = load_classifier(size)
    _, *reference = judge(net, *data.glyphs(20_000, size, seed=2))

    print(f"{args.run}: {args.n} samples a row, seed {args.seed}\n{'':32}recognised  distance")
    figures = {}
    for name, weights, sampler, nfe, w in [*rows, ("real glyphs", None, None, None, None)]:
        images = data.glyphs(args.n, size, seed=3)[0] if weights is None else sample.draw(
            *weights, nfe, labels, args.seed, sampler=sampler, cfg=w)
        share, distance = measure(net, images, labels, reference)
        figures[name] = dict(recognised=share, distance=distance)
        print(f"{name:32}{share:10.1%}{distance:10.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(dict(
            figures=figures, n=args.n, seed=args.seed, steps=train["steps"], batch=train["batch"],
            pretrain=train.get("pretrain"), **provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
