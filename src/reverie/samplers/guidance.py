"""Guidance: wrappers around `predict` that ask it about one signal under several conditions, in one batched pass.

Classifier-free guidance (Ho and Salimans, 2207.12598) and what was built on it. The predict that is wrapped takes `x`
with one or more copies of the batch, one after the other: the first is fully conditioned, each next one knows less, as
in (text and image, image alone, nothing). A negative prompt is a last branch that knows the negative text in place of
nothing. The wrapper asks for the first copy alone where guidance would change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from reverie.errors import InputError
from reverie.processes.gaussian import Point, Prediction, from_x0, to_x0
from reverie.samplers.diffusion import Predict

Weight = float | Callable[[Point], float]


def check_options(interval: Any, rescale: Any) -> None:
    """InputError: `interval` or `rescale` is none that `guided` can follow."""

    def finite(value: Any) -> bool:
        return isinstance(value, Real) and math.isfinite(value)

    if not isinstance(interval, Sequence) or len(interval) != 2 or not all(map(finite, interval)):
        raise InputError(f"interval must be two times, such as (0.2, 0.8), but is {interval!r:.60}.")
    if interval[0] > interval[1]:
        raise InputError(f"interval {tuple(interval)} holds no time: give the lower one first.")
    if not finite(rescale) or not 0 <= rescale <= 1:
        raise InputError(f"rescale {rescale!r:.60} is no share: give a number from 0 to 1.")


def guided(
    predict: Predict,
    *weights: Weight,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    spread_of: Prediction = "x0",
    channels: int | None = None,
) -> Predict:
    """x0 = last + sum_i weight_i (branch_i - branch_(i + 1)): with one weight, null + weight (text - null).

    Since x0, noise, v and velocity are affine in each other at one (x, t), this is guidance of any of them. Weights are
    numbers or functions of the point; 1 is no guidance.

    interval   outside it, counted in sigma / (alpha + sigma) (the t of a flow), the first branch alone (Kynkaanniemi et
               al. 2404.07724)
    rescale    this share of the result is brought back to the first branch's standard deviation per item (Lin et al.
               2305.08891, equations 14 to 16), measured on the prediction `spread_of` (what the network predicts, to
               equal diffusers)
    channels   only the first so many of dim 1 are guided, the rest is the first branch's (3 of 4 in DiT's own sampling)
    """

    def both(x: Tensor, point: Point) -> Tensor:
        now = [weight(point) if callable(weight) else weight for weight in weights]
        inside = interval[0] <= point.sigma / (point.alpha + point.sigma) <= interval[1]
        if not inside or all(weight == 1 for weight in now):
            return predict(x, point)
        first, *others = predict(torch.cat([x] * (len(now) + 1)), point).chunk(len(now) + 1)
        branches = [branch[:, :channels] for branch in (first, *others)]
        out = branches[-1]
        for weight, more, less in zip(now, branches, branches[1:], strict=False):
            out = out + weight * (more - less)
        if rescale:
            out = _rescaled(out, branches[0], x[:, :channels], point, rescale, spread_of)
        return out if channels is None else torch.cat([out, first[:, channels:]], dim=1)

    return both


def power_cosine(weight: float, *, power: float = 4.0, end: float = 1.0) -> Callable[[Point], float]:
    """1 + (weight - 1) (1 - cos(pi (1 - t / end)^power)) / 2: almost none among noise (MDT v2, 2303.14389).

    `end` is t at noise: 1 for a flow, the number of its steps for DDPM.
    """

    def at(point: Point) -> float:
        return 1 + (weight - 1) * (1 - math.cos(math.pi * (1 - point.t / end) ** power)) / 2

    return at


def _rescaled(
    x0: Tensor, conditional: Tensor, x: Tensor, point: Point, share: float, spread_of: Prediction
) -> Tensor:
    guided_out = from_x0(spread_of, x0, x, point)
    dims = tuple(range(1, x.ndim))
    wanted = from_x0(spread_of, conditional, x, point).std(dim=dims, keepdim=True)
    factor = wanted / guided_out.std(dim=dims, keepdim=True)
    return to_x0(spread_of, guided_out * (share * factor + 1 - share), x, point)
