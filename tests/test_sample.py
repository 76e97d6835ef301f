"""Tests sample.py: samples that do not depend on batches, processes or interruptions, its files and its errors."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from formula import fill
from oracle import Gaussian
from PIL import Image
from test_data import small_vae
from test_training import FLOW, TINY, call, popen, popen_two, refused, run_two, torchrun

import data
import facm
import flow
import models
import sample
from common import checkpoints, evaluation, seeds, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a folder with a student, ckpt.pt, and its teacher, teacher.pt."""
    out = tmp_path_factory.mktemp("sample") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, flow, *FLOW, "--steps", 3, "--lr", "3e-3", "--out", out.with_name("flow"))
        call(patch, facm, *TINY, "--teacher", out.with_name("flow"), "--steps", 3, "--lr", "3e-3", "--out", out)
    shutil.copy(out.with_name("flow") / "ckpt.pt", out / "teacher.pt")
    return out


def read(path):
    with np.load(path) as f:
        assert f.files == ["arr_0", "arr_1"]
        return f["arr_0"], f["arr_1"]


def draw(monkeypatch, folder, out, *flags, ckpt="ckpt.pt"):
    call(monkeypatch, sample, "--ckpt", folder / ckpt, "--out", out, "--device", "cpu", *flags)
    return read(out)


def pngs(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".png"))


# The same samples

def test_a_sample_does_not_depend_on_batch_or_processes(trained, tmp_path, monkeypatch):
    images, labels = draw(monkeypatch, trained, tmp_path / "a.npz", "--n", 11, "--nfe", 2)
    assert images.shape == (11, 12, 12, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(11)]
    one_by_one, _ = draw(monkeypatch, trained, tmp_path / "b.npz", "--n", 11, "--nfe", 2, "--batch", 1)
    fewer, _ = draw(monkeypatch, trained, tmp_path / "c.npz", "--n", 5, "--nfe", 2, "--batch", 3)
    run_two("--ckpt", trained / "ckpt.pt", "--out", tmp_path / "d.npz", "--samples", 11, "--nfe", 2, "--device", "cpu",
            script="sample.py")
    with np.load(tmp_path / "d.npz") as f:
        two_processes = f["arr_0"]
    assert np.array_equal(images, one_by_one)
    assert np.array_equal(images[:5], fewer)
    assert np.array_equal(images, two_processes)
    assert not np.array_equal(images, draw(monkeypatch, trained, tmp_path / "e.npz", "--n", 11, "--nfe", 2, "--seed", 1)[0])


def test_a_hundred_in_batches_of_7_and_64_and_in_two_processes(trained, tmp_path, monkeypatch):
    """100 samples are two batches of the network, of which the second is not full. Two processes draw one each."""
    flags = ["--n", 100, "--nfe", 2]
    images, labels = draw(monkeypatch, trained, tmp_path / "7.npz", *flags, "--batch", 7)
    assert images.shape[0] == 100 and np.bincount(labels).tolist() == [10] * 10
    assert np.array_equal(images, draw(monkeypatch, trained, tmp_path / "64.npz", *flags, "--batch", 64)[0])
    assert np.array_equal(images[:70], draw(monkeypatch, trained, tmp_path / "70.npz", "--n", 70, "--nfe", 2)[0])
    for name in ("two.npz", "two"):
        run_two("--ckpt", trained / "ckpt.pt", "--out", tmp_path / name, "--samples", 100, "--nfe", 2, "--batch", 7,
                "--device", "cpu", script="sample.py")
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "7.npz").read_bytes()
    assert np.array_equal(images, [np.asarray(Image.open(tmp_path / "two" / name)) for name in pngs(tmp_path / "two")])


@pytest.mark.parametrize("options", [
    dict(name="DDPM++", input_size=8, in_channels=4, num_classes=4, width=32, mult=(1, 2), blocks=1, attention=(4,)),
    dict(name="DiT", input_size=8, num_classes=4, width=64, depth=2, heads=4),
    dict(name="LightningDiT", input_size=4, num_classes=4, patch=1, width=96, depth=2, heads=3)], ids=lambda o: o["name"])
def test_every_network_gives_the_same_floats_whatever_the_number(options):
    """The networks round differently for other numbers of rows, so that draw_batch always passes the same number."""
    net = fill(models.create(**options))
    checkpoint = dict(method="flow", step=1, args=dict(net=weights.options_from_shapes(net.state_dict())))
    chosen = sample.choose_sampler(net, checkpoint, 2, cfg=2.0)
    labels = torch.arange(130) % 4
    whole = sample.draw_batch(net, checkpoint, chosen, 0, 0, labels)
    for first, n in ((0, 1), (0, 7), (64, 64), (64, 9), (128, 2)):
        assert torch.equal(whole[first:first + n],
                           sample.draw_batch(net, checkpoint, chosen, 0, first, labels[first:first + n]))


def test_more_steps_share_the_first_noise():
    assert torch.equal(sample.draw_noise(0, [4, 9], 3, (1, 2, 2))[0], sample.draw_noise(0, [4, 9], 1, (1, 2, 2))[0])


# Which weights, samplers, options

def test_weights_and_samplers_are_the_ones_asked_for(trained, tmp_path, monkeypatch):
    labels = torch.arange(64) % 10
    for flags, part, ckpt, sampler in (
            ([], "ema", "ckpt.pt", facm.sample),
            (["--raw"], "model", "ckpt.pt", facm.sample),
            (["--sampler", "euler"], "ema", "ckpt.pt", facm.sample_euler),
            ([], "ema", "teacher.pt", flow.integrate),
            (["--cfg", "1.75"], "ema", "teacher.pt", functools.partial(flow.integrate, cfg=1.75, y_null=10))):
        checkpoint = checkpoints.read(trained / ckpt)
        net = models.create(**checkpoint["args"]["net"]).eval()
        net.load_state_dict(checkpoint[part])
        noise = sample.draw_noise(0, range(64), 3, (3, 12, 12))
        expected = sample.data.to_uint8(sampler(net, noise, labels, nfe=3)).numpy()
        images, _ = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 64, "--nfe", 3, *flags, ckpt=ckpt)
        assert np.array_equal(images, expected), flags


@pytest.mark.parametrize("nfe", [1, 3, 7, 20])
@pytest.mark.parametrize("w", [1.0, 1.75])
def test_euler_of_a_teacher_is_facms_to_the_last_bit(trained, nfe, w):
    """The reference is FACM's Euler sampler under the auxiliary condition, with the same t_low for guidance."""
    net, checkpoint = sample.load(trained / "teacher.pt")
    noise, y = sample.draw_noise(0, range(64), 1, (3, 12, 12)), torch.arange(64) % 10
    guidance = dict(cfg=w, cfg_interval=(0.125, 1.0)) if w != 1 else {}
    euler = sample.choose_sampler(net, checkpoint, nfe, **guidance)
    expected = facm.sample_euler(lambda x, t, s, y: net(x, t, None, y), noise, y, nfe=nfe, condition="auxiliary", w=w, y_null=10)
    assert torch.equal(euler.draw(noise, y), expected)


def test_guidance_of_the_teacher(trained, tmp_path, monkeypatch):
    plain, _ = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 4, "--nfe", 3, ckpt="teacher.pt")
    guided, _ = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 4, "--nfe", 3, "--cfg", 4, ckpt="teacher.pt")
    assert not np.array_equal(plain, guided)


def test_orders_of_euler_and_heun_and_their_evaluations():
    """On Gaussian data, whose flow is known, the error falls as 1/steps (Euler) and as 1/steps^2 (Heun)."""
    gaussian, calls = Gaussian(), []
    noise = torch.randn((1, 16, 2, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = gaussian.flow_map(noise[0], 0.0, 1.0)

    def v(x, t, s, y):
        calls.append(t)
        return gaussian.velocity(x, t)

    for name, order in (("euler", 1), ("heun", 2)):
        for shift in (1.0, 0.5):
            errors = []
            for nfe in (39, 79):
                calls.clear()
                found = flow.SAMPLERS[name](v, noise, torch.zeros(16, dtype=torch.int64), nfe=nfe, shift=shift)
                errors.append((found - exact).abs().max())
                assert len(calls) == nfe
            assert 0.7 < (errors[0] / errors[1]).log2() / order < 1.3


def test_shift_interval_and_channels_of_guidance():
    seen = []

    def v(x, t, s, y):
        seen.append((round(t[0].item(), 6), len(t) > 2))
        return y[:, None, None, None].to(x) * torch.ones_like(x)               # 1: conditional, 9: not

    noise, y = torch.zeros(1, 2, 4, 2, 2), torch.ones(2, dtype=torch.int64)
    x = flow.integrate(v, noise, y, nfe=4, y_null=9, cfg=2.0, cfg_interval=(0.1, 0.5), cfg_channels=3, shift=0.3)
    u = np.arange(4) / 4
    times = 0.3 * u / (1 + (0.3 - 1) * u)                                      # LightningDiT's, noise at 0
    assert [t for t, _ in seen] == times.round(6).tolist()
    assert [g for _, g in seen] == [False, False, True, True] == [0.1 <= t <= 0.5 for t in times]
    sigma = (1 / 0.3) * (1 - u) / (1 + (1 / 0.3 - 1) * (1 - u))                # SD3's Eq. 23
    assert np.allclose(1 - times, sigma)
    guided = 1 - times[2]                                                      # 9 + 2 (1 - 9) = -7, from there on
    assert torch.allclose(x[:, :3], torch.tensor(times[2] - 7 * guided).float())
    assert torch.allclose(x[:, 3], torch.ones(()))


def test_a_methods_own_samplers_and_their_options(trained, tmp_path, monkeypatch, capsys):
    """sample.py uses the samplers, defaults and options that the script of a method defines, here a made-up gcm.py."""
    def restart(net, noise, y, nfe, times=(0.5,), scale=1.0):
        if len(times) != nfe - 1:
            raise ValueError(f"--times: {nfe - 1} are needed")
        return scale * noise[:nfe].sum(0) * times[0]

    module = types.ModuleType("gcm")
    module.SAMPLERS = {"restart": restart, "one": lambda net, noise, y, nfe: noise[0] * 0 + len(noise)}
    module.DETERMINISTIC, module.default_sampler = ("one",), lambda nfe, args: "one" if nfe == 1 else "restart"
    module.sampler_options = lambda args: {"restart": dict(scale=args["seed"] + 0.25), "one": {}}
    monkeypatch.setitem(sys.modules, "gcm", module)
    checkpoint = checkpoints.read(trained / "ckpt.pt") | dict(method="gcm")
    checkpoints.save(tmp_path / "ckpt.pt", checkpoint)

    images, _ = draw(monkeypatch, tmp_path, tmp_path / "x.npz", "--n", 3, "--nfe", 2, "--times", 0.75)
    noise = sample.draw_noise(0, range(3), 2, (3, 12, 12))
    assert np.array_equal(images, data.to_uint8(0.25 * 0.75 * noise.sum(0)))
    assert (draw(monkeypatch, tmp_path, tmp_path / "x.npz", "--n", 3)[0] == 255).all()
    flags = ["--ckpt", tmp_path / "ckpt.pt", "--out", tmp_path / "y.npz", "--device", "cpu"]
    capsys.readouterr()
    assert "--times: 1 are" in refused(monkeypatch, capsys, sample, *flags, "--nfe", 2, "--times", 0.2, 0.1)
    assert "--times" in refused(monkeypatch, capsys, sample, *flags, "--times", 0.2)
    assert "--n-ode" in refused(monkeypatch, capsys, sample, *flags, "--nfe", 2, "--n-ode", 1)
    assert not list(tmp_path.glob("y*"))
    del module.SAMPLERS["restart"]
    assert "restart" in refused(monkeypatch, capsys, sample, *flags, "--nfe", 2)


def test_a_method_without_its_script(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "decm", None)
    checkpoints.save(tmp_path / "ckpt.pt", checkpoints.read(trained / "ckpt.pt") | dict(method="decm"))
    assert "decm.py" in refused(monkeypatch, capsys, sample, "--ckpt", tmp_path / "ckpt.pt", "--out", tmp_path / "x.npz")
    checkpoints.save(tmp_path / "ckpt.pt", checkpoints.read(trained / "ckpt.pt") | dict(method="os"))
    assert "'os'" in refused(monkeypatch, capsys, sample, "--ckpt", tmp_path / "ckpt.pt", "--out", tmp_path / "x.npz")


def test_labels(trained, tmp_path, monkeypatch):
    _, labels = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 5, "--labels", "3,3,7")
    assert labels.tolist() == [3, 3, 7, 3, 3]
    _, labels = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 50, "--labels", "random")
    assert 1 < len(set(labels.tolist())) <= 10 and labels.max() < 10
    _, labels = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 43)
    assert np.bincount(labels).tolist() == [5, 5, 5, 4, 4, 4, 4, 4, 4, 4]


# Public networks, latents

SMALL = dict(name="LightningDiT", input_size=3, in_channels=4, num_classes=4, patch=1, width=32, depth=1, heads=2)


def public(folder, **options):
    net = fill(models.create(**(SMALL | options)))
    torch.save(dict(ema=net.state_dict()), folder / "public.pt")
    return net


def test_latents_of_a_public_network_become_images(tmp_path, monkeypatch, capsys):
    net, vae = public(tmp_path), small_vae(tmp_path)
    torch.save(dict(mean=torch.arange(4.0).view(1, 4, 1, 1) / 9, std=torch.full((1, 4, 1, 1), 0.5)), tmp_path / "stats.pt")
    flags = ["--method", "flow", "--nfe", 3, "--n", 10, "--labels", "1", "--sampler", "heun", "--cfg", 1.5]
    latents = ["--vae", tmp_path / "vae.pt", "--latent-stats", tmp_path / "stats.pt"]
    images, _ = draw(monkeypatch, tmp_path, tmp_path / "x.npz", *flags, *latents, ckpt="public.pt")
    with torch.no_grad():
        noise, y = sample.draw_noise(0, range(10), 1, (4, 3, 3)), torch.ones(10, dtype=torch.int64)
        z = flow.integrate(net, noise, y, nfe=3, y_null=4, cfg=1.5, heun=True)
        expected = data.to_uint8(vae.decode(z * 0.5 + torch.arange(4.0).view(1, 4, 1, 1) / 9)).numpy()
    assert images.shape == (10, 12, 12, 3)
    assert np.abs(images.astype(int) - expected).max() <= 1                    # `expected` has 10 rows, not 64
    flags = ["--ckpt", tmp_path / "public.pt", "--out", tmp_path / "y.npz", "--method", "flow"]
    capsys.readouterr()
    assert "--vae" in refused(monkeypatch, capsys, sample, *flags)
    assert "--latent-stats" in refused(monkeypatch, capsys, sample, *flags, *latents[:2])
    assert "nowhere" in refused(monkeypatch, capsys, sample, *flags, *latents[:3], tmp_path / "nowhere")
    assert "autoencoder" in refused(monkeypatch, capsys, sample, *flags, "--vae", tmp_path / "public.pt")
    assert "autoencoder" in refused(monkeypatch, capsys, sample, "--ckpt", tmp_path / "vae.pt", *flags[2:])
    assert "--method" in refused(monkeypatch, capsys, sample, *flags[:4])
    assert not list(tmp_path.glob("y*"))


def test_latents_go_back_as_the_data_set_made_them(tmp_path):
    """Latents are decoded with the statistics of the data that the checkpoint names, or with the SD-VAE's scale."""
    folder, vae = tmp_path / "z", small_vae(tmp_path)
    folder.mkdir()
    z = torch.randn(2, 4, 3, 3)
    torch.save(dict(mean=torch.full((4,), 0.3), std=torch.full((4,), 2.0)), folder / "latents_stats.pt")
    for args, stats in (({"data": "imagenet_latents", "data_dir": str(folder)}, None), ({"data": str(folder)}, None),
                        ({"data": "gone"}, folder)):
        checkpoint = dict(args=args | dict(net=dict(in_channels=4)))
        decode, factor, _ = sample.load_decoder(tmp_path / "vae.pt", stats, checkpoint)
        assert factor == 4 and torch.equal(decode((z - 0.3) / 2), vae.decode((z - 0.3) / 2 * 2 + 0.3))
    (folder / "latents_stats.pt").unlink()
    decode, _, _ = sample.load_decoder(tmp_path / "vae.pt", folder, checkpoint)
    assert torch.allclose(decode(0.18215 * z), vae.decode(z), atol=1e-5)
    with pytest.raises(ValueError, match="gone"):
        sample.load_decoder(tmp_path / "vae.pt", None, checkpoint)


def test_a_public_student_of_facm(tmp_path, monkeypatch):
    """FACM's released network has a second time, and --method facm samples it under the auxiliary condition."""
    net = public(tmp_path, in_channels=3, input_size=12, second_time=True)
    images, _ = draw(monkeypatch, tmp_path, tmp_path / "x.npz", "--n", 64, "--nfe", 2, "--method", "facm", ckpt="public.pt")
    noise = sample.draw_noise(0, range(64), 2, (3, 12, 12))
    expected = facm.sample(net, noise, torch.arange(64) % 4, nfe=2, condition="auxiliary")
    assert np.array_equal(images, data.to_uint8(expected))


def test_options_that_a_public_file_does_not_tell(tmp_path, monkeypatch, capsys):
    net = fill(models.create("DiT", input_size=12, in_channels=3, num_classes=4, width=32, depth=1, heads=2,
                             prediction="noise"))
    torch.save(net.state_dict(), tmp_path / "dit.pt")
    flags = ["--n", 64, "--nfe", 2, "--method", "flow", "--net", "prediction=noise", "heads=2"]
    images, _ = draw(monkeypatch, tmp_path, tmp_path / "x.npz", *flags, ckpt="dit.pt")
    noise, y = sample.draw_noise(0, range(64), 1, (3, 12, 12)), torch.arange(64) % 4
    assert np.array_equal(images, data.to_uint8(flow.integrate(net, noise, y, nfe=2)))
    flags = ["--ckpt", tmp_path / "dit.pt", "--out", tmp_path / "y.npz", *flags[:-2]]
    capsys.readouterr()
    assert "hands" in refused(monkeypatch, capsys, sample, *flags, "hands=2")


# What is written

def test_grid_and_folder(trained, tmp_path, monkeypatch):
    flags = ["--ckpt", trained / "ckpt.pt", "--n", 20, "--device", "cpu", "--out"]
    call(monkeypatch, sample, *flags, tmp_path / "deep" / "grid.png")
    assert Image.open(tmp_path / "deep" / "grid.png").size == (10 * 60, 2 * 60)
    call(monkeypatch, sample, *flags, tmp_path / "folder")
    names = pngs(tmp_path / "folder")
    assert len(names) == 20 and names[13] == "000013-class3.png"
    images, _ = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 20)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / names[13])), images[13])


def test_a_grid_of_several_nfe_shows_the_same_seeds(trained, tmp_path, monkeypatch):
    call(monkeypatch, sample, "--ckpt", trained / "ckpt.pt", "--grid", 1, 4, "--n", 6, "--device", "cpu", "--out",
         tmp_path / "grid.png")
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    margin = sheet.shape[1] - 6 * 60
    assert sheet.shape[0] == 2 * 60 and margin > 40
    for row, nfe in enumerate((1, 4)):
        images, _ = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 6, "--nfe", nfe)
        strip = np.concatenate(images, axis=1).repeat(5, 0).repeat(5, 1)
        assert np.array_equal(sheet[row * 60:(row + 1) * 60, margin:], strip)
        assert 10 < (sheet[row * 60:(row + 1) * 60, :margin] < 128).sum() < 2000       # a label, black on white


def test_a_new_npz_takes_the_place_of_an_old_one(trained, tmp_path, monkeypatch):
    first, _ = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 4)
    second, _ = draw(monkeypatch, trained, tmp_path / "x.npz", "--n", 5, "--seed", 1)
    assert len(second) == 5 and not np.array_equal(first, second[:4]) and os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.parametrize("name, processes", [("x.npz", 1), ("x", 2)])
def test_killed_and_continued_is_uninterrupted(trained, tmp_path, monkeypatch, name, processes):
    """After kill -9, another number of processes with another --batch continues, and the samples are the same."""
    flags = ["--ckpt", str(trained / "teacher.pt"), "--out", str(tmp_path / name), "--samples", "384", "--nfe", "8",
             "--cfg", "2", "--device", "cpu"]
    begun = [popen(*flags, script="sample.py")] if processes == 1 else popen_two(*flags, script="sample.py")
    done = tmp_path / (f"{name}.partial" if name.endswith("npz") else name) / "done"
    while not done.exists() or sum(done.read_bytes()) < 64:
        for process in begun:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    for process in begun:
        process.kill()
    for process in begun:
        process.communicate()
    assert 64 <= sum(done.read_bytes()) < 384 and not (tmp_path / "x.npz").exists()

    if processes == 1:
        torchrun(*flags, "--batch", 100, script="sample.py")
    else:
        call(monkeypatch, sample, *flags, "--batch", 100)
    whole, _ = draw(monkeypatch, trained, tmp_path / "whole.npz", *flags[4:], ckpt="teacher.pt")
    if name == "x":
        assert len(pngs(tmp_path / name)) == 384
        images = [np.asarray(Image.open(tmp_path / name / png)) for png in pngs(tmp_path / name)]
    else:
        images, _ = read(tmp_path / name)
        assert not done.parent.exists()
    assert np.array_equal(images, whole)


def test_ctrl_c_leaves_what_can_be_continued(trained, tmp_path, monkeypatch, capsys):
    """After SIGINT in the third of four batches, the same command draws the two batches that are missing."""
    flags = ["--ckpt", trained / "teacher.pt", "--out", tmp_path / "x.npz", "--n", 256, "--nfe", 2, "--device", "cpu"]
    honest, firsts = sample.draw_batch, []

    def interrupted(*args):
        firsts.append(args[4])
        if len(firsts) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(*args)

    monkeypatch.setattr(sample, "draw_batch", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a program in the background ignores SIGINT
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, sample, *flags)
    assert end.value.code == 130 and "same command continues" in capsys.readouterr().err
    assert sum((tmp_path / "x.npz.partial/done").read_bytes()) == 128
    call(monkeypatch, sample, *flags)
    assert firsts == [0, 64, 128, 128, 192] and len(read(tmp_path / "x.npz")[0]) == 256


@pytest.mark.parametrize("name", ["x.npz", "x"])
@pytest.mark.parametrize("change", [["--seed", 1], ["--nfe", 2], ["--n", 9], ["--labels", "1"], ["--sampler", "euler"],
                                    ["--raw"]], ids=lambda c: c[0])
def test_other_settings_are_not_mixed_in(trained, tmp_path, monkeypatch, capsys, name, change):
    flags = ["--ckpt", trained / "ckpt.pt", "--out", tmp_path / name, "--n", 8, "--device", "cpu"]
    folder = tmp_path / (f"{name}.partial" if name.endswith("npz") else name)

    def full(*args, **options):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sample, "write_at", full)
        call(patch, sample, *flags)
    assert "error: the disk is full; the samples that were written are kept" in capsys.readouterr().err
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "another --out" in refused(monkeypatch, capsys, sample, *flags, *change)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    call(monkeypatch, sample, *flags)


def test_a_folder_of_others_is_left_alone(trained, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (12, 12)).save(tmp_path / "mine.png")
    line = refused(monkeypatch, capsys, sample, "--ckpt", trained / "ckpt.pt", "--out", tmp_path)
    assert "another --out" in line and os.listdir(tmp_path) == ["mine.png"]


def peak_memory(folder, out, n):
    """Returns the peak memory, in KiB, of a process that draws n samples."""
    code = ("import resource, runpy, sys; sys.path.insert(0, '.'); sys.argv[0] = 'sample.py'\n"
            "runpy.run_path('sample.py', run_name='__main__')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    flags = ["--ckpt", folder / "ckpt.pt", "--out", out, "--n", n, "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_number(tmp_path):
    """30,000 images take 92 MB, and their noise four times as much, but memory grows by less than 20 MB."""
    net = models.create("DiT", input_size=32, in_channels=3, num_classes=4, patch=8, width=16, depth=1, heads=2).eval()
    args = dict(net=dict(name="DiT", input_size=32, in_channels=3, num_classes=4, patch=8, width=16, depth=1, heads=2))
    checkpoints.save(tmp_path / "ckpt.pt", dict(method="facm", args=args, step=1, model={}, ema=net.state_dict()))
    few, many = (peak_memory(tmp_path, tmp_path / "x.npz", n) for n in (1000, 30_000))
    assert len(read(tmp_path / "x.npz")[0]) == 30_000
    assert many - few < 20_000, (few, many)


# Errors

@pytest.mark.parametrize("flags, words", [
    (["--nfe", "0"], "at least 1"),
    (["--n", "0"], "at least 1"),
    (["--batch", "0"], "at least 1"),
    (["--grid", "1", "0"], "at least 1"),
    (["--labels", "3,10"], "10 classes"),
    (["--labels", "-1"], "10 classes"),
    (["--labels", "cat"], "cat"),
    (["--cfg", "2"], "flow-matching networks"),
    (["--shift", "2"], "--shift"),
    (["--shift", "0"], "0.001 to 1000"),
    (["--cfg-interval", "0", "0.5"], "--cfg-interval"),
    (["--method", "decm"], "second time"),
    (["--times", "0.5"], "--times"),
    (["--n-ode", "1"], "--n-ode"),
    (["--sampler", "heun"], "heun"),
    (["--vae", "vae.pt"], "draws images"),
    (["--net", "heads=2"], "--net and --weights are for public files"),
    (["--net", "heads"], "KEY=VALUE"),
    (["--method", "flux"], "flux"),
    (["--ckpt", "nowhere.pt"], "nowhere.pt"),
])
def test_bad_flags_end_in_one_line(trained, tmp_path, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, sample, "--ckpt", trained / "ckpt.pt", "--out", tmp_path / "x.png", *flags)
    assert not (tmp_path / "x.png").exists()


def test_bad_flags_of_a_teacher_and_of_the_output(trained, tmp_path, monkeypatch, capsys):
    for flags, words in ((["--out", tmp_path / "x.npz", "--sampler", "heun", "--nfe", 4], "odd"),
                         (["--out", tmp_path / "x.npz", "--sampler", "cm"], "euler, heun"),
                         (["--out", tmp_path / "x.npz", "--times", "0.5"], "--times"),
                         (["--out", tmp_path / "x.npz", "--grid", 1], "NAME.png"),
                         (["--out", tmp_path / "x.npz", "--cfg", "nan"], "finite"),
                         (["--out", tmp_path / "x.npz", "--cfg-interval", 0, 0.5], "add --cfg"),
                         (["--out", tmp_path / "x.npz", "--cfg-channels", 1], "add --cfg"),
                         (["--out", tmp_path / "x.npz", "--cfg", 2, "--cfg-interval", 0.8, 0.2], "T0 <= T1"),
                         (["--out", tmp_path / "x.npz", "--cfg", 2, "--cfg-channels", 4], "--cfg-channels 4"),
                         (["--out", trained / "ckpt.pt"], "another --out"),
                         (["--out", trained / "ckpt.pt" / "x.npz"], "x.npz.partial")):
        line = refused(monkeypatch, capsys, sample, "--ckpt", trained / "teacher.pt", *flags)
        assert re.search(words, line) and not list(tmp_path.iterdir())
    (tmp_path / "x.npz").mkdir()
    assert "folder" in refused(monkeypatch, capsys, sample, "--ckpt", trained / "ckpt.pt", "--out", tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.npz", "x", "x.png"])
def test_samples_that_are_not_finite_are_not_written_as_black_images(trained, tmp_path, monkeypatch, capsys, name):
    checkpoint = checkpoints.read(trained / "ckpt.pt")
    next(iter(checkpoint["ema"].values())).fill_(float("nan"))
    checkpoints.save(tmp_path / "nan.pt", checkpoint)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, sample, "--ckpt", tmp_path / "nan.pt", "--n", 3, "--device", "cpu", "--out", tmp_path / name)
    assert end.value.code == 2 and "error: samples from number 0 on are not finite" in capsys.readouterr().err
    assert not (tmp_path / name).exists() or not pngs(tmp_path / name)


def test_a_finished_folder_is_left_as_it_is(trained, tmp_path, monkeypatch):
    flags = ["--ckpt", trained / "ckpt.pt", "--n", 3, "--device", "cpu", "--out", tmp_path / "f"]
    call(monkeypatch, sample, *flags)
    settings = json.loads((tmp_path / "f/settings.json").read_text())
    assert settings["n"] == 3 and settings["options"] == dict(condition="expanded")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()}
    call(monkeypatch, sample, *flags, "--batch", 1)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()} == before and len(before) == 5


def test_every_sample_has_a_noise_of_its_own():
    noise = sample.draw_noise(3, [4, 9], 2, (1, 2, 2))
    for k, i in enumerate((4, 9)):
        assert torch.equal(noise[:, k], torch.randn((2, 1, 2, 2), generator=seeds.generator("cpu", 3, "sample", i)))
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_a_network_trained_without_its_labels_draws_the_null_label(trained, tmp_path, monkeypatch, capsys):
    """With --uncond and a teacher of ten classes only the null label is trained, so previews, evaluations and samples have it."""
    seen = []
    honest = facm.sample
    monkeypatch.setattr(facm, "sample", lambda net, noise, y, **options: (seen.append(y.tolist()), honest(net, noise, y, **options))[1])
    monkeypatch.setitem(facm.SAMPLERS, "cm", facm.sample)
    call(monkeypatch, facm, *TINY, "--teacher", trained / "teacher.pt", "--uncond", "--w", 1, "--steps", 1, "--preview-every", 1,
         "--out", tmp_path / "run")
    call(monkeypatch, sample, "--ckpt", tmp_path / "run/ckpt.pt", "--n", 4, "--device", "cpu", "--out", tmp_path / "x.npz")
    assert len(seen) == 3 and set(seen[0]) == set(seen[1]) == {10} and seen[2][:4] == [10] * 4      # the others fill the batch
    assert read(tmp_path / "x.npz")[1].tolist() == [10] * 4
    capsys.readouterr()
    line = refused(monkeypatch, capsys, sample, "--ckpt", tmp_path / "run/ckpt.pt", "--labels", "3", "--device", "cpu")
    assert "--labels 3: the network was trained without labels" in line
    net, checkpoint = sample.load(tmp_path / "run/ckpt.pt")
    chosen, labels = sample.choose_sampler(net, checkpoint, 1), []
    monkeypatch.setattr(sample, "draw_batch", lambda *args, honest=sample.draw_batch: (labels.extend(args[5].tolist()), honest(*args))[1])
    monkeypatch.setattr(evaluation.fid, "collect", lambda *args, **options: None)
    monkeypatch.setattr(evaluation.fid, "compare_once", lambda *args: {})
    evaluation.measure(net, checkpoint, chosen, 5, evaluation.Judge(None, "", dict(mu=torch.zeros(1))), lambda x: x, "cpu")
    assert labels == [10] * 5


def test_random_labels_follow_the_seed():
    a, again, b = (sample.choose_labels("random", 50, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)


def test_images_of_another_autoencoder_are_not_mixed_in(tmp_path, monkeypatch, capsys):
    public(tmp_path), small_vae(tmp_path)
    for k in range(2):
        torch.save(dict(mean=torch.full((4,), float(k)), std=torch.ones(4)), tmp_path / f"{k}.pt")
    flags = ["--ckpt", tmp_path / "public.pt", "--method", "flow", "--n", 3, "--out", tmp_path / "x", "--device", "cpu",
             "--vae", tmp_path / "vae.pt", "--latent-stats"]
    call(monkeypatch, sample, *flags, tmp_path / "0.pt")
    capsys.readouterr()
    assert "decoder" in refused(monkeypatch, capsys, sample, *flags, tmp_path / "1.pt")


def test_a_flow_with_a_second_time_is_asked_for_the_velocity():
    """The velocity is F(x_t, t, t), which the network returns for s = None."""
    net = models.create("DiT", input_size=8, in_channels=3, num_classes=4, patch=4, width=16, depth=1, heads=2,
                        second_time=True)
    fill(net)
    checkpoint = dict(method="flow", step=1, args=dict(net=weights.options_from_shapes(net.state_dict())))
    images = sample.draw(net, checkpoint, 2, torch.arange(64) % 4)
    noise = sample.draw_noise(0, range(64), 1, (3, 8, 8))
    expected = flow.integrate(lambda x, t, s, y: net(x, t, t, y), noise, torch.arange(64) % 4, nfe=2)
    assert np.array_equal(images, data.to_uint8(expected))


def test_nothing_of_others_is_overwritten(trained, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "mine.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "mine/cat").mkdir(parents=True)
    before = (tmp_path / "mine.npz").read_bytes()
    for out in ("mine.npz", "mine"):
        words = refused(monkeypatch, capsys, sample, "--ckpt", trained / "ckpt.pt", "--n", 2, "--out", tmp_path / out,
                        "--device", "cpu")
        assert "another --out" in words
    assert (tmp_path / "mine.npz").read_bytes() == before and [p.name for p in (tmp_path / "mine").iterdir()] == ["cat"]


def test_a_folder_that_was_only_just_begun_is_ours(trained, tmp_path, monkeypatch):
    (tmp_path / "x.npz.partial").mkdir()
    (tmp_path / "x.npz.partial/done").write_bytes(b"0")
    call(monkeypatch, sample, "--ckpt", trained / "ckpt.pt", "--n", 2, "--out", tmp_path / "x.npz", "--device", "cpu")
    assert read(tmp_path / "x.npz")[0].shape == (2, 12, 12, 3)


@pytest.mark.parametrize("flags, words", [
    (["--cfg-channels", "0"], "at least 1"), (["--shift", "1e300"], "0.001 to 1000"), (["--out", "x.JPG"], "format cannot be written"),
    (["--out", "x.PNG"], "format cannot be written")], ids=str)
def test_more_senseless_flags(trained, tmp_path, monkeypatch, capsys, flags, words):
    flags = ["--ckpt", trained / "teacher.pt", "--out", tmp_path / "x.npz", *flags]
    assert words in refused(monkeypatch, capsys, sample, *flags)


def test_an_exported_network_draws_the_same(trained, tmp_path, monkeypatch, capsys):
    """The float16 weights of --export draw the same samples up to rounding. The default picture has the file's name."""
    call(monkeypatch, sample, "--ckpt", trained / "ckpt.pt", "--export", tmp_path / "small.safetensors", "--device", "cpu")
    assert (tmp_path / "small.safetensors").stat().st_size < (trained / "ckpt.pt").stat().st_size / 4
    flags = ["--nfe", 2, "--n", 8, "--device", "cpu", "--out"]
    call(monkeypatch, sample, "--ckpt", trained / "ckpt.pt", *flags, tmp_path / "a.npz")
    call(monkeypatch, sample, "--ckpt", tmp_path / "small.safetensors", *flags, tmp_path / "b.npz")
    (a, labels), (b, same) = read(tmp_path / "a.npz"), read(tmp_path / "b.npz")
    assert np.array_equal(labels, same) and np.abs(a.astype(int) - b).max() <= 3       # float16 has 11 bits
    call(monkeypatch, sample, "--ckpt", tmp_path / "small.safetensors", "--n", 8, "--device", "cpu")
    assert (tmp_path / "small-nfe1.png").exists()
    with pytest.raises(ValueError, match="is not a checkpoint of a training script"):
        safetensors.torch.save_file(dict(w=torch.zeros(1)), tmp_path / "other.safetensors", dict(format="pt"))
        checkpoints.read(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["ckpt", "teacher"])
def test_an_exported_network_is_read_as_its_checkpoint_is(trained, tmp_path, monkeypatch, name):
    """weights.read finds the options of the network. weights.load refuses a consistency model as a velocity network."""
    call(monkeypatch, sample, "--ckpt", trained / f"{name}.pt", "--export", tmp_path / "x.safetensors", "--device", "cpu")
    given, options = weights.read(trained / f"{name}.pt")
    exported, same = weights.read(tmp_path / "x.safetensors")
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()} == same
    assert all(torch.equal(w, given[k].half()) for k, w in exported.items()) and exported.keys() == given.keys()
    if name == "teacher":
        assert weights.load(tmp_path / "x.safetensors", velocity=True).num_classes == options["num_classes"]
    else:
        with pytest.raises(ValueError, match="is a consistency model and not a velocity network"):
            weights.load(tmp_path / "x.safetensors", velocity=True)


def test_an_export_that_cannot_be_written_is_one_line(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be written" in refused(monkeypatch, capsys, sample, "--ckpt", trained / "ckpt.pt",
                                          "--export", tmp_path / "file" / "x.safetensors", "--device", "cpu")


# Every kind of sample is written to every kind of output on every path, and read back with NumPy and Pillow alone.

KINDS = {"rgb": dict(in_channels=3), "grey": dict(in_channels=1), "latents": dict(in_channels=4, input_size=4)}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Returns {kind: (the flags that name its checkpoint, its samples as uint8 [70, H, W, C])}."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}
    vae = small_vae(folder)
    for kind, options in KINDS.items():
        options = dict(name="DiT", input_size=12, num_classes=4, patch=4, width=32, depth=1, heads=2) | options
        net = fill(models.create(**options)).eval()
        stats = dict(mean=[0.1] * 4, std=[0.5] * 4) if kind == "latents" else None
        args = dict(net=options, latent_stats=stats, data="gone")
        checkpoint = dict(method="facm", args=args, step=1, model=net.state_dict(), ema=net.state_dict())
        checkpoints.save(folder / f"{kind}.pt", checkpoint)
        flags = ["--ckpt", folder / f"{kind}.pt", "--n", 70, "--nfe", 2, "--device", "cpu"]
        flags += ["--vae", folder / "vae.pt"] if kind == "latents" else []
        decode = (lambda z: vae.decode(z * 0.5 + 0.1)) if kind == "latents" else (lambda x: x)
        with torch.no_grad():
            made[kind] = flags, sample.draw(net, checkpoint, 2, torch.arange(70) % 4, decode=decode)
    return made


@pytest.mark.parametrize("path", ["one process", "two processes", "interrupted", "exported"])
@pytest.mark.parametrize("output", ["x.png", "x.npz", "x"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_through_every_output_on_every_path(kinds, tmp_path, monkeypatch, kind, output, path):
    flags, images = kinds[kind]
    out, close = tmp_path / output, 0
    if path == "two processes":
        run_two(*["--samples" if flag == "--n" else flag for flag in flags], "--out", out, script="sample.py")
    else:
        if path == "exported":
            call(monkeypatch, sample, *flags[:2], "--device", "cpu", "--export", tmp_path / "small.safetensors")
            flags, close = ["--ckpt", tmp_path / "small.safetensors", *flags[2:]], 3       # float16 has 11 bits
        if path == "interrupted" and output != "x.png":
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                honest, calls = sample.draw_batch, []

                def interrupted(*args):
                    calls.append(1)
                    if len(calls) == 2:
                        raise KeyboardInterrupt
                    return honest(*args)
                patch.setattr(sample, "draw_batch", interrupted)
                call(patch, sample, *flags, "--out", out)
        call(monkeypatch, sample, *flags, "--out", out)

    n, h, w, c = images.shape
    assert (c, h) == {"rgb": (3, 12), "grey": (1, 12), "latents": (3, 16)}[kind] and images.std() > 10
    if output == "x.npz":
        with np.load(out) as f:
            assert f.files == ["arr_0", "arr_1"] and f["arr_0"].shape == (n, h, w, 3) and f["arr_0"].dtype == np.uint8
            found, labels = f["arr_0"], f["arr_1"]
        images = np.broadcast_to(images, found.shape)
        assert labels.tolist() == [i % 4 for i in range(n)]
    elif output == "x":
        names = pngs(out)
        assert names == [f"{i:06d}-class{i % 4}.png" for i in range(n)]
        pictures = [Image.open(out / name) for name in names]
        assert {picture.mode for picture in pictures} == {"L" if kind == "grey" else "RGB"}
        found = np.stack([np.asarray(picture).reshape(h, w, c) for picture in pictures])
    else:
        picture = Image.open(out)
        assert picture.mode == ("L" if kind == "grey" else "RGB")
        scale = picture.width // (10 * w)
        grid = np.asarray(picture).reshape(picture.height, picture.width, c)[::scale, ::scale]
        found = np.stack([grid[i // 10 * h:, i % 10 * w:][:h, :w] for i in range(n)])
    assert np.abs(found.astype(int) - images).max() <= close
