"""Rows of the papers' ablation tables on glyphs: equal steps, equal teacher, several seeds.

    python benchmarks/ablation.py decm                     # half an hour on 2 cores
    python benchmarks/ablation.py decm-samplers            # its last row's runs, other samplers
    python benchmarks/ablation.py decm --seeds 0 --steps 100

Every row is a run of the method's script in runs/ablation, judged as in quickstart.py: 1,000 samples,
Frechet distance of 64 features, mean and standard deviation over the seeds. An interrupted table goes
on where it stopped. A budget of minutes shows an order at best: the papers trained for days.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shlex
import statistics
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import data
import quickstart
import sample

# A table: its script, the flags of all rows and of the teacher, the samplers that are its columns
# (name, or None for the method's own, and NFE), and its rows: label, flags, the paper's figure for
# each column.
TABLES = {
    "decm": dict(
        script="decm.py", steps=400, flags=[], teacher=["--steps", "0"],
        columns=[("cm", 1), ("cm", 2), ("cm", 4), ("euler", 50)],
        rows=[
            ("(c) FM", ["--objectives", "fm"], (263.86, 220.55, 87.93, 1.45)),
            ("(d) CD", ["--objectives", "cd"], (3.08, 2.50, 2.54, 6.52)),
            ("(e) FM + CD", ["--objectives", "fm", "cd"], (1.78, 1.41, 1.62, 1.78)),
            ("(f) FM + N2N", ["--objectives", "fm", "n2n"], (441.66, 297.28, 132.60, 1.41)),
            ("(g) FM + CD + N2N", [], (1.70, 1.33, 1.41, 1.26))]),
    "decm-samplers": dict(
        script="decm.py", steps=400, flags=[], teacher=["--steps", "0"],
        columns=[(name, nfe) for name in ("euler", "cm", "mix") for nfe in (4, 8, 16)],
        rows=[("Table 4", [], (76.15, 8.26, 2.38, 1.56, 2.37, 3.72, 1.41, 1.51, 1.42))]),
    "gcm": dict(
        script="gcm.py", steps=1000, flags=[], teacher=None, columns=[(None, 1), (None, 2)],
        rows=[(f"({row})", ["--row", row], paper) for row, paper in dict(
            A=(6.40, 4.28), B=(5.73, 4.40), C=(5.75, 4.31), D=(3.02, 2.24), E=(2.91, 2.20),
            F=(2.91, 2.19), G=(6.59, 4.27), H=(5.50, 4.10), I=(5.49, 4.06), J=(2.94, 2.15),
            K=(2.91, 2.15), L=(2.86, 2.11)).items()]),
}


def column(sampler, nfe):
    """The name of a column."""
    return f"{sampler or 'NFE'} {nfe}"


def train(script, flags, out):
    """Runs a script to its end on one thread; the same command resumes it."""
    command = [sys.executable, "-W", "ignore", str(ROOT / script), "--device", "cpu", *flags,
               "--preview-every", "1000000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")


def figures_of(script, flags, out, columns, n):
    """Trains and judges a run: {column: (distance, share recognised)}, kept beside the run."""
    train(script, flags, out)
    kept = out / f"figures-{n}.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}
    torch.set_num_threads(1)
    classifier, labels = quickstart.load_classifier(16), torch.arange(n) % 10
    _, *reference = quickstart.judge(classifier, *data.glyphs(20_000, 16, seed=2))
    net, checkpoint = sample.load(out / "ckpt.pt")
    for sampler, nfe in columns:
        if column(sampler, nfe) not in figures:
            images = sample.draw(net, checkpoint, nfe, labels, sampler=sampler)
            share, distance = quickstart.measure(classifier, images, labels, reference)
            figures[column(sampler, nfe)] = distance, share
    kept.write_text(json.dumps(figures))
    return figures


def main():
    p = data.Parser(description="Rows of the papers' ablation tables on glyphs.")
    p.add_argument("table", choices=list(TABLES), help="which table")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training")
    p.add_argument("--steps", type=int, help="steps of each row (default: the table's)")
    p.add_argument("--n", type=int, default=1000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    args = p.parse_args()
    table = TABLES[args.table]
    if args.n < 100 or args.jobs < 1 or (args.steps or 1) < 1:
        data.fail("--n must be at least 100, --jobs and --steps at least 1")
    steps, script, out = args.steps or table["steps"], table["script"], pathlib.Path("runs/ablation")
    quickstart.load_classifier(16)

    # One teacher for all rows, then the rows' runs; tables with the same flags share their runs
    common = [*table["flags"], "--steps", str(steps)]
    if table["teacher"]:
        teacher = out / f"{script[:-3]}-teacher"
        train(script, [*table["flags"], *table["teacher"]], teacher)
        common += ["--teacher", str(teacher / "ckpt.pt")]
    columns, figures = table["columns"], {}
    with concurrent.futures.ProcessPoolExecutor(
            args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {}
        for label, flags, _ in table["rows"]:
            for seed in args.seeds:
                words = [script[:-3], str(steps), f"seed{seed}", *(f.strip("-") for f in flags)]
                waiting[label, seed] = pool.submit(
                    figures_of, script, [*common, *flags, "--seed", str(seed)],
                    out / "-".join(words), columns, args.n)
        for (label, seed), run in waiting.items():
            figures.setdefault(label, []).append(run.result())
            print(f"{label}, seed {seed}: {run.result()}", file=sys.stderr)

    # Print: ours (mean, deviation over the seeds), the paper's FID below
    names = [column(*pair) for pair in columns]
    print(f"{args.table}: Frechet distance after {steps} steps, {args.n} samples, seeds {args.seeds}; "
          "the paper's FID below\n")
    print("| row | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for label, flags, paper in table["rows"]:
        cells = []
        for name in names:
            distances = [one[name][0] for one in figures[label]]
            spread = f" ± {statistics.stdev(distances):.1f}" if len(distances) > 1 else ""
            cells.append(f"{statistics.mean(distances):.1f}{spread}")
        print(f"| {label} {shlex.join(flags)} | " + " | ".join(cells) + " |")
        print("| paper | " + " | ".join(f"{value:.2f}" for value in paper) + " |")
    if args.json:
        args.json.write_text(json.dumps(dict(
            table=args.table, steps=steps, seeds=args.seeds, n=args.n, figures=figures,
            **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
