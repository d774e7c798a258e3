"""A supervised classifier: a picture's features, averaged, and one linear layer over fixed names (1512.03385).

    image --- Resnet --- mean over places --- linear --- one logit for each name

It reads no words, so it can judge what a generator drew from words without sharing anything with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.encoders.resnet import Resnet, ResnetConfig
from reverie.errors import InputError
from reverie.pictures import to_signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    names: tuple[str, ...]
    size: int = 64  # pixels of a side
    image: ResnetConfig = ResnetConfig()
    smoothing: float = 0.1  # of the labels (1512.00567, section 7)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise InputError(f"{len(self.names)} names of classes must be at least one and all different.")


class Classifier(nn.Module):
    """The features and the layer that names them."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.image = Resnet(config.image)
        self.head = nn.Linear(config.image.widths[-1], len(config.names))

    def embed_image(self, images: Tensor | Sequence[str | Path | Image.Image]) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size, or paths, or pictures -> unit vectors `b d`."""
        return F.normalize(self._features(images), dim=-1)

    def classify(
        self, images: Tensor | Sequence[str | Path | Image.Image], names: Sequence[str] | None = None
    ) -> Tensor:
        """Probabilities `images names`, over the given names alone or over all. InputError: a name it never learnt."""
        logits = self.head(self._features(images))
        if names is not None:
            place = {name: i for i, name in enumerate(self.config.names)}
            unknown = [name for name in names if name not in place]
            if unknown:
                raise InputError(
                    f"{unknown[0]!r} is none of the {len(place)} names that this classifier learnt: leave it out."
                )
            logits = logits[:, [place[name] for name in names]]
        return logits.softmax(-1)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`image b 3 h w`, `label b` (indices into the names): cross-entropy with smoothed labels."""
        logits = self.head(self._features(batch["image"]))
        accuracy = (logits.argmax(-1) == batch["label"]).float().mean()
        return {
            "loss": F.cross_entropy(logits, batch["label"], label_smoothing=self.config.smoothing),
            "accuracy": accuracy,
        }

    def _features(self, images: Tensor | Sequence[str | Path | Image.Image]) -> Tensor:
        size = self.config.size
        if not isinstance(images, Tensor):
            images = torch.stack([torch.from_numpy(to_signal(image, size=size)) for image in images])
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must be `b 3 h w`, but have shape {tuple(images.shape)}.")
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.image.pool(self.image(images.to(self.head.weight.device)))
