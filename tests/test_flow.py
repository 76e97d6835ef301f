"""Tests flow.py against closed forms (Gaussian data, whose loss and flow are known, in any shape) and as a program."""

import math
import pathlib
import types

import numpy as np
import pytest
import torch
from oracle import SHAPES, Beside, Gaussian, mutant
from test_data import NAMES, PIXELS, write_images
from test_training import FLOW, TINY, call, refused, rows, run_two, watch

import data
import decm
import facm
import flow
import models
import sample
from common import checkpoints, seeds, teachers
from common.ema import gamma_of
from common.messages import say_once

SOURCE = pathlib.Path(flow.__file__).read_text()
ORACLE = Gaussian()


def velocity(x, t, s=None, y=None):
    """Returns the exact velocity at t, and the same at 2 - t."""
    assert s is None
    return ORACLE.velocity(x, torch.where(t > 1, 2 - t, t))


def pairs(shape, offset=1.0):
    """Returns x1, x0, t and x_t, with two pairs for each x_t. Their x1 lie one standard deviation above and below the
    mean of x_1 given x_t, so that the means over both pairs are those over all pairs with this x_t."""
    x1, x0, t = ORACLE.draw(shape[0] // 2, shape=shape[1:])
    wide = ORACLE.expand(t, x1)
    xt = (1 - wide) * x0 + wide * x1
    mean, deviation = ORACLE.posterior_mean(xt, t), ORACLE.posterior_sd(wide)
    x1 = torch.cat([mean + offset * deviation, mean - offset * deviation])
    xt, t, wide = torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([wide, wide])
    return x1, (xt - wide * x1) / (1 - wide), t, xt


def loss_and_gradient(theta=0.0, net=velocity, shape=(64, 2, 3, 3), module=flow, mixed=None, **options):
    """Returns the loss of a network at distance theta from the exact one, and its derivative with respect to theta."""
    x1, x0, t, _ = pairs(shape)
    net = Beside(net, theta)
    loss = module.flow_loss(net, x1, x0, t, None, mixed=mixed, **options)
    return loss.item(), torch.autograd.grad(loss, net.theta)[0].item()


# ----------------------------------------------------------------------------------------------------------------------
# The loss.

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_of_the_exact_velocity_is_the_conditional_variance_and_the_minimum(shape):
    """The variance of x_1 - x_0 = (x_1 - x_t) / (1 - t) given x_t is sd^2 / S(t)^2. At a distance from the exact
    velocity, the loss is larger by the mean square of this distance."""
    _, _, t, xt = pairs(shape)
    variance = (ORACLE.sd / ORACLE.S(t)).square().mean().item()
    bump = torch.cos(2 * xt).square().mean().item()
    for theta in (0.0, -0.1, 0.1):
        value, gradient = loss_and_gradient(theta, shape=shape)
        assert value == pytest.approx(variance + theta ** 2 * bump, rel=1e-12)
        assert gradient == pytest.approx(2 * theta * bump, abs=1e-13)


def test_the_loss_over_drawn_pairs_is_the_mean_of_the_conditional_variance():
    x1, x0, t = ORACLE.draw(50_000, shape=(4,))
    loss = flow.flow_loss(velocity, x1, x0, t, None)
    assert loss.item() == pytest.approx((ORACLE.sd / ORACLE.S(t)).square().mean().item(), rel=0.02)


@pytest.mark.parametrize("old, new", [
    ("xt = wide(1 - t, x0) * x0 + wide(t, x1) * x1", "xt = wide(t, x0) * x0 + wide(1 - t, x1) * x1"),
    ("F, v = net(xt, time, None, y), x1 - x0", "F, v = net(xt, time, None, y), x0 - x1"),
    ("F, v = net(xt, time, None, y), x1 - x0", "F, v = net(x1, time, None, y), x1 - x0"),
    ("torch.where(mixed, 2 - t, t)", "torch.where(mixed, 1 + t, t)"),
    ("torch.where(mixed, 2 - t, t)", "torch.where(mixed, 1 - t, t)"),
])
def test_mutants_are_caught(old, new):
    mixed = torch.arange(64) % 2 == 0
    honest, _ = loss_and_gradient(mixed=mixed)
    broken, _ = loss_and_gradient(module=mutant(SOURCE, old, new), mixed=mixed)
    assert broken > honest + 0.1


def test_half_of_the_times_are_2_minus_t_and_nothing_else_changes():
    seen = []

    def net(x, t, s, y):
        seen.append((x, t, s, y))
        return velocity(x, t)
    x1, x0, t = ORACLE.draw(8)
    y, mixed = torch.arange(8), torch.arange(8) % 3 == 0
    plain = flow.flow_loss(net, x1, x0, t, y)
    both = flow.flow_loss(net, x1, x0, t, y, mixed=mixed)
    (x, at_t, s, labels), (x_mixed, at_both, s_mixed, labels_mixed) = seen
    assert torch.equal(at_t, t) and torch.equal(at_both, torch.where(mixed, 2 - t, t))
    assert torch.equal(x, facm.interpolate(x1, x0, t)) and torch.equal(x, x_mixed)
    assert s is None and s_mixed is None and torch.equal(labels, y) and torch.equal(labels_mixed, y)
    assert both == plain                                               # this network returns the same at t and at 2 - t


@pytest.mark.parametrize("shape", [*SHAPES, (16, 1), (16, 1, 5)], ids=str)
def test_the_cosine_distance_is_that_of_facms_anchor(shape):
    """It is taken over the channels and averaged over the pixels. With one channel, it is taken over whole samples."""
    x1, x0, t = ORACLE.draw(shape[0], shape=shape[1:])
    F = velocity(facm.interpolate(x1, x0, t), t)
    for weight in (0.0, 1.0, 0.25):
        loss = flow.flow_loss(velocity, x1, x0, t, None, cosine=weight)
        mse = (F - (x1 - x0)).square().mean()
        distance = facm.fm_loss(F, x1 - x0).mean() - mse
        assert torch.isclose(loss, mse + weight * distance) and distance > 0
    if len(shape) == 2:
        cosine = (F * (x1 - x0)).sum(1) / F.norm(dim=1) / (x1 - x0).norm(dim=1)
        assert torch.isclose(distance, 1 - cosine.mean())


def test_the_loss_has_a_minimum_at_the_data_s_own_direction():
    """If all x_1 are one point, the exact velocity (x_1 - x_t) / (1 - t) has neither an error nor an angle to v."""
    x1, x0, t = ORACLE.draw(32)
    x1 = x1[:1].expand(32, *x1.shape[1:])

    def loss(theta):
        net = Beside(lambda x, t, s, y: (x1 - x) / (1 - ORACLE.expand(t)), theta)
        loss = flow.flow_loss(net, x1, x0, t, None, cosine=1.0)
        return loss.item(), torch.autograd.grad(loss, net.theta)[0].item()
    value, gradient = loss(0.0)
    assert abs(value) < 1e-13 and abs(gradient) < 1e-12
    for theta in (-0.1, 0.1):
        value, gradient = loss(theta)
        assert value > 1e-3 and gradient * theta > 1e-3


def test_sampled_times():
    normal = torch.linspace(-3, 3, 7, dtype=torch.float64)
    t = flow.sample_t(normal, "arctan", 0.3, 1.2)
    assert torch.allclose(torch.log(torch.tan((1 - t) * math.pi / 2)), 0.3 + 1.2 * normal)             # FACM's Eq. 20
    assert torch.equal(t, facm.sample_t(normal, 0.3, 1.2))
    t = flow.sample_t(torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double(), "uniform")
    assert (torch.histc(t, 10, 0, 1) / len(t) - 0.1).abs().max() < 0.004


# ----------------------------------------------------------------------------------------------------------------------
# The samplers. tests/test_sample.py tests their orders, and guidance with an interval, channels and shifted times.

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(flow.SAMPLERS))
def test_samplers_in_any_shape(name, shape):
    noise, y = torch.randn(1, *shape, dtype=torch.float64), torch.ones(shape[0], dtype=torch.int64)
    exact = ORACLE.mu + ORACLE.sd * noise[0]
    sampler = flow.SAMPLERS[name]
    error = (sampler(velocity, noise, None, nfe=99) - exact).abs().mean()
    assert error < (1e-2 if name == "euler" else 1e-3)
    # Guidance changes nothing, because all labels have the same velocity.
    for options in (dict(), dict(cfg_channels=1), dict(cfg_interval=(0.2, 0.6)), dict(shift=0.5)):
        guided = sampler(velocity, noise, y, nfe=9, y_null=0, cfg=2.0, **options)
        plain = sampler(velocity, noise, None, nfe=9, shift=options.get("shift", 1.0))
        assert torch.allclose(guided, plain)


def by_label(x, t, s, y):
    """Returns a velocity that is equal to the label, and thus 0 for the null label 0."""
    return ORACLE.expand(y.double(), x) * torch.ones_like(x)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_guidance_extrapolates_within_its_interval_in_its_channels(shape):
    """In each step of 1/4, v is 3 without guidance, and 0 + 2 (3 - 0) = 6 with it."""
    noise, y = torch.zeros(1, *shape, dtype=torch.float64), torch.full(shape[:1], 3)
    x = flow.integrate(by_label, noise, y, nfe=4, y_null=0, cfg=2.0, cfg_interval=(0.25, 0.5), cfg_channels=1)
    assert (x[:, :1] == (3 + 6 + 6 + 3) / 4).all() and (x[:, 1:] == 3).all()
    x = flow.integrate(by_label, noise, y, nfe=4, y_null=0, cfg=2.0)
    assert (x == 6).all()
    # Heun averages the velocities at both ends of each step except the last one.
    x = flow.integrate(by_label, noise, y, nfe=7, y_null=0, cfg=2.0, cfg_interval=(0.25, 0.5), heun=True)
    assert (x == (4.5 + 6 + 4.5 + 3) / 4).all()


def test_samplers_and_the_calls_of_the_network():
    """The network gets labels and no second time. Guided steps pass both labels in one call, the others only one."""
    calls = []

    def net(x, t, s, y):
        assert s is None
        calls.append((t.tolist(), y.tolist()))
        return torch.zeros_like(x)
    noise, y = torch.randn(1, 2, 5), torch.tensor([3, 4])
    flow.integrate(net, noise, y, nfe=2, y_null=9, cfg=2.0, cfg_interval=(0.0, 0.4))
    assert calls == [([0.0] * 4, [3, 4, 9, 9]), ([0.5] * 2, [3, 4])]
    calls.clear()
    flow.integrate(net, noise, y, nfe=3, heun=True, shift=0.5)                # u = 1/2 is the time 1/3
    assert [labels for _, labels in calls] == [[3, 4]] * 3
    assert [t[0] for t, _ in calls] == pytest.approx([0, 1 / 3, 1 / 3])


@pytest.mark.parametrize("y, options", [(None, dict(y_null=5)), (torch.ones(3, dtype=torch.int64), dict())],
                         ids=["no labels", "no null label"])
def test_guidance_needs_labels_and_the_null_label(y, options):
    with pytest.raises(ValueError, match="guidance"):
        flow.integrate(velocity, torch.randn(1, 3, 2).double(), y, nfe=2, cfg=2.0, **options)


def test_heun_needs_an_odd_number_of_evaluations():
    with pytest.raises(ValueError, match="odd"):
        flow.integrate(velocity, torch.randn(1, 3, 2).double(), None, nfe=4, heun=True)


def test_options_of_the_samplers():
    """The teachers that facm.py trained in earlier versions were guided from their --t-low on."""
    assert flow.sampler_options(dict(net=dict(num_classes=10))) == {
        name: dict(y_null=10, cfg_interval=(0.0, 1.0)) for name in ("euler", "heun")}
    old = flow.sampler_options(dict(net=dict(num_classes=10), t_low=0.125))
    assert old["euler"] == dict(y_null=10, cfg_interval=(0.125, 1.0)) and flow.default_sampler(1, {}) == "euler"
    assert set(flow.DETERMINISTIC) == set(flow.SAMPLERS)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_preview_is_guided_if_there_are_labels(num_classes):
    def net(x, t, s, y):
        return by_label(x, t, s, y.where(y < 3, 0)) if num_classes else torch.ones_like(x)
    net.num_classes = num_classes
    images = flow.preview(net, torch.zeros(1, 4, 1, 2, 2), types.SimpleNamespace(uncond=False))
    plain, guided = images[:4, 0, 0, 0], images[4:, 0, 0, 0]
    assert plain.tolist() == pytest.approx([0, 1, 2, 0] if num_classes else [1] * 4)
    if num_classes:                        # the null label's velocity is 0; 17 of 20 steps are guided
        assert guided.tolist() == pytest.approx([0, 1 + 0.75 * 17 / 20, 2 + 1.5 * 17 / 20, 0])
    else:
        assert len(guided) == 0


# ----------------------------------------------------------------------------------------------------------------------
# The average of the weights.

@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_relative_width_of_the_average_gives_its_exponent(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert math.isclose((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)), sigma_rel ** 2)


def test_the_average_of_a_run_is_the_power_function_average(tmp_path, monkeypatch):
    """After 5 steps, the weights of step k have the share (k/5)^(gamma+1) - ((k-1)/5)^(gamma+1) in the average."""
    weights = []
    for steps in range(1, 6):
        call(monkeypatch, flow, *FLOW, "--lr", 0.01, "--ema-sigma", 0.2, "--steps", steps, "--out", tmp_path / "run")
        weights.append({k: v.double().clone() for k, v in checkpoints.read(tmp_path / "run/ckpt.pt")["model"].items()})
    ema = checkpoints.read(tmp_path / "run/ckpt.pt")["ema"]
    shares = ((torch.arange(6).double() / 5) ** (gamma_of(0.2) + 1)).diff()
    for name in ema:
        expected = sum(share * step[name] for share, step in zip(shares, weights))
        assert torch.allclose(ema[name].double(), expected, atol=1e-5), name
    moved = max((weights[0][k] - weights[-1][k]).abs().max() for k in ema)
    assert moved > 1e-2


# ----------------------------------------------------------------------------------------------------------------------
# As a program.

@pytest.mark.parametrize("net, mixes", [
    ("", True), ("edm_time=True", False), ("name=DiT patch=4 width=32 depth=1 heads=4", True),
    ("name=DiT patch=4 width=32 depth=1 heads=4 learn_sigma=True prediction=noise", False)], ids=str)
def test_a_network_that_cannot_tell_2_minus_t_is_trained_at_t_alone(tmp_path, monkeypatch, net, mixes):
    calls = {}
    watch(monkeypatch, calls, flow, "flow_loss")
    flags = [flag for flag in FLOW if flag not in ("--net", "width=8", "mult=1,1", "blocks=1", "dropout=0.2")]
    small = "" if "DiT" in net else "width=8 mult=1,1 blocks=1"
    call(monkeypatch, flow, *flags, "--net", *small.split(), *net.split(), "--steps", 4, "--out", tmp_path / "run")
    mixed = torch.stack([options["mixed"] for options in calls["flow_loss options"]])
    assert models.create(**checkpoints.read(tmp_path / "run/ckpt.pt")["args"]["net"]).expandable == mixes
    assert 8 < mixed.sum() < 24 if mixes else not mixed.any()


def test_flows_loop_gives_the_method_what_the_flags_say(tmp_path, monkeypatch):
    """The seed and the step determine which samples are mixed and which lose their labels."""
    calls = {}
    watch(monkeypatch, calls, flow, "flow_loss")
    call(monkeypatch, flow, *FLOW, "--steps", 2, "--seed", 7, "--label-drop", 0.5, "--times", "uniform",
         "--cosine", 0.25, "--out", tmp_path / "run")
    for step in range(2):
        g = seeds.generator("cpu", 7, "step", step)
        x0, normal = torch.randn((8, 3, 12, 12), generator=g), torch.randn(8, generator=g)
        drop, mix = torch.rand(8, generator=g) < 0.5, torch.rand(8, generator=g) < 0.5
        _, _, noise, t, y = calls["flow_loss"][step]
        options = calls["flow_loss options"][step]
        assert torch.equal(noise, x0) and torch.equal(t, torch.special.ndtr(normal)) and torch.equal(y == 10, drop)
        assert torch.equal(options["mixed"], mix) and options["cosine"] == 0.25


def test_a_short_run_learns_the_velocity_of_gaussian_data():
    """The samples of the learned velocity, at t and at 2 - t, have the mean and the deviation of the data."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                 torch.nn.Linear(64, 2))

    def net(x, t, s, y):
        offset, slope = layers(torch.stack([t, (t > 1).float()], dim=1)).chunk(2, dim=1)
        return offset + slope * x
    optimizer = torch.optim.Adam(layers.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 800)
    g = torch.Generator().manual_seed(0)
    for _ in range(800):
        x1, x0 = 0.7 + 0.4 * torch.randn(256, 1, generator=g), torch.randn(256, 1, generator=g)
        t = flow.sample_t(torch.randn(256, generator=g))
        loss = flow.flow_loss(net, x1, x0, t, None, mixed=torch.arange(256) < 128)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    noise = torch.randn(1, 4000, 1, generator=g)
    for there in (net, lambda x, t, s, y: net(x, 2 - t, s, y)):
        x = flow.integrate(there, noise, None, nfe=39, heun=True)
        assert abs(x.mean() - 0.7) < 0.06 and abs(x.std() - 0.4) < 0.06


def small_preset(monkeypatch, name, **values):
    """Gives the preset `name` of flow.py few steps and small batches."""
    preset = flow.PRESETS[name] | dict(steps=2, batch=4, micro_batch=None, warmup=0) | values
    monkeypatch.setitem(flow.PRESETS, name, preset)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_the_default_teacher_has_the_students_data_and_network(tmp_path, monkeypatch, kind):
    """For other images with a preset, the default teacher has the size, channels, labels and network of the student."""
    small_preset(monkeypatch, "cifar10")
    path = write_images(tmp_path / "set", NAMES)
    flags = ["--channels", 1]
    if kind == "npz":
        path, flags = tmp_path / "set.npz", []
        np.savez(path, images=PIXELS)
    call(monkeypatch, facm, "--device", "cpu", "--data", path, "--preset", "cifar10", "--resolution", 8, *flags,
         "--batch", 4, "--steps", 1, "--no-xflip", "--net", "width=8", "mult=1,1", "blocks=1", "attention=()",
         "--out", tmp_path / "run")
    student, teacher = checkpoints.read(tmp_path / "run/ckpt.pt"), checkpoints.read("runs/flow-set/ckpt.pt")
    assert (teacher["method"], teacher["step"]) == ("flow", 2)
    ours, theirs = student["args"], teacher["args"]
    assert ours["net"]["width"] == 8 and ours["net"]["num_classes"] == 0
    assert ours["net"]["in_channels"] == (1 if kind == "folder" else 3)
    assert ours["net"] == theirs["net"] | dict(second_time=False)
    for name in ("data", "resolution", "channels", "xflip", "uncond", "samples"):
        assert ours[name] == theirs[name], name


def test_an_unfinished_default_teacher_is_resumed_where_it_lies(tmp_path, monkeypatch, capsys):
    """The folder was moved to runs/flow-glyphs, and the flags of the teacher still name the old folder."""
    small_preset(monkeypatch, "glyphs")
    call(monkeypatch, flow, *FLOW, "--batch", 4, "--steps", 1, "--out", tmp_path / "elsewhere")
    pathlib.Path("runs").mkdir()
    (tmp_path / "elsewhere").rename("runs/flow-glyphs")
    held = checkpoints.read("runs/flow-glyphs/ckpt.pt")
    held["args"]["steps"] = 3                                          # as if it had been stopped after one step
    checkpoints.save(pathlib.Path("runs/flow-glyphs/ckpt.pt"), held)
    say_once.cache_clear()
    call(monkeypatch, facm, *TINY, "--steps", 1, "--out", tmp_path / "run")
    assert checkpoints.read("runs/flow-glyphs/ckpt.pt")["step"] == 3 and not (tmp_path / "elsewhere").exists()
    assert "it has 1 of 3 steps" not in capsys.readouterr().err


def test_a_finished_default_teacher_may_have_a_batch_that_the_processes_do_not_divide(teacher, monkeypatch):
    """Three processes cannot divide the preset's batch of 16, but a finished teacher has no batch to divide."""
    path = pathlib.Path("runs/flow-glyphs/ckpt.pt")
    path.parent.mkdir(parents=True)
    checkpoints.save(path, checkpoints.read(teacher))
    torchrun = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["facm.py", *TINY, "--batch", "9"])
    args = facm.parse_args()
    assert teachers.default_teacher(args, data.load_for(args), None) == path


def test_a_run_of_another_method_is_no_default_teacher(tmp_path, monkeypatch, capsys, teacher):
    held = checkpoints.read(teacher)
    pathlib.Path("runs/flow-glyphs").mkdir(parents=True)
    checkpoints.save(pathlib.Path("runs/flow-glyphs/ckpt.pt"), held | dict(method="decm"))
    said = refused(monkeypatch, capsys, decm, *TINY, "--out", tmp_path / "run")
    assert "is a run of decm.py, which cannot be a teacher; name a run of flow.py by --teacher" in said


def test_two_processes_train_the_default_teacher_once(tmp_path, monkeypatch):
    """The teacher was stopped after one step, and the two processes of the student resume it together."""
    common = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in FLOW]
    call(monkeypatch, flow, *common, "--steps", 2, "--out", tmp_path / "one")
    call(monkeypatch, flow, *common, "--steps", 1)
    held = checkpoints.read("runs/flow-glyphs/ckpt.pt")
    held["args"]["steps"] = 2
    checkpoints.save(pathlib.Path("runs/flow-glyphs/ckpt.pt"), held)
    run_two(*common, "--jvp", "fd", "--steps", 1, "--out", tmp_path / "run")
    a, b = checkpoints.read(tmp_path / "one/ckpt.pt"), checkpoints.read("runs/flow-glyphs/ckpt.pt")
    assert a["step"] == b["step"] == 2
    assert max((a["model"][k] - b["model"][k]).abs().max() for k in a["model"]) < 1e-3
    assert [row["step"] for row in rows(pathlib.Path("runs/flow-glyphs"))] == [1, 2]


def test_a_flow_is_sampled_with_and_without_guidance(teacher, tmp_path, monkeypatch):
    images = {}
    kinds = dict(plain="", guided="--cfg 3", early="--cfg 3 --cfg-interval 0 0.4", heun="--sampler heun")
    for name, flags in kinds.items():
        call(monkeypatch, sample, "--ckpt", teacher, "--nfe", 3, "--n", 4, "--device", "cpu", *flags.split(),
             "--out", tmp_path / f"{name}.npz")
        images[name] = np.load(tmp_path / f"{name}.npz")["arr_0"]
    net = models.create(**checkpoints.read(teacher)["args"]["net"]).eval()
    net.load_state_dict(checkpoints.read(teacher)["ema"])
    noise, y = sample.draw_noise(0, range(64), 1, (3, 12, 12)), torch.arange(64) % 10
    expected = data.to_uint8(flow.integrate(net, noise, y, nfe=3, y_null=10, cfg=3.0)).numpy()[:4]
    assert np.abs(images["guided"].astype(int) - expected).max() <= 1
    assert len({a.tobytes() for a in images.values()}) == 4
