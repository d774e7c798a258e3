"""Linear probe and few-shot: what a logistic regression reads out of frozen features.

Paper: Radford et al. 2021, CLIP (2103.00020), appendix A.3 (the probe and the search for its strength) and figure 6
(few-shot beside zero-shot). With n examples x of classes y the probe is the one minimum of

    strength * sum_i cross_entropy(W x_i + b, y_i) + |W|^2 / 2

so a small strength regularises more (the C of scikit-learn; the paper's lambda is its inverse), and b goes free.
Features are `n d`, from any system. A fitted probe is itself a function that predicts: `probe(features) -> n k`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie import rng
from reverie.errors import InputError

PLAIN = 1.0  # the strength where there is nothing to choose it by
FIRST = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # powers of ten that the search begins with
FINEST = 1 / 8  # of a decade: where it ends


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A fitted probe: `probe(features n d)` gives logits `n k`."""

    weight: Tensor  # k d
    bias: Tensor  # k
    strength: float
    steps: int  # of L-BFGS
    slope: float  # the largest entry that is left in the gradient of the mean loss

    def __call__(self, features: Tensor) -> Tensor:
        return features.to(self.weight) @ self.weight.T + self.bias


def fit(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    strength: float,
    start: Probe | None = None,
    steps: int = 1000,
    slope: float = 1e-9,
) -> Probe:
    """The probe of `features` (`n d`) for `labels` (`n`, below `classes`), by L-BFGS in double precision.

    start: another strength's probe to begin from, which changes the time and not the result. steps: at most so many.
    slope: where the largest entry of the mean loss's gradient is below it, the minimum is found.
    """
    labels = _checked(features, labels, classes)
    if not 0 < strength < float("inf"):
        raise InputError(f"strength is {strength}: give a positive number.")
    x = features.detach().double()
    middle = x.mean(0)  # around it the free bias is apart from the weight, and far fewer steps are needed
    x = x - middle
    weight = x.new_zeros(classes, x.shape[1]) if start is None else start.weight.clone()
    bias = x.new_zeros(classes) if start is None else start.bias + start.weight @ middle
    weight.requires_grad_()
    bias.requires_grad_()
    decay = 0.5 / (strength * len(x))
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=20, tolerance_grad=slope, tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
        loss()
    assert weight.grad is not None
    assert bias.grad is not None
    left = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    taken = solver.state[weight]["n_iter"]
    weight, bias = weight.detach(), bias.detach()
    bias = bias - weight @ middle
    bias = bias - bias.mean()  # a constant in all of them changes nothing
    return Probe(weight=weight, bias=bias, strength=strength, steps=taken, slope=left)


def search(
    features: Tensor, labels: Tensor, *, classes: int, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, list[dict[str, float]]]:  # fmt: skip
    """The strength between 1e-6 and 1e6 that is best on a validation part, and what was tried, weakest first.

    One in five of each class's examples, drawn by `seed`, at least one where a class has two, is the part that the
    probes do not see. Seven strengths two decades apart, then the interval around the best is halved down to an eighth
    of a decade, as in the paper. Of those that are right equally often the one of the smallest nll is best. Without a
    class of two examples there is nothing to choose by: 1 and an empty list.
    """
    labels = _checked(features, labels, classes)
    held: list[int] = []
    for k, members in enumerate(_by_class(labels, classes)):
        if len(members) > 1:
            order = torch.randperm(len(members), generator=rng.generator(seed, "probe", "validation", k))
            held += members[order[: max(len(members) // 5, 1)]].tolist()
    if not held:
        return PLAIN, []
    seen = torch.ones(len(labels), dtype=torch.bool)
    seen[held] = False
    tried: dict[float, tuple[float, float]] = {}  # power of ten -> share that is right, nll
    fitted: dict[float, Probe] = {}
    total = len(FIRST) + 8

    def score(power: float) -> None:
        near = min(fitted, key=lambda other: abs(other - power), default=power)
        fitted[power] = fit(
            features[seen],
            labels[seen],
            classes=classes,
            strength=10**power,
            start=fitted.get(near),
            slope=1e-6,
        )
        logits = fitted[power](features[held])
        right = (logits.argmax(1) == labels[held]).double().mean().item()
        tried[power] = right, F.cross_entropy(logits, labels[held]).item()
        if progress:
            progress(len(tried), total)

    def best() -> float:
        return max(tried, key=lambda power: (tried[power][0], -tried[power][1], -power))

    for power in FIRST:
        score(power)
    step = (FIRST[1] - FIRST[0]) / 2
    while step >= FINEST:
        middle = best()
        for power in (middle - step, middle + step):
            if FIRST[0] <= power <= FIRST[-1]:
                score(power)
        step /= 2
    return 10 ** best(), [
        {"strength": 10**power, "right": tried[power][0], "nll": tried[power][1]} for power in sorted(tried)
    ]


def few_shot(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, *, classes: int,
    shots: Sequence[int] = (1, 2, 4, 8, 16), draws: int = 3, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The share of `test_features` that probes of k examples a class name right, for each k in `shots`.

    Each of `draws` takes other examples, keyed by `seed`, the class, the draw: the examples of a smaller k are among
    those of a larger. A class that has fewer than k gives all, and the last k is the first that takes everything. The
    strength is searched among the first draw's examples. JSON-ready: `shots`, `examples`, `short` (classes that have
    fewer), `strength`, `right` (one for each draw), `mean`, `spread` (the draws' standard deviation, None of one).
    """
    labels = _checked(features, labels, classes)
    test_labels = _checked(test_features, test_labels, classes)
    if not shots or min(shots) < 1:
        raise InputError(
            f"shots are {' '.join(map(str, shots)) or 'none'}: give numbers of examples from 1 on."
        )
    if draws < 1:
        raise InputError(f"draws is {draws}: draw at least once.")
    members = _by_class(labels, classes)
    if any(not len(rows) for rows in members):
        raise InputError("a class has no example: leave it out.")
    most = max(len(rows) for rows in members)
    orders = [
        [
            rows[torch.randperm(len(rows), generator=rng.generator(seed, "few-shot", draw, k))]
            for k, rows in enumerate(members)
        ]
        for draw in range(draws)
    ]
    out: list[dict[str, Any]] = []
    for shot in sorted(set(shots)):
        right = []
        strength = PLAIN
        for draw, order in enumerate(orders):
            rows = torch.cat([some[:shot] for some in order])
            if draw == 0:
                strength, _ = search(features[rows], labels[rows], classes=classes, seed=seed)
            probe = fit(features[rows], labels[rows], classes=classes, strength=strength)
            right.append((probe(test_features).argmax(1) == test_labels).double().mean().item())
            if progress:
                progress(len(out) * draws + draw + 1, len(set(shots)) * draws)
        values = torch.tensor(right)
        out.append(
            {
                "shots": shot,
                "examples": len(rows),
                "short": sum(len(some) < shot for some in members),
                "strength": strength,
                "right": right,
                "mean": values.mean().item(),
                "spread": values.std().item() if draws > 1 else None,
            }
        )
        if shot >= most:
            break
    return out


def _by_class(labels: Tensor, classes: int) -> list[Tensor]:
    """The rows of each class, in their order."""
    order = labels.argsort(stable=True)
    return list(order.split(torch.bincount(labels, minlength=classes).tolist()))


def _checked(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    labels = torch.as_tensor(labels, dtype=torch.long, device=features.device)
    if features.ndim != 2 or not len(features) or labels.shape != features.shape[:1]:
        raise InputError(
            f"features of shape {list(features.shape)}, labels of shape {list(labels.shape)}: give `n d` and `n`."
        )
    if classes < 2:
        raise InputError(f"there is {classes} class: a probe tells two or more apart.")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"a label is none of the {classes} classes: labels are 0 to {classes - 1}.")
    if not features.isfinite().all():
        raise InputError("some features are not finite: the model is broken.")
    return labels
