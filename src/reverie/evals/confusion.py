"""Which names are taken for which: the pairs that occur, and recall and precision of each name.

Of thousands of classes nearly all pairs never occur, so the confusion matrix is kept as the list of its entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from reverie.errors import InputError


def confusion(
    predicted: Sequence[int],
    labels: Sequence[int],
    names: Sequence[str],
    *,
    confidence: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What became of n samples of the classes `labels` that were given the classes `predicted`, indices into `names`.

    confidence: how sure each prediction was; ranks pairs that occur equally often.
    Returns JSON-ready `pairs`, the worst first: {right, given, count, share (of the samples of `right`), samples
    (indices)}; `per_class`: name -> {samples, given (how often the name was), recall, precision}, a share of nothing
    being None, for the names that occur or were given; `recall` and `precision`, means over the names that have them.
    """
    if len(predicted) != len(labels) or not len(labels):
        raise InputError(f"{len(predicted)} predictions for {len(labels)} labels: give one for each.")
    for place in (*predicted, *labels):
        if not 0 <= place < len(names):
            raise InputError(f"class {place} is none of the {len(names)}: classes are indices into names.")
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (right, given) in enumerate(zip(labels, predicted, strict=True)):
        cells[right, given].append(i)
    samples: dict[int, int] = defaultdict(int)
    told: dict[int, int] = defaultdict(int)
    for (right, given), members in cells.items():
        samples[right] += len(members)
        told[given] += len(members)
    per_class = {}
    for k in sorted(samples.keys() | told.keys()):
        hits = len(cells.get((k, k), ()))
        per_class[names[k]] = {
            "samples": samples[k],
            "given": told[k],
            "recall": hits / samples[k] if samples[k] else None,
            "precision": hits / told[k] if told[k] else None,
        }
    pairs: list[dict[str, Any]] = [
        {"right": names[right], "given": names[given], "count": len(members), "share": len(members) / samples[right],
         "samples": members}
        for (right, given), members in cells.items() if right != given
    ]  # fmt: skip
    sure = [0.0] * len(labels) if confidence is None else list(confidence)
    pairs.sort(
        key=lambda pair: (
            -pair["count"],
            -sum(sure[i] for i in pair["samples"]),
            pair["right"],
            pair["given"],
        )
    )
    return {
        "pairs": pairs,
        "per_class": per_class,
        "recall": _mean(per_class, "recall"),
        "precision": _mean(per_class, "precision"),
    }


def _mean(per_class: dict[str, dict[str, Any]], what: str) -> float:
    values = [each[what] for each in per_class.values() if each[what] is not None]
    return sum(values) / len(values)
