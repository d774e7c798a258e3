"""Media files from strangers: what they are, how large, and their pixels.

A file is known by its content, never by its name. Its header is read by the few lines below, and held against
`Limits`, before a decoder sees the file, so a bomb is refused before anything is allocated. Images are PNG, JPEG,
WebP, GIF and AVIF; clips are animated PNG, WebP, GIF and AVIF (Pillow) and mp4/webm (PyAV, extra `video`).

Pixels come out as sRGB with straight alpha, uint8 `f h w 4`. EXIF orientation and a video's rotation are applied,
colour profiles and CMYK converted, 16-bit greys scaled. Whatever a decoder says in its errors stays inside: the
reasons given here are ours.

Resizing is antialiased and alpha-weighted. "crop", "crop_even" and "squash" give an opaque RGB picture the very pixels
that CLIP's and SigLIP's public preprocessing gives it. Transparency is laid on white, as transformers does too, but
open_clip drops it; orientation and colour profiles, which both leave out, count here.

Of a clip with n frames, k are taken at i * n // k: the first frame is
always among them, and k frames play at k / n of the clip's rate.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import math
import mmap
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms

from reverie.errors import InputError

KINDS = ("png", "jpeg", "webp", "gif", "avif", "mp4", "webm")
SUFFIXES = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".avif",
    ".mp4",
    ".m4v",
    ".mov",
    ".webm",
    ".mkv",
)
FITS = ("crop", "crop_even", "squash", "pad")
RESAMPLES = ("bilinear", "bicubic")
NO_PICTURES = "it holds no pictures, only sound or data"
WIDEST = 40_000_000  # pixels of a picture that is resized whole before it is cropped
STEPS = 4_000_000  # blocks or boxes that a header walk may take: some seconds at most


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one file may ask for. Every limit applies before the memory or the time is spent."""

    pixels: int = 40_000_000  # of one frame
    frames: int = 2_000
    bytes: int = 512 * 2**20  # of the file
    work: int = 8_000_000_000  # pixels of all frames together: bounds the time
    output: int = 2 * 2**30  # bytes of one decoded array


LIMITS = Limits()
warnings.filterwarnings(
    "ignore", category=UserWarning, module=r"PIL\..*Plugin"
)  # the words of decoders stay inside


@dataclass(frozen=True, kw_only=True)
class Part:
    """A media file that is no file by itself: some bytes of a tar, or what lies at an address.

    length, hash: how many bytes it has and their sha256. fetch: gets them, and raises `MediaError` or `OSError`.
    """

    name: str
    length: int
    hash: str
    fetch: Callable[[], bytes]

    def read(self, limits: Limits = LIMITS) -> bytes:
        """Its bytes. MediaError: it is beyond `limits`, cut short or changed. Unreached: it cannot be read now."""
        with _our_words(self):
            if self.length == 0:
                raise _Refusal("the file is empty")
            if self.length > limits.bytes:
                raise _Refusal(f"{self.length:,} bytes are more than the limit of {limits.bytes:,}")
            try:
                data = self.fetch()
            except FileNotFoundError:
                raise
            except OSError:
                raise Unreached(self, "it cannot be read") from None
            if len(data) < self.length:
                raise _Refusal(f"cut short: {len(data):,} of its {self.length:,} bytes are there")
            if len(data) > self.length:
                raise _Refusal(f"changed since it was indexed: {len(data):,} bytes, not {self.length:,}")
            if hashlib.sha256(data).hexdigest() != self.hash:
                raise _Refusal("changed since it was indexed: its bytes do not match their checksum")
            return data

    def held(self, limits: Limits = LIMITS) -> Part:
        """The same with its bytes in memory, so that opening it twice reads it once. MediaError: as `read`."""
        data = self.read(limits)
        return replace(self, fetch=lambda: data)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A file's size as it will be shown (orientation applied). `frames` is 1 and `fps` 0.0 for an image."""

    width: int
    height: int
    frames: int
    fps: float
    kind: str


class MediaError(InputError):
    """A file that cannot be used; `reason` is a short phrase in our own words, without the path."""

    def __init__(self, path: Path | Part, reason: str, advice: str = "") -> None:
        super().__init__(f"{path.name}: {reason}{advice}.")
        self.reason = reason


class Unreached(MediaError):
    """What holds a file cannot be read now, which says nothing of the file: nobody records it as bad."""

    def __init__(self, path: Path | Part, reason: str) -> None:
        super().__init__(path, reason)
        self.args = (f"{path.name} cannot be reached: {reason}; mend that and run the same command again.",)


class _Refusal(Exception):
    """Carries a reason, and what to do, up to where the path is known."""


def probe(path: str | Path | Part, limits: Limits = LIMITS) -> Probe:
    """Reads the header (a video's first frame as well). MediaError: not media, damaged, or beyond `limits`."""
    path = path if isinstance(path, Part) else Path(path)
    with _our_words(path), _open(path, limits) as file:
        found, _ = _header(file, limits)
        if found.kind in ("mp4", "webm"):
            return _probe_video(file, found, limits)
        with _pillow(file, found, limits) as image:
            width, height = image.size if found.kind == "avif" else (found.width, found.height)
            if _orientation(image) >= 5:
                width, height = height, width
        return replace(found, width=width, height=height)


def comment(path: str | Path | Part, limits: Limits = LIMITS) -> str | None:
    """The words that a file carries: PNG's text "Comment", GIF's comment, Exif's description, a clip's tag "comment".

    They are a stranger's words. MediaError: not media, damaged, or beyond `limits`.
    """
    path = path if isinstance(path, Part) else Path(path)
    with _our_words(path), _open(path, limits) as file:
        found, _ = _header(file, limits)
        if found.kind in ("mp4", "webm"):
            with _container(file, found, limits) as (container, _):
                tags = {key.lower(): value for key, value in container.metadata.items()}
                return tags.get("comment")
        with _pillow(file, found, limits) as image:
            words = image.info.get("Comment") or image.info.get("comment")
            if words is None and found.kind in ("jpeg", "webp", "avif"):
                words = image.getexif().get(0x010E)
        return words.decode("utf-8", "replace") if isinstance(words, bytes) else words and str(words)


def shown(image: str | Path | Part | Image.Image) -> tuple[int, int]:
    """The (height, width) of a picture or a file as it will be shown. MediaError: as `probe`."""
    if isinstance(image, Image.Image):
        return image.size if _orientation(image) >= 5 else (image.height, image.width)
    found = probe(image)
    return found.height, found.width


def on_white(
    image: Image.Image,
    size: int | tuple[int, int] | None = None,
    *,
    fit: str = "crop",
    resample: str = "bicubic",
) -> np.ndarray:
    """A picture that is open already, as `decode_array` treats files, laid on white: uint8 `h w 3`."""
    box = _box(size, fit, resample)
    if not (image.width and image.height):
        raise MediaError(Path("the picture"), f"its {image.width} x {image.height} hold no pixel")
    turn = _TURNS.get(_orientation(image))
    picture = _srgb(image)
    picture = picture.transpose(turn) if turn is not None else picture
    return flatten(np.asarray(_fit(picture, box, fit, resample)))


def flatten(pixels: np.ndarray, ground: int = 255) -> np.ndarray:
    """RGBA on a grey `ground`, white by default: uint8 `... 4` -> uint8 `... 3`."""
    colours, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    return ((colours * alpha + ground * (255 - alpha) + 127) // 255).astype(np.uint8)


def decode_array(
    path: str | Path | Part,
    *,
    size: int | tuple[int, int] | None = None,
    frames: int | None = None,
    fit: str = "crop",
    resample: str = "bicubic",
    limits: Limits = LIMITS,
) -> np.ndarray:
    """The pixels of a file: uint8 `f h w 4` (RGBA, sRGB).

    size: side of the square, or (height, width); None keeps the file's own size.
    frames: at most so many, evenly spaced; None takes all.
    fit: "crop" resizes the short side and cuts the middle out, as transformers' CLIP does; "crop_even" too, but rounds
        the odd half pixel to even, as OpenAI's and open_clip's do; "squash" resizes each side on its own, as SigLIP's
        do; "pad" fits everything in, on transparent ground, quickly: large pictures are first reduced, so its
        pixels differ a little from any public preprocessing.
    resample: the filter, one of RESAMPLES.
    Raises MediaError when the file is not media, damaged, or beyond `limits`.
    """
    path = path if isinstance(path, Part) else Path(path)
    box = _box(size, fit, resample)
    if frames is not None and frames < 1:
        raise InputError(f"frames must be at least 1, not {frames}.")
    with _our_words(path), _open(path, limits) as file:
        found, start = _header(file, limits)
        if found.kind in ("mp4", "webm"):
            found = _probe_video(file, found, limits)
        wanted = pick(found.frames, frames)
        height, width = box or (found.height, found.width)
        if len(wanted) * height * width * 4 > limits.output:
            raise _Refusal(
                f"{len(wanted)} frames of {width} x {height} are more than {limits.output:,} bytes"
            )
        if found.kind in ("mp4", "webm"):
            pictures = _video_frames(file, found, wanted, limits)
        else:
            pictures = _image_frames(
                file, found, [start + i for i in wanted], box if fit == "pad" else None, limits
            )
        arrays = [np.asarray(_fit(picture, box, fit, resample)) for picture in pictures]
        if len(arrays) < len(wanted):
            raise _Refusal(f"cut short: {len(arrays)} of {len(wanted)} frames could be decoded")
        return np.stack(arrays)


def _box(size: int | tuple[int, int] | None, fit: str, resample: str) -> tuple[int, int] | None:
    if fit not in FITS:
        raise InputError(f"Unknown fit {fit!r}: use one of {', '.join(FITS)}.")
    if resample not in RESAMPLES:
        raise InputError(f"Unknown resample {resample!r}: use one of {', '.join(RESAMPLES)}.")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InputError(f"size must be at least 1, not {size}.")
    return height, width


def pick(n: int, k: int | None) -> list[int]:
    """Indices of at most `k` of `n` frames, evenly spaced, the first frame first."""
    return list(range(n)) if k is None or n <= k else [i * n // k for i in range(k)]


def whole_patches(height: int, width: int, *, patch: int, area: int) -> tuple[int, int]:
    """The (height, width) that a picture of `height x width` gets near its own aspect: sides in whole patches.

    Sides are rounded up or down, to one patch at least, so that the aspect stays nearest. A picture of more than `area`
    pixels is reduced until it has no more; a smaller one is not enlarged. InputError: `area` has no room for a patch.
    """
    most = area // patch**2
    if patch < 1 or most < 1:
        raise InputError(f"an area of {area} pixels has no room for a patch of {patch}: give more.")
    scale = min(math.sqrt(area / (height * width)), 1.0) / patch
    less, more = sorted((height * scale, width * scale))
    shorts = {min(max(side, 1), math.isqrt(most)) for side in (math.floor(less), math.ceil(less))}
    longs = {max(side, 1) for side in (math.floor(more), math.ceil(more))}
    sides = [(short, min(long, most // short)) for short in shorts for long in longs]
    short, long = min(sides, key=lambda pair: (abs(math.log(pair[1] * less / (pair[0] * more))), -pair[0]))
    return (patch * long, patch * short) if height > width else (patch * short, patch * long)


@lru_cache(maxsize=1)
def tune_allocator() -> None:
    """Keeps large blocks in the heap (glibc): decoding many pictures is then nearly twice as fast."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 256 * 2**20)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):  # another C library: only slower
            pass


# --- opening -------------------------------------------------------------------------------------------------------


@contextmanager
def _our_words(path: Path | Part) -> Iterator[None]:
    """Turns whatever a decoder raises (Pillow and PyAV raise odd things) into a MediaError without its text."""
    try:
        yield
    except InputError:
        raise
    except _Refusal as refusal:
        raise MediaError(path, *refusal.args) from None
    except FileNotFoundError:
        raise MediaError(path, "there is no such file") from None
    except PermissionError:
        raise MediaError(path, "the file may not be read") from None
    except MemoryError:
        raise MediaError(path, "decoding it needs more memory than there is") from None
    except Exception:
        raise MediaError(path, "damaged or cut short: its pixels cannot be decoded") from None


@contextmanager
def _open(path: Path | Part, limits: Limits) -> Iterator[BinaryIO]:
    if isinstance(path, Part):
        yield io.BytesIO(path.read(limits))
        return
    if not path.is_file():
        raise _Refusal("there is no such file" if not path.exists() else "not a file")
    with path.open("rb") as file:
        file.seek(0, 2)
        if (size := file.tell()) == 0:
            raise _Refusal("the file is empty")
        if size > limits.bytes:
            raise _Refusal(f"{size:,} bytes are more than the limit of {limits.bytes:,}")
        file.seek(0)
        yield file


def sniff(head: bytes) -> str | None:
    """The kind of media that begins with `head` (64 bytes suffice), one of KINDS, or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in range(8, min(len(head), struct.unpack(">I", head[:4])[0]), 4)}
        if brands & {b"avif", b"avis"}:
            return "avif"
        return None if brands & {b"heic", b"heix", b"hevc", b"mif1"} else "mp4"
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime before `ftyp`
        return "mp4"
    return "webm" if head.startswith(b"\x1aE\xdf\xa3") else None


_STRANGERS = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"BM": "a BMP picture",
    b"II*\x00": "a TIFF picture",
    b"MM\x00*": "a TIFF picture",
    b"8BPS": "a Photoshop picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"\x00\x00\x00\x0cJXL": "a JPEG XL picture",
    b"SIMPLE": "a FITS picture",
}


def _stranger(head: bytes) -> str:
    """What a file that is not media seems to be, for the reason."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for mark, name in _STRANGERS.items():
        if head.startswith(mark):
            return name
    if head[4:8] == b"ftyp":
        return "a HEIC picture"
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WAVE"):
        return "an AVI clip" if head[8:12] == b"AVI " else "a WAVE sound"
    if b"<svg" in text or b"<!doctype svg" in text:
        return "an SVG drawing"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text.startswith(b"<"):
        return "an XML, SVG or HTML document"
    return "text" if head and all(byte >= 32 or byte in b"\t\r\n" for byte in head) else "of an unknown kind"


# --- headers: what a file asks for, read before any decoder ---------------------------------------------------------


def _header(file: BinaryIO, limits: Limits) -> tuple[Probe, int]:
    """Kind, size, frames and rate as the file claims them, within `limits`; and the index of the first frame."""
    head = file.read(256)
    kind = sniff(head)
    if kind is None:
        advice = f"; give one of {', '.join(KINDS)}"
        raise _Refusal(f"not a picture or clip that can be read: it is {_stranger(head)}", advice)
    reader = {
        "png": _png,
        "jpeg": _jpeg,
        "webp": _webp,
        "gif": _gif,
        "avif": _mp4,
        "mp4": _mp4,
        "webm": _webm,
    }[kind]
    with _whole(file) as data:
        try:
            width, height, frames, seconds, start = reader(data, limits)
        except (struct.error, IndexError):
            raise _Refusal("damaged or cut short: its header is incomplete") from None
    file.seek(0)
    found = Probe(
        width=width,
        height=height,
        frames=frames,
        fps=0.0 if frames == 1 else _rate(frames, seconds),
        kind=kind,
    )
    _check(found, limits)
    return found, start


@contextmanager
def _whole(file: BinaryIO) -> Iterator[_Data]:
    """All bytes of a file, without reading those that nobody looks at."""
    if isinstance(file, io.BytesIO):
        yield file.getvalue()  # the same bytes, not copied
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _rate(frames: int, seconds: float) -> float:
    """Frames per second; 10 where the file gives no time, as browsers do."""
    return round(frames / seconds, 6) if seconds > 0 and math.isfinite(seconds) else 10.0


def _check(found: Probe, limits: Limits) -> None:
    if found.width < 1 or found.height < 1 or found.frames < 1:
        raise _Refusal(f"it claims {found.frames} frames of {found.width} x {found.height} pixels")
    if found.width * found.height > limits.pixels:
        raise _Refusal(f"{found.width} x {found.height} pixels are more than the limit of {limits.pixels:,}")
    if found.frames > limits.frames:
        raise _Refusal(f"{found.frames:,} frames are more than the limit of {limits.frames:,}")
    if found.width * found.height * found.frames > limits.work:
        raise _Refusal(
            f"{found.frames:,} frames of {found.width} x {found.height} are more than can be decoded"
        )


_Data = mmap.mmap | bytes
_Claim = tuple[int, int, int, float, int]  # width, height, frames, seconds, index of the first frame


def _png(data: _Data, limits: Limits) -> _Claim:
    if data[12:16] != b"IHDR":
        raise _Refusal("damaged: a PNG without its header")
    width, height = struct.unpack(">II", data[16:24])
    at, animated, frames, seconds, hidden = 8, False, 0, 0.0, 0
    for _ in range(STEPS):
        if at + 12 > len(data):
            raise _Refusal("damaged or cut short: a PNG without its end")
        length, name = struct.unpack(">I4s", data[at : at + 8])
        with memoryview(data) as view, view[at + 4 : at + 8 + length] as body:
            whole = zlib.crc32(body)
        if (
            whole.to_bytes(4, "big") != data[at + 8 + length : at + 12 + length]
        ):  # Pillow lets damaged pixels pass
            raise _Refusal("damaged or cut short: a part of the PNG does not match its checksum")
        if name == b"acTL":
            animated = struct.unpack(">I", data[at + 8 : at + 12])[0] > 0
        elif name == b"fcTL":
            frames += 1
            delay, unit = struct.unpack(">HH", data[at + 28 : at + 32])
            seconds += delay / (unit or 100)
            if frames > limits.frames:
                break
        elif name == b"IDAT" and animated and not frames:
            hidden = 1  # the still picture is not part of the animation
        elif name == b"IEND":
            break
        at += 12 + length
    else:
        raise _Refusal("damaged: a PNG of too many parts")
    return (width, height, frames, seconds, hidden) if animated and frames else (width, height, 1, 0.0, 0)


def _jpeg(data: _Data, limits: Limits) -> _Claim:
    at = 2
    for _ in range(STEPS):
        if data[at] != 0xFF:
            raise _Refusal("damaged: a JPEG without its size")
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # filling, or no length
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height, 1, 0.0, 0
        at += 2 + max(2, struct.unpack(">H", data[at + 2 : at + 4])[0])
    raise _Refusal("damaged: a JPEG without its size")


def _webp(data: _Data, limits: Limits) -> _Claim:
    end = 8 + struct.unpack("<I", data[4:8])[0]
    if end > len(data):
        raise _Refusal("cut short: the file is smaller than its header says")
    width = height = frames = 0
    seconds = 0.0
    at = 12
    for _ in range(STEPS):
        if at + 8 > end or frames > limits.frames:
            break
        name, length = struct.unpack("<4sI", data[at : at + 8])
        body = at + 8
        if name == b"VP8X":
            width, height = (1 + int.from_bytes(data[body + i : body + i + 3], "little") for i in (4, 7))
        elif name == b"ANMF":
            frames += 1
            delay = int.from_bytes(data[body + 12 : body + 15], "little")
            seconds += (
                delay if delay > 10 else 100
            ) / 1000  # browsers show a frame of 10 ms or less for 100 ms
        elif name == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[body + 6 : body + 10]))
        elif name == b"VP8L" and not width:
            bits = struct.unpack("<I", data[body + 1 : body + 5])[0]
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        at = body + length + (length & 1)
    else:
        raise _Refusal("damaged: a WebP of too many parts")
    return width, height, max(1, frames), seconds, 0


def _gif(data: _Data, limits: Limits) -> _Claim:
    width, height, flags = struct.unpack("<HHB", data[6:11])
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames, seconds, delay = 0, 0.0, 0
    blocks = False  # inside a chain of sub-blocks
    for _ in range(STEPS):
        if at >= len(data):
            if blocks or not frames:
                raise _Refusal("cut short: a GIF without its end")
            break  # only the trailer is missing
        mark = data[at]
        if blocks:
            blocks, at = mark > 0, at + 1 + mark
        elif mark == 0x2C:
            left, top, wide, high, flags = struct.unpack("<HHHHB", data[at + 1 : at + 10])
            width, height = max(width, left + wide), max(height, top + high)  # Pillow grows its canvas so
            frames += 1
            seconds += (delay if delay > 1 else 10) / 100
            if frames > limits.frames:
                break
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            blocks = True
        elif mark == 0x21:
            if data[at + 1] == 0xF9:
                delay = struct.unpack("<H", data[at + 4 : at + 6])[0]
            at, blocks = at + 2, True
        elif mark == 0x3B:
            break
        else:
            at += 1
    else:
        raise _Refusal("damaged: a GIF of too many parts")
    return width, height, frames, seconds, 0


def _boxes(data: _Data, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The ISO base media boxes in data[start:end]: name, start and end of the body."""
    for _ in range(10_000):
        if start + 8 > end:
            return
        length, name = struct.unpack(">I4s", data[start : start + 8])
        body = start + 8
        if length == 1:
            length, body = struct.unpack(">Q", data[body : body + 8])[0], body + 8
        elif length == 0:
            length = end - start
        if length < body - start:
            raise _Refusal("damaged: a box smaller than its own header")
        if start + length > end:
            raise _Refusal("cut short: the file is smaller than its header says")
        yield name, body, start + length
        start += length
    raise _Refusal("damaged: a file of too many boxes")


def _leaves(data: _Data, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes that hold no boxes (and `ispe` in its four-fold nest), in file order."""
    for name, body, after in _boxes(data, start, end):
        if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"iprp", b"ipco"):
            yield from _leaves(data, body, after)
        elif name == b"meta" and data[body + 8 : body + 12] == b"hdlr":  # version and flags, then boxes
            yield from _leaves(data, body + 4, after)
        else:
            yield name, body, after


def _mp4(data: _Data, limits: Limits) -> _Claim:
    """mp4, mov and avif: the largest size that any picture track or item claims."""
    sizes, frames, seconds, time, picture, index = [(0, 0)], 1, 0.0, 0.0, False, False
    seen, heard = False, False
    for name, body, end in _leaves(data, 0, len(data)):
        if name in (b"tkhd", b"mdhd", b"stsd", b"iloc"):
            index = True
        if name == b"tkhd":
            wide, high = struct.unpack(">II", data[end - 8 : end])
            sizes.append((wide >> 16, high >> 16))
        elif name == b"ispe":
            sizes.append(struct.unpack(">II", data[body + 4 : body + 12]))
        elif name == b"mdhd":
            long = data[body] == 1
            scale, length = struct.unpack(
                ">IQ" if long else ">II", data[body + 12 + 8 * long :][: 8 + 4 * long]
            )
            time = length / scale if scale else 0.0
        elif name == b"hdlr":
            picture = data[body + 8 : body + 12] in (b"vide", b"pict")
            seen, heard = seen or picture, heard or data[body + 8 : body + 12] == b"soun"
        elif name == b"stsd" and picture:
            sizes += [
                struct.unpack(">HH", data[at + 24 : at + 28]) for _, at, _ in _boxes(data, body + 8, end)
            ]
        elif name == b"stsz" and picture:
            frames, seconds = max(1, struct.unpack(">I", data[body + 8 : body + 12])[0]), time
    if not index:
        raise _Refusal("damaged or cut short: it has no index of its frames")
    if heard and not seen:
        raise _Refusal(NO_PICTURES)
    width, height = max(sizes, key=math.prod)
    return width, height, frames, seconds, 0


def _number(data: _Data, at: int, *, marked: bool) -> tuple[int, int]:
    """An EBML number (`marked`: an id, whose length bits stay) and where it ends; -1 is "unknown length"."""
    length = 9 - data[at].bit_length()
    if length > 8:
        raise _Refusal("damaged: a number without a length")
    value = int.from_bytes(data[at : at + length], "big")
    if not marked:
        value &= (1 << 7 * length) - 1
        value = -1 if value == (1 << 7 * length) - 1 else value
    return value, at + length


def _webm(data: _Data, limits: Limits) -> _Claim:
    """The size that the track headers claim; frames and time are counted when the file is opened."""
    width = height = at = 0
    heard = False
    for _ in range(STEPS):
        if at >= len(data):
            break
        name, body = _number(data, at, marked=True)
        length, body = _number(data, body, marked=False)
        if body + length > len(data):
            raise _Refusal("cut short: the file is smaller than its header says")
        inside = name in (0x18538067, 0x1654AE6B, 0xAE, 0xE0)  # Segment, Tracks, TrackEntry, Video
        if name == 0xB0:
            width = max(width, int.from_bytes(data[body : body + length], "big"))
        elif name == 0xBA:
            height = max(height, int.from_bytes(data[body : body + length], "big"))
        elif name == 0xE1:  # Audio
            heard = True
        elif name == 0x1F43B675 and (width or heard):  # the first Cluster: what follows are frames
            break
        if length < 0 and not inside:
            raise _Refusal("damaged: a part of unknown length")
        at = body if inside else body + length
    if heard and not width:
        raise _Refusal(NO_PICTURES)
    return width, height, 1, 0.0, 0


# --- pictures through Pillow ----------------------------------------------------------------------------------------


@contextmanager
def _pillow(file: BinaryIO, found: Probe, limits: Limits) -> Iterator[Image.Image]:
    with Image.open(file, formats=[found.kind.upper()]) as image:
        _check(
            replace(found, width=image.width, height=image.height), limits
        )  # should the decoder see another size
        yield image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or it is damaged."""
    if (
        image.format == "PNG" and "exif" not in image.info
    ):  # Pillow would decode the pixels to look behind them
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block must not cost the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _image_frames(
    file: BinaryIO, found: Probe, wanted: list[int], rough: tuple[int, int] | None, limits: Limits
) -> Iterator[Image.Image]:
    """The frames `wanted` (ascending) as RGB or RGBA pictures; a JPEG may be decoded small, to fit into `rough`."""
    with _pillow(file, found, limits) as image:
        turn = _TURNS.get(_orientation(image))
        if rough is not None and found.kind == "jpeg":
            share = min(
                1.0, 2 * max(rough) / min(image.size)
            )  # twice the size wanted: the rest is resized well
            image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
        for i in wanted:
            image.seek(i)
            picture = _srgb(image)
            if found.kind == "gif" and picture.size != (found.width, found.height):  # the canvas grows later
                grown = Image.new("RGBA", (found.width, found.height))
                grown.paste(picture)
                picture = grown
            yield picture.transpose(turn) if turn is not None else picture


def _srgb(image: Image.Image) -> Image.Image:
    """sRGB from any mode, with the embedded colour profile applied: RGB where nothing is transparent, else RGBA."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):  # 16-bit grey
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8)).convert(
            "RGBA"
        )
    opaque = image.mode == "RGB" and "transparency" not in image.info
    colours = image.copy() if opaque or image.mode == "CMYK" else image.convert("RGBA")
    transform = (
        _transform(profile, colours.mode)
        if profile and len(profile) < 2**22 and image.mode[0] != "L"
        else None
    )
    if transform is None:
        return colours if colours.mode in ("RGB", "RGBA") else colours.convert("RGB")
    converted = ImageCms.applyTransform(
        colours.convert("RGB") if colours.mode == "RGBA" else colours, transform
    )
    assert converted is not None
    if colours.mode == "RGBA":
        converted.putalpha(colours.getchannel("A"))
    return converted


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an embedded profile to sRGB; None where it is sRGB already, or unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        inner = "CMYK" if mode == "CMYK" else "RGB"
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), inner, "RGB")
    except Exception:  # a damaged profile must not cost the picture
        return None


def _fit(picture: Image.Image, box: tuple[int, int] | None, fit: str, resample: str) -> Image.Image:
    """An RGB or RGBA picture resized to box (height, width), as `decode_array` says: RGBA."""
    if box is None or picture.size == box[::-1]:
        return picture.convert("RGBA")
    height, width = box
    how = Image.Resampling[resample.upper()]
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")  # the same colours, without weighing them by alpha
    if fit == "squash":
        return picture.resize((width, height), how).convert("RGBA")
    if fit in ("crop", "crop_even"):
        return _crop(picture, (width, height), how, even=fit == "crop_even").convert("RGBA")
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    inner = picture.resize(size, how, reducing_gap=2.0)
    canvas = Image.new("RGBA", (width, height))
    canvas.paste(inner.convert("RGBA"), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def _crop(picture: Image.Image, box: tuple[int, int], how: Image.Resampling, *, even: bool) -> Image.Image:
    """The picture resized so that it covers box (width, height), and of that the middle.

    A square: the long side is rounded down (torchvision's `Resize`, transformers' `shortest_edge`). Otherwise both
    sides are rounded to nearest (open_clip's `ResizeKeepRatio`).
    """
    width, height = box
    if width == height:
        short = min(picture.size)
        across, down = (int(width * side / short) for side in picture.size)
    else:
        ratio = min(picture.height / height, picture.width / width)
        across, down = round(picture.width / ratio), round(picture.height / ratio)
    left, top = (round(spare / 2) if even else spare // 2 for spare in (across - width, down - height))
    if across * down <= WIDEST:
        return picture.resize((across, down), how).crop((left, top, left + width, top + height))
    # Hundreds of times as long as wide: only what is seen is computed, one side after the other, as Pillow does.
    sides = [(0, across, left, width), (1, down, top, height)]
    for axis, whole, first, count in sides:
        step = picture.size[axis] / whole
        region, size = [0.0, 0.0, *picture.size], list(picture.size)
        region[axis], region[axis + 2], size[axis] = first * step, (first + count) * step, count
        picture = picture.resize((size[0], size[1]), how, box=(region[0], region[1], region[2], region[3]))
    return picture


# --- clips through PyAV ---------------------------------------------------------------------------------------------


@contextmanager
def _container(file: BinaryIO, found: Probe, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """The opened container and its first picture track. The demuxer is named, so no playlist can be smuggled in."""
    try:
        import av
    except ImportError:
        raise _Refusal("reading mp4 and webm clips needs PyAV: pip install 'reverie[video]'") from None
    file.seek(0)
    options = {"max_pixels": str(limits.pixels + 64 * 65_536)}  # decoders count rows rounded up to 64
    with av.open(file, format={"mp4": "mov", "webm": "matroska"}[found.kind], options=options) as container:
        if not container.streams.video:
            raise _Refusal(NO_PICTURES)
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise _Refusal("its codec is not known to PyAV")
        stream.codec_context.options = options
        yield container, stream


def _probe_video(file: BinaryIO, found: Probe, limits: Limits) -> Probe:
    """Counts the frames without decoding them, and decodes the first for its true size."""
    frames, first = 0, None
    with _container(file, found, limits) as (container, stream):
        _check(replace(found, width=stream.codec_context.width, height=stream.codec_context.height), limits)
        vp8 = stream.codec_context.name == "vp8"
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            if (
                packet.size and not packet.is_discard and not (vp8 and not bytes(packet)[0] >> 4 & 1)
            ):  # hidden frame
                frames += 1
                if frames > limits.frames:
                    break
        if first is None:
            raise _Refusal("damaged or cut short: it holds no frame that can be decoded")
        rate = float(stream.average_rate or 0)
        seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
        width, height = first.width, first.height
        if first.rotation % 180:
            width, height = height, width
    fps = 0.0 if frames == 1 else rate if 0 < rate <= 1000 else _rate(frames, seconds)
    exact = replace(found, width=width, height=height, frames=frames, fps=fps)
    _check(exact, limits)
    return exact


def _video_frames(file: BinaryIO, found: Probe, wanted: list[int], limits: Limits) -> Iterator[Image.Image]:
    todo = set(wanted)
    with _container(file, found, limits) as (container, stream):
        for i, frame in enumerate(container.decode(stream)):
            if frame.width * frame.height > limits.pixels:
                raise _Refusal(
                    f"a frame of {frame.width} x {frame.height} is more than the limit of {limits.pixels:,}"
                )
            if frame.is_corrupt:
                raise _Refusal("damaged: a frame cannot be decoded")
            if i in todo:
                todo.remove(i)
                space = frame.colorspace
                if space == 2:  # untagged: high definition is BT.709, the rest BT.601, as players assume
                    space = 1 if frame.height >= 720 else 5
                picture = Image.fromarray(frame.to_ndarray(format="rgb24", src_colorspace=space)).convert(
                    "RGBA"
                )
                yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
            if not todo:
                return
