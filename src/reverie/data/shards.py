"""A dataset packed into tars: few large files in place of many small ones, and still random access.

    OUT/metadata.parquet         the index; the columns `shard` and `offset` say where each item's bytes lie
    OUT/shards.json              of each tar its size, its sha256 and how many samples it holds
    OUT/shards/train-00000.tar   samples by webdataset's convention: 000000017.webp, 000000017.txt (the first caption)
                                 and 000000017.json (the whole row of the index), one after the other

Media are the very bytes that were indexed, checked as they are read; nothing is encoded again. A split has tars of its
own, so that whoever streams `train-*.tar` sees nothing that is held out. Which item goes where is a function of the
index, the limits and the order alone, and headers hold no time and no user: the same input gives the same bytes.

A tar exists whole or not at all, and shards.json names it as soon as it does. After an interruption the same command
keeps the tars that are as they were written and makes the others; the index comes last, so a folder that has one is
complete. What cannot be read, or is not what was indexed, stays in the index with the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reverie import disk, progress
from reverie.data.index import FILE, PACKED, SPLITS, Index, Item
from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.media import LIMITS, Limits, MediaError, Unreached, sniff
from reverie.rng import integer

LIST = PACKED
FOLDER = "shards"
BLOCK = tarfile.BLOCKSIZE
_NAME = re.compile(rf"{FOLDER}/(?:{'|'.join(SPLITS)})-\d{{5,}}\.tar")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished tar. `content`: what it was made from; `left_out`: file names and why they are not in it."""

    file: str
    bytes: int
    sha256: str
    samples: int
    content: str
    left_out: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` made. `kept`: how many of the tars were there already; `other`: how many were, but of another packing
    or damaged, and were made anew."""

    index: Index
    shards: tuple[Shard, ...]
    kept: int
    other: int

    def __str__(self) -> str:
        packed = sum(shard.samples for shard in self.shards)
        size = sum(shard.bytes for shard in self.shards)
        lost = [(name, why) for shard in self.shards for name, why in shard.left_out.items()]
        before = sum(item.reject is not None for item in self.index) - len(lost)
        lines = [
            f"{self.index.folder}: {packed:,} items in {len(self.shards):,} tars, {progress.size(size)}"
            + (f"; {self.kept:,} of the tars were there already" if self.kept else "")
            + (f"; {self.other:,} tars of another packing, or damaged, gave way" if self.other else "")
        ]
        if before:
            lines.append(
                f"not packed, since they were rejected or marked: {before:,}, listed with their reasons"
            )
        if lost:
            lines.append(f"not packed, since they cannot be read any more: {len(lost):,}")
            lines += [f"  {name}: {why}" for name, why in lost]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One item as it will stand in a tar. `room`: bytes that it takes, headers and padding included."""

    key: str
    item: Item
    room: int


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One tar to be. `content`: the digest of what goes in."""

    file: str
    samples: tuple[_Sample, ...]
    content: str

    @property
    def room(self) -> int:
        return _ended(sum(sample.room for sample in self.samples))


def pack(
    index: Index,
    out: str | Path,
    *,
    size: int = 10**9,
    count: int | None = None,
    shuffle: bool = False,
    workers: int | None = None,
    limits: Limits = LIMITS,
    quiet: bool = False,
) -> Packed:
    """Write the accepted items of `index` into tars in `out`, and their index beside them.

    size, count: a tar holds at most so many bytes, unless one item alone has more, and so many items. shuffle: items
    go to the tars of their split in a random order, always the same, for those who read tars from end to end; the
    order of the index stays. workers: threads that read.
    InputError: nothing to pack, no room, `out` cannot be written to, lies in the dataset, or holds something else.
    """
    out = Path(out)
    if size < 1 or (count is not None and count < 1):
        raise InputError(
            f"A tar of at most {size} bytes and {count} items holds nothing: give larger limits."
        )
    if out.resolve().is_relative_to(index.folder.resolve()):
        raise InputError(f"{out} lies in the folder to pack, which would then hold all twice: name another.")
    plans = _plans(index, size=size, count=count, shuffle=shuffle)
    if not plans:
        raise InputError(f"Nothing in {index.folder} is accepted and wanted: look at `reverie data check`.")
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        done, other = _finished(out, index, plans)
        kept = len(done)
        _refuse_full(out, sum(plan.room for plan in plans if plan.file not in done))
        display = progress.Display("packing", first=kept)
        try:
            for number, plan in enumerate(plans):
                if plan.file in done:
                    continue
                done[plan.file] = _write(index, plan, out, workers or index.readers, limits)
                _list(out, [done[other.file] for other in plans if other.file in done])
                if not quiet:
                    display.show(number + 1, len(plans), plan.file)
        finally:
            display.close()
        _list(out, [done[plan.file] for plan in plans])
    except OSError as error:
        raise InputError(
            f"Cannot write into {out} ({error.strerror or error}): make room and the same command goes on, or name"
            " another folder."
        ) from None
    packed = Index(out, _placed(index, plans, done), extra=index.extra)
    if (out / FILE).exists():  # with what has been added since, such as scores and marks
        packed = _renewed(Index.read(out), packed)
    else:
        packed.write()
    return Packed(index=packed, shards=tuple(done[plan.file] for plan in plans), kept=kept, other=other)


# --- what goes where --------------------------------------------------------------------------------------------------


def _plans(index: Index, *, size: int, count: int | None, shuffle: bool) -> list[_Plan]:
    plans, number = [], 0
    for split in SPLITS:
        items = [item for item in index if item.reject is None and item.split == split]
        if shuffle:
            items.sort(key=lambda item: (integer(0, "pack", item.file_name), item.file_name))
        groups: list[list[_Sample]] = []
        digests: list[Any] = []
        room = 0
        for item in items:
            sizes, key = [item.bytes], f"{number:09d}"
            number += 1
            parts = (key.encode(), item.hash.encode(), _row(index, item), _words(item))
            sizes += [len(part) for part in parts[2:] if part]
            own = sum(BLOCK + _padded(length) for length in sizes)
            room += own
            if not groups or len(groups[-1]) == count or _ended(room) > size:
                groups.append([])
                digests.append(hashlib.blake2b(digest_size=16))
                room = own
            groups[-1].append(_Sample(key=key, item=item, room=own))
            for part in parts:
                digests[-1].update(len(part).to_bytes(8, "big") + part)
        plans += [
            _Plan(file=f"{FOLDER}/{split}-{i:05d}.tar", samples=tuple(group), content=digest.hexdigest())
            for i, (group, digest) in enumerate(zip(groups, digests, strict=True))
        ]
    return plans


def _words(item: Item) -> bytes:
    return item.captions[0].text.encode() if item.captions else b""


def _row(index: Index, item: Item) -> bytes:
    """The row of the index as JSON; what JSON has no number for is null."""
    row = {
        name: getattr(item, name)
        for name in Item.__dataclass_fields__
        if name not in ("captions", "scores", "reject", "shard", "offset")
    }
    row["captions"] = [{"text": c.text, "source": c.source, "language": c.language} for c in item.captions]
    row |= {f"score_{name}": value for name, value in item.scores.items()}
    row |= index.extra_of(item.file_name)
    return json.dumps(_finite(row), ensure_ascii=False, sort_keys=True, default=str).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value


def _placed(index: Index, plans: Sequence[_Plan], done: Mapping[str, Shard]) -> list[Item]:
    """The items of the index, each with its place or the reason why it has none."""
    places: dict[str, tuple[str, int] | str] = {}
    for plan in plans:
        at, left_out = 0, done[plan.file].left_out
        for sample in plan.samples:
            name = sample.item.file_name
            if name in left_out:
                places[name] = left_out[name]
            else:
                places[name] = (plan.file, at + BLOCK)
                at += sample.room
    items = []
    for item in index:
        place = places.get(item.file_name)
        if isinstance(place, tuple):
            items.append(replace(item, shard=place[0], offset=place[1]))
        else:  # a mark cannot be taken back where the file is not
            reason = place or (f"not packed: {item.reject}" if item.marked else item.reject)
            items.append(replace(item, reject=reason, shard=None, offset=0))
    return items


def _renewed(before: Index, packed: Index) -> Index:
    """The complete index of a run before; written where a tar had to be made again and its items lie elsewhere now."""
    new = {item.file_name: item for item in packed}
    items = []
    for item in before:
        its = new[item.file_name]
        reject = its.reject if its.shard is None else (item.reject if item.marked else None)
        items.append(replace(item, shard=its.shard, offset=its.offset, reject=reject))
    after = Index(before.folder, items, extra=before.extra)
    if items != before.items:
        after.write()
    return after


# --- what is there ----------------------------------------------------------------------------------------------------


def _finished(out: Path, index: Index, plans: Sequence[_Plan]) -> tuple[dict[str, Shard], int]:
    """The tars of a run before that are as they shall be, and how many others there were, which go."""
    before = read_list(out)
    if before is None:
        if (out / FILE).exists() or any((out / FOLDER).glob("*.tar")):
            raise InputError(f"{out} already holds another index or other tars: name a new folder.")
        _list(out, [])  # from now on what lies there is ours
    wanted = {plan.file: plan for plan in plans}
    done = {}
    for shard in before or ():
        plan = wanted.get(shard.file)
        if plan is None or shard.left_out or shard.content != plan.content:
            continue
        path = out / shard.file
        if path.is_file() and path.stat().st_size == shard.bytes and disk.sha256(path) == shard.sha256:
            done[shard.file] = shard
    if (out / FILE).exists():
        same = {s.file: s.content for s in before or ()} == {p.file: p.content for p in plans}
        if not same or {item.file_name for item in Index.read(out)} != {item.file_name for item in index}:
            raise InputError(f"{out} holds a complete packing of something else: name a new folder.")
    for path in (out / FOLDER).glob("*.tar"):
        if f"{FOLDER}/{path.name}" not in wanted and _NAME.fullmatch(f"{FOLDER}/{path.name}"):
            path.unlink()
    for draft in (*(out / FOLDER).glob(".*.tar.*"), *out.glob(f".{LIST}.*")):  # of a run that was killed
        with suppress(OSError):
            draft.unlink()
    return done, len(before or ()) - len(done)


def read_list(folder: Path) -> list[Shard] | None:
    """The tars that shards.json names; None: there is no such list. InputError: it is not one that `pack` writes."""
    try:
        text = (folder / LIST).read_text("utf-8")
    except FileNotFoundError:
        return None
    try:
        shards = [Shard(**entry) for entry in json.loads(text)["shards"]]
        sound = all(_NAME.fullmatch(shard.file) and isinstance(shard.left_out, dict) for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{folder / LIST} is not the list of a packing: name a new folder.")
    return shards


def _list(out: Path, shards: Sequence[Shard]) -> None:
    disk.write_json(out / LIST, {"format": 1, "shards": [vars(shard) for shard in shards]})


def _refuse_full(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"The tars need {progress.size(needed)}, and {out} has {progress.size(free)} free: name a folder on a"
            " larger disk."
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(index: Index, plan: _Plan, out: Path, workers: int | None, limits: Limits) -> Shard:
    left_out: dict[str, str] = {}

    def read(sample: _Sample) -> bytes | str:
        try:
            return index.bytes_of(sample.item, limits)
        except Unreached:  # no reason to leave it out for ever: the same command goes on
            raise
        except MediaError as error:
            return error.reason

    path, whole, size = out / plan.file, hashlib.sha256(), 0
    with disk.whole(path) as draft, draft.open("wb") as file:
        for sample, data in zip(plan.samples, in_order(read, plan.samples, workers), strict=True):
            if isinstance(data, str):
                left_out[sample.item.file_name] = data
                continue
            for chunk in _members(sample.key, data, _row(index, sample.item), _words(sample.item)):
                file.write(chunk)
                whole.update(chunk)
                size += len(chunk)
        end = bytes(_ended(size) - size)
        file.write(end)
        whole.update(end)
    return Shard(
        file=plan.file,
        bytes=size + len(end),
        sha256=whole.hexdigest(),
        samples=len(plan.samples) - len(left_out),
        content=plan.content,
        left_out=left_out,
    )


def _members(key: str, data: bytes, row: bytes, words: bytes) -> Iterator[bytes]:
    """Header, body and padding of each member of a sample."""
    kind = sniff(data[:64]) or "bin"
    for suffix, body in (("jpg" if kind == "jpeg" else kind, data), ("json", row), ("txt", words)):
        if body:
            header = tarfile.TarInfo(f"{key}.{suffix}")  # no time, no user, the rights 644
            header.size = len(body)
            yield header.tobuf(tarfile.USTAR_FORMAT)
            yield body
            yield bytes(_padded(len(body)) - len(body))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _ended(size: int) -> int:
    """The size of a tar whose members have so many bytes: two empty blocks, and up to a whole record."""
    return -(-(size + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
