"""TorchScript archives -> tensors by name, and nothing of them is run: what OpenAI's own CLIP files are.

An archive is a zip: code/ (the program, which is never read), data.pkl (a tree of modules with their attributes) and
data/0, data/1, ... (the bytes of the storages). data.pkl is a pickle, but torch's writer speaks only a small part of
that language, so it is read by the small machine below, which has no way to import or call anything: a name in the
file stays a word, and the few words that torch writes have a meaning here. Tensors among the attributes are found by
their dotted paths, as `torch.jit.load(FILE).state_dict()` has them; that only code/ tells a buffer from another
tensor attribute, so those come along. `convert` is the one caller, in its confined child.

A module that Python pickled, as OpenAI's autoencoder of DALL-E, lies in the same kind of zip without code/. The machine
reads it too (`load_module`): there a class is a word that means nothing, and so is whatever the file would call.
https://github.com/pytorch/pytorch/blob/main/torch/csrc/jit/serialization/pickler.cpp
"""

from __future__ import annotations

import math
import re
import struct
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from reverie.weights.files import DIMENSIONS, TENSORS, shorten

PICKLE_BYTES = 16 * 2**20
STEPS = 2_000_000  # of data.pkl; each makes at most one small object
DEPTH = 64  # of modules in modules
NOTHING = ("training", "_is_full_backward_hook")  # attributes of every module that say nothing of its weights

STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Float8_e4m3fn": torch.float8_e4m3fn, "Float8_e5m2": torch.float8_e5m2,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8,
    "UInt64": torch.uint64, "UInt32": torch.uint32, "UInt16": torch.uint16, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
LISTS = {f"torch.jit._pickle.build_{each}list" for each in ("int", "double", "bool", "tensor")}
REBUILD, TAG = "torch._utils._rebuild_tensor_v2", "torch.jit._pickle.restore_type_tag"
EMPTY, DEVICE = "collections.OrderedDict", "torch.device"
STORAGE = re.compile(r"torch\.[A-Za-z0-9_]+Storage")


class Refused(Exception):
    """Why an archive is not converted, in our own words, to stand after "cannot convert FILE: "."""


class _Damaged(Exception):
    """What torch never writes."""


def is_script(names: Iterable[str]) -> bool:
    """Whether the entries of a zip file are those of a TorchScript archive."""
    return any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in names)


def is_read(name: str) -> bool:
    """Whether an entry of an archive is one that `load` reads."""
    return bool(re.search(r"(^|/)(data\.pkl|byteorder|data/[0-9]+)$", name))


def load(file: BinaryIO, size: int) -> dict[str, Tensor | None]:
    """The tensors of an archive of `size` bytes by dotted path; None stands for what is there and is no tensor.

    Raises `Refused`, and for a damaged zip file what zipfile raises.
    """
    with zipfile.ZipFile(file) as archive:
        files = {entry.filename: entry for entry in archive.infolist()}
        [pickled] = [name for name in files if name.endswith("data.pkl")]
        root = pickled.removesuffix("data.pkl")
        storages = _Storages(archive, files, root, size)
        if files[pickled].file_size > PICKLE_BYTES:
            raise Refused("its data.pkl is larger than any that torch writes for weights")
        try:
            tree = _Machine(storages.read(pickled).numpy().tobytes(), storages).run()
        except (_Damaged, IndexError, KeyError, TypeError, ValueError, struct.error):
            raise Refused("its data.pkl is damaged, or torch's TorchScript writer did not write it") from None
        if not isinstance(tree, _Object):
            raise Refused("its data.pkl holds no module")
        found: dict[str, Tensor | None] = {}
        for path, value in _attributes(tree).items():
            found[path] = storages.tensor(value) if isinstance(value, _View) else None
        parts = {name.removeprefix(root).partition("/") for name in files}
        beside = {head + slash for head, slash, _ in parts} - {
            "data.pkl",
            "data/",
            "byteorder",
            "version",
            ".data/",
        }
        return found | dict.fromkeys(sorted(beside))


def load_module(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """The parameters and buffers of a module that `torch.save` pickled whole, by dotted path; none if it is no such."""
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            files = {entry.filename: entry for entry in archive.infolist()}
            [pickled] = [name for name in files if name.endswith("data.pkl")]
            storages = _Storages(archive, files, pickled.removesuffix("data.pkl"), size)
            if files[pickled].file_size > PICKLE_BYTES:
                return {}
            tree = _ModuleMachine(storages.read(pickled).numpy().tobytes(), storages).run()
            return {path: storages.tensor(view) for path, view in _weights(tree)}
    except (
        Refused,
        _Damaged,
        zipfile.BadZipFile,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
        struct.error,
    ):
        return {}


def _weights(tree: Any) -> list[tuple[str, _View]]:
    """What the modules of a tree hold as parameters and buffers."""
    found: list[tuple[str, _View]] = []
    seen, waiting = 0, [("", tree, 1)]
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if depth > DEPTH or seen > TENSORS or len(found) > TENSORS:
            raise Refused("its modules hold each other without end")
        state = module.state if isinstance(module, _Object) else None
        parts = (
            [state.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
            if isinstance(state, dict)
            else []
        )
        for i, part in enumerate(parts):
            for name, value in part.items() if isinstance(part, dict) else ():
                if i < 2 and isinstance(value, _View):
                    found.append((f"{prefix}{name}", value))
                elif i == 2:
                    waiting.append((f"{prefix}{name}.", value, depth + 1))
    return found


def _attributes(tree: _Object) -> dict[str, Any]:
    """Every attribute of the modules by its dotted path, but those that say nothing."""
    found: dict[str, Any] = {}
    seen, waiting = 0, [("", tree, 1)]
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if depth > DEPTH or seen > TENSORS:
            raise Refused("its modules hold each other without end")
        for name, value in module.state.items() if isinstance(module.state, dict) else ():
            if type(name) is not str:
                raise Refused("a module in it has an attribute without a name")
            path = prefix + name
            if isinstance(value, _Object) and isinstance(value.state, dict):
                waiting.append((path + ".", value, depth + 1))
            elif value is not None and name not in NOTHING:
                if path in found:
                    raise Refused(f"it names {shorten(path)} twice")
                found[path] = value
                if len(found) > TENSORS:
                    raise Refused("it holds more tensors than any model that Reverie knows")
    return found


# ---------------------------------------------------------------- the bytes


@dataclass(frozen=True, kw_only=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    """A tensor that was checked against its storage, of which nothing has been read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storages:
    """The entries of the archive that hold data; none is read before its size was compared with what it claims."""

    def __init__(
        self, archive: zipfile.ZipFile, files: dict[str, zipfile.ZipInfo], root: str, size: int
    ) -> None:
        self.archive, self.files, self.root = archive, files, root
        self.size, self.left = size, size
        self.bytes: dict[str, tuple[int, Tensor]] = {}  # by key: the width of what it holds, and the bytes
        order = "little"  # as torch takes an archive that does not say
        if f"{root}byteorder" in files:
            if files[f"{root}byteorder"].file_size > 6:
                raise Refused("it has no byte order that torch knows")
            order = self.read(f"{root}byteorder").numpy().tobytes().decode("ascii", "replace")
        if order not in ("little", "big"):
            raise Refused("it has no byte order that torch knows")
        self.swap = order != sys.byteorder

    def read(self, name: str) -> Tensor:
        """The bytes of an entry. All that is read together is no larger than the file."""
        entry = self.files[name]
        self.left -= entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or self.left < 0:
            raise Refused("it is packed in a way that torch never does")
        raw = torch.empty(entry.file_size, dtype=torch.uint8)
        view: Any = raw.numpy()
        at = 0
        with self.archive.open(entry) as stream:
            while piece := stream.read(min(2**20, len(view) - at)):
                view[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at += len(piece)
        if at != len(view):
            raise Refused("it is cut short")
        return raw

    def claim(self, parts: Any) -> _Storage:
        """A storage as data.pkl describes it: ("storage", type, key, device, number of elements)."""
        word, kind, key, device, count = parts
        if word != "storage" or type(kind) is not _Word or type(key) is not str or type(device) is not str:
            raise _Damaged
        dtype = STORAGES.get(kind.text.removeprefix("torch.").removesuffix("Storage"))
        if dtype is None or not STORAGE.fullmatch(kind.text):
            raise Refused("a tensor in it is quantised or complex")
        if not re.fullmatch(r"[0-9]{1,9}", key) or f"{self.root}data/{key}" not in self.files:
            raise Refused(f"it has no data for the storage {shorten(key)}")
        if type(count) is not int or count * dtype.itemsize != self.files[f"{self.root}data/{key}"].file_size:
            raise Refused(f"the storage {key} has another size than its data")
        return _Storage(dtype=dtype, key=key, count=count)

    def view(self, parts: Any) -> _View:
        """A tensor as data.pkl describes it, inside its storage or refused."""
        storage, offset, shape, strides, grad, hooks, *bits = parts
        if type(storage) is not _Storage or type(grad) is not bool or hooks != {} or bits not in ([], [{}]):
            raise _Damaged
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise _Damaged
        numbers = (offset, *shape, *strides)
        if len(shape) > DIMENSIONS or not all(type(each) is int and 0 <= each < 2**48 for each in numbers):
            raise Refused("a tensor in it has a shape that no tensor can have")
        elements = math.prod(shape)
        last = (
            sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) + 1
            if elements
            else 0
        )
        if offset + last > storage.count:
            raise Refused(f"a tensor in it reaches outside the storage {storage.key}")
        if elements * storage.dtype.itemsize > 4 * self.size:
            raise Refused("its tensors are more than four times as large as the file")
        return _View(storage=storage, offset=offset, shape=shape, strides=strides)

    def tensor(self, view: _View) -> Tensor:
        """The tensor itself; two views of one storage share their bytes."""
        key, dtype = view.storage.key, view.storage.dtype
        if key not in self.bytes:
            raw = self.read(f"{self.root}data/{key}")
            if self.swap:
                raw.numpy().view(f"u{dtype.itemsize}").byteswap(inplace=True)
            self.bytes[key] = dtype.itemsize, raw
        width, raw = self.bytes[key]
        if self.swap and width != dtype.itemsize:
            raise Refused(f"the storage {key} is read as two types in a foreign byte order")
        return raw.view(dtype).as_strided(view.shape, view.strides, view.offset)


# ---------------------------------------------------------------- the tree


class _Word:
    """A name in the file: the class of a module, the type of a storage, or how torch rebuilds something."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class _Object:
    """Any module or object of the program: its attributes and nothing else."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None


class _Machine:
    """Reads what torch's TorchScript writer writes: the opcodes of pickle that build plain data, and some words."""

    def __init__(self, text: bytes, storages: _Storages) -> None:
        self.text, self.at, self.storages = text, 0, storages
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the whole of data.pkl says."""
        if self._take(2) != b"\x80\x02":
            raise _Damaged
        for _ in range(STEPS):
            code = self._take(1)
            if code == b".":
                if self.marked or len(self.stack) != 1:
                    raise _Damaged
                return self.stack[0]
            self._step(code)
        raise Refused("its data.pkl says more than any that torch writes for weights")

    def _take(self, count: int) -> bytes:
        piece = self.text[self.at : self.at + count]
        if len(piece) != count:
            raise _Damaged
        self.at += count
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self.text.index(b"\n", self.at, self.at + 1000)
        line = self.text[self.at : end].decode()
        self.at = end + 1
        return line

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _step(self, code: bytes) -> None:
        push = self.stack.append
        match code:
            case b"N":
                push(None)
            case b"\x88":
                push(True)
            case b"\x89":
                push(False)
            case b"K":
                push(self._number("<B"))
            case b"M":
                push(self._number("<H"))
            case b"J":
                push(self._number("<i"))
            case b"\x8a":  # a long, which torch writes with eight bytes
                length = self._number("<B")
                if length > 8:
                    raise _Damaged
                push(int.from_bytes(self._take(length), "little", signed=True))
            case b"G":
                push(self._number(">d"))
            case b"X":
                push(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))
            case b")":
                push(())
            case b"]":
                push([])
            case b"}":
                push({})
            case b"(":
                self.marked.append(self.stack)
                self.stack = []
            case b"t":
                items = self._since_mark()
                self.stack.append(tuple(items))
            case b"\x85" | b"\x86" | b"\x87":
                count = code[0] - 0x84
                if len(self.stack) < count:
                    raise _Damaged
                self.stack[-count:] = [tuple(self.stack[-count:])]
            case b"a":
                item = self.stack.pop()
                self._top(list).append(item)
            case b"e":
                items = self._since_mark()
                self._top(list).extend(items)
            case b"s":
                value, key = self.stack.pop(), self.stack.pop()
                self._set([key, value])
            case b"u":
                self._set(self._since_mark())
            case b"q":
                self.memo[self._number("<B")] = self.stack[-1]
            case b"r":
                self.memo[self._number("<I")] = self.stack[-1]
            case b"h":
                push(self.memo[self._number("<B")])
            case b"j":
                push(self.memo[self._number("<I")])
            case b"c":
                push(self._word(f"{self._line()}.{self._line()}"))
            case b"\x81":  # a new object of a class, from no arguments
                arguments, word = self.stack.pop(), self.stack.pop()
                if type(word) is not _Word or not self._makes(word.text, arguments):
                    raise _Damaged
                self.stack.append(_Object())
            case b"b":  # its state
                state = self.stack.pop()
                thing = self._top(_Object)
                if thing.state is not None:
                    raise _Damaged
                thing.state = state
            case b"Q":
                push(self.storages.claim(self.stack.pop()))
            case b"R":
                arguments, word = self.stack.pop(), self.stack.pop()
                if type(word) is not _Word or type(arguments) is not tuple:
                    raise _Damaged
                self.stack.append(self._rebuild(word.text, arguments))
            case _:
                raise _Damaged

    def _makes(self, word: str, arguments: Any) -> bool:
        """Whether the file may ask for a new object so."""
        return word.startswith("__torch__.") and arguments == ()

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _Damaged
        return self.stack[-1]

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Of TorchScript's dicts; a tuple is none of their keys, and hashing one can go as deep as it is nested.
            if not isinstance(key, str | int | float | _View):
                raise _Damaged
            target[key] = value

    def _word(self, text: str) -> _Word:
        known = text in LISTS or text in (REBUILD, TAG, EMPTY, DEVICE)
        if not known and not text.startswith("__torch__.") and not STORAGE.fullmatch(text):
            said = f" ({text})" if re.fullmatch(r"[\w.]{1,80}", text) else ""
            raise Refused(f"it holds code or objects, not weights alone{said}")
        return _Word(text)

    def _rebuild(self, word: str, arguments: tuple[Any, ...]) -> Any:
        if word == REBUILD:
            return self.storages.view(arguments)
        if word in LISTS and len(arguments) == 1 and type(arguments[0]) is list:
            return arguments[0]
        if word == TAG and len(arguments) == 2 and type(arguments[1]) is str:
            return arguments[0]
        if word == EMPTY and arguments == ():
            return {}
        if word == DEVICE or word.startswith("__torch__."):  # the latter a member of an enumeration
            return _Object()
        raise _Damaged


class _ModuleMachine(_Machine):
    """The same for what Python pickled: every name is a word, and whatever is made or called is an empty object."""

    def _makes(self, word: str, arguments: Any) -> bool:
        return type(arguments) is tuple

    def _word(self, text: str) -> _Word:
        return _Word(text)

    def _rebuild(self, word: str, arguments: tuple[Any, ...]) -> Any:
        if word == REBUILD:
            return self.storages.view(arguments)
        if word == "torch._utils._rebuild_parameter":
            return arguments[0]
        return {} if word == EMPTY and arguments == () else _Object()
