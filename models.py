"""The networks that all methods share. All of them are called in the same way:

    net(x, t, s=None, y=None) -> same shape and dtype as x

    x  [B, C, H, W] float     points on the flow
    t  [B] float              their times
    s  [B] float or None      the second times (FACM's auxiliary r), for a network that was built
                              with second_time=True; None means s = t, the velocity F(x, t, t)
    y  [B] int64 or None      labels 0..num_classes-1; num_classes is the null label, and None is
                              the null label for all samples

A second time that is given to a network without one raises ValueError.

With tangent=(dx, dt, ds) the network returns (F, dF) from one pass: F is the same output, with
gradient, and dF is its derivative in that direction of (x, t, s), without gradient (jvp.py). A None
in tangent is zero. Where s is None, s = t, so it moves with t, and ds is not used.

`net.num_classes` is 0 for an unconditional network. `net.expandable` says whether the network tells
the times t and 2 - t apart, as FACM's expanded interval needs. A forward pass draws no random
numbers, except for Dropout in train mode. The time embedding is computed in float32 even under
autocast, because a derivative in time would be lost in bfloat16. Parameters have the names of
public checkpoints.
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
    """Returns block(*inputs). If net.grad_checkpoint is set, its activations are not stored, and
    the backward pass computes them again, which needs less memory."""
    if getattr(net, "grad_checkpoint", False) and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def second_time_or_t(net, t, s):
    """The second time that net uses: s, or t where s is None; None for a network without one.

    Raises ValueError for an s that is given to a network without a second time.
    """
    if not net.second_time:
        if s is not None:
            raise ValueError("this network has no second time s: build it with second_time=True")
        return None
    if s is None:
        return t
    return s


# --------------------------------------------------------------------------------------------------
# Checks of the options, for the constructors. A network whose options pass them also runs.

def check_at_least(low, **options):
    """Raises ValueError for an option that is less than `low`, or has a number in it that is."""
    for name, value in options.items():
        numbers = value if isinstance(value, (tuple, list)) else [value]
        for number in numbers:
            if number < low:
                raise ValueError(f"{name}={value} is out of range: it must be at least {low}")


def check_positive(**options):
    """Raises ValueError for an option that is not a positive, finite number."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is out of range: it must be positive and finite")


def check_unet(input_size, in_channels, num_classes, width, mult, blocks, attention, dropout):
    """Raises ValueError for options that no U-Net can have; see DDPMpp for their meaning."""
    check_at_least(1, input_size=input_size, in_channels=in_channels, width=width, mult=mult,
                   attention=attention)
    check_at_least(0, num_classes=num_classes, blocks=blocks)
    if len(mult) == 0:
        raise ValueError("mult is empty: it needs one number for each resolution")
    parts = 2 ** (len(mult) - 1)
    if input_size % parts:
        raise ValueError(f"{len(mult)} resolutions need an input_size divisible by {parts}, and "
                         f"{input_size} is not")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is out of range: it must be at least 0 and below 1")


# --------------------------------------------------------------------------------------------------
# DDPM++ and NCSN++ (Song et al. 2021) in the layout of NVlabs/edm's SongUNet.

def _xavier_uniform(shape, fan_in, fan_out, gain):
    return gain * math.sqrt(6 / (fan_in + fan_out)) * (2 * torch.rand(shape) - 1)


class Linear(nn.Module):
    """[..., in_features] -> [..., out_features]. The weight begins as Xavier-uniform times gain,
    and the bias as zero."""

    def __init__(self, in_features, out_features, gain=1.0, bias=True):
        super().__init__()
        shape = (out_features, in_features)
        self.weight = nn.Parameter(_xavier_uniform(shape, in_features, out_features, gain))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """Convolution that keeps the size, after resampling by 2 with `up` or `down`:
    [B, in_channels, H, W] -> [B, out_channels, H', W'].

    taps   the resampling filter along one dimension, (1, 1) for a box or (1, 3, 3, 1)
    last   downsamples after the convolution instead of before it
    """

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, gain=1.0,
                 taps=(1, 1), last=False):
        super().__init__()
        shape = (out_channels, in_channels, kernel, kernel)
        fan_in = in_channels * kernel * kernel
        fan_out = out_channels * kernel * kernel
        self.weight = nn.Parameter(_xavier_uniform(shape, fan_in, fan_out, gain))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.up = up
        self.last = last
        # The public layout stores the filter beside every resampling convolution.
        resample_filter = None
        if up or down:
            f = torch.tensor(taps, dtype=torch.float32)
            f = f[:, None] * f / f.sum() ** 2
            resample_filter = f[None, None]                            # [1, 1, taps, taps]
        self.register_buffer("resample_filter", resample_filter)

    def resample(self, x, padding):
        """x [B, C, H, W] at twice or half the size, filtered channel by channel."""
        channels = x.shape[1]
        taps = self.resample_filter.shape[-1]
        if taps == 2 and self.up:          # each pixel four times
            return F.interpolate(x, scale_factor=2)
        if taps == 2:                      # means of 2 x 2 pixels
            return F.avg_pool2d(x, 2)
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
        x = self.resample(x, filter_padding)
        return F.conv2d(x, self.weight, self.bias, padding=padding)


class GroupNorm(nn.Module):
    """Group normalisation with at least 4 channels in a group and at most 32 groups.

    Raises ValueError for channels that do not divide into such groups.
    """

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        if channels < 4:
            raise ValueError(f"{channels} channels are less than the 4 of a group; use a larger "
                             "width")
        self.groups = min(32, channels // 4)
        self.eps = eps
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups; use a "
                             "width that is a multiple of 32, or of 4 with a smaller mult")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        # torch.compile fails on the forward-mode derivative of F.group_norm with weight and bias.
        x = F.group_norm(x, self.groups, eps=self.eps)
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


@torch.library.custom_op("models::keep_mask", mutates_args=())
def keep_mask(seed: torch.Tensor, shape: Sequence[int], p: float,
              device: torch.device) -> torch.Tensor:
    """A bool tensor of the given shape, True with probability 1 - p. It is drawn from the seed, an
    int64 [] on the CPU. It is a custom operation, which torch.compile does not change, so that
    compiled code draws the same masks."""
    generator = torch.Generator(device).manual_seed(seed.item())
    return torch.rand(shape, generator=generator, device=device) >= p


@keep_mask.register_fake
def _(seed, shape, p, device):
    return torch.empty(shape, dtype=torch.bool, device=device)


class Dropout(nn.Dropout):
    """nn.Dropout with a mask that is drawn from a seed in the layer; see seed_dropout. All passes
    of a step then have the same mask, whatever their precision and memory layout. Without a seed
    each pass draws a new mask."""

    seed = None
    rows = None

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        seed = self.seed
        if seed is None:
            seed = torch.randint(2 ** 63 - 1, ())
        rows = self.rows or x.shape[0]
        kept = keep_mask(seed, (rows, *x.shape[1:]), self.p, x.device)
        copies = x.shape[0] // rows
        ones = [1] * (kept.dim() - 1)
        return x * kept.repeat(copies, *ones) / (1 - self.p)


def seed_dropout(net, seed, rows):
    """Sets the masks of the Dropout layers of net for the passes that follow.

    A mask depends on the seed (0 to 2^63 - 1), on the layer and on the position among `rows`
    samples. In a larger batch each group of `rows` samples has the same mask.
    """
    layers = [m for m in net.modules() if isinstance(m, Dropout)]
    for i, layer in enumerate(layers):
        if layer.seed is None:
            layer.seed = torch.zeros((), dtype=torch.int64)
        # In place, because a new tensor would make torch.compile compile again.
        layer.seed.fill_((seed + i * 0x9E3779B97F4A7C15) % (2 ** 63 - 1))
        layer.rows = rows


class UNetBlock(nn.Module):
    """Residual block, optionally resampling by 2 and followed by single-head self-attention.

    x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']

    adaptive_scale   the embedding scales and shifts the second normalisation; otherwise it is added
    pixelnorm        normalises that scale and shift, see pixel_norm
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout, adaptive_scale,
                 taps=(1, 1), up=False, down=False, attention=False, pixelnorm=False):
        super().__init__()
        self.adaptive_scale = adaptive_scale
        self.pixelnorm = pixelnorm
        modulation = out_channels
        if adaptive_scale:
            modulation = 2 * out_channels                              # a scale and a shift
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, taps=taps)
        self.affine = Linear(emb_channels, modulation)
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
                scale = pixel_norm(scale)
                shift = pixel_norm(shift)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + params)
        h = self.conv1(self.dropout(F.silu(h)))
        if self.skip is not None:
            x = self.skip(x)
        x = (h + x) * math.sqrt(0.5)
        if self.norm2 is not None:
            h = self.attend(self.qkv(self.norm2(x)))
            x = (self.proj(h) + x) * math.sqrt(0.5)
        return x

    def attend(self, qkv):
        """Self-attention: [B, 3C, H, W], in which q, k and v alternate -> [B, C, H, W]."""
        B, channels, H, W = qkv.shape
        C = channels // 3
        # Fused attention needs float32 or more, and the channels as the last dimension.
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q_k_v = qkv.reshape(B, 1, C, 3, H * W).permute(3, 0, 1, 4, 2)
        q, k, v = q_k_v.to(wide).contiguous().unbind(0)                # [B, 1, HW, C] each
        with torch.autocast(qkv.device.type, enabled=False):
            h = F.scaled_dot_product_attention(q, k, v)
        h = h.to(qkv.dtype).transpose(2, 3).contiguous()
        return h.reshape(B, C, H, W)


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
    """EDM's c_noise = ln(sigma) / 4 for times t [B], with sigma = (1-t) / t kept within
    [0.002, 80]. A time t > 1 means the flow time 2 - t."""
    flow_t = (1 - (1 - t).abs()).clamp(0, 1)               # rounding can go below 0
    return ((1 - flow_t) / flow_t).clamp(0.002, 80).log() / 4


def edm_scalings(t, sigma_data):
    """c_in, c_skip, c_out [B, 1, 1, 1] for times t [B]: c_skip x + c_out U(c_in x, t) is a velocity
    if U is a network that was trained with EDM's preconditioning.

    This is EDM's preconditioning of the denoiser (Karras et al. 2022, Table 1), written for the
    velocity of the linear flow x_t = (1-t) x_0 + t x_1 with x_0 ~ N(0, I). A time t > 1 means the
    flow time 2 - t.
    """
    flow_t = (1 - (1 - t).abs())[:, None, None, None]
    var = (1 - flow_t) ** 2 + (flow_t * sigma_data) ** 2               # of x_t
    c_in = var.rsqrt()
    c_skip = (flow_t * sigma_data ** 2 - (1 - flow_t)) / var
    c_out = sigma_data * c_in
    return c_in, c_skip, c_out


def unit_labels(y, emb, num_classes):
    """Labels y [B] as in EDM: [B, num_classes] with the dtype and device of emb [B, C], one-hot
    times sqrt(num_classes), and zeros for the null label and for None."""
    if y is None:
        y = torch.full(emb.shape[:1], num_classes, device=emb.device)
    classes = torch.arange(num_classes, device=y.device)
    onehot = y[:, None] == classes
    return onehot.to(emb.dtype) * math.sqrt(num_classes)


class DDPMpp(nn.Module):
    """DDPM++ or NCSN++ U-Net (Song et al. 2021), in the layout of NVlabs/edm's SongUNet.

    input_size      height and width of x
    in_channels     C of x
    num_classes     number of classes; 0 builds no label embedding
    width, mult     channels at full resolution, and their multiples as the resolution halves
    blocks          residual blocks at each resolution
    attention       the resolutions with self-attention; those that the network does not have are
                    ignored, and the lowest one always has it
    dropout         fraction of the activations that Dropout drops, in [0, 1)
    adaptive_scale  the embedding scales and shifts (as in ADM) instead of being added
    second_time     builds map_second, whose output is zero before it is trained
    augment_dim     length of the augmentation labels that `forward` accepts; 0 means none
    ncsn            NCSN++: Fourier features of the time, filter (1, 3, 3, 1), residual input
    sigma_data      standard deviation of the data, for the preconditioning; None means none
    time_scale      the features are those of time_scale t
    edm_time        the features are those of edm_noise, so that a denoiser of NVlabs/edm becomes a
                    velocity
    pixelnorm       normalises the scale and shift over the channels (sCM; FACM A.3(c)); it needs
                    adaptive_scale

    With sigma_data the output is preconditioned, see edm_scalings. With edm_time the network cannot
    tell t and 2 - t apart, and FACM needs --condition auxiliary.

    Raises ValueError for options out of their range, and for sizes that do not divide.
    """

    def __init__(self, input_size, in_channels=3, num_classes=0, width=128, mult=(2, 2, 2),
                 blocks=4, attention=(16,), dropout=0.0, adaptive_scale=False, second_time=False,
                 augment_dim=0, ncsn=False, sigma_data=None, time_scale=1.0, edm_time=False,
                 pixelnorm=False):
        super().__init__()
        check_unet(input_size, in_channels, num_classes, width, mult, blocks, attention, dropout)
        check_at_least(0, augment_dim=augment_dim)
        if sigma_data is not None:
            check_positive(sigma_data=sigma_data)
        if pixelnorm and not adaptive_scale:
            raise ValueError("pixelnorm normalises a scale and a shift; it needs "
                             "adaptive_scale=True")
        self.num_classes = num_classes
        self.second_time = second_time
        self.augment_dim = augment_dim
        self.sigma_data = sigma_data
        self.time_scale = time_scale
        self.edm_time = edm_time
        self.expandable = not edm_time
        emb_channels = 4 * width
        noise_channels = width
        taps = (1, 1)
        if ncsn:
            noise_channels = 2 * width
            taps = (1, 3, 3, 1)
        if noise_channels % 2:
            raise ValueError(f"width={width} is odd: half of the time's features are sines, and "
                             "half are cosines")

        # The embedding of times, label and augmentation
        if ncsn:
            self.map_noise = FourierFeatures(noise_channels)
        else:
            self.map_noise = TimeFeatures(noise_channels)
        self.map_label = None
        if num_classes:
            self.map_label = Linear(num_classes, noise_channels)
        self.map_augment = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, noise_channels, bias=False)
        self.map_second = None
        if second_time:
            self.map_second = nn.Sequential(
                Linear(noise_channels, width), nn.SiLU(), Linear(width, noise_channels, gain=0.0))
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        def block(inputs, outputs, **options):
            return UNetBlock(inputs, outputs, emb_channels, dropout, adaptive_scale, taps,
                             pixelnorm=pixelnorm, **options)

        # The encoder, from the highest resolution to the lowest
        self.enc = nn.ModuleDict()
        channels = width                   # after the layers so far
        aux_channels = in_channels         # of NCSN++'s residual input
        skips = []                         # channels of what the decoder gets from the encoder
        for level, multiple in enumerate(mult):
            size = input_size >> level
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(in_channels, channels, 3)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, down=True)
            if level > 0 and ncsn:
                self.enc[f"{name}_aux_residual"] = Conv2d(
                    aux_channels, channels, 3, down=True, taps=taps, last=True)
                aux_channels = channels
            skips.append(channels)
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = block(
                    channels, width * multiple, attention=size in attention)
                channels = width * multiple
                skips.append(channels)

        # The decoder, from the lowest resolution to the highest
        self.dec = nn.ModuleDict()
        lowest = len(mult) - 1
        for level in range(lowest, -1, -1):
            size = input_size >> level
            name = f"{size}x{size}"
            if level == lowest:
                self.dec[f"{name}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, up=True)
            for i in range(blocks + 1):
                last = i == blocks
                self.dec[f"{name}_block{i}"] = block(
                    channels + skips.pop(), width * mult[level],
                    attention=last and size in attention)
                channels = width * mult[level]
        self.dec[f"{name}_aux_norm"] = GroupNorm(channels)
        self.dec[f"{name}_aux_conv"] = Conv2d(channels, in_channels, 3, gain=1e-5)

    def time_features(self, t):
        """The features [B, noise_channels] of a time t [B]."""
        if self.edm_time:
            return self.map_noise(edm_noise(t))
        return self.map_noise(self.time_scale * t)

    def embed(self, t, s, y, augment=None):
        """The conditioning vector [B, 4 width], float32. If there is a second time, s is not None.
        """
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.map_layer0.weight.dtype
            t = t.to(dtype)
            emb = self.time_features(t)
            if self.map_second is not None:
                emb = emb + self.map_second(self.map_noise(self.time_scale * s.to(dtype)))
            if self.map_label is not None:
                emb = emb + self.map_label(unit_labels(y, emb, self.num_classes))
            if self.map_augment is not None:
                if augment is None:        # zeros, because DDP needs every weight to be used
                    augment = torch.zeros(t.shape[0], self.augment_dim, device=t.device)
                emb = emb + self.map_augment(augment.to(dtype))
            emb = F.silu(self.map_layer0(emb))
            return F.silu(self.map_layer1(emb))

    def forward(self, x, t, s=None, y=None, augment=None, tangent=None):
        """See the top of this file. augment: the labels of augmentation, float [B, augment_dim];
        None means zeros."""
        if tangent is not None:
            h = self.forward(*duals((x, t, s), tangent), y, augment)
            return h.value, h.tangent
        s = second_time_or_t(self, t, s)
        emb = self.embed(t, s, y, augment)
        h = x
        if self.sigma_data is not None:
            c_in, c_skip, c_out = edm_scalings(t, self.sigma_data)
            h = c_in * x

        skips = []
        aux = h
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                aux = (h + layer(aux)) * math.sqrt(0.5)
                h = aux
                skips[-1] = aux
            elif name.endswith("_conv"):
                h = layer(h)
                skips.append(h)
            else:
                h = run_block(self, layer, h, emb)
                skips.append(h)
        for name, layer in self.dec.items():
            if name.endswith("_aux_norm"):
                h = F.silu(layer(h))
            elif name.endswith("_aux_conv"):
                h = layer(h)
            else:
                if "_block" in name:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = run_block(self, layer, h, emb)

        if self.sigma_data is not None:
            h = c_skip * x + c_out * h
        return h.to(x.dtype)


# --------------------------------------------------------------------------------------------------
# EDM2's U-Net (Karras et al. 2024, whose equations these are) in the layout of NVlabs/edm2's UNet.

def mp_normalise(x, dim=None, eps=1e-4):
    """x over (its root mean square + eps), along dim; None: all dimensions but the first."""
    if dim is None:
        dim = tuple(range(1, x.dim()))
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    count = math.prod([x.shape[d] for d in dim])
    return x.div(norm.mul(count ** -0.5).add(eps))


def mp_silu(x):
    """SiLU at the magnitude of its input."""
    return F.silu(x).mul(1 / 0.596)                                    # Eq. 81


def mp_sum(a, b, share):
    """(1 - share) a + share b, at the magnitude of one of them."""
    total = a.mul(1 - share) + b.mul(share)
    return total.mul(math.hypot(1 - share, share) ** -1)               # Eq. 88


def mp_cat(a, b):
    """a and b side by side, each with half of the magnitude."""
    half = (a.shape[1] + b.shape[1]) / 2
    a = a.mul((half / a.shape[1]) ** 0.5)                              # Eq. 103, t = 1/2
    b = b.mul((half / b.shape[1]) ** 0.5)
    return torch.cat([a, b], dim=1)


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
    """A convolution without bias, or a linear layer if there is no kernel. Each forward pass
    normalises the weight [outputs, inputs, ...] for each output, and multiplies it by `gain`."""

    def __init__(self, inputs, outputs, *kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((outputs, inputs, *kernel)))

    def forward(self, x, gain=1.0):
        fan_in = self.weight[0].numel()
        w = mp_normalise(self.weight) * (gain / fan_in ** 0.5)         # Eq. 47
        if w.dim() == 2:
            return F.linear(x, w)
        return F.conv2d(x, w, padding=w.shape[-1] // 2)


class EDM2Block(nn.Module):
    """Block of EDM2's encoder or decoder (Figure 21). heads=0 means no self-attention.

    x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W'], at twice the size
    with up and at half of it with down
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout, decoder=False, up=False,
                 down=False, heads=0):
        super().__init__()
        self.decoder = decoder
        self.up = up
        self.down = down
        self.heads = heads
        conv_channels = out_channels       # the encoder's skip comes before the convolutions
        if decoder:
            conv_channels = in_channels
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.conv_res0 = MPConv(conv_channels, out_channels, 3, 3)
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
        if self.up:
            x = F.interpolate(x, scale_factor=2)
        if self.down:
            x = F.avg_pool2d(x, 2)
        skip = x
        if self.conv_skip is not None:
            skip = self.conv_skip(x)
        if not self.decoder:
            skip = mp_normalise(skip, (1,))                            # pixel normalisation
            x = skip
        h = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain).add(1)
        h = self.dropout(mp_silu(h * scale[:, :, None, None]))
        x = mp_sum(skip, self.conv_res1(h), 0.3)
        if self.heads:
            h = self.attend(self.attn_qkv(x))
            x = mp_sum(x, self.attn_proj(h), 0.3)
        return x.clamp(-256, 256)

    def attend(self, qkv):
        """Self-attention of normalised q, k and v, which alternate in qkv:
        [B, 3C, H, W] -> [B, C, H, W]."""
        B, channels, H, W = qkv.shape
        qkv = mp_normalise(qkv.reshape(B, self.heads, -1, 3, H * W), (2,))
        # Fused attention needs float32 or more, and the channels as the last dimension.
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).to(wide).contiguous().unbind(0)
        with torch.autocast(qkv.device.type, enabled=False):
            h = F.scaled_dot_product_attention(q, k, v)                # [B, heads, HW, C / heads]
        return h.to(qkv.dtype).transpose(2, 3).reshape(B, channels // 3, H, W)


class EDM2(nn.Module):
    """EDM2's U-Net inside its preconditioning, as the velocity of the linear flow (see
    edm_scalings).

    head_channels  channels of an attention head; where a resolution has fewer channels than that,
                   it has no attention, as in NVlabs/edm2
    dropout_res    the highest resolution with dropout; None means all
    sigma_data     standard deviation of the data, a positive number
    others         see DDPMpp

    Its time is that of DDPMpp with edm_time=True. The head logvar, an uncertainty, is left out.

    Raises ValueError for options out of their range, and for sizes that do not divide.
    """

    expandable = False
    edm_time = True

    def __init__(self, input_size, in_channels=3, num_classes=0, width=192, mult=(1, 2, 3, 4),
                 blocks=3, attention=(16, 8), head_channels=64, dropout=0.0, dropout_res=None,
                 second_time=False, sigma_data=0.5):
        super().__init__()
        check_unet(input_size, in_channels, num_classes, width, mult, blocks, attention, dropout)
        check_at_least(1, head_channels=head_channels)
        check_positive(sigma_data=sigma_data)
        if dropout_res is not None:
            check_at_least(1, dropout_res=dropout_res)
        self.num_classes = num_classes
        self.second_time = second_time
        self.sigma_data = sigma_data

        # The embedding of times and label
        first_channels = width * mult[0]
        emb_channels = width * max(mult)
        self.emb_fourier = MPFourier(first_channels)
        self.emb_noise = MPConv(first_channels, emb_channels)
        self.emb_label = None
        if num_classes:
            self.emb_label = MPConv(num_classes, emb_channels)
        self.map_second = None
        if second_time:
            self.map_second = nn.Sequential(
                Linear(first_channels, width), nn.SiLU(), Linear(width, emb_channels, gain=0.0))

        def block(size, inputs, outputs, attention=False, **options):
            heads = 0
            if attention:
                heads = outputs // head_channels
            if heads > 0 and outputs % heads:
                raise ValueError(f"{outputs} channels do not divide into {heads} attention heads; "
                                 f"change head_channels={head_channels}, width={width} or "
                                 f"mult={mult}")
            p = dropout
            if dropout_res is not None and size > dropout_res:
                p = 0.0
            return EDM2Block(inputs, outputs, emb_channels, p, heads=heads, **options)

        # The encoder, from the highest resolution to the lowest
        self.enc = nn.ModuleDict()
        channels = first_channels          # after the layers so far
        skips = []                         # channels of what the decoder gets from the encoder
        for level, multiple in enumerate(mult):
            size = input_size >> level
            name = f"{size}x{size}"
            if level == 0:
                self.enc[f"{name}_conv"] = MPConv(in_channels + 1, channels, 3, 3)
            else:
                self.enc[f"{name}_down"] = block(size, channels, channels, down=True)
            skips.append(channels)
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = block(
                    size, channels, width * multiple, size in attention)
                channels = width * multiple
                skips.append(channels)

        # The decoder, from the lowest resolution to the highest
        self.dec = nn.ModuleDict()
        lowest = len(mult) - 1
        for level in range(lowest, -1, -1):
            size = input_size >> level
            name = f"{size}x{size}"
            if level == lowest:
                self.dec[f"{name}_in0"] = block(size, channels, channels, True, decoder=True)
                self.dec[f"{name}_in1"] = block(size, channels, channels, decoder=True)
            else:
                self.dec[f"{name}_up"] = block(size, channels, channels, up=True, decoder=True)
            for i in range(blocks + 1):
                self.dec[f"{name}_block{i}"] = block(
                    size, channels + skips.pop(), width * mult[level], size in attention,
                    decoder=True)
                channels = width * mult[level]
        self.out_conv = MPConv(channels, in_channels, 3, 3)
        self.out_gain = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def force_weight_norm(self):
        """Forced weight normalisation (Eq. 66), in place. A training script calls it at the start
        of each step. The constructor does not normalise the weights that it draws.

        paper: in each training pass; here: at the start of each step, because all passes of a step
        then use the same weights. Under FSDP each process normalises its own rows.
        """
        for layer in self.modules():
            if isinstance(layer, MPConv):
                weight = layer.weight
                if hasattr(weight, "to_local"):            # FSDP's: the rows of this process
                    weight = weight.to_local()
                weight.copy_(mp_normalise(weight))

    def embed(self, t, s, y):
        """The conditioning vector [B, max(mult) width], float32. s is not None if there is a second
        time."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.emb_noise.weight.dtype
            emb = self.emb_noise(self.emb_fourier(edm_noise(t.to(dtype))))
            if self.emb_label is not None:
                label = self.emb_label(unit_labels(y, emb, self.num_classes))
                emb = mp_sum(emb, label, 0.5)
            if self.map_second is not None:
                emb = emb + self.map_second(self.emb_fourier(edm_noise(s.to(dtype))))
            return mp_silu(emb)

    def forward(self, x, t, s=None, y=None, tangent=None):
        """See the top of this file."""
        if tangent is not None:
            h = self.forward(*duals((x, t, s), tangent), y)
            return h.value, h.tangent
        s = second_time_or_t(self, t, s)
        emb = self.embed(t, s, y)
        c_in, c_skip, c_out = edm_scalings(t, self.sigma_data)
        # A channel of ones, in place of biases
        ones = torch.ones((x.shape[0], 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        h = torch.cat([c_in * x, ones], dim=1)

        skips = []
        for name, layer in self.enc.items():
            if name.endswith("_conv"):
                h = layer(h)
            else:
                h = run_block(self, layer, h, emb)
            skips.append(h)
        for name, layer in self.dec.items():
            if "_block" in name:
                h = mp_cat(h, skips.pop())
            h = run_block(self, layer, h, emb)
        h = self.out_conv(h, self.out_gain)
        return (c_skip * x + c_out * h).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# DiT (Peebles & Xie 2023), whose layout SiT shares, and LightningDiT (Yao et al. 2025).

def modulate(x, shift, scale):
    """(1 + scale) x + shift, for tokens x [B, N, D], shift [B, D] or None, and scale [B, D]."""
    x = x * (1 + scale[:, None])
    if shift is None:
        return x
    return x + shift[:, None]


def pixel_norm(x):
    """x [B, D, ...] scaled to a mean square of 1 over D (sCM's modulation; FACM A.3(c))."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, of `width` channels. With affine=True a weight
    and a bias are applied outside of F.layer_norm, because torch.compile needs this."""

    def __init__(self, width, eps=1e-6, affine=False):
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = None
        self.bias = None
        if affine:
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        x = F.layer_norm(x, (self.width,), eps=self.eps)
        if self.weight is None:
            return x
        return x * self.weight + self.bias


class RMSNorm(nn.Module):
    """x divided by its root mean square along the last dimension, in float32 or more, and then
    multiplied by a weight."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class RoPE(nn.Module):
    """Rotary position embedding on a square grid: half of the channels of a head rotate with the
    row, and half with the column. q or k [B, heads, grid * grid, head_dim] -> the same shape."""

    def __init__(self, head_dim, grid):
        super().__init__()
        half = head_dim // 2
        freqs = 1e4 ** (-torch.arange(0, half, 2).float() / half)
        angle = torch.arange(grid)[:, None] * freqs
        angle = angle.repeat_interleave(2, dim=1)                      # [grid, half]
        row = angle[:, None].expand(-1, grid, -1)
        column = angle.expand(grid, -1, -1)
        angle = torch.cat([row, column], dim=-1)                       # [grid, grid, head_dim]
        self.register_buffer("freqs_cos", angle.cos().flatten(0, 1))
        self.register_buffer("freqs_sin", angle.sin().flatten(0, 1))

    def forward(self, x):
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention of tokens [B, N, D]; qknorm normalises queries and keys."""

    def __init__(self, width, heads, qknorm=False, rmsnorm=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if not qknorm:
            self.q_norm = nn.Identity()
            self.k_norm = nn.Identity()
        elif rmsnorm:
            self.q_norm = RMSNorm(width // heads)
            self.k_norm = RMSNorm(width // heads)
        else:
            self.q_norm = LayerNorm(width // heads, eps=1e-5, affine=True)
            self.k_norm = LayerNorm(width // heads, eps=1e-5, affine=True)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                 # [B, heads, N, d] each
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            q = rope(q)
            k = rope(k)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with GELU in between, [..., width] -> the same shape."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """An MLP that is gated by SiLU, [..., width] -> the same shape."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, h = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * h)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the embedding (adaLN-Zero).

    x [B, N, D], emb [B, D] -> [B, N, D]; the options are those of DiT, and rope is a RoPE or None.
    """

    def __init__(self, width, heads, mlp_ratio, qknorm, swiglu, rmsnorm, wo_shift, pixelnorm):
        super().__init__()
        norm = LayerNorm
        if rmsnorm:
            norm = RMSNorm
        hidden = int(width * mlp_ratio)
        self.wo_shift = wo_shift
        self.pixelnorm = pixelnorm
        self.norm1 = norm(width)
        self.attn = Attention(width, heads, qknorm, rmsnorm)
        self.norm2 = norm(width)
        if swiglu:
            self.mlp = SwiGLU(width, int(2 / 3 * hidden))
        else:
            self.mlp = Mlp(width, hidden)
        self.parts = 6                     # shift, scale and gate, of attention and of MLP
        if wo_shift:
            self.parts = 4
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.parts * width))

    def forward(self, x, emb, rope):
        parts = self.adaLN_modulation(emb).chunk(self.parts, dim=1)    # [B, D] each
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = parts
            shift1 = None
            shift2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
        if self.pixelnorm:
            scale1 = pixel_norm(scale1)
            scale2 = pixel_norm(scale2)
        if self.pixelnorm and not self.wo_shift:
            shift1 = pixel_norm(shift1)
            shift2 = pixel_norm(shift2)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attn(h, rope)
        h = modulate(self.norm2(x), shift2, scale2)
        return x + gate2[:, None] * self.mlp(h)


class FinalLayer(nn.Module):
    """Tokens x [B, N, D], emb [B, D] -> pixels of the patches [B, N, out]."""

    def __init__(self, width, out, rmsnorm, pixelnorm):
        super().__init__()
        if rmsnorm:
            self.norm_final = RMSNorm(width)
        else:
            self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.pixelnorm = pixelnorm

    def forward(self, x, emb):
        shift, scale = self.adaLN_modulation(emb).chunk(2, dim=1)
        if self.pixelnorm:
            shift = pixel_norm(shift)
            scale = pixel_norm(scale)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimeEmbedder(nn.Module):
    """A time [B] -> [B, width], from 128 cosines and sines with frequencies from 1 to almost
    1e-4."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        t = t.to(self.mlp[0].weight.dtype)
        freqs = 1e4 ** (-torch.arange(128, dtype=t.dtype, device=t.device) / 128)
        angle = t[:, None] * freqs
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def sincos_2d(width, grid):
    """The fixed position embedding of a square grid, float32 [1, grid * grid, width]. Half of the
    channels are for the column and half for the row, and each half is sines, then cosines. It is
    computed in float64."""
    freqs = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * freqs                  # [grid, D/4]
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                               # [grid, D/2]
    column = line.expand(grid, -1, -1)                                          # [grid, grid, D/2]
    row = line[:, None].expand(-1, grid, -1)
    both = torch.cat([column, row], dim=-1)                                     # [grid, grid, D]
    return both.flatten(0, 1)[None].float()


class DiT(nn.Module):
    """Diffusion transformer, in the layout of facebookresearch/DiT and SiT or, with some of its
    options, of hustvl/LightningDiT and FACM's release.

    input_size, patch         height and width of x, and of a patch
    in_channels               C of x
    num_classes               number of classes; 0 builds no label embedding
    width, depth, heads       channels of a token, number of blocks, attention heads of a block
    mlp_ratio                 hidden channels of the MLP, as a multiple of the width
    qknorm, swiglu, rope,     LightningDiT's normalised queries and keys, gated MLP, rotary
    rmsnorm, wo_shift         positions, RMS normalisation, modulation by scale alone
    learn_sigma               the final layer has a second half, the variance, which is dropped
    second_time               builds r_embedder, whose output is zero before it is trained
    pixelnorm                 normalises the modulation's scale and shift (sCM; FACM A.3(c))
    prediction                "velocity", or "noise" for the weights of a DDPM noise predictor with
                              1000 discrete times (facebookresearch/DiT); the output is then its
                              velocity, which is exact for sigma = (1-t) / t in [0.01, 157]

    With "noise" FACM needs --condition auxiliary, and the network runs in the precision of its
    parameters even under autocast. The velocity is (x - noise) / t, which amplifies the rounding of
    the noise up to 158 times: with a network in bfloat16 it would have a root mean square error of
    0.30 at t = 0, of 0.17 at t = 0.01 and of 0.04 at t = 0.05.

    Raises ValueError for options out of their range, and for sizes that do not divide.
    """

    def __init__(self, input_size, in_channels=4, num_classes=1000, patch=2, width=1152, depth=28,
                 heads=16, mlp_ratio=4.0, qknorm=False, swiglu=False, rope=False, rmsnorm=False,
                 wo_shift=False, learn_sigma=False, second_time=False, pixelnorm=False,
                 prediction="velocity"):
        super().__init__()
        check_at_least(1, input_size=input_size, in_channels=in_channels, patch=patch, width=width,
                       depth=depth, heads=heads)
        check_at_least(0, num_classes=num_classes)
        check_positive(mlp_ratio=mlp_ratio)
        if input_size % patch:
            raise ValueError(f"patches of {patch} do not divide the input_size {input_size}")
        if width % heads:
            raise ValueError(f"{heads} heads do not divide the width {width}")
        if (width // heads) % 4:
            raise ValueError(f"4 does not divide the {width // heads} channels of a head, which "
                             f"are width {width} / heads {heads}")
        hidden = int(width * mlp_ratio)
        if swiglu:
            hidden = int(2 / 3 * hidden)
        if hidden < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} is too small: the MLP has no hidden channels")
        if prediction not in ("velocity", "noise"):
            raise ValueError(f"prediction={prediction!r} is unknown: it must be 'velocity' or "
                             "'noise'")
        self.num_classes = num_classes
        self.second_time = second_time
        self.prediction = prediction
        self.expandable = prediction == "velocity"
        self.patch = patch
        self.in_channels = in_channels
        self.heads = heads
        self.pixelnorm = pixelnorm
        grid = input_size // patch

        projection = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.x_embedder = nn.ModuleDict({"proj": projection})
        self.t_embedder = TimeEmbedder(width)
        self.r_embedder = None
        if second_time:
            self.r_embedder = TimeEmbedder(width)
        self.y_embedder = None
        if num_classes:
            table = nn.Embedding(num_classes + 1, width)
            self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.pos_embed = nn.Parameter(sincos_2d(width, grid), requires_grad=False)
        self.feat_rope = None
        if rope:
            self.feat_rope = RoPE(width // heads, grid)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(DiTBlock(
                width, heads, mlp_ratio, qknorm, swiglu, rmsnorm, wo_shift, pixelnorm))
        out = patch * patch * in_channels
        if learn_sigma:
            out = 2 * out
        self.final_layer = FinalLayer(width, out, rmsnorm, pixelnorm)
        if prediction == "noise":
            # ln sigma at DDPM's 1000 times; its variance beta rises linearly
            beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
            alpha_bar = (1 - beta).cumprod(0)
            log_sigma = ((1 - alpha_bar) / alpha_bar).log() / 2
            self.register_buffer("log_sigma", log_sigma.float(), persistent=False)
        self.initialise()

    def initialise(self):
        """The published initialisation (adaLN-Zero): each block is the identity, and the output is
        zero. The output of r_embedder is zero as well."""
        for name, p in self.named_parameters():
            if name == "pos_embed":
                continue
            if name.endswith("bias") or "adaLN" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)
            elif name == "r_embedder.mlp.2.weight":
                nn.init.zeros_(p)
            elif "t_embedder" in name or "r_embedder" in name or "y_embedder" in name:
                nn.init.normal_(p, std=0.02)
            elif p.dim() > 1:
                nn.init.xavier_uniform_(p.flatten(1))

    def embed(self, t, s, y):
        """The conditioning vector [B, D], float32. s is not None if there is a second time."""
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
        """The output of the final layer, [B, C, H, W], for x [B, C, H, W] and emb [B, D]."""
        B, _, H, W = x.shape
        p = self.patch
        h = self.x_embedder["proj"](x)                                 # [B, D, H/p, W/p]
        h = h.flatten(2).transpose(1, 2) + self.pos_embed              # [B, N, D]
        for block in self.blocks:
            h = run_block(self, block, h, emb, self.feat_rope)
        h = self.final_layer(h, emb)                                   # [B, N, p p C']
        h = h.reshape(B, H // p, W // p, p, p, -1)
        h = h.permute(0, 5, 1, 3, 2, 4)                                # [B, C', H/p, p, W/p, p]
        h = h.reshape(B, -1, H, W)
        return h[:, :self.in_channels].to(x.dtype)                     # without the variance

    def forward(self, x, t, s=None, y=None, tangent=None):
        """See the top of this file."""
        if tangent is not None:
            h = self.forward(*duals((x, t, s), tangent), y)
            return h.value, h.tangent
        s = second_time_or_t(self, t, s)
        if self.prediction == "noise":
            return self.velocity_from_noise(x, t, s, y)
        return self.output(x, self.embed(t, s, y))

    def velocity_from_noise(self, x, t, s, y):
        """The velocity [B, C, H, W] of a noise predictor. The network receives, without autocast,
        the point of the variance-preserving path that has the same ratio of noise to data as x."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.pos_embed.dtype)
            flow_t = (1 - (1 - t).abs()).clamp(1 / 158, 0.99)
            k = self.discrete_time(((1 - flow_t) / flow_t).log())
            flow_t = flow_t[:, None, None, None]
            scale = ((1 - flow_t) ** 2 + flow_t ** 2).rsqrt()
            eps = self.output(wide * scale, self.embed(k, s, y))
            velocity = (wide - eps) / flow_t                           # x_1 - x_0, where x_0 = eps
            return velocity.to(x.dtype)

    def discrete_time(self, log_sigma):
        """DDPM's time in [0, 999] for ln sigma [B], linear in ln sigma between whole times."""
        table = self.log_sigma.to(log_sigma.dtype)
        k = torch.searchsorted(table, log_sigma.detach().contiguous()).clamp(1, 999)
        distance = (table[k] - log_sigma).div(table[k] - table[k - 1])
        return (k - distance).clamp(0, 999)


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
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return h + x


class AttnBlock(nn.Module):
    """Single-head self-attention of the pixels, [B, channels, H, W] -> the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q = self.q(h).flatten(2).transpose(1, 2)                       # [B, HW, C]
        k = self.k(h).flatten(2).transpose(1, 2)
        v = self.v(h).flatten(2).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """A convolution at twice the size, or, without `up`, at half of it, padded right and below."""

    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        if up:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2)
        else:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Coder(nn.Module):
    """The encoder, [B, channels_in, H, W] -> [B, channels_out, H/f, W/f] with f = 2^(levels-1), or
    the decoder in the opposite direction.

    attention: the levels, 0 being full resolution, whose blocks are followed by attention."""

    def __init__(self, decoder, channels_in, channels_out, width, mult, blocks, attention):
        super().__init__()
        self.decoder = decoder
        levels = list(range(len(mult)))
        channels = width                   # after the layers so far
        if decoder:
            levels.reverse()
            blocks = blocks + 1
            channels = width * mult[-1]
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        stages = {}
        for level in levels:
            stage = nn.ModuleDict({"block": nn.ModuleList(), "attn": nn.ModuleList()})
            stages[level] = stage
            for _ in range(blocks):
                stage["block"].append(ResnetBlock(channels, width * mult[level]))
                channels = width * mult[level]
                if level in attention:
                    stage["attn"].append(AttnBlock(channels))
            if level == levels[-1]:
                continue
            if decoder:
                stage["upsample"] = Resample(channels, up=True)
            else:
                stage["downsample"] = Resample(channels, up=False)
        middle = width * mult[-1]
        self.mid = nn.ModuleDict({
            "block_1": ResnetBlock(middle, middle),
            "attn_1": AttnBlock(middle),
            "block_2": ResnetBlock(middle, middle)})
        # Level 0 comes first in both, although the decoder runs it last.
        in_order = nn.ModuleList([stages[level] for level in sorted(stages)])
        if decoder:
            self.up = in_order
        else:
            self.down = in_order
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, channels_out, 3, padding=1)

    def run_stage(self, stage, h):
        """The blocks of one level, and its resampling if it has one."""
        for i, block in enumerate(stage["block"]):
            h = block(h)
            if len(stage["attn"]) > 0:
                h = stage["attn"][i](h)
        if "downsample" in stage:
            h = stage["downsample"](h)
        if "upsample" in stage:
            h = stage["upsample"](h)
        return h

    def run_middle(self, h):
        """The blocks between encoder or decoder and latents."""
        h = self.mid["block_1"](h)
        h = self.mid["attn_1"](h)
        return self.mid["block_2"](h)

    def forward(self, x):
        h = self.conv_in(x)
        if self.decoder:
            h = self.run_middle(h)
            for stage in reversed(self.up):
                h = self.run_stage(stage, h)
        else:
            for stage in self.down:
                h = self.run_stage(stage, h)
            h = self.run_middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, z_channels, H/f, W/f], f = 2^(len(mult)-1);
    f divides H and W.

    z_channels   channels of the latents
    width, mult  channels at full resolution, and their multiples as the resolution halves
    blocks       residual blocks at each resolution of the encoder; the decoder has one more
    attention    the levels whose blocks are followed by attention, 0 being full resolution
    scale        the factor of the latents in the methods (SD-VAE); those of VA-VAE have a mean and
                 a std instead (latents_stats)

    encode and decode work on latents without this scale.

    Raises ValueError for options out of their range, and for sizes that do not divide.
    """

    def __init__(self, z_channels, mult, width=128, blocks=2, attention=(), scale=1.0):
        super().__init__()
        check_at_least(1, z_channels=z_channels, mult=mult, width=width, blocks=blocks)
        check_positive(scale=scale)
        if len(mult) == 0:
            raise ValueError("mult is empty: it needs one number for each resolution")
        for channels in [width, *[width * multiple for multiple in mult]]:
            if channels % 32:
                raise ValueError(f"{channels} channels do not divide into 32 groups; use a width "
                                 "that is a multiple of 32")
        for level in attention:
            if level not in range(len(mult)):
                raise ValueError(f"attention={attention} names level {level}, and the autoencoder "
                                 f"has the levels 0 to {len(mult) - 1}")
        self.z_channels = z_channels
        self.scale = scale
        self.factor = 2 ** (len(mult) - 1)
        self.encoder = Coder(False, 3, 2 * z_channels, width, mult, blocks, attention)
        self.decoder = Coder(True, z_channels, 3, width, mult, blocks, attention)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)

    def encode(self, x):
        """Mean and standard deviation [B, z_channels, H/f, W/f] of the posterior."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        std = (logvar.clamp(-30, 20) / 2).exp()
        return mean, std

    def decode(self, z):
        """Images [B, 3, H, W] from latents."""
        return self.decoder(self.post_quant_conv(z))


# --------------------------------------------------------------------------------------------------
# The networks by name.

# The released LightningDiT: the size of VA-VAE's latents, and the options of its blocks
LightningDiT = partial(DiT, input_size=16, in_channels=32, swiglu=True, rope=True, rmsnorm=True)

NETWORKS = {
    "DDPM++":              DDPMpp,
    "NCSN++":              partial(DDPMpp, ncsn=True),
    "EDM2":                EDM2,
    "EDM2-XS":             partial(EDM2, width=128),
    "EDM2-S":              partial(EDM2, width=192),
    "EDM2-M":              partial(EDM2, width=256),
    "EDM2-L":              partial(EDM2, width=320),
    "EDM2-XL":             partial(EDM2, width=384),
    "DiT":                 DiT,
    "LightningDiT":        LightningDiT,
    "AutoencoderKL":       AutoencoderKL,
    "AutoencoderKL-f8d4":  partial(AutoencoderKL, z_channels=4, mult=(1, 2, 4, 4), scale=0.18215),
    "VAVAE-f16d32":        partial(AutoencoderKL, z_channels=32, mult=(1, 1, 2, 2, 4),
                                   attention=(4,)),
    "DiT-S/2":             partial(DiT, patch=2, width=384,  depth=12, heads=6),
    "DiT-S/4":             partial(DiT, patch=4, width=384,  depth=12, heads=6),
    "DiT-S/8":             partial(DiT, patch=8, width=384,  depth=12, heads=6),
    "DiT-B/2":             partial(DiT, patch=2, width=768,  depth=12, heads=12),
    "DiT-B/4":             partial(DiT, patch=4, width=768,  depth=12, heads=12),
    "DiT-B/8":             partial(DiT, patch=8, width=768,  depth=12, heads=12),
    "DiT-L/2":             partial(DiT, patch=2, width=1024, depth=24, heads=16),
    "DiT-L/4":             partial(DiT, patch=4, width=1024, depth=24, heads=16),
    "DiT-L/8":             partial(DiT, patch=8, width=1024, depth=24, heads=16),
    "DiT-XL/2":            partial(DiT, patch=2, width=1152, depth=28, heads=16),
    "DiT-XL/4":            partial(DiT, patch=4, width=1152, depth=28, heads=16),
    "DiT-XL/8":            partial(DiT, patch=8, width=1152, depth=28, heads=16),
    "LightningDiT-B/1":    partial(LightningDiT, patch=1, width=768,  depth=12, heads=12),
    "LightningDiT-B/2":    partial(LightningDiT, patch=2, width=768,  depth=12, heads=12),
    "LightningDiT-L/2":    partial(LightningDiT, patch=2, width=1024, depth=24, heads=16),
    "LightningDiT-XL/1":   partial(LightningDiT, patch=1, width=1152, depth=28, heads=16),
    "LightningDiT-XL/2":   partial(LightningDiT, patch=2, width=1152, depth=28, heads=16),
    "LightningDiT-1p0B/1": partial(LightningDiT, patch=1, width=1536, depth=24, heads=24),
    "LightningDiT-1p0B/2": partial(LightningDiT, patch=2, width=1536, depth=24, heads=24),
    "LightningDiT-1p6B/1": partial(LightningDiT, patch=1, width=1792, depth=28, heads=28),
    "LightningDiT-1p6B/2": partial(LightningDiT, patch=2, width=1792, depth=28, heads=28),
}

# The name of each class in NETWORKS, without a size. NCSN++ has a separate name.
BASES = {DDPMpp: "DDPM++", EDM2: "EDM2", DiT: "DiT", AutoencoderKL: "AutoencoderKL"}

# The types of the options that may be None
OPTIONAL = {"sigma_data": float, "dropout_res": int}


def find(name):
    """The constructor of the network `name`. Raises ValueError for an unknown name."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; the networks are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def check_type(key, value, kind):
    """Raises ValueError if the value of option `key` is not of type kind: bool, int, float or str.
    For a float an int is also accepted, and neither may be infinite or NaN."""
    expected = kind.__name__
    if kind is float:
        expected = "a finite number"
        fits = isinstance(value, (int, float)) and abs(value) < math.inf
    else:
        fits = isinstance(value, kind)
    if kind is not bool and isinstance(value, bool):       # for Python, True is an int
        fits = False
    if not fits:
        raise ValueError(f"network option {key}={value!r}: expected {expected}")


def check_option(constructor, key, value):
    """Returns the value of a network's option. If several numbers are expected, a list or a single
    number becomes a tuple. Options that the network does not have are not checked.

    Raises ValueError for a value whose type is not that of the option's default.
    """
    parameters = inspect.signature(constructor).parameters
    if key not in parameters:
        return value
    default = parameters[key].default
    if key == "mult" or isinstance(default, tuple):
        if not isinstance(value, (list, tuple)):
            value = (value,)
        for number in value:
            check_type(key, number, int)
        return tuple(value)
    if key in OPTIONAL:
        if value is not None or default is not None:
            check_type(key, value, OPTIONAL[key])
    elif default is inspect.Parameter.empty:               # input_size, z_channels
        check_type(key, value, int)
    else:
        check_type(key, value, type(default))
    return value


def expand(options):
    """The options of a network, with the name replaced by that of its class and by the options that
    the name implies. Options that are given override those.

    options: {"name": ..., option: value}, as for `create`. Returns a new dict. The name in it is
    "DDPM++", "NCSN++", "EDM2", "DiT" or "AutoencoderKL", and create(**expand(options)) builds the
    same network as create(**options). For example {"name": "EDM2-S", "blocks": 2} becomes
    {"name": "EDM2", "width": 192, "blocks": 2}. Defaults of the class are not added.

    Raises ValueError for an unknown name, and for a value of the wrong type.
    """
    name = options.get("name")
    constructor = find(name)
    implied = {"name": name}
    if isinstance(constructor, partial) and name != "NCSN++":
        implied = {"name": BASES[constructor.func], **constructor.keywords}
    given = {}
    for key, value in options.items():
        if key != "name":
            given[key] = check_option(constructor, key, value)
    return implied | given


def create(name, seed=None, device=None, **options):
    """Builds a network.

    name      a name of NETWORKS
    seed      the weights are drawn from it; None means from PyTorch's random state
    device    the network is moved to it after the weights were drawn, so the weights do not depend
              on the device; None means PyTorch's default device
    options   the arguments of the network's class

    Returns an nn.Module in train mode, float32. Also works under PyTorch's FakeTensorMode.

    Raises ValueError for an unknown name, for an unknown or missing option, for a value of the
    wrong type or out of its range, and for sizes that do not fit together, so that every network
    that is built also runs.
    """
    constructor = find(name)
    options = {key: check_option(constructor, key, value) for key, value in options.items()}
    problem = f"cannot build the network {name} with these options"
    try:
        inspect.signature(constructor).bind(**options)
    except TypeError as error:             # an unknown or a missing option
        raise ValueError(f"{problem}: {error}") from None
    try:
        net = draw(constructor, seed, options)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{problem}: {error}") from None
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise ValueError(f"{problem}: the sizes are too large for a tensor") from None
    use_channels_last(net)
    # Module.to does not work on the parameters of FakeTensorMode.
    if device is not None and torch.device(device).type != "cpu":
        net.to(device)
    return net


def draw(constructor, seed, options):
    """constructor(**options) with weights that are drawn from a seed, without changing PyTorch's
    random state, or from that state if the seed is None."""
    if seed is None:
        return constructor(**options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return constructor(**options)


def use_channels_last(net):
    """Changes the memory format of convolutions to channels last, in place, which makes them a
    tenth faster on a CPU. Does nothing before torch 2.14, where the forward mode of group_norm
    fails on such tensors."""
    if torch.__version__ < (2, 14):
        return
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def shard(net):
    """Shards the parameters of net over the processes (FSDP), in place. A block is gathered when it
    is computed. Gradients are also sharded, and so is the state of an optimiser that is created
    afterwards. Between two passes all parameters are sharded, so that the average of the weights
    can be updated after a preview was drawn with it."""
    from torch.distributed.device_mesh import init_device_mesh  # here: this takes a second
    from torch.distributed.fsdp import fully_shard
    net.to(memory_format=torch.contiguous_format)          # FSDP supports no other layout
    device = next(net.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [m for m in net.modules() if isinstance(m, (UNetBlock, EDM2Block, DiTBlock))]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
