"""The procedural world: scenes of coloured shapes with exact truth, reproducible by index, of any aspect.

`world(index)` makes a scene, `render` draws it, `captions` describes it in English and Chinese. What a scene
contains is drawn apart from where it lies, so one index keeps its content at every aspect ratio.
Readability is part of the contract (docs/world.md): things keep GAP apart at all times, save for "inside" and
the end of "merge".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from reverie import output, rng
from reverie.data.index import Caption, Index, Item
from reverie.data.world_captions import Draw, captions
from reverie.data.world_render import render
from reverie.errors import InputError
from reverie.media import probe
from reverie.scene import (
    BACKGROUNDS,
    BOUNCES,
    COLOURS,
    DIRECTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    SYMMETRY,
    TEXTURED_COLOURS,
    TEXTURED_SHAPES,
    TEXTURES,
    TURNS,
    Motion,
    Relation,
    Scene,
    Thing,
    Track,
    Wall,
    tone,
)

IMAGE_TOPICS = {"single": 0.3, "count": 0.25, "relation": 0.25, "group": 0.2}
VIDEO_TOPICS = {"motion": 0.55, "duet": 0.2, "chorus": 0.1, "merge": 0.15}
ALONE = ("occlusion",)  # clips that no mix has, so that the mixes keep their scenes
KINDS = ("image", "video", *IMAGE_TOPICS, *VIDEO_TOPICS, *ALONE)
GAP = 0.05  # least distance between two things' bounding circles, in units of the shorter side
MARGIN = 0.03  # least distance from a thing's bounding circle to the picture's edge
CONTRAST = 90  # least RGB distance between a thing's colours and the background

# ----------------------------------------------------------------------------------------------- scenes


def world(index: int, *, seed: int = 0, kind: str = "image", aspect: float = 1.0) -> Scene:
    """Scene number `index` of the world `seed`, for pictures of aspect (width / height) `aspect`.

    kind: "image" or "video" (a mix of topics), or one topic: "single", "count", "relation", "group" for
    images, "motion", "duet", "chorus", "merge" for clips. A mix gives the same scene as the topic it drew. The topic
    "occlusion" (clips in which a wall hides a thing for a while) is in no mix.
    """
    if kind not in KINDS:
        raise InputError(f"the world has no kind {kind!r}: choose one of {', '.join(KINDS)}.")
    if index < 0 or not 0.125 <= aspect <= 8:
        raise InputError(
            f"no scene has index {index} and aspect {aspect:g}: the index begins at 0, aspect is 1/8 to 8."
        )
    topic = kind
    if kind in ("image", "video"):
        topic = Draw(seed, kind, index).weighted(IMAGE_TOPICS if kind == "image" else VIDEO_TOPICS)
    what, where = Draw(seed, topic, index, "what"), Draw(seed, topic, index, "where")
    background = what.choice(list(BACKGROUNDS))
    things: tuple[Thing, ...]
    wall, predicate = None, None
    if topic == "occlusion":
        things, wall = _occlusion(what, where, background, (max(1.0, aspect), max(1.0, 1.0 / aspect)))
    else:
        things, predicate = _things(topic, what, background)
    subject = 1 if predicate == "inside" else 0
    scene = Scene(
        index=index,
        seed=seed,
        topic=topic,
        video=topic in VIDEO_TOPICS or topic in ALONE,
        aspect=aspect,
        background=background,
        things=things,
        relation=Relation(subject=subject, predicate=predicate, object=1 - subject) if predicate else None,
        wall=wall,
    )
    return scene if wall else replace(scene, things=_place(scene, where))


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return math.dist(a, b)


def _thing(
    draw: Draw,
    background: str,
    *,
    sizes: Sequence[str] = tuple(SIZES),
    shapes: Sequence[str] = SHAPES,
    textured: float = 0.35,
    without: Sequence[Thing] = (),
    clear: bool = False,
) -> Thing:
    """One thing, not yet placed, that stands out from the background and differs from the things `without`.

    Differs: in shape or colour, or with `clear` in colour.
    """
    while True:
        shape, size, texture = draw.choice(shapes), draw.choice(sizes), "solid"
        colours = tuple(COLOURS)
        if size != "small" and shape in TEXTURED_SHAPES and draw.chance(textured):
            texture, colours = draw.choice(TEXTURES[1:]), TEXTURED_COLOURS
        colour = draw.choice(colours)
        tones = [COLOURS[colour]] + ([tone(colour, background)] if texture != "solid" else [])
        if any(_distance(rgb, BACKGROUNDS[background]) < CONTRAST for rgb in tones):
            continue
        if any(colour == other.colour and (clear or shape == other.shape) for other in without):
            continue
        r = SIZES[size] * draw.uniform(0.94, 1.06)
        return Thing(shape=shape, colour=colour, size=size, texture=texture, x=0.0, y=0.0, r=r)


def _things(topic: str, draw: Draw, background: str) -> tuple[tuple[Thing, ...], str | None]:
    """The unplaced things of a scene, and the relation of the first two, if any."""
    if topic == "single":
        return (_thing(draw, background),), None
    if topic == "count":
        count = draw.choice((2, 3, 4, 5, 6))
        sizes = ("small",) if count > 4 else ("small", "medium")
        return (_thing(draw, background, sizes=sizes),) * count, None
    if topic == "relation":
        predicate = draw.choice(RELATIONS)
        if predicate == "inside":
            outer = _thing(
                draw, background, sizes=("large",), shapes=("circle", "square", "hexagon"), textured=0.0
            )
            outer = replace(outer, r=draw.uniform(0.27, 0.32))
            while True:
                inner = _thing(draw, background, sizes=("small",), without=(outer,), clear=True)
                if _distance(COLOURS[inner.colour], COLOURS[outer.colour]) >= CONTRAST:
                    return (outer, inner), predicate  # the later one is drawn on top
        first = _thing(draw, background, sizes=("small", "medium"))
        return (first, _thing(draw, background, sizes=("small", "medium"), without=(first,))), predicate
    if topic == "group":
        things: list[Thing] = []
        for _ in range(draw.choice((2, 3, 3, 4))):
            things.append(_thing(draw, background, sizes=("small", "small", "medium"), without=things))
        return tuple(things), None
    if topic == "chorus":
        thing = _mover(draw, background, sizes=("small",), kinds={"move": 0.6, "bounce": 0.4})
        return (thing,) * draw.choice((2, 3)), None
    if topic == "merge":
        first = _thing(draw, background, sizes=("small", "medium"))
        second = _thing(draw, background, sizes=("small", "medium"), without=(first,), clear=True)
        return tuple(replace(thing, motion=Motion(kind="merge")) for thing in (first, second)), None
    kinds = {"move": 0.4, "rotate": 0.2, "bounce": 0.2, "appear": 0.1, "vanish": 0.1}
    if topic == "duet":  # two fast crossings would leave no room to stay apart
        first = _mover(draw, background, sizes=("small",), kinds=kinds)
        second = _mover(draw, background, sizes=("small",), kinds=kinds, speeds=("slow",), without=(first,))
        return (first, second), None
    first = _mover(draw, background, sizes=("small", "medium"), kinds=kinds)
    if draw.chance(0.6):
        return (first,), None
    return (first, _thing(draw, background, sizes=("small", "medium"), without=(first,), clear=True)), None


def _mover(
    draw: Draw,
    background: str,
    *,
    sizes: Sequence[str],
    kinds: dict[str, float],
    speeds: Sequence[str] = SPEEDS,
    without: Sequence[Thing] = (),
) -> Thing:
    """A thing with one of the motions `kinds`, in a shape that shows it, with its track, not yet placed."""
    kind, speed = draw.weighted(kinds), draw.choice(speeds)
    shapes = [shape for shape in SHAPES if kind != "rotate" or 1 <= SYMMETRY[shape] <= 5]
    thing = _thing(draw, background, sizes=sizes, shapes=shapes, without=without, clear=True)
    fast = speed == "fast"
    if kind == "move":
        direction = draw.choice(list(DIRECTIONS))
        dx, dy = DIRECTIONS[direction]
        far = draw.uniform(0.46, 0.58) if fast else draw.uniform(0.18, 0.25)
        track = Track(dx=dx * far / math.hypot(dx, dy), dy=dy * far / math.hypot(dx, dy))
    elif kind == "rotate":
        direction = draw.choice(TURNS)
        turn = draw.uniform(140, 165) if fast else draw.uniform(50, 70)
        track = Track(turn=turn if direction == "clockwise" else -turn)
    elif kind == "bounce":
        direction = draw.choice(BOUNCES)
        far = draw.uniform(0.26, 0.45) * draw.choice((-1, 1))
        upright = direction == "up and down"
        track = Track(dx=0.0 if upright else far, dy=far if upright else 0.0, bounces=2 if fast else 1)
    else:
        appears = kind == "appear"
        track = Track(start=draw.uniform(0.25, 0.68)) if appears else Track(end=draw.uniform(0.32, 0.75))
        return replace(thing, motion=Motion(kind=kind), track=track)
    return replace(thing, motion=Motion(kind=kind, direction=direction, speed=speed), track=track)


# ----------------------------------------------------------------------------------------------- layout


def _place(scene: Scene, draw: Draw) -> tuple[Thing, ...]:
    """The things where they stay inside the picture, apart from each other, and in the scene's relation."""
    wide, tall = scene.extent
    if scene.topic == "merge":
        return _place_merge(scene, draw)
    if scene.relation and scene.relation.predicate == "inside":
        outer, inner = scene.things
        edge = outer.r + MARGIN
        x, y = draw.uniform(edge, wide - edge), draw.uniform(edge, tall - edge)
        return replace(outer, x=x, y=y), replace(inner, x=x, y=y)
    while True:  # each round is a fresh layout; the content's sizes leave room for it
        placed: list[Thing] = []
        for thing in scene.things:
            spot = next(_spots(thing, placed, draw, (wide, tall)), None)
            if spot is None:
                break
            placed.append(spot)
        if len(placed) == len(scene.things) and _related(placed, scene.relation):
            return tuple(placed)


def _spots(thing: Thing, placed: Sequence[Thing], draw: Draw, extent: tuple[float, float]) -> Iterator[Thing]:
    """The thing at random free spots, where 40 tries find any."""
    edge = thing.r + MARGIN
    low_x, high_x = edge + max(0.0, -thing.track.dx), extent[0] - edge - max(0.0, thing.track.dx)
    low_y, high_y = edge + max(0.0, -thing.track.dy), extent[1] - edge - max(0.0, thing.track.dy)
    assert low_x < high_x, thing
    assert low_y < high_y, thing
    for _ in range(40):
        spot = replace(thing, x=draw.uniform(low_x, high_x), y=draw.uniform(low_y, high_y))
        if all(_apart(spot, other) for other in placed):
            yield spot


def _apart(a: Thing, b: Thing) -> bool:
    """Whether two things keep GAP between their bounding circles at all times."""
    moving = any(thing.motion.kind in ("move", "bounce") for thing in (a, b))
    for step in range(33 if moving else 1):
        (ax, ay, _, _), (bx, by, _, _) = a.track.at(step / 32), b.track.at(step / 32)
        if math.hypot(a.x + ax - b.x - bx, a.y + ay - b.y - by) < a.r + b.r + GAP:
            return False
    return True


def _related(things: Sequence[Thing], relation: Relation | None) -> bool:
    """Whether the relation holds clearly: its axis has more than twice the distance of the other."""
    if relation is None:
        return True
    a, b = things[relation.subject], things[relation.object]
    along, across = (a.x - b.x, a.y - b.y) if relation.predicate.endswith(" of") else (a.y - b.y, a.x - b.x)
    before = relation.predicate in ("left of", "above")
    return abs(along) > 2 * abs(across) and (along < 0) == before


def _place_merge(scene: Scene, draw: Draw) -> tuple[Thing, Thing]:
    """Two things that go straight to the point between them, reach it at 0.8 of the clip and stay."""
    (wide, tall), (a, b) = scene.extent, scene.things
    edge = max(a.r, b.r) + MARGIN
    while True:
        ax, ay = draw.uniform(edge, wide - edge), draw.uniform(edge, tall - edge)
        bx, by = draw.uniform(edge, wide - edge), draw.uniform(edge, tall - edge)
        if 0.25 <= math.hypot(ax - bx, ay - by) - a.r - b.r <= 0.8:
            break
    dx, dy = (bx - ax) / 2, (by - ay) / 2
    a = replace(a, x=ax, y=ay, track=Track(dx=dx, dy=dy, arrive=0.8))
    b = replace(b, x=bx, y=by, track=Track(dx=-dx, dy=-dy, arrive=0.8))
    return (a, b) if a.r >= b.r else (b, a)  # the smaller one ends on top


CLEAR = 0.035  # what a thing keeps from the wall's edge at the first and the last moment, at least


def _occlusion(
    what: Draw, where: Draw, background: str, extent: tuple[float, float]
) -> tuple[tuple[Thing], Wall]:
    """A thing that passes behind a wall at constant speed, or a wall that passes before a thing at rest; placed.

    Both are apart at the first and at the last moment, and in between the thing is hidden for a while.
    """
    thing = _thing(what, background, sizes=("small",))
    while True:
        colour = what.choice(list(COLOURS))
        if all(
            _distance(COLOURS[colour], rgb) >= CONTRAST
            for rgb in (BACKGROUNDS[background], COLOURS[thing.colour])
        ):
            break
    passes = what.chance(0.7)  # the thing, else the wall
    direction = what.choice(("right", "left", "down", "up"))
    dx, dy = DIRECTIONS[direction]
    width = 2 * thing.r + (what.uniform(0.11, 0.14) if passes else what.uniform(0.095, 0.115))
    room = 0.164 if passes else 0.11
    before = what.uniform(CLEAR, room - CLEAR)
    after = what.uniform(CLEAR, room - before)
    far = before + width + after + 2 * thing.r
    motion, track = Motion(kind="move", direction=direction), Track(dx=dx * far, dy=dy * far)
    # Along the axis of the motion, as if it went right or down: the thing's middle and the wall's at time 0.
    margin = MARGIN if passes else 0.005
    along, across = extent if dx else extent[::-1]
    if passes:
        start = where.uniform(margin + thing.r, along - margin - thing.r - far)
        at, middle = start, start + thing.r + before + width / 2
        if dx + dy < 0:
            at, middle = along - at, along - middle
        thing, moved, standing = replace(thing, motion=motion, track=track), Motion(), Track()
    else:
        middle = where.uniform(margin + width / 2, along - margin - width / 2 - far)
        at = middle + width / 2 + before + thing.r
        if dx + dy < 0:
            at, middle = along - at, along - middle
        moved, standing = motion, track
    side = where.uniform(2 * MARGIN + thing.r, across - 2 * MARGIN - thing.r)
    x, y = (at, side) if dx else (side, at)
    wall = Wall(colour=colour, upright=bool(dx), middle=middle, width=width, motion=moved, track=standing)
    return (replace(thing, x=x, y=y),), wall


# ----------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example: pixels uint8 `f 4 h w` (RGBA, as `Pixels` gives them), captions, and the truth."""

    pixels: torch.Tensor
    captions: list[Caption]
    scene: Scene


class World:
    """`count` scenes of the world `seed` as a map from index to Example; nothing is stored.

    size: (height, width). frames: 1 for images. kind: as in `world`; default "image" or "video" by `frames`.
    first: the index of the first scene, so that disjoint ranges make disjoint splits.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        size: tuple[int, int] = (64, 64),
        frames: int = 1,
        kind: str | None = None,
        first: int = 0,
    ) -> None:
        kind = kind or ("image" if frames == 1 else "video")
        if count < 1:
            raise InputError(f"a world of {count} scenes is empty: ask for at least 1.")
        if frames == 1 and (kind in ("video", *VIDEO_TOPICS, *ALONE)):
            raise InputError(f"kind {kind!r} moves but frames is 1: ask for at least 8 frames.")
        self.count, self.seed, self.size, self.frames, self.kind, self.first = (
            count,
            seed,
            size,
            frames,
            kind,
            first,
        )
        render(self.scene(0), size=size)  # refuses a kind or size that cannot be

    def __len__(self) -> int:
        return self.count

    def scene(self, i: int) -> Scene:
        """The truth of example i."""
        if not 0 <= i < self.count:
            raise IndexError(i)
        return world(self.first + i, seed=self.seed, kind=self.kind, aspect=self.size[1] / self.size[0])

    def __getitem__(self, i: int) -> Example:
        scene = self.scene(i)
        colour = render(scene, size=self.size, frames=self.frames).permute(0, 3, 1, 2)
        pixels = torch.cat([colour, torch.full_like(colour[:, :1], 255)], dim=1)
        return Example(pixels=pixels, captions=captions(scene), scene=scene)


def write(
    folder: str | Path,
    count: int,
    *,
    seed: int = 0,
    size: tuple[int, int] = (64, 64),
    frames: int = 1,
    kind: str | None = None,
    fps: float = 12.0,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Materialise a captioned folder: PNG images or animated PNG clips, `metadata.parquet`, `scenes.jsonl`.

    90 % of the items are "train", 5 % "val", 5 % "test", by index. `scenes.jsonl` holds each scene's exact
    truth, one line an item. Raises InputError where the folder already holds something else.
    """
    if not 1 <= fps <= 1000:
        raise InputError(f"fps is {fps:g}: a clip shows from 1 to 1000 frames a second.")
    folder, examples = Path(folder), World(count, seed=seed, size=size, frames=frames, kind=kind)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: name a new folder for the world.")
    (folder / "media").mkdir(parents=True)
    items = []
    with open(folder / "scenes.jsonl", "w", encoding="utf-8") as truths:
        for i in range(count):
            example = examples[i]
            name = f"media/{i:06d}.png"
            pictures = example.pixels[:, :3].permute(0, 2, 3, 1).numpy()
            output.write(folder / name, pictures, fps=fps, durable=False)
            data = (folder / name).read_bytes()
            truths.write(json.dumps({"file_name": name} | asdict(example.scene)) + "\n")
            items.append(
                Item(
                    file_name=name,
                    hash=sha256(data).hexdigest(),
                    bytes=len(data),
                    width=size[1],
                    height=size[0],
                    frames=frames,
                    fps=probe(folder / name).fps,
                    split={0: "val", 1: "test"}.get(rng.integer(seed, "world split", i) % 20, "train"),
                    captions=tuple(example.captions),
                    label=_label(example.scene),
                    source="world",
                    licence="CC0-1.0",
                    scores={},
                    reject=None,
                )
            )
            if progress:
                progress(i + 1, count)
    index = Index(folder, items)
    index.write()
    return index


def scenes_of(index: Index) -> dict[str, Scene]:
    """The truth of the items of an index, by file name, where `write` has drawn them; of others there is none.

    InputError: a `scenes.jsonl` beside them that is not what `write` makes.
    """
    places = {str(PurePosixPath(item.file_name).parent.parent) for item in index}
    wanted = {item.file_name for item in index}
    found: dict[str, Scene] = {}
    for place in sorted(places):
        path = index.folder / place / "scenes.jsonl"
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                told = json.loads(line)
                name = str(PurePosixPath(place) / told.pop("file_name"))
                if name in wanted:
                    found[name] = _scene(told)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(
                    f"line {number} of {path} is no scene of the world: draw it anew with `reverie data world`."
                ) from None
    return found


def _scene(told: dict[str, Any]) -> Scene:
    """The way back from `asdict`."""

    def moving(part: dict[str, Any], kind: Callable[..., Any]) -> Any:
        return kind(**part | {"motion": Motion(**part["motion"]), "track": Track(**part["track"])})

    return Scene(
        **told
        | {
            "things": tuple(moving(thing, Thing) for thing in told["things"]),
            "relation": told["relation"] and Relation(**told["relation"]),
            "wall": told["wall"] and moving(told["wall"], Wall),
        }
    )


def _label(scene: Scene) -> str | None:
    """The class of a single thing, its colour and its shape; other scenes have none."""
    if scene.topic != "single":
        return None
    return f"{scene.things[0].colour} {scene.things[0].shape}"
