"""Makers of small media files, whole and harmful."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


def picture(seed: int = 0, width: int = 24, height: int = 18, mode: str = "RGB") -> Image.Image:
    """A smooth coloured picture that differs by seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def data(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def clip(kind: str, frames: int = 5, *, milliseconds: int = 40, seed: int = 0) -> bytes:
    pictures = [picture(seed + i) for i in range(frames)]
    return data(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=milliseconds)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A grey PNG that claims a size; `pixels` is its compressed data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png_bomb(side: int) -> bytes:
    """A true PNG of side x side grey pixels, some hundred kilobytes long."""
    packer = zlib.compressobj(9)
    row = bytes(side + 1)
    return png(side, side, b"".join(packer.compress(row) for _ in range(side)) + packer.flush())


def gif_bomb(frames: int) -> bytes:
    """A GIF of so many one-pixel frames."""
    frame = (
        b"\x21\xf9\x04\x00\x01\x00\x00\x00"
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
        + b"\x02\x02\x44\x01\x00"
    )
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0)
        + b"\x00\x00\x00\xff\xff\xff"
        + frame * frames
        + b"\x3b"
    )


def video(
    path: Path, codec: str, frames: int = 12, *, width: int = 48, height: int = 32, rate: int = 12
) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            shade = np.full((height, width, 3), 20 + 200 * i // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Writes bytes to a file below tmp_path and returns its path."""

    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="session")
def makers() -> SimpleNamespace:
    """The functions of this module."""
    return SimpleNamespace(
        picture=picture,
        data=data,
        clip=clip,
        png=png,
        png_bomb=png_bomb,
        gif_bomb=gif_bomb,
        video=video,
        chunk=chunk,
    )
