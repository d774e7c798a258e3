"""A class-conditional transformer that learns from parts: "Masked Diffusion Transformer" (Gao et al. 2023, 2303.14389).

    whole    patches + places ---- encoder -------------------- + places of the decoder --------- decoder --- DiT's end
    masked   patches + places ---- encoder of `keep` alone ---- interpolater fills the rest ----- decoder --- DiT's end

Blocks are DiT's (backbones/dit.py), whose attention also has a learned score for how far apart two patches are. The
interpolater: a learned token stands for each missing patch, places are added, one block runs over all, and what stayed
goes past it unchanged. The whole pass never asks it, so it can go once training is over (`drop_interpolater`).

Version 1 (`skips=False`) is one stack. In version 2 the encoder's second half reads what its first half made, last
first, and each block of the decoder the patches that came in: joined and made narrow by a linear layer. Places are
learned, from sines and cosines on, so a picture has the size of the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.backbones.dit import SCALES, WAVES, DitBlock, places
from reverie.errors import InputError
from reverie.nn.block import norm_modulate
from reverie.nn.linear import Linear, PatchLinear
from reverie.nn.positions import grid, sinusoidal

SPARE = 3  # rows at the end of the authors' tables of scores: BEiT's for a class token, never read


def check_masked(shares: tuple[float, float] | None) -> None:
    """InputError: they are no shares of the patches for masked passes to leave out."""
    if shares is not None and not 0 <= shares[0] <= shares[1] < 1:
        raise InputError(
            f"masked {tuple(shares)} are no shares: give the least and the most, such as (0.3, 0.5)."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MdtConfig:
    channels: int = 4
    size: int = 32  # the side of latents or pixels
    patch: int = 2
    width: int = 1152
    depth: int = 28  # blocks of encoder and decoder together
    decoder: int  # of them the decoder's: no default, since the authors' code, commands and paper differ
    heads: int = 16
    ratio: float = 4.0
    classes: int = 1000  # the null class, "any", comes after them
    learned_sigma: bool = True  # as many channels again come out, for the variance
    skips: bool = True  # version 2
    # The share of patches that masked passes leave out, drawn anew each time; None: there are none of them
    masked: tuple[float, float] | None = (0.3, 0.5)

    def __post_init__(self) -> None:
        if min(self.channels, self.size, self.patch, self.width, self.heads) < 1:
            raise InputError(
                f"channels {self.channels}, size {self.size}, patch {self.patch}, width {self.width} and heads"
                f" {self.heads} must be 1 or more."
            )
        if self.width % self.heads or self.width % 4:
            raise InputError(
                f"width {self.width} must be a multiple of 4 and of the {self.heads} heads; choose another."
            )
        if self.size % self.patch:
            raise InputError(f"size {self.size} is no multiple of the patch, {self.patch}; choose another.")
        if not 1 <= self.decoder < self.depth:
            raise InputError(
                f"a decoder of {self.decoder} of {self.depth} blocks is none: give 1 to {self.depth - 1}."
            )
        if self.skips and (self.depth - self.decoder) % 2:
            raise InputError(
                f"{self.depth - self.decoder} blocks of an encoder have no two halves: give a decoder of"
                f" {self.decoder + 1} or another depth."
            )
        check_masked(self.masked)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.size // self.patch


class MdtBlock(nn.Module):
    """DiT's block with learned scores by distance; with `joins`, of `x` and a `skip` made narrow."""

    def __init__(self, config: MdtConfig, *, joins: bool = False):
        super().__init__()
        self.join = Linear(2 * config.width, config.width) if joins else None
        self.scores = nn.Parameter(torch.empty((2 * config.grid - 1) ** 2 + SPARE, config.heads))
        self.inner = DitBlock(config.width, config.heads, ratio=config.ratio)

    def forward(
        self,
        x: Tensor,
        pairs: Tensor,
        vector: Tensor | None = None,
        *,
        modulation: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """`x b n d`; `pairs`, `n n` or `b n n`: which score each two positions have. Else as `DitBlock`."""
        if self.join is not None:
            assert skip is not None
            x = self.join(torch.cat([x, skip], dim=-1))
        scores = rearrange(F.embedding(pairs, self.scores), "... n m heads -> ... heads n m").to(x.dtype)
        return self.inner(x, vector, modulation=modulation, scores=scores)


class Mdt(nn.Module):
    """`x b c h w`, `t b`, `classes b` -> `b c h w`, with a learned variance `b 2c h w`."""

    def __init__(self, config: MdtConfig):
        super().__init__()
        self.config = config
        width, patches = config.width, config.grid**2
        half = (config.depth - config.decoder) // 2
        self.embed = PatchLinear(config.channels, width, config.patch, bias=True)
        self.places = nn.Parameter(torch.empty(patches, width))
        self.time = nn.Sequential(Linear(WAVES, width), nn.SiLU(), Linear(width, width))
        self.classes = nn.Embedding(config.classes + 1, width)
        # Encoder, then decoder.
        self.blocks = nn.ModuleList(
            MdtBlock(config, joins=config.skips and i >= half) for i in range(config.depth)
        )
        self.decoder_places = nn.Parameter(torch.empty(patches, width))
        if config.masked is not None:
            self.missing = nn.Parameter(torch.empty(width))
            self.interpolater = MdtBlock(config)
        self.modulation = Linear(width, 2 * width)
        self.out = Linear(width, config.patch**2 * config.channels * (2 if config.learned_sigma else 1))
        self._draw()

    def _draw(self) -> None:
        """DiT's initialisation, places from its sines and cosines, scores and the missing token small."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, MdtBlock):
                nn.init.trunc_normal_(module.scores, std=0.02)
        nn.init.xavier_uniform_(self.embed.weight.flatten(1))
        assert self.embed.bias is not None
        nn.init.zeros_(self.embed.bias)
        for part in (self.classes, *self.time):
            if isinstance(part, nn.Embedding | nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
        blocks = [block for block in self.modules() if isinstance(block, DitBlock)]
        for zero in (self.out, self.modulation, *(block.modulation for block in blocks)):
            nn.init.zeros_(zero.weight)
        side = self.config.grid
        begun = places(side, side, self.config.width, grid=side)
        with torch.no_grad():
            self.places.copy_(begun)
            self.decoder_places.copy_(begun)
        if self.config.masked is not None:
            nn.init.normal_(self.missing, std=0.02)

    def modulations(self) -> list[Linear]:
        """What the vector passes through in a whole pass: a layer for each block, and the last."""
        return [*(block.inner.modulation for block in self._blocks()), self.modulation]

    @property
    def null(self) -> int:
        """The class "any", which guidance and dropped labels ask for."""
        return self.config.classes

    def drop_interpolater(self) -> None:
        """Without what masked passes alone need, in place: whole passes stay as they are."""
        if self.config.masked is not None:
            self.config = dataclasses.replace(self.config, masked=None)
            del self.missing, self.interpolater

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        classes: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """With `keep`, int64 `b k`, different numbers of patches, row by row: a masked pass, whose encoder sees these.

        `modulations` are those of `Modulations.at`, instead of `t` and `classes`, for whole passes.
        """
        config = self.config
        assert x.shape[-2:] == (config.size, config.size), (
            f"{tuple(x.shape)} is not of the size of the training"
        )
        entered = tokens = rearrange(self.embed(x), "b d h w -> b (h w) d") + self.places.to(x.dtype)
        if modulations is None:
            assert t is not None
            assert classes is not None
            vector = self.vector(t, classes).to(x.dtype)
            each: Sequence[Tensor | None] = [None] * config.depth
            last = self.modulation(vector)
        else:
            assert keep is None, "modulations are those of whole passes"
            vector, (*each, last) = None, modulations
        every = distances(config.grid, device=x.device)
        pairs = every
        if keep is not None:
            tokens = tokens.gather(1, repeat(keep, "b k -> b k d", d=config.width))
            pairs = every[rearrange(keep, "b k -> b k 1"), rearrange(keep, "b k -> b 1 k")]
        encoder = config.depth - config.decoder
        waiting: list[Tensor] = []
        for i, (block, modulation) in enumerate(zip(self._blocks(), each, strict=True)):
            if i == encoder:
                tokens, pairs = self._filled(tokens, keep, vector, every), every
            skip = None
            if block.join is not None:
                skip = waiting.pop() if i < encoder else entered
            tokens = block(tokens, pairs, vector, modulation=modulation, skip=skip)
            if config.skips and i < encoder // 2:
                waiting.append(tokens)
        shift, scale = rearrange(last, "b (two d) -> two b 1 d", two=2)
        return rearrange(
            self.out(norm_modulate(tokens, shift, scale)),
            "b (h w) (ph pw c) -> b c (h ph) (w pw)", h=config.grid, ph=config.patch, pw=config.patch,
        )  # fmt: skip

    def _filled(self, x: Tensor, keep: Tensor | None, vector: Tensor | None, pairs: Tensor) -> Tensor:
        """What the decoder reads, `b n d`: with `keep`, the interpolater's of patches that are not among `x b k d`."""
        places = self.decoder_places.to(x.dtype)
        if keep is None:
            return x + places
        index = repeat(keep, "b k -> b k d", d=x.shape[-1])
        empty = repeat(self.missing.to(x.dtype), "d -> b n d", b=len(x), n=len(places))
        there = empty.scatter(1, index, x) + places
        stayed = torch.zeros(there.shape[:2], dtype=torch.bool, device=x.device).scatter(1, keep, True)
        filled = self.interpolater(there, pairs, vector)
        return torch.where(rearrange(stayed, "b n -> b n 1"), there, filled)

    def vector(self, t: Tensor, classes: Tensor) -> Tensor:
        """What modulates the blocks: times `b` and classes `b` -> `b d`."""
        clock = sinusoidal(t, WAVES)
        return F.silu(self.time(clock.to(self.classes.weight.dtype)) + self.classes(classes))

    def _blocks(self) -> list[MdtBlock]:
        return [block for block in self.blocks if isinstance(block, MdtBlock)]


def distances(side: int, *, device: torch.device | str | None = None) -> Tensor:
    """int64 `n n` for the n = side^2 patches of a grid: which row of a table belongs to the way from each to each."""
    at = grid(side, side, device=device)
    rows, columns = (rearrange(at, "n axes -> n 1 axes") - at + side - 1).unbind(-1)
    return rows * (2 * side - 1) + columns


# Sizes are DiT's (2212.09748, table 1). Decoders of version 1 have 2 blocks (section 4.1, and every published command);
# of version 2 what the authors' commands say: 6 in S, 4 in XL, and their code's default, 4, where there is no command.
MDT_MODELS: dict[str, MdtConfig] = {
    f"{name}-{scale}/{patch}": MdtConfig(
        patch=patch, depth=depth, width=width, heads=heads, skips=name == "MDTv2",
        decoder=2 if name == "MDT" else 6 if scale == "S" else 4, masked=(0.3, 0.3) if name == "MDT" else (0.3, 0.5),
    )
    for name, patches in (("MDT", (2, 4, 8)), ("MDTv2", (2,)))
    for scale, (depth, width, heads) in SCALES.items()
    for patch in patches
}  # fmt: skip
