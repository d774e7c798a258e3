"""A contact sheet: what a dataset looks like, with its words, on one page."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reverie.data.index import Index, Item
from reverie.errors import InputError
from reverie.media import LIMITS, Limits, MediaError, decode_array
from reverie.pictures import grid, save_png
from reverie.rng import integer


def contact_sheet(
    index: Index,
    path: str | Path,
    *,
    count: int = 48,
    seed: int = 0,
    size: int = 128,
    columns: int = 8,
    limits: Limits = LIMITS,
) -> Path:
    """Writes `count` accepted items, drawn by `seed`, as one PNG, and returns its path.

    A clip shows its first and its middle frame. Underneath stands the first caption of each language.
    """
    if count < 1 or size < 8 or columns < 1:
        raise InputError(
            f"A sheet of {count} pictures of {size} pixels in {columns} columns cannot be drawn."
        )
    accepted = index.select()
    if len(accepted) == 0:
        raise InputError(
            f"There is nothing to show in {index.folder}: every file is rejected; run `reverie data check`."
        )
    drawn = sorted(accepted, key=lambda item: (integer(seed, "sheet", item.file_name), item.file_name))[
        :count
    ]
    pictures, titles = [], []
    for item in drawn:
        words = _words(item)
        try:
            frames = decode_array(accepted.media(item), size=size, frames=2, fit="pad", limits=limits)
        except MediaError as error:
            frames, words = np.full((1, size, size, 4), 200, np.uint8), f"{item.file_name}: {error.reason}"
        pictures.append(np.concatenate(list(frames), axis=1))
        titles.append(words)
    return save_png(grid(pictures, titles, columns), path)


def _words(item: Item) -> str:
    first = {caption.language: caption.text for caption in reversed(item.captions)}
    text = " / ".join(first[language] for language in dict.fromkeys(c.language for c in item.captions))
    return f"[{item.frames} frames] {text}" if item.frames > 1 else text
