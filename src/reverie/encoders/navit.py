"""NaViT: "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution" (Dehghani et al. 2023,
2307.06304): pictures of any sizes in one sequence, each seeing itself alone.

    pictures c h w, each its own size --- patches --- some dropped --- one sequence t d --- blocks --- one query each
                                                                         positions of rows and columns

No picture is padded and none is masked out of another: pictures of equally many patches attend in one product, and
everything else knows no borders. Patches that `keep` leaves out are not computed at all (section 2.2).

As in section 2.1: positions are factorised, a table for the rows and one for the columns, summed; queries and keys are
normalised; no layer of the blocks has a bias, nor has a LayerNorm; a learned query gathers a picture's features (the
pooling of 2106.04560). Positions are `absolute`, counted in patches, or `fractional`, a share of the picture's own
height and width, for which a table is read between its rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.attention import Runs, SelfAttention
from reverie.nn.linear import Linear, linear
from reverie.nn.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class NavitConfig:
    kind: Literal["navit"] = "navit"
    patch: int = 16
    area: int = 224 * 224  # pixels of a picture at most; a larger one is reduced at its own aspect
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None  # channels inside an MLP; None: 4 x width
    activation: str = "gelu"
    positions: Literal["absolute", "fractional"] = "absolute"
    eps: float = 1e-6

    @property
    def out(self) -> int:
        """Channels of the pooled vector."""
        return self.width

    @property
    def patches(self) -> int:
        """Patches of a picture at most, which may stand in one row."""
        return self.area // self.patch**2

    @property
    def size(self) -> int:
        """Pixels of a side of the largest square."""
        return math.isqrt(self.patches) * self.patch


SIZES = {
    "S/16": NavitConfig(width=384, depth=12, heads=6),
    "B/16": NavitConfig(width=768, depth=12, heads=12),
    "L/16": NavitConfig(width=1024, depth=24, heads=16),
}


class PlainMlp(nn.Module):
    """`... d -> ... d` through `hidden` channels, without biases."""

    def __init__(self, config: NavitConfig):
        super().__init__()
        hidden = config.hidden or 4 * config.width
        self.up = Linear(config.width, hidden, bias=False)
        self.act = ACTIVATIONS[config.activation]()
        self.down = Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), without biases; packed `t d -> t d` (attention.SelfAttention)."""

    def __init__(self, config: NavitConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps, bias=False)
        self.attention = SelfAttention(config.width, config.heads, bias=False, qk_norm=True)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps, bias=False)
        self.mlp = PlainMlp(config)

    def forward(self, x: Tensor, runs: Runs) -> Tensor:
        x = x + self.attention(self.norm1(x), runs=runs)
        return x + self.mlp(self.norm2(x))


class PackedPool(nn.Module):
    """Features `t d` of pictures one after the other -> `b d`: a learned query attends to each picture's own, then
    x + mlp(norm(x)).

    Nothing stands between the features and their keys and values, which are linear. So the sums go first: the key
    matrix times the query once, the value matrix times what is gathered, b times and not t times, with equal results.
    """

    def __init__(self, config: NavitConfig):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.k, self.v, self.out = (Linear(config.width, config.width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(config.width, eps=config.eps, bias=False)
        self.mlp = PlainMlp(config)

    def forward(self, features: Tensor, runs: Runs) -> Tensor:
        query = rearrange(self.query, "(heads e) -> heads e", heads=self.heads)
        k, v = (rearrange(x.weight, "(heads e) d -> heads e d", heads=self.heads) for x in (self.k, self.v))
        keys = einsum(query * query.shape[1] ** -0.5, k, "heads e, heads e d -> heads d")
        scores = linear(features, keys.to(features.dtype))
        gathered = []
        lengths = [items * length for items, length in runs]
        for (items, _), score, part in zip(runs, scores.split(lengths), features.split(lengths), strict=True):
            weight = rearrange(score, "(b n) heads -> b heads n", b=items)
            gathered.append(weight.softmax(-1).to(part.dtype) @ rearrange(part, "(b n) d -> b n d", b=items))
        whole = torch.cat(gathered)
        mixed = einsum(whole, v.to(whole.dtype), "b heads d, heads e d -> b heads e")
        x = self.out(rearrange(mixed, "b heads e -> b (heads e)"))
        return x + self.mlp(self.norm(x))


class Navit(nn.Module):
    """Pictures `3 h w` of any sizes in whole patches -> the features `n d` of each after the last norm.

    With `keep`, for each picture int64 `k`, numbers of different patches counted row by row: only these of it.
    """

    def __init__(self, config: NavitConfig):
        super().__init__()
        self.config = config
        if config.patch < 1 or config.patches < 1:
            raise InputError(f"an area of {config.area} pixels has no room for a patch of {config.patch}.")
        if config.width % config.heads:
            raise InputError(f"width {config.width} is no multiple of the {config.heads} heads.")
        self.stem = Linear(3 * config.patch**2, config.width, bias=False)
        scale = config.width**-0.5
        self.rows = nn.Parameter(torch.randn(config.patches, config.width) * scale)
        self.columns = nn.Parameter(torch.randn(config.patches, config.width) * scale)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps, bias=False)
        self.pooling = PackedPool(config)

    def forward(self, images: Sequence[Tensor], keep: Sequence[Tensor] | None = None) -> list[Tensor]:
        x, runs, order = self._features(images, keep)
        parts = x.split([length for items, length in runs for _ in range(items)])
        return [parts[place] for place in _places(order)]

    def embed(self, images: Sequence[Tensor], keep: Sequence[Tensor] | None = None) -> Tensor:
        """Pictures -> `b d`, gathered by the learned query."""
        x, runs, order = self._features(images, keep)
        return self.pooling(x, runs)[torch.tensor(_places(order), device=x.device)]

    def _features(
        self, images: Sequence[Tensor], keep: Sequence[Tensor] | None
    ) -> tuple[Tensor, Runs, list[int]]:
        """Packed `t d`, its runs of equal length, and which picture stands where in it."""
        sizes = [self._grid(image) for image in images]
        lengths = [h * w for h, w in sizes] if keep is None else [len(kept) for kept in keep]
        order = sorted(range(len(images)), key=lengths.__getitem__)
        patches = [self._patches(images[i]) for i in order]
        places = self._positions([sizes[i] for i in order])
        if keep is not None:
            patches, places = (
                [part[keep[i]] for part, i in zip(parts, order, strict=True)] for parts in (patches, places)
            )
        x = self.stem(torch.cat(patches))
        x = x + torch.cat(places).to(x.dtype)
        runs = [(len(list(group)), length) for length, group in groupby(lengths[i] for i in order)]
        for block in self.blocks:
            x = block(x, runs)
        return self.norm(x), runs, order

    def _grid(self, image: Tensor) -> tuple[int, int]:
        """Patches of a picture downwards and across."""
        p, (height, width) = self.config.patch, image.shape[-2:]
        if height % p or width % p or not height * width:
            raise InputError(f"a picture of {width} x {height} pixels is not made of whole patches of {p}.")
        if height * width > self.config.area:
            raise InputError(
                f"a picture of {width} x {height} pixels is larger than the {self.config.area} that the tower knows."
            )
        return height // p, width // p

    def _patches(self, image: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(image, "c (h ph) (w pw) -> (h w) (c ph pw)", ph=p, pw=p)

    def _positions(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """What is added to the patches of pictures of these grids, `n d` each; a side is read off its table once."""
        rows = {h: self._side(self.rows, h) for h in sorted({h for h, _ in sizes})}
        columns = {w: self._side(self.columns, w) for w in sorted({w for _, w in sizes})}
        grids = {
            (h, w): rearrange(rows[h][:, None] + columns[w][None], "h w d -> (h w) d")
            for h, w in sorted(set(sizes))
        }
        return [grids[size] for size in sizes]

    def _side(self, table: Tensor, n: int) -> Tensor:
        """Of a side of n patches, `n d`: the first rows of the table, or n places spread evenly over all of it."""
        if self.config.positions == "absolute":
            return table[:n]
        places = (torch.arange(n, device=table.device) + 0.5) * (len(table) / n) - 0.5
        low = places.floor().clamp(0, len(table) - 1)
        share = rearrange((places - low).clamp(0, 1), "n -> n 1")
        low = low.long()
        return table[low] * (1 - share) + table[(low + 1).clamp(max=len(table) - 1)] * share


def _places(order: Sequence[int]) -> list[int]:
    """Where in the pack each picture stands."""
    return sorted(range(len(order)), key=order.__getitem__)
