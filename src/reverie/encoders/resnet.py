"""A small residual network: pre-activation blocks (He et al. 2016, 1603.05027) with GroupNorm (1803.08494).

GroupNorm looks at one picture alone, so the network means the same in training and afterwards.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from einops import rearrange
from torch import Tensor, nn

from reverie.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResnetConfig:
    widths: tuple[int, ...] = (32, 48, 96, 192)  # channels at 1/2, 1/4, 1/8... of the size
    depths: tuple[int, ...] = (0, 1, 1)  # residual blocks at 1/4, 1/8...
    groups: int = 8

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) - 1 or any(width % self.groups for width in self.widths):
            raise InputError(
                f"widths {self.widths} need one depth each after the first, not {self.depths}, "
                f"and must be multiples of {self.groups}."
            )


class Residual(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), zero at first."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))


class Resnet(nn.Module):
    """image `b 3 h w` -> features `b n d`, one for each place of the last and coarsest grid."""

    def __init__(self, config: ResnetConfig):
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.widths[0], 4, stride=2, padding=1)
        stages = []
        for (before, after), depth in zip(itertools.pairwise(config.widths), config.depths, strict=True):
            halve = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            blocks = (Residual(after, config.groups) for _ in range(depth))
            stages.append(nn.Sequential(nn.GroupNorm(config.groups, before), nn.ReLU(), halve, *blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.GroupNorm(config.groups, config.widths[-1])

    def forward(self, image: Tensor) -> Tensor:
        return rearrange(torch.relu(self.norm(self.stages(self.stem(image)))), "b d h w -> b (h w) d")

    def pool(self, features: Tensor) -> Tensor:
        """features `b n d` -> one vector per picture `b d`."""
        return features.mean(dim=1)
