"""Which part of a sample is left out this time, by key: patches of a picture, words of a text.

FLIP, "Scaling Language-Image Pre-training via Masking" (Li et al. 2022, 2212.00794): a random half or three quarters
of the patches are not computed at all, and each vector is learnt from what is left. So a step costs half as much or
less. The same may be done to words (section 4.1), which gained the paper nothing in accuracy. NaViT (2307.06304,
section 2.2) draws the share anew for each picture; MDT (2303.14389) for each step, beside a pass that sees all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reverie import rng
from reverie.errors import InputError

Keys = Sequence[tuple[int, int]]  # (epoch, sample id) of each item


def kept_count(tokens: int, drop: float) -> int:
    """How many of a sample's tokens stay when the share `drop` goes: one at least."""
    return max(round(tokens * (1 - drop)), 1)


def kept_tokens(tokens: int, count: int, *, seed: int, epoch: int, sample: int) -> Tensor:
    """int64 `count`, ascending: which of a sample's tokens stay."""
    generator = rng.generator(seed, "patches", epoch, sample)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def kept_patches(patches: int, drop: float, *, seed: int, keys: Keys) -> Tensor:
    """int64 `b k`, ascending: the patches of each sample that stay when the share `drop` goes, at least one."""
    count = kept_count(patches, check_share("drop", drop))
    return torch.stack([kept_tokens(patches, count, seed=seed, epoch=e, sample=i) for e, i in keys])


def drawn_share(shares: tuple[float, float], *, seed: int, epoch: int, sample: int) -> float:
    """The share of a sample's tokens that is dropped this time, drawn evenly from `shares`."""
    low, high = shares
    if not 0 <= low <= high < 1:
        raise InputError(
            f"drop is {low} to {high}: give shares from 0 to less than 1, the smaller one first."
        )
    return low + (high - low) * (rng.integer(seed, "drop", epoch, sample) / 2**63)


def masked_share(shares: tuple[float, float] | None, *, seed: int, step: int) -> float | None:
    """The share of patches that a step's masked pass leaves out, the same in every item; None: there is none."""
    if shares is None:
        return None
    least, most = shares
    u = torch.rand((), generator=rng.generator(seed, "masked", step)).item()
    return least + (most - least) * u


def masked_pass(
    like: Sequence[int], patches: int, share: float, *, seed: int, key: tuple[str | int, ...]
) -> dict[str, Tensor]:
    """Of an item's masked pass (MDT, 2303.14389): `keep k`, which of its `patches` stay when the share goes, and noise.

    `masked_noise` is `like` the latents. `key` ends in (epoch, sample id), by which the patches are drawn; the noise by
    all of it.
    """
    epoch, sample = key[-2:]
    assert isinstance(epoch, int)
    assert isinstance(sample, int)
    return {
        "keep": kept_patches(patches, share, seed=seed, keys=[(epoch, sample)])[0],
        "masked_noise": torch.randn(tuple(like), generator=rng.generator(seed, "masked noise", *key)),
    }


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
