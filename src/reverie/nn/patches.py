"""Spacetime patches: `b c f h w` to a sequence of patch contents and back, losing nothing.

A patch is `(frames, side, side)`; tokens run frame by frame, row by row. Contents are ordered `c f h w`.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """`b c (f pf) (h p) (w p) -> b (f h w) (c pf p p)` for patch = (pf, p)."""
    frames, side = patch
    return rearrange(x, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=frames, ph=side, pw=side)


def unpatchify(tokens: Tensor, patch: tuple[int, int], shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify` for a signal of `shape` = (f, h, w) in units of the signal."""
    frames, side = patch
    f, h, w = shape
    return rearrange(
        tokens,
        "b (f h w) (c pf ph pw) -> b c (f pf) (h ph) (w pw)",
        f=f // frames, h=h // side, w=w // side, pf=frames, ph=side, pw=side,
    )  # fmt: skip
