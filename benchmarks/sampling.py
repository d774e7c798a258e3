"""Time and peak memory of drawing pictures and clips: `python benchmarks/sampling.py [--model sora-stickers]`.

Each case runs in a process of its own, so its peak memory is its own (Python and libraries included; on a GPU the
device's); the seconds are the best of `--runs` after one that warms up, for one batch. Prints one JSON line a case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

PROMPT = "a red rocket"


def measure(case: argparse.Namespace) -> dict[str, object]:
    """Draw `case.batch` samples of `case.frames` frames in this process."""
    import torch

    import reverie
    from reverie.recipes.parts import home
    from reverie.train.memory import peak as peak_memory

    if case.threads:
        torch.set_num_threads(case.threads)
    begun = time.perf_counter()
    sora = reverie.load(case.model).to(home())
    loaded = time.perf_counter() - begun
    memory = peak_memory(home())
    taken = []
    for run in range(case.runs + 1):
        begun = time.perf_counter()
        options = {"seed": run, "steps": case.steps, "together": True}
        if case.frames == 1:
            drawn = sora.generate_image([PROMPT] * case.batch, **options)
        else:
            drawn = sora.generate_video([PROMPT] * case.batch, frames=case.frames, **options)
        drawn.cpu()
        taken.append(time.perf_counter() - begun)
    peak = peak_memory(home())
    return {
        "model": case.model,
        "frames": case.frames,
        "size": "x".join(map(str, sora.size_of(case.frames))),
        "batch": case.batch,
        "steps": case.steps or sora.config.steps,
        "device": str(home()),
        "threads": torch.get_num_threads(),
        "seconds_a_sample": round(min(taken[1:]) / case.batch, 4),
        "seconds_a_batch": round(min(taken[1:]), 4),
        "first_batch": round(taken[0], 4),
        "load_seconds": round(loaded, 3),
        "peak_mib": None if peak is None else round(peak / 2**20),
        "of_which_loaded_mib": None if memory is None else round(memory / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--model", default="sora-stickers", help="a shipped name, or a folder that a run wrote"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="the model's own number if not given")
    parser.add_argument("--threads", type=int, help="all of the machine's if not given")
    parser.add_argument("--clip", type=int, default=24, help="frames of a clip")
    parser.add_argument("--frames", type=int, help="with --batch: only this case, in this process")
    parser.add_argument("--batch", type=int)
    case = parser.parse_args()
    if case.frames and case.batch:
        print(json.dumps(measure(case)), flush=True)
        return
    for frames, batch in ((1, 1), (1, 16), (case.clip, 1), (case.clip, 4)):
        words = [sys.executable, __file__, *sys.argv[1:], "--frames", str(frames), "--batch", str(batch)]
        subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
