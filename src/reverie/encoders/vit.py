"""Vision Transformer (2010.11929) as image towers of CLIP (2103.00020, section 2.4) and SigLIP (2303.15343) build it.

CLIP: a class token, learned positions, a LayerNorm before the blocks and one after, read at the class token. SigLIP:
no class token and no LayerNorm before, read by one learned query (the pooling of 2106.04560, section 3.1). Features may
also be averaged. `registers` are tokens without a place that the blocks may use as they like (2309.16588); they are
dropped at the end.

`stem="conv"` replaces the patch projection by smaller patches and strided 3x3 convolutions (Xiao et al. 2021,
2106.14881), which learns far more from few pictures; the shipped weights use it, CLIP's public ones use `"patch"`.

With `keep` the blocks see only these patches of each picture, and so many fewer positions (FLIP, 2212.00794). Patches
go after the stem, where they have their positions: the convolutions of a conv stem still see the whole picture.
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
from reverie.nn.linear import PatchLinear
from reverie.nn.mlp import Mlp
from reverie.nn.pooling import QueryAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    kind: Literal["vit"] = "vit"
    size: int = 224  # pixels of a side; what is over beyond the last whole patch is not seen
    patch: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None  # channels inside an MLP; None: 4 x width
    activation: str = "quick_gelu"
    stem: Literal["patch", "conv"] = "patch"
    stem_bias: bool = False  # of the patch projection
    norm_pre: bool = True
    norm_post: bool = True
    registers: int = 0
    pool: Literal["class", "mean", "attention"] = "class"
    eps: float = 1e-5

    @property
    def out(self) -> int:
        """Channels of the pooled vector."""
        return self.width

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.size // self.patch) ** 2


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


class AttentionPool(nn.Module):
    """features `b n d` -> `b d`: one learned query attends to them, then x + mlp(norm(x))."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.query = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.attention = QueryAttention(config.width, config.heads)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = Mlp(config.width, config.hidden or 4 * config.width, activation=config.activation)

    def forward(self, features: Tensor) -> Tensor:
        x = self.attention(repeat(self.query, "d -> b 1 d", b=len(features)), features)[:, 0]
        return x + self.mlp(self.norm(x))


class Vit(nn.Module):
    """image `b 3 size size` -> features `b n d` after the last norm; position 0 is the class token if there is one.

    With `keep`, int64 `b k`, different numbers from 0 to patches - 1, row by row: only these patches of each picture.
    """

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        if config.size < config.patch or (config.stem == "conv" and config.size % config.patch):
            raise InputError(f"size {config.size} is no multiple of the patch, {config.patch}.")
        if config.width % config.heads:
            raise InputError(f"width {config.width} is no multiple of the {config.heads} heads.")
        if config.stem == "patch":
            self.stem: nn.Module = PatchLinear(3, config.width, config.patch, bias=config.stem_bias)
        else:
            self.stem = conv_stem(config.width, config.patch)
        has_class = config.pool == "class"
        self.class_token = nn.Parameter(torch.randn(config.width) * config.width**-0.5) if has_class else None
        self.positions = nn.Parameter(
            torch.randn(config.patches + has_class, config.width) * config.width**-0.5
        )
        self.registers = (
            nn.Parameter(torch.randn(config.registers, config.width) * config.width**-0.5)
            if config.registers
            else None
        )
        self.norm_pre = nn.LayerNorm(config.width, eps=config.eps) if config.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                config.width, config.heads, hidden=config.hidden, activation=config.activation, eps=config.eps
            )
            for _ in range(config.depth)
        )
        self.norm_post = nn.LayerNorm(config.width, eps=config.eps) if config.norm_post else nn.Identity()
        self.pooling = AttentionPool(config) if config.pool == "attention" else None

    def forward(self, image: Tensor, keep: Tensor | None = None) -> Tensor:
        x, seen = self._tokens(image, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x[:, :seen])

    def deep(self, image: Tensor, *, leave: int = 0) -> Tensor:
        """Features `b n d` before the last norm, without the last `leave` blocks (BLIP-2, 2301.12597, section 3.4)."""
        x, seen = self._tokens(image, None)
        for block in self.blocks[: len(self.blocks) - leave]:
            x = block(x)
        return x[:, :seen]

    def layers(self, image: Tensor) -> list[Tensor]:
        """What each convolution of a conv stem and each block make of it, `b n d`, without class and registers."""
        found: list[Tensor] = []
        x = image
        for layer in self.stem if isinstance(self.stem, nn.Sequential) else ():
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                found.append(rearrange(x, "b d h w -> b (h w) d"))
        x, seen = self._tokens(image, None)
        for block in self.blocks:
            x = block(x)
            found.append(x[:, self.class_token is not None : seen])
        return found

    def embed(self, image: Tensor, keep: Tensor | None = None) -> Tensor:
        """image -> `b d`, as `pool` of the features; a class token is all that the last block computes."""
        if self.config.pool != "class" or not len(self.blocks):
            return self.pool(self(image, keep))
        x, _ = self._tokens(image, keep)
        for block in self.blocks[:-1]:
            x = block(x)
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.norm_post(self.blocks[-1](x, at=first))

    def _tokens(self, image: Tensor, keep: Tensor | None) -> tuple[Tensor, int]:
        """What the blocks read, `b n d`, and how many of these are no registers."""
        x = rearrange(self.stem(image), "b d h w -> b (h w) d")
        if self.class_token is not None:
            x = torch.cat([repeat(self.class_token.to(x.dtype), "d -> b 1 d", b=len(x)), x], dim=1)
        x = x + self.positions.to(x.dtype)
        if keep is not None:
            if self.class_token is not None:
                keep = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)
            x = x.gather(1, repeat(keep, "b k -> b k d", d=x.shape[-1]))
        seen = x.shape[1]
        if self.registers is not None:
            x = torch.cat([x, repeat(self.registers.to(x.dtype), "r d -> b r d", b=len(x))], dim=1)
        return self.norm_pre(x), seen

    def pool(self, features: Tensor) -> Tensor:
        """features `b n d` -> one vector per picture `b d`."""
        if self.pooling is not None:
            return self.pooling(features)
        return features[:, 0] if self.config.pool == "class" else features.mean(dim=1)
