"""Files that exist whole or not at all, whatever kills the process; locks that die with it; what bytes hash to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

FAR = 2**30  # where Windows locks a byte: what is written there bars nobody from reading the rest


@contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives a draft beside `path` to write. It takes that name when the block ends, and is removed when it fails.

    durable: flushed to the disk before and after, so that a power cut leaves the old file or the new one.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
        publish(draft, path, durable=durable)
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """A small file, whole or not at all; text is UTF-8."""
    with whole(path, durable=durable) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """A value as JSON that people can read, whole or not at all; a name that is no text (half a surrogate) survives."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write(path, text.encode("utf-8", "backslashreplace"), durable=durable)  # as JSON escapes it


def publish(draft: Path, path: Path, *, durable: bool = True) -> None:
    """Gives a finished draft on the same disk its name, and the rights of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(draft, 0o666 & ~mask)
    if durable:
        flush(draft)
    os.replace(draft, path)
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Has a file or folder on the disk, not only in the system's memory."""
    if os.name == "nt" and path.is_dir():  # Windows flushes no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hold(path: Path) -> IO[bytes] | None:
    """The open file `path`, which no other process can hold until it is closed or this one dies; None: another does.

    Where the system has no locks it is always given.
    """
    handle = path.open("ab+")
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(FAR)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except PermissionError:  # how Windows says that another has it
        handle.close()
        return None
    except OSError:  # a file system without locks
        pass
    return handle
