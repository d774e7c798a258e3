"""DiT: "Scalable Diffusion Models with Transformers" (Peebles and Xie 2022, 2212.09748).

    class, or the null class ------------------- vector
                                                   |
    noise --- DDPM's process --- x_t --- patches --- Dit --- noise, variance --- codec or pixels --- picture

Pictures of a class, in the latents of Stable Diffusion's autoencoder or in pixels. The network says what was added and
how wide the next step is: mean squared error and the variational bound together (improved DDPM, 2102.09672). Some
labels are left out in training, so that sampling can be guided away from the null class.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from reverie.backbones.dit import Dit, DitConfig
from reverie.codecs.vae import VaeConfig
from reverie.errors import InputError
from reverie.objectives.denoising import variance_bound
from reverie.processes.gaussian import Ddpm, Point, corrupt, to_x0
from reverie.systems.class_conditional import SAMPLERS as SAMPLERS
from reverie.systems.class_conditional import NoisePredicting, Sampler, check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionTransformerConfig:
    backbone: DitConfig
    codec: VaeConfig | None = None  # None: pixels are the latents, or they are drawn without a codec
    process: Ddpm = Ddpm()
    names: tuple[str, ...] = ()  # of the classes; several for one are separated by commas
    # Sampling. The authors' code draws 250 steps of DDPM and guides three of the four channels of latents.
    sampler: Sampler = "ddpm"
    steps: int = 250
    guidance: float = 4.0
    guided_channels: int = 0  # the first so many; 0: all
    spacing: Literal["leading", "trailing", "linspace", "respaced"] = "respaced"
    offset: int = 0  # of the indices, where the spacing is "leading"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "learned_range"  # of DDPM
    clip: float | None = None  # DDPM and DDIM hold x0 within it

    def __post_init__(self) -> None:
        check_names(self.names, self.backbone.classes)
        if self.variance == "learned_range" and self.sampler == "ddpm" and not self.backbone.learned_sigma:
            raise InputError(
                "variance 'learned_range' needs a backbone with learned_sigma; set one of the two."
            )


class DiffusionTransformer(NoisePredicting):
    """The network and, in latent space, the codec."""

    config: DiffusionTransformerConfig

    def __init__(self, config: DiffusionTransformerConfig):
        super().__init__(config, Dit(config.backbone))

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The noise's mean squared error, and with a learned variance the bound in bits, which moves that alone.

        `latents b c h w`, `noise` like the latents, `classes b`, `drop b` (True: the null class), `uniform b` (in
        [0, 1), makes the indices, or `t b` to fix them).
        """
        x0, noise = batch["latents"], batch["noise"]
        steps = self.config.process.steps
        t = batch["t"].long() if "t" in batch else (batch["uniform"] * steps).long().clamp(max=steps - 1)
        point = Point(t, *(rearrange(part, "b -> b 1 1 1") for part in self.config.process.at(t)[1:]))
        x_t = corrupt(x0, noise, point)
        out = self.backbone(x_t, t, torch.where(batch["drop"], self.backbone.null, batch["classes"]))
        if not self.config.backbone.learned_sigma:
            return {"loss": (out - noise).square().mean()}
        said, v = out.chunk(2, dim=1)
        mse = (said - noise).square().mean()
        # In float: the factors of the posterior differ by little from one index to the next.
        predicted = to_x0("noise", said.detach().float(), x_t.float(), point)
        bound = variance_bound(x0.float(), x_t.float(), predicted, v.float(), t, self.config.process).mean()
        return {"loss": mse + bound, "mse": mse, "bound": bound}
