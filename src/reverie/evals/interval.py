"""How sure a measured mean is: percentile bootstrap (Efron 1979)."""

from __future__ import annotations

import torch
from torch import Tensor

from reverie import rng


def bootstrap(
    values: Tensor, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The interval that holds the mean of `values` (`b`, at least one) at `level`: resampled `draws` times."""
    assert values.ndim == 1, values.shape
    assert len(values), "the mean of nothing has no interval"
    values = values.double().cpu()
    generator = rng.generator(seed, "bootstrap")
    size = max(1, 4_000_000 // len(values))  # draws at a time: at most some 32 MB of indices
    means = torch.cat(
        [
            values[
                torch.randint(len(values), (min(size, draws - done), len(values)), generator=generator)
            ].mean(1)
            for done in range(0, draws, size)
        ]
    )
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high
