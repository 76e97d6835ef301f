"""The curves of one or more runs as one PNG: losses, gradient norm and distance over the steps.

    pip install matplotlib
    python benchmarks/curves.py runs/flow-glyphs runs/facm-glyphs --out curves.png

Losses and gradient norms are in log.jsonl. Distances are in distance.jsonl, a line for each call of
`benchmarks/quickstart.py RUN --log`. A run can be stopped on its way for it, and resumed:

    timeout -s TERM 120 python facm.py
    python benchmarks/quickstart.py runs/facm-glyphs --log
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import folders
from common.flags import Parser
from common.messages import fail


def read_lines(path):
    """The dicts in a file of JSON lines; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def smooth(values, window):
    """The means of each value and those before it, `window` values together."""
    means = []
    for i in range(len(values)):
        last = values[max(0, i + 1 - window):i + 1]
        means.append(sum(last) / len(last))
    return means


def curves_of_log(folder, window):
    """{panel: (label, steps, values)} of a run's losses and of its gradient norm."""
    lines = read_lines(folder / "log.jsonl")
    names = []
    for line in lines:
        for name in line:
            if name.startswith("L_") or name in ("loss", "grad_norm"):
                names.append(name)
    curves = {}
    for name in dict.fromkeys(names):
        held = [line for line in lines if name in line]    # L_N2N is not in every line
        steps, values = [line["step"] for line in held], [line[name] for line in held]
        curves[name] = (folder.name, steps, smooth(values, window))
    return curves


def curves_of_distance(folder):
    """[(label, steps, values), ...] of the samplers whose distance was measured."""
    lines = read_lines(folder / "distance.jsonl")
    if not lines:
        return []
    curves = []
    for row in lines[-1]["figures"]:
        if row.startswith(("student", "teacher")):         # not the real digits
            label = f"{folder.name}, {row.split(', ', 1)[1]}"
            values = [line["figures"][row]["distance"] for line in lines]
            curves.append((label, [line["step"] for line in lines], values))
    return curves


def main():
    p = Parser(description="Losses, gradient norm and distance over the steps, as a PNG.")
    p.add_argument("runs", type=pathlib.Path, nargs="+", help="run folders")
    p.add_argument("--out", type=pathlib.Path, required=True, help="the PNG to write")
    p.add_argument("--smooth", type=int, default=5, help="lines of the log in a mean")
    args = p.parse_args()
    folders.check_output(args.out)
    try:
        import matplotlib
    except ImportError:
        fail("curves.py draws with matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {}                            # {title: [(label, steps, values), ...]}
    for folder in args.runs:
        curves = curves_of_log(folder, args.smooth)
        if not curves:
            fail(f"{folder}: no log.jsonl with lines in it")
        for name, curve in curves.items():
            panels.setdefault(name, []).append(curve)
        for curve in curves_of_distance(folder):
            panels.setdefault("distance", []).append(curve)

    size = (4 * len(panels), 3.2)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        marker = "o" if title == "distance" else None
        for label, steps, values in curves:
            axis.plot(steps, values, label=label, marker=marker)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()
