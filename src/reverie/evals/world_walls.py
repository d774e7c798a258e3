"""Walls of the procedural world in pixels, and whether what goes behind one comes out again: the judge's permanence.

A wall is a bar of one colour from edge to edge, there in every frame. It is read off the two edges that it touches and
taken off the frames, its soft rims unmixed; what is left are the things, cut off where the wall
was. A thing that is cut is placed by what is seen of it beside the same thing whole.

Conventions: pixels in [0, 1]; "along" is the axis that the wall does not span; lengths in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reverie.evals.world_regions import Region

LEAST_WIDTH = 0.12  # of the shorter side; the world's narrowest wall has 0.28
ALIKE = 0.2  # of a wall's own pixels from its colour, on average
ASTRAY = 0.05  # of the shorter side: how far from its place a thing may come out
LATE = 0.10  # of the clip: how far from its time


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """One wall over the frames of a clip, and the frames without it."""

    frames: np.ndarray  # f h w 3
    upright: bool
    colour: np.ndarray  # 3
    middle: np.ndarray  # f
    width: np.ndarray  # f

    def along(self, region: Region) -> float:
        return region.x if self.upright else region.y

    def across(self, region: Region) -> float:
        return region.y if self.upright else region.x

    def beyond(self, region: Region) -> bool:
        """Whether it is on the far side of the wall, right of it or below."""
        return bool(self.along(region) > self.middle[region.frame])

    def cuts(self, region: Region) -> bool:
        """Whether the wall touches it, so that it may be hidden in part."""
        inside = np.flatnonzero(region.mask.any(0 if self.upright else 1))
        start = region.left if self.upright else region.top
        low, high = start + inside[0], start + inside[-1] + 1
        reach = self.width[region.frame] / 2 + 1.0
        return bool(high > self.middle[region.frame] - reach and low < self.middle[region.frame] + reach)


def bars(frames: np.ndarray, ground: np.ndarray, noise: float) -> Bars | None:
    """The wall of a clip `f h w 3` before a background of one colour, or None."""
    short = min(frames.shape[1:3])
    for upright in (True, False):
        view = frames if upright else frames.swapaxes(1, 2)
        ends = np.stack([view[:, :2].mean(1), view[:, -2:].mean(1)])  # 2 f w 3
        far = np.sqrt(((ends - ground) ** 2).sum(-1)).min(0)
        runs = [_longest(row) for row in far > max(0.12, 4.5 * noise)]
        if any(not LEAST_WIDTH * short <= stop - start <= 0.8 * view.shape[2] for start, stop in runs):
            continue
        cores = [slice(start + 1, stop - 1) for start, stop in runs]
        colour = np.median(
            np.concatenate([ends[:, f, core].reshape(-1, 3) for f, core in enumerate(cores)]), 0
        )
        own = [np.sqrt(((view[f, :, core] - colour) ** 2).sum(-1)).mean() for f, core in enumerate(cores)]
        if max(own) > ALIKE:
            continue
        axis = colour - ground
        share = np.clip((ends.mean(0) - ground) @ axis / (axis @ axis), 0.0, 1.0)  # f w
        places = np.arange(view.shape[2])
        for row, (start, stop) in zip(share, runs, strict=True):
            row[(places < start - 3) | (places >= stop + 3)] = 0.0
        rest = np.maximum(1.0 - share, 0.4)[:, None, :, None]
        behind = np.clip((view - share[:, None, :, None] * colour) / rest, 0.0, 1.0)
        behind = np.where(share[:, None, :, None] > 0.6, ground, behind).astype(frames.dtype)
        width = share.sum(1)
        return Bars(
            frames=behind if upright else behind.swapaxes(1, 2),
            upright=upright,
            colour=colour,
            middle=share @ (places + 0.5) / width,
            width=width,
        )
    return None


def _longest(mask: np.ndarray) -> tuple[int, int]:
    """Where the longest run of True begins and ends; 0 and 0 without one."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    if not len(edges):
        return 0, 0
    starts, stops = edges[::2], edges[1::2]
    longest = (stops - starts).argmax()
    return int(starts[longest]), int(stops[longest])


@dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
    """What went behind a wall and what came out on its other side: regions in the order of the frames."""

    went: list[Region]
    came: list[Region]
    whole_before: list[Region]
    whole_after: list[Region]


def passage(regions: Sequence[Sequence[Region]], wall: Bars) -> Passage | None:
    """One thing in the first frame, one on the other side in the last, never two, and for a while none; else None."""
    if not regions[0] or not regions[-1] or any(len(row) > 1 for row in regions) or all(regions):
        return None
    seen = [row[0] for row in regions if row]
    side = wall.beyond(seen[0])
    went = [region for region in seen if wall.beyond(region) == side]
    came = [region for region in seen if wall.beyond(region) != side]
    if not came or went[-1].frame > came[0].frame:
        return None
    whole_before = [region for region in went if not wall.cuts(region)]
    whole_after = [region for region in came if not wall.cuts(region)]
    if not whole_before or not whole_after:
        return None
    return Passage(went=went, came=came, whole_before=whole_before, whole_after=whole_after)


def on_course(it: Passage, wall: Bars, frames: int, short: int) -> bool:
    """Whether what came out goes on along the line of what went in, within ASTRAY and LATE, and is seen when due."""
    low = not wall.beyond(it.went[0])  # which end of it was seen last
    before = [(region.frame, _centre(region, it.whole_before[-1], wall, low)) for region in it.went]
    after = [(region.frame, _centre(region, it.whole_after[0], wall, not low)) for region in it.came]
    if len(before) < 2:
        return False
    time, place = np.array(before).T
    speed, start = np.polyfit(time, place, 1)
    far = max(abs(speed), abs(wall.middle[-1] - wall.middle[0]) / (frames - 1)) * (frames - 1)
    reach = ASTRAY * short + LATE * far
    level = np.mean([wall.across(region) for region in it.whole_before])
    if any(abs(at - start - speed * frame) > reach for frame, at in after):
        return False
    if any(abs(wall.across(region) - level) > ASTRAY * short for region in it.whole_after):
        return False
    there = {region.frame for region in (*it.went, *it.came)}
    half = _half(it.whole_before[-1], wall)
    for frame in range(frames):
        away = abs(start + speed * frame - wall.middle[frame]) - wall.width[frame] / 2
        if frame not in there and away > half + reach:  # it should be seen whole
            return False
    return True


def _profile(region: Region, wall: Bars) -> tuple[np.ndarray, int]:
    """How much of a region is at each place along, and the first place."""
    return region.alpha.sum(0 if wall.upright else 1), region.left if wall.upright else region.top


def _half(region: Region, wall: Bars) -> float:
    inside = np.flatnonzero(region.mask.any(0 if wall.upright else 1))
    return (inside[-1] + 1 - inside[0]) / 2


def _quantile(profile: np.ndarray, start: int, level: float, low: bool) -> float:
    """Where, from the low end or the high one, the sum of a profile reaches `level`."""
    line = profile if low else profile[::-1]
    total = np.concatenate([[0.0], np.cumsum(line)])
    at = float(np.interp(level, total, np.arange(len(total))))
    return start + at if low else start + len(profile) - at


def _centre(region: Region, whole: Region, wall: Bars, low: bool) -> float:
    """Its middle along; of a cut one, where the same thing whole would show as much at its free end."""
    if not wall.cuts(region):
        return wall.along(region)
    ours, theirs = _profile(region, wall), _profile(whole, wall)
    level = 0.5 * min(ours[0].sum(), theirs[0].sum())
    return wall.along(whole) + _quantile(*ours, level, low) - _quantile(*theirs, level, low)
