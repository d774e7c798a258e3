"""What a dataset holds, in numbers that are read off its index alone: `reverie data report` draws them.

Files are counted by what has become of them; sizes, captions, scores and copies are those of the accepted files, which
is what anybody learns from. Lengths of captions are in words, or in characters (without spaces) where a language is
written without spaces. A number that is not finite is counted apart and enters nothing else.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from reverie.data.index import MARK_WORDS, Caption, Index, Item, style_of
from reverie.errors import InputError

BARS = 24  # of a histogram, at most
FEW = 12  # values that have a bar each, far from each other as they may be
WIDE = 100  # times the least value; what reaches further is counted in the logarithm
LISTED = 40  # words, captions, labels, sources
WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my", "bo")
KINDS = {None: "people's", "short": "synthetic, short", "long": "synthetic, long", "tags": "synthetic, tags"}
SMALL = {"a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "in", "into", "is", "it", "its",
         "of", "on", "or", "that", "the", "their", "there", "this", "to", "with"}  # fmt: skip

Counts = tuple[tuple[str, int], ...]  # what, and how often, the commonest first


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How numbers are spread, all of them finite.

    bars: (from, to, how many) in order. A bar counts what is below its end, the last bar also what is its end; a bar
    whose ends are equal is of that value alone. log: the bars are equally wide in the logarithm.
    """

    count: int
    least: float
    median: float
    mean: float
    most: float
    bars: tuple[tuple[float, float, int], ...]
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why files are left out, or captions dropped: (file name, reason), or (file name, the caption)."""

    reason: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Some of the captions: of a language, a source or a kind. Lengths are None where no caption is so counted."""

    name: str
    captions: int
    files: int
    words: Spread | None
    characters: Spread | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score column. `without`: accepted files that have none; `odd`: those whose score is not finite."""

    name: str
    without: int
    odd: int
    spread: Spread | None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What an index holds; all but the first four numbers, `rejected` and `marked` is of accepted files.

    folder: the name of its folder, or its address.
    """

    folder: str
    total: int
    accepted: int
    left_out: int  # rejected, their files being unsound
    set_aside: int  # marked, which can be taken back
    pictures: int
    clips: int
    bytes: int
    splits: Counts
    rejected: tuple[Reason, ...]
    marked: tuple[Reason, ...]  # by the command that did it

    sizes: dict[str, Spread]  # width, height, megapixels, aspect, bytes
    shapes: Counts  # "640 x 480"
    clip_lengths: dict[str, Spread]  # frames, frame rate, seconds

    captions: int
    distinct: int  # captions that differ
    captions_each: Spread | None  # how many a file has
    without_captions: int
    languages: tuple[Wording, ...]
    sources_of_captions: tuple[Wording, ...]
    kinds: tuple[Wording, ...]
    dropped: tuple[Reason, ...]
    words: dict[
        str, Counts
    ]  # by language: in how many files the commonest are; pairs of letters without spaces
    repeated: Counts  # captions that more than one file has: how many have it

    sources: Counts
    labels: Counts  # the commonest
    labels_in_all: int
    unlabelled: int
    licences: Counts

    scores: tuple[Score, ...]

    copies: tuple[tuple[str, ...], ...]  # files with the same bytes
    across: tuple[tuple[str, ...], ...]  # those that are in more than one split
    duplicates: int  # what `data dedupe` marked
    leaks: int  # of these, copies in training of what is held out


def contents_of(index: Index) -> Contents:
    """The numbers of an index, rejected files and all. InputError: it lists no file at all."""
    if not len(index):
        raise InputError(
            f"The index of {index.folder} lists no file, so there is nothing to report: import the folder again."
        )
    accepted = [item for item in index if item.reject is None]
    unsound = [item for item in index if item.reject is not None and not item.marked]
    marked = [item for item in index if item.marked]
    clips = [item for item in accepted if (item.frames or 1) > 1]
    said = [(item, caption) for item in accepted for caption in item.captions]
    dedupe = [str(item.reject).partition(": ")[2] for item in marked if item.marked == "dedupe"]
    labels = Counter(item.label for item in accepted if item.label)
    copies = _copies(accepted)
    splits = {item.file_name: item.split for item in accepted}
    return Contents(
        folder=index.folder.resolve().name if index.origin is None else str(index.origin),
        total=len(index),
        accepted=len(accepted),
        left_out=len(unsound),
        set_aside=len(marked),
        pictures=len(accepted) - len(clips),
        clips=len(clips),
        bytes=sum(item.bytes or 0 for item in accepted),
        splits=_commonest(Counter(str(item.split) for item in accepted)),
        rejected=reasons((item.file_name, str(item.reject)) for item in unsound),
        marked=tuple(
            Reason(
                reason=f"{MARK_WORDS}{by}",
                files=tuple((i.file_name, str(i.reject).partition(": ")[2]) for i in marked if i.marked == by),
            )
            for by in sorted({str(item.marked) for item in marked})
        ),
        sizes=_sizes(accepted),
        shapes=_commonest(Counter(f"{item.width} x {item.height}" for item in accepted)),
        clip_lengths=_clip_lengths(clips),
        captions=len(said),
        distinct=len({caption.text for _, caption in said}),
        captions_each=spread(len(item.captions) for item in accepted),
        without_captions=sum(not item.captions for item in accepted),
        languages=_wordings(said, lambda caption: caption.language or "not told"),
        sources_of_captions=_wordings(said, lambda caption: caption.source or "not told"),
        kinds=_wordings(said, lambda caption: KINDS[style_of(caption.source or "")]),
        dropped=_dropped(accepted),
        words=_words(accepted),
        repeated=_repeated(accepted),
        sources=_commonest(Counter(item.source or "not told" for item in accepted)),
        labels=_commonest(labels),
        labels_in_all=len(labels),
        unlabelled=sum(not item.label for item in accepted),
        licences=_commonest(Counter(item.licence or "not told" for item in accepted)),
        scores=_scores(accepted),
        copies=copies,
        across=tuple(group for group in copies if len({splits[name] for name in group}) > 1),
        duplicates=len(dedupe),
        leaks=sum(reason.startswith("leak ") for reason in dedupe),
    )  # fmt: skip


# --- numbers --------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float]) -> Spread | None:
    """How the finite ones among `values` are spread; None where there are none."""
    every = np.asarray([float(value) for value in values], np.float64)
    every = np.sort(every[np.isfinite(every)])
    if not len(every):
        return None
    low, high = float(every[0]), float(every[-1])
    # Near the largest numbers that there are, sums and differences would overflow.
    scale = 1.0 if max(abs(low), abs(high)) < 1e100 else max(abs(low), abs(high))
    log = low > 0 and high / scale >= WIDE * (low / scale)
    return Spread(
        count=len(every),
        least=low,
        median=float(np.median(every / scale)) * scale,
        mean=min(max(float((every / scale).mean()) * scale, low), high),
        most=high,
        bars=_bars(every, scale, log),
        log=log,
    )


def _bars(values: np.ndarray, scale: float, log: bool) -> tuple[tuple[float, float, int], ...]:
    """Of sorted finite values: one bar a value where there are few, of whole numbers with the gaps between them."""
    low, high = float(values[0]), float(values[-1])
    whole = bool((values == np.round(values)).all()) and scale == 1.0
    if whole and high - low < BARS:
        return tuple((at, at, int((values == at).sum())) for at in np.arange(low, high + 1).tolist())
    own, counts = np.unique(values, return_counts=True)
    if len(own) == 1 or (len(own) <= FEW and 2 * len(own) <= len(values)):
        return tuple((at, at, count) for at, count in zip(own.tolist(), counts.tolist(), strict=True))
    if log:
        edges = np.exp(np.linspace(np.log(low), np.log(high), BARS + 1))
        edges[0], edges[-1] = low, high
    elif whole:
        step = -(-(high - low + 1) // BARS)
        edges = np.arange(low, high + step + 1, step)
    else:
        edges = np.linspace(low / scale, high / scale, BARS + 1) * scale
        edges[0], edges[-1] = low, high
    edges = np.unique(
        edges if whole and not log else edges.clip(low, high)
    )  # rounding may disorder the narrowest
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    return tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


def _commonest(counts: Counter[str], most: int = LISTED) -> Counts:
    return tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most])


def _present(spreads: dict[str, Spread | None]) -> dict[str, Spread]:
    return {name: one for name, one in spreads.items() if one is not None}


# --- files ----------------------------------------------------------------------------------------------------------


def reasons(files: Iterable[tuple[str, str]]) -> tuple[Reason, ...]:
    """(file name, reason) by reason, the commonest first; reasons that differ in their numbers alone are one."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, reason in files:
        found[_without_numbers(reason)].append((name, reason))
    named = [
        Reason(reason=own[0][1] if len({reason for _, reason in own}) == 1 else general, files=tuple(own))
        for general, own in found.items()
    ]
    return tuple(sorted(named, key=lambda one: (-len(one.files), one.reason)))


def _without_numbers(reason: str) -> str:
    return re.sub(r"\d+(?:[.,]\d+)*", "…", reason)


def _sizes(items: Sequence[Item]) -> dict[str, Spread]:
    sides = [(item.width, item.height) for item in items if (item.width or 0) > 0 and (item.height or 0) > 0]
    return _present({
        "width": spread(width for width, _ in sides),
        "height": spread(height for _, height in sides),
        "megapixels": spread(width * height / 1e6 for width, height in sides),
        "aspect": spread(width / height for width, height in sides),
        "bytes": spread(item.bytes for item in items if item.bytes is not None),
    })  # fmt: skip


def _clip_lengths(clips: Sequence[Item]) -> dict[str, Spread]:
    timed = [item for item in clips if item.fps is not None and np.isfinite(item.fps) and item.fps > 0]
    return _present({
        "frames": spread(item.frames for item in clips),
        "frame rate": spread(item.fps for item in timed),
        "seconds": spread(item.frames / item.fps for item in timed),
    })  # fmt: skip


def _copies(items: Sequence[Item]) -> tuple[tuple[str, ...], ...]:
    same: dict[str, list[str]] = defaultdict(list)
    for item in items:
        if item.hash:
            same[item.hash].append(item.file_name)
    return tuple(
        sorted((tuple(group) for group in same.values() if len(group) > 1), key=lambda g: (-len(g), g))
    )


def _scores(items: Sequence[Item]) -> tuple[Score, ...]:
    found = []
    for name in sorted({name for item in items for name in item.scores}):
        own = [item.scores[name] for item in items if name in item.scores]
        one = spread(own)
        finite = one.count if one is not None else 0
        found.append(Score(name=name, without=len(items) - len(own), odd=len(own) - finite, spread=one))
    return tuple(found)


# --- captions -------------------------------------------------------------------------------------------------------


def spaced(language: str | None) -> bool:
    """Whether a language puts spaces between its words."""
    return (language or "").lower().replace("_", "-").partition("-")[0] not in WITHOUT_SPACES


def length(caption: Caption) -> int:
    """In words, or in characters where the language has no spaces."""
    parts = (caption.text or "").split()
    return len(parts) if spaced(caption.language) else sum(map(len, parts))


def _wordings(said: Sequence[tuple[Item, Caption]], name_of: Callable[[Caption], str]) -> tuple[Wording, ...]:
    groups: dict[str, list[tuple[Item, Caption]]] = defaultdict(list)
    for item, caption in said:
        groups[name_of(caption)].append((item, caption))
    found = [
        Wording(
            name=name,
            captions=len(own),
            files=len({item.file_name for item, _ in own}),
            words=spread(length(caption) for _, caption in own if spaced(caption.language)),
            characters=spread(length(caption) for _, caption in own if not spaced(caption.language)),
        )
        for name, own in groups.items()
    ]
    return tuple(sorted(found, key=lambda one: (-one.captions, one.name)))


def _dropped(items: Sequence[Item]) -> tuple[Reason, ...]:
    """By reason, with the caption in the place of the reason."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for item in items:
        for caption in item.dropped:
            found[_without_numbers(caption.reason or "not told")].append((item.file_name, caption.text or ""))
    named = [Reason(reason=reason, files=tuple(own)) for reason, own in found.items()]
    return tuple(sorted(named, key=lambda one: (-len(one.files), one.reason)))


def _words(items: Sequence[Item]) -> dict[str, Counts]:
    """By language, the most used language first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    used: Counter[str] = Counter()
    for item in items:
        own: dict[str, set[str]] = defaultdict(set)
        for caption in item.captions:
            language = caption.language or "not told"
            used[language] += 1
            own[language] |= _words_of(caption)
        for language, words in own.items():
            counts[language].update(words)
    return {language: _commonest(counts[language]) for language, _ in _commonest(used) if counts[language]}


def _words_of(caption: Caption) -> set[str]:
    runs = re.findall(r"\w+(?:['’]\w+)*", (caption.text or "").casefold())
    if spaced(caption.language):
        return {word for word in runs if word not in SMALL}
    return {run[i : i + 2] for run in runs for i in range(max(len(run) - 1, 1))}


def _repeated(items: Sequence[Item]) -> Counts:
    counts = Counter(
        text
        for item in items
        for text in {" ".join((caption.text or "").split()) for caption in item.captions}
    )
    return _commonest(Counter({text: count for text, count in counts.items() if count > 1 and text}))
