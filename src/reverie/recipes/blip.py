"""Training BLIP (2201.12086): pictures and their captions, until it describes, matches and finds them.

tiny         any captioned folder, on a CPU                         reverie train blip-tiny FOLDER
stickers     the sticker corpus, as shipped (docs/systems/blip.md)  reverie train blip-stickers DIR
world        the procedural world, whose captions are exact         reverie train blip-world FOLDER
finetune     captions or retrieval alone, from weights that stand   reverie train blip-finetune FOLDER
paper_base   ViT-B/16 and BERT-base as the paper has them           reverie train blip-paper-base FOLDER
paper_large  the same with ViT-L/16                                 reverie train blip-paper-large FOLDER
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reverie
from reverie import rng
from reverie.codecs.pieces import Pieces
from reverie.data.augment import on_white, view
from reverie.data.index import Index
from reverie.encoders.med import MedConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.evals.retrieval import retrieval
from reverie.objectives.language import language_loss
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
    seldom,
)
from reverie.systems.blip import BASE, LARGE, Blip, BlipConfig
from reverie.systems.blip_training import BlipTraining
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.parallel import peers, team
from reverie.train.schedule import cosine, exponential

TASKS = ("all", "caption", "retrieval")
# A label stands in a phrase half of the time, so that a prompt asks for one, in one language.
PHRASES = {
    "en": ("{}", "{}", "a picture of {}", "a picture of {}"),
    "zh": ("{}", "{}", "图片：{}", "图片：{}"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlipRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: BlipConfig
    start: str = ""  # the Blip, or the CLIP whose image tower was gone on from
    task: str = "all"
    steps: int
    batch: int
    accumulate: int = 1
    lr: float = 3e-4
    weight_decay: float = 0.05
    schedule: str = "exponential"  # or cosine
    decay: float = (
        0.9  # of the learning rate from epoch to epoch, as the authors released it; the paper says 0.85
    )
    floor: float = 0.0
    warmup: int = 3000
    clip: float | None = None
    ema: float = 0.0
    strength: float = 1.0  # of the views, 0 for none
    languages: dict[str, float] | None = None
    phrases: bool = True  # labels stand in phrases at times
    queue: int = 57_600
    momentum: float = 0.995
    alpha: float = 0.4  # of the soft targets
    ramp: float = 2.0  # epochs over which alpha rises
    smoothing: float = 0.1
    far: bool = True
    length: int = 30  # the most tokens of a text
    mix: str = ""  # how often captions of each kind are told (data/wording.py)
    seed: int = 0
    strangers: str = ""  # which texts are compared that belong to no picture
    data: str = ""


def shape(
    tokenizer: Pieces, *, size: int = 64, patch: int = 16, width: int = 192, depth: int = 5, length: int = 40
) -> BlipConfig:
    """A small Blip for a CPU: clip-stickers' image tower, a text network of as many channels."""
    heads = heads_of(width)
    if depth < 2:
        raise InputError(
            f"depth is {depth}: the text network has a block less and needs one, so give 2 or more."
        )
    ids = tokenizer.special
    return BlipConfig(
        image=VitConfig(
            size=size, patch=patch, width=width, depth=depth, heads=heads, activation="gelu", stem="conv", pool="mean"
        ),
        text=MedConfig(
            vocab=tokenizer.vocab, length=length, width=width, depth=depth - 1, heads=heads, hidden=4 * width,
            context_width=width, pad=tokenizer.pad, start=ids["[CLS]"], end=ids["[SEP]"], decode=ids["[DEC]"],
            ground=ids["[ENC]"],
        ),
        width=width,
        fit="crop",
    )  # fmt: skip


def tiny(
    data: Path,
    out: Path,
    *,
    steps: int = 300,
    batch: int = 48,
    lr: float = 1e-3,
    size: int | None = None,
    queue: int = 1024,
    start: str = "",
    stream: bool = False,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Blip:
    """A small Blip on any captioned folder: from random weights, with a vocabulary of its captions, or going on.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        lr: The highest learning rate.
        size: Pixels a side that pictures are seen at, a multiple of 16; 64, or what the start sees, if not given.
        queue: How many former pictures and texts a batch is also compared with.
        start: The Blip to go on from, or a CLIP whose image tower to begin with, such as clip-stickers.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = open_index(data)
    train_set = captioned(index.select(split="train"))
    model = begin(start, train_set, partial(shape, size=64 if size is None else size), seed=seed)
    if size not in (None, model.config.image.size):
        raise InputError(
            f"size is {size}, but {start} sees {model.config.image.size} pixels: leave size out."
        )
    config = BlipRun(
        model=model.config, start=start, steps=steps, batch=at_most(batch, len(train_set)), lr=lr, schedule="cosine",
        floor=0.01, warmup=min(100, steps // 4), clip=1.0, ema=0.999, queue=queue, mix=mix, seed=seed,
    )  # fmt: skip
    return fit(config, model, train_set, out, val=index.select(split="val"), stream=stream, engine=engine)


def stickers(
    data: Path,
    out: Path,
    *,
    steps: int = 3000,
    batch: int = 96,
    lr: float = 1e-3,
    strength: float = 0.5,
    width: int = 192,
    depth: int = 5,
    queue: int = 4096,
    sources: tuple[str, ...] = (),
    start: str = "clip-stickers",
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Blip:
    """The shipped `blip-stickers`: every training style of the corpus, Twemoji and OpenMoji held out.

    Measured results, with the machine and the time, are on docs/systems/blip.md.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        lr: The highest learning rate.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all.
        width: Channels of both networks, a multiple of 64.
        depth: Blocks of the image tower; the text network has one less.
        queue: How many former pictures and texts a batch is also compared with.
        sources: Only these styles; all if not given.
        start: The Blip to go on from, or the CLIP whose image tower to begin with; "" for random weights.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = open_index(data)
    train_set = captioned(plain_stickers(index).select(split="train", video=False, sources=sources or None))
    model = begin(start, train_set, partial(shape, width=width, depth=depth), seed=seed)
    config = BlipRun(
        model=model.config, start=start, steps=steps, batch=batch, lr=lr, schedule="cosine", floor=0.01, warmup=100,
        clip=1.0, ema=0.999, strength=strength, languages={"en": 0.85, "zh": 0.15}, queue=queue, mix=mix, seed=seed,
    )  # fmt: skip
    held = captioned(plain_stickers(index).select(split="test", sources=("twemoji",)))
    return fit(config, model, train_set, out, val=held, engine=engine)


def world(
    data: Path,
    out: Path,
    *,
    count: int = 8000,
    moving: int = 800,
    hidden: int = 0,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 1e-3,
    english: float = 0.8,
    queue: int = 1024,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Blip:
    """The procedural world, which is drawn first if it is not there: captions that can be checked word by word.

    A clip shows one frame, so words of motion are read and written but not seen.

    Args:
        data: A folder of the world, or a new one for it.
        out: The run's folder; the model is written to its `model`.
        count: Pictures of the world, if it is to be drawn.
        moving: Clips of the world, if it is to be drawn.
        hidden: Clips in which something passes behind a wall, if it is to be drawn.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        lr: The highest learning rate.
        english: The share of captions in English; the rest are in Chinese.
        queue: How many former pictures and texts a batch is also compared with.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another world, another start and another order.
    """
    index = open_world(data, count, moving, hidden, seed=seed)
    train_set = index.select(split="train")
    model = begin("", train_set, partial(shape, patch=8, length=64), seed=seed)  # things are small
    config = BlipRun(
        model=model.config, steps=steps, batch=batch, lr=lr, schedule="cosine", floor=0.01, warmup=100, clip=1.0,
        ema=0.999, strength=0.0, languages={"en": english, "zh": 1 - english}, queue=queue, length=64, mix=mix,
        seed=seed,
    )  # fmt: skip
    return fit(config, model, train_set, out, val=index.select(split="val"), engine=engine)


def finetune(
    data: Path,
    out: Path,
    *,
    start: str = "blip-stickers",
    task: str = "caption",
    prompt: str | None = None,
    steps: int = 300,
    batch: int = 32,
    lr: float = 1e-4,
    weight_decay: float = 0.05,
    warmup: int = 0,
    strength: float = 0.5,
    queue: int = 1024,
    stream: bool = False,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Blip:
    """Fine-tune a Blip on a captioned folder: to write its captions, or to find and match them (appendix B).

    The paper: captions with the prompt "a picture of", lr 1e-5, 5 epochs of batch 256, 384 pixels; retrieval lr 2e-5,
    weight decay 0.04, 6 epochs. Without a prompt given the start's own is kept.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        start: The Blip to fine-tune: a shipped name, or a folder of Reverie or transformers.
        task: caption (writing alone), retrieval (contrast and matching), or all of them.
        prompt: What every caption begins with, such as "a picture of"; it is kept in the model.
        steps: How many batches to learn from.
        batch: Pictures of a step.
        lr: The highest learning rate.
        weight_decay: How strongly weights are drawn to zero.
        warmup: Steps over which the learning rate rises.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all.
        queue: How many former pictures and texts a batch is also compared with.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another order.
    """
    if task not in TASKS:
        raise InputError(f"task is {task!r:.40}: choose {', '.join(TASKS)}.")
    index = open_index(data)
    train_set = captioned(index.select(split="train"))
    model = reverie.load(start, trainable=True)
    if not isinstance(model, Blip):
        raise InputError(
            f"{start} is a {type(model).__name__}, not a Blip: give blip-stickers or a folder of one."
        )
    if prompt is not None:
        model.config = dataclasses.replace(model.config, prompt=prompt)
    config = BlipRun(
        model=model.config, start=start, task=task, steps=steps, batch=at_most(batch, len(train_set)), lr=lr,
        weight_decay=weight_decay, schedule="cosine", warmup=warmup, clip=1.0, ema=0.99, strength=strength,
        phrases=False, queue=queue, length=min(30, model.config.text.length), mix=mix, seed=seed,
    )  # fmt: skip
    return fit(config, model, train_set, out, val=index.select(split="val"), stream=stream, engine=engine)


def paper_base(
    data: Path,
    out: Path,
    *,
    steps: int = 97_000,
    batch: int = 2880,
    lr: float = 3e-4,
    start: str = "",
    mix: str = "",
    stream: bool = False,
    engine: Engine = ENGINE,
) -> Blip:
    """ViT-B/16 and BERT-base with the paper's hyperparameters (section 4.1; 20 epochs of 14 M pictures). Not yet run.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step, over all processes.
        lr: The highest learning rate.
        start: The Blip to go on from; random weights if not given.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
    """
    return _paper(
        data, out, BASE, steps=steps, batch=batch, lr=lr, start=start, mix=mix, stream=stream, engine=engine
    )


def paper_large(
    data: Path,
    out: Path,
    *,
    steps: int = 117_000,
    batch: int = 2400,
    lr: float = 2e-4,
    start: str = "",
    mix: str = "",
    stream: bool = False,
    engine: Engine = ENGINE,
) -> Blip:
    """The same with ViT-L/16. Not yet run.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step, over all processes.
        lr: The highest learning rate.
        start: The Blip to go on from; random weights if not given.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
    """
    return _paper(
        data, out, LARGE, steps=steps, batch=batch, lr=lr, start=start, mix=mix, stream=stream, engine=engine
    )


def _paper(
    data: Path,
    out: Path,
    tower: VitConfig,
    *,
    batch: int,
    stream: bool,
    start: str,
    engine: Engine,
    **how: Any,
) -> Blip:
    """Pictures of 224 pixels, BERT-base with dropout; its vocabulary is learnt from the captions, 30,524 at most."""
    index = open_index(data)
    train_set = captioned(index.select(split="train"))

    def made(tokenizer: Pieces) -> BlipConfig:
        ids, shape = tokenizer.special, paper_shape(tower)
        text = dataclasses.replace(
            shape.text, vocab=tokenizer.vocab, pad=tokenizer.pad, start=ids["[CLS]"], end=ids["[SEP]"],
            decode=ids["[DEC]"], ground=ids["[ENC]"],
        )  # fmt: skip
        return dataclasses.replace(shape, text=text)

    model = begin(start, train_set, made, vocab=30_524, seed=0)
    config = BlipRun(model=model.config, start=start, batch=batch, **how)
    return fit(config, model, train_set, out, val=index.select(split="val"), stream=stream, engine=engine)


def paper_shape(tower: VitConfig, *, size: int = 224) -> BlipConfig:
    """As it is pre-trained (section 4.1): BERT-base with its dropout, pictures of 224 pixels."""
    text = MedConfig(context_width=tower.width, dropout=0.1)
    return BlipConfig(image=dataclasses.replace(tower, size=size), text=text)


def begin(
    start: str, index: Index, shape: Callable[[Pieces], BlipConfig], *, vocab: int = 4096, seed: int
) -> Blip:
    """The Blip `start`, or one of that shape with random weights, a vocabulary of the captions of `index`, and, if
    `start` is a CLIP, its image tower.

    InputError: it is neither, or its image tower is of another shape.
    """
    given = reverie.load(start, trainable=True) if start else None
    if isinstance(given, Blip):
        return given
    texts = [caption.text for item in index for caption in item.captions]
    phrases = [phrase.format("") for several in PHRASES.values() for phrase in several]
    tokenizer = Pieces.train_words([*texts, *phrases * 50], vocab=vocab)
    torch.manual_seed(rng.integer(seed, "weights"))
    config = shape(tokenizer)
    if given is None:
        return Blip(config, tokenizer)
    clip = load_clip(start)
    seen, tower = clip.config, clip.config.image
    if not isinstance(tower, VitConfig):
        raise InputError(f"the image tower of {start} is no ViT, which BLIP's is: give another start.")
    text = dataclasses.replace(config.text, context_width=tower.width)
    config = dataclasses.replace(
        config, image=tower, text=text, mean=seen.mean, std=seen.std, fit=seen.fit, resample=seen.resample
    )
    blip = Blip(config, tokenizer)
    blip.image.load_state_dict(clip.image.state_dict())
    return blip


def fit(
    config: BlipRun,
    model: Blip,
    index: Index,
    out: Path,
    *,
    val: Index,
    strangers: Sequence[str] = (),
    stream: bool = False,
    engine: Engine = ENGINE,
) -> Blip:
    """Train the model, measure it on `val` eight times on the way; the (averaged) weights go to `out/model`.

    strangers: texts that are wrong for every picture of `index`, of which each step compares a batch.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(
            f"{config.start} has no tokenizer, so it cannot learn from captions: give one that has."
        )
    pairs = Captioned(index, size=model.config.image.size, stream=stream)
    pairs.check_pairs(config.batch, "BLIP")
    config = dataclasses.replace(config, data=pairs.digest)
    if strangers:
        told = hashlib.sha256("\n".join(strangers).encode()).hexdigest()
        config = dataclasses.replace(config, strangers=told)
    torch.manual_seed(rng.integer(config.seed, "queue"))
    training = engine.place(
        BlipTraining(
            model,
            reads=config.task != "caption",
            writes=config.task != "retrieval",
            queue=config.queue,
            momentum=config.momentum,
            smoothing=config.smoothing,
            far=config.far,
        )
    )
    epoch = max(len(pairs) / (config.batch * config.accumulate), 1)  # steps
    if config.schedule == "cosine":
        schedule = partial(cosine, steps=config.steps, warmup=config.warmup, floor=config.floor)
    else:
        schedule = partial(
            exponential, epoch=epoch, decay=config.decay, warmup=config.warmup, floor=config.floor
        )
    player = Player(
        training,
        optimizer=adamw(training, lr=config.lr, weight_decay=config.weight_decay),
        schedule=schedule,
        ema=Ema(training, decay=config.ema) if config.ema else None,
        clip=config.clip,
    )

    prompt = model.config.prompt  # of what is written: nobody finds by a prompt
    given = begun(tokenizer, prompt)

    def ids(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer.encode(list(texts), length=config.length)
        return tokens[:, : int((tokens != tokenizer.pad).sum(1).max())]

    def batches(step: int, micro: int) -> dict[str, Any]:
        keys, bad = pairs.drawn(step * config.accumulate + micro, config.batch, seed=config.seed)
        phrases = PHRASES if config.phrases else {}
        texts = pairs.told(keys, seed=config.seed, languages=config.languages, phrases=phrases)
        wrong = {}
        if strangers:
            several = torch.randint(
                len(strangers),
                (len(keys),),
                generator=rng.generator(config.seed, "strangers", step, micro, team().rank),
            )
            wrong = {"strangers": ids([strangers[i] for i in several.tolist()])}
        return {
            **pairs.seen(keys, seed=config.seed),
            **wrong,
            "tokens": ids(texts),
            "written": ids([f"{prompt} {text}".strip() for text in texts]),
            "draws": pairs.chances(keys, seed=config.seed),
            "given": torch.tensor(given),
            "alpha": torch.tensor(config.alpha * min(1.0, step / max(config.ramp * epoch, 1))),
            "bad": bad,
        }

    def loss(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The views are made on the model's device."""
        image = view(batch["rgba"], batch["views"], strength=config.strength)
        return training.loss({**batch, "image": image}, peers=peers())

    player.loss = loss
    run = Run(out, config)
    for step in train([player], batches, run=run, steps=config.steps, accumulate=config.accumulate,
                      seed=config.seed, save_every=seldom(config.steps, 12), keep=2, prefetch=2,
                      **engine.loop):  # fmt: skip
        if not step.skipped:
            training.advance(config.accumulate)
        if step.number == 1:
            name_bad(run, pairs.pixels)
        if step.every(10):
            run.log(step.number, step.metrics)
        if step.every(seldom(config.steps, 8)) and len(val):
            with averaged(player) as whole:
                scores = {
                    f"val_{key}": value for key, value in measure(whole, val, length=config.length).items()
                }
            run.log(step.number, scores)
            run.say(f"step {step.number}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    with averaged(player) as whole:
        keep(whole.blip, out / "model")
    return reverie.load(out / "model")


def begun(tokenizer: Pieces, prompt: str) -> int:
    """How many tokens stand before what is to be written: [DEC], and those of the prompt."""
    return tokenizer.encode([prompt]).shape[1] - 1 if prompt.strip() else 1


@torch.no_grad()
def measure(training: BlipTraining, val: Index, *, length: int, most: int = 1000) -> dict[str, float]:
    """Of at most so many captioned pictures: recall at 1 and 5 both ways, and the loss of writing the first caption,
    behind the model's prompt, which is not counted."""
    model = training.blip
    val = captioned(val)
    val = Index(val.folder, list(val)[:: max(-(-len(val) // most), 1)])
    pixels = decoded(val, size=model.config.image.size, quiet=True)
    if not pixels.good:
        return {}
    images = on_white(torch.stack([pixels[i][0] for i in pixels.good]))
    captions = [[caption.text for caption in val[i].captions] for i in pixels.good]
    found: dict[str, float] = {}
    if training.reads:
        both = retrieval(model.embed_image, model.embed_text, images, captions, ks=(1, 5))
        for way in ("image_to_text", "text_to_image"):
            found |= {f"{way}_recall@{k}": both[way][f"recall@{k}"] for k in (1, 5)}
    if training.writes:
        assert model.tokenizer is not None
        prompt = model.config.prompt
        texts = [f"{prompt} {several[0]}".strip() for several in captions]
        given = begun(model.tokenizer, prompt)
        tokens = model.tokenizer.encode(texts, length=length).to(images.device)
        total = count = 0.0
        for part, ids in zip(images.split(64), tokens.split(64), strict=True):
            mask = (ids != model.config.text.pad) & (torch.arange(ids.shape[1]) >= given)
            ids, mask = (x.to(model.text.norm.weight.device) for x in (ids, mask))
            loss = language_loss(model.writes(model.see(part), ids), ids, mask)
            total, count = total + float(loss * mask[:, 1:].sum()), count + float(mask[:, 1:].sum())
        found["writing"] = total / count
    return found
