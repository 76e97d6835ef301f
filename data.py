"""Data sets in, pictures out.

    load(name, ...)        a Dataset; its `batch` is addressed by (seed, images before it)
    glyphs(n, size, seed)  class-conditional coloured digits, drawn here; nothing is downloaded
    to_uint8, save_grid    pixels are floats in [-1, 1] inside the methods and uint8 on disk

    python data.py inspect DATA                                     # what is in a data set?
"""

import hashlib
import json
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import flags, folders, imagefiles, processes, seeds
from common.messages import fail, say_once

# --------------------------------------------------------------------------------------------------
# Glyphs: a distribution that ships as code.

SUPERSAMPLING = 4          # a glyph is drawn this many times larger, then averaged down


@cache
def _font(points):
    return ImageFont.load_default(points)


def _glyph(index, size, seed):
    """One digit, uint8 [size, size, 3]: random paper and ink, size, rotation and shift."""
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

    Deterministic by (seed, i), so any amount of the true distribution can be had; i runs from
    `first` on. Returns images uint8 [n, size, size, 3] and labels int64 [n]. About 0.3 ms an image.
    """
    images = np.stack([_glyph(i, size, seed) for i in range(first, first + n)])
    return images, np.arange(first, first + n, dtype=np.int64) % 10


# --------------------------------------------------------------------------------------------------
# Data sets. One address for every sample: the number of images before the batch, and its rows.

class Dataset:
    """labels: int64 [N], below num_classes. A subclass's `items` gives samples of shape (C, H, W).

    num_classes 0: the labels mean nothing. xflip: half of the samples are mirrored. class_names:
    the class folders, in the order of the labels. Raises ValueError for oblong samples.
    """

    ahead = False                          # True: items take a while, so the next come in a thread
    class_names = names = ()

    def __init__(self, labels, shape, num_classes, xflip=False):
        if shape[1] != shape[2]:
            raise ValueError(f"samples of {shape[2]}x{shape[1]}; want square ones: --resolution "
                             "crops and scales images")
        self.labels, self.shape = torch.as_tensor(labels, dtype=torch.int64), tuple(shape)
        self.num_classes, self.xflip = num_classes, xflip
        self.thread, self.next = ThreadPoolExecutor(1), {}

    def index(self, seed, first, batch, rows=slice(None)):
        """Which samples are the `rows` of the batch that comes after `first` images: int64 [b].

        Consecutive entries of a fresh permutation each epoch, so that each sample is seen once an
        epoch; a function of (seed, first) alone, whatever the processes and resumes.
        """
        n = len(self.labels)
        place = torch.arange(first, first + batch)[rows]
        index = torch.empty_like(place)
        for epoch in (place // n).unique().tolist():
            here = place // n == epoch
            index[here] = _permutation(n, seed, epoch)[place[here] % n]
        return index

    def batch(self, seed, first, batch, rows=slice(None)):
        """x1 float [b, C, H, W] and y int64 [b]: the `rows` of the batch after `first` images."""
        def gather(first):
            index, flip = self.index(seed, first, batch, rows), torch.zeros(batch, dtype=torch.bool)
            if self.xflip:
                flip = torch.rand(batch, generator=seeds.generator("cpu", seed, "flip", first)) < 0.5
            return self.items(index, flip[rows]), self.labels[index]

        if not self.ahead:
            return gather(first)
        key = (seed, first, batch, str(rows))
        ready = self.next.pop(key, None)
        self.next[seed, first + batch, batch, str(rows)] = self.thread.submit(gather, first + batch)
        return ready.result() if ready else gather(first)


class Images(Dataset):
    """uint8 images [N, H, W, C] in memory; items are floats in [-1, 1]."""

    def __init__(self, images, labels, num_classes, xflip=False):
        self.images = torch.from_numpy(images)
        _, h, w, c = images.shape
        super().__init__(labels, (c, h, w), num_classes, xflip)

    def items(self, index, flip):
        x = self.images[index].permute(0, 3, 1, 2).contiguous()
        if flip.any():
            x[flip] = x[flip].flip(3)
        return x.float().div_(127.5).sub_(1)


class Glyphs(Images):
    """n glyphs, each drawn when it is first asked for and then kept."""

    def __init__(self, n, size, seed):
        self.size, self.seed, self.drawn = size, seed, torch.zeros(n, dtype=torch.bool)
        super().__init__(np.zeros((n, size, size, 3), np.uint8), np.arange(n) % 10, num_classes=10)

    def items(self, index, flip):
        for i in index[~self.drawn[index]].tolist():
            glyph = torch.from_numpy(_glyph(i, self.size, self.seed))
            self.images[i], self.drawn[i] = glyph, True
        return super().items(index, flip)


class Files(Dataset):
    """Image files of a folder or a zip archive, decoded when asked for, in several threads.

    path: as imagefiles.Tree takes it. channels: 3 (RGB) or 1 (grey). resolution: images are cropped
    and scaled to it; None: all have the size of the first. skip_broken: images that do not decode
    are listed and left out, which takes one pass over all. Raises ValueError as imagefiles.Tree
    does, and naming the file: a broken image, one of another size.
    """

    ahead = True

    def __init__(self, path, resolution=None, xflip=False, skip_broken=False, channels=3):
        self.tree, self.resolution, self.channels = imagefiles.Tree(path), resolution, channels
        self.decoders = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self.names, labels = self.tree.names, self.tree.labels
        if skip_broken:
            broken = list(self.decoders.map(self.is_broken, self.names))
            say_once("\n  ".join([f"{path}: {sum(broken)} broken images left out", *(
                name for name, bad in zip(self.names, broken) if bad)]))
            self.names, labels = ([a for a, bad in zip(column, broken) if not bad]
                                  for column in (self.names, labels))
            if not self.names:
                raise ValueError(f"{path}: every image in it is broken")
        width, height = self.read(self.names[0]).size
        say_if_scaled(path, width, height, resolution)
        size = (resolution, resolution) if resolution else (height, width)
        super().__init__(labels, (channels, *size), self.tree.num_classes, xflip)
        self.class_names = self.tree.classes

    def read(self, name):
        """The image, of any size; ValueError if it does not decode."""
        try:
            return imagefiles.read_image(self.tree.open(name), self.channels)
        except Exception as e:
            raise ValueError(f"{self.tree.path / name}: no readable image ({e}); "
                             "--skip-broken leaves such files out") from None

    def is_broken(self, name):
        """Does this image not decode?"""
        try:
            self.read(name)
        except ValueError:
            return True
        return False

    def decode(self, name):
        """uint8 [H, W, C] at the resolution; ValueError if that is not to be had."""
        image = self.read(name)
        if self.resolution:
            pixels = imagefiles.center_crop(image, self.resolution)
            return pixels.reshape(*self.shape[1:], self.channels)
        if (image.height, image.width) != self.shape[1:]:
            raise ValueError(f"{self.tree.path / name} has {image.width}x{image.height} pixels; "
                             "images of several sizes, or not square, need --resolution")
        return np.asarray(image).reshape(*self.shape[1:], self.channels)

    def items(self, index, flip):
        x = np.stack(list(self.decoders.map(self.decode, [self.names[i] for i in index])))
        x[flip.numpy()] = x[flip.numpy(), :, ::-1]
        return torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class Latents(Dataset):
    """Shards of latents in LightningDiT's layout, mapped into memory and never read as a whole.

    folder: *.safetensors, each with latents and latents_flip [n, C, H, W] and labels [n], and
    latents_stats.pt with mean and std [1, C, 1, 1]: items are (z - mean) / std, as the published
    README says. Without that file 4 channels are the SD-VAE's: items are 0.18215 z. With xflip half
    of the items come from latents_flip. Raises ValueError naming the shard for missing or unequal
    tensors.
    """

    ahead = True

    def __init__(self, folder, xflip=True):
        paths = sorted(pathlib.Path(folder).glob("*.safetensors"))
        if not paths:
            raise ValueError(
                f"{folder}: no *.safetensors in it; want latents in LightningDiT's shards: put the "
                f"published ones there, or run python encode.py --out {folder}")
        self.paths, self.shards = paths, [map_shard(path, xflip) for path in paths]
        shapes = {shard["latents"].shape[1:] for shard in self.shards}
        if len(shapes) > 1:
            raise ValueError(f"{folder}: shards with latents of several shapes, {sorted(shapes)}")
        sizes = [len(shard["labels"]) for shard in self.shards]
        self.start = torch.tensor([0, *sizes]).cumsum(0)
        labels = np.concatenate([shard["labels"] for shard in self.shards])
        super().__init__(labels, shapes.pop(), int(labels.max()) + 1, xflip)
        self.mean, self.std = read_stats(pathlib.Path(folder), self.shape[0])

    def raw(self, index, flip):
        """Latents as they lie in the shards, float32 [b, C, H, W]."""
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


@lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


SHARD_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
               "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}


def map_shard(path, flipped=True):
    """{name: memory-mapped array} of a .safetensors file: length, a JSON header, data. bfloat16 is
    mapped as its bits (see as_float). flipped: latents_flip has to be there."""
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header does not end")
            header = {k: t for k, t in json.loads(f.read(length)).items() if k != "__metadata__"}
        types = {name: t["dtype"] for name, t in header.items()}
        arrays = {name: np.asarray(np.memmap(
            path, SHARD_TYPES[t["dtype"]], "r", 8 + length + t["data_offsets"][0],
            tuple(t["shape"]))) for name, t in header.items() if t["dtype"] in SHARD_TYPES}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no readable shard, truncated or foreign ({e})") from None
    names = ("latents", "latents_flip", "labels") if flipped else ("latents", "labels")
    for name in names:
        if name not in types:
            raise ValueError(f"{path} has no {name}; it has {', '.join(types) or 'nothing'}"
                             + (name == "latents_flip") * "; --no-xflip does without")
        if name not in arrays or ("F" in types[name]) != name.startswith("latents"):
            raise ValueError(f"{path}: {name} are {types[name]}; want "
                             + ("whole numbers" if name == "labels" else "F32, F16 or BF16"))
    if (arrays["latents"].shape[:1] != arrays["labels"].shape or arrays["latents"].ndim != 4
            or flipped and arrays["latents"].shape != arrays["latents_flip"].shape):
        raise ValueError(f"{path}: {', '.join(names)} of unequal lengths, "
                         f"{[arrays[n].shape for n in names]}")
    return arrays


def as_float(latents):
    """float32 of a mapped shard's latents; bfloat16 are the upper 16 bits of float32."""
    if latents.dtype == np.uint16:
        return (latents.astype(np.uint32) << 16).view(np.float32)
    return latents.astype(np.float32)


def read_stats(path, channels):
    """mean and std [1, C, 1, 1] with which latents z are normalised, (z - mean) / std: those of a
    latents_stats.pt, or of a folder; without one 4 channels are the SD-VAE's and become 0.18215 z.
    """
    ones, path = torch.ones(1, channels, 1, 1), path / "latents_stats.pt" if path.is_dir() else path
    if path.exists():
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
            return tuple(held[name].float().reshape(ones.shape) for name in ("mean", "std"))
        except Exception as e:
            raise ValueError(
                f"{path}: no statistics of these latents ({type(e).__name__})") from None
    if channels != 4:
        raise ValueError(f"{path} is missing; `python data.py inspect {path.parent} --save-stats` "
                         "writes it")
    return 0 * ones, ones / 0.18215


def read_npz(path):
    """images uint8 [N, H, W, 3 or 1] and labels int64 [N] or None; in ADM's files arr_0 and arr_1.

    Raises ValueError naming the file for other content; pickled objects in it are not read.
    """
    try:
        with np.load(path, allow_pickle=False) as f:
            names = f.files
            held = {name: np.ascontiguousarray(f[name]) for name in (
                "images", "arr_0", "labels", "arr_1") if name in names}
    except Exception as e:                 # ValueError, zlib.error, ...: what numpy raises on it
        raise ValueError(f"{path}: no readable npz of plain arrays of one size ({e})") from None
    images, labels = held.get("images", held.get("arr_0")), held.get("labels", held.get("arr_1"))
    if images is None:
        raise ValueError(f"{path} has neither images nor arr_0; it has {', '.join(names)}")
    images = with_channels(images)
    if (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3)
            or not len(images)):
        raise ValueError(f"{path}: want images uint8 [N, H, W, 3], or [N, H, W] of grey ones, not "
                         f"{images.dtype} {list(images.shape)}")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: want labels int [{len(images)}], not {labels.dtype} "
                         f"{list(labels.shape)}")
    return images, labels if labels is None else labels.astype(np.int64)


IDX = "train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz, unpacked,"
TORCHVISION = {                            # name: class there, what to put where without a network
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/"
                "cifar.html", ""),
    "mnist": ("MNIST", f"{IDX} from https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST/raw"),
    "fashion": ("FashionMNIST", f"{IDX} from http://fashion-mnist.s3-website.eu-central-1."
                "amazonaws.com/", "FashionMNIST/raw"),
}


def read_torchvision(name, folder, train=True):
    """The training or test images uint8 [N, H, W, C] and labels int64 [N]. name: a key of
    TORCHVISION. What the folder lacks is downloaded; ValueError if that fails."""
    kind, files, place = TORCHVISION[name]
    try:
        import torchvision  # here, because it takes a second
        with processes.one_process_first():
            held = getattr(torchvision.datasets, kind)(folder, train=train, download=True)
    except Exception as e:
        raise ValueError(
            f"{name} could not be downloaded to {folder} ({type(e).__name__}); put {files} into "
            f"{os.path.join(folder, place)}, or give an npz by --data FILE.npz --preset {name}"
        ) from None
    return with_channels(np.asarray(held.data)), np.asarray(held.targets)


def with_channels(images):
    """[N, H, W] of grey images -> [N, H, W, 1]; others as they are."""
    return images[..., None] if images.ndim == 3 else images


def load(name, resolution=None, data_dir=None, num_classes=None, uncond=False, xflip=None,
         skip_broken=False, channels=None):
    """The data set `name`: glyphs, mnist, fashion, cifar10, imagenet_latents, or the path of an
    npz, a zip archive, a folder of images or a folder of latents.

    resolution: images are cropped and scaled to it (None: as they are; glyphs: 16); data_dir: where
    all but glyphs lie; num_classes: as many are meant, though not all need to occur;
    uncond: labels are left out; xflip: half of the images come mirrored (None: of latents alone;
    glyphs never do); channels: of image files, 3 (None) or 1. Under torchrun all processes call
    it: one of each machine downloads. Raises ValueError, naming the file, for what cannot be had.
    """
    path = pathlib.Path(name)
    if min(a for a in (resolution, num_classes, 1) if a is not None) < 1:
        raise ValueError("--resolution, --num-classes: want 1 or more")
    if name == "glyphs":
        resolution = 16 if resolution is None else resolution
        if resolution < 12:
            raise ValueError(f"glyphs of {resolution} pixels are not legible; take 12 or more")
        dataset = Glyphs(20_000, resolution, seed=0)
    elif name == "imagenet_latents" or path.is_dir() and any(path.glob("*.safetensors")):
        folder = data_dir or "data/imagenet_latents" if name == "imagenet_latents" else path
        dataset = Latents(folder, xflip is not False)
    elif name in TORCHVISION or path.suffix == ".npz" and path.is_file():
        pixels, labels = (read_torchvision(name, data_dir or "data") if name in TORCHVISION
                          else read_npz(path))
        if say_if_scaled(name, *pixels.shape[2:0:-1], resolution):
            pixels = with_channels(np.stack([
                imagefiles.center_crop(Image.fromarray(image.squeeze()), resolution)
                for image in pixels]))
        classes = 0 if labels is None else int(labels.max()) + 1
        labels = np.zeros(len(pixels)) if labels is None else labels
        dataset = Images(pixels, labels, classes, xflip)
    elif path.is_dir() or path.suffix == ".zip" and path.is_file():
        dataset = Files(path, resolution, xflip, skip_broken, channels or 3)
    elif path.exists():
        raise ValueError(f"{path}: want a folder, an .npz or a .zip")
    else:
        raise ValueError(f"{name}: no such file or folder; data sets are glyphs, "
                         f"{', '.join(TORCHVISION)}, imagenet_latents")
    if channels not in (None, dataset.shape[0]):
        raise ValueError(f"{name} has {dataset.shape[0]} channels, whatever --channels says: that "
                         "is for image files")
    if num_classes and not dataset.num_classes and not uncond:
        raise ValueError(f"{name} has no labels: take --uncond in place of --num-classes")
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    used = len(dataset.labels.unique())
    known = dataset.class_names or uncond or num_classes               # which classes there are
    if dataset.num_classes and not known and low >= 0 and used <= high:
        raise ValueError(
            f"{data_dir or name}: labels up to {high}, but only {used} classes have images; number "
            f"them from 0 on, or say --num-classes {high + 1} if the others are meant")
    if not uncond and low < 0:
        raise ValueError(f"{data_dir or name}: labels from {low}; want them from 0 on")
    if not uncond and num_classes and high >= num_classes:
        raise ValueError(f"{data_dir or name}: labels from {low} to {high}; --num-classes "
                         f"{num_classes} allows 0 to {num_classes - 1}")
    dataset.num_classes = 0 if uncond else num_classes or dataset.num_classes
    return dataset


def say_if_scaled(name, width, height, resolution):
    """Whether images of this size are cropped and scaled to the resolution; says so in a line."""
    scaled = resolution and (width, height) != (resolution, resolution)
    if scaled:
        say_once(f"{name}: images of {width}x{height} are cropped and scaled to "
                            f"{resolution}x{resolution} (--resolution)")
    return scaled


def load_for(args):
    """The data set that a training script's flags ask for; ValueError as from load. What a
    checkpoint keeps of it goes into args: class_names, and samples, a fingerprint by which a
    resumed run recognises its data, even if they have moved."""
    if args.dry_run:
        from common.dryrun import NoData
        return NoData(args)
    dataset = load(args.data, args.resolution, args.data_dir, args.num_classes, args.uncond,
                   args.xflip, args.skip_broken, args.channels)
    n, classes = len(dataset.labels), dataset.class_names
    if isinstance(dataset, Files):
        say_once(f"{args.data}: {n} images, " + (
            f"{len(classes)} classes: {classes[0]} ... {classes[-1]}" if classes
            else f"{dataset.num_classes} classes"))
    held = hashlib.sha256(dataset.labels.numpy().tobytes())
    held.update("\n".join(dataset.names).encode(errors="surrogateescape"))
    args.class_names, args.samples = list(classes), f"{n} (fingerprint {held.hexdigest()[:12]})"
    return dataset


def fit_network_to(dataset, options):
    """A network's options, with a data set's size, channels and classes. Raises ValueError if they
    contradict it; more classes, or none, are allowed."""
    sizes = dict(input_size=dataset.shape[1], in_channels=dataset.shape[0],
                 num_classes=dataset.num_classes)
    for name, size in sizes.items():
        other = options.get(name, size)
        if other != size and (name != "num_classes" or 0 < other < size):
            raise ValueError(f"the network has {name} {other}, the data {size}")
    return sizes | options


# --------------------------------------------------------------------------------------------------
# Images out.

def to_uint8(x):
    """clip(round(127.5 x + 127.5)): float [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], CPU."""
    x = (x.float() * 127.5 + 127.5).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).cpu()


def save_grid(path, images, columns, scale=1, labels=()):
    """A PNG of uint8 images [N, H, W, C], `columns` in a row, each pixel enlarged `scale` times;
    labels: a text for the left of each row."""
    images = np.asarray(images)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, c), 255, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    sheet = Image.fromarray(sheet[..., 0] if c == 1 else sheet)
    if labels:
        margin = int(max(_font(13).getlength(line) for t in labels for line in t.split("\n"))) + 12
        grid, sheet = sheet, Image.new("RGB", (margin + sheet.width, sheet.height), "white")
        sheet.paste(grid, (margin, 0))
        for row, text in enumerate(labels):
            at = (6, (row + 0.5) * h * scale)
            ImageDraw.Draw(sheet).text(at, text, "black", _font(13), anchor="lm")
    sheet.save(path)


def preview_noise(seed, shape):
    """The noise of all previews of a run, [2, 20, *shape]: for two steps of 20 samples."""
    return torch.randn((2, 20, *shape), generator=seeds.generator("cpu", seed, "preview"))


def save_preview(path, preview, net, stage, noise, args):
    """Writes the images that preview(net, stage, noise, args) draws, 10 in a row; those of latents
    are left to sample.py. All processes of --fsdp draw them; path None: this one writes nothing."""
    if noise.shape[2] not in (1, 3):
        return
    images = preview(net, stage, noise, args)
    if path:
        try:
            path.parent.mkdir(exist_ok=True)
            save_grid(path, to_uint8(images), columns=10, scale=3)
        except OSError as e:
            say_once(f"\n{path.parent}: no previews ({e.strerror}); the run goes on")


# --------------------------------------------------------------------------------------------------
# python data.py inspect

def latent_stats(shards):
    """mean and std [1, C, 1, 1] of the latents, not mirrored, of map_shard's shards."""
    n, total, squares = 0, 0.0, 0.0
    for shard in shards:
        for i in range(0, len(shard["labels"]), 500):
            z = torch.from_numpy(as_float(shard["latents"][i:i + 500]).astype(np.float64))
            n += z[:, 0].numel()
            total, squares = total + z.sum((0, 2, 3)), squares + z.square().sum((0, 2, 3))
    mean = total / n
    std = ((squares - n * mean ** 2) / (n - 1)).sqrt()
    return mean.float()[None, :, None, None], std.float()[None, :, None, None]


def save_stats(folder):
    """Writes latents_stats.pt (mean, std) of the shards in a folder."""
    paths = sorted(pathlib.Path(folder).glob("*.safetensors"))
    shards = [map_shard(path, flipped=False) for path in paths]
    if not sum(len(shard["labels"]) for shard in shards):
        raise ValueError(f"{folder}: no latents in it")
    mean, std = latent_stats(shards)
    torch.save(dict(mean=mean, std=std), pathlib.Path(folder) / "latents_stats.pt")


def inspect(args):
    """Prints counts, shapes, classes and statistics of a data set, and writes a grid of 100."""
    if args.grid.suffix != ".png":
        fail(f"--grid {args.grid}: want NAME.png")
    folders.check_output(args.grid)
    try:
        if args.save_stats:
            save_stats(args.data_dir if args.data == "imagenet_latents" else args.data)
        dataset = load(args.data, args.resolution, args.data_dir, skip_broken=args.skip_broken,
                       channels=args.channels)
        index = torch.linspace(0, len(dataset.labels) - 1, 100).long().unique()
        x = dataset.items(index, torch.zeros(len(index), dtype=torch.bool))
    except ValueError as e:
        fail(e)
    counts = torch.bincount(dataset.labels, minlength=dataset.num_classes)
    print(f"{args.data}: {len(dataset.labels)} samples of shape {list(dataset.shape)}, "
          f"{dataset.num_classes} classes with {counts.min()} to {counts.max()} samples each")
    for label, name in enumerate(dataset.class_names):
        print(f"{label:5}  {name}: {counts[label]}")
    if len(counts) <= 20 and not dataset.class_names:
        print("samples of each class:", *counts.tolist())
    if isinstance(dataset, Latents):
        mean, std = latent_stats(dataset.shards)
        print(f"{len(dataset.shards)} shards; latents' mean", *mean.flatten().numpy().round(4))
        print("std", *std.flatten().numpy().round(4))
        x = x[:, :3] / 3                   # no colours: the first three channels, 3 std being white
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    print(f"of {len(x)} samples as a network sees them: mean", *mean.numpy().round(4), "std",
          *std.numpy().round(4))
    try:
        save_grid(args.grid, to_uint8(x), columns=10, scale=max(1, 64 // x.shape[2]))
    except OSError as e:
        fail(f"{args.grid}: {e}")
    print(f"{args.grid}: {len(x)} of them")


@processes.program("take fewer images")
def main():
    parser = flags.Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="inspect", parser_class=flags.Parser)
    a = commands.add_parser("inspect", help="counts, shapes, classes, statistics, a grid")
    a.add_argument("data", help="data set or path, as --data of the scripts")
    a.add_argument("--data-dir", help="where it lies")
    a.add_argument("--resolution", type=int, help="images are cropped and scaled to it")
    a.add_argument("--channels", type=int, choices=[1, 3], help="of image files: 3 (RGB, the "
                   "default) or 1 (grey)")
    a.add_argument("--grid", type=pathlib.Path, default="inspect.png", help="PNG to write")
    a.add_argument("--save-stats", action="store_true", help="write latents_stats.pt, too")
    a.add_argument("--skip-broken", action="store_true", help="list and leave out broken images")
    inspect(parser.parse_args())


if __name__ == "__main__":
    main()
