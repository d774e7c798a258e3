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
import hashlib
import inspect
import json
import math
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
from reverie.encoders import umt5
from reverie.errors import InputError
from reverie.nn.lora import adapted
from reverie.nn.quantised import Int8Linear
from reverie.weights import (
    blip2_lavis,
    blip2_transformers,
    blip_original,
    blip_transformers,
    clip_open_clip,
    clip_transformers,
    diffusers,
    dit_original,
    dvae_openai,
    files,
    frozen,
    mdt_original,
    remap,
    shards,
    vae_diffusers,
    video_vae_wan,
    vqgan_taming,
)
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import Foreign
from reverie.weights.places import CONFIG, DIFFUSERS, MODEL, PIPELINE, TOKENIZER, Place, survey

# What folders of models hold beside weights and config: a new model must not be read with an old one's.
BESIDE = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model",
    *clip_transformers.RECORDS[1:], *blip2_transformers.RECORDS[1:],
)  # fmt: skip
INTEGER = 2**24
BLIPS = ("blip", "blip-vqa", "blip2", "blip2-language")  # that transformers has
FORMATS = ("reverie", "transformers", "open_clip", "diffusers", "salesforce", "lavis")
# Files under their authors' own names: what knows one, and what reads it.
ORIGINALS: tuple[tuple[Callable[..., bool], Callable[..., Foreign]], ...] = (
    (blip2_lavis.is_theirs, blip2_lavis.read_alone),
    (clip_open_clip.is_theirs, clip_open_clip.read_alone),
    (video_vae_wan.is_original, video_vae_wan.read_alone),
    (dvae_openai.is_theirs, dvae_openai.read_alone),
    (
        vqgan_taming.is_theirs,
        vqgan_taming.read_alone,
    ),  # before the autoencoder, whose names are among VQGAN's
    (vae_diffusers.is_theirs, vae_diffusers.read_alone),
    (mdt_original.is_theirs, mdt_original.read_alone),  # before DiT, whose names are among MDT's
    (dit_original.is_theirs, dit_original.read_alone),
    (blip_original.is_theirs, blip_original.read_alone),
)

Systems = Mapping[str, Callable[[], type[nn.Module]]]


def save(
    system: nn.Module,
    folder: str | Path,
    *,
    name: str,
    version: str,
    dtype: torch.dtype | None = None,
    format: Literal["reverie", "transformers", "open_clip", "diffusers", "salesforce", "lavis"] = "reverie",
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
    models = present & {MODEL, clip_open_clip.MODEL, DIFFUSERS, PIPELINE}
    if not models and (others := present & {CONFIG, TOKENIZER, clip_open_clip.CONFIG}):
        raise InputError(f"{folder} holds a {min(others)} of something else than a model; give a new folder.")
    if adapters := [layer for layer, _ in adapted(system)]:
        raise InputError(
            f"{adapters[0]} and {len(adapters) - 1} other layers have adapters: merge_lora(system) first."
        )
    config = dataclasses.asdict(system.config)  # type: ignore[call-overload]  # a module may hold anything
    if any(isinstance(module, Int8Linear) for module in system.modules()):
        raise InputError("a model in eight bits is for sampling: load it without quantise to save it.")
    tokenizer = getattr(system, "tokenizer", None)
    reader = getattr(system, "reader", None)
    tensors: Mapping[str, Tensor] = system.state_dict()
    if reader is None and umt5.lies_in(folder):
        raise InputError(f"{folder} holds the text encoder of another model; give a new folder.")
    model, records, table = _layout(format, name, version, config, tokenizer, tensors)
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
    if models:  # a model's folder: no file of the old one may be taken for the new one's
        for old in (PIPELINE, CONFIG, *BESIDE, clip_open_clip.CONFIG, *models - {model}):
            (folder / old).unlink(missing_ok=True)
    for prefix in dict.fromkeys(diffusers.component(key, records) for key in tensors):
        (folder / prefix).mkdir(exist_ok=True)
        part = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items()
                if diffusers.component(key, records) == prefix}  # fmt: skip
        files.write(folder / prefix / model, part, {"format": "pt"})
    if tokenizer is not None:
        # Other libraries must be told what ours reads in the config.
        length = None if format == "reverie" or "text" not in config else config["text"]["length"]
        tokenizer.write(folder / TOKENIZER, length=length)
    if reader is not None:
        reader.write(folder)
        if PIPELINE in records:
            records[PIPELINE] |= umt5.ENTRIES
    last = (CONFIG, clip_open_clip.CONFIG, PIPELINE)
    for file in sorted(records, key=lambda file: file in last):
        (folder / file).parent.mkdir(exist_ok=True)
        disk.write(folder / file, json.dumps(records[file], indent=2, allow_nan=False) + "\n")
    return folder


def _layout(
    format: str,
    name: str,
    version: str,
    config: dict[str, Any],
    tokenizer: Any,
    tensors: Mapping[str, Tensor],
) -> tuple[str, dict[str, Any], tuple[remap.Rule, ...] | None]:
    """A format's file of weights, its JSON files, and its table (None: ours)."""
    if format == "reverie":
        return MODEL, {CONFIG: {"reverie": version, "system": name, "config": config}}, None
    if format == "diffusers":
        return DIFFUSERS, *diffusers.write(name, config, tensors)
    if format == "salesforce" and name in ("blip", "blip-vqa", "blip-nlvr"):
        return MODEL, {}, blip_original.write(name, config)
    if name == "blip2" and format == "lavis":
        return MODEL, {}, blip2_lavis.write(config)
    if format == "lavis":
        raise InputError(f"LAVIS has no {name!r} that Reverie writes; of Reverie's systems it has blip2.")
    if format == "transformers" and name in BLIPS:
        theirs = blip2_transformers if name.startswith("blip2") else blip_transformers
        return MODEL, *theirs.write(name, config, tensors)
    if name != "clip":
        others = f", {', '.join(BLIPS)}" if format == "transformers" else ""
        raise InputError(f"{format} has no {name!r}; of Reverie's systems it has clip{others}.")
    if format == "transformers":
        return MODEL, *clip_transformers.write(config)
    own = tokenizer is not None and not (isinstance(tokenizer, Bpe) and tokenizer.is_clip())
    return clip_open_clip.MODEL, *clip_open_clip.write(config, own_words=own)


def hash_of(system: nn.Module) -> str:
    """16 hexadecimal digits of every weight (name, type, shape, bytes), wherever and however it was stored.

    Half precision counts as the same numbers in single: weights stored so and loaded in either have one hash. Parts
    that are kept elsewhere (frozen.py) count by theirs.
    """
    whole = hashlib.sha256()
    sources: dict[str, Any] = getattr(getattr(system, "config", None), "sources", dict)()
    for name, source in sorted(sources.items()):
        whole.update(f"\n{name} {source.hash}\n".encode() if source.model else b"")
    for name, value in sorted(system.state_dict().items()):
        value = value.detach().cpu().contiguous()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
        whole.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


def load(
    name_or_path: str | Path,
    *,
    systems: Systems,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    quantise: str | None = None,
) -> nn.Module:
    """The system of a shipped name, a folder or a checkpoint, on the CPU, in eval mode.

    A folder is one that `save` wrote in any format, or that transformers, open_clip or diffusers wrote
    (weights/places.py). A checkpoint alone is a safetensors file under its authors' own names; `config`, plain data,
    says what it is where the file does not. The weights are in the system's own precision, or as `dtype` and `quantise`
    say (weights/shards.py), and come tensor by tensor. Raises `ModelFileError` (an `InputError`) in one sentence.
    """
    place = survey(name_or_path)
    if config is not None and place.kind != "original":
        raise ModelFileError(
            f"{shorten(str(place.path))} has a config of its own; config= is for a checkpoint file."
        )
    with files.Shards(place.weights) as weights:
        name, values, foreign = _described(place, weights.entries, config)
        system_class = _choose(systems, name, what="system")()
        made = config_from(_config_class(system_class), values, where=f"the config of {name!r}")
        parts: tuple[Any, ...] = (made,)
        if "tokenizer" in inspect.signature(system_class).parameters:
            parts = (made, _tokenizer(place, values, foreign))
        elsewhere = frozen.resolved(made, load=_source_of(systems), hash_of=hash_of, where=place.path.name)
        system = _built(system_class, parts, name, place, weights.entries, elsewhere)
        table, ignored = _agreed(system, foreign, weights.entries, place)
        shards.fill(system, weights, table=table, ignored=ignored, dtype=dtype, quantise=quantise)
    if hasattr(system, "reader") and umt5.lies_in(place.path):
        system.reader = umt5.Umt5(place.path, dtype=dtype, quantise=quantise)  # type: ignore[assignment]
    return system.eval()


def _source_of(systems: Systems) -> Callable[[str], nn.Module]:
    """`load` of what another model names, which may not name a further one: that chain could be a ring."""

    def read(model: str) -> nn.Module:
        place = survey(model)
        record = place.records.get(CONFIG)
        said = record.get("config") if isinstance(record, dict) else None
        if place.kind == "reverie" and frozen.names_others(said):
            raise ModelFileError(f"{shorten(model)} has its own frozen parts elsewhere; name where they lie")
        return load(model, systems=systems)

    return read


def _built(
    system_class: type[nn.Module],
    parts: tuple[Any, ...],
    name: str,
    place: Place,
    entries: files.Entries,
    elsewhere: Mapping[str, nn.Module],
) -> nn.Module:
    """The system, undrawn, within what its files hold, and with the parts that they do not."""
    try:
        with torch.random.fork_rng(devices=[]), _Within(entries):
            return system_class(*parts, **elsewhere)
    except InputError as error:
        raise ModelFileError(
            f"{place.path.name} describes a {name!r} that cannot be built: {error}"
        ) from error
    except Exception as error:
        # Values of the right type can still contradict each other in ways that only the constructor notices.
        raise ModelFileError(
            f"{place.path.name} describes a {name!r} that cannot be built; correct its config."
        ) from error


def _agreed(
    system: nn.Module, foreign: Foreign | None, entries: files.Entries, place: Place
) -> tuple[remap.Table | None, set[str]]:
    """Once all names and shapes fit: the table, and the tensors that are no weights."""
    outline = system.state_dict()
    found = {key: (entry.shape, files.family(entry.dtype)) for key, entry in entries.items()}
    if foreign is None:
        files.check(found, files.expectation(outline), what=place.what)
        return None, set()
    # The table backwards says what their file must hold, so theirs too is checked before it is read.
    theirs = remap.outlined(remap.invert(foreign.table), outline)
    ignored = remap.matching(foreign.ignore, entries)
    files.check(found, theirs | {key: found[key] for key in ignored}, what=place.what)
    return foreign.table, ignored


def _described(
    place: Place, entries: Mapping[str, files.Entry], config: dict[str, Any] | None
) -> tuple[str, Any, Foreign | None]:
    """The system's name, its config as plain data, and, where the files are somebody else's, how they are laid out."""
    if place.kind == "reverie":
        return *_own(place.records[CONFIG], place.path), None
    if place.kind == "original":
        for known, read_alone in ORIGINALS:
            if known(entries):
                foreign = read_alone(entries, config, what=place.path.name)
                break
        else:
            raise ModelFileError(
                f"{place.path.name} alone does not say what it holds; give the folder it lies in, with its {CONFIG}."
            )
    elif place.kind == "open_clip":
        foreign = clip_open_clip.read(place.records, entries)
    elif place.kind == "transformers" and blip2_transformers.is_theirs(place.records[CONFIG]):
        foreign = blip2_transformers.read(place.records, entries)
    elif place.kind == "transformers" and place.records[CONFIG].get("model_type") == blip_transformers.KIND:
        foreign = blip_transformers.read(place.records, entries)
    elif place.kind == "transformers":
        foreign = clip_transformers.read(place.records)
    else:
        foreign = diffusers.read(place.records, entries)
    return foreign.system, foreign.values, foreign


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


def _tokenizer(place: Place, values: Any, foreign: Foreign | None) -> Any:
    """The tokenizer that lies beside the weights; CLIP's own where open_clip leaves it out because it is that."""
    path = place.path
    if path.is_dir() and ((path / TOKENIZER).exists() or (path / "vocab.json").exists()):
        return read_tokenizer(path)
    text = values.get("text", {}) if foreign is not None else {}
    from_open_clip = place.kind == "original" or (path / clip_open_clip.CONFIG).exists()
    return Bpe.clip() if from_open_clip and text.get("vocab") == 49_408 and not foreign.own_words else None  # type: ignore[union-attr]


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
        if func in self.DRAWN or (func is Tensor.zero_ and isinstance(args[0], nn.Parameter)):
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
