"""The derivative of a network in a direction, beside its value: three ways with one signature.

    F, dF, *outputs = jvp(net, x, t, s, y, dx, dt, ds, *others)

    net           any callable net(x, t, s, y) -> [B, C, H, W]; `fused` also wants tangent=
    x, t, s, y    [B, C, H, W], [B], [B] or None, [B] or None
    dx, dt, ds    the direction: dx [B, C, H, W]; dt and ds are numbers
    F, dF         net's output, with gradient, and its derivative in the direction, without
    others        more inputs (x, t, s, y) of net; their outputs follow, with gradient

    fused   F and dF come from one pass of net, which carries a tangent beside each value
    exact   dF comes from torch.func.jvp, in a pass of its own
    fd      dF is a central difference, in two passes of its own

F goes through net's own forward pass, so DDP and FSDP see it. dF never has a graph: DDP wants
nothing averaged for it, and its passes may go through DDP, too. FSDP wants `fused` or `fd`.
A network of your own takes `tangent=` after net = with_tangent(net).
"""

import dataclasses
import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def in_one_pass(net, *inputs):
    """The outputs of net for several inputs (x, t, s, y), from one pass, which costs less."""
    joined = [None if part[0] is None else torch.cat(part) for part in zip(*inputs)]
    return net(*joined).chunk(len(inputs))


def fused(net, x, t, s, y, dx, dt, ds, *others):
    """Value and derivative from one pass (FACM's later version calls it Chain-JVP)."""
    tangent = dx, torch.full_like(t, dt), None if s is None else torch.full_like(s, ds)
    return *net(x, t, s, y, tangent=tangent), *(net(*inputs) for inputs in others)


@torch.no_grad()
def forward_mode(net, x, t, s, y, dx, dt, ds):
    """The derivative alone, by PyTorch's forward mode, which no fused attention has."""
    point, tangent = (x, t), (dx, torch.full_like(t, dt))
    if s is not None:
        point, tangent = (*point, s), (*tangent, torch.full_like(s, ds))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda x, t, s=None: net(x, t, s, y), point, tangent)[1]


def exact(net, x, t, s, y, dx, dt, ds, *others, derivative=forward_mode):
    """The derivative by torch.func.jvp."""
    value, *outputs = in_one_pass(net, (x, t, s, y), *others)
    return value, derivative(net, x, t, s, y, dx, dt, ds), *outputs


def fd(net, x, t, s, y, dx, dt, ds, *others, h=5e-3):
    """The derivative by a central difference, with an error of order h^2."""
    value, *outputs = in_one_pass(net, (x, t, s, y), *others)
    ends = [(x + e * dx, t + e * dt, None if s is None else s + e * ds, y) for e in (h, -h)]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):    # bfloat16 is too coarse
        ahead, behind = in_one_pass(net, *ends)
        return value, (ahead - behind) / (2 * h), *outputs


JVP = {"fused": fused, "exact": exact, "fd": fd}


def select(name, compile=False):
    """JVP[name]; with compile the derivative of `exact` is compiled, as the network is already."""
    if name == "exact" and compile:
        return functools.partial(exact, derivative=torch.compile(forward_mode))
    return JVP[name]


def with_tangent(net):
    """net(x, t, s, y), any callable, as one that takes tangent=(dx, dt, ds), too: then it returns
    (F, dF). A None in it is no motion. NotImplementedError names an operation without a rule."""
    def call(x, t, s=None, y=None, tangent=None):
        if tangent is None:
            return net(x, t, s, y)
        h = net(*duals((x, t, s), tangent), y)
        return h.value, h.tangent
    return call


# --------------------------------------------------------------------------------------------------
# Dual: a value with its tangent, which PyTorch's functions take for a tensor.

def duals(values, tangents):
    """Each value with its tangent: None has none, and a tangent of None is zero."""
    return [x if x is None else Dual(x, torch.zeros_like(x) if dx is None else dx)
            for x, dx in zip(values, tangents)]


def _apply(func, *args, **kwargs):
    """func of Duals: the value by func itself, the tangent by its rule, which keeps no gradient."""
    value, name = func(*_part(args, "value"), **kwargs), func.__name__
    if not isinstance(value, (torch.Tensor, list, tuple)) or isinstance(value, torch.Size):
        return value                       # a size or another property
    if name not in RULES and name not in LINEAR:
        raise NotImplementedError(f"fused: there is no rule for the tangent of {name}; add one to "
                                  "jvp.RULES, or take exact or fd")
    with torch.no_grad():
        tangent = (func(*_part(args, "tangent"), **kwargs) if name in LINEAR else
                   RULES[name](value, *args, **kwargs))
    if isinstance(value, (list, tuple)):
        return [Dual(*pair) for pair in zip(value, tangent)]
    return Dual(value, tangent)


def _part(args, name):
    """args with the value or the tangent in place of every Dual, in lists, too. A tensor has the
    tangent zero beside Duals in a list."""
    def part(a):
        if isinstance(a, (list, tuple)) and any(isinstance(d, Dual) for d in a):
            zero = name == "tangent"
            return [part(d) if isinstance(d, Dual) or not zero else torch.zeros_like(d) for d in a]
        return getattr(a, name) if isinstance(a, Dual) else a
    return [part(a) for a in args]


def _operator(func):
    return lambda self, *other: _apply(func, self, *other)


@dataclasses.dataclass
class Dual:
    """A tensor and its derivative in some direction, of the same shape and dtype. PyTorch's
    functions, methods and operators take it for a tensor, if there is a rule for them below; a
    parameter or another tensor beside it is a constant. torch.compile wants dual.sub(tensor) and
    dual.div(tensor) in place of the operators."""

    value: torch.Tensor
    tangent: torch.Tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _apply(func, *args, **(kwargs or {}))

    def __getattr__(self, name):
        if name in ("shape", "dtype", "device", "ndim"):
            return getattr(self.value, name)
        return functools.partial(_apply, getattr(torch.Tensor, name), self)

    __add__ = __radd__ = _operator(operator.add)
    __mul__ = __rmul__ = _operator(operator.mul)
    __sub__, __truediv__ = _operator(operator.sub), _operator(operator.truediv)
    __pow__, __neg__ = _operator(operator.pow), _operator(operator.neg)
    __getitem__, __matmul__ = _operator(operator.getitem), _operator(operator.matmul)

    def __rsub__(self, other):
        return -self + other

    def detach(self):
        """The value alone, a constant."""
        return self.value.detach()


torch.export.register_dataclass(Dual)      # FSDP's hooks look for the tensors in what they get

# Linear functions: the result's tangent is the same function of the tangent.
LINEAR = set("""avg_pool2d cat chunk clone contiguous double expand flatten float getitem
                interpolate mean narrow neg pad permute repeat reshape split squeeze stack sum tile
                to transpose unbind unflatten unsqueeze view""".split())


def _add(y, a, b, sign=1):
    if isinstance(a, Dual) and isinstance(b, Dual):
        return torch.add(a.tangent, b.tangent, alpha=sign)
    tangent = a.tangent if isinstance(a, Dual) else sign * b.tangent
    return tangent.to(y.dtype).expand(y.shape)


def _mul(y, a, b):
    if not isinstance(a, Dual):
        return a * b.tangent
    if not isinstance(b, Dual):
        return a.tangent * b
    return torch.addcmul(a.tangent * b.value, a.value, b.tangent)


def _matmul(y, a, b):
    parts = [a.tangent @ getattr(b, "value", b)] if isinstance(a, Dual) else []
    return sum(parts + ([getattr(a, "value", a) @ b.tangent] if isinstance(b, Dual) else []))


def _div(y, a, b):
    return (a.tangent - y * b.tangent) / b.value if isinstance(b, Dual) else a.tangent / b


def _addcmul(y, c, a, b):
    product = _mul(y, a, b)
    return product.add_(c.tangent) if isinstance(c, Dual) else product


def _normalise(y, x, mean, eps):
    """y = (x - mean(x)) / sigma, sigma^2 = var(x) + eps; mean(a): that of each group."""
    value, tangent = x.value.to(y.dtype), x.tangent.to(y.dtype)
    sigma = (mean((value - mean(value)).square_()) + eps).sqrt()
    centred = tangent - mean(tangent)
    return centred.addcmul_(y, mean(y * tangent), value=-1).div_(sigma)


def _layer_norm(y, x, shape, weight=None, bias=None, eps=1e-5):
    y = y if weight is None else F.layer_norm(x.value, shape, eps=eps)
    tangent = _normalise(y, x, lambda a: a.mean(tuple(range(-len(shape), 0)), keepdim=True), eps)
    return tangent if weight is None else tangent * weight


def _group_norm(y, x, groups, weight=None, bias=None, eps=1e-5):
    def mean(a):                                                       # [B, C, 1, 1]
        means = a.mean(dim=(2, 3)).unflatten(1, (groups, -1))
        return means.mean(2, keepdim=True).expand_as(means).flatten(1)[:, :, None, None]

    y = y if weight is None else F.group_norm(x.value, groups, eps=eps)
    tangent = _normalise(y, x, mean, eps)
    return tangent if weight is None else tangent * weight[:, None, None]


def _softmax(y, x, dim=-1, **_):
    product = y * x.tangent
    return product - y * product.sum(dim, keepdim=True)


def _attention(y, q, k, v):
    """y = P v, P = softmax(S), S = q k^T / sqrt(d): dy = (P dS) v - rowsum(P dS) y + P dv. Only
    here the weights P are formed; the value's fused attention does without."""
    (q, dq), (k, dk), (v, dv) = ((a.value, a.tangent) for a in (q, k, v))
    k, dk = (a.transpose(-1, -2) / math.sqrt(q.shape[-1]) for a in (k, dk))
    P = (q @ k).softmax(dim=-1)
    P_dS = (dq @ k).add_(q @ dk).mul_(P)
    return (P_dS @ v).add_(P @ dv).sub_(P_dS.sum(-1, keepdim=True) * y).to(y.dtype)


# {name of f: the tangent of y = f(x, ...), given y and the arguments of f}. A function of each
# element alone has a diagonal Jacobian, so its backward pass gives the tangent, too.
RULES = dict(
    add=_add, sub=lambda y, a, b: _add(y, a, b, sign=-1), mul=_mul, div=_div, truediv=_div,
    matmul=_matmul, bmm=_matmul, addcmul=_addcmul,
    pow=lambda y, x, n: n * x.value ** (n - 1) * x.tangent,
    square=lambda y, x: (x.value * x.tangent).mul_(2),
    sqrt=lambda y, x: x.tangent / (2 * y),
    rsqrt=lambda y, x: -0.5 * y ** 3 * x.tangent,
    log=lambda y, x: x.tangent / x.value,
    exp=lambda y, x: y * x.tangent,
    expm1=lambda y, x: (y + 1) * x.tangent,
    sin=lambda y, x: x.value.cos() * x.tangent,
    cos=lambda y, x: -x.value.sin() * x.tangent,
    tanh=lambda y, x: (1 - y ** 2) * x.tangent,
    sigmoid=lambda y, x: y * (1 - y) * x.tangent,
    abs=lambda y, x: x.value.sign() * x.tangent,
    clamp=lambda y, x, low, high: torch.where(
        (low <= x.value) & (x.value <= high), x.tangent, 0),
    relu=lambda y, x, inplace=False: torch.where(y > 0, x.tangent, 0),
    silu=lambda y, x, inplace=False: torch.ops.aten.silu_backward(x.tangent, x.value),
    gelu=lambda y, x, approximate="none": torch.ops.aten.gelu_backward(
        x.tangent, x.value, approximate=approximate),
    linear=lambda y, x, w, b=None: F.linear(x.tangent, w),
    conv2d=lambda y, x, w, b=None, *size, **sizes: F.conv2d(x.tangent, w, None, *size, **sizes),
    conv_transpose2d=lambda y, x, w, **sizes: F.conv_transpose2d(x.tangent, w, **sizes),
    linalg_vector_norm=lambda y, x, dim, keepdim: (
        x.value * x.tangent).sum(dim, keepdim) / y.clamp(min=1e-30),
    softmax=_softmax, layer_norm=_layer_norm, group_norm=_group_norm,
    scaled_dot_product_attention=_attention)
