"""fid.py: closed forms, the public Inception classes, every kind of file, processes, mistakes."""

import hashlib
import json
import math
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
from test_training import call, refused, run_two

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
    assert abs(fid.frechet_distance(mu1, a, mu1, a)) < 1e-12 * np.trace(a)


def test_distance_of_covariances_without_full_rank(capsys):
    """Ten features that 4 and 3 images leave in a plane each: exact, and said."""
    a, b = (np.cov(uniform(name, (n, 10)), rowvar=False) for name, n in (("a", 4), ("b", 3)))
    capsys.readouterr()
    distance = fid.frechet_distance(np.zeros(10), a, np.zeros(10), b)
    (line,) = capsys.readouterr().err.splitlines()
    assert "rank 2 of 10" in line
    factor_a, factor_b = (np.linalg.svd(s)[0][:, :k] * np.sqrt(np.linalg.svd(s)[1][:k]) for s, k in ((a, 3), (b, 2)))
    nuclear = np.linalg.svd(factor_a.T @ factor_b)[1].sum()            # tr (A B)^(1/2) = |A^(1/2) B^(1/2)|_*
    assert distance == pytest.approx(np.trace(a) + np.trace(b) - 2 * nuclear, rel=1e-7)
    assert abs(fid.frechet_distance(np.zeros(10), a, np.zeros(10), a)) < 1e-6 * np.trace(a)


def test_distance_refuses_what_is_no_number_and_other_shapes():
    mu, sigma = np.zeros(3), np.eye(3)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            fid.frechet_distance(mu, sigma, mu + bad, sigma)
        with pytest.raises(ValueError, match="finite"):
            fid.frechet_distance(mu, sigma + bad, mu, sigma)
    with pytest.raises(ValueError, match="3 and of 4"):
        fid.frechet_distance(mu, sigma, np.zeros(4), np.eye(4))


# --------------------------------------------------------------------------------------------------
# Inception.

def public_inception():
    """Inception by formula: also running_mean 0.1 u and running_var 0.5 + 0.25 u, u that of their names.

    A variance around a half makes up for what the ReLUs take, so that depth does not drown the input.
    """
    net = fill(fid.Inception())
    for name, buffer in net.named_buffers():
        if not name.endswith("num_batches_tracked"):
            u = torch.from_numpy(uniform(name, buffer.shape))
            buffer.copy_(0.5 + 0.25 * u if name.endswith("var") else 0.1 * u)
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of Inception's weights by formula, without batch counters, as torch-fidelity's conversion writes it."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: v for k, v in public_inception().state_dict().items() if not k.endswith("batches_tracked")}, path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    """Inception from that file, whose hash is taken for the right one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
        return fid.load_inception(weights)


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 256, 299])
def test_inception_is_the_public_classes(inception, size):
    """pytorch-fid's class was fed TF1's resize written out in NumPy, torch-fidelity's the bytes themselves."""
    images = np.rint(127.5 + 127.5 * uniform(f"images{size}", (2, 3, size, size))).astype(np.uint8)
    pool, spatial, logits = inception(torch.from_numpy(images))
    for name in ("inception-pytorch-fid", "inception-torch-fidelity"):
        stored, _ = golden(name)
        assert_equal(stored, pool, f"pool{size}")
        assert_equal(stored, logits, f"logits{size}")
        if f"spatial{size}" in stored["outputs"]:
            assert_equal(stored, spatial, f"spatial{size}")
    assert pool[0].sub(pool[1]).abs().max() > 1e-3 * pool.abs().max()      # the input is not drowned


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
    """Seven images in parts of 3, 3 and 1, batches across the parts' ends."""
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


# --------------------------------------------------------------------------------------------------
# The program.

class Small(torch.nn.Module):
    """uint8 [N, 3, H, W] -> [N, 24]."""

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
    """2,100 glyphs and 2,100 others, uint8 [N, 12, 12, 3]."""
    return [data.glyphs(2100, 12, seed)[0] for seed in (0, 1)]


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    """Two npz files of 2,100 images, and 30 of them in every form."""
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
    """The figures of a call, in the order of its table."""
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
    assert "few.npz: figures from 30 images, fewer than 2,048" in capsys.readouterr().err
    assert figures(monkeypatch, tmp_path, files / name, *flags) == pytest.approx(expected, rel=1e-6)


def test_images_come_in_any_piece(files, images):
    for name in ("few.npz", "few-images.npz", "glyphs:0"):
        source = fid.open_source(str(files / name) if "." in name else name, n=30, resolution=12)
        assert source.count == 30
        for i, j in ((12, 30), (3, 5), (0, 30)):                       # also backwards
            assert np.array_equal(source.read(i, j), images[0][i:j])


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_data_set_is_its_training_images(images, monkeypatch, name):
    monkeypatch.setattr(data, "read_torchvision",
                        lambda asked, folder: (images[0][:7], np.arange(7)) if (asked, folder) == (name, "here") else None)
    source = fid.open_source(name, data_dir="here")
    assert source.count == 7 and np.array_equal(source.read(2, 5), images[0][2:5])


def test_grey_images_become_rgb(net, tmp_path, monkeypatch):
    grey = np.rint(127.5 + 127.5 * uniform("grey", (8, 12, 12, 1))).astype(np.uint8)
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    np.savez(tmp_path / "rgb.npz", arr_0=grey.repeat(3, axis=3))
    (tmp_path / "grey").mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image[..., 0]).save(tmp_path / "grey" / f"{i}.png")
    for name in ("grey.npz", "grey"):
        assert abs(figures(monkeypatch, tmp_path, tmp_path / name, "--ref", tmp_path / "rgb.npz", "--features", net)[
            NAME]) < 1e-6


def test_statistics_of_every_kind(files, net, tmp_path, monkeypatch, capsys):
    """Ours, pytorch-fid's and EDM's, ADM's, torch-fidelity's with tensors and with NumPy arrays."""
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


def test_all_measures_of_inception(weights, inception, tmp_path, monkeypatch, capsys):
    """On few images, and with a distance that needs no eigenvalues: those of 2,048 features take seconds."""
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
    """A source with a mistake, and what its line must name."""
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
        save(path, good[:1], mu=np.zeros(d))               # and without sigma no statistics
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
    ([], "--ref is needed"),
    (["--kid", "--save-stats", "x.npz"], "--ref is needed"),
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
    (["--ref", "STATISTICS", "--pr"], "features of images"),
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


@pytest.mark.parametrize("make, words", [
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
    assert "finite" in refused(monkeypatch, capsys, fid, *call_flags)


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
    torch.save(fid.Conv(3, 4, 1).state_dict(), tmp_path / "other.pth")
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


def test_the_constants_of_adm_and_torch_fidelity():
    assert (fid.KEPT_REFERENCE, fid.SCORE_PART, fid.FEW) == (10_000, 5_000, 2_048)
    assert fid.kernel_distance.__defaults__ == (100, 1000) and fid.precision_recall.__defaults__ == (3, 2000)


def test_statistics_of_another_network_are_told_before_anything_is_downloaded(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4), features="resnet.pt sha256:01234567")
    monkeypatch.setattr(fid, "load_inception", None)
    said = refused(monkeypatch, capsys, fid, tmp_path / "x.npz", "--ref", tmp_path / "ref.npz", "--device", "cpu")
    assert "statistics of resnet.pt" in said and "--features" in said
