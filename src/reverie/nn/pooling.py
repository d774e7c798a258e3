"""Attention whose queries are not its positions: a few queries gather from many features."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from reverie.nn.attention import attend


class QueryAttention(nn.Module):
    """Queries `b k d` gather from features `b n d` -> `b k out`, with projections of their own for each part."""

    def __init__(self, width: int, heads: int, *, out: int | None = None):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, out or width)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        q, k, v = (
            rearrange(part, "b n (heads d) -> b heads n d", heads=self.heads)
            for part in (self.q(queries), self.k(features), self.v(features))
        )
        return self.out(rearrange(attend(q, k, v), "b heads n d -> b n (heads d)"))
