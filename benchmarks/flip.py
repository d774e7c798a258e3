"""What dropping patches saves (FLIP, 2212.00794): the image tower and the whole step, at several shares, in one run.

    python benchmarks/flip.py [--quick] [--model vit-b16 stickers] [--drop 0 0.5 0.75] [--rounds 3] [--out runs/flip]

vit-b16   ViT-B/16 at 224 pixels (768 x 12 x 12), text 512 x 12 x 8, batch 8
stickers  the shape that ships: 64 pixels, 16 patches behind a conv stem, batch 128

Random weights and pictures, texts of nine tokens. `tower`: the image tower forward and backward; `step`: forward and
backward of both towers with the loss, then AdamW. Each round times every share once, and the table has the median.
With one thread the clock is this process's processor time. fp32, or bf16 autocast where the processor has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reverie.data.dropping import kept_patches
from reverie.recipes import clip as recipe
from reverie.systems.clip import Clip
from reverie.systems.clip_models import MODELS
from reverie.train.optimizers import adamw
from reverie.train.precision import autocast, resolve

WORDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--model", nargs="+", choices=("vit-b16", "stickers"), default=["vit-b16", "stickers"]
    )
    parser.add_argument("--drop", nargs="+", type=float, default=[0.0, 0.5, 0.75])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--out", type=Path, default=Path("runs/flip"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    precision = resolve("auto", torch.device("cpu"))
    rows = []
    for name in asked.model:
        rows += measure(name, asked.drop, 1 if asked.quick else asked.rounds, precision)
    lines = [f"| model, batch ({precision}) | dropped | tower, ms | times as quick | step, ms | times as quick |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    lines += [
        f"| {r['model']}, {r['batch']} | {r['drop']:.0%} | {r['tower']:,.0f} | {r['tower_gain']:.2f}"
        f" | {r['step']:,.0f} | {r['step_gain']:.2f} |"
        for r in rows
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "table.md").write_text(table)
    (asked.out / "numbers.json").write_text(json.dumps(rows, indent=1) + "\n")


def measure(name: str, drops: list[float], rounds: int, precision: str) -> list[dict]:
    torch.manual_seed(0)
    config = MODELS["ViT-B-16"] if name == "vit-b16" else recipe.shape(4096, 4095)
    batch = 8 if name == "vit-b16" else 128
    model = Clip(config).train()
    optimizer = adamw(model, lr=1e-4)
    image = torch.rand(batch, 3, config.image.size, config.image.size) * 2 - 1
    tokens = torch.randint(1, 1000, (batch, WORDS))
    tokens[:, -1] = config.text.end
    keys = [(0, i) for i in range(batch)]
    keeps = [kept_patches(config.image.patches, drop, seed=0, keys=keys) if drop else None for drop in drops]

    def tower(keep: Tensor | None) -> None:
        with autocast(precision, torch.device("cpu")):
            vectors = model.embed_image(image, keep=keep)
        vectors.float().square().sum().backward()
        optimizer.zero_grad()

    def step(keep: Tensor | None) -> None:
        with autocast(precision, torch.device("cpu")):
            loss = model.loss({"image": image, "tokens": tokens} | ({} if keep is None else {"keep": keep}))
        loss["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[tuple[str, int], list[float]] = {}
    calls: dict[str, Callable[[Tensor | None], None]] = {"tower": tower, "step": step}
    for number in range(rounds + 1):  # the first fills caches
        for what, call in calls.items():
            for place, keep in enumerate(keeps):
                begin = time.process_time()
                call(keep)
                if number:
                    times.setdefault((what, place), []).append(1000 * (time.process_time() - begin))
    found = {key: statistics.median(values) for key, values in times.items()}
    return [
        {"model": name, "batch": batch, "drop": drop, "tower": found["tower", i], "step": found["step", i],
         "tower_gain": found["tower", 0] / found["tower", i], "step_gain": found["step", 0] / found["step", i]}
        for i, drop in enumerate(drops)
    ]  # fmt: skip


if __name__ == "__main__":
    main()
