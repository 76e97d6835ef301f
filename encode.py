"""Encodes images as latents, in shards of LightningDiT's format, for --data imagenet_latents.

    python encode.py --images DIR --vae CKPT --out LATENTS
    torchrun --nproc_per_node=8 encode.py --images DIR --vae CKPT --out LATENTS
"""

import hashlib
import json
import os
import pathlib
import sys

import safetensors.torch
import torch
from tqdm import tqdm

import data
from common import checkpoints, flags, folders, processes, seeds, weights
from common.messages import fail


def parse_args():
    p = flags.Parser(description="Encodes images as latents, in shards for --data "
                     "imagenet_latents.")
    a = p.add_argument
    a("--images", required=True, help="folder, zip, npz, or glyphs, mnist, fashion or "
      "cifar10; grey images become RGB")
    a("--vae", required=True, help="checkpoint of an AutoencoderKL")
    a("--out", required=True, help="folder of the shards; the same command resumes there")
    a("--resolution", type=flags.number(int, 1), default=256, help="crop and scale images to it")
    a("--batch", type=flags.number(int, 1), default=16, help="images that are encoded at once")
    a("--shard", type=flags.number(int, 1), default=10_000, help="images in a shard")
    a("--seed", type=int, default=0, help="seed of the posterior's noise")
    a("--device", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    a("--skip-broken", action="store_true", help="list and leave out images that cannot be "
      "decoded; may be added when the command is resumed")
    return p.parse_args()


def encode(args):
    """Writes the latents of images and of the mirrored images. Each is a sample of the posterior of
    the autoencoder, whose noise depends only on the seed and the image. Finished shards are kept.
    """
    device, rank, world = processes.start(args.device)
    out = pathlib.Path(args.out)
    try:
        vae = load_autoencoder(args.vae).to(device)
        images = load_images(args, vae.factor)
        numbers, n = number_images(images)
        claim(out, rank, dict(
            images=identify(images), vae=checkpoints.fingerprint(args.vae),
            resolution=images.shape[1], n=n, shard=args.shard, processes=world, seed=args.seed))
    except (ValueError, OSError) as e:
        fail(e)
    try:
        # A process has consecutive images, and so has each of its shards
        first, end = n * rank // world, n * (rank + 1) // world
        for shard, start in enumerate(range(first, end, args.shard)):
            stop = min(start + args.shard, end)
            rows = torch.nonzero((numbers >= start) & (numbers < stop)).flatten()
            path = out / f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"
            if path.exists():
                check_shard(path)
            elif len(rows):                # none if all of them are broken
                write_shard(path, vae, images, rows, numbers, args, device, quiet=rank > 0)
        processes.barrier()
        if rank == 0:
            data.save_stats(out, vae.scale)
            print(f"{out}: {len(images.labels)} images encoded")
    except (ValueError, OSError) as e:     # of images that only this process reads
        fail(e, always=True)
    processes.end()


def load_autoencoder(path):
    """The autoencoder in a checkpoint. Raises ValueError for another network."""
    vae = weights.load(path).requires_grad_(False)
    if not hasattr(vae, "encode"):
        raise ValueError(f"{path} is not an autoencoder")
    return vae


def load_images(args, factor):
    """The images to encode, a Dataset. factor: how much smaller the latents are than the images.
    Raises ValueError if the images cannot be encoded."""
    if data.kind_of(args.images) == "latents":
        raise ValueError(f"{args.images} contains latents and not images")
    images = data.open_data(args.images, args.resolution, skip_broken=args.skip_broken)
    if images.labels.min() < 0:
        raise ValueError(f"{args.images}: labels begin at {images.labels.min()}; number them from "
                         "0 on")
    if images.shape[1] % factor:
        raise ValueError(f"--resolution {images.shape[1]} is not a multiple of {factor}")
    return images


def number_images(images):
    """The number of each sample among all images, int64 [N], and the number of all images. Broken
    images are included, so that leaving them out changes neither the shards nor the noise of the
    others."""
    if isinstance(images, data.Files):
        return images.numbers, len(images.tree.names)
    n = len(images.labels)
    return torch.arange(n), n


def identify(images):
    """A hash that identifies the images and does not depend on their path: of the names of all
    files, including broken ones, or of the content of arrays."""
    if not isinstance(images, data.Files):
        return data.fingerprint(images)
    names = "\n".join(images.tree.names).encode(errors="surrogatepass")
    return hashlib.sha256(names).hexdigest()[:12]


def claim(out, rank, setting):
    """Makes this program the owner of the folder of the shards, and writes its settings (a dict) to
    encode.json. Raises ValueError if the folder has shards of other settings."""
    if rank == 0:
        folders.own(out)
    processes.barrier()
    note = out / "encode.json"
    if note.exists():
        check_setting(note, setting)
    elif any(out.glob("*.safetensors")):
        raise ValueError(f"{out} has shards that encode.py did not write; use another --out")
    processes.barrier()                    # all have read it before it is written
    if rank == 0:
        note.write_text(json.dumps(setting))


def check_setting(note, setting):
    """Raises ValueError if a folder was begun with other settings, or if encode.json is damaged."""
    try:
        old = json.loads(note.read_bytes())
        old.items()                        # it is a dict
    except Exception as e:                 # the file may contain anything
        raise ValueError(f"{note} cannot be read ({type(e).__name__}), so the settings of the "
                         f"shards in {note.parent} are not known; use another --out") from None
    for name, value in setting.items():
        if old.get(name) != value:
            raise ValueError(f"{note.parent} was begun with {name} {old.get(name)}, not {value}; "
                             "use another --out")


def check_shard(path):
    """Raises ValueError if a finished shard cannot be read."""
    try:
        data.map_shard(path)
    except ValueError as e:
        raise ValueError(f"{e}; remove it, and the same command encodes it again") from None


def write_shard(path, vae, images, rows, numbers, args, device, quiet):
    """Encodes the images with these rows of the data set, and writes them as a shard."""
    straight, mirrored = [], []
    for part in tqdm(rows.split(args.batch), desc=path.stem, disable=quiet):
        for latents, mirror in ((straight, False), (mirrored, True)):
            x = images.items(part, torch.full((len(part),), mirror)).to(device)
            x = x.expand(-1, 3, -1, -1)    # the three channels of a grey image are equal
            mean, std = vae.encode(x)
            noise = [torch.randn(mean.shape[1:],
                                 generator=seeds.generator("cpu", args.seed, number, mirror))
                     for number in numbers[part].tolist()]
            latents.append((mean + std * torch.stack(noise).to(device)).cpu())
    shard = safetensors.torch.save(dict(
        latents=torch.cat(straight).contiguous(), latents_flip=torch.cat(mirrored).contiguous(),
        labels=images.labels[rows]), metadata=None if images.num_classes else data.NO_LABELS)
    part = pathlib.Path(f"{path}.part")    # renamed when it is complete
    part.write_bytes(shard)
    os.replace(part, path)


@processes.program("use fewer images at once by --batch; finished shards are kept")
def main():
    args = parse_args()
    data.escape_names()
    try:
        encode(args)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes at the unfinished shard", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
