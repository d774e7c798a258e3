"""BLIP: "Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation" (Li et al.
2022, 2201.12086).

    image --- Vit --+-- projection --- unit vector --\\
                    |                                 x 1 / temperature -> contrast
    text  --- Med --|-- alone: projection --- unit --/
                    +-- grounded in the picture ------ matching: no, yes
                    +-- writing beside the picture --- the next word

One text network in three modes (encoders/med.py). A Blip whose text network only understands has no words, one that
only writes can but describe, as the public weights for retrieval and for captions are. How the three losses train it
together is systems/blip_training.py.

Images are float `b 3 h w` in [-1, 1]; the mean and std that the public weights expect are applied inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.codecs.pieces import Pieces, joined
from reverie.encoders.images import AT_ONCE, Images, as_batch, check_images, coloured, in_parts, open_images
from reverie.encoders.med import Med, MedConfig
from reverie.encoders.texts import strings
from reverie.encoders.vit import Vit, VitConfig
from reverie.errors import InputError
from reverie.samplers.autoregressive import Sampling, seeds_of, write

PAIRS_AT_ONCE = 64

BASE = VitConfig(
    size=384, patch=16, width=768, depth=12, heads=12, activation="gelu", stem_bias=True, norm_pre=False, eps=1e-6
)  # fmt: skip
LARGE = dataclasses.replace(BASE, width=1024, depth=24, heads=16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """What pictures and words come in by; see `Reading`."""

    image: VitConfig = BASE
    text: MedConfig = MedConfig()
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of colours in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    fit: Literal["crop", "crop_even", "squash"] = "squash"  # how a picture becomes a square
    resample: Literal["bicubic", "bilinear"] = "bicubic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlipConfig(ReadingConfig):
    width: int = 256  # of the shared space
    prompt: str = ""  # what a caption begins with unless asked otherwise


class Reading(nn.Module):
    """An image tower and the text network beside it, and how pictures and words come in: what all of BLIP has.

    `tokenizer` may be left out when only tokens are read.
    """

    def __init__(self, config: ReadingConfig, tokenizer: Pieces | None):
        super().__init__()
        self.config = config
        if config.image.width != config.text.context_width:
            raise InputError(
                f"the text network reads pictures of {config.text.context_width} channels, but the image tower gives"
                f" {config.image.width}."
            )
        if tokenizer is not None:
            tokenizer.fits(vocab=config.text.vocab, end=config.text.end)
        self.tokenizer = tokenizer
        self.image = Vit(config.image)
        self.text = Med(config.text)

    def see(self, images: Tensor, *, checked: bool = False) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size -> the picture's features `b n d`."""
        size, like = self.config.image.size, self.text.norm.weight
        images = as_batch(images, size=size, like=like, fit=self.config.fit, checked=checked)
        return self.image(coloured(images, self.config.mean, self.config.std))

    def tokens(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens -> tokens `b n`, as long as the longest text. Raises InputError."""
        home = self.text.norm.weight.device
        if isinstance(texts, Tensor):
            return texts.to(home)
        texts = strings("texts", texts)
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer (its folder held no tokenizer.json): give token ids `b n`, or put its"
                " tokenizer there."
            )
        tokens = self.tokenizer.encode(texts, length=self.config.text.length)
        longest = int((tokens != self.config.text.pad).sum(1).max())
        return tokens[:, :longest].to(home)

    def prepare(self, images: Sequence) -> Tensor:
        """Pictures or their paths -> `b 3 size size` in [-1, 1], fitted as the weights were trained to see them."""
        size, fit, resample = self.config.image.size, self.config.fit, self.config.resample
        return open_images(images, size=size, fit=fit, resample=resample).to(self.text.norm.weight.device)

    def features(self, images: Images) -> Tensor:
        """What `see` makes of pictures in any form, or of paths: `b n d`."""
        if isinstance(images, Tensor):
            return self.see(images, checked=True)
        return in_parts(images, lambda part: self.see(self.prepare(part)))


class Blip(Reading):
    """The picture tower, the text network and their heads. `tokenizer` may be left out when only tokens are read."""

    config: BlipConfig

    def __init__(self, config: BlipConfig, tokenizer: Pieces | None = None):
        super().__init__(config, tokenizer)
        if config.text.understands:
            self.image_projection = nn.Linear(config.image.width, config.width)
            self.text_projection = nn.Linear(config.text.width, config.width)
            self.matching = nn.Linear(config.text.width, 2)
            self.temperature = nn.Parameter(torch.full((1,), 0.07))  # [1], since sharding refuses scalars

    # What the losses and the capabilities are made of -----------------------------------------------------------------

    def image_vector(self, features: Tensor) -> Tensor:
        """The features `b n d` of pictures -> unit vectors `b d`."""
        return F.normalize(self.image_projection(self.image.pool(features)), dim=-1)

    def text_vector(self, tokens: Tensor) -> Tensor:
        """Tokens `b n` -> unit vectors `b d`, by the text alone."""
        features = self.text.features(tokens, mask=tokens != self.config.text.pad)
        return F.normalize(self.text_projection(features[:, 0]), dim=-1)

    def matches(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The logits no and yes, `b 2`, of pictures by their features `b n d` and texts `b n`, i with i."""
        grounded = self._beginning(tokens, self.config.text.ground)
        mask = tokens != self.config.text.pad
        return self.matching(self.text.features(grounded, mask=mask, context=features)[:, 0])

    def writes(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logits `b n v` of the word after each of `tokens b n`, beside pictures by their features `b n d`."""
        return self.text.logits(self._beginning(tokens, self.config.text.decode), context=features)

    @staticmethod
    def _beginning(tokens: Tensor, first: int) -> Tensor:
        return torch.cat([torch.full_like(tokens[:, :1], first), tokens[:, 1:]], dim=1)

    # Understanding ----------------------------------------------------------------------------------------------------

    def embed_image(self, images: Images) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size, or paths, or pictures -> unit vectors `b d`."""
        self._must("understands")
        if isinstance(images, Tensor):
            return self.image_vector(self.see(images, checked=True))
        return in_parts(images, lambda part: self.image_vector(self.see(self.prepare(part))))

    def embed_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens `b n` -> unit vectors `b d`."""
        self._must("understands")
        return torch.cat([self.text_vector(part) for part in self.tokens(texts).split(512)])

    def match(self, images: Images, texts: Sequence[str] | Tensor) -> Tensor:
        """The probability `b` that picture i and text i belong together, by looking at both (the paper's ITM)."""
        self._must("understands")
        features, tokens = self.features(images), self.tokens(texts)
        if len(features) != len(tokens):
            raise InputError(
                f"there are {len(features)} pictures and {len(tokens)} texts: give as many of both."
            )
        parts = zip(features.split(PAIRS_AT_ONCE), tokens.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([self.matches(*part).float().softmax(-1)[:, 1] for part in parts])

    # Writing ----------------------------------------------------------------------------------------------------------

    def caption(
        self,
        images: Images,
        *,
        sampling: Sampling = "beam",
        prompt: str | None = None,
        beams: int = 3,
        least: int = 0,
        most: int = 20,
        p: float = 0.9,
        top: int | None = None,
        temperature: float = 1.0,
        length_penalty: float = 1.0,
        repetition: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """What the pictures show, a text for each, which begins with the prompt; None: the model's own, not shown.

        beam: the likeliest of a search over `beams`; greedy: the likeliest word each time; nucleus: words drawn among
        those that together have the probability `p` (samplers/autoregressive.py), picture i with `seed + i`, or with
        its own of several seeds. From `least` to `most` new tokens. A picture's caption does not depend on those beside
        it. Raises InputError.
        """
        self._must("writes")
        start, shown = self._begun(self.config.prompt if prompt is None else prompt, most)
        shown = "" if prompt is None else shown
        texts: list[str] = []

        seeds = seeds_of(seed, len(images))

        def describe(features: Tensor) -> None:
            own = seeds[len(texts) : len(texts) + len(features)]
            ids = write(
                self.text.writer(features, most=start.shape[1] + most), start.expand(len(features), -1),
                sampling=sampling, end=self.config.text.end, most=most, seeds=own,
                least=least, beams=beams, p=p, top=top, temperature=temperature, length_penalty=length_penalty,
                repetition=repetition,
            )  # fmt: skip
            texts.extend(joined(f"{shown} {text}".strip()) for text in self._words(ids))

        with torch.no_grad():
            if isinstance(images, Tensor):
                for part in images.split(PAIRS_AT_ONCE):
                    describe(self.see(part, checked=True))
            else:
                check_images(images)
                for at in range(0, len(images), AT_ONCE):
                    describe(self.see(self.prepare(images[at : at + AT_ONCE])))
        return texts

    def _begun(self, prompt: str, most: int) -> tuple[Tensor, str]:
        """[DEC] and the prompt's tokens, `1 n`, and how the prompt reads."""
        text, home = self.config.text, self.text.norm.weight.device
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer (its folder held no tokenizer.json): put it there.")
        if not isinstance(prompt, str):
            raise InputError(f"prompt must be a text, but is {prompt!r:.40}.")
        ids = self.tokenizer.encode([prompt]) if prompt.strip() else torch.tensor([[text.decode, text.end]])
        ids = torch.cat([torch.tensor([[text.decode]]), ids[:, 1:-1]], 1).to(home)
        if most < 1 or ids.shape[1] + most > text.length:
            raise InputError(
                f"a prompt of {ids.shape[1] - 1} tokens and {most} new ones cannot be written: this model has room for"
                f" {text.length - 1} in all."
            )
        return ids, self._words([ids[0, 1:].tolist()])[0]

    def _words(self, rows: list[list[int]]) -> list[str]:
        assert self.tokenizer is not None
        return self.tokenizer.decode(rows)

    def _must(self, mode: str) -> None:
        if not getattr(self.config.text, mode):
            lacks = "embeds and matches" if mode == "understands" else "writes captions"
            raise InputError(f"these weights have no part that {lacks}: take others, such as blip-stickers.")
