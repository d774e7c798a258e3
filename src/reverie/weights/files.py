"""Tensors in safetensors files, the only weight format Reverie reads and writes.

A file from a stranger is checked by its header alone before a byte is allocated for its tensors: the limits below,
names, data types, shapes, gapless offsets, the total size, and the names and shapes that the caller's config expects.
The bytes are then read from the very descriptor that was checked, never mapped, so a file that changes or shrinks
afterwards cannot hurt. Layout: 8 bytes length (little endian), a JSON header, the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from reverie import disk
from reverie.errors import InputError

HEADER_BYTES = 16 * 2**20
TENSORS = 100_000
DIMENSIONS = 8
NAME_LENGTH = 256
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
# Python objects cost up to 64 bytes for each of these characters, so their number bounds the memory of parsing.
STRUCTURE = 2_000_000
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Family = Literal["float", "integer", "bool"]
Expected = Mapping[str, tuple[tuple[int, ...], Family]]
Entries = Mapping[str, "Entry"]


class ModelFileError(InputError):
    """A weight file or its config that Reverie refuses: one sentence, always our own words."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a header; `begin` and `end` count bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def family(dtype: torch.dtype) -> Family:
    """What a tensor holds, whatever its width: weights may be stored in another precision than they run in."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "integer"


def expectation(tensors: Mapping[str, Tensor]) -> Expected:
    """The names, shapes and families that `check` compares with, from a state dict."""
    return {name: (tuple(tensor.shape), family(tensor.dtype)) for name, tensor in tensors.items()}


def read(
    path: str | Path,
    *,
    expected: Expected | None = None,
    only_finite: bool = True,
    without: Collection[str] = (),
) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU, in the file's data types and order.

    `expected`, usually from a freshly built system, must be covered exactly. With `only_finite`, NaN and
    infinity are refused. What `without` names is not read. Raises `ModelFileError`, before anything is
    allocated unless a value itself is at fault.
    """
    path = Path(path)
    with _open(path) as file:
        entries, start = _header(file, path, path.name)
        if expected is not None:
            check({name: (e.shape, family(e.dtype)) for name, e in entries.items()}, expected, what=path.name)
        file.seek(start)
        tensors = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            if name in without:
                file.seek(start + entry.end)
                continue
            tensors[name] = _tensor(file, name, entry, path.name, only_finite)
    return {name: tensors[name] for name in entries if name in tensors}


class Shards:
    """The files that together hold one model, with what comes before the names of each: open, and read one by one.

    So that a model may be larger than the memory that is left beside what becomes of it. Raises `ModelFileError`, also
    for a name in two files; closes the files when it is left.
    """

    def __init__(self, weights: Mapping[Path, str]):
        self.entries: dict[str, Entry] = {}
        self._files: dict[str, tuple[BufferedReader, int, str]] = {}
        with contextlib.ExitStack() as opened:
            for path, prefix in weights.items():
                file = opened.enter_context(_open(path))
                entries, start = _header(
                    file, path, f"{prefix.removesuffix('.')}/{path.name}" if prefix else path.name
                )
                found = {f"{prefix}{name}": entry for name, entry in entries.items()}
                if twice := self.entries.keys() & found.keys():
                    raise ModelFileError(
                        f"{path.name} holds {min(twice)} again, which another file holds; fetch them again."
                    )
                self.entries |= found
                self._files |= dict.fromkeys(found, (file, start, path.name))
            self._opened = opened.pop_all()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def read(self, name: str, *, only_finite: bool = True) -> Tensor:
        """One tensor, on the CPU, in the file's data type."""
        (file, start, path), entry = self._files[name], self.entries[name]
        file.seek(start + entry.begin)
        return _tensor(file, name, entry, path, only_finite)


def _tensor(file: BufferedReader, name: str, entry: Entry, path: str, only_finite: bool) -> Tensor:
    """What stands next in the file, checked."""
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    view: Any = raw.numpy()
    if raw.numel() and file.readinto(view) != raw.numel():
        raise ModelFileError(f"{path} became shorter while it was read; copy the file again.")
    if entry.dtype == torch.bool and bool((raw > 1).any()):
        raise ModelFileError(f"{path} holds bytes other than 0 and 1 in the bool tensor {name!r}.")
    tensor = raw.view(entry.dtype).reshape(entry.shape)
    if only_finite and not finite(tensor):
        raise ModelFileError(
            f"{path} holds NaN or infinity in {name!r}: the training that made it diverged; use an"
            " earlier checkpoint."
        )
    return tensor


def header(path: str | Path) -> dict[str, Entry]:
    """The checked header of a safetensors file, without its data. Raises `ModelFileError`."""
    path = Path(path)
    with _open(path) as file:
        return _header(file, path, path.name)[0]


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    path = Path(path)
    for name in tensors:
        _name(name, path)
    # Tied tensors share storage, which the format cannot say: each name gets its own copy.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with disk.whole(path) as draft:
        save_file(plain, draft, metadata=dict(metadata or {}) or None)


def check(found: Expected, expected: Expected, *, what: str) -> None:
    """Raise `ModelFileError` with the missing, unexpected and mis-shaped keys unless both sides agree."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {_shape(*found[name])} and should be {_shape(*expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    lists = ((missing, "missing"), (unexpected, "unexpected"), (wrong, "mis-shaped"))
    parts = [f"{len(keys)} {word} ({_some(keys)})" for keys, word in lists if keys]
    if parts:
        raise ModelFileError(
            f"{what} does not fit its config: {'; '.join(parts)}; use weights of this very config."
        )


def load_json(text: bytes | str, *, what: str, infinite: bool = False) -> Any:
    """JSON from a stranger: bounded nesting and structure, no duplicate keys. Raises `ModelFileError`.

    `infinite`: it may say -Infinity, as diffusers' schedulers do, which is no JSON.
    """
    raw = text.encode() if isinstance(text, str) else text
    if sum(raw.count(character) for character in (b"{", b"[", b",")) > STRUCTURE:
        raise ModelFileError(
            f"{what} has more than {STRUCTURE:,} JSON parts; no file that Reverie reads needs them."
        )
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_minus_infinity if infinite else _constant,
        )
    except _Duplicate as error:
        raise ModelFileError(f"{what} names the key {shorten(error.args[0])} twice; keep one.") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{what} is not valid JSON; the file is damaged, fetch it again.") from None


def shorten(name: object, length: int = 80) -> str:
    """A stranger's word, fit to stand in a message: escaped and cut."""
    text = repr(name[:length] if isinstance(name, str) else name)
    return text if len(text) <= length + 2 else text[:length] + "..."


class _Duplicate(Exception):
    pass


def _constant(word: str) -> NoReturn:
    raise ValueError(word)  # NaN and Infinity are Python's own, not JSON


def _minus_infinity(word: str) -> float:
    return float(word) if word == "-Infinity" else _constant(word)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        raise _Duplicate(next(a for a, b in pairwise(keys) if a == b))
    return made


def _open(path: Path) -> BufferedReader:
    if path.suffix.lower() in PICKLES:
        raise ModelFileError(pickle_message(path.name))
    try:
        # Non-blocking, or opening a pipe would wait for its writer for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ModelFileError(f"cannot read {shorten(str(path))}: {error.strerror}; check the path.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelFileError(f"{shorten(str(path))} is not a regular file; give a .safetensors file.")
    return os.fdopen(descriptor, "rb")


def pickle_message(name: str) -> str:
    """Why Reverie does not load a pickled checkpoint, and what to do."""
    return (
        f"{shorten(name)} is a pickled checkpoint, which can run code when it is loaded, so Reverie never loads one;"
        " run `reverie convert FILE OUT.safetensors` once and use the converted file."
    )


def _header(file: BufferedReader, path: Path, name: str) -> tuple[dict[str, Entry], int]:
    """`name` is what messages call it."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ModelFileError(f"{name} has {size} bytes and is no safetensors file; fetch it again.")
    length = int.from_bytes(prefix, "little")
    # A header of 640, 896, ... bytes begins like a pickle, but no pickle is so small a number.
    pickled = (
        prefix.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and length > HEADER_BYTES
    )
    if pickled or prefix.startswith(b"PK\x03\x04"):
        raise ModelFileError(pickle_message(name))
    if prefix == b"version ":
        raise ModelFileError(
            f"{name} is a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull`, or fetch it."
        )
    if length > HEADER_BYTES:
        raise ModelFileError(
            f"{name} claims a header of {length:,} bytes, more than the limit of {HEADER_BYTES:,}; it is no safetensors"
            " file of a model that Reverie knows."
        )
    if length > size - 8:
        raise ModelFileError(
            f"{name} claims a header of {length:,} bytes in a file of {size:,}; fetch it again."
        )
    text = file.read(length)
    many = f"{name} lists more than {TENSORS:,} tensors, which no model that Reverie knows has."
    if text.count(b'"dtype"') > TENSORS:  # before parsing; inside a string the quotes would be escaped
        raise ModelFileError(many)
    table = load_json(text, what=f"the header of {name}")
    if not isinstance(table, dict):
        raise ModelFileError(f"the header of {name} is not a JSON object; fetch the file again.")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError(
            f"the metadata of {name} are not strings; write the file again with safetensors."
        )
    if len(table) > TENSORS:
        raise ModelFileError(many)
    entries = {key: _entry(key, value, path) for key, value in table.items()}
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ModelFileError(
                f"{name} has {'a hole before' if entry.begin > position else 'an overlap at'} the tensor {key!r}; fetch"
                " the file again."
            )
        position = entry.end
    if position != size - 8 - length:
        raise ModelFileError(
            f"{name} should hold {position:,} bytes of tensors and holds {size - 8 - length:,}; fetch the file again."
        )
    return entries, 8 + length


def _entry(name: str, value: Any, path: Path) -> Entry:
    _name(name, path)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(
            f"{path.name} describes the tensor {name!r} without dtype, shape and data_offsets alone."
        )
    word, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPES.get(word) if isinstance(word, str) else None
    if dtype is None:
        raise ModelFileError(
            f"{path.name} gives {name!r} the data type {shorten(word)}; known are {', '.join(DTYPES)}."
        )
    if not _counts(shape) or len(shape) > DIMENSIONS:
        raise ModelFileError(
            f"{path.name} gives {name!r} the shape {shorten(shape)}, which no tensor can have."
        )
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(
            f"{path.name} gives {name!r} the offsets {shorten(offsets)}, which are no range of bytes."
        )
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ModelFileError(
            f"{path.name} gives {name!r} the shape {shorten(shape)} of {word} and {offsets[1] - offsets[0]:,} bytes,"
            " which do not agree; fetch the file again."
        )
    return Entry(dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _name(name: str, path: Path) -> None:
    if len(name) > NAME_LENGTH or not NAME.fullmatch(name):
        raise ModelFileError(
            f"{path.name} names a tensor {shorten(name)}; names are letters, digits, '_' and '-' joined by dots, at"
            f" most {NAME_LENGTH} characters."
        )


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**48 for number in value)


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    chunks = tensor.reshape(-1).split(2**22)
    return all(
        bool((chunk.float() if chunk.element_size() == 1 else chunk).isfinite().all()) for chunk in chunks
    )


def _shape(shape: tuple[int, ...], kind: Family) -> str:
    return f"{' x '.join(map(str, shape)) or 'a scalar'} {kind}"


def _some(keys: list[str], most: int = 5) -> str:
    listed = ", ".join(keys[:most])
    return f"{listed}, and {len(keys) - most:,} more" if len(keys) > most else listed
