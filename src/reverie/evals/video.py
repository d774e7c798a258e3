"""What a clip is worth from frame to frame: does each frame show what was asked for, and do they follow on each other?

    clip_score    the cosine of each frame and the text (CLIPScore, 2104.08718, without its factor 2.5)
    consistency   the cosine of neighbouring frames' features (Gen-1, 2302.03011)      jumps of content: low
    flicker       second differences over first ones, of pixels                        even change: 0, noise: 1.73

`generation.motion` says how much frames differ at all, without which the last two mean little: a still clip is perfect.
Clips are `n 3 f h w` in [-1, 1], pictures `n 3 h w`. The encoder is given as functions that give unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reverie.errors import InputError


@torch.no_grad()
def frame_features(samples: Tensor, embed_image: Callable[[Tensor], Tensor], *, batch: int = 64) -> Tensor:
    """Unit features of every frame, `n f d`; a picture has one."""
    video = samples if samples.ndim == 5 else samples[:, :, None]
    pictures = rearrange(video, "n c f h w -> (n f) c h w")
    rows = [embed_image(pictures[at : at + batch]).float().cpu() for at in range(0, len(pictures), batch)]
    return rearrange(F.normalize(torch.cat(rows), dim=-1), "(n f) d -> n f d", f=video.shape[2])


def clip_score(features: Tensor, texts: Tensor) -> Tensor:
    """The cosine of every frame, `n f d`, with its text, `n d`: `n f`. Both are unit vectors."""
    if len(features) != len(texts):
        raise InputError(f"{len(features)} samples and {len(texts)} texts: give each sample its own.")
    return torch.einsum("n f d, n d -> n f", features, texts.to(features))


def consistency(features: Tensor) -> Tensor:
    """The mean cosine of neighbouring frames, `n f d` -> `n`: 1 where nothing changes."""
    _at_least(features.shape[1], 2)
    return (features[:, 1:] * features[:, :-1]).sum(-1).mean(1)


def flicker(clips: Tensor) -> Tensor:
    """Mean |x(f+1) - 2 x(f) + x(f-1)| over mean |x(f+1) - x(f)|, `n 3 f h w` -> `n`.

    0 for even change and for a still clip, 1.73 for frames of independent noise, 2 for frames that alternate.
    """
    _at_least(clips.shape[2] if clips.ndim == 5 else 1, 3)
    first = clips[:, :, 1:] - clips[:, :, :-1]
    second = first[:, :, 1:] - first[:, :, :-1]
    amount = first.abs().mean(dim=(1, 2, 3, 4))
    return second.abs().mean(dim=(1, 2, 3, 4)) / amount.clamp_min(1e-12)


def _at_least(frames: int, least: int) -> None:
    if frames < least:
        raise InputError(f"clips of {frames} frames: this asks for {least} or more.")
