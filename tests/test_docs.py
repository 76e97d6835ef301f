"""Tests README.md and docs/: the index of equations is complete and correct; links, names and commands are valid."""

import ast
import functools
import importlib
import re
import shlex
import sys
import tokenize

import pytest
from conftest import ROOT

import data

EQUATIONS = {"facm": 20, "decm": 18, "gcm": 46}            # numbered equations of each paper
LINES = {"facm": 9, "decm": 31, "gcm": 0}                  # numbered lines of its algorithm
METHODS = ["flow", *EQUATIONS, "baselines"]
NUMBERS = {"flow": "facm"}                                 # a script without a paper cites the equations of this one
INDEXED = ["flow", *EQUATIONS]
HEADINGS = ["Usage", "What the logged numbers mean", "Implementation details", "Results", "Departures from the paper",
            "Index of equations"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted([*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
TORCHRUN = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="8", MASTER_ADDR="localhost", MASTER_PORT="29500")


def name(path):
    return path.relative_to(ROOT).as_posix()


# ----------------------------------------------------------------------------------------------------------------------
# Pages: sections, tables, code.

def without_code(text):
    """Returns the text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def fenced(text, language=""):
    """Returns the contents of the fenced blocks of a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [content for name, content in blocks if name == language]


def inline_code(text):
    """Returns the pieces of a text that are in backticks."""
    return re.findall(r"`([^`\n]+)`", without_code(text))


def section(method, heading):
    """Returns the text under a heading of a method's page."""
    text = (ROOT / "docs" / f"{method}.md").read_text()
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)[1]


def rows(text):
    """Returns the cells of all rows of the tables in a text, except for their headers."""
    lines = without_code(text).splitlines()
    cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] if line.startswith("|") else None for line in lines]
    ruler = [bool(row) and all(re.fullmatch(r"-+", cell) for cell in row) for row in cells]
    header = [*ruler[1:], False]
    return [[cell.strip() for cell in row] for row, *skip in zip(cells, ruler, header) if row and not any(skip)]


def headless(text):
    """Returns the first lines of tables that lack a header and a ruler, such as rows after an empty line."""
    lines = ["", *without_code(text).splitlines(), ""]
    return [line for above, line, below in zip(lines, lines[1:], lines[2:])
            if line.startswith("|") and not above.startswith("|") and not re.fullmatch(r"\|(-+\|)+", below.replace(" ", ""))]


def test_headless():
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert headless(table + "\ntext\n\n" + table) == [] and headless(table + "\n| 3 | 4 |\n") == ["| 3 | 4 |"]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_table_has_a_header(path):
    assert headless(path.read_text()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Scripts: the equations and lines that their parts mention.

NUMBER = r"\d+(?:-\d+)?(?!\.?\d)"          # 9 or 26-36, and not the 3 of section 3.3


def mentions(text):
    """Returns {("Eq.", 9), ("line", 4), ...} for "Eq. 9", "Eqs. 8, 36", "Eqs. 26-36", "line 4", "lines 7 and 8"."""
    found = set()
    for kind, numbers in re.findall(rf"\b(Eq|line)s?\.? ({NUMBER}(?:(?:,| and) {NUMBER})*)", " ".join(text.split())):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers):
            found |= {("Eq." if kind == "Eq" else kind, n) for n in range(int(first), int(last or first) + 1)}
    return found


@functools.cache
def parts(method):
    """Returns {name: (first line, last line, source)} of a script's functions and constants, with all comments."""
    source = (ROOT / f"{method}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        if isinstance(node, ast.Assign):
            names = [n.id for target in node.targets for n in ast.walk(target)
                     if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        text = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])     # to the end of the last comment
        found |= {name: (node.lineno, node.end_lineno, text) for name in names}
    return found


def comments(method):
    """Returns [(line number, text), ...] of a script's comments."""
    with open(ROOT / f"{method}.py") as file:
        return [(token.start[0], token.string) for token in tokenize.generate_tokens(file.readline)
                if token.type == tokenize.COMMENT]


def index(method):
    """Returns [(("Eq.", 9), where), ...] of the table on a method's page."""
    keys = [(re.match(r"(Eq\.|line) (\d+)\b", row[0]), row[1]) for row in rows(section(method, "Index of equations"))]
    return [((key[1], int(key[2])), where) for key, where in keys]


def test_mentions():
    assert mentions("# Eq. 14, 3.3") == {("Eq.", 14)}
    assert mentions("# lines 5, 6, Eq. 17") == {("line", 5), ("line", 6), ("Eq.", 17)}
    assert mentions("(Eqs. 26-28 and 36). line\n    18") == {("Eq.", n) for n in (26, 27, 28, 36)} | {("line", 18)}


# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_every_method_page_has_the_headings_in_order(method):
    text = without_code((ROOT / "docs" / f"{method}.md").read_text())
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("method", EQUATIONS)
def test_the_index_is_complete(method):
    """The index has each equation and each line of the algorithm once, in order."""
    assert [key for key, _ in index(method)] == [
        *(("Eq.", n + 1) for n in range(EQUATIONS[method])), *(("line", n + 1) for n in range(LINES[method]))]


@pytest.mark.parametrize("method", INDEXED)
def test_the_index_is_true(method):
    """A part of the script that a row names mentions the row's equation or line. A row may name a part of another
    script, such as `flow.flow_loss`, whose comments have the numbers of one paper alone."""
    assert index(method)
    for key, where in index(method):
        assert re.fullmatch(r"derivation|background|`[\w.]+`(, `[\w.]+`)*", where), (key, where)
        for script, part in re.findall(r"`(?:(\w+)\.)?(\w+)`", where):
            script = script or method
            assert part in parts(script), f"{script}.py has no {part}, which has {key}"
            if script == method or NUMBERS.get(script, script) == method:
                assert key in mentions(parts(script)[part][2]), f"{script}.py: {part} does not mention {key}"


@pytest.mark.parametrize("method", INDEXED)
def test_every_comment_with_an_equation_is_in_the_index(method):
    where = dict(index(method))
    begin = "# FACM's " if method in NUMBERS else "# "
    for number, text in comments(method):
        if re.match(begin + r"(Eqs?\.|lines?) \d", text):
            part = next(name for name, (first, last, _) in parts(method).items() if first <= number <= last)
            for key in mentions(text):
                assert f"`{part}`" in where.get(key, ""), f"{method}.py:{number}: {key} is of {part}, not {where.get(key)}"


@pytest.mark.parametrize("method", METHODS)
def test_every_departure_of_the_script_has_a_row(method):
    """A function or constant with "paper: ...; here: ..." is named in at least as many rows as it has such remarks."""
    table = rows(section(method, "Departures from the paper"))
    assert all(len(row) == 3 and all(row) for row in table)
    for part, (_, _, source) in parts(method).items():
        named = sum(f"`{part}`" in " ".join(row) for row in table)
        assert named >= len(re.findall(r";[\s#]+here:", source)), f"{method}.py: {part}"


# ----------------------------------------------------------------------------------------------------------------------

def anchors(path):
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if not link.startswith("https://"):
            place, _, anchor = link.partition("#")
            target = (path.parent / place).resolve() if place else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_and_flags_and_functions_that_are_named_exist(path):
    examples = sorted((ROOT / "examples").glob("*.py")) if path.stem == "text-to-image" else []
    text, sources = path.read_text(), "".join(script.read_text() for script in [*SCRIPTS, *examples])
    inline = inline_code(text)
    for code in [*inline, *fenced(text)]:
        for file in re.findall(r"(?<![\w/.-])(?:[\w-]+/)*[\w-]+\.(?:py|md)\b", code):
            assert (ROOT / file).exists(), file
    for code in inline:
        flags = set(re.findall(r"(?<!\S)--[A-Za-z][\w-]*", code)) - {"--help"}
        for flag in flags if not code.startswith("torchrun") else []:
            assert f'"{flag}"' in sources or f'"--{flag.removeprefix("--no-")}"' in sources, flag
        if re.fullmatch(r"(\w+\.)?[a-z]+(_[a-z0-9]+)+", code):
            assert re.search(rf"\b{code.split('.')[-1]}\b", sources), code


def commands(path):
    """Returns the words of the commands in a page's text, and in those of its blocks that test_repo.py leaves out."""
    text = path.read_text()
    blocks = [line for block in fenced(text) for line in block.splitlines() if re.match(r"python (data|\w+/\w+)\.py ", line)]
    lines = [line.split("#")[0] for line in blocks + inline_code(text)]
    return [shlex.split(line) for line in lines if re.match(r"(python|torchrun) .*\w\.py\b(?!.*--help)", line)]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_parse(path, monkeypatch):
    for words in commands(path):
        script = next(word for word in words if word.endswith(".py"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[words.index(script):])
            for key, value in TORCHRUN.items() if words[0] == "torchrun" else ():
                patch.setenv(key, value)
            if script == "data.py":
                patch.setattr(data, "inspect", lambda args: None)
                data.main()
            elif "/" in script:            # a benchmark, whose parser is in its main
                source = (ROOT / script).read_text()
                assert all(f'"{word}"' in source for word in words if word.startswith("--")), words
            else:
                importlib.import_module(script.removesuffix(".py")).parse_args()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_snippets_run(path):
    for block in fenced(path.read_text(), "python"):
        exec(compile(block, name(path), "exec"), {})


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_cell_holds_one_number(path):
    for row in rows(path.read_text()):
        for cell in row:
            assert not re.fullmatch(r"[\d.,%± -]+[;/,] [\d.,;%± /-]+", cell), cell


def test_the_readme_fits_into_a_terminal():
    assert all(len(line) <= 160 for line in (ROOT / "README.md").read_text().splitlines())
