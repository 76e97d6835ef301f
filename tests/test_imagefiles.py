"""Image files as people have them: labels, orientation, transparency, endings, what is left out, and what a resume allows."""

import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from PIL import Image

import data
import facm
import fid
import sample
from common import imagefiles
from common.messages import say_once


def picture(k):
    """An image of one colour."""
    return Image.fromarray(np.full((8, 8, 3), 8 * k, np.uint8))


def write_tree(tmp_path, kind, files):
    """A folder or a zip archive of these files: {name: bytes, or None for a picture, or a folder's name with "/"}."""
    content = {}
    for k, (name, text) in enumerate(files.items()):
        held = io.BytesIO()
        if text is None and not name.endswith("/"):
            picture(k).save(held, "PNG")
        content[name] = held.getvalue() if text is None else text
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for name, held in content.items():
                archive.writestr(name, held)
        return tmp_path / "set.zip"
    for name, held in content.items():
        path = tmp_path / "set" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(held)
    return tmp_path / "set"


def table(labels):
    return json.dumps(dict(labels=labels)).encode()


FOUR = dict.fromkeys(["00000/img0.png", "00000/img1.png", "00001/img2.png", "00001/img3.png"])
LABELS = [["00000/img0.png", 3], ["00000/img1.png", 0], ["00001/img2.png", 3], ["00001/img3.png", 1]]
BOTH = pytest.mark.parametrize("kind", ["folder", "zip"])


@BOTH
@pytest.mark.parametrize("outer", ["", "outer/", "a/b/"])
def test_dataset_json_says_the_labels(tmp_path, kind, outer):
    """NVlabs' dataset_tool numbers its folders by thousands of images; they are no classes."""
    files = {outer + n: None for n in FOUR} | {outer + "dataset.json": table(LABELS)}
    dataset = data.load(str(write_tree(tmp_path, kind, files)), num_classes=4)
    assert dataset.labels.tolist() == [3, 0, 3, 1] and dataset.num_classes == 4 and dataset.class_names == []


@BOTH
@pytest.mark.parametrize("labels", [None, []])
def test_dataset_json_says_that_there_are_none(tmp_path, kind, labels):
    dataset = data.load(str(write_tree(tmp_path, kind, FOUR | {"dataset.json": table(labels)})))
    assert dataset.num_classes == 0 and len(dataset.labels) == 4


@BOTH
@pytest.mark.parametrize("labels, word", [
    (LABELS[:3], "gives 00001/img3.png no label"), ([[n, "cat"] for n, _ in LABELS], "label cat; labels are whole numbers"),
    ([[n, -1] for n, _ in LABELS], "label -1"), ([[n, [0, 1]] for n, _ in LABELS], "labels are whole numbers"),
    (7, "dataset.json has no"), (LABELS, "only 3 classes")])
def test_a_dataset_json_that_does_not_fit(tmp_path, kind, labels, word):
    path = write_tree(tmp_path, kind, FOUR | {"dataset.json": table(labels)})
    with pytest.raises(ValueError, match=word):
        data.load(str(path))


def test_names_with_backslashes_are_names(tmp_path):
    files = {n.replace("/", "\\"): None for n in FOUR}
    path = write_tree(tmp_path, "zip", files | {"dataset.json": table([[n.replace("/", "\\"), k] for n, k in LABELS])})
    assert imagefiles.Tree(path).labels == [3, 0, 3, 1]
    path = write_tree(tmp_path, "zip", files)
    assert imagefiles.Tree(path).classes == ["00000", "00001"]


@BOTH
@pytest.mark.parametrize("outer", ["", "train/", "set/train/"])
def test_lone_outer_folders_are_peeled_off(tmp_path, kind, outer):
    files = {f"{outer}{name}/{i}.png": None for name in ("cat", "dog", "eel") for i in range(2)}
    dataset = data.load(str(write_tree(tmp_path, kind, files)))
    assert dataset.class_names == ["cat", "dog", "eel"] and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]


@BOTH
@pytest.mark.parametrize("parts", [("train", "val"), ("Training", "test"), ("test", "train", "valid")])
def test_parts_of_a_data_set_are_no_classes(tmp_path, kind, parts):
    path = write_tree(tmp_path, kind, {f"{part}/cat/{i}.png": None for part in parts for i in range(2)})
    with pytest.raises(ValueError, match="parts of a data set, not classes: give one of them"):
        data.load(str(path))
    assert len(imagefiles.Tree(path, labelled=False).names) == 2 * len(parts)      # FID asks for no labels


@BOTH
def test_a_train_is_a_class_beside_a_car(tmp_path, kind):
    path = write_tree(tmp_path, kind, {f"{name}/{i}.png": None for name in ("car", "train") for i in range(2)})
    assert data.load(str(path)).class_names == ["car", "train"]


@BOTH
@pytest.mark.parametrize("empty", ["cow/", "cow/calf/"])
def test_an_empty_class_is_refused(tmp_path, kind, empty):
    path = write_tree(tmp_path, kind, {"cat/0.png": None, "dog/1.png": None, empty: None})
    with pytest.raises(ValueError, match="no images in the class folder cow"):
        data.load(str(path))


@BOTH
def test_folders_of_machines_are_left_out_and_told(tmp_path, kind, capsys):
    files = {"cat/0.png": None, "dog/1.png": None, "@eaDir/0.png": None, "__MACOSX/cat/._0.png": None, "cat/@eaDir/0.png": None,
             "lost+found/": None, ".git/x.png": None}
    dataset = data.load(str(write_tree(tmp_path, kind, files)))
    assert dataset.names == ["cat/0.png", "dog/1.png"] and dataset.class_names == ["cat", "dog"]
    assert "4 files of the machine" in capsys.readouterr().err


def test_each_real_folder_counts_once(tmp_path, capsys):
    path = write_tree(tmp_path, "folder", {"cat/0.png": None, "dog/1.png": None})
    (path / "another cat").symlink_to(path / "cat")
    (path / "dog/round").symlink_to(path)
    tree = imagefiles.Tree(path)
    assert tree.names == ["cat/0.png", "dog/1.png"] and tree.classes == ["cat", "dog"]
    assert "another name of" in capsys.readouterr().err


@BOTH
def test_whatever_pillow_opens_is_an_image(tmp_path, kind, capsys):
    held = {}
    for ending in ("jfif", "JPE", "jpeg", "webp", "bmp", "tga", "ico", "pcx"):
        file = io.BytesIO()
        picture(1).save(file, {"jfif": "JPEG", "JPE": "JPEG"}.get(ending, ending.upper()), **({"sizes": [(8, 8)]} if ending == "ico" else {}))
        held[f"a/0.{ending}"] = file.getvalue()
    file = io.BytesIO()
    picture(2).save(file, "PNG")
    held |= {"a/without ending": file.getvalue(), "a/0.png.bak": file.getvalue(), "a/notes.txt": b"n", "a/list.csv": b"0,1"}
    dataset = data.load(str(write_tree(tmp_path, kind, held)))
    assert len(dataset.names) == 10 and "2 files that are no images, such as a/list.csv" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Pixels.

SCENE = np.zeros((16, 16, 3), np.uint8)
SCENE[:8, :8] = 255                        # white above on the left


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_as_a_viewer_shows_it(tmp_path, orientation):
    """Stored as the camera was held; the EXIF data say how to turn it."""
    undo = {2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
            5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
            8: [Image.Transpose.ROTATE_270]}.get(orientation, [])
    image, exif = Image.fromarray(SCENE), Image.Exif()
    for step in undo:
        image = image.transpose(step)
    exif[0x0112] = orientation
    (tmp_path / "x").mkdir()
    image.save(tmp_path / "x/0.jpg", exif=exif, quality=100, subsampling=0)
    x = data.load(str(tmp_path)).items(torch.arange(1), torch.zeros(1, dtype=torch.bool))[0]
    assert (x[:, :7, :7] > 0.8).all() and (x[:, 9:] < -0.8).all() and (x[:, :, 9:] < -0.8).all()
    read = fid.open_source(str(tmp_path)).read(0, 1)
    assert (read[0, :7, :7] > 230).all() and (read[0, 9:] < 25).all()


def test_damaged_exif_data_turn_nothing(tmp_path):
    Image.fromarray(SCENE).save(tmp_path / "0.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    assert imagefiles.read_image(tmp_path / "0.jpg").size == (16, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a transparent colour"])
def test_transparent_parts_are_white(tmp_path, mode):
    pixels = np.dstack([SCENE, np.full((16, 16), 255, np.uint8)])
    pixels[8:] = (255, 0, 0, 0)            # red hides under the transparent half
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize()
    elif mode == "LA":
        image = image.convert("LA")
    elif "colour" in mode:
        image = Image.fromarray(pixels[..., :3])
    image.save(tmp_path / "0.png", **(dict(transparency=(255, 0, 0)) if "colour" in mode else {}))
    for channels in (3, 1):
        shown = np.asarray(imagefiles.read_image(tmp_path / "0.png", channels))
        assert (shown[8:] == 255).all() and (shown[:8, :8] == 255).all() and (shown[:8, 8:] == 0).all()


def test_nothing_changes_size_without_a_word(tmp_path, capsys):
    write_tree(tmp_path, "folder", {"a/0.png": None, "a/1.png": None})
    assert data.load(str(tmp_path / "set"), 4).shape == (3, 4, 4)
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    assert data.load(str(tmp_path / "x.npz"), 4).shape == (3, 4, 4)
    assert capsys.readouterr().err.count("images of 8x8 are cropped and scaled to 4x4 (--resolution)") == 2
    data.load(str(tmp_path / "x.npz"), 8)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["npz", "folder", "zip", "latents"])
def test_oblong_data_are_refused_in_one_place(tmp_path, kind):
    path = tmp_path / "x.npz"
    if kind == "npz":
        np.savez(path, images=np.zeros((3, 8, 12, 3), np.uint8))
    elif kind == "latents":
        path = tmp_path
        z = torch.zeros(2, 4, 8, 12)
        safetensors.torch.save_file(dict(latents=z, latents_flip=z + 1, labels=torch.zeros(2).long()), tmp_path / "x.safetensors")
    else:
        file = io.BytesIO()
        Image.new("RGB", (12, 8)).save(file, "PNG")
        path = write_tree(tmp_path, kind, {"a/0.png": file.getvalue()})
    with pytest.raises(ValueError, match="samples of 12x8 are not square; --resolution crops and scales images, but not latents"):
        data.load(str(path))
    if kind != "latents":
        assert data.load(str(path), 8).shape == (3, 8, 8)


def test_an_image_of_another_size_is_not_broken(tmp_path, capsys):
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    path = write_tree(tmp_path, "folder", {"a/0.png": None, "a/1.png": b"x", "b/2.png": file.getvalue()})
    dataset = data.load(str(path), skip_broken=True)
    assert dataset.names == ["a/0.png", "b/2.png"] and "1 broken images left out\n  a/1.png" in capsys.readouterr().err
    with pytest.raises(ValueError, match="b/2.png has 9x9 pixels"):
        dataset.items(torch.arange(2), torch.zeros(2, dtype=torch.bool))


def test_a_name_that_is_no_utf8_is_told(tmp_path):
    (tmp_path / "set").mkdir()
    picture(1).save(tmp_path / "set/0.png")
    (tmp_path / "set" / os.fsdecode(b"b\xff.png")).write_bytes(b"x")
    done = subprocess.run([sys.executable, ROOT / "data.py", "inspect", "set", "--skip-broken"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"1 broken images" in done.stderr and b"udcff" in done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Grey images.

@BOTH
def test_grey_images(tmp_path, kind, monkeypatch, capsys):
    path = write_tree(tmp_path, kind, {"a/0.png": None, "b/1.png": None})
    assert data.load(str(path)).shape == (3, 8, 8)
    dataset = data.load(str(path), channels=1)
    x = dataset.items(torch.arange(2), torch.zeros(2, dtype=torch.bool))
    assert x.shape == (2, 1, 8, 8) and data.to_uint8(x)[:, 0, 0, 0].tolist() == [0, 8]
    assert data.load(str(path), 4, channels=1).items(torch.arange(2), torch.zeros(2, dtype=torch.bool)).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="3 channels, whatever --channels says"):
        data.load("glyphs", channels=1)


def test_grey_arrays_are_three_equal_channels_for_inception(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels)
    assert np.array_equal(fid.open_source(str(tmp_path / "x.npz")).read(1, 3), pixels[1:3, :, :, None])


# ----------------------------------------------------------------------------------------------------------------------
# Arrays and shards.

def test_arrays_in_any_order_and_beside_others(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=np.asfortranarray(pixels), labels=np.array([0, 1, 1, 0], ">i8"),
             class_names=np.array(["cat", None], dtype=object))
    dataset = data.load(str(tmp_path / "x.npz"))
    assert np.array_equal(dataset.images.numpy(), pixels) and dataset.labels.tolist() == [0, 1, 1, 0]


def test_labels_from_1_to_10(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((10, 8, 8, 3), np.uint8), labels=np.arange(1, 11))
    with pytest.raises(ValueError, match="labels up to 10, but only 10 classes have images; number them from 0 on, or say "
                                         "--num-classes 11"):
        data.load(str(tmp_path / "x.npz"))
    assert data.load(str(tmp_path / "x.npz"), num_classes=11).num_classes == 11


@pytest.mark.parametrize("labels", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("latents", [torch.bfloat16, torch.float16, torch.float32])
def test_shards_of_every_type(tmp_path, latents, labels):
    z = torch.randn(3, 4, 2, 2).to(latents)
    safetensors.torch.save_file(dict(latents=z, labels=torch.arange(3).to(labels)), tmp_path / "x.safetensors")
    dataset = data.load(str(tmp_path), xflip=False)
    assert torch.equal(dataset.raw(torch.arange(3), torch.zeros(3, dtype=torch.bool)), z.float())
    assert dataset.labels.tolist() == [0, 1, 2]
    data.save_stats(tmp_path)
    assert torch.allclose(data.read_stats(tmp_path, 4)[0], z.float().mean((0, 2, 3), keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="no latents_flip; it has .*; --no-xflip does without"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("content, word", [
    (dict(latents=torch.zeros(3, 4, 2, 2, dtype=torch.uint8)), "latents are U8, not F32"),
    (dict(labels=torch.zeros(3)), "labels are F32, not whole numbers"),
    (dict(labels=torch.zeros(3, dtype=torch.bool)), "labels are BOOL, not whole numbers")])
def test_shards_of_other_types_say_so(tmp_path, content, word):
    held = dict(latents=torch.zeros(3, 4, 2, 2), latents_flip=torch.zeros(3, 4, 2, 2), labels=torch.zeros(3).long())
    safetensors.torch.save_file(held | content, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=word):
        data.load(str(tmp_path))


def test_a_latent_that_is_not_finite_is_named(tmp_path):
    z = torch.randn(5, 4, 2, 2)
    z[3, 1, 0, 0] = float("nan")
    for name, latents in (("a", torch.randn(2, 4, 2, 2)), ("b", z)):
        safetensors.torch.save_file(dict(latents=latents, latents_flip=latents.clone(), labels=torch.arange(len(latents)) % 2),
                                    tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: latents has NaN or infinity in row 3"):
        data.load(str(tmp_path)).items(torch.arange(7), torch.zeros(7, dtype=torch.bool))


# ----------------------------------------------------------------------------------------------------------------------
# Runs.

TINY = ("--device cpu --preset glyphs --batch 4 --teacher none --w 1 --net name=DDPM++ width=32 mult=1 blocks=1 --resolution 8 "
        "--preview-every 100 --warmup 0 --lr-final 1").split()


def train(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["facm.py", *TINY, *map(str, argv)])
    facm.main()


def test_class_names_are_told_and_kept(tmp_path, monkeypatch, capsys):
    path = write_tree(tmp_path, "folder", {f"{name}/{i}.png": None for name in ("cat", "dog") for i in range(3)})
    say_once.cache_clear()
    train(monkeypatch, "--data", path, "--out", tmp_path / "run", "--steps", 1)
    assert f"{path}: 6 images, 2 classes: cat ... dog" in capsys.readouterr().err
    for labels, word in (("dog,cat,1", None), ("cow", "list such as 3,3,7 or cat,dog")):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(tmp_path / "run"), "--nfe", "1", "--n", "3", "--device", "cpu",
                                          "--labels", labels, "--out", str(tmp_path / "x.npz")])
        if word:
            with pytest.raises(SystemExit):
                sample.main()
            assert word in capsys.readouterr().err
        else:
            sample.main()
            assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [1, 0, 1]
    monkeypatch.setattr(sys, "argv", ["data.py", "inspect", str(path), "--grid", str(tmp_path / "g.png")])
    data.main()
    assert "    1  dog: 3" in capsys.readouterr().out


def test_data_may_move_but_not_change(tmp_path, monkeypatch, capsys):
    files = {f"{name}/{i}.png": None for name in ("cat", "dog") for i in range(3)}
    path = write_tree(tmp_path, "folder", files)
    train(monkeypatch, "--data", path, "--out", tmp_path / "run", "--steps", 1)
    path.rename(tmp_path / "moved")
    train(monkeypatch, "--data", tmp_path / "moved", "--out", tmp_path / "run", "--steps", 2)      # a folder elsewhere
    train(monkeypatch, "--data", write_tree(tmp_path, "zip", files), "--out", tmp_path / "run", "--steps", 3)
    (tmp_path / "moved/dog/2.png").write_bytes(b"damaged")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, "--data", tmp_path / "moved", "--out", tmp_path / "run", "--steps", 30)
    assert end.value.code == 2 and "--skip-broken leaves such files out" in capsys.readouterr().err
    train(monkeypatch, "--data", tmp_path / "moved", "--skip-broken", "--out", tmp_path / "run", "--steps", 5)
    assert "was begun with samples 6 (fingerprint" in (said := capsys.readouterr().err) and "now they are 5" in said
    (tmp_path / "moved/dog/2.png").unlink()
    (tmp_path / "moved/dog/1.png").rename(tmp_path / "moved/cat/3.png")                            # of another class
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, "--data", tmp_path / "moved", "--out", tmp_path / "run", "--steps", 6)
    assert end.value.code == 2 and "was begun with samples 5" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = write_tree(tmp_path, "folder", {f"c{k}/0.png": None for k in range(30)})
    done = subprocess.run(["bash", "-c", f"{sys.executable} -u {ROOT}/data.py inspect {path} --grid g.png | head -1"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "30 samples" in done.stdout, done.stderr
