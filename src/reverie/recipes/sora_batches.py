"""What Sora learns from, step by step: batches of pictures or clips of one shape, or packs of both at their own.

Every draw is keyed by (seed, purpose, epoch, item) or by the step, so that batches are functions of the step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from reverie import rng
from reverie.data.augment import framed, on_white
from reverie.data.dropping import masked_pass, masked_share
from reverie.data.given import draw_given
from reverie.data.index import Index
from reverie.data.latents import Latents
from reverie.data.packing import Plan, bucketed, packed
from reverie.data.pixels import Native, Pixels
from reverie.data.wording import draw_caption, mix_of
from reverie.errors import InputError
from reverie.recipes.parts import decoded, digest, my_share, tell_lacking
from reverie.recipes.search import key_of
from reverie.systems.sora import Sora, SoraConfig
from reverie.train.batches import moved
from reverie.train.parallel import team

FORMATS = (
    (1, 1.5),
    (1.5, 1),
    (0.75, 0.75),
    (0.75, 1.25),
    (1.25, 0.75),
)  # height and width, in the usual side


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
    mix: str = ""  # how often captions of each kind are told (data/wording.py)
    seed: int = 0
    data: tuple[str, ...] = ()  # digests of the pictures and the clips that it learns from


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


class Source:
    """Batches of one kind of item. Every draw is keyed by (seed, purpose, epoch, item) or by the step."""

    def __init__(self, index: Index, config: SoraRun, model: Sora, *, frames: int):
        self.index, self.config, self.model, self.frames = index, config, model, frames
        self.mix = mix_of(config.mix)
        tell_lacking(index, self.mix)
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
            "text": draw_caption(self.index[i], words, languages=self.config.languages, mix=self.mix),
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
