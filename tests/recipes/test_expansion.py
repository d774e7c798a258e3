"""Prompts become captions of the kind that models learnt from, the same for the same seed, and nothing said is lost."""

from __future__ import annotations

import json

import pytest

from reverie import cli
from reverie.data.index import Index
from reverie.data.stickers import sample_folder
from reverie.errors import InputError
from reverie.evals.world_captions import read_caption
from reverie.recipes.expansion import expand


def texts(*prompts: str, **options) -> list[str]:
    return [one.text for one in expand(prompts, **options)]


def test_a_sticker_gets_its_own_tags_behind_it():
    item = next(i for i in Index.read(sample_folder()) if i.label == "rocket")
    tags = {tag for c in item.captions if c.source == "tags" for tag in c.text.split(", ")}
    for prompt in ("rocket", "火箭", "a rocket at night"):
        (one,) = expand([prompt])
        first, *rest = one.text.replace("，", ", ").split(", ")
        assert first == prompt
        assert rest
        assert set(rest) <= tags
        assert one.how.startswith("tags of the sticker")
    assert texts("rocket", "cat face") == texts("rocket", "cat face")
    assert len({texts("dog face", seed=seed)[0] for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("a cat face", "cat face"),
        ("a cat on a train", "cat face"),  # and no tram
        ("a sleepy dog", "dog face"),
        ("a slice of pizza", "pizza"),
        ("a birthday cake", "birthday cake"),
        ("a new car", "automobile"),  # and no NEW button
        ("new", "NEW button"),
        ("\u4e00\u5339\u9ed1\u8272\u7684\u9a6c", "\u9a6c"),
    ],
)
def test_what_a_prompt_is_about_counts(prompt, label):
    assert expand([prompt])[0].how == f"tags of the sticker {label!r} were put behind it"


@pytest.mark.parametrize(
    "prompt", ["a cool idea", "\u9a6c\u4e0a\u4e0b\u96e8"]
)  # at once, which begins with a horse
def test_what_is_only_spelt_alike_does_not_count(prompt):
    assert expand([prompt])[0].how.startswith("no label")


def test_only_whole_words_count():
    (one,) = expand(["a category"])  # there is a cat in it, but not as a word
    assert one.how.startswith("no label")
    assert "a category" in one.text != "a category"


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle", "two stars", "a circle moves", "a small blue heart spins clockwise", "a star left of a ring",
        "蓝色圆形", "两个红色星星", "a striped square on a navy background",
    ],
)  # fmt: skip
def test_the_world_is_filled_in_and_nothing_said_is_changed(prompt):
    said = read_caption(prompt)
    for seed in range(5):
        found = read_caption(texts(prompt, kind="world", seed=seed)[0])
        assert found.background == (said.background or found.background) is not None
        assert found.relation == said.relation
        assert len(found.mentions) == len(said.mentions)
        for asked, told in zip(said.mentions, found.mentions, strict=True):
            assert told.count == asked.count
            for name in ("shape", "colour", "size"):
                assert getattr(told, name) == (getattr(asked, name) or getattr(told, name)) is not None
            assert told.colour != found.background or asked.colour == told.colour
            assert (told.motion is None) == (asked.motion is None)
            if asked.motion is not None:
                assert told.motion.kind == asked.motion.kind
                assert told.motion.direction == (asked.motion.direction or told.motion.direction) is not None
                assert told.motion.speed is not None


def test_what_stands_out_from_no_ground_is_not_put_on_it():
    for seed in range(20):
        assert read_caption(texts("a white star", kind="world", seed=seed)[0]).background != "white"


def test_mistakes_and_the_command(capsys):
    with pytest.raises(InputError, match="no captions like 'photos'"):
        expand(["x"], kind="photos")
    with pytest.raises(InputError, match="prompt 2 of 2 is empty"):
        expand(["x", " "])
    with pytest.raises(InputError, match="names no shape"):
        expand(["a nice thing"], kind="world")
    assert cli.main(["expand", "rocket", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["prompt"] == "rocket"
    assert told["text"] == texts("rocket")[0]
    assert cli.main(["expand", "rocket", "火箭"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == texts("rocket", "火箭")
    assert cli.main(["expand", "rocket " * 50]) == 0
    assert len(capsys.readouterr().err) < 150
    assert "tags of the sticker" in err
