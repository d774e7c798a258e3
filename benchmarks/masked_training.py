"""Whether masked training pays (MDT, 2303.14389): MDT's network with masked passes and without, against steps and time.

    python benchmarks/masked_training.py [--quick] [--seeds 0 1 2] [--steps 1600] [--out runs/masked-training]

A small MDT of version 2 (40 pixels in patches of 8, 128 x 6, two blocks of them the decoder) learns single things of
the procedural world, 24 classes: six colours of four shapes. `plain` takes every step on whole pictures alone;
`masked` takes as well a masked pass that leaves out 30 to 50 % of the patches, so it gets half as many steps, which take
about as long. Everything else, the batches of a seed included, is the same.

Measured on the way, of the averaged weights: the loss of whole passes on validation pictures (`val_loss`), and the
share of drawn pictures that the world's exact judge reads as asked (of 110 four times, of 240 at the end). The time is
steps x the median processor time of a step, both kinds by turns in one process with one thread, evaluation left out.

Runs come one after the other and each goes on where it stopped: give the command again. Gives numbers.json, table.md
and curves.png: medians over the seeds, and from the least to the most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import reverie
from reverie import disk
from reverie.data.index import FILE, Index
from reverie.data.world import write
from reverie.recipes import dit
from reverie.systems.mdt import MaskedDiffusionTransformer
from reverie.train.optimizers import adamw
from reverie.train.runs import read_lines

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "cross", "ring")
PICTURES, SIZE, PATCH, SIZES, DECODER = 6000, 40, 8, (6, 128, 2), 2
DRAWN = 240  # pictures that the judge reads at the end
ARMS = {"plain": None, "masked": (0.3, 0.5)}
INKS = {"plain": "#4269d0", "masked": "#e8590c"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1600, help="of plain training; masked takes half of them")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--quick", action="store_true", help="one seed, 48 steps")
    parser.add_argument("--out", type=Path, default=Path("runs/masked-training"))
    asked = parser.parse_args()
    if asked.quick:
        asked.seeds, asked.steps = asked.seeds[:1], 48
    torch.set_num_threads(1)
    index = things(asked.out / "world")
    configs = {
        (arm, seed): config(index, arm, seed=seed, steps=asked.steps, batch=asked.batch, lr=asked.lr)
        for seed in asked.seeds
        for arm in ARMS
    }
    for (arm, seed), one in configs.items():
        train(one, index, asked.out / f"{arm}-{seed}")
    seconds = step_seconds([configs[arm, asked.seeds[0]] for arm in ARMS], index, asked.out / "seconds.json")
    report(configs, dict(zip(ARMS, seconds, strict=True)), asked.out)


def things(folder: Path) -> Index:
    there = (folder / FILE).exists()
    index = Index.read(folder) if there else write(folder, PICTURES, kind="single", size=(SIZE, SIZE), seed=0)
    wanted = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    return Index(index.folder, [item for item in index if item.label in wanted])


def config(index: Index, arm: str, *, seed: int, steps: int, batch: int, lr: float) -> dit.DitRun:
    model: Any = dit.shape("mdt", index, codec="", size=SIZE, patch=PATCH, sizes=SIZES, decoder=DECODER)
    model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, masked=ARMS[arm]))
    return dit.DitRun(
        model=model, size=SIZE, steps=steps if arm == "plain" else steps // 2, batch=batch, lr=lr, warmup=50, ema=0.99,
        clip=1.0, judged=True, seed=seed,
    )  # fmt: skip


def train(config: dit.DitRun, index: Index, out: Path) -> None:
    if not (out / "final.json").exists():
        done = (out / "model" / "model.safetensors").exists()
        model = reverie.load(out / "model") if done else dit.fit(config, index, out)
        disk.write_json(out / "final.json", dit.judged(model, model.config.names, count=DRAWN, seed=10_000))


def step_seconds(configs: list[dit.DitRun], index: Index, kept: Path, rounds: int = 20) -> list[float]:
    """The median processor time of a step of each, by turns."""
    if kept.exists():
        return json.loads(kept.read_text())
    sides = []
    for one in configs:
        model = MaskedDiffusionTransformer(one.model)
        source = dit.Source(index, one, model)
        keys = [(0, i) for i in source.good[: one.batch]]
        batch = source.batch(keys) | source.masked(keys, 0)
        sides.append((model, adamw(model, lr=one.lr, weight_decay=0.0), source, keys, batch))
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 2):
        for (model, optimizer, source, keys, batch), found in zip(sides, times, strict=True):
            batch |= source.masked(keys, number)  # another share of patches each time
            begin = time.process_time()
            model.loss(batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if number >= 2:
                found.append(time.process_time() - begin)
    disk.write_json(kept, [statistics.median(found) for found in times])
    return json.loads(kept.read_text())


def report(configs: dict[tuple[str, int], dit.DitRun], seconds: dict[str, float], out: Path) -> None:
    """Numbers, a table and curves."""
    curves: dict[str, dict[str, dict[int, list[float]]]] = {}
    final: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for arm, seed in configs:
        folder = out / f"{arm}-{seed}"
        final[arm].append(json.loads((folder / "final.json").read_text()))
        for row in read_lines(folder / "metrics.jsonl"):
            for name in ("val_loss", "judged_all", "judged_colour", "judged_shape"):
                if row.get(name) is not None:
                    at = curves.setdefault(name, {}).setdefault(arm, {})
                    at.setdefault(int(row["step"]), []).append(float(row[name]))
    disk.write_json(
        out / "numbers.json",
        {"seconds": seconds, "final": final, "curves": curves, "run": dataclasses.asdict(configs["plain", min(s for _, s in configs)])},
    )  # fmt: skip
    both = sorted(set(curves["val_loss"]["plain"]) & set(curves["val_loss"]["masked"]))[-1]
    ends = {arm: max(curves["val_loss"][arm]) for arm in ARMS}

    def said(values: list[float], form: str) -> str:
        return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    lines = ["| | plain | masked |", "|---|---:|---:|"]
    lines.append(f"| a step, ms of processor time | {1e3 * seconds['plain']:.0f} | {1e3 * seconds['masked']:.0f} |")
    rows: list[tuple[str, dict[str, str]]] = [
        (f"val_loss after {both} steps of each", {arm: said(curves["val_loss"][arm][both], ".4f") for arm in ARMS}),
        (
            "val_loss in equal time, at the end",
            {arm: said(curves["val_loss"][arm][ends[arm]], ".4f") for arm in ARMS},
        ),
    ]
    rows += [
        (f"{name} of {DRAWN}, at the end", {arm: said([one[f"judged_{name}"] for one in final[arm]], ".0%") for arm in ARMS})
        for name in ("count", "colour", "shape", "all")
    ]
    lines += [f"| {what} | {cells['plain']} | {cells['masked']} |" for what, cells in rows]
    disk.write(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(curves, seconds, out / "curves.png")


def draw(curves: dict[str, dict[str, dict[int, list[float]]]], seconds: dict[str, float], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, title) in enumerate((("val_loss", "validation loss"), ("judged_all", "read as asked"))):
        for column, (unit, label) in enumerate((("steps", "steps"), ("time", "seconds of processor time"))):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            axes.set_title(f"{title} against {unit}", fontsize=10)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel(label, fontsize=8)
            for arm, at in curves.get(name, {}).items():
                steps = sorted(at)
                xs = [step * (seconds[arm] if unit == "time" else 1) for step in steps]
                axes.fill_between(xs, [min(at[s]) for s in steps], [max(at[s]) for s in steps],
                                  color=INKS[arm], alpha=0.2, linewidth=0)  # fmt: skip
                axes.plot(xs, [statistics.median(at[s]) for s in steps], color=INKS[arm], marker="o", ms=3, label=arm)
            axes.legend(fontsize=8, frameon=False)
            if name == "val_loss":
                axes.set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
