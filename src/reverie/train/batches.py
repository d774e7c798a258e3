"""The batches of a run: a pure function of (step, micro), called ahead by a thread, kept for the players of a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reverie.errors import InputError

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Info:
    """What the loop must know of a batch after it is gone: how many items, which, and which could not be read."""

    items: int
    ids: list[Any]
    bad: list[tuple[str, str]]


class Batches:
    """Calls the pure function of (step, micro), keeps what the step fetched, and may work ahead.

    ahead: how many a thread prepares. keep: whether a step's batches are needed again, by another player.
    """

    def __init__(
        self,
        function: Callable[[int, int], Batch],
        *,
        steps: int,
        accumulate: int,
        ahead: int,
        keep: bool,
        device: torch.device,
    ) -> None:
        self.function, self.steps, self.accumulate, self.ahead = function, steps, accumulate, ahead
        self.keep, self.device = keep, device
        self.info: dict[tuple[int, int], Info] = {}
        self._cache: dict[tuple[int, int], Batch] = {}
        self._queue: deque[tuple[tuple[int, int], Future[Batch]]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch on the model's device, without what `info` keeps of it."""
        key = (step, micro)
        if key not in self._cache:
            if any(old[0] != step for old in self.info):
                self.info.clear()
                self._cache.clear()
            if not self.keep:  # with one player, no micro-batch is needed twice
                self._cache.clear()
            batch = dict(self._get(key))
            bad = list(batch.pop("bad", ()))
            ids = batch.get("ids", ())
            ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
            sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim]
            self.info[key] = Info(items=len(ids) or (sizes[0] if sizes else 1), ids=ids, bad=bad)
            self._cache[key] = moved(batch, self.device)
        return dict(self._cache[key])

    def ids(self, step: int) -> list[Any]:
        """The items of all batches of a step, as far as they were fetched."""
        return [i for (at, _), info in sorted(self.info.items()) if at == step for i in info.ids]

    def _get(self, key: tuple[int, int]) -> Batch:
        if self.ahead < 1:
            return self.function(*key)
        if self._pool is None:  # the first one here, to see whether it is pure
            before = torch.get_rng_state()
            batch = self.function(*key)
            if not torch.equal(before, torch.get_rng_state()):
                raise InputError(
                    "batches() draws from torch's global generator; draw from rng.generator, or prefetch=0."
                )
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
            self._fill(key)
            return batch
        while self._queue and self._queue[0][0] != key:
            self._queue.popleft()[1].cancel()
        future = self._queue.popleft()[1] if self._queue else self._pool.submit(self.function, *key)
        self._fill(key)
        return future.result()

    def _fill(self, key: tuple[int, int]) -> None:
        assert self._pool is not None
        at = self._queue[-1][0] if self._queue else key
        while len(self._queue) < self.ahead:
            at = (at[0], at[1] + 1) if at[1] + 1 < self.accumulate else (at[0] + 1, 0)
            if at[0] >= self.steps:
                return
            self._queue.append((at, self._pool.submit(self.function, *at)))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def moved(value: Any, device: torch.device) -> Any:
    """The tensors of a batch on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: moved(inner, device) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, device) for inner in value]
    return value
