"""What a scene is: its things, their vocabulary and geometry; the world draws it, the judge reads it.

Convention: lengths are in units of the picture's shorter side, the origin is its top left corner, x runs
right and y down; a scene of aspect `a` (width / height) spans `max(1, a)` by `max(1, 1 / a)`. Time runs
from 0 (first frame) to 1 (last frame) whatever the number of frames. Angles are degrees, clockwise as
seen. Imports numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

# ----------------------------------------------------------------------------------------------- vocabulary

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 40),
    "orange": (248, 142, 24),
    "yellow": (250, 222, 50),
    "green": (48, 168, 72),
    "cyan": (64, 206, 216),
    "blue": (44, 88, 226),
    "purple": (142, 56, 188),
    "pink": (250, 150, 196),
    "brown": (124, 76, 40),
    "white": (250, 250, 250),
    "grey": (132, 132, 132),
    "black": (18, 18, 18),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": COLOURS["white"],
    "grey": COLOURS["grey"],
    "black": COLOURS["black"],
    "beige": (240, 228, 200),
    "navy": (24, 30, 78),
}
SHAPES = ("circle", "square", "triangle", "diamond", "hexagon", "star", "heart", "cross", "ring", "moon")
SIZES: dict[str, float] = {"small": 0.100, "medium": 0.155, "large": 0.240}  # radius of the bounding circle
TEXTURES = ("solid", "striped", "dotted", "checked")
TEXTURED_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURED_SHAPES = ("circle", "square", "triangle", "diamond", "hexagon", "heart")
RELATIONS = ("left of", "right of", "above", "below", "inside")
INVERSE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
    "inside": "around", "around": "inside",
}  # fmt: skip
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0), "down right": (1, 1), "down": (0, 1), "down left": (-1, 1),
    "left": (-1, 0), "up left": (-1, -1), "up": (0, -1), "up right": (1, -1),
}  # fmt: skip
TURNS = ("clockwise", "anticlockwise")
BOUNCES = ("up and down", "side to side")
SPEEDS = ("slow", "fast")
SYMMETRY = {
    "circle": 0, "ring": 0, "square": 4, "triangle": 3, "diamond": 2, "hexagon": 6, "star": 5, "heart": 1,
    "cross": 4, "moon": 1,
}  # fmt: skip
"""Turning by 360 / this many degrees leaves the shape unchanged; 0: any turn does."""

# Ways to say each thing; the caption writer draws from them, the caption reader knows them all.
ENGLISH: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("circle", "disc"), "square": ("square",), "triangle": ("triangle",),
        "diamond": ("diamond", "rhombus"), "hexagon": ("hexagon",), "star": ("star",), "heart": ("heart",),
        "cross": ("cross", "plus sign"), "ring": ("ring",), "moon": ("moon", "crescent"),
    },
    "colour": {name: (name,) for name in COLOURS} | {"grey": ("grey", "gray")},
    "background": {
        "white": ("white",), "grey": ("grey", "gray"), "black": ("black",), "beige": ("beige",),
        "navy": ("navy", "dark blue"),
    },
    "size": {"small": ("small", "little"), "medium": ("medium-sized", "medium"), "large": ("large", "big")},
    "texture": {
        "solid": ("plain", "solid"), "striped": ("striped",), "dotted": ("dotted", "spotted"),
        "checked": ("checked", "checkered"),
    },
    "relation": {
        "left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
        "above": ("above", "over"), "below": ("below", "under"), "inside": ("inside", "within"),
    },
    "direction": {
        "right": ("to the right", "right"), "left": ("to the left", "left"), "up": ("up", "upwards"),
        "down": ("down", "downwards"), "up left": ("to the upper left", "up and to the left"),
        "up right": ("to the upper right", "up and to the right"),
        "down left": ("to the lower left", "down and to the left"),
        "down right": ("to the lower right", "down and to the right"),
        "clockwise": ("clockwise",), "anticlockwise": ("anticlockwise", "counterclockwise"),
        "up and down": ("up and down",), "side to side": ("side to side", "left and right"),
    },
    "speed": {"slow": ("slowly",), "fast": ("quickly", "fast")},
    "wall": {"wall": ("wall", "screen")},
    "number": {
        "1": ("one",), "2": ("two",), "3": ("three",), "4": ("four",), "5": ("five",), "6": ("six",),
    },
}  # fmt: skip
CHINESE: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("圆形", "圆"), "square": ("正方形", "方块"), "triangle": ("三角形",),
        "diamond": ("菱形",), "hexagon": ("六边形",), "star": ("星星", "五角星"), "heart": ("爱心", "心形"),
        "cross": ("十字", "十字形"), "ring": ("圆环",), "moon": ("月亮", "月牙"),
    },
    "colour": {
        "red": ("红色", "红"), "orange": ("橙色", "橘色"), "yellow": ("黄色", "黄"), "green": ("绿色", "绿"),
        "cyan": ("青色",), "blue": ("蓝色", "蓝"), "purple": ("紫色", "紫"), "pink": ("粉色", "粉红色"),
        "brown": ("棕色", "褐色"), "white": ("白色", "白"), "grey": ("灰色", "灰"), "black": ("黑色", "黑"),
    },
    "background": {
        "white": ("白色",), "grey": ("灰色",), "black": ("黑色",), "beige": ("米色",),
        "navy": ("深蓝色", "藏青色"),
    },
    "size": {"small": ("小", "小小"), "medium": ("中等大小", "中等"), "large": ("大", "大大")},
    "texture": {
        "solid": ("纯色",), "striped": ("条纹", "带条纹"), "dotted": ("圆点", "带圆点", "斑点"),
        "checked": ("格子", "带格子"),
    },
    "relation": {
        "left of": ("左边", "左侧"), "right of": ("右边", "右侧"), "above": ("上方", "上面"),
        "below": ("下方", "下面"), "inside": ("里面", "内部"),
    },
    "direction": {
        "right": ("向右", "往右"), "left": ("向左", "往左"), "up": ("向上", "往上"), "down": ("向下", "往下"),
        "up left": ("向左上方", "往左上方"), "up right": ("向右上方", "往右上方"),
        "down left": ("向左下方", "往左下方"), "down right": ("向右下方", "往右下方"),
        "clockwise": ("顺时针",), "anticlockwise": ("逆时针",), "up and down": ("上下",),
        "side to side": ("左右",),
    },
    "speed": {"slow": ("慢慢", "缓缓"), "fast": ("快速", "飞快地")},
    "wall": {"wall": ("挡板", "墙板")},
    "number": {"1": ("一",), "2": ("两",), "3": ("三",), "4": ("四",), "5": ("五",), "6": ("六",)},
}  # fmt: skip

# ----------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What a thing does over the clip, in words; `direction` and `speed` are None where they mean nothing."""

    kind: str = "still"
    direction: str | None = None
    speed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Track:
    """How an object's motion is drawn: net displacement, net turn, there-and-backs, and when it is there.

    `bounces` = 0: the displacement is reached linearly at `arrive` and held; n >= 1: n times there and back.
    """

    dx: float = 0.0
    dy: float = 0.0
    turn: float = 0.0
    bounces: int = 0
    arrive: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def at(self, t: float) -> tuple[float, float, float, bool]:
        """(dx, dy, turn, visible) at time t in [0, 1]."""
        share = min(t / self.arrive, 1.0)
        if self.bounces:
            phase = (t * self.bounces) % 1.0
            share = 1.0 - abs(2.0 * phase - 1.0)
        return self.dx * share, self.dy * share, self.turn * t, self.start <= t <= self.end


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing: what it is, where it is at time 0 (`x`, `y`, bounding radius `r`, `angle`), what it does."""

    shape: str
    colour: str
    size: str
    texture: str = "solid"
    x: float
    y: float
    r: float
    angle: float = 0.0
    motion: Motion = field(default_factory=Motion)
    track: Track = field(default_factory=Track)


@dataclass(frozen=True, kw_only=True)
class Wall:
    """A bar from edge to edge that hides what is behind it: something passes behind it, or it before something.

    `upright`: from top to bottom, else from left to right. `middle` (at time 0) and `width` lie along the other axis.
    """

    colour: str
    upright: bool
    middle: float
    width: float
    motion: Motion = field(default_factory=Motion)
    track: Track = field(default_factory=Track)

    def at(self, t: float) -> float:
        """Where its middle is at time t in [0, 1]."""
        dx, dy, _, _ = self.track.at(t)
        return self.middle + (dx if self.upright else dy)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """`subject` and `object` index things (or mentions); the subject is left of / inside / ... the object."""

    subject: int
    predicate: str
    object: int


@dataclass(frozen=True, kw_only=True)
class Mention:
    """`count` like things as a text names them; None = not said."""

    count: int = 1
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    motion: Motion | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a text says of a picture: a partial scene. Of a wall it says the colour, and the motion if it has one."""

    mentions: tuple[Mention, ...] = ()
    relation: Relation | None = None
    background: str | None = None
    wall: Mention | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture or clip with its exact truth. Later things are drawn over earlier ones, a wall over all."""

    index: int
    seed: int
    topic: str
    video: bool
    aspect: float
    background: str
    things: tuple[Thing, ...]
    relation: Relation | None = None
    wall: Wall | None = None

    @property
    def extent(self) -> tuple[float, float]:
        """(width, height) in units of the shorter side."""
        return max(1.0, self.aspect), max(1.0, 1.0 / self.aspect)

    def describe(self) -> Description:
        """Everything there is to say, one mention per thing, in the order of `things`."""
        return Description(
            mentions=tuple(
                Mention(
                    shape=thing.shape, colour=thing.colour, size=thing.size, texture=thing.texture,
                    motion=thing.motion if self.video else None,
                )
                for thing in self.things
            ),
            relation=self.relation,
            background=self.background,
            wall=None if self.wall is None else Mention(
                colour=self.wall.colour, motion=None if self.wall.motion.kind == "still" else self.wall.motion,
            ),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------- geometry


def relate(a: tuple[float, float], b: tuple[float, float]) -> str:
    """Where point a lies as seen from b: the dominant axis decides; never "inside"."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def tone(colour: str, background: str) -> tuple[int, int, int]:
    """The second colour of a textured thing: a dark shade, or a light tint where the background is dark."""
    red, green, blue = COLOURS[colour]
    share, white = (0.4, 153) if background in ("black", "navy") else (0.45, 0)
    return round(share * red) + white, round(share * green) + white, round(share * blue) + white


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the edge of an upright unit shape (negative inside) at u, v.

    Its centre of mass is the origin and its bounding radius at most 1, so that a turn keeps both. Exact near straight
    edges and nowhere an overestimate; after Inigo Quilez's 2D distance functions.
    """
    match shape:
        case "circle":
            return np.hypot(u, v) - 0.92
        case "ring":
            return np.abs(np.hypot(u, v) - 0.74) - 0.22
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - 0.70
        case "diamond":
            return (np.abs(u) * 1.0 + np.abs(v) * 0.62 - 0.62) / np.hypot(1.0, 0.62)
        case "triangle":
            return np.maximum(v - 0.5, np.abs(u) * 0.8660254 - v * 0.5 - 0.5)
        case "hexagon":
            return np.maximum(np.abs(v), np.abs(u) * 0.8660254 + np.abs(v) * 0.5) - 0.8660254
        case "cross":
            a, b = np.abs(u), np.abs(v)
            long, wide = 0.94, 0.32
            return np.minimum(np.maximum(a - long, b - wide), np.maximum(a - wide, b - long))
        case "moon":
            x, y = 1.235 * u - 0.292, 1.235 * v
            return np.maximum(np.hypot(x, y) - 1.0, 0.7 - np.hypot(x - 0.6, y)) / 1.235
        case "star":
            radius = np.hypot(u, v)
            folded = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            px, py = radius * np.sin(folded), radius * np.cos(folded)
            ax, ay = 0.45 * np.sin(np.pi / 5), 0.45 * np.cos(np.pi / 5)
            return (px * (1 - ay) + py * ax - ax) / np.hypot(1 - ay, ax)
        case "heart":
            x, y = np.abs(u) * 0.66, 0.657 - v * 0.66
            lobe = np.hypot(x - 0.25, y - 0.75) - 0.35355339
            fold = 0.5 * np.maximum(x + y, 0.0)
            edge = np.minimum(x * x + (y - 1.0) ** 2, (x - fold) ** 2 + (y - fold) ** 2)
            return np.where(x + y > 1.0, lobe, np.sqrt(edge) * np.sign(x - y)) / 0.66
    raise AssertionError(f"no such shape: {shape}")


@cache
def area(shape: str) -> float:
    """The area of the unit shape."""
    axis = (np.arange(512) + 0.5) / 256 - 1.0
    u, v = np.meshgrid(axis, axis)
    return float((distance(shape, u, v) < 0).mean() * 4.0)
