"""`reverie data report`: what a dataset holds, as one page to look at and a file of numbers.

    data/report.py              the numbers, from the index alone
    look                        what a CLIP says of a sample: which captions fit, and what lies near what
    recipes/data_report_page.py the page

Nothing is written into the folder but the embeddings that search and cleaning keep there too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from reverie import disk, rng
from reverie.data.index import Index, Item
from reverie.data.report import Spread, contents_of, spread
from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.evals.embedding_map import seats, tsne
from reverie.media import MediaError, decode_array, flatten
from reverie.progress import track
from reverie.recipes.cleaning import cosines, kept_scores
from reverie.recipes.parts import capable
from reverie.recipes.search import embed_pictures, every_file, key_of

MAPPED = 1500  # files on the map, at most
BEST, WORST, LOT = 12, 24, 24  # pictures that are shown
WIDTH = 1776  # of the map, in pixels
THUMBS = (24, 96)  # pixels a side on the map: of many, of few


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A caption and the file that it belongs to. cosine: in CLIP's space."""

    file_name: str
    caption: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a file lies on the map: its cell, counted from the upper left."""

    file_name: str
    column: int
    row: int


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a CLIP says of some files; model None: nothing but what the index keeps of an earlier look.

    best, worst: at most one caption of a file, the most and the least fitting first.
    """

    model: str | None
    files: int  # whose captions were compared
    pairs: Spread | None
    best: tuple[Pair, ...]
    worst: tuple[Pair, ...]
    unread: tuple[tuple[str, str], ...]  # files that cannot be read, and why
    map: tuple[Place, ...]
    columns: int
    rows: int


def report(
    folder: str | Path,
    out: str | Path = "report.html",
    *,
    model: str | Path | None = "clip-stickers",
    sample: int = 5000,
    language: str | None = None,
    seed: int = 0,
    device: str | None = None,
    quiet: bool = False,
) -> tuple[Path, Path]:
    """Writes the page and its numbers, a .json beside it, and returns both paths.

    model: a CLIP by name or folder; None: the index alone. sample: files that it looks at, drawn by `seed`. language:
    only captions in it are compared. InputError: no index, one without files, a name that is no page's, no such model.
    """
    from reverie.recipes.data_report_page import page

    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out} would be a page: give a name that ends in .html.")
    if sample < 1:
        raise InputError(f"sample is {sample}: look at one file at least, or give --no-model.")
    index = Index.read(folder)
    contents = contents_of(index)
    look = look_at(
        index, model=model, sample=sample, language=language, seed=seed, device=device, quiet=quiet
    )
    lot = drawn(index, LOT, seed)
    numbers = {"contents": asdict(contents), "look": asdict(look)}
    text = page(index, contents, look, lot, partial(thumbnails, index), quiet=quiet)
    out.parent.mkdir(parents=True, exist_ok=True)
    disk.write(out, text)
    beside = out.with_suffix(".json")
    disk.write_json(beside, numbers)
    return out, beside


def drawn(index: Index, count: int, seed: int) -> list[Item]:
    """`count` of the accepted items, by lot; fewer are the first of more."""
    accepted = [item for item in index if item.reject is None]
    return sorted(accepted, key=lambda item: (rng.integer(seed, "report", item.file_name), item.file_name))[
        :count
    ]


def look_at(
    index: Index,
    *,
    model: str | Path | None,
    sample: int,
    language: str | None = None,
    seed: int = 0,
    device: str | None = None,
    quiet: bool = False,
) -> Look:
    """Which captions fit, of a sample and of what `data score` has scored already, and a map of at most MAPPED files.

    What the index keeps counts where this very model wrote it, or without a model whoever did.
    """
    some = drawn(index, sample, seed)
    if model is None or not some:
        kept = {
            i.file_name: s for i in index if i.reject is None and (s := kept_scores(index, i)) is not None
        }
        return _look(index, None, kept, (), {})
    clip = capable(model, "embed_text", device=device)
    key = key_of(clip)
    kept = {
        item.file_name: scores
        for item in index
        if item.reject is None
        and (scores := kept_scores(index, item, key=key, language=language)) is not None
    }
    todo = {item.file_name: item for item in some if item.captions and item.file_name not in kept}
    names = list(dict.fromkeys([*(item.file_name for item in some[:MAPPED]), *todo]))
    found = embed_pictures(clip, index.folder, names, index=index, present=every_file(index), quiet=quiet)
    fits = kept | cosines(clip, todo, found, language=language, quiet=quiet)
    rows = torch.bincount(found.file, minlength=len(found.names)).tolist()
    mapped = {item.file_name for item in some[:MAPPED]}
    middle = {
        name: own[len(own) // 2].float()
        for name, own in zip(found.names, found.vectors.split(rows), strict=True)
        if name in mapped and bool(own.isfinite().all())
    }
    return _look(
        index, str(model), fits, tuple((str(it.path), it.reason) for it in found.bad), middle, seed=seed
    )


def _look(
    index: Index,
    model: str | None,
    fits: Mapping[str, Sequence[float | None]],
    unread: tuple[tuple[str, str], ...],
    vectors: Mapping[str, torch.Tensor],
    *,
    seed: int = 0,
) -> Look:
    pairs = [
        Pair(file_name=item.file_name, caption=caption.text or "", cosine=score)
        for item in index
        for caption, score in zip(item.captions, fits.get(item.file_name, ()), strict=False)
        if score is not None and math.isfinite(score)
    ]
    ranked = sorted(pairs, key=lambda pair: (pair.cosine, pair.file_name, pair.caption))
    columns, rows = cells_for(len(vectors))
    where: list[tuple[int, int]] = []
    if vectors:
        where = seats(tsne(torch.stack([*vectors.values()]), seed=seed), columns, rows)
    places = [
        Place(file_name=name, column=column, row=row)
        for name, (column, row) in zip(vectors, where, strict=True)
    ]
    return Look(
        model=model,
        files=len({pair.file_name for pair in pairs}),
        pairs=spread(pair.cosine for pair in pairs),
        best=tuple(_one_each(ranked[::-1], BEST)),
        worst=tuple(_one_each(ranked, WORST)),
        unread=unread,
        map=tuple(places),
        columns=columns,
        rows=rows,
    )


def _one_each(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """The first `most` of different files."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.file_name, pair)
        if len(first) == most:
            break
    return list(first.values())


def cells_for(count: int) -> tuple[int, int]:
    """Columns and rows of a map of so many files: 3 to 2, somewhat more than half of it free."""
    columns = math.ceil(math.sqrt(2.4 * 1.5 * max(count, 1)))
    return columns, max(math.ceil(columns / 1.5), -(-count // columns))


def cell_of(look: Look) -> int:
    """The side of a cell of the map in pixels."""
    return min(max(WIDTH // look.columns, THUMBS[0]), THUMBS[1])


# --- pictures -------------------------------------------------------------------------------------------------------


def thumbnails(
    index: Index, names: Sequence[str], side: int, *, quiet: bool = False
) -> dict[str, Image.Image | str]:
    """By file name each picture, on white, of a clip its middle frame, within `side`; or why there is none."""
    items = {item.file_name: item for item in index}

    def small(name: str) -> Image.Image | str:
        try:
            pixels = decode_array(index.media(items[name]), size=side, frames=2, fit="pad")
        except MediaError as error:
            return error.reason
        except OSError as error:
            return error.strerror or "the file cannot be read"
        return Image.fromarray(flatten(pixels[-1]))

    made: Any = in_order(small, names, index.readers)
    return dict(zip(names, track(made, total=len(names), label="drawing", quiet=quiet), strict=True))


def drawn_map(look: Look, pictures: Mapping[str, Image.Image | str]) -> Image.Image:
    """The files at their cells, RGBA on nothing, so that the ground of a page shows through, dark or light."""
    cell = cell_of(look)
    sheet = np.zeros((look.rows * cell, look.columns * cell, 4), np.uint8)
    for place in look.map:
        picture = pictures[place.file_name]
        y, x = place.row * cell + 2, place.column * cell + 2
        inside = sheet[y : y + cell - 4, x : x + cell - 4]
        inside[..., 3] = 255
        inside[..., :3] = (
            200 if isinstance(picture, str) else np.asarray(picture.resize((cell - 4, cell - 4)))
        )
    return Image.fromarray(sheet)
