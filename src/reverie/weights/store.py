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
import re
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
from reverie.codecs.bpe import Bpe
from reverie.codecs.pieces import read_tokenizer
from reverie.errors import InputError
from reverie.nn.lora import adapted
from reverie.weights import clip_open_clip, clip_transformers, files, remap
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import Foreign

SHIPPED = Path(__file__).parent / "shipped"
CONFIG, MODEL, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
# What folders of models hold beside weights and config: a new model must not be read with an old one's.
BESIDE = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model",
    *clip_transformers.RECORDS[1:],
)  # fmt: skip
CONFIG_BYTES, INDEX_BYTES = 2**20, 2**24
INTEGER = 2**24
FORMATS = ("reverie", "transformers", "open_clip")

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
    format: Literal["reverie", "transformers", "open_clip"] = "reverie",
) -> Path:
    """Write the system called `name` into a folder that `load` reads; returns the folder.

    `dtype` (such as torch.float16, half the size) is what floats are stored in; `load` restores the system's own.
    `format` is whose folder it becomes, for the systems that the public libraries have. The old config goes first
    and the new one comes last, so a folder that was interrupted is never taken for a whole one.
    """
    if format not in FORMATS:
        raise InputError(f"format {shorten(format)} is unknown; use one of {', '.join(FORMATS)}.")
    if not isinstance(folder, str | Path) or not str(folder):
        raise InputError(f"{folder!r} is no folder to save into: name one, such as 'my-model'.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save into.")
    present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    weights = present & {MODEL, clip_open_clip.MODEL}
    if not weights and (others := present & {CONFIG, TOKENIZER, clip_open_clip.CONFIG}):
        raise InputError(f"{folder} holds a {min(others)} of something else than a model; give a new folder.")
    if adapters := [layer for layer, _ in adapted(system)]:
        raise InputError(
            f"{adapters[0]} and {len(adapters) - 1} other layers have adapters: merge_lora(system) first."
        )
    config = dataclasses.asdict(system.config)  # type: ignore[call-overload]  # a module may hold anything
    tokenizer = getattr(system, "tokenizer", None)
    tensors: Mapping[str, Tensor] = system.state_dict()
    model, records, table = _layout(format, name, version, config, tokenizer)
    if table is not None:
        tensors = remap.apply(remap.invert(table), tensors)
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
    if weights:  # a model's folder: no file of the old one may be taken for the new one's
        for old in (CONFIG, *BESIDE, clip_open_clip.CONFIG, *weights - {model}):
            (folder / old).unlink(missing_ok=True)
    files.write(folder / model, tensors, {"format": "pt"})
    if tokenizer is not None:
        # Other libraries must be told what ours reads in the config.
        length = None if format == "reverie" else config["text"]["length"]
        tokenizer.write(folder / TOKENIZER, length=length)
    configs = (CONFIG, clip_open_clip.CONFIG)
    for file in sorted(records, key=lambda file: file in configs):
        disk.write(folder / file, json.dumps(records[file], indent=2, allow_nan=False) + "\n")
    return folder


def _layout(
    format: str, name: str, version: str, config: dict[str, Any], tokenizer: Any
) -> tuple[str, dict[str, Any], tuple[remap.Rule, ...] | None]:
    """A format's file of weights, its JSON files by name, and its table (None: our own names)."""
    if format == "reverie":
        return MODEL, {CONFIG: {"reverie": version, "system": name, "config": config}}, None
    if name != "clip":
        raise InputError(f"{format} has no {name!r}; of Reverie's systems it has clip.")
    if format == "transformers":
        return MODEL, *clip_transformers.write(config)
    own = tokenizer is not None and not (isinstance(tokenizer, Bpe) and tokenizer.is_clip())
    return clip_open_clip.MODEL, *clip_open_clip.write(config, own_words=own)


def load(name_or_path: str | Path, *, systems: Systems, config: dict[str, Any] | None = None) -> nn.Module:
    """The system of a shipped name, a folder or a checkpoint, on the CPU, in its own precision, in eval mode.

    A folder is one that `save` wrote in any format, or that transformers or open_clip wrote. A checkpoint alone is a
    safetensors file under open_clip's or OpenAI's names; `config`, plain data, says what it is where the file does
    not. Raises `ModelFileError` (an `InputError`) in one sentence.
    """
    place = find(name_or_path)
    if config is not None and place.is_dir():
        raise ModelFileError(
            f"{shorten(str(place))} has a config of its own; config= is for a checkpoint file."
        )
    weights = [place] if place.is_file() else _weights(place)
    what = (
        weights[0].name if len(weights) == 1 else f"{weights[0].name} and its {len(weights) - 1} companions"
    )
    entries = files.headers(weights)
    name, values, foreign = _described(place, weights, entries, config)
    system_class = _choose(systems, name, what="system")()
    made = config_from(_config_class(system_class), values, where=f"the config of {name!r}")
    parts: tuple[Any, ...] = (made,)
    if "tokenizer" in inspect.signature(system_class).parameters:
        parts = (made, _tokenizer(place, values, foreign))

    try:
        with torch.random.fork_rng(devices=[]), _Within(entries):
            system = system_class(*parts)
    except InputError as error:
        raise ModelFileError(f"{place.name} describes a {name!r} that cannot be built: {error}") from error
    except Exception as error:
        # Values of the right type can still contradict each other in ways that only the constructor notices.
        raise ModelFileError(
            f"{place.name} describes a {name!r} that cannot be built; correct its config."
        ) from error

    outline = system.state_dict()
    expected = files.expectation(outline)
    if foreign is None:
        tensors = files.read(weights[0], expected=expected)
    else:
        # The table backwards says what their file must hold, so theirs too is checked before it is read.
        theirs = dict(files.expectation(remap.apply(remap.invert(foreign.table), outline)))
        ignored = remap.matching(foreign.ignore, entries)
        theirs |= {key: (entries[key].shape, files.family(entries[key].dtype)) for key in ignored}
        files.check({key: (e.shape, files.family(e.dtype)) for key, e in entries.items()}, theirs, what=what)
        # A mask, full of minus infinity, is none of the weights that must be finite.
        read = (files.read(file, without=ignored) for file in weights)
        tensors = {key: value for part in read for key, value in part.items()}
        tensors = remap.apply(foreign.table, tensors, expected=expected, ignore=foreign.ignore)
    system.load_state_dict(tensors, strict=True)
    return system.eval()


def _described(
    place: Path, weights: list[Path], entries: Mapping[str, files.Entry], config: dict[str, Any] | None
) -> tuple[str, Any, Foreign | None]:
    """The system's name, its config as plain data, and, where the files are somebody else's, how they are laid out."""
    if place.is_file():
        if not clip_open_clip.is_theirs(entries):
            raise ModelFileError(
                f"{place.name} alone does not say what it holds; give the folder it lies in, with its {CONFIG}."
            )
        foreign = clip_open_clip.read_alone(entries, config, what=place.name)
    elif weights[0].name == clip_open_clip.MODEL or not (place / CONFIG).exists():
        records = {clip_open_clip.CONFIG: _read_json(place / clip_open_clip.CONFIG)}
        foreign = clip_open_clip.read(records, entries)
    else:
        record = _read_json(place / CONFIG)
        if not isinstance(record, dict) or "system" in record or "model_type" not in record:
            return *_own(record, place), None
        beside = [file for file in clip_transformers.RECORDS if (place / file).exists()]
        foreign = clip_transformers.read({file: _read_json(place / file) for file in beside})
    return foreign.system, foreign.values, foreign


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the parts that an index lists."""
    for name in (MODEL, clip_open_clip.MODEL):
        if (folder / name).exists():
            return [folder / name]
    index = folder / f"{MODEL}.index.json"
    record = _read_json(index, most=INDEX_BYTES)
    parts = record.get("weight_map") if isinstance(record, dict) else None
    names = sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []
    if not names or not all(re.fullmatch(r"[\w-]+(\.[\w-]+)*\.safetensors", name) for name in names):
        raise ModelFileError(f"{index.name} does not list safetensors files beside it; fetch it again.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ModelFileError(
            f"{shorten(str(folder))} lacks {absent[0]} and {len(absent) - 1} other parts of its weights; fetch them."
        )
    return [folder / name for name in names]


def find(name_or_path: str | Path) -> Path:
    """The folder of a shipped name, a folder that holds a system, or a safetensors file. Raises `ModelFileError`."""
    own = isinstance(name_or_path, str) or (isinstance(name_or_path, Path) and not name_or_path.exists())
    if own and str(name_or_path) in shipped():
        return SHIPPED / str(name_or_path)
    holds = f"a folder must hold {CONFIG} or {clip_open_clip.CONFIG}, and {MODEL}, its parts or {clip_open_clip.MODEL}"
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise ModelFileError(f"{name_or_path!r:.60} is no folder and no shipped name; {holds}.")
    path = Path(name_or_path)
    shown = shorten(str(path))
    if path.suffix.lower() in files.PICKLES:
        raise ModelFileError(files.pickle_message(path.name))
    try:
        is_file = path.is_file()
        present = {entry.name for entry in path.iterdir()} if path.is_dir() else None
    except (OSError, ValueError):  # too long, or with a NUL byte, or forbidden
        is_file, present = False, None
    if is_file:
        if path.suffix.lower() != ".safetensors":
            raise ModelFileError(f"{shown} is no safetensors file; give one, or a folder: {holds}.")
        return path
    if present is None:
        names = ", ".join(shipped()) or "none"
        raise ModelFileError(f"{shown} is neither a folder nor a shipped name (shipped: {names}); {holds}.")
    weights = present & {MODEL, f"{MODEL}.index.json", clip_open_clip.MODEL}
    if not weights and (old := sorted(n for n in present if Path(n).suffix.lower() in files.PICKLES)):
        raise ModelFileError(
            f"{shown} holds its weights in the pickle {shorten(old[0])}, which can run code when it is loaded, so"
            f" Reverie never loads one; run `reverie convert {shorten(old[0])} {MODEL}` in that folder and load it"
            " again."
        )
    configs = present & {CONFIG, clip_open_clip.CONFIG}
    absent = [name for name, found in ((CONFIG, configs), (MODEL, weights)) if not found]
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
        inner = [argument for argument in arguments if argument is not type(None)]
        return _value(inner[0] if len(inner) == 1 else _kind(inner, value, where), value, where=where)
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


def _kind(choices: list[type], value: Any, where: str) -> type:
    """Of several config dataclasses the one whose `kind` the value names; the first if it names none."""
    kinds = {choice.kind: choice for choice in choices}  # type: ignore[attr-defined]
    kind = value.get("kind", choices[0].kind) if isinstance(value, dict) else choices[0].kind  # type: ignore[attr-defined]
    if not isinstance(kind, str) or kind not in kinds:
        raise ModelFileError(f"{where}, 'kind' is {shorten(kind)}; use one of {', '.join(map(repr, kinds))}.")
    return kinds[kind]


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


def _tokenizer(place: Path, values: Any, foreign: Foreign | None) -> Any:
    """The tokenizer that lies beside the weights; CLIP's own where open_clip leaves it out because it is that."""
    if place.is_dir() and ((place / TOKENIZER).exists() or (place / "vocab.json").exists()):
        return read_tokenizer(place)
    text = values["text"] if foreign is not None else {}
    from_open_clip = place.is_file() or (place / clip_open_clip.CONFIG).exists()
    return Bpe.clip() if from_open_clip and text.get("vocab") == 49_408 and not foreign.own_words else None  # type: ignore[union-attr]


def _read_json(path: Path, *, most: int = CONFIG_BYTES) -> Any:
    _sized(path, most)
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
            raise ModelFileError("it asks for more numbers than its weights hold.")

    def _count_tensor(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.tensors -= 1
            if self.tensors < 0:
                raise ModelFileError("it has many more parts than its weights.")

    def _count_module(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.modules -= 1
            if self.modules < 0:
                raise ModelFileError("it has many more parts than its weights.")
