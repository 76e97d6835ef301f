"""The curves of one or more runs in one PNG: losses, gradient norm, FID and distance by step.

    pip install matplotlib
    python benchmarks/curves.py runs/flow-glyphs runs/facm-glyphs --out curves.png

Losses, gradient norms and, with --eval-every, the FID are in log.jsonl. A dotted line marks a step
at which the run was resumed with other flags. Distances are in distance.jsonl, which quickstart.py
writes for a run that keeps snapshots:

    python facm.py --keep-every 80
    python benchmarks/quickstart.py runs/facm-glyphs --log
    python benchmarks/curves.py runs/facm-glyphs --table 5         # five of its steps, in Markdown
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import folders
from common.flags import Parser
from common.log import read_lines
from common.messages import fail

DISTANCES = dict(fid="FID", fd="Frechet distance")         # keys of log.jsonl, and their panels


def smooth(values, window):
    """The running means, each over a value and the `window - 1` values before it."""
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


def curves_of_fid(folder):
    """{panel: [(label, steps, values), ...]} of a run's evaluations. A curve has one NFE and one
    number of samples, because figures are comparable only if both are equal."""
    panels = {}
    for key, title in DISTANCES.items():
        points = {}                        # {label: [(step, figure), ...]}
        for line in read_lines(folder / "log.jsonl"):
            for nfe, figure in line.get(key, {}).items():
                label = f"{folder.name}, {nfe}, {line['eval_n']:,} samples"
                points.setdefault(label, []).append((line["step"], figure))
        if points:
            panels[title] = [(label, *zip(*pairs)) for label, pairs in points.items()]
    return panels


def changes_of(folder):
    """[(step, text), ...] for the flags that changed when the run was resumed."""
    changes = []
    for line in read_lines(folder / "log.jsonl"):
        names = [f"{name} {new}" for name, (_, new) in line.get("changed", {}).items()]
        if names:
            changes.append((line["step"], ", ".join(names)))
    return changes


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


def print_table(folder, rows, log):
    """Prints a run as a table in Markdown: losses and gradient norm, smoothed as in the picture,
    and distances. rows: the number of steps, which are equally spaced."""
    columns = {}                           # {head: {step: value}}
    for name, (_, steps, values) in log.items():
        columns[name] = dict(zip(steps, values))
    last = max(max(column) for column in columns.values())
    for label, steps, values in curves_of_distance(folder):
        columns[f"distance, {label.split(', ', 1)[1]}"] = dict(zip(steps, values))
    print("| step | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for i in range(1, rows + 1):
        step = last * i // rows
        cells = []
        for column in columns.values():
            before = [held for held in column if held <= step]         # the last line up to there
            cells.append(f"{column[max(before)]:.3g}" if before else "")
        print(f"| {step:,} | " + " | ".join(cells) + " |")


def main():
    p = Parser(description="Losses, gradient norm, FID and distance over the steps, as a PNG.")
    p.add_argument("runs", type=pathlib.Path, nargs="+", help="run folders")
    output = p.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", type=pathlib.Path, help="the PNG to write")
    output.add_argument("--table", type=int, metavar="ROWS", help="print a table of ROWS steps")
    p.add_argument("--smooth", type=int, default=5, help="lines of the log in each running mean")
    args = p.parse_args()
    folders.check_output(args.out)
    logs = {}                              # {run folder: its curves_of_log}
    for folder in args.runs:
        logs[folder] = curves_of_log(folder, args.smooth)
        if not logs[folder]:
            fail(f"{folder}: no log.jsonl with lines in it")
    if args.table:
        for folder in args.runs:
            print_table(folder, args.table, logs[folder])
        return
    try:
        import matplotlib
    except ImportError:
        fail("curves.py draws with matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {}                            # {title: [(label, steps, values), ...]}
    changes = []                           # [(step, text), ...]
    for folder in args.runs:
        for name, curve in logs[folder].items():
            panels.setdefault(name, []).append(curve)
        for title, evaluated in curves_of_fid(folder).items():
            panels.setdefault(title, []).extend(evaluated)
        for curve in curves_of_distance(folder):
            panels.setdefault("distance", []).append(curve)
        changes += changes_of(folder)

    size = (4 * len(panels), 3.2)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        few = title in ("distance", *DISTANCES.values())   # points, which are marked
        for label, steps, values in curves:
            axis.plot(steps, values, label=label, marker="o" if few else None)
        axis.set(title=title, xlabel="step", yscale="log")
        for step, text in changes:
            axis.axvline(step, color="gray", linestyle=":")
            axis.text(step, 0.02, f" {text}", fontsize=6, rotation=90, color="gray",
                      transform=axis.get_xaxis_transform())
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()
