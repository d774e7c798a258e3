"""A diffusion transformer over spacetime patches: DiT (2212.09748) with time as a third axis, as Sora's report has it.

A picture is a video of one frame. Positions are rotary over frames, rows and columns, so any size, duration and
aspect ratio can be asked for. Every frame has its own time `t`, so some may be given clean (t = 0) while others are
noise; the text comes in twice, pooled into the modulation and word by word through cross-attention.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from reverie.nn.cache import Cache, through
from reverie.nn.block import ModulatedBlock, modulate
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


def smoothing(channels: int, width: int) -> nn.Sequential:
    """Three 3 x 3 convolutions on pictures, whose output starts at zero."""
    last = nn.Conv2d(width, channels, 3, padding=1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    first, second = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)


def _whereabouts(f: int, h: int, w: int, waves: int) -> Tensor:
    """`(f h w) (4 waves)`: sines and cosines of the row's and the column's place between the picture's edges, 0 to 1.

    Rotary positions tell only how far apart two patches are; in pure noise nothing else says where the middle is.
    Fractions of the side, so that every size and aspect has the same edges (NaViT, 2307.06304, section 2.1).
    """
    places = (grid(f, h, w)[:, 1:] + 0.5) / torch.tensor([h, w])
    angles = rearrange(places[..., None] * torch.pi * torch.arange(1, waves + 1), "n axes k -> n (axes k)")
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


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
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        modulation = nn.Linear(config.width, 2 * config.width)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)
        self.out = nn.Linear(config.width, contents)
        self.head = smoothing(config.channels, config.head) if config.head else None
        for zero in (modulation, self.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        pooled: Tensor,
        context: Tensor,
        context_mask: Tensor,
        *,
        pace: float = 1.0,
        cache: Cache | None = None,
    ) -> Tensor:
        """`pace` is the time between frames, in frames at the usual rate. Rotary time knows differences alone."""
        frames, side = self.config.patch
        f, h, w = x.shape[-3] // frames, x.shape[-2] // side, x.shape[-1] // side
        tokens = self.embed(patchify(x, self.config.patch))
        if self.place is not None:
            tokens = tokens + self.place(_whereabouts(f, h, w, self.config.waves).to(tokens))
        head = self.config.width // self.config.heads
        places = grid(f, h, w, device=x.device).float()
        places[:, 0] = pace * places[:, 0]
        turns = rotary(places, head)
        clock = sinusoidal(rearrange(t, "b f -> (b f)"), 256, scale=1000.0).to(tokens.dtype)
        vector = rearrange(self.time(clock), "(b f) d -> b f d", b=len(x))
        vector = vector[:, ::frames] + rearrange(self.pooled(pooled), "b d -> b 1 d")
        blocks = [
            partial(block, vector=vector, context=context, context_mask=context_mask, rotary=turns)
            for block in self.blocks
        ]
        tokens = through(tokens, blocks, cache)
        shift, scale = rearrange(
            self.modulation(vector), "b f (two d) -> two b f d", two=2
        ).repeat_interleave(h * w, dim=2)
        tokens = self.out(modulate(self.norm(tokens), shift, scale))
        out = unpatchify(tokens, self.config.patch, (f * frames, h * side, w * side))
        if self.head is None:
            return out
        flat = rearrange(out, "b c f h w -> (b f) c h w")
        flat = flat.contiguous(memory_format=torch.channels_last)  # few channels: nearly twice as fast
        return out + rearrange(self.head(flat), "(b f) c h w -> b c f h w", b=len(out))

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
