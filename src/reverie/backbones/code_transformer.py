"""Transformers over a text and the codes of a picture in one sequence: DALL-E's, which predicts each code from those
before it (Ramesh et al. 2021, 2102.12092, section 2.2), and MaskGIT's, which predicts hidden codes from all others
(Chang et al. 2022, 2202.04200, section 3).

    tokens + text positions -----------+
                                       +---[ block ]--- ... ---[ block ]--- norm --- words | codes
    codes + rows + columns ------------+

The text always fills its length: beyond its end stands a padding token of its own for each position, which is learned.
So nothing is masked, and the text of no words is a row of padding.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.attention import SelfAttention
from reverie.nn.block import Block
from reverie.nn.keyvalues import Past
from reverie.nn.linear import Linear
from reverie.nn.mlp import Mlp
from reverie.nn.sparse import Pattern, PatternAttention, patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeTransformerConfig:
    words: int = 16_384  # of the text's vocabulary
    length: int = 256  # positions of the text
    vocab: int = 8192  # of the codes
    rows: int = 32
    columns: int = 32
    width: int = 3968
    depth: int = 64
    heads: int = 62
    attention: Literal["sparse", "full"] = "sparse"  # of DALL-E's; MaskGIT's sees everything
    kernel: int = 11  # of the last layer's pattern

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if low := [name for name, value in sizes.items() if isinstance(value, int) and value < 1]:
            raise InputError(f"{low[0]} is {sizes[low[0]]}; it must be 1 or more.")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is no multiple of the {self.heads} heads.")
        if self.length < 2:
            raise InputError(
                f"length {self.length} has no room for the start and the end token: give 2 or more."
            )
        if self.kernel % 2 == 0:
            raise InputError(
                f"kernel {self.kernel} has no middle: give an odd number, such as {self.kernel + 1}."
            )

    @property
    def places(self) -> int:
        return self.rows * self.columns


class Entrance(nn.Module):
    """Tokens and codes to features; `hidden` codes more than the vocabulary has (MaskGIT's mask)."""

    def __init__(self, config: CodeTransformerConfig, *, hidden: int = 0):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(
            config.words + config.length, config.width
        )  # and the padding of each position
        self.positions = nn.Parameter(torch.randn(config.length, config.width) * 0.01)
        self.codes = nn.Embedding(config.vocab + hidden, config.width)
        self.rows = nn.Parameter(torch.randn(config.rows, config.width) * 0.01)
        self.columns = nn.Parameter(torch.randn(config.columns, config.width) * 0.01)
        for embedding in (self.words, self.codes):
            nn.init.normal_(embedding.weight, std=0.02)

    def text(self, tokens: Tensor) -> Tensor:
        """`b length`, in which padding is its own token (`padded`) -> `b length d`."""
        return self.words(tokens) + self.positions

    def picture(self, codes: Tensor, *, first: int = 0) -> Tensor:
        """Codes `b n` of the places from `first` on -> `b n d`."""
        places = torch.arange(first, first + codes.shape[1], device=codes.device)
        where = self.rows[places // self.config.columns] + self.columns[places % self.config.columns]
        return self.codes(codes) + where


def padded(tokens: Tensor, real: Tensor, *, words: int) -> Tensor:
    """`b n` with each position's own padding token where `real b n` is False."""
    own = words + torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(real, tokens, own)


class PatternBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), under a pattern."""

    def __init__(self, config: CodeTransformerConfig, pattern: Pattern):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = PatternAttention(
            config.width, config.heads, pattern=pattern, text=config.length, rows=config.rows,
            columns=config.columns, kernel=config.kernel,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, 4 * config.width)

    def forward(self, x: Tensor, *, past: Past | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), past=past)
        return x + self.mlp(self.norm2(x))

    def step(self, x: Tensor, past: Past) -> Tensor:
        x = x + self.attention.step(self.norm1(x), past)
        return x + self.mlp(self.norm2(x))


class CausalCodes(nn.Module):
    """DALL-E's: tokens `b length`, codes `b n` -> logits of words, `b length-1 words`, and of codes, `b n v`."""

    def __init__(self, config: CodeTransformerConfig):
        super().__init__()
        self.config = config
        self.entrance = Entrance(config)
        full: Pattern = "full"
        kinds = patterns(config.depth) if config.attention == "sparse" else (full,) * config.depth
        self.blocks = nn.ModuleList(PatternBlock(config, kind) for kind in kinds)
        self.norm = nn.LayerNorm(config.width)
        self.say_words = Linear(config.width, config.words)
        self.say_codes = Linear(config.width, config.vocab)
        for block in self.blocks:
            assert isinstance(block, PatternBlock)
            _begin(block.attention, block.mlp, config)

    def forward(self, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of all places. What stands at a position is said of the next one."""
        length = self.config.length
        x = torch.cat([self.entrance.text(tokens), self.entrance.picture(codes)], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.say_words(x[:, : length - 1]), self.say_codes(x[:, length - 1 : -1])

    def begin(self, tokens: Tensor) -> Writing:
        """Reads a text for each row, once; what it gives writes codes (samplers/autoregressive.py)."""
        return Writing(self, tokens)


class Writing:
    """A decoder of codes: the first call, with no codes `r 0`, tells of the first place; then one code at a time.

    Several codes may be given at once, which are then read together: the upper part of a picture.
    """

    def __init__(self, network: CausalCodes, tokens: Tensor):
        config = network.config
        self.network, self.written = network, 0
        self.pasts = [Past(config.length + config.places) for _ in network.blocks]
        x = network.entrance.text(tokens)
        for block, past in zip(network.blocks, self.pasts, strict=True):
            x = block(x, past=past)
        self.newest = x[:, -1:]

    def __call__(self, codes: Tensor) -> Tensor:
        for at in range(codes.shape[1]):
            self.newest = self.network.entrance.picture(codes[:, at : at + 1], first=self.written)
            for block, past in zip(self.network.blocks, self.pasts, strict=True):
                self.newest = block.step(self.newest, past)  # type: ignore[operator]  # a block
            self.written += 1
        return self.network.say_codes(self.network.norm(self.newest[:, 0]))

    def select(self, rows: Tensor) -> None:
        """Keep these rows, `r`, in this order; one may come several times."""
        self.newest = self.newest[rows]
        for past in self.pasts:
            past.select(rows)


class MaskedCodes(nn.Module):
    """MaskGIT's: tokens `b length`, codes `b n` and which of them are hidden, `b n` -> logits of all codes, `b n v`."""

    def __init__(self, config: CodeTransformerConfig):
        super().__init__()
        self.config = config
        self.entrance = Entrance(config, hidden=1)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.say_codes = Linear(config.width, config.vocab)
        for block in self.blocks:
            assert isinstance(block, Block)
            _begin(block.attention, block.mlp, config)

    def forward(self, tokens: Tensor, codes: Tensor, hidden: Tensor) -> Tensor:
        shown = torch.where(hidden, self.config.vocab, codes)
        x = torch.cat([self.entrance.text(tokens), self.entrance.picture(shown)], 1)
        for block in self.blocks:
            x = block(x)
        return self.say_codes(self.norm(x[:, self.config.length :]))


def _begin(attention: SelfAttention | PatternAttention, mlp: Mlp, config: CodeTransformerConfig) -> None:
    """GPT-2's initialisation: what is added to the stream is smaller, the more layers add to it."""
    inner = 0.02 / (2 * config.depth) ** 0.5
    for layer, deviation in (
        (attention.qkv, 0.02),
        (attention.out, inner),
        (mlp.up, 0.02),
        (mlp.down, inner),
    ):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)


def flat(codes: Tensor) -> Tensor:
    """`b h w -> b (h w)`, row by row."""
    return rearrange(codes, "b h w -> b (h w)")
