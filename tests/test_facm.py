"""Tests of facm.py against closed forms: the Gaussian oracle in any shape, mutants, guidance and samplers."""

import math
import pathlib

import pytest
import torch
from oracle import SHAPES, Gaussian, fused, loss_and_gradient, mutant

import decm
import facm
from jvp import JVP, forward_mode

SOURCE = pathlib.Path(facm.__file__).read_text()
ORACLE = Gaussian()
Y_NULL = 0


class OracleNet:
    """The ideal FACM network: the average velocity to t=1 under c_CM, the velocity under c_FM."""

    def __init__(self, condition="expanded", teacher=False):
        self.condition, self.teacher, self.passes, self.samples = condition, teacher, 0, 0

    def __call__(self, x, t, s=None, y=None):
        self.passes += 1
        self.samples += len(x)
        if self.teacher:
            assert s is None
            return ORACLE.velocity(x, t)
        assert (s is None) == (self.condition == "expanded")
        if self.condition == "auxiliary":
            fm, flow_t = s == t, t
        else:
            fm, flow_t = t > 1, torch.where(t > 1, 2 - t, t)
        # The singularity of the average velocity at t=1 must not leak into the derivative of the velocity.
        safe = torch.where(fm, torch.full_like(flow_t, 0.5), flow_t)
        cm = ORACLE.average_velocity(x, safe, torch.ones_like(safe))
        return torch.where(ORACLE.expand(fm, x), ORACLE.velocity(x, flow_t), cm)


def losses(module, condition="expanded", mode="exact"):
    """L_FM and L_CM of the oracle network in float64, with alpha = beta = 1, so that no time has a small weight."""
    x1, x0, t = ORACLE.draw(64)
    return module.facm_loss(fused(OracleNet(condition)), JVP[mode], x1, x0, t, torch.full((len(t),), 1),
                            teacher=OracleNet(teacher=True), condition=condition, alpha="1", beta="1", y_null=Y_NULL)


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("condition", ["expanded", "auxiliary"])
def test_oracle_has_zero_residual(condition, mode):
    L_fm, L_cm = losses(facm, condition, mode=mode)
    assert L_fm < 1e-14 and L_cm < 1e-14


def test_oracle_has_zero_residual_with_the_finite_difference():
    L_fm, L_cm = losses(facm, mode="fd")
    assert L_fm < 1e-14 and 0 < L_cm < 1e-6


LINE = "at=(xt, *c_cm, y), along=(v, 1, 0)"


@pytest.mark.parametrize("old, new, hurt", [
    ("g = F_cm - (v + (1 - t) * dF_dt)", "g = F_cm - (v - (1 - t) * dF_dt)", "cm"),       # sign of (1-t) dF/dt
    ("g = F_cm - (v + (1 - t) * dF_dt)", "g = F_cm - (v + t * dF_dt)", "cm"),             # factor of dF/dt
    (LINE, "at=(xt, *c_cm, y), along=(v, -1, 0)", "cm"),                                  # sign of the time tangent
    (LINE, "at=(xt, *c_cm, y), along=(v, 0, 0)", "cm"),                                   # time tangent left out
    (LINE, "at=(xt, *c_cm, y), along=(-v, 1, 0)", "cm"),                                  # direction of the flow
    ("also=(xt, *c_fm, y)", "also=(xt, *c_cm, y)", "fm"),                                 # condition of the anchor
    ("return (t, None), (2 - t, None)", "return (2 - t, None), (t, None)", "both"),       # conditions swapped
    ("return (t, None), (2 - t, None)", "return (t, None), (1 + t, None)", "fm"),         # 2-t misread
    ("return (1 - t) * x0 + t * x1", "return t * x0 + (1 - t) * x1", "none"),             # another exact point
])
def test_mutants_are_caught(old, new, hurt):
    for mode in ("exact", "fused"):
        L_fm, L_cm = losses(mutant(SOURCE, old, new), mode=mode)
        assert (L_cm > 1e-2) == (hurt in ("cm", "both"))
        assert (L_fm > 1e-2) == (hurt in ("fm", "both"))


def test_from_scratch_the_target_is_right_on_average():
    """Without a teacher, v = x_1 - x_0 is right only on average over the posterior, so E[v_tar | x_t] must equal F."""
    _, _, t = ORACLE.draw(64)
    xt = ORACLE.mu * ORACLE.expand(t) + torch.randn(64, 2, 3, 3, dtype=torch.float64)
    mean = ORACLE.posterior_mean(xt, t)
    targets = []
    for offset in (-0.1, 0.1):                     # two values of x_1 whose mean is the posterior mean
        x1 = mean + offset
        x0 = (xt - ORACLE.expand(t) * x1) / (1 - ORACLE.expand(t))
        net = OracleNet()
        v = facm.flow_velocity(net, None, x1, x0, xt, t, (2 - t, None), torch.ones(64, dtype=torch.int64), w=1.0,
                               t_low=0.125, y_null=Y_NULL)
        dF_dt = forward_mode(net, at=(xt, t, None, None), along=(v, 1, 0))
        g = net(xt, t) - (v + (1 - ORACLE.expand(t)) * dF_dt)
        targets.append(net(xt, t) - g)
    assert (sum(targets) / 2 - net(xt, t)).abs().max() < 1e-12
    assert (targets[0] - net(xt, t)).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", [True, False])
def test_guidance_costs_one_evaluation_more_and_none_when_off(teacher):
    x1, x0, t = ORACLE.draw(8)
    y = torch.ones(8, dtype=torch.int64)
    for w, extra in ((1.0, 0), (1.75, 1)):
        net = OracleNet(teacher=teacher)
        facm.flow_velocity(net, net if teacher else None, x1, x0, x1, t, (2 - t, None), y,
                           w=w, t_low=0.0, y_null=Y_NULL)
        assert net.samples == 8 * (teacher + extra) and net.passes <= 1


def test_guidance_extrapolates_from_t_low_on_and_never_for_the_null_label():
    def net(x, t, s, y):
        return torch.ones_like(x) * ORACLE.expand(y.double())          # velocity = label; null label 0
    t = torch.tensor([0.1, 0.125, 0.5, 0.5], dtype=torch.float64)
    y = torch.tensor([3, 3, 3, 0])
    x = torch.zeros(4, 2, 3, 3, dtype=torch.float64)
    v = facm.guided_velocity(net, x, t, (t, None), y, w=1.75, t_low=0.125, y_null=0)
    assert v[:, 0, 0, 0].tolist() == [3, 5.25, 5.25, 0]                # w * 3 = 5.25 where guided
    v = facm.flow_velocity(net, None, x + 2, x, x, t, (2 - t, None), y, w=1.75, t_low=0.125, y_null=0)
    assert v[:, 0, 0, 0].tolist() == [2, 3.5, 3.5, 2]                  # from scratch x_1 - x_0 = 2 replaces v_cond


@pytest.mark.parametrize("condition", ["expanded", "auxiliary"])
def test_from_scratch_the_network_is_asked_for_v_uncond_under_c_fm(condition):
    seen = []

    def net(x, t, s, y):
        seen.append((t, s, y))
        return x

    x, t = torch.ones(2, 1, 2, 2), torch.tensor([0.3, 0.6])
    _, c_fm = facm.conditions(t, condition)
    facm.flow_velocity(net, None, x, x, x, t, c_fm, torch.tensor([1, 2]), w=2.0, t_low=0.0, y_null=5)
    (time, s, y), = seen
    assert torch.equal(time, c_fm[0]) and y.tolist() == [5, 5]
    assert s is None if condition == "expanded" else torch.equal(s, t)


@pytest.mark.parametrize("teacher", [lambda x, t, s, y: x, None], ids=["teacher", "from scratch"])
@pytest.mark.parametrize("labels, y_null", [(False, 5), (True, None), (False, None)])
def test_guidance_needs_labels_and_the_null_label(teacher, labels, y_null):
    x1, x0, t = ORACLE.draw(4)
    y = torch.ones(4, dtype=torch.int64) if labels else None
    with pytest.raises(ValueError, match="guidance"):
        facm.facm_loss(OracleNet(), JVP["fd"], x1, x0, t, y, teacher=teacher, w=1.75, y_null=y_null)
    with pytest.raises(ValueError, match="guidance"):
        facm.sample_euler(OracleNet(), x0[None], y, nfe=2, w=1.75, y_null=y_null)


def test_relaxation_and_clamp():
    """Eq. 13: v_tar = (1-alpha) F + alpha T(F) if |F - T(F)| <= 1. Otherwise v_tar differs from F by alpha."""
    F_cm, v, dF_dt = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (0.5, 0.3, 0.4))
    t, alpha = torch.tensor([[0.25], [0.6]], dtype=torch.float64)
    T = 0.3 + 0.75 * 0.4
    assert math.isclose(facm.cm_target(F_cm, v, dF_dt, t, alpha).item(), 0.4 * 0.5 + 0.6 * T)
    assert math.isclose(facm.cm_target(F_cm, v + 9, dF_dt, t, alpha).item(), 0.5 + 0.6)


def test_norm_l2_has_the_value_and_the_gradient_of_an_adaptive_weight():
    F_cm = torch.tensor([0.3, -0.2], dtype=torch.float64).reshape(1, 1, 1, 2).requires_grad_()
    v_tar = torch.zeros(1, 1, 1, 2).double()
    loss = facm.norm_l2(F_cm, v_tar, 1e-3)
    e = (0.09 + 0.04) / 2
    assert math.isclose(loss.item(), e / math.sqrt(e + 1e-3))
    loss.sum().backward()
    assert torch.allclose(F_cm.grad.flatten(), torch.tensor([0.3, -0.2], dtype=torch.float64) / math.sqrt(e + 1e-3))


def test_fm_loss_value():
    a = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    b = torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1)
    assert math.isclose(facm.fm_loss(a, b).item(), 0.5 + 1 - 1 / math.sqrt(2), rel_tol=1e-6)


def test_the_angle_is_that_of_a_pixels_channels_or_of_a_whole_sample_with_one_channel():
    a, b = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    for shape in ((4, 3, 5, 2), (4, 3, 10), (4, 3, 5, 2, 1), (4, 1, 30), (4, 30), (4, 1, 15, 2)):
        channels = (4, 3, 10) if shape[1] == 3 else (4, 30, 1)
        pairs = [x.reshape(channels) for x in (a, b)]
        angles = (pairs[0] * pairs[1]).sum(1) / pairs[0].norm(dim=1) / pairs[1].norm(dim=1)
        expected = (a - b).square().flatten(1).mean(1) + 1 - angles.mean(1)
        assert torch.allclose(facm.fm_loss(a.reshape(shape), b.reshape(shape)), expected), shape
        assert torch.allclose(decm.fm_loss(a.reshape(shape), b.reshape(shape), p=0.0, c=1.0), expected), shape


def test_weights():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert facm.WEIGHTS["1"](t, 0.5).tolist() == [1, 1, 1]
    assert torch.allclose(facm.WEIGHTS["1-t^p"](t, 0.5), torch.tensor([1, 0.5, 0]))
    assert torch.allclose(facm.WEIGHTS["cos"](t, 0.5), torch.tensor([1, math.cos(math.pi / 8), 0]), atol=1e-7)


def test_sampled_times_follow_eq_20():
    normal = torch.linspace(-3, 3, 7, dtype=torch.float64)
    t = facm.sample_t(normal, -0.8, 1.6)
    assert torch.allclose(torch.log(torch.tan((1 - t) * math.pi / 2)), -0.8 + 1.6 * normal)


@pytest.mark.parametrize("condition", ["expanded", "auxiliary"])
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_sampler_reaches_the_data(nfe, condition):
    """With the exact network every step maps to t=1 exactly, so the result is the flow map of the last point."""
    noise = torch.randn(nfe, 16, 2, 3, 3, dtype=torch.float64)
    xt = noise[0]
    for i in range(nfe):
        x1 = ORACLE.flow_map(xt, i / nfe, 1.0) if i else ORACLE.mu + ORACLE.sd * xt
        if i + 1 < nfe:
            xt = (i + 1) / nfe * x1 + (1 - (i + 1) / nfe) * noise[i + 1]
    net = OracleNet(condition)
    assert torch.allclose(facm.sample(net, noise, None, nfe=nfe, condition=condition), x1)
    assert net.passes == nfe


def flow_error(nfe):
    noise = torch.randn(1, 64, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = ORACLE.mu + ORACLE.sd * noise[0]
    y = torch.ones(64, dtype=torch.int64)
    return (facm.sample_euler(OracleNet(), noise, y, nfe=nfe) - exact).abs().mean().item()


def test_euler_converges_at_first_order():
    assert 1.8 < flow_error(20) / flow_error(40) < 2.2


@pytest.mark.parametrize("module", [facm, decm], ids=["facm", "decm"])
def test_the_flow_begins_with_noise_and_ends_with_data(module):
    x1, x0 = torch.randn(2, 3, 1, 2, 2)
    xt = module.interpolate(x1, x0, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(xt[0], x0[0]) and torch.allclose(xt[1], 0.75 * x0[1] + 0.25 * x1[1])
    assert torch.equal(xt[2], x1[2])


def test_alpha_relaxes_the_target_and_beta_weighs_the_loss():
    """With v = dF/dt = 0 the target is (1 - alpha) F, and the gradient is alpha beta F / sqrt(e + c)."""
    F = torch.tensor([0.3, -0.2], dtype=torch.float64).reshape(1, 1, 1, 2).requires_grad_()
    zero, t = torch.zeros_like(F), torch.tensor([0.36], dtype=torch.float64)

    def still(net, at, along, also):                                   # F with a derivative of zero
        return F, zero, F.detach()
    for options, alpha, beta in ((dict(alpha="cos", beta="1-t^p", p=0.5), math.cos(0.18 * math.pi), 0.4),
                                 (dict(alpha="1-t^p", beta="1", p=2.0), 1 - 0.36 ** 2, 1.0),
                                 (dict(), 0.4, math.cos(0.18 * math.pi))):        # the paper's values
        F.grad = None
        _, L_cm = facm.facm_loss(None, still, zero, zero, t, None, c=1e-3, teacher=lambda *_: zero, **options)
        root = math.sqrt(alpha ** 2 * 0.065 + 1e-3)
        assert math.isclose(L_cm.item(), beta * alpha ** 2 * 0.065 / root)
        L_cm.backward()
        assert torch.allclose(F.grad.flatten(), alpha * beta * F.detach().flatten() / root)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_a_teacher_without_attributes_is_asked_at_t_and_at_no_second_time(w):
    """The teacher gets no second time even if the student has one. With guidance, one pass has both labels."""
    seen = []

    def teacher(x, t, s, y):
        seen.append((t, s, y))
        return x

    x, t, y = torch.ones(2, 1, 2, 2), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    for condition in ("expanded", "auxiliary"):
        facm.facm_loss(lambda x, t, s, y: x, JVP["fd"], x, x, t, y, teacher=teacher, condition=condition, w=w, y_null=5)
    decm.decm_loss(lambda x, t, s, y: x, JVP["fd"], x, x, t, y, teacher=teacher, w=w, y_null=5)
    assert len(seen) == 3
    for time, s, labels in seen:
        assert s is None and torch.equal(time, t if w == 1 else torch.cat([t, t]))
        assert labels.tolist() == [1, 2] + [5, 5] * (w != 1)


def test_the_loss_takes_any_callable_without_labels():
    """y may be None, and network and teacher may be plain functions."""
    x1, x0, t = ORACLE.draw(8)

    def net(x, t, s, y):
        assert s is None and y is None
        return x * ORACLE.expand(t)
    for teacher in (None, lambda x, t, s, y: x):
        assert all(term > 0 for term in facm.facm_loss(net, JVP["fd"], x1, x0, t, None, teacher=teacher))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("condition", ["expanded", "auxiliary"])
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_in_any_shape_the_exact_jump_is_the_minimum(shape, condition, mode):
    x1, x0, t = ORACLE.draw(shape[0], shape=shape[1:])
    y = torch.ones(shape[0], dtype=torch.int64)
    for term in (0, 1):
        def loss(net):
            # The teacher has the same velocity for all labels, so guidance with w = 2 changes nothing.
            return facm.facm_loss(net, JVP[mode], x1, x0, t, y, teacher=OracleNet(teacher=True), condition=condition,
                                  w=2.0, y_null=Y_NULL)[term]
        value, gradient = loss_and_gradient(loss, OracleNet(condition))
        assert abs(value) < 1e-13 and abs(gradient) < 1e-12
        for theta in (-0.1, 0.1):
            value, gradient = loss_and_gradient(loss, OracleNet(condition), theta)
            assert value > 1e-3 and gradient * theta > 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samplers_in_any_shape(shape):
    noise = torch.randn(3, *shape, dtype=torch.float64)
    y = torch.ones(shape[0], dtype=torch.int64)
    exact = ORACLE.mu + ORACLE.sd * noise[0]
    assert torch.allclose(facm.sample(OracleNet(), noise, None, nfe=1), exact)
    flat = facm.sample(OracleNet(), noise.flatten(2), None, nfe=3).reshape(shape)
    assert torch.equal(facm.sample(OracleNet(), noise, None, nfe=3), flat)
    for options in (dict(), dict(w=2.0, y_null=Y_NULL), dict(condition="auxiliary")):
        net = OracleNet(options.get("condition", "expanded"))
        assert (facm.sample_euler(net, noise, y, nfe=100, **options) - exact).abs().mean() < 0.01
