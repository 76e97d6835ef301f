"""Images from a checkpoint, at any number of function evaluations (NFE).

    python sample.py --ckpt runs/facm-glyphs/ckpt.pt --nfe 1 --n 64 --out grid.png
    python sample.py --ckpt runs/facm-glyphs/ckpt.pt --nfe 2 --n 2000 --out samples.npz
    python sample.py --ckpt runs/facm-glyphs/teacher.pt --nfe 20 --cfg 1.75 --n 100 --out folder
    torchrun --nproc_per_node=8 sample.py --ckpt CKPT --nfe 1 --samples 50000 --out samples.npz

--out NAME.png is one grid; NAME.npz holds arr_0 uint8 [N, H, W, 3] and arr_1 labels [N], as ADM's
evaluator reads them; anything else is a folder, one PNG a sample. Sample i draws its noise from
(--seed, i): it is the same image whatever the batch size and the number of processes. Pixels become
8 bits by clip(round(127.5 x + 127.5)).
"""

import math
import pathlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import facm
import models


def parse_args():
    p = data.Parser(description="Images from a checkpoint.")
    a = p.add_argument
    a("--ckpt", required=True, help="checkpoint of facm.py")
    a("--out", required=True, help="NAME.png (one grid), NAME.npz, or a folder of PNGs")
    a("--nfe", type=int, default=1, help="function evaluations: steps of the sampler")
    a("--n", "--samples", type=int, default=64, help="number of samples; torchrun takes only the "
      "long name, because it reads --n as the beginning of its own flags")
    a("--labels", default="all", help="all (i mod classes), random, or a list to repeat: 3,3,7")
    a("--seed", type=int, default=0, help="sample i is drawn from (seed, i)")
    a("--batch", type=int, default=250, help="samples at once in each process; no matter to them")
    a("--sampler", choices=list(facm.SAMPLERS), help="default: cm; euler for a teacher")
    a("--cfg", type=float, default=1.0, help="guidance of a teacher by euler, in 2 passes a step")
    a("--raw", action="store_true", help="the weights themselves, not their average (EMA)")
    a("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    return p.parse_args()


def choose_labels(labels, n, num_classes, seed):
    """int64 [n] from --labels. Raises ValueError for a label that the network does not have."""
    if labels == "all":
        return torch.arange(n) % max(num_classes, 1)
    if labels == "random":
        random = data.generator("cpu", seed, "labels")
        return torch.randint(max(num_classes, 1), (n,), generator=random)
    try:
        given = torch.tensor([int(label) for label in labels.split(",")])
    except ValueError:
        raise ValueError(f"--labels {labels}: want all, random, or a list such as 3,3,7") from None
    if given.min() < 0 or given.max() >= num_classes:
        raise ValueError(f"--labels {labels}: the checkpoint has {num_classes} classes, from 0 on")
    return given[torch.arange(n) % len(given)]


def load(path, device="cpu", raw=False):
    """The network of a checkpoint in eval mode, with averaged or raw weights, and the checkpoint.

    Raises ValueError if the file is no checkpoint, or of a method without a sampler here.
    """
    checkpoint = data.read_checkpoint(path)
    if checkpoint["method"] != facm.METHOD:
        raise ValueError(f"{path}: no sampler for the method {checkpoint['method']!r}")
    net = models.create(**checkpoint["args"]["net"]).to(device).eval()
    models.load_weights(net, checkpoint["model" if raw else "ema"], path)
    return net, checkpoint


def is_teacher(checkpoint):
    """Whether a checkpoint is a flow-matching network, not yet distilled."""
    return checkpoint["step"] <= checkpoint["args"]["pretrain"]


def draw_noise(seed, indices, count, shape):
    """[count, len(indices), *shape], standard normal: sample i's noise is drawn from (seed, i)."""
    return torch.stack([
        torch.randn((count, *shape), generator=data.generator("cpu", seed, "sample", i))
        for i in indices], dim=1)


def draw(net, train, sampler, nfe, labels, seed=0, first=0, batch=250, cfg=1.0, bar=False):
    """Samples first, first+1, ... of the given labels int64 [n]: uint8 [n, H, W, C], NumPy.

    train: the args that the checkpoint was trained with; sampler: a name of facm.SAMPLERS.
    """
    device = next(net.parameters()).device
    shape = (train["net"]["in_channels"], *[train["net"]["input_size"]] * 2)
    count, options = nfe, dict(condition=train["condition"])
    if sampler == "euler":
        count, options = 1, options | dict(w=cfg, t_low=train["t_low"])
    images = [torch.zeros((0, *shape[1:], shape[0]), dtype=torch.uint8)]
    for i in tqdm(range(0, len(labels), batch), disable=not bar, unit="batch"):
        y = labels[i:i + batch].to(device)
        noise = draw_noise(seed, range(first + i, first + i + len(y)), count, shape).to(device)
        images.append(data.to_uint8(facm.SAMPLERS[sampler](net, noise, y, nfe, **options)))
    return torch.cat(images).numpy()


def write(out, images, labels):
    """uint8 images [N, H, W, C] and labels [N] as a grid, npz or PNGs, by the ending of `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        columns = min(len(images), 10 if len(images) % 10 == 0 else math.isqrt(len(images)))
        data.save_grid(out, images, columns, scale=max(1, 64 // images.shape[1]))
    elif out.suffix == ".npz":
        np.savez(out, arr_0=images, arr_1=labels)
    else:
        out.mkdir(exist_ok=True)
        for i, (image, label) in enumerate(zip(images, labels)):
            Image.fromarray(image).save(out / f"{i:06d}-class{label}.png")


def main():
    args = parse_args()
    if min(args.nfe, args.n, args.batch) < 1:
        data.fail("--nfe, --n and --batch must be at least 1")
    device, rank, world = data.start_processes(args.device)
    try:
        net, checkpoint = load(args.ckpt, device, args.raw)
        train = checkpoint["args"]
        labels = choose_labels(args.labels, args.n, net.num_classes, args.seed)
        teacher = is_teacher(checkpoint)
        sampler = args.sampler or ("euler" if teacher else "cm")
        if args.cfg != 1 and not (teacher and sampler == "euler" and net.num_classes):
            raise ValueError("--cfg guides a teacher with classes, by euler; a student is guided")
    except ValueError as e:
        data.fail(e)

    # Each process draws a contiguous part of the samples; process 0 writes them all
    first, end = (args.n * k // world for k in (rank, rank + 1))
    images = draw(net, train, sampler, args.nfe, labels[first:end], args.seed, first, args.batch,
                  args.cfg, bar=rank == 0)
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(images, parts)
        images = np.concatenate(parts) if rank == 0 else None
        dist.destroy_process_group()
    if rank == 0:
        write(pathlib.Path(args.out), images, labels.numpy())
        print(f"{args.out}: {args.n} samples by {sampler}, NFE {args.nfe}")


if __name__ == "__main__":
    main()
