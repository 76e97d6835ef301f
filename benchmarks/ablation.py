"""Rows of the papers' ablation tables on glyphs: equal steps, equal teacher, several seeds.

    python benchmarks/ablation.py decm                     # about an hour and a half on 2 cores
    python benchmarks/ablation.py decm --seeds 0 --steps 100

Every row is a run of the method's script in runs/ablation, judged as in quickstart.py: 2,000 samples,
Frechet distance of 64 features, mean and standard deviation over the seeds. An interrupted table goes
on where it stopped. A budget of minutes shows an order at best: the papers trained for days.
"""

import concurrent.futures
import json
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
# (name, NFE), and its rows: label, flags, the paper's figure for each column.
TABLES = {
    "decm": dict(
        script="decm.py", steps=500, flags=[], teacher=["--steps", "0"],
        columns=[("cm", 1), ("cm", 2), ("cm", 4), ("euler", 50)],
        rows=[
            ("(c) FM", ["--objectives", "fm"], (263.86, 220.55, 87.93, 1.45)),
            ("(d) CD", ["--objectives", "cd"], (3.08, 2.50, 2.54, 6.52)),
            ("(e) FM + CD", ["--objectives", "fm", "cd"], (1.78, 1.41, 1.62, 1.78)),
            ("(f) FM + N2N", ["--objectives", "fm", "n2n"], (441.66, 297.28, 132.60, 1.41)),
            ("(g) FM + CD + N2N", [], (1.70, 1.33, 1.41, 1.26))]),
    "decm-samplers": dict(
        script="decm.py", steps=500, flags=[], teacher=["--steps", "0"],
        columns=[(name, nfe) for name in ("euler", "cm", "mix") for nfe in (4, 8, 16)],
        rows=[("Table 4", [], (76.15, 8.26, 2.38, 1.56, 2.37, 3.72, 1.41, 1.51, 1.42))]),
}


def train(script, flags, out):
    """Runs a script to its end on one thread; the same command resumes it."""
    command = [sys.executable, "-W", "ignore", str(ROOT / script), "--device", "cpu", *flags,
               "--preview-every", "1000000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")


def main():
    p = data.Parser(description="Rows of the papers' ablation tables on glyphs.")
    p.add_argument("table", choices=list(TABLES), help="which table")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training")
    p.add_argument("--steps", type=int, help="steps of each row (default: the table's)")
    p.add_argument("--n", type=int, default=2000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    args = p.parse_args()
    table = TABLES[args.table]
    if args.n < 100 or args.jobs < 1 or (args.steps or 1) < 1:
        data.fail("--n must be at least 100, --jobs and --steps at least 1")
    steps, script = args.steps or table["steps"], table["script"]
    out = pathlib.Path("runs/ablation")

    # One teacher for all rows, then the rows' runs; tables with the same flags share their runs
    common = [*table["flags"], "--steps", str(steps)]
    if table["teacher"]:
        teacher = out / f"{script[:-3]}-teacher"
        train(script, [*table["flags"], *table["teacher"]], teacher)
        common += ["--teacher", str(teacher / "ckpt.pt")]
    runs = {(label, seed): out / "-".join([script[:-3], str(steps), f"seed{seed}", *(
        flag.removeprefix("--") for flag in flags)]) for label, flags, _ in table["rows"] for seed in args.seeds}
    flags_of = {label: flags for label, flags, _ in table["rows"]}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(train, script, [*common, *flags_of[label], "--seed", str(seed)], run): run
                   for (label, seed), run in runs.items()}
        for done in concurrent.futures.as_completed(waiting):
            done.result()
            print(f"trained: {waiting[done]}", file=sys.stderr)

    # Judge
    classifier, labels = quickstart.load_classifier(16), torch.arange(args.n) % 10
    _, *reference = quickstart.judge(classifier, *data.glyphs(20_000, 16, seed=2))
    figures = {}
    for (label, seed), run in runs.items():
        net, checkpoint = sample.load(run / "ckpt.pt")
        for sampler, nfe in table["columns"]:
            images = sample.draw(net, checkpoint, nfe, labels, sampler=sampler)
            share, distance = quickstart.measure(classifier, images, labels, reference)
            figures.setdefault(label, {}).setdefault(f"{sampler} {nfe}", []).append((distance, share))

    # Print: ours (mean, deviation over the seeds), the paper's FID below
    print(f"{args.table}: Frechet distance after {steps} steps, seeds {args.seeds}; the paper's FID below\n")
    columns = [f"{sampler} {nfe}" for sampler, nfe in table["columns"]]
    print("| row | flags | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for label, flags, paper in table["rows"]:
        cells = []
        for column in columns:
            distances = [distance for distance, _ in figures[label][column]]
            spread = f" ± {statistics.stdev(distances):.1f}" if len(distances) > 1 else ""
            cells.append(f"{statistics.mean(distances):.1f}{spread}")
        print(f"| {label} | `{shlex.join(flags) or '-'}` | " + " | ".join(cells) + " |")
        print("| | paper | " + " | ".join(f"{value:.2f}" for value in paper) + " |")
    if args.json:
        args.json.write_text(json.dumps(dict(
            table=args.table, steps=steps, seeds=args.seeds, n=args.n,
            figures={label: {column: dict(distance=[d for d, _ in values], recognised=[s for _, s in values])
                             for column, values in row.items()} for label, row in figures.items()},
            **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
