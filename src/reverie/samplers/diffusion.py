"""From noise to data in single steps: DDPM, DDIM, Euler, Euler ancestral, Heun.

Every sampler is a function `(predict, x, points, *, generator, progress, ...) -> x` at the last point.

`predict(x, point)` gives the clean signal x0 that a network sees in `x b ...` at a point of the process
(processes/gaussian.py, which converts other predictions). `x` is the signal at the first point: noise times its sigma,
or a signal corrupted to it (SDEdit, 2108.01073). The last point is usually clean (sigma 0), and there x is x0.

In the equations x, alpha, sigma stand at a point and x', alpha', sigma' at the next; noise = (x - alpha x0) / sigma;
r = (alpha sigma') / (alpha' sigma) is below 1, and 0 at the clean end; z is fresh standard normal noise. `generator`
gives z: one for the batch, or a list of one for each item, so that an item does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Generator, Tensor

from reverie.errors import InputError
from reverie.processes.gaussian import Point, noise_from

Predict = Callable[[Tensor, Point], Tensor]
Progress = Callable[[int, int], None]
Generators = Generator | Sequence[Generator]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]


def euler(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = alpha' x0 + sigma' noise.

    First order, nothing random. One step for many names: Euler's along the velocity of a flow, x + (t' - t) velocity;
    Euler's in sigma / alpha (EDM); DDIM's with eta 0.
    """
    return ddim(predict, x, points, progress=progress)


def ddim(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    eta: float = 0.0,
    clip: float | None = None,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = alpha' x0 + sqrt(sigma'^2 - up^2) noise + up z,   up = eta sigma' sqrt(1 - r^2).

    Song et al. 2010.02502, equations 12 and 16. eta 0 is Euler, eta 1 is DDPM with its small variance. `clip` holds x0
    within [-clip, clip], while the noise stays what the network said.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta {eta:g} is more noise than a step has room for: give a number from 0 to 1.")
    for now, after in steps(points, progress):
        x0 = predict(x, now)
        noise = noise_from(x0, x, now)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        up = eta * after.sigma * math.sqrt(1 - _r(now, after) ** 2)
        x = after.alpha * x0 + math.sqrt(after.sigma**2 - up**2) * noise
        if up > 0:
            x = x + up * draw(x, generator)
    return x


def euler_ancestral(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = alpha' (x0 + s_down noise + s_up z),   s = sigma / alpha,   s_up^2 = s'^2 (s^2 - s'^2) / s^2,

    s_down^2 = s'^2 - s_up^2: Euler's step to a lower level, and fresh noise up to the level that is due (k-diffusion).
    With up = alpha' s_up this is DDIM's step with eta 1.
    """
    return ddim(predict, x, points, eta=1.0, generator=generator, progress=progress)


def ddpm(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    variance: Variance = "fixed_small",
    clip: float | None = None,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x' = alpha' x0 + r sigma' noise + sqrt(variance) z: the posterior q(x' | x, x0), no z on the last step.

    fixed_small    sigma'^2 (1 - r^2), the posterior's own (Ho et al. 2006.11239, equations 6 and 7)
    fixed_large    sigma^2 - (alpha / alpha')^2 sigma'^2 = sigma^2 (1 - r^2), beta on neighbouring indices
    learned_range  exp(f ln(large) + (1 - f) ln(small)), f = (v + 1) / 2 of the network's v (Nichol and Dhariwal,
                   2102.09672, equation 15): `predict` then gives x0 and v, one after the other in dim 1
    """
    for now, after in steps(points, progress):
        x0 = predict(x, now)
        x0, v = x0.chunk(2, dim=1) if variance == "learned_range" else (x0, None)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        r = _r(now, after)
        mean = after.alpha * x0 + r * after.sigma * noise_from(x0, x, now)
        small, large = after.sigma**2 * (1 - r**2), now.sigma**2 * (1 - r**2)
        if small == 0:
            x = mean
        elif v is not None:
            log = (v + 1) / 2 * math.log(large) + (1 - v) / 2 * math.log(small)
            x = mean + (0.5 * log).exp() * draw(mean, generator)
        else:
            x = mean + math.sqrt(small if variance == "fixed_small" else large) * draw(mean, generator)
    return x


def heun(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """s = sigma / alpha:  x' / alpha' = x / alpha + (s' - s) (noise + noise') / 2,  noise' seen from Euler's x'.

    Second order, two evaluations a step, the last step Euler's (EDM, 2206.00364, algorithm 1). Every alpha must be
    above 0: for a flow from pure noise take `flow_heun`.
    """
    for now, after in steps(points, progress):
        x0 = predict(x, now)
        noise = noise_from(x0, x, now)
        x_after = after.alpha * x0 + after.sigma * noise
        if after.sigma > 0:
            mean = (noise + noise_from(predict(x_after, after), x_after, after)) / 2
            step = after.sigma / after.alpha - now.sigma / now.alpha
            x_after = after.alpha * (x / now.alpha + step * mean)
        x = x_after
    return x


def flow_heun(
    predict: Predict,
    x: Tensor,
    points: Sequence[Point],
    *,
    generator: Generators | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """alpha = 1 - t, sigma = t:  x' = x + (t' - t) (velocity + velocity') / 2,  velocity' seen from Euler's x'.

    Heun's method along a flow's own time; the last step Euler's.
    """
    for now, after in steps(points, progress):
        x0 = predict(x, now)
        noise = noise_from(x0, x, now)
        x_after = after.alpha * x0 + after.sigma * noise
        if after.sigma > 0:
            x0_after = predict(x_after, after)
            mean = (noise - x0 + noise_from(x0_after, x_after, after) - x0_after) / 2
            x_after = x + (after.sigma - now.sigma) * mean
        x = x_after
    return x


def steps(points: Sequence[Point], progress: Progress | None) -> Iterator[tuple[Point, Point]]:
    """Each point with the next one; `progress` is told after each."""
    for number, pair in enumerate(pairwise(points), 1):
        yield pair
        if progress is not None:
            progress(number, len(points) - 1)


def draw(like: Tensor, generator: Generators | None) -> Tensor:
    """Standard normal noise like a signal `b ...`, from one generator or from one for each item."""
    assert generator is not None, "this sampler draws noise: give it a generator"
    if isinstance(generator, Generator):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    assert len(generator) == len(like), f"{len(generator)} generators for {len(like)} items"
    each = [torch.randn(like.shape[1:], generator=one, dtype=like.dtype) for one in generator]
    return torch.stack(each).to(like.device)


def _r(now: Point, after: Point) -> float:
    """At most 1: a last point on the table's first level may be the point itself."""
    return min(now.alpha * after.sigma / (after.alpha * now.sigma), 1.0)
