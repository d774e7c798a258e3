"""What CapFilt did to each file, to look at: pictures with their captions, by verdict, in one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from reverie import rng
from reverie.data.index import Index, Item
from reverie.media import MediaError
from reverie.page import document, escaped, inlined
from reverie.recipes.capfilt import VERDICTS, verdict_of
from reverie.recipes.search import media_of
from reverie.recipes.writing import pictures

STYLE = """
:root { color-scheme: light dark; --soft: #777; --line: #8884; --good: #1a8f55; --bad: #c0392b; }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; font: 15px/1.45 system-ui, "Noto Sans", "PingFang SC",
  "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .5rem; }
h2 { margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0; max-width: 50rem; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .8rem;
  margin-top: .8rem; }
.card { display: grid; grid-template-columns: 112px 1fr; gap: .8rem; border: 1px solid var(--line);
  border-radius: 10px; padding: .7rem; }
img { width: 112px; border-radius: 6px; background: #fff; }
.name { font-size: .78rem; color: var(--soft); overflow-wrap: anywhere; }
.kept, .dropped { overflow-wrap: anywhere; }
.kept { color: var(--good); }
.dropped { color: var(--bad); text-decoration: line-through; }
.fit { font-size: .78rem; color: var(--soft); font-variant-numeric: tabular-nums; }
"""


def sheet(index: Index, items: Sequence[Item], *, each: int = 60, seed: int = 0) -> str:
    """The page: of each verdict up to `each` files, drawn by lot; kept captions green, dropped ones struck through."""
    found: dict[str, list[Item]] = {name: [] for name in VERDICTS}
    for item in items:
        if (verdict := verdict_of(index, item)) is not None:
            found[verdict].append(item)
    media = media_of(index.folder, index)
    parts = [
        "<h1>CapFilt</h1>",
        f"<p>{escaped(index.folder.resolve().name)}: {sum(map(len, found.values())):,} files judged. "
        '<span class="kept">Green captions stay</span>, <span class="dropped">struck ones do not</span>; the number is '
        "the filter's probability that caption and picture match.</p>",
        *_fates(index, items),
    ]
    for verdict, own in found.items():
        lot = sorted(own, key=lambda item: rng.integer(seed, "sheet", item.file_name))[:each]
        shown = f", {len(lot)} of them drawn by lot" if len(lot) < len(own) else ""
        cards = "".join(_card(item, index.extra_of(item.file_name)["capfilt"], media) for item in lot)
        parts.append(
            f'<h2>{verdict}</h2><p class="soft">{len(own):,} files: {VERDICTS[verdict]}{shown}</p>'
            f'<div class="cards">{cards}</div>'
        )
    return document("CapFilt", "".join(parts), STYLE)


def _fates(index: Index, items: Sequence[Item]) -> list[str]:
    """A line for each source of captions: how many stayed."""
    counts: Counter[tuple[str, bool]] = Counter(
        (caption["source"], caption["kept"])
        for item in items
        if (record := index.extra_of(item.file_name).get("capfilt"))
        for caption in record["captions"]
    )
    return [
        f"<p>{escaped(source)}: {counts[source, True]:,} captions stay, {counts[source, False]:,} are dropped</p>"
        for source in dict.fromkeys(source for source, _ in counts)
    ]


def _card(item: Item, record: Mapping[str, Any], media: Any) -> str:
    captions = "".join(
        f'<div class="{"kept" if one["kept"] else "dropped"}">{escaped(one["text"])}</div>'
        f'<div class="fit">{one["fit"]:.3f} · {escaped(one["source"])}</div>'
        for one in record["captions"]
    )
    try:
        image = f'<img src="{inlined(pictures(media(item.file_name))[0])}" alt="" loading="lazy">'
    except (MediaError, OSError) as error:
        image = f'<div class="fit">{escaped(error)}</div>'
    return (
        f'<article class="card">{image}<div><div class="name">{escaped(item.file_name)}</div>{captions}</div>'
        "</article>"
    )
