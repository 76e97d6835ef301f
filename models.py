"""Networks that the three methods share. One contract for all of them:

    net(x, t, s=None, y=None) -> same shape as x

    x  [B, C, H, W] float     a point on the flow
    t  [B] float              its time
    s  [B] float, optional    the second time (FACM's auxiliary r), if built with second_time=True
    y  [B] int64, optional    labels 0..num_classes-1; num_classes is the null label, and so is None

`net.num_classes` is 0 for an unconditional network. A forward pass draws no random numbers except
Dropout's in train mode. The time embedding is computed in float32 also under autocast, because
a derivative in time would be lost in bfloat16. Parameter names are those of public checkpoints.
"""

import itertools
import json
import math
import os
import pathlib

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# --------------------------------------------------------------------------------------------------
# DDPM++ (Song et al. 2021) in the layout of NVlabs/edm's SongUNet.

def _xavier_uniform(shape, fan_in, fan_out, gain):
    return gain * math.sqrt(6 / (fan_in + fan_out)) * (2 * torch.rand(shape) - 1)


class Linear(nn.Module):
    """[..., in_features] -> [..., out_features]; Xavier-uniform weight times gain, zero bias."""

    def __init__(self, in_features, out_features, gain=1.0):
        super().__init__()
        shape = (out_features, in_features)
        self.weight = nn.Parameter(_xavier_uniform(shape, in_features, out_features, gain))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """Convolution that keeps the size, after resampling by 2 (box filter) if `up` or `down`."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, gain=1.0):
        super().__init__()
        shape, area = (out_channels, in_channels, kernel, kernel), kernel * kernel
        self.weight = nn.Parameter(
            _xavier_uniform(shape, in_channels * area, out_channels * area, gain))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.up, self.down = up, down
        # The public layout stores the filter beside every resampling convolution.
        box = torch.full((1, 1, 2, 2), 0.25) if up or down else None
        self.register_buffer("resample_filter", box)

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(nn.Module):
    """Group normalisation: at least 4 channels a group, at most 32 groups."""

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups; "
                             "take a width that is a multiple of 32 (below 128 channels, of 4)")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        # Inside this call the affine would make torch.compile fail on the forward-mode derivative.
        x = F.group_norm(x, self.groups, eps=self.eps)
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class Dropout(nn.Dropout):
    """nn.Dropout whose mask follows from the random state and the shape alone, not from precision
    or memory layout: these differ between the passes of a step, the mask must not."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape, device=x.device) >= self.p
        return x * kept / (1 - self.p)


class UNetBlock(nn.Module):
    """Residual block, optionally resampling by 2 and followed by single-head self-attention.

    x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W'].
    adaptive_scale: the embedding scales the second normalisation and shifts it; else it is added.
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout, adaptive_scale,
                 up=False, down=False, attention=False):
        super().__init__()
        self.adaptive_scale = adaptive_scale
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        self.skip = None
        if up or down or in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, 1, up=up, down=down)
        self.norm2 = None
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))                          # [B, C, H', W']
        params = self.affine(emb)[:, :, None, None]                    # [B, C or 2C, 1, 1]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + params)
        h = self.conv1(self.dropout(F.silu(h)))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is not None:
            B, C, H, W = x.shape
            # Written out, because fused attention has no forward-mode derivative; float32 or more.
            qkv = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W)
            q, k, v = qkv.unbind(2)                                    # [B, C, HW] each
            q, k = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (q, k))
            weights = (q.transpose(1, 2) @ k / math.sqrt(C)).softmax(dim=-1)
            h = v @ weights.to(v.dtype).transpose(1, 2)                # [B, C, HW]
            x = (self.proj(h.reshape(B, C, H, W)) + x) * math.sqrt(0.5)
        return x


class TimeFeatures(nn.Module):
    """Sines and cosines of a time [B] at frequencies from 1 to 1e-4: [B, channels]."""

    def __init__(self, channels):
        super().__init__()
        self.half = channels // 2

    def forward(self, t):
        exponent = torch.arange(self.half, dtype=t.dtype, device=t.device) / (self.half - 1)
        angle = t[:, None] * (1e-4 ** exponent)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class DDPMpp(nn.Module):
    """DDPM++ U-Net (Song et al. 2021), in the layout of NVlabs/edm's SongUNet.

    resolution      height and width of x; channels: C of x
    width, mult     channels at full resolution, and their multiples as the resolution halves
    blocks          residual blocks at each resolution
    attention       the resolutions with self-attention; the lowest always has one
    adaptive_scale  the embedding scales and shifts (as in ADM) instead of being added
    second_time     builds map_second, zero at its output: it changes nothing before it is trained
    sigma_data      standard deviation of the data, for the preconditioning; None: none
    time_scale      the features are those of time_scale t

    With sigma_data the output is c_skip(t) x + c_out(t) U(c_in(t) x, t): EDM's preconditioning of
    the denoiser (Karras et al. 2022, Table 1), written for the velocity of the linear flow
    x_t = (1-t) x_0 + t x_1 with x_0 ~ N(0, I); then 1 < t <= 2 is the flow time 2 - t (FACM's
    expanded interval). Raises ValueError for sizes that do not divide.
    """

    def __init__(self, resolution, channels=3, num_classes=0, width=128, mult=(2, 2, 2), blocks=4,
                 attention=(16,), dropout=0.0, adaptive_scale=False, second_time=False,
                 sigma_data=None, time_scale=1.0):
        super().__init__()
        if resolution % 2 ** (len(mult) - 1):
            raise ValueError(f"{len(mult)} resolutions need a size that is divisible by "
                             f"{2 ** (len(mult) - 1)}; {resolution} is not")
        self.num_classes, self.second_time = num_classes, second_time
        self.sigma_data, self.time_scale = sigma_data, time_scale
        emb_channels = 4 * width

        self.map_noise = TimeFeatures(width)
        self.map_label = Linear(num_classes, width) if num_classes else None
        self.map_second = None
        if second_time:
            self.map_second = nn.Sequential(
                Linear(width, width), nn.SiLU(), Linear(width, width, gain=0.0))
        self.map_layer0 = Linear(width, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        def block(cin, cout, **options):
            return UNetBlock(cin, cout, emb_channels, dropout, adaptive_scale, **options)

        self.enc, skips, cout = nn.ModuleDict(), [], width
        for level, m in enumerate(mult):
            res = resolution >> level
            name = f"{res}x{res}"
            self.enc[f"{name}_down" if level else f"{name}_conv"] = (
                block(cout, cout, down=True) if level else Conv2d(channels, width, 3))
            skips.append(cout)
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = block(cout, width * m, attention=res in attention)
                cout = width * m
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, m in reversed(list(enumerate(mult))):
            res = resolution >> level
            name = f"{res}x{res}"
            if level == len(mult) - 1:
                self.dec[f"{name}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{name}_in1"] = block(cout, cout)
            else:
                self.dec[f"{name}_up"] = block(cout, cout, up=True)
            for i in range(blocks + 1):
                self.dec[f"{name}_block{i}"] = block(
                    cout + skips.pop(), width * m, attention=i == blocks and res in attention)
                cout = width * m
        self.dec[f"{name}_aux_norm"] = GroupNorm(cout)
        self.dec[f"{name}_aux_conv"] = Conv2d(cout, channels, 3, gain=1e-5)

    def embed(self, t, s, y):
        """The conditioning vector [B, 4 width], float32."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.map_layer0.weight.dtype
            emb = self.map_noise(self.time_scale * t.to(dtype))
            if self.map_second is not None:
                emb = emb + self.map_second(self.map_noise(self.time_scale * s.to(dtype)))
            if self.map_label is not None:
                if y is None:
                    y = torch.full_like(t, self.num_classes, dtype=torch.int64)
                onehot = F.one_hot(y, self.num_classes + 1)[:, :-1].to(emb)    # null label: zeros
                emb = emb + self.map_label(onehot * math.sqrt(self.num_classes))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, t, s=None, y=None):
        if (s is None) == self.second_time:
            raise ValueError("the second time s goes with second_time=True, and only with it")
        emb = self.embed(t, s, y)
        h = x
        if self.sigma_data is not None:
            flow_t = (1 - (1 - t).abs())[:, None, None, None]
            var = (1 - flow_t) ** 2 + (flow_t * self.sigma_data) ** 2          # of x_t
            h = var.rsqrt() * x                                                # c_in x

        skips = []
        for name, layer in self.enc.items():
            h = layer(h) if name.endswith("_conv") else layer(h, emb)
            skips.append(h)
        for name, layer in self.dec.items():
            if "_block" in name:
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            elif name.endswith("_aux_norm"):
                h = F.silu(layer(h))
            elif name.endswith("_aux_conv"):
                h = layer(h)
            else:
                h = layer(h, emb)

        if self.sigma_data is not None:
            c_skip = (flow_t * self.sigma_data ** 2 - (1 - flow_t)) / var
            h = c_skip * x + self.sigma_data * var.rsqrt() * h                 # c_skip x + c_out U
        return h


# --------------------------------------------------------------------------------------------------

NETWORKS = {"DDPM++": DDPMpp}


def create(name, **options):
    """The network `name` of NETWORKS with its constructor's options.

    Raises ValueError for an unknown name, an unknown option or sizes that do not fit together.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there is: {', '.join(NETWORKS)}")
    try:
        # Convolutions are a tenth faster with the channels last in memory (CPU).
        return NETWORKS[name](**options).to(memory_format=torch.channels_last)
    except TypeError as e:
        raise ValueError(f"network {name}: {e}") from None


# --------------------------------------------------------------------------------------------------
# Checkpoints and run directories.

def save_checkpoint(path, checkpoint):
    """Writes a dict of plain values and tensors to a file beside `path` (a pathlib.Path), then
    renames it: a kill at any moment leaves the old checkpoint or the new one."""
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def read_checkpoint(path):
    """What a checkpoint file holds, on the CPU; nothing in it is executed.

    Returns a dict with method, args, step, model, ema, optimizer and torch_version.
    Raises ValueError if the file is missing, damaged or of another kind.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as e:
        raise ValueError(f"{path} is no readable checkpoint, truncated or foreign "
                         f"({type(e).__name__})") from None
    needed = {"method", "args", "step", "model", "ema"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of facm.py, decm.py or gcm.py")
    return checkpoint


def load_weights(net, weights, path, may_lack=()):
    """net.load_state_dict, strict but for missing names that begin with one of `may_lack`.

    Raises ValueError, before net is changed, with the first parameter of the file `path` that is
    missing, unexpected or of another shape.
    """
    own = net.state_dict()
    problems = {
        "lacks": [k for k in own if k not in weights and not k.startswith(tuple(may_lack))],
        "has the unknown": [k for k in weights if k not in own],
        "has another shape of": [
            k for k in weights if k in own and own[k].shape != weights[k].shape],
    }
    for what, names in problems.items():
        if names:
            raise ValueError(f"{path} does not fit this network: it {what} {names[0]} "
                             f"(and {len(names) - 1} more)")
    net.load_state_dict(weights, strict=False)


MAY_CHANGE = "steps save_every log_every preview_every device accum fresh out".split()


def open_run(args, method, rank):
    """The run directory and its newest checkpoint, or None. --fresh renames an old directory to
    NAME.old-K. Raises ValueError if the run is another method's, or was begun with other flags."""
    out = pathlib.Path(args.out)
    if rank == 0:
        if args.fresh and out.exists():
            names = (out.with_name(f"{out.name}.old-{k}") for k in itertools.count(1))
            old = out.rename(next(name for name in names if not name.exists()))
            print(f"--fresh: the old run is now {old}")
        out.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()
    if not (out / "ckpt.pt").exists():
        return out, None
    checkpoint = read_checkpoint(out / "ckpt.pt")
    if checkpoint["method"] != method:
        raise ValueError(f"{out} is a run of {checkpoint['method']}.py; use --out or --fresh")
    for name, old in checkpoint["args"].items():
        new = getattr(args, name, None)
        if new != old and (name not in MAY_CHANGE or name == "steps" and args.lr_final < 1):
            raise ValueError(f"{out} was begun with {name} {old}, not {new}; use --out or --fresh")
    return out, checkpoint


def open_log(path, step):
    """log.jsonl, opened to append to, without the lines that a killed run left past `step`."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(n for n in lines if n.endswith("\n") and json.loads(n)["step"] <= step))
    return open(path, "a", buffering=1)
