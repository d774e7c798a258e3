"""Whether a clip goes on as it began: a thing of the procedural world followed by the exact judge, frame by frame.

A velocity is that of the straight line through the thing's places, in shorter sides of the picture for each frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from reverie.evals.world_judge import judge

ANGLE = 22.5  # degrees: half of what lies between two of the world's directions
FACTOR = 1.5  # the world's fast is 2.4 times its slow, and half of that way is 1.55

Velocity = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What of a motion was kept; nothing, where the thing is not seen to the end."""

    there: bool
    direction: bool
    speed: bool


def velocity(clip: Tensor, *, shape: str, colour: str) -> Velocity | None:
    """Of the thing of this shape and colour in `3 f h w`; None if it is missing from the last frame or most others.

    A thing of the colour alone counts too, since small shapes blur.
    """
    places: list[tuple[int, float, float]] = []
    for number in range(clip.shape[1]):
        alike = [thing for thing in judge(clip[:, number]).things if thing.colour == colour]
        seen = next((thing for thing in alike if thing.shape == shape), alike[0] if len(alike) == 1 else None)
        if seen is not None:
            places.append((number, seen.x, seen.y))
    if len(places) < max(2, clip.shape[1] // 2) or places[-1][0] < clip.shape[1] - 1:
        return None
    at, x, y = np.array(places).T
    return float(np.polyfit(at, x, 1)[0]), float(np.polyfit(at, y, 1)[0])


def kept(given: Velocity, drawn: Velocity | None) -> Kept:
    """Whether what was drawn moves in the direction, and at the speed, of what was given."""
    if drawn is None:
        return Kept(there=False, direction=False, speed=False)
    before, after = math.hypot(*given), math.hypot(*drawn)
    cosine = (given[0] * drawn[0] + given[1] * drawn[1]) / max(before * after, 1e-12)
    return Kept(
        there=True,
        direction=cosine >= math.cos(math.radians(ANGLE)),
        speed=before / FACTOR <= after <= before * FACTOR,
    )


def shares(found: Sequence[Kept]) -> dict[str, list[bool]]:
    """What was kept, by name, and `motion` where both were."""
    return {
        "there": [one.there for one in found],
        "direction": [one.direction for one in found],
        "speed": [one.speed for one in found],
        "motion": [one.direction and one.speed for one in found],
    }
