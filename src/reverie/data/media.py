"""Media files as tensors; `reverie.media` says what is read, how, and within which limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reverie.media import LIMITS, Limits, MediaError, Part, Probe, decode_array, probe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LIMITS", "Limits", "MediaError", "Part", "Probe", "decode", "probe"]


def decode(
    path: str | Path | Part,
    *,
    size: int | tuple[int, int] | None = None,
    frames: int | None = None,
    fit: str = "crop",
    limits: Limits = LIMITS,
) -> Tensor:
    """The pixels of a file: uint8 `f 4 h w` (RGBA, sRGB), resized and chosen as `decode_array` says.

    Raises MediaError (an InputError) when the file is not media, damaged, or beyond `limits`.
    """
    import torch
    from einops import rearrange

    pixels = decode_array(path, size=size, frames=frames, fit=fit, limits=limits)
    return rearrange(torch.from_numpy(pixels), "f h w c -> f c h w")
