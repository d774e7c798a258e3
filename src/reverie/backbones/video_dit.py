"""A diffusion transformer over spacetime patches: DiT (2212.09748) with time as a third axis, as Sora's report has it.

A picture is a video of one frame. Positions are rotary over frames, rows and columns, so any size, duration and
aspect ratio can be asked for. Every frame has its own time `t`, so some may be given clean (t = 0) while others are
noise; the text comes in twice, pooled into the modulation and word by word through cross-attention.

With `masked` it may also learn from some of its patches (MDT, 2303.14389, as in backbones/mdt.py): the first blocks see
those alone, and an interpolater fills the rest before the last ones. Whole passes never ask it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.backbones.mdt import check_masked
from reverie.errors import InputError
from reverie.nn.attention import PackedContext, Runs
from reverie.nn.block import ModulatedBlock, modulate, spread
from reverie.nn.cache import Cache, through
from reverie.nn.patches import patchify, unpatchify
from reverie.nn.positions import grid, rotary, sinusoidal


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoDitConfig:
    channels: int = 3
    patch: tuple[int, int] = (1, 16)  # frames, side
    bottleneck: int = 0  # channels between a patch and the width; 0: straight (2511.13720, section 4.3)
    width: int = 384
    depth: int = 12
    heads: int = 6
    context_width: int = 512
    waves: int = 0  # per axis, of the absolute places that are added to the patches; 0: rotary alone
    head: int = 0  # channels of convolutions that smooth the seams between patches (U-ViT, 2209.12152, 3.1)
    zoom: int = 1  # the network sees and smooths what comes as at 1 / zoom of its size: see `_as_smaller`
    masked: tuple[float, float] | None = None  # the share of patches that masked passes leave out
    decoder: int = 2  # of the blocks, those that come after the interpolater, where there is one

    def __post_init__(self) -> None:
        if self.masked is None:
            return
        check_masked(self.masked)
        if not 1 <= self.decoder < self.depth:
            raise InputError(
                f"a decoder of {self.decoder} of {self.depth} blocks is none: give 1 to {self.depth - 1}."
            )


def smoothing(channels: int, width: int, zoom: int = 1) -> nn.Sequential:
    """Three 3 x 3 convolutions on pictures, squares of zoom x zoom being one place. Its output starts at zero."""
    channels *= zoom**2
    last = nn.Conv2d(width, channels, 3, padding=1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    first, second = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)


def _as_smaller(t: Tensor, zoom: int) -> tuple[Tensor, Tensor]:
    """How much x_t is to be enlarged, and its time, for a network that sees it `zoom` times smaller.

    In the mean of zoom x zoom pixels noise is zoom times weaker beside the picture ("simple diffusion", 2301.11093,
    section 3.1): (1 - t) x0 + (t / zoom) noise, which is x_t at another time, t / (t + zoom (1 - t)), but for its
    size. So a network of small pictures begins as one of large ones, and no noise level is new to it.
    """
    size = 1 - t + t / zoom
    return 1 / size, t / zoom / size


def _whereabouts(f: int, h: int, w: int, waves: int) -> Tensor:
    """`(f h w) (4 waves)`: sines and cosines of the row's and the column's place between the picture's edges, 0 to 1.

    Rotary positions tell only how far apart two patches are; in pure noise nothing else says where the middle is.
    Fractions of the side, so that every size and aspect has the same edges (NaViT, 2307.06304, section 2.1).
    """
    places = (grid(f, h, w)[:, 1:] + 0.5) / torch.tensor([h, w])
    angles = rearrange(places[..., None] * torch.pi * torch.arange(1, waves + 1), "n axes k -> n (axes k)")
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _Like(NamedTuple):
    """Items of one shape and pace: which they are, `x b c f h w`, `t b f` or `t b f h w` on the grid of patches."""

    items: list[int]
    x: Tensor
    t: Tensor
    pace: float


def _patches(x: Tensor, patch: tuple[int, int]) -> tuple[int, int, int]:
    """How many patches `... f h w` has along each axis."""
    return x.shape[-3] // patch[0], x.shape[-2] // patch[1], x.shape[-1] // patch[1]


def _alike(
    x: Sequence[Tensor] | Tensor, t: Sequence[Tensor] | Tensor, paces: list[float], patch: tuple[int, int]
) -> list[_Like]:
    """Items that are alike together, and groups of as many patches side by side."""

    def kind(i: int) -> tuple[float, ...]:
        sizes = _patches(x[i], patch)
        return math.prod(sizes), *sizes, t[i].ndim, paces[i]

    groups = [list(same) for _, same in itertools.groupby(sorted(range(len(x)), key=kind), kind)]
    return [
        _Like(same, torch.stack([x[i] for i in same]), torch.stack([t[i] for i in same]), paces[same[0]])
        for same in groups
    ]


def _times(
    groups: Sequence[_Like], grids: Sequence[tuple[int, int, int]], frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The different times of each item, `k`; whose they are, `k`; and which of them each patch has, `t`."""
    keys, covers, first = [], [], 0
    for group, (_, h, w) in zip(groups, grids, strict=True):
        by_frame = group.t.ndim == 2
        t = rearrange((group.t[:, ::frames] if by_frame else group.t).float(), "b ... -> b (...)")
        item = torch.arange(first, first + len(t), device=t.device, dtype=t.dtype)
        keys.append(rearrange([item[:, None].expand_as(t), t], "two b k -> (b k) two"))
        covers.append(h * w if by_frame else 1)
        first += len(t)
    every = torch.cat(keys)
    rows = torch.arange(len(every), device=every.device)
    if every.device.type == "cpu" or 1 in covers:
        # With a time for each frame a GPU would wait longer to know how many differ than it saves.
        every, rows = every.unique(dim=0, return_inverse=True)
    parts = zip(rows.split([len(key) for key in keys]), covers, strict=True)
    of_patches = torch.cat([part.repeat_interleave(cover) for part, cover in parts])
    return every[:, 1], every[:, 0].long(), of_patches


def _staying(keep: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, Runs]:
    """Of packed groups of items `b k`: which patches stay, counted over all, and what they are run after run."""
    first, stay, runs = 0, list[Tensor](), list[tuple[int, int]]()
    for rows, length in zip(keep, lengths, strict=True):
        items, kept = rows.shape
        begins = first + length * torch.arange(items, device=rows.device)
        stay.append(rearrange(begins[:, None] + rows, "b k -> (b k)"))
        first += items * length
        before = runs.pop() if runs and runs[-1][1] == kept else (0, kept)
        runs.append((before[0] + items, kept))
    return torch.cat(stay), tuple(runs)


class VideoDit(nn.Module):
    """`x b c f h w`, `t b f`, pooled text `b d`, context `b m d` and its mask `b m` -> `b c f h w`."""

    no_decay = ("null_context", "null_pooled")

    def __init__(self, config: VideoDitConfig):
        super().__init__()
        self.config = config
        contents = config.channels * config.patch[0] * config.patch[1] ** 2
        if config.bottleneck:
            self.embed: nn.Module = nn.Sequential(
                nn.Linear(contents, config.bottleneck, bias=False), nn.Linear(config.bottleneck, config.width)
            )
        else:
            self.embed = nn.Linear(contents, config.width)
        self.place = nn.Linear(4 * config.waves, config.width, bias=False) if config.waves else None
        if self.place is not None:
            nn.init.zeros_(self.place.weight)
        self.time = nn.Sequential(
            nn.Linear(256, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.pooled = nn.Linear(config.context_width, config.width)
        self.null_context = nn.Parameter(torch.zeros(config.context_width))
        self.null_pooled = nn.Parameter(torch.zeros(config.context_width))
        self.blocks = nn.ModuleList(
            ModulatedBlock(config.width, config.heads, context_width=config.context_width)
            for _ in range(config.depth)
        )
        if config.masked is not None:
            self.missing = nn.Parameter(torch.randn(config.width) * 0.02)
            self.interpolater = ModulatedBlock(config.width, config.heads, context_width=config.context_width)
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        modulation = nn.Linear(config.width, 2 * config.width)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)
        self.out = nn.Linear(config.width, contents)
        self.head = smoothing(config.channels, config.head, config.zoom) if config.head else None
        for zero in (modulation, self.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        t: Tensor | Sequence[Tensor],
        pooled: Tensor,
        context: Tensor,
        context_mask: Tensor,
        *,
        pace: float | Sequence[float] | Tensor = 1.0,
        keep: Tensor | Sequence[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """`pace` is the time between frames, in frames at the usual rate: one, or one for each item.

        Rotary time knows differences alone. With `keep`, int64 `b k` or a sequence of `k`, different numbers of an
        item's patches, as many where there are as many patches: a masked pass, whose first blocks see these alone.
        With `cache`, deep features of the step before may serve.
        """
        if isinstance(x, Tensor) and isinstance(t, Tensor) and isinstance(pace, int | float):
            whole = [_Like([*range(len(x))], x, t, pace)]
            stay = None if keep is None else [torch.stack([*keep])]
            return self._packed(whole, pooled, context, context_mask, stay, cache)[0]
        paces = [float(pace)] * len(x) if isinstance(pace, int | float) else [float(one) for one in pace]
        groups = _alike(x, t, paces, self.config.patch)
        stay = None if keep is None else [torch.stack([keep[i] for i in group.items]) for group in groups]
        outs = self._packed(groups, pooled, context, context_mask, stay, cache)
        of = {
            i: one
            for group, out in zip(groups, outs, strict=True)
            for i, one in zip(group.items, out, strict=True)
        }
        back = [of[i] for i in range(len(x))]
        return torch.stack(back) if isinstance(x, Tensor) else back

    def _packed(
        self,
        groups: Sequence[_Like],
        pooled: Tensor,
        context: Tensor,
        context_mask: Tensor,
        keep: Sequence[Tensor] | None,
        cache: Cache | None,
    ) -> list[Tensor]:
        """The one path: the patches of all items one after the other, `t d`; the output of each group."""
        (frames, side), device = self.config.patch, groups[0].x.device
        if len(groups) > 1:
            order = torch.tensor([i for group in groups for i in group.items], device=device)
            pooled, context, context_mask = pooled[order], context[order], context_mask[order]
        grids = [_patches(group.x, self.config.patch) for group in groups]
        counts = [len(group.x) for group in groups]
        contents = [rearrange(patchify(group.x, self.config.patch), "b n p -> (b n) p") for group in groups]
        patches = contents[0] if len(contents) == 1 else torch.cat(contents)
        times, items, rows = _times(groups, grids, frames)
        if self.config.zoom > 1:
            enlarge, times = _as_smaller(times, self.config.zoom)
            patches = patches * enlarge[rows, None].to(patches.dtype)
        tokens = self.embed(patches)

        # Where a patch stands is computed once for all items that are alike; `spots t` says which place each has.
        ends = [*itertools.accumulate(map(math.prod, grids), initial=0)]
        spans = zip(ends, ends[1:], counts, strict=False)
        spots = torch.cat([torch.arange(a, b, device=device).repeat(count) for a, b, count in spans])
        placed: Tensor | float = 0.0
        if self.place is not None:
            where = torch.cat([_whereabouts(*sizes, self.config.waves) for sizes in grids])
            placed = F.embedding(spots, self.place(where.to(tokens)))
            tokens = tokens + placed
        places = [
            grid(*sizes, device=device) * torch.tensor([group.pace, 1.0, 1.0], device=device)
            for group, sizes in zip(groups, grids, strict=True)
        ]
        cos, sin = rotary(torch.cat(places), self.config.width // self.config.heads)
        turns = cos[spots], sin[spots]

        clock = sinusoidal(times, 256, scale=1000.0).to(tokens.dtype)
        vector = self.time(clock) + self.pooled(pooled)[items]
        alike = itertools.groupby(zip(counts, grids, strict=True), lambda pair: math.prod(pair[1]))
        runs = tuple((sum(count for count, _ in same), length) for length, same in alike)
        if device.type == "cpu" or (device.type == "cuda" and len(runs) > 1):
            words = PackedContext.of(context, context_mask)
        else:  # to know how many there are would keep the GPU waiting
            words = PackedContext(rearrange(context, "b m c -> (b m) c"), None, context_mask)
        asked = {"vector": vector, "context": words, "rows": rows, "runs": runs, "rotary": turns}
        blocks = [partial(block, **asked) for block in self.blocks]
        if keep is not None:
            assert cache is None, "a masked pass is never sampled"
            early, blocks = blocks[: -self.config.decoder], blocks[-self.config.decoder :]
            stay, kept_runs = _staying(keep, [math.prod(sizes) for sizes in grids])
            some = {"rows": rows[stay], "runs": kept_runs, "rotary": (cos[spots[stay]], sin[spots[stay]])}
            seen = tokens[stay]
            for block in early:
                seen = block(seen, **some)
            missing = self.missing.to(tokens.dtype).expand_as(tokens) + placed
            filled = self.interpolater(missing.index_copy(0, stay, seen), **asked)
            tokens = filled.index_copy(0, stay, seen)
        tokens = through(tokens, blocks, cache)
        shift, scale = spread(self.modulation(vector), rows, 2)
        tokens = self.out(modulate(self.norm(tokens), shift, scale))

        outs = []
        sizes = [count * math.prod(sizes) for count, sizes in zip(counts, grids, strict=True)]
        for group, part in zip(groups, tokens.split(sizes), strict=True):
            b, _, *shape = group.x.shape
            f, h, w = (size // one * one for size, one in zip(shape, (frames, side, side), strict=True))
            out = unpatchify(rearrange(part, "(b n) p -> b n p", b=b), self.config.patch, (f, h, w))
            if self.head is not None:
                flat = rearrange(out, "b c f h w -> (b f) c h w")
                flat = flat.contiguous(
                    memory_format=torch.channels_last
                )  # few channels: nearly twice as fast
                if (zoom := self.config.zoom) > 1:
                    flat = F.pixel_shuffle(self.head(F.pixel_unshuffle(flat, zoom)), zoom)
                else:
                    flat = self.head(flat)
                out = out + rearrange(flat, "(b f) c h w -> b c f h w", b=b)
            outs.append(out)
        return outs

    def without_text(
        self, pooled: Tensor, context: Tensor, context_mask: Tensor, drop: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where `drop b` is True, the learned "no text": its pooled vector, and one learned token as context."""
        first = torch.zeros_like(context_mask)
        first[:, 0] = True
        one = rearrange(drop, "b -> b 1")
        pooled = torch.where(one, self.null_pooled.to(pooled.dtype), pooled)
        null = repeat(self.null_context.to(context.dtype), "d -> b m d", b=len(context), m=context.shape[1])
        return pooled, torch.where(one[..., None], null, context), torch.where(one, first, context_mask)
