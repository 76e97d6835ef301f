"""Rows of the papers' ablation tables on glyphs: equal steps, equal teacher, several seeds.

    python benchmarks/ablation.py decm                     # half an hour on 2 cores
    python benchmarks/ablation.py decm-samplers            # also: decm-options
    python benchmarks/ablation.py facm           # also: teachers, networks, stability, weights
    python benchmarks/ablation.py gcm                      # also: gcm-others, gcm-options
    python benchmarks/ablation.py decm --seeds 0 --steps 100
    python benchmarks/ablation.py gcm-options --rows 7c 7d

Every row is a run in runs/ablation, of the method's script or, for sCM and MeanFlow, of
baselines.py. Its teacher is a run of flow.py in a separate folder there, which all rows and seeds
with this teacher share. A row is measured as in quickstart.py, on 1,000 samples: it shows the
Frechet distance of 64 features, mean and standard deviation over the seeds. The same command
resumes a table that was interrupted. The papers trained for days, and runs of minutes can at most
show which choices are better, not by how much.

"stability" adds percentiles of the gradient norm before clipping, over all steps and averaged over
the seeds, and the number of runs that collapsed: those that ended because loss or gradient were not
finite, or whose one-step samples are recognised less often than one Euler step of their teacher.
"""

import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quickstart

import sample
from common import folders
from common.flags import Parser
from common.log import read_lines
from common.messages import fail

# --------------------------------------------------------------------------------------------------
# The tables.

class Row(NamedTuple):
    """A row of a table, a run for each seed."""

    label: str
    flags: str                     # of the run, beside those of the table
    paper: tuple = ()              # the paper's figure for each column, or None
    script: str = ""               # "" is the table's
    teacher: str | None = ""       # flags of flow.py for its teacher; None: the row has none


class Table(NamedTuple):
    """A table of a paper."""

    script: str
    steps: int
    columns: list                  # of (name of a sampler, or None for the method's own; NFE)
    rows: list
    flags: str = ""                # of all rows
    seeds: tuple = (0, 1, 2)
    gradients: bool = False        # whether the norms of the gradient are columns


PIXELNORM = "--net pixelnorm=True"
SCM, MEANFLOW = "--objective scm", "--objective meanflow"
LOG_ALL = "--log-every 1"          # a line of the log for each step
DECM = "--lr 6e-3 --warmup 200 --c 1e-3"
N2N = "--freq 3"                   # the paper's value, for rows that train N2N
DIT = "--net name=LightningDiT patch=2 width=96 depth=4 heads=4"
DIT_TEACHER = " --lr 2e-3 --steps 8000"
DIT_LR = "--lr 1e-3"               # of its students
ECT = "--row A --scheme ect --P-mean -1.1 --P-std 2"
TWO_STEPS = [(None, 1), (None, 2)]

TABLES = {
    "facm": Table(
        "facm.py", 400, TWO_STEPS, flags=LOG_ALL, rows=[
            Row("sCM (w/o pixel norm.)", SCM, script="baselines.py"),
            Row("sCM (w/ pixel norm.)", SCM, (3.04, None), "baselines.py", PIXELNORM),
            Row("MeanFlow", MEANFLOW, (2.75, None), "baselines.py"),
            Row("FACM (auxiliary)", "--condition auxiliary", (1.93, None)),
            Row("FACM (expanded)", "", (1.76, 1.32)),
            Row("MeanFlow (from scratch)", MEANFLOW + " --teacher none --steps 1500", (2.65, None),
                "baselines.py", None),
            Row("FACM (from scratch)", "--teacher none --steps 1500", (2.27, None), teacher=None)]),
    "teachers": Table(
        "facm.py", 400, TWO_STEPS, flags=LOG_ALL, rows=[
            Row("FACM, teacher of 500 steps", "", teacher="--steps 500"),
            Row("FACM, teacher of 1000 steps", "", teacher="--steps 1000"),
            Row("FACM, teacher of 2000 steps", ""),
            Row("sCM, teacher of 500 steps", SCM, (), "baselines.py", PIXELNORM + " --steps 500"),
            Row("sCM, teacher of 1000 steps", SCM, (), "baselines.py", PIXELNORM + " --steps 1000"),
            Row("sCM, teacher of 2000 steps", SCM, (), "baselines.py", PIXELNORM)]),
    # Table 2 on a transformer of 0.7 M parameters; "facm" has the same methods on a U-Net
    "networks": Table(
        "facm.py", 1600, TWO_STEPS, rows=[
            Row("FACM", DIT_LR, (None, 1.32), teacher=DIT + DIT_TEACHER),
            Row("MeanFlow", f"{MEANFLOW} {DIT_LR}", (None, 1.74), "baselines.py",
                DIT + DIT_TEACHER),
            Row("sCM, pixel norm.", f"{SCM} {DIT_LR}", (None, 1.94), "baselines.py",
                DIT + " pixelnorm=True" + DIT_TEACHER),
            Row("sCM", f"{SCM} {DIT_LR}", (), "baselines.py", DIT + DIT_TEACHER),
            Row("FACM, pixel norm.", DIT_LR, teacher=DIT + " pixelnorm=True" + DIT_TEACHER)]),
    "stability": Table(
        "facm.py", 400, [(None, 1)], flags=LOG_ALL, seeds=(0, 1, 2, 3, 4), gradients=True, rows=[
            Row("FACM", ""),
            Row("FACM, pixel norm.", "", teacher=PIXELNORM),
            Row("FACM without anchor", "--anchor 0"),
            Row("FACM without anchor, pixel norm.", "--anchor 0", teacher=PIXELNORM),
            Row("sCM", SCM, script="baselines.py"),
            Row("sCM, pixel norm.", SCM, (), "baselines.py", PIXELNORM)]),
    "weights": Table(
        "facm.py", 400, TWO_STEPS, flags=LOG_ALL, rows=[
            Row("1; 1", "--alpha 1 --beta 1", (None, 1.45)),
            Row("1; cos", "--alpha 1", (None, 1.39)),
            Row("1-t^0.5; 1", "--beta 1", (None, 1.42)),
            Row("1-t^0.5; 1-t^0.5", "--beta 1-t^p", (None, 1.37)),
            Row("cos; cos", "--alpha cos", (None, 1.40)),
            Row("1-t^0.5; cos", "", (None, 1.32))]),
    "decm": Table(
        "decm.py", 400, [("cm", 1), ("cm", 2), ("cm", 4), ("euler", 50)], flags=DECM, rows=[
            Row("(c) FM", "--objectives fm", (263.86, 220.55, 87.93, 1.45)),
            Row("(d) CD", "--objectives cd", (3.08, 2.50, 2.54, 6.52)),
            Row("(e) FM + CD", "--objectives fm cd", (1.78, 1.41, 1.62, 1.78)),
            Row("(f) FM + N2N", "--objectives fm n2n " + N2N, (441.66, 297.28, 132.60, 1.41)),
            Row("(g) FM + CD + N2N", N2N, (1.70, 1.33, 1.41, 1.26))]),
    "decm-samplers": Table(
        "decm.py", 400, flags=DECM,
        columns=[("euler", 4), ("euler", 8), ("euler", 16), ("cm", 4), ("cm", 8), ("cm", 16),
                 ("mix", 4), ("mix", 8), ("mix", 16)],
        rows=[Row("Table 4", N2N, (76.15, 8.26, 2.38, 1.56, 2.37, 3.72, 1.41, 1.51, 1.42))]),
    # Rows (h) to (o); (i), (j) and (o) are the preset of glyphs. Four rows are not in the paper:
    # they are what a later version is said to have
    "decm-options": Table(
        "decm.py", 800, [("cm", 1), ("cm", 2), ("mix", 4), ("euler", 50)], [
            Row("(i), (j), (o)", "", (1.75, 1.30, 1.43, 1.35)),
            Row("(h) velocity normalisation", "--vel-norm 3", (1.70, 1.33, 1.41, 1.26)),
            Row("clipped", "--vel-norm 3 --vel-clip"),
            Row("gamma 1", "--gam 1"),
            Row("falling r", "--r-max 0.1 --r-fall 400"),
            Row("all three", "--vel-norm 3 --vel-clip --gam 1 --r-max 0.1 --r-fall 400"),
            Row("(k) arctan-norm", "--times arctan", (1.74, 1.36, 1.62, 1.45)),
            Row("(l) log-norm", "--times lognorm", (1.83, 1.45, 1.67, 1.41)),
            Row("(m)", "--freq 1", (1.72, 1.48, 1.77, 1.45)),
            Row("(n)", "--freq 3", (1.70, 1.33, 1.41, 1.26))]),
    "gcm": Table(
        "gcm.py", 1000, TWO_STEPS, [
            Row("(A)", "--row A", (6.40, 4.28), teacher=None),
            Row("(B)", "--row B", (5.73, 4.40), teacher=None),
            Row("(C)", "--row C", (5.75, 4.31), teacher=None),
            Row("(D)", "--row D", (3.02, 2.24), teacher=None),
            Row("(E)", "--row E", (2.91, 2.20), teacher=None),
            Row("(F)", "--row F", (2.91, 2.19), teacher=None),
            Row("(G)", "--row G", (6.59, 4.27), teacher=None),
            Row("(H)", "--row H", (5.50, 4.10), teacher=None),
            Row("(I)", "--row I", (5.49, 4.06), teacher=None),
            Row("(J)", "--row J", (2.94, 2.15), teacher=None),
            Row("(K)", "--row K", (2.91, 2.15), teacher=None),
            Row("(L)", "--row L", (2.86, 2.11), teacher=None)]),
    # Tables 7e and 11. The curriculum of row 11 a is the same fraction of the run as in the paper
    "gcm-others": Table(
        "gcm.py", 1000, TWO_STEPS, [
            Row("(J)", "--row J", (2.94, 2.15), teacher=None),
            Row("7e: IMM", "--row J --scheme imm", (3.63, 2.37), teacher=None),
            Row("7e: MeanFlow", "--row J --scheme meanflow --equal 0.25 --P-mean -2 --P-std 2",
                (4.10, 2.58), teacher=None),
            Row("7e: FACM", "--row J --scheme facm --equal 0.5 --P-mean -1 --P-std 1.4",
                (5.25, 4.24), teacher=None),
            Row("11: a", ECT + " --ht ect --curriculum 125", (3.87, 2.84), teacher=None),
            Row("11: b", ECT + " --ht ect", (4.63, 3.09), teacher=None),
            Row("11: c", ECT + " --ht exp", (4.38, 3.09), teacher=None),
            Row("11: d", ECT + " --ht exp --ct exp", (4.38, 3.05), teacher=None),
            Row("11: e (E)", "--row E", (2.91, 2.20), teacher=None)]),
    # Tables 7b to 7d, 7f, 7g, 7i and 7j, without the rows that are in "gcm". Table 7f is a figure,
    # whose values are not in the text. The curriculum is the same fraction of the run as the paper's
    "gcm-options": Table(
        "gcm.py", 4000, TWO_STEPS, [
            Row("7c: c(t) = 1000t", "--row B --ct 1000t", (8.59, 7.05), teacher=None),
            Row("7d: curriculum", "--row K --curriculum 500", (3.12, 2.25), teacher=None),
            Row("7f: nu = 1", "--row K --nu-s 1", teacher=None),
            Row("7g: sine(1, 0.1)", "--row E --pt-ab 1 0.1", (2.94, 2.21), teacher=None),
            Row("7g: cosh(1.5, 0)", "--row E --pt cosh --pt-ab 1.5 0", (2.93, 2.23), teacher=None),
            Row("7g: sine(1, 0.001)", "--row E --pt-ab 1 0.001", (2.92, 2.20), teacher=None),
            Row("7i: shared times", "--row K --group 2 --share-time --kernel-sigma inf",
                (2.91, 2.16), teacher=None),
            Row("7j: analytic", "--row K --jvp exact", (2.93, 2.18), teacher=None),
            Row("7b: constant", "--row D --ht const", (4.62, 2.50), teacher=None),
            Row("7b: quadratic increase", "--row D --ht quad-inc", (9.09, 3.08), teacher=None),
            Row("7b: EDM's", "--row D --ht edm", (3.29, 2.24), teacher=None),
            Row("7b: ECT's", "--row D --ht ect", (3.20, 2.27), teacher=None),
            Row("7b: linear decrease", "--row D --ht linear", (3.08, 2.26), teacher=None),
            Row("7b: quadratic convex", "--row D --ht quad-convex", (6.83, 2.75), teacher=None),
            Row("7b: exponential", "--row D --ht exp-equal", (3.03, 2.26), teacher=None)]),
}


# --------------------------------------------------------------------------------------------------
# Runs.

def column(sampler, nfe):
    """The name of a column."""
    return f"{sampler or 'NFE'} {nfe}"


def train(script, flags, out):
    """Runs a script with these arguments to its end, on one thread. The same command resumes it.
    Returns False if it ended because loss or gradient were not finite."""
    command = [sys.executable, "-W", "ignore", str(ROOT / script), "--device", "cpu", *flags,
               "--preview-every", "1000000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    if "were not finite" in done.stderr:
        return False
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return True


def folder_of(*words):
    """The folder of a run, whose name contains its script, flags, ..."""
    parts = " ".join(words).split()
    return pathlib.Path("runs/ablation") / "-".join(part.strip("-") for part in parts)


def gradient_norms(out):
    """Percentiles 50, 90, 99 and 100 of the gradient norm in a run that logs each step."""
    lines = read_lines(out / "log.jsonl")
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]       # not if skipped
    return np.percentile(norms, [50, 90, 99, 100]).tolist()


def figures_of(script, flags, out, columns, n):
    """Trains and measures a run: {column: (distance, fraction recognised)} and, if each step is
    logged, {"gradients": percentiles of the gradient norm}. The run folder keeps them."""
    finished = train(script, flags, out)
    gradients = {}
    if LOG_ALL in " ".join(flags):
        gradients = dict(gradients=gradient_norms(out))
    if not finished:
        return {column(*pair): (math.inf, 0.0) for pair in columns} | gradients
    kept = out / f"figures-{n}.json"
    figures = {}
    if kept.exists():
        figures = json.loads(kept.read_text())
    torch.set_num_threads(1)
    labels = torch.arange(n) % 10
    classifier = quickstart.load_classifier("glyphs", 16)
    reference = quickstart.reference_of(classifier, "glyphs", 16)
    net, checkpoint = sample.load(out / "ckpt.pt")
    for sampler, nfe in columns:
        name = column(sampler, nfe)
        if name not in figures:
            images = sample.draw(net, checkpoint, nfe, labels, sampler=sampler)
            share, distance = quickstart.measure(classifier, images, labels, reference)
            figures[name] = distance, share
    figures |= gradients
    kept.write_text(json.dumps(figures))
    return figures


def train_all(table, steps, seeds, n, jobs):
    """Trains and measures the runs of a table. Returns {label of a row: [figures of a seed, ...]},
    and the figures of the teachers, {their flags: figures}. Rows and tables with the same flags
    share their runs."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn) as pool:
        columns_of_teacher = [("euler", 1)] if table.gradients else []
        waiting = {}
        for flags in dict.fromkeys(row.teacher for row in table.rows if row.teacher is not None):
            waiting[flags] = pool.submit(figures_of, "flow.py", flags.split(),
                                         folder_of("flow", flags), columns_of_teacher, n)
        teachers = {flags: judged.result() for flags, judged in waiting.items()}

        waiting = {}
        for row in table.rows:
            script = row.script or table.script
            for seed in seeds:
                flags = f"{table.flags} --steps {steps} {row.flags} --seed {seed}".split()
                words = [script.removesuffix(".py"), str(steps), f"seed{seed}", table.flags,
                         row.flags]
                if row.teacher is not None:
                    flags += ["--teacher", str(folder_of("flow", row.teacher) / "ckpt.pt")]
                if row.teacher:
                    words += ["teacher", row.teacher]
                waiting[row.label, seed] = pool.submit(
                    figures_of, script, flags, folder_of(*words), table.columns, n)
        figures = {row.label: [] for row in table.rows}
        for (label, seed), judged in waiting.items():
            figures[label].append(judged.result())
            print(f"{label}, seed {seed}: {judged.result()}", file=sys.stderr)
    return figures, teachers


# --------------------------------------------------------------------------------------------------
# The program.

def mean_and_spread(values):
    """The mean and, for several values, the standard deviation as text."""
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1 and math.inf not in values:
        text += f" ± {statistics.stdev(values):.1f}"
    return text


def print_row(cells):
    """Prints a row of a table in Markdown."""
    print("| " + " | ".join(cells) + " |")


def print_table(table, figures, teachers):
    """Prints our figures, mean and deviation over the seeds, and the paper's FID below each row."""
    names = [column(*pair) for pair in table.columns]
    heads = ["row", *names]
    if table.gradients:
        heads += ["gradient 50%, 90%, 99%, 100%", "collapsed"]
    print_row(heads)
    print("|---" * len(heads) + "|")
    for row in table.rows:
        found = figures[row.label]
        cells = [f"{row.label} {row.flags}".strip()]
        for name in names:
            cells.append(mean_and_spread([one[name][0] for one in found]))
        if table.gradients:
            percentiles = np.mean([one["gradients"] for one in found], axis=0)
            cells.append(", ".join(f"{value:.2f}" for value in percentiles))
            share_of_blurs = teachers[row.teacher]["euler 1"][1]
            collapsed = [one for one in found if one[names[0]][1] < share_of_blurs]
            cells.append(f"{len(collapsed)} of {len(found)}")
        print_row(cells)
        if any(row.paper):
            print_row(["paper", *("" if value is None else f"{value:.2f}" for value in row.paper)])


def main():
    p = Parser(description="Rows of the papers' ablation tables on glyphs.")
    p.add_argument("table", choices=list(TABLES), help="the table to measure")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only the rows whose names begin with "
                   "one of these words (default: all)")
    p.add_argument("--seeds", type=int, nargs="+", help="seeds of the training (default: 0, 1, 2; "
                   "stability: 0 to 4)")
    p.add_argument("--steps", type=int, help="steps of each row (default: the table's)")
    p.add_argument("--n", type=int, default=1000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = p.parse_args()
    folders.check_output(args.json)
    if args.n < 100:
        fail(f"--n {args.n}: 64 features need 100 samples or more")
    if args.jobs < 1 or (args.steps is not None and args.steps < 1):
        fail("--jobs and --steps must be at least 1")
    table = TABLES[args.table]
    if args.rows:
        rows = [row for row in table.rows if row.label.startswith(tuple(args.rows))]
        table = table._replace(rows=rows)
    if not table.rows:
        names = ", ".join(row.label for row in TABLES[args.table].rows)
        fail(f"--rows {' '.join(args.rows)}: no row of {args.table} begins with that. Its rows are "
             f"{names}")
    steps, seeds = args.steps or table.steps, args.seeds or list(table.seeds)
    quickstart.load_classifier("glyphs", 16)               # once, before the processes need it
    figures, teachers = train_all(table, steps, seeds, args.n, args.jobs)
    print(f"{args.table}: Frechet distance after {steps} steps, {args.n} samples, seeds {seeds}; "
          "the paper's FID below\n")
    print_table(table, figures, teachers)
    if args.json:
        text = json.dumps(dict(
            table=args.table, steps=steps, seeds=seeds, n=args.n, figures=figures,
            **quickstart.provenance()), indent=2)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
