"""What the methods share beside networks: images in and out, seeds, command lines, run directories.

    load(name, ...)        a Dataset in memory; its `batch` is addressed by (seed, step)
    glyphs(n, size, seed)  class-conditional coloured digits, drawn here; nothing is downloaded
    to_uint8, save_grid    pixels are floats in [-1, 1] inside the methods and uint8 on disk
    seed_of, generator     random numbers that follow from a key alone
    Parser, fail           command lines whose errors are one line and exit code 2
    start_processes        torchrun's processes and their devices
    open_run, open_log     run directories, which the same command resumes, and their checkpoints
"""

import argparse
import ast
import ctypes
import hashlib
import itertools
import json
import os
import pathlib
import sys
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont


# --------------------------------------------------------------------------------------------------
# Glyphs: a distribution that ships as code.

SUPERSAMPLING = 4          # a glyph is drawn this many times larger, then averaged down


@lru_cache(maxsize=None)
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


def glyphs(n, size=16, seed=0):
    """n coloured digits in Pillow's bundled TrueType font; image i shows the digit i % 10.

    Deterministic by (seed, i), so any amount of the true distribution can be had.
    Returns images uint8 [n, size, size, 3] and labels int64 [n]. About 0.3 ms an image.
    """
    images = np.stack([_glyph(i, size, seed) for i in range(n)])
    return images, np.arange(n, dtype=np.int64) % 10


# --------------------------------------------------------------------------------------------------
# Data sets.

class Dataset:
    """Labelled images in memory: images uint8 [N, H, W, C], labels int64 [N] below num_classes."""

    def __init__(self, images, labels, num_classes):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(labels)
        self.num_classes = num_classes
        self.shape = tuple(self.images.shape[1:])          # (C, H, W)

    def index(self, seed, step, batch, rows=slice(None)):
        """Which samples are the `rows` of a step's batch: int64 [b].

        Consecutive entries of a fresh permutation each epoch, so that each sample is seen once an
        epoch; a function of (seed, step, batch) alone, whatever the processes and resumes.
        """
        n = len(self.labels)
        place = torch.arange(step * batch, (step + 1) * batch)[rows]
        index = torch.empty_like(place)
        for epoch in (place // n).unique().tolist():
            here = place // n == epoch
            index[here] = _permutation(n, seed, epoch)[place[here] % n]
        return index

    def batch(self, seed, step, batch, rows=slice(None)):
        """x1 float [b, C, H, W] in [-1, 1] and y int64 [b]: those samples."""
        index = self.index(seed, step, batch, rows)
        return self.images[index].float() / 127.5 - 1, self.labels[index]


class Glyphs(Dataset):
    """n glyphs, each drawn when it is first asked for and then kept."""

    def __init__(self, n, size, seed):
        self.size, self.seed, self.drawn = size, seed, torch.zeros(n, dtype=torch.bool)
        super().__init__(np.zeros((n, size, size, 3), np.uint8), np.arange(n) % 10, num_classes=10)

    def batch(self, seed, step, batch, rows=slice(None)):
        index = self.index(seed, step, batch, rows)
        for i in index[~self.drawn[index]].tolist():
            glyph = torch.from_numpy(_glyph(i, self.size, self.seed))
            self.images[i], self.drawn[i] = glyph.permute(2, 0, 1), True
        return super().batch(seed, step, batch, rows)


@lru_cache(maxsize=2)
def _permutation(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def load(name, resolution, n=20_000, seed=0):
    """The data set `name` at `resolution`; ValueError for an unknown name or an impossible size."""
    if name != "glyphs":
        raise ValueError(f"unknown data set {name!r}; there is: glyphs")
    if resolution < 12:
        raise ValueError(f"glyphs of {resolution} pixels are not legible; take 12 or more")
    return Glyphs(n, resolution, seed)


# --------------------------------------------------------------------------------------------------
# Images out.

def to_uint8(x):
    """clip(round(127.5 x + 127.5)): float [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], CPU."""
    x = (x.float() * 127.5 + 127.5).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).cpu()


def save_grid(path, images, columns, scale=1):
    """A PNG of uint8 images [N, H, W, C], `columns` in a row, each pixel enlarged `scale` times."""
    images = np.asarray(images)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, c), 255, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)
    Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1)).save(path)


# --------------------------------------------------------------------------------------------------
# Seeds.

def seed_of(*key):
    """A seed that follows from the key (plain values) alone: no random state needs to be saved."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(device, *key):
    """A random generator on `device`, seeded by the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


# --------------------------------------------------------------------------------------------------
# Command lines and processes.

def fail(message):
    """Ends the program by a user's mistake: one line, on process 0, and exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _literal(text):
    """A number, tuple, ... as Python writes it, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        fail(f"{message} (see --help)")

    def parse(self, method, presets):
        """A training script's flags; the preset's row fills in those that were not given."""
        args = self.parse_args()
        args.preset = args.preset or args.data
        if args.preset not in presets:
            fail(f"unknown data set {args.data!r}; there is: {', '.join(presets)}")
        row = dict(presets[args.preset])
        try:
            given = {k: _literal(v) for k, v in (item.split("=") for item in args.net)}
        except ValueError:
            fail(f"--net {' '.join(args.net)}: want KEY=VALUE, as in width=64 mult=1,2,2")
        net = row.pop("net")               # its options are those of its network alone
        args.net = given if given.get("name", net["name"]) != net["name"] else net | given
        args.pretrain_batch = args.pretrain_batch or args.batch         # one given for both
        for name, value in row.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        args.out = args.out or f"runs/{method}-{args.data}"
        args.pretrain = 0 if args.teacher else args.pretrain
        pieces = args.accum * int(os.environ.get("WORLD_SIZE", 1))
        if min(args.accum, args.batch, args.save_every, args.log_every, args.preview_every) < 1:
            fail("--accum, --batch, --save-every, --log-every, --preview-every: at least 1")
        for batch in (args.batch, args.pretrain_batch or args.batch):
            if batch % pieces:
                fail(f"--batch {batch} is no multiple of {pieces} (processes times --accum)")
        if min(args.steps, args.pretrain) < 0 or args.steps + args.pretrain == 0:
            fail("--steps and --pretrain must not be negative, nor both 0")
        return args


def _keep_freed_memory():
    """Has glibc keep what is freed: large blocks go back to the system otherwise, and come again as
    new pages, which takes a tenth or more of a training step on a CPU. No effect elsewhere."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((-1, 2 ** 31 - 1), (-2, 2 ** 26), (-3, 2 ** 25)):
        mallopt(option, value)     # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def start_processes(device):
    """Joins torchrun's processes, if it started this one: NCCL on CUDA, gloo on the CPU.

    device: "cpu", "cuda", "cuda:N" or None for the best there is. Returns (device, rank, world).
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        fail(f"--device {device}: want cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {device}: no such CUDA GPU here; use --device cpu")
    if device.type == "cpu":
        _keep_freed_memory()
    if "WORLD_SIZE" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


# --------------------------------------------------------------------------------------------------
# Runs: checkpoints, directories, logs.

def save_checkpoint(path, checkpoint):
    """Writes a dict of plain values and tensors to a file beside `path` (a pathlib.Path), then
    renames it: a kill at any moment leaves the old checkpoint or the new one."""
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def read_checkpoint(path):
    """What a checkpoint file holds, on the CPU; nothing in it is executed.

    Returns a dict with method, args, step, model, ema, optimizer and torch_version.
    Raises ValueError if the file is missing, damaged or of another kind.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as e:
        raise ValueError(f"{path} is no readable checkpoint, truncated or foreign "
                         f"({type(e).__name__})") from None
    needed = {"method", "args", "step", "model", "ema"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of facm.py, decm.py or gcm.py")
    return checkpoint


MAY_CHANGE = "steps save_every log_every preview_every device accum fresh out".split()


def open_run(args, method, rank):
    """The run directory and its newest checkpoint, or None. --fresh renames an old directory to
    NAME.old-K. Raises ValueError if the run is another method's, or was begun with other flags."""
    out = pathlib.Path(args.out)
    if rank == 0:
        if args.fresh and out.exists():
            names = (out.with_name(f"{out.name}.old-{k}") for k in itertools.count(1))
            old = out.rename(next(name for name in names if not name.exists()))
            print(f"--fresh: the old run is now {old}")
        out.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()
    if not (out / "ckpt.pt").exists():
        return out, None
    checkpoint = read_checkpoint(out / "ckpt.pt")
    if checkpoint["method"] != method:
        raise ValueError(f"{out} is a run of {checkpoint['method']}.py; use --out or --fresh")
    for name, old in checkpoint["args"].items():
        new = getattr(args, name, None)
        if new != old and (name not in MAY_CHANGE or name == "steps" and args.lr_final < 1):
            raise ValueError(f"{out} was begun with {name} {old}, not {new}; use --out or --fresh")
    return out, checkpoint


def open_log(path, step):
    """log.jsonl, opened to append to, without the lines that a killed run left past `step`."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(n for n in lines if n.endswith("\n") and json.loads(n)["step"] <= step))
    return open(path, "a", buffering=1)
