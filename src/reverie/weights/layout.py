"""What a public weight format says of a system, and how values of a stranger's config file are read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from reverie.weights.files import ModelFileError, shorten
from reverie.weights.remap import Rule

# Mean and std of colours in [0, 1] where a format leaves them out: CLIP's, and a half for SigLIP's.
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
LAYERS = 1000  # the most of a stack for which a table is written out, before the weights are looked at


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A system in somebody else's layout: its name here, its config as plain data, and the table of its names."""

    system: str
    values: dict[str, Any]
    table: tuple[Rule, ...]  # their names -> ours
    ignore: tuple[str, ...] = ()  # of their tensors, those that are no weights
    own_words: bool = False  # the tokenizer is named, so it is not the format's usual one


class Fields:
    """One object of a config file, read key by key: wrong types are refused in one sentence."""

    def __init__(self, record: Any, *, where: str):
        if not isinstance(record, dict):
            raise ModelFileError(f"{where} is {shorten(record)}; it must be an object of named values.")
        self.record, self.where = record, where

    def integer(self, key: str, default: int, *, most: int = 2**24) -> int:
        value = self.record.get(key, default)
        if type(value) is not int or not 0 < value <= most:
            raise ModelFileError(
                f"{self.where} gives {key} as {shorten(value)}; Reverie reads one whole number from 1 to {most:,}."
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self.record.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ModelFileError(f"{self.where} gives {key} as {shorten(value)}; it must be a finite number.")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.record.get(key, default)
        if type(value) is not bool:
            raise ModelFileError(f"{self.where} gives {key} as {shorten(value)}; it must be true or false.")
        return value

    def choice(self, key: str, default: Any, known: Mapping[Any, str]) -> str:
        """Our word for one of theirs."""
        value = self.record.get(key, default)
        if not isinstance(value, str | int) or value not in known:
            raise ModelFileError(
                f"{self.where} gives {key} {shorten(value)}; known are {', '.join(map(str, known))}."
            )
        return known[value]

    def colour(self, key: str, default: tuple[float, ...]) -> list[float]:
        value = self.record.get(key, list(default))
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = [float(value)] * 3
        if not isinstance(value, list) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
            raise ModelFileError(f"{self.where} gives {key} as {shorten(value)}; it must be three numbers.")
        return [float(v) for v in value]

    def part(self, key: str) -> Fields:
        return Fields(self.record.get(key, {}), where=f"{key} of {self.where}")

    def only(self, known: Collection[str]) -> None:
        """ModelFileError: a key that is neither known nor off."""
        for key, value in self.record.items():
            if key not in known and value not in (None, False):
                raise ModelFileError(
                    f"{self.where} asks for {shorten(key)} ({shorten(value)}), which Reverie does not know: numbers may"
                    " differ, so it is refused."
                )

    def unlike(self, required: Mapping[str, tuple[Any, ...]]) -> None:
        """ModelFileError: a key has none of the values that Reverie can follow (absent counts as the first)."""
        for key, allowed in required.items():
            value = self.record.get(key, allowed[0])
            if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
                raise ModelFileError(
                    f"{self.where} gives {key} as {shorten(value)}, which no model of Reverie has; it must be"
                    f" {' or '.join(map(repr, allowed))}."
                )


def inside(hidden: int, width: int) -> int | None:
    """Channels inside an MLP as our configs say them: None where they are the usual 4 x width."""
    return None if hidden == 4 * width else hidden


def ratio(hidden: int, width: int) -> float:
    """hidden / width such that int(width * ratio) is hidden again."""
    found = hidden / width
    return found if int(width * found) == hidden else math.nextafter(found, math.inf)
