"""How far a long job is, on standard error: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
EVERY = 5.0  # seconds between plain lines


class Display:
    """One job. `first`: how much of it was done before; `stays`: its last word is said, and its bar left standing."""

    def __init__(self, label: str, *, first: int = 0, stays: bool = False) -> None:
        self.label, self.first, self.stays = label, first, stays
        self._begun = self._told = time.monotonic()
        self._bar: Any = None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    def show(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total`, with a word on how it goes and the time that is left."""
        fresh = done - self.first
        left = duration(self.seconds / fresh * (total - done)) if fresh > 0 else "?"
        text = " · ".join(filter(None, (note, f"{left} left")))
        if sys.stderr.isatty():
            if self._bar is None:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

                words = TextColumn("{task.fields[label]}", markup=False)
                columns = (words, BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
                self._bar = Progress(*columns, console=Console(stderr=True), transient=not self.stays)
                self._task = self._bar.add_task("", label=self.label)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif (self.stays and done == total) or time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            self.say(f"{self.label} {done}/{total} · {text}")

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (done, total), which is silent where all is done within a moment."""
    display = Display(label)
    try:
        yield display.show
    finally:
        display.close()


def track(things: Iterable[T], *, total: int, label: str, quiet: bool = False) -> Iterator[T]:
    """Yields `things` and counts them, unless `quiet`."""
    if quiet:
        yield from things
        return
    with counting(label) as show:
        for done, thing in enumerate(things, 1):
            yield thing
            show(done, total)


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
