"""Embedding a folder's pictures in this process and by workers over Ray Data: when the first share comes, and how fast.

    python benchmarks/preparing.py stickers/ --count 600 --workers 1 2

Nothing is kept: each row embeds the same pictures anew. `started` is from the call to the first share of 64
(imports, the cluster, the model); `pictures/s` is of all the shares after it.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from reverie.data.preparing import Pool, prepared
from reverie.recipes.parts import capable
from reverie.recipes.search import embedder, everywhere, key_of, searched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--model", default="clip-stickers")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = searched(asked.data)[1][: asked.count]
    key = key_of(capable(asked.model, "embed_image", device="cpu"))
    start = partial(embedder, asked.model, everywhere(asked.data), key, "float32", "cpu")
    print("| workers | started, s | pictures/s | whole, s |\n|---|---:|---:|---:|")
    first: dict[str, torch.Tensor] | None = None
    for workers in (None, *asked.workers):
        begun, seen, vectors = time.perf_counter(), [], {}
        pool = Pool(workers, gpus=False) if workers is not None else None
        try:
            for share in prepared(
                [(name, name) for name in names], start, pool=pool, threads=1, label="", quiet=True
            ):
                seen.append((time.perf_counter() - begun, len(share.good)))
                lengths = share.tensors["lengths"].tolist()
                rows = share.tensors["vectors"].split(lengths)
                vectors |= {name: own for (name, _), own in zip(share.good, rows, strict=True)}
        finally:
            if pool is not None:
                pool.__exit__(None, None, None)
        whole = time.perf_counter() - begun
        rate = sum(count for _, count in seen[1:]) / (seen[-1][0] - seen[0][0])
        print(f"| {workers or 'this process'} | {seen[0][0]:.1f} | {rate:.1f} | {whole:.1f} |", flush=True)
        first = first or vectors
        assert first.keys() == vectors.keys()
        assert all(torch.equal(first[name], own) for name, own in vectors.items()), "other vectors"


if __name__ == "__main__":
    main()
