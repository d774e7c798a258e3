"""What a system that describes pictures reaches, and its use on files.

    captions      how near captions come to people's, whether they are true, whether they name the thing
                                                                               reverie eval captions DIR
    answers       questions about the procedural world, beside guessing        reverie eval answers DIR
    describe      captions of files                                            reverie caption FILES
    compare       how well texts fit a picture                                 reverie match PICTURE TEXTS
    ask           answers to questions about a picture                         reverie ask PICTURE QUESTIONS

Any system serves that has the method (`caption`, `match`, `answer`). Of a clip its middle frame is shown. What is
measured stands beside what the same captions reach when they are dealt to other pictures, or beside guessing.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reverie import rng
from reverie.data.embeddings import media_below
from reverie.data.index import Index, Item
from reverie.data.stickers import TEST
from reverie.data.world import scenes_of
from reverie.data.world_questions import KINDS, question_set
from reverie.errors import InputError
from reverie.evals import answers as answering
from reverie.evals import captions as scoring
from reverie.evals.interval import bootstrap
from reverie.evals.world_captions import MAIN, told
from reverie.media import MediaError, Part, decode_array
from reverie.pictures import grid, save_png
from reverie.progress import counting
from reverie.recipes.asked import Telling
from reverie.recipes.measured import Measured, Row, fits, share
from reverie.recipes.parts import capable, check_embeds, home, open_index
from reverie.scene import Scene
from reverie.systems.blip import Blip

SIDE, SHOWN = 112, 48  # of a sheet: pixels of a picture, and pictures
ROOM = 2 << 30  # bytes of features that are kept while pictures are looked at again


# ---------------------------------------------------------------- pictures of files


def still(media: str | Path | Part) -> Image.Image:
    """A picture, or the middle frame of a clip. MediaError: it cannot be read."""
    return Image.fromarray(decode_array(media, frames=2)[-1])


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A file that could not be read, and why."""

    path: str
    reason: str


def opened(
    named: Sequence[tuple[str, Path | Part]], batch: int, bad: list[Bad]
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Names and pictures, up to `batch` at a time; what cannot be read goes to `bad`."""
    if batch < 1:
        raise InputError(f"batch is {batch}: look at one picture at a time at least.")
    names: list[str] = []
    pictures: list[Image.Image] = []
    for name, media in named:
        try:
            pictures.append(still(media))
        except MediaError as error:
            bad.append(Bad(path=name, reason=error.reason))
            continue
        names.append(name)
        if len(names) == batch:
            yield names, pictures
            names, pictures = [], []
    if names:
        yield names, pictures


def files_of(files: Sequence[Path]) -> list[tuple[str, Path | Part]]:
    """The files, and every picture and clip of the folders among them. InputError: there is none."""
    found: list[tuple[str, Path | Part]] = []
    for file in files:
        inside = [(str(file / name), file / name) for name in media_below(file)] if file.is_dir() else []
        found += inside or [(str(file), file)]
        if file.is_dir() and not inside:
            raise InputError(f"{file} holds no picture: give files, or a folder with pictures.")
    if not found:
        raise InputError("there is no file to describe: give pictures, or a folder of them.")
    return found


# ---------------------------------------------------------------- the commands on files


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a file shows, in one wording or several."""

    path: str
    captions: tuple[str, ...]


def describe(
    files: Sequence[Path],
    *,
    model: str = "blip-stickers",
    telling: Telling | None = None,
    several: int = 1,
    batch: int = 16,
    bad: list[Bad],
    device: str | None = None,
) -> Iterator[Described]:
    """Captions of files and of all pictures in folders, one by one; what cannot be read goes to `bad`."""
    telling = telling or Telling()
    if several < 1 or (several > 1 and telling.sampling != "nucleus"):
        raise InputError(
            f"several is {several} with sampling {telling.sampling}: ask for 1, or for more with --sampling nucleus, "
            "since the others always say the same."
        )
    named = files_of(files)
    system = capable(model, "caption", device=device)
    done = 0  # picture i of n has in its turn t the seed + t n + i, whatever the batch
    for names, pictures in opened(named, batch, bad):
        seeds = [telling.seed + turn * len(named) + done for turn in range(several)]
        wordings = [_caption(system, pictures, telling, seed) for seed in seeds]
        done += len(names)
        for name, *own in zip(names, *wordings, strict=True):
            yield Described(path=name, captions=tuple(own))


@torch.no_grad()
def _caption(system: Any, pictures: Sequence[Image.Image], telling: Telling, seed: int) -> list[str]:
    own = {} if telling.prompt is None else {"prompt": telling.prompt}
    found = system.caption(
        list(pictures),
        sampling=telling.sampling, beams=telling.beams, least=telling.least, most=telling.most, p=telling.p, seed=seed,
        **own,
    )  # fmt: skip
    assert len(found) == len(pictures), (len(found), len(pictures))
    return [" ".join(text.split()) for text in found]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well a text fits a picture: the probability of a match, and the cosine where the system embeds."""

    text: str
    probability: float
    cosine: float | None


@torch.no_grad()
def compare(
    picture: Path, texts: Sequence[str], *, model: str = "blip-stickers", device: str | None = None
) -> list[Fit]:
    """Each text beside the picture, in the order given. InputError: no text, or a picture that cannot be read."""
    if not texts:
        raise InputError("there is no text to compare: give one or more, each in quotes.")
    system = capable(model, "match", device=device)
    shown = still(picture)
    chances = system.match([shown] * len(texts), list(texts)).float().cpu().tolist()
    cosines: list[float | None] = [None] * len(texts)
    if hasattr(system, "embed_image") and hasattr(system, "embed_text"):
        near = system.embed_image([shown]).float() @ system.embed_text(list(texts)).float().T
        cosines = near.reshape(-1, len(texts)).amax(0).cpu().tolist()  # of several vectors, the nearest
    return [
        Fit(text=text, probability=chance, cosine=cosine)
        for text, chance, cosine in zip(texts, chances, cosines, strict=True)
    ]


@torch.no_grad()
def ask(
    picture: Path,
    questions: Sequence[str],
    *,
    model: str,
    choices: Sequence[str] = (),
    device: str | None = None,
) -> list[str]:
    """The answer to each question; choices: the only answers that are considered, where there are some."""
    if not questions:
        raise InputError("there is no question: give one or more, each in quotes.")
    system = capable(model, "answer", device=device)
    given = {"answers": list(choices)} if choices else {}
    return list(system.answer([still(picture)] * len(questions), list(questions), **given))


# ---------------------------------------------------------------- captions, measured


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What was described: items and captions, one for one, and the vectors that a CLIP gave the pictures."""

    items: list[Item]
    captions: list[str]
    vectors: Tensor | None
    bad: list[Bad]
    seconds: float


def captions(
    data: Path,
    out: Path,
    *,
    model: str = "blip-stickers",
    clip: str = "clip-stickers",
    sources: tuple[str, ...] | None = None,
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    language: str = "en",
    count: int | None = None,
    batch: int = 16,
    telling: Telling | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Measured:
    """Captions of an index, by all measures that it allows: people's captions, exact scenes, labels.

    sources, split: as `measured_items` chooses. language: of the captions that count as people's; lists of tags never
    do. clip: what gives CLIPScore, "" for none. count: at most so many pictures, drawn by the seed.
    """
    out, telling = fits(out), telling or Telling()
    index, wanted = measured_items(data, sources=sources, split=split, without=without)
    wanted = _some(wanted, count, seed)
    every = scenes_of(index)
    system = capable(model, "caption", device=device)
    judge = capable(clip, "embed_text", device=device) if clip else None
    if judge is not None:
        check_embeds(judge)
    done = _describe_all(system, judge, index, wanted, telling, batch)
    items, texts, other = done.items, done.captions, done.captions[1:] + done.captions[:1]
    rows: list[Row] = []
    numbers: dict[str, Any] = {
        "model": Path(model).name, "telling": telling.__dict__, "language": language, "seconds": done.seconds,
        "bad": [[bad.path, bad.reason] for bad in done.bad], "files": [item.file_name for item in items],
        "captions": texts,
    }  # fmt: skip
    references = {
        i: own
        for i, item in enumerate(items)
        if (own := [c.text for c in item.captions if c.language == language and c.source != "tags"])
    }
    if references:
        numbers["references"] = _against(texts, other, references, rows)
    if judge is not None:
        assert done.vectors is not None
        numbers["clip"] = _by_clip(judge, Path(clip).name, done.vectors, texts, other, references, rows)
    marks: list[bool | None] = [None] * len(items)
    scenes = [every.get(item.file_name) for item in items]
    if any(scenes):
        numbers["world"], marks = _in_the_world(texts, other, scenes, rows)
    names = names_of(index, items) if not every else {}
    if names:
        numbers["labels"], marks = _naming(items, texts, other, names, language, rows)
    rows += [
        ("different captions", f"{len(set(texts)):,}", "", f"{len(texts):,}"),
        ("words of a caption", f"{sum(len(scoring.tokens(t)) for t in texts) / len(texts):.1f}", "", ""),
        (f"seconds a picture, {batch} at a time, {home(device)}, {torch.get_num_threads()} threads",
         f"{done.seconds:.3f}", "", ""),
    ]  # fmt: skip
    titles = [
        text + (f" ({item.label})" if item.label and mark is False else "")
        for text, item, mark in zip(texts, items, marks, strict=True)
    ]
    _sheet(index, items, titles, marks, out / "captions.png")
    title = f"{model} describes {len(items):,} pictures"
    columns = ("", "captions", "dealt to other pictures", "pictures")
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


def measured_items(
    data: Path,
    *,
    sources: tuple[str, ...] | None = None,
    split: str | None = None,
    without: tuple[str, ...] = (),
) -> tuple[Index, list[Item]]:
    """A whole index, and those of it that are measured.

    sources: None is the drawings of the sticker corpus that no training sees, in a folder that has them, else all, as
    () is. split: None is test where there is one, else val, else all, as "all" is. InputError: nothing is left.
    """
    index = open_index(data).select()
    if sources is None:
        sources = tuple(source for source in TEST if any(item.source == source for item in index))
    items = [
        item
        for item in index
        if (not sources or item.source in sources)
        and not any(item.scores.get(name, 0) > 0 for name in without)
    ]
    if split is None:
        split = next((name for name in ("test", "val") if any(item.split == name for item in items)), "all")
    elif split not in ("train", "val", "test", "all"):
        raise InputError(f"there is no split {split!r}: measure on train, val, test or all.")
    items = [item for item in items if split in ("all", item.split)]
    if not items:
        there = ", ".join(sorted({f"{item.source or '-'} ({item.split})" for item in index})) or "nothing"
        raise InputError(
            f"no file of {index.folder} is of the sources and split asked for; there are: {there}."
        )
    return index, items


def _some(items: list[Item], count: int | None, seed: int) -> list[Item]:
    if count is None or count >= len(items):
        return items
    if count < 2:
        raise InputError(f"count is {count}: measure on 2 pictures at least.")
    drawn = sorted(items, key=lambda item: rng.integer(seed, "measured", item.file_name))[:count]
    chosen = {item.file_name for item in drawn}
    return [item for item in items if item.file_name in chosen]


@torch.no_grad()
def _describe_all(
    system: Any, judge: Any, index: Index, wanted: Sequence[Item], telling: Telling, batch: int
) -> _Told:
    by_name = {item.file_name: item for item in wanted}
    bad: list[Bad] = []
    items: list[Item] = []
    texts: list[str] = []
    vectors: list[Tensor] = []
    seconds = 0.0
    with counting("describing") as progress:
        for names, pictures in opened([(item.file_name, index.media(item)) for item in wanted], batch, bad):
            begun = time.perf_counter()
            texts += _caption(system, pictures, telling, telling.seed + len(items))
            seconds += time.perf_counter() - begun
            items += [by_name[name] for name in names]
            if judge is not None:
                vectors.append(judge.embed_image(pictures).float().cpu())
            progress(len(items) + len(bad), len(wanted))
    _report(bad)
    if len(items) < 2:
        why = f", such as {bad[0].path}: {bad[0].reason}" if bad else ""
        raise InputError(f"{len(items)} pictures of {index.folder} can be read, and two are the least{why}.")
    found = torch.cat(vectors) if vectors else None
    return _Told(items=items, captions=texts, vectors=found, bad=bad, seconds=seconds / len(items))


def _report(bad: Sequence[Bad]) -> None:
    if bad:
        print(f"{len(bad)} files cannot be read and are left out: numbers.json says why", file=sys.stderr)


def _against(
    texts: list[str], other: list[str], references: dict[int, list[str]], rows: list[Row]
) -> dict[str, Any]:
    """BLEU, ROUGE-L and CIDEr-D against people's captions."""
    meant, numbers = list(references.values()), {}
    scores = []
    for some in (texts, other):
        own = [some[i] for i in references]
        grams = scoring.bleu(own, meant)
        scores.append(
            {f"BLEU-{n}": grams[n] for n in grams}
            | {"ROUGE-L": scoring.rouge_l(own, meant), "CIDEr-D": scoring.cider_d(own, meant)}
        )
    for name, score in scores[0].items():
        numbers[name] = {"all": score.all, "each": list(score.each), "other": scores[1][name].all}
        rows.append((name, f"{score.all:.3f}", f"{scores[1][name].all:.3f}", f"{len(meant):,}"))
    return numbers


@torch.no_grad()
def _by_clip(
    judge: Any, name: str, pictures: Tensor, texts: list[str], other: list[str], references: dict[int, list[str]],
    rows: list[Row],
) -> dict[str, Any]:  # fmt: skip
    """CLIPScore, and RefCLIPScore of those that have references."""
    spoken = _embedded(judge, [*texts, *(text for own in references.values() for text in own)])
    numbers: dict[str, Any] = {"judge": name}
    pair = [scoring.clip_score(pictures, torch.stack([spoken[t] for t in some])) for some in (texts, other)]
    found = {"CLIPScore": pair}
    if references:
        places = list(references)
        meant = [torch.stack([spoken[text] for text in own]) for own in references.values()]
        found["RefCLIPScore"] = [
            scoring.ref_clip_score(pictures[places], torch.stack([spoken[some[i]] for i in places]), meant)
            for some in (texts, other)
        ]
    for what, (own, dealt) in found.items():
        low, high = bootstrap(own)
        numbers[what] = {"all": own.mean().item(), "interval": [low, high], "each": own.tolist(),
                         "other": dealt.mean().item()}  # fmt: skip
        value = f"{own.mean():.3f}  [{low:.3f}, {high:.3f}]"
        rows.append((f"{what} by {name}", value, f"{dealt.mean():.3f}", f"{len(own):,}"))
    return numbers


def _embedded(judge: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    unique = list(dict.fromkeys(texts))
    parts = [judge.embed_text(unique[at : at + 256]).float().cpu() for at in range(0, len(unique), 256)]
    return dict(zip(unique, torch.cat(parts), strict=True))


def _in_the_world(
    texts: list[str], other: list[str], scenes: Sequence[Scene | None], rows: list[Row]
) -> tuple[dict[str, Any], list[bool | None]]:
    """What holds of what is said, and how much of what there is to say is said."""
    known = [i for i, scene in enumerate(scenes) if scene is not None]
    truth = [scene for scene in scenes if scene is not None]
    ours, dealt = (told([some[i] for i in known], truth) for some in (texts, other))
    for name, found in ours.items():
        if name == "all":
            continue
        if found["claimed"]:
            theirs = dealt.get(name, {}).get("right")
            rows.append((f"{name}: right, of what is said", share(found["right"], found["right_interval"]),
                         "-" if theirs is None else share(theirs), f"{found['claimed']:,}"))  # fmt: skip
        if name in MAIN and name != "count" and found["scenes"]:
            rows.append((f"{name}: said rightly, of what there is", share(found["said"], found["said_interval"]),
                         share(dealt[name]["said"]), f"{found['scenes']:,}"))  # fmt: skip
    whole = ours["all"]
    rows.append(("nothing wrong, nothing missing", share(whole["right"], whole["right_interval"]),
                 share(dealt["all"]["right"]), f"{len(known):,}"))  # fmt: skip
    marks: list[bool | None] = [None] * len(scenes)
    for i, holds in zip(known, whole["holds"], strict=True):
        marks[i] = holds
    return {"captions": ours, "other": dealt}, marks


def names_of(index: Index, items: Sequence[Item]) -> dict[str, dict[str, list[str]]]:
    """Label -> language -> all names that the index has for it, of any source; lists of tags are no names."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    wanted = {item.label for item in items if item.label}
    for item in index:
        if item.label in wanted:
            assert item.label
            for caption in item.captions:
                if caption.source != "tags" and caption.text not in found[item.label][caption.language]:
                    found[item.label][caption.language].append(caption.text)
            spoken = " ".join(item.label.replace("_", " ").split())
            if spoken not in found[item.label]["en"]:
                found[item.label]["en"].append(spoken)
    return {label: dict(own) for label, own in found.items()}


def _naming(
    items: Sequence[Item], texts: list[str], other: list[str], names: dict[str, dict[str, list[str]]], language: str,
    rows: list[Row],
) -> tuple[dict[str, Any], list[bool | None]]:  # fmt: skip
    """Whether a caption contains the label or another name of what is shown."""
    known = [i for i, item in enumerate(items) if item.label and names[item.label].get(language)]
    marks: list[bool | None] = [None] * len(items)
    if not known:
        return {}, marks
    meant = [names[str(items[i].label)][language] for i in known]
    ours, dealt = (scoring.label_recall([some[i] for i in known], meant) for some in (texts, other))
    interval = bootstrap(torch.tensor(ours.each, dtype=torch.double))
    rows.append(("names the thing", share(ours.all, interval), share(dealt.all), f"{len(known):,}"))
    whole = {"named": ours.all, "interval": interval, "pictures": len(known), "other": dealt.all}
    numbers: dict[str, Any] = {"all": whole}
    sources = sorted({items[i].source or "-" for i in known})
    for source in sources if len(sources) > 1 else ():
        own = [value for i, value in zip(known, ours.each, strict=True) if (items[i].source or "-") == source]
        found = torch.tensor(own, dtype=torch.double)
        numbers[source] = {"named": found.mean().item(), "interval": bootstrap(found), "pictures": len(own)}
        rows.append(
            (f"names the thing, {source}", share(found.mean().item(), bootstrap(found)), "", f"{len(own):,}")
        )
    for i, value in zip(known, ours.each, strict=True):
        marks[i] = bool(value)
    numbers["examples"] = [
        {"file": items[i].file_name, "label": items[i].label, "caption": texts[i], "named": marks[i]}
        for i in (known[k] for k in _evenly(len(known), SHOWN))
    ]
    return numbers, marks


# ---------------------------------------------------------------- answers, measured


@torch.no_grad()
def answers(
    data: Path,
    out: Path,
    *,
    model: str,
    split: str | None = None,
    kinds: tuple[str, ...] = KINDS,
    language: str = "en",
    each: int = 1,
    count: int | None = None,
    choose: bool = False,
    batch: int = 16,
    seed: int = 0,
    device: str | None = None,
) -> Measured:
    """Questions about the scenes of the procedural world, balanced; by kind, beside the best blind guess.

    split: as `measured_items` chooses. each: questions of a kind about one scene. count: at most so many scenes, drawn
    by the seed. choose: the model chooses among the answers of the kind instead of writing its own.
    """
    out = fits(out)
    index, wanted = measured_items(data, sources=(), split=split)
    scenes = scenes_of(index)
    wanted = _some([item for item in wanted if item.file_name in scenes], count, seed)
    if not wanted:
        raise InputError(f"{index.folder} holds no scenes of the world: draw some with `reverie data world`.")
    chosen = {item.file_name: scenes[item.file_name] for item in wanted}
    asked = question_set(chosen, each=each, kinds=kinds, languages=(language,), seed=seed)
    if not asked:
        raise InputError(f"the scenes of {index.folder} allow no question of kind {', '.join(kinds)}.")
    system = capable(model, "answer", device=device)
    bad: list[Bad] = []
    by_name = {item.file_name: item for item in wanted}
    about = defaultdict(list)
    for name, question in asked:
        about[name].append(question)
    known = {kind: sorted({q.answer for _, q in asked if q.kind == kind}) for kind in kinds}
    given: list[tuple[Item, Any, str]] = []
    seconds = 0.0
    with counting("answering") as progress:
        for names, pictures in opened([(name, index.media(by_name[name])) for name in about], batch, bad):
            pairs = [
                (name, picture, q) for name, picture in zip(names, pictures, strict=True) for q in about[name]
            ]
            groups = (
                {kind: [p for p in pairs if p[2].kind == kind] for kind in kinds} if choose else {"": pairs}
            )
            begun = time.perf_counter()
            for kind, own in groups.items():
                for at in range(0, len(own), batch):
                    some = own[at : at + batch]
                    words = [question.text for _, _, question in some]
                    choices = {"answers": known[kind]} if choose else {}
                    said = system.answer([picture for _, picture, _ in some], words, **choices)
                    given += [(by_name[name], q, text) for (name, _, q), text in zip(some, said, strict=True)]
            seconds += time.perf_counter() - begun
            progress(len(given), len(asked))
    _report(bad)
    if not given:
        raise InputError(
            f"none of the pictures of {index.folder} can be read, such as {bad[0].path}: {bad[0].reason}."
        )
    texts, questions = [text for _, _, text in given], [q for _, q, _ in given]
    found = answering.exact(texts, [q.answer for q in questions], [q.kind for q in questions])
    order = [kind for kind in (*kinds, "all") if kind in found]
    rows: list[Row] = [
        (kind, f"{own['asked']:,}", share(own["right"], own["interval"]), share(own["prior"]))
        for kind, own in ((kind, found[kind]) for kind in order)
    ]  # fmt: skip
    rows.append(("seconds a question", "", f"{seconds / len(given):.3f}", ""))
    marks = [
        answering.world_form(text) == answering.world_form(q.answer)
        for text, q in zip(texts, questions, strict=True)
    ]
    titles = [
        f"{q.text} {text}" + ("" if mark else f" ({q.answer})")
        for q, text, mark in zip(questions, texts, marks, strict=True)
    ]
    _sheet(index, [item for item, _, _ in given], titles, marks, out / "answers.png")
    numbers = {
        "model": Path(model).name, "language": language, "choose": choose, "kinds": found,
        "seconds": seconds / len(given), "bad": [[each_bad.path, each_bad.reason] for each_bad in bad],
        "questions": [
            {"file": item.file_name, "kind": q.kind, "question": q.text, "answer": q.answer, "given": text}
            for item, q, text in given
        ],
    }  # fmt: skip
    columns = ("questions about", "asked", "right", "best guess without looking")
    title = f"{model} answers {len(given):,} questions about {len(about):,} scenes of the world"
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


# ---------------------------------------------------------------- sheets


def _evenly(total: int, count: int) -> list[int]:
    return [i * total // min(count, total) for i in range(min(count, total))]


def _sheet(
    index: Index, items: Sequence[Item], titles: Sequence[str], marks: Sequence[bool | None], path: Path
) -> None:
    """Some of the pictures, evenly out of all, with what was said of them; framed green where right, red if wrong."""
    some = _evenly(len(items), SHOWN)
    shown = [decode_array(index.media(items[i]), size=SIDE, frames=2, fit="pad")[-1] for i in some]
    save_png(grid(shown, [titles[i] for i in some], lines=5, marks=[marks[i] for i in some]), path)


# ---------------------------------------------------------------- looking again


def pair_scores(
    system: Any, images: Sequence[Path | Part], texts: Sequence[str]
) -> Callable[[list[int], list[int]], Tensor]:
    """`again` of evals/retrieval.py: how surely image i and text j belong together, as the logit of a match.

    A picture's features are kept from one call to the next, as many as ROOM bytes hold.
    """
    kept: dict[int, Tensor] = {}
    deep = isinstance(system, Blip)  # whose features of a picture serve all texts

    def features(i: int) -> Tensor:
        if i not in kept:
            own = system.features([still(images[i])])
            if len(kept) * own.nbytes > ROOM:
                kept.pop(next(iter(kept)))
            kept[i] = own
        return kept[i]

    @torch.no_grad()
    def again(which: list[int], words: list[int]) -> Tensor:
        own = [texts[j] for j in words]
        if not deep:
            chances = system.match([still(images[i]) for i in which], own).double()
            return torch.logit(chances, eps=1e-7).cpu()
        seen = torch.cat([features(i) for i in which])
        return system.matches(seen, system.tokens(own))[:, 1].double().cpu()

    return again
