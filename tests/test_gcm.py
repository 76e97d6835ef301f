"""Tests gcm.py against closed forms (the Gaussian oracle in any shape, mutants of the source, densities, steps, MMD,
samplers) and as a program."""

import math
import pathlib
import re

import pytest
import torch
from oracle import SHAPES, Gaussian, fused, loss_and_gradient, mutant
from test_data import NAMES, write_images, write_shards
from test_training import (
    assert_same_run,
    call,
    first_gradient,
    kill_and_rerun,
    learning_rates,
    perturb,
    refused,
    rows,
    run_two,
    same,
    watch,
)

import data
import gcm
import models
from common import checkpoints, seeds, weights
from common.ema import gamma_of
from jvp import JVP, forward_mode

SOURCE = pathlib.Path(gcm.__file__).read_text()
SIGMA_D = 0.5
ORACLE = Gaussian()
wide = Gaussian.expand


class Reversed:
    """The oracle in GCM's time (t=0 data, t=1 noise) with noise of standard deviation SIGMA_D. The point y = k x lies
    on the path of the oracle, where the ratio of noise to data is the same."""

    def to_oracle(self, t):
        k = 1 / (1 - t + SIGMA_D * t)
        return k, (1 - t) * k

    def flow_map(self, x, t, s):
        (k, tau), (k_s, tau_s) = self.to_oracle(t), self.to_oracle(s)
        return ORACLE.flow_map(wide(k, x) * x, tau, tau_s) / wide(k_s, x)

    def velocity(self, x, t):
        """Returns E[z - x | x_t] = (x_t - E[x | x_t]) / t."""
        k, tau = self.to_oracle(t)
        return (x - ORACLE.posterior_mean(wide(k, x) * x, tau)) / wide(t, x)

    def draw(self, batch, seed=0, shape=(2, 3, 3)):
        x, x0, _ = ORACLE.draw(batch, seed, shape)
        return x, SIGMA_D * x0


FLOW = Reversed()


def f_ideal(xt, t, s, y=None):
    """Returns the average velocity from t to s, or the velocity where s = t."""
    same = s == t
    safe = torch.where(same, t + 1e-3, s)              # the other branch's singularity must not leak into a derivative
    average = (FLOW.flow_map(xt, t, safe) - xt) / wide(safe - t, xt)
    return torch.where(wide(same, xt), FLOW.velocity(xt, t), average)


def times(variant, batch=64, seed=1):
    u = torch.rand(4, batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gcm.sample_times(u, variant=variant)


def loss(module, variant="VU", h=1e-3, mode="difference", M=1, sigma=0.1, seed=0, t=None, s=None, f=None,
         shape=(64, 2, 3, 3)):
    """Returns the loss of the ideal network, or of f, whose velocity is u. It is 0 up to the error of the difference.
    With kappa = 1 and w = 2, guidance gives f(x_t, t, t), so that the guided velocity is exact as well."""
    x, z = FLOW.draw(shape[0], seed, shape[1:])
    if t is None:
        t, s, _ = times(variant, shape[0])
    y = torch.ones(shape[0], dtype=torch.int64)
    return module.gcm_loss(f or fused(f_ideal), JVP.get(mode), x, z, t, s, torch.ones_like(t), y,
                           difference=mode == "difference", ht="const", k=h, scheme="meanflow", M=M, sigma=sigma,
                           w=2.0, kappa=1.0, y_null=0)


@pytest.mark.parametrize("variant", ["CU", "VU"])
def test_oracle_has_zero_residual_with_the_exact_derivative(variant):
    assert max(loss(gcm, variant, mode=mode) for mode in ("exact", "fused")) < 1e-12
    assert loss(gcm, variant, mode="fd") < 1e-4
    t, _, _ = times(variant)
    assert loss(gcm, t=t, s=t.clone()) < 1e-12                         # s = t: the plain velocity


@pytest.mark.parametrize("variant", ["CU", "VU"])
@pytest.mark.parametrize("autocast", [False, True])
def test_residual_of_the_difference_falls_linearly_in_h(variant, autocast):
    """This also holds under autocast, where both points of the difference are computed again in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        residual = [loss(gcm, variant, h=h) for h in (4e-3, 1e-3, 2.5e-4)]
    assert residual[0] < 0.05
    for coarse, fine in zip(residual, residual[1:]):
        assert 3.6 < coarse / fine < 4.4


PAIR = "target = u + wide(ratio, x) * change"
DERIVATIVE = "target = u + wide(s - t, x) * df_dt"
LINE = "at=(xt, t, s, y), along=(u, 1, 0)"
MUTANTS = [
    (PAIR, "target = u - wide(ratio, x) * change", False),                       # sign
    (PAIR, "target = u + 2 * wide(ratio, x) * change", False),                   # factor
    ("r > s, (s - r) / (t - r), 0", "r > s, (s - r) / (t - s), 0", False),         # wrong denominator
    ("r > s, (s - r) / (t - r), 0", "r > s, (r - t) / (t - r), 0", False),
    ("xr = xt + wide(r - t, xt) * u", "xr = xt - wide(r - t, xt) * u", False),     # step in the wrong direction
    ("F - f(xr, r, s, y)", "F - f(xr, t, s, y)", False),                           # the wrong time
    ("F - f(xr, r, s, y)", "F - f(xt, r, s, y)", False),                           # the wrong point
    ("F - f(xr, r, s, y)", "f(xr, r, s, y) - F", False),
    (DERIVATIVE, "target = u + wide(t - s, x) * df_dt", True),
    (DERIVATIVE, "target = u + df_dt", True),
    (LINE, "at=(xt, t, s, y), along=(u, -1, 0)", True),
    (LINE, "at=(xt, t, s, y), along=(-u, 1, 0)", True),
    (LINE, "at=(xt, t, s, y), along=(u, 0, 0)", True),
]


@pytest.mark.parametrize("variant", ["CU", "VU"])
@pytest.mark.parametrize("old, new, exact", MUTANTS)
def test_mutants_are_caught(old, new, exact, variant):
    for mode in ("exact", "fused") if exact else ("difference",):
        assert loss(mutant(SOURCE, old, new), variant, mode=mode) > 20 * loss(gcm, variant, mode=mode)
        assert loss(mutant(SOURCE, old, new), variant, mode=mode) > 2e-2


@pytest.mark.parametrize("variant", ["CU", "VU"])
def test_without_guidance_the_target_is_right_on_average(variant):
    """u = z - x is right only on average: over the two points x +- 0.1 of the posterior, the mean of f_tar is f."""
    t, s, _ = times(variant)
    _, z = FLOW.draw(64)
    xt = wide(1 - t) * ORACLE.mu + 0.4 * z
    k, tau = FLOW.to_oracle(t)
    mean, targets = ORACLE.posterior_mean(wide(k) * xt, tau), []
    for offset in (-0.1, 0.1):
        x = mean + offset
        u = (xt - x) / wide(t)                                         # z - x with z = (x_t - (1-t) x) / t
        targets.append(u + wide(s - t) * forward_mode(f_ideal, at=(xt, t, s, None), along=(u, 1, 0)))
    assert (sum(targets) / 2 - f_ideal(xt, t, s)).abs().max() < 1e-11
    assert (targets[0] - f_ideal(xt, t, s)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", ["CU", "VU"])
@pytest.mark.parametrize("mode", ["difference", "exact", "fused"])
def test_in_any_shape_the_exact_jump_is_the_minimum(shape, variant, mode):
    """z - x is the velocity of the flow at x_t, so that the ideal network has no error without guidance. With guidance
    and s = t, the error is exactly 0, and so is the gradient, although the norm has a kink at 0."""
    x, z = FLOW.draw(shape[0], shape=shape[1:])
    t, s, _ = times(variant, shape[0])
    xt = x + wide(t, x) * (z - x)
    u = FLOW.velocity(xt, t)
    x, z = xt - wide(t, x) * u, xt + wide(1 - t, x) * u

    def beside(theta, t, s, **options):
        def loss_of(f):
            return gcm.gcm_loss(f, JVP.get(mode), x, z, t, s, torch.ones_like(t), None, difference=mode == "difference",
                                ht="const", k=1e-4, scheme="meanflow", **options)
        return loss_and_gradient(loss_of, f_ideal, theta)
    assert beside(0.0, t, s)[0] < (2e-3 if mode == "difference" else 1e-12)
    of_four = [a.reshape(-1, 4)[:, :1].repeat(1, 4).flatten() for a in (t, s)]
    ideal, _ = beside(0.0, *of_four, M=4, sigma=math.inf)              # the energy distance of four jumps
    for theta in (-0.1, 0.1):
        value, gradient = beside(theta, t, s)
        assert value > 2e-2 and gradient * theta > 1e-2
        assert beside(theta, *of_four, M=4, sigma=math.inf)[0] > ideal + 2e-3
    at_equal_times = loss_and_gradient(lambda f: loss(gcm, variant, mode=mode, f=f, shape=shape, t=t, s=t), f_ideal)
    assert at_equal_times == (0, 0)


@pytest.mark.parametrize("mode", ["difference", "fd"])
def test_guidance_needs_labels_and_the_null_label(mode):
    x, z = FLOW.draw(4)
    t, s, density = times("VU", 4)
    for y, y_null in ((None, 5), (torch.ones(4, dtype=torch.int64), None)):
        with pytest.raises(ValueError, match="guidance"):
            gcm.gcm_loss(f_ideal, JVP.get(mode), x, z, t, s, density, y, difference=mode == "difference", w=2.0,
                         y_null=y_null)


def test_the_loss_takes_any_callable_without_labels():
    """The loss accepts y = None and a network without attributes. With the difference, it needs no jvp."""
    x, z = FLOW.draw(4)
    t, s, density = times("VU", 4)

    def net(x, t, s, y):
        assert s is not None and y is None
        return x * gcm.wide(t, x)
    f = gcm.precondition(net, second_time=True)
    assert gcm.gcm_loss(f, None, x, z, t, s, density, None) > 0
    for jvp in JVP.values():
        assert gcm.gcm_loss(f, jvp, x, z, t, s, density, None, difference=False) > 0


# ------------------------------------------------------------------------------------------------------------------
# Steps, times, weights.

GRID = (torch.arange(200_000).double() + 0.5) / 200_000


@pytest.mark.parametrize("ht", sorted(gcm.STEPS))
def test_all_steps_have_the_integral_of_the_baseline(ht):
    k = gcm.equal_integral(ht, 0.005, 3.5)
    h = gcm.STEPS[ht](GRID, k, 3.5)
    assert math.isclose(h.mean().item(), 0.005 / 3, rel_tol=1e-4) and h.min() >= 0


def test_constants_of_the_steps():
    """The constants make the integral of each step equal to that of the quadratic step, eps / 3 (C.3)."""
    for ht, k in (("const", 0.005 / 3), ("linear", 0.01 / 3), ("quadratic", 0.005), ("cubic", 0.02 / 3), ("quad-inc", 0.005),
                  ("quad-concave", 0.01), ("quad-convex", 0.02), ("exp", 0.005 / 3 * 3.5 / (1 - math.exp(-3.5)))):
        assert math.isclose(gcm.equal_integral(ht, 0.005, 3.5), k, rel_tol=1e-6), ht


def test_steps_of_others_follow_their_own_definition():
    t = torch.linspace(0.05, 0.9, 9).double()
    sigma = 0.5 * torch.tan(math.pi / 2 * t)                           # Eq. 24
    sigma_r = sigma * (1 - 1e-3 * (1 + 8 * torch.sigmoid(-sigma)))     # Eq. 25, k = 8, b = 1
    assert torch.allclose(gcm.STEPS["ect"](t, 1e-3, 0), t - 2 / math.pi * torch.atan(sigma_r / 0.5), atol=1e-15)
    eta = t / (1 - t) - 1e-3                                           # IMM: eta falls by a constant
    assert torch.allclose(gcm.STEPS["imm"](t, 1e-3, 0), t - eta / (1 + eta), atol=1e-15)
    bell = gcm.STEPS["edm"](GRID, 1e-3, 0)
    assert 0.2 < GRID[bell.argmax()] < 0.8 and bell[0] < bell.max() / 2 and bell[-1] < bell.max() / 2


def test_c_is_near_t_near_0_and_uniform_in_the_steps():
    t = torch.tensor([1e-6, 1e-4]).double()
    assert torch.allclose(gcm.TIME_SCALINGS["exp"](t, 3.5) / t, torch.ones(2).double(), atol=1e-3)
    t = torch.linspace(0.1, 0.9, 9).double()
    h = gcm.STEPS["exp"](t, 1e-5, 3.5)
    c = gcm.TIME_SCALINGS["exp"]
    assert torch.allclose(c(t, 3.5) - c(t - h, 3.5), torch.full_like(t, 1e-5), rtol=1e-3)              # Eq. 9


@pytest.mark.parametrize("pt, ab", [("sine", (1, 0.1)), ("sine", (1, 0.01)), ("sine", (1, 0.001)), ("cosh", (1.5, 0))])
def test_quantiles_invert_the_integral_of_the_density(pt, ab):
    a, b = ab
    density = {"sine": lambda t: torch.sin(math.pi / 2 * (a * t + b * (1 - t))),
               "cosh": lambda t: torch.cosh(a * t + b * (1 - t))}[pt](GRID)          # Eqs. 15, 16 without factor
    density /= density.mean()
    cdf = density.cumsum(0) / len(GRID)
    u = torch.linspace(0.01, 0.99, 50).double()
    t, p = gcm.DENSITIES[pt](u, a, b)
    place = (t * len(GRID)).long()
    assert torch.allclose(cdf[place], u, atol=1e-4)
    assert torch.allclose(p, density[place], rtol=1e-3)


@pytest.mark.parametrize("nu", [1.0, 4.0])
def test_uniform_power_has_the_cdf_of_eq_17(nu):
    """Eq. 17 with the order of integration changed gives int_0^q p_up = 1 - int_q^1 (1 - q/tau)^nu dtau."""
    n = 1000
    u, v = torch.meshgrid(*[(torch.arange(n).double() + 0.5) / n] * 2, indexing="ij")
    s = gcm.uniform_power(u, v, nu)
    for q in (0.01, 0.1, 0.3, 0.7):
        tau = q + (1 - q) * GRID
        assert abs((s < q).double().mean().item() - (1 - (1 - q) * ((1 - q / tau) ** nu).mean().item())) < 2e-3


def test_t_given_s_is_uniform_on_what_is_left_and_on_all_for_s_near_0():
    u = torch.rand(4, 100_000, generator=torch.Generator().manual_seed(0)).double()
    t, s, density = gcm.sample_times(u, variant="VU", pt="uniform", ab=(1, 0))
    assert (s >= gcm.T_MIN).all() and (s <= t).all() and (t <= gcm.T_MAX).all() and (density == 1).all()
    near = s < 0.02
    assert 10_000 < near.sum() < 90_000
    for part in (near, (s > 0.2) & (s < 0.5)):
        tenths = torch.histc(((t - s) / (gcm.T_MAX - s))[part], 10, 0, 1) / part.sum()
        assert (tenths - 0.1).abs().max() < 0.01, tenths
    tenths = torch.histc(t[near], 10, gcm.T_MIN, gcm.T_MAX) / near.sum()     # E.2: the uniform density as s -> 0
    assert (tenths - 0.1).abs().max() < 0.012, tenths
    u[0] = 0
    assert torch.allclose(gcm.sample_times(u, variant="VU")[0], gcm.sample_times(u, variant="CU")[0])   # t is that of CU


def test_dividing_by_the_density_keeps_the_effective_weight():
    """E_p[w(t)/p(t) q(t)] is the same number for every p(t)."""
    u = (torch.arange(4 * 50_000).double().reshape(4, -1) % 50_000 + 0.5) / 50_000
    means = []
    for pt, ab in (("uniform", (1, 0)), ("sine", (1, 0.01)), ("cosh", (1.5, 0))):
        t, s, density = gcm.sample_times(u, variant="CU", pt=pt, ab=ab)
        means.append((gcm.WEIGHTS["gcm"](t, s, None, 1.0, 6.0) / density * t.cos()).mean().item())
    assert max(means) - min(means) < 1e-3 * means[0]


def test_ects_step_ends_at_the_data():
    """The weight of ECT is 1 / (sigma_t - sigma_r), and sigma_r is never below 0."""
    t = torch.tensor([0.1, 0.3]).double()
    assert torch.allclose(gcm.WEIGHTS["ect"](t, None, torch.full_like(t, 0.5)), t / torch.tan(math.pi / 2 * t))


def test_the_curriculum_ends_where_float32_would_round_its_difference_off(tmp_path, monkeypatch):
    steps, step = [], gcm.STEPS["ect"]
    monkeypatch.setitem(gcm.STEPS, "ect", lambda t, k, mu: steps.append(k) or step(t, k, mu))
    call(monkeypatch, gcm, *TINY, "--ht", "ect", "--curriculum", 1, "--steps", 13, "--out", tmp_path / "run")
    assert steps[-13:] == [2.0 ** -min(i, 10) for i in range(1, 14)]


def test_times_and_weights_of_the_others():
    u = torch.rand(4, 50_000, generator=torch.Generator().manual_seed(0)).double()
    drawn = {scheme: gcm.sample_times(u, scheme=scheme, variant="VU", equal=equal, P_mean=P_mean, P_std=P_std)
             for scheme, equal, P_mean, P_std in (
                 ("imm", 0.0, 0, 1), ("meanflow", 0.75, -2, 2), ("facm", 0.5, -1, 1.4), ("ect", 0.0, -1.1, 2))}
    for scheme, (t, s, density) in drawn.items():
        assert (gcm.T_MIN <= s).all() and (s <= t).all() and (t <= gcm.T_MAX).all(), scheme
        w = gcm.WEIGHTS[scheme](t, s, torch.full_like(t, 1e-3), 1.0, 6.0)
        assert w.isfinite().all() and (w > 0).all() and (density == 1).all(), scheme
    share = {scheme: (s == t).double().mean().item() for scheme, (t, s, _) in drawn.items()}
    assert share["imm"] < 0.01 and abs(share["meanflow"] - 0.75) < 0.03 and abs(share["facm"] - 0.5) < 0.03
    t, s, _ = drawn["facm"]
    assert torch.allclose(gcm.WEIGHTS["facm"](t, s, None)[s < t], torch.cos((1 - t) * math.pi / 2)[s < t])       # FACM's beta
    t, _, _ = drawn["ect"]
    inner = (t > gcm.T_MIN) & (t < gcm.T_MAX)
    ln_sigma = (0.5 * torch.tan(math.pi / 2 * t)).log()[inner]
    assert abs(ln_sigma.median() + 1.1) < 0.05 and abs((ln_sigma > 0.9).double().mean() - 0.16) < 0.02
    t = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    logsnr = 2 * torch.log((1 - t) / t)
    slope, = torch.autograd.grad(logsnr.sum(), t)
    w = torch.sigmoid(5 - logsnr) * -slope * (1 - t) / ((1 - t) ** 2 + t ** 2) / 2                         # IMM's Eq. 13
    assert torch.allclose(gcm.WEIGHTS["imm"](t, None, None), w)


def test_g2_draws_equal_times_with_probability_three_quarters():
    u = torch.rand(4, 50_000, generator=torch.Generator().manual_seed(0)).double()
    t, s, density = gcm.sample_times(u, variant="VU", nu=1.0, equal=0.75, sigma_d=1.0)
    same = s == t
    assert abs(same.double().mean() - 0.75) < 0.01 and (density[same] == 1).all()
    assert abs(torch.logit(t[same]).median() + 0.4) < 0.03 and abs(torch.logit(t[same]).std() - 1) < 0.03


# ------------------------------------------------------------------------------------------------------------------
# Loss, guidance, preconditioning.

def mmd(seed=0, M=2, sigma=0.1, F=None, target=None, base=None, h=1e-2, B=4):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    F, target, base = (draw(B, 2, 3, 3) if a is None else a for a in (F, target, base))
    t, s = 0.5 + 0.1 * draw(B), 0.1 + 0 * draw(B)
    h, w = torch.full((B,), h, dtype=torch.float64), torch.rand(B, generator=g, dtype=torch.float64)
    args = (t, t - h, s, h, w, M, sigma)
    return gcm.mmd_loss(F, target, base, *args), F, target, base, args


def test_mmd_of_one_is_the_norm():
    F = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for sigma in (0.1, math.inf):
        value, _, target, _, (t, r, s, h, w, *_) = mmd(M=1, sigma=sigma, F=F)
        norm = w * (F - target).square().mean(dim=(1, 2, 3)).sqrt() * torch.exp(-h / sigma)
        assert torch.allclose(value, norm, rtol=1e-9)
        ours, theirs = (torch.autograd.grad(a.sum(), F)[0] for a in (value, norm))
        assert torch.allclose(ours, theirs, rtol=1e-7)


def test_mmd_is_eq_46_with_the_kernel_of_eq_44():
    """The expected value is computed pair by pair in Python."""
    value, F, target, base, (t, r, s, h, w, M, sigma) = mmd(M=4, B=8)
    a, b = base - wide(h) * F, base - wide(h) * target

    def k(x1, t1, s1, x2, t2, s2):
        return -(x1 - x2).square().mean().sqrt() * torch.exp(-((t1 - t2).abs() + (s1 - s2).abs()) / sigma)
    for i in range(8):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        total = sum(k(a[i], t[i], s[i], a[j], t[j], s[j]) + k(b[i], r[i], s[i], b[j], r[j], s[j])
                    - 2 * k(a[i], t[i], s[i], b[j], r[j], s[j]) for j in group)
        assert math.isclose(value[i].item(), (w[i] / h[i] * total / 4 / 2).item(), rel_tol=1e-9)


def test_mmd_of_a_set_with_itself_is_0_and_of_others_above():
    """With sigma = inf the MMD is the energy distance, which is 0 for equal sets and positive for different sets."""
    F = torch.randn(4, 2, 3, 3).double()
    assert mmd(F=F, target=F, sigma=math.inf)[0].abs().max() < 1e-12
    order = [1, 0, 3, 2]                                               # the same set, in another order
    base = torch.randn(4, 2, 3, 3).double()
    other = (base - base[order]) / 1e-2 + F[order]                     # base - h other = (base - h F)[order]
    value, _, _, _, (*_, w, _, _) = mmd(F=F, target=other, base=base, sigma=math.inf)
    assert (value / w).sum().abs() < 1e-9
    for seed in range(20):
        value, _, _, _, (*_, w, _, _) = mmd(seed, M=4, sigma=math.inf)
        assert (value / w).sum() > 0


@pytest.mark.parametrize("old, new", [
    ("+ kernel(b, b, r, r) - 2 * kernel(a, b, t, r)", "+ kernel(b, b, r, r) - kernel(a, b, t, r)"),
    ("kernel(a, a, t, t) + kernel(b, b, r, r)", "- kernel(a, a, t, t) - kernel(b, b, r, r)"),
    ("return -distance * torch.exp(-time_gap / sigma)", "return distance * torch.exp(-time_gap / sigma)"),
    ("return -distance * torch.exp(-time_gap / sigma)", "return -distance * torch.exp(time_gap / sigma)"),
    ("base - wide(h, base) * F)", "base + wide(h, base) * F)"),
])
def test_mutants_of_the_mmd_are_caught(old, new):
    honest = gcm.mmd_loss
    try:
        gcm.mmd_loss = mutant(SOURCE, old, new).mmd_loss
        with pytest.raises(AssertionError):
            test_mmd_is_eq_46_with_the_kernel_of_eq_44()
    finally:
        gcm.mmd_loss = honest


def test_oracle_has_almost_no_mmd():
    t, s, _ = times("VU")
    t, s = (a.reshape(-1, 4)[:, :1].expand(-1, 4).flatten() for a in (t, s))
    exact = loss(gcm, mode="exact", M=4, t=t, s=s, sigma=math.inf)
    assert abs(exact) < 1e-9
    wrong = mutant(SOURCE, DERIVATIVE, "target = u + wide(t - s, x) * df_dt")
    assert loss(wrong, mode="exact", M=4, t=t, s=s, sigma=math.inf) > 1e-2


def test_loss_of_no_residual_has_a_gradient():
    F = torch.zeros(2, 3, 4, 4, requires_grad=True)
    gcm.rms(F, dim=(1, 2, 3)).sum().backward()
    assert F.grad.isfinite().all()


def test_guidance_mixes_as_meanflow_does():
    def f(x, t, s, y):
        assert torch.equal(s, t)
        return torch.ones_like(x) * wide(y.double())                   # velocity = label; null label 0
    t, y = torch.tensor([0.1, 0.5, 0.9, 0.5]).double(), torch.tensor([3, 3, 3, 0])
    x = torch.zeros(4, 2, 3, 3).double()
    u = gcm.guided_velocity(f, x, x + 2, t, y, w=2.5, kappa=0.92, guide=(0.0, 0.8), y_null=0)
    omega = 2.5 * 0.08
    assert torch.allclose(u[:, 0, 0, 0], torch.tensor([omega * 2 + 0.92 * 3] * 2 + [2.0, 2.0]).double())
    assert gcm.guided_velocity(None, x, x + 2, t, y, w=1.0, kappa=0.0, guide=(0, 1), y_null=0) is not None     # f is not called


def as_network(second_time):
    """Returns a network whose preconditioned output is the ideal f, by undoing all scalings of Section 3.1."""
    def net(x, c_t, c_s=None, y=None):
        t = torch.log1p(3.5 * c_t) / 3.5
        s = torch.log1p(3.5 * c_s) / 3.5 if second_time else torch.full_like(t, gcm.T_MIN)
        xt = x * SIGMA_D * wide(((1 - t) ** 2 + t ** 2).sqrt(), x)
        return f_ideal(xt, t, s) / (SIGMA_D * math.sqrt(2))
    return net


SCALING = dict(ct="exp", mu=3.5, sigma_d=SIGMA_D)


def test_preconditioning_gives_inputs_and_outputs_unit_variance():
    seen = []
    g = torch.Generator().manual_seed(0)
    x, z = SIGMA_D * torch.randn(2, 200_000, 1, 1, 1, generator=g)
    f = gcm.precondition(lambda x, c, s, y: (seen.append(x), torch.ones_like(x))[1], **SCALING, second_time=False)
    for t in (0.1, 0.5, 0.9):
        t = torch.full((len(x),), t)
        out = f(wide(1 - t) * x + wide(t) * z, t, t, None)
        assert abs(seen[-1].std() - 1) < 0.01 and abs(out.flatten()[0] - (z - x).std()) < 0.01


@pytest.mark.parametrize("sigma_d", [0.5, 1.0])
def test_a_velocity_network_of_ours_becomes_that_of_this_flow(sigma_d):
    """For s = t, ORACLE.velocity in the time of this repository becomes E[z - x | x_t] in GCM's time."""
    f = gcm.precondition(lambda x, tau, s, y: ORACLE.velocity(x, tau), ct="exp", mu=3.5, sigma_d=sigma_d,
                         second_time=False, velocity=True)
    x, x0, t = ORACLE.draw(64)
    xt = wide(1 - t) * x + wide(t) * sigma_d * x0
    k = 1 / (1 - t + sigma_d * t)
    mean = ORACLE.posterior_mean(wide(k) * xt, (1 - t) * k)
    assert torch.allclose(f(xt, t, t, None), (xt - mean) / wide(t))


def test_edm_denoiser_is_the_velocity_here():
    """For a network with EDM's preconditioning and c_noise, f is (x_t - D(x_t / (1-t), sigma)) / t."""
    torch.manual_seed(0)
    net = models.create(name="DDPM++", input_size=8, width=8, mult=(1, 1), blocks=1, attention=(), sigma_data=0.5,
                        edm_time=True).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(5, 3, 8, 8).double(), torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99]).double()
    sigma = wide(0.5 * t / (1 - t))
    tau = 1 / (1 + sigma.flatten())
    point = x / wide(1 - t)                                            # data + sigma noise
    raw = models.create(name="DDPM++", input_size=8, width=8, mult=(1, 1), blocks=1, attention=()).double()
    raw.load_state_dict(net.state_dict())
    c_skip, c_out = 0.25 / (sigma ** 2 + 0.25), sigma * 0.5 / (sigma ** 2 + 0.25).sqrt()
    D = c_skip * point + c_out * raw(point / (sigma ** 2 + 0.25).sqrt(), sigma.flatten().log() / 4)
    f = gcm.precondition(net, **SCALING, second_time=False, velocity=True)
    assert torch.allclose(f(x, t, t, None), (x - D) / wide(t), rtol=1e-9, atol=1e-9) and tau.min() > 0


# ------------------------------------------------------------------------------------------------------------------
# Samplers.

def test_times_of_the_samplers_are_one_less_than_the_nfe():
    noise = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)

    def net(x, t, s, y):
        return x + gcm.wide(t, x) - gcm.wide(s, x)

    for sampler in gcm.SAMPLERS.values():
        options = SCALING | dict(second_time=True)
        given = sampler(net, noise, None, nfe=3, mid=(0.6,), times=[0.8, 0.3], **options)
        assert torch.equal(given, sampler(net, noise, None, nfe=3, mid=(0.8, 0.3), **options))
        for nfe, times in ((2, [0.8, 0.3]), (3, [0.5]), (2, [1.2]), (1, [0.6]), (3, [0.3, 0.8])):
            with pytest.raises(ValueError, match=f"NFE {nfe} needs {nfe - 1}"):
                sampler(net, noise, None, nfe=nfe, mid=(0.6,), times=times, **options)


@pytest.mark.parametrize("nfe, mid", [(1, (0.6,)), (2, (0.6,)), (3, (0.8, 0.3)), (4, (0.6,))])
def test_samplers_follow_the_flow_map(nfe, mid):
    noise = torch.randn(nfe, 16, 2, 3, 3, dtype=torch.float64)
    at = [gcm.T_MAX, *mid, gcm.T_MIN] if len(mid) == nfe - 1 else torch.linspace(gcm.T_MAX, gcm.T_MIN, nfe + 1).tolist()
    full = lambda t: torch.full((16,), t).double()  # noqa: E731
    x = SIGMA_D * noise[0]
    pushed = FLOW.flow_map(x, full(gcm.T_MAX), full(gcm.T_MIN))              # exact jumps compose to one
    for i in range(nfe):
        x = FLOW.flow_map(x, full(at[i]), full(gcm.T_MIN))
        if i + 1 < nfe:
            x = (1 - at[i + 1]) * x + at[i + 1] * SIGMA_D * noise[i + 1]
    options = dict(SCALING, mid=mid)
    restart = gcm.SAMPLERS["restart"](as_network(False), noise, None, nfe=nfe, **options, second_time=False)
    assert torch.allclose(restart, x, atol=1e-5)
    pushforward = gcm.SAMPLERS["pushforward"](as_network(True), noise[:1], None, nfe=nfe, **options, second_time=True)
    assert torch.allclose(pushforward, pushed, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samplers_in_any_shape(shape):
    noise = torch.randn(3, *shape, dtype=torch.float64)
    full = lambda t: torch.full((len(noise[0]),), t).double()  # noqa: E731
    exact = FLOW.flow_map(SIGMA_D * noise[0], full(gcm.T_MAX), full(gcm.T_MIN))
    for name, second_time in (("restart", False), ("pushforward", True)):
        def draw(noise, nfe):
            return gcm.SAMPLERS[name](as_network(second_time), noise, None, nfe=nfe, second_time=second_time, **SCALING)
        assert torch.allclose(draw(noise, 1), exact, atol=1e-5)
        assert torch.allclose(draw(noise, 3), draw(noise.flatten(2), 3).reshape(shape), atol=1e-12)


def test_samplers_take_their_options_from_the_run():
    args = dict(variant="VU", scheme="gcm", ct="exp", mu=3.5, sigma_data=0.5, init=None, t_mid=[0.6],
                net=dict(name="DDPM++"))
    assert gcm.default_sampler(2, args) == "pushforward" and set(gcm.sampler_options(args)) == set(gcm.SAMPLERS)
    assert gcm.default_sampler(1, dict(args, variant="CU")) == "restart" and "restart" not in gcm.DETERMINISTIC
    assert gcm.default_sampler(2, dict(args, scheme="facm")) == "restart"          # FACM's s is only t_0 or t
    noise = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)
    for name, options in gcm.sampler_options(args).items():
        assert gcm.SAMPLERS[name](as_network(True), noise, None, nfe=2, **options).isfinite().all()


# ------------------------------------------------------------------------------------------------------------------
# As a program.

TINY = ["--device", "cpu", "--resolution", "12", "--net", "width=8", "mult=1,1", "blocks=1", "dropout=0.2", "--batch",
        "8", "--warmup", "2", "--lr-final", "1", "--log-every", "1", "--preview-every", "1000"]
VU = ["--variant", "VU", "--group", "2", "--w", "2", "--kappa", "0.5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, gcm, *TINY, *VU, "--steps", 6, "--save-every", 2, "--out", out)
    return out


def test_a_run_leaves_what_it_promises(finished):
    assert [row["step"] for row in rows(finished)] == list(range(1, 7))
    checkpoint = torch.load(finished / "ckpt.pt", weights_only=True)
    assert set(checkpoint) == {"method", "args", "step", "model", "ema", "optimizer", "torch_version"}
    assert checkpoint["method"] == "gcm" and (finished / "previews/0000006.png").exists()


def test_kill_9_and_rerun_is_the_uninterrupted_run(finished, tmp_path):
    command = [*TINY, *VU, "--steps", 6, "--save-every", 2, "--out", tmp_path / "run"]
    kill_and_rerun(*command, step=3, out=tmp_path / "run", script="gcm.py")
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.parametrize("second_time", [False, True])
@pytest.mark.parametrize("options", [dict(ct="t"), dict(ct="1000t"), dict(ct="exp"), dict(ct="t", velocity=True)], ids=str)
def test_one_pass_gives_the_derivative_of_the_scaled_network(options, second_time):
    torch.manual_seed(0)
    net = models.create("DDPM++", input_size=8, width=8, mult=(1,), blocks=0, sigma_data=0.5, second_time=second_time).double()
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    f = gcm.precondition(net, mu=3.5, sigma_d=0.6, second_time=second_time, **options)
    (xt, u), t = torch.randn((2, 3, 3, 8, 8), dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9]).double()
    F, df_dt = JVP["fused"](f, at=(xt, t, t / 2, None), along=(u, 1, 0))
    exact = forward_mode(f, at=(xt, t, t / 2, None), along=(u, 1, 0))
    assert torch.equal(F, f(xt, t, t / 2, None)) and F.requires_grad and not df_dt.requires_grad
    assert (df_dt - exact).norm() < 1e-11 * exact.norm()


def test_fused_and_exact_train_alike(tmp_path, monkeypatch):
    """Both ways to df/dt give the same gradient, also with dropout, whose masks F and df/dt share."""
    perturb(monkeypatch)
    for jvp in ("fused", "exact"):
        call(monkeypatch, gcm, *TINY, *VU, "--jvp", jvp, "--steps", 1, "--optimizer", "AdamW", "--betas", 0.9, 0.99,
             "--out", tmp_path / jvp)
    a, b = (first_gradient(tmp_path / jvp) for jvp in ("fused", "exact"))
    assert (a - b).abs().max() < 1e-5 * b.abs().max() > 0


@pytest.mark.parametrize("flags", [["--augment", "--row", "E"], VU], ids=str)
def test_processes_and_micro_batches_give_the_gradient_of_one_process(tmp_path, monkeypatch, flags):
    """The random numbers of the augmentation and the members of the groups are those of the global batch."""
    common = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in TINY]
    common += [*flags, "--optimizer", "AdamW", "--betas", 0.9, 0.99, "--steps", 1]
    call(monkeypatch, gcm, *common, "--out", tmp_path / "one")
    call(monkeypatch, gcm, *common, "--out", tmp_path / "pieces", "--micro-batch", 3)
    run_two(*common, *(["--fsdp"] if flags is VU else ["--micro-batch", 2]), "--out", tmp_path / "two", script="gcm.py")
    one = first_gradient(tmp_path / "one")
    for other in ("pieces", "two"):
        assert (first_gradient(tmp_path / other) - one).abs().max() < 1e-5 * one.abs().max(), other
    assert one.abs().max() > 0


@pytest.mark.parametrize("flags", [
    ["--jvp", "exact"], ["--row", "F", "--jvp", "exact", "--share-time", "--kernel-sigma", "inf"],
    ["--precision", "bf16", "--equal", "0.75"], ["--row", "E", "--precision", "bf16"], ["--curriculum", "1", "--ema-beta", "0.99"],
    ["--augment", "--xflip"]], ids=str)
def test_every_option_trains(tmp_path, monkeypatch, flags):
    if "--xflip" in flags:                 # glyphs have no mirror images
        flags = [*flags, "--data", write_images(tmp_path / "set", NAMES), "--preset", "glyphs"]
    call(monkeypatch, gcm, *TINY, *flags, "--steps", 2, "--out", tmp_path / "run")
    assert all(math.isfinite(row["grad_norm"]) for row in rows(tmp_path / "run"))


@pytest.mark.parametrize("letter", list(gcm.ROWS))
def test_every_row_trains_and_flags_beat_it(tmp_path, monkeypatch, letter):
    mu = [] if letter in "AG" else ["--mu", 3]                         # it has no effect there
    call(monkeypatch, gcm, *TINY, "--row", letter, *mu, "--gamma", 0.5, "--steps", 1, "--out", tmp_path / "run")
    args = checkpoints.read(tmp_path / "run/ckpt.pt")["args"]
    assert args["mu"] == (3 if mu else 3.5)
    assert all(args[k] == v for k, v in (gcm.ROWS[letter] | dict(gamma=0.5)).items())


def test_rows_say_what_tables_2_3_and_10_say():
    rows = gcm.ROWS
    baseline = dict(scheme="gcm", ht="const", ct="t", gamma=0.0, lam=0.0, pt="uniform", group=1, equal=0.0, w=1.0, curriculum=0)
    assert rows["A"] == baseline | dict(variant="CU") and rows["G"] == baseline | dict(variant="VU")
    for before, after, change in (("A", "B", {"ht"}), ("B", "C", {"ct"}), ("C", "D", {"gamma", "lam"}), ("D", "E", {"pt"}),
                                  ("E", "F", {"group", "kernel_sigma"}), ("G", "H", {"ht"}), ("K", "L", {"group", "kernel_sigma"}),
                                  ("D", "M", {"variant"}), ("M", "K", {"pt"})):
        differ = {k for k in rows[before] | rows[after] if rows[before].get(k) != rows[after].get(k)}
        assert differ == change, (before, after)


@pytest.mark.parametrize("options", [dict(sigma_data=0.5, edm_time=True), dict(sigma_data=0.6, time_scale=8.0)], ids=str)
def test_begins_with_a_velocity_network(tmp_path, monkeypatch, options):
    """--init accepts public weights and our checkpoints. VU adds a second time, which changes nothing at first."""
    small = dict(name="DDPM++", input_size=12, num_classes=10, width=8, mult=(1, 1), blocks=1, attention=())
    net = models.create(**small, **options)
    ours = {} if "edm_time" in options else dict(method="flow", step=1, args=dict(net=small | options))
    torch.save(ours | dict(model=net.state_dict()), tmp_path / "init.pt")
    for row in ("D", "J"):                                             # CU and VU
        out = tmp_path / row
        call(monkeypatch, gcm, *TINY, "--init", tmp_path / "init.pt", "--row", row, "--steps", 1, "--lr", "1e-12", "--out", out)
        trained, (begin, _) = checkpoints.read(out / "ckpt.pt"), weights.read(tmp_path / "init.pt")
        assert all(torch.allclose(trained["model"][k], v, atol=1e-6) for k, v in begin.items())
        assert trained["args"]["net"].get("edm_time", False) == options.get("edm_time", False)
        assert gcm.sampler_options(trained["args"])["restart"]["velocity"]


def test_a_short_run_fits_what_the_oracle_knows(tmp_path, monkeypatch):
    """After training on Gaussian data, the one-step samples of a CU model have the mean and deviation of the data."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                 torch.nn.Linear(64, 1))

    def net(x, c_t, c_s, y):
        return layers(torch.cat([x.flatten(1), c_t[:, None]], 1))[:, :, None, None]
    f = gcm.precondition(net, **SCALING, second_time=False)
    optimizer = torch.optim.Adam(layers.parameters(), 3e-3)
    g = torch.Generator().manual_seed(0)
    for step in range(800):
        x = 0.3 + 0.4 * torch.randn(256, 1, 1, 1, generator=g)
        z = SIGMA_D * torch.randn(256, 1, 1, 1, generator=g)
        t, s, density = gcm.sample_times(torch.rand(4, 256, generator=g))
        loss = gcm.gcm_loss(f, None, x, z, t, s, density, None, k=0.05, lam=3.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(1, 4000, 1, 1, 1, generator=g)
    x = gcm.SAMPLERS["restart"](net, noise, None, nfe=1, **SCALING, mid=(), second_time=False)
    assert abs(x.mean() - 0.3) < 0.06 and abs(x.std() - 0.4) < 0.06


def test_trains_on_latents(tmp_path, monkeypatch):
    """The ImageNet preset (VU, MeanFlow's guidance, s = t for three quarters of the samples) trains a small DiT."""
    write_shards(tmp_path / "z")
    call(monkeypatch, gcm, "--device", "cpu", "--data", "imagenet_latents", "--data-dir", tmp_path / "z", "--batch", 4,
         "--steps", 3, "--log-every", 1, "--precision", "bf16", "--out", tmp_path / "run",
         "--net", "name=DiT", "patch=2", "width=32", "depth=1", "heads=4")
    net = checkpoints.read(tmp_path / "run/ckpt.pt")["args"]["net"]
    assert (net["input_size"], net["in_channels"], net["num_classes"], net["second_time"]) == (4, 4, 6, True)
    assert len(rows(tmp_path / "run")) == 3 and all(row["loss"] > 0 for row in rows(tmp_path / "run"))


@pytest.mark.parametrize("flags, words", [
    (["--group", "3"], "--group 3"), (["--group", "2", "--micro-batch", "1"], "--group 2"),
    (["--variant", "CU", "--w", "2"], "--variant CU"), (["--row", "A", "--scheme", "imm"], "--variant CU"),
    (["--row", "Z"], "--row"),
    (["--variant", "VU", "--w", "2", "--uncond"], "--w 2"), (["--pt", "cosh", "--pt-ab", "1", "1"], "--pt-ab"),
    (["--epsilon", "0"], "--epsilon"), (["--t-mid", "0.6", "1.2"], "--t-mid"), (["--init", "nowhere.pt"], "nowhere.pt"),
    (["--init", "SMALL"], "num_classes 3, and the data have 10"), (["--init", "SMALL", "--resolution", "24"], "input_size 12"),
    (["--ht", "bell"], "--ht"), (["--augment", "--net", "name=DiT", "width=32", "depth=1", "heads=4"], "augment"),
    (["--epsilon", "0.1", "--curriculum", "9"], "--epsilon has no effect"), (["--steps", "0"], "--steps 0"), (["--teacher", "x.pt"], "--teacher"),
    (["--row", "A", "--ct", "t", "--net", "sigma_data=0.5"], "--ct has no effect"),
])
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, capsys, flags, words):
    if "SMALL" in flags:
        net = models.create("DDPM++", input_size=12, num_classes=3, width=8, mult=(1, 1), blocks=1, attention=())
        torch.save(net.state_dict(), tmp_path / "small.pt")
        flags = [tmp_path / "small.pt" if flag == "SMALL" else flag for flag in flags]
        flags += [*TINY[4:9], "sigma_data=0.5"]                        # the file does not contain it
    assert words in refused(monkeypatch, capsys, gcm, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def break_losses(monkeypatch, broken):
    """Makes gcm.rms return NaN in the calls whose numbers, from 1, are in `broken`. Each step has one call."""
    honest, calls = gcm.rms, []

    def rms(a, dim):
        calls.append(1)
        return honest(a, dim) * (float("nan") if len(calls) in broken else 1)
    monkeypatch.setattr(gcm, "rms", rms)


def test_a_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch, capsys):
    command = [*TINY, "--save-every", 1, "--out", tmp_path / "run"]
    break_losses(monkeypatch, {3})
    call(monkeypatch, gcm, *command, "--steps", 2)
    before = checkpoints.read(tmp_path / "run/ckpt.pt")
    before = {part: {k: v.clone() for k, v in before[part].items()} for part in ("model", "ema")}
    call(monkeypatch, gcm, *command, "--steps", 3)
    assert "step 2 is skipped, it is not finite: loss nan, grad_norm nan\n" in capsys.readouterr().err
    kept = checkpoints.read(tmp_path / "run/ckpt.pt")
    assert kept["step"] == 3 and all(same(kept[part], before[part]) for part in before)
    call(monkeypatch, gcm, *command, "--steps", 4)
    kept = checkpoints.read(tmp_path / "run/ckpt.pt")
    assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["model"].values())
    assert not same(kept["model"], before["model"])
    assert [row.get("skipped") for row in rows(tmp_path / "run")] == [None, None, 1, None]


def test_losses_that_are_never_finite_end_the_run_with_step_and_terms(tmp_path, monkeypatch, capsys):
    break_losses(monkeypatch, range(3, 99))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, gcm, *TINY, "--steps", 40, "--save-every", 1, "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert re.search("^error: 20 steps in a row were not finite, the last is step 21: loss nan, grad_norm nan;", said,
                     re.MULTILINE), said
    kept = checkpoints.read(tmp_path / "run/ckpt.pt")
    assert kept["step"] == 21 and all(v.isfinite().all() for v in kept["model"].values())


@pytest.mark.cuda
@pytest.mark.parametrize("flags", [
    [], ["--augment", "--row", "F"], ["--row", "L", "--share-time", "--precision", "bf16"], [*VU, "--jvp", "fused", "--precision", "bf16", "--compile"],
    [*VU, "--jvp", "exact", "--precision", "bf16"]], ids=str)
def test_trains_on_cuda(tmp_path, monkeypatch, flags):
    on_gpu = ["cuda" if flag == "cpu" else flag for flag in TINY]
    call(monkeypatch, gcm, *on_gpu, *flags, "--steps", 3, "--log-every", 1, "--out", tmp_path / "run")
    assert all(0 < row["grad_norm"] < math.inf for row in rows(tmp_path / "run"))


def test_gcms_point_and_direction_and_weight():
    """Without guidance, x_t = (1-t) x + t z and u = z - x, and at s = t the loss is w |F - u|."""
    x, z, t, w = *torch.randn(2, 3, 1, 2, 2), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1.0, 2.0, 4.0])

    def f(xt, t_, s, y):
        assert torch.allclose(xt, x + wide(t) * (z - x), atol=1e-6)
        return z - x + 1

    for options in (dict(), dict(difference=False)):
        loss = gcm.gcm_loss(f, JVP["exact"], x, z, t, t, 1 / w, None, scheme="meanflow", **options)
        assert torch.allclose(loss, w.mean())


def test_the_pair_of_the_mmd_ends_at_s(monkeypatch):
    """base - h F is x_t + (s-t) F, the end of the jump from t, if s does not shorten the step."""
    seen = []
    monkeypatch.setattr(gcm, "mmd_loss", lambda F, target, base, *a: seen.append((base, a)) or F.mean())
    x, z, t, s = *torch.randn(2, 2, 1, 2, 2), torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.495])
    for options in (dict(), dict(difference=False)):
        gcm.gcm_loss(lambda xt, *_: torch.full_like(xt, 3.0), JVP["exact"], x, z, t, s, 0 * t + 1, None, ht="const",
                     k=0.01, M=2, **options)
    assert len(seen) == 2
    for base, (_, r, *_) in seen:
        assert torch.allclose(r, torch.tensor([0.49, 0.495]))
        assert torch.allclose(base, (x + z) / 2 + 3 * wide(s - r), atol=1e-6)


def test_gcms_loop_gives_the_method_what_the_flags_say(tmp_path, monkeypatch):
    calls, rates = {}, learning_rates(monkeypatch, torch.optim.RAdam)
    watch(monkeypatch, calls, gcm, "sample_times", "gcm_loss")
    watch(monkeypatch, calls, data.Dataset, "batch")
    watch(monkeypatch, calls, gcm, "augment", "generator")
    watch(monkeypatch, calls, torch, "_foreach_lerp_")
    call(monkeypatch, gcm, *TINY, "--variant", "VU", "--steps", 2, "--seed", 7, "--label-drop", 1, "--w", 3,
         "--kappa", 0.4, "--guide", 0.1, 0.8, "--group", 2, "--kernel-sigma", 0.3, "--share-time", "--curriculum", 0,
         "--ht", "exp", "--epsilon", 0.02, "--mu", 2, "--pt", "sine", "--pt-ab", 1, 0.1, "--nu-s", 3, "--equal", 0.25,
         "--P-mean", -1, "--P-std", 1.5, "--gamma", 0.5, "--lambda", 2, "--sigma-data", 0.6, "--optimizer", "RAdam",
         "--warmup", 1, "--lr", 1e-3, "--lr-final", 0.5, "--augment", "--jvp", "fused", "--ema-sigma", 0.2,
         "--ema-beta", 0.9, "--out", tmp_path / "run")
    assert [a[1:4] for a in calls["batch"]] == [(7, 0, 8), (7, 8, 8)]
    assert [a[2] for a in calls["_foreach_lerp_"]] == [1 - 0.9] * 2
    assert rates == [1e-3, 0.75e-3]
    assert [a for a in calls["generator"] if "augment" in a] == [("cpu", 7, "augment", k) for k in (0, 1)]
    for step, (u,) in enumerate(calls.pop("sample_times")):
        times = calls["sample_times options"][step]
        assert times == dict(scheme="gcm", variant="VU", pt="sine", ab=[1.0, 0.1], nu=3.0, equal=0.25, P_mean=-1.0,
                             P_std=1.5, sigma_d=0.6)
        g = seeds.generator("cpu", 7, "step", step)
        z, drawn = torch.randn((8, 3, 12, 12), generator=g), torch.rand((5, 8), generator=g)
        assert torch.equal(u, drawn[:4, ::2].repeat_interleave(2, 1))
        _, _, x, noise, t, s, density, y = calls["gcm_loss"][step]
        options = calls["gcm_loss options"][step]
        assert all(torch.equal(a, b) for a, b in zip((t, s, density), gcm.sample_times(u, **times)))
        assert torch.equal(noise, 0.6 * z) and (y == 10).all()
        assert options == dict(difference=False, ht="exp", k=0.02, mu=2.0, scheme="gcm", gamma=0.5, lam=2.0, M=2,
                               sigma=0.3, y_null=10, w=3.0, kappa=0.4, guide=[0.1, 0.8])


def test_without_a_constant_rate_the_average_is_the_power_function(tmp_path, monkeypatch):
    calls = {}
    watch(monkeypatch, calls, torch, "_foreach_lerp_")
    watch(monkeypatch, calls, gcm, "gcm_loss")
    call(monkeypatch, gcm, *TINY, "--steps", 2, "--ema-sigma", 0.2, "--jvp", "fd", "--out", tmp_path / "run")
    assert [a[2] for a in calls["_foreach_lerp_"]] == [1 - (1 - 1 / k) ** (gamma_of(0.2) + 1) for k in (1, 2)]
    assert all(options["difference"] for options in calls["gcm_loss options"])             # as in the paper


def spied_step(monkeypatch, **options):
    """Returns t and h of a loss, which are both arguments of the weight w(t)."""
    seen = []
    monkeypatch.setitem(gcm.WEIGHTS, "gcm", lambda t, s, h, gamma, lam: seen.append((t, h)) or torch.ones_like(t))
    x, z = FLOW.draw(64)
    t, s, density = times("CU")
    gcm.gcm_loss(f_ideal, None, x, z, t, s, density, None, **options)
    return seen[0]


def test_step_and_weight_are_those_of_the_flags(monkeypatch):
    t, h = spied_step(monkeypatch, ht="exp", k=0.02, mu=2.0)
    assert torch.allclose(h, 0.02 * torch.exp(-2 * t))
    monkeypatch.undo()
    x, z = FLOW.draw(64)
    t, s, density = times("CU")
    F = torch.zeros_like(x).requires_grad_()
    gcm.gcm_loss(None, lambda *_, **__: (F, 0 * F), x, z, t, s, density, None, difference=False, gamma=0.5,
                 lam=2.0).backward()
    share = F.grad.square().sum((1, 2, 3)).sqrt() * 64 * x[0].numel() ** 0.5       # the weight of each sample
    assert torch.allclose(share, t ** 0.5 * torch.exp(-2 * t) / density)


def test_other_steps_take_the_constant_of_equal_integral(tmp_path, monkeypatch):
    calls = {}
    watch(monkeypatch, calls, gcm, "gcm_loss")
    call(monkeypatch, gcm, *TINY, "--curriculum", 0, "--ht", "linear", "--epsilon", 0.03, "--steps", 1,
         "--out", tmp_path / "run")
    options, = calls["gcm_loss options"]
    assert options["ht"] == "linear" and math.isclose(options["k"], 0.02, rel_tol=1e-4)


def test_no_step_is_shorter_than_float32_can_take(monkeypatch):
    t, h = spied_step(monkeypatch, ht="cubic", k=1e-5)
    assert (h >= 1e-5 * (1 - 1e-6)).all() and (t - h < t).all()


@pytest.mark.parametrize("flags, expected", [
    ([], (650, 0.0)), (["--epsilon", "0.1"], (0, 0.0)), (["--curriculum", "9"], (9, 0.0)),
    (["--preset", "cifar10"], (None, 0.9999)), (["--preset", "cifar10", "--ema-sigma", "0.1"], (None, 0.0)),
    (["--preset", "cifar10_finetune", "--init", "edm.pkl", "--epsilon", "0.1"], (0, 0.9999))], ids=str)
def test_a_flag_given_by_hand_beats_its_alternative_in_the_preset(monkeypatch, flags, expected):
    monkeypatch.setattr("sys.argv", ["gcm.py", *flags])
    args = gcm.parse_args()
    assert (args.curriculum, args.ema_beta) == expected


@pytest.mark.parametrize("net, velocity", [
    (dict(name="DDPM++"), False), (dict(name="DDPM++", sigma_data=None), False), (dict(name="DiT-B/4"), False),
    (dict(name="DDPM++", sigma_data=0.5), True), (dict(name="DDPM++", edm_time=True), True), (dict(name="EDM2-S"), True)],
    ids=str)
def test_networks_that_scale_themselves_are_asked_at_their_own_times(net, velocity):
    """The time of these networks runs the other way, so that GCM's scalings do not apply, even from scratch."""
    args = dict(net=net, ct="exp", mu=3.5, sigma_data=0.5, variant="CU", init=None)
    assert gcm.scalings(args)["velocity"] == velocity and gcm.scalings(dict(args, init="x.pt"))["velocity"]
