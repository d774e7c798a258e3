"""Progress on standard error: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY = 5.0  # seconds between plain lines


def track(things: Iterable[T], *, total: int, label: str, quiet: bool = False) -> Iterator[T]:
    """Yields `things` and shows how far it is; nothing when `quiet` or when all is done within a moment."""
    if quiet:
        yield from things
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(things, description=label, total=total, console=Console(stderr=True), transient=True)
    else:
        begun = last = time.monotonic()
        for done, thing in enumerate(things, 1):
            yield thing
            now = time.monotonic()
            if now - last >= EVERY:
                last = now
                left = (now - begun) / done * (total - done)
                print(f"{label}: {done:,} of {total:,}, about {left:.0f} s left", file=sys.stderr, flush=True)
