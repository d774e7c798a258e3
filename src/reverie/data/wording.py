"""Which words go with a sample this time: captions vary in training, by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from reverie.data.index import Caption, Item

T = TypeVar("T")

PHRASES = {
    "en": ("{}",) * 9 + ("a sticker of {}", "a picture of {}", "an emoji: {}"),
    "zh": ("{}",) * 9 + ("{}的贴纸", "{}的图片", "表情：{}"),
}
JOIN = {"en": ", ", "zh": "，"}


def draw_caption(
    item: Item,
    generator: torch.Generator,
    *,
    languages: dict[str, float] | None = None,
    phrases: Mapping[str, Sequence[str]] = PHRASES,
) -> str:
    """One wording of an item, "" if it has no caption with a word in it.

    A language is drawn by the weights `languages` (default: the languages of the item's captions, equally). A
    caption that is a list of tags is cut to one to three of them in random order and used a quarter of the time, mostly
    behind a proper caption. Of proper captions a label is drawn six times as often as another, and a label or alias
    stands in one of the `phrases` of its language. A vocabulary of many wordings is learnt slowly (docs/log.md).
    """
    u = torch.rand(8, generator=generator).tolist()
    worded = [caption for caption in item.captions if caption.text.replace(",", " ").strip()]
    present = sorted({caption.language for caption in worded})
    if not present:
        return ""
    weights = [(languages or {}).get(language, 0.0 if languages else 1.0) for language in present]
    language = _pick(present, weights if sum(weights) else [1.0] * len(present), u[0])
    captions = [caption for caption in worded if caption.language == language]
    proper = [caption for caption in captions if caption.source != "tags"]
    lists = [caption.text.split(",") for caption in captions if caption.source == "tags"]
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
