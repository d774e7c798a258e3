"""What has been done for which file, a JSON line for each, so that work that is stopped goes on where it was.

A line counts for the content that it was written for: of a file that has changed since, nothing is known. A torn last
line, as a crash leaves it, is skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reverie.data.index import Item


class Journal:
    """The lines of the file `path`, which need not be there yet; the last line of a content holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self._rows[row["file"], row["hash"]] = row
            except (ValueError, KeyError, TypeError):
                continue

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, item: Item) -> dict[str, Any] | None:
        """What was written of this file with this content; None: nothing."""
        return self._rows.get((item.file_name, item.hash))

    def add(self, rows: Iterable[tuple[Item, Mapping[str, Any]]]) -> None:
        """Writes a line for each item, and returns when they are on the disk."""
        whole = [{"file": item.file_name, "hash": item.hash, **row} for item, row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in whole)
        with self.path.open("ab") as file:
            file.write((("\n" if self._torn else "") + lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
        self._rows |= {(row["file"], row["hash"]): row for row in whole}

    def remove(self) -> None:
        """What it held stands elsewhere now."""
        self.path.unlink(missing_ok=True)
        self._rows, self._torn = {}, False
