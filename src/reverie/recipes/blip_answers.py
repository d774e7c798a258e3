"""Training BLIP to answer questions about pictures (2201.12086, section 5.3).

    reverie train blip-answers FOLDER --start MODEL

What is asked stands in the folder's questions.jsonl, a line each: {"file_name": ..., "question": ..., "answers": [...]}
(or one "answer"). Several answers to a question weigh by how many people gave them, as in VQAv2. A folder of the
procedural world needs no such file: its scenes are asked about (data/world_questions.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

import reverie
from reverie.data.augment import draws, view
from reverie.data.index import Index
from reverie.data.streaming import open_pixels
from reverie.data.world import scenes_of
from reverie.data.world_questions import KINDS, questions
from reverie.errors import InputError
from reverie.recipes.parts import at_most, averaged, digest, keep, my_share, name_bad, open_index, seldom
from reverie.systems.blip import Blip, BlipConfig
from reverie.systems.blip_tasks import BlipVqa, BlipVqaConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.schedule import cosine

FILE = "questions.jsonl"
EACH = 2  # questions of a kind about a scene of the world
STILL = tuple(kind for kind in KINDS if kind not in ("direction", "turn", "bounce", "action"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about an item of an index, and its answers with their weights, which add up to 1."""

    item: int
    text: str
    answers: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: BlipVqaConfig
    start: str
    steps: int
    batch: int
    lr: float = 2e-5
    weight_decay: float = 0.05
    warmup: int = 0
    ema: float = 0.99
    strength: float = 0.0
    length: int = 35  # the most tokens of a question
    answer_length: int = 10
    seed: int = 0
    data: str = ""


def answers(
    data: Path,
    out: Path,
    *,
    start: str,
    steps: int = 600,
    batch: int = 64,
    lr: float = 5e-4,
    weight_decay: float = 0.05,
    warmup: int = 50,
    strength: float = 0.0,
    stream: bool = False,
    seed: int = 0,
    engine: Engine = ENGINE,
) -> BlipVqa:
    """Train a Blip, or go on with one that answers, on questions about the pictures of a folder.

    The paper: 480 pixels, 10 epochs of batch 256, lr 2e-5 (appendix B).

    Args:
        data: A folder with a questions.jsonl, or one of the procedural world.
        out: The run's folder; the model is written to its `model`.
        start: The Blip to begin with, which reads and writes, or one that answers: a folder or a shipped name.
        steps: How many batches to learn from.
        batch: Questions of a step.
        lr: The highest learning rate.
        weight_decay: How strongly weights are drawn to zero.
        warmup: Steps over which the learning rate rises.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all: turning moves left to right.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
        seed: Another order.
    """
    index = open_index(data).select(split="train")
    asked = asked_of(index)
    model = begin(start)
    config = AnswersRun(
        model=model.config, start=start, steps=steps, batch=at_most(batch, len(asked)), lr=lr,
        weight_decay=weight_decay, warmup=warmup, strength=strength,
        length=min(35, model.config.text.length), answer_length=min(10, model.config.answer.length), seed=seed,
    )  # fmt: skip
    return fit(config, model, index, asked, out, stream=stream, engine=engine)


def begin(start: str) -> BlipVqa:
    """The network that answers, or one whose halves begin as those of the Blip `start`. InputError: it is neither."""
    given = reverie.load(start, trainable=True)
    if isinstance(given, BlipVqa):
        return given
    if not isinstance(given, Blip) or not (given.config.text.understands and given.config.text.writes):
        raise InputError(
            f"{start} is a {type(given).__name__} that does not both read and write: give a Blip that does, or one that"
            " answers."
        )
    blip = given
    model = BlipVqa(halves(blip.config), blip.tokenizer)
    model.image.load_state_dict(blip.image.state_dict())
    for half in (model.text, model.answers):
        theirs = blip.text.state_dict()
        fits = {
            name: theirs[name] for name, own in half.state_dict().items() if theirs[name].shape == own.shape
        }
        half.load_state_dict(fits, strict=False)  # cross-attention to other widths begins anew
    return model


def halves(shape: BlipConfig) -> BlipVqaConfig:
    """A network that reads questions, and one that writes answers beside what it makes of them."""
    text = shape.text
    return BlipVqaConfig(
        image=shape.image, text=dataclasses.replace(text, writes=False),
        answer=dataclasses.replace(text, understands=False, context_width=text.width), mean=shape.mean, std=shape.std,
        fit=shape.fit, resample=shape.resample,
    )  # fmt: skip


def asked_of(index: Index) -> list[Asked]:
    """The questions about the items of an index, from its file or its scenes. InputError: there are none."""
    path = index.folder / FILE
    places = {item.file_name: i for i, item in enumerate(index)}
    found: list[Asked] = []
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found += _asked(line, places, f"line {number} of {path}")
    else:
        scenes = scenes_of(index)
        if not scenes:
            raise InputError(f"{index.folder} has neither a {FILE} nor scenes of the world: write the file.")
        for name, scene in scenes.items():
            kinds = STILL if index[places[name]].frames == 1 else ()
            told = questions(scene, each=EACH, kinds=kinds, languages=("en",)) if kinds else []
            found += [Asked(item=places[name], text=q.text, answers=((q.answer, 1.0),)) for q in told]
    if not found:
        raise InputError(f"there is no question about the pictures of {index.folder}: name them in {FILE}.")
    return found


def _asked(line: str, places: dict[str, int], where: str) -> list[Asked]:
    try:
        record = json.loads(line)
        several = record.get("answers", [record["answer"]] if "answer" in record else [])
        name, text = record["file_name"], record["question"]
        fine = (
            isinstance(several, list)
            and several
            and all(isinstance(one, str) and one.strip() for one in several)
        )
        if not (fine and isinstance(name, str) and isinstance(text, str) and text.strip()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f'{where} is no question: write {{"file_name": "a.png", "question": "what is it?", "answers": ["a cat"]}}.'
        ) from None
    if name not in places:  # of another split, or marked as bad
        return []
    weights = Counter(several)
    answers = tuple((answer, count / len(several)) for answer, count in weights.items())
    return [Asked(item=places[name], text=text, answers=answers)]


def fit(
    config: AnswersRun,
    model: BlipVqa,
    index: Index,
    asked: list[Asked],
    out: Path,
    *,
    stream: bool = False,
    engine: Engine = ENGINE,
) -> BlipVqa:
    """Train the model on the questions; the averaged weights go to `out/model`."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{config.start} has no tokenizer, so it cannot read questions: give one that has.")
    pixels = open_pixels(index, size=model.config.image.size, stream=stream)
    there = set(pixels.good)
    asked = [one for one in asked if one.item in there]
    if not asked:
        raise InputError(
            f"no picture that is asked about in {index.folder} can be read: run `reverie data check`."
        )
    config = dataclasses.replace(config, data=digest(index, [one.item for one in asked]))
    about = {one.item: one for one in asked}
    model = engine.place(model)
    player = Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=config.weight_decay),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup, floor=0.01),
        ema=Ema(model, decay=config.ema) if config.ema else None,
        clip=1.0,
    )

    def batches(step: int, micro: int) -> dict[str, Any]:
        keys = my_share(step, config.batch, len(asked), config.seed)
        ones = [asked[place] for _, place in keys]
        wanted = [(epoch, one.item) for (epoch, _), one in zip(keys, ones, strict=True)]
        shown, bad = pixels.ready(wanted, sorted(about))
        # A picture that could not be read was replaced, and its question with it.
        ones = [one if one.item == i else about[i] for one, (_, i) in zip(ones, shown, strict=True)]
        tokens = tokenizer.encode([one.text for one in ones], length=config.length)
        told = [(answer, weight, row) for row, one in enumerate(ones) for answer, weight in one.answers]
        return {
            "rgba": torch.stack([pixels[i][0] for _, i in shown]),
            "views": draws(config.seed, shown),
            "tokens": tokens,
            "answers": tokenizer.encode([answer for answer, _, _ in told], length=config.answer_length),
            "weight": torch.tensor([weight for _, weight, _ in told]),
            "question": torch.tensor([row for _, _, row in told]),
            "ids": [index[i].file_name for _, i in shown],
            "bad": bad,
        }

    player.loss = lambda batch: model.loss(
        {**batch, "image": view(batch["rgba"], batch["views"], strength=config.strength)}
    )
    run = Run(out, config)
    for step in train([player], batches, run=run, steps=config.steps, seed=config.seed,
                      save_every=seldom(config.steps, 12), keep=2, prefetch=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, pixels)
        if step.every(10):
            run.log(step.number, step.metrics)
    with averaged(player) as whole:
        keep(whole, out / "model")
    return reverie.load(out / "model")
