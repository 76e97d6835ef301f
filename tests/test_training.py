"""Tests of whole training runs: resuming, killed runs, several processes and failures. Most of them train a small
network on 12x12 glyphs."""

import copy
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_data import NAMES, PIXELS, small_vae, write_images, write_shards

import baselines
import data
import decm
import facm
import flow
import gcm
import models
import sample
from common import checkpoints, processes, seeds
from common.ema import gamma_of
from common.messages import say_once
from common.run import Run

TINY = ["--device", "cpu", "--resolution", "12", "--net", "width=8", "mult=1,1", "blocks=1", "dropout=0.2",
        "--batch", "8", "--warmup", "2", "--lr-final", "1", "--log-every", "1",
        "--preview-every", "1000", "--jvp", "exact"]
FLOW = TINY[:-2]                           # for flow.py, which needs no derivative
SCRATCH = ["--teacher", "none", "--w", "1"]


def call(monkeypatch, module, *argv):
    """Calls module.main() in this process and restores the signal handlers afterwards."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    try:
        module.main()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def popen(*argv, script="facm.py", **env):
    return subprocess.Popen([sys.executable, "-W", "ignore", str(ROOT / script), *map(str, argv)],
                            env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def popen_two(*argv, script):
    """Starts the script in two processes, as torchrun does, but without the seconds that torchrun itself takes."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    return [popen(*argv, script=script, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port, OMP_NUM_THREADS="1") for rank in ("0", "1")]


def run_two(*argv, script="facm.py"):
    """Runs the script in two processes to its end, and asserts that both succeed."""
    for process in popen_two(*argv, script=script):
        said = process.communicate()[1]
        assert process.returncode == 0, said


def torchrun(*argv, script="facm.py"):
    """Runs the script in two processes by torchrun, as a user does."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(ROOT / script), *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rows(out):
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def learning_rates(monkeypatch, optimizer):
    """Returns a list to which every step of an optimiser of this class appends its learning rate."""
    rates, honest = [], optimizer.step

    def step(self, *inputs):
        rates.append(self.param_groups[0]["lr"])
        return honest(self, *inputs)
    monkeypatch.setattr(optimizer, "step", step)
    return rates


def wait_for_step(process, out, step):
    for _ in range(6000):
        if any(row["step"] >= step for row in rows(out)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


def kill_and_rerun(*command, step, out, script="facm.py"):
    """Kills the run in `out` by kill -9 at that step or shortly after, then runs the same command again to its end."""
    process = popen(*command, script=script)
    wait_for_step(process, out, step)
    process.kill()
    process.communicate()
    again = popen(*command, script=script)
    assert again.wait() == 0, again.communicate()[1]
    again.communicate()


def same(a, b):
    """Whether two nested dicts or lists of tensors and plain values are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(a, b):
    x, y = (checkpoints.read(out / "ckpt.pt") for out in (a, b))
    for part in ("model", "ema", "optimizer", "step"):
        assert same(x[part], y[part]), part
    timeless = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in rows(out)] for out in (a, b)]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher):
    """The folder of an uninterrupted run of facm.py with 6 steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, facm, *TINY, "--teacher", teacher, "--steps", 6, "--save-every", 4, "--out", out)
    return out


def test_a_run_leaves_what_it_promises(finished, teacher):
    for out, method, figures in ((teacher.parent, "flow", {"L_fm"}), (finished, "facm", {"L_fm", "L_cm"})):
        assert [row["step"] for row in rows(out)] == list(range(1, 7))
        assert all(set(row) == {"step", "grad_norm", "images_per_s", *figures} for row in rows(out))
        checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
        assert set(checkpoint) == {"method", "args", "step", "model", "ema", "optimizer", "torch_version"}
        assert (checkpoint["method"], checkpoint["step"]) == (method, 6)
        assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl", "previews"}
        assert {p.name for p in (out / "previews").iterdir()} == {"0000006.png"}


@pytest.mark.parametrize("script", ["flow.py", "facm.py"])
def test_kill_9_and_rerun_is_the_uninterrupted_run(finished, teacher, tmp_path, script):
    """A run is killed at a random step, and the same command is run again. It saves a checkpoint every 4 steps."""
    command = [*FLOW, "--steps", 6, "--save-every", 4, "--out", tmp_path / "run"]
    if script == "facm.py":
        command += ["--jvp", "exact", "--teacher", teacher]
    kill_and_rerun(*command, step=random.randint(1, 5), out=tmp_path / "run", script=script)
    assert_same_run(finished if script == "facm.py" else teacher.parent, tmp_path / "run")


def test_resume_is_exact_from_every_step(finished, teacher, tmp_path, monkeypatch):
    """A run stops after every step and resumes with a larger --steps. The weights are equal to the last bit."""
    for steps in range(1, 7):
        call(monkeypatch, facm, *TINY, "--teacher", teacher, "--steps", steps, "--save-every", 4, "--out", tmp_path / "run")
    assert_same_run(finished, tmp_path / "run")


# The teacher of a student

def test_without_a_teacher_the_default_one_is_trained_first(finished, teacher, tmp_path, monkeypatch, capsys):
    """Without --teacher, facm.py trains the teacher as flow.py does, and then the student, equal to the last bit."""
    monkeypatch.setitem(flow.PRESETS, "glyphs", flow.PRESETS["glyphs"] | dict(steps=6, batch=8, warmup=2, lr_final=1.0))
    say_once.cache_clear()
    command = [*TINY, "--steps", 6, "--save-every", 4, "--out", tmp_path / "run"]
    call(monkeypatch, facm, *command)
    said = capsys.readouterr().err
    assert said.count("the teacher, runs/flow-glyphs/ckpt.pt, is not finished: it is trained first, as by flow.py") == 1
    a, b = checkpoints.read("runs/flow-glyphs/ckpt.pt"), checkpoints.read(teacher)
    assert all(same(a[part], b[part]) for part in ("model", "ema", "step"))
    a, b = checkpoints.read(tmp_path / "run/ckpt.pt"), checkpoints.read(finished / "ckpt.pt")
    assert all(same(a[part], b[part]) for part in ("model", "ema", "step"))
    before = pathlib.Path("runs/flow-glyphs/ckpt.pt").read_bytes()
    call(monkeypatch, decm, *TINY, "--steps", 1, "--out", tmp_path / "decm")       # the teacher exists already
    assert pathlib.Path("runs/flow-glyphs/ckpt.pt").read_bytes() == before
    assert "trained first" not in capsys.readouterr().err


def test_an_unfinished_default_teacher_is_resumed_with_its_own_flags(finished, teacher, tmp_path, monkeypatch):
    """flow.py was stopped after 2 of 6 steps. facm.py resumes it with the flags of that run, not with its own."""
    folder = pathlib.Path("runs/flow-glyphs")
    draw = data.Dataset.batch

    def stop_in_the_second_step(dataset, seed, first, *rest):
        if first == 8:
            signal.raise_signal(signal.SIGTERM)
        return draw(dataset, seed, first, *rest)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(data.Dataset, "batch", stop_in_the_second_step)
        call(patch, flow, *FLOW, "--steps", 6, "--save-every", 4)
    assert checkpoints.read(folder / "ckpt.pt")["step"] == 2
    call(monkeypatch, facm, *TINY, "--steps", 6, "--save-every", 4, "--out", tmp_path / "run")
    a, b = checkpoints.read(folder / "ckpt.pt"), checkpoints.read(teacher)
    assert all(same(a[part], b[part]) for part in ("model", "ema", "step"))
    a, b = checkpoints.read(tmp_path / "run/ckpt.pt"), checkpoints.read(finished / "ckpt.pt")
    assert all(same(a[part], b[part]) for part in ("model", "ema", "step"))


def test_an_unfinished_teacher_is_not_used_silently(teacher, tmp_path, monkeypatch, capsys):
    checkpoint = checkpoints.read(teacher)
    checkpoint["args"]["steps"] = 100
    checkpoints.save(tmp_path / "half.pt", checkpoint)
    say_once.cache_clear()
    call(monkeypatch, facm, *TINY, "--teacher", tmp_path / "half.pt", "--steps", 1, "--out", tmp_path / "run")
    assert "half.pt, is not finished: it has 6 of 100 steps" in capsys.readouterr().err


def test_two_runs_that_need_one_teacher_do_not_both_train_it(tmp_path, monkeypatch, capsys):
    first = popen(*TINY, "--out", tmp_path / "first")                  # its teacher has 2,000 steps
    wait_for_step(first, pathlib.Path("runs/flow-glyphs"), 1)
    said = refused(monkeypatch, capsys, decm, *TINY, "--out", tmp_path / "second")
    assert f"runs/flow-glyphs belongs to a running program, process {first.pid} on " in said
    assert not (tmp_path / "second/ckpt.pt").exists()
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    first.communicate()
    held = checkpoints.read("runs/flow-glyphs/ckpt.pt")
    assert held["step"] == rows(pathlib.Path("runs/flow-glyphs"))[-1]["step"]
    assert not list(pathlib.Path("runs").glob("**/.owner")) and not (tmp_path / "first/.owner").exists()


def test_a_default_teacher_of_other_data_is_refused(teacher, tmp_path, monkeypatch, capsys):
    checkpoint = checkpoints.read(teacher)
    checkpoint["args"]["samples"] = "7 (fingerprint of others)"
    pathlib.Path("runs/flow-glyphs").mkdir(parents=True)
    checkpoints.save(pathlib.Path("runs/flow-glyphs/ckpt.pt"), checkpoint)
    assert "was trained on other data, 7 (" in refused(monkeypatch, capsys, facm, *TINY, "--out", tmp_path / "run")


def test_a_run_is_not_resumed_with_another_teacher(finished, teacher, tmp_path, monkeypatch, capsys):
    """A file with the same name but other weights is refused, and the same file under another name is accepted."""
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = checkpoints.read(teacher)
    checkpoint["ema"]["map_layer0.weight"] = checkpoint["ema"]["map_layer0.weight"] + 1
    checkpoints.save(tmp_path / "ckpt.pt", checkpoint)
    command = [*TINY, "--steps", 7, "--save-every", 4, "--out", tmp_path / "run"]
    assert "was begun with teacher_id" in refused(monkeypatch, capsys, facm, *command, "--teacher", tmp_path / "ckpt.pt")
    shutil.copy(teacher, tmp_path / "moved.pt")                        # another name with the same content
    call(monkeypatch, facm, *command, "--teacher", tmp_path / "moved.pt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_exits(tmp_path, number):
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)             # nohup makes all children ignore it
    process = popen(*FLOW, "--steps", 10_000, "--save-every", 10_000, "--out", tmp_path / "run", script="flow.py")
    signal.signal(signal.SIGHUP, handler)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(number)
    assert process.wait() == 128 + number
    process.communicate()
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == rows(tmp_path / "run")[-1]["step"]


def perturb(monkeypatch):
    """Makes networks start without zero weights, so that all of their weights affect the gradient."""
    create = models.create

    def perturbed(**options):
        net, g = create(**options), torch.Generator().manual_seed(0)
        for p in net.parameters():
            p.data.add_(0.02 * torch.randn(p.shape, generator=g))
        return net
    monkeypatch.setattr(models, "create", perturbed)


def first_gradient(out):
    """The (clipped) gradient of step 1, from AdamW's first moment: exp_avg = (1 - beta_1) gradient."""
    state = checkpoints.read(out / "ckpt.pt")["optimizer"]["state"]
    return torch.cat([entry["exp_avg"].flatten() / 0.1 for entry in state.values()])


@pytest.mark.parametrize("module", [flow, facm], ids=lambda m: m.__name__)
def test_processes_and_micro_batches_give_the_gradient_of_one_process(tmp_path, monkeypatch, module):
    common = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in FLOW] + ["--steps", 1]
    common += ["--teacher", "none"] if module is facm else []
    call(monkeypatch, module, *common, "--out", tmp_path / "one")
    call(monkeypatch, module, *common, "--out", tmp_path / "pieces", "--micro-batch", 3)
    run_two(*common, "--out", tmp_path / "two", "--micro-batch", 2, script=f"{module.__name__}.py")
    one, (line,) = first_gradient(tmp_path / "one"), rows(tmp_path / "one")
    for other in ("pieces", "two"):
        assert (first_gradient(tmp_path / other) - one).abs().max() < 1e-5 * one.abs().max(), other
        assert {**rows(tmp_path / other)[0], "images_per_s": 0} == pytest.approx({**line, "images_per_s": 0}, abs=5e-6)
    assert one.abs().max() > 0


def test_a_process_that_is_done_waits_for_the_others(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text("""if True:
        import time
        from common import processes
        _, rank, _ = processes.start("cpu")
        time.sleep(0 if rank else 1)
        done = time.time()
        processes.end()
        print(done, time.time())""")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said = [process.communicate()[0] for process in popen_two(script=tmp_path / "late.py")]
    (late, _), (early, left) = (map(float, one.split()) for one in said)
    assert early < late < left


@pytest.mark.parametrize("script, flags, updates", [
    (flow, [], 2), (facm, SCRATCH, 2), (decm, [*SCRATCH, "--freq", 2], 3), (baselines, SCRATCH, 2), (gcm, [], 2)],
    ids=["flow", "facm", "decm", "baselines", "gcm"])
def test_micro_batches_are_averaged_over_the_processes_once_an_update(tmp_path, monkeypatch, script, flags, updates):
    """DDP averages once per update, not once per micro-batch. One process stands in for the first of two."""
    averaged = []

    def hook(state, bucket):
        averaged.append(bucket)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    class Counted(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_comm_hook(None, hook)

    monkeypatch.setattr(script, "DistributedDataParallel", Counted)
    monkeypatch.setattr(processes, "start", lambda *_: (torch.device("cpu"), 0, 2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    call(monkeypatch, script, *TINY[:11], "--micro-batch", 1, *flags, "--steps", 2, "--out", tmp_path / "run")
    assert len(averaged) == updates


@pytest.mark.parametrize("script, flags", [
    (facm, "--teacher none --w 1 --condition auxiliary"), (decm, "--teacher none --w 1"),
    (gcm, "--optimizer AdamW --betas 0.9 0.99")], ids=["facm", "decm", "gcm"])
def test_compiled_under_ddp_the_fused_gradient_is_the_eager_one(tmp_path, monkeypatch, script, flags):
    """The model has several DDP buckets. If Dynamo split the graph at their borders, gradients would be lost."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager"))

    class Buckets(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *args, **options):
            super().__init__(*args, bucket_cap_mb=1.5, **options)

    monkeypatch.setattr(script, "DistributedDataParallel", Buckets)
    monkeypatch.setattr(processes, "start", lambda device, *options: (
        processes.set_globals(torch.device("cpu"), *options), (torch.device("cpu"), 0, 2))[1])
    flags = [*flags.split(), *"--device cpu --resolution 12 --batch 4 --steps 1 --warmup 0 --jvp fused".split(),
             *"--net name=DiT patch=2 width=192 depth=2 heads=4".split()]
    perturb(monkeypatch)
    for name, more in ("eager", []), ("compiled", ["--compile"]):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/{name}.store", rank=0, world_size=1)
        call(monkeypatch, script, *flags, *more, "--out", tmp_path / name)
    eager, compiled = (first_gradient(tmp_path / name) for name in ("eager", "compiled"))
    assert (compiled - eager).norm() < 1e-4 * eager.norm()


def test_shards_give_the_gradient_and_checkpoints_of_one_process(teacher, tmp_path, monkeypatch):
    """A run with --fsdp in two processes resumes in one process, and again in two. The gradients are those of one."""
    common = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in TINY] + ["--jvp", "fused", "--teacher", teacher]
    one, two = tmp_path / "one", tmp_path / "two"
    for number, flags in enumerate((["--steps", 1], ["--steps", 2], ["--steps", 3, "--micro-batch", 2])):
        call(monkeypatch, facm, *common, *flags, "--out", one)
        if number == 1:
            call(monkeypatch, facm, *common, *flags, "--out", two)
        else:
            run_two(*common, *flags, "--fsdp", "--out", two)
        a, b = first_gradient(one), first_gradient(two)
        assert (a - b).abs().max() < 1e-5 * a.abs().max() > 0, number
        a, b = (checkpoints.read(out / "ckpt.pt") for out in (one, two))
        assert a["optimizer"].keys() == b["optimizer"].keys() and a["model"].keys() == b["model"].keys()
        for part in ("model", "ema"):
            # Adam's first steps are lr times the gradient's sign, so rounding near 0 may move a weight by lr.
            assert max((a[part][k] - b[part][k]).abs().max() for k in a[part]) < 2e-4, (number, part)


def test_sharded_a_run_goes_from_its_teacher_to_the_method(tmp_path, monkeypatch):
    """A run with --fsdp first resumes the unfinished default teacher, and then trains the student, both sharded."""
    common = ["dropout=0.0" if flag == "dropout=0.2" else flag for flag in FLOW]
    call(monkeypatch, flow, *common, "--steps", 1, "--out", tmp_path / "flow")
    run_two(*common, "--steps", 2, "--save-every", 1, "--out", "runs/flow-glyphs", script="flow.py")
    checkpoint = checkpoints.read("runs/flow-glyphs/ckpt.pt")          # as if it had stopped after one step
    one = checkpoints.read(tmp_path / "flow/ckpt.pt")
    checkpoints.save(pathlib.Path("runs/flow-glyphs/ckpt.pt"), one | dict(args=checkpoint["args"]))
    run_two(*common, "--jvp", "fused", "--steps", 1, "--fsdp", "--out", tmp_path / "two")
    assert checkpoints.read("runs/flow-glyphs/ckpt.pt")["step"] == 2
    assert [row["L_cm"] for row in rows(tmp_path / "two")][-1] > 0


def test_a_resumed_optimizer_pairs_state_and_parameter_whatever_their_layout():
    """The state of a channels-last weight may be saved as contiguous, as by FSDP. The next step is the same."""
    def steps(state=None):
        weight = torch.nn.Parameter(torch.arange(36.0).reshape(1, 4, 3, 3).to(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for k in range(2):
            if k == 1 and state:
                checkpoints.load_optimizer(optimizer, state)
            weight.grad = torch.cos(weight.detach() + k)
            optimizer.step()
            if k == 0:
                saved = copy.deepcopy(optimizer.state_dict())
        return weight.detach(), saved
    whole, saved = steps()
    saved["state"][0] = {k: a.contiguous() for k, a in saved["state"][0].items()}
    assert torch.equal(steps(saved)[0], whole)


@pytest.mark.parametrize("flags", [[], ["--condition", "auxiliary", "--precision", "bf16"]], ids=str)
def test_fused_and_exact_train_alike(tmp_path, monkeypatch, flags):
    """The two ways to compute dF/dt give the same gradient in training from scratch with guidance and dropout."""
    perturb(monkeypatch)
    for jvp in ("fused", "exact"):
        call(monkeypatch, facm, *TINY, "--teacher", "none", "--steps", 1, *flags, "--jvp", jvp, "--out", tmp_path / jvp)
    a, b = (first_gradient(tmp_path / jvp) for jvp in ("fused", "exact"))
    assert (a - b).abs().max() < (0.02 if "bf16" in flags else 1e-5) * b.abs().max() > 0


def break_losses(monkeypatch, broken):
    """Makes facm.norm_l2 return NaN in these steps of a run. Returns a list with one entry per call."""
    honest, calls = facm.norm_l2, []

    def norm_l2(F_cm, v_tar, c):
        calls.append(1)
        return honest(F_cm, v_tar, c) * (float("nan") if len(calls) - 1 in broken else 1)
    monkeypatch.setattr(facm, "norm_l2", norm_l2)
    return calls


def test_a_step_that_is_not_finite_is_skipped_and_counted(teacher, tmp_path, monkeypatch, capsys):
    """A step with NaN does not change the weights or their average. The log counts it, and has only finite numbers."""
    command = [*TINY, "--teacher", teacher, "--save-every", 1]
    for steps in (1, 2):
        break_losses(monkeypatch, {1})
        call(monkeypatch, facm, *command, "--steps", steps, "--out", tmp_path / str(steps))
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    a, b = (checkpoints.read(tmp_path / str(steps) / "ckpt.pt") for steps in (1, 2))
    assert all(same(a[part], b[part]) for part in ("model", "ema")) and (a["step"], b["step"]) == (1, 2)
    capsys.readouterr()
    break_losses(monkeypatch, {1, 3})
    call(monkeypatch, facm, *command, "--steps", 6, "--log-every", 3, "--save-every", 3, "--out", tmp_path / "run")
    assert "step 1 is skipped, it is not finite: L_fm 0." in capsys.readouterr().err
    assert [row.get("skipped") for row in rows(tmp_path / "run")] == [1, 1]
    assert all(np.isfinite(list(row.values())).all() for row in rows(tmp_path / "run"))
    assert all(v.isfinite().all() for v in checkpoints.read(tmp_path / "run/ckpt.pt")["model"].values())


def test_many_steps_in_a_row_that_are_not_finite_end_the_run(teacher, tmp_path, monkeypatch, capsys):
    """Twenty steps with NaN in a row end the run, but nineteen do not. The same command then resumes it."""
    command = [*TINY, "--teacher", teacher, "--steps", 50, "--save-every", 4, "--log-every", 100, "--out", tmp_path / "run"]
    break_losses(monkeypatch, {*range(2, 21), *range(22, 42)})
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, facm, *command)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert re.search(r"^error: 20 steps in a row were not finite, the last is step 41: L_fm 0\.\d+, L_cm nan, grad_norm nan;",
                     said, re.MULTILINE), said
    kept = checkpoints.read(tmp_path / "run/ckpt.pt")
    assert kept["step"] == 40 and all(v.isfinite().all() for v in kept["model"].values())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, facm, *command)
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 50


@pytest.mark.parametrize("flags", [
    ["--condition", "auxiliary"], ["--jvp", "fd"], ["--anchor", "0"], ["--precision", "bf16", "--batch", "2"], ["--alpha", "cos", "--beta", "1"],
    ["--w", "1"], ["--w", "1", "--net", "width=8", "mult=1,1", "blocks=1", "dropout=0.2", "num_classes=0"]], ids=str)
def test_every_option_trains(tmp_path, monkeypatch, flags):
    flow_flags = flags[flags.index("--net"):] if "--net" in flags else []
    call(monkeypatch, flow, *FLOW, *flow_flags, "--steps", 2, "--out", tmp_path / "flow")
    call(monkeypatch, facm, *TINY, *flags, "--teacher", tmp_path / "flow", "--steps", 2, "--out", tmp_path / "run")
    assert all(0 < row["grad_norm"] < np.inf for row in rows(tmp_path / "run"))


@pytest.mark.parametrize("condition", ["expanded", "auxiliary"])
def test_distils_a_given_teacher(teacher, tmp_path, monkeypatch, condition):
    """The student starts with the teacher's weights, even if it has a second time and the teacher does not."""
    out = tmp_path / "run"
    call(monkeypatch, facm, *TINY, "--teacher", teacher, "--condition", condition, "--steps", 1, "--lr", "1e-12", "--out", out)
    student, weights = checkpoints.read(out / "ckpt.pt"), checkpoints.read(teacher)
    assert all(torch.allclose(student["model"][k], v, atol=1e-6) for k, v in weights["ema"].items())
    assert not torch.equal(weights["model"]["map_layer0.weight"], weights["ema"]["map_layer0.weight"])
    assert any(k.startswith("map_second") for k in student["model"]) == (condition == "auxiliary")


@pytest.mark.parametrize("options, condition", [
    (dict(name="LightningDiT", second_time=True), "auxiliary"), (dict(name="LightningDiT"), "expanded"),
    (dict(name="DiT", learn_sigma=True, heads=4, prediction="noise"), "auxiliary")], ids=str)
def test_distils_a_public_checkpoint(tmp_path, monkeypatch, capsys, options, condition):
    """The teacher is a file of weights in the layout of LightningDiT, FACM's release, or facebookresearch/DiT."""
    size = dict(patch=4, width=32, depth=1, heads=4)
    net = models.create(**(dict(input_size=12, in_channels=3, num_classes=10) | size | options))
    torch.save(dict(model={"module." + k: v for k, v in net.state_dict().items()}), tmp_path / "public.pt")
    flags = [f"{k}={v}" for k, v in (size | options).items() if k != "second_time"]
    command = [*TINY, "--net", *flags, "--teacher", tmp_path / "public.pt", "--steps", 2, "--out", tmp_path / "run"]
    call(monkeypatch, facm, *command, "--condition", condition, "--lr", "1e-12")
    student = checkpoints.read(tmp_path / "run/ckpt.pt")["model"]
    assert all(torch.allclose(student[k], v, atol=1e-6) for k, v in net.state_dict().items())
    if options.get("prediction"):
        capsys.readouterr()
        assert "auxiliary" in refused(monkeypatch, capsys, facm, *command, "--fresh")


@pytest.mark.parametrize("given", ["time_scale=8.0", "sigma_data=0.6", "width=8", "pixelnorm=False"])
def test_a_network_other_than_the_teachers_is_refused(teacher, tmp_path, monkeypatch, capsys, given):
    """--net is refused even if names and shapes fit, because the student would not start as its teacher."""
    command = [*TINY, "--teacher", teacher, "--out", tmp_path / "run"]
    other = given.replace("8.0", "4.0").replace("0.6", "0.3").replace("False", "True").replace("8", "16")
    command.insert(command.index("dropout=0.2") + 1, other)
    line = refused(monkeypatch, capsys, facm, *command)
    assert f"--net {other}" in line and f"ckpt.pt has a network with {given}" in line


def test_a_students_network_is_the_teachers(tmp_path, monkeypatch):
    """The student takes its width from the teacher's file, not from the preset. Its dropout is set by --net."""
    call(monkeypatch, flow, *FLOW, "--steps", 1, "--out", tmp_path / "flow")
    command = [flag for flag in TINY if flag not in ("--net", "width=8", "mult=1,1", "blocks=1", "dropout=0.2")]
    call(monkeypatch, facm, *command, "--teacher", tmp_path / "flow", "--steps", 1, "--net", "dropout=0.1", "--out", tmp_path / "run")
    net = checkpoints.read(tmp_path / "run/ckpt.pt")["args"]["net"]
    assert (net["width"], net["mult"], net["dropout"]) == (8, (1, 1), 0.1)


DATA = ["--device", "cpu", "--batch", 4, "--teacher", "none", "--w", 1, "--steps", 2, "--warmup", 1, "--jvp", "fd"]
UNET = ["--net", "width=8", "mult=1,1", "blocks=1", "attention=()"]


def test_trains_on_latents(tmp_path, monkeypatch):
    write_shards(tmp_path / "z")
    call(monkeypatch, facm, *DATA, "--data", "imagenet_latents", "--data-dir", tmp_path / "z", "--out", tmp_path / "run",
         "--net", "name=LightningDiT", "patch=1", "width=32", "depth=1", "heads=4", "qknorm=True")
    net = checkpoints.read(tmp_path / "run/ckpt.pt")["args"]["net"]
    assert (net["input_size"], net["in_channels"], net["num_classes"]) == (4, 4, 6)
    assert rows(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_trains_on_images_of_ones_own(tmp_path, monkeypatch, capsys, kind):
    path = write_images(tmp_path / "set", NAMES)
    if kind == "npz":
        path = tmp_path / "set.npz"
        np.savez(path, images=PIXELS)
    command = [*DATA, "--data", path, "--resolution", 8, *UNET, "--out", tmp_path / "run"]
    call(monkeypatch, facm, *command, "--preset", "cifar10")           # unconditional, w = 1
    args = checkpoints.read(tmp_path / "run/ckpt.pt")["args"]
    assert args["net"]["num_classes"] == 0 and args["net"]["dropout"] == 0.1 and args["P_mean"] == -1.0
    capsys.readouterr()
    assert "--preset" in refused(monkeypatch, capsys, facm, *command)


def test_an_image_that_disappears_ends_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    path, calls = write_images(tmp_path / "set", NAMES), []
    honest = data.Files.items

    def items(self, index, flip):
        calls.append(1)
        if len(calls) == 4:
            shutil.rmtree(path / "eel")
            (path / "cat/1.png").unlink()
            (path / "dog/0.png").unlink()
        return honest(self, index, flip)
    monkeypatch.setattr(data.Files, "items", items)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, facm, *DATA, "--data", path, "--preset", "cifar10", "--resolution", 8, *UNET,
             "--steps", 20, "--save-every", 1, "--out", tmp_path / "run")
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: step 3: ") and "not a readable image" in line
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 3


@pytest.mark.parametrize("module, flags", [(flow, []), (facm, SCRATCH), (decm, [*SCRATCH, "--objectives", "fm", "cd"]),
                                           (baselines, SCRATCH), (gcm, ["--optimizer", "AdamW"])],
                         ids=lambda a: getattr(a, "__name__", ""))
def test_the_learning_rate_rises_and_falls(tmp_path, monkeypatch, capsys, module, flags):
    rates = learning_rates(monkeypatch, torch.optim.AdamW)
    command = [*FLOW, *flags, "--warmup", 2, "--lr", 2, "--lr-final", 0.5, "--out", tmp_path / "run"]
    call(monkeypatch, module, *command, "--steps", 4)
    assert rates == [1.0, 1.75, 1.5, 1.25]
    capsys.readouterr()
    assert "steps" in refused(monkeypatch, capsys, module, *command, "--steps", 5)   # it would change the schedule


def test_fresh_keeps_the_old_run(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    command = [*FLOW, "--steps", 1, "--out", out, "--fresh"]
    for _ in range(3):
        call(monkeypatch, flow, *command)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
    assert "run.old-2" in capsys.readouterr().out
    assert (tmp_path / "run.old-1" / "ckpt.pt").exists()


def test_fresh_on_a_link_keeps_the_link(tmp_path, monkeypatch):
    """If --out is a link, for example to another disk, the old and the new run are both where it points to."""
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/run")
    for _ in range(2):
        call(monkeypatch, flow, *FLOW, "--steps", 1, "--fresh", "--out", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["run", "run.old-1"]
    assert all((tmp_path / "disk" / name / "ckpt.pt").exists() for name in ("run", "run.old-1"))
    assert not list(tmp_path.rglob(".owner"))


def refused(monkeypatch, capsys, module, *argv):
    """Asserts that the program ends with exit code 2 and one error line, and returns that line."""
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, module, *argv)
    captured = capsys.readouterr()
    assert end.value.code == 2
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.mark.parametrize("flags, words", [
    (["--data", "cifar"], "--data cifar: there is no such file or folder, and it is not one of glyphs, "),
    (["--data", "imagenet64.zip"], "--data imagenet64.zip: there is no such file or folder"),
    (["--data", "imagenet64.zip", "--preset", "glyphs"], "imagenet64.zip: there is no such file or folder; the data sets are glyphs, "),
    (["--resolution", "15"], "divisible"),
    (["--resolution", "4"], "legible"),
    (["--micro-batch", "0"], "--micro-batch 0"),
    (["--batch", "0"], "at least 1"),
    (["--steps", "-1"], "--steps -1: expected a finite number, at least 1"),
    (["--steps", "0"], "--steps 0: expected a finite number, at least 1"),
    (["--steps", "many"], "--steps"),
    (["--learning-rate", "1"], "--learning-rate"),
    (["--net", "width"], "KEY=VALUE"),
    (["--net", "depth=3"], "depth"),
    (["--net", "name='UNet'"], "UNet"),
    (["--teacher", "nowhere.pt"], "nowhere.pt"),
    (["--device", "cuda"], "CUDA"),
    (["--device", "gpu"], "gpu"),
    (["--w", "2", "--net", "num_classes=0"], "--w"),
    (["--fsdp"], "torchrun"),
    (["--net", "pixelnorm=True", "adaptive_scale=False"], "adaptive_scale"),
])
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, capsys, flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert words in refused(monkeypatch, capsys, facm, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "ckpt.pt").exists() and not pathlib.Path("runs/flow-glyphs/ckpt.pt").exists()


@pytest.mark.parametrize("flags, words", [
    (["--betas", "0.5", "0.9"], "betas"),
    (["--net", "width=16", "mult=1,1", "blocks=1", "dropout=0.2"], "net"),
    (["--resolution", "16"], "resolution"),
    (["--batch", "4"], "batch"),
])
def test_another_run_in_the_same_place_is_refused(teacher, monkeypatch, capsys, flags, words):
    finished = teacher.parent
    before = (finished / "ckpt.pt").read_bytes()
    line = refused(monkeypatch, capsys, flow, *FLOW, "--steps", 6, "--out", finished, *flags)
    assert words in line and "--fresh" in line
    assert (finished / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "foreign", "text", "other method", "other shape"])
def test_damaged_checkpoints_end_in_one_line(finished, teacher, tmp_path, monkeypatch, capsys, damage):
    path = tmp_path / "run" / "ckpt.pt"
    path.parent.mkdir()
    good = (finished / "ckpt.pt").read_bytes()
    checkpoint = checkpoints.read(finished / "ckpt.pt")
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save({"state_dict": checkpoint["model"]}, path)
    elif damage == "other method":
        torch.save(checkpoint | {"method": "gcm"}, path)
    else:
        checkpoint["ema"]["map_layer0.weight"] = torch.zeros(1)
        torch.save(checkpoint, path)
    before = path.read_bytes()
    flags = [*TINY, "--teacher", teacher, "--steps", 6, "--out", path.parent]
    assert re.search("ckpt.pt|gcm", refused(monkeypatch, capsys, facm, *flags))
    assert re.search("ckpt.pt|gcm", refused(monkeypatch, capsys, sample, "--ckpt", path, "--out", tmp_path / "x.png"))
    assert path.read_bytes() == before and not (tmp_path / "x.png").exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))
    torch.save({"method": Evil()}, tmp_path / "evil.pt")
    refused(monkeypatch, capsys, sample, "--ckpt", tmp_path / "evil.pt", "--out", tmp_path / "x.png")
    assert not (tmp_path / "touched").exists()


@pytest.mark.cuda
@pytest.mark.parametrize("flags", [
    [], ["--precision", "bf16"], ["--precision", "bf16", "--compile"], ["--jvp", "fused", "--precision", "bf16", "--compile", "--grad-checkpoint"]], ids=str)
def test_trains_on_cuda(tmp_path, monkeypatch, flags):
    on_gpu = ["cuda" if flag == "cpu" else flag for flag in FLOW]
    call(monkeypatch, flow, *on_gpu, *(flags[2:] if "--jvp" in flags else flags), "--steps", 3, "--out", tmp_path / "flow")
    call(monkeypatch, facm, *on_gpu, "--jvp", "exact", *flags, "--teacher", tmp_path / "flow", "--steps", 3, "--out", tmp_path / "run")
    assert len(rows(tmp_path / "flow")) == len(rows(tmp_path / "run")) == 3


def watch(monkeypatch, calls, owner, *names):
    """Records the arguments of these functions in calls[name] and calls["NAME options"], with one entry per call."""
    for name in names:
        def spy(*args, name=name, honest=getattr(owner, name), **options):
            calls.setdefault(name, []).append(args)
            calls.setdefault(f"{name} options", []).append(options)
            return honest(*args, **options)
        monkeypatch.setattr(owner, name, spy)


def test_the_loops_give_the_methods_what_the_flags_say(tmp_path, monkeypatch):
    """Two steps of flow.py and facm.py use the images, noise, times, labels and options that the flags ask for."""
    calls = {}
    watch(monkeypatch, calls, flow, "flow_loss")
    watch(monkeypatch, calls, facm, "facm_loss")
    watch(monkeypatch, calls, models, "seed_dropout")
    watch(monkeypatch, calls, data.Dataset, "batch")
    watch(monkeypatch, calls, torch, "_foreach_lerp_")
    common = [*FLOW, "--steps", 2, "--seed", 7, "--lr", "1e-12", "--ema-sigma", 0.2, "--betas", 0.8, 0.95, "--weight-decay", 0.1]
    call(monkeypatch, flow, *common, "--batch", 16, "--label-drop", 1, "--P-mean", 0.5, "--P-std", 1, "--out", tmp_path / "flow")
    call(monkeypatch, facm, *common, "--teacher", tmp_path / "flow", "--jvp", "fd", "--w", 3, "--t-low", 0.25, "--alpha", "cos",
         "--beta", "1-t^p", "--power", 0.3, "--c", 0.5, "--P-mean", -1, "--P-std", 1.5, "--out", tmp_path / "run")
    assert [a[1:4] for a in calls["batch"]] == [(7, 0, 16), (7, 16, 16), (7, 0, 8), (7, 8, 8)]
    gamma = gamma_of(0.2)
    assert [a[2] for a in calls["_foreach_lerp_"]] == [1 - (1 - 1 / k) ** (gamma + 1) for k in (1, 2, 1, 2)]
    assert len({a[1] for a in calls["seed_dropout"]}) == 2             # one per step, the same in both runs
    assert [options["rows"] for options in calls["seed_dropout options"]] == [16, 16, 8, 8]
    for step in range(2):
        for n, stage, P, name in ((16, "flow_loss", (0.5, 1), "flow"), (8, "facm_loss", (-1, 1.5), "facm")):
            g = seeds.generator("cpu", 7, "step", step)
            x0, normal = torch.randn((n, 3, 12, 12), generator=g), torch.randn(n, generator=g)
            *_, noise, t, y = calls[stage][step]
            options = calls[f"{stage} options"][step]
            assert torch.equal(noise, x0) and torch.equal(t, facm.sample_t(normal, *P))
            if name == "flow":
                assert (y == 10).all()                                 # --label-drop 1
                assert 0 < options["mixed"].sum() < 16                 # some samples use 2 - t
            else:
                assert (y < 10).all() and (options["w"], options["t_low"], options["y_null"]) == (3.0, 0.25, 10)
                assert (options["alpha"], options["beta"], options["p"]) == ("cos", "1-t^p", 0.3)
                assert options["c"] == 0.5 and options["teacher"] is not None and options["condition"] == "expanded"
    for name in ("flow", "run"):
        checkpoint = checkpoints.read(tmp_path / name / "ckpt.pt")
        begin = models.create(**checkpoint["args"]["net"], seed=seeds.seed_of(7, "init")).state_dict()
        assert all(torch.allclose(checkpoint["model"][k], w, atol=1e-6) for k, w in begin.items())
        group = checkpoint["optimizer"]["param_groups"][0]
        assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.1)


def test_anchor_weighs_its_loss(tmp_path, monkeypatch):
    perturb(monkeypatch)
    g = {}
    for anchor in (0, 1, 3):
        out = tmp_path / str(anchor)
        call(monkeypatch, facm, *TINY, "--teacher", "none", "--steps", 1, "--jvp", "fd", "--anchor", anchor, "--clip", 1e9,
             "--out", out)
        g[anchor] = first_gradient(out)
    fm = g[1] - g[0]
    assert torch.allclose(g[3] - g[0], 3 * fm, atol=1e-4 * fm.abs().max()) and fm.abs().max() > 0


@pytest.mark.parametrize("script, flags", [
    (flow, ""), (facm, "--teacher none --w 1 --jvp fd"), (decm, "--teacher none --w 1 --objectives fm --jvp fd"),
    (baselines, "--teacher none --w 1 --jvp fd"), (gcm, "--optimizer AdamW --betas 0.9 0.99 --jvp fd")],
    ids=["flow", "facm", "decm", "baselines", "gcm"])
def test_clip_bounds_the_gradient(tmp_path, monkeypatch, script, flags):
    perturb(monkeypatch)
    call(monkeypatch, script, *TINY[:11], *flags.split(), "--steps", 1, "--clip", 0.01, "--out", tmp_path)
    assert first_gradient(tmp_path).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("flags, words", [
    ("--ema-sigma 0", "--ema-sigma 0.0: expected a finite number, at least 0.001, at most 0.28"),
    ("--clip nan", "--clip nan"), ("--clip 0", "--clip"), ("--lr inf", "--lr inf"),
    ("--w nan", "--w nan"), ("--seed -1", "--seed"), ("--lr-final 2", "--lr-final"),
    ("--label-drop -1", "--label-drop"), ("--betas 2 0.9", "--betas 2"), ("--P-mean nan", "--P-mean nan"),
    ("--save-every 0", "--save-every"), ("--net input_size=8", "input_size 8"),
    ("--net in_channels=4", "in_channels 4"), ("--net num_classes=2", "num_classes 2"),
    ("--net width=0", "DDPM++ with these options"), ("--net mult=1,x", "mult='1,x': expected int"),
    ("--net width=abc", "width='abc': expected int"), ("--net blocks=True", "blocks=True: expected int"), ("--num-classes -1", "--num-classes")])
def test_numbers_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, facm, *TINY[:4], *flags.split(), "--out", tmp_path / "run")


@pytest.mark.parametrize("module, flags, words", [
    (facm, "--power 0", "--power 0.0"), (facm, "--c 0", "--c 0.0"), (decm, "--c 0", "--c 0.0"), (baselines, "--c 0", "--c 0.0"),
    (decm, "--lam -1", "--lam -1.0"), (decm, "--gam -0.5", "--gam -0.5"), (gcm, "--w 2 --guide 0.75 0.1", "--guide FIRST LAST"),
    (gcm, "--pt sine --pt-ab -1 0", "--pt-ab A B"), (gcm, "--pt sine --pt-ab 3 0", "--pt-ab A B"),
    (gcm, "--preset glyphs_finetune", "continues from trained weights: name their file by --init")],
    ids=lambda a: a if isinstance(a, str) else a.__name__)
def test_a_methods_numbers_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys, module, flags, words):
    """Among them: weights of 0 or below 0, a loss that is 0/0 where the network is exact, and a negative density."""
    assert words in refused(monkeypatch, capsys, module, "--device", "cpu", *flags.split(), "--out", tmp_path / "run")


def test_only_a_velocity_can_be_a_teacher(finished, tmp_path, monkeypatch, capsys):
    common = ["--device", "cpu", "--resolution", 12, "--out", tmp_path / "run"]
    words = "is a consistency model and not a velocity network; use its teacher"
    net = TINY[4:9]
    assert words in refused(monkeypatch, capsys, facm, *common, *net, "--teacher", finished / "ckpt.pt")
    assert words in refused(monkeypatch, capsys, flow, *common, *net, "--init", finished / "ckpt.pt")
    assert words in refused(monkeypatch, capsys, gcm, *common, "--init", finished / "ckpt.pt")
    assert words in refused(monkeypatch, capsys, sample, "--ckpt", finished / "ckpt.pt", "--method", "flow", "--out",
                            tmp_path / "x.npz")


def test_checkpoints_of_earlier_versions_are_read(teacher, tmp_path, monkeypatch, capsys):
    """A run of an earlier facm.py had two stages. Its teacher.pt is a velocity network, and its ckpt.pt is not."""
    checkpoint = checkpoints.read(teacher) | dict(method="facm", step=6)
    for name, pretrain in (("teacher", 6), ("ckpt", 3)):
        args = checkpoint["args"] | dict(pretrain=pretrain, t_low=0.125, teacher=None)
        checkpoints.save(tmp_path / f"{name}.pt", checkpoint | dict(args=args))
    call(monkeypatch, facm, *TINY, "--teacher", tmp_path / "teacher.pt", "--steps", 1, "--out", tmp_path / "run")
    capsys.readouterr()
    assert "not a velocity network" in refused(monkeypatch, capsys, facm, *TINY, "--teacher", tmp_path / "ckpt.pt", "--out", tmp_path / "no")
    for name, sampler in (("teacher", "euler at NFE 3"), ("ckpt", "cm at NFE 3")):
        call(monkeypatch, sample, "--ckpt", tmp_path / f"{name}.pt", "--nfe", 3, "--n", 4, "--device", "cpu")
        assert sampler in capsys.readouterr().out


def test_flow_fine_tunes_a_public_network_to_both_times(tmp_path, monkeypatch):
    size = dict(name="LightningDiT", patch=4, width=32, depth=1, heads=4, input_size=12, in_channels=3, num_classes=10)
    net = models.create(**size)
    torch.save(dict(model=net.state_dict()), tmp_path / "public.pt")
    call(monkeypatch, flow, *FLOW[:4], "--batch", 8, "--init", tmp_path / "public.pt", "--steps", 1, "--lr", "1e-12",
         "--out", tmp_path / "run")
    held = checkpoints.read(tmp_path / "run/ckpt.pt")
    assert all(torch.allclose(held["model"][k], v, atol=1e-6) for k, v in net.state_dict().items())
    assert held["args"]["net"]["width"] == 32 and held["method"] == "flow"


def test_steps_may_change_unless_the_rate_depends_on_them(tmp_path, monkeypatch, capsys):
    for final, out in ((1, tmp_path / "stays"), (0, tmp_path / "falls")):
        call(monkeypatch, flow, *FLOW, "--lr-final", final, "--steps", 1, "--out", out)
    call(monkeypatch, flow, *FLOW, "--lr-final", 1, "--steps", 2, "--out", tmp_path / "stays")
    capsys.readouterr()
    assert "steps 1, not 2" in refused(monkeypatch, capsys, flow, *FLOW, "--lr-final", 0, "--steps", 2, "--out", tmp_path / "falls")


def test_previews_that_cannot_be_written_are_told_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/previews").touch()                                # not a folder
    say_once.cache_clear()
    call(monkeypatch, flow, *FLOW, "--preview-every", 1, "--steps", 3, "--out", tmp_path / "run")
    assert capsys.readouterr().err.count("no previews (File exists); the run continues") == 1
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 3


def test_lines_of_the_log_that_are_torn_or_foreign_are_dropped(tmp_path, monkeypatch):
    out = tmp_path / "run"
    call(monkeypatch, flow, *FLOW, "--steps", 2, "--out", out)
    whole = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text("\n[1]\n{}\nhello\n\x00\x01\n" + whole + '{"step": "x"}\n{"step": 1')
    call(monkeypatch, flow, *FLOW, "--steps", 3, "--out", out)
    assert (out / "log.jsonl").read_text().startswith(whole) and [row["step"] for row in rows(out)] == [1, 2, 3]


@pytest.mark.parametrize("out", ["/proc/self", "file", "file/run"])
def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "file").touch()
    assert str(tmp_path / out) in refused(monkeypatch, capsys, flow, *FLOW, "--out", tmp_path / out)


@pytest.mark.parametrize("module, flags, name", [
    (flow, "--times uniform --P-mean 0", "--P-mean"), (flow, "--weights ema", "--weights"), (flow, "--uncond --label-drop 0.2", "--label-drop"),
    (facm, "--teacher none --w 1 --uncond --label-drop 0.2", "--label-drop"), (decm, "--teacher none --w 1 --uncond --label-drop 0.2", "--label-drop"),
    (facm, "--w 1 --t-low 0.5", "--t-low"), (facm, "--alpha cos --power 0.3", "--power"), (facm, "--label-drop 0.2", "--label-drop"),
    (decm, "--P-std 1", "--P-std"), (decm, "--times arctan --segments 8", "--segments"), (decm, "--w 1 --vel-norm 2", "--vel-norm"),
    (decm, "--objectives fm cd --freq 2", "--freq"), (decm, "--objectives fm n2n --w1 1-t", "--w1"),
    (decm, "--objectives fm --lam 1", "--lam"), (decm, "--label-drop 0.2", "--label-drop"),
    (baselines, "--objective scm --equal 0.5", "--equal"), (baselines, "--tangent-warmup 5", "--tangent-warmup"),
    (gcm, "--curriculum 5 --epsilon 0.1", "--epsilon"), (gcm, "--epsilon 0.1 --q 2", "--q"), (gcm, "--ht ect --ct t --mu 2", "--mu"),
    (gcm, "--init x.pt --ct t", "--ct"), (gcm, "--scheme imm --lambda 2", "--lambda"), (gcm, "--pt uniform --pt-ab 1 2", "--pt-ab"),
    (gcm, "--variant CU --w 1 --equal 0 --nu-s 2", "--nu-s"), (gcm, "--equal 0 --P-mean 1", "--P-mean"), (gcm, "--kernel-sigma 1", "--kernel-sigma"),
    (gcm, "--share-time", "--share-time"), (gcm, "--w 1 --kappa 0.1", "--kappa"), (gcm, "--w 1 --label-drop 0.1", "--label-drop"),
    (gcm, "--weights ema", "--weights")], ids=lambda a: a if isinstance(a, str) else a.__name__)
def test_a_flag_without_effect_is_refused(tmp_path, monkeypatch, capsys, module, flags, name):
    assert f"{name} has no effect here: it needs " in refused(monkeypatch, capsys, module, *flags.split(), "--out", tmp_path / "run")


@pytest.mark.parametrize("module", [flow, facm, decm, baselines, gcm], ids=lambda m: m.__name__)
def test_a_presets_value_without_effect_is_none_of_the_users_flags(monkeypatch, module):
    for name in module.PRESETS:
        words = ["--preset", name, *(["--init", "weights.pt"] if name.endswith("_finetune") else [])]
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
        assert set(module.parse_args().given) == {word[2:] for word in words[::2]}


def test_without_labels_a_network_that_has_classes_sees_the_null_label(teacher, tmp_path, monkeypatch, capsys):
    """With --uncond and a teacher of ten classes, every sample has the label 10, and guidance is refused."""
    calls = {}
    watch(monkeypatch, calls, facm, "facm_loss")
    command = [*TINY, "--teacher", teacher, "--uncond", "--steps", 1, "--out", tmp_path / "run"]
    assert "--w 1.75: guidance needs labels" in refused(monkeypatch, capsys, facm, *command)
    call(monkeypatch, facm, *command, "--w", 1)
    assert (calls["facm_loss"][0][5] == 10).all()


def test_data_without_labels_train_the_null_label(teacher, tmp_path, monkeypatch, capsys):
    """The network has the ten classes of its teacher. The run can be resumed, and its samples have the null label as well."""
    calls = {}
    watch(monkeypatch, calls, facm, "facm_loss")
    np.savez(tmp_path / "x.npz", images=np.zeros((8, 12, 12, 3), np.uint8))
    command = [*TINY[2:], "--data", tmp_path / "x.npz", "--preset", "glyphs", "--teacher", teacher, "--out", tmp_path / "run"]
    assert "--w 1.75: guidance needs labels" in refused(monkeypatch, capsys, facm, "--device", "cpu", *command)
    for steps in (1, 2):
        call(monkeypatch, facm, "--device", "cpu", *command, "--w", 1, "--steps", steps, "--lr-final", 1)
    assert (calls["facm_loss"][0][5] == 10).all()
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["args"]["uncond"] is True


@pytest.mark.parametrize("held, given, key", [({}, ["width=16"], "width=8"), (dict(pixelnorm=True), [], "pixelnorm=True")], ids=str)
def test_a_default_teacher_with_another_network_is_refused(teacher, tmp_path, monkeypatch, capsys, held, given, key):
    """The teacher is refused even if the student's flags do not name the option that differs."""
    checkpoint = checkpoints.read(teacher)
    checkpoint["args"]["net"] |= held
    pathlib.Path("runs/flow-glyphs").mkdir(parents=True)
    checkpoints.save(pathlib.Path("runs/flow-glyphs/ckpt.pt"), checkpoint)
    command = list(TINY)
    command[command.index("width=8") + 1:command.index("width=8") + 1] = given
    assert f"runs/flow-glyphs/ckpt.pt has a network with {key}, and this run" in refused(
        monkeypatch, capsys, facm, *command, "--out", tmp_path / "run")


def test_a_rate_may_change_at_a_resume_and_the_log_says_so(tmp_path, monkeypatch, capsys):
    """Flags change at two resumes. The log records this, and the same commands give the same weights again."""
    out = tmp_path / "run"
    changes = [["--lr", "1e-3"], ["--lr", "1e-4", "--clip", 0.5], ["--lr", "1e-4", "--clip", 0.5, "--warmup", 0, "--precision", "bf16"]]
    for name in ("run", "again"):
        say_once.cache_clear()
        capsys.readouterr()
        for steps, flags in enumerate(changes, 1):
            call(monkeypatch, flow, *FLOW, *flags, "--steps", steps, "--out", tmp_path / name)
        said = capsys.readouterr().err
        assert f"{name}, step 1: lr 0.001 is now 0.0001, clip 1.0 is now 0.5\n" in said
        assert f"{name}, step 2: precision float32 is now bf16, warmup 2 is now 0\n" in said
    assert [row["changed"] for row in rows(out) if "changed" in row] == [
        dict(lr=[1e-3, 1e-4], clip=[1.0, 0.5]), dict(warmup=[2, 0], precision=["float32", "bf16"])]
    assert [row["step"] for row in rows(out)] == [1, 1, 2, 2, 3]
    assert_same_run(out, tmp_path / "again")


def test_snapshots_are_kept_and_sampled(tmp_path, monkeypatch):
    """Snapshots do not depend on --save-every. They have no optimiser state, and can be sampled or used as teachers."""
    out = tmp_path / "run"
    call(monkeypatch, flow, *FLOW, "--steps", 5, "--keep-every", 2, "--save-every", 3, "--out", out)
    assert sorted(path.name for path in out.glob("*.pt")) == ["ckpt.pt", "step-0000002.pt", "step-0000004.pt"]
    held = checkpoints.read(out / "step-0000002.pt")
    assert held["step"] == 2 and "optimizer" not in held
    call(monkeypatch, flow, *FLOW, "--steps", 2, "--out", tmp_path / "short")
    short = checkpoints.read(tmp_path / "short/ckpt.pt")
    assert all(same(held[part], short[part]) for part in ("model", "ema"))
    call(monkeypatch, sample, "--ckpt", out / "step-0000002.pt", "--n", 4, "--device", "cpu", "--out", tmp_path / "x.png")
    call(monkeypatch, facm, *TINY, "--teacher", out / "step-0000004.pt", "--steps", 1, "--out", tmp_path / "student")


@pytest.mark.parametrize("killed", [1, 2])
def test_a_kill_in_a_save_loses_no_snapshot_and_leaves_no_half_file(tmp_path, monkeypatch, killed):
    """The run is killed while it writes the snapshot or the checkpoint of step 2. The same command completes it."""
    honest, names, out = checkpoints.save, [], tmp_path / "run"

    def save(path, checkpoint):
        names.append(path.name)
        if len(names) == killed:
            path.with_suffix(".part").write_bytes(b"half")
            sys.exit(9)
        honest(path, checkpoint)
    command = [*FLOW, "--steps", 4, "--save-every", 2, "--keep-every", 2, "--out", out]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoints, "save", save)
        call(patch, flow, *command)
    assert len(list(out.glob("*.part"))) == 1
    (out / "step-0000003.part").write_bytes(b"half")                   # left by a run with another --keep-every
    call(monkeypatch, flow, *command)
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "step-0000002.pt", "step-0000004.pt", "log.jsonl", "previews"}
    assert all(checkpoints.read(path)["step"] in (2, 4) for path in out.glob("*.pt"))


@pytest.mark.parametrize("latents", [False, True], ids=["pixels", "latents"])
def test_the_command_that_a_run_prints_at_its_end_can_be_run(tmp_path, monkeypatch, capsys, latents):
    """The command works for a folder whose name has a space, and for latents with the autoencoder of the run."""
    out, words = tmp_path / "a run", []
    if latents:
        write_shards(tmp_path / "z")
        small_vae(tmp_path)
        words = ["--data", tmp_path / "z", "--preset", "imagenet_latents", "--vae", tmp_path / "vae.pt", "--precision", "float32",
                 "--net", "name=LightningDiT", "patch=1", "width=32", "depth=1", "heads=4"]
    call(monkeypatch, flow, *FLOW[:2], *(words or FLOW[2:9]), "--batch", 4, "--steps", 1, "--preview-every", 1000, "--out", out)
    hint = capsys.readouterr().out.partition("now: python sample.py ")[2]
    call(monkeypatch, sample, *shlex.split(hint), "--device", "cpu")
    assert (out / "nfe1.png").exists()


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Writing takes half a second here. At least three steps run meanwhile, and the next save waits."""
    honest, times = checkpoints.save, []

    def slow(path, checkpoint):
        begun = time.time()
        time.sleep(0.5)
        honest(path, checkpoint)
        times.append((checkpoint["step"], begun, time.time()))

    steps = []
    log = Run.log

    def logged(self, step, **figures):
        steps.append(time.time())
        return log(self, step, **figures)
    monkeypatch.setattr(checkpoints, "save", slow)
    monkeypatch.setattr(Run, "log", logged)
    call(monkeypatch, flow, *FLOW, "--steps", 8, "--save-every", 4, "--out", tmp_path / "run")
    (first, begun, ended), (second, begun_again, _) = times
    assert (first, second) == (4, 8) and begun_again >= ended
    assert sum(begun < moment < ended for moment in steps) >= 3


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    """The error of the writing thread ends the run, and the previous checkpoint is kept."""
    honest, calls = torch.save, []

    def full(checkpoint, file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("No space left on device")
        honest(checkpoint, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, flow, *FLOW, "--steps", 8, "--save-every", 2, "--out", tmp_path / "run")
    assert end.value.code == 2 and "ckpt.pt could not be written (No space left on device); what was there is kept" in capsys.readouterr().err
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 2 and not list((tmp_path / "run").glob("*.part"))
