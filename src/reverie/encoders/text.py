"""Text towers: CLIP's (2103.00020, section 2.4), causal and read at the end token, and SigLIP's (2303.15343),
bidirectional and read at the last of its fixed number of positions.

CLIP's uses the causal mask alone: what stands after the end token is never seen, so batches are cut to their longest
text with no change in the result (`trim`). SigLIP's attends to its padding, as it was trained to; nothing is cut.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

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
    hidden: int | None = None  # channels inside an MLP; None: 4 x width
    activation: str = "quick_gelu"
    causal: bool = True
    pool: Literal["end", "argmax", "last"] = "end"  # the first end token, the highest id, the last position
    end: int = 49_407  # id of the end token
    eps: float = 1e-5


class Text(nn.Module):
    """tokens `b n` -> features `b n d` after the final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        if config.width % config.heads:
            raise InputError(f"width {config.width} is no multiple of the {config.heads} heads.")
        if not config.causal and config.pool != "last":
            raise InputError(
                f"a text tower that sees its padding is read at the last position, not {config.pool!r}."
            )
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Parameter(torch.randn(config.length, config.width) * 0.01)
        blocks = [
            Block(
                config.width, config.heads, hidden=config.hidden, activation=config.activation, eps=config.eps
            )
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
            x = block(x, causal=self.config.causal)
        return self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens -> `b d`, as `pool` of the features, for less: of the last block only what is read is computed.

        On a CPU the texts stand one after the other without padding, so that a short one costs only its own length;
        elsewhere the few long products of a padded batch are quicker.
        """
        ends = self.end_position(tokens)
        if not len(self.blocks):
            return self.pool(self(tokens), tokens)
        if tokens.device.type != "cpu" or self.config.pool == "last":
            tokens = self.trim(tokens)
            x, runs, back = self.embedding(tokens) + self.positions[: tokens.shape[1]], None, None
        else:
            order = ends.argsort(stable=True)
            tokens, ends, back = tokens[order], ends[order], order.argsort()
            lengths, items = (ends + 1).unique_consecutive(return_counts=True)
            runs = list(zip(items.tolist(), lengths.tolist(), strict=True))
            places = torch.arange(tokens.shape[1])
            real = places <= ends[:, None]
            x = self.embedding(tokens[real]) + self.positions[places.expand_as(real)[real]]
        for block in self.blocks[:-1]:
            x = block(x, causal=self.config.causal, runs=runs)
        x = self.norm(self.blocks[-1](x, causal=self.config.causal, at=ends, runs=runs))
        return x if back is None else x[back]

    def check(self, tokens: Tensor) -> None:
        """InputError: these are no tokens `b n` of this tower."""
        length, vocab, end = self.config.length, self.config.vocab, self.config.end
        if tokens.ndim != 2 or not tokens.numel() or tokens.shape[1] > length:
            raise InputError(
                f"tokens must be `b n`, n at most {length}, but have shape {tuple(tokens.shape)}."
            )
        if self.config.pool == "last" and tokens.shape[1] < length:
            raise InputError(
                f"tokens must be padded to {length} positions, the last of which is read, but have {tokens.shape[1]}."
            )
        if self.config.pool == "end" and not (tokens == end).any(dim=1).all():
            raise InputError(
                f"a row of the tokens has no end token, {end}: encode texts with this model's tokenizer."
            )
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise InputError(f"tokens must be from 0 to {vocab - 1}, but reach {int(tokens.max())}.")

    def end_position(self, tokens: Tensor) -> Tensor:
        """`b n -> b`: the position that a text is read at."""
        if self.config.pool == "last":
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        if self.config.pool == "argmax":
            return tokens.argmax(dim=-1)
        return (tokens == self.config.end).int().argmax(dim=-1)

    def trim(self, tokens: Tensor) -> Tensor:
        """Cut the columns that change no vector of the batch."""
        return tokens[:, : int(self.end_position(tokens).max()) + 1]

    def pool(self, features: Tensor, tokens: Tensor) -> Tensor:
        """features `b n d` -> the vector that a text is read at `b d`."""
        return features[torch.arange(len(tokens), device=tokens.device), self.end_position(tokens)]
