"""Tests weights.py: our checkpoints and public ones are read strictly, and nothing in them is executed."""

import argparse
import collections
import os
import pickle
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from formula import normal_like, sample, uniform
from test_golden import GOLDEN, golden

import models
from common import checkpoints, weights
from common.messages import say_once

NET = dict(name="LightningDiT", input_size=8, in_channels=3, num_classes=4, patch=2, width=32, depth=2, heads=4)


def small(seed=0, **options):
    torch.manual_seed(seed)
    net = models.create(**(NET | options))
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net.eval()


def assert_same(a, b):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.8])
    s, y = (t if a.second_time else None), torch.tensor([1, 4])
    assert not b.training and torch.equal(a(x, t, s, y), b(x, t, s, y))


@pytest.mark.parametrize("second_time", [False, True])
@pytest.mark.parametrize("wrap", [
    lambda w, v: w, lambda w, v: dict(model=v, ema=w), lambda w, v: dict(model=w, opt={}, config={"lr": 1e-4}),
    lambda w, v: dict(model=v, ema=w, opt={}, args=argparse.Namespace(model="DiT-XL/2")),
    lambda w, v: {"module." + k: a for k, a in w.items()},
    lambda w, v: dict(ema={"module._orig_mod." + k: a for k, a in w.items()}, model=v)])
def test_public_layouts(tmp_path, wrap, second_time):
    net, other = small(second_time=second_time), small(1, second_time=second_time)
    torch.save(wrap(net.state_dict(), other.state_dict()), tmp_path / "net.pt")
    assert_same(net, weights.load(tmp_path / "net.pt"))


def test_safetensors(tmp_path):
    net = small()
    safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "net.safetensors")
    assert_same(net, weights.load(tmp_path / "net.safetensors"))


def test_our_own_checkpoint_keeps_what_no_shape_tells(tmp_path):
    options = dict(name="DDPM++", input_size=8, width=8, mult=(1, 1), blocks=1, attention=(), time_scale=8.0, sigma_data=0.6)
    net = models.create(**options).eval()
    checkpoints.save(tmp_path / "ckpt.pt", dict(method="facm", args=dict(net=options), step=1, model={},
                                                   ema=net.state_dict()))
    loaded = weights.load(tmp_path / "ckpt.pt", sigma_data=0.5)                      # the file takes precedence
    assert (loaded.time_scale, loaded.sigma_data) == (8.0, 0.6)
    assert torch.equal(loaded(torch.ones(1, 3, 8, 8), torch.ones(1)), net(torch.ones(1, 3, 8, 8), torch.ones(1)))


def test_a_learned_sigma_is_dropped(tmp_path):
    net = small(learn_sigma=True)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = weights.load(tmp_path / "net.pt")
    assert loaded.final_layer.linear.out_features == 2 * 3 * 4
    assert loaded(torch.ones(1, 3, 8, 8), torch.ones(1)).shape == (1, 3, 8, 8)


def test_what_no_shape_tells_is_an_option(tmp_path):
    torch.save(small(name="DiT").state_dict(), tmp_path / "net.pt")
    assert weights.load(tmp_path / "net.pt", heads=2).blocks[0].attn.heads == 2
    assert weights.load(tmp_path / "net.pt", prediction="noise").prediction == "noise"


@pytest.mark.parametrize("spoil, message", [
    (lambda w: w.pop("blocks.1.attn.proj.bias"), "lacks blocks.1.attn.proj.bias"),
    (lambda w: w.update(extra=torch.ones(1)), "unknown parameter extra"),
    (lambda w: w.update({"blocks.1.attn.proj.bias": torch.ones(3)}), "another shape of blocks.1.attn.proj.bias"),
    (lambda w: w.pop("final_layer.linear.weight"), "final_layer.linear.weight"),
    (lambda w: [w.pop(k) for k in list(w) if not k.startswith("blocks")], "unknown network"),
    (lambda w: w.clear(), "no weights")])
def test_weights_that_do_not_fit_are_an_error_with_the_name(tmp_path, spoil, message):
    stored = dict(small().state_dict())
    spoil(stored)
    torch.save(stored, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path / "net.pt")


class Harm:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["harm.pt", "harm.pth", "harm.ckpt", "harm.pkl"])
def test_nothing_in_a_file_is_executed(tmp_path, name):
    harm = Harm()
    harm.path = str(tmp_path / "harmed")
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(dict(ema=harm)))
    else:
        torch.save(dict(ema=harm), tmp_path / name)
    with pytest.raises(ValueError, match="mkdir"):
        weights.load(tmp_path / name)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors", "cut.pkl", "none.pt"])
def test_missing_and_damaged_files(tmp_path, name):
    torch.save(small().state_dict(), tmp_path / "net.pt")
    if name != "none.pt":
        (tmp_path / name).write_bytes((tmp_path / "net.pt").read_bytes()[:3000])
    with pytest.raises(ValueError, match=name):
        weights.load(tmp_path / name)


def pickle_as_edm_does(path, monkeypatch, outer=(), beside=(), **nets):
    """Writes a pickle as NVlabs/edm does, where an object is rebuilt from a dict of its class's source and state."""
    persistence = types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise RuntimeError", persistence.__dict__)
    persistence._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)

    class Persistent:
        def __init__(self, state):
            self.state = state

        def __reduce__(self):
            meta = dict(type="class", version=6, module_src="raise SystemExit", class_name="C", state=self.state)
            return persistence._reconstruct_persistent_obj, (meta,)

    def wrap(module):
        state = dict(vars(module), _modules=collections.OrderedDict(
            (k, wrap(child)) for k, child in module._modules.items() if child is not None))
        return Persistent({k: v for k, v in state.items() if k in ("training", "_parameters", "_buffers", "_modules")})

    precond = Persistent(dict(_parameters={}, _buffers={}, _modules={k: wrap(net) for k, net in nets.items()}, sigma_data=0.5, **dict(outer)))
    path.write_bytes(pickle.dumps(dict(ema=precond, loss_fn=Persistent(dict(P_mean=-1.2)), augment_pipe=None,
                                     **{k: Persistent(v) for k, v in dict(beside).items()})))


def test_edms_pickles(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = models.create("NCSN++", input_size=8, num_classes=4, width=8, mult=(1, 2), blocks=1, attention=(4,),
                        augment_dim=9, sigma_data=0.5, edm_time=True).eval()
    pickle_as_edm_does(tmp_path / "edm.pkl", monkeypatch, model=net)
    assert_same(net, weights.load(tmp_path / "edm.pkl"))
    pickle_as_edm_does(tmp_path / "odd.pkl", monkeypatch, dict(odd=argparse.Namespace()).items(), model=net)
    with pytest.raises(ValueError, match="argparse.Namespace"):
        weights.load(tmp_path / "odd.pkl")


@torch.no_grad()
def test_the_diffusers_names_of_an_autoencoder(tmp_path):
    stored, shapes = golden("vae-diffusers")
    filled = {}
    for name, w in shapes.items():
        u = uniform(name, w.shape)
        u = u * (3 / w[0].numel()) ** 0.5 if w.dim() > 1 else 0.1 * u + name.endswith("weight")
        filled[name] = torch.from_numpy(u).float()
    torch.save(filled, tmp_path / "vae.bin")
    net = weights.load(tmp_path / "vae.bin")
    mean, std = net.encode(normal_like("x", (1, 3, 32, 32)))
    for part, output in (("moments", torch.cat([mean, 2 * std.log()], 1)),
                         ("image", net.decode(normal_like("z", (1, 4, 8, 8))))):
        expected = stored["outputs"][part]
        error = sample(output, len(expected["values"])) - torch.tensor(expected["values"], dtype=torch.float64)
        assert error.abs().max() < 1e-5 * expected["scale"]


@pytest.mark.parametrize("extra", ["loss.logvar", "foundation_model.model.norm.weight", "linear_proj.weight"])
def test_what_an_autoencoder_needs_in_training_alone_is_left_out(tmp_path, extra):
    _, shapes = golden("vae-small")
    zeros = {"first_stage_model." + k: torch.zeros(w.shape) for k, w in shapes.items()}
    torch.save(dict(state_dict=zeros | {extra: torch.zeros(1)}), tmp_path / "vae.ckpt")
    assert weights.load(tmp_path / "vae.ckpt").factor == 4


def test_every_golden_file_is_used():
    used = "".join((GOLDEN.parent / f"test_{name}.py").read_text() for name in ("golden", "weights", "fid", "parity", "edm2"))
    for path in GOLDEN.iterdir():
        assert f'"{path.stem}"' in used or f'"{path.name}"' in used, path


# Which entry of a file contains the weights: the usual names of an average.

def held_by_ema_pytorch(average, net):
    """Returns the state of ema_pytorch's EMA, which contains the network twice, and numbers."""
    return {**{f"ema_model.{k}": w for k, w in average.items()}, **{f"online_model.{k}": w for k, w in net.items()},
            "initted": torch.tensor(True), "step": torch.tensor(7)}


def held_by_post_hoc_ema(average, net):
    """Returns the state of its PostHocEMA with two averages, of which FACM's authors use the second."""
    return {f"ema_models.{i}.{k}": w for i, of in enumerate((net, average)) for k, w in held_by_ema_pytorch(of, net).items()}


@pytest.mark.parametrize("file", [
    lambda a, w: dict(model=w, ema=a, opt={}, args=None), lambda a, w: dict(model=w, model_ema=a, step=3),
    lambda a, w: dict(model=w, ema_model=a), lambda a, w: dict(state_dict=w, state_dict_ema=a),
    lambda a, w: dict(state_dict=w, ema_state_dict={f"module.{k}": v for k, v in a.items()}),
    lambda a, w: dict(step=1, model=w, ema=held_by_ema_pytorch(a, w)), lambda a, w: dict(model=w, emas=held_by_post_hoc_ema(a, w)),
    lambda a, w: dict(state_dict={**{f"model.{k}": v for k, v in w.items()}, **{f"model_ema.{k}": v for k, v in a.items()},      # CompVis
                                  "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}),
    lambda a, w: held_by_ema_pytorch(a, w), lambda a, w: dict(model=a), lambda a, w: dict(state_dict=a, ema_decay=0.999),
    lambda a, w: dict(model=a, best=np.float64(1.5), epoch=np.int64(3), ema_rate=np.float32(0.1)),
    lambda a, w: dict(a)], ids=range(13))
def test_an_average_goes_before_the_weights_under_every_name(tmp_path, file):
    average, raw = {"a": torch.ones(2), "b.c": torch.zeros(3)}, {"a": torch.full((2,), 5.0), "b.c": torch.ones(3)}
    torch.save(file(average, raw), tmp_path / "x.pt")
    held, options = weights.read(tmp_path / "x.pt")
    assert options is None and held.keys() == average.keys() and all(torch.equal(held[k], average[k]) for k in held)


ONE, OTHER = {"a": torch.ones(2)}, {"a": torch.zeros(2)}


@pytest.mark.parametrize("file, places", [
    (dict(model=ONE, my_ema=OTHER), "model, my_ema"), (dict(net=ONE, EMA_1=OTHER), "net, EMA_1"),
    (dict(model=ONE, ema_params=[torch.zeros(2)]), "model, ema_params"),
    (dict(ema=ONE, ema_slow={"x": OTHER}), "ema, ema_slow.x, ema_slow"),
    (dict(model=ONE, avg_model=OTHER), "model, avg_model"), (dict(model=ONE, swa=dict(params=OTHER)), "model, swa.params"),
    (dict(nets=dict(student=ONE, target={"module.a": torch.zeros(2)})), "nets.student, nets.target"),
    (dict(state_dict=ONE, shadow=[dict(step=1), OTHER]), "state_dict, shadow.1"),
    (dict(model=ONE, polyak={"_orig_mod.module.a": torch.zeros(2)}), "model, polyak")], ids=range(9))
def test_an_average_of_an_unknown_name_is_not_passed_over(tmp_path, file, places):
    """If a file has two dicts of the same names and shapes, at any depth, the error asks for --weights KEY."""
    torch.save(file, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"has the keys {places}; choose one by --weights KEY"):
        weights.read(tmp_path / "x.pt")
    key = places.split(", ")[0]
    assert torch.equal(weights.read(tmp_path / "x.pt", key=key)[0]["a"], torch.ones(2))
    if len(places.split(", ")) == 2 and "params" not in places.split(".")[0]:
        other = places.split(", ")[1]
        assert torch.equal(weights.read(tmp_path / "x.pt", key=other)[0]["a"], torch.zeros(2))
    with pytest.raises(ValueError, match="--weights nothing names no weights in it"):
        weights.read(tmp_path / "x.pt", key="nothing")


def test_what_looks_alike_but_is_no_copy_of_the_weights_is_no_question(tmp_path):
    torch.save(dict(model=ONE, discriminator={"b": torch.zeros(2)}, optimizer=dict(state={0: dict(exp_avg=torch.zeros(2))})),
               tmp_path / "x.pt")
    assert torch.equal(weights.read(tmp_path / "x.pt")[0]["a"], torch.ones(2))


def test_what_no_shape_tells_is_said_when_it_is_assumed(tmp_path, capsys):
    """The prediction is assumed, and for an unpublished width the number of heads as well, unless --net gives them."""
    options = dict(name="DiT", input_size=8, in_channels=3, num_classes=4, patch=4, depth=1)
    for width, given, assumed in ((32, {}, "heads=1 prediction=velocity"), (384, {}, "prediction=velocity"),
                                  (32, dict(heads=4, prediction="noise"), None)):
        say_once.cache_clear()
        torch.save(models.create(**options, width=width, heads=given.get("heads", width // 64 or 1)).state_dict(), tmp_path / "x.pt")
        weights.load(tmp_path / "x.pt", **given)
        said = capsys.readouterr().err
        assert said == (f"{tmp_path}/x.pt: {assumed} is assumed, because the file does not contain it; --net changes it\n" if assumed else "")


def test_what_repa_needs_in_training_alone_is_left_out(tmp_path, capsys):
    net = models.create("DiT", input_size=8, in_channels=3, num_classes=4, patch=4, depth=1, width=32, heads=2)
    say_once.cache_clear()
    torch.save(dict(ema=net.state_dict() | {"projectors.0.0.weight": torch.zeros(2, 2)}), tmp_path / "x.pt")
    weights.load(tmp_path / "x.pt", heads=2)
    assert "its projectors.*, which only the training of REPA needs, are ignored" in capsys.readouterr().err
