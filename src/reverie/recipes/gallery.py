"""The gallery of `reverie demo` as files: a page, pictures, moving pictures, and a contact sheet.

The page is a function of results.json alone and is inert: no script, no link out of its folder, every text escaped, and
a policy in its head that lets the browser load nothing but the pictures beside it. Moving pictures stand still for
those who ask their system for less motion.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reverie.page import document, escaped

PREVIEW_BYTES = 400_000
_TILE, _GAP, _LINE = 128, 8, 24  # of the contact sheet, in pixels


# --- pictures -------------------------------------------------------------------------------------------------------


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """uint8 `h w 3` -> PNG."""
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, format="PNG", optimize=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the contact sheet: tiles uint8 `h w 3`, and a title for each, or one for all."""

    tiles: Sequence[np.ndarray]
    titles: Sequence[str]


def title(words: str, meaning: str = "") -> str:
    """Words as the contact sheet can write them on every machine, whatever fonts it has: Chinese by its meaning."""
    return words if words.isascii() else f"zh: {meaning}"


def preview(rows: Sequence[Row]) -> bytes:
    """A contact sheet as a PNG of at most `PREVIEW_BYTES`, in fewer colours if it must be."""
    columns = max(len(row.tiles) for row in rows)
    size = (_GAP + columns * (_TILE + _GAP), _GAP + len(rows) * (_TILE + _LINE + _GAP))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, row in enumerate(rows):
        y = _GAP + number * (_TILE + _LINE + _GAP)
        for column, tile in enumerate(row.tiles):
            picture = Image.fromarray(np.ascontiguousarray(tile)).resize(
                (_TILE, _TILE), Image.Resampling.NEAREST
            )
            sheet.paste(picture, (_GAP + column * (_TILE + _GAP), y))
        room = _TILE if len(row.titles) > 1 else size[0] - 2 * _GAP
        for column, text in enumerate(row.titles):
            while text and font.getlength(text) > room:
                text = text[:-1]
            draw.text((_GAP + column * (_TILE + _GAP), y + _TILE + 2), text, fill=(60, 60, 60), font=font)
    for colours in (0, 256, 64, 16, 4):
        small = sheet.quantize(colours, dither=Image.Dither.NONE) if colours else sheet
        small.save(file := io.BytesIO(), format="PNG", optimize=True)
        if file.tell() <= PREVIEW_BYTES:
            break
    return file.getvalue()


# --- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f5f2; --card: #fff; --ink: #1d1c1a; --soft: #6b6860; --line: #e2dfd8;
  --accent: #7a3ff2; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #141416; --card: #1e1e22; --ink: #ecebe8; --soft: #9a978f; --line: #323238; --accent: #b494ff;
    --good: #5fd39a; }
  img { filter: brightness(.92); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei",
  "Noto Sans CJK SC", sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3.5rem; }
h1 { font-size: clamp(2.2rem, 6vw, 3.4rem); line-height: 1; letter-spacing: -.03em; margin: 0 0 1rem; }
h2 { font-size: 1.6rem; letter-spacing: -.015em; margin: 0; }
h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
h3 .soft { font-weight: 400; }
p { margin: .3rem 0 0; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; margin-top: 1.2rem; }
a { color: var(--accent); text-underline-offset: .2em; }
section { margin-top: 3.5rem; }
.soft, figcaption, dt { color: var(--soft); }
.small, figcaption { font-size: .82rem; }
figcaption, dd, .small { font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
  margin-top: 1.3rem; }
.broad { grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1rem; min-width: 0; }
figure { margin: 0; }
img { display: block; border-radius: 8px; background: #fff; image-rendering: pixelated; height: auto; }
.large { width: 192px; }
.middle { width: 128px; }
.little { width: 64px; }
.strip { width: 100%; max-width: 512px; margin-top: .7rem; }
.row { display: flex; flex-wrap: wrap; gap: .7rem; margin-top: .7rem; align-items: flex-start; }
.row > figure { min-width: 0; }
.row figcaption { max-width: 128px; overflow-wrap: anywhere; line-height: 1.3; margin-top: .25rem; }
.top { display: flex; flex-wrap: wrap; gap: .7rem 1rem; }
.top > div { flex: 1 1 7rem; }
.four { display: grid; grid-template-columns: repeat(4, 64px); gap: .35rem; margin-top: .8rem; }
.best img { outline: 2px solid var(--accent); outline-offset: 2px; }
.four figcaption { line-height: 1.25; margin-top: .35rem; }
.tag { display: inline-block; white-space: nowrap; border: 1px solid var(--line); border-radius: 99px;
  padding: 0 .55em; font-size: .78rem; font-weight: 400; color: var(--soft); }
.query { margin-top: 1rem; }
.asked { display: flex; gap: 1rem; align-items: center; }
.good { color: var(--good); }
.guess { display: grid; grid-template-columns: 1fr auto; gap: 0 .6rem; font-size: .88rem; line-height: 1.3;
  margin-top: .4rem; overflow-wrap: anywhere; }
.bar { grid-column: 1 / -1; width: 100%; height: 4px; margin-top: 2px; background: var(--line); border-radius: 2px; }
.bar rect { fill: var(--accent); }
.named { display: grid; grid-template-columns: 128px 1fr; gap: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .8rem 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 4rem; padding-top: 1.4rem; padding-bottom: 4rem; border-top: 1px solid var(--line);
  font-size: .92rem; }
"""


def page(results: dict[str, Any]) -> str:
    """results.json -> the page, whole."""
    sections = [
        ("drawn", "Drawn", _drawn), ("animated", "Animated", _animated), ("continued", "Continued", _continued),
        ("found", "Found", _found), ("named", "Named", _named),
    ]  # fmt: skip
    if "described" in results:
        sections.append(("described", "Described", lambda part: _described(part, results["drawn"])))
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    main = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{part(results[name])}</section>'
        for name, heading, part in sections
    )
    body = (
        f"<header><h1>Reverie</h1><p>All that you see here was drawn, moved, found and named on this machine in "
        f"{_time(results['seconds'])}, without a network, by {_COUNT[len(results['models'])]} small models trained "
        "from random weights.</p>"
        '<p class="soft">The prompts were written down beforehand, and no picture is chosen by hand. A score is the '
        "cosine between a picture and its words in CLIP&rsquo;s space; a rank says where the words come among all the "
        f"labels of the sample folder, 1 being the best. What goes wrong is shown as well.</p>"
        f"<nav>{links}</nav></header>\n"
        f"<main>{main}</main>\n{_foot(results)}"
    )
    return document("Reverie: a gallery", body, _STYLE, images="'self' file:")


def _drawn(part: dict[str, Any]) -> str:
    cards = []
    for prompt in part["prompts"]:
        best = prompt["drawings"][prompt["best"]]
        four = "".join(
            _figure(
                _image(drawing["file"], _said(prompt, f"seed {drawing['seed']}"), "little"),
                f"{drawing['score']:.3f}<br>rank {drawing['rank']}<br>seed {drawing['seed']}",
                "best" if drawing is best else "",
            )
            for drawing in prompt["drawings"]
        )
        cards.append(
            f'<article class="card">{_top(_image(best["file"], _said(prompt), "large"), prompt, best)}'
            f'<div class="four">{four}</div>{_note(_time(prompt["seconds"]) + " for all of them")}</article>'
        )
    count = sum(len(prompt["drawings"]) for prompt in part["prompts"])
    return (
        f"<p>{count} pictures for {len(cards)} prompts in {_time(part['seconds'])}. Of the {part['several']} of "
        "every prompt, CLIP keeps the one that it finds nearest to the words; all stand below it. The judge lends the "
        f'painter its text tower, so its praise is not a measurement.</p><div class="cards">{"".join(cards)}</div>'
    )


def _animated(part: dict[str, Any]) -> str:
    cards = "".join(
        f'<article class="card">{_top(_moving(clip, "large"), clip, clip)}{_strip(clip)}'
        f"{_note(_clip_facts(clip))}</article>"
        for clip in part["clips"]
    )
    return (
        f"<p>{len(part['clips'])} clips from words in {_time(part['seconds'])}: one for each prompt, no second try. "
        f'The score is the mean over the frames.</p><div class="cards">{cards}</div>'
    )


def _continued(part: dict[str, Any]) -> str:
    cards = []
    for clip in part["clips"]:
        words, given, original = clip["prompt"], clip["given"]["file"], clip["original"]
        trio = (
            _figure(_image(given, f"{words}, the given first frame", "middle"), "given")
            + _figure(_moving(clip, "middle"), "continued")
            + _figure(
                _still(original, given, f"{words}, the artist's clip", "middle"), "the artist&rsquo;s own"
            )
        )
        kept = "; the artist&rsquo;s clip was trained on" if clip["split"] == "train" else ""
        cards.append(
            f'<article class="card">{_heading(clip)}{_opinion(clip)}<div class="row">{trio}</div>{_strip(clip)}'
            f"{_note(_clip_facts(clip) + kept)}</article>"
        )
    return (
        f"<p>The first frame is given and the rest imagined, {len(cards)} times in {_time(part['seconds'])}. Beside "
        f'it is what the artist made of the same frame.</p><div class="cards broad">{"".join(cards)}</div>'
    )


def _found(part: dict[str, Any]) -> str:
    rows = []
    for query in part["queries"]:
        answers = "".join(
            _figure(
                _image(answer["file"], answer["label"], "middle"),
                f"{answer['score']:.3f} {escaped(answer['label'])}<br>{escaped(answer['source'])}"
                + ' <span class="good">tagged so</span>' * answer["says"],
            )
            for answer in query["answers"]
        )
        if query["by"] == "words":
            tagged = sum(answer["says"] for answer in query["answers"])
            note = f"{tagged} of {len(query['answers'])} have these very words in their captions"
            asked = f"<div>{_heading(query)}{_note(note)}</div>"
        else:
            picture = query["picture"]
            origin = "drawn above" if picture["source"] == "drawn" else picture["source"]
            asked = (
                f"{_image(picture['file'], picture['label'] + ', which is looked for', 'little')}<div>"
                f"<h3>pictures like this one</h3>{_note(escaped(picture['label']) + ', ' + escaped(origin))}</div>"
            )
        rows.append(
            f'<article class="card query"><div class="asked">{asked}</div><div class="row">{answers}</div></article>'
        )
    return (
        f"<p>{part['pictures']:,} pictures of the sample folder, embedded in {_time(part['embedding_seconds'])}, "
        f"searched by words in two languages and by pictures; all in {_time(part['seconds'])}.</p>{''.join(rows)}"
    )


def _named(part: dict[str, Any]) -> str:
    cards = []
    for picture in part["pictures"]:
        guesses = "".join(
            f'<div class="guess"><span{_GOOD * (guess["name"] == picture["label"])}>{escaped(guess["name"])}</span>'
            f"<span>{guess['probability']:.1%}</span>"
            '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect width="{100 * guess["probability"]:.1f}" height="4"/></svg></div>'
            for guess in picture["guesses"]
        )
        verdict = (
            f"<b{_GOOD}>right</b>"
            if picture["rank"] == 1
            else f"the right name comes at place {picture['rank']}"
        )
        cards.append(
            f'<article class="card named">{_image(picture["file"], picture["label"], "middle")}'
            f"<div><h3>{escaped(picture['label'])}</h3>{_note(verdict)}{guesses}</div></article>"
        )
    low, high = part["top1_interval"]
    return (
        f"<p>{len(cards)} of {part['images']} {escaped(part['style'].title())} pictures, drawn by lot; no model "
        f"saw this style. CLIP chooses among {part['ways']} labels. Over all {part['images']} it is right at once "
        f"in {part['top1']:.0%} (95&nbsp;% interval {low:.0%} to {high:.0%}) and has the right name among its first "
        f'five in {part["top5"]:.0%}.</p><div class="cards">{"".join(cards)}</div>'
    )


def _described(part: dict[str, Any], drawn: dict[str, Any]) -> str:
    """Captions of a style never trained on; of each prompt the drawings, the best by BLIP framed, CLIP's said."""
    told = "".join(
        f'<article class="card named">{_image(picture["file"], picture["label"], "middle")}<div>'
        f"<h3{_GOOD * picture['named']}>{escaped(picture['caption'])}</h3>{_note(escaped(picture['label']))}</div>"
        "</article>"
        for picture in part["pictures"]
    )
    cards, same = [], 0
    for prompt, found in zip(drawn["prompts"], part["matched"], strict=True):
        chances = found["probabilities"]
        best = max(range(len(chances)), key=chances.__getitem__)
        same += best == prompt["best"]
        four = "".join(
            _figure(
                _image(drawing["file"], _said(prompt, f"seed {drawing['seed']}"), "little"),
                f"{chance:.0%}" + "<br>CLIP&rsquo;s" * (i == prompt["best"]),
                "best" if i == best else "",
            )
            for i, (drawing, chance) in enumerate(zip(prompt["drawings"], chances, strict=True))
        )
        cards.append(f'<article class="card">{_heading(prompt)}<div class="four">{four}</div></article>')
    low, high = part["named_interval"]
    return (
        f"<p>BLIP says in its own words what {len(part['pictures'])} {escaped(part['style'].title())} pictures show, "
        f"drawn by lot; no model saw this style. Of all {part['images']}, {part['named']:.0%} of the captions contain "
        f"a name of the thing (95&nbsp;% interval {low:.0%} to {high:.0%}), green here.</p>"
        f'<div class="cards">{told}</div>'
        f"<p>What was drawn, looked at beside its prompt: how probably both belong together. BLIP&rsquo;s choice is "
        f"framed; CLIP&rsquo;s is the same in {same} of {len(cards)}. BLIP learnt from the "
        f'painter&rsquo;s pictures.</p><div class="cards">{"".join(cards)}</div>'
    )


def _foot(results: dict[str, Any]) -> str:
    every = ("loading", "drawn", "animated", "continued", "found", "named", "described")
    parts = [name for name in every if name in results]
    peak = results["peak_memory"]
    facts = [
        *(
            (model["name"], f"{model['parameters'] / 1e6:.1f} million parameters")
            for model in results["models"]
        ),
        (
            "sampling",
            f"{results['steps']} steps, guidance {results['guidance']:g}, seeds from {results['seed']}",
        ),
        ("times", ", ".join(f"{name} {results[name]['seconds']:.1f} s" for name in parts)),
        ("together", f"{results['seconds']:.1f} s"),
        ("memory", f"{peak / 2**30:.2f} GiB at most" if peak else "not told by this system"),
        (
            "on",
            results["device"]
            if results["device"] != "cpu"
            else f"the processor, {results['threads']} threads",
        ),
        ("with", f"Reverie {results['reverie']}, PyTorch {results['torch']}"),
    ]
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts)
    return (
        f'<footer><h2>This run</h2><dl>{rows}</dl><p>All numbers are in <a href="results.json">results.json</a>. The '
        "pictures of the sample folder are Fluent Emoji (Microsoft, MIT), Noto Emoji (Google, Apache-2.0) and Twemoji "
        "(Twitter and contributors, CC-BY 4.0).</p></footer>"
    )


# --- small pieces ---------------------------------------------------------------------------------------------------


_GOOD = ' class="good"'
_COUNT = {2: "two", 3: "three"}


def _time(seconds: float) -> str:
    return f"{seconds:.1f}&nbsp;s"


def _note(note: str) -> str:
    """`note` is HTML already."""
    return f'<p class="small soft">{note}</p>'


def _image(file: str, alt: str, size: str) -> str:
    return f'<img class="{size}" src="{escaped(file)}" alt="{escaped(alt)}" decoding="async">'


def _figure(image: str, caption: str, kind: str = "") -> str:
    """`image` and `caption` are HTML already."""
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def _still(moving: str, poster: str, alt: str, size: str) -> str:
    """A moving picture, or its poster where less motion is wanted."""
    return (
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{escaped(poster)}">'
        f"{_image(moving, alt, size)}</picture>"
    )


def _moving(clip: dict[str, Any], size: str) -> str:
    return _still(clip["file"], clip["poster"], _said(clip, "moving"), size)


def _strip(clip: dict[str, Any]) -> str:
    return _image(clip["strip"], _said(clip, "frame by frame"), "strip")


def _said(prompt: dict[str, Any], more: str = "") -> str:
    return ", ".join(filter(None, (prompt["prompt"], prompt["meaning"], more)))


def _heading(prompt: dict[str, Any]) -> str:
    meaning = f' <span class="soft">{escaped(prompt["meaning"])}</span>' if prompt["meaning"] else ""
    held = ' <span class="tag">never trained on</span>' if prompt["held_out"] else ""
    return f'<h3><span lang="{escaped(prompt["language"])}">{escaped(prompt["prompt"])}</span>{meaning}{held}</h3>'


def _opinion(drawing: dict[str, Any], between: str = ", ") -> str:
    facts = (f"score <b>{drawing['score']:.3f}</b>", f"rank <b>{drawing['rank']}</b> of {drawing['of']}")
    seed = f"seed {drawing['seed']}"
    return f'<p class="small">{between.join((*facts, seed))}</p>'


def _top(image: str, prompt: dict[str, Any], drawing: dict[str, Any]) -> str:
    """A large picture (HTML already) with what is said of it at its side."""
    return f'<div class="top">{image}<div>{_heading(prompt)}{_opinion(drawing, "<br>")}</div></div>'


def _clip_facts(clip: dict[str, Any]) -> str:
    return f"{clip['frames']} frames, {clip['fps']:g} a second, made in {_time(clip['seconds'])}"
