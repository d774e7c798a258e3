"""Reading packed pictures, beside the webdataset library on the same tars: bytes alone, and decoded and resized.

    python benchmarks/shards.py STICKERS [--count 500] [--side 224] [--rounds 5] [--out runs/shards]

STICKERS is the corpus of `reverie data stickers`. Of `count` of its pictures, evenly chosen, two sets are packed as
`reverie data pack` does it, with shuffled items, into tars of 8 MB: "stickers", the files as they are (PNG and WebP of
64 to 256 pixels with transparency), and "jpeg", drawn on white at 640 pixels, quality 90, as photos are kept. Each side
then gives every sample once, in one process on one thread, and the tars are in the system's memory. Sequential is the
order of the tars. Shuffled is webdataset's buffer of 1,000 samples over shuffled tars; Reverie draws from all samples,
as training does. What each does for a sample:

    bytes      webdataset: all members of the sample. Reverie: the media by place, its sha256 compared; words are in
               the index, which was read before the clock.
    crop       webdataset: Pillow to RGB (`decode("pilrgb")`), the short side resized to `side` bicubically, the middle
               cut out, as an array. Reverie: `data.pixels.decode_item`, which also reads the header against limits,
               applies orientation and profile and keeps transparency, weighing colours by it.
    crop rgba  the same, but webdataset keeps transparency too (`decode("pilrgba")`).

Seconds are of the processor, since machines are shared; the sides take turns, the first of them changing with each
round. The table has medians, and of the rounds' ratios the median and the range.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import webdataset
from PIL import Image

from reverie import rng
from reverie.data.index import Index
from reverie.data.pixels import decode_item
from reverie.data.shards import pack
from reverie.media import LIMITS, decode_array, flatten, tune_allocator
from reverie.recipes.parts import plain_stickers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path, help="the sticker corpus")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/shards"))
    asked = parser.parse_args()
    peer = webdataset()
    torch.set_num_threads(1)
    tune_allocator()
    warnings.filterwarnings("ignore", message="Palette images")  # of webdataset's way to RGB
    corpus = plain_stickers(Index.read(asked.data)).select(video=False)
    some = Index(corpus.folder, corpus.items[:: max(len(corpus) // asked.count, 1)][: asked.count])
    asked.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| set | what | order | webdataset, pictures/s | Reverie, pictures/s | ratio | range |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    print("\n".join(lines))
    for name in ("stickers", "jpeg"):
        with tempfile.TemporaryDirectory(dir=asked.out) as folder:
            own = some if name == "stickers" else drawn(some, Path(folder) / "loose")
            made = pack(own, Path(folder) / "packed", size=8_000_000, shuffle=True, quiet=True)
            tars = [str(made.index.folder / shard.file) for shard in made.shards]
            for what in ("bytes", "crop", *(["crop rgba"] if name == "stickers" else [])):
                for order in ("sequential", "shuffled"):
                    sides = {
                        "theirs": partial(theirs, peer, tars, what, order, asked.side),
                        "ours": partial(ours, made.index, what, order, asked.side),
                    }
                    lines.append(f"| {name} {row(what, order, sides, len(some), asked.rounds)}")
                    print(lines[-1], flush=True)
    (asked.out / "table.md").write_text("\n".join(lines) + "\n")


def drawn(index: Index, folder: Path) -> Index:
    """The pictures of an index on white, 640 pixels a side, as JPEG."""
    folder.mkdir(parents=True)
    items = []
    for item in index:
        buffer = io.BytesIO()
        Image.fromarray(flatten(decode_array(index.media(item), size=640, frames=1)[0])).save(
            buffer, "JPEG", quality=90
        )
        data, name = buffer.getvalue(), f"{len(items):06d}.jpg"
        (folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        items.append(replace(item, file_name=name, hash=digest, bytes=len(data), width=640, height=640))
    return Index(folder, items)


def row(what: str, order: str, sides: dict[str, Callable[[], Iterable[Any]]], count: int, rounds: int) -> str:
    """A line of the table; the first round warms up and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        names = list(sides) if number % 2 else list(sides)[::-1]
        for name in names:
            begin, seen = time.process_time(), 0
            for _ in sides[name]():
                seen += 1
            taken[name].append(time.process_time() - begin)
            assert seen == count, f"{name} gave {seen} of {count} samples"
    theirs, ours = taken["theirs"][1:], taken["ours"][1:]
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    rates = [count / statistics.median(times) for times in (theirs, ours)]
    return (
        f"| {what} | {order} | {rates[0]:,.0f} | {rates[1]:,.0f} | {statistics.median(ratios):.2f} "
        f"| {ratios[0]:.2f} to {ratios[-1]:.2f} |"
    )


def theirs(package: Any, tars: list[str], what: str, order: str, side: int) -> Iterable[Any]:
    shuffled = order == "shuffled"
    data = package.WebDataset(tars, shardshuffle=len(tars) if shuffled else False, empty_check=False)
    if shuffled:
        data = data.shuffle(1000)
    if what == "bytes":
        return data
    mode = "pilrgba" if what == "crop rgba" else "pilrgb"
    return data.decode(mode).to_tuple("webp;png;jpg;avif;gif").map(lambda sample: cut(sample[0], side))


def cut(image: Image.Image, side: int) -> np.ndarray:
    """The short side resized, the middle cut out: uint8 `c side side`."""
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def ours(index: Index, what: str, order: str, side: int) -> Iterable[Any]:
    items = sorted(index, key=lambda item: (item.shard, item.offset))
    if order == "shuffled":
        places = torch.randperm(len(items), generator=rng.generator(0, "order", 0)).tolist()
        items = [items[place] for place in places]
    for item in items:
        if what == "bytes":
            yield index.bytes_of(item)
            continue
        pixels = decode_item(index, item, size=(side, side), frames=1, fit=what.split()[0], limits=LIMITS)
        assert isinstance(pixels, np.ndarray), pixels
        yield pixels


if __name__ == "__main__":
    main()
