"""examples/: the losses in other people's code."""

import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import own_network


def test_facms_loss_trains_a_network_that_is_not_ours():
    """A short run already draws a ring: the radius of its one-step samples, against noise's 1.25 +- 0.66."""
    net = own_network.train(steps=300, batch=256)
    with torch.no_grad():
        x0 = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(1))
        radius = (x0 + net(x0, torch.zeros(1000))).flatten(1).norm(dim=1)
    assert abs(radius.mean() - 1) < 0.2 and radius.std() < 0.35
