"""Sides of a comparison, each in a process of its own, which do a step of each in turn and say how long it took.

A benchmark calls `serve` when it is started with `--worker SIDE CASE`, and `running` to start one of itself for every
side. Time is the processor's with one thread, which other work disturbs least, and the wall's otherwise. Memory is the
most that a process held above its libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

Parts = dict[str, float]
Action = Callable[[], Parts | None]


def synchronised(device: str = "cpu") -> float:
    """The time on the wall, once the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def by_processor(device: str) -> bool:
    """Whether times are the processor's and not the wall's."""
    return device == "cpu" and torch.get_num_threads() == 1


def peak(device: str, precision: str) -> float:
    """Operations a second of one product of two large matrices."""
    side = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    left @ right
    cpu, at = time.process_time(), synchronised(device)
    left @ right
    wall, cpu = synchronised(device) - at, time.process_time() - cpu
    return 2.0 * side**3 / (cpu if by_processor(device) else wall)


def held() -> tuple[int, int]:
    """Bytes that this process holds now, and the most that it held."""
    status = Path("/proc/self/status")
    if status.exists():
        text = status.read_text()
        return tuple(1024 * int(text.partition(key)[2].split()[0]) for key in ("VmRSS:", "VmHWM:"))  # type: ignore[return-value]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def busy() -> float:
    """Seconds that all processors have worked; NaN where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")
    counts = [int(word) for word in stat.read_text().split("\n")[0].split()[1:9]]
    return (sum(counts) - counts[3] - counts[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting


def others(seconds: float, own: float, before: float) -> float:
    """Cores that other processes used since `before`; NaN where the system does not say."""
    return max(0.0, (busy() - before - own) / seconds)


def serve(
    libraries: Callable[[], object], make: Callable[[], dict[str, Action]], *, device: str = "cpu"
) -> None:
    """Say "ready", then for each word of standard input do that action and say its times as JSON.

    libraries: imports what is not counted as memory. make: builds the side; its first action is done once before.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print
    libraries()
    torch.manual_seed(0)
    before = held()[0]
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # progress
        actions = make()
        next(iter(actions.values()))()
        print("ready", file=answers)
        for line in sys.stdin:
            word = line.strip()
            if word == "memory":
                most = torch.cuda.max_memory_allocated() if device == "cuda" else held()[1] - before
                print(json.dumps({"mib": round(most / 2**20)}), file=answers)
                continue
            whole, own, at = busy(), time.process_time(), synchronised(device)
            parts = actions[word]() or {}
            wall, own = synchronised(device) - at, time.process_time() - own
            load = others(wall, own, whole)
            print(json.dumps({"wall": wall, "cpu": own, "others": load, **parts}), file=answers)


class Side:
    """A side in its process. `ask(word)` does that action there."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with code {self.process.wait()}; a smaller case may fit.")
        return line.strip()

    def ask(self, word: str) -> Parts:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return json.loads(self.hear())


@contextlib.contextmanager
def running(script: str, names: Sequence[str], case: str, *, threads: int) -> Iterator[list[Side]]:
    """`script --worker NAME CASE --threads N` for every name, ready."""
    found: list[Side] = []
    try:
        for name in names:
            words = [sys.executable, script, "--worker", name, case, "--threads", str(threads)]
            found.append(Side(name, words))
            assert found[-1].hear() == "ready"  # one after the other: the first step is the largest
        yield found
    finally:
        for one in found:
            one.process.stdin.close()
            one.process.wait()
