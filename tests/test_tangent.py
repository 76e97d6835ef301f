"""net(..., tangent=...): value and derivative from one pass, beside torch.func.jvp, mutants, and what wraps a network."""

import os
import pathlib
import types

import pytest
import torch
import torch.distributed as dist
from test_models import SMALL, VARIANTS, inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import models

SOURCE = pathlib.Path(models.__file__).read_text()
EVERYTHING = [*VARIANTS, dict(adaptive_scale=True, pixelnorm=True), dict(augment_dim=3, num_classes=4, blocks=2, mult=(1, 2, 2)), dict(name="NCSN++", adaptive_scale=True),
              dict(name="DiT", swiglu=True, rope=True, qknorm=True, wo_shift=True, learn_sigma=True),
              dict(name="DiT", rmsnorm=True, pixelnorm=True, prediction="noise", second_time=True)]


def build(options, dtype=torch.float32, module=models):
    """A small network without a parameter that is zero, and (x, t, s, y) with a direction of the first three."""
    torch.manual_seed(0)
    net = module.create(**(SMALL[options.get("name", "DDPM++")] | options)).to(dtype)
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

    torch.manual_seed(1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(f, tuple(args[i] for i in moving), tuple(direction[i] for i in moving))


def fused(net, args, direction, *more):
    torch.manual_seed(1)
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
    torch.manual_seed(1)
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
    ("(a.tangent - y * b.tangent)", "(a.tangent + y * b.tangent)", {})])
def test_mutants_are_caught(old, new, options):
    assert SOURCE.count(old) == 1, "the mutated line has changed; adapt the test"
    mutant = types.ModuleType("mutant")
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), mutant.__dict__)
    net, args, direction = build(options, torch.float64, mutant)
    assert error(fused(net, args, direction)[1], reference(net, args, direction)[1]) > 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_leaves_the_time_path_alone(name):
    net, args, direction = build(dict(name=name, num_classes=4, second_time=True))
    times = [models.Dual(*pair) for pair in zip(args[1:3], direction[1:])]
    full, wide = fused(net, args, direction), net.embed(*times, args[3])
    with torch.autocast("cpu", torch.bfloat16):
        half, emb = fused(net, args, direction), net.embed(*times, args[3])
    assert half[0].dtype == half[1].dtype == args[0].dtype         # so a loss is not rounded to 8 bits
    assert error(half[0], full[0]) < 0.02 and error(half[1], full[1]) < 0.05
    assert emb.tangent.dtype == torch.float32 and torch.equal(emb.tangent, wide.tangent)


@pytest.mark.parametrize("options", [dict(mult=(1,), blocks=0), dict(name="LightningDiT", depth=1, qknorm=True)], ids=str)
def test_a_compiled_network_equals_the_eager_one(options):
    """Traced as for any compiler; aot_eager leaves out only the generation of machine code."""
    net, args, direction = build(options)
    torch._dynamo.reset()
    passes = [fused(f, args, direction) for f in (net, torch.compile(net, backend="aot_eager", fullgraph=True))]
    assert all(error(b, a) < 1e-5 for a, b in zip(*passes)) and not passes[1][1].requires_grad
    first, second = (gradients(net, (value * tangent).sum()) for value, tangent in passes)
    assert all((a - b).norm() < 1e-4 * (b.norm() + 1e-3) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [dict(name="DiT", second_time=True), dict(blocks=1, dropout=0.3)], ids=str)
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
