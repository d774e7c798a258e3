"""Learning-rate schedules: plain functions of the step to the factor that multiplies the optimizer's `lr`.

Convention: `step` counts from 0, so the first update uses `factor(0)`; warm-up is linear and its first factor
is 1 / (warmup + 1), never 0. Bind the rest with `functools.partial` or a lambda.
"""

from __future__ import annotations

import math


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


def constant(step: int, *, warmup: int = 0) -> float:
    """1 after a linear warm-up of `warmup` steps."""
    return _warm(step, warmup)


def cosine(step: int, *, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 at `warmup` to `floor` at `steps` (arXiv 1608.03983)."""
    if step < warmup:
        return _warm(step, warmup)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def exponential(step: int, *, epoch: float, decay: float, warmup: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up, while from epoch to epoch, of `epoch` steps, the factor falls by `decay`; never below `floor`."""
    return min(_warm(step, warmup), max(decay ** int(step / epoch), floor))
