"""A picture codec on videos gives of each frame what it gives of the picture."""

from __future__ import annotations

import torch

from reverie.codecs.by_frame import ByFrame
from reverie.codecs.vae import Vae, VaeConfig


@torch.no_grad()
def test_each_frame_is_a_picture():
    torch.manual_seed(0)
    vae = Vae(VaeConfig(channels=3, widths=(8, 16), depth=1, groups=4)).eval()
    codec, video = ByFrame(vae), torch.rand(2, 3, 4, 8, 12) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (2, codec.channels, 4, 4, 6)
    assert codec.stride == (1, 2)
    assert codec.whole(4) == 4
    for f in range(4):
        torch.testing.assert_close(latents[:, :, f], vae.encode(video[:, :, f]))
        torch.testing.assert_close(codec.decode(latents)[:, :, f], vae.decode(latents[:, :, f]))
