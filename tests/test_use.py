"""Tests everyday use: memory, the devices of tensors, the owner of a folder, and the commands of README.md."""

import os
import pathlib
import re
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_data import small_vae
from test_training import SCRATCH, call, first_gradient, popen, refused

import baselines
import decm
import encode
import facm
import flow
import gcm
import models
import sample
from common import checkpoints, dryrun, processes, seeds, torchrun

TINY = ["--batch", "4", "--micro-batch", "2", "--resolution", "12", "--net", "width=8", "mult=1,1", "blocks=1", "attention=6,"]


@pytest.fixture
def cuda_claimed(monkeypatch):
    """Makes networks and data claim to be on CUDA (fake tensors), so that a tensor that is left on the CPU is an error.
    Gradients are zeros, because the backward engine needs a real device. main() runs without writing files."""
    jobs = []

    class OnCuda(dryrun.DryRun):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            jobs.append(self)
            self.device = torch.device("cuda:0")

    def backward(loss):
        assert loss.device.type == "cuda"
        for p in [*jobs[-1].net.parameters(), *jobs[-1].extra]:
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    def on_cuda(*args, device=None, **options):
        with torch.device("cuda:0"):
            return create(*args, **options)

    def uncounted(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            return True
        self.flops[torch.float32] = 1
        return func(*args, **(kwargs or {}))

    create, honest = models.create, seeds.generator
    monkeypatch.setattr(dryrun.Meter, "__torch_dispatch__", uncounted)   # counting takes most of the time
    monkeypatch.setattr(dryrun, "DryRun", OnCuda)
    monkeypatch.setattr(models, "create", on_cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for module in (flow, facm, decm, gcm, baselines):                  # there is no CUDA generator
        monkeypatch.setattr(module, "generator", lambda device, *key: honest("cpu", *key))
    return jobs


CONFIGURATIONS = [
    (flow, "--precision bf16"), (flow, "--net edm_time=True"),
    *[(facm, flags) for flags in (
        "--jvp fused --condition auxiliary --precision bf16", "--jvp exact --precision tf32",
        "--jvp fd --teacher none --precision bf16", "--jvp fused --teacher none --w 1")],
    *[(decm, flags) for flags in (
        "--jvp fused --freq 1 --precision bf16", "--jvp exact --freq 3", "--jvp fd --freq 1 --teacher none --w 1")],
    *[(gcm, flags) for flags in (
        "--precision bf16", "--jvp fused", "--jvp exact --precision bf16", "--row A --w 1", "--row F --group 2 --w 1 --augment",
        "--variant CU --w 1 --equal 0")],
    *[(baselines, flags) for flags in (
        "--objective scm --jvp fd --precision bf16", "--objective scm --jvp exact --dry-run 2", "--objective meanflow --jvp fused")]]


@pytest.mark.parametrize("module, flags", CONFIGURATIONS, ids=lambda a: getattr(a, "__name__", a))
def test_a_step_leaves_no_tensor_on_the_cpu(cuda_claimed, monkeypatch, capsys, module, flags):
    before = torch.nn.Module.to
    words = flags.split()
    net = TINY[TINY.index("--net"):] + words[words.index("--net") + 1:] if "--net" in words else TINY[TINY.index("--net"):]
    words = words[:words.index("--net")] if "--net" in words else words
    call(monkeypatch, module, "--device", "cpu", *TINY[:TINY.index("--net")], *net, "--dry-run", 1, *words)
    assert "memory" in capsys.readouterr().out
    assert {p.device.type for p in cuda_claimed[0].net.parameters()} == {"cuda"}
    assert torch.nn.Module.to is before and not list(pathlib.Path().iterdir())     # nothing is changed or written


def hours(monkeypatch, capsys, module, *flags):
    """The hours and the line about the work in a dry run."""
    call(monkeypatch, module, "--device", "cpu", *flags, "--dry-run")
    printed = capsys.readouterr().out
    return float(re.search(r"time +(\S+) hours", printed)[1]), re.search("work.*", printed)[0]


def test_a_dry_run_counts_an_update_as_often_as_it_is_made(monkeypatch, capsys):
    """DE-CM makes its second update in every --freq-th step."""
    first = hours(monkeypatch, capsys, decm, *TINY, "--objectives", "fm", "cd")[0]
    always, third = (hours(monkeypatch, capsys, decm, *TINY, "--freq", freq)[0] for freq in (1, 3))
    assert third == pytest.approx(first + (always - first) / 3, rel=1e-3) and always > 1.5 * first


def test_a_dry_run_counts_float32_at_its_own_rate(monkeypatch, capsys):
    """GCM computes the difference of a pair in float32, also with --precision bf16."""
    mixed, line = hours(monkeypatch, capsys, gcm, *TINY, "--precision", "bf16")
    assert "bf16 and float32 rates (" in line
    alone, line = hours(monkeypatch, capsys, gcm, *TINY, "--precision", "float32")
    assert alone / 5 < mixed < alone and "float32 rate" in line


def test_a_dry_run_opens_a_teacher_that_is_there(teacher, tmp_path, monkeypatch, capsys):
    """A dry run takes the network from the teacher's file, and refuses what the run would refuse."""
    flags = ["--resolution", 12, "--dry-run", "--teacher"]
    call(monkeypatch, facm, *flags, teacher)
    assert "'width': 8" in capsys.readouterr().out
    assert "width=16" in refused(monkeypatch, capsys, facm, *flags, teacher, "--net", "width=16")
    assert "nowhere.pt: no such checkpoint" in refused(monkeypatch, capsys, facm, *flags, "nowhere.pt")
    (tmp_path / "torn.pt").write_bytes(teacher.read_bytes()[:1000])
    assert "torn.pt is not a readable checkpoint" in refused(monkeypatch, capsys, facm, *flags, tmp_path / "torn.pt")


# Memory.

def test_out_of_memory_is_one_line_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    """CUDA's error comes in the second step, and the checkpoint of the first step is kept."""
    honest, calls = torch.nn.utils.clip_grad_norm_, []

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return honest(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, facm, "--device", "cpu", *TINY, *SCRATCH, "--steps", 2, "--save-every", 1, "--out", tmp_path / "run")
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and said.startswith("error: out of memory")
    assert "Tried to allocate 20.00 GiB" in said and all(flag in said for flag in (
        "--micro-batch", "--grad-checkpoint", "--precision", "--fsdp"))
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 1
    assert not (tmp_path / "run/.owner").exists()


@pytest.mark.parametrize("words", [
    "flow.py --device cpu --steps 2 --batch 10000000 --out RUN",
    "sample.py --device cpu --ckpt RUN --n 10000000000 --out RUN/x.npz"], ids=["train", "sample"])
def test_the_cpus_refusal_is_one_line(tmp_path, monkeypatch, words):
    """The CPU's allocator fails, because the process may use only 4 GB of address space."""
    out = tmp_path / "run"
    call(monkeypatch, flow, "--device", "cpu", *TINY, "--steps", 1, "--out", out)
    kept, words = (out / "ckpt.pt").read_bytes(), words.replace("RUN", str(out)).split()
    flags = TINY[4:] if words[0] == "flow.py" else []
    done = subprocess.run([sys.executable, "-W", "ignore", ROOT / words[0], *flags, *words[1:], *["--fresh"] * bool(flags)],
                          capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"),
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 10 ** 9,) * 2))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\nerror: out of memory" in done.stderr, done.stderr
    checkpoint, = tmp_path.glob("run*/ckpt.pt")
    assert checkpoint.read_bytes() == kept


@pytest.mark.parametrize("module", [flow, facm, decm, gcm], ids=lambda m: m.__name__)
def test_a_resume_with_another_micro_batch_sees_the_same_samples(tmp_path, monkeypatch, module):
    """With --micro-batch 4, 3 and 1, the second step has the same batch, times and noise, and the gradients agree."""
    seen, gradients = {}, {}
    honest = processes.to_device
    for pieces in (4, 3, 1):
        out, common = tmp_path / str(pieces), ["--device", "cpu", *TINY[4:], "--batch", 4, "--save-every", 1]
        common += {flow: [], gcm: ["--optimizer", "AdamW"]}.get(module, SCRATCH)
        call(monkeypatch, module, *common, "--steps", 1, "--lr-final", 1, "--out", out)
        parts = []
        monkeypatch.setattr(processes, "to_device", lambda tensors, device: (parts.append(tensors[0]), honest(tensors, device))[1])
        call(monkeypatch, module, *common, "--steps", 2, "--lr-final", 1, "--micro-batch", pieces, "--out", out)
        monkeypatch.setattr(processes, "to_device", honest)
        assert [len(x) for x in parts] == {4: [4], 3: [2, 2], 1: [1] * 4}[pieces]
        seen[pieces], gradients[pieces] = torch.cat(parts), first_gradient(out)
    for pieces in (3, 1):
        assert torch.equal(seen[pieces], seen[4])
        assert (gradients[pieces] - gradients[4]).abs().max() < 1e-5 * gradients[4].abs().max()


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch, capsys):
    for name in torchrun.NAMES:
        monkeypatch.setenv(name, "3" if name == "WORLD_SIZE" else "0")
    said = refused(monkeypatch, capsys, facm, *TINY, "--out", tmp_path / "run")
    assert "--batch 4 is not a multiple of 3, the number of processes" in said


# Owners. A second command runs while the first one is still running, and again after the first one was killed.

def wait_for(condition, process):
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the first command made no progress")


@pytest.mark.parametrize("kind", ["run", "run --fresh", "samples", "npz", "latents"])
def test_a_folder_has_one_owner_and_a_killed_one_is_taken_over(tmp_path, monkeypatch, capsys, kind):
    out, train = tmp_path / "out", ["--device", "cpu", *TINY, *SCRATCH, "--lr-final", 1]
    if kind.startswith("run"):
        module, begun = facm, lambda: (out / "ckpt.pt").exists()
        words = [*train, "--save-every", 1, "--out", out]
        first, then = [*words, "--steps", 100_000], [*words, "--steps", 1, *kind.split()[1:]]
    elif kind == "latents":
        (tmp_path / "images").mkdir()
        for i in range(400):      # so many that the second command comes before the end
            Image.fromarray(np.full((16, 16, 3), i % 256, np.uint8)).save(tmp_path / f"images/{i}.png")
        small_vae(tmp_path)
        module, begun = encode, lambda: any(out.glob("*.safetensors"))
        first = then = ["--images", tmp_path / "images", "--vae", tmp_path / "vae.pt", "--out", out, "--resolution", 16, "--shard", 1,
                        "--device", "cpu"]
    else:
        call(monkeypatch, facm, *train, "--steps", 1, "--out", tmp_path / "trained")
        capsys.readouterr()
        out = tmp_path / ("x.npz" if kind == "npz" else "out")
        folder = tmp_path / "x.npz.partial" if kind == "npz" else out
        module, begun = sample, lambda: (folder / "done").exists() and any((folder / "done").read_bytes())
        first = then = ["--ckpt", tmp_path / "trained", "--n", 1280, "--batch", 64, "--nfe", 60, "--out", out, "--device", "cpu"]
    process = popen(*first, script=f"{module.__name__}.py")
    wait_for(begun, process)
    said = refused(monkeypatch, capsys, module, *then)
    assert f"belongs to a running program, process {process.pid} on " in said
    assert not list(tmp_path.glob("*.old-*"))
    process.kill()
    process.communicate()
    if module is sample:                   # zeros, to draw the rest in less time
        monkeypatch.setattr(sample, "draw_batch", lambda *a: torch.zeros(len(a[-1]), 3, 12, 12))
    call(monkeypatch, module, *then)
    assert not list(tmp_path.glob("**/.owner"))
    assert kind != "run --fresh" or (tmp_path / "out.old-1/ckpt.pt").exists() and checkpoints.read(out / "ckpt.pt")["step"] == 1


# The commands of README.md, as they stand there.

SHORT = {"flow.py": "--steps 2", "facm.py": "--steps 2", "decm.py": "--steps 2 --freq 1", "gcm.py": "--steps 2",
         "baselines.py": "--steps 2"}


def test_the_commands_of_the_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """The commands that need no data run in order in an empty folder. Training has few steps and small batches."""
    lines = [line.split("#")[0].split("&&")[-1].split() for line in (ROOT / "README.md").read_text().splitlines()
             if "python " in line.split("#")[0] and ".py" in line and "needs" not in line and not line.startswith(("|", "-", "`"))]
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(flow.PRESETS, "glyphs", flow.PRESETS["glyphs"] | dict(steps=2, batch=4))
    ran = []
    for words in lines:
        script = words[1]
        if words[0] != "python" or "/" in script:          # other tests run benchmarks and examples
            continue
        more = f"--device cpu {SHORT[script]} --batch 4 --preview-every 100" if script in SHORT else "--device cpu"
        module = {"flow.py": flow, "facm.py": facm, "decm.py": decm, "gcm.py": gcm, "baselines.py": baselines,
                  "sample.py": sample}[script]
        call(monkeypatch, module, *words[2:], *more.split(), *(["--n", "8"] if "--n" in words else []))
        ran.append(script)
    assert ran.count("sample.py") >= 2 and "facm.py" in ran
    assert (tmp_path / "runs/facm-glyphs/ckpt.pt").exists() and any(tmp_path.glob("*.png")) and (tmp_path / "samples.npz").exists()


def test_headline_commands_without_their_data_say_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(monkeypatch, capsys, facm, "--data", "imagenet_latents", "--device", "cpu", "--precision", "float32",
                   "--net", "name=LightningDiT", "patch=1", "width=32", "depth=1", "heads=2")
    assert "data/imagenet_latents contains no *.safetensors" in said and "encode.py" in said
    assert not (tmp_path / "runs").exists()


def test_samples_go_beside_the_checkpoint(tmp_path, monkeypatch, capsys):
    call(monkeypatch, facm, "--device", "cpu", *TINY, *SCRATCH, "--steps", 1, "--out", tmp_path)
    for ckpt, nfe in ((tmp_path, 1), (tmp_path / "ckpt.pt", 2)):
        call(monkeypatch, sample, "--ckpt", ckpt, "--nfe", nfe, "--n", 4, "--device", "cpu")
        assert (tmp_path / f"nfe{nfe}.png").exists()
        assert f"{tmp_path}/nfe{nfe}.png: 4 samples" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")], ids=["main", "card"])
def test_a_network_that_memory_does_not_hold_is_no_wrong_option(tmp_path, monkeypatch, capsys, error):
    def network(**options):
        raise error

    monkeypatch.setitem(models.NETWORKS, "DDPM++", network)
    said = refused(monkeypatch, capsys, flow, "--device", "cpu", "--out", tmp_path / "run")
    assert said.startswith("error: out of memory (") and "--micro-batch" in said
