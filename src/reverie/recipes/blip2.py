"""Training BLIP-2 (2301.12597): a Q-Former between a frozen image tower and, in its second stage, a frozen language
model.

stage1         any captioned folder, any CLIP's tower                  reverie train blip2-stage1 FOLDER
stage2         what that run made, and any language model              reverie train blip2-stage2 FOLDER \\
                                                                           --first RUN/model --language LM
paper_stage1   the Q-Former of the paper, with its hyperparameters     reverie train blip2-paper-stage1 FOLDER --tower T
paper_stage2   the same for the second stage                           reverie train blip2-paper-stage2 FOLDER ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reverie
from reverie import rng
from reverie.backbones.language import Language
from reverie.bridges.qformer import QformerConfig
from reverie.codecs.pieces import Pieces, read_tokenizer
from reverie.data.augment import on_white, view
from reverie.data.index import Index
from reverie.data.wording import draw_caption
from reverie.encoders.clip_resnet import ClipResnetConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.recipes.captioned import Captioned, Keys
from reverie.recipes.parts import (
    at_most,
    averaged,
    captioned,
    decoded,
    heads_of,
    keep,
    name_bad,
    open_index,
    plain_stickers,
    seldom,
)
from reverie.systems.blip2 import Blip2, Blip2Config, SightConfig, Source, nearest
from reverie.systems.blip2_language import Blip2Language, Blip2LanguageConfig
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.parallel import peers
from reverie.train.schedule import cosine
from reverie.weights.frozen import tower as tower_of
from reverie.weights.store import hash_of

PHRASES = {"en": ("{}",), "zh": ("{}",)}  # what is written is the caption alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blip2Run:
    """What a run depends on; it stands in the run folder's config.json."""

    model: Blip2Config | Blip2LanguageConfig
    start: str = ""  # the first stage that was gone on from
    steps: int
    batch: int
    accumulate: int = 1
    lr: float = 1e-4  # section 3.4, as all that follows
    weight_decay: float = 0.05
    beta2: float = 0.98
    warmup: int = 2000
    floor: float = 0.0
    clip: float | None = None
    ema: float = 0.0
    strength: float = 1.0  # of the views, 0 for none
    languages: dict[str, float] | None = None
    length: int = 32  # the most tokens of a text
    mix: str = ""  # how often captions of each kind are told (data/wording.py)
    seed: int = 0
    data: str = ""


def stage1(
    data: Path,
    out: Path,
    *,
    tower: str = "clip-stickers",
    steps: int = 1500,
    batch: int = 64,
    lr: float = 1e-3,
    queries: int = 8,
    width: int = 192,
    depth: int = 4,
    leave: int = 1,
    strength: float = 0.5,
    languages: tuple[str, ...] = (),
    stream: bool = False,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Blip2:
    """A small Q-Former that learns to ask a frozen tower: contrast, matching and writing.

    Skin-tone variants of the sticker corpus are left out.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        tower: The model whose image tower is asked: a CLIP by name or folder, a BLIP, or a BLIP-2 that holds its own.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        lr: The highest learning rate.
        queries: How many vectors a picture becomes.
        width: Channels of the Q-Former, a multiple of 64.
        depth: Blocks of the Q-Former, of which every second one looks at the picture.
        leave: Blocks of the tower that are left out at its end.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all.
        languages: Only captions in these languages, such as en; all if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = plain_stickers(open_index(data))
    train_set = captioned(index.select(split="train"))
    shape = {
        "queries": queries,
        "width": width,
        "depth": depth,
        "heads": heads_of(width),
        "hidden": 4 * width,
    }
    model = begin(tower, train_set, shape, leave=leave, vocab=4096, length=48, languages=languages, seed=seed)
    config = Blip2Run(
        model=model.config, steps=steps, batch=at_most(batch, len(train_set)), lr=lr, warmup=min(100, steps // 4),
        floor=0.01, clip=1.0, ema=0.999, strength=strength, languages=_only(languages), mix=mix, seed=seed,
    )  # fmt: skip
    return fit(config, model, train_set, out, val=index.select(split="val"), stream=stream, engine=engine)


def stage2(
    data: Path,
    out: Path,
    *,
    first: str,
    language: str,
    steps: int = 1000,
    batch: int = 64,
    lr: float = 1e-3,
    strength: float = 0.5,
    languages: tuple[str, ...] = (),
    stream: bool = False,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Blip2Language:
    """The Q-Former of a first stage learns to speak to a frozen language model. Needs the extra `interop`.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        first: The folder of the first stage.
        language: The folder of a language model as transformers writes it, with safetensors and a tokenizer.json.
        steps: How many batches to learn from.
        batch: Pictures of a step; more learn better, take longer and need more memory.
        lr: The highest learning rate.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all.
        languages: Only captions in these languages, such as en; all if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another seed, another start and another order.
    """
    index = plain_stickers(open_index(data))
    train_set = captioned(index.select(split="train"))
    model = second(first, language, seed=seed)
    config = Blip2Run(
        model=model.config, start=first, steps=steps, batch=at_most(batch, len(train_set)), lr=lr,
        warmup=min(100, steps // 4), floor=0.05, clip=1.0, ema=0.999, strength=strength, languages=_only(languages),
        mix=mix, seed=seed,
    )  # fmt: skip
    return fit(config, model, train_set, out, val=index.select(split="val"), stream=stream, engine=engine)


def paper_stage1(
    data: Path,
    out: Path,
    *,
    tower: str,
    steps: int = 250_000,
    batch: int = 1680,
    lr: float = 1e-4,
    leave: int = 0,
    mix: str = "",
    stream: bool = False,
    engine: Engine = ENGINE,
) -> Blip2:
    """The Q-Former of the paper (BERT-base, 32 queries) with its hyperparameters (section 3.4). Not yet run by us.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        tower: The frozen tower: a CLIP ViT-L/14 (with leave 1 and batch 2320), or a BLIP-2 that holds EVA's ViT-g/14.
        steps: How many batches to learn from.
        batch: Pictures of a step, over all processes.
        lr: The highest learning rate.
        leave: Blocks of the tower that are left out at its end.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
    """
    index = open_index(data)
    train_set = captioned(index.select(split="train"))
    model = begin(
        tower, train_set, {"dropout": 0.1}, leave=leave, vocab=30_523, length=512, languages=(), seed=0
    )
    config = Blip2Run(model=model.config, steps=steps, batch=batch, lr=lr, mix=mix)
    return fit(config, model, train_set, out, val=index.select(split="val"), stream=stream, engine=engine)


def paper_stage2(
    data: Path,
    out: Path,
    *,
    first: str,
    language: str,
    steps: int = 80_000,
    batch: int = 1920,
    lr: float = 1e-4,
    mix: str = "",
    stream: bool = False,
    engine: Engine = ENGINE,
) -> Blip2Language:
    """The second stage with the paper's hyperparameters (section 3.4). Not yet run by us.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        first: The folder of the first stage.
        language: The folder of the language model: OPT, or FLAN-T5 with batch 1520.
        steps: How many batches to learn from.
        batch: Pictures of a step, over all processes.
        lr: The highest learning rate.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        stream: Decode pictures whenever they are asked for, and keep no pixels on the disk.
    """
    index = open_index(data)
    train_set = captioned(index.select(split="train"))
    model = second(first, language, seed=0)
    config = Blip2Run(
        model=model.config, start=first, steps=steps, batch=batch, lr=lr, floor=0.5, mix=mix
    )  # 5e-5 at the end
    return fit(config, model, train_set, out, val=index.select(split="val"), stream=stream, engine=engine)


def begin(
    tower: str,
    index: Index,
    shape: Mapping[str, Any],
    *,
    leave: int,
    vocab: int,
    length: int,
    languages: tuple[str, ...],
    seed: int,
) -> Blip2:
    """A Q-Former of random weights that asks a model's tower, and a vocabulary of the captions of `index`.

    InputError: there is no such tower, or it is none that is asked.
    """
    given = reverie.load(tower)
    image = tower_of(given, where=tower)
    seen = given.config.sight if isinstance(given, Blip2 | Blip2Language) else given.config
    if not isinstance(seen.image, VitConfig | ClipResnetConfig):
        raise InputError(
            f"the image tower of {tower} is a {type(image).__name__}: give a model whose tower is a ViT or a ResNet."
        )
    texts = [
        caption.text
        for item in index
        for caption in item.captions
        if not languages or caption.language in languages
    ]
    tokenizer = Pieces.train_words(texts, vocab=vocab)
    ids = tokenizer.special
    channels = seen.image.width if isinstance(seen.image, VitConfig) else 32 * seen.image.width
    config = SightConfig(
        image=seen.image, source=Source(model=_named(tower), hash=hash_of(image)), leave=leave, mean=seen.mean,
        std=seen.std, fit=seen.fit, resample=seen.resample,
        qformer=QformerConfig(
            context_width=channels, vocab=tokenizer.vocab, length=length, pad=tokenizer.pad, start=ids["[CLS]"],
            end=ids["[SEP]"], decode=ids["[DEC]"], **shape,
        ),
    )  # fmt: skip
    torch.manual_seed(rng.integer(seed, "weights"))
    width = 256 if config.qformer.width >= 256 else config.qformer.width
    return Blip2(Blip2Config(sight=config, width=width), tokenizer, image)


def second(first: str, language: str, *, seed: int) -> Blip2Language:
    """The second stage: a first stage's queries, and a projection of random weights to a language model."""
    stage = reverie.load(first)
    if not isinstance(stage, Blip2):
        raise InputError(f"{first} is a {type(stage).__name__}: give the first stage of a BLIP-2.")
    model, tokenizer = Language.read(language), read_tokenizer(language)
    if not isinstance(tokenizer, Pieces):
        raise InputError(f"{language} has a tokenizer of CLIP's: give the language model's own.")
    inner = dataclasses.replace(stage.config.sight.qformer, reads=False, writes=False)
    sight = dataclasses.replace(stage.config.sight, qformer=inner)
    if not sight.source.model:
        sight = dataclasses.replace(
            sight, source=Source(model=_named(first), hash=hash_of(stage.sight.image))
        )
    config = Blip2LanguageConfig(
        sight=sight,
        language=model.config,
        language_source=Source(model=_named(language), hash=hash_of(model)),
    )
    torch.manual_seed(rng.integer(seed, "weights"))
    made = Blip2Language(config, tokenizer, stage.sight.image, model)
    kept = made.sight.state_dict().keys()
    made.sight.load_state_dict(
        {name: value for name, value in stage.sight.state_dict().items() if name in kept}
    )
    return made


def _named(model: str) -> str:
    """A folder by its whole path, so that what names it may lie anywhere."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _only(languages: tuple[str, ...]) -> dict[str, float] | None:
    return dict.fromkeys(languages, 1.0) or None


def fit(
    config: Blip2Run,
    model: Any,
    index: Index,
    out: Path,
    *,
    val: Index,
    stream: bool = False,
    engine: Engine = ENGINE,
) -> Any:
    """Train what is not frozen of either stage, measure it on `val`; the averaged weights go to `out/model`."""
    pairs = Captioned(index, size=config.model.sight.image.size, stream=stream, mix=config.mix)
    if isinstance(model, Blip2):
        pairs.check_pairs(config.batch, "first stage")
    config = dataclasses.replace(config, data=pairs.digest)
    model = engine.place(model)
    player = Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, config.beta2)),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup, floor=config.floor),
        ema=Ema(model, decay=config.ema) if config.ema else None,
        clip=config.clip,
    )
    words = _first_words(model, pairs, config) if isinstance(model, Blip2) else _second_words(model, config)

    def batches(step: int, micro: int) -> dict[str, Any]:
        keys, bad = pairs.drawn(step * config.accumulate + micro, config.batch, seed=config.seed)
        texts = pairs.told(keys, seed=config.seed, languages=config.languages, phrases=PHRASES)
        return {**pairs.seen(keys, seed=config.seed), **words(texts, keys), "bad": bad}

    def loss(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The views are made on the model's device."""
        image = view(batch["rgba"], batch["views"], strength=config.strength)
        return model.loss({**batch, "image": image}, peers=peers())

    player.loss = loss
    run = Run(out, config)
    for step in train([player], batches, run=run, steps=config.steps, accumulate=config.accumulate,
                      seed=config.seed, save_every=seldom(config.steps, 12), keep=2, prefetch=2,
                      **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, pairs.pixels)
        if step.every(10):
            run.log(step.number, step.metrics)
        if step.every(seldom(config.steps, 8)) and len(val):
            with averaged(player) as whole:
                scores = {f"val_{key}": value for key, value in measure(whole, val, config).items()}
            run.log(step.number, scores)
            run.say(f"step {step.number}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    with averaged(player) as whole:
        keep(whole, out / "model")
    return reverie.load(out / "model")


Words = Callable[[list[str], Keys], dict[str, Tensor]]


def _first_words(model: Blip2, pairs: Captioned, config: Blip2Run) -> Words:
    tokenizer, pad = model.tokenizer, model.config.sight.qformer.pad
    assert tokenizer is not None

    def words(texts: list[str], keys: Keys) -> dict[str, Tensor]:
        tokens = tokenizer.encode(texts, length=config.length)
        if peers().count == 1:  # of several processes all must have one length
            tokens = tokens[:, : int((tokens != pad).sum(1).max())]
        return {"tokens": tokens, "draws": pairs.chances(keys, seed=config.seed)}

    return words


def _second_words(model: Blip2Language, config: Blip2Run) -> Words:
    def words(texts: list[str], keys: Keys) -> dict[str, Tensor]:
        if not model.language.pairs:
            tokens, mask = model.written(texts, length=config.length)
            return _cut({"tokens": tokens, "mask": mask})
        before, after = [], []
        for text, key in zip(
            texts, keys, strict=True
        ):  # section 3.3: a prefix to the encoder, the rest to be written
            parts = text.split()
            at = int(len(parts) * torch.rand(1, generator=rng.generator(config.seed, "split", *key)).item())
            before.append(" ".join(parts[:at]))
            after.append(" ".join(parts[at:]))
        given, given_mask = model.prompts(before, length=config.length)
        tokens, mask = model.written(after, length=config.length)
        return _cut({"tokens": tokens, "mask": mask}) | _cut({"given": given, "given_mask": given_mask})

    return words


def _cut(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens and their mask, to the longest text."""
    longest = max(int(list(padded.values())[1].sum(1).max()), 1)
    return {name: value[:, :longest] for name, value in padded.items()}


def measure(model: Any, val: Index, config: Blip2Run, *, most: int = 500) -> dict[str, float]:
    """Of at most so many captioned pictures: recall at 1 and 5 both ways, of a second stage the loss of the first
    caption."""
    val = captioned(val)
    val = Index(val.folder, list(val)[:: max(-(-len(val) // most), 1)])
    pixels = decoded(val, size=config.model.sight.image.size, quiet=True)
    if not pixels.good:
        return {}
    images = on_white(torch.stack([pixels[i][0] for i in pixels.good]))
    generators = [rng.generator(0, "val", i) for i in pixels.good]
    texts = [
        draw_caption(val[i], generator, languages=config.languages, phrases=PHRASES)
        for i, generator in zip(pixels.good, generators, strict=True)
    ]
    if isinstance(model, Blip2):
        return recall(model, images, texts)
    words = _second_words(model, config)(texts, [(0, i) for i in pixels.good])
    home = model.projection.weight.device
    losses = [
        model.loss(
            {name: value[at : at + 64].to(home) for name, value in {**words, "image": images}.items()}
        )["loss"]
        * len(images[at : at + 64])
        for at in range(0, len(images), 64)
    ]
    return {"loss": float(sum(losses)) / len(images)}


@torch.no_grad()
def recall(model: Blip2, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Recall at 1 and 5 of texts by pictures and of pictures by texts; equal texts are right for each other."""
    found = nearest(model.embed_image(images), model.embed_text(texts))
    names = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    numbers = torch.tensor([names[text] for text in texts], device=found.device)
    right = numbers[:, None] == numbers
    scores = {}
    for way, table in (("image_to_text", found), ("text_to_image", found.T)):
        for k in (1, 5):
            best = table.topk(min(k, len(texts)), dim=1).indices
            scores[f"{way}_recall@{k}"] = float(right.gather(1, best).any(1).float().mean())
    return scores
