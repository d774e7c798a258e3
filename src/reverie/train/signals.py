"""Signals to a run: stop with a checkpoint, or save and sample now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOP = ("SIGTERM", "SIGINT", "SIGUSR1")
NOW = "SIGUSR2"


@dataclass
class Asked:
    """What has been asked of this process by signal since the loop last looked."""

    stop: signal.Signals | None = None
    now: bool = False


@contextmanager
def listening() -> Iterator[Asked]:
    """Notes SIGUSR2 each time, and the first request to stop, after which those signals mean what they meant before."""
    asked = Asked()
    before: dict[int, Any] = {}

    def restore(numbers: list[int]) -> None:
        for number in numbers:
            signal.signal(number, before.pop(number))

    def on_stop(number: int, _: Any) -> None:
        asked.stop = signal.Signals(number)
        restore([known for known in before if signal.Signals(known).name != NOW])
        os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    def on_now(number: int, _: Any) -> None:
        asked.now = True

    if threading.current_thread() is threading.main_thread():
        for name in (*STOP, NOW):
            if hasattr(signal, name):
                number = getattr(signal, name)
                before[number] = signal.signal(number, on_now if name == NOW else on_stop)
    try:
        yield asked
    finally:
        restore(list(before))
