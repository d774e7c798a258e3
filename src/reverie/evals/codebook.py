"""How much of a codebook is used: a code that is never chosen costs memory and tells nothing.

usage        the share of the codes that occur at all
perplexity   exp of the entropy of how often each occurs: so many codes, equally frequent, would tell as much
"""

from __future__ import annotations

import torch
from torch import Tensor


def used(codes: Tensor, vocab: int) -> dict[str, float]:
    """`usage` and `perplexity` of codes of any shape, of `vocab` that there are."""
    counts = torch.bincount(codes.flatten(), minlength=vocab).double()
    shares = counts / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {"usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}
