"""sample.py: the same sample whatever the batch and the processes, its outputs, its errors."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import TINY, call, refused, torchrun

import data
import facm
import models
import sample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, facm, *TINY, "--pretrain", 3, "--steps", 3, "--lr", "3e-3", "--out", out)
    return out


def draw(monkeypatch, run, out, *flags, ckpt="ckpt.pt"):
    call(monkeypatch, sample, "--ckpt", run / ckpt, "--out", out, "--device", "cpu", *flags)
    with np.load(out) as f:
        return f["arr_0"], f["arr_1"]


def test_a_sample_does_not_depend_on_batch_or_processes(run, tmp_path, monkeypatch):
    images, labels = draw(monkeypatch, run, tmp_path / "a.npz", "--n", 11, "--nfe", 2)
    assert images.shape == (11, 12, 12, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(11)]
    one_by_one, _ = draw(monkeypatch, run, tmp_path / "b.npz", "--n", 11, "--nfe", 2, "--batch", 1)
    fewer, _ = draw(monkeypatch, run, tmp_path / "c.npz", "--n", 5, "--nfe", 2, "--batch", 3)
    torchrun("--ckpt", run / "ckpt.pt", "--out", tmp_path / "d.npz", "--samples", 11, "--nfe", 2, "--device", "cpu",
             script="sample.py")
    with np.load(tmp_path / "d.npz") as f:
        two_processes = f["arr_0"]
    assert np.array_equal(images, one_by_one)
    assert np.array_equal(images[:5], fewer)
    assert np.array_equal(images, two_processes)
    assert not np.array_equal(images, draw(monkeypatch, run, tmp_path / "e.npz", "--n", 11, "--nfe", 2, "--seed", 1)[0])


def test_more_steps_share_the_first_noise():
    assert torch.equal(sample.draw_noise(0, [4, 9], 3, (1, 2, 2))[0], sample.draw_noise(0, [4, 9], 1, (1, 2, 2))[0])


def test_weights_and_samplers_are_the_ones_asked_for(run, tmp_path, monkeypatch):
    for flags, weights, ckpt, sampler in (
            ([], "ema", "ckpt.pt", facm.sample),
            (["--raw"], "model", "ckpt.pt", facm.sample),
            (["--sampler", "euler"], "ema", "ckpt.pt", facm.sample_euler),
            ([], "ema", "teacher.pt", facm.sample_euler)):
        checkpoint = data.read_checkpoint(run / ckpt)
        net = models.create(**checkpoint["args"]["net"]).eval()
        net.load_state_dict(checkpoint[weights])
        noise = sample.draw_noise(0, range(4), 3, (3, 12, 12))
        expected = sample.data.to_uint8(sampler(net, noise, torch.arange(4), 3)).numpy()
        images, _ = draw(monkeypatch, run, tmp_path / "x.npz", "--n", 4, "--nfe", 3, *flags, ckpt=ckpt)
        assert np.array_equal(images, expected), flags


def test_guidance_of_the_teacher(run, tmp_path, monkeypatch):
    plain, _ = draw(monkeypatch, run, tmp_path / "x.npz", "--n", 4, "--nfe", 3, ckpt="teacher.pt")
    guided, _ = draw(monkeypatch, run, tmp_path / "x.npz", "--n", 4, "--nfe", 3, "--cfg", 4, ckpt="teacher.pt")
    assert not np.array_equal(plain, guided)


def test_labels(run, tmp_path, monkeypatch):
    _, labels = draw(monkeypatch, run, tmp_path / "x.npz", "--n", 5, "--labels", "3,3,7")
    assert labels.tolist() == [3, 3, 7, 3, 3]
    _, labels = draw(monkeypatch, run, tmp_path / "x.npz", "--n", 50, "--labels", "random")
    assert 1 < len(set(labels.tolist())) <= 10 and labels.max() < 10


def test_grid_and_folder(run, tmp_path, monkeypatch):
    flags = ["--ckpt", run / "ckpt.pt", "--n", 20, "--device", "cpu", "--out"]
    call(monkeypatch, sample, *flags, tmp_path / "deep" / "grid.png")
    assert Image.open(tmp_path / "deep" / "grid.png").size == (10 * 60, 2 * 60)
    call(monkeypatch, sample, *flags, tmp_path / "folder")
    names = sorted(os.listdir(tmp_path / "folder"))
    assert len(names) == 20 and names[13] == "000013-class3.png"
    images, _ = draw(monkeypatch, run, tmp_path / "x.npz", "--n", 20)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / names[13])), images[13])


@pytest.mark.parametrize("flags, words", [
    (["--nfe", "0"], "at least 1"),
    (["--n", "0"], "at least 1"),
    (["--labels", "3,10"], "10 classes"),
    (["--labels", "-1"], "10 classes"),
    (["--labels", "cat"], "cat"),
    (["--cfg", "2"], "teacher"),
    (["--sampler", "heun"], "heun"),
    (["--ckpt", "nowhere.pt"], "nowhere.pt"),
])
def test_bad_flags_end_in_one_line(run, tmp_path, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, sample, "--ckpt", run / "ckpt.pt", "--out", tmp_path / "x.png", *flags)
    assert not (tmp_path / "x.png").exists()
