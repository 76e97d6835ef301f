"""The common part of the text-to-image examples: captions as labels, and folders of encoded images.

Such a folder has a .safetensors file for each image, with its latents x1 [C, H, W] and the
embeddings of its caption, and null.safetensors with those of the empty caption.
"""

import pathlib
import sys

import numpy as np
import safetensors.torch
import torch

from common import imagefiles

# --------------------------------------------------------------------------------------------------
# Captions as the labels y of a loss.

class Text:
    """The embeddings of B captions: tokens [B, L, D] and, if the network needs them, pooled ones
    [B, P]. A loss indexes, concatenates and moves labels y, and computes the null labels by
    torch.full_like(y, null). All this works with a Text, where null is a Text of one caption.
    """

    def __init__(self, tokens, pooled=None):
        self.tokens, self.pooled = tokens, pooled

    def of_both(self, function):
        """A Text with function(tokens) and, if there are pooled embeddings, function(pooled)."""
        if self.pooled is None:
            return Text(function(self.tokens))
        return Text(function(self.tokens), function(self.pooled))

    def __getitem__(self, samples):
        return self.of_both(lambda embeddings: embeddings[samples])

    def __len__(self):
        return len(self.tokens)

    def to(self, *args, **options):
        """Like torch.Tensor.to."""
        return self.of_both(lambda embeddings: embeddings.to(*args, **options))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """PyTorch calls this if a Text is an argument of one of its functions."""
        if func is torch.cat:
            texts = args[0]
            tokens = torch.cat([text.tokens for text in texts])
            if texts[0].pooled is None:
                return cls(tokens)
            return cls(tokens, torch.cat([text.pooled for text in texts]))
        if func is torch.full_like:
            y, null = args
            return null[torch.zeros(len(y), dtype=torch.int64)]
        return NotImplemented


# --------------------------------------------------------------------------------------------------
# Folders of images with captions, and of encoded images.

def read(images):
    """The imagefiles.Tree of a folder of images, and {name: caption} from the .txt files beside the
    images. Ends the program if an image has no caption."""
    tree = imagefiles.Tree(images, labelled=False)
    captions = {}
    for name in tree.names:
        path = (tree.path / name).with_suffix(".txt")
        if not path.exists():
            sys.exit(f"error: {name} has no caption {path.name} beside it")
        captions[name] = path.read_text().strip()
    return tree, captions


@torch.no_grad()
def encode(tree, captions, out, resolution, encode_text, encode_image):
    """Writes the folder of encoded images.

    encode_text(caption) returns {name: tensor}, the embeddings of a caption. encode_image(image),
    with uint8 [1, 3, H, W], returns the latents [C, h, w] of an image.
    """
    out = pathlib.Path(out)
    if any(out.glob("*.safetensors")):     # they would be mixed with those of now
        sys.exit(f"error: {out} already contains encoded images; remove them, or use another --out")
    out.mkdir(parents=True, exist_ok=True)
    write(out / "null.safetensors", encode_text(""))
    for number, (name, caption) in enumerate(captions.items(), start=1):
        image = imagefiles.center_crop(imagefiles.read_image(tree.open(name)), resolution)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        tensors = encode_text(caption) | dict(x1=encode_image(pixels[None]))
        write(out / f"{number:07d}.safetensors", tensors)


def write(path, tensors):
    """Writes {name: tensor} to a .safetensors file."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path)


def encoded(folder, script):
    """The files of a folder of encoded images, and the embeddings {name: tensor [1, ...]} of the
    empty caption. Ends the program if there are none. script: the program that encodes images."""
    folder = pathlib.Path(folder)
    files = sorted(path for path in folder.glob("*.safetensors") if path.stem != "null")
    if not files:
        sys.exit(f"error: {folder} contains no *.safetensors; run {script} encode --out {folder}")
    null = safetensors.torch.load_file(folder / "null.safetensors")
    return files, {name: tensor[None] for name, tensor in null.items()}


def draw(files, n, seed):
    """{name: tensor [n, ...]} of n files, which are chosen at random by the seed."""
    chosen = torch.randint(len(files), (n,), generator=torch.Generator().manual_seed(seed))
    samples = [safetensors.torch.load_file(files[i]) for i in chosen]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
