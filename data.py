"""Reads data sets and writes pictures.

    load(name, ...)        a Dataset, whose batches depend only on the seed and the images before
    glyphs(n, size, seed)  coloured digits with labels, drawn here; nothing is downloaded
    to_uint8, save_grid    pixels are floats in [-1, 1] in the methods and uint8 in files

    python data.py inspect DATA                                     # prints what is in a data set
"""

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import flags, folders, imagefiles, processes, seeds
from common.messages import as_argument, fail, say_once

# --------------------------------------------------------------------------------------------------
# Glyphs: images that a function draws.

SUPERSAMPLING = 4          # a glyph is drawn this many times larger, then averaged down


@cache
def _font(points):
    return ImageFont.load_default(points)


def _glyph(index, size, seed):
    """One digit, uint8 [size, size, 3], with random colours of paper and ink, size, rotation and
    shift."""
    rng = np.random.default_rng((seed, index))
    while True:            # ink and paper differ in luminance, by half of the range or more
        paper, ink = rng.integers(0, 256, (2, 3))
        if abs((paper - ink) @ (0.299, 0.587, 0.114)) > 128:
            break
    side = size * SUPERSAMPLING
    points = int(side * rng.uniform(0.9, 1.15))
    shift = rng.uniform(-0.06, 0.06, 2) * side
    angle = rng.uniform(-10, 10)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text((side / 2 + shift[0], side / 2 + shift[1]), str(index % 10), fill=255,
                              font=_font(points), anchor="mm")
    mask = mask.rotate(angle, Image.Resampling.BILINEAR).reduce(SUPERSAMPLING)
    blend = np.asarray(mask, dtype=np.float64)[..., None] / 255
    return np.rint(paper + blend * (ink - paper)).astype(np.uint8)


def glyphs(n, size=16, seed=0, first=0):
    """n coloured digits in Pillow's bundled TrueType font; image i shows the digit i % 10.

    Image i depends only on (seed, i), so any number of images can be drawn; i runs from `first` on.
    Returns images uint8 [n, size, size, 3] and labels int64 [n]. An image takes about 0.3 ms.
    """
    images = np.stack([_glyph(i, size, seed) for i in range(first, first + n)])
    return images, np.arange(first, first + n, dtype=np.int64) % 10


# --------------------------------------------------------------------------------------------------
# Data sets. A batch is given by the number of images before it, and a process reads its `rows`.

class Dataset:
    """Samples and their labels. A subclass's `items(index, flip)` gives the samples with the
    numbers index (int64 [b]), mirrored where flip (bool [b]) is set: float [b, *shape].

    labels: int64 [N], below num_classes. shape: (C, H, W). num_classes 0: there are no classes, and
    the labels have no meaning. xflip: half of the samples are mirrored. class_names: the class
    folders, in the order of the labels. names: the names of the files, if each sample has a file.
    Raises ValueError for samples that are not square.
    """

    ahead = False                          # True: a thread prepares the next batch
    class_names = names = ()

    def __init__(self, labels, shape, num_classes, xflip=False):
        if shape[1] != shape[2]:
            raise ValueError(f"samples of {shape[2]}x{shape[1]} are not square; --resolution crops "
                             "and scales images, but not latents")
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.shape = tuple(shape)
        self.num_classes = num_classes
        self.xflip = xflip
        self.thread = ThreadPoolExecutor(1)
        self.next = {}                     # the batches that are prepared

    def index(self, seed, first, batch, rows=slice(None)):
        """The numbers, int64 [b], of the samples in the `rows` of the batch after `first` samples.

        They are consecutive entries of a permutation that is new in each epoch, so an epoch has
        each sample once. They depend only on the seed and `first`, and not on the number of
        processes or on resuming.
        """
        n = len(self.labels)
        place = torch.arange(first, first + batch)[rows]
        index = torch.empty_like(place)
        for epoch in (place // n).unique().tolist():
            here = place // n == epoch
            index[here] = _permutation(n, seed, epoch)[place[here] % n]
        return index

    def batch(self, seed, first, batch, rows=slice(None)):
        """x1 float [b, *shape] and y int64 [b]: the `rows` of the batch after `first` samples.

        Raises ValueError, naming the file, for a sample that cannot be read.
        """
        if not self.ahead:
            return self.gather(seed, first, batch, rows)
        ready = self.next.pop((seed, first, batch, str(rows)), None)
        after = first + batch
        self.next[seed, after, batch, str(rows)] = self.thread.submit(
            self.gather, seed, after, batch, rows)
        if ready:
            return ready.result()
        return self.gather(seed, first, batch, rows)

    def gather(self, seed, first, batch, rows):
        """What `batch` returns, computed now."""
        index = self.index(seed, first, batch, rows)
        flip = torch.zeros(batch, dtype=torch.bool)
        if self.xflip:
            flip = torch.rand(batch, generator=seeds.generator("cpu", seed, "flip", first)) < 0.5
        return self.items(index, flip[rows]), self.labels[index]

    def content(self):
        """A list of bytes that distinguishes this data set from others with the same labels. It
        does not depend on the process or on the path of the data. For a large set it is computed
        from samples that are spread over the set, which takes less than a second."""
        return []


class Images(Dataset):
    """uint8 images [N, H, W, C] in memory, C 1 or 3. Items are floats in [-1, 1]. Images are
    cropped and scaled to `resolution`, unless it is None."""

    def __init__(self, images, labels, num_classes, xflip=False, resolution=None):
        self.given_shape = images.shape
        self.given = images[spread(len(images))]           # before they are scaled
        if resolution and images.shape[1:3] != (resolution, resolution):
            images = scale_arrays(images, resolution)
        self.images = torch.from_numpy(images)
        _, h, w, c = images.shape
        super().__init__(labels, (c, h, w), num_classes, xflip)

    def items(self, index, flip):
        x = self.images[index].permute(0, 3, 1, 2).contiguous()
        if flip.any():
            x[flip] = x[flip].flip(3)
        return x.float().div_(127.5).sub_(1)

    def content(self):
        """The shape, and 256 of the images, before they were scaled."""
        return [repr(self.given_shape).encode(), self.given.tobytes()]


class Glyphs(Images):
    """n glyphs, each of which is drawn when it is first needed and then kept."""

    def __init__(self, n, size, seed):
        self.size, self.seed = size, seed
        self.drawn = torch.zeros(n, dtype=torch.bool)
        super().__init__(np.zeros((n, size, size, 3), np.uint8), np.arange(n) % 10, num_classes=10)

    def items(self, index, flip):
        for i in index[~self.drawn[index]].tolist():
            self.images[i] = torch.from_numpy(_glyph(i, self.size, self.seed))
            self.drawn[i] = True
        return super().items(index, flip)

    def content(self):
        """The parameters with which they are drawn."""
        return [f"glyphs {len(self.labels)} {self.size} {self.seed}".encode()]


class Files(Dataset):
    """Image files of a folder or a zip archive, decoded by several threads when they are needed.

    path, labelled: see imagefiles.Tree. channels: 3 (RGB) or 1 (grey). resolution: images are
    cropped and scaled to it; None: all have the size of the first. skip_broken: all images are
    decoded once, and those that cannot be decoded are listed and left out. `numbers`, int64 [N],
    has the numbers of the samples among all images, including the broken ones. Raises ValueError as
    imagefiles.Tree does, and with the name of the file for a broken image or one of another size.
    """

    ahead = True

    def __init__(self, path, resolution=None, xflip=False, skip_broken=False, channels=3,
                 labelled=True):
        self.tree = imagefiles.Tree(path, labelled)
        self.resolution, self.channels, self.skip_broken = resolution, channels, skip_broken
        self.decoders = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self.numbers = torch.arange(len(self.tree.names))
        if skip_broken:
            self.numbers = self.find_sound()
        kept = self.numbers.tolist()
        self.names = [self.tree.names[i] for i in kept]
        labels = [self.tree.labels[i] for i in kept]
        width, height = self.read(self.names[0]).size
        say_if_scaled(path, width, height, resolution)
        if resolution:
            width = height = resolution
        super().__init__(labels, (channels, height, width), self.tree.num_classes, xflip)
        self.class_names = self.tree.classes

    def find_sound(self):
        """The numbers of the images that can be decoded, int64 [N]. Prints the names of the others.
        """
        broken = list(self.decoders.map(self.is_broken, self.tree.names))
        lines = [f"{self.tree.path}: {sum(broken)} broken images left out"]
        lines += [name for name, bad in zip(self.tree.names, broken) if bad]
        say_once("\n  ".join(lines))
        if all(broken):
            raise ValueError(f"{self.tree.path}: every image in it is broken")
        return torch.nonzero(~torch.tensor(broken)).flatten()

    def read(self, name):
        """The image, of any size; ValueError if it cannot be decoded."""
        try:
            return imagefiles.read_image(self.tree.open(name), self.channels)
        except Exception as e:             # decoders raise many kinds of errors
            raise self.unreadable(name, e) from None

    def unreadable(self, name, error):
        """The ValueError that says why an image cannot be read, and what to do."""
        message = f"{self.tree.path / name} is not a readable image ({error})"
        if not self.skip_broken:
            message += "; --skip-broken leaves such files out"
        return ValueError(message)

    def is_broken(self, name):
        """Whether this image cannot be decoded."""
        try:
            self.read(name)
        except ValueError:
            return True
        return False

    def decode(self, name):
        """uint8 [H, W, C] at the resolution; ValueError if the image has another size."""
        image = self.read(name)
        if self.resolution:
            pixels = imagefiles.center_crop(image, self.resolution)
        elif (image.height, image.width) == self.shape[1:]:
            pixels = np.asarray(image)
        else:
            raise ValueError(f"{self.tree.path / name} has {image.width}x{image.height} pixels; "
                             "images of several sizes, or that are not square, need --resolution")
        return pixels.reshape(*self.shape[1:], self.channels)

    def items(self, index, flip):
        names = [self.names[i] for i in index.tolist()]
        x = np.stack(list(self.decoders.map(self.decode, names)))
        flip = flip.numpy()
        x[flip] = x[flip, :, ::-1]
        return torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    def content(self):
        """The sizes of 256 files, and the first 64 KiB of each."""
        names = [self.names[i] for i in spread(len(self.names))]
        return list(self.decoders.map(self.content_of, names))

    def content_of(self, name, length=2 ** 16):
        """The size of a file and its first bytes. A small file is decoded as well, so that the
        error for a broken file does not say that the data have changed."""
        try:
            size, beginning = self.tree.beginning(name, length)
        except Exception as e:             # OSError, and what zipfile raises
            raise self.unreadable(name, e) from None
        if size <= length:
            self.read(name)
        return f"{size} ".encode() + beginning


class Latents(Dataset):
    """Shards of latents in the format of LightningDiT, which are memory-mapped.

    folder: *.safetensors, each with latents and latents_flip [n, C, H, W] and labels [n], and
    latents_stats.pt with mean and std [1, C, 1, 1]. Items are (z - mean) / std, as in LightningDiT.
    Without that file, latents of 4 channels are those of the SD-VAE, and items are 0.18215 z. With
    xflip half of the items come from latents_flip. Raises ValueError with the name of the shard for
    tensors that are missing or of unequal lengths.
    """

    ahead = True

    def __init__(self, folder, xflip=True):
        folder = pathlib.Path(folder)
        self.paths = sorted(folder.glob("*.safetensors"))
        if not self.paths:
            raise ValueError(
                f"{folder} contains no *.safetensors, the shards of latents in the format of "
                "LightningDiT; put the published ones there, or run "
                f"python encode.py --out {as_argument(folder)}")
        self.shards = [map_shard(path, xflip) for path in self.paths]
        shapes = {shard["latents"].shape[1:] for shard in self.shards}
        if len(shapes) > 1:
            raise ValueError(f"{folder}: shards with latents of several shapes, {sorted(shapes)}")
        labels = [shard["labels"].astype(np.int64) for shard in self.shards]
        self.start = torch.tensor([0] + [len(part) for part in labels]).cumsum(0)
        labels = np.concatenate(labels)
        if not len(labels):
            raise ValueError(f"{folder}: its shards contain no latents")
        num_classes = 0
        if any(has_labels(path) for path in self.paths):
            num_classes = int(labels.max()) + 1
        super().__init__(labels, shapes.pop(), num_classes, xflip)
        self.mean, self.std = read_stats(folder, self.shape[0])

    def raw(self, index, flip):
        """Latents as they are in the shards, float32 [b, C, H, W]. Raises ValueError with the shard
        and the row if one is not finite."""
        z = np.empty((len(index), *self.shape), np.float32)
        shard = torch.searchsorted(self.start, index, right=True) - 1
        rows = (index - self.start[shard]).tolist()
        for k, (s, row, mirrored) in enumerate(zip(shard.tolist(), rows, flip.tolist())):
            name = "latents_flip" if mirrored else "latents"
            z[k] = as_float(self.shards[s][name][row])
            if not np.isfinite(z[k]).all():
                raise ValueError(f"{self.paths[s]}: {name} has NaN or infinity in row {row}; "
                                 "encode that shard anew")
        return torch.from_numpy(z)

    def items(self, index, flip):
        return self.raw(index, flip).sub_(self.mean).div_(self.std)

    def content(self):
        """The sizes and types of the shards, the statistics, and 256 of the latents."""
        shards = [(len(shard["labels"]), str(shard["latents"].dtype)) for shard in self.shards]
        index = torch.tensor(spread(len(self.labels)))
        straight = torch.zeros(len(index), dtype=torch.bool)
        parts = [self.mean, self.std, self.raw(index, straight)]
        if self.xflip:
            parts.append(self.raw(index, ~straight))
        return [repr((shards, self.shape)).encode()] + [part.numpy().tobytes() for part in parts]


@lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def spread(n, count=256):
    """The numbers of `count` of n samples, evenly spread; of all samples if n is smaller."""
    return sorted({i * (n - 1) // (count - 1) for i in range(count)})


# --------------------------------------------------------------------------------------------------
# Shards of latents.

SHARD_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
               "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}


def map_shard(path, flipped=True):
    """{name: memory-mapped array} of a .safetensors file, which has a length, a JSON header, and
    the data. bfloat16 is mapped as uint16 (see as_float). flipped: latents_flip has to exist."""
    try:
        types, arrays = map_tensors(path)
    except Exception as e:                 # the header of another file may have any form
        raise ValueError(f"{path} is not a readable shard: it is truncated or of another kind "
                         f"({e})") from None
    needed = ["latents", "labels"]
    if flipped:
        needed.append("latents_flip")
    for name in needed:
        if name not in types:
            message = f"{path} has no {name}; it has {', '.join(types) or 'nothing'}"
            if name == "latents_flip":
                message += "; --no-xflip does not need it"
            raise ValueError(message)
        is_float = "F" in types[name]
        if name == "labels" and (is_float or name not in arrays):
            raise ValueError(f"{path}: labels are {types[name]}, not whole numbers")
        if name != "labels" and (not is_float or name not in arrays):
            raise ValueError(f"{path}: {name} are {types[name]}, not F32, F16 or BF16")
    shapes = [arrays[name].shape for name in needed]
    same = arrays["latents"].shape[:1] == arrays["labels"].shape
    if flipped and arrays["latents"].shape != arrays["latents_flip"].shape:
        same = False
    if not same or arrays["latents"].ndim != 4:
        raise ValueError(f"{path}: {', '.join(needed)} of unequal lengths, {shapes}")
    return arrays


def map_tensors(path):
    """{name: type} and {name: memory-mapped array} of a .safetensors file. Raises an error of any
    kind for another file. Arrays of types that NumPy does not have are left out."""
    types, arrays = {}, {}
    header, length = read_header(path)
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        types[name] = tensor["dtype"]
        if tensor["dtype"] in SHARD_TYPES:
            place = 8 + length + tensor["data_offsets"][0]
            arrays[name] = np.asarray(np.memmap(
                path, SHARD_TYPES[tensor["dtype"]], "r", place, tuple(tensor["shape"])))
    return types, arrays


def read_header(path):
    """The JSON header of a .safetensors file, and its length in bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is not complete")
        return json.loads(file.read(length)), length


NO_LABELS = {"labels": "none"}             # the metadata of a shard of images without labels


def has_labels(path):
    """Whether the labels of a shard have a meaning; encode.py notes if they have none."""
    return read_header(path)[0].get("__metadata__") != NO_LABELS


def as_float(latents):
    """Latents of a mapped shard as float32. bfloat16 has the upper 16 bits of float32."""
    if latents.dtype == np.uint16:
        return (latents.astype(np.uint32) << 16).view(np.float32)
    return latents.astype(np.float32)


def read_stats(path, channels):
    """mean and std [1, C, 1, 1] with which latents z are normalised, (z - mean) / std. path: a
    latents_stats.pt, or a folder that contains it. Without it, latents of 4 channels are those of
    the SD-VAE and become 0.18215 z. Raises ValueError if it is missing for other latents, damaged,
    or of another kind.
    """
    shape = (1, channels, 1, 1)
    if path.is_dir():
        path = path / "latents_stats.pt"
    advice = f"`python data.py inspect {as_argument(path.parent)} --save-stats` writes it"
    if not path.exists():
        if channels != 4:
            raise ValueError(f"{path} is missing; {advice}")
        return torch.zeros(shape), torch.full(shape, 1 / 0.18215)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (held[name].float().reshape(shape) for name in ("mean", "std"))
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError
    except Exception as e:                 # torch.load raises many kinds of errors
        raise ValueError(f"{path} has no statistics of these latents ({type(e).__name__}), which "
                         f"are a mean and a std of {channels} channels; {advice} again") from None
    return mean, std


def latent_stats(shards):
    """mean and std [1, C, 1, 1] of the latents, not mirrored, of map_shard's shards."""
    n, total, squares = 0, 0.0, 0.0
    for shard in shards:
        for i in range(0, len(shard["labels"]), 500):
            z = torch.from_numpy(as_float(shard["latents"][i:i + 500]).astype(np.float64))
            n += z[:, 0].numel()
            total += z.sum((0, 2, 3))
            squares += z.square().sum((0, 2, 3))
    mean = total / n
    std = ((squares - n * mean ** 2) / (n - 1)).sqrt()
    return mean.float()[None, :, None, None], std.float()[None, :, None, None]


def save_stats(folder, scale=1.0):
    """Writes latents_stats.pt of the shards in a folder: their mean and std or, for an autoencoder
    whose latents z are used as scale z, the mean 0 and the std 1 / scale. Raises ValueError if
    there are no latents, and OSError if the file cannot be written, in which case an older file is
    kept."""
    path = pathlib.Path(folder) / "latents_stats.pt"
    paths = sorted(path.parent.glob("*.safetensors"))
    shards = [map_shard(shard, flipped=False) for shard in paths]
    if not sum(len(shard["labels"]) for shard in shards):
        raise ValueError(f"{folder} contains no latents")
    if scale == 1:
        mean, std = latent_stats(shards)
    else:
        shape = (1, shards[0]["latents"].shape[1], 1, 1)
        mean, std = torch.zeros(shape), torch.full(shape, 1 / scale)
    content = io.BytesIO()
    torch.save(dict(mean=mean, std=std), content)
    part = path.with_suffix(".pt.part")
    part.write_bytes(content.getvalue())
    os.replace(part, path)


# --------------------------------------------------------------------------------------------------
# Arrays of images.

def read_npz(path):
    """images uint8 [N, H, W, 3 or 1] and labels int64 [N] or None of an .npz. ADM's files call them
    arr_0 and arr_1.

    Raises ValueError with the name of the file for other content. Pickled objects are not read.
    """
    held = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            for name in ("images", "arr_0", "labels", "arr_1"):
                if name in names:
                    held[name] = np.ascontiguousarray(file[name])
    except Exception as e:                 # NumPy raises ValueError, zlib.error, ...
        raise ValueError(f"{path} is not a readable npz of plain arrays of one size ({e})"
                         ) from None
    images = held.get("images", held.get("arr_0"))
    labels = held.get("labels", held.get("arr_1"))
    if images is None:
        raise ValueError(f"{path} has neither images nor arr_0; it has {', '.join(names)}")
    n, found = images.shape[:1], f"{images.dtype} {list(images.shape)}"
    images = with_channels(images)
    is_images = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
    if not is_images or images.size == 0:
        raise ValueError(f"{path}: images are {found}; they need to be uint8 [N, H, W, 3], or "
                         "[N, H, W] if they are grey")
    if labels is None:
        return images, None
    if labels.shape != n or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; they need to be "
                         f"whole numbers {list(n)}")
    return images, labels.astype(np.int64)


IDX = ("the four files train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
       "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz")
# Name: class of torchvision, files to put in place without internet access, and their folder
TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/"
                "cifar.html", ""),
    "mnist": ("MNIST", f"{IDX} from https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST/raw"),
    "fashion": ("FashionMNIST", f"{IDX} from http://fashion-mnist.s3-website.eu-central-1."
                "amazonaws.com/", "FashionMNIST/raw"),
}


def read_torchvision(name, folder, train=True):
    """The training or test images uint8 [N, H, W, C] and labels int64 [N]. name: a key of
    TORCHVISION. IDX files that were put into the folder by hand are read directly; missing files
    are downloaded. Raises ValueError if that fails."""
    kind, files, place = TORCHVISION[name]
    place = os.path.join(folder, place)
    if name != "cifar10":
        part = "train" if train else "t10k"
        images = find_idx(place, f"{part}-images-idx3-ubyte")
        labels = find_idx(place, f"{part}-labels-idx1-ubyte")
        if images and labels:
            return read_idx_pair(images, labels)
    try:
        import torchvision  # here, because it takes a second
        with processes.one_process_first():
            held = getattr(torchvision.datasets, kind)(folder, train=train, download=True)
    except Exception as e:
        raise ValueError(
            f"{name} could not be downloaded to {folder} ({type(e).__name__}); put {files} into "
            f"{place}, or give an npz by --data FILE.npz --preset {name}") from None
    return with_channels(np.asarray(held.data)), np.asarray(held.targets)


def find_idx(folder, name):
    """The path of an IDX file, unpacked or as .gz; None if it does not exist."""
    for path in (pathlib.Path(folder, name), pathlib.Path(folder, name + ".gz")):
        if path.is_file():
            return path
    return None


def read_idx_pair(images, labels):
    """The uint8 images [N, H, W, 1] and the int64 labels [N] of two IDX files."""
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or numbers.shape != pixels.shape[:1]:
        raise ValueError(f"{images} has the shape {list(pixels.shape)} and {labels.name} "
                         f"{list(numbers.shape)}; download both again")
    return with_channels(pixels), numbers.astype(np.int64)


def read_idx(path):
    """The uint8 array in an IDX file, which may be packed by gzip. The file has two bytes 0, a byte
    8 for uint8, a byte with the number of dimensions, each size in four bytes, and the data. Raises
    ValueError if it is damaged."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):                # the first bytes of gzip
            content = gzip.decompress(content)
        if not content.startswith(b"\0\0\x08"):
            raise ValueError("its first bytes are wrong")
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        return values.reshape(shape).copy()
    except Exception as e:                 # OSError, EOFError, zlib.error, ...
        raise ValueError(f"{path} is not a readable IDX file ({e}); download it again") from None


def with_channels(images):
    """Grey images [N, H, W] as [N, H, W, 1]; other images without a change."""
    return images[..., None] if images.ndim == 3 else images


def scale_arrays(images, resolution):
    """uint8 [N, H, W, C], C 1 or 3, cropped and scaled: uint8 [N, resolution, resolution, C]."""
    scaled = []
    for image in images:
        if image.shape[2] == 1:            # Pillow's grey images have no channels
            image = image[:, :, 0]
        scaled.append(imagefiles.center_crop(Image.fromarray(image), resolution))
    return with_channels(np.stack(scaled))


# --------------------------------------------------------------------------------------------------
# A data set by its name.

def kind_of(name):
    """The kind of a data set: "glyphs", "arrays", "files" or "latents". Raises ValueError if `name`
    is neither a data set nor the path of one."""
    path = pathlib.Path(name)
    if name == "glyphs":
        return "glyphs"
    if name in TORCHVISION:
        return "arrays"
    if name == "imagenet_latents":
        return "latents"
    if path.is_dir():
        return "latents" if any(path.glob("*.safetensors")) else "files"
    if path.is_file() and path.suffix.lower() == ".npz":
        return "arrays"
    if path.is_file() and path.suffix.lower() == ".zip":
        return "files"
    if path.exists():
        raise ValueError(f"{path} is neither a folder, nor an .npz or .zip file")
    raise ValueError(f"{name}: there is no such file or folder; the data sets are glyphs, "
                     f"{', '.join(TORCHVISION)}, imagenet_latents")


def latents_folder(name, data_dir=None):
    """The folder of latents with this name, which is imagenet_latents or a path."""
    if name == "imagenet_latents":
        return pathlib.Path(data_dir or "data/imagenet_latents")
    return pathlib.Path(name)


def refuse_idle_flags(name, resolution=None, data_dir=None, skip_broken=False):
    """Raises ValueError for a flag that has no effect on this data set."""
    kind = kind_of(name)
    if data_dir and name not in TORCHVISION and name != "imagenet_latents":
        raise ValueError(f"--data-dir {data_dir}: {name} is not read from there; leave it out, "
                         f"because it is for {', '.join(TORCHVISION)} and imagenet_latents")
    if skip_broken and kind != "files":
        raise ValueError(f"--skip-broken: {name} has no image files that could be broken; leave it "
                         "out")
    if resolution and kind == "latents":
        raise ValueError(f"--resolution {resolution}: latents cannot be scaled; leave it out, or "
                         "encode the images again with encode.py --resolution")


def open_data(name, resolution=None, data_dir=None, uncond=None, xflip=None, skip_broken=False,
              channels=None):
    """The data set `name`, with the flags of `load`, before its labels are checked."""
    if resolution is not None and resolution < 1:
        raise ValueError(f"--resolution {resolution} is too small; it needs to be 1 or more")
    refuse_idle_flags(name, resolution, data_dir, skip_broken)
    kind = kind_of(name)
    if kind == "glyphs":
        size = resolution or 16
        if size < 12:
            raise ValueError(f"glyphs of {size} pixels are not legible; use 12 or more")
        dataset = Glyphs(20_000, size, seed=0)
    elif kind == "latents":
        dataset = Latents(latents_folder(name, data_dir), xflip is not False)
    elif kind == "arrays":
        dataset = open_arrays(name, resolution, data_dir, xflip)
    else:
        dataset = Files(name, resolution, xflip, skip_broken, channels or 3, labelled=not uncond)
    if channels not in (None, dataset.shape[0]):
        raise ValueError(f"{name} has {dataset.shape[0]} channels; leave out --channels, which is "
                         "for image files")
    return dataset


def open_arrays(name, resolution=None, data_dir=None, xflip=None):
    """The images and labels of an npz or of torchvision's data set, as an Images."""
    if name in TORCHVISION:
        pixels, labels = read_torchvision(name, data_dir or "data")
    else:
        pixels, labels = read_npz(pathlib.Path(name))
    _, height, width, _ = pixels.shape
    say_if_scaled(name, width, height, resolution)
    num_classes = 0
    if labels is None:
        labels = np.zeros(len(pixels))
    else:
        num_classes = int(labels.max()) + 1
    return Images(pixels, labels, num_classes, xflip, resolution)


def load(name, resolution=None, data_dir=None, num_classes=None, uncond=None, xflip=None,
         skip_broken=False, channels=None):
    """The data set `name`: glyphs, mnist, fashion, cifar10, imagenet_latents, or the path of an
    npz, a zip archive, a folder of images or a folder of latents.

    resolution    images are cropped and scaled to it (None: they are not; glyphs: 16)
    data_dir      the folder of mnist, fashion, cifar10 or imagenet_latents
    num_classes   the number of classes, some of which may have no images
    uncond        True ignores the labels, and False requires that there are labels
    xflip         half of the images are mirrored (None: only latents are; glyphs never are)
    skip_broken   image files that cannot be decoded are left out
    channels      of image files: 3 (None) or 1

    Under torchrun all processes call it, and one process of each machine downloads.

    Raises ValueError with the name of a file that cannot be read, and for a flag without effect.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"--num-classes {num_classes} is too small; it needs to be 1 or more")
    dataset = open_data(name, resolution, data_dir, uncond, xflip, skip_broken, channels)
    if uncond:
        dataset.num_classes = 0
    else:
        check_labels(dataset, data_dir or name, num_classes, uncond)
        dataset.num_classes = num_classes or dataset.num_classes
    return dataset


def check_labels(dataset, name, num_classes=None, uncond=None):
    """Raises ValueError if the labels of a data set do not fit --num-classes or --no-uncond, or if
    some numbers below the highest one do not occur and nothing says that they are classes."""
    if num_classes and not dataset.num_classes:
        raise ValueError(f"{name} has no labels; use --uncond instead of --num-classes")
    if uncond is False and not dataset.num_classes:
        raise ValueError(f"{name} has no labels; leave out --no-uncond")
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    if low < 0:
        raise ValueError(f"{name}: labels from {low} to {high}; number them from 0 on")
    if num_classes:
        if high >= num_classes:
            raise ValueError(f"{name}: labels from {low} to {high}; --num-classes {num_classes} "
                             f"allows 0 to {num_classes - 1}")
        return
    used = len(dataset.labels.unique())
    if dataset.num_classes and not dataset.class_names and used <= high:
        raise ValueError(
            f"{name}: labels up to {high}, but only {used} classes have images; number "
            f"them from 0 on, or use --num-classes {high + 1} if the other classes are empty")


def say_if_scaled(name, width, height, resolution):
    """Prints a line if images of this size are cropped and scaled to the resolution."""
    if resolution and (width, height) != (resolution, resolution):
        say_once(f"{name}: images of {width}x{height} are cropped and scaled to "
                 f"{resolution}x{resolution} (--resolution)")


# --------------------------------------------------------------------------------------------------
# What training scripts need.

def load_for(args):
    """The data set of a training script's flags. With --dry-run it has zeros instead of data.

    Adds to args what a checkpoint keeps: uncond, if there are no labels; class_names; samples, a
    fingerprint by which a resumed run recognises its data, even if they were moved; and
    latent_stats, the mean and the std of latents with a number for each channel, or None. Raises
    ValueError as `load` does.
    """
    if args.dry_run:
        return Zeros(args)
    if args.uncond and "num-classes" in args.given:
        raise ValueError(f"--num-classes {args.num_classes}: the labels are left out by --uncond, "
                         f"or by the preset {args.preset}; use --no-uncond to use them")
    if args.xflip and "xflip" in args.given and args.data == "glyphs":
        raise ValueError("--xflip: glyphs are never mirrored, as digits have no mirror images; "
                         "leave it out")
    resolution = args.resolution
    if "resolution" not in args.given and kind_of(args.data) == "latents":
        resolution = None                  # that of the preset is for images
    dataset = load(args.data, resolution, args.data_dir, args.num_classes, args.uncond,
                   args.xflip, args.skip_broken, args.channels)
    if not dataset.num_classes:            # also with a network that has classes
        args.uncond = True
    if isinstance(dataset, Files):
        say_what_is_there(args.data, dataset)
    args.class_names = list(dataset.class_names)
    args.samples = f"{len(dataset.labels)} (fingerprint {fingerprint(dataset)})"
    args.latent_stats = None
    if isinstance(dataset, Latents):
        args.latent_stats = dict(mean=dataset.mean.flatten().tolist(),
                                 std=dataset.std.flatten().tolist())
    return dataset


class Zeros:
    """Zeros in the shape of the preset's data, for --dry-run, which needs no data."""

    def __init__(self, args):
        grey = args.preset == "mnist"
        side = args.resolution or (28 if grey else 32)
        self.shape = (1 if grey else 3, side, side)
        if args.preset == "imagenet_latents":              # of the VA-VAE, or of the SD-VAE
            light = args.net["name"].startswith("LightningDiT")
            self.shape = (32, 16, 16) if light else (4, 32, 32)
        classes = 1000 if args.preset.startswith("imagenet") else 10
        self.num_classes = 0 if args.uncond else args.num_classes or classes

    def batch(self, seed, first, batch, rows=slice(None)):
        """Images float32 [b, C, H, W] and labels int64 [b] of a slice of a batch."""
        n = len(range(batch)[rows])
        return torch.zeros((n, *self.shape)), torch.zeros(n, dtype=torch.int64)


def say_what_is_there(name, dataset):
    """Prints the number of images, and the classes, of a data set of files."""
    classes = f"{dataset.num_classes} classes"
    if dataset.class_names:
        classes += f": {dataset.class_names[0]} ... {dataset.class_names[-1]}"
    say_once(f"{name}: {len(dataset.labels)} images, {classes}")


def fingerprint(dataset):
    """Twelve letters and digits that depend on the labels, the names and the content of a data set,
    and not on its path. Raises ValueError for a broken sample."""
    held = hashlib.sha256(dataset.labels.numpy().tobytes())
    held.update("\n".join(dataset.names).encode(errors="surrogatepass"))
    for part in dataset.content():
        held.update(hashlib.sha256(part).digest())
    return held.hexdigest()[:12]


def fit_network_to(dataset, options):
    """A network's options together with the size, channels and classes of a data set. Raises
    ValueError if they contradict each other. A network may have more classes, or none."""
    sizes = dict(input_size=dataset.shape[1], in_channels=dataset.shape[0],
                 num_classes=dataset.num_classes)
    for name, size in sizes.items():
        other = options.get(name, size)
        fits = other == size
        if name == "num_classes" and (other == 0 or other > size):
            fits = True
        if not fits:
            raise ValueError(f"the network has {name} {other}, and the data have {size}")
    return sizes | options


# --------------------------------------------------------------------------------------------------
# Writing images.

def to_uint8(x):
    """clip(round(127.5 x + 127.5)): float [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], CPU."""
    x = (x.float() * 127.5 + 127.5).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).cpu()


def save_grid(path, images, columns, scale=1, labels=()):
    """Writes the sheet of images as a PNG. Raises OSError if the file cannot be written."""
    grid(images, columns, scale, labels).save(path)


def grid(images, columns, scale=1, labels=()):
    """A sheet of uint8 images [N, H, W, C], C 1 or 3, with `columns` images in a row and each pixel
    enlarged `scale` times. labels: a text for the left of each row. Returns a Pillow image."""
    images = np.asarray(images)
    n, h, w, c = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * columns, h, w, c), 255, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    if c == 1:                             # Pillow's grey images have no channels
        sheet = sheet[:, :, 0]
    sheet = Image.fromarray(sheet)
    if labels:
        sheet = beside_labels(sheet, labels, h * scale)
    return sheet


def beside_labels(sheet, labels, height):
    """A sheet of images with a text to the left of each row. height: the height of a row."""
    lines = "\n".join(labels).split("\n")
    margin = int(max(_font(13).getlength(line) for line in lines)) + 12
    page = Image.new("RGB", (margin + sheet.width, sheet.height), "white")
    page.paste(sheet, (margin, 0))
    for row, text in enumerate(labels):
        at = (6, (row + 0.5) * height)
        ImageDraw.Draw(page).text(at, text, "black", _font(13), anchor="lm")
    return page


def preview_noise(seed, shape):
    """The noise of all previews of a run, [2, 20, *shape], for 20 samples in two steps."""
    return torch.randn((2, 20, *shape), generator=seeds.generator("cpu", seed, "preview"))


def preview_labels(net, noise, uncond):
    """The labels [B] of a preview of the noise [K, B, ...]: the classes in turn or, for a network
    that is trained without labels, the null label."""
    if uncond:
        return noise.new_full((noise.shape[1],), net.num_classes, dtype=torch.int64)
    return torch.arange(noise.shape[1], device=noise.device) % max(net.num_classes, 1)


def save_preview(path, images):
    """Writes images, float [N, C, H, W] in [-1, 1] with C 1 or 3, as a PNG with 10 in a row. Small
    images are enlarged 3 times. Does nothing if path is None. If the file cannot be written, this
    is printed once, and the run continues."""
    if path is None:
        return
    path = pathlib.Path(path)
    scale = 3 if images.shape[2] <= 64 else 1
    try:
        path.parent.mkdir(exist_ok=True)
        save_grid(path, to_uint8(images), columns=10, scale=scale)
    except OSError as e:
        say_once(f"\n{path.parent}: no previews ({e.strerror or e}); the run continues")


# --------------------------------------------------------------------------------------------------
# python data.py inspect

def inspect(args):
    """Prints counts, shapes, classes and statistics of a data set, and writes a grid of 100."""
    if args.grid.suffix != ".png":
        fail(f"--grid {args.grid} needs a name that ends in .png, such as NAME.png")
    folders.check_output(args.grid)
    try:
        refuse_idle_flags(args.data, args.resolution, args.data_dir, args.skip_broken)
        if args.save_stats:
            if kind_of(args.data) != "latents":
                raise ValueError(f"--save-stats: {args.data} has no latents; leave it out")
            save_stats(latents_folder(args.data, args.data_dir))
        dataset = open_data(args.data, args.resolution, args.data_dir, xflip=False,
                            skip_broken=args.skip_broken, channels=args.channels)
        index = torch.tensor(spread(len(dataset.labels), 100))
        x = dataset.items(index, torch.zeros(len(index), dtype=torch.bool))
    except (ValueError, OSError) as e:
        fail(e)
    print_labels(args.data, dataset)
    if isinstance(dataset, Latents):
        mean, std = latent_stats(dataset.shards)
        print(f"{len(dataset.shards)} shards; latents' mean", *mean.flatten().numpy().round(4))
        print("std", *std.flatten().numpy().round(4))
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    print(f"{len(x)} samples as a network sees them: mean", *mean.numpy().round(4), "std",
          *std.numpy().round(4))
    if isinstance(dataset, Latents):       # the first channels are colours; 3 std become white
        shown = 3 if x.shape[1] >= 3 else 1
        x = x[:, :shown] / 3
    try:
        save_grid(args.grid, to_uint8(x), columns=10, scale=max(1, 64 // x.shape[2]))
    except OSError as e:
        fail(f"{args.grid}: {e}")
    print(f"{args.grid}: a grid of {len(x)} samples")


def print_labels(name, dataset):
    """Prints the number of samples, their shape, and how many of them each class has."""
    labels, counts = dataset.labels.unique(return_counts=True)
    text = f"{name}: {len(dataset.labels)} samples of shape {list(dataset.shape)}, "
    if not dataset.num_classes:
        print(text + "no classes")
        return
    count = dict(zip(labels.tolist(), counts.tolist()))
    low = min(count.values()) if len(count) >= dataset.num_classes else 0
    print(text + f"{dataset.num_classes} classes with {low} to {max(count.values())} samples each")
    for label, class_name in enumerate(dataset.class_names):
        print(f"{label:5}  {class_name}: {count.get(label, 0)}")
    if dataset.num_classes <= 20 and not dataset.class_names:
        each = [count.get(label, 0) for label in range(dataset.num_classes)]
        print("samples of each class:", *each)
    if labels[0] < 0:
        print(f"labels begin at {labels[0]}; training needs labels from 0 on")


@processes.program("use fewer images")
def main():
    parser = flags.Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND",
                                     parser_class=flags.Parser)
    a = commands.add_parser("inspect", help="prints counts, shapes, classes and statistics, and "
                            "writes a grid (see data.py inspect --help)")
    a.add_argument("data", help="data set or path, as for --data of the scripts")
    a.add_argument("--data-dir", help="folder of mnist, fashion, cifar10 or imagenet_latents")
    a.add_argument("--resolution", type=flags.number(int, 1), help="images are cropped and scaled "
                   "to it")
    a.add_argument("--channels", type=int, choices=[1, 3], help="channels of image files: 3 (RGB, "
                   "the default) or 1 (grey)")
    a.add_argument("--grid", type=pathlib.Path, default="inspect.png", help="PNG with the grid")
    a.add_argument("--save-stats", action="store_true", help="also write latents_stats.pt")
    a.add_argument("--skip-broken", action="store_true", help="list and leave out images that "
                   "cannot be decoded")
    args = parser.parse_args()
    escape_names()
    inspect(args)


def escape_names():
    """Lets print escape letters that the console does not have, as on stderr."""
    with contextlib.suppress(AttributeError):              # stdout may be no text file
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
