"""Tests of jvp.py. Value and derivative from one pass are compared with torch.func.jvp for the networks of models.py,
wrapped networks, single operations and networks from elsewhere. Mutants of the source and refused operations are
tested as well."""

import copy
import os
import pathlib
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from oracle import mutant
from test_models import SMALL, VARIANTS, inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import jvp
import models
from jvp import JVP, Dual, exact, fd, select, with_tangent

SOURCE = pathlib.Path(jvp.__file__).read_text()
EVERYTHING = [*VARIANTS, dict(adaptive_scale=True, pixelnorm=True), dict(augment_dim=3, num_classes=4, blocks=2, mult=(1, 2, 2)), dict(name="NCSN++", adaptive_scale=True),
              dict(name="DiT", swiglu=True, rope=True, qknorm=True, wo_shift=True, learn_sigma=True),
              dict(name="DiT", rmsnorm=True, pixelnorm=True, prediction="noise", second_time=True)]


def build(options, dtype=torch.float32):
    """A small network without zero parameters, its inputs (x, t, s, y), and a direction (dx, dt, ds)."""
    torch.manual_seed(0)
    net = models.create(**(SMALL[options.get("name", "DDPM++")] | options)).to(dtype)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    x, t, s, y, dx = inputs(net, dtype=dtype)
    ds = None if s is None else torch.tensor([0.3, -1.0, 0.0], dtype=dtype)
    return net, (x, t, s, y), (dx, torch.tensor([1.0, 0.5, -0.7], dtype=dtype), ds)


def reference(net, args, direction, *more):
    """Value and derivative from PyTorch's forward mode, with dropout of seed 1."""
    moving = [i for i in range(3) if args[i] is not None and direction[i] is not None]

    def f(*moved):
        where = dict(zip(moving, moved))
        return net(*(where.get(i, a) for i, a in enumerate(args)), *more)

    models.seed_dropout(net, 1, rows=3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(f, tuple(args[i] for i in moving), tuple(direction[i] for i in moving))


def fused(net, args, direction, *more):
    models.seed_dropout(net, 1, rows=3)
    return net(*args, *more, tangent=direction)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("options", EVERYTHING, ids=str)
def test_value_derivative_and_gradient(options):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        net, args, direction = build(options, dtype)
        more = [torch.ones(3, 3, dtype=dtype)] if "augment_dim" in options else []
        value, tangent = fused(net, args, direction, *more)
        expected = reference(net, args, direction, *more)
        assert error(value, expected[0]) < bound and error(tangent, expected[1]) < bound
        assert tangent.dtype == dtype and not tangent.requires_grad
    models.seed_dropout(net, 1, rows=3)
    plain = net(*args, *more)
    assert torch.equal(value, plain)                                       # with the same dropout mask
    pairs = zip(gradients(net, value.square().sum()), gradients(net, plain.square().sum()), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["NCSN++", "LightningDiT"])
def test_none_is_no_motion(name):
    net, args, (dx, dt, ds) = build(dict(name=name, second_time=True), torch.float64)
    for direction in ((dx, dt, None), (dx, None, ds), (None, dt, ds)):
        assert error(fused(net, args, direction)[1], reference(net, args, direction)[1]) < 1e-11


@pytest.mark.parametrize("old, new, options", [
    (".sub_(P_dS.sum(-1, keepdim=True) * y)", "", {}),                                     # softmax's normalisation
    (".sub_(P_dS.sum(-1, keepdim=True) * y)", "", dict(name="DiT")),
    (".add_(input.value @ other.tangent)", "", {}), ("tangent.add_(P @ value.tangent)", "pass", dict(name="DiT")),
    ("centred = dx - mean(dx)", "centred = dx.clone()", {}),                               # the mean of a group
    ("centred.addcmul_(y, mean(y * dx), value=-1)", "centred", {}),                        # its variance
    ("centred.addcmul_(y, mean(y * dx), value=-1)", "centred", dict(name="DiT")),
    ("torch.addcmul(input.tangent * other.value, input.value, other.tangent)", "input.tangent * other.value", dict(name="DiT")),
    ("return product + input.tangent", "return product", dict(adaptive_scale=True)),
    ("return -0.5 * y ** 3 * dx", "return 0.5 * y ** 3 * dx", dict(name="LightningDiT")),
    ("func(dx, weight, None, *sizes", "func(dx, weight, bias, *sizes", dict(name="DiT")),
    ("func(dx, weight, None, *sizes", "func(dx, weight, bias, *sizes", dict(sigma_data=None)),
    ("(input.tangent - y * other.tangent)", "(input.tangent + y * other.tangent)", {}),
    (".sum(dim, keepdim) / y.clamp(min=1e-30)", ".sum(dim, keepdim)", dict(name="EDM2"))])
def test_mutants_are_caught(monkeypatch, old, new, options):
    monkeypatch.setattr(models, "duals", mutant(SOURCE, old, new).duals)
    net, args, direction = build(options, torch.float64)
    assert error(fused(net, args, direction)[1], reference(net, args, direction)[1]) > 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_leaves_the_time_path_alone(name):
    net, args, direction = build(dict(name=name, num_classes=4, second_time=True))
    times = [Dual(*pair) for pair in zip(args[1:3], direction[1:])]
    full, wide = fused(net, args, direction), net.embed(*times, args[3])
    with torch.autocast("cpu", torch.bfloat16):
        half, emb = fused(net, args, direction), net.embed(*times, args[3])
    assert half[0].dtype == half[1].dtype == args[0].dtype         # so a loss is not rounded to 8 bits
    assert error(half[0], full[0]) < 0.02 and error(half[1], full[1]) < 0.05
    assert emb.tangent.dtype == torch.float32 and torch.equal(emb.tangent, wide.tangent)


@pytest.mark.parametrize("options", [dict(mult=(1,), blocks=0), dict(name="LightningDiT", depth=1, qknorm=True),
                                     dict(name="EDM2", mult=(1,), blocks=0)], ids=str)
def test_a_compiled_network_equals_the_eager_one(options):
    """aot_eager traces the network as any backend does, and leaves out only the generation of machine code."""
    net, args, direction = build(options)
    torch._dynamo.reset()
    passes = [fused(f, args, direction) for f in (net, torch.compile(net, backend="aot_eager", fullgraph=True))]
    assert all(error(b, a) < 1e-5 for a, b in zip(*passes)) and not passes[1][1].requires_grad
    first, second = (gradients(net, (value * tangent).sum()) for value, tangent in passes)
    assert all((a - b).norm() < 1e-4 * (b.norm() + 1e-3) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [dict(name="DiT", second_time=True), dict(blocks=1, dropout=0.3),
                                     dict(name="EDM2", second_time=True, dropout=0.3)], ids=str)
def test_checkpointed_blocks_give_the_same(options):
    """With --grad-checkpoint less is kept for the backward pass, and the results are the same."""
    def kept(*args):
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a: count.append(a.numel()) or a, lambda a: a):
            fused(*args)
        return sum(count)
    net, args, direction = build(options)
    before = kept(net, args, direction)
    value, tangent = fused(net, args, direction)
    expected = gradients(net, (value * tangent).sum())
    net.grad_checkpoint = True
    again = fused(net, args, direction)
    assert kept(net, args, direction) < before / 2
    assert torch.equal(again[0], value) and torch.equal(again[1], tangent)
    assert all(torch.allclose(a, b) for a, b in zip(gradients(net, (again[0] * again[1]).sum()), expected, strict=True))


def one_of_two(rank, folder):
    """Runs as one of two processes, with every second sample. Its gradients must be those of all samples."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in ("DDPM++", "LightningDiT"):
        net, _, _ = build(dict(name=name))
        g = torch.Generator().manual_seed(2)
        (x, dx), t = torch.randn((2, 4, 3, 8, 8), generator=g), torch.rand(4, generator=g)
        value, tangent = net(x, t, tangent=(dx, 1 + t, None))
        expected = gradients(net, (value - (value.detach() - tangent).tanh()).square().mean())
        if name == "DDPM++":
            wrapped = DistributedDataParallel(net)
        else:
            mesh = init_device_mesh("cpu", (2,))
            net.to(memory_format=torch.contiguous_format)                  # fully_shard needs this
            for block in net.blocks:                                       # its hooks receive Duals
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(net, mesh=mesh)
        value, tangent = wrapped(x[rank::2], t[rank::2], tangent=(dx[rank::2], 1 + t[rank::2], None))
        grads = gradients(net, (value - (value.detach() - tangent).tanh()).square().mean())
        for a, b in zip(grads, expected, strict=True):
            a = a.full_tensor() if hasattr(a, "full_tensor") else a
            assert (a - b).norm() < 1e-5 * (b.norm() + 1e-3), name
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)                            # gloo's threads sometimes abort when Python exits


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)


# ----------------------------------------------------------------------------------------------------------------------
# Three ways with one signature.

@pytest.mark.parametrize("options", [dict(), dict(name="LightningDiT", second_time=True), dict(dropout=0.3)], ids=str)
def test_three_ways_agree(options):
    """F is equal up to rounding, dF up to the error of the difference, and F_other is that of a separate pass."""
    net, (x, t, s, y), (dx, _, _) = build(options, torch.float64)
    for other in [(x + 1, t / 2, s, y), (x * 2, t, s, y)]:
        models.seed_dropout(net, 5, rows=3)
        results = {name: way(net, at=(x, t, s, y), along=(dx, 0.7, -0.4), also=other) for name, way in JVP.items()}
        for name, (value, dF, F_other) in results.items():
            assert value.requires_grad and not dF.requires_grad and F_other.requires_grad
            for a, b in ((value, net(x, t, s, y)), (F_other, net(*other))):
                assert error(a, b) < 1e-12, name
            assert error(dF, results["exact"][1]) < (1e-3 if name == "fd" else 1e-11), name
            alone = JVP[name](net, at=(x, t, s, y), along=(dx, 0.7, -0.4))
            assert len(alone) == 2 and error(alone[0], value) < 1e-12 and error(alone[1], dF) < 1e-11


@pytest.mark.parametrize("way", JVP.values(), ids=JVP)
def test_a_direction_in_time_is_a_number_or_a_tensor(way):
    net, at, (dx, dt, ds) = build(dict(name="LightningDiT", second_time=True), torch.float64)
    number, tensor, other_tensor = (way(net, at=at, along=(dx, d, -d))[1] for d in (0.7, torch.full((3,), 0.7).double(), dt))
    assert error(tensor, number) < 1e-7 and error(other_tensor, number) > 1e-2      # 0.7 in float32
    assert error(way(net, at=at, along=(dx, dt, ds))[1], reference(net, at, (dx, dt, ds))[1]) < 1e-3


@pytest.mark.parametrize("old, new", [
    ("    return dx, _filled(t, dt), _filled(s, ds)", "    return dx, _filled(t, -dt), _filled(s, ds)"),
    ("    return dx, _filled(t, dt), _filled(s, ds)", "    return dx, _filled(t, dt), _filled(s, dt)"),
    ("(x, t, s), (dx, dt, ds)", "(x, t, s), (dx, ds, ds)"),
    ("t + step * dt", "t - step * dt"), ("x + step * dx", "x"), ("(ahead - behind) / (2 * h)", "(ahead - behind) / h")])
def test_mutants_of_the_ways_are_caught(old, new):
    net, at, (dx, _, _) = build(dict(name="LightningDiT", second_time=True), torch.float64)
    wrong, right = mutant(SOURCE, old, new), exact(net, at=at, along=(dx, 0.7, -0.4))[1]
    assert max(error(way(net, at=at, along=(dx, 0.7, -0.4))[1], right) for way in wrong.JVP.values()) > 1e-2


@pytest.mark.parametrize("name", ["fused", "exact", "fd"])
def test_each_way_has_ddps_gradient(tmp_path, name):
    """Three steps of two micro-batches have the same gradients with and without DDP, because dF has no graph."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        net, (x, t, s, y), (dx, _, _) = build(dict(name="DiT", second_time=True))
        wrapped = DistributedDataParallel(net)
        for _ in range(3):
            grads = []
            for network in (wrapped, net):
                for last in (False, True):
                    wrapped.require_backward_grad_sync = last
                    F, dF, other = JVP[name](network, at=(x, t, s, y), along=(dx, 1, 0), also=(x, t, t.clone(), y))
                    ((F - dF) ** 2 + other).mean().backward()
                grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
                net.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    finally:
        dist.destroy_process_group()


def test_a_compiled_derivative_is_the_eager_one(monkeypatch):
    """`exact` compiles only its derivative, because the network that it receives is compiled already."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager"))
    net, at, (dx, _, _) = build(dict(name="LightningDiT", depth=1, second_time=True))
    torch._dynamo.reset()
    eager = exact(net, at=at, along=(dx, 1, 0))
    compiled = select("exact", compile=True)(torch.compile(net), at=at, along=(dx, 1, 0))
    assert error(compiled[0], eager[0]) < 1e-5 and error(compiled[1], eager[1]) < 1e-5
    assert select("fd", compile=True) is fd and select("exact") is exact


# ----------------------------------------------------------------------------------------------------------------------
# Single operations. x is a Dual of float64 with the shape at the end of the name, or else [2, 4, 6].

def numbers(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


GENERATOR = torch.Generator().manual_seed(0)
w, square, rows = numbers(4, 6), numbers(6, 6), numbers(5, 6)
tokens, mask, index = numbers(2, 7, 6), numbers(2, 4, 6) > 0, torch.tensor([2, 0, 1])
filter1, filter2, filter3 = numbers(8, 4, 3), numbers(8, 2, 3, 3), numbers(3, 4, 1, 2, 2)
mean, var = numbers(4), numbers(4).exp()
attend = nn.MultiheadAttention(6, 2, batch_first=True).double().eval()


def in_place_operators(x):
    h = x * 2
    h += 1
    h -= x
    h *= x
    h /= 2
    return h


OPERATIONS = {
    # Operators
    "x + 1": lambda x: x + 1, "x.sum() + w": lambda x: x.sum() + w, "1 + x": lambda x: 1 + x, "w - x": lambda x: w - x, "1 - x": lambda x: 1 - x, "x * w": lambda x: x * w,
    "2 * x": lambda x: 2 * x, "x / 2": lambda x: x / 2, "1 / x": lambda x: 1 / x, "w / x": lambda x: w / x, "x / sin(x)": lambda x: x / x.sin(),
    "x ** 2": lambda x: x ** 2, "x ** -1": lambda x: x ** -1, "x ** 0": lambda x: (0 * x) ** 0, "2 ** x": lambda x: 2 ** x, "w ** x": lambda x: w.abs() ** x,
    "x ** w": lambda x: x.abs() ** w, "x ** x": lambda x: x.abs() ** x, "x % 2": lambda x: x % 2, "x @ square": lambda x: x @ square, "w.T @ x": lambda x: w.T @ x, "x @ x.mT": lambda x: x @ x.mT,
    "-x": lambda x: -x, "+x": lambda x: +x, "abs(x)": abs, "x += 1": in_place_operators,
    "x > 0": lambda x: x * (x > 0), "0 < x": lambda x: x * (0 < x), "x == x": lambda x: x * (x == x), "x != w": lambda x: x * (w != x), "x >= w": lambda x: x * (x >= w),
    "x[0]": lambda x: x[0], "x[..., ::2]": lambda x: x[..., ::2], "x[mask]": lambda x: x[mask], "x[:, index]": lambda x: x[:, index], "x[x > 0]": lambda x: x[x > 0],
    "x.T": lambda x: x[0].T, "x.mT": lambda x: x.mT, "x.real": lambda x: x.real, "a, b = x": lambda x: [*x], "len(x)": lambda x: x * len(x) * x.shape[1] * x.size(-1),
    "if x.any()": lambda x: x if x.any() else -x, "float(x)": lambda x: x * float(x.sum() > 1e9),
    # Arithmetic
    "add, alpha": lambda x: torch.add(x, x.sin(), alpha=3), "sub, alpha": lambda x: x.sub(x.sin(), alpha=3), "add by keyword": lambda x: torch.add(input=w, other=x),
    "rsub": lambda x: torch.rsub(x, 2), "div, floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"), "addcmul": lambda x: torch.addcmul(w, x, x.sin()),
    "addcmul, value": lambda x: torch.addcmul(x, x, x, value=2), "addcmul, alone": lambda x: torch.addcmul(x, w, w), "addcmul, wide": lambda x: torch.addcmul(filter3.view(12, 1, 1, 4)[..., :1], x, x), "addcdiv": lambda x: torch.addcdiv(x, x, x.exp()),
    "addcmul, value, of a constant": lambda x: torch.addcmul(x, x, w, value=2), "addcdiv, value, by a constant": lambda x: torch.addcdiv(x, x, w.exp(), value=2),
    "addmm, beta, to a constant": lambda x: torch.addmm(w[0], x[0] @ square, square, beta=0.5), "baddbmm, beta, to a constant": lambda x: torch.baddbmm(w @ w.mT, x, x.mT, beta=0.5, alpha=0.3),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3), "maximum": lambda x: torch.maximum(x, -x), "minimum": lambda x: torch.minimum(x, w), "fmod": lambda x: torch.fmod(x, 0.7),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x), "bmm": lambda x: torch.bmm(x, x.mT), "bmm by keyword": lambda x: torch.bmm(x, mat2=x.mT), "mm": lambda x: torch.mm(x[0], square),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT), "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x.sin()), "tensordot": lambda x: torch.tensordot(x, square, 1),
    # Functions of each element
    "exp": lambda x: x.exp(), "expm1": lambda x: x.expm1(), "log": lambda x: (x.abs() + 1).log(), "log1p": lambda x: x.abs().log1p(), "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: x.abs().rsqrt(), "square": lambda x: x.square(), "reciprocal": lambda x: x.reciprocal(), "sin": torch.sin, "cos": torch.cos, "tan": torch.tan,
    "atan2": lambda x: torch.atan2(x, x.cos()), "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf, "abs": torch.abs, "sign": lambda x: x * x.sign(),
    "floor": lambda x: x - x.floor(), "clamp": lambda x: x.clamp(-1, 1), "clamp, min": lambda x: x.clamp(min=0.2), "clamp by keyword": lambda x: torch.clamp(x, min=-0.3, max=0.3),
    "clamp, tensors": lambda x: torch.clamp(x, w - 1, w + 1), "nan_to_num": torch.nan_to_num, "relu": F.relu, "torch.relu": torch.relu, "leaky_relu": F.leaky_relu, "elu": F.elu,
    "silu": F.silu, "gelu": F.gelu, "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"), "mish": F.mish, "softplus": F.softplus, "glu": F.glu, "logsigmoid": F.logsigmoid,
    "hardswish": F.hardswish, "prelu": lambda x: F.prelu(x, w[0, :1]), "aten.silu": torch.ops.aten.silu, "special.expit": torch.special.expit,
    # Sums, norms
    "sum": lambda x: x.sum(), "mean": lambda x: x.mean(-1, keepdim=True), "var": lambda x: x.var(-1), "std_mean": lambda x: torch.std_mean(x, dim=1), "prod": lambda x: x.prod(-1),
    "cumsum": lambda x: x.cumsum(1), "norm": lambda x: x.norm(dim=-1), "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True),
    "vector_norm, 1": lambda x: torch.linalg.vector_norm(x, 1, dim=1), "vector_norm, all": lambda x: torch.linalg.vector_norm(x), "normalize": lambda x: F.normalize(x, dim=-1),
    "softmax": lambda x: x.softmax(-1), "F.softmax": lambda x: F.softmax(x, dim=1), "softmax, dtype": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "log_softmax": lambda x: x.log_softmax(-1), "logsumexp": lambda x: x.logsumexp(-1), "amax": lambda x: x.amax(-1), "cosine_similarity": lambda x: F.cosine_similarity(x, w[None], dim=-1),
    # Shapes
    "flip": lambda x: x.flip(-1), "roll": lambda x: x.roll(2, -1), "movedim": lambda x: x.movedim(0, -1), "tril": lambda x: x.tril(), "expand": lambda x: x[:, None].expand(2, 3, 4, 6),
    "expand_as": lambda x: x[:1].expand_as(x), "reshape": lambda x: x.reshape(2, -1), "view": lambda x: x.view(8, 6), "flatten": lambda x: x.flatten(1), "permute": lambda x: x.permute(2, 0, 1),
    "unflatten": lambda x: x.unflatten(-1, (2, 3)), "squeeze": lambda x: x[:1].squeeze(0), "unsqueeze": lambda x: x.unsqueeze(1), "narrow": lambda x: x.narrow(2, 1, 3),
    "tile": lambda x: x.tile(1, 2, 1), "repeat": lambda x: x.repeat(1, 2, 1), "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1), "gather": lambda x: x.gather(1, index.expand(2, 1, 3)),
    "index_select": lambda x: x.index_select(1, index), "index_add": lambda x: x.index_add(1, index, x[:, :3]), "masked_fill": lambda x: x.masked_fill(mask, 0),
    "cat": lambda x: torch.cat([x, x.sin(), tokens], 1), "cat by keyword": lambda x: torch.cat(tensors=[x, x], dim=0), "stack": lambda x: torch.stack((x, x * 2), -1),
    "pad": lambda x: F.pad(x, (1, 2)), "pad, 5": lambda x: F.pad(x, (1, 2), value=5.0), "pad, reflect": lambda x: F.pad(x, (1, 2), mode="reflect"),
    # Several results, and some that have no tangent
    "chunk": lambda x: x.chunk(2, -1), "split": lambda x: x.split([1, 3], 1), "unbind": lambda x: x.unbind(1), "tensor_split": lambda x: x.tensor_split(3, -1), "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(), "max, dim": lambda x: x.max(dim=1), "aminmax": lambda x: torch.aminmax(x), "argmax": lambda x: x + x.argmax(-1, keepdim=True), "one_hot": lambda x: F.one_hot(x.argmax(-1), 6) * x,
    "zeros_like": lambda x: torch.zeros_like(x) + x, "new_ones": lambda x: x.new_ones(6) * x, "detach": lambda x: x * x.detach(),
    "to": lambda x: x.to(torch.float32), "type_as": lambda x: x.float().type_as(x), "half": lambda x: x.half().double(), "long": lambda x: x * x.long(), "clone": lambda x: x.clone(),
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x)), "abs of a complex": lambda x: torch.fft.rfft(x).abs(), "norm of a complex": lambda x: torch.linalg.vector_norm(torch.fft.rfft(x), dim=1),
    # Layers
    "linear": lambda x: F.linear(x, rows), "linear by keyword": lambda x: F.linear(input=x, weight=rows, bias=rows[:, 0]), "linear, bias": lambda x: F.linear(x, rows, bias=rows[:, 0]),
    "linear of its weight": lambda x: F.linear(tokens, x[0]), "layer_norm": lambda x: F.layer_norm(x, (6,)), "layer_norm, affine": lambda x: F.layer_norm(x, (4, 6), w, w),
    "layer_norm of its weight": lambda x: F.layer_norm(x, (6,), x[0, 0]), "rms_norm": lambda x: F.rms_norm(x, (6,), w[0]), "nn.RMSNorm": nn.RMSNorm(6).double(), "rms_norm, eps": lambda x: F.rms_norm(x, (4, 6), eps=0.1), "group_norm": lambda x: F.group_norm(x, 2),
    "group_norm, affine": lambda x: F.group_norm(x, 2, mean, var), "instance_norm": F.instance_norm, "batch_norm, eval": lambda x: F.batch_norm(x, mean, var), "nn.BatchNorm1d, eval": nn.BatchNorm1d(4).double().eval(),
    "batch_norm of the batch": lambda x: F.batch_norm(x, None, None, training=True), "dropout, eval": lambda x: F.dropout(x, 0.5, False), "nn.Dropout, eval": nn.Dropout(0.5).eval(),
    "dropout, p = 0": lambda x: F.dropout(x, 0.0), "conv1d": lambda x: F.conv1d(x, filter1, filter1[:, 0, 0], 2, padding=1), "avg_pool1d": lambda x: F.avg_pool1d(x, 2), "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x, filter1.transpose(0, 1)), "interpolate, linear": lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()), "attention to constants": lambda x: F.scaled_dot_product_attention(x, tokens, tokens),
    "attention by keyword": lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x.sin()), "attention of the keys": lambda x: F.scaled_dot_product_attention(tokens, x, tokens[:, :4]),
    "attention of the values": lambda x: F.scaled_dot_product_attention(tokens, tokens[:, :4], x), "attention, causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention, mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(4, 4, dtype=torch.bool).tril()), "attention, scale": lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
    "nn.MultiheadAttention": lambda x: attend(x, x, x), "nn.MultiheadAttention to constants": lambda x: attend(x, tokens, tokens, need_weights=False),
    # In two and in three dimensions
    "conv2d [2, 4, 4, 6]": lambda x: F.conv2d(x, filter2, padding=1, groups=2), "conv_transpose2d [2, 4, 4, 6]": lambda x: F.conv_transpose2d(x, filter2.view(4, 4, 3, 3), mean, stride=2),
    "conv2d of its weight [2, 2, 3, 3]": lambda x: F.conv2d(filter2, x), "avg_pool2d [2, 4, 4, 6]": lambda x: F.avg_pool2d(x, 2), "max_pool2d [2, 4, 4, 6]": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "interpolate [2, 4, 4, 6]": lambda x: F.interpolate(x, scale_factor=2), "bilinear [2, 4, 4, 6]": lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"), "pixel_shuffle [2, 4, 4, 6]": lambda x: F.pixel_shuffle(x, 2),
    "F.unfold [2, 4, 4, 6]": lambda x: F.unfold(x, 2), "group_norm [2, 4, 4, 6]": lambda x: F.group_norm(x, 2, mean, var, 1e-3), "group_norm [5, 4]": lambda x: F.group_norm(x, 2, mean, var),
    "conv3d [2, 4, 2, 4, 6]": lambda x: F.conv3d(x, filter3, padding=1), "group_norm [2, 4, 2, 4, 6]": lambda x: F.group_norm(x, 2, mean, var), "avg_pool3d [2, 4, 2, 4, 6]": lambda x: F.avg_pool3d(x, 2)}


def test_the_eps_of_rms_norm_is_that_of_float32_in_bfloat16_too():
    """PyTorch's default for a bfloat16 input is the eps of float32, and with that of bfloat16 small inputs have a wrong tangent."""
    x, dx = 0.03 * torch.randn(4, 64), torch.randn(4, 64)
    x, dx = x.bfloat16(), dx.bfloat16()
    tangent = F.rms_norm(Dual(x, dx), (64,)).tangent.float()
    exact = torch.func.jvp(lambda x: F.rms_norm(x, (64,)), (x.float(),), (dx.float(),))[1]
    assert (tangent - exact).norm() < 0.02 * exact.norm()


def moving_parts(result):
    """The parts of a result that have a tangent, or would have one if the argument were a Dual."""
    parts = tree_leaves(result, is_leaf=lambda part: isinstance(part, Dual))
    return [a for a in parts if isinstance(a, (Dual, torch.Tensor)) and (a.dtype.is_floating_point or a.dtype.is_complex)]


def point_and_direction(name):
    """x and dx for an operation, with the shape at the end of its name, or else [2, 4, 6]."""
    shape = re.search(r" \[(\d.*)\]$", name)
    shape = (2, 4, 6) if shape is None else tuple(map(int, shape[1].split(", ")))
    return torch.randn((2, *shape), dtype=torch.float64)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name):
    """Value and gradient equal those of the plain operation to the last bit, and the tangent that of torch.func.jvp."""
    operation, (x, dx) = OPERATIONS[name], point_and_direction(name)
    x.requires_grad_()
    result = operation(Dual(x, dx))
    parts, plain = moving_parts(result), moving_parts(operation(x))
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(lambda x: tuple(moving_parts(operation(x))), (x.detach(),), (dx,))
    for part, value, tangent in zip(parts, plain, expected, strict=True):
        assert isinstance(part, Dual) and torch.equal(part.value, value)
        assert (part.tangent.dtype, part.tangent.shape) == (value.dtype, value.shape) and not part.tangent.requires_grad
        assert (part.tangent - tangent).abs().max() <= (1e-10 if value.dtype != torch.float32 else 1e-6) * tangent.abs().max()
    others = [a for a in tree_leaves(result, is_leaf=lambda a: isinstance(a, Dual)) if isinstance(a, torch.Tensor)]
    assert all(not a.dtype.is_floating_point for a in others)              # indices, for example, are plain tensors
    pairs = [torch.autograd.grad(sum(a.abs().square().sum() for a in values), x)[0] for values in ([part.value for part in parts], plain)]
    assert torch.equal(*pairs)


@pytest.mark.parametrize("name, operation", [("comparison", lambda x: x > 0), ("argmax", lambda x: x.argmax()), ("long", lambda x: x.long()), ("x.dim", lambda x: x.dim()),
                                             ("allclose", lambda x: torch.allclose(x, x)), ("detach", lambda x: x.detach()), ("shape", lambda x: x.shape)])
def test_what_has_no_tangent_is_no_dual(name, operation):
    x = torch.randn(2, 3)
    result = operation(Dual(x, x))
    assert type(result) is type(operation(x)) and (torch.equal if torch.is_tensor(result) else type(result).__eq__)(result, operation(x))


def test_a_dual_of_integers_is_the_tensor():
    x, t, y = torch.randn(3), torch.rand(3), torch.arange(3)
    assert jvp.duals((t, y, None), (None, x, None))[1:] == [y, None]
    assert torch.equal(jvp.duals((t,), (None,))[0].tangent, torch.zeros(3))


# ----------------------------------------------------------------------------------------------------------------------
# What is refused.

def set_item(x):
    h = x * 1
    h[0] = 0


def set_item_of_a_tensor(x):
    torch.zeros(2, 4, 6)[0] = x[0]


WRITES = "fused: {} writes into an argument, whose tangent would be wrong; compute a new tensor instead (x = x + y, inplace=False, eval mode of BatchNorm), or use exact or fd"
DRAWS = "fused: {} draws random numbers, and the value and its tangent need the same ones; use eval mode, or draw them from a seed as models.Dropout does"
NO_FORWARD_MODE = "fused: {} has neither a rule in jvp.RULES nor a forward mode in PyTorch; add a rule, or use fd"
REFUSED = {
    DRAWS: {
        "dropout": nn.Dropout(0.5), "dropout1d": nn.Dropout1d(0.5), "alpha_dropout": nn.AlphaDropout(0.5), "bernoulli": torch.bernoulli, "rand_like": torch.rand_like, "randn_like": torch.randn_like,
        "normal": lambda x: torch.normal(x, 1.0), "poisson": torch.poisson, "gumbel_softmax": F.gumbel_softmax, "rrelu": nn.RReLU(),
        "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
        "multi_head_attention_forward": lambda x: nn.MultiheadAttention(6, 2, dropout=0.1)(x, x, x)},
    WRITES: {
        "add_": lambda x: x.add_(1), "clamp_": lambda x: x.clamp_(0, 1), "copy_": lambda x: torch.empty(2, 4, 6).copy_(x), "index_put_": lambda x: x.index_put_((index,), x), "relu_": F.relu_,
        "relu": nn.ReLU(inplace=True), "silu": nn.SiLU(inplace=True), "leaky_relu": nn.LeakyReLU(inplace=True), "setitem": set_item, "__setitem__": set_item_of_a_tensor,
        "mul": lambda x: torch.mul(x, 2, out=torch.empty(2, 4, 6)), "sub": lambda x: torch.sub(w, 2, out=x), "batch_norm": nn.BatchNorm1d(4), "instance_norm": nn.InstanceNorm1d(4, track_running_stats=True),
        "embedding": lambda x: F.embedding(index, x[0], max_norm=0.1)},
    NO_FORWARD_MODE: {
        "cdist": lambda x: torch.cdist(x, x + 1), "grid_sample": lambda x: F.grid_sample(x[:, None], torch.zeros(2, 4, 4, 2), align_corners=False), "floordiv": lambda x: x // 2}}


@pytest.mark.parametrize("sentence, name", [(sentence, name) for sentence, cases in REFUSED.items() for name in cases], ids=lambda a: a if " " not in a else "")
def test_an_operation_is_refused_in_one_sentence(sentence, name):
    x = torch.rand(2, 4, 6)
    before = x.clone()
    with pytest.raises(NotImplementedError) as caught:
        REFUSED[sentence][name](Dual(x, torch.ones_like(x)))
    assert str(caught.value) == sentence.format(name)
    assert torch.equal(x, before) or name == "embedding"           # it is detected only while it runs


def test_batch_normalisation_is_refused_before_its_statistics_change():
    layer = nn.BatchNorm1d(4)
    with pytest.raises(NotImplementedError, match="eval mode of BatchNorm"):
        layer(Dual(torch.rand(2, 4, 6), torch.rand(2, 4, 6)))
    assert not layer.running_mean.any()


def test_other_errors_are_pytorchs_own():
    with pytest.raises(RuntimeError, match="must match the size"):
        torch.maximum(Dual(torch.rand(3), torch.rand(3)), torch.rand(4))
    with pytest.raises(AttributeError, match="no_such_method"):
        Dual(torch.rand(3), torch.rand(3)).no_such_method()


def test_the_page_names_what_has_a_rule_and_what_falls_back(monkeypatch):
    """The table of docs/jvp.md must be complete. Its row "fallback" has the operations above that have no rule."""
    fallen, fall_back = set(), jvp._fall_back

    def recorded(func, *args):
        fallen.add(func.__name__)
        return fall_back(func, *args)

    monkeypatch.setattr(jvp, "_fall_back", recorded)
    for name, operation in OPERATIONS.items():
        operation(Dual(*point_and_direction(name)))
    expected = {"linear": jvp.LINEAR, "rule": set(jvp.RULES), "fallback": fallen - jvp.LINEAR - set(jvp.RULES),
                "refused: it draws random numbers": set(REFUSED[DRAWS]), "refused: it writes into an argument": set(REFUSED[WRITES]),
                "refused: it has no forward mode": set(REFUSED[NO_FORWARD_MODE])}
    page = (ROOT / "docs/jvp.md").read_text()
    for kind, names in expected.items():
        cell = re.search(rf"^\| {kind} \|.*\| (.*) \|$", page, flags=re.MULTILINE)[1]
        assert set(cell.replace("`", "").split(", ")) == names, kind


# ----------------------------------------------------------------------------------------------------------------------
# Networks that are not ours.

class Foreign(torch.nn.Module):
    """A network without code of this project. It has affine normalisations, a softmax by hand, ReLU and views."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 1)
        self.group, self.layer = torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(8)
        self.qkv, self.time = torch.nn.Linear(8, 24), torch.nn.Linear(2, 8)
        self.y = torch.nn.Embedding(4, 8)

    def forward(self, x, t, s, y):
        emb = self.time(torch.stack([t, t.exp()], dim=-1)).tanh() + self.y(y)
        h = torch.nn.functional.relu(self.group(self.conv(x))) * emb[:, :, None, None].sigmoid()
        tokens = self.layer(h.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        h = h + (torch.softmax(q @ k.transpose(1, 2) / 3, dim=-1) @ v).transpose(1, 2).reshape(h.shape)
        return self.out(h).nan_to_num() if self.careful else self.out(h)

    careful = False


class AnyShape(nn.Module):
    """A network for points x [B, 4, ...] with up to three further dimensions."""

    def __init__(self, dimensions):
        super().__init__()
        layer, self.ones = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions], [1] * dimensions
        options = dict(padding=1) if dimensions else {}
        self.first, self.last = (layer(a, b, *[3][:dimensions], **options) for a, b in ((4, 8), (8, 4)))
        self.norm, self.time = nn.GroupNorm(2, 8), nn.Linear(2, 8)

    def forward(self, x, t, s, y):
        emb = self.time(torch.stack([t.sin(), s.cos()], dim=1)).unflatten(1, (8, *self.ones))
        return self.last(F.silu(self.norm(self.first(x)) * (1 + emb)))


@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (2, 4, 5)], ids=str)
def test_the_three_ways_in_any_shape(shape):
    torch.manual_seed(0)
    net = AnyShape(len(shape)).double()
    x, dx = torch.randn((2, 3, 4, *shape), dtype=torch.float64)
    (t, s), y = torch.rand((2, 3), dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    right = exact(net, at=(x, t, s, y), along=(dx, 0.7, -0.4), also=(dx, s, t, y))
    assert right[1].shape == x.shape and right[1].norm() > 0.1
    expected = gradients(net, (right[0] * dx + right[2]).sum())
    for name, way in JVP.items():
        network = with_tangent(net) if name == "fused" else net
        results = way(network, at=(x, t, s, y), along=(dx, 0.7, -0.4), also=(dx, s, t, y))
        for a, b, bound in zip(results, right, (1e-12, 1e-3 if name == "fd" else 1e-11, 1e-12), strict=True):
            assert a.shape == x.shape and error(a, b) < bound, name
        grads = gradients(net, (results[0] * dx + results[2]).sum())
        assert all(torch.allclose(a, b) for a, b in zip(grads, expected, strict=True))


class Wave(nn.Module):
    """A small convolutional network for signals x [B, 2, T] with GroupNorm, GLU, a skip and an in-place operator."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 16, 3, padding=2, dilation=2), nn.Conv1d(8, 2, 1)
        self.norm, self.time, self.drop = nn.GroupNorm(4, 8), nn.Linear(1, 8), nn.Dropout(0.1)

    def block(self, h):
        return self.drop(F.glu(self.gate(F.softplus(self.norm(h))), dim=1))

    def forward(self, x, t, s=None, y=None):
        h = self.first(F.pad(x, (2, 2), mode="circular"))[..., 2:-2]
        h += self.time(t[:, None]).tanh()[:, :, None]
        h = h + (checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h))
        return self.last(torch.maximum(h, -h.flip(-1))) / (1 + t[:, None, None] ** 2)

    checkpointed = False


class Tokens(nn.Module):
    """A small transformer for tokens x [B, N, 8], made of PyTorch's layers, which differ in how they use attention."""

    def __init__(self):
        super().__init__()
        self.time, self.y = nn.Linear(1, 8), nn.Embedding(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True))
        self.norm = nn.RMSNorm(8)

    def forward(self, x, t, s=None, y=None):
        h = x + (self.time(t[:, None]) + self.y(y))[:, None]
        attended, weights = self.attention(h, h, x)
        return self.norm(self.layers(h + attended)) + weights.mean()


@pytest.mark.parametrize("network, shape", [(Wave, (2, 12)), (Tokens, (5, 8))])
def test_networks_of_pytorchs_layers(network, shape):
    torch.manual_seed(0)
    net = network().double().eval()
    at = (*torch.randn((1, 3, *shape), dtype=torch.float64), torch.rand(3, dtype=torch.float64), None, torch.tensor([0, 1, 3]))
    dx = torch.randn(3, *shape, dtype=torch.float64)
    value, dF = jvp.fused(with_tangent(net), at=at, along=(dx, 1, 0))
    right = exact(net, at=at, along=(dx, 1, 0))
    assert error(value, net(*at)) < 1e-12 and error(dF, right[1]) < 1e-11 and not dF.requires_grad
    assert error(fd(net, at=at, along=(dx, 1, 0), h=1e-4)[1], dF) < 1e-4
    pairs = zip(gradients(net, (value * dF).sum()), gradients(net, (right[0] * right[1]).sum()), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)
    assert torch.backends.mha.get_fastpath_enabled()


def test_dropout_is_refused_in_train_mode():
    with pytest.raises(NotImplementedError, match="^fused: dropout draws random numbers"):
        jvp.fused(with_tangent(Wave()), at=(torch.randn(3, 2, 12), torch.rand(3), None, None), along=(torch.randn(3, 2, 12), 1, 0))


def test_the_fallback_in_a_checkpoint():
    torch.manual_seed(0)
    net = Wave().eval()
    parts = copy.deepcopy(net)
    parts.checkpointed = True
    x, dx, t = torch.randn(3, 2, 12), torch.randn(3, 2, 12), torch.rand(3)
    results = [jvp.fused(with_tangent(f), at=(x, t, None, None), along=(dx, 1, 0)) for f in (net, parts)]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    grads = [gradients(f, (value * tangent).sum()) for f, (value, tangent) in zip((net, parts), results)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("network, shape", [(Wave, (2, 12)), (Tokens, (5, 8))])
def test_a_compiled_network_with_the_fallback(network, shape):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = network().eval()
    at, dx = (torch.randn(3, *shape), torch.rand(3), None, torch.tensor([0, 1, 3])), torch.randn(3, *shape)
    eager, compiled = (jvp.fused(f, at=at, along=(dx, 1, 0)) for f in (with_tangent(net), torch.compile(with_tangent(net), backend="aot_eager")))
    assert all(error(b, a) < 1e-5 for a, b in zip(eager, compiled)) and not compiled[1].requires_grad
    first, second = (gradients(net, (value * tangent).sum()) for value, tangent in (eager, compiled))
    assert all((a - b).norm() < 1e-4 * (b.norm() + 1e-3) for a, b in zip(first, second, strict=True))


def test_compiled_code_does_not_confuse_methods():
    """torch.compile does not check for which method of a tensor a function was compiled; see _compiled_only_inside."""
    torch._dynamo.reset()
    net = with_tangent(lambda x, t, s, y: (w.float() + x).abs().sqrt().expm1().sin().sqrt())
    x, t, dx = torch.rand(4, 6), torch.rand(4), torch.randn(4, 6)
    eager, compiled = (f(x, t, tangent=(dx, None, None)) for f in (net, torch.compile(net, backend="aot_eager")))
    assert all(torch.allclose(a, b, rtol=1e-5, equal_nan=True) for a, b in zip(eager, compiled))


@pytest.mark.parametrize("careful", [False, True])
def test_a_network_of_ones_own_takes_a_tangent(careful):
    torch.manual_seed(0)
    net, x, t, y = Foreign().double(), torch.randn(3, 3, 4, 4).double(), torch.rand(3).double(), torch.tensor([0, 1, 3])
    net.careful = careful
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    dx = torch.randn_like(x)
    F, dF = jvp.fused(with_tangent(net), at=(x, t, None, y), along=(dx, 1, 0))
    expected = exact(net, at=(x, t, None, y), along=(dx, 1, 0))
    assert error(F, expected[0]) < 1e-12 and error(dF, expected[1]) < 1e-11
    pairs = zip(gradients(net, (F * dF).sum()), gradients(net, (expected[0] * expected[1]).sum()), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)
    assert torch.equal(with_tangent(net)(x, t, None, y), net(x, t, None, y))


def test_a_rule_can_be_added(monkeypatch):
    """The error names an operation that has neither a rule nor a forward mode. A rule that is added for it is used."""
    net = with_tangent(lambda x, t, s, y: torch.cdist(x, x.detach() + 1))
    x, t, dx = torch.randn(2, 3, 4).double(), torch.rand(2).double(), torch.randn(2, 3, 4).double()
    with pytest.raises(NotImplementedError, match="cdist"):
        jvp.fused(net, at=(x, t, None, None), along=(dx, 1, 0))
    monkeypatch.setitem(jvp.RULES, "cdist", lambda y, a, b, **_: ((a.value[:, :, None] - b[:, None]) * a.tangent[:, :, None]).sum(-1) / y)
    ends = [torch.cdist(x + e * dx, x + 1) for e in (1e-6, -1e-6)]
    assert error(jvp.fused(net, at=(x, t, None, None), along=(dx, 1, 0))[1], (ends[0] - ends[1]) / 2e-6) < 1e-6
