"""`reverie chat`: questions about one picture, in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reverie.errors import InputError


def talk(system: Any, picture: Path, questions: Iterable[str], **how: Any) -> Iterator[tuple[str, str]]:
    """Each question with its answer, which `system.chat` gives in knowledge of the turns before. `how`: as it takes it.

    The picture is opened once. InputError: it cannot be opened, or a question is empty.
    """
    image, turns = system.sight.prepare([picture]), []
    for question in questions:
        if not question.strip():
            raise InputError("a question is empty: ask something about the picture.")
        turns.append(question.strip())
        turns.append(system.chat(image, turns, **how))
        yield turns[-2], turns[-1]
