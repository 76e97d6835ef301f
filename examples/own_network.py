"""FACM, DE-CM and GCM with another network than those of models.py: points of two rings, in half a
minute on a CPU.

    python examples/own_network.py

A network is any callable net(x, t, s, y). Here it is an MLP, x are points [B, 2], and y is the
number of the ring, of radius 0.5 or 1.5, to which a point belongs. A teacher is trained by flow
matching. The student of each method begins with the teacher's weights and draws a point in one
step. The loss functions are imported from the scripts without a change.

The derivative `fused` needs a network that carries tangents, and with_tangent makes one of the MLP.
`exact` and `fd` call the MLP directly.

DIRECTION OF TIME: as in facm.py and decm.py, t=0 noise, t=1 data. The time of gcm.py runs from the
data to the noise, and gcm.precondition with velocity=True reverses it for the network.
"""

import copy
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import decm
import facm
import flow
import gcm
from jvp import fused, with_tangent

RADII = torch.tensor([0.5, 1.5])           # of the rings with the labels 0 and 1
SIGMA_DATA = 0.79                          # the standard deviation of a coordinate


class Mlp(torch.nn.Module):
    """Points x [B, 2], times t and s [B] (s may be None), labels y [B] -> velocities [B, 2]."""

    def __init__(self, width=128):
        super().__init__()
        self.first = torch.nn.Linear(2 + 2 + 2, width)                 # point, time, label
        self.second_time = torch.nn.Linear(2, width)
        self.rest = torch.nn.Sequential(
            torch.nn.SiLU(), torch.nn.Linear(width, width),
            torch.nn.SiLU(), torch.nn.Linear(width, width),
            torch.nn.SiLU(), torch.nn.Linear(width, 2))
        # Zero, so that a student with a second time begins as its teacher without one
        torch.nn.init.zeros_(self.second_time.weight)
        torch.nn.init.zeros_(self.second_time.bias)

    def forward(self, x, t, s=None, y=None):
        time = torch.stack([t, t.square()], dim=1)
        label = torch.nn.functional.one_hot(y, 2).to(x.dtype)
        h = self.first(torch.cat([x, time, label], dim=1))
        if s is not None:
            h = h + self.second_time(torch.stack([s, s.square()], dim=1))
        return self.rest(h)


def draw_points(n):
    """Points [n, 2] of the rings, and their labels [n]."""
    y = torch.randint(2, (n,))
    angle = 2 * math.pi * torch.rand(n)
    x = RADII[y][:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return x, y


def optimise(net, loss_of, steps, batch, lr):
    """Trains net with the loss loss_of(net, x1, y) of points x1 and labels y."""
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = loss_of(net, *draw_points(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def train_teacher(steps=1500, batch=512):
    """A network that learns the velocity of the flow at the times t and, for FACM, 2 - t."""
    def loss_of(net, x1, y):
        t = flow.sample_t(torch.randn(len(x1)))
        mixed = torch.rand(len(x1)) < 0.5
        return flow.flow_loss(net, x1, torch.randn_like(x1), t, y, mixed=mixed)

    return optimise(Mlp(), loss_of, steps, batch, lr=5e-3).requires_grad_(False)


def train_facm(teacher, steps=1000, batch=512):
    """A student of FACM, for which the time, t or 2 - t, selects one of the two tasks."""
    def loss_of(net, x1, y):
        x0 = torch.randn_like(x1)
        t = facm.sample_t(torch.randn(len(x1)))
        L_fm, L_cm = facm.facm_loss(with_tangent(net), fused, x1, x0, t, y, teacher=teacher)
        return L_fm + L_cm

    student = copy.deepcopy(teacher).requires_grad_(True)
    return optimise(student, loss_of, steps, batch, lr=2e-3)


def train_decm(teacher, steps=1000, batch=512):
    """A student of DE-CM, with a second time. Here every step has both losses."""
    def loss_of(net, x1, y):
        net = with_tangent(net)
        x0 = torch.randn_like(x1)
        t = torch.rand(len(x1))
        r = torch.minimum(0.02 * torch.rand(len(x1)), t)
        L_fm, L_cm, (xt, v) = decm.decm_loss(net, fused, x1, x0, t, y, teacher=teacher)
        L_fm_2, L_n2n = decm.n2n_loss(net, fused, x1, x0, xt, v, r, t, y, teacher=teacher)
        return L_fm + L_cm + L_fm_2 + L_n2n

    student = copy.deepcopy(teacher).requires_grad_(True)
    return optimise(student, loss_of, steps, batch, lr=2e-3)


def train_gcm(teacher, steps=1000, batch=512):
    """A network of GCM, which begins with the teacher's weights and then learns only from data."""
    def loss_of(net, x, y):
        f = gcm.precondition(net, sigma_d=SIGMA_DATA, velocity=True)
        z = SIGMA_DATA * torch.randn_like(x)
        t, s, density = gcm.sample_times(torch.rand(4, len(x)), sigma_d=SIGMA_DATA)
        return gcm.gcm_loss(f, None, x, z, t, s, density, y)

    student = copy.deepcopy(teacher).requires_grad_(True)
    return optimise(student, loss_of, steps, batch, lr=2e-3)


def one_step(method, net, noise, y):
    """Points [B, 2], drawn in one step from noise [1, B, 2]."""
    if method == "FACM":
        return facm.sample(net, noise, y, nfe=1)
    if method == "DE-CM":
        return decm.sample(net, noise, y, nfe=1)
    if method == "GCM":
        return gcm.sample(net, noise, y, nfe=1, restart=True, sigma_d=SIGMA_DATA, velocity=True)
    return flow.integrate(net, noise, y, nfe=1)


def radii_of(method, net, n=2000):
    """For each label the mean radius of n one-step samples, and its standard deviation."""
    noise = torch.randn(1, n, 2, generator=torch.Generator().manual_seed(1))
    found = []
    for label in range(len(RADII)):
        y = torch.full((n,), label)
        radius = one_step(method, net, noise, y).norm(dim=1)
        found.append((radius.mean().item(), radius.std().item()))
    return found


def main():
    torch.manual_seed(0)
    print("radius of 2,000 one-step samples of each label; expected are 0.50 and 1.50, +- 0.00")
    teacher = train_teacher()
    students = {
        "teacher": teacher,
        "FACM": train_facm(teacher),
        "DE-CM": train_decm(teacher),
        "GCM": train_gcm(teacher),
    }
    for method, net in students.items():
        (inner, inner_std), (outer, outer_std) = radii_of(method, net)
        print(f"{method:8} {inner:.2f} +- {inner_std:.2f}, {outer:.2f} +- {outer_std:.2f}")


if __name__ == "__main__":
    main()
