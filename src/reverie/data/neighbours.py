"""Approximate search among many vectors by faiss (extra `index`), with its recall measured against exact search.

Inverted lists (Sivic and Zisserman 2003; Johnson, Douze and Jegou 2017, 1702.08734): k-means puts the vectors into
lists, and a query looks into the nearest of them alone. Vectors are kept in half precision. How many lists a query
looks into is chosen when the lists are built: as few as find RECALL of the ten true neighbours of vectors of the
folder. Queries of words lie elsewhere than pictures do, and their recall may be lower.

What is built is kept in the user's own cache (`$XDG_CACHE_HOME/reverie`, or `~/.cache/reverie`), not beside the
pictures: faiss reads its files without checking them, and a folder of pictures may come from a stranger.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie import disk, rng
from reverie.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

RECALL = 0.95
PROBES = 200  # vectors of the folder that choose and measure
SAMPLE = 40  # vectors for each list that k-means learns from
BLOCK = 65_536


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Inverted lists over vectors. `recall`: of the ten nearest, measured with `looks` of `lists` looked into."""

    index: Any
    lists: int
    looks: int
    recall: float

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """For each of `queries` (`q d`) the k best found: scores (of vectors in half precision) and rows, best first.

        Where fewer than k were found, the rows end with -1.
        """
        import torch

        scores, rows = self.index.search(queries.float().cpu().numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(rows)


def available() -> bool:
    from importlib.util import find_spec

    return find_spec("faiss") is not None


def build(vectors: Tensor, *, lists: int | None = None, seed: int = 0) -> Lists:
    """Lists over `n d` of any float type, read a block at a time. InputError: faiss is not installed, or n < 1000.

    lists: how many; the square root of n if not given.
    """
    import torch

    faiss = _faiss()
    n, width = vectors.shape
    if n < 1000:
        raise InputError(f"{n} vectors need no approximate search: search them exactly.")
    lists = lists or round(n**0.5)
    draw = rng.generator(seed, "neighbours", "learn")
    some = torch.randperm(n, generator=draw)[: SAMPLE * lists].sort().values
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = (
        rng.integer(seed, "neighbours") % 2**31,
        10,
        1,
    )
    index.train(vectors[some].float().numpy())
    for i in range(0, n, BLOCK):
        index.add(vectors[i : i + BLOCK].float().numpy())
    return _tuned(index, vectors, seed)


def _tuned(index: Any, vectors: Tensor, seed: int) -> Lists:
    """As few looks as reach RECALL, doubling."""
    import torch

    n = len(vectors)
    probes = torch.randperm(n, generator=rng.generator(seed, "neighbours", "probe"))[:PROBES].sort().values
    queries = vectors[probes].float()
    best = torch.full((len(queries), 10), -torch.inf)
    true = torch.zeros(len(queries), 10, dtype=torch.long)
    for i in range(0, n, BLOCK):
        part = queries @ vectors[i : i + BLOCK].float().T
        scores, rows = part.topk(min(10, part.shape[1]))
        best, order = torch.cat([best, scores], 1).topk(10)
        true = torch.cat([true, rows + i], 1).gather(1, order)
    looks = 1
    while True:
        index.nprobe = looks
        _, rows = index.search(queries.numpy(), 10)
        recall = (torch.from_numpy(rows)[:, :, None] == true[:, None, :]).any(1).double().mean().item()
        if recall >= RECALL or looks >= index.nlist:
            return Lists(index=index, lists=index.nlist, looks=looks, recall=recall)
        looks = min(2 * looks, index.nlist)


def kept(vectors: Tensor, name: str) -> Lists:
    """The lists of that name from the user's cache, built and put there in place of any others if it has none.

    name: what tells these vectors from all others (`Embeddings.digest`).
    """
    faiss = _faiss()
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reverie"
    file, about = place / f"lists-{name}.faiss", place / f"lists-{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):  # faiss raises the last
        told = json.loads(about.read_text())
        index = faiss.read_index(str(file))
        if index.ntotal == len(vectors) and index.d == vectors.shape[1]:
            index.nprobe = int(told["looks"])
            return Lists(index=index, lists=index.nlist, looks=index.nprobe, recall=float(told["recall"]))
    built = build(vectors)
    with contextlib.suppress(OSError):  # a full disk costs the building again
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("lists-*"):  # they are as large as the vectors
            old.unlink(missing_ok=True)
        with disk.whole(file, durable=False) as draft:
            faiss.write_index(built.index, str(draft))
        disk.write(about, json.dumps({"looks": built.looks, "recall": built.recall}), durable=False)
    return built


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError("Approximate search needs faiss: pip install 'reverie[index]'.") from None
    return faiss
