"""GradCache: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (Gao et al. 2021, 2101.06983).

A contrastive loss needs the vectors of the whole batch, but not what made them. So they are computed chunk by chunk
and nothing else is kept; the loss and its gradient by the vectors follow; then each chunk is computed once more, with
what its gradient needs, from the same random numbers. The result is the direct one, for one more forward pass.

Convention: `embed` treats every item by itself. Batch norm in training does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reverie.errors import InputError

Vectors = tuple[Tensor, ...]


def cached(embed: Callable[[Mapping[str, Any]], Vectors], batch: Mapping[str, Any], *, chunk: int) -> Vectors:
    """`embed(batch)`, tensors `b ...`, holding what backward needs for `chunk` items at a time; 0: for all at once.

    Every value of `batch`, a tensor or a list, has one entry for each item. torch's global generators and autocast are
    for a chunk the second time as they were the first. InputError: a chunk below 0.
    """
    if chunk < 0:
        raise InputError(f"chunk is {chunk}; give the number of items embedded at a time, or 0 for all.")
    sizes = {len(value) for value in batch.values()}
    assert len(sizes) == 1, f"entries of a batch for {sorted(sizes)} items"
    (size,) = sizes
    if not 0 < chunk < size:
        return embed(batch)
    parts = [
        checkpoint(
            embed,
            {key: value[start : start + chunk] for key, value in batch.items()},
            use_reentrant=False,
        )
        for start in range(0, size, chunk)
    ]
    return tuple(torch.cat(vectors) for vectors in zip(*parts, strict=True))
