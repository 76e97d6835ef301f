"""DE-CM on Stable Diffusion 3.5 with LoRA (DE-CM, section 5.3): the losses of decm.py on the
transformer of diffusers.

    pip install -r examples/requirements.txt
    python examples/sd3_decm.py encode --images DIR --out data/text2image       # once
    python examples/sd3_decm.py train --data data/text2image --out runs/sd3
    python examples/sd3_decm.py train --dry-run                                 # prints the memory

DIR contains images, each with its caption in a .txt file of the same name. The time of diffusers'
model is sigma, with the data at sigma = 0, and its output is the velocity from data to noise.
Therefore, with the time t = 1 - sigma of decm.py,

    F(x, t, s) = -model(x, 1000 (1 - t)),

to which the second time s adds a term in the model's embedding that is 0 before training.

The rank 64, the learning rate 5e-4 and AdamW are those of the paper. The rest is our choice:

    LoRA is in the eight projections of the attention, as in diffusers' LoRA training.
    lam = gam = 1, while the default of decm.py is 0.5.
    Both updates of Algorithm 1 are made in one step of the optimiser, and the losses are added.
    L_FM is part of both losses and counts twice in such a step.

--jvp has no choice fd. The sinusoidal features of 1000 t change so fast that the error of a central
difference is about as large as the derivative.

The weights of SD3.5 are under Stability's Community Licence, and so is a LoRA that is made from
them.
"""

import argparse
import contextlib
import pathlib
import sys
import unittest.mock

import safetensors.torch
import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import text_to_image
from text_to_image import Text

import jvp
from common.seeds import generator, seed_of
from decm import decm_loss, n2n_loss, sample_t

MODEL = "stabilityai/stable-diffusion-3.5-medium"
PROJECTIONS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
# transformer/config.json of MODEL
MEDIUM = dict(
    sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
    pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")


# --------------------------------------------------------------------------------------------------
# diffusers' transformer as a network of decm.py.

class SecondTime(nn.Module):
    """The model's embedding of time and text, plus an embedding of the second time, whose output is
    zero before it is trained."""

    def __init__(self, embed):
        super().__init__()
        self.embed = embed
        self.s = None                      # the second time of the next pass, or None
        width = embed.timestep_embedder.linear_2.out_features
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, timestep, pooled):
        emb = self.embed(timestep, pooled)
        if self.s is None:
            return emb
        features = self.embed.time_proj(self.s).to(pooled.dtype)
        return emb + self.linear_2(nn.functional.silu(self.linear_1(features)))


class Velocity(nn.Module):
    """A transformer of diffusers as a network net(x, t, s, y) for decm.py. Its times run from noise
    to data, y is a Text, and its output is float32."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, x, t, s=None, y=None, tangent=None):
        if tangent is not None:
            h = self.forward(*jvp.duals((x, t, s), tangent), y)
            return h.value, h.tangent
        embed = self.transformer.time_text_embed
        if isinstance(embed, SecondTime):
            embed.s = None if s is None else 1000 * (1 - s)
        output = self.transformer(
            hidden_states=x, timestep=1000 * (1 - t), encoder_hidden_states=y.tokens,
            pooled_projections=y.pooled, return_dict=False)[0]
        return -output.float()


def add_lora(transformer, rank):
    """The student: the frozen transformer with LoRA and a second time, which are trained."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=PROJECTIONS))
    transformer.time_text_embed = SecondTime(transformer.time_text_embed)
    return Velocity(transformer)


class Teacher(nn.Module):
    """The student's transformer without LoRA and without the second time, so that the weights are
    in memory only once."""

    def __init__(self, student):
        super().__init__()
        self.student = [student]           # a list, so that its parameters are not registered

    def forward(self, x, t, s=None, y=None):
        student = self.student[0]
        student.transformer.disable_adapters()
        try:
            return student(x, t, None, y)
        finally:
            student.transformer.enable_adapters()


def trained(student):
    """{name: parameter} of LoRA and of the second time."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def save(student, folder):
    """Writes LoRA in the format of pipe.load_lora_weights, and the embedding of the second time in
    a second file."""
    folder.mkdir(parents=True, exist_ok=True)
    lora = get_peft_model_state_dict(student.transformer)
    lora = {f"transformer.{name}": weight.contiguous() for name, weight in lora.items()}
    safetensors.torch.save_file(lora, folder / "pytorch_lora_weights.safetensors")
    second = student.transformer.time_text_embed.state_dict()
    second = {name: w for name, w in second.items() if not name.startswith("embed.")}
    safetensors.torch.save_file(second, folder / "second_time.safetensors")


def load(student, folder):
    """Loads the files of save into a student of add_lora."""
    lora = safetensors.torch.load_file(folder / "pytorch_lora_weights.safetensors")
    lora = {name.removeprefix("transformer."): weight for name, weight in lora.items()}
    set_peft_model_state_dict(student.transformer, lora)
    second = safetensors.torch.load_file(folder / "second_time.safetensors")
    student.transformer.time_text_embed.load_state_dict(second, strict=False)


# --------------------------------------------------------------------------------------------------
# A step.

def losses(student, teacher, x1, y, null, step, seed, *, w=4.5, eta=None, freq=3, way="fused"):
    """The loss of a step: L_FM + L_CM of Algorithm 1 and, in every freq-th step, L_FM + L_N2N in
    addition. Noise and times are determined by the seed and the step.

    null: the Text of the empty caption; w, eta: guidance of the teacher; way: a key of jvp.JVP.
    """
    random = generator("cpu", seed, "step", step)
    x0 = torch.randn(x1.shape, generator=random).to(x1)
    uniform, uniform_r = torch.rand((2, len(x1)), generator=random).to(x1.device)
    t = sample_t("nseg", None, uniform, 0.0, 1.0, segments=64)
    r = torch.minimum(0.02 * uniform_r, t)                 # a jump must not go back in time
    guidance = dict(teacher=teacher, y_null=null, w=w, eta=eta)
    L_fm, L_cm, (xt, v) = decm_loss(student, jvp.JVP[way], x1, x0, t, y, **guidance)
    loss = L_fm + L_cm
    if step % freq == 0:
        L_fm, L_n2n = n2n_loss(student, jvp.JVP[way], x1, x0, xt, v, r, t, y, lam=1.0, gam=1.0,
                               **guidance)
        loss = loss + L_fm + L_n2n
    return loss


# --------------------------------------------------------------------------------------------------
# Programs.

def encode(args):
    """Writes the latents and embeddings of images with captions, with a file for each image."""
    from diffusers import StableDiffusion3Pipeline
    tree, captions = text_to_image.read(args.images)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        args.model, transformer=None, torch_dtype=torch.bfloat16)
    pipe.to(args.device)
    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor

    def encode_text(text):
        tokens, _, pooled, _ = pipe.encode_prompt(
            text, text, text, do_classifier_free_guidance=False)
        return dict(tokens=tokens[0], pooled=pooled[0])

    def encode_image(pixels):
        pixels = pixels.to(args.device, torch.bfloat16) / 127.5 - 1
        z = pipe.vae.encode(pixels).latent_dist.mode()
        return ((z - shift) * scale)[0]

    text_to_image.encode(tree, captions, args.out, args.resolution, encode_text, encode_image)


def train(args):
    """Trains LoRA and the second time, and saves them every 500 steps and at the end."""
    from diffusers import SD3Transformer2DModel
    files, null = text_to_image.encoded(args.data, "sd3_decm.py")
    null = Text(null["tokens"], null["pooled"]).to(args.device)
    transformer = SD3Transformer2DModel.from_pretrained(
        args.model, subfolder="transformer", torch_dtype=torch.bfloat16)
    student = add_lora(transformer, args.rank).to(args.device)
    transformer.enable_gradient_checkpointing()
    teacher = Teacher(student)
    parameters = list(trained(student).values())
    for p in parameters:
        p.data = p.data.float()            # trained parameters are float32
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)

    for step in range(args.steps):
        samples = text_to_image.draw(files, args.batch, seed_of(args.seed, "images", step))
        x1 = samples["x1"].to(args.device).float()
        y = Text(samples["tokens"], samples["pooled"]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = losses(student, teacher, x1, y, null, step, args.seed, w=args.w,
                          freq=args.freq, way=args.jvp)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not grad_norm.isfinite():
            sys.exit(f"error: the gradient is not finite in step {step}; {args.out} has the "
                     "weights that were saved before")
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(student, pathlib.Path(args.out))


def print_memory(args):
    """Prints the memory of a step of SD3.5-Medium, estimated with fake tensors: bfloat16 weights,
    and LoRA and AdamW in float32."""
    from diffusers import SD3Transformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from common.dryrun import LivingBytes
    living = LivingBytes()
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(living)
        # peft moves its modules to the model's device, but fake weights cannot be exchanged
        stack.enter_context(unittest.mock.patch.object(nn.Module, "to", lambda net, *_, **__: net))
        torch.set_default_dtype(torch.bfloat16)
        student = add_lora(SD3Transformer2DModel(**MEDIUM), args.rank)
        torch.set_default_dtype(torch.float32)
        x = torch.zeros(args.batch, 16, args.resolution // 8, args.resolution // 8)
        y = Text(torch.zeros(args.batch, 333, 4096, dtype=torch.bfloat16),
                 torch.zeros(args.batch, 2048, dtype=torch.bfloat16))
        t = torch.full((args.batch,), 0.5)
        before = living.peak = living.collected = living.now
        with torch.autocast("cpu", torch.bfloat16):
            F_cm, dF, F_fm = jvp.JVP[args.jvp](
                student, at=(x, t, t + 0.5, y), along=(torch.zeros_like(x), 1, 0),
                also=(x, t, t, y))
            (F_cm - dF + F_fm).square().mean().backward()
        passes = living.peak - before
    total = sum(p.numel() for p in student.parameters())
    lora = sum(p.numel() for p in trained(student).values())
    kept = 2 * total + 16 * lora           # for LoRA: weights, gradients and two moments
    gib = 2 ** 30
    print(f"parameters {total / 1e9:.2f} B, of which {lora / 1e6:.1f} M are trained")
    print(f"memory {(kept + passes) / gib:.1f} GiB: {kept / gib:.1f} kept, {passes / gib:.1f} in "
          f"the passes, {args.batch} images of {args.resolution} pixels, without checkpointing")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    a = p.add_argument
    a("what", choices=["encode", "train"], help="encode images and captions, or train on them")
    a("--model", default=MODEL, help="the model, a name on Hugging Face or a folder")
    a("--images", help="encode: folder of images and captions")
    a("--data", default="data/text2image", help="train: folder that encode wrote")
    a("--out", help="folder to write")
    a("--resolution", type=int, default=512, help="height and width of the images")
    a("--steps", type=int, default=10_000, help="training steps")
    a("--batch", type=int, default=4, help="images in a step")
    a("--rank", type=int, default=64, help="rank of LoRA (5.3)")
    a("--lr", type=float, default=5e-4, help="learning rate (5.3)")
    a("--w", type=float, default=4.5, help="guidance scale of the teacher (Eq. 18)")
    a("--freq", type=int, default=3, help="steps between N2N updates")
    a("--jvp", choices=["fused", "exact"], default="fused", help="dF/dt: in one pass with F, or by "
      "torch.func.jvp")
    a("--seed", type=int, default=0, help="seed of all random numbers")
    a("--device", default="cuda", help="cuda or cpu")
    a("--dry-run", action="store_true", help="train: print the memory that a step needs, and exit")
    args = p.parse_args()
    if args.what == "train" and args.dry_run:
        print_memory(args)
        return
    if not args.out:
        p.error("--out is needed: the folder to write")
    if args.what == "encode":
        encode(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
