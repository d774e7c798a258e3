"""The discrete autoencoder of DALL-E: "Zero-Shot Text-to-Image Generation" (Ramesh et al. 2021, 2102.12092, section 2.1
and appendix A), as OpenAI released it.

    picture --- convolutions, halved by max pooling --- logits over the vocabulary, one choice for each place --- codes
    codes --- convolutions, doubled --- mean and log scale of a logit-Laplace distribution of each colour --- picture

While it learns, a choice is soft: a Gumbel-softmax of the logits (Jang et al. 2016, 1611.01144), whose temperature
falls.

Convention: pictures are in [-1, 1]. Inside, colours lie in [e, 1 - e], e = 0.1, where the logit-Laplace distribution
has its mass: phi(x) = (1 - 2e) x + e of colours x in [0, 1] (`squeezed`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import InputError

EDGE = 0.1  # e


@dataclasses.dataclass(frozen=True, kw_only=True)
class DvaeConfig:
    kind: Literal["dvae"] = "dvae"
    vocab: int = 8192
    width: int = 256  # channels at full size; they double with each group
    groups: int = 4  # each but the last halves the side
    depth: int = 2  # residual blocks of a group
    begin: int = 128  # channels that the decoder makes of a code

    def __post_init__(self) -> None:
        if min(self.vocab, self.groups, self.depth, self.begin) < 1 or self.width < 4 or self.width % 4:
            raise InputError(
                f"vocab {self.vocab}, groups {self.groups}, depth {self.depth} and begin {self.begin} must be 1 or"
                f" more, and width {self.width} a multiple of 4."
            )


class Block(nn.Module):
    """skip(x) + gain * (four convolutions of x, of which `last` or the first is 1 x 1)."""

    def __init__(self, width: int, out: int, *, gain: float, encodes: bool):
        super().__init__()
        inner = out // 4
        sides = (3, 3, 3, 1) if encodes else (1, 3, 3, 3)
        widths = (width, inner, inner, inner, out)
        self.skip = _conv(width, out, 1) if width != out else nn.Identity()
        self.convs = nn.ModuleList(_conv(widths[i], widths[i + 1], side) for i, side in enumerate(sides))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        return torch.add(self.skip(x), h, alpha=self.gain)


class Encoder(nn.Module):
    """Squeezed colours `b 3 h w` -> logits `b v h/s w/s`."""

    def __init__(self, config: DvaeConfig):
        super().__init__()
        widths = [config.width * 2**i for i in range(config.groups)]
        self.stem = _conv(3, widths[0], 7)
        self.groups = _groups([widths[0], *widths], config, encodes=True)
        self.out = _conv(widths[-1], config.vocab, 1)
        with torch.no_grad():
            self.out.weight.mul_(
                0.1
            )  # all codes begin about as likely, where else one would take every place

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if i else x)
        return self.out(F.relu(x))


class Decoder(nn.Module):
    """What the codes begin with, `b c h w` -> mean and log scale, `b 6 (h s) (w s)`."""

    def __init__(self, config: DvaeConfig):
        super().__init__()
        widths = [config.width * 2**i for i in reversed(range(config.groups))]
        self.stem = _conv(config.vocab, config.begin, 1)
        self.groups = _groups([config.begin, *widths], config, encodes=False)
        self.out = _conv(widths[-1], 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i, group in enumerate(self.groups):
            x = group(F.interpolate(x, scale_factor=2.0) if i else x)
        return self.out(F.relu(x))

    def begun(self, codes: Tensor) -> Tensor:
        """`stem` of codes `b h w`, as one-hot maps would give it."""
        table = rearrange(self.stem.weight, "c v 1 1 -> v c")
        assert self.stem.bias is not None
        return rearrange(F.embedding(codes, table) + self.stem.bias, "b h w c -> b c h w")


class Dvae(nn.Module):
    """`encode`: `b 3 h w` in [-1, 1] -> codes `b h/s w/s`; `decode` back."""

    def __init__(self, config: DvaeConfig):
        super().__init__()
        self.config, self.vocab, self.stride = config, config.vocab, 2 ** (config.groups - 1)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def logits(self, image: Tensor) -> Tensor:
        """How likely each code is, before softmax: `b v h/s w/s`."""
        check_picture(image, self.stride)
        return self.encoder(squeezed(image))

    def encode(self, image: Tensor) -> Tensor:
        """The likeliest codes, int64 `b h/s w/s`. InputError: sides that are no multiples of the stride."""
        return self.logits(image).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b h w` -> pictures `b 3 (h s) (w s)` in [-1, 1], the middle of what the decoder says."""
        check_codes(codes, self.vocab)
        return self.shown(self.decoder(self.decoder.begun(codes))[:, :3])

    def draw(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Soft choices `b v h w`, shares of 1 -> mean and log scale of the logits of squeezed colours, `b 3 h w`."""
        mean, scale = self.decoder(self.decoder.stem(choice)).chunk(2, 1)
        return mean, scale

    @staticmethod
    def shown(mean: Tensor) -> Tensor:
        """The mean of logits -> colours in [-1, 1]."""
        return (((mean.sigmoid() - EDGE) / (1 - 2 * EDGE)).clamp(0, 1)) * 2 - 1


def squeezed(image: Tensor) -> Tensor:
    """phi of colours in [-1, 1]: in [e, 1 - e]."""
    return (1 - 2 * EDGE) * (image + 1) / 2 + EDGE


def soft_choice(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The Gumbel-softmax of logits `b v h w` with Gumbel noise of their shape: shares of 1."""
    return ((logits + noise) / temperature).softmax(1)


def gumbel(shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Gumbel noise, `b *shape`, an item for each seed."""
    noise = [
        torch.empty(*shape, device=device).exponential_(generator=torch.Generator(device).manual_seed(seed))
        for seed in seeds
    ]
    return -torch.stack(noise).clamp(min=torch.finfo(torch.float32).tiny).log()


def check_picture(image: Tensor, stride: int) -> None:
    """InputError: no pictures `b 3 h w` whose sides are multiples of the stride."""
    sides = image.shape[-2:]
    if (
        image.ndim != 4
        or image.shape[1] != 3
        or not len(image)
        or any(s < stride or s % stride for s in sides)
    ):
        raise InputError(
            f"picture of shape {tuple(image.shape)} cannot be encoded: give `b 3 h w` with sides that are multiples of"
            f" {stride}."
        )


def check_codes(codes: Tensor, vocab: int) -> None:
    """InputError: no codes `b h w` of this vocabulary."""
    if codes.ndim != 3 or codes.is_floating_point() or not codes.numel():
        raise InputError(
            f"codes of shape {tuple(codes.shape)}, {codes.dtype}, cannot be decoded: give int64 `b h w`."
        )
    if codes.is_meta or (int(codes.min()) >= 0 and int(codes.max()) < vocab):
        return
    raise InputError(
        f"codes from {int(codes.min())} to {int(codes.max())} are not of this codec, which has {vocab}: take the codec"
        " that they were made with."
    )


def _groups(widths: Sequence[int], config: DvaeConfig, *, encodes: bool) -> nn.ModuleList:
    gain = 1 / (config.groups * config.depth) ** 2
    return nn.ModuleList(
        nn.Sequential(
            *[Block(out if i else width, out, gain=gain, encodes=encodes) for i in range(config.depth)]
        )
        for width, out in zip(widths[:-1], widths[1:], strict=True)
    )


def _conv(width: int, out: int, side: int) -> nn.Conv2d:
    conv = nn.Conv2d(width, out, side, padding=side // 2)
    nn.init.normal_(conv.weight, std=1 / math.sqrt(width * side**2))
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
