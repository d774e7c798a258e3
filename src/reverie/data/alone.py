"""One run at a time on a folder: a lock that says who has it, and that dies with its process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, TypeVar

from reverie import disk
from reverie.errors import InputError

LOCK = ".metadata.lock"  # beside the index that it guards
P = ParamSpec("P")
T = TypeVar("T")
_held: dict[Path, int] = {}  # by this process: a command may call another


@contextlib.contextmanager
def alone(folder: str | Path, doing: str) -> Iterator[None]:
    """Nobody else changes the index of `folder` meanwhile. InputError: somebody does, and the words say who.

    doing: what this process does, such as "reverie caption". A folder that is not there or cannot be written is not
    locked: what writes there says so.
    """
    place = Path(folder).resolve()
    if _held.get(place):
        _held[place] += 1
        try:
            yield
        finally:
            _held[place] -= 1
        return
    try:
        while (handle := disk.hold(place / LOCK)) is not None and not _is(handle, place / LOCK):
            handle.close()  # of a file that its last holder has just removed
    except OSError:
        yield
        return
    if handle is None:
        raise InputError(f"{folder} is being changed by {_who(place / LOCK)}: wait for it, or stop it.")
    with handle:
        handle.truncate(0)
        me = {"doing": doing, "process": os.getpid(), "host": platform.node(), "since": time.time()}
        handle.write(json.dumps(me).encode())
        handle.flush()
        _held[place] = 1
        try:
            yield
        finally:
            del _held[place]
            with contextlib.suppress(OSError):  # Windows removes no open file
                (place / LOCK).unlink()


def _is(handle: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def exclusively(
    doing: str,
) -> Callable[[Callable[Concatenate[str | Path, P], T]], Callable[Concatenate[str | Path, P], T]]:
    """For a function of a folder: it runs `alone` there."""

    def wrap(do: Callable[Concatenate[str | Path, P], T]) -> Callable[Concatenate[str | Path, P], T]:
        @functools.wraps(do)
        def doing_it(folder: str | Path, *args: P.args, **kwargs: P.kwargs) -> T:
            with alone(folder, doing):
                return do(folder, *args, **kwargs)

        return doing_it

    return wrap


def _who(lock: Path) -> str:
    try:
        it = json.loads(lock.read_bytes())
        since = time.strftime("%H:%M", time.localtime(it["since"]))
        return f"`{it['doing']}` (process {it['process']} on {it['host']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
