"""Image files in a folder or a zip archive: finds them and their classes, and reads them as an
image viewer shows them.

    Tree(path)             .names, .labels and .classes of the images; .open(name)
    read_image(file)       rotated as its EXIF data say, in sRGB, transparent areas white
    center_crop(image, n)  crops and scales as ADM does

Labels come from a dataset.json, as NVlabs' dataset_tool writes it, or else from class folders.
"""

import contextlib
import io
import itertools
import json
import os
import pathlib
import re
import zipfile
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from common.messages import say_once

# Files with these extensions must be images; the beginning of other files is examined
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".ppm", ".pgm",
               ".tif", ".tiff", ".gif")
MACHINES = ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")


# --------------------------------------------------------------------------------------------------
# One image.

def read_image(file, channels=3):
    """The image in a file, a Pillow image: RGB, or grey if channels is 1.

    It is rotated as its EXIF data say, its colours are converted to sRGB if it has a colour
    profile, and transparent areas become white. Raises ValueError for an image of more than 8 bits,
    which Pillow would clip, and whatever Pillow's decoders raise.
    """
    with Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode}, more than 8 bits")
        image.load()
        profile = image.info.get("icc_profile")
        with contextlib.suppress(Exception):               # damaged EXIF data are ignored
            image = ImageOps.exif_transpose(image)
        if profile:
            image = to_srgb(image, profile)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB" if channels == 3 else "L")


def to_srgb(image, profile):
    """A Pillow image with its colours converted from an ICC profile (bytes) to sRGB: RGB, or RGBA
    if it has transparent areas. Returns the image itself if the profile is sRGB, damaged, or of
    another kind of image."""
    if image.mode == "CMYK":
        opaque = image
    elif image.mode in ("1", "L", "LA"):
        opaque = image.convert("L")
    else:
        opaque = image.convert("RGBA").convert("RGB")
    convert = srgb_conversion(profile, opaque.mode)
    if convert is None:
        return image
    result = convert(opaque)
    if image.has_transparency_data:
        result.putalpha(image.convert("RGBA").getchannel("A"))
    return result


@lru_cache(maxsize=64)                     # the images of a data set share a few profiles
def srgb_conversion(profile, mode):
    """A function that converts images of a mode (RGB, L or CMYK) from an ICC profile to sRGB, or
    None if the profile is sRGB, damaged, or of another kind of image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and mode == "L":                 # a grey image with an RGB profile
            mode = "RGB"
        if space != {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")

        def convert(image):
            return ImageCms.applyTransform(image.convert(mode), transform)

        if changes_nothing(convert, mode):
            return None
    except Exception:                      # ImageCms has several errors for a damaged profile
        return None
    return convert


def changes_nothing(convert, mode):
    """Whether a conversion to sRGB does not change the colours of a mode. There are dozens of sRGB
    profiles, whose numbers are rounded in different ways, so a colour may change by 2 of 255."""
    colours = np.arange(256).reshape(-1, 1, 1).repeat(3, axis=2)       # all greys
    if mode == "CMYK":
        return False
    if mode == "RGB":
        levels = np.arange(0, 256, 15)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
        colours = np.concatenate([colours, cube.reshape(-1, 1, 3)])
    result = np.asarray(convert(Image.fromarray(colours.astype(np.uint8))))
    return np.abs(result.astype(int) - colours).max() <= 2


def center_crop(image, size):
    """The central square of a Pillow image, uint8 [size, size] or [size, size, 3], as in ADM
    (Dhariwal & Nichol 2021): halved by a box filter while it is more than twice as large, and then
    scaled bicubically so that the shorter side fits."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)),
                         Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]


# --------------------------------------------------------------------------------------------------
# A tree of images.

class Tree:
    """The images of a folder or a zip archive, in the order of their names.

    names [N] are relative and have "/"; labels [N] are below num_classes. classes has the names of
    the class folders. It is [] if dataset.json gives numbers, and if there are no classes
    (num_classes 0). Files that are left out are printed once.

    labelled False: the labels are neither read nor checked.

    Raises ValueError if there is no image, if images lie both in class folders and beside them, if
    a class folder has no image, which would shift the labels of the others, if the folders are
    parts of a data set, such as train and val, or if dataset.json does not fit.
    """

    def __init__(self, path, labelled=True):
        self.path = pathlib.Path(path)
        self.archive = None
        if self.path.is_file():
            self.archive = open_zip(self.path)
            self.places, folders = zip_entries(self.archive)
        else:
            self.places, folders = walk(self.path)
        folders = sorted(name for name in folders if not is_aside(name))
        found = sorted(name for name in self.places if not is_aside(name))
        self.names = [name for name in found if self.is_image(name)]
        if not self.names:
            raise ValueError(f"{path} contains no images")
        base = find_base(self.names, folders, self.places)
        table = base + "dataset.json"
        others = sorted(set(found) - set(self.names) - {table})
        self.say_what_is_left_out(others)

        # Labels: from dataset.json, or else from the folders
        self.classes, self.labels, self.num_classes = [], [0] * len(self.names), 0
        if not labelled:
            return
        if table in self.places:
            given = self.read_table(table)
            if given:
                self.labels = self.labels_of_table(table, given, base)
                self.num_classes = max(self.labels) + 1
        else:
            self.classes, self.labels = self.classes_of_folders(base, folders)
            self.num_classes = len(self.classes)

    def say_what_is_left_out(self, others):
        """Prints the number of files that are not images, and of those that a system created."""
        aside = [name for name in self.places if is_aside(name)]
        parts = []
        if others:
            parts.append(f"{len(others)} files that are not images, such as {others[0]}")
        if aside:
            parts.append(f"{len(aside)} hidden or system files, such as {aside[0]}")
        if parts:
            say_once(f"{self.path}: left out: {'; '.join(parts)}")

    def open(self, name):
        """The file of an image, opened or as a path, for Pillow."""
        place = self.places[name]
        if self.archive:
            return io.BytesIO(self.archive.read(place))
        return self.path / place

    def beginning(self, name, length):
        """The size of a file in bytes, and its first bytes, `length` of them at most."""
        place = self.places[name]
        if self.archive:
            size = self.archive.getinfo(place).file_size
            with self.archive.open(place) as file:
                return size, file.read(length)
        with open(self.path / place, "rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(length)

    def is_image(self, name):
        """Whether this file is an image, by its extension or else by its first bytes."""
        if name.lower().endswith(IMAGE_TYPES):
            return True
        if not self.archive and not (self.path / name).is_file():      # a pipe, a link to nothing
            return False
        with contextlib.suppress(Exception), Image.open(self.open(name)):
            return True
        return False

    def read_table(self, table):
        """{name: label} of dataset.json; {} if it says that there are no labels."""
        try:
            file = self.open(table)
            content = file.read() if self.archive else file.read_bytes()
            labels = json.loads(content)["labels"] or []   # bytes, which may begin with a BOM
            return {name.replace("\\", "/"): label for name, label in labels}
        except Exception as e:             # zipfile and deeply nested lists raise other errors
            raise ValueError(f"{self.path}: {table} has no \"labels\": [[name, label], ...] that "
                             f"can be read ({type(e).__name__})") from None

    def labels_of_table(self, table, given, base):
        """The labels that dataset.json gives; its names are relative to its folder."""
        labels = []
        for name in self.names:
            label = given.pop(name.removeprefix(base), None)
            if label is None:
                raise ValueError(f"{self.path}: {table} has no label for {name}")
            if type(label) is not int or not 0 <= label < 2 ** 31:     # bool is a kind of int
                raise ValueError(f"{self.path}: {table} gives {name} the label {label}; labels are "
                                 "whole numbers from 0 on")
            labels.append(label)
        if given:
            say_once(f"{self.path}: {table} names {len(given)} images that do not exist, such as "
                     f"{min(given)}")
        return labels

    def classes_of_folders(self, base, folders):
        """The names of the folders below `base`, which are the classes, and the labels, which are
        the numbers of the classes in the order of the names."""
        inside, beside = [], []
        for name in self.names:
            below = name.removeprefix(base)
            if "/" in below:
                inside.append(below.split("/")[0])
            else:
                beside.append(name)
        if not inside:
            return [], [0] * len(self.names)
        if beside:
            raise ValueError(f"{self.path}: images both in class folders and beside them, such as "
                             f"{beside[0]}")
        classes, all_folders = sorted(set(inside)), sorted(children(folders, base))
        parts = parts_of_a_data_set(all_folders)
        if parts:
            example = "" if self.archive else f", as in {self.path / base / parts[0]}"
            raise ValueError(f"{self.path}: {', '.join(parts)} side by side are parts of a data "
                             f"set, not classes: give one of them{example}")
        for folder in all_folders:
            if folder not in classes:
                raise ValueError(f"{self.path}: no images in the class folder {base}{folder}; fill "
                                 "it, or remove it")
        number = {name: label for label, name in enumerate(classes)}
        return classes, [number[name] for name in inside]


def open_zip(path):
    """The archive, opened for reading by several threads; ValueError if that fails."""
    try:
        return zipfile.ZipFile(path)
    except Exception as e:                 # damaged archives raise BadZipFile and other errors
        raise ValueError(f"{path} is damaged or not a {path.suffix} file ({type(e).__name__})"
                         ) from None


def zip_entries(archive):
    """{name with "/": name in the archive} of the files, and the set of all folders. Names such as
    /cat/0.png, ./cat/0.png and cat\\0.png become cat/0.png."""
    files, folders = {}, set()
    for place in archive.namelist():
        parts = [part for part in place.replace("\\", "/").split("/") if part not in ("", ".")]
        is_folder = place.endswith(("/", "\\"))
        if parts and not is_folder:
            files["/".join(parts)] = place
            parts.pop()
        for end in range(1, len(parts) + 1):
            folders.add("/".join(parts[:end]))
    return files, folders


def walk(root):
    """{name: name} of the files below a folder, and the set of the folders, relative to it. Links
    are followed. A folder that several links lead to appears once, under its own name if it has one
    here."""
    def refuse(error):
        raise ValueError(f"{error.filename}: the folder cannot be read ({error.strerror})")

    files, folders, seen = {}, set(), {os.path.realpath(root)}
    for folder, inner, names in os.walk(root, followlinks=True, onerror=refuse):
        here = os.path.relpath(folder, root).replace(os.sep, "/") + "/"        # on Windows as well
        if here == "./":
            here = ""
        there = sorted(inner, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        inner.clear()
        for name in there:
            real = os.path.realpath(os.path.join(folder, name))
            if real in seen:
                say_once(f"{os.path.join(folder, name)}: left out, another name of {real}")
            else:
                seen.add(real)
                inner.append(name)         # os.walk visits these
                folders.add(here + name)
        for name in names:
            files[here + name] = here + name
    return files, folders


def is_aside(name):
    """Whether a file is hidden, or in a folder that a system created."""
    for part in name.split("/"):
        if part.startswith(".") or part in MACHINES:
            return True
    return False


def children(names, base):
    """The names directly below `base`."""
    return {name.removeprefix(base).split("/")[0] for name in names if name.startswith(base)} - {""}


def find_base(names, folders, files):
    """The folder, "" or ending in "/", below which the classes are. A single outer folder is
    skipped, unless it has a dataset.json. A single folder of images is a class."""
    base = ""
    while base + "dataset.json" not in files:
        lone = children(folders, base)
        if len(lone) != 1 or has_images(base, names):
            break
        inner = f"{base}{lone.pop()}/"
        if inner + "dataset.json" not in files and has_images(inner, names):
            break
        base = inner
    return base


def has_images(folder, names):
    """Whether a folder ("" or ending in "/") has images directly in it. All names are below it."""
    return any("/" not in name.removeprefix(folder) for name in names)


# --------------------------------------------------------------------------------------------------
# Classes, or parts of a data set?

# Words in the names of folders. SPLITS: parts of a data set, where words of the same meaning have
# the same value; PICTURES: folders of images; COMPANIONS: files that belong to images; EMPTY: words
# without a meaning here
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "dev": "val", "eval": "val", "evaluation": "val", "holdout": "val", "test": "test",
          "testing": "test", "extra": "extra", "unlabeled": "extra", "unlabelled": "extra"}
PICTURES = {"image", "images", "img", "imgs", "photos", "pictures"}
COMPANIONS = {"mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots",
              "anno", "annos", "segmentation", "segmentations", "seg", "segs", "trimaps", "gt",
              "groundtruth", "bboxes", "captions"}
EMPTY = {"set", "sets", "data", "dataset", "split", "part", "subset", "folder", "files", "all",
         "full", "small", "mini", "tiny", "large", "class", "object", "jpeg", "jpg", "png", "rgb"}
WORDS = {*SPLITS, *PICTURES, *COMPANIONS, *EMPTY}
ANY_WORD = "|".join(sorted(WORDS, key=len, reverse=True))


class Part(NamedTuple):
    """The meaning of a folder's name."""

    name: str
    splits: tuple                          # of a data set, such as ("train",), or ()
    kind: str                              # "pictures", "companions" or ""
    rest: tuple                            # the other words; numbers do not count


def parts_of_a_data_set(names):
    """Of the names of folders side by side, those that are parts of one data set, such as train2017
    and val2017, or images and masks. The most useful one is the first. [] if all may be classes."""
    found = set()
    parts = [part for part in map(read_part, names) if part.splits or part.kind]
    for one, other in itertools.combinations(parts, 2):
        if belong_together(one, other):
            found |= {one, other}
    return [part.name for part in sorted(found, key=how_rarely_needed)]


def read_part(name):
    """The Part of a folder's name."""
    words = []
    for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+", name):     # also of camelCase
        word = word.lower()
        if re.fullmatch(f"({ANY_WORD})+", word):           # trainset is train and set
            words += re.findall(ANY_WORD, word)
        else:
            words.append(word)
    splits = sorted({SPLITS[word] for word in words if word in SPLITS})
    kind = ""
    if PICTURES.intersection(words):
        kind = "pictures"
    if COMPANIONS.intersection(words):
        kind = "companions"
    return Part(name, tuple(splits), kind, tuple(word for word in words if word not in WORDS))


def belong_together(one, other):
    """Whether two folders are parts of one data set. Their names then differ only in the words
    above, as those of train_cats and test_cats do. Those of train and car, or of train and
    test_tube, differ in other words."""
    if one.rest != other.rest:
        return False
    if one.splits and other.splits and one.splits != other.splits:
        return True
    if one.kind and other.kind:
        return one.kind != other.kind
    # One of them does not say its kind, as train beside train_masks
    same_split = one.splits != () and one.splits == other.splits
    return same_split and "companions" in (one.kind, other.kind)


def how_rarely_needed(part):
    """A key for sorting parts, so that the one that most people need comes first."""
    return part.kind == "companions", part.splits != ("train",), part.name
