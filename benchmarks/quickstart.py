"""How good is a glyphs checkpoint? Share of digits recognised and Frechet distance, at each NFE, beside the teacher's.

    python benchmarks/quickstart.py runs/facm-glyphs

A small classifier is trained on real glyphs (seed 1; about a minute on 2 cores, kept in runs/). Then `--n` samples of
each sampler, n/10 of each digit, are judged by it: the share whose digit it recognises, and the Frechet distance of
its 64 features to those of 20,000 real glyphs (seed 2). Blurred digits are recognised too, so the distance is the
figure that counts. The run's teacher.pt gives the yardstick: 20 Euler steps with the guidance that is distilled.
"""

import pathlib
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import data
import facm
import models
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
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (n // batch))
    for _ in range(epochs):
        for index in torch.randperm(n)[: n - n % batch].view(-1, batch):
            F.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return net.eval()


def load_classifier(size):
    path = pathlib.Path("runs") / f"glyphs{size}-classifier.pt"
    net = Classifier()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    print(f"training the classifier once, a minute or so; it is kept as {path}")
    net = train_classifier(size)
    path.parent.mkdir(exist_ok=True)
    torch.save(net.state_dict(), path)
    return net


@torch.no_grad()
def judge(net, images, labels=None):
    """Mean and covariance of the features, and the share recognised (None without labels)."""
    images = torch.as_tensor(images)
    h = torch.cat([net(part, features=True) for part in images.split(1000)])
    share = None
    if labels is not None:
        share = (net.head(h).argmax(1) == torch.as_tensor(labels)).float().mean().item()
    h = h.double().numpy()
    return h.mean(0), np.cov(h, rowvar=False), share


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the last trace by symmetric eigenvalues."""
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def samples(path, sampler, nfe, n, w=1.0, seed=0):
    """n samples, class i % 10, from the averaged weights of a checkpoint: uint8 images and labels."""
    checkpoint = models.read_checkpoint(path)
    train = checkpoint["args"]
    net = models.create(**train["net"]).eval()
    models.load_weights(net, checkpoint["ema"], path)
    options = dict(condition=train["condition"])
    if sampler == "euler":
        options |= dict(w=w, t_low=train["t_low"])
    shape = (train["net"]["channels"], train["net"]["resolution"], train["net"]["resolution"])
    labels, images = torch.arange(n) % 10, []
    for part in torch.arange(n).split(250):
        noise = sample.draw_noise(seed, part.tolist(), nfe if sampler == "cm" else 1, shape)
        images.append(data.to_uint8(facm.SAMPLERS[sampler](net, noise, labels[part], nfe, **options)))
    return torch.cat(images), labels


def main():
    p = data.Parser(description="Recognised share and Frechet distance of a glyphs run.")
    p.add_argument("run", type=pathlib.Path, help="run directory of facm.py --data glyphs")
    p.add_argument("--n", type=int, default=2000, help="samples for each row")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples")
    args = p.parse_args()
    try:
        train = models.read_checkpoint(args.run / "ckpt.pt")["args"]
        rows = [("student, NFE 1", "ckpt.pt", "cm", 1, 1.0), ("student, NFE 2", "ckpt.pt", "cm", 2, 1.0)]
        if (args.run / "teacher.pt").exists():
            rows += [("teacher, 20 Euler steps, guided", "teacher.pt", "euler", 20, train["w"]),
                     ("teacher, 20 Euler steps", "teacher.pt", "euler", 20, 1.0),
                     ("teacher, 1 Euler step", "teacher.pt", "euler", 1, 1.0)]
    except ValueError as e:
        data.fail(e)
    size = train["net"]["resolution"]
    net = load_classifier(size)
    reference = judge(net, data.glyphs(20_000, size, seed=2)[0])[:2]
    print(f"{args.run}, {args.n} samples each, seed {args.seed}")
    print(f"{'':34}{'recognised':>12}{'distance':>10}")
    result = {}
    for name, path, sampler, nfe, w in rows:
        images, labels = samples(args.run / path, sampler, nfe, args.n, w, args.seed)
        mu, sigma, share = judge(net, images, labels)
        result[name] = share, frechet_distance(mu, sigma, *reference)
        print(f"{name:34}{share:12.1%}{result[name][1]:10.2f}", flush=True)
    mu, sigma, share = judge(net, *data.glyphs(args.n, size, seed=3))
    print(f"{'real glyphs':34}{share:12.1%}{frechet_distance(mu, sigma, *reference):10.2f}")


if __name__ == "__main__":
    main()
