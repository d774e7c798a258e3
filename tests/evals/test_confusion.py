"""Confusions against the dense matrix."""

import pytest
import torch

from reverie.errors import InputError
from reverie.evals.confusion import confusion
from reverie.evals.templates import ENSEMBLES, ensemble

NAMES = [f"thing {i}" for i in range(7)]


def test_against_the_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (300,), generator=generator)  # the last thing never occurs, but is given
    other = torch.randint(7, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.5, labels, other)
    matrix = torch.zeros(7, 7)
    matrix.index_put_((labels, predicted), torch.ones(300), accumulate=True)
    found = confusion(predicted.tolist(), labels.tolist(), NAMES)
    for k, name in enumerate(NAMES[:6]):
        each = found["per_class"][name]
        assert each["recall"] == pytest.approx((matrix[k, k] / matrix[k].sum()).item())
        assert each["precision"] == pytest.approx((matrix[k, k] / matrix[:, k].sum()).item())
    assert found["per_class"]["thing 6"] == {
        "samples": 0, "given": int(matrix[:, 6].sum()), "recall": None, "precision": 0.0
    }  # fmt: skip
    assert found["recall"] == pytest.approx((matrix.diag()[:6] / matrix.sum(1)[:6]).mean().item())
    assert found["precision"] == pytest.approx((matrix.diag() / matrix.sum(0)).mean().item())
    pairs = {(pair["right"], pair["given"]): pair["count"] for pair in found["pairs"]}
    wanted = {(NAMES[i], NAMES[j]): int(matrix[i, j]) for i, j in matrix.nonzero().tolist() if i != j}
    assert pairs == wanted
    counts = [pair["count"] for pair in found["pairs"]]
    assert counts == sorted(counts, reverse=True)
    for pair in found["pairs"]:
        assert len(pair["samples"]) == pair["count"]
        assert all(
            NAMES[labels[i]] == pair["right"] and NAMES[predicted[i]] == pair["given"]
            for i in pair["samples"]
        )


def test_the_surer_mistake_is_the_worse():
    found = confusion([1, 2, 0], [0, 1, 2], NAMES, confidence=[0.3, 0.9, 0.5])
    assert [pair["samples"] for pair in found["pairs"]] == [[1], [2], [0]]
    assert confusion([0, 1], [0, 1], NAMES)["pairs"] == []


def test_mistakes_are_one_sentence():
    for predicted, labels in (([0], [0, 1]), ([], []), ([7], [0]), ([0], [-1])):
        with pytest.raises(InputError):
            confusion(predicted, labels, NAMES)
    with pytest.raises(InputError, match="openai, simple"):
        ensemble("openia")


def test_the_ensembles_are_sentences_with_one_place_for_the_name():
    for name, count in (("openai", 80), ("simple", 7)):
        sentences = ensemble(name)
        assert len(set(sentences)) == len(sentences) == count
        assert all(text.count("{}") == 1 and text.endswith(".") for text in sentences)
    assert set(ENSEMBLES["simple"]) < set(ENSEMBLES["openai"])
