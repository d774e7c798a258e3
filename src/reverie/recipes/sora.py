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
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

import reverie
from reverie import rng
from reverie.backbones.video_dit import VideoDitConfig
from reverie.data.augment import framed, on_white
from reverie.data.dropping import masked_pass, masked_share
from reverie.data.given import draw_given
from reverie.data.index import Index
from reverie.data.latents import Latents
from reverie.data.packing import Plan, bucketed, packed
from reverie.data.pixels import Native, Pixels
from reverie.data.wording import draw_caption
from reverie.errors import InputError
from reverie.pictures import grid, to_bytes
from reverie.recipes.parts import (
    averaged,
    captioned,
    decoded,
    digest,
    heads_of,
    keep,
    load_clip,
    my_share,
    name_bad,
    open_index,
    open_world,
    plain_stickers,
    seldom,
)
from reverie.recipes.search import key_of
from reverie.systems.clip import Clip
from reverie.systems.sora import Sora, SoraConfig
from reverie.train.batches import moved
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, Step, train
from reverie.train.optimizers import adamw
from reverie.train.parallel import team
from reverie.train.schedule import cosine

TINY = (6, 256, 4)  # depth, width, heads
DIT = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}  # 2212.09748, table 1

FORMATS = (
    (1, 1.5),
    (1.5, 1),
    (0.75, 0.75),
    (0.75, 1.25),
    (1.25, 0.75),
)  # height and width, in the usual side

MASKED = (0.3, 0.5)  # of the patches, as MDT's second version
OF_MASKED = ("backbone.missing", "backbone.interpolater.")  # what masked passes alone need

PROMPTS = (
    "red apple", "rocket", "a sticker of dog face", "pizza", "sun with face", "red heart", "octopus", "soccer ball",
    "火箭", "grinning face", "green apple", "blue heart", "cat face", "hot beverage", "rainbow", "orange circle",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoraRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: SoraConfig
    clip: str = ""  # whose text tower reads
    codec: str = ""
    latents: bool = False  # of pictures, as `reverie data encode` kept them
    start: str = ""  # the Sora whose weights were taken over
    steps: int
    batch: int  # pictures of a step
    clips: int  # clips of a step, 0 for none
    clip_frames: int = 8  # that a batch sees of the model's frames
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.999
    drop: float = 0.1  # how often the text is left out
    known: float = 0.5  # how often some of a clip is given (data/given.py)
    known_pictures: float = 0.1  # how often a region of a picture is given
    vary: float = (
        0.0  # how often a step has another format: what is square stands in the middle of it, on white
    )
    crop: bool = False  # of what is not square, the middle; else all of it, on white
    native: str = ""  # "packs" or "buckets" of items at their own aspect and length; "": batches of one shape
    budget: int = 0  # tokens of a pack
    packs: int = 1  # of a step
    languages: dict[str, float] | None = None
    seed: int = 0
    data: tuple[str, ...] = ()  # digests of the pictures and the clips that it learns from


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
    masked: bool = False, seed: int = 0,
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
        seed: Another seed, another start and another order.
    """
    amounts = AMOUNTS["sora-tiny"].asked(native, batch=batch, clips=clips, budget=budget)
    reader = load_clip(clip)
    index = open_index(data)
    if not index.select(video=True):
        amounts["clips"] = 0
    config = SoraRun(
        model=shape(reader, size=size, masked=masked), clip=clip, steps=steps, native=native, lr=lr, seed=seed,
        **amounts,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=_some_captions(index), engine=engine)


def stickers(
    data: Path, out: Path, *, clip: str = "clip-stickers", steps: int = 6000, batch: int | None = None,
    clips: int | None = None, lr: float = 1e-3, size: int = 128, clip_size: int = 96, frames: int = 24, codec: str = "",
    latents: bool = False, native: str = "", budget: int | None = None, start: str = "",
    width: int = TINY[1], depth: int = TINY[0], masked: bool = False, seed: int = 0,
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
        languages={"en": 0.8, "zh": 0.2}, seed=seed, **amounts,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=PROMPTS, engine=engine)


def dit(
    data: Path, out: Path, *, clip: str, codec: str = "", latents: bool = False, scale: str = "XL", size: int = 256,
    steps: int = 400_000, batch: int | None = None, clips: int | None = None, native: str = "",
    budget: int | None = None, packs: int | None = None, lr: float = 1e-4, masked: bool = False, seed: int = 0,
    engine: Engine = ENGINE,
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
        latents=latents, steps=steps, clip_frames=9 if codec else 8, native=native, lr=lr, ema=0.9999, seed=seed,
        **amounts,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=_some_captions(index), engine=engine)


def world(
    data: Path, out: Path, *, clip: str, count: int = 8000, moving: int = 800, hidden: int = 200, size: int = 64,
    patch: int = 16, width: int = TINY[1], depth: int = TINY[0], frames: int = 16, steps: int = 3000,
    batch: int = 64, clips: int = 3, lr: float = 1e-3, english: float = 0.8, masked: bool = False,
    seed: int = 0,
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
        languages={"en": english, "zh": 1 - english}, seed=seed,
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


def stickers_shape(reader: Clip, **how: Any) -> SoraConfig:
    """`shape` for twice the usual size at the usual number of patches."""
    return shape(reader, patch=32, zoom=2, **how)


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


def sources_of(index: Index, config: SoraRun, model: Sora) -> list[Source]:
    """Of the pictures to learn from and, where clips are wanted and there are any, of these."""
    sources = [Source(index.select(split="train", video=False), config, model, frames=1)]
    moving = index.select(split="train", video=True)
    if config.clips and len(moving):
        sources.append(Source(moving, config, model, frames=config.model.frames))
    return sources


def batch_of(sources: Sequence[Source], step: int, micro: int) -> dict[str, Any]:
    """Pictures, then clips where there are any."""
    pictures, *clips = sources
    return clips[0].clips(step) if clips and micro else pictures.pictures(step)


def learnt_from(config: SoraRun, sources: Sequence[Source]) -> SoraRun:
    """The configuration with what the data is."""
    return dataclasses.replace(config, data=tuple(source.digest for source in sources))


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


class Source:
    """Batches of one kind of item. Every draw is keyed by (seed, purpose, epoch, item) or by the step."""

    def __init__(self, index: Index, config: SoraRun, model: Sora, *, frames: int):
        self.index, self.config, self.model, self.frames = index, config, model, frames
        self.home = next(model.parameters()).device
        self.size = config.model.size if frames == 1 else config.model.clip_size or config.model.size
        self.pixels: Pixels | Latents
        if config.latents and frames == 1:
            if config.native:
                raise InputError("Latents are kept of squares: leave --latents out, or --native.")
            if model.codec is None:
                raise InputError("There are latents only of a codec: give --codec, or leave --latents out.")
            self.pixels = Latents.open(index, key=key_of(model.codec), size=self.size)
        elif config.native:
            own = Native(patch=self.model.unit, area=math.prod(self.size))
            self.pixels = decoded(index, size=own, frames=frames, fit="squash")
        else:
            fit = "crop" if config.crop else "pad"
            self.pixels = decoded(index, size=self.size, frames=frames, fit=fit)
        bad = {entry.path for entry in self.pixels.bad}
        self.good = [i for i, item in enumerate(index) if item.captions and item.file_name not in bad]
        if not self.good:
            raise InputError(
                f"nothing usable to train on in {index.folder}: run `reverie data check` to see why."
            )

    @property
    def digest(self) -> str:
        """What it draws from; of kept latents, with their precision."""
        kept = f" {self.pixels.place.name}" if isinstance(self.pixels, Latents) else ""
        return digest(self.index, self.good) + kept

    def pictures(self, step: int) -> dict[str, Any]:
        keys = self._keys(step, self.config.batch)
        size = self._format(step, "picture")
        latents = self._pictures([i for _, i in keys], size)
        batch = self._batch(keys, latents, "picture", share=share_of(self.config, step))
        return batch | {"known": self.given(keys, latents, self.config.known_pictures)}

    def clips(self, step: int) -> dict[str, Any]:
        """Every other frame of whole clips, or a run of neighbours; often with some of it given."""
        keys = self._keys(step, self.config.clips)
        u = torch.rand(2, generator=rng.generator(self.config.seed, "window", step))
        least = self.config.clip_frames if self.model.codec is not None else min(8, self.config.clip_frames)
        pace = 2 if u[0] < 0.5 and (self.frames - 1) // 2 + 1 >= least else 1
        count = min(self.config.clip_frames, (self.frames - 1) // pace + 1)
        span = pace * (count - 1) + 1
        offset = int(u[1] * (self.frames - span + 1))
        window, size = slice(offset, offset + span, pace), self._format(step, "clip")
        latents = self._encoded([self._video(i, window, size) for _, i in keys])
        batch = self._batch(keys, latents, "clip", share=share_of(self.config, step))
        batch["known"] = self.given(keys, latents, self.config.known)
        return batch | {"pace": float(pace)}

    def given(self, keys: list[tuple[int, int]], latents: Tensor, share: float) -> Tensor:
        """What is given: nothing, or for this share of the items what data/given.py draws; `b f`, or with regions
        `b f h w` on the grid of patches."""
        frames, side = self.model.config.backbone.patch
        f, h, w = latents.shape[2] // frames, latents.shape[3] // side, latents.shape[4] // side
        masks = [
            draw_given((f, h, w), rng.generator(self.config.seed, "given", *key))
            if self._draw("known", *key) < share
            else torch.zeros(f, h, w, dtype=torch.bool)
            for key in keys
        ]
        mask = torch.stack(masks)
        whole = mask.flatten(2)
        if (whole.any(-1) == whole.all(-1)).all():
            return whole.all(-1).repeat_interleave(frames, 1)
        return mask

    def masked(self, epoch: int, i: int, latents: Tensor, kind: str, *, share: float) -> dict[str, Tensor]:
        """Of an item's masked pass: the patches that stay when this share goes, and other noise."""
        patches, key = patches_of(latents.shape, self.model), (kind, epoch, i)
        return masked_pass(latents.shape, patches, share, seed=self.config.seed, key=key)

    def fixed(self, count: int) -> dict[str, Tensor]:
        """At most `count` items, the same noise and words every time, text never dropped; on the model's device."""
        some = self.good[:count]
        if self.config.native:
            latents: Tensor | list[Tensor] = [self._encoded([self._video(i, slice(0, 1))])[0] for i in some]
        else:
            latents = self._pictures(some)
        batch = self._batch([(0, i) for i in some], latents, "fixed")
        del batch["ids"]
        return moved(batch | {"drop": torch.zeros(len(some), dtype=torch.bool)}, self.home)

    def view(self, epoch: int, i: int) -> View:
        """What item i shows this time at its own size and length: the whole of it, or another format or stretch."""
        assert isinstance(self.pixels, Pixels)

        def u(purpose: str) -> float:
            return rng.integer(self.config.seed, purpose, epoch, i) / 2**63

        frames, *sides = self.pixels.shape(i)
        vary = self.config.vary > 0 and u("vary") < self.config.vary
        size = self._sides(FORMATS[int(u("format") * len(FORMATS))], sides) if vary else None
        pace, count, offset = 1, 1, 0
        if self.frames > 1:
            pace = 2 if frames > 2 and u("pace") < 0.5 else 1
            count = self._count((frames - 1) // pace + 1)
            offset = int(u("offset") * (frames - pace * (count - 1)))
        window = slice(offset, offset + pace * (count - 1) + 1, pace)
        height, width = size or sides
        shape = self.model.latent_shape(count, (height, width))
        return View(window=window, pace=pace, size=size, latents=shape)

    def _count(self, frames: int) -> int:
        """How many of so many frames are shown: whole latent frames."""
        count = min(self.config.clip_frames, frames)
        return count if self.model.codec is None else count - (count - 1) % self.model.codec.config.stride[0]

    def largest(self, i: int) -> tuple[int, int, int, int]:
        """The latents of the largest view that item i may ever have."""
        assert isinstance(self.pixels, Pixels)
        frames, height, width = self.pixels.shape(i)
        sides = (height, width)
        formats = FORMATS if self.config.vary else ()
        sizes = [sides, *(self._sides(one, sides) for one in formats)]
        count = self._count(frames) if self.frames > 1 else 1
        return self.model.latent_shape(count, max(sizes, key=math.prod))

    def one(self, i: int, view: View) -> Tensor:
        """The latents `c f h w` of what item i shows."""
        return self._encoded([self._video(i, view.window, view.size)])[0]

    def _keys(self, step: int, batch: int) -> list[tuple[int, int]]:
        return [
            (epoch, self.good[place])
            for epoch, place in my_share(step, batch, len(self.good), self.config.seed)
        ]

    def _format(self, step: int, kind: str) -> tuple[int, int] | None:
        """Height and width of what a step shows; None: as the pixels are."""
        u = torch.rand(2, generator=rng.generator(self.config.seed, "format", kind, step))
        if u[0] >= self.config.vary:
            return None
        return self._sides(FORMATS[int(u[1] * len(FORMATS))], self.size)

    def _sides(self, part: tuple[float, float], size: Sequence[int]) -> tuple[int, int]:
        """Parts of a height and a width, in whole patches."""
        height, width = (
            max(round(one * side / self.model.unit), 1) * self.model.unit
            for one, side in zip(part, size, strict=True)
        )
        return height, width

    def _pictures(self, items: list[int], size: tuple[int, int] | None = None) -> Tensor:
        """Latents of the first frames `b c 1 h w`, kept or encoded now."""
        if isinstance(self.pixels, Latents):
            return torch.stack([self.pixels[self.index[i].hash].float() for i in items]).to(self.home)
        return self._encoded([self._video(i, slice(0, 1), size) for i in items])

    def _encoded(self, videos: list[Tensor]) -> Tensor:
        return self.model.encode(torch.stack(videos).to(self.home))

    def _video(self, i: int, window: slice, size: tuple[int, int] | None = None) -> Tensor:
        """Frames of `window` out of `self.frames`, in a picture of `size`; a shorter clip repeats frames.

        At its own length, out of the frames that it has.
        """
        assert isinstance(self.pixels, Pixels)
        frames = self.pixels[i]
        count = len(frames) if self.config.native else self.frames
        places = torch.linspace(0, len(frames) - 1, count).round().long()[window]
        video = on_white(frames[places])
        return rearrange(video if size is None else framed(video, size), "f c h w -> c f h w")

    def _draw(self, purpose: str, epoch: int, i: int) -> float:
        return torch.rand((), generator=rng.generator(self.config.seed, purpose, epoch, i)).item()

    def _batch(
        self,
        keys: list[tuple[int, int]],
        latents: Tensor | list[Tensor],
        kind: str,
        *,
        share: float | None = None,
    ) -> dict[str, Any]:
        """`share`: what a masked pass leaves out; None: there is none."""
        items = []
        for key, one in zip(keys, latents, strict=True):
            more = {} if share is None else self.masked(*key, one, kind, share=share)
            items.append(self.item(*key, one, kind) | more)
        return batched(items, self.model)

    def item(self, epoch: int, i: int, latents: Tensor, kind: str) -> dict[str, Any]:
        """All that `Sora.loss` wants of one item, whose latents are `c f h w`; its text as a string."""
        words = rng.generator(self.config.seed, "caption", epoch, i)
        draws = rng.generator(self.config.seed, "noise", kind, epoch, i)
        flat = torch.randn(1 + latents.numel(), generator=draws)
        return {
            "latents": latents,
            "normal": flat[0],
            "noise": flat[1:].reshape(latents.shape),
            "text": draw_caption(self.index[i], words, languages=self.config.languages),
            "drop": torch.tensor(self._draw("drop", epoch, i) < self.config.drop),
            "known": torch.zeros(latents.shape[1], dtype=torch.bool),
            "id": self.index[i].file_name,
        }


def share_of(config: SoraRun, step: int) -> float | None:
    """What the step's masked pass leaves out; None: there is none."""
    return masked_share(config.model.backbone.masked, seed=config.seed, step=step)


def patches_of(latents: Sequence[int], model: Sora) -> int:
    """How many patches latents `c f h w` have."""
    (frames, side), (_, f, h, w) = model.config.backbone.patch, latents
    return (f // frames) * (h // side) * (w // side)


def batched(items: Sequence[dict[str, Any]], model: Sora) -> dict[str, Any]:
    """Items as `Sora.loss` takes them: as tensors where all are of one shape, else packed, as lists."""
    assert model.tokenizer is not None
    alike = len({(item["latents"].shape, item["known"].shape) for item in items}) == 1
    names = [name for name in ("latents", "noise", "known", "keep", "masked_noise") if name in items[0]]
    large: dict[str, Any] = {name: [item[name] for item in items] for name in names}
    return {
        **{name: torch.stack(parts) if alike else parts for name, parts in large.items()},
        **{name: torch.stack([item[name] for item in items]) for name in ("normal", "drop")},
        "tokens": model.tokenizer.encode([item["text"] for item in items], length=model.config.text.length),
        "ids": [item["id"] for item in items],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What an item shows this time: which frames, as what size (None: its own), in latents of what shape."""

    window: slice
    pace: int
    size: tuple[int, int] | None
    latents: tuple[int, int, int, int]


class Packs:
    """Steps of pictures and clips together, each at its own size and length, under a budget of tokens."""

    def __init__(self, sources: Sequence[Source], config: SoraRun):
        if config.native not in ("packs", "buckets"):
            raise InputError(f"native is {config.native!r:.40}: choose packs or buckets.")
        self.config, self.model = config, sources[0].model
        self.items = [(source, i) for source in sources for i in source.good]
        self.views = lru_cache(maxsize=2)(self._views)
        most, name = max(
            (patches_of(source.largest(i), self.model), source.index[i].file_name) for source, i in self.items
        )
        if most > config.budget:
            raise InputError(
                f"budget is {config.budget:,} tokens a pack, but {name} may take {most:,}: give {most:,} or more, or"
                " smaller pictures."
            )
        self.plan = Plan(self._epoch, together=config.packs)

    @property
    def share(self) -> int:
        """How many packs of a step this process has, one after the other: they count equally."""
        return len(self.plan.step(0, rank=team().rank, world=team().count))

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        items, paces, left_out = [], [], share_of(self.config, step)
        for epoch, place in self.plan.step(step, rank=team().rank, world=team().count)[micro]:
            (source, i), view = self.items[place], self.views(epoch)[place]
            kind = "clip" if source.frames > 1 else "picture"
            item = source.item(epoch, i, source.one(i, view), kind)
            share = self.config.known if kind == "clip" else self.config.known_pictures
            item["known"] = source.given([(epoch, i)], item["latents"][None], share)[0]
            if left_out is not None:
                item |= source.masked(epoch, i, item["latents"], kind, share=left_out)
            items.append(item)
            paces.append(float(view.pace))
        return batched(items, self.model) | {"pace": paces}

    def told(self) -> str:
        """How the first epoch's packs are filled."""
        fill = self.plan.fill(0, self._lengths(0), budget=self.config.budget)
        return (
            f"{self.config.native}: {fill.samples:,} items with {fill.tokens:,} tokens in {fill.packs:,} of"
            f" {self.config.budget:,}, of which {fill.waste:.1%} stays empty"
        )

    def _views(self, epoch: int) -> list[View]:
        return [source.view(epoch, i) for source, i in self.items]

    def _lengths(self, epoch: int) -> list[int]:
        return [patches_of(view.latents, self.model) for view in self.views(epoch)]

    def _epoch(self, epoch: int) -> list[list[int]]:
        how = {"budget": self.config.budget, "seed": self.config.seed, "epoch": epoch}
        lengths = self._lengths(epoch)
        if self.config.native == "packs":
            return packed(lengths, **how)
        return bucketed([view.latents for view in self.views(epoch)], lengths, **how)


def _some_captions(index: Index, count: int = 8) -> tuple[str, ...]:
    texts = [item.captions[0].text for item in index if item.captions]
    return tuple(texts[:: max(len(texts) // count, 1)][:count])
