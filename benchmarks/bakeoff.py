"""Five methods, one network, equal seconds of training: FACM, DE-CM, GCM, sCM and MeanFlow.

    python benchmarks/bakeoff.py glyphs
    python benchmarks/bakeoff.py mnist --seeds 0 --teacher-seconds 900 --seconds 600

FACM, DE-CM, sCM and MeanFlow distil one teacher a seed, a run of flow.py. GCM needs none and trains
from scratch, for the seconds of the teacher and of a student together. The options are those of
each script's preset for this data; the network is the same in all.

A second is one of CPU time of one thread. First each method runs 5 and 25 steps; the difference is
the cost of a step, and the steps of its runs follow from it. Runs are kept in runs/bakeoff, and the
same command resumes a table that was interrupted. The measure is that of quickstart.py. The picture
shows the runs of the first seed, with the same noise in each row.
"""

import concurrent.futures
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import ablation
import quickstart

import data
import facm
import sample
from common import folders
from common.flags import Parser
from common.messages import fail

SCRIPTS = {                                # {run: its script and its flags}
    "teacher": ["flow.py"],
    "FACM": ["facm.py"],
    "DE-CM": ["decm.py"],
    "GCM": ["gcm.py"],
    "sCM": ["baselines.py", "--objective", "scm"],
    "MeanFlow": ["baselines.py", "--objective", "meanflow"],
}
METHODS = [name for name in SCRIPTS if name != "teacher"]
COLUMNS = ["Euler 1", "Euler 20", "NFE 1", "NFE 2", "NFE 4"]
SIZES = dict(glyphs=16, mnist=28)


# --------------------------------------------------------------------------------------------------
# How long a step takes, and training.

def teacher_flags(name, teacher):
    """The flags that name the teacher, a run folder, for a method that has one."""
    if name in ("teacher", "GCM"):
        return []
    return ["--teacher", str(teacher / "ckpt.pt")]


def seconds_of_a_step(name, flags, folder):
    """The CPU seconds of one step, from runs in a folder that is not kept."""
    script, *more = SCRIPTS[name]
    seconds = {}
    for steps in (5, 25):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        ablation.train(script, [*more, *flags, "--steps", str(steps)], folder / f"{name}-{steps}")
        seconds[steps] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return (seconds[25] - seconds[5]) / 20


def measure_costs(data_name, out):
    """{run: seconds of a step}, measured once and kept in the folder `out`."""
    path = out / "costs.json"
    if path.exists():
        return json.loads(path.read_text())
    flags = ["--data", data_name, "--log-every", "5"]
    costs = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name in SCRIPTS:
            teacher = teacher_flags(name, folder / "teacher-5")
            costs[name] = seconds_of_a_step(name, [*flags, *teacher], folder)
            print(f"{name}: {costs[name]:.3f} s a step", file=sys.stderr, flush=True)
    path.write_text(json.dumps(costs, indent=2) + "\n")
    return costs


class Runs:
    """The runs of a bake-off: how many seconds and steps each has, and where it is kept."""

    def __init__(self, args, out):
        self.data, self.out = args.data, out
        self.costs = measure_costs(args.data, out)
        self.seconds = {name: args.seconds for name in SCRIPTS}
        self.seconds["teacher"] = args.teacher_seconds
        self.seconds["GCM"] = args.teacher_seconds + args.seconds
        self.steps = {}
        for name in SCRIPTS:
            self.steps[name] = max(1, round(self.seconds[name] / self.costs[name]))

    def folder(self, name, seed):
        """The run folder."""
        return self.out / f"{name}-{self.steps[name]}-seed{seed}"

    def train(self, name, seed):
        """Trains a run. Returns whether it finished; else loss or gradient were not finite."""
        begun = time.time()
        script, *flags = SCRIPTS[name]
        flags += ["--data", self.data, "--seed", str(seed), "--log-every", "100",
                  "--steps", str(self.steps[name])]
        flags += teacher_flags(name, self.folder("teacher", seed))
        finished = ablation.train(script, flags, self.folder(name, seed))
        print(f"{name}, seed {seed}: {self.steps[name]} steps in {time.time() - begun:.0f} s, "
              f"{'finished' if finished else 'diverged'}", file=sys.stderr, flush=True)
        return finished


# --------------------------------------------------------------------------------------------------
# Samples and figures.

def choices_of(name, data_name):
    """{column: (NFE, options of sample.draw)} of a run."""
    if name != "teacher":
        return {"NFE 1": (1, {}), "NFE 2": (2, {}), "NFE 4": (4, {})}
    preset = facm.PRESETS[data_name]       # the guidance that its students follow
    guided = dict(sampler="euler", cfg=preset["w"], cfg_interval=(preset["t_low"], 1.0))
    return {"Euler 1": (1, guided), "Euler 20": (20, guided)}


def judge_all(args, runs, finished):
    """{run: [for each seed {column: figures}, or None if it diverged]}, the samples of the first
    seed for the picture {label: images}, and the figures of real images."""
    size, labels = SIZES[args.data], torch.arange(args.n) % 10
    classifier = quickstart.load_classifier(args.data, size)
    reference = quickstart.reference_of(classifier, args.data, size)
    rows, shown = {name: [] for name in SCRIPTS}, {}
    for seed in args.seeds:
        for name in SCRIPTS:
            if not finished[name, seed]:
                rows[name].append(None)
                continue
            net, checkpoint = sample.load(runs.folder(name, seed) / "ckpt.pt")
            figures = {}
            for column, (nfe, options) in choices_of(name, args.data).items():
                images = sample.draw(net, checkpoint, nfe, labels, **options)
                share, distance = quickstart.measure(classifier, images, labels, reference)
                figures[column] = dict(recognised=share, distance=distance)
                if seed == args.seeds[0]:
                    shown[f"{name}\n{column}"] = images[:10]
            rows[name].append(figures)
    real, real_labels = quickstart.real_images(args.data, size, "test", args.n)
    share, distance = quickstart.measure(classifier, real[:args.n], real_labels[:args.n], reference)
    return rows, shown, dict(recognised=share, distance=distance)


def cell(values, form):
    """The mean of a cell and, of several values, their standard deviation as text."""
    if not values:
        return ""
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        text += " ± " + form.format(statistics.stdev(values))
    return text


def print_table(key, form, rows, seconds, images_seen):
    """Prints a table of one figure, "distance" or "recognised"."""
    print(f"{key}, mean ± standard deviation over the seeds\n")
    heads = ["method", "images seen", "CPU seconds", *COLUMNS]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name, found in rows.items():
        label = name
        failed = found.count(None)
        if failed:
            label += f" ({failed} of {len(found)} diverged)"
        cells = [label, f"{images_seen[name]:,}", f"{seconds[name]:.0f}"]
        for column in COLUMNS:
            values = [one[column][key] for one in found if one is not None and column in one]
            cells.append(cell(values, form))
        print("| " + " | ".join(cells) + " |")
    print()


def main():
    p = Parser(description="Five methods, one network, equal seconds of training.")
    p.add_argument("data", choices=list(SIZES), help="the data set")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training")
    p.add_argument("--teacher-seconds", type=float, default=150, help="of the flow matching")
    p.add_argument("--seconds", type=float, default=300, help="of each method, after the teacher")
    p.add_argument("--n", type=int, default=1000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--json", type=pathlib.Path, help="write the figures to this file as well")
    p.add_argument("--picture", type=pathlib.Path, help="draw samples into this PNG")
    args = p.parse_args()
    folders.check_output(args.json)
    folders.check_output(args.picture)
    if args.n < 100 or args.jobs < 1 or min(args.seconds, args.teacher_seconds) <= 0:
        fail("--n must be at least 100, --jobs at least 1, the seconds above 0")
    out = pathlib.Path("runs/bakeoff") / args.data
    out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args, out)

    # Train: the teachers, then the methods
    finished = {}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for names in (["teacher"], METHODS):
            waiting = {}
            for seed in args.seeds:
                for name in names:
                    waiting[name, seed] = pool.submit(runs.train, name, seed)
            for pair, job in waiting.items():
                finished[pair] = job.result()

    # Judge
    torch.set_num_threads(args.jobs)
    rows, shown, real = judge_all(args, runs, finished)
    images_seen = {}
    for name, steps in runs.steps.items():
        images_seen[name] = 0
        if finished[name, args.seeds[0]]:
            checkpoint = sample.load(runs.folder(name, args.seeds[0]) / "ckpt.pt")[1]
            images_seen[name] = steps * checkpoint["args"]["batch"]

    print(f"{args.data}, {args.n} samples, seeds {args.seeds}; as many real digits: "
          f"{real['recognised']:.1%} recognised, distance {real['distance']:.2f}\n")
    print_table("distance", "{:.2f}", rows, runs.seconds, images_seen)
    print_table("recognised", "{:.1%}", rows, runs.seconds, images_seen)
    if args.picture:
        images = torch.cat([torch.as_tensor(row) for row in shown.values()])
        data.save_grid(args.picture, images, 10, scale=2, labels=list(shown))
    if args.json:
        text = json.dumps(dict(
            data=args.data, seeds=args.seeds, n=args.n, seconds=runs.seconds,
            seconds_of_a_step=runs.costs, steps=runs.steps, images_seen=images_seen, figures=rows,
            real=real, **quickstart.provenance()), indent=2)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
