"""A codec of pictures as one of videos: each frame by itself, so a latent stands for one frame."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class ByFrame(nn.Module):
    """`encode`: `b 3 f h w` -> latents `b c f h/s w/s`, as `codec` (codecs/vae.py) has them; `decode` back."""

    def __init__(self, codec: nn.Module):
        super().__init__()
        self.codec, self.config = codec, codec.config

    @property
    def channels(self) -> int:
        return int(self.codec.channels)  # type: ignore[arg-type]

    @property
    def stride(self) -> tuple[int, int]:
        """(time, space)."""
        return 1, int(self.codec.stride)  # type: ignore[arg-type]

    def encode(self, video: Tensor) -> Tensor:
        return self._each("encode", video)

    def decode(self, latents: Tensor) -> Tensor:
        return self._each("decode", latents)

    def whole(self, frames: int) -> int:
        """As many: any number of frames fills its latent frames."""
        return frames

    def _each(self, what: str, x: Tensor) -> Tensor:
        done = getattr(self.codec, what)(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(done, "(b f) c h w -> b c f h w", b=len(x))
