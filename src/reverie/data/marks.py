"""Marks: what `reverie data filter` and `reverie data dedupe` leave out, without touching a file.

A mark is a reason in the index's `reject` that begins with "marked by filter:" or "marked by dedupe:". So everything
that selects accepted items, which is every trainer and every measurement, honours it; `reverie data check` lists marks
apart from broken files; importing again keeps them; and they can be taken back. A command sets its own marks anew each
time, from the state without them, and leaves those of the other: an item has one reason, the first that it was given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from reverie.data.alone import alone, exclusively
from reverie.data.index import MARK_WORDS, SPLITS, Index, Item
from reverie.errors import InputError

DUPLICATE, OF = "duplicate of ", " ("  # a duplicate's reason names the file that is kept between these


def mark(index: Index, by: str, reasons: Mapping[str, str]) -> Index:
    """The whole index with the marks of `by` on these files alone (file name -> reason), written."""
    items = [
        replace(item, reject=f"{MARK_WORDS}{by}: {reasons[item.file_name]}")
        if item.file_name in reasons
        else item
        for item in unmarked(index, by)
    ]
    marked = Index(index.folder, items, extra=index.extra)
    marked.write()
    return marked


def unmarked(index: Index, by: str) -> list[Item]:
    """Every item as it is without the marks of `by`."""
    return [replace(item, reject=None) if item.marked == by else item for item in index]


def undo(folder: str | Path, by: str) -> int:
    """Takes back the marks of `by` ("filter" or "dedupe"), and returns how many there were."""
    with alone(folder, f"reverie data {by}"):
        index = Index.read(folder)
        count = sum(item.marked == by for item in index)
        if count:
            mark(index, by, {})
        return count


@exclusively("reverie data filter")
def keep(
    folder: str | Path,
    *,
    share: float | None = None,
    above: float | None = None,
    score: str = "clip",
    split: str = "train",
) -> tuple[int, int, int]:
    """Marks the items of a split that score too low; returns how many are kept, marked, and have no score.

    Either `share` (in (0, 1], of the items that have the score: the best, the first among equals) or `above` (the
    least score that is kept). Items that have no such score stay. It starts from the split without its own
    marks; those of other splits stay. InputError: neither or both are given, a share outside (0, 1], or nothing has
    this score.
    """
    if (share is None) == (above is None):
        raise InputError(
            "Say what to keep: either a share, such as --keep 0.3, or --above and the least score."
        )
    if share is not None and not 0 < share <= 1:
        raise InputError(f"keep is {share:g}: give a share above 0 and up to 1, such as 0.3.")
    if split not in SPLITS:
        raise InputError(f"Unknown split {split!r}: use one of {', '.join(SPLITS)}.")
    if above is not None and not math.isfinite(above):
        raise InputError(f"above is {above}: give the least score that stays, such as 0.2.")
    index = Index.read(folder)
    items = [item for item in unmarked(index, "filter") if item.reject is None and item.split == split]
    scored = [item for item in items if score in item.scores]
    if not scored:
        there = sorted({name for item in items for name in item.scores})
        have = f"its scores are {', '.join(there)}" if there else "it has no scores"
        raise InputError(
            f"No accepted item of split {split} in {folder} has a score {score!r} ({have}): run `reverie data score`."
        )
    if share is not None:
        ranked = sorted(scored, key=lambda item: -item.scores[score])  # stable: the first among equals stay
        low = ranked[max(round(share * len(ranked)), 1) :]
        why = f"is not among the best {share:.4g} of {len(ranked):,}"
    else:
        assert above is not None
        low = [item for item in scored if not item.scores[score] >= above]
        why = f"is below {above:g}"
    others = {
        item.file_name: str(item.reject).removeprefix(f"{MARK_WORDS}filter: ")
        for item in index
        if item.marked == "filter" and item.split != split
    }
    mine = {item.file_name: f"score_{score} {item.scores[score]:.4f} {why}" for item in low}
    mark(index, "filter", others | mine)
    return len(scored) - len(low), len(low), len(items) - len(scored)


def still_marked(items: list[Item], before: Mapping[str, str]) -> list[Item]:
    """Without the marks of duplicates whose original is there no more, so that no content is lost with it.

    before: file name -> hash when the marks were made; an original with another content is another picture.
    """
    sound = {
        item.file_name
        for item in items
        if (item.reject is None or item.marked == "filter")
        and before.get(item.file_name, item.hash) == item.hash
    }
    return [
        replace(item, reject=None)
        if item.marked == "dedupe" and _original(str(item.reject)) not in sound
        else item
        for item in items
    ]


def _original(reason: str) -> str:
    return reason.partition(DUPLICATE)[2].rpartition(OF)[0]
