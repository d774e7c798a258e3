"""A supervised classifier that learns from two drawings of each thing: prototypes (1703.05175) in a contrastive
space (supervised: 2004.11362).

    one drawing ----- Resnet --- mean over places --- projection --- unit --\\
                                                                            x temperature -> which belong together
    another hand's -- Resnet --- mean over places --- projection --- unit --/

    afterwards: a name's prototype is the mean vector of its drawings; a picture is named by the nearest prototype

With thousands of names and two drawings of each, one logit for every name learns nothing for epochs; telling the
things of one batch apart is learnt from the first steps on, across hands. It reads no words, so it judges what a
generator drew from words without sharing anything with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.encoders.images import Images, as_batch, in_parts, open_images
from reverie.encoders.resnet import Resnet, ResnetConfig
from reverie.errors import InputError
from reverie.objectives.contrastive import bounded, info_nce


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    names: tuple[str, ...]
    size: int = 64  # pixels of a side
    image: ResnetConfig = ResnetConfig()
    width: int = 128  # of the space

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise InputError(f"{len(self.names)} names of classes must be at least one and all different.")


class Classifier(nn.Module):
    """The space, its temperature, and the prototypes, which are zero until `learn`."""

    no_decay = ("log_scale",)
    prototypes: Tensor

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.image = Resnet(config.image)
        self.projection = nn.Linear(config.image.widths[-1], config.width, bias=False)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # [1]: sharding refuses scalars
        self.register_buffer("prototypes", torch.zeros(len(config.names), config.width))

    def embed_image(self, images: Images) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size, or paths, or pictures -> unit vectors `b d`."""
        if not isinstance(images, Tensor):
            return in_parts(images, lambda part: self.embed_image(self.prepare(part)))
        images = as_batch(images, size=self.config.size, like=self.log_scale, checked=not self.training)
        return F.normalize(self.projection(self.image.pool(self.image(images))), dim=-1)

    def prepare(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Pictures or their paths -> `b 3 size size` in [-1, 1]."""
        return open_images(images, size=self.config.size).to(self.log_scale.device)

    def classify(self, images: Images, names: Sequence[str] | None = None) -> Tensor:
        """Probabilities `images names`, over the given names alone or over all. InputError: a name it never learnt."""
        prototypes = self.prototypes
        if names is not None:
            place = {name: i for i, name in enumerate(self.config.names)}
            unknown = [name for name in names if name not in place]
            if unknown:
                raise InputError(
                    f"{unknown[0]!r} is none of the {len(place)} names that this classifier learnt: leave it out."
                )
            prototypes = prototypes[[place[name] for name in names]]
        return (self.scale() * self.embed_image(images) @ prototypes.T).softmax(-1)

    @torch.no_grad()
    def learn(self, vectors: Tensor, label: Tensor) -> None:
        """Set the prototypes from embeddings `b d` of pictures and `label b`, indices of their names; none may lack."""
        assert set(label.tolist()) == set(range(len(self.config.names))), "a name has no picture"
        total = torch.zeros_like(self.prototypes).index_add_(0, label.to(vectors.device), vectors)
        self.prototypes.copy_(F.normalize(total, dim=-1))

    def scale(self) -> Tensor:
        return bounded(self.log_scale)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`image b 3 h w` and `other b 3 h w` show the same things, `label b` says which."""
        one, other = self.embed_image(torch.cat([batch["image"], batch["other"]])).chunk(2)
        label = batch["label"]
        with torch.no_grad():
            right = label[(one @ other.T).argmax(-1)] == label
        return {
            "loss": info_nce(one, other, self.scale(), label=label),
            "accuracy": right.float().mean(),
            "scale": self.scale().detach().squeeze(),
        }
