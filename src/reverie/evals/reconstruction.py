"""What a codec keeps of pictures and clips: PSNR, SSIM, how truly things move, and at what rate.

    psnr      decibels of 255^2 / mean squared error, frame by frame           twice the error: 6 dB less
    ssim      structural similarity (Wang et al. 2004)                         1 the same, 0 nothing in common
    motion    psnr of the differences between neighbouring frames              flicker and lost motion both cost
    movement  how much neighbouring frames differ, beside the original's       below 1: motion is lost, above: flicker
    rate      numbers kept and bits for a pixel                                raw: 3 numbers, 24 bits

Signals are `n 3 h w` or `n 3 f h w` in [-1, 1], whose range of 2 is what 255 is to bytes. The evaluator is given a
function, `reconstruct(signals) -> (drawn, latents)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from reverie.errors import InputError
from reverie.evals.interval import bootstrap

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]

PEAK = 2.0  # from -1 to 1
BEST = 100.0  # decibels of what is the same
WINDOW, SIGMA = 11, 1.5  # of SSIM
RAW = 24  # bits of a pixel, 8 for each colour


def psnr(drawn: Tensor, true: Tensor) -> Tensor:
    """Decibels of each item, `n`: the mean over its frames, at most 100 each."""
    return _decibels((drawn - true).double().square())


def motion_psnr(drawn: Tensor, true: Tensor) -> Tensor:
    """`psnr` of the differences between neighbouring frames of clips `n 3 f h w` with two frames or more, `n`."""
    return _decibels((drawn.diff(dim=2) - true.diff(dim=2)).double().square())


def movement(clips: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring frames, `n`, in levels of 0 to 255."""
    return reduce(clips.diff(dim=2).double().abs(), "n c f h w -> n", "mean") * 255 / PEAK


def _decibels(error: Tensor) -> Tensor:
    """Squared errors `n 3 [f] h w` -> `n`."""
    by_frame = reduce(_video(error), "n c f h w -> n f", "mean")
    return (10 * (PEAK**2 / by_frame).log10()).clamp(max=BEST).mean(dim=1)


def ssim(drawn: Tensor, true: Tensor) -> Tensor:
    """Structural similarity of each item, `n`: the mean over places, colours and frames.

    Wang, Bovik, Sheikh and Simoncelli 2004, section III-C: a Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01,
    K2 = 0.03, at the places where the window lies within the picture. InputError: pictures smaller than the window.
    """
    if min(true.shape[-2:]) < WINDOW:
        raise InputError(
            f"pictures are {true.shape[-2]} x {true.shape[-1]}: SSIM needs {WINDOW} pixels a side or more."
        )
    n = len(true)
    a, b = (
        rearrange(_video(x).double() + 1, "n c f h w -> (n f c) 1 h w") for x in (drawn, true)
    )  # black is 0
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    alike = alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return reduce(alike, "(n rest) 1 h w -> n", "mean", n=n)


def _blur(x: Tensor) -> Tensor:
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    bell = (-(at**2) / (2 * SIGMA**2)).exp()
    bell = bell / bell.sum()
    return F.conv2d(F.conv2d(x, bell[None, None, :, None]), bell[None, None, None, :])


def _video(x: Tensor) -> Tensor:
    return x if x.ndim == 5 else x[:, :, None]


@torch.no_grad()
def measure(
    batches: Iterable[Tensor], reconstruct: Reconstruct, *, bits: float = 16,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every signal through `reconstruct`; latents count `bits` for a number.

    Returns JSON-ready `psnr`, `ssim`, and for clips `motion_psnr`, each with its `mean`, 95 % bootstrap `interval` over
    items and `values`; for clips `movement`, of the drawn beside the original (None where nothing moves); and the
    `rate`: `numbers` and `bits` for a pixel of a frame, and how many times `smaller` than raw bytes. `progress` is told
    how many are done. InputError: there are none, or what was drawn is not finite.
    """
    found: dict[str, list[Tensor]] = {}
    pixels = numbers = done = 0
    moved = {"drawn": 0.0, "true": 0.0}
    for true in batches:
        drawn, latents = reconstruct(true)
        assert drawn.shape == true.shape, (drawn.shape, true.shape)
        if not drawn.isfinite().all():
            raise InputError(
                f"signals {done} to {done + len(true) - 1} come back not finite: the codec is broken."
            )
        drawn = drawn.clamp(-1, 1)
        measures = {"psnr": psnr, "ssim": ssim}
        if true.ndim == 5 and true.shape[2] > 1:
            measures["motion_psnr"] = motion_psnr
            moved["drawn"] += movement(drawn).sum().item()
            moved["true"] += movement(true).sum().item()
        for name, function in measures.items():
            found.setdefault(name, []).append(function(drawn, true))
        pixels += true.numel() // true.shape[1]
        numbers += latents.numel()
        done += len(true)
        if progress:
            progress(done)
    if not done:
        raise InputError("there is nothing to measure on.")
    result: dict[str, Any] = {}
    for name, parts in found.items():
        values = torch.cat(parts)
        result[name] = {
            "mean": values.mean().item(),
            "interval": bootstrap(values),
            "values": values.tolist(),
        }
    if "motion_psnr" in found:
        result["movement"] = moved["drawn"] / moved["true"] if moved["true"] else None
    result["rate"] = rate(numbers / pixels, bits=bits)
    return result | {"count": done}


def rate(numbers: float, *, bits: float = 16) -> dict[str, float]:
    """Of `numbers` kept for a pixel: `numbers`, `bits`, and how many times `smaller` than 8 bits for each colour."""
    return {"numbers": numbers, "bits": bits * numbers, "smaller": RAW / (bits * numbers)}


def reduced(signals: Tensor, numbers: float) -> Tensor:
    """What is left of signals that are made small until they have `numbers` for a pixel, and enlarged again.

    The yardstick: any codec should keep more in as many numbers. Frames are averaged over areas, and enlarged
    bicubically.
    """
    shrink = math.sqrt(numbers / 3)
    frames = rearrange(_video(signals), "n c f h w -> (n f) c h w")
    box = [max(round(side * shrink), 1) for side in frames.shape[-2:]]
    small = F.interpolate(frames, size=box, mode="area")
    large = F.interpolate(small, size=frames.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)
    return rearrange(large, "(n f) c h w -> n c f h w", n=len(signals)).reshape(signals.shape)
