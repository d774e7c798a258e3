"""A class-conditional diffusion transformer: "Scalable Diffusion Models with Transformers" (2212.09748).

    x --- patches + places ---[ block ]--- ... ---[ block ]--- norm --- patches back --- prediction (and variance)
                                  |                   |          |
    t, class --- vector ----------+-------------------+----------+   shift, scale and gate of each half (adaLN-zero)

SiT (2401.08740) is the same network. `t` is in the unit of the process that it was trained with. Places are sines and
cosines, computed for the size that is asked for: between the edges of the grid of the training, whatever the size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import InputError
from reverie.nn.attention import SelfAttention
from reverie.nn.block import norm_modulate
from reverie.nn.linear import Linear, PatchLinear
from reverie.nn.mlp import Mlp
from reverie.nn.positions import sinusoidal

WAVES = 256  # of the time's embedding
TABLE_BYTES = 64 * 2**20  # of modulations that are held for coming steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitConfig:
    channels: int = 4
    size: int = 32  # the side in training, of latents or pixels; any other may be asked for
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    ratio: float = 4.0
    classes: int = 1000  # the null class, "any", comes after them
    learned_sigma: bool = True  # as many channels again come out, for the variance
    # The slowest wave of the time's embedding is 1e-4 in diffusers, and one step faster in the authors' code.
    waves: Literal["original", "diffusers"] = "original"
    mlp_eps: float = 1e-6  # of the norm before the MLP, which diffusers lets differ

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


class DitBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by a vector (adaLN-zero); a new block is the identity."""

    def __init__(self, width: int, heads: int, *, ratio: float = 4.0, mlp_eps: float = 1e-6):
        super().__init__()
        self.mlp_eps = mlp_eps
        self.attention = SelfAttention(width, heads)
        self.mlp = Mlp(width, int(width * ratio), activation="gelu_tanh")
        self.modulation = Linear(width, 6 * width)

    def forward(
        self,
        x: Tensor,
        vector: Tensor | None = None,
        *,
        modulation: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """`x b n d`; `vector b d`, or what it makes, computed before: `modulation b (6 d)`.

        `scores`, broadcastable to `b heads n n`, are added to the attention's own.
        """
        if modulation is None:
            modulation = self.modulation(vector)
        shift1, scale1, gate1, shift2, scale2, gate2 = rearrange(modulation, "b (six d) -> six b 1 d", six=6)
        x = torch.addcmul(x, gate1, self.attention(norm_modulate(x, shift1, scale1), mask=scores))
        return torch.addcmul(x, gate2, self.mlp(norm_modulate(x, shift2, scale2, eps=self.mlp_eps)))


class Dit(nn.Module):
    """`x b c h w`, `t b`, `classes b` -> `b c h w`, with a learned variance `b 2c h w`."""

    def __init__(self, config: DitConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.embed = PatchLinear(config.channels, width, config.patch, bias=True)
        self.time = nn.Sequential(Linear(WAVES, width), nn.SiLU(), Linear(width, width))
        self.classes = nn.Embedding(config.classes + 1, width)
        self.blocks = nn.ModuleList(
            DitBlock(width, config.heads, ratio=config.ratio, mlp_eps=config.mlp_eps)
            for _ in range(config.depth)
        )
        self.modulation = Linear(width, 2 * width)
        self.out = Linear(width, config.patch**2 * config.channels * (2 if config.learned_sigma else 1))
        self._draw()

    def _draw(self) -> None:
        """The paper's initialisation: Xavier, with modulations and output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embed.weight.flatten(1))
        assert self.embed.bias is not None
        nn.init.zeros_(self.embed.bias)
        for part in (self.classes, *self.time):
            if isinstance(part, nn.Embedding | nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
        for zero in (self.out, *self.modulations()):
            nn.init.zeros_(zero.weight)

    def modulations(self) -> list[Linear]:
        """What the vector passes through: a layer for each block, and the last."""
        blocks = [block.modulation for block in self.blocks if isinstance(block, DitBlock)]
        return [*blocks, self.modulation]

    @property
    def null(self) -> int:
        """The class "any", which guidance and dropped labels ask for."""
        return self.config.classes

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        classes: Tensor | None = None,
        *,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`modulations` are those of `Modulations.at`, instead of `t` and `classes`."""
        patch = self.config.patch
        assert x.shape[-2] % patch == 0, f"{tuple(x.shape)} holds parts of patches"
        assert x.shape[-1] % patch == 0, f"{tuple(x.shape)} holds parts of patches"
        h, w = x.shape[-2] // patch, x.shape[-1] // patch
        tokens = rearrange(self.embed(x), "b d h w -> b (h w) d")
        grid = self.config.size // patch
        tokens = tokens + places(h, w, self.config.width, grid=grid, device=x.device).to(x)
        if modulations is None:
            assert t is not None
            assert classes is not None
            vector = self.vector(t, classes).to(x.dtype)
            for block in self.blocks:
                tokens = block(tokens, vector)
            last = self.modulation(vector)
        else:
            *each, last = modulations
            for block, one in zip(self.blocks, each, strict=True):
                tokens = block(tokens, modulation=one)
        shift, scale = rearrange(last, "b (two d) -> two b 1 d", two=2)
        return rearrange(
            self.out(norm_modulate(tokens, shift, scale)),
            "b (h w) (ph pw c) -> b c (h ph) (w pw)", h=h, ph=patch, pw=patch,
        )  # fmt: skip

    def vector(self, t: Tensor, classes: Tensor) -> Tensor:
        """What modulates the blocks: times `b` and classes `b` -> `b d`."""
        clock = sinusoidal(t, WAVES, closed=self.config.waves == "diffusers")
        return F.silu(self.time(clock.to(self.classes.weight.dtype)) + self.classes(classes))


def places(h: int, w: int, width: int, *, grid: int, device: torch.device | str | None = None) -> Tensor:
    """`(h w) d`: a column's sines and cosines, then a row's, as far apart as `grid` of them lie between the edges."""
    quarter = width // 4
    waves = 1e4 ** -(torch.arange(quarter, device=device, dtype=torch.float64) / quarter)

    def line(count: int) -> Tensor:
        angle = torch.arange(count, device=device)[:, None] * (grid / count) * waves
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    columns, rows = repeat(line(w), "w d -> h w d", h=h), repeat(line(h), "h d -> h w d", w=w)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w d -> (h w) d").float()


class Modulated(Protocol):
    """A network of a time and a class, as `Modulations` sees it."""

    classes: nn.Embedding

    def vector(self, t: Tensor, classes: Tensor) -> Tensor: ...

    def modulations(self) -> list[Linear]: ...


class Modulations:
    """All that time and class do in a network, for the times of a whole sampling run and the classes of its batch.

    The products of many steps are made together and each class's once: `at(t)` gives what `Dit.forward` takes.
    """

    def __init__(self, network: Modulated, times: Sequence[float], classes: Tensor):
        self.network, self.times = network, list(dict.fromkeys(times))
        self.classes, self.which = classes.unique(return_inverse=True)
        numbers = sum(made.out_features for made in network.modulations()) * len(self.classes)
        self.together = max(1, TABLE_BYTES // (numbers * network.classes.weight.element_size()))
        self.first, self.tables = 0, list[Tensor]()

    @torch.no_grad()
    def at(self, t: float) -> list[Tensor]:
        """One modulation for each block and the last, `b (k d)`."""
        number = self.times.index(t)
        if not self.tables or not self.first <= number < self.first + self.together:
            self.first = number
            times = torch.tensor(self.times[number : number + self.together], device=self.classes.device)
            pairs = times.repeat_interleave(len(self.classes)), self.classes.repeat(len(times))
            vector = self.network.vector(*pairs)
            self.tables = [
                rearrange(made(vector), "(s k) d -> s k d", k=len(self.classes))
                for made in self.network.modulations()
            ]
        return [table[number - self.first][self.which] for table in self.tables]


# 2212.09748, table 1: depth, width, heads. SiT's are the same.
SCALES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_MODELS: dict[str, DitConfig] = {
    f"{name}-{scale}/{patch}": DitConfig(patch=patch, depth=depth, width=width, heads=heads)
    for name in ("DiT", "SiT")
    for scale, (depth, width, heads) in SCALES.items()
    for patch in (2, 4, 8)
}
