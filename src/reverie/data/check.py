"""What a dataset folder holds and what was lost: every rejected file with its reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from reverie import disk
from reverie.data.index import MARK_WORDS, Index, Item
from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.media import LIMITS, SUFFIXES, Limits, MediaError, Part
from reverie.progress import track

CHANGED = "changed since the import: import the folder again"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The state of an index. `rejected`, `marked`: file name and reason; `copies`: file names with the same bytes."""

    folder: Path
    total: int
    pictures: int
    clips: int
    splits: dict[str, int]
    captions: dict[str, int]  # by language, of accepted files
    rejected: tuple[tuple[str, str], ...]
    copies: tuple[tuple[str, ...], ...]
    across: tuple[tuple[str, ...], ...]  # those copies that are in more than one split
    marked: tuple[
        tuple[str, str], ...
    ] = ()  # left out by `data filter` and `data dedupe`, their files being sound

    @property
    def lost(self) -> float:
        """The share of the files that was rejected."""
        return len(self.rejected) / self.total

    def __str__(self) -> str:
        splits = ", ".join(f"{name} {count:,}" for name, count in self.splits.items())
        captions = ", ".join(f"{name} {count:,}" for name, count in self.captions.items()) or "none"
        lines = [
            f"{self.folder}: {self.total:,} files, {self.pictures:,} pictures and {self.clips:,} clips accepted",
            f"splits: {splits}",
            f"captions: {captions}",
            f"lost: {len(self.rejected):,} of {self.total:,} files ({self.lost:.1%})",
        ]
        by_reason = defaultdict(list)
        for name, reason in self.rejected:
            by_reason[reason].append(name)
        for reason, names in sorted(by_reason.items(), key=lambda pair: (-len(pair[1]), pair[0])):
            lines += [f"  {name}: {reason}" for name in names]
        if self.marked:
            by = Counter(reason.removeprefix(MARK_WORDS).partition(":")[0] for _, reason in self.marked)
            listed = ", ".join(f"{count:,} by `reverie data {name}`" for name, count in sorted(by.items()))
            lines.append(f"marked, which --undo takes back: {listed}")
            lines += [f"  {name}: {reason}" for name, reason in self.marked]
        if self.copies:
            lines.append(f"same content more than once: {len(self.copies):,} groups")
            lines += [f"  {' = '.join(names)}" for names in self.copies]
        if self.across:
            lines.append(
                f"warning: {len(self.across):,} of these groups are in more than one split, so scores will flatter"
            )
        return "\n".join(lines)


def check(
    folder: str | Path | Index, *, contents: bool = False, limits: Limits = LIMITS, quiet: bool = False
) -> Report:
    """Reads an index and compares it with the files: those that have gone or changed since the import are rejected too.

    contents: compare content hashes, not only sizes. InputError: no index, or nothing usable in the folder.
    """
    index = folder if isinstance(folder, Index) else Index.read(folder)

    @cache
    def size_of(name: str) -> int | None:
        try:
            return index.size_of(name)
        except OSError:
            return None

    def look(item: Item) -> str | None:
        """Why an item cannot be used: as the index says, or by what has become of its bytes."""
        if item.reject is not None and not item.marked:
            return item.reject
        name = item.shard or item.file_name
        size = size_of(name)
        if item.shard is not None:
            if size is None:
                return f"{name}, which held it, is gone: copy or pack it again"
            if size < item.offset + item.bytes:
                return f"{name}, which held it, is cut short: copy or pack it again"
        elif size is None:
            return "gone since the import: import the folder again"
        elif size != item.bytes:
            return CHANGED
        if not contents:
            return None
        media = index.media(item)
        if isinstance(media, Part):
            try:
                media.read(limits)
            except MediaError as error:
                return error.reason
            return None
        try:
            return CHANGED if disk.sha256(media) != item.hash else None
        except OSError:
            return "gone since the import: import the folder again"

    rejected, marked, accepted, same = [], [], [], defaultdict(list)
    steps = zip(index, in_order(look, index.items, index.readers or 1), strict=True)
    for item, reason in track(steps, total=len(index), label="checking", quiet=quiet):
        if reason is None and item.marked:
            marked.append((item.file_name, str(item.reject)))
        elif reason is None:
            accepted.append(item)
            same[item.hash].append(item)
        else:
            rejected.append((item.file_name, reason))
    if not accepted:
        raise nothing_usable(
            index.folder, count_extensions(index.folder), Counter(reason for _, reason in rejected + marked)
        )
    copies = [group for group in same.values() if len(group) > 1]
    return Report(
        folder=index.folder,
        total=len(index),
        pictures=sum(item.frames == 1 for item in accepted),
        clips=sum(item.frames > 1 for item in accepted),
        splits=dict(sorted(Counter(item.split for item in accepted).items())),
        captions=dict(Counter(c.language for item in accepted for c in item.captions).most_common()),
        rejected=tuple(rejected),
        marked=tuple(marked),
        copies=tuple(tuple(item.file_name for item in group) for group in copies),
        across=tuple(
            tuple(item.file_name for item in group)
            for group in copies
            if len({item.split for item in group}) > 1
        ),
    )


def count_extensions(folder: Path) -> Counter[str]:
    """How many files below `folder` have each extension."""
    paths = (path for path in folder.rglob("[!.]*") if path.is_file())
    return Counter(
        path.suffix.lower() or "no extension"
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def nothing_usable(folder: Path, extensions: Counter[str], reasons: Counter[str]) -> InputError:
    """The error for a folder in which nothing can be used: what was looked for, and what was there."""
    saw = ", ".join(f"{count:,} {name}" for name, count in _most(extensions, 12)) or "no file at all"
    why = "; ".join(f"{reason} ({count:,})" for reason, count in _most(reasons, 3) if reason)
    return InputError(
        f"No usable picture or clip in {folder}: looked for {' '.join(SUFFIXES)}, .tar and .tar.gz, and saw {saw}"
        + (f"; rejected: {why}." if why else ".")
    )


def _most(counts: Counter[str], n: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:n]
