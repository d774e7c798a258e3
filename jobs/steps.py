"""How many steps of a training command fill some seconds: python3 jobs/steps.py SECONDS RECIPE CORPUS FLAGS...

By two short runs, in which what a run costs besides its steps is the same; a first one lets caches be filled.
"""

import os
import subprocess
import sys
import tempfile
import time


def main() -> None:
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    short, long = map(int, os.environ.get("TRIES", "40 160").split())
    taken = {}
    for steps in (2, short, long):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "reverie", "train", *command, "--out", f"{folder}/run"]
            begin = time.monotonic()
            subprocess.run([*words, "--steps", str(steps)], check=True, stdout=sys.stderr)
            taken[steps] = time.monotonic() - begin
    rate = max(taken[long] - taken[short], 1e-3) / (long - short)
    fixed = max(taken[short] - rate * short, 0.0)
    print(max(round((seconds - fixed) / rate), long))


if __name__ == "__main__":
    main()
