"""FID, sFID, Inception Score, precision and recall, and KID, from one pass over the images.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz --is --sfid --pr
    python fid.py folder --ref cifar10-32x32.npz --json fid.json
    python fid.py samples.npz --ref glyphs:2 --features net.pt     # a Frechet distance, but no FID
    python fid.py images.zip --save-stats statistics.npz
    torchrun --nproc_per_node=8 fid.py samples.npz --ref statistics.npz

SAMPLES and REF are each a folder (with its subfolders) or a zip of images, an npz of images
(arr_0 or images, uint8 [N, H, W, 3], or [N, H, W] or [N, H, W, 1] if grey), glyphs, glyphs:SEED,
the training images of cifar10, mnist or fashion, or a file of statistics: an npz with mu and sigma
(ours, pytorch-fid's, EDM's, or ADM's, which has mu_s and sigma_s for sFID, and images for --pr and
--kid), torch-fidelity's .pt, or EDM2's .pkl. Grey images are evaluated as RGB images with three
equal channels. Up to the rounding of float32 features, all figures are the same for any --batch and
number of processes. Sums are float64, and covariances are divided by N - 1.

The features are those of the Inception network of 2015-12-05. With torchvision's own weights, the
FID is a different number. Images are resized to 299 as in TensorFlow 1 (source = i * size / 299,
without half pixels) and scaled by (x - 128) / 128, as in the original graph, ADM's evaluator and
torch-fidelity. pytorch-fid resizes with half pixels and scales by x / 127.5 - 1, so its figures
differ a little. --features uses the network of a TorchScript file instead. Such a file is a program
that is executed: use one only if you trust its author. All other files are read as data only.
"""

import hashlib
import json
import math
import os
import pathlib
import pickle
import shlex
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data
from common import flags, folders, imagefiles, processes
from common.messages import fail

INCEPTION = "inception-2015-12-05"
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"              # its beginning; torch-fidelity's is the same file
FEATURES = 2048                            # Inception's
FEW = 2048                                 # with fewer images an FID says little
KEPT_REFERENCE = 10_000                    # ADM: precision and recall against 10,000 images
SCORE_PART = 5000                          # ADM: the Inception Score is a mean over parts of 5,000
NEIGHBOURS = 3                             # of precision and recall
SIGMA = {"mu": "sigma", "mu_s": "sigma_s"}
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "n", "features")
ROUNDING = 1e-3                            # what float32 sums may spoil of the largest variance
LARGE = 1e15                               # more images than there are
DAMAGE = (OSError, EOFError, ValueError, KeyError, AttributeError, RuntimeError,     # on reading
          zipfile.BadZipFile, zlib.error)


def parse_args():
    p = flags.Parser(description="Computes the FID and related measures in one pass over "
                     "the images.")
    a = p.add_argument
    a("samples", help="folder, zip, npz, statistics (.npz, .pt, .pkl), glyphs, glyphs:SEED, "
      "cifar10, mnist or fashion")
    a("--ref", help="the reference, of the same kinds; --is and --save-stats do not need it")
    a("--is", action="store_true", dest="score", help="Inception Score, in parts of 5,000 images")
    a("--sfid", action="store_true", help="FID of the 7 x 17 x 17 spatial features; --save-stats "
      "also saves their statistics")
    a("--pr", "--precision-recall", action="store_true", help="precision and recall with "
      "k = 3 neighbours, of all samples against 10,000 images (or all) spread evenly over REF; "
      "under torchrun use the long name")
    a("--kid", action="store_true", help="kernel distance, over 100 pairs of subsets of 1,000 "
      "images")
    a("--features", type=pathlib.Path, help="TorchScript file, uint8 [N,3,H,W] -> [N,D], instead "
      "of Inception; the file is executed")
    a("--inception", type=pathlib.Path, help="pt_inception-2015-12-05-6726825d.pth, or "
      "torch-fidelity's copy (default: torch.hub's cache, or else a download)")
    a("--n", "--images", type=int, help="number of glyphs (default: 20000); under torchrun "
      "use the long name, because torchrun reads --n and --pr as the beginning of its own flags")
    a("--resolution", type=int, help="height and width of the glyphs (default: 16)")
    a("--data-dir", help="folder of cifar10, mnist or fashion, which are downloaded to it if "
      "they are missing (default: data)")
    a("--batch", type=int, help="images at once in each process (default: 64)")
    a("--save-stats", type=pathlib.Path, help="save the statistics of SAMPLES as NAME.npz")
    a("--json", type=pathlib.Path, help="also write the figures to this file")
    a("--device", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    return p.parse_args()


# --------------------------------------------------------------------------------------------------
# Reading images and statistics.

class Source(NamedTuple):
    """The contents of SAMPLES or REF: images, statistics, or both."""

    name: str
    count: int = 0                         # of images; 0 if there are statistics alone
    read: Callable = None                  # read(i, j): images i..j-1, uint8 [j-i, H, W, 1 or 3]
    statistics: dict = {}                  # mu, sigma, mu_s, sigma_s, n, features: what it has


def open_source(text, n=20_000, resolution=16, data_dir=None, part="fid"):
    """The Source that SAMPLES or REF names.

    n, resolution: of glyphs. data_dir: of cifar10, mnist and fashion. part: which statistics of an
    EDM2 .pkl are read, fid (Inception's) or fd_dinov2. Raises ValueError, in one line with the
    name, for anything that cannot be read.
    """
    path = pathlib.Path(text)
    if is_glyphs(text):
        return _open_glyphs(text, n, resolution)
    if text in data.TORCHVISION:
        images = data.load(text, data_dir=data_dir).images
        return Source(text, len(images), lambda i, j: images[i:j].numpy())
    if path.is_dir() or path.suffix == ".zip":
        return _open_images(text, imagefiles.Tree(path, labelled=False))
    if not path.exists():
        raise ValueError(f"{text}: there is no such file or folder; the data sets are glyphs, "
                         f"{', '.join(data.TORCHVISION)}")
    if path.suffix == ".npz":
        return _open_npz(text, imagefiles.open_zip(path))
    if path.suffix in (".pt", ".pth"):
        return Source(text, statistics=_check_statistics(text, _read_torch(path)))
    if path.suffix == ".pkl":
        return Source(text, statistics=_check_statistics(text, _read_pickle(path, part)))
    raise ValueError(f"{text}: expected a folder, a .npz, .zip, .pt or .pkl file, or a data set "
                     "such as cifar10")


def is_glyphs(text):
    """Whether SAMPLES or REF is glyphs or glyphs:SEED."""
    return text.split(":")[0] == "glyphs"


def _open_glyphs(text, n, resolution):
    seed = text.removeprefix("glyphs").removeprefix(":") or "0"
    if not seed.isdecimal() or n < 1 or resolution < 12:
        raise ValueError(f"{text}: expected glyphs or glyphs:SEED, where SEED is a whole number, "
                         "with --n of at least 1 and --resolution of at least 12")
    seed = int(seed)
    return Source(text, n, lambda i, j: data.glyphs(j - i, resolution, seed, first=i)[0])


def _open_images(name, tree):
    """Image files, decoded in threads. All must have the size of the first."""
    files = tree.names

    def decode(file):
        try:
            return np.asarray(imagefiles.read_image(tree.open(file)))
        except Exception as e:             # decoders raise almost anything on a damaged file
            raise ValueError(f"{tree.path / file} is not a readable image ({e})") from None

    size = decode(files[0]).shape
    threads = ThreadPoolExecutor(min(8, os.cpu_count()))

    def read(i, j):
        images = list(threads.map(decode, files[i:j]))
        for file, image in zip(files[i:j], images):
            if image.shape != size:
                raise ValueError(f"{name}: all images need to have one size, but {file} has "
                                 f"{image.shape[1]}x{image.shape[0]} pixels and {files[0]} has "
                                 f"{size[1]}x{size[0]}")
        return np.stack(images)
    return Source(name, len(files), read)


def _open_npz(name, archive):
    """The images of an npz. They are read when they are needed; np.load would read all at once."""
    keys = [key.removesuffix(".npy") for key in archive.namelist()]
    images = next((key for key in ("arr_0", "images") if key in keys), None)
    statistics = {}
    if "mu" in keys and "sigma" in keys:
        statistics = _check_statistics(name, _read_statistics(name, keys))
    elif images is None:
        raise ValueError(f"{name} contains {', '.join(keys)}; expected arr_0 or images, or mu and "
                         "sigma")
    if images is None:
        return Source(name, statistics=statistics)
    try:
        member = archive.open(images + ".npy")
        version = np.lib.format.read_magic(member)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = read_header(member)
    except DAMAGE as e:
        raise ValueError(f"{name}: {images} cannot be read ({e})") from None
    if fortran:
        raise ValueError(f"{name}: {images} is stored in Fortran order; save "
                         "numpy.ascontiguousarray(images)")
    kind = f"{dtype} {list(shape)}"
    if len(shape) == 3:                    # grey
        shape = (*shape, 1)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise ValueError(f"{name}: {images} is {kind}; expected uint8 [N, H, W, 3], or [N, H, W] "
                         "of grey images")
    start = member.tell()
    size = int(np.prod(shape[1:]))         # bytes of an image

    def read(i, j):
        batch = np.empty((j - i, *shape[1:]), np.uint8)
        try:
            member.seek(start + i * size)
            complete = member.readinto(batch.reshape(-1)) == batch.size
        except DAMAGE:
            complete = False
        if not complete:
            raise ValueError(f"{name}: {images} is damaged at the images {i} to {j - 1}")
        return batch
    return Source(name, shape[0], read, statistics)


def _read_statistics(name, keys):
    """The statistics in an npz with these keys. Pickled objects in it are not read."""
    try:
        with np.load(name, allow_pickle=False) as file:
            return {key: file[key] for key in STATISTICS if key in keys}
    except DAMAGE as e:
        raise ValueError(f"{name}: its statistics cannot be read ({e})") from None


def _read_torch(path):
    """torch-fidelity's cache: a dict with mu and sigma, as tensors or as pickled NumPy arrays."""
    rebuild = np.empty(0).__reduce__()[0]
    arrays = [(rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype,
              (rebuild, "numpy._core.multiarray._reconstruct"),
              *(type(np.dtype(t)) for t in (np.float32, np.float64))]
    try:
        with torch.serialization.safe_globals(arrays):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path} contains no readable statistics ({type(e).__name__})") from None
    return content if isinstance(content, dict) else {}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays in plain containers. It refuses every other name, so that a file
    cannot execute anything."""

    ALLOWED = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for module in ("numpy.core", "numpy._core"):           # its name before and since NumPy 2
        ALLOWED[module + ".multiarray._reconstruct"] = np.empty(0).__reduce__()[0]
        ALLOWED[module + ".multiarray.scalar"] = np.float64(0).__reduce__()[0]
        ALLOWED[module + ".numeric._frombuffer"] = np.empty(0).__reduce_ex__(5)[0]

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a NumPy array")
        return self.ALLOWED[f"{module}.{name}"]


def _read_pickle(path, part):
    """EDM2's statistics: a pickled dict with num_images and the dicts fid and fd_dinov2, which have
    mu and sigma."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file).load()
    except Exception as e:                 # unpickling raises almost anything on a damaged file
        raise ValueError(f"{path} contains no readable statistics ({e}); save mu and sigma in an "
                         "npz with numpy.savez") from None
    if not isinstance(content, dict) or not isinstance(content.get(part), dict):
        raise ValueError(f"{path} contains no statistics {part}; Inception needs the entry fid of "
                         "EDM2's files, and --features the entry fd_dinov2")
    held = dict(content[part])
    if "num_images" in content:
        held["n"] = content["num_images"]
    return held


def _check_statistics(name, given):
    """The statistics: mu [D] and sigma [D, D] as float64 tensors, n as int, features as str.

    Raises ValueError, in one line with the name of the file, for values that no images can have.
    """
    if "mu" not in given or "sigma" not in given:
        raise ValueError(f"{name} contains no mu and sigma")
    found = {}
    for mu, sigma in SIGMA.items():
        if mu in given and sigma in given:
            found[mu] = _as_float64(name, mu, given[mu])
            found[sigma] = _as_float64(name, sigma, given[sigma])
            _check_moments(name, mu, found[mu], sigma, found[sigma])
        elif mu in given or sigma in given:
            raise ValueError(f"{name} needs both {mu} and {sigma}, and one of them is missing")
    if "n" in given:
        n = _as_float64(name, "n", given["n"])
        if n.numel() != 1 or not 2 <= n.item() < LARGE:
            raise ValueError(f"{name}: n is not a number of images")
        found["n"] = int(n)
    if "features" in given:
        found["features"] = str(given["features"])
    return found


def _as_float64(name, key, value):
    """A float64 copy of a number, array or tensor. Raises ValueError for other values."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):          # bfloat16, lists of unequal lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: {key} contains something other than real numbers")
    return torch.from_numpy(array.astype(np.float64))


def _check_moments(name, mu, mean, sigma, covariance):
    """Raises ValueError if these cannot be a mean and a covariance with the names mu and sigma."""
    d = mean.numel()
    if d == 0 or mean.shape != (d,) or covariance.shape != (d, d):
        raise ValueError(f"{name}: {mu} is {list(mean.shape)} and {sigma} is "
                         f"{list(covariance.shape)}; expected [D] and [D, D]")
    if not mean.isfinite().all() or not covariance.isfinite().all():
        raise ValueError(f"{name}: {mu} or {sigma} contains NaN or infinity")
    slack = ROUNDING * covariance.diagonal().abs().max() + 1e-300      # a covariance may be 0
    if (covariance - covariance.T).abs().max() > slack:
        raise ValueError(f"{name}: {sigma} is not symmetric, so it is not a covariance")
    _, failed = torch.linalg.cholesky_ex(covariance + slack * torch.eye(d, dtype=torch.float64))
    if failed:
        raise ValueError(f"{name}: {sigma} has negative eigenvalues, so it is not a covariance")


# --------------------------------------------------------------------------------------------------
# The network of 2015-12-05, under the names of the public weights.

AVERAGING = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
             "Mixed_7b")                   # blocks whose last branch begins with an average pool


class Inception(nn.Module):
    """uint8 [N, 3, H, W] -> pool3 features [N, 2048], spatial features [N, 2023], logits [N, 1008].

    The layers are torchvision's, with the pools of 2015. The spatial features are the first 7
    channels of the 1x1 branch of ADM's mixed_6 (Mixed_6d), in ADM's order [17, 17, 7]. The logits
    have no bias, because the Inception Score leaves it out.
    """

    def __init__(self):
        super().__init__()
        import torchvision  # here, because it takes a second
        public = torchvision.models.inception_v3(
            weights=None, aux_logits=False, num_classes=1008, init_weights=False,
            transform_input=False)
        for name, layer in public.named_children():
            if name not in ("avgpool", "dropout"):
                self.add_module(name, layer)
        for name in AVERAGING:
            exchange_pool(getattr(self, name), average_pool)
        exchange_pool(self.Mixed_7c, max_pool)     # a slip of 2015, on which the weights rely

    def forward(self, images):
        return self.features((resize(images.float()) - 128) / 128)

    def features(self, x):
        """The three outputs for resized and scaled images, float [N, 3, 299, 299]."""
        x = x.contiguous(memory_format=torch.channels_last)
        for name, layer in self.named_children():
            if name != "fc":
                x = layer(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


def average_pool(x):
    """Means over 3 x 3 pixels. Unlike torchvision's Inception, they leave out the padding."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
    """Maxima over 3 x 3 pixels."""
    return F.max_pool2d(x, 3, 1, 1)


def exchange_pool(block, pool):
    """Makes the last branch of one of torchvision's blocks begin with pool(x) instead of the pool
    of the block, which is still computed but not used."""
    pooled = []

    def before_block(block, inputs):
        pooled.append(pool(inputs[0]))

    def before_branch(branch, inputs):     # what it returns replaces the inputs
        return pooled.pop()

    block.register_forward_pre_hook(before_block)
    block.branch_pool.register_forward_pre_hook(before_branch)


def resize(x, size=299):
    """TensorFlow 1's bilinear resize, float [N, C, H, W] -> [N, C, size, size].

    Pixel i comes from i * H / size, without half pixels, antialiasing or aligned corners.
    """
    for dim in (3, 2):
        source = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = source.long()
        high = (low + 1).clamp_max(x.shape[dim] - 1)
        weight = source - low
        if dim == 2:
            weight = weight[:, None]
        a = x.index_select(dim, low)
        b = x.index_select(dim, high)
        x = a + (b - a) * weight
    return x


def load_inception(path=None, device="cpu"):
    """Inception with the public weights: from `path`, torch.hub's cache, or a download.

    Raises ValueError if the file is missing and cannot be downloaded, or is a different file.
    """
    cached = pathlib.Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.split("/")[-1])
    path = pathlib.Path(path or cached)
    if path == cached and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as e:
            raise ValueError(f"the Inception weights cannot be downloaded ({e}); save "
                             f"{INCEPTION_URL} as {cached}, or pass the file by --inception"
                             ) from None
    if not path.is_file():
        raise ValueError(f"--inception {path}: there is no such file; download {INCEPTION_URL}")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(INCEPTION_SHA256):
        raise ValueError(f"{path} is damaged, or a different file: its sha256 does not begin with "
                         f"{INCEPTION_SHA256}; download {INCEPTION_URL}")
    net = Inception()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:
        raise ValueError(f"{path} does not contain Inception's weights ({str(e).splitlines()[0]})"
                         ) from None
    return fuse(net).to(device)


def fuse(net):
    """Folds every batch normalisation of net into its convolution, in place, and returns net."""
    for module in net.eval().requires_grad_(False).modules():
        if hasattr(module, "bn"):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return net.to(memory_format=torch.channels_last)


def load_features(path, device="cpu"):
    """The network of a TorchScript file, which is executed, as the `extract` of `collect`.

    Raises ValueError, here or when it is called, for a file or a network of another kind.
    """
    if not path.is_file():
        raise ValueError(f"--features {path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(path, map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path} is not a TorchScript file ({type(e).__name__})") from None

    def extract(images):
        try:
            features = net(images)
        except (RuntimeError, torch.jit.Error) as e:
            raise ValueError(f"{path} fails on images {list(images.shape)}: "
                             f"{str(e).strip().splitlines()[-1]}") from None
        if not torch.is_tensor(features) or features.dim() != 2 or len(features) != len(images):
            raise ValueError(f"{path} does not return features [N, D]")
        return features.float(), None, None
    return extract


def load_extractor(args, device):
    """The network that the flags choose: extract(uint8 [b, 3, H, W]) for `collect`, and its name.

    Raises ValueError if it cannot be loaded.
    """
    if args.features:
        extract = load_features(args.features, device)
        digest = hashlib.sha256(args.features.read_bytes()).hexdigest()
        return extract, f"{args.features.name} sha256:{digest[:8]}"
    with processes.one_process_first():
        return load_inception(args.inception, device), INCEPTION


# --------------------------------------------------------------------------------------------------
# One pass over the images.

@torch.no_grad()
def collect(source, extract, moments=("mu",), score=False, keep=0, width=None, batch=64,
            device="cpu", rank=0, world=1, quiet=False):
    """Computes what the measures need from a Source's images. Each process reads a contiguous part.

    extract(uint8 [b, 3, H, W]) -> features [b, D], spatial features, logits. moments: one or both
    of "mu" and "mu_s". keep: the number of images, spread evenly over the source, whose features
    are kept. width: the D that the features must have. quiet: show no progress bar. Returns a dict
    with n, mu, sigma, ..., parts (sums for the Inception Score) if `score`, and kept [keep, D] on
    process 0. Raises ValueError, on every process, for an image that cannot be read, or for
    features that have another width or are not finite.
    """
    n = source.count
    if n < max(2, world):
        raise ValueError(f"{source.name}: {n} images are too few; a covariance needs at least 2, "
                         f"and each of {world} processes at least one")
    first = n * rank // world
    end = n * (rank + 1) // world
    keep = min(keep, n)
    chosen = torch.arange(keep) * n // max(keep, 1)        # the images whose features are kept
    hidden = True if rank or quiet else None               # None: the bar is for terminals alone
    sums, kept, problem = {}, [], None
    try:
        for i in tqdm(range(first, end, batch), source.name, unit="batch", disable=hidden):
            images = to_rgb(source.read(i, min(i + batch, end)), device)
            features, spatial, logits = extract(images)
            check_features(source.name, features, width)
            here = (chosen >= i) & (chosen < i + len(images))
            kept.append(features[chosen[here] - i].cpu())
            if "mu" in moments:
                add_moments(sums, "mu", features)
            if "mu_s" in moments:
                add_moments(sums, "mu_s", spatial)
            if score:
                add_scores(sums, logits, i, n)
    except ValueError as e:
        problem = str(e)
    raise_together(problem, world)
    kept = torch.cat(kept)
    if world > 1:
        for total in sums.values():
            dist.all_reduce(total)
        kept = gather_rows(kept, rank, world)
    for mu in moments:
        sums[mu] /= n
        squares = sums[SIGMA[mu]] - n * torch.outer(sums[mu], sums[mu])
        sums[SIGMA[mu]] = squares / (n - 1)
    found = {key: value.cpu() for key, value in sums.items()}
    return found | dict(n=n, kept=kept)


def to_rgb(images, device):
    """NumPy uint8 [b, H, W, 1 or 3] -> uint8 [b, 3, H, W] on the device.

    Grey images get three equal channels. They have the memory layout of RGB images, so that a
    network computes the same features for both, to the last bit.
    """
    images = torch.from_numpy(images).to(device)
    images = images.expand(-1, -1, -1, 3).contiguous()
    return images.permute(0, 3, 1, 2)


def to_float64(x):
    """The tensor in float64: on its device, or on the CPU for Apple's mps, which has no float64."""
    if x.device.type == "mps":
        x = x.cpu()
    return x.double()


def check_features(name, features, width):
    """Raises ValueError if features [b, D] are not finite, or if D is not `width`."""
    if width not in (None, features.shape[1]):
        raise ValueError(f"{name} has {features.shape[1]} features for each image, but the "
                         f"statistics to compare with have {width}")
    if not features.isfinite().all():
        raise ValueError(f"{name}: the features of an image contain NaN or infinity")


def add_moments(sums, mu, x):
    """Adds the sum over the rows of x [b, D] to sums[mu], and that of their outer products."""
    x = to_float64(x)
    sigma, d = SIGMA[mu], x.shape[1]
    if mu not in sums:
        sums[mu] = x.new_zeros(d)
        sums[sigma] = x.new_zeros(d, d)
    sums[mu] += x.sum(0)
    sums[sigma].addmm_(x.T, x)


def add_scores(sums, logits, i, n):
    """Adds the logits [b, classes] of images i, i+1, ... of n to the sums for the Inception Score:
    sums["parts"] [P, classes + 1], which are the sums of p and, in the last column, of p log p."""
    log_p = to_float64(logits).log_softmax(1)
    p = log_p.exp()
    rows = torch.cat([p, (p * log_p).sum(1, keepdim=True)], 1)
    part = torch.arange(i, i + len(rows), device=rows.device) // SCORE_PART
    count = math.ceil(n / SCORE_PART)
    parts = rows.new_zeros(count, rows.shape[1]).index_add_(0, part, rows)
    sums["parts"] = sums.get("parts", 0) + parts


def raise_together(problem, world):
    """Raises the first process's problem, a text or None, as ValueError on all processes."""
    problems = [problem]
    if world > 1:
        problems = [None] * world
        dist.all_gather_object(problems, problem)
    for text in problems:
        if text:
            processes.raise_on_all(text)


def gather_rows(rows, rank, world):
    """The rows of all processes, in their order, on process 0, and None on the others."""
    gathered = [None] * world if rank == 0 else None
    dist.gather_object(rows.numpy(), gathered)
    if rank:
        return None
    return torch.cat([torch.from_numpy(part) for part in gathered])


# --------------------------------------------------------------------------------------------------
# The measures.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), as a float (TTUR, Eq. 6).

    mu [D] and sigma [D, D], arrays or tensors, computed in float64. The trace of the root is the
    sum of the roots of the eigenvalues of R^T sigma2 R, which is symmetric, where R R^T = sigma1.
    The result is at least 0. Raises ValueError if the shapes differ or a number is not finite.
    Prints a note on stderr if a covariance does not have full rank. Rounding then makes some
    eigenvalues slightly negative, and they count as 0.
    """
    statistics = [mu1, sigma1, mu2, sigma2]
    statistics = [torch.as_tensor(a, dtype=torch.float64, device="cpu") for a in statistics]
    mu1, sigma1, mu2, sigma2 = statistics
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        raise ValueError(f"statistics of {len(mu1)} features cannot be compared with statistics of "
                         f"{len(mu2)}")
    if not all(a.isfinite().all() for a in statistics):
        raise ValueError("the mean or the covariance of the features contains NaN or infinity")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()            # sigma1 = root root^T
    cross = torch.linalg.eigvalsh(root.T @ sigma2 @ root)
    threshold = cross.max() * len(cross) * torch.finfo(cross.dtype).eps
    rank = int((cross > threshold).sum())
    if rank < len(cross):
        print(f"note: the covariances share rank {rank} of {len(cross)}, because images are few or "
              "features constant; eigenvalues below 0 by rounding count as 0", file=sys.stderr)
    distance = ((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace()
    distance = distance - 2 * cross.clamp_min(0).sqrt().sum()
    return max(0.0, float(distance))       # rounding makes 0 a little negative


def inception_score(parts):
    """Mean and standard deviation over the parts of exp(mean KL(p(y|x) || p(y))) (Salimans 2016).

    parts float64 [P, classes + 1]: for each part of the images, the sums of p and, in the last
    column, of p log p.
    """
    counts = parts[:, :-1].sum(1)          # every image's p sums to 1
    p = parts[:, :-1] / counts[:, None]
    scores = (parts[:, -1] / counts - torch.special.xlogy(p, p).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def distances(a, b):
    """Euclidean distances [N, M] between the rows of a [N, D] and b [M, D], float64.

    They are computed by a matrix product, which on a CPU is 15 times faster than differences. It
    gives exact copies a distance of about 1e-8 of their lengths, so distances below 1e-6 of the
    lengths are set to 0.
    """
    found = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
    lengths = a.norm(dim=1)[:, None] + b.norm(dim=1)
    return found.masked_fill(found < 1e-6 * lengths, 0)


def precision_recall(samples, reference, k=NEIGHBOURS, rows=2000):
    """Fraction of samples in the reference's k-neighbourhoods, and the reverse (Kynkaanniemi 2019).

    Features [N, D], [M, D], on any device. Distances are float64 (ADM's are float16, so its figures
    differ in the third decimal). `rows` limits the memory and does not change the
    result. Raises ValueError for k features or fewer.
    """
    def radii(x):                          # the image itself is the nearest, so k + 1
        return torch.cat([distances(a, x).kthvalue(k + 1).values for a in x.split(rows)])

    def covered(x, centres, radius):
        return torch.cat([(distances(a, centres) <= radius).any(1) for a in x.split(rows)])

    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    centre = to_float64(reference).mean(0)                 # around it, rounding is least
    a = to_float64(samples) - centre
    b = to_float64(reference) - centre
    precision = covered(a, b, radii(b)).double().mean().item()
    recall = covered(b, a, radii(a)).double().mean().item()
    return precision, recall


def kernel_distance(samples, reference, subsets=100, size=1000):
    """KID: mean and standard deviation of the unbiased MMD^2 over subsets (Binkowski et al. 2018).

    Features [N, D], [M, D]; kernel (x.y / D + 1)^3. The mean may be negative, because it is
    unbiased. The subsets are those of torch-fidelity, for a reference of up to 10,000 images, which
    is as many as `measure` keeps.
    """
    random = np.random.RandomState(2020)
    size = min(size, len(samples), len(reference))

    def subset(features):
        rows = random.choice(len(features), size, replace=False)
        return to_float64(features[torch.from_numpy(rows)])

    def kernel(a, b):
        return torch.addmm(a.new_ones(()), a, b.T, alpha=1 / a.shape[1]).pow_(3)

    def within(a):
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (size * (size - 1))

    found = []
    for _ in range(subsets):
        x = subset(samples)
        y = subset(reference)
        found.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    found = torch.stack(found)
    return found.mean().item(), found.std(correction=0).item()


# --------------------------------------------------------------------------------------------------
# The program.

def check_flags(args):
    """Raises ValueError for flags that cannot be combined, before anything is read."""
    if not args.ref and not args.score and not args.save_stats:
        raise ValueError("--ref is missing; only --is and --save-stats work without it")
    if not args.ref and (args.pr or args.kid):
        raise ValueError("--pr and --kid need --ref")
    if not args.ref and args.sfid and not args.save_stats:
        raise ValueError("--sfid needs --ref or --save-stats")
    if args.features and (args.sfid or args.score):
        raise ValueError("--sfid and --is need Inception; leave out --features, or these two")
    if args.features and args.inception:
        raise ValueError("--features replaces Inception; leave out --inception")
    if args.batch is not None and args.batch < 1:
        raise ValueError("--batch must be at least 1")
    if args.save_stats and args.save_stats.suffix != ".npz":
        raise ValueError(f"--save-stats {args.save_stats}: the name must end in .npz")
    if args.save_stats and args.json and args.save_stats.resolve() == args.json.resolve():
        raise ValueError("--save-stats and --json name the same file; use two files")
    for flag, output in (("--save-stats", args.save_stats), ("--json", args.json)):
        for given in (args.samples, args.ref, args.features, args.inception):
            if output and given and same_file(output, given):
                raise ValueError(f"{flag} {output} would overwrite an input, {given}; use another "
                                 "name")


def same_file(a, b):
    """Whether two paths are the same existing file."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def check_use(args, sources, needs_network):
    """Raises ValueError for a flag that has no effect with these sources."""
    names = [source.name for source in sources]
    if not any(is_glyphs(name) for name in names):
        for flag, value in (("--n", args.n), ("--resolution", args.resolution)):
            if value is not None:
                raise ValueError(f"{flag} is for glyphs, but neither SAMPLES nor REF is glyphs; "
                                 "leave it out")
    if args.data_dir and not any(name in data.TORCHVISION for name in names):
        raise ValueError(f"--data-dir is for {', '.join(data.TORCHVISION)}, but neither SAMPLES "
                         "nor REF is one of them; leave it out")
    if needs_network:
        return
    for flag, value in (("--features", args.features), ("--inception", args.inception),
                        ("--batch", args.batch)):
        if value is not None:
            raise ValueError(f"{flag} is for images, but only statistics are read; leave it out")


class Plan(NamedTuple):
    """What to compute in one pass over the images of a source. An empty plan needs no pass."""

    moments: list                          # "mu", "mu_s": of which features mean and covariance
    score: bool                            # sums for the Inception Score?
    keep: int                              # of how many images the features are kept


def plan_pass(args, source, is_reference):
    """The Plan for SAMPLES or REF. Raises ValueError if it needs images and there are none."""
    needed = []
    if args.ref or args.save_stats:
        needed.append("mu")
    if args.sfid:
        needed.append("mu_s")
    moments = [mu for mu in needed if mu not in source.statistics]
    score = args.score and not is_reference
    keep = 0
    if args.pr or args.kid:
        keep = KEPT_REFERENCE if is_reference else max(source.count, 1)
    plan = Plan(moments, score, keep)
    if any(plan) and not source.count:
        raise ValueError(f"{source.name} contains only statistics, but these flags need images: "
                         f"{', '.join(moments) or 'features'} must be computed")
    if args.pr and source.count <= NEIGHBOURS:
        raise ValueError(f"{source.name}: --pr needs more than {NEIGHBOURS} images on each side")
    return plan


def choose_network(args, sources, needs_network, device):
    """The extractor of features, or None if no images are read, and the name of the network.

    Raises ValueError if statistics belong to another network, before anything is downloaded.
    """
    extract, name = None, INCEPTION
    if args.features:
        extract, name = load_extractor(args, device)
    elif not needs_network:
        name = name_of_statistics(sources)
    for source in sources:
        held = source.statistics
        if held.get("features", name) != name:
            raise ValueError(f"{source.name} has statistics of the features of {held['features']}, "
                             f"not of {name}; both sides need the same network, which --features "
                             "chooses")
        if needs_network and name == INCEPTION and "mu" in held and len(held["mu"]) != FEATURES:
            raise ValueError(f"{source.name} has statistics of {len(held['mu'])} features, but "
                             f"Inception has {FEATURES}; pass the network of these statistics by "
                             "--features")
    if needs_network and not extract:
        extract, name = load_extractor(args, device)
    return extract, name


def name_of_statistics(sources):
    """The network of the statistics: the name in one of the files, or a guess from their width."""
    for source in sources:
        if "features" in source.statistics:
            return source.statistics["features"]
    width = len(sources[0].statistics["mu"])
    if width == FEATURES:
        return INCEPTION
    return f"an unknown network with {width} features"


def measure(args, device, rank=0, world=1):
    """Reads each source once. Returns the statistics of SAMPLES and of REF, dicts as returned by
    `collect`, and the name of the features. Raises ValueError, on every process, for a user error.
    """
    part = "fd_dinov2" if args.features else "fid"         # of EDM2's statistics
    sizes = {}
    if args.n is not None:
        sizes["n"] = args.n
    if args.resolution is not None:
        sizes["resolution"] = args.resolution
    sources = [open_source(args.samples, data_dir=args.data_dir, part=part, **sizes)]
    plans = [plan_pass(args, sources[0], is_reference=False)]
    if args.ref:
        sources.append(open_source(args.ref, data_dir=args.data_dir, part=part, **sizes))
        plans.append(plan_pass(args, sources[1], is_reference=True))
    needs_network = any(any(plan) for plan in plans)
    check_use(args, sources, needs_network)
    extract, name = choose_network(args, sources, needs_network, device)
    widths = [len(source.statistics["mu"]) for source in sources if "mu" in source.statistics]
    width = widths[0] if widths else None

    sides = []
    for source, plan in zip(sources, plans):
        side = dict(source.statistics)
        if any(plan):
            side |= collect(source, extract, plan.moments, plan.score, plan.keep, width,
                            args.batch or 64, device, rank, world)
        if "mu" in plan.moments:           # otherwise mu and sigma are the file's, as in ADM
            side["features"] = name
        if rank == 0 and side.get("n", FEW) < FEW:
            print(f"warning: {source.name} has {side['n']} images; figures from fewer than {FEW:,} "
                  "are not reliable", file=sys.stderr)
        sides.append(side)
    return sides, name


def compare(args, sides, name, device):
    """The figures that the flags ask for, from what `measure` returns: a dict of floats.

    Raises ValueError if one of them is not finite.
    """
    figures, fid, kid = {}, "FID", "KID"
    if name != INCEPTION:
        file = name.split(" sha256:")[0]
        fid, kid = f"Frechet distance ({file})", f"kernel distance ({file})"
    if args.ref:
        a, b = sides
        figures[fid] = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
        if args.sfid:
            figures["sFID"] = frechet_distance(a["mu_s"], a["sigma_s"], b["mu_s"], b["sigma_s"])
    if args.score:
        figures["IS"], figures["IS std"] = inception_score(sides[0]["parts"])
    if args.pr or args.kid:
        kept = [side["kept"].to(device) for side in sides]
    if args.pr:
        figures["precision"], figures["recall"] = precision_recall(*kept)
    if args.kid:
        figures[kid], figures[kid + " std"] = kernel_distance(*kept)
    for key, figure in figures.items():
        if not math.isfinite(figure):
            raise ValueError(f"{key} is {figure}, because the network returned NaN or infinity")
        figures[key] = figure + 0.0        # -0.0 becomes 0.0
    return figures


def compare_once(args, sides, name, device, rank, world):
    """The figures of `compare` on process 0, {} on the others, and its ValueError on all."""
    figures, problem = {}, None
    if rank == 0:
        try:
            figures = compare(args, sides, name, device)
        except ValueError as e:
            problem = str(e)
    raise_together(problem, world)
    return figures


def format_figure(figure):
    """A figure with six decimals, and without the sign of a zero: a KID may be -1e-9."""
    return f"{round(figure, 6) + 0.0:12.6f}"


@processes.program("use fewer images at once by --batch")
def main():
    args = parse_args()
    try:
        check_flags(args)
        folders.check_output(args.save_stats, args.json)
        device, rank, world = processes.start(args.device, precision="float32")
        sides, name = measure(args, device, rank, world)
        figures = compare_once(args, sides, name, device, rank, world)
    except ValueError as e:
        processes.leave_with(e)
        fail(" ".join(str(e).split()))     # a library's message may have several lines
    processes.end()
    if rank:
        return
    counts = [side.get("n") for side in sides] + [None]    # of statistics it may be unknown
    for role, source, count in zip(("samples", "reference"), (args.samples, args.ref), counts):
        print(f"{role:12}{source or 'none'}" + (f" ({count:,} images)" if count else ""))
    print(f"{'features':12}{name}")
    for key, figure in figures.items():
        print(f"{key:40}{format_figure(figure)}")
    report = dict(figures=figures, samples=args.samples, n=counts[0], ref=args.ref, ref_n=counts[1],
                  features=name, torch=torch.__version__,
                  command=shlex.join(["python", *sys.argv]))
    try:
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
        if args.save_stats:
            known = {key: np.asarray(sides[0][key]) for key in STATISTICS if key in sides[0]}
            np.savez(args.save_stats, **known)
    except OSError as e:
        fail(e)


if __name__ == "__main__":
    main()
