"""Five methods, one network, equal seconds of training: FACM, DE-CM, GCM, sCM and MeanFlow.

    python benchmarks/bakeoff.py glyphs
    python benchmarks/bakeoff.py mnist --seeds 0 --teacher-seconds 900 --seconds 600

FACM, DE-CM, sCM and MeanFlow start from one teacher a seed, which facm.py's flow matching trains.
GCM needs none and trains from scratch, for the teacher's and a student's seconds together. The
options are those of each script's preset for this data; the network is the same in all.

A second is one of CPU time of one thread. First each method runs 5 and 25 steps; the difference is
the cost of a step, and the steps of its runs follow from it. Runs are kept in runs/bakeoff, and an
interrupted table goes on where it stopped. The measure is that of quickstart.py. The picture shows
the first seed's runs, with the same noise in each row.
"""

import concurrent.futures
import json
import os
import pathlib
import resource
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import ablation
import quickstart

import data
import sample
from common import folders
from common.flags import Parser
from common.messages import fail

METHODS = {                                # name: script and its flags
    "FACM": ("facm.py",), "DE-CM": ("decm.py",), "GCM": ("gcm.py",),
    "sCM": ("baselines.py", "--objective", "scm"),
    "MeanFlow": ("baselines.py", "--objective", "meanflow")}
COLUMNS = (1, 2, 4)                        # NFE


def seconds_of_a_step(script, flags, count, out):
    """CPU seconds of one step; count: the flag that says how many steps."""
    taken = []
    for steps in (5, 25):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        ablation.train(script, [*flags, count, str(steps), "--fresh"], out)
        taken.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    return (taken[1] - taken[0]) / 20


def measure_costs(name, out):
    """{"teacher" or method: seconds of a step}, measured once and kept in `out`."""
    path, teacher = out / "costs.json", out / "cost-teacher"
    if not path.exists():
        common = ["--data", name, "--log-every", "5"]
        costs = dict(teacher=seconds_of_a_step(
            "facm.py", [*common, "--steps", "0"], "--pretrain", teacher))
        for method, (script, *flags) in METHODS.items():
            flags = [*common, *flags, *teacher_flags(method, teacher)]
            costs[method] = seconds_of_a_step(script, flags, "--steps", out / f"cost-{method}")
        path.write_text(json.dumps(costs))
    return json.loads(path.read_text())


def teacher_flags(method, folder):
    """The flags for a teacher in this folder."""
    return [] if method == "GCM" else ["--teacher", str(folder / "ckpt.pt")]


def main():
    p = Parser(description="Five methods, one network, equal seconds of training.")
    p.add_argument("data", choices=["glyphs", "mnist"], help="the data set")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training")
    p.add_argument("--teacher-seconds", type=float, default=150, help="of the flow matching")
    p.add_argument("--seconds", type=float, default=300, help="of each method, after the teacher")
    p.add_argument("--n", type=int, default=1000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    p.add_argument("--picture", type=pathlib.Path, help="draw samples into this PNG")
    args = p.parse_args()
    folders.check_output(args.json)
    folders.check_output(args.picture)
    if args.n < 100 or args.jobs < 1 or min(args.seconds, args.teacher_seconds) <= 0:
        fail("--n must be at least 100, --jobs at least 1, the seconds above 0")
    out = pathlib.Path("runs/bakeoff") / args.data
    out.mkdir(parents=True, exist_ok=True)
    cost = measure_costs(args.data, out)
    total = {"teacher": args.teacher_seconds} | dict.fromkeys(METHODS, args.seconds)
    total["GCM"] += args.teacher_seconds
    steps = {name: max(1, round(total[name] / cost[name])) for name in cost}

    # Train: the teachers, then the methods
    def folder(name, seed):
        return out / f"{name}-{steps[name]}-seed{seed}"

    def train(name, seed):
        begun, (script, *flags) = time.time(), METHODS.get(name, ("facm.py",))
        flags += ["--data", args.data, "--seed", str(seed), "--log-every", "100"]
        if name == "teacher":
            flags += ["--pretrain", str(steps[name]), "--steps", "0"]
        else:
            flags += ["--steps", str(steps[name]), *teacher_flags(name, folder("teacher", seed))]
        finished = ablation.train(script, flags, folder(name, seed))
        print(f"{name}, seed {seed}: {steps[name]} steps, {time.time() - begun:.0f} s of the clock, "
              f"{'finished' if finished else 'diverged'}", file=sys.stderr, flush=True)
        return finished

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: train("teacher", seed), args.seeds))
        pairs = [(name, seed) for seed in args.seeds for name in METHODS]
        finished = dict(zip(pairs, pool.map(lambda pair: train(*pair), pairs)))

    # Judge
    torch.set_num_threads(args.jobs)
    size = dict(glyphs=16, mnist=28)[args.data]
    classifier, labels = quickstart.load_classifier(args.data, size), torch.arange(args.n) % 10
    _, *reference = quickstart.judge(classifier, *quickstart.real_images(args.data, size, "reference"))
    rows, shown, images_seen = {}, {}, {}
    for seed in args.seeds:
        for name in ["teacher", *METHODS]:
            if not finished.get((name, seed), True):
                rows.setdefault(name, []).append(None)
                continue
            net, checkpoint = sample.load(folder(name, seed) / "ckpt.pt")
            options = checkpoint["args"]
            images_seen[name] = steps[name] * options[
                "pretrain_batch" if name == "teacher" else "batch"]
            guided = dict(sampler="euler", cfg=options["w"])
            choices = {f"NFE {nfe}": (nfe, {}) for nfe in COLUMNS} if name != "teacher" else {
                "Euler 1": (1, guided), "Euler 20": (20, guided)}
            figures = {}
            for column, (nfe, choice) in choices.items():
                images = sample.draw(net, checkpoint, nfe, labels, **choice)
                share, distance = quickstart.measure(classifier, images, labels, reference)
                figures[column] = dict(recognised=share, distance=distance)
                if seed == args.seeds[0]:
                    shown[f"{name}\n{column}"] = images[:10]
            rows.setdefault(name, []).append(figures)
    real = quickstart.real_images(args.data, size, "test", args.n)
    share, distance = quickstart.measure(
        classifier, real[0][:args.n], real[1][:args.n], reference)

    # Print: a table a column of NFE has one number a cell
    print(f"{args.data}, {args.n} samples, seeds {args.seeds}; other real digits: {share:.1%} "
          f"recognised, distance {distance:.2f}\n")
    columns = ["Euler 1", "Euler 20", *(f"NFE {nfe}" for nfe in COLUMNS)]
    for key, form in (("distance", "{:.2f}"), ("recognised", "{:.1%}")):
        print(f"{key}, mean ± standard deviation over the seeds\n")
        print("| method | images seen | CPU seconds | " + " | ".join(columns) + " |\n"
              + "|---" * (3 + len(columns)) + "|")
        for name, found in rows.items():
            cells = []
            for column in columns:
                values = [one[column][key] for one in found if one and column in one]
                spread = len(values) > 1 and " ± " + form.format(statistics.stdev(values))
                cells.append(form.format(statistics.mean(values)) + (spread or "") if values else "")
            failed = sum(one is None for one in found)
            label = name + (f" ({failed} of {len(found)} diverged)" if failed else "")
            print(f"| {label} | {images_seen.get(name, 0):,} | {total[name]:.0f} | "
                  + " | ".join(cells) + " |")
        print()
    if args.picture:
        data.save_grid(args.picture, torch.cat([torch.as_tensor(i) for i in shown.values()]), 10,
                       scale=2, labels=list(shown))
    if args.json:
        args.json.write_text(json.dumps(dict(
            data=args.data, seeds=args.seeds, n=args.n, seconds=total, seconds_of_a_step=cost,
            steps=steps, images_seen=images_seen, figures=rows,
            real=dict(recognised=share, distance=distance),
            **quickstart.provenance()), indent=2) + "\n")


if __name__ == "__main__":
    main()
