"""The order of samples: a pure function of (seed, epoch), so no loader state exists.

Epochs follow one another without a gap: the last partial batch of an epoch is filled from the next one. The global
batch of a step is the same for every number of ranks; a rank takes its contiguous slice of it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from reverie.errors import InputError
from reverie.rng import generator


@lru_cache(maxsize=4)  # a step needs one or two epochs
def _order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def order(seed: int, epoch: int, n: int) -> Tensor:
    """The permutation of `n` samples in `epoch`: int64 `n`."""
    return _order(seed, epoch, n).clone()


def batch_ids(
    step: int, batch: int, n: int, seed: int, *, rank: int = 0, world: int = 1
) -> list[tuple[int, int]]:
    """(epoch, sample) of each place of this rank's share of the global batch `step` (counted from 0).

    `batch` is the global batch size; InputError when `world` ranks cannot share it evenly, or when there is no sample.
    """
    if n < 1:
        raise InputError("There is no sample to train on: import a folder with accepted media first.")
    if batch < 1:
        raise InputError(f"A batch of {batch} holds nothing: give 1 or more.")
    if batch % world:
        raise InputError(
            f"A batch of {batch} cannot be shared by {world} ranks: make it a multiple of {world}."
        )
    assert step >= 0
    assert 0 <= rank < world
    share = batch // world
    start = step * batch + rank * share
    places = [divmod(place, n) for place in range(start, start + share)]
    return [(epoch, int(_order(seed, epoch, n)[place])) for epoch, place in places]
