"""Random numbers that are determined by a key, so that no random state needs to be saved."""

import hashlib

import torch


def seed_of(*key):
    """A seed, 0 to 2^63 - 1, that is determined by the key (plain values)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(device, *key):
    """A random generator on a device, seeded by the key."""
    return torch.Generator(device).manual_seed(seed_of(*key))
