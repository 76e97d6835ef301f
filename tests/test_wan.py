"""Tests of examples/wan_facm.py with a tiny random model of diffusers' class."""

import json
import os
import sys

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import ROOT

pytest.importorskip("diffusers", reason="pip install -r examples/requirements.txt")
from diffusers import WanTransformer3DModel

sys.path.insert(0, str(ROOT / "examples"))
import wan_facm

import facm
import jvp

TINY = dict(num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=10, freq_dim=8, ffn_dim=32, num_layers=2)
T = torch.tensor([0.2, 0.5, 0.9])


def build():
    torch.manual_seed(0)
    student, teacher = (wan_facm.Velocity(WanTransformer3DModel(**TINY)) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False), torch.randn(3, 16, 8, 8), wan_facm.Text(torch.randn(3, 7, 10)), wan_facm.Text(torch.randn(1, 7, 10))


@torch.no_grad()
def test_signs_times_and_the_attention():
    """diffusers has the data at time 0 and its output is noise - data. Velocity, which has another implementation of
    attention, returns minus that output at the time 1000 (1 - t)."""
    student, _, x, y, _ = build()
    model = WanTransformer3DModel(**TINY)
    model.load_state_dict(student.transformer.state_dict())
    for t in (T, 2 - T):                   # 2 - t is a negative timestep
        theirs = model(hidden_states=x[:, :, None], timestep=1000 * (1 - t), encoder_hidden_states=y.tokens).sample[:, :, 0]
        assert (student(x, t, None, y) + theirs).norm() < 1e-5 * theirs.norm()
    assert not torch.allclose(student(x, T, None, y), student(x, 2 - T, None, y), atol=1e-4)


def test_the_derivative_in_one_pass_is_the_exact_one():
    student, _, x, y, _ = build()
    dx = torch.randn_like(x)
    ways = {way: jvp.JVP[way](student, at=(x, T, None, y), along=(dx, 1, 0)) for way in ("fused", "exact")}
    for a, b in zip(*ways.values()):
        assert (a - b).norm() < 1e-5 * b.norm()
    still = jvp.fused(student, at=(x, T, None, y), along=(dx, 0, 0))[1]
    assert (still - ways["exact"][1]).norm() > 0.01 * still.norm()     # the tangent of t has an effect


def test_a_difference_is_no_derivative_here(monkeypatch, capsys):
    """The error of fd is as large as the derivative, so the program refuses fd. Several processes cannot use exact."""
    student, _, x, y, _ = build()
    (_, exact), (_, difference) = (jvp.JVP[way](student, at=(x, T, None, y), along=(torch.randn_like(x), 1, 0)) for way in ("exact", "fd"))
    assert (exact - difference).norm() > 0.5 * exact.norm()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for way, words in (("fd", "invalid choice: 'fd'"), ("exact", "does not see sharded weights")):
        monkeypatch.setattr(sys, "argv", ["wan_facm.py", "train", "--out", "out", "--jvp", way])
        with pytest.raises(SystemExit) as end:
            wan_facm.main()
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_the_output_is_float32_whatever_computes_it():
    student, teacher, x, y, _ = build()
    with torch.autocast("cpu", torch.bfloat16):
        values = [student(x, T, None, y), teacher(x, T, None, y), *student(x, T, None, y, tangent=(x, torch.ones(3), None))]
    assert {value.dtype for value in values} == {torch.float32}


@torch.no_grad()
def test_each_expert_has_its_times():
    """As in diffusers' WanPipeline, transformer has the timesteps from the boundary on, transformer_2 the others."""
    noisy, _, _, _, null = build()
    clean = wan_facm.Velocity(WanTransformer3DModel(**TINY))
    x, y = torch.randn(5, 16, 8, 8), torch.full_like(wan_facm.Text(torch.randn(5, 7, 10)), null)
    t = torch.tensor([0.0, 0.1, 0.125, 0.126, 1.0])        # timesteps 1000, 900, 875, 874, 0
    v = wan_facm.Experts(noisy, clean, 875.0)(x, t, None, y)
    assert torch.equal(v[:3], noisy(x, t, None, y)[:3]) and torch.equal(v[3:], clean(x, t, None, y)[3:])
    assert not torch.allclose(noisy(x, t, None, y), clean(x, t, None, y), atol=0.1)
    drawn = facm.sample_t(torch.randn(100_000), P_mean=-0.8, P_std=1.6)
    assert 0.925 < (1000 * (1 - drawn) < 875).float().mean() < 0.94    # the 93% in the docstring of wan_facm.py

def test_the_derivative_in_one_pass_with_checkpointing():
    (student, _, x, y, _), (parts, *_) = build(), build()
    parts.transformer.enable_gradient_checkpointing()
    for net in (student, parts):
        F, dF = net(x, T, None, y, tangent=(x, torch.ones_like(T), None))
        (F - (F.detach() - 1e-3 * dF).tanh()).square().mean().backward()
    for a, b in zip(student.parameters(), parts.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("way", ["fused", "exact"])
def test_training_moves_the_student_alone(way):
    student, teacher, x, y, null = build()
    before = {k: w.clone() for k, w in teacher.state_dict().items()}
    value = wan_facm.loss(student, teacher, x, y, null, 0, w=2.0, way=way)
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() and p.grad.any() for p in student.parameters())
    torch.optim.AdamW(student.parameters(), lr=3e-3).step()
    assert all(torch.equal(w, before[k]) for k, w in teacher.state_dict().items())
    assert not torch.equal(student(x, T, None, y), teacher(x, T, None, y))


def test_the_velocity_of_a_fixed_batch_is_learned():
    """The consistency loss compares the network with itself and need not fall, but the loss of the velocity must."""
    student, _, x, y, _ = build()
    optimizer, found, x0 = torch.optim.AdamW(student.parameters(), lr=3e-3), [], torch.randn_like(x)
    for _ in range(40):
        losses = facm.facm_loss(student, jvp.fused, x, x0, T, y, beta="1")
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(losses[0].item())
    assert max(found[-3:]) < 0.7 * found[0], found


def test_the_guidance_takes_the_null_caption():
    """At w = 0 the guided velocity is that of the null caption."""
    _, teacher, x, y, null = build()
    v = facm.guided_velocity(teacher, x, T, (T, None), y, y_null=null, w=0.0, t_low=0.0)
    assert torch.allclose(v, teacher(x, T, None, torch.full_like(y, null)), atol=1e-6)
    assert not torch.allclose(v, teacher(x, T, None, y), atol=1e-4)


def train_tiny(tmp_path, monkeypatch, steps, boundary_ratio=None):
    """Runs the program with a model folder as diffusers saves it and a data folder as encode writes it."""
    torch.manual_seed(0)
    WanTransformer3DModel(**TINY).save_pretrained(tmp_path / "model/transformer")
    index = dict(_class_name="WanPipeline", transformer=["diffusers", "WanTransformer3DModel"])
    if boundary_ratio:
        WanTransformer3DModel(**TINY).save_pretrained(tmp_path / "model/transformer_2")
        index["boundary_ratio"] = boundary_ratio
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    (tmp_path / "data").mkdir()
    for i in range(4):
        safetensors.torch.save_file(dict(x1=torch.randn(16, 8, 8), tokens=torch.randn(7, 10)), tmp_path / f"data/{i}.safetensors")
    safetensors.torch.save_file(dict(tokens=torch.zeros(7, 10)), tmp_path / "data/null.safetensors")
    monkeypatch.setattr(sys, "argv", ["wan_facm.py", "train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--out",
                                      str(tmp_path / "out"), "--steps", str(steps), "--batch", "2", "--device", "cpu", "--lr", "1e-3"])
    wan_facm.main()


def test_the_program_trains_and_diffusers_reads_what_it_saved(tmp_path, monkeypatch, capsys):
    train_tiny(tmp_path, monkeypatch, steps=2)
    said = capsys.readouterr().out
    assert "step 1: loss " in said and "step 2: loss " in said
    begun, trained = (WanTransformer3DModel.from_pretrained(tmp_path / place) for place in ("model/transformer", "out"))
    moved = sum(not torch.equal(a, b) for a, b in zip(begun.parameters(), trained.parameters()))
    assert moved > 20
    _, _, x, y, _ = build()
    noise = torch.randn(2, 3, 16, 8, 8)
    draws = [facm.sample(wan_facm.Velocity(WanTransformer3DModel.from_pretrained(tmp_path / place)), noise, y, nfe=2)
             for place in ("out", "out", "model/transformer")]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_teacher_of_a_model_with_two_experts_is_both(tmp_path, monkeypatch):
    """The program finds both experts and the boundary in the model's files. The student starts as the first."""
    seen = []
    honest = wan_facm.loss

    def watched(student, teacher, *others, **options):
        seen.append((student, teacher))
        return honest(student, teacher, *others, **options)

    monkeypatch.setattr(wan_facm, "loss", watched)
    train_tiny(tmp_path, monkeypatch, steps=1, boundary_ratio=0.875)
    (student, teacher), = seen
    assert isinstance(teacher, wan_facm.Experts) and teacher.boundary == 875
    for net, place in ((teacher.noisy, "transformer"), (teacher.clean, "transformer_2"), (student, "transformer")):
        held = WanTransformer3DModel.from_pretrained(tmp_path / "model" / place)
        for a, b in zip(net.transformer.parameters(), held.parameters()):
            assert (a - b).norm() < 0.01 * b.norm() + 0.1              # from bfloat16 or one step
    assert not any(p.requires_grad for p in teacher.parameters())
    assert wan_facm.boundary_of(tmp_path / "model") == 875


def half_of_the_batch(rank, folder):
    """Runs as one of two processes with FSDP and half of the rows. Its gradients must be those of all rows."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    (student, _, x, y, _), (parts, *_) = build(), build()
    x, y, t = torch.cat([x, x[:1]]), torch.cat([y, y[1:2]]), torch.tensor([0.2, 0.5, 0.9, 0.4])
    parts.transformer.enable_gradient_checkpointing()
    wan_facm.shard(parts)
    for net, rows in ((student, slice(None)), (parts, slice(rank, None, 2))):
        F, dF = net(x[rows], t[rows], None, y[rows], tangent=(x[rows], torch.ones_like(t[rows]), None))
        (F - (F.detach() - 1e-3 * dF).tanh()).square().mean().backward()
    for (name, p), q in zip(student.named_parameters(), parts.parameters()):
        assert (q.grad.full_tensor() - p.grad).norm() < 1e-5 * (p.grad.norm() + 1e-4), name
    wan_facm.save(parts, folder / "saved")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)                            # gloo's threads sometimes abort when Python exits


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(half_of_the_batch, (tmp_path,), nprocs=2)
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), build()[0].transformer.parameters()))
