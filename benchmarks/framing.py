"""The framing experiment of Sora's report: native aspects against square crops, on the procedural world.

    python benchmarks/framing.py OUT [--steps 3000] [--count 24000] [--prompts 120] [--seed 0]

One plain thing on a ground, never cut off, in pictures of 48 x 48, 32 x 64 and 64 x 32 pixels, a third of each: of
`--count` single things of the world those that are not small and have one of four colours and three shapes. Two small
video transformers learn from the same pictures for as many steps of as many tokens:

native     each picture at its own aspect, in packs (`recipes/sora_batches.py`, native="packs")
crops      its middle square of 48 pixels, as long as its short side, as systems before cropped

Both then draw the captions of unseen pictures in these three sizes, from the same noise. The world's judge reads each:
whether there is one thing, whether the picture's edge cuts it off, whether shape and colour are what was asked for. It
reads as well what each has learnt from.

OUT holds the data, both runs, results.json and framing.png. A run that is stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie import disk
from reverie.data.augment import on_white
from reverie.data.index import Index
from reverie.data.pixels import Native
from reverie.data.world import world, write
from reverie.data.world_captions import captions
from reverie.evals.interval import bootstrap
from reverie.evals.world_judge import judge, score
from reverie.recipes import sora
from reverie.recipes.parts import decoded, load_clip
from reverie.recipes.sora_batches import SoraRun
from reverie.scene import Scene
from reverie.systems.sora import Sora

ARMS = ("native", "crops")
SIZES = ((64, 128), (96, 96), (128, 64))  # of the files: twice what is learnt
DRAWN = ((48, 48), (32, 64), (64, 32))
SIDE, PATCH, BUDGET = 48, 8, 1152  # pixels, pixels, tokens of a step: 32 squares
SHAPE = (4, 128, 2)  # depth, width, heads
WANTED = {
    f"{colour} {shape}"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
}


def plain(scene: Scene) -> bool:
    """Whether a scene is one that this experiment learns and draws."""
    thing = scene.things[0]
    return f"{thing.colour} {thing.shape}" in WANTED and thing.texture == "solid" and thing.size != "small"


def data(folder: Path, scenes: int, seed: int) -> Index:
    """As many pictures of each size, each with its caption."""
    parts = []
    for number, size in enumerate(SIZES):
        place = folder / f"{size[0]}x{size[1]}"
        own = (
            Index.read(place)
            if (place / "metadata.parquet").exists()
            else write(place, scenes // len(SIZES), size=size, kind="single", seed=seed + number)
        )
        for i, item in enumerate(own):
            if plain(world(i, seed=seed + number, kind="single", aspect=size[1] / size[0])):
                parts.append(dataclasses.replace(item, file_name=f"{place.name}/{item.file_name}"))
    return Index(folder, parts)


def learn(arm: str, index: Index, out: Path, *, steps: int, seed: int) -> Sora:
    clip = load_clip("clip-stickers")
    model = sora.shape(clip, size=SIDE, sizes=SHAPE, patch=PATCH)
    backbone = dataclasses.replace(
        model.backbone, head=0
    )  # it takes more time than the blocks of so small a network
    config = SoraRun(
        model=dataclasses.replace(model, backbone=backbone, steps=16, guidance=2.0),
        clip="clip-stickers",
        steps=steps,
        batch=BUDGET // (SIDE // PATCH) ** 2,
        clips=0,
        known_pictures=0.0,
        lr=2e-3,
        warmup=50,
        ema=0.995,
        native="packs" if arm == "native" else "",
        budget=BUDGET if arm == "native" else 0,
        crop=arm == "crops",
        languages={"en": 1.0},
        seed=seed,
    )
    return sora.fit(config, clip, index, out, prompts=("a red circle", "a green star"))


def read(images: Tensor | list[Tensor], truths: list[Any] | None) -> dict[str, Tensor]:
    """Of each picture whether the judge finds exactly one thing, whether one is cut off, and whether it is as asked."""
    readings = [judge(image) for image in images]
    out = {
        "one": torch.tensor([len(reading.things) == 1 for reading in readings]),
        "cut": torch.tensor([any(thing.cut for thing in reading.things) for reading in readings]),
    }
    if truths is not None:
        scores = [score(reading, truth) for reading, truth in zip(readings, truths, strict=True)]
        for name in ("shape", "colour"):
            out[name] = torch.tensor([bool(one[name]) for one in scores])
        out["right"] = out["one"] & out["shape"] & out["colour"] & ~out["cut"]
    return {name: part.float() for name, part in out.items()}


def told(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Each as its mean and the interval that holds it at 95 %."""
    return {
        name: [round(x, 4) for x in (float(part.mean()), *bootstrap(part))] for name, part in values.items()
    }


def learnt(arm: str, index: Index, count: int) -> dict[str, list[float]]:
    """What stands in the pictures that an arm learns from, by the same judge."""
    some = Index(index.folder, index.items[:: max(len(index) // count, 1)])
    if arm == "native":
        pixels = decoded(some, size=Native(patch=PATCH, area=SIDE**2), fit="squash")
    else:
        pixels = decoded(some, size=SIDE, fit="crop")
    return told(read([on_white(pixels[i])[0] for i in pixels.good], None))


def drawn(model: Sora, prompts: int, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    numbers, shown = {}, {}
    for height, width in DRAWN:
        unseen = (world(i, seed=seed, kind="single", aspect=width / height) for i in count(10**6))
        scenes = list(islice(filter(plain, unseen), prompts))
        texts = [next(one.text for one in captions(scene) if one.language == "en") for scene in scenes]
        parts = [
            model.generate_image(texts[i : i + 20], size=(height, width), seed=1000 + i, together=True)
            for i in range(0, prompts, 20)
        ]
        images = torch.cat(parts)
        numbers[f"{height}x{width}"] = told(read(images, scenes))
        shown[f"{height}x{width}"] = images[:8]
    return numbers, shown


def picture(shown: dict[str, dict[str, Tensor]], results: dict[str, Any], path: Path) -> None:
    """What both arms drew of the same captions and noise, above how much of it is cut off."""
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(10, 7))
    for row, arm in enumerate(ARMS):
        for column, size in enumerate(shown[arm]):
            axes = figure.add_axes([0.02 + 0.33 * column, 0.68 - 0.31 * row, 0.31, 0.26])
            height, width = map(int, size.split("x"))
            per_row = 4 if width <= height else 2 if width > 1.5 * height else 4
            images = shown[arm][size]
            pad = torch.ones(len(images), 3, height + 4, width + 4)
            pad[:, :, 2:-2, 2:-2] = images
            rows = [torch.cat(list(pad[i : i + per_row]), -1) for i in range(0, len(pad), per_row)]
            axes.imshow(
                ((torch.cat(rows, -2) + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest"
            )
            axes.set_title(f"{arm}, {size}", fontsize=9)
            axes.axis("off")
    axes = figure.add_axes([0.08, 0.08, 0.88, 0.22])
    for number, arm in enumerate(ARMS):
        means = [results[arm]["drawn"][size]["cut"] for size in shown[arm]]
        places = [i + 0.38 * number for i in range(len(means))]
        heights = [100 * mean for mean, _, _ in means]
        errors = [[100 * (m - low) for m, low, _ in means], [100 * (high - m) for m, _, high in means]]
        axes.bar(places, heights, 0.36, yerr=errors, label=arm)
    axes.set_xticks([i + 0.19 for i in range(len(shown[ARMS[0]]))], list(shown[ARMS[0]]))
    axes.set_ylabel("cut off, %")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--count", type=int, default=24000, help="pictures of the world, of which some 6 %% are learnt"
    )
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    index = data(asked.out / "data", asked.count, asked.seed)
    settings = {name: value for name, value in vars(asked).items() if name != "out"}
    results: dict[str, Any] = {"settings": settings}
    shown = {}
    for arm in ARMS:
        model = learn(arm, index, asked.out / arm, steps=asked.steps, seed=asked.seed)
        numbers, shown[arm] = drawn(model, asked.prompts, asked.seed)
        rows = [json.loads(line) for line in (asked.out / arm / "metrics.jsonl").read_text().splitlines()]
        results[arm] = {
            "learnt from": learnt(arm, index, 400),
            "drawn": numbers,
            "loss": [row["loss"] for row in rows if "loss" in row][-1],
            "parameters": sum(p.numel() for p in model.backbone.parameters()),
        }
        disk.write_json(asked.out / "results.json", results)
    picture(shown, results, asked.out / "framing.png")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
