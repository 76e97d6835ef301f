"""The curves of one or more runs as one PNG: losses, gradient norm and distance over the steps.

    pip install matplotlib
    python benchmarks/curves.py runs/facm-glyphs --out curves.png

Losses and gradient norms stand in log.jsonl. Distances stand in distance.jsonl, a line for each call
of `benchmarks/quickstart.py RUN --log`. A run can be cut into pieces for it:

    timeout -s TERM 120 python facm.py ; python benchmarks/quickstart.py runs/facm-glyphs --log
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
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def smooth(values, window):
    """Means over the last `window` values."""
    return [sum(values[max(0, i + 1 - window):i + 1]) / min(i + 1, window) for i in range(len(values))]


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

    # {panel: [(label, steps, values)]}; GCM's runs have one stage, the others' two
    panels, end_of_stage = {}, set()
    for folder in args.runs:
        log = read_lines(folder / "log.jsonl")
        if not log:
            fail(f"{folder}: no log.jsonl with lines in it")
        stages = [line["stage"] for line in log]
        end_of_stage |= {log[i]["step"] for i in range(len(log) - 1) if stages[i] != stages[i + 1]}
        for key in [key for key in log[-1] if key.startswith("L_") or key in ("loss", "grad_norm")]:
            lines = [line for line in log if line.get(key)]
            panels.setdefault(key, []).append((folder.name, [line["step"] for line in lines],
                                               smooth([line[key] for line in lines], args.smooth)))
        judged = read_lines(folder / "distance.jsonl")
        for row in judged[-1]["figures"] if judged else ():
            if row.startswith("student"):
                panels.setdefault("distance", []).append((
                    f"{folder.name}, {row.split(', ', 1)[1]}", [line["step"] for line in judged],
                    [line["figures"][row]["distance"] for line in judged]))

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for axis, (name, curves) in zip(axes[0], panels.items()):
        for label, steps, values in curves:
            axis.plot(steps, values, label=label, marker="o" if name == "distance" else None)
        for step in end_of_stage:
            axis.axvline(step, color="grey", linestyle=":")
        axis.set(title=name, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()
