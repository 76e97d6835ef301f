"""Tests baselines.py against closed forms (its five losses under the Gaussian oracle in any shape, mutants, limits) and
as a program."""

import math
import pathlib

import pytest
import torch
from oracle import SHAPES, Beside, Gaussian, fused, loss_and_gradient, mutant
from test_facm import ORACLE, OracleNet
from test_training import (
    FLOW,
    TINY,
    assert_same_run,
    call,
    first_gradient,
    perturb,
    refused,
    rows,
    run_two,
    watch,
)

import baselines
import facm
import flow
import sample
from common import checkpoints, flags, seeds
from jvp import JVP, forward_mode

SOURCE = pathlib.Path(baselines.__file__).read_text()


class AverageNet:
    """The ideal network of MeanFlow returns the average velocity from t to s, which is the velocity where s = t."""

    def __call__(self, x, t, s, y=None):
        there = s == t
        average = ORACLE.average_velocity(x, t, torch.where(there, t + 0.5, s))       # avoids 0 / 0
        return torch.where(ORACLE.expand(there, x), ORACLE.velocity(x, t), average)


IDEAL = dict(scm=OracleNet(), meanflow=AverageNet(), imf=AverageNet(), ayf=AverageNet(), alphaflow=AverageNet())
EXACT = ["scm", "meanflow", "imf", "ayf"]          # exact jumps have the loss 0; AlphaFlow's tends to 0 with alpha


def compared(module, objective, net=None, mode="exact", shape=(64, 2, 3, 3), y=None, warm=1.0,
             phi=torch.zeros(3).double(), alpha=1e-6, **guidance):
    """Returns the loss of an objective's ideal network, or of `net`, in float64. A quarter of the samples has r = t."""
    x1, x0, t = ORACLE.draw(shape[0], shape=shape[1:])
    net, jvp = net or fused(IDEAL[objective]), JVP[mode]
    options = dict(teacher=OracleNet(teacher=True)) | guidance
    if objective == "scm":
        return module.scm_loss(net, jvp, x1, x0, t, y, warm=warm, phi=phi, **options)
    r = torch.where(torch.arange(len(t)) < len(t) // 4, t, t + (1 - t) * torch.linspace(0.1, 1, len(t)).double())
    if objective == "ayf":
        options["warm"] = warm
    if objective == "alphaflow":
        return module.alphaflow_loss(net, x1, x0, t, r, y, alpha=alpha, **options)
    return getattr(module, f"{objective}_loss")(net, jvp, x1, x0, t, r, y, **options)


@pytest.mark.parametrize("objective", EXACT)
def test_oracle_has_zero_residual_under_the_compared_objectives(objective):
    assert compared(baselines, objective) < 1e-14
    assert compared(baselines, objective, mode="fused") < 1e-14
    assert compared(baselines, objective, mode="fd") < 1e-4


SCM_TARGET = "g = F_cm.detach() - v - warm * wide(1 - t, v) * dF_dt"
SCM_LINE = "at=(xt, *c_cm, y), along=(v, 1, 0)"
MEANFLOW_ERROR = "(F_r - v - wide(r - t, v) * dF_dt)"
MEANFLOW_LINE = "at=(xt, t, r, y), along=(v, 1, 0)"
IMF_LINE = "at=(xt, t, r, y), along=(own, 1, 0)"
AYF_TANGENT = "(F_r.detach() - v - warm * wide(r - t, v) * dF_dt)"
ALPHA_TARGET = "target = alpha * v + (1 - alpha) * F_s"


def mutant_of(objective, old, new):
    """Returns the module in which the loss of this objective has `new` instead of `old`."""
    start = SOURCE.index(f"def {objective}_loss")
    end = SOURCE.index("\n\n\n", start)
    loss = SOURCE[start:end]
    assert loss.count(old) == 1, "the mutated line has changed; adapt the test"
    return mutant(SOURCE, loss, loss.replace(old, new))


@pytest.mark.parametrize("objective, old, new", [
    ("scm", SCM_TARGET, "g = F_cm.detach() - v + warm * wide(1 - t, v) * dF_dt"),
    ("scm", SCM_TARGET, "g = F_cm.detach() - v - warm * wide(t, v) * dF_dt"),
    ("scm", SCM_TARGET, "g = F_cm.detach() + v - warm * wide(1 - t, v) * dF_dt"),
    ("scm", SCM_LINE, "at=(xt, *c_cm, y), along=(v, 0, 0)"),
    ("meanflow", MEANFLOW_ERROR, "(F_r - v + wide(r - t, v) * dF_dt)"),
    ("meanflow", MEANFLOW_ERROR, "(F_r - v - wide(1 - t, v) * dF_dt)"),
    ("meanflow", MEANFLOW_LINE, "at=(xt, r, t, y), along=(v, 1, 0)"),
    ("meanflow", MEANFLOW_LINE, "at=(xt, t, r, y), along=(v, -1, 0)"),
    ("meanflow", MEANFLOW_LINE, "at=(xt, t, r, y), along=(v, 1, 1)"),
    ("imf", MEANFLOW_ERROR, "(F_r - v + wide(r - t, v) * dF_dt)"),
    ("imf", "own = net(xt, *c_fm, y)", "own = net(xt, t, r, y)"),
    ("imf", IMF_LINE, "at=(xt, t, r, y), along=(-own, 1, 0)"),
    ("imf", IMF_LINE, "at=(xt, r, t, y), along=(own, 1, 0)"),
    ("ayf", AYF_TANGENT, "(F_r.detach() - v + warm * wide(r - t, v) * dF_dt)"),
    ("ayf", AYF_TANGENT, "(F_r.detach() - v - warm * wide(1 - t, v) * dF_dt)"),
    ("ayf", MEANFLOW_LINE, "at=(xt, t, r, y), along=(v, 1, 1)"),
])
def test_mutants_of_the_compared_objectives_are_caught(objective, old, new):
    assert compared(mutant_of(objective, old, new), objective) > 1e-2


@pytest.mark.parametrize("old, new", [
    ("s = t + alpha * (r - t)", "s = t - alpha * (r - t)"),
    ("xs = xt + wide(s - t, v) * v", "xs = xt - wide(s - t, v) * v"),
    ("xs = xt + wide(s - t, v) * v", "xs = xt"),
    ("F_s = net(xs, s, r, y)", "F_s = net(xs, t, r, y)"),
    (ALPHA_TARGET, "target = (1 - alpha) * v + alpha * F_s"),
    (ALPHA_TARGET, "target = alpha * v + F_s"),
    ("e / alpha / (", "e / ("),
    ("e / alpha ** 2 + c", "e / alpha + c"),
])
def test_mutants_of_alphaflow_have_not_meanflows_gradient(old, new):
    """The gradients are compared near the exact network, for a small alpha. Two mutants change only the size."""
    _, expected = loss_and_gradient(lambda net: compared(baselines, "meanflow", net, "fused"), IDEAL["meanflow"], 0.1)
    module = mutant_of("alphaflow", old, new)
    for source, right in ((baselines, True), (module, False)):
        net = Beside(IDEAL["alphaflow"], 0.1)
        gradient, = torch.autograd.grad(compared(source, "alphaflow", net), net.theta)
        assert (abs(gradient.item() - expected) < 1e-4 * abs(expected)) == right


def test_alphaflow_tends_to_meanflow_like_alpha():
    """Near the exact network, the difference between AlphaFlow's and MeanFlow's gradients is proportional to alpha."""
    for theta in (-0.1, 0.1):
        _, limit = loss_and_gradient(lambda net: compared(baselines, "meanflow", net), IDEAL["meanflow"], theta)
        apart = []
        for alpha in (1e-2, 5e-3, 2.5e-3):
            _, gradient = loss_and_gradient(
                lambda net, alpha=alpha: compared(baselines, "alphaflow", net, alpha=alpha), IDEAL["alphaflow"], theta)
            apart.append(abs(gradient - limit))
        assert apart[0] > 1e-5
        assert apart[0] / apart[1] == pytest.approx(2, rel=0.05) and apart[1] / apart[2] == pytest.approx(2, rel=0.05)


def test_alphaflow_at_1_is_flow_matching_to_the_bit():
    """With alpha = 1 the target is v, whatever the network returns at x_s, and the loss is e / (e + c)."""
    x1, x0, t = ORACLE.draw(16)
    r = t + (1 - t) / 2
    net = Beside(IDEAL["alphaflow"], 0.1)
    loss = baselines.alphaflow_loss(net, x1, x0, t, r, None, alpha=1.0, c=1e-2)
    gradient, = torch.autograd.grad(loss, net.theta)
    e = facm.mean((net(facm.interpolate(x1, x0, t), t, r) - (x1 - x0)).square())
    expected = (e / (e + 1e-2).detach()).mean()
    assert torch.equal(loss, expected) and torch.equal(gradient, torch.autograd.grad(expected, net.theta)[0])


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_on_straight_paths_alphaflow_vanishes_for_any_alpha(alpha):
    """If the data are a single point, all paths are straight, and each part of a jump has the velocity of the whole."""
    point = Gaussian(mu=0.7, sd=0.0)

    def jump(x, t, s, y=None):
        return point.velocity(x, t)
    x1, x0, t = point.draw(16)
    loss = baselines.alphaflow_loss(jump, x1, x0, 0.9 * t, 0.9 * t + 0.1, None, alpha=alpha)
    assert loss < 1e-20
    assert baselines.alphaflow_loss(lambda *a: 1.1 * jump(*a), x1, x0, 0.9 * t, 0.9 * t + 0.1, None, alpha=alpha) > 1e-2


def test_alpha_falls_along_a_sigmoid_and_ends_at_its_floor():
    shares = [i / 100 for i in range(101)]
    alphas = [baselines.alpha_after(share) for share in shares]
    assert alphas[0] == 1 and alphas[-1] == 0.005 and alphas == sorted(alphas, reverse=True)
    assert alphas[50] == 0.5 and math.isclose(alphas[60], 1 / (1 + math.exp(2.5)))


@pytest.mark.parametrize("objective", ["meanflow", "imf"])
def test_from_scratch_the_exact_network_is_stationary(objective):
    """v is the velocity of a pair (x0, x1). The mean of the gradient over the pairs is 0 at the exact network, but not
    beside it. The adaptive weight is off (p = 0), because it is not linear."""
    x1, x0, t = ORACLE.draw(4096)
    r = t + (1 - t) / 2
    for theta in (0.0, 0.3):
        net = Beside(IDEAL[objective])
        net.theta = torch.full((4096, 1, 1, 1), theta, dtype=torch.float64, requires_grad=True)
        loss = getattr(baselines, f"{objective}_loss")(fused(net), JVP["fused"], x1, x0, t, r, None, p=0)
        gradients, = torch.autograd.grad(4096 * loss, net.theta)
        error = gradients.std() / 64
        assert (gradients.mean().abs() < 4 * error) == (theta == 0)


def test_scm_warms_up_normalises_and_pulls_against_the_tangent():
    """With the share q of dF/dt, the oracle's tangent is cos(pi t/2) (1-q) (1-t) dF/dt, divided by its rms + 0.1."""
    x1, x0, t = ORACLE.draw(64)
    xt = facm.interpolate(x1, x0, t)
    dF_dt = forward_mode(OracleNet(), at=(xt, t, None, None), along=(ORACLE.velocity(xt, t), 1, 0))
    weight = torch.cos(math.pi / 2 * t) * 0.75 * (1 - t)
    length = (ORACLE.expand(weight) * dF_dt).square().mean(dim=(1, 2, 3)).sqrt()
    assert torch.allclose(compared(baselines, "scm", warm=0.25), (length / (length + 0.1)).square().mean())

    F = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)              # g = -v = (-3, 4)
    v, zero = torch.tensor([3.0, -4.0]).double().reshape(1, 1, 1, 2), torch.zeros(1).double()
    baselines.scm_loss(None, lambda *_, **__: (F, torch.zeros_like(F)), v, v, zero, None, warm=1.0, phi=zero,
                       teacher=lambda *_: v).backward()
    assert torch.allclose(F.grad.flatten(), torch.tensor([-3.0, 4.0]).double() / (math.sqrt(12.5) + 0.1))


def test_scm_learns_the_logarithm_of_the_error_over_time():
    """With respect to phi_k, e exp(-a) + a has the derivative (1 - e exp(-a)) cos(pi k t), which is 0 at a = ln e."""
    t, phi = torch.tensor([0.3, 0.7]).double(), torch.tensor([0.2, -0.1, 0.4]).double().requires_grad_()
    basis = torch.stack([torch.ones(2).double(), torch.cos(math.pi * t), torch.cos(2 * math.pi * t)], dim=1)
    a = basis @ phi.detach()
    assert torch.allclose(baselines.log_weight(t, phi), a)
    F = torch.ones(2, 1, 1, 1, dtype=torch.float64)                                   # so e = (c / (c + 0.1))^2
    c = torch.cos(math.pi / 2 * t)
    zero = torch.zeros_like(F)
    baselines.scm_loss(None, lambda *_, **__: (F, zero), zero, zero, t, None, warm=1.0, phi=phi,
                       teacher=lambda *_: zero).backward()
    assert torch.allclose(phi.grad, (basis * (1 - torch.exp(-a) * (c / (c + 0.1)) ** 2)[:, None]).mean(0))


def test_meanflow_weight_and_times():
    """The adaptive weight makes the loss e / (e + c), where the denominator has no gradient. The times have t <= r, and
    r = t for exactly the chosen samples."""
    F = torch.tensor([0.3, -0.2]).double().reshape(1, 1, 1, 2).requires_grad_()
    t, zero = torch.full((1,), 0.5).double(), torch.zeros(1, 1, 1, 2).double()
    loss = baselines.meanflow_loss(None, lambda *_, **__: (F, zero), zero, zero, t, t, None, c=1e-3,
                                   teacher=lambda *_: zero)
    assert math.isclose(loss.item(), 0.065 / 0.066)
    loss.backward()
    assert torch.allclose(F.grad.flatten(), torch.tensor([0.3, -0.2]).double() / 0.066)
    same = torch.arange(1000) % 4 < 3
    normal = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    t, r = baselines.sample_t_r(normal, same, -0.8, 1.6)
    assert torch.equal(r == t, same) and (r[~same] > t[~same]).all()
    both = torch.cat([t, r[~same]]).sort().values
    drawn = facm.sample_t(normal, -0.8, 1.6)
    assert torch.isin(both, drawn).all() and torch.equal(t, drawn.min(0).values)


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_jumps_follow_the_flow_exactly(nfe):
    noise = torch.randn(1, 16, 2, 3, 3, dtype=torch.float64)
    assert torch.allclose(baselines.sample_jumps(AverageNet(), noise, None, nfe=nfe), ORACLE.mu + ORACLE.sd * noise[0])


@pytest.mark.parametrize("objective", EXACT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_any_shape_the_exact_jump_is_the_minimum(shape, objective):
    """Guidance (w = 2) changes nothing, because the teacher has the same velocity for all labels."""
    y = torch.ones(shape[0], dtype=torch.int64)
    for mode in ("exact", "fused"):
        def loss(net):
            return compared(baselines, objective, net, mode, shape, y, w=2.0, y_null=0)
        value, gradient = loss_and_gradient(loss, IDEAL[objective])
        assert abs(value) < 1e-13 and abs(gradient) < 1e-12
        for theta in (-0.1, 0.1):
            value, gradient = loss_and_gradient(loss, IDEAL[objective], theta)
            assert value > 1e-3 and gradient * theta > 1e-3
    noise = torch.randn(1, *shape, dtype=torch.float64)
    jumped = baselines.sample_jumps(AverageNet(), noise, None, nfe=3)
    assert torch.allclose(jumped, ORACLE.mu + ORACLE.sd * noise[0])


@pytest.mark.parametrize("objective", list(IDEAL))
def test_guidance_needs_labels_and_the_null_label(objective):
    for teacher in (lambda x, t, s, y: x, None):
        for y, y_null in ((None, 5), (torch.ones(64, dtype=torch.int64), None)):
            with pytest.raises(ValueError, match="guidance"):
                compared(baselines, objective, mode="fd", y=y, y_null=y_null, w=1.75, teacher=teacher)


@pytest.mark.parametrize("objective", list(IDEAL))
def test_the_losses_take_any_callable_without_labels(objective):
    """The losses accept y = None, and a network and a teacher without attributes."""
    def net(x, t, s, y):
        assert (s is None) == (objective == "scm") and y is None
        return x * ORACLE.expand(t)
    for teacher in (None, lambda x, t, s, y: x):
        assert compared(baselines, objective, net, "fd", teacher=teacher) > 0


def test_scms_learned_weight_keeps_its_digits_under_autocast():
    t, phi = torch.rand(4), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        a = baselines.log_weight(t, phi)
    assert torch.equal(a, baselines.log_weight(t, phi)) and a.dtype == torch.float32
    expected = sum(phi[k] * torch.cos(math.pi * k * t) for k in range(8))
    assert torch.allclose(a, expected, atol=1e-5)


def test_all_but_scm_are_sampled_by_jumps():
    for objective in ("meanflow", "imf", "ayf", "alphaflow"):
        assert baselines.default_sampler(2, dict(objective=objective)) == "jumps"
    assert baselines.default_sampler(2, dict(objective="scm")) == "cm"


# ----------------------------------------------------------------------------------------------------------------------
# As a program.

WITHOUT_JVP = TINY[:TINY.index("--jvp")] + TINY[TINY.index("--jvp") + 2:]

def test_scm_resumes_with_its_learned_weight(teacher, tmp_path, monkeypatch):
    flags = [*TINY, "--objective", "scm", "--teacher", teacher, "--tangent-warmup", 3]
    call(monkeypatch, baselines, *flags, "--steps", 4, "--out", tmp_path / "whole")
    for steps in range(1, 5):
        call(monkeypatch, baselines, *flags, "--steps", steps, "--out", tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    whole, part = (checkpoints.read(tmp_path / name / "ckpt.pt")["extra"][0] for name in ("whole", "run"))
    assert torch.equal(whole, part) and whole.abs().min() > 0


@pytest.mark.parametrize("number, flags", [(0, []), (3, ["--equal", 0.75]), (6, ["--teacher", "none"])], ids=str)
def test_meanflow_has_exactly_its_share_of_equal_times(teacher, tmp_path, monkeypatch, number, flags):
    """The share is 0 with a teacher, 0.75 from scratch, or --equal. It is that of the batch, not of a micro-batch."""
    seen, honest = [], baselines.meanflow_loss

    def watched(net, jvp, x1, x0, t, r, *more, **options):
        seen.append((r == t).sum().item())
        return honest(net, jvp, x1, x0, t, r, *more, **options)
    monkeypatch.setattr(baselines, "meanflow_loss", watched)
    batch = 8 if number == 6 else 4
    call(monkeypatch, baselines, *TINY, "--objective", "meanflow", "--teacher", teacher, "--steps", 2, "--batch", batch,
         "--micro-batch", batch // 2, *flags, "--out", tmp_path / "run")
    assert [sum(pair) for pair in zip(seen[::2], seen[1::2])] == [number] * 2
    assert checkpoints.read(tmp_path / "run" / "ckpt.pt")["args"]["net"]["second_time"]


def test_scm_counts_the_warm_up_of_its_tangent_from_the_first_step_on(teacher, tmp_path, monkeypatch):
    calls = {}
    watch(monkeypatch, calls, baselines, "scm_loss")
    call(monkeypatch, baselines, *TINY, "--objective", "scm", "--jvp", "fd", "--teacher", teacher, "--steps", 3,
         "--tangent-warmup", 2, "--out", tmp_path)
    assert [options["warm"] for options in calls["scm_loss options"]] == [0.5, 1, 1]


@pytest.mark.parametrize("flags", [
    ["--objective", "scm", "--w", "1", "--tangent-warmup", "1"],
    ["--objective", "meanflow", "--equal", "0.5"]], ids=str)
def test_processes_and_micro_batches_give_the_gradient_of_one_process(tmp_path, monkeypatch, flags):
    common = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in TINY]
    common += ["--teacher", "none", "--steps", 1, *flags]
    call(monkeypatch, baselines, *common, "--out", tmp_path / "one")
    call(monkeypatch, baselines, *common, "--out", tmp_path / "pieces", "--micro-batch", 3)
    run_two(*common, "--out", tmp_path / "two", "--micro-batch", 2, script="baselines.py")
    one, (line,) = first_gradient(tmp_path / "one"), rows(tmp_path / "one")
    for other in ("pieces", "two"):
        assert (first_gradient(tmp_path / other) - one).abs().max() < 1e-5 * one.abs().max(), other
        assert {**rows(tmp_path / other)[0], "images_per_s": 0} == pytest.approx({**line, "images_per_s": 0}, abs=5e-6)
    assert one.abs().max() > 0


def test_fused_and_exact_train_alike(tmp_path, monkeypatch):
    """Both ways to dF/dt give the same gradient from scratch, with guidance and dropout."""
    perturb(monkeypatch)
    for jvp in ("fused", "exact"):
        call(monkeypatch, baselines, *TINY, "--teacher", "none", "--steps", 1, "--jvp", jvp, "--out", tmp_path / jvp)
    a, b = (first_gradient(tmp_path / jvp) for jvp in ("fused", "exact"))
    assert (a - b).abs().max() < 1e-5 * b.abs().max() > 0


@pytest.mark.parametrize("flags", [
    ["--objective", "scm", "--jvp", "fd"],
    ["--objective", "scm", "--net", "width=8", "mult=1,1", "blocks=1", "adaptive_scale=True", "pixelnorm=True"],
    ["--objective", "meanflow", "--precision", "bf16"],
    ["--objective", "ayf", "--equal", "0.25"],
    ["--objective", "alphaflow", "--precision", "bf16"],
    ["--objective", "alphaflow", "--teacher", "none"],
    ["--objective", "imf", "--teacher", "none", "--w", "2"]], ids=str)
def test_every_option_trains_and_samples(tmp_path, monkeypatch, flags):
    net = flags[flags.index("--net"):] if "--net" in flags else []
    call(monkeypatch, flow, *FLOW, *net, "--steps", 2, "--out", tmp_path / "flow")
    teacher = [] if "--teacher" in flags else ["--teacher", tmp_path / "flow"]
    tiny = WITHOUT_JVP if "alphaflow" in flags else TINY
    call(monkeypatch, baselines, *tiny, *flags, *teacher, "--steps", 2, "--out", tmp_path / "run")
    assert all(0 < row["grad_norm"] < math.inf for row in rows(tmp_path / "run"))
    for name in ("run", "flow"):
        call(monkeypatch, sample, "--ckpt", tmp_path / name, "--nfe", 2, "--n", 2, "--device", "cpu",
             "--out", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize("flags, words", [
    (["--objective", "scm", "--teacher", "none"], "--w 1"), (["--objective", "facm"], "facm"),
    (["--objective", "ayf", "--teacher", "none"], "--objective ayf"), (["--objective", "imf"], "--teacher none"),
    (["--objective", "alphaflow", "--jvp", "fd"], "--jvp has no effect"),
    (["--objective", "ayf", "--c", "0.1"], "--c has no effect"),
    (["--alpha-steps", "3"], "--alpha-steps has no effect"),
    (["--w", "2", "--net", "num_classes=0"], "--w")])
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, baselines, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run/ckpt.pt").exists() and not pathlib.Path("runs").exists()


def test_alphaflows_alpha_follows_its_steps_also_when_a_run_is_made_longer(teacher, tmp_path, monkeypatch, capsys):
    calls = {}
    flags = [*WITHOUT_JVP, "--objective", "alphaflow", "--teacher", teacher, "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        watch(patch, calls, baselines, "alphaflow_loss")
        call(patch, baselines, *flags, "--steps", 2, "--alpha-steps", 2)
    assert [options["alpha"] for options in calls["alphaflow_loss options"]] == [1, 0.5]
    capsys.readouterr()
    assert "alpha_steps 2, not 4" in refused(monkeypatch, capsys, baselines, *flags, "--steps", 4)
    call(monkeypatch, baselines, *flags, "--steps", 4, "--alpha-steps", 2)


@pytest.mark.parametrize("objective", ["scm", "meanflow", "ayf", "imf"])
def test_the_loop_gives_the_method_what_the_flags_say(teacher, tmp_path, monkeypatch, objective):
    """The noise, times, labels, guidance and weights of two steps are compared, with a teacher and from scratch."""
    monkeypatch.setattr(flags, "check_effect", lambda *_: None)        # flags without effect are refused otherwise
    name = f"{objective}_loss"
    common = [*TINY, "--objective", objective, "--jvp", "fd", "--steps", 2, "--seed", 7, "--label-drop", 1,
              "--t-low", 0.25, "--c", 0.05, "--equal", 0.25, "--tangent-warmup", 0, "--P-mean", -1, "--P-std", 1.5]
    for w, source in ((3.0, teacher), (1.0, "none")):
        if (objective, source) in (("ayf", "none"), ("imf", teacher)):
            continue                       # refused
        calls = {}
        with monkeypatch.context() as patch:
            watch(patch, calls, baselines, name)
            call(patch, baselines, *common, "--teacher", source, "--w", w, "--out", tmp_path / str(w))
        for step in range(2):
            g = seeds.generator("cpu", 7, "step", step)
            x0, normal = torch.randn((8, 3, 12, 12), generator=g), torch.randn(8, generator=g)
            torch.rand((2, 8), generator=g)
            times = torch.stack([normal, torch.randn(8, generator=g)])
            args, options = calls[name][step], calls[f"{name} options"][step]
            y = args[-1]
            assert torch.equal(args[3], x0) and (y == 10).all() == (w == 1) and (y < 10).all() == (w != 1)
            assert options.items() >= dict(w=w, t_low=0.25, y_null=10).items()
            assert (options.get("teacher") is None) == (w == 1)
            if objective == "scm":
                assert torch.equal(args[4], facm.sample_t(normal, -1, 1.5))
                assert options["warm"] == 1 and len(options["phi"]) == 8
            else:
                expected = baselines.sample_t_r(times, torch.arange(8) < 2, -1, 1.5)
                assert all(torch.equal(a, b) for a, b in zip(args[4:6], expected))
                assert options.get("warm") == 0.99 if objective == "ayf" else options["c"] == 0.05
