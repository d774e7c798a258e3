"""Cleaning a dataset with CLIP: does each caption fit its picture, and what is there twice?

    score     `reverie data score`: the cosine of each caption with its picture, into the index
    dedupe    `reverie data dedupe`: near duplicates by perceptual hash and embedding, all but the best marked
    keep      `reverie data filter` (data/marks.py): what scores too low marked

As DataComp (2304.14108, section 5.1) filters: score everything by a model that was trained elsewhere, keep the best
share. Nothing is deleted; docs/cleaning.md has the measure of what it brings.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.data.alone import exclusively
from reverie.data.duplicates import COSINE, DISTANCE, Copy, find_copies, hash_items
from reverie.data.embeddings import Embeddings
from reverie.data.index import Caption, Index, Item
from reverie.data.marks import mark, unmarked
from reverie.data.pixels import Bad
from reverie.data.preparing import Pool, prepared
from reverie.errors import InputError
from reverie.media import MediaError, decode_array
from reverie.pictures import grid, stack
from reverie.recipes.parts import capable
from reverie.recipes.search import embed_pictures, every_file, everywhere, key_of, the_same

EACH = "caption_scores_{}"  # column of the index: the score of each caption, in the order of `captions`
DONE = "scored_{}"  # column: what the scores were made of
TEXTS = 256  # captions of a batch
FEW = 8 * TEXTS  # captions that are embedded sooner than workers start
WAYS = ("both", "hash", "embedding")


@exclusively("reverie data score")
@torch.no_grad()
def score(
    folder: str | Path,
    *,
    model: str | Path = "clip-stickers",
    name: str = "clip",
    language: str | None = None,
    device: str | None = None,
    pool: Pool | None = None,
    quiet: bool = False,
) -> tuple[int, int, tuple[Bad, ...]]:
    """Score every item that has captions; returns how many were scored now, how many before, and the files left out.

    `score_NAME` is the mean cosine of the item's captions with its picture (of a clip: each with its best frame):
    training draws any of them, and the mean tells wrong captions better than the best does (docs/cleaning.md).
    `caption_scores_NAME` lists each caption's, in the index's order, null where it is not counted. language: only
    captions in this language count, where the model reads no other. What was scored by the same model with the same
    captions is not scored again. Marked items are scored too, as they may be taken back. pool: workers that embed.
    InputError: no index, nothing with captions, a model that cannot read.
    """
    if not name.replace("_", "").isalnum():
        raise InputError(f"A score cannot be called {name!r}: use letters, digits and _.")
    index = Index.read(folder)
    index.refuse_remote()
    wanted = [item for item in index if (item.reject is None or item.marked) and _texts(item, language)]
    if not wanted:
        has = "a caption" if language is None else f"a caption in {language!r}"
        raise InputError(
            f"Nothing in {folder} is accepted and has {has}: look at `reverie data check {folder}`."
        )
    clip = capable(model, "embed_text", device=device if pool is None else "cpu")
    key = key_of(clip)
    todo = [
        item
        for item in wanted
        if index.extra_of(item.file_name).get(DONE.format(name)) != _done(item, key, language)
    ]
    if not todo:
        return 0, len(wanted), ()
    found = embed_pictures(
        clip, index.folder, [item.file_name for item in todo], index=index, present=every_file(index),
        pool=pool, model=model, device=device, quiet=quiet,
    )  # fmt: skip
    if not found.vectors.isfinite().all():
        raise InputError(
            f"The embeddings kept in {found.place} are broken: delete that folder and score again."
        )
    items = {item.file_name: item for item in todo}
    each = cosines(clip, items, found, language=language, pool=pool, model=model, device=device, quiet=quiet)
    done = {file_name: _done(items[file_name], key, language) for file_name in each}
    fresh = Index.read(folder)  # somebody may have written it meanwhile
    mean = {file_name: statistics.mean(s for s in own if s is not None) for file_name, own in each.items()}
    fresh.items = [
        replace(item, scores=item.scores | {name: mean[item.file_name]}) if item.file_name in mean else item
        for item in fresh
    ]
    import pyarrow as pa

    columns: dict[str, tuple[Any, dict[str, Any]]] = {
        EACH.format(name): (pa.list_(pa.float64()), each),
        DONE.format(name): (pa.string(), done),
    }
    fresh.with_columns(columns).write()
    return len(each), len(wanted) - len(todo), found.bad


@torch.no_grad()
def cosines(
    clip: Any,
    items: Mapping[str, Item],
    found: Embeddings,
    *,
    language: str | None = None,
    pool: Pool | None = None,
    model: str | Path = "",
    device: str | None = None,
    quiet: bool = False,
) -> dict[str, list[float | None]]:
    """Of each item, by file name, the cosine of each caption with its picture, of a clip with the frame that fits best.

    In the order of `captions`, None for one that is not counted. found: embeddings by `clip`, of these and of others;
    what has none has no cosines. language, pool, model, device: as `score` has them.
    """
    shown = [items[name] for name in found.names if name in items]
    texts = sorted({text for item in shown for text in _texts(item, language)})
    key = key_of(clip)
    far = pool if len(texts) > FEW else None
    start = partial(_Words, clip) if far is None else partial(_words, everywhere(model), key, device)
    vectors: dict[str, Tensor] = {}
    for share in prepared(
        [(text,) for text in texts], start, pool=far, share=TEXTS, threads=1, label="reading", quiet=quiet
    ):
        if share.killed:
            raise InputError(f"The captions cannot be embedded: {next(iter(share.killed.values()))}.")
        vectors |= {text: own for (text,), own in zip(share.good, share.tensors["words"], strict=True)}
    rows = torch.bincount(found.file, minlength=len(found.names)).tolist()
    each: dict[str, list[float | None]] = {}
    for file_name, own in zip(found.names, found.vectors.split(rows), strict=True):
        if file_name in items and (texts := _texts(items[file_name], language)):
            wording = torch.stack([vectors[text] for text in texts])
            best = iter((wording @ own.float().T).amax(1).tolist())
            each[file_name] = [
                next(best) if _counts(c, language) else None for c in items[file_name].captions
            ]
    return each


def kept_scores(
    index: Index, item: Item, *, name: str = "clip", key: str | None = None, language: str | None = None
) -> list[float | None] | None:
    """What `score` has written of an item's captions, one for each; None: nothing that is still true.

    key: only what the model of this fingerprint wrote, of these captions, counting those in `language`.
    """
    row = index.extra_of(item.file_name)
    scores = row.get(EACH.format(name))
    if not isinstance(scores, list) or len(scores) != len(item.captions):
        return None
    if not all(score is None or isinstance(score, float) for score in scores):
        return None  # somebody else's column of this name
    if key is not None and row.get(DONE.format(name)) != _done(item, key, language):
        return None
    return scores


class _Words:
    """The preparation of texts: jobs are (text,), rows their unit vectors."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip

    def load(self, job: tuple[str]) -> str:
        return job[0]

    @torch.no_grad()
    def make(self, loaded: Iterable[str]) -> dict[str, Tensor]:
        return {"words": F.normalize(self.clip.embed_text(list(loaded)).float().cpu(), dim=-1)}


def _words(model: str, key: str, device: str | None) -> _Words:
    return _Words(the_same(capable(model, "embed_text", device=device), model, key))


def _counts(caption: Caption, language: str | None) -> bool:
    return bool((caption.text or "").strip()) and language in (None, caption.language)


def _texts(item: Item, language: str | None) -> list[str]:
    return [caption.text for caption in item.captions if _counts(caption, language)]


def _done(item: Item, key: str, language: str | None) -> str:
    words = "\x1f".join((key, str(language), item.hash, *(caption.text for caption in item.captions)))
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()


@exclusively("reverie data dedupe")
def dedupe(
    folder: str | Path,
    *,
    by: str = "both",
    distance: float = DISTANCE,
    cosine: float = COSINE,
    model: str | Path = "clip-stickers",
    device: str | None = None,
    quiet: bool = False,
) -> tuple[list[list[Copy]], tuple[Bad, ...]]:
    """Mark all but the best of each group of near duplicates; returns the groups and the files left out.

    by: "hash", "embedding", or "both", where a pair must pass both. What `data filter` marked is compared too, and
    keeps its mark. It starts from the items without its own marks. InputError: an unknown `by`, a limit out of range.
    """
    if by not in WAYS:
        raise InputError(f"Duplicates are not found by {by!r}: use {', '.join(WAYS)}.")
    index = Index.read(folder)
    index.refuse_remote()
    items = [item for item in unmarked(index, "dedupe") if item.reject is None or item.marked]
    if not items:
        raise InputError(f"No file of {folder} is accepted: look at `reverie data check {folder}`.")
    hashes: list[np.ndarray] | None = None
    embeddings: list[Tensor] | None = None
    bad: list[Bad] = []
    if by != "embedding":
        found = hash_items(index, items, quiet=quiet)
        bad += [Bad(name, why) for name, why in found.items() if isinstance(why, str)]
        items = [item for item in items if not isinstance(found[item.file_name], str)]
        hashes = [np.asarray(found[item.file_name]) for item in items]
    if by != "hash":
        clip = capable(model, "embed_image", device=device)
        seen = embed_pictures(
            clip,
            index.folder,
            [item.file_name for item in items],
            index=index,
            present=every_file(index),
            quiet=quiet,
        )
        bad += seen.bad
        rows = torch.bincount(seen.file, minlength=len(seen.names)).tolist()
        own = dict(zip(seen.names, seen.vectors.split(rows), strict=True))
        if hashes is not None:
            hashes = [h for h, item in zip(hashes, items, strict=True) if item.file_name in own]
        items = [item for item in items if item.file_name in own]
        embeddings = [own[item.file_name] for item in items]
    groups = find_copies(items, hashes=hashes, embeddings=embeddings, distance=distance, cosine=cosine)
    fresh = Index.read(folder)
    other = {item.file_name for item in fresh if item.marked not in (None, "dedupe")}
    copies = [copy for group in groups for copy in group]
    mark(fresh, "dedupe", {c.item.file_name: str(c) for c in copies if c.item.file_name not in other})
    return groups, tuple(bad)


def copies_sheet(folder: Path, groups: Sequence[Sequence[Copy]], path: Path, *, most: int = 60) -> Path:
    """Up to `most` groups as one PNG, leaks first: what is kept, and what is marked with the signs that found it."""
    ranked = sorted(groups, key=lambda group: not any(copy.leak for copy in group))[:most]
    if not ranked:
        raise InputError(f"There are no near duplicates in {folder} to show: no sheet was written.")
    index = Index(folder, [])
    shown, titles = [], []
    columns = min(8, 1 + max(len(group) for group in ranked))
    for group in ranked:
        kept = group[0].original
        row = [(kept, f"kept {kept.width}x{kept.height} {kept.split} {kept.file_name}")]
        for copy in group[: columns - 1]:
            signs = str(copy).rpartition(" (")[2].rstrip(")")
            row.append((copy.item, f"{'LEAK ' * copy.leak}{signs} {copy.item.file_name}"))
        for item, title in row:
            try:
                shown.append(decode_array(index.media(item), size=112, frames=1, fit="pad")[0])
            except MediaError as error:
                shown.append(np.full((112, 112, 4), 200, np.uint8))
                title = f"{item.file_name}: {error.reason}"
            titles.append(title)
        for _ in range(columns - len(row)):
            shown.append(np.full((112, 112, 4), 255, np.uint8))
            titles.append("")
    more = f", the first {most}" if len(groups) > most else ""
    marked = sum(len(group) for group in groups)
    head = (
        f"near duplicates: {len(groups):,} groups{more}, {marked:,} files marked. What is kept stands left."
    )
    return stack([(head, grid(shown, titles, columns))], path)
