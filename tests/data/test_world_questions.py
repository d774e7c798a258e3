"""Questions about scenes: one right answer each, and as little as possible to guess by."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from reverie.data.index import Index
from reverie.data.world import World, scenes_of, world, write
from reverie.data.world_questions import KINDS, balanced, question_set, questions
from reverie.errors import InputError
from reverie.evals.world_captions import read_caption

SCENES = {f"{kind} {i}": world(i, kind=kind) for kind in ("image", "video", "occlusion") for i in range(60)}
SIDES = {
    "left": ("x", -1), "right": ("x", 1), "above": ("y", -1), "over": ("y", -1), "below": ("y", 1), "under": ("y", 1),
}  # fmt: skip


def asked(**how):
    return [
        (SCENES[name], q)
        for name, q in question_set(SCENES, each=3, languages=("en", "zh"), even=False, **how)
    ]


def named(text, scene):
    """The things of a scene that a question names, read by the reader of captions."""
    mention = read_caption(text.replace(" thing", " circle").replace("东西", "圆形")).mentions[0]
    shape = None if "thing" in text or "东西" in text else mention.shape
    return [t for t in scene.things if mention.colour in (None, t.colour) and shape in (None, t.shape)]


def test_what_is_named_answers_alike_and_as_the_scene_has_it():
    seen = Counter()
    for scene, question in asked(kinds=("colour", "shape", "count", "there")):
        things = named(question.text, scene)
        seen[question.kind, question.language] += 1
        if question.kind == "count":
            assert question.answer == str(len(things) or len(scene.things))
            continue
        if question.kind == "there":
            assert (question.answer in ("yes", "有")) == bool(things)
            continue
        noun = {"en": " circle", "zh": "圆形"}[question.language] if question.kind == "colour" else ""
        (mention,) = read_caption(question.answer + noun).mentions
        assert {getattr(thing, question.kind) for thing in things} == {getattr(mention, question.kind)}
    assert min(seen.values()) > 50
    assert len(seen) == 8


def test_beside_a_thing_is_what_lies_there_alone():
    found = 0
    for scene, question in asked(kinds=("relation",)):
        words = question.text
        if question.language == "zh" or any(word in words for word in ("inside", "within", "around")):
            continue
        (own,) = named(question.text, scene)
        answer = read_caption(question.answer).mentions[0]
        axis, side = next(where for word, where in SIDES.items() if word in words)
        place = getattr(own, axis)
        there = [t for t in scene.things if t is not own and side * (getattr(t, axis) - place) > 0]
        assert [(t.colour, t.shape) for t in there] == [(answer.colour, answer.shape)]
        found += 1
    assert found > 20


def test_motions_are_those_of_what_is_named():
    ways = {"direction": "move", "turn": "rotate", "bounce": "bounce"}
    seen = Counter()
    for scene, question in asked(kinds=(*ways, "action")):
        if question.language == "zh":
            continue
        seen[question.kind] += 1
        for thing in named(question.text, scene):
            if question.kind == "action":
                (mention,) = read_caption(f"a circle {question.answer}").mentions
                assert mention.motion.kind == thing.motion.kind
            else:
                assert thing.motion.kind == ways[question.kind]
                way = question.answer.replace("upper", "to the upper").replace("lower", "to the lower")
                (mention,) = read_caption(f"a circle {ways[question.kind]} {way}").mentions
                assert mention.motion.direction == thing.motion.direction
    assert set(seen) == {*ways, "action"}
    assert not [q for scene, q in asked(kinds=tuple(ways)) if not scene.video]


def test_questions_are_drawn_by_the_scene_alone_and_differ():
    for scene in list(SCENES.values())[::20]:
        own = questions(scene, each=3)
        assert own == questions(replace(scene), each=3)
        assert len({(q.text, q.answer) for q in own}) == len(own)
        assert {q.kind for q in own} >= {"there", "background"}
    with pytest.raises(InputError, match="kind 'size'"):
        questions(scene, kinds=("size",))


def test_balanced_questions_are_hard_to_guess():
    def prior(set_):
        return {
            kind: max(Counter(q.answer for _, q in set_ if q.kind == kind).values())
            / sum(q.kind == kind for _, q in set_)
            for kind in ("count", "colour", "there")
        }

    scenes = {str(i): world(i) for i in range(600)}
    plain, even = question_set(scenes, even=False), question_set(scenes)
    assert prior(plain)["count"] > 0.5
    assert prior(even)["count"] < 0.25
    assert prior(even)["colour"] < 0.12
    assert prior(even)["there"] < 0.55
    assert set(even) <= set(plain)
    assert balanced(even) == even
    assert {q.kind for _, q in plain} < set(KINDS)


def test_scenes_come_back_from_a_folder(tmp_path):
    for kind, frames in (("image", 1), ("occlusion", 8), ("video", 8)):
        write(tmp_path / kind, 6, kind=kind, frames=frames, size=(32, 32))
    own = Index.read(tmp_path / "occlusion")
    told = scenes_of(own)
    drawn = World(6, kind="occlusion", frames=8, size=(32, 32))
    assert [told[item.file_name] for item in own] == [drawn.scene(i) for i in range(6)]
    parts = {kind: Index.read(tmp_path / kind) for kind in ("image", "video")}
    together = Index(tmp_path, [
        replace(item, file_name=f"{kind}/{item.file_name}") for kind, part in parts.items() for item in part
    ])  # fmt: skip
    assert list(scenes_of(together)) == [item.file_name for item in together]
    assert sorted(scenes_of(Index(own.folder, own.items[:2]))) == [item.file_name for item in own.items[:2]]
    (tmp_path / "image" / "scenes.jsonl").write_text(
        json.dumps({"file_name": "media/000000.png", "index": 0})
    )
    with pytest.raises(InputError, match=r"line 1 of .*scenes.jsonl is no scene"):
        scenes_of(Index.read(tmp_path / "image"))
    (tmp_path / "image" / "scenes.jsonl").unlink()
    assert scenes_of(Index.read(tmp_path / "image")) == {}
