"""Rows of the papers' ablation tables on glyphs: equal steps, equal teacher, several seeds.

    python benchmarks/ablation.py decm                     # half an hour on 2 cores
    python benchmarks/ablation.py decm-samplers            # its last row's runs, other samplers
    python benchmarks/ablation.py facm                     # also: teachers, stability, weights
    python benchmarks/ablation.py gcm                      # also: gcm-others
    python benchmarks/ablation.py decm --seeds 0 --steps 100

Every row is a run in runs/ablation, of the method's script or, for sCM and MeanFlow, of baselines.py.
It is judged as in quickstart.py: 1,000 samples, Frechet distance of 64 features, mean and standard
deviation over the seeds. An interrupted table goes on where it stopped. A budget of minutes shows an
order at best: the papers trained for days.

"stability" adds percentiles of the norm of the gradient before clipping, over all steps, as their
mean over the seeds, and how many runs collapsed: those that ended in a loss or gradient that is not
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

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quickstart

import sample
from common import folders
from common.flags import Parser
from common.messages import fail

# A table: its script, the flags of all rows and of the teacher, the samplers that are its columns
# (name, or None for the method's own, and NFE), and its rows: label, flags, the paper's figure for
# each column (or None), and, where they differ from the table's, the teacher's flags (None: from
# scratch). A row with --objective is a run of baselines.py.
TEACHER, PIXELNORM = ["--steps", "0"], ["--net", "pixelnorm=True"]
DECM = ["--freq", "3", "--lr", "6e-3", "--warmup", "200", "--c", "1e-3"]      # the paper's freq
ECT = ["--scheme", "ect", "--P-mean", "-1.1", "--P-std", "2"]
TABLES = {
    "facm": dict(
        script="facm.py", steps=400, flags=["--log-every", "1"], teacher=TEACHER,
        columns=[(None, 1), (None, 2)],
        rows=[
            ("sCM (w/o pixel norm.)", ["--objective", "scm"], (None, None)),
            ("sCM (w/ pixel norm.)", ["--objective", "scm", *PIXELNORM], (3.04, None),
             TEACHER + PIXELNORM),
            ("MeanFlow", ["--objective", "meanflow"], (2.75, None)),
            ("FACM (auxiliary)", ["--condition", "auxiliary"], (1.93, None)),
            ("FACM (expanded)", [], (1.76, 1.32)),
            ("MeanFlow (from scratch)", ["--objective", "meanflow", "--pretrain", "0", "--steps",
                                         "1500"], (2.65, None), None),
            ("FACM (from scratch)", ["--pretrain", "0", "--steps", "1500"], (2.27, None), None)]),
    "teachers": dict(
        script="facm.py", steps=400, flags=["--log-every", "1"], teacher=TEACHER,
        columns=[(None, 1), (None, 2)],
        rows=[
            (f"{name}, teacher of {steps} steps", flags, (None, None),
             [*TEACHER, *more, *([] if steps == 2000 else ["--pretrain", str(steps)])])
            for name, flags, more in (("FACM", [], []),
                                      ("sCM", ["--objective", "scm", *PIXELNORM], PIXELNORM))
            for steps in (500, 1000, 2000)]),
    "stability": dict(
        script="facm.py", steps=400, flags=["--log-every", "1"], teacher=TEACHER,
        columns=[(None, 1)], seeds=range(5), gradients=True,
        rows=[
            (name + pixelnorm, [*flags, *more], (None,), TEACHER + more)
            for name, flags in (("FACM", []), ("FACM without anchor", ["--anchor", "0"]),
                                ("sCM", ["--objective", "scm"]))
            for pixelnorm, more in (("", []), (", pixel norm.", PIXELNORM))]),
    "weights": dict(
        script="facm.py", steps=400, flags=["--log-every", "1"], teacher=TEACHER,
        columns=[(None, 1), (None, 2)],
        rows=[
            ("1; 1", ["--alpha", "1", "--beta", "1"], (None, 1.45)),
            ("1; cos", ["--alpha", "1"], (None, 1.39)),
            ("1-t^0.5; 1", ["--beta", "1"], (None, 1.42)),
            ("1-t^0.5; 1-t^0.5", ["--beta", "1-t^p"], (None, 1.37)),
            ("cos; cos", ["--alpha", "cos"], (None, 1.40)),
            ("1-t^0.5; cos", [], (None, 1.32))]),
    "decm": dict(
        script="decm.py", steps=400, flags=DECM, teacher=TEACHER,
        columns=[("cm", 1), ("cm", 2), ("cm", 4), ("euler", 50)],
        rows=[
            ("(c) FM", ["--objectives", "fm"], (263.86, 220.55, 87.93, 1.45)),
            ("(d) CD", ["--objectives", "cd"], (3.08, 2.50, 2.54, 6.52)),
            ("(e) FM + CD", ["--objectives", "fm", "cd"], (1.78, 1.41, 1.62, 1.78)),
            ("(f) FM + N2N", ["--objectives", "fm", "n2n"], (441.66, 297.28, 132.60, 1.41)),
            ("(g) FM + CD + N2N", [], (1.70, 1.33, 1.41, 1.26))]),
    "decm-samplers": dict(
        script="decm.py", steps=400, flags=DECM, teacher=TEACHER,
        columns=[(name, nfe) for name in ("euler", "cm", "mix") for nfe in (4, 8, 16)],
        rows=[("Table 4", [], (76.15, 8.26, 2.38, 1.56, 2.37, 3.72, 1.41, 1.51, 1.42))]),
    "gcm": dict(
        script="gcm.py", steps=1000, flags=[], teacher=None, columns=[(None, 1), (None, 2)],
        rows=[(f"({row})", ["--row", row], paper) for row, paper in dict(
            A=(6.40, 4.28), B=(5.73, 4.40), C=(5.75, 4.31), D=(3.02, 2.24), E=(2.91, 2.20),
            F=(2.91, 2.19), G=(6.59, 4.27), H=(5.50, 4.10), I=(5.49, 4.06), J=(2.94, 2.15),
            K=(2.91, 2.15), L=(2.86, 2.11)).items()]),
    "gcm-others": dict(                    # Tables 7e, and 11, whose curriculum is as long a share
        script="gcm.py", steps=1000, flags=[], teacher=None, columns=[(None, 1), (None, 2)],
        rows=[
            ("(J)", ["--row", "J"], (2.94, 2.15)),
            ("7e: IMM", ["--row", "J", "--scheme", "imm"], (3.63, 2.37)),
            ("7e: MeanFlow", ["--row", "J", "--scheme", "meanflow", "--equal", "0.25", "--P-mean",
                              "-2", "--P-std", "2"], (4.10, 2.58)),
            ("7e: FACM", ["--row", "J", "--scheme", "facm", "--equal", "0.5", "--P-mean", "-1",
                          "--P-std", "1.4"], (5.25, 4.24)),
            *((f"11: {label}", ["--row", "A", *ECT, *flags], paper) for label, flags, paper in (
                ("a", ["--ht", "ect", "--curriculum", "125"], (3.87, 2.84)),
                ("b", ["--ht", "ect"], (4.63, 3.09)), ("c", ["--ht", "exp"], (4.38, 3.09)),
                ("d", ["--ht", "exp", "--ct", "exp"], (4.38, 3.05)))),
            ("11: e (E)", ["--row", "E"], (2.91, 2.20))]),
}


def column(sampler, nfe):
    """The name of a column."""
    return f"{sampler or 'NFE'} {nfe}"


def train(script, flags, out):
    """Runs a script to its end on one thread; the same command resumes it. False: it diverged."""
    command = [sys.executable, "-W", "ignore", str(ROOT / script), "--device", "cpu", *flags,
               "--preview-every", "1000000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    if "error: not finite" in done.stderr:
        return False
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return True


def name_of(words):
    """A folder's name for these words and flags."""
    return "-".join(word.strip("-") for word in words)


def figures_of(script, flags, out, columns, n):
    """Trains and judges a run: {column: (distance, share recognised)} and percentiles 50, 90, 99 and
    100 of the gradient's norm, kept beside the run."""
    finished = train(script, flags, out)
    figures = {}
    if "--log-every" in flags:             # every step has its line
        norms = [json.loads(line)["grad_norm"] for line in open(out / "log.jsonl")]
        figures = dict(gradients=np.percentile(norms, [50, 90, 99, 100]).tolist())
    if not finished:
        return {column(*pair): (math.inf, 0.0) for pair in columns} | figures
    kept = out / f"figures-{n}.json"
    figures |= json.loads(kept.read_text()) if kept.exists() else {}
    torch.set_num_threads(1)
    classifier, labels = quickstart.load_classifier("glyphs", 16), torch.arange(n) % 10
    _, *reference = quickstart.judge(classifier, *quickstart.real_images("glyphs", 16, "reference"))
    net, checkpoint = sample.load(out / "ckpt.pt")
    for sampler, nfe in columns:
        if column(sampler, nfe) not in figures:
            images = sample.draw(net, checkpoint, nfe, labels, sampler=sampler)
            share, distance = quickstart.measure(classifier, images, labels, reference)
            figures[column(sampler, nfe)] = distance, share
    kept.write_text(json.dumps(figures))
    return figures


def main():
    p = Parser(description="Rows of the papers' ablation tables on glyphs.")
    p.add_argument("table", choices=list(TABLES), help="which table")
    p.add_argument("--seeds", type=int, nargs="+", help="seeds of the training (default: 0, 1, 2)")
    p.add_argument("--steps", type=int, help="steps of each row (default: the table's)")
    p.add_argument("--n", type=int, default=1000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    args = p.parse_args()
    folders.check_output(args.json)
    table = TABLES[args.table]
    if args.n < 100 or args.jobs < 1 or (args.steps or 1) < 1:
        fail("--n must be at least 100, --jobs and --steps at least 1")
    steps, script, out = args.steps or table["steps"], table["script"], pathlib.Path("runs/ablation")
    seeds, columns = args.seeds or list(table.get("seeds", range(3))), table["columns"]
    quickstart.load_classifier("glyphs", 16)

    # The teachers, then the rows' runs; rows and tables with the same flags share their runs
    figures, teachers = {}, {}
    rows = [(row[0], row[1], row[2], row[3] if len(row) > 3 else table["teacher"])
            for row in table["rows"]]
    with concurrent.futures.ProcessPoolExecutor(
            args.jobs, multiprocessing.get_context("spawn")) as pool:
        for *_, flags in rows:
            if flags and name_of(flags) not in teachers:
                path = out / name_of([script[:-3], "teacher", *flags[len(TEACHER):]])
                measured = [("euler", 1)] if table.get("gradients") else []
                teachers[name_of(flags)] = path / "ckpt.pt", pool.submit(
                    figures_of, script, [*table["flags"], *flags], path, measured, args.n)
        teachers = {name: (path, judged.result()) for name, (path, judged) in teachers.items()}
        waiting = {}
        for label, flags, _, teacher in rows:
            for seed in seeds:
                words = [script[:-3], str(steps), f"seed{seed}", *flags]
                given = [*table["flags"], "--steps", str(steps), *flags, "--seed", str(seed)]
                if teacher:
                    path = teachers[name_of(teacher)][0]
                    words += ["teacher", *teacher[len(TEACHER):]] if len(teacher) > 2 else []
                    given += ["--teacher", str(path)]
                waiting[label, seed] = pool.submit(
                    figures_of, "baselines.py" if "--objective" in flags else script, given,
                    out / name_of(words), columns, args.n)
        for (label, seed), judged in waiting.items():
            figures.setdefault(label, []).append(judged.result())
            print(f"{label}, seed {seed}: {judged.result()}", file=sys.stderr)

    # Print: ours (mean, deviation over the seeds), the paper's FID below
    names = [column(*pair) for pair in columns]
    print(f"{args.table}: Frechet distance after {steps} steps, {args.n} samples, seeds {seeds}; "
          "the paper's FID below\n")
    heads = [*names, *(["gradient 50%, 90%, 99%, 100%", "collapsed"] if table.get("gradients") else [])]
    print("| row | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
    for label, flags, paper, teacher in rows:
        cells = []
        for name in names:
            distances = [one[name][0] for one in figures[label]]
            spread = f" ± {statistics.stdev(distances):.1f}" if len(distances) > 1 else ""
            cells.append(f"{statistics.mean(distances):.1f}{spread}")
        if table.get("gradients"):
            mean = np.mean([one["gradients"] for one in figures[label]], axis=0)
            blurred = teachers[name_of(teacher)][1]["euler 1"][1]
            collapsed = sum(one[names[0]][1] < blurred for one in figures[label])
            cells += [", ".join(f"{value:.2f}" for value in mean), f"{collapsed} of {len(seeds)}"]
        print(f"| {label} {shlex.join(flags)} | " + " | ".join(cells) + " |")
        if any(paper):
            print("| paper | " + " | ".join(f"{value:.2f}" if value else "" for value in paper) + " |")
    if args.json:
        args.json.write_text(json.dumps(dict(
            table=args.table, steps=steps, seeds=seeds, n=args.n, figures=figures,
            **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
