"""How long each `reverie ... --help` takes from the shell: `python benchmarks/cli_help.py`. The budget is 300 ms.

The best of ten, on the clock and of the processor, each beside a bare interpreter in the same run, since a busy machine
slows both.
"""

import json
import os
import subprocess
import sys
import time

from reverie.catalog import RECIPES
from reverie.cli import COMMANDS


def seconds(*command: str) -> tuple[float, float]:
    """On the clock, and of the processor."""
    begin, before = time.perf_counter(), os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, spent


def main(runs: int = 10) -> None:
    module = [sys.executable, "-m", "reverie"]
    commands = {"python": [sys.executable, "-c", ""], "reverie --help": [*module, "--help"]}
    for name in (*COMMANDS, *(f"train {name}" for name in RECIPES)):
        commands[f"reverie {name} --help"] = [*module, *name.split(), "--help"]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            taken[name].append(seconds(*command))
    for name, times in taken.items():
        clock, processor = (round(1000 * min(some)) for some in zip(*times, strict=True))
        print(json.dumps({"command": name, "best_ms": clock, "processor_ms": processor, "runs": runs}))


if __name__ == "__main__":
    main()
