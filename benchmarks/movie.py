"""The moving picture of the README: what one step draws during training, for one or more students.

    python facm.py --keep-every 80
    python baselines.py --keep-every 80 --out runs/meanflow-glyphs
    python benchmarks/movie.py FACM=runs/facm-glyphs MeanFlow=runs/meanflow-glyphs \\
        --out assets/training.webp

Each frame shows a training step and has a row for each run: ten one-step samples, one of each
class, from the same noise in all frames and rows. The frames come from the snapshots that
--keep-every has written, and from the last checkpoint. The first frame, step 0, is one Euler step
of the teacher, from whose weights the students start.
"""

import pathlib
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quickstart

import data
import sample
from common import folders
from common.flags import Parser
from common.messages import fail

LABELS = torch.arange(10)


def frames_of(folder):
    """{training step: one-step samples, uint8 [10, H, W, C]} of a run. Raises ValueError for a run
    without a teacher, or without snapshots."""
    _, last = sample.load(folder / "ckpt.pt")
    teacher = quickstart.teacher_of(last["args"])
    if teacher is None:
        raise ValueError(f"{folder}: the first frame needs a teacher, and this run has none")
    frames = {0: sample.draw(*teacher, 1, LABELS, sampler="euler")}
    snapshots = sorted(folder.glob("step-*.pt"))
    if not snapshots:
        raise ValueError(f"{folder} has no snapshots; train it with --keep-every")
    for path in [*snapshots, folder / "ckpt.pt"]:
        net, checkpoint = sample.load(path)
        frames[checkpoint["step"]] = sample.draw(net, checkpoint, 1, LABELS)
    return frames


def draw_frame(step, rows, scale):
    """A picture of the rows {label: images}, with the training step below them."""
    sheet = data.grid(np.concatenate(list(rows.values())), 10, scale, list(rows))
    page = Image.new("RGB", (sheet.width, sheet.height + 24), "white")
    page.paste(sheet, (0, 0))
    text = f"one step, after {step} training steps"
    ImageDraw.Draw(page).text((sheet.width - 6, sheet.height + 12), text, "black", anchor="rm",
                              font_size=13)
    return page


def main():
    p = Parser(description="What one step draws during training, as an animation.")
    p.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name for the row, and a run "
                   "folder with snapshots")
    p.add_argument("--scale", type=int, default=4, help="factor by which the images are enlarged")
    p.add_argument("--milliseconds", type=int, default=250, help="duration of a frame")
    p.add_argument("--out", type=pathlib.Path, required=True, help="the .webp or .gif to write")
    args = p.parse_args()
    folders.check_output(args.out)
    frames = {}                            # {name: {step: images}}
    for word in args.runs:
        name, equals, folder = word.partition("=")
        if not equals:
            fail(f"{word}: expected NAME=RUN, as in FACM=runs/facm-glyphs")
        try:
            frames[name] = frames_of(pathlib.Path(folder))
        except (ValueError, OSError) as e:
            fail(e)

    # The steps that all runs have. The first and the last frame are shown longer
    steps = sorted(set.intersection(*[set(found) for found in frames.values()]))
    pictures = []
    for step in steps:
        rows = {name: found[step] for name, found in frames.items()}
        pictures.append(draw_frame(step, rows, args.scale))
    durations = [args.milliseconds] * len(pictures)
    durations[0] = durations[-1] = 6 * args.milliseconds
    pictures[0].save(args.out, save_all=True, append_images=pictures[1:], duration=durations,
                     loop=0, lossless=True)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {len(pictures)} frames, {size:.2f} MB")


if __name__ == "__main__":
    main()
