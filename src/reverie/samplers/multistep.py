"""From noise to data with the memory of earlier steps: DPM-Solver++ 2M, its SDE form, UniPC.

The contract is that of samplers/diffusion.py. One evaluation a step; x0 is continued as a polynomial of

    lambda = ln(alpha / sigma),   h = lambda' - lambda,

in which the linear part of the process is solved exactly. An alpha of 0 counts as 1e-6 in lambda. At the clean end h is
infinite and the step is x' = x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from reverie.processes.gaussian import Point
from reverie.samplers.diffusion import Generators, Predict, Progress, draw, steps

ALPHA_SMALLEST = 1e-6
FEW = 15  # below so many steps the last one is of first order


def dpmpp_2m(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    order: int = 2,
    solver: Literal["midpoint", "heun"] = "midpoint",
    first_order_last: bool = False,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = (sigma' / sigma) x + alpha' (1 - e^-h) D,   D = x0 + (x0 - x0_before) h / (2 h_before).

    Lu et al. 2211.01095, algorithm 2. The first step is of first order (D = x0), and so is the last one where it ends
    clean, where there are fewer than 15, or if `first_order_last`. `solver` "heun" integrates the line through both x0
    exactly instead: its slope has the weight 1 - (1 - e^-h) / h in place of (1 - e^-h) / 2.
    """
    return _dpmpp(predict, x, points, False, order, solver, first_order_last, None, progress)


def dpmpp_2m_sde(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    order: int = 2,
    solver: Literal["midpoint", "heun"] = "midpoint",
    first_order_last: bool = False,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) z,   D as in `dpmpp_2m`.

    The same solver on the reverse SDE (2211.01095, appendix D).
    """
    return _dpmpp(predict, x, points, True, order, solver, first_order_last, generator, progress)


def _dpmpp(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    sde: bool,
    order: int,
    solver: str,
    first_order_last: bool,
    generator: Generators | None,
    progress: Progress | None,
) -> Tensor:
    before: tuple[Tensor, float] | None = None  # x0 and h of the step before
    last = points[-1]
    for now, after in steps(points, progress):
        x0 = predict(x, now)
        h = max(_lambda(after) - _lambda(now), 0.0)
        span = 2 * h if sde else h
        gain = -math.expm1(-span)
        x_after = after.sigma / now.sigma * (math.exp(-h) if sde else 1.0) * x + after.alpha * gain * x0
        lower = after.sigma == 0 or (after is last and (first_order_last or len(points) - 1 < FEW))
        if order > 1 and before is not None and not lower:
            slope = (x0 - before[0]) * (h / before[1])
            weight = gain / 2 if solver == "midpoint" or h == 0 else 1 - gain / span
            x_after = x_after + after.alpha * weight * slope
        if sde:
            x_after = x_after + after.sigma * math.sqrt(gain) * draw(x, generator)
        x, before = x_after, (x0, h)
    return x


def unipc(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    order: int = 2,
    solver: Literal["bh1", "bh2"] = "bh2",
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = (sigma' / sigma) x + alpha' ((1 - e^-h) x0 - B sum_k rho_k D_k),   D_k = (x0_k - x0) / r_k,

    r_k = (lambda_k - lambda) / h, B = -h (bh1) or e^-h - 1 (bh2), rho such that polynomials are integrated exactly.

    Zhao et al. 2302.04867, equations 3 and 9. The predictor (UniP) sums over the `order` - 1 points before; the x0 that
    the network sees at x' then joins the sum with r = 1, and the same equation is the corrector (UniC), without another
    evaluation. The first and the last steps are of the order that the points on their side allow.
    """
    seen: list[tuple[Point, Tensor]] = []  # the newest first
    begun, used = x, 0
    for index, (now, after) in enumerate(steps(points, progress)):
        x0 = predict(x, now)
        if seen:
            x = _unified(begun, now, seen[:used], solver, x0)
        seen = [(now, x0), *seen][:order]
        begun, used = x, min(order, index + 1, len(points) - 1 - index)
        x = _unified(begun, after, seen[:used], solver)
    return x


def _unified(
    x: Tensor, after: Point, known: list[tuple[Point, Tensor]], solver: str, x0_after: Tensor | None = None
) -> Tensor:
    """UniPC's step from the first of the `known` points to `after`, corrected if x0 there is given."""
    (now, x0), *older = known
    h = _lambda(after) - _lambda(now)
    ratios = [(_lambda(point) - _lambda(now)) / h for point, _ in older]
    slopes = [(earlier - x0) / ratio for (_, earlier), ratio in zip(older, ratios, strict=True)]
    if x0_after is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, x0_after - x0]
    gain = math.expm1(-h)
    scale = -h if solver == "bh1" else gain
    out = after.sigma / now.sigma * x - after.alpha * gain * x0
    for weight, slope in zip(_weights(ratios, -h, scale), slopes, strict=True):
        out = out - after.alpha * scale * weight * slope
    return out


def _weights(ratios: list[float], h: float, scale: float) -> list[float]:
    """rho: sum_k rho_k r_k^(i - 1) = i! phi_(i + 1)(h) h / B for i = 1 ...; one alone is 1/2, as its authors do."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    right, phi, factorial = [], math.expm1(h) / h - 1, 1
    for i in range(1, len(ratios) + 1):
        right.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / h - 1 / factorial
    powers = torch.tensor([[ratio**i for ratio in ratios] for i in range(len(ratios))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()


def _lambda(point: Point) -> float:
    return math.log(max(point.alpha, ALPHA_SMALLEST) / point.sigma) if point.sigma > 0 else math.inf
