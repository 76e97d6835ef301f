"""Tests benchmarks/: the figures that a default run is compared with, the table of a run, and the moving picture."""

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image
from test_training import TINY, call, refused

sys.path.insert(0, str(ROOT / "benchmarks"))
import curves
import movie
import quickstart

import facm


def test_a_run_is_compared_with_the_default_run_only_if_it_is_one():
    for method, rows in (("flow", 3), ("facm", 5), ("decm", 16), ("gcm", 2)):
        kept = json.loads((ROOT / f"benchmarks/results/default-{method}.json").read_text())
        flags = dict(kept["flags"])
        expected = quickstart.expected_figures(method, flags, kept["n"])
        assert expected == kept["figures"] and len(expected) == rows + 1
        assert quickstart.expected_figures(method, flags, 1000) == {}
        for name, value in dict(steps=7, lr=1.0, seed=1, data="mnist").items():
            assert quickstart.expected_figures(method, {**flags, name: value}, kept["n"]) == {}, name
    assert quickstart.expected_figures("baselines", {}, 2000) == {}


def test_the_presets_are_those_of_the_expected_runs():
    for method in ("flow", "facm", "decm", "gcm"):
        preset = __import__(method).PRESETS["glyphs"]
        kept = json.loads((ROOT / f"benchmarks/results/default-{method}.json").read_text())["flags"]
        assert {name: preset[name] for name in ("steps", "batch", "lr")} == {name: kept[name] for name in ("steps", "batch", "lr")}


def test_the_table_of_a_run_has_means_of_the_log_and_the_last_distance(tmp_path, capsys):
    """Each mean is over two lines. L_n2n is in every second line, and distances were measured at steps 20 and 40."""
    run = tmp_path / "decm-glyphs"
    run.mkdir()
    lines = [dict(step=10 * i, L_cm=float(i), grad_norm=1.0) | (dict(L_n2n=10.0 * i) if i % 2 else {}) for i in range(1, 5)]
    lines.insert(2, dict(step=20, changed=dict(lr=[1, 2])))
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"student, NFE 1": dict(recognised=1.0, distance=5.0), "20 real digits": dict(recognised=1.0, distance=0.1)}
    (run / "distance.jsonl").write_text("".join(
        json.dumps(dict(step=step, figures=figures | {"student, NFE 1": dict(recognised=1.0, distance=d)})) + "\n"
        for step, d in ((20, 5.0), (40, 2.5))))
    curves.print_table(run, 2, curves.curves_of_log(run, 2))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    table = {head: (a, b) for head, a, b in zip(rows[0], rows[2], rows[3])}
    assert table == {"step": ("20", "40"), "L_cm": ("1.5", "3.5"), "L_n2n": ("10", "20"), "grad_norm": ("1", "1"),
                     "distance, NFE 1": ("5", "2.5")}


def test_the_moving_picture_has_a_frame_for_each_snapshot_and_one_for_the_teacher(teacher, tmp_path, monkeypatch, capsys):
    run = tmp_path / "facm"
    flags = [*TINY, "--teacher", teacher, "--steps", 3, "--out", run]
    call(monkeypatch, facm, *flags)
    capsys.readouterr()
    assert "no snapshots" in refused(monkeypatch, capsys, movie, f"A={run}", "--out", tmp_path / "x.webp")
    call(monkeypatch, facm, *flags, "--keep-every", 2, "--fresh")
    capsys.readouterr()
    call(monkeypatch, movie, f"A={run}", f"B={run}", "--out", tmp_path / "x.webp")
    assert "3 frames" in capsys.readouterr().out               # steps 0, 2 and 3
    picture = Image.open(tmp_path / "x.webp")
    assert picture.n_frames == 3 and picture.height == 2 * 12 * 4 + 24
    assert "NAME=RUN" in refused(monkeypatch, capsys, movie, str(run), "--out", tmp_path / "x.webp")


@pytest.mark.parametrize("name", ["training.webp"])
def test_the_moving_picture_of_the_readme_is_small(name):
    path = ROOT / "assets" / name
    assert path.stat().st_size < 2e6 and Image.open(path).n_frames > 10
