"""Public libraries that benchmarks run beside ours, imported only when a benchmark asks for them."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

MISSING = "open_clip is missing: `pip install --no-deps open_clip_torch timm torchvision` beside Reverie, then again."


@cache
def torchvision_loads() -> None:
    """open_clip and transformers import torchvision; its operators, which no benchmark calls, need not load."""
    warnings.filterwarnings("ignore", module="timm")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        global _operators  # torch forgets a library that nobody holds
        _operators = torch.library.Library("torchvision", "DEF")
        _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def webdataset() -> Any:
    """The package. SystemExit: it is not there."""
    try:
        import webdataset
    except ImportError as error:
        raise SystemExit(
            f"webdataset is missing: `pip install webdataset` beside Reverie. ({error})"
        ) from error
    return webdataset


def open_clip() -> Any:
    """The package. SystemExit: it is not there."""
    torchvision_loads()
    try:
        import open_clip
    except ImportError as error:
        raise SystemExit(f"{MISSING} ({error})") from error
    return open_clip
