"""CLIP: "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al. 2021, 2103.00020).

    image --- Vit ---- projection --- unit vector --\\
                                                     x temperature -> logits -> symmetric cross-entropy
    text  --- Text --- projection --- unit vector --/

Images are float `b 3 h w` in [-1, 1]; the mean and std that the public weights expect are applied inside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.codecs.bpe import Bpe
from reverie.encoders.text import Text, TextConfig
from reverie.encoders.vit import Vit, VitConfig
from reverie.errors import InputError
from reverie.objectives.contrastive import bounded, info_nce
from reverie.pictures import to_signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    image: VitConfig = VitConfig()
    text: TextConfig = TextConfig()
    width: int = 512  # of the shared space
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of colours in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """The two towers and the temperature. `tokenizer` may be left out when only tokens are embedded."""

    no_decay = ("log_scale",)

    def __init__(self, config: ClipConfig, tokenizer: Bpe | None = None):
        super().__init__()
        self.config = config
        if tokenizer is not None:
            tokenizer.fits(vocab=config.text.vocab, end=config.text.end)
        self.tokenizer = tokenizer
        self.image = Vit(config.image)
        self.text = Text(config.text)
        self.image_projection = nn.Linear(config.image.width, config.width, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.width, bias=False)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # [1]: sharding refuses scalars
        nn.init.normal_(self.image_projection.weight, std=config.image.width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=config.text.width**-0.5)

    # Embeddings ----------------------------------------------------------------------------------------------------

    def embed_image(self, images: Tensor | Sequence[str | Path | Image.Image]) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size, or paths, or pictures -> unit vectors `b d`."""
        if not isinstance(images, Tensor):
            images = self.prepare(images)
        images = images.to(self.log_scale.device)
        size = self.config.image.size
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must be `b 3 h w`, but have shape {tuple(images.shape)}.")
        if not images.is_floating_point():
            raise InputError(
                f"images must be float in [-1, 1], but are {images.dtype}: divide bytes by 127.5, less 1."
            )
        if not all(images.shape[-2:]):
            raise InputError(f"images must have pixels, but have shape {tuple(images.shape)}.")
        images = images.to(self.log_scale.dtype)  # from whatever numpy and half-precision code made
        if not self.training and len(images) and not (reach := images.abs().amax()) <= 10:  # so is NaN
            raise InputError(
                f"images must be in [-1, 1], but reach {reach:g}: divide bytes by 127.5, less 1."
            )
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        colour = rearrange(torch.tensor([self.config.mean, self.config.std]), "two c -> two c 1 1").to(images)
        x = ((images + 1) / 2 - colour[0]) / colour[1]
        return F.normalize(self.image_projection(self.image.pool(self.image(x))), dim=-1)

    def embed_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens `b n` -> unit vectors `b d`."""
        tokens = self.tokens(texts)
        order = self.text.end_position(tokens).argsort(stable=True)
        # Texts of one length stand together, so that a short one is not padded to the longest of all.
        parts = [self.text.trim(tokens[rows]) for rows in order.tensor_split(min(len(tokens) // 32 + 1, 4))]
        vectors = torch.cat([self.text.pool(self.text(part), part) for part in parts])
        return F.normalize(self.text_projection(vectors[order.argsort()]), dim=-1)

    def tokens(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens -> tokens `b n`, cut to the longest text."""
        if not isinstance(texts, Tensor):
            texts = _strings("texts", texts)
            if self.tokenizer is None:
                raise InputError(
                    "this model has no tokenizer: give token ids `b n`, or load it from a folder."
                )
            texts = self.tokenizer.encode(texts, length=self.config.text.length)
        self.text.check(texts)
        return self.text.trim(texts.to(self.log_scale.device))

    def prepare(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Pictures or their paths -> `b 3 size size`: short side resized (bicubic), centre cropped, laid on white."""
        if isinstance(images, str | Path | Image.Image):
            raise InputError("images must be a list, but is one picture or path: write [image].")
        if not hasattr(images, "__len__"):
            raise InputError(f"images must be a tensor or a list, but are {images!r:.60}.")
        if not len(images):
            raise InputError("there is no image: give a list of one or more.")
        for image in images:
            if not isinstance(image, str | Path | Image.Image):
                raise InputError(
                    f"an image is a path or a PIL picture, not {type(image).__name__}: stack to `b 3 h w`."
                )
        pictures = [to_signal(image, size=self.config.image.size) for image in images]
        return torch.stack([torch.from_numpy(picture) for picture in pictures]).to(self.log_scale.device)

    # Comparing -----------------------------------------------------------------------------------------------------

    def similarity(self, images: Tensor | Sequence, texts: Sequence[str] | Tensor) -> Tensor:
        """Scaled cosines, `images texts`."""
        return self.scale() * self.embed_image(images) @ self.embed_text(texts).T

    def classify(
        self, images: Tensor | Sequence, names: Sequence[str], *, templates: Sequence[str] = ("{}",)
    ) -> Tensor:
        """Probabilities `images names`; a name's vector is the mean over the templates (section 3.1.4)."""
        names, templates = _strings("names", names), _strings("templates", templates)
        for template in templates:
            if template.count("{}") != 1:
                raise InputError(f"the template {template!r} must hold {{}} once, where the name goes.")
        texts = [template.replace("{}", name) for name in names for template in templates]
        vectors = rearrange(self.embed_text(texts), "(k t) d -> k t d", t=len(templates)).mean(1)
        return (self.scale() * self.embed_image(images) @ F.normalize(vectors, dim=-1).T).softmax(-1)

    def scale(self) -> Tensor:
        return bounded(self.log_scale)

    # Training ------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`image b 3 h w`, `tokens b n`, and optionally `label b`: items with equal labels are right for each other."""
        image, text = self.embed_image(batch["image"]), self.embed_text(batch["tokens"])
        label = batch.get("label")
        same = None if label is None else label[:, None] == label[None, :]
        loss = info_nce(image, text, self.scale(), same=same)
        names = torch.arange(len(image), device=image.device) if label is None else label
        with torch.no_grad():
            accuracy = (names[(image @ text.T).argmax(-1)] == names).float().mean()
        return {"loss": loss, "accuracy": accuracy, "scale": self.scale().detach().squeeze()}


def _strings(what: str, strings: Sequence[str]) -> list[str]:
    """A list of one string or more, which one string alone is not."""
    if isinstance(strings, str):
        raise InputError(
            f"{what} must be a list of strings, but is the string {strings!r}: write [{strings!r}]."
        )
    if not isinstance(strings, Iterable):
        raise InputError(f"{what} must be a list of strings, but is {strings!r:.60}.")
    strings = list(strings)
    if not strings or not all(isinstance(string, str) for string in strings):
        raise InputError(f"{what} must be a list of one string or more, but is {strings!r:.60}.")
    return strings
