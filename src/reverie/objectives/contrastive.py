"""Contrastive losses between two sets of unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_SCALE = 100.0  # CLIP, section 2.5: logits are never scaled by more


def bounded(log_scale: Tensor) -> Tensor:
    """What cosines are multiplied by, from the logarithm that is learnt."""
    return log_scale.exp().clamp(max=LARGEST_SCALE)


def info_nce(a: Tensor, b: Tensor, scale: Tensor, *, same: Tensor | None = None) -> Tensor:
    """CLIP's loss (2103.00020, figure 3): symmetric cross-entropy over scaled cosines of `a b d` and `b b d`.

    `same` (`b b`, bool, diagonal True) marks pairs that are right as well, such as two drawings of one thing: their
    targets share the weight equally (UniCL, 2204.03610, section 3.2). Without it only the diagonal is right.
    """
    logits = scale * a @ b.T
    if same is None:
        target = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    target = same.to(logits.dtype)
    forward = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    backward = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (forward + backward) / 2


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, same: Tensor | None = None) -> Tensor:
    """SigLIP's loss (2303.15343, algorithm 1): for every pair of `a b d` and `b b d` whether it belongs together.

    `same` as for `info_nce`. The sum over all pairs is divided by the number of items.
    """
    logits = scale * a @ b.T + bias
    right = torch.eye(len(a), dtype=torch.bool, device=a.device) if same is None else same
    return F.binary_cross_entropy_with_logits(logits, right.to(logits.dtype), reduction="sum") / len(a)
