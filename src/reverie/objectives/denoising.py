"""Regression onto the clean signal or its velocity."""

from __future__ import annotations

from torch import Tensor


def velocity_loss(predicted: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of velocities `b c f h w`; `weight` (broadcast) leaves out what is given: known frames."""
    error = (predicted - target).square()
    if weight is None:
        return error.mean()
    weight = weight.expand_as(error)
    return (error * weight).sum() / weight.sum().clamp(min=1)
