"""A system on disk: a folder with `config.json`, `model.safetensors` and, where it reads text, `tokenizer.json`.

`config.json` is data: {"reverie": version, "system": a name of the catalogue, "config": the fields of the system's
config}. A name is looked up in a literal table; nothing in a folder names a module, a path or a switch. The order of
loading: the config's fields are checked; the system is built, undrawn, within what the file's header says that it
holds; header and system are compared; only then the weights are read. (The meta device, the usual way, costs two
seconds of imports in torch 2.13.)

A system that can be stored is an `nn.Module` with `__init__(self, config)` or `__init__(self, config, tokenizer)`,
annotated with its config's dataclass, which keeps both under these names.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from reverie import disk
from reverie.codecs.bpe import END, START, Bpe
from reverie.errors import InputError
from reverie.weights import clip, files, remap
from reverie.weights.files import ModelFileError, shorten

SHIPPED = Path(__file__).parent / "shipped"
CONFIG, MODEL, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
CONFIG_BYTES, TOKENIZER_BYTES = 2**20, 64 * 2**20
INTEGER = 2**24
LAYOUTS = ("reverie", "transformers")
# What `model_type` says in a folder of transformers -> the map that reads it.
TRANSFORMERS = {"clip": clip}

Systems = Mapping[str, Callable[[], type[nn.Module]]]


def shipped() -> list[str]:
    """The names of the weights that came with Reverie."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def save(
    system: nn.Module,
    folder: str | Path,
    *,
    name: str,
    version: str,
    dtype: torch.dtype | None = None,
    layout: Literal["reverie", "transformers"] = "reverie",
) -> Path:
    """Write the system called `name` into a folder that `load` reads; returns the folder.

    `dtype` (such as torch.float16, half the size) is what floats are stored in; `load` restores the system's own.
    `layout="transformers"` writes the folder of the public library instead, for the systems that have one. The old
    config goes first and the new one comes last, so a folder that was interrupted is never taken for a whole one.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {shorten(layout)} is unknown; use one of {', '.join(LAYOUTS)}.")
    if not isinstance(folder, str | Path) or not str(folder):
        raise InputError(f"{folder!r} is no folder to save into: name one, such as 'my-model'.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save into.")
    for mine in (CONFIG, TOKENIZER):
        if (folder / mine).exists() and not (folder / MODEL).exists():
            raise InputError(f"{folder} holds a {mine} of something else than a model; give a new folder.")
    config = dataclasses.asdict(system.config)  # type: ignore[call-overload]  # a module may hold anything
    tokenizer = getattr(system, "tokenizer", None)
    records: dict[str, Any] = {CONFIG: {"reverie": version, "system": name, "config": config}}
    tensors: Mapping[str, Tensor] = system.state_dict()
    if layout == "transformers":
        if name not in TRANSFORMERS:
            raise InputError(
                f"{name!r} has no transformers layout; those that have one: {', '.join(TRANSFORMERS)}."
            )
        special = None if tokenizer is None else (START, END)
        records = TRANSFORMERS[name].export_config(config, special=special)
        tensors = remap.apply(remap.invert(TRANSFORMERS[name].TABLE), tensors)
    if dtype is not None:
        tensors = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()
        }
    broken = [key for key, value in tensors.items() if not files.finite(value)]
    if broken:
        reason = "these weights diverged" if dtype is None else f"they may not fit {dtype}"
        raise InputError(
            f"{broken[0]} and {len(broken) - 1} other tensors hold NaN or infinity; {reason}, not saved."
        )

    folder.mkdir(parents=True, exist_ok=True)
    for old in (CONFIG, TOKENIZER):
        (folder / old).unlink(missing_ok=True)
    files.write(folder / MODEL, tensors, {"format": "pt"})
    if tokenizer is not None:
        tokenizer.write(folder / TOKENIZER)
    for file in sorted(records, key=lambda file: file == CONFIG):
        disk.write(folder / file, json.dumps(records[file], indent=2, allow_nan=False) + "\n")
    return folder


def load(name_or_folder: str | Path, *, systems: Systems) -> nn.Module:
    """The system of a shipped name or of a folder, on the CPU, in its own precision, in eval mode.

    A folder is one that `save` wrote in either layout. Raises `ModelFileError` (an `InputError`) in one sentence.
    """
    folder = find(name_or_folder)
    record = _read_json(folder / CONFIG)
    foreign = None
    if isinstance(record, dict) and "system" not in record and "model_type" in record:
        foreign = _choose(TRANSFORMERS, record["model_type"], what="model_type")
        beside = folder / foreign.PREPROCESSOR
        more = {beside.name: _read_json(beside)} if beside.exists() else {}
        name, values = foreign.import_config({CONFIG: record} | more)
    else:
        name, values = _own(record, folder)
    system_class = _choose(systems, name, what="system")()
    config = config_from(_config_class(system_class), values, where=f"the config of {name!r}")
    tokenizer = _tokenizer(folder) if "tokenizer" in inspect.signature(system_class).parameters else ()
    parts = (config, tokenizer) if tokenizer != () else (config,)

    entries = files.header(folder / MODEL)
    try:
        with torch.random.fork_rng(devices=[]), _Within(entries):
            system = system_class(*parts)
    except InputError as error:
        raise ModelFileError(f"{CONFIG} describes a {name!r} that cannot be built: {error}") from error
    except Exception as error:
        # Values of the right type can still contradict each other in ways that only the constructor notices.
        raise ModelFileError(
            f"{CONFIG} describes a {name!r} that cannot be built; correct its values."
        ) from error

    outline = system.state_dict()
    expected = files.expectation(outline)
    if foreign is None:
        tensors = files.read(folder / MODEL, expected=expected)
    else:
        # The table backwards says what their file must hold, so theirs too is checked before it is read.
        theirs = dict(files.expectation(remap.apply(remap.invert(foreign.TABLE), outline)))
        ignored = remap.matching(foreign.IGNORE, entries)
        theirs |= {key: (entries[key].shape, files.family(entries[key].dtype)) for key in ignored}
        tensors = files.read(folder / MODEL, expected=theirs)
        tensors = remap.apply(foreign.TABLE, tensors, expected=expected, ignore=foreign.IGNORE)
    system.load_state_dict(tensors, strict=True)
    return system.eval()


def find(name_or_folder: str | Path) -> Path:
    """The folder of a shipped name, or the folder itself if it holds a system. Raises `ModelFileError`."""
    if isinstance(name_or_folder, str) and name_or_folder in shipped():
        return SHIPPED / name_or_folder
    holds = f"a folder must hold {CONFIG} and {MODEL}, as reverie.save writes them"
    if not isinstance(name_or_folder, str | os.PathLike) or not str(name_or_folder):
        raise ModelFileError(f"{name_or_folder!r:.60} is no folder and no shipped name; {holds}.")
    path = Path(name_or_folder)
    shown = shorten(str(path))
    if path.suffix.lower() in files.PICKLES:
        raise ModelFileError(files.pickle_message(path.name))
    try:
        is_file = path.is_file()
        present = {entry.name for entry in path.iterdir()} if path.is_dir() else None
    except (OSError, ValueError):  # too long, or with a NUL byte, or forbidden
        is_file, present = False, None
    if is_file:
        raise ModelFileError(f"{shown} is a file; give the folder it lies in: {holds}.")
    if present is None:
        names = ", ".join(shipped()) or "none"
        raise ModelFileError(f"{shown} is neither a folder nor a shipped name (shipped: {names}); {holds}.")
    if MODEL not in present and (
        old := sorted(n for n in present if Path(n).suffix.lower() in files.PICKLES)
    ):
        raise ModelFileError(files.pickle_message(old[0]))
    absent = [name for name in (CONFIG, MODEL) if name not in present]
    if absent:
        raise ModelFileError(f"{shown} lacks {' and '.join(absent)}: {holds}.")
    return path


def config_from(config_class: type, values: Any, *, where: str) -> Any:
    """A config dataclass from plain JSON values, every one checked against its annotation. Raises `ModelFileError`."""
    if not isinstance(values, dict):
        raise ModelFileError(f"{where} is {shorten(values)}; it must be an object of named values.")
    hints = get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    unknown = [key for key in values if key not in fields]
    if unknown:
        listed = ", ".join(map(shorten, unknown[:5]))
        raise ModelFileError(f"{where} has the unknown keys {listed}; known are {', '.join(fields)}.")
    absent = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise ModelFileError(f"{where} lacks {', '.join(absent)}; add them.")
    made = {key: _value(hints[key], value, where=f"{where}, {key!r}") for key, value in values.items()}
    try:
        return config_class(**made)
    except InputError as error:
        raise ModelFileError(f"{where} is refused: {error}") from error


def _value(hint: Any, value: Any, *, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return config_from(cast(type, hint), value, where=where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _value(inner, value, where=where)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise ModelFileError(f"{where} is {shorten(value)}; use one of {', '.join(map(repr, arguments))}.")
    if origin is tuple:
        each = (
            [arguments[0]] * len(value) if arguments[1:] == (...,) and isinstance(value, list) else arguments
        )
        if not isinstance(value, list) or len(value) != len(each) or len(value) > 10_000:
            raise ModelFileError(f"{where} is {shorten(value)}; it must be a list fit for {_type(hint)}.")
        return tuple(_value(kind, part, where=where) for kind, part in zip(each, value, strict=True))
    assert hint in (bool, int, float, str), f"{where} is annotated {hint}, which no config file can hold"
    if hint is float and type(value) is int:
        value = float(value) if abs(value) <= INTEGER else value
    if type(value) is not hint:
        raise ModelFileError(f"{where} is {shorten(value)}; it must be of type {_type(hint)}.")
    if hint is float and not math.isfinite(value):
        raise ModelFileError(f"{where} is {value}; it must be a finite number.")
    if hint is int and abs(value) > INTEGER:
        raise ModelFileError(f"{where} is {shorten(value)}; no size may exceed {INTEGER:,}.")
    return value


def _type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)


def _own(record: Any, folder: Path) -> tuple[str, Any]:
    keys = {"reverie", "system", "config"}
    if not isinstance(record, dict) or record.keys() != keys:
        found = ", ".join(map(shorten, list(record)[:6])) if isinstance(record, dict) else shorten(record)
        raise ModelFileError(
            f"{CONFIG} in {shorten(str(folder))} has {found or 'nothing'}; it must have the keys reverie, system and"
            " config, as reverie.save writes them."
        )
    return record["system"], record["config"]


def _choose(table: Mapping[str, Any], name: Any, *, what: str) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ModelFileError(f"{CONFIG} gives the {what} {shorten(name)}; known are {', '.join(table)}.")
    return table[name]


def _config_class(system_class: type) -> type:
    return get_type_hints(system_class.__init__)["config"]  # type: ignore[misc]


def _tokenizer(folder: Path) -> Bpe | None:
    path = folder / TOKENIZER
    if not path.exists():
        return None
    _sized(path, TOKENIZER_BYTES)
    return Bpe.read(path)


def _read_json(path: Path) -> Any:
    _sized(path, CONFIG_BYTES)
    return files.load_json(path.read_bytes(), what=path.name)


def _sized(path: Path, limit: int) -> None:
    if not path.is_file():
        raise ModelFileError(f"{path.name} in {shorten(str(path.parent))} is not a regular file; save again.")
    if path.stat().st_size > limit:
        raise ModelFileError(
            f"{path.name} has {path.stat().st_size:,} bytes, more than the limit of {limit:,}."
        )


class _Within(TorchFunctionMode):
    """A construction within what a file holds: few enough parts, small enough tensors, and no random draws.

    It stops when it registers many more tensors or modules than the file could fill (a depth of 10^7), and before
    it makes a tensor much larger than the whole file. Weights are about to be read, so drawing them is skipped.
    """

    SIZED = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
    DRAWN = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_,
             nn.init.kaiming_uniform_, nn.init.kaiming_normal_)  # fmt: skip

    def __init__(self, entries: Mapping[str, files.Entry]):
        super().__init__()
        elements = sum(math.prod(entry.shape) for entry in entries.values())
        self.largest, self.total = elements + 2**20, 4 * elements + 2**22
        self.tensors, self.modules = 4 * len(entries) + 100, 16 * len(entries) + 1000
        self.thread = threading.get_ident()

    def __enter__(self) -> _Within:
        self.hooks = [
            registration.register_module_parameter_registration_hook(self._count_tensor),
            registration.register_module_buffer_registration_hook(self._count_tensor),
            registration.register_module_module_registration_hook(self._count_module),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWN:
            return args[0] if args else kwargs["tensor"]
        if func in self.SIZED:
            size = {"size": kwargs["size"]} if "size" in kwargs else {}
            self._take(torch.empty(*args, **size, device="meta").numel())
        elif func is torch.full:
            self._take(math.prod(args[0] if args else kwargs["size"]))
        return func(*args, **kwargs)

    def _take(self, elements: int) -> None:
        self.total -= elements
        if elements > self.largest or self.total < 0:
            raise ModelFileError(f"it asks for more numbers than {MODEL} holds.")

    def _count_tensor(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.tensors -= 1
            if self.tensors < 0:
                raise ModelFileError(f"it has many more parts than {MODEL}.")

    def _count_module(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.modules -= 1
            if self.modules < 0:
                raise ModelFileError(f"it has many more parts than {MODEL}.")
