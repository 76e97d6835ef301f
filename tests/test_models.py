"""The networks: derivatives in three ways, options that change nothing until trained, randomness, precision."""

import pytest
import torch

import facm
import models

SMALL = dict(name="DDPM++", resolution=8, width=8, mult=(1, 2), blocks=1, attention=(8,), sigma_data=0.5)


def build(**options):
    """A small network with weights that are not near zero anywhere, so that every path counts."""
    torch.manual_seed(0)
    net = models.create(**(SMALL | options))
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net


def inputs(net, batch=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, v = torch.randn((2, batch, 3, 8, 8), generator=g).to(dtype)
    t = torch.tensor([0.2, 0.6, 1.7], dtype=dtype)
    s = torch.tensor([0.9, 1.0, 0.1], dtype=dtype) if net.second_time else None
    y = torch.tensor([0, 3, net.num_classes]) if net.num_classes else None
    return x, t, s, y, v


VARIANTS = [dict(), dict(num_classes=4), dict(second_time=True, num_classes=4), dict(sigma_data=None),
            dict(dropout=0.3), dict(time_scale=8.0, adaptive_scale=True)]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_derivative_exact_and_difference_and_float64(options):
    net, net64 = build(**options), build(**options).double()
    x, t, s, y, v = inputs(net)
    x64, t64, s64, _, v64 = inputs(net, dtype=torch.float64)
    net, net64 = facm.same_dropout(net, len(x), 3), facm.same_dropout(net64, len(x), 3)
    exact = facm.total_derivative(net, x, (t, s), y, v)
    fd = facm.total_derivative(net, x, (t, s), y, v, mode="fd")
    exact64 = facm.total_derivative(net64, x64, (t64, s64), y, v64)
    fd64 = facm.total_derivative(net64, x64, (t64, s64), y, v64, mode="fd", h=1e-4)
    scale = exact64.abs().max()
    assert (fd - exact).abs().max() < 1e-2 * scale
    assert (fd64 - exact64).abs().max() < 1e-5 * scale
    assert (exact - exact64).abs().max() < 1e-4 * scale


def test_the_derivative_needs_the_time_tangent():
    net = build().double()
    x, t, s, y, v = inputs(net, dtype=torch.float64)
    with_time = facm.total_derivative(net, x, (t, s), y, v)
    _, without = torch.func.jvp(lambda x: net(x, t, s, y), (x,), (v,))
    assert (with_time - without).abs().max() > 0.05 * with_time.abs().max()


def test_dropout_is_the_same_in_every_pass_and_off_in_eval():
    net = build(dropout=0.5)
    x, t, s, y, _ = inputs(net)
    seeded = facm.same_dropout(net, len(x), 7)
    out = seeded(x, t)
    assert torch.equal(out, seeded(x, t))
    assert not torch.equal(out, facm.same_dropout(net, len(x), 8)(x, t))
    both = facm.joint(seeded, (x, t, None, None), (x, t, None, None))      # one mask in a joint pass too
    assert torch.equal(both[0], out) and torch.equal(both[1], out)
    double = seeded(x.contiguous(memory_format=torch.channels_last), t)
    assert torch.allclose(double, out, atol=1e-5)                          # whatever the memory's layout
    assert facm.same_dropout(build(), 1, 7).__class__ is models.DDPMpp     # nothing to seed: one pass for all
    net.eval()
    state = torch.get_rng_state()
    net(x, t)
    assert torch.equal(state, torch.get_rng_state())


def test_second_time_changes_nothing_before_it_is_trained():
    torch.manual_seed(0)
    plain = models.create(**SMALL)
    torch.manual_seed(1)
    timed = models.create(**SMALL, second_time=True)
    models.load_weights(timed, plain.state_dict(), "plain", may_lack=["map_second"])
    x, t, _, _, _ = inputs(plain)
    assert torch.equal(plain(x, t), timed(x, t, torch.rand(3)))
    with pytest.raises(ValueError, match="second_time"):
        plain(x, t, t)
    with pytest.raises(ValueError, match="second_time"):
        timed(x, t)


def test_null_label_is_no_label():
    net = build(num_classes=4)
    x, t, _, _, _ = inputs(net)
    assert torch.equal(net(x, t, None, torch.full((3,), 4)), net(x, t))
    assert not torch.equal(net(x, t, None, torch.full((3,), 0)), net(x, t))


def test_preconditioning_is_the_velocity_of_a_gaussian_denoiser():
    """With U = 0, c_skip x is the exact velocity of data N(0, sigma_data^2); c_out has the residual's size."""
    net = build(sigma_data=0.5)
    for p in (net.dec["8x8_aux_conv"].weight, net.dec["8x8_aux_conv"].bias):
        p.data.zero_()
    x, _, _, _, _ = inputs(net)
    t = torch.tensor([0.0, 0.4, 1.0])
    v = net(x, t)
    S2 = (1 - t) ** 2 + t ** 2 / 4
    assert torch.allclose(v, ((t / 4 - (1 - t)) / S2)[:, None, None, None] * x)
    assert torch.allclose(v, net(x, 2 - t))        # the expanded interval folds back to the same flow time


def test_time_path_is_float32_under_autocast():
    net = build(num_classes=4)
    x, t, s, y, v = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        emb = net.embed(t, s, y)
        half = facm.total_derivative(net, x, (t, s), y, v)
    assert emb.dtype == torch.float32 and torch.equal(emb, net.embed(t, s, y))
    exact = facm.total_derivative(net, x, (t, s), y, v)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_parameter_names_are_edms():
    names = set(models.create("DDPM++", resolution=8, width=8, mult=(1, 2), blocks=1, attention=(8,), num_classes=4).state_dict())
    for name in ("map_label.weight", "map_layer0.weight", "map_layer1.bias", "enc.8x8_conv.weight",
                 "enc.8x8_block0.norm0.weight", "enc.8x8_block0.conv0.weight", "enc.8x8_block0.affine.weight",
                 "enc.8x8_block0.qkv.weight", "enc.8x8_block0.proj.bias", "enc.4x4_down.conv0.resample_filter",
                 "enc.4x4_down.skip.weight", "dec.4x4_in0.norm2.weight", "dec.8x8_up.skip.resample_filter",
                 "dec.8x8_block1.qkv.weight", "dec.8x8_aux_norm.bias", "dec.8x8_aux_conv.weight"):
        assert name in names, name
    assert not any(name.startswith(("dec.4x4_aux", "dec.8x8_block0.qkv")) for name in names)


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match="unknown network"):
        models.create("UNet")
    with pytest.raises(ValueError, match="divisible"):
        models.create("DDPM++", resolution=10, mult=(1, 2, 2))
    with pytest.raises(ValueError, match="32"):
        models.create("DDPM++", resolution=8, width=36, mult=(4,))


@pytest.mark.cuda
def test_compiled_derivative_equals_the_eager_one():
    net = build(num_classes=4).cuda()
    x, t, s, y, v = (a if a is None else a.cuda() for a in inputs(net))
    eager = facm.total_derivative(net, x, (t, s), y, v)
    compiled = torch.compile(facm.total_derivative)(net, x, (t, s), y, v)
    assert (eager - compiled).abs().max() < 1e-3 * eager.abs().max()
