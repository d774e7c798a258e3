"""What models write and say of many files, in shares: here, or by workers over Ray.

    written    a caption of each file; of a clip those of several frames, merged
    tagged     the words of a list that are most like each file
    judged     how well each of some texts fits its file

A file's caption depends on its bytes, the model and the settings, and not on those beside it: it is drawn with a seed
of its content. What is done share by share is kept in a journal (data/journal.py) by whoever asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reverie import rng
from reverie.data.index import Index, Item, language_of
from reverie.data.preparing import Pool, Share, prepared
from reverie.media import Part, decode_array
from reverie.recipes.asked import Telling
from reverie.recipes.parts import capable, check_embeds
from reverie.recipes.search import everywhere, key_of, media_of, seen, the_same

SHARE = 32  # files: what a stop loses
THEN = {"en": ", then ", "zh": "，然后", "ja": "、それから"}  # between what the frames of a clip show


def pictures(media: str | Path | Part, frames: int = 1) -> list[Image.Image]:
    """A picture; of a clip its middle frame, or so many frames evenly from first to last. MediaError: unreadable."""
    found = decode_array(media, frames=max(frames, 2))
    return [Image.fromarray(one) for one in (found if frames > 1 else found[-1:])]


def merged(texts: Sequence[str]) -> str:
    """What the frames of a clip show, in order, each wording once."""
    texts = list({text.casefold(): text for text in reversed([t.strip() for t in texts])}.values())[::-1]
    texts = [text for text in texts if text]
    return THEN.get(language_of(texts[0]), "; ").join(texts) if texts else ""


def plain(text: str) -> str:
    """A caption as the index holds it: one line that UTF-8 can write, without what steers a terminal."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(c for c in text if c.isprintable() or c in " \n\t\r\u200d\ufe0f").split())


# ---------------------------------------------------------------- captions


def written(
    items: Sequence[Item],
    index: Index,
    *,
    model: str | Path,
    telling: Telling,
    frames: int = 1,
    pool: Pool | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Iterator[tuple[dict[str, str], dict[str, str], dict[str, str]]]:
    """Share by share: the caption of each file, why there is none of others, and which are worth another try.

    InputError: a model that does not describe.
    """
    jobs = [(item.file_name, str(rng.integer(telling.seed, "caption", item.hash))) for item in items]
    start: Callable[[], Writes]
    if pool is None:
        system = capable(model, "caption", device=device)
        start = partial(Writes, system, media_of(index.folder, index), telling, frames)
    else:
        key, how = key_of(capable(model, "caption", device="cpu")), dataclasses.asdict(telling)
        start = partial(writes, everywhere(model), everywhere(index.folder), key, how, frames, device)
    for share in prepared(
        jobs,
        start,
        pool=pool,
        share=SHARE,
        threads=1 if pool is None else None,
        label="describing",
        quiet=quiet,
    ):
        texts = unpacked(share.tensors["texts"]) if share.good else []
        yield ({name: text for (name, _), text in zip(share.good, texts, strict=True)}, *_why(share))


def writes(
    model: str, folder: str, key: str, how: Mapping[str, Any], frames: int, device: str | None
) -> Writes:
    """A worker's own captioner, which must be what `key` says."""
    system = the_same(capable(model, "caption", device=device), model, key)
    return Writes(system, media_of(seen(folder)), Telling(**how), frames)


class Writes:
    """The preparation of captions: jobs are a file's name and its seed, rows UTF-8."""

    def __init__(
        self, system: Any, media: Callable[[str], Path | Part], telling: Telling, frames: int = 1
    ) -> None:
        self.system, self.media, self.telling, self.frames = system, media, telling, frames

    def load(self, job: tuple[str, str]) -> tuple[list[Image.Image], int]:
        name, seed = job
        return pictures(self.media(name), self.frames), int(seed)

    @torch.no_grad()
    def make(self, loaded: Iterable[tuple[list[Image.Image], int]]) -> dict[str, Tensor]:
        several = list(loaded)
        shown = [picture for frames, _ in several for picture in frames]
        seeds = [seed + i for frames, seed in several for i in range(len(frames))]
        found = iter(tell(self.system, shown, self.telling, seeds))
        return {"texts": packed([merged([next(found) for _ in frames]) for frames, _ in several])}


def tell(system: Any, shown: Sequence[Image.Image], telling: Telling, seed: int | Sequence[int]) -> list[str]:
    """A system's captions of pictures, as the flags of `Telling` ask."""
    own = {} if telling.prompt is None else {"prompt": telling.prompt}
    found = system.caption(
        list(shown),
        sampling=telling.sampling, beams=telling.beams, least=telling.least, most=telling.most, p=telling.p, seed=seed,
        **own,
    )  # fmt: skip
    assert len(found) == len(shown), (len(found), len(shown))
    return [plain(text) for text in found]


def tagged(
    items: Sequence[Item],
    index: Index,
    *,
    model: str | Path,
    words: Sequence[str],
    count: int,
    pool: Pool | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Iterator[tuple[dict[str, str], dict[str, str], dict[str, str]]]:
    """As `written`: the `count` of these words whose vectors are most like the file's, the likest first.

    Of a clip the middle frame is looked at. InputError: a model that does not compare.
    """
    start: Callable[[], Tags]
    if pool is None:
        system = capable(model, "embed_text", device=device)
        start = partial(Tags, system, media_of(index.folder, index), tuple(words), count)
    else:
        key = key_of(capable(model, "embed_text", device="cpu"))
        start = partial(tags, everywhere(model), everywhere(index.folder), key, tuple(words), count, device)
    jobs = [(item.file_name,) for item in items]
    for share in prepared(
        jobs, start, pool=pool, share=SHARE, threads=1 if pool is None else None, label="tagging", quiet=quiet
    ):
        rows = share.tensors["chosen"].tolist() if share.good else []
        found = {job[0]: ", ".join(words[i] for i in row) for job, row in zip(share.good, rows, strict=True)}
        yield (found, *_why(share))


def tags(model: str, folder: str, key: str, words: tuple[str, ...], count: int, device: str | None) -> Tags:
    """A worker's own tagger, which must be what `key` says."""
    system = the_same(capable(model, "embed_text", device=device), model, key)
    return Tags(system, media_of(seen(folder)), words, count)


class Tags:
    """The preparation of tags: jobs are a file's name, rows the places of the chosen words."""

    def __init__(
        self, system: Any, media: Callable[[str], Path | Part], words: tuple[str, ...], count: int
    ) -> None:
        check_embeds(system)
        self.system, self.media, self.count = system, media, min(count, len(words))
        with torch.no_grad():
            self.vectors = torch.cat(
                [system.embed_text(list(words[i : i + 256])) for i in range(0, len(words), 256)]
            )

    def load(self, job: tuple[str]) -> Image.Image:
        return pictures(self.media(job[0]))[0]

    @torch.no_grad()
    def make(self, loaded: Iterable[Image.Image]) -> dict[str, Tensor]:
        like = self.system.embed_image(list(loaded)) @ self.vectors.mT
        return {"chosen": like.float().topk(self.count, 1).indices.cpu()}


def packed(texts: Sequence[str]) -> Tensor:
    """Texts as rows of UTF-8, `b n` uint8, filled up with zeros."""
    rows = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    out = np.zeros((len(rows), max(map(len, rows), default=0)), np.uint8)
    for row, one in zip(out, rows, strict=True):
        row[: len(one)] = one
    return torch.from_numpy(out)


def unpacked(rows: Tensor) -> list[str]:
    """`packed` back."""
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]


# ---------------------------------------------------------------- judgements


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a text fits a picture: the probability of a match, and the cosine of their vectors."""

    match: float
    likeness: float


def judged(
    texts: Mapping[str, Sequence[str]],
    index: Index,
    *,
    model: str | Path,
    pool: Pool | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Iterator[tuple[dict[str, list[Fit]], dict[str, str], dict[str, str]]]:
    """Share by share: of each file (name -> texts) how each text fits it, and as `written` the rest.

    Of a clip the middle frame is looked at. InputError: a model that does not match.
    """
    jobs = [(name, *own) for name, own in texts.items() if own]
    start: Callable[[], Judges]
    if pool is None:
        start = partial(Judges, capable(model, "match", device=device), media_of(index.folder, index))
    else:
        key = key_of(capable(model, "match", device="cpu"))
        start = partial(judges, everywhere(model), everywhere(index.folder), key, device)
    for share in prepared(
        jobs, start, pool=pool, share=SHARE, threads=1 if pool is None else None, label="judging", quiet=quiet
    ):
        fits: dict[str, list[Fit]] = {}
        for row, job in enumerate(share.good):
            count = len(job) - 1
            both = (share.tensors[name][row, :count].tolist() for name in ("match", "likeness"))
            fits[job[0]] = [Fit(match=m, likeness=c) for m, c in zip(*both, strict=True)]
        yield (fits, *_why(share))


def judges(model: str, folder: str, key: str, device: str | None) -> Judges:
    """A worker's own filter, which must be what `key` says."""
    return Judges(the_same(capable(model, "match", device=device), model, key), media_of(seen(folder)))


class Judges:
    """The preparation of judgements: jobs are a file's name and texts; rows of each sign, then NaN."""

    def __init__(self, system: Any, media: Callable[[str], Path | Part]) -> None:
        self.system, self.media = system, media

    def load(self, job: tuple[str, ...]) -> tuple[Image.Image, tuple[str, ...]]:
        name, *texts = job
        return pictures(self.media(name))[0], tuple(texts)

    @torch.no_grad()
    def make(self, loaded: Iterable[tuple[Image.Image, tuple[str, ...]]]) -> dict[str, Tensor]:
        several = list(loaded)
        shown = [picture for picture, texts in several for _ in texts]
        said = [text for _, texts in several for text in texts]
        match = self.system.match(shown, said)
        vectors = self.system.embed_image([picture for picture, _ in several])
        counts = torch.tensor([len(texts) for _, texts in several], device=vectors.device)
        likeness = (vectors.repeat_interleave(counts, 0) * self.system.embed_text(said)).sum(1)
        found = {"match": match, "likeness": likeness}
        return {name: _rows(values.float().cpu(), counts.tolist()) for name, values in found.items()}


def _rows(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Values in rows of so many each, filled up with NaN."""
    out = torch.full((len(counts), max(counts)), torch.nan)
    for row, one in zip(out, values.split(list(counts)), strict=True):
        row[: len(one)] = one
    return out


def _why(share: Share) -> tuple[dict[str, str], dict[str, str]]:
    """Of a share: file name -> why it cannot be read, and why not this time."""
    return {job[0]: why for job, why in share.bad.items()}, {job[0]: why for job, why in share.killed.items()}
