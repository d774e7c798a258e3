"""CLIP's text tower (2103.00020, section 2.4): a causal transformer over byte-pair tokens, read at the end token.

Only the causal mask is used: what stands after the end token is never seen, so batches are cut to their longest text
with no change in the result (`trim`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.block import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    vocab: int = 49_408
    length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    activation: str = "quick_gelu"
    end: int = 49_407  # id of the end token
    eps: float = 1e-5


class Text(nn.Module):
    """tokens `b n` -> features `b n d` after the final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Parameter(torch.randn(config.length, config.width) * 0.01)
        blocks = [
            Block(config.width, config.heads, activation=config.activation, eps=config.eps)
            for _ in range(config.depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in blocks:  # CLIP's initialisation, scaled by depth
            nn.init.normal_(block.attention.qkv.weight, std=config.width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=(2 * config.width * config.depth) ** -0.5)
            nn.init.normal_(block.mlp.up.weight, std=(2 * config.width) ** -0.5)
            nn.init.normal_(block.mlp.down.weight, std=(2 * config.width * config.depth) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x)

    def check(self, tokens: Tensor) -> None:
        """InputError: these are no tokens `b n` of this tower."""
        length, vocab, end = self.config.length, self.config.vocab, self.config.end
        if tokens.ndim != 2 or not tokens.numel() or tokens.shape[1] > length:
            raise InputError(
                f"tokens must be `b n`, n at most {length}, but have shape {tuple(tokens.shape)}."
            )
        if not (tokens == end).any(dim=1).all():
            raise InputError(
                f"a row of the tokens has no end token, {end}: encode texts with this model's tokenizer."
            )
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise InputError(f"tokens must be from 0 to {vocab - 1}, but reach {int(tokens.max())}.")

    def end_position(self, tokens: Tensor) -> Tensor:
        """`b n -> b`: where the first end token stands."""
        return (tokens == self.config.end).int().argmax(dim=-1)

    def trim(self, tokens: Tensor) -> Tensor:
        """Cut the columns that no text of the batch reaches."""
        return tokens[:, : int(self.end_position(tokens).max()) + 1]

    def pool(self, features: Tensor, tokens: Tensor) -> Tensor:
        """features `b n d` -> the vector at the end token `b d`."""
        return features[torch.arange(len(tokens), device=tokens.device), self.end_position(tokens)]
