"""How long `reverie --help` takes from the shell: `python benchmarks/cli_help.py`. The budget is 300 ms.

The best of twenty, each beside a bare interpreter in the same run, since a busy machine slows both.
"""

import json
import subprocess
import sys
import time


def seconds(*command: str) -> float:
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def main(runs: int = 20) -> None:
    module = [sys.executable, "-m", "reverie.cli"]
    commands = {
        "python": [sys.executable, "-c", ""],
        "reverie --help": [*module, "--help"],
        "reverie train --help": [*module, "train", "--help"],
        "reverie sample --help": [*module, "sample", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(seconds(*command))
    for name, taken in times.items():
        print(json.dumps({"command": name, "best_ms": round(1000 * min(taken)), "runs": runs}))


if __name__ == "__main__":
    main()
