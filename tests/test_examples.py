"""examples/: the losses in other people's code."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import own_network


@pytest.fixture(scope="module")
def rings_teacher():
    torch.manual_seed(0)
    return own_network.train_teacher(steps=600, batch=256)


@pytest.mark.parametrize("method", ["FACM", "DE-CM", "GCM"])
def test_the_losses_train_a_network_that_is_not_ours(rings_teacher, method):
    """A short run already draws both rings in one step; one Euler step of the teacher draws none."""
    torch.manual_seed(0)
    train = {"FACM": own_network.train_facm, "DE-CM": own_network.train_decm, "GCM": own_network.train_gcm}[method]
    before = {name: w.clone() for name, w in rings_teacher.state_dict().items()}
    net = train(rings_teacher, steps=300, batch=256)
    assert all(torch.equal(w, before[name]) for name, w in rings_teacher.state_dict().items())
    for radius, (mean, std) in zip(own_network.RADII, own_network.radii_of(method, net)):
        assert abs(mean - radius) < 0.2 * radius and std < 0.35 * radius
    for radius, (mean, _) in zip(own_network.RADII, own_network.radii_of("teacher", rings_teacher)):
        assert mean < 0.6 * radius


def test_the_rings_have_the_standard_deviation_that_gcm_is_given():
    x, y = own_network.draw_points(20_000)
    assert abs(x.std() - own_network.SIGMA_DATA) < 0.01
    assert torch.allclose(x.norm(dim=1), own_network.RADII[y])
