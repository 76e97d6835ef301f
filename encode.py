"""Images -> latents: shards in LightningDiT's layout, which --data imagenet_latents reads.

    python encode.py --images DIR --vae CKPT --out LATENTS
    torchrun --nproc_per_node=8 encode.py --images DIR --vae CKPT --out LATENTS
"""

import json
import os
import pathlib
import sys

import safetensors.torch
import torch
from tqdm import tqdm

import data
from common import flags, folders, processes, seeds, weights
from common.messages import fail


def parse_args():
    p = flags.Parser(description="Images to shards of latents.")
    a = p.add_argument
    a("--images", required=True, help="folder, zip or npz")
    a("--vae", required=True, help="checkpoint of an AutoencoderKL")
    a("--out", required=True, help="folder of the shards; a second run goes on")
    a("--resolution", type=flags.number(int, 1), default=256, help="crop and scale to it")
    a("--batch", type=flags.number(int, 1), default=16, help="images at a time")
    a("--shard", type=flags.number(int, 1), default=10_000, help="images in a shard")
    a("--seed", type=int, default=0, help="seed of the posterior's noise")
    a("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    a("--skip-broken", action="store_true", help="list and leave out broken images")
    return p.parse_args()


def encode(args):
    """Writes the latents of images, and of the mirrored images, in LightningDiT's layout: a sample
    of the autoencoder's posterior each, with noise from (seed, image). Whole shards are kept."""
    device, rank, world = processes.start(args.device)
    out = pathlib.Path(args.out)
    try:
        vae = weights.load(args.vae).to(device).requires_grad_(False)
        if not hasattr(vae, "encode"):
            raise ValueError(f"{args.vae} is no autoencoder")
        images = data.load(args.images, args.resolution, skip_broken=args.skip_broken)
        if not isinstance(images, (data.Files, data.Images)):
            raise ValueError(f"{args.images} holds no images")
        if images.shape[0] != 3:
            raise ValueError(f"{args.images}: grey images; the autoencoder takes RGB")
        if images.shape[1] % vae.factor:
            raise ValueError(f"--resolution {images.shape[1]} is no multiple of {vae.factor}")
        if rank == 0:
            folders.own(out)
        processes.barrier()
        setting = dict(images=str(args.images), vae=str(args.vae), resolution=images.shape[1],
                       n=len(images.labels), shard=args.shard, processes=world, seed=args.seed)
        note = out / "encode.json"
        if not note.exists() and any(out.glob("*.safetensors")):
            raise ValueError(f"{out} holds shards of another origin; use another --out")
        if note.exists() and json.loads(note.read_text()) != setting:
            raise ValueError(f"{out} was begun with {note.read_text()}; use another --out")
        processes.barrier()                             # all have read it before it is written
        if rank == 0:
            note.write_text(json.dumps(setting))
    except (ValueError, OSError) as e:
        fail(e)
    try:
        first, end = (len(images.labels) * k // world for k in (rank, rank + 1))
        for number, start in enumerate(range(first, end, args.shard)):
            path = out / f"latents_rank{rank:02d}_shard{number:03d}.safetensors"
            rows = torch.arange(start, min(start + args.shard, end))
            if path.exists():
                data.map_shard(path)
                continue
            z = {"latents": [], "latents_flip": []}
            for part in tqdm(rows.split(args.batch), desc=path.stem, disable=rank > 0):
                for name in z:
                    mirror = name == "latents_flip"
                    x = images.items(part, torch.full((len(part),), mirror)).to(device)
                    mean, std = vae.encode(x)
                    draws = (seeds.generator("cpu", args.seed, i, mirror) for i in part.tolist())
                    noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in draws])
                    z[name].append((mean + std * noise.to(device)).cpu())
            tensors = {name: torch.cat(parts).contiguous() for name, parts in z.items()}
            shard = safetensors.torch.save(tensors | {"labels": images.labels[rows]})
            pathlib.Path(f"{path}.part").write_bytes(shard)
            os.replace(f"{path}.part", path)
        processes.barrier()
        if rank == 0:
            data.save_stats(out)
            print(f"{out}: {len(images.labels)} images encoded")
    except (ValueError, OSError) as e:     # of this process's own images
        fail(e, always=True)
    processes.end()


@processes.program("take fewer images at once by --batch; whole shards are kept")
def main():
    args = parse_args()
    try:
        encode(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with its shard", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
