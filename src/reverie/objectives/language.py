"""The loss of writing: of every token the cross-entropy, given those before it."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from reverie.objectives.contrastive import ALONE, Peers, wide

IGNORED = -100


def language_loss(
    logits: Tensor, tokens: Tensor, mask: Tensor, *, smoothing: float = 0.0, peers: Peers = ALONE
) -> Tensor:
    """-mean log p(token | those before), over the places of `tokens b n` where `mask b n` is True; the first has none.

    `logits b n v` stand at the token before. `smoothing`: this share of the target goes to all words alike (Szegedy et
    al. 2016, 1512.00567, section 7). The mean is over the tokens of all processes, divided as `Peers` says.
    """
    targets = torch.where(mask, tokens, IGNORED)[:, 1:]
    total = F.cross_entropy(
        wide(rearrange(logits[:, :-1], "b n v -> (b n) v")),
        rearrange(targets, "b n -> (b n)"),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
    )
    count = peers.gather(mask[:, 1:].sum().to(total.dtype)[None]).sum() / peers.count
    return total / count.clamp(min=1 / peers.count)
