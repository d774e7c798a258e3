"""Keys and values kept while a sequence is written, token by token, so that no position is computed twice.

`Past` has those of the positions so far of one self-attention, in memory that is taken once. `Known` has those of a
context that does not change, computed once for each of its items and never repeated: all rows that read one item stand
as queries of one attention. Which row reads which item is said once for all layers, by `Readers`.

Convention: a row is one sequence that is being written. `select(rows)` keeps these rows in this order; a row may come
several times (the beams of a search) or not at all (it is finished).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Past:
    """`past(k, v)` adds those of the newest positions, `rows heads n d`, and gives all so far, `rows heads m d`.

    most: the most positions that will come. Views are given. It is for writing, not for training: gradients do not
    pass it.
    """

    def __init__(self, most: int):
        self.most, self.rows, self.length = most, 0, 0
        self.kept: Tensor | None = None  # `two rows heads most d`; more rows may stand there than are in use

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows, heads, n, d = k.shape
        if self.kept is None:
            self.kept, self.rows = k.new_empty(2, rows, heads, self.most, d), rows
        assert rows == self.rows, f"{rows} rows follow {self.rows}"
        assert self.length + n <= self.most, f"{self.length} and {n} positions, but room for {self.most}"
        for i, new in enumerate((k, v)):
            self.kept[i, :rows, :, self.length : self.length + n] = new
        self.length += n
        return self.kept[0, :rows, :, : self.length], self.kept[1, :rows, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, `r` of int64, in this order."""
        assert self.kept is not None, "nothing is kept yet"
        found = self.kept[:, :, :, : self.length].index_select(1, rows)
        if len(rows) > self.kept.shape[1]:
            _, _, heads, most, d = self.kept.shape
            self.kept = found.new_empty(2, len(rows), heads, most, d)
        self.kept[:, : len(rows), :, : self.length] = found
        self.rows = len(rows)


class Readers:
    """Which item of a context each row reads: at first item 0 `each` times, then item 1, and so on."""

    def __init__(self, items: int, *, each: int = 1):
        self.set([item for item in range(items) for _ in range(each)])

    def set(self, items: Sequence[int]) -> None:
        """Row i reads `items[i]`."""
        self.items = list(items)
        # Rows in a row that read one item; then as many such groups of equal size as read items in a row.
        groups: list[list[int]] = []
        for item in self.items:
            if groups and groups[-1][0] == item:
                groups[-1][1] += 1
            else:
                groups.append([item, 1])
        self.runs: list[tuple[int, int, int]] = []  # first item, items, rows of each
        for item, each in groups:
            if self.runs and (last := self.runs[-1])[0] + last[1] == item and last[2] == each:
                self.runs[-1] = (last[0], last[1] + 1, each)
            else:
                self.runs.append((item, 1, each))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order."""
        self.set([self.items[row] for row in rows])


class Known(NamedTuple):
    """Keys and values of a context, `b heads m d`, its mask `b m`, and who reads them (`CrossAttention.known`)."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    readers: Readers


def identity(rows: Tensor, count: int) -> bool:
    """Whether these rows are all `count` in their order, so that nothing needs to be moved."""
    return len(rows) == count and torch.equal(rows, torch.arange(count, device=rows.device))
