"""Weights and inputs by formula, so that golden numbers of public code need no stored weights.

Value i of the tensor named n is u = 2 s / 2^53 - 1 in [-1, 1), where s is the upper 53 bits of splitmix64 (Steele et
al. 2014) at i + 2^32 crc32(n), both unsigned 64 bit. A matrix or kernel is u sqrt(3 / fan_in), where fan_in is the
product of all its dimensions but the first. A vector is 0.1 u, plus 1 if the name ends in "weight". Inputs are
sqrt(3) u.
"""

import zlib

import numpy as np
import torch


def uniform(name, shape):
    """Numbers in [-1, 1) as float64, which depend only on the name and the position."""
    with np.errstate(over="ignore"):
        z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)) * 2.0 ** -52 - 1).reshape(shape)


def fill(net, rename=lambda name: name):
    """Sets the trained parameters of net by formula. rename maps its names to those of the formula."""
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue                                       # fixed tables keep their values, which are tested
        u = uniform(rename(name), p.shape)
        if p.dim() > 1:
            u *= (3 / np.prod(p.shape[1:])) ** 0.5
        else:
            u = 0.1 * u + name.endswith("weight")
        with torch.no_grad():
            p.copy_(torch.as_tensor(u))
    return net.eval()


def normal_like(name, shape):
    """An input of mean 0 and standard deviation 1."""
    return torch.from_numpy(3 ** 0.5 * uniform(name, shape)).float()


def sample(output, count=200):
    """`count` values of a tensor, evenly spread over it."""
    flat = output.detach().double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, count).long()]
