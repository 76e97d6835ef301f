"""Images -> latents: shards in LightningDiT's layout, which --data imagenet_latents reads.

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
    p = flags.Parser(description="Images to shards of latents.")
    a = p.add_argument
    a("--images", required=True, help="folder, zip, npz, or glyphs, mnist, fashion or "
      "cifar10; grey images become RGB")
    a("--vae", required=True, help="checkpoint of an AutoencoderKL")
    a("--out", required=True, help="folder of the shards; the same command continues in it")
    a("--resolution", type=flags.number(int, 1), default=256, help="crop and scale to it")
    a("--batch", type=flags.number(int, 1), default=16, help="images at a time")
    a("--shard", type=flags.number(int, 1), default=10_000, help="images in a shard")
    a("--seed", type=int, default=0, help="seed of the posterior's noise")
    a("--device", help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    a("--skip-broken", action="store_true", help="list and leave out images that do not decode; "
      "may be added when the command continues")
    return p.parse_args()


def encode(args):
    """Writes the latents of images, and of the mirrored images, in LightningDiT's layout: a sample
    of the autoencoder's posterior each, with noise from (seed, image). Whole shards are kept."""
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
        # Each process has consecutive images, and each shard of a process as well
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
            data.save_stats(out)
            print(f"{out}: {len(images.labels)} images encoded")
    except (ValueError, OSError) as e:     # of this process's own images
        fail(e, always=True)
    processes.end()


def load_autoencoder(path):
    """The autoencoder in a checkpoint; ValueError if there is none."""
    vae = weights.load(path).requires_grad_(False)
    if not hasattr(vae, "encode"):
        raise ValueError(f"{path} is no autoencoder")
    return vae


def load_images(args, factor):
    """The images to encode, a Dataset. factor: that by which the autoencoder makes images smaller.
    Raises ValueError if they cannot be encoded."""
    if data.kind_of(args.images) == "latents":
        raise ValueError(f"{args.images} holds no images, but latents")
    images = data.open_data(args.images, args.resolution, skip_broken=args.skip_broken)
    if images.labels.min() < 0:
        raise ValueError(f"{args.images}: labels from {images.labels.min()} on; number them from 0 "
                         "on")
    if images.shape[1] % factor:
        raise ValueError(f"--resolution {images.shape[1]} is no multiple of {factor}")
    return images


def number_images(images):
    """The number of each sample among all images, int64 [N], and how many images there are. Broken
    ones count, so that leaving them out changes neither the shards nor the noise of the others."""
    if isinstance(images, data.Files):
        return images.numbers, len(images.tree.names)
    n = len(images.labels)
    return torch.arange(n), n


def identify(images):
    """What the images are, whatever their place: a hash of the names of all files, the broken ones
    included, or of the content of arrays."""
    if not isinstance(images, data.Files):
        return data.fingerprint(images)
    names = "\n".join(images.tree.names).encode(errors="surrogatepass")
    return hashlib.sha256(names).hexdigest()[:12]


def claim(out, rank, setting):
    """Makes this program the owner of the folder of the shards, and notes its setting (a dict) in
    encode.json. Raises ValueError if the folder holds shards of another setting."""
    if rank == 0:
        folders.own(out)
    processes.barrier()
    note = out / "encode.json"
    if note.exists():
        check_setting(note, setting)
    elif any(out.glob("*.safetensors")):
        raise ValueError(f"{out} holds shards of another origin; use another --out")
    processes.barrier()                    # all have read it before it is written
    if rank == 0:
        note.write_text(json.dumps(setting))


def check_setting(note, setting):
    """Raises ValueError if a folder was begun with another setting, or if its note is damaged."""
    try:
        old = json.loads(note.read_bytes())
        old.items()                        # it is a dict
    except Exception as e:                 # a foreign file may hold anything
        raise ValueError(f"{note} cannot be read ({type(e).__name__}), so that nothing says what "
                         f"the shards in {note.parent} are; use another --out") from None
    for name, value in setting.items():
        if old.get(name) != value:
            raise ValueError(f"{note.parent} was begun with {name} {old.get(name)}, not {value}; "
                             "use another --out")


def check_shard(path):
    """Raises ValueError if a shard that is there already cannot be read."""
    try:
        data.map_shard(path)
    except ValueError as e:
        raise ValueError(f"{e}; remove it, and the same command encodes it anew") from None


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
        labels=images.labels[rows]))
    part = pathlib.Path(f"{path}.part")    # it becomes a shard when it is whole
    part.write_bytes(shard)
    os.replace(part, path)


@processes.program("use fewer images at once by --batch; whole shards are kept")
def main():
    args = parse_args()
    data.escape_names()
    try:
        encode(args)
    except KeyboardInterrupt:
        print("interrupted; the same command continues with its shard", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
