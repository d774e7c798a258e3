"""What every `embed_image` takes: a tensor, paths or open pictures, as one batch of the size that a tower reads, or
each at its own aspect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reverie.errors import InputError
from reverie.media import Part, shown, whole_patches
from reverie.pictures import to_signal

Images = Tensor | Sequence[Tensor] | Sequence[str | Path | Part | Image.Image]
AT_ONCE = 64  # pictures of a list that are open at a time
REACH = 1.5  # a generator may overshoot 1 a little; pictures normalised by mean and std reach 1.8 and more


def check_images(images: Sequence) -> None:
    """InputError: this is no list of one picture or path, or more."""
    if isinstance(images, str | Path | Part | Image.Image):
        raise InputError("images must be a list, but is one picture or path: write [image].")
    if not hasattr(images, "__len__"):
        raise InputError(f"images must be a tensor or a list, but are {images!r:.60}.")
    if not len(images):
        raise InputError("there is no image: give a list of one or more.")
    for image in images:
        if not isinstance(image, str | Path | Part | Image.Image):
            raise InputError(
                f"an image is a path or a PIL picture, not {type(image).__name__}: stack to `b 3 h w`."
            )


def open_images(
    images: Sequence[str | Path | Part | Image.Image],
    *,
    size: int,
    fit: str = "crop",
    resample: str = "bicubic",
) -> Tensor:
    """Pictures or their paths -> `b 3 size size` in [-1, 1]; `media.decode_array` says how they are fitted."""
    check_images(images)
    signals = [to_signal(image, size=size, fit=fit, resample=resample) for image in images]
    return torch.stack([torch.from_numpy(signal) for signal in signals])


def open_native(
    images: Sequence[str | Path | Part | Image.Image], *, patch: int, area: int, resample: str = "bicubic"
) -> list[Tensor]:
    """Pictures or their paths -> each `3 h w` in [-1, 1] at its own aspect (`media.whole_patches`)."""
    check_images(images)
    signals = []
    for image in images:
        size = whole_patches(*(max(side, 1) for side in shown(image)), patch=patch, area=area)
        signals.append(torch.from_numpy(to_signal(image, size=size, fit="squash", resample=resample)))
    return signals


def as_native(
    images: Sequence[Tensor], *, patch: int, area: int, like: Tensor, checked: bool = True
) -> list[Tensor]:
    """Float pictures `3 h w` in [-1, 1] of any sizes -> each in whole patches at its own aspect, else as `as_batch`."""
    found = []
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise InputError(f"a picture must be `3 h w` with pixels, but has shape {tuple(image.shape)}.")
        size = whole_patches(*image.shape[-2:], patch=patch, area=area)
        found.append(as_batch(image[None], size=size, like=like, fit="squash", checked=checked)[0])
    return found


def in_parts(images: Sequence, embed: Callable[[Sequence], Tensor]) -> Tensor:
    """`embed` of AT_ONCE pictures at a time, so that a long list does not stand in memory: `b d`."""
    check_images(images)
    images = list(images)
    return torch.cat([embed(images[at : at + AT_ONCE]) for at in range(0, len(images), AT_ONCE)])


def as_batch(
    images: Tensor, *, size: int | tuple[int, int], like: Tensor, fit: str = "crop", checked: bool = True
) -> Tensor:
    """Float `b 3 h w` in [-1, 1] of any size -> `b 3 size size` with the device and data type of `like`.

    `size` may be (height, width), for `squash` alone.

    `fit`: other sizes are resized and cropped, or squashed, as pictures are. `checked`: that the values are in range,
    which training need not ask at every step. Raises InputError.
    """
    images = images.to(like.device)
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images must be `b 3 h w`, but have shape {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise InputError(
            f"images must be float in [-1, 1], but are {images.dtype}: divide bytes by 127.5, less 1."
        )
    if not all(images.shape[-2:]):
        raise InputError(f"images must have pixels, but have shape {tuple(images.shape)}.")
    images = images.to(like.dtype)  # from whatever numpy and half-precision code made
    if checked and len(images) and not (reach := images.abs().amax()) <= REACH:  # NaN neither
        raise InputError(
            f"images must be in [-1, 1], but reach {reach:.4g}: of bytes take x / 127.5 - 1; mean and std are applied"
            " inside, so leave another library's normalisation out."
        )
    height, width = images.shape[-2:]
    box = (size, size) if isinstance(size, int) else size
    if (height, width) == box:
        return images
    if fit == "squash":
        return F.interpolate(images, size=box, mode="bicubic", antialias=True).clamp(-1, 1)
    assert isinstance(size, int)
    short = min(height, width)
    box = (int(size * height / short), int(size * width / short))
    images = F.interpolate(images, size=box, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (box[0] - size) // 2, (box[1] - size) // 2
    return images[..., top : top + size, left : left + size]


def coloured(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures `... 3 h w` in [-1, 1] as a tower expects them: less the mean of colours in [0, 1], over their std."""
    colour = rearrange(torch.tensor([mean, std]), "two c -> two c 1 1").to(images)
    return ((images + 1) / 2 - colour[0]) / colour[1]
