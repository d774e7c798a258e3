"""Training class-conditional transformers: DiT (systems/dit.py), SiT (systems/sit.py) and MDT (systems/mdt.py).

    world      single things of the procedural world, a class each colour and shape   reverie train dit-world FOLDER
    imagenet   a folder of class folders at the papers' sizes        reverie train dit-imagenet FOLDER --codec VAE

Labels are those of the index (`reverie data import` takes them from class folders, tables or sidecars). Every draw is
keyed by (seed, purpose, epoch, item).
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
from reverie.backbones.dit import SCALES, DitConfig
from reverie.backbones.mdt import MDT_MODELS, MdtConfig
from reverie.codecs.vae import Vae
from reverie.data.augment import on_white
from reverie.data.dropping import masked_pass, masked_share
from reverie.data.index import FILE, Index
from reverie.data.streaming import open_pixels
from reverie.data.world import write as write_world
from reverie.errors import InputError
from reverie.evals.generation import scenes
from reverie.pictures import grid, to_bytes
from reverie.recipes.parts import averaged, digest, heads_of, keep, my_share, name_bad, open_index, seldom
from reverie.scene import Description, Mention
from reverie.systems.dit import DiffusionTransformer, DiffusionTransformerConfig
from reverie.systems.mdt import MaskedDiffusionTransformer, MaskedDiffusionTransformerConfig
from reverie.systems.sit import Sit, SitConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.parallel import team
from reverie.train.schedule import constant

SHOWN = 16  # classes whose samples are kept while a run goes on
JUDGED = 110  # pictures that the judge reads, one of a class and then again
QUICK = 20  # steps of a sample while a run goes on

Model = DiffusionTransformer | MaskedDiffusionTransformer | Sit
Config = DiffusionTransformerConfig | MaskedDiffusionTransformerConfig | SitConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: Config
    codec: str = ""
    size: int  # pixels a side
    fit: str = "pad"
    flip: float = 0.0  # how often a picture is mirrored
    streamed: bool = False
    steps: int
    batch: int
    lr: float = 1e-4
    warmup: int = 0
    ema: float = 0.9999
    drop: float = 0.1  # how often the class is left out
    clip: float | None = None  # of the gradient's norm
    judged: bool = False  # by the exact judge of the world
    seed: int = 0
    data: str = ""  # digest of the pictures that it learns from


def world(
    data: Path, out: Path, *, objective: str = "dit", codec: str = "", count: int = 8000, steps: int = 3000,
    batch: int = 32, lr: float = 5e-4, width: int = 256, depth: int = 6, patch: int = 8, size: int = 64, seed: int = 0,
    engine: Engine = ENGINE,
) -> Model:  # fmt: skip
    """Single things of the procedural world, drawn first if they are not there; the class is colour and shape.

    On the way the exact judge reads drawn pictures back: how many have the colour and the shape of their class.

    Args:
        data: A folder of the world's single things, or a new one for it.
        out: The run's folder; the model is written to its `model`.
        objective: dit (DDPM, noise and variance), sit (a straight flow, velocity) or mdt (dit and masked pictures).
        codec: The folder of a picture autoencoder to work in the latents of, in patches of 2; pixels if not given.
        count: Pictures, if they are to be drawn.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        lr: The learning rate, after 100 steps of warm-up.
        width: Channels, a multiple of 64.
        depth: Blocks.
        patch: Pixels a side of a patch, where there is no codec.
        size: Pixels a side that it learns to draw.
        seed: Another seed, another world, another start and another order.
    """
    with team().in_turn():
        there = (Path(data) / FILE).exists()
        index = (
            Index.read(data)
            if there
            else write_world(data, count, kind="single", size=(size, size), seed=seed)
        )
    model = shape(
        objective,
        index,
        codec=codec,
        size=size,
        patch=2 if codec else patch,
        sizes=(depth, width, heads_of(width)),
    )
    config = DitRun(
        model=model, codec=codec, size=size, steps=steps, batch=batch, lr=lr, warmup=100, ema=0.999, clip=1.0,
        judged=True, seed=seed,
    )  # fmt: skip
    return fit(config, index, out, engine=engine)


def imagenet(
    data: Path, out: Path, *, codec: str, objective: str = "dit", scale: str = "XL", patch: int = 2, size: int = 256,
    steps: int = 400_000, batch: int = 256, lr: float = 1e-4, seed: int = 0,
    engine: Engine = ENGINE,
) -> Model:  # fmt: skip
    """A folder of class folders as in the papers (2212.09748, section 4; 2401.08740, section 3). Not yet run by us.

    AdamW at a constant rate without weight decay, mirrored pictures, averaged weights, one class in ten left out;
    latents are drawn from the autoencoder's posterior.

    Args:
        data: A folder that was imported, or one to import, whose pictures lie in a folder for each class.
        out: The run's folder; the model is written to its `model`.
        codec: The folder of a picture autoencoder, such as Stable Diffusion's in diffusers' format.
        objective: dit (DDPM, noise and variance), sit (a straight flow, velocity) or mdt (dit and masked pictures).
        scale: S, B, L or XL: 12, 12, 24 or 28 blocks of width 384, 768, 1024 or 1152.
        patch: Of latents: 2, 4 or 8.
        size: Pixels a side.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        lr: The learning rate.
        seed: Another seed, another start and another order.
    """
    if scale not in SCALES:
        raise InputError(f"DiT has no size {scale!r}: choose one of {', '.join(SCALES)}.")
    depth, width, heads = SCALES[scale]
    index = open_index(data)
    decoder = MDT_MODELS[f"MDTv2-{scale}/2"].decoder
    model = shape(
        objective, index, codec=codec, size=size, patch=patch, sizes=(depth, width, heads), decoder=decoder
    )
    config = DitRun(
        model=model, codec=codec, size=size, fit="crop", flip=0.5, streamed=True, steps=steps, batch=batch, lr=lr,
        seed=seed,
    )  # fmt: skip
    return fit(config, index, out, engine=engine)


def shape(
    objective: str,
    index: Index,
    *,
    codec: str,
    size: int,
    patch: int,
    sizes: tuple[int, int, int],
    decoder: int = 0,
) -> Config:
    """The model for the labels of an index, in pixels or in the latents of `codec`.

    `sizes` are depth, width and heads; `decoder` says how many of MDT's blocks are its decoder's (0: 2, or 3 if
    the depth is odd).
    """
    if objective not in ("dit", "sit", "mdt"):
        raise InputError(f"there is no objective {objective!r}: choose dit, sit or mdt.")
    labels = sorted({item.label for item in index.select(video=False) if item.label})
    if not labels:
        raise InputError(
            f"no picture of {index.folder} has a label: put them into a folder for each class, and import them again."
        )
    stored = _codec(codec).config if codec else None
    stride = 1 if stored is None else 2 ** (len(stored.widths) - 1)
    if size < patch * stride or size % (patch * stride):
        raise InputError(f"size {size} cannot be trained: give a multiple of {patch * stride}.")
    depth, width, heads = sizes
    channels, side = 3 if stored is None else stored.channels, size // stride
    names = tuple(label.replace(",", " ") for label in labels)
    if objective == "mdt":
        return MaskedDiffusionTransformerConfig(
            backbone=MdtConfig(
                channels=channels, size=side, patch=patch, width=width, depth=depth, heads=heads, classes=len(labels),
                decoder=decoder or 2 + depth % 2,
            ),
            codec=stored, names=names, sampler="ddim", spacing="trailing", steps=50,
        )  # fmt: skip
    dit = objective == "dit"
    backbone = DitConfig(
        channels=channels, size=side, patch=patch, width=width, depth=depth, heads=heads, classes=len(labels),
        learned_sigma=dit, waves="diffusers" if dit else "original",
    )  # fmt: skip
    if dit:
        return DiffusionTransformerConfig(
            backbone=backbone, codec=stored, names=names, sampler="ddim", spacing="trailing", steps=50
        )
    return SitConfig(backbone=backbone, codec=stored, names=names, sampler="heun", steps=25)


def fit(config: DitRun, index: Index, out: Path, *, engine: Engine = ENGINE) -> Model:
    """Train, measure and draw on the way, save the averaged weights to `out/model`."""
    torch.manual_seed(rng.integer(config.seed, "weights"))
    sit = isinstance(config.model, SitConfig)
    model: Any = _built(config.model)
    if model.codec is not None:
        model.codec.load_state_dict(_codec(config.codec).state_dict())
    model = engine.place(model)
    player = Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.999)),
        schedule=partial(constant, warmup=config.warmup),
        ema=Ema(model, decay=config.ema),
        clip=config.clip,
    )
    source = Source(index.select(split="train", video=False), config, model)
    val = Index(index.folder, [i for i in index.select(split="val", video=False) if i.label])
    fixed = Source(val, config, model).fixed(64) if len(val) else None
    names = config.model.names
    shown = list(range(0, len(names), max(len(names) // SHOWN, 1)))[:SHOWN]
    times = (0.2, 0.4, 0.6, 0.8) if sit else (200.0, 400.0, 600.0, 800.0)

    def batches(step: int, micro: int) -> dict[str, Any]:
        keys = [(epoch, source.good[place]) for epoch, place in
                my_share(step, config.batch, len(source.good), config.seed)]  # fmt: skip
        return source.batch(keys) | source.masked(keys, step)

    run = Run(out, dataclasses.replace(config, data=digest(source.index, source.good)))
    for step in train([player], batches, run=run, steps=config.steps, seed=config.seed,
                      save_every=max(config.steps // 24, 1), keep=2, prefetch=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, source.pixels)
        if step.every(20):
            run.log(step.number, step.metrics)
        if step.every(seldom(config.steps, 12)):
            with averaged(player) as whole:
                if fixed is not None:
                    some = [
                        whole.loss(fixed | {"t": torch.full_like(fixed["uniform"], t)})["loss"] for t in times
                    ]
                    run.log(step.number, {"val_loss": float(sum(some) / len(some))})
                images = whole.generate_image(shown, seed=0, steps=QUICK)
                grid(to_bytes(images), [names[i] for i in shown]).save(run.sample_path(step.number))
                if config.judged and step.every(max(config.steps // 4, 1)):
                    scores = judged(whole, names, count=JUDGED)
                    run.log(step.number, scores)
                    said = ", ".join(
                        f"{name.removeprefix('judged_')} {score:.0%}" for name, score in scores.items()
                    )
                    run.say(f"step {step.number}: the judge reads as asked: {said}")
            run.curves()
    with averaged(player) as whole:
        keep(whole, out / "model")
    return reverie.load(out / "model")


def judged(
    model: Model, names: tuple[str, ...], *, count: int, seed: int = 0, steps: int = QUICK
) -> dict[str, float]:
    """Shares of `count` drawn pictures, class after class, with one thing, its colour, its shape, and all of that."""
    asked = [i % len(names) for i in range(count)]
    parts = [asked[at : at + 16] for at in range(0, count, 16)]
    images = torch.cat(
        [model.generate_image(part, seed=seed + 16 * i, steps=steps) for i, part in enumerate(parts)]
    )
    words = [names[i].split() for i in asked]
    said = [Description(mentions=(Mention(colour=colour, shape=thing),)) for colour, thing in words]
    return {f"judged_{name}": found["right"] for name, found in scenes(images.cpu(), said).items()}


class Source:
    """Batches of labelled pictures. Every draw is keyed by (seed, purpose, epoch, item)."""

    def __init__(self, index: Index, config: DitRun, model: Any):
        self.index, self.config, self.model = index, config, model
        self.home = next(model.parameters()).device
        with team().in_turn():
            self.pixels = open_pixels(index, size=config.size, fit=config.fit, stream=config.streamed)
        place = {name: i for i, name in enumerate(config.model.names)}
        bad = {entry.path for entry in self.pixels.bad}
        labels = {i: place.get((item.label or "").replace(",", " ")) for i, item in enumerate(index)}
        self.classes = {i: label for i, label in labels.items() if label is not None}
        self.good = [i for i in self.classes if index[i].file_name not in bad]
        if not self.good:
            raise InputError(
                f"nothing usable to train on in {index.folder}: run `reverie data check` to see why."
            )

    def batch(self, keys: list[tuple[int, int]], *, kind: str = "train") -> dict[str, Any]:
        """Latents, classes and draws of the items `keys`, (epoch, item) each; those that are bad are replaced."""
        keys, bad = self.pixels.ready(keys, self.good)
        seed = self.config.seed
        u = torch.stack([torch.rand(3, generator=rng.generator(seed, "class", kind, *key)) for key in keys])
        pictures = on_white(torch.stack([self.pixels[i][0] for _, i in keys]))
        mirrored = rearrange(u[:, 0] < self.config.flip, "b -> b 1 1 1")
        pictures = torch.where(mirrored, pictures.flip(-1), pictures).to(self.home)

        def noise(purpose: str, like: tuple[int, ...]) -> Tensor:
            return torch.stack(
                [torch.randn(like, generator=rng.generator(seed, purpose, kind, *key)) for key in keys]
            )

        codec = self.model.codec
        if codec is None:
            latents = pictures
        else:
            size = codec.latent_shape((self.config.size, self.config.size))
            latents = self.model.encode(pictures, noise=noise("posterior", size).to(self.home))
        return {
            "latents": latents,
            "noise": noise("noise", tuple(latents.shape[1:])),
            "classes": torch.tensor([self.classes[i] for _, i in keys]),
            "drop": u[:, 1] < self.config.drop,
            "uniform": u[:, 2],
            "ids": [self.index[i].file_name for _, i in keys],
            "bad": bad,
        }

    def masked(self, keys: list[tuple[int, int]], step: int) -> dict[str, Tensor]:
        """Of the step's masked pass, if there is one: the patches that stay, as many in each item, and other noise."""
        backbone, seed = self.config.model.backbone, self.config.seed
        if not isinstance(backbone, MdtConfig):
            return {}
        share = masked_share(backbone.masked, seed=seed, step=step)
        if share is None:
            return {}
        like = backbone.channels, backbone.size, backbone.size
        drawn = [masked_pass(like, backbone.grid**2, share, seed=seed, key=key) for key in keys]
        return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}

    def fixed(self, count: int) -> dict[str, Tensor]:
        """At most `count` items with the same noise every time and no class left out, on the model's device."""
        batch = self.batch([(0, i) for i in self.good[:count]], kind="fixed")
        batch["drop"] = torch.zeros_like(batch["drop"])
        return {name: part.to(self.home) for name, part in batch.items() if isinstance(part, Tensor)}


def _built(config: Config) -> Model:
    if isinstance(config, SitConfig):
        return Sit(config)
    if isinstance(config, MaskedDiffusionTransformerConfig):
        return MaskedDiffusionTransformer(config)
    return DiffusionTransformer(config)


def _codec(folder: str) -> Vae:
    codec = reverie.load(folder)
    if not isinstance(codec, Vae):
        raise InputError(
            f"{folder} is a {type(codec).__name__}, not a picture autoencoder: give the folder of one."
        )
    return codec
