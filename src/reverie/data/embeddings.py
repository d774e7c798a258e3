"""Embeddings of a folder's pictures and clips, computed once and kept beside them.

    FOLDER/.reverie/files.parquet              which content each file had when it was last looked at
    FOLDER/.reverie/embeddings-FINGERPRINT/    *.safetensors: vectors, and whose they are

A vector belongs to a content (sha256), not to a name: what was renamed or copied costs nothing, what changed is
embedded again, and what is gone drops out. The fingerprint is of the model's weights and configuration (see
`fingerprint`), so that a model that was trained on never reads what it was before. A file's content is looked up by its
size and time of change, as `make` does it; only new and changed files are read.

A clip has a vector for each of up to FRAMES evenly spaced frames. What cannot be decoded is listed with its reason and
not tried again before its content changes. Vectors are written a part at a time, each part whole or not at all, so an
interruption costs seconds, and two processes may fill one store: they do some work twice and harm nothing. A later
call joins the parts. The vectors are memory-mapped where one part holds exactly what is asked for.

Convention: vectors are rows `n d`, as the given function makes them, in float16 or float32; unit vectors lose less
than 0.001 of a cosine in float16.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from reverie import disk
from reverie.data.index import Index
from reverie.data.pixels import Bad
from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.media import LIMITS, SUFFIXES, Limits, MediaError, Part, decode_array, pick, probe
from reverie.progress import track

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PLACE = ".reverie"
FRAMES = 8  # of a clip
FORMAT = 1  # of what is written, and of how files become pictures
EVERY = 30.0  # seconds of work that an interruption may cost
PARTS = 8  # more are joined into one
DEAD = 1 / 8  # a larger share of vectors of contents that are gone is written off the disk


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The vectors of some files. Row r is of `names[file[r]]`; the rows of one file stand together, in time."""

    folder: Path
    names: tuple[str, ...]  # the files that have vectors, relative to the folder, in the order asked for
    vectors: Tensor  # n d
    file: Tensor  # int64 n
    seconds: Tensor  # float32 n: where in its clip the frame stands; 0 for pictures
    bad: tuple[Bad, ...]  # the files that have none, and why
    place: Path | None  # where the vectors are kept; None: in memory, the folder cannot be written to
    digest: str  # of what made the vectors and of whose they are, in order


def fingerprint(state: Mapping[str, Tensor], *about: object) -> str:
    """16 hexadecimal digits of every weight (name, type, shape, bytes) and of whatever else a vector depends on."""
    import torch

    whole = hashlib.blake2b(repr((FORMAT, FRAMES, *about)).encode(), digest_size=8)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        whole.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def media_below(folder: Path) -> list[str]:
    """The pictures and clips of a folder without an index, by the ends of their names; hidden ones are left out."""
    names = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(where).relative_to(folder)
        names += [
            (inside / name).as_posix()
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return names


def embed_folder(
    folder: str | Path,
    names: Sequence[str],
    *,
    key: str,
    prepare: Callable[[list[Path | Part] | list[Image.Image]], Tensor],
    embed: Callable[[Tensor], Tensor],
    index: Index | None = None,
    present: Collection[str] | None = None,
    batch: int = 64,
    dtype: str = "float16",
    workers: int | None = None,
    limits: Limits = LIMITS,
    quiet: bool = False,
) -> Embeddings:
    """The vectors of the files `names` of a folder: those that the store has, and the others made now.

    key: the `fingerprint` of what makes them. prepare: pictures or their paths -> signals `b 3 h w`, called on
    `workers` threads. embed: signals -> vectors `b d`, called with `batch` of them. present: every file of the folder,
    where `names` are some of them; the vectors of others leave the store. index: the folder's, without which only
    files of their own are found, and no parts of tars. dtype: "float16" or "float32".
    InputError: vectors that are not finite, or whose values dtype cannot hold.
    """
    assert dtype in ("float16", "float32"), dtype
    folder = Path(folder)
    workers = workers or (index.readers if index is not None else None)
    parts = {
        item.file_name: part for item in index or () if isinstance(part := index.media(item), Part)
    } if index is not None else {}  # fmt: skip
    store = _Store(folder, key, dtype, quiet=quiet)
    contents, reasons = store.look(
        names, set(names if present is None else present), parts, workers, limits, quiet
    )
    first: dict[str, str] = {}  # content -> a file that has it
    for name in names:
        if name in contents:
            first.setdefault(contents[name], name)
    todo = [(content, name) for content, name in first.items() if not store.knows(content)]

    def load(job: tuple[str, str]) -> tuple[str, Tensor, list[float]] | tuple[str, str] | Bad:
        content, name = job
        media = parts.get(name, folder / name)
        try:
            media = media.held(limits) if isinstance(media, Part) else media
        except MediaError as error:  # of the tar, not of this content
            return Bad(name, error.reason)
        try:
            pictures, seconds = frames_of(media, limits=limits)
            return content, prepare(pictures), seconds
        except MediaError as error:
            return content, error.reason

    try:
        waiting: list[tuple[str, Tensor, list[float]]] = []
        steps = in_order(load, todo, workers)
        for result in track(steps, total=len(todo), label="embedding", quiet=quiet):
            if isinstance(result, Bad):
                reasons[result.path] = result.reason
                continue
            if len(result) == 2:
                store.refuse(*result)
                continue
            waiting.append(result)
            if sum(len(signals) for _, signals, _ in waiting) >= batch:
                store.add(waiting, embed)
                waiting = []
        if waiting:
            store.add(waiting, embed)
    finally:
        store.flush()
    store.tidy()
    return store.gather(folder, names, contents, reasons)


def frames_of(
    path: Path | Part, *, limits: Limits = LIMITS
) -> tuple[list[Path | Part] | list[Image.Image], list[float]]:
    """What of a file is embedded, and the seconds at which it stands: a picture as it lies there, of a clip its frames.

    MediaError: nothing.
    """
    found = probe(path, limits)
    if found.frames == 1:
        return [path], [0.0]
    pictures = [Image.fromarray(frame) for frame in decode_array(path, frames=FRAMES, limits=limits)]
    return pictures, [i / found.fps if found.fps else 0.0 for i in pick(found.frames, FRAMES)]


# --- the store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One file of the store, or what has no file: content i has the rows `start[i]` to `start[i + 1]`."""

    path: Path | None
    contents: list[str]
    start: np.ndarray  # int64, one more than contents
    seconds: Tensor
    vectors: Tensor
    bad: dict[str, str]


class _Store:
    def __init__(self, folder: Path, key: str, dtype: str, *, quiet: bool) -> None:
        self.dtype = dtype
        self.parts: list[_Part] = []
        self.where: dict[str, tuple[int, int]] = {}  # content -> part, place in it
        self.bad: dict[str, str] = {}
        self.alive: set[str] | None = None
        self._new: list[tuple[str, Tensor, list[float]]] = []
        self._new_bad: dict[str, str] = {}
        self._since = time.monotonic()
        self.files = folder / PLACE / "files.parquet"
        self.place = folder / PLACE / f"embeddings-{key}-{dtype}"
        with contextlib.suppress(OSError):
            self.place.mkdir(parents=True, exist_ok=True)
        self.writable = self.place.is_dir() and os.access(self.place, os.W_OK)
        for path in sorted(self.place.glob("[!.]*.safetensors")):
            if (part := _read(path, dtype)) is not None:
                self._take(part)
        if not self.writable and not quiet:
            print(
                f"{folder} cannot be written to: what is embedded now is kept in memory only.",
                file=sys.stderr,
            )

    def _take(self, part: _Part) -> None:
        if part.contents and self.width not in (0, part.vectors.shape[1]):
            return  # of no model that has this fingerprint
        self.parts.append(part)
        for i, content in enumerate(part.contents):
            self.where.setdefault(content, (len(self.parts) - 1, i))
        self.bad |= part.bad

    @property
    def width(self) -> int:
        """Numbers in a vector; 0 where there is none yet."""
        return next((part.vectors.shape[1] for part in self.parts if part.contents), 0)

    def knows(self, content: str) -> bool:
        return content in self.where or content in self.bad

    # What the files hold

    def look(
        self,
        names: Sequence[str],
        present: set[str],
        parts: Mapping[str, Part],
        workers: int | None,
        limits: Limits,
        quiet: bool,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """The content of each of `names`, and the reasons of those that cannot be read.

        Of parts of tars the index says it, and reading compares.
        """
        folder = self.files.parent.parent
        known = _read_files(self.files)
        kept = {name: row for name, row in known.items() if name in present}
        contents, reasons, todo = {}, {}, []
        for name in names:
            if name in parts:
                contents[name] = parts[name].hash
                continue
            try:
                state = (folder / name).stat()
            except OSError:
                reasons[name] = "there is no such file"
                kept.pop(name, None)
                continue
            size, changed, content = kept.get(name, (-1, -1, ""))
            if (size, changed) == (state.st_size, state.st_mtime_ns):
                contents[name] = content
            elif state.st_size > limits.bytes:
                reasons[name] = f"{state.st_size:,} bytes are more than the limit of {limits.bytes:,}"
            else:
                todo.append((name, state.st_size, state.st_mtime_ns))

        def content_of(job: tuple[str, int, int]) -> str | None:
            try:
                return disk.sha256(folder / job[0])
            except OSError:
                return None

        steps = in_order(content_of, todo, workers)
        steps = track(steps, total=len(todo), label="reading", quiet=quiet)
        for (name, size, changed), found in zip(todo, steps, strict=True):
            if found is None:
                reasons[name] = "the file cannot be read"
                kept.pop(name, None)
            else:
                contents[name] = found
                kept[name] = (size, changed, found)
        self.alive = {content for _, _, content in kept.values()}
        self.alive |= {part.hash for name, part in parts.items() if name in present}
        if self.writable and kept != known:
            _write_files(self.files, kept)
        return contents, reasons

    # Filling

    def refuse(self, content: str, reason: str) -> None:
        self.bad[content] = self._new_bad[content] = reason

    def add(self, batch: list[tuple[str, Tensor, list[float]]], embed: Callable[[Tensor], Tensor]) -> None:
        import torch

        with torch.no_grad():
            vectors = embed(torch.cat([signals for _, signals, _ in batch])).to("cpu", _type(self.dtype))
        if not vectors.isfinite().all():
            raise InputError(
                f"some of the model's vectors are not finite numbers in {self.dtype}: the model is broken."
            )
        if self.width not in (0, vectors.shape[1]):
            raise InputError(
                f"{self.place} holds vectors of {self.width} numbers, but the model makes {vectors.shape[1]}: "
                "remove that folder."
            )
        lengths = [len(seconds) for _, _, seconds in batch]
        for (content, _, seconds), own in zip(batch, vectors.split(lengths), strict=True):
            self._new.append((content, own, seconds))
        if time.monotonic() - self._since > EVERY:
            self.flush()

    def flush(self) -> None:
        """What is new becomes a part."""
        import torch

        self._since = time.monotonic()
        if not self._new and not self._new_bad:
            return
        vectors = torch.cat([own for _, own, _ in self._new]) if self._new else torch.empty(0, 0)
        part = _Part(
            path=None,
            contents=[content for content, _, _ in self._new],
            start=np.cumsum([0] + [len(own) for _, own, _ in self._new], dtype=np.int64),
            seconds=torch.tensor([s for _, _, seconds in self._new for s in seconds], dtype=torch.float32),
            vectors=vectors.to(_type(self.dtype)),
            bad=self._new_bad,
        )
        self._new, self._new_bad = [], {}
        self._take(self._keep(part))

    def _keep(self, part: _Part) -> _Part:
        """The part as it lies on the disk, where it can be written."""
        if not self.writable:
            return part
        try:
            written = _read(_write(self.place, part), self.dtype)
        except OSError as error:  # a full disk must not cost the vectors
            self.writable = False
            print(
                f"{self.place}: {error.strerror or error}; embeddings are kept in memory only.",
                file=sys.stderr,
            )
            return part
        assert written is not None
        return written

    def tidy(self) -> None:
        """Joins the parts into one where there are many, or much in them is of contents that are gone."""
        assert self.alive is not None
        if not self.writable or not self.parts:
            return
        total = sum(len(part.vectors) for part in self.parts)
        live = [content for content in self.where if content in self.alive]
        rows, start, seconds = self._rows(live)
        if len(self.parts) <= PARTS and total - len(rows) <= DEAD * total:
            return
        part = _Part(
            path=None, contents=live, start=start, seconds=seconds, vectors=self._vectors(rows),
            bad={content: reason for content, reason in self.bad.items() if content in self.alive},
        )  # fmt: skip
        old = [part.path for part in self.parts]
        kept = self._keep(part)
        self.parts, self.where, self.bad = [], {}, {}
        self._take(kept)
        for path in old:
            if path is not None and kept.path is not None and path != kept.path:
                with contextlib.suppress(OSError):  # Windows removes no file that somebody has mapped
                    path.unlink()

    # Reading

    def _rows(self, contents: Iterable[str]) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """The rows of these contents among the rows of all parts, where each begins, and their seconds."""
        import torch

        offsets = np.cumsum([0] + [len(part.vectors) for part in self.parts])
        begin, length = [], []
        for content in contents:
            part, i = self.where[content]
            start = self.parts[part].start
            begin.append(int(offsets[part] + start[i]))
            length.append(int(start[i + 1] - start[i]))
        start = np.cumsum([0, *length], dtype=np.int64)
        rows = np.repeat(np.asarray(begin, np.int64) - start[:-1], length) + np.arange(start[-1])
        seconds = torch.cat([part.seconds for part in self.parts]) if self.parts else torch.empty(0)
        return rows, start, seconds[torch.from_numpy(rows)]

    def _vectors(self, rows: np.ndarray) -> Tensor:
        """These rows of all parts; the mapped part itself where they are all of it, in its order."""
        import torch

        assert self.parts
        if len(self.parts) == 1 and np.array_equal(rows, np.arange(len(self.parts[0].vectors))):
            return self.parts[0].vectors
        out = torch.empty(len(rows), self.width, dtype=_type(self.dtype))
        offset = 0
        for part in self.parts:
            mine = np.flatnonzero((rows >= offset) & (rows < offset + len(part.vectors)))
            if len(mine):  # an empty part is of no width
                out[torch.from_numpy(mine)] = part.vectors[torch.from_numpy(rows[mine] - offset)]
            offset += len(part.vectors)
        return out

    def gather(
        self, folder: Path, names: Sequence[str], contents: dict[str, str], reasons: dict[str, str]
    ) -> Embeddings:
        import torch

        good = tuple(name for name in names if name in contents and contents[name] in self.where)
        whole = hashlib.blake2b(self.place.name.encode(), digest_size=12)
        for name in good:
            whole.update(bytes.fromhex(contents[name]))
        bad = [
            Bad(name, reasons.get(name) or self.bad.get(contents[name], "a copy of it cannot be read"))
            for name in names
            if name in reasons or contents[name] not in self.where
        ]
        rows, start, seconds = self._rows(contents[name] for name in good)
        file = torch.from_numpy(np.repeat(np.arange(len(good)), np.diff(start)))
        vectors = self._vectors(rows) if good else torch.empty(0, 0, dtype=_type(self.dtype))
        return Embeddings(
            folder=folder, names=good, vectors=vectors, file=file, seconds=seconds, bad=tuple(bad),
            place=self.place if self.writable else None, digest=whole.hexdigest(),
        )  # fmt: skip


def _write(place: Path, part: _Part) -> Path:
    """A part as a safetensors file, named by what is in it."""
    import torch
    from safetensors.torch import save_file

    contents = np.frombuffer(bytes.fromhex("".join(part.contents)), np.uint8).reshape(-1, 32)
    name = hashlib.blake2b(contents.tobytes() + json.dumps(part.bad).encode(), digest_size=8).hexdigest()
    tensors = {
        "vectors": part.vectors.contiguous(),
        "seconds": part.seconds,
        "start": torch.from_numpy(part.start),
        "contents": torch.from_numpy(contents.copy()),
    }
    path = place / f"{name}.safetensors"
    with disk.whole(path) as draft:
        save_file(tensors, draft, metadata={"bad": json.dumps(part.bad), "video": str(_video())})
    return path


def _read(path: Path, dtype: str) -> _Part | None:
    """A part, its vectors mapped; None for a file that is no sound part, whose contents are then embedded again."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about: dict[str, Any] = file.metadata() or {}
        bad = json.loads(about.get("bad", "{}"))
        vectors, start, contents = tensors["vectors"], tensors["start"], tensors["contents"]
        sound = (
            vectors.ndim == contents.ndim == 2
            and vectors.dtype == _type(dtype)
            and start.shape == (len(contents) + 1,)
            and contents.dtype == torch.uint8
            and contents.shape[1:] == (32,)
            and start.dtype == torch.int64
            and int(start[0]) == 0
            and bool((start.diff() > 0).all())
            and int(start[-1]) == len(vectors)
            and tensors["seconds"].shape == (len(vectors),)
            and all(isinstance(text, str) for pair in bad.items() for text in pair)
        )
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    if not sound:
        return None
    if about.get("video") != str(_video()):  # with PyAV (or without), other files can be read
        bad = {}
    text = contents.numpy().tobytes().hex()
    names = [text[i : i + 64] for i in range(0, len(text), 64)]
    return _Part(
        path=path,
        contents=names,
        start=start.numpy(),
        seconds=tensors["seconds"].float(),
        vectors=vectors,
        bad=bad,
    )


def _type(name: str) -> torch.dtype:
    import torch

    return {"float16": torch.float16, "float32": torch.float32}[name]


def _video() -> bool:
    return find_spec("av") is not None


def _read_files(path: Path) -> dict[str, tuple[int, int, str]]:
    """File name -> size, time of change in ns, content; nothing where there is no such table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["file_name", "bytes", "changed", "hash"]).to_pydict()
        rows = zip(table["bytes"], table["changed"], table["hash"], strict=True)
        known = dict(zip(table["file_name"], rows, strict=True))
    except (OSError, pa.ArrowException):
        return {}
    sound = all(
        isinstance(h, str) and len(h) == 64 and set(h) <= set("0123456789abcdef")
        for _, _, h in known.values()
    )
    return known if sound else {}


def _write_files(path: Path, known: dict[str, tuple[int, int, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted(name for name in known if name.encode("utf-8", "ignore").decode() == name)
    table = pa.table({
        "file_name": pa.array(names, pa.string()),
        "bytes": pa.array([known[name][0] for name in names], pa.int64()),
        "changed": pa.array([known[name][1] for name in names], pa.int64()),
        "hash": pa.array([known[name][2] for name in names], pa.string()),
    })  # fmt: skip
    with contextlib.suppress(OSError), disk.whole(path, durable=False) as draft:
        pq.write_table(table, draft)
