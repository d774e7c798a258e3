"""A sampler with everything that decides its numbers, in plain fields: what a model's folder says of sampling.

`SamplerConfig` spaces its points, and begins on them, as diffusers' scheduler of the same name does, so that a public
pipeline gives the same numbers here (weights/diffusers_scheduler.py reads and writes the files). To sample:

    points = config.points(steps)
    x = config.run(predict, config.first(noise, points), points, generator=generator)

with predict(x, point) = gaussian.to_x0(config.prediction, network(x, point.t), x, point), guided or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reverie.errors import InputError
from reverie.processes import gaussian
from reverie.processes.gaussian import CLEAN, Ddpm, Flow, Point, Prediction, Spacing
from reverie.samplers import diffusion, multistep
from reverie.samplers.diffusion import Generators, Predict, Progress, Variance

Name = Literal["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "ddpm": diffusion.ddpm,
    "ddim": diffusion.ddim,
    "euler": diffusion.euler,
    "euler_ancestral": diffusion.euler_ancestral,
    "heun": diffusion.heun,
    "dpmpp_2m": multistep.dpmpp_2m,
    "dpmpp_2m_sde": multistep.dpmpp_2m_sde,
    "unipc": multistep.unipc,
}
BY_INDEX = ("ddpm", "ddim")  # step between whole indices of a table
BY_SIGMA = ("euler", "euler_ancestral", "heun")  # between sigmas, which may lie between indices
BY_LAMBDA = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
ALMOST_ONE = 1 - 1e-6  # where UniPC begins on a flow, since its lambda at 1 is infinite


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    process: Ddpm | Flow = Ddpm()
    prediction: Prediction = "noise"
    sampler: Name = "ddim"
    # Points of a Ddpm table
    spacing: Spacing = "leading"
    offset: int = 0  # leading's indices are moved up by it
    sigmas: Literal["table", "karras", "exponential"] = "table"
    last: Literal["clean", "first"] = "clean"  # the last point: sigma 0, or the table's first level
    # Points of a Flow
    times: int = 1000  # that it was trained at: points lie between 1 and 1 / times, and t counts in 1 / times
    # The shift by tokens: few, many, and at these low, high: logarithms of factors (gaussian.shift_flux), or factors.
    tokens: tuple[float, float, float, float] | None = None
    tokens_log: bool = True
    # Steps
    order: int = 2  # dpmpp_2m: 1, 2; unipc: 1, 2, 3
    solver: Literal["midpoint", "heun", "bh1", "bh2"] = "midpoint"
    first_order_last: bool = False  # dpmpp_2m
    variance: Variance = "fixed_small"  # ddpm
    clip: float | None = None  # ddpm, ddim: x0 is held within [-clip, clip]

    def __post_init__(self) -> None:
        if isinstance(self.process, Flow) and self.sampler in BY_INDEX:
            raise InputError(f"the sampler {self.sampler} needs a table of indices: a flow has none.")
        if not 1 <= self.order <= (3 if self.sampler == "unipc" else 2):
            raise InputError(f"the sampler {self.sampler} has no order {self.order}.")
        if self.sampler in BY_LAMBDA and (self.solver in ("bh1", "bh2")) != (self.sampler == "unipc"):
            raise InputError(f"the sampler {self.sampler} has no solver {self.solver!r}.")
        if self.sampler == "unipc" and self.last == "first" and self.sigmas != "table":
            raise InputError(
                f"unipc cannot end on the table's first level where {self.sigmas} sigmas do already."
            )

    def points(self, steps: int, *, tokens: int | None = None) -> tuple[Point, ...]:
        """`steps + 1` points. `tokens` of the signal are needed where the shift depends on them."""
        if isinstance(self.process, Flow):
            return self._flow(steps, self._shift(tokens))
        return (*self._table(self.process, steps), self._end(self.process))

    def first(self, noise: Tensor, points: Sequence[Point]) -> Tensor:
        """x at the first point, of pure noise."""
        by_sigma = self.sampler in BY_SIGMA and isinstance(self.process, Ddpm)
        return noise * points[0].sigma if by_sigma and self.spacing != "leading" else noise

    def run(
        self,
        predict: Predict,
        x: Tensor,
        points: Sequence[Point],
        *,
        generator: Generators | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Tensor:
        """The sampler from the first point to the last; `options` are its own, such as DDIM's eta."""
        if self.sampler == "ddpm":
            options |= {"variance": self.variance}
        if self.sampler in BY_INDEX:
            options |= {"clip": self.clip}
        if self.sampler in BY_LAMBDA:
            options |= {"order": self.order, "solver": self.solver}
        if self.sampler in ("dpmpp_2m", "dpmpp_2m_sde"):
            options |= {"first_order_last": self.first_order_last}
        flow_heun = self.sampler == "heun" and isinstance(self.process, Flow)
        function = diffusion.flow_heun if flow_heun else FUNCTIONS[self.sampler]
        return function(predict, x, points, generator=generator, progress=progress, **options)

    def _table(self, process: Ddpm, steps: int) -> list[Point]:
        whole = self.sampler not in BY_SIGMA
        beyond = self.sampler in BY_LAMBDA
        line = process.indices(steps, spacing=self.spacing, offset=self.offset, beyond=beyond, whole=whole)
        if self.sigmas == "table":
            return [process.at(t) if self.sampler in BY_INDEX else process.finite(t) for t in line]
        ends = (line[-1], line[0]) if self.sampler in BY_SIGMA else (0.0, process.steps - 1.0)
        low, high = (point.sigma / point.alpha for point in map(process.finite, ends))
        spaced = gaussian.karras if self.sigmas == "karras" else gaussian.exponential
        found = [process.of_ratio(ratio) for ratio in spaced(steps, low=low, high=high)]
        if self.sampler in BY_SIGMA:
            return found
        return [point._replace(t=float(round(point.t))) for point in found]

    def _end(self, process: Ddpm) -> Point:
        return CLEAN if self.last == "clean" else process.at(0)

    def _flow(self, steps: int, factor: float) -> tuple[Point, ...]:
        """Evenly from 1 to `least`, shifted, then 0; the multistep solvers leave out the end of their line."""
        if steps < 1:
            raise InputError(f"{steps} steps cannot be taken: give 1 or more.")
        few = 1 / self.times
        if self.sampler in BY_SIGMA:
            least = few if self.tokens else gaussian.shift(few, factor)  # diffusers shifts its end twice
            line = [1 + i * ((least - 1) / max(steps - 1, 1)) for i in range(steps)]
        else:
            line = [1 + i * ((few - 1) / steps) for i in range(steps + 1)]
            line = line[:-1] if self.sampler == "unipc" else [1 - t for t in reversed(line)][:-1]
        sigmas = gaussian.shift(torch.tensor(line, dtype=torch.float64), factor)
        if self.sampler == "unipc":
            sigmas = sigmas.clamp(max=ALMOST_ONE)
        told = (sigmas * self.times).floor() / self.times if self.sampler in BY_LAMBDA else sigmas
        held = sigmas.float().tolist()  # diffusers holds them so, and near 1 it decides alpha
        return (*(Point(t, 1 - sigma, sigma) for t, sigma in zip(told.tolist(), held, strict=True)), CLEAN)

    def _shift(self, tokens: int | None) -> float:
        assert isinstance(self.process, Flow)
        if self.tokens is None:
            return self.process.shift
        if tokens is None:
            raise InputError("the shift of these times depends on the signal: say how many tokens it has.")
        few, many, low, high = self.tokens
        factor = gaussian.shift_flux(tokens, few=few, many=many, low=low, high=high)
        return factor if self.tokens_log else low + (high - low) * (tokens - few) / (many - few)
