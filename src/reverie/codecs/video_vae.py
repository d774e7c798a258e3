"""A causal autoencoder of video, first cut: space by 8, time by 4, the first frame alone a picture.

Convolutions in space are per frame; those in time look back only (the past is padded with the first frame), as in
MAGVIT-v2 (2310.05737, section 3.1), so frames 1, 2-5, 6-9, ... become one latent frame each, and a picture is encoded
exactly as the first frame of a clip. Latents are normalised per channel; the constants travel with the weights.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoVaeConfig:
    channels: int = 16
    widths: tuple[int, ...] = (48, 96, 192)  # one per halving of space
    temporal: tuple[bool, ...] = (False, True, True)  # which of them halve time as well

    @property
    def stride(self) -> tuple[int, int]:
        """(time, space)."""
        return 2 ** sum(self.temporal), 2 ** len(self.widths)


class CausalTime(nn.Module):
    """A convolution over three frames that sees the present and the past; `stride` 2 halves time, keeping the first."""

    def __init__(self, width: int, *, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(width, width, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        b, (h, w) = len(x), x.shape[-2:]
        x = rearrange(x, "b c f h w -> (b h w) c f")
        x = torch.cat([repeat(x[..., :1], "b c 1 -> b c two", two=2), x], dim=-1)
        return rearrange(self.conv(x), "(b h w) c f -> b c f h w", b=b, h=h, w=w)


class Frames(nn.Module):
    """A module for pictures, on each frame of a video."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        return rearrange(
            self.module(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=b
        )


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TimeUp(nn.Module):
    """Doubles the frames after the first: f -> 2 f - 1, then smooths over the past."""

    def __init__(self, width: int):
        super().__init__()
        self.smooth = CausalTime(width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return x + self.smooth(x)


class VideoVae(nn.Module):
    """`encode`: `b 3 f h w` in [-1, 1] -> normalised latents `b c g h/8 w/8`, g = 1 + (f - 1) / 4; `decode` back."""

    mean: Tensor  # of the raw latents, per channel
    std: Tensor

    def __init__(self, config: VideoVaeConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        down: list[nn.Module] = [Frames(nn.Conv2d(3 * 4, widths[0], 3, padding=1))]
        for i, width in enumerate(widths):
            if i:
                down.append(Frames(nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1)))
            if config.temporal[i]:
                down.append(CausalTime(width, stride=2))
            down.append(Frames(Residual(width)))
        down.append(
            Frames(
                nn.Sequential(
                    nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 2 * config.channels, 1)
                )
            )
        )
        self.encoder = nn.Sequential(*down)
        up: list[nn.Module] = [Frames(nn.Conv2d(config.channels, widths[-1], 3, padding=1))]
        for i in reversed(range(len(widths))):
            up.append(Frames(Residual(widths[i])))
            if config.temporal[i]:
                up.append(TimeUp(widths[i]))
            if i:
                up.append(
                    Frames(
                        nn.Sequential(
                            nn.Upsample(scale_factor=2), nn.Conv2d(widths[i], widths[i - 1], 3, padding=1)
                        )
                    )
                )
        up.append(
            Frames(
                nn.Sequential(
                    nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3 * 4, 3, padding=1)
                )
            )
        )
        self.decoder = nn.Sequential(*up)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("std", torch.ones(config.channels))

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latents."""
        folded = rearrange(video, "b c f (h p) (w q) -> b (c p q) f h w", p=2, q=2)
        mean, log_variance = self.encoder(folded).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, video: Tensor) -> Tensor:
        wide = "c -> 1 c 1 1 1"
        return (self.posterior(video)[0] - rearrange(self.mean, wide)) / rearrange(self.std, wide)

    def decode(self, latents: Tensor) -> Tensor:
        wide = "c -> 1 c 1 1 1"
        return self.draw(latents * rearrange(self.std, wide) + rearrange(self.mean, wide))

    def draw(self, raw: Tensor) -> Tensor:
        """Raw latents -> video."""
        return rearrange(self.decoder(raw), "b (c p q) f h w -> b c f (h p) (w q)", p=2, q=2)

    def whole(self, frames: int) -> int:
        """The least number of frames, at least `frames`, that fills its latent frames: 1, 5, 9, ..."""
        time = self.config.stride[0]
        return 1 + time * -(-(frames - 1) // time)

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        time, space = self.config.stride
        return self.config.channels, 1 + -(-(frames - 1) // time), size[0] // space, size[1] // space

    def latent_mask(self, mask: Tensor) -> Tensor:
        """`b f` -> `b g`, for clips that fill their latent frames: True where every frame that one stands for is."""
        rest = rearrange(mask[:, 1:], "b (g time) -> b g time", time=self.config.stride[0]).all(-1)
        return torch.cat([mask[:, :1], rest], dim=1)

    def loss(self, batch: dict[str, Tensor], *, kl: float = 1e-4) -> dict[str, Tensor]:
        """L1, plus a small KL to a standard normal. `video b 3 f h w`, `noise` like the latents."""
        mean, log_variance = self.posterior(batch["video"])
        raw = mean + batch["noise"] * (0.5 * log_variance).exp()
        l1 = F.l1_loss(self.draw(raw), batch["video"])
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": l1 + kl * divergence, "l1": l1, "kl": divergence}
