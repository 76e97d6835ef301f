"""facm.py against closed forms: the Gaussian oracle, mutants of the source, EMA, samplers, derivatives."""

import math
import pathlib

import pytest
import torch
from oracle import Gaussian, fused, mutant

import decm
import facm
import run
from jvp import JVP, forward_mode

SOURCE = pathlib.Path(facm.__file__).read_text()
ORACLE = Gaussian()
Y_NULL = 0


class OracleNet:
    """The ideal FACM network: the average velocity to t=1 under c_CM, the velocity under c_FM."""

    num_classes = 0

    def __init__(self, second_time, teacher=False):
        self.second_time, self.teacher, self.passes, self.samples = second_time, teacher, 0, 0

    def __call__(self, x, t, s=None, y=None):
        self.passes += 1
        self.samples += len(x)
        if self.teacher:
            return ORACLE.velocity(x, t)
        if self.second_time:
            fm, flow_t = s == t, t
        else:
            fm, flow_t = t > 1, torch.where(t > 1, 2 - t, t)
        # Where one branch is asked for, the other's singularity at t=1 must not leak into its derivative.
        safe = torch.where(fm, torch.full_like(flow_t, 0.5), flow_t)
        cm = ORACLE.average_velocity(x, safe, torch.ones_like(safe))
        return torch.where(ORACLE.expand(fm), ORACLE.velocity(x, flow_t), cm)


def losses(module, condition="expanded", teacher=True, w=1.0, mode="exact", x1=None, x0=None, t=None):
    """L_FM and L_CM of the oracle network, float64."""
    if x1 is None:
        x1, x0, t = ORACLE.draw(64)
    teacher = OracleNet(condition == "auxiliary", teacher=True) if teacher else None
    return module.facm_loss(fused(OracleNet(condition == "auxiliary")), JVP[mode], x1, x0, t, torch.full((len(t),), 1),
                            alpha=torch.ones_like, beta=torch.ones_like, c=1e-3, condition=condition, teacher=teacher,
                            y_null=Y_NULL, w=w, t_low=0.125)


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("condition", ["expanded", "auxiliary"])
def test_oracle_has_zero_residual(condition, mode):
    L_fm, L_cm = losses(facm, condition, mode=mode)
    assert L_fm < 1e-14 and L_cm < 1e-14


def test_oracle_has_zero_residual_with_the_finite_difference():
    L_fm, L_cm = losses(facm, mode="fd")
    assert L_fm < 1e-14 and 0 < L_cm < 1e-6


@pytest.mark.parametrize("old, new, hurt", [
    ("g = F_cm - (v + (1 - t) * dF_dt)", "g = F_cm - (v - (1 - t) * dF_dt)", "cm"),       # sign of (1-t) dF/dt
    ("g = F_cm - (v + (1 - t) * dF_dt)", "g = F_cm - (v + t * dF_dt)", "cm"),             # its factor
    ("*c_cm, y, v, 1, 0", "*c_cm, y, v, -1, 0", "cm"),                                    # time tangent's sign
    ("*c_cm, y, v, 1, 0", "*c_cm, y, v, 0, 0", "cm"),                                     # time tangent left out
    ("*c_cm, y, v, 1, 0", "*c_cm, y, -v, 1, 0", "cm"),                                    # direction of the flow
    ("*c_cm, y, v, 1, 0, (xt, *c_fm, y)", "*c_cm, y, v, 1, 0, (xt, *c_cm, y)", "fm"),     # the anchor's condition
    ("return (t, None), (2 - t, None)", "return (2 - t, None), (t, None)", "both"),       # conditions swapped
    ("return (t, None), (2 - t, None)", "return (t, None), (1 + t, None)", "fm"),         # 2-t misread
    ("return (1 - t) * x0 + t * x1", "return t * x0 + (1 - t) * x1", "none"),             # another point, still exact
])
def test_mutants_are_caught(old, new, hurt):
    for mode in ("exact", "fused"):
        L_fm, L_cm = losses(mutant(SOURCE, old, new), mode=mode)
        assert (L_cm > 1e-2) == (hurt in ("cm", "both"))
        assert (L_fm > 1e-2) == (hurt in ("fm", "both"))


def test_from_scratch_the_target_is_right_on_average():
    """Without a teacher v = x_1 - x_0 is only the mean of the posterior: E[v_tar | x_t] must be F."""
    _, _, t = ORACLE.draw(64)
    xt = ORACLE.mu * ORACLE.expand(t) + torch.randn(64, 2, 3, 3, dtype=torch.float64)
    mean = ORACLE.posterior_mean(xt, t)
    targets = []
    for offset in (-0.1, 0.1):                     # two points of the posterior whose mean is the posterior's
        x1 = mean + offset
        x0 = (xt - ORACLE.expand(t) * x1) / (1 - ORACLE.expand(t))
        net = OracleNet(False)
        v = facm.guided_velocity(net, xt, t, (2 - t, None), torch.ones(64, dtype=torch.int64), y_null=Y_NULL, w=1.0,
                                 t_low=0.125, v_cond=x1 - x0)
        dF_dt = forward_mode(net, xt, t, None, None, v, 1, 0)
        g = net(xt, t) - (v + (1 - ORACLE.expand(t)) * dF_dt)
        targets.append(net(xt, t) - g)
    assert (sum(targets) / 2 - net(xt, t)).abs().max() < 1e-12
    assert (targets[0] - net(xt, t)).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", [True, False])
def test_guidance_costs_one_evaluation_more_and_none_when_off(teacher):
    x1, x0, t = ORACLE.draw(8)
    y = torch.ones(8, dtype=torch.int64)
    for w, extra in ((1.0, 0), (1.75, 1)):
        net = OracleNet(False, teacher=True)
        facm.guided_velocity(net, x1, t, (t, None), y, y_null=Y_NULL, w=w, t_low=0.0,
                             v_cond=None if teacher else x1 - x0)
        assert net.samples == 8 * (teacher + extra) and net.passes <= 1


def test_guidance_extrapolates_from_t_low_on_and_never_for_the_null_label():
    def net(x, t, s, y):
        return torch.ones_like(x) * ORACLE.expand(y.double())          # velocity = label; null label 0
    t = torch.tensor([0.1, 0.125, 0.5, 0.5], dtype=torch.float64)
    y = torch.tensor([3, 3, 3, 0])
    x = torch.zeros(4, 2, 3, 3, dtype=torch.float64)
    v = facm.guided_velocity(net, x, t, (t, None), y, y_null=0, w=1.75, t_low=0.125)
    assert v[:, 0, 0, 0].tolist() == [3, 5.25, 5.25, 0]                # w * 3 = 5.25 where guided
    v = facm.guided_velocity(net, x, t, (t, None), y, y_null=0, w=1.75, t_low=0.125, v_cond=x + 2)
    assert v[:, 0, 0, 0].tolist() == [2, 3.5, 3.5, 2]


def test_relaxation_and_clamp():
    """Eq. 13: v_tar = (1-alpha) F + alpha T(F), as long as |F - T(F)| <= 1; beyond, the step is alpha."""
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


def test_weights():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert facm.WEIGHTS["1"](t, 0.5).tolist() == [1, 1, 1]
    assert torch.allclose(facm.WEIGHTS["1-t^p"](t, 0.5), torch.tensor([1, 0.5, 0]))
    assert torch.allclose(facm.WEIGHTS["cos"](t, 0.5), torch.tensor([1, math.cos(math.pi / 8), 0]), atol=1e-7)


def test_sampled_times_follow_eq_20():
    normal = torch.linspace(-3, 3, 7, dtype=torch.float64)
    t = facm.sample_t(normal, -0.8, 1.6)
    assert torch.allclose(torch.log(torch.tan((1 - t) * math.pi / 2)), -0.8 + 1.6 * normal)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_ema_is_the_power_function_average(sigma_rel):
    gamma = run.ema_gamma(sigma_rel)
    assert math.isclose((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)), sigma_rel ** 2)
    net, ema = torch.nn.Linear(1, 1, bias=False).double(), torch.nn.Linear(1, 1, bias=False).double()
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    for k, value in enumerate(values, 1):
        net.weight.data.fill_(value)
        run.ema_update(ema, net, k, gamma)
    edges = (torch.arange(51).double() / 50) ** (gamma + 1)            # weight of step k: k^g+1 - (k-1)^g+1
    assert math.isclose(ema.weight.item(), (values * edges.diff()).sum().item(), rel_tol=1e-12)


@pytest.mark.parametrize("condition", ["expanded", "auxiliary"])
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_sampler_reaches_the_data(nfe, condition):
    """With the exact network every step maps to t=1 exactly: the result is the flow map of the last point."""
    noise = torch.randn(nfe, 16, 2, 3, 3, dtype=torch.float64)
    xt = noise[0]
    for i in range(nfe):
        x1 = ORACLE.flow_map(xt, i / nfe, 1.0) if i else ORACLE.mu + ORACLE.sd * xt
        if i + 1 < nfe:
            xt = (i + 1) / nfe * x1 + (1 - (i + 1) / nfe) * noise[i + 1]
    net = OracleNet(condition == "auxiliary")
    assert torch.allclose(facm.sample(net, noise, None, nfe, condition), x1)
    assert net.passes == nfe


def flow_error(nfe):
    noise = torch.randn(1, 64, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = ORACLE.mu + ORACLE.sd * noise[0]
    y = torch.ones(64, dtype=torch.int64)
    return (facm.sample_euler(OracleNet(False), noise, y, nfe) - exact).abs().mean().item()


def test_euler_converges_at_first_order():
    assert 1.8 < flow_error(20) / flow_error(40) < 2.2


def test_pretraining_mixes_the_two_conditions():
    seen = []

    def net(x, t, s, y):
        seen.append((t, s))
        return ORACLE.velocity(x, t.where(t <= 1, 2 - t))
    x1, x0, t = ORACLE.draw(8)
    mixed = torch.arange(8) < 4
    facm.pretrain_loss(net, x1, x0, t, None, condition="expanded", mixed=mixed)
    facm.pretrain_loss(net, x1, x0, t, None, condition="auxiliary", mixed=mixed)
    assert torch.equal(seen[0][0], torch.where(mixed, 2 - t, t)) and seen[0][1] is None
    assert torch.equal(seen[1][0], t) and torch.equal(seen[1][1], torch.where(mixed, t, torch.ones_like(t)))


@pytest.mark.parametrize("module", [facm, decm], ids=["facm", "decm"])
def test_the_flow_begins_with_noise_and_ends_with_data(module):
    x1, x0 = torch.randn(2, 3, 1, 2, 2)
    xt = module.interpolate(x1, x0, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(xt[0], x0[0]) and torch.allclose(xt[1], 0.75 * x0[1] + 0.25 * x1[1]) and torch.equal(xt[2], x1[2])


def test_pretraining_learns_the_velocity_from_noise_to_data():
    x1, x0, t = *torch.randn(2, 3, 1, 2, 2), torch.tensor([0.2, 0.5, 0.9])

    def net(x, *_):
        assert torch.allclose(x, x0 + t[:, None, None, None] * (x1 - x0), atol=1e-6)
        return x1 - x0

    assert facm.pretrain_loss(net, x1, x0, t, None, condition="expanded", mixed=t > 0.4) == 0
    assert decm.pretrain_loss(net, x1, x0, t, t, None) == 0


def test_alpha_relaxes_the_target_and_beta_weighs_the_loss():
    """With v = dF/dt = 0 the target is (1 - alpha) F, and its gradient alpha beta F / sqrt(e + c)."""
    F = torch.tensor([0.3, -0.2], dtype=torch.float64).reshape(1, 1, 1, 2).requires_grad_()
    zero, t = torch.zeros_like(F), torch.full((1,), 0.5).double()

    def still(net, *inputs):                                           # F and no derivative
        return F, zero, F.detach()
    _, L_cm = facm.facm_loss(None, still, zero, zero, t, None, alpha=lambda t: 0 * t + 0.5, beta=lambda t: 0 * t + 0.25,
                             c=1e-3, teacher=lambda *_: zero)
    root = math.sqrt(0.25 * 0.065 + 1e-3)
    assert math.isclose(L_cm.item(), 0.25 * 0.25 * 0.065 / root)
    L_cm.backward()
    assert torch.allclose(F.grad.flatten(), 0.5 * 0.25 * F.detach().flatten() / root)


def test_a_teacher_with_a_second_time_is_asked_for_the_velocity():
    seen = []

    def teacher(x, t, s, y):
        seen.append((t, s))
        return x

    teacher.second_time = True
    x, t, y = torch.ones(2, 1, 2, 2), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    facm.flow_velocity(None, teacher, x, x, x, t, None, y, y_null=5, w=1.0, t_low=0.0)
    decm.flow_velocity(teacher, x, x, x, t, y, y_null=5, w=1.0)
    assert len(seen) == 2 and all(torch.equal(t, s) for t, s in seen)


def test_ema_with_a_constant_rate():
    ema, net = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * ema.weight + 0.1 * net.weight
    run.ema_update(ema, net, 5, 6.0, 0.9)
    assert torch.allclose(ema.weight, expected)


def test_the_loss_takes_any_callable_without_labels():
    """y = None, a network without attributes, guidance asked for: there is nothing to guide by."""
    x1, x0, t = ORACLE.draw(8)
    options = dict(alpha=torch.ones_like, beta=torch.ones_like)
    plain = facm.facm_loss(lambda x, t, s, y: x * t[:, None, None, None], JVP["fd"], x1, x0, t, None, w=3.0, **options)
    same = facm.facm_loss(lambda x, t, s, y: x * t[:, None, None, None], JVP["fd"], x1, x0, t, None, **options)
    assert plain == same and all(term > 0 for term in plain)
