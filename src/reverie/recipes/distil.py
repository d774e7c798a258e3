"""Distilling a Sora into a student of few steps (docs/sampling.md).

    sora  a student of 4 steps without guidance      reverie train sora-distil DIR --teacher sora-stickers

The student begins as the teacher. One of its steps learns to arrive where several guided steps of the teacher arrive
(objectives/distillation.py), from corrupted items of the data or from where its own steps before have led.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import reverie
from reverie import rng
from reverie.data.index import Index
from reverie.errors import InputError
from reverie.objectives.distillation import step_loss
from reverie.pictures import grid, to_bytes
from reverie.processes import gaussian
from reverie.processes.gaussian import Flow
from reverie.recipes.parts import averaged, captioned, open_index, plain_stickers, seldom
from reverie.recipes.sora import kept, learn, learner, take_over
from reverie.recipes.sora_batches import SoraRun, batch_of, learnt_from, sources_of
from reverie.samplers.diffusion import euler
from reverie.samplers.guidance import guided
from reverie.systems.sora import Sora
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.runs import read_json
from reverie.weights.store import hash_of

# Settings of a SoraRun that a student has from its teacher's.
OF_DATA = ("vary", "crop", "known", "known_pictures", "languages")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilRun:
    """What a run depends on; it stands in the run folder's config.json."""

    items: SoraRun  # what is drawn of the data; its model is the student
    teacher: str
    weights: str  # the hash of the teacher's
    inside: int  # steps of the teacher in one of the student
    guidance: float  # of the teacher
    own: float  # how often the student begins where it came itself


def sora(
    data: Path, out: Path, *, teacher: str, student_steps: int = 4, teacher_steps: int = 24,
    guidance: float | None = None, steps: int = 600, batch: int = 24, clips: int = 1, own: float = 0.5,
    sources: tuple[str, ...] = (), vary: float | None = None, english: float | None = None, lr: float = 3e-4,
    mix: str = "", seed: int = 0,
    engine: Engine = ENGINE,
) -> Sora:  # fmt: skip
    """A student that draws in few steps and without guidance what its teacher draws in many.

    Args:
        data: The folder that the teacher learnt from.
        out: The run's folder; the student is written to its `model`.
        teacher: The Sora to learn from: a shipped name or a folder.
        student_steps: Steps of the student.
        teacher_steps: Steps of the teacher, a multiple of the student's.
        guidance: The teacher's, which the student takes in; its own if not given.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        clips: Clips of a step, beside the pictures, where the folder has clips; 0 for none.
        own: How often the student begins where its own steps have led, and not at a corrupted item of the data.
        sources: Only items of these sources, such as fluent-3d; all if not given.
        vary: How often a step has another format than the teacher's size; as the teacher's run had it if not given, or
            0 where that run is not beside the teacher.
        english: The share of captions in English, the rest being Chinese; as the teacher's run had it if not given, or
            0.8 where that run is not beside the teacher.
        lr: The highest learning rate.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another order.
    """
    master = reverie.load(teacher)
    if not isinstance(master, Sora):
        raise InputError(f"{teacher} is a {type(master).__name__}: a Sora is distilled.")
    if student_steps < 1 or teacher_steps < 2 * student_steps or teacher_steps % student_steps:
        raise InputError(
            f"{teacher_steps} steps of the teacher cannot become {student_steps}: give a multiple, twice or more."
        )
    index = plain_stickers(open_index(data)).select(sources=sources or None)
    for name, share in (("vary", vary), ("english", english)):
        if share is not None and not 0 <= share <= 1:
            raise InputError(f"{name} is {share:g}: give a share from 0 to 1.")
    backbone = dataclasses.replace(master.config.backbone, masked=None)  # a student has no masked passes
    model = dataclasses.replace(master.config, backbone=backbone, steps=student_steps, guidance=1.0)
    drawn: dict[str, Any] = {"vary": 0.0, "languages": {"en": 0.8, "zh": 0.2}} | of_run(teacher)
    if vary is not None:
        drawn["vary"] = vary
    if english is not None:
        drawn["languages"] = {"en": english, "zh": 1 - english}
    moving = clips if index.select(split="train", video=True) else 0
    items = SoraRun(
        model=model, start=teacher, steps=steps, batch=batch, clips=moving, clip_frames=model.frames,
        lr=lr, warmup=min(50, steps // 10), ema=max(1 - 20 / max(steps, 40), 0.9), drop=0.0,
        mix=mix, seed=seed, **drawn,
    )  # fmt: skip
    config = DistilRun(
        items=items, teacher=teacher, weights=hash_of(master), inside=teacher_steps // student_steps,
        guidance=master.config.guidance if guidance is None else guidance, own=own,
    )  # fmt: skip
    return fit(config, master, index, out, engine=engine)


def of_run(teacher: str) -> dict[str, Any]:
    """How the run that a teacher comes from drew from its data; {} where that run's folder is not around the model."""
    run = read_json(Path(teacher).parent / "config.json") if Path(teacher).is_dir() else {}
    items = run.get("items", run)  # a student may teach, too
    return {name: items[name] for name in OF_DATA if name in items} if "clip_frames" in items else {}


def fit(config: DistilRun, master: Sora, index: Index, out: Path, *, engine: Engine = ENGINE) -> Sora:
    """Train the student, draw with both on the way, save its averaged weights to `out/model`."""
    items = config.items
    student = Sora(items.model, master.tokenizer)
    take_over(student, master, config.teacher)
    student = engine.place(student)
    master = master.requires_grad_(False).to(next(student.parameters()).device)
    player = learner(student, items, loss=partial(loss, student, master, config))
    sources = sources_of(index, items, student)

    def batches(step: int, micro: int) -> dict[str, Any]:
        batch = batch_of(sources, step, micro)
        u = torch.rand((), generator=rng.generator(items.seed, "own", step))
        turns = step // len(sources)
        return batch | {
            "which": (step if micro == 0 else turns) % items.model.steps,
            "own": bool(u < config.own),
        }

    held = captioned(index.select(split="val", video=False)) or captioned(
        index.select(split="train", video=False)
    )
    prompts = [item.captions[0].text for item in held][:: max(len(held) // 16, 1)][:16]
    goal = master.generate_image(prompts, seed=0, steps=items.model.steps * config.inside, together=True,
                                 guidance=config.guidance)  # fmt: skip
    items = learnt_from(items, sources)
    run = Run(out, dataclasses.replace(config, items=items))
    for step in learn(player, batches, items, sources, run=run, accumulate=len(sources), engine=engine):
        if step.every(seldom(items.steps, 12)):
            with averaged(player) as whole:
                drawn = whole.generate_image(prompts, seed=0, together=True)
            run.log(step.number, {"val_rmse": float((drawn - goal).square().mean().sqrt())})
            tiles = rearrange([goal, drawn], "who b ... -> (b who) ...")
            titles = [text for prompt in prompts for text in (f"teacher: {prompt}", "student")]
            grid(to_bytes(tiles), titles).save(run.sample_path(step.number))
            run.curves()
    return kept(player, out)


def loss(student: Sora, master: Sora, config: DistilRun, batch: dict[str, Any]) -> dict[str, Tensor]:
    """One step of the student against several of the teacher, where nothing is given.

    `batch` is that of `Sora.loss`, with `which`, the student's step, and `own`, whether it comes there by itself.
    """
    latents, noise, known = batch["latents"], batch["noise"], batch["known"]
    inside, which = config.inside, batch["which"]
    flow = Flow(shift=student.config.shift)
    coarse, fine = flow.points(student.config.steps), flow.points(student.config.steps * inside)
    wide = master.within(known)
    given = {"given": latents, "whole": known, "pace": batch.get("pace", 1.0)}
    with torch.no_grad():
        text = master.read(batch["tokens"])
        none = master.backbone.without_text(*text, torch.ones_like(batch["drop"]))
        both = tuple(torch.cat(pair) for pair in zip(text, none, strict=True))
        told = student.predictor(text, **given)
        if batch["own"]:
            x = euler(told, torch.where(wide, latents, noise), coarse[: which + 1])
        else:
            x = gaussian.corrupt(latents, noise, coarse[which])
        x = torch.where(wide, latents, x)
        led = guided(master.predictor(both, **given), config.guidance)
        x_after = euler(led, x, fine[which * inside : (which + 1) * inside + 1])
    weight = (~wide).float()
    return {
        "loss": step_loss(told(x, coarse[which]), x, x_after, coarse[which], coarse[which + 1], weight=weight)
    }
