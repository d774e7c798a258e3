"""What every measurement of `reverie eval` gives: a table to read, the numbers behind it, pictures, in one folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from reverie import disk
from reverie.output import check_folder

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement: a table to read and all the numbers behind it, JSON-ready."""

    title: str
    columns: Row
    rows: list[Row]
    numbers: dict[str, Any]

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        lines.insert(1, tuple("-" * width for width in widths))
        cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join([self.title, "", *("  ".join(row).rstrip() for row in cells)])

    def write(self, folder: Path) -> Measured:
        """numbers.json and table.md (GitHub's Markdown) into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"title": self.title, "numbers": self.numbers}, indent=1, ensure_ascii=False)
        disk.write(folder / "numbers.json", f"{record}\n")
        disk.write(folder / "table.md", markdown(self.title, self.columns, self.rows))
        return self


def markdown(title: str, columns: Row, rows: list[Row]) -> str:
    """A heading and a table in GitHub's Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return f"# {title}\n\n" + "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def save_figure(figure: Any, path: Path) -> None:
    """A figure of matplotlib as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole(path) as draft:
        figure.savefig(draft, dpi=110, format="png")


def share(value: float, interval: tuple[float, float] | None = None) -> str:
    return f"{value:.1%}" if interval is None else f"{value:.1%}  [{interval[0]:.1%}, {interval[1]:.1%}]"


def fits(out: Path) -> Path:
    """`out`, before anything is computed for it. InputError: it is a file, or cannot be written into."""
    check_folder(out)
    return Path(out)
