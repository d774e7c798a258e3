"""The text-to-video transformer of "Wan: Open and Advanced Large-Scale Video Generative Models" (2503.20314, 4).

    latents --- patches ----- | self-attention, rotary over frames, rows, columns |
    time ------ modulation -- | cross-attention to the words                      | x depth --- head --- velocity
    words ----- MLP --------- | feed-forward                                      |

One projection of the time is shared by all blocks, and each block adds a learned table to it. Queries and keys are
normed over all heads together. Convention: `t` in [0, 1], 1 is noise; the network's own clock counts to 1000.

What does not change from step to step of a sampling is computed once, by `prepare`: the words' keys and values in every
block. Wan has no mask: a prompt is filled up to 512 places with zeros, and all of them are attended to. They all have
the same key, so `prepare` keeps one of them and adds log(their number) to its score, which is the same softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.attention import attend
from reverie.nn.block import norm_modulate
from reverie.nn.cache import Cache, through
from reverie.nn.linear import Linear
from reverie.nn.mlp import Mlp
from reverie.nn.patches import patchify, unpatchify
from reverie.nn.positions import grid, rotary, rotate, sinusoidal


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanDitConfig:
    """The defaults are the 1.3B model's."""

    channels: int = 16
    patch: tuple[int, int] = (1, 2)  # frames, side
    width: int = 1536
    hidden: int = 8960  # channels inside the feed-forward half
    depth: int = 30
    heads: int = 12
    context_width: int = 4096
    clock: int = 256  # sinusoids of the time
    eps: float = 1e-6
    norm_context: bool = True  # an affine norm before the cross-attention

    def __post_init__(self) -> None:
        if min(self.channels, *self.patch, self.width, self.heads) < 1:
            raise InputError(
                f"channels {self.channels}, patch {self.patch}, width {self.width} and heads {self.heads} must be 1 or"
                " more."
            )
        if self.width % (2 * self.heads):
            raise InputError(f"width {self.width} must be a multiple of twice the {self.heads} heads.")
        if self.clock < 2 or self.clock % 2:
            raise InputError(f"clock is {self.clock}; it must be even, a cosine and a sine of each wave.")

    @property
    def shares(self) -> tuple[int, int, int]:
        """A head's channels that turn with the frame, the row and the column."""
        side = 2 * (self.width // self.heads // 6)
        return self.width // self.heads - 2 * side, side, side


SHAPES = {
    "wan2.1-t2v-1.3b": WanDitConfig(),
    "wan2.1-t2v-14b": WanDitConfig(width=5120, hidden=13824, depth=40, heads=40),
}


@dataclasses.dataclass(frozen=True)
class Words:
    """Prompts as every block reads them: keys and values `b heads m d`, and what is added to the scores, `b 1 1 m`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None = None

    def first(self, count: int) -> Words:
        """Those of the first so many prompts."""
        keys, values = (tuple(part[:count] for part in parts) for parts in (self.keys, self.values))
        return Words(keys, values, None if self.bias is None else self.bias[:count])


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight; the mean as one product, ten times as quick as torch's on a CPU."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        size = torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1]
        return (wide * self.weight * torch.rsqrt(size + self.eps)).to(x.dtype)


class WanSelfAttention(nn.Module):
    def __init__(self, config: WanDitConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.norm_q = RmsNorm(config.width, config.eps)
        self.norm_k = RmsNorm(config.width, config.eps)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (
            rearrange(part, "b n (heads d) -> b heads n d", heads=self.heads)
            for part in (self.norm_q(q), self.norm_k(k), v)
        )
        out = attend(rotate(q, turns), rotate(k, turns), v)
        return self.out(rearrange(out, "b heads n d -> b n (heads d)"))


class WanCrossAttention(nn.Module):
    def __init__(self, config: WanDitConfig):
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.width, config.width)
        self.kv = Linear(config.width, 2 * config.width)
        self.norm_q = RmsNorm(config.width, config.eps)
        self.norm_k = RmsNorm(config.width, config.eps)
        self.out = Linear(config.width, config.width)

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `context b m d`, each `b heads m d`."""
        k, v = self.kv(context).chunk(2, -1)
        k, v = (
            rearrange(part, "b m (heads d) -> b heads m d", heads=self.heads) for part in (self.norm_k(k), v)
        )
        return k, v

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        q = rearrange(self.norm_q(self.q(x)), "b n (heads d) -> b heads n d", heads=self.heads)
        return self.out(rearrange(attend(q, keys, values, mask=bias), "b heads n d -> b n (heads d)"))


class WanBlock(nn.Module):
    """`x b n d`, modulated by `vector b 6 d` (or `1 6 d`: one for all): shift, scale, gate of either half."""

    def __init__(self, config: WanDitConfig):
        super().__init__()
        width = config.width
        self.eps = config.eps
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attention = WanSelfAttention(config)
        self.norm_context = nn.LayerNorm(width, eps=config.eps) if config.norm_context else nn.Identity()
        self.cross = WanCrossAttention(config)
        self.mlp = Mlp(width, config.hidden, activation="gelu_tanh")

    def forward(
        self,
        x: Tensor,
        vector: Tensor,
        turns: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = rearrange(
            self.table + vector, "b six d -> six b 1 d", six=6
        )
        x = torch.addcmul(x, gate1, self.attention(norm_modulate(x, shift1, scale1, eps=self.eps), turns))
        x = x + self.cross(self.norm_context(x), keys, values, bias)
        return torch.addcmul(x, gate2, self.mlp(norm_modulate(x, shift2, scale2, eps=self.eps)))


class WanDit(nn.Module):
    """`x b c f h w`, `t b` (or `1`: one time for all), `context b m d` of any length or `prepare`'s -> `b c f h w`."""

    def __init__(self, config: WanDitConfig):
        super().__init__()
        self.config = config
        width = config.width
        contents = config.channels * config.patch[0] * config.patch[1] ** 2
        self.embed = Linear(contents, width)
        self.time = nn.Sequential(Linear(config.clock, width), nn.SiLU(), Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.words = nn.Sequential(Linear(config.context_width, width), nn.GELU("tanh"), Linear(width, width))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.out = Linear(width, contents)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def prepare(self, context: Tensor) -> Words:
        """Features `b m d`, zero beyond each prompt, as all blocks read them, in as few places as the longest needs."""
        real = context.ne(0).any(-1)
        places = torch.arange(1, context.shape[1] + 1, device=context.device)
        lengths = (real * places).amax(1)
        longest, m = int(lengths.max()), context.shape[1]
        if longest + 1 >= m:
            return self._read(context)
        # Of the places beyond a prompt, all alike, the first stands for all.
        place = places[: longest + 1] - 1
        after = rearrange(lengths, "b -> b 1")
        bias = torch.zeros(len(context), longest + 1, device=context.device)
        bias = bias.masked_fill(place > after, float("-inf"))
        bias = torch.where(place == after, (m - after).float().log(), bias)
        words = self._read(context[:, : longest + 1])
        return dataclasses.replace(words, bias=rearrange(bias, "b m -> b 1 1 m").to(words.keys[0].dtype))

    def _read(self, context: Tensor) -> Words:
        context = self.words(context)
        pairs = [block.cross.read(context) for block in self._blocks()]
        return Words(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def _blocks(self) -> Iterator[WanBlock]:
        return (cast(WanBlock, block) for block in self.blocks)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | Words, *, cache: Cache | None = None) -> Tensor:
        words = context if isinstance(context, Words) else self._read(context)
        config, shape = self.config, (x.shape[-3], x.shape[-2], x.shape[-1])
        frames, side = config.patch
        sizes = shape[0] // frames, shape[1] // side, shape[2] // side
        turns = _turns(sizes, config.shares, x.device)
        tokens = self.embed(patchify(x, config.patch))
        # In float64, as the original: at 1000 a float32 has lost the fifth digit of the quickest wave.
        vector = self.time(sinusoidal(t.double(), config.clock, scale=1000.0).to(tokens.dtype))
        each = rearrange(self.modulation(vector), "b (six d) -> b six d", six=6)
        blocks = [
            partial(block, vector=each, turns=turns, keys=keys, values=values, bias=words.bias)
            for block, keys, values in zip(self._blocks(), words.keys, words.values, strict=True)
        ]
        tokens = through(tokens, blocks, cache)
        shift, scale = rearrange(self.table + rearrange(vector, "b d -> b 1 d"), "b two d -> two b 1 d")
        return unpatchify(self.out(norm_modulate(tokens, shift, scale, eps=config.eps)), config.patch, shape)


@lru_cache(maxsize=8)
def _turns(
    sizes: tuple[int, int, int], shares: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rotary positions of a grid of patches, computed in float64 as the original does."""
    with torch.inference_mode(False):
        cos, sin = rotary(grid(*sizes).double(), shares, longest=10_000.0)
        return cos.float().to(device), sin.float().to(device)
