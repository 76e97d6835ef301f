"""EDM's augmentation. The network receives its parameters as labels, so that samples are not
augmented."""

import math

import torch
import torch.nn.functional as F

# Wavelet filter sym6 (Daubechies), in which images are resampled without aliasing.
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)


def augment(x, generator, p=0.12, batch=None, rows=slice(None)):
    """EDM's augmentation for CIFAR-10 (Karras et al. 2022, Appendix F.2): x [B, C, H, W] on any
    device -> augmented x and labels [B, 9], which are zero for an image that did not change.
    x may be the `rows` of a larger `batch`. The random numbers are then drawn for that batch.

    Half of the images are mirrored. Each of the following changes is applied with the probability
    p, where n is a standard normal number: turning upside down (in half of the cases), scaling by
    2^(0.2 n), rotation by any angle, stretching by 2^(0.2 n) along an axis that is rotated in half
    of the cases, and translation by 0.125 n of the size.
    """
    B, C, H, W = x.shape
    normal = torch.randn((4, batch or B), generator=generator)[:, rows].to(x)
    u = torch.rand((10, batch or B), generator=generator)[:, rows].to(x)
    done = lambda i, value: torch.where(u[i] < p, value, torch.zeros_like(value))  # noqa: E731
    mirror, down = (u[0] < 0.5).to(x), done(1, (u[2] < 0.5).to(x))
    scale, angle = done(3, normal[0]), done(4, (2 * u[5] - 1) * math.pi)
    stretch, tx, ty = done(6, normal[1]), done(7, normal[2]), done(7, normal[3])
    axis = torch.where(u[8] < 0.5, (2 * u[9] - 1) * math.pi, torch.zeros_like(angle))
    labels = torch.stack([mirror, down, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(),
                          stretch * axis.sin(), tx, ty], dim=1)

    def matrix(a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
        rows = [torch.as_tensor(v).to(x).expand(B) for v in (a, b, c, d, e, f, 0.0, 0.0, 1.0)]
        return torch.stack(rows, dim=1).reshape(B, 3, 3)

    def turn(phi):
        return matrix(phi.cos(), -phi.sin(), 0.0, phi.sin(), phi.cos(), 0.0)

    # From a place in the output to its place in the input, in pixels from the centre
    s, r = torch.exp2(-0.2 * scale), torch.exp2(0.2 * stretch)
    inverse = (matrix(s, e=s) @ turn(angle) @ turn(-axis) @ matrix(1 / r, e=r) @ turn(axis)
               @ matrix(c=-0.125 * W * tx, f=-0.125 * H * ty))
    x = torch.where(mirror[:, None, None, None] > 0, x.flip(3), x)
    x = torch.where(down[:, None, None, None] > 0, x.flip(2), x)

    # Pad by reflection, upsample by 2, resample bilinearly, downsample; `more` pixels on all sides
    taps, pad, more = torch.tensor(SYM6).to(x), (W - 1, W - 1, H - 1, H - 1), len(SYM6) // 4
    x = F.pad(x, pad, mode="reflect")
    h, w = x.shape[2:]
    kernel = taps.flip(0).expand(C, 1, 1, -1)
    zeros = torch.zeros_like(x)
    x = torch.stack([x, zeros], dim=4).reshape(B, C, h, 2 * w)[..., :-1]
    x = F.conv2d(x, kernel, padding=(0, 6), groups=C)
    x = torch.stack([x, torch.zeros_like(x)], dim=3).reshape(B, C, 2 * h, -1)[:, :, :-1]
    x = F.conv2d(x, kernel.transpose(2, 3), padding=(6, 0), groups=C)
    # The centre of a pixel is now shifted by half a pixel of the finer grid
    half = matrix(c=-0.5, f=-0.5)
    inverse = half @ matrix(2.0, e=2.0) @ inverse @ matrix(0.5, e=0.5) @ torch.linalg.inv(half)
    size = (B, C, 2 * (H + 2 * more), 2 * (W + 2 * more))
    inverse = (matrix(2 / x.shape[3], e=2 / x.shape[2]) @ inverse
               @ matrix(size[3] / 2, e=size[2] / 2))
    grid = F.affine_grid(inverse[:, :2], size, align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    kernel = taps.expand(C, 1, 1, -1)
    x = F.conv2d(x, kernel, stride=(1, 2), padding=(0, 5), groups=C)[..., more:-more]
    x = F.conv2d(x, kernel.transpose(2, 3), stride=(2, 1), padding=(5, 0), groups=C)
    return x[:, :, more:-more], labels
