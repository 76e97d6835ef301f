"""FACM on waveforms [B, 1, 64], with a small 1-D convolutional network, in under a minute on a CPU.

    python examples/one_dimension.py --out waves.png

A waveform is a sum of two sines with random phases: a slow sine of two periods, and a fast one of
six or seven. This file draws them. A teacher learns the velocity of the flow, and FACM distils it.
The picture shows real waveforms, one Euler step of the teacher, twenty Euler steps, and one step of
the student, the last three from the same noise. The table compares their spectra.

facm.py and flow.py need no change, because the losses and the samplers work on tensors [B, ...] of
any shape.
"""

import argparse
import copy
import math
import pathlib
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import facm
import flow
from jvp import fused, with_tangent

LENGTH = 64
SLOW, FAST = torch.tensor([2]), torch.tensor([6, 7])                   # periods of the two sines


def draw_waves(n):
    """Waveforms [n, 1, LENGTH]: a slow sine of amplitude 0.8 and a fast one of 0.5."""
    place = torch.arange(LENGTH) / LENGTH
    wave = torch.zeros(n, LENGTH)
    for amplitude, choices in ((0.8, SLOW), (0.5, FAST)):
        frequency = choices[torch.randint(len(choices), (n, 1))]
        phase = torch.rand(n, 1)
        wave = wave + amplitude * torch.sin(2 * math.pi * (frequency * place + phase))
    return wave[:, None]


class Block(torch.nn.Module):
    """A residual block whose channels are shifted by the embedding of the time."""

    def __init__(self, width, dilation):
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, width)
        self.time = torch.nn.Linear(width, width)
        self.conv1 = torch.nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation,
                                     padding_mode="circular")
        self.conv2 = torch.nn.Conv1d(width, width, 1)

    def forward(self, h, emb):
        shifted = self.norm(h) + self.time(emb)[:, :, None]
        return h + self.conv2(F.silu(self.conv1(F.silu(shifted))))


class ConvNet(torch.nn.Module):
    """Waveforms x [B, 1, 64] and times t [B] in [0, 2] -> velocities [B, 1, 64]."""

    def __init__(self, width=64):
        super().__init__()
        self.frequencies = torch.nn.Buffer(math.pi / 2 * torch.arange(1, 9))
        self.embed = torch.nn.Sequential(
            torch.nn.Linear(16, width), torch.nn.SiLU(), torch.nn.Linear(width, width))
        self.first = torch.nn.Conv1d(4, width, 1)
        self.blocks = torch.nn.ModuleList([Block(width, dilation) for dilation in (1, 2, 4)])
        self.last = torch.nn.Conv1d(width, 4, 1)

    def forward(self, x, t, s=None, y=None):
        angles = t[:, None] * self.frequencies
        emb = self.embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        # Four neighbouring values become four channels
        h = self.first(x.reshape(len(x), LENGTH // 4, 4).transpose(1, 2))
        for block in self.blocks:
            h = block(h, emb)
        return self.last(h).transpose(1, 2).reshape(len(x), 1, LENGTH)


def optimise(net, loss_of, steps, batch, lr):
    """Trains net with the loss loss_of(net, x1) of waveforms x1."""
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = loss_of(net, draw_waves(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return net


def train_teacher(steps=700, batch=64):
    """A network that learns the velocity of the flow at the times t and 2 - t."""
    def loss_of(net, x1):
        t = flow.sample_t(torch.randn(len(x1)))
        mixed = torch.rand(len(x1)) < 0.5
        return flow.flow_loss(net, x1, torch.randn_like(x1), t, None, mixed=mixed)

    return optimise(ConvNet(), loss_of, steps, batch, lr=1e-2).requires_grad_(False)


def train_student(teacher, steps=700, batch=64):
    """A network that draws a waveform in one step. It begins with the teacher's weights."""
    def loss_of(net, x1):
        x0 = torch.randn_like(x1)
        t = facm.sample_t(torch.randn(len(x1)))
        L_fm, L_cm = facm.facm_loss(with_tangent(net), fused, x1, x0, t, None, teacher=teacher)
        return L_fm + L_cm

    student = copy.deepcopy(teacher).requires_grad_(True)
    return optimise(student, loss_of, steps, batch, lr=1e-3)


def spectrum(waves):
    """The amplitudes [n, LENGTH / 2 + 1] of the frequencies of waveforms [n, 1, LENGTH]."""
    return torch.fft.rfft(waves[:, 0]).abs() / (LENGTH / 2)


def measure(waves, reference):
    """Two figures of waveforms. The first is the distance of their mean spectrum to that of the
    reference, relative to the norm of the latter. The second is the mean fraction of a waveform's
    power in its two strongest frequencies, which is 1 for a sum of two sines."""
    mean, expected = spectrum(waves).mean(dim=0), spectrum(reference).mean(dim=0)
    distance = (mean - expected).norm() / expected.norm()
    power = spectrum(waves).square()
    strongest = power.topk(2, dim=1).values.sum(dim=1)
    return distance.item(), (strongest / power.sum(dim=1)).mean().item()


def draw_picture(path, rows, columns=6, width=150, height=70, margin=130):
    """A PNG with the first waveforms of each row of {label: waves [n, 1, LENGTH]}."""
    sheet = Image.new("RGB", (margin + columns * width, len(rows) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for row, (label, waves) in enumerate(rows.items()):
        middle = (row + 0.5) * height
        canvas.text((8, middle), label, "black", anchor="lm")
        for column in range(columns):
            wave = waves[column, 0].clamp(-1.6, 1.6)
            across = margin + (column + 0.05 + 0.9 * torch.arange(LENGTH) / LENGTH) * width
            up = middle - wave * height * 0.28
            canvas.line(list(zip(across.tolist(), up.tolist())), "navy", width=2)
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="waves.png", help="the PNG to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = train_teacher()
    student = train_student(teacher)
    noise = torch.randn(1, 1000, 1, LENGTH)
    rows = {
        "real": draw_waves(1000),
        "teacher, 1 step": flow.integrate(teacher, noise, None, nfe=1),
        "teacher, 20 steps": flow.integrate(teacher, noise, None, nfe=20),
        "student, 1 step": facm.sample(student, noise, None, nfe=1),
    }
    reference = draw_waves(10_000)
    print("1,000 waveforms      distance of the mean spectrum   power in two frequencies")
    for label, waves in rows.items():
        distance, share = measure(waves, reference)
        print(f"{label:20} {distance:30.3f} {share:26.1%}")
    draw_picture(args.out, rows)
    print(f"{args.out}: six waveforms of each")


if __name__ == "__main__":
    main()
