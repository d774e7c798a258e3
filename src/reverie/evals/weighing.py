"""Signs of the truth weighed into a probability, on examples of known truth: logistic regression (Platt, 1999)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DRAWN_TO_ZERO = 1e-3  # so that signs that tell right from wrong without an error get finite weights


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much each of `n` signs counts: the probability is sigmoid(bias + weights · signs)."""

    weights: tuple[float, ...]
    bias: float

    def probability(self, signs: Tensor) -> Tensor:
        """Of signs `... n`, probabilities `...` in double precision."""
        return (signs.double() @ torch.tensor(self.weights, dtype=torch.float64) + self.bias).sigmoid()


def weighed(signs: Tensor, right: Tensor) -> Scale:
    """The scale by which signs `b n` tell best which examples are `right b`; those and the wrong count equally.

    ValueError: all are right, or all are wrong.
    """
    signs, right = signs.double(), right.double()
    if not 0 < right.mean() < 1:
        raise ValueError("examples of both kinds are needed")
    middle, spread = signs.mean(0), signs.std(0, correction=0).clamp(min=1e-9)
    weight = torch.where(right > 0, 1 / right.mean(), 1 / (1 - right.mean()))
    found = torch.zeros(signs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([found], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        steps.zero_grad()
        logits = (signs - middle) / spread @ found[:-1] + found[-1]
        error = F.binary_cross_entropy_with_logits(logits, right, weight=weight)
        total = error + DRAWN_TO_ZERO * found[:-1].square().sum()
        total.backward()
        return total

    steps.step(loss)
    weights = found.detach()[:-1] / spread
    return Scale(weights=tuple(weights.tolist()), bias=float(found.detach()[-1] - weights @ middle))


def logits(probabilities: Sequence[float]) -> list[float]:
    """Log odds, of what is nearly certain at most about 14 either way."""
    return torch.logit(torch.tensor(list(probabilities), dtype=torch.float64), eps=1e-6).tolist()
