"""The Q-Former: a few learned queries that ask a picture's features, and a text beside them (BLIP-2, Li et al. 2023,
2301.12597, section 3.1).

    queries --- self-attention --- cross-attention to the picture, every second block --- MLP of the queries
                      |
    text ------ the same -------------------------------------------------------------- MLP of the text

    look    the queries alone                                        -> `b q d`
    read    the text alone, both ways                                -> `b d`, at its first token
    both    queries and text see each other                          -> `b q d` of the queries
    write   the text sees the queries and its own past, they not it  -> logits of the next token

Convention: a block norms after it adds (BERT, 1810.04805). `mask b n` is True for words that are real; padding stands
behind them, so that writing needs no mask. What is seen is a picture's features `b m c`, or their keys and values
(`known`), which several texts of one picture share. In `write` the queries never see the text, so their keys and values
are those that `look` had: they stand before the text as a prefix, and are computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.attention import SelfAttention, attend
from reverie.nn.linear import Linear
from reverie.nn.mlp import Mlp
from reverie.nn.words import Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class QformerConfig:
    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # channels inside an MLP
    context_width: int = 1408  # of the picture's features
    every: int = 2  # which blocks look at the picture: 0, 2, 4, ...
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0  # of what blocks add, and of the embeddings, in training
    reads: bool = True  # has a text side
    writes: bool = True  # has the head that writes
    vocab: int = 30_523
    length: int = 512  # the most tokens of a text
    pad: int = 0
    start: int = 101  # [CLS]
    end: int = 102  # [SEP]
    decode: int = 30_522  # [DEC], the first token where it writes


KeysValues = tuple[Tensor, Tensor]  # `b heads m d` each
Known = Sequence[KeysValues | None]  # of a picture, for each block that looks at it
Seen = Tensor | Known  # a picture's features `b m c`, or what is known of them


class Look(nn.Module):
    """Cross-attention of queries `b n d` to a picture `b m c`; `1 n d` stands for the same queries to every picture."""

    def __init__(self, width: int, heads: int, *, context_width: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(context_width, 2 * width)
        self.out = Linear(width, width)

    def known(self, context: Tensor) -> KeysValues:
        """Keys and values of `b m c`."""
        k, v = self.kv(context).chunk(2, -1)
        split = "b m (heads d) -> b heads m d"
        return rearrange(k, split, heads=self.heads), rearrange(v, split, heads=self.heads)

    def forward(self, x: Tensor, seen: Tensor | KeysValues) -> Tensor:
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        if isinstance(seen, Tensor) and not self._few(q, seen):
            seen = self.known(seen)
        if isinstance(seen, Tensor):
            mixed = self._of_few(q, seen)
        else:
            mixed = attend(q.expand(len(seen[0]), -1, -1, -1), *seen)
        return self.out(rearrange(mixed, "b heads n d -> b n (heads d)"))

    def _few(self, q: Tensor, context: Tensor) -> bool:
        """Whether so few queries ask that it costs less to bring them to the picture's channels than it to theirs."""
        if type(self.kv) is not Linear or not self.kv.weight.dtype == q.dtype == context.dtype:
            return False  # adapted, in eight bits, or narrower: the layer computes
        (_, heads, n, d), (b, m, c) = q.shape, context.shape
        products = b * m * heads * d * (c + n)  # twice: for keys and values, and so below
        return len(q) * n * heads * d * c + b * m * heads * n * c < products

    def _of_few(self, q: Tensor, context: Tensor) -> Tensor:
        """softmax(q (K c)^T) (V c)^T = (softmax((q K) c^T) c) V^T; what K adds to all scores alike changes nothing."""
        k, v = rearrange(self.kv.weight, "(two heads d) c -> two heads d c", two=2, heads=self.heads)
        many = len(q)
        asked = rearrange(q * q.shape[-1] ** -0.5, "b heads n d -> heads (b n) d") @ k
        asked = rearrange(asked, "heads (b n) c -> b (heads n) c", b=many)
        found = (asked @ context.transpose(-1, -2)).softmax(-1) @ context
        found = rearrange(found, "b (heads n) c -> heads (b n) c", heads=self.heads)
        mixed = rearrange(found @ v.transpose(-1, -2), "heads (b n) d -> b heads n d", b=len(context))
        bias = rearrange(self.kv.bias.chunk(2)[1], "(heads d) -> heads 1 d", heads=self.heads)
        return mixed + bias


class QformerBlock(nn.Module):
    """x = norm(x + attention(x)); then the queries x = norm(x + look(x)), if it looks; then each side its MLP so."""

    def __init__(self, config: QformerConfig, *, looks: bool):
        super().__init__()
        width, eps = config.width, config.eps
        self.attention = SelfAttention(width, config.heads)
        self.norm_attention = nn.LayerNorm(width, eps=eps)
        self.look = Look(width, config.heads, context_width=config.context_width) if looks else None
        self.norm_look = nn.LayerNorm(width, eps=eps) if looks else None
        self.mlp_query = Mlp(width, config.hidden, activation=config.activation)
        self.norm_query = nn.LayerNorm(width, eps=eps)
        self.mlp_text = Mlp(width, config.hidden, activation=config.activation) if config.reads else None
        self.norm_text = nn.LayerNorm(width, eps=eps) if config.reads else None
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention, `b heads n d`."""
        q, k, v = (
            rearrange(part, "b n (heads d) -> b heads n d", heads=self.attention.heads)
            for part in self.attention.qkv(x).chunk(3, -1)
        )
        return q, k, v

    def mixed(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        out = self.attention.out(rearrange(attend(q, k, v, mask=mask), "b heads n d -> b n (heads d)"))
        return self.norm_attention(x + self.dropout(out))

    def query(self, x: Tensor, seen: Tensor | KeysValues | None) -> Tensor:
        """The rest of the block for queries."""
        if self.look is not None and self.norm_look is not None:
            assert seen is not None
            x = self.norm_look(x + self.dropout(self.look(x, seen)))
        return self.norm_query(x + self.dropout(self.mlp_query(x)))

    def text(self, x: Tensor) -> Tensor:
        """The rest of the block for text."""
        assert self.mlp_text is not None, "this Q-Former has no text side"
        assert self.norm_text is not None
        return self.norm_text(x + self.dropout(self.mlp_text(x)))


class Qformer(nn.Module):
    """The network; see the module."""

    def __init__(self, config: QformerConfig):
        super().__init__()
        self.config = config
        if config.width % config.heads:
            raise InputError(f"width {config.width} is no multiple of the {config.heads} heads.")
        if config.writes and not config.reads:
            raise InputError("a Q-Former that writes has a text side: set reads, or leave writes out.")
        if min(config.every, config.queries, config.depth) < 1:
            raise InputError("a Q-Former has one query and block or more, and looks at the picture in some.")
        self.queries = nn.Parameter(torch.randn(config.queries, config.width) * 0.02)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            QformerBlock(config, looks=number % config.every == 0) for number in range(config.depth)
        )
        self.embedding = nn.Embedding(config.vocab, config.width) if config.reads else None
        self.positions = (
            nn.Parameter(torch.randn(config.length, config.width) * 0.02) if config.reads else None
        )
        self.words = (
            Words(config.width, config.vocab, activation=config.activation, eps=config.eps)
            if config.writes
            else None
        )
        self.no_decay = ("queries", "positions") if config.reads else ("queries",)
        for module in self.modules():  # BERT's initialisation
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if config.reads:  # the authors' code: both sides begin with the same MLPs
            for block in self._blocks():
                block.mlp_query.load_state_dict(block.mlp_text.state_dict())  # type: ignore[union-attr]

    def _blocks(self) -> list[QformerBlock]:
        return [block for block in self.blocks if isinstance(block, QformerBlock)]

    # Pictures ---------------------------------------------------------------------------------------------------------

    def known(self, context: Tensor) -> list[KeysValues | None]:
        """Keys and values of `context b m c` for each block that looks."""
        return [None if block.look is None else block.look.known(context) for block in self._blocks()]

    def look(self, seen: Seen, *, past: list[KeysValues] | None = None) -> Tensor:
        """What is seen -> the queries' features `b q d`. `past` gets their keys and values, for `write`."""
        x = self.norm(self.queries)[None]  # the same for every picture, until one is looked at
        if self.config.dropout:
            x = self.dropout(x.expand(self._count(seen), -1, -1))
        for block, picture in zip(self._blocks(), self._each(seen), strict=True):
            q, k, v = block.project(x)
            if past is not None:
                past.append((k, v))
            x = block.query(block.mixed(x, q, k, v), picture)
        return x

    def both(self, tokens: Tensor, seen: Seen, *, mask: Tensor | None = None) -> Tensor:
        """tokens `b n`, and what is seen -> the features `b q d` of queries that read the text too."""
        words = self._embedded(tokens)
        asks = repeat(self.norm(self.queries), "q d -> b q d", b=len(tokens))
        if mask is not None:
            mask = rearrange(torch.cat([mask.new_ones(asks.shape[:2]), mask], dim=1), "b n -> b 1 1 n")
        blocks = self._blocks()
        x, many = torch.cat([self.dropout(asks), words], dim=1), asks.shape[1]
        for block, picture in zip(blocks, self._each(seen), strict=True):
            q, k, v = block.project(x)
            if block is blocks[-1]:  # of which nobody reads the text
                return block.query(block.mixed(x[:, :many], q[:, :, :many], k, v, mask=mask), picture)
            x = block.mixed(x, q, k, v, mask=mask)
            x = torch.cat([block.query(x[:, :many], picture), block.text(x[:, many:])], dim=1)
        raise AssertionError("a Q-Former has blocks")

    # Text -------------------------------------------------------------------------------------------------------------

    def read(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """tokens `b n` -> the vector `b d` of each text's first token."""
        x = self._embedded(tokens)
        mask = None if mask is None else rearrange(mask, "b n -> b 1 1 n")
        for block in self._blocks():
            q, k, v = block.project(x)
            if block is self.blocks[-1]:  # of which only the first token is wanted
                x, q = x[:, :1], q[:, :, :1]
            x = block.text(block.mixed(x, q, k, v, mask=mask))
        return x[:, 0]

    def write(self, tokens: Tensor, past: Sequence[KeysValues]) -> Tensor:
        """tokens `b n` and the queries' keys and values, by `look` -> logits `b n v` of the token after each."""
        n, many = tokens.shape[1], past[0][0].shape[-2]
        mask = torch.ones(n, many + n, dtype=torch.bool, device=tokens.device).tril(many)
        x, _ = self._written(self._embedded(tokens), past, mask)
        return self._logits(x)

    def writer(self, seen: Seen) -> Writer:
        """A decoder for `samplers.autoregressive` that writes beside each picture that is seen, a row for each."""
        past: list[KeysValues] = []
        self.look(seen, past=past)
        rows = self._count(seen)
        return Writer(self, [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in past])

    def _written(
        self, x: Tensor, past: Sequence[KeysValues], mask: Tensor | None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Text `b n d` behind what stands before it, and the keys and values of both."""
        kept = []
        for block, before in zip(self._blocks(), past, strict=True):
            q, k, v = block.project(x)
            k, v = (
                torch.cat([old.expand(len(x), -1, -1, -1), new], dim=-2)
                for old, new in zip(before, (k, v), strict=True)
            )
            kept.append((k, v))
            x = block.text(block.mixed(x, q, k, v, mask=mask))
        return x, kept

    def _logits(self, x: Tensor) -> Tensor:
        assert self.words is not None, "this Q-Former does not write"
        assert self.embedding is not None
        return self.words(x, self.embedding.weight)

    def _embedded(self, tokens: Tensor, *, at: int = 0) -> Tensor:
        assert self.embedding is not None, "this Q-Former has no text side"
        assert self.positions is not None
        return self.dropout(self.norm(self.embedding(tokens) + self.positions[at : at + tokens.shape[1]]))

    def _each(self, seen: Seen) -> Sequence[Tensor | KeysValues | None]:
        return [seen] * len(self.blocks) if isinstance(seen, Tensor) else seen

    @staticmethod
    def _count(seen: Seen) -> int:
        if isinstance(seen, Tensor):
            return len(seen)
        return next(len(known[0]) for known in seen if known is not None)


class Writer:
    """Texts that are being written beside pictures, a row for each, whose keys and values are kept.

    `writer(tokens r n) -> logits r v` of the next token; `select(rows)` keeps these rows in this order, some several
    times.
    """

    def __init__(self, network: Qformer, past: list[KeysValues]):
        self.network, self.past, self.length = network, past, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        n, before = tokens.shape[1], self.past[0][0].shape[-2]
        mask = None
        if n > 1:
            mask = torch.ones(n, before + n, dtype=torch.bool, device=tokens.device).tril(before)
        x = self.network._embedded(tokens, at=self.length)
        x, self.past = self.network._written(x, self.past, mask)
        self.length += n
        return self.network._logits(x[:, -1])

    def select(self, rows: Tensor) -> None:
        self.past = [(k[rows], v[rows]) for k, v in self.past]
