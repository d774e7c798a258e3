"""Every item of an index decoded once, to uint8 RGBA, in one memory-mapped file.

All items have one size, or with `size=Native(...)` each the one of its own aspect.

The cache file is named after what it depends on: the content hashes in their order, size, frames and fit. It is
written beside its name and renamed when complete, and checked (layout and checksum) each time it is opened; a file
that fails the check is made again. Layout: the frames `4 h w` of all items one after the other, then a JSON record,
then its length and a mark.

A file that cannot be decoded is recorded in `bad` with the reason and has no pixels. Samples are drawn from `good`,
so a replacement depends on the data alone; the share of bad files is limited. A tar or an address that cannot be read
makes no file bad: it ends the decoding, and no cache is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from reverie import disk, progress
from reverie.data.index import Index, Item
from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.media import LIMITS, Limits, MediaError, Unreached, decode_array, whole_patches
from reverie.progress import track

if TYPE_CHECKING:
    from torch import Tensor

_END = struct.Struct("<Q8s")
_MARK = b"reverie1"
_CHUNK = 2**24
CHANGED = "the file has changed since the import: import the folder again"


class Bad(NamedTuple):
    """A file without pixels: its file_name and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Native:
    """Sizes at each item's own aspect: sides are multiples of `patch`, a frame has at most `area` pixels.

    Nothing is enlarged beyond that rounding (`media.whole_patches`).
    """

    patch: int
    area: int


Size = int | tuple[int, int] | Native


class Pixels:
    """The decoded media of an index: `pixels[i]` is uint8 `f 4 h w`, f <= frames, for each i in `pixels.good`."""

    def __init__(
        self,
        index: Index,
        *,
        size: Size,
        frames: int = 1,
        fit: str = "pad",
        cache: str | Path | None = None,
        max_bad: float = 0.2,
        workers: int | None = None,
        limits: Limits = LIMITS,
        quiet: bool = False,
    ) -> None:
        """Decodes what the cache does not hold yet.

        size: side of the square, (height, width), or `Native`. frames: at most so many of a clip, evenly spaced.
        fit: "pad" or "crop", as in `media.decode`. cache: a folder for the cache file; None decodes into an unnamed
        temporary file. max_bad: InputError when a larger share of the files cannot be decoded. workers: threads.
        Unreached (an InputError): a tar or an address that holds files cannot be read now.
        """
        self.index, self.size, self.sizes = index, size, sizes_of(index, size)
        self.frames, self.fit, self.limits = frames, fit, limits
        self._max_bad = max_bad
        record = (
            self._open(Path(cache), workers, quiet) if cache is not None else self._temporary(workers, quiet)
        )
        self.counts: list[int] = record["counts"]
        reasons = {int(i): reason for i, reason in record["bad"]}
        self._reasons = reasons
        self.bad = [Bad(index[i].file_name, reason) for i, reason in reasons.items()]
        self.good = [i for i in range(len(index)) if i not in reasons]
        self._starts = np.cumsum([0, *self._lengths(self.counts)]).tolist()
        self._refuse_too_many(self.bad)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Tensor:
        """The frames of item i: a fresh uint8 tensor `f 4 h w`. InputError for an item whose file is bad."""
        import torch

        if not 0 <= i < len(self.index):
            raise IndexError(i)
        if i in self._reasons:
            raise InputError(
                f"{self.index[i].file_name} has no pixels ({self._reasons[i]}): draw samples from `pixels.good`."
            )
        part = np.array(self._data[self._starts[i] : self._starts[i + 1]])
        return torch.from_numpy(part.reshape(-1, 4, *self.sizes[i]))

    def shape(self, i: int) -> tuple[int, int, int]:
        """Frames, height and width of item i, without reading it; no frames if its file is bad."""
        return (self.counts[i], *self.sizes[i])

    def ready(
        self, keys: Sequence[tuple[int, int]], good: Sequence[int]
    ) -> tuple[list[tuple[int, int]], list[Bad]]:
        """The samples (epoch, item) of a batch as they are, none replaced: `Streamed` has something to do here."""
        return list(keys), []

    def _refuse_too_many(self, bad: list[Bad]) -> None:
        if len(bad) <= self._max_bad * len(self.index) and len(bad) < len(self.index):
            return
        reasons = Counter(entry.reason for entry in bad).most_common(3)
        listed = "; ".join(
            f"{reason} ({count}, such as {self._example(bad, reason)})" for reason, count in reasons
        )
        raise InputError(
            f"{len(bad)} or more of {len(self.index)} files in {self.index.folder} cannot be decoded, more than the "
            f"{self._max_bad:.0%} allowed: {listed}. Mend or remove them and import the folder again."
        )

    @staticmethod
    def _example(bad: list[Bad], reason: str) -> str:
        return next(entry.path for entry in bad if entry.reason == reason)

    def _lengths(self, counts: Sequence[int]) -> list[int]:
        """Bytes of each item of so many frames."""
        return [4 * n * height * width for n, (height, width) in zip(counts, self.sizes, strict=True)]

    def _name(self) -> str:
        """What the items are decoded to."""
        if isinstance(self.size, Native):
            return f"native-{self.size.patch}-{self.size.area}"
        height, width = self.sizes[0]
        return f"{height}x{width}"

    def _key(self) -> str:
        sizes = [self._name()] if isinstance(self.size, Native) else [*self.sizes[0]]
        parts = [*sizes, self.frames, self.fit, *(item.hash for item in self.index)]
        return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=10).hexdigest()

    # --- the cache file

    def _open(self, folder: Path, workers: int | None, quiet: bool) -> dict[str, Any]:
        path = folder / f"pixels-{self._name()}-{self.frames}-{self.fit}-{self._key()}.bin"
        if path.is_file():
            with path.open("rb") as file:
                record = self._valid(file)
                if record is not None:
                    self._map(file, record)
                    return record
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._refuse_full(folder)
            with disk.whole(path) as draft, draft.open("w+b") as file:
                record = self._decode_all(file, workers, quiet)
                file.flush()
                self._map(file, record)
        except OSError as error:
            raise InputError(
                f"Cannot write the pixel cache into {folder} ({error.strerror or error}): give another folder."
            ) from None
        return record

    def _temporary(self, workers: int | None, quiet: bool) -> dict[str, Any]:
        self._refuse_full(Path(tempfile.gettempdir()))
        with tempfile.TemporaryFile() as file:
            record = self._decode_all(file, workers, quiet)
            file.flush()
            self._map(file, record)  # the mapping outlives the name and the handle
        return record

    def _map(self, file: BinaryIO, record: dict[str, Any]) -> None:
        whole = sum(self._lengths(record["counts"]))
        self._data = np.memmap(file, np.uint8, "r", shape=(whole,)) if whole else np.zeros(0, np.uint8)

    def _valid(self, file: BinaryIO) -> dict[str, Any] | None:
        """The record of a complete cache file that belongs to this index; None for anything else."""
        size = file.seek(0, 2)
        if size < _END.size:
            return None
        file.seek(size - _END.size)
        length, mark = _END.unpack(file.read(_END.size))
        if mark != _MARK or length > size - _END.size:
            return None
        file.seek(size - _END.size - length)
        text = file.read(length)
        try:
            record = json.loads(text)
            counts, data, key = record["counts"], record["bytes"], record["key"]
            bad = {int(i): str(reason) for i, reason in record["bad"]}
            sound = (
                key == self._key()
                and len(counts) == len(self.index)
                and all(isinstance(n, int) and (n == 0) == (i in bad) for i, n in enumerate(counts))
                and all(0 <= n <= self.frames for n in counts)
                and data == sum(self._lengths(counts)) == size - _END.size - length
            )
        except (ValueError, KeyError, TypeError):
            return None
        return record if sound and _checksum(file, data) == record.get("crc32") else None

    def _decode_all(self, file: BinaryIO, workers: int | None, quiet: bool) -> dict[str, Any]:
        counts, bad, crc = [], [], 0
        steps = in_order(self._frames_of, range(len(self.index)), workers or self.index.readers)
        for i, frames in enumerate(track(steps, total=len(self.index), label="decoding", quiet=quiet)):
            if isinstance(frames, str):
                counts.append(0)
                bad.append((i, frames))
                if len(bad) > self._max_bad * len(self.index):
                    self._refuse_too_many([Bad(self.index[j].file_name, reason) for j, reason in bad])
                continue
            counts.append(len(frames))
            crc = zlib.crc32(frames.data, crc)
            file.write(frames.data)
        record = {"key": self._key(), "counts": counts, "bad": bad, "bytes": file.tell(), "crc32": crc}
        text = json.dumps(record).encode()
        file.write(text + _END.pack(len(text), _MARK))
        return record

    def _frames_of(self, i: int) -> np.ndarray | str:
        return decode_item(
            self.index,
            self.index[i],
            size=self.sizes[i],
            frames=self.frames,
            fit=self.fit,
            limits=self.limits,
        )

    def _refuse_full(self, folder: Path) -> None:
        """InputError: the disk cannot hold the pixels."""
        counts = [min(item.frames, self.frames) if item.reject is None else 0 for item in self.index]
        needed, free = sum(self._lengths(counts)), shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"The pixels of {self.index.folder} need {progress.size(needed)}, and {folder} has"
                f" {progress.size(free)} free: use a larger disk, or decode them whenever they are asked for (--stream,"
                " where the recipe has it)."
            )


def sizes_of(index: Index, size: Size) -> list[tuple[int, int]]:
    """(height, width) of what each item of an index is decoded to. InputError: it has no item."""
    if len(index) == 0:
        raise InputError(
            f"There is nothing to decode in {index.folder}: no item was accepted or selected. `reverie data"
            f" check {index.folder}` says why, and after a change `reverie data import {index.folder}` reads it again."
        )
    if isinstance(size, Native):
        return [
            whole_patches(max(item.height, 1), max(item.width, 1), patch=size.patch, area=size.area)
            for item in index
        ]
    return [(size, size) if isinstance(size, int) else size] * len(index)


def decode_item(
    index: Index, item: Item, *, size: tuple[int, int], frames: int, fit: str, limits: Limits
) -> np.ndarray | str:
    """The frames of one item, uint8 `f 4 h w`, contiguous; or the reason why there are none.

    Unreached: the tar or the address that holds it cannot be read now, which says nothing of the item.
    """
    if item.reject is not None:
        return item.reject
    media = index.media(item)
    try:
        pixels = decode_array(media, size=size, frames=frames, fit=fit, limits=limits)
        if isinstance(media, Path) and disk.sha256(media) != item.hash:  # a part of a tar has been compared
            return CHANGED
    except Unreached:
        raise
    except MediaError as error:
        return error.reason
    except OSError:
        return "the file cannot be read"
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def cache_of(index: Index) -> Path | None:
    """Where a dataset's pixels are kept: `.reverie` in its folder, or nowhere if the folder cannot be written to."""
    return index.folder / ".reverie" if os.access(index.folder, os.W_OK) else None


def _checksum(file: BinaryIO, size: int) -> int:
    file.seek(0)
    crc = 0
    while size > 0 and (chunk := file.read(min(_CHUNK, size))):
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc
