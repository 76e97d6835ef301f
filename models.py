"""Networks that the three methods share. One contract for all of them:

    net(x, t, s=None, y=None) -> same shape and type as x

    x  [B, C, H, W] float     a point on the flow
    t  [B] float              its time
    s  [B] float, optional    the second time (FACM's auxiliary r), if built with second_time=True
    y  [B] int64, optional    labels 0..num_classes-1; num_classes is the null label, and so is None

With tangent=(dx, dt, ds) it is (F, dF): the same F, with gradient, and from the same pass, without
gradient, its derivative in that direction of (x, t, s); None is no motion (jvp.py).

`net.num_classes` is 0 for an unconditional network; `net.expandable` says that it tells the times
t and 2 - t apart, as FACM's expanded interval needs. A forward pass draws no random numbers except
Dropout's in train mode. The time embedding is computed in float32 also under autocast, because
a derivative in time would be lost in bfloat16. Parameter names are those of public checkpoints.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from jvp import duals


def run_block(net, block, *inputs):
    """block(*inputs), which the backward pass computes anew if net.grad_checkpoint: less memory."""
    if getattr(net, "grad_checkpoint", False) and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def _check_second_time(net, s):
    if (s is None) == net.second_time:
        raise ValueError("the second time s goes with second_time=True, and only with it")


# --------------------------------------------------------------------------------------------------
# DDPM++ and NCSN++ (Song et al. 2021) in the layout of NVlabs/edm's SongUNet.

def _xavier_uniform(shape, fan_in, fan_out, gain):
    return gain * math.sqrt(6 / (fan_in + fan_out)) * (2 * torch.rand(shape) - 1)


class Linear(nn.Module):
    """[..., in_features] -> [..., out_features]; Xavier-uniform weight times gain, zero bias."""

    def __init__(self, in_features, out_features, gain=1.0, bias=True):
        super().__init__()
        shape = (out_features, in_features)
        self.weight = nn.Parameter(_xavier_uniform(shape, in_features, out_features, gain))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """Convolution that keeps the size, after resampling by 2 if `up` or `down`.

    taps: the resampling filter, (1, 1) a box or (1, 3, 3, 1); last: filter after the convolution.
    """

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, gain=1.0,
                 taps=(1, 1), last=False):
        super().__init__()
        shape, area = (out_channels, in_channels, kernel, kernel), kernel * kernel
        self.weight = nn.Parameter(
            _xavier_uniform(shape, in_channels * area, out_channels * area, gain))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.up, self.down, self.last = up, down, last
        # The public layout stores the filter beside every resampling convolution.
        f = torch.tensor(taps, dtype=torch.float32)
        f = (f[:, None] * f / f.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", f if up or down else None)

    def resample(self, x, padding):
        """x [B, C, H, W] at twice or half the size, filtered channel by channel."""
        channels, taps = x.shape[1], self.resample_filter.shape[-1]
        if taps == 2:                      # means of 2 x 2 pixels, or each pixel four times
            return F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        f = self.resample_filter.to(x.dtype).tile(channels, 1, 1, 1)
        if self.up:
            return F.conv_transpose2d(x, 4 * f, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, f, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        padding = self.weight.shape[-1] // 2
        if self.resample_filter is None:
            return F.conv2d(x, self.weight, self.bias, padding=padding)
        filter_padding = self.resample_filter.shape[-1] // 2 - 1
        if self.last:
            x = F.conv2d(x, self.weight, padding=padding + filter_padding)
            return self.resample(x, 0) + self.bias[:, None, None]
        return F.conv2d(self.resample(x, filter_padding), self.weight, self.bias, padding=padding)


class GroupNorm(nn.Module):
    """Group normalisation: at least 4 channels a group, at most 32 groups."""

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups; "
                             "take a width that is a multiple of 32, or of 4 with a smaller mult")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        # group_norm's own weight and bias make torch.compile fail on the forward-mode derivative.
        x = F.group_norm(x, self.groups, eps=self.eps)
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


@torch.library.custom_op("models::keep_mask", mutates_args=())
def keep_mask(seed: torch.Tensor, shape: Sequence[int], p: float,
              device: torch.device) -> torch.Tensor:
    """bool of a shape, True with probability 1 - p, drawn from a seed, int64 [] on the CPU. An
    operation of its own, which torch.compile takes as it is: masks are those of eager code."""
    generator = torch.Generator(device).manual_seed(seed.item())
    return torch.rand(shape, generator=generator, device=device) >= p


@keep_mask.register_fake
def _(seed, shape, p, device):
    return torch.empty(shape, dtype=torch.bool, device=device)


class Dropout(nn.Dropout):
    """nn.Dropout whose mask follows from a seed that the layer holds, so that all passes of a step
    have one mask, whatever their precision and memory layout: see seed_dropout. Without a seed
    every pass has a mask of its own."""

    seed, rows = None, None

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        seed, rows = self.seed, self.rows or x.shape[0]
        if seed is None:
            seed = torch.randint(2 ** 63 - 1, ())
        kept = keep_mask(seed, (rows, *x.shape[1:]), self.p, x.device)
        return x * kept.repeat(x.shape[0] // rows, *[1] * (kept.dim() - 1)) / (1 - self.p)


def seed_dropout(net, seed, rows):
    """Gives net's Dropout layers their masks for the passes that follow: a function of the seed (0
    to 2^63 - 1), the layer and the place among `rows` samples, and the same for each `rows` of a
    larger batch."""
    layers = [m for m in net.modules() if isinstance(m, Dropout)]
    for i, layer in enumerate(layers):
        if layer.seed is None:
            layer.seed = torch.zeros((), dtype=torch.int64)
        layer.seed.fill_((seed + i * 0x9E3779B97F4A7C15) % (2 ** 63 - 1))    # not recompiled
        layer.rows = rows


class UNetBlock(nn.Module):
    """Residual block, optionally resampling by 2 and followed by single-head self-attention.

    x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W'].
    adaptive_scale: the embedding scales the second normalisation and shifts it; else it is added.
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout, adaptive_scale,
                 taps=(1, 1), up=False, down=False, attention=False, pixelnorm=False):
        super().__init__()
        self.adaptive_scale, self.pixelnorm = adaptive_scale, pixelnorm
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, taps=taps)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        self.skip = None
        if up or down or in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, 1, up=up, down=down, taps=taps)
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
            if self.pixelnorm:
                scale, shift = pixel_norm(scale), pixel_norm(shift)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + params)
        h = self.conv1(self.dropout(F.silu(h)))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is not None:
            B, C, H, W = x.shape
            # Fused attention wants float32 or more, and the channels last.
            qkv = self.qkv(self.norm2(x)).reshape(B, 1, C, 3, H * W).permute(3, 0, 1, 4, 2)
            wide = torch.promote_types(qkv.dtype, torch.float32)
            q, k, v = qkv.to(wide).contiguous().unbind(0)              # [B, 1, HW, C] each
            with torch.autocast(x.device.type, enabled=False):
                h = F.scaled_dot_product_attention(q, k, v)
            h = h.to(qkv.dtype).transpose(2, 3).contiguous()
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


class FourierFeatures(nn.Module):
    """Sines and cosines of a time [B] at random frequencies: [B, channels] (NCSN++)."""

    def __init__(self, channels, scale=16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, t):
        angle = t[:, None] * (2 * math.pi * self.freqs).to(t.dtype)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def edm_noise(t):
    """EDM's c_noise = ln(sigma) / 4, sigma = (1-t) / t in [0.002, 80]; t > 1 means 2 - t."""
    flow_t = (1 - (1 - t).abs()).clamp(0, 1)               # rounding can go below 0
    return ((1 - flow_t) / flow_t).clamp(0.002, 80).log() / 4


def edm_scalings(t, sigma_data):
    """c_in, c_skip, c_out [B, 1, 1, 1]: c_skip x + c_out U(c_in x, t) is EDM's preconditioning of
    the denoiser (Karras et al. 2022, Table 1), written for the velocity of the linear flow x_t =
    (1-t) x_0 + t x_1 with x_0 ~ N(0, I); here t > 1 means the flow time 2 - t."""
    flow_t = (1 - (1 - t).abs())[:, None, None, None]
    var = (1 - flow_t) ** 2 + (flow_t * sigma_data) ** 2               # of x_t
    c_in = var.rsqrt()
    return c_in, (flow_t * sigma_data ** 2 - (1 - flow_t)) / var, sigma_data * c_in


def check_size(size, levels):
    """Raises ValueError for a size that cannot be halved for each resolution after the first."""
    if size % (parts := 2 ** (levels - 1)):
        raise ValueError(f"{levels} resolutions need a size divisible by {parts}; {size} is not")


def unit_labels(y, emb, num_classes):
    """Labels y [B] or None as EDM has them, [B, num_classes] like emb [B, C]: one-hot times
    sqrt(num_classes), and zeros for the null label, which None means."""
    y = torch.full(emb.shape[:1], num_classes, device=emb.device) if y is None else y
    onehot = y[:, None] == torch.arange(num_classes, device=y.device)
    return onehot.to(emb.dtype) * math.sqrt(num_classes)


class DDPMpp(nn.Module):
    """DDPM++ or NCSN++ U-Net (Song et al. 2021), in the layout of NVlabs/edm's SongUNet.

    input_size      height and width of x; in_channels: C of x
    width, mult     channels at full resolution, and their multiples as the resolution halves
    blocks          residual blocks at each resolution
    attention       the resolutions with self-attention; the lowest always has one
    adaptive_scale  the embedding scales and shifts (as in ADM) instead of being added
    second_time     builds map_second, zero at its output: it changes nothing before it is trained
    augment_dim     length of the augmentation labels that `forward` takes; 0: none
    ncsn            NCSN++: Fourier features of the time, filter (1, 3, 3, 1), residual input
    sigma_data      standard deviation of the data, for the preconditioning; None: none
    time_scale      the features are those of time_scale t
    pixelnorm       normalises that scale and shift over the channels (sCM; FACM A.3(c))
    edm_time        the features are those of edm_noise, so that a denoiser that was trained by
                    NVlabs/edm is a velocity here

    With sigma_data the output is preconditioned, see edm_scalings. With edm_time nothing but x
    tells t and 2 - t apart, and FACM needs --condition auxiliary. Raises ValueError for sizes that
    do not divide.
    """

    def __init__(self, input_size, in_channels=3, num_classes=0, width=128, mult=(2, 2, 2),
                 blocks=4, attention=(16,), dropout=0.0, adaptive_scale=False, second_time=False,
                 augment_dim=0, ncsn=False, sigma_data=None, time_scale=1.0, edm_time=False,
                 pixelnorm=False):
        super().__init__()
        if pixelnorm and not adaptive_scale:
            raise ValueError("pixelnorm normalises a scale and a shift: take adaptive_scale=True")
        check_size(input_size, len(mult))
        self.num_classes, self.second_time = num_classes, second_time
        self.sigma_data, self.time_scale, self.edm_time = sigma_data, time_scale, edm_time
        self.pixelnorm, self.augment_dim = pixelnorm, augment_dim
        self.expandable = not edm_time
        emb_channels, noise_channels = 4 * width, (2 if ncsn else 1) * width
        taps = (1, 3, 3, 1) if ncsn else (1, 1)

        self.map_noise = (FourierFeatures if ncsn else TimeFeatures)(noise_channels)
        self.map_label = Linear(num_classes, noise_channels) if num_classes else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_second = None
        if second_time:
            self.map_second = nn.Sequential(Linear(noise_channels, width), nn.SiLU(),
                                            Linear(width, noise_channels, gain=0.0))
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        def block(cin, cout, **options):
            return UNetBlock(cin, cout, emb_channels, dropout, adaptive_scale, taps,
                             pixelnorm=pixelnorm, **options)

        self.enc, skips, cout, caux = nn.ModuleDict(), [], width, in_channels
        for level, m in enumerate(mult):
            res = input_size >> level
            name = f"{res}x{res}"
            self.enc[f"{name}_down" if level else f"{name}_conv"] = (
                block(cout, cout, down=True) if level else Conv2d(in_channels, width, 3))
            if level and ncsn:
                self.enc[f"{name}_aux_residual"] = Conv2d(caux, cout, 3, down=True, taps=taps,
                                                          last=True)
                caux = cout
            skips.append(cout)
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = block(cout, width * m, attention=res in attention)
                cout = width * m
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, m in reversed(list(enumerate(mult))):
            res = input_size >> level
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
        self.dec[f"{name}_aux_conv"] = Conv2d(cout, in_channels, 3, gain=1e-5)

    def embed(self, t, s, y, augment=None):
        """The conditioning vector [B, 4 width], float32."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.map_layer0.weight.dtype
            t = t.to(dtype)
            emb = self.map_noise(edm_noise(t) if self.edm_time else self.time_scale * t)
            if self.map_second is not None:
                emb = emb + self.map_second(self.map_noise(self.time_scale * s.to(dtype)))
            if self.map_label is not None:
                emb = emb + self.map_label(unit_labels(y, emb, self.num_classes))
            if self.map_augment is not None:
                if augment is None:                        # DDP wants every weight used
                    augment = torch.zeros(t.shape[0], self.augment_dim, device=t.device)
                emb = emb + self.map_augment(augment.to(dtype))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, t, s=None, y=None, augment=None, tangent=None):
        """See the top of this file; augment [B, augment_dim] float: the augmentation's labels."""
        if tangent is not None:
            h = self.forward(*duals((x, t, s), tangent), y, augment)
            return h.value, h.tangent
        _check_second_time(self, s)
        emb = self.embed(t, s, y, augment)
        h = x
        if self.sigma_data is not None:
            c_in, c_skip, c_out = edm_scalings(t, self.sigma_data)
            h = c_in * x

        skips, aux = [], h
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                h = skips[-1] = aux = (h + layer(aux)) * math.sqrt(0.5)
                continue
            h = layer(h) if name.endswith("_conv") else run_block(self, layer, h, emb)
            skips.append(h)
        for name, layer in self.dec.items():
            if "_block" in name:
                h = run_block(self, layer, torch.cat([h, skips.pop()], dim=1), emb)
            elif name.endswith("_aux_norm"):
                h = F.silu(layer(h))
            elif name.endswith("_aux_conv"):
                h = layer(h)
            else:
                h = run_block(self, layer, h, emb)

        if self.sigma_data is not None:
            h = c_skip * x + c_out * h
        return h.to(x.dtype)


# --------------------------------------------------------------------------------------------------
# EDM2's U-Net (Karras et al. 2024, whose equations these are) in the layout of NVlabs/edm2's UNet.

def mp_normalise(x, dim=None, eps=1e-4):
    """x over its root mean square along dim (None: all dimensions but the first), plus eps."""
    dim = dim or tuple(range(1, x.dim()))
    norm, size = torch.linalg.vector_norm(x, dim=dim, keepdim=True), [x.shape[d] for d in dim]
    return x.div(norm.mul(math.prod(size) ** -0.5).add(eps))


def mp_silu(x):
    """SiLU at the magnitude of its input."""
    return F.silu(x).mul(1 / 0.596)                                    # Eq. 81


def mp_sum(a, b, share):
    """(1 - share) a + share b, at the magnitude of one of them."""
    return (a.mul(1 - share) + b.mul(share)).mul(math.hypot(1 - share, share) ** -1)     # Eq. 88


def mp_cat(a, b):
    """a and b side by side, each with half of the magnitude."""
    whole = (a.shape[1] + b.shape[1]) / 2
    return torch.cat([a.mul((whole / a.shape[1]) ** 0.5),              # Eq. 103, t = 1/2
                      b.mul((whole / b.shape[1]) ** 0.5)], dim=1)


class MPFourier(nn.Module):
    """Cosines of a time [B] at random frequencies and phases: [B, channels]."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t):
        angle = t[:, None] * self.freqs.to(t.dtype) + self.phases.to(t.dtype)
        return angle.cos().mul(2 ** 0.5)                               # Eq. 75


class MPConv(nn.Module):
    """Convolution or, without a kernel, fully connected layer, whose weight [out, in, ...] has a
    root mean square of 1 for each output; no bias."""

    def __init__(self, inputs, outputs, *kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((outputs, inputs, *kernel)))

    def forward(self, x, gain=1.0):
        w = mp_normalise(self.weight) * (gain / self.weight[0].numel() ** 0.5)         # Eq. 47
        return F.linear(x, w) if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class EDM2Block(nn.Module):
    """Block of EDM2's encoder or decoder (Figure 21), as UNetBlock; heads 0: no self-attention."""

    def __init__(self, in_channels, out_channels, emb_channels, dropout, decoder=False, up=False,
                 down=False, heads=0):
        super().__init__()
        self.decoder, self.up, self.down, self.heads = decoder, up, down, heads
        first = in_channels if decoder else out_channels
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.conv_res0 = MPConv(first, out_channels, 3, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.dropout = Dropout(dropout)
        self.conv_res1 = MPConv(out_channels, out_channels, 3, 3)
        self.conv_skip = None
        if in_channels != out_channels:
            self.conv_skip = MPConv(in_channels, out_channels, 1, 1)
        if heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1, 1)

    def forward(self, x, emb):
        if self.up or self.down:
            x = F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        skip = x if self.conv_skip is None else self.conv_skip(x)
        x = x if self.decoder else mp_normalise(skip, (1,))            # pixel normalisation
        h = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain).add(1)
        h = self.dropout(mp_silu(h * scale[:, :, None, None]))
        x = mp_sum(skip if self.decoder else x, self.conv_res1(h), 0.3)
        if self.heads:
            x = mp_sum(x, self.attn_proj(self.attend(self.attn_qkv(x))), 0.3)
        return x.clamp(-256, 256)

    def attend(self, qkv):
        """Self-attention from qkv [B, 3C, H, W], interleaved, with normalised q, k and v."""
        B, C, H, W = qkv.shape
        q_k_v = mp_normalise(qkv.reshape(B, self.heads, -1, 3, H * W), (2,)).permute(3, 0, 1, 4, 2)
        q, k, v = q_k_v.to(torch.promote_types(qkv.dtype, torch.float32)).contiguous().unbind(0)
        with torch.autocast(qkv.device.type, enabled=False):
            h = F.scaled_dot_product_attention(q, k, v)
        return h.to(qkv.dtype).transpose(2, 3).reshape(B, C // 3, H, W)


class EDM2(nn.Module):
    """EDM2's U-Net inside its preconditioning, as the velocity of the linear flow (see DDPMpp).

    head_channels: channels of an attention's head; dropout: at resolutions up to dropout_res (None:
    at all); the others as DDPMpp's, with edm_time. The head logvar, an uncertainty, is left out.
    """

    expandable, edm_time = False, True

    def __init__(self, input_size, in_channels=3, num_classes=0, width=192, mult=(1, 2, 3, 4),
                 blocks=3, attention=(16, 8), head_channels=64, dropout=0.0, dropout_res=None,
                 second_time=False, sigma_data=0.5):
        super().__init__()
        check_size(input_size, len(mult))
        self.num_classes, self.second_time, self.sigma_data = num_classes, second_time, sigma_data
        channels, emb_channels = [width * m for m in mult], width * max(mult)
        self.emb_fourier = MPFourier(channels[0])
        self.emb_noise = MPConv(channels[0], emb_channels)
        self.emb_label = MPConv(num_classes, emb_channels) if num_classes else None
        self.map_second = None
        if second_time:
            self.map_second = nn.Sequential(Linear(channels[0], width), nn.SiLU(),
                                            Linear(width, emb_channels, gain=0.0))

        def block(res, cin, cout, attention=False, **options):
            p = dropout if res <= (dropout_res or res) else 0.0
            heads = cout // head_channels if attention else 0
            return EDM2Block(cin, cout, emb_channels, p, heads=heads, **options)

        self.enc, skips, cout = nn.ModuleDict(), [], channels[0]
        for level, c in enumerate(channels):
            res = input_size >> level
            self.enc[f"{res}x{res}_down" if level else f"{res}x{res}_conv"] = block(
                res, cout, cout, down=True) if level else MPConv(in_channels + 1, cout, 3, 3)
            skips.append(cout)
            for i in range(blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(res, cout, c, res in attention)
                cout = c
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, c in reversed(list(enumerate(channels))):
            res = input_size >> level
            if level == len(channels) - 1:
                self.dec[f"{res}x{res}_in0"] = block(res, cout, cout, True, decoder=True)
                self.dec[f"{res}x{res}_in1"] = block(res, cout, cout, decoder=True)
            else:
                self.dec[f"{res}x{res}_up"] = block(res, cout, cout, up=True, decoder=True)
            for i in range(blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = block(
                    res, cout + skips.pop(), c, res in attention, decoder=True)
                cout = c
        self.out_conv = MPConv(cout, in_channels, 3, 3)
        self.out_gain = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def force_weight_norm(self):
        """Forced weight normalisation (Eq. 66), in place, row by row, so also in FSDP's parts.
        paper: in each training pass; here: after each step of the optimiser, because all passes of
        a step, with gradient and without, then see one weight."""
        for layer in self.modules():
            if isinstance(layer, MPConv):
                own = getattr(layer.weight, "to_local", lambda w=layer.weight: w)()
                own.copy_(mp_normalise(own))

    def embed(self, t, s, y):
        """The conditioning vector [B, max(mult) width], float32."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.emb_noise.weight.dtype
            emb = self.emb_noise(self.emb_fourier(edm_noise(t.to(dtype))))
            if self.emb_label is not None:
                emb = mp_sum(emb, self.emb_label(unit_labels(y, emb, self.num_classes)), 0.5)
            if self.map_second is not None:
                emb = emb + self.map_second(self.emb_fourier(edm_noise(s.to(dtype))))
            return mp_silu(emb)

    def forward(self, x, t, s=None, y=None, tangent=None):
        """See the top of this file."""
        if tangent is not None:
            h = self.forward(*duals((x, t, s), tangent), y)
            return h.value, h.tangent
        _check_second_time(self, s)
        emb = self.embed(t, s, y)
        c_in, c_skip, c_out = edm_scalings(t, self.sigma_data)
        ones = torch.ones((x.shape[0], 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        h, skips = torch.cat([c_in * x, ones], dim=1), []              # ones: in place of biases
        for name, layer in self.enc.items():
            h = layer(h) if name.endswith("_conv") else run_block(self, layer, h, emb)
            skips.append(h)
        for name, layer in self.dec.items():
            h = run_block(self, layer, mp_cat(h, skips.pop()) if "_block" in name else h, emb)
        return (c_skip * x + c_out * self.out_conv(h, self.out_gain)).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# DiT (Peebles & Xie 2023), whose layout SiT shares, and LightningDiT (Yao et al. 2025).

def modulate(x, shift, scale):
    """(1 + scale) x + shift for tokens x [B, N, D] and shift (or None), scale [B, D]."""
    x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


def pixel_norm(x):
    """[B, D, ...] scaled to a mean square of 1 over D (sCM's modulation; FACM A.3(c))."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class LayerNorm(nn.Module):
    """Over the last dimension; the affine stays outside the call, for torch.compile's sake."""

    def __init__(self, width, eps=1e-6, affine=False):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x):
        x = F.layer_norm(x, (self.width,), eps=self.eps)
        return x if self.weight is None else x * self.weight + self.bias


class RMSNorm(nn.Module):
    """x / root mean square over the last dimension, in float32 or more, times a weight."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class RoPE(nn.Module):
    """Rotary positions on a square grid: half of a head's channels turn with the row, half with the
    column. q or k [B, heads, grid * grid, head_dim] -> the same shape."""

    def __init__(self, head_dim, grid):
        super().__init__()
        half = head_dim // 2
        freqs = 1e4 ** (-torch.arange(0, half, 2).float() / half)
        angle = (torch.arange(grid)[:, None] * freqs).repeat_interleave(2, dim=1)     # [grid, half]
        angle = torch.cat([angle[:, None].expand(-1, grid, -1), angle.expand(grid, -1, -1)], dim=-1)
        self.register_buffer("freqs_cos", angle.cos().flatten(0, 1))
        self.register_buffer("freqs_sin", angle.sin().flatten(0, 1))

    def forward(self, x):
        odd_even = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * self.freqs_cos.to(x.dtype) + odd_even * self.freqs_sin.to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention of tokens [B, N, D]."""

    def __init__(self, width, heads, norm=None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = norm(width // heads) if norm else nn.Identity()
        self.k_norm = norm(width // heads) if norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                 # [B, heads, N, d] each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with GELU in between, [..., width] -> the same."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """An MLP gated by SiLU, [..., width] -> the same."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, h = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * h)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the embedding (adaLN-Zero).

    x [B, N, D], emb [B, D] -> [B, N, D]; options as in DiT."""

    def __init__(self, width, heads, mlp_ratio, qknorm, swiglu, rmsnorm, wo_shift, pixelnorm):
        super().__init__()
        norm = RMSNorm if rmsnorm else LayerNorm
        qk = RMSNorm if rmsnorm else (lambda d: LayerNorm(d, eps=1e-5, affine=True))
        hidden = int(width * mlp_ratio)
        self.wo_shift, self.pixelnorm = wo_shift, pixelnorm
        self.norm1 = norm(width)
        self.attn = Attention(width, heads, qk if qknorm else None)
        self.norm2 = norm(width)
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if swiglu else Mlp(width, hidden)
        self.parts = 4 if wo_shift else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.parts * width))

    def forward(self, x, emb, rope):
        parts = self.adaLN_modulation(emb).chunk(self.parts, dim=1)    # [B, D] each
        if self.wo_shift:
            (scale1, gate1, scale2, gate2), shift1, shift2 = parts, None, None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
        if self.pixelnorm:
            scale1, scale2 = pixel_norm(scale1), pixel_norm(scale2)
            if not self.wo_shift:
                shift1, shift2 = pixel_norm(shift1), pixel_norm(shift2)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens x [B, N, D], emb [B, D] -> pixels of the patches [B, N, out]."""

    def __init__(self, width, out, rmsnorm, pixelnorm):
        super().__init__()
        self.norm_final = (RMSNorm if rmsnorm else LayerNorm)(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.pixelnorm = pixelnorm

    def forward(self, x, emb):
        shift, scale = self.adaLN_modulation(emb).chunk(2, dim=1)
        if self.pixelnorm:
            shift, scale = pixel_norm(shift), pixel_norm(scale)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimeEmbedder(nn.Module):
    """A time [B] -> [B, width], by 128 cosines and sines with frequencies from 1 to nearly 1e-4."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        t = t.to(self.mlp[0].weight.dtype)
        angle = t[:, None] * 1e4 ** (-torch.arange(128, dtype=t.dtype, device=t.device) / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def sincos_2d(width, grid):
    """Fixed position embedding of a square grid, float32 [1, grid * grid, width]: half of the
    channels for the column, half for the row, each of sines, then cosines (float64 inside)."""
    freqs = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * freqs                  # [grid, D/4]
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                               # [grid, D/2]
    both = [line.expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)]            # column, row
    return torch.cat(both, dim=-1).flatten(0, 1)[None].float()


class DiT(nn.Module):
    """Diffusion transformer, in the layout of facebookresearch/DiT (SiT's too), or of
    hustvl/LightningDiT (FACM's too) with some of its options.

    input_size, patch         height and width of x and of a patch; in_channels: C of x
    width, depth, heads       channels of a token, number of blocks, attention heads
    qknorm, swiglu, rope,     LightningDiT's normalised queries and keys, gated MLP, rotary
    rmsnorm, wo_shift         positions, RMS normalisation, modulation by scale alone
    learn_sigma               the final layer has a second half, the variance, which is dropped
    second_time               builds r_embedder, zero at its output before it is trained
    pixelnorm                 normalises the modulation's scale and shift (sCM; FACM A.3(c))
    prediction                "velocity", or "noise": the weights are a DDPM noise predictor's at
                              1000 discrete times (facebookresearch/DiT's own); the output is the
                              velocity, which is exact for sigma = (1-t) / t in [0.01, 157]

    num_classes 0 builds no label embedding. With "noise" FACM needs --condition auxiliary.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, input_size, in_channels=4, num_classes=1000, patch=2, width=1152, depth=28,
                 heads=16, mlp_ratio=4.0, qknorm=False, swiglu=False, rope=False, rmsnorm=False,
                 wo_shift=False, learn_sigma=False, second_time=False, pixelnorm=False,
                 prediction="velocity"):
        super().__init__()
        if input_size % patch or width % heads or (width // heads) % 4 or width % 4:
            raise ValueError(f"patches of {patch} must divide the size {input_size}, {heads} heads "
                             f"the width {width}, and 4 the width of a head")
        if prediction not in ("velocity", "noise"):
            raise ValueError(f"prediction {prediction!r}: want velocity or noise")
        self.num_classes, self.second_time, self.prediction = num_classes, second_time, prediction
        self.expandable = prediction == "velocity"
        self.patch, self.in_channels, grid = patch, in_channels, input_size // patch
        self.heads, self.pixelnorm = heads, pixelnorm

        self.x_embedder = nn.ModuleDict(
            dict(proj=nn.Conv2d(in_channels, width, patch, stride=patch)))
        self.t_embedder = TimeEmbedder(width)
        self.r_embedder = TimeEmbedder(width) if second_time else None
        self.y_embedder = nn.ModuleDict(
            dict(embedding_table=nn.Embedding(num_classes + 1, width))) if num_classes else None
        self.pos_embed = nn.Parameter(sincos_2d(width, grid), requires_grad=False)
        self.feat_rope = RoPE(width // heads, grid) if rope else None
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, mlp_ratio, qknorm, swiglu, rmsnorm, wo_shift, pixelnorm)
            for _ in range(depth))
        out = patch * patch * in_channels * (2 if learn_sigma else 1)
        self.final_layer = FinalLayer(width, out, rmsnorm, pixelnorm)
        if prediction == "noise":
            alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
            log_sigma = ((1 - alpha_bar) / alpha_bar).log() / 2
            self.register_buffer("log_sigma", log_sigma.float(), persistent=False)

        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)
            elif name == "r_embedder.mlp.2.weight":
                nn.init.zeros_(p)
            elif "t_embedder" in name or "r_embedder" in name or "y_embedder" in name:
                nn.init.normal_(p, std=0.02)
            elif p.dim() > 1 and name != "pos_embed":
                nn.init.xavier_uniform_(p.flatten(1))

    def embed(self, t, s, y):
        """The conditioning vector [B, D], float32."""
        with torch.autocast(t.device.type, enabled=False):
            emb = self.t_embedder(t)
            if self.r_embedder is not None:
                emb = emb + self.r_embedder(s)
            if self.y_embedder is not None:
                if y is None:
                    y = torch.full(t.shape, self.num_classes, device=t.device)
                emb = emb + self.y_embedder["embedding_table"](y)
            return emb

    def output(self, x, emb):
        """What the final layer gives, [B, C, H, W]."""
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed    # [B, N, D]
        for block in self.blocks:
            h = run_block(self, block, h, emb, self.feat_rope)
        h = self.final_layer(h, emb)                                                  # [B, N, ppC']
        B, grid, p = x.shape[0], x.shape[-1] // self.patch, self.patch
        h = h.reshape(B, grid, grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)              # B C' h p w p
        return h.reshape(B, -1, *x.shape[2:])[:, :self.in_channels].to(x.dtype)

    def forward(self, x, t, s=None, y=None, tangent=None):
        if tangent is not None:
            h = self.forward(*duals((x, t, s), tangent), y)
            return h.value, h.tangent
        _check_second_time(self, s)
        if self.prediction == "velocity":
            return self.output(x, self.embed(t, s, y))
        # The same point on the variance-preserving path: the one with the same noise / data.
        flow_t = (1 - (1 - t).abs()).clamp(1 / 158, 0.99)
        k = self.discrete_time(((1 - flow_t) / flow_t).log())
        flow_t = flow_t[:, None, None, None]
        eps = self.output(x * ((1 - flow_t) ** 2 + flow_t ** 2).rsqrt(), self.embed(k, s, y))
        return (x - eps) / flow_t                                      # x_1 - x_0 with x_0 = eps

    def discrete_time(self, log_sigma):
        """DDPM's time in [0, 999], linear in between in ln sigma; log_sigma [B]."""
        table = self.log_sigma.to(log_sigma.dtype)
        k = torch.searchsorted(table, log_sigma.detach().contiguous()).clamp(1, 999)
        return (k - (table[k] - log_sigma).div(table[k] - table[k - 1])).clamp(0, 999)


# --------------------------------------------------------------------------------------------------
# AutoencoderKL (Rombach et al. 2022) in the layout of CompVis/latent-diffusion.

class ResnetBlock(nn.Module):
    """Residual block of the autoencoder, [B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention of the pixels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                    # [B, HW, C]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """A convolution at half the size, padded right and below, or at twice the size."""

    def __init__(self, channels, up):
        super().__init__()
        self.up, stride, padding = up, 1 if up else 2, 1 if up else 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2) if self.up else F.pad(x, (0, 1, 0, 1)))


class Coder(nn.Module):
    """Encoder: images -> features of size / 2^(levels-1), or decoder: the other way.

    attention: the levels, 0 being full resolution, whose blocks are followed by attention."""

    def __init__(self, decoder, channels_in, channels_out, width, mult, blocks, attention):
        super().__init__()
        self.decoder = decoder
        levels = range(len(mult))[::-1] if decoder else range(len(mult))
        c = width * mult[levels[0]] if decoder else width
        stages, last = {}, width * mult[levels[-1]]
        self.conv_in = nn.Conv2d(channels_in, c, 3, padding=1)
        for level in levels:
            stage = stages[level] = nn.ModuleDict(dict(block=nn.ModuleList(), attn=nn.ModuleList()))
            for _ in range(blocks + decoder):
                stage["block"].append(ResnetBlock(c, width * mult[level]))
                c = width * mult[level]
                if level in attention:
                    stage["attn"].append(AttnBlock(c))
            if level != levels[-1]:
                stage["upsample" if decoder else "downsample"] = Resample(c, up=decoder)
        stages = nn.ModuleList(stages[level] for level in sorted(stages))
        middle = width * mult[-1]
        self.mid = nn.ModuleDict(dict(block_1=ResnetBlock(middle, middle), attn_1=AttnBlock(middle),
                                      block_2=ResnetBlock(middle, middle)))
        self.add_module("up" if decoder else "down", stages)
        self.norm_out = nn.GroupNorm(32, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, channels_out, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        middle = list(self.mid.values())
        for part in [*middle, *self.up[::-1]] if self.decoder else [*self.down, *middle]:
            if not isinstance(part, nn.ModuleDict):
                h = part(h)
                continue
            for i, block in enumerate(part["block"]):
                h = block(h)
                if len(part["attn"]):
                    h = part["attn"][i](h)
            for name in part.keys() - {"block", "attn"}:
                h = part[name](h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, z_channels, H/f, W/f], f = 2^(len(mult)-1).

    encode gives mean and standard deviation of the latents as the autoencoder has them; methods
    work on `scale` times these (SD-VAE), or on their own normalisation (VA-VAE: latents_stats).
    """

    def __init__(self, z_channels, mult, width=128, blocks=2, attention=(), scale=1.0):
        super().__init__()
        self.z_channels, self.scale, self.factor = z_channels, scale, 2 ** (len(mult) - 1)
        self.encoder = Coder(False, 3, 2 * z_channels, width, mult, blocks, attention)
        self.decoder = Coder(True, z_channels, 3, width, mult, blocks, attention)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def encode(self, x):
        """Mean and standard deviation [B, z_channels, H/f, W/f] of the posterior."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def decode(self, z):
        """Images [B, 3, H, W] from latents."""
        return self.decoder(self.post_quant_conv(z))


# --------------------------------------------------------------------------------------------------

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16),
         "1p0B": (1536, 24, 24), "1p6B": (1792, 28, 28)}               # width, depth, heads


def _sized(constructor, sizes):
    """{"NAME/PATCH": constructor of that size and patch}."""
    return {f"{size}/{patch}": partial(constructor, patch=patch, **dict(
        zip(("width", "depth", "heads"), SIZES[size.split("-")[1]]))) for size, patch in sizes}


# The released LightningDiT: the size of VA-VAE's latents, and the options of its blocks.
LightningDiT = partial(DiT, input_size=16, in_channels=32, swiglu=True, rope=True, rmsnorm=True)

NETWORKS = {
    "DDPM++": DDPMpp,
    "NCSN++": partial(DDPMpp, ncsn=True),
    "EDM2": EDM2,
    **{f"EDM2-{size}": partial(EDM2, width=width) for size, width in (
        ("XS", 128), ("S", 192), ("M", 256), ("L", 320), ("XL", 384))},
    "DiT": DiT,
    "LightningDiT": LightningDiT,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKL-f8d4": partial(
        AutoencoderKL, z_channels=4, mult=(1, 2, 4, 4), scale=0.18215),
    "VAVAE-f16d32": partial(
        AutoencoderKL, z_channels=32, mult=(1, 1, 2, 2, 4), attention=(4,)),
    **_sized(DiT, [(f"DiT-{n}", p) for n in ("S", "B", "L", "XL") for p in (2, 4, 8)]),
    **_sized(LightningDiT, [(f"LightningDiT-{n}", p) for n, p in (
        ("B", 1), ("B", 2), ("L", 2), ("XL", 1), ("XL", 2), ("1p0B", 1), ("1p0B", 2), ("1p6B", 1),
        ("1p6B", 2))]),
}


def check_option(constructor, key, value):
    """The value of a network's option; one number where several are meant is a tuple of one. Raises
    ValueError for a value of another type than the option's default."""
    parameters = inspect.signature(constructor).parameters
    default = parameters[key].default if key in parameters else None
    numbers = isinstance(default, tuple) or key == "mult"
    if numbers:
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    kind = int if numbers or default is inspect.Parameter.empty else type(default)
    for part in value if numbers else (value,):
        fits = isinstance(part, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(part, bool))
        if default is not None and not fits:
            raise ValueError(f"network option {key}={part!r}: want {kind.__name__}")
    return value


def create(name, seed=None, **options):
    """The network `name` of NETWORKS with its constructor's options, its weights drawn from a seed
    (None: from PyTorch's random state).

    Raises ValueError for an unknown name, an unknown option or sizes that do not fit together.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; there is: {', '.join(NETWORKS)}")
    options = {key: check_option(NETWORKS[name], key, value) for key, value in options.items()}
    try:
        # Convolutions are a tenth faster with the channels last in memory (CPU), but before torch
        # 2.14 the forward mode of group_norm fails on them.
        recent = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14)
        layout = torch.channels_last if recent else torch.contiguous_format
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return NETWORKS[name](**options).to(memory_format=layout)
    except (TypeError, ArithmeticError, RuntimeError, UnboundLocalError) as e:
        if "allocate" in str(e):           # memory has ended, see run.program
            raise
        raise ValueError(f"network {name} with these options: {e}") from None


def shard(net):
    """Cuts net's parameters among the processes (FSDP): a block is gathered when it is computed.
    Gradients, and an optimiser made after this, are in parts, too. In place."""
    from torch.distributed.device_mesh import init_device_mesh  # here: this takes a second
    from torch.distributed.fsdp import fully_shard
    net.to(memory_format=torch.contiguous_format)          # FSDP takes no other layout
    mesh = init_device_mesh(next(net.parameters()).device.type, (dist.get_world_size(),))
    blocks = (UNetBlock, EDM2Block, DiTBlock)
    for part in [m for m in net.modules() if isinstance(m, blocks)] + [net]:
        fully_shard(part, mesh=mesh)
