"""Tests of the networks: derivatives computed in three ways, options that change nothing before training, randomness
and precision. Every network that can be built must also run."""

import copy
import math
from random import Random

import pytest
import torch
from oracle import Gaussian
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
from common import checkpoints, weights
from jvp import fd, forward_mode, in_one_pass

UNET = dict(name="DDPM++", input_size=8, width=8, mult=(1, 2), blocks=1, attention=(8,), sigma_data=0.5)
DIT = dict(name="DiT", input_size=8, in_channels=3, num_classes=0, patch=2, width=32, depth=2, heads=4)
SMALL = {"DDPM++": UNET, "NCSN++": UNET | dict(name="NCSN++"), "DiT": DIT, "LightningDiT": DIT | dict(name="LightningDiT"),
         "EDM2": dict(name="EDM2", input_size=8, num_classes=0, width=8, mult=(1, 2), blocks=1, attention=(4,), head_channels=8)}


def build(name="DDPM++", **options):
    """A small network with noise added to its weights, so that every path affects the output."""
    torch.manual_seed(0)
    net = models.create(**(SMALL[name] | options))
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


VARIANTS = [
    dict(), dict(num_classes=4), dict(second_time=True, num_classes=4), dict(sigma_data=None), dict(dropout=0.3),
    dict(time_scale=8.0, adaptive_scale=True), dict(edm_time=True),
    dict(name="NCSN++", second_time=True, num_classes=4, dropout=0.3), dict(name="NCSN++", sigma_data=None),
    dict(name="EDM2", num_classes=4, second_time=True), dict(name="EDM2", dropout=0.3),
    dict(name="DiT", num_classes=4), dict(name="DiT", second_time=True, qknorm=True, pixelnorm=True),
    dict(name="DiT", learn_sigma=True, prediction="noise"),
    dict(name="LightningDiT", num_classes=4, second_time=True), dict(name="LightningDiT", qknorm=True, wo_shift=True)]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_derivative_exact_and_difference_and_float64(options):
    net, net64 = build(**options), build(**options).double()
    x, t, s, y, v = inputs(net)
    x64, t64, s64, _, v64 = inputs(net, dtype=torch.float64)
    for network in (net, net64):
        models.seed_dropout(network, 3, rows=len(x))
    exact = forward_mode(net, (x, t, s, y), (v, 1, 0))
    # NCSN++'s features and DDPM's 1000 times vary so fast that the difference needs a smaller step.
    h = 1e-4 if options.get("name") == "NCSN++" or options.get("prediction") else 5e-3
    difference = fd(net, (x, t, s, y), (v, 1, 0), h=h)[1]
    exact64 = forward_mode(net64, (x64, t64, s64, y), (v64, 1, 0))
    fd64 = fd(net64, (x64, t64, s64, y), (v64, 1, 0), h=h / 50)[1]
    scale = exact64.abs().max()
    assert (difference - exact).abs().max() < 1e-2 * scale
    assert (fd64 - exact64).abs().max() < 1e-5 * scale
    assert (exact - exact64).abs().max() < 1e-4 * scale


def test_the_derivative_needs_the_time_tangent():
    net = build().double()
    x, t, s, y, v = inputs(net, dtype=torch.float64)
    with_time = forward_mode(net, (x, t, s, y), (v, 1, 0))
    with sdpa_kernel(SDPBackend.MATH):
        _, without = torch.func.jvp(lambda x: net(x, t, s, y), (x,), (v,))
    assert (with_time - without).abs().max() > 0.05 * with_time.abs().max()


def test_dropout_is_the_same_in_every_pass_and_off_in_eval():
    net, kept = build(dropout=0.5), []
    x, t, s, y, _ = inputs(net)
    models.seed_dropout(net, 8, rows=len(x))
    other = net(x, t)
    models.seed_dropout(net, 7, rows=len(x))
    out = net(x, t)
    assert torch.equal(out, net(x, t))
    assert not torch.equal(out, other)
    for layer in net.modules():
        if isinstance(layer, models.Dropout):
            layer.register_forward_hook(lambda layer, x, h: kept.append(h != 0))
    net(x, t)
    both = in_one_pass(net, (x, t, None, None), (x, t, None, None))        # a joint pass uses the same mask
    alone, joint = kept[:len(kept) // 2], kept[len(kept) // 2:]
    assert alone and all(torch.equal(torch.cat([a, a]), b) for a, b in zip(alone, joint))
    assert all((half - out).abs().max() < 1e-6 * out.abs().max() for half in both)     # up to rounding
    double = net(x.contiguous(memory_format=torch.channels_last), t)
    assert torch.allclose(double, out, atol=1e-5)                          # in any memory layout
    plain = build()
    models.seed_dropout(plain, 7, rows=2)                                  # without dropout, rows has no effect
    assert torch.equal(plain(x, t), build()(x, t))
    net.eval()
    state = torch.get_rng_state()
    net(x, t)
    assert torch.equal(state, torch.get_rng_state())


def layers_with_masks(seed, p=0.3, rows=4):
    """Two Dropout layers with a seed."""
    layers = torch.nn.ModuleList([models.Dropout(p), models.Dropout(p)])
    models.seed_dropout(layers, seed, rows)
    return layers


def masks(layers, x):
    """Which elements of x each layer keeps; x must not contain zeros."""
    return torch.stack([layer(x) != 0 for layer in layers])


ONES = torch.ones(4, 8, 5, 5)


def test_a_mask_follows_from_seed_layer_and_place():
    layers = layers_with_masks(7)
    one = masks(layers, ONES)
    torch.manual_seed(1)                                                   # PyTorch's random state has no effect
    assert torch.equal(one, masks(layers, ONES))
    assert torch.equal(one, masks(layers_with_masks(7), ONES))
    assert not torch.equal(one[0], one[1])
    assert not any(torch.equal(one[0][i], one[0][k]) for i in range(4) for k in range(i))
    for seed in (0, 8, 2 ** 63 - 2, 2 ** 63 - 1):
        assert not torch.equal(one[0], masks(layers_with_masks(seed), ONES)[0])
    models.seed_dropout(layers, 8, rows=4)
    assert torch.equal(masks(layers, ONES), masks(layers_with_masks(8), ONES))


def test_a_larger_batch_repeats_the_mask_of_its_rows():
    layers = layers_with_masks(7)
    one, three = masks(layers, ONES), masks(layers, ONES.repeat(3, 1, 1, 1))
    assert torch.equal(three, one.repeat(1, 3, 1, 1, 1))


@pytest.mark.parametrize("change", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.bfloat16(), lambda x: x.double()],
    ids=["channels_last", "bfloat16", "float64"])
def test_a_mask_does_not_depend_on_layout_and_precision(change):
    layers = layers_with_masks(7)
    changed = layers[0](change(ONES))
    assert changed.dtype == change(ONES).dtype
    assert torch.equal(masks(layers, ONES), masks(layers, change(ONES)))


def test_a_seeded_pass_leaves_the_random_state_alone():
    torch.manual_seed(1)
    layers, state = layers_with_masks(7), torch.get_rng_state()
    masks(layers, ONES)
    assert torch.equal(state, torch.get_rng_state())


def test_without_a_seed_every_pass_has_a_mask_of_its_own():
    layer = models.Dropout(0.3)
    torch.manual_seed(0)
    first, second = masks([layer], ONES), masks([layer], ONES)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, masks([layer], ONES))                        # it depends on PyTorch's random state


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_seeded_mask_keeps_its_share(p):
    x = torch.ones(4, 50_000)
    for layer in layers_with_masks(7, p):
        out = layer(x)
        assert abs((out != 0).double().mean() - (1 - p)) < 0.005
        assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)))


def test_compiled_masks_are_those_of_eager_code():
    """Compiled code uses the masks of eager code, and a new seed does not cause a recompilation."""
    layer, net = models.Dropout(0.5), build(dropout=0.5)
    x, t, *_ = inputs(net)
    torch._dynamo.reset()
    for network, points in ((layer, (ONES,)), (net, (x, t))):
        counter = CompileCounterWithBackend("aot_eager")
        compiled, seen = torch.compile(network, backend=counter, fullgraph=True), []
        for seed in (7, 8, 2 ** 63 - 1):
            models.seed_dropout(network, seed, rows=len(points[0]))
            state = torch.get_rng_state()
            seen.append(network(*points))
            for _ in range(2):
                out = compiled(*points)
                assert torch.equal(out == 0, seen[-1] == 0) and torch.allclose(out, seen[-1], atol=1e-5)
            assert torch.equal(state, torch.get_rng_state())
        assert counter.frame_count == 1
        assert not any(torch.allclose(seen[i], seen[k], atol=1e-3) for i in range(3) for k in range(i))


@pytest.mark.parametrize("name", SMALL)
def test_weights_follow_from_the_seed(name):
    state = torch.get_rng_state()
    one, two, other = (models.create(**SMALL[name], seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)
    torch.manual_seed(7)
    drawn = models.create(**SMALL[name]).state_dict()                      # without a seed it is PyTorch's random state
    assert all(torch.equal(one[k], drawn[k]) for k in one) and not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", SMALL)
def test_second_time_changes_nothing_before_it_is_trained(name):
    plain = build(name)
    torch.manual_seed(1)
    timed = models.create(**SMALL[name], second_time=True)
    checkpoints.load_weights(timed, plain.state_dict(), "plain", may_lack=["map_second", "r_embedder"])
    x, t, _, _, _ = inputs(plain)
    assert torch.equal(plain(x, t), timed(x, t, torch.rand(3)))
    with pytest.raises(ValueError, match="second_time"):
        plain(x, t, t)


@pytest.mark.parametrize("name", SMALL)
def test_no_random_number_is_drawn_in_eval(name):
    net = build(name, num_classes=4).eval()
    x, t, s, y, _ = inputs(net)
    state = torch.get_rng_state()
    assert torch.equal(net(x, t, s, y), net(x, t, s, y))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"EDM2"}))
def test_the_times_t_and_2_minus_t_are_told_apart(name):
    net = build(name)
    x, t, _, _, _ = inputs(net)
    assert net.expandable and not torch.allclose(net(x, t), net(x, 2 - t), atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_null_label_is_no_label(name):
    net = build(name, num_classes=4)
    x, t, _, _, _ = inputs(net)
    assert torch.equal(net(x, t, None, torch.full((3,), 4)), net(x, t))
    assert not torch.equal(net(x, t, None, torch.full((3,), 0)), net(x, t))


def test_preconditioning_is_the_velocity_of_a_gaussian_denoiser():
    """If the U-Net's output is 0, the network is c_skip x, the exact velocity of data N(0, sigma_data^2)."""
    net = build(sigma_data=0.5)
    for p in (net.dec["8x8_aux_conv"].weight, net.dec["8x8_aux_conv"].bias):
        p.data.zero_()
    x, _, _, _, _ = inputs(net)
    t = torch.tensor([0.0, 0.4, 1.0])
    v = net(x, t)
    S2 = (1 - t) ** 2 + t ** 2 / 4
    assert torch.allclose(v, ((t / 4 - (1 - t)) / S2)[:, None, None, None] * x)
    assert torch.allclose(v, net(x, 2 - t))        # the expanded interval folds back to the same flow time


@pytest.mark.parametrize("name", SMALL)
def test_time_path_is_float32_under_autocast(name):
    net = build(name, num_classes=4, second_time=True)
    x, t, s, y, v = inputs(net)
    net64, t64, s64 = copy.deepcopy(net).double(), t.double(), s.double()
    exact = torch.func.jvp(lambda t: net64.embed(t, s64, y), (t64,), (torch.ones_like(t64),))[1]
    with torch.autocast("cpu", torch.bfloat16):
        emb, tangent = torch.func.jvp(lambda t: net.embed(t, s, y), (t,), (torch.ones_like(t),))
        half = forward_mode(net, (x, t, s, y), (v, 1, 0))
    assert emb.dtype == torch.float32 and torch.equal(emb, net.embed(t, s, y))
    assert (tangent - exact).norm() < 1e-5 * exact.norm()
    full = forward_mode(net, (x, t, s, y), (v, 1, 0))
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("name", SMALL)
def test_a_compiled_function_that_contains_the_derivative_equals_the_eager_one(name):
    """aot_eager traces the function as any backend does, and leaves out only the generation of machine code."""
    net = build(name, num_classes=4)
    x, t, s, y, v = inputs(net)
    eager = forward_mode(net, (x, t, s, y), (v, 1, 0))
    torch._dynamo.reset()
    compiled = torch.compile(forward_mode, backend="aot_eager", fullgraph=True)(net, (x, t, s, y), (v, 1, 0))
    assert (eager - compiled).abs().max() < 1e-5 * eager.abs().max()


def test_the_derivative_of_an_edm_network_is_right_at_the_noise_end():
    """Near t = 0 the central difference uses times below 0, where the noise level is the same as at 0."""
    net = build(edm_time=True).double()
    x, _, s, y, v = inputs(net, dtype=torch.float64)
    t = torch.tensor([0.0, 1e-3, 4e-3]).double()
    exact, difference = forward_mode(net, (x, t, s, y), (v, 1, 0)), fd(net, (x, t, s, y), (v, 1, 0), h=5e-3)[1]
    fused = net(x, t, s, y, tangent=(v, torch.ones_like(t), None))[1]
    assert (fused - exact).abs().max() < 1e-10 * exact.abs().max()
    assert (difference - exact).abs().max() < 0.02 * exact.abs().max()


def test_pixel_norm_makes_the_modulations_mean_square_one():
    layer = build("DiT", pixelnorm=True).final_layer
    g = torch.Generator().manual_seed(0)
    emb, h = torch.randn((3, 32), generator=g), torch.randn((3, 16, 32), generator=g)
    scale = layer.adaLN_modulation(emb).chunk(2, dim=1)[1]
    assert torch.allclose(models.pixel_norm(scale).square().mean(1), torch.ones(3), atol=1e-4)
    grown = copy.deepcopy(layer)
    grown.adaLN_modulation[1].weight.data.mul_(7)
    grown.adaLN_modulation[1].bias.data.mul_(7)
    assert torch.allclose(grown(h, emb), layer(h, emb), atol=1e-4)         # the size of the modulation has no effect
    free = build("DiT").final_layer
    free.adaLN_modulation[1].weight.data.mul_(7)
    assert not torch.allclose(free(h, emb), build("DiT").final_layer(h, emb), atol=1e-4)


def test_a_noise_predictor_gives_the_velocity_of_the_linear_flow():
    """The ideal noise predictor of Gaussian data, put in place of the transformer, gives the oracle's velocity."""
    oracle, net = Gaussian(), build("DiT", prediction="noise").double()
    x1, x0, t = oracle.draw(200)
    t = t.clamp(0.02, 0.98)
    xt = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * x1
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    net.embed = lambda k, s, y: k

    def ideal(x, k):
        """E[x_0 | x] at DDPM's times k. Between them ln sigma is interpolated linearly."""
        log_sigma = ((1 - alpha_bar) / alpha_bar).log() / 2
        low = k.long().clamp(0, 998)
        sigma = (log_sigma[low] + (k - low) * (log_sigma[low + 1] - log_sigma[low])).exp()[:, None, None, None]
        a, b = 1 / (1 + sigma ** 2).sqrt(), sigma / (1 + sigma ** 2).sqrt()
        return b * (x - a * oracle.mu) / (a ** 2 * oracle.sd ** 2 + b ** 2)

    net.output = ideal
    assert (net(xt, t) - oracle.velocity(xt, t)).abs().max() < 1e-5
    assert net.discrete_time(((1 - alpha_bar) / alpha_bar).log() / 2).sub(torch.arange(1000)).abs().max() < 1e-2


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match="unknown network"):
        models.create("UNet")
    with pytest.raises(ValueError, match="divisible"):
        models.create("DDPM++", input_size=10, mult=(1, 2, 2))
    with pytest.raises(ValueError, match="32"):
        models.create("DDPM++", input_size=8, width=36, mult=(4,))
    with pytest.raises(ValueError, match="divide"):
        models.create("DiT-S/8", input_size=12)
    with pytest.raises(ValueError, match="prediction"):
        models.create("DiT-S/2", input_size=16, prediction="score")


@pytest.mark.cuda
def test_compiled_derivative_equals_the_eager_one():
    net = build(num_classes=4).cuda()
    x, t, s, y, v = (a if a is None else a.cuda() for a in inputs(net))
    eager = forward_mode(net, (x, t, s, y), (v, 1, 0))
    compiled = torch.compile(forward_mode)(net, (x, t, s, y), (v, 1, 0))
    assert (eager - compiled).abs().max() < 1e-3 * eager.abs().max()


def test_time_scale_multiplies_both_times():
    net = build(time_scale=8.0, second_time=True)
    x, t, s, y, _ = inputs(net)
    plain = copy.deepcopy(net)
    plain.time_scale = 1.0
    assert torch.allclose(net.embed(t, s, y), plain.embed(8 * t, 8 * s, y))
    assert not torch.allclose(net.embed(t, s, y), plain.embed(8 * t, s, y), atol=1e-4)


def test_an_adaptive_block_without_modulation_is_the_plain_one():
    a, b = (build(adaptive_scale=adaptive).enc["8x8_block0"] for adaptive in (True, False))
    for block in (a, b):
        block.affine.weight.data.zero_(), block.affine.bias.data.zero_()
    b.load_state_dict({k: v for k, v in a.state_dict().items() if "affine" not in k}, strict=False)
    x, emb = torch.randn(2, 8, 8, 8), torch.randn(2, 32)
    assert torch.allclose(a(x, emb), b(x, emb), atol=1e-6)


def test_pixel_norm_takes_out_the_size_of_every_scale_and_shift():
    dit, unet = build("DiT", pixelnorm=True), build(adaptive_scale=True, pixelnorm=True)
    block, plain = copy.deepcopy(dit.blocks[0]), dit.blocks[0]
    for part in (0, 1, 3, 4):                                          # the gates, 2 and 5, are not normalised
        for p in block.adaLN_modulation[1].parameters():
            p.data[32 * part:32 * part + 32] *= 7
    h, emb = torch.randn(3, 16, 32), torch.randn(3, 32)
    assert torch.allclose(block(h, emb, None), plain(h, emb, None), atol=1e-4)
    block, plain = copy.deepcopy(unet.enc["8x8_block0"]), unet.enc["8x8_block0"]
    for p in block.affine.parameters():
        p.data *= 7
    x, emb = torch.randn(2, 8, 8, 8), torch.randn(2, 32)
    assert torch.allclose(block(x, emb), plain(x, emb), atol=1e-4)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    out = models.Dropout(0.2).train()(torch.ones(100_000))
    assert abs((out == 0).double().mean() - 0.2) < 0.01 and torch.allclose(out[out > 0], torch.tensor(1.25))


def test_a_unet_begins_as_edms():
    """Weights are Xavier-uniform times the gain of their layer, and biases are zero."""
    torch.manual_seed(0)
    net = models.create("DDPM++", input_size=8, in_channels=3, width=64, mult=(1, 2), blocks=1, attention=(8,),
                        num_classes=4)
    block = net.enc["8x8_block0"]
    for layer, gain in ((block.conv0, 1), (block.conv1, 1e-5), (block.qkv, 0.2 ** 0.5), (block.proj, 1e-5),
                        (block.affine, 1),
                        (net.dec["8x8_aux_conv"], 1e-5), (net.map_layer0, 1)):
        w, area = layer.weight, math.prod(layer.weight.shape[2:])
        bound = gain * math.sqrt(6 / (area * (w.shape[0] + w.shape[1])))
        assert 0.97 * bound < w.abs().max() <= bound and abs(w.mean()) < 0.1 * bound and not layer.bias.any()


@pytest.mark.parametrize("name", ["DiT", "LightningDiT"])
def test_a_dit_begins_as_published(name):
    """Blocks are the identity and the output is zero (adaLN-Zero). Embeddings have the standard deviation 0.02."""
    torch.manual_seed(0)
    net = models.create(**SMALL[name] | dict(num_classes=1000, width=64))
    x, h, emb = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 64), torch.randn(2, 64)
    assert not net(x, torch.rand(2), None, torch.tensor([0, 5])).any() and torch.equal(net.blocks[0](h, emb,
                                                                                                     net.feat_rope), h)
    for w in (net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight, net.y_embedder["embedding_table"].weight):
        assert abs(w.std() - 0.02) < 0.002
    w = net.blocks[0].attn.qkv.weight
    assert abs(w.abs().max() - math.sqrt(6 / sum(w.shape))) < 0.01


def test_edm_time_stands_still_beyond_edms_sigmas():
    net = build(edm_time=True).double()
    at = lambda sigma: net.embed(1 / (1 + torch.tensor([sigma]).double()), None, None)     # noqa: E731
    assert torch.allclose(at(81.0), at(80.0)) and not torch.allclose(at(80.0), at(79.0))
    assert torch.allclose(at(1e-3), at(2e-3)) and not torch.allclose(at(2e-3), at(2.1e-3))


@pytest.mark.parametrize("name, width, depth, heads", [
    ("DiT-S/2", 384, 12, 6), ("DiT-B/4", 768, 12, 12), ("DiT-L/2", 1024, 24, 16), ("DiT-XL/2", 1152, 28, 16),
    ("LightningDiT-L/2", 1024, 24, 16), ("LightningDiT-1p0B/1", 1536, 24, 24), ("LightningDiT-1p6B/2", 1792, 28, 28)])
def test_sizes_are_the_published_ones(name, width, depth, heads):
    with torch.device("meta"):
        net = models.create(name, input_size=16)
    assert (net.pos_embed.shape[2], len(net.blocks), net.heads, str(net.patch)) == (width, depth, heads, name[-1])


def test_expandable():
    assert not build(edm_time=True).expandable and not build("DiT", prediction="noise").expandable


def test_without_augmentation_its_labels_are_zero():
    """The weight of the augmentation labels still gets a gradient, because DDP needs one for every weight."""
    net = build(augment_dim=9)
    x, t, s, y, _ = inputs(net)
    out = net(x, t)
    assert torch.equal(out, net(x, t, augment=torch.zeros(3, 9)))
    out.sum().backward()
    assert net.map_augment.weight.grad is not None and not net.map_augment.weight.grad.any()


def test_a_network_that_was_trained_with_augmentation_runs_without_it(tmp_path):
    net = build(augment_dim=9, edm_time=True)
    torch.save(net.state_dict(), tmp_path / "edm.pt")
    loaded = weights.load(tmp_path / "edm.pt")
    x, t, *_ = inputs(net)
    assert loaded.augment_dim == 9 and torch.equal(loaded(x, t), net(x, t))


# ----------------------------------------------------------------------------------------------------------------------
# The second time that is not given.

SECOND = [dict(name=name) for name in SMALL] + [dict(edm_time=True), dict(name="DiT", prediction="noise")]


@pytest.mark.parametrize("options", SECOND, ids=str)
def test_without_a_second_time_it_is_the_first(options):
    """If s is None, the network computes F(x, t, t), and in its derivative s moves with t."""
    net = build(**options, num_classes=4, second_time=True).double()
    x, t, s, y, v = inputs(net, dtype=torch.float64)
    value = net(x, t, None, y)
    assert torch.equal(value, net(x, t, t, y)) and not torch.equal(value, net(x, t, s, y))
    assert torch.equal(net(x, t), net(x, t, t, None))
    moving, still = (forward_mode(net, (x, t, t, y), (v, 1, ds)) for ds in (1, 0))
    assert (moving - still).abs().max() > 1e-6 * moving.abs().max()
    for derivative in (forward_mode(net, (x, t, None, y), (v, 1, 0)),
                       net(x, t, None, y, tangent=(v, torch.ones_like(t), None))[1],
                       net(x, t, None, y, tangent=(v, torch.ones_like(t), torch.full_like(t, 7)))[1]):     # no effect
        assert (derivative - moving).abs().max() < 1e-10 * moving.abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# create and expand.

@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
def test_networks_of_fake_tensors(name, device, monkeypatch):
    """Fake networks have the shapes and strides of real ones. Module.to, which fails on fake parameters, is not called."""
    def refuse(*args, **options):
        raise AssertionError("Module.to")

    real = models.create(**SMALL[name], seed=0)
    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    with FakeTensorMode():
        net = models.create(**SMALL[name], seed=0, device=device)
        assert net(torch.zeros(2, 3, 8, 8), torch.zeros(2)).shape == (2, 3, 8, 8)
        net(torch.zeros(2, 3, 8, 8), torch.zeros(2)).sum().backward()
    for (name, fake), tensor in zip(net.state_dict().items(), real.state_dict().values(), strict=True):
        assert isinstance(fake, FakeTensor) and fake.shape == tensor.shape and fake.stride() == tensor.stride(), name


def test_convolutions_have_their_channels_last():
    for name in SMALL:
        wide = [p for p in models.create(**SMALL[name]).parameters() if p.dim() == 4]
        assert wide and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def test_a_device():
    net = models.create(**UNET, seed=0, device="meta")
    assert all(a.is_meta for a in net.state_dict().values())


@pytest.mark.cuda
@pytest.mark.parametrize("name", SMALL)
def test_weights_do_not_depend_on_the_device(name):
    state = torch.cuda.get_rng_state()
    one, two = models.create(**SMALL[name], seed=7), models.create(**SMALL[name], seed=7, device="cuda")
    assert torch.equal(state, torch.cuda.get_rng_state())
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert b.is_cuda and torch.equal(a, b.cpu()) and a.stride() == b.stride()


@pytest.mark.parametrize("options, spelled_out", [
    (dict(name="DDPM++", width=8), dict(name="DDPM++", width=8)),
    (dict(name="NCSN++"), dict(name="NCSN++")),
    (dict(name="EDM2-S", blocks=2), dict(name="EDM2", width=192, blocks=2)),
    (dict(name="EDM2-S", width=64), dict(name="EDM2", width=64)),
    (dict(name="DiT-B/4", qknorm=True), dict(name="DiT", patch=4, width=768, depth=12, heads=12, qknorm=True)),
    (dict(name="LightningDiT", patch=1, rope=False),
     dict(name="DiT", patch=1, input_size=16, in_channels=32, swiglu=True, rope=False, rmsnorm=True)),
    (dict(name="LightningDiT-XL/1"), dict(name="DiT", patch=1, width=1152, depth=28, heads=16, input_size=16, in_channels=32,
                                          swiglu=True, rope=True, rmsnorm=True)),
    (dict(name="VAVAE-f16d32"), dict(name="AutoencoderKL", z_channels=32, mult=(1, 1, 2, 2, 4), attention=(4,))),
    (dict(name="DDPM++", attention=8, mult=[1, 2]), dict(name="DDPM++", attention=(8,), mult=(1, 2))),
    (dict(name="DiT", of_no_network=1), dict(name="DiT", of_no_network=1))], ids=str)
def test_what_a_name_implies(options, spelled_out):
    before = dict(options)
    assert models.expand(options) == spelled_out and options == before
    assert models.expand(spelled_out) == spelled_out


@pytest.mark.parametrize("name", models.NETWORKS)
def test_options_that_are_spelled_out_build_the_same_network(name):
    needed = {"AutoencoderKL": dict(z_channels=4, mult=(1, 2)), "AutoencoderKL-f8d4": {}, "VAVAE-f16d32": {}}
    given = needed.get(name, dict(input_size=16))
    expanded = models.expand(dict(name=name, **given))
    assert expanded["name"] in ("DDPM++", "NCSN++", "EDM2", "DiT", "AutoencoderKL")
    with torch.device("meta"):
        one, two = models.create(name, **given), models.create(**expanded)
    assert str(one) == str(two)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in two.state_dict().items()}


def test_every_public_name_is_there():
    sizes = [f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)]
    light = [f"LightningDiT-{size}" for size in "B/1 B/2 L/2 XL/1 XL/2 1p0B/1 1p0B/2 1p6B/1 1p6B/2".split()]
    edm2 = [f"EDM2-{size}" for size in ("XS", "S", "M", "L", "XL")]
    others = "DDPM++ NCSN++ EDM2 DiT LightningDiT AutoencoderKL AutoencoderKL-f8d4 VAVAE-f16d32".split()
    assert sorted(models.NETWORKS) == sorted(sizes + light + edm2 + others)


def test_names_and_types_that_expand_refuses():
    for options in (dict(name="UNet"), dict(width=8)):
        with pytest.raises(ValueError, match="unknown network .*; the networks are DDPM"):
            models.expand(options)
    with pytest.raises(ValueError, match="width='8': expected int"):
        models.expand(dict(name="DDPM++", width="8"))


# ----------------------------------------------------------------------------------------------------------------------
# Whatever create accepts also runs.

VAE = dict(name="AutoencoderKL", z_channels=4, mult=(1, 2), width=32, blocks=1, attention=(1,))
BASES = SMALL | dict(AutoencoderKL=VAE)

# For each option some valid and some invalid values
UNETS = dict(
    input_size=[8, 1, 2, 3, 4, 6, 12, 0, -8], in_channels=[3, 1, 0], num_classes=[0, 1, 4, -1],
    width=[8, 2, 3, 4, 5, 6, 12, 20, 32, 36, 0, -4], mult=[(1, 2), (1,), (2, 1), (1, 1, 1), (3,), 2, [], (0, 1), (1, -1)],
    blocks=[1, 0, 2, -1], attention=[(8,), (), (4, 2), 5, (16,), (0,)], dropout=[0.0, 0.5, 1.0, -0.1],
    second_time=[False, True], sigma_data=[0.5, None, 2, 0.0, -1.0, math.inf])
CHOICES = {
    "DDPM++": UNETS | dict(adaptive_scale=[False, True], augment_dim=[0, 3, -1], time_scale=[1.0, 0.0, -8], edm_time=[False, True],
                           pixelnorm=[False, True]),
    "EDM2": UNETS | dict(head_channels=[8, 1, 2, 3, 5, 64, 0, -1], dropout_res=[None, 4, 0]),
    "DiT": dict(
        input_size=[8, 1, 4, 6, 0], in_channels=[3, 1, 0], num_classes=[0, 4, -1], patch=[2, 1, 3, 8, 0, -2],
        width=[32, 4, 8, 12, 24, 6, 30, 0], depth=[2, 1, 0, -1], heads=[4, 1, 2, 3, 0, -1], mlp_ratio=[4.0, 1, 0.03, 0.01, 0.0, -1.0],
        qknorm=[False, True], swiglu=[False, True], rope=[False, True], rmsnorm=[False, True], wo_shift=[False, True],
        learn_sigma=[False, True], second_time=[False, True], pixelnorm=[False, True], prediction=["velocity", "noise", "score"]),
    "AutoencoderKL": dict(
        z_channels=[4, 1, 0, -1], mult=[(1, 2), (1,), (2, 1, 1), 3, (), (0,), (1, -1)], width=[32, 64, 16, 48, 0],
        blocks=[1, 2, 0, -1], attention=[(1,), (), (0,), (0, 1), (5,), (-1,)], scale=[1.0, 0.2, 0.0, -1.0])}
CHOICES["NCSN++"], CHOICES["LightningDiT"] = CHOICES["DDPM++"], CHOICES["DiT"]


def run(net, options):
    """Asserts that a network's values and derivatives at t = 0 and t = 1 have the right shapes and are finite."""
    for p in net.parameters():
        p.data.add_(0.05)
    if isinstance(net, models.AutoencoderKL):
        mean, std = net.encode(torch.randn(2, 3, 8, 8))
        assert net.decode(mean).shape == (2, 3, 8, 8) and std.isfinite().all()
        return
    size = options["input_size"]
    x, t = torch.randn(2, options.get("in_channels", 3), size, size), torch.tensor([0.0, 1.0])
    y = torch.tensor([0, options["num_classes"]]) if options.get("num_classes") else None
    value, derivative = net(x, t, None, y, tangent=(x, torch.ones(2), None))
    assert value.shape == derivative.shape == x.shape and value.isfinite().all() and derivative.isfinite().all()


def single_and_drawn(name, draws=60):
    """Yields the options of small networks: first with each choice alone, then with several random choices."""
    for key, values in CHOICES[name].items():
        for value in values:
            yield BASES[name] | {key: value}
    random = Random(0)
    for _ in range(draws):
        changed = [key for key in CHOICES[name] if random.random() < 0.3]
        yield BASES[name] | {key: random.choice(CHOICES[name][key]) for key in changed}


@pytest.mark.parametrize("name", BASES)
def test_whatever_is_built_also_runs(name):
    built = 0
    for options in single_and_drawn(name):
        try:
            net = models.create(**options, seed=0)
        except ValueError as error:
            assert str(error).startswith(("cannot build the network", "network option")), options
            continue
        run(net, options)
        built += 1
    assert built > 30


@pytest.mark.parametrize("name, options, said", [
    ("DDPM++", dict(width=5), "width=5 is odd"), ("DDPM++", dict(width=2), "2 channels are less than the 4 of a group"),
    ("DDPM++", dict(width=0), "width=0 is out of range"), ("NCSN++", dict(blocks=-1), "blocks=-1 is out of range"),
    ("DDPM++", dict(mult=()), "mult is empty"), ("DDPM++", dict(mult=(1, 0)), r"mult=\(1, 0\) is out of range"),
    ("DDPM++", dict(dropout=1.0), "dropout=1.0 is out of range"), ("DDPM++", dict(sigma_data=0.0), "sigma_data=0.0 is out of range"),
    ("DDPM++", dict(sigma_data="a"), "sigma_data='a': expected a finite number"),
    ("DDPM++", dict(time_scale=math.nan), "time_scale=nan: expected a finite number"), ("DDPM++", dict(num_classes=-1), "num_classes=-1"),
    ("DDPM++", dict(foo=1), "unexpected keyword argument 'foo'"), ("DDPM++", dict(width=True), "width=True: expected int"),
    ("DDPM++", dict(width=2 ** 40), "too large"), ("DDPM++", dict(augment_dim=-1), "augment_dim=-1"),
    ("EDM2", dict(width=28, mult=(1,)), "28 channels do not divide into 3 attention heads; change head_channels=8, width=28 or mult"),
    ("EDM2", dict(head_channels=0), "head_channels=0"), ("EDM2", dict(mult=[]), "mult is empty"),
    ("EDM2", dict(sigma_data=None), "sigma_data=None: expected a finite number"), ("EDM2", dict(dropout_res=0), "dropout_res=0"),
    ("EDM2", dict(dropout_res=0.5), "dropout_res=0.5: expected int"),
    ("DiT", dict(patch=0), "patch=0"), ("DiT", dict(heads=0), "heads=0"), ("DiT", dict(heads=3), "3 heads do not divide the width 32"),
    ("DiT", dict(heads=16), "4 does not divide the 2 channels of a head"), ("DiT", dict(depth=0), "depth=0"),
    ("DiT", dict(mlp_ratio=0.01), "mlp_ratio=0.01 is too small"), ("DiT", dict(num_classes=-1), "num_classes=-1"),
    ("DiT", dict(input_size=-8), "input_size=-8"),
    ("AutoencoderKL", dict(blocks=0), "blocks=0"), ("AutoencoderKL", dict(width=48), "48 channels do not divide into 32 groups"),
    ("AutoencoderKL", dict(attention=(2,)), "names level 2, and the autoencoder has the levels 0 to 1"),
    ("AutoencoderKL", dict(mult=()), "mult is empty"), ("AutoencoderKL", dict(z_channels=0), "z_channels=0"),
    ("AutoencoderKL", dict(scale=0.0), "scale=0.0")])
def test_what_cannot_run_is_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        models.create(**BASES[name] | options)


def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match="missing a required argument: 'input_size'"):
        models.create("DDPM++")


# ----------------------------------------------------------------------------------------------------------------------
# Precision of a noise predictor.

def test_a_noise_predictor_is_float32_under_autocast():
    """Results equal those without autocast to the last bit, and the output has the precision of the input."""
    net = build("DiT", prediction="noise", num_classes=4)
    x, _, s, y, v = inputs(net)
    t = torch.tensor([0.0, 0.01, 0.6])
    tangent = (v, torch.ones(3), None)
    results = []
    for half in (False, True):
        for checkpointing in (False, True):
            net.grad_checkpoint = checkpointing
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value, derivative = net(x, t, s, y, tangent=tangent)
                plain = net(x, t, s, y)
            gradient, = torch.autograd.grad(plain.square().sum(), net.final_layer.linear.weight)
            results.append((value, derivative, plain, gradient))
    for other in results[1:]:
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(results[0], other))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x.bfloat16(), t, s, y)
    assert out.dtype == torch.bfloat16 and torch.equal(out, net(x.bfloat16().float(), t, s, y).bfloat16())


def test_in_bfloat16_a_noise_predictor_would_be_wrong():
    """Autocast inside the network would make the error of the velocity grow as 1 / t for small t."""
    net = build("DiT", prediction="noise")
    x, *_ = inputs(net)
    t = torch.tensor([0.0, 0.01, 0.6])
    exact, honest = net(x, t), net.output

    def rounded(x, emb):
        with torch.autocast("cpu", torch.bfloat16):
            return honest(x, emb)

    net.output = rounded
    error = (net(x, t) - exact).square().mean((1, 2, 3)).sqrt()
    assert error[0] > 30 * error[2] and error[1] > 30 * error[2]
