"""Work on media files by several threads: decoding leaves Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from reverie.media import tune_allocator

T = TypeVar("T")
U = TypeVar("U")


def in_order(function: Callable[[T], U], items: Sequence[T], workers: int | None = None) -> Iterator[U]:
    """`function` of each item on `workers` threads, in the order of the items, a few ahead of the consumer.

    One thread for each processor, up to eight, if not given.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    tune_allocator()
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
