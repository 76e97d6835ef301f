"""Measures how fast data.py reads batches: images in memory, a folder of PNGs, latents in shards.

    python benchmarks/loader.py [--json FILE]

The images in memory have the size of CIFAR-10. All data are first written to a temporary folder.
Latents (10,000 of 32 x 16 x 16, in four shards) are read in shuffled order in two ways, which
alternate: by data.py, and in the straightforward way, which opens the shard for each sample. The
peak memory is that of a child process that reads one epoch of 2,500 and of 10,000 latents.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quickstart

import data
from common import flags, folders, processes

SHARD = 2500                               # latents in a shard


def write_latents(folder, n):
    """Writes n random latents in shards of LightningDiT's format. Returns the folder."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    for k in range(n // SHARD):
        tensors = dict(
            latents=torch.randn(SHARD, 32, 16, 16, generator=random),
            labels=torch.randint(0, 1000, (SHARD,), generator=random),
            latents_flip=torch.randn(SHARD, 32, 16, 16, generator=random))
        safetensors.torch.save_file(tensors, folder / f"latents_rank00_shard{k:03d}.safetensors")
    stats = dict(mean=torch.zeros(1, 32, 1, 1), std=torch.ones(1, 32, 1, 1))
    torch.save(stats, folder / "latents_stats.pt")
    return folder


def write_images(folder, pixels):
    """Writes a PNG of 256x256 pixels for each image of pixels [N, 32, 32, 3]. Returns the folder."""
    folder.mkdir()
    for i, image in enumerate(pixels):
        large = image.repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(large).save(folder / f"{i:03d}.png")
    return folder


def images_per_second(dataset, batch, seconds=2.0):
    """The images per second if batches are read one after the other."""
    dataset.batch(0, 0, batch)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        batches += 1
        dataset.batch(0, batches * batch, batch)
    return batches * batch / (time.perf_counter() - start)


def one_by_one(folder, n):
    """The latents per second if the shard is opened for each sample."""
    paths = sorted(folder.glob("*.safetensors"))
    order = np.random.default_rng(0).permutation(SHARD * len(paths))[:n]
    start = time.perf_counter()
    for i in order:
        with safetensors.safe_open(paths[i // SHARD], framework="pt") as f:
            row = i % SHARD
            name = "latents" if i % 2 else "latents_flip"
            f.get_slice(name)[row:row + 1]
            f.get_slice("labels")[row:row + 1]
    return n / (time.perf_counter() - start)


def peak_memory(folder):
    """The MB of memory of a child process after it has read an epoch of the latents."""
    done = subprocess.run([sys.executable, __file__, "--child", str(folder)], capture_output=True,
                          text=True, check=True)
    return int(done.stdout)


def child(folder):
    """Reads an epoch of the latents and prints the memory of this process, in MB."""
    dataset = data.load(folder, num_classes=1000)
    n = len(dataset.labels)
    for first in range(0, n - n % 100, 100):
        dataset.batch(0, first, 100)
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            print(int(line.split()[1]) // 1024)


def measure(folder):
    """{source: images per second}, and {number of latents: MB of a process}. folder: for the data."""
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    images = data.Images(pixels, np.zeros(50_000), 10, xflip=True)
    figures = {"CIFAR-10 in memory, mirrored, batch 128": images_per_second(images, 128)}
    pngs = write_images(folder / "png", pixels[:500])
    figures["folder of 256x256 PNGs, batch 32"] = images_per_second(data.load(str(pngs)), 32)

    few = write_latents(folder / "few", SHARD)
    latents = write_latents(folder / "latents", 4 * SHARD)
    ours, straightforward = [], []
    for _ in range(3):
        ours.append(images_per_second(data.load(str(latents), num_classes=1000), 256))
        straightforward.append(one_by_one(latents, 2000))
    figures["latents, batch 256"] = float(np.median(ours))
    figures["latents, a shard opened for each sample"] = float(np.median(straightforward))
    return figures, {SHARD: peak_memory(few), 4 * SHARD: peak_memory(latents)}


def main():
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
        return
    p = flags.Parser(description=__doc__.splitlines()[0])
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file as well")
    args = p.parse_args()
    folders.check_output(args.json)
    processes.start("cpu")                 # as in the scripts
    with tempfile.TemporaryDirectory() as temporary:
        figures, memory = measure(pathlib.Path(temporary))
    for name, value in figures.items():
        print(f"{name:45}{value:12,.0f} images/s")
    ratio = figures["latents, batch 256"] / figures["latents, a shard opened for each sample"]
    print(f"latents: {ratio:.1f} times the straightforward way; the process's own memory after an "
          "epoch: " + ", ".join(f"{n} latents {mb} MB" for n, mb in memory.items()))
    if args.json:
        text = json.dumps(dict(
            images_per_second=figures, latents_ratio=ratio, own_memory_MB=memory,
            **quickstart.provenance()), indent=2)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
