"""BERT in three modes, the text side of BLIP (Li et al. 2022, 2201.12086, section 3.1): the multimodal mixture of
encoder and decoder.

    alone     tokens [CLS] ...    attention both ways                     -> features, read at the first
    grounded  tokens [ENC] ...    attention both ways, then to a picture  -> features, read at the first
    writing   tokens [DEC] ...    causal attention, then to a picture     -> logits of the next token

All weights are shared but those of self-attention, of which there is a set for each direction: `attention` and
`causal`. A network that only understands (retrieval), or only writes (captions), has the one that it needs.

Convention: a block norms after it adds (Devlin et al. 2018, 1810.04805). `mask b n` is True for words that are real;
padding stands behind them, so that writing needs no mask.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.attention import CrossAttention, SelfAttention
from reverie.nn.keyvalues import Known, Past, Readers, identity
from reverie.nn.mlp import Mlp
from reverie.nn.words import Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedConfig:
    vocab: int = 30_524
    length: int = 512  # the most tokens of a text
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # channels inside an MLP
    context_width: int = 768  # of the picture's features
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0  # of what blocks add, and of the embeddings, in training
    understands: bool = True
    writes: bool = True
    pad: int = 0
    start: int = 101  # [CLS]
    end: int = 102  # [SEP]
    decode: int = 30_522  # [DEC], the first token where the network writes
    ground: int = 30_523  # [ENC], the first token where it reads beside a picture


class MedBlock(nn.Module):
    """x = norm(x + attention(x)), then the same with cross-attention, if there is a context, and the MLP."""

    def __init__(self, config: MedConfig):
        super().__init__()
        width, eps = config.width, config.eps
        self.attention = SelfAttention(width, config.heads) if config.understands else None
        self.norm_attention = nn.LayerNorm(width, eps=eps) if config.understands else None
        self.causal = SelfAttention(width, config.heads) if config.writes else None
        self.norm_causal = nn.LayerNorm(width, eps=eps) if config.writes else None
        self.cross = CrossAttention(width, config.heads, context_width=config.context_width)
        self.norm_cross = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, config.hidden, activation=config.activation)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool,
        mask: Tensor | None = None,
        context: Tensor | Known | None = None,
        context_mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        attention, norm = (self.causal, self.norm_causal) if causal else (self.attention, self.norm_attention)
        assert attention is not None, "this network has no such mode"
        assert norm is not None
        x = norm(x + self.dropout(attention(x, mask=mask, causal=causal, past=past)))
        if context is not None:
            x = self.norm_cross(x + self.dropout(self.cross(x, context, context_mask)))
        return self.norm_mlp(x + self.dropout(self.mlp(x)))


class Med(nn.Module):
    """The text network; see the module."""

    def __init__(self, config: MedConfig):
        super().__init__()
        self.config = config
        if config.width % config.heads:
            raise InputError(f"width {config.width} is no multiple of the {config.heads} heads.")
        if not config.understands and not config.writes:
            raise InputError("a text network must understand or write: set one of them.")
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Parameter(torch.randn(config.length, config.width) * 0.02)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(MedBlock(config) for _ in range(config.depth))
        self.words = (
            Words(config.width, config.vocab, activation=config.activation, eps=config.eps)
            if config.writes
            else None
        )
        for module in self.modules():  # BERT's initialisation
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def features(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """tokens `b n` -> `b n d`, alone, or grounded in `context b m c`."""
        x, seen = self._embedded(tokens), None if mask is None else rearrange(mask, "b n -> b 1 1 n")
        for block in self.blocks:
            x = block(x, causal=False, mask=seen, context=context, context_mask=context_mask)
        return x

    def logits(self, tokens: Tensor, *, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """tokens `b n` -> `b n v`, of the token after each."""
        assert self.words is not None, "this network does not write"
        x = self._embedded(tokens)
        for block in self.blocks:
            x = block(x, causal=True, context=context, context_mask=context_mask)
        return self.words(x, self.embedding.weight)

    def writer(
        self, context: Tensor, *, context_mask: Tensor | None = None, rows: int = 1, most: int | None = None
    ) -> Writer:
        """A decoder for the samplers that writes `rows` texts of at most `most` tokens about each `context b m c`."""
        return Writer(self, context, context_mask=context_mask, rows=rows, most=most)

    def _embedded(self, tokens: Tensor, before: int = 0) -> Tensor:
        positions = self.positions[before : before + tokens.shape[1]]
        return self.dropout(self.norm(self.embedding(tokens) + positions))


class Writer:
    """Texts that are being written: `writer(tokens r n) -> logits r v` of the token after the newest `n` of each row.

    It keeps keys and values of what came before, so each position is computed once; those of the context are computed
    here, once for each of its items, and shared by all rows that read it. No gradients.
    """

    @torch.no_grad()
    def __init__(
        self, med: Med, context: Tensor, *, context_mask: Tensor | None, rows: int, most: int | None
    ):
        assert med.words is not None, "this network does not write"
        length = med.config.length
        if most is not None and not 0 < most <= length:
            raise InputError(f"a text of {most} tokens cannot be written: from 1 to {length} can.")
        self.med, self.words, self.before = med, med.words, 0
        self.readers = Readers(len(context), each=rows)
        self.known = [
            cast(MedBlock, block).cross.known(context, context_mask, self.readers) for block in med.blocks
        ]
        self.past = [Past(most or length) for _ in med.blocks]

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        x = self.med._embedded(tokens, self.before)
        for block, known, past in zip(self.med.blocks, self.known, self.past, strict=True):
            x = block(x, causal=True, context=known, past=past)
        self.before += tokens.shape[1]
        return self.words(x[:, -1], self.med.embedding.weight)

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Keep these rows, `r` of int64, in this order; some may come several times."""
        if identity(rows, len(self.readers.items)):
            return
        self.readers.select(rows.tolist())
        for past in self.past:
            past.select(rows)
