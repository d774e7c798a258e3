"""Pickled modules without their code: every class in the file is an inert thing that remembers its state.

Of what a pickle names only what makes tensors is itself: an ordered dictionary, a storage's type, and the functions
that put a tensor together. Everything else becomes `Thing`, whatever it is called; calling one gives another. So
nothing of the file is run, and its author's package is not needed. It runs in the confined child of convert.py alone.
"""

from __future__ import annotations

import collections
import pickle
from types import SimpleNamespace
from typing import IO, Any


class Thing:
    """In the place of any class, function or instance: it takes whatever it is given, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __call__(self, *_: Any, **__: Any) -> Thing:
        return Thing()

    def __setstate__(self, state: Any) -> None:
        self.state = state


def tensors_of(file: IO[bytes], torch: Any) -> dict[str, Any]:
    """The tensors of a pickled `nn.Module`, by their dotted paths; none if the file is something else."""
    allowed = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }
    kinds = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name in {f"{kind}Storage" for kind in kinds}:
                return getattr(torch, name)
            return allowed.get((module, name)) or type("Thing", (Thing,), {})

    file.seek(0)
    reader = SimpleNamespace(Unpickler=Unpickler, load=lambda f, **_: Unpickler(f).load(), loads=None)
    reader.__name__ = "inert"
    try:
        loaded = torch.load(file, map_location="cpu", pickle_module=reader, weights_only=False)
    except (
        Exception
    ):  # whatever a file can make of its own pickle; what it is, the caller has been told already
        return {}
    found: dict[str, Any] = {}
    _collect(loaded, "", found, torch.Tensor, 0)
    return found


def _collect(module: Any, path: str, found: dict[str, Any], tensor: type, depth: int) -> None:
    state = getattr(module, "state", None)
    if not isinstance(module, Thing) or not isinstance(state, dict) or depth > 100:
        return
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, tensor):
                found[f"{path}{name}"] = value.detach()  # type: ignore[attr-defined]  # a tensor
    for name, child in (state.get("_modules") or {}).items():
        _collect(child, f"{path}{name}.", found, tensor, depth + 1)
