"""Image-text matching: does this text belong to this picture? (ALBEF, 2107.07651, section 3.2; BLIP, 2201.12086.)

The wrong pairs are the hard ones: for each picture a text, for each text a picture, drawn in proportion to how alike
contrast finds them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reverie.objectives.contrastive import ALONE, Peers, wide
from reverie.objectives.language import IGNORED

LEAST = 1e-4  # weight of the least alike


@torch.no_grad()
def hard_negatives(logits: Tensor, right: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `logits b m` a column that is not `right b m`, and whether it has any: int64 `b`, bool `b`.

    Its probability goes as softmax + 1e-4 over the row (the authors' code); `draw b`, uniform in [0, 1), chooses, so a
    draw means the same wherever the row is computed.
    """
    weights = (wide(logits).softmax(1) + LEAST).masked_fill(right, 0).double()
    edges = weights.cumsum(1)
    chosen = torch.searchsorted(edges, (draw.double() * edges[:, -1])[:, None], right=True)[:, 0]
    last = (weights > 0).long().cumsum(1).argmax(1)  # rounding must not lead beyond it
    return torch.minimum(chosen, last), edges[:, -1] > 0


def matching_loss(logits: Tensor, right: Tensor, real: Tensor, *, peers: Peers = ALONE) -> Tensor:
    """Cross-entropy of `logits b 2` (no, yes), mean over the pairs that are `real b`; `right b`: which belong together.

    The mean is over the pairs of all processes, divided as `Peers` says.
    """
    targets = torch.where(real, right.long(), IGNORED)
    total = F.cross_entropy(wide(logits), targets, ignore_index=IGNORED, reduction="sum")
    count = peers.gather(real.sum().to(total.dtype)[None]).sum() / peers.count
    return total / count.clamp(min=1 / peers.count)
