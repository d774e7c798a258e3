"""Questions from a file and of the world; a Blip learns to answer them; the mistakes."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

import reverie
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.errors import InputError
from reverie.recipes import blip
from reverie.recipes.blip_answers import answers, asked_of, begin
from reverie.recipes.parts import open_world

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("asked")
    lines = []
    for i in range(9):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (16, 16), COLOURS[name]).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"a {name} wall")
        lines.append(
            {"file_name": f"{i}.png", "question": "what colour is it?", "answers": [name] * 9 + ["dark"]}
        )
    import_folder(place, val=0, quiet=True)
    lines.append({"file_name": "missing.png", "question": "what is it?", "answer": "a cat"})
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return place


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    index = blip.captioned(Index.read(folder))
    torch.manual_seed(0)
    model = blip.begin("", index, partial(blip.shape, size=16, width=64, depth=2), seed=0)
    words = Index.read(folder)  # the vocabulary of a folder need not hold the words of its questions
    assert len(words) == 9
    return reverie.save(model, tmp_path_factory.mktemp("start") / "blip")


def test_questions_of_a_file(folder):
    asked = asked_of(Index.read(folder))
    assert len(asked) == 9  # not that of a picture which the folder has not
    assert asked[1].answers == (("green", 0.9), ("dark", 0.1))


def test_the_halves_begin_as_the_blip(start):
    given, model = reverie.load(start), begin(str(start))
    for name, value in model.answers.state_dict().items():
        assert torch.equal(value, given.text.state_dict()[name]), name
    for name, value in model.text.state_dict().items():
        assert torch.equal(value, given.text.state_dict()[name]), name
    assert model.answers is not model.text


def test_it_learns_to_answer(folder, start, tmp_path):
    model = answers(folder, tmp_path / "run", start=str(start), steps=40, batch=9, lr=3e-3)
    pictures = torch.stack(
        [torch.tensor(c)[:, None, None].expand(3, 16, 16) / 127.5 - 1 for c in COLOURS.values()]
    )
    said = model.answer(pictures, ["what colour is it?"] * 3, answers=[*COLOURS, "dark"])
    assert said == list(COLOURS)
    again = answers(
        folder, tmp_path / "again", start=str(tmp_path / "run" / "model"), steps=1, batch=9, lr=0.0
    )
    assert again.config == model.config  # one that answers goes on


def test_the_world_is_asked_about_what_stands_still_in_pictures(tmp_path):
    index = open_world(tmp_path / "world", 6, 2, seed=0, size=32, frames=8)
    asked = asked_of(index)
    assert {index[one.item].frames for one in asked} == {1}
    assert len({one.item for one in asked}) == 6
    assert not [one for one in asked if "which way" in one.text or "doing" in one.text]


def test_mistakes_are_told(folder, start, tmp_path):
    with pytest.raises(InputError, match="clip-stickers is a Clip that does not both read and write"):
        begin("clip-stickers")
    with pytest.raises(InputError, match="batch"):
        answers(folder, tmp_path / "run", start=str(start), steps=1, batch=0)
    for i in range(2):
        Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a wall")
    import_folder(tmp_path, val=0, quiet=True)
    with pytest.raises(InputError, match="nor scenes of the world"):
        asked_of(Index.read(tmp_path))
    for line in (
        '{"file_name": "0.png"}',
        "[1]",
        '{"file_name": "0.png", "question": "what?", "answers": []}',
    ):
        (tmp_path / "questions.jsonl").write_text(line)
        with pytest.raises(InputError, match=r"line 1 of .* is no question: write"):
            asked_of(Index.read(tmp_path))
    (tmp_path / "questions.jsonl").write_text("")
    with pytest.raises(InputError, match="there is no question about the pictures"):
        asked_of(Index.read(tmp_path))
