"""Search among one million vectors of 512 numbers: exact in fp32 and fp16, and by faiss, on one thread.

    python benchmarks/search.py [--count 1000000] [--width 512] [--out runs/search]

Each case is a process of its own that maps the file of vectors, as `reverie search` maps a folder's; so the memory is
that of the search, pages of the file included. Seconds are of the processor, which on one thread are those of an idle
machine, and the median of several calls; the vectors have been read once before. The
vectors are unit vectors in 20,000 clusters on 64 directions (real embeddings lie in far fewer dimensions than they
have; wholly random ones would make lists worthless), and the queries are made like them, none being among them. faiss
(extra `index`) is left out where it is not installed; its recall is the share of the ten exact neighbours it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reverie import rng
from reverie.data import neighbours
from reverie.evals.retrieval import search_topk

CASES = ("exact-fp32", "exact-fp16", "faiss")
QUERIES, TOP = 32, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--case", choices=CASES, help="one of them, in this process")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.case:
        print(json.dumps(measure(asked.case, asked.out)))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    make(asked.out, asked.count, asked.width)
    cases = [case for case in CASES if case != "faiss" or neighbours.available()]
    found = {}
    for case in cases:
        command = [sys.executable, __file__, "--case", case, "--out", str(asked.out)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, found[case], flush=True)
    (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        f"{asked.count:,} vectors of {asked.width}, one thread, torch {torch.__version__}",
        "",
        "| search | building, s | one query, s | 32 queries, s a query | most memory, GB | recall@10 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {it['building']:.1f} | {it['one']:.4f} | {it['many']:.4f} | {it['memory'] / 1e9:.2f} | "
        f"{it['recall']:.3f} |"
        for case, it in found.items()
    ]
    (asked.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def make(out: Path, count: int, width: int) -> None:
    """The vectors in both types, and the queries with their exact answers."""
    if (out / "queries.safetensors").exists():
        return
    draw = rng.generator(0, "search-benchmark")
    directions = torch.randn(64, width, generator=draw)
    centres = torch.randn(20_000, 64, generator=draw)

    def some(number: int) -> Tensor:
        own = centres[torch.randint(len(centres), (number,), generator=draw)]
        z = own + 0.7 * torch.randn(number, 64, generator=draw)
        return F.normalize(z @ directions + 2.0 * torch.randn(number, width, generator=draw), dim=-1)

    queries = some(QUERIES)
    vectors = torch.cat([some(min(50_000, count - i)) for i in range(0, count, 50_000)])
    save_file({"vectors": vectors}, out / "fp32.safetensors")
    save_file({"vectors": vectors.half()}, out / "fp16.safetensors")
    save_file(
        {"queries": queries, "answers": search_topk(queries, vectors, TOP)[1].contiguous()},
        out / "queries.safetensors",
    )


def read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def measure(case: str, out: Path) -> dict[str, Any]:
    vectors = read(out / ("fp32.safetensors" if case == "exact-fp32" else "fp16.safetensors"), "vectors")
    queries, answers = (read(out / "queries.safetensors", name) for name in ("queries", "answers"))
    begin = time.process_time()
    about: dict[str, Any] = {}
    if case == "faiss":
        import faiss

        faiss.omp_set_num_threads(1)
        lists = neighbours.build(vectors)
        find: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda asked: lists.topk(asked, TOP)  # noqa: E731
        about = {"lists": lists.lists, "looks": lists.looks, "recall_when_built": lists.recall}
    else:
        find = lambda asked: search_topk(asked, vectors, TOP)  # noqa: E731
    building = time.process_time() - begin
    found = find(queries)[1]
    recall = (found[:, :, None] == answers[:, None, :]).any(1).double().mean().item()
    one = statistics.median(seconds(find, queries[i : i + 1]) for i in range(9))
    many = statistics.median(seconds(find, queries) for _ in range(5)) / len(queries)
    memory = peak()
    return {"building": building, "one": one, "many": many, "memory": memory, "recall": recall, **about}


def peak() -> int:
    """The most bytes that this process has held (getrusage would count the parent's, from before the exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def seconds(find: Callable[[Tensor], Any], queries: Tensor) -> float:
    begin = time.process_time()
    find(queries)
    return time.process_time() - begin


if __name__ == "__main__":
    main()
