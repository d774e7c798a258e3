"""A reader of captions, so that any captioner can be scored against a `Scene` of the procedural world.

`read_caption` turns English or Chinese text into a `Description`: which things, how many, what they look like, how
they lie, what they do. It knows the words of `reverie.scene` and their common synonyms, and skips all others: a
sentence is read as its known words in order. `agree` says which of the claims hold in a scene, `covers` how much of
the scene is said, and `told` measures a captioner by both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from reverie.errors import InputError
from reverie.evals.interval import bootstrap
from reverie.evals.world_judge import ATTRIBUTES, match
from reverie.scene import (
    BACKGROUNDS,
    BOUNCES,
    CHINESE,
    COLOURS,
    DIRECTIONS,
    ENGLISH,
    INVERSE,
    TURNS,
    Description,
    Mention,
    Motion,
    Relation,
    Scene,
)

# Words beyond those of `reverie.scene`, by what they mean: kind -> value -> phrases.
_MORE_ENGLISH: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("disk", "ball"), "square": ("box",), "moon": ("crescent moon",), "cross": ("plus",),
        "ring": ("donut", "doughnut"), "star": ("five-pointed star",),
    },
    "colour": {
        "purple": ("violet",), "cyan": ("turquoise", "teal", "aqua"), "pink": ("magenta",),
        "red": ("crimson", "scarlet"), "navy": ("navy blue",),
    },
    "size": {"small": ("tiny",), "large": ("huge",)},
    "texture": {
        "striped": ("stripy", "with stripes"), "dotted": ("polka-dotted", "polka dot"),
        "checked": ("chequered", "checkerboard"),
    },
    "relation": {
        "left of": ("on the left of", "to its left", "on its left"),
        "right of": ("on the right of", "to its right", "on its right"),
        "above": ("on top of", "above it"), "below": ("beneath", "underneath", "below it"),
        "inside": ("inside of", "inside it", "in the middle of"),
        "around": ("containing", "contains", "surrounding", "surrounds", "around"),
    },
    "direction": {
        "right": ("rightwards", "rightward"), "left": ("leftwards", "leftward"), "up": ("upward",),
        "down": ("downward",), "up left": ("up-left", "up left", "to the top left"),
        "up right": ("up-right", "up right", "to the top right"),
        "down left": ("down-left", "down left", "to the bottom left"),
        "down right": ("down-right", "down right", "to the bottom right"),
        "anticlockwise": ("counter-clockwise", "anti-clockwise"), "side to side": ("from side to side",),
    },
    "speed": {"slow": ("slow",), "fast": ("rapidly", "swiftly", "rapid")},
    "number": {
        "1": ("a", "an", "the", "another"), "7": ("seven",), "8": ("eight",), "9": ("nine",), "10": ("ten",),
    },
    "verb": {
        "move": (
            "move", "moves", "moving", "slide", "slides", "sliding", "glide", "glides", "gliding", "drift",
            "drifts", "drifting", "go", "goes", "going", "fly", "flies", "flying", "travels", "travelling",
        ),
        "rotate": (
            "rotate", "rotates", "rotating", "spin", "spins", "spinning", "turn", "turns", "turning",
        ),
        "bounce": ("bounce", "bounces", "bouncing"),
        "appear": ("appear", "appears", "appearing", "show up", "shows up", "showing up", "pops up", "pop up"),
        "vanish": ("vanish", "vanishes", "vanishing", "disappear", "disappears", "disappearing"),
        "merge": (
            "merge", "merges", "merging", "come together", "comes together", "coming together", "fuse", "fuses",
        ),
        "still": (
            "stays still", "stay still", "staying still", "stands still", "stand still", "standing still",
            "does not move", "do not move", "doesn't move", "stationary", "motionless",
        ),
    },
    "ground": {"": ("background", "backdrop")},
    "wall": {"wall": ("occluder", "panel", "barrier")},
    "in": {"": ("in",)},
    "": {"": ("in front of",)},
}  # fmt: skip
_MORE_CHINESE: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("圆盘",), "square": ("方形", "正方块"), "diamond": ("钻石形",), "hexagon": ("六角形",),
        "star": ("五角形星星", "星形", "星"), "heart": ("心",), "cross": ("加号", "十字架"), "ring": ("环", "环形"),
        "moon": ("弯月", "新月"),
    },
    "colour": {
        "red": ("大红色",), "orange": ("橙", "橘"), "purple": ("紫罗兰色",), "cyan": ("青", "青蓝色"),
        "pink": ("粉",), "brown": ("咖啡色", "棕"), "white": ("纯白色",), "black": ("纯黑色",),
    },
    "texture": {
        "striped": ("有条纹",), "dotted": ("有圆点", "波点"), "checked": ("方格", "有格子", "棋盘格"),
    },
    "relation": {
        "left of": ("左面", "左方"), "right of": ("右面", "右方"), "above": ("上边",),
        "below": ("下边", "底下"), "inside": ("里边", "里", "中间", "之内"),
    },
    "direction": {
        "right": ("朝右", "向右边", "往右边"), "left": ("朝左", "向左边", "往左边"), "up": ("朝上", "向上方"),
        "down": ("朝下", "向下方"), "up left": ("向左上", "朝左上方"), "up right": ("向右上", "朝右上方"),
        "down left": ("向左下", "朝左下方"), "down right": ("向右下", "朝右下方"),
    },
    "speed": {"slow": ("缓慢", "慢速"), "fast": ("迅速", "飞快", "快快")},
    "verb": {
        "move": ("移动", "滑动", "移", "飞", "平移"), "rotate": ("旋转", "转动", "自转"),
        "bounce": ("弹跳", "来回弹动", "弹动", "跳动"), "appear": ("出现", "显现"), "vanish": ("消失", "不见"),
        "merge": ("合在一起", "合并", "融合", "汇合"),
        "still": ("静止不动", "保持不动", "静止", "不动", "保持静止"),
    },
    "ground": {"": ("背景", "底色")},
    "wall": {"wall": ("墙", "隔板")},
    "": {"": ("左上方", "右上方", "左下方", "右下方", "大小")},
}  # fmt: skip


@dataclass
class _Open:
    """What is known of the mention that is being read, or of one already read."""

    number: int | None = None
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    plural: bool = False
    verb: str | None = None
    directions: list[str] = field(default_factory=list)
    speed: str | None = None

    def empty(self) -> bool:
        return self == _Open()

    def mention(self) -> Mention:
        return Mention(
            count=self.number if self.number is not None and (self.number > 1 or not self.plural) else 1 + self.plural,
            shape=self.shape, colour=self.colour, size=self.size, texture=self.texture, motion=self.motion(),
        )  # fmt: skip

    def motion(self) -> Motion | None:
        verb = self.verb
        if verb is None:
            return None
        if verb == "move" and any(direction in BOUNCES for direction in self.directions):
            verb = "bounce"
        allowed = {"move": tuple(DIRECTIONS), "rotate": TURNS, "bounce": BOUNCES}.get(verb, ())
        direction = next((direction for direction in self.directions if direction in allowed), None)
        return Motion(kind=verb, direction=direction, speed=self.speed if allowed else None)


@cache
def _lexicon(chinese: bool) -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    """The pattern of all known phrases, longest first, and what each means."""
    meanings: dict[str, tuple[str, str]] = {}
    for table in (CHINESE, _MORE_CHINESE) if chinese else (ENGLISH, _MORE_ENGLISH):
        for kind, values in table.items():
            for value, phrases in values.items():
                for phrase in phrases:
                    name = "colour" if kind == "background" else kind
                    if chinese and kind == "number":
                        continue
                    meanings.setdefault(phrase, (name, value))
                    if not chinese and kind == "shape":
                        meanings.setdefault(
                            phrase + ("es" if phrase.endswith(("s", "x")) else "s"), ("shapes", value)
                        )
    ordered = sorted(meanings, key=len, reverse=True)
    known = "|".join(re.escape(phrase) for phrase in ordered)
    if chinese:
        return re.compile(rf"(?P<number>[一二两三四五六七八九十]|\d+)[个颗枚只块]|{known}"), meanings
    return re.compile(rf"\b(?:(?P<number>\d+)|{known})\b"), meanings


_DIGITS = {"一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9, "十": 10}


def _tokens(text: str, chinese: bool) -> list[tuple[str, str]]:
    pattern, meanings = _lexicon(chinese)
    out = []
    for found in pattern.finditer(text):
        number = found["number"]
        if number:
            out.append(("number", str(_DIGITS[number] if number in _DIGITS else int(number))))
        else:
            out.append(meanings[found[0]])
    return [token for token in out if token[0]]


def read_caption(text: str) -> Description:
    """What an English or Chinese text (any Chinese character decides) says of a scene; empty if it says nothing.

    Nouns close a mention: the words before one belong to it, a verb after it too. A bare plural counts as two. Only
    the first relation is read; its subject comes before its object in `mentions`.
    """
    text = " ".join(text.lower().split())
    chinese = re.search(r"[\u4e00-\u9fff]", text) is not None
    tokens = _tokens(text, chinese)
    background, tokens = _background(tokens)
    things: list[_Open] = []
    pending = _Open()
    merges: list[int] = []
    link: tuple[str, int] | None = None
    wall = last = None  # the last one named, whose verb may follow
    for k, (kind, value) in enumerate(tokens):
        target = pending if not pending.empty() or last is None else last
        if kind == "number":
            pending = _Open(number=int(value))
        elif kind in ("size", "texture", "colour"):
            setattr(pending, kind, value)
        elif kind in ("shape", "shapes"):
            pending.shape, pending.plural = value, kind == "shapes"
            things.append(pending)
            last, pending = pending, _Open()
        elif kind == "wall":
            wall = last = pending
            pending = _Open()
        elif kind == "verb" and value == "merge":
            merges.append(len(things))
        elif kind == "verb":
            target.verb = target.verb or value
        elif kind == "direction":
            target.directions.append(value)
        elif kind == "speed":
            target.speed = value
        elif kind == "relation" and link is None:
            link = (value, len(things))
        elif (
            kind == "in"
            and link is None
            and len(things) == 1
            and tokens[k + 1 : k + 2]
            and tokens[k + 1][0] == "number"
        ):
            link = ("inside", 1)
    for before in merges:
        first = max(before - 2, 0)
        alone = before > 0 and (things[before - 1].number or 1) > 1
        for thing in [things[before - 1]] if alone else things[first : first + 2]:
            thing.verb = "merge"
    return Description(
        mentions=tuple(thing.mention() for thing in things),
        relation=_relation(link, len(things), chinese),
        background=background,
        wall=None if wall is None else replace(wall.mention(), count=1),
    )


def _background(tokens: list[tuple[str, str]]) -> tuple[str | None, list[tuple[str, str]]]:
    """The colour next to the word "background", and the tokens without the two."""
    at = next((k for k, (kind, _) in enumerate(tokens) if kind == "ground"), None)
    if at is None:
        return None, [token for token in tokens if token[1] in COLOURS or token[0] != "colour"]
    for k in (at - 1, at + 1):
        if 0 <= k < len(tokens) and tokens[k][0] == "colour" and tokens[k][1] in BACKGROUNDS:
            rest = tokens[: min(k, at)] + tokens[max(k, at) + 1 :]
            if rest[: min(k, at)] and rest[min(k, at) - 1][0] == "number" and k < at:
                rest.pop(min(k, at) - 1)  # the article of "a black background"
            return tokens[k][1], rest
    return None, tokens[:at] + tokens[at + 1 :]


def _relation(link: tuple[str, int] | None, things: int, chinese: bool) -> Relation | None:
    """The relation of the two mentions around a word of place that follows `before` mentions.

    English: "A left of B", "left of B is A", "B with A to its left". Chinese: "A在B左边", "B左边有A".
    """
    if link is None or things < 2:
        return None
    predicate, before = link
    if before == 0:
        subject, other = 1, 0
    elif before == 1:
        subject, other = (1, 0) if chinese else (0, 1)
    else:
        subject, other = (before - 2, before - 1) if chinese else (before - 1, before - 2)
    if subject > other:
        subject, other, predicate = other, subject, INVERSE[predicate]
    return Relation(subject=subject, predicate=predicate, object=other)


# ----------------------------------------------------------------------------------------------- scores


def agree(said: Description | str, scene: Scene) -> dict[str, bool | None]:
    """Which claims of a caption hold in a scene, for each of ATTRIBUTES; None where the caption does not say.

    Things said are paired with things of the scene so that most holds. "count" asks whether the caption names as
    many things as there are; the others whether all that it says of them is right.
    """
    said = read_caption(said) if isinstance(said, str) else said
    claims = [mention for mention in said.mentions for _ in range(mention.count)]
    truth = scene.describe().mentions
    pairs = {j: i for i, j in match(claims, truth).items()}  # claim -> thing
    out: dict[str, bool | None] = dict.fromkeys(ATTRIBUTES)
    out["count"] = len(claims) == len(truth)
    for name in ("shape", "colour", "size", "texture"):
        stated = [j for j, claim in enumerate(claims) if getattr(claim, name) is not None]
        if stated:
            out[name] = all(
                j in pairs and getattr(claims[j], name) == getattr(truth[pairs[j]], name) for j in stated
            )
    if said.background is not None:
        out["background"] = said.background == scene.background
    if said.wall is not None:
        out["permanence"] = scene.wall is not None and said.wall.colour in (None, scene.wall.colour)
    if said.relation is not None:
        firsts = [sum(mention.count for mention in said.mentions[:k]) for k in range(len(said.mentions))]
        a, b = pairs.get(firsts[said.relation.subject]), pairs.get(firsts[said.relation.object])
        out["relation"] = a is not None and b is not None and _holds(scene, a, said.relation.predicate, b)
    moves = [
        (claim.motion, truth[pairs[j]].motion if j in pairs else None)
        for j, claim in enumerate(claims)
        if claim.motion is not None
    ]
    if said.wall is not None and said.wall.motion is not None:
        moves.append((said.wall.motion, None if scene.wall is None else scene.wall.motion))
    if moves:
        out["motion"] = all(_same(claim, shown) for claim, shown in moves)
    paces = [(claim, shown) for claim, shown in moves if claim.speed is not None]
    if paces:
        out["speed"] = all(shown is not None and shown.speed == claim.speed for claim, shown in paces)
    return out


def _same(claim: Motion, truth: Motion | None) -> bool:
    return truth is not None and claim.kind == truth.kind and claim.direction in (None, truth.direction)


def _holds(scene: Scene, a: int, predicate: str, b: int) -> bool:
    """Whether thing a is left of, inside, ... thing b; of two oblique directions both hold."""
    if predicate in ("right of", "below", "around"):
        a, b, predicate = b, a, INVERSE[predicate]
    one, other = scene.things[a], scene.things[b]
    dx, dy = other.x - one.x, other.y - one.y
    inside = math.hypot(dx, dy) + one.r < other.r
    if predicate == "inside":
        return inside
    along, across = (dx, dy) if predicate == "left of" else (dy, dx)
    return not inside and along > 0 and along >= abs(across) / 2


def covers(said: Description | str, scene: Scene) -> dict[str, float | None]:
    """What share of what a caption should say it says, and rightly; None where the scene has nothing of it.

    Of MAIN alone: "count" and "relation" are 0 or 1, "shape" and "colour" a share of the things (and "colour" of the
    wall), "motion" a share of what moves.
    """
    said = read_caption(said) if isinstance(said, str) else said
    claims = [mention for mention in said.mentions for _ in range(mention.count)]
    truth = scene.describe().mentions
    pairs = match(claims, truth)  # thing -> claim
    told = [claims[pairs[i]] if i in pairs else None for i in range(len(truth))]
    pairings = list(zip(told, truth, strict=True))
    if scene.wall is not None:
        wall = scene.describe().wall
        assert wall is not None
        pairings.append((said.wall, wall))

    def share(name: str) -> float | None:
        held = []
        for mention, own in pairings:
            meant, claim = getattr(own, name), None if mention is None else getattr(mention, name)
            if name == "motion" and (meant is None or meant.kind == "still"):
                continue
            if meant is not None:
                held.append(
                    claim is not None and (_same(claim, meant) if name == "motion" else claim == meant)
                )
        return sum(held) / len(held) if held else None

    return {
        "count": float(len(claims) == len(truth)),
        "shape": share("shape"),
        "colour": share("colour"),
        "relation": None if scene.relation is None else float(agree(said, scene)["relation"] is True),
        "motion": share("motion"),
    }


MAIN = ("count", "shape", "colour", "relation", "motion")  # what a caption should say


def told(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, dict[str, Any]]:
    """How true captions are and how much they say, for each of ATTRIBUTES that any of them claims or should.

    `right`: the share that holds, of the captions that claim something of it (`claimed`; a caption that names nothing
    claims no count). `said`: of MAIN, the share of what there is to say (`covers`), over the scenes that have it
    (`scenes`). "all": everything claimed holds, and count, shapes, colours and the relation are said in full; a motion
    is not asked for, since who sees one frame of a clip cannot tell it. `holds`: "all", caption by caption. Intervals
    are 95 %, by bootstrap. InputError: not as many captions as scenes.
    """
    if len(captions) != len(scenes) or not len(captions):
        raise InputError(f"{len(captions)} captions and {len(scenes)} scenes: give each scene its caption.")
    read = [read_caption(text) for text in captions]
    claims = [agree(said, scene) for said, scene in zip(read, scenes, strict=True)]
    for said, row in zip(read, claims, strict=True):
        row["count"] = row["count"] if said.mentions else None
    parts = [covers(said, scene) for said, scene in zip(read, scenes, strict=True)]
    out: dict[str, dict[str, Any]] = {}
    for name in ATTRIBUTES:
        right = [float(row[name]) for row in claims if row[name] is not None]  # type: ignore[arg-type]
        found: dict[str, Any] = {"claimed": len(right)} | _mean("right", right)
        if name in MAIN:
            said_of = [value for row in parts if (value := row[name]) is not None]
            found |= {"scenes": len(said_of)} | _mean("said", said_of)
        if right or found.get("scenes"):
            out[name] = found
    whole = [
        all(value is not False for value in row.values())
        and all(part[name] in (None, 1.0) for name in MAIN if name != "motion")
        for row, part in zip(claims, parts, strict=True)
    ]
    out["all"] = {"claimed": len(whole), **_mean("right", [float(value) for value in whole]), "holds": whole}
    return out


def _mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    found = torch.tensor(values, dtype=torch.double)
    return {
        name: found.mean().item() if len(values) else None,
        f"{name}_interval": bootstrap(found) if len(values) else None,
    }
