"""Training transformers that draw pictures as a language: DALL-E (systems/dalle.py) and MaskGIT (systems/maskgit.py).

    tiny      any captioned folder, on a CPU                        reverie train dalle-tiny FOLDER --codec CODEC
    stickers  Fluent's 3-D stickers                                 reverie train dalle-stickers DIR --codec CODEC
    world     the procedural world, scored by its exact judge       reverie train dalle-world FOLDER --codec CODEC
    paper     any captioned folder, at the paper's size             reverie train dalle-paper FOLDER --codec CODEC

The codec is one that recipes/picture_codes.py trained, or a published one; it is frozen and becomes a part of the
model.
Pictures become codes once, before the first step. Every draw is keyed by (seed, purpose, epoch, item).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import reverie
from reverie import disk, rng
from reverie.backbones.code_transformer import CodeTransformerConfig
from reverie.codecs.bpe import Bpe
from reverie.codecs.dvae import Dvae
from reverie.codecs.vq import VqVae
from reverie.data.augment import draws, on_white, warp
from reverie.data.index import Index
from reverie.data.streaming import open_pixels
from reverie.data.wording import PHRASES, draw_caption, mix_of
from reverie.errors import InputError
from reverie.evals.generation import scenes
from reverie.evals.world_captions import read_caption
from reverie.pictures import grid, to_bytes
from reverie.progress import counting
from reverie.recipes.parts import (
    averaged,
    captioned,
    digest,
    heads_of,
    keep,
    my_share,
    name_bad,
    open_index,
    open_world,
    plain_stickers,
    seldom,
    tell_lacking,
)
from reverie.systems.dalle import Dalle, DalleConfig
from reverie.systems.maskgit import MaskGit, MaskGitConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.parallel import peers, team
from reverie.train.schedule import cosine
from reverie.weights.store import hash_of

PROMPTS = (
    "red apple", "rocket", "dog face", "pizza", "sun with face", "red heart", "octopus", "soccer ball",
    "grinning face", "green apple", "blue heart", "cat face", "hot beverage", "rainbow", "orange circle", "tree",
)  # fmt: skip
HELD = 256  # held-out pictures whose loss is measured on the way
JUDGED = 64  # pictures that the judge reads on the way
STRENGTH = 0.4  # of the views (data/augment.py)
TEMPERATURE, GUIDANCE = 0.8, 2.0  # of small models, measured on docs/systems/dalle.md

Model = Dalle | MaskGit
Config = DalleConfig | MaskGitConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DalleRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: Config
    codec: str
    codec_hash: str
    streamed: bool = False
    fit: str = "pad"
    steps: int
    batch: int
    lr: float
    warmup: int = 100
    floor: float = 0.02  # of the learning rate
    weight_decay: float = 0.045
    clip: float = 1.0
    ema: float = 0.999
    drop: float = 0.1  # how often the text is left out
    merges: float = 0.1  # of the tokenizer's, left out at random
    views: int = 1  # of each picture: itself, and others a little turned, scaled and moved
    languages: dict[str, float] | None = None
    phrases: bool = True
    mix: str = ""
    judged: bool = False  # by the exact judge of the world
    seed: int = 0
    data: str = ""  # digest of the pictures that it learns from


def tiny(
    data: Path, out: Path, *, codec: str, objective: str = "dalle", steps: int = 2000, batch: int = 32,
    lr: float = 1e-3, width: int = 256, depth: int = 6, attention: str = "sparse", length: int = 40, size: int = 64,
    mix: str = "", seed: int = 0, engine: Engine = ENGINE,
) -> Model:  # fmt: skip
    """A small model from random weights on any captioned folder.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        codec: The folder of a codec that makes codes, such as dvae-tiny and vqgan-tiny train.
        objective: dalle (code by code) or maskgit (many at once).
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        lr: The highest learning rate.
        width: Channels, a multiple of 64.
        depth: Blocks.
        attention: sparse (rows, columns and a convolution, as in the paper) or full.
        length: Tokens of a text; longer ones are cut.
        size: Pixels a side, a multiple of the codec's stride.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = open_index(data)
    return _small(
        index, out, codec=codec, objective=objective, sizes=(depth, width), attention=attention, length=length,
        size=size, words=4096, prompts=_some_captions(index), engine=engine, steps=steps, batch=batch, lr=lr, mix=mix,
        seed=seed,
    )  # fmt: skip


def stickers(
    data: Path, out: Path, *, codec: str, objective: str = "dalle", steps: int = 4000, batch: int = 32,
    lr: float = 1e-3, width: int = 192, depth: int = 6, attention: str = "sparse", length: int = 32, size: int = 64,
    views: int = 8, sources: str = "fluent-3d", mix: str = "", seed: int = 0, engine: Engine = ENGINE,
) -> Model:  # fmt: skip
    """Fluent's 3-D stickers, without skin-tone variants, in English.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        codec: The folder of a codec that makes codes, such as vqgan-tiny trains.
        objective: dalle (code by code) or maskgit (many at once).
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        lr: The highest learning rate.
        width: Channels, a multiple of 64.
        depth: Blocks.
        attention: sparse (rows, columns and a convolution, as in the paper) or full.
        length: Tokens of a text; longer ones are cut.
        size: Pixels a side, a multiple of the codec's stride.
        views: Of each picture so many are learnt from: itself, and others a little turned, scaled and moved.
        sources: The sources of the index that it learns from, with commas between them.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = plain_stickers(open_index(data)).select(sources=sources.split(","))
    return _small(
        index, out, codec=codec, objective=objective, sizes=(depth, width), attention=attention, length=length,
        size=size, words=1024, prompts=PROMPTS, engine=engine, steps=steps, batch=batch, lr=lr, mix=mix, seed=seed,
        languages={"en": 1.0}, drop=0.2, views=views,
    )  # fmt: skip


def world(
    data: Path, out: Path, *, codec: str, objective: str = "dalle", count: int = 8000, steps: int = 4000,
    batch: int = 32, lr: float = 1e-3, width: int = 256, depth: int = 6, attention: str = "sparse", length: int = 40,
    size: int = 64, seed: int = 0, engine: Engine = ENGINE,
) -> Model:  # fmt: skip
    """The procedural world, drawn first if it is not there, in English.

    On the way the exact judge reads pictures of held-out captions back: how many show what was said.

    Args:
        data: A folder of the world, or a new one for it.
        out: The run's folder; the model is written to its `model`.
        codec: The folder of a codec that makes codes, such as dvae-tiny trains.
        objective: dalle (code by code) or maskgit (many at once).
        count: Pictures of the world, if it is to be drawn.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        lr: The highest learning rate.
        width: Channels, a multiple of 64.
        depth: Blocks.
        attention: sparse (rows, columns and a convolution, as in the paper) or full.
        length: Tokens of a text; longer ones are cut.
        size: Pixels a side, a multiple of the codec's stride.
        seed: Another seed, another world, another start and another order.
    """
    index = open_world(data, count, 0, seed=seed)
    held = index.select(split="val", video=False) or index.select(video=False)
    prompts = [next((c.text for c in item.captions if c.language == "en"), "") for item in held][:JUDGED]
    return _small(
        index, out, codec=codec, objective=objective, sizes=(depth, width), attention=attention, length=length,
        size=size, words=1024, prompts=[prompt for prompt in prompts if prompt], engine=engine, steps=steps,
        batch=batch, lr=lr, seed=seed, languages={"en": 1.0}, phrases=False, judged=True,
    )  # fmt: skip


def paper(
    data: Path, out: Path, *, codec: str, steps: int = 430_000, batch: int = 1024, lr: float = 4.5e-4,
    width: int = 3968, depth: int = 64, size: int = 256, mix: str = "", seed: int = 0, engine: Engine = ENGINE,
) -> Model:  # fmt: skip
    """Any captioned folder at the size of the paper: 12 billion parameters (2102.12092, appendix B). Not yet run by us.

    The rate falls along a cosine, where the authors halved it by hand whenever the loss stood still.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        codec: The folder of a codec that makes codes of 8 x 8 pixels, such as OpenAI's.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        lr: The highest learning rate.
        width: Channels, a multiple of 64.
        depth: Blocks.
        size: Pixels a side, a multiple of the codec's stride.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = open_index(data)
    return _small(
        index, out, codec=codec, objective="dalle", sizes=(depth, width), attention="sparse", length=256, size=size,
        words=16_384, prompts=_some_captions(index), engine=engine, steps=steps, batch=batch, lr=lr, mix=mix,
        seed=seed, streamed=True, fit="crop", warmup=5000, clip=4.0,
    )  # fmt: skip


def shape(
    objective: str,
    codec: Dvae | VqVae,
    *,
    sizes: tuple[int, int],
    attention: str,
    length: int,
    size: int,
    words: int,
) -> Config:
    """The model for the codes of a codec. InputError: there is no such model."""
    if objective not in ("dalle", "maskgit"):
        raise InputError(f"there is no objective {objective!r:.40}: choose dalle or maskgit.")
    if attention not in ("sparse", "full"):
        raise InputError(f"attention is {attention!r:.40}: choose sparse or full.")
    if size < codec.stride or size % codec.stride:
        raise InputError(f"size {size} cannot be encoded: give a multiple of {codec.stride}.")
    depth, width = sizes
    side = size // codec.stride
    backbone = CodeTransformerConfig(
        words=words, length=length, vocab=codec.vocab, rows=side, columns=side, width=width, depth=depth,
        heads=heads_of(width), attention=attention,  # type: ignore[arg-type]  # checked above
    )  # fmt: skip
    if objective == "dalle":
        return DalleConfig(backbone=backbone, codec=codec.config, temperature=TEMPERATURE, guidance=GUIDANCE)
    return MaskGitConfig(backbone=backbone, codec=codec.config, guidance=GUIDANCE)


def _small(
    index: Index, out: Path, *, codec: str, objective: str, sizes: tuple[int, int], attention: str, length: int,
    size: int, words: int, prompts: Sequence[str], engine: Engine, **settings: Any,
) -> Model:  # fmt: skip
    part = _codec(codec)
    index = captioned(index.select(video=False))
    if not len(index):
        raise InputError(f"no picture in {index.folder} has a caption: run `reverie data check` to see why.")
    tokenizer = Bpe.train(_texts(index.select(split="train"), settings.get("languages")), vocab=words)
    model = shape(
        objective, part, sizes=sizes, attention=attention, length=length, size=size, words=tokenizer.vocab
    )
    config = DalleRun(model=model, codec=codec, codec_hash=hash_of(part), **settings)
    return fit(config, part, tokenizer, index, out, prompts=prompts, engine=engine)


def fit(
    config: DalleRun,
    codec: Dvae | VqVae,
    tokenizer: Bpe,
    index: Index,
    out: Path,
    *,
    prompts: Sequence[str],
    engine: Engine = ENGINE,
) -> Model:
    """Train, measure and draw on the way, save the averaged weights to `out/model`."""
    for name in ("batch", "views"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}: give 1 or more.")
    torch.manual_seed(rng.integer(config.seed, "weights"))
    by_code = isinstance(config.model, DalleConfig)
    network: Any = Dalle if by_code else MaskGit
    model = network(config.model, tokenizer)
    model.codec.load_state_dict(codec.state_dict())
    model = engine.place(model)
    player = Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.96)),
        schedule=partial(
            cosine, steps=config.steps, warmup=min(config.warmup, config.steps // 10), floor=config.floor
        ),
        ema=Ema(model, decay=config.ema),
        clip=config.clip,
    )
    source = Source(index.select(split="train"), config, model, out)
    val = index.select(split="val")
    held = Source(Index(val.folder, list(val)[:HELD]), config, model, out).fixed() if len(val) else None

    def loss(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        given = dict(batch)
        if "image" in given:
            given["codes"] = model.encode(given["image"])
        return model.loss(given, peers=peers())

    player.loss = loss
    run = Run(out, dataclasses.replace(config, data=digest(source.index, source.good)))
    for step in train([player], source.batch, run=run, steps=config.steps, seed=config.seed,
                      save_every=max(config.steps // 24, 1), keep=2, prefetch=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, source.pixels)
        if step.every(20):
            run.log(step.number, step.metrics)
        if step.every(seldom(config.steps, 12)):
            with averaged(player) as whole:
                if held is not None:
                    run.log(
                        step.number, {f"val_{name}": float(value) for name, value in whole.loss(held).items()}
                    )
                images = whole.generate_image(list(prompts), seed=0).cpu()
                grid(to_bytes(images[:16]), list(prompts[:16])).save(run.sample_path(step.number))
                if config.judged:
                    found = scenes(images, [read_caption(prompt) for prompt in prompts])
                    run.log(step.number, {f"judged_{name}": one["right"] for name, one in found.items()})
                    said = ", ".join(f"{name} {one['right']:.0%}" for name, one in found.items())
                    run.say(f"step {step.number}: the judge reads as asked: {said}")
            run.curves()
    with averaged(player) as whole:
        keep(whole, out / "model")
    return reverie.load(out / "model")


class Source:
    """Batches of codes and words. Every draw is keyed by (seed, purpose, epoch, item)."""

    def __init__(self, index: Index, config: DalleRun, model: Any, out: Path):
        self.index, self.config, self.model = index, config, model
        self.mix = mix_of(config.mix)
        with team().in_turn():
            self.pixels = open_pixels(index, size=model.size, fit=config.fit, stream=config.streamed)
        bad = {entry.path for entry in self.pixels.bad}
        self.good = [i for i in range(len(index)) if index[i].file_name not in bad]
        if not self.good:
            raise InputError(f"nothing usable in {index.folder}: run `reverie data check` to see why.")
        tell_lacking((index[i] for i in self.good), self.mix)
        self.views = config.views
        self.codes = None if config.streamed else self._encoded(out)
        self.slot = {i: slot for slot, i in enumerate(self.good)}

    def _encoded(self, out: Path) -> Tensor:
        """The codes of all pictures, `views n h w`, computed once for a run and kept in its folder."""
        from safetensors.torch import load_file, save_file

        about = f"{digest(self.index, self.good)}-{self.config.codec_hash}-{self.views}-{self.config.seed}"
        path = out / f"codes-{about}.safetensors"
        with team().in_turn():
            if not path.exists():
                parts, place, count = [], self.model.device, len(self.good)
                with counting("encoding") as progress, torch.no_grad():
                    for view in range(self.views):
                        for at in range(0, count, 64):
                            pictures = self._pictures(self.good[at : at + 64], view=view)
                            parts.append(self.model.encode(pictures.to(place)).int().cpu())
                            progress(view * count + min(at + 64, count), self.views * count)
                codes = rearrange(torch.cat(parts), "(v n) h w -> v n h w", v=self.views)
                out.mkdir(parents=True, exist_ok=True)
                with disk.whole(path) as draft:
                    save_file({"codes": codes.contiguous()}, draft)
            return load_file(path)["codes"]

    def _pictures(self, some: Sequence[int], *, view: int = 0) -> Tensor:
        rgba = torch.stack([self.pixels[i][0] for i in some])
        if view == 0:
            return on_white(rgba)
        turned = warp(rgba.float() / 255, draws(self.config.seed, [(view, i) for i in some]), STRENGTH)
        colour, alpha = turned[:, :3], turned[:, 3:].clamp(0, 1)
        return ((colour * alpha + 1 - alpha) * 2 - 1).clamp(-1, 1)

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        config = self.config
        keys = [
            (epoch, self.good[place])
            for epoch, place in my_share(step, config.batch, len(self.good), config.seed)
        ]
        keys, bad = self.pixels.ready(keys, self.good)
        return self.of(keys) | {"ids": [self.index[i].file_name for _, i in keys], "bad": bad}

    def of(self, keys: Sequence[tuple[int, int]], *, kind: str = "train") -> dict[str, Any]:
        """The items `keys`, (epoch, item) each: codes or pictures, words, and what is hidden of the codes."""
        config, seed, fixed = self.config, self.config.seed, kind != "train"

        def keyed(purpose: str) -> list[torch.Generator]:
            return [rng.generator(seed, purpose, kind, *key) for key in keys]

        texts = [
            draw_caption(
                self.index[i], one, languages=config.languages, phrases=PHRASES if config.phrases else {},
                mix=self.mix,
            )
            for (_, i), one in zip(keys, keyed("caption"), strict=True)
        ]  # fmt: skip
        tokens = self.model.tokenizer.encode(
            texts, length=config.model.backbone.length, dropout=0.0 if fixed else config.merges,
            generators=keyed("merges"),
        )  # fmt: skip
        u = torch.stack([torch.rand(3, generator=one) for one in keyed("draws")])
        dropped = (u[:, 0] < (0.0 if fixed else config.drop)) | torch.tensor([not text for text in texts])
        batch: dict[str, Any] = {"tokens": self.model.filled(tokens, dropped)}
        if self.codes is None:
            batch["image"] = self._pictures([i for _, i in keys])
        else:
            views = [0 if fixed else int(u[place, 1] * self.views) for place in range(len(keys))]
            batch["codes"] = self.codes[views, [self.slot[i] for _, i in keys]].long()
        if isinstance(config.model, MaskGitConfig):
            places = config.model.backbone.places
            batch |= {
                "order": torch.stack([torch.rand(places, generator=one) for one in keyed("order")]),
                "uniform": u[:, 2],
            }
        return batch

    def fixed(self) -> dict[str, Any]:
        """All items with the same draws every time, on the model's device."""
        batch = self.of([(0, i) for i in self.good], kind="fixed")
        if "image" in batch:
            batch["codes"] = self.model.encode(batch.pop("image").to(self.model.device))
        return {name: part.to(self.model.device) for name, part in batch.items()}


def _codec(folder: str) -> Dvae | VqVae:
    codec = reverie.load(folder)
    if not isinstance(codec, Dvae | VqVae):
        raise InputError(
            f"{folder} is a {type(codec).__name__}, which makes no codes: give a codec such as `reverie train"
            " dvae-tiny` makes."
        )
    return codec


def _texts(index: Index, languages: Mapping[str, float] | None) -> list[str]:
    """What the tokenizer learns from."""
    return [c.text for item in index for c in item.captions if not languages or c.language in languages]


def _some_captions(index: Index) -> list[str]:
    """A caption of each of 16 pictures, spread over all."""
    items = [item for item in index if item.captions and item.frames == 1]
    return [item.captions[0].text for item in items[:: max(len(items) // 16, 1)][:16]]
