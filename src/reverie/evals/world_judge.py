"""The exact judge of the procedural world: reads a scene back from pixels alone, without any model.

The background is the colour of the border; things are connected regions that differ from it. A region's shape is the
nearest of rendered templates at its own resolution and all angles, its colour and texture the nearest line between
two tones of one colour, its size its area, its motion the path, turn, birth and end of its track over the frames.

Conventions as in `reverie.scene`: lengths in units of the shorter side, time from first to last frame. What it can
read and how it falls under noise and blur is measured in docs/world.md (`python benchmarks/world_judge.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from reverie.errors import InputError
from reverie.evals.world_regions import Region, erode, find, heart, smooth
from reverie.evals.world_walls import Bars, bars, on_course, passage
from reverie.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SYMMETRY,
    TEXTURED_COLOURS,
    TEXTURED_SHAPES,
    Description,
    Mention,
    Motion,
    Scene,
    area,
    distance,
    relate,
)

if TYPE_CHECKING:
    import torch

LEAST_RIM = 2  # pixels of the picture's edge that a thing covers where it is cut off
LEAST_OVERLAP = 0.72  # intersection over union with the best template below which a region has no shape


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One thing as read from pixels, at its first frame. `shape` is None where no shape of the world fits.

    `inside` is the number of the thing that surrounds this one; `motion` is None for a single image, and `cut` False
    for a clip. `cut`: it reaches the picture's edge, which whole things of the world never do: it is cut off there.
    """

    shape: str | None
    colour: str
    size: str
    texture: str
    x: float
    y: float
    r: float
    inside: int | None = None
    motion: Motion | None = None
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class SeenWall:
    """A bar from edge to edge, in every frame of a clip, as read from pixels.

    `kept`: one thing went behind it whole (or it passed before one), and the same thing, in shape and colour, came out
    on the other side, where and about when its motion until then demands, and was seen whenever it should be.
    """

    colour: str
    motion: Motion
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a picture or clip shows."""

    background: str
    things: tuple[Seen, ...]
    frames: int
    wall: SeenWall | None = None

    def relation(self, a: int, b: int) -> str:
        """How thing a lies to thing b: left of, right of, above, below, inside or around."""
        if self.things[a].inside == b:
            return "inside"
        if self.things[b].inside == a:
            return "around"
        one, other = self.things[a], self.things[b]
        return relate((one.x, one.y), (other.x, other.y))


def judge(pixels: torch.Tensor | np.ndarray) -> Reading:
    """Reads one picture or clip: float in [-1, 1] `3 h w` or `3 f h w`, or uint8 `h w 3` or `f h w 3`.

    Motion needs the whole event: clips of 8 frames or more, so that turns and bounces do not alias.
    """
    frames = _frames(pixels)
    short = min(frames.shape[1:3])
    border = np.concatenate([frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3),
                             frames[:, :, :2].reshape(-1, 3), frames[:, :, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(border, axis=0)
    noise = float(1.4826 * np.median(np.abs(border - ground)))
    for _ in range(0 if noise < 0.02 else 1 if noise < 0.06 else 2):
        frames = smooth(frames)
    noise *= 1.0 if noise < 0.02 else 0.38 if noise < 0.06 else 0.27
    background = min(BACKGROUNDS, key=lambda name: math.dist(ground, np.divide(BACKGROUNDS[name], 255)))
    wall = bars(frames, ground, noise) if len(frames) > 1 else None
    if wall is not None:
        return _behind(wall, ground, noise, background)
    regions = find(frames, ground, noise, short)
    blur = _blur([region for row in regions for region in row])
    if len(frames) == 1:
        seen = [
            replace(_see([region], blur, short), cut=region.rim(*frames.shape[1:3]) >= LEAST_RIM)
            for region in regions[0]
        ]
        return Reading(background=background, things=_insides(seen, regions[0], short), frames=1)
    things = _followed(regions, blur, len(frames), short)
    return Reading(background=background, things=things, frames=len(frames))


def _followed(regions: list[list[Region]], blur: int, frames: int, short: int) -> tuple[Seen, ...]:
    """The things of a clip from the regions of its frames."""
    seen, firsts = [], []
    for track, motion_kind in _tracks(regions, short):
        clear = track[:: max(1, (len(track) - 1) // 2)][:3]
        thing = _see(clear, blur, short)
        seen.append(replace(thing, motion=_motion(track, thing, motion_kind, frames, short)))
        firsts.append(track[0])
    return _insides(seen, firsts, short)


def _frames(pixels: torch.Tensor | np.ndarray) -> np.ndarray:
    """float32 `f h w 3` in [0, 1]."""
    array = np.asarray(pixels.detach().cpu() if hasattr(pixels, "detach") else pixels)
    if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-1] == 3:
        frames = array.astype(np.float32) / 255
    elif array.dtype.kind == "f" and array.ndim in (3, 4) and array.shape[0] == 3:
        frames = np.moveaxis(array.astype(np.float32), 0, -1).clip(-1, 1) / 2 + 0.5
    else:
        raise InputError(
            f"cannot judge {array.dtype} of shape {tuple(array.shape)}: "
            "give float in [-1, 1] as 3 h w or 3 f h w, or uint8 as h w 3 or f h w 3."
        )
    if not np.isfinite(frames).all():
        raise InputError("cannot judge pixels that are not finite: the picture holds nan.")
    return frames[None] if frames.ndim == 3 else frames


# ----------------------------------------------------------------------------------------------- one thing

GRID = 24
REACH = 1.9  # of the grid, in units of the radius of a circle of equal area
BLURS = (0.3, 0.7, 1.1, 1.6)  # pixels; the first is what antialiasing does


def _normal(alpha: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """The coverage on a GRID x GRID lattice about (x, y), scaled by `radius`; bilinear, flat."""
    axis = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    padded = np.zeros((alpha.shape[0] + 2, alpha.shape[1] + 2), alpha.dtype)
    padded[1:-1, 1:-1] = alpha
    sides = []
    for middle, limit in ((y, alpha.shape[0]), (x, alpha.shape[1])):
        at = np.clip(middle + axis * REACH * radius - 0.5, -1.0, limit) + 1.0
        low = np.minimum(at.astype(int), limit)
        sides.append((low, (at - low).astype(np.float32)))
    (rows, fy), (columns, fx) = sides
    fy = fy[:, None]
    top, bottom = padded[rows], padded[rows + 1]
    lines = top + (bottom - top) * fy
    left, right = lines[:, columns], lines[:, columns + 1]
    return (left + (right - left) * fx).ravel()


@lru_cache(maxsize=64)
def _templates(level: int, blur: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All shapes at all angles at the resolution 2 * 1.2 ** level: `n GRID*GRID`, their shape numbers, energies."""
    radius = 2.0 * 1.2**level
    sigma = math.sqrt(max(BLURS[blur] ** 2 - BLURS[0] ** 2, 1e-6))
    reach = round(3 * sigma)
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    line /= line.sum()
    rows, numbers = [], []
    for number, shape in enumerate(SHAPES):
        r = radius * math.sqrt(math.pi / area(shape))
        half = math.ceil(1.1 * r) + 2 + reach
        axis = np.arange(-half, half + 1, dtype=np.float32) / r
        x, y = np.meshgrid(axis, axis)
        period = 360 / SYMMETRY[shape] if SYMMETRY[shape] else 0
        steps = max(1, round(period / 7.5))
        for step in range(steps):
            angle = math.radians(step * period / steps)
            cos, sin = math.cos(angle), math.sin(angle)
            alpha = np.clip(0.5 - distance(shape, x * cos + y * sin, y * cos - x * sin) * r, 0, 1)
            for _ in range(2 if reach else 0):  # along the rows, then along the columns
                wide = np.pad(alpha, ((reach, reach), (0, 0)))
                alpha = sum(weight * wide[i : i + len(alpha)] for i, weight in enumerate(line)).T
            rows.append(_normal(alpha, half + 0.5, half + 0.5, math.sqrt(alpha.sum() / math.pi)))
            numbers.append(number)
    bank = np.stack(rows).astype(np.float32)
    return bank, np.array(numbers), (bank**2).sum(1)


def _shape(region: Region, blur: int) -> tuple[np.ndarray, float]:
    """Squared distance to each shape of SHAPES (least over angles), and the overlap with the best."""
    radius = math.sqrt(region.weight / math.pi)
    level = min(max(round(math.log(radius / 2.0) / math.log(1.2)), 0), 15)
    bank, numbers, energy = _templates(level, blur)
    view = _normal(region.alpha, region.x - region.left, region.y - region.top, radius).astype(np.float32)
    far = energy - 2 * (bank @ view) + view @ view
    costs = np.full(len(SHAPES), np.inf)
    np.minimum.at(costs, numbers, far)
    best = bank[far.argmin()]
    return costs / GRID**2, float(np.minimum(best, view).sum() / np.maximum(best, view).sum())


def _blur(regions: Sequence[Region]) -> int:
    """How soft the edges are, as an index of BLURS.

    Across a Gaussian edge a (1 - a) integrates to sigma / sqrt(pi); small shapes overstate it, so that the next
    sharper templates may win by fit.
    """
    plain = [region for region in regions if region.plain]
    soft, steep = 0.0, 1e-6
    for region in plain:
        alpha = region.alpha
        soft += float((alpha * (1 - alpha)).sum())
        steep += float(np.hypot(alpha[1:, 1:] - alpha[:-1, 1:], alpha[1:, 1:] - alpha[1:, :-1]).sum())
    guess = int(np.abs(np.subtract(BLURS, math.sqrt(math.pi) * soft / steep)).argmin())
    some = plain[:: len(plain) // 4 + 1]
    return min(
        (guess, max(guess - 1, 0)), key=lambda blur: sum(_shape(region, blur)[0].min() for region in some)
    )


_BASE = np.array(list(COLOURS.values()), np.float32) / 255
_WEAVE = np.array([COLOURS[name] for name in TEXTURED_COLOURS], np.float32) / 255
_TONES = np.stack([0.45 * _WEAVE, 0.4 * _WEAVE + 0.6])  # dark and light seconds: 2 k 3, as `scene.tone`


def _paint(region: Region) -> tuple[str, str]:
    """(colour, texture): the nearest plain colour, or the nearest line from a colour to its second tone."""
    colours = region.pixels[heart(region.mask)]
    plain = np.sqrt(((colours[:, None] - _BASE) ** 2).sum(-1)).mean(0)
    name = list(COLOURS)[plain.argmin()]
    core = erode(region.mask)
    colours = region.pixels[core]
    if len(colours) < 20 or plain.min() < 0.06:
        return name, "solid"
    plain = np.sqrt(((colours[:, None] - _BASE) ** 2).sum(-1)).mean(0)
    axis = _TONES - _WEAVE  # 2 k 3
    share = np.clip(((colours[:, None, None] - _WEAVE) * axis).sum(-1) / (axis**2).sum(-1), 0, 1)
    off = np.sqrt(((colours[:, None, None] - _WEAVE - share[..., None] * axis) ** 2).sum(-1)).mean(0)
    which = np.unravel_index(off.argmin(), off.shape)
    part = share[(slice(None), *which)]
    if off.min() + 0.02 > 0.6 * plain.min() or part.std() < 0.2:
        return name, "solid"
    weave = np.zeros(core.shape, np.float32)
    weave[core] = part
    safe = erode(core)
    dy = ((weave[2:] - weave[:-2])[:, 1:-1])[safe[1:-1, 1:-1]]
    dx = ((weave[:, 2:] - weave[:, :-2])[1:-1])[safe[1:-1, 1:-1]]
    xx, yy, xy = (dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum()
    if math.hypot(xx - yy, 2 * xy) > 0.6 * (xx + yy):
        texture = "striped"
    else:
        texture = "dotted" if part.mean() < 0.39 else "checked"
    return TEXTURED_COLOURS[which[1]], texture


def _see(regions: Sequence[Region], blur: int, short: int) -> Seen:
    """One thing from its regions in one or several frames: shapes by summed distance, paint by vote."""
    fits = [_shape(region, blur) for region in regions]
    shape = SHAPES[int(np.sum([costs for costs, _ in fits], axis=0).argmin())]
    paints = [_paint(region) for region in regions]
    colour, texture = max(paints, key=paints.count)
    weight = float(np.median([region.weight for region in regions]))
    r = math.sqrt(weight / area(shape)) / short
    names, radii = list(SIZES), list(SIZES.values())
    size = names[sum(r > math.sqrt(a * b) for a, b in pairwise(radii))]
    if shape not in TEXTURED_SHAPES or size == "small":
        texture = "solid"  # the world has no other, and few pixels here would tell
    known = max(overlap for _, overlap in fits) >= LEAST_OVERLAP
    return Seen(
        shape=shape if known else None, colour=colour, size=size, texture=texture,
        x=round(float(regions[0].x) / short, 4), y=round(float(regions[0].y) / short, 4), r=round(r, 4),
    )  # fmt: skip


def _insides(things: Sequence[Seen], regions: Sequence[Region], short: int) -> tuple[Seen, ...]:
    """The things with `inside` set: found on another, or within another's outline (a ring's hole)."""
    out = []
    for thing, region in zip(things, regions, strict=True):
        hosts = [
            k
            for k, (other, around) in enumerate(zip(things, regions, strict=True))
            if region.host is around
            or (
                other.shape == "ring"
                and math.dist((thing.x, thing.y), (other.x, other.y)) + thing.r < other.r
            )
        ]
        out.append(replace(thing, inside=hosts[0] if hosts else None))
    return tuple(out)


# ----------------------------------------------------------------------------------------------- motion


def assign(cost: np.ndarray, skip: float) -> list[tuple[int, int]]:
    """The pairs (row, column) of the cheapest matching, where leaving a row without a column costs `skip`."""
    rows, columns = cost.shape
    if columns > rows:  # what is kept track of grows with the columns
        return sorted((i, j) for j, i in assign(cost.T, skip))
    best: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {0: (0.0, ())}
    for i in range(rows):
        after: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {}
        for used, (total, pairs) in best.items():
            steps = [(used, total + skip, pairs)]
            steps += [
                (used | 1 << j, total + cost[i, j], (*pairs, (i, j)))
                for j in range(columns)
                if not used >> j & 1 and cost[i, j] < skip
            ]
            for key, value, chain in steps:
                if key not in after or value < after[key][0]:
                    after[key] = (value, chain)
        best = after
    return list(min(best.values(), key=lambda entry: entry[0])[1])


def _tracks(regions: list[list[Region]], short: int) -> list[tuple[list[Region], str | None]]:
    """Regions linked over the frames, each with "appear", "vanish", "merge" or None; merged stretches cut off."""
    tracks: list[list[Region]] = []
    for f, found in enumerate(regions):
        live = [track for track in tracks if f - track[-1].frame <= 2]
        cost = np.array(
            [
                [
                    ((track[-1].x - region.x) ** 2 + (track[-1].y - region.y) ** 2) / short**2
                    + 0.5 * float(((track[-1].colour - region.colour) ** 2).sum())
                    for region in found
                ]
                for track in live
            ]
        ).reshape(len(live), len(found))
        pairs = assign(cost, 0.16)
        for i, j in pairs:
            live[i].append(found[j])
        taken = {j for _, j in pairs}
        tracks += [[region] for j, region in enumerate(found) if j not in taken]
    last = len(regions) - 1
    kinds: dict[int, str] = {}
    cuts: dict[int, int] = {}
    products: set[int] = set()
    for a, track in enumerate(tracks):
        end = track[-1].frame
        cover = None if end == last else _cover(track, regions[end + 1])
        if cover is None:
            continue
        for b, other in enumerate(tracks):
            if b == a or not other[0].frame <= end <= other[-1].frame:
                continue
            before = [region for region in other if region.frame <= end]
            joins = cover in other or _cover(before, [cover]) is not None
            if joins and _approach(track, before):
                kinds[a] = kinds[b] = "merge"
                cuts[a] = cuts[b] = min(end, cuts.get(b, end))
                products |= {k for k, new in enumerate(tracks) if new[0].frame > end and k not in (a, b)}
    out: list[tuple[list[Region], str | None]] = []
    for k, track in enumerate(tracks):
        if k in products or len(track) < max(2, 0.15 * len(regions)):
            continue
        kind = kinds.get(k)
        if kind == "merge":
            track = [region for region in track if region.frame <= cuts[k]]
        elif track[0].frame > 0:
            kind = "appear"
        elif track[-1].frame < last:
            kind = "vanish"
        out.append((track, kind))
    return out


def _cover(track: list[Region], regions: Sequence[Region]) -> Region | None:
    """The region of the next frame that lies where the track would go on (near its middle, which may be a hole)."""
    step = (track[-1].x - track[-2].x, track[-1].y - track[-2].y) if len(track) > 1 else (0.0, 0.0)
    near = max(1, round(0.7 * math.sqrt(track[-1].weight / math.pi)))
    for region in regions:
        row, column = int(track[-1].y + step[1]) - region.top, int(track[-1].x + step[0]) - region.left
        rows, columns = (slice(max(middle - near, 0), max(middle + near + 1, 0)) for middle in (row, column))
        if region.mask[rows, columns].any():
            return region
    return None


def _approach(a: list[Region], b: list[Region]) -> bool:
    """Whether two tracks come nearer."""
    ours = {region.frame: region for region in a}
    pairs = [(ours[region.frame], region) for region in b if region.frame in ours]
    gaps = [math.hypot(one.x - other.x, one.y - other.y) for one, other in pairs]
    return len(gaps) > 1 and gaps[-1] < gaps[0] - 1.0


_ORDER = {
    "square": 4,
    "triangle": 3,
    "diamond": 2,
    "hexagon": 6,
    "star": 5,
    "heart": 3,
    "cross": 4,
    "moon": 2,
}


def _turn(track: list[Region], shape: str | None) -> float:
    """The degrees a track turns, clockwise positive: the phase of the shape's first angular moment, unwrapped."""
    order = _ORDER.get(shape or "", 0)
    if not order or len(track) < 3:
        return 0.0
    phases = []
    for region in track:
        x = np.arange(region.alpha.shape[1]) + 0.5 - (region.x - region.left)
        y = np.arange(region.alpha.shape[0])[:, None] + 0.5 - (region.y - region.top)
        z = (x + 1j * y) ** order
        moment = (region.alpha * z).sum()
        if abs(moment) < 0.02 * (region.alpha * np.abs(z)).sum():
            return 0.0
        phases.append(np.angle(moment))
    angles = np.unwrap(phases) / order
    time = np.array([region.frame for region in track], float)
    return float(np.degrees(np.polyfit(time, angles, 1)[0] * (time[-1] - time[0])))


def _motion(track: list[Region], thing: Seen, kind: str | None, frames: int, short: int) -> Motion:
    if kind is not None:
        return Motion(kind=kind)
    path = np.array([(region.x, region.y) for region in track]) / short
    extent = np.ptp(path, axis=0)
    axis = int(extent.argmax())
    turns, mark, heading = 0, path[0, axis], 0.0  # reversals larger than 0.05
    for value in path[1:, axis]:
        if heading * (value - mark) > 0:
            mark = value
        elif abs(value - mark) > 0.05:
            turns += heading != 0
            heading, mark = math.copysign(1.0, value - mark), value
    if turns and extent[axis] > 0.1:
        return Motion(
            kind="bounce",
            direction="up and down" if axis else "side to side",
            speed="fast" if turns > 1 else "slow",
        )
    net = path[-1] - path[0]
    far = float(np.hypot(*net))
    if far > 0.09:
        name = max(DIRECTIONS, key=lambda key: float(net @ DIRECTIONS[key]) / math.hypot(*DIRECTIONS[key]))
        return Motion(kind="move", direction=name, speed="fast" if far > 0.35 else "slow")
    turn = _turn(track, thing.shape)
    if abs(turn) > 25:
        direction = "clockwise" if turn > 0 else "anticlockwise"
        return Motion(kind="rotate", direction=direction, speed="fast" if abs(turn) > 105 else "slow")
    return Motion(kind="still")


# ----------------------------------------------------------------------------------------------- walls


def _behind(wall: Bars, ground: np.ndarray, noise: float, background: str) -> Reading:
    """The reading of a clip with a wall: what goes behind it, and what comes out."""
    count, short = len(wall.frames), min(wall.frames.shape[1:3])
    regions = find(wall.frames, ground, noise, short)
    blur = _blur([region for row in regions for region in row])
    far = (wall.middle[-1] - wall.middle[0]) / short
    direction = ("left", "right")[int(far > 0)] if wall.upright else ("up", "down")[int(far > 0)]
    moved = Motion(kind="move", direction=direction, speed="fast" if abs(far) > 0.35 else "slow")
    seen = SeenWall(
        colour=min(COLOURS, key=lambda name: math.dist(wall.colour, np.divide(COLOURS[name], 255))),
        motion=moved if abs(far) > 0.09 else Motion(),
        kept=False,
    )
    way = passage(regions, wall)
    if way is not None:
        went, came = (_see(some[-3:], blur, short) for some in (way.whole_before, way.whole_after))
        if went.shape is not None and (went.shape, went.colour) == (came.shape, came.colour):
            path = [way.whole_before[0], *way.whole_after]
            thing = replace(went, motion=_motion(path, went, None, count, short))
            kept = on_course(way, wall, count, short)
            return Reading(
                background=background, things=(thing,), frames=count, wall=replace(seen, kept=kept)
            )
    return Reading(
        background=background, things=_followed(regions, blur, count, short), frames=count, wall=seen
    )


# ----------------------------------------------------------------------------------------------- scores

ATTRIBUTES = (
    "count", "shape", "colour", "size", "texture", "background", "relation", "motion", "speed", "permanence",
)  # fmt: skip
_WEIGHTS = {"shape": 4.0, "colour": 3.0, "size": 1.0, "texture": 1.0}


def match(seen: Sequence[Seen | Mention], said: Sequence[Mention]) -> dict[int, int]:
    """said -> seen: the pairing in which most of what is said holds; shape weighs most, then colour, then motion."""
    cost = np.zeros((len(said), len(seen)))
    for i, mention in enumerate(said):
        for j, thing in enumerate(seen):
            for name, weight in _WEIGHTS.items():
                wanted = getattr(mention, name)
                cost[i, j] += weight * (wanted is not None and wanted != getattr(thing, name))
            if mention.motion and thing.motion:
                cost[i, j] += 1.0 * (mention.motion.kind != thing.motion.kind)
                cost[i, j] += 1.0 * (mention.motion.direction not in (None, thing.motion.direction))
    return dict(assign(cost, 100.0))


def _alike(asked: Motion, shown: Motion) -> bool:
    return asked.kind == shown.kind and asked.direction in (None, shown.direction)


def score(reading: Reading, truth: Scene | Description) -> dict[str, bool | None]:
    """Whether a picture shows what it should, for each of ATTRIBUTES; None where the truth says nothing of it.

    Things are paired with what is said of them so that most holds. "count" alone asks for their number; the other
    attributes ask whether every thing that is there has the right one (and are False in an empty picture).
    "relation" also asks that both its things are there; "motion" covers kind and direction, "speed" the speed. A wall
    that was asked for counts in "colour" and "motion"; "permanence" asks that it is there and that what it hides comes
    out again as it should (`SeenWall.kept`).
    """
    said = truth.describe() if isinstance(truth, Scene) else truth
    mentions = [mention for mention in said.mentions for _ in range(mention.count)]
    pairs = match(reading.things, mentions)
    out: dict[str, bool | None] = dict.fromkeys(ATTRIBUTES)
    if mentions:
        out["count"] = len(reading.things) == len(mentions)
    for name in ("shape", "colour", "size", "texture"):
        holds = [
            getattr(reading.things[j], name) == getattr(mentions[i], name)
            for i, j in pairs.items()
            if getattr(mentions[i], name) is not None
        ]
        if any(getattr(mention, name) is not None for mention in mentions):
            out[name] = bool(holds) and all(holds)
    if said.wall is not None:
        out["permanence"] = reading.wall is not None and reading.wall.kept
        right = reading.wall is not None and said.wall.colour in (None, reading.wall.colour)
        out["colour"] = right and out["colour"] is not False
    if said.background is not None:
        out["background"] = reading.background == said.background
    if said.relation is not None:
        first = np.cumsum([0, *(mention.count for mention in said.mentions)])
        a, b = pairs.get(int(first[said.relation.subject])), pairs.get(int(first[said.relation.object]))
        out["relation"] = (
            a is not None and b is not None and reading.relation(a, b) == said.relation.predicate
        )
    shown = {i: reading.things[j].motion or Motion(kind="none") for i, j in pairs.items()}
    moves = [(i, mention.motion) for i, mention in enumerate(mentions) if mention.motion is not None]
    paces = [(i, motion) for i, motion in moves if motion.speed is not None]
    same = {i for i, motion in moves if i in shown and shown[i].kind == motion.kind}
    for name, asked in (("motion", moves), ("speed", paces)):
        if name == "motion" and said.wall is not None and said.wall.motion is not None:
            out["motion"] = reading.wall is not None and _alike(said.wall.motion, reading.wall.motion)
        elif asked:
            there = [(i, motion) for i, motion in asked if i in shown]
            out[name] = bool(there) and all(
                i in same
                and (
                    motion.direction in (None, shown[i].direction)
                    if name == "motion"
                    else motion.speed == shown[i].speed
                )
                for i, motion in there
            )
    return out
