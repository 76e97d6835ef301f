"""Images and figures of a network, during training or from the checkpoints of a run.

    Judge        a reference, and the network whose features compare samples with it
    measure      FID, and the Inception Score, of the samples of a network
    Evaluation   what a run needs for --vae and --eval-every

This module calls the functions of sample.py to draw samples, and those of fid.py to measure them.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import fid
import sample
from common.messages import say_once

GLYPHS = 20_000                            # so many glyphs are a reference, as in fid.py


class Judge(NamedTuple):
    """A reference, and the network whose features compare samples with it."""

    extract: Callable      # extract(uint8 [b, 3, H, W]), see fid.collect
    name: str              # the network's
    moments: dict          # mu and sigma of the reference


def load_judge(ref, features=None, inception=None, data_dir=None, size=16, glyphs=GLYPHS,
               device="cpu", rank=0, world=1):
    """Reads a reference once and returns its Judge. All processes call this together.

    ref, features, inception, data_dir: like the flags of fid.py. size, glyphs: the height and width
    of glyphs, and their number in the reference. Raises ValueError, on all processes, for files
    that cannot be read or do not fit.
    """
    part = "fd_dinov2" if features else "fid"              # of EDM2's statistics
    source = fid.open_source(ref, glyphs, size, data_dir, part)
    files = argparse.Namespace(features=features and pathlib.Path(features),
                               inception=inception and pathlib.Path(inception))
    extract, name = fid.choose_network(files, [source], True, device)
    moments = source.statistics
    if "mu" not in moments:
        moments = fid.collect(source, extract, device=device, rank=rank, world=world)
    return Judge(extract, name, moments)


def measure(net, checkpoint, chosen, n, judge, decode, device, rank=0, world=1, seed=0,
            score=False):
    """The figures of n samples: {"FID": ...}, and with `score` also the Inception Score. With the
    same seed, sample.py draws the same samples. All processes call this together, and only process
    0 returns the figures.

    net, checkpoint: as sample.load returns them; chosen: see sample.choose_sampler; decode: see
    sample.load_decoder. Raises ValueError, on all processes, if a sample is not finite.
    """
    uncond = checkpoint["args"].get("uncond", False)
    labels = sample.choose_labels("all", n, net.num_classes, seed, uncond=uncond)
    first, images = draw_part(net, checkpoint, chosen, labels, seed, decode, rank, world)
    source = fid.Source(chosen.name, n, lambda i, j: images[i - first:j - first])
    found = fid.collect(source, judge.extract, score=score, width=len(judge.moments["mu"]),
                        device=device, rank=rank, world=world, quiet=True)
    asked = argparse.Namespace(ref=True, score=score, sfid=False, pr=False, kid=False)
    sides = [found, judge.moments]
    return fid.compare_once(asked, sides, judge.name, device, rank, world)


def draw_part(net, checkpoint, chosen, labels, seed, decode, rank, world):
    """The samples of this process, uint8 [m, H, W, C], and the number of the first of them.

    A process draws whole batches of the network, so that the samples do not depend on the number of
    processes. All processes call the network equally often, as a sharded network requires.
    """
    batches = [batches_of(len(labels), k, world) for k in range(world)]
    rounds = max(len(starts) for starts in batches)
    own = batches[rank]
    images, problem, first = None, None, own[0]
    for k in range(rounds):
        i = own[min(k, len(own) - 1)]      # the last batch again, if the others have one more
        x = sample.draw_batch(net, checkpoint, chosen, seed, i, labels[i:i + sample.ROWS])
        if k >= len(own):
            continue
        try:
            pixels = sample.to_pixels(decode, x, i)
        except FloatingPointError as e:
            problem = str(e)
            continue
        if images is None:                 # one array, because two copies may not fit into memory
            count = min(own[-1] + sample.ROWS, len(labels)) - first
            images = np.empty((count, *pixels.shape[1:]), np.uint8)
        images[i - first:i - first + len(pixels)] = pixels
    fid.raise_together(problem, world)
    return first, images


def batches_of(n, rank, world):
    """The number of the first sample of each batch of a process. The batches contain the samples
    that fid.collect reads in this process, and a few more at both ends."""
    first = n * rank // world
    end = n * (rank + 1) // world
    return range(first // sample.ROWS * sample.ROWS, end, sample.ROWS)


@contextlib.contextmanager
def apart(device):
    """A context that does not affect training: it restores the states of torch's random generators
    at its end. Inside, products are computed in float32, regardless of --precision."""
    device = torch.device(device)
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    gpus = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        matmul.allow_tf32 = convolution.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32, convolution.allow_tf32 = before


class Evaluation:
    """What a run needs for --vae and --eval-every, loaded once, before the first step.

    decode: a function that makes images from latents, in the processes that need it; None in the
    others. Raises ValueError, on all processes, if a file cannot be read or a flag does not fit.
    """

    def __init__(self, args, shape, device, rank, world):
        """shape: (C, H, W) of the samples of the data set."""
        self.args, self.device, self.rank, self.world = args, device, rank, world
        channels, size, _ = shape
        latents = channels not in (1, 3)
        if args.vae and not latents:
            raise ValueError("--vae has no effect here: it needs latents, and the data are images")
        if args.eval_every and latents and not args.vae:
            raise ValueError("--eval-every needs --vae FILE here, the autoencoder that makes "
                             "images of latents")
        if args.eval_every and args.eval_n < world:
            raise ValueError(f"--eval-n {args.eval_n}: each of {world} processes needs a sample")
        with apart(device):
            self.decode, factor = self.load_decoder(channels)
            if args.eval_every:
                self.judge = load_judge(args.ref, args.features, args.inception, args.data_dir,
                                        size, device=device, rank=rank, world=world)
                self.try_judge(size * factor)

    def load_decoder(self, channels):
        """The function `decode`, and how many times larger its images are. Without evaluations,
        only the first process loads the autoencoder, because it alone draws previews."""
        about = dict(args=vars(self.args) | dict(net=dict(in_channels=channels)))
        decode, factor, problem = None, 1, None
        if self.rank == 0 or self.args.eval_every:
            try:
                decode, factor, _ = sample.load_decoder(self.args.vae, None, about, self.device)
            except ValueError as e:
                problem = str(e)
        fid.raise_together(problem, self.world)
        return decode, factor

    def decode_rows(self, x):
        """The images of samples, decoded in batches of the same size as in sample.py."""
        return sample.in_rows(self.decode, sample.DECODED_ROWS, x)

    def try_judge(self, size):
        """Raises ValueError if the network of the features does not fit images of this size, or the
        reference."""
        images = torch.zeros((2, 3, size, size), dtype=torch.uint8, device=self.device)
        features, _, _ = self.judge.extract(images)
        fid.check_features(self.args.ref, features, len(self.judge.moments["mu"]))
        if self.args.eval_n < fid.FEW:
            say_once(f"--eval-n {self.args.eval_n}: a figure of fewer than {fid.FEW:,} samples "
                     "is biased, so compare it only with figures of as many")

    def choose_samplers(self, net, checkpoint):
        """{"NFE 1": the method's default sampler, ...}. Raises ValueError if the sampler does not
        support one of the NFEs."""
        return {f"NFE {nfe}": sample.choose_sampler(net, checkpoint, nfe)
                for nfe in self.args.eval_nfe}

    def figures(self, net, checkpoint):
        """A line of the log, without its step: {"fid": {"NFE 1": ...}, "eval_n": ...}. The distance
        in features of a network other than Inception is called fd. If samples are not finite, their
        figure is left out and a note is printed."""
        found = {}
        for name, chosen in self.choose_samplers(net, checkpoint).items():
            try:
                with apart(self.device):
                    figures = measure(net, checkpoint, chosen, self.args.eval_n, self.judge,
                                      self.decode, self.device, self.rank, self.world)
            except ValueError as e:
                if self.rank == 0:
                    print(f"\n{name} has no figure: {e}", file=sys.stderr)
                continue
            for figure in figures.values():
                found[name] = round(figure, 4)
        row = dict(fid=found, eval_n=self.args.eval_n)
        if self.judge.name != fid.INCEPTION:
            row = dict(fd=found, eval_n=self.args.eval_n, features=self.judge.name)
        return row
