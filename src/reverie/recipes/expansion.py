"""Short prompts to captions such as a model learnt from: what the report on Sora lets a language model do (DALL-E 3's).

By rules, offline: they know the words of the sticker corpus and of the procedural world and no others, invent nothing
that one cannot see in the answer, and say what they did. Or by a chat endpoint that is named (chat.py), which is shown
captions of the same kind. The same prompt and seed give the same words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from reverie import progress, rng
from reverie.chat import Endpoint, ask, message, unread
from reverie.data.index import Index
from reverie.data.stickers import sample_folder
from reverie.data.wording import JOIN, PHRASES
from reverie.data.world import world
from reverie.data.world_captions import Draw, captions, say
from reverie.errors import InputError
from reverie.evals.world_captions import read_caption
from reverie.scene import (
    BACKGROUNDS,
    BOUNCES,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TURNS,
    Mention,
    Motion,
)

KINDS = ("stickers", "world")
TAGS = 4  # at most
SIGNS = (
    "button",
    "arrow",
    "sign",
    "symbol",
)  # the words on them, such as NEW, say what other things are like
BESIDE = re.compile(  # before what belongs to the thing, or where it is
    r"\b(?:on|in|into|inside|at|with|without|of|to|by|under|over|above|below|near|behind|before|after|beside|next|from"
    r"|for|and|or|who|that|which|while)\b"
)
SHOWN = 6  # captions that an endpoint is shown

TASK = {
    "stickers": "You turn a short wish into one caption for a model that draws stickers and emoji on a white ground."
    " Its captions name the thing and then, after commas, a few plain words for what it is, which colours it has and"
    " what belongs to it.",
    "world": "You turn a short wish into one caption for a model that draws coloured shapes. Its captions say how many"
    " there are, their size, texture, colour and shape, how they lie, how they move and how fast, and the background.",
}


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """A prompt, the caption that it became, and what was done to it."""

    prompt: str
    text: str
    how: str


def expand(
    prompts: Sequence[str], *, kind: str = "stickers", seed: int = 0, endpoint: Endpoint | None = None
) -> list[Expanded]:
    """Each prompt as a caption of `kind`, by rules or by an endpoint. InputError: an empty prompt, or no such kind."""
    if kind not in KINDS:
        raise InputError(f"there are no captions like {kind!r}: choose one of {', '.join(KINDS)}.")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(
                f"prompt {number} of {len(prompts)} is empty: say what to expand, or leave it out."
            )
    if endpoint is not None and endpoint.cache is not None and (bad := unread(endpoint.cache)):
        progress.say(f"{bad} line{'s' * (bad > 1)} of {endpoint.cache} hold no answer and are skipped.")
    if endpoint is not None:
        return [_by_chat(prompt, kind, endpoint) for prompt in prompts]
    rules = {"stickers": _sticker, "world": _world}
    return [rules[kind](" ".join(prompt.split()), seed) for prompt in prompts]


# By an endpoint ----------------------------------------------------------------------------------------------------


def _by_chat(prompt: str, kind: str, endpoint: Endpoint) -> Expanded:
    shown = "\n".join(_examples(kind, _language(prompt)))
    answer = "Answer with the caption alone, in the language of the wish."
    task = f"{TASK[kind]} Captions look like these:\n{shown}\n{answer}"
    said = ask(endpoint, [message(task, role="system"), message(prompt)], most=120, tell=progress.say)
    text = " ".join(said.strip().strip('"“”').split())
    return Expanded(prompt=prompt, text=text, how=f"written by {endpoint.model}")


def _examples(kind: str, language: str) -> list[str]:
    if kind == "world":
        scenes = [world(i, kind="video" if i % 2 else "image") for i in range(SHOWN)]
        return [next(c.text for c in captions(scene) if c.language == language) for scene in scenes]
    names = list(_vocabulary()[language].values())[: SHOWN * 20 : 20]
    return [JOIN[language].join([name, *tags[:TAGS]]) for name, tags in names]


# By rules ----------------------------------------------------------------------------------------------------------


def _language(text: str) -> str:
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in text) else "en"


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, dict[str, tuple[str, tuple[str, ...]]]]:
    """Of each language, a label or alias of the shipped sample -> the label and its tags."""
    found: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {"en": {}, "zh": {}}
    for item in Index.read(sample_folder()):
        for language, known in found.items():
            own = [caption for caption in item.captions if caption.language == language]
            label = next((caption.text for caption in own if caption.source == "label"), None)
            tags = [
                t.strip() for c in own if c.source == "tags" for t in re.split("[,，]", c.text) if t.strip()
            ]
            if label is None:
                continue
            for caption in own:
                if caption.source in ("label", "alias"):
                    known.setdefault(caption.text.casefold(), (label, tuple(tags)))
    return found


def _sticker(prompt: str, seed: int) -> Expanded:
    """The tags of the label that the prompt names; around words that none names, a phrase of the captions."""
    language, draw = _language(prompt), Draw(rng.integer(seed, "expand"), prompt)
    named, words = _named(prompt, language), prompt.casefold()
    if named is None:
        phrase = draw.choice(sorted(set(PHRASES[language]) - {"{}"}))
        how = "no label of the stickers is in it, so a phrase of their captions was put around it"
        return Expanded(prompt=prompt, text=phrase.format(prompt), how=how)
    label, tags = named
    fresh = [tag for tag in tags if tag.casefold() not in words]
    chosen = sorted(fresh, key=lambda tag: rng.integer(seed, "expand", prompt, tag))[:TAGS]
    if not chosen:
        return Expanded(prompt=prompt, text=prompt, how=f"the sticker {label!r} has no words beside these")
    how = f"tags of the sticker {label!r} were put behind it"
    return Expanded(prompt=prompt, text=JOIN[language].join([prompt, *chosen]), how=how)


def _named(prompt: str, language: str) -> tuple[str, tuple[str, ...]] | None:
    """The label, and its tags, of what a prompt is about: of the names that are in it, the one that ends last.

    In English what is named before the first word such as "on" goes first: a cat on a train is a cat. In Chinese a name
    of one character counts where a word can end.
    """
    known, words = _vocabulary()[language], prompt.casefold()
    if words in known:
        return known[words]
    found = []
    thing = BESIDE.search(words) if language == "en" else None
    for name, (label, _) in known.items():
        if name != label.casefold() and label.casefold().endswith(SIGNS):
            continue
        pattern = rf"\b{re.escape(name)}\b" if language == "en" else re.escape(name)
        pattern += r"(?=$|[\s，。、！的在和与])" if language == "zh" and len(name) == 1 else ""
        for match in re.finditer(pattern, words):
            first = thing is None or match.end() <= thing.start()
            found.append((first, match.end(), len(name), name))
    return known[max(found)[-1]] if found else None


def _world(prompt: str, seed: int) -> Expanded:
    """What the prompt says of the world, and of what it leaves open a choice by the seed, in the world's words."""
    said, draw = read_caption(prompt), Draw(rng.integer(seed, "expand"), prompt)
    if not said.mentions:
        raise InputError(
            f"{prompt!r:.60} names no shape of the world: name one, such as {', '.join(SHAPES[:4])}."
        )
    grounds = [name for name in BACKGROUNDS if name not in {mention.colour for mention in said.mentions}]
    ground = said.background or draw.choice(grounds)
    mentions = tuple(_whole(mention, ground, draw) for mention in said.mentions)
    text = say(replace(said, mentions=mentions, background=ground), _language(prompt), draw)
    return Expanded(prompt=prompt, text=text, how="what it left open of the world was chosen by the seed")


def _whole(mention: Mention, ground: str, draw: Draw) -> Mention:
    """With a shape, a colour that stands out, a size, and of a motion its direction and speed."""
    motion = mention.motion
    if motion is not None:
        ways = {"move": tuple(DIRECTIONS), "rotate": TURNS, "bounce": BOUNCES}.get(motion.kind)
        direction = motion.direction or (draw.choice(ways) if ways else None)
        motion = Motion(
            kind=motion.kind,
            direction=direction,
            speed=motion.speed or (draw.choice(SPEEDS) if ways else None),
        )
    colours = [name for name in COLOURS if name != ground]
    return replace(
        mention,
        shape=mention.shape or draw.choice(SHAPES),
        colour=mention.colour or draw.choice(colours),
        size=mention.size or draw.choice(list(SIZES)),
        motion=motion,
    )
