"""Solving dx/dt = velocity(x, t) from noise at t = 1 down to data at t = 0.

`predict(x, t)` gives the velocity of `x b ...` at the scalar time `t`; the first `x` is noise. Nothing here is random:
all randomness is in it. `start` < 1 goes from a signal that was corrupted to that time (SDEdit, 2108.01073).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from reverie.processes.gaussian import shift

Predict = Callable[[Tensor, float], Tensor]
Progress = Callable[[int, int], None]


def times(steps: int, *, factor: float = 1.0, start: float = 1.0) -> list[float]:
    """`steps + 1` times from `start` to 0, evenly spaced before the shift by `factor`."""
    return (start * shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), factor)).tolist()


def euler(
    predict: Predict,
    x: Tensor,
    *,
    steps: int,
    factor: float = 1.0,
    start: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """First order, one evaluation a step; exact where the velocity is constant."""
    line = times(steps, factor=factor, start=start)
    for number, (now, after) in enumerate(pairwise(line), 1):
        x = x + (after - now) * predict(x, now)
        if progress is not None:
            progress(number, steps)
    return x


def heun(
    predict: Predict,
    x: Tensor,
    *,
    steps: int,
    factor: float = 1.0,
    start: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Second order (EDM, 2206.00364, algorithm 1): two evaluations a step, the last step Euler's."""
    line = times(steps, factor=factor, start=start)
    for number, (now, after) in enumerate(pairwise(line), 1):
        slope = predict(x, now)
        euler_x = x + (after - now) * slope
        if after > 0:
            slope = (slope + predict(euler_x, after)) / 2
            euler_x = x + (after - now) * slope
        x = euler_x
        if progress is not None:
            progress(number, steps)
    return x


SAMPLERS = {"euler": euler, "heun": heun}
