"""Tests FID during training, previews of latents, the sweep over the checkpoints of a run, curves and TensorBoard."""

import json
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from formula import fill
from PIL import Image
from test_data import small_vae, write_shards
from test_fid import Small, script
from test_training import FLOW, SCRATCH, TINY, call, popen_two, refused, rows, run_two, same

import data
import decm
import facm
import fid
import flow
import gcm
import sample
from common import checkpoints, evaluation

sys.path.insert(0, str(ROOT / "benchmarks"))
import curves
import sweep

STEADY = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in TINY]       # two processes differ in dropout
LATENTS = ["--device", "cpu", "--batch", 4, "--steps", 2, "--warmup", 1, "--preview-every", 1, "--net", "name=LightningDiT",
           "patch=1", "width=32", "depth=1", "heads=4", "qknorm=True"]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Returns the file of a TorchScript network with 24 features."""
    return script(fill(Small()), tmp_path_factory.mktemp("net") / "small.pt")


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """Returns a file of 300 glyphs."""
    path = tmp_path_factory.mktemp("glyphs") / "glyphs.npz"
    np.savez(path, arr_0=data.glyphs(300, 12, seed=1)[0])
    return path


@pytest.fixture(scope="module")
def ref(net, glyphs):
    """Returns a file of the statistics of the glyphs."""
    path = glyphs.with_name("ref.npz")
    with pytest.MonkeyPatch.context() as patch:
        call(patch, fid, glyphs, "--features", net, "--save-stats", path, "--device", "cpu")
    return path


@pytest.fixture(scope="module")
def asked(net, ref):
    return ["--eval-every", 2, "--ref", ref, "--features", net, "--eval-n", 70]


@pytest.fixture(scope="module")
def watched(asked, tmp_path_factory):
    """Runs facm.py for 4 steps with an evaluation after steps 2 and 4, and returns the folder."""
    out = tmp_path_factory.mktemp("watched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, facm, *STEADY, *SCRATCH, *asked, "--steps", 4, "--save-every", 2, "--keep-every", 2, "--out", out)
    return out


def evaluations(out):
    return [row for row in rows(out) if "eval_n" in row]


def figures(monkeypatch, ckpt, net, ref, nfe, n, *flags):
    """Returns the distance that the programs sample.py and fid.py measure."""
    call(monkeypatch, sample, "--ckpt", ckpt, "--nfe", nfe, "--n", n, "--out", "x.npz", "--device", "cpu", *flags)
    call(monkeypatch, fid, "x.npz", "--ref", ref, "--features", net, "--json", "x.json", "--device", "cpu")
    (figure,) = json.loads(pathlib.Path("x.json").read_text())["figures"].values()
    return figure


# FID while a run trains

def test_the_figures_are_those_of_sample_and_fid(watched, net, ref, monkeypatch):
    at_2, at_4 = evaluations(watched)
    assert (at_2["step"], at_4["step"]) == (2, 4) and set(at_2) == {"step", "fd", "eval_n", "features"}
    assert at_2["eval_n"] == 70 and at_2["features"].startswith("small.pt sha256:")
    for row, ckpt in ((at_2, "step-0000002.pt"), (at_4, "ckpt.pt")):
        for nfe in (1, 2):
            assert row["fd"][f"NFE {nfe}"] == pytest.approx(figures(monkeypatch, watched / ckpt, net, ref, nfe, 70), abs=1e-4)
    assert at_2["fd"] != at_4["fd"]


def test_with_inception_it_is_an_fid(net, glyphs, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "load_extractor", lambda args, device: (fid.load_features(net), fid.INCEPTION))
    call(monkeypatch, flow, *FLOW, "--eval-every", 1, "--ref", glyphs, "--eval-nfe", 3, "--eval-n", 64, "--steps", 1,
         "--out", tmp_path)
    (row,) = evaluations(tmp_path)
    assert set(row) == {"step", "fid", "eval_n"} and set(row["fid"]) == {"NFE 3"} and row["fid"]["NFE 3"] > 0


def test_training_is_the_same_with_and_without_evaluations(watched, tmp_path, monkeypatch):
    call(monkeypatch, facm, *STEADY, *SCRATCH, "--steps", 4, "--save-every", 2, "--out", tmp_path / "run")
    a, b = (checkpoints.read(out / "ckpt.pt") for out in (watched, tmp_path / "run"))
    assert all(same(a[part], b[part]) for part in ("model", "ema", "optimizer"))
    lines = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in rows(out) if "eval_n" not in row]
             for out in (watched, tmp_path / "run")]
    assert lines[0] == lines[1]


def test_the_random_generator_is_left_alone():
    state = torch.get_rng_state()
    with evaluation.apart("cpu"):
        torch.randn(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.backends.cuda.matmul.allow_tf32 = True           # as with --precision tf32
    with evaluation.apart("cpu"):
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False


def test_a_resumed_run_has_the_same_figures_and_none_twice(watched, asked, tmp_path, monkeypatch):
    """A run that ended after saving step 2, but before its evaluation, has the same figures after it resumes. The flags
    of the evaluation may be added, changed or left out on resume."""
    out, command = tmp_path / "run", [*STEADY, *SCRATCH, "--save-every", 2, "--out", tmp_path / "run"]
    call(monkeypatch, facm, *command, *asked, "--steps", 2)
    log = out / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "eval_n" not in line))
    call(monkeypatch, facm, *command, *asked, "--steps", 4)
    assert evaluations(out) == evaluations(watched)
    call(monkeypatch, facm, *command, *asked, "--steps", 4)            # the run is finished
    assert evaluations(out) == evaluations(watched)
    call(monkeypatch, facm, *command, "--steps", 5)
    call(monkeypatch, facm, *command, *asked, "--steps", 6, "--eval-n", 64, "--eval-nfe", 2)
    assert [(row["step"], row["eval_n"], list(row["fd"])) for row in evaluations(out)[2:]] == [(6, 64, ["NFE 2"])]


def test_lines_past_the_checkpoint_are_dropped(watched, asked, tmp_path, monkeypatch):
    """The log has lines of step 4 that were written before a kill, but the newest checkpoint is that of step 2."""
    out = tmp_path / "run"
    shutil.copytree(watched, out)
    command = [*STEADY, *SCRATCH, *asked, "--save-every", 2, "--out", out]
    held = checkpoints.read(out / "ckpt.pt")
    call(monkeypatch, facm, *command, "--steps", 2, "--out", tmp_path / "short")
    short = checkpoints.read(tmp_path / "short/ckpt.pt")
    checkpoints.save(out / "ckpt.pt", short | dict(args=held["args"]))
    call(monkeypatch, facm, *command, "--steps", 4)
    assert [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows(out)] == [
        {k: v for k, v in row.items() if k != "images_per_s"} for row in rows(watched)]


@pytest.mark.parametrize("flags", [["--steps", 2], ["--steps", 3, "--fsdp"]], ids=["replicas", "shards"])
def test_two_processes_measure_as_one(watched, asked, tmp_path, flags):
    """70 samples are two batches of the network, of which the first process draws one and the second both. With --fsdp,
    the average is still updated after a preview and an evaluation."""
    run_two(*STEADY[:-2], "--jvp", "fused", "--preview-every", 1, *SCRATCH, *asked, *flags, "--out", tmp_path / "run")
    one, two = evaluations(watched)[0], evaluations(tmp_path / "run")[0]
    assert one["step"] == two["step"] == 2 and one["eval_n"] == two["eval_n"]
    assert all(two["fd"][name] == pytest.approx(figure, rel=2e-3) for name, figure in one["fd"].items())
    assert len(list((tmp_path / "run/previews").iterdir())) == flags[1]


@pytest.mark.parametrize("n, world", [(70, 2), (130, 3), (64, 2), (5, 5), (129, 2)])
def test_the_processes_draw_the_samples_of_one(watched, monkeypatch, n, world):
    """Each process draws the samples that fid.collect reads in it, and all call the network equally often."""
    monkeypatch.setattr(fid, "raise_together", lambda problem, world: None)
    network, checkpoint = sample.load(watched / "ckpt.pt")
    chosen = sample.choose_sampler(network, checkpoint, 1)
    labels = torch.arange(n) % 10
    whole = sample.draw(network, checkpoint, 1, labels)
    counts = []
    for rank in range(world):
        calls = []
        monkeypatch.setattr(sample, "draw_batch", lambda *args, honest=sample.draw_batch: (calls.append(args[4]), honest(*args))[1])
        first, images = evaluation.draw_part(network, checkpoint, chosen, labels, 0, lambda x: x, rank, world)
        begin, end = n * rank // world, n * (rank + 1) // world
        assert np.array_equal(images[begin - first:end - first], whole[begin:end]) and end - first <= len(images)
        counts.append(len(calls))
        assert all(first % sample.ROWS == 0 for first in calls)        # the same batches as in one process
        monkeypatch.undo()
        monkeypatch.setattr(fid, "raise_together", lambda problem, world: None)
    assert len(set(counts)) == 1


def test_samples_that_are_not_finite_leave_the_run_alone(asked, tmp_path, monkeypatch, capsys):
    def broken(decode, x, first, honest=sample.to_pixels):
        if first == 64 and sample.spoilt:
            raise FloatingPointError("samples from number 64 on are not finite")
        return honest(decode, x, first)
    monkeypatch.setattr(sample, "to_pixels", broken)
    monkeypatch.setattr(sample, "spoilt", True, raising=False)
    call(monkeypatch, facm, *STEADY, *SCRATCH, *asked, "--steps", 4, "--out", tmp_path / "run")
    assert "NFE 2 has no figure: samples from number 64 on are not finite" in capsys.readouterr().err
    assert [row["fd"] for row in evaluations(tmp_path / "run")] == [{}, {}]
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 4


def test_time_for_figures_is_none_of_training(tmp_path, asked, monkeypatch):
    """An evaluation that takes a second longer does not reduce images_per_s of the next step."""
    import time
    honest = evaluation.Evaluation.figures

    def slow(self, *inputs):
        time.sleep(1)
        return honest(self, *inputs)
    monkeypatch.setattr(evaluation.Evaluation, "figures", slow)
    call(monkeypatch, flow, *FLOW, *asked, "--steps", 3, "--out", tmp_path)
    (third,) = [row for row in rows(tmp_path) if row["step"] == 3 and "eval_n" not in row]
    assert third["images_per_s"] > 8 / 1


@pytest.mark.parametrize("flags, words", [
    ("--ref nowhere.npz", "nowhere.npz: there is no such file or folder"), ("--ref small.pt", "small.pt contains no readable statistics"),
    ("--ref other.npz", "24 features for each image, but the statistics to compare with have 3"), ("--features ref.npz", "ref.npz is not a TorchScript file"),
    ("--vae small.pt", "--vae has no effect here: it needs latents"), ("--eval-nfe 0", "--eval-nfe 0"), ("--eval-n 1", "--eval-n 1"),
    ("--inception w.pth", "--features replaces Inception")])
def test_mistakes_end_in_one_line_before_training(net, ref, tmp_path, monkeypatch, capsys, flags, words):
    """The error also comes before the default teacher is trained."""
    shutil.copy(net, "small.pt")
    shutil.copy(ref, "ref.npz")
    np.savez("other.npz", mu=np.zeros(3), sigma=np.eye(3))
    command = [*TINY, "--eval-every", 2, "--ref", "ref.npz", "--features", "small.pt", *flags.split()]
    assert words in refused(monkeypatch, capsys, facm, *command, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists() and not pathlib.Path("runs").exists()


@pytest.mark.parametrize("flags, words", [
    ("--ref ref.npz", "--ref has no effect here: it needs --eval-every"), ("--eval-n 8", "--eval-n has no effect"),
    ("--eval-nfe 2", "--eval-nfe has no effect"), ("--features small.pt", "--features has no effect"),
    ("--inception small.pt", "--inception has no effect"), ("--eval-every 5", "--eval-every needs --ref")])
def test_flags_of_the_evaluation_need_each_other(tmp_path, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, flow, *FLOW, *flags.split(), "--out", tmp_path / "run")
    assert words in refused(monkeypatch, capsys, gcm, *FLOW, *flags.split(), "--out", tmp_path / "run")


def test_a_number_of_evaluations_that_the_method_lacks_is_refused(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(facm, "default_sampler", lambda nfe, args: "no such sampler")
    assert "--sampler no such sampler" in refused(monkeypatch, capsys, facm, *STEADY, *SCRATCH, *asked, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Latents

@pytest.fixture
def latents(tmp_path):
    write_shards(tmp_path / "z")
    vae = small_vae(tmp_path)
    return vae, ["--data", "imagenet_latents", "--data-dir", tmp_path / "z", *LATENTS, "--out", tmp_path / "run"]


def test_previews_of_latents_are_what_the_autoencoder_makes_of_them(latents, tmp_path, monkeypatch):
    vae, command = latents
    call(monkeypatch, flow, *command)
    assert not (tmp_path / "run/previews").exists()                    # latents have no previews without --vae
    call(monkeypatch, flow, *command, "--steps", 3, "--vae", tmp_path / "vae.pt")      # it may be added on resume
    assert [path.name for path in (tmp_path / "run/previews").iterdir()] == ["0000003.png"]
    network, checkpoint = sample.load(tmp_path / "run/ckpt.pt")
    args = types.SimpleNamespace(**checkpoint["args"])
    z = flow.preview(network, data.preview_noise(0, (4, 4, 4)), args)
    mean, std = data.read_stats(tmp_path / "z", 4)
    data.save_preview(tmp_path / "expected.png", vae.decode(z * std + mean))
    found, expected = (np.asarray(Image.open(path)).astype(int) for path in (
        tmp_path / "run/previews/0000003.png", tmp_path / "expected.png"))
    assert found.shape == (4 * 16 * 3, 10 * 16 * 3, 3) and abs(found - expected).max() <= 1 and found.std() > 1


def test_figures_of_latents_are_those_of_their_images(latents, net, ref, tmp_path, monkeypatch, capsys):
    _, command = latents
    asked = ["--eval-every", 1, "--ref", ref, "--features", net, "--eval-n", 20, "--eval-nfe", 2]
    assert "--eval-every needs --vae FILE here" in refused(monkeypatch, capsys, flow, *command, *asked)
    assert not (tmp_path / "run").exists()
    call(monkeypatch, flow, *command, *asked, "--vae", tmp_path / "vae.pt")
    expected = figures(monkeypatch, tmp_path / "run", net, ref, 2, 20, "--vae", tmp_path / "vae.pt")
    assert evaluations(tmp_path / "run")[-1]["fd"] == {"NFE 2": pytest.approx(expected, abs=1e-4)}


@pytest.mark.parametrize("file, words", [("nowhere.pt", "nowhere.pt"), ("run.pt", "not an autoencoder"), ("text.pt", "text.pt")])
def test_a_wrong_autoencoder_is_one_line(latents, watched, tmp_path, monkeypatch, capsys, file, words):
    shutil.copy(watched / "ckpt.pt", "run.pt")
    pathlib.Path("text.pt").write_text("no checkpoint")
    assert words in refused(monkeypatch, capsys, flow, *latents[1], "--vae", file)
    assert not (tmp_path / "run").exists()


def test_a_wrong_autoencoder_ends_both_processes(latents, tmp_path):
    """Both processes end, although only the first one loads the autoencoder."""
    processes = popen_two(*latents[1], "--vae", "nowhere.pt", script="flow.py")
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert said[0].count("error: ") == 1 and "nowhere.pt" in said[0] and said[1] == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [facm, decm], ids=lambda m: m.__name__)
def test_a_default_teacher_is_shown_by_the_autoencoder_and_not_evaluated(latents, net, ref, tmp_path, monkeypatch, module):
    monkeypatch.setitem(flow.PRESETS, "imagenet_latents", flow.PRESETS["imagenet_latents"] | dict(steps=1, batch=4))
    call(monkeypatch, module, *latents[1], "--jvp", "fd", "--vae", tmp_path / "vae.pt", "--eval-every", 1, "--ref", ref,
         "--features", net, "--eval-n", 20)
    teacher = pathlib.Path("runs/flow-imagenet_latents")
    assert len(list((teacher / "previews").iterdir())) == 1 and not evaluations(teacher)
    assert len(evaluations(tmp_path / "run")) == 2


# The sweep

def swept(monkeypatch, out, *flags):
    """Runs sweep.py. Returns the rows in sweep.json, and (step, cfg) of those that were measured."""
    measured, honest = [], evaluation.measure

    def measure(net, checkpoint, chosen, *inputs):
        measured.append((checkpoint["step"], chosen.options.get("cfg")))
        return honest(net, checkpoint, chosen, *inputs)
    monkeypatch.setattr(evaluation, "measure", measure)
    call(monkeypatch, sweep, out, "--device", "cpu", *flags)
    monkeypatch.setattr(evaluation, "measure", honest)
    return json.loads((out / "sweep.json").read_text())["rows"], measured


NAME = "Frechet distance (small.pt)"


@pytest.fixture
def run(watched, tmp_path):
    shutil.copytree(watched, tmp_path / "run")
    return tmp_path / "run"


def test_a_sweep_measures_each_checkpoint_once(run, watched, net, ref, monkeypatch, capsys):
    """The snapshot of step 4 and ckpt.pt are the same network and measured once. The figures are those of the log."""
    flags = ["--ref", ref, "--features", net, "--n", 70]
    found, measured = swept(monkeypatch, run, *flags)
    assert [(row["checkpoint"], row["nfe"]) for row in found] == [
        ("step-0000002.pt", 1), ("step-0000002.pt", 2), ("step-0000004.pt", 1), ("step-0000004.pt", 2)]
    logged = [row["fd"][f"NFE {nfe}"] for row in evaluations(watched) for nfe in (1, 2)]
    assert [row[NAME] for row in found] == pytest.approx(logged, abs=1e-4) and len(measured) == 4
    table = capsys.readouterr().out
    assert [f"{figure:.3f}" in table for figure in logged] == [True] * 4
    again, measured = swept(monkeypatch, run, *flags)
    assert again == found and measured == []
    _, measured = swept(monkeypatch, run, *flags, "--nfe", 2, 3)
    assert [step for step, _ in measured] == [2, 4]                    # NFE 3 alone is new
    _, measured = swept(monkeypatch, run, *flags, "--seed", 1, "--nfe", 1)
    assert len(measured) == 2


def test_a_checkpoint_that_has_changed_is_measured_again(run, net, ref, monkeypatch):
    flags = ["--ref", ref, "--features", net, "--n", 70, "--nfe", 1]
    found, _ = swept(monkeypatch, run, *flags)
    checkpoint = checkpoints.read(run / "step-0000002.pt")
    checkpoint["ema"] = {name: 1.5 * w for name, w in checkpoint["ema"].items()}
    checkpoints.save(run / "step-0000002.pt", checkpoint)
    again, measured = swept(monkeypatch, run, *flags)
    assert [step for step, _ in measured] == [2] and len(again) == 3
    assert again[-1]["step"] == 2 and again[-1][NAME] != found[0][NAME]


def test_an_interrupted_sweep_keeps_its_rows(run, net, ref, monkeypatch):
    flags, honest, calls = ["--ref", ref, "--features", net, "--n", 70], evaluation.measure, []

    def stop(*inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*inputs)
    monkeypatch.setattr(evaluation, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, sweep, run, "--device", "cpu", *flags)
    monkeypatch.setattr(evaluation, "measure", honest)
    found, measured = swept(monkeypatch, run, *flags)
    assert len(found) == 4 and len(measured) == 2


def test_guidance_scales_of_a_flow_and_of_nothing_else(run, net, ref, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "flow", ["--ref", ref, "--features", net, "--n", 70, "--nfe", 2]
    call(monkeypatch, flow, *FLOW, "--steps", 3, "--lr", "1e-2", "--out", out)
    found, measured = swept(monkeypatch, out, *flags, "--w", 1, 3)
    assert measured == [(3, 1.0), (3, 3.0)] and found[0][NAME] != found[1][NAME]
    for row, w in zip(found, (1, 3)):
        assert row[NAME] == pytest.approx(figures(monkeypatch, out, net, ref, 2, 70, "--cfg", w), rel=1e-6)
    capsys.readouterr()
    assert "is one of facm.py, which is sampled without guidance" in refused(monkeypatch, capsys, sweep, run, *flags, "--w", 1, 3)


def test_two_processes_sweep_as_one(run, net, ref, tmp_path, monkeypatch):
    """The rows are the same, and the distances agree up to rounding."""
    flags = ["--ref", ref, "--features", net, "--nfe", 2, "--device", "cpu"]
    one, _ = swept(monkeypatch, run, *flags[:-2], "--n", 70)
    (run / "sweep.json").unlink()
    run_two(run, *flags, "--samples", 70, script="benchmarks/sweep.py")
    two = json.loads((run / "sweep.json").read_text())["rows"]
    assert [{**row, NAME: 0} for row in one] == [{**row, NAME: 0} for row in two]
    assert [row[NAME] for row in two] == pytest.approx([row[NAME] for row in one], rel=1e-6)


def test_the_inception_score_is_a_column_if_asked_for(run, glyphs, tmp_path, monkeypatch, capsys):
    class Scored(Small):
        def forward(self, x):
            features = self.body(x.float() / 64 - 2)
            return features, None, features[:, :5]
    network = fill(Scored())
    monkeypatch.setattr(fid, "load_extractor", lambda args, device: (network, fid.INCEPTION))
    flags = ["--ref", glyphs, "--n", 70, "--nfe", 1]
    found, measured = swept(monkeypatch, run, *flags)
    assert len(measured) == 2 and "IS" not in found[0]
    capsys.readouterr()
    found, measured = swept(monkeypatch, run, *flags, "--is")
    assert len(measured) == 2 and all(row["IS"] >= 1 for row in found[2:])
    table = capsys.readouterr().out.split("checkpoint  ")[-1]          # of the rows that have the score, not of the earlier ones
    assert "IS" in table.splitlines()[0] and len(table.splitlines()) == 3
    assert swept(monkeypatch, run, *flags, "--is")[1] == [] == swept(monkeypatch, run, *flags)[1]


@pytest.mark.parametrize("flags, words", [
    ("nowhere --ref ref.npz", "nowhere: no such run folder"), ("empty --ref ref.npz", "neither ckpt.pt nor step-*.pt"),
    ("broken --ref ref.npz", "broken/ckpt.pt is "), ("run --ref nowhere.npz --features small.pt", "nowhere.npz: there is no such file"),
    ("run --ref ref.npz --features small.pt --vae small.pt", "this network draws images"), ("run --ref ref.npz --out x.txt", "must end in .json"),
    ("run --ref ref.npz --features small.pt --out text.json", "text.json does not hold rows"), ("run --ref ref.npz --n 1", "--n"),
    ("run --ref ref.npz --is --features small.pt", "--is and --inception"), ("run --ref ref.npz --cfg-interval 0 1", "--cfg-interval"), ("run --ref ref.npz --nfe 0", "--nfe 0")])
def test_mistakes_of_a_sweep_end_in_one_line(watched, net, ref, monkeypatch, capsys, flags, words):
    shutil.copytree(watched, "run")
    shutil.copy(net, "small.pt")
    shutil.copy(ref, "ref.npz")
    pathlib.Path("empty").mkdir()
    pathlib.Path("broken").mkdir()
    pathlib.Path("broken/ckpt.pt").write_text("no checkpoint")
    pathlib.Path("text.json").write_text("[1]")
    assert words in refused(monkeypatch, capsys, sweep, *flags.split(), "--device", "cpu")


# Curves and TensorBoard

def test_curves_of_a_log_with_lines_of_all_kinds(tmp_path):
    """The log has losses, figures from two numbers of samples, changed flags, and an incomplete line."""
    lines = [dict(step=1, L_fm=2.0, grad_norm=1.0), dict(step=2, L_fm=1.0, skipped=1),
             dict(step=2, fid={"NFE 1": 9.0, "NFE 2": 5.0}, eval_n=50), dict(step=2, changed=dict(lr=[1e-4, 5e-5], clip=[1.0, 0.5])),
             dict(step=3, L_fm=0.5, grad_norm=3.0), dict(step=4, fid={"NFE 2": 4.0}, eval_n=50), dict(step=6, fid={}, eval_n=50),
             dict(step=6, fid={"NFE 1": 3.0}, eval_n=5000), dict(step=8, fd={"NFE 1": 7.5}, eval_n=50, features="dinov2.pt")]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "fid"')
    assert curves.curves_of_log(tmp_path / "run", 1) == dict(L_fm=("run", [1, 2, 3], [2, 1, 0.5]), grad_norm=("run", [1, 3], [1, 3]))
    assert curves.curves_of_fid(tmp_path / "run") == {
        "FID": [("run, NFE 1, 50 samples", (2,), (9.0,)), ("run, NFE 2, 50 samples", (2, 4), (5.0, 4.0)),
                ("run, NFE 1, 5,000 samples", (6,), (3.0,))],
        "Frechet distance": [("run, NFE 1, 50 samples", (8,), (7.5,))]}
    assert curves.changes_of(tmp_path / "run") == [(2, "lr 5e-05, clip 0.5")]


def test_curves_are_drawn(watched, asked, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    shutil.copytree(watched, tmp_path / "run")
    call(monkeypatch, facm, *STEADY, *SCRATCH, *asked, "--steps", 5, "--lr", "1e-4", "--out", tmp_path / "run")
    call(monkeypatch, curves, tmp_path / "run", "--out", tmp_path / "curves.png")
    width, height = Image.open(tmp_path / "curves.png").size
    assert width == 4 * 4 * 80 and height == 256                       # L_fm, L_cm, grad_norm, Frechet distance


def test_the_sweep_is_drawn(run, net, ref, monkeypatch):
    pytest.importorskip("matplotlib")
    swept(monkeypatch, run, "--ref", ref, "--features", net, "--n", 70)
    assert Image.open(run / "sweep.png").size == (500, 360)


def scalars(folder):
    """Returns {tag: [(step, value), ...]} of the events in a folder, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_has(asked, tmp_path, monkeypatch):
    """This also holds after a run resumes from an older checkpoint with another learning rate."""
    pytest.importorskip("tensorboard")
    out, command = tmp_path / "run", [*FLOW, *asked, "--eval-nfe", 3, "--save-every", 2, "--tensorboard", "--out", tmp_path / "run"]
    call(monkeypatch, flow, *command, "--steps", 2)
    old = (out / "ckpt.pt").read_bytes()
    call(monkeypatch, flow, *command, "--steps", 4)
    (out / "ckpt.pt").write_bytes(old)
    call(monkeypatch, flow, *command, "--steps", 4, "--lr", "1e-4")
    shown = scalars(out / "tensorboard")
    trained = [row for row in rows(out) if "L_fm" in row]
    assert shown["L_fm"] == [(row["step"], pytest.approx(row["L_fm"], rel=1e-6)) for row in trained] and len(trained) == 4
    assert shown["fd/NFE 3"] == [(row["step"], pytest.approx(row["fd"]["NFE 3"], rel=1e-6)) for row in evaluations(out)]
    assert set(shown) == {"L_fm", "grad_norm", "images_per_s", "fd/NFE 3", "eval_n"}


def test_without_the_package_tensorboard_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    monkeypatch.setattr(sys, "path", [])                               # so that it cannot be found
    line = refused(monkeypatch, capsys, flow, *FLOW, "--tensorboard", "--out", tmp_path / "run")
    assert line.endswith("pip install tensorboard") and not (tmp_path / "run").exists()
