"""Training a judge of generated stickers (systems/classifier.py) on drawings that no generator may see.

    stickers  the two held-out vendors, without skin tones            reverie train judge-stickers DIR

What it reaches on a style that it never saw, which bounds what it can say of a generator: docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reverie
from reverie import rng
from reverie.data.augment import draws, on_white, view
from reverie.data.index import Index
from reverie.data.stickers import TEST
from reverie.errors import InputError
from reverie.evals.generation import pick
from reverie.recipes.parts import (
    averaged,
    decoded,
    digest,
    keep,
    my_share,
    name_bad,
    open_index,
    plain_stickers,
)
from reverie.systems.classifier import Classifier, ClassifierConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.schedule import cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: ClassifierConfig
    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.05
    warmup: int = 50
    ema: float = 0.998
    strength: float = 1.0  # of the views
    seed: int = 0
    data: str = ""  # a digest of what it learns from


def stickers(
    data: Path,
    out: Path,
    *,
    size: int = 32,
    steps: int = 1800,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Classifier:
    """Names the things of Twemoji and OpenMoji; measured on Fluent's 3-D stickers, which it never learns from.

    At 32 pixels, since minutes of one core are better spent on more views than on finer ones. A step sees `batch`
    things, each twice: by both hands, or in two views where there is but one drawing.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        size: Pixels a side that pictures are seen at.
        steps: How many batches to learn from.
        batch: Things of a step, each seen twice.
        lr: The highest learning rate.
        seed: Another seed, another start and another order.
    """
    index = plain_stickers(open_index(data))
    seen = index.select(sources=TEST, video=False)
    names = tuple(sorted({item.label for item in seen if item.label}))
    if not names:
        raise InputError(
            f"{data} has no labelled picture by {' or '.join(TEST)}: run `reverie data stickers {data}`."
        )
    config = JudgeRun(
        model=ClassifierConfig(names=names, size=size), steps=steps, batch=batch, lr=lr, seed=seed
    )
    return fit(config, seen, index.select(sources=("fluent-3d",)), out, engine=engine)


def fit(config: JudgeRun, seen: Index, unseen: Index, out: Path, *, engine: Engine = ENGINE) -> Classifier:
    """Train on every picture of `seen` from random weights, measure on `unseen`, save the averaged weights."""
    names = config.model.names
    pixels = decoded(seen, size=config.model.size)
    by_name: dict[str, list[int]] = {}
    for i in pixels.good:
        by_name.setdefault(seen[i].label or "", []).append(i)
    if blank := [name for name in names if name not in by_name]:
        raise InputError(
            f"no picture of {blank[0]!r} in {seen.folder} can be read: `reverie data check` says why."
        )
    torch.manual_seed(rng.integer(config.seed, "weights"))
    model = engine.place(Classifier(config.model))

    def loss(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The views are made on the model's device."""
        views = view(batch["rgba"], batch["draws"], strength=config.strength)
        one, other = views.chunk(2)
        return model.loss({"image": one, "other": other, "label": batch["label"]})

    player = Player(
        model,
        loss=loss,
        optimizer=adamw(model, lr=config.lr, weight_decay=config.weight_decay),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup),
        ema=Ema(model, decay=config.ema),
        clip=1.0,
    )

    def batches(step: int, micro: int) -> dict[str, Tensor | list]:
        keys = my_share(step, config.batch, len(names), config.seed)
        hands = [by_name[names[k]] for _, k in keys]
        turns = [rng.integer(config.seed, "hand", *key) for key in keys]
        chosen = [own[turn % len(own)] for own, turn in zip(hands, turns, strict=True)]
        chosen += [own[(turn + 1) % len(own)] for own, turn in zip(hands, turns, strict=True)]
        return {
            "rgba": torch.stack([pixels[i][0] for i in chosen]),
            "draws": torch.cat([draws(config.seed, keys), draws(config.seed, keys, "other view")]),
            "label": torch.tensor([k for _, k in keys]),
            "ids": [seen[i].file_name for i in chosen],
        }

    place = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([place[str(seen[i].label)] for i in pixels.good])

    def learn(model: Classifier) -> None:
        """The prototypes of the model as it is."""
        parts = [pixels.good[at : at + 256] for at in range(0, len(labels), 256)]
        vectors = [model.embed_image(on_white(torch.stack([pixels[i][0] for i in part]))) for part in parts]
        model.learn(torch.cat(vectors), labels)

    run = Run(out, dataclasses.replace(config, data=digest(seen, pixels.good)))
    for step in train([player], batches, run=run, steps=config.steps, seed=config.seed,
                      save_every=max(config.steps // 6, 1), keep=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, pixels)
        if step.every(10):
            run.log(step.number, step.metrics)
        if step.every(max(config.steps // 3, 1)) and len(unseen):
            with averaged(player) as whole:
                learn(whole)
                measured = measure(whole, unseen, count=None if step.last else 256)
            scores = {name: measured[name] for name in ("top1", "top5")}
            run.log(step.number, {f"unseen_{name}": value for name, value in scores.items()})
            run.say(
                f"step {step.number}: in an unseen style {scores['top1']:.1%} of {measured['samples']} right, "
                f"{scores['top5']:.1%} among the first five of {measured['ways']} names"
            )
    with averaged(player) as whole:
        learn(whole)
        keep(whole, out / "model", dtype=torch.float16)
    return reverie.load(out / "model")


def measure(model: Classifier, index: Index, *, count: int | None = None) -> dict:
    """How often the right name comes first, among all that the model knows, for real pictures evenly out of `index`."""
    pixels = decoded(index, size=model.config.size, quiet=True)
    chosen = [i for i in pixels.good if index[i].label in model.config.names]
    chosen = chosen[:: max(len(chosen) // count, 1)] if count else chosen
    images = on_white(torch.stack([pixels[i][0] for i in chosen]))
    return pick(images, [str(index[i].label) for i in chosen], model.classify, names=model.config.names)
