"""FID, sFID, Inception Score, precision and recall, KID: all from one pass over the images.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz --is --sfid --pr
    python fid.py folder --ref cifar10-32x32.npz --json fid.json
    python fid.py samples.npz --ref glyphs:2 --features net.pt     # no FID, and not called so
    python fid.py images.zip --save-stats statistics.npz
    torchrun --nproc_per_node=8 fid.py samples.npz --ref statistics.npz

SAMPLES and REF are each a folder (searched to its depth) or a zip of images, an npz of images
(arr_0 or images, uint8 [N, H, W, 3]), glyphs, glyphs:SEED or cifar10 (its 50,000 training images),
or a file of statistics: npz with mu and sigma (ours, pytorch-fid's, EDM's, or ADM's with mu_s and
sigma_s for sFID, and images for --pr and --kid), or torch-fidelity's .pt. All figures are the same
whatever --batch and the number of processes, up to the rounding of float32 features; sums are
float64, covariances have N - 1.

Features: the Inception network of 2015-12-05, no other; torchvision's own gives another number.
Images are resized to 299 as TensorFlow 1 did (source = i * size / 299, without half pixels) and
scaled by (x - 128) / 128, as in the original graph, ADM's evaluator and torch-fidelity. pytorch-fid
resizes with half pixels and scales by x / 127.5 - 1, so its figures differ a little.
--features takes a TorchScript file instead. Such a file is a program, and is executed: take it
from those alone whom you trust. Everything else that is read here is data.
"""

import hashlib
import json
import os
import pathlib
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
import flags
import imagefiles
import run

INCEPTION = "inception-2015-12-05"
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"              # its beginning; torch-fidelity's is the same file
FEATURES = 2048                            # Inception's
FEW = 2048                                 # with fewer images an FID says little
KEPT_REFERENCE = 10_000                    # ADM: precision and recall against 10,000 images
SCORE_PART = 5000                          # ADM: the Inception Score is a mean over parts of 5,000
SIGMA = {"mu": "sigma", "mu_s": "sigma_s"}
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "n", "features")
DAMAGE = (OSError, EOFError, ValueError, KeyError, AttributeError, RuntimeError,     # on reading
          zipfile.BadZipFile, zlib.error)


def parse_args():
    p = flags.Parser(description="FID and its relatives, from one pass over the images.")
    a = p.add_argument
    a("samples", help="folder, zip, npz, statistics (.npz, .pt), glyphs, glyphs:SEED or cifar10")
    a("--ref", help="the reference, of the same kinds; not needed for --is and --save-stats")
    a("--is", action="store_true", dest="score", help="Inception Score, parts of 5,000 images")
    a("--sfid", action="store_true", help="FID of the 7 x 17 x 17 spatial features")
    a("--pr", "--precision-recall", action="store_true", help="both, k = 3, of all samples against "
      "10,000 images (or all) spread evenly over REF; torchrun takes only the long name")
    a("--kid", action="store_true", help="kernel distance, over 100 pairs of 1,000 images")
    a("--features", type=pathlib.Path, help="TorchScript file, uint8 [N,3,H,W] -> [N,D], in place "
      "of Inception; the file is executed")
    a("--inception", type=pathlib.Path, help="pt_inception-2015-12-05-6726825d.pth, or "
      "torch-fidelity's copy (default: torch.hub's cache, or else a download)")
    a("--n", "--images", type=int, default=20_000, help="number of glyphs; torchrun takes only the "
      "long name, because it reads --n and --pr as the beginning of its own flags")
    a("--resolution", type=int, default=16, help="height and width of the glyphs")
    a("--data-dir", help="where cifar10 lies, or is downloaded to (default: data)")
    a("--batch", type=int, default=64, help="images at once in each process")
    a("--save-stats", type=pathlib.Path, help="NAME.npz for the statistics of SAMPLES")
    a("--json", type=pathlib.Path, help="write the figures to this file, too")
    a("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    return p.parse_args()


# --------------------------------------------------------------------------------------------------
# Images and statistics in.

class Source(NamedTuple):
    """What an argument names: images, statistics, or both."""

    name: str
    count: int = 0                         # of images; 0 if there are statistics alone
    read: Callable = None                  # read(i, j): images i..j-1, uint8 [j-i, H, W, 1 or 3]
    statistics: dict = {}                  # mu, sigma, mu_s, sigma_s, n, features: what it has


def open_source(text, n=20_000, resolution=16, data_dir=None):
    """The Source that SAMPLES or REF names. n, resolution: of glyphs; data_dir: of cifar10.

    Raises ValueError, in one line with the name, for whatever cannot be read.
    """
    path = pathlib.Path(text)
    if text.split(":")[0] == "glyphs":
        seed = text.removeprefix("glyphs").removeprefix(":") or "0"
        if n < 1 or resolution < 12 or not seed.isdecimal():
            raise ValueError(f"{text}: want glyphs or glyphs:SEED, --n >= 1, --resolution >= 12")
        seed = int(seed)
        return Source(text, n, lambda i, j: data.glyphs(j - i, resolution, seed, first=i)[0])
    if text in data.TORCHVISION:
        images = data.load(text, data_dir=data_dir).images
        return Source(text, len(images), lambda i, j: images[i:j].numpy())
    if path.is_dir() or path.suffix == ".zip":
        return _open_images(text, imagefiles.Tree(path, labelled=False))
    if not path.exists():
        raise ValueError(f"{text}: no such file or folder; data sets are glyphs, "
                         f"{', '.join(data.TORCHVISION)}")
    if path.suffix == ".npz":
        return _open_npz(text, imagefiles.open_zip(path))
    if path.suffix in (".pt", ".pth"):
        return Source(text, statistics=_check_statistics(text, _read_torch(path)))
    raise ValueError(f"{text}: want a folder, .npz, .zip or .pt, or a data set such as cifar10")


def _open_images(name, tree):
    """Image files, decoded in threads; all must have the size of the first."""
    files = tree.names

    def decode(file):
        try:
            return np.asarray(imagefiles.read_image(tree.open(file)))
        except Exception as e:             # decoders raise about anything on a damaged file
            raise ValueError(f"{tree.path / file}: no readable image ({e})") from None

    size = decode(files[0]).shape
    threads = ThreadPoolExecutor(min(8, os.cpu_count()))

    def read(i, j):
        images = list(threads.map(decode, files[i:j]))
        for file, image in zip(files[i:j], images):
            if image.shape != size:
                raise ValueError(f"{name}: {file} is {image.shape[1]}x{image.shape[0]}, but "
                                 f"{files[0]} is {size[1]}x{size[0]}")
        return np.stack(images)
    return Source(name, len(files), read)


def _open_npz(name, archive):
    """Images are read from the file as they are needed; np.load would take all at once."""
    keys = [key.removesuffix(".npy") for key in archive.namelist()]
    statistics, images = {}, next((key for key in ("arr_0", "images") if key in keys), None)
    try:
        if "mu" in keys and "sigma" in keys:
            with np.load(name, allow_pickle=False) as f:
                held = {key: f[key] for key in STATISTICS if key in keys}
            statistics = _check_statistics(name, held)
        elif images is None:
            raise ValueError(f"has {', '.join(keys)}; want arr_0 or images, or mu and sigma")
        if images is None:
            return Source(name, statistics=statistics)
        member = archive.open(images + ".npy")
        version = np.lib.format.read_magic(member)
        header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = header(member)
    except DAMAGE as e:
        raise ValueError(f"{name}: {str(e).removeprefix(name + ': ')}") from None
    shape = (*shape, 1) if len(shape) == 3 else shape      # grey
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
        raise ValueError(f"{name}: {images} is {dtype} {list(shape)}, want uint8 [N, H, W, 3], or "
                         "[N, H, W] of grey images")
    start, row = member.tell(), int(np.prod(shape[1:]))

    def read(i, j):
        batch = np.empty((j - i, *shape[1:]), np.uint8)
        try:
            member.seek(start + i * row)
            complete = member.readinto(batch.reshape(-1)) == batch.size
        except DAMAGE:
            complete = False
        if not complete:
            raise ValueError(f"{name}: {images} is damaged at the images {i} to {j - 1}")
        return batch
    return Source(name, shape[0], read, statistics)


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
        raise ValueError(f"{path}: no readable statistics ({type(e).__name__})") from None
    return content if isinstance(content, dict) else {}


def _check_statistics(name, given):
    """The statistics as float64 tensors mu [D], sigma [D, D]; ValueError if they are none."""
    if not {"mu", "sigma"} <= given.keys():
        raise ValueError(f"{name}: no mu and sigma in it")
    kinds = dict.fromkeys(STATISTICS, lambda a: torch.as_tensor(a, dtype=torch.float64))
    kinds |= dict(n=int, features=str)
    try:
        given = {key: kinds[key](given[key]) for key in STATISTICS if key in given}
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: mu, sigma or n is no number") from None
    for mu, sigma in SIGMA.items():
        if mu in given and sigma in given:
            a, b = given[mu], given[sigma]
            if a.dim() != 1 or b.shape != (len(a), len(a)):
                raise ValueError(f"{name}: {mu} {list(a.shape)}, {sigma} {list(b.shape)}; want [D] "
                                 f"and [D, D]")
            if not (a.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"{name}: {mu} or {sigma} is not finite")
    return given


# --------------------------------------------------------------------------------------------------
# The network of 2015-12-05, under the names of the public weights.

# Branches of every block: (width, kernel), a third number is the stride; a kernel "fork" is a
# 1 x 3 and a 3 x 1 convolution side by side. The last branch begins by pooling.
BLOCK_A = dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
               branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
BLOCK_E = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, "fork")],
               branch3x3dbl=[(448, 1), (384, 3), (384, "fork")], branch_pool=[(192, 1)])


def _block_c(c):
    return dict(branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
                branch_pool=[(192, 1)])


BLOCKS = {                                                                       # [N, C, H, W]
    "Mixed_5b": (192, "average", BLOCK_A | dict(branch_pool=[(32, 1)])),         # 256, 35, 35
    "Mixed_5c": (256, "average", BLOCK_A | dict(branch_pool=[(64, 1)])),         # 288
    "Mixed_5d": (288, "average", BLOCK_A | dict(branch_pool=[(64, 1)])),
    "Mixed_6a": (288, "stride", dict(branch3x3=[(384, 3, 2)], branch3x3dbl=[     # 768, 17, 17
        (64, 1), (96, 3), (96, 3, 2)], branch_pool=[])),
    "Mixed_6b": (768, "average", _block_c(128)),
    "Mixed_6c": (768, "average", _block_c(160)),
    "Mixed_6d": (768, "average", _block_c(160)),
    "Mixed_6e": (768, "average", _block_c(192)),
    "Mixed_7a": (768, "stride", dict(branch3x3=[(192, 1), (320, 3, 2)], branch7x7x3=[
        (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])),  # 1280, 8, 8
    "Mixed_7b": (1280, "average", BLOCK_E),                                      # 2048
    "Mixed_7c": (2048, "max", BLOCK_E)}              # max: a slip of 2015; the weights rely on it

POOLS = {"average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
         "max": lambda x: F.max_pool2d(x, 3, 1, 1), "stride": lambda x: F.max_pool2d(x, 3, 2)}


class Conv(nn.Module):
    """Convolution, normalisation by running statistics, ReLU. Strided ones have no padding."""

    def __init__(self, channels, width, kernel, stride=1, padded=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [k // 2 if padded and stride == 1 else 0 for k in kernel]
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side: [N, channels, H, W] -> their outputs, joined along the channels."""

    def __init__(self, channels, pool, branches):
        super().__init__()
        self.pool, self.paths = POOLS[pool], []
        for branch, convs in branches.items():
            width, path = channels, []     # path: the names in their order; a fork has two
            for i, (out, kernel, *stride) in enumerate(convs, 1):
                name = f"{branch}_{i}" if len(convs) > 1 else branch
                kernels = {"a": (1, 3), "b": (3, 1)} if kernel == "fork" else {"": kernel}
                for suffix, k in kernels.items():
                    self.add_module(name + suffix, Conv(width, out, k, *stride))
                path.append([name + suffix for suffix in kernels])
                width = out
            self.paths.append(path)

    def forward(self, x):
        outputs = []
        for path in self.paths:
            heads = [self.pool(x) if path is self.paths[-1] else x]
            for names in path:             # a fork is always the last
                heads = [getattr(self, name)(heads[0]) for name in names]
            outputs += heads
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """uint8 [N, 3, H, W] -> pool3 features [N, 2048], spatial features [N, 2023], logits [N, 1008].

    The spatial features are the first 7 channels of the 1x1 branch of ADM's mixed_6 (Mixed_6d), in
    ADM's order [17, 17, 7]. The logits are without their bias, as the Inception Score takes them.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        for name, block in BLOCKS.items():
            self.add_module(name, Mixed(*block))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        return self.features((resize(images.float()) - 128) / 128)

    def features(self, x):
        """The three outputs for images that are resized and scaled already, float [N,3,299,299]."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))     # 64, 147, 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))     # 192, 71, 71
        x = F.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


def resize(x, size=299):
    """TensorFlow 1's bilinear resize, float [N, C, H, W] -> [N, C, size, size].

    Pixel i comes from i * H / size, without half pixels, antialiasing or aligned corners.
    """
    for dim in (3, 2):
        source = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = source.long()
        high = (low + 1).clamp_max(x.shape[dim] - 1)
        weight = (source - low).view((-1, 1) if dim == 2 else (-1,))
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * weight
    return x


def load_inception(path=None, device="cpu"):
    """Inception with the public weights: from `path`, torch.hub's cache, or the network.

    Raises ValueError if the file is missing and cannot be had, or is another one.
    """
    cached = pathlib.Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.split("/")[-1])
    path = pathlib.Path(path or cached)
    if path == cached and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as e:
            raise ValueError(f"the Inception weights cannot be downloaded ({e}): put "
                             f"{INCEPTION_URL} at {cached}, or give --inception FILE") from None
    if not path.is_file():
        raise ValueError(f"--inception {path}: no such file; it is {INCEPTION_URL}")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(INCEPTION_SHA256):
        raise ValueError(f"{path}: damaged or another file, its sha256 does not begin with "
                         f"{INCEPTION_SHA256}; the right one is {INCEPTION_URL}")
    net = Inception()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:
        raise ValueError(f"{path}: not these weights ({str(e).splitlines()[0]})") from None
    return fuse(net).to(device)


def fuse(net):
    """The same network with every normalisation folded into its convolution; changes net."""
    for module in net.eval().requires_grad_(False).modules():
        if isinstance(module, Conv):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return net.to(memory_format=torch.channels_last)


def load_features(path, device="cpu"):
    """A TorchScript file's network as `extract` of `collect` wants it; it is executed code."""
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            net = torch.jit.load(path, map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path}: no TorchScript file ({type(e).__name__})") from None

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


# --------------------------------------------------------------------------------------------------
# The pass over the images.

@torch.no_grad()
def collect(source, extract, moments=("mu",), score=False, keep=0, width=None, batch=64,
            device="cpu", rank=0, world=1):
    """What the measures need of a Source's images; every process takes a contiguous part of them.

    extract(uint8 [b, 3, H, W]) -> features [b, D], spatial features, logits. moments: of "mu" and
    "mu_s". keep: how many images' features to keep, spread evenly over the source. width: the D to
    insist on. Returns a dict with n, mu, sigma, ..., parts (sums for the Inception Score) if
    `score`, and kept [keep, D] on process 0. Raises ValueError, on every process, for an image that
    cannot be read, or features of another width.
    """
    n, keep = source.count, min(keep, source.count)
    if n < max(2, world):
        raise ValueError(f"{source.name}: {n} images are too few for {world} processes, or at all")
    first, end = (n * k // world for k in (rank, rank + 1))
    chosen = torch.arange(keep) * n // max(keep, 1)
    sums, kept, problem = {}, [], None
    try:
        for i in tqdm(range(first, end, batch), source.name, unit="batch",
                      disable=True if rank else None):                   # None: on terminals alone
            images = torch.from_numpy(source.read(i, min(i + batch, end))).to(device)
            images = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
            features, spatial, logits = extract(images)
            if width not in (None, features.shape[1]):
                raise ValueError(f"{source.name}: {features.shape[1]} features an image, but "
                                 f"{width} in the statistics to compare with")
            kept.append(features[chosen[(chosen >= i) & (chosen < i + len(images))] - i].cpu())
            for mu, x in (("mu", features), ("mu_s", spatial)):
                if mu in moments:
                    x, d = x.double(), x.shape[1]
                    if mu not in sums:
                        sums[mu], sums[SIGMA[mu]] = x.new_zeros(d), x.new_zeros(d, d)
                    sums[mu] += x.sum(0)
                    sums[SIGMA[mu]].addmm_(x.T, x)
            if score:
                log_p = logits.double().log_softmax(1)
                rows = torch.cat([log_p.exp(), (log_p.exp() * log_p).sum(1, keepdim=True)], 1)
                part = torch.arange(i, i + len(rows), device=device) // SCORE_PART
                parts = rows.new_zeros(-(-n // SCORE_PART), rows.shape[1])
                sums["parts"] = sums.get("parts", 0) + parts.index_add_(0, part, rows)
    except ValueError as e:
        problem = str(e)
    if world > 1:                          # a mistake in one part ends all processes, in one line
        problems = [None] * world
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    if problem:
        raise ValueError(problem)
    kept = torch.cat(kept)
    if world > 1:
        for total in sums.values():
            dist.all_reduce(total)
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(kept.numpy(), gathered)
        kept = torch.cat([torch.from_numpy(a) for a in gathered]) if rank == 0 else None
    for mu in moments:
        sums[mu] /= n
        sums[SIGMA[mu]] = (sums[SIGMA[mu]] - n * torch.outer(sums[mu], sums[mu])) / (n - 1)
    return {key: value.cpu() for key, value in sums.items()} | dict(n=n, kept=kept)


# --------------------------------------------------------------------------------------------------
# The measures.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), as a float (TTUR, Eq. 6).

    mu [D] and sigma [D, D], arrays or tensors, computed in float64. The trace of the root is the
    sum of the roots of the eigenvalues of R^T sigma2 R, which is symmetric, where R R^T = sigma1.
    Raises ValueError if the shapes differ or a number is not finite. Says on stderr if a covariance
    lacks rank; rounding makes eigenvalues a little negative there, and they are taken for 0.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64, device="cpu")
                                for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features do not compare")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the features' mean or covariance is not finite")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()        # sigma1 = root root^T
    cross = torch.linalg.eigvalsh(root.T @ sigma2 @ root)
    rank = int((cross > cross.max() * len(cross) * torch.finfo(cross.dtype).eps).sum())
    if rank < len(cross):
        print(f"note: the covariances share rank {rank} of {len(cross)}, by few images or constant "
              "features; eigenvalues below 0 by rounding count as 0", file=sys.stderr)
    distance = ((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace()
    return float(distance - 2 * cross.clamp_min(0).sqrt().sum())


def inception_score(parts):
    """Mean and standard deviation over the parts of exp(mean KL(p(y|x) || p(y))) (Salimans 2016).

    parts float64 [P, classes + 1]: of each part of the images the sums of p and, last, of p log p.
    """
    counts = parts[:, :-1].sum(1)          # every image's p sums to 1
    p = parts[:, :-1] / counts[:, None]
    scores = (parts[:, -1] / counts - torch.special.xlogy(p, p).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(samples, reference, k=3, rows=2000):
    """Shares of samples in the reference's k-neighbourhoods, and the reverse (Kynkaanniemi 2019).

    Features [N, D], [M, D], on any device. Distances are float64 (ADM's are float16, so its figures
    differ in the third decimal). `rows` bounds the memory, not the result.
    """
    def radii(x):                          # the image itself is the nearest, so k + 1
        return torch.cat([torch.cdist(a, x).kthvalue(k + 1).values for a in x.split(rows)])

    def covered(x, centres, radius):
        return torch.cat([(torch.cdist(a, centres) <= radius).any(1) for a in x.split(rows)])

    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    a, b = samples.double(), reference.double()
    return (covered(a, b, radii(b)).double().mean().item(),
            covered(b, a, radii(a)).double().mean().item())


def kernel_distance(samples, reference, subsets=100, size=1000):
    """KID: mean and standard deviation of the unbiased MMD^2 over subsets (Binkowski et al. 2018).

    Features [N, D], [M, D]; kernel (x.y / D + 1)^3. The subsets are those of torch-fidelity
    (for a reference of up to 10,000 images, which is as many as `measure` keeps).
    """
    random = np.random.RandomState(2020)
    size = min(size, len(samples), len(reference))

    def kernel(a, b):
        return torch.addmm(a.new_ones(()), a, b.T, alpha=1 / a.shape[1]).pow_(3)

    def within(a):
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (size * (size - 1))

    distances = []
    for _ in range(subsets):
        x, y = (a[torch.from_numpy(random.choice(len(a), size, replace=False))].double()
                for a in (samples, reference))
        distances.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    distances = torch.stack(distances)
    return distances.mean().item(), distances.std(correction=0).item()


def load_extractor(args, device):
    """The network of the flags: extract(uint8 [b, 3, H, W]) for `collect`, and its name."""
    if args.features:
        extract = load_features(args.features, device)
        digest = hashlib.sha256(args.features.read_bytes()).hexdigest()
        return extract, f"{args.features.name} sha256:{digest[:8]}"
    with run.one_process_first():
        return load_inception(args.inception, device), INCEPTION


def measure(args, device, rank=0, world=1):
    """One pass over each source: what is known of SAMPLES and of REF, dicts as of `collect`, and
    the features' name. Raises ValueError, on every process, for a mistake of the user."""
    if not args.ref and (args.sfid or args.pr or args.kid or not (args.score or args.save_stats)):
        raise ValueError("--ref is needed, except for --is or --save-stats alone")
    if args.features and (args.sfid or args.score):
        raise ValueError("--sfid and --is are measures of Inception, --features has neither")
    if args.batch < 1 or args.save_stats and args.save_stats.suffix != ".npz":
        raise ValueError("--batch wants at least 1, --save-stats NAME.npz")
    sources = [open_source(text, args.n, args.resolution, args.data_dir)
               for text in (args.samples, args.ref) if text]
    wants = []                             # of each source: moments, Inception Score, features kept
    for k, source in enumerate(sources):
        keep, score = (KEPT_REFERENCE, False) if k else (source.count, args.score)
        moments = [mu for mu in ["mu"] + ["mu_s"] * args.sfid if mu not in source.statistics]
        wants.append((moments, score, keep if args.pr or args.kid else 0))
        if not source.count and (moments or score or args.pr or args.kid):
            raise ValueError(f"{source.name}: statistics alone, but the flags ask for "
                             f"{', '.join(moments) or 'features'} of images")

    width = next((len(s.statistics["mu"]) for s in sources if "mu" in s.statistics), None)
    named = {s.name: s.statistics["features"] for s in sources if "features" in s.statistics}
    unnamed = INCEPTION if width in (None, FEATURES) else f"of width {width}, of an unknown network"
    extract, needed = None, any(map(any, wants))
    name = INCEPTION if needed else next(iter(named.values()), unnamed)
    if args.features:
        extract, name = load_extractor(args, device)
    for source in sources:
        if named.get(source.name, name) != name:
            raise ValueError(f"{source.name}: statistics of {named[source.name]}, not of {name}; "
                             "--features FILE gives another network")
    if needed and not extract:             # after the checks, because it may be downloaded
        extract, _ = load_extractor(args, device)

    sides = []
    for source, want in zip(sources, wants):
        side = dict(source.statistics)     # they go before those of the file's images, as in ADM
        if any(want):
            side |= collect(source, extract, *want, width, args.batch, device, rank, world)
        if rank == 0 and side.get("n", FEW) < FEW:
            print(f"warning: {source.name}: figures from {side['n']} images, fewer than {FEW:,}, "
                  f"say little", file=sys.stderr)
        sides.append(side)
    return sides, name


def compare(args, sides, name, device):
    """The figures that the flags ask for, from what `measure` returns: a dict of floats."""
    figures, file = {}, name.split(" sha256:")[0]
    fid, kid = ("FID", "KID") if name == INCEPTION else (f"Frechet distance ({file})",
                                                         f"kernel distance ({file})")
    if args.ref:
        figures[fid] = frechet_distance(*(side[key] for side in sides for key in ("mu", "sigma")))
    if args.sfid:
        figures["sFID"] = frechet_distance(*(s[key] for s in sides for key in ("mu_s", "sigma_s")))
    if args.score:
        figures["IS"], figures["IS std"] = inception_score(sides[0]["parts"])
    if args.pr or args.kid:
        kept = [side["kept"].to(device) for side in sides]
    if args.pr:
        figures["precision"], figures["recall"] = precision_recall(*kept)
    if args.kid:
        figures[kid], figures[kid + " std"] = kernel_distance(*kept)
    return figures


@run.program("take fewer images at once by --batch")
def main():
    args = parse_args()
    run.check_output(args.save_stats, args.json)
    device, rank, world = run.start_processes(args.device)
    torch.backends.cudnn.allow_tf32 = False          # it rounds features to 10 bits
    try:
        sides, name = measure(args, device, rank, world)
        figures = compare(args, sides, name, device) if rank == 0 else {}
    except ValueError as e:
        run.fail(" ".join(str(e).split()))          # a library's message may have several lines
    run.end_processes()
    if rank:
        return
    counts = [side.get("n") for side in sides] + [None]          # of statistics it may be unknown
    for role, source, count in zip(("samples", "reference"), (args.samples, args.ref), counts):
        print(f"{role:12}{source or 'none'}" + (f" ({count:,} images)" if count else ""))
    print(f"{'features':12}{name}")
    for key, figure in figures.items():
        print(f"{key:40}{figure:12.6f}")
    try:
        if args.json:
            args.json.write_text(json.dumps(dict(
                figures=figures, samples=args.samples, n=counts[0], ref=args.ref, ref_n=counts[1],
                features=name, torch=torch.__version__, command=shlex.join(["python", *sys.argv])),
                indent=2) + "\n")
        if args.save_stats:
            known = {key: np.asarray(sides[0][key]) for key in STATISTICS if key in sides[0]}
            np.savez(args.save_stats, **known | dict(features=name))
    except OSError as e:
        run.fail(e)


if __name__ == "__main__":
    main()
