"""glyphs, the addressing of batches, 8 bits."""

import numpy as np
import pytest
import torch
from PIL import Image

import data


def test_glyphs_are_deterministic_and_labelled():
    images, labels = data.glyphs(30, size=16, seed=5)
    assert images.shape == (30, 16, 16, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [i % 10 for i in range(30)]
    again, _ = data.glyphs(12, size=16, seed=5)
    assert np.array_equal(images[:12], again)                          # by (seed, index), whatever n
    assert not np.array_equal(images, data.glyphs(30, size=16, seed=6)[0])
    assert data.glyphs(1, size=32)[0].shape == (1, 32, 32, 3)


def test_every_glyph_has_ink_on_paper():
    """Two colours that differ in luminance by 128 or more; the paper shows in the corners."""
    images, _ = data.glyphs(200, size=16)
    luminance = images @ np.array([0.299, 0.587, 0.114])
    paper = luminance[:, 0, 0]
    contrast = np.abs(luminance - paper[:, None, None]).max(axis=(1, 2))
    assert (contrast > 90).all()                   # thin strokes are blended with the paper
    assert np.abs(luminance[:, [0, 0, -1, -1], [0, -1, 0, -1]] - paper[:, None]).max() == 0


def test_dataset_is_the_glyphs():
    dataset = data.load("glyphs", 16, n=40, seed=5)
    images, labels = data.glyphs(40, 16, seed=5)
    assert dataset.shape == (3, 16, 16) and dataset.num_classes == 10
    x1, y = dataset.batch(seed=0, step=0, batch=40)
    index = dataset.index(0, 0, 40)
    assert torch.equal(y, torch.from_numpy(labels)[index])
    assert np.array_equal(data.to_uint8(x1).numpy(), images[index])    # exact there and back


def test_each_sample_once_an_epoch_whatever_the_pieces():
    dataset = data.load("glyphs", 12, n=30)
    whole = torch.cat([dataset.index(3, step, 8) for step in range(15)])           # four epochs
    for epoch in whole.view(4, 30):
        assert epoch.sort().values.tolist() == list(range(30))
    assert not torch.equal(whole[:30], whole[30:60])
    pieces = torch.cat([dataset.index(3, step, 8, slice(first, first + 2))
                        for step in range(15) for first in (0, 2, 4, 6)])
    assert torch.equal(whole, pieces)
    assert torch.equal(dataset.index(3, 7, 8), whole[56:64])           # addressed, not iterated
    assert not torch.equal(whole, torch.cat([dataset.index(4, step, 8) for step in range(15)]))


def test_rounding_to_8_bits():
    x = torch.tensor([-2.0, -1.0, -0.5 / 127.5 + 1e-4, 0.0, 1.0, 2.0]).view(6, 1, 1, 1)
    assert data.to_uint8(x).flatten().tolist() == [0, 0, 127, 128, 255, 255]


def test_grid(tmp_path):
    images = np.stack([np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)])
    data.save_grid(tmp_path / "grid.png", images, columns=3, scale=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (8, 18, 3)
    assert (sheet[:4, 6:12] == 10).all() and (sheet[4:, 6:12] == 40).all() and (sheet[4:, 12:] == 255).all()


@pytest.mark.parametrize("name, size", [("mnist", 16), ("glyphs", 8)])
def test_unknown_data_is_refused(name, size):
    with pytest.raises(ValueError):
        data.load(name, size)


def test_seeds_follow_from_the_key():
    assert data.seed_of(0, "step", 1) == data.seed_of(0, "step", 1)
    assert len({data.seed_of(0, "step", k) for k in range(1000)}) == 1000
    a, b = (torch.rand(3, generator=data.generator("cpu", 1, "x")) for _ in range(2))
    assert torch.equal(a, b)
