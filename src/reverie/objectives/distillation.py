"""Step distillation: what one step of a student must predict to arrive where a teacher's several steps arrive.

Progressive distillation (Salimans and Ho, 2202.00512), from a guided teacher to a student that needs no guidance (Meng
et al., 2210.03142). The convention is that of processes/gaussian.py; Euler's step is samplers/diffusion.py's.
"""

from __future__ import annotations

from torch import Tensor

from reverie.objectives.denoising import mean_square
from reverie.processes.gaussian import Point


def one_step(x: Tensor, x_after: Tensor, now: Point, after: Point) -> Tensor:
    """The x0 by which a single Euler step leads from `x` at `now` to `x_after` at `after`, all `b ...`.

    x' = alpha' x0 + (sigma' / sigma) (x - alpha x0), solved for x0: 2202.00512, appendix G.
    """
    ratio = after.sigma / now.sigma
    return (x_after - ratio * x) / (after.alpha - ratio * now.alpha)


def step_loss(
    predicted: Tensor, x: Tensor, x_after: Tensor, now: Point, after: Point, *, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error of the predicted x0 in units of sigma, which along a flow is that of its velocity.

    `weight` (broadcast over `b c f h w`) leaves out what is given.
    """
    return mean_square((predicted - one_step(x, x_after, now, after)) / now.sigma, weight=weight)
