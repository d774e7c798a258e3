"""Near duplicates: the same picture at another size, in another format, a little cropped or tinted.

Two signs, by which two files are compared. The perceptual hash (pHash: Zauner 2010, "Implementation and benchmarking
of perceptual image hash functions"): the picture laid on white, in grey, 32 x 32 pixels, its cosine transform, and of
the 8 x 8 lowest frequencies which are above their median: 64 bits. Resizing and compression move few of them; colour
moves none, so pictures that differ in colour alone are equal to it. And the embedding: the cosine between what a model
sees in both, which knows colour, but takes a thing drawn twice for nearly the same. Files that both signs find are
duplicates; either may be asked for alone.

Pictures are compared with pictures, and clips with clips, by four evenly spaced frames, in order. All pairs are
compared, a block at a time, so the time grows with the square of their number: docs/cleaning.md has the measure.

Groups are what is connected by pairs. The best of a group stays: held out before training (test, val, train), since
what is both would flatter every score; then the largest; then the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reverie.data.index import Index, Item
from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.media import LIMITS, Limits, MediaError, Part, decode_array, flatten
from reverie.progress import track

if TYPE_CHECKING:
    from torch import Tensor

SIDE, LOW, MOMENTS = 32, 8, 4
BITS = LOW * LOW
DISTANCE = 6  # bits of 64 that two copies may differ in
COSINE = 0.98  # that two copies have at least
_RANK = {"test": 0, "val": 1, "train": 2}


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A file that is a near duplicate of `original`, which is kept."""

    item: Item
    original: Item
    distance: float | None  # of their hashes, in bits of 64, the mean over a clip's frames
    cosine: float | None  # of their embeddings

    @property
    def leak(self) -> bool:
        """Whether what is trained on shows what is held out."""
        return self.item.split == "train" and self.original.split != "train"

    def __str__(self) -> str:
        signs = [f"{self.distance:g} of {BITS} bits differ"] if self.distance is not None else []
        signs += [f"cosine {self.cosine:.3f}"] if self.cosine is not None else []
        leak = f"leak into training of split {self.original.split}, " if self.leak else ""
        return f"{leak}duplicate of {self.original.file_name} ({', '.join(signs)})"


def phash(grey: np.ndarray) -> np.ndarray:
    """Of a grey picture of 32 x 32, any real numbers: 64 bools, from the lowest frequency, row by row."""
    assert grey.shape == (SIDE, SIDE)
    basis = _cosines()
    low = (basis @ grey.astype(np.float64) @ basis.T).round(6)  # a flat picture has no noise then
    return (low > np.median(low)).reshape(-1)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The lowest rows of the cosine transform (DCT-II, not scaled): cos(pi (2 x + 1) u / 64) at row u, column x."""
    return np.cos(np.pi * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1) / (2 * SIDE))


def hashes_of(path: str | Path | Part, *, moments: int = 1, limits: Limits = LIMITS) -> np.ndarray:
    """The hashes of a file's `moments` evenly spaced frames: bool `moments 64`. MediaError: it cannot be decoded."""
    from PIL import Image

    pixels = decode_array(path, frames=moments, limits=limits)
    small = [Image.fromarray(flatten(frame)).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
             for frame in pixels]  # fmt: skip
    return np.stack([phash(np.asarray(picture)) for picture in small])


def hash_items(
    index: Index,
    items: Sequence[Item],
    *,
    workers: int | None = None,
    limits: Limits = LIMITS,
    quiet: bool = False,
) -> dict[str, np.ndarray | str]:
    """By file name the hashes of each item, `f 64` (one of a picture, up to four of a clip), or why there are none."""

    def of(item: Item) -> np.ndarray | str:
        try:
            return hashes_of(index.media(item), moments=MOMENTS if item.frames > 1 else 1, limits=limits)
        except MediaError as error:
            return error.reason

    steps = in_order(of, items, workers or index.readers)
    found = track(steps, total=len(items), label="hashing", quiet=quiet)
    return {item.file_name: value for item, value in zip(items, found, strict=True)}


def pairs_above(
    rows: Tensor, least: float, *, also: Tensor | None = None, also_least: float = 0.0, block: int = 1024
) -> Iterator[tuple[int, int]]:
    """Every pair (i, j), i < j, of rows `n d` whose product is at least `least`, a block of products at a time.

    also: other rows `n e` of the same things; a pair must then reach `also_least` there too. Exact, in memory for
    `block` times `block` products, in the rows' own type.
    """
    for i in range(0, len(rows), block):
        for j in range(i, len(rows), block):
            near = rows[i : i + block] @ rows[j : j + block].T >= least
            if also is not None:
                near &= also[i : i + block] @ also[j : j + block].T >= also_least
            if i == j:
                near = near.triu(diagonal=1)
            for a, b in near.nonzero().tolist():
                yield i + a, j + b


def groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """What `pairs` connect among `count` things (union-find): groups of two or more, each and all in order."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]  # the path halves with each walk
            i = parent[i]
        return i

    for a, b in pairs:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    members: dict[int, list[int]] = {}
    for i in range(count):
        members.setdefault(root(i), []).append(i)
    return [group for group in members.values() if len(group) > 1]


def find_copies(
    items: Sequence[Item],
    *,
    hashes: Sequence[np.ndarray] | None = None,
    embeddings: Sequence[Tensor] | None = None,
    distance: float = DISTANCE,
    cosine: float = COSINE,
) -> list[list[Copy]]:
    """The groups of near duplicates among items, each as the copies that its best item makes superfluous.

    hashes: of each item bool `f 64`. embeddings: of each item unit vectors `f d`. A pair must pass what is given, both
    where both are. InputError: a distance or a cosine out of range.
    """
    import torch

    assert hashes is not None or embeddings is not None
    if not 0 <= distance < BITS / 2:
        raise InputError(
            f"distance is {distance:g} bits: give 0 up to {BITS // 2 - 1}; half of {BITS} is chance."
        )
    if not 0 < cosine <= 1:
        raise InputError(f"cosine is {cosine:g}: give a number above 0 and up to 1, such as {COSINE}.")
    found: list[list[Copy]] = []
    kinds: dict[int, list[int]] = {}  # how many frames are compared -> the items
    for i in range(len(items)):
        kinds.setdefault(len(hashes[i]) if hashes is not None else int(items[i].frames > 1), []).append(i)
    for own in kinds.values():
        bits = vectors = None
        if hashes is not None:  # of signs, the product is 1 less the share of bits that differ, doubled
            signs = torch.from_numpy(np.stack([hashes[i].reshape(-1) for i in own])).float() * 2 - 1
            bits = signs / signs.shape[1] ** 0.5
        if embeddings is not None:
            mean = torch.stack([embeddings[i].float().mean(0) for i in own])
            vectors = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12)
        least = 1 - 2 * (distance + 1e-4) / BITS
        slack = cosine - 1e-6  # a copy's cosine is 1 but for rounding
        if bits is not None:
            pairs = pairs_above(bits, least, also=vectors, also_least=slack)
        else:
            assert vectors is not None
            pairs = pairs_above(vectors, slack)
        for group in groups(len(own), pairs):
            best = min(group, key=lambda k: (_RANK[items[own[k]].split], -_size(items[own[k]]), k))
            found.append([
                Copy(
                    item=items[own[k]],
                    original=items[own[best]],
                    distance=None if bits is None else round((1 - float(bits[k] @ bits[best])) * BITS / 2, 2),
                    cosine=None if vectors is None else float(vectors[k] @ vectors[best]),
                )
                for k in group if k != best
            ])  # fmt: skip
    return found


def _size(item: Item) -> int:
    return item.width * item.height
