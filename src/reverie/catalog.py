"""Names -> systems and recipes: literal tables. A file may say a name; nothing else decides what is imported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reverie.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


def _clip() -> type[nn.Module]:
    from reverie.systems.clip import Clip

    return Clip


def _blip() -> type[nn.Module]:
    from reverie.systems.blip import Blip

    return Blip


def _blip2() -> type[nn.Module]:
    from reverie.systems.blip2 import Blip2

    return Blip2


def _blip2_language() -> type[nn.Module]:
    from reverie.systems.blip2_language import Blip2Language

    return Blip2Language


def _sora() -> type[nn.Module]:
    from reverie.systems.sora import Sora

    return Sora


def _wan() -> type[nn.Module]:
    from reverie.systems.wan import Wan

    return Wan


def _video_vae() -> type[nn.Module]:
    from reverie.codecs.video_vae import VideoVae

    return VideoVae


def _vae() -> type[nn.Module]:
    from reverie.codecs.vae import Vae

    return Vae


def _dvae() -> type[nn.Module]:
    from reverie.codecs.dvae import Dvae

    return Dvae


def _vq() -> type[nn.Module]:
    from reverie.codecs.vq import VqVae

    return VqVae


def _dit() -> type[nn.Module]:
    from reverie.systems.dit import DiffusionTransformer

    return DiffusionTransformer


def _mdt() -> type[nn.Module]:
    from reverie.systems.mdt import MaskedDiffusionTransformer

    return MaskedDiffusionTransformer


def _sit() -> type[nn.Module]:
    from reverie.systems.sit import Sit

    return Sit


def _dalle() -> type[nn.Module]:
    from reverie.systems.dalle import Dalle

    return Dalle


def _maskgit() -> type[nn.Module]:
    from reverie.systems.maskgit import MaskGit

    return MaskGit


def _classifier() -> type[nn.Module]:
    from reverie.systems.classifier import Classifier

    return Classifier


def _blip_vqa() -> type[nn.Module]:
    from reverie.systems.blip_tasks import BlipVqa

    return BlipVqa


def _blip_nlvr() -> type[nn.Module]:
    from reverie.systems.blip_tasks import BlipNlvr

    return BlipNlvr


SYSTEMS: dict[str, Callable[[], type[nn.Module]]] = {
    "clip": _clip,
    "blip": _blip,
    "blip-vqa": _blip_vqa,
    "blip-nlvr": _blip_nlvr,
    "blip2": _blip2,
    "blip2-language": _blip2_language,
    "sora": _sora,
    "dit": _dit,
    "sit": _sit,
    "dalle": _dalle,
    "maskgit": _maskgit,
    "mdt": _mdt,
    "vae": _vae,
    "dvae": _dvae,
    "vq": _vq,
    "wan": _wan,
    "video-vae": _video_vae,
    "classifier": _classifier,
}

# Name -> module:function. Text, so that the command line can read a recipe's flags without importing torch.
RECIPES: dict[str, str] = {
    "clip-tiny": "reverie.recipes.clip:tiny",
    "clip-stickers": "reverie.recipes.clip:stickers",
    "clip-world": "reverie.recipes.clip:world",
    "clip-paper-b32": "reverie.recipes.clip:paper_b32",
    "clip-native": "reverie.recipes.clip_native:native",
    "clip-finetune": "reverie.recipes.clip_finetune:finetune",
    "blip-tiny": "reverie.recipes.blip:tiny",
    "blip-stickers": "reverie.recipes.blip:stickers",
    "blip-world": "reverie.recipes.blip:world",
    "blip-finetune": "reverie.recipes.blip:finetune",
    "blip-answers": "reverie.recipes.blip_answers:answers",
    "blip-paper-base": "reverie.recipes.blip:paper_base",
    "blip-paper-large": "reverie.recipes.blip:paper_large",
    "blip2-stage1": "reverie.recipes.blip2:stage1",
    "blip2-stage2": "reverie.recipes.blip2:stage2",
    "blip2-paper-stage1": "reverie.recipes.blip2:paper_stage1",
    "blip2-paper-stage2": "reverie.recipes.blip2:paper_stage2",
    "sora-tiny": "reverie.recipes.sora:tiny",
    "sora-stickers": "reverie.recipes.sora:stickers",
    "sora-world": "reverie.recipes.sora:world",
    "sora-dit": "reverie.recipes.sora:dit",
    "sora-distil": "reverie.recipes.distil:sora",
    "dit-world": "reverie.recipes.dit:world",
    "dit-imagenet": "reverie.recipes.dit:imagenet",
    "video-vae-stickers": "reverie.recipes.video_vae:stickers",
    "video-vae-world": "reverie.recipes.video_vae:world",
    "dalle-tiny": "reverie.recipes.dalle:tiny",
    "dalle-stickers": "reverie.recipes.dalle:stickers",
    "dalle-world": "reverie.recipes.dalle:world",
    "dalle-paper": "reverie.recipes.dalle:paper",
    "dvae-tiny": "reverie.recipes.picture_codes:dvae",
    "dvae-paper": "reverie.recipes.picture_codes:paper_dvae",
    "vqgan-tiny": "reverie.recipes.picture_codes:vqgan",
    "vqgan-paper": "reverie.recipes.picture_codes:paper_vqgan",
    "judge-stickers": "reverie.recipes.judge:stickers",
}


def recipe(name: str) -> Callable[..., Any]:
    """The recipe of that name: a plain function of a data folder and an out folder, and its own settings."""
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}.")
    module, _, function = RECIPES[name].partition(":")
    return getattr(import_module(module), function)


def load(
    name_or_path: str | Path,
    *,
    config: Any = None,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    quantise: str | None = None,
) -> Any:
    """The system of a shipped name ("clip-stickers"), a folder or a checkpoint file, on the CPU, in eval mode.

    A folder is what `save` wrote, or one of transformers (`CLIPModel`, `SiglipModel`, BLIP, BLIP-2), of open_clip, or
    of diffusers (`DiTPipeline`, `WanPipeline`, their transformers and autoencoders). A checkpoint is a .safetensors
    file with its authors' own names (open_clip, OpenAI, BLIP, LAVIS, DiT, SiT, MDT, Wan, latent diffusion, VQGAN,
    DALL-E's autoencoder); `config`
    says which model it is where the file does not: a name such as "ViT-B-32" (`systems.clip_models.MODELS`) or
    "SiT-XL/2", or a system's config.

    Weights come tensor by tensor, so they may be larger than the memory that is left beside the model. `dtype`
    (torch.bfloat16) keeps those of linear layers narrower, `quantise="int8"` those of repeated blocks in eight bits,
    for sampling alone (docs/systems/wan.md).

    It is loaded to be used: no parameter takes gradients, so that `clip.embed_text([...]).numpy()` works and no graph
    is kept. `trainable=True` is for training on: parameters take gradients as they did when the system was trained
    (of Sora, not the text tower). Either way gradients flow to the inputs.

    Raises `reverie.errors.InputError` in one sentence when there is none, or when its files cannot be trusted.
    """
    from reverie.weights import store

    if quantise and trainable:
        raise InputError("weights in eight bits cannot be trained: leave quantise or trainable out.")
    system = store.load(name_or_path, systems=SYSTEMS, config=_plain(config), dtype=dtype, quantise=quantise)
    return system if trainable else system.requires_grad_(False)


def _plain(config: Any) -> dict[str, Any] | None:
    """A named or given configuration as plain data."""
    if config is None:
        return None
    from reverie.backbones.dit import DIT_MODELS
    from reverie.backbones.mdt import MDT_MODELS
    from reverie.codecs.vae import VAES, VaeConfig
    from reverie.systems.blip import BlipConfig
    from reverie.systems.blip2 import Blip2Config
    from reverie.systems.blip_tasks import BlipNlvrConfig, BlipVqaConfig
    from reverie.systems.clip import ClipConfig
    from reverie.systems.clip_models import MODELS
    from reverie.systems.dit import DiffusionTransformerConfig
    from reverie.systems.mdt import MaskedDiffusionTransformerConfig
    from reverie.systems.sit import SitConfig

    if isinstance(config, str) and config in DIT_MODELS:
        system = SitConfig if config.startswith("SiT") else DiffusionTransformerConfig
        config = system(backbone=DIT_MODELS[config], guided_channels=3)  # as the authors draw
    elif isinstance(config, str) and config in MDT_MODELS:
        backbone = MDT_MODELS[config]
        gamma = 5.0 if backbone.skips else None
        config = MaskedDiffusionTransformerConfig(backbone=backbone, gamma=gamma, guided_channels=3)
    elif isinstance(config, str):
        config = (MODELS | VAES).get(config, config)
    known = (
        ClipConfig | BlipConfig | BlipVqaConfig | BlipNlvrConfig | Blip2Config | VaeConfig | DiffusionTransformerConfig
        | SitConfig | MaskedDiffusionTransformerConfig
    )  # fmt: skip
    if not isinstance(config, known):
        names = ", ".join((*MODELS, *VAES, *DIT_MODELS, *MDT_MODELS))
        raise InputError(
            f"config {config!r:.60} is no configuration of a system and none of the names {names}."
        )
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save(
    system: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    format: Literal["reverie", "transformers", "open_clip", "diffusers", "salesforce", "lavis"] = "reverie",
) -> Path:
    """Write a system into a folder that `load` reads: config.json, model.safetensors, tokenizer.json where it has one.

    `dtype` is what floats are stored in (torch.float16 halves the size; `load` restores the system's own precision).
    `format="transformers"`, `"open_clip"` or `"diffusers"` writes a folder for that library instead, where it has the
    same system; `"salesforce"` a BLIP and `"lavis"` a BLIP-2 of the first stage under their authors' names. Frozen
    parts that came from another model are not written again: config.json names that model and their hash.
    """
    from reverie import __version__
    from reverie.weights import store

    name = next((name for name, system_class in SYSTEMS.items() if system_class() is type(system)), None)
    if name is None:
        raise InputError(
            f"{type(system).__name__} is no system that Reverie can save; it saves {', '.join(SYSTEMS)}."
        )
    return store.save(system, folder, name=name, version=__version__, dtype=dtype, format=format)
