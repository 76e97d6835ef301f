"""Tests of examples/sd3_decm.py and examples/text_to_image.py with a tiny random model of diffusers' class."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from PIL import Image

pytest.importorskip("diffusers", reason="pip install -r examples/requirements.txt")
pytest.importorskip("peft", reason="pip install -r examples/requirements.txt")
from diffusers import SD3Transformer2DModel

sys.path.insert(0, str(ROOT / "examples"))
import sd3_decm
import text_to_image

import decm
import jvp

TINY = dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
            caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,),
            qk_norm="rms_norm")


def build(trained=False):
    """A student, its teacher, images, captions and the null caption. With trained=True no trained weight is zero."""
    torch.manual_seed(0)
    student = sd3_decm.add_lora(SD3Transformer2DModel(**TINY), 2)
    if trained:
        for p in sd3_decm.trained(student).values():
            p.data.add_(0.1 * torch.randn_like(p))
    x, y = torch.randn(3, 4, 8, 8), sd3_decm.Text(torch.randn(3, 7, 12), torch.randn(3, 10))
    return student, sd3_decm.Teacher(student), x, y, sd3_decm.Text(torch.randn(1, 7, 12), torch.randn(1, 10))


T, S = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.5, 0.9, 1.0])


def test_signs_and_times():
    """diffusers has data at sigma 0 and predicts noise - data; decm.py has data at t = 1 and predicts data - noise."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**TINY)
    _, _, x, y, _ = build()
    theirs = model(hidden_states=x, timestep=1000 * (1 - T), encoder_hidden_states=y.tokens, pooled_projections=y.pooled).sample
    assert torch.equal(sd3_decm.Velocity(model)(x, T, None, y), -theirs)


def test_the_output_is_float32_whatever_computes_it():
    student, teacher, x, y, _ = build(trained=True)
    with torch.autocast("cpu", torch.bfloat16):
        values = [student(x, T, S, y), teacher(x, T, None, y), *student(x, T, S, y, tangent=(x, torch.ones(3), torch.ones(3)))]
    assert {value.dtype for value in values} == {torch.float32}


@torch.no_grad()
def test_the_student_begins_as_the_teacher():
    student, teacher, x, y, _ = build()
    for s in (T, S):
        assert torch.equal(student(x, T, s, y), teacher(x, T, None, y))
    student, teacher, x, y, _ = build(trained=True)
    assert not torch.allclose(student(x, T, S, y), teacher(x, T, None, y), atol=1e-2)
    assert not torch.allclose(student(x, T, S, y), student(x, T, T, y), atol=1e-3)     # the second time has an effect


def test_a_text_is_a_y():
    _, _, x, y, null = build()
    both = torch.cat([y, y[:2]])
    assert len(both) == 5 and torch.equal(both.tokens[3:], y.tokens[:2]) and torch.equal(both.pooled[:3], y.pooled)
    nulls = torch.full_like(y, null)
    assert len(nulls) == 3 and all(torch.equal(row, null.tokens[0]) for row in nulls.tokens)
    assert y.to(torch.float64).pooled.dtype == torch.float64
    guided = decm.guided_velocity(lambda x, t, s, y: x * y.pooled.mean(), x, T, y, y_null=null, w=2.0, eta=None)
    assert guided.shape == x.shape


def test_a_folder_of_images_and_captions_is_encoded_once(tmp_path):
    (tmp_path / "in").mkdir()
    for name, grey in (("a", 10), ("b", 200)):
        Image.new("RGB", (6, 4), (grey,) * 3).save(tmp_path / f"in/{name}.png")
        (tmp_path / f"in/{name}.txt").write_text(f" {name}\n")
    tree, texts = text_to_image.read(tmp_path / "in")
    assert texts == {"a.png": "a", "b.png": "b"}
    text_to_image.encode(tree, texts, tmp_path / "out", 4, lambda text: dict(tokens=torch.tensor([float(len(text)), ord((text or "-")[0])])),
                         lambda x: x[0].float())
    files, null = text_to_image.encoded(tmp_path / "out", "script.py")
    assert len(files) == 2 and null["tokens"].tolist() == [[0, ord("-")]]
    drawn = text_to_image.draw(files, 20, seed=0)
    assert drawn["x1"].shape == (20, 3, 4, 4) and set(drawn["tokens"][:, 1].tolist()) == {ord("a"), ord("b")}
    assert all((x == (10 if token[1] == ord("a") else 200)).all() for x, token in zip(drawn["x1"], drawn["tokens"]))
    with pytest.raises(SystemExit, match="already contains encoded images"):
        text_to_image.encode(tree, texts, tmp_path / "out", 4, None, None)
    (tmp_path / "in/b.txt").unlink()
    with pytest.raises(SystemExit, match="error: b.png has no caption b.txt beside it"):
        text_to_image.read(tmp_path / "in")
    with pytest.raises(SystemExit, match="contains no \\*.safetensors; run script.py encode"):
        text_to_image.encoded(tmp_path / "in", "script.py")


def test_the_derivative_in_one_pass_is_the_exact_one():
    student, _, x, y, _ = build(trained=True)
    ways = {way: jvp.JVP[way](student, at=(x, T, S, y), along=(torch.ones_like(x), 1, 0.5)) for way in ("fused", "exact")}
    for a, b in zip(*ways.values()):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_the_derivative_in_one_pass_with_checkpointing():
    (student, _, x, y, _), (again, *_) = build(trained=True), build(trained=True)
    again.transformer.enable_gradient_checkpointing()
    for net in (student, again):
        F, dF = net(x, T, S, y, tangent=(x, torch.ones_like(T), torch.ones_like(S)))
        (F - (F.detach() - 1e-3 * dF).tanh()).square().mean().backward()
    grads = [(a.grad, b.grad) for a, b in zip(sd3_decm.trained(student).values(), sd3_decm.trained(again).values()) if a.grad is not None]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in grads)
    assert sum(bool(a.any()) for a, _ in grads) > 0.8 * len(sd3_decm.trained(student))


def test_a_difference_is_no_derivative_here(monkeypatch, capsys):
    """The error of fd is about as large as the derivative, so the program does not offer it."""
    student, _, x, y, _ = build(trained=True)
    (_, exact), (_, difference) = (jvp.JVP[way](student, at=(x, T, S, y), along=(torch.ones_like(x), 1, 0.5)) for way in ("exact", "fd"))
    assert (exact - difference).norm() > 0.5 * exact.norm()
    monkeypatch.setattr(sys, "argv", ["sd3_decm.py", "train", "--dry-run", "--jvp", "fd"])
    with pytest.raises(SystemExit):
        sd3_decm.main()
    assert "invalid choice: 'fd'" in capsys.readouterr().err


@torch.no_grad()
def test_a_step_keeps_the_times_of_decm(monkeypatch):
    """N2N has r <= t, even for t = 0, and the x_t and v of the first loss. Another seed or step changes the draws."""
    student, teacher, x, y, null = build()
    x, y = x[:1].expand(512, -1, -1, -1), y[torch.zeros(512, dtype=torch.int64)]
    seen = []

    def first(net, way, x1, x0, t, y, **options):
        seen.append((x0, t))
        return torch.zeros(()), torch.zeros(()), ("xt", "v")

    def second(net, way, x1, x0, xt, v, r, t, y, **options):
        assert (xt, v) == ("xt", "v") and torch.equal(seen[-1][0], x0) and torch.equal(seen[-1][1], t)
        assert (0 <= r).all() and (r <= t).all() and (r <= 0.02).all() and (t == 0).any() and options["lam"] == options["gam"] == 1
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(sd3_decm, "decm_loss", first)
    monkeypatch.setattr(sd3_decm, "n2n_loss", second)
    for step, seed in ((0, 0), (3, 0), (0, 3), (0, 0)):
        sd3_decm.losses(student, teacher, x, y, null, step, seed)
    same = [[torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for b in seen] for a in seen]
    assert same == [[i == j or {i, j} == {0, 3} for j in range(4)] for i in range(4)]


def test_the_program_trains_from_folders(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    SD3Transformer2DModel(**TINY).save_pretrained(tmp_path / "model/transformer")
    (tmp_path / "data").mkdir()
    text = dict(tokens=torch.randn(7, 12), pooled=torch.randn(10))
    for i in range(4):
        text_to_image.write(tmp_path / f"data/{i}.safetensors", text | dict(x1=torch.randn(4, 8, 8)))
    text_to_image.write(tmp_path / "data/null.safetensors", text)
    words = ["sd3_decm.py", "train", "--model", tmp_path / "model", "--data", tmp_path / "data", "--out", tmp_path / "out",
             "--steps", 2, "--batch", 2, "--rank", 2, "--device", "cpu", "--freq", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    sd3_decm.main()
    said = capsys.readouterr().out
    assert "step 1: loss " in said and "step 2: loss " in said
    student, _, x, y, _ = build()
    student.transformer.load_state_dict(SD3Transformer2DModel.from_pretrained(tmp_path / "model/transformer").state_dict(), strict=False)
    before = student(x, T, S, y)
    sd3_decm.load(student, tmp_path / "out")
    assert not torch.equal(student(x, T, S, y), before)


@pytest.mark.parametrize("way", ["fused", "exact"])
def test_training_moves_lora_and_the_second_time_alone(way):
    student, teacher, x, y, null = build()
    before = {k: p.clone() for k, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(sd3_decm.trained(student).values(), lr=1e-3)
    for step in range(2):                  # the first includes N2N
        loss = sd3_decm.losses(student, teacher, x, y, null, step, 0, w=2.0, freq=2, way=way)
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {k for k, p in student.named_parameters() if not torch.equal(p, before[k])}
    assert moved and all("lora_" in k or "time_text_embed.linear_" in k for k in moved)
    assert any("lora_B" in k for k in moved) and any("time_text_embed.linear_2" in k for k in moved)


def test_the_velocity_of_a_fixed_batch_is_learned():
    """The losses of the jumps compare the network with itself and need not fall, but the loss of the velocity must."""
    student, _, x, y, _ = build()
    optimizer, found, x0 = torch.optim.AdamW(sd3_decm.trained(student).values(), lr=1e-2), [], torch.randn_like(x)
    for _ in range(20):
        L_fm, _, _ = decm.decm_loss(student, jvp.JVP["fused"], x, x0, T, y)
        L_fm.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(L_fm.item())
    assert max(found[-3:]) < 0.9 * found[0], found


@torch.no_grad()
def test_what_is_saved_draws_the_same(tmp_path):
    student, _, x, y, _ = build(trained=True)
    sd3_decm.save(student, tmp_path)
    again, *_ = build()
    sd3_decm.load(again, tmp_path)
    noise = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(decm.sample(student, noise, y, nfe=2), decm.sample(again, noise, y, nfe=2))
    assert not torch.equal(decm.sample(build()[0], noise, y, nfe=2), decm.sample(again, noise, y, nfe=2))


def half_of_the_batch(rank, folder):
    """Runs as one of two processes with FSDP and half of the rows. Its LoRA gradients must be those of all rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    (student, _, x, y, _), (parts, *_) = build(trained=True), build(trained=True)
    x, y, t, s = torch.cat([x, x[:1]]), torch.cat([y, y[1:2]]), torch.tensor([0.2, 0.5, 0.9, 0.4]), torch.tensor([0.5, 0.9, 1.0, 0.4])
    mesh = init_device_mesh("cpu", (2,))
    for block in parts.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    for net, rows in ((student, slice(None)), (parts, slice(rank, None, 2))):
        F, dF = net(x[rows], t[rows], s[rows], y[rows], tangent=(x[rows], torch.ones_like(t[rows]), None))
        (F - (F.detach() - 1e-3 * dF).tanh()).square().mean().backward()
    expected = {k: p.grad for k, p in sd3_decm.trained(student).items() if p.grad is not None}
    assert any("lora_A" in k for k in expected)
    for name, p in sd3_decm.trained(parts).items():
        if name in expected:
            assert (p.grad.full_tensor() - expected[name]).norm() < 1e-5 * (expected[name].norm() + 1e-3), name
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)                            # gloo's threads sometimes abort when Python exits


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(half_of_the_batch, (tmp_path,), nprocs=2)
