"""DALL-E: "Zero-Shot Text-to-Image Generation" (Ramesh et al. 2021, 2102.12092).

    picture --- codec (frozen) --- codes ---+
                                            +--- CausalCodes --- the next word, the next code --- codec --- picture
    text --- tokens, each position's padding +

A text and a picture are one sequence, and the network says what comes next. The loss of the words counts an eighth,
that of the codes seven eighths. A picture is drawn code by code; its upper part may be given, and the best of many is
chosen by a CLIP (`reverie sample --best-of`). With words left out now and then in training, guidance leads away from
the picture of no words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from PIL import Image
from torch import Tensor

from reverie import rng
from reverie.backbones.code_transformer import CausalCodes, CodeTransformerConfig, flat
from reverie.codecs.bpe import Bpe
from reverie.codecs.dvae import DvaeConfig
from reverie.codecs.vq import VqConfig
from reverie.objectives.masked import masked_loss
from reverie.samplers.autoregressive import Decoder, draw_codes
from reverie.systems.picture_language import PictureLanguage, check_codec, number

WORDS, CODES = 1 / 8, 7 / 8  # how much each loss counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DalleConfig:
    backbone: CodeTransformerConfig
    codec: DvaeConfig | VqConfig
    # Sampling
    temperature: float = 1.0
    top: int = 0  # only so many of the likeliest codes; 0: all
    p: float = 1.0  # only the likeliest that together have this probability
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_codec(self.backbone, self.codec)


class Dalle(PictureLanguage):
    """The network, the codec and the tokenizer."""

    config: DalleConfig

    def __init__(self, config: DalleConfig, tokenizer: Bpe | None = None):
        super().__init__(config, CausalCodes(config.backbone), tokenizer)

    def loss(self, batch: dict[str, Tensor], *, peers: Any = None) -> dict[str, Tensor]:
        """Cross-entropies of the next word, up to the end of the text, and of the next code, each the mean of its kind.

        `codes b h w`, `tokens b length` as `filled` gives them.
        """
        more = {} if peers is None else {"peers": peers}
        tokens, codes = batch["tokens"], flat(batch["codes"])
        words, said = self.backbone(tokens, codes)
        real = tokens < self.config.backbone.words
        text = masked_loss(words, tokens[:, 1:], real[:, 1:], smoothing=0.0, **more)
        picture = masked_loss(said, codes, torch.ones_like(codes, dtype=torch.bool), smoothing=0.0, **more)
        return {"loss": WORDS * text + CODES * picture, "words": text.detach(), "codes": picture.detach()}

    @torch.no_grad()
    def generate_image(
        self,
        prompts: Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        size: tuple[int, int] | None = None,
        temperature: float | None = None,
        top: int | None = None,
        p: float | None = None,
        guidance: float | None = None,
        given: Tensor | str | Path | Image.Image | None = None,
        keep: int | None = None,
        too_long: str = "cut",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Prompts -> pictures `b 3 h w` in [-1, 1].

        Item i has the seed `seed + i`, whose draws do not depend on the batch; what is computed beside it may round
        otherwise. `given`, pictures whose upper `keep` pixels stay (half, if not said), is completed: section 3.3 of
        the paper, picture to picture. What is not given is the configuration's. InputError: what cannot be drawn.
        """
        seeds, config = self.asked(prompts, seed, size), self.config
        guidance = number("guidance", config.guidance if guidance is None else guidance, 0)
        begun = self.upper(given, keep, len(prompts))
        tokens = self.read(prompts, too_long=too_long).to(self.device)
        # Equal texts are read once; guidance reads no words beside them.
        texts, rows = tokens.unique(dim=0, return_inverse=True)
        writing: Decoder
        if guidance == 1:
            writing = self.backbone.begin(texts)
            writing.select(rows)
        else:
            writing = self.backbone.begin(torch.cat([texts, self.silence(1)]))
            writing.select(torch.cat([rows, torch.full_like(rows, len(texts))]))
            writing = Guided(writing, guidance)
        codes = draw_codes(
            writing,
            begun,
            count=config.backbone.places - begun.shape[1],
            generators=[rng.generator(one, "codes") for one in seeds],
            temperature=config.temperature if temperature is None else temperature,
            top=(config.top if top is None else top) or None,
            p=config.p if p is None else p,
            progress=progress,
        )
        return self.decode(torch.cat([begun, codes], 1))


class Guided:
    """A decoder whose second half of rows knows no words: null + guidance (text - null), as a decoder of the first."""

    def __init__(self, decoder: Decoder, guidance: float):
        self.decoder, self.guidance = decoder, guidance

    def __call__(self, codes: Tensor) -> Tensor:
        text, null = self.decoder(repeat(codes, "r n -> (two r) n", two=2)).float().chunk(2)
        return null + self.guidance * (text - null)

    def select(self, rows: Tensor) -> None:
        raise NotImplementedError("rows of guided pictures are all as long")
