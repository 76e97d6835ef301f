"""The repository itself: line budgets, one house style, floors of imports, commands of README, docs and docstrings."""

import ast
import re
import shlex
import sys

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

import baselines
import decm
import encode
import facm
import fid
import flags
import gcm
import sample

SCRIPTS = [ROOT / name for name in ("facm.py", "decm.py", "gcm.py", "baselines.py")]
FILES = sorted(ROOT.glob("*.py"))
# The budgets that were set before the code was written. Three are wider, because the better code is longer:
# gcm.py 480: the keyword-only hyper-parameters of its loss take a line each where twelve tables share one script.
# jvp.py 220: rules for networks that are not ours, such as affine normalisations, softmax and matrix products.
# run.py 500: the owner of a folder, the micro-batches, what may change at a resume, and the log's steps as functions.
# flags.py, dryrun.py and imagefiles.py are rooms of their own: what is said before a run, what a run would take, and
# which files are images of which class.
BUDGETS = {"facm.py": 420, "decm.py": 420, "gcm.py": 500, "baselines.py": 350, "models.py": 1080, "data.py": 650,
           "run.py": 650, "flags.py": 220, "dryrun.py": 200, "imagefiles.py": 250, "jvp.py": 266, "weights.py": 300, "README.md": 200}


@pytest.mark.parametrize("name", BUDGETS)
def test_line_budgets(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGETS[name]


# Two updates a step, each in pieces, with autocast; images in batches, features in two kinds, each with its sums.
DEEPER = {("decm", "main"), ("fid", "collect")}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def depth(node, level=0):
    """How many blocks (if, for, while, with, try) lie inside one another."""
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
        assert levels <= 4 + ((path.stem, node.name) in DEEPER), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_main_is_read_in_one_go(path):
    """At most 90 lines, with batch, loss, backward and optimiser in sight; no function is defined in it."""
    source = path.read_text()
    main, = [node for node in functions(ast.parse(source)) if node.name == "main"]
    text = ast.get_source_segment(source, main)
    assert len(text.splitlines()) <= 90
    assert not [node for node in ast.walk(main) if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not main]
    places = [text.index(part) for part in ("while job.step", "# Seed", "# Batch", "# Loss", ".backward()", "clip_gradient",
                                            "optimizer.step()", "ema_update", "after_step", "save_preview")]
    assert places == sorted(places)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_loss_needs_torch_alone(path):
    """No args, no self, no device, no seed in the method and the samplers; hyper-parameters of a loss by keyword."""
    source = path.read_text()
    method = source[source.index("# THE METHOD"):source.index("def preview")]
    assert not re.search(r"\b(data|models|run|weights|job)\.(?!py)|\bself\b|cuda|manual_seed|os\.", method)
    for node in functions(ast.parse(source)):
        if node.name.endswith("_loss") and node.name not in ("fm_loss", "mmd_loss", "pretrain_loss"):
            assert [a.arg for a in node.args.args][1] == "jvp" and node.args.kwonlyargs and len(node.args.args) <= 9


def test_imports_run_one_way():
    """Floor by floor: what a file may import of ours."""
    rooms = {"augment", "imagefiles", "data", "models", "run", "flags", "weights", "jvp", "dryrun"}
    allowed = {"jvp": set(), "flags": set(), "run": {"flags"}, "dryrun": {"run"}, "models": {"jvp"},
               "augment": set(), "imagefiles": set(), "data": {"run", "flags", "dryrun", "imagefiles"}, "weights": {"models", "run"},
               "facm": rooms, "decm": rooms, "gcm": rooms, "baselines": rooms | {"facm"},    # what its rows share with FACM's
               "encode": rooms - {"jvp", "dryrun"}, "sample": rooms - {"jvp", "dryrun"}, "fid": {"data", "run", "flags", "imagefiles"}}
    ours = {path.stem for path in FILES}
    assert ours == allowed.keys()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in set(names) & ours:
                assert name in allowed[path.stem], f"{path.name} imports {name}"


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


PROGRAMS = {f"{module.__name__}.py": module for module in (facm, decm, gcm, baselines, sample, fid, encode)}
NEEDED = {"sample.py": ["--ckpt", "x", "--out", "x"], "fid.py": ["samples"],
          "encode.py": ["--images", "x", "--vae", "x", "--out", "x"]}


def flags_of(name, monkeypatch):
    """Every option string of a program's parser."""
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
    """torchrun reads any beginning of its own flags as that flag, also behind the script's name."""
    theirs = [o for action in get_args_parser()._actions for o in action.option_strings if o.startswith("--")]
    for flag in flags_of(name, monkeypatch) - {"--help", "--n", "--pr"}:
        assert not any(other.startswith(flag) for other in theirs), flag


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_whole(name, monkeypatch, capsys):
    """--help formats, and each flag has a phrase."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        PROGRAMS[name].parse_args()
    assert end.value.code == 0 and "None" not in capsys.readouterr().out


def test_flags_that_may_change_at_a_resume_are_said_once():
    assert flags.MAY_CHANGE == set("data data_dir skip_broken class_names steps save_every log_every preview_every device fresh out fsdp "
                                 "grad_checkpoint micro_batch dry_run".split())


COMMANDS = [line.split("#")[0].strip()
            for path in [ROOT / "README.md", *FILES, *sorted((ROOT / "benchmarks").glob("*.py")),
                         *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]
            for line in path.read_text().splitlines()
            if re.match(r"\s*(python|torchrun|pip install .*&& python) ", line) and ".py" in line]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_parses(command, monkeypatch):
    """Each launch line of README, docs and docstrings names a script here and flags that it has."""
    words = shlex.split(command.split("&&")[-1])
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    if script in PROGRAMS:
        monkeypatch.setattr(sys, "argv", words[words.index(script):])
        if words[0] == "torchrun":
            monkeypatch.setenv("WORLD_SIZE", "8")
        assert PROGRAMS[script].parse_args()
