"""Drawing a `Scene`: antialiased by signed distances, at any size, duration and aspect ratio.

Convention: pixel (row i, column j) covers [j, j+1] x [i, i+1] and is sampled at its middle; frame i of f
shows time i / (f - 1) of the clip, so every duration shows the whole event.
"""

from __future__ import annotations

import numpy as np
import torch

from reverie.errors import InputError
from reverie.scene import BACKGROUNDS, COLOURS, Scene, Thing, Wall, distance, tone


def render(
    scene: Scene, *, size: tuple[int, int] = (64, 64), frames: int = 1, span: tuple[float, float] = (0.0, 1.0)
) -> torch.Tensor:
    """Pixels of a scene, uint8 `f h w 3`.

    size: (height, width) in pixels. Lengths scale with the shorter side; a picture longer than the scene's
    aspect shows more background on both sides; one that would cut the scene is refused with InputError.
    span: the first and last moment shown, in [0, 1]; one frame shows the first.
    """
    height, width = size
    if min(height, width) < 8 or frames < 1:
        raise InputError(
            f"cannot draw {frames} frames of {height} x {width} pixels: ask for 1 frame of 8 x 8 or more."
        )
    short = min(height, width)
    wide, tall = scene.extent
    if width + 1 < wide * short or height + 1 < tall * short:
        raise InputError(
            f"a scene of aspect {scene.aspect:g} does not fit {height} x {width} pixels: "
            f"make it with aspect={width / height:g}."
        )
    left, top = (width - wide * short) / 2, (height - tall * short) / 2
    times = [span[0] + (span[1] - span[0]) * i / max(frames - 1, 1) for i in range(frames)]
    out = np.empty((frames, height, width, 3), np.float32)
    out[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        pose: tuple[float, float, float] | None = None
        for frame, t in zip(out, times, strict=True):
            dx, dy, turn, visible = thing.track.at(t)
            if not visible:
                continue
            x, y = left + (thing.x + dx) * short, top + (thing.y + dy) * short
            if pose != (x, y, turn):
                pose = (x, y, turn)
                patch = _patch(thing, scene.background, x, y, thing.r * short, thing.angle + turn, size)
            rows, columns, alpha, colour = patch
            frame[rows, columns] += alpha * (colour - frame[rows, columns])
    if scene.wall is not None:
        for frame, t in zip(out, times, strict=True):
            _cover(frame, scene.wall, (left if scene.wall.upright else top) + scene.wall.at(t) * short, short)
    return torch.from_numpy((out + 0.5).astype(np.uint8))


def _cover(frame: np.ndarray, wall: Wall, middle: float, short: int) -> None:
    """Draws a wall over a frame `h w 3`, from edge to edge also of a picture longer than the scene."""
    lines = frame.swapaxes(0, 1) if wall.upright else frame  # along the axis that it does not span
    away = np.abs(np.arange(len(lines), dtype=np.float32) + np.float32(0.5 - middle))
    alpha = np.clip(np.float32(0.5 + wall.width * short / 2) - away, 0.0, 1.0)[:, None, None]
    lines += alpha * (np.array(COLOURS[wall.colour], np.float32) - lines)


def _patch(
    thing: Thing, background: str, x: float, y: float, r: float, angle: float, size: tuple[int, int]
) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The rows and columns a thing touches, its coverage `h w 1` and its colour `h w 3` (or `3`) there."""
    rows = slice(max(int(y - r) - 1, 0), max(min(int(y + r) + 2, size[0]), 0))
    columns = slice(max(int(x - r) - 1, 0), max(min(int(x + r) + 2, size[1]), 0))
    u = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - x))[
        None, :
    ] / np.float32(r)
    v = (np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5 - y))[:, None] / np.float32(r)
    if angle:
        cos, sin = np.float32(np.cos(np.deg2rad(angle))), np.float32(np.sin(np.deg2rad(angle)))
        u, v = u * cos + v * sin, v * cos - u * sin
    alpha = np.clip(0.5 - distance(thing.shape, u, v) * r, 0.0, 1.0)[..., None]
    colour = np.array(COLOURS[thing.colour], np.float32)
    if thing.texture != "solid":
        second = np.array(tone(thing.colour, background), np.float32)
        share = np.clip(0.5 - _pattern(thing.texture, u, v) * r, 0.0, 1.0)[..., None]
        colour = colour + share * (second - colour)
    return rows, columns, alpha, colour


def _pattern(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to where the second colour begins (negative inside it), in units of the radius."""
    if texture == "striped":
        period = 0.56
        return np.abs((v / period) % 1.0 - 0.5) * period - period / 4 + 0.0 * u
    if texture == "dotted":
        period = 0.52
        return np.hypot((u / period) % 1.0 - 0.5, (v / period) % 1.0 - 0.5) * period - 0.155
    if texture == "checked":
        cell = 0.42
        a = 0.5 - np.abs((u / cell) % 1.0 - 0.5), 0.5 - np.abs((v / cell) % 1.0 - 0.5)
        odd = (np.floor(u / cell) + np.floor(v / cell)) % 2.0
        return (1.0 - 2.0 * odd) * np.minimum(*a) * cell
    raise AssertionError(f"no such texture: {texture}")
