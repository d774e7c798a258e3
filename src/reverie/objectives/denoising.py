"""Regression onto the clean signal, its velocity or its noise, and the bound that a learned variance is trained by."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from reverie.processes.gaussian import CLEAN, Ddpm, Point


def mean_square(error: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Of an error `b c f h w`; `weight` (broadcast over it) leaves out what is given: known frames."""
    square = error.square()
    if weight is None:
        return square.mean()
    weight = weight.expand_as(square)
    return (square * weight).sum() / weight.sum().clamp(min=1)


def velocity_loss(predicted: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of velocities `b c f h w`; `weight` as for `mean_square`."""
    return mean_square(predicted - target, weight=weight)


def min_snr(point: Point, *, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma) / snr with snr = (alpha / sigma)^2: the weight of the noise's squared error (2303.09556, 3.4).

    So no step counts for more than `gamma` in the clean signal's error.
    """
    snr = (point.alpha / point.sigma) ** 2
    return snr.clamp(max=gamma) / snr


def variance_bound(x0: Tensor, x_t: Tensor, predicted: Tensor, v: Tensor, t: Tensor, process: Ddpm) -> Tensor:
    """The variational bound's term at index `t b`, in bits per number, one per item: improved DDPM (2102.09672, 3.1).

    KL(q(x' | x_t, x0) || p(x' | x_t)), and at t = 0 the negative log likelihood of x0, in bins of 2 / 255. p has the
    mean of the posterior at the `predicted` x0, and the variance exp(f ln(large) + (1 - f) ln(small)), f = (v + 1) / 2.
    All but `t` are `b ...`.
    """
    clean, noisy, small, large = (
        rearrange(column.to(x0.device)[t], "b -> b" + " 1" * (x0.ndim - 1))
        for column in _posterior(process).unbind(-1)
    )
    log = (v + 1) / 2 * large + (1 - v) / 2 * small
    mean, truth = clean * predicted + noisy * x_t, clean * x0 + noisy * x_t
    divergence = 0.5 * (log - small + (small - log).exp() + (truth - mean).square() * (-log).exp() - 1)
    likelihood = _binned(x0, mean, (-0.5 * log).exp())
    bits = torch.where(rearrange(t == 0, "b -> b" + " 1" * (x0.ndim - 1)), -likelihood, divergence)
    return bits.flatten(1).mean(1) / math.log(2)


@lru_cache(maxsize=16)
def _posterior(process: Ddpm) -> Tensor:
    """`steps 4`: q(x' | x_t, x0) at each index: the factors of x0 and x_t, the logs of the small and large variance.

    Computed in double precision. The small variance of index 0, which is 0, counts as that of index 1.
    """
    rows = []
    for t in range(process.steps):
        now, after = process.at(t), process.at(t - 1) if t else CLEAN
        r = now.alpha * after.sigma / (after.alpha * now.sigma)
        noisy = r * after.sigma / now.sigma
        rest = 1 - r**2
        rows.append([
            after.alpha - noisy * now.alpha,
            noisy,
            math.log(after.sigma**2 * rest) if t else math.nan,
            math.log(now.sigma**2 * rest),
        ])  # fmt: skip
    rows[0][2] = rows[min(1, len(rows) - 1)][2]
    return torch.tensor(rows, dtype=torch.float64).float()


def _binned(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """ln of what a normal of deviation 1 / inverse gives to the bin of `x`, 2 / 255 wide, open beyond -1 and 1."""

    def below(edge: Tensor) -> Tensor:
        z = (edge - mean) * inverse
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    low, high = below(x - 1 / 255), below(x + 1 / 255)
    inside = torch.where(x < -0.999, high, torch.where(x > 0.999, 1 - low, high - low))
    return inside.clamp(min=1e-12).log()
