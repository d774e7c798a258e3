"""Where a token stands: sinusoids, and rotary embeddings over one to three axes.

Rotary (Su et al. 2021, 2104.09864): pairs of channels (2i, 2i + 1) are turned by position x frequency. With several
axes the channels of a head are shared out among them, each axis turning its own share (the layout of FLUX and of
video transformers). Attention then depends on position differences alone, so any size and duration can be sampled.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor


def sinusoidal(
    t: Tensor, width: int, *, scale: float = 1.0, longest: float = 10_000.0, closed: bool = False
) -> Tensor:
    """`b -> b width`: cosines then sines of `scale * t` at geometric frequencies (the timestep embedding of DDPM).

    They run from 1 to 1 / longest, which is among them if `closed`, as in diffusers' DiT; else it would be the next.
    In float32, or in float64 where `t` is.
    """
    half = width // 2
    t = t if t.dtype == torch.float64 else t.float()
    places = torch.arange(half, device=t.device, dtype=t.dtype)
    frequencies = torch.exp(-math.log(longest) * places / (half - closed))
    angle = rearrange(scale * t, "b -> b 1") * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def share(channels: int, axes: int) -> tuple[int, ...]:
    """Split a head's channels among axes: even counts, what is left over goes to the last axes (height, width)."""
    pairs = channels // 2
    base = pairs // axes
    extra = pairs - base * axes
    return tuple(2 * (base + (1 if axis >= axes - extra else 0)) for axis in range(axes))


def rotary(
    positions: Tensor, channels: int | tuple[int, ...], *, longest: float = 100.0
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each `n channels`, for `positions n axes`; `longest` sets the slowest wave, in positions.

    `channels` are a head's, shared out evenly, or each axis's own. In float32, or in float64 where `positions` are.
    """
    shares = share(channels, positions.shape[-1]) if isinstance(channels, int) else channels
    positions = positions if positions.dtype == torch.float64 else positions.float()
    angles = []
    for axis, size in enumerate(shares):
        steps = torch.arange(0, size, 2, device=positions.device, dtype=positions.dtype)
        angles.append(positions[:, axis, None] * longest ** (-steps / max(size, 1)))
    angle = repeat(torch.cat(angles, dim=-1), "n pairs -> n (pairs two)", two=2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn `... heads n d` by `(cos, sin)`: (a, b) -> (a cos - b sin, b cos + a sin).

    As complex numbers on a CPU, where that takes a ninth of the time: one pass over x, in whatever order it lies.
    """
    cos, sin = (part.to(x.dtype) for part in rotary)
    quick = x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1
    if quick and not torch.compiler.is_compiling():
        turns = torch.complex(cos[..., ::2], sin[..., ::2])
        pairs = rearrange(x, "... (pairs two) -> ... pairs two", two=2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        return rearrange(turned, "... pairs two -> ... (pairs two)")
    even, odd = rearrange(x, "... (pairs two) -> two ... pairs", two=2)
    return x * cos + rearrange([-odd, even], "two ... pairs -> ... (pairs two)") * sin


def grid(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """Integer positions of a grid in row-major order, `n axes`."""
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    return rearrange(list(axes), "axes ... -> (...) axes")
