"""Flags: those that all training scripts have, and how a preset fills them in.

The bounds of a flag, and whether it may change when a run is resumed, are defined with the flag.
Errors in a command line are printed in one line, with exit code 2.
"""

import argparse
import ast
import importlib.util
import math
import pathlib

from common import torchrun
from common.messages import fail

LARGE = 1e15
# The entries that may change when a run is resumed: the flags that are added with resume=True, the
# path of the teacher, whose content is compared instead, and the records of which flags were given.
MAY_CHANGE = {"class_names", "given", "net_given", "teacher"}


class Help(argparse.HelpFormatter):
    """Adds the default of a flag to its help text, unless the text already has it."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        if "default" in action.help:
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """An argparse parser that prints errors in one line, and defaults in the help."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def error(self, message):
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(":", "", 1)
        fail(f"{message} (see --help)")


def number(kind, low=-LARGE, high=LARGE):
    """A type for argparse: an int or float within bounds."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: expected {kind.__name__}") from None
        if not low <= value <= high:                                   # or NaN
            message = f"{value}: expected a finite number"
            if low > -LARGE:
                message += f", at least {low:g}"
            if high < LARGE:
                message += f", at most {high:g}"
            raise argparse.ArgumentTypeError(message)
        return value
    return parse


def flag(group, name, kind=None, low=-LARGE, high=LARGE, resume=False, **options):
    """Adds a flag to a group of a parser.

    kind: int or float, with bounds, or None if `options` define the type. resume: whether the flag
    may change when a run is resumed.
    """
    if resume:
        MAY_CHANGE.add(name.lstrip("-").replace("-", "_"))
    if kind:
        options["type"] = number(kind, low, high)
    group.add_argument(name, **options)


def add_flags(parser, presets, teacher=False):
    """Adds the flags that all training scripts have. teacher: also add --teacher."""
    g = parser.add_argument_group("run")
    flag(g, "--out", resume=True, help="run folder; the same command resumes the run in it "
         "(default: runs/SCRIPT-DATA)")
    flag(g, "--fresh", action="store_true", resume=True, help="start over; the old run is renamed, "
         "never deleted")
    flag(g, "--preset", choices=list(presets), help="name of a set of "
         "hyper-parameters, which are the defaults of other flags (default: that of --data)")
    flag(g, "--steps", int, 1, resume=True, help="training steps")
    flag(g, "--seed", int, 0, default=0, help="seed of the weights, noise, times "
         "and the order of the data; glyphs and the default teacher always have the seed 0")
    flag(g, "--dry-run", int, 1, resume=True, nargs="?", const=1, metavar="PROCESSES",
         help="print what the run needs with this number of processes, and exit")
    flag(g, "--device", resume=True, help="cpu, cuda, cuda:N or mps (default: cuda if there is "
         "one)")
    flag(g, "--batch", int, 1, help="images in each step, over all processes")
    flag(g, "--micro-batch", int, 1, resume=True, help="the largest number of images in one pass "
         "of a process; smaller ones need less memory (default: the preset's, or all)")
    flag(g, "--precision", choices=["float32", "tf32", "bf16"], help="precision of "
         "matrix products and convolutions; times are always float32")
    flag(g, "--compile", action="store_true", help="torch.compile the network and the derivative")
    flag(g, "--fsdp", action="store_true", resume=True, help="shard networks and optimiser across "
         "the processes")
    flag(g, "--grad-checkpoint", action="store_true", resume=True, help="recompute blocks in "
         "the backward pass, which needs less memory")
    flag(g, "--save-every", int, 1, resume=True, help="steps between checkpoints (default: the "
         "preset's, or 200)")
    flag(g, "--keep-every", int, 1, resume=True, metavar="STEPS", help="steps between "
         "snapshots, which are kept and do not contain the optimiser (default: no snapshots)")
    flag(g, "--log-every", int, 1, resume=True, default=20, help="steps between lines of log.jsonl")
    flag(g, "--tensorboard", action="store_true", resume=True, help="also write the lines of "
         "log.jsonl for TensorBoard")
    flag(g, "--preview-every", int, 1, resume=True, default=200, help="steps between preview grids")

    g = parser.add_argument_group("evaluation")
    flag(g, "--vae", resume=True, metavar="FILE", help="checkpoint of the autoencoder that "
         "decodes latents to images, for previews and evaluations")
    flag(g, "--eval-every", int, 1, resume=True, metavar="STEPS", help="steps between "
         "measurements of the FID of the averaged network, for log.jsonl (default: none)")
    flag(g, "--ref", resume=True, help="reference of --eval-every, as for fid.py")
    flag(g, "--eval-n", int, 2, resume=True, default=5000, metavar="N", help="number of "
         "samples of --eval-every (default: 5000)")
    flag(g, "--eval-nfe", int, 1, resume=True, nargs="+", default=[1, 2], metavar="NFE",
         help="numbers of function evaluations of --eval-every (default: 1 2)")
    flag(g, "--features", resume=True, metavar="FILE", help="TorchScript network instead of "
         "Inception, as for fid.py; the file is executed")
    flag(g, "--inception", resume=True, metavar="FILE", help="Inception's weights, as for fid.py")

    g = parser.add_argument_group("data")
    flag(g, "--data", resume=True, default="glyphs", help="glyphs, mnist, fashion, cifar10, "
         "imagenet_latents, or a path")
    flag(g, "--data-dir", resume=True, help="folder of mnist, fashion, cifar10 (default: data) or "
         "imagenet_latents (default: data/imagenet_latents)")
    flag(g, "--resolution", int, 1, help="height and width; images are cropped and scaled to it")
    flag(g, "--num-classes", int, 1, help="number of classes (default: the data's)")
    flag(g, "--uncond", action=argparse.BooleanOptionalAction, help="train without labels")
    flag(g, "--xflip", action=argparse.BooleanOptionalAction, help="mirror half of the images "
         "(never glyphs)")
    flag(g, "--channels", type=int, choices=[1, 3], help="channels of image files: 3 is RGB, "
         "the default, and 1 is grey")
    flag(g, "--skip-broken", action="store_true", resume=True, help="list and leave out images "
         "that cannot be decoded")

    g = parser.add_argument_group("network")
    flag(g, "--net", nargs="+", default=[], metavar="K=V", help="network options, such as width=64 "
         "dropout=0.1")
    flag(g, "--weights", metavar="KEY", help="entry of a public file that contains the "
         "weights (default: the averaged weights if there are any, or the model)")
    if teacher:
        flag(g, "--teacher", metavar="FILE", help="run folder or checkpoint of the teacher, or "
             "none to train from scratch (default: runs/flow-DATA/ckpt.pt, which flow.py trains "
             "first if it is missing)")

    g = parser.add_argument_group("optimiser")
    flag(g, "--lr", float, 0, help="learning rate")
    flag(g, "--betas", float, 0, 1, nargs=2, help="beta_1 and beta_2 of the optimiser")
    flag(g, "--weight-decay", float, 0, default=0.0, help="weight decay of the optimiser")
    flag(g, "--warmup", int, 0, help="steps over which the learning rate rises")
    flag(g, "--lr-final", float, 0, 1, help="the learning rate falls linearly to LR_FINAL times "
         "--lr; 1: it is constant")
    flag(g, "--clip", float, 1e-9, math.inf, default=1.0, help="largest norm of the gradient")
    flag(g, "--ema-sigma", float, 0.001, 0.28, help="relative width sigma_rel of the EMA")


def parse_net_options(items):
    """{"width": 64, ...} from the arguments of --net, such as width=64 mult=1,2,2."""
    options = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or "=" in text:
            fail(f"--net {' '.join(items)}: expected KEY=VALUE, as in width=64 mult=1,2,2")
        try:
            options[key] = ast.literal_eval(text)      # a number, a tuple, ... of Python
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def parse(parser, method, presets, argv=None):
    """The flags of a training script; the preset fills in those that were not given.

    argv: the arguments of the command line (None: those of the program).
    """
    args = parse_words(parser, argv)
    return fill_in(args, method, choose_preset(args, presets))


def parse_words(parser, argv=None):
    """The flags of a command line. Their entry `given` lists those that it has, such as P-mean.
    Ends the program if the flags of the evaluations cannot be combined."""
    actions = [action for action in parser._actions if action.dest != "help"]
    blank = argparse.Namespace(**{action.dest: None for action in actions})
    args = parser.parse_args(argv, blank)
    args.given = []
    for action in actions:
        if getattr(args, action.dest) is None:
            setattr(args, action.dest, action.default)
        else:
            args.given.append(action.option_strings[0].removeprefix("--"))
    check_reports(args)
    return args


def check_effect(args, *rules):
    """Ends the program if a flag is given that has no effect with the others.

    rules: (names of flags in one string, whether they have an effect, what they need).
    """
    for names, has_effect, need in rules:
        for name in names.split():
            if name in args.given and not has_effect:
                fail(f"--{name} has no effect here: it needs {need}")


def check_reports(args):
    """Ends the program if the flags of the evaluations cannot be combined, or if TensorBoard is
    requested and is not installed."""
    check_effect(args, ("ref eval-n eval-nfe features inception", args.eval_every, "--eval-every"))
    if args.eval_every and not args.ref:
        fail("--eval-every needs --ref: statistics or images to compare the samples with")
    if args.features and args.inception:
        fail("--features replaces Inception; leave out --inception")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        fail("--tensorboard needs a package that is not installed: pip install tensorboard")


def choose_preset(args, presets):
    """The preset of these flags, a dict; ends the program if there is none."""
    args.preset = args.preset or dict(fashion="mnist").get(args.data, args.data)
    if args.preset not in presets and pathlib.Path(args.data).exists():
        fail(f"--data {args.data} needs --preset: {', '.join(presets)}")
    if args.preset not in presets:
        fail(f"--data {args.data}: there is no such file or folder, and it is not one of "
             f"{', '.join(presets)}")
    return presets[args.preset]


def fill_in(args, method, preset):
    """The flags with the preset's values where none was given."""
    for name, value in (dict(precision="float32", save_every=200) | preset).items():
        if name != "net" and getattr(args, name) is None:
            setattr(args, name, value)
    # The options in the preset belong to its network. Other networks start from their defaults
    args.net_given = parse_net_options(args.net)
    if args.net_given.get("name", preset["net"]["name"]) == preset["net"]["name"]:
        args.net = preset["net"] | args.net_given
    else:
        args.net = dict(args.net_given)
    args.out = args.out or f"runs/{method}-{pathlib.Path(args.data).stem}"
    if args.data == "imagenet_latents":
        args.data_dir = args.data_dir or "data/imagenet_latents"
    if args.fsdp and not torchrun.started() and not args.dry_run:
        fail("--fsdp shards over processes: start them by torchrun --nproc_per_node=N")
    if args.fsdp and getattr(args, "jvp", None) == "exact":
        fail("--fsdp: torch.func.jvp does not see sharded parameters; use another --jvp")
    return args
