"""CLIP: "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al. 2021, 2103.00020), and
SigLIP: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al. 2023, 2303.15343), which differs in its loss.

    image --- Vit, ClipResnet, Navit --- projection --- unit vector --\\
                                                                       x temperature (+ bias) -> logits -> loss
    text  --- Text --------------------- projection --- unit vector --/

`softmax`: of all texts of the batch which is this picture's, and the other way round. `sigmoid`: of every picture and
text by itself whether they belong together; `bias` says that most do not.

Images are float `b 3 h w` in [-1, 1]; the mean and std that the public weights expect are applied inside. A `Navit`
(2307.06304) reads each picture at its own aspect, so it also takes a list of `3 h w` of unlike sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.codecs.bpe import Bpe
from reverie.codecs.pieces import Pieces
from reverie.encoders.clip_resnet import ClipResnet, ClipResnetConfig
from reverie.encoders.images import Images, as_batch, as_native, coloured, in_parts, open_images, open_native
from reverie.encoders.navit import Navit, NavitConfig
from reverie.encoders.text import Text, TextConfig
from reverie.encoders.texts import strings
from reverie.encoders.vit import Vit, VitConfig
from reverie.errors import InputError
from reverie.objectives.contrastive import ALONE, Peers, accuracy, bounded, info_nce, sigmoid_loss

TEXTS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    image: VitConfig | ClipResnetConfig | NavitConfig = VitConfig()
    text: TextConfig = TextConfig()
    width: int = 512  # of the shared space
    image_projection: bool = True  # False: what the image tower pools lies in the shared space already
    text_bias: bool = False  # of the text projection
    loss: Literal["softmax", "sigmoid"] = "softmax"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of colours in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    fit: Literal["crop", "crop_even", "squash"] = (
        "crop"  # how a picture becomes a square: `media.decode_array`; a Navit needs none
    )
    resample: Literal["bicubic", "bilinear"] = "bicubic"


class Clip(nn.Module):
    """The two towers and the temperature. `tokenizer` may be left out when only tokens are embedded."""

    def __init__(self, config: ClipConfig, tokenizer: Bpe | Pieces | None = None):
        super().__init__()
        self.config = config
        if not config.image_projection and config.image.out != config.width:
            raise InputError(
                f"without a projection the image tower's {config.image.out} channels must be the space's"
                f" {config.width}."
            )
        if tokenizer is not None:
            sought = config.text.pool != "last"
            tokenizer.fits(vocab=config.text.vocab, end=config.text.end if sought else None)
        self.tokenizer = tokenizer
        self.image = _tower(config.image)
        self.text = Text(config.text)
        self.image_projection: nn.Module = nn.Identity()
        if config.image_projection:
            self.image_projection = nn.Linear(config.image.out, config.width, bias=False)
            nn.init.normal_(self.image_projection.weight, std=config.image.out**-0.5)
        self.text_projection = nn.Linear(config.text.width, config.width, bias=config.text_bias)
        nn.init.normal_(self.text_projection.weight, std=config.text.width**-0.5)
        # [1], since sharding refuses scalars. Where they start: CLIP, section 2.5; SigLIP, section 3.
        first = 1 / 0.07 if config.loss == "softmax" else 10.0
        self.log_scale = nn.Parameter(torch.full((1,), math.log(first)))
        self.bias = nn.Parameter(torch.full((1,), -10.0)) if config.loss == "sigmoid" else None
        self.no_decay = ("log_scale",) if self.bias is None else ("log_scale", "bias")

    # Embeddings ----------------------------------------------------------------------------------------------------

    def embed_image(self, images: Images, *, keep: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size, or paths, or pictures -> unit vectors `b d`.

        With `keep`, int64 `b k`, from these patches of each picture alone, for pictures as a tensor (vit.Vit). A tower
        of native sizes takes a list of `3 h w` too, and `keep` a `k` of its own for each (navit.Navit).
        """
        if not isinstance(images, Tensor) and not _tensors(images, self.image):
            assert keep is None, "patches are kept of pictures in tensors"
            return in_parts(images, lambda part: self.embed_image(self.prepare(part)))
        if isinstance(self.image, Navit):
            pictures = self._pictures(images, checked=not self.training)
            kept = None if keep is None else list(keep)
            return F.normalize(self.image_projection(self.image.embed(pictures, kept)), dim=-1)
        assert isinstance(images, Tensor)
        assert not isinstance(keep, Sequence)
        x = self._pixels(images, checked=not self.training)
        if keep is None:
            vectors = self.image.embed(x)
        else:
            assert isinstance(self.image, Vit), "a ResNet has no patches to keep"
            vectors = self.image.embed(x, keep)
        return F.normalize(self.image_projection(vectors), dim=-1)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Float `b 3 h w`, about in [-1, 1] -> what the layers of the image tower see, `b n d` each (vit.Vit.layers).

        InputError: the image tower is no ViT.
        """
        if not isinstance(self.image, Vit):
            name = type(self.image).__name__
            raise InputError(f"the image tower of this CLIP is a {name}: layers are those of a ViT.")
        return self.image.layers(self._pixels(images, checked=False))

    def _pixels(self, images: Tensor, *, checked: bool) -> Tensor:
        """What the image tower reads: the size and the colours that it knows."""
        size = self.config.image.size
        images = as_batch(images, size=size, like=self.log_scale, fit=self.config.fit, checked=checked)
        return coloured(images, self.config.mean, self.config.std)

    def _pictures(self, images: Any, *, checked: bool) -> list[Tensor]:
        """The same for a tower of native sizes: each picture in whole patches, at its own aspect."""
        image = self.config.image
        assert isinstance(image, NavitConfig)
        found = as_native(images, patch=image.patch, area=image.area, like=self.log_scale, checked=checked)
        return [coloured(picture, self.config.mean, self.config.std) for picture in found]

    def embed_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens `b n` -> unit vectors `b d`."""
        vectors = torch.cat([self.text.embed(part) for part in self.tokens(texts).split(TEXTS_AT_ONCE)])
        return F.normalize(self.text_projection(vectors), dim=-1)

    def tokens(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens -> tokens `b n`, cut to the longest text."""
        if not isinstance(texts, Tensor):
            texts = strings("texts", texts)
            if self.tokenizer is None:
                raise InputError(
                    "this model has no tokenizer (its folder held no tokenizer.json, nor vocab.json and merges.txt):"
                    " give token ids `b n`, or put its tokenizer there."
                )
            texts = self.tokenizer.encode(texts, length=self.config.text.length)
        self.text.check(texts)
        return self.text.trim(texts.to(self.log_scale.device))

    def prepare(self, images: Sequence[str | Path | Image.Image]) -> Tensor | list[Tensor]:
        """Pictures or their paths -> `b 3 size size` in [-1, 1], fitted as the weights were trained to see them.

        For a tower of native sizes a list of `3 h w`.
        """
        image = self.config.image
        if isinstance(image, NavitConfig):
            native = open_native(images, patch=image.patch, area=image.area, resample=self.config.resample)
            return [picture.to(self.log_scale.device) for picture in native]
        size, fit, resample = image.size, self.config.fit, self.config.resample
        return open_images(images, size=size, fit=fit, resample=resample).to(self.log_scale.device)

    # Comparing -----------------------------------------------------------------------------------------------------

    def similarity(self, images: Images, texts: Sequence[str] | Tensor) -> Tensor:
        """The logits `images texts`: scaled cosines, for SigLIP with its bias."""
        return self._logits(self.embed_image(images), self.embed_text(texts))

    def classify(self, images: Images, names: Sequence[str], *, templates: Sequence[str] = ("{}",)) -> Tensor:
        """Probabilities `images names`; a name's vector is the mean over the templates (section 3.1.4).

        CLIP's add up to one for each picture; SigLIP's are of each name by itself.
        """
        names, templates = strings("names", names), strings("templates", templates)
        for template in templates:
            if template.count("{}") != 1:
                raise InputError(f"the template {template!r} must hold {{}} once, where the name goes.")
        texts = [template.replace("{}", name) for name in names for template in templates]
        vectors = rearrange(self.embed_text(texts), "(k t) d -> k t d", t=len(templates)).mean(1)
        logits = self._logits(self.embed_image(images), F.normalize(vectors, dim=-1))
        return logits.softmax(-1) if self.config.loss == "softmax" else logits.sigmoid()

    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.log_scale.exp()

    def _logits(self, images: Tensor, texts: Tensor) -> Tensor:
        logits = self.scale() * images @ texts.T
        return logits if self.bias is None else logits + self.bias

    # Training ------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`image b 3 h w`, `tokens b n`, and optionally `label b`: items with equal labels are right for each other."""
        return self.compare(*self.embed(batch), label=batch.get("label"))

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`image` and `tokens` of a batch -> unit vectors `b d` of both. An item's do not depend on the others.

        With `keep b k`, the pictures are seen by these patches alone (FLIP, 2212.00794); `image` and `keep` are lists
        for a tower of native sizes.
        """
        return self.embed_image(batch["image"], keep=batch.get("keep")), self.embed_text(batch["tokens"])

    def compare(
        self, image: Tensor, text: Tensor, *, label: Tensor | None = None, peers: Peers = ALONE
    ) -> dict[str, Tensor]:
        """The loss of unit vectors `b d`, in several processes as `objectives.contrastive` says."""
        if self.bias is None:
            loss = info_nce(image, text, bounded(self.log_scale), label=label, peers=peers)
        else:
            loss = sigmoid_loss(image, text, self.scale(), self.bias, label=label, peers=peers)
        share = accuracy(image, text, label=label, peers=peers)
        return {"loss": loss, "accuracy": share, "scale": self.scale().detach().squeeze()}


def _tower(config: VitConfig | ClipResnetConfig | NavitConfig) -> Vit | ClipResnet | Navit:
    if isinstance(config, NavitConfig):
        return Navit(config)
    return Vit(config) if isinstance(config, VitConfig) else ClipResnet(config)


def _tensors(images: Any, tower: nn.Module) -> bool:
    """Whether these are tensors of unlike sizes for a tower that reads them."""
    listed = isinstance(tower, Navit) and isinstance(images, list | tuple) and len(images) > 0
    return listed and all(isinstance(image, Tensor) for image in images)
