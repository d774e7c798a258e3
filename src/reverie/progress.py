"""How far a long job is, on standard error: a bar on a terminal, a plain line every few seconds elsewhere.

With REVERIE_PROGRESS=json every line is one JSON object: {"kind": "progress", "label", "done", "total",
"seconds_left", ...}, {"kind": "line", "text"} or {"kind": "error", "text"}. REVERIE_PROGRESS=plain has plain lines on a
terminal too.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from reverie.errors import InputError

T = TypeVar("T")
EVERY = 5.0  # seconds between plain lines
SETTING, MANNERS = "REVERIE_PROGRESS", ("plain", "json")  # the command line refuses others


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

    def left(self, done: int, total: int) -> float | None:
        """Seconds to go at the pace so far; None: nothing tells."""
        fresh = done - self.first
        return self.seconds / fresh * (total - done) if fresh > 0 else None

    def show(
        self, done: int, total: int, note: str = "", numbers: dict[str, float | None] | None = None
    ) -> None:
        """`done` of `total`, with a word on how it goes (in JSON `numbers`) and the time that is left."""
        left, form = self.left(done, total), manner()
        text = " · ".join(filter(None, (note, f"{'?' if left is None else duration(left)} left")))
        if form == "bar":
            if self._bar is None:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
                from rich.table import Column

                console = Console(stderr=True)
                words = TextColumn("{task.fields[label]}", markup=False)
                counted = MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total)) + 1))
                bar = BarColumn(
                    bar_width=min(40, max(4, console.width - 82))
                )  # a narrow terminal reads the numbers
                columns = (words, bar, counted, TextColumn("{task.description}"))
                self._bar = Progress(*columns, console=console, transient=not self.stays)
                self._task = self._bar.add_task("", label=self.label)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif (self.stays and done == total) or time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            if form == "json":
                _put({"kind": "progress", "label": self.label, "done": done, "total": total, "seconds_left": left}
                     | (numbers or {}))  # fmt: skip
            else:
                say(f"{self.label} {done}/{total} · {text}")

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def say(text: str, *, kind: str = "line") -> None:
    """One line to the person, or as JSON to the program, that watches. `kind`: line or error."""
    if manner() == "json":
        _put({"kind": kind, "text": text})
    else:
        _write(text)


def manner() -> str:
    """ "bar", "plain" or "json"."""
    asked = os.environ.get(SETTING, "")
    return asked if asked in MANNERS else "bar" if sys.stderr.isatty() else "plain"


def _put(told: dict[str, Any]) -> None:
    """A number that is not finite is null."""
    told = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}
    _write(json.dumps(told, ensure_ascii=False))


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


def size(count: float) -> str:
    """ "34 kB", "1.5 MB", "120 MB", "2.4 GB"."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    if count < 1e9:
        return f"{count / 1e6:.{1 if count < 1e7 else 0}f} MB"
    return f"{count / 1e9:.1f} GB"


def bytes_of(text: str) -> int:
    """How many "6GB", "0.5 gb", "800MB", "64MiB", "2k" or "512 B" are. InputError: anything else, or no unit."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kmgt])(i?)b?|b)\s*", text.lower())
    power = "kmgt".index(found[2]) + 1 if found and found[2] else 0
    count = round(float(found[1]) * (1024 if found[3] else 1000) ** power) if found else 0
    if count < 1:
        raise InputError(f"{text!r} is no size: write one such as 500MB or 6GB.")
    return count


def _write(line: str) -> None:
    """To standard error; nobody reads it any more when its pipe is closed, which is no reason to stop."""
    with suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)
