"""BLIP-2, first stage: "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models" (Li et al. 2023, 2301.12597, section 3.2).

    image --- frozen tower --- norm --- Qformer: look  --- projection --- unit vectors, one a query --\\
                                |          |                                                  max over the queries
    text  ----------------------|------ read ------------- projection --- unit vector ---------------/ x 1 / temperature
                                |          |                                                          -> contrast
                                |------ both ------------- mean over the queries of no, yes ------------> matching
                                +------ write behind the queries ---------------------------------------> the next word

The queries never see the text in `look` and in `write`, so contrast and writing share one pass of theirs, and all three
losses share the picture's keys and values. How it speaks through a language model is systems/blip2_language.py.

Images are float `b 3 h w` in [-1, 1]; the mean and std that the tower expects are applied inside. The tower is frozen:
it takes no gradients, and where it came from another model (`source`) a saved Blip2 names that model and the hash of
the tower, and does not repeat it (weights/frozen.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.bridges.qformer import Qformer, QformerConfig, Seen
from reverie.codecs.pieces import Pieces, joined
from reverie.encoders.clip_resnet import ClipResnet, ClipResnetConfig
from reverie.encoders.images import Images, as_batch, coloured, in_parts, open_images
from reverie.encoders.texts import strings
from reverie.encoders.vit import Vit, VitConfig
from reverie.errors import InputError
from reverie.nn.frozen import kept_elsewhere
from reverie.objectives.contrastive import ALONE, Peers
from reverie.objectives.language import language_loss
from reverie.objectives.matching import hard_negatives, matching_loss
from reverie.samplers.autoregressive import Sampling, write

AT_ONCE = 64  # pictures, or pairs, that are looked at at a time
SMOOTHING = 0.1  # the authors' code, of contrast and of words
# EVA-CLIP's ViT-g/14 without its last block and norm (section 3.4): 986 million parameters.
EVA_G = VitConfig(
    size=224, patch=14, width=1408, depth=39, heads=16, hidden=6144, activation="gelu", stem_bias=True,
    norm_pre=False, norm_post=False, eps=1e-6,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a frozen part came from, which is not saved again."""

    model: str = ""  # a shipped name or a folder; "": the part is this model's own, and saved with it
    hash: str = ""  # of the part's weights, `weights.store.hash_of`


@dataclasses.dataclass(frozen=True, kw_only=True)
class SightConfig:
    """A frozen tower and the Q-Former that asks it."""

    image: VitConfig | ClipResnetConfig = EVA_G
    source: Source = Source()  # of the tower
    leave: int = 0  # the last blocks of a ViT that are not used; 1 of a CLIP's (section 3.4)
    norm_eps: float = 1e-5
    qformer: QformerConfig = QformerConfig()
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of colours in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    fit: Literal["crop", "crop_even", "squash"] = "squash"  # how a picture becomes a square
    resample: Literal["bicubic", "bilinear"] = "bicubic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blip2Config:
    sight: SightConfig = SightConfig()
    width: int = 256  # of the shared space

    def sources(self) -> dict[str, Source]:
        """Where its frozen parts came from, by the name of the constructor's argument."""
        return {"image": self.sight.source}


class Sight(nn.Module):
    """Pictures to the features of a frozen tower, normed, and the Q-Former that asks them; both stages have it."""

    def __init__(self, config: SightConfig, image: nn.Module | None = None):
        """`image`: the tower that `config.source` names, which then is no weight of this model."""
        super().__init__()
        self.config = config
        inner = config.image
        width = inner.width if isinstance(inner, VitConfig) else 32 * inner.width
        if width != config.qformer.context_width:
            raise InputError(
                f"the Q-Former reads pictures of {config.qformer.context_width} channels, but the tower gives {width}."
            )
        if config.leave and not (isinstance(inner, VitConfig) and 0 <= config.leave < inner.depth):
            raise InputError(
                f"leave is {config.leave}: a tower of blocks can leave fewer than it has, others 0."
            )
        own = image is None
        if image is None:
            image = Vit(inner) if isinstance(inner, VitConfig) else ClipResnet(inner)
        self.image = image.requires_grad_(False).eval()
        if not own:
            kept_elsewhere(self, "image")
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.qformer = Qformer(config.qformer)

    def train(self, mode: bool = True) -> Sight:
        """The tower stays as it is: frozen parts have no training mode."""
        super().train(mode)
        self.image.eval()
        return self

    def features(self, images: Tensor, *, checked: bool = False) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size -> what the Q-Former asks, `b m c`."""
        config = self.config
        images = as_batch(
            images, size=config.image.size, like=self.norm.weight, fit=config.fit, checked=checked
        )
        with torch.no_grad():
            x = coloured(images, config.mean, config.std)
            x = self.image.deep(x, leave=config.leave) if isinstance(self.image, Vit) else self.image(x)
        return self.norm(x)

    def prepare(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Pictures or their paths -> `b 3 size size` in [-1, 1], fitted as the tower was trained to see them."""
        size, fit, resample = self.config.image.size, self.config.fit, self.config.resample
        return open_images(images, size=size, fit=fit, resample=resample).to(self.norm.weight.device)

    def all_features(self, images: Images) -> Tensor:
        """`features` of pictures in any form, or of paths."""
        if isinstance(images, Tensor):
            return torch.cat([self.features(part, checked=True) for part in images.split(AT_ONCE)])
        return in_parts(images, lambda part: self.features(self.prepare(part)))


class Blip2(nn.Module):
    """The first stage; see the module. `tokenizer` may be left out when only tokens are read."""

    def __init__(self, config: Blip2Config, tokenizer: Pieces | None = None, image: nn.Module | None = None):
        super().__init__()
        self.config = config
        inner = config.sight.qformer
        if not inner.reads:
            raise InputError("the Q-Former of the first stage has a text side: set reads.")
        if tokenizer is not None:
            tokenizer.fits(vocab=inner.vocab, end=inner.end)
        self.tokenizer = tokenizer
        self.sight = Sight(config.sight, image)
        self.image_projection = nn.Linear(inner.width, config.width)
        self.text_projection = nn.Linear(inner.width, config.width)
        self.matching = nn.Linear(inner.width, 2)
        self.temperature = nn.Parameter(torch.full((1,), 0.07))  # [1], since sharding refuses scalars

    # What the losses and the capabilities are made of -----------------------------------------------------------------

    def image_vectors(self, asked: Tensor) -> Tensor:
        """The queries' features `b q d` -> unit vectors `b q d`."""
        return F.normalize(self.image_projection(asked), dim=-1)

    def text_vector(self, tokens: Tensor) -> Tensor:
        """Tokens `b n` -> unit vectors `b d`, by the text alone."""
        return F.normalize(
            self.text_projection(self.sight.qformer.read(tokens, mask=self._real(tokens))), dim=-1
        )

    def matches(self, seen: Seen, tokens: Tensor) -> Tensor:
        """The logits no and yes, `b 2`, of what is seen (qformer.py) and texts `b n`, i with i."""
        return self.matching(self.sight.qformer.both(tokens, seen, mask=self._real(tokens))).mean(1)

    def _real(self, tokens: Tensor) -> Tensor:
        return tokens != self.config.sight.qformer.pad

    def tokens(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens -> tokens `b n`, as long as the longest text. Raises InputError."""
        home, inner = self.temperature.device, self.config.sight.qformer
        if not isinstance(texts, Tensor):
            if self.tokenizer is None:
                raise InputError(
                    "this model has no tokenizer (its folder held no tokenizer.json): give token ids `b n`, or put its"
                    " tokenizer there."
                )
            texts = self.tokenizer.encode(strings("texts", texts), length=inner.length)
        longest = int((texts != inner.pad).sum(1).max())
        return texts[:, :longest].to(home)

    # Capabilities -----------------------------------------------------------------------------------------------------

    def embed_image(self, images: Images) -> Tensor:
        """Float `b 3 h w` in [-1, 1] of any size, or paths, or pictures -> unit vectors `b q d`, one a query."""
        if isinstance(images, Tensor):
            parts = [self.sight.features(part, checked=True) for part in images.split(AT_ONCE)]
            return torch.cat([self.image_vectors(self.sight.qformer.look(part)) for part in parts])
        return in_parts(images, lambda part: self.embed_image(self.sight.prepare(part)))

    def embed_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Strings, or tokens `b n` -> unit vectors `b d`."""
        return torch.cat([self.text_vector(part) for part in self.tokens(texts).split(512)])

    def similarity(self, images: Images, texts: Sequence[str] | Tensor) -> Tensor:
        """Cosines `images texts`, of each text to the query that is nearest to it, divided by the temperature."""
        return nearest(self.embed_image(images), self.embed_text(texts)) / self.temperature

    def match(self, images: Images, texts: Sequence[str] | Tensor) -> Tensor:
        """The probability `b` that picture i and text i belong together, by looking at both (the paper's ITM)."""
        features, tokens = self.sight.all_features(images), self.tokens(texts)
        if len(features) != len(tokens):
            raise InputError(
                f"there are {len(features)} pictures and {len(tokens)} texts: give as many of both."
            )
        parts = zip(features.split(AT_ONCE), tokens.split(AT_ONCE), strict=True)
        return torch.cat([self.matches(*part).float().softmax(-1)[:, 1] for part in parts])

    @torch.no_grad()
    def caption(
        self,
        images: Images,
        *,
        sampling: Sampling = "beam",
        prompt: str = "",
        beams: int = 3,
        least: int = 0,
        most: int = 20,
        p: float = 0.9,
        seed: int = 0,
    ) -> list[str]:
        """What the Q-Former itself writes beside each picture, behind the prompt, of `least` to `most` new tokens.

        Picture i draws by `seed + i` where words are drawn (nucleus). InputError: no head for words, as a public first
        stage that transformers wrote has none; no tokenizer; a length that the model does not write.
        """
        inner = self.config.sight.qformer
        if not inner.writes or self.tokenizer is None:
            raise InputError(
                "this first stage does not write: it lacks the head for words, or the tokenizer."
            )
        features = self.sight.all_features(images)
        given = self.tokenizer.encode([prompt])[0]
        given = given[given != inner.end][1:]  # without what stands around a text
        first = torch.cat([torch.tensor([inner.decode]), given]).to(features.device)
        if len(first) + most > inner.length:
            raise InputError(
                f"a prompt of {len(given)} tokens and most {most} are more than the {inner.length} tokens that this"
                " model writes: ask for fewer."
            )
        written: list[str] = []
        for at in range(0, len(features), AT_ONCE):
            part = features[at : at + AT_ONCE]
            start = first.expand(len(part), -1)
            ids = write(
                self.sight.qformer.writer(part), start, sampling=sampling, end=inner.end, most=most, least=least,
                beams=beams, p=p, seeds=range(seed + at, seed + at + len(part)),
            )  # fmt: skip
            written += map(joined, self.tokenizer.decode([[*given.tolist(), *row] for row in ids]))
        return written

    # Training ---------------------------------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Any], *, peers: Peers = ALONE) -> dict[str, Tensor]:
        """Contrast + matching + writing, of several processes as `objectives.contrastive` says.

        A batch: `image b 3 h w` in [-1, 1], `tokens b n` (of one n in all processes), `label b` (items with equal
        labels are right for each other), `draws b 2` uniform numbers that choose the hard negatives.
        """
        inner, qformer = self.config.sight.qformer, self.sight.qformer
        tokens, label = batch["tokens"], batch["label"]
        features = self.sight.features(batch["image"])
        known = qformer.known(features)
        past: list[tuple[Tensor, Tensor]] = []
        image, text = self.image_vectors(qformer.look(known, past=past)), self.text_vector(tokens)

        images, texts, labels = peers.gather(image), peers.gather(text), peers.gather(label)
        right = label[:, None] == labels
        to_text, to_image = (
            nearest(image, texts) / self.temperature,
            nearest(images, text).T / self.temperature,
        )
        contrast = (smoothed(to_text, right) + smoothed(to_image, right)) / 2

        text_of, has_text = hard_negatives(to_text, right, batch["draws"][:, 0])
        image_of, has_image = hard_negatives(to_image, right, batch["draws"][:, 1])
        all_tokens = peers.gather(tokens)
        if peers.count == 1:
            others = [None if kv is None else (kv[0][image_of], kv[1][image_of]) for kv in known]
        else:
            others = qformer.known(peers.gather(features)[image_of])
        pictures = [
            None
            if own is None or other is None
            else tuple(torch.cat([a, a, b]) for a, b in zip(own, other, strict=True))
            for own, other in zip(known, others, strict=True)
        ]
        logits = self.matches(pictures, torch.cat([tokens, all_tokens[text_of], tokens]))  # type: ignore[arg-type]
        belongs = torch.arange(len(logits), device=label.device) < len(label)
        real = torch.cat([torch.ones_like(has_text), has_text, has_image])
        matching = matching_loss(logits, belongs, real, peers=peers)

        begun = torch.cat([torch.full_like(tokens[:, :1], inner.decode), tokens[:, 1:]], dim=1)
        words = qformer.write(begun, past)
        writing = language_loss(words, tokens, self._real(tokens), smoothing=SMOOTHING, peers=peers)
        told = (logits.detach().argmax(-1).bool() == belongs).float().mean()
        found = right.gather(1, to_text.argmax(1, keepdim=True)).float().mean()
        return {
            "loss": contrast + matching + writing,
            "contrast": contrast.detach(),
            "matching": matching.detach(),
            "writing": writing.detach(),
            "found": found,  # the share of pictures whose text contrast puts first in the batch
            "told": told,  # the share of pairs that matching tells right
        }


def nearest(image: Tensor, text: Tensor) -> Tensor:
    """Unit vectors `b q d` and `m d` -> cosines `b m`, each of the query that is nearest to the text."""
    return torch.einsum("bqd,md->bmq", image, text).amax(-1)


def smoothed(logits: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy of `logits b m`, whose targets share the weight equally among those that are `right b m`, save
    SMOOTHING, which goes to all alike (the authors' code)."""
    targets = right.float() / right.float().sum(1, keepdim=True)
    targets = (1 - SMOOTHING) * targets + SMOOTHING / targets.shape[1]
    return -(targets * logits.float().log_softmax(1)).sum(1).mean()
