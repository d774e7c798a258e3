"""What every `embed_text` takes besides tokens: a list of strings."""

from __future__ import annotations

from collections.abc import Iterable

from reverie.errors import InputError


def strings(what: str, texts: Iterable[str]) -> list[str]:
    """A list of one string or more, which one string alone is not. InputError: it is none; `what` names it."""
    if isinstance(texts, str):
        raise InputError(f"{what} must be a list of strings, but is the string {texts!r}: write [{texts!r}].")
    if not isinstance(texts, Iterable):
        raise InputError(f"{what} must be a list of strings, but is {texts!r:.60}.")
    texts = list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} must be a list of one string or more, but is {texts!r:.60}.")
    return texts
