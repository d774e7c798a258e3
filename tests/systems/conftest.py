"""Small systems and what goes into them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from reverie.codecs.bpe import Bpe
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.systems.clip import Clip, ClipConfig

NAMES = [
    "red square",
    "green disc",
    "blue ring",
    "a black cat",
    "white cloud",
    "yellow sun",
    "火箭",
    "small tree",
]


@pytest.fixture(scope="session")
def tokenizer() -> Bpe:
    return Bpe.train(NAMES * 2, vocab=600)


def clip_config(tokenizer: Bpe) -> ClipConfig:
    return ClipConfig(
        image=VitConfig(size=16, patch=8, width=16, depth=1, heads=2),
        text=TextConfig(vocab=tokenizer.vocab, length=12, width=16, depth=1, heads=2, end=tokenizer.end),
        width=8,
    )


@pytest.fixture(scope="session")
def small(tokenizer) -> SimpleNamespace:
    """Names, a configuration of CLIP, and a maker of it from a seed."""

    def clip(seed: int = 0) -> Clip:
        torch.manual_seed(seed)
        return Clip(clip_config(tokenizer), tokenizer)

    return SimpleNamespace(names=NAMES, config=clip_config(tokenizer), clip=clip)
