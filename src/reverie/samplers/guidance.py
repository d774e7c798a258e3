"""Classifier-free guidance (Ho and Salimans, 2207.12598): a wrapper around `predict`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def guided(
    predict: Callable[[Tensor, float], Tensor], weight: float, *, interval: tuple[float, float] = (0.0, 1.0)
) -> Callable[[Tensor, float], Tensor]:
    """v_null + weight (v_text - v_null), both halves in one pass.

    `predict` takes a batch whose first half is conditioned and whose second half is not. Outside `interval` of times
    (Kynkaanniemi et al., 2404.07724) the conditional prediction is used alone. weight 1 is no guidance.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        conditional, unconditional = predict(torch.cat([x, x]), t).chunk(2)
        if not interval[0] <= t <= interval[1]:
            return conditional
        return unconditional + weight * (conditional - unconditional)

    return velocity
