"""What more compute buys: one Sora on the procedural world, trained for budgets of 1, 4, 16 and 64, and two below.

    python benchmarks/scaling.py [--out runs/scaling] [--most FACTOR] [--base STEPS] [--only FACTOR ...]

One command: draws the world, trains the reader of its captions, then a Sora for each budget, from the same random
weights on the same data, differing in the number of steps alone, each with its whole schedule; then measures them with
the same prompts and noise. Every part is kept in `--out` and not done again: start it again after a stop, and a
training goes on from its last checkpoint. Writes scaling.json, scaling.png (validation loss with its power law,
accuracies) and samples.png (the same prompts and noise at each budget) there.

FLOPs are those of training, forward and backward, counted by operator (planning/counting.py). The validation loss is
the velocity's squared error on held-out scenes at four times, the same noise for all. Accuracies are the exact judge's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

import reverie
from reverie import disk
from reverie.data.index import Index
from reverie.data.world import World
from reverie.evals import generation
from reverie.evals.world_captions import read_caption
from reverie.pictures import grid, save_png, to_bytes
from reverie.planning.plan import How, Part, Subject, model_of, tally
from reverie.recipes import clip, sora
from reverie.recipes.measure_generators import UNSEEN
from reverie.recipes.measured import save_figure
from reverie.recipes.parts import captioned, home, open_world
from reverie.recipes.sora_batches import SoraRun, Source
from reverie.systems.sora import Sora

SIZE, FRAMES, SEED = 40, 8, 0
WORLD = {"count": 8000, "moving": 2400, "hidden": 1200}
READER = {
    "steps": 1
}  # a tower at its start tells words apart better than a short training leaves it (docs/log.md)
SHAPE = {"patch": 8, "width": 128, "depth": 6}
TRAIN = {"batch": 32, "clips": 4, "lr": 2e-3}
BASE = 64  # steps of the budget 1
FACTORS = (1 / 4, 1 / 2, 1, 4, 16, 64)
SHOWN = (1, 4, 16, 64)  # of which pictures and clips are drawn
KINDS = {
    "image": 200,
    "motion": 60,
    "occlusion": 40,
}  # topics or mixes, and how many scenes of each are drawn
SAID = ("background", "colour", "shape", "count", "relation", "motion", "speed", "permanence")
DRAW = {"steps": 16, "guidance": 3.0}
TIMES = (0.2, 0.4, 0.6, 0.8)
AMONG_NOISE = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--most", type=float, default=16, help="the largest budget; 64 goes one further")
    parser.add_argument("--base", type=int, default=BASE, help="steps of the budget 1")
    parser.add_argument("--only", type=float, nargs="*", help="train these budgets and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, reader = options.out / "world", options.out / "reader"
    index = open_world(world, *WORLD.values(), seed=SEED, frames=FRAMES, size=SIZE)
    if not (reader / "model").exists():
        clip.world(world, reader, english=1.0, seed=SEED, **READER)
    factors = [factor for factor in FACTORS if factor <= options.most]
    folders = {factor: options.out / f"budget-{factor:g}" for factor in FACTORS}
    for factor in options.only or factors:
        if not (folders[factor] / "model").exists():
            begun = time.process_time()
            sora.world(
                world, folders[factor], clip=str(reader / "model"), size=SIZE, frames=FRAMES, english=1.0, seed=SEED,
                steps=max(round(factor * options.base), 1), **SHAPE, **TRAIN,
            )  # fmt: skip
            print(f"budget {factor:g}: {(time.process_time() - begun) / 60:.1f} minutes of one core")
    if options.only:
        return
    found = [
        measure(folders[factor], index, factor, max(round(factor * options.base), 1)) for factor in factors
    ]
    numbers = {
        "size": SIZE, "frames": FRAMES, "seed": SEED, "world": WORLD, "reader": READER, "shape": SHAPE, "train": TRAIN,
        "draw": DRAW, "scenes": KINDS, "real": ceiling(), "budgets": found, "law": law(found),
    }  # fmt: skip
    disk.write(options.out / "scaling.json", json.dumps(numbers, indent=1) + "\n")
    figure(numbers, options.out / "scaling.png")
    sheet({factor: folders[factor] for factor in factors if factor in SHOWN}, options.out / "samples.png")
    print(table(numbers))


# ---------------------------------------------------------------- one budget


def measure(folder: Path, index: Index, factor: float, steps: int) -> dict[str, Any]:
    """The numbers of a trained budget, kept in its folder."""
    kept = folder / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text())
    model = reverie.load(folder / "model").to(home())
    numbers: dict[str, Any] = {
        "budget": factor,
        "steps": steps,
        "flops": steps * flops(model),
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "loss": losses(model, index),
        "words": words(model, index),
        "right": {},
    }
    if factor in SHOWN:
        for kind, count in KINDS.items():
            prompts, _ = asked(kind, count)
            read = generation.scenes(drawn(model, kind, count), [read_caption(text) for text in prompts])
            numbers["right"][kind] = read
            print(
                f"budget {factor:g}, {kind}: " + ", ".join(f"{k} {v['right']:.1%}" for k, v in read.items())
            )
    disk.write(kept, json.dumps(numbers, indent=1) + "\n")
    return numbers


def flops(model: Sora) -> int:
    """Of one step of training, pictures and clips, with texts of 20 words."""

    def step(frames: int, shaped: Any, items: int, how: How) -> torch.Tensor:
        latents = torch.empty(items, 3, frames, SIZE, SIZE, device="meta")
        return shaped.loss({
            "latents": latents, "noise": torch.empty_like(latents), "normal": torch.empty(items, device="meta"),
            "tokens": torch.empty(items, how.words, dtype=torch.long, device="meta"),
            "drop": torch.empty(items, dtype=torch.bool, device="meta"),
            "known": torch.empty(items, frames, dtype=torch.bool, device="meta"),
        })["loss"]  # fmt: skip

    how = How(words=20)
    parts = [
        Part(what=what, batch=batch, pixels=SIZE * SIZE * frames,
             loss=lambda shaped, items, how, peers, frames=frames: step(frames, shaped, items, how))
        for what, batch, frames in (("pictures", TRAIN["batch"], 1), ("clips", TRAIN["clips"], FRAMES))
    ]  # fmt: skip
    config = model.config
    subject = Subject(name="sora-world", build=lambda: Sora(config), parts=tuple(parts), steps=1)
    shaped = model_of(subject, how)
    return sum(tally(shaped, part, part.batch, how, peers=1).flops for part in parts)


def losses(model: Sora, index: Index) -> dict[str, float]:
    """The loss on held-out pictures and clips, the mean over TIMES; `all`: both count equally, as in training."""
    out = {
        "pictures": loss(model, held(model, index, video=False), TIMES),
        "clips": loss(model, held(model, index, video=True), TIMES),
    }
    return out | {"all": (out["pictures"] + out["clips"]) / 2}


def words(model: Sora, index: Index) -> float:
    """The share of the loss on pictures that the right caption takes away from another picture's, among much noise."""
    batch = held(model, index, video=False)
    right, other = (loss(model, batch | {"tokens": tokens}, (AMONG_NOISE,))
                    for tokens in (batch["tokens"], batch["tokens"].roll(1, dims=0)))  # fmt: skip
    return 1 - right / other


def held(model: Sora, index: Index, *, video: bool) -> dict[str, Any]:
    """Held-out items and their noise, the same for every model."""
    config = SoraRun(
        model=model.config,
        steps=1,
        batch=1,
        clips=1,
        languages={"en": 1.0, "zh": 0.0},
        seed=SEED,
    )
    source = captioned(index.select(split="val", video=video))
    frames, count = (FRAMES, 96) if video else (1, 256)
    return Source(source, config, model, frames=frames).fixed(count)


def loss(model: Sora, batch: dict[str, Any], times: tuple[float, ...]) -> float:
    with torch.no_grad():
        each = [model.loss(batch | {"t": torch.full_like(batch["normal"], t)})["loss"] for t in times]
    return float(sum(each) / len(each))


def asked(kind: str, count: int) -> tuple[list[str], World]:
    world = World(count, seed=SEED, size=(SIZE, SIZE), frames=frames_of(kind), kind=kind, first=UNSEEN)
    return [next(c.text for c in world[i].captions if c.language == "en") for i in range(count)], world


def frames_of(kind: str) -> int:
    return 1 if kind == "image" else FRAMES


def drawn(model: Sora, kind: str, count: int) -> torch.Tensor:
    prompts, _ = asked(kind, count)

    def some(texts: list[str], seeds: list[int]) -> torch.Tensor:
        return model.generate(texts, frames=frames_of(kind), seed=seeds, size=(SIZE, SIZE), **DRAW)

    samples, _ = generation.draw(some, prompts, list(range(count)), batch=20)
    return samples[:, :, 0] if kind == "image" else samples


def ceiling() -> dict[str, Any]:
    """What the judge reads of renders of the same scenes, and of other scenes than were asked for."""
    out: dict[str, Any] = {}
    for kind, count in KINDS.items():
        prompts, world = asked(kind, count)
        real = torch.stack([rearrange(world[i].pixels[:, :3], "f c h w -> c f h w") for i in range(count)])
        real = real / 127.5 - 1
        real = real[:, :, 0] if kind == "image" else real
        said = [read_caption(text) for text in prompts]
        out[kind] = {
            "same": generation.scenes(real, said),
            "other": generation.scenes(real.roll(1, dims=0), said),
        }
    return out


# ---------------------------------------------------------------- the law, the table, the pictures


def law(found: list[dict[str, Any]]) -> dict[str, float]:
    """loss = scale * FLOPs ^ -power, by least squares on the logarithms, and how much of their variance it explains."""
    x, y = np.log([[one["flops"] for one in found], [one["loss"]["all"] for one in found]])
    slope, start = np.polyfit(x, y, 1)
    rest = y - (start + slope * x)
    return {
        "power": float(-slope),
        "scale": float(np.exp(start)),
        "explained": float(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum()),
        "worst": float(np.abs(np.expm1(rest)).max()),
    }


def kinds_of(name: str) -> list[str]:
    """The scenes that ask for an attribute: what is seen in pictures is read from pictures, the rest from clips."""
    return ["image"] if name in SAID[:5] else ["occlusion"] if name == "permanence" else ["motion"]


def table(numbers: dict[str, Any]) -> str:
    shown = [one for one in numbers["budgets"] if one["right"]]
    lines = ["| | " + " | ".join(f"{one['budget']:g}x" for one in shown) + " | real renders | other scenes |"]
    lines.append("|---|" + "---:|" * (len(shown) + 2))
    lines.append("| training FLOPs | " + " | ".join(f"{one['flops']:.2e}" for one in shown) + " | | |")
    lines.append("| validation loss | " + " | ".join(f"{one['loss']['all']:.4f}" for one in shown) + " | | |")
    lines.append(
        "| what the words take off it | " + " | ".join(f"{one['words']:.1%}" for one in shown) + " | | |"
    )
    for name in SAID:
        (kind,) = kinds_of(name)
        cells = []
        for one in shown:
            low, high = one["right"][kind][name]["interval"]
            cells.append(f"{one['right'][kind][name]['right']:.1%} [{low:.1%}, {high:.1%}]")
        real = numbers["real"][kind]
        cells += [f"{real[which][name]['right']:.1%}" for which in ("same", "other")]
        lines.append(f"| {name} (of {shown[0]['right'][kind][name]['asked']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(numbers: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    found, fit = numbers["budgets"], numbers["law"]
    drawing = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = drawing.subplots(1, 2)
    x = np.array([one["flops"] for one in found])
    line = np.geomspace(x.min() / 1.5, x.max() * 1.5, 50)
    left.plot(line, fit["scale"] * line ** -fit["power"], color="#888", lw=1,
              label=f"{fit['scale']:.3g} · FLOPs^-{fit['power']:.3f}")  # fmt: skip
    for name, mark in (("all", "o"), ("pictures", "^"), ("clips", "s")):
        left.plot(
            x, [one["loss"][name] for one in found], mark, label=f"loss, {name}", ms=5 if name == "all" else 3
        )
    left.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="validation loss")
    left.legend(fontsize=7)
    shown = [one for one in found if one["right"]]
    for name in SAID:
        (kind,) = kinds_of(name)
        ys = [one["right"][kind][name]["right"] for one in shown]
        right.plot([one["flops"] for one in shown], ys, "o-", ms=4, label=name)
    right.set(xscale="log", ylim=(-0.02, 1.02), xlabel="training FLOPs", ylabel="right, by the exact judge")
    right.legend(fontsize=7, ncols=2)
    right.xaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", lw=0.4)
    save_figure(drawing, path)


def sheet(folders: dict[float, Path], path: Path) -> None:
    """Rows: prompts. Columns: the budgets, then a render. Pictures, then clips as three of their frames."""
    models = [reverie.load(folder / "model").to(home()) for folder in folders.values()]
    cells, titles = [], []
    for kind, count, places in (("image", 6, (0,)), ("motion", 2, (0, 4, 7)), ("occlusion", 2, (0, 4, 7))):
        prompts, world = asked(kind, count)
        samples = [drawn(model, kind, count) for model in models]
        real = torch.stack([rearrange(world[i].pixels[:, :3], "f c h w -> c f h w") for i in range(count)])
        columns = [*samples, (real[:, :, 0] if kind == "image" else real) / 127.5 - 1]
        for i, prompt in enumerate(prompts):
            for place in places:
                for column, name in zip(columns, [*(f"{f:g}x" for f in folders), "render"], strict=True):
                    cells.append(column[i] if kind == "image" else column[i][:, place])
                    first = prompt if place == 0 else f"frame {place + 1}"
                    titles.append(f"{name}: {first}")
    save_png(grid(to_bytes(torch.stack(cells)), titles, columns=len(folders) + 1), path)


if __name__ == "__main__":
    main()
