"""MDT: "Masked Diffusion Transformer is a Strong Image Synthesizer" (Gao et al. 2023, 2303.14389, version 2 of 2024).

    class, or the null class ------------------------------ vector
                                                              |
    noise ------- DDPM's process --- x_t --- all patches ---- Mdt --- noise, variance --- codec or pixels --- picture
    other noise - DDPM's process --- x_t --- some patches --- Mdt --- noise, variance of all patches

DiT that also learns what belongs together: each step is taken twice, on whole pictures and on some of their patches,
at the same times and with equal weight. A missing patch can only be said from the others. Pictures are drawn by the
whole pass, with guidance that grows towards the data (samplers.guidance.power_cosine).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Self

import torch
from einops import rearrange
from torch import Tensor

from reverie.backbones.mdt import Mdt, MdtConfig
from reverie.codecs.vae import VaeConfig
from reverie.errors import InputError
from reverie.objectives.denoising import min_snr, variance_bound
from reverie.processes.gaussian import Ddpm, Point, corrupt, to_x0
from reverie.samplers.guidance import Weight, power_cosine
from reverie.systems.class_conditional import NoisePredicting, Sampler, check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedDiffusionTransformerConfig:
    backbone: MdtConfig
    codec: VaeConfig | None = None  # None: pixels are the latents, or they are drawn without a codec
    process: Ddpm = Ddpm()
    gamma: float | None = (
        5.0  # no step's signal to noise counts for more (Min-SNR); None: all alike, as in version 1
    )
    names: tuple[str, ...] = ()  # of the classes; several for one are separated by commas
    # Sampling. The authors' code draws 250 steps of DDPM and guides three of the four channels of latents.
    sampler: Sampler = "ddpm"
    steps: int = 250
    guidance: float = 3.8
    power: float = 4.0  # the higher, the later guidance begins to count
    guided_channels: int = 0  # the first so many; 0: all
    spacing: Literal["leading", "trailing", "linspace", "respaced"] = "respaced"
    offset: int = 0  # of the indices, where the spacing is "leading"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "learned_range"  # of DDPM
    clip: float | None = None  # DDPM and DDIM hold x0 within it

    def __post_init__(self) -> None:
        check_names(self.names, self.backbone.classes)
        if not (self.gamma is None or self.gamma > 0) or not self.power > 0:
            raise InputError(f"gamma {self.gamma} and power {self.power} must be above 0, such as 5 and 4.")
        if self.variance == "learned_range" and self.sampler == "ddpm" and not self.backbone.learned_sigma:
            raise InputError(
                "variance 'learned_range' needs a backbone with learned_sigma; set one of the two."
            )


class MaskedDiffusionTransformer(NoisePredicting):
    """The network and, in latent space, the codec."""

    config: MaskedDiffusionTransformerConfig

    def __init__(self, config: MaskedDiffusionTransformerConfig):
        super().__init__(config, Mdt(config.backbone))

    def drop_interpolater(self) -> Self:
        """Without what masked passes alone need, in place: pictures stay as they are. Returns itself."""
        self.backbone.drop_interpolater()
        self.config = dataclasses.replace(self.config, backbone=self.backbone.config)
        return self

    def weigh(self, guidance: float) -> Weight:
        """Almost no guidance among noise."""
        return power_cosine(guidance, power=self.config.power, end=self.config.process.steps)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole pass's error of the noise and bound of the variance, and with `keep` the masked pass's.

        `latents b c h w`, `noise` like the latents, `classes b`, `drop b` (True: the null class), `uniform b` (in
        [0, 1), makes the indices, or `t b` to fix them). With `keep b k`, the patches that a masked pass sees, also
        `masked_noise` like the latents; without it there is no masked pass.
        """
        steps = self.config.process.steps
        t = batch["t"].long() if "t" in batch else (batch["uniform"] * steps).long().clamp(max=steps - 1)
        point = Point(t, *(rearrange(part, "b -> b 1 1 1") for part in self.config.process.at(t)[1:]))
        classes = torch.where(batch["drop"], self.backbone.null, batch["classes"])
        mse, bound = self._pass(batch["latents"], batch["noise"], point, classes)
        if "keep" not in batch:
            return {"loss": mse + bound, "mse": mse, "bound": bound}
        masked, masked_bound = self._pass(
            batch["latents"], batch["masked_noise"], point, classes, keep=batch["keep"]
        )
        return {
            "loss": mse + bound + masked + masked_bound,
            "mse": mse, "bound": bound, "masked_mse": masked, "masked_bound": masked_bound,
        }  # fmt: skip

    def _pass(
        self, x0: Tensor, noise: Tensor, point: Point, classes: Tensor, *, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x_t = corrupt(x0, noise, point)
        out = self.backbone(x_t, point.t, classes, keep=keep)
        said, v = out.chunk(2, dim=1) if self.config.backbone.learned_sigma else (out, None)
        weight = 1.0 if self.config.gamma is None else min_snr(point, gamma=self.config.gamma)
        mse = (weight * (said - noise).square()).mean()
        if v is None:
            return mse, mse.new_zeros(())
        # In float: the factors of the posterior differ by little from one index to the next.
        predicted = to_x0("noise", said.detach().float(), x_t.float(), point)
        bound = variance_bound(x0.float(), x_t.float(), predicted, v.float(), point.t, self.config.process)
        return mse, bound.mean()
