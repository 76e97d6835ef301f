"""FACM on the transformer of Wan, for single frames (text to image): the loss of facm.py on the
transformer of diffusers.

    pip install -r examples/requirements.txt
    python examples/wan_facm.py encode --images DIR --out data/wan                     # once
    python examples/wan_facm.py train --data data/wan --out runs/wan                   # one GPU
    torchrun --nproc_per_node=8 examples/wan_facm.py train --data data/wan --out runs/wan \\
        --model Wan-AI/Wan2.2-T2V-A14B-Diffusers
    python examples/wan_facm.py train --dry-run --size A14B --processes 8      # prints the memory

DIR contains images, each with its caption in a .txt file of the same name. diffusers' model has the
data at time 0, and its output is the velocity from data to noise. Therefore, with the time t of
facm.py,

    F(x, t) = -model(x, 1000 (1 - t)),

and the time 2 - t of FACM's anchor is the negative time -1000 (1 - t).

A later version of the FACM paper trains Wan 2.2 with its Chain-JVP: value and tangent are computed
together, block by block, so that FSDP gathers one block at a time. Here jvp.fused does this. We
know no settings of that run. The hyper-parameters are our choice, or those of facm.py on ImageNet.

Wan 2.2 A14B has two transformers, called experts: `transformer` for the timesteps from a boundary
on (875 of 1000), and `transformer_2` for the less noisy ones below it, where 93% of FACM's times
are. The teacher uses both, each at its own times. The student is one network for all times, which
begins with the weights of `transformer`, because sampling starts at its times.

--jvp has no choice fd. The sinusoidal features of 1000 t change so fast that the error of a central
difference is about as large as the derivative. The weights of Wan are under Apache-2.0.
"""

import argparse
import contextlib
import os
import pathlib
import sys

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import text_to_image
from text_to_image import Text

import jvp
from common.seeds import generator, seed_of
from facm import facm_loss, sample_t, wide

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
# From transformer/config.json of MODEL, of Wan2.1-T2V-14B, and of an expert of Wan2.2-T2V-A14B
SIZES = {
    "1.3B": dict(num_layers=30, num_attention_heads=12, ffn_dim=8960),
    "14B": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824),
    "A14B": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824),
}

# --------------------------------------------------------------------------------------------------
# diffusers' transformer as a network of facm.py.

def rotate(x, cos, sin):
    """The rotary embedding of x [B, L, heads, D], which rotates pairs of channels."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention:
    """Wan's attention for diffusers' set_attn_processor. It does not write in place, because
    jvp.fused has no tangent for that."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                 rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(source).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        q, k = q.to(v.dtype), k.to(v.dtype)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        h = h.transpose(1, 2).flatten(2)
        linear, dropout = attn.to_out
        return dropout(linear(h))


class Velocity(nn.Module):
    """A transformer of diffusers as a network net(x, t, s, y) for facm.py. x is [B, 16, H, W], the
    times run from noise to data, s is None, y is a Text, and the output is float32."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        transformer.set_attn_processor(Attention())

    def forward(self, x, t, s=None, y=None, tangent=None):
        if tangent is not None:
            h = self.forward(*jvp.duals((x, t, s), tangent), y)
            return h.value, h.tangent
        frames = x[:, :, None]             # one frame
        output = self.transformer(
            hidden_states=frames, timestep=1000 * (1 - t), encoder_hidden_states=y.tokens,
            return_dict=False)[0]
        return -output[:, :, 0].float()


class Experts(nn.Module):
    """The velocity of two networks: `noisy` at the timesteps 1000 (1 - t) from `boundary` on, and
    `clean` below it."""

    def __init__(self, noisy, clean, boundary):
        super().__init__()
        self.noisy, self.clean, self.boundary = noisy, clean, boundary

    def forward(self, x, t, s=None, y=None):
        is_noisy = wide(1000 * (1 - t) >= self.boundary, x)
        # Both receive all samples, because with FSDP every process has to call both
        return torch.where(is_noisy, self.noisy(x, t, None, y), self.clean(x, t, None, y))


def boundary_of(model):
    """The timestep from which on Wan 2.2 uses `transformer`; below it, it uses `transformer_2`.
    None for a model that has only `transformer`."""
    from diffusers import WanPipeline
    ratio = WanPipeline.load_config(model).get("boundary_ratio")
    return None if ratio is None else 1000 * ratio


def shard(net):
    """FSDP: the weights of a block are gathered when it is computed, and then freed."""
    from torch.distributed.fsdp import fully_shard
    for block in net.transformer.blocks:
        fully_shard(block)
    fully_shard(net)


def load(model, subfolder, dtype, device, sharded):
    """The Velocity of a transformer on the device, with FSDP if `sharded`."""
    from diffusers import WanTransformer3DModel
    net = Velocity(WanTransformer3DModel.from_pretrained(
        model, subfolder=subfolder, torch_dtype=dtype))
    if sharded:
        shard(net)                         # on the CPU, so the device never has all weights
    return net.to(device)


def load_teacher(model, device, sharded):
    """The frozen teacher: the transformer, or both experts of Wan 2.2. With FSDP it is float32,
    because FSDP needs one dtype in a block, and some of Wan's layers are always float32."""
    dtype = torch.float32 if sharded else torch.bfloat16
    teacher = load(model, "transformer", dtype, device, sharded)
    boundary = boundary_of(model)
    if boundary is not None:
        clean = load(model, "transformer_2", dtype, device, sharded)
        teacher = Experts(teacher, clean, boundary)
    return teacher.requires_grad_(False)


def save(net, folder):
    """Writes the transformer in the format of WanTransformer3DModel.from_pretrained(folder)."""
    weights = {}
    for name, weight in net.transformer.state_dict().items():
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()  # all processes gather it
        weights[name] = weight.cpu().contiguous()
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    net.transformer.save_config(folder)
    part = folder / "diffusion_pytorch_model.part"         # renamed when it is complete
    safetensors.torch.save_file(weights, part, {"format": "pt"})
    part.replace(folder / "diffusion_pytorch_model.safetensors")


# --------------------------------------------------------------------------------------------------
# A step.

def loss(student, teacher, x1, y, null, seed, *, w=1.75, way="fused"):
    """L_FM + L_CM of Algorithm 1, with the weights of facm.py and the times of ImageNet. Noise and
    times are determined by the seed.

    null: the Text of the empty caption; w: guidance of the teacher; way: a key of jvp.JVP.
    """
    random = generator("cpu", seed, "noise")
    x0 = torch.randn(x1.shape, generator=random).to(x1)
    t = sample_t(torch.randn(len(x1), generator=random), P_mean=-0.8, P_std=1.6).to(x1.device)
    L_fm, L_cm = facm_loss(student, jvp.JVP[way], x1, x0, t, y, teacher=teacher, y_null=null, w=w)
    return L_fm + L_cm


# --------------------------------------------------------------------------------------------------
# Programs.

def encode(args):
    """Writes the latents and embeddings of images with captions, with a file for each image."""
    from diffusers import WanPipeline
    tree, captions = text_to_image.read(args.images)
    pipe = WanPipeline.from_pretrained(
        args.model, transformer=None, transformer_2=None, torch_dtype=torch.bfloat16)
    pipe.to(args.device)
    mean = torch.tensor(pipe.vae.config.latents_mean, device=args.device).view(1, 16, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std, device=args.device).view(1, 16, 1, 1, 1)

    def encode_text(text):
        tokens, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        return dict(tokens=tokens[0])

    def encode_image(pixels):
        frames = pixels[:, :, None].to(args.device, torch.bfloat16) / 127.5 - 1
        z = pipe.vae.encode(frames).latent_dist.mode()
        return ((z.float() - mean) / std)[0, :, 0]

    text_to_image.encode(tree, captions, args.out, args.resolution, encode_text, encode_image)


def train(args):
    """Trains all weights of the student, and saves them every 500 steps and at the end."""
    files, null = text_to_image.encoded(args.data, "wan_facm.py")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    student = load(args.model, "transformer", torch.float32, device, sharded=world > 1)
    student.transformer.enable_gradient_checkpointing()
    teacher = load_teacher(args.model, device, sharded=world > 1)
    null = Text(null["tokens"]).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.999),
                                  weight_decay=0.0)

    for step in range(args.steps):
        samples = text_to_image.draw(files, args.batch, seed_of(args.seed, "images", step, rank))
        x1 = samples["x1"].to(device).float()
        y = Text(samples["tokens"]).to(device)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            value = loss(student, teacher, x1, y, null, seed_of(args.seed, step, rank), w=args.w,
                         way=args.jvp)
        value.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        if not grad_norm.isfinite():
            sys.exit(f"error: the gradient is not finite in step {step}; {args.out} has the "
                     "weights that were saved before")
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step + 1}: loss {value.item():.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(student, pathlib.Path(args.out))
    if world > 1:
        dist.barrier()                     # a process that leaves the group alone may crash
        dist.destroy_process_group()


def print_memory(args):
    """Prints the memory of a process in a step, estimated with fake tensors. "Kept" are the float32
    weights, gradients and moments of the student, and the weights of the teacher, divided by the
    number of processes. With FSDP one gathered block of the student and one of the teacher are
    added."""
    from diffusers import WanTransformer3DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from common.dryrun import LivingBytes
    living = LivingBytes()
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(living)
        student = Velocity(WanTransformer3DModel(**SIZES[args.size]))
        student.transformer.enable_gradient_checkpointing()
        x = torch.zeros(args.batch, 16, args.resolution // 8, args.resolution // 8)
        y = Text(torch.zeros(args.batch, 512, 4096, dtype=torch.bfloat16))
        t = torch.full((args.batch,), 0.5)
        before = living.peak = living.collected = living.now
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            F_cm, dF, F_fm = jvp.JVP[args.jvp](
                student, at=(x, t, None, y), along=(x, 1, 0), also=(x, 2 - t, None, y))
            (F_cm - dF + F_fm).square().mean().backward()
        passes = living.peak - before
    n = sum(p.numel() for p in student.parameters())
    block = sum(p.numel() for p in student.transformer.blocks[0].parameters())
    experts = 2 if args.size == "A14B" else 1
    passes -= 4 * n                        # the gradients, which are kept
    if args.processes == 1:
        kept = 16 * n + 2 * n * experts    # the teacher is bfloat16
    else:
        kept = (16 * n + 4 * n * experts) / args.processes + 2 * 4 * block
    gib = 2 ** 30
    print(f"parameters {n / 1e9:.2f} B")
    print(f"memory {(kept + passes) / gib:.1f} GiB a process of {args.processes}: "
          f"{kept / gib:.1f} kept, {passes / gib:.1f} in the passes, {args.batch} images of "
          f"{args.resolution} pixels")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    a = p.add_argument
    a("what", choices=["encode", "train"], help="encode images and captions, or train on them")
    a("--model", default=MODEL, help="the model, a name on Hugging Face or a folder")
    a("--images", help="encode: folder of images and captions")
    a("--data", default="data/wan", help="train: folder that encode wrote")
    a("--out", help="folder to write")
    a("--resolution", type=int, default=512, help="height and width of the images")
    a("--steps", type=int, default=10_000, help="training steps")
    a("--batch", type=int, default=4, help="images in a step of a process")
    a("--lr", type=float, default=1e-5, help="learning rate")
    a("--w", type=float, default=1.75, help="guidance scale of the teacher (Eq. 9)")
    a("--jvp", choices=["fused", "exact"], default="fused", help="dF/dt: in one pass with F, or by "
      "torch.func.jvp (one process)")
    a("--seed", type=int, default=0, help="seed of all random numbers")
    a("--device", default="cuda", help="cuda or cpu")
    a("--dry-run", action="store_true", help="train: print the memory that a step needs, and exit")
    a("--size", choices=list(SIZES), default="1.3B", help="--dry-run: the model")
    a("--processes", type=int, default=1, help="--dry-run: GPUs that hold the weights")
    args = p.parse_args()
    if args.what == "train" and args.dry_run:
        print_memory(args)
        return
    if not args.out:
        p.error("--out is needed: the folder to write")
    if args.jvp == "exact" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        p.error("--jvp exact: torch.func.jvp does not see sharded weights; use --jvp fused")
    if args.what == "encode":
        encode(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
