"""How fast data.py delivers batches: CIFAR-10-sized images in memory, a folder of PNGs, latents in shards.

    python benchmarks/loader.py [--json FILE]

All of it is written to a temporary folder first. Latents (10,000 of 32 x 16 x 16, four shards) are read in shuffled
order in two ways, alternating in one run: as data.py does, and straightforwardly, opening the shard for each sample.
Peak memory is that of a child process that reads one epoch of latents, for 2,500 and for 10,000 of them.
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
sys.path.insert(0, str(ROOT))

import quickstart

import data
from common import flags, folders, processes


def write_latents(folder, n, shard=2500):
    """n random latents in shards in LightningDiT's layout."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for k in range(n // shard):
        safetensors.torch.save_file(
            dict(latents=torch.randn(shard, 32, 16, 16, generator=g), labels=torch.randint(0, 1000, (shard,), generator=g),
                 latents_flip=torch.randn(shard, 32, 16, 16, generator=g)),
            folder / f"latents_rank00_shard{k:03d}.safetensors")
    torch.save(dict(mean=torch.zeros(1, 32, 1, 1), std=torch.ones(1, 32, 1, 1)), folder / "latents_stats.pt")
    return folder


def images_per_second(dataset, batch, seconds=2.0):
    """Batches one after the other, nothing else being done meanwhile."""
    dataset.batch(0, 0, batch)
    start, k = time.perf_counter(), 1
    while time.perf_counter() - start < seconds:
        dataset.batch(0, k * batch, batch)
        k += 1
    return (k - 1) * batch / (time.perf_counter() - start)


def one_by_one(folder, n):
    """The straightforward way: for each sample, open its shard and take one row."""
    paths = sorted(folder.glob("*.safetensors"))
    order = np.random.default_rng(0).permutation(10_000)[:n]
    start = time.perf_counter()
    for i in order:
        with safetensors.safe_open(paths[i // 2500], framework="pt") as f:
            name = "latents" if i % 2 else "latents_flip"
            f.get_slice(name)[i % 2500:i % 2500 + 1], f.get_slice("labels")[i % 2500:i % 2500 + 1]
    return n / (time.perf_counter() - start)


def peak_memory(folder):
    """MB of resident memory that are the process's own, after an epoch of the latents."""
    done = subprocess.run([sys.executable, __file__, "--child", folder], capture_output=True, text=True, check=True)
    return int(done.stdout)


def child(folder):
    dataset = data.load(folder)
    n = len(dataset.labels)
    for first in range(0, n - n % 100, 100):
        dataset.batch(0, first, 100)
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    print(int(status["RssAnon"].split()[0]) // 1024)


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2])
    p = flags.Parser(description=__doc__.splitlines()[0])
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    args = p.parse_args()
    folders.check_output(args.json)
    processes.start("cpu")            # as the scripts begin
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
        figures["CIFAR-10 in memory, mirrored, batch 128"] = images_per_second(
            data.Images(pixels, np.zeros(50_000), 10, xflip=True), 128)
        (folder / "png").mkdir()
        for i in range(500):
            Image.fromarray(np.repeat(np.repeat(pixels[i], 8, 0), 8, 1)).save(folder / f"png/{i:03d}.png")
        figures["folder of 256x256 PNGs, batch 32"] = images_per_second(data.load(str(folder / "png")), 32)
        latents = write_latents(folder / "latents", 10_000)
        ours, plain = [], []
        for _ in range(3):
            ours.append(images_per_second(data.load(str(latents)), 256))
            plain.append(one_by_one(latents, 2000))
        figures["latents, batch 256"] = float(np.median(ours))
        figures["latents, a shard opened for each sample"] = float(np.median(plain))
        few = write_latents(folder / "few", 2500)
        memory = {n: peak_memory(str(f)) for n, f in ((2500, few), (10_000, latents))}
    for name, value in figures.items():
        print(f"{name:45}{value:12,.0f} images/s")
    ratio = figures["latents, batch 256"] / figures["latents, a shard opened for each sample"]
    print(f"latents: {ratio:.1f} times the straightforward way; the process's own memory after an epoch: "
          + ", ".join(f"{n} latents {m} MB" for n, m in memory.items()))
    if args.json:
        args.json.write_text(json.dumps(dict(
            images_per_second=figures, latents_ratio=ratio, own_memory_MB=memory, **quickstart.provenance()),
            indent=2) + "\n")


if __name__ == "__main__":
    main()
