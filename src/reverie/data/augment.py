"""Random views of pictures with transparency, on whole batches, from one row of uniform numbers per sample.

A row of `DRAWS` numbers in [0, 1) decides everything about a sample's view, so a view depends on its key alone
(reverie.rng), never on the batch or the worker it was made in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from reverie import rng

DRAWS = 24


def draws(seed: int, keys: Iterable[tuple[int, int]], purpose: str = "view") -> Tensor:
    """`b DRAWS` uniform numbers, one row per (epoch, sample id)."""
    return torch.stack([torch.rand(DRAWS, generator=rng.generator(seed, purpose, e, i)) for e, i in keys])


def on_white(rgba: Tensor) -> Tensor:
    """uint8 `... 4 h w` -> float `... 3 h w` in [-1, 1], laid on white."""
    x = rgba.float() / 255
    colour, alpha = x[..., :3, :, :], x[..., 3:, :, :]
    return (colour * alpha + 1 - alpha) * 2 - 1


def framed(images: Tensor, size: tuple[int, int]) -> Tensor:
    """`b 3 h w` in [-1, 1] as large as fits into `size`, in the middle of it, on white."""
    h, w = images.shape[-2:]
    scale = min(size[0] / h, size[1] / w)
    inner = round(h * scale), round(w * scale)
    images = F.interpolate(images, size=inner, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    return F.pad(images, (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top), value=1.0)


def view(rgba: Tensor, u: Tensor, *, strength: float = 1.0) -> Tensor:
    """uint8 `b 4 h w` and `u b DRAWS` -> float `b 3 h w` in [-1, 1].

    Turned, scaled, sheared and moved; laid on white or on a random colour; hue turned a little, saturation, contrast,
    brightness and gamma changed, sometimes grey; blurred or coarsened; a rectangle wiped out. `strength` 0 is
    `on_white`.
    """
    if strength == 0:
        return on_white(rgba)
    x = warp(rgba.float() / 255, u, strength)
    background = torch.where(u[:, 0:1] < 0.5, torch.ones_like(u[:, 1:4]), u[:, 1:4])
    alpha = x[:, 3:].clamp(0, 1)
    x = x[:, :3] * alpha + rearrange(background, "b c -> b c 1 1") * (1 - alpha)
    x = recolour(x, u, strength)
    x = soften(x, u)
    return wipe(x, u, strength).clamp(0, 1) * 2 - 1


def warp(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """A random affine map about the centre; what lies outside is transparent."""
    angle = (u[:, 4] - 0.5) * (math.pi / 3.5) * strength
    size = torch.exp((u[:, 5] - 0.35) * 0.7 * strength)  # > 1: the picture gets smaller
    aspect = torch.exp((u[:, 6] - 0.5) * 0.4 * strength)
    shear = (u[:, 7] - 0.5) * 0.5 * strength
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack(
        [size * aspect * cos, size * (shear - sin), (u[:, 8] - 0.5) * 0.3 * strength,
         size * sin, size / aspect * cos, (u[:, 9] - 0.5) * 0.3 * strength], dim=-1,
    )  # fmt: skip
    grid = F.affine_grid(rearrange(rows, "b (r c) -> b r c", r=2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def recolour(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Hue rotation in YIQ, saturation, contrast, brightness, gamma; one in twelve grey; colours in [0, 1]."""
    to_yiq = x.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    angle = (u[:, 10] - 0.5) * 0.7 * strength
    saturation = torch.exp((u[:, 11] - 0.5) * 1.4 * strength) * (u[:, 12] > 1 / 12)
    cos, sin = angle.cos() * saturation, angle.sin() * saturation
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = rearrange([one, zero, zero, zero, cos, -sin, zero, sin, cos], "(r c) b -> b r c", r=3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    x = torch.einsum("brc,bchw->brhw", matrix, x).clamp(1e-4, 1)
    contrast = rearrange(torch.exp((u[:, 13] - 0.5) * 0.9 * strength), "b -> b 1 1 1")
    brightness = rearrange((u[:, 14] - 0.5) * 0.3 * strength, "b -> b 1 1 1")
    gamma = rearrange(torch.exp((u[:, 15] - 0.5) * 0.8 * strength), "b -> b 1 1 1")
    return ((x - 0.5) * contrast + 0.5 + brightness).clamp(1e-4, 1) ** gamma


def soften(x: Tensor, u: Tensor) -> Tensor:
    """One in five blurred by a 3 x 3 binomial, one in five at half the resolution."""
    kernel = x.new_tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    which = rearrange(u[:, 16], "b -> b 1 1 1")
    x = torch.where(which < 0.2, F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3), x)
    coarse = F.interpolate(F.avg_pool2d(x, 2, ceil_mode=True), size=x.shape[-2:], mode="nearest")
    return torch.where(which > 0.8, coarse, x)


def wipe(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Half the samples lose a rectangle of up to a third of each side to a flat colour."""
    h, w = x.shape[-2:]
    side = (u[:, 17] * 0.35 * strength).clamp(min=1e-3) * (u[:, 18] < 0.5)
    rows, columns = torch.arange(h, device=x.device) / h, torch.arange(w, device=x.device) / w
    inside = (
        rearrange((rows[None] - u[:, 19:20]).abs() < side[:, None] / 2, "b h -> b 1 h 1")
        & rearrange((columns[None] - u[:, 20:21]).abs() < side[:, None] / 2, "b w -> b 1 1 w")
    )  # fmt: skip
    return torch.where(inside, rearrange(u[:, 21:24], "b c -> b c 1 1"), x)
