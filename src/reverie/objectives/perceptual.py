"""A perceptual loss: how far two pictures lie apart in what a network sees of them (LPIPS, Zhang et al., 1801.03924).

Section 3: the features of several layers, made unit vectors at every position, compared there by their squared
distance, averaged over the positions. Layers count equally, where LPIPS learns a weight for each channel from what
people judge.

`features` is any callable, pictures `b 3 h w` in [-1, 1] -> the layers, each `b n d`, one vector per position: such as
`Clip.layers` of a trained CLIP. It is called once for the drawn pictures and once for the true ones. The gradient
reaches what was drawn; a network that is used so has to be frozen (`reverie.load` gives it so).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

Features = Callable[[Tensor], Sequence[Tensor]]


def perceptual(drawn: Tensor, true: Tensor, features: Features) -> Tensor:
    """The mean over pictures, layers and positions of |f(drawn) - f(true)|^2 of unit vectors f: 0 the same, at most 4.

    Pictures `b 3 h w` or videos `b 3 f h w`, whose frames are pictures.
    """
    assert drawn.shape == true.shape, (drawn.shape, true.shape)
    with torch.no_grad():
        wanted = [_unit(layer) for layer in features(_pictures(true))]
    found = [_unit(layer) for layer in features(_pictures(drawn))]
    assert len(found) == len(wanted) > 0, "the network gives no layers"
    apart = [(a - b).square().sum(-1).mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(apart).mean()


def tiled(features: Features, size: int) -> Features:
    """`features` of a network that sees `size x size` pixels alone, for pictures of any size.

    A larger picture is seen in as few squares as cover it, evenly spaced; one with a shorter side is enlarged first.
    """

    def of_tiles(images: Tensor) -> Sequence[Tensor]:
        short = min(images.shape[-2:])
        if short < size:
            box = [round(side * size / short) for side in images.shape[-2:]]
            images = F.interpolate(images, size=box, mode="bilinear", align_corners=False)
        height, width = images.shape[-2:]
        return features(
            torch.cat(
                [
                    images[..., top : top + size, left : left + size]
                    for top in _starts(height, size)
                    for left in _starts(width, size)
                ]
            )
        )

    return of_tiles


def _starts(length: int, size: int) -> list[int]:
    """Where spans of `size` begin, as few as cover `length`."""
    count = -(-length // size)
    return [0] if count == 1 else torch.linspace(0, length - size, count).round().long().tolist()


def _unit(layer: Tensor) -> Tensor:
    return F.normalize(layer.float(), dim=-1)


def _pictures(x: Tensor) -> Tensor:
    return rearrange(x, "b c f h w -> (b f) c h w") if x.ndim == 5 else x
