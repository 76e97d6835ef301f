"""Tests image files as people have them: labels, orientation, transparency, types, what is left out, and resuming."""

import io
import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from PIL import Image, ImageCms

import data
import facm
import fid
import sample
from common import imagefiles
from common.messages import say_once


def picture(k):
    """Returns an image of one colour."""
    return Image.fromarray(np.full((8, 8, 3), 8 * k, np.uint8))


def write_tree(tmp_path, kind, files):
    """Writes these files to a folder or a zip archive: {name: bytes, or None for a picture}. A name that ends in "/" is
    a folder. Returns the path."""
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
    """The numbered folders of NVlabs' dataset_tool are not classes. Each contains up to a thousand images."""
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
    (LABELS[:3], "has no label for 00001/img3.png"), ([[n, "cat"] for n, _ in LABELS], "label cat; labels are whole numbers"),
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
    assert len(imagefiles.Tree(path, labelled=False).names) == 2 * len(parts)      # FID needs no labels


@BOTH
def test_a_train_is_a_class_beside_a_car(tmp_path, kind):
    path = write_tree(tmp_path, kind, {f"{name}/{i}.png": None for name in ("car", "train") for i in range(2)})
    assert data.load(str(path)).class_names == ["car", "train"]


PARTS = ["train2017 val2017", "training_set test_set", "images masks", "imgs annotations", "trainA testA", "train_cats test_cats",
         "coco-train coco-val", "trainset testset", "trainval test", "JPEGImages SegmentationClass", "train_32x32 valid_32x32",
         "train train_masks", "Testing Data|Training Data", "images labels", "img gt"]
CLASSES = ["train car ship", "test_tube beaker", "test_tube train", "train_station test_tube", "with_mask without_mask", "mask no_mask",
           "train mask car", "valid invalid", "bullet_train steam_train", "image text", "trainer tester", "train_\u732b test_\u72ac",
           "fold1 fold2", "value valley", "label logo"]


def split_names(text):
    return text.split("|" if "|" in text else " ")


@BOTH
@pytest.mark.parametrize("names", PARTS)
def test_names_like_those_of_parts_are_no_classes(tmp_path, kind, names):
    path = write_tree(tmp_path, kind, {f"{name}/{i}.png": None for name in split_names(names) for i in range(2)})
    with pytest.raises(ValueError, match="parts of a data set, not classes: give one of them"):
        data.load(str(path))
    assert len(data.load(str(path), uncond=True).labels) == 4          # all of them, without labels
    assert len(imagefiles.Tree(path, labelled=False).names) == 4


@pytest.mark.parametrize("names", CLASSES)
def test_names_of_classes_are_not_taken_for_parts(tmp_path, names):
    path = write_tree(tmp_path, "folder", {f"{name}/{i}.png": None for name in split_names(names) for i in range(2)})
    assert data.load(str(path)).class_names == sorted(split_names(names))


@pytest.mark.parametrize("names, first", [("masks images", "images"), ("test2017 train2017", "train2017"), ("val_masks val_imgs", "val_imgs"),
                                          ("a_test a_train a_train_masks", "a_train")])
def test_the_part_that_is_proposed_is_the_one_that_most_people_need(tmp_path, names, first):
    path = write_tree(tmp_path, "folder", {f"{name}/0.png": None for name in names.split()})
    with pytest.raises(ValueError, match=f"as in {path}/{first}$"):
        data.load(str(path))


def test_annotations_that_are_no_images_are_parts_too(tmp_path):
    path = write_tree(tmp_path, "folder", {"images/0.png": None, "images/1.png": None, "annotations/0.xml": b"<a/>"})
    with pytest.raises(ValueError, match="parts of a data set, not classes: give one of them, as in .*images"):
        data.load(str(path))


@BOTH
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_dataset_json_of_any_editor(tmp_path, kind, encoding):
    """Some editors begin the file with a byte order mark, which is accepted."""
    held = table(LABELS).decode().encode(encoding)
    assert imagefiles.Tree(write_tree(tmp_path, kind, FOUR | {"dataset.json": held})).labels == [3, 0, 3, 1]


@BOTH
@pytest.mark.parametrize("content", [
    b"", b"\xff\x00\x81", b"[" * 100_000, b"3", b"[]", b'{"labels": 3}', b'{"labels": {"a": 1}}', b'{"labels": [["a"]]}',
    b'{"labels": [[1, 2]]}', b'{"labels": [["00000/img0.png", true]]}', table([[n, 10 ** 30] for n in FOUR]), b"\0" * 100], ids=range(12))
def test_a_damaged_dataset_json_is_one_line(tmp_path, kind, content, monkeypatch, capsys):
    path = write_tree(tmp_path, kind, FOUR | {"dataset.json": content})
    said = inspect_fails(monkeypatch, capsys, path)
    assert "dataset.json" in said and str(path) in said


def inspect_fails(monkeypatch, capsys, *argv):
    """Runs data.py inspect, which must fail, and returns the one line that it prints to stderr."""
    monkeypatch.setattr(sys, "argv", ["data.py", "inspect", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        data.main()
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith((f"{argv[0]}: left out", f"{argv[0]}: images of"))]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), said.err
    return lines[0]


@pytest.mark.parametrize("damage", ["cut", "no zip", "wrong checksum", "encrypted", "unknown compression", "empty", "end alone"])
def test_a_damaged_zip_is_one_line(tmp_path, monkeypatch, capsys, damage):
    path = write_tree(tmp_path, "zip", FOUR | {"dataset.json": table(LABELS)})
    held = bytearray(path.read_bytes())
    central = held.index(b"PK\1\2")
    if damage == "cut":
        held = held[:len(held) // 2]
    elif damage == "no zip":
        held = b"<html>not found</html>"
    elif damage == "wrong checksum":
        held[held.index(b"labels")] ^= 1
    elif damage == "encrypted":
        for place in range(len(held)):
            if held[place:place + 4] == b"PK\1\2":
                held[place + 8] |= 1
            elif held[place:place + 4] == b"PK\3\4":
                held[place + 6] |= 1
    elif damage == "unknown compression":
        for place in range(len(held)):
            if held[place:place + 4] == b"PK\1\2":
                held[place + 10] = 77
    elif damage == "empty":
        held = b""
    else:
        held = held[central:]
    path.write_bytes(held)
    assert str(path) in inspect_fails(monkeypatch, capsys, path)


@pytest.mark.parametrize("before", ["/", "./", "/data//", "\\", ".\\"])
def test_names_in_a_zip_may_begin_as_paths_do(tmp_path, before):
    path = write_tree(tmp_path, "zip", {f"{before}{name}/{i}.png": None for name in ("cat", "dog") for i in range(2)})
    tree = imagefiles.Tree(path)
    assert tree.classes == ["cat", "dog"] and tree.labels == [0, 0, 1, 1]
    assert all(imagefiles.read_image(tree.open(name)).size == (8, 8) for name in tree.names)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    path, honest = write_tree(tmp_path, "folder", FOUR), os.scandir

    def scandir(folder):
        if str(folder).endswith("00001"):
            raise PermissionError(13, "Permission denied", str(folder))
        return honest(folder)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="00001: the folder cannot be read .Permission denied"):
        data.load(str(path))


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
    assert "4 hidden or system files" in capsys.readouterr().err


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
    assert len(dataset.names) == 10 and "2 files that are not images, such as a/list.csv" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Pixels.

SCENE = np.zeros((16, 16, 3), np.uint8)
SCENE[:8, :8] = 255                        # the upper left quarter is white


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_as_a_viewer_shows_it(tmp_path, orientation):
    """A camera stores the image as it was held, and the EXIF data say how to turn it."""
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


@pytest.mark.parametrize("encoding, names, shown", [
    ("ascii", ["katze-\u00fc", "\u732b"], ["katze-\\xfc: 1", "\\u732b: 1"]), ("cp1252", ["\U0001f431", "\u0142"], ["\\U0001f431: 1", "\\u0142: 1"]),
    ("utf-8", [os.fsdecode(b"a\xff"), os.fsdecode(b"\xfe")], ["a\\udcff: 1", "\\udcfe: 1"])])
def test_names_that_the_console_lacks_are_escaped(tmp_path, encoding, names, shown):
    """This applies to the names of the class folders, of the data set and of the grid."""
    path = write_tree(tmp_path, "folder", {f"{name}/0.png": None for name in names})
    path = path.rename(tmp_path / names[0])
    done = subprocess.run([sys.executable, ROOT / "data.py", "inspect", path, "--grid", f"{names[1]}.png"], cwd=tmp_path,
                          capture_output=True, env=os.environ | dict(PYTHONIOENCODING=encoding))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all(text.encode() in done.stdout for text in shown)
    assert (tmp_path / f"{names[1]}.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Colour profiles. They are written here byte by byte, and the expected colours are computed with NumPy.

def entry(kind, content):
    return kind + bytes(4) + content


def fixed(*values):
    return b"".join(struct.pack(">i", round(2 ** 16 * value)) for value in values)


def icc(space, tags, kind=b"mntr", pcs=b"XYZ "):
    """Returns an ICC profile (version 2.4) with these tags."""
    text = b"a test\0"
    tags = {b"desc": entry(b"desc", struct.pack(">I", len(text)) + text + bytes(78)), b"cprt": entry(b"text", text),
            b"wtpt": entry(b"XYZ ", fixed(0.9642, 1, 0.8249))} | tags
    index, content, start = b"", b"", 132 + 12 * len(tags)
    for name, held in tags.items():
        index += name + struct.pack(">II", start + len(content), len(held))
        content += held + bytes(-len(held) % 4)
    header = struct.pack(">I4xI", start + len(content), 0x02400000) + kind + space + pcs
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + content


def power(exponent):
    return entry(b"curv", struct.pack(">IH", 1, round(256 * exponent)))


def to_linear(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def to_encoded(x):
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.clip(x, 0, None) ** (1 / 2.4) - 0.055)


def samples_of_srgb(n):
    """Returns sRGB's curve as a table of n values. The profile of HP and Microsoft has n = 1024."""
    values = np.rint(65535 * to_linear(np.linspace(0, 1, n))).astype(">u2")
    return entry(b"curv", struct.pack(">I", n) + values.tobytes())


SRGB_FORMULA = entry(b"para", struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
# Colourants for the white point D50, columns R, G, B: of sRGB as HP rounds them, and of Adobe RGB (1998)
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def icc_rgb(primaries, curve):
    tags = {name: entry(b"XYZ ", fixed(*column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T)}
    return icc(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def icc_grey(curve):
    return icc(b"GRAY", {b"kTRC": curve})


def icc_cmyk():
    """Returns a CMYK profile in which black is black and each other ink removes a quarter of the lightness."""
    corners = []
    for i in range(16):
        inks = (i >> 3 & 1) + (i >> 2 & 1) + (i >> 1 & 1)
        corners += [0 if i & 1 else 255 - 64 * inks, 128, 128]
    identity = bytes(range(256))
    table = struct.pack(">BBBx", 4, 3, 2) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * identity + bytes(corners) + 3 * identity
    return icc(b"CMYK", {b"A2B0": entry(b"mft1", table)}, b"prtr", b"Lab ")


ADOBE_RGB = icc_rgb(ADOBE, power(563 / 256))
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def shown_as(pixels, primaries, exponent):
    """Returns the sRGB values of pixels whose profile has these colourants and this exponent."""
    linear = (pixels / 255) ** exponent
    linear = linear @ (np.linalg.inv(SRGB) @ primaries).T
    return np.rint(255 * np.clip(to_encoded(linear), 0, 1))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("mode, ending", [("RGB", "png"), ("RGB", "tif"), ("RGBA", "png"), ("P", "png"), ("L with RGB's", "png"), ("L", "png"),
                                          ("LA", "png"), ("1", "png")])
def test_colours_of_a_profile_become_srgb(tmp_path, mode, ending, channels):
    pixels, profile = COLOURS.copy(), ADOBE_RGB
    image = Image.fromarray(pixels)
    if mode[0] in "L1":
        image = image.convert("L") if mode[0] == "L" else image.convert("1")
        pixels = np.asarray(image.convert("RGB"))
        profile = ADOBE_RGB if "RGB" in mode else icc_grey(power(1.8))
        expected = shown_as(pixels, SRGB, 563 / 256 if "RGB" in mode else 1.8)
    else:
        if mode == "P":
            image = image.quantize(64)
            pixels = np.asarray(image.convert("RGB"))
        expected = shown_as(pixels, ADOBE, 563 / 256)
    if mode.endswith("A"):
        alpha = np.full((16, 16), 255, np.uint8)
        alpha[8:] = 0
        expected[8:] = 255                 # transparent parts are white, and not the profile's white
        image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / f"0.{ending}", icc_profile=profile)
    found = np.asarray(imagefiles.read_image(tmp_path / f"0.{ending}", channels)).astype(float)
    if channels == 1:
        expected = expected @ [0.299, 0.587, 0.114]
    assert np.abs(found - expected).max() <= 2
    if mode == "1":
        assert set(found.flatten().tolist()) == {0.0, 255.0}
    else:
        plain = np.asarray(imagefiles.read_image(io.BytesIO(without_profile(image, ending)), channels)).astype(float)
        assert np.abs(plain - expected).max() > 5                      # the profile matters


def without_profile(image, ending):
    file = io.BytesIO()
    image.info.pop("icc_profile", None)
    image.save(file, {"tif": "TIFF", "png": "PNG", "jpg": "JPEG"}[ending])
    return file.getvalue()


def test_inks_become_colours(tmp_path):
    inks = np.zeros((8, 32, 4), np.uint8)
    inks[:, 8:16, 3] = 255                 # the columns are paper, black, cyan, all inks but black
    inks[:, 16:24, 0] = 255
    inks[:, 24:, :3] = 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "0.tif", icc_profile=icc_cmyk())
    shown = np.asarray(imagefiles.read_image(tmp_path / "0.tif")).astype(int)
    lightness = np.array([100, 0, 100 * 191 / 255, 100 * 63 / 255])
    y = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)          # CIE's definition of L*
    assert np.abs(shown[4, 4::8] - np.rint(255 * to_encoded(y))[:, None]).max() <= 2
    assert np.abs(np.asarray(imagefiles.read_image(tmp_path / "0.tif", 1)).astype(int)[4, 4::8] - np.rint(255 * to_encoded(y))).max() <= 2


@pytest.mark.parametrize("profile", {
    "lcms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "as HP": icc_rgb(SRGB, samples_of_srgb(1024)),
    "4096": icc_rgb(SRGB, samples_of_srgb(4096)), "formula": icc_rgb(SRGB, SRGB_FORMULA)}.items(), ids=lambda p: p[0])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_srgb_profiles_leave_pixels_untouched(tmp_path, profile, mode):
    many = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)       # a conversion alters some
    image = Image.fromarray(many)
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "0.png", icc_profile=profile[1])
    image.save(tmp_path / "1.png")
    assert "icc_profile" in Image.open(tmp_path / "0.png").info
    for channels in (3, 1):
        one, two = (np.asarray(imagefiles.read_image(tmp_path / name, channels)) for name in ("0.png", "1.png"))
        assert np.array_equal(one, two)


def test_grey_srgb_profiles_leave_pixels_untouched(tmp_path):
    for number, curve in enumerate((samples_of_srgb(1024), SRGB_FORMULA)):
        image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
        image.save(tmp_path / "0.png", icc_profile=icc_grey(curve))
        assert np.array_equal(np.asarray(imagefiles.read_image(tmp_path / "0.png", 1)), np.asarray(image)), number


@pytest.mark.parametrize("mode, profile", {
    "noise": ("RGB", bytes(COLOURS.tobytes()[:500])), "short": ("RGB", b"x"), "cut": ("RGB", ADOBE_RGB[:300]),
    "cut in its header": ("L", ADOBE_RGB[:100]), "inks' on colours": ("RGB", icc_cmyk()), "grey's on colours": ("RGBA", icc_grey(power(1.8))),
    "colours' on inks": ("CMYK", ADOBE_RGB), "inks' on grey": ("L", icc_cmyk()), "no curve": ("RGB", icc(b"RGB ", {})),
    "no curve of grey": ("L", icc(b"GRAY", {}))}.values(), ids=str)
def test_damaged_and_foreign_profiles_are_ignored(tmp_path, mode, profile, capfd):
    image = Image.fromarray(COLOURS).convert(mode)
    image.save(tmp_path / "0.tif", icc_profile=profile)
    image.save(tmp_path / "1.tif")
    one, two = (np.asarray(imagefiles.read_image(tmp_path / name)) for name in ("0.tif", "1.tif"))
    assert np.array_equal(one, two) and capfd.readouterr() == ("", "")


def test_a_photograph_with_everything(tmp_path):
    """Several threads at once read images that have a profile and an orientation."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = (120, 200, 60)
    exif = Image.Exif()
    exif[0x0112] = 6                       # a viewer turns it by 90 degrees, clockwise
    for i in range(64):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"c{i % 2}/{i}.jpg", exif=exif, icc_profile=ADOBE_RGB, quality=100, subsampling=0)
    dataset = data.load(str(tmp_path))
    x = data.to_uint8(dataset.items(torch.arange(64), torch.zeros(64, dtype=torch.bool))).numpy().astype(int)
    assert np.abs(x[:, :, 9:] - shown_as(np.array([120, 200, 60]), ADOBE, 563 / 256)).max() <= 6 and x[:, :, :7].max() <= 3
    assert np.array_equal(fid.open_source(str(tmp_path)).read(0, 1)[0], x[0])          # fid.py reads by the same rules


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
    with pytest.raises(ValueError, match="3 channels; leave out --channels"):
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
    with pytest.raises(ValueError, match="labels up to 10, but only 10 classes have images; number them from 0 on, or use "
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
    with pytest.raises(ValueError, match="no latents_flip; it has .*; --no-xflip does not need it"):
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
    for labels, word in (("dog,cat,dog", None), ("dog,cat,1", "a list of numbers or of names, such as 3,3,7 or cat,dog"),
                         ("cow", "such as 3,3,7 or cat,dog")):
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


def test_names_have_slashes_where_the_system_has_another_separator(tmp_path, monkeypatch):
    for name in ("cat/0.png", "dog/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    honest = os.path.relpath
    with monkeypatch.context() as patch:
        patch.setattr(imagefiles.os, "sep", "\\")
        patch.setattr(imagefiles.os.path, "relpath", lambda *args: honest(*args).replace("/", "\\"))
        files, found = imagefiles.walk(str(tmp_path))
    assert set(files) == {"cat/0.png", "dog/deep/1.png"} and found == {"cat", "dog", "dog/deep"}


def test_names_of_classes_that_are_numbers():
    """A list is read as names if all its words are names, and as numbers if none is one. Others are errors."""
    names = ("0", "1", "10", "2")
    assert sample.choose_labels("2,0", 3, 4, 0, names).tolist() == [3, 0, 3]
    assert sample.choose_labels("3", 2, 4, 0, names).tolist() == [3, 3]
    with pytest.raises(ValueError, match="--labels 2,3"):
        sample.choose_labels("2,3", 3, 4, 0, names)


def test_data_may_move_but_not_change(tmp_path, monkeypatch, capsys):
    files = {f"{name}/{i}.png": None for name in ("cat", "dog") for i in range(3)}
    path = write_tree(tmp_path, "folder", files)
    train(monkeypatch, "--data", path, "--out", tmp_path / "run", "--steps", 1)
    path.rename(tmp_path / "moved")
    train(monkeypatch, "--data", tmp_path / "moved", "--out", tmp_path / "run", "--steps", 2)      # it has moved
    train(monkeypatch, "--data", write_tree(tmp_path, "zip", files), "--out", tmp_path / "run", "--steps", 3)
    (tmp_path / "moved/dog/2.png").write_bytes(b"damaged")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, "--data", tmp_path / "moved", "--out", tmp_path / "run", "--steps", 30)
    assert end.value.code == 2 and "--skip-broken leaves such files out" in capsys.readouterr().err
    train(monkeypatch, "--data", tmp_path / "moved", "--skip-broken", "--out", tmp_path / "run", "--steps", 5)
    assert "was begun with samples 6 (fingerprint" in (said := capsys.readouterr().err) and "now they are 5" in said
    (tmp_path / "moved/dog/2.png").unlink()
    (tmp_path / "moved/dog/1.png").rename(tmp_path / "moved/cat/3.png")                            # another class
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, "--data", tmp_path / "moved", "--out", tmp_path / "run", "--steps", 6)
    assert end.value.code == 2 and "was begun with samples 5" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    path = write_tree(tmp_path, "folder", {f"c{k}/0.png": None for k in range(30)})
    done = subprocess.run(["bash", "-c", f"{sys.executable} -u {ROOT}/data.py inspect {path} --grid g.png | head -1"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "30 samples" in done.stdout, done.stderr
