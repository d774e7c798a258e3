"""What a codec keeps of pictures and clips that it has not seen, behind `reverie eval reconstruction`.

Latents are rounded to 16 bits before they are decoded, since this is the rate that is told; a code counts the bits that
name it. Beside the codec stands what is left of the same signals when they are made small until they have as many
numbers of 16 bits. Of a codec that makes codes of pictures it is also told how many of them are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import reverie
from reverie.codecs.dvae import Dvae
from reverie.codecs.vq import VqVae
from reverie.data.index import Index
from reverie.errors import InputError
from reverie.evals import reconstruction
from reverie.evals.codebook import used
from reverie.output import write
from reverie.pictures import grid, save_png, to_bytes
from reverie.progress import counting
from reverie.recipes.measure_generators import Real
from reverie.recipes.measured import Measured, Row, fits
from reverie.recipes.parts import home, load_codec, open_index
from reverie.train import memory

SHOWN = 16  # pictures of a sheet
CLIPS_SHOWN, FRAMES_SHOWN = 4, 9


def reconstructions(
    data: Path, out: Path, *, codec: str | Path, size: int = 64, frames: int = 17, split: str = "val",
    source: str = "", count: int = 500, batch: int = 8, device: str | None = None,
) -> Measured:  # fmt: skip
    """PSNR, SSIM and rate of at most `count` pictures, and of as many clips of `frames` (1: pictures alone)."""
    out, model = fits(out), reverie.load(codec)
    if isinstance(model, Dvae | VqVae):
        return _of_codes(data, out, model.to(home(device)), name=str(codec), size=size, split=split, source=source,
                         count=count, batch=batch)  # fmt: skip
    model = load_codec(codec, device=device)
    (time, space), place = model.stride, home(device)
    if size < space or size % space:
        raise InputError(f"size {size} cannot be encoded: give a multiple of {space}.")
    if frames < 1 or frames != model.whole(frames):
        raise InputError(f"{frames} frames cannot be encoded: give 1 and some times {time}.")
    for name, value in (("count", count), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} is {value}: give 1 or more.")
    index = open_index(data).select(split=split, sources=(source,) if source else None)

    def reconstruct(signals: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures are videos of one frame."""
        latents = (
            model.encode((signals[:, :, None] if signals.ndim == 4 else signals).to(place)).half().float()
        )
        return model.decode(latents).float().cpu().reshape(signals.shape), latents

    numbers: dict[str, Any] = {
        "codec": str(codec), "stride": [time, space, space], "channels": model.channels, "size": size,
        "frames": frames, "split": split, "source": source,
    }  # fmt: skip
    rows: list[Row] = []
    for kind, length in (("pictures", 1), ("clips", frames)):
        part = [item for item in index.select(video=kind == "clips") if length > 1 or kind == "pictures"][
            :count
        ]
        if not part:
            continue
        real = Real(Index(index.folder, part), (size, size), length)
        with counting(f"measuring {kind}") as progress:
            found = reconstruction.measure(
                _batches(real, batch), reconstruct, progress=partial(_tell, progress, len(real))
            )
        few = found["rate"]["numbers"]
        beside = reconstruction.measure(_batches(real, batch), partial(_small, few))
        numbers[kind] = {"codec": found, "reduced": beside}
        rows += _rows(kind, length, found, beside)
        _show(real, reconstruct, kind, out)
    if not rows:
        raise InputError(f"{data} has nothing in {split!r}" + (f" by {source!r}." if source else "."))
    most = memory.peak(place)
    numbers["peak_memory_bytes"] = most or None
    title = (
        f"{codec}: {'x'.join(map(str, (time, space, space)))}, {model.channels} channels, at {size} pixels"
    )
    columns = ("", "codec", "as many numbers, made small", "for comparison")
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


def _of_codes(
    data: Path, out: Path, model: Dvae | VqVae, *, name: str, size: int, split: str, source: str, count: int, batch: int
) -> Measured:  # fmt: skip
    """The same of a codec that makes codes, on pictures."""
    if size < model.stride or size % model.stride:
        raise InputError(f"size {size} cannot be encoded: give a multiple of {model.stride}.")
    for what, value in (("count", count), ("batch", batch)):
        if value < 1:
            raise InputError(f"{what} is {value}: give 1 or more.")
    index = open_index(data).select(split=split, sources=(source,) if source else None)
    part = list(index.select(video=False))[:count]
    if not part:
        raise InputError(f"{data} has no pictures in {split!r}" + (f" by {source!r}." if source else "."))
    real, place = Real(Index(index.folder, part), (size, size), 1), next(model.parameters()).device
    seen: list[Tensor] = []

    @torch.no_grad()
    def reconstruct(signals: Tensor) -> tuple[Tensor, Tensor]:
        codes = model.encode(signals.to(place))
        seen.append(codes.cpu())
        return model.decode(codes).float().cpu(), codes

    with counting("measuring pictures") as progress:
        found = reconstruction.measure(
            _batches(real, batch), reconstruct, bits=math.log2(model.vocab),
            progress=partial(_tell, progress, len(real)),
        )  # fmt: skip
    book = used(torch.cat([codes.flatten() for codes in seen]), model.vocab)
    beside = reconstruction.measure(_batches(real, batch), partial(_small, found["rate"]["bits"] / 16))
    rows = _rows("pictures", 1, found, beside)
    rows += [
        ("share of the codes that occur", f"{book['usage']:.1%}", "", f"of {model.vocab:,}"),
        ("perplexity of the codes", f"{book['perplexity']:.0f}", "", f"all alike: {model.vocab:,}"),
    ]
    _show(real, reconstruct, "pictures", out)
    numbers = {
        "codec": name, "stride": model.stride, "vocab": model.vocab, "size": size, "split": split, "source": source,
        "pictures": {"codec": found, "reduced": beside}, "codebook": book,
        "peak_memory_bytes": memory.peak(place) or None,
    }  # fmt: skip
    title = (
        f"{name}: codes of {model.stride} x {model.stride} pixels out of {model.vocab:,}, at {size} pixels"
    )
    columns = ("", "codec", "as many bits, made small", "for comparison")
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


def _small(numbers: float, signals: Tensor) -> tuple[Tensor, Tensor]:
    return reconstruction.reduced(signals, numbers), signals


def _tell(progress: Callable[[int, int], None], count: int, done: int) -> None:
    progress(done, count)


def _batches(real: Real, batch: int) -> Iterator[Tensor]:
    for at in range(0, len(real), batch):
        yield real[at : at + batch]


def _rows(kind: str, frames: int, found: dict[str, Any], beside: dict[str, Any]) -> list[Row]:
    what = f"{found['count']} {kind}" + (f" of {frames} frames" if frames > 1 else "")
    rows: list[Row] = []
    for name, title, digits, hint in (
        ("psnr", "PSNR, dB", 2, "the same: 100"),
        ("ssim", "SSIM", 4, "the same: 1"),
        ("motion_psnr", "PSNR of frame differences, dB", 2, "flicker and lost motion cost"),
    ):
        if name in found:
            low, high = found[name]["interval"]
            mean = f"{found[name]['mean']:.{digits}f}  [{low:.{digits}f}, {high:.{digits}f}]"
            rows.append((f"{title}, {what}", mean, f"{beside[name]['mean']:.{digits}f}", hint))
    if found.get("movement"):
        moved = (f"{some['movement']:.3f}" for some in (found, beside))
        rows.append((f"frame differences beside the original's, {kind}", *moved, "1: as much movement"))
    rate = found["rate"]
    rows.append((f"numbers for a pixel, {kind}", f"{rate['numbers']:.4f}", "", "raw: 3"))
    rows.append(
        (f"bits for a pixel, {kind}", f"{rate['bits']:.3f}", "", f"raw: 24, {rate['smaller']:.1f} times as many")
    )  # fmt: skip
    return rows


@torch.no_grad()
def _show(real: Real, reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]], kind: str, out: Path) -> None:
    """The originals above, what came back below: `pictures.png`; of clips some frames, and `clips.webp`."""
    if kind == "pictures":
        columns = min(8, len(real))
        parts = [
            real[at : at + columns] for at in range(0, min(SHOWN, len(real) // columns * columns), columns)
        ]
        rows = torch.cat([some for true in parts for some in (true, reconstruct(true)[0])])
        save_png(grid(to_bytes(rows), columns=columns), out / "pictures.png")
        return
    true = real[: 2 * CLIPS_SHOWN]
    drawn = reconstruct(true)[0]
    places = torch.linspace(0, true.shape[2] - 1, min(FRAMES_SHOWN, true.shape[2])).round().long()
    strips = torch.stack([true, drawn], dim=1)[:CLIPS_SHOWN, :, :, places]
    sheet = rearrange(strips, "n two c f h w -> (n two f) c h w")
    save_png(grid(to_bytes(sheet), columns=len(places)), out / "clips.png")
    both = torch.cat([true, drawn])
    frames = [grid(to_bytes(both[:, :, f]), columns=len(true)) for f in range(both.shape[2])]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "clips.webp", frames, fps=8.0, quality=90)
