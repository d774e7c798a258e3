"""A small copy of a dataset: every picture and clip at one size, to carry to another machine or to ship."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reverie.data.index import FILE, Index
from reverie.errors import InputError
from reverie.media import decode_array, probe
from reverie.progress import track


def shrink(
    index: Index, out: str | Path, *, size: int = 64, frames: int = 16, quality: int = 90, quiet: bool = False
) -> Index:
    """Write the items of `index` as WebP of `size` pixels a side (fitted, transparent around), captions and all.

    Clips keep at most `frames` frames, evenly spaced, and their duration. `quality` is WebP's, for colours and
    transparency alike; 100 loses nothing that shows. Names keep their folders. Raises InputError where `out` already
    holds an index or lies in the folder itself, and where there is nothing to copy.
    """
    out = Path(out)
    if (out / FILE).exists():
        raise InputError(f"{out} already holds an index: name a new folder for the small copy.")
    if out.resolve().is_relative_to(index.folder.resolve()):
        raise InputError(f"{out} lies in the folder to copy, which would then hold all twice: name another.")
    if not len(index):
        raise InputError(f"Nothing in {index.folder} is accepted and wanted: look at `reverie data check`.")
    if not 1 <= quality <= 100:
        raise InputError(f"quality is {quality}: WebP's runs from 1 to 100.")
    items = []
    taken: set[Path] = set()
    for item in track(index, total=len(index), label="shrinking", quiet=quiet):
        pixels = decode_array(index.media(item), size=size, frames=frames, fit="pad")
        data = encode(pixels, fps=item.fps * len(pixels) / item.frames, quality=quality)
        path = (out / item.file_name).with_suffix(".webp")
        if path in taken:  # a.png and a.jpg beside each other
            path = out / f"{item.file_name}.webp"
        taken.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found = probe(path)
        items.append(
            replace(
                item,
                file_name=path.relative_to(out).as_posix(),
                hash=hashlib.sha256(data).hexdigest(),
                bytes=len(data),
                width=found.width,
                height=found.height,
                frames=found.frames,
                fps=found.fps,
                shard=None,
                offset=0,
            )
        )
    small = Index(out, items)
    small.write()
    return small


def encode(pixels: np.ndarray, *, fps: float = 0.0, quality: int = 90) -> bytes:
    """WebP with alpha from uint8 `f h w 4`: a still, or with `f` > 1 a clip that loops at `fps` frames a second."""
    from PIL import Image

    shots = [Image.fromarray(frame) for frame in pixels]
    how: dict[str, Any] = {
        "quality": quality,
        "alpha_quality": quality,
        "lossless": quality == 100,
        "method": 4,
    }
    if len(shots) > 1:
        pace = round(1000 / fps)  # milliseconds a frame
        how |= {"save_all": True, "append_images": shots[1:], "duration": pace, "loop": 0}
    out = io.BytesIO()
    shots[0].save(out, "WEBP", **how)
    return out.getvalue()
