"""Tests the repository itself: its layout, what a script shows, the direction of imports, its style, and the commands
of the README, the docs and the docstrings."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

import baselines
import decm
import encode
import facm
import fid
import flow
import gcm
import sample
from common import flags, torchrun

SCRIPTS = [ROOT / name for name in ("flow.py", "facm.py", "decm.py", "gcm.py", "baselines.py")]
TOP = "flow facm decm gcm baselines models jvp data encode sample fid".split()
COMMON = "augment checkpoints dryrun ema evaluation flags folders imagefiles log messages processes run seeds teachers torchrun weights".split()
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")])


def test_the_top_level_shows_what_there_is():
    """The files to read or run are at the top, and those that are not needed to follow a step are in common/."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)
    assert {path.stem for path in (ROOT / "common").glob("*.py")} == {"__init__", *COMMON}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def depth(node, level=0):
    """Returns how many blocks (if, for, while, with, try) are nested."""
    deeper = isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try))
    chained = [node.orelse[0]] if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(
        node.orelse[0], ast.If) else []                                # elif is no deeper
    below = [depth(child, level + deeper - (child in chained)) for child in ast.iter_child_nodes(node)]
    return max([level + deeper, *below])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_style(path):
    source = path.read_text()
    for number, line in enumerate(source.splitlines(), 1):
        assert len(line) <= 100, f"{path.name}:{number} has {len(line)} columns"
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", line), f"{path.name}:{number}"
    tree = ast.parse(source)
    assert ast.get_docstring(tree), f"{path.name} lacks a docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            inner = not any(node in getattr(top, "body", []) for top in [tree, *[
                n for n in tree.body if isinstance(n, ast.ClassDef)]])
            short = node.name in ("main", "parse_args", "forward", "error", "items", "find_class")
            assert inner or short or ast.get_docstring(node), f"{path.name}: {node.name} lacks a docstring"
    for node in functions(tree):
        levels = max(depth(statement) for statement in node.body)
        assert levels <= 4, f"{path.name}: {node.name}"


def source_of(path, name):
    """Returns the source of a function of a script."""
    source = path.read_text()
    found, = [node for node in functions(ast.parse(source)) if node.name == name]
    return ast.get_source_segment(source, found)


IN_SIGHT = ["data.load_for(", "models.create(", "torch.optim.AdamW(net.parameters()", "run.resume(net, ema, optimizer",
            "torch.compile(net)", "DistributedDataParallel(model", "for step in range(run.step, args.steps):", 'group["lr"] =',
            "generator(device, args.seed, \"step\", step)", "torch.randn(shape, generator=random", "run.batch(dataset, step, samples)",
            "require_backward_grad_sync = last", "torch.autocast(", "_loss(", "loss.backward()", "clip_grad_norm_(net.parameters(), args.clip)",
            "grad_norm.isfinite()", "optimizer.step()", "optimizer.zero_grad()", "run.log(step", "run.save()"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_training_step_is_in_sight(path):
    """Optimiser, schedule, DDP, autocast, accumulation, clipping and the EMA's formula are lines of train, in this order."""
    text = source_of(path, "train")
    places = [text.find(line) for line in IN_SIGHT]
    assert -1 not in places, [line for line, place in zip(IN_SIGHT, places) if place == -1]
    assert places == sorted(places)
    assert "(1 - 1 / (step + 1)) ** (ema_gamma + 1)" in text and "torch._foreach_lerp_(" in text
    assert not [node for node in ast.walk(ast.parse(text).body[0]) if isinstance(node, (ast.FunctionDef, ast.Lambda))][1:]
    assert source_of(path, "main").splitlines()[1:] == ["    launch(train, METHOD, parse_args())"]


def method_of(path):
    """Returns the part THE METHOD of a script, which users can copy."""
    source = path.read_text()
    return source[source.index("# THE METHOD"):source.index("# SAMPLERS")]


IMPORTS = """
import math
import torch
from torch.nn.functional import cosine_similarity
from jvp import JVP, in_one_pass, with_tangent
"""
TRY = """
def net(x, t, s=None, y=None):
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    return scale * x * t
scale = torch.ones((), requires_grad=True)
x1, x0, t, r = torch.randn(4, 2, 3), torch.randn(4, 2, 3), torch.rand(4), torch.zeros(4)
"""
CALLS = {
    "flow": "flow_loss(net, x1, x0, t, None)",
    "facm": "sum(facm_loss(net, JVP['fd'], x1, x0, t, None))",
    "decm": "sum(decm_loss(net, JVP['exact'], x1, x0, t, None)[:2]) + sum("
            "n2n_loss(net, JVP['exact'], x1, x0, *decm_loss(net, JVP['fd'], x1, x0, t, None)[2], r, t, None))",
    "gcm": "gcm_loss(precondition(net), JVP['fused'], x1, x0, *sample_times(torch.rand(4, 4)), None, difference=False)",
    "baselines": "meanflow_loss(net, JVP['fd'], x1, x0, r, t, None) + scm_loss(net, JVP['fd'], x1, x0, t, None, "
                 "phi=torch.zeros(8))"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_method_runs_in_an_empty_folder_beside_jvp(path, tmp_path):
    """The method is copied out of the script and executed. The baselines also need FACM's method."""
    shutil.copy(ROOT / "jvp.py", tmp_path)
    methods = [method_of(ROOT / "facm.py")] if path.stem == "baselines" else []
    code = "\n".join([IMPORTS, *methods, method_of(path), TRY, f"({CALLS[path.stem]}).backward()", "print(scale.grad.item())"])
    (tmp_path / "copied.py").write_text(code)
    done = subprocess.run([sys.executable, "-P", "copied.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout)) > 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_loss_needs_torch_alone(path):
    """The method and the samplers use no args, self, device or seed. The hyper-parameters of a loss are keyword
    arguments with defaults."""
    source = path.read_text()
    method = source[source.index("# THE METHOD"):source.index("def preview")]
    assert not re.search(r"\b(data|models|run|weights|processes)\.(?!py)|\bself\b|cuda|manual_seed|os\.|getattr|hasattr", method)
    for node in functions(ast.parse(source)):
        if node.name.endswith("_loss") and node.name not in ("fm_loss", "mmd_loss", "flow_loss"):
            second = "x1" if node.name == "alphaflow_loss" else "jvp"                  # AlphaFlow has no derivative
            assert [a.arg for a in node.args.args][1] == second and node.args.kwonlyargs and len(node.args.args) <= 9
            missing = [a.arg for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults) if default is None]
            assert missing in ([], ["phi"], ["alpha"])


def test_imports_run_one_way():
    """Each file imports only those that are listed for it. common/ imports neither methods nor data sets, except
    that evaluation.py imports fid.py and sample.py, and teachers.py imports flow.py, whose runs are the teachers."""
    inside = {
        "__init__": set(), "augment": set(), "ema": set(), "torchrun": set(), "messages": {"torchrun"}, "seeds": set(),
        "folders": {"messages", "torchrun"}, "checkpoints": {"messages"}, "log": {"messages"}, "flags": {"messages", "torchrun"},
        "imagefiles": {"messages"}, "processes": {"folders", "messages", "torchrun"}, "weights": {"checkpoints", "messages"},
        "evaluation": {"fid", "sample", "messages"},
        "teachers": {"checkpoints", "data", "flow", "messages", "models", "processes", "run", "weights"},
        "run": {"checkpoints", "dryrun", "evaluation", "flags", "folders", "log", "messages", "processes", "torchrun"}, "dryrun": {"processes", "run"}}
    everything = set(COMMON)
    allowed = {name: inside[name] | ({"models"} if name == "weights" else set()) for name in inside}
    allowed |= {"jvp": set(), "models": {"jvp"}, "data": everything, "encode": everything | {"data"},
                "fid": everything | {"data"}, "flow": everything | {"data", "models"},
                "gcm": everything | {"data", "models", "jvp"}}
    allowed |= {name: everything | {"data", "models", "jvp"} for name in ("facm", "decm")}
    allowed["baselines"] = allowed["facm"] | {"facm"}                  # what its methods share with FACM's
    allowed["sample"] = everything | {"data", "models"}
    ours = {path.stem for path in FILES}
    assert ours == allowed.keys()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [a.name for a in node.names] if node.module == "common" else [node.module.removeprefix("common.")]
            for name in set(names) & ours:
                assert name in allowed[path.stem], f"{path.name} imports {name}"


def test_importing_a_script_sets_nothing_global():
    """Imports change neither signal handlers, nor warnings, nor settings of torch."""
    code = """
import signal, sys, torch, warnings
def settings():
    return (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.excepthook, list(warnings.filters),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads(),
            torch.get_default_dtype(), torch.nn.Module.to, torch.initial_seed())
import torchvision, scipy.linalg, safetensors.torch, tqdm
before = settings()
import flow, facm, decm, gcm, baselines, sample, fid, encode, data, common.dryrun
assert settings() == before
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_presets_agree_where_a_student_begins_with_its_teacher():
    """Each script repeats the network in its presets, so that it is visible there. The copies must agree."""
    for name, preset in flow.PRESETS.items():
        for module in (facm, decm, baselines):
            for key in ("net", "resolution", "precision", "xflip", "uncond"):
                assert module.PRESETS[name].get(key) == preset.get(key), (module.__name__, name, key)


def test_the_docstring_of_a_script_is_short_and_says_where_time_runs():
    for path in SCRIPTS:
        lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
        assert len(lines) <= 35
        assert any("DIRECTION OF TIME" in line for line in lines[:10])


def test_every_equation_of_the_docstring_is_in_the_code():
    for path in SCRIPTS:
        source = path.read_text()
        doc = ast.get_docstring(ast.parse(source))
        code = source.replace(doc, "")
        cited = set(re.findall(r"\d+", " ".join(re.findall(r"Eqs?\. ([\d, ]+)", code))))
        for number in re.findall(r"\d+", " ".join(re.findall(r"Eq\. ([\d, ]+)$", doc, re.MULTILINE))):
            assert number in cited, f"{path.name}: Eq. {number} has no line"


PROGRAMS = {f"{module.__name__}.py": module for module in (flow, facm, decm, gcm, baselines, sample, fid, encode)}
NEEDED = {"sample.py": ["--ckpt", "x", "--out", "x"], "fid.py": ["samples"],
          "encode.py": ["--images", "x", "--vae", "x", "--out", "x"]}


def flags_of(name, monkeypatch):
    """Returns every option string of a program's parser."""
    seen = []
    original = flags.Parser.add_argument
    group = flags.argparse._ArgumentGroup.add_argument
    for owner, honest in ((flags.Parser, original), (flags.argparse._ArgumentGroup, group)):
        monkeypatch.setattr(owner, "add_argument", lambda self, *names, honest=honest, **kw: (
            seen.extend(names), honest(self, *names, **kw))[1])
    monkeypatch.setattr(sys, "argv", [name, *NEEDED.get(name, [])])
    PROGRAMS[name].parse_args()
    return {name for name in seen if name.startswith("--")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_torchrun_leaves_our_flags_alone(name, monkeypatch):
    """torchrun accepts abbreviations of its flags, even after the script's name, which ours must not be."""
    theirs = [o for action in get_args_parser()._actions for o in action.option_strings if o.startswith("--")]
    for flag in flags_of(name, monkeypatch) - {"--help", "--n", "--pr"}:
        assert not any(other.startswith(flag) for other in theirs), flag


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_whole(name, monkeypatch, capsys):
    """--help prints without an error, and its text does not contain None."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        PROGRAMS[name].parse_args()
    assert end.value.code == 0 and "None" not in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path, monkeypatch):
    """A name that another module no longer has would otherwise be noticed only by the one who runs the benchmark."""
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    importlib.import_module(path.stem)


def test_flags_that_may_change_at_a_resume_are_said_once():
    assert flags.MAY_CHANGE == set("data data_dir skip_broken class_names steps save_every keep_every log_every preview_every device fresh out fsdp "
                                   "grad_checkpoint micro_batch dry_run teacher given net_given vae eval_every eval_n eval_nfe ref features inception tensorboard".split())


COMMANDS = [line.split("#")[0].strip()
            for path in [ROOT / "README.md", *FILES, *sorted((ROOT / "benchmarks").glob("*.py")),
                         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]
            for line in path.read_text().splitlines()
            if re.match(r"\s*(python|torchrun|pip install .*&& python) ", line) and ".py" in line]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_parses(command, monkeypatch):
    """Each command in README, docs and docstrings names a script that exists and flags that the script accepts."""
    words = shlex.split(command.split("&&")[-1])
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    if script in PROGRAMS:
        monkeypatch.setattr(sys, "argv", words[words.index(script):])
        if words[0] == "torchrun":
            for name in torchrun.NAMES:
                monkeypatch.setenv(name, "8")
        assert PROGRAMS[script].parse_args()
