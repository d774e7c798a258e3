"""The loss of guessing what is hidden: of every hidden code the cross-entropy (MaskGIT, 2202.04200, equation 1)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from reverie.objectives.contrastive import ALONE, Peers, wide
from reverie.objectives.language import IGNORED


def masked_loss(
    logits: Tensor, codes: Tensor, hidden: Tensor, *, smoothing: float = 0.1, peers: Peers = ALONE
) -> Tensor:
    """-mean log p(code) over the places of `codes b n` where `hidden b n` is True; `logits b n v`.

    `smoothing`: this share of the target goes to all codes alike. The mean is over all processes' places, divided as
    `Peers` says.
    """
    total = F.cross_entropy(
        wide(rearrange(logits, "b n v -> (b n) v")),
        rearrange(torch.where(hidden, codes, IGNORED), "b n -> (b n)"),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
    )
    count = peers.gather(hidden.sum().to(total.dtype)[None]).sum() / peers.count
    return total / count.clamp(min=1 / peers.count)
