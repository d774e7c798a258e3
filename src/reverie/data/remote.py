"""A dataset at an address: s3://bucket/photos, https://host/photos, whatever fsspec opens (extra `remote`).

Its index is fetched when the dataset is opened, into a folder of the user's cache (`$XDG_CACHE_HOME/reverie/remote`, or
`~/.cache/reverie/remote`), which from then on is the dataset's folder: what is computed of it (pixels, embeddings) is
kept there. Of its media only the byte ranges are fetched that are asked for, each checked against the index. Nothing is
ever written to an address, and none is opened that the user did not name: an index can only name paths below its own.

An address is text with `://`. Where it came through a `Path`, which makes one slash of two, it is understood too.
`file://` is the folder that it names, and needs no fsspec.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from reverie import disk
from reverie.errors import InputError

TABLE = "metadata.parquet"
READERS = 16  # threads, which mostly wait
PAUSES = (0.2, 1.0, 5.0)  # seconds before another try
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,3}(.*)", re.DOTALL)  # two letters: C:/ is a disk
_opened: dict[Path, Remote] = {}


class Remote:
    """What lies below an address. Reading is safe from several threads."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def __str__(self) -> str:
        return self.address

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system and the path in it. InputError: fsspec, or what it needs for this protocol, is missing."""
        try:
            import fsspec
        except ImportError:
            raise InputError(
                f"Reading {self} needs fsspec: pip install 'reverie[remote]', or copy it to this disk."
            ) from None
        protocol = self.address.partition("://")[0]
        try:
            files, root = fsspec.core.url_to_fs(self.address)
        except ImportError as error:
            more = (
                "pip install 'reverie[remote]'" if protocol in ("http", "https") else str(error).rstrip(".")
            )
            raise InputError(f"fsspec lacks what it needs to open {self}: {more}.") from None
        except ValueError:
            raise InputError(
                f"fsspec knows no protocol {protocol!r}, with which {self} begins: use one such as s3://, gs:// or"
                " https://, or a folder."
            ) from None
        except Exception as error:  # each protocol has kinds of its own
            raise InputError(f"{self} cannot be opened ({_told(error)}): check the address.") from None
        return files, root.rstrip("/")

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes `start` to `start + length` of a file; all of it if no length is given.

        OSError: it cannot be read. InputError: the server knows no ranges.
        """
        files, root = self._place
        end = None if length is None else start + length
        data = bytes(self._try(lambda: files.cat_file(f"{root}/{name}", start=start or None, end=end)))
        if length is not None and start and len(data) > length:
            raise InputError(
                f"{self} gives the whole of {name} where a part is asked for: serve it with byte ranges, or copy it."
            )
        return data

    def size(self, name: str) -> int:
        """Bytes of a file. OSError: it is not there, or the server does not say."""
        files, root = self._place
        size = self._try(lambda: files.info(f"{root}/{name}")).get("size")
        if size is None:
            raise OSError("its size is not told")
        return int(size)

    @staticmethod
    def _try(work: Callable[[], Any]) -> Any:
        """Networks fail for a moment: what may do better is tried again. OSError: it does not."""
        for pause in (*PAUSES, None):
            try:
                return work()
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                raise
            except Exception as error:  # each protocol has kinds of its own
                if pause is None:
                    raise OSError(_told(error)) from None
                time.sleep(pause)
        raise AssertionError


def address(place: str | Path) -> str | None:
    """The address that a text or path is, but for `file://`; None: it is a path of this machine."""
    found = _ADDRESS.fullmatch(str(place))
    if found is None or found[1].lower() == "file" or (isinstance(place, Path) and place.exists()):
        return None
    if isinstance(place, str) and "://" not in place:
        return None
    return f"{found[1].lower()}://{found[2]}"


def local(place: str | Path) -> Path:
    """The folder of a dataset: the path itself, or, of an address, that in the user's cache, its index fetched.

    InputError: there is no index, or the address cannot be read.
    """
    where = address(place)
    if where is None:
        found = _ADDRESS.fullmatch(str(place))
        return Path(f"/{found[2]}") if found and found[1].lower() == "file" else Path(place)
    origin = Remote(where)
    folder = _cache() / hashlib.blake2b(str(origin).encode(), digest_size=10).hexdigest()
    try:
        table = origin.read(TABLE)
    except FileNotFoundError:
        raise InputError(
            f"No index at {origin}: it needs a {TABLE} there; pack or import the data where they lie, and copy it."
        ) from None
    except OSError as error:
        raise InputError(
            f"{origin} cannot be read ({_told(error)}): check the address, the rights and the network."
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / TABLE).is_file() or (folder / TABLE).read_bytes() != table:
            disk.write(folder / TABLE, table)
    except OSError as error:
        raise InputError(
            f"Cannot write {folder} ({error.strerror or error}): name another cache with XDG_CACHE_HOME."
        ) from None
    _opened[folder] = origin
    return folder


def opened(folder: Path) -> Remote | None:
    """The address of which a folder in the cache holds the index, if this process has opened it."""
    return _opened.get(folder)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reverie" / "remote"


def _told(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
