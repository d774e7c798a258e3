"""`reverie search`: the pictures and clips of a folder that fit words, pictures, or both, by a model's embeddings.

The rule of combination: a query's vector is the sum of the unit vectors of its words, of what is added (`plus`) and,
times `image_weight`, of its pictures, less `minus_weight` times those of what is taken away (`minus`), brought to
length 1. A score is the cosine with a file's vector. A clip scores by its best frame, not by the mean of its frames:
what is seen for one second of a minute is there, and the answer can say when.

Words and pictures lie in two parts of the space, so the scores of a query in words and of one by a picture do not
compare, and where both are asked the picture decides more; a smaller `image_weight` gives words more say. The vectors
of two wordings are close to each other, and a difference of equals keeps little of either; hence half for `minus`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.data import neighbours
from reverie.data.embeddings import (
    FRAMES,
    Embedder,
    Embeddings,
    embed_folder,
    fingerprint,
    frames_of,
    media_below,
)
from reverie.data.index import FILE, Index, Item
from reverie.data.preparing import Pool
from reverie.data.remote import address, local, opened
from reverie.errors import InputError
from reverie.evals.retrieval import search_topk
from reverie.media import MediaError, Part, decode_array
from reverie.pictures import grid, stack
from reverie.recipes.parts import capable, check_embeds
from reverie.systems.clip import Clip

EXACT = 5_000_000  # vectors that are searched exactly; beyond, faiss looks into a part of them


class Embeds(Protocol):
    """A system that gives pictures vectors, such as CLIP or the classifier."""

    config: Any

    def prepare(self, images: Sequence[Any]) -> Tensor | list[Tensor]: ...

    def embed_image(self, images: Any) -> Tensor: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to look for."""

    words: str = ""
    plus: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    minus_images: tuple[Path, ...] = ()
    image_weight: float = 1.0
    minus_weight: float = 0.5

    def __str__(self) -> str:
        parts = [f'"{text}"' for text in (*filter(None, [self.words]), *self.plus)]
        parts += [path.name for path in self.images]
        text = " + ".join(parts)
        taken = [f'"{text}"' for text in self.minus] + [path.name for path in self.minus_images]
        return " - ".join(filter(None, [text, *taken])) if text else f"- {' - '.join(taken)}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file that was found. `seconds`: where in a clip its best frame stands; None of a picture. `frame`: which."""

    name: str
    score: float
    seconds: float | None
    frame: int


def embed_pictures(
    system: Embeds,
    folder: Path,
    names: Sequence[str],
    *,
    index: Index | None = None,
    present: Collection[str],
    dtype: str = "float16",
    pool: Pool | None = None,
    model: str | Path = "",
    device: str | None = None,
    quiet: bool = False,
) -> Embeddings:
    """The embeddings of the files `names` of a folder by a system; `present`: all whose embeddings are kept there.

    pool: workers, each of which loads the `model`, which `system` is, to `device`.
    """
    key = key_of(system)
    if pool is None:
        start = partial(_embedder, system, media_of(folder, index), dtype)
    else:
        start = partial(embedder, everywhere(model), everywhere(folder), key, dtype, device)
    return embed_folder(
        folder, names, key=key, start=start, index=index, present=present, dtype=dtype, pool=pool, quiet=quiet
    )


def _embedder(system: Embeds, media: Callable[[str], Path | Part], dtype: str) -> Embedder:
    check_embeds(system)
    return Embedder(media=media, prepare=system.prepare, embed=system.embed_image, dtype=dtype)


def embedder(model: str, folder: str, key: str, dtype: str, device: str | None) -> Embedder:
    """A worker's own model, which must be what `key` says. InputError: it is another, or the folder is not there."""
    media = media_of(seen(folder))
    return _embedder(the_same(capable(model, "embed_image", device=device), model, key), media, dtype)


def the_same(system: Any, model: str, key: str) -> Any:
    """`system`, if its weights are those of the fingerprint `key`. InputError: they are not."""
    if key_of(system) != key:
        raise InputError(f"{model} is another model here than where the command was started: copy it here.")
    return system


def media_of(folder: Path, index: Index | None = None) -> Callable[[str], Path | Part]:
    """From the names of files to what decoders open: a file, or, as the folder's index says, a part of a tar."""
    if index is None and (folder / FILE).exists():
        index = Index.read(folder)
    if index is None:
        return folder.__truediv__
    packed = {item.file_name: part for item in index if isinstance(part := index.media(item), Part)}
    return lambda name: packed.get(name, folder / name)


def seen(folder: str) -> Path:
    """A folder that this machine sees, or of an address that where its index lies now. InputError: it does not."""
    if address(folder) is not None:
        return local(folder)
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder} is not on this machine: every machine must see the folder under the same name."
        )
    return Path(folder)


def everywhere(name_or_folder: str | Path) -> str:
    """What workers shall call a model or folder, wherever they are started; names of shipped models stay.

    A folder that holds the index of an address is called by that: it is in the cache of this process alone.
    """
    if (origin := opened(Path(name_or_folder))) is not None:
        return str(origin)
    return os.path.abspath(name_or_folder) if Path(name_or_folder).exists() else str(name_or_folder)


def embed(
    folder: Path,
    *,
    model: str = "clip-stickers",
    dtype: str = "float16",
    pool: Pool | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Embeddings:
    """Embed all that `reverie search` searches in a folder, and keep it there. InputError: no such folder or model."""
    system = capable(model, "embed_image", device=device if pool is None else "cpu")
    index, names = searched(folder)
    present = set(names) if index is None else every_file(index)
    return embed_pictures(
        system,
        local(folder),
        names,
        index=index,
        present=present,
        dtype=dtype,
        pool=pool,
        model=model,
        device=device,
        quiet=quiet,
    )


def searched(folder: Path) -> tuple[Index | None, list[str]]:
    """The index of a folder, if it has one, and every picture and clip there, in the index or not, but for marked ones.

    InputError: there is no such folder.
    """
    folder = local(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder that holds the pictures.")
    index = Index.read(folder) if (folder / FILE).exists() else None
    known = [item for item in index or () if item.reject is None and _there(index, item)]
    marked = {item.file_name for item in index or () if item.marked}
    return index, sorted({*media_below(folder), *(item.file_name for item in known)} - marked)


def every_file(index: Index) -> set[str]:
    """What the index knows of and what else is in its folder."""
    return {item.file_name for item in index} | set(media_below(index.folder))


def key_of(system: Any) -> str:
    """The fingerprint of a system's weights and configuration."""
    return fingerprint(system.state_dict(), type(system).__name__, system.config)


def open_folder(
    clip: Clip, folder: Path, *, sources: Sequence[str] = (), split: str | None = None, quiet: bool = False
) -> tuple[Embeddings, dict[str, Item]]:
    """The embeddings to search, and the items of the index by file name where there is one.

    Every picture and clip of the folder is searched, in the index or not, with a caption or not, but for what is
    marked; with filters, what the index has of them. InputError: no folder, filters without an index, or nothing that
    can be read.
    """
    folder = local(folder)
    index, names = searched(folder)
    if index is None and (sources or split):
        raise InputError(
            f"{folder} has no index, so no sources or splits: run `reverie data import {folder}`."
        )
    if index is not None and (sources or split):
        names = [item.file_name for item in index.select(split=split, sources=sources or None)]
        if not names:
            have = ", ".join(sorted({str(item.source) for item in index if item.source})) or "none is named"
            raise InputError(
                f"No accepted file of {folder} is of the split and sources asked for; sources: {have}."
            )
    present = set(names) if index is None else every_file(index)
    found = embed_pictures(clip, folder, names, index=index, present=present, quiet=quiet)
    seen = set(found.names)
    by_name = {item.file_name: item for item in index or () if item.file_name in seen}
    if not found.names:
        why = f" ({found.bad[0].path}: {found.bad[0].reason})" if found.bad else ""
        raise InputError(f"{folder} holds no picture that can be read{why}: give a folder with pictures.")
    return found, by_name


@torch.no_grad()
def vectors_of(clip: Clip, queries: Sequence[Query]) -> Tensor:
    """The unit vector of each query, `q d`; a clip that is asked with counts by the mean of its frames.

    InputError: a query asks for nothing, its parts cancel out, or its picture cannot be read.
    """
    texts = sorted({text for q in queries for text in (*filter(None, [q.words]), *q.plus, *q.minus)})
    paths = sorted({path for q in queries for path in (*q.images, *q.minus_images)})
    parts: dict[str | Path, Tensor] = {}
    if texts:
        parts |= zip(texts, F.normalize(clip.embed_text(texts).float(), dim=-1), strict=True)
    for path in paths:
        pictures, _ = frames_of(path)
        own = F.normalize(clip.embed_image(pictures).float(), dim=-1)
        parts[path] = F.normalize(own.mean(0), dim=-1)
    rows = []
    for q in queries:
        added = [parts[text] for text in (*filter(None, [q.words]), *q.plus)]
        added += [q.image_weight * parts[path] for path in q.images]
        added += [-q.minus_weight * parts[text] for text in q.minus]
        added += [-q.minus_weight * q.image_weight * parts[path] for path in q.minus_images]
        if not added:
            raise InputError("Say what to look for: words, --plus, --minus, or --image.")
        whole = torch.stack(added).sum(0)
        if whole.norm() < 1e-4:
            raise InputError(f"The parts of the query {q} cancel out: nothing is left to look for.")
        rows.append(F.normalize(whole, dim=-1))
    return torch.stack(rows)


def search(
    clip: Clip, embeddings: Embeddings, queries: Sequence[Query], *, top: int = 10, approximate: bool = False
) -> list[list[Found]]:
    """The `top` files for each query, best first; exact, the earlier file first among equals.

    approximate: by faiss, as beyond EXACT vectors where it is installed. InputError: `top` below 1, or no faiss.
    """
    if top < 1:
        raise InputError(f"top is {top}: ask for at least one result.")
    asked = vectors_of(clip, queries)
    rows = torch.bincount(embeddings.file, minlength=len(embeddings.names))
    some = min(top * int(rows.max()), len(embeddings.vectors))  # so many rows hold `top` files at least
    if approximate or (len(embeddings.vectors) > EXACT and neighbours.available()):
        scores, places = neighbours.kept(embeddings.vectors, embeddings.digest).topk(asked, some)
    else:
        if len(embeddings.vectors) > EXACT:
            print(f"searching {len(embeddings.vectors):,} vectors exactly: pip install 'reverie[index]' for speed",
                  file=sys.stderr)  # fmt: skip
        scores, places = search_topk(asked, embeddings.vectors, some)
    first = rows.cumsum(0) - rows
    answers = []
    for own, where in zip(scores.cpu().tolist(), places.cpu().tolist(), strict=True):
        found: dict[int, Found] = {}
        for score, row in zip(own, where, strict=True):
            if row < 0 or len(found) == top:
                break
            file = int(embeddings.file[row])
            moving = int(rows[file]) > 1
            found.setdefault(file, Found(
                name=embeddings.names[file], score=score, frame=row - int(first[file]),
                seconds=float(embeddings.seconds[row]) if moving else None,
            ))  # fmt: skip
        answers.append(list(found.values()))
    return answers


@torch.no_grad()
def rerank(
    model: str, folder: Path, queries: Sequence[Query], answers: Sequence[Sequence[Found]], items: dict[str, Item],
    *, top: int, device: str | None = None,
) -> list[list[Found]]:  # fmt: skip
    """The answers to each query again, by the probability that words and picture belong together; the `top` best.

    The score is that probability. Of a clip the frame that was found is looked at. InputError: a query without words,
    since only words can be matched, or one that takes away or adds; or a system that cannot match.
    """
    for query in queries:
        if not query.words or query.plus or query.minus or query.images or query.minus_images:
            raise InputError(
                f"The query {query} is more or less than words, which alone can be looked at again."
            )
    system, index = capable(model, "match", device=device), Index(folder, [])
    out = []
    for query, found in zip(queries, answers, strict=True):
        pictures = []
        for it in found:
            item = items.get(it.name)
            shown, _ = frames_of(index.media(item) if item is not None else folder / it.name)
            pictures.append(shown[min(it.frame, len(shown) - 1)])
        chances = (
            system.match(pictures, [query.words] * len(pictures)).float().cpu().tolist() if found else []
        )
        again = [replace(it, score=chance) for it, chance in zip(found, chances, strict=True)]
        out.append(sorted(again, key=lambda it: -it.score)[:top])
    return out


def _there(index: Index | None, item: Item) -> bool:
    """Whether a file, or the tar that holds it, is there; at an address it is taken to be."""
    assert index is not None
    return index.origin is not None or (index.folder / (item.shard or item.file_name)).is_file()


def sheet(
    path: Path,
    folder: Path,
    queries: Sequence[Query],
    answers: Sequence[Sequence[Found]],
    items: dict[str, Item],
) -> Path:
    """One PNG: each query at the head of what it found, with scores and captions; of clips the best frame."""
    parts, index = [], Index(folder, [])
    for query, found in zip(queries, answers, strict=True):
        shown, titles = [], []
        for it in found:
            item = items.get(it.name)
            try:
                media = index.media(item) if item is not None else folder / it.name
                frames = decode_array(media, size=128, frames=FRAMES, fit="pad")
            except MediaError as error:
                raise InputError(
                    f"{it.name} cannot be shown any more: {error.reason}; search again."
                ) from None
            shown.append(frames[min(it.frame, len(frames) - 1)])
            words = item.captions[0].text if item is not None and item.captions else Path(it.name).stem
            moment = f" at {it.seconds:.1f} s" if it.seconds is not None else ""
            titles.append(f"{it.score:.3f}{moment} {words}")
        parts.append((str(query), grid(shown, titles)))
    return stack(parts, path)
