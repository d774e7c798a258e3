"""The picture autoencoder of latent diffusion: "High-Resolution Image Synthesis with Latent Diffusion Models"
(Rombach et al. 2022, 2112.10752), as Stable Diffusion, SDXL, SD3 and FLUX have it.

    picture --- levels of residual blocks, each half the side --- middle --- mean and log variance --- latents
    latents --- middle --- levels, each twice the side --- picture

Latents are normalised: (mean - shift) * scale, with the constants in the config; `posterior` gives the raw ones.
Without gradients large maps are computed by rows and in place: less memory, equal results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import InputError
from reverie.nn.attention import SelfAttention

SLAB = 2**20  # numbers of a map that are normalised and convolved at a time
TOGETHER = 2**24  # numbers of the widest map of the items that are computed at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig:
    channels: int = 4  # of the latents
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of the levels; each but the last halves the side
    depth: int = 2  # residual blocks of a level going down; one more going up
    groups: int = 32  # of the normalisation
    attention: int = 0  # of the lowest levels, how many attend after each block
    middle: bool = True  # whether the middle attends
    quant: bool = True  # 1 x 1 convolutions on both sides of the latents
    scale: float = 0.18215
    shift: float = 0.0

    def __post_init__(self) -> None:
        if min(self.channels, self.depth, self.groups, *self.widths) < 1:
            raise InputError(
                f"channels {self.channels}, depth {self.depth}, groups {self.groups} and widths {list(self.widths)}"
                " must be 1 or more."
            )
        if not self.widths or any(width % self.groups for width in self.widths):
            raise InputError(
                f"widths {list(self.widths)} must be multiples of the {self.groups} groups; choose others."
            )
        if not 0 <= self.attention <= len(self.widths):
            raise InputError(f"attention at {self.attention} of {len(self.widths)} levels; give 0 or more.")
        if self.scale == 0:
            raise InputError("scale is 0, which would leave nothing of the latents; give another.")


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Without gradients x may be overwritten."""
        h = norm_conv(x, self.norm1, self.conv1)
        return norm_conv(h, self.norm2, self.conv2, onto=self.skip(x))


class PixelAttention(nn.Module):
    """x + attention(norm(x)) over all pixels, with one head."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.attention = SelfAttention(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attention(rearrange(self.norm(x), "b d h w -> b (h w) d"))
        return x + rearrange(tokens, "b (h w) d -> b d h w", h=x.shape[-2])


class Level(nn.Module):
    """Residual blocks, each with attention or none, then another size: `resize` holds the weights of that."""

    def __init__(self, width: int, out: int, config: VaeConfig, *, depth: int, attention: bool, resize: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(out if i else width, out, config.groups) for i in range(depth))
        self.attentions = nn.ModuleList(
            PixelAttention(out, config.groups) for _ in range(depth if attention else 0)
        )
        self.resize = nn.Conv2d(out, out, 3) if resize else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return x


class Middle(nn.Sequential):
    def __init__(self, width: int, config: VaeConfig):
        attend = PixelAttention(width, config.groups) if config.middle else nn.Identity()
        super().__init__(Residual(width, width, config.groups), attend, Residual(width, width, config.groups))


class Encoder(nn.Module):
    """`b 3 h w` -> mean and log variance, `b 2c h/s w/s`; or `out` channels, whatever they mean."""

    def __init__(self, config: VaeConfig, *, out: int | None = None):
        super().__init__()
        widths, count = config.widths, len(config.widths)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)], widths[i], config, depth=config.depth,
                attention=i >= count - config.attention, resize=i < count - 1,
            )
            for i in range(count)
        )  # fmt: skip
        self.middle = Middle(widths[-1], config)
        self.norm = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.out = nn.Conv2d(widths[-1], out or 2 * config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for level in self.levels:
            assert isinstance(level, Level)
            x = level(x)
            if level.resize is not None:  # the padding is at the bottom and the right alone
                x = F.conv2d(F.pad(x, (0, 1, 0, 1)), level.resize.weight, level.resize.bias, stride=2)
        return norm_conv(self.middle(x), self.norm, self.out)


class Decoder(nn.Module):
    """Raw latents `b c h w` -> `b 3 (h s) (w s)`; its levels go from the smallest maps to the largest."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths, count = config.widths[::-1], len(config.widths)
        self.stem = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], config)
        self.levels = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)], widths[i], config, depth=config.depth + 1,
                attention=i < config.attention, resize=i < count - 1,
            )
            for i in range(count)
        )  # fmt: skip
        self.norm = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stem(x))
        for level in self.levels:
            assert isinstance(level, Level)
            x = level(x)
            if level.resize is not None:
                x = double_conv(x, level.resize)
        return norm_conv(x, self.norm, self.out)


class Vae(nn.Module):
    """`encode`: `b 3 h w` in [-1, 1] -> normalised latents `b c h/s w/s`; `decode` back."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.stride = 2 ** (len(config.widths) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        both = 2 * config.channels
        self.quant = nn.Conv2d(both, both, 1) if config.quant else nn.Identity()
        self.unquant = nn.Conv2d(config.channels, config.channels, 1) if config.quant else nn.Identity()

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latents."""
        mean, log_variance = self._each(lambda x: self.quant(self.encoder(x)), image).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, image: Tensor, *, noise: Tensor | None = None, tile: int | None = None) -> Tensor:
        """Normalised latents: the mean, or with `noise` like the latents a sample of the posterior.

        `tile`: the side in pixels from which a picture is encoded in parts that overlap.
        """
        self._check(image, 3, self.stride, "picture")

        def raw(part: Tensor) -> Tensor:
            return torch.cat(self.posterior(part), dim=1)

        both = (
            raw(image)
            if tile is None
            else tiled(raw, image, side=tile, unit=self.stride, factor=1 / self.stride)
        )
        mean, log_variance = both.chunk(2, dim=1)
        return self.normalise(mean if noise is None else mean + noise * (0.5 * log_variance).exp())

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Normalised latents -> pictures, about [-1, 1].

        `tile`: the side in pixels from which a picture is decoded in parts that overlap and are blended. Each part is
        normalised by itself, so the result is near that of the whole, not equal.
        """
        self._check(latents, self.channels, 1, "latents")
        raw = latents / self.config.scale + self.config.shift
        if tile is None:
            return self._draw(raw)
        if tile < self.stride or tile % self.stride:
            raise InputError(f"tile {tile} cannot be drawn: give a multiple of {self.stride} pixels.")
        return tiled(self._draw, raw, side=tile // self.stride, unit=1, factor=self.stride)

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.config.shift) * self.config.scale

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) of the latents of pictures of `size`."""
        return self.channels, size[0] // self.stride, size[1] // self.stride

    def _draw(self, raw: Tensor) -> Tensor:
        return self._each(lambda x: self.decoder(self.unquant(x)), raw, grown=self.stride)

    def _each(self, function: Callable[[Tensor], Tensor], x: Tensor, *, grown: int = 1) -> Tensor:
        """Without gradients as few items at a time as fill the machine."""
        if torch.is_grad_enabled():
            return function(x)
        numbers = self.config.widths[0] * x.shape[-2] * x.shape[-1] * grown**2
        return torch.cat([function(part) for part in x.split(max(1, TOGETHER // numbers))])

    def _check(self, x: Tensor, channels: int, unit: int, what: str) -> None:
        if (
            x.ndim != 4
            or x.shape[1] != channels
            or not len(x)
            or any(s < unit or s % unit for s in x.shape[-2:])
        ):
            raise InputError(
                f"{what} of shape {tuple(x.shape)} cannot be taken: give `b {channels} h w` with sides that are"
                f" multiples of {unit}."
            )


def norm_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, *, onto: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))), plus `onto`, which without gradients is where the result is added."""
    if torch.is_grad_enabled():
        out = conv(F.silu(norm(x)))
        return out if onto is None else onto + out
    height = x.shape[-2]
    rows = max(1, SLAB // (x.numel() // height))
    if rows >= height:
        out = conv(F.silu(norm(x), inplace=True))
        return out if onto is None else onto.add_(out)
    grouped = rearrange(x, "b (g c) h w -> b g (c h w)", g=norm.num_groups)
    variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
    each = x.shape[1] // norm.num_groups
    inverse = (variance + norm.eps).rsqrt().repeat_interleave(each, dim=1)
    gain = inverse * norm.weight
    bias = norm.bias - mean.repeat_interleave(each, dim=1) * gain
    gain, bias = (rearrange(part, "b c -> b c 1 1") for part in (gain, bias))
    out = x.new_empty(len(x), conv.out_channels, *x.shape[-2:]) if onto is None else onto
    for top in range(0, height, rows):
        end = min(top + rows, height)
        first, last = max(top - 1, 0), min(end + 1, height)
        part = F.silu(torch.addcmul(bias, x[:, :, first:last], gain), inplace=True)
        part = F.pad(part, (0, 0, int(top == 0), int(end == height)))
        made = F.conv2d(part, conv.weight, conv.bias, padding=(0, 1))
        if onto is None:
            out[:, :, top:end] = made
        else:
            out[:, :, top:end] += made
    return out


def double_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3 x 3 convolution of the map with every pixel doubled both ways, `b c h w -> b d 2h 2w`.

    Of two neighbours that are equal the weights add up, so each of the four pixels that one becomes is a 2 x 2
    convolution of the small map: 4 / 9 of the products, and the large map is never held.
    """
    if torch.is_grad_enabled():
        return F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, conv.bias, padding=1)
    h, w = x.shape[-2:]
    out = x.new_empty(len(x), conv.out_channels, 2 * h, 2 * w)
    padded = F.pad(x, (1, 1, 1, 1))

    def halves(weight: Tensor, dim: int, odd: int) -> Tensor:
        a, b, c = weight.unbind(dim)
        return torch.stack([a + b, c] if odd else [a, b + c], dim)

    for i in (0, 1):
        for j in (0, 1):
            weight = halves(halves(conv.weight, 2, i), 3, j)
            out[:, :, i::2, j::2] = F.conv2d(padded[:, :, i : i + h + 1, j : j + w + 1], weight, conv.bias)
    return out


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    side: int,
    unit: int,
    factor: float,
    overlap: float = 0.25,
) -> Tensor:
    """`function`, which changes sizes by `factor`, on tiles of `side`, a multiple of `unit`, blended in overlaps.

    In an overlap the weights of the tiles go linearly from one to the other. A picture of at most one tile is computed
    whole.
    """
    height, width = x.shape[-2:]
    if side < 2 * unit or side % unit:
        raise InputError(f"tiles of {side} cannot be cut: give a multiple of {unit}, {2 * unit} or more.")
    if max(height, width) <= side:
        return function(x)
    shared = max(unit, round(side * overlap) // unit * unit)

    def starts(length: int) -> list[int]:
        last = max(length - side, 0)
        return [*range(0, last, side - shared), last]

    out: Tensor | None = None
    total: Tensor | None = None
    for top in starts(height):
        for left in starts(width):
            part = function(x[..., top : top + side, left : left + side])
            ramps = [_ramp(n, round(shared * factor)).to(part) for n in part.shape[-2:]]
            weight = ramps[0][:, None] * ramps[1]
            if out is None or total is None:
                shape = round(height * factor), round(width * factor)
                out, total = part.new_zeros(*part.shape[:2], *shape), part.new_zeros(shape)
            rows = slice(round(top * factor), round(top * factor) + part.shape[-2])
            columns = slice(round(left * factor), round(left * factor) + part.shape[-1])
            out[..., rows, columns] += part * weight
            total[rows, columns] += weight
    assert out is not None
    assert total is not None
    return out / total


def _ramp(length: int, shared: int) -> Tensor:
    """Weights of a tile's places: rising from its edge over `shared` of them, then 1, then falling."""
    place = torch.arange(length) + 0.5
    return torch.minimum(place, length - place).div(max(shared, 1)).clamp(max=1)


# 2112.10752 (models/first_stage_models of the authors), and the constants of those who trained their own.
VAES: dict[str, VaeConfig] = {
    "sd": VaeConfig(),
    "sdxl": VaeConfig(scale=0.13025),
    "sd3": VaeConfig(channels=16, quant=False, scale=1.5305, shift=0.0609),
    "flux": VaeConfig(channels=16, quant=False, scale=0.3611, shift=0.1159),
    "kl-f4": VaeConfig(channels=3, widths=(128, 256, 512), scale=1.0),
    "kl-f8": VaeConfig(scale=1.0),
    "kl-f16": VaeConfig(channels=16, widths=(128, 128, 256, 256, 512), attention=1, scale=1.0),
    "kl-f32": VaeConfig(channels=64, widths=(128, 128, 256, 256, 512, 512), attention=2, scale=1.0),
}
