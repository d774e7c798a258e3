"""Folders of diffusers: what reads and writes a component or a pipeline, by the class that its JSON file names.

The names of a pipeline's tensors begin with their component's folder: `transformer.`, `vae.`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reverie.errors import InputError
from reverie.weights import dit_diffusers, vae_diffusers, video_vae_wan, wan_diffusers
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import Foreign
from reverie.weights.places import CONFIG, PIPELINE
from reverie.weights.remap import Rule

Records = Mapping[str, Any]  # JSON files by path
Written = tuple[dict[str, Any], tuple[Rule, ...]]


@dataclass(frozen=True, kw_only=True)
class Known:
    """system: its name in the catalogue. write: from our config, and our tensors where their config holds some."""

    system: str
    read: Callable[[Records, Collection[str]], Foreign]  # from the JSON files and the names of the tensors
    write: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Written]


def _video_vae(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Written:
    constants = {name: tensors[name].tolist() for name in video_vae_wan.CONSTANTS}
    record, table = video_vae_wan.write(config, constants)
    return {CONFIG: record}, table


def _vae(config: Mapping[str, Any], _: Mapping[str, Tensor]) -> Written:
    record, table = vae_diffusers.write(config)
    return {CONFIG: record}, table


def _wan(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Written:
    if config["codec"] is None:
        record, table = wan_diffusers.write(config["backbone"])
        return {CONFIG: record}, table
    constants = {name: tensors[name].tolist() for name in wan_diffusers.CONSTANTS}
    return wan_diffusers.write_pipeline(config, constants)


WAN = Known(
    system="wan",
    read=lambda records, _: wan_diffusers.read(records[CONFIG]),
    write=_wan,
)
DIT = Known(system="dit", read=dit_diffusers.read, write=lambda config, _: dit_diffusers.write(config))
KNOWN = {
    vae_diffusers.CLASS: Known(
        system="vae", read=lambda records, names: vae_diffusers.read(records[CONFIG], names), write=_vae
    ),
    **dict.fromkeys((*dit_diffusers.CLASSES, dit_diffusers.PIPELINE_CLASS), DIT),
    wan_diffusers.PIPELINE_CLASS: dataclasses.replace(
        WAN, read=lambda records, _: wan_diffusers.read_pipeline(records)
    ),
    wan_diffusers.CLASS: WAN,
    wan_diffusers.ORIGINAL: WAN,
    video_vae_wan.CLASS: Known(
        system="video-vae",
        read=lambda records, _: video_vae_wan.read(records[CONFIG]),
        write=_video_vae,
    ),
}


def read(records: Records, names: Collection[str]) -> Foreign:
    """From the JSON files of a component's or a pipeline's folder, and the names of its tensors.

    ModelFileError: of a class that is not known.
    """
    file = PIPELINE if PIPELINE in records else CONFIG
    name = records[file]["_class_name"]
    if not isinstance(name, str) or name not in KNOWN:
        raise ModelFileError(f"{file} names diffusers' {shorten(name)}; Reverie reads {', '.join(KNOWN)}.")
    return KNOWN[name].read(records, names)


def write(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Written:
    """The JSON files by path and our table for a system of this name.

    InputError: diffusers has no such model.
    """
    for known in KNOWN.values():
        if known.system == name:
            return known.write(config, tensors)
    systems = dict.fromkeys(known.system for known in KNOWN.values())
    raise InputError(f"diffusers has no {name!r}; of Reverie's systems it has {', '.join(systems)}.")


def component(name: str, records: Records) -> str:
    """The folder of a tensor: its component of a pipeline, or none."""
    first = name.split(".")[0]
    return first if f"{first}/{CONFIG}" in records else ""
