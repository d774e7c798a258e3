"""Rectified flow: straight lines from data to noise (Liu et al. 2209.03003; SD3, 2403.03206, sections 2 and 3).

Convention: t = 0 is data, t = 1 is noise; x_t = (1 - t) x0 + t noise; velocity = dx_t/dt = noise - x0. A network may
predict the velocity or the clean signal x0; `velocity_from` turns the one into the other.
`t` is broadcast over the signal by the caller: `b`, or one time per frame, `b 1 f 1 1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

T_SMALLEST = 0.05  # below it, dividing by t would only magnify the network's error (2511.13720, section 4)


def corrupt(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the line from data to noise."""
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """d x_t / d t, the same at every t."""
    return noise - x0


def velocity_from(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity that a prediction of x0 implies: (x_t - x0) / t, with t kept from zero."""
    return (x_t - x0) / t.clamp(min=T_SMALLEST)


def logit_normal(normal: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times in (0, 1) from standard normal numbers: sigmoid(mean + std n) (SD3, section 3.1)."""
    return torch.sigmoid(mean + std * normal)


def shift(t: Tensor, factor: float) -> Tensor:
    """Move times towards noise by `factor` >= 1, as larger signals need (SD3, equation 23)."""
    return factor * t / (1 + (factor - 1) * t)
