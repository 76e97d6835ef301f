"""Reads torchrun's environment variables: whether it started this process, and its rank."""

import os

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started():
    """Whether torchrun, or a launcher that sets the same variables, started this process. If only
    some of the variables are set, they are ignored."""
    return all(os.environ.get(name) for name in NAMES)


def world_size():
    """The number of processes, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if started() else 1


def rank():
    """The number of this process, 0 without torchrun."""
    return int(os.environ["RANK"]) if started() else 0


def local_rank():
    """The number of this process on its machine, 0 without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if started() else 0
