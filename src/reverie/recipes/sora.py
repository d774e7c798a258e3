"""Training the video transformer (systems/sora.py), on pictures and clips together.

    tiny      any captioned folder, on a CPU                          reverie train sora-tiny FOLDER
    stickers  the shipped weights (docs/systems/sora.md)              reverie train sora-stickers DIR
    world     the procedural world, scored by its exact judge         reverie train sora-world FOLDER --clip CLIP
    dit       any captioned folder, at the sizes of DiT's paper       reverie train sora-dit FOLDER --clip CLIP

Every step has one batch of pictures and, where the data has clips, one of clips; their losses count equally. With
`native`, a step has packs instead: pictures and clips together, each at its own aspect and length, as many as a budget
of tokens holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor

import reverie
from reverie import rng
from reverie.backbones.video_dit import VideoDitConfig
from reverie.data.index import Index
from reverie.errors import InputError
from reverie.pictures import grid, to_bytes
from reverie.recipes.parts import (
    averaged,
    captioned,
    heads_of,
    keep,
    load_clip,
    name_bad,
    open_index,
    open_world,
    plain_stickers,
    seldom,
)
from reverie.recipes.sora_batches import Packs, SoraRun, Source, batch_of, learnt_from, sources_of
from reverie.systems.clip import Clip
from reverie.systems.sora import Sora, SoraConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, Step, train
from reverie.train.optimizers import adamw
from reverie.train.schedule import cosine

TINY = (6, 256, 4)  # depth, width, heads
DIT = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}  # 2212.09748, table 1

MASKED = (0.3, 0.5)  # of the patches, as MDT's second version
OF_MASKED = ("backbone.missing", "backbone.interpolater.")  # what masked passes alone need

SECONDS = 3.0  # that most of Fluent's animations last

PROMPTS = (
    "red apple", "rocket", "a sticker of dog face", "pizza", "sun with face", "red heart", "octopus", "soccer ball",
    "火箭", "grinning face", "green apple", "blue heart", "cat face", "hot beverage", "rainbow", "orange circle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amounts:
    """What a step holds where it is not said: pictures and clips or, with native, packs of a budget of tokens."""

    batch: int
    clips: int
    budget: int = 1024
    packs: int = 1

    def asked(self, native: str, **given: int | None) -> dict[str, Any]:
        """The amounts of a SoraRun. InputError: one is given that would count for nothing, or a pack of nothing."""
        said = {name: value for name, value in given.items() if value is not None}
        if native and "batch" in said:
            raise InputError(
                f"batch is {said['batch']}, but with --native packs hold what their budget does: give --budget instead."
            )
        if native and said.get("clips"):
            raise InputError(
                f"clips is {said['clips']}, but with --native packs take clips as they come: leave --clips out, or give"
                " 0 for none."
            )
        for name in ("budget", "packs"):
            if name in said and not native:
                raise InputError(
                    f"{name} is {said[name]}, but batches of one shape have none: leave --{name} out, or give --native."
                )
            if name in said and said[name] < 1:
                raise InputError(f"{name} is {said[name]}: give 1 or more, such as {getattr(self, name)}.")
        return dataclasses.asdict(self) | ({} if native else {"budget": 0}) | said


AMOUNTS = {
    "sora-tiny": Amounts(batch=32, clips=2),
    "sora-stickers": Amounts(batch=64, clips=3),
    "sora-dit": Amounts(batch=256, clips=16, budget=65_536),
}


def tiny(
    data: Path, out: Path, *, clip: str = "clip-stickers", steps: int = 600, batch: int | None = None,
    clips: int | None = None, size: int = 64, native: str = "", budget: int | None = None, lr: float = 1e-3,
    masked: bool = False, mix: str = "", seed: int = 0,
    engine: Engine = ENGINE,
) -> Sora:  # fmt: skip
    """A small model from random weights on any captioned folder; its text tower is that of a CLIP.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        clip: The CLIP that reads the captions: a shipped name or a folder.
        steps: How many batches to learn from.
        batch: Pictures of a step, 32 if not given; more take longer and need more memory.
        clips: Clips of a step, beside the pictures, 2 if not given; 0 for none, with native too.
        size: Pixels a side that it learns to draw, a multiple of 16.
        native: packs or buckets: every item at its own aspect and length, with no more pixels than a square of that
            size; packs mix all shapes, a bucket has one. Without it, squares.
        budget: Tokens of a pack or bucket, with native, 1,024 if not given: these take the place of batch and clips.
        lr: The highest learning rate.
        masked: Learn from whole pictures and from some of their patches, which takes about twice as long a step.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    amounts = AMOUNTS["sora-tiny"].asked(native, batch=batch, clips=clips, budget=budget)
    reader = load_clip(clip)
    index = open_index(data)
    if not index.select(video=True):
        amounts["clips"] = 0
    config = SoraRun(
        model=shape(reader, size=size, masked=masked), clip=clip, steps=steps, native=native, lr=lr, mix=mix, seed=seed,
        **amounts,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=_some_captions(index), engine=engine)


def stickers(
    data: Path, out: Path, *, clip: str = "clip-stickers", steps: int = 6000, batch: int | None = None,
    clips: int | None = None, lr: float = 1e-3, size: int = 128, clip_size: int = 96, frames: int = 24, codec: str = "",
    latents: bool = False, native: str = "", budget: int | None = None, start: str = "",
    width: int = TINY[1], depth: int = TINY[0], masked: bool = False, mix: str = "", seed: int = 0,
    engine: Engine = ENGINE,
) -> Sora:  # fmt: skip
    """The shipped `sora-stickers`: Fluent's 3-D stickers and their animations, without skin-tone variants.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        clip: The CLIP that reads the captions: a shipped name or a folder.
        steps: How many batches to learn from.
        batch: Pictures of a step, 64 if not given; more take longer and need more memory.
        clips: Clips of a step, beside the pictures, 3 if not given; 0 for none, with native too.
        lr: The highest learning rate.
        size: Pixels a side of pictures, a multiple of 32.
        clip_size: Pixels a side of clips, a multiple of 32.
        frames: Frames of a clip.
        codec: The folder of a video autoencoder (video-vae-stickers); without it, it draws pixels.
        latents: Take the latents of pictures from where reverie data encode kept them.
        native: packs or buckets: every item at its own aspect and length, with no more pixels than a square of that
            size; packs mix all shapes, a bucket has one. Without it, squares.
        budget: Tokens of a pack or bucket, with native, 1,024 if not given: these take the place of batch and clips.
        start: The folder of a Sora whose weights to begin from; random weights if not given.
        width: Channels, a multiple of 64.
        depth: Blocks.
        masked: Learn from whole pictures and from some of their patches, which takes about twice as long a step.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    amounts = AMOUNTS["sora-stickers"].asked(native, batch=batch, clips=clips, budget=budget)
    reader = load_clip(clip)
    index = plain_stickers(open_index(data)).select(sources=("fluent-3d", "fluent-anim"))
    model = stickers_shape(
        reader, size=size, clip_size=clip_size, frames=frames, codec=codec, sizes=(depth, width, heads_of(width)),
        masked=masked,
    )  # fmt: skip
    config = SoraRun(
        model=model, clip=clip, codec=codec, latents=latents, start=start, steps=steps, lr=lr,
        clip_frames=9 if codec else frames, vary=0 if latents else 0.4, native=native,
        languages={"en": 0.8, "zh": 0.2}, mix=mix, seed=seed, **amounts,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=PROMPTS, engine=engine)


def dit(
    data: Path, out: Path, *, clip: str, codec: str = "", latents: bool = False, scale: str = "XL", size: int = 256,
    steps: int = 400_000, batch: int | None = None, clips: int | None = None, native: str = "",
    budget: int | None = None, packs: int | None = None, lr: float = 1e-4, masked: bool = False, mix: str = "",
    seed: int = 0, engine: Engine = ENGINE,
) -> Sora:  # fmt: skip
    """Any captioned folder at DiT's sizes and learning rate (2212.09748, table 1 and section 4). Not yet run by us.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        clip: The CLIP whose text tower reads the prompts: its name or folder.
        codec: The folder of a video autoencoder to work in the latents of; pixels if not given.
        latents: Take the latents of pictures from where reverie data encode kept them.
        scale: S, B, L or XL: 12, 12, 24 or 28 blocks of width 384, 768, 1024 or 1152.
        size: Pixels a side, a multiple of 16.
        steps: How many batches to learn from.
        batch: Pictures of a step, 256 if not given; more take longer and need more memory.
        clips: Clips of a step, beside the pictures, 16 if not given; 0 for none, with native too.
        native: packs or buckets: every item at its own aspect and length, with no more pixels than a square of that
            size; packs mix all shapes, a bucket has one. Without it, squares.
        budget: Tokens of a pack or bucket, with native, 65,536 if not given: these take the place of batch and clips.
        packs: Packs of a step, with native, 1 if not given: a multiple of the processes.
        lr: The highest learning rate.
        masked: Learn from whole pictures and from some of their patches, which takes about twice as long a step.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    if scale not in DIT:
        raise InputError(f"DiT has no size {scale!r}: choose one of {', '.join(DIT)}.")
    amounts = AMOUNTS["sora-dit"].asked(native, batch=batch, clips=clips, budget=budget, packs=packs)
    reader = load_clip(clip)
    index = open_index(data)
    if not index.select(video=True):
        amounts["clips"] = 0
    config = SoraRun(
        model=shape(reader, size=size, codec=codec, sizes=DIT[scale], masked=masked), clip=clip, codec=codec,
        latents=latents, steps=steps, clip_frames=9 if codec else 8, native=native, lr=lr, ema=0.9999, mix=mix,
        seed=seed, **amounts,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=_some_captions(index), engine=engine)


def world(
    data: Path, out: Path, *, clip: str, count: int = 8000, moving: int = 800, hidden: int = 200, size: int = 64,
    patch: int = 16, width: int = TINY[1], depth: int = TINY[0], frames: int = 16, steps: int = 3000,
    batch: int = 64, clips: int = 3, lr: float = 1e-3, english: float = 0.8, masked: bool = False,
    mix: str = "", seed: int = 0,
    engine: Engine = ENGINE,
) -> Sora:  # fmt: skip
    """The procedural world, which is drawn first if it is not there.

    Args:
        data: A folder of the world, or a new one for it.
        out: The run's folder; the model is written to its `model`.
        clip: The folder of a CLIP that learnt the world's captions (`reverie train clip-world`).
        count: Pictures of the world, if it is to be drawn.
        moving: Clips of the world, if it is to be drawn.
        hidden: Clips in which something passes behind a wall, if it is to be drawn.
        size: Pixels a side, a multiple of the patch.
        patch: Pixels a side of a patch.
        width: Channels, a multiple of 64.
        depth: Blocks.
        frames: Frames of a clip; it learns from 8 of them at a time.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        clips: Clips of a step, beside the pictures.
        lr: The highest learning rate.
        english: The share of captions in English; the rest are in Chinese.
        masked: Learn from whole pictures and from some of their patches, which takes about twice as long a step.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another world, another start and another order.
    """
    if not 8 <= frames <= 64:
        raise InputError(f"frames is {frames}: a clip of the world has 8 to 64 of them.")
    index = open_world(data, count, moving, hidden, seed=seed, frames=frames, size=size, exact=True)
    reader = load_clip(clip)
    model = shape(
        reader, size=size, patch=patch, frames=frames, sizes=(depth, width, heads_of(width)), masked=masked
    )
    config = SoraRun(
        model=model, clip=clip, steps=steps, batch=batch, clips=clips, lr=lr, warmup=min(100, max(steps // 10, 1)),
        languages={"en": english, "zh": 1 - english}, mix=mix, seed=seed,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=_some_captions(index, 16), engine=engine)


def shape(
    reader: Clip, *, size: int = 64, clip_size: int | None = None, frames: int = 16,
    sizes: tuple[int, int, int] = TINY, codec: str = "", patch: int = 16, zoom: int = 1,
    masked: bool = False,
) -> SoraConfig:  # fmt: skip
    """Pixels in patches of `patch` through a bottleneck, or latents of `codec` in patches of 2.

    With `zoom`, patches are of a picture that the network sees so many times smaller, and times are nearer to noise.
    """
    depth, width, heads = sizes
    stored = reverie.load(codec).config if codec else None
    side = patch if stored is None else 2 * stored.stride[1]
    for name, pixels in (("size", size), ("clip_size", clip_size)):
        if pixels is not None and (pixels < side or pixels % side):
            raise InputError(f"{name} {pixels} cannot be trained: give a multiple of {side}.")
    return SoraConfig(
        backbone=VideoDitConfig(
            channels=3 if stored is None else stored.channels,
            patch=(1, patch) if stored is None else (1, 2),
            bottleneck=128 if stored is None else 0,
            waves=8,
            head=16 if stored is None else 0,
            zoom=zoom if stored is None else 1,
            width=width, depth=depth, heads=heads, context_width=reader.config.text.width,
            masked=MASKED if masked else None,
        ),
        text=reader.config.text, codec=stored, size=(size, size),
        clip_size=None if clip_size in (None, size) else (clip_size, clip_size), frames=frames,
        t_mean=0.8, t_std=1.5, shift=float(zoom), prediction="x0",
    )  # fmt: skip


def stickers_shape(reader: Clip, *, frames: int, **how: Any) -> SoraConfig:
    """`shape` for twice the usual size at the usual number of patches, and for animations shown whole."""
    return dataclasses.replace(shape(reader, patch=32, zoom=2, frames=frames, **how), fps=frames / SECONDS)


def fit(
    config: SoraRun,
    reader: Clip,
    index: Index,
    out: Path,
    *,
    prompts: tuple[str, ...],
    engine: Engine = ENGINE,
) -> Sora:
    """Train, measure and draw on the way, save the averaged weights to `out/model`."""
    if config.native and engine.compile:
        raise InputError("Every pack would be compiled anew: leave --compile out, or --native.")
    if config.native and config.crop:
        raise InputError(
            "With native every item keeps its own aspect, so nothing is cropped: leave crop out."
        )
    torch.manual_seed(rng.integer(config.seed, "weights"))
    model = Sora(config.model, reader.tokenizer)
    model.text.load_state_dict(reader.text.state_dict())
    if model.codec is not None:
        model.codec.load_state_dict(reverie.load(config.codec).state_dict())
    if config.start:
        take_over(model, reverie.load(config.start), config.start)
    model = engine.place(model)
    player = learner(model, config)
    sources = sources_of(index, config, model)
    val = captioned(index.select(split="val", video=False))
    fixed = Source(val, config, model, frames=1).fixed(64) if len(val) else None
    packs = Packs(sources, config) if config.native else None

    def batches(step: int, micro: int) -> dict[str, Any]:
        return batch_of(sources, step, micro) if packs is None else packs.batch(step, micro)

    run = Run(out, learnt_from(config, sources))
    if packs is not None:
        run.say(packs.told())
    share = len(sources) if packs is None else packs.share
    for step in learn(player, batches, config, sources, run=run, accumulate=share, engine=engine):
        if step.every(seldom(config.steps, 12)):
            with averaged(player) as whole:
                if fixed is not None:
                    losses = [
                        whole.loss(fixed | {"t": torch.full_like(fixed["normal"], t)})["loss"]
                        for t in (0.2, 0.4, 0.6, 0.8)
                    ]
                    run.log(step.number, {"val_loss": float(sum(losses) / len(losses))})
                images = whole.generate_image(list(prompts), seed=0, together=True)
                grid(to_bytes(images), list(prompts)).save(run.sample_path(step.number))
            run.curves()
    return kept(player, out)


def learner(model: Sora, config: SoraRun, **how: Any) -> Player:
    """A model with its optimizer, schedule and average."""
    return Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.95)),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup, floor=0.05),
        ema=Ema(model, decay=config.ema),
        clip=1.0,
        **how,
    )


def learn(
    player: Player,
    batches: Callable[[int, int], dict[str, Any]],
    config: SoraRun,
    sources: Sequence[Source],
    *,
    run: Run,
    accumulate: int,
    engine: Engine,
) -> Iterator[Step]:
    """The steps of a run, which log their loss and keep checkpoints; to measure and to draw is the caller's."""
    for step in train([player], batches, run=run, steps=config.steps, accumulate=accumulate, seed=config.seed,
                      save_every=max(config.steps // 24, 1), keep=2, prefetch=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, *(source.pixels for source in sources))
        if step.every(20):
            run.log(step.number, step.metrics)
        yield step


def kept(player: Player, out: Path) -> Sora:
    """The averaged model, written to `out/model`."""
    with averaged(player) as whole:
        keep(whole, out / "model")
    return reverie.load(out / "model")


def take_over(model: Sora, start: Sora, name: str) -> None:
    """Take over the weights of another Sora, by its `name`; parts that it lacks (such as a new head) stay as they are.

    Of one that saw its pictures `zoom` times smaller, each pixel's weights serve zoom x zoom: it draws the same.
    """
    own, theirs, config = model.state_dict(), start.state_dict(), model.config.backbone
    zoom = config.zoom
    if (
        zoom > 1
        and start.config.backbone.zoom == 1
        and config.patch[1] == zoom * start.config.backbone.patch[1]
    ):
        side = start.config.backbone.patch[1]
        embed = "backbone.embed.0.weight" if config.bottleneck else "backbone.embed.weight"
        theirs[embed] = _spread(theirs[embed].T, zoom, side, side).T / zoom**2
        for out in ("backbone.out.weight", "backbone.out.bias"):
            theirs[out] = _spread(theirs[out], zoom, side, side)
        if config.head and start.config.backbone.head:
            first, *last = "backbone.head.0.weight", "backbone.head.4.weight", "backbone.head.4.bias"
            theirs[first] = _spread(theirs[first].transpose(0, 1), zoom).transpose(0, 1) / zoom**2
            theirs |= {one: _spread(theirs[one], zoom) for one in last}
    if config.masked is None:
        theirs = {key: value for key, value in theirs.items() if not key.startswith(OF_MASKED)}
    strange = [key for key, value in theirs.items() if key not in own or own[key].shape != value.shape]
    if strange:
        raise InputError(
            f"{name} cannot be begun from: {strange[0]} (of {len(strange)}) does not fit this model."
        )
    model.load_state_dict(own | theirs)


def _spread(rows: Tensor, zoom: int, h: int = 1, w: int = 1) -> Tensor:
    """One row for each pixel, `(c h w) ...`, to one for each of zoom x zoom in its place, `(c h zoom w zoom) ...`."""
    return repeat(rows, "(c h w) ... -> (c h y w x) ...", h=h, w=w, y=zoom, x=zoom)


def _some_captions(index: Index, count: int = 8) -> tuple[str, ...]:
    texts = [item.captions[0].text for item in index if item.captions]
    return tuple(texts[:: max(len(texts) // count, 1)][:count])
