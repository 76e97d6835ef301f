"""jvp.py: value and derivative from one pass, beside torch.func.jvp, mutants, what wraps a network, and other networks."""

import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from oracle import mutant
from test_models import SMALL, VARIANTS, inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import jvp
import models
from jvp import JVP, exact, fd, select, with_tangent

SOURCE = pathlib.Path(jvp.__file__).read_text()
EVERYTHING = [*VARIANTS, dict(adaptive_scale=True, pixelnorm=True), dict(augment_dim=3, num_classes=4, blocks=2, mult=(1, 2, 2)), dict(name="NCSN++", adaptive_scale=True),
              dict(name="DiT", swiglu=True, rope=True, qknorm=True, wo_shift=True, learn_sigma=True),
              dict(name="DiT", rmsnorm=True, pixelnorm=True, prediction="noise", second_time=True)]


def build(options, dtype=torch.float32):
    """A small network without a parameter that is zero, and (x, t, s, y) with a direction of the first three."""
    torch.manual_seed(0)
    net = models.create(**(SMALL[options.get("name", "DDPM++")] | options)).to(dtype)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    x, t, s, y, dx = inputs(net, dtype=dtype)
    ds = None if s is None else torch.tensor([0.3, -1.0, 0.0], dtype=dtype)
    return net, (x, t, s, y), (dx, torch.tensor([1.0, 0.5, -0.7], dtype=dtype), ds)


def reference(net, args, direction, *more):
    """The same from PyTorch's forward mode, with the dropout of seed 1."""
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
    assert torch.equal(value, plain)                                       # dropout's mask, too
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
    (".add_(q @ dk)", "", {}), (".add_(P @ dv)", "", dict(name="DiT")),
    ("centred = tangent - mean(tangent)", "centred = tangent.clone()", {}),                # the mean of a group
    ("centred.addcmul_(y, mean(y * tangent), value=-1)", "centred", {}),                   # its variance
    ("centred.addcmul_(y, mean(y * tangent), value=-1)", "centred", dict(name="DiT")),
    ("torch.addcmul(a.tangent * b.value, a.value, b.tangent)", "a.tangent * b.value", dict(name="DiT")),
    ("product.add_(c.tangent) if isinstance(c, Dual) else product", "product", dict(adaptive_scale=True)),
    ("rsqrt=lambda y, x: -0.5", "rsqrt=lambda y, x: 0.5", dict(name="LightningDiT")),
    ("F.linear(x.tangent, w)", "F.linear(x.tangent, w, b)", dict(name="DiT")),
    ("F.conv2d(x.tangent, w, None,", "F.conv2d(x.tangent, w, b,", dict(sigma_data=None)),
    ("(a.tangent - y * b.tangent)", "(a.tangent + y * b.tangent)", {}),
    (".sum(dim, keepdim) / y.clamp(min=1e-30)", ".sum(dim, keepdim)", dict(name="EDM2"))])
def test_mutants_are_caught(monkeypatch, old, new, options):
    monkeypatch.setattr(models, "duals", mutant(SOURCE, old, new).duals)
    net, args, direction = build(options, torch.float64)
    assert error(fused(net, args, direction)[1], reference(net, args, direction)[1]) > 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_leaves_the_time_path_alone(name):
    net, args, direction = build(dict(name=name, num_classes=4, second_time=True))
    times = [jvp.Dual(*pair) for pair in zip(args[1:3], direction[1:])]
    full, wide = fused(net, args, direction), net.embed(*times, args[3])
    with torch.autocast("cpu", torch.bfloat16):
        half, emb = fused(net, args, direction), net.embed(*times, args[3])
    assert half[0].dtype == half[1].dtype == args[0].dtype         # so a loss is not rounded to 8 bits
    assert error(half[0], full[0]) < 0.02 and error(half[1], full[1]) < 0.05
    assert emb.tangent.dtype == torch.float32 and torch.equal(emb.tangent, wide.tangent)


@pytest.mark.parametrize("options", [dict(mult=(1,), blocks=0), dict(name="LightningDiT", depth=1, qknorm=True),
                                     dict(name="EDM2", mult=(1,), blocks=0)], ids=str)
def test_a_compiled_network_equals_the_eager_one(options):
    """Traced as for any compiler; aot_eager leaves out only the generation of machine code."""
    net, args, direction = build(options)
    torch._dynamo.reset()
    passes = [fused(f, args, direction) for f in (net, torch.compile(net, backend="aot_eager", fullgraph=True))]
    assert all(error(b, a) < 1e-5 for a, b in zip(*passes)) and not passes[1][1].requires_grad
    first, second = (gradients(net, (value * tangent).sum()) for value, tangent in passes)
    assert all((a - b).norm() < 1e-4 * (b.norm() + 1e-3) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [dict(name="DiT", second_time=True), dict(blocks=1, dropout=0.3),
                                     dict(name="EDM2", second_time=True, dropout=0.3)], ids=str)
def test_checkpointed_blocks_give_the_same(options):
    """--grad-checkpoint: what a block keeps for the backward pass is less, its result is not another."""
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
    """A process with every second sample; its gradients are to be those of all samples in one process."""
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
            net.to(memory_format=torch.contiguous_format)                  # it takes no other
            for block in net.blocks:                                       # its hooks see Duals come and go
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(net, mesh=mesh)
        value, tangent = wrapped(x[rank::2], t[rank::2], tangent=(dx[rank::2], 1 + t[rank::2], None))
        grads = gradients(net, (value - (value.detach() - tangent).tanh()).square().mean())
        for a, b in zip(grads, expected, strict=True):
            a = a.full_tensor() if hasattr(a, "full_tensor") else a
            assert (a - b).norm() < 1e-5 * (b.norm() + 1e-3), name
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)                            # gloo's threads now and then abort at Python's end


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)


# ----------------------------------------------------------------------------------------------------------------------
# Three ways with one signature.

@pytest.mark.parametrize("options", [dict(), dict(name="LightningDiT", second_time=True), dict(dropout=0.3)], ids=str)
def test_three_ways_agree(options):
    """F to the last bits, dF to the error of a difference; outputs for others are those of a pass of their own."""
    net, (x, t, s, y), (dx, _, _) = build(options, torch.float64)
    others = [(x + 1, t / 2, s, y), (x * 2, t, s, y)]
    models.seed_dropout(net, 5, rows=3)
    results = {name: way(net, x, t, s, y, dx, 0.7, -0.4, *others) for name, way in JVP.items()}
    for name, (F, dF, *outputs) in results.items():
        assert F.requires_grad and not dF.requires_grad and len(outputs) == 2 and all(a.requires_grad for a in outputs)
        for a, b in zip((F, *outputs), (net(x, t, s, y), *(net(*other) for other in others))):
            assert error(a, b) < 1e-12, name
        assert error(dF, results["exact"][1]) < (1e-3 if name == "fd" else 1e-11), name


@pytest.mark.parametrize("old, new", [
    ("tangent = dx, torch.full_like(t, dt)", "tangent = dx, torch.full_like(t, -dt)"),
    ("torch.full_like(s, ds)\n    return", "torch.full_like(s, dt)\n    return"),
    ("point, tangent = (x, t), (dx, torch.full_like(t, dt))", "point, tangent = (x, t), (dx, torch.full_like(t, ds))"),
    ("t + e * dt", "t - e * dt"), ("x + e * dx", "x"), ("(ahead - behind) / (2 * h)", "(ahead - behind) / h")])
def test_mutants_of_the_ways_are_caught(old, new):
    net, (x, t, s, y), (dx, _, _) = build(dict(name="LightningDiT", second_time=True), torch.float64)
    wrong, right = mutant(SOURCE, old, new), exact(net, x, t, s, y, dx, 0.7, -0.4)[1]
    assert max(error(way(net, x, t, s, y, dx, 0.7, -0.4)[1], right) for way in wrong.JVP.values()) > 1e-2


@pytest.mark.parametrize("name", ["fused", "exact", "fd"])
def test_each_way_has_ddps_gradient(tmp_path, name):
    """Through DDP's wrapper, three steps of two pieces: only F has a graph, so that DDP averages once a step."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        net, (x, t, s, y), (dx, _, _) = build(dict(name="DiT", second_time=True))
        wrapped = DistributedDataParallel(net)
        for _ in range(3):
            grads = []
            for network in (wrapped, net):
                for last in (False, True):
                    wrapped.require_backward_grad_sync = last
                    F, dF, other = JVP[name](network, x, t, s, y, dx, 1, 0, (x, t, t.clone(), y))
                    ((F - dF) ** 2 + other).mean().backward()
                grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
                net.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    finally:
        dist.destroy_process_group()


def test_a_compiled_derivative_is_the_eager_one(monkeypatch):
    """`exact` compiles its derivative alone: the network that it is called with is compiled already."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager"))
    net, (x, t, s, y), (dx, _, _) = build(dict(name="LightningDiT", depth=1, second_time=True))
    torch._dynamo.reset()
    eager, compiled = exact(net, x, t, s, y, dx, 1, 0), select("exact", compile=True)(torch.compile(net), x, t, s, y, dx, 1, 0)
    assert error(compiled[0], eager[0]) < 1e-5 and error(compiled[1], eager[1]) < 1e-5
    assert select("fd", compile=True) is fd and select("exact") is exact


class Foreign(torch.nn.Module):
    """A network that knows nothing of this project: affine normalisations, softmax by hand, ReLU, views."""

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


def test_a_network_of_ones_own_takes_a_tangent():
    torch.manual_seed(0)
    net, x, t, y = Foreign().double(), torch.randn(3, 3, 4, 4).double(), torch.rand(3).double(), torch.tensor([0, 1, 3])
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    dx = torch.randn_like(x)
    F, dF = jvp.fused(with_tangent(net), x, t, None, y, dx, 1, 0)
    expected = exact(net, x, t, None, y, dx, 1, 0)
    assert error(F, expected[0]) < 1e-12 and error(dF, expected[1]) < 1e-11
    pairs = zip(gradients(net, (F * dF).sum()), gradients(net, (expected[0] * expected[1]).sum()), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)
    assert torch.equal(with_tangent(net)(x, t, None, y), net(x, t, None, y))


def test_an_operation_without_a_rule_is_named():
    net = Foreign()
    net.careful = True
    with pytest.raises(NotImplementedError, match="nan_to_num"):
        jvp.fused(with_tangent(net), torch.randn(3, 3, 4, 4), torch.rand(3), None, torch.tensor([0, 1, 3]),
                 torch.randn(3, 3, 4, 4), 1, 0)
