"""SiT: "Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers" (Ma et al. 2024,
2401.08740).

    class, or the null class ------------------------------- vector
                                                               |
    noise --- straight line to the data --- x_t --- patches --- Dit --- velocity --- codec or pixels --- picture

DiT's network on a straight line from noise to data: it learns the velocity, and is sampled along the line's flow (an
ODE) or with fresh noise on the way (an SDE), whose amount w(t) is chosen after training.

Their time runs the other way, 0 at noise, and so does their velocity: the network is told 1 - t and says -velocity, so
that the authors' weights are these weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from reverie import rng
from reverie.backbones.dit import Dit, DitConfig
from reverie.codecs.vae import VaeConfig
from reverie.errors import InputError
from reverie.objectives.denoising import velocity_loss
from reverie.processes.gaussian import Flow, Point, corrupt, to_x0, velocity
from reverie.samplers import diffusion, multistep
from reverie.samplers.guidance import guided
from reverie.samplers.interpolants import DIFFUSIONS, euler_maruyama, stochastic_points
from reverie.systems.class_conditional import (
    ClassConditional,
    branches,
    check_asked,
    check_decodes,
    check_names,
    class_numbers,
    finite,
    initial,
    latent_shape,
)

Sampler = Literal["sde", "euler", "heun", "dpmpp_2m", "unipc"]
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "sde": euler_maruyama,
    "euler": diffusion.euler,
    "heun": diffusion.flow_heun,
    "dpmpp_2m": multistep.dpmpp_2m,
    "unipc": multistep.unipc,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitConfig:
    backbone: DitConfig
    codec: VaeConfig | None = None  # None: pixels are the latents, or they are drawn without a codec
    names: tuple[str, ...] = ()  # of the classes; several for one are separated by commas
    # Sampling. The authors' code guides three of the four channels of latents.
    sampler: Sampler = "sde"
    steps: int = 250
    guidance: float = 4.0
    guided_channels: int = 0  # the first so many; 0: all
    # w(t) of the SDE
    diffusion: Literal["constant", "sigma", "decreasing", "increasing-decreasing"] = "sigma"
    last: float = 0.04  # the time from which the SDE's last step takes the mean

    def __post_init__(self) -> None:
        check_names(self.names, self.backbone.classes)
        if not 0 < self.last < 1:
            raise InputError(
                f"last {self.last:g} is no time before the data: give one in (0, 1), such as 0.04."
            )


class Sit(ClassConditional):
    """The network and, in latent space, the codec."""

    config: SitConfig

    def __init__(self, config: SitConfig):
        super().__init__(config, Dit(config.backbone))

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The velocity's mean squared error.

        `latents b c h w`, `noise` like the latents, `classes b`, `drop b` (True: the null class), `uniform b` (the
        times, or `t b` to fix them).
        """
        x0, noise = batch["latents"], batch["noise"]
        t = batch["t"] if "t" in batch else batch["uniform"]
        x_t = corrupt(x0, noise, Flow().at(rearrange(t, "b -> b 1 1 1")))
        out = self._say(
            self.backbone(x_t, 1 - t, torch.where(batch["drop"], self.backbone.null, batch["classes"]))
        )
        return {"loss": velocity_loss(out, velocity(x0, noise))}

    def _say(self, out: Tensor) -> Tensor:
        """The velocity; what DiT's variance would be is not used."""
        return -out[:, : self.config.backbone.channels]

    def generate_image(
        self,
        classes: Sequence[int | str],
        *,
        seed: int | Sequence[int] = 0,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        diffusion: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Classes, by number or name -> pictures `b 3 h w` in [-1, 1].

        `diffusion` is w(t) of the sampler "sde". Item i has the seed `seed + i`, so a batch equals its items drawn
        alone. What is not given is the configuration's. Raises InputError for classes, sizes and samplers that there
        are not.
        """
        numbers = class_numbers(classes, count=self.config.backbone.classes, names=self.config.names)
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else guidance
        sampler = self.config.sampler if sampler is None else sampler
        diffusion = self.config.diffusion if diffusion is None else diffusion
        seeds = check_asked(len(numbers), seed, steps, guidance, sampler, tuple(SAMPLERS))
        if diffusion not in tuple(DIFFUSIONS):
            raise InputError(
                f"there is no diffusion {diffusion!r:.60}: choose one of {', '.join(DIFFUSIONS)}."
            )
        check_decodes(self.codec, self.config.backbone.channels)  # before anything is drawn
        shape = latent_shape(self.config.backbone, self.codec, size)
        device = self.backbone.classes.weight.device
        latents = self.sample(
            torch.tensor(numbers, device=device),
            initial(shape, seeds, device),
            steps=int(steps),
            guidance=float(guidance),
            sampler=sampler,
            diffusion=diffusion,
            generator=[rng.generator(one, "sampling") for one in seeds],
            progress=progress,
        )
        return self.decode(finite(latents, guidance))

    @torch.no_grad()
    def sample(
        self,
        classes: Tensor,
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
        sampler: str,
        diffusion: str = "sigma",
        generator: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Classes `b` and noise `b c h w` -> latents `b c h w`."""
        config = self.config
        stochastic = sampler == "sde"
        points = stochastic_points(steps, last=config.last) if stochastic else Flow().points(steps)
        say = branches(self.backbone, classes, [1 - point.t for point in points])

        def predict(x: Tensor, point: Point) -> Tensor:
            return to_x0("velocity", self._say(say(x, 1 - point.t)), x, point)

        options: dict[str, Any] = {"diffusion": DIFFUSIONS[diffusion]} if stochastic else {}
        return SAMPLERS[sampler](
            guided(predict, guidance, channels=config.guided_channels or None),
            noise, points, generator=generator, progress=progress, **options,
        )  # fmt: skip
