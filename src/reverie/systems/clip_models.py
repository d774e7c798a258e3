"""CLIP and SigLIP as published: configurations by open_clip's names for them.

OpenAI trained with QuickGELU, everybody else with GELU; the names of the former end in `-quickgelu`, as there.
"""

from __future__ import annotations

from dataclasses import replace

from reverie.encoders.clip_resnet import ClipResnetConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.systems.clip import ClipConfig


def _text(width: int, depth: int = 12) -> TextConfig:
    return TextConfig(width=width, depth=depth, heads=width // 64, activation="gelu", pool="argmax")


def _vit(
    patch: int, width: int, depth: int, space: int, text: TextConfig, *,
    size: int = 224, head: int = 64, hidden: int | None = None,
) -> ClipConfig:  # fmt: skip
    image = VitConfig(
        size=size,
        patch=patch,
        width=width,
        depth=depth,
        heads=width // head,
        hidden=hidden,
        activation="gelu",
    )
    return ClipConfig(image=image, text=text, width=space, fit="crop_even")


def _resnet(
    width: int, depths: tuple[int, int, int, int], space: int, text: TextConfig, *, size: int = 224
) -> ClipConfig:
    image = ClipResnetConfig(size=size, width=width, depths=depths, heads=width // 2, out=space)
    return ClipConfig(image=image, text=text, width=space, image_projection=False, fit="crop_even")


def _siglip(vocab: int, *, activation: str) -> ClipConfig:
    """The base model with patches of 16. Transformers computes its GELU by the tanh formula, open_clip as told here."""
    image = VitConfig(patch=16, activation="gelu", stem_bias=True, norm_pre=False, pool="attention", eps=1e-6)
    text = TextConfig(
        vocab=vocab,
        length=64,
        width=768,
        heads=12,
        activation=activation,
        causal=False,
        pool="last",
        eps=1e-6,
    )
    half = (0.5, 0.5, 0.5)
    return ClipConfig(
        image=image, text=text, width=768, image_projection=False, text_bias=True, loss="sigmoid", mean=half, std=half,
        fit="squash",
    )  # fmt: skip


def _quick(config: ClipConfig) -> ClipConfig:
    image = config.image
    if isinstance(image, VitConfig):
        image = replace(image, activation="quick_gelu")
    return replace(config, image=image, text=replace(config.text, activation="quick_gelu"))


_SHAPES = {
    # 2103.00020, tables 19 and 20
    "RN50": _resnet(64, (3, 4, 6, 3), 1024, _text(512)),
    "RN101": _resnet(64, (3, 4, 23, 3), 512, _text(512)),
    "RN50x4": _resnet(80, (4, 6, 10, 6), 640, _text(640), size=288),
    "RN50x16": _resnet(96, (6, 8, 18, 8), 768, _text(768), size=384),
    "RN50x64": _resnet(128, (3, 15, 36, 10), 1024, _text(1024), size=448),
    "ViT-B-32": _vit(32, 768, 12, 512, _text(512)),
    "ViT-B-16": _vit(16, 768, 12, 512, _text(512)),
    "ViT-L-14": _vit(14, 1024, 24, 768, _text(768)),
    "ViT-L-14-336": _vit(14, 1024, 24, 768, _text(768), size=336),
    # LAION's, 2212.07143
    "ViT-H-14": _vit(14, 1280, 32, 1024, _text(1024, 24), head=80),
    "ViT-g-14": _vit(14, 1408, 40, 1024, _text(1024, 24), head=88, hidden=6144),
    "ViT-bigG-14": _vit(14, 1664, 48, 1280, _text(1280, 32), head=104, hidden=8192),
}
MODELS: dict[str, ClipConfig] = {
    **_SHAPES,
    **{f"{name}-quickgelu": _quick(config) for name, config in _SHAPES.items() if name != "ViT-g-14"},
    "ViT-B-16-SigLIP": _siglip(32_000, activation="gelu"),
    "ViT-B-16-SigLIP2": _siglip(256_000, activation="gelu_tanh"),
}
