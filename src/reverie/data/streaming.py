"""Every item of an index decoded when it is asked for: `Pixels` for data whose pixels no disk holds.

It has the interface of `Pixels`, at the cost of decoding again in every epoch. Where every file that the index accepts
can be decoded, the samples are those of `Pixels` bit for bit; otherwise the batches differ, for `Pixels` draws
from the files that can be and this from all. `ready` decodes a batch on several threads, while the model is still at
the one before, if the loop prepares batches ahead (`train(..., prefetch=2)`).

What the index has accepted is `good`; nothing is decoded to find out. An item that then cannot be decoded is replaced
by the next one that can, so a replacement depends on the data alone, and a run that is resumed has the same; `ready`
names what was replaced, for the batch's "bad". For a tar or an address that cannot be read nothing is replaced: that is
raised (`Unreached`), and is tried again when the item is next asked for.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from reverie.data.index import Index
from reverie.data.pixels import Bad, Pixels, Size, cache_of, decode_item, sizes_of
from reverie.errors import InputError
from reverie.media import LIMITS, Limits, tune_allocator

if TYPE_CHECKING:
    from torch import Tensor

TRIES = 100  # neighbours that are tried in place of an item that cannot be decoded


class Streamed:
    """The decoded media of an index: `streamed[i]` is uint8 `f 4 h w`, f <= frames, for each i in `streamed.good`."""

    def __init__(
        self,
        index: Index,
        *,
        size: Size,
        frames: int = 1,
        fit: str = "pad",
        workers: int | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        """size, frames, fit: as of `Pixels`. workers: threads that decode; one for each processor if not given."""
        self.index, self.size, self.sizes = index, size, sizes_of(index, size)
        self.frames, self.fit, self.limits = frames, fit, limits
        self.bad = [Bad(item.file_name, item.reject) for item in index if item.reject is not None]
        self.good = [i for i, item in enumerate(index) if item.reject is None]
        tune_allocator()
        self._pool = ThreadPoolExecutor(
            workers or index.readers or min(8, os.cpu_count() or 1), thread_name_prefix="decoding"
        )
        self._held: OrderedDict[int, Future[np.ndarray | str]] = OrderedDict()
        self._room = 0  # samples of the largest batch
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Tensor:
        """The frames of item i: a fresh uint8 tensor `f 4 h w`. InputError for an item whose file is bad."""
        import torch

        if not 0 <= i < len(self.index):
            raise IndexError(i)
        frames = self._ask(i).result()
        if isinstance(frames, str):
            raise InputError(
                f"{self.index[i].file_name} has no pixels ({frames}): draw samples from `ready`."
            )
        return torch.from_numpy(frames.copy())

    def shape(self, i: int) -> tuple[int, int, int]:
        """Frames, height and width of item i, as the index says; of another, if it cannot be decoded (`ready`)."""
        return (min(self.index[i].frames, self.frames), *self.sizes[i])

    def ready(
        self, keys: Sequence[tuple[int, int]], good: Sequence[int]
    ) -> tuple[list[tuple[int, int]], list[Bad]]:
        """Decodes the samples (epoch, item) of a batch; those that cannot be are replaced, and named with the reason.

        good: the items that samples are drawn from, ascending. InputError: neither an item nor the next 100 of `good`
        can be decoded.
        """
        with self._lock:
            self._room = max(self._room, 3 * len(keys))  # of three batches: others may ask meanwhile
        for _, i in keys:
            self._ask(i)
        found, bad = [], []
        for epoch, i in keys:
            frames = self._ask(i).result()
            if isinstance(frames, str):
                bad.append(Bad(self.index[i].file_name, frames))
                i = self._next(i, frames, good)
            found.append((epoch, i))
        return found, bad

    def _next(self, i: int, reason: str, good: Sequence[int]) -> int:
        place = bisect_right(good, i)
        for step in range(min(TRIES, len(good))):
            other = good[(place + step) % len(good)]
            if not isinstance(self._ask(other).result(), str):
                return other
        raise InputError(
            f"{self.index[i].file_name} cannot be decoded ({reason}), nor can any of the next {TRIES} items: run"
            f" `reverie data check {self.index.folder} --contents`."
        )

    def _ask(self, i: int) -> Future[np.ndarray | str]:
        with self._lock:
            future = self._held.get(i)
            if future is None or (future.done() and future.exception() is not None):
                future = self._held[i] = self._pool.submit(self._decode, i)
            self._held.move_to_end(i)
            while len(self._held) > max(self._room, 1):
                self._held.popitem(last=False)
        return future

    def _decode(self, i: int) -> np.ndarray | str:
        return decode_item(
            self.index,
            self.index[i],
            size=self.sizes[i],
            frames=self.frames,
            fit=self.fit,
            limits=self.limits,
        )


def open_pixels(
    index: Index,
    *,
    size: Size,
    frames: int = 1,
    fit: str = "pad",
    stream: bool = False,
    cache: str | Path | None = None,
) -> Pixels | Streamed:
    """The pixels of an index: decoded once and kept in its folder (or `cache`), or with `stream` whenever asked for."""
    if stream:
        return Streamed(index, size=size, frames=frames, fit=fit)
    return Pixels(index, size=size, frames=frames, fit=fit, cache=cache or cache_of(index))
