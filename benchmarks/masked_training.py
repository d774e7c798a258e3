"""Whether masked training pays (MDT, 2303.14389): MDT's network with masked passes and without, against steps and time.

    python benchmarks/masked_training.py [--quick] [--seeds 0 1 2] [--steps 1600] [--out runs/masked-training]

A small MDT of version 2 (24 pixels in patches of 4, 96 x 6, two blocks of them the decoder) learns single things of
the procedural world that are not small, 8 classes: four colours of two shapes. `plain` takes every step on whole
pictures alone; `masked` takes as well a masked pass that leaves out 30 to 50 % of the patches, so it gets half as many
steps, which take about as long. Everything else, the batches of a seed included, is the same.

Measured on the way, of the averaged weights: the loss of whole passes on validation pictures (`val_loss`, every 80
steps), and the shares of 64 drawn pictures that the world's exact judge reads as asked (every 400). The time is steps x
the median processor time of a step, both kinds by turns in one process with one thread, evaluation left out.

Runs come one after the other and each goes on where it stopped: give the command again. Gives numbers.json, table.md
and curves.png: medians over the seeds, and from the least to the most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reverie import disk, rng
from reverie.data.index import FILE, Index
from reverie.data.world import write
from reverie.pictures import grid, to_bytes
from reverie.recipes import dit
from reverie.recipes.parts import averaged, digest, my_share
from reverie.systems.mdt import MaskedDiffusionTransformer
from reverie.train.ema import Ema
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.runs import read_lines
from reverie.train.schedule import constant

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")
PICTURES, SIZE, PATCH, SIZES, DECODER = 8000, 24, 4, (6, 96, 3), 2
EVERY, JUDGED_EVERY = 80, 400  # steps
JUDGED, DRAWN_BY = 64, 20  # pictures for the judge, and steps of their sampling
TIMES = (200.0, 400.0, 600.0, 800.0)  # of the validation loss
ARMS = {"plain": None, "masked": (0.3, 0.5)}
DONE = "done.json"
INKS = {"plain": "#4269d0", "masked": "#e8590c"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=int, default=1600, help="of plain training; masked takes half of them"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--quick", action="store_true", help="one seed, 160 steps")
    parser.add_argument("--out", type=Path, default=Path("runs/masked-training"))
    asked = parser.parse_args()
    if asked.quick:
        asked.seeds, asked.steps = asked.seeds[:1], 160
    torch.set_num_threads(1)
    index = things(asked.out / "world")
    configs = {
        (arm, seed): config(index, arm, seed=seed, steps=asked.steps, batch=asked.batch, lr=asked.lr)
        for seed in asked.seeds
        for arm in ARMS
    }
    seconds: dict[str, float] = {}
    for seed in asked.seeds:
        for arm in ARMS:
            learn(configs[arm, seed], index, asked.out / f"{arm}-{seed}")
        if not seconds:
            pair = [configs[arm, asked.seeds[0]] for arm in ARMS]
            seconds = dict(zip(ARMS, step_seconds(pair, index, asked.out / "seconds.json"), strict=True))
        done = {
            key: one for key, one in configs.items() if (asked.out / "-".join(map(str, key)) / DONE).exists()
        }
        report(done, seconds, asked.out)


def things(folder: Path) -> Index:
    there = (folder / FILE).exists()
    index = Index.read(folder) if there else write(folder, PICTURES, kind="single", size=(SIZE, SIZE), seed=0)
    wanted = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    truths = map(json.loads, (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines())
    small = {truth["file_name"] for truth in truths if truth["things"][0]["size"] == "small"}
    return Index(
        index.folder, [item for item in index if item.label in wanted and item.file_name not in small]
    )


def config(index: Index, arm: str, *, seed: int, steps: int, batch: int, lr: float) -> dit.DitRun:
    model: Any = dit.shape("mdt", index, codec="", size=SIZE, patch=PATCH, sizes=SIZES, decoder=DECODER)
    model = dataclasses.replace(
        model, backbone=dataclasses.replace(model.backbone, masked=ARMS[arm]), steps=DRAWN_BY, clip=1.0
    )
    return dit.DitRun(
        model=model, size=SIZE, steps=steps if arm == "plain" else steps // 2, batch=batch, lr=lr, warmup=50, ema=0.99,
        clip=1.0, seed=seed,
    )  # fmt: skip


def learn(config: dit.DitRun, index: Index, out: Path) -> None:
    """One run, as in recipes/dit.py, with evaluation at the same steps in both kinds."""
    if (out / DONE).exists():
        return
    torch.manual_seed(rng.integer(config.seed, "weights"))
    model = MaskedDiffusionTransformer(config.model)  # type: ignore[arg-type]  # of MDT alone
    player = Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.999)),
        schedule=partial(constant, warmup=config.warmup),
        ema=Ema(model, decay=config.ema),
        clip=config.clip,
    )
    source = dit.Source(index.select(split="train"), config, model)
    fixed = dit.Source(index.select(split="val"), config, model).fixed(64)
    names = config.model.names

    def batches(step: int, micro: int) -> dict[str, Any]:
        keys = [(epoch, source.good[place]) for epoch, place in
                my_share(step, config.batch, len(source.good), config.seed)]  # fmt: skip
        return source.batch(keys) | source.masked(keys, step)

    run = Run(out, dataclasses.replace(config, data=digest(source.index, source.good)))
    for step in train(
        [player], batches, run=run, steps=config.steps, seed=config.seed, save_every=EVERY, keep=2
    ):
        if step.every(EVERY):
            with averaged(player) as whole:
                some = [
                    whole.loss(fixed | {"t": torch.full_like(fixed["uniform"], t)})["loss"] for t in TIMES
                ]
                found = {"val_loss": float(sum(some) / len(some))}
                if step.every(JUDGED_EVERY):
                    found |= dit.judged(whole, names, count=JUDGED, steps=DRAWN_BY)
                    images = whole.generate_image(list(range(len(names))), seed=0)
                    grid(to_bytes(images), list(names)).save(run.sample_path(step.number))
                run.log(step.number, step.metrics | found)
    disk.write_json(out / DONE, {"steps": config.steps})


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
    curves: dict[str, dict[str, dict[int, list[float]]]] = {}  # metric, kind, step: a value of each seed
    for arm, seed in configs:
        for row in read_lines(out / f"{arm}-{seed}" / "metrics.jsonl"):
            for name, value in row.items():
                if name == "val_loss" or name.startswith("judged"):
                    at = curves.setdefault(name, {}).setdefault(arm, {})
                    at.setdefault(int(row["step"]), []).append(float(value))
    kept = {str(key): dataclasses.asdict(one) for key, one in configs.items()}
    disk.write_json(out / "numbers.json", {"seconds_of_a_step": seconds, "curves": curves, "runs": kept})

    def said(name: str, arm: str, step: int) -> str:
        values, form = curves[name][arm][step], ".4f" if name == "val_loss" else ".0%"
        return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    whole, half = (max(curves["val_loss"][arm]) for arm in ("plain", "masked"))
    times = half * seconds["plain"], half * seconds["masked"], whole * seconds["plain"]
    lines = [
        f"| | plain, {half} steps | masked, {half} steps | plain, {whole} steps |",
        "|---|---:|---:|---:|",
        f"| seconds | {' | '.join(f'{took:.0f}' for took in times)} |",
    ]
    for name in curves:
        cells = [said(name, arm, step) for arm, step in (("plain", half), ("masked", half), ("plain", whole))
                 if step in curves[name][arm]]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    disk.write(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(curves, seconds, out / "curves.png")


def draw(curves: dict[str, dict[str, dict[int, list[float]]]], seconds: dict[str, float], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, title) in enumerate(
        (("val_loss", "validation loss"), ("judged_colour", "colour as asked"))
    ):
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
                axes.plot(
                    xs,
                    [statistics.median(at[s]) for s in steps],
                    color=INKS[arm],
                    marker="o",
                    ms=3,
                    label=arm,
                )
            axes.legend(fontsize=8, frameon=False)
            if name == "val_loss":
                axes.set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
