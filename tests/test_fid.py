"""Tests of fid.py: closed forms, the public Inception classes, all kinds of files, processes and user errors."""

import argparse
import hashlib
import json
import math
import pathlib
import pickle
import re
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from formula import fill, uniform
from PIL import Image
from test_golden import assert_equal, golden
from test_training import call, popen_two, refused, run_two

import data
import fid


def covariance(name, d=12, n=60):
    x = uniform(name, (n, d)) @ (np.eye(d) + uniform(name + "mix", (d, d)))
    return np.cov(x, rowvar=False)


# --------------------------------------------------------------------------------------------------
# The distance.

def test_distance_of_equal_covariances_is_that_of_the_means():
    mu1, mu2, sigma = uniform("a", 12), uniform("b", 12), covariance("s")
    assert fid.frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(((mu1 - mu2) ** 2).sum(), rel=1e-10)


def test_distance_of_commuting_covariances_is_that_of_their_roots():
    a, b = 1 + uniform("a", 9) ** 2, 2 + uniform("b", 9)
    turn, _ = np.linalg.qr(uniform("turn", (9, 9)))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + 9 * 0.25
    assert fid.frechet_distance(np.zeros(9), turn * a @ turn.T, np.full(9, 0.5), turn * b @ turn.T) == pytest.approx(
        expected, rel=1e-10)


@pytest.mark.parametrize("d", [1, 5, 40])
def test_distance_agrees_with_a_matrix_square_root(d):
    mu1, mu2, a, b = uniform("a", d), uniform("b", d), covariance("s", d, 3 * d + 2), covariance("t", d, 3 * d + 2)
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert fid.frechet_distance(mu1, a, mu2, b) == pytest.approx(expected, rel=1e-8)
    assert fid.frechet_distance(mu2, b, mu1, a) == pytest.approx(expected, rel=1e-8)
    assert 0 <= fid.frechet_distance(mu1, a, mu1, a) < 1e-12 * np.trace(a)


def test_distance_of_covariances_without_full_rank(capsys):
    """Covariances of 4 and 3 images have ranks 3 and 2 of 10. The distance is exact, and a note is printed."""
    a, b = (np.cov(uniform(name, (n, 10)), rowvar=False) for name, n in (("a", 4), ("b", 3)))
    capsys.readouterr()
    distance = fid.frechet_distance(np.zeros(10), a, np.zeros(10), b)
    (line,) = capsys.readouterr().err.splitlines()
    assert "rank 2 of 10" in line
    factor_a, factor_b = (np.linalg.svd(s)[0][:, :k] * np.sqrt(np.linalg.svd(s)[1][:k]) for s, k in ((a, 3), (b, 2)))
    nuclear = np.linalg.svd(factor_a.T @ factor_b)[1].sum()            # tr (A B)^(1/2) = |A^(1/2) B^(1/2)|_*
    assert distance == pytest.approx(np.trace(a) + np.trace(b) - 2 * nuclear, rel=1e-7)
    assert 0 <= fid.frechet_distance(np.zeros(10), a, np.zeros(10), a) < 1e-6 * np.trace(a)


def test_no_figure_is_a_negative_zero(monkeypatch):
    """A distance that rounding makes negative is 0, and a KID that prints as zero has no sign."""
    for n in range(2, 30):
        sigma = np.atleast_2d(np.cov(uniform(f"s{n}", (n, 20)), rowvar=False))
        found = fid.frechet_distance(np.ones(20), sigma, np.ones(20), sigma)
        assert math.copysign(1, found) == 1 and "-" not in fid.format_figure(found)
    for figure, text in ((-1e-9, "0.000000"), (-0.0, "0.000000"), (-4.9e-7, "0.000000"), (-5.1e-7, "-0.000001"),
                         (1.25, "1.250000"), (-0.152, "-0.152000")):
        assert fid.format_figure(figure).strip() == text
    args = argparse.Namespace(ref="x", sfid=False, score=False, pr=True, kid=True)
    side = dict(mu=np.zeros(4), sigma=-0.0 * np.eye(4), kept=torch.zeros(9, 4))
    monkeypatch.setattr(fid, "kernel_distance", lambda a, b: (-0.0, 0.0))
    figures = fid.compare(args, [side, side], fid.INCEPTION, "cpu")
    assert len(figures) == 5 and all(math.copysign(1, figure) == 1 for figure in figures.values())


def test_distance_refuses_what_is_no_number_and_other_shapes():
    mu, sigma = np.zeros(3), np.eye(3)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            fid.frechet_distance(mu, sigma, mu + bad, sigma)
        with pytest.raises(ValueError, match="NaN or infinity"):
            fid.frechet_distance(mu, sigma + bad, mu, sigma)
    with pytest.raises(ValueError, match="3 features cannot be compared with statistics of 4"):
        fid.frechet_distance(mu, sigma, np.zeros(4), np.eye(4))


# --------------------------------------------------------------------------------------------------
# Inception.

def public_inception():
    """Inception with weights by formula; running_mean is 0.1 u and running_var is 0.5 + 0.25 u, see formula.py.

    The variance of about a half compensates for the ReLUs, so that deep features still depend on the input.
    """
    net = fill(fid.Inception())
    for name, buffer in net.named_buffers():
        if not name.endswith("num_batches_tracked"):
            u = torch.from_numpy(uniform(name, buffer.shape))
            buffer.copy_(0.5 + 0.25 * u if name.endswith("var") else 0.1 * u)
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of Inception's weights by formula, without batch counters as in torch-fidelity's conversion."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: v for k, v in public_inception().state_dict().items() if not k.endswith("batches_tracked")}, path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    """Inception loaded from that file, whose hash is set as the expected one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
        return fid.load_inception(weights)


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 256, 299])
def test_inception_is_the_public_classes(inception, size):
    """In the stored runs NumPy resized pytorch-fid's input as TF1 does, and torch-fidelity's input was the bytes."""
    images = np.rint(127.5 + 127.5 * uniform(f"images{size}", (2, 3, size, size))).astype(np.uint8)
    pool, spatial, logits = inception(torch.from_numpy(images))
    for name in ("inception-pytorch-fid", "inception-torch-fidelity"):
        stored, _ = golden(name)
        assert_equal(stored, pool, f"pool{size}")
        assert_equal(stored, logits, f"logits{size}")
        if f"spatial{size}" in stored["outputs"]:
            assert_equal(stored, spatial, f"spatial{size}")
    assert pool[0].sub(pool[1]).abs().max() > 1e-3 * pool.abs().max()      # features depend on the input


@pytest.mark.parametrize("name", ["inception-pytorch-fid", "inception-torch-fidelity"])
def test_inception_has_the_public_names(name):
    _, shapes = golden(name)
    with torch.device("meta"):
        net = fid.Inception()
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in shapes.items()}


@pytest.mark.parametrize("height, width, size", [(5, 7, 12), (12, 9, 5), (6, 6, 6)])
def test_resize_is_that_of_tensorflow_1(height, width, size):
    x = uniform("x", (2, 3, height, width))
    expected = np.zeros((2, 3, size, size))
    for i in range(size):
        for j in range(size):
            y, z = i * height / size, j * width / size
            y0, z0 = math.floor(y), math.floor(z)
            for a, share_a in ((y0, 1 - (y - y0)), (min(y0 + 1, height - 1), y - y0)):
                for b, share_b in ((z0, 1 - (z - z0)), (min(z0 + 1, width - 1), z - z0)):
                    expected[:, :, i, j] += share_a * share_b * x[:, :, a, b]
    assert np.abs(fid.resize(torch.from_numpy(x).float(), size).numpy() - expected).max() < 1e-6


# --------------------------------------------------------------------------------------------------
# The other measures.

def test_precision_and_recall_as_written_out():
    a, b = uniform("a", (17, 3)), 0.6 * uniform("b", (13, 3)) + 0.1
    inside = []
    for x, centres in ((a, b), (b, a)):
        count = 0
        for p in x:
            for c in centres:
                radius = sorted(np.linalg.norm(c - other) for other in centres)[3]     # [0] is c itself
                if np.linalg.norm(p - c) <= radius:
                    count += 1
                    break
        inside.append(count / len(x))
    assert 0 < inside[0] < 1
    for rows in (1, 5, 100):
        assert fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b), rows=rows) == pytest.approx(tuple(inside))
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b[:3]))


@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_exact_copies_are_at_distance_0(offset):
    """Each image occurs ten times, so each neighbourhood is a single point, and the copies lie in it.

    A matrix product gives copies a small distance, which depends on the block of rows.
    """
    points = offset + torch.from_numpy(uniform("points", (50, 24)))
    copies = points.repeat(10, 1)[torch.randperm(500)]
    other = torch.from_numpy(uniform("other", (20, 24))) + offset
    for rows in (1, 7, 2000):
        assert fid.precision_recall(copies, points.repeat(4, 1), rows=rows) == (1, 1)
        assert fid.precision_recall(torch.cat([copies, other]), copies, rows=rows) == pytest.approx((500 / 520, 1))
        assert fid.precision_recall(copies.float(), copies.flip(0).float(), rows=rows) == (1, 1)


def test_images_that_differ_are_no_copies():
    """The distances equal those computed from differences, and only exact copies have distance 0."""
    a = torch.from_numpy(uniform("a", (40, 30)))
    b = torch.cat([a[:10], a[:10] + 1e-4 * torch.from_numpy(uniform("b", (10, 30))), a.flip(1)])
    exact = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    found = fid.distances(a, b)
    assert torch.equal(found == 0, exact == 0) and (exact == 0).sum() == 10
    assert (found - exact).abs().max() < 1e-9


def test_kernel_distance_as_written_out():
    a, b = uniform("a", (9, 4)), uniform("b", (11, 4)) + 0.2

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3
    expected, random = [], np.random.RandomState(2020)
    for _ in range(3):
        x, y = a[random.choice(9, 5, replace=False)], b[random.choice(11, 5, replace=False)]
        within = sum(kernel(p[i], p[j]) for p in (x, y) for i in range(5) for j in range(5) if i != j) / 20
        expected.append(within - 2 * sum(kernel(p, q) for p in x for q in y) / 25)
    mean, std = fid.kernel_distance(torch.from_numpy(a), torch.from_numpy(b), subsets=3, size=5)
    assert (mean, std) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-10)


def test_inception_score_as_written_out(monkeypatch):
    """Seven images form parts of 3, 3 and 1. A batch may cross the end of a part."""
    monkeypatch.setattr(fid, "SCORE_PART", 3)
    logits = torch.from_numpy(3 * uniform("logits", (7, 5)))
    images = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1)
    source = fid.Source("x", 7, lambda i, j: images[i:j])
    p, scores = logits.softmax(1).numpy(), []
    for part in (p[:3], p[3:6], p[6:]):
        scores.append(np.exp(np.mean([sum(row * np.log(row / part.mean(0))) for row in part])))

    def extract(x):
        return torch.zeros(len(x), 2), None, logits[x[:, 0, 0, 0].long()]
    for batch in (1, 2, 7):
        found = fid.collect(source, extract, (), score=True, batch=batch)
        assert fid.inception_score(found["parts"]) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)


def test_sums_are_mean_and_covariance_and_kept_rows_are_spread_evenly():
    features = torch.from_numpy(uniform("f", (50, 3)) + 100).float()
    source = fid.Source("x", 50, lambda i, j: np.arange(i, j, dtype=np.uint8).reshape(-1, 1, 1, 1))
    found = fid.collect(source, lambda x: (features[x[:, 0, 0, 0].long()], None, None), keep=20, batch=7)
    assert np.abs(found["mu"].numpy() - features.double().mean(0).numpy()).max() < 1e-12
    assert np.abs(found["sigma"].numpy() - np.cov(features.double().numpy(), rowvar=False)).max() < 1e-10
    assert found["n"] == 50 and torch.equal(found["kept"], features[torch.arange(20) * 50 // 20])


class OnApple(torch.Tensor):
    """A tensor that reports Apple's GPU as its device and cannot be converted to float64 there."""

    @property
    def device(self):
        return torch.device("mps")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def to(self, *args, **options):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    double = new_zeros = to


def test_sums_are_made_on_the_cpu_where_the_device_has_no_float64():
    pool, spatial, logits = (torch.from_numpy(uniform(name, (20, 6))).float() for name in ("p", "s", "l"))
    source = fid.Source("x", 20, lambda i, j: np.arange(i, j, dtype=np.uint8).reshape(-1, 1, 1, 1))

    def extract(x, kind):
        return [features[x[:, 0, 0, 0].long()].as_subclass(kind) for features in (pool, spatial, logits)]
    there, here = (fid.collect(source, lambda x: extract(x, kind), ("mu", "mu_s"), score=True, keep=20, batch=7)
                   for kind in (OnApple, torch.Tensor))
    assert there.keys() == here.keys()
    for key in here.keys() - {"n"}:
        assert type(there[key]) is torch.Tensor and torch.equal(there[key], here[key])
    a, b = here["kept"], here["kept"] + 0.1
    for measure in (fid.precision_recall, fid.kernel_distance):
        assert measure(a.as_subclass(OnApple), b.as_subclass(OnApple)) == measure(a, b)


@pytest.mark.parametrize("which", ["features", "logits"])
def test_outputs_that_are_not_finite_are_refused(which):
    """NaN raises an error even if no covariance is computed, as for the Inception Score, precision or KID."""
    source = fid.Source("some", 9, lambda i, j: np.zeros((j - i, 4, 4, 3), np.uint8))
    bad = torch.full((9, 5), torch.nan)
    outputs = dict(features=torch.zeros(9, 5), logits=torch.zeros(9, 5)) | {which: bad}
    args = argparse.Namespace(ref=None, sfid=False, score=True, pr=False, kid=False)
    with pytest.raises(ValueError, match="NaN or infinity"):
        found = fid.collect(source, lambda x: (outputs["features"], None, outputs["logits"]), (), score=True, keep=9)
        fid.compare(args, [found], fid.INCEPTION, "cpu")


# --------------------------------------------------------------------------------------------------
# The program.

class Small(torch.nn.Module):
    """A small network that maps uint8 [N, 3, H, W] to features [N, 24]."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 24),
                                        torch.nn.Tanh())

    def forward(self, x):
        return self.body(x.float() / 64 - 2)


def script(module, path, size=12):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, torch.zeros(2, 3, size, size, dtype=torch.uint8)), path)
    return path


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return script(fill(Small()), tmp_path_factory.mktemp("net") / "small.pt")


@pytest.fixture(scope="module")
def images():
    """Two different sets of 2,100 glyphs, each uint8 [N, 12, 12, 3]."""
    return [data.glyphs(2100, 12, seed)[0] for seed in (0, 1)]


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    """A folder with two npz files of 2,100 images, and with 30 of these images in every form."""
    out = tmp_path_factory.mktemp("files")
    for name, these in zip("ab", images):
        np.savez(out / f"{name}.npz", arr_0=these, arr_1=np.arange(len(these)))
    few = images[0][:30]
    np.savez(out / "few.npz", arr_0=few)
    np.savez_compressed(out / "few-images.npz", images=few, labels=np.arange(30))
    (out / "few" / "deep").mkdir(parents=True)
    with zipfile.ZipFile(out / "few.zip", "w") as archive:
        for i, image in enumerate(few):
            path = out / "few" / ("deep" if i % 2 else "") / f"{i:03d}.{'png' if i % 3 else 'webp'}"
            Image.fromarray(image).save(path, lossless=True)
            archive.write(path, path.relative_to(out / "few"))
        archive.writestr("readme.txt", "no image")
    (out / "few" / "readme.txt").write_text("no image")
    return out


def figures(monkeypatch, tmp_path, *flags):
    """Runs fid.py and returns its figures in the order of the table that it prints."""
    call(monkeypatch, fid, *flags, "--device", "cpu", "--json", tmp_path / "figures.json")
    return json.loads((tmp_path / "figures.json").read_text())["figures"]


NAME = "Frechet distance (small.pt)"


def test_a_set_has_no_distance_to_itself(files, net, images, tmp_path, monkeypatch, capsys):
    same = figures(monkeypatch, tmp_path, files / "a.npz", "--ref", files / "a.npz", "--features", net, "--pr")
    captured = capsys.readouterr()
    assert abs(same[NAME]) < 1e-3 and same["precision"] == same["recall"] == 1
    assert "FID" not in captured.out and NAME in captured.out and captured.err == ""
    other = figures(monkeypatch, tmp_path, files / "a.npz", "--ref", "glyphs:1", "--n", 2100, "--resolution", 12,
                    "--features", net)
    assert other == figures(monkeypatch, tmp_path, files / "a.npz", "--ref", files / "b.npz", "--features", net)
    assert other[NAME] > 1e-3


def test_neither_order_nor_batch_nor_processes_matter(files, net, images, tmp_path, monkeypatch):
    flags = ["--ref", files / "b.npz", "--features", net]
    more = ["--kid", "--precision-recall"]
    whole = figures(monkeypatch, tmp_path, files / "a.npz", *flags, *more, "--batch", 2100)
    np.savez(tmp_path / "turned.npz", arr_0=images[0][::-1])
    assert figures(monkeypatch, tmp_path, tmp_path / "turned.npz", *flags)[NAME] == pytest.approx(whole[NAME], rel=1e-6)
    run_two(files / "a.npz", *flags, *more, "--device", "cpu", "--json", tmp_path / "two.json",
            "--save-stats", tmp_path / "two.npz", script="fid.py")
    two = json.loads((tmp_path / "two.json").read_text())
    assert (two["n"], two["ref_n"]) == (2100, 2100)
    for other in (two["figures"], figures(monkeypatch, tmp_path, files / "a.npz", *flags, *more, "--batch", 37)):
        assert other.keys() == whole.keys()
        assert all(other[key] == pytest.approx(whole[key], rel=1e-6) for key in whole)
    with torch.no_grad():
        features = net_of(net)(torch.from_numpy(images[0]).permute(0, 3, 1, 2)).double().numpy()
    with np.load(tmp_path / "two.npz") as f:
        assert np.abs(f["sigma"] - np.cov(features, rowvar=False)).max() < 1e-9


def net_of(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)


@pytest.mark.parametrize("name", ["few-images.npz", "few.zip", "few"])
def test_every_form_of_the_same_images(files, net, tmp_path, monkeypatch, capsys, name):
    flags = ["--ref", files / "b.npz", "--features", net, "--batch", 7]
    expected = figures(monkeypatch, tmp_path, files / "few.npz", *flags)
    assert "few.npz has 30 images; figures from fewer than 2,048" in capsys.readouterr().err
    assert figures(monkeypatch, tmp_path, files / name, *flags) == pytest.approx(expected, rel=1e-6)


def test_images_come_in_any_piece(files, images):
    for name in ("few.npz", "few-images.npz", "glyphs:0"):
        source = fid.open_source(str(files / name) if "." in name else name, n=30, resolution=12)
        assert source.count == 30
        for i, j in ((12, 30), (3, 5), (0, 30)):                       # not only in order
            assert np.array_equal(source.read(i, j), images[0][i:j])


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_data_set_is_its_training_images(images, monkeypatch, name):
    monkeypatch.setattr(data, "read_torchvision",
                        lambda asked, folder: (images[0][:7], np.arange(7)) if (asked, folder) == (name, "here") else None)
    source = fid.open_source(name, data_dir="here")
    assert source.count == 7 and np.array_equal(source.read(2, 5), images[0][2:5])


class Convolution(torch.nn.Module):
    """A network whose rounding depends on how its input lies in memory."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 32, 5, padding=2)

    def forward(self, x):
        return self.conv(x.float() / 64 - 2).relu().square().mean((2, 3))


def grey_forms(folder, count):
    """Writes the same grey images in files of every kind. The first file is an npz that has them as RGB images."""
    grey = np.rint(127.5 + 127.5 * uniform("grey", (count, 12, 12))).astype(np.uint8)
    rgb = grey[..., None].repeat(3, axis=3)
    np.savez(folder / "rgb.npz", arr_0=rgb)
    np.savez(folder / "NHW.npz", arr_0=grey)
    np.savez(folder / "NHW1.npz", images=grey[..., None])
    with zipfile.ZipFile(folder / "L.zip", "w") as archive:
        for mode, images in (("L", grey), ("RGB", rgb), ("LA", grey), ("P", grey)):
            (folder / mode).mkdir()
            for i, image in enumerate(images):
                path = folder / mode / f"{i:02d}.png"
                image = Image.fromarray(image)
                if mode in ("LA", "P"):
                    image = image.convert(mode)
                image.save(path)
                if mode == "L":
                    archive.write(path, path.name)
    return [folder / name for name in ("rgb.npz", "NHW.npz", "NHW1.npz", "L", "RGB", "LA", "P", "L.zip")]


def test_grey_images_are_judged_as_rgb(files, tmp_path, monkeypatch):
    """The figures of grey and of RGB images are equal to the last digit, both as samples and as the reference."""
    net = script(fill(Convolution()), tmp_path / "net.pt")
    names = grey_forms(tmp_path, 40)
    for place in ("samples", "ref"):
        found = []
        for name in names:
            both = [name, "--ref", files / "few.npz"] if place == "samples" else [files / "few.npz", "--ref", name]
            found.append(figures(monkeypatch, tmp_path, *both, "--features", net, "--pr", "--kid", "--batch", 16))
        assert found[0]["Frechet distance (net.pt)"] > 0
        assert all(these == found[0] for these in found)


def test_inception_judges_grey_images_as_rgb(inception, tmp_path):
    names = [name for name in grey_forms(tmp_path, 5) if name.name in ("rgb.npz", "NHW.npz", "L", "L.zip")]
    rgb, *others = [fid.collect(fid.open_source(str(name)), inception, (), score=True, keep=5, batch=3)
                    for name in names]
    for other in others:
        assert torch.equal(other["kept"], rgb["kept"]) and torch.equal(other["parts"], rgb["parts"])


def test_statistics_of_every_kind(files, net, tmp_path, monkeypatch, capsys):
    """Statistics may come from --save-stats, pytorch-fid, EDM, ADM, or torch-fidelity with tensors or NumPy arrays."""
    base = figures(monkeypatch, tmp_path, files / "a.npz", "--ref", files / "b.npz", "--features", net)[NAME]
    call(monkeypatch, fid, files / "b.npz", "--features", net, "--save-stats", tmp_path / "deep" / "ours.npz",
         "--device", "cpu")
    with np.load(tmp_path / "deep" / "ours.npz", allow_pickle=False) as f:
        mu, sigma = f["mu"], f["sigma"]
        assert f["n"] == 2100 and str(f["features"]).startswith("small.pt sha256:") and mu.dtype == np.float64
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=np.zeros(2), sigma_s=np.eye(2),
             arr_0=data.glyphs(2100, 12, 1)[0])
    torch.save(dict(mu=torch.from_numpy(mu), sigma=torch.from_numpy(sigma)), tmp_path / "tensors.pt")
    torch.save(dict(mu=mu.astype(np.float32), sigma=sigma), tmp_path / "arrays.pt")
    for name in ("deep/ours.npz", "edm.npz", "adm.npz", "tensors.pt", "arrays.pt"):
        found = figures(monkeypatch, tmp_path, files / "a.npz", "--ref", tmp_path / name, "--features", net)
        assert found[NAME] == pytest.approx(base, rel=1e-5), name
    both = figures(monkeypatch, tmp_path, tmp_path / "deep/ours.npz", "--ref", tmp_path / "adm.npz")
    assert list(both) == [NAME] and abs(both[NAME]) < 1e-9             # no network is needed, and the name is known
    flags = ["--features", net, "--pr"]
    plain = figures(monkeypatch, tmp_path, files / "a.npz", "--ref", files / "b.npz", *flags)
    found = figures(monkeypatch, tmp_path, files / "a.npz", "--ref", tmp_path / "adm.npz", *flags)
    assert found == pytest.approx(plain)


def moments(d, n=50):
    x = uniform("moments", (n, d))
    return dict(mu=x.mean(0), sigma=np.cov(x, rowvar=False))


@pytest.mark.parametrize("protocol, numpy_name", [(3, b"numpy.core."), (3, b"numpy._core."), (4, None), (5, None)])
def test_edm2_statistics(files, net, tmp_path, monkeypatch, protocol, numpy_name):
    """EDM2's files hold fid for Inception and fd_dinov2 for --features. Several pickle protocols can be read."""
    dinov2, inception = moments(24), moments(30)
    content = pickle.dumps(dict(num_images=np.int64(2500), fid=inception, fd_dinov2=dinov2), protocol)
    if numpy_name:                         # protocol 3 stores names without their lengths
        content = content.replace(b"numpy._core.", numpy_name).replace(b"numpy.core.", numpy_name)
    (tmp_path / "edm2.pkl").write_bytes(content)
    for part, expected in (("fid", inception), ("fd_dinov2", dinov2)):
        found = fid.open_source(str(tmp_path / "edm2.pkl"), part=part).statistics
        assert found["n"] == 2500 and found.keys() == {"mu", "sigma", "n"}
        assert all(np.array_equal(found[key].numpy(), expected[key]) for key in expected)
    np.savez(tmp_path / "dinov2.npz", **dinov2)
    pkl, npz = (figures(monkeypatch, tmp_path, files / "few.npz", "--ref", tmp_path / name, "--features", net)
                for name in ("edm2.pkl", "dinov2.npz"))
    assert pkl == npz
    call(monkeypatch, fid, tmp_path / "edm2.pkl", "--save-stats", tmp_path / "fid.npz", "--device", "cpu")
    with np.load(tmp_path / "fid.npz") as f:
        assert set(f.files) == {"mu", "sigma", "n"} and np.array_equal(f["sigma"], inception["sigma"])


def test_statistics_keep_their_network_unknown(net, tmp_path, monkeypatch):
    """If statistics do not name their network, their copy can be compared with any network of that width."""
    np.savez(tmp_path / "plain.npz", **moments(24))
    call(monkeypatch, fid, tmp_path / "plain.npz", "--save-stats", tmp_path / "copy.npz", "--device", "cpu")
    found = figures(monkeypatch, tmp_path, tmp_path / "copy.npz", "--ref", tmp_path / "plain.npz")
    assert found == {"Frechet distance (an unknown network with 24 features)": pytest.approx(0, abs=1e-9)}
    figures(monkeypatch, tmp_path, "glyphs", "--n", 50, "--ref", tmp_path / "copy.npz", "--features", net)


@pytest.mark.parametrize("make", [
    lambda s: s, lambda s: s.astype(np.float32), lambda s: 0 * s, lambda s: s.astype(">f8"), lambda s: 1e-30 * s,
    lambda s: np.cov(uniform("few", (3, 24)).astype(np.float32), rowvar=False, dtype=np.float32)])
def test_covariances_that_rounding_spoils_a_little_are_read(tmp_path, make):
    sigma = make(moments(24)["sigma"])
    np.savez(tmp_path / "x.npz", mu=np.zeros(24), sigma=sigma)
    found = fid.open_source(str(tmp_path / "x.npz")).statistics["sigma"]
    assert np.array_equal(found.numpy(), sigma.astype(np.float64))


BAD_STATISTICS = {
    "unsymmetric": (lambda s: s | dict(sigma=s["sigma"] + np.triu(np.ones((24, 24)), 1)), "not symmetric"),
    "negative definite": (lambda s: s | dict(sigma=-s["sigma"]), "negative eigenvalues"),
    "one negative eigenvalue": (lambda s: s | dict(sigma=s["sigma"] - np.diag([0] * 23 + [1])), "negative eigenvalues"),
    "a correlation above 1": (lambda s: s | dict(sigma=np.eye(24) + np.eye(24)[::-1] * 2), "negative eigenvalues"),
    "NaN in mu": (lambda s: s | dict(mu=s["mu"] * np.nan), "NaN or infinity"),
    "infinity in sigma": (lambda s: s | dict(sigma=s["sigma"] + np.inf), "NaN or infinity"),
    "mu and sigma of two sizes": (lambda s: s | dict(sigma=np.eye(25)), "[24] and sigma is [25, 25]"),
    "mu with two dimensions": (lambda s: s | dict(mu=s["mu"][None]), "[1, 24]"),
    "mu a number": (lambda s: dict(mu=0.0, sigma=1.0), "expected [D] and [D, D]"),
    "a deviation for sigma": (lambda s: s | dict(sigma=np.ones(24)), "expected [D] and [D, D]"),
    "no feature": (lambda s: dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "expected [D] and [D, D]"),
    "complex": (lambda s: s | dict(sigma=s["sigma"] + 0j), "real numbers"),
    "text": (lambda s: s | dict(mu=np.array(["1"] * 24)), "real numbers"),
    "truth": (lambda s: s | dict(mu=np.ones(24, bool)), "real numbers"),
    "spatial mean alone": (lambda s: s | dict(mu_s=np.zeros(3)), "needs both"),
    "spatial covariance alone": (lambda s: s | dict(sigma_s=np.eye(3)), "needs both"),
    "spatial covariance unsymmetric": (lambda s: s | dict(mu_s=np.zeros(2), sigma_s=[[1, 2], [0, 1]]), "sigma_s is not sym"),
    "no images": (lambda s: s | dict(n=0), "number of images"),
    "infinitely many": (lambda s: s | dict(n=np.inf), "number of images"),
    "numbers of images": (lambda s: s | dict(n=np.array([9, 9])), "number of images")}


@pytest.mark.parametrize("kind", BAD_STATISTICS)
@pytest.mark.parametrize("suffix", ["npz", "pt", "pkl"])
def test_what_no_images_can_have_is_refused(net, files, tmp_path, monkeypatch, capsys, kind, suffix):
    spoilt, words = BAD_STATISTICS[kind]
    statistics, path = spoilt(moments(24)), tmp_path / f"bad.{suffix}"
    if suffix == "npz":
        np.savez(path, **statistics)
    elif suffix == "pkl":
        content = dict(fd_dinov2=statistics)
        if "n" in statistics:
            content["num_images"] = statistics.pop("n")
        path.write_bytes(pickle.dumps(content))
    elif kind in ("complex", "text", "truth"):
        words = "bad.pt"                   # torch.load refuses such arrays
        torch.save(statistics, path)
    else:
        torch.save({key: torch.as_tensor(np.array(value)) for key, value in statistics.items()}, path)
    line = refused(monkeypatch, capsys, fid, files / "few.npz", "--ref", path, "--features", net, "--device", "cpu")
    assert words in line and path.name in line


class Evil:
    """An object whose pickle calls the given function when it is read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("content, words", [
    (dict(fid=dict(mu=Evil(print, "harmed"), sigma=0)), "builtins.print"),
    (Evil(eval, "print('harmed')"), "builtins.eval"),
    (dict(fid=dict(mu=np.array([Evil(print, "harmed")]), sigma=0)), "builtins.print"),
    (dict(fid=dict(mu=torch.zeros(3), sigma=torch.eye(3))), "torch"),
    (dict(fid=dict(mu=np.zeros(3, object), sigma=np.eye(3))), "real numbers"),
    (dict(fid=dict(mu=np.zeros(3))), "no mu and sigma"),
    (dict(fd_dinov2=dict(mu=np.zeros(3), sigma=np.eye(3))), "fid"),
    (dict(fid=np.eye(3)), "fid"), ([1, 2], "fid"), (b"cut", "bad.pkl")])
def test_a_pickle_executes_nothing(tmp_path, monkeypatch, capsys, content, words):
    path = tmp_path / "bad.pkl"
    path.write_bytes(content if content == b"cut" else pickle.dumps(content))
    line = refused(monkeypatch, capsys, fid, path, "--ref", path)
    assert words in line and "bad.pkl" in line and "harmed" not in capsys.readouterr().out


def test_all_measures_of_inception(weights, inception, tmp_path, monkeypatch, capsys):
    """The images are few and the distance needs no eigenvalues, because those of 2,048 features take seconds."""
    monkeypatch.setattr(fid, "INCEPTION_SHA256", "")
    monkeypatch.setattr(fid, "frechet_distance", lambda mu1, sigma1, mu2, sigma2: float(
        sum((torch.as_tensor(p) - torch.as_tensor(q)).abs().sum() for p, q in ((mu1, mu2), (sigma1, sigma2)))))
    a, b = data.glyphs(6, 12, 5)[0], data.glyphs(5, 12, 6)[0]
    found = figures(monkeypatch, tmp_path, "glyphs:5", "--n", 6, "--resolution", 12,
                    "--ref", save(tmp_path / "b.npz", b), "--is", "--sfid", "--pr", "--kid", "--inception", weights,
                    "--batch", 4)
    assert "FID   " in capsys.readouterr().out
    with torch.no_grad():
        outputs = [inception(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (a, b)]
    moments = [[(o[k].double().mean(0), np.cov(o[k].double().numpy(), rowvar=False)) for k in (0, 1)] for o in outputs]
    assert found["FID"] == pytest.approx(fid.frechet_distance(*moments[0][0], *moments[1][0]), rel=1e-4)
    assert found["sFID"] == pytest.approx(fid.frechet_distance(*moments[0][1], *moments[1][1]), rel=1e-4)
    assert (found["precision"], found["recall"]) == fid.precision_recall(outputs[0][0], outputs[1][0])
    assert found["KID"] == pytest.approx(fid.kernel_distance(outputs[0][0], outputs[1][0])[0], rel=1e-4)
    log_p = outputs[0][2].double().log_softmax(1)
    score = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp()
    assert found["IS"] == pytest.approx(score.item(), rel=1e-4)


def save(path, images, **others):
    np.savez(path, arr_0=images, **others)
    return path


# --------------------------------------------------------------------------------------------------
# Mistakes.

def spoil(folder, kind):
    """Writes a source with an error. Returns its path and a word that the error message must contain."""
    good, path = data.glyphs(6, 12)[0], folder / "bad.npz"
    d = 24
    if kind in ("broken image", "cut image", "mixed sizes", "deep image", "empty"):
        path = folder / "bad"
        path.mkdir()
        for i in range(5 if kind != "empty" else 0):
            Image.fromarray(good[i]).save(path / f"{i}.png")
        if kind == "broken image":
            (path / "3.png").write_text("not an image")
        elif kind == "cut image":
            (path / "3.png").write_bytes((path / "2.png").read_bytes()[:-40])
        elif kind == "mixed sizes":
            Image.fromarray(good[0].repeat(2, 0)).save(path / "3.png")
        elif kind == "deep image":
            Image.fromarray(np.zeros((12, 12), np.uint16)).save(path / "3.png")
        return path, "bad" if kind == "empty" else "3.png"
    if kind == "float":
        save(path, good.astype(np.float32))
    elif kind == "channels first":
        save(path, good.transpose(0, 3, 1, 2))
    elif kind == "objects":
        save(path, np.array([good, None], dtype=object))
    elif kind == "unknown key":
        np.savez(path, samples=good)
    elif kind == "one image":
        save(path, good[:1])
    elif kind == "cut npz":
        path.write_bytes(save(path, good).read_bytes()[:500])
    elif kind == "rotten npz":
        content = bytearray(save(path, good).read_bytes())
        content[400] ^= 255
        path.write_bytes(content)
    elif kind == "shapes":
        np.savez(path, mu=np.zeros(d), sigma=np.eye(d + 1))
    elif kind == "not finite":
        np.savez(path, mu=np.full(d, np.nan), sigma=np.eye(d))
    elif kind == "dimension":
        np.savez(path, mu=np.zeros(d + 1), sigma=np.eye(d + 1))
    elif kind == "features":
        np.savez(path, mu=np.zeros(d), sigma=np.eye(d), features=fid.INCEPTION)
    elif kind == "half":
        save(path, good[:1], mu=np.zeros(d))               # without sigma these are not statistics
    elif kind == "text":
        path = folder / "bad.txt"
        path.write_text("text")
    elif kind == "code":
        path = folder / "bad.pt"
        torch.save(dict(mu=Harm(), sigma=0), path)
    elif kind == "other pt":
        path = folder / "bad.pt"
        torch.save([1, 2], path)
    elif kind == "no numbers":
        path = folder / "bad.pt"
        torch.save(dict(mu="one", sigma=[[1.0]]), path)
    elif kind == "zip without images":
        path = folder / "bad.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no image")
    elif kind == "no zip":
        path = folder / "bad.zip"
        path.write_text("text")
    return path, "24" if kind == "dimension" else path.name


class Rigid(torch.nn.Module):
    def forward(self, x):
        return x.float().flatten(1) @ torch.ones(300, 4)


class Harm:
    def __reduce__(self):
        return print, ("harmed",)


@pytest.mark.parametrize("place", ["samples", "ref"])
@pytest.mark.parametrize("kind", [
    "broken image", "cut image", "mixed sizes", "deep image", "empty", "float", "channels first", "objects",
    "unknown key", "half", "one image", "cut npz", "rotten npz", "shapes", "not finite", "dimension", "features", "text",
    "code", "other pt", "no numbers", "zip without images", "no zip"])
def test_bad_files_end_in_one_line_that_names_them(net, files, tmp_path, monkeypatch, capsys, kind, place):
    path, named = spoil(tmp_path, kind)
    both = [path, "--ref", files / "b.npz"] if place == "samples" else [files / "b.npz", "--ref", path]
    line = refused(monkeypatch, capsys, fid, *both, "--features", net, "--device", "cpu", "--json", tmp_path / "x.json")
    assert named in line and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("flags, words", [
    ([], "--ref is missing"),
    (["--kid", "--save-stats", "x.npz"], "--pr and --kid need --ref"),
    (["--ref", "nowhere.npz"], "nowhere.npz"),
    (["--ref", "cats"], "cats"),
    (["--ref", "glyphs:x"], "glyphs:x"),
    (["--ref", "glyphs", "--resolution", "4"], "glyphs"),
    (["--ref", "glyphs", "--n", "0"], "glyphs"),
    (["--ref", "glyphs", "--batch", "0"], "--batch"),
    (["--save-stats", "x.txt"], "--save-stats"),
    (["--ref", "glyphs", "--is"], "--is"),
    (["--ref", "glyphs", "--sfid"], "--sfid"),
    (["--ref", "glyphs", "--features", "nowhere.pt"], "nowhere.pt"),
    (["--ref", "STATISTICS", "--pr"], "features must be computed"),
    (["--ref", "glyphs", "--clip"], "--clip"),
    (["--ref", "glyphs", "--json", "/proc/x.json"], "/proc/x.json"),
    (["--ref", "glyphs", "--save-stats", "/proc/x.npz"], "/proc/x.npz"),
    (["--ref", "glyphs", "--device", "gpu"], "gpu"),
])
def test_bad_flags_end_in_one_line(net, files, tmp_path, monkeypatch, capsys, flags, words):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(24), sigma=np.eye(24))
    flags = [tmp_path / "statistics.npz" if flag == "STATISTICS" else flag for flag in flags]
    flags += [] if "--features" in flags else ["--features", net]
    assert words in refused(monkeypatch, capsys, fid, files / "few.npz", *flags)


# What each flag does in each mode: "yes" means that it changes the result, "-" that it is part of the mode, and another
# word that it is refused by a message with this word. The modes are images against images by Inception and by
# --features, images against statistics, statistics against statistics, --is alone, and --save-stats alone. --device
# works in all modes.
MODES = dict(inception="few.npz --ref b.npz", features="few.npz --ref b.npz --features small.pt",
             half="few.npz --ref plain.npz", statistics="plain.npz --ref plain.npz", score="few.npz --is",
             save="few.npz --save-stats saved.npz")
TABLE = """
flag                     inception     features      half          statistics    score         save
--ref b.npz              -             -             -             -             yes           yes
--is                     yes           --features    yes           statistics    -             yes
--sfid                   yes           --features    mu_s          mu_s          --ref         yes
--pr                     yes           yes           features      features      --ref         --ref
--precision-recall       yes           yes           features      features      --ref         --ref
--kid                    yes           yes           features      features      --ref         --ref
--features small.pt      yes           -             yes           leave         --features    yes
--inception file.pth     yes           --inception   yes           leave         yes           yes
--n 40                   glyphs        glyphs        glyphs        glyphs        glyphs        glyphs
--images 40              glyphs        glyphs        glyphs        glyphs        glyphs        glyphs
--resolution 12          glyphs        glyphs        glyphs        glyphs        glyphs        glyphs
--data-dir here          cifar10       cifar10       cifar10       cifar10       cifar10       cifar10
--batch 7                yes           yes           yes           leave         yes           yes
--save-stats more.npz    yes           yes           yes           yes           yes           -
"""
HEAD, *ROWS = [re.split("  +", line.strip()) for line in TABLE.strip().splitlines()]
CASES = [(row[0], mode, expected) for row in ROWS for mode, expected in zip(HEAD[1:], row[1:]) if expected != "-"]


@pytest.fixture
def stand_in(files, net, tmp_path, monkeypatch):
    """Replaces Inception by a network of 24 features, whose calls it records, in a folder with the table's files."""
    asked = dict(batches=[], weights=[])

    def load(path, device):
        def extract(images):
            asked["batches"].append(len(images))
            features = images.float().flatten(2)[:, :, :8].flatten(1) / 255
            return features, features[:, :5], features[:, :6]
        asked["weights"].append(path)
        return extract
    monkeypatch.setattr(fid, "FEATURES", 24)
    monkeypatch.setattr(fid, "load_inception", load)
    honest = fid.load_features
    monkeypatch.setattr(fid, "load_features", lambda path, device: honest(path, device) and load("features", device))
    for path in (files / "few.npz", net):
        (tmp_path / path.name).symlink_to(path)
    save(tmp_path / "b.npz", data.glyphs(50, 12, 1)[0])
    np.savez(tmp_path / "plain.npz", **moments(24))
    (tmp_path / "file.pth").write_text("")
    monkeypatch.chdir(tmp_path)
    return asked


def outcome(monkeypatch, asked, words):
    """Runs fid.py and returns all results: the report, the saved arrays' names, and how the network was called."""
    for written in ("saved.npz", "more.npz", "out.json"):
        pathlib.Path(written).unlink(missing_ok=True)
    for list_ in asked.values():
        list_.clear()
    call(monkeypatch, fid, *words, "--device", "cpu", "--json", "out.json")
    saved = [sorted(np.load(name).files) for name in ("saved.npz", "more.npz") if pathlib.Path(name).exists()]
    told = json.loads(pathlib.Path("out.json").read_text())
    return told | dict(command=""), saved, asked["batches"][:], asked["weights"][:]


def test_the_table_has_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fid.py", "--help"])
    monkeypatch.setenv("COLUMNS", "1000")  # so that no flag is split over two lines
    with pytest.raises(SystemExit):
        fid.parse_args()
    flags = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out.split("options:")[1]))
    assert flags - {"--help", "--json", "--device"} == {row[0].split()[0] for row in ROWS}


@pytest.mark.parametrize("flag, mode, expected", CASES)
def test_a_flag_changes_what_it_says_or_is_refused(stand_in, monkeypatch, capsys, flag, mode, expected):
    words = MODES[mode].split()
    if expected == "yes":
        assert outcome(monkeypatch, stand_in, words) != outcome(monkeypatch, stand_in, words + flag.split())
    else:
        before = sorted(path.name for path in pathlib.Path().iterdir())
        line = refused(monkeypatch, capsys, fid, *words, *flag.split(), "--device", "cpu", "--json", "out.json")
        assert expected in line and stand_in["batches"] == []
        assert before == sorted(path.name for path in pathlib.Path().iterdir())


@pytest.mark.parametrize("words, flag", [
    ("glyphs --n 30 --resolution 12 --ref few.npz", "--n 40"), ("few.npz --n 30 --ref glyphs:3", "--images 40"),
    ("glyphs --n 30 --resolution 12 --ref few.npz", "--resolution 16"),
    ("few.npz --ref mnist", "--data-dir here"), ("mnist --save-stats saved.npz", "--data-dir here")])
def test_flags_of_data_sets_change_them(stand_in, monkeypatch, words, flag):
    def read(name, folder):
        return data.glyphs(20 if folder == "here" else 25, 12, 2)[0][..., :1], np.zeros(0)
    monkeypatch.setattr(data, "read_torchvision", read)
    monkeypatch.setattr(data, "load", lambda name, data_dir: argparse.Namespace(
        images=torch.from_numpy(read(name, data_dir)[0])))
    assert outcome(monkeypatch, stand_in, words.split()) != outcome(monkeypatch, stand_in, words.split() + flag.split())


def test_spatial_statistics_are_saved_and_compared(stand_in, monkeypatch, tmp_path):
    call(monkeypatch, fid, "b.npz", "--save-stats", "saved.npz", "--sfid", "--device", "cpu")
    both = [figures(monkeypatch, tmp_path, "few.npz", "--ref", ref, "--sfid") for ref in ("saved.npz", "b.npz")]
    assert both[0] == pytest.approx(both[1], rel=1e-12) and both[0]["sFID"] > 0


@pytest.mark.parametrize("words, named", [
    ("few.npz --save-stats few.npz", "few.npz"), ("few.npz --ref b.npz --json b.npz", "b.npz"),
    ("few.npz --ref b.npz --features small.pt --json small.pt", "small.pt"),
    ("few.npz --ref b.npz --inception file.pth --json file.pth", "file.pth"),
    ("few.npz --ref b.npz --save-stats link.npz", "link.npz"), ("few.npz --ref b.npz --save-stats ./deep/../b.npz", "b.npz"),
    ("few.npz --save-stats same.npz --json same.npz", "same file"),
    ("few.npz --save-stats same.npz --json deep/../same.npz", "same file")])
def test_nothing_that_is_read_is_overwritten(stand_in, monkeypatch, capsys, words, named):
    pathlib.Path("link.npz").hardlink_to("b.npz")
    pathlib.Path("deep").mkdir()
    before = {path: path.read_bytes() for path in pathlib.Path().iterdir() if path.is_file()}
    assert named in refused(monkeypatch, capsys, fid, *words.split(), "--device", "cpu")
    assert before == {path: path.read_bytes() for path in pathlib.Path().iterdir() if path.is_file()}


@pytest.mark.parametrize("place", ["samples", "ref"])
def test_too_few_images_for_precision_are_refused_before_the_network_runs(stand_in, monkeypatch, capsys, place):
    save(pathlib.Path("three.npz"), data.glyphs(3, 12)[0])
    both = ["three.npz", "--ref", "b.npz"] if place == "samples" else ["b.npz", "--ref", "three.npz"]
    line = refused(monkeypatch, capsys, fid, *both, "--pr", "--device", "cpu")
    assert "three.npz" in line and "more than 3" in line and stand_in["batches"] == []


def test_a_width_that_is_not_inceptions_is_refused_before_a_download(files, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "plain.npz", **moments(24))
    monkeypatch.setattr(fid, "load_inception", None)
    line = refused(monkeypatch, capsys, fid, files / "few.npz", "--ref", tmp_path / "plain.npz", "--device", "cpu")
    assert "24 features" in line and "plain.npz" in line and "--features" in line


def test_the_export_of_dinov2_makes_a_network_for_features(files, tmp_path, monkeypatch):
    """Runs the code of docs/evaluation.md with a stand-in for the network that it downloads."""
    class StandIn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 32, 14, 14)

        def forward(self, x):
            assert x.shape[1:] == (3, 224, 224)
            return self.patches(x).relu().mean((2, 3))
    asked, network = [], fill(StandIn())
    monkeypatch.setattr(torch.hub, "load", lambda *names: (asked.append(names), network)[1])
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL | re.MULTILINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "docs/evaluation.md", "exec"), {"__name__": "export"})
    assert asked == [("facebookresearch/dinov2", "dinov2_vitl14")]
    images = torch.from_numpy(data.glyphs(5, 16)[0]).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(images / 255, size=224, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    found, _, _ = fid.load_features(tmp_path / "dinov2.pt")(images)
    assert (found - network((resized - mean) / std)).abs().max() < 1e-5
    assert figures(monkeypatch, tmp_path, "glyphs", "--n", 40, "--ref", files / "few.npz", "--features",
                   tmp_path / "dinov2.pt")["Frechet distance (dinov2.pt)"] > 0


@pytest.mark.parametrize("make, words", [
    (lambda p: None, "there is no such file"),
    (lambda p: p.write_text("text"), "TorchScript"),
    (lambda p: torch.save({}, p), "TorchScript"),
    (lambda p: script(torch.nn.Identity(), p), "[N, D]"),
    (lambda p: script(torch.nn.Flatten(0), p), "[N, D]"),
    (lambda p: script(Rigid(), p, size=10), "fails on images")])
def test_networks_that_are_none(files, tmp_path, monkeypatch, capsys, make, words):
    make(tmp_path / "net.pt")
    line = refused(monkeypatch, capsys, fid, files / "few.npz", "--ref", "glyphs", "--features", tmp_path / "net.pt")
    assert words in line and "net.pt" in line


def test_features_that_are_no_numbers(files, tmp_path, monkeypatch, capsys):
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return x.float().flatten(1)[:, :3] * float("nan")
    script(Nothing(), tmp_path / "net.pt")
    call_flags = [files / "a.npz", "--ref", files / "a.npz", "--features", tmp_path / "net.pt", "--device", "cpu"]
    assert "NaN or infinity" in refused(monkeypatch, capsys, fid, *call_flags)


def test_inception_that_can_not_be_had(files, weights, tmp_path, monkeypatch, capsys):
    flags = [files / "few.npz", "--ref", files / "few.npz"]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    line = refused(monkeypatch, capsys, fid, *flags)
    assert fid.INCEPTION_URL in line and str(tmp_path / "checkpoints") in line and "--inception" in line
    assert "nowhere.pth" in refused(monkeypatch, capsys, fid, *flags, "--inception", "nowhere.pth")
    assert "6726825d" in refused(monkeypatch, capsys, fid, *flags, "--inception", weights)
    monkeypatch.setattr(fid, "INCEPTION_SHA256", "")
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path / "other.pth")
    assert "other.pth" in refused(monkeypatch, capsys, fid, *flags, "--inception", tmp_path / "other.pth")


def test_a_mistake_in_the_part_of_the_second_process_is_told_once(net, tmp_path):
    for i, image in enumerate(data.glyphs(9, 12)[0]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_text("not an image")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "fid.py", tmp_path, "--ref", "glyphs", "--features", net, "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(told) == 1 and "7.png" in told[0], done.stderr
    assert "fid.py\", line" not in done.stderr


def test_statistics_that_do_not_compare_are_told_once(tmp_path):
    """Only process 0 compares the statistics, but both processes end with exit code 2."""
    for name, d in (("a", 3), ("b", 4)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(d), sigma=np.eye(d))
    processes = popen_two(tmp_path / "a.npz", "--ref", tmp_path / "b.npz", "--device", "cpu", script="fid.py")
    told = "".join(process.communicate()[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert told == "error: statistics of 3 features cannot be compared with statistics of 4\n"


def test_the_constants_of_adm_and_torch_fidelity():
    assert (fid.KEPT_REFERENCE, fid.SCORE_PART, fid.FEW) == (10_000, 5_000, 2_048)
    assert fid.kernel_distance.__defaults__ == (100, 1000) and fid.precision_recall.__defaults__ == (3, 2000)


def test_statistics_of_another_network_are_told_before_anything_is_downloaded(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4), features="resnet.pt sha256:01234567")
    monkeypatch.setattr(fid, "load_inception", None)
    said = refused(monkeypatch, capsys, fid, tmp_path / "x.npz", "--ref", tmp_path / "ref.npz", "--device", "cpu")
    assert "statistics of the features of resnet.pt" in said and "--features" in said
