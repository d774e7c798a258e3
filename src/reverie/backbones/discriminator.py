"""PatchGAN: a discriminator that judges every patch by itself (Isola et al. 2016, 1611.07004), of frames and of clips.

    frames   4x4 convolutions, each halving space                      one logit for each patch of each frame
    clips    the same over 3 frames, which see how things move         one logit for each patch at each frame

Group norm stands where the paper has batch norm: a picture is judged alike in any batch, and nothing is measured on the
way that a resumed run would have to know. It lies among the backbones since it is a network that predicts; losses own
no parameters, and a codec is no part of it.
"""

from __future__ import annotations

import dataclasses

from einops import rearrange
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    width: int = 32  # channels of the first convolution; they double up to four times that
    depth: int = 3  # halvings of space; a judged patch has 8, 18, 38 or 78 pixels a side at 1 to 4
    clips: bool = True  # whether clips are judged too, beside their frames


class Patches(nn.Module):
    """`b 3 f h w` -> logits `b f h' w'`, with convolutions over `time` frames."""

    def __init__(self, config: DiscriminatorConfig, *, time: int):
        super().__init__()
        widths = [config.width * 2 ** min(i, 2) for i in range(config.depth)]

        def conv(a: int, b: int, *, side: int = 4, stride: int = 2) -> nn.Conv3d:
            return nn.Conv3d(a, b, (time, side, side), stride=(1, stride, stride), padding=(time // 2, 1, 1))

        layers: list[nn.Module] = [conv(3, widths[0]), nn.LeakyReLU(0.2)]
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [conv(before, after), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, conv(widths[-1], 1, side=3, stride=1))

    def forward(self, video: Tensor) -> Tensor:
        return self.body(video)[:, 0]


class Discriminator(nn.Module):
    """video `b 3 f h w` in [-1, 1] -> its logits, `b f h' w'` each: by frame, and of more than one frame by motion."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        self.frames = Patches(config, time=1)
        self.clips = Patches(config, time=3) if config.clips else None

    def forward(self, video: Tensor) -> list[Tensor]:
        alone = rearrange(video, "b c f h w -> (b f) c 1 h w")
        logits = [rearrange(self.frames(alone), "(b f) 1 h w -> b f h w", b=len(video))]
        if self.clips is not None and video.shape[2] > 1:
            logits.append(self.clips(video))
        return logits
