"""The reader of captions gives back what was said, in both languages, and tells true from false."""

from dataclasses import replace

import pytest

from reverie.data.world import KINDS, captions, world
from reverie.data.world_captions import Draw, _chinese, _english, select
from reverie.errors import InputError
from reverie.evals.world_captions import agree, covers, read_caption, told
from reverie.scene import INVERSE, Description, Mention, Motion, Relation


def canonical(said: Description) -> Description:
    """Mentions in a fixed order, the relation from the earlier one: two texts that say the same are equal."""
    order = sorted(range(len(said.mentions)), key=lambda i: repr(said.mentions[i]))
    relation = said.relation
    if relation:
        a, b, predicate = order.index(relation.subject), order.index(relation.object), relation.predicate
        a, b, predicate = (a, b, predicate) if a < b else (b, a, INVERSE[predicate])
        relation = Relation(subject=a, predicate=predicate, object=b)
    return replace(said, mentions=tuple(said.mentions[i] for i in order), relation=relation)


@pytest.mark.parametrize("say", [_english, _chinese])
@pytest.mark.parametrize("kind", KINDS[2:])
def test_reads_back_exactly_what_was_said(kind: str, say):
    for i in range(150):
        draw = Draw(8, kind, i)
        said = select(world(i, seed=8, kind=kind), draw)
        text = say(said, draw)
        assert canonical(read_caption(text)) == canonical(said), text


@pytest.mark.parametrize("kind", KINDS[2:])
def test_own_captions_agree_with_their_scenes_and_say_the_main_things(kind: str):
    for i in range(40):
        scene = world(i, seed=9, kind=kind)
        for caption in captions(scene):
            found = agree(caption.text, scene)
            assert False not in found.values(), (caption.text, found)
            assert found["count"] is found["shape"] is found["colour"] is True
            assert (found["relation"] is True) == (scene.relation is not None)
            assert (found["motion"] is True) == scene.video


def test_captions_of_another_scene_disagree():
    """A caption agrees wholly with the next scene of its topic only by chance."""
    for kind in KINDS[2:]:
        scenes = [world(i, seed=10, kind=kind) for i in range(21)]
        fooled = sum(
            False not in agree(captions(scene)[k].text, other).values()
            for scene, other in zip(scenes, scenes[1:], strict=False)
            for k in (0, 3)
        )
        assert fooled <= 1, kind


@pytest.mark.parametrize(
    ("text", "mentions", "relation"),
    [
        (
            "There are 3 tiny blue stars, and a big red box on the left of them.",
            [(3, "star", "blue", "small"), (1, "square", "red", "large")],
            (0, "right of", 1),
        ),
        (
            "To the left of a blue square is a red ring.",
            [(1, "square", "blue", None), (1, "ring", "red", None)],
            (0, "right of", 1),
        ),
        (
            "A green disc in a large white square",
            [(1, "circle", "green", None), (1, "square", "white", "large")],
            (0, "inside", 1),
        ),
        (
            "a red circle with a blue star on its left",
            [(1, "circle", "red", None), (1, "star", "blue", None)],
            (0, "right of", 1),
        ),
        (
            "红色正方形的左边是一颗蓝色星星",
            [(1, "square", "red", None), (1, "star", "blue", None)],
            (0, "right of", 1),
        ),
        ("画面里有三个绿色的小三角形", [(3, "triangle", "green", "small")], None),
        ("two pink hearts", [(2, "heart", "pink", None)], None),
        ("a wonderful day at the sea", [], None),
        ("", [], None),
    ],
)  # fmt: skip
def test_reads_other_peoples_words(text: str, mentions: list, relation: tuple | None):
    found = read_caption(text)
    assert [(m.count, m.shape, m.colour, m.size) for m in found.mentions] == mentions
    if relation is None:
        assert found.relation is None
    else:
        assert found.relation == Relation(subject=relation[0], predicate=relation[1], object=relation[2])


@pytest.mark.parametrize(
    ("text", "motion"),
    [
        ("A spinning yellow heart turns counter-clockwise", Motion(kind="rotate", direction="anticlockwise")),
        ("the red circle drifts up and to the left slowly", Motion(kind="move", direction="up left", speed="slow")),
        ("a red circle moves up and down", Motion(kind="bounce", direction="up and down")),
        ("一个旋转的紫色菱形", Motion(kind="rotate")),
        ("红圆慢慢地向右下方移动", Motion(kind="move", direction="down right", speed="slow")),
        ("a star pops up", Motion(kind="appear")),
        ("a red circle to the right", None),
    ],
)  # fmt: skip
def test_reads_motions(text: str, motion: Motion | None):
    assert [mention.motion for mention in read_caption(text).mentions] == [motion]


def test_backgrounds_are_not_things():
    for text in (
        "a red star on a dark blue background",
        "一颗红色星星，背景是深蓝色",
        "深蓝色背景上，一颗红色星星",
    ):
        assert read_caption(text) == Description(
            mentions=(Mention(shape="star", colour="red"),), background="navy"
        )


def test_agreement_is_judged_claim_by_claim():
    scene = next(
        s for i in range(99) if (s := world(i, kind="relation")).relation.predicate == "left of"
        and s.things[0].shape != s.things[1].shape and s.things[0].colour != s.things[1].colour
    )  # fmt: skip
    a, b = scene.things
    assert agree(f"a {a.colour} {a.shape} left of a {b.colour} {b.shape}", scene)["relation"] is True
    assert agree(f"a {b.colour} {b.shape} to the right of a {a.colour} {a.shape}", scene)["relation"] is True
    wrong = agree(f"a {b.colour} {a.shape} right of a {a.colour} {b.shape}", scene)
    assert (wrong["shape"], wrong["colour"], wrong["relation"], wrong["count"]) == (True, False, False, True)
    short = agree(f"a {a.shape}", scene)
    assert (short["shape"], short["colour"], short["count"], short["motion"]) == (True, None, False, None)
    assert agree(f"a {a.shape} moving left", scene)["motion"] is False
    assert agree("nothing at all", scene)["count"] is False


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", KINDS[2:])
def test_who_tells_the_truth_says_all_and_nothing_wrong(kind: str, language: str):
    scenes = [world(i, kind=kind) for i in range(12)]
    texts = [next(c.text for c in captions(scene) if c.language == language) for scene in scenes]
    found = told(texts, scenes)
    for name, own in found.items():
        assert own["right"] in (1, None), (kind, name)
        assert own.get("said") in (1, None), (kind, name)
    assert found["all"]["holds"] == [True] * 12
    assert ("motion" in found) == scenes[0].video
    dealt = told(texts[1:] + texts[:1], scenes)
    assert dealt["all"]["right"] < 0.5
    assert dealt["colour"]["right"] < 0.8


def test_what_is_left_out_is_missing_and_what_is_not_claimed_is_not_wrong():
    scene = next(
        s for i in range(99) if (s := world(i, kind="relation")).relation.predicate == "above"
        and s.things[0].shape != s.things[1].shape and s.things[0].colour != s.things[1].colour
    )  # fmt: skip
    a, b = scene.things
    half = covers(f"a {a.colour} {a.shape}", scene)
    assert half == {"count": 0, "shape": 0.5, "colour": 0.5, "relation": 0, "motion": None}
    assert covers(f"a {a.colour} {a.shape} over a {b.shape}", scene) == half | {
        "count": 1,
        "shape": 1,
        "relation": 1,
    }
    found = told(
        [f"a {a.shape}", "nothing to see", f"a {a.colour} {a.shape} above a {b.colour} {b.shape}"],
        [scene] * 3,
    )
    assert found["colour"]["claimed"] == 1
    assert found["colour"]["right"] == 1
    assert found["colour"]["said"] == pytest.approx(1 / 3)
    assert found["count"]["claimed"] == 2
    assert found["count"]["right"] == 0.5
    assert found["count"]["said"] == pytest.approx(1 / 3)
    assert found["all"]["holds"] == [False, False, True]
    with pytest.raises(InputError, match="1 captions and 0 scenes"):
        told(["a"], [])


def test_a_motion_counts_where_it_is_claimed_and_is_not_asked_of_who_sees_a_frame():
    scene = next(
        s
        for i in range(99)
        if len((s := world(i, kind="motion")).things) == 1 and s.things[0].motion.direction
    )
    thing, motion = scene.things[0], scene.things[0].motion
    plain = f"a {thing.colour} {thing.shape}"
    other = next(way for way in ("left", "right") if way != motion.direction)
    found = told([plain, f"{plain} moving {other}"], [scene] * 2)
    assert (found["motion"]["claimed"], found["motion"]["right"], found["motion"]["said"]) == (1, 0, 0)
    assert found["all"]["holds"] == [True, False]
