"""FACM on the transformer of Wan (text to image: single frames), with the loss of facm.py as it is.

    pip install -r examples/requirements.txt
    python examples/wan_facm.py encode --images DIR --out data/wan                     # once
    python examples/wan_facm.py train --data data/wan --out runs/wan                   # 1.3 B, one GPU
    torchrun --nproc_per_node=8 examples/wan_facm.py train --data data/wan --out runs/wan \\
        --model Wan-AI/Wan2.2-T2V-A14B-Diffusers
    python examples/wan_facm.py train --dry-run --size 14B --processes 8               # the memory it takes

DIR has images, each with a caption of the same name in a .txt beside it. diffusers' model has the data at
time 0, and tells the velocity from data to noise. So with facm.py's time

    F(x, t) = -model(x, 1000 (1 - t)),

and the flow's anchor 2 - t (FACM, Eq. 12) is the negative time -1000 (1 - t).

FACM's later version trains Wan 2.2 with its Chain-JVP: value and tangent go through the network together,
block by block, so FSDP holds one block at once. Here that is jvp.fused; the rules that Wan's blocks want are
below. No setting of that run is published: all numbers here are ours, those of ImageNet where they are
facm.py's. Wan 2.2 has two experts; this trains `transformer`, that of the noisier times.
The weights of Wan are under Apache-2.0.
"""

import argparse
import contextlib
import functools
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
from facm import WEIGHTS, facm_loss, sample_t

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SIZES = {                                  # transformer/config.json of MODEL, of Wan2.2-T2V-A14B
    "1.3B": dict(num_layers=30, num_attention_heads=12, ffn_dim=8960),
    "14B": dict(num_layers=40, num_attention_heads=40, ffn_dim=13824)}

# --------------------------------------------------------------------------------------------------
# The tangents of Wan's operations, for jvp.fused. y: the value of the operation.

def rms_norm(y, x, shape, weight=None, eps=None):
    """y = w x / r, r^2 = mean(x^2) + eps: dy = w (dx - x mean(x dx) / r^2) / r."""
    square = x.value.square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)
    centred = x.tangent - x.value * (x.value * x.tangent).mean(-1, keepdim=True) / square
    return centred * square.rsqrt() * (1 if weight is None else weight)


jvp.RULES |= dict(
    rms_norm=rms_norm,
    type_as=lambda y, x, other: x.tangent.to(y.dtype),
    conv3d=lambda y, x, w, b=None, *sizes: F.conv3d(x.tangent, w, None, *sizes))


def rotate(x, cos, sin):
    """The rotary embedding of x [B, L, heads, D]: pairs of channels turn by their angles."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention:
    """Wan's attention, for diffusers' set_processor: without writes in place, which have no tangent."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (a.unflatten(2, (attn.heads, -1)) for a in (q, k, v))
        if rotary_emb is not None:
            q, k = (rotate(a, *rotary_emb).to(a.dtype) for a in (q, k))
        q, k, v = (a.to(v.dtype).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


# --------------------------------------------------------------------------------------------------
# Wan as facm.py wants a network and its labels.

class Velocity(nn.Module):
    """diffusers' transformer as net(x, t, s, y): x [B, 16, H, W], time from noise to data; s is None."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        transformer.set_attn_processor(Attention())

    def forward(self, x, t, s=None, y=None, tangent=None):
        if tangent is not None:
            h = self.forward(*jvp.duals((x, t), tangent), None, y)
            return h.value, h.tangent
        with torch.autocast(x.device.type, enabled=False):             # times stay float32
            timestep = 1000 * (1 - t)
        out = self.transformer(hidden_states=x[:, :, None], timestep=timestep,
                               encoder_hidden_states=y.tokens, return_dict=False)[0]
        return -out[:, :, 0].float()


def shard(net):
    """FSDP: each block's weights are gathered when it is their turn, and then let go."""
    from torch.distributed.fsdp import fully_shard
    for block in net.transformer.blocks:
        fully_shard(block)
    fully_shard(net)


def loss(student, teacher, x1, y, null, seed, *, w=1.75, way="fused"):
    """L_FM + L_CM of facm.py's Algorithm 1, with the weights and times of ImageNet."""
    random = torch.Generator().manual_seed(seed)
    x0 = torch.randn(x1.shape, generator=random).to(x1)
    t = sample_t(torch.randn(len(x1), generator=random), -0.8, 1.6).to(x1.device)
    alpha, beta = (functools.partial(WEIGHTS[name], p=0.5) for name in ("1-t^p", "cos"))
    L_fm, L_cm = facm_loss(student, jvp.JVP[way], x1, x0, t, y, alpha=alpha, beta=beta,
                           teacher=teacher, y_null=null, w=w)
    return L_fm + L_cm


def save(net, folder):
    """The transformer as diffusers writes it: WanTransformer3DModel.from_pretrained(folder) reads it."""
    state = {k: (w.full_tensor() if hasattr(w, "full_tensor") else w).cpu().contiguous()
             for k, w in net.transformer.state_dict().items()}         # all processes gather
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        net.transformer.save_config(folder)
        part = folder / "diffusion_pytorch_model.part"                 # never half a file of that name
        safetensors.torch.save_file(state, part, {"format": "pt"})
        part.replace(folder / "diffusion_pytorch_model.safetensors")


# --------------------------------------------------------------------------------------------------
# Programs.

def encode(args):
    """Latents and embeddings of a folder of images with captions, one file an image."""
    from diffusers import WanPipeline
    tree, texts = text_to_image.read(args.images)
    pipe = WanPipeline.from_pretrained(args.model, transformer=None, transformer_2=None,
                                       torch_dtype=torch.bfloat16).to(args.device)
    mean, std = (torch.tensor(getattr(pipe.vae.config, name)).view(1, 16, 1, 1, 1).to(args.device)
                 for name in ("latents_mean", "latents_std"))

    def encode_text(text):
        return dict(tokens=pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0])

    def encode_image(x):
        z = pipe.vae.encode(x[:, :, None].to(args.device, torch.bfloat16) / 127.5 - 1).latent_dist.mode()
        return ((z.float() - mean) / std)[0, :, 0]

    text_to_image.encode(tree, texts, args.out, args.resolution, encode_text, encode_image)


def train(args):
    """Distils the model, all of its weights; saves them every 500 steps and at the end."""
    from diffusers import WanTransformer3DModel
    rank, world = (int(os.environ.get(*pair)) for pair in (("RANK", "0"), ("WORLD_SIZE", "1")))
    files, null = text_to_image.encoded(args.data, "wan_facm.py")
    device = torch.device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    load = functools.partial(WanTransformer3DModel.from_pretrained, args.model, subfolder=args.subfolder)
    student = Velocity(load(torch_dtype=torch.float32))
    student.transformer.enable_gradient_checkpointing()
    if world > 1:
        shard(student)                     # from the CPU: the device never holds the whole
    student.to(device)
    teacher = Velocity(load(torch_dtype=torch.bfloat16)).requires_grad_(False)
    if world > 1:
        shard(teacher.float())             # FSDP wants one type in each part
    teacher.to(device)
    null = Text(null["tokens"]).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(args.steps):
        seed = (args.seed * 10 ** 9 + step) * world + rank
        rows = text_to_image.draw(files, args.batch, seed)
        x1, y = rows["x1"].to(device), Text(rows["tokens"]).to(device)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            value = loss(student, teacher, x1.float(), y, null, seed, w=args.w, way=args.jvp)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        if not norm.isfinite():
            sys.exit(f"error: not finite in step {step}; {args.out} has the last sound weights")
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step + 1}: loss {value.item():.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(student, pathlib.Path(args.out))
    if world > 1:
        dist.barrier()                     # a process that leaves alone may crash at its end
        dist.destroy_process_group()


def tell_memory(args):
    """The memory of a process in a step, by fake tensors. Kept: float32 weights, gradients and AdamW,
    and the teacher, in parts of equal size; under FSDP one block of each network is whole beside them."""
    from diffusers import WanTransformer3DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from common.dryrun import LivingBytes
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        living = stack.enter_context(LivingBytes())
        student = Velocity(WanTransformer3DModel(**SIZES[args.size]))
        student.transformer.enable_gradient_checkpointing()
        n = sum(p.numel() for p in student.parameters())
        block = sum(p.numel() for p in student.transformer.blocks[0].parameters())
        side = args.resolution // 8
        x1, y = torch.zeros(args.batch, 16, side, side), Text(torch.zeros(args.batch, 512, 4096).bfloat16())
        t = torch.full((args.batch,), 0.5)
        before = living.peak = living.collected = living.now
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            F_cm, dF, F_fm = jvp.JVP[args.jvp](student, x1, t, None, y, x1, 1, 0, (x1, 2 - t, None, y))
            (F_cm - dF + F_fm).square().mean().backward()
        passes = living.peak - before - 4 * n              # the gradients are kept
    parts = args.processes
    kept = 16 * n / parts + (4 * n / parts + 2 * 4 * block if parts > 1 else 2 * n)
    print(f"parameters {n / 1e9:.2f} B\n"
          f"memory {(kept + passes) / 2 ** 30:.1f} GiB a process of {parts}: {kept / 2 ** 30:.1f} kept, "
          f"{passes / 2 ** 30:.1f} in the passes, {args.batch} images of {args.resolution} pixels")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=["encode", "train"], help="encode images and captions, or train on them")
    p.add_argument("--model", default=MODEL, help="the model, a name on Hugging Face or a folder")
    p.add_argument("--subfolder", default="transformer", help="train: transformer_2 is Wan 2.2's other expert")
    p.add_argument("--images", help="encode: folder of images and captions")
    p.add_argument("--data", default="data/wan", help="train: folder that encode wrote")
    p.add_argument("--out", required="--dry-run" not in sys.argv, help="folder to write")
    p.add_argument("--resolution", type=int, default=512, help="height and width of the images")
    p.add_argument("--steps", type=int, default=10_000, help="steps of training")
    p.add_argument("--batch", type=int, default=4, help="images a step, of each process")
    p.add_argument("--lr", type=float, default=1e-5, help="learning rate")
    p.add_argument("--w", type=float, default=1.75, help="guidance scale of the teacher (Eq. 9)")
    p.add_argument("--jvp", choices=list(jvp.JVP), default="fused", help="the derivative's way")
    p.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    p.add_argument("--device", default="cuda", help="cuda or cpu")
    p.add_argument("--dry-run", action="store_true", help="train: tell the memory, and end")
    p.add_argument("--size", choices=list(SIZES), default="1.3B", help="dry run: which model")
    p.add_argument("--processes", type=int, default=1, help="dry run: GPUs that share the weights")
    args = p.parse_args()
    (encode if args.what == "encode" else tell_memory if args.dry_run else train)(args)


if __name__ == "__main__":
    main()
