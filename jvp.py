"""The value of a network and its derivative in a direction: three functions with one signature.

    F, dF = jvp(net, at=(x, t, s, y), along=(dx, dt, ds))
    F, dF, F_other = jvp(net, at=(x, t, s, y), along=(dx, dt, ds), also=(x', t', s', y'))

    net      any callable net(x, t, s, y); `fused` also calls it with tangent=, see with_tangent
    at       the point: x [B, ...] of any shape, t [B], s [B] or None, y [B] int64 or None
    along    the direction: dx like x; dt and ds are numbers or tensors [B]; without s, ds is unused
    also     a second input of net, whose output is F_other
    F        the output of net at the point, with gradient; F_other has a gradient as well
    dF       the derivative of F in the direction, like F, without gradient

    fused    computes F and dF in one pass of net, in which each value has a tangent.
    exact    computes dF by torch.func.jvp, in a separate pass.
    fd       computes dF as a central difference, in one separate pass over both points.

F is computed by a forward pass of net, so DDP and FSDP can handle its gradient. dF has no gradient.
torch.func.jvp does not work with FSDP, and `fused` and `fd` do.
"""

import dataclasses
import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch._C._dynamo import eval_frame
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def in_one_pass(net, *inputs):
    """The outputs of net for several inputs (x, t, s, y), from one pass over all of them, which
    costs less than a pass for each. All inputs need the same batch size, and either all of them
    have an s (or a y) or none has. Returns a tuple with one output [B, ...] for each input."""
    joined = []
    for parts in zip(*inputs):
        joined.append(None if parts[0] is None else torch.cat(parts))
    return net(*joined).chunk(len(inputs))


def _outputs(net, at, also):
    """The output of net at the point or, if `also` is given, at both inputs."""
    if also is None:
        return in_one_pass(net, at)
    return in_one_pass(net, at, also)


def _filled(t, number):
    """A number, or a tensor [B], as a tensor like t [B]."""
    if torch.is_tensor(number):
        return number.to(t).expand_as(t)
    return torch.full_like(t, number)


def _direction(at, along):
    """The direction (dx, dt, ds) as tensors like x, t and s; ds is None if s is."""
    x, t, s, y = at
    dx, dt, ds = along
    if s is None:
        return dx, _filled(t, dt), None
    return dx, _filled(t, dt), _filled(s, ds)


def fused(net, at, along, also=None):
    """F, dF and perhaps F_other (see the top of this file) from one pass of net with tangents.
    A later version of the FACM paper calls such a derivative Chain-JVP.

    net is called as net(x, t, s, y, tangent=(dx, dt, ds)) and has to return (F, dF). The networks
    of models.py can do this, and with_tangent adds it to any other network."""
    value, derivative = net(*at, tangent=_direction(at, along))
    if also is None:
        return value, derivative
    return value, derivative, net(*also)


@torch.no_grad()
def forward_mode(net, at, along):
    """dF by torch.func.jvp; see the top of this file for at and along. Attention uses PyTorch's
    plain implementation, because the fused kernels have no forward mode."""
    x, t, s, y = at
    dx, dt, ds = _direction(at, along)
    if s is None:
        point, direction = (x, t), (dx, dt)
    else:
        point, direction = (x, t, s), (dx, dt, ds)

    def output(x, t, s=None):
        return net(x, t, s, y)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(output, point, direction)[1]


def exact(net, at, along, also=None, derivative=forward_mode):
    """F, dF and perhaps F_other (see the top of this file), with dF by torch.func.jvp.

    derivative(net, at, along) computes dF; `select` passes a compiled forward_mode here. dF is
    computed without the fast path of nn.MultiheadAttention, which has no forward mode."""
    value, *others = _outputs(net, at, also)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return value, derivative(net, at, along), *others
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def fd(net, at, along, also=None, h=5e-3):
    """F, dF and perhaps F_other (see the top of this file), with dF by the central difference of
    step h > 0, whose error is of order h^2. The times t + h and t - h may lie outside [0, 1] by h.
    The pass switches autocast off, because bfloat16 is too coarse for a difference."""
    x, t, s, y = at
    dx, dt, ds = along

    def moved(step):
        moved_s = None if s is None else s + step * ds
        return x + step * dx, t + step * dt, moved_s, y

    value, *others = _outputs(net, at, also)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        ahead, behind = in_one_pass(net, moved(h), moved(-h))
        return value, (ahead - behind) / (2 * h), *others


JVP = {"fused": fused, "exact": exact, "fd": fd}


def select(name, compile=False):
    """JVP[name]. With compile=True the derivative of `exact` is compiled; the network with which it
    is called is compiled already. Raises KeyError for another name."""
    if name == "exact" and compile:
        return functools.partial(exact, derivative=torch.compile(forward_mode))
    return JVP[name]


def with_tangent(net):
    """A callable like net(x, t, s, y) that can also be called with tangent=(dx, dt, ds), and then
    returns (F, dF). A None in tangent is zero.

    Raises NotImplementedError when it is called, if net contains an operation that draws random
    numbers, writes into an argument, or has neither a rule nor a forward mode."""
    def call(x, t, s=None, y=None, tangent=None):
        if tangent is None:
            return net(x, t, s, y)
        h = net(*duals((x, t, s), tangent), y)
        return h.value, h.tangent
    return call


# --------------------------------------------------------------------------------------------------
# Dual: a value with its tangent, which PyTorch's functions accept like a tensor.
#
# An operation on Duals, for example F.silu(dual), is applied in _apply. The value of its result is
# the same operation on the values. The tangent of its result is computed by
#
#   1. the operation itself, applied to the tangent, if it is linear (LINEAR, at the end);
#   2. otherwise a rule, a function that computes the tangent (RULES, at the end);
#   3. otherwise the fallback, torch.func.jvp of this one operation.

def duals(values, tangents):
    """A list with the Dual of each value and its tangent. A tangent of None is zero. Values that
    cannot have a tangent, such as None or a tensor of integers, are not changed."""
    result = []
    for value, tangent in zip(values, tangents):
        if not _is_continuous(value):
            result.append(value)
        elif tangent is None:
            result.append(Dual(value, torch.zeros_like(value)))
        else:
            result.append(Dual(value, tangent))
    return result


def _compiled_only_inside(function):
    """Makes torch.compile compile the function only as a part of the code that calls it. If it were
    compiled separately, torch.compile (2.14) would not notice that func, a method of a tensor, has
    changed, and would repeat the previous operation."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def _operator(function):
    """The method of Dual for an operator of Python, for example x * y."""
    def method(self, *others):
        return _apply(function, self, *others)
    return method


def _reversed(function):
    """The method of Dual for an operator whose left side is not a Dual, for example 1 / x."""
    def method(self, other):
        return _apply(function, other, self)
    return method


@dataclasses.dataclass(eq=False)
class Dual:
    """A tensor and its derivative in some direction, which has the same shape and dtype.

    The functions, methods and operators of PyTorch accept a Dual like a tensor. Parameters and
    other tensors are constants. `x += y` is computed as `x = x + y`, so another view of x does not
    change. Code for torch.compile needs x.sub(y) and x.div(y) for a tensor y, because x - y and
    x / y interrupt its graph."""

    value: torch.Tensor
    tangent: torch.Tensor

    @classmethod
    @_compiled_only_inside
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """PyTorch calls this instead of its function func if a Dual is among the arguments."""
        return _apply(func, *args, **(kwargs or {}))

    def __getattr__(self, name):
        """Python calls this for an attribute that is not defined here, for example x.shape,
        x.T or x.mean."""
        if name in ("shape", "dtype", "device", "ndim"):
            return getattr(self.value, name)
        if name in ("T", "mT", "H", "mH", "real", "imag"):
            return Dual(getattr(self.value, name), getattr(self.tangent, name))
        attribute = getattr(torch.Tensor, name)
        if callable(attribute):
            return functools.partial(_apply, attribute, self)
        return getattr(self.value, name)

    def detach(self):
        """The value, as a constant."""
        return self.value.detach()

    def __len__(self):
        return len(self.value)

    def __bool__(self):
        return bool(self.value)

    def __float__(self):
        return float(self.value)

    def __int__(self):
        return int(self.value)

    def __iter__(self):
        return iter(self.unbind(0))

    __hash__ = object.__hash__             # Python removes it from a class that defines __eq__

    __getitem__ = _operator(operator.getitem)
    __setitem__ = _operator(operator.setitem)
    __neg__ = _operator(operator.neg)
    __pos__ = _operator(operator.pos)
    __abs__ = _operator(operator.abs)

    __add__, __radd__ = _operator(operator.add), _reversed(operator.add)
    __sub__, __rsub__ = _operator(operator.sub), _reversed(operator.sub)
    __mul__, __rmul__ = _operator(operator.mul), _reversed(operator.mul)
    __truediv__, __rtruediv__ = _operator(operator.truediv), _reversed(operator.truediv)
    __floordiv__, __rfloordiv__ = _operator(operator.floordiv), _reversed(operator.floordiv)
    __mod__, __rmod__ = _operator(operator.mod), _reversed(operator.mod)
    __pow__, __rpow__ = _operator(operator.pow), _reversed(operator.pow)
    __matmul__ = _operator(operator.matmul)

    __eq__, __ne__ = _operator(operator.eq), _operator(operator.ne)
    __lt__, __le__ = _operator(operator.lt), _operator(operator.le)
    __gt__, __ge__ = _operator(operator.gt), _operator(operator.ge)


torch.export.register_dataclass(Dual)      # FSDP's hooks search their arguments for tensors


@_compiled_only_inside
def _apply(func, *args, **kwargs):
    """func(*args, **kwargs) with Duals among the arguments. Floating-point tensors in the result
    become Duals; the rest of it, for example indices or a shape, is not changed."""
    name = func.__name__
    if _writes(name, args, kwargs):
        raise NotImplementedError(f"fused: {name}{WRITES}")
    values = {key: _value(argument) for key, argument in kwargs.items()}
    value = func(*[_value(argument) for argument in args], **values)
    if not _is_continuous(value):
        return value
    with torch.no_grad():
        tangent = _tangent_by_rule(func, value, args, kwargs)
        if tangent is NotImplemented:
            return _fall_back(func, value, args, kwargs)
    if isinstance(value, torch.Tensor):
        return Dual(value, tangent)
    return tuple(Dual(part, dpart) for part, dpart in zip(value, tangent))


def _value(argument):
    """The argument, with each Dual replaced by its value, also in a list."""
    if isinstance(argument, Dual):
        return argument.value
    if _moves(argument):
        return [_value(part) for part in argument]
    return argument


def _moves(argument):
    """Whether the argument is a Dual or a list (or tuple) with a Dual in it."""
    if isinstance(argument, (list, tuple)):
        return any(_moves(part) for part in argument)
    return isinstance(argument, Dual)


def _is_continuous(result):
    """Whether the result is a tensor of floating-point (or complex) numbers, or a list (or tuple)
    with such a tensor in it. Nothing else can have a tangent."""
    if isinstance(result, (list, tuple)):
        return any(_is_continuous(part) for part in result)
    if not isinstance(result, torch.Tensor):
        return False
    return result.is_floating_point() or result.is_complex()


def _writes(name, args, kwargs):
    """Whether a function writes into an argument: PyTorch gives such a function a name that ends
    in an underscore, or it has an argument inplace or out. Batch normalisation in train mode
    updates its running statistics, args[1] and args[2]."""
    if kwargs.get("inplace", False) or kwargs.get("out") is not None:
        return True
    if name in LINEAR or name in RULES:
        return False
    if name == "batch_norm":
        return kwargs.get("training", False) and args[1] is not None
    if name in ("setitem", "__setitem__"):
        return True
    return name[-1] == "_" and name[-2:] != "__"


def _only_the_first_moves(args, kwargs):
    """Whether the first argument is a Dual (or a list with Duals), and no other argument is."""
    if not args or not _moves(args[0]):
        return False
    others = [*args[1:], *kwargs.values()]
    return not any(_moves(argument) for argument in others)


def _tangent_by_rule(func, value, args, kwargs):
    """The tangent of value = func(*args, **kwargs), or NotImplemented if no rule covers it."""
    name = func.__name__
    if name in LINEAR and _only_the_first_moves(args, kwargs):
        return func(_tangent(args[0]), *args[1:], **kwargs)
    if name in RULES:
        return RULES[name](value, *args, **kwargs)
    return NotImplemented


def _tangent(argument):
    """The tangent of a Dual, or of each tensor in a list. It is zero for a tensor that is not a
    Dual."""
    if isinstance(argument, Dual):
        return argument.tangent
    if isinstance(argument, torch.Tensor):
        return torch.zeros_like(argument)
    return [_tangent(part) for part in argument]


# --------------------------------------------------------------------------------------------------
# The fallback for an operation without a rule.

WRITES = (" writes into an argument, whose tangent would be wrong; compute a new tensor instead "
          "(x = x + y, inplace=False, eval mode of BatchNorm), or use exact or fd")
DRAWS = (" draws random numbers, and the value and its tangent need the same ones; use eval mode, "
         "or draw them from a seed as models.Dropout does")
NO_FORWARD_MODE = (" has neither a rule in jvp.RULES nor a forward mode in PyTorch; add a rule, "
                   "or use fd")


def _fall_back(func, value, args, kwargs):
    """The result with its tangents, where value = func(*args, **kwargs). torch.func.jvp computes
    func of the values a second time, with their tangents."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="the fallback of jvp.py is not compiled")
    arguments, structure = tree_flatten((args, kwargs), is_leaf=lambda a: isinstance(a, Dual))
    moving = [argument for argument in arguments if isinstance(argument, Dual)]

    def continuous_outputs(*values):
        """The outputs of func that have a tangent, with each Dual replaced by its value."""
        remaining = iter(values)
        given = [next(remaining) if isinstance(a, Dual) else a for a in arguments]
        args, kwargs = tree_unflatten(given, structure)
        return tuple(a for a in tree_leaves(func(*args, **kwargs)) if _is_continuous(a))

    point = tuple(dual.value for dual in moving)
    direction = tuple(dual.tangent for dual in moving)
    try:
        with sdpa_kernel(SDPBackend.MATH), _Watch(func.__name__, arguments):
            tangents = torch.func.jvp(continuous_outputs, point, direction)[1]
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        raise NotImplementedError(f"fused: {func.__name__}{NO_FORWARD_MODE}") from None

    parts, structure = tree_flatten(value)
    remaining = iter(tangents)
    parts = [Dual(part, next(remaining)) if _is_continuous(part) else part for part in parts]
    return tree_unflatten(parts, structure)


class _Watch(TorchDispatchMode):
    """While this mode is active, PyTorch passes every basic operation to __torch_dispatch__, which
    raises NotImplementedError for an operation that draws random numbers, or that writes into an
    argument of the function `name`."""

    def __init__(self, name, arguments):
        super().__init__()
        self.name = name
        self.storages = {_storage(_value(argument)) for argument in arguments}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotImplementedError(f"fused: {self.name}{DRAWS}")
        for described, argument in zip(func._schema.arguments, args):
            if described.is_write and _storage(argument) in self.storages:
                raise NotImplementedError(f"fused: {self.name}{WRITES}")
        # PyTorch crashes if one of its "zero tensors", the tangents of constants, is scaled here
        args = [torch.zeros(a.shape, dtype=a.dtype, device=a.device)
                if isinstance(a, torch.Tensor) and a._is_zerotensor() else a for a in args]
        return func(*args, **(kwargs or {}))


def _storage(argument):
    """An identifier of a tensor's memory, which is the same for all views of it. A new object for
    anything else."""
    if isinstance(argument, torch.Tensor):
        return argument.untyped_storage()._cdata
    return object()


# --------------------------------------------------------------------------------------------------
# The rules. A rule for y = f(a, b, ...) is called as rule(y, a, b, ...) with the arguments of f,
# some of which are Duals. It returns the tangent of y, or NotImplemented for arguments that it does
# not cover, and then the fallback is used. Rules exist because they save time: the fallback
# computes f a second time.

def _of_one(rule):
    """A rule for functions of one Dual, their first argument: rule(y, x, dx, ...) computes the
    tangent from x and its tangent dx."""
    def rule_of_duals(y, *args, **kwargs):
        if not _only_the_first_moves(args, kwargs):
            return NotImplemented
        x, *others = args
        return rule(y, x.value, x.tangent, *others, **kwargs)
    return rule_of_duals


def _without_bias(func):
    """The rule for func(x, weight, bias, ...), which is linear in x, apart from the bias."""
    def rule(y, x, dx, weight, bias=None, *sizes, **options):
        return func(dx, weight, None, *sizes, **options)
    return _of_one(rule)


# Sums and products, in which any argument may be a Dual. The parameters of these rules have
# PyTorch's names, so that they can be given by keyword.

def _add(y, input, other, alpha=1):
    """d(a + alpha b) = da + alpha db."""
    if isinstance(input, Dual) and isinstance(other, Dual):
        return torch.add(input.tangent, other.tangent, alpha=alpha)
    tangent = input.tangent if isinstance(input, Dual) else alpha * other.tangent
    return tangent.to(y.dtype).expand(y.shape)


def _sub(y, input, other, alpha=1):
    """d(a - alpha b) = da - alpha db."""
    return _add(y, input, other, alpha=-alpha)


def _mul(y, input, other):
    """d(a b) = da b + a db."""
    if not isinstance(other, Dual):
        return input.tangent * other
    if not isinstance(input, Dual):
        return input * other.tangent
    return torch.addcmul(input.tangent * other.value, input.value, other.tangent)


def _div(y, input, other, rounding_mode=None):
    """d(a / b) = (da - y db) / b."""
    if rounding_mode is not None:
        return NotImplemented
    if not isinstance(other, Dual):
        return input.tangent / other
    if not isinstance(input, Dual):
        return -y * other.tangent / other.value
    return (input.tangent - y * other.tangent) / other.value


def _addcmul(y, input, tensor1, tensor2, value=1):
    """d(c + a b) = dc + da b + a db."""
    if value != 1 or not _moves([tensor1, tensor2]):
        return NotImplemented
    product = _mul(y, tensor1, tensor2)
    if isinstance(input, Dual):
        return product + input.tangent
    return product.expand(y.shape)


def _matmul(y, input, other):
    """d(a @ b) = da @ b + a @ db."""
    if not isinstance(other, Dual):
        return input.tangent @ other
    if not isinstance(input, Dual):
        return input @ other.tangent
    return (input.tangent @ other.value).add_(input.value @ other.tangent)


def _bmm(y, input, mat2):
    """The same for matrices [B, ., .]."""
    return _matmul(y, input, mat2)


# Functions of each element.

def _pow(y, x, dx, exponent):
    """dy = n x^(n-1) dx."""
    if not isinstance(exponent, (int, float)) or exponent == 0:
        return NotImplemented
    return exponent * x ** (exponent - 1) * dx


def _square(y, x, dx):
    """dy = 2 x dx."""
    return (x * dx).mul_(2)


def _rsqrt(y, x, dx):
    """dy = -dx / (2 x^(3/2))."""
    return -0.5 * y ** 3 * dx


def _exp(y, x, dx):
    """dy = y dx."""
    return y * dx


def _log(y, x, dx):
    """dy = dx / x."""
    return dx / x.to(y.dtype)


def _sin(y, x, dx):
    """dy = cos(x) dx."""
    return x.cos() * dx


def _cos(y, x, dx):
    """dy = -sin(x) dx."""
    return -x.sin() * dx


def _tanh(y, x, dx):
    """dy = (1 - y^2) dx."""
    return (1 - y ** 2) * dx


def _sigmoid(y, x, dx):
    """dy = y (1 - y) dx."""
    return y * (1 - y) * dx


def _abs(y, x, dx):
    """dy = sign(x) dx, for real x."""
    if x.is_complex():
        return NotImplemented
    return x.sign() * dx


def _clamp(y, x, dx, min=None, max=None):
    """dy is dx between the bounds, and 0 beyond them."""
    if min is None or max is None:
        return NotImplemented
    return torch.where((min <= x) & (x <= max), dx, 0)


def _relu(y, x, dx, inplace=False):
    """dy is dx where y > 0, else 0. The Jacobian of an elementwise function is diagonal, so
    PyTorch's function for the backward pass also computes dy."""
    return torch.ops.aten.threshold_backward(dx, y, 0)


def _silu(y, x, dx, inplace=False):
    """Uses the function for the backward pass, as for ReLU."""
    return torch.ops.aten.silu_backward(dx, x)


def _gelu(y, x, dx, approximate="none"):
    """Uses the function for the backward pass, as for ReLU."""
    return torch.ops.aten.gelu_backward(dx, x, approximate=approximate)


def _dropout(y, x, dx, p=0.5, training=True, inplace=False):
    """In eval mode, and at the rate 0, dropout is the identity. Otherwise the fallback raises an
    error."""
    if training and p > 0:
        return NotImplemented
    return dx


# Functions of several elements.

def _pad(y, x, dx, pad, mode="constant", value=None):
    """A constant border has the tangent zero."""
    return F.pad(dx, pad, mode)


def _vector_norm(y, x, dx, ord=2, dim=None, keepdim=False, dtype=None):
    """The Euclidean norm: dy = sum(x dx) / y."""
    if ord != 2 or dim is None or dtype is not None or x.is_complex():
        return NotImplemented
    return (x * dx).sum(dim, keepdim) / y.clamp(min=1e-30)


def _softmax(y, x, dx, dim=None, dtype=None, _stacklevel=3):
    """dy = y (dx - sum(y dx))."""
    if dim is None or dtype is not None:
        return NotImplemented
    product = y * dx
    return product - y * product.sum(dim, keepdim=True)


def _normalise(y, x, dx, mean, eps):
    """The tangent of y = (x - mean(x)) / sigma with sigma^2 = mean((x - mean(x))^2) + eps, which is
    dy = (dx - mean(dx) - y mean(y dx)) / sigma. The function mean(a) returns the mean of a over
    each part that is normalised."""
    x, dx = x.to(y.dtype), dx.to(y.dtype)
    sigma = (mean((x - mean(x)).square_()) + eps).sqrt()
    centred = dx - mean(dx)
    return centred.addcmul_(y, mean(y * dx), value=-1).div_(sigma)


def _layer_norm(y, x, dx, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    """See _normalise; the parts extend over the last dimensions, normalized_shape."""
    last = tuple(range(-len(normalized_shape), 0))

    def mean(a):
        return a.mean(last, keepdim=True)

    if weight is None and bias is None:
        return _normalise(y, x, dx, mean, eps)
    plain = F.layer_norm(x, normalized_shape, eps=eps)
    tangent = _normalise(plain, x, dx, mean, eps)
    return tangent if weight is None else tangent * weight


def _rms_norm(y, x, dx, normalized_shape, weight=None, eps=None):
    """y = w x / r with r^2 = mean(x^2) + eps: dy = w (dx - x mean(x dx) / r^2) / r."""
    last = tuple(range(-len(normalized_shape), 0))
    if eps is None:                        # PyTorch computes in float32 at least
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    x, dx = x.to(y.dtype), dx.to(y.dtype)
    square = x.square().mean(last, keepdim=True) + eps
    tangent = (dx - x * (x * dx).mean(last, keepdim=True) / square) * square.rsqrt()
    return tangent if weight is None else tangent * weight


def _group_norm(y, x, dx, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    """See _normalise; each part is one group of channels of a sample, x being [B, C, ...]."""
    ones = [1] * (x.dim() - 2)             # as many as there are dimensions after the channels

    def mean(a):
        """The mean of each group, once for each of its channels: [B, C, 1, ...]."""
        if a.dim() > 2:
            a = a.mean(dim=tuple(range(2, a.dim())))                   # [B, C]
        means = a.unflatten(1, (num_groups, -1))                       # [B, groups, C / groups]
        return means.mean(2, keepdim=True).expand_as(means).reshape(*a.shape, *ones)

    if weight is None and bias is None:
        return _normalise(y, x, dx, mean, eps)
    plain = F.group_norm(x, num_groups, eps=eps)
    tangent = _normalise(plain, x, dx, mean, eps)
    return tangent if weight is None else tangent * weight.view(-1, *ones)


def _attention(y, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
               enable_gqa=False):
    """y = P v with the weights P = softmax(S), S = q k^T / sqrt(d). Therefore
    dy = (P dS) v - rowsum(P dS) y + P dv. The weights P are computed only here, because fused
    attention computes the value without them. A q, k or v that is not a Dual is a constant."""
    if attn_mask is not None or dropout_p > 0 or is_causal or scale is not None or enable_gqa:
        return NotImplemented
    keys = key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    P = (_value(query) @ _value(keys)).softmax(dim=-1)
    if not _moves([query, keys]):
        return (P @ value.tangent).to(y.dtype)
    P_dS = _matmul(y, query, keys).mul_(P)
    tangent = P_dS @ _value(value)
    if isinstance(value, Dual):
        tangent.add_(P @ value.tangent)
    return tangent.sub_(P_dS.sum(-1, keepdim=True) * y).to(y.dtype)


# The functions that are linear in their first argument: the tangent of the result is the same
# function of the tangent.
LINEAR = {
    "neg", "sum", "mean", "avg_pool2d", "interpolate",
    "to", "type_as", "float", "double", "clone", "contiguous",
    "cat", "stack", "chunk", "split", "unbind", "getitem", "narrow",
    "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze",
    "permute", "transpose", "expand", "repeat", "tile"}

# {name of a function: its rule}. A script may add rules for the operations of its network.
RULES = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "truediv": _div,
    "addcmul": _addcmul,
    "matmul": _matmul,
    "bmm": _bmm,
    "pow": _of_one(_pow),
    "square": _of_one(_square),
    "rsqrt": _of_one(_rsqrt),
    "exp": _of_one(_exp),
    "log": _of_one(_log),
    "sin": _of_one(_sin),
    "cos": _of_one(_cos),
    "tanh": _of_one(_tanh),
    "sigmoid": _of_one(_sigmoid),
    "abs": _of_one(_abs),
    "clamp": _of_one(_clamp),
    "relu": _of_one(_relu),
    "silu": _of_one(_silu),
    "gelu": _of_one(_gelu),
    "dropout": _of_one(_dropout),
    "pad": _of_one(_pad),
    "linear": _without_bias(F.linear),
    "conv1d": _without_bias(F.conv1d),
    "conv2d": _without_bias(F.conv2d),
    "conv3d": _without_bias(F.conv3d),
    "conv_transpose2d": _without_bias(F.conv_transpose2d),
    "linalg_vector_norm": _of_one(_vector_norm),
    "softmax": _of_one(_softmax),
    "layer_norm": _of_one(_layer_norm),
    "rms_norm": _of_one(_rms_norm),
    "group_norm": _of_one(_group_norm),
    "scaled_dot_product_attention": _attention}
