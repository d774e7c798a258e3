"""Training the video transformer (systems/sora.py), on pictures and clips together.

    tiny      any captioned folder, on a CPU                          reverie train sora-tiny FOLDER
    stickers  the shipped weights (docs/systems/sora.md)              reverie train sora-stickers DIR
    world     the procedural world, scored by its exact judge         reverie train sora-world FOLDER --clip CLIP
    dit       any captioned folder, at the sizes of DiT's paper       reverie train sora-dit FOLDER --clip CLIP

Every step has one batch of pictures and, where the data has clips, one of clips; their losses count equally.
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
from reverie.backbones.video_dit import VideoDitConfig
from reverie.data.augment import framed, on_white
from reverie.data.dropping import kept_patches
from reverie.data.given import draw_given
from reverie.data.index import Index
from reverie.data.latents import Latents
from reverie.data.pixels import Pixels
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
)
from reverie.recipes.search import key_of
from reverie.systems.clip import Clip
from reverie.systems.sora import Sora, SoraConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
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
    vary: float = (
        0.0  # how often a step has another format: what is square stands in the middle of it, on white
    )
    languages: dict[str, float] | None = None
    seed: int = 0
    data: tuple[str, ...] = ()  # digests of the pictures and the clips that it learns from


def tiny(
    data: Path, out: Path, *, clip: str = "clip-stickers", steps: int = 600, batch: int = 32, clips: int = 2,
    size: int = 64, lr: float = 1e-3, masked: bool = False, seed: int = 0,
    engine: Engine = ENGINE,
) -> Sora:  # fmt: skip
    """A small model from random weights on any captioned folder; its text tower is that of a CLIP.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        clip: The CLIP that reads the captions: a shipped name or a folder.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        clips: Clips of a step, beside the pictures, where the folder has clips.
        size: Pixels a side that it learns to draw, a multiple of 16.
        lr: The highest learning rate.
        masked: Learn from whole pictures and from some of their patches, which takes about twice as long a step.
        seed: Another seed, another start and another order.
    """
    reader = load_clip(clip)
    index = open_index(data)
    config = SoraRun(
        model=shape(reader, size=size, masked=masked), clip=clip, steps=steps, batch=batch,
        clips=clips if index.select(video=True) else 0, lr=lr, seed=seed,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=_some_captions(index), engine=engine)


def stickers(
    data: Path, out: Path, *, clip: str = "clip-stickers", steps: int = 6000, batch: int = 64, clips: int = 3,
    lr: float = 1e-3, size: int = 128, clip_size: int = 96, frames: int = 24, codec: str = "", latents: bool = False,
    start: str = "", width: int = TINY[1], depth: int = TINY[0], masked: bool = False, seed: int = 0,
    engine: Engine = ENGINE,
) -> Sora:  # fmt: skip
    """The shipped `sora-stickers`: Fluent's 3-D stickers and their animations, without skin-tone variants.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        clip: The CLIP that reads the captions: a shipped name or a folder.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        clips: Clips of a step, beside the pictures.
        lr: The highest learning rate.
        size: Pixels a side of pictures, a multiple of 32.
        clip_size: Pixels a side of clips, a multiple of 32.
        frames: Frames of a clip.
        codec: The folder of a video autoencoder (video-vae-stickers); without it, it draws pixels.
        latents: Take the latents of pictures from where reverie data encode kept them.
        start: The folder of a Sora whose weights to begin from; random weights if not given.
        width: Channels, a multiple of 64.
        depth: Blocks.
        masked: Learn from whole pictures and from some of their patches, which takes about twice as long a step.
        seed: Another seed, another start and another order.
    """
    reader = load_clip(clip)
    index = plain_stickers(open_index(data)).select(sources=("fluent-3d", "fluent-anim"))
    model = stickers_shape(
        reader, size=size, clip_size=clip_size, frames=frames, codec=codec, sizes=(depth, width, heads_of(width)),
        masked=masked,
    )  # fmt: skip
    config = SoraRun(
        model=model, clip=clip, codec=codec, latents=latents, start=start, steps=steps, batch=batch, clips=clips, lr=lr,
        clip_frames=9 if codec else frames, vary=0 if latents else 0.4, languages={"en": 0.8, "zh": 0.2}, seed=seed,
    )  # fmt: skip
    return fit(config, reader, index, out, prompts=PROMPTS, engine=engine)


def dit(
    data: Path, out: Path, *, clip: str, codec: str = "", latents: bool = False, scale: str = "XL", size: int = 256,
    steps: int = 400_000, batch: int = 256, clips: int = 16, lr: float = 1e-4, masked: bool = False, seed: int = 0,
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
        batch: Pictures of a step; more take longer and need more memory.
        clips: Clips of a step, beside the pictures; 0 for none.
        lr: The highest learning rate.
        masked: Learn from whole pictures and from some of their patches, which takes about twice as long a step.
        seed: Another seed, another start and another order.
    """
    if scale not in DIT:
        raise InputError(f"DiT has no size {scale!r}: choose one of {', '.join(DIT)}.")
    reader = load_clip(clip)
    index = open_index(data)
    config = SoraRun(
        model=shape(reader, size=size, codec=codec, sizes=DIT[scale], masked=masked), clip=clip, codec=codec,
        latents=latents, steps=steps, batch=batch, clips=clips if index.select(video=True) else 0,
        clip_frames=9 if codec else 8, lr=lr, ema=0.9999, seed=seed,
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
    index = open_world(data, count, moving, hidden, seed=seed, frames=frames, size=size)
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
    sizes: tuple[int, int, int] = TINY, codec: str = "", patch: int = 16, head: int = 16,
    shift: float = 1.0, masked: bool = False,
) -> SoraConfig:  # fmt: skip
    """Pixels in patches of `patch` through a bottleneck, or latents of `codec` in patches of 2."""
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
            head=head if stored is None else 0,
            width=width, depth=depth, heads=heads, context_width=reader.config.text.width,
            masked=MASKED if masked else None,
        ),
        text=reader.config.text, codec=stored, size=(size, size),
        clip_size=None if clip_size in (None, size) else (clip_size, clip_size), frames=frames,
        t_mean=0.8, t_std=1.5, shift=shift, prediction="x0",
    )  # fmt: skip


def stickers_shape(reader: Clip, **how: Any) -> SoraConfig:
    """`shape` with patches twice as wide, and so times nearer to noise, as larger pictures ask (2403.03206, 5.3.2)."""
    return shape(reader, patch=32, head=8, shift=2.0, **how)


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
    torch.manual_seed(rng.integer(config.seed, "weights"))
    model = Sora(config.model, reader.tokenizer)
    model.text.load_state_dict(reader.text.state_dict())
    if model.codec is not None:
        model.codec.load_state_dict(reverie.load(config.codec).state_dict())
    if config.start:
        take_over(model, config.start)
    model = engine.place(model)
    player = Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.95)),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup, floor=0.05),
        ema=Ema(model, decay=config.ema),
        clip=1.0,
    )
    pictures = Source(index.select(split="train", video=False), config, model, frames=1)
    moving = index.select(split="train", video=True)
    clips = (
        Source(moving, config, model, frames=config.model.frames) if config.clips and len(moving) else None
    )
    val = captioned(index.select(split="val", video=False))
    fixed = Source(val, config, model, frames=1).fixed(64) if len(val) else None

    def batches(step: int, micro: int) -> dict[str, Any]:
        return pictures.pictures(step) if clips is None or not micro else clips.clips(step)

    sources = [source for source in (pictures, clips) if source is not None]
    run = Run(out, dataclasses.replace(config, data=tuple(source.digest for source in sources)))
    for step in train([player], batches, run=run, steps=config.steps, accumulate=1 if clips is None else 2,
                      seed=config.seed, save_every=max(config.steps // 24, 1), keep=2, prefetch=2,
                      **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, *(source.pixels for source in sources))
        if step.every(20):
            run.log(step.number, step.metrics)
        if step.every(max(config.steps // 12, 1)):
            with averaged(player) as whole:
                if fixed is not None:
                    losses = [
                        whole.loss(fixed | {"t": torch.full_like(fixed["normal"], t)})["loss"]
                        for t in (0.2, 0.4, 0.6, 0.8)
                    ]
                    run.log(step.number, {"val_loss": float(sum(losses) / len(losses))})
                images = whole.generate_image(list(prompts), seed=0)
                grid(to_bytes(images), list(prompts)).save(run.sample_path(step.number))
            run.curves()
    with averaged(player) as whole:
        keep(whole, out / "model")
    return reverie.load(out / "model")


def take_over(model: Sora, folder: str) -> None:
    """Take over the weights of a saved Sora; what it lacks, or a head of another width, begins anew.

    Of one with patches of half the side, each pixel's weights serve four: so it draws the same, larger.
    """
    own, start = model.state_dict(), reverie.load(folder)
    theirs = start.state_dict()
    if model.config.backbone.head != start.config.backbone.head:
        theirs = {name: value for name, value in theirs.items() if not name.startswith("backbone.head.")}
    if model.config.backbone.patch[1] == 2 * start.config.backbone.patch[1]:
        inward = "backbone.embed.0.weight" if model.config.backbone.bottleneck else "backbone.embed.weight"
        theirs[inward] = _four_of_one(theirs[inward].T, model).T / 4
        for name in ("backbone.out.weight", "backbone.out.bias"):
            theirs[name] = _four_of_one(theirs[name], model)
    if model.config.backbone.masked is None:
        theirs = {name: value for name, value in theirs.items() if not name.startswith(OF_MASKED)}
    strange = [name for name, value in theirs.items() if name not in own or own[name].shape != value.shape]
    if strange:
        raise InputError(
            f"{folder} cannot be begun from: {strange[0]} (of {len(strange)}) does not fit this model."
        )
    model.load_state_dict(own | theirs)


def _four_of_one(weights: Tensor, model: Sora) -> Tensor:
    """`(c f h w) ...`, one row for each value of a patch -> `(c f 2h 2w) ...`."""
    side = model.config.backbone.patch[1] // 2
    rows = rearrange(weights, "(c h w) ... -> c h w ...", h=side, w=side)
    rows = rows.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return rearrange(rows, "c h w ... -> (c h w) ...")


class Source:
    """Batches of one kind of item. Every draw is keyed by (seed, purpose, epoch, item) or by the step."""

    def __init__(self, index: Index, config: SoraRun, model: Sora, *, frames: int):
        self.index, self.config, self.model, self.frames = index, config, model, frames
        self.home = next(model.parameters()).device
        self.size = config.model.size if frames == 1 else config.model.clip_size or config.model.size
        self.pixels: Pixels | Latents
        if config.latents and frames == 1:
            if model.codec is None:
                raise InputError("There are latents only of a codec: give --codec, or leave --latents out.")
            self.pixels = Latents.open(index, key=key_of(model.codec), size=self.size)
        else:
            self.pixels = decoded(index, size=self.size, frames=frames)
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
        return self._batch(keys, latents, "picture") | self._masked(keys, latents, "picture", step)

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
        batch = self._batch(keys, latents, "clip") | self._masked(keys, latents, "clip", step)
        batch["known"] = torch.stack([self._given(key, batch["latents"].shape[2]) for key in keys])
        return batch | {"pace": float(pace)}

    def _given(self, key: tuple[int, int], frames: int) -> Tensor:
        """Which frames of an item are given, `f`: none, or as data/given.py draws them."""
        if self._draw("known", *key) >= self.config.known:
            return torch.zeros(frames, dtype=torch.bool)
        return draw_given((frames, 1, 1), rng.generator(self.config.seed, "given", *key))[:, 0, 0]

    def _masked(
        self, keys: list[tuple[int, int]], latents: Tensor, kind: str, step: int
    ) -> dict[str, Tensor]:
        """Of the step's masked pass, if there is one: the patches that stay, as many in each item, and other noise."""
        config, seed = self.config.model.backbone, self.config.seed
        if config.masked is None:
            return {}
        (least, most), (frames, side) = config.masked, config.patch
        _, _, f, h, w = latents.shape
        u = torch.rand((), generator=rng.generator(seed, "masked", kind, step)).item()
        share = least + (most - least) * u
        noise = [
            torch.randn(latents.shape[1:], generator=rng.generator(seed, "masked noise", kind, *key))
            for key in keys
        ]
        patches = (f // frames) * (h // side) * (w // side)
        return {
            "keep": kept_patches(patches, share, seed=seed, keys=keys),
            "masked_noise": torch.stack(noise),
        }

    def fixed(self, count: int) -> dict[str, Tensor]:
        """At most `count` items, the same noise and words every time, text never dropped; on the model's device."""
        some = self.good[:count]
        batch = self._batch([(0, i) for i in some], self._pictures(some), "fixed")
        batch["drop"] = torch.zeros(len(some), dtype=torch.bool)
        return {name: part.to(self.home) for name, part in batch.items() if isinstance(part, Tensor)}

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
        codec, patch = self.model.config.codec, self.model.config.backbone.patch[1]
        unit = patch * (1 if codec is None else codec.stride[1])
        height, width = (
            max(round(part * side / unit), 1) * unit
            for part, side in zip(FORMATS[int(u[1] * len(FORMATS))], self.size, strict=True)
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
        """Frames of `window` out of `self.frames`, in a picture of `size`; a shorter clip repeats frames."""
        assert isinstance(self.pixels, Pixels)
        frames = self.pixels[i]
        places = torch.linspace(0, len(frames) - 1, self.frames).round().long()[window]
        video = on_white(frames[places])
        return rearrange(video if size is None else framed(video, size), "f c h w -> c f h w")

    def _draw(self, purpose: str, epoch: int, i: int) -> float:
        return torch.rand((), generator=rng.generator(self.config.seed, purpose, epoch, i)).item()

    def _batch(self, keys: list[tuple[int, int]], latents: Tensor, kind: str) -> dict[str, Any]:
        assert self.model.tokenizer is not None
        texts = [
            draw_caption(
                self.index[i],
                rng.generator(self.config.seed, "caption", epoch, i),
                languages=self.config.languages,
            )
            for epoch, i in keys
        ]
        normals = [
            torch.randn(
                1 + latents[0].numel(), generator=rng.generator(self.config.seed, "noise", kind, epoch, i)
            )
            for epoch, i in keys
        ]
        flat = torch.stack(normals)
        return {
            "latents": latents,
            "normal": flat[:, 0],
            "noise": flat[:, 1:].reshape(latents.shape),
            "tokens": self.model.tokenizer.encode(texts, length=self.config.model.text.length),
            "drop": torch.tensor([self._draw("drop", *key) < self.config.drop for key in keys]),
            "known": torch.zeros(len(keys), latents.shape[2], dtype=torch.bool),
            "ids": [self.index[i].file_name for _, i in keys],
        }


def _some_captions(index: Index, count: int = 8) -> tuple[str, ...]:
    texts = [item.captions[0].text for item in index if item.captions]
    return tuple(texts[:: max(len(texts) // count, 1)][:count])
