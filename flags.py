"""Flags: those that all training scripts have, and how a preset's row fills them in.

A flag's bounds, and whether it may change when its run is resumed, stand beside the flag. What is
wrong with a command line is told in one line, with exit code 2.
"""

import argparse
import ast
import math
import os
import pathlib
import sys

LARGE = 1e15
# What may change when a run is resumed: flags, which `flag` adds, and the names of the classes,
# which data.load_for keeps beside them and which set nothing.
MAY_CHANGE = {"class_names"}


def fail(message, always=False):
    """Ends the program because of a user's mistake: one line on stderr and exit code 2. One process
    of each machine prints the line; with `always` each does."""
    if always or os.environ.get("LOCAL_RANK", "0") == "0":
        print("\n" * always + f"error: {message}", file=sys.stderr)    # below another one's bar
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message):
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(":", "", 1)
        fail(f"{message} (see --help)")


def number(kind, low=-LARGE, high=LARGE):
    """A type for argparse: int or float within bounds."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: want {kind.__name__}") from None
        if not low <= value <= high:                                   # or NaN
            least, most = f", at least {low:g}", f", at most {high:g}"
            raise argparse.ArgumentTypeError(
                f"{value}: want a finite number" + least * (low > -LARGE) + most * (high < LARGE))
        return value
    return parse


def flag(group, name, kind=None, low=-LARGE, high=LARGE, resume=False, **options):
    """Adds a flag to a group of a parser. kind: None, or int or float with bounds; resume: it may
    change when a run is resumed."""
    if resume:
        MAY_CHANGE.add(name.lstrip("-").replace("-", "_"))
    group.add_argument(name, **options, **(dict(type=number(kind, low, high)) if kind else {}))


def add_flags(parser, presets, two_stages=True):
    """Adds the flags that all training scripts have. two_stages: also those of a teacher,
    which is given or trained first."""
    switch = argparse.BooleanOptionalAction

    g = parser.add_argument_group("run")
    flag(g, "--out", resume=True, help="run folder; the same command resumes the run in it "
         "(default: runs/SCRIPT-DATA)")
    flag(g, "--fresh", action="store_true", resume=True, help="start over; the old run is renamed, "
         "never deleted")
    flag(g, "--preset", choices=list(presets), help="row of hyper-parameters (default: the data's)")
    flag(g, "--steps", int, 0, resume=True, help="steps of the method")
    flag(g, "--seed", int, 0, default=0, help="everything random follows from it")
    flag(g, "--dry-run", int, 1, resume=True, nargs="?", const=1, metavar="PROCESSES",
         help="say what the run will take, with so many processes, and end")
    flag(g, "--device", resume=True, help="cpu, cuda, cuda:N or mps (default: cuda if there is "
         "one)")
    flag(g, "--batch", int, 1, help="images a step, over all processes")
    flag(g, "--micro-batch", int, 1, resume=True, help="the most images that a process takes "
         "through the network at once; fewer need less memory (default: the preset's, or all)")
    flag(g, "--precision", choices=["float32", "tf32", "bf16"], help="precision of "
         "matrix products and convolutions; times stay float32")
    flag(g, "--compile", action="store_true", help="torch.compile the network and the derivative")
    flag(g, "--fsdp", action="store_true", resume=True, help="shard networks and optimiser over "
         "the processes")
    flag(g, "--grad-checkpoint", action="store_true", resume=True, help="compute blocks anew in "
         "the backward pass: less memory")
    flag(g, "--save-every", int, 1, resume=True, default=200, help="steps between checkpoints")
    flag(g, "--log-every", int, 1, resume=True, default=20, help="steps between lines of log.jsonl")
    flag(g, "--preview-every", int, 1, resume=True, default=200, help="steps between preview grids")

    g = parser.add_argument_group("data")
    flag(g, "--data", resume=True, default="glyphs", help="glyphs, mnist, fashion, cifar10, "
         "imagenet_latents, or a path")
    flag(g, "--data-dir", resume=True, help="folder of mnist, fashion, cifar10 (default: data) or "
         "imagenet_latents (default: data/imagenet_latents)")
    flag(g, "--resolution", int, 1, help="height and width; images are cropped and scaled to it")
    flag(g, "--num-classes", int, 1, help="number of classes (default: the data's)")
    flag(g, "--uncond", action=switch, help="leave labels out")
    flag(g, "--xflip", action=switch, help="mirror half of the images (never glyphs)")
    flag(g, "--channels", type=int, choices=[1, 3], help="channels of image files: 3 is RGB, "
         "the default, and 1 is grey")
    flag(g, "--skip-broken", action="store_true", resume=True, help="list and leave out images "
         "that do not decode")

    g = parser.add_argument_group("network")
    flag(g, "--net", nargs="+", default=[], metavar="K=V", help="network options, such as width=64 "
         "dropout=0.1")
    flag(g, "--weights", metavar="KEY", help="key of the weights in a public file that the network "
         "begins with (default: an average of them, or the model)")

    g = parser.add_argument_group("optimiser")
    flag(g, "--optimizer", choices=["AdamW", "RAdam"], help="optimiser")
    flag(g, "--lr", float, 0, help="learning rate")
    flag(g, "--betas", float, 0, 1, nargs=2, help="beta_1 and beta_2 of the optimiser")
    flag(g, "--weight-decay", float, 0, default=0.0, help="weight decay of the optimiser")
    flag(g, "--warmup", int, 0, help="steps in which the learning rate rises, in each stage")
    flag(g, "--lr-final", float, 0, 1, help="share of --lr that the rate falls to, linearly; 1 "
         "means that it stays")
    flag(g, "--lr-decay", int, 1, help="steps of a stage after which the rate falls as the inverse "
         "square root of the step")
    flag(g, "--clip", float, 1e-9, math.inf, default=1.0, help="largest norm of the gradient")
    flag(g, "--ema-sigma", float, 0.001, 0.28, help="relative width sigma_rel of the EMA")
    flag(g, "--ema-beta", float, 0, 1, help="constant rate of the EMA, in place of --ema-sigma; 0 "
         "means --ema-sigma")
    flag(g, "--label-drop", float, 0, 1, default=0.1, help="share of null labels where the network "
         "learns its own guidance")
    if not two_stages:
        parser.set_defaults(pretrain=0, pretrain_batch=None, teacher=None)
        return
    g = parser.add_argument_group("teacher")
    flag(g, "--teacher", help="checkpoint to distil, in place of --pretrain; neither: from scratch")
    flag(g, "--pretrain", int, 0, help="steps of flow matching first")
    flag(g, "--pretrain-lr", float, 0, help="learning rate of the pretraining (default: the "
         "preset's, or else --lr)")
    flag(g, "--pretrain-batch", int, 1, help="images in a step of the pretraining (default: "
         "--batch)")
    flag(g, "--pretrain-P", float, nargs=2, help="--P-mean and --P-std of the pretraining "
         "(default: those of the method)")


def parse_net_options(items):
    """{"width": 64, ...} from the words of --net, such as width=64 mult=1,2,2."""
    def literal(text):                     # a number, tuple, ... as Python writes it, or the text
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    try:
        return {k: literal(v) for k, v in (item.split("=") for item in items)}
    except ValueError:
        fail(f"--net {' '.join(items)}: want KEY=VALUE, as in width=64 mult=1,2,2")


def parse(parser, method, presets):
    """The flags of a training script; the preset's row fills in those that were not given."""
    args = parser.parse_args()
    args.preset = args.preset or dict(fashion="mnist").get(args.data, args.data)
    if args.preset not in presets and pathlib.Path(args.data).exists():
        fail(f"--data {args.data} needs --preset: {', '.join(presets)}")
    if args.preset not in presets:
        fail(f"--data {args.data}: no such file or folder, nor one of {', '.join(presets)}")
    row = presets[args.preset]
    row = dict(pretrain_batch=row["batch"], optimizer="AdamW", precision="float32") | row
    given = parse_net_options(args.net)
    net = row.pop("net")                   # its options are those of its network alone
    args.net = given if given.get("name", net["name"]) != net["name"] else net | given
    if args.pretrain_batch is None:
        args.pretrain_batch = args.batch   # one given for both
    for name, value in row.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{method}-{pathlib.Path(args.data).stem}"
    if args.data == "imagenet_latents":
        args.data_dir = args.data_dir or "data/imagenet_latents"
    args.pretrain = 0 if args.teacher else args.pretrain
    processes = args.dry_run or int(os.environ.get("WORLD_SIZE", 1))
    for name, batch in (("batch", args.batch), ("pretrain-batch", args.pretrain_batch)):
        if batch % processes:
            fail(f"--{name} {batch} is no multiple of {processes}, the number of processes")
    if args.fsdp and "WORLD_SIZE" not in os.environ and not args.dry_run:
        fail("--fsdp shards over processes: start them by torchrun --nproc_per_node=N")
    if args.fsdp and args.jvp == "exact":
        fail("--fsdp: torch.func.jvp does not see sharded parameters; take another --jvp")
    if args.steps + args.pretrain == 0:
        fail("--steps and --pretrain: not both 0")
    return args
