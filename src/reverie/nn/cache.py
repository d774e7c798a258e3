"""What deep blocks add to their tokens, kept from one step of a sampler to the next ones that ask nearly the same.

From step to step features change little, so some are not computed again: TeaCache (2411.19108) reuses what all blocks
together add, and computes it anew once the changes of what enters have added up to a threshold. Here the first block is
always computed, and what leaves it is watched: it knows the time and the text, which what enters does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from reverie.errors import InputError


def through(tokens: Tensor, blocks: Sequence[Callable[[Tensor], Tensor]], cache: Cache | None) -> Tensor:
    """`tokens` through `blocks`, one after the other; with a cache, or nearly so."""
    if cache is not None:
        return cache(tokens, blocks)
    for block in blocks:
        tokens = block(tokens)
    return tokens


def check_threshold(threshold: Any) -> None:
    """InputError: it is no threshold of a cache."""
    if not isinstance(threshold, Real) or not math.isfinite(threshold) or threshold < 0:
        raise InputError(f"cache {threshold!r:.60} is no threshold: give 0 for none, or such as 0.15.")


class Cache:
    """Of one sampling run. `cache(tokens, blocks)` is `tokens` through `blocks`, or nearly so.

    threshold: how much what leaves the first blocks may change in all, as a share of its mean size, before the others
    are computed again. 0 computes always, and is exact. first: how many blocks are always computed.
    """

    def __init__(self, threshold: float, *, first: int = 1):
        assert threshold >= 0
        self.threshold, self.first = threshold, first
        self.before: Tensor | None = None  # what left the first blocks at the last step
        self.added: Tensor | None = None  # what the others added when they were computed last
        self.change = 0.0  # since then
        self.asked = self.computed = 0  # times

    def __call__(self, tokens: Tensor, blocks: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        for block in blocks[: self.first]:
            tokens = block(tokens)
        self.asked += 1
        before, self.before = self.before, tokens
        if self.added is not None and before is not None and before.shape == tokens.shape:
            self.change += float((tokens - before).abs().mean() / before.abs().mean())
            if self.change < self.threshold:
                return tokens + self.added
        self.computed += 1
        out = tokens
        for block in blocks[self.first :]:
            out = block(out)
        self.added, self.change = out - tokens, 0.0
        return out
