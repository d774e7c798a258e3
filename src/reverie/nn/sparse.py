"""Causal attention over a text and the places of a picture after it, in the sparse patterns of DALL-E (Ramesh et al.
2021, 2102.12092, figure 11), as real sparsity: only the products that a pattern asks for are computed.

Every place attends to the whole text, to itself, and of the places before it to

    row      the last `columns` of them, up to the one above it
    column   those above it in its column
    conv     the upper half of a square of `kernel` places a side around it, with wraparound at the edges
    full     all

A pattern is a set of distances in raster order, so `conv` wraps around as `row` does. Text attends to the text before.

Convention: `b heads n d` with n = text + rows x columns; places run row by row. `dense` is the same as a mask.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.attention import attend
from reverie.nn.keyvalues import Past
from reverie.nn.linear import Linear

Pattern = Literal["row", "column", "conv", "full"]


def patterns(depth: int) -> tuple[Pattern, ...]:
    """Those of DALL-E's layers: row, column, row, row and again, and conv in the last (2102.12092, section 2.2)."""
    return tuple("conv" if i == depth else "column" if i % 4 == 2 else "row" for i in range(1, depth + 1))


@lru_cache(maxsize=64)
def reach(pattern: Pattern, rows: int, columns: int, kernel: int) -> tuple[int, ...]:
    """The distances, 0 and more, back to the places that a place attends to."""
    last = rows * columns - 1
    if pattern == "full":
        return tuple(range(last + 1))
    if pattern == "row":
        return tuple(range(min(columns, last) + 1))
    if pattern == "column":
        return tuple(range(0, last + 1, columns))
    half = kernel // 2
    near = {up * columns + aside for up in range(half + 1) for aside in range(-half, half + 1)}
    return tuple(sorted(distance for distance in near if 0 <= distance <= last))


def dense(pattern: Pattern, *, text: int, rows: int, columns: int, kernel: int) -> Tensor:
    """`n n`, True where position i attends to position j."""
    n = rows * columns
    back = torch.arange(n)[:, None] - torch.arange(n)
    near = torch.zeros(2 * n, dtype=torch.bool)
    near[list(reach(pattern, rows, columns, kernel))] = True  # negative distances fall into the second half
    mask = torch.ones(text + n, text + n, dtype=torch.bool).tril()
    mask[text:, text:] = near[back]
    return mask


def attend_pattern(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, text: int, rows: int, columns: int, kernel: int
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v under a pattern, `b heads n d`: what `dense` as a mask gives."""
    if pattern == "full":
        return attend(q, k, v, causal=True)
    words = attend(q[:, :, :text], k[:, :, :text], v[:, :, :text], causal=True)
    one = q[:, :, text:] * q.shape[-1] ** -0.5
    # Blocks of queries that read a common window of keys: `b heads blocks queries d` and `... window d`.
    if pattern == "column":
        grid = {"r": rows, "c": columns}
        blocks, windows, values = (
            rearrange(x, "b h (r c) d -> b h c r d", **grid) for x in (one, k[:, :, text:], v[:, :, text:])
        )
        mask = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
    else:
        before = -(-reach(pattern, rows, columns, kernel)[-1] // columns)  # rows above that are read
        blocks = rearrange(one, "b h (r c) d -> b h r c d", c=columns)
        windows, values = (_windows(x[:, :, text:], before, columns) for x in (k, v))
        mask = _band(pattern, rows, columns, kernel, before).to(q.device)
    near = (blocks @ windows.transpose(-1, -2)).float().masked_fill(~mask, float("-inf"))
    # The words are the same for all: one product, whatever the blocks.
    order = "b h (r c) m -> b h c r m" if pattern == "column" else "b h (r c) m -> b h r c m"
    far = rearrange(one @ k[:, :, :text].transpose(-1, -2), order, c=columns)
    shares = torch.cat([far.float(), near], -1).softmax(-1).to(v.dtype)
    back = "b h c r m -> b h (r c) m" if pattern == "column" else "b h r c m -> b h (r c) m"
    seen = rearrange(shares[..., text:] @ values, back)
    return torch.cat([words, seen + rearrange(shares[..., :text], back) @ v[:, :, :text]], 2)


def _windows(x: Tensor, before: int, columns: int) -> Tensor:
    """`b h (r c) d` -> for each row itself and the `before` rows above it, `b h r w d`; zeros above the first."""
    grid = rearrange(F.pad(x, (0, 0, before * columns, 0)), "b h (r c) d -> b h r c d", c=columns)
    return rearrange(grid.unfold(2, before + 1, 1), "b h r c d w -> b h r (w c) d")


@lru_cache(maxsize=64)
def _band(pattern: Pattern, rows: int, columns: int, kernel: int, before: int) -> Tensor:
    """`r c w`: which places of its window a place attends to."""
    places = torch.arange(rows * columns)
    window = torch.arange(-before * columns, columns)
    near = torch.zeros((before + 2) * columns, dtype=torch.bool)
    near[list(reach(pattern, rows, columns, kernel))] = True
    back = rearrange(torch.arange(columns), "c -> c 1") - window
    allowed = near[back.clamp(min=0)] & (back >= 0)
    there = rearrange(places[::columns], "r -> r 1 1") + window >= 0
    return allowed & there


class PatternAttention(nn.Module):
    """Self-attention under one pattern, `b n d -> b n d`; `step` computes the newest position alone."""

    def __init__(
        self, width: int, heads: int, *, pattern: Pattern, text: int, rows: int, columns: int, kernel: int
    ):
        super().__init__()
        self.heads, self.pattern, self.text = heads, pattern, text
        self.rows, self.columns, self.kernel = rows, columns, kernel
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        distances = reach(pattern, rows, columns, kernel)
        self.register_buffer("distances", torch.tensor(distances), persistent=False)

    distances: Tensor

    def forward(self, x: Tensor, *, past: Past | None = None) -> Tensor:
        """All positions, or the text alone; `past` keeps their keys and values."""
        q, k, v = self._split(x)
        if past is not None:
            past(k, v)
        if x.shape[1] <= self.text:
            out = attend(q, k, v, causal=True)
        else:
            out = attend_pattern(
                q, k, v, pattern=self.pattern, text=self.text, rows=self.rows, columns=self.columns,
                kernel=self.kernel,
            )  # fmt: skip
        return self.out(rearrange(out, "b heads n d -> b n (heads d)").to(x.dtype))

    def step(self, x: Tensor, past: Past) -> Tensor:
        """The newest place of each row, `r 1 d`, which reads what its pattern says of `past`."""
        place = past.length - self.text
        q, k, v = self._split(x)
        k, v = past(k, v)
        if self.pattern == "full":
            out = attend(q, k, v)
        else:
            near = self._near(place, k), self._near(place, v)
            far = k[:, :, : self.text], v[:, :, : self.text]
            q = q * q.shape[-1] ** -0.5
            scores = torch.cat([q @ far[0].transpose(-1, -2), q @ near[0].transpose(-1, -2)], -1)
            shares = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
            out = shares[..., : self.text] @ far[1] + shares[..., self.text :] @ near[1]
        return self.out(rearrange(out, "r heads 1 d -> r 1 (heads d)").to(x.dtype))

    def _near(self, place: int, x: Tensor) -> Tensor:
        """Of what is kept, `r heads m d`, what the place of that number attends to beside the text."""
        newest = self.text + place
        if self.pattern == "row":
            return x[:, :, max(self.text, newest - self.columns) : newest + 1]
        if self.pattern == "column":
            return x[:, :, self.text + place % self.columns : newest + 1 : self.columns]
        return x.index_select(2, newest - self.distances[self.distances <= place])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x)
        if x.device.type != "cpu" and self.qkv.weight.dtype in (torch.bfloat16, torch.int8):
            qkv = (
                qkv.bfloat16()
            )  # what is remembered is as narrow as the weights; on a CPU fp32 is four times as quick
        q, k, v = (
            rearrange(part, "b n (heads d) -> b heads n d", heads=self.heads) for part in qkv.chunk(3, -1)
        )
        return q, k, v
