"""The picture of the README: real images, a teacher and its students, the same noise in each row.

    python benchmarks/gallery.py --left runs/facm-glyphs runs/decm-glyphs runs/gcm-glyphs --right runs/facm-mnist --out assets/gallery.png

left, right: run folders on two data sets; the teacher is the first run's. A row is ten samples, one
of each class. The left side says which rows there are.
"""

import pathlib
import sys

import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quickstart

import data
import sample
from common import folders
from common.flags import Parser

NAMES = dict(facm="FACM", decm="DE-CM", gcm="GCM", baselines="baseline")


def rows_of(folders, labels):
    """{label of a row: uint8 images [10, H, W, 3]} of the runs on one data set."""
    students = [sample.load(folder / "ckpt.pt") for folder in folders]
    args = students[0][1]["args"]
    teacher = sample.load(args["teacher"] or folders[0] / "teacher.pt")
    real, classes = quickstart.real_images(args["data"], args["net"]["input_size"], "test")
    first = [int(np.flatnonzero(classes == label)[0]) for label in labels]
    rows = {"real": real[first]}
    for nfe in (1, 20):
        rows[f"teacher, {nfe} step" + "s" * (nfe > 1)] = sample.draw(
            *teacher, nfe, labels, sampler="euler", cfg=args["w"])
    for nfe in (1, 2):
        for net, checkpoint in students:
            rows[f"{NAMES[checkpoint['method']]}, {nfe} step" + "s" * (nfe > 1)] = sample.draw(
                net, checkpoint, nfe, labels)
    return rows


def main():
    p = Parser(description="Real images, a teacher and its students, as one PNG.")
    p.add_argument("--left", type=pathlib.Path, nargs="+", required=True, help="run folders")
    p.add_argument("--right", type=pathlib.Path, nargs="+", required=True, help="run folders")
    p.add_argument("--size", type=int, default=32, help="pixels of an image")
    p.add_argument("--out", type=pathlib.Path, required=True, help="the PNG to write")
    args = p.parse_args()
    folders.check_output(args.out)
    labels, sheets = torch.arange(10), []
    sides = [rows_of(folders, labels) for folders in (args.left, args.right)]
    for side in sides:                     # a row that one side lacks stays white there
        images = [Image.fromarray(image.squeeze()).convert("RGB").resize(
            (args.size, args.size), Image.Resampling.NEAREST)
            for row in sides[0] for image in side.get(row, np.full((10, 8, 8, 3), 255, np.uint8))]
        data.save_grid(args.out, np.stack([np.asarray(image) for image in images]), 10,
                       labels=list(side) if side is sides[0] else ())
        sheets.append(Image.open(args.out).convert("RGB"))
    gap = args.size // 2
    sheet = Image.new("RGB", (sheets[0].width + gap + sheets[1].width, max(s.height for s in sheets)), "white")
    sheet.paste(sheets[0], (0, 0))
    sheet.paste(sheets[1], (sheets[0].width + gap, 0))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
