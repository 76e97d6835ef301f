"""Image files in a folder or a zip archive: which files, of which class, as a viewer shows them.

    Tree(path)             .names, .labels and .classes of the images; .open(name)
    read_image(file)       turned as its EXIF data say, transparent parts white
    center_crop(image, n)  as ADM crops and scales

Labels come from dataset.json, as NVlabs' dataset_tool writes it, or else from class folders.
"""

import contextlib
import io
import json
import os
import pathlib
import zipfile

import numpy as np
from PIL import Image, ImageOps

from common.messages import say_once

# Files with these endings are images, and an error if they are not; others are looked into
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".ppm", ".pgm",
               ".tif", ".tiff", ".gif")
MACHINES = ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")
SPLITS = dict(train="train", training="train", val="val", valid="val", validation="val",
              test="test", testing="test")


# --------------------------------------------------------------------------------------------------
# One image.

def read_image(file, channels=3):
    """The image in a file, a Pillow image: RGB, or grey if channels is 1.

    It is turned as its EXIF data say, and lies on white where it is transparent. Raises ValueError
    for one of more than 8 bits, which Pillow would clip, and what Pillow's decoders raise.
    """
    with Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode}, more than 8 bits")
        image.load()
        with contextlib.suppress(Exception):               # damaged EXIF data turn nothing
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB" if channels == 3 else "L")


def center_crop(image, size):
    """A Pillow image's centre square, uint8 [size, size] or [size, size, 3], as in ADM: halved
    by box filters while twice too large, then bicubic to the short side (Dhariwal & Nichol 2021).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)),
                         Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]


# --------------------------------------------------------------------------------------------------
# A tree of them.

class Tree:
    """The images of a folder or a zip archive, in the order of their names.

    names [N], relative, with "/"; labels [N] below num_classes; classes: the names of the class
    folders, or [] if dataset.json gives numbers, or if nothing says classes (num_classes 0). What
    is left out is told once. Raises ValueError: no image; images in class folders and beside them;
    a class folder without an image, which would shift the labels of others; train, val and test
    side by side; a dataset.json that does not fit.
    labelled False: there are no labels, and nothing is wrong with them.
    """

    def __init__(self, path, labelled=True):
        self.path = pathlib.Path(path)
        self.archive = open_zip(self.path) if self.path.is_file() else None
        self.places, folders = zip_entries(self.archive) if self.archive else walk(self.path)
        aside = [n for n in self.places if is_aside(n)]
        found = sorted(n for n in self.places if not is_aside(n))
        names = [n for n in found if self.is_image(n)]
        if not names:
            raise ValueError(f"{path}: no images in it")
        folders = sorted(n for n in folders if not is_aside(n))
        base = find_base(names, folders, self.places)
        table = base + "dataset.json"
        self.names, other = names, sorted(set(found) - set(names) - {table})
        if left := [f"{len(files)} {kind}, such as {files[0]}"
                    for files, kind in ((other, "files that are no images"),
                                        (aside, "files of the machine")) if files]:
            say_once(f"{path}: left out: {'; '.join(left)}")
        self.classes, self.labels, self.num_classes = [], [0] * len(names), 0
        if not labelled:
            return
        if table not in self.places:
            self.classes, self.labels = self.classes_of_folders(base, folders)
            self.num_classes = len(self.classes)
        elif given := self.read_table(table):
            self.labels = self.labels_of_table(table, given, base)
            self.num_classes = max(self.labels) + 1

    def open(self, name):
        """The file of an image, opened or as a path, as Pillow takes it."""
        place = self.places[name]
        return io.BytesIO(self.archive.read(place)) if self.archive else self.path / place

    def is_image(self, name):
        """Is this file an image, by its ending or else by its first bytes?"""
        if name.lower().endswith(IMAGE_TYPES):
            return True
        if not self.archive and not (self.path / name).is_file():      # a pipe, a link to nothing
            return False
        with contextlib.suppress(Exception), Image.open(self.open(name)):
            return True
        return False

    def read_table(self, table):
        """dataset.json's {name: label}; {} if it says that there are no labels."""
        try:
            file = self.open(table)
            labels = json.loads(file.read() if self.archive else file.read_text())["labels"]
            return {name.replace("\\", "/"): label for name, label in labels or ()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{self.path}: {table} has no \"labels\": [[name, label], ...] to be "
                             f"read ({type(e).__name__})") from None

    def labels_of_table(self, table, given, base):
        """The labels that dataset.json gives; its names are relative to its folder."""
        labels = [given.pop(n.removeprefix(base), None) for n in self.names]
        for name, label in zip(self.names, labels):
            if not isinstance(label, int) or label < 0:
                raise ValueError(f"{self.path}: {table} gives {name} "
                                 + ("no label" if label is None else f"the label {label}; want "
                                    "numbers from 0 on"))
        if given:
            say_once(f"{self.path}: {table} names {len(given)} images that are not there, such as "
                     f"{min(given)}")
        return labels

    def classes_of_folders(self, base, folders):
        """The folders below `base` are the classes, and their order gives the labels."""
        parts = [n.removeprefix(base).split("/") for n in self.names]
        classes = sorted({p[0] for p in parts if len(p) > 1})
        if not classes:
            return [], [0] * len(parts)
        if beside := [n for n, p in zip(self.names, parts) if len(p) == 1]:
            raise ValueError(f"{self.path}: images both in class folders and beside them, such as "
                             f"{beside[0]}")
        if len({SPLITS[c.lower()] for c in classes if c.lower() in SPLITS}) > 1:
            raise ValueError(f"{self.path}: {', '.join(classes)} side by side are parts of a data "
                             "set, not classes: give one of them"
                             + ("" if self.archive else f", as in {self.path / base / classes[0]}"))
        if empty := sorted(children(folders, base) - set(classes)):
            raise ValueError(f"{self.path}: no images in the class folder {base}{empty[0]}; fill "
                             "it, or remove it")
        number = {name: label for label, name in enumerate(classes)}
        return classes, [number[p[0]] for p in parts]


def open_zip(path):
    """The archive, opened to read, by several threads too; ValueError if that cannot be done."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as e:
        raise ValueError(f"{path}: damaged, or no {path.suffix} file to be read "
                         f"({type(e).__name__})") from None


def zip_entries(archive):
    """{name with "/": name in the archive} of the files, and the set of all folders."""
    entries = {n.replace("\\", "/"): n for n in archive.namelist()}
    folders = {n.rstrip("/") for n in entries if n.endswith("/")}
    files = {n: place for n, place in entries.items() if not n.endswith("/")}
    folders |= {n.rpartition("/")[0] for n in files} - {""}
    for name in list(folders):
        folders |= {str(p) for p in pathlib.PurePosixPath(name).parents} - {"."}
    return files, folders


def walk(root):
    """{name: name} of the files below a folder, and the set of the folders, relative to it. Links
    are followed; a folder that several lead to is taken once, by its own name if it has one."""
    files, folders, seen = {}, set(), {os.path.realpath(root)}
    for folder, inner, names in os.walk(root, followlinks=True):
        here = os.path.relpath(folder, root)
        here = "" if here == "." else here
        there = sorted(inner, key=lambda n: (os.path.islink(os.path.join(folder, n)), n))
        inner.clear()
        for name in there:
            real = os.path.realpath(os.path.join(folder, name))
            if real in seen:
                say_once(f"{os.path.join(folder, name)}: left out, another name of {real}")
            else:
                seen.add(real)
                inner.append(name)
        folders |= {os.path.join(here, n) for n in inner}
        files |= {os.path.join(here, n): os.path.join(here, n) for n in names}
    return files, folders


def is_aside(name):
    """Is it hidden, or in a folder that a machine makes for itself?"""
    return any(part.startswith(".") or part in MACHINES for part in name.split("/"))


def children(names, base):
    """The first parts, below `base`, of those names that lie there."""
    return {n.removeprefix(base).split("/")[0] for n in names if n.startswith(base)} - {""}


def find_base(names, folders, files):
    """The folder, "" or ending in "/", below which the classes are: lone outer folders are peeled
    off, down to a dataset.json or to folders side by side; a lone folder of images is a class."""
    base = ""
    while base + "dataset.json" not in files:
        lone = children(folders, base)
        if len(lone) != 1 or any("/" not in n.removeprefix(base) for n in names):
            break
        inner = f"{base}{lone.pop()}/"
        if (inner + "dataset.json" not in files
                and any("/" not in n.removeprefix(inner) for n in names)):
            break
        base = inner
    return base
