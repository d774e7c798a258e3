"""One source of randomness: every draw is keyed, so order, workers, ranks and resumes cannot change it.

A key is (run seed, purpose, epoch or step, sample id). Two different keys give independent streams; the same key
gives the same stream on every machine and in every process.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def integer(seed: int, *key: str | int) -> int:
    """A 63-bit integer that depends on `seed` and `key` alone."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A fresh CPU generator seeded by `integer(seed, *key)`."""
    import torch

    return torch.Generator().manual_seed(integer(seed, *key))
