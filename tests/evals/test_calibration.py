"""Calibration against loops over predictions, and on predictions whose calibration is known."""

import math

import pytest
import torch

from reverie import rng
from reverie.errors import InputError
from reverie.evals.calibration import best_temperature, calibrated, calibration


def some(n=400, k=5, seed=0, scale=2.0):
    """Logits, and labels drawn from their softmax: what they say is true."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, k, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_against_loops():
    logits, labels = some(n=137)
    p = (logits * 1.7).softmax(1)
    found = calibration(p, labels, bins=10)
    rows = [(max(row), row.index(max(row)) == y) for row, y in zip(p.tolist(), labels.tolist(), strict=True)]
    error = 0.0
    for m in range(10):
        inside = [(c, right) for c, right in rows if m / 10 < c <= (m + 1) / 10]
        error += abs(sum(right for _, right in inside) - sum(c for c, _ in inside)) / len(rows)
    assert found["ece"] == pytest.approx(error, abs=1e-6)
    rows.sort(key=lambda row: row[0])
    error, begin = 0.0, 0
    for m in range(10):  # 137 are seven bins of 14 and three of 13
        inside = rows[begin : (begin := begin + 13 + (m < 7))]
        error += abs(sum(right for _, right in inside) - sum(c for c, _ in inside)) / len(rows)
        assert found["mass"][m]["count"] == len(inside)
    assert begin == len(rows)
    assert found["ece_mass"] == pytest.approx(error, abs=1e-6)
    assert found["nll"] == pytest.approx(torch.nn.functional.nll_loss(p.log(), labels).item(), rel=1e-5)
    truth = torch.nn.functional.one_hot(labels, 5)
    assert found["brier"] == pytest.approx((p - truth).square().sum(1).mean().item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sum(right for _, right in rows) / len(rows))
    assert sum(each["count"] for each in found["width"]) == len(rows)


def test_the_ends_are_exact():
    sure = torch.eye(4)
    right = calibration(sure, torch.arange(4))
    assert (right["ece"], right["ece_mass"], right["nll"], right["brier"]) == (0, 0, 0, 0)
    wrong = calibration(sure, (torch.arange(4) + 1) % 4)
    assert (wrong["ece"], wrong["ece_mass"], wrong["brier"]) == (1, 1, 2)
    assert math.isfinite(wrong["nll"])
    guess = calibration(torch.full((4, 4), 0.25), torch.arange(4))
    assert guess["ece"] == pytest.approx(0)  # says 25 %, is right once in four
    assert guess["nll"] == pytest.approx(math.log(4))


def test_true_words_are_calibrated_and_boasting_is_not():
    logits, labels = some(n=4000)
    assert calibration(logits.softmax(1), labels)["ece"] < 0.03
    assert calibration((3 * logits).softmax(1), labels)["ece"] > 0.1
    mended = calibrated(3 * logits, labels)
    assert mended["after"]["ece"] < 0.03 < mended["before"]["ece"]
    assert mended["temperature"] == pytest.approx(3, rel=0.05)
    assert mended["after"]["accuracy"] == mended["before"]["accuracy"]


def test_the_temperature_is_the_best_of_a_fine_grid():
    logits, labels = some(n=60)
    grid = torch.linspace(0.3, 3, 5401, dtype=torch.double)
    loss = [torch.nn.functional.cross_entropy(logits.double() / t, labels).item() for t in grid]
    assert best_temperature(logits, labels) == pytest.approx(grid[loss.index(min(loss))].item(), abs=1e-3)
    assert best_temperature(5 * logits, labels) == pytest.approx(
        5 * best_temperature(logits, labels), rel=1e-4
    )
    assert best_temperature(logits.log_softmax(1), labels) == pytest.approx(
        best_temperature(logits, labels), rel=1e-4
    )


def test_where_there_is_no_best_temperature_it_is_the_last_that_is_tried():
    assert best_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(1e-4, rel=1e-3)
    assert best_temperature(torch.eye(3), (torch.arange(3) + 1) % 3) == pytest.approx(1e4, rel=1e-3)


def test_no_prediction_is_measured_at_its_own_temperature():
    """Each half is measured at the temperature of the other."""
    logits, labels = some(n=200)
    found = calibrated(logits, labels)
    order = torch.randperm(200, generator=rng.generator(0, "calibration"))
    one, other = order.tensor_split(2)
    halves = [best_temperature(logits[rows], labels[rows]) for rows in (other, one)]
    assert found["halves"] == halves
    parts = [torch.nn.functional.cross_entropy(logits[rows].double() / t, labels[rows])
             for rows, t in zip((one, other), halves, strict=True)]  # fmt: skip
    assert found["after"]["nll"] == pytest.approx(sum(parts).item() / 2, rel=1e-5)


def test_mistakes_are_one_sentence():
    logits, labels = some(n=10)
    for call in (
        lambda: calibration(logits, labels),  # no probabilities
        lambda: calibration(logits.softmax(1), labels + 5),
        lambda: calibration(logits.softmax(1), labels[:3]),
        lambda: calibration(logits.softmax(1), labels, bins=0),
        lambda: best_temperature(logits * torch.inf, labels),
        lambda: calibrated(logits[:1], labels[:1]),
    ):
        with pytest.raises(InputError):
            call()
