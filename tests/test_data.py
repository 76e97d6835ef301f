"""Tests data sets in every form, their faults, batches, latents, EDM's augmentation and the conversion to 8 bits."""

import argparse
import gzip
import itertools
import json
import math
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from formula import fill
from PIL import Image

import data
import encode
import facm
import flow
import models
from common import checkpoints, folders, imagefiles, processes, seeds, torchrun
from common.augment import augment
from common.flags import Parser, add_flags
from common.log import Log
from common.messages import fail
from common.run import Run


def test_glyphs_are_deterministic_and_labelled():
    images, labels = data.glyphs(30, size=16, seed=5)
    assert images.shape == (30, 16, 16, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [i % 10 for i in range(30)]
    again, _ = data.glyphs(12, size=16, seed=5)
    assert np.array_equal(images[:12], again)                          # an image depends on (seed, index), not on n
    part, digits = data.glyphs(9, size=16, seed=5, first=21)
    assert np.array_equal(images[21:], part) and np.array_equal(labels[21:], digits)
    assert not np.array_equal(images, data.glyphs(30, size=16, seed=6)[0])
    assert data.glyphs(1, size=32)[0].shape == (1, 32, 32, 3)


def test_every_glyph_has_ink_on_paper():
    """The two colours differ in luminance by more than 128, and the corners show only the paper."""
    images, _ = data.glyphs(200, size=16)
    luminance = images @ np.array([0.299, 0.587, 0.114])
    paper = luminance[:, 0, 0]
    contrast = np.abs(luminance - paper[:, None, None]).max(axis=(1, 2))
    assert (contrast > 90).all()                   # thin strokes are blended with the paper
    assert np.abs(luminance[:, [0, 0, -1, -1], [0, -1, 0, -1]] - paper[:, None]).max() == 0


def test_dataset_is_the_glyphs():
    dataset = data.Glyphs(40, 16, seed=5)
    images, labels = data.glyphs(40, 16, seed=5)
    assert dataset.shape == (3, 16, 16) and dataset.num_classes == 10
    x1, y = dataset.batch(seed=0, first=0, batch=40)
    index = dataset.index(0, 0, 40)
    assert torch.equal(y, torch.from_numpy(labels)[index])
    assert np.array_equal(data.to_uint8(x1).numpy(), images[index])    # the conversion and its inverse are exact


def test_each_sample_once_an_epoch_whatever_the_pieces():
    """An epoch contains each sample once. The order depends neither on the number of processes or micro-batches nor on
    the step where reading begins."""
    dataset = data.Glyphs(30, 12, seed=0)
    whole = torch.cat([dataset.index(3, first, 8) for first in range(0, 120, 8)])          # four epochs
    for epoch in whole.view(4, 30):
        assert epoch.sort().values.tolist() == list(range(30))
    assert not torch.equal(whole[:30], whole[30:60])
    for pieces in (2, 4, 8):
        size = 8 // pieces
        parts = torch.cat([dataset.index(3, first, 8, slice(k * size, (k + 1) * size))
                           for first in range(0, 120, 8) for k in range(pieces)])
        assert torch.equal(whole, parts)
    assert torch.equal(dataset.index(3, 56, 8), whole[56:64])          # a batch is read directly, not iterated to
    assert torch.equal(dataset.index(3, 56, 16), whole[56:72])         # the address counts images, not batches
    assert not torch.equal(whole, torch.cat([dataset.index(4, first, 8) for first in range(0, 120, 8)]))


PIXELS = np.random.default_rng(0).integers(0, 256, (7, 12, 12, 3), dtype=np.uint8)


def write_images(folder, names):
    for name, image in zip(names, PIXELS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


def all_images(dataset, flip=False):
    n = len(dataset.labels)
    return data.to_uint8(dataset.items(torch.arange(n), torch.full((n,), flip))).numpy()


NAMES = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/sub/1.png", "eel/0.png", "eel/1.png", "eel/2.png"]


@pytest.mark.parametrize("kind", ["folder", "zip", "zip in a folder", "npz", "npz as ADM's"])
def test_one_set_of_images_in_every_form(tmp_path, kind):
    labels = [0, 0, 1, 1, 2, 2, 2]
    folder = write_images(tmp_path / "images", NAMES)
    path = folder
    if kind.startswith("zip"):
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name in NAMES:
                archive.write(folder / name, f"top/{name}" if "folder" in kind else name)
    elif kind.startswith("npz"):
        path = tmp_path / "images.npz"
        names = ("arr_0", "arr_1") if "ADM" in kind else ("images", "labels")
        np.savez(path, **dict(zip(names, (PIXELS, np.array(labels)))))
    dataset = data.load(str(path))
    assert dataset.shape == (3, 12, 12) and dataset.num_classes == 3 and dataset.labels.tolist() == labels
    assert np.array_equal(all_images(dataset), PIXELS)
    assert np.array_equal(all_images(dataset, flip=True), PIXELS[:, :, ::-1])
    assert data.load(str(path), num_classes=5).num_classes == 5
    assert data.load(str(path), uncond=True, num_classes=2).num_classes == 0
    with pytest.raises(ValueError, match="--num-classes 2"):
        data.load(str(path), num_classes=2)


def test_a_flat_folder_has_no_classes(tmp_path):
    dataset = data.load(str(write_images(tmp_path, [f"{i}.png" for i in range(7)])))
    assert dataset.num_classes == 0 and np.array_equal(all_images(dataset), PIXELS)


@pytest.mark.parametrize("kind", ["folder", "zip", "zip in a folder"])
@pytest.mark.parametrize("inner", ["", "sub/"])
def test_one_class_folder_is_one_class(tmp_path, kind, inner):
    """A single class folder is one class, as in ImageFolder, even if some of its images are in subfolders."""
    names = [f"cat/{inner if i % 2 else ''}{i}.png" for i in range(7)]
    folder = path = write_images(tmp_path / "images", names)
    if kind.startswith("zip"):
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.write(folder / name, f"top/{name}" if "folder" in kind else name)
    dataset = data.load(str(path))
    assert dataset.num_classes == 1 and dataset.labels.tolist() == [0] * 7


def test_a_flat_zip_has_no_classes(tmp_path):
    names = [f"{i}.png" for i in range(7)]
    write_images(tmp_path, names)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / name, name)
    dataset = data.load(str(tmp_path / "images.zip"))
    assert dataset.num_classes == 0 and np.array_equal(all_images(dataset), PIXELS)


def test_xflip_mirrors_one_half_and_follows_from_the_address(tmp_path):
    plain = data.Images(PIXELS, np.zeros(7), 0)
    dataset = data.Images(PIXELS, np.zeros(7), 0, xflip=True)
    mirrored = []
    for first in range(0, 700, 7):
        x, straight = dataset.batch(0, first, 7)[0], plain.batch(0, first, 7)[0]
        flips = [torch.equal(a, b.flip(2)) for a, b in zip(x, straight)]
        assert all(f or torch.equal(a, b) for f, a, b in zip(flips, x, straight))
        assert torch.equal(dataset.batch(0, first, 7, slice(2, 4))[0], x[2:4])
        mirrored += flips
    assert 0.4 < np.mean(mirrored) < 0.6


def test_batches_made_ahead_are_those_that_are_asked_for(tmp_path):
    dataset = data.load(str(write_images(tmp_path, NAMES)), xflip=True)
    fresh = data.load(str(tmp_path), xflip=True)
    fresh.ahead = False
    for first in (0, 4, 8, 100, 4, 8, 12):                             # in order, and with jumps
        for rows in (slice(0, 2), slice(2, 4)):
            assert torch.equal(dataset.batch(1, first, 4, rows)[0], fresh.batch(1, first, 4, rows)[0])


def test_center_crop():
    x, y = np.meshgrid(np.arange(100.0), np.arange(60.0))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    crop = imagefiles.center_crop(ramp, 30)                                  # halved to 50x30, then cropped at 10
    assert crop.shape == (30, 30, 3)
    assert np.abs(crop[5:-5, 5:-5, 0] - (2 * np.arange(10, 40) + 0.5)[None, 5:-5]).max() <= 1
    assert np.abs(crop[5:-5, 5:-5, 1] - (2 * np.arange(30) + 0.5)[5:-5, None]).max() <= 1
    assert np.array_equal(imagefiles.center_crop(Image.fromarray(PIXELS[0]), 12), PIXELS[0])


def damage(folder, what):
    """Writes a data set with one fault. Returns its path and a word that the error must contain."""
    if what == "broken image":
        write_images(folder, NAMES)
        (folder / "dog/0.png").write_bytes((folder / "dog/0.png").read_bytes()[:60])
        return folder, "dog/0.png"
    if what == "mixed sizes":
        Image.new("RGB", (9, 9)).save(write_images(folder, NAMES) / "eel/9.png")
        return folder, "eel/9.png"
    if what == "image beside the class folders":
        Image.new("RGB", (12, 12)).save(write_images(folder, NAMES) / "9.png")
        return folder, "9.png"
    if what == "16 bits":                  # Pillow would make them white
        write_images(folder, NAMES)
        Image.fromarray(np.full((12, 12), 30_000, np.uint16)).save(folder / "dog/0.png")
        return folder, "more than 8 bits"
    if what == "empty class folder":
        (write_images(folder, NAMES) / "cow").mkdir()
        return folder, "cow"
    if what == "no npz":
        np.save(folder.with_suffix(".npy"), PIXELS)
        folder.with_suffix(".npy").rename(folder.with_suffix(".npz"))
        return folder.with_suffix(".npz"), "set.npz"
    if what == "empty folder":
        folder.mkdir()
        return folder, "no images"
    if what == "no zip":
        (folder.with_suffix(".zip")).write_bytes(b"PK")
        return folder.with_suffix(".zip"), "zip"
    path = folder.with_suffix(".npz")
    content = {"objects in an npz": dict(images=np.array([PIXELS[0], PIXELS[0][:5]], dtype=object)),
               "floats in an npz": dict(images=PIXELS / 255), "no images in an npz": dict(pictures=PIXELS),
               "too few labels": dict(images=PIXELS, labels=np.arange(6)),
               "a negative label": dict(images=PIXELS, labels=np.arange(7) - 1)}[what]
    np.savez(path, **content)
    return path, path.name


@pytest.mark.parametrize("what", [
    "broken image", "mixed sizes", "image beside the class folders", "empty folder", "no zip", "objects in an npz",
    "floats in an npz", "no images in an npz", "too few labels", "a negative label", "16 bits", "empty class folder",
    "no npz"])
def test_faults_name_the_file(tmp_path, what):
    path, word = damage(tmp_path / "set", what)
    with pytest.raises(ValueError, match=re.escape(word)):
        all_images(data.load(str(path)))


def test_skip_broken_lists_what_it_leaves_out(tmp_path, capsys):
    path, word = damage(tmp_path / "set", "broken image")
    dataset = data.load(str(path), skip_broken=True)
    assert np.array_equal(all_images(dataset), PIXELS[[0, 1, 3, 4, 5, 6]])
    assert dataset.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert "1 broken" in (said := capsys.readouterr().err) and word in said


def test_a_class_whose_images_are_all_broken_keeps_its_number(tmp_path):
    path, _ = damage(tmp_path / "set", "broken image")
    (path / "dog/sub/1.png").write_bytes(b"")
    dataset = data.load(str(path), skip_broken=True)
    assert dataset.labels.tolist() == [0, 0, 2, 2, 2] and dataset.num_classes == 3


def test_links_are_followed_and_hidden_files_left_out(tmp_path):
    write_images(tmp_path / "real", NAMES)
    (tmp_path / "set").mkdir()
    for name in ("cat", "eel"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/eel/._2.png").write_bytes(b"what a Mac adds")
    (tmp_path / "set/.cache").mkdir()
    dataset = data.load(str(tmp_path / "set"))
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1] and np.array_equal(all_images(dataset), PIXELS[[0, 1, 4, 5, 6]])


def test_classes_are_not_made_up(tmp_path):
    np.savez(tmp_path / "x.npz", images=PIXELS)
    with pytest.raises(ValueError, match="x.npz has no labels; use --uncond"):
        data.load(str(tmp_path / "x.npz"), num_classes=10)
    assert data.load(str(tmp_path / "x.npz"), num_classes=10, uncond=True).num_classes == 0


# ----------------------------------------------------------------------------------------------------------------------
# Every kind of data set is read, and every kind of file is written.

SQUARES = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
GREY = SQUARES[..., :1]
SEVEN = np.array([0, 0, 1, 1, 2, 2, 2])


def offline(*args, **options):
    raise OSError("no route")


def write_idx(folder, name, values, packed):
    """Writes an IDX file: two zeros, the type 8, the number of dimensions, the sizes and the bytes."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    content = header + values.astype(np.uint8).tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    if packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (folder / name).write_bytes(content)


def write_kind(folder, kind):
    """Writes a data set of this kind into a folder. Returns --data, --data-dir, further flags and the expected pixels
    [7, 16, 16, C]."""
    colour, _, form = kind.partition(" ")
    pixels, flags = (SQUARES, []) if colour == "RGB" else (GREY, [])
    names = [f"{label}/{i}.png" for i, label in enumerate(SEVEN)]
    if form in ("gz", "unpacked"):
        raw = folder / "data" / ("MNIST" if colour == "mnist" else "FashionMNIST") / "raw"
        for part, shift in (("train", 0), ("t10k", 1)):
            write_idx(raw, f"{part}-images-idx3-ubyte", np.roll(GREY[..., 0], shift, axis=0), form == "gz")
            write_idx(raw, f"{part}-labels-idx1-ubyte", np.roll(SEVEN, shift), form == "gz")
        return colour, folder / "data", flags, pixels
    if form.startswith("npz"):
        squeezed = pixels[..., 0] if form.endswith("3") else pixels
        np.savez(folder / "x.npz", images=squeezed, labels=SEVEN)
        return folder / "x.npz", None, flags, pixels
    for name, image in zip(names, pixels):
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / "set" / name)
    if form.endswith("--channels 1"):
        flags = ["--channels", 1]
    else:
        pixels = np.broadcast_to(pixels, SQUARES.shape)
    if form.startswith("folder"):
        return folder / "set", None, flags, pixels
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        for name in names:
            archive.write(folder / "set" / name, name)
    return folder / "x.zip", None, flags, pixels


def read_shard(path):
    """Reads a .safetensors file with NumPy alone and returns {name: array}."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    arrays = {}
    for name, tensor in json.loads(content[8:8 + length]).items():
        if name != "__metadata__":
            first, last = (8 + length + place for place in tensor["data_offsets"])
            arrays[name] = np.frombuffer(content[first:last], {"F32": "<f4", "I64": "<i8"}[tensor["dtype"]]).reshape(tensor["shape"])
    return arrays


def read_statistics(path):
    """Reads mean and std with NumPy alone from latents_stats.pt, which is a zip archive of numbered files."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if "/data/" in name)
        return [np.frombuffer(archive.read(name), "<f4") for name in names]


def tiles(pixels, scale):
    """Arranges images [N, H, W, C] in rows of ten on white, and enlarges each pixel by `scale`."""
    sheet = np.full((16 * -(-len(pixels) // 10), 160, pixels.shape[3]), 255, np.uint8)
    for i, image in enumerate(pixels):
        row, column = divmod(i, 10)
        sheet[16 * row:16 * row + 16, 16 * column:16 * column + 16] = image
    return np.kron(sheet, np.ones((scale, scale, 1), np.uint8)).squeeze()


KINDS = ["RGB folder", "RGB zip", "RGB npz", "grey folder", "grey folder --channels 1", "grey zip", "grey zip --channels 1", "grey npz",
         "grey npz of 3", "mnist gz", "mnist unpacked", "fashion gz", "fashion unpacked"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_through_every_output(tmp_path, monkeypatch, capsys, kind):
    """Each file that is written is read back with NumPy and Pillow alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    name, place, flags, pixels = write_kind(tmp_path, kind)
    vae = small_vae(tmp_path)

    # inspect
    where = ["--data-dir", place] if place else []
    command(monkeypatch, data, "inspect", name, *flags, *where, "--grid", "grid.png")
    said = capsys.readouterr().out
    assert f"7 samples of shape [{pixels.shape[3]}, 16, 16], 3 classes with 2 to 3 samples each" in said
    assert np.array_equal(np.asarray(Image.open("grid.png")), tiles(pixels, 4))

    # The batches, and a preview of them
    dataset = data.load(str(name), data_dir=place, channels=flags[1] if flags else None)
    assert dataset.labels.tolist() == SEVEN.tolist() and np.array_equal(all_images(dataset), pixels)
    x, y = dataset.batch(0, 0, 14)
    data.save_preview(tmp_path / "preview.png", x)
    index = dataset.index(0, 0, 14).numpy()
    assert np.array_equal(np.asarray(Image.open("preview.png")), tiles(pixels[index], 3)) and y.tolist() == SEVEN[index].tolist()

    # encode, which makes grey images RGB
    command(monkeypatch, encode, "--images", name, "--vae", "vae.pt", "--out", "z", "--resolution", 16, "--device", "cpu", "--shard", 4,
            "--batch", 1)
    shards = [read_shard(path) for path in sorted((tmp_path / "z").glob("*.safetensors"))]
    assert [len(shard["labels"]) for shard in shards] == [4, 3]
    assert np.concatenate([shard["labels"] for shard in shards]).tolist() == SEVEN.tolist()
    rgb = torch.from_numpy(np.broadcast_to(pixels, SQUARES.shape) / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    for key, mirror in (("latents", False), ("latents_flip", True)):
        z = np.concatenate([shard[key] for shard in shards])
        mean, std = vae.encode(rgb.flip(3) if mirror else rgb)
        noise = torch.stack([torch.randn(4, 4, 4, generator=seeds.generator("cpu", 0, i, mirror)) for i in range(7)])
        assert z.dtype == np.float32 and np.allclose(z, (mean + std * noise).detach().numpy(), atol=1e-4)
    z = np.concatenate([shard["latents"] for shard in shards]).astype(np.float64)
    mean, std = read_statistics(tmp_path / "z/latents_stats.pt")
    assert np.allclose(mean, z.mean((0, 2, 3)), atol=1e-5) and np.allclose(std, z.std((0, 2, 3), ddof=1), rtol=1e-5)

    # The latents themselves
    command(monkeypatch, data, "inspect", "z", "--grid", "latents.png")
    wide = (1, 4, 1, 1)
    shown = np.clip(np.rint(127.5 * (z - mean.reshape(wide)) / std.reshape(wide) / 3 + 127.5), 0, 255)[:, :3]
    grid = np.asarray(Image.open("latents.png"))           # 4x4 latents, 16 times as large
    assert grid.shape == (64, 640, 3)
    found = np.stack([grid[::16, 64 * i:64 * i + 64:16].transpose(2, 0, 1) for i in range(7)])
    assert np.abs(found.astype(int) - shown).max() <= 1
    assert "contains latents and not images" in refused_by(monkeypatch, capsys, encode, "--images", "z", "--vae", "vae.pt", "--out", "y")


def refused_by(monkeypatch, capsys, script, *argv):
    """Runs a program that must end with exit code 2, and returns the one line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, script, *argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if "are cropped and scaled to" not in line and "left out" not in line]
    assert end.value.code == 2 and len([line for line in lines if line]) == 1 and lines[-1].startswith("error: "), lines
    return lines[-1]


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 32])
def test_latents_of_any_number_of_channels_are_shown(tmp_path, monkeypatch, capsys, channels):
    write_shards(tmp_path / "z", shape=(channels, 2, 2), latents_flip=None)    # the mirrored latents are not shown
    command(monkeypatch, data, "inspect", tmp_path / "z", "--grid", tmp_path / "grid.png")
    line = capsys.readouterr().out.splitlines()[-2]
    figures = [float(word) for word in re.findall(r"-?\d+\.\d+", line)]
    z = data.load(str(tmp_path / "z"), num_classes=6, xflip=False).items(torch.arange(12), torch.zeros(12, dtype=torch.bool))
    assert "as a network sees them" in line
    assert np.allclose(figures, [*z.mean((0, 2, 3)).tolist(), *z.std((0, 2, 3)).tolist()], atol=1e-3)
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape[2:] == ((3,) if channels >= 3 else ())


def test_test_images_are_read_from_idx_files_too(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    _, place, _, _ = write_kind(tmp_path, "mnist gz")
    images, labels = data.read_torchvision("mnist", place, train=False)
    assert np.array_equal(images, np.roll(GREY, 1, axis=0)) and labels.tolist() == np.roll(SEVEN, 1).tolist()


@pytest.mark.parametrize("damage", ["cut", "no gzip", "other magic", "too short", "labels of another length", "empty"])
def test_a_damaged_idx_file_is_one_line(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    _, place, _, _ = write_kind(tmp_path, "mnist gz")
    path = place / "MNIST/raw/train-images-idx3-ubyte.gz"
    held = path.read_bytes()
    content = {"cut": held[:len(held) // 2], "no gzip": b"<html>", "other magic": gzip.compress(b"\0\0\x0d\1" + bytes(20)), "empty": b"",
               "too short": gzip.compress(gzip.decompress(held)[:-9]), "labels of another length": held}[damage]
    path.write_bytes(content)
    if damage.startswith("labels"):
        write_idx(path.parent, "train-labels-idx1-ubyte", SEVEN[:5], packed=True)
    assert str(path) in refused_by(monkeypatch, capsys, data, "inspect", "mnist", "--data-dir", place, "--grid", tmp_path / "g.png")


def test_mnist_without_a_network_asks_for_files_that_are_read(tmp_path, monkeypatch):
    """The files that the error asks for are the ones that are read."""
    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz from https://.* into .*MNIST/raw") as error:
        data.load("mnist", data_dir=str(tmp_path / "data"))
    assert "unpacked" not in str(error.value)
    write_kind(tmp_path, "mnist gz")
    assert len(data.load("mnist", data_dir=str(tmp_path / "data")).labels) == 7


# ----------------------------------------------------------------------------------------------------------------------
# The fingerprint of a data set.

def identity(*argv):
    """Returns args.samples of facm.py for these flags."""
    args = facm_args(*argv)
    data.load_for(args)
    return args.samples


def facm_args(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["facm.py", "--precision", "float32", *map(str, argv)])
        return facm.parse_args()


def change_one(folder, kind):
    """Changes one pixel or one number of a data set. Its counts, names and labels stay the same."""
    if kind.startswith("latents"):
        path = folder / "z/latents_rank00_shard001.safetensors"
        held = safetensors.torch.load_file(path)
        held[kind][1, 2, 3, 0] += 1
        safetensors.torch.save_file(held, path)
    elif kind == "statistics":
        torch.save(dict(mean=torch.zeros(4), std=torch.ones(4)), folder / "z/latents_stats.pt")
    elif kind == "mnist gz":
        other = GREY.copy()
        other[3, 5, 5] ^= 1
        write_idx(folder / "data/MNIST/raw", "train-images-idx3-ubyte", other[..., 0], packed=True)
    elif "npz" in kind:
        other = np.load(folder / "x.npz")
        images = other["images"].copy()
        images[3, 5, 5] ^= 1
        np.savez(folder / "x.npz", images=images, labels=other["labels"])
    else:
        path = folder / "set/1/3.png"
        image = np.asarray(Image.open(path)).copy()
        image[5, 5] ^= 1
        Image.fromarray(image).save(path)
        if (folder / "x.zip").exists():
            with zipfile.ZipFile(folder / "x.zip", "w") as archive:
                for name in sorted((folder / "set").rglob("*.png")):
                    archive.write(name, name.relative_to(folder / "set").as_posix())


@pytest.mark.parametrize("kind", ["RGB folder", "RGB zip", "RGB npz", "grey npz of 3", "grey zip", "mnist gz", "latents", "latents_flip",
                                  "statistics"])
def test_a_data_set_is_known_by_its_content(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("torchvision.datasets.MNIST", offline)

    def write(folder):
        folder.mkdir()
        if kind.startswith("latents") or kind == "statistics":
            write_shards(folder / "z")
            return ["--data", folder / "z", "--preset", "imagenet_latents"]
        name, place, _, _ = write_kind(folder, kind)
        return ["--data", name, "--preset", "mnist", *(["--data-dir", place] if place else [])]

    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    known = identity(*first)
    assert re.fullmatch(r"(7|12) \(fingerprint [0-9a-f]{12}\)", known)
    assert identity(*first) == known and identity(*second) == known    # the path does not matter
    change_one(tmp_path / "b", kind)
    assert identity(*second) != known and identity(*first) == known


def test_the_same_data_in_another_process_and_as_a_zip_have_the_same_fingerprint(tmp_path):
    zipped, *_ = write_kind(tmp_path, "RGB zip")
    code = ("import sys; sys.path[:0] = sys.argv[1:2]; import data; print(data.fingerprint(data.load(sys.argv[2], 12)))")
    done = [subprocess.run([sys.executable, "-c", code, ROOT, path], capture_output=True, text=True).stdout for path in (zipped, tmp_path / "set")]
    assert done[0] == done[1] == data.fingerprint(data.load(str(zipped))) + "\n"


def test_a_fingerprint_depends_neither_on_the_size_nor_on_the_mirrors_of_images(tmp_path):
    """The size and --xflip are flags of a run, which are compared separately."""
    for kind in ("RGB npz", "grey folder --channels 1"):
        name = str(write_kind(tmp_path, kind)[0])
        assert len({data.fingerprint(data.load(name, size, xflip=xflip)) for size in (None, 8) for xflip in (True, False)}) == 1


def test_a_large_set_is_not_read_as_a_whole(tmp_path, monkeypatch):
    """Of 3,000 files, only the first 64 KiB of 256 are read, among them the first and the last file."""
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    for i in range(3000):
        (folder / f"{i:04d}.png").hardlink_to(tmp_path / "0.png")
    dataset = data.load(str(folder))
    read = []
    honest = imagefiles.Tree.beginning
    monkeypatch.setattr(imagefiles.Tree, "beginning", lambda tree, name, length: (read.append((name, length)), honest(tree, name, length))[1])
    monkeypatch.setattr(dataset.tree, "open", None)                    # the files of 190 KB are not decoded
    data.fingerprint(dataset)
    assert len(read) == 256 and {length for _, length in read} == {2 ** 16}
    assert {"0000.png", "2999.png"} <= {name for name, _ in read}


@pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 1_281_167])
def test_samples_that_are_looked_at_are_spread_over_the_set(n):
    chosen = data.spread(n)
    assert len(chosen) == min(n, 256) and chosen[0] == 0 and chosen[-1] == n - 1
    assert chosen == sorted(set(chosen)) and max(np.diff([0, *chosen])) <= n // 255 + 1


def test_glyphs_are_known_by_what_they_are_drawn_from(monkeypatch):
    monkeypatch.setattr(data, "_glyph", None)                          # no glyph is drawn
    assert identity("--data", "glyphs") == identity("--data", "glyphs") != identity("--data", "glyphs", "--resolution", 12)


def test_a_broken_file_is_told_before_the_first_step(tmp_path):
    """The error recommends --skip-broken, which then works."""
    path = write_images(tmp_path / "set", NAMES)
    (path / "dog/0.png").write_bytes((path / "dog/0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="dog/0.png is not a readable image .*; --skip-broken leaves such files out"):
        identity("--data", path, "--preset", "mnist")
    assert identity("--data", path, "--preset", "mnist", "--skip-broken").startswith("6 (")


def test_the_statistics_of_latents_travel_with_a_run(tmp_path):
    write_shards(tmp_path / "z")
    args = facm_args("--data", "imagenet_latents", "--data-dir", tmp_path / "z")
    dataset = data.load_for(args)
    mean, std = read_statistics(tmp_path / "z/latents_stats.pt")
    assert args.latent_stats == dict(mean=mean.tolist(), std=std.tolist()) and args.class_names == []
    assert dataset.mean.flatten().tolist() == mean.tolist() and json.loads(json.dumps(args.latent_stats)) == args.latent_stats
    (tmp_path / "z/latents_stats.pt").unlink()
    data.load_for(args)                    # the default is the SD-VAE's scale
    assert args.latent_stats["mean"] == [0.0] * 4 and np.allclose(args.latent_stats["std"], 1 / 0.18215)
    args = facm_args("--data", "glyphs")
    data.load_for(args)
    assert args.latent_stats is None


# ----------------------------------------------------------------------------------------------------------------------
# Flags that have no effect.

@pytest.mark.parametrize("flags, words", [
    ("--data {Z} --preset imagenet_latents --data-dir elsewhere", "--data-dir elsewhere: {Z} is not read from there"),
    ("--data {SET} --preset mnist --data-dir elsewhere", "--data-dir elsewhere: {SET} is not read from there"),
    ("--data {NPZ} --preset cifar10 --data-dir elsewhere", "--data-dir elsewhere"), ("--data glyphs --data-dir data", "--data-dir data: glyphs"),
    ("--data {Z} --preset imagenet_latents --resolution 16", "--resolution 16: latents cannot be scaled"),
    ("--data {Z} --preset cifar10 --resolution 16", "--resolution 16: latents cannot be scaled"),
    ("--data {Z} --preset imagenet_latents --skip-broken", "--skip-broken: {Z} has no image files"),
    ("--data {NPZ} --preset mnist --skip-broken", "--skip-broken: {NPZ} has no image files"), ("--data glyphs --skip-broken", "--skip-broken: glyphs"),
    ("--data {NPZ} --preset mnist --channels 1", "3 channels; leave out --channels"), ("--data glyphs --channels 1", "--channels"),
    ("--data {Z} --preset imagenet_latents --channels 3", "4 channels; leave out --channels"),
    ("--data glyphs --xflip", "--xflip: glyphs are never mirrored"),
    ("--data glyphs --uncond --num-classes 10", "--num-classes 10: the labels are left out"),
    ("--data {NPZ} --preset cifar10 --num-classes 3", "--num-classes 3: the labels are left out by --uncond, or by the preset cifar10"),
    ("--data {FLAT} --preset mnist --no-uncond", "has no labels; leave out --no-uncond"),
    ("--data {FLAT} --preset mnist --num-classes 3", "has no labels; use --uncond instead of --num-classes")])
def test_a_flag_of_the_data_without_effect_is_refused(tmp_path, flags, words):
    write_shards(tmp_path / "z")
    write_kind(tmp_path, "RGB npz")
    write_images(tmp_path / "set", NAMES)
    write_images(tmp_path / "flat", ["0.png", "1.png"])
    places = dict(Z=tmp_path / "z", SET=tmp_path / "set", NPZ=tmp_path / "x.npz", FLAT=tmp_path / "flat")
    with pytest.raises(ValueError, match=re.escape(words.format(**places))):
        data.load_for(facm_args(*flags.format(**places).split()))


@pytest.mark.parametrize("kind", ["glyphs", "mnist gz", "grey folder", "RGB npz", "latents"])
@pytest.mark.parametrize("preset", facm.PRESETS)
def test_no_preset_is_refused_on_any_data(tmp_path, kind, preset):
    """A preset may set a resolution, --xflip or --uncond that has no effect on the data."""
    if kind == "latents":
        write_shards(tmp_path / "z")
        name, where = tmp_path / "z", []
    elif kind == "glyphs":
        name, where = "glyphs", []
    else:
        name, place, _, _ = write_kind(tmp_path, kind)
        where = ["--data-dir", place] if place else []
    args = facm_args("--data", name, *where, "--preset", preset)
    dataset = data.load_for(args)
    resolution = facm.PRESETS[preset].get("resolution")
    if kind == "latents":
        assert dataset.shape == (4, 4, 4)
    elif resolution:
        assert dataset.shape[1:] == (resolution, resolution)
    assert dataset.num_classes == 0 if facm.PRESETS[preset].get("uncond") else dataset.num_classes > 0


@pytest.mark.parametrize("script, argv, words", [
    (data, "inspect {Z} --resolution 8", "--resolution 8: latents cannot be scaled"), (data, "inspect {Z} --data-dir D", "--data-dir D"),
    (data, "inspect {NPZ} --skip-broken", "--skip-broken"), (data, "inspect {NPZ} --save-stats", "--save-stats: {NPZ} has no latents"),
    (data, "inspect glyphs --save-stats", "--save-stats"), (data, "inspect {SET} --data-dir D", "--data-dir D"),
    (data, "inspect imagenet_latents --save-stats", "no latents"), (data, "inspect {NPZ} --resolution 0", "--resolution 0"),
    (encode, "--images {NPZ} --skip-broken", "--skip-broken: {NPZ} has no image files"), (encode, "--images {Z}", "{Z} contains latents and not images"),
    (encode, "--images {SET} --resolution 18", "not a multiple of 4")])
def test_programs_refuse_flags_without_effect(tmp_path, monkeypatch, capsys, script, argv, words):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "z", stats=False)
    before = sorted((tmp_path / "z").iterdir())
    write_kind(tmp_path, "RGB npz")
    write_images(tmp_path / "set", NAMES)
    small_vae(tmp_path)
    places = dict(Z=tmp_path / "z", SET=tmp_path / "set", NPZ=tmp_path / "x.npz")
    argv = argv.format(**places).split() + (["--vae", "vae.pt", "--out", "out"] if script is encode else [])
    assert words.format(**places) in refused_by(monkeypatch, capsys, script, *argv)
    assert sorted((tmp_path / "z").iterdir()) == before and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# encode.py with broken images, and damaged files beside latents.

@pytest.mark.parametrize("broken", [["cat/0.png"], ["dog/sub/1.png"], ["eel/2.png"], ["eel/0.png", "eel/1.png"], ["cat/0.png", "cat/1.png"]], ids=str)
def test_encode_continues_with_skip_broken_as_its_error_advises(tmp_path, monkeypatch, capsys, broken):
    """Finished shards are kept, and the readable images get the same latents as in a run without broken images."""
    small_vae(tmp_path)
    folder = write_images(tmp_path / "images", NAMES)
    flags = ["--images", folder, "--vae", tmp_path / "vae.pt", "--resolution", 16, "--shard", 2, "--batch", 1, "--device", "cpu", "--out"]
    command(monkeypatch, encode, *flags, tmp_path / "whole")
    for name in broken:
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, encode, *flags, tmp_path / "z")
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and broken[0] in said and said.endswith("; --skip-broken leaves such files out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "z").glob("*.safetensors")}
    command(monkeypatch, encode, *flags, tmp_path / "z", "--skip-broken")
    assert before.items() <= {path.name: path.read_bytes() for path in (tmp_path / "z").iterdir()}.items()
    whole, left = (data.load(str(tmp_path / name), num_classes=3) for name in ("whole", "z"))
    kept = torch.tensor([i for i, name in enumerate(NAMES) if name not in broken])
    assert left.labels.tolist() == whole.labels[kept].tolist()
    for mirror in (False, True):
        flips = torch.full((len(kept),), mirror)
        assert torch.equal(left.raw(torch.arange(len(kept)), flips), whole.raw(kept, flips))
    command(monkeypatch, encode, *flags, tmp_path / "z", "--skip-broken")      # again, although nothing is left to do


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"3", b"[]", b"null", b"{", b'{"n": 7}'], ids=range(8))
def test_a_damaged_encode_json_is_one_line(tmp_path, monkeypatch, capsys, content):
    small_vae(tmp_path)
    write_images(tmp_path / "images", NAMES)
    flags = ["--images", tmp_path / "images", "--vae", tmp_path / "vae.pt", "--resolution", 16, "--device", "cpu", "--out", tmp_path / "z"]
    (tmp_path / "z").mkdir()
    (tmp_path / "z/encode.json").write_bytes(content)
    said = refused_by(monkeypatch, capsys, encode, *flags)
    assert str(tmp_path / "z") in said and "use another --out" in said and (tmp_path / "z/encode.json").read_bytes() == content


def test_a_damaged_shard_of_encode_is_one_line_that_helps(tmp_path, monkeypatch, capsys):
    small_vae(tmp_path)
    write_images(tmp_path / "images", NAMES)
    flags = ["--images", tmp_path / "images", "--vae", tmp_path / "vae.pt", "--resolution", 16, "--device", "cpu", "--out", tmp_path / "z"]
    command(monkeypatch, encode, *flags)
    path, = (tmp_path / "z").glob("*.safetensors")
    held = path.read_bytes()
    path.write_bytes(held[:1000])
    assert "remove it, and the same command encodes it again" in refused_by(monkeypatch, capsys, encode, *flags)
    path.unlink()
    command(monkeypatch, encode, *flags)
    assert path.read_bytes() == held


BAD_STATS = {
    "empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\n", "a list": [1, 2], "a number": 3, "no std": dict(mean=torch.zeros(4)),
    "lists": dict(mean=[0.0] * 4, std=[1.0] * 4), "other channels": dict(mean=torch.zeros(32), std=torch.ones(32)),
    "zero": dict(mean=torch.zeros(4), std=torch.zeros(4)), "negative": dict(mean=torch.zeros(4), std=-torch.ones(4)),
    "nan": dict(mean=torch.full((4,), float("nan")), std=torch.ones(4)), "infinite": dict(mean=torch.zeros(4), std=torch.full((4,), float("inf")))}


@pytest.mark.parametrize("content", BAD_STATS.values(), ids=BAD_STATS)
def test_damaged_statistics_are_one_line_that_helps(tmp_path, monkeypatch, capsys, content):
    write_shards(tmp_path / "z")
    path = tmp_path / "z/latents_stats.pt"
    good = read_statistics(path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    said = refused_by(monkeypatch, capsys, data, "inspect", tmp_path / "z", "--grid", tmp_path / "g.png")
    assert f"{path} has no statistics of these latents" in said and f"python data.py inspect {tmp_path / 'z'} --save-stats" in said
    command(monkeypatch, data, "inspect", tmp_path / "z", "--grid", tmp_path / "g.png", "--save-stats")
    assert np.array_equal(read_statistics(path), good)


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"latents": 3}', b'{"latents": {"dtype": "F32"}}', b"\xff\xfe", b'{"latents": {"dtype": ["F32"]}}',
                                    b'{"latents": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
                                    b'{"latents": {"dtype": "F32", "shape": [1e99], "data_offsets": [0, 4]}}'], ids=range(7))
def test_a_foreign_header_of_a_shard_is_one_line(tmp_path, monkeypatch, capsys, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert f"{path} is not a readable shard" in refused_by(monkeypatch, capsys, data, "inspect", tmp_path, "--grid", tmp_path / "g.png")


def test_shards_without_latents_are_one_line(tmp_path, monkeypatch, capsys):
    safetensors.torch.save_file(dict(latents=torch.zeros(0, 4, 2, 2), latents_flip=torch.zeros(0, 4, 2, 2), labels=torch.zeros(0).long()),
                                tmp_path / "x.safetensors")
    said = refused_by(monkeypatch, capsys, data, "inspect", tmp_path, "--grid", tmp_path / "g.png")
    assert str(tmp_path) in said and "Traceback" not in said


@pytest.mark.parametrize("full", ["statistics", "grid"])
def test_inspect_on_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, full):
    write_shards(tmp_path / "z")
    before = (tmp_path / "z/latents_stats.pt").read_bytes()

    def no_space(*args, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(*((data.os, "replace") if full == "statistics" else (Image.Image, "save")), no_space)
    assert "No space left" in refused_by(monkeypatch, capsys, data, "inspect", tmp_path / "z", "--save-stats", "--grid", tmp_path / "g.png")
    assert full == "grid" or (tmp_path / "z/latents_stats.pt").read_bytes() == before


def test_inspect_shows_labels_that_training_refuses(tmp_path, monkeypatch, capsys):
    """inspect shows what a data set contains, even if its labels are negative, do not begin at 0, or are missing."""
    np.savez(tmp_path / "x.npz", images=SQUARES, labels=SEVEN * 2 + 1)
    command(monkeypatch, data, "inspect", tmp_path / "x.npz", "--grid", tmp_path / "g.png")
    said = capsys.readouterr().out
    assert "6 classes with 0 to 3 samples each" in said and "samples of each class: 0 2 0 2 0 3" in said
    np.savez(tmp_path / "y.npz", images=SQUARES, labels=SEVEN - 1)
    command(monkeypatch, data, "inspect", tmp_path / "y.npz", "--grid", tmp_path / "g.png")
    assert "labels begin at -1; training needs labels from 0 on" in capsys.readouterr().out
    np.savez(tmp_path / "z.npz", images=SQUARES)
    command(monkeypatch, data, "inspect", tmp_path / "z.npz", "--grid", tmp_path / "g.png")
    assert "7 samples of shape [3, 16, 16], no classes\n" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Helpers of the training scripts.

@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (3, 2, 4, 5)], ids=str)
def test_a_batch_of_samples_of_any_shape(shape):
    """The samples of a batch may have any shape, not only that of images."""
    class Anything(data.Dataset):
        def items(self, index, flip):
            values = torch.where(flip, -index, index).float()
            return values.reshape(-1, *[1] * len(shape)).expand(-1, *shape)

    dataset = Anything(torch.arange(11), (1, 2, 2), 11, xflip=True)
    for ahead in (False, True):
        dataset.ahead = ahead
        for first in (0, 8, 16):
            x, y = dataset.batch(3, first, 8, slice(2, 7))
            assert x.shape == (5, *shape) and torch.equal(y, dataset.index(3, first, 8)[2:7])
            assert torch.equal(x.reshape(5, -1)[:, 0].abs(), y.float())


def test_previews(tmp_path, capsys):
    noise = data.preview_noise(3, (1, 4, 4))
    assert noise.shape == (2, 20, 1, 4, 4) and noise.device.type == "cpu" and torch.equal(noise, data.preview_noise(3, (1, 4, 4)))
    data.save_preview(None, noise[0])
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "previews/0000001.png"
    data.save_preview(path, torch.full((13, 1, 4, 4), -1.0))
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (24, 120) and (sheet[:12] == 0).all() and (sheet[12:, :36] == 0).all() and (sheet[12:, 36:] == 255).all()
    path.unlink()
    path.parent.rmdir()
    path.parent.write_bytes(b"a file in the way")
    capsys.readouterr()
    for _ in range(2):
        data.save_preview(path, torch.zeros(3, 3, 4, 4))
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(r".*previews: no previews \(.+\); the run continues", said) and said.count("\n") == 0


@pytest.mark.parametrize("options, word", [
    (dict(), None), (dict(num_classes=3), None), (dict(num_classes=0), None), (dict(num_classes=9, width=3), None),
    (dict(num_classes=2), "num_classes 2, and the data have 3"), (dict(in_channels=1), "in_channels 1, and the data have 3"), (dict(input_size=8), "input_size 8, and the data have 12")])
def test_a_network_fits_its_data(options, word):
    dataset = data.Images(PIXELS, np.array([0, 0, 1, 1, 2, 2, 2]), 3)
    if word:
        with pytest.raises(ValueError, match=word):
            data.fit_network_to(dataset, options)
    else:
        assert data.fit_network_to(dataset, options) == dict(input_size=12, in_channels=3, num_classes=3) | options


def test_cifar10_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route")
    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz"):
        data.load("cifar10", 32, str(tmp_path))


# Latents

def write_shards(folder, sizes=(5, 3, 4), shape=(4, 4, 4), stats=True, **change):
    """Writes shards in the published layout. Returns all latents, mirrored latents and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(0)
    everything = []
    for k, n in enumerate(sizes):
        shard = dict(latents=2 + 3 * torch.randn(n, *shape, generator=g), labels=torch.randint(0, 6, (n,), generator=g),
                     latents_flip=2 + 3 * torch.randn(n, *shape, generator=g))
        everything.append(shard)
        shard = dict(shard)
        if k == 1:
            for name, new in change.items():
                shard.pop(name) if new is None else shard.update({name: new})
        safetensors.torch.save_file(shard, folder / f"latents_rank00_shard{k:03d}.safetensors",
                                    metadata={"total_size": str(n)})
    if stats:
        data.save_stats(folder)
    names = ("latents", "latents_flip", "labels")
    return everything and [torch.cat([shard[name] for shard in everything]) for name in names]


def test_latents_are_normalised_as_published(tmp_path):
    z, mirrored, labels = write_shards(tmp_path)
    dataset = data.load("imagenet_latents", data_dir=str(tmp_path))
    assert dataset.shape == (4, 4, 4) and torch.equal(dataset.labels, labels)
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
    index, flip = torch.tensor([0, 4, 5, 7, 8, 11, 3]), torch.tensor([0, 1, 0, 1, 0, 1, 1]).bool()
    expected = torch.where(flip[:, None, None, None], mirrored[index], z[index])
    assert torch.equal(dataset.raw(index, flip), expected)
    assert torch.allclose(dataset.items(index, flip), (expected - mean) / std, atol=1e-5)
    (tmp_path / "latents_stats.pt").unlink()
    assert torch.allclose(data.load(str(tmp_path)).items(index, flip), 0.18215 * expected)     # the SD-VAE's scale
    assert dataset.xflip and not data.load(str(tmp_path), xflip=False).xflip


@pytest.mark.parametrize("options, word", [
    (dict(latents_flip=None), "shard001.safetensors has no latents_flip"),
    (dict(labels=torch.zeros(2, dtype=torch.int64)), "shard001.safetensors: .*unequal"),
    (dict(labels=torch.zeros((3, 1), dtype=torch.int64)), "shard001.safetensors: .*unequal"),
    (dict(latents=torch.zeros(3, 4, 2, 2), latents_flip=torch.zeros(3, 4, 2, 2)), "several shapes"),
    (dict(shape=(32, 2, 2), stats=False), "latents_stats.pt is missing"), (dict(sizes=()), r"no \*.safetensors")])
def test_faults_of_shards(tmp_path, options, word):
    write_shards(tmp_path, **({"stats": False} | options))
    with pytest.raises(ValueError, match=word):
        data.load("imagenet_latents", data_dir=str(tmp_path))


@pytest.mark.parametrize("content", [
    None, b"version https://git-lfs.github.com/spec/v1", b"\2" + bytes(7) + b"[]"])
def test_a_truncated_or_foreign_shard(tmp_path, content):
    write_shards(tmp_path)
    path = tmp_path / "latents_rank00_shard001.safetensors"
    path.write_bytes(content or path.read_bytes()[:300])
    with pytest.raises(ValueError, match="shard001"):
        data.load(str(tmp_path))


def small_vae(folder):
    """Saves an autoencoder (f = 4) with formula weights as a public checkpoint, and returns it."""
    vae = fill(models.create("AutoencoderKL", z_channels=4, mult=(1, 2, 4), width=32, blocks=1, attention=(2,)))
    torch.save(vae.state_dict(), folder / "vae.pt")
    return vae


def command(monkeypatch, script, *argv):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    script.main()


def test_encode_is_the_direct_path_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    vae, folder = small_vae(tmp_path), write_images(tmp_path / "images", NAMES)
    flags = ["--images", folder, "--vae", tmp_path / "vae.pt", "--out", tmp_path / "z", "--resolution", 16, "--shard", 3,
             "--batch", 2, "--device", "cpu"]
    command(monkeypatch, encode, *flags)
    dataset, images = data.load(str(tmp_path / "z")), data.load(str(folder), 16)
    assert dataset.labels.tolist() == images.labels.tolist() and len(dataset.shards) == 3
    index = torch.arange(7)
    for flip in (False, True):
        mean, std = vae.encode(images.items(index, torch.full((7,), flip)))
        noise = [torch.randn(4, 4, 4, generator=seeds.generator("cpu", 0, i, flip)) for i in range(7)]
        direct = mean + std * torch.stack(noise)
        stored = dataset.raw(index, torch.full((7,), flip))
        assert torch.allclose(stored, direct, atol=1e-5)
        normalised = dataset.items(index, torch.full((7,), flip))
        assert torch.allclose(vae.decode(normalised * dataset.std + dataset.mean), vae.decode(direct), atol=1e-4)
    second = tmp_path / "z/latents_rank00_shard001.safetensors"
    content = second.read_bytes()
    second.unlink()
    old = (tmp_path / "z/latents_rank00_shard000.safetensors").stat().st_mtime_ns
    command(monkeypatch, encode, *flags)
    assert second.read_bytes() == content
    assert (tmp_path / "z/latents_rank00_shard000.safetensors").stat().st_mtime_ns == old
    with pytest.raises(SystemExit):
        command(monkeypatch, encode, *flags, "--seed", 1)
    assert "another --out" in capsys.readouterr().err


def test_latents_of_images_without_labels_have_none(tmp_path, monkeypatch):
    small_vae(tmp_path)
    folder = write_images(tmp_path / "images", ["0.png", "1.png", "2.png"])
    command(monkeypatch, encode, "--images", folder, "--vae", tmp_path / "vae.pt", "--out", tmp_path / "z", "--resolution", 16,
            "--device", "cpu")
    assert data.load(str(tmp_path / "z")).num_classes == 0 == data.load(str(folder), 16).num_classes


def test_latents_of_the_sd_vae_have_its_scale(tmp_path, monkeypatch):
    """Networks on these latents, such as DiT, expect 0.18215 z, and not latents of mean 0 and standard deviation 1."""
    vae, folder = small_vae(tmp_path), write_images(tmp_path / "images", NAMES)
    vae.scale = 0.18215
    monkeypatch.setattr(encode, "load_autoencoder", lambda path: vae.requires_grad_(False))
    command(monkeypatch, encode, "--images", folder, "--vae", tmp_path / "vae.pt", "--out", tmp_path / "z", "--resolution", 16,
            "--device", "cpu")
    mean, std = read_statistics(tmp_path / "z/latents_stats.pt")
    assert np.array_equal(mean, np.zeros(4)) and np.allclose(std, 1 / 0.18215)
    dataset, unmirrored = data.load(str(tmp_path / "z")), torch.zeros(7, dtype=torch.bool)
    assert torch.allclose(dataset.items(torch.arange(7), unmirrored), 0.18215 * dataset.raw(torch.arange(7), unmirrored))


def encode_in_two(*flags):
    """Runs encode.py in two processes on the CPU and waits until it ends."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*launch, str(ROOT / "encode.py"), *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


def test_two_processes_encode_what_one_does(tmp_path, monkeypatch):
    """The latents are equal to the last bit, because both runs encode one image at a time."""
    small_vae(tmp_path)
    flags = ["--images", write_images(tmp_path / "images", NAMES), "--vae", tmp_path / "vae.pt", "--resolution", 16,
             "--shard", 2, "--batch", 1, "--device", "cpu", "--out"]
    command(monkeypatch, encode, *flags, tmp_path / "one")
    done = encode_in_two(*flags, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (data.load(str(tmp_path / name)) for name in ("one", "two"))
    assert [len(s["labels"]) for s in two.shards] == [2, 1, 2, 2]              # 3 and 4 images, in shards of 2
    assert torch.equal(one.labels, two.labels)
    for flip in (False, True):
        index, flips = torch.arange(7), torch.full((7,), flip)
        assert torch.equal(one.raw(index, flips), two.raw(index, flips))
    assert torch.allclose(one.mean, two.mean) and torch.allclose(one.std, two.std)


@pytest.mark.parametrize("broken", ["cat/0.png", "eel/2.png"])                 # of process 0, of process 1
def test_a_broken_image_of_either_process_is_told_in_one_line(tmp_path, broken):
    small_vae(tmp_path)
    folder = write_images(tmp_path / "images", NAMES)
    (folder / broken).write_bytes((folder / broken).read_bytes()[:60])
    done = encode_in_two("--images", folder, "--vae", tmp_path / "vae.pt", "--resolution", 16, "--shard", 2, "--batch", 2,
                         "--device", "cpu", "--out", tmp_path / "z")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and broken in lines[0] and "--skip-broken" in lines[0]
    assert done.returncode and re.search(r"exitcode\s*: 2\b", done.stderr)     # torchrun's report of the failure
    assert not re.search(r'(encode|data)\.py", line', done.stderr)              # no traceback but torchrun's own


def test_inspect(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "z", stats=False)
    command(monkeypatch, data, "inspect", tmp_path / "z", "--grid", tmp_path / "grid.png", "--save-stats")
    said = capsys.readouterr().out
    assert "12 samples of shape [4, 4, 4]" in said and "3 shards" in said
    assert (tmp_path / "z/latents_stats.pt").exists() and Image.open(tmp_path / "grid.png").size == (640, 128)
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, data, "inspect", tmp_path / "nowhere")
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'}: there is no such file or folder")


@pytest.mark.parametrize("script, argv, word", [
    (data, ["inspect", "glyphs", "--grid", "DIR/x"], "NAME.png"), (data, ["inspect", "glyphs", "--grid", "DIR"], "NAME.png"),
    (data, ["inspect", "glyphs", "--grid", "/proc/x.png"], "cannot be written"),
    (data, ["inspect", "glyphs", "--resolution", "0"], "--resolution"),
    (data, ["inspect", "DIR", "--save-stats"], "no latents"),
    (encode, ["--images", "DIR", "--vae", "x", "--out", "DIR/z", "--batch", "0"], "at least 1")])
def test_mistakes_at_the_command_line(tmp_path, monkeypatch, capsys, script, argv, word):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, script, *(a.replace("DIR", str(tmp_path)) for a in argv))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and word in said and said.count("\n") == 1


def test_encode_leaves_shards_of_others_alone(tmp_path, monkeypatch, capsys):
    small_vae(tmp_path)
    write_images(tmp_path / "images", NAMES)
    write_shards(tmp_path / "z")
    before = {p.name: p.read_bytes() for p in (tmp_path / "z").iterdir()}
    with pytest.raises(SystemExit):
        command(monkeypatch, encode, "--images", tmp_path / "images", "--vae", tmp_path / "vae.pt", "--out",
                tmp_path / "z", "--resolution", 16, "--device", "cpu")
    assert "another --out" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "z").iterdir()}


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    checkpoints.save(tmp_path / "ckpt.pt", dict(step=1))

    def full(checkpoint, file):
        file.write(b"the beginning")
        raise RuntimeError("unexpected pos\nmore")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as end:
        checkpoints.save(tmp_path / "ckpt.pt", dict(step=2))
    assert end.value.code == 2 and "ckpt.pt could not be written (unexpected pos)" in capsys.readouterr().err
    assert torch.load(tmp_path / "ckpt.pt") == dict(step=1) and len(list(tmp_path.iterdir())) == 1


def test_one_process_of_each_machine_tells_of_a_mistake(monkeypatch, capsys):
    for name in torchrun.NAMES:
        monkeypatch.setenv(name, "16")
    for rank, local, told in ((0, 0, True), (1, 1, False), (8, 0, True)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        with pytest.raises(SystemExit):
            fail("no such file")
        assert bool(capsys.readouterr().err) == told


# EDM's augmentation

def test_augmentation_does_nothing_but_mirror_when_p_is_0():
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    out, labels = augment(x, torch.Generator().manual_seed(1), p=0)
    mirror = labels[:, 0] == 1
    assert labels.shape == (16, 9) and not labels[:, 1:].any() and 0 < mirror.sum() < 16
    expected = torch.where(mirror[:, None, None, None], x.flip(3), x)
    assert (out - expected).abs().max() < 0.02 * x.abs().max()         # it is upsampled, interpolated and downsampled


def test_augmentation_moves_a_blob_as_its_labels_say():
    """The labels alone predict where mirroring, scaling, turning, stretching and shifting move the centre of a blob."""
    n, size = 64, 32
    place = torch.tensor([5.0, 3.0])                                   # right of and below the centre
    grid = torch.arange(size) - (size - 1) / 2
    blob = torch.exp(-((grid[None, :] - place[0]) ** 2 + (grid[:, None] - place[1]) ** 2) / 4)
    x, labels = augment(blob.expand(n, 1, size, size), torch.Generator().manual_seed(0), p=1.0)
    mirror, down, scale, cos, sin, along, across, tx, ty = labels.double().T
    at = torch.stack([torch.where(mirror > 0, -1, 1) * place[0], torch.where(down > 0, -1, 1) * place[1]], 1).double()
    turn = lambda a: torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1).reshape(-1, 2, 2)  # noqa: E731
    sign = torch.randn((4, n), generator=torch.Generator().manual_seed(0))[1].sign()       # not in the labels
    stretch, axis = sign * (along ** 2 + across ** 2).sqrt(), torch.atan2(sign * across, sign * along)
    stretched = torch.diag_embed(torch.stack([2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)], 1))
    forward = (turn(-axis) @ stretched @ turn(axis) @ turn(-torch.atan2(sin, cos + 1))
               * (2 ** (0.2 * scale))[:, None, None])
    expected = (forward @ at[:, :, None])[..., 0] + 0.125 * size * torch.stack([tx, ty], 1)
    near = ((grid - expected[:, :1, None]) ** 2 + (grid[:, None] - expected[:, 1:, None]) ** 2) < 9    # no reflections
    mass = x[:, 0].double().clamp(min=0) * near
    centre = torch.stack([(mass * grid).sum((1, 2)), (mass * grid[:, None]).sum((1, 2))], 1) / mass.sum((1, 2))[:, None]
    inside = expected.abs().max(1).values < 10
    assert inside.sum() > 30 and (centre - expected)[inside].abs().max() < 0.4
    assert mass.amax((1, 2))[inside].min() > 0.7


def test_rounding_to_8_bits():
    x = torch.tensor([-2.0, -1.0, -0.5 / 127.5 + 1e-4, 0.0, 1.0, 2.0]).view(6, 1, 1, 1)
    assert data.to_uint8(x).flatten().tolist() == [0, 0, 127, 128, 255, 255]


def test_grid(tmp_path):
    images = np.stack([np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)])
    data.save_grid(tmp_path / "grid.png", images, columns=3, scale=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (8, 18, 3)
    assert (sheet[:4, 6:12] == 10).all() and (sheet[4:, 6:12] == 40).all() and (sheet[4:, 12:] == 255).all()


@pytest.mark.parametrize("name, size", [("minst", 16), ("glyphs", 8)])
def test_unknown_data_is_refused(name, size):
    with pytest.raises(ValueError):
        data.load(name, size)


def test_seeds_follow_from_the_key():
    assert seeds.seed_of(0, "step", 1) == seeds.seed_of(0, "step", 1)
    assert len({seeds.seed_of(0, "step", k) for k in range(1000)}) == 1000
    a, b = (torch.rand(3, generator=seeds.generator("cpu", 1, "x")) for _ in range(2))
    assert torch.equal(a, b)


def test_xflip_draws_anew_for_every_batch_and_every_seed():
    dataset = data.Images(PIXELS, np.zeros(7), 0, xflip=True)
    dataset.items = lambda index, flip: tuple(flip.tolist())
    assert len({dataset.batch(0, first, 7)[0] for first in range(0, 140, 7)}) > 10
    assert len({dataset.batch(seed, 0, 7)[0] for seed in range(20)}) > 10


@pytest.mark.parametrize("size, halves, last", [
    (7, [(43, 30), (21, 15), (10, 7)], (10, 7)), (20, [(43, 30)], (29, 20)), (30, [(43, 30)], (43, 30)), (31, [], (45, 31))])
def test_center_crop_is_adms(size, halves, last):
    """As in ADM, the image is halved with a box filter to less than twice the size and then scaled bicubically. It is
    noise, so that any other filter would give another result."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 87, 3), dtype=np.uint8))
    expected = image
    for half in halves:
        expected = expected.resize(half, Image.BOX)
    expected = expected.resize(last, Image.BICUBIC)
    left, top = (n - size >> 1 for n in last)
    assert np.array_equal(imagefiles.center_crop(image, size), np.asarray(expected)[top:top + size, left:left + size])


def test_images_of_an_npz_are_scaled_to_the_resolution(tmp_path):
    np.savez(tmp_path / "x.npz", images=PIXELS)
    dataset = data.load(str(tmp_path / "x.npz"), 8, xflip=True)
    expected = np.stack([imagefiles.center_crop(Image.fromarray(image), 8) for image in PIXELS])
    assert dataset.shape == (3, 8, 8) and np.array_equal(dataset.images.numpy(), expected) and dataset.xflip
    assert data.load(str(write_images(tmp_path / "f", NAMES)), xflip=True).xflip and not data.load(str(tmp_path / "f")).xflip


def test_types_in_capitals_are_images(tmp_path):
    write_images(tmp_path, ["0.PNG", "1.Jpg"])
    assert imagefiles.Tree(tmp_path).names == ["0.PNG", "1.Jpg"]


def test_statistics_of_more_latents_than_are_read_at_once(tmp_path):
    z, *_ = write_shards(tmp_path, sizes=(1100, 7), shape=(4, 1, 2))
    mean, std = data.read_stats(tmp_path, 4)
    assert torch.allclose(mean, z.mean((0, 2, 3), keepdim=True), atol=1e-5)
    assert torch.allclose(std, z.std((0, 2, 3), keepdim=True), rtol=1e-5)


def test_shards_of_float16(tmp_path):
    z = torch.randn(3, 4, 2, 2).half()
    safetensors.torch.save_file(dict(latents=z, latents_flip=-z, labels=torch.arange(3, dtype=torch.int32)),
                                tmp_path / "x.safetensors")
    dataset = data.load(str(tmp_path))
    assert torch.equal(dataset.raw(torch.arange(3), torch.tensor([0, 1, 0]).bool()), torch.stack([z[0], -z[1],
                                                                                                  z[2]]).float())


def test_a_line_of_the_log_is_the_mean_since_the_last(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("common.log.time.perf_counter", lambda: next(clock))
    log = Log(tmp_path / "log.jsonl", 0, 4, 2)
    for step, value in enumerate((1.0, 2.0, 5.0, 7.0), 1):
        log.add(step, 8 * step, dict(loss=torch.tensor(value)), [])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [dict(step=2, loss=1.5, images_per_s=24), dict(step=4, loss=6, images_per_s=56)]


def test_augmentations_befall_their_shares():
    _, labels = augment(torch.zeros(20_000, 1, 4, 4), torch.Generator().manual_seed(0))
    mirror, down, scale, cos, sin, along, across, tx, ty = labels.T
    for label, share in ((mirror, 0.5), (down, 0.06), (scale, 0.12), (sin, 0.12), (along, 0.12), (across, 0.06), (tx, 0.12)):
        assert abs((label != 0).double().mean() - share) < 0.015
    assert torch.equal(tx != 0, ty != 0)
    angle = torch.atan2(sin, cos + 1)[sin != 0]
    assert abs(angle.mean()) < 0.12 and abs(angle.std() - math.pi / 3 ** 0.5) < 0.08
    assert all(abs(a[a != 0].std() - 1) < 0.06 for a in (scale, tx, ty))
    together = ((scale != 0) & (tx != 0)).double().mean()              # they are independent
    assert abs(together - 0.12 ** 2) < 0.005


def test_glyphs_are_20000():
    assert len(data.load("glyphs").labels) == 20_000


def test_a_checkpoint_is_there_until_the_new_one_takes_its_place(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "ckpt.pt", dict(step=1))

    def killed(part, path):
        assert torch.load(part) == dict(step=2) and torch.load(path) == dict(step=1)
        raise KeyboardInterrupt
    monkeypatch.setattr("common.checkpoints.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path / "ckpt.pt", dict(step=2))
    assert torch.load(tmp_path / "ckpt.pt") == dict(step=1)


def test_what_may_change_between_two_calls_of_a_run(tmp_path, monkeypatch):
    add_flags(Parser(), facm.PRESETS)                                  # this defines which flags may change
    args = argparse.Namespace(
        out=str(tmp_path), fresh=False, lr_final=1.0, steps=1, skip_broken=False, seed=0, batch=8, micro_batch=1, w=1.0,
        precision="float32", betas=[0.9, 0.99], device="cpu", compile=False, ema_sigma=0.1)
    kept = vars(args) | dict(betas=(0.9, 0.99))                        # a tuple from a preset, a list from the flag
    checkpoint = dict(method="facm", args=kept, step=1, model={}, ema={}, optimizer={})
    checkpoints.save(tmp_path / "ckpt.pt", checkpoint)
    for name in vars(args):
        folders.disown_all()                                               # as at the end of a program
        changed = argparse.Namespace(**vars(args) | {name: 2}) if name not in ("out", "fresh") else args
        job = Run(changed, "facm", torch.device("cpu"), 0, 1)
        if name in ("seed", "batch", "w", "lr_final", "betas", "ema_sigma"):
            with pytest.raises(ValueError, match=name):
                job.open_folder()
        else:
            job.open_folder()
            assert job.step == job.checkpoint["step"] == 1
            assert list(job.changed) == [name] * (name in ("precision", "compile"))    # the others are not noted
    checkpoints.save(tmp_path / "ckpt.pt", {k: v for k, v in checkpoint.items() if k != "optimizer"})
    folders.disown_all()
    with pytest.raises(ValueError, match="no optimiser"):
        Run(args, "facm", torch.device("cpu"), 0, 1).open_folder()


def test_a_full_disk_ends_the_log_in_one_line(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl", 0, 2, 1)
    log.file.close()
    log.file = open("/dev/full", "w", buffering=1)
    with pytest.raises(SystemExit) as end:
        log.add(1, 8, dict(loss=torch.tensor(1.0)), [])
    assert end.value.code == 2 and "error: " in (said := capsys.readouterr().err) and "log.jsonl" in said


def test_ctrl_c_before_the_first_step_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    processes.set_globals(torch.device("cpu"))
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"
    sys.excepthook(ValueError, ValueError("x"), None)
    assert "ValueError: x" in capsys.readouterr().err


def test_encode_knows_its_autoencoder_and_images_by_content(tmp_path, monkeypatch, capsys):
    """The autoencoder and the images may be moved, but other ones in their place are refused."""
    small_vae(tmp_path)
    folder = write_images(tmp_path / "images", NAMES)
    flags = ["--resolution", 16, "--device", "cpu", "--out", tmp_path / "z"]
    command(monkeypatch, encode, *flags, "--images", folder, "--vae", tmp_path / "vae.pt")
    (tmp_path / "vae.pt").rename(tmp_path / "moved.pt")
    folder.rename(tmp_path / "moved")
    command(monkeypatch, encode, *flags, "--images", tmp_path / "moved", "--vae", tmp_path / "moved.pt")
    weights = torch.load(tmp_path / "moved.pt")
    torch.save({name: w + 1 for name, w in weights.items()}, tmp_path / "vae.pt")
    with pytest.raises(SystemExit):
        command(monkeypatch, encode, *flags, "--images", tmp_path / "moved", "--vae", tmp_path / "vae.pt")
    assert "was begun with vae" in capsys.readouterr().err
    first = sorted((tmp_path / "moved").rglob("*.png"))[0]
    first.rename(first.with_name("another.png"))
    with pytest.raises(SystemExit):
        command(monkeypatch, encode, *flags, "--images", tmp_path / "moved", "--vae", tmp_path / "moved.pt")
    assert "was begun with images" in capsys.readouterr().err


def test_a_run_on_latents_is_resumed_with_its_statistics(tmp_path, monkeypatch):
    """The checkpoint contains the statistics, which sample.py needs to decode the latents."""
    write_shards(tmp_path / "z")
    flags = ["--data", tmp_path / "z", "--preset", "imagenet_latents", "--device", "cpu", "--precision", "float32", "--batch", 4,
             "--micro-batch", 4, "--net", "name=LightningDiT", "patch=1", "width=32", "depth=1", "heads=4", "--out", tmp_path / "run"]
    for steps in (1, 2):
        command(monkeypatch, flow, *flags, "--steps", steps)
    held = checkpoints.read(tmp_path / "run/ckpt.pt")
    assert held["step"] == 2 and len(held["args"]["latent_stats"]["mean"]) == held["args"]["net"]["in_channels"]
