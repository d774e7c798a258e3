"""Memory that a step frees stays with the process, since the next step takes it again.

glibc maps every large block anew and gives it back when it is freed, so each step of a training on a CPU faults in the
pages of all its activations and gradients, zeroed, one by one: 5 to 20 % of its time (docs/engine.md). While training
runs they are kept. What a process holds at the most does not grow by it; afterwards all is given back.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reverie.media import tune_allocator

TRIM, BLOCKS = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
USUAL_BLOCKS = 2**16


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Whether memory is kept: on a CPU under glibc, unless the environment says how malloc is to work."""
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or told:
        yield False
        return
    tune_allocator()  # now, or the first decoding would undo what follows
    libc = ctypes.CDLL(None)
    libc.mallopt(TRIM, -1)  # never
    libc.mallopt(BLOCKS, 0)  # none is mapped by itself
    try:
        yield True
    finally:
        libc.mallopt(BLOCKS, USUAL_BLOCKS)
        tune_allocator.__wrapped__()
        libc.malloc_trim(0)
