"""What systems that draw pictures as a language share: words to tokens, pictures to codes and back, what a caller asks.

DALL-E writes the codes one after the other (systems/dalle.py), MaskGIT guesses many at once (systems/maskgit.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from reverie.backbones.code_transformer import CodeTransformerConfig, padded
from reverie.codecs.bpe import Bpe
from reverie.codecs.dvae import Dvae, DvaeConfig
from reverie.codecs.vq import VqConfig, VqVae
from reverie.errors import InputError
from reverie.pictures import to_signal

Codec = Dvae | VqVae


class PictureLanguage(nn.Module):
    """A network over words and codes, the frozen codec and the tokenizer; what it learns and how it draws is its own.

    `config` has a `backbone: CodeTransformerConfig` and a `codec`.
    """

    def __init__(self, config: Any, backbone: nn.Module, tokenizer: Bpe | None):
        super().__init__()
        self.config = config
        self.backbone: Any = backbone
        self.codec: Codec = built(config.codec).requires_grad_(False)
        if tokenizer is not None:
            tokenizer.fits(vocab=config.backbone.words, end=None)
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # Words and pictures --------------------------------------------------------------------------------------------

    def read(self, texts: Sequence[str], *, too_long: str = "cut") -> Tensor:
        """Texts -> the tokens that the network takes, `b length`: their own, then each position's padding.

        What does not fit is cut off with a warning that shows the cut; InputError instead with `too_long="refuse"`.
        """
        if too_long not in ("cut", "refuse"):
            raise InputError(f"too_long is {too_long!r:.40}: choose cut or refuse.")
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: load it from a folder that has one.")
        length = self.config.backbone.length
        tokens = self.tokenizer.encode(list(texts), length=length)
        for text, row in zip(texts, self.tokenizer.encode(list(texts)), strict=True):
            count = int((row == self.tokenizer.end).int().argmax()) + 1
            if count <= length:
                continue
            kept = self.tokenizer.decode([row[1 : length - 1].tolist()])[0]
            said = f"a text of {count} tokens does not fit into {length}"
            if too_long == "refuse":
                raise InputError(f"{said}: it would end after {kept[-60:]!r}. Say it in fewer words.")
            warnings.warn(f"{said}, and ends after {kept[-60:]!r}: {text[:40]!r} ...", stacklevel=2)
        return self.filled(tokens)

    def filled(self, tokens: Tensor, drop: Tensor | None = None) -> Tensor:
        """`b n` of the tokenizer -> `b length` with each position's padding; where `drop b`, padding alone."""
        config = self.config.backbone
        assert self.tokenizer is not None
        if tokens.shape[1] < config.length:
            tokens = nn.functional.pad(tokens, (0, config.length - tokens.shape[1]))
        ends = (tokens == self.tokenizer.end).int().argmax(1)
        real = torch.arange(config.length, device=tokens.device) <= ends[:, None]
        if drop is not None:
            real = real & ~drop[:, None]
        return padded(tokens, real, words=config.words)

    def silence(self, count: int) -> Tensor:
        """The tokens of no words, `count length`."""
        config = self.config.backbone
        return (config.words + torch.arange(config.length, device=self.device)).expand(count, -1)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Pictures `b 3 h w` in [-1, 1] -> codes `b h w`. InputError: a size that it was not made for."""
        if tuple(image.shape[-2:]) != self.size:
            raise InputError(
                f"a picture of {image.shape[-1]} x {image.shape[-2]} pixels was given: this model knows those of"
                f" {self.size[1]} x {self.size[0]} alone."
            )
        return self.codec.encode(image)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b (h w)`, row by row -> pictures in [-1, 1]."""
        return self.codec.decode(rearrange(codes, "b (h w) -> b h w", w=self.config.backbone.columns)).clamp(
            -1, 1
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what it draws."""
        grid = self.config.backbone
        return grid.rows * self.codec.stride, grid.columns * self.codec.stride

    def size_of(self, frames: int) -> tuple[int, int]:
        """The same, as every generator is asked."""
        return self.size

    # What a caller asks --------------------------------------------------------------------------------------------

    def asked(self, prompts: Sequence[str], seed: Any, size: Any) -> list[int]:
        """The seed of each item. InputError: no prompts, no seeds for them, or a size that it cannot draw."""
        if isinstance(prompts, str):
            raise InputError(f"give a list of prompts, not the text {prompts[:40]!r}: write [text].")
        if not len(prompts):
            raise InputError("there is nothing to draw: give a prompt or more.")
        if size is not None and tuple(size) != self.size:
            raise InputError(
                f"size {tuple(size)} cannot be drawn: this model draws {self.size[0]} {self.size[1]} alone."
            )
        if isinstance(seed, Integral) and not isinstance(seed, bool):
            return [int(seed) + i for i in range(len(prompts))]
        if isinstance(seed, Iterable) and not isinstance(seed, str):
            seeds = list(seed)
            if len(seeds) == len(prompts) and all(isinstance(s, Integral) for s in seeds):
                return [int(s) for s in seeds]
        raise InputError(
            f"seed {seed!r:.60} does not go with {len(prompts)} prompts: give one number, or one for each."
        )

    def upper(self, given: Any, keep: int | None, count: int) -> Tensor:
        """The codes of the `keep` upper pixels of given pictures, `count n`, n a multiple of the columns.

        `given`: `3 h w` or `b 3 h w` in [-1, 1], a picture or its path, which is cropped to the size. None: no codes.
        """
        grid, stride = self.config.backbone, self.codec.stride
        if given is None:
            if keep is not None:
                raise InputError(f"keep is {keep}, but there is no picture to keep of: give one.")
            return torch.zeros(count, 0, dtype=torch.long, device=self.device)
        keep = self.size[0] // 2 // stride * stride if keep is None else keep
        if not isinstance(keep, int) or not 0 < keep <= self.size[0] or keep % stride:
            raise InputError(
                f"keep is {keep!r:.40}: give pixels from {stride} to {self.size[0]}, a multiple of {stride}, which"
                " a code stands for."
            )
        if isinstance(given, str | Path | Image.Image):
            given = torch.from_numpy(to_signal(given, size=self.size))
        pictures = given[None] if given.ndim == 3 else given
        if len(pictures) not in (1, count):
            raise InputError(
                f"there are {len(pictures)} pictures for {count} prompts: give one, or one for each."
            )
        codes = rearrange(self.encode(pictures.to(self.device)), "b h w -> b (h w)")
        return codes[:, : keep // stride * grid.columns].expand(count, -1)


def built(config: DvaeConfig | VqConfig) -> Codec:
    return Dvae(config) if isinstance(config, DvaeConfig) else VqVae(config)


def check_codec(backbone: CodeTransformerConfig, codec: DvaeConfig | VqConfig) -> None:
    """InputError: a codec with another vocabulary than the network writes."""
    if codec.vocab != backbone.vocab:
        raise InputError(
            f"the codec has {codec.vocab:,} codes and the network writes {backbone.vocab:,}: take the codec that it"
            " learnt from."
        )


def number(name: str, value: Any, low: float, *, above: bool = False) -> float:
    """A finite number from `low` on, or above it. InputError: it is none."""
    fine = (
        isinstance(value, int | float) and math.isfinite(value) and (value > low if above else value >= low)
    )
    if not fine:
        raise InputError(f"{name} is {value!r:.40}: give a number {'above' if above else 'from'} {low:g}.")
    return float(value)
