"""The procedural world: reproducible by index, readable by contract, drawn exactly, written without loss."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch

from reverie.data import media
from reverie.data.index import Index
from reverie.data.world import (
    CONTRAST,
    GAP,
    IMAGE_TOPICS,
    KINDS,
    MARGIN,
    VIDEO_TOPICS,
    World,
    captions,
    render,
    world,
    write,
)
from reverie.errors import InputError
from reverie.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, SYMMETRY, Scene, Thing, area, distance, tone

ASPECTS = (1.0, 16 / 9, 0.5)


def still(shape: str, *, r: float = 0.3, x: float = 0.5, y: float = 0.5, angle: float = 0.0, **more) -> Scene:
    thing = Thing(shape=shape, colour="white", size="large", x=x, y=y, r=r, angle=angle, **more)
    return Scene(
        index=0, seed=0, topic="single", video=False, aspect=1.0, background="black", things=(thing,)
    )


# ------------------------------------------------------------------------------------------- scenes


def test_index_decides_the_scene_and_nothing_else_does():
    forward = [world(i, kind=kind) for kind in ("image", "video") for i in range(40)]
    torch.manual_seed(7)
    np.random.seed(7)
    backward = [world(i, kind=kind) for kind in ("video", "image") for i in reversed(range(40))]
    assert forward == backward[::-1]
    assert len({repr(scene) for scene in forward}) == len(forward)
    assert all(world(i) != world(i, seed=1) for i in range(20))


PINNED = (
    ("white", "star", "purple", "solid", "right of"),
    [0.727392, 0.867299, 0.102673],
    "a purple star is to the right of a yellow moon",
)


def test_the_world_is_the_same_everywhere():
    """Pinned: a change of the world is a change of every number measured on it."""
    scene = world(5, seed=3, kind="relation")
    thing = scene.things[0]
    found = (scene.background, thing.shape, thing.colour, thing.texture, scene.relation.predicate)
    assert found == PINNED[0], found
    assert [round(value, 6) for value in (thing.x, thing.y, thing.r)] == PINNED[1]
    assert captions(scene)[0].text == PINNED[2]


def test_a_mix_gives_the_scenes_of_its_topics():
    for kind, topics in (("image", IMAGE_TOPICS), ("video", VIDEO_TOPICS)):
        scenes = [world(i, kind=kind) for i in range(60)]
        assert {scene.topic for scene in scenes} == set(topics)
        assert all(world(scene.index, kind=scene.topic) == scene for scene in scenes)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_content_is_the_same_at_every_aspect(kind: str):
    for i in range(20):
        wide, tall = world(i, kind=kind, aspect=2.0), world(i, kind=kind, aspect=0.5)
        assert wide.background == tall.background
        assert sorted(map(repr, wide.describe().mentions)) == sorted(map(repr, tall.describe().mentions))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_things_stay_apart_inside_and_in_relation(kind: str):
    """The readability contract of docs/world.md."""
    for i in range(60):
        scene = world(i, kind=kind, aspect=ASPECTS[i % 3])
        wide, tall = scene.extent
        for step in range(51):
            poses = [(thing, *thing.track.at(step / 50)) for thing in scene.things]
            for thing, dx, dy, _, _ in poses:
                x, y, edge = thing.x + dx, thing.y + dy, thing.r + MARGIN - 1e-6
                assert edge <= x <= wide - edge
                assert edge <= y <= tall - edge
            if kind == "merge" or (scene.relation and scene.relation.predicate == "inside"):
                continue
            for (a, ax, ay, _, _), (b, bx, by, _, _) in combinations(poses, 2):
                gap = math.hypot(a.x + ax - b.x - bx, a.y + ay - b.y - by) - a.r - b.r
                assert gap > 0.8 * GAP, (
                    scene
                )  # paths are kept apart at 33 moments, and checked here at others
        for thing in scene.things:
            assert abs(math.log(thing.r / SIZES[thing.size])) < 0.3
            tones = [COLOURS[thing.colour]]
            tones += [tone(thing.colour, scene.background)] if thing.texture != "solid" else []
            assert all(math.dist(rgb, BACKGROUNDS[scene.background]) >= CONTRAST for rgb in tones)
        if scene.relation:
            a, b = (scene.things[k] for k in (scene.relation.subject, scene.relation.object))
            dx, dy = b.x - a.x, b.y - a.y
            assert {
                "left of": dx > 2 * abs(dy), "right of": -dx > 2 * abs(dy), "above": dy > 2 * abs(dx),
                "below": -dy > 2 * abs(dx), "inside": math.hypot(dx, dy) + a.r < 0.7 * b.r,
            }[scene.relation.predicate]  # fmt: skip


def test_a_wall_hides_a_thing_for_a_while_and_is_clear_of_it_at_both_ends():
    """The contract of "occlusion": always inside the picture, apart at the ends, wholly hidden between, readable."""
    kinds = set()
    for i in range(80):
        scene = world(i, kind="occlusion", aspect=ASPECTS[i % 3])
        (thing,), wall = scene.things, scene.wall
        along = scene.extent[0 if wall.upright else 1]
        gaps, hidden = [], []
        for step in range(57):
            dx, dy, _, _ = thing.track.at(step / 56)
            at = thing.x + dx if wall.upright else thing.y + dy
            gaps.append(abs(at - wall.at(step / 56)) - wall.width / 2 - thing.r)
            hidden.append(gaps[-1] <= -2 * thing.r)
            assert wall.width / 2 <= wall.at(step / 56) <= along - wall.width / 2
        assert min(gaps[0], gaps[-1]) > 0.03
        assert any(hidden[::8]), "not wholly hidden in a clip of 8 frames"
        ends = [thing.track.at(t)[0 if wall.upright else 1] - wall.at(t) for t in (0.0, 1.0)]
        place = thing.x if wall.upright else thing.y
        assert (place + ends[0] < 0) != (place + ends[1] < 0), "it does not change sides"
        for rgb in (BACKGROUNDS[scene.background], COLOURS[thing.colour]):
            assert math.dist(COLOURS[wall.colour], rgb) >= CONTRAST
        kinds.add((wall.motion.kind, thing.motion.kind, wall.upright))
    assert kinds == {(a, b, up) for a, b in (("still", "move"), ("move", "still")) for up in (True, False)}


def test_a_wall_covers_what_is_behind_it_from_edge_to_edge():
    scene = next(s for i in range(20) if (s := world(i, kind="occlusion")).wall.upright)
    (thing,), wall = scene.things, scene.wall
    pixels = render(scene, size=(64, 96), frames=57)
    for frame, t in ((pixels[0], 0.0), (pixels[28], 0.5)):
        column = int(16 + 64 * wall.at(t))
        assert (frame[:, column] == torch.tensor(COLOURS[wall.colour])).all()
    seen = [(frame == torch.tensor(COLOURS[thing.colour])).all(-1).any().item() for frame in pixels]
    assert seen[0]
    assert seen[-1]
    assert not all(seen)


def test_mixes_have_no_walls():
    """The topic came later: the mixes' scenes are what they were."""
    assert all(world(i, kind=kind).wall is None for kind in ("image", "video") for i in range(60))


def test_merging_things_begin_apart_and_end_as_one():
    for i in range(40):
        a, b = world(i, kind="merge").things
        assert math.hypot(a.x - b.x, a.y - b.y) - a.r - b.r >= 0.25
        assert a.x + a.track.at(0.8)[0] == pytest.approx(b.x + b.track.at(0.8)[0])
        assert a.y + a.track.at(1.0)[1] == pytest.approx(b.y + b.track.at(1.0)[1])


@pytest.mark.parametrize(
    "bad", [{"kind": "films"}, {"index": -1}, {"aspect": 0.0}, {"aspect": 20.0}, {"aspect": math.nan}]
)
def test_unknown_worlds_are_refused(bad: dict):
    with pytest.raises(InputError):
        world(**({"index": 0} | bad))


# ------------------------------------------------------------------------------------------- geometry, drawing


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_centred_bounded_and_as_symmetric_as_said(shape: str):
    axis = (np.arange(800) + 0.5) / 400 - 1.0
    u, v = np.meshgrid(axis, axis)
    inside = distance(shape, u, v) < 0
    assert abs(u[inside].mean()) < 0.01
    assert abs(v[inside].mean()) < 0.01
    assert 0.9 < np.hypot(u, v)[inside].max() < 1.02
    period = math.radians(360 / SYMMETRY[shape] if SYMMETRY[shape] else 50)
    x, y = u * math.cos(period) + v * math.sin(period), v * math.cos(period) - u * math.sin(period)
    assert (inside != (distance(shape, x, y) < 0)).mean() < 0.003


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_exact_at_any_size_and_angle(shape: str):
    """The sum of coverage is the shape's area: what antialiasing promises."""
    for size, angle, x in ((48, 0.0, 0.5), (64, 17.0, 0.513), (150, 200.0, 0.47)):
        pixels = render(still(shape, r=0.3, x=x, angle=angle), size=(size, size))[0, :, :, 0].double()
        low, high = COLOURS["black"][0], COLOURS["white"][0]
        share = ((pixels - low) / (high - low)).sum() / size**2
        assert share == pytest.approx(area(shape) * 0.3**2, rel=0.02)


def test_a_large_drawing_shrinks_to_the_small_one():
    for i in range(30):
        scene = world(i)
        large = render(scene, size=(256, 256))[0].double().reshape(64, 4, 64, 4, 3).mean((1, 3))
        small = render(scene, size=(64, 64))[0].double()
        assert (large - small).abs().mean() < 0.6
        assert (large - small).abs().max() < 90


def test_frames_show_the_whole_event_at_every_duration():
    scene = world(3, kind="motion")
    short, long = render(scene, frames=5), render(scene, frames=17)
    assert torch.equal(short, long[::4])
    assert torch.equal(render(scene, frames=3, span=(0.5, 1.0))[1], render(scene, frames=5)[3])


def test_a_longer_picture_shows_the_same_scene_with_more_background():
    scene = world(11, aspect=1.0)
    wide = render(scene, size=(64, 96))
    assert torch.equal(wide[:, :, 16:80], render(scene, size=(64, 64)))
    assert (wide[:, :, :16] == torch.tensor(BACKGROUNDS[scene.background])).all()


@pytest.mark.parametrize("size", [(4, 64), (64, 64)])
def test_pictures_that_would_cut_or_crush_the_scene_are_refused(size: tuple[int, int]):
    with pytest.raises(InputError):
        render(world(0, aspect=1.5), size=size)


# ------------------------------------------------------------------------------------------- datasets


def test_captions_are_distinct_in_both_languages_and_keyed_by_index():
    for kind in KINDS[2:]:
        for i in range(10):
            made = captions(world(i, kind=kind))
            assert [caption.language for caption in made] == ["en"] * 3 + ["zh"] * 3
            assert len({caption.text for caption in made}) == 6
            assert made == captions(world(i, kind=kind))


def test_world_maps_indices_to_examples():
    data = World(6, seed=2, size=(48, 80), frames=8)
    example = data[3]
    assert example.pixels.shape == (8, 4, 48, 80)
    assert example.pixels.dtype == torch.uint8
    assert (example.pixels[:, 3] == 255).all()
    assert torch.equal(
        example.pixels[:, :3].permute(0, 2, 3, 1), render(example.scene, size=(48, 80), frames=8)
    )
    assert len(list(data)) == len(data) == 6
    assert World(2, seed=2, size=(48, 80), frames=8, first=3)[0].scene == example.scene
    with pytest.raises(IndexError):
        data[6]


@pytest.mark.parametrize("bad", [{"count": 0}, {"kind": "films"}, {"kind": "motion"}, {"size": (4, 4)}])
def test_impossible_worlds_are_refused(bad: dict):
    with pytest.raises(InputError):
        World(**({"count": 3} | bad))


@pytest.mark.parametrize("frames", [1, 8])
def test_a_written_world_reads_back_exactly(tmp_path, frames: int):
    made = write(tmp_path / "world", 12, seed=4, size=(48, 64), frames=frames)
    index, data = Index.read(tmp_path / "world"), World(12, seed=4, size=(48, 64), frames=frames)
    assert index.items == made.items
    truths = [json.loads(line) for line in (tmp_path / "world" / "scenes.jsonl").read_text().splitlines()]
    for item, example, truth in zip(index, data, truths, strict=True):
        assert torch.equal(media.decode(index.path(item), limits=media.Limits()), example.pixels)
        assert item.captions == tuple(example.captions)
        assert (item.width, item.height, item.frames) == (64, 48, frames)
        assert truth["file_name"] == item.file_name
        assert [thing["colour"] for thing in truth["things"]] == [t.colour for t in example.scene.things]
    with pytest.raises(InputError):
        write(tmp_path / "world", 12)


def test_a_written_world_has_every_split(tmp_path):
    index = write(tmp_path / "world", 90, size=(16, 16))
    splits = [item.split for item in index]
    assert set(splits) == {"train", "val", "test"}
    assert splits.count("train") >= 75
