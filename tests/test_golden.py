"""Tests of the networks against the public classes whose layout they follow: names, shapes and outputs.

golden/NAME.json has outputs of the public class, which its code computed with the weights and inputs of formula.py.
golden/NAME.keys has the names and shapes of its state_dict. The options of our network are inferred from those alone.
"""

import json
import pathlib

import pytest
import torch
from formula import fill, normal_like, sample, uniform

import models
from common import weights

GOLDEN = pathlib.Path(__file__).with_name("golden")


def golden(name):
    """The stored run of a public class, and its names and shapes as tensors on the meta device."""
    lines = (line.split(" ") for line in (GOLDEN / f"{name}.keys").read_text().splitlines())
    shapes = {key: torch.empty([int(n) for n in size.split(",") if n], device="meta") for key, size in lines}
    return json.loads((GOLDEN / f"{name}.json").read_text()), shapes


def build(shapes, prefix="", **options):
    """Our network for these shapes, with weights by formula. Its names and shapes must be exactly the public ones."""
    net = models.create(**(weights.options_from_shapes({k.removeprefix(prefix): w for k, w in shapes.items()}) | options))
    assert {prefix + k: v.shape for k, v in net.state_dict().items()} == {k: w.shape for k, w in shapes.items()}
    return fill(net, lambda name: prefix + name)


def assert_equal(stored, output, part="output"):
    expected = stored["outputs"][part]
    assert list(output.shape) == expected["shape"]
    values = torch.tensor(expected["values"], dtype=torch.float64)
    assert (sample(output, len(values)) - values).abs().max() < 1e-5 * expected["scale"]


def case(name, public, *args):
    large = json.loads((GOLDEN / f"{name}.json").read_text())["large"]
    return pytest.param(name, *args, id=f"{public}-{name}", marks=[pytest.mark.large] if large else [])


@torch.no_grad()
@pytest.mark.parametrize("name, size, channels, t", [
    case("dit-small", "DiT", 8, 4, [0.3, 700.0]), case("dit-s2", "DiT", 32, 4, [0.3, 0.7]),
    case("dit-xl2", "DiT", 32, 4, [0.3, 700.0]),
    case("lightningdit-released", "LightningDiT", 8, 6, [0.3, 0.7]),
    case("lightningdit-qknorm", "LightningDiT", 8, 6, [0.3, 0.7]),
    case("lightningdit-layernorm", "LightningDiT", 8, 6, [0.3, 0.7]),
    case("lightningdit-b1", "LightningDiT", 16, 32, [0.3, 0.7]),
    case("lightningdit-xl1", "LightningDiT", 16, 32, [0.3, 0.7]),
    case("facm-auxiliary", "FACM-LightningDiT", 8, 6, [0.3, 0.7])])
def test_transformer_is_the_public_class(name, size, channels, t):
    stored, shapes = golden(name)
    net = build(shapes, **(dict(heads=4) if name == "dit-small" else {}))      # here no shape depends on the heads
    s = torch.tensor([1.0, 0.7]) if net.second_time else None
    assert_equal(stored, net(normal_like("x", (2, channels, size, size)), torch.tensor(t), s, torch.tensor([3, 5])))


@torch.no_grad()
@pytest.mark.parametrize("name, size", [
    case("edm-ddpmpp-small", "SongUNet", 16), case("edm-ddpmpp-cifar10", "SongUNet", 32),
    case("edm-ncsnpp-small", "SongUNet", 16), case("edm-ncsnpp-cifar10", "SongUNet", 32)])
def test_unet_is_the_public_class(name, size):
    stored, shapes = golden(name)
    net = build(shapes, sigma_data=None, edm_time=False)
    if "map_noise.freqs" in shapes:                        # a random table, which the stored run took from the formula
        net.map_noise.freqs.copy_(torch.from_numpy(uniform("map_noise.freqs", net.map_noise.freqs.shape)))
    x, augment = normal_like("x", (2, 3, size, size)), normal_like("augment", (2, 9))
    assert_equal(stored, net(x, torch.tensor([0.3, -0.7]), None, torch.tensor([3, 5]), augment))


@torch.no_grad()
def test_velocity_is_that_of_the_public_edm_denoiser():
    """EDMPrecond's D(x; sigma) is x_t + (1-t) v, with x_t = t x, sigma = (1-t) / t and v the velocity at x_t."""
    stored, shapes = golden("edm-precond")
    net = build(shapes, prefix="model.")
    sigma = torch.tensor([0.2, 20.0])
    x, t = normal_like("x", (2, 3, 16, 16)) * torch.tensor([1.0, 20.0])[:, None, None, None], 1 / (1 + sigma)
    xt = t[:, None, None, None] * x
    v = net(xt, t, None, torch.tensor([3, 5]))
    assert_equal(stored, xt + (1 - t[:, None, None, None]) * v)


@torch.no_grad()
@pytest.mark.parametrize("name, size, factor", [
    case("vae-small", "AutoencoderKL", 32, 4), case("vae-f8d4", "AutoencoderKL", 64, 8),
    case("vae-f16d32", "VAVAE", 64, 16)])
def test_autoencoder_is_the_public_class(name, size, factor):
    stored, shapes = golden(name)
    net = build(shapes)
    z = net.z_channels
    mean, std = net.encode(normal_like("x", (1, 3, size, size)))
    assert_equal(stored, torch.cat([mean, 2 * std.log()], dim=1), "moments")
    assert_equal(stored, net.decode(normal_like("z", (1, z, size // factor, size // factor))), "image")
    assert net.factor == factor


@pytest.mark.parametrize("name, golden_name", [
    ("DiT-S/2", "dit-s2"), ("LightningDiT-B/1", "lightningdit-b1"), ("LightningDiT-XL/1", "lightningdit-xl1"),
    ("AutoencoderKL-f8d4", "vae-f8d4"), ("VAVAE-f16d32", "vae-f16d32"), ("DDPM++", "edm-ddpmpp-cifar10"),
    ("NCSN++", "edm-ncsnpp-cifar10")])
def test_public_names_build_the_public_architecture(name, golden_name):
    _, shapes = golden(golden_name)
    options = dict(input_size=32) if name[:4] in ("DiT-", "DDPM", "NCSN") else {}
    if name[:4] in ("DDPM", "NCSN"):
        options |= dict(num_classes=10, augment_dim=9)
    with torch.device("meta"):
        net = models.create(name, **options)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: w.shape for k, w in shapes.items()}
