"""The stochastic sampler of SiT: "Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers" (2401.08740, section 2.2), on a flow: alpha = 1 - t, sigma = t.

    dx = velocity dt - w(t) score dt + sqrt(2 w(t)) dW,   score = -noise / sigma,   from t = 1 down

has the flow's own distribution at every t, whatever w >= 0 is. Theirs is the other t, 1 at data, in which the same w
are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reverie.processes.gaussian import CLEAN, Flow, Point, noise_from
from reverie.samplers.diffusion import Generators, Predict, Progress, draw, steps

# Table 5 there; the one of score-based models, infinite in pure noise, is left out.
DIFFUSIONS: dict[str, Callable[[Point], float]] = {
    "constant": lambda point: 1.0,
    "sigma": lambda point: point.sigma,
    "decreasing": lambda point: 0.25 * (math.cos(math.pi * (1 - point.t)) + 1) ** 2,
    "increasing-decreasing": lambda point: math.sin(math.pi * (1 - point.t)) ** 2,
}


def stochastic_points(count: int, *, last: float = 0.04) -> tuple[Point, ...]:
    """`count` points of the flow from 1 to `last` in equal steps, then the clean one: that step takes the mean."""
    line = torch.linspace(1, last, count, dtype=torch.float64).tolist()
    return (*map(Flow().at, line), CLEAN)


def euler_maruyama(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    diffusion: Callable[[Point], float] = DIFFUSIONS["sigma"],
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = x - dt (velocity + w noise / sigma) + sqrt(2 w dt) z, without z on the last step.

    `diffusion` is w; 0 is Euler's method along the flow.
    """
    for now, after in steps(points, progress):
        x0 = predict(x, now)
        noise = noise_from(x0, x, now)
        dt, w = now.t - after.t, diffusion(now)
        x = x - dt * (noise - x0 + w / now.sigma * noise)
        if after.sigma > 0:
            x = x + math.sqrt(2 * w * dt) * draw(x, generator)
    return x
