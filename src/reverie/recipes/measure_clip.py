"""What a CLIP reaches on labelled or captioned pictures: the measurements behind `reverie eval`.

    zero_shot  it names pictures among all labels; calibration, confusions      reverie eval zero-shot DIR
    retrieve   it finds texts by pictures and pictures by texts                 reverie eval retrieval DIR
    probe      what a linear probe reads out of its features; few-shot          reverie eval probe DIR

Every number stands beside what guessing gives. Pictures are prepared as the model asks; those that cannot be read are
left out, and the numbers list them with the reason.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie import disk, rng
from reverie.data.index import Index, Item
from reverie.data.stickers import TEST
from reverie.errors import InputError
from reverie.evals import probe as probing
from reverie.evals import retrieval as finding
from reverie.evals import zero_shot as naming
from reverie.evals.calibration import calibrated
from reverie.evals.confusion import confusion
from reverie.evals.templates import ensemble as sentences_of
from reverie.media import decode_array
from reverie.pictures import card, grid, save_png
from reverie.progress import counting
from reverie.recipes.measure_captions import pair_scores
from reverie.recipes.measured import Measured, Row, fits, markdown, save_figure, share
from reverie.recipes.parts import capable, open_index
from reverie.recipes.search import embed_pictures, every_file

PLAIN = ("{}",)
SIDE = 112  # of a picture on a sheet


# ---------------------------------------------------------------- naming


def zero_shot(
    data: Path,
    out: Path,
    *,
    model: str = "clip-stickers",
    sources: tuple[str, ...] | None = None,
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    templates: tuple[str, ...] = PLAIN,
    ensemble: str | None = None,
    device: str | None = None,
) -> Measured:
    """How often `model` names a picture right among all labels of its source, each source by itself.

    sources: None is the drawings of the sticker corpus that no training sees, in a folder that has them, else all
    pictures together, as () is. without: scores of the index, above zero for pictures that are left out. ensemble: the
    name of a list of templates, in their place.
    """
    out, asked = fits(out), _templates(templates, ensemble)
    index = open_index(data).select(split=split, video=False)
    if sources is None:
        sources = tuple(source for source in TEST if any(item.source == source for item in index))
    parts = {source: _labelled(index, (source,), without) for source in sources} or {
        "all": _labelled(index, (), without)
    }
    clip = capable(model, "embed_text", device=device)
    rows: list[Row] = []
    numbers: dict[str, Any] = {}
    for source, wanted in parts.items():
        vectors, items, bad = _embedded(clip, index, wanted)
        names = sorted({str(item.label) for item in items})
        _enough(names, index.folder)
        labels = _places(items, names)
        classes = _classifier(clip, names, asked)
        with torch.no_grad():
            logits = clip.scale().cpu().float() * vectors @ classes.T
        result = naming.named(lambda some: some, logits, labels, names)
        trust = calibrated(logits, labels)
        sure = logits.softmax(1).amax(1).tolist()
        mistaken = confusion(result["predicted"], labels.tolist(), names, confidence=sure)
        stem = _file(source)
        _confusions(index, items, names, mistaken, out / f"confusions-{stem}.png")
        _reliability(trust, f"{model} names {source}", out / f"reliability-{stem}.png")
        _classes(mistaken, f"{model} names {source}", out / f"classes-{stem}.md")
        result["predicted"] = [names[i] for i in result["predicted"]]
        files = [item.file_name for item in items]
        numbers[source] = result | {
            "calibration": trust, "confusion": mistaken, "files": files, "bad": bad, "templates": list(asked)
        }  # fmt: skip
        before, after = trust["before"], trust["after"]
        rows.append((
            source, f"{result['images']:,}", f"{result['ways']:,}", share(result["top1"], result["top1_interval"]),
            share(result["top5"], result["top5_interval"]), share(result["mean_class"]), share(1 / result["ways"]),
            f"{share(before['ece'])}, {before['nll']:.2f}",
            f"{share(after['ece'])}, {after['nll']:.2f} at {trust['temperature']:.2f}",
        ))  # fmt: skip
    columns = (
        "pictures by", "pictures", "names", "right", "among the first five", "mean over names", "guessing",
        "calibration error, nll", "at the best temperature",
    )  # fmt: skip
    told = ensemble or f"{len(asked)} template{'s' * (len(asked) > 1)}"
    title = f"{model} names pictures" + ("" if asked == PLAIN else f", {told}")
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


# ---------------------------------------------------------------- finding


def retrieve(
    data: Path,
    out: Path,
    *,
    model: str = "clip-stickers",
    sources: tuple[str, ...] = (),
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    language: str | None = None,
    rerank: int | None = None,
    device: str | None = None,
) -> Measured:
    """Recall at 1, 5 and 10 of pictures by their captions and of captions by their pictures.

    rerank: the first so many answers of each query are looked at again by a model that can match.
    """
    out = fits(out)
    if rerank is not None and rerank < 1:
        raise InputError(f"rerank is {rerank}: look at one answer again at least, or leave it out.")
    index = open_index(data).select(split=split, video=False, sources=sources or None)
    told = {
        item.file_name: [c.text for c in item.captions if language in (None, c.language)] for item in index
    }
    wanted = [item for item in _kept(index, without) if told[item.file_name]]
    if not wanted:
        raise InputError(
            f"no picture in {index.folder} has a caption and is wanted: looked for sidecars such as .txt, a table's "
            f"column text or caption, and class-named folders, at the import; `reverie data check {index.folder}` "
            "lists what is there."
        )
    clip = capable(model, "match" if rerank else "embed_text", device=device)
    vectors, items, bad = _embedded(clip, index, wanted)
    captions = [told[item.file_name] for item in items]
    texts = [text for own in captions for text in own]
    again, most = None, rerank or 0
    total = min(most, len(texts)) * len(items) + min(most, len(items)) * len(texts)
    with counting("looking again") as progress:
        if rerank:
            look, done = pair_scores(clip, [index.media(item) for item in items], texts), 0

            def again(images: list[int], words: list[int]) -> Tensor:
                nonlocal done
                done += len(images)
                progress(done, total)
                return look(images, words)

        result = finding.retrieval(
            lambda some: some, lambda some: clip.embed_text(some).cpu(), vectors, captions,
            again=again, rerank=most,
        )  # fmt: skip
    _answers(index, items, texts, captions, result, out)
    before = result.get("before", {})
    rows: list[Row] = [("recall at 1",), ("recall at 5",), ("recall at 10",), ("median rank",)]
    columns: Row = ("",)
    for way, told_as in (
        ("image_to_text", "texts found by picture"),
        ("text_to_image", "pictures found by text"),
    ):
        cells = [(told_as, result[way])] + ([("before looking again", before[way])] if before else [])
        for column, own in cells:
            columns += (column,)
            found = [share(own[f"recall@{k}"], own[f"recall@{k}_interval"]) for k in (1, 5, 10)]
            rows = [
                (*row, cell) for row, cell in zip(rows, [*found, f"{own['median_rank']:,.0f}"], strict=True)
            ]
        columns += ("guessing",)
        chance = [share(result[way][f"recall@{k}_chance"]) for k in (1, 5, 10)]
        rows = [(*row, cell) for row, cell in zip(rows, [*chance, ""], strict=True)]
    numbers = result | {"files": [item.file_name for item in items], "captions": captions, "bad": bad}
    title = f"{model} finds {len(texts):,} texts and {len(items):,} pictures"
    title += f", the first {rerank} looked at again" if rerank else ""
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


def _answers(
    index: Index, items: list[Item], texts: list[str], captions: list[list[str]], result: dict[str, Any], out: Path
) -> None:  # fmt: skip
    """Eight queries of each way, evenly out of all, each with its first answers, the right ones framed green."""
    by_text = result["text_to_image"]["first"]
    by_picture = result["image_to_text"]["first"]
    sheets: dict[str, list[tuple[Any, bool | None]]] = {"pictures-by-text": [], "texts-by-picture": []}
    for j in _evenly(len(texts), 8):
        cells = sheets["pictures-by-text"]
        cells.append((card(texts[j], SIDE), None))
        cells += [(_thumb(index, items[i]), texts[j] in captions[i]) for i in by_text[j]]
    for i in _evenly(len(items), 8):
        cells = sheets["texts-by-picture"]
        cells.append((_thumb(index, items[i]), None))
        cells += [(card(texts[j], SIDE), texts[j] in captions[i]) for j in by_picture[i]]
    for name, cells in sheets.items():
        columns = 1 + len((by_text if name == "pictures-by-text" else by_picture)[0])
        marks = [mark or None for _, mark in cells]
        save_png(grid([cell for cell, _ in cells], columns=columns, marks=marks), out / f"{name}.png")


# ---------------------------------------------------------------- probing


def probe(
    data: Path,
    out: Path,
    *,
    model: str = "clip-stickers",
    sources: tuple[str, ...] = (),
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    shots: tuple[int, ...] = (),
    draws: int = 3,
    count: int | None = None,
    templates: tuple[str, ...] = PLAIN,
    ensemble: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Measured:
    """A linear probe on the features of the split train, measured on `split`; few-shot probes; zero-shot beside them.

    split: None is test where it has labelled pictures, else val. Labels that lack in either part are left out. count:
    at most so many labels, drawn by the seed. shots: examples for each label, each drawn `draws` times.
    """
    out, asked = fits(out), _templates(templates, ensemble)
    if shots and min(shots) < 1:
        raise InputError(f"shots are {' '.join(map(str, shots))}: give numbers of examples from 1 on.")
    index = open_index(data).select(video=False, sources=sources or None)
    labelled = _labelled(index, (), without)
    split = split or ("test" if any(item.split == "test" for item in labelled) else "val")
    if split == "train":
        raise InputError("split is train, which the probe is fitted on: measure on val or test.")
    if split not in ("val", "test"):
        raise InputError(f"there is no split {split!r}: measure on val or test.")
    seen = {str(item.label) for item in labelled if item.split == "train"}
    shared = sorted(seen & {str(item.label) for item in labelled if item.split == split})
    if count is not None:
        order = torch.randperm(len(shared), generator=rng.generator(seed, "probe", "labels"))
        shared = sorted(shared[i] for i in order[: max(count, 0)].tolist())
    if len(shared) < 2:
        raise InputError(
            f"{len(shared)} labels of {index.folder} have pictures in both splits train and {split}, and two are the "
            f"least: import it with a share to measure on, `reverie data import {index.folder} --val 0.2`."
        )
    system = capable(model, "embed_image", device=device)
    chosen = set(shared)
    parts = [item for item in labelled if item.split in ("train", split) and item.label in chosen]
    vectors, items, bad = _embedded(system, index, parts)
    has = [{str(item.label) for item in items if item.split == part} for part in ("train", split)]
    names = sorted(has[0] & has[1])  # but those whose files are all bad
    _enough(names, index.folder)
    known = set(names)
    train = [i for i, item in enumerate(items) if item.split == "train" and item.label in known]
    test = [i for i, item in enumerate(items) if item.split == split and item.label in known]
    x, y = vectors[train], _places([items[i] for i in train], names)
    test_x, test_y = vectors[test], _places([items[i] for i in test], names)
    k = len(names)

    rows: list[Row] = []
    numbers: dict[str, Any] = {"split": split, "names": names, "seed": seed, "bad": bad, "zero_shot": None}
    if hasattr(system, "embed_text"):
        classes = _classifier(system, names, asked)
        zero = naming.named(lambda some: some, test_x @ classes.T, test_y, names)
        numbers["zero_shot"] = zero | {"templates": list(asked)}
        rows.append(("zero-shot", "0", share(zero["top1"], zero["top1_interval"]), ""))
    numbers["few_shot"] = []
    if shots:
        with counting("few-shot") as progress:
            numbers["few_shot"] = probing.few_shot(
                x, y, test_x, test_y, classes=k, shots=shots, draws=draws, seed=seed, progress=progress
            )
    for found in numbers["few_shot"]:
        spread = "" if found["spread"] is None else f" ± {found['spread']:.1%} of {draws} draws"
        fewer = f" ({found['short']:,} have fewer)" if found["short"] else ""
        rows.append((
            f"{found['shots']} a name{fewer}", f"{found['examples']:,}", f"{found['mean']:.1%}{spread}",
            f"{found['strength']:.2g}",
        ))  # fmt: skip
    with counting("strength of the probe") as progress:
        strength, tried = probing.search(x, y, classes=k, seed=seed, progress=progress)
    fitted = probing.fit(x, y, classes=k, strength=strength)
    full = naming.named(fitted, test_x, test_y, names)
    mistaken = confusion(
        full["predicted"], test_y.tolist(), names, confidence=fitted(test_x).softmax(1).amax(1).tolist()
    )
    rows.append(
        ("linear probe on all", f"{len(x):,}", share(full["top1"], full["top1_interval"]), f"{strength:.2g}")
    )
    rows.append(("guessing", "", share(1 / k), ""))
    tested = [items[i] for i in test]
    full["predicted"] = [names[i] for i in full["predicted"]]
    numbers |= {
        "probe": full, "strength": strength, "tried": tried, "steps": fitted.steps, "slope": fitted.slope,
        "confusion": mistaken, "files": [item.file_name for item in tested], "examples": len(x),
    }  # fmt: skip
    _confusions(index, tested, names, mistaken, out / "confusions.png")
    _classes(mistaken, f"a linear probe on {model}", out / "classes.md")
    _curves(numbers, f"{model}, {k:,} names, {len(test):,} pictures", out / "probe.png")
    columns = ("", "examples", "right", "strength")
    title = f"probes on {model} name {len(test):,} pictures of {split} among {k:,} names"
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


# ---------------------------------------------------------------- pictures and their vectors


def _labelled(index: Index, sources: Sequence[str], without: Sequence[str]) -> list[Item]:
    """The pictures of an index that have a label, by any of `sources` if there are some. InputError: there is none."""
    labelled = [item for item in index if item.label]
    if not labelled:
        raise InputError(
            f"no picture in {index.folder} has a label: looked for class-named folders and a column label, class or "
            f"category of a table or sidecar, at the import; `reverie data check {index.folder}` lists what is there."
        )
    kept = [item for item in _kept(labelled, without) if not sources or item.source in sources]
    if not kept:
        there = ", ".join(sorted({item.source or "-" for item in labelled}))
        raise InputError(
            f"no picture by {', '.join(sources) or 'anyone'} in {index.folder} has a label and is wanted; pictures "
            f"with labels are by: {there}."
        )
    return kept


def _kept(items: Iterable[Item], without: Sequence[str]) -> list[Item]:
    return [item for item in items if not any(item.scores.get(name, 0) > 0 for name in without)]


def _enough(names: Sequence[str], folder: Path) -> None:
    if len(names) < 2:
        raise InputError(
            f"all wanted pictures in {folder} are labelled {names[0]!r}: naming takes two names or more."
        )


@torch.no_grad()
def _embedded(system: Any, index: Index, items: Sequence[Item]) -> tuple[Tensor, list[Item], list[list[str]]]:
    """Vectors `n d` of the pictures that can be read, their items, and what cannot: file and reason.

    Kept beside the folder, as `reverie search` keeps its own, but in full precision.
    """
    names = [item.file_name for item in items]
    found = embed_pictures(
        system, index.folder, names, index=index, present=every_file(index), dtype="float32"
    )
    if not found.names:
        first = found.bad[0]
        raise InputError(
            f"none of the {len(items)} pictures in {index.folder} can be read, such as {first.path}: {first.reason}."
        )
    if found.bad:
        print(
            f"{len(found.bad)} pictures cannot be read and are left out: numbers.json says why",
            file=sys.stderr,
        )
    by_name = {item.file_name: item for item in items}
    return found.vectors.clone(), [by_name[name] for name in found.names], [list(bad) for bad in found.bad]


def _places(items: Sequence[Item], names: Sequence[str]) -> Tensor:
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place[str(item.label)] for item in items])


def _classifier(system: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit vectors `k d` of names as they are said: `golden_retriever` is a folder's way to write two words."""
    spoken = [" ".join(name.replace("_", " ").split()) for name in names]
    done = 0
    with counting("reading names") as progress:

        def embed_text(texts: list[str]) -> Tensor:
            nonlocal done
            done += len(texts)
            vectors = system.embed_text(texts).cpu()
            progress(done, len(names) * len(templates))
            return vectors

        return naming.class_embeddings(embed_text, spoken, templates)


def _templates(templates: tuple[str, ...], ensemble: str | None) -> tuple[str, ...]:
    if ensemble is None:
        return templates
    if templates != PLAIN:
        raise InputError(f"give either templates or the ensemble {ensemble}, not both.")
    return sentences_of(ensemble)


# ---------------------------------------------------------------- sheets and figures


def _thumb(index: Index, item: Item) -> Any:
    return decode_array(index.media(item), size=SIDE, frames=1, fit="pad")[0]


def _evenly(total: int, count: int) -> list[int]:
    return [i * total // min(count, total) for i in range(min(count, total))]


def _file(source: str) -> str:
    """A source as a part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in source)


def _confusions(index: Index, items: list[Item], names: list[str], found: dict[str, Any], path: Path) -> None:
    """The worst pairs: pictures that were mistaken, framed red, beside pictures of what they were taken for."""
    if not found["pairs"]:
        path.unlink(missing_ok=True)  # of a run before
        return
    of = defaultdict(list)
    for i, item in enumerate(items):
        of[str(item.label)].append(i)
    worst = found["pairs"][:24]
    wide = 3 if worst[0]["count"] > 1 else 1  # examples of each name
    cells, titles, marks = [], [], []
    for pair in worst[: 12 if wide == 3 else 24]:
        left = [items[i] for i in pair["samples"][:wide]]
        right = [items[i] for i in of[pair["given"]][:wide]]
        share_of = f" ({pair['count']} of {pair['count'] / pair['share']:.0f})" if wide == 3 else ""
        for some, title, mark in (
            (left, pair["right"], False),
            (right, f"taken for: {pair['given']}{share_of}", None),
        ):
            cells += [_thumb(index, item) for item in some]
            cells += [card("", SIDE, ground=255)] * (wide - len(some))
            titles += [title] + [""] * (wide - 1)
            marks += [mark] * len(some) + [None] * (wide - len(some))
    save_png(grid(cells, titles, columns=6 if wide == 3 else 8, marks=marks), path)


def _classes(found: dict[str, Any], title: str, path: Path) -> None:
    """Each name's recall and precision, the worst first, and what it is taken for most."""
    taken: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in found["pairs"]:
        taken[pair["right"]][pair["given"]] = pair["count"]
    rows: list[Row] = [
        (name, f"{each['samples']:,}", share(each["recall"]),
         "-" if each["precision"] is None else share(each["precision"]),
         ", ".join(f"{other} ({times})" for other, times in taken[name].most_common(3)))
        for name, each in found["per_class"].items() if each["recall"] is not None
    ]  # fmt: skip
    order = found["per_class"]
    rows.sort(key=lambda row: (order[row[0]]["recall"], -order[row[0]]["samples"], row[0]))
    columns = ("name", "pictures", "recall", "precision", "taken for")
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, markdown(f"{title}, name by name", columns, rows))


def _reliability(trust: dict[str, Any], title: str, path: Path) -> None:
    """Accuracy against confidence, before and after the best temperature, over how many predictions there are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(2, 2, sharex=True, height_ratios=(3, 1), squeeze=False)
    told = {"before": "as it is", "after": f"at temperature {trust['temperature']:.2f}"}
    for column, (when, words) in enumerate(told.items()):
        found, (top, below) = trust[when], panels[:, column]
        bins = found["width"]
        low, width = [each["low"] for each in bins], [each["high"] - each["low"] for each in bins]
        accuracy = [each["accuracy"] for each in bins]
        top.bar(low, accuracy, width, align="edge", color="#8fb4d9", edgecolor="white", label="equal width")
        masses = found["mass"]
        top.plot([each["confidence"] for each in masses], [each["accuracy"] for each in masses], "o-", ms=3.5, lw=1,
                 color="#c2502f", label="equal mass")  # fmt: skip
        top.plot([0, 1], [0, 1], "--", color="#777777", lw=1)
        top.set(xlim=(0, 1), ylim=(0, 1))
        top.set_title(f"{words}: error {found['ece']:.1%}, nll {found['nll']:.2f}", fontsize=9)
        below.bar(
            low, [each["count"] for each in bins], width, align="edge", color="#bbbbbb", edgecolor="white"
        )
        below.set_xlabel("confidence", fontsize=9)
        for axes in (top, below):
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("right", fontsize=9)
    panels[1, 0].set_ylabel("pictures", fontsize=9)
    panels[0, 0].legend(fontsize=8, loc="upper left", frameon=False)
    save_figure(figure, path)


def _curves(numbers: dict[str, Any], title: str, path: Path) -> None:
    """Few-shot beside zero-shot and the whole probe, where there are shots; and the search for the strength."""
    from matplotlib.figure import Figure

    curve, tried = numbers["few_shot"], numbers["tried"]
    count = bool(curve) + bool(tried)
    figure = Figure(figsize=(5 * max(count, 1), 3.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = list(figure.subplots(1, max(count, 1), squeeze=False)[0])
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("right, %", fontsize=9)
    left = panels[0]
    if curve:
        x = [each["shots"] for each in curve]
        left.errorbar(x, [100 * each["mean"] for each in curve], [100 * (each["spread"] or 0) for each in curve],
                      marker="o", ms=4, capsize=3, color="#2f6db3", label="few-shot probe")  # fmt: skip
        left.set_xscale("log", base=2)
        left.set_xticks(x, [str(value) for value in x])
        left.set_xlabel("examples a name", fontsize=9)
    if curve or not tried:
        full = f"probe on all {numbers['examples']:,}"
        left.axhline(100 * numbers["probe"]["top1"], color="#777777", ls=":", label=full)
        if numbers["zero_shot"]:
            left.axhline(100 * numbers["zero_shot"]["top1"], color="#c2502f", ls="--", label="zero-shot")
        left.set_ylim(0, 1.08 * left.get_ylim()[1])
        left.legend(fontsize=8, frameon=False)
    if tried:
        axes = panels[-1]
        axes.plot([each["strength"] for each in tried], [100 * each["right"] for each in tried], "o-", ms=4,
                  color="#2f6db3")  # fmt: skip
        axes.axvline(numbers["strength"], color="#777777", ls=":")
        axes.set_xscale("log")
        axes.set_xlabel("strength (small: regularised)", fontsize=9)
        axes.set_title(f"on the validation part; chosen: {numbers['strength']:,.3g}", fontsize=9)
    save_figure(figure, path)
