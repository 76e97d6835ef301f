"""The teacher of a student's run: a checkpoint of flow.py, or a public one.

If --teacher is not given, it is the checkpoint in runs/flow-DATA, which is trained first, in the
same processes, if it is missing or not finished.
"""

import argparse
import pathlib

import data
import flow
import models
from common import checkpoints, processes, weights
from common.messages import say_once
from common.run import Run

# The flags that a student's run shares with the run of its default teacher
SHARED = ("data", "data_dir", "resolution", "num_classes", "uncond", "xflip", "channels",
          "skip_broken", "net", "net_given")
MACHINE = ("device", "micro_batch", "precision", "compile", "fsdp", "grad_checkpoint")


def find_or_train(args, dataset, run):
    """The teacher of a student's run, frozen, and the options of the student's network.

    args.teacher: a checkpoint; "none" for no teacher; or None for runs/flow-DATA/ckpt.pt, which is
    first trained in the same processes, unless its training is finished. Raises ValueError if the
    teacher does not fit the data or the flag --net.
    """
    if args.teacher == "none":
        return None, data.fit_network_to(dataset, args.net)
    path = pathlib.Path(args.teacher) if args.teacher else default_teacher(args, dataset, run)
    if path.is_dir():
        path = path / "ckpt.pt"
    if args.dry_run and args.teacher is None and not path.exists():
        options = data.fit_network_to(dataset, args.net)
        return models.create(**options).eval().requires_grad_(False), options
    teacher, options = load(path, args, dataset, run.device)
    args.teacher_id = checkpoints.fingerprint(path)
    return teacher, options


def load(path, args, dataset, device):
    """The teacher in a checkpoint, frozen, and its options. Raises ValueError if it does not fit
    the data or the flag --net."""
    say_if_unfinished(path)
    start, options = weights.read_start(path, args)
    options = data.fit_network_to(dataset, options)
    teacher = models.create(**options, device=device)
    checkpoints.load_weights(teacher, start, path)
    return teacher.eval().requires_grad_(False), options


def load_into(net, teacher):
    """Copies the teacher's weights into its student. A student may have a second time that its
    teacher lacks, and keeps its weights for it. Raises ValueError if other weights are missing."""
    checkpoints.load_weights(net, teacher.state_dict(), "the teacher", weights.MAY_BEGIN_ANEW)


def default_teacher(args, dataset, run):
    """Trains the default teacher unless it is finished, and returns the path of its checkpoint."""
    teacher_args = flow.parse_args(["--preset", args.preset, "--data", args.data])
    path = pathlib.Path(teacher_args.out) / "ckpt.pt"
    finished = False
    if path.exists():
        checkpoint = checkpoints.read(path)
        finished = checkpoint["step"] >= checkpoint["args"]["steps"]
        options = vars(teacher_args) | checkpoint["args"]
        teacher_args = argparse.Namespace(**options)
        if checkpoint["method"] != flow.METHOD:
            raise ValueError(f"{path} is a run of {checkpoint['method']}.py, which cannot be a "
                             "teacher; name a run of flow.py by --teacher")
        net = data.fit_network_to(dataset, args.net)
        different = weights.first_difference(teacher_args.net, net)
        if different:
            key, found, expected = different
            raise ValueError(f"{path} has a network with {key}={found}, and this run {key}="
                             f"{expected}; use --net {key}={found}, or train another teacher with "
                             "flow.py --out and name it by --teacher")
        del checkpoint                     # Windows does not replace a file that is mapped
        if not (args.dry_run or args.skip_broken) and teacher_args.samples != args.samples:
            raise ValueError(f"{path} was trained on other data, {teacher_args.samples}, not "
                             f"{args.samples}; name a teacher by --teacher, or train one with "
                             "flow.py --out")
    else:
        for name in SHARED:
            setattr(teacher_args, name, getattr(args, name))
    if finished or args.dry_run:
        return path
    for name in MACHINE:
        setattr(teacher_args, name, getattr(args, name))
    teacher_args.data = args.data
    teacher_args.data_dir = args.data_dir
    teacher_args.fresh = False
    teacher_args.dry_run = None
    teacher_args.out = str(path.parent)    # also if the folder was moved
    teacher_args.vae = args.vae
    teacher_args.tensorboard = args.tensorboard
    teacher_args.eval_every = None         # evaluations are those of the student
    run.prepare(dataset.shape)             # a mistake there is reported before the teacher's hours
    processes.barrier()                    # all have read it before it is written
    announcement = f"the teacher, {path}, is not finished: it is trained first, as by flow.py"
    teacher_run = Run(teacher_args, flow.METHOD, run.device, run.rank, run.world, announcement)
    teacher_run.call(flow.train)
    processes.barrier()
    return path


def say_if_unfinished(path):
    """Prints a line if a checkpoint of flow.py has not reached its last step."""
    checkpoint = checkpoints.read_if_ours(path)
    if checkpoint and checkpoint["method"] == flow.METHOD:
        step, steps = checkpoint["step"], checkpoint["args"]["steps"]
        if step < steps:
            say_once(f"the teacher, {path}, is not finished: it has {step} of {steps} steps")
