"""Pictures in and out of arrays, without torch: a file or an open picture as a signal, and grids of pictures.

A signal is float in [-1, 1]; transparency is laid on white.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reverie import disk
from reverie.errors import InputError
from reverie.media import Part, decode_array, flatten, on_white

_FONTS = (  # that hold Chinese, by the beginning of the file name, best first
    "notosanscjk",
    "notosanssc",
    "sourcehansans",
    "pingfang",
    "msyh",
    "wqy-microhei",
    "wqy-zenhei",
    "hiragino sans gb",
    "stheiti",
    "simhei",
    "droidsansfallback",
    "arial unicode",
    "uming",
)
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/System/Library/Fonts",
            "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")  # fmt: skip
_MISSING = "\u25a1"  # drawn by hand in place of a character that no font here has


def to_signal(
    image: str | Path | Part | Image.Image,
    *,
    size: int | tuple[int, int] | None = None,
    fit: str = "crop",
    resample: str = "bicubic",
) -> np.ndarray:
    """A picture, or the first frame of a file: float32 `3 h w` in [-1, 1], on white.

    size: side of the square or (height, width); None keeps the picture's own.
    fit, resample: how it comes to that size, as `reverie.media.decode_array` says; the defaults are CLIP's.
    Raises MediaError (an InputError) for a file that is not a picture, damaged, or too large.
    """
    if isinstance(image, Image.Image):
        pixels = on_white(image, size, fit=fit, resample=resample)
    else:
        pixels = flatten(decode_array(image, size=size, frames=1, fit=fit, resample=resample)[0])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1


def to_bytes(signal: Any) -> np.ndarray:
    """The way back: a signal `... 3 h w` (an array, or a tensor on any device), clipped -> uint8 `... h w 3`."""
    values = np.asarray(signal.cpu() if hasattr(signal, "cpu") else signal)
    return np.moveaxis(((values.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8), -3, -1)


def grid(
    images: np.ndarray | Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    *,
    lines: int = 3,
    ground: int = 255,
    marks: Sequence[bool | None] | None = None,
) -> Image.Image:
    """Pictures side by side, each with its title underneath.

    images: uint8 `h w c`, c = 1, 3 or 4, of any sizes; `n h w c` works as well. titles: wrapped to `lines` lines.
    ground: the grey that shows through transparency. marks: a green frame around what is right, red around what is
    wrong, none around None. A character that neither Pillow's font nor a Chinese font of this
    machine has is drawn as an empty box, and a line at the foot says so.
    """
    assert len(images) > 0
    assert titles is None or len(titles) == len(images)
    assert marks is None or len(marks) == len(images)
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    gap = 6
    width = max(image.shape[1] for image in images)
    height = max(image.shape[0] for image in images)
    cell = max(width, 96) if titles and any(titles) else width
    points = max(10, min(18, cell // 12))
    wrapped = [_wrap(title, cell, points, lines) for title in titles] if titles else [[] for _ in images]
    tall = [
        max(len(wrapped[i]) for i in range(r * columns, min(len(images), (r + 1) * columns)))
        for r in range(rows)
    ]
    line = round(points * 1.4)
    boxes = any(_MISSING in text for texts in wrapped for text in texts)
    foot = _wrap(
        f"{_MISSING}: no font for it here. Install one, such as Noto Sans CJK.", columns * (cell + gap), 10, 3
    )
    total = gap + sum(height + gap + n * line for n in tall) + (len(foot) * 14 + gap if boxes else 0)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), total), (ground,) * 3)
    draw = ImageDraw.Draw(sheet)
    ink = (30, 30, 30) if ground > 127 else (225, 225, 225)
    y = gap
    for row in range(rows):
        for column in range(columns):
            i = row * columns + column
            if i == len(images):
                break
            x = gap + column * (cell + gap)
            picture = _flat(images[i], ground)
            left, top = x + (cell - picture.width) // 2, y + (height - picture.height) // 2
            sheet.paste(picture, (left, top))
            if marks is not None and (mark := marks[i]) is not None:
                box = (left - 2, top - 2, left + picture.width + 1, top + picture.height + 1)
                draw.rectangle(box, outline=(30, 150, 60) if mark else (205, 60, 50), width=2)
            for k, text in enumerate(wrapped[i]):
                _write(draw, (x, y + height + 1 + k * line), text, points, ink)
        y += height + gap + tall[row] * line
    if boxes:
        for k, text in enumerate(foot):
            _write(draw, (gap, y + k * 14), text, 10, ink)
    return sheet


def card(text: str, side: int, *, ground: int = 243) -> np.ndarray:
    """Words as a picture, to stand in a grid: uint8 `side side 3`, cut where they do not fit."""
    sheet = Image.new("RGB", (side, side), (ground,) * 3)
    points = max(10, min(18, side // 9))
    line = round(points * 1.4)
    rows = _wrap(text, side - 12, points, max((side - 12) // line, 1))
    draw, top = ImageDraw.Draw(sheet), (side - len(rows) * line) // 2
    for k, row in enumerate(rows):
        _write(draw, (6, top + k * line), row, points, (30, 30, 30))
    return np.asarray(sheet)


def stack(parts: Sequence[tuple[str, Image.Image]], path: str | Path) -> Path:
    """Grids one above the other, each under its heading, written as a PNG. InputError: `path` cannot be written."""
    assert len(parts) > 0
    points, gap = 16, 8
    width = max(picture.width for _, picture in parts)
    heads = [_wrap(head, width - 2 * gap, points, 3) for head, _ in parts]
    line = round(points * 1.4)
    tall = [len(head) * line + gap for head in heads]
    whole = Image.new("RGB", (width, sum(tall) + sum(picture.height for _, picture in parts)), (255,) * 3)
    draw = ImageDraw.Draw(whole)
    y = 0
    for head, space, (_, picture) in zip(heads, tall, parts, strict=True):
        for k, text in enumerate(head):
            _write(draw, (gap, y + gap // 2 + k * line), text, points, (30, 30, 30))
        whole.paste(picture, (0, y + space))
        y += space + picture.height
    return save_png(whole, path)


def save_png(picture: Image.Image, path: str | Path) -> Path:
    """A PNG, whole or not at all; its folder is made. InputError: it cannot be written there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.whole(path) as draft:
            picture.save(draft, format="PNG")
    except OSError:
        raise InputError(f"Cannot write {path}: give another place for the picture.") from None
    return path


def _flat(image: np.ndarray, ground: int) -> Image.Image:
    assert image.dtype == np.uint8
    assert image.ndim == 3
    if image.shape[2] == 4:
        image = flatten(image, ground)
    return Image.fromarray(np.ascontiguousarray(image.repeat(3, 2) if image.shape[2] == 1 else image))


# --- words ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _font(points: int, wide: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """Pillow's own font; `wide`: a Chinese font of this machine, or None."""
    if not wide:
        return ImageFont.load_default(points)
    path = _wide_font_file()
    if path is None:
        return None
    try:
        return ImageFont.truetype(path, points)
    except OSError:
        return None


@lru_cache(maxsize=1)
def _wide_font_file() -> str | None:
    found: dict[int, str] = {}
    for folder in _FOLDERS:
        for where, _, names in os.walk(Path(folder).expanduser()):
            for name in sorted(names):
                if name.lower().endswith((".ttf", ".ttc", ".otf")):
                    for rank, family in enumerate(_FONTS):
                        if name.lower().startswith(family):
                            found.setdefault(rank, os.path.join(where, name))
    return found[min(found)] if found else None


@lru_cache(maxsize=8192)
def _font_of(character: str, points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """The first font that has the character; a font draws every character that it lacks alike."""
    for wide in (False, True):
        font = _font(points, wide)
        if font is not None and (
            character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffd"))
        ):
            return font
    return None


def _visible(text: str, points: int) -> str:
    text = " ".join(text.split())
    return "".join(c if _font_of(c, points) is not None else _MISSING for c in text)


def _length(text: str, points: int) -> float:
    return sum(_advance(c, points) for c in text)


@lru_cache(maxsize=8192)
def _advance(character: str, points: int) -> float:
    font = None if character == _MISSING else _font_of(character, points)
    return font.getlength(character) if font is not None else points * 0.8


def _wrap(text: str, width: int, points: int, lines: int) -> list[str]:
    """At most `lines` lines no wider than `width`; breaks at spaces, between wide characters, or inside a long word."""
    rows: list[str] = []
    rest = _visible(text[:2000], points)
    while rest and len(rows) < lines:
        n, total = 0, 0.0
        while n < len(rest) and (total := total + _advance(rest[n], points)) <= width:
            n += 1
        n = max(n, 1)
        if n < len(rest) and rest[n] != " ":
            space = rest.rfind(" ", 1, n)
            if space > 0 and rest[n - 1].isascii():
                n = space
        rows.append(rest[:n].rstrip())
        rest = rest[n:].lstrip()
    if rest and rows:
        last = rows[-1]
        while last and _length(last + "...", points) > width:
            last = last[:-1]
        rows[-1] = last.rstrip() + "..."
    return rows


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, points: int, ink: tuple[int, int, int]
) -> None:
    """Runs of characters of one font at a time, so that each is drawn by the font that has it."""
    x, y = float(at[0]), at[1]
    run, font = "", None
    for character in [*text, ""]:
        its = _font_of(character, points) if character and character != _MISSING else None
        if run and (its is not font or not character):
            draw.text((x, y), run, fill=ink, font=font)
            x += _length(run, points)
            run = ""
        font = its
        if character == _MISSING:
            draw.rectangle((x + 1, y + 2, x + points * 0.7, y + points), outline=ink)
            x += _advance(character, points)
        else:
            run += character
