"""Captions of a `Scene` in English and Chinese, and the reproducible draws that pick among their phrasings.

`select` decides what one caption says (a `Description`); `_english` and `_chinese` say exactly that, so that
`evals.world_captions.read_caption` gives the description back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from reverie import rng
from reverie.data.index import Caption
from reverie.scene import CHINESE, ENGLISH, INVERSE, Description, Mention, Motion, Relation, Scene

T = TypeVar("T")


class Draw:
    """Reproducible draws from one key; only `Random.random`, whose sequence Python guarantees, is used."""

    def __init__(self, seed: int, *key: str | int) -> None:
        self._next = Random(rng.integer(seed, "world", *key)).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._next()

    def chance(self, probability: float) -> bool:
        return self._next() < probability

    def choice(self, values: Sequence[T]) -> T:
        return values[int(self._next() * len(values))]

    def weighted(self, weights: dict[str, float]) -> str:
        mark = self._next() * sum(weights.values())
        for name, weight in weights.items():
            mark -= weight
            if mark < 0:
                return name
        return name


def captions(scene: Scene, *, each: int = 3) -> list[Caption]:
    """`each` different captions in English, then as many in Chinese; source "world".

    Shapes, colours, counts, the relation and what moves are always said; sizes, textures, speeds,
    stillness and the background sometimes.
    """
    out: list[Caption] = []
    for language, say in (("en", _english), ("zh", _chinese)):
        draw = Draw(scene.seed, scene.topic, scene.index, language)
        texts: list[str] = []
        while len(texts) < each:
            text = say(select(scene, draw), draw)
            if text not in texts:
                texts.append(text)
        out += [Caption(text=text, source="world", language=language) for text in texts]
    return out


def say(said: Description, language: str, draw: Draw) -> str:
    """One caption in English ("en") or Chinese ("zh") that says the description and no more."""
    return {"en": _english, "zh": _chinese}[language](said, draw)


def select(scene: Scene, draw: Draw) -> Description:
    """What one caption will say of the scene: like things counted together, details kept by chance."""
    whole = scene.describe()
    size, texture, speed, still = (draw.chance(p) for p in (0.5, 0.6, 0.6, 0.5))
    counted: dict[Mention, int] = {}
    for mention in whole.mentions:
        motion = mention.motion
        if motion is not None:
            motion = replace(motion, speed=motion.speed if speed else None)
            motion = None if motion.kind == "still" and not still else motion
        said = texture and mention.texture != "solid"
        if whole.wall and motion and motion.kind == "still":
            motion = None  # what a wall passes before is not said to stay
        mention = replace(
            mention,
            size=mention.size if size else None,
            texture=mention.texture if said else None,
            motion=motion,
        )
        counted[mention] = counted.get(mention, 0) + 1
    relation = whole.relation
    if relation and draw.chance(0.4):
        relation = Relation(
            subject=relation.object, predicate=INVERSE[relation.predicate], object=relation.subject
        )
    return Description(
        mentions=tuple(replace(mention, count=count) for mention, count in counted.items()),
        relation=relation,
        background=whole.background if draw.chance(0.4) else None,
        wall=whole.wall,
    )


ENGLISH_VERBS = {
    "move": (("moves", "move", "moving"), ("slides", "slide", "sliding"), ("glides", "glide", "gliding")),
    "rotate": (
        ("rotates", "rotate", "rotating"),
        ("spins", "spin", "spinning"),
        ("turns", "turn", "turning"),
    ),
    "bounce": (("bounces", "bounce", "bouncing"),),
    "appear": (("appears", "appear", "appearing"), ("shows up", "show up", "showing up")),
    "vanish": (("vanishes", "vanish", "vanishing"), ("disappears", "disappear", "disappearing")),
    "still": (
        ("stays still", "stay still", "staying still"),
        ("stands still", "stand still", "standing still"),
    ),
    "merge": (("merges", "merge", "merging"),),
}
CHINESE_VERBS = {
    "move": ("移动", "滑动"),
    "rotate": ("旋转", "转动"),
    "bounce": ("弹跳", "来回弹动"),
    "appear": ("出现",),
    "vanish": ("消失",),
    "still": ("静止不动", "保持不动"),
    "merge": ("合在一起", "合并", "融合"),
}


def _english_noun(mention: Mention, draw: Draw) -> str:
    words = [
        draw.choice(ENGLISH[kind][value])
        for kind in ("size", "texture", "colour", "shape")
        if (value := getattr(mention, kind)) is not None
    ]
    if mention.count > 1:
        words[-1] += "es" if words[-1].endswith("s") else "s"
        number = str(mention.count)
        return " ".join([number if draw.chance(0.25) else ENGLISH["number"][number][0], *words])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _english_action(motion: Motion, plural: bool, participle: bool, draw: Draw) -> str:
    verb = draw.choice(ENGLISH_VERBS[motion.kind])[2 if participle else 1 if plural else 0]
    speed = draw.choice(ENGLISH["speed"][motion.speed]) if motion.speed else ""
    direction = draw.choice(ENGLISH["direction"][motion.direction]) if motion.direction else ""
    order = (verb, direction, speed) if draw.chance(0.5) else (verb, speed, direction)
    return " ".join(filter(None, order))


def _english(said: Description, draw: Draw) -> str:
    """One English sentence or phrase that says the description and no more."""
    nouns = [_english_noun(mention, draw) for mention in said.mentions]
    motions = [mention.motion for mention in (*said.mentions, said.wall) if mention]
    before = draw.choice(("", "", "a picture of " if not any(motions) else "a video of "))
    if said.wall:
        text = _english_hidden(said.wall, said.mentions[0], nouns[0], bool(before), draw)
    elif said.relation:
        a, b, predicate = nouns[said.relation.subject], nouns[said.relation.object], said.relation.predicate
        if predicate == "around":
            text = draw.choice((f"{a} with {b} inside it", f"{a} containing {b}"))
        else:
            link = draw.choice(ENGLISH["relation"][predicate])
            text = f"{a} {link} {b}" if before or draw.chance(0.5) else f"{a} is {link} {b}"
    elif any(motion and motion.kind == "merge" for motion in motions):
        a, b = nouns if draw.chance(0.5) else reversed(nouns)
        if before:
            text = f"{a} and {b} {draw.choice(('merging', 'coming together'))}"
        else:
            text = draw.choice((f"{a} and {b} merge", f"{a} and {b} come together", f"{a} merges with {b}"))
    elif any(motions):
        parts = [
            f"{noun} {_english_action(mention.motion, mention.count > 1, bool(before), draw)}"
            if mention.motion
            else noun
            for noun, mention in zip(nouns, said.mentions, strict=True)
        ]
        if len(parts) > 1 and said.mentions[1].motion is None:  # the one at rest comes first or stands alone
            text = f"next to {parts[1]}, {parts[0]}" if not before else f"{parts[0]}, next to {parts[1]}"
        else:
            text = draw.choice((" and ", " while ") if not before else (" and ",)).join(parts)
    else:
        text = nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + " and " + nouns[-1]
        if not before and draw.chance(0.25):
            text = ("there is " if said.mentions[0].count == 1 else "there are ") + text
    if said.background:
        ground = draw.choice(ENGLISH["background"][said.background])
        text += f" {draw.choice(('on', 'against'))} a {ground} background"
    return before + text


def _english_hidden(wall: Mention, mention: Mention, noun: str, participle: bool, draw: Draw) -> str:
    """A thing that passes behind a wall, or a wall that passes before a thing."""
    assert wall.colour
    colour = draw.choice(ENGLISH["colour"][wall.colour])
    bar = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {draw.choice(ENGLISH['wall']['wall'])}"
    if wall.motion:
        return f"{bar} {_english_action(wall.motion, False, participle, draw)} in front of {noun}"
    assert mention.motion
    ends = ("", " and comes out again") if not participle else ("", " and coming out again")
    return (
        f"{noun} {_english_action(mention.motion, False, participle, draw)} behind {bar}{draw.choice(ends)}"
    )


def _chinese_noun(mention: Mention, draw: Draw) -> str:
    assert mention.colour
    assert mention.shape
    measure = "颗" if mention.shape in ("star", "heart") and draw.chance(0.5) else "个"
    number = str(mention.count) if draw.chance(0.2) else CHINESE["number"][str(mention.count)][0]
    text = number + measure
    if mention.size:
        text += draw.choice(CHINESE["size"][mention.size]) + "的"
    if mention.texture:
        text += draw.choice(CHINESE["texture"][mention.texture]) + "的"
    colour = draw.choice(CHINESE["colour"][mention.colour])
    text += colour + ("的" if len(colour) > 1 and draw.chance(0.3) else "")
    return text + draw.choice(CHINESE["shape"][mention.shape])


def _chinese_hidden(wall: Mention, mention: Mention, noun: str, draw: Draw) -> str:
    assert wall.colour
    colour = draw.choice(CHINESE["colour"][wall.colour])
    bar = f"一块{colour}{'的' if len(colour) > 1 and draw.chance(0.3) else ''}{draw.choice(CHINESE['wall']['wall'])}"
    if wall.motion:
        return f"{bar}{_chinese_action(wall.motion, draw)}，从{noun}前面经过"
    assert mention.motion
    return f"{noun}{_chinese_action(mention.motion, draw)}，从{bar}后面{draw.choice(('经过', '穿过'))}"


def _chinese_action(motion: Motion, draw: Draw) -> str:
    speed = draw.choice(CHINESE["speed"][motion.speed]) if motion.speed else ""
    direction = draw.choice(CHINESE["direction"][motion.direction]) if motion.direction else ""
    parts = (direction, speed) if speed and motion.kind == "move" and draw.chance(0.3) else (speed, direction)
    return "".join(parts) + draw.choice(CHINESE_VERBS[motion.kind])


def _chinese(said: Description, draw: Draw) -> str:
    """One Chinese sentence or phrase that says the description and no more."""
    nouns = [_chinese_noun(mention, draw) for mention in said.mentions]
    if said.wall:
        text = _chinese_hidden(said.wall, said.mentions[0], nouns[0], draw)
    elif said.relation:
        a, b, predicate = nouns[said.relation.subject], nouns[said.relation.object], said.relation.predicate
        if predicate == "around":
            text = f"{a}{draw.choice(CHINESE['relation']['inside'])}有{b}"
        else:
            place = draw.choice(CHINESE["relation"][predicate])
            text = draw.choice((f"{a}在{b}的{place}", f"{a}位于{b}{place}", f"{b}的{place}有{a}"))
    elif any(mention.motion and mention.motion.kind == "merge" for mention in said.mentions):
        text = f"{nouns[0]}和{nouns[1]}{_chinese_action(Motion(kind='merge'), draw)}"
    else:
        moving = any(mention.motion for mention in said.mentions)
        parts = [
            noun + (_chinese_action(mention.motion, draw) if mention.motion else "")
            for noun, mention in zip(nouns, said.mentions, strict=True)
        ]
        if moving:
            text = "，".join(parts) if said.mentions[-1].motion else "，旁边有".join(parts)
        else:
            text = parts[0] if len(parts) == 1 else "、".join(parts[:-1]) + "和" + parts[-1]
    if said.background:
        ground = draw.choice(CHINESE["background"][said.background])
        return draw.choice((f"{ground}背景上，{text}", f"{text}，背景是{ground}"))
    return text
