"""The index: one table, `metadata.parquet`, beside the media files of a dataset.

It follows the imagefolder convention (a `file_name` column, relative to the table's folder, with `/`), so other tools
open it. Every stage reads it and adds columns; a rejected file stays in it, with its reason.

Columns: the fields of `Item`; `captions` is a list of structs (text, source, language), `dropped`, where there are any,
one with a reason beside these; each score is a float column `score_<name>` (null where an item has none). Columns that
Reverie does not know are kept when the table is rewritten.

In a packed dataset (`data/shards.py`) an item's bytes lie in a tar: the columns `shard` (its path, as file names are)
and `offset` say where, and `file_name` is what the file was called. What reads media asks `Index.media`, which knows
a file, a part of a tar, and what lies at an address (`data/remote.py`).

A reason in `reject` is either what is wrong with the file, or a mark: "marked by filter: ..." or "marked by dedupe:
...", which `data/marks.py` sets and takes back. To all who select, both are rejected.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from reverie import disk
from reverie.data import remote
from reverie.errors import InputError
from reverie.media import LIMITS, Limits, MediaError, Part, Unreached

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "metadata.parquet"
PACKED = "shards.json"  # the tars of a packed dataset, which stand before its index does
MARK = b"reverie.index"  # schema metadata: this table is ours, with the version of its layout
SPLITS = ("train", "val", "test")
MARK_WORDS = "marked by "  # begin the reason of a mark; then the command and a colon


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One caption. `source`: where it came from ("sidecar:txt", "table:prompt", "world", or as `synthetic` says).

    `language`: ISO 639-1.
    """

    text: str
    source: str
    language: str = "en"


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A caption that nobody learns from any more, and why ("marked by capfilt: ..."); it can be taken back."""

    text: str
    source: str
    language: str = "en"
    reason: str

    @property
    def caption(self) -> Caption:
        return Caption(text=self.text, source=self.source, language=self.language)


SYNTHETIC = "synthetic:"  # begins the source of every caption that a model wrote
STYLES = ("short", "long", "tags")


def synthetic(style: str, writer: str) -> str:
    """The source of captions that `writer` (a model's name) wrote: "synthetic:long:blip-stickers"."""
    assert style in STYLES, style
    return f"{SYNTHETIC}{style}:{writer}"


def style_of(source: str) -> str | None:
    """The style of a synthetic caption by its source; None: people wrote it."""
    style = source.removeprefix(SYNTHETIC).partition(":")[0]
    return style if source.startswith(SYNTHETIC) and style in STYLES else None


def lists_tags(source: str) -> bool:
    """Whether captions of this source are tags with commas between them, whoever gave them."""
    return source == "tags" or source.endswith(":tags") or style_of(source) == "tags"


def language_of(text: str) -> str:
    """By script: kana, hangul, Han, or else English."""
    return next((language for language, script in _SCRIPTS.items() if script.search(text)), "en")


_SCRIPTS = {
    language: re.compile(f"[{letters}]")
    for language, letters in {
        "ja": "\u3040-\u30ff", "ko": "\uac00-\ud7af", "zh": "\u3400-\u4dbf\u4e00-\u9fff",
    }.items()
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Item:
    """One media file. `frames` is 1 for an image; `fps` is 0.0 for images; `reject` is None or the reason.

    shard, offset: the tar that holds it, and where in it its `bytes` begin; None: it is a file of its own.
    """

    file_name: str
    hash: str
    bytes: int
    width: int
    height: int
    frames: int = 1
    fps: float = 0.0
    split: str = "train"
    captions: tuple[Caption, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    label: str | None = None
    source: str | None = None
    licence: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    reject: str | None = None
    shard: str | None = None
    offset: int = 0

    @property
    def marked(self) -> str | None:
        """The command that left the item out ("filter", "dedupe"); None: none did, the file may be broken though."""
        if self.reject is None or not self.reject.startswith(MARK_WORDS):
            return None
        return self.reject.removeprefix(MARK_WORDS).partition(":")[0]


def refuse_half_packed(folder: Path) -> None:
    """InputError: a packing into this folder was begun and not ended."""
    if (folder / PACKED).is_file() and not (folder / FILE).is_file():
        raise InputError(
            f"The packing into {folder} was interrupted: run the same `reverie data pack` again, which goes on with it."
        )


class Index:
    """The items of one dataset folder. `extra` holds the columns that Reverie does not know, keyed by file_name."""

    def __init__(self, folder: str | Path, items: list[Item], *, extra: pa.Table | None = None) -> None:
        self.folder = Path(folder)
        self.items = items
        self.extra = extra
        self._extra_rows: dict[str, int] | None = None
        self.selected = False  # a selection: writing it would lose the items that were not selected

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __getitem__(self, i: int) -> Item:
        return self.items[i]

    def __str__(self) -> str:
        """One line: how much was accepted, of what, in which split, and how much was rejected and marked."""
        accepted = [item for item in self.items if item.reject is None]
        clips = sum(item.frames > 1 for item in accepted)
        splits = ", ".join(f"{sum(item.split == name for item in accepted):,} {name}" for name in SPLITS)
        marked = sum(item.marked is not None for item in self.items)
        return (
            f"{self.folder}: {len(accepted) - clips:,} pictures and {clips:,} clips accepted ({splits}), "
            f"{len(self.items) - len(accepted) - marked:,} rejected"
            + (f", {marked:,} marked" if marked else "")
        )

    def extra_of(self, file_name: str) -> dict[str, Any]:
        """What the columns that Reverie does not know say of one file."""
        if self.extra is None:
            return {}
        if self._extra_rows is None:
            self._extra_rows = {name: i for i, name in enumerate(self.extra.column("file_name").to_pylist())}
        row = self._extra_rows.get(file_name)
        if row is None:
            return {}
        return {
            name: self.extra[name][row].as_py() for name in self.extra.column_names if name != "file_name"
        }

    def with_columns(self, columns: Mapping[str, tuple[Any, Mapping[str, Any]]]) -> Index:
        """This index with these columns that Reverie does not know: name -> (arrow type, file name -> value).

        Files that are not named keep what they have.
        """
        import pyarrow as pa

        names = [item.file_name for item in self]
        before = [self.extra_of(name) for name in names]
        table: dict[str, Any] = {"file_name": pa.array(names, pa.string())}
        for old in self.extra.schema if self.extra is not None else ():
            if old.name != "file_name" and old.name not in columns:
                table[old.name] = pa.array([row.get(old.name) for row in before], old.type)
        for column, (kind, values) in columns.items():
            cells = [values.get(name, row.get(column)) for name, row in zip(names, before, strict=True)]
            table[column] = pa.array(cells, kind)
        index = Index(self.folder, self.items, extra=pa.table(table))
        index.selected = self.selected
        return index

    @property
    def origin(self) -> remote.Remote | None:
        """The address that the media lie at; None: they are in the folder."""
        return remote.opened(self.folder)

    @property
    def readers(self) -> int | None:
        """How many threads shall read: more where each waits for an answer; None: one for each processor."""
        return remote.READERS if self.origin is not None else None

    def path(self, item: Item) -> Path:
        """Where the media file of `item` lies. InputError: it is no file of its own, and only `media` opens it."""
        if item.shard is not None or self.origin is not None:
            where = item.shard or self.origin
            raise InputError(f"{item.file_name} is no file of its own, but lies in {where}: use Index.media.")
        return self.folder / item.file_name

    def media(self, item: Item) -> Path | Part:
        """What decoders open: the file of `item`, or the part of a tar or of an address that it is."""
        if item.shard is None and self.origin is None:
            return self.folder / item.file_name
        return Part(name=item.file_name, length=item.bytes, hash=item.hash, fetch=partial(self._fetch, item))

    def bytes_of(self, item: Item, limits: Limits = LIMITS) -> bytes:
        """The bytes of an item, which are those that were indexed. MediaError: they are not, or cannot be read.

        Unreached, one of them: the tar or the address that holds it cannot be read now.
        """
        part = self.media(item)
        if isinstance(part, Path):
            fetch = partial(_bytes_of_file, part)
            part = Part(name=item.file_name, length=item.bytes, hash=item.hash, fetch=fetch)
        return part.read(limits)

    def size_of(self, name: str) -> int:
        """Bytes of a file or tar of this dataset. OSError: it is not there."""
        return (self.folder / name).stat().st_size if self.origin is None else self.origin.size(name)

    def _fetch(self, item: Item) -> bytes:
        name, start = (item.file_name, 0) if item.shard is None else (item.shard, item.offset)
        own, where = Path(item.file_name), self.origin or self.folder
        try:
            if self.origin is not None:
                return self.origin.read(name, start, item.bytes)
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                return file.read(item.bytes)
        except FileNotFoundError:
            if item.shard is None:  # a file of its own, which somebody has removed
                raise
            raise Unreached(own, f"there is no {name} in {where}, which holds it") from None
        except OSError as error:
            raise Unreached(own, f"{name} in {where} cannot be read ({error.strerror or error})") from None

    def select(
        self,
        split: str | None = None,
        video: bool | None = None,
        sources: Collection[str] | None = None,
        accepted: bool | None = True,
    ) -> Index:
        """The items that meet every condition given; `accepted=None` takes rejected items as well. Order is kept."""
        if split is not None and split not in SPLITS:
            raise InputError(f"Unknown split {split!r}: use one of {', '.join(SPLITS)}.")
        items = [
            item
            for item in self.items
            if (split is None or item.split == split)
            and (video is None or (item.frames > 1) == video)
            and (sources is None or item.source in sources)
            and (accepted is None or (item.reject is None) == accepted)
        ]
        selection = Index(self.folder, items, extra=self.extra)
        selection.selected = self.selected or len(items) < len(self.items)
        return selection

    @classmethod
    def read(cls, folder: str | Path) -> Index:
        """Reads `folder/metadata.parquet`. InputError: no such table, not ours, or a file name that leaves `folder`.

        folder: or an address such as s3://bucket/photos, whose table is fetched into the user's cache.
        """
        import pyarrow.parquet as pq

        folder = remote.local(folder)
        path = Path(folder) / FILE
        if not path.is_file():
            if not Path(folder).is_dir():
                raise InputError(f"{folder} is not a folder: give the folder of a dataset.")
            refuse_half_packed(Path(folder))
            command = shlex.join(["reverie", "data", "import", str(folder)])
            raise InputError(f"No index in {folder}: run `{command}` first.")
        try:
            table = pq.read_table(path)
        except Exception:  # arrow raises many kinds, and their text is not ours
            raise InputError(f"{path} is not a readable parquet file: import the folder again.") from None
        if not is_ours(table.schema):
            raise InputError(
                f"{path} was not written by Reverie: run `reverie data import {folder} --out FOLDER`, which reads it."
            )
        return cls._from_table(Path(folder), table)

    def write(self) -> Path:
        """Writes `folder/metadata.parquet` at once or not at all."""
        import pyarrow.parquet as pq

        if self.selected:
            raise InputError(
                "This index is a selection; writing it would lose the other items. Write the whole index."
            )
        self.refuse_remote()
        path = self.folder / FILE
        table = self._to_table()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with disk.whole(path) as draft:
                pq.write_table(table, draft)
        except OSError as error:
            raise InputError(
                f"Cannot write into {self.folder} ({error.strerror or error}): make it writable, or import it into"
                " another folder with --out."
            ) from None
        return path

    def refuse_remote(self) -> None:
        """InputError: this dataset lies at an address, where nothing is written."""
        if self.origin is not None:
            raise InputError(
                f"{self.origin} is only read, and this would change its index: pack or copy it into a folder first."
            )

    def _to_table(self) -> pa.Table:
        import pyarrow as pa

        names = [item.file_name for item in self.items]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise InputError(f"The index lists {twice!r} twice: a file name must be unique.")
        for item in self.items:
            _check_name(item.file_name)
            _check_place(item)
        schema = _schema(pa)
        rows = [
            {
                **{name: getattr(item, name) for name in schema.names if name != "captions"},
                "captions": [
                    {"text": c.text, "source": c.source, "language": c.language} for c in item.captions
                ],
            }
            for item in self.items
        ]
        table = pa.Table.from_pylist(rows, schema=schema)
        if any(item.dropped for item in self.items):
            lists = [[vars(caption) for caption in item.dropped] for item in self.items]
            table = table.append_column(_dropped(pa), pa.array(lists, _dropped(pa).type))
        if any(item.shard is not None for item in self.items):
            for place in _places(pa):
                table = table.append_column(
                    place,
                    pa.array(
                        [None if item.shard is None else getattr(item, place.name) for item in self.items],
                        place.type,
                    ),
                )
        for name in sorted({name for item in self.items for name in item.scores}):
            values = pa.array([item.scores.get(name) for item in self.items], pa.float64())
            table = table.append_column(f"score_{name}", values)
        if self.extra is not None:
            row = {name: i for i, name in enumerate(self.extra.column("file_name").to_pylist())}
            take = pa.array([row.get(name) for name in names], pa.int64())
            for name in self.extra.column_names:
                if name not in table.column_names:
                    table = table.append_column(self.extra.field(name), self.extra.column(name).take(take))
        return table.replace_schema_metadata({MARK: b"1"})

    @classmethod
    def _from_table(cls, folder: Path, table: pa.Table) -> Index:
        import pyarrow as pa

        schema = _schema(pa)
        missing = [name for name in schema.names if name not in table.column_names]
        if missing:
            raise InputError(
                f"{folder / FILE} lacks the columns {', '.join(missing)}: import the folder again."
            )
        scores = [
            name
            for name in table.column_names
            if name.startswith("score_") and pa.types.is_floating(table[name].type)
        ]
        if {"shard", "offset"} <= set(table.column_names):
            for place in _places(pa):
                schema = schema.append(place)
        if "dropped" in table.column_names:
            schema = schema.append(_dropped(pa))
        known = set(schema.names) | set(scores)
        try:
            rows = table.select(schema.names).cast(schema).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            raise InputError(
                f"{folder / FILE} has columns of unexpected types: import the folder again."
            ) from None
        values = {name.removeprefix("score_"): table[name].to_pylist() for name in scores}
        items = []
        for i, row in enumerate(rows):
            _check_name(row["file_name"])
            captions = tuple(Caption(**caption) for caption in row.pop("captions") or ())
            dropped = tuple(Dropped(**caption) for caption in row.pop("dropped", None) or ())
            if row.get("shard") is None:
                row.pop("shard", None), row.pop("offset", None)
            item = Item(
                **row,
                captions=captions,
                dropped=dropped,
                scores={name: column[i] for name, column in values.items() if column[i] is not None},
            )
            _check_place(item)
            items.append(item)
        extra = [name for name in table.column_names if name not in known]
        return cls(folder, items, extra=table.select(["file_name", *extra]) if extra else None)


def _bytes_of_file(path: Path) -> bytes:
    """A file is bad if it cannot be read, other than what lies in a tar that cannot."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError:
        raise MediaError(path, "the file cannot be read") from None


def is_ours(schema: pa.Schema) -> bool:
    """Whether a parquet schema is that of an index which Reverie wrote."""
    return MARK in (schema.metadata or {})


def _schema(pa: Any) -> pa.Schema:
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    caption = pa.struct([(name, text) for name in ("text", "source", "language")])
    return pa.schema(
        [
            ("file_name", text),
            ("hash", text),
            ("bytes", whole),
            ("width", whole),
            ("height", whole),
            ("frames", whole),
            ("fps", real),
            ("split", text),
            ("captions", pa.list_(caption)),
            ("label", text),
            ("source", text),
            ("licence", text),
            ("reject", text),
        ]
    )


def _dropped(pa: Any) -> Any:
    """The column of captions that are not used; an index without any has none."""
    fields = [(name, pa.string()) for name in ("text", "source", "language", "reason")]
    return pa.field("dropped", pa.list_(pa.struct(fields)))


def _places(pa: Any) -> list[Any]:
    """The columns of a packed dataset."""
    return [pa.field("shard", pa.string()), pa.field("offset", pa.int64())]


def _check_place(item: Item) -> None:
    """A place in a tar is a path inside the folder, and a place at all."""
    if item.shard is None:
        return
    _check_name(item.shard)
    if not (isinstance(item.offset, int) and item.offset >= 0 and item.bytes >= 0):
        raise InputError(
            f"The index puts {item.file_name!r} at byte {item.offset} of {item.shard}: import the folder again."
        )


def _check_name(name: str | None) -> None:
    """An index from a stranger must not name files outside its folder."""
    here, there = PurePosixPath(name or "/"), PureWindowsPath(name or "/")
    outside = (
        here.is_absolute() or ".." in here.parts or ".." in there.parts or (os.name == "nt" and there.anchor)
    )
    if not name or outside or "\x00" in name:
        raise InputError(
            f"The index names {name!r}, which is not a relative path inside its folder with `/`."
        )
