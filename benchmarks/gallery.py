"""Draws the picture of the README: real images, a teacher and its students, from the same noise.

    python benchmarks/gallery.py --left runs/facm-glyphs runs/decm-glyphs runs/gcm-glyphs \\
        --right runs/facm-mnist --out assets/gallery.png

--left and --right are run folders of students on two data sets. The teacher is that of the first
student of each side. A row has ten samples, one of each class. The left side determines the rows,
and a row that the right side does not have is white there.
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
from common.messages import fail

NAMES = dict(facm="FACM", decm="DE-CM", gcm="GCM", baselines="baseline")


def steps_text(nfe):
    """1 step, 2 steps, ..."""
    return "1 step" if nfe == 1 else f"{nfe} steps"


def rows_of(run_folders, labels):
    """{label of a row: uint8 images [10, H, W, C]} of the runs on one data set."""
    students = [sample.load(folder / "ckpt.pt") for folder in run_folders]
    args = students[0][1]["args"]
    teacher = quickstart.teacher_of(args)
    if teacher is None:
        raise ValueError(f"{run_folders[0]}, the first run of its side, needs a teacher")
    guidance = quickstart.guidance_of(args)

    images, classes = quickstart.real_images(args["data"], args["net"]["input_size"], "test")
    first = [int(np.flatnonzero(classes == label)[0]) for label in labels]
    rows = {"real": images[first]}
    for nfe in (1, 20):
        rows[f"teacher, {steps_text(nfe)}"] = sample.draw(*teacher, nfe, labels, **guidance)
    for nfe in (1, 2):
        for net, checkpoint in students:
            label = f"{NAMES[checkpoint['method']]}, {steps_text(nfe)}"
            rows[label] = sample.draw(net, checkpoint, nfe, labels)
    return rows


def scaled(images, size):
    """uint8 images [N, size, size, 3] of images [N, H, W, C], by repeated pixels."""
    results = []
    for image in images:
        picture = Image.fromarray(image.squeeze()).convert("RGB")
        results.append(np.asarray(picture.resize((size, size), Image.Resampling.NEAREST)))
    return np.stack(results)


def main():
    p = Parser(description="Real images, a teacher and its students, as one PNG.")
    p.add_argument("--left", type=pathlib.Path, nargs="+", required=True, help="run folders")
    p.add_argument("--right", type=pathlib.Path, nargs="+", required=True, help="run folders")
    p.add_argument("--size", type=int, default=32, help="pixels of an image")
    p.add_argument("--out", type=pathlib.Path, required=True, help="the PNG to write")
    args = p.parse_args()
    folders.check_output(args.out)
    labels = torch.arange(10)
    try:
        left, right = rows_of(args.left, labels), rows_of(args.right, labels)
    except ValueError as e:
        fail(e)

    white = np.full((10, args.size, args.size, 3), 255, np.uint8)
    sheets = []
    for rows, titles in ((left, list(left)), (right, ())):
        images = [scaled(rows[label], args.size) if label in rows else white for label in left]
        sheets.append(data.grid(np.concatenate(images), 10, labels=titles).convert("RGB"))
    gap = args.size // 2
    size = (sheets[0].width + gap + sheets[1].width, sheets[0].height)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(sheets[0], (0, 0))
    sheet.paste(sheets[1], (sheets[0].width + gap, 0))
    sheet.save(args.out)


if __name__ == "__main__":
    main()
