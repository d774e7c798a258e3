"""`reverie plan`: what a run needs and how long it takes on machines that are not here.

The system of a recipe is built on torch's device "meta" from its configuration, so it has shapes and no memory; one
device's share of its training step is run forward and backward there and counted (`planning/counting.py`), and a
roofline of the GPU in question turns the count into seconds (`planning/roofline.py`). No formula belongs to a system,
so what changes the step changes the plan: recompute, gradient caching, dropped patches, locked towers, adapters.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reverie.backbones.dit import SCALES, DitConfig
from reverie.bridges.qformer import QformerConfig
from reverie.codecs.dvae import Dvae, DvaeConfig
from reverie.codecs.video_vae import VideoVae
from reverie.codecs.vq import VqConfig, VqVae
from reverie.data.dropping import check_share, kept_count
from reverie.encoders.clip_resnet import ClipResnetConfig
from reverie.encoders.navit import NavitConfig
from reverie.encoders.text import Text
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.objectives.contrastive import Peers
from reverie.objectives.perceptual import tiled
from reverie.planning import roofline
from reverie.planning.counting import PRECISIONS, Count, along, count, on_shapes
from reverie.planning.hardware import GB, device
from reverie.planning.roofline import Memory, Setup, Time, Weights
from reverie.recipes import (
    blip,
    blip2,
    blip_answers,
    clip,
    clip_finetune,
    clip_native,
    dalle,
    distil,
    dit,
    judge,
    picture_codes,
    sora,
    video_vae,
)
from reverie.recipes.sora_batches import SoraRun
from reverie.systems.blip import BASE, LARGE, Blip, BlipConfig
from reverie.systems.blip2 import EVA_G, Blip2, Blip2Config, SightConfig
from reverie.systems.blip_tasks import BlipVqa
from reverie.systems.blip_training import BlipTraining
from reverie.systems.classifier import Classifier, ClassifierConfig
from reverie.systems.clip import Clip, ClipConfig
from reverie.systems.clip_models import MODELS
from reverie.systems.dalle import Dalle, DalleConfig
from reverie.systems.dit import DiffusionTransformer, DiffusionTransformerConfig
from reverie.systems.sora import Sora, SoraConfig
from reverie.train.engine import recompute
from reverie.train.gradient_cache import cached
from reverie.train.parallel import blocks_of

VOCAB = 4096  # pieces that the small recipes train at most
JPEG = 25e3 / 256**2  # bytes of a pixel: LAION-400M's pictures of 256 pixels, 10 TB of 400 M
STICKERS = 1949  # names of the held-out sticker styles


@dataclass(frozen=True, kw_only=True)
class How:
    """What changes a step, besides the machines. `words` 0: as long as the text tower takes."""

    precision: str = "bf16"
    fused: bool = True
    recompute: bool = False
    chunk: int = 0
    drop: float = 0.0
    drop_text: float = 0.0
    words: int = 0
    lock: str = ""
    lora: int = 0


Loss = Callable[[Any, int, How, Peers], Tensor]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One batch of a step: `batch` items on all devices together, each of so many pixels, and the loss of some."""

    what: str
    batch: int
    pixels: int
    loss: Loss
    towers: Loss | None = (
        None  # where the loss can be taken of chunks: what they cost, and the rest of the loss
    )
    compare: Loss | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is planned: how its model is built, and the batches of its step."""

    name: str
    build: Callable[[], nn.Module]
    parts: tuple[Part, ...]
    steps: int
    ema: bool = True


# ---------------------------------------------------------------- systems as shapes


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _clip_batch(model: Clip, items: int, how: How) -> dict[str, Tensor]:
    image, text = model.config.image, model.config.text
    words = how.words or text.length
    if not 1 <= words <= text.length or (text.pool == "last" and words < text.length):
        raise InputError(f"words is {words}, but this text tower reads {text.length} at most: give no more.")
    batch = {
        "image": _empty(items, 3, image.size, image.size),
        "tokens": _empty(items, kept_count(words, how.drop_text), dtype=torch.long),
    }
    if how.drop:
        if isinstance(image, ClipResnetConfig):
            raise InputError(f"drop is {how.drop}, but a ResNet has no patches to drop: give 0.")
        batch["keep"] = _empty(
            items, kept_count((image.size // image.patch) ** 2, how.drop), dtype=torch.long
        )
    return batch


def _embed(model: Clip) -> Callable[[Mapping[str, Any]], tuple[Tensor, ...]]:
    return lambda batch: model.embed(dict(batch))


def _clip_loss(model: Clip, items: int, how: How, peers: Peers) -> Tensor:
    vectors = cached(_embed(model), _clip_batch(model, items, how), chunk=how.chunk)
    return model.compare(*vectors, peers=peers)["loss"]


def _clip_towers(model: Clip, items: int, how: How, peers: Peers) -> Tensor:
    """The towers alone; what stands for the loss has no products."""
    image, text = cached(_embed(model), _clip_batch(model, items, how), chunk=how.chunk)
    return (image + text).sum()


def _clip_compare(model: Clip, items: int, how: How, peers: Peers) -> Tensor:
    """The loss alone, of vectors that need gradients."""
    vectors = (_empty(items, model.config.width).requires_grad_() for _ in range(2))
    return model.compare(*vectors, peers=peers)["loss"]


def _clip(name: str, config: ClipConfig, how: How, *, batch: int, steps: int, ema: bool) -> Subject:
    def build() -> Clip:
        model = Clip(config)
        return model

    part = Part(
        what="pictures", batch=batch, pixels=config.image.size**2, loss=_clip_loss, towers=_clip_towers,
        compare=_clip_compare,
    )  # fmt: skip
    return Subject(name=name, build=build, parts=(part,), steps=steps, ema=ema)


def _sora_batch(model: Sora, items: int, how: How, frames: int) -> dict[str, Any]:
    latents = _empty(items, *model.latent_shape(frames, model.size_of(frames)))
    return {
        "latents": latents,
        "noise": torch.empty_like(latents),
        "normal": _empty(items),
        "tokens": _empty(items, how.words or model.config.text.length, dtype=torch.long),
        "drop": _empty(items, dtype=torch.bool),
        "known": _empty(items, latents.shape[2], dtype=torch.bool),
    }


def _sora_loss(model: Sora, items: int, how: How, peers: Peers, *, frames: int) -> Tensor:
    return model.loss(_sora_batch(model, items, how, frames))["loss"]


def _distil_loss(
    model: Sora, items: int, how: How, peers: Peers, *, frames: int, own: Mapping[str, Any]
) -> Tensor:
    """The student's step and the teacher's without gradients, by one model: the teacher's weights are not counted."""
    count_of = own["student_steps"]
    run = distil.DistilRun(
        items=SoraRun(model=model.config, steps=1, batch=items, clips=0), teacher="", weights="",
        inside=own["teacher_steps"] // count_of, guidance=4.0, own=own["own"],
    )  # fmt: skip
    model.config = replace(model.config, steps=count_of, guidance=1.0)
    batch = _sora_batch(model, items, how, frames) | {"which": count_of // 2, "own": False}
    return distil.loss(model, model, run, batch)["loss"]


def _sora(
    name: str,
    config: SoraConfig,
    *,
    batch: int,
    clips: int,
    clip_frames: int,
    steps: int,
    loss_of: Any = _sora_loss,
) -> Subject:
    loss = partial(loss_of, frames=1)
    parts = [Part(what="pictures", batch=batch, pixels=math.prod(config.size), loss=loss)]
    if clips:
        pixels = config.frames * math.prod(config.clip_size or config.size)  # the whole clip is decoded
        loss = partial(loss_of, frames=clip_frames)
        parts.append(Part(what="clips", batch=clips, pixels=pixels, loss=loss))
    return Subject(name=name, build=lambda: Sora(config), parts=tuple(parts), steps=steps)


def _dit(name: str, own: Mapping[str, Any], *, batch: int, steps: int, size: int) -> Subject:
    """Of the world in pixels; at the papers' sizes in latents that are there, an eighth of a side, of 1,000 classes."""
    if name == "dit-world":
        sizes, classes, channels, side = (
            (own["depth"], own["width"], dit.heads_of(own["width"])),
            110,
            3,
            size,
        )
    else:
        sizes, classes, channels, side = SCALES[own["scale"]], 1000, 4, size // 8
    if side < own["patch"] or side % own["patch"]:
        raise InputError(f"size is {size}: give a multiple of {own['patch'] * size // max(side, 1)}.")
    depth, width, heads = sizes
    config = DiffusionTransformerConfig(
        backbone=DitConfig(
            channels=channels,
            size=side,
            patch=own["patch"],
            width=width,
            depth=depth,
            heads=heads,
            classes=classes,
        )
    )
    part = Part(what="pictures", batch=batch, pixels=size**2, loss=_dit_loss)
    return Subject(name=name, build=lambda: DiffusionTransformer(config), parts=(part,), steps=steps)


def _vae_loss(model: VideoVae, items: int, how: How, peers: Peers, *, frames: int, size: int) -> Tensor:
    """With the CLIP that looks at the drawings, and without a discriminator."""
    with on_shapes():
        seen = Clip(clip.shape(VOCAB, VOCAB - 1)).eval().requires_grad_(False)
    features = tiled(seen.layers, seen.config.image.size)
    game = video_vae.Game(video_vae.Weights(), model, None, features=features)
    noise = _empty(items, *model.latent_shape(frames, (size, size)))
    return game.codec_loss({"video": _empty(items, 3, frames, size, size), "noise": noise, "step": 0})["loss"]


def _dit_loss(model: DiffusionTransformer, items: int, how: How, peers: Peers) -> Tensor:
    config = model.config.backbone
    latents = _empty(items, config.channels, config.size, config.size)
    return model.loss(
        {
            "latents": latents,
            "noise": torch.empty_like(latents),
            "classes": _empty(items, dtype=torch.long),
            "drop": _empty(items, dtype=torch.bool),
            "uniform": _empty(items),
        }
    )["loss"]


def _codes_loss(model: picture_codes.Learner, items: int, how: How, peers: Peers) -> Tensor:
    """Without a discriminator; VQGAN's with the CLIP that looks at the drawings."""
    size, codec = model.config.size, model.codec
    batch = {"image": _empty(items, 3, size, size), "step": 0, "temperature": 1.0, "beta": 1.0}
    if isinstance(codec, Dvae):
        side = size // codec.stride
        batch["noise"] = _empty(items, codec.vocab, side, side)
    else:
        with on_shapes():
            seen = Clip(clip.shape(VOCAB, VOCAB - 1)).eval().requires_grad_(False)
        model.features = tiled(seen.layers, seen.config.image.size)
    return model.loss(batch)["loss"]


def _codes(name: str, own: Mapping[str, Any], *, batch: int, steps: int, size: int) -> Subject:
    network: DvaeConfig | VqConfig
    if name.startswith("dvae"):
        network = DvaeConfig()
        if name == "dvae-tiny":
            network = DvaeConfig(
                vocab=own["vocab"],
                width=own["width"],
                groups=own["groups"],
                depth=own["depth"],
                begin=2 * own["width"],
            )
    else:
        network = (
            VqConfig() if name == "vqgan-paper" else picture_codes.small_vq(own["width"], own["levels"], own)
        )
    learns = picture_codes.Relaxed() if isinstance(network, DvaeConfig) else picture_codes.Coded()
    config = picture_codes.CodecRun(
        model=network, learns=learns, steps=steps, batch=batch, size=size, lr=own["lr"]
    )
    part = Part(what="pictures", batch=batch, pixels=size**2, loss=_codes_loss)
    return Subject(name=name, build=lambda: picture_codes.Learner(config), parts=(part,), steps=steps)


def _dalle_loss(model: Dalle, items: int, how: How, peers: Peers) -> Tensor:
    network = model.config.backbone
    codes = _empty(items, network.rows, network.columns, dtype=torch.long)
    return model.loss({"codes": codes, "tokens": _empty(items, network.length, dtype=torch.long)})["loss"]


def _dalle(name: str, own: Mapping[str, Any], *, batch: int, steps: int, size: int) -> Subject:
    """Codes of 8 x 8 pixels at the paper's size, of 4 x 4 at the small ones; they are there."""
    paper = name == "dalle-paper"
    codec = DvaeConfig() if paper else picture_codes.small_vq(32, 3, {"vocab": 1024, "dim": 32})
    with on_shapes():
        built = Dvae(codec) if isinstance(codec, DvaeConfig) else VqVae(codec)
    config = dalle.shape(
        "dalle", built, sizes=(own["depth"], own["width"]), attention=own.get("attention", "sparse"),
        length=own.get("length", 256), size=size, words=16_384 if paper else 1024,
    )  # fmt: skip
    assert isinstance(config, DalleConfig)
    part = Part(what="pictures", batch=batch, pixels=size**2, loss=_dalle_loss)
    return Subject(name=name, build=lambda: Dalle(config), parts=(part,), steps=steps)


def _judge_loss(model: Classifier, items: int, how: How, peers: Peers) -> Tensor:
    size = model.config.size
    pictures = _empty(items, 3, size, size)
    return model.loss(
        {
            "image": pictures,
            "other": torch.empty_like(pictures),
            "label": _empty(items, dtype=torch.long),
        }
    )["loss"]


def _pictures_and_words(items: int, size: int, words: int) -> dict[str, Any]:
    return {
        "image": _empty(items, 3, size, size),
        "tokens": _empty(items, words, dtype=torch.long),
        "label": _empty(items, dtype=torch.long),
        "draws": _empty(items, 2),
        "alpha": 0.4,
    }


def _blip_loss(model: BlipTraining, items: int, how: How, peers: Peers, *, words: int) -> Tensor:
    batch = _pictures_and_words(items, model.blip.config.image.size, how.words or words)
    return model.loss(batch, peers=peers)["loss"]


def _answers_loss(model: BlipVqa, items: int, how: How, peers: Peers, *, words: int) -> Tensor:
    """One answer of ten tokens to each question."""
    batch = _pictures_and_words(items, model.config.image.size, how.words or words)
    answers = {
        "answers": _empty(items, 10, dtype=torch.long),
        "question": _empty(items, dtype=torch.long),
        "weight": _empty(items),
    }
    return model.loss(batch | answers)["loss"]


def _blip2_loss(model: Blip2, items: int, how: How, peers: Peers, *, words: int) -> Tensor:
    batch = _pictures_and_words(items, model.config.sight.image.size, how.words or words)
    return model.loss(batch, peers=peers)["loss"]


WORDS = SimpleNamespace(vocab=VOCAB, pad=0, special={"[CLS]": 2, "[SEP]": 3, "[DEC]": 4, "[ENC]": 5})


def _blip(name: str, own: Mapping[str, Any], *, batch: int, steps: int, size: int | None) -> Subject:
    """BLIP's and BLIP-2's; what begins with given weights is as the small shape has it."""
    run, paper = blip.BlipRun.__dataclass_fields__, name.startswith("blip-paper")
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    if name.startswith("blip2"):
        tower = EVA_G if name == "blip2-paper-stage1" else clip.shape(VOCAB, VOCAB - 1, size=size or 64).image
        assert isinstance(tower, VitConfig)
        asks = {key: own[key] for key in ("queries", "width", "depth") if key in own}
        if asks:
            asks |= {"heads": own["width"] // 64, "hidden": 4 * own["width"], "vocab": VOCAB, "length": 48}
        qformer = QformerConfig(context_width=tower.width, **asks)
        tower = replace(tower, size=size or tower.size)
        second = Blip2Config(sight=SightConfig(image=tower, qformer=qformer))
        build, loss = (lambda: Blip2(second)), _blip2_loss
        words, pixels = blip2.Blip2Run.length, tower.size**2
    else:
        words = 64 if name == "blip-world" else blip.BlipRun.length
        if paper:
            shape = blip.paper_shape(LARGE if name.endswith("large") else BASE, size=size or 224)
        else:
            shape = blip.shape(WORDS, size=size or 64, patch=8 if name == "blip-world" else 16)  # type: ignore[arg-type]
        pixels = shape.image.size**2
        queue = own.get("queue", run["queue"].default)
        task = own.get("task", "all")
        build = partial(_training, shape, queue=queue, reads=task != "caption", writes=task != "retrieval")
        loss = _blip_loss
        if name == "blip-answers":
            build, loss, words = (lambda: BlipVqa(blip_answers.halves(shape))), _answers_loss, 35
    part = Part(what="pictures", batch=batch, pixels=pixels, loss=partial(loss, words=words))
    return Subject(
        name=name, build=build, parts=(part,), steps=steps, ema=not paper and name != "blip2-paper-stage1"
    )


def _training(shape: BlipConfig, **how: Any) -> BlipTraining:
    return BlipTraining(Blip(shape), **how)


# ---------------------------------------------------------------- by name


def _defaults(recipe: Callable[..., Any]) -> dict[str, Any]:
    return {name: part.default for name, part in inspect.signature(recipe).parameters.items()}


def names() -> list[str]:
    """Everything that can be planned."""
    scales = [f"sora-dit:{scale}" for scale in sora.DIT]
    return [*_RECIPES, *scales, *(f"clip:{name}" for name in MODELS)]


UNKNOWN = ("blip2-stage2", "blip2-paper-stage2")
_RECIPES: dict[str, Callable[..., Any]] = {
    "clip-tiny": clip.tiny,
    "clip-stickers": clip.stickers,
    "clip-world": clip.world,
    "clip-paper-b32": clip.paper_b32,
    "clip-native": clip_native.native,
    "clip-finetune": clip_finetune.finetune,
    "blip-tiny": blip.tiny,
    "blip-stickers": blip.stickers,
    "blip-world": blip.world,
    "blip-finetune": blip.finetune,
    "blip-answers": blip_answers.answers,
    "blip-paper-base": blip.paper_base,
    "blip-paper-large": blip.paper_large,
    "blip2-stage1": blip2.stage1,
    "blip2-paper-stage1": blip2.paper_stage1,
    "sora-tiny": sora.tiny,
    "sora-stickers": sora.stickers,
    "sora-world": sora.world,
    "sora-dit": sora.dit,
    "sora-distil": distil.sora,
    "dit-world": dit.world,
    "dit-imagenet": dit.imagenet,
    "dalle-tiny": dalle.tiny,
    "dalle-stickers": dalle.stickers,
    "dalle-world": dalle.world,
    "dalle-paper": dalle.paper,
    "dvae-tiny": picture_codes.dvae,
    "dvae-paper": picture_codes.paper_dvae,
    "vqgan-tiny": picture_codes.vqgan,
    "vqgan-paper": picture_codes.paper_vqgan,
    "video-vae-stickers": video_vae.stickers,
    "video-vae-world": video_vae.world,
    "judge-stickers": judge.stickers,
}


def subject(
    name: str, how: How, *, batch: int | None, clips: int | None, steps: int | None, size: int | None
) -> Subject:
    """The system and the step of a recipe, of `clip:NAME` (a public shape) or `sora-dit:SCALE`.

    What is not given is as the recipe has it; of the public shapes, as CLIP's paper has it (32 epochs of 400 million
    pairs in batches of 32,768). InputError: there is no such name, or the size does not fit.
    """
    kind, _, rest = name.partition(":")
    if kind == "clip" and rest in MODELS:
        shape = MODELS[rest]
        if size is not None:
            assert not isinstance(shape.image, NavitConfig), "no public shape"
            shape = replace(shape, image=replace(shape.image, size=size))
        paper = _defaults(clip.paper_b32)
        return _clip(
            name, shape, how, batch=batch or paper["batch"], steps=steps or paper["steps"], ema=False
        )
    scale = rest if kind == "sora-dit" and rest in sora.DIT else ""
    if name in UNKNOWN:
        raise InputError(
            f"{name} trains before a language model of your own, whose shape a plan does not know: plan blip2-stage1."
        )
    if name not in _RECIPES and not scale:
        from difflib import get_close_matches

        close = get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names())}."
        raise InputError(f"There is no recipe {name!r} to plan: {hint}")
    own = _defaults(_RECIPES[kind if scale else name])
    if usual := sora.AMOUNTS.get(kind):
        own |= asdict(usual)
    if kind == "clip-native":  # of the largest pictures
        native = clip_native.shape(VOCAB, VOCAB - 1, size=size or own["size"])
        assert isinstance(native.image, NavitConfig)
        many = own["packs"] * own["budget"] // native.image.patches
        return _clip(name, native, how, batch=batch or many, steps=steps or own["steps"], ema=True)
    batch, steps = batch or own["batch"], steps or own["steps"]
    if kind.startswith("blip"):
        return _blip(name, own, batch=batch, steps=steps, size=size)
    if kind.startswith("clip"):
        if name == "clip-paper-b32":
            return _clip(name, ClipConfig(), how, batch=batch, steps=steps, ema=False)
        shape = clip.shape(VOCAB, VOCAB - 1, size=size or own.get("size", 64))
        return _clip(name, shape, how, batch=batch, steps=steps, ema=True)
    if kind.startswith("sora"):
        with on_shapes():
            reader = (
                Clip(ClipConfig()) if kind == "sora-dit" else Clip(clip.shape(VOCAB, VOCAB - 1))
            )  # whose text tower reads
        sizes = sora.DIT[scale or own["scale"]] if kind == "sora-dit" else sora.TINY
        if name == "sora-distil":  # its teacher is not known: as the shipped one
            own = {key: _defaults(sora.stickers)[key] for key in ("size", "clip_size", "frames")} | own
        size, clips = size or own.get("size", 64), own["clips"] if clips is None else clips
        if name in ("sora-stickers", "sora-distil"):
            config = sora.stickers_shape(reader, size=size, clip_size=own["clip_size"], frames=own["frames"])
        else:
            config = sora.shape(reader, size=size, sizes=sizes)
        whole = name in (
            "sora-stickers",
            "sora-distil",
        )  # clips are seen whole, else as many frames as is usual
        clip_frames = config.frames if whole else SoraRun.clip_frames
        loss_of = partial(_distil_loss, own=own) if name == "sora-distil" else _sora_loss
        return _sora(
            name, config, batch=batch, clips=clips, clip_frames=clip_frames, steps=steps, loss_of=loss_of
        )
    if kind.startswith(("dvae-", "vqgan-")):
        return _codes(name, own, batch=batch, steps=steps, size=size or own["size"])
    if kind.startswith("dalle-"):
        return _dalle(name, own, batch=batch, steps=steps, size=size or own["size"])
    if kind in ("dit-world", "dit-imagenet"):
        return _dit(name, own, batch=batch, steps=steps, size=size or own["size"])
    if kind == "judge-stickers":
        labels = tuple(str(i) for i in range(STICKERS))
        judged = ClassifierConfig(names=labels, size=size or own["size"])
        part = Part(what="pairs", batch=batch, pixels=2 * judged.size**2, loss=_judge_loss)
        return Subject(name=name, build=lambda: Classifier(judged), parts=(part,), steps=steps)
    codec = video_vae.shape(own["stride"], channels=own["channels"], width=own["width"])
    stride = codec.stride[1]
    if size is not None and size % stride:
        raise InputError(
            f"size is {size}: give a multiple of {stride}, such as {max(size // stride, 1) * stride}."
        )
    size, frames = size or own["size"], own["frames"]  # the most that a step has
    parts = [
        Part(what="pictures", batch=batch, pixels=size**2, loss=partial(_vae_loss, frames=1, size=size)),
        Part(
            what="clips",
            batch=own["clips"] if clips is None else clips,
            pixels=video_vae.KEPT_FRAMES * size**2,
            loss=partial(_vae_loss, frames=frames, size=size),
        ),
    ]
    return Subject(
        name=name,
        build=lambda: VideoVae(codec),
        parts=tuple(part for part in parts if part.batch),
        steps=steps,
    )


# ---------------------------------------------------------------- counting a step


def model_of(what: Subject, how: How) -> nn.Module:
    """The model on "meta", with what is locked, adapted and computed again. Of shapes no token is known, so none is
    checked and no padding cut: texts have as many words as `how` says."""
    with on_shapes():
        model = what.build()
    if how.lock or how.lora:
        if not isinstance(model, Clip):
            raise InputError(f"{what.name} has no towers to lock or adapt: leave lock and lora out.")
        clip_finetune.restrict(model, lock=how.lock, lora=how.lora)
    for module in model.modules():
        if isinstance(module, Text):
            module.check = lambda tokens: None  # type: ignore[method-assign]
            module.trim = lambda tokens: tokens  # type: ignore[method-assign]
    if how.recompute and not recompute(model):
        raise InputError(f"{what.name} has no stack of blocks to compute again: leave recompute out.")
    return model


def tally(model: nn.Module, part: Part, items: int, how: How, *, peers: int) -> Count:
    """The loss of `items` on one of `peers` devices, forward and backward."""
    run = partial(count, model, precision=how.precision, fused=how.fused)

    def of(loss: Loss, items: int, peers: int = 1) -> Count:
        return run(lambda others: loss(model, items, how, others), peers=peers)

    chunks = -(-items // how.chunk) if how.chunk else 1
    if chunks <= 4 or part.towers is None or part.compare is None:
        return of(part.loss, items, peers)
    # every chunk costs the same: two and four of them say what all cost
    some, more = (of(part.towers, number * how.chunk) for number in (2, 4))
    towers = along(some, more, (items / how.chunk - 2) / 2)
    compared = of(part.compare, items, peers)
    both = towers + compared
    return replace(both, kept=towers.kept, peak=max(towers.peak, towers.kept + compared.peak))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs. Sizes in bytes, times in seconds; a sample is an item of any batch of the step."""

    name: str
    setup: Setup
    how: How
    steps: int
    accumulate: int
    batches: dict[str, int]  # what -> items of a step on all devices
    each: dict[str, int]  # what -> items that are in one device's memory at a time
    parameters: int
    trained: int
    flops: float  # of one sample, forward and backward
    forward_flops: float
    memory: Memory
    time: Time
    price: float
    data: float  # bytes of media a second, all devices together
    largest: int = 0  # items of the first batch that fit one device at a time; 0: none
    remedies: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Of one step."""
        return sum(self.batches.values())

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.setup.device.memory * GB

    @property
    def rate(self) -> float:
        """Samples a second, all devices together."""
        return self.samples / self.time.step

    @property
    def days(self) -> float:
        return self.steps * self.time.step / 86_400

    @property
    def device_days(self) -> float:
        return self.days * self.setup.gpus

    @property
    def cost(self) -> float:
        return self.device_days * 24 * self.price

    @property
    def utilisation(self) -> float:
        """The share of the peak that the step's FLOPs are."""
        peak = self.setup.device.peak(self.setup.precision)
        return self.flops * self.samples / self.setup.gpus / self.time.step / peak

    def numbers(self) -> dict[str, Any]:
        """Everything as plain data."""
        memory = self.memory
        return {
            "recipe": self.name,
            "gpu": self.setup.device.name,
            "gpus": self.setup.gpus,
            "precision": self.setup.precision,
            "shard": self.setup.shard,
            "steps": self.steps,
            "accumulate": self.accumulate,
            "batches": self.batches,
            "per_device": self.each,
            "parameters": self.parameters,
            "trained": self.trained,
            "flops_per_sample": self.flops,
            "forward_flops_per_sample": self.forward_flops,
            "memory": {
                name: getattr(memory, name)
                for name in (
                    "total", "weights", "gradients", "optimizer", "ema", "gathered", "activations", "reserve",
                )
            },
            "fits": self.fits,
            "largest_batch_per_device": self.largest,
            "remedies": list(self.remedies),
            "step_seconds": self.time.step,
            "step_seconds_at_the_roofline": self.time.ideal,
            "samples_per_second": self.rate,
            "share_of_peak": self.utilisation,
            "bytes_sent_per_step": self.time.bytes_sent,
            "media_bytes_per_second": self.data,
            "days": self.days,
            "gpu_days": self.device_days,
            "price_per_hour": self.price,
            "cost": self.cost,
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(_told(self))


def plan(
    name: str,
    *,
    gpu: str = "a100-80",
    gpus: int = 1,
    batch: int | None = None,
    clips: int | None = None,
    steps: int | None = None,
    samples: float | None = None,
    size: int | None = None,
    precision: str = "",
    shard: str = "",
    recompute: bool = False,
    chunk: int = 0,
    accumulate: int = 1,
    words: int = 0,
    drop: float = 0.0,
    drop_text: float = 0.0,
    unmasked: float = 0.1,
    lock: str = "",
    lora: int = 0,
    fused: bool = True,
    price: float | None = None,
) -> Plan:
    """What a run of the recipe `name` needs on `gpus` of `gpu`. Settings as `reverie plan --help` tells them."""
    where = device(gpu)
    precision = precision or where.best()
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}: give one of {', '.join(PRECISIONS)}.")
    for named, value, least in (
        ("batch", batch, 1), ("clips", clips, 0), ("steps", steps, 1), ("samples", samples, 1), ("size", size, 1),
        ("chunk", chunk, 0), ("accumulate", accumulate, 1), ("words", words, 0), ("price", price, 0),
    ):  # fmt: skip
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{named} is {value:g}: give a number from {least}.")
    check_share("drop", drop)
    check_share("drop_text", drop_text)
    if not 0 <= unmasked <= 1:
        raise InputError(f"unmasked is {unmasked}: give a share of the steps, from 0 to 1.")
    how = How(
        precision=precision, fused=fused, recompute=recompute, chunk=chunk, drop=drop, drop_text=drop_text,
        words=words, lock=lock, lora=lora,
    )  # fmt: skip
    what = subject(name, how, batch=batch, clips=clips, steps=steps, size=size)
    if clips is not None and what.parts[0].towers is not None:
        raise InputError(f"{name} learns from no clips: leave clips out.")
    if (chunk or drop or drop_text) and what.parts[0].towers is None:
        raise InputError(f"{name} learns no pictures by texts: leave chunk, drop and drop_text out.")
    if samples is not None and steps is not None:
        raise InputError("steps and samples were both given: give one of them.")
    if samples is not None:
        what = replace(what, steps=math.ceil(samples / (accumulate * sum(part.batch for part in what.parts))))
    setup = Setup(
        device=where,
        gpus=gpus,
        shard=shard or ("none" if gpus == 1 else "ddp"),
        precision=precision,
        ema=what.ema,
        passes=accumulate * len(what.parts),
    )
    return draw_up(
        what, how, setup, accumulate=accumulate, unmasked=unmasked if drop or drop_text else 1.0, price=price
    )


def draw_up(
    what: Subject,
    how: How,
    setup: Setup,
    *,
    accumulate: int = 1,
    unmasked: float = 1.0,
    price: float | None = None,
    advise: bool = True,
) -> Plan:
    """The plan of a subject. `unmasked`: the share of the steps in which nothing is dropped. `advise`: also find the
    largest batch that fits and, where the plan does not, what would."""
    for part in what.parts:
        if part.batch % setup.gpus:
            batch = (
                f"a batch of {part.batch:,}" if len(what.parts) == 1 else f"{part.batch:,} {part.what} a step"
            )
            raise InputError(
                f"{batch} cannot be shared by {setup.gpus:,} devices equally: give"
                f" {-(-part.batch // setup.gpus) * setup.gpus:,}."
            )
    model = model_of(what, how)
    weights = Weights.of(model)
    each = {part.what: -(-part.batch // setup.gpus) for part in what.parts}
    whole = replace(how, drop=0.0, drop_text=0.0)
    ways = [(how, 1 - unmasked), (whole, unmasked)] if unmasked < 1 else [(whole, 1.0)]
    counts = [
        (_all_parts(model, what, each, way, peers=setup.gpus), share) for way, share in ways if share > 0
    ]
    times = [(roofline.seconds(found.times(accumulate), weights, setup), share) for found, share in counts]
    needed = max((roofline.memory(found, weights, setup) for found, _ in counts), key=lambda it: it.total)
    time = _mean(times)
    of_step = sum(share * found.flops for found, share in counts) * setup.gpus
    forward = sum(share * found.forward_flops for found, share in counts) * setup.gpus
    items = sum(each.values()) * setup.gpus
    batches = {part.what: part.batch * accumulate for part in what.parts}
    media = sum(part.pixels * JPEG * part.batch for part in what.parts) * accumulate
    result = Plan(
        name=what.name, setup=setup, how=how, steps=what.steps, accumulate=accumulate, batches=batches, each=each,
        parameters=weights.all, trained=weights.trained, flops=of_step / items, forward_flops=forward / items,
        memory=needed, time=time, price=setup.device.price if price is None else price, data=media / time.step,
    )  # fmt: skip
    if not advise:
        return result
    found = max((found for found, _ in counts), key=lambda it: it.peak)
    if not how.chunk:
        largest = _largest(model, what, each, whole if unmasked else how, setup, weights, found)
        result = replace(result, largest=largest)
    if result.fits:
        return result
    return replace(result, remedies=tuple(_remedies(what, whole, setup, each, found, result.largest)))


def _all_parts(model: nn.Module, what: Subject, each: dict[str, int], how: How, *, peers: int) -> Count:
    total: Count | None = None
    for part in what.parts:
        one = tally(model, part, each[part.what], how, peers=peers)
        total = one if total is None else total + one
    assert total is not None, "a step has a batch"
    return total


def _mean(times: Sequence[tuple[Time, float]]) -> Time:
    """Of times with their shares of the steps."""

    def of(name: str) -> float:
        return sum(share * getattr(time, name) for time, share in times)

    sent = {key for time, _ in times for key in time.bytes_sent}
    return Time(
        products=of("products"), attention=of("attention"), moving=of("moving"), update=of("update"),
        communication=of("communication"), exposed=of("exposed"), attained=times[0][0].attained,
        bytes_sent={key: sum(share * time.bytes_sent.get(key, 0.0) for time, share in times) for key in sent},
    )  # fmt: skip


def _largest(
    model: nn.Module,
    what: Subject,
    each: dict[str, int],
    how: How,
    setup: Setup,
    weights: Weights,
    found: Count,
) -> int:
    """How many items of the first batch one device can hold at a time: what is alive grows in proportion to them.
    `found`: the step as it is planned."""
    part, room = what.parts[0], setup.device.memory * GB

    def needs(items: int) -> int:
        return roofline.memory(tally(model, part, items, how, peers=setup.gpus), weights, setup).total

    first = each[part.what]
    other = first // 2 if first > 1 else 2
    least, here = needs(other), roofline.memory(found, weights, setup).total
    slope = max((here - least) / (first - other), 1.0)
    return max(math.floor(other + (room - least) / slope), 0)


def _remedies(
    what: Subject, how: How, setup: Setup, each: dict[str, int], found: Count, largest: int
) -> list[str]:
    """What would make it fit, each counted, not guessed. `found`: the step as it is planned."""
    ways, model = [(False, found)], model_of(what, how)
    weights = Weights.of(model)
    if not how.recompute and blocks_of(model):
        less = replace(how, recompute=True)
        ways.append((True, _all_parts(model_of(what, less), what, each, less, peers=setup.gpus)))
    told, shards = [], ("fsdp",) if setup.gpus > 1 and setup.shard != "fsdp" else ()
    for again, needed in ways:
        for shard in (setup.shard, *shards):
            other = roofline.memory(needed, weights, replace(setup, shard=shard))
            if other.total <= setup.device.memory * GB:
                flags = ["--shard fsdp"] * (shard != setup.shard) + ["--recompute"] * again
                told.append(f"{' '.join(flags)}: {_size(other.total)}")
    part = what.parts[0]
    if 0 < largest < each[part.what]:
        if part.towers is not None:
            chunk = 2 ** int(math.log2(largest))
            told.append(
                f"--chunk {chunk}: the same batch and negatives, {chunk} at a time, each embedded twice"
            )
        else:
            share = -(-each[part.what] // largest)
            told.append(
                f"--batch {setup.gpus * (each[part.what] // share)} --accumulate {share}: the step in {share} parts"
            )
    return told or ["more or larger devices alone"]


# ---------------------------------------------------------------- in words


def _size(count_of: float) -> str:
    if count_of < 1e6:
        return f"{count_of / 1e3:.0f} kB"
    return f"{count_of / 1e6:.0f} MB" if count_of < 1e9 else f"{count_of / 1e9:.1f} GB"


def _number(value: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:,.0f} "


def _told(it: Plan) -> list[str]:
    setup, time, need = it.setup, it.time, it.memory
    where = f"{setup.gpus:,} x {setup.device.name}" if setup.gpus > 1 else setup.device.name
    how = [
        setup.precision,
        "sharded (fsdp)" if setup.shard == "fsdp" else setup.shard if setup.gpus > 1 else "",
    ]
    how += ["recompute"] * it.how.recompute + [f"chunks of {it.how.chunk:,}"] * bool(it.how.chunk)
    how += [f"{it.how.drop:.0%} of the patches dropped"] * bool(it.how.drop)
    step = " and ".join(f"{number:,} {what}" for what, number in it.batches.items())
    held = " and ".join(f"{number:,} {what}" for what, number in it.each.items())
    frozen = "" if it.trained == it.parameters else f", {_number(it.trained).strip()} of them trained"
    parts = {
        "weights": need.weights, "gradients": need.gradients, "AdamW": need.optimizer, "average": need.ema,
        "gathered blocks": need.gathered, "activations": need.activations, "driver and waste": need.reserve,
    }  # fmt: skip
    total = time.ideal or 1.0
    shares = {
        "products": time.products, "attention": time.attention, "moving bytes": time.moving,
        "update": time.update, "waiting for others": time.exposed,
    }  # fmt: skip
    lines = [
        f"{it.name} on {where} ({', '.join(filter(None, how))})",
        f"  parameters   {_number(it.parameters).strip()}{frozen}",
        f"  a step       {step}" + (f" in {it.accumulate} parts" if it.accumulate > 1 else "")
        + (f"; {held} on each device" if setup.gpus > 1 else "") + f"; {it.steps:,} steps",
        f"  a sample     {_number(it.flops)}FLOPs, {_number(it.forward_flops).strip()} of them forward",
        f"  memory       {_size(need.total)} of {setup.device.memory:.4g} GB on each device: "
        + ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size),
        f"  fits         {'yes' if it.fits else 'NO'}"
        + (f"; up to {it.largest:,} {next(iter(it.each))} on each device at a time" * (not it.how.chunk)),
    ]  # fmt: skip
    lines += [f"               it would with {remedy}" for remedy in it.remedies]
    lines += [
        f"  time         {time.step:.3g} s a step expected, {time.ideal:.3g} s at the roofline: "
        + ", ".join(
            f"{name} {value / total:.0%}" for name, value in shares.items() if value / total >= 0.005
        ),
        f"  throughput   {it.rate:,.0f} samples/s, {it.rate / setup.gpus:,.1f} on each device;"
        f" {it.utilisation:.0%} of the peak",
    ]
    if setup.gpus > 1:
        speed = "the links of a node" if setup.gpus <= setup.device.node else "links and network"
        sent = ", ".join(f"{name} {_size(size)}" for name, size in sorted(time.bytes_sent.items()))
        lines.append(
            f"  sent         {sent} by each device in a step over {speed};"
            f" {time.communication:.2g} s, of which {time.exposed:.2g} s are not hidden"
        )
    lines.append(f"  data         {it.rate:,.0f} items/s to decode, {_size(it.data)}/s as JPEGs of that size")
    span = f"{it.days:,.{0 if it.days >= 100 else 2}f} days" if it.days >= 1 else f"{it.days * 24:.3g} hours"
    cost = f"; ${it.cost:,.0f} at ${it.price:g} an hour each" if it.price else ""
    lines.append(f"  in all       {span}, {it.device_days:,.4g} GPU-days{cost}")
    return lines
