"""Calibration: when a model says 80 %, is it right 80 times in 100?

Paper: Guo et al. 2017 (1706.04599). The confidence of a prediction is the probability of the class that comes first.
Bins hold predictions of like confidence; the expected calibration error (ECE) is the mean over predictions of
|accuracy - confidence| of their bin. Bins are of equal width (the paper's) or of equal mass (as many predictions in
each, so that no bin stands on a handful). One temperature T, softmax(logits / T), is what the paper found to mend most.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie import rng
from reverie.errors import InputError

HOTTEST = 1e4  # temperatures are sought between its inverse and it


def calibration(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, Any]:
    """How far `probabilities` (`n k`, rows that sum to one) can be believed, given the right classes `labels` (`n`).

    Returns JSON-ready `accuracy`, `confidence` (its mean), `ece` and `ece_mass` (bins of equal width and of equal
    mass), `nll` (mean negative log-likelihood, nats), `brier` (mean squared distance to the one-hot truth, 0 to 2), and
    the reliability diagram `width` and `mass`: for each bin that is not empty low, high, count, confidence, accuracy.
    """
    labels = _checked(probabilities, labels)
    total = probabilities.sum(1, dtype=torch.double)
    if not ((total - 1).abs() < 1e-3).all() or probabilities.min() < 0:
        raise InputError(
            "the probabilities of a picture must be at least 0 and sum to 1: take a softmax of logits."
        )
    if bins < 1:
        raise InputError(f"bins is {bins}: take at least one.")
    confidence, predicted = probabilities.max(1)
    confidence, right = confidence.double(), (predicted == labels).double()
    truth = probabilities.gather(1, labels[:, None])[:, 0].double()
    squares = probabilities.square().sum(1, dtype=torch.double)
    place = (confidence * bins).ceil().long().clamp(
        1, bins
    ) - 1  # bin m is ((m - 1) / bins, m / bins], as in the paper
    width = [(place == m).nonzero()[:, 0] for m in range(bins)]
    mass = list(confidence.argsort(stable=True).tensor_split(min(bins, len(labels))))
    edges = [(m / bins, (m + 1) / bins) for m in range(bins)]
    limits = [(confidence[rows].min().item(), confidence[rows].max().item()) for rows in mass]
    diagram = {
        "width": _bins(width, edges, confidence, right),
        "mass": _bins(mass, limits, confidence, right),
    }
    return {
        "accuracy": right.mean().item(),
        "confidence": confidence.mean().item(),
        "ece": _error(diagram["width"]),
        "ece_mass": _error(diagram["mass"]),
        "nll": -truth.clamp(min=torch.finfo(torch.float32).tiny).log().mean().item(),
        "brier": (squares - 2 * truth + 1).mean().item(),
        **diagram,
    }


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that makes softmax(`logits` / T), `n k`, most likely for `labels` (`n`): the exact minimum of the nll.

    The nll is convex in 1 / T, so its slope is bisected. Where a prediction without a mistake has no minimum, T is the
    coldest that is tried, 1e-4; where guessing is best, the hottest, 1e4. Log-probabilities are logits as well.
    """
    labels = _checked(logits, labels)
    logits = logits.double()
    wanted = logits.gather(1, labels[:, None])[:, 0].mean()
    low, high = -math.log(HOTTEST), math.log(HOTTEST)  # of log(1 / T)
    while high - low > 1e-6:
        middle = (low + high) / 2
        expected = ((logits * math.exp(middle)).softmax(1) * logits).sum(1).mean()
        low, high = (low, middle) if expected > wanted else (middle, high)
    return math.exp(-(low + high) / 2)


def calibrated(logits: Tensor, labels: Tensor, *, bins: int = 15, seed: int = 0) -> dict[str, Any]:
    """Before and after the best temperature: `before`, `after` (of `calibration`) and `temperature`, found on all.

    No prediction is measured at a temperature that was found on it: two halves, drawn by `seed`, each take the
    temperature of the other (`halves`), and `after` is over both.
    """
    labels = _checked(logits, labels)
    if len(labels) < 2:
        raise InputError("one picture alone has no other half to find a temperature on: give two or more.")
    order = torch.randperm(len(labels), generator=rng.generator(seed, "calibration"))
    one, other = order.tensor_split(2)
    halves = [best_temperature(logits[rows], labels[rows]) for rows in (other, one)]
    after = torch.empty_like(logits, dtype=torch.float32)
    for rows, temperature in zip((one, other), halves, strict=True):
        after[rows] = (logits[rows].double() / temperature).softmax(1).float()
    return {
        "before": calibration(F.softmax(logits.double(), dim=1).float(), labels, bins=bins),
        "after": calibration(after, labels, bins=bins),
        "temperature": best_temperature(logits, labels),
        "halves": halves,
    }


def _checked(scores: Tensor, labels: Tensor) -> Tensor:
    labels = torch.as_tensor(labels, dtype=torch.long, device=scores.device)
    if scores.ndim != 2 or not len(scores) or labels.shape != scores.shape[:1]:
        raise InputError(
            f"scores of shape {list(scores.shape)}, labels of shape {list(labels.shape)}: give `n k` and `n`."
        )
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise InputError(f"a label is none of the {scores.shape[1]} classes: labels are indices of columns.")
    if not scores.isfinite().all():
        raise InputError("some scores are not finite: the model is broken.")
    return labels


def _bins(
    members: list[Tensor], edges: list[tuple[float, float]], confidence: Tensor, right: Tensor
) -> list[dict[str, Any]]:
    return [
        {"low": low, "high": high, "count": len(rows), "confidence": confidence[rows].mean().item(),
         "accuracy": right[rows].mean().item()}
        for rows, (low, high) in zip(members, edges, strict=True) if len(rows)
    ]  # fmt: skip


def _error(bins: list[dict[str, Any]]) -> float:
    total = sum(each["count"] for each in bins)
    return sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / total
