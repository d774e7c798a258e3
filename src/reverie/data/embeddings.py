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

The work is a preparation (data/preparing.py): many workers do it as one does. `Store` keeps latents as well
(data/latents.py).

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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from reverie import disk
from reverie.data.index import Index
from reverie.data.pixels import Bad
from reverie.data.preparing import SHARE, Pool, Share, prepared
from reverie.errors import InputError
from reverie.media import LIMITS, SUFFIXES, Limits, MediaError, Part, Unreached, decode_array, pick, probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PLACE = ".reverie"
FRAMES = 8  # of a clip
FORMAT = 1  # of what is written, and of how files become pictures
EVERY = 30.0  # seconds of work that an interruption may cost
LARGE = 2**28  # bytes of a part that is not held back for longer
FAR = 2**30  # bytes to read that are worth the workers' start
TYPES = ("bfloat16", "float16", "float32")
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


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """The preparation: jobs are (content, file name); a file that can be read has a row for each of its moments.

    media: from names to what decoders open. prepare: pictures or their paths -> signals `b 3 h w`, or a list of them
    each of its own size, called on several threads. embed: signals -> vectors `b d`,
    called with about `batch` of them. dtype: "float16" or "float32".
    """

    media: Callable[[str], Path | Part]
    prepare: Callable[[list[Path | Part] | list[Image.Image]], Tensor | list[Tensor]]
    embed: Callable[[Any], Tensor]
    dtype: str = "float16"
    batch: int = 64
    limits: Limits = LIMITS

    def load(self, job: tuple[str, str]) -> tuple[Tensor | list[Tensor], list[float]]:
        """Signals, and the seconds at which they stand. MediaError: the file has none."""
        pictures, seconds = frames_of(at_hand(self.media(job[1]), self.limits), limits=self.limits)
        return self.prepare(pictures), seconds

    def make(self, loaded: Iterable[tuple[Tensor | list[Tensor], list[float]]]) -> dict[str, Tensor]:
        """`vectors n d`, `seconds n`, and `lengths`: how many rows each file has."""
        import torch

        vectors: list[Tensor] = []
        seconds: list[float] = []
        lengths: list[int] = []
        waiting: list[Tensor | list[Tensor]] = []

        def flush() -> None:
            stacked = [signals for signals in waiting if isinstance(signals, torch.Tensor)]
            batch = torch.cat(stacked) if stacked else [image for signals in waiting for image in signals]
            with torch.no_grad():
                found = self.embed(batch)
            if found.ndim != 2:
                raise InputError(
                    f"this model gives {found.shape[1]} vectors a picture, where one is compared: take a CLIP."
                )
            vectors.append(found.to("cpu", torch_type(self.dtype)))
            waiting.clear()

        for signals, moments in loaded:
            waiting.append(signals)
            lengths.append(len(moments))
            seconds += moments
            if sum(map(len, waiting)) >= self.batch:
                flush()
        if waiting:
            flush()
        return {
            "vectors": torch.cat(vectors),
            "seconds": torch.tensor(seconds, dtype=torch.float32),
            "lengths": torch.tensor(lengths),
        }


def embed_folder(
    folder: str | Path,
    names: Sequence[str],
    *,
    key: str,
    start: Callable[[], Embedder],
    index: Index | None = None,
    present: Collection[str] | None = None,
    share: int = SHARE,
    dtype: str = "float16",
    workers: int | None = None,
    pool: Pool | None = None,
    limits: Limits = LIMITS,
    quiet: bool = False,
) -> Embeddings:
    """The vectors of the files `names` of a folder: those that the store has, and the others made now.

    key: the `fingerprint` of what makes them. start: gives what does, for this folder and dtype. present: every file of
    the folder, where `names` are some of them; the vectors of others leave the store. share: files that are done
    together. workers: threads that read. pool: workers in processes of their own, for which `start` is plain
    (data/preparing.py). index: the folder's, without which only files of their own are found, and no parts of tars.
    InputError: vectors that are not finite, or whose values dtype cannot hold.
    """
    store = Store(Path(folder), f"embeddings-{key}-{dtype}", dtype, quiet=quiet)
    contents, reasons = store.fill(
        names, start, index=index, present=present, share=share, workers=workers, pool=pool, limits=limits,
        label="embedding", quiet=quiet,
    )  # fmt: skip
    store.tidy()
    return store.gather(Path(folder), names, contents, reasons)


def at_hand(media: Path | Part, limits: Limits) -> Path | Part:
    """A file, or a part of a tar with its bytes. Unreached: the tar cannot be read, which says nothing of the part."""
    try:
        return media.held(limits) if isinstance(media, Part) else media
    except MediaError as error:
        raise Unreached(Path(media.name), error.reason) from None


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


class Store:
    """What was computed of a folder's files: for each content some rows, `axes` axes with that of the rows."""

    def __init__(self, folder: Path, name: str, dtype: str, *, axes: int = 2, quiet: bool) -> None:
        assert dtype in TYPES, dtype
        self.dtype, self.axes = dtype, axes
        self.parts: list[_Part] = []
        self.where: dict[str, tuple[int, int]] = {}  # content -> part, place in it
        self.bad: dict[str, str] = {}
        self.alive: set[str] | None = None
        self._new: list[tuple[str, Tensor, Tensor]] = []
        self._new_bad: dict[str, str] = {}
        self._since, self._held = time.monotonic(), 0
        self.files = folder / PLACE / "files.parquet"
        self.place = folder / PLACE / name
        with contextlib.suppress(OSError):
            self.place.mkdir(parents=True, exist_ok=True)
        self.writable = self.place.is_dir() and os.access(self.place, os.W_OK)
        for path in sorted(self.place.glob("[!.]*.safetensors")):
            if (part := _read(path, dtype, axes)) is not None:
                self._take(part)
        if not self.writable and not quiet:
            print(
                f"{folder} cannot be written to: what is made now is kept in memory only.",
                file=sys.stderr,
            )

    def _take(self, part: _Part) -> None:
        if part.contents and self.row not in ((), part.vectors.shape[1:]):
            return  # of no model that has this fingerprint
        self.parts.append(part)
        for i, content in enumerate(part.contents):
            self.where.setdefault(content, (len(self.parts) - 1, i))
        self.bad |= part.bad

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of a row; () where there is none yet."""
        return next((tuple(part.vectors.shape[1:]) for part in self.parts if part.contents), ())

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
        pool: Pool | None,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """The content of each of `names`, and the reasons of those that cannot be read.

        Of parts of tars the index says it, and reading compares.
        """
        folder = self.files.parent.parent
        known = _read_files(self.files)
        kept = {name: row for name, row in known.items() if name in present}
        contents: dict[str, str] = {}
        reasons: dict[str, str] = {}
        todo: dict[str, tuple[int, int]] = {}
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
                todo[name] = (state.st_size, state.st_mtime_ns)

        far = pool if sum(size for size, _ in todo.values()) > FAR else None
        for share in prepared(
            [(name,) for name in todo], partial(_Reader, Path(os.path.abspath(folder))), pool=far, share=4 * SHARE,
            threads=workers, label="reading", quiet=quiet,
        ):  # fmt: skip
            for (name,), found in zip(share.good, share.tensors.get("hashes", ()), strict=True):
                contents[name] = found.numpy().tobytes().hex()
                kept[name] = (*todo[name], contents[name])
            for (name,), reason in (share.bad | share.killed).items():
                reasons[name] = reason
                kept.pop(name, None)
        self.alive = {content for _, _, content in kept.values()}
        self.alive |= {part.hash for name, part in parts.items() if name in present}
        if self.writable and kept != known:
            _write_files(self.files, kept)
        return contents, reasons

    # Filling

    def fill(
        self,
        names: Sequence[str],
        start: Callable[[], Any],
        *,
        present: Collection[str] | None,
        index: Index | None = None,
        share: int,
        workers: int | None,
        pool: Pool | None,
        limits: Limits,
        label: str,
        quiet: bool,
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Have the rows of the files `names` made that are not kept; the contents of the files, and what has none."""
        workers = workers or (index.readers if index is not None else None)
        parts = {
            item.file_name: part for item in index or () if isinstance(part := index.media(item), Part)
        } if index is not None else {}  # fmt: skip
        contents, reasons = self.look(
            names, set(names if present is None else present), parts, workers, limits, quiet, pool
        )
        first: dict[str, str] = {}  # content -> a file that has it
        for name in names:
            if name in contents:
                first.setdefault(contents[name], name)
        todo = [(content, name) for content, name in first.items() if not self.knows(content)]
        killed: dict[str, str] = {}
        try:
            for done in prepared(
                todo, start, pool=pool, share=share, threads=workers, label=label, quiet=quiet
            ):
                self.add(done)
                killed |= {content: reason for (content, _), reason in done.killed.items()}
        finally:
            self.flush()
        for name in names:
            if (reason := killed.get(contents.get(name, ""))) is not None:  # told now, tried again next time
                reasons[name] = reason
                del contents[name]
        return contents, reasons

    def add(self, share: Share) -> None:
        """Take what became of some files. InputError: rows that are not finite or not like those that are here."""
        for (content, _), reason in share.bad.items():
            self.bad[content] = self._new_bad[content] = reason
        if share.good:
            vectors, seconds = share.tensors["vectors"], share.tensors["seconds"]
            assert (vectors.dtype, vectors.ndim) == (torch_type(self.dtype), self.axes)
            if not vectors.isfinite().all():
                raise InputError(
                    f"some of the model's vectors are not finite numbers in {self.dtype}: the model is broken."
                )
            if self.row not in ((), vectors.shape[1:]):
                here, now = (" x ".join(map(str, shape)) for shape in (self.row, vectors.shape[1:]))
                raise InputError(
                    f"{self.place} holds vectors of {here} numbers, but the model makes {now}: remove that folder."
                )
            lengths = share.tensors["lengths"].tolist()
            rows = zip(vectors.split(lengths), seconds.split(lengths), strict=True)
            for (content, _), (own, moments) in zip(share.good, rows, strict=True):
                self._new.append((content, own, moments))
            self._held += vectors.nbytes
        if time.monotonic() - self._since > EVERY or self._held > LARGE:
            self.flush()

    def flush(self) -> None:
        """What is new becomes a part."""
        import torch

        self._since, self._held = time.monotonic(), 0
        if not self._new and not self._new_bad:
            return
        vectors = torch.cat([own for _, own, _ in self._new]) if self._new else torch.empty([0] * self.axes)
        part = _Part(
            path=None,
            contents=[content for content, _, _ in self._new],
            start=np.cumsum([0] + [len(own) for _, own, _ in self._new], dtype=np.int64),
            seconds=torch.cat([moments for _, _, moments in self._new]) if self._new else torch.empty(0),
            vectors=vectors.to(torch_type(self.dtype)),
            bad=self._new_bad,
        )
        self._new, self._new_bad = [], {}
        self._take(self._keep(part))

    def _keep(self, part: _Part) -> _Part:
        """The part as it lies on the disk, where it can be written."""
        if not self.writable:
            return part
        try:
            written = _read(_write(self.place, part), self.dtype, self.axes)
        except OSError as error:  # a full disk must not cost the vectors
            self.writable = False
            print(
                f"{self.place}: {error.strerror or error}; what is made now is kept in memory only.",
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

    def contents(self) -> dict[str, str]:
        """The content of each file when it was last looked at."""
        return {name: content for name, (_, _, content) in _read_files(self.files).items()}

    def rows_of(self, content: str) -> Tensor:
        """The rows of one content, mapped. KeyError: it has none."""
        part, i = self.where[content]
        start = self.parts[part].start
        return self.parts[part].vectors[int(start[i]) : int(start[i + 1])]

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
        out = torch.empty(len(rows), *self.row, dtype=torch_type(self.dtype))
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
        vectors = self._vectors(rows) if good else torch.empty(0, 0, dtype=torch_type(self.dtype))
        return Embeddings(
            folder=folder, names=good, vectors=vectors, file=file, seconds=seconds, bad=tuple(bad),
            place=self.place if self.writable else None, digest=whole.hexdigest(),
        )  # fmt: skip


class _Reader:
    """The preparation that tells what files hold: jobs are (file name,), rows are sha256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, job: tuple[str]) -> bytes:
        try:
            return bytes.fromhex(disk.sha256(self.folder / job[0]))
        except OSError:
            raise MediaError(self.folder / job[0], "the file cannot be read") from None

    def make(self, loaded: Iterable[bytes]) -> dict[str, Tensor]:
        import torch

        hashes = np.frombuffer(b"".join(loaded), np.uint8).reshape(-1, 32)
        return {"hashes": torch.from_numpy(hashes.copy())}


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


def _read(path: Path, dtype: str, axes: int = 2) -> _Part | None:
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
            (vectors.ndim, contents.ndim) == (axes, 2)
            and vectors.dtype == torch_type(dtype)
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


def torch_type(name: str) -> torch.dtype:
    import torch

    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]


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
