"""CLIP's own ResNet (2103.00020, section 2.3): a stem of three convolutions as ResNet-D's (1812.01187), average pooling
before every convolution that would stride (1904.11486), and attention from the mean feature in place of a mean.

It has batch norms: in training they read the batch, afterwards the averages that they kept.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import InputError
from reverie.nn.pooling import QueryAttention

GROWTH = 4  # output channels of a block / channels inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipResnetConfig:
    kind: Literal["resnet"] = "resnet"
    size: int = 224  # pixels of a side, a multiple of 32
    width: int = 64  # channels inside the blocks of the first stage; each later stage has twice as many
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)  # blocks of the stages
    heads: int = 32  # of the pooling
    out: int = 1024  # channels of the pooled vector


class Bottleneck(nn.Module):
    """`b c h w -> b 4d h/s w/s`: 1x1, 3x3, pooling by the stride s, 1x1, plus a shortcut."""

    def __init__(self, channels: int, width: int, *, stride: int):
        super().__init__()
        out = GROWTH * width
        self.stride = stride
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = None
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        if self.stride > 1:
            x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
        y = self.norm3(self.conv3(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ClipResnet(nn.Module):
    """image `b 3 size size` -> features `b n d` of the last stage, d = 32 x width."""

    def __init__(self, config: ClipResnetConfig):
        super().__init__()
        self.config = config
        if config.size < 32 or config.size % 32:
            raise InputError(f"size {config.size} is no multiple of 32, which the ResNet divides it by.")
        width, last = config.width, 32 * config.width
        if width % 2 or last % config.heads:
            raise InputError(
                f"width {width} must be even and {last}, 32 x width, a multiple of {config.heads} heads."
            )
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width // 2), nn.BatchNorm2d(width // 2)
        self.norm3 = nn.BatchNorm2d(width)
        channels, stages = width, []
        for number, depth in enumerate(config.depths):
            inside, blocks = width << number, []
            for block in range(depth):
                stride = 2 if number and not block else 1
                blocks.append(Bottleneck(channels, inside, stride=stride))
                channels = GROWTH * inside
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.positions = nn.Parameter(torch.randn((config.size // 32) ** 2 + 1, last) * last**-0.5)
        self.pooling = QueryAttention(last, config.heads, out=config.out)
        for part in (self.pooling.q, self.pooling.k, self.pooling.v, self.pooling.out):
            nn.init.normal_(part.weight, std=last**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(image)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return rearrange(x, "b d h w -> b (h w) d")

    def embed(self, image: Tensor) -> Tensor:
        """image -> `b out`."""
        return self.pool(self(image))

    def pool(self, features: Tensor) -> Tensor:
        """features `b n d` -> one vector per picture `b out`."""
        x = torch.cat([reduce(features, "b n d -> b 1 d", "mean"), features], dim=1)
        x = x + self.positions.to(x.dtype)
        return self.pooling(x[:, :1], x)[:, 0]
