"""Between codes and nothing: how much of a picture is hidden (MaskGIT, Chang et al. 2022, 2202.04200, section 3.1).

Convention: `r` in [0, 1] is how far a picture has come: at 0 everything is hidden, at 1 nothing. `share(r)` of the
codes are hidden; it falls from 1 to 0. Training draws r uniformly, sampling goes through it in steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SHARES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(r * math.pi / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "root": lambda r: 1 - r**0.5,
}


def hidden(order: Tensor, r: Tensor, *, schedule: str = "cosine") -> Tensor:
    """Which of `b n` codes are hidden: of each item the share that its `r b` says, one or more, the lowest in `order`.

    `order b n`: uniform numbers.
    """
    n = order.shape[1]
    counts = [max(1, math.ceil(SHARES[schedule](one) * n)) for one in r.tolist()]
    place = order.argsort(1).argsort(1)
    return place < torch.tensor(counts, device=order.device)[:, None]


def counts(n: int, steps: int, *, schedule: str = "cosine") -> list[int]:
    """How many of `n` hidden codes are still hidden after each step: fewer every time, 0 at the end."""
    left, found = n, []
    for step in range(1, steps + 1):
        left = max(0, min(left - 1, math.floor(SHARES[schedule](step / steps) * n)))
        found.append(0 if step == steps else left)
    return found
