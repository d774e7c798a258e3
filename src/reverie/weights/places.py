"""Where a model lies: a file or a folder, whose naming it is, its JSON files and its files of weights.

    reverie        config.json {"reverie", "system", "config"}, model.safetensors
    transformers   config.json {"model_type"}, model.safetensors or its parts
    open_clip      open_clip_config.json, open_clip_model.safetensors
    diffusers      config.json {"_class_name"}, diffusion_pytorch_model.safetensors or its parts
    pipeline       model_index.json, and folders of diffusers: transformer/, vae/, scheduler/, ...
    original       a safetensors file alone, with the names of the authors' own code

Nothing in a file names a module, a path or a switch. Parts of weights are those that an index lists beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reverie.weights import blip2_transformers, clip_open_clip, clip_transformers, files
from reverie.weights.files import ModelFileError, shorten

SHIPPED = Path(__file__).parent / "shipped"
CONFIG, MODEL, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
PIPELINE, DIFFUSERS = "model_index.json", "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
CONFIG_BYTES, INDEX_BYTES = 2**20, 2**24
HOLDS = (
    f"a folder must hold {PIPELINE}, or {CONFIG} or {clip_open_clip.CONFIG} beside {MODEL}, {DIFFUSERS}, the parts of"
    f" one, or {clip_open_clip.MODEL}"
)
VARIANT = re.compile(r"diffusion_pytorch_model\.\w+\.safetensors")  # diffusers' "fp16" and its like

Kind = Literal["reverie", "transformers", "open_clip", "diffusers", "pipeline", "original"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """records: JSON files by path in the folder. weights: each file, and what comes before the names in it."""

    path: Path
    kind: Kind
    records: dict[str, Any] = field(default_factory=dict)
    weights: dict[Path, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """Its weights, as messages call them."""
        first, *others = (path.name for path in self.weights)
        return first if not others else f"{self.path.resolve().name}, in {len(self.weights)} files,"


def shipped() -> list[str]:
    """The names of the weights that came with Reverie."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def survey(name_or_path: str | Path) -> Place:
    """What lies there, by names and JSON files alone. Raises `ModelFileError`."""
    path = find(name_or_path)
    if path.is_file():
        return Place(path=path, kind="original", weights={path: ""})
    if (path / PIPELINE).exists():
        return _pipeline(path)
    if not (path / CONFIG).exists() or clip_open_clip.MODEL in _present(path):
        records = {clip_open_clip.CONFIG: read_json(path / clip_open_clip.CONFIG)}
        return Place(
            path=path, kind="open_clip", records=records, weights=dict.fromkeys(_weights(path, MODEL), "")
        )
    record = read_json(path / CONFIG)
    said = record if isinstance(record, dict) else {}
    if "_class_name" in said:
        weights = dict.fromkeys(_weights(path, DIFFUSERS), "")
        return Place(path=path, kind="diffusers", records={CONFIG: record}, weights=weights)
    weights = dict.fromkeys(_weights(path, MODEL), "")
    if "system" in said or "model_type" not in said:
        return Place(path=path, kind="reverie", records={CONFIG: record}, weights=weights)
    beside = [
        file for file in (*clip_transformers.RECORDS, blip2_transformers.GENERATION) if (path / file).exists()
    ]
    records = {file: read_json(path / file) for file in beside}
    return Place(path=path, kind="transformers", records=records, weights=weights)


def find(name_or_path: str | Path) -> Path:
    """The folder of a shipped name, a folder that holds a model, or a safetensors file. Raises `ModelFileError`."""
    own = isinstance(name_or_path, str) or (isinstance(name_or_path, Path) and not name_or_path.exists())
    if own and str(name_or_path) in shipped():
        return SHIPPED / str(name_or_path)
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise ModelFileError(f"{name_or_path!r:.60} is no folder and no shipped name; {HOLDS}.")
    path = Path(name_or_path)
    shown = shorten(str(path))
    if path.suffix.lower() in files.PICKLES:
        raise ModelFileError(files.pickle_message(path.name))
    try:
        is_file = path.is_file()
        present = _present(path) if path.is_dir() else None
    except (OSError, ValueError):  # too long, or with a NUL byte, or forbidden
        is_file, present = False, None
    if is_file:
        if path.suffix.lower() != ".safetensors":
            raise ModelFileError(f"{shown} is no safetensors file; give one, or a folder: {HOLDS}.")
        return path
    if present is None:
        names = ", ".join(shipped()) or "none"
        raise ModelFileError(f"{shown} is neither a folder nor a shipped name (shipped: {names}); {HOLDS}.")
    if PIPELINE in present:
        return path
    weights = _models(present)
    _refuse_pickles(shown, present, weights)
    configs = present & {CONFIG, clip_open_clip.CONFIG}
    absent = [name for name, found in ((CONFIG, configs), (MODEL, weights)) if not found]
    if absent:
        raise ModelFileError(f"{shown} lacks {' and '.join(absent)}: {HOLDS}.")
    return path


def read_json(path: Path, *, most: int = CONFIG_BYTES) -> Any:
    """A JSON file of at most so many bytes. Raises `ModelFileError`."""
    if not path.is_file():
        raise ModelFileError(f"{path.name} in {shorten(str(path.parent))} is not a regular file; save again.")
    if path.stat().st_size > most:
        raise ModelFileError(
            f"{path.name} has {path.stat().st_size:,} bytes, more than the limit of {most:,}."
        )
    return files.load_json(path.read_bytes(), what=path.name, infinite=path.name == Path(SCHEDULER).name)


def _pipeline(path: Path) -> Place:
    """A pipeline of diffusers: the components that hold a config, and the weights of those that are diffusers' own."""
    index = read_json(path / PIPELINE)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelFileError(
            f"{PIPELINE} in {shorten(str(path))} does not say which pipeline it is; fetch it again."
        )
    records: dict[str, Any] = {PIPELINE: index}
    weights: dict[Path, str] = {}
    if (path / SCHEDULER).exists():
        records[SCHEDULER] = read_json(path / SCHEDULER)
    for name, said in index.items():
        if not re.fullmatch(r"[a-z]\w*", name) or not isinstance(said, list) or said[:1] != ["diffusers"]:
            continue
        folder = path / name
        if name == "scheduler" or not (folder / CONFIG).exists():
            continue
        _refuse_pickles(f"{shorten(str(path))}, {name},", _present(folder), _models(_present(folder)))
        records[f"{name}/{CONFIG}"] = read_json(folder / CONFIG)
        weights |= dict.fromkeys(_weights(folder, DIFFUSERS), f"{name}.")
    if not weights:
        raise ModelFileError(
            f"{shorten(str(path))} is a pipeline without any weights; fetch its folders too."
        )
    return Place(path=path, kind="pipeline", records=records, weights=weights)


def _weights(folder: Path, model: str) -> list[Path]:
    """The safetensors files of a folder: one, or the parts that an index lists."""
    for name in (model, clip_open_clip.MODEL):
        if (folder / name).exists():
            return [folder / name]
    index = folder / f"{model}.index.json"
    if not index.exists():
        variants = sorted(name for name in _present(folder) if VARIANT.fullmatch(name))
        if variants:
            return [folder / variants[0]]
        raise ModelFileError(
            f"{shorten(str(folder))} lacks {model}, or {index.name} and the parts that it lists."
        )
    record = read_json(index, most=INDEX_BYTES)
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


def _present(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _models(present: Iterable[str]) -> set[str]:
    wanted = {MODEL, f"{MODEL}.index.json", DIFFUSERS, f"{DIFFUSERS}.index.json", clip_open_clip.MODEL}
    return {name for name in present if name in wanted or VARIANT.fullmatch(name)}


def _refuse_pickles(shown: str, present: set[str], weights: set[str]) -> None:
    old = sorted(name for name in present if Path(name).suffix.lower() in files.PICKLES)
    if old and not weights:
        model = DIFFUSERS if old[0].startswith(DIFFUSERS.split(".")[0]) else MODEL
        raise ModelFileError(
            f"{shown} holds its weights in the pickle {shorten(old[0])}, which can run code when it is loaded, so"
            f" Reverie never loads one; run `reverie convert {shorten(old[0])} {model}` in that folder and load it"
            " again."
        )
