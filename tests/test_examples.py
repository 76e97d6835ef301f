"""Tests examples/: the losses train networks that are not ours."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "examples"))
import one_dimension
import own_network


@pytest.fixture(scope="module")
def rings_teacher():
    torch.manual_seed(0)
    return own_network.train_teacher(steps=600, batch=256)


@pytest.mark.parametrize("method", ["FACM", "DE-CM", "GCM"])
def test_the_losses_train_a_network_that_is_not_ours(rings_teacher, method):
    """After a short run, one step of the student draws both rings. One Euler step of the teacher draws neither."""
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


@pytest.fixture(scope="module")
def waves_teacher():
    torch.manual_seed(0)
    return one_dimension.train_teacher(steps=200, batch=32)


def test_waveforms_are_two_sines():
    torch.manual_seed(0)
    waves = one_dimension.draw_waves(500)
    assert waves.shape == (500, 1, 64)
    amplitudes = one_dimension.spectrum(waves)
    assert torch.allclose(amplitudes[:, 2], torch.tensor(0.8), atol=1e-4)
    assert torch.allclose(amplitudes[:, [6, 7]].max(dim=1).values, torch.tensor(0.5), atol=1e-4)
    distance, share = one_dimension.measure(waves, waves)
    assert distance == 0 and abs(share - 1) < 1e-4


def test_facm_trains_a_network_of_one_dimension(waves_teacher):
    """After a short run, one step of the student is nearer to the data than one step of the teacher."""
    torch.manual_seed(0)
    student = one_dimension.train_student(waves_teacher, steps=100, batch=32)
    noise, real = torch.randn(1, 500, 1, 64), one_dimension.draw_waves(2000)
    blur = one_dimension.measure(one_dimension.flow.integrate(waves_teacher, noise, None, nfe=1), real)
    jump = one_dimension.measure(one_dimension.facm.sample(student, noise, None, nfe=1), real)
    assert jump[0] < 0.75 * blur[0] and jump[1] > blur[1]


def test_the_picture_of_waveforms(tmp_path):
    waves = one_dimension.draw_waves(6)
    one_dimension.draw_picture(tmp_path / "waves.png", {"real": waves, "flat": 0 * waves})
    picture = np.asarray(Image.open(tmp_path / "waves.png").convert("L"))
    assert picture.shape == (2 * 70, 130 + 6 * 150)
    drawn = (picture[:, 130:] < 128).any(axis=1)
    assert drawn[10:60].sum() > 20 and 1 <= drawn[70:].sum() < 6       # a flat waveform is a line
