"""Training CLIP on pictures of any aspect and size, packed without padding: NaViT (2307.06304) as its image tower.

    reverie train clip-native FOLDER

A step has packs: pictures whose patches fill a budget of tokens, each picture at its own aspect, and this time perhaps
smaller or with fewer patches (section 2.2). The loss compares all pictures of the step. docs/systems/navit.md has the
measured result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

import reverie
from reverie import rng
from reverie.data.augment import draws, view
from reverie.data.dropping import drawn_share, kept_count, kept_tokens
from reverie.data.index import Index
from reverie.data.packing import Plan, bucketed, drawn_area, packed
from reverie.data.pixels import Native, Pixels
from reverie.data.wording import draw_caption, mix_of
from reverie.encoders.navit import NavitConfig
from reverie.errors import InputError
from reverie.media import whole_patches
from reverie.recipes import clip
from reverie.recipes.parts import (
    averaged,
    decoded,
    digest,
    heads_of,
    keep,
    name_bad,
    open_index,
    seldom,
    tell_lacking,
)
from reverie.systems.clip import Clip, ClipConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.gradient_cache import cached
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.parallel import team
from reverie.train.schedule import cosine

POSITIONS: dict[str, Literal["absolute", "fractional"]] = {"absolute": "absolute", "fractional": "fractional"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: ClipConfig
    start: str = ""  # the CLIP that was gone on from
    steps: int
    budget: int  # tokens of a pack
    packs: int = 1  # of a step
    chunk: int = 0  # packs embedded at a time; 0: all of a step
    buckets: bool = False  # packs of one shape each
    smallest: int = 0  # of the sides of the squares whose areas are drawn; 0: always the largest
    drop: float = 0.0  # shares of the patches that are dropped are drawn up to this
    lr: float = 1e-3
    weight_decay: float = 0.1
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: int = 100
    ema: float = 0.999
    strength: float = 0.0  # of the views
    mix: str = ""  # how often captions of each kind are told (data/wording.py)
    seed: int = 0
    data: str = ""  # a digest of what it learns from


def shape(
    vocab: int, end: int, *, size: int = 160, patch: int = 16, width: int = 192, depth: int = 5,
    positions: str = "absolute", loss: str = "softmax",
) -> ClipConfig:  # fmt: skip
    """A small CLIP for a CPU, whose pictures have at most the area of a square of `size`."""
    if positions not in POSITIONS:
        raise InputError(f"positions is {positions!r}: give {' or '.join(POSITIONS)}.")
    if size < patch:
        raise InputError(f"size is {size}, less than a patch of {patch}: give more.")
    square = clip.shape(vocab, end, width=width, depth=depth, loss=loss)
    image = NavitConfig(
        patch=patch, area=size**2, width=width, depth=depth, heads=heads_of(width),
        positions=POSITIONS[positions],
    )  # fmt: skip
    return dataclasses.replace(square, image=image)


def native(
    data: Path,
    out: Path,
    *,
    steps: int = 300,
    budget: int = 4096,
    packs: int = 1,
    chunk: int = 0,
    buckets: bool = False,
    size: int = 160,
    patch: int = 16,
    smallest: int = 0,
    drop: float = 0.0,
    positions: str = "absolute",
    width: int = 192,
    depth: int = 5,
    lr: float = 1e-3,
    strength: float = 0.0,
    loss: str = "softmax",
    start: str = "",
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Clip:
    """A CLIP on any captioned folder that sees every picture at its own aspect and size, packed without padding.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        steps: How many steps to learn for.
        budget: Tokens of a pack, a token being a patch; as many pictures as fit are in it.
        packs: Packs of a step, all of whose pictures are compared with each other.
        chunk: Packs embedded at a time, each twice, so that a step beyond the memory fits. 0: all.
        buckets: Packs of pictures of one shape each, in place of mixed ones.
        size: Pictures have at most as many pixels as a square of this side, at their own aspect.
        patch: Pixels a side of a patch; sides are rounded to whole patches.
        smallest: Draw each picture's area anew every epoch, from a square's of this side up. 0: always the largest.
        drop: Leave out patches at random, of each picture another share, up to this.
        positions: absolute counts patches from the corner, fractional goes by the share of the picture's sides.
        width: Channels of both towers, a multiple of 64.
        depth: Blocks of the image tower; the text tower has half as many.
        lr: The highest learning rate.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all.
        loss: softmax compares each picture with all of the step (CLIP), sigmoid each pair by itself (SigLIP).
        start: The CLIP of this kind to go on from (its name or folder), with its own shape and words.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    _alone()
    index = open_index(data)
    train_set = index.select(split="train")
    shaped = partial(shape, size=size, patch=patch, width=width, depth=depth, positions=positions, loss=loss)
    model = clip.begin(start, train_set, shaped, seed=seed)
    if not isinstance(model.config.image, NavitConfig):
        raise InputError(
            f"the image tower of {start} reads squares: start from one that clip-native trained."
        )
    config = NativeRun(
        model=model.config, start=start, steps=steps, budget=budget, packs=packs, chunk=chunk, buckets=buckets,
        smallest=smallest, drop=drop, lr=lr, warmup=min(100, steps // 5), strength=strength, mix=mix, seed=seed,
    )  # fmt: skip
    return fit(config, model, train_set, out, measures=clip.val_of(index), engine=engine)


def _alone() -> None:
    """InputError: several processes, before any work is done."""
    if (count := team().count) > 1:
        raise InputError(
            f"clip-native cannot yet compare packs across the {count} processes that were started, of"
            " unequal numbers of pictures: start one."
        )


class Source:
    """The packs of a run: a function of the step."""

    def __init__(self, index: Index, config: NativeRun, tokenizer: Any):
        image = config.model.image
        assert isinstance(image, NavitConfig)
        self.index, self.config, self.image, self.tokenizer = index, config, image, tokenizer
        self.pixels: Pixels = decoded(index, size=Native(patch=image.patch, area=image.area), fit="squash")
        self.good = [i for i in self.pixels.good if index[i].captions]
        self.mix = mix_of(config.mix, dropped=False)
        tell_lacking((index[i] for i in self.good), self.mix)
        if not self.good:
            raise InputError(
                f"no picture in {index.folder} has a caption: run `reverie data check` to see why."
            )
        if len(self.good) < 2:
            raise InputError(
                f"{index.folder} has one picture with a caption: a CLIP learns from comparing, so give two or more."
            )
        names = sorted({index[i].label or index[i].hash for i in self.good})
        self._label = {name: number for number, name in enumerate(names)}
        drawn_share((0.0, config.drop), seed=0, epoch=0, sample=0)  # refuses a drop that is none
        if config.smallest and not image.patch <= config.smallest <= image.size:
            raise InputError(
                f"smallest is {config.smallest}: give a side from the patch, {image.patch}, to the largest,"
                f" {image.size}."
            )
        sizes = [(self.pixels.sizes[i], index[i].file_name) for i in self.good]
        most, name = max((h * w // image.patch**2, name) for (h, w), name in sizes)
        if most > config.budget:  # no epoch may come to what cannot be packed
            raise InputError(
                f"budget is {config.budget:,} tokens a pack, but {name} may take {most:,}: give"
                f" {most:,} or more, or smaller pictures."
            )
        self._sizes = lru_cache(maxsize=4)(self._drawn_sizes)
        self.plan = Plan(self._packs, together=config.packs)

    def _drawn_sizes(self, epoch: int) -> list[tuple[int, int]]:
        """(height, width) of every good picture in an epoch."""
        whole = [self.pixels.sizes[i] for i in self.good]
        smallest = self.config.smallest
        if not smallest:
            return whole
        return [
            whole_patches(
                *size,
                patch=self.image.patch,
                area=drawn_area((smallest, self.image.size), seed=self.config.seed, epoch=epoch, sample=i),
            )
            for size, i in zip(whole, self.good, strict=True)
        ]

    def tokens(self, epoch: int) -> list[int]:
        """How many patches of every good picture are computed in an epoch."""
        p = self.image.patch
        grids = [h * w // p**2 for h, w in self._sizes(epoch)]
        if not self.config.drop:
            return grids
        return [kept_count(n, self._share(epoch, i)) for n, i in zip(grids, self.good, strict=True)]

    def _share(self, epoch: int, i: int) -> float:
        return drawn_share((0.0, self.config.drop), seed=self.config.seed, epoch=epoch, sample=i)

    def _packs(self, epoch: int) -> list[list[int]]:
        how = {"budget": self.config.budget, "seed": self.config.seed, "epoch": epoch}
        lengths = self.tokens(epoch)
        if not self.config.buckets:
            return packed(lengths, **how)
        shapes = [(*size, n) for size, n in zip(self._sizes(epoch), lengths, strict=True)]
        return bucketed(shapes, lengths, **how)

    def __call__(self, step: int) -> dict[str, Any]:
        """The packs of a step that this process has, and the names of the files."""
        packs = self.plan.step(step, rank=team().rank, world=team().count)
        items = [[(epoch, place, self.good[place]) for epoch, place in pack] for pack in packs]
        return {
            "packs": [self._pack(pack) for pack in items],
            "ids": [self.index[i].file_name for pack in items for _, _, i in pack],
        }

    def _pack(self, pack: list[tuple[int, int, int]]) -> dict[str, Any]:
        keys = [(epoch, i) for epoch, _, i in pack]
        seed = self.config.seed
        rgba = [self._resized(self.pixels[i][0], self._sizes(epoch)[place]) for epoch, place, i in pack]
        texts = [
            draw_caption(self.index[i], rng.generator(seed, "caption", e, i), mix=self.mix) for e, i in keys
        ]
        found: dict[str, Any] = {
            "rgba": rgba,
            "draws": draws(seed, keys),
            "tokens": self.tokenizer.encode(texts, length=self.config.model.text.length),
            "label": torch.tensor([self._label[self.index[i].label or self.index[i].hash] for _, i in keys]),
        }
        if self.config.drop:
            counts = [x[0].numel() // self.image.patch**2 for x in rgba]
            found["keep"] = [
                kept_tokens(n, kept_count(n, self._share(e, i)), seed=seed, epoch=e, sample=i)
                for n, (e, i) in zip(counts, keys, strict=True)
            ]
        return found

    @staticmethod
    def _resized(rgba: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 `4 h w` at a smaller size; colours count by their alpha, as the decoder resizes."""
        if rgba.shape[-2:] == size:
            return rgba
        x = rgba.float() / 255
        x = torch.cat([x[:3] * x[3:], x[3:]])
        x = F.interpolate(x[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        x = torch.cat([(x[:3] / x[3:].clamp(min=1e-6)).clamp(max=1), x[3:]])
        return (x * 255).round().to(torch.uint8)


def fit(
    config: NativeRun,
    model: Clip,
    index: Index,
    out: Path,
    *,
    measures: Mapping[str, clip.Measure],
    engine: Engine = ENGINE,
) -> Clip:
    """Train the model, measure eight times on the way, write the averaged weights to `out/model`."""
    _alone()
    source = Source(index, config, model.tokenizer)
    config = dataclasses.replace(config, data=digest(index, source.good))
    model = engine.place(model)
    player = Player(
        model,
        optimizer=adamw(
            model, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, config.beta2), eps=config.eps
        ),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup, floor=0.01),
        ema=Ema(model, decay=config.ema) if config.ema else None,
        clip=1.0,
    )  # fmt: skip

    def embed(part: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """All pictures of these packs, as one."""
        packs = part["packs"]
        joined = {key: [one for pack in packs for one in pack[key]] for key in packs[0]}
        views = [
            view(rgba[None], rearrange(u, "n -> 1 n"), strength=config.strength)[0]
            for rgba, u in zip(joined["rgba"], joined["draws"], strict=True)
        ]
        return model.embed(
            {"image": views, "tokens": torch.stack(joined["tokens"]), "keep": joined.get("keep")}
        )

    def loss(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        label = torch.cat([pack["label"] for pack in batch["packs"]])
        return model.compare(*cached(embed, {"packs": batch["packs"]}, chunk=config.chunk), label=label)

    player.loss = loss
    run = Run(out, config)
    fill = source.plan.fill(0, source.tokens(0), budget=config.budget)
    run.say(
        f"{fill.samples:,} pictures of {fill.tokens / fill.samples:.0f} tokens on average in {fill.packs:,} packs an"
        f" epoch; {fill.waste:.1%} of their room is left over"
    )
    measure_every = seldom(config.steps, 8)
    for step in train([player], lambda step, _: source(step), run=run, steps=config.steps, seed=config.seed,
                      save_every=max(config.steps // 12, 1), keep=2, prefetch=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, source.pixels)
        if step.every(10):
            run.log(step.number, step.metrics)
        if step.every(measure_every):
            with averaged(player) as whole:
                for name, measure in measures.items():
                    scores = {f"{name}_{key}": value for key, value in measure(whole).items()}
                    run.log(step.number, scores)
                    run.say(f"step {step.number}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    with averaged(player) as whole:
        keep(whole, out / "model")
    return reverie.load(out / "model")
