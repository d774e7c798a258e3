"""MaskGIT: "Masked Generative Image Transformer" (Chang et al. 2022, 2202.04200), from words.

    picture --- codec (frozen) --- codes, some hidden ---+
                                                         +--- MaskedCodes --- the hidden codes --- codec --- picture
    text --- tokens, each position's padding ------------+

The network sees the whole picture but for what is hidden, and guesses that. A picture is drawn in a few steps, many
codes at once (samplers/masked.py); any part of it may be given. The words are those of DALL-E's sequence
(systems/dalle.py), in the place of the paper's class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from einops import repeat
from PIL import Image
from torch import Tensor

from reverie import rng
from reverie.backbones.code_transformer import CodeTransformerConfig, MaskedCodes, flat
from reverie.codecs.bpe import Bpe
from reverie.codecs.dvae import DvaeConfig
from reverie.codecs.vq import VqConfig
from reverie.objectives.masked import masked_loss
from reverie.processes.masking import hidden
from reverie.samplers.masked import masked
from reverie.systems.picture_language import PictureLanguage, check_codec, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGitConfig:
    backbone: CodeTransformerConfig
    codec: DvaeConfig | VqConfig
    schedule: Literal["cosine", "linear", "square", "root"] = "cosine"
    smoothing: float = 0.1
    # Sampling
    steps: int = 12
    chance: float = 4.5  # of which guesses stay, at first
    temperature: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_codec(self.backbone, self.codec)


class MaskGit(PictureLanguage):
    """The network, the codec and the tokenizer."""

    config: MaskGitConfig

    def __init__(self, config: MaskGitConfig, tokenizer: Bpe | None = None):
        super().__init__(config, MaskedCodes(config.backbone), tokenizer)

    def loss(self, batch: dict[str, Tensor], *, peers: Any = None) -> dict[str, Tensor]:
        """Cross-entropy of the hidden codes.

        `codes b h w`, `tokens b length` as `filled` gives them, `order b (h w)` and `uniform b`, which say what is
        hidden.
        """
        more = {} if peers is None else {"peers": peers}
        codes = flat(batch["codes"])
        away = hidden(batch["order"], batch["uniform"], schedule=self.config.schedule)
        logits = self.backbone(batch["tokens"], codes, away)
        with torch.no_grad():
            right = (logits.argmax(-1) == codes)[away].float().mean()
        return {
            "loss": masked_loss(logits, codes, away, smoothing=self.config.smoothing, **more),
            "right": right,
        }

    @torch.no_grad()
    def generate_image(
        self,
        prompts: Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        chance: float | None = None,
        temperature: float | None = None,
        guidance: float | None = None,
        given: Tensor | str | Path | Image.Image | None = None,
        keep: int | None = None,
        too_long: str = "cut",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Prompts -> pictures `b 3 h w` in [-1, 1], in `steps`; the rest as `Dalle.generate_image`."""
        seeds, config = self.asked(prompts, seed, size), self.config
        guidance = number("guidance", config.guidance if guidance is None else guidance, 0)
        tokens = self.read(prompts, too_long=too_long).to(self.device)
        begun = self.upper(given, keep, len(prompts))
        places = config.backbone.places
        codes = torch.zeros(len(prompts), places, dtype=torch.long, device=self.device)
        codes[:, : begun.shape[1]] = begun
        away = torch.arange(places, device=self.device).expand_as(codes) >= begun.shape[1]
        if begun.shape[1] == places:
            return self.decode(codes)

        def predict(codes: Tensor, away: Tensor) -> Tensor:
            if guidance == 1:
                return self.backbone(tokens, codes, away)
            both = (repeat(x, "b n -> (two b) n", two=2) for x in (codes, away))
            text, null = self.backbone(torch.cat([tokens, self.silence(len(tokens))]), *both).float().chunk(2)
            return null + guidance * (text - null)

        drawn = masked(
            predict,
            codes,
            away,
            steps=config.steps if steps is None else int(steps),
            generators=[rng.generator(one, "codes") for one in seeds],
            schedule=config.schedule,
            chance=config.chance if chance is None else chance,
            temperature=config.temperature if temperature is None else temperature,
            progress=progress,
        )
        return self.decode(drawn)
