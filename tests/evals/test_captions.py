"""Measures of captions: COCO's own numbers, and what must hold of any."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from reverie.errors import InputError
from reverie.evals.captions import bleu, cider_d, clip_score, label_recall, ref_clip_score, rouge_l, tokens

# What pycocoevalcap 1.2's scorers give for these captions of the procedural world, some of them spoilt.
STORED = json.loads((Path(__file__).parent / "coco_scores.json").read_text(encoding="utf-8"))
CAPTIONS = [item["caption"] for item in STORED["items"]]
REFERENCES = [item["references"] for item in STORED["items"]]


def check(score, stored):
    assert score.all == pytest.approx(stored["all"], rel=1e-9, abs=1e-12)
    assert score.each == pytest.approx(stored["each"], rel=1e-9, abs=1e-12)


def test_numbers_are_those_of_cocos_scorers():
    for n, stored in enumerate(STORED["bleu"], 1):
        check(bleu(CAPTIONS, REFERENCES)[n], stored)
    check(rouge_l(CAPTIONS, REFERENCES), STORED["rouge_l"])
    check(cider_d(CAPTIONS, REFERENCES), STORED["cider_d"])
    assert 0.1 < STORED["bleu"][3]["all"] < 0.9  # neither all right nor all wrong
    assert len(set(STORED["cider_d"]["each"])) > 15


def test_a_caption_that_is_its_only_reference_is_perfect_and_one_of_other_words_nothing():
    own = ["a red circle on a white background", "two small green stars", "a blue ring inside a square"]
    others = [[text] for text in own]
    assert bleu(own, others)[4].all == pytest.approx(1)
    assert rouge_l(own, others).all == pytest.approx(1)
    assert min(cider_d(own, others).each) == pytest.approx(10)
    wrong = ["x y z w v"] * 3
    assert bleu(wrong, others)[1].all < 1e-9
    assert rouge_l(wrong, others).all == cider_d(wrong, others).all == 0


def test_captions_and_references_are_read_alike():
    assert tokens("A man's T-shirt, 2 dogs — red!") == ["a", "man's", "t-shirt", "2", "dogs", "red"]
    assert tokens("红色的圆 ok") == ["红", "色", "的", "圆", "ok"]
    plain, loud = (rouge_l([text], [["a red dog"]]).all for text in ("a red dog", "A RED dog."))
    assert plain == loud == pytest.approx(1)


def test_clip_score_and_its_mean_with_references():
    torch.manual_seed(0)
    images, captions = torch.randn(5, 8), torch.randn(5, 8)
    references = [torch.randn(count, 8) for count in (1, 2, 3, 1, 4)]
    plain, both = clip_score(images, captions), ref_clip_score(images, captions, references)
    for i in range(5):
        own = 2.5 * max(float(F.cosine_similarity(images[i], captions[i], dim=0)), 0)
        near = max(0.0, *(float(F.cosine_similarity(captions[i], other, dim=0)) for other in references[i]))
        assert float(plain[i]) == pytest.approx(own, abs=1e-6)
        assert float(both[i]) == pytest.approx(2 * own * near / (own + near) if own + near else 0, abs=1e-6)
    assert (plain > 0).any()
    assert (plain == 0).any()


@pytest.mark.parametrize(
    ("captions", "references", "words"),
    [
        (["a"], [], "1 captions and 0"),
        ([], [], "0 captions"),
        (["a"], [[]], "item 0"),
        (["a"], ["b"], "item 0"),
    ],
)
def test_what_does_not_fit_is_told(captions, references, words):
    with pytest.raises(InputError, match=words):
        rouge_l(captions, references)


def test_a_caption_names_a_thing_by_the_words_of_one_of_its_names_in_a_row():
    found = label_recall(
        ["A photo of the Red Apple.", "an apple, red", "a pineapple", "一个红苹果", "apple"],
        [["red apple"], ["red apple"], ["apple"], ["苹果", "apple"], ["...", "fruit"]],
    )
    assert found.each == (1, 0, 0, 1, 0)
    assert found.all == pytest.approx(2 / 5)
