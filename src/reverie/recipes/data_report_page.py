"""The page of `reverie data report`: histograms as inline SVG, lists, pictures and a map, all in one inert file.

Whatever came from the data is escaped, cut where it is long, and stands for itself where it is written from right to
left. Lists are cut on the page; report.json has them whole.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from PIL import Image

from reverie.data.index import Index, Item
from reverie.data.report import Contents, Counts, Reason, Score, Spread, Wording, reasons
from reverie.page import document, escaped, inlined
from reverie.progress import size
from reverie.recipes.data_report import Look, Pair, cell_of, drawn_map
from reverie.train.curves import INK

SIDE = 112  # pixels of a picture on a card
NAMES = 100  # files that a list shows
GROUPS = 30  # reasons, sources of captions, scores that are shown
BARS = 15  # lines of a list with bars
NONE = "none"  # a label or source that is not told
TEXT = 220  # characters of a caption

_STYLE = """
:root { color-scheme: light dark; --ground: #f7f6f3; --card: #fff; --ink: #1d1c1a; --soft: #6b6860; --line: #e2dfd8;
  --accent: #4269d0; --pale: #4269d033; --warn: #b3541e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #141416; --card: #1d1d21; --ink: #ecebe8; --soft: #9a978f; --line: #323238; --accent: #7f9cf0;
    --pale: #7f9cf033; --warn: #f0a36b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei",
  "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
p { margin: .3rem 0; max-width: 52rem; }
a { color: var(--accent); text-decoration: none; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-top: .9rem; }
section { margin-top: 2.6rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
.soft { color: var(--soft); }
.warn { color: var(--warn); }
.small, .facts { font-size: .82rem; }
.facts { color: var(--soft); font-variant-numeric: tabular-nums; margin: .35rem 0 0; line-height: 1.4; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr)); gap: .9rem;
  margin-top: .9rem; align-items: start; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem; min-width: 0; }
.chart { display: block; width: 100%; height: auto; }
.chart rect { fill: var(--accent); }
.chart text { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums; }
.chart line { stroke: var(--line); }
.chart .median { stroke: var(--ink); stroke-dasharray: 2 2; opacity: .6; }
.list { margin: 0; padding: 0; list-style: none; font-size: .85rem; line-height: 1.35; }
.list li { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 .8rem; margin-top: .4rem; }
.list bdi { overflow-wrap: anywhere; text-align: left; }
.list span { font-variant-numeric: tabular-nums; color: var(--soft); }
.bar { grid-column: 1 / -1; width: 100%; height: 4px; margin-top: 2px; background: var(--pale); border-radius: 2px; }
.bar rect { fill: var(--accent); }
.wide { overflow-x: auto; margin-top: .9rem; }
code { font-size: .92em; background: var(--pale); border-radius: 4px; padding: 0 .3em; }
h3 + .pictures { margin-top: .4rem; }
section > h3 { margin: 1.6rem 0 .3rem; font-size: 1.02rem; }
.alone { font-size: 1.3rem; margin: 0; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th { font-weight: 500; color: var(--soft); text-align: right; }
td { text-align: right; border-top: 1px solid var(--line); }
th, td { padding: .25rem .5rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; overflow-wrap: anywhere;
  width: 100%; min-width: 9rem; }
details { margin-top: .45rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details ul { margin: .3rem 0 .6rem; padding-left: 1.2rem; font-size: .82rem; color: var(--soft); max-height: 24rem;
  overflow: auto; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); gap: .8rem;
  margin-top: .9rem; }
.pictures figure { margin: 0; min-width: 0; overflow: hidden; }
.pictures img, .none { width: 112px; height: 112px; border-radius: 8px; background: #fff; display: block;
  border: 1px solid var(--line); object-fit: contain; }
.none { background: var(--pale); padding: .5rem; font-size: .75rem; overflow: hidden; overflow-wrap: anywhere; }
figcaption { font-size: .8rem; line-height: 1.35; margin-top: .3rem; overflow-wrap: anywhere; }
figcaption bdi { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6; overflow: hidden; }
figcaption .soft { font-size: .72rem; display: block; }
.map { display: block; max-width: 100%; height: auto; margin-top: .8rem; }
.map rect { fill: transparent; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem; margin-top: .5rem; }
.legend svg { width: .8em; height: .8em; margin-right: .35em; }
""" + "".join(f".ink{i} {{ stroke: {ink}; }}\n.fill{i} {{ fill: {ink}; }}\n" for i, ink in enumerate(INK))

Draw = Callable[..., dict[str, "Image.Image | str"]]  # names, side -> pictures, or why there is none


def page(
    index: Index, contents: Contents, look: Look, lot: Sequence[Item], draw: Draw, *, quiet: bool = False
) -> str:
    """The whole page. lot: items that are shown as they come. draw: `data_report.thumbnails` of this index."""
    items = {item.file_name: item for item in index}
    named = [*(item.file_name for item in lot), *(pair.file_name for pair in (*look.worst, *look.best))]
    shown = {
        name: _image(picture) for name, picture in draw([*dict.fromkeys(named)], SIDE, quiet=quiet).items()
    }
    sections = [
        ("files", "Files", _files(contents, look)),
        ("drawn", "Drawn by lot", _lot(lot, shown)),
        ("sizes", "Sizes", _sizes(contents)),
        ("captions", "Captions", _captions(contents)),
        ("origin", "Sources, labels, licences", _origin(contents)),
        ("scores", "Scores", _scores(contents.scores)),
        ("copies", "Copies", _copies(contents)),
        ("fit", "Which captions fit", _fit(contents, look, items, shown)),
        ("map", "Map", _map(look, items, draw, quiet)),
    ]
    there = [(name, heading, body) for name, heading, body in sections if body]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in there)
    main = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in there
    )
    title = cut(contents.folder, 80)
    return document(
        f"{title}: a report",
        f"<header><h1>{_own(title)}</h1><p>{_summary(contents)}</p><nav>{links}</nav></header><main>{main}</main>",
        _STYLE,
    )


def _summary(contents: Contents) -> str:
    kinds = [(contents.pictures, "picture"), (contents.clips, "clip"), (contents.captions, "caption")]
    parts = [_many(count, word) for count, word in kinds if count]
    if not contents.accepted:
        return f"None of the {contents.total:,} files is accepted: below is why."
    lost = contents.total - contents.accepted
    return f"{', '.join(parts)}" + (f"; {lost:,} of {contents.total:,} files are left out." if lost else ".")


# --- sections -------------------------------------------------------------------------------------------------------


def _files(contents: Contents, look: Look) -> str:
    tiles = [
        (f"{contents.total:,}", "files in the index"), (f"{contents.accepted:,}", "accepted"),
        (f"{contents.left_out:,}", "rejected"), (f"{contents.set_aside:,}", "marked"),
        (f"{contents.pictures:,}", "pictures"), (f"{contents.clips:,}", "clips"),
        (weight(contents.bytes), "of accepted files"),
    ]  # fmt: skip
    told = "".join(
        f'<div class="card"><b>{value}</b><span class="soft">{word}</span></div>' for value, word in tiles
    )
    parts = [f'<div class="tiles">{told}</div>']
    if contents.splits:
        parts.append(f'<div class="grid">{_list("Splits", contents.splits, contents.accepted)}</div>')
    if contents.rejected:
        parts.append(f"<h3>Rejected</h3>{_reasons(contents.rejected)}")
    if contents.marked:
        parts.append(
            f'<h3>Marked</h3><p class="soft">Sound files that are left out, which <code>--undo</code> takes back.</p>'
            f"{_reasons(contents.marked)}"
        )
    if look.unread:
        parts.append(
            "<h3>Not to be read now</h3>"
            + '<p class="soft">Of the files that the model looked at.</p>'
            + _reasons(reasons(look.unread))
        )
    return "".join(parts)


def _lot(lot: Sequence[Item], shown: Mapping[str, str]) -> str:
    return _pictures(
        (shown[item.file_name], item.captions[0].text if item.captions else "", _about(item)) for item in lot
    )


def _sizes(contents: Contents) -> str:
    units: dict[str, Callable[[float], str]] = {"bytes": weight}
    names = {"aspect": "aspect (width / height)"}
    charts = [
        _chart(names.get(name, name), one, units.get(name, number))
        for name, one in {**contents.sizes, **contents.clip_lengths}.items()
    ]
    if contents.shapes:
        charts.append(_list("Commonest sizes", contents.shapes, contents.accepted))
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def _captions(contents: Contents) -> str:
    if not contents.accepted:
        return ""
    if not contents.captions and not contents.dropped:
        return "<p>No accepted file has a caption.</p>"
    parts = [
        f"<p>{_many(contents.captions, 'caption')}, {contents.distinct:,} of them different; files without any: "
        f"{contents.without_captions:,}.</p>"
    ]
    charts = [_chart("captions of a file", contents.captions_each)]
    for group in (*contents.languages[:6], *(contents.kinds if len(contents.kinds) > 1 else ())):
        charts += [
            _chart(f"{group.name}: words", group.words),
            _chart(f"{group.name}: characters", group.characters),
        ]
    parts.append(f'<div class="grid">{"".join(charts)}</div>')
    tables = (
        ("Language", contents.languages), ("Kind", contents.kinds), ("Source", contents.sources_of_captions),
    )  # fmt: skip
    parts += [f'<div class="card wide">{_table(head, rows)}</div>' for head, rows in tables if rows]
    lists = [
        _list(f"Words: {language}", counts, contents.accepted)
        for language, counts in [*contents.words.items()][:6]
    ]
    if contents.repeated:
        lists.append(_list("Captions of more than one file", contents.repeated, contents.accepted))
    parts.append(
        f'<div class="grid">{"".join(lists)}</div><p class="facts">Words are counted by the files whose captions have '
        "them; where a language is written without spaces, pairs of letters.</p>"
        if lists
        else ""
    )
    if contents.dropped:
        parts.append(
            '<h3>Dropped captions</h3><p class="soft">Nobody learns from them; they stay in the index.</p>'
            f"{_reasons(contents.dropped, 'caption')}"
        )
    return "".join(parts)


def _origin(contents: Contents) -> str:
    if not contents.accepted:
        return ""
    total = contents.accepted
    lists = [_list("Sources", contents.sources, total)]
    if contents.labels:
        lists.append(
            _list(
                f"Labels: {contents.labels_in_all:,}, {contents.unlabelled:,} files without",
                contents.labels,
                total,
            )
        )
    lists.append(_list("Licences", contents.licences, total))
    return f'<div class="grid">{"".join(lists)}</div>'


def _scores(scores: Sequence[Score]) -> str:
    cards = []
    for score in scores[:GROUPS]:
        lacks = [
            f"{score.without:,} files without" * bool(score.without),
            f"{score.odd:,} not finite" * bool(score.odd),
        ]
        note = ", ".join(filter(None, lacks))
        if score.spread is None:
            cards.append(f'<div class="card"><h3>{_own(score.name)}</h3><p class="facts">{note}</p></div>')
        else:
            cards.append(_chart(score.name, score.spread, note=note))
    return f'<div class="grid">{"".join(cards)}</div>{_more(len(scores), GROUPS)}' if cards else ""


def _copies(contents: Contents) -> str:
    if not contents.accepted and not contents.duplicates:
        return ""
    files = sum(map(len, contents.copies))
    parts = [
        f"<p>{files:,} accepted files have the bytes of another: {_many(len(contents.copies), 'group')}.</p>"
        if contents.copies
        else "<p>No accepted file is there twice, byte for byte.</p>"
    ]
    if contents.across:
        parts.append(
            f'<p class="warn">{len(contents.across):,} of these groups are in more than one split, so scores will '
            "flatter.</p>"
        )
    for title, groups in (("In more than one split", contents.across), ("All groups", contents.copies)):
        if groups:
            parts.append(_folded(title, [" = ".join(group) for group in groups]))
    if contents.duplicates:
        leaks = f", {contents.leaks:,} of them leaks of what is held out into training" * bool(contents.leaks)
        parts.append(
            f"<p><code>reverie data dedupe</code> has marked {_many(contents.duplicates, 'near duplicate')}{leaks}.</p>"
        )
    else:
        parts.append(
            '<p class="soft">No near duplicates are marked; <code>reverie data dedupe</code> looks for them.</p>'
        )
    return "".join(parts)


def _fit(contents: Contents, look: Look, items: Mapping[str, Item], shown: Mapping[str, str]) -> str:
    if look.pairs is None:
        return ""
    who = _own(look.model) if look.model else "the model of <code>reverie data score</code>"

    def cards(pairs: Sequence[Pair]) -> str:
        return _pictures(
            (shown[pair.file_name], pair.caption, f"{pair.cosine:.3f} · {_about(items[pair.file_name])}")
            for pair in pairs
        )

    some = f" of {contents.accepted:,}, drawn by lot or scored before" * (look.files < contents.accepted)
    return (
        f"<p>The cosine of each caption with its picture, by {who}: {_many(look.pairs.count, 'caption')} of "
        f"{_many(look.files, 'file')}{some}. Of each file one caption at most is shown.</p>"
        f'<div class="grid">{_chart("cosine of caption and picture", look.pairs)}</div>'
        f"<h3>Least fitting</h3>{cards(look.worst)}<h3>Most fitting</h3>{cards(look.best)}"
    )


def _map(look: Look, items: Mapping[str, Item], draw: Draw, quiet: bool) -> str:
    if not look.map:
        return ""
    cell = cell_of(look)
    names = [place.file_name for place in look.map]
    sheet = drawn_map(look, draw(names, cell - 4, quiet=quiet))
    sheet.save(file := io.BytesIO(), format="WEBP", quality=72)
    address = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    what, groups = colours([items[name] for name in names])
    ranks = {group: i for i, (group, _) in enumerate(groups)}
    last = len(INK) - 1
    frames = "".join(
        f'<rect class="ink{min(ranks[_group(items[place.file_name], what)], last)}" x="{place.column * cell + 1}" '
        f'y="{place.row * cell + 1}" width="{cell - 2}" height="{cell - 2}"><title>{_hover(items[place.file_name])}'
        "</title></rect>"
        for place in look.map
    )
    kept = groups[:last] if len(groups) > len(INK) else groups
    rest = sum(count for _, count in groups[len(kept) :])
    legend = "".join(
        f'<span><svg viewBox="0 0 8 8" aria-hidden="true"><rect class="fill{i}" width="8" height="8"/></svg>'
        f"{_own(cut(name, 60))} {count:,}</span>"
        for i, (name, count) in enumerate([*kept, *([("all others", rest)] if rest else [])])
    )
    width, height = sheet.size
    return (
        f"<p>{_many(len(look.map), 'file')} by what {_own(look.model)} sees in them (t-SNE): what lies together looks "
        "alike to it; distances between groups mean little. Each stands on the nearest free place. Frames are coloured "
        f'by {what}.</p><div class="legend">{legend}</div>'
        f'<svg class="map" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="a map of files"><image href="{address}" width="{width}" height="{height}"/>'
        f"{frames}</svg>"
    )


def colours(items: Sequence[Item]) -> tuple[str, list[tuple[str, int]]]:
    """What tells these files apart by colour, and its values, commonest first: labels if few, sources, or splits."""
    for what in ("label", "source"):
        counts = Counter(_group(item, what) for item in items)
        few = len(counts) <= (len(INK) if what == "label" else 4 * len(INK))
        if few and len(counts) > 1 and 2 * counts[NONE] < len(items):
            return what, counts.most_common()
    return "split", Counter(_group(item, "split") for item in items).most_common()


def _group(item: Item, what: str) -> str:
    return str(getattr(item, what) or NONE)


# --- small pieces ---------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Whole numbers whole, others to three digits."""
    if abs(value) < 1e15 and (value == round(value) or abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _share(count: int, total: int) -> str:
    share = count / max(total, 1)
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def weight(count: float) -> str:
    """Bytes as people write them."""
    return f"{count:.0f} B" if count < 1000 else size(count)


def cut(text: str | None, most: int = TEXT) -> str:
    """One line of at most so many characters."""
    line = " ".join((text or "")[: 20 * most].split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def _own(text: object) -> str:
    """Text of the data: escaped, and its direction its own affair."""
    return f"<bdi>{escaped(text)}</bdi>"


def _about(item: Item) -> str:
    """Where an item is from, in a line."""
    moving = [f"{item.frames} frames"] if (item.frames or 1) > 1 else []
    return " · ".join([*moving, cut(str(item.split), 20), cut(item.file_name, 90)])


def _hover(item: Item) -> str:
    said = f": {cut(item.captions[0].text, 80)}" if item.captions else ""
    return escaped(f"{cut(item.file_name, 90)}{said}")


def _image(picture: Image.Image | str) -> str:
    if isinstance(picture, str):
        return f'<div class="none">{escaped(cut(picture, 120))}</div>'
    return f'<img src="{inlined(picture, SIDE)}" alt="" loading="lazy" decoding="async">'


def _pictures(shown: Iterable[tuple[str, str | None, str]]) -> str:
    """(image as HTML, caption, what else there is to say) side by side."""
    figures = "".join(
        f"<figure>{image}<figcaption>{_own(cut(caption))}"
        f'<span class="soft">{_own(about)}</span></figcaption></figure>'
        for image, caption, about in shown
    )
    return f'<div class="pictures">{figures}</div>' if figures else ""


def _chart(
    title: str, spread: Spread | None, unit: Callable[[float], str] = number, *, note: str = ""
) -> str:
    """A card with a histogram; nothing where there is nothing to draw."""
    if spread is None:
        return ""
    ends = (
        ("least", spread.least), ("median", spread.median), ("mean", spread.mean), ("most", spread.most),
    )  # fmt: skip
    if spread.least == spread.most:
        drawn, facts = (
            f'<p class="alone">{unit(spread.least)}</p>',
            f"all {spread.count:,} alike" if spread.count > 1 else "one alone",
        )
    else:
        drawn = histogram(spread, unit)
        facts = " · ".join(f"{word} {unit(value)}" for word, value in ends)
    facts = "<br>".join(filter(None, [facts, "on a logarithmic scale" * spread.log, escaped(note)]))
    return f'<div class="card"><h3>{_own(cut(title, 60))}</h3>{drawn}<p class="facts">{facts}</p></div>'


def histogram(spread: Spread, unit: Callable[[float], str] = number) -> str:
    """A spread as SVG: bars with their counts when pointed at, the median dashed, the ends of the axis named."""
    width, top, ground = 300.0, 14.0, 100.0
    most = max(count for _, _, count in spread.bars)
    step = width / len(spread.bars)
    single = all(low == high for low, high, _ in spread.bars)
    room = min(step, 60.0)  # a lonely bar need not fill the card
    bars, labels = [], []
    for i, (low, high, count) in enumerate(spread.bars):
        tall = max((ground - top) * count / most, 1.5) if count else 0.0
        x = (i + 0.5) * step - room / 2
        name = unit(low) if low == high else f"{unit(low)} to {unit(high)}"
        bars.append(
            f'<rect x="{x + 0.06 * room:.1f}" y="{ground - tall:.1f}" width="{0.88 * room:.1f}" height="{tall:.1f}">'
            f"<title>{name}: {count:,}</title></rect>"
        )
        if single:
            labels.append(((i + 0.5) * step, unit(low), "middle"))
    every = -(-max((len(text) for _, text, _ in labels), default=0) * 7 // max(int(step), 1))
    labels = labels[:: max(every, 1)]  # as many as have room
    line = ""
    if not single:
        labels = [(0.0, unit(spread.bars[0][0]), "start"), (width, unit(spread.bars[-1][1]), "end")]
        x = _along(spread) * width
        line = f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{ground}"/>'
    words = "".join(
        f'<text x="{x:.1f}" y="{ground + 13}" text-anchor="{anchor}">{text}</text>'
        for x, text, anchor in labels
    )
    return (
        f'<svg class="chart" viewBox="0 0 300 118" role="img" aria-label="histogram"><text x="0" y="9">{most:,}</text>'
        f'<line x1="0" x2="{width:.0f}" y1="{ground}" y2="{ground}"/>{"".join(bars)}{line}{words}</svg>'
    )


def _along(spread: Spread) -> float:
    """Where along the bars the median stands, in [0, 1]."""
    for i, (low, high, _) in enumerate(spread.bars):
        if spread.median <= high:
            if spread.log:
                part = math.log(spread.median / low) / math.log(high / low)
            else:  # halves, so that nothing overflows
                part = (spread.median / 2 - low / 2) / ((high / 2 - low / 2) or 1.0)
            return (i + min(max(part, 0.0), 1.0)) / len(spread.bars)
    return 1.0


def _list(title: str, counts: Counts, total: int) -> str:
    """A card with names, how often each is there, and bars."""
    most = max((count for _, count in counts), default=1)
    rows = "".join(
        f"<li>{_own(cut(name, 120))}<span>{count:,} · {_share(count, total)}</span>"
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * count / most:.1f}" height="4"/></svg></li>'
        for name, count in counts[:BARS]
    )
    return f'<div class="card"><h3>{escaped(title)}</h3><ul class="list">{rows}</ul></div>'


def _table(head: str, rows: Sequence[Wording]) -> str:
    def cells(spread: Spread | None) -> str:
        return (
            "<td></td><td></td>"
            if spread is None
            else f"<td>{number(spread.median)}</td><td>{number(spread.most)}</td>"
        )

    body = "".join(
        f"<tr><td>{_own(cut(row.name, 60))}</td><td>{row.captions:,}</td><td>{row.files:,}</td>"
        f"{cells(row.words)}{cells(row.characters)}</tr>"
        for row in rows[:GROUPS]
    )
    return (
        f"<table><thead><tr><th>{head}</th><th>captions</th><th>files</th><th>words, median</th><th>most</th>"
        f"<th>characters, median</th><th>most</th></tr></thead><tbody>{body}</tbody></table>"
        + _more(len(rows), GROUPS)
    )


def _reasons(found: Sequence[Reason], what: str = "file") -> str:
    """Each reason with what it concerns, folded; of reasons of one, the file's name beside it."""
    parts = []
    for one in found[:GROUPS]:
        same = all(detail == one.reason for _, detail in one.files)
        lines = [name if same else f"{name}: {detail}" for name, detail in one.files]
        parts.append(_folded(one.reason, lines, what))
    return "".join(parts) + _more(len(found), GROUPS)


def _folded(title: str, lines: Sequence[str], what: str = "group") -> str:
    shown = "".join(f"<li>{_own(cut(line, 300))}</li>" for line in lines[:NAMES])
    return (
        f'<details><summary>{_own(cut(title, 160))} <span class="soft">{_many(len(lines), what)}</span></summary>'
        f"<ul>{shown}</ul>{_more(len(lines), NAMES)}</details>"
    )


def _more(count: int, most: int) -> str:
    return f'<p class="facts">{count - most:,} more in the .json beside this page</p>' if count > most else ""
