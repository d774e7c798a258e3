"""Which part of a sample is left out this time, by key: patches of a picture, words of a text.

FLIP, "Scaling Language-Image Pre-training via Masking" (Li et al. 2022, 2212.00794): a random half or three quarters
of the patches are not computed at all, and each vector is learnt from what is left. So a step costs half as much or
less. The same may be done to words (section 4.1), which gained the paper nothing in accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reverie import rng
from reverie.errors import InputError

Keys = Sequence[tuple[int, int]]  # (epoch, sample id) of each item


def kept_patches(patches: int, drop: float, *, seed: int, keys: Keys) -> Tensor:
    """int64 `b k`, ascending: the patches of each sample that stay when the share `drop` goes, at least one."""
    count = max(round(patches * (1 - check_share("drop", drop))), 1)
    rows = [torch.randperm(patches, generator=rng.generator(seed, "patches", *key))[:count] for key in keys]
    return torch.stack(rows).sort(dim=1).values


def drop_tokens(tokens: Tensor, drop: float, *, end: int, pad: int, seed: int, keys: Keys) -> Tensor:
    """tokens `b n` without the share `drop` of those between the first and the end token, at least one of which stays.

    What stays keeps its order and moves together; behind the end token comes `pad`.
    """
    check_share("drop_text", drop)
    short = torch.full_like(tokens, pad)
    for row, out, key in zip(tokens, short, keys, strict=True):
        inner = int((row == end).int().argmax()) - 1
        count = max(round(inner * (1 - drop)), min(inner, 1))
        stay = torch.randperm(inner, generator=rng.generator(seed, "words", *key))[:count].sort().values
        out[: count + 2] = torch.cat([row[:1], row[1 + stay], row.new_tensor([end])])
    return short


def check_share(name: str, share: float) -> float:
    """`share`. InputError: it is none that can be left out."""
    if not 0 <= share < 1:
        raise InputError(f"{name} is {share}: give the share that is left out, from 0 to less than 1.")
    return share
