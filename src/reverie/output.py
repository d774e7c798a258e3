"""Pictures and clips as files: every format that Reverie writes, and what made each, inside the file itself.

    png, apng   lossless                                         webp   lossless, or at a quality
    jpg         a picture alone                                  gif    256 colours a frame, transparency on white
    mp4         H.264, 4:2:0, its index in front (PyAV)          webm   VP9, 4:2:0 (PyAV)

Frames are written as they come, so a long clip takes no more memory than a short one, and a file exists whole or not at
all. Pillow encodes the frames of an animation as stills of what changed since the frame before; the containers are put
together here, so that no frame is lost, equal ones included, and times do not drift. The same frames and words give the
same bytes, with the same versions of Pillow and PyAV: no clock is read and encoders have one thread.

What made a file is JSON in the place for comments: PNG's iTXt "Comment", GIF's comment, the tag "comment" of mp4 and
webm, and Exif's ImageDescription in JPEG and WebP. `read` finds it wherever it is.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from fractions import Fraction
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from reverie import disk
from reverie.errors import InputError
from reverie.media import Part, comment, flatten
from reverie.pictures import to_bytes

FORMATS = ("png", "webp", "gif", "mp4", "webm", "jpg")
MOVIES = {"mp4": "libx264", "webm": "libvpx-vp9"}
FASTEST = {"gif": 50.0, "mp4": 1000.0, "webm": 1000.0, "webp": 1000.0, "png": 1000.0}  # frames a second
SLOWEST = 0.02  # fifty seconds a frame, which every format can say
LONGEST = 60_000  # characters that say what made a file, in ASCII: JPEG has room for 64 kB
_DESCRIPTION = 0x010E  # of Exif


@dataclass(frozen=True, kw_only=True)
class Made:
    """What made a file: enough to make it again.

    model: its name, without the folders that it lies in. weights: their hash (weights/store.py, `hash_of`).
    asked: whatever else was asked for, as plain values, such as the size or a negative prompt.
    """

    prompt: str
    seed: int
    model: str
    weights: str
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    task: str = "sample"
    asked: Mapping[str, Any] = field(default_factory=dict)
    reverie: str = field(default_factory=lambda: metadata.version("reverie"))

    def __str__(self) -> str:
        told = {**self.values(), "prompt": self.prompt or "(none)", **self.asked}
        width = max(map(len, told))
        return "\n".join(f"{key:{width}}  {_plain(value)}" for key, value in told.items() if key != "asked")

    def values(self) -> dict[str, Any]:
        """As JSON has it; what is None is left out."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        found["asked"] = dict(self.asked)
        return {key: value for key, value in found.items() if value is not None and value != {}}

    def json(self) -> str:
        """In one line of ASCII, which every format can hold."""
        return json.dumps(self.values(), allow_nan=False)


def read(path: str | Path | Part) -> Made | None:
    """What made a file; None where it does not say. MediaError: it is no picture or clip, or cannot be opened."""
    text = comment(path)
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    kinds: dict[str, tuple[type, ...]] = {
        "prompt": (str,), "seed": (int,), "model": (str,), "weights": (str,), "steps": (int,),
        "guidance": (int, float), "sampler": (str,), "task": (str,), "asked": (dict,), "reverie": (str,),
    }  # fmt: skip
    needed = {"prompt", "seed", "model", "weights", "reverie"}
    if not isinstance(found, dict) or not needed <= found.keys():
        return None
    known = {key: found[key] for key in kinds if key in found}
    return Made(**known) if all(type(known[key]) in kinds[key] for key in known) else None


def store(
    signal: Any,
    stem: str | Path,
    *,
    fps: float = 12.0,
    format: str | None = None,
    made: Made | None = None,
    quality: int | None = None,
) -> Path:
    """Write a signal beside others, as STEM.FORMAT; its folder is made. Returns the path.

    signal: `c f h w` in [-1, 1], an array or a tensor on any device, or any iterable of such parts in order.
    format: one of FORMATS; None: png for one frame, webp for more. The rest is as `write` has it.
    """
    parts = [signal] if hasattr(signal, "shape") else signal
    frames = (frame for part in parts for frame in to_bytes(_by_frame(part)))
    first = list(islice(frames, 2))
    if format is None:
        format = "png" if len(first) == 1 else "webp"
    check_format(format, len(first), fps)
    path = Path(f"{stem}.{format}")
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, chain(first, frames), fps=fps, made=made, quality=quality)


def write(
    path: str | Path,
    frames: Iterable[np.ndarray | Image.Image],
    *,
    fps: float = 12.0,
    quality: int | None = None,
    made: Made | None = None,
    durable: bool = True,
) -> Path:
    """Frames (uint8 `h w 3` or `h w 4`, or pictures, all of one size) into the format that the name's end says.

    One frame is a still, more go round and round, at `fps`. quality: 1 to 100 for webp and jpg; without it, webp is
    lossless. durable: as `disk.whole` has it. InputError: a format that there is not, or that cannot hold this, or more
    words than a file holds; mp4 and webm without PyAV.
    """
    path = Path(path)
    kind = {"jpeg": "jpg", "apng": "png"}.get(path.suffix[1:].lower(), path.suffix[1:].lower())
    pixels = map(_pixels, frames)
    first = list(islice(pixels, 2))
    assert first, "a file has at least one frame"
    check_format(kind, len(first), fps)
    if quality is not None and not (isinstance(quality, int) and 1 <= quality <= 100):
        raise InputError(f"quality is {quality!r:.40}: give a whole number from 1 to 100.")
    if made is not None:
        check_words(made.prompt, *map(str, made.asked.values()))
    text = None if made is None else made.json()
    every = chain(first, pixels)
    with disk.whole(path, durable=durable) as draft:
        if kind in MOVIES:
            _movie(draft, every, kind, Fraction(fps).limit_denominator(100_000), text)
        elif len(first) == 1:
            _still(draft, first[0], kind, quality, text)
        else:
            with draft.open("wb") as file:
                _ANIMATIONS[kind](file, _changes(every, fps, kind), quality, text)
    return path


def check_format(format: str, frames: int, fps: float) -> None:
    """InputError: there is no such format, or it cannot hold so many frames at such a rate."""
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r:.40}: choose one of {', '.join(FORMATS)}.")
    if format == "jpg" and frames > 1:
        raise InputError("jpg holds pictures and no clips: choose webp, mp4, webm, gif or png.")
    if frames > 1 and not SLOWEST <= fps <= FASTEST[format]:
        raise InputError(
            f"fps is {fps:g}: a {format} shows {SLOWEST:g} to {FASTEST[format]:g} frames a second."
        )
    if format in MOVIES:
        try:
            import av  # noqa: F401
        except ImportError:
            raise InputError(
                f"writing {format} needs PyAV: pip install 'reverie[video]', or choose webp or gif."
            ) from None


def check_words(*words: str | None) -> None:
    """InputError: a prompt and what else was asked for in words are longer than what a file can say of itself."""
    length = sum(len(json.dumps(text)) for text in words if text)
    if length > LONGEST:
        raise InputError(
            f"the words take {length:,} characters in the file that they make, which holds {LONGEST:,}: say less."
        )


def check_folder(folder: str | Path) -> None:
    """InputError: nothing can be written into it, now or once it is made. Makes nothing."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file, not a folder: give a folder for what is drawn.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} may not be written into: give another folder.")


def next_number(folder: str | Path) -> int:
    """One more than the highest number that a file's name in `folder` begins with, as in 007-a-red-rocket.png; or 0."""
    folder = Path(folder)
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    found = [int(match[1]) for name in names if (match := re.match(r"(\d{3,9})-", name))]
    return max(found, default=-1) + 1


def _by_frame(part: Any) -> np.ndarray:
    """`c f h w` -> `f c h w`."""
    return np.moveaxis(np.asarray(part.detach().float().cpu() if hasattr(part, "cpu") else part), 1, 0)


def _pixels(frame: np.ndarray | Image.Image) -> np.ndarray:
    """uint8 `h w 3`, or `h w 4`."""
    if isinstance(frame, Image.Image) and frame.mode not in ("RGB", "RGBA"):
        frame = frame.convert("RGB")
    return np.asarray(frame)


def _plain(value: Any) -> str:
    """Words that steer no terminal: they may be a stranger's."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
    return text.encode("utf-8", "backslashreplace").decode()


# --- stills ---------------------------------------------------------------------------------------------------------


def _still(path: Path, pixels: np.ndarray, kind: str, quality: int | None, text: str | None) -> None:
    how: dict[str, Any] = {}
    if kind in ("jpg", "gif"):
        pixels = _opaque(pixels)
    if kind == "png" and text is not None:
        how["pnginfo"] = PngImagePlugin.PngInfo()
        how["pnginfo"].add_itxt("Comment", text)
    elif kind in ("webp", "jpg"):
        how |= {"exif": _exif(text)} if text is not None else {}
        how |= {"quality": quality or 95} if kind == "jpg" or quality else {"lossless": True}
    elif kind == "gif" and text is not None:
        how["comment"] = text.encode()
    _picture(pixels).save(path, format="JPEG" if kind == "jpg" else kind.upper(), **how)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _opaque(pixels: np.ndarray) -> np.ndarray:
    return flatten(pixels) if pixels.shape[-1] == 4 else pixels


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    exif[_DESCRIPTION] = text
    return exif.tobytes()


# --- animations: stills of what changed, in a container -------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """The part of a frame `h w c` that differs from the frame before, and how many units of time it stands."""

    pixels: np.ndarray
    _: KW_ONLY
    left: int
    top: int
    whole: tuple[int, int]  # height and width of the frame
    time: int


def _changes(frames: Iterator[np.ndarray], fps: float, kind: str) -> Iterator[_Change]:
    """Time in milliseconds, hundredths in GIF; every frame ends at the nearest one, so that rounding never adds up."""
    unit = 100 if kind == "gif" else 1000
    before: np.ndarray | None = None
    for number, now in enumerate(frames):
        now = _opaque(now) if kind == "gif" else now
        top, left, bottom, right = 0, 0, *now.shape[:2]
        if before is not None:
            assert now.shape == before.shape, f"a frame of {now.shape} among those of {before.shape}"
            other = (now != before).any(axis=2)
            rows, columns = np.flatnonzero(other.any(axis=1)), np.flatnonzero(other.any(axis=0))
            top, bottom = (rows[0], rows[-1] + 1) if len(rows) else (0, 1)
            left, right = (columns[0], columns[-1] + 1) if len(columns) else (0, 1)
            top, left = top - top % 2, left - left % 2  # WebP counts places in pairs
        yield _Change(
            now[top:bottom, left:right],
            left=int(left),
            top=int(top),
            whole=(now.shape[0], now.shape[1]),
            time=round((number + 1) * unit / fps) - round(number * unit / fps),
        )
        before = now


def _encoded(pixels: np.ndarray, kind: str, **how: Any) -> bytes:
    picture = _picture(pixels)
    (picture.quantize(256) if kind == "GIF" else picture).save(out := io.BytesIO(), kind, **how)
    return out.getvalue()


def _webp(file: BinaryIO, changes: Iterable[_Change], quality: int | None, text: str | None) -> None:
    """RIFF: VP8X (what is in it), ANIM (for ever), an ANMF for each frame, EXIF."""

    def chunk(name: bytes, body: bytes) -> None:
        file.write(name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2))

    how: dict[str, Any] = {"quality": quality} if quality else {"lossless": True, "method": 1}
    file.write(bytes(30))  # the head, when all is known
    chunk(b"ANIM", struct.pack("<IH", 0xFFFFFFFF, 0))
    alpha, height, width = False, 0, 0
    for change in changes:
        (height, width), alpha = change.whole, alpha or change.pixels.shape[2] == 4
        still = _encoded(change.pixels, "WEBP", **how)
        high, wide = change.pixels.shape[:2]
        numbers = (change.left // 2, change.top // 2, wide - 1, high - 1, change.time)
        place = b"".join(number.to_bytes(3, "little") for number in numbers)
        chunk(b"ANMF", place + b"\x02" + _webp_pixels(still))  # 2: in place of what was there
    if text is not None:
        chunk(b"EXIF", _exif(text).removeprefix(b"Exif\0\0"))
    size = file.tell() - 8
    file.seek(0)
    flags = 0x02 | (0x10 if alpha else 0) | (0x08 if text is not None else 0)
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    file.write(struct.pack("<4sI4s4sIB3x", b"RIFF", size, b"WEBP", b"VP8X", 10, flags) + canvas)


def _webp_pixels(still: bytes) -> bytes:
    """Of a still WebP the chunks that hold its pixels."""
    at, kept = 12, b""
    while at < len(still):
        name, length = struct.unpack("<4sI", still[at : at + 8])
        end = at + 8 + length + length % 2
        if name in (b"ALPH", b"VP8 ", b"VP8L"):
            kept += still[at:end]
        at = end
    return kept


def _png(file: BinaryIO, changes: Iterable[_Change], quality: int | None, text: str | None) -> None:
    """PNG: acTL (how many frames, for ever), and for each frame fcTL and its pixels, the first as IDAT."""

    def chunk(name: bytes, body: bytes) -> None:
        file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))

    frames = order = after = 0
    for change in changes:
        parts = list(_png_chunks(_encoded(change.pixels, "PNG")))
        if not frames:
            file.write(b"\x89PNG\r\n\x1a\n")
            chunk(*parts[0])
            after = file.tell()
            chunk(b"acTL", bytes(8))
            if text is not None:
                chunk(b"iTXt", b"Comment\0\0\0\0\0" + text.encode())
        high, wide = change.pixels.shape[:2]
        control = (order, wide, high, change.left, change.top, change.time, 1000, 0, 0)
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", *control))
        order += 1
        for name, body in parts:
            if name == b"IDAT" and frames:
                chunk(b"fdAT", struct.pack(">I", order) + body)
                order += 1
            elif name == b"IDAT":
                chunk(name, body)
        frames += 1
    chunk(b"IEND", b"")
    file.seek(after)
    chunk(b"acTL", struct.pack(">II", frames, 0))


def _png_chunks(still: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(still):
        length, name = struct.unpack(">I4s", still[at : at + 8])
        yield name, still[at + 8 : at + 8 + length]
        at += length + 12


def _gif(file: BinaryIO, changes: Iterable[_Change], quality: int | None, text: str | None) -> None:
    """GIF89a: goes round for ever, a comment, and each frame with colours of its own."""
    for number, change in enumerate(changes):
        if not number:
            file.write(struct.pack("<6sHHBBB", b"GIF89a", *change.whole[::-1], 0, 0, 0))
            file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
            if text is not None:
                rest = text.encode()
                parts = [rest[at : at + 255] for at in range(0, len(rest), 255)]
                file.write(b"\x21\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0")
        still = _encoded(change.pixels, "GIF", interlace=0)
        colours = 3 << (still[10] & 7) + 1
        start = 13 + colours
        while still[start] != 0x2C:  # past what Pillow says of the picture, to the picture
            start += 2
            while still[start]:
                start += 1 + still[start]
            start += 1
        high, wide = change.pixels.shape[:2]
        file.write(struct.pack("<4sHBB", b"\x21\xf9\x04\x04", change.time, 0, 0))  # 4: stays for the next
        place = (change.left, change.top, wide, high, 0x80 | (still[10] & 7))
        file.write(struct.pack("<cHHHHB", b"\x2c", *place))
        file.write(still[13 : 13 + colours] + still[start + 10 : -1])
    file.write(b"\x3b")


_ANIMATIONS: dict[str, Callable[[BinaryIO, Iterable[_Change], int | None, str | None], None]] = {
    "webp": _webp,
    "png": _png,
    "gif": _gif,
}


# --- movies, by PyAV ------------------------------------------------------------------------------------------------


def _movie(path: Path, frames: Iterator[np.ndarray], kind: str, fps: Fraction, text: str | None) -> None:
    """BT.709, and sides made even by repeating the last row or column."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    how = {"movflags": "+faststart"} if kind == "mp4" else {}
    with av.open(str(path), "w", format=kind, options={"fflags": "+bitexact", **how}) as container:
        if text is not None:
            container.metadata["comment"] = text
        try:
            stream: Any = container.add_stream(MOVIES[kind], rate=fps, options=_ENCODERS[kind])
        except (ValueError, av.error.FFmpegError):
            raise InputError(
                f"this PyAV has no {MOVIES[kind]}, which writes {kind}: install PyAV's own wheel, or choose webp."
            ) from None
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.bit_rate = 0
        context.flags |= av.codec.context.Flags.bitexact
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709.value
        context.color_range = ColorRange.MPEG.value
        for number, pixels in enumerate(frames):
            pixels = _opaque(pixels)
            high, wide = pixels.shape[:2]
            pixels = np.pad(pixels, ((0, high % 2), (0, wide % 2), (0, 0)), mode="edge")
            if not number:
                stream.height, stream.width = pixels.shape[:2]
            assert pixels.shape[:2] == (stream.height, stream.width), "all frames have one size"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


_ENCODERS = {
    "mp4": {"crf": "17", "preset": "medium", "threads": "1"},
    "webm": {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "0", "threads": "1"},
}
