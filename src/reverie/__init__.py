"""Reverie: from CLIP to Sora as small parts. `reverie.load` and `reverie.save` are the way in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reverie.catalog import load, save

__version__ = "0.1.0"
__all__ = ["__version__", "load", "save"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `import reverie` and `reverie --help` stay quick.
    if name in ("load", "save"):
        from reverie import catalog

        return getattr(catalog, name)
    raise AttributeError(f"module 'reverie' has no attribute {name!r}")
