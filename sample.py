"""Images from a checkpoint, at any number of function evaluations (NFE).

    python sample.py --ckpt runs/facm-glyphs/ckpt.pt --nfe 1 --n 64 --out grid.png
    python sample.py --ckpt runs/facm-glyphs/ckpt.pt --grid 1 2 4 --n 10 --out grid.png
    python sample.py --ckpt runs/flow-glyphs --nfe 20 --cfg 1.75 --n 2000 --out folder
    torchrun --nproc_per_node=8 sample.py --ckpt CKPT --nfe 1 --samples 50000 --out samples.npz
    python sample.py --ckpt SiT.pt --method flow --vae vae.pt --nfe 99 --sampler heun --out f.npz

--out NAME.png is one grid; NAME.npz holds arr_0 uint8 [N, H, W, 3] and arr_1 labels [N], as ADM's
evaluator reads them (grey samples as RGB); anything else is a folder with a PNG for each sample.
The same command resumes an interrupted npz or folder, with any --batch and number of processes.

The noise of sample i depends only on --seed and i, and the network always evaluates the same ROWS
samples together, because the batch size changes the rounding. On one type of device, an image is
therefore the same to the last bit for any --n, --batch and number of processes. Pixels become
8 bits by clip(round(127.5 x + 127.5)). DIRECTION OF TIME, for flow-matching networks: t=0 noise,
t=1 data.
"""

import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import pathlib
import shutil
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from tqdm import tqdm

import data
import models
from common import checkpoints, flags, folders, imagefiles, processes, seeds, weights
from common.messages import fail

METHODS = ("flow", "facm", "decm", "gcm", "baselines")
PUBLIC_METHODS = ("flow", "facm", "decm")  # those whose samplers need no flags of the training
ROWS, DECODED_ROWS = 64, 8                 # samples in a pass of the network, of the autoencoder


def parse_args():
    p = flags.Parser(description="Draws images with the network of a checkpoint.")
    a = p.add_argument
    a("--ckpt", required=True, type=pathlib.Path, help="run folder, or checkpoint of a training "
      "script or, with --method, a public one")
    a("--out", help="NAME.png (one grid), NAME.npz, or the name of a folder of PNGs (default: "
      "nfeNFE.png beside the checkpoint)")
    a("--nfe", type=int, default=1, help="number of function evaluations; a guided "
      "evaluation counts once")
    a("--n", "--samples", type=int, default=64, help="number of samples; torchrun needs the long "
      "name, because it reads --n as the beginning of its own flags")
    a("--grid", type=int, nargs="+", metavar="NFE", help="NAME.png: a row for each, with the "
      "same seeds")
    a("--labels", default="all", help="all: sample i has class i mod classes, so that each has "
      "n/classes (rounded down, or up for the first of them); random; or a list of numbers or "
      "names of classes, which is repeated: 3,3,7")
    a("--seed", type=int, default=0, help="sample i is drawn from (seed, i)")
    a("--batch", type=int, default=ROWS, help="samples between two writes, rounded up to a "
      f"multiple of {ROWS}")
    a("--sampler", help="facm: cm, euler; baselines: also jumps; decm: cm, euler, mix; gcm: "
      "restart, pushforward; flow matching: euler, heun (default: depends on the method)")
    a("--n-ode", type=int, help="steps along the flow, for decm's sampler mix (default: 2, 4, "
      "12 at NFE 4, 8, 16)")
    a("--times", type=float, nargs="+", help="the times between the steps, in falling order, "
      "for gcm (default: --t-mid of training)")
    a("--cfg", type=float, help="guidance scale of a flow-matching network; a guided "
      "evaluation has two passes (default: 1, which is no guidance)")
    a("--cfg-interval", type=float, nargs=2, metavar=("T0", "T1"), help="guide from time T0 to T1, "
      "where 1 is data (default: from the --t-low of training, or 0, to 1)")
    a("--cfg-channels", type=int, help="guide only this number of channels, the first "
      "ones, as LightningDiT and SiT do with 3 (default: all)")
    a("--shift", type=float, help="LightningDiT's timestep_shift, for a "
      "flow-matching network (default: 1, which shifts nothing)")
    a("--method", choices=PUBLIC_METHODS, help="method of a public network: flow, or the "
      "method that distilled it")
    a("--net", nargs="+", default=[], metavar="K=V", help="options of the public network, such as "
      "prediction=noise")
    a("--weights", metavar="KEY", help="entry of the public file that contains the weights "
      "(default: the averaged weights if there are any, or the model)")
    a("--vae", help="checkpoint of the autoencoder that decodes latents to images")
    a("--latent-stats", help="latents_stats.pt or its folder (default: what the checkpoint "
      "contains, or else the training data's, or the scale of the SD-VAE)")
    a("--raw", action="store_true", help="use the weights themselves, not their average (EMA)")
    a("--export", metavar="FILE.safetensors", type=pathlib.Path, help="write only the network, "
      "in half precision, to a file that --ckpt can read, and exit")
    a("--device", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    return p.parse_args()


# --------------------------------------------------------------------------------------------------
# What is sampled: networks, autoencoders, labels.

def load(path, device="cpu", raw=False, method=None, options=None, key=None):
    """The network of a checkpoint in eval mode, with averaged or raw weights, and the checkpoint.

    method: for a public file, "flow" or the method that distilled it; the returned checkpoint then
    has method, step 1 and args = dict(net=...). options, key: see weights.load. Raises ValueError
    if the file is not a checkpoint.
    """
    if method:
        return load_public(path, device, raw, method, options or {}, key)
    try:
        checkpoint = checkpoints.read(path)
    except ValueError as e:
        if not os.path.exists(path):
            raise
        raise ValueError(f"{e}; for a public network, name its method: --method flow, facm, ..."
                         ) from None
    if "net" not in checkpoint["args"]:
        raise ValueError(f"{path} does not contain the options of its network")
    if checkpoint["method"] not in METHODS:
        raise ValueError(f"{path}: there is no sampler for the method {checkpoint['method']!r}")
    if options or key:
        raise ValueError("--net and --weights are for public files, but a training script of this "
                         f"repository wrote {path}; leave them out")
    net = models.create(**checkpoint["args"]["net"])
    checkpoints.load_weights(net, checkpoint["model" if raw else "ema"], path)
    return net.to(device).eval(), checkpoint


def load_public(path, device, raw, method, options, key):
    """Like load, for a public file."""
    net = weights.load(path, method == "flow", key, **options).to(device)
    if raw:
        raise ValueError(f"{path} has only one kind of weights; leave out --raw, which is for "
                         "checkpoints of the training scripts")
    if hasattr(net, "decode"):
        raise ValueError(f"{path} is an autoencoder; pass it by --vae")
    args = dict(net=weights.options_from_shapes(net.state_dict()) | options)
    return net, dict(method=method, step=1, args=args)


def export(path, net, checkpoint):
    """Writes what sampling needs: the weights in float16, and method, step and flags as JSON."""
    note = {k: json.dumps(checkpoint[k]) for k in ("method", "step", "args")}
    tensors = {k: w.half().contiguous() for k, w in net.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, note))


def load_decoder(path, stats, checkpoint, device="cpu"):
    """decode, factor, tensors. decode makes images [B, 3, factor H, factor W] in [-1, 1] from the
    samples [B, C, H, W] of a network, which are latents (z - mean) / std. tensors: the weights and
    statistics that decode depends on.

    path, stats: --vae, --latent-stats. Raises ValueError if they are missing or do not fit.
    """
    channels = checkpoint["args"]["net"]["in_channels"]
    if channels in (1, 3):
        if path or stats:
            raise ValueError("--vae and --latent-stats are for latents, but this network draws "
                             "images; leave them out")
        return lambda x: x, 1, {}
    if not path:
        raise ValueError(f"this network draws latents of {channels} channels; pass their "
                         "autoencoder by --vae FILE, which decodes them to images")
    vae = weights.load(path).to(device).requires_grad_(False)
    if not hasattr(vae, "decode") or vae.z_channels != channels:
        raise ValueError(f"--vae {path} is not an autoencoder of latents with {channels} channels")
    mean, std = latent_statistics(stats, checkpoint["args"], vae, channels)
    mean, std = mean.to(device), std.to(device)
    tensors = vae.state_dict() | dict(mean=mean, std=std)
    return lambda z: vae.decode(z * std + mean), vae.factor, tensors


def latent_statistics(stats, args, vae, channels):
    """The mean and std with which a network's latents were normalised, from the first of these that
    exists: --latent-stats, the checkpoint, the training data, the scale of the SD-VAE."""
    held = args.get("latent_stats")
    if held and not stats:
        return tuple(torch.tensor(held[key]).reshape(1, channels, 1, 1) for key in ("mean", "std"))
    place = stats or args.get("data_dir") or args.get("data")
    if place:
        if not os.path.exists(place):
            raise ValueError(f"{place}, which should contain the statistics of the latents, does "
                             "not exist; pass them by --latent-stats")
        return data.read_stats(pathlib.Path(place), channels)
    if vae.scale == 1:
        raise ValueError("this network needs --latent-stats FILE: the latents_stats.pt of the "
                         "latents that it was trained on")
    return torch.zeros(()), torch.tensor(1 / vae.scale)


def choose_labels(labels, n, num_classes, seed, names=(), uncond=False):
    """Labels int64 [n] from --labels: all, random, or a list that is repeated, of numbers or of
    class names in `names`. uncond: the network was trained with the null label alone, which is then
    the label of all samples. Raises ValueError for a label that the network does not have."""
    if uncond and num_classes:
        if labels != "all":
            raise ValueError(f"--labels {labels}: the network was trained without labels")
        return torch.full((n,), num_classes)
    if labels == "all":
        return torch.arange(n) % max(num_classes, 1)
    if labels == "random":
        random = seeds.generator("cpu", seed, "labels")
        return torch.randint(max(num_classes, 1), (n,), generator=random)
    words = labels.split(",")
    are_names = [word in names for word in words]          # a name may be a number, such as 10
    are_numbers = [word.strip().removeprefix("-").isdecimal() for word in words]
    if all(are_names):
        numbers = [names.index(word) for word in words]
    elif all(are_numbers) and not any(are_names):
        numbers = [int(word) for word in words]
    else:
        example = f"3,3,7 or {names[0]},{names[-1]}" if names else "3,3,7"
        raise ValueError(f"--labels {labels}: use all, random, or a list of numbers or of names, "
                         f"such as {example}")
    if min(numbers) < 0 or max(numbers) >= num_classes:
        raise ValueError(f"--labels {labels}: the network has {num_classes} classes, which are "
                         "numbered from 0")
    return torch.tensor(numbers)[torch.arange(n) % len(numbers)]


# --------------------------------------------------------------------------------------------------
# Samplers: those of the script that trained the network.

class Sampler(NamedTuple):
    """A sampler, with its options, for one network and NFE."""

    name: str
    noises: int            # K: how many noises a sample needs
    draw: Callable         # draw(noise [K, B, ...], y [B]) -> samples [B, ...]
    options: dict


def choose_sampler(net, checkpoint, nfe, sampler=None, **given):
    """The Sampler for a checkpoint and an NFE.

    sampler: a name, or None for the default. given: options from the command line, or None. Raises
    ValueError for an unknown sampler, or for an option that the sampler does not have.
    """
    args, method = checkpoint["args"], checkpoint["method"]
    flow = weights.is_velocity(checkpoint)
    role = "a flow-matching network" if flow else (
        f"a network of {method}.py (--cfg is for flow-matching networks)")
    try:
        module = importlib.import_module("flow" if flow else method)
        name = sampler or module.default_sampler(nfe, args)
        fits = module.sampler_options(args)
        samplers = {key: module.SAMPLERS[key] for key in fits}
    except (ModuleNotFoundError, KeyError) as e:
        raise ValueError(f"{method}.py cannot sample this checkpoint: {e}") from None
    if name not in samplers:
        raise ValueError(f"--sampler {name} does not exist for {role}; use one of "
                         f"{', '.join(samplers)}")
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in inspect.signature(samplers[name]).parameters:
            raise ValueError(f"--{key.replace('_', '-')} is not an option of the sampler {name} of "
                             f"{role}")
    if flow:
        check_flow_options(net, checkpoint, name, nfe, given)
    options = fits[name] | given
    draw = functools.partial(samplers[name], net, nfe=nfe, **options)
    return Sampler(name, 1 if name in module.DETERMINISTIC else nfe, draw, options)


def check_flow_options(net, checkpoint, name, nfe, given):
    """Raises ValueError for options of flow matching that this network cannot use."""
    cfg, (start, end) = given.get("cfg", 1), given.get("cfg_interval", (0, 1))
    if cfg != 1 and (not net.num_classes or checkpoint["args"].get("uncond")):
        raise ValueError("--cfg needs a network that was trained with labels, and this one was not")
    if not math.isfinite(cfg) or not 0 <= start <= end <= 1:
        raise ValueError("--cfg must be finite, and --cfg-interval T0 T1 needs 0 <= T0 <= T1 <= 1")
    if cfg == 1 and ("cfg_interval" in given or "cfg_channels" in given):
        raise ValueError("--cfg-interval and --cfg-channels have no effect without guidance; add "
                         "--cfg")
    if given.get("cfg_channels", 1) > checkpoint["args"]["net"]["in_channels"]:
        raise ValueError(f"--cfg-channels {given['cfg_channels']}: the network has only "
                         f"{checkpoint['args']['net']['in_channels']} channels")
    if name == "heun" and nfe % 2 == 0:
        raise ValueError(f"the sampler heun needs an odd NFE, not {nfe}: it evaluates the network "
                         "twice in each step and once in the last")


# --------------------------------------------------------------------------------------------------
# Samples: the same for any batch size.

def draw_noise(seed, indices, count, shape):
    """Standard normal noise [count, len(indices), *shape], drawn from (seed, i) for sample i."""
    return torch.stack([
        torch.randn((count, *shape), generator=seeds.generator("cpu", seed, "sample", i))
        for i in indices], dim=1)


def in_rows(function, rows, *inputs):
    """function(*inputs) [b, ...], with `rows` samples in each call. Zeros fill up the last one."""
    outputs = []
    for parts in zip(*(x.split(rows) for x in inputs)):
        missing = rows - len(parts[0])
        padded = [torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) for x in parts]
        outputs.append(function(*padded)[:rows - missing])
    return torch.cat(outputs)


@torch.no_grad()
def draw_batch(net, checkpoint, chosen, seed, first, labels):
    """Samples first, first+1, ... with these labels, by the sampler `chosen`: [b, C, H, W] on the
    network's device. first: a multiple of ROWS. On CUDA this returns before they are computed."""
    device = next(net.parameters()).device
    options = checkpoint["args"]["net"]
    shape = (options["in_channels"], options["input_size"], options["input_size"])
    numbers = range(first, first + len(labels))
    noise = draw_noise(seed, numbers, chosen.noises, shape).transpose(0, 1)
    inputs = processes.to_device([noise.contiguous(), labels], device)

    def draw_rows(noise, y):
        return chosen.draw(noise.transpose(0, 1).contiguous(), y)

    return in_rows(draw_rows, ROWS, *inputs)


def to_pixels(decode, x, first):
    """Images uint8 [b, H, W, C], NumPy, of the samples x from number `first` on. Raises
    FloatingPointError if they are not finite, because as images they would only be black."""
    images = in_rows(decode, DECODED_ROWS, x)
    if not images.isfinite().all():
        raise FloatingPointError(
            f"samples from number {first} on are not finite: look at the weights, and at --cfg")
    return data.to_uint8(images).numpy()


def draw(net, checkpoint, nfe, labels, seed=0, decode=lambda x: x, **choice):
    """The samples 0, 1, ... with labels int64 [n], in memory: uint8 [n, H, W, C], NumPy.

    choice: the sampler and its options, see choose_sampler; decode: see load_decoder.
    """
    chosen = choose_sampler(net, checkpoint, nfe, **choice)
    return np.concatenate([
        to_pixels(decode, draw_batch(net, checkpoint, chosen, seed, i, labels[i:i + ROWS]), i)
        for i in range(0, len(labels), ROWS)])


# --------------------------------------------------------------------------------------------------
# Streams to disk.

def fingerprint(tensors):
    """A hash of a dict of tensors."""
    digest = hashlib.sha256()
    for name, w in tensors.items():
        digest.update(name.encode() + w.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


BEGUN = {"arr_0.npy", "done", "settings.part", ".owner"}       # may be there before settings.json


def begin(folder, settings, shape, npz):
    """Makes the folder of a stream, or opens one that was begun with the same settings. Returns
    which samples are done, bool [N], and the place of the first image in an npz's file of images.
    The folder has settings.json, done, and for an npz the images, whose shape is [N, H, W, 3].
    Raises ValueError, before anything is written, if another command began the folder."""
    note, existed = folder / "settings.json", folder.exists()
    settings = json.loads(json.dumps(settings))            # tuples become lists, as in the file
    if existed:
        folders.own(folder)
    if note.exists():
        check_settings(note, settings)
    elif existed and (not folder.is_dir() or {p.name for p in folder.iterdir()} - BEGUN):
        raise ValueError(f"{folder} exists, and this command did not create it; use another --out")
    if not note.exists():
        if not existed:
            folders.own(folder)
        if npz:
            np.lib.format.open_memmap(folder / "arr_0.npy", "w+", np.uint8, shape)
        (folder / "done").write_bytes(bytes(shape[0]))
        note.with_suffix(".part").write_text(json.dumps(settings))
        os.replace(note.with_suffix(".part"), note)
    done = (folder / "done").read_bytes() if (folder / "done").exists() else b""
    if len(done) != shape[0]:
        raise ValueError(f"{folder}/done is damaged; use another --out, or remove {folder}")
    offset = np.load(folder / "arr_0.npy", mmap_mode="r").offset if npz else 0
    return np.frombuffer(done, bool), offset


def check_settings(note, settings):
    """Raises ValueError if the file `note` is damaged or has other settings."""
    folder = note.parent
    try:
        old = dict(json.loads(note.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{note} is damaged; use another --out, or remove {folder}") from None
    for key, value in settings.items():
        if old.get(key) != value:
            raise ValueError(f"{folder} was begun with {key} {old.get(key)}, not {value}; use "
                             "another --out, or remove that folder")


def write_at(path, place, content, whole=False):
    """Writes bytes into a file at this offset, through to the disk, or with `whole` a new file. It
    uses no memory map, because its pages would count as memory of the process."""
    # Without "wb" for the first case: the file may exist and not be seen yet on another computer
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0) | (os.O_TRUNC if whole else 0)
    with open(os.open(path, flags, 0o666), "wb") as file:
        file.seek(place)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def encode_png(image):
    """The bytes of a PNG of one image, uint8 [H, W, C] with C 1 or 3."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()


def stream(out, settings, labels, size, batch, rank, world, sample, decode):
    """Draws, by sample(first, end), those samples of this process that are not done. While the next
    batch is drawn, a thread decodes and writes the last one: images uint8 [b, size, size, C].

    out: a folder of NUMBER-classLABEL.png, or NAME.npz. For an npz, all processes first write their
    images into NAME.npz.partial/, so that it needs twice the size of the images on the disk.
    """
    n, npz = len(labels), out.suffix == ".npz"
    batch = math.ceil(batch / ROWS) * ROWS
    folder = out.with_name(out.name + ".partial") if npz else out
    if npz and out.exists() and imagefiles.open_zip(out).namelist() != ["arr_0.npy", "arr_1.npy"]:
        raise ValueError(f"{out} exists and does not contain samples; use another --out")
    done, offset = processes.from_first(lambda: begin(folder, settings, (n, size, size, 3), npz))
    todo = [(i, min(i + batch, n)) for i in range(0, n, batch) if not done[i:i + batch].all()]
    processes.barrier()                    # all have seen what is done before that changes
    todo = todo[len(todo) * rank // world:len(todo) * (rank + 1) // world]

    def keep(first, x):
        pixels = to_pixels(decode, x, first)
        if npz and pixels.shape[3] == 1:   # ADM's layout has three channels
            pixels = pixels.repeat(3, axis=3)
        if npz:
            write_at(folder / "arr_0.npy", offset + first * pixels[0].size, pixels.tobytes())
        else:
            for i, image in enumerate(pixels, first):
                name = f"{i:06d}-class{labels[i]}.png"
                write_at(folder / name, 0, encode_png(image), whole=True)
        write_at(folder / "done", first, bytes([1]) * len(pixels))

    with tqdm(total=sum(j - i for i, j in todo), unit="image", disable=rank > 0) as bar, \
            ThreadPoolExecutor(1) as thread:
        kept = None                        # the batch that the thread is writing
        for first, end in todo:
            x = sample(first, end)
            if kept is not None:
                kept.result()              # so that no more than two batches are held
            kept = thread.submit(keep, first, x)
            bar.update(end - first)
        if kept is not None:
            kept.result()
    processes.barrier()
    if npz and rank == 0:
        pack(folder, out, labels)


def pack(folder, out, labels):
    """Makes the npz from a folder in which all samples are done, and removes the folder."""
    np.save(folder / "arr_1.npy", labels.numpy())
    with zipfile.ZipFile(folder / "npz", "w") as archive:
        for name in ("arr_0.npy", "arr_1.npy"):
            with archive.open(name, "w", force_zip64=True) as member:
                with open(folder / name, "rb") as source:
                    shutil.copyfileobj(source, member, 2 ** 20)
    write_at(folder / "npz", 0, b"")       # through to the disk
    os.replace(folder / "npz", out)
    folders.disown(folder)                 # NFS does not remove the folder of an open file
    shutil.rmtree(folder)


def default_out(args, nfes):
    """The default path of the grid: beside the checkpoint, with the NFE in its name."""
    name = f"nfe{'-'.join(map(str, nfes))}.png"
    if args.ckpt.suffix == ".safetensors":
        name = f"{args.ckpt.stem}-{name}"
    return args.ckpt.parent / name


def check_args(args, nfes, out):
    """Ends the program for flags that cannot be combined."""
    if min(*nfes, args.n, args.batch) < 1:
        fail("--nfe, --grid, --n and --batch must be at least 1")
    if args.cfg_channels is not None and args.cfg_channels < 1:
        fail("--cfg-channels must be at least 1")
    if args.grid and out.suffix != ".png":
        fail(f"--out {out}: --grid draws into a file; use NAME.png")
    if out.suffix in (".png", ".npz") and out.is_dir():
        fail(f"--out {out} is a folder with the name of a file; use NAME.png, NAME.npz or another "
             "folder")
    images = (".png", ".npz", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".zip")
    if out.suffix.lower() in images and out.suffix not in (".png", ".npz"):
        fail(f"--out {out}: this format cannot be written; use NAME.png, NAME.npz or a folder")
    if args.shift is not None and not 1e-3 <= args.shift <= 1e3:
        fail(f"--shift {args.shift}: use a number from 0.001 to 1000; 1 does not shift the times")


def save_png(out, args, net, checkpoint, nfes, labels, decode, given):
    """Draws all samples in this process and writes them as one grid."""
    images = np.concatenate([draw(net, checkpoint, nfe, labels, args.seed, decode, **given)
                             for nfe in nfes])
    titles = ()
    columns = math.isqrt(args.n)
    if args.n % 10 == 0:
        columns = 10
    if args.grid:
        columns = args.n
        names = [choose_sampler(net, checkpoint, nfe, **given).name for nfe in nfes]
        titles = [f"NFE {nfe}\n{name}" for nfe, name in zip(nfes, names)]
    out.parent.mkdir(parents=True, exist_ok=True)
    data.save_grid(out, images, columns, max(1, 64 // images.shape[1]), titles)


@processes.program("use another --device, or a smaller network")
def main():
    args = parse_args()
    if args.ckpt.is_dir():
        args.ckpt = args.ckpt / "ckpt.pt"
    nfes = args.grid or [args.nfe]
    out = pathlib.Path(args.out or default_out(args, nfes))
    check_args(args, nfes, out)
    options = flags.parse_net_options(args.net)
    given = {key: getattr(args, key) for key in (
        "sampler", "n_ode", "times", "cfg", "cfg_interval", "cfg_channels", "shift")}
    continues = ""
    if out.suffix != ".png" and not args.export:
        continues = "; the samples that were written are kept, and the same command continues"
    device, rank, world = processes.start(args.device, precision="float32")
    folders.check_output(args.export)
    try:
        net, checkpoint = load(args.ckpt, device, args.raw, args.method, options, args.weights)
        if args.export:
            export(args.export, net, checkpoint)
            return
        decode, factor, decoder = load_decoder(args.vae, args.latent_stats, checkpoint, device)
        labels = choose_labels(args.labels, args.n, net.num_classes, args.seed,
                               checkpoint["args"].get("class_names", ()),
                               checkpoint["args"].get("uncond", False))
        samplers = [choose_sampler(net, checkpoint, nfe, **given) for nfe in nfes]
        if out.suffix == ".png":
            if rank == 0:
                save_png(out, args, net, checkpoint, nfes, labels, decode, given)
        else:
            if args.times or args.n_ode is not None or args.method:
                # Draw one sample first, to see whether the options and a public network fit
                draw(net, checkpoint, args.nfe, labels[:1], **given)
            sampler, net_options = samplers[0], checkpoint["args"]["net"]
            settings = dict(
                weights=fingerprint(net.state_dict()), decoder=fingerprint(decoder),
                net=net_options, method=checkpoint["method"], sampler=sampler.name, nfe=args.nfe,
                n=args.n, options=sampler.options, seed=args.seed, labels=args.labels,
                device=device.type)
            size = factor * net_options["input_size"]
            stream(out, settings, labels, size, args.batch, rank, world,
                   lambda i, j: draw_batch(net, checkpoint, sampler, args.seed, i, labels[i:j]),
                   decode)
    except ValueError as e:
        fail(e)
    except OSError as e:
        fail(f"{e}{continues}", always=True)
    except KeyboardInterrupt:
        print(f"interrupted{continues}", file=sys.stderr)
        sys.exit(130)
    if rank == 0:
        by = ", ".join(f"{sampler.name} at NFE {nfe}" for nfe, sampler in zip(nfes, samplers))
        print(f"{out}: {args.n} samples by {by}")
    processes.end()


if __name__ == "__main__":
    main()
