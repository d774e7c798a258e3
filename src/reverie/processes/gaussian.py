"""Gaussian processes between data and noise: rectified flow, DDPM, EDM.

Convention, the only one: x_t = alpha x0 + sigma noise. A `Point` of a process is (t, alpha, sigma), where `t` is what
the network is told:

    Flow   alpha = 1 - t      sigma = t        t in [0, 1], 0 data, 1 noise    (Liu et al. 2209.03003; SD3, 2403.03206)
    Ddpm   alpha^2 = prod (1 - beta)           t = 0 ... steps - 1, an index   (Ho et al. 2006.11239)
           alpha^2 + sigma^2 = 1
    Edm    alpha = 1          sigma            t = ln(sigma) / 4               (Karras et al. 2206.00364)

A network may predict any of four things, of which two hold the same knowledge once x_t is known:

    x0         the clean signal
    noise      what was added                                  x0 = (x_t - sigma noise) / alpha
    v          alpha noise - sigma x0      (2202.00512)        x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)
    velocity   noise - x0 = dx_t/dt of a flow                  x0 = (x_t - sigma velocity) / (alpha + sigma)

alpha and sigma are numbers while sampling and tensors while training, broadcast over the signal by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from reverie.errors import InputError

T_SMALLEST = 0.05  # below it, dividing by t would only magnify the network's error (2511.13720, section 4)

Prediction = Literal["x0", "noise", "v", "velocity"]
Spacing = Literal["leading", "trailing", "linspace", "respaced"]


class Point(NamedTuple):
    """A moment of a process: x_t = alpha x0 + sigma noise, and `t`, what the network is told of it."""

    t: Any  # float, or a tensor that broadcasts over the signal; so are alpha and sigma
    alpha: Any
    sigma: Any


CLEAN = Point(0.0, 1.0, 0.0)


def corrupt(x0: Tensor, noise: Tensor, point: Point) -> Tensor:
    """x_t = alpha x0 + sigma noise."""
    return point.alpha * x0 + point.sigma * noise


# What a network predicts -------------------------------------------------------------------------------------------


def target(prediction: Prediction, x0: Tensor, noise: Tensor, point: Point) -> Tensor:
    """What a network with this prediction should say of x_t = alpha x0 + sigma noise."""
    if prediction == "x0":
        return x0
    if prediction == "noise":
        return noise
    if prediction == "v":
        return point.alpha * noise - point.sigma * x0
    assert prediction == "velocity", prediction
    return noise - x0


def to_x0(prediction: Prediction, out: Tensor, x_t: Tensor, point: Point) -> Tensor:
    """The clean signal that a network's prediction `out` implies, at alpha > 0 if it is the noise."""
    _, alpha, sigma = point
    if prediction == "x0":
        return out
    if prediction == "noise":
        return (x_t - sigma * out) / alpha
    if prediction == "v":
        return (alpha * x_t - sigma * out) / (alpha**2 + sigma**2)
    assert prediction == "velocity", prediction
    return (x_t - sigma * out) / (alpha + sigma)


def noise_from(x0: Tensor, x_t: Tensor, point: Point) -> Tensor:
    """The noise that a prediction of x0 implies: (x_t - alpha x0) / sigma, at sigma > 0."""
    return (x_t - point.alpha * x0) / point.sigma


def from_x0(prediction: Prediction, x0: Tensor, x_t: Tensor, point: Point) -> Tensor:
    """The prediction that means the clean signal `x0`, at sigma > 0; undoes `to_x0`."""
    return target(prediction, x0, noise_from(x0, x_t, point), point)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """d x_t / d t of a flow, the same at every t."""
    return noise - x0


def velocity_from(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity that a prediction of x0 implies on a flow: (x_t - x0) / t, with t kept from zero."""
    return (x_t - x0) / t.clamp(min=T_SMALLEST)


# Rectified flow ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Straight lines from data to noise: alpha = 1 - t, sigma = t."""

    kind: Literal["flow"] = "flow"
    shift: float = 1.0  # of the times of `points`, towards noise

    def at(self, t: Any) -> Point:
        """The point at time(s) `t`."""
        return Point(t, 1 - t, t)

    def points(self, steps: int, *, start: float = 1.0) -> tuple[Point, ...]:
        """`steps + 1` points from `start` to 0, evenly spaced before the shift."""
        even = torch.linspace(1, 0, _counted(steps) + 1, dtype=torch.float64)
        return tuple(map(self.at, (start * shift(even, self.shift)).tolist()))


def shift(t: Any, factor: float) -> Any:
    """factor t / (1 + (factor - 1) t): towards noise by `factor` >= 1, as larger signals need (SD3, equation 23)."""
    return factor * t / (1 + (factor - 1) * t)


def shift_sd3(tokens: float, *, trained: float) -> float:
    """The factor sqrt(m / n) for m tokens where n were `trained` on (SD3, section 5.3.2)."""
    return math.sqrt(tokens / trained)


def shift_flux(
    tokens: float, *, few: float = 256, many: float = 4096, low: float = 0.5, high: float = 1.15
) -> float:
    """FLUX's factor e^mu, mu linear from `low` at `few` tokens to `high` at `many`: t -> e^mu / (e^mu + 1 / t - 1)."""
    return math.exp(low + (high - low) * (tokens - few) / (many - few))


def shift_open_sora(tokens: float, *, frames: int = 1) -> float:
    """Open-Sora 2.0's factor: 1 to 3 over 256 to 4,096 tokens of a frame, times the root of the latent frames."""
    return (1 + 2 * (tokens - 256) / (4096 - 256)) * math.sqrt(frames)


def logit_normal(normal: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times in (0, 1) from standard normal numbers: sigmoid(mean + std n) (SD3, section 3.1)."""
    return torch.sigmoid(mean + std * normal)


# DDPM --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ddpm:
    """A table of `steps` noise levels: alpha^2 = the product of 1 - beta up to the index, sigma^2 = 1 - alpha^2.

    Over the indices beta is "linear", or "scaled_linear" (its root is linear, as in Stable Diffusion), or such that
    alpha^2 falls as a "cosine" (Nichol and Dhariwal, 2102.09672; beta_start and beta_end count for nothing). `zero_snr`
    moves the table so that the last level is noise alone (Lin et al. 2305.08891, algorithm 1).
    """

    kind: Literal["ddpm"] = "ddpm"
    steps: int = 1000
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(
                f"{self.steps} steps with betas from {self.beta_start:g} to {self.beta_end:g} make no process: give 1"
                " step or more, and betas that grow between 0 and 1."
            )

    def at(self, t: Any) -> Point:
        """The point at index `t`: a tensor, or a number, which may lie between two (interpolating sigma / alpha)."""
        if isinstance(t, Tensor):
            squares = _alpha_squared(self).to(t.device)[t.long()]
            return Point(t, squares.sqrt().float(), (1 - squares).sqrt().float())
        if t % 1:
            return self.finite(t)
        square = _alpha_squared(self)[int(t)].item()
        return Point(float(t), math.sqrt(square), math.sqrt(1 - square))

    def finite(self, t: float) -> Point:
        """`at` for solvers that divide by alpha: where it would be 0, alpha^2 counts as 2^-24 or less."""
        low, part = divmod(t, 1)
        below, above = _ratios(self)[[int(low), min(int(low) + 1, self.steps - 1)]].tolist()
        return _of_ratio((1 - part) * below + part * above, float(t))

    def points(
        self, steps: int, *, spacing: Spacing = "leading", offset: int = 0, beyond: bool = False
    ) -> tuple[Point, ...]:
        """`steps` indices of the table from noise down, and the clean point (Lin et al. 2305.08891, table 2).

        leading    0, k, 2k ... with k = table // steps, all moved up by `offset` (DDIM; with 0, diffusers' DiTPipeline)
        trailing   table - 1, and down in equal steps that would end at -1
        linspace   from table - 1 to 0 in equal steps, rounded
        respaced   the same in the code of improved DDPM and DiT: steps are added up, and an index half way between two
                   may round to the other side

        `beyond` makes leading and linspace `steps + 1` indices long and leaves out the last, as multistep solvers do.
        """
        return (
            *(self.at(t) for t in self.indices(steps, spacing=spacing, offset=offset, beyond=beyond)),
            CLEAN,
        )

    def indices(
        self,
        steps: int,
        *,
        spacing: Spacing = "leading",
        offset: int = 0,
        beyond: bool = False,
        whole: bool = True,
    ) -> list[float]:
        """The indices of `points`, not rounded for linspace if not `whole`."""
        total, count = self.steps, _counted(steps) + (1 if beyond else 0)
        if count > total:
            raise InputError(f"{steps} steps cannot be taken in a process of {total}: ask for fewer.")
        if spacing == "leading":
            down = [float(i * (total // count) + offset) for i in reversed(range(count))]
        elif spacing in ("linspace", "respaced"):
            step = (total - 1) / max(count - 1, 1)
            added = list(accumulate([step] * (count - 1), initial=0.0))
            line = added if spacing == "respaced" else [i * step for i in range(count)]
            down = [float(round(t)) if whole else t for t in reversed(line)]
        else:
            assert spacing == "trailing", spacing
            step = total - (total - total / steps)  # rounded as numpy's arange does
            return [round(total - i * step) - 1.0 for i in range(steps)]
        if down[0] > total - 1:
            raise InputError(
                f"an offset of {offset} moves {steps} steps out of the table of {total}: lower it."
            )
        return down[:steps]

    def of_ratio(self, ratio: float) -> Point:
        """The point with sigma / alpha = `ratio`, its index interpolated on the logarithm and kept within the table."""
        logs = _ratios(self).log()
        high = int(torch.searchsorted(logs, math.log(ratio)).clamp(1, self.steps - 1))
        below, above = logs[high - 1].item(), logs[high].item()
        part = (math.log(ratio) - below) / (above - below)
        return _of_ratio(ratio, high - 1 + min(max(part, 0.0), 1.0))


@lru_cache(maxsize=16)
def _alpha_squared(process: Ddpm) -> Tensor:
    """alpha^2 at every index, float64."""
    start, end, steps = process.beta_start, process.beta_end, process.steps
    if process.betas == "linear":
        beta = torch.linspace(start, end, steps, dtype=torch.float64)
    elif process.betas == "scaled_linear":
        beta = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    else:
        assert process.betas == "cosine", process.betas
        edges = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
        square = (edges * (math.pi / 2)).cos() ** 2
        beta = (1 - square[1:] / square[:-1]).clamp(max=0.999)
    product = (1 - beta).cumprod(0)
    if not process.zero_snr:
        return product
    root = product.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@lru_cache(maxsize=16)
def _ratios(process: Ddpm) -> Tensor:
    """sigma / alpha at every index, finite."""
    square = _alpha_squared(process).clone()
    if square[-1] == 0:
        square[-1] = (square[-2] / 2).clamp(max=2.0**-24)
    return (1 / square - 1).sqrt()


def _of_ratio(ratio: float, t: float) -> Point:
    alpha = 1 / math.sqrt(ratio**2 + 1)
    return Point(t, alpha, ratio * alpha)


# EDM ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Edm:
    """x = x0 + sigma noise; a raw network F between known scalings (EDM, table 1):

    x0 = c_skip x + c_out F(c_in x, c_noise),   with s = sigma_data:
    c_skip = s^2 / (sigma^2 + s^2)     c_out = sigma s / sqrt(sigma^2 + s^2)
    c_in   = 1 / sqrt(sigma^2 + s^2)   c_noise = ln(sigma) / 4
    """

    kind: Literal["edm"] = "edm"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    log_mean: float = -1.2  # of ln(sigma) in training
    log_std: float = 1.2

    def at(self, sigma: Any) -> Point:
        """The point with this sigma, a number or a tensor."""
        log = sigma.log() if isinstance(sigma, Tensor) else math.log(sigma)
        return Point(log / 4, torch.ones_like(sigma) if isinstance(sigma, Tensor) else 1.0, sigma)

    def points(self, steps: int) -> tuple[Point, ...]:
        """Karras's sigmas, and the clean point."""
        return (*map(self.at, karras(steps, low=self.sigma_min, high=self.sigma_max, rho=self.rho)), CLEAN)

    def scaled(self, x_t: Tensor, point: Point) -> Tensor:
        """What the network sees: c_in x_t."""
        return x_t / (point.sigma**2 + self.sigma_data**2) ** 0.5

    def x0(self, out: Tensor, x_t: Tensor, point: Point) -> Tensor:
        """What the network's output means: c_skip x_t + c_out out."""
        total = point.sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total * x_t + point.sigma * self.sigma_data / total**0.5 * out

    def out(self, x0: Tensor, x_t: Tensor, point: Point) -> Tensor:
        """What the network should say, (x0 - c_skip x_t) / c_out: its squared error is EDM's weighted loss."""
        total = point.sigma**2 + self.sigma_data**2
        return (x0 - self.sigma_data**2 / total * x_t) * total**0.5 / (point.sigma * self.sigma_data)

    def draw(self, normal: Tensor) -> Tensor:
        """Training's sigmas from standard normal numbers: ln(sigma) ~ N(log_mean, log_std^2)."""
        return torch.exp(self.log_mean + self.log_std * normal)


def karras(steps: int, *, low: float, high: float, rho: float = 7.0) -> list[float]:
    """`steps` sigmas from `high` to `low`, evenly spaced in sigma^(1 / rho) (EDM, equation 5)."""
    even = torch.linspace(0, 1, _counted(steps), dtype=torch.float64)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return ((first + even * (last - first)) ** rho).tolist()


def exponential(steps: int, *, low: float, high: float) -> list[float]:
    """`steps` sigmas from `high` to `low`, evenly spaced in their logarithm."""
    return torch.linspace(math.log(high), math.log(low), _counted(steps), dtype=torch.float64).exp().tolist()


def _counted(steps: int) -> int:
    if steps < 1:
        raise InputError(f"{steps} steps cannot be taken: give 1 or more.")
    return steps
