"""Tests EDM2's U-Net: the public class's outputs, its files, forced weight normalisation, and GCM's fine-tuning."""

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from formula import fill, normal_like, uniform
from oracle import mutant
from test_golden import assert_equal, case, golden
from test_weights import pickle_as_edm_does
from torch.optim.optimizer import register_optimizer_step_pre_hook

import decm
import facm
import gcm
import jvp
import models
import sample
from common import weights
from jvp import JVP

SMALL = dict(name="EDM2", input_size=16, num_classes=10, width=32, mult=(1, 2), blocks=1, attention=(8,), head_channels=16)


def ours(shapes):
    """Converts the names and shapes of a public class to ours, where gains are [1] and there is no uncertainty."""
    names = {k.removeprefix("unet."): w for k, w in shapes.items() if "logvar" not in k}
    return {k: w.reshape(1) if k.endswith("_gain") else w for k, w in names.items()}


def build(shapes, **options):
    """Builds our network for the public names and shapes, and fills it and its random tables by formula."""
    net = models.create(**(weights.options_from_shapes(ours(shapes)) | options))
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: w.shape for k, w in ours(shapes).items()}
    prefix = "unet." if "unet.out_gain" in shapes else ""
    fill(net, lambda name: prefix + name)
    for name, table in net.emb_fourier.named_buffers():
        table.copy_(torch.from_numpy(3 * uniform(f"{prefix}emb_fourier.{name}", table.shape)))
    return net


def bare(net, monkeypatch):
    """Returns the network without its preconditioning, so that it takes c_noise instead of a time."""
    monkeypatch.setattr(models, "edm_noise", lambda t: t)
    monkeypatch.setattr(models, "edm_scalings", lambda t, sigma_data: (1.0, 0.0, 1.0))
    return net


@torch.no_grad()
@pytest.mark.parametrize("name, size, options", [
    case("edm2-small", "UNet", 16, dict(head_channels=16)), case("edm2-xs", "UNet", 64, {}), case("edm2-s", "UNet", 64, {})])
def test_it_is_the_public_class(name, size, options, monkeypatch):
    stored, shapes = golden(name)
    net = bare(build(shapes, **options), monkeypatch)
    assert_equal(stored, net(normal_like("x", (2, 3, size, size)), torch.tensor([0.3, -0.7]), None, torch.tensor([3, 5])))


@torch.no_grad()
def test_the_velocity_is_that_of_the_public_denoiser():
    """Precond's D(x; sigma) is x_t + (1-t) v, where v is the velocity at x_t = t x and sigma is (1-t) / t."""
    stored, shapes = golden("edm2-precond")
    net, sigma = build(shapes, head_channels=16), torch.tensor([0.2, 20.0])
    x, t = normal_like("x", (2, 3, 16, 16)) * torch.tensor([1.0, 20.0])[:, None, None, None], 1 / (1 + sigma)
    xt = t[:, None, None, None] * x
    v = net(xt, t, None, torch.tensor([3, 5]))
    assert_equal(stored, xt + (1 - t[:, None, None, None]) * v)


@torch.no_grad()
def test_gcms_f_is_that_of_the_public_denoiser():
    """In GCM's time and noise, D is x_t - t f, where x_t is (1-t) x and sigma is sigma_d t / (1-t)."""
    stored, shapes = golden("edm2-precond")
    f = gcm.precondition(build(shapes, head_channels=16), ct="t", mu=3.5, sigma_d=0.5, second_time=False, velocity=True)
    sigma = torch.tensor([0.2, 20.0])
    t = sigma / (0.5 + sigma)
    wide_t = t[:, None, None, None]
    xt = (1 - wide_t) * normal_like("x", (2, 3, 16, 16)) * torch.tensor([1.0, 20.0])[:, None, None, None]
    assert_equal(stored, xt - wide_t * f(xt, t, torch.full_like(t, gcm.T_MIN), torch.tensor([3, 5])))


@pytest.mark.parametrize("name, golden_name, millions", [("EDM2-XS", "edm2-xs", 124.7), ("EDM2-S", "edm2-s", 280.2),
                                                         ("EDM2-M", None, 497.8), ("EDM2-L", None, 777.5), ("EDM2-XL", None, 1119.3)])
def test_public_names_build_the_public_architecture(name, golden_name, millions):
    with torch.device("meta"):
        net = models.create(name, input_size=64, num_classes=1000)
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.06
    if golden_name:
        assert {k: v.shape for k, v in net.state_dict().items()} == {k: w.shape for k, w in ours(golden(golden_name)[1]).items()}


@torch.no_grad()
def test_a_pickle_of_half_precision(tmp_path, monkeypatch):
    """NVlabs/edm2 writes names under unet., gains without dimensions, the head of the uncertainty, and float16."""
    net = fill(models.create(**SMALL)).half()
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    for name, gain in [(n, p) for n, p in net.named_parameters() if n.endswith("_gain")]:
        owner = net.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(gain.reshape(())))
    pickle_as_edm_does(tmp_path / "edm2.pkl", monkeypatch, beside=dict(encoder=dict(raw_mean=[0.0]), dataset_kwargs={}), unet=net,
                       logvar_fourier=models.MPFourier(8), logvar_linear=models.MPConv(8, 1))
    loaded = weights.load(tmp_path / "edm2.pkl", head_channels=16)
    for name, w in loaded.state_dict().items():
        assert w.dtype == torch.float32 and torch.equal(w, kept[name].float()), name


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_the_fused_derivative_is_the_exact_one(dtype, bound):
    net = fill(models.create(**SMALL, second_time=True)).to(dtype)
    x, v = (normal_like(n, (3, 3, 16, 16)).to(dtype) for n in "xv")
    t, s, y = (torch.tensor(a).to(kind) for a, kind in (([0.2, 0.6, 0.9], dtype), ([0.9, 1.0, 0.95], dtype), ([0, 3, 10], torch.int64)))
    (F, dF), (G, dG) = (JVP[way](net, at=(x, t, s, y), along=(v, 1, 0.5)) for way in ("fused", "exact"))
    assert (F - G).norm() < bound * G.norm() and (dF - dG).norm() < bound * dG.norm()


@pytest.mark.parametrize("rule", ["(x <= max), dx, 0)", "(x <= max), dx, dx)"], ids=["clipped", "mutant"])
def test_clipped_activations_have_no_tangent(monkeypatch, rule):
    """Large gains bring activations to their limit of 256, where they no longer change."""
    source, shares = pathlib.Path(jvp.__file__).read_text(), []
    monkeypatch.setattr(models, "duals", mutant(source, "(x <= max), dx, 0)", rule).duals)
    net = fill(models.create(**SMALL)).double()
    for block in (m for m in net.modules() if isinstance(m, models.EDM2Block)):
        block.emb_gain.data.fill_(50.0)
        block.register_forward_hook(lambda block, x, h: shares.append((h.abs() == 256).double().mean()) if torch.is_tensor(h) else None)
    x, v = (normal_like(n, (2, 3, 16, 16)).double() for n in "xv")
    t, y = torch.tensor([0.2, 0.6]).double(), torch.tensor([3, 5])
    fused, exact = (JVP[way](net, at=(x, t, None, y), along=(v, 1, 0))[1] for way in ("fused", "exact"))
    assert 0 < max(shares) and min(shares) < 1
    assert ((fused - exact).norm() < 1e-8 * exact.norm()) == ("dx, 0)" in rule)


# ----------------------------------------------------------------------------------------------------------------------
# Forced weight normalisation.

def mean_squares(net):
    return torch.cat([m.weight.detach().square().flatten(1).mean(1) for m in net.modules() if isinstance(m, models.MPConv)])


def test_forced_weight_norm_changes_no_output():
    """Each pass normalises the weights anyway (Eq. 47, up to eps), so that their size matters only to the optimiser."""
    net = fill(models.create(**SMALL)).double()
    x, t, y = normal_like("x", (2, 3, 16, 16)).double(), torch.tensor([0.3, 0.7]).double(), torch.tensor([3, 5])
    before = net(x, t, None, y)
    net.force_weight_norm()
    assert (mean_squares(net) - 1).abs().max() < 0.01 and (net(x, t, None, y) - before).norm() < 0.02 * before.norm()


def test_fresh_weights_are_as_drawn():
    """The constructor leaves normal random numbers as they are; the scripts normalise at the start of each step."""
    net = models.create(**SMALL, seed=0)
    assert (mean_squares(net) - 1).abs().max() > 0.05
    net.force_weight_norm()
    assert (mean_squares(net) - 1).abs().max() < 1e-3


def test_the_gradient_of_a_weight_is_orthogonal_to_it():
    """This is the purpose of Eq. 47: a step does not shrink a weight."""
    net = fill(models.create(**SMALL)).double()
    net.force_weight_norm()
    x, t = normal_like("x", (2, 3, 16, 16)).double(), torch.tensor([0.3, 0.7]).double()
    net(x, t, None, torch.tensor([3, 5])).square().sum().backward()
    for layer in (m for m in net.modules() if isinstance(m, models.MPConv)):
        w, g = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
        assert ((w * g).sum(1).abs() <= 1e-3 * w.norm(dim=1) * g.norm(dim=1) + 1e-12).all()


TINY = ["--device", "cpu", "--data", "glyphs", "--preset", "imagenet64_finetune", "--resolution", 16, "--batch", 4, "--preview-every", 100,
        "--save-every", 1, "--num-classes", 10]


def call(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    module.main()


def train(monkeypatch, *argv):
    call(monkeypatch, gcm, *TINY, *argv)


def test_fine_tuning_begins_as_the_teacher_and_keeps_its_weights_normal(tmp_path, monkeypatch):
    teacher = fill(models.create(**SMALL))
    torch.save({"unet." + k: v for k, v in teacher.state_dict().items()}, tmp_path / "edm2.pt")
    net = ["--init", tmp_path / "edm2.pt", "--net", "head_channels=16", "dropout=0.1", "dropout_res=8"]
    train(monkeypatch, *net, "--lr", 0, "--steps", 1, "--out", tmp_path / "still")
    held = torch.load(tmp_path / "still/ckpt.pt")
    assert held["args"]["net"] | dict(dropout=0.1) == held["args"]["net"] and held["args"]["t_mid"] == (0.798,)
    student, x, t = models.create(**held["args"]["net"]), normal_like("x", (2, 3, 16, 16)), torch.tensor([0.3, 0.7])
    student.load_state_dict(held["model"])
    expected = teacher(x, t, None, torch.tensor([3, 5]))
    assert (student.eval()(x, t, None, torch.tensor([3, 5])) - expected).norm() < 1e-3 * expected.norm()
    assert (mean_squares(student) - 1).abs().max() < 0.01
    honest, calls = models.EDM2.force_weight_norm, []
    monkeypatch.setattr(models.EDM2, "force_weight_norm", lambda net: (honest(net), calls.append(net)))
    train(monkeypatch, *net, "--lr", 0.01, "--steps", 3, "--out", tmp_path / "moving")
    student.load_state_dict(torch.load(tmp_path / "moving/ckpt.pt")["model"])
    assert len(calls) == 3 and 1e-3 < (mean_squares(student) - 1).abs().max() < 0.05     # what the last step changed
    dropouts = {name: m.p for name, m in student.named_modules() if isinstance(m, models.Dropout)}
    assert {p for n, p in dropouts.items() if ".8x8" in n} == {0.1} and {p for n, p in dropouts.items() if "16x16" in n} == {0.0}


@pytest.mark.parametrize("module, flags", [
    (facm, "--teacher FILE --condition auxiliary --jvp fused"), (decm, "--teacher FILE --jvp fused"),
    (gcm, "--init FILE --preset imagenet64_finetune --num-classes 10 --variant VU --jvp fused"),
    (gcm, "--init FILE --preset imagenet64_finetune --num-classes 10 --variant CU --precision bf16 --grad-checkpoint")],
    ids=["facm", "decm", "gcm-vu", "gcm-bf16"])
def test_every_method_begins_with_it(tmp_path, monkeypatch, module, flags):
    """Each method trains one step from EDM2's weights, writes a checkpoint, and draws two samples from it."""
    torch.save({"unet." + k: v for k, v in fill(models.create(**SMALL)).state_dict().items()}, tmp_path / "edm2.pt")
    net = [f"{k}={v if k != 'attention' else '8,'}".replace(" ", "").replace("(", "").replace(")", "") for k, v in SMALL.items()]
    call(monkeypatch, module, "--device", "cpu", "--data", "glyphs", "--resolution", 16, "--batch", 2, "--steps", 1, "--preview-every", 9,
         *flags.replace("FILE", str(tmp_path / "edm2.pt")).split(), "--net", *net, "--out", tmp_path / "run")
    held = torch.load(tmp_path / "run/ckpt.pt")
    student = models.create(**held["args"]["net"])
    student.load_state_dict(held["model"])
    assert student.second_time == ("bf16" not in flags) and (mean_squares(student) - 1).abs().max() < 0.01
    call(monkeypatch, sample, "--ckpt", tmp_path / "run/ckpt.pt", "--device", "cpu", "--nfe", 2, "--n", 2, "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_a_dry_run_needs_no_file():
    """--init may also name a file that does not exist yet. The network is then that of --net."""
    done = subprocess.run([sys.executable, "-W", "ignore", ROOT / "gcm.py", "--data", "imagenet64.zip", "--preset", "imagenet64_finetune",
                           "--init", "edm2.pkl", "--net", "width=32", "blocks=1", "--dry-run", "32"], capture_output=True, text=True)
    assert done.returncode == 0 and "init=edm2.pkl" in done.stdout and "images      128 in a step, 4 of a process" in done.stdout, done.stderr


def test_the_rate_falls_as_the_inverse_square_root(tmp_path, monkeypatch):
    """The rate is constant until --lr-decay, and then lr sqrt(decay / step). The preset's decay is 2,000 steps."""
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    torch.save({"unet." + k: v for k, v in fill(models.create(**SMALL)).state_dict().items()}, tmp_path / "edm2.pt")
    train(monkeypatch, "--init", tmp_path / "edm2.pt", "--net", "head_channels=16", "--lr-decay", 2, "--steps", 5, "--out", tmp_path / "run")
    hook.remove()
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3 * math.sqrt(2 / 3), 1e-3 * math.sqrt(2 / 4)])
    assert gcm.PRESETS["imagenet64_finetune"]["lr_decay"] == 2000


def half_of_the_batch(rank, folder):
    """Runs one of two FSDP processes on every second sample, including the derivative. The gradients, and the weights
    after a step that begins with their normalisation, must be those of one process."""
    from torch.distributed.tensor import DTensor
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, v = (normal_like(n, (4, 3, 16, 16)) for n in "xv")
    t, y = torch.tensor([0.1, 0.3, 0.6, 0.9]), torch.tensor([1, 2, 3, 10])
    net, parts = (fill(models.create(**SMALL, seed=0)) for _ in range(2))
    models.shard(parts)
    for network, rows in ((net, slice(None)), (parts, slice(rank, None, 2))):
        network.grad_checkpoint = True
        network.force_weight_norm()
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        value, tangent = network(x[rows], t[rows], None, y[rows], tangent=(v[rows], 1 + t[rows], None))
        (value - (value.detach() - tangent).tanh()).square().mean().backward()
        optimizer.step()
    for (name, a), b in zip(parts.named_parameters(), net.parameters(), strict=True):
        assert isinstance(a, DTensor)
        grad = a.grad.full_tensor()
        assert (grad - b.grad).norm() < 1e-5 * (b.grad.norm() + 1e-3), (name, grad, b.grad)
        assert (a.full_tensor() - b).norm() < 1e-3 * b.norm(), name        # Adam's first step has only the sign
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)                            # gloo's threads sometimes abort when Python exits


def test_two_processes_in_parts_have_the_weights_of_one(tmp_path):
    torch.multiprocessing.spawn(half_of_the_batch, (tmp_path,), nprocs=2)
