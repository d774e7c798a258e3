"""open_clip without torchvision, which has no build for a CPU: classes that no test calls stand in for it."""

import importlib.machinery
import sys
import types

import pytest


class _Named(type):
    """A class that has every attribute: its own name."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Absent(types.ModuleType):
    """A module of which every name is a class that does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


@pytest.fixture(scope="session")
def open_clip():
    names = ["torchvision"] + [
        f"torchvision.{part}"
        for part in ("ops", "ops.misc", "transforms", "transforms.functional", "datasets", "models", "utils")
    ]
    for name in names:
        module = _Absent(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        return pytest.importorskip("open_clip")
    finally:  # transformers looks whether there is a torchvision
        for name in names:
            del sys.modules[name]
