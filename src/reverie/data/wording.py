"""Which words go with a sample this time: captions vary in training, by key.

A mix says how often captions of each kind are told: what people wrote, what models wrote in short, at length or as
tags, or none at all. It is drawn anew each time that a sample is seen, so the same data serves every mix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from reverie.data.index import STYLES, Caption, Item, style_of
from reverie.errors import InputError

T = TypeVar("T")

PHRASES = {
    "en": ("{}",) * 9 + ("a sticker of {}", "a picture of {}", "an emoji: {}"),
    "zh": ("{}",) * 9 + ("{}的贴纸", "{}的图片", "表情：{}"),
}
JOIN = {"en": ", ", "zh": "，"}
HUMAN, DROPPED = "human", "dropped"
MIXES = {"dalle3": "human=5,long=95"}  # DALL-E 3's, of captions at length (Betker et al. 2023, section 3.2)


def mix_of(words: str, *, dropped: bool = True) -> dict[str, float]:
    """Shares of the kinds of captions, which sum to 1: of "human=5,long=95", or of a name in MIXES; {} of "".

    dropped: whether a sample may be told without words. InputError: no such kind, or a share that is no number.
    """
    kinds = (HUMAN, *STYLES, DROPPED)
    found: dict[str, float] = {}
    for part in filter(str.strip, MIXES.get(words.strip(), words).split(",")):
        kind, _, share = (piece.strip() for piece in part.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if kind not in kinds or kind in found or not 0 <= value < math.inf:
            raise InputError(
                f"mix is {words!r:.80}, whose {part.strip()!r:.40} is no share: give {', '.join(MIXES)}, or shares such"
                f" as human=5,long=95 of {', '.join(kinds)}."
            )
        found[kind] = value
    if found and not sum(found.values()):
        raise InputError(f"mix is {words!r:.80}, in which every share is 0: give one that is more.")
    if found.get(DROPPED) and not dropped:
        raise InputError(
            f"mix is {words!r:.80}, but this training compares pictures with words: leave dropped out."
        )
    return {kind: share / sum(found.values()) for kind, share in found.items() if share}


def kind_of(caption: Caption) -> str:
    """human, short, long or tags."""
    return style_of(caption.source) or HUMAN


def lacking(items: Iterable[Item], mix: Mapping[str, float]) -> int:
    """How many items have no caption of a kind that the mix tells: what they have is told."""
    kinds = {kind for kind in mix if kind != DROPPED}
    return sum(bool(item.captions) and kinds.isdisjoint(map(kind_of, item.captions)) for item in items)


def draw_caption(
    item: Item,
    generator: torch.Generator,
    *,
    languages: dict[str, float] | None = None,
    phrases: Mapping[str, Sequence[str]] = PHRASES,
    mix: Mapping[str, float] | None = None,
) -> str:
    """One wording of an item, "" if it has no caption with a word in it.

    First, with a `mix`, a kind is drawn by its shares, among those that the item has; an item that has none of them is
    told by what it has. A language is drawn by the weights `languages` (default: the languages of the item's captions,
    equally). A caption that is a list of tags is cut to one to three of them in random order and used a quarter of the
    time, mostly behind a proper caption. Of proper captions a label is drawn six times as often as another, and a label
    or alias stands in one of the `phrases` of its language. A vocabulary of many wordings is learnt slowly
    (docs/log.md).
    """
    u = torch.rand(8, generator=generator).tolist()
    worded = [caption for caption in item.captions if caption.text.replace(",", " ").strip()]
    if mix:
        if u[5] < mix.get(DROPPED, 0.0):
            return ""
        kinds = [kind for kind in mix if any(kind_of(caption) == kind for caption in worded)]
        if kinds:
            rest = (u[5] - mix.get(DROPPED, 0.0)) / (1 - mix.get(DROPPED, 0.0))
            kind = _pick(kinds, [mix[kind] for kind in kinds], rest)
            worded = [caption for caption in worded if kind_of(caption) == kind]
    present = sorted({caption.language for caption in worded})
    if not present:
        return ""
    weights = [(languages or {}).get(language, 0.0 if languages else 1.0) for language in present]
    language = _pick(present, weights if sum(weights) else [1.0] * len(present), u[0])
    captions = [caption for caption in worded if caption.language == language]
    proper = [caption for caption in captions if not _is_list(caption)]
    lists = [caption.text.split(",") for caption in captions if _is_list(caption)]
    tags = [word.strip() for words in lists for word in words if word.strip()]
    if not tags:
        return _phrase(_pick(proper, [1.0] * len(proper), u[1]), phrases.get(language), u[2])
    order = torch.randperm(len(tags), generator=generator).tolist()
    some = [tags[i] for i in order[: 1 + int(u[3] * 3)]]
    if not proper or u[4] < 0.1:
        return JOIN.get(language, ", ").join(some)
    chosen = _pick(proper, [6.0 if caption.source == "label" else 1.0 for caption in proper], u[1])
    if u[4] < 0.25:
        return JOIN.get(language, ", ").join([chosen.text, *some])
    return _phrase(chosen, phrases.get(language), u[2])


def _is_list(caption: Caption) -> bool:
    return caption.source == "tags" or style_of(caption.source) == "tags"


def _phrase(caption: Caption, phrases: Sequence[str] | None, u: float) -> str:
    if caption.source not in ("label", "alias") or not phrases:
        return caption.text
    return phrases[int(u * len(phrases))].format(caption.text)


def _pick(things: list[T], weights: list[float], u: float) -> T:
    edge = u * sum(weights)
    for thing, weight in zip(things, weights, strict=True):
        edge -= weight
        if edge < 0:
            return thing
    return things[-1]
