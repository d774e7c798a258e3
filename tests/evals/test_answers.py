"""Answers to questions: VQA's own numbers, and what must hold of one right answer."""

import json
from pathlib import Path

import pytest

from reverie.errors import InputError
from reverie.evals.answers import exact, vqa, vqa_accuracy, vqa_form, world_form

# What the public scorer of VQA v2 gives for these answers and forms.
STORED = json.loads((Path(__file__).parent / "vqa_scores.json").read_text(encoding="utf-8"))


def test_numbers_are_those_of_vqas_scorer():
    for item in STORED["scored"]:
        assert vqa_accuracy(item["answer"], item["references"]) == pytest.approx(item["accuracy"], abs=1e-12)
    for text, form in STORED["forms"]:
        assert vqa_form(text) == form
    assert len({item["accuracy"] for item in STORED["scored"]}) > 4  # not all right, nor all wrong
    assert sum(text.lower() != form for text, form in STORED["forms"]) > 40


def test_an_answer_of_three_of_ten_counts_nine_tenths_and_of_four_whole():
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy("Red!", ["red"] * 4 + ["blue"] * 6) == 1
    found = vqa(["red", "two"], [["red"] * 10, ["3"] * 10], ["other", "number"])
    assert {kind: value["accuracy"] for kind, value in found.items()} == {"all": 0.5, "other": 1, "number": 0}


def test_one_right_answer_may_be_said_in_other_words():
    for one, other in (("A grey disc", "gray circle"), ("three", "3个"), ("两", "2"), ("No.", "没有"),
                       ("to the upper left", "up and to the left"), ("红色的圆", "红色圆形"), ("up", "往上"),
                       ("dark blue", "navy")):  # fmt: skip
        assert world_form(one) == world_form(other)
    for one, other in (("red", "blue"), ("left", "right"), ("red circle", "red"), ("yes", "no"), ("1", "2")):
        assert world_form(one) != world_form(other)


def test_who_says_the_commonest_answer_of_each_kind_scores_the_prior():
    kinds = ["colour"] * 5 + ["there"] * 4
    truths = ["red", "red", "blue", "green", "Red", "yes", "no", "no", "no"]
    blind = exact(["red"] * 5 + ["no"] * 4, truths, kinds)
    for part, value in (("colour", 3 / 5), ("there", 3 / 4), ("all", 6 / 9)):
        assert blind[part]["right"] == blind[part]["prior"] == pytest.approx(value)
        low, high = blind[part]["interval"]
        assert low <= value <= high
    seeing = exact(truths, truths, kinds)
    assert [seeing[part]["right"] for part in seeing] == [1, 1, 1]


def test_what_does_not_fit_together_is_one_sentence():
    with pytest.raises(InputError, match="1 answers, 2 truths"):
        exact(["red"], ["red", "blue"])
    with pytest.raises(InputError, match="list of people's answers"):
        vqa_accuracy("red", [])
