"""Vision Transformer (2010.11929) as CLIP's image tower builds it (2103.00020, section 2.4): class token, learned
positions, a LayerNorm before the blocks and one after, features read at the class token or averaged.

`stem="conv"` replaces the patch projection by smaller patches and strided 3x3 convolutions (Xiao et al. 2021,
2106.14881), which learns far more from few pictures; the shipped weights use it, CLIP's public ones use `"patch"`.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.block import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    size: int = 224  # pixels of a side
    patch: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    ratio: float = 4.0
    activation: str = "quick_gelu"
    stem: Literal["patch", "conv"] = "patch"
    pool: Literal["class", "mean"] = "class"
    eps: float = 1e-5


def conv_stem(width: int, patch: int) -> nn.Sequential:
    """A 4 x 4 patch projection, then halvings by 3 x 3 convolutions up to `patch`, channels doubling up to `width`."""
    if patch < 4 or patch & (patch - 1):
        raise InputError(f"patch {patch} has no conv stem: take a power of two from 4, or the stem `patch`.")
    halvings = int(math.log2(patch)) - 2
    channels = [min(max(width >> (halvings - i), 32), width) for i in range(halvings + 1)]
    layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=4)]
    for before, after in pairwise(channels):
        layers += [nn.GroupNorm(1, before), nn.GELU(), nn.Conv2d(before, after, 3, stride=2, padding=1)]
    return nn.Sequential(*layers)


class Vit(nn.Module):
    """image `b 3 size size` -> features `b n d` after the last norm; position 0 is the class token if there is one."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        if config.size < config.patch or config.size % config.patch:
            raise InputError(f"size {config.size} is no multiple of the patch, {config.patch}.")
        if config.width % config.heads:
            raise InputError(f"width {config.width} is no multiple of the {config.heads} heads.")
        side = config.size // config.patch
        if config.stem == "patch":
            self.stem: nn.Module = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        else:
            self.stem = conv_stem(config.width, config.patch)
        has_class = config.pool == "class"
        self.class_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5) if has_class else None
        self.positions = nn.Parameter(torch.randn(side * side + has_class, config.width) * config.width**-0.5)
        self.norm_pre = nn.LayerNorm(config.width, eps=config.eps)
        self.blocks = nn.ModuleList(
            Block(
                config.width, config.heads, ratio=config.ratio, activation=config.activation, eps=config.eps
            )
            for _ in range(config.depth)
        )
        self.norm_post = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, image: Tensor) -> Tensor:
        x = rearrange(self.stem(image), "b d h w -> b (h w) d")
        if self.class_token is not None:
            x = torch.cat([repeat(self.class_token.to(x.dtype), "d -> b 1 d", b=len(x)), x], dim=1)
        x = self.norm_pre(x + self.positions.to(x.dtype))
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x)

    def pool(self, features: Tensor) -> Tensor:
        """features `b n d` -> one vector per picture `b d`."""
        return features[:, 0] if self.config.pool == "class" else features.mean(dim=1)
