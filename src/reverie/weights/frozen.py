"""Frozen parts of a system that its folder does not repeat: it names the model that they came from, and their hash.

A system whose constructor takes such a part says in `config.sources()` where each came from: `model`, a shipped name or
a folder, and `hash`. An "image" is the image tower of a model of Reverie's, a "language" a folder of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from reverie.backbones.language import Language
from reverie.errors import InputError
from reverie.weights.files import ModelFileError, shorten

NAMES = {"image": "image tower", "language": "language model"}


def tower(system: nn.Module, *, where: str | Path) -> nn.Module:
    """The image tower of a CLIP, a BLIP or a BLIP-2. InputError: it has none."""
    found = getattr(system, "image", None) or getattr(getattr(system, "sight", None), "image", None)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{shorten(str(where))} is a {type(system).__name__} without an image tower: name a CLIP, or a BLIP-2."
        )
    return found


def resolved(
    config: Any, *, load: Callable[[str], nn.Module], hash_of: Callable[[nn.Module], str], where: str
) -> dict[str, nn.Module]:
    """The parts that `config` names, by the constructor's argument. Raises `ModelFileError`: gone, or another one."""
    found: dict[str, nn.Module] = {}
    for name, source in config.sources().items() if hasattr(config, "sources") else ():
        if not source.model:
            continue
        what = f"the {NAMES[name]} of {where}"
        mend = f"put it back, or write where it lies now into {where}'s config.json"
        try:
            if name == "language":
                found[name] = _as_was(Language.read(source.model, end=config.language.end), config.language)
            else:
                found[name] = tower(load(source.model), where=source.model)
        except InputError as error:
            raise ModelFileError(
                f"{what} came from {shorten(source.model)}, which cannot be loaded ({error}); {mend}."
            ) from error
        if (now := hash_of(found[name])) != source.hash:
            raise ModelFileError(
                f"{what} came from {shorten(source.model)}, which holds other weights now (hash {now}, not"
                f" {shorten(source.hash)}); {mend}."
            )
    return found


def names_others(values: Any) -> bool:
    """Whether a config as plain data names a model that a part came from."""
    if not isinstance(values, dict):
        return False
    return any(
        (key.endswith("source") and isinstance(value, dict) and bool(value.get("model")))
        or names_others(value)
        for key, value in values.items()
    )


def _as_was(language: Language, config: Any) -> Language:
    language.config = dataclasses.replace(language.config, pad=config.pad)
    return language
