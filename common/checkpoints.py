"""Checkpoints: dicts of tensors and plain values, in files that stay complete if the program is
killed."""

import hashlib
import json
import os

import torch
from safetensors import safe_open

from common.messages import fail


def save(path, checkpoint):
    """Writes a dict of plain values and tensors to a file beside `path` (a pathlib.Path), then
    renames it: a kill at any moment leaves the old checkpoint or the new one. Ends the program if
    the disk is full."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:   # RuntimeError: torch.save's own
        part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        fail(f"{path} could not be written ({reason}); what was there is kept", always=True)


def read_safetensors(path):
    """The tensors of a .safetensors file, {name: tensor}. For a file of sample.py --export it is a
    checkpoint: method, args and step from the metadata, and the tensors as model and ema."""
    with safe_open(path, "pt") as f:
        weights, told = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    if "method" not in told:
        return weights
    return {k: json.loads(text) for k, text in told.items()} | dict(model=weights, ema=weights)


def read(path):
    """The content of a checkpoint file, on the CPU. Nothing in it is executed. Returns a dict with
    method, args, step, model, ema, optimizer and torch_version. A file of sample.py --export lacks
    the last two. Raises ValueError if the file is missing, damaged or of another kind."""
    try:
        if str(path).endswith(".safetensors"):
            checkpoint = read_safetensors(path)
        else:
            # The file is memory-mapped, so that several processes share its memory. Windows does
            # not replace a file that is mapped
            checkpoint = torch.load(path, map_location="cpu", weights_only=True,
                                    mmap=os.name != "nt")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as e:
        raise ValueError(f"{path} is not a readable checkpoint: it is truncated or of another kind "
                         f"({type(e).__name__})") from None
    needed = {"method", "args", "step", "model", "ema"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of a training script of this repository")
    return checkpoint


def read_if_ours(path):
    """As read, but None for a file that is not a checkpoint of this repository."""
    try:
        return read(path)
    except ValueError:
        return None


def fingerprint(path, blocks=64, size=2 ** 16):
    """A hash of a file's length and of blocks that are spread over it, which is fast for a large
    file."""
    digest = hashlib.sha256()
    length = os.path.getsize(path)
    digest.update(str(length).encode())
    with open(path, "rb") as f:
        for k in range(blocks):
            f.seek(max(length - size, 0) * k // max(blocks - 1, 1))
            digest.update(f.read(size))
    return digest.hexdigest()[:16]


def cut_like(a, p):
    """The tensor a, sharded over the processes like the parameter p, if p is sharded (--fsdp)."""
    if not hasattr(p, "placements"):
        return a
    from torch.distributed.tensor import distribute_tensor  # here: this takes a second
    return distribute_tensor(a, p.device_mesh, p.placements)


def load_weights(net, weights, path, may_lack=()):
    """net.load_state_dict, strict except for missing names that begin with one of `may_lack`.

    Raises ValueError, before net is changed, with the first parameter of the file `path` that is
    missing, unexpected or of another shape.
    """
    own = net.state_dict()
    problems = {
        "lacks": [k for k in own if k not in weights and not k.startswith(tuple(may_lack))],
        "has an unknown parameter": [k for k in weights if k not in own],
        "has another shape of": [
            k for k in weights if k in own and own[k].shape != weights[k].shape],
    }
    for what, names in problems.items():
        if names:
            shapes = [list(a[names[0]].shape) for a in (weights, own) if names[0] in a]
            raise ValueError(f"{path} does not fit this network: it {what} {names[0]}, "
                             f"{' and not '.join(map(str, shapes))} (and {len(names) - 1} more)")
    net.load_state_dict({k: cut_like(a, own[k]) for k, a in weights.items()}, strict=False)


def load_optimizer(optimizer, state):
    """Loads the state of a checkpoint in the memory layout of the parameters, because fused
    optimisers pair elements by their place in memory. Raises ValueError if it does not fit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def part(i, a):
        if i >= len(params) or a.shape != params[i].shape:
            return a
        return torch.empty_like(params[i], dtype=a.dtype).copy_(cut_like(a, params[i]))

    entries = {i: {name: part(i, a) for name, a in entry.items()}
               for i, entry in state["state"].items()}
    optimizer.load_state_dict(state | dict(state=entries))


def copy_to_cpu(state, keep=True):
    """A copy of a nested dict or list with its tensors on the CPU, so that training may continue
    while it is written.

    Tensors that FSDP has sharded are gathered, so all processes have to call this. Processes with
    keep=False receive None instead of tensors. Tensors are gathered one after the other, so that no
    GPU holds more than one whole tensor.
    """
    if isinstance(state, dict):
        return {name: copy_to_cpu(part, keep) for name, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_cpu(part, keep) for part in state)
    if hasattr(state, "full_tensor"):
        state = state.full_tensor()
    if not torch.is_tensor(state):
        return state
    return state.detach().to("cpu", copy=True) if keep else None
