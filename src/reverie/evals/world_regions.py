"""Regions of a picture that differ from its background, with soft coverage: the eyes of the exact judge.

A region is a 4-connected component above half its own contrast, so that a blurred bridge between two things does not
join them. Its coverage is the share of its colour in each pixel, as antialiasing made it. Pixels are in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_AREA = 0.0035  # a smaller region is dirt; the world's smallest thing has 0.010 square short sides
LEAST_HOST = 0.08  # a thing that another lies on is larger
MOST_REGIONS = 10  # per frame, the largest


@dataclass(kw_only=True, eq=False)
class Region:
    """One connected foreground region of one frame: a crop with its mask, soft coverage and colours."""

    frame: int
    x: float  # centroid, pixels
    y: float
    weight: float  # area, pixels
    left: int
    top: int
    mask: np.ndarray  # h w
    alpha: np.ndarray  # h w
    pixels: np.ndarray  # h w 3
    colour: np.ndarray  # mean over the inner pixels
    plain: bool  # of one colour
    host: Region | None = None  # the region that it was found in

    def rim(self, height: int, width: int) -> int:
        """How many pixels of one edge of the picture it covers, at most."""
        rows = [
            self.mask[at - self.top : at - self.top + 1].sum() for at in (0, height - 1) if at >= self.top
        ]
        columns = [
            self.mask[:, at - self.left : at - self.left + 1].sum()
            for at in (0, width - 1)
            if at >= self.left
        ]
        return int(max(*rows, *columns, 0, 0))


def smooth(frames: np.ndarray) -> np.ndarray:
    for axis in (1, 2):
        padded = np.concatenate([frames.take([0], axis), frames, frames.take([-1], axis)], axis)
        n = frames.shape[axis]
        parts = [padded.take(range(i, i + n), axis) for i in range(3)]
        frames = 0.25 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2]
    return frames


def erode(mask: np.ndarray) -> np.ndarray:
    out = np.zeros_like(mask)
    out[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return out


def dilate(mask: np.ndarray) -> np.ndarray:
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    across = out.copy()
    out[:, 1:] |= across[:, :-1]
    out[:, :-1] |= across[:, 1:]
    return out


def _highest(values: np.ndarray) -> np.ndarray:
    """The highest of each value's 3 x 3 neighbours."""
    out = values.copy()
    np.maximum(out[1:], values[:-1], out=out[1:])
    np.maximum(out[:-1], values[1:], out=out[:-1])
    across = out.copy()
    np.maximum(out[:, 1:], across[:, :-1], out=out[:, 1:])
    np.maximum(out[:, :-1], across[:, 1:], out=out[:, :-1])
    return out


def _holes(mask: np.ndarray) -> np.ndarray:
    """What the mask encloses; the mask keeps clear of the crop's border."""
    labels, _ = label(~mask[None])
    return (labels[0] != labels[0, 0, 0]) & ~mask


def label(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """4-connected components of `f h w`, frame by frame: labels (0 = none, then 1...) and boxes `n 5`.

    A box is (frame, top, left, bottom, right), the ends exclusive. Works on runs: the runs of touching rows that
    overlap are joined by minimum propagation with pointer jumping, so no loop runs over pixels.
    """
    f, h, w = mask.shape
    stride = w + 1
    flat = np.zeros(f * (h + 1) * stride + 1, np.int8)  # an empty column and row keep lines and frames apart
    flat[:-1].reshape(f, h + 1, stride)[:, :h, :w] = mask
    edges = np.flatnonzero(np.diff(flat, prepend=np.int8(0)))
    starts, ends = edges[::2], edges[1::2]
    n = len(starts)
    if n == 0:
        return np.zeros(mask.shape, np.int32), np.zeros((0, 5), np.int64)
    low = np.searchsorted(ends, starts + stride, "right")
    high = np.searchsorted(starts, ends + stride, "left")
    counts = np.maximum(high - low, 0)
    above = np.repeat(np.arange(n), counts)
    below = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(low, counts)
    root = np.arange(n)
    while True:
        before = root.copy()
        least = np.minimum(root[above], root[below])
        np.minimum.at(root, root[above], least)
        np.minimum.at(root, root[below], least)
        root = root[root]
        if (root == before).all():
            break
    _, number = np.unique(root, return_inverse=True)
    k = int(number.max()) + 1
    painted = np.zeros(f * (h + 1) * stride + 1, np.int32)
    np.add.at(painted, starts, number + 1)
    np.add.at(painted, ends, -(number + 1))
    labels = painted.cumsum()[:-1].reshape(f, h + 1, stride)[:, :h, :w].astype(np.int32)
    row, left = starts // stride, starts % stride
    right = left + (ends - starts)
    boxes = np.empty((k, 5), np.int64)
    boxes[:, 1:3], boxes[:, 3:] = 1 << 40, -1
    boxes[number, 0] = row // (h + 1)
    np.minimum.at(boxes[:, 1], number, row % (h + 1))
    np.minimum.at(boxes[:, 2], number, left)
    np.maximum.at(boxes[:, 3], number, row % (h + 1) + 1)
    np.maximum.at(boxes[:, 4], number, right)
    return labels, boxes


def find(frames: np.ndarray, ground: np.ndarray, noise: float, short: int) -> list[list[Region]]:
    """The regions of each frame, the largest first."""
    far = np.sqrt(((frames - ground) ** 2).sum(-1))
    labels, boxes = label(far > max(0.12, 4.5 * noise))
    least = LEAST_AREA * short * short
    out: list[list[Region]] = [[] for _ in frames]
    spans = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
    gone: set[int] = set()
    for number in np.argsort(-spans, kind="stable") + 1:
        f, top, left, bottom, right = boxes[number - 1]
        if spans[number - 1] < least or number in gone:
            continue
        view = labels[f, top:bottom, left:right]
        rough = np.pad(view == number, 2)
        if rough.sum() < least:
            continue
        if rough.sum() > LEAST_HOST * short * short:
            hole = _holes(rough)
            if hole.any() and not erode(hole & (np.pad(view, 2) == 0)).any():
                # the blend of a thing's edge with what it lies on can look like the background: no real hole
                gone |= set(np.pad(view, 2)[hole].tolist())
                rough |= hole
        rows = np.clip(np.arange(top - 2, bottom + 2), 0, frames.shape[1] - 1)
        columns = np.clip(np.arange(left - 2, right + 2), 0, frames.shape[2] - 1)
        pixels, crop = frames[f][np.ix_(rows, columns)], far[f][np.ix_(rows, columns)]
        core = erode(rough)
        levels = np.sort(crop[core])
        contrast = levels[len(levels) // 5] if len(levels) > 4 else crop[rough].max()
        # A blurred bridge between two things is thin and weak: cut it, but keep whatever lies deep inside.
        cut = (rough & (crop > 0.5 * contrast)) | erode(core)
        parts, pieces = label(cut[None])
        for part in range(1, len(pieces) + 1):
            mask = parts[0] == part
            if mask.sum() >= least:
                region = _region(int(f), left - 2, top - 2, mask, pixels, crop, ground)
                out[f] += _inner(region, ground, noise, least, short)
    for row in out:
        row.sort(key=lambda region: -region.weight)
        del row[MOST_REGIONS:]
    return out


def _region(
    frame: int, left: int, top: int, mask: np.ndarray, pixels: np.ndarray, far: np.ndarray, ground: np.ndarray
) -> Region:
    colours = pixels[heart(mask)]
    mean = np.median(colours, axis=0)
    plain = bool(np.abs(colours - mean).mean() < 0.06)
    if plain:  # coverage is the share of its colour in the mixture
        axis = mean - ground
        alpha = np.clip((pixels - ground) @ axis / (axis @ axis), 0.0, 1.0) * dilate(dilate(mask))
    else:  # the share of the strongest neighbour's contrast
        share = far / np.maximum(_highest(far), 1e-6)
        alpha = np.where(erode(mask), 1.0, np.clip(share, 0.0, 1.0)) * dilate(mask)
    weight = alpha.sum()
    y = (alpha.sum(1) @ (np.arange(mask.shape[0]) + 0.5)) / weight
    x = (alpha.sum(0) @ (np.arange(mask.shape[1]) + 0.5)) / weight
    return Region(
        frame=frame, x=left + x, y=top + y, weight=float(weight), left=left, top=top, mask=mask, alpha=alpha,
        pixels=pixels, colour=colours.mean(0), plain=plain,
    )  # fmt: skip


def heart(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that are free of its edge: two pixels in, or one, or none where it is thin."""
    once = erode(mask)
    twice = erode(once)
    return twice if twice.sum() > 8 else once if once.sum() > 4 else mask


def _inner(host: Region, ground: np.ndarray, noise: float, least: float, short: int) -> tuple[Region, ...]:
    """The region itself, or where one thing lies on another both: it with the other painted over, and the other.

    The other is a compact patch of another colour that nowhere reaches the rim.
    """
    core = erode(host.mask)
    deep = erode(erode(core))
    if host.weight < LEAST_HOST * short * short or not deep.any():
        return (host,)
    rim = np.median(host.pixels[core & ~deep], axis=0)
    far = np.sqrt(((host.pixels - rim) ** 2).sum(-1))
    labels, patches = label(((far > max(0.15, 4 * noise)) & core)[None])
    sizes = np.bincount(
        labels[0][deep], minlength=len(patches) + 1
    )  # edges that blur has softened do not reach so deep
    total = sizes[1:].sum()
    sizes[0] = 0
    sizes[np.unique(labels[0][~erode(core)])] = 0  # stripes reach the rim; dots and checks are several
    if sizes.max() < max(1.5 * least, 0.8 * total):
        return (host,)
    mask = labels[0] == sizes.argmax()
    inner = _region(host.frame, host.left, host.top, mask, host.pixels, far, rim)
    if ((inner.colour - rim) ** 2).sum() < 0.2**2:
        return (host,)
    pixels = np.where(dilate(dilate(mask))[..., None], rim, host.pixels)
    contrast = np.sqrt(((pixels - ground) ** 2).sum(-1))
    inner.host = _region(host.frame, host.left, host.top, host.mask, pixels, contrast, ground)
    return inner.host, inner
