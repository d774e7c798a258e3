"""Wan 2.1: "Wan: Open and Advanced Large-Scale Video Generative Models" (2503.20314), text to video and to pictures.

    prompt --- UMT5 (frozen, beside the weights) --- features
                                                        |
    noise --- latents --- patches --- WanDit --- velocity --- causal autoencoder --- video
                                        |
                                      time, shifted towards noise: by 3 for 480 rows, by 5 for 720

A picture is a video of one frame. Training follows rectified flow: the network predicts the velocity noise - x0, at
logit-normal times that are shifted as sampling's are (SD3, 2403.03206). Guidance leads away from a negative prompt,
which is the empty one unless another is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from reverie import rng
from reverie.backbones.wan import SHAPES, WanDit, WanDitConfig
from reverie.codecs.video_vae import WAN, VideoVae, VideoVaeConfig
from reverie.encoders.umt5 import Umt5
from reverie.errors import InputError
from reverie.nn.cache import Cache, check_threshold
from reverie.objectives.denoising import velocity_loss
from reverie.processes import gaussian
from reverie.processes.gaussian import Flow, Point
from reverie.samplers.configured import SamplerConfig
from reverie.samplers.guidance import check_options, guided

UNIPC = SamplerConfig(process=Flow(shift=3.0), prediction="velocity", sampler="unipc", solver="bh2")
SAMPLERS: dict[str, dict[str, Any]] = {
    "unipc": {"sampler": "unipc", "solver": "bh2"},
    "dpmpp_2m": {"sampler": "dpmpp_2m", "solver": "midpoint"},
    "euler": {"sampler": "euler"},
    "heun": {"sampler": "heun"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    backbone: WanDitConfig
    codec: VideoVaeConfig | None = None  # None: the transformer alone, which draws latents
    sampling: SamplerConfig = UNIPC
    words: int = 512  # tokens that a prompt is filled up to
    t_mean: float = 0.0  # of the logit-normal times in training
    t_std: float = 1.0
    size: tuple[int, int] = (480, 832)  # sampling's defaults, Wan's own
    frames: int = 81
    fps: float = 16.0
    steps: int = 50
    guidance: float = 5.0

    def __post_init__(self) -> None:
        if self.codec is not None and self.codec.channels != self.backbone.channels:
            raise InputError(
                f"the codec's latents have {self.codec.channels} channels and the transformer's"
                f" {self.backbone.channels}; they must be of one model."
            )
        _check_flow(self.sampling)


def _check_flow(sampling: Any) -> None:
    if (
        not isinstance(sampling, SamplerConfig)
        or sampling.prediction != "velocity"
        or not isinstance(sampling.process, Flow)
    ):
        raise InputError(f"sampling is {sampling!r:.80}; Wan predicts the velocity of a flow.")


MODELS = {name: WanConfig(backbone=shape, codec=WAN) for name, shape in SHAPES.items()}


class Wan(nn.Module):
    """The transformer and the codec. `reader`, which reads prompts, is set from outside and is none of its weights."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        self.codec = None if config.codec is None else VideoVae(config.codec).requires_grad_(False)
        self.backbone = WanDit(config.backbone)
        self.reader: Umt5 | None = None

    @property
    def device(self) -> torch.device:
        return self.backbone.table.device

    # Words and signals ---------------------------------------------------------------------------------------------

    def read(self, prompts: Sequence[str] | Tensor) -> Tensor:
        """Prompts -> features `b m d`, zero beyond each prompt. They may be kept and given in place of the prompts.

        Wan was trained with m = 512 places for every prompt, so features with fewer are filled up.
        """
        width, places = self.config.backbone.context_width, self.config.words
        if isinstance(prompts, Tensor):
            fits = prompts.ndim == 3 and prompts.shape[-1] == width and 0 < prompts.shape[1] <= places
            if not fits or not len(prompts) or not prompts.is_floating_point():
                raise InputError(
                    f"features are {tuple(prompts.shape)} of {prompts.dtype}; they must be floats `b m {width}`, m at"
                    f" most {places}."
                )
            full = nn.functional.pad(prompts, (0, 0, 0, places - prompts.shape[1]))
            return full.to(self.device, torch.float32)
        if self.reader is None:
            raise InputError(
                "this model has no text encoder: load it from a pipeline's folder with text_encoder/ and tokenizer/, or"
                f" give features `b m {width}` in place of prompts."
            )
        return self.read(self.reader.read(prompts))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video `b 3 f h w` in [-1, 1] -> latents `b c f h w`."""
        return self._codec().encode(video)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> video in [-1, 1]."""
        return self._codec().decode(latents).clamp(-1, 1)

    def _codec(self) -> VideoVae:
        if self.codec is None:
            raise InputError("this model is a transformer alone: load a pipeline's folder, with its vae/.")
        return self.codec

    # Training ------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The velocity's mean squared error.

        `latents b c f h w`, features `context b m d` (the empty prompt's where it learns without words), `noise` like
        the latents, `normal b` (standard normal, makes the times, or `t b` to fix them).
        """
        latents, noise = batch["latents"], batch["noise"]
        t = batch["t"] if "t" in batch else self.draw_times(batch["normal"])
        x_t = gaussian.corrupt(latents, noise, Flow().at(rearrange(t, "b -> b 1 1 1 1")))
        predicted = self.backbone(x_t, t, self.read(batch["context"]))
        return {"loss": velocity_loss(predicted, gaussian.velocity(latents, noise))}

    def draw_times(self, normal: Tensor) -> Tensor:
        """Standard normal numbers -> times, logit-normal and shifted as sampling's are."""
        t = gaussian.logit_normal(normal, mean=self.config.t_mean, std=self.config.t_std)
        process = self.config.sampling.process
        assert isinstance(process, Flow)
        return gaussian.shift(t, process.shift)

    # Sampling ------------------------------------------------------------------------------------------------------

    def generate_image(self, prompts: Sequence[str] | Tensor, **options: Any) -> Tensor:
        """Prompts -> pictures `b 3 h w` in [-1, 1]; options as for `generate_video`."""
        return rearrange(self.generate_video(prompts, frames=1, **options), "b c 1 h w -> b c h w")

    def generate_video(
        self, prompts: Sequence[str] | Tensor, *, frames: int | None = None, **options: Any
    ) -> Tensor:
        """Prompts, or features `b m d` -> videos `b 3 f h w` in [-1, 1]; options as for `generate_latents`."""
        frames = self.config.frames if frames is None else frames
        self._codec()
        return self.decode(self.generate_latents(prompts, frames=frames, **options))[:, :, :frames]

    @torch.no_grad()
    def generate_latents(
        self,
        prompts: Sequence[str] | Tensor,
        *,
        negative: str | Tensor = "",
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | SamplerConfig | None = None,
        shift: float | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        cache: float = 0.0,
        noise: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Prompts, or their features `b m d` -> latents `b c f h w`, which `decode` makes a video.

        Guidance leads away from `negative`, one prompt or features `1 m d`; 1 is none, and costs half. `sampler` is a
        name or whole settings; `shift` moves its times towards noise (None: as the model came). `frames` are filled up
        to 1, 5, 9, ...; `size` is (height, width). Item i has the seed `seed + i`, so a batch equals its items drawn
        alone; `noise`, of the latents' shape, takes its place. With `cache` above 0 all blocks but the first are
        computed only after the batch's features have changed so much in all, such as 0.15 (nn/cache.py). Raises
        InputError.
        """
        if not isinstance(prompts, Tensor) and (
            isinstance(prompts, str) or not len(prompts) or not all(isinstance(text, str) for text in prompts)
        ):
            raise InputError(f"prompts must be a list of one string or more, but is {prompts!r:.60}.")
        if isinstance(negative, Tensor) and (negative.ndim != 3 or len(negative) != 1):
            raise InputError(
                f"features of a negative prompt are `1 m d`, but these are {tuple(negative.shape)}."
            )
        count = int(_number("steps", self.config.steps if steps is None else steps, least=1, whole=True))
        guidance = _number("guidance", self.config.guidance if guidance is None else guidance)
        check_options(interval, rescale)
        check_threshold(cache)
        kept = Cache(cache) if cache else None
        sampling = self._sampling(sampler, shift)
        shape = self.latent_shape(frames, size)
        context = self.read(prompts)
        seeds = [int(_number("seed", seed, whole=True)) + i for i in range(len(context))]
        if noise is None:
            noise = torch.stack([torch.randn(shape, generator=rng.generator(s, "noise")) for s in seeds])
        if tuple(noise.shape) != (len(context), *shape):
            raise InputError(f"noise is {tuple(noise.shape)}; it must be {(len(context), *shape)}.")
        noise = noise.to(self.device, torch.float32)

        with self._computing():
            if guidance == 1:
                words = self.backbone.prepare(context)
            else:
                less = self.read(negative if isinstance(negative, Tensor) else [negative])
                less = repeat(less, "1 m d -> b m d", b=len(context))
                words = self.backbone.prepare(torch.cat([context, less]))

            def predict(x: Tensor, point: Point) -> Tensor:
                """x0 of `x`: the prompts, and where they come twice, the second time the negative one."""
                t = torch.tensor([point.t], dtype=torch.float64, device=x.device)
                velocity = self.backbone(x, t, words.first(len(x)), cache=kept).float()
                return gaussian.to_x0("velocity", velocity, x, point)

            points = sampling.points(count, tokens=math.prod(shape[1:]) // self._together())
            x = sampling.run(
                guided(predict, guidance, interval=interval, rescale=rescale, spread_of="velocity"),
                sampling.first(noise, points),
                points,
                generator=[rng.generator(s, "sampling") for s in seeds],
                progress=progress,
            )
        if not x.isfinite().all():
            raise InputError(f"guidance {guidance:g} is more than numbers can hold: ask for less, such as 5.")
        return x

    def latent_shape(
        self, frames: int | None = None, size: tuple[int, int] | None = None
    ) -> tuple[int, int, int, int]:
        """(c, f, h, w) of the latents of a video; of a transformer alone by the strides of Wan's codec, 4 and 8."""
        frames = self.config.frames if frames is None else frames
        frames = int(_number("frames", frames, least=1, whole=True))
        size = self.config.size if size is None else size
        (time, space), (together, side) = (self.config.codec or WAN).stride, self.config.backbone.patch
        if not isinstance(size, Sequence) or len(size) != 2:
            raise InputError(f"size must be (height, width) in whole pixels, but is {size!r:.60}.")
        height, width = (int(_number("a side", pixels, least=1, whole=True)) for pixels in size)
        if height % (space * side) or width % (space * side):
            raise InputError(
                f"size {(height, width)} cannot be drawn: both must be multiples of {space * side}."
            )
        latent = 1 + -(-(frames - 1) // time)
        if latent % together:
            raise InputError(
                f"{frames} frames cannot be drawn: they are {latent} latent frames, no multiple of {together}."
            )
        return self.config.backbone.channels, latent, height // space, width // space

    def _together(self) -> int:
        frames, side = self.config.backbone.patch
        return frames * side * side

    def _sampling(self, sampler: str | SamplerConfig | None, shift: float | None) -> SamplerConfig:
        sampling = self.config.sampling if sampler is None else sampler
        if isinstance(sampling, str):
            if sampling not in SAMPLERS:
                raise InputError(
                    f"there is no sampler {sampling!r:.40}: choose one of {', '.join(SAMPLERS)}."
                )
            sampling = dataclasses.replace(self.config.sampling, order=2, **SAMPLERS[sampling])
        _check_flow(sampling)
        if shift is not None:
            factor = _number("shift", shift, least=0.01)
            sampling = dataclasses.replace(sampling, process=Flow(shift=factor), tokens=None)
        return sampling

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        """On a GPU, products in the precision that the weights are kept in; a CPU does as nn/linear.py says."""
        dtype: torch.dtype = self.backbone.blocks[0].mlp.up.weight.dtype  # type: ignore[union-attr,assignment]
        if self.device.type == "cpu" or dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if dtype == torch.int8 else dtype)


def _number(name: str, value: Any, *, least: float = -math.inf, whole: bool = False) -> float:
    fine = (
        isinstance(value, Integral if whole else Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
    if not fine or value < least:
        kind = "a whole number" if whole else "a finite number"
        raise InputError(
            f"{name} is {value!r:.40}; give {kind}{'' if least == -math.inf else f' from {least:g}'}."
        )
    return value
