"""Training CLIP (2103.00020) on your own pictures, and the run that made the shipped weights.

tiny       any captioned folder, on a CPU                         reverie train clip-tiny FOLDER
stickers   the sticker corpus, as shipped (docs/systems/clip.md)  reverie train clip-stickers DIR
world      the procedural world, for a Sora to read with          reverie train clip-world FOLDER
paper_b32  ViT-B/32 as the paper has it                           reverie train clip-paper-b32 FOLDER

Going on from weights, with parts held back, is recipes/clip_finetune.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import reverie
from reverie import rng
from reverie.codecs.bpe import Bpe
from reverie.data.augment import on_white, view
from reverie.data.dropping import check_share, drop_tokens, kept_patches
from reverie.data.index import Index, Item
from reverie.data.pixels import Native
from reverie.encoders.navit import NavitConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.evals.retrieval import retrieval
from reverie.evals.zero_shot import zero_shot
from reverie.recipes.captioned import Captioned
from reverie.recipes.parts import (
    at_most,
    averaged,
    captioned,
    decoded,
    heads_of,
    keep,
    load_clip,
    name_bad,
    open_index,
    open_world,
    plain_stickers,
)
from reverie.systems.clip import Clip, ClipConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.gradient_cache import cached
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw, layer_factors
from reverie.train.parallel import peers, team
from reverie.train.plan import chunk_within
from reverie.train.schedule import cosine

LOSSES: dict[str, Literal["softmax", "sigmoid"]] = {"softmax": "softmax", "sigmoid": "sigmoid"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: ClipConfig
    start: str = ""  # the CLIP that was gone on from
    steps: int
    batch: int
    accumulate: int = 1
    chunk: int = 0  # pictures embedded at a time; 0: the whole batch
    lr: float = 1e-3
    weight_decay: float = 0.1
    beta2: float = 0.98  # section 2.5 and table 19
    eps: float = 1e-6
    warmup: int = 100
    ema: float = 0.999
    strength: float = 1.0  # of the views, 0 for none
    languages: dict[str, float] | None = None  # how often each is drawn; None: equally
    drop: float = 0.0  # the share of the patches that is not seen (FLIP, 2212.00794)
    drop_text: float = 0.0  # the share of the words that is not read
    unmasked: float = 0.1  # the share of the steps, the last ones, that see and read all
    lock: str = ""  # the tower that is not trained (LiT, 2111.07991)
    lora: int = 0  # rank of the adapters, which alone are trained (2106.09685); 0: all weights are
    alpha: float = 0.0  # of the adapters
    layer_decay: float = 1.0  # of the learning rate from block to block
    mix: str = ""  # how often captions of each kind are told (data/wording.py)
    seed: int = 0
    data: str = ""  # a digest of what it learns from


def shape(
    vocab: int,
    end: int,
    *,
    size: int = 64,
    width: int = 192,
    depth: int = 5,
    loss: str = "softmax",
    length: int = 20,
) -> ClipConfig:
    """A small CLIP for a CPU: 16 patches of 16 pixels behind a conv stem; 4 million parameters by default."""
    heads = heads_of(width)
    if depth < 2:
        raise InputError(
            f"depth is {depth}: the text tower has half as many blocks and needs one, so give 2 or more."
        )
    if loss not in LOSSES:
        raise InputError(f"loss is {loss!r}: give {' or '.join(LOSSES)}.")
    return ClipConfig(
        image=VitConfig(
            size=size,
            patch=16,
            width=width,
            depth=depth,
            heads=heads,
            activation="gelu",
            stem="conv",
            pool="mean",
        ),
        text=TextConfig(
            vocab=vocab, length=length, width=width, depth=depth // 2, heads=heads, activation="gelu", end=end
        ),
        width=width,
        loss=LOSSES[loss],
    )


def tiny(
    data: Path,
    out: Path,
    *,
    steps: int = 300,
    batch: int = 64,
    chunk: int = 0,
    memory: str = "",
    lr: float = 1e-3,
    size: int = 64,
    loss: str = "softmax",
    drop: float = 0.0,
    drop_text: float = 0.0,
    unmasked: float = 0.1,
    start: str = "",
    stream: bool = False,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Clip:
    """A small CLIP on any captioned folder: from random weights, with a vocabulary of its captions, or going on.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        chunk: Pictures embedded at a time, each twice, so that a batch beyond the memory fits. 0: all.
        memory: Choose the chunk for this much memory, such as 6GB: free, or a laptop, workstation or server.
        lr: The highest learning rate.
        size: Pixels a side that pictures are seen at, a multiple of 16.
        loss: softmax compares each picture with all of the batch (CLIP), sigmoid each pair by itself (SigLIP).
        drop: The share of the patches that is left out at random, which makes a step quicker: 0.5 halves the blocks.
        drop_text: The share of the words that is left out at random.
        unmasked: The share of the steps, the last ones, in which nothing is left out.
        start: The CLIP to go on from (its name or folder), with its own shape and words; random weights if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = open_index(data)
    train_set = index.select(split="train")
    model = begin(start, train_set, partial(shape, size=size, loss=loss), seed=seed)
    config = ClipRun(
        model=model.config, start=start, steps=steps, batch=at_most(batch, len(train_set)), chunk=chunk, lr=lr,
        drop=drop, drop_text=drop_text, unmasked=unmasked, mix=mix, seed=seed,
    )  # fmt: skip
    return fit(
        config, model, train_set, out, measures=val_of(index), memory=memory, stream=stream, engine=engine
    )


def stickers(
    data: Path,
    out: Path,
    *,
    steps: int = 2200,
    batch: int = 128,
    chunk: int = 0,
    memory: str = "",
    lr: float = 1e-3,
    strength: float = 0.5,
    width: int = 192,
    depth: int = 5,
    loss: str = "softmax",
    sources: tuple[str, ...] = (),
    drop: float = 0.0,
    drop_text: float = 0.0,
    unmasked: float = 0.1,
    start: str = "",
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Clip:
    """The shipped `clip-stickers`: every training style of the corpus, Twemoji and OpenMoji held out.

    Measured results, with the machine and the time, are on docs/systems/clip.md.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        chunk: Pictures embedded at a time, each twice, so that a batch beyond the memory fits. 0: all.
        memory: Choose the chunk for this much memory, such as 6GB: free, or a laptop, workstation or server.
        lr: The highest learning rate.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all.
        width: Channels of both towers, a multiple of 64.
        depth: Blocks of the image tower; the text tower has half as many.
        loss: softmax compares each picture with all of the batch (CLIP), sigmoid each pair by itself (SigLIP).
        sources: Only these styles, as in the comparison with open_clip (fluent-3d and noto); all if not given.
        drop: The share of the patches that is left out at random, which makes a step quicker: 0.5 halves the blocks.
        drop_text: The share of the words that is left out at random.
        unmasked: The share of the steps, the last ones, in which nothing is left out.
        start: The CLIP to go on from (its name or folder), with its own shape and words; random weights if not given.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = open_index(data)
    train_set = plain_stickers(index).select(split="train", video=False, sources=sources or None)
    model = begin(start, train_set, partial(shape, width=width, depth=depth, loss=loss), seed=seed)
    config = ClipRun(
        model=model.config, start=start, steps=steps, batch=batch, chunk=chunk, lr=lr, strength=strength,
        languages={"en": 0.85, "zh": 0.15}, drop=drop, drop_text=drop_text, unmasked=unmasked, mix=mix, seed=seed,
    )  # fmt: skip
    held = plain_stickers(index).select(split="test", sources=("twemoji",))
    measures = {"twemoji": partial(zero_shot_of, val=held)} if any(item.label for item in held) else {}
    return fit(config, model, train_set, out, measures=measures, memory=memory, engine=engine)


def world(
    data: Path,
    out: Path,
    *,
    count: int = 8000,
    moving: int = 800,
    hidden: int = 200,
    steps: int = 600,
    batch: int = 64,
    chunk: int = 0,
    memory: str = "",
    lr: float = 1e-3,
    english: float = 0.8,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Clip:
    """The procedural world, which is drawn first if it is not there: the reader of `sora-world`.

    A clip shows one frame, so words of motion are read but not seen.

    Args:
        data: A folder of the world, or a new one for it.
        out: The run's folder; the model is written to its `model`.
        count: Pictures of the world, if it is to be drawn.
        moving: Clips of the world, if it is to be drawn.
        hidden: Clips in which something passes behind a wall, if it is to be drawn.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        chunk: Pictures embedded at a time, each twice, so that a batch beyond the memory fits. 0: all.
        memory: Choose the chunk for this much memory, such as 6GB: free, or a laptop, workstation or server.
        lr: The highest learning rate.
        english: The share of captions in English; the rest are in Chinese.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another world, another start and another order.
    """
    index = open_world(data, count, moving, hidden, seed=seed)
    train_set = index.select(split="train")
    model = begin("", train_set, partial(shape, length=40), seed=seed)
    config = ClipRun(
        model=model.config, steps=steps, batch=batch, chunk=chunk, lr=lr, strength=0.0,
        languages={"en": english, "zh": 1 - english}, mix=mix, seed=seed,
    )  # fmt: skip
    return fit(config, model, train_set, out, measures=val_of(index), memory=memory, engine=engine)


def paper_b32(
    data: Path,
    out: Path,
    *,
    steps: int = 400_000,
    batch: int = 32_768,
    chunk: int = 0,
    memory: str = "",
    accumulate: int = 1,
    mix: str = "",
    stream: bool = False,
    engine: Engine = ENGINE,
) -> Clip:
    """ViT-B/32 with the paper's hyperparameters (tables 18 to 20), CLIP's own vocabulary. Not yet run by us.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures that are compared with each other at a time.
        chunk: Pictures embedded at a time, each twice, so that a batch beyond the memory fits. 0: all.
        memory: Choose the chunk for this much memory, such as 6GB: free, or a laptop, workstation or server.
        accumulate: Batches of a step.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
    """
    tokenizer = Bpe.clip()
    config = ClipRun(
        model=ClipConfig(), steps=steps, batch=batch, chunk=chunk, accumulate=accumulate, lr=5e-4, weight_decay=0.2,
        warmup=2000, ema=0.0, strength=0.0, mix=mix
    )  # fmt: skip
    index = open_index(data)
    torch.manual_seed(rng.integer(config.seed, "weights"))
    return fit(
        config,
        Clip(config.model, tokenizer),
        index.select(split="train"),
        out,
        measures={},
        memory=memory,
        stream=stream,
        engine=engine,
    )


def begin(start: str, index: Index, shape: Callable[[int, int], ClipConfig], *, seed: int) -> Clip:
    """The CLIP `start`, or one of that shape with random weights and a vocabulary of the captions of `index`."""
    if start:
        return load_clip(start, trainable=True)
    tokenizer = Bpe.train(_texts(index), vocab=4096)
    torch.manual_seed(rng.integer(seed, "weights"))
    return Clip(shape(tokenizer.vocab, tokenizer.end), tokenizer)


Measure = Callable[[Clip], dict[str, float]]


def save(model: Clip, out: Path) -> None:
    """What a run ends with: the averaged weights in `out/model`."""
    keep(model, out / "model")


def fit(
    config: ClipRun,
    model: Clip,
    index: Index,
    out: Path,
    *,
    measures: Mapping[str, Measure],
    finish: Callable[[Clip, Path], None] = save,
    stream: bool = False,
    memory: str = "",
    engine: Engine = ENGINE,
) -> Clip:
    """Train the model, measure eight times on the way; `finish` gets the averaged weights and writes `out/model`.

    With `memory` the chunk is chosen for it, and stands in the run's configuration.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    pairs = Captioned(index, size=config.model.image.size, stream=stream, mix=config.mix)
    pairs.check_pairs(config.batch, "CLIP")
    config = dataclasses.replace(config, data=pairs.digest)
    whole_from = _whole_from(config)
    if config.chunk and memory:
        raise InputError(
            f"chunk is {config.chunk} and memory is {memory!r}, which chooses a chunk: give one of them."
        )
    if memory and team().count > 1:
        raise InputError(
            f"memory is {memory!r}, which chooses a chunk for one process: give --chunk for several."
        )
    if (config.chunk or memory) and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        asked = f"chunk is {config.chunk}" if config.chunk else f"memory is {memory!r}"
        raise InputError(
            f"{asked}, but this model has batch norm, which would see only a chunk: leave it out."
        )
    if team().count > 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise InputError(
            "This model has batch norm, whose statistics several processes would each take of their own part: train it"
            " in one."
        )
    model = engine.place(model)
    player = Player(
        model,
        optimizer=adamw(
            model, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, config.beta2), eps=config.eps,
            factors=layer_factors(model, config.layer_decay) if config.layer_decay != 1 else None,
        ),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup, floor=0.01),
        ema=Ema(model, decay=config.ema) if config.ema else None,
        clip=1.0,
    )  # fmt: skip

    def batches(step: int, micro: int) -> dict[str, Tensor | list]:
        keys, bad = pairs.drawn(step * config.accumulate + micro, config.batch, seed=config.seed)
        texts = pairs.told(keys, seed=config.seed, languages=config.languages)
        tokens = tokenizer.encode(texts, length=config.model.text.length)
        kept = {}
        if step < whole_from and config.drop_text:
            end, pad = config.model.text.end, tokenizer.pad
            tokens = drop_tokens(tokens, config.drop_text, end=end, pad=pad, seed=config.seed, keys=keys)
        if step < whole_from and config.drop:
            assert isinstance(config.model.image, VitConfig), "_whole_from has checked it"
            kept["keep"] = kept_patches(config.model.image.patches, config.drop, seed=config.seed, keys=keys)
        return {**pairs.seen(keys, seed=config.seed), **kept, "tokens": tokens, "bad": bad}

    def embed(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The views are made on the model's device."""
        return model.embed({**batch, "image": view(batch["rgba"], batch["views"], strength=config.strength)})

    def loss(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return model.compare(*cached(embed, batch, chunk=config.chunk), label=batch["label"], peers=peers())

    player.loss = loss
    if memory:
        config = dataclasses.replace(config, chunk=chunk_within(memory, player, batches(0, 0), folder=out))
    run = Run(out, config)
    measure_every = max(config.steps // 8, 1)
    for step in train([player], batches, run=run, steps=config.steps, accumulate=config.accumulate,
                      seed=config.seed, save_every=max(config.steps // 12, 1), keep=2, prefetch=2,
                      **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, pairs.pixels)
        if step.every(10):
            run.log(step.number, step.metrics)
        if step.every(measure_every):
            with averaged(player) as whole:
                for name, measure in measures.items():
                    scores = {f"{name}_{key}": value for key, value in measure(whole).items()}
                    run.log(step.number, scores)
                    run.say(f"step {step.number}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    with averaged(player) as whole:
        finish(whole, out)
    return reverie.load(out / "model")


def _whole_from(config: ClipRun) -> int:
    """The first step that leaves nothing out. InputError: what was asked for cannot be left out."""
    if check_share("drop", config.drop) and not isinstance(config.model.image, VitConfig):
        raise InputError(
            f"drop is {config.drop}, but this image tower is a ResNet, which has no patches to drop."
        )
    if check_share("drop_text", config.drop_text) and config.model.text.pool == "last":
        raise InputError(
            f"drop_text is {config.drop_text}, but this text tower reads a fixed number of positions: give 0."
        )
    if not 0 <= config.unmasked <= 1:
        raise InputError(f"unmasked is {config.unmasked}: give a share of the steps, from 0 to 1.")
    return round(config.steps * (1 - config.unmasked))


def _texts(index: Index) -> list[str]:
    return [caption.text for item in index for caption in item.captions]


def _signals(index: Index, model: Clip) -> tuple[Tensor | list[Tensor], list[Item]]:
    """The pictures of an index on white, as the image tower reads them, and the items they belong to."""
    image = model.config.image
    if isinstance(image, NavitConfig):
        pixels = decoded(index, size=Native(patch=image.patch, area=image.area), fit="squash", quiet=True)
        return [on_white(pixels[i][0]) for i in pixels.good], [index[i] for i in pixels.good]
    pixels = decoded(index, size=image.size, quiet=True)
    return on_white(torch.stack([pixels[i][0] for i in pixels.good])), [index[i] for i in pixels.good]


def zero_shot_of(model: Clip, *, val: Index) -> dict[str, float]:
    """Top-1 and top-5 among all labels of `val`."""
    val = Index(val.folder, [item for item in val if item.label])
    names = sorted({str(item.label) for item in val})
    images, items = _signals(val, model)
    labels = [names.index(str(item.label)) for item in items]
    found = zero_shot(model.embed_image, model.embed_text, images, labels, names)
    return {key: found[key] for key in ("top1", "top5")}


def val_of(index: Index) -> dict[str, Measure]:
    """Retrieval among the captioned pictures of the split "val", if there are any."""
    val = captioned(index.select(split="val"))
    return {"val": partial(_retrieval, val=val)} if len(val) else {}


def _retrieval(model: Clip, *, val: Index) -> dict[str, float]:
    """Recall at 1 and 5, pictures to captions and back."""
    images, items = _signals(val, model)
    captions = [[caption.text for caption in item.captions] for item in items]
    found = retrieval(model.embed_image, model.embed_text, images, captions, ks=(1, 5))
    return {
        f"{way}_recall@{k}": found[way][f"recall@{k}"]
        for way in ("image_to_text", "text_to_image")
        for k in (1, 5)
    }
