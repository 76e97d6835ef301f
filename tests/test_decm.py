"""Tests decm.py against closed forms (the Gaussian oracle in any shape, the paper's misprints, mutants, samplers) and
as a program."""

import pathlib
import re

import numpy as np
import pytest
import torch
from oracle import SHAPES, Beside, Gaussian, fused, loss_and_gradient, mutant
from test_training import (
    SCRATCH,
    TINY,
    assert_same_run,
    call,
    first_gradient,
    kill_and_rerun,
    learning_rates,
    perturb,
    refused,
    rows,
    run_two,
    watch,
)

import data
import decm
import models
import sample
from common import checkpoints, flags, seeds
from common.ema import gamma_of
from jvp import JVP, exact, forward_mode

SOURCE = pathlib.Path(decm.__file__).read_text()
ORACLE = Gaussian()
ENDS = [(0.5, 0.5), (0.3, 0.9), (1.0, 0.0), (0.0, 1.0)]


class OracleNet:
    """The ideal network returns the average velocity from t to s, or the velocity where s = t. A teacher gets no s."""

    def __init__(self, teacher=False):
        self.teacher, self.passes = teacher, 0

    def __call__(self, x, t, s=None, y=None):
        self.passes += 1
        assert (s is None) == self.teacher
        if s is None:
            return ORACLE.velocity(x, t)
        fm = (s - t).abs() < 1e-12
        # Where the jump has length 0, its 0/0 must not leak into the velocity's derivative.
        jump = ORACLE.average_velocity(x, t, torch.where(fm, s + 0.1, s))
        return torch.where(ORACLE.expand(fm, x), ORACLE.velocity(x, t), jump)


def draw(batch=64, shape=(2, 3, 3)):
    """Returns x1, x0, r near 0 and t > r."""
    x1, x0, t = ORACLE.draw(batch, shape=shape)
    return x1, x0, 0.02 + 0.05 * t, 0.15 + 0.8 * t


LABELS = torch.ones(64, dtype=torch.int64)


def consistency(module, mode="exact"):
    """Returns L_FM and L_CM of the oracle network."""
    x1, x0, _, t = draw()
    return module.decm_loss(fused(OracleNet()), JVP[mode], x1, x0, t, LABELS, teacher=OracleNet(teacher=True))[:2]


def noise_to_noisy(module, lam=0.3, gam=0.9, vpsi="model", mode="exact"):
    """Returns L_FM and L_N2N of the oracle network."""
    x1, x0, r, t = draw()
    xt = module.interpolate(x1, x0, t)
    return module.n2n_loss(fused(OracleNet()), JVP[mode], x1, x0, xt, ORACLE.velocity(xt, t), r, t, LABELS,
                           teacher=OracleNet(teacher=True), lam=lam, gam=gam, vpsi=vpsi)


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_oracle_has_zero_residual(mode):
    assert max(consistency(decm, mode)) < 1e-14
    for lam, gam in ENDS:
        assert max(noise_to_noisy(decm, lam, gam, mode=mode)) < 1e-14


def test_oracle_has_zero_residual_with_the_finite_difference():
    assert 0 < consistency(decm, "fd")[1] < 1e-6
    assert 0 < noise_to_noisy(decm, mode="fd")[1] < 1e-6


def test_errata_of_the_noise_to_noisy_objective():
    """Eq. 15 and lines 22-23 of Algorithm 1, as printed, differ from the form that follows from Eq. 14."""
    x1, x0, r, t = draw()
    net, xr, xt = OracleNet(), decm.interpolate(x1, x0, r), decm.interpolate(x1, x0, t)
    v_r, v_t = ORACLE.velocity(xr, r), ORACLE.velocity(xt, t)
    F = net(xr, r, t)
    v_psi = ORACLE.velocity(xr + ORACLE.expand(t - r) * F, t)

    def derivative(dx, dt, ds):
        return forward_mode(net, at=(xr, r, t, None), along=(dx, dt, ds))

    def rms(g):
        return g.square().mean().sqrt().item()

    step = ORACLE.expand(t - r)
    for lam, gam in ENDS:
        ours = (lam + gam) * F - (gam * v_r + lam * v_psi) - step * derivative(gam * v_r, gam, -lam)
        eq_15 = (lam + gam) * F - (gam * v_r + lam * v_psi) - step * derivative(lam * v_r, lam, -gam)
        algorithm_1 = (lam + gam) * F - lam * (v_r + step * derivative(lam * v_r, lam, -gam)) - gam * v_t
        assert rms(ours) < 1e-13
        assert (rms(eq_15) < 1e-13) == (lam == gam)
        assert rms(algorithm_1) > 0.1 or (lam, gam) == (1.0, 0.0)      # (1, 0) moves the left end only, which is right
        target = decm.n2n_target(F, v_r, v_psi, derivative(gam * v_r, gam, -lam), r, t, lam=lam, gam=gam,
                                 w2=torch.ones_like(t))
        assert torch.allclose(target, F - ours)


CM_LINE = "at=(xt, t, one, y), along=(v, 1, 0)"
N2N_LINE = "at, along = (xr, r, t, y), (gam * v_r, gam, -lam)"
MUTANTS = [
    ("g = F_cm - v - (1 - t) * dF_dt", "g = F_cm - v + (1 - t) * dF_dt", "cm"),            # sign
    ("g = F_cm - v - (1 - t) * dF_dt", "g = F_cm - v - t * dF_dt", "cm"),                  # factor
    (CM_LINE, "at=(xt, t, one, y), along=(v, 1, 1)", "cm"),                                # s moves as well
    (CM_LINE, "at=(xt, t, one, y), along=(v, 0, 0)", "cm"),                                # t does not move
    (CM_LINE, "at=(xt, t, one, y), along=(-v, 1, 0)", "cm"),                               # direction of the flow
    # The conditions swapped
    ("one, s = torch.ones_like(t), t.clone()", "s, one = torch.ones_like(t), t.clone()", "both"),
    (N2N_LINE, "at, along = (xr, r, t, y), (lam * v_r, lam, -gam)", "n2n"),
    (N2N_LINE, "at, along = (xr, r, t, y), (gam * v_r, gam, lam)", "n2n"),
    (N2N_LINE, "at, along = (xr, r, t, y), (v_r, gam, -lam)", "n2n"),
    ("(gam * v_r + lam * v_psi)", "(lam * v_r + gam * v_psi)", "n2n"),                     # lambda != gamma
    ("g = (lam + gam) * F_n2n", "g = F_n2n", "n2n"),
    ("v_psi) - (t - r) * dF", "v_psi) + (t - r) * dF", "n2n"),
    ("teacher, xr, F_n2n.detach(), r, t", "teacher, xt, F_n2n.detach(), r, t", "n2n"),     # v_psi at the wrong point
    ("guided_velocity(teacher, f, t, y", "guided_velocity(teacher, f, r, y", "n2n"),       # ... or time
    # v at z_t for v_r
    ("flow_velocity(teacher, x1, x0, xr, r, y", "flow_velocity(teacher, x1, x0, xt, t, y", "n2n"),
    ("also=(xt, t, t.clone(), y))                      # line 26", "also=(xr, r, r, y))", "n2n's fm"),
    ("return (1 - t) * x0 + t * x1", "return t * x0 + (1 - t) * x1", "none"),              # another point, still exact
]


@pytest.mark.parametrize("old, new, hurt", MUTANTS)
def test_mutants_are_caught(old, new, hurt):
    module = mutant(SOURCE, old, new)
    for mode in ("exact", "fused"):
        (fm, cm), (fm_too, n2n) = consistency(module, mode), noise_to_noisy(module, mode=mode)
        assert (cm > 1e-2) == (hurt in ("cm", "both"))
        assert (fm > 1e-2) == (hurt == "both")
        assert (n2n > 1e-2) == (hurt == "n2n")
        assert (fm_too > 1e-2) == (hurt == "n2n's fm")


def test_v_psi_has_two_names_and_that_of_the_data_path_needs_a_velocity():
    for vpsi in ("Data", "data"):
        with pytest.raises(ValueError, match="vpsi="):
            decm.n2n_loss(OracleNet(), JVP["exact"], *[None] * 7, teacher=OracleNet(teacher=True), vpsi=vpsi)


def test_v_psi_on_the_data_path_is_another_velocity():
    """Algorithm 1 takes the velocity at z_t, which is not the point where the model's jump ends."""
    assert noise_to_noisy(decm, vpsi="data")[1] > 1e-2
    assert noise_to_noisy(decm, 0.0, 1.0, vpsi="data")[1] < 1e-14      # without the right end it is not used


def test_from_scratch_v_is_the_difference_and_v_psi_the_networks_own():
    x1, x0, r, t = draw()
    net, seen = OracleNet(), []

    def watched(net, at, along, also):
        seen.append(along)
        return exact(net, at, along, also)
    _, _, (xt, v) = decm.decm_loss(net, watched, x1, x0, t, None)
    assert torch.equal(v, x1 - x0) and torch.equal(xt, decm.interpolate(x1, x0, t))
    # On the straight line through x_r along v_r, the difference is v_r, so that the residual is 0 there.
    xr = decm.interpolate(x1, x0, r)
    v_r = ORACLE.velocity(xr, r)
    on_the_flow = xr + ORACLE.expand(1 - r) * v_r, xr - ORACLE.expand(r) * v_r
    _, L_n2n = decm.n2n_loss(net, watched, *on_the_flow, decm.interpolate(*on_the_flow, t), v_r, r, t, None,
                             lam=0.3, gam=0.9)
    assert torch.equal(seen[0][0], x1 - x0) and seen[0][1:] == (1, 0)
    assert torch.allclose(seen[1][0], 0.9 * v_r) and seen[1][1:] == (0.9, -0.3)
    assert L_n2n < 1e-14


def test_guidance_and_velocity_normalisation():
    """Guidance is Eq. 18. In line 6 of Algorithm 1, the difference of velocities gets the length eta over C, H, W."""
    def teacher(x, t, s, y):
        return torch.ones_like(x) * ORACLE.expand(y.double())          # velocity = label; null label 0
    x, t, y = torch.zeros(3, 2, 3, 3, dtype=torch.float64), torch.full((3,), 0.5).double(), torch.tensor([3, 1, 0])
    plain = decm.guided_velocity(teacher, x, t, y, w=1.75, eta=None, y_null=0)
    assert torch.allclose(plain[:, 0, 0, 0], torch.tensor([5.25, 1.75, 0]).double())
    unguided = decm.guided_velocity(teacher, x, t, y, w=1.0, eta=2.0, y_null=0)
    assert torch.equal(unguided[:, 0, 0, 0].double(), y.double())
    even = decm.guided_velocity(teacher, x, t, y, w=1.75, eta=2.0, y_null=0)
    D = (even - ORACLE.expand(y.double())) / 0.75
    assert torch.allclose(D.square().sum((1, 2, 3)).sqrt(), torch.tensor([2.0, 2.0, 0.0]).double())
    # The lengths of D are 3 sqrt(18), sqrt(18) and 0. A clip at 8 shortens the first and leaves the others as they are
    clipped = decm.guided_velocity(teacher, x, t, y, w=1.75, eta=8.0, vel_clip=True, y_null=0)
    D = (clipped - ORACLE.expand(y.double())) / 0.75
    assert torch.allclose(D.square().sum((1, 2, 3)).sqrt(), torch.tensor([8.0, 18 ** 0.5, 0.0]).double())
    assert torch.equal(clipped[1:], plain[1:])


def test_left_ends_of_the_jumps_from_the_noise():
    """r is drawn below r_max, or falls linearly from r_max to 0, and never lies beyond t."""
    uniform, t = torch.tensor([0.0, 0.5, 0.9]), torch.tensor([1.0, 1.0, 0.01])
    assert torch.allclose(decm.sample_r(uniform, t, 7, 0.1, None), torch.tensor([0.0, 0.05, 0.01]))
    for step, r in ((0, 0.1), (50, 0.05), (100, 0.0), (500, 0.0)):
        expected = torch.tensor([r, r, min(r, 0.01)])
        assert torch.allclose(decm.sample_r(uniform, t, step, 0.1, 100), expected)


@pytest.mark.parametrize("teacher, labels, y_null", [
    (lambda x, t, s, y: x, False, 5), (lambda x, t, s, y: x, True, None), (None, True, 5)],
    ids=["no labels", "no null label", "no teacher"])
def test_guidance_needs_a_teacher_labels_and_the_null_label(teacher, labels, y_null):
    x1, x0, r, t = draw()
    y = LABELS if labels else None
    options = dict(teacher=teacher, w=1.75, y_null=y_null)
    with pytest.raises(ValueError, match="guidance"):
        decm.decm_loss(OracleNet(), JVP["fd"], x1, x0, t, y, **options)
    with pytest.raises(ValueError, match="guidance"):
        decm.n2n_loss(OracleNet(), JVP["fd"], x1, x0, x1, x1, r, t, y, **options)


def test_the_losses_take_any_callable_without_labels():
    """The losses accept y = None, and a network and a teacher without attributes."""
    x1, x0, r, t = draw()

    def net(x, t, s, y):
        assert s is not None and y is None
        return x * ORACLE.expand(t - s)
    for teacher in (None, lambda x, t, s, y: x):
        L_fm, L_cm, (xt, v) = decm.decm_loss(net, JVP["fd"], x1, x0, t, None, teacher=teacher)
        assert min(L_fm, L_cm, *decm.n2n_loss(net, JVP["fd"], x1, x0, xt, v, r, t, None, teacher=teacher)) > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_in_any_shape_the_exact_jump_is_the_minimum(shape, mode):
    """This is tested for all four losses. Guidance changes nothing, because the teacher ignores the labels."""
    x1, x0, r, t = draw(shape[0], shape[1:])
    y = torch.ones(shape[0], dtype=torch.int64)
    xt = decm.interpolate(x1, x0, t)
    options = dict(teacher=OracleNet(teacher=True), w=2.0, eta=0.5, y_null=0)

    def consistency(net):
        return decm.decm_loss(net, JVP[mode], x1, x0, t, y, **options)[:2]

    def noise_to_noisy(net):
        return decm.n2n_loss(net, JVP[mode], x1, x0, xt, ORACLE.velocity(xt, t), r, t, y, lam=0.3, gam=0.9, **options)
    for losses in (consistency, noise_to_noisy):
        for term in (0, 1):
            value, gradient = loss_and_gradient(lambda net: losses(net)[term], OracleNet())
            assert abs(value) < 1e-13 and abs(gradient) < 1e-12
            for theta in (-0.1, 0.1):
                value, gradient = loss_and_gradient(lambda net: losses(net)[term], OracleNet(), theta)
                assert value > 1e-3 and gradient * theta > 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samplers_in_any_shape(shape):
    noise = torch.randn(4, *shape, dtype=torch.float64)
    exact = ORACLE.mu + ORACLE.sd * noise[0]
    for name, sampler in decm.SAMPLERS.items():
        flat = sampler(OracleNet(), noise.flatten(2), None, nfe=4).reshape(shape)
        assert torch.equal(sampler(OracleNet(), noise, None, nfe=4), flat), name
    assert torch.allclose(decm.sample(OracleNet(), noise, None, nfe=1), exact)
    assert (decm.sample_euler(OracleNet(), noise, None, nfe=100) - exact).abs().mean() < 0.01


def test_sampled_times():
    """Table 3 (j) to (l) has equally likely ends of N segments, FACM's Eq. 20, and log-normal noise-to-data ratios."""
    u = (torch.arange(1000).double() + 0.5) / 1000
    ends, counts = decm.sample_t("nseg", None, u, 0, 0, 4).unique(return_counts=True)
    assert ends.tolist() == [0, 0.25, 0.5, 0.75, 1] and counts.tolist() == [200] * 5
    n = torch.linspace(-3, 3, 7, dtype=torch.float64)
    t = decm.sample_t("arctan", n, None, -0.8, 1.6, 0)
    assert torch.allclose(torch.log(torch.tan((1 - t) * torch.pi / 2)), -0.8 + 1.6 * n)
    t = decm.sample_t("lognorm", n, None, -0.4, 1.0, 0)
    assert torch.allclose(torch.log((1 - t) / t), -0.4 + n)


def test_fm_loss_value():
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).reshape(2, 1, 2, 1, 1).unbind()
    assert torch.isclose(decm.fm_loss(a, b, 0.0, 1e-3), torch.tensor(0.5 + 1 - 0.5 ** 0.5))
    assert torch.isclose(decm.fm_loss(a, b, 0.5, 1e-3), torch.tensor(0.5 / 0.501 ** 0.5 + 1 - 0.5 ** 0.5))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_adaptive_weight_has_no_gradient(p):
    F = torch.tensor([0.3, -0.2], dtype=torch.float64).reshape(1, 1, 1, 2).requires_grad_()
    loss = decm.adaptive(F, torch.zeros_like(F), p, 1e-3)
    e = (0.09 + 0.04) / 2
    assert torch.allclose(loss.detach(), torch.tensor(e / (e + 1e-3) ** p).double())
    loss.sum().backward()
    assert torch.allclose(F.grad, F.detach() / (e + 1e-3) ** p)


@pytest.mark.parametrize("name", list(decm.WEIGHTS))
def test_w1_and_w2_weigh_the_residuals(name):
    """As v_tar = F - w g, the loss with p = 0 is w^2 times the mean of g^2. w_2(r, t) is the weight at 1 - (t-r)."""
    def weight(t):
        return {"1": 1 + 0 * t, "1-t": 1 - t, "1-sqrt": 1 - t ** 0.5}[name]

    def net(x, t, s, y):
        return OracleNet()(x, t, s) + 0.1
    x1, x0, r, t = draw()
    options = dict(teacher=OracleNet(teacher=True), p=0.0)
    for i in range(3):                                                 # one sample at a time, as losses are means
        a, b, r_i, t_i, y = x1[i:i + 1], x0[i:i + 1], r[i:i + 1], t[i:i + 1], LABELS[i:i + 1]
        _, L_cm, (xt, v) = decm.decm_loss(net, exact, a, b, t_i, y, w1="1", **options)
        _, weighed, _ = decm.decm_loss(net, exact, a, b, t_i, y, w1=name, **options)
        assert torch.isclose(weighed, L_cm * weight(t_i).item() ** 2) and L_cm > 1e-3
        _, L_n2n = decm.n2n_loss(net, exact, a, b, xt, v, r_i, t_i, y, w2="1", **options)
        _, weighed = decm.n2n_loss(net, exact, a, b, xt, v, r_i, t_i, y, w2=name, **options)
        assert torch.isclose(weighed, L_n2n * weight(1 - (t_i - r_i)).item() ** 2) and L_n2n > 1e-3


def error_of(sampler, nfe, **options):
    """Returns the mean distance of the exact network's samples from the flow map of the first noise."""
    noise = torch.randn(nfe, 64, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = OracleNet()
    result = decm.SAMPLERS[sampler](net, noise, None, nfe=nfe, **options)
    assert net.passes == nfe
    return (result - ORACLE.mu - ORACLE.sd * noise[0]).abs().mean().item()


@pytest.mark.parametrize("objectives, expected", [
    (["fm", "cd", "n2n"], ["cm", "cm", "mix", "mix", "euler"]), (["fm"], ["euler"] * 5), (["cd"], ["cm"] * 5),
    (["fm", "cd"], ["cm", "cm", "cm", "cm", "euler"]), (["fm", "n2n"], ["cm", "cm", "mix", "mix", "euler"])], ids=str)
def test_the_default_sampler_suits_the_nfe_and_the_jumps_that_were_trained(objectives, expected):
    assert [decm.default_sampler(nfe, dict(objectives=objectives)) for nfe in (1, 3, 4, 16, 50)] == expected


def test_samplers_against_the_flow_map():
    """One jump is exact. Euler converges to the flow map at first order. Without fresh noise, mix does so as well,
    and its error is smaller."""
    assert max(error_of(*case) for case in (("cm", 1), ("mix", 1), ("mix", 2))) < 1e-14
    errors = {nfe: (error_of("euler", nfe), error_of("mix", nfe, n_ode=nfe - 1)) for nfe in (4, 8, 16, 40, 80)}
    assert all(1.8 < a / b < 2.2 for a, b in zip(errors[40], errors[80]))
    assert all(mix < euler for euler, mix in errors.values())


@pytest.mark.parametrize("n_ode", [0, 1, 3])
def test_mix_jumps_from_the_noise_then_goes_on_as_cm(n_ode):
    """As in Figure 5, n_ode steps of the ODE are followed by jumps to the data, with fresh noise in between."""
    nfe = 4
    noise = torch.randn(nfe - n_ode, 16, 2, 3, 3, dtype=torch.float64)
    x, fresh = noise[0], list(noise[1:])
    for i in range(nfe):
        t, t_next = i / nfe, (i + 1) / nfe
        if i < n_ode:
            x = ORACLE.flow_map(x, t, t_next) if i == 0 else x + ORACLE.velocity(x, torch.full((16,), t).double()) / nfe
        else:
            x1 = ORACLE.flow_map(x, t, 1.0)
            x = t_next * x1 + (1 - t_next) * fresh.pop(0) if fresh else x1
    assert torch.allclose(decm.sample_mix(OracleNet(), noise, None, nfe=nfe, n_ode=n_ode), x)
    if n_ode == 0:
        assert torch.equal(decm.sample(OracleNet(), noise, None, nfe=nfe),
                           decm.sample_mix(OracleNet(), noise, None, nfe=nfe, n_ode=0))


# ----------------------------------------------------------------------------------------------------------------------
# As a program.

RUN = [*TINY, "--steps", 5, "--freq", 2, "--save-every", 3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher):
    out = tmp_path_factory.mktemp("decm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, decm, *RUN, "--teacher", teacher, "--out", out)
    return out


def test_every_freq_steps_an_update_of_its_own(finished):
    """With --freq 2, steps 0, 2 and 4 of 5 have an N2N update, so that the optimiser is called 8 times."""
    assert [row["step"] for row in rows(finished)] == [1, 2, 3, 4, 5]
    assert ["L_n2n" in row for row in rows(finished)] == [True, False, True, False, True]
    optimizer = checkpoints.read(finished / "ckpt.pt")["optimizer"]
    assert {float(entry["step"]) for entry in optimizer["state"].values()} == {8.0}


def test_kill_9_and_rerun_is_the_uninterrupted_run(finished, teacher, tmp_path):
    command = [*RUN, "--teacher", teacher, "--out", tmp_path / "run"]
    kill_and_rerun(*command, step=3, out=tmp_path / "run", script="decm.py")
    assert_same_run(finished, tmp_path / "run")


def test_resume_is_exact_from_every_step(finished, teacher, tmp_path, monkeypatch):
    for steps in range(1, 6):
        call(monkeypatch, decm, *RUN, "--teacher", teacher, "--steps", steps, "--out", tmp_path / "run")
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.parametrize("objectives", [["fm", "cd"], ["fm", "n2n"]])
def test_processes_and_micro_batches_give_the_gradient_of_one_process(tmp_path, monkeypatch, objectives):
    """The gradients are read from AdamW's first moment after one step, which has two updates with N2N."""
    common = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in TINY]
    common += [*SCRATCH, "--steps", 1, "--lr", "1e-12", "--objectives", *objectives]
    call(monkeypatch, decm, *common, "--out", tmp_path / "one")
    call(monkeypatch, decm, *common, "--out", tmp_path / "pieces", "--micro-batch", 3)
    how = ["--fsdp"] if "n2n" in objectives else ["--micro-batch", 2]
    run_two(*common, "--jvp", "fused", *how, "--out", tmp_path / "two", script="decm.py")
    call(monkeypatch, decm, *common, "--jvp", "fused", "--out", tmp_path / "fused")
    one = first_gradient(tmp_path / "one")
    for other in ("pieces", "fused", "two"):
        assert (first_gradient(tmp_path / other) - one).abs().max() < 1e-5 * one.abs().max(), other
    assert one.abs().max() > 0


def test_the_student_starts_as_its_teacher(teacher, tmp_path, monkeypatch):
    """The second time of the student is new and changes nothing at first. If the teacher has one, it is kept."""
    command = [*TINY, "--steps", 1, "--lr", "1e-12"]
    call(monkeypatch, decm, *command, "--teacher", teacher, "--out", tmp_path / "run")
    student, weights = checkpoints.read(tmp_path / "run/ckpt.pt")["model"], checkpoints.read(teacher)["ema"]
    assert not any(k.startswith("map_second") for k in weights) and any(k.startswith("map_second") for k in student)
    assert all(torch.allclose(student[k], v, atol=1e-6) for k, v in weights.items())

    net = models.create("DDPM++", input_size=12, num_classes=10, width=8, mult=(1, 1), blocks=1, attention=(),
                        sigma_data=0.6, adaptive_scale=True, time_scale=8.0, second_time=True)
    torch.nn.init.normal_(net.map_second[2].weight)
    torch.save(dict(model=net.state_dict()), tmp_path / "two_times.pt")
    call(monkeypatch, decm, *command, "--teacher", tmp_path / "two_times.pt", "--out", tmp_path / "two")
    student = checkpoints.read(tmp_path / "two/ckpt.pt")["model"]
    assert all(torch.allclose(student[k], v, atol=1e-6) for k, v in net.state_dict().items())


@pytest.mark.parametrize("flags", [
    ["--objectives", "fm"], ["--objectives", "cd"], ["--objectives", "fm", "n2n"], ["--vel-norm", "5"],
    ["--times", "arctan"], ["--times", "lognorm"], ["--vpsi", "data", "--lam", "0.2"], ["--jvp", "fd"],
    ["--vel-norm", "5", "--vel-clip", "--gam", "1", "--r-max", "0.1", "--r-fall", "2"],
    ["--precision", "bf16", "--batch", "2"], ["--w1", "1-t", "--w2", "1-sqrt", "--power", "1"], SCRATCH],
    ids=str)
def test_every_option_trains(teacher, tmp_path, monkeypatch, flags):
    call(monkeypatch, decm, *TINY, "--teacher", teacher, "--steps", 2, *flags, "--out", tmp_path / "run")
    assert all(np.isfinite(row["grad_norm"]) for row in rows(tmp_path / "run"))


def test_samples_by_the_sampler_that_suits_the_nfe(finished, teacher, tmp_path, monkeypatch, capsys):
    """By Section 4.5 the default is cm at NFE 1 and 2, mix from 4 to 16, and euler above. --n-ode needs mix and must
    be less than the NFE."""
    command = ["--ckpt", finished / "ckpt.pt", "--n", 2, "--device", "cpu", "--out", tmp_path / "x.png"]
    call(monkeypatch, sample, *command, "--grid", 1, 2, 4, 16, 17)
    assert capsys.readouterr().out.split("by ")[-1].strip() == (
        "cm at NFE 1, cm at NFE 2, mix at NFE 4, mix at NFE 16, euler at NFE 17")
    call(monkeypatch, sample, *command, "--nfe", 4, "--n-ode", 3)
    capsys.readouterr()
    assert "--n-ode 4" in refused(monkeypatch, capsys, sample, *command, "--nfe", 4, "--n-ode", 4)
    assert "--n-ode" in refused(monkeypatch, capsys, sample, *command, "--nfe", 2, "--n-ode", 1)
    call(monkeypatch, sample, *command, "--ckpt", teacher, "--nfe", 3, "--cfg", 1.75)


@pytest.mark.parametrize("name", ["cm_target", "n2n_target"])
def test_an_update_that_is_not_finite_is_skipped(teacher, tmp_path, monkeypatch, capsys, name):
    """Steps 0 and 2 of 3 have both updates, and step 1 has only the first. The terms of a skipped step are printed."""
    honest = getattr(decm, name)
    monkeypatch.setattr(decm, name, lambda F, *rest, **weights: honest(F, *rest, **weights) * float("nan"))
    call(monkeypatch, decm, *RUN, "--teacher", teacher, "--steps", 3, "--out", tmp_path / "run")
    said = capsys.readouterr().err
    number = r"\d[\d.e+-]*"
    terms = dict(cm_target=f"L_fm {number}, L_cm nan, grad_norm nan, L_n2n {number}, grad_norm_n2n {number}",
                 n2n_target=f"L_fm {number}, L_cm {number}, grad_norm {number}, L_n2n nan, grad_norm_n2n nan")
    assert re.search("step 0 is skipped, it is not finite: " + terms[name] + "\n", said), said
    assert [row.get("skipped", 0) for row in rows(tmp_path / "run")] == [1, int(name == "cm_target"), 1]
    held = checkpoints.read(tmp_path / "run/ckpt.pt")
    assert all(v.isfinite().all() for part in ("model", "ema") for v in held[part].values())
    updates = 2.0 if name == "cm_target" else 3.0
    assert {float(entry["step"]) for entry in held["optimizer"]["state"].values()} == {updates}


def test_updates_that_are_never_finite_end_the_run_with_their_terms(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decm, "n2n_target", lambda F_n2n, *rest, **weights: F_n2n * float("nan"))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, decm, *TINY, "--jvp", "fd", "--teacher", teacher, "--freq", 1, "--steps", 30,
             "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert re.search(r"^error: 20 steps in a row were not finite, the last is step 19: L_fm 0\.\d+, L_cm 0\.\d+, "
                     r"grad_norm [\d.]+, L_n2n nan, grad_norm_n2n nan;", said, re.MULTILINE), said


@pytest.mark.parametrize("flags, words", [
    (["--w", "2", "--teacher", "none"], "--w 1"), (["--freq", "0"], "--freq"), (["--segments", "0"], "--segments"),
    (["--lam", "0", "--gam", "0"], "--lam"), (["--r-max", "1"], "--r-max"), (["--objectives", "cm"], "cm"),
    (["--objectives", "n2n"], "--freq 1"), (["--objectives", "n2n", "--freq", 1, "--vpsi", "data"], "--vpsi model"),
    (["--times", "uniform"], "uniform"), (["--objectives"], "--objectives"), (["--vel-norm", "0"], "--vel-norm"),
    (["--teacher", "nowhere.pt"], "nowhere.pt")])
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, decm, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run/ckpt.pt").exists() and not pathlib.Path("runs").exists()


def test_freeflows_predictor_is_n2n_alone():
    """FreeFlow's predictor is F(z, t) + t dF/dt = v(z + t F, t) for noise z, where v is the teacher's velocity. Its
    gradient is that of n2n_loss at r = 0, lambda = 1 and gamma = 0, and does not depend on the data."""
    _, z, _, t = draw()
    teacher = OracleNet(teacher=True)

    def freeflow(net):
        F = net(z, torch.zeros_like(t), t, None)
        with torch.no_grad():
            ahead = forward_mode(net, at=(z, torch.zeros_like(t), t, None), along=(torch.zeros_like(z), 0.0, 1.0))
            v = teacher(z + ORACLE.expand(t) * F, t, None, None)
            target = v - ORACLE.expand(t) * ahead
        e = decm.mean((F - target).square())
        return (e / (e + 1e-3).sqrt().detach()).mean()

    def n2n(net, x1):
        L_fm, L_n2n = decm.n2n_loss(net, JVP["exact"], x1, z, None, None, torch.zeros_like(t), t, None, teacher=teacher,
                                    lam=1.0, gam=0.0)
        assert L_fm == 0
        return L_n2n
    for theta in (0.0, 0.1):
        gradients = []
        for loss_of in (freeflow, lambda net: n2n(net, torch.zeros_like(z)), lambda net: n2n(net, torch.ones_like(z))):
            net = Beside(OracleNet(), theta)
            loss = loss_of(net)
            gradients.append((loss.item(), torch.autograd.grad(loss, net.theta)[0].item()))
        assert gradients[1] == gradients[2] and gradients[0] == pytest.approx(gradients[1], rel=1e-9, abs=1e-12)
        assert (gradients[0][0] < 1e-12) == (theta == 0)


def test_n2n_alone_trains_without_a_first_update(teacher, tmp_path, monkeypatch):
    """With FreeFlow's flags, each step has only the N2N update, and decm_loss is not called."""
    tiny = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in TINY]         # each micro-batch has a mask of its own
    flags = [*tiny, "--teacher", teacher, "--objectives", "n2n", "--freq", 1, "--lam", 1, "--gam", 0, "--r-max", 0]
    call(monkeypatch, decm, *flags, "--steps", 2, "--out", tmp_path / "run")
    call(monkeypatch, decm, *flags, "--steps", 2, "--micro-batch", 3, "--out", tmp_path / "micro")
    assert all({"L_n2n", "grad_norm_n2n"} <= set(row) and "L_cm" not in row for row in rows(tmp_path / "run"))
    whole, parts = (rows(tmp_path / name)[0] for name in ("run", "micro"))
    assert (parts["L_n2n"], parts["grad_norm_n2n"]) == pytest.approx((whole["L_n2n"], whole["grad_norm_n2n"]), rel=1e-4)
    optimizer = checkpoints.read(tmp_path / "run/ckpt.pt")["optimizer"]
    assert {float(entry["step"]) for entry in optimizer["state"].values()} == {2.0}
    with monkeypatch.context() as patch:
        patch.setattr(decm, "decm_loss", None)         # it would fail if it were called
        call(patch, decm, *flags, "--steps", 2, "--out", tmp_path / "again")
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_a_run_of_facm_is_refused(finished, teacher, tmp_path, monkeypatch, capsys):
    checkpoint = checkpoints.read(finished / "ckpt.pt")
    (tmp_path / "run").mkdir()
    torch.save(checkpoint | dict(method="facm"), tmp_path / "run/ckpt.pt")
    assert "facm" in refused(monkeypatch, capsys, decm, *RUN, "--teacher", teacher, "--out", tmp_path / "run")


@pytest.mark.cuda
@pytest.mark.parametrize("flags", [
    [], ["--precision", "bf16"], ["--precision", "bf16", "--compile"],
    ["--jvp", "fused", "--precision", "bf16", "--compile"]], ids=str)
def test_trains_on_cuda(teacher, tmp_path, monkeypatch, flags):
    on_gpu = ["cuda" if flag == "cpu" else flag for flag in RUN]
    call(monkeypatch, decm, *on_gpu, "--teacher", teacher, *flags, "--out", tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 5


def test_decms_loop_gives_the_method_what_the_flags_say(teacher, tmp_path, monkeypatch):
    calls = {}
    monkeypatch.setattr(flags, "check_effect", lambda *_: None)        # flags without effect are refused otherwise
    watch(monkeypatch, calls, decm, "sample_t", "guided_velocity", "decm_loss", "n2n_loss")
    watch(monkeypatch, calls, torch, "_foreach_lerp_")
    watch(monkeypatch, calls, data.Dataset, "batch")
    call(monkeypatch, decm, *TINY, "--jvp", "fd", "--teacher", teacher, "--steps", 2, "--seed", 7, "--label-drop", 1,
         "--w", 3, "--vel-norm", 5, "--vel-clip", "--times", "nseg", "--segments", 3, "--w1", "1-t", "--w2", "1-sqrt", "--lam", 0.2,
         "--gam", 0.7, "--vpsi", "data", "--r-max", 0.1, "--freq", 2, "--P-mean", -1, "--P-std", 1.5, "--power", 0.7,
         "--c", 0.05, "--ema-sigma", 0.2, "--out", tmp_path / "run")
    assert [a[1:4] for a in calls["batch"]] == [(7, 0, 8), (7, 8, 8)]
    gamma = gamma_of(0.2)
    assert [a[2] for a in calls["_foreach_lerp_"]] == [1 - (1 - 1 / k) ** (gamma + 1) for k in (1, 2)]
    assert [(a[0], *a[3:]) for a in calls["sample_t"]] == [("nseg", -1, 1.5, 3)] * 2
    guidance = dict(y_null=10, w=3.0, eta=5.0, vel_clip=True)
    assert all(options == guidance and (a[3] < 10).all() for a, options in
               zip(calls["guided_velocity"], calls["guided_velocity options"]))
    for step in range(2):
        g = seeds.generator("cpu", 7, "step", step)
        x0, normal = torch.randn((8, 3, 12, 12), generator=g), torch.randn(8, generator=g)
        drawn = torch.rand((4, 8), generator=g)
        *_, noise, t, y = calls["decm_loss"][step]
        assert torch.equal(noise, x0) and (y < 10).all()               # with a teacher no label is dropped
        assert torch.equal(t, decm.sample_t("nseg", normal, drawn[2], -1, 1.5, 3))
        options = calls["decm_loss options"][step]
        assert options.items() >= (guidance | dict(w1="1-t", p=0.7, c=0.05)).items() and options["teacher"] is not None
    (_, _, _, _, xt, v, r, t, y), = calls["n2n_loss"]
    options, = calls["n2n_loss options"]
    g = seeds.generator("cpu", 7, "step", 0)
    torch.randn((8, 3, 12, 12), generator=g), torch.randn(8, generator=g)
    assert torch.equal(r, torch.minimum(0.1 * torch.rand((4, 8), generator=g)[3], t))
    assert options.items() >= (guidance | dict(lam=0.2, gam=0.7, vpsi="data", w2="1-sqrt", p=0.7, c=0.05)).items()
    assert options["teacher"] is not None
    x1, x0, t_cm = calls["decm_loss"][0][2:5]
    assert torch.equal(t, t_cm) and torch.equal(xt, decm.interpolate(x1, x0, t))       # the x_t of the first update


def test_from_scratch_labels_are_dropped(tmp_path, monkeypatch):
    calls = {}
    watch(monkeypatch, calls, decm, "decm_loss", "n2n_loss")
    call(monkeypatch, decm, *TINY, "--jvp", "fd", *SCRATCH, "--steps", 1, "--label-drop", 1, "--out", tmp_path / "run")
    for name in ("decm_loss", "n2n_loss"):
        (args,), (options,) = calls[name], calls[f"{name} options"]
        assert (args[-1] == 10).all() and options["teacher"] is None


def test_objectives_add_up(tmp_path, monkeypatch):
    """The gradient of fm and cd together is the sum of their gradients."""
    perturb(monkeypatch)
    g = []
    for names in (["fm"], ["cd"], ["fm", "cd"]):
        out = tmp_path / "-".join(names)
        call(monkeypatch, decm, *TINY, "--jvp", "fd", *SCRATCH, "--steps", 1, "--clip", 1e9, "--objectives", *names,
             "--out", out)
        g.append(first_gradient(out))
    assert torch.allclose(g[0] + g[1], g[2], atol=1e-4 * g[2].abs().max()) and min(a.norm() for a in g) > 0


def test_both_updates_of_a_step_have_its_learning_rate(tmp_path, monkeypatch):
    rates = learning_rates(monkeypatch, torch.optim.AdamW)
    call(monkeypatch, decm, *TINY, "--jvp", "fd", *SCRATCH, "--warmup", 2, "--lr", 1, "--lr-final", 0.5, "--steps", 2,
         "--freq", 2, "--clip", 1e-9, "--out", tmp_path / "run")
    assert rates == [0.5, 0.5, 0.75]
