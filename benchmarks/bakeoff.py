"""Eleven runs of few-step methods: one network, equal seconds of training, one measure.

    python benchmarks/bakeoff.py glyphs
    python benchmarks/bakeoff.py mnist --seconds 180
    python benchmarks/bakeoff.py glyphs --methods FACM iMF --seeds 0

For each seed, flow.py trains a teacher with its preset. The methods that distil it then train for
--seconds each. GCM and iMF train from scratch, for as long as the teacher and a student together.
The options are those of each script's preset for this data, and all runs have the same network. sCM
with pixel normalisation has a separate teacher, which has pixel normalisation as well.

Seconds are CPU time of one thread. First, each method runs for 5 and for 45 steps. The difference
gives the cost of a step, and so the number of steps of its runs. Runs are kept in runs/bakeoff, and
the same command resumes a table that was interrupted. The figures are those of quickstart.py. The
picture shows the runs of the first seed, with the same noise in each row.
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
import gcm
import sample
from common import folders
from common.flags import Parser
from common.messages import fail

PIXELNORM = ["--net", "pixelnorm=True"]
FREEFLOW = ["--objectives", "n2n", "--freq", "1", "--lam", "1", "--gam", "0", "--r-max", "0"]
SCRIPTS = {                                # {run: its script and its flags}
    "teacher": ["flow.py"],
    "teacher (pixelnorm)": ["flow.py", *PIXELNORM],
    "FACM": ["facm.py"],
    "DE-CM": ["decm.py"],
    "GCM": ["gcm.py"],
    "GCM from the teacher": ["gcm.py"],
    "sCM": ["baselines.py", "--objective", "scm"],
    "sCM (pixelnorm)": ["baselines.py", "--objective", "scm"],
    "MeanFlow": ["baselines.py", "--objective", "meanflow"],
    "AYF": ["baselines.py", "--objective", "ayf"],
    "AlphaFlow": ["baselines.py", "--objective", "alphaflow"],
    "FreeFlow's predictor": ["decm.py", *FREEFLOW],
    "iMF": ["baselines.py", "--objective", "imf", "--teacher", "none"],
}
TEACHERS = ["teacher", "teacher (pixelnorm)"]
METHODS = [name for name in SCRIPTS if name not in TEACHERS]
FROM_SCRATCH = ["GCM", "iMF"]
TEACHER_COLUMNS = ["Euler 1", "Euler 2", "Euler 4", "Euler 20"]
COLUMNS = ["NFE 1", "NFE 2", "NFE 4"]
SHOWN = ["Euler 1", "Euler 20", "NFE 1", "NFE 2"]      # the columns of the picture
SIZES = dict(glyphs=16, mnist=28)


def teacher_of(name):
    """The name of the run that a method distils; None if it trains from scratch."""
    if name in TEACHERS or name in FROM_SCRATCH:
        return None
    return "teacher (pixelnorm)" if name == "sCM (pixelnorm)" else "teacher"


def teacher_flags(name, data_name, path):
    """The flags with which a method starts from the teacher's checkpoint."""
    if teacher_of(name) is None:
        return []
    if name == "GCM from the teacher":
        return ["--preset", f"{data_name}_finetune", "--init", str(path)]
    return ["--teacher", str(path)]


def curriculum(preset, steps):
    """The curriculum of a run of gcm.py with so many steps: the same share of them as in this
    preset."""
    preset = gcm.PRESETS[preset]
    return max(1, round(preset["curriculum"] / preset["steps"] * steps))


# --------------------------------------------------------------------------------------------------
# The time of a step, and training.

def seconds_of_a_step(name, flags, folder):
    """The CPU seconds of one step, from runs in a temporary folder."""
    script, *more = SCRIPTS[name]
    seconds = {}
    for steps in (5, 45):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        ablation.train(script, [*more, *flags, "--steps", str(steps)], folder / f"{name}-{steps}")
        seconds[steps] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return (seconds[45] - seconds[5]) / 40


def measure_costs(data_name, out):
    """{run: seconds of a step}, measured once and kept in the folder `out`."""
    path = out / "costs.json"
    if path.exists():
        return json.loads(path.read_text())
    costs = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name in SCRIPTS:
            flags = ["--data", data_name, "--log-every", "5"]
            if teacher_of(name):
                checkpoint = folder / f"{teacher_of(name)}-5" / "ckpt.pt"
                flags += teacher_flags(name, data_name, checkpoint)
            costs[name] = seconds_of_a_step(name, flags, folder)
            print(f"{name}: {costs[name]:.3f} s a step", file=sys.stderr, flush=True)
    path.write_text(json.dumps(costs, indent=2) + "\n")
    return costs


class Runs:
    """The runs of a bake-off: the seconds, the steps and the folder of each."""

    def __init__(self, args, out):
        self.data, self.out = args.data, out
        self.costs = measure_costs(args.data, out)
        self.steps, self.seconds = {}, {}
        for name in SCRIPTS:
            if name in TEACHERS:
                self.steps[name] = args.teacher_steps
                self.seconds[name] = args.teacher_steps * self.costs[name]
                continue
            self.seconds[name] = args.seconds
            if name in FROM_SCRATCH:
                self.seconds[name] += self.seconds["teacher"]
            self.steps[name] = max(1, round(self.seconds[name] / self.costs[name]))

    def folder(self, name, seed):
        """The run folder."""
        words = "".join(c if c.isalnum() or c in "-" else " " for c in name).split()
        return self.out / f"{'-'.join(words)}-{self.steps[name]}-seed{seed}"

    def train(self, name, seed):
        """Trains a run. Returns False if it ended because loss or gradient were not finite."""
        begun = time.time()
        script, *flags = SCRIPTS[name]
        flags = [*flags, "--data", self.data, "--seed", str(seed), "--log-every", "100",
                 "--steps", str(self.steps[name])]
        if teacher_of(name):
            checkpoint = self.folder(teacher_of(name), seed) / "ckpt.pt"
            flags += teacher_flags(name, self.data, checkpoint)
        if script == "gcm.py":
            preset = f"{self.data}_finetune" if teacher_of(name) else self.data
            flags += ["--curriculum", str(curriculum(preset, self.steps[name]))]
        finished = ablation.train(script, flags, self.folder(name, seed))
        print(f"{name}, seed {seed}: {self.steps[name]} steps in {time.time() - begun:.0f} s, "
              f"{'finished' if finished else 'diverged'}", file=sys.stderr, flush=True)
        return finished


# --------------------------------------------------------------------------------------------------
# Samples and their figures.

def choices_of(name, data_name):
    """{column: (NFE, options of sample.draw)} for a run."""
    if name not in TEACHERS:
        return {"NFE 1": (1, {}), "NFE 2": (2, {}), "NFE 4": (4, {})}
    preset = facm.PRESETS[data_name]       # the guidance that its students follow
    guided = dict(sampler="euler", cfg=preset["w"], cfg_interval=(preset["t_low"], 1.0))
    return {f"Euler {nfe}": (nfe, guided) for nfe in (1, 2, 4, 20)}


def judge_all(args, runs, finished):
    """Measures all runs. Returns {run: [{column: figures} for each seed, or None if it diverged]},
    the samples {label: images} of the first seed for the picture, and the figures of real images.
    """
    size, labels = SIZES[args.data], torch.arange(args.n) % 10
    classifier = quickstart.load_classifier(args.data, size)
    reference = quickstart.reference_of(classifier, args.data, size)
    rows, shown = {name: [] for name in runs.chosen}, {}
    for seed in args.seeds:
        for name in runs.chosen:
            if not finished[name, seed]:
                rows[name].append(None)
                continue
            folder = runs.folder(name, seed)
            net, checkpoint = sample.load(folder / "ckpt.pt")
            kept = folder / f"figures-{args.n}.json"
            figures = json.loads(kept.read_text()) if kept.exists() else {}
            for column, (nfe, options) in choices_of(name, args.data).items():
                shows = args.picture and seed == args.seeds[0] and column in SHOWN
                if column not in figures or shows:
                    images = sample.draw(net, checkpoint, nfe, labels, **options)
                    share, distance = quickstart.measure(classifier, images, labels, reference)
                    figures[column] = dict(recognised=share, distance=distance)
                if shows:
                    shown[f"{name}\n{column}"] = images[:10]
            kept.write_text(json.dumps(figures))
            rows[name].append(figures)
    real, real_labels = quickstart.real_images(args.data, size, "test", args.n)
    share, distance = quickstart.measure(classifier, real[:args.n], real_labels[:args.n], reference)
    return rows, shown, dict(recognised=share, distance=distance)


def cell(values, form):
    """The text of a cell: the mean and, for several values, their standard deviation."""
    if not values:
        return ""
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        text += " ± " + form.format(statistics.stdev(values))
    return text


def print_table(key, form, rows, columns, seconds, images_seen):
    """Prints a table of one figure, "distance" or "recognised"."""
    print(f"{key}, mean ± standard deviation over the seeds\n")
    heads = ["run", "images seen", "CPU seconds", *columns]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name, found in rows.items():
        label = name
        failed = found.count(None)
        if failed:
            label += f" ({failed} of {len(found)} diverged)"
        cells = [label, f"{images_seen[name]:,}", f"{seconds[name]:.0f}"]
        for column in columns:
            values = [one[column][key] for one in found if one is not None and column in one]
            cells.append(cell(values, form))
        print("| " + " | ".join(cells) + " |")
    print()


def main():
    p = Parser(description="Few-step methods: one network, equal seconds of training, one measure.")
    p.add_argument("data", choices=list(SIZES), help="the data set")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                   help="methods to run, of " + ", ".join(METHODS) + " (default: all)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training")
    p.add_argument("--teacher-steps", type=int, default=2000, help="steps of the teachers")
    p.add_argument("--seconds", type=float, default=100, help="seconds of training for each method")
    p.add_argument("--n", type=int, default=1000, help="samples for each figure")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    p.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    p.add_argument("--picture", type=pathlib.Path, help="draw samples into this PNG")
    args = p.parse_args()
    folders.check_output(args.json)
    folders.check_output(args.picture)
    if args.n < 100 or args.jobs < 1 or args.teacher_steps < 1 or args.seconds <= 0:
        fail("--n must be at least 100, --jobs and --teacher-steps at least 1, --seconds above 0")
    out = pathlib.Path("runs/bakeoff") / args.data
    out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args, out)
    teachers = {teacher_of(name) for name in args.methods} | {"teacher"}
    runs.chosen = [name for name in SCRIPTS if name in teachers or name in args.methods]

    # Train: the teachers, then the methods, seed by seed
    finished = {}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for names in (TEACHERS, METHODS):
            waiting = {}
            for seed in args.seeds:
                for name in names:
                    if name in runs.chosen:
                        waiting[name, seed] = pool.submit(runs.train, name, seed)
            for pair, job in waiting.items():
                finished[pair] = job.result()

    # Measure
    torch.set_num_threads(args.jobs)
    rows, shown, real = judge_all(args, runs, finished)
    images_seen = {}
    for name in runs.chosen:
        images_seen[name] = 0
        if finished[name, args.seeds[0]]:
            checkpoint = sample.load(runs.folder(name, args.seeds[0]) / "ckpt.pt")[1]
            images_seen[name] = runs.steps[name] * checkpoint["args"]["batch"]

    print(f"{args.data}, {args.n} samples, seeds {args.seeds}; as many real digits: "
          f"{real['recognised']:.1%} recognised, distance {real['distance']:.2f}\n")
    parts = [({name: rows[name] for name in runs.chosen if name in TEACHERS}, TEACHER_COLUMNS),
             ({name: rows[name] for name in runs.chosen if name in METHODS}, COLUMNS)]
    for key, form in (("distance", "{:.2f}"), ("recognised", "{:.1%}")):
        for part, columns in parts:
            print_table(key, form, part, columns, runs.seconds, images_seen)
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
