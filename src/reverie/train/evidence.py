"""Evidence of steps that went wrong: enough of them to be computed again.

A loss far above those before it, or one that is not finite, leaves `evidence/step-00000123` in the run's folder: the
weights that the step began with, as in a checkpoint, and in `state.json` what it computed and from which samples.
Batches and random numbers follow from the step, so `reverie replay RUN` computes it once more, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from reverie.errors import InputError
from reverie.train import checkpoint

WINDOW = 100  # losses that a new one is compared with
FEWEST = 30  # before so many, none is called a spike


def spike(value: float, before: Sequence[float], *, sigmas: float) -> str:
    """How a loss stands out from those before it, in words; "" if it does not, or if they are too few to say."""
    if sigmas <= 0 or len(before) < FEWEST or not math.isfinite(value):
        return ""
    mean, deviation = fmean(before), stdev(before)
    if value <= mean + sigmas * deviation:
        return ""
    far = f"{(value - mean) / deviation:.0f} deviations" if deviation else "above"
    return f"loss {value:.4g} is {far} over the last {len(before)}, {mean:.4g} on the mean"


def exact(values: Sequence[tuple[str, float]]) -> list[list[str]]:
    """Names and numbers such that JSON keeps every bit, and what is not finite."""
    return [[name, float(value).hex()] for name, value in values]


def find(folder: Path, step: int | None) -> list[Path]:
    """The evidence of `step`, by default the newest; of several players, of each. InputError: there is none, or it is
    damaged."""
    there = [path for path in folder.glob("**/step-*") if path.is_dir()]
    if not there:
        raise InputError(f"{folder} holds no evidence: no step of this run has stood out so far.")
    numbers: dict[int, list[Path]] = {}
    for path in sorted(there):
        numbers.setdefault(int(path.name.removeprefix("step-")), []).append(path)
    if step is not None and step not in numbers:
        raise InputError(
            f"There is no evidence of step {step}: there is of {', '.join(map(str, sorted(numbers)))}."
        )
    found = numbers[max(numbers) if step is None else step]
    for path in found:
        if (reason := checkpoint.damage(path)) is not None:
            raise InputError(f"{path} is damaged ({reason}), so the step cannot be computed again from it.")
    return found


def compare(recorded: list[list[str]], found: list[list[str]]) -> tuple[bool, list[str]]:
    """Whether all numbers are the same to the bit, and a line for each."""
    lines = []
    for (name, before), (_, now) in zip(recorded, found, strict=True):
        value = float.fromhex(now)
        how = "the same to the bit" if now == before else f"it was {float.fromhex(before):.9g}"
        lines.append(f"{name} {value:.9g}: {how}")
    return recorded == found, lines


def about(*, reason: str, player: str, step: int, values: list[list[str]], ids: list[Any]) -> dict[str, Any]:
    """What `state.json` tells of the step."""
    return {"reason": reason, "player": player, "step": step, "values": values, "ids": ids}
