"""A folder of media, however its words are kept, becomes an index. The originals are never touched.

Media are known by content, whatever their names. Words are looked for, and all that are found are taken, in
- sidecars beside `a.png`: `a.txt`, `a.caption`, `a.json`, or `a.png.txt` and so on. Each line of a text is a caption;
  a JSON sidecar is a string, a list of strings, or an object with the columns below;
- `metadata.jsonl`, `metadata.csv` or `metadata.parquet` in any folder, with a column `file_name` relative to it
  (imagefolder). Captions are the columns text(s), caption(s), prompt, title, description, alt, alt_text and tags, which
  may end in a language (`caption_zh`); label (or class, category), split, source, licence (or license) and `score_*`
  are understood; any other column is kept as it is;
- class-named folders: where no file of a folder has words, the folder's name is label and caption, unless it is a
  general one (`images`, `train`, ...);
- webdataset tars: files of one stem belong together, as beside each other in a folder. A plain .tar is indexed where it
  lies, its members named `a.tar/0001.png`, and read from there; a gzipped one (.tar.gz, .tgz), which can only be read
  from its beginning, is unpacked into `extracted/` beside the index, as is one that was unpacked there before.

Text must be UTF-8 (or UTF-16 with its mark): a file whose caption is neither is rejected, not guessed at. A file
without any words is rejected too, unless `need_captions` is off. Languages are told by their script (zh, ja, ko, or
else en).

The split is a `split` column, or a top folder called train, val or test; otherwise that of the last import, otherwise a
function of the file's bytes, so copies of one picture are never on both sides. An import over an older index keeps its
scores, its unknown columns, captions that did not come from an import, and leaves out those that were dropped;
rejections are decided afresh.

`out` puts the index elsewhere (for folders that are read-only, or have a `metadata.parquet` of their own): there, a
symbolic link to the folder makes the file names resolve.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from reverie import disk
from reverie.data import remote
from reverie.data.alone import alone
from reverie.data.check import nothing_usable
from reverie.data.index import FILE, SPLITS, Caption, Index, Item, is_ours, language_of, refuse_half_packed
from reverie.data.marks import still_marked
from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.media import LIMITS, SUFFIXES, Limits, MediaError, Part, decode_array, probe, sniff
from reverie.progress import track
from reverie.rng import integer

NO_CAPTION = "no caption"  # begins the reason of files without words
TEXTS = (".txt", ".caption")
SIDECARS = (*TEXTS, ".json", ".cls")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TARS = (".tar", ".tar.gz", ".tgz")
OTHER_TARS = (".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
EXTRACTED = "extracted"
PACKED = "shards.json"  # what tells a folder that `data/shards.py` packed
GROWTH = 50  # a gzipped tar holds at most so many times its size, lest a small file fill the disk
LONGEST = 2**20  # bytes of one sidecar
GENERAL = {"images", "image", "img", "imgs", "pictures", "photos", "videos", "clips", "data", "media", "files",
           "samples", "dataset"}  # fmt: skip
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test"}  # fmt: skip
_WORDS = re.compile(r"(texts?|captions?|prompt|title|description|alt|alt_text|tags)(?:_([a-z]{2}))?")
_MEANT = {"label": "label", "class": "label", "class_name": "label", "category": "label", "split": "split",
          "source": "source", "licence": "licence", "license": "licence"}  # fmt: skip
_IMPORTED = ("sidecar:", "json:", "table:", "class:")  # how the caption sources of an import begin
_OTHER_MEDIA = {".svg", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".ico", ".tga", ".exr",
                ".dng", ".cr2", ".nef", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".3gp"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A file in a plain tar, read where it lies: `size` bytes from `offset` on. `shard`: the tar in the index."""

    tar: Path
    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass
class _Words:
    """What is known of one file besides its bytes."""

    captions: list[Caption] = field(default_factory=list)
    meant: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class _Unusable(Exception):
    """A sidecar or table that cannot be read; its text is the reason."""


def import_folder(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    val: float = 0.05,
    need_captions: bool = True,
    source: str | None = None,
    licence: str | None = None,
    verify: bool = True,
    workers: int | None = None,
    limits: Limits = LIMITS,
    quiet: bool = False,
) -> Index:
    """Reads `folder`, writes `metadata.parquet` there (or in `out`), and returns the index.

    val: share of the files that go to the split "val" (at least one of two or more).
    need_captions: reject files without words.
    source, licence: recorded for every file that names none.
    verify: decode every picture and every frame of a GIF, WebP, PNG or AVIF, so that damaged files are found now
    (of mp4 and webm: the first frame, and that the file is whole).
    workers: threads.
    InputError: no such folder, nothing usable in it, or nowhere to write.
    """
    if where := remote.address(folder):
        raise InputError(
            f"{where} is an address, where nothing is imported: import the folder, and copy it there."
        )
    folder = remote.local(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder that holds the pictures.")
    refuse_half_packed(folder)
    if not 0 <= val < 1:
        raise InputError(f"val must be a share from 0 to below 1, not {val}.")
    target, prefix = _place(folder, Path(out) if out is not None else None)
    with alone(target, "reverie data import"):
        if not prefix and (folder / FILE).exists() and (folder / PACKED).exists():
            raise InputError(
                f"{folder} was packed by `reverie data pack` and has its index: use it as it is."
            )
        previous = _previous(target, folder)
        problems, members = _open_tars(folder, target, prefix, limits, quiet)
        files, words, extensions = _look(folder, target, prefix, members, problems)

        def examine(name: str) -> Item:
            return _examine(files[name], members.get(files[name]), name, verify, limits)

        names = sorted(files)
        steps = in_order(examine, names, workers)
        items = list(track(steps, total=len(names), label="reading", quiet=quiet))
        _name_classes(items, words, prefix)
        known = {item.hash: item for item in previous or () if item.hash}
        known_names = {(item.hash, item.file_name): item for item in previous or () if item.hash}
        finished, extra = [], {}
        named = {item.hash for item in items if _given_split(item, words[item.file_name], prefix) is not None}
        free = {item.hash for item in items} - named
        for item in items:
            its = words[item.file_name]
            old = known_names.get((item.hash, item.file_name), known.get(item.hash))
            finished.append(_finish(item, its, old, prefix, val, need_captions, source, licence))
            before = previous.extra_of(old.file_name) if previous is not None and old is not None else {}
            extra[item.file_name] = before | its.extra
        refused = [
            Item(file_name=name, hash="", bytes=0, width=0, height=0, reject=reason)
            for name, reason in problems.items()
        ]
        before = {item.file_name: item.hash for item in previous or ()}
        items = still_marked(_at_least_one(finished, free, val) + refused, before)
        index = Index(target, sorted(items, key=lambda item: item.file_name))
        index.extra = _extra_table(extra, previous)
        if index.items:
            index.write()
        if not any(item.reject is None for item in index):
            raise nothing_usable(folder, extensions, Counter(item.reject or "" for item in index))
        return index


# --- where -----------------------------------------------------------------------------------------------------------


def _place(folder: Path, out: Path | None) -> tuple[Path, str]:
    """The index's folder, and what stands before the file names in it."""
    import pyarrow.parquet as pq

    if out is None or out.resolve() == folder.resolve():
        target, prefix = folder, ""
    else:
        target, prefix = out, f"{folder.resolve().name}/"
    table = target / FILE
    if table.exists():
        try:
            ours = is_ours(pq.read_schema(table))
        except Exception:  # whatever it is, it is not an index of ours
            ours = False
        if not ours:
            raise InputError(
                f"{table} is not an index of Reverie's and is left alone: give another folder with --out."
            )
        names = [item.file_name for item in Index.read(target)] if prefix else []
        if names and not any(name.startswith((prefix, "extracted/")) for name in names):
            raise InputError(f"{table} lists other files than {folder}'s: give another folder with --out.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError:
        raise InputError(
            f"Cannot write into {target}: give another folder for the index with --out."
        ) from None
    if prefix:
        link = target / prefix.rstrip("/")
        if not link.is_symlink() and not link.exists():
            try:
                link.symlink_to(folder.resolve(), target_is_directory=True)
            except OSError:
                raise InputError(
                    f"Cannot make the link {link}: put the index into the folder itself."
                ) from None
        if link.resolve() != folder.resolve():
            raise InputError(f"{link} is in the way of a link to {folder}: give another folder with --out.")
    return target, prefix


def _previous(target: Path, folder: Path) -> Index | None:
    """The index that this import renews, or the one that came with the folder."""
    for place in (target, folder):
        try:
            return Index.read(place)
        except InputError:
            continue
    return None


# --- tars ------------------------------------------------------------------------------------------------------------


def _open_tars(
    folder: Path, target: Path, prefix: str, limits: Limits, quiet: bool
) -> tuple[dict[str, str], dict[Path, _Member]]:
    """What was refused of the tars of the folder, by their file names, and what lies in the plain ones.

    A member has the path that it would have if its tar were a folder. Gzipped tars are unpacked.
    """
    problems: dict[str, str] = {}
    members: dict[Path, _Member] = {}
    for path in _walk(folder, target, links=True):
        if path.name.lower().endswith(OTHER_TARS):
            problems[_file_name(prefix, path.relative_to(folder))[0]] = (
                f"not unpacked: unpack it, or pack it as {' or '.join(TARS[:2])}"
            )
        elif not path.is_file() and path.suffix.lower() not in SIDECARS:
            problems[_file_name(prefix, path.relative_to(folder))[0]] = "a link that leads nowhere"
    tars = [path for path in _walk(folder, target) if path.name.lower().endswith(TARS)]
    for path in track(tars, total=len(tars), label="opening tars", quiet=quiet):
        inside = path.relative_to(folder)
        name, sound = _file_name(prefix, inside)
        into = (
            target
            / EXTRACTED
            / "__".join(inside.with_suffix("").parts if inside.suffix == ".tar" else inside.parts)
        )
        if sound and not into.exists() and not _zipped(path):
            refused = _read_tar(path, path, limits, name, members)
        else:
            refused = _read_tar(path, into, limits)
        if refused:
            listed = "; ".join(refused[:3]) + ("; ..." if len(refused) > 3 else "")
            problems[name] = f"{len(refused)} of its members not taken: {listed}"
    return problems, members


def _zipped(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError:
        return True  # what is wrong with it is said when it is unpacked


def _read_tar(
    path: Path, into: Path, limits: Limits, shard: str = "", members: dict[Path, _Member] | None = None
) -> list[str]:
    """Takes the media and sidecars of one tar; the reasons for what is refused.

    They are noted in `members` by their paths below `into`, or else written there.
    """
    refused: list[str] = []
    seen: set[Path] = set()
    try:
        size = path.stat().st_size
        with _open_tar(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                suffix = name.suffix.lower()
                if member.isdir() or (
                    suffix not in SUFFIXES and suffix not in SIDECARS and suffix not in _OTHER_MEDIA
                ):
                    continue
                if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
                    refused.append(f"{member.name[:100]!r} leads out of the archive")
                elif any(part.startswith(".") for part in name.parts):  # hidden, as in a folder
                    continue
                elif not member.isreg() or member.issparse():
                    refused.append(f"{member.name[:100]!r} is a link or no plain file")
                elif member.size > (LONGEST if suffix in SIDECARS else limits.bytes):
                    refused.append(f"{member.name[:100]!r} is too large ({member.size:,} bytes)")
                elif (goal := into.joinpath(*name.parts)) in seen:
                    refused.append(f"{member.name[:100]!r} is there twice")
                else:
                    seen.add(goal)
                    if members is not None:
                        if member.offset_data + member.size > size:
                            raise EOFError
                        members[goal] = _Member(
                            tar=path, shard=shard, offset=member.offset_data, size=member.size
                        )
                        archive.members = []  # type: ignore[attr-defined]  # or it would remember every one
                        continue
                    stream = archive.extractfile(member)
                    assert stream is not None
                    _write_once(goal, stream.read())
    except _Unusable as reason:
        refused.append(f"the rest, since it {reason}")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError):
        refused.append("the rest of the tar is damaged, compressed in a way not known, or cut short")
    except (OSError, ValueError):
        refused.append("a member cannot be written, or the tar cannot be read")
    return refused


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar, plain or (by its content, whatever its name) gzipped, which is read in one pass and within `GROWTH`."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not zipped:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield archive
            return
        with gzip.open(file) as stream:
            bounded = _Bounded(stream, GROWTH * path.stat().st_size + LONGEST)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:  # type: ignore[call-overload]  # it only reads
                yield archive


class _Bounded:
    """A stream that ends in `_Unusable` when more than `most` bytes are read from it."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, most: int):
        self.stream, self.left = stream, most

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise _Unusable(f"unpacks to more than {GROWTH} times its size")
        return self.stream.read(size)


def _write_once(path: Path, data: bytes) -> None:
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, data, durable=False)  # what a power cut spoils, the next import writes again


# --- looking ---------------------------------------------------------------------------------------------------------


def _walk(folder: Path, target: Path, *, links: bool = False) -> Iterator[Path]:
    """Every plain file below `folder`, sorted; hidden ones, linked folders and the index's own folder are left out.

    `links`: those that lead nowhere as well.
    """
    own = target.resolve()
    for where, folders, names in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() != own
        )
        for path in (here / name for name in sorted(names) if not name.startswith(".")):
            if path.is_file() or (links and path.is_symlink()):
                yield path


def _file_name(prefix: str, inside: Path) -> tuple[str, bool]:
    """The name of a file in the index, and whether it could be kept as it is (it must be UTF-8)."""
    name = prefix + inside.as_posix()
    try:
        name.encode()
        return name, True
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace"), False


def _look(
    folder: Path, target: Path, prefix: str, members: dict[Path, _Member], problems: dict[str, str]
) -> tuple[dict[str, Path], dict[str, _Words], Counter[str]]:
    """The media files by name, what is said of them, and how many files there are of each extension."""
    paths = [*_walk(folder, target), *members]
    places = {path: _file_name(prefix, path.relative_to(folder)) for path in paths}
    if prefix:
        more = list(_walk(target / EXTRACTED, target / EXTRACTED))
        places |= {path: _file_name("", path.relative_to(target)) for path in more}
    files: dict[str, Path] = {}
    words: dict[str, _Words] = {}
    tables: list[tuple[Path, str]] = []
    extensions: Counter[str] = Counter()
    for path, (name, sound) in places.items():
        suffix = path.suffix.lower()
        extensions[suffix or "no extension"] += 1
        if path.name.lower() in TABLES:
            tables.append((path, name))
        elif suffix in SIDECARS or path.name.lower().endswith(TARS + OTHER_TARS):
            continue
        elif suffix in SUFFIXES or suffix in _OTHER_MEDIA or (path not in members and _is_media(path)):
            if not sound:
                problems[name] = "its name is not UTF-8: rename it"
                continue
            files[name] = path
            words[name] = _sidecars(path, places, members)
    for path, name in tables:
        _read_table(path, name, files, words, problems)
    return files, words, extensions


def _is_media(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return sniff(file.read(64)) is not None
    except OSError:
        return False


def _sidecars(path: Path, places: dict[Path, Any], members: dict[Path, _Member]) -> _Words:
    words = _Words()
    for suffix in SIDECARS:
        for beside in dict.fromkeys((path.with_suffix(suffix), path.with_name(path.name + suffix))):
            if beside not in places:
                continue
            try:
                text = _read_text(beside, members.get(beside))
                if suffix in TEXTS:
                    lines = [line.strip() for line in text.splitlines() if line.strip()]
                    if not lines:
                        raise _Unusable("is empty")
                    words.captions += [_caption(line, f"sidecar:{suffix[1:]}") for line in lines]
                elif suffix == ".cls":
                    words.meant.setdefault("label", text.strip())
                else:
                    _take(_parse(text), "json", words)
            except _Unusable as reason:
                words.problem = f"its caption {beside.name} {reason}"
    return words


def _read_text(path: Path, member: _Member | None) -> str:
    try:
        if (member.size if member else path.stat().st_size) > LONGEST:
            raise _Unusable(f"is larger than {LONGEST:,} bytes")
        data = member.read() if member else path.read_bytes()
    except OSError:
        raise _Unusable("cannot be read") from None
    return _decode_text(data)


def _decode_text(data: bytes) -> str:
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        raise _Unusable("is not UTF-8: save it as UTF-8") from None
    if "\x00" in text:
        raise _Unusable("is not text")
    return text


def _parse(text: str) -> Any:
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be stored
    except (ValueError, RecursionError):
        raise _Unusable("is not valid JSON") from None
    return value


def _caption(text: str, source: str, language: str | None = None) -> Caption:
    return Caption(text=text, source=source, language=language or language_of(text))


def _take(value: Any, source: str, words: _Words) -> None:
    """Adds what a JSON sidecar or a table's row says: captions, label, split, source, licence, scores, the rest."""
    row = value if isinstance(value, dict) else {"caption": value}
    for column, cell in row.items():
        key = str(column).strip().lower()
        if cell is None or (isinstance(cell, float) and cell != cell):
            continue
        if match := _WORDS.fullmatch(key):
            texts = list(_texts(cell))
            if match[1] == "tags" and isinstance(cell, list | tuple):
                texts = [(", ".join(text for text, _ in texts), None)] if texts else []
            for text, language in texts:
                words.captions.append(_caption(text, f"{source}:{key}", match[2] or language))
        elif key in _MEANT:
            if isinstance(cell, str | int) and str(cell).strip():
                words.meant.setdefault(_MEANT[key], str(cell).strip())
        elif key.startswith("score_"):
            try:
                words.scores[key.removeprefix("score_")] = float(cell)
            except (TypeError, ValueError, OverflowError):
                raise _Unusable(f"has {cell!r:.40} in {column}, which is not a number") from None
        elif source == "table" and isinstance(cell, str | int | float | bool):
            words.extra[str(column)] = cell


def _texts(cell: Any) -> Iterator[tuple[str, str | None]]:
    """The texts in a cell with the language where it is given: a string, a list, a JSON list, or structs."""
    if isinstance(cell, str):
        text = cell.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                parsed = json.loads(text)
            except (ValueError, RecursionError):
                parsed = None
            if isinstance(parsed, list) and all(isinstance(part, str) for part in parsed):
                yield from ((part.strip(), None) for part in parsed if part.strip())
                return
        if text:
            yield text, None
    elif isinstance(cell, list | tuple):
        for part in cell:
            if isinstance(part, str) and part.strip():
                yield part.strip(), None
            elif isinstance(part, dict):
                yield from _texts(part)
    elif isinstance(cell, dict) and isinstance(cell.get("text"), str) and cell["text"].strip():
        language = cell.get("language")
        yield cell["text"].strip(), language if isinstance(language, str) and language else None


def _read_table(
    path: Path, name: str, files: dict[str, Path], words: dict[str, _Words], problems: dict[str, str]
) -> None:
    """Adds the rows of a table to `words`; a row for a file that is not there, or leads outside, is a problem."""
    base = name.rpartition("/")[0]
    try:
        for line, row in _rows(path):
            given = row.pop("file_name", None)
            if not isinstance(given, str) or not given:
                raise _Unusable(
                    f"has no file_name in row {line}; its columns are {', '.join(map(str, row))[:200]}"
                )
            inside = PurePosixPath(given.replace("\\", "/") if os.name == "nt" else given)
            full = (PurePosixPath(base) / inside).as_posix()
            if inside.is_absolute() or ".." in inside.parts or "\x00" in given:
                problems.setdefault(name, f"row {line} names {given!r:.100}, which is outside the folder")
            elif full not in files:
                problems.setdefault(full, f"named in {path.name}, but there is no such picture or clip")
            else:
                its = words[full]
                try:
                    _take(row, "table", its)
                except _Unusable as reason:
                    its.problem = f"its row in {path.name} {reason}"
    except _Unusable as reason:
        problems[name] = f"the table {reason}"


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table, counted from 1. An index of our own has none: it is renewed, not read as words."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except Exception:  # arrow raises many kinds
            raise _Unusable("is not a readable parquet file") from None
        if not is_ours(table.schema):
            yield from enumerate(table.to_pylist(), 1)
        return
    try:
        text = _decode_text(path.read_bytes())
    except OSError:
        raise _Unusable("cannot be read") from None
    if path.suffix.lower() == ".csv":
        try:
            yield from enumerate(csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True), 1)
        except csv.Error:
            raise _Unusable("is not valid CSV") from None
        return
    for line, record in enumerate(text.split("\n"), 1):
        if record.strip():
            try:
                row = _parse(record)
            except _Unusable:
                raise _Unusable(f"is not valid JSON in line {line}") from None
            if not isinstance(row, dict):
                raise _Unusable(f"has no object in line {line}")
            yield line, row


# --- one file ---------------------------------------------------------------------------------------------------------


def _examine(path: Path, member: _Member | None, name: str, verify: bool, limits: Limits) -> Item:
    """What the bytes say: hash, size, frames; or why they cannot be used."""
    item = Item(file_name=name, hash="", bytes=0, width=0, height=0)
    media: Path | Part = path
    try:
        if member is not None:
            data = member.read()  # it is within the limits, or would be no member
            item = replace(
                item,
                bytes=len(data),
                hash=hashlib.sha256(data).hexdigest(),
                shard=member.shard,
                offset=member.offset,
            )
            media = Part(name=name, length=len(data), hash=item.hash, fetch=lambda: data)
        else:
            item = replace(item, bytes=path.stat().st_size)
            if item.bytes <= limits.bytes:
                item = replace(item, hash=disk.sha256(path))
        found = probe(media, limits)
        item = replace(item, width=found.width, height=found.height, frames=found.frames, fps=found.fps)
        if verify and found.kind not in ("mp4", "webm"):
            decode_array(media, size=32, limits=limits)
    except MediaError as error:
        return replace(item, reject=error.reason)
    except OSError:
        return replace(item, reject="the file cannot be read")
    return item


def _inner(item: Item, prefix: str) -> tuple[str, ...]:
    """The folders of a file below the imported folder, or below the tar that it came from."""
    name = item.file_name
    if item.shard is not None:
        return PurePosixPath(name.removeprefix(f"{item.shard}/")).parts[:-1]
    if name.startswith(f"{EXTRACTED}/"):
        return PurePosixPath(name).parts[2:-1]
    return PurePosixPath(name.removeprefix(prefix)).parts[:-1]


def _name_classes(items: list[Item], words: dict[str, _Words], prefix: str) -> None:
    """Folders in which nothing has words give their name."""
    captioned = {
        item.file_name.rpartition("/")[0]
        for item in items
        if (its := words[item.file_name]).captions or its.problem or "label" in its.meant
    }
    for item in items:
        folders, its = _inner(item, prefix), words[item.file_name]
        if not folders or item.file_name.rpartition("/")[0] in captioned:
            continue
        name = folders[-1]
        if name.lower() not in GENERAL and name.lower() not in SPLIT_NAMES:
            its.meant["label"] = name
            its.captions.append(_caption(_spoken(name), "class:folder"))


def _given_split(item: Item, its: _Words, prefix: str) -> str | None:
    """The split that the user named, in words or by a top folder, of the tar if it lies in one."""
    folders = _inner(item, prefix)
    if item.shard is not None:
        folders = (*PurePosixPath(item.shard.removeprefix(prefix)).parts[:-1], *folders)
    return its.meant.get("split", folders[0] if folders and folders[0].lower() in SPLIT_NAMES else None)


def _spoken(label: str) -> str:
    return re.sub(r"[_\-\s]+", " ", label).strip() or label


def _finish(
    item: Item,
    its: _Words,
    old: Item | None,
    prefix: str,
    val: float,
    need_captions: bool,
    source: str | None,
    licence: str | None,
) -> Item:
    """The item with its words, its split and what an older index knew of the same bytes."""
    captions = list(its.captions)
    label = its.meant.get("label") or (old.label if old else None)
    if (
        not captions and "label" in its.meant and not its.meant["label"].isdigit()
    ):  # a class number says nothing
        captions = [_caption(_spoken(its.meant["label"]), "class:label")]
    if old is not None:
        captions += [caption for caption in old.captions if not caption.source.startswith(_IMPORTED)]
    dropped = old.dropped if old is not None else ()
    out = {(c.text, c.source) for c in dropped}
    captions = [caption for caption in captions if (caption.text, caption.source) not in out]
    captions = list({(c.text, c.language): c for c in reversed(captions)}.values())[::-1]
    given = _given_split(item, its, prefix)
    reject = item.reject or its.problem
    if given is not None:
        split = SPLIT_NAMES.get(given.lower(), "")
        if split not in SPLITS:
            split, reject = "train", reject or f"unknown split {given!r}: use train, val or test"
    elif old is not None:
        split = old.split
    else:
        split = "val" if item.hash and _place_of(item.hash) < val else "train"
    if reject is None and need_captions and not captions and not dropped:
        stem = PurePosixPath(item.file_name).stem
        reject = (
            f"{NO_CAPTION}: write one into {stem}.txt, a metadata table, or name the folder after its class"
        )
    if reject is None and old is not None and old.marked:
        reject = old.reject
    return replace(
        item,
        captions=tuple(captions),
        dropped=dropped,
        label=label,
        split=split,
        source=its.meant.get("source") or (old.source if old else None) or source,
        licence=its.meant.get("licence") or (old.licence if old else None) or licence,
        scores=(old.scores if old else {}) | its.scores,
        reject=reject,
    )


def _place_of(content: str) -> float:
    """Where in [0, 1) a file's content stands: those below the share `val` are held out."""
    return integer(0, "split", content) / 2**63


def _at_least_one(items: list[Item], free: set[str], val: float) -> list[Item]:
    """Where chance (or a small folder) put nothing into "val", the content that stands first goes there.

    `free`: the contents whose split the user did not name.
    """
    usable = [item for item in items if item.reject is None]
    contents = {item.hash for item in usable}
    if len(contents) == 1:  # the only one is there to train on
        return [replace(item, split="train") if item.hash in contents & free else item for item in items]
    if not val or len(contents) < 2 or not contents & free or any(item.split != "train" for item in usable):
        return items
    first = min(contents & free, key=_place_of)
    return [replace(item, split="val") if item.hash == first else item for item in items]


def _extra_table(extra: dict[str, dict[str, Any]], previous: Index | None) -> Any:
    """The unknown columns of the older index and of the tables, by file name; None where there are none."""
    import pyarrow as pa

    taken = {*Item.__dataclass_fields__, "file_name"}
    columns = dict.fromkeys(name for row in extra.values() for name in row if name not in taken)
    if previous is not None and previous.extra is not None:
        columns |= dict.fromkeys(name for name in previous.extra.column_names if name != "file_name")
    if not columns:
        return None
    table = {"file_name": pa.array(list(extra), pa.string())}
    for name in columns:
        values = [row.get(name) for row in extra.values()]
        kind = None
        if previous is not None and previous.extra is not None and name in previous.extra.column_names:
            kind = previous.extra.schema.field(name).type
        try:
            table[name] = pa.array(values, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # tables that disagree about a column
            table[name] = pa.array([None if value is None else str(value) for value in values], pa.string())
    return pa.table(table)
