"""CapFilt (BLIP, 2201.12086, section 3.3): noisy captions rewritten and filtered by what was learnt from them.

    pretrained   a Blip learns from all captions, wrong ones and all                    OUT/round-1/pretrained
    captioner    it is tuned to write, on the captions that somebody vouches for        OUT/round-1/captioner
    filter       it is tuned, apart, to find and match, on the same                     OUT/round-1/filter
    written      the captioner draws a caption of every other picture                   OUT/round-1/written.jsonl
    scale        its two signs are weighed on vouched-for captions that it did not see  OUT/round-1/scale.json
    judged       the filter looks at each picture beside that caption and its own       OUT/round-1/judged.jsonl
    the index    what matches stays, what does not is dropped with its reason           FOLDER/metadata.parquet
    retrained    a Blip learns from scratch from what is left                           OUT/round-1/retrained
    sheet        what became of each file, to look at                                   OUT/round-1/sheet.html

A further round begins with the last one's Blip and judges the captions that were there at first again. Captioner and
filter share no weights: they would confirm each other's mistakes (table 4). Captions are drawn (nucleus), not searched
for: likelier captions are duller, and teach less (table 2). Every stage is found done, or goes on where it was stopped.

Ours beyond the paper, unless `judge` is "match": the filter also learns from the doubted captions, as texts that belong
to none of the vouched-for pictures, and its matching is weighed with the likeness of its vectors (docs/data.md has what
that changes).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

import reverie
from reverie import disk, rng
from reverie.data.alone import exclusively
from reverie.data.index import (
    MARK_WORDS,
    Caption,
    Dropped,
    Index,
    Item,
    language_of,
    lists_tags,
    style_of,
    synthetic,
)
from reverie.data.journal import Journal
from reverie.data.preparing import Pool
from reverie.errors import InputError
from reverie.evals.weighing import Scale, logits, weighed
from reverie.recipes import blip
from reverie.recipes.asked import CapFilt, Telling
from reverie.recipes.blip import BlipRun, begin, shape
from reverie.recipes.parts import at_most, open_index
from reverie.recipes.writing import Fit, judged, written
from reverie.systems.blip import Blip
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import refuse_difference
from reverie.train.parallel import team

NAME = "capfilt"
BY = f"{MARK_WORDS}{NAME}: "
COLUMN = "capfilt"  # of the index: what became of a file's captions, and why
FIFTH, FEWEST = 5, 4  # of what is vouched for one in so many is kept back, and so many at the least
STRANGERS = 4  # texts of each kind that are shown beside a picture that was kept back
VERDICTS = {
    "kept": "its captions match, and the new one does not",
    "both": "its captions match, and so does the new one",
    "replaced": "its captions do not match, and the new one does",
    "dropped": "neither its captions nor the new one match",
}


@exclusively("reverie capfilt")
def capfilt(
    folder: str | Path, out: Path, settings: CapFilt, *, pool: Pool | None = None, engine: Engine = ENGINE
) -> dict[str, int]:
    """The whole bootstrap of the training split; how many files have each of the VERDICTS, after the last round.

    pool: workers that describe and judge. InputError: too little that is vouched for, nothing else, other settings in
    `out`.
    """
    folder, out = Path(folder), Path(out)
    if not settings.trusted:
        raise InputError(
            "Say whose captions are vouched for, from which the captioner and the filter learn, such as --trusted"
            " sidecar:txt or --trusted 'photos/mine/*': `reverie data check` lists the sources."
        )
    _same_settings(out, settings)
    from reverie.recipes.capfilt_sheet import sheet  # it reads what is written here

    index = open_index(folder)
    index.refuse_remote()
    index = Index(index.folder, restored(list(index)), extra=index.extra)
    mine, others = parted(index, settings.trusted)
    val, everything = index.select(split="val"), Index(index.folder, mine + others)
    say(f"{len(mine):,} files have captions that are vouched for, {len(others):,} are to be judged")
    before = Path(settings.start) if settings.start else out / "round-1" / "pretrained" / "model"
    if not settings.start:
        pretrain(everything, out / "round-1" / "pretrained", settings, val=val, engine=engine)
    kept = index
    for number in range(1, settings.rounds + 1):
        place = out / f"round-{number}"
        teach(mine, others, index, before, place, settings, val=val, engine=engine)
        with team().in_turn():
            if team().first:
                say(f"round {number}: describing and judging {len(others):,} files")
                weigh(mine, others, index, place, settings, pool=pool, device=engine.device)
                record = look(others, index, place, settings, pool=pool, device=engine.device)
                decide(index, others, record, settings, number).write()
        kept = Index.read(index.folder)
        if team().first:
            disk.write(place / "sheet.html", sheet(kept, others, seed=settings.seed))
        counts = Counter(verdict for item in others if (verdict := verdict_of(kept, item)) is not None)
        say(f"round {number}: " + ", ".join(f"{counts[name]:,} {name}" for name in VERDICTS))
        judged_ones = {item.file_name for item in others}
        left = [
            item for item in kept.select(split="train") if item.file_name in judged_ones and item.captions
        ]
        learnt = Index(kept.folder, mine + left)
        pretrain(learnt, place / "retrained", settings, val=val, engine=engine)
        before = place / "retrained" / "model"
    return {name: counts[name] for name in VERDICTS}


def say(text: str) -> None:
    if team().first:
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- who is vouched for


def parted(index: Index, trusted: Sequence[str]) -> tuple[list[Item], list[Item]]:
    """Of the training split: the files that are vouched for, with those captions alone, and the others.

    InputError: nothing is vouched for, or nothing else is there.
    """
    mine, others = [], []
    for item in index.select(split="train"):
        own = [c for c in item.captions if _vouched(item, c, trusted) and style_of(c.source) is None]
        if own:
            mine.append(dataclasses.replace(item, captions=tuple(own)))
        else:
            others.append(item)
    if len(mine) < 2:
        there = Counter(c.source for item in others for c in item.captions)
        sources = ", ".join(f"{name} ({count:,})" for name, count in there.most_common(8)) or "none"
        raise InputError(
            f"--trusted {' '.join(trusted)} fits {len(mine)} captioned files of the training split of {index.folder},"
            f" and two are needed; its captions come from {sources}."
        )
    if not others:
        raise InputError(
            f"every caption in {index.folder} is vouched for, so there is nothing to judge: narrow --trusted."
        )
    return mine, others


def _vouched(item: Item, caption: Caption, trusted: Sequence[str]) -> bool:
    names = (caption.source, item.source or "", item.file_name)
    return any(fnmatchcase(name, pattern) for pattern in trusted for name in names)


def restored(items: Sequence[Item]) -> list[Item]:
    """The items as they were before any round: what was dropped is back, what was written and marked is gone."""
    return [
        dataclasses.replace(
            item,
            captions=(
                *(c.caption for c in item.dropped if c.reason.startswith(BY) and not _written(c.source)),
                *(c for c in item.captions if not _written(c.source)),
            ),
            dropped=tuple(c for c in item.dropped if not c.reason.startswith(BY)),
            reject=None if item.marked == NAME else item.reject,
        )
        for item in items
    ]


def _written(source: str) -> bool:
    return source == synthetic("short", NAME)


@exclusively("reverie capfilt --undo")
def undo(folder: str | Path) -> int:
    """Takes back what the rounds did to the captions of a folder; returns of how many files."""
    index = Index.read(folder)
    before = restored(list(index))
    changed = sum(one != other for one, other in zip(before, index, strict=True))
    if changed:
        Index(index.folder, before, extra=index.extra).with_columns(
            {COLUMN: (_column(), _nothing(before))}
        ).write()
    return changed


# ---------------------------------------------------------------- the stages


def _same_settings(out: Path, settings: CapFilt) -> None:
    """Writes OUT/config.json, or compares it. InputError: OUT was begun with other settings; more rounds are none."""
    config, path = json.loads(json.dumps(dataclasses.asdict(settings))), out / "config.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path} is not JSON any more; restore it, or give a new --out.") from None
        refuse_difference(before, config, where=str(out), free=frozenset({"rounds"}))
    if team().first:
        out.mkdir(parents=True, exist_ok=True)
        disk.write_json(path, config)


def pretrain(index: Index, out: Path, settings: CapFilt, *, val: Index, engine: Engine = ENGINE) -> None:
    """A Blip from random weights, or from the settings' start, learns all it can from these captions."""
    if (out / "model").exists():
        return
    made = partial(
        shape, size=settings.size, patch=settings.patch, width=settings.width, depth=settings.depth
    )
    model = begin(settings.start, index, made, seed=settings.seed)
    config = BlipRun(
        model=model.config, start=settings.start, steps=settings.steps, batch=at_most(settings.batch, len(index)),
        lr=settings.lr, schedule="cosine", floor=0.01, warmup=min(100, settings.steps // 4), clip=1.0, ema=0.99,
        strength=settings.strength, phrases=False, queue=settings.queue, length=settings.most + 20, seed=settings.seed,
    )  # fmt: skip
    blip.fit(config, model, index, out, val=val, engine=engine)


def teach(
    mine: Sequence[Item],
    others: Sequence[Item],
    index: Index,
    before: Path,
    place: Path,
    settings: CapFilt,
    *,
    val: Index,
    engine: Engine = ENGINE,
) -> None:
    """The captioner learns from all that is vouched for; the filter from what is not kept to weigh it by."""
    tune(
        Index(index.folder, list(mine)),
        before,
        place / "captioner",
        "captioner",
        settings,
        val=val,
        engine=engine,
    )
    back = {item.file_name for item in kept_back(mine, settings)}
    doubted = others if settings.judge == "both" else ()
    learnt = Index(index.folder, [item for item in mine if item.file_name not in back])
    tune(learnt, before, place / "filter", "filter", settings, doubted=doubted, val=val, engine=engine)


def kept_back(mine: Sequence[Item], settings: CapFilt) -> list[Item]:
    """Of what is vouched for, a fifth that the filter is weighed by. InputError: that is next to nothing."""
    if settings.judge == "match":
        return []
    order = sorted(
        mine, key=lambda item: (rng.integer(settings.seed, "kept back", item.hash), item.file_name)
    )
    back = order[: len(order) // FIFTH]
    if len(back) < FEWEST:
        raise InputError(
            f"{len(mine):,} files are vouched for, a fifth of which is kept back to weigh the filter's signs by: vouch"
            f" for {FIFTH * FEWEST} or more, or give --judge match."
        )
    return back


def tune(
    index: Index,
    start: Path,
    out: Path,
    task: str,
    settings: CapFilt,
    *,
    doubted: Sequence[Item] = (),
    val: Index,
    engine: Engine = ENGINE,
) -> None:
    """A copy of the Blip `start` learns to write (captioner), or to find and match (filter), and nothing else.

    What is said of the `doubted` files belongs to none of these, which the filter learns too: or it would only know how
    captions that are well made can be wrong.
    """
    if (out / "model").exists():
        return
    model = reverie.load(start, trainable=True)
    if not isinstance(model, Blip):
        raise InputError(
            f"{start} is a {type(model).__name__}, not a Blip: give blip-stickers or a folder of one."
        )
    config = BlipRun(
        model=model.config, start=str(start), task={"captioner": "caption", "filter": "retrieval"}[task],
        steps=settings.tune_steps, batch=at_most(settings.batch, len(index)), lr=settings.tune_lr, schedule="cosine",
        clip=1.0, ema=0.99, warmup=0, strength=settings.strength, phrases=False, queue=settings.queue,
        length=settings.most + 20, seed=settings.seed,
    )  # fmt: skip
    strangers = [c.text for item in doubted for c in judgeable(item)]
    blip.fit(config, model, index, out, val=val, strangers=strangers, engine=engine)


def weigh(
    mine: Sequence[Item],
    others: Sequence[Item],
    index: Index,
    place: Path,
    settings: CapFilt,
    *,
    pool: Pool | None = None,
    device: str | None = None,
) -> None:
    """Finds how much matching and likeness tell, beside captions that are right and others that are not."""
    back, path = kept_back(mine, settings), place / "scale.json"
    if not back or path.exists():
        return
    strange = [c.text for item in others for c in judgeable(item)]
    right, asked = {}, {}
    for item in back:
        own = right[item.file_name] = list(dict.fromkeys(c.text for c in judgeable(item)))
        taken = rng.generator(settings.seed, "weighed", item.hash)
        wrong = [*_some(strange, taken), *_some([c.text for one in back for c in judgeable(one)], taken)]
        asked[item.file_name] = own + [text for text in dict.fromkeys(wrong) if text not in own]
    signs, truth = [], []
    for found, bad, later in judged(asked, index, model=place / "filter" / "model", pool=pool, device=device):
        for name, fits in found.items():
            signs += [_signs(fit) for fit in fits]
            truth += [place < len(right[name]) for place in range(len(fits))]
        _told(bad | later)
    if not any(truth) or all(truth):
        raise InputError(
            f"{place / 'filter'} has nothing to be weighed by: none of the {len(back):,} files that were kept back can"
            " be read, or all have one caption: see `reverie data check`."
        )
    scale = weighed(torch.tensor(signs, dtype=torch.float64), torch.tensor(truth))
    disk.write_json(path, dataclasses.asdict(scale))


def _some(texts: Sequence[str], generator: torch.Generator) -> list[str]:
    if not texts:
        return []
    return [texts[i] for i in torch.randint(len(texts), (STRANGERS,), generator=generator).tolist()]


def _signs(fit: Fit) -> list[float]:
    return [*logits([fit.match]), fit.likeness]


def scale_of(place: Path, settings: CapFilt) -> Scale:
    """By which the filter in `place` decides."""
    if settings.judge == "match":
        return Scale(weights=(1.0, 0.0), bias=0.0)
    found = json.loads((place / "scale.json").read_text(encoding="utf-8"))
    return Scale(weights=tuple(found["weights"]), bias=found["bias"])


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of a file: the new caption ("" if none could be written), and how well each text fits."""

    text: str
    fits: dict[str, float]


def look(
    items: Sequence[Item],
    index: Index,
    place: Path,
    settings: CapFilt,
    *,
    pool: Pool | None = None,
    device: str | None = None,
) -> dict[str, Look]:
    """The captioner's and the filter's word on each file, as far as it can be read, kept in the folder `place`."""
    named = {item.file_name: item for item in items}
    telling = Telling(sampling=settings.sampling, p=settings.p, most=settings.most, seed=settings.seed)
    texts, fits = Journal(place / "written.jsonl"), Journal(place / "judged.jsonl")
    todo = [item for item in items if texts.of(item) is None]
    for found, bad, later in written(
        todo, index, model=place / "captioner" / "model", telling=telling, pool=pool, device=device
    ):
        texts.add((named[name], {"text": text}) for name, text in found.items())
        texts.add((named[name], {"text": "", "bad": why}) for name, why in bad.items())
        _told(bad | later)
    new = {item.file_name: row["text"] for item in items if (row := texts.of(item)) is not None}
    wanted = {
        item.file_name: tuple(
            dict.fromkeys(
                [c.text for c in judgeable(item)] + [new[item.file_name]] * bool(new[item.file_name])
            )
        )
        for item in items
        if item.file_name in new and fits.of(item) is None
    }
    for found_fits, bad, later in judged(
        wanted, index, model=place / "filter" / "model", pool=pool, device=device
    ):
        fits.add(
            (named[name], {"fits": {t: _signs(fit) for t, fit in zip(wanted[name], own, strict=True)}})
            for name, own in found_fits.items()
        )
        _told(bad | later)
    scale = scale_of(place, settings)
    return {
        item.file_name: Look(text=new[item.file_name], fits=_weighed(row["fits"], scale))
        for item in items
        if item.file_name in new and (row := fits.of(item)) is not None
    }


def _weighed(signs: dict[str, list[float]], scale: Scale) -> dict[str, float]:
    if not signs:
        return {}
    found = scale.probability(torch.tensor(list(signs.values()), dtype=torch.float64))
    return dict(zip(signs, found.tolist(), strict=True))


def _told(left_out: dict[str, str]) -> None:
    for name, why in left_out.items():
        say(f"left as it is: {name}: {why}")


def judgeable(item: Item) -> list[Caption]:
    """The captions of a file that the filter reads: sentences, not lists of tags."""
    return [c for c in item.captions if c.text.strip() and not lists_tags(c.source)]


# ---------------------------------------------------------------- the index


def decide(
    index: Index, items: Sequence[Item], seen: dict[str, Look], settings: CapFilt, number: int
) -> Index:
    """The whole index after the filter's word on `items`, with a record of each in the column COLUMN."""
    asked = {item.file_name for item in items}
    records: dict[str, Any] = _nothing(list(index))
    after = []
    for item in index:
        look = seen.get(item.file_name) if item.file_name in asked else None
        if look is None:
            after.append(item)
            continue
        item, records[item.file_name] = ruled(item, look, settings.threshold, number)
        after.append(item)
    return Index(index.folder, after, extra=index.extra).with_columns({COLUMN: (_column(), records)})


def ruled(item: Item, look: Look, threshold: float, number: int) -> tuple[Item, dict[str, Any]]:
    """One file after the filter's word, and its record: which captions it had, how well each fits, which stay."""
    mine = judgeable(item)
    source = synthetic("short", NAME)
    new = [Caption(text=look.text, source=source, language=language_of(look.text))] if look.text else []
    new = [caption for caption in new if caption.text not in {own.text for own in mine}]  # said already
    fits = {caption: look.fits[caption.text] for caption in (*mine, *new)}
    good = {caption for caption, fit in fits.items() if fit >= threshold}
    dropped = [
        Dropped(
            text=c.text, source=c.source, language=c.language,
            reason=f"{BY}round {number}: right with probability {fits[c]:.3f}, below {threshold:g}",
        )
        for c in fits
        if c not in good
    ]  # fmt: skip
    own, fresh = bool(good & set(mine)), bool(good & set(new))
    verdict = ("both" if fresh else "kept") if own else ("replaced" if fresh else "dropped")
    kept = (*(c for c in item.captions if c not in fits or c in good), *(c for c in new if c in good))
    record = {
        "verdict": verdict, "round": number,
        "captions": [
            {"text": c.text, "source": c.source, "fit": fit, "kept": c in good} for c, fit in fits.items()
        ],
    }  # fmt: skip
    reject = item.reject if kept else f"{BY}{VERDICTS['dropped']}"
    return dataclasses.replace(item, captions=kept, dropped=(*item.dropped, *dropped), reject=reject), record


def verdict_of(index: Index, item: Item) -> str | None:
    """What became of a file's captions; None: it was not judged."""
    record = index.extra_of(item.file_name).get(COLUMN)
    return record["verdict"] if record else None


def _column() -> Any:
    import pyarrow as pa

    caption = pa.struct(
        [("text", pa.string()), ("source", pa.string()), ("fit", pa.float64()), ("kept", pa.bool_())]
    )
    return pa.struct([("verdict", pa.string()), ("round", pa.int64()), ("captions", pa.list_(caption))])


def _nothing(items: Sequence[Item]) -> dict[str, Any]:
    """No file has a record, whatever was there."""
    return dict.fromkeys((item.file_name for item in items), None)
