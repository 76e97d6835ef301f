"""FACM's loss on a network that is not ours: points of a ring, in one step, in 15 seconds on a CPU.

    python examples/own_network.py

A network is any callable net(x, t, s, y); here it is an MLP of points [B, 2, 1, 1]. From scratch:
no teacher, no labels, the second time s is always None. `fused` takes it by with_tangent; `exact`
and `fd` would take it as it is.
"""

import functools
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from facm import WEIGHTS, facm_loss, sample, sample_t
from jvp import fused, with_tangent


class Mlp(torch.nn.Module):
    """Points x [B, 2, 1, 1] and times t [B] -> velocities [B, 2, 1, 1]."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.SiLU(), torch.nn.Linear(width, width),
            torch.nn.SiLU(), torch.nn.Linear(width, 2))

    def forward(self, x, t, s=None, y=None):
        times = torch.stack([t, t.square()], dim=1)
        return self.layers(torch.cat([x.flatten(1), times], dim=1))[:, :, None, None]


def train(steps=1500, batch=512):
    """A network that draws points of a ring of radius 1 in one step."""
    torch.manual_seed(0)
    net = Mlp()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    alpha, beta = (functools.partial(WEIGHTS[name], p=0.5) for name in ("1-t^p", "cos"))
    for step in range(steps):
        angle = 2 * math.pi * torch.rand(batch)
        x1 = torch.stack([angle.cos(), angle.sin()], dim=1)[:, :, None, None]
        t = sample_t(torch.randn(batch), P_mean=-0.8, P_std=1.6)
        L_fm, L_cm = facm_loss(with_tangent(net), fused, x1, torch.randn_like(x1), t, None,
                               alpha=alpha, beta=beta)
        optimizer.zero_grad()
        (L_fm + L_cm).backward()
        optimizer.step()
    return net


if __name__ == "__main__":
    points = sample(train(), torch.randn(1, 2000, 2, 1, 1), None, nfe=1)
    radius = points.flatten(1).norm(dim=1)
    print(f"radius of 2,000 one-step samples: {radius.mean():.2f} +- {radius.std():.2f}, wanted 1")
