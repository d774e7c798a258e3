"""The one exception that means "the user can mend this": the command line prints it and exits with code 2."""

from __future__ import annotations


class InputError(ValueError):
    """One sentence: what was wrong, with the value, and what to do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that the memory has ended, for which torch has no class of its own on a CPU."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    )
