"""DE-CM on Stable Diffusion 3.5 with LoRA (DE-CM, section 5.3): the losses of decm.py, as they are, on
the transformer of diffusers.

    pip install -r examples/requirements.txt
    python examples/sd3_decm.py encode --images DIR --out data/text2image       # once
    python examples/sd3_decm.py train --data data/text2image --out runs/sd3
    python examples/sd3_decm.py train --dry-run                                 # the memory it takes

DIR has images, each with a caption of the same name in a .txt beside it. diffusers' model has the data at
sigma = 0, and tells the velocity from data to noise. So with decm.py's time, sigma = 1 - t, and

    F(x, t, s) = -model(x, 1000 (1 - t))  +  what the second time s adds, which is 0 at first.

The paper names the rank 64, the rate 5e-4 and AdamW. Which layers have LoRA is ours: the eight projections of
the attention, as diffusers' own LoRA training has them. The weights of SD3.5 are under Stability's Community
Licence, and so is a LoRA made from them.
"""

import argparse
import contextlib
import pathlib
import sys

import safetensors.torch
import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model_state_dict

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import text_to_image
from text_to_image import Text

import jvp
from decm import WEIGHTS, decm_loss, n2n_loss, sample_t

MODEL = "stabilityai/stable-diffusion-3.5-medium"
PROJECTIONS = [f"attn.{name}" for name in (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
# transformer/config.json of MODEL
MEDIUM = dict(
    sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
    pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")


class SecondTime(nn.Module):
    """The model's embedding of time and text, plus one of the second time, zero at its output."""

    def __init__(self, embed):
        super().__init__()
        self.embed, self.s = embed, None
        width = embed.timestep_embedder.linear_2.out_features
        self.linear_1, self.linear_2 = nn.Linear(256, width), nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, timestep, pooled):
        emb = self.embed(timestep, pooled)
        if self.s is None:
            return emb
        second = self.linear_1(self.embed.time_proj(self.s).to(pooled.dtype))
        return emb + self.linear_2(nn.functional.silu(second))


class Velocity(nn.Module):
    """diffusers' transformer as decm.py wants a network: net(x, t, s, y), time from noise to data."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.second_time = isinstance(transformer.time_text_embed, SecondTime)

    def forward(self, x, t, s=None, y=None, tangent=None):
        if tangent is not None:
            h = self.forward(*jvp.duals((x, t, s), tangent), y)
            return h.value, h.tangent
        with torch.autocast(x.device.type, enabled=False):             # times stay float32
            timestep = 1000 * (1 - t)
        if self.second_time:
            self.transformer.time_text_embed.s = None if s is None else 1000 * (1 - s)
        return -self.transformer(hidden_states=x, timestep=timestep, encoder_hidden_states=y.tokens,
                                 pooled_projections=y.pooled, return_dict=False)[0]


def add_lora(transformer, rank):
    """Freezes the transformer, and gives it LoRA and a second time, which are trained."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                       target_modules=PROJECTIONS))
    transformer.time_text_embed = SecondTime(transformer.time_text_embed)
    return Velocity(transformer)


class Teacher(nn.Module):
    """The same transformer without LoRA and without a second time: its weights are held once."""

    def __init__(self, student):
        super().__init__()
        self.student = [student]           # in a list: its parameters are the student's

    def forward(self, x, t, s=None, y=None):
        transformer = self.student[0].transformer
        transformer.disable_adapters()
        try:
            return self.student[0](x, t, None, y)
        finally:
            transformer.enable_adapters()


def trained(student):
    """{name: parameter} of LoRA and the second time."""
    return {k: p for k, p in student.named_parameters() if p.requires_grad}


def save(student, folder):
    """LoRA as pipe.load_lora_weights takes it, and the second time's embedding beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lora = get_peft_model_state_dict(student.transformer)
    safetensors.torch.save_file({f"transformer.{k}": w.contiguous() for k, w in lora.items()},
                                folder / "pytorch_lora_weights.safetensors")
    second = student.transformer.time_text_embed
    safetensors.torch.save_file(
        {k: w for k, w in second.state_dict().items() if not k.startswith("embed.")},
        folder / "second_time.safetensors")


def load(student, folder):
    """What save wrote, into a student of add_lora."""
    from peft import set_peft_model_state_dict
    lora = safetensors.torch.load_file(folder / "pytorch_lora_weights.safetensors")
    set_peft_model_state_dict(
        student.transformer, {k.removeprefix("transformer."): w for k, w in lora.items()})
    second = safetensors.torch.load_file(folder / "second_time.safetensors")
    student.transformer.time_text_embed.load_state_dict(second, strict=False)


def losses(student, teacher, x1, y, null, step, seed, *, w=4.5, eta=None, freq=3, way="fused"):
    """L_FM + L_CM of decm.py's Algorithm 1 and, in every freq-th step, L_FM + L_N2N."""
    random = torch.Generator().manual_seed(seed + step)
    x0 = torch.randn(x1.shape, generator=random).to(x1)
    normal, uniform, r = torch.rand((3, len(x1)), generator=random).to(x1.device)
    t = sample_t("nseg", normal, uniform, 0, 1, 64)
    guidance = dict(teacher=teacher, y_null=null, w=w, eta=eta)
    L_fm, L_cm, (xt, v) = decm_loss(student, jvp.JVP[way], x1, x0, t, y, w1=WEIGHTS["1"], **guidance)
    loss = L_fm + L_cm
    if step % freq == 0:
        L_fm, L_n2n = n2n_loss(student, jvp.JVP[way], x1, x0, xt, v, 0.02 * r, t.clamp(min=0.02), y,
                               lam=1.0, gam=1.0, w2=WEIGHTS["1"], **guidance)
        loss = loss + L_fm + L_n2n
    return loss


def encode(args):
    """Latents and embeddings of a folder of images with captions, one file an image."""
    from diffusers import StableDiffusion3Pipeline
    tree, texts = text_to_image.read(args.images)
    pipe = StableDiffusion3Pipeline.from_pretrained(args.model, transformer=None, torch_dtype=torch.bfloat16)
    pipe.to(args.device)

    def encode_text(text):
        tokens, _, pooled, _ = pipe.encode_prompt(text, text, text, do_classifier_free_guidance=False)
        return dict(tokens=tokens[0], pooled=pooled[0])

    def encode_image(x):
        z = pipe.vae.encode(x.to(args.device, torch.bfloat16) / 127.5 - 1).latent_dist.mode()
        return ((z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)[0]

    text_to_image.encode(tree, texts, args.out, args.resolution, encode_text, encode_image)


def train(args):
    """Trains LoRA and the second time; saves them every 500 steps and at the end."""
    from diffusers import SD3Transformer2DModel
    if args.dry_run:
        return tell_memory(args)
    files, null = text_to_image.encoded(args.data, "sd3_decm.py")
    transformer = SD3Transformer2DModel.from_pretrained(args.model, subfolder="transformer",
                                                        torch_dtype=torch.bfloat16)
    student = add_lora(transformer, args.rank).to(args.device)
    transformer.enable_gradient_checkpointing()
    for p in trained(student).values():
        p.data = p.data.float()            # what is trained is float32
    teacher, null = Teacher(student), Text(null["tokens"], null["pooled"]).to(args.device)
    optimizer = torch.optim.AdamW(trained(student).values(), lr=args.lr, weight_decay=0.0)
    for step in range(args.steps):
        rows = text_to_image.draw(files, args.batch, seed=step)
        x1, y = rows["x1"].to(args.device), Text(rows["tokens"], rows["pooled"]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = losses(student, teacher, x1.float(), y, null, step, args.seed,
                          w=args.w, freq=args.freq, way=args.jvp)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(student).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not loss.isfinite():
            sys.exit(f"error: not finite in step {step}; {args.out} has the last sound weights")
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(student, pathlib.Path(args.out))


def tell_memory(args):
    """The memory of a step of SD3.5-Medium by fake tensors: bfloat16 weights, float32 LoRA and AdamW."""
    from diffusers import SD3Transformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from common.dryrun import LivingBytes
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        living = stack.enter_context(LivingBytes())
        nn.Module.to = lambda net, *_, **__: net                       # it cannot change fake weights
        torch.set_default_dtype(torch.bfloat16)
        student = add_lora(SD3Transformer2DModel(**MEDIUM), args.rank)
        torch.set_default_dtype(torch.float32)
        n = sum(p.numel() for p in student.parameters())
        lora = sum(p.numel() for p in trained(student).values())
        side, L = args.resolution // 8, 333
        x1 = torch.zeros(args.batch, 16, side, side)
        y = Text(torch.zeros(args.batch, L, 4096).bfloat16(), torch.zeros(args.batch, 2048).bfloat16())
        before = living.peak = living.collected = living.now
        with torch.autocast("cpu", torch.bfloat16):
            v = torch.zeros_like(x1)
            t = torch.full((args.batch,), 0.5)
            F_cm, dF, F_fm = jvp.JVP[args.jvp](student, x1, t, t + 0.5, y, v, 1, 0, (x1, t, t, y))
            (F_cm - dF + F_fm).square().mean().backward()
        passes = living.peak - before
    kept = 2 * n + 16 * lora
    print(f"parameters {n / 1e9:.2f} B, of which {lora / 1e6:.1f} M are trained\n"
          f"memory {(kept + passes) / 2 ** 30:.1f} GiB: {kept / 2 ** 30:.1f} kept, {passes / 2 ** 30:.1f} in the passes, "
          f"{args.batch} images of {args.resolution} pixels, without checkpointing")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=["encode", "train"], help="encode images and captions, or train on them")
    p.add_argument("--model", default=MODEL, help="the model, a name on Hugging Face or a folder")
    p.add_argument("--images", help="encode: folder of images and captions")
    p.add_argument("--data", default="data/text2image", help="train: folder that encode wrote")
    p.add_argument("--out", required="--dry-run" not in sys.argv, help="folder to write")
    p.add_argument("--resolution", type=int, default=512, help="height and width of the images")
    p.add_argument("--steps", type=int, default=10_000, help="steps of training")
    p.add_argument("--batch", type=int, default=4, help="images a step")
    p.add_argument("--rank", type=int, default=64, help="rank of LoRA (5.3)")
    p.add_argument("--lr", type=float, default=5e-4, help="learning rate (5.3)")
    p.add_argument("--w", type=float, default=4.5, help="guidance scale of the teacher (Eq. 18)")
    p.add_argument("--freq", type=int, default=3, help="steps between N2N updates")
    p.add_argument("--jvp", choices=list(jvp.JVP), default="fused", help="the derivative's way")
    p.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    p.add_argument("--device", default="cuda", help="cuda or cpu")
    p.add_argument("--dry-run", action="store_true", help="train: tell the memory, and end")
    args = p.parse_args()
    (encode if args.what == "encode" else train)(args)


if __name__ == "__main__":
    main()
