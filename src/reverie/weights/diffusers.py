"""Folders of diffusers: which module here knows a component or a pipeline, by the class that its JSON file names.

The names of a pipeline's tensors begin with their component's folder: `transformer.`, `vae.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from reverie.errors import InputError
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import Foreign
from reverie.weights.places import CONFIG, PIPELINE
from reverie.weights.remap import Rule

COMPONENTS: dict[str, ModuleType] = {}
PIPELINES: dict[str, ModuleType] = {}


def read(records: Mapping[str, Any]) -> Foreign:
    """From the JSON files of a component's or a pipeline's folder. ModelFileError: of a class that is not known."""
    file, known = (PIPELINE, PIPELINES) if PIPELINE in records else (CONFIG, COMPONENTS)
    name = records[file]["_class_name"]
    if not isinstance(name, str) or name not in known:
        raise ModelFileError(f"{file} names diffusers' {shorten(name)}; Reverie reads {', '.join(known)}.")
    return known[name].read_pipeline(records) if known is PIPELINES else known[name].read(records[CONFIG])


def write(name: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The JSON files by path and our table of a system of this name. InputError: diffusers has no such model."""
    for module in PIPELINES.values():
        if name == module.SYSTEM:
            return module.write_pipeline(config)
    for module in COMPONENTS.values():
        if name == module.SYSTEM:
            record, table = module.write(config)
            return {CONFIG: record}, table
    names = dict.fromkeys(module.SYSTEM for module in (*PIPELINES.values(), *COMPONENTS.values()))
    raise InputError(f"diffusers has no {name!r}; of Reverie's systems it has {', '.join(names)}.")


def component(name: str, records: Mapping[str, Any]) -> str:
    """The folder of a tensor: its component of a pipeline, or none."""
    first = name.split(".")[0]
    return first if f"{first}/{CONFIG}" in records else ""
