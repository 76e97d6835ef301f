"""What the text-to-image examples share: tangents of diffusers' operations, captions as a y, and folders of
encoded images.

Such a folder has a .safetensors file for each image, with its latents x1 [C, H, W] and the embeddings of its
caption, and null.safetensors with those of the empty caption.
"""

import math
import pathlib
import sys

import numpy as np
import safetensors.torch
import torch

import jvp
from common import imagefiles


def attention(y, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
    """jvp.py's rule, without a mask and dropout; if keys and values have no tangent, only that of q counts."""
    if isinstance(k, jvp.Dual):
        return jvp._attention(y, q, k, v)
    k = k.transpose(-1, -2) / math.sqrt(k.shape[-1])
    P_dS = (q.value @ k).softmax(-1).mul_(q.tangent @ k)
    return (P_dS @ v).sub_(P_dS.sum(-1, keepdim=True) * y)


# Operations of diffusers' blocks for which jvp.py has no rule, or not with these arguments
jvp.RULES |= dict(
    scaled_dot_product_attention=attention,
    dropout=lambda y, x, *_, **__: x.tangent,              # their rate is 0
    einsum=lambda y, equation, x: torch.einsum(equation, x.tangent))


class Text:
    """Embeddings of captions, tokens [B, L, D] and perhaps pooled ones [B, P]: a y that indexes, moves, repeats
    and is concatenated as a tensor is. torch.full_like(y, null) is the null caption, once for each of y."""

    def __init__(self, *parts):
        self.parts = parts

    tokens = property(lambda self: self.parts[0])
    pooled = property(lambda self: self.parts[1])

    def __getitem__(self, rows):
        return Text(*(a[rows] for a in self.parts))

    def __len__(self):
        return len(self.tokens)

    def to(self, *args, **options):
        return Text(*(a.to(*args, **options) for a in self.parts))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.cat:
            return cls(*map(torch.cat, zip(*(y.parts for y in args[0]))))
        if func is torch.full_like:
            y, null = args
            return null[torch.zeros(len(y), dtype=torch.int64)]
        return NotImplemented


def read(images):
    """The imagefiles.Tree of a folder of images, and {name: caption}, from the .txt beside each. Ends the program
    if one is lacking."""
    tree = imagefiles.Tree(images, labelled=False)
    files = {name: (tree.path / name).with_suffix(".txt") for name in tree.names}
    if lacking := [name for name, path in files.items() if not path.exists()]:
        sys.exit(f"error: {lacking[0]} has no caption {files[lacking[0]].name} beside it")
    return tree, {name: path.read_text().strip() for name, path in files.items()}


@torch.no_grad()
def encode(tree, captions, out, resolution, encode_text, encode_image):
    """Writes the folder. encode_text(caption) gives {name: tensor}, encode_image(uint8 [1, 3, H, W]) the latents."""
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for i, (name, text) in enumerate([("", ""), *captions.items()]):
        held = encode_text(text)
        if name:
            pixels = imagefiles.center_crop(imagefiles.read_image(tree.open(name)), resolution)
            held["x1"] = encode_image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None])
        safetensors.torch.save_file({k: a.contiguous().cpu() for k, a in held.items()},
                                    out / (f"{i:07d}.safetensors" if name else "null.safetensors"))


def encoded(folder, script):
    """The files of the folder, and the embeddings {name: tensor [1, ...]} of the empty caption. Ends the program if
    there are none."""
    folder = pathlib.Path(folder)
    files = sorted(p for p in folder.glob("*.safetensors") if p.stem != "null")
    if not files:
        sys.exit(f"error: {folder}: no *.safetensors in it; run {script} encode --out {folder}")
    null = safetensors.torch.load_file(folder / "null.safetensors")
    return files, {k: a[None] for k, a in null.items()}


def draw(files, n, seed):
    """{name: tensor [n, ...]} of n files, drawn by the seed."""
    chosen = torch.randint(len(files), (n,), generator=torch.Generator().manual_seed(seed))
    rows = [safetensors.torch.load_file(files[i]) for i in chosen]
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
