"""What systems that draw pictures of a class share: classes by number or name, what a caller asks, latents to pictures.

DiT and SiT are two processes around one network (backbones/dit.py); MDT is another network (backbones/mdt.py) in DiT's
process, and is sampled as DiT is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from reverie import rng
from reverie.backbones.dit import Dit, DitConfig, Modulations
from reverie.backbones.mdt import Mdt, MdtConfig
from reverie.codecs.vae import Vae
from reverie.errors import InputError
from reverie.processes.gaussian import Point, to_x0
from reverie.samplers import diffusion
from reverie.samplers.configured import BY_LAMBDA, FUNCTIONS
from reverie.samplers.guidance import Weight, guided

Sampler = Literal["ddpm", "ddim", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]  # of DDPM's process
SAMPLERS: tuple[str, ...] = get_args(Sampler)


class ClassConditional(nn.Module):
    """A network and, in latent space, a codec; what it learns and how it draws is a system's own.

    `config` has a `backbone`, the network's config, and a `codec: VaeConfig | None`.
    """

    def __init__(self, config: Any, backbone: nn.Module):
        super().__init__()
        self.config = config
        self.backbone: Any = backbone
        self.codec = None if config.codec is None else Vae(config.codec).requires_grad_(False)

    def attach(self, codec: Vae) -> Self:
        """The model with this autoencoder, in place; checkpoints of the authors have none. Returns itself."""
        check_codec(codec, self.config.backbone)
        self.config = dataclasses.replace(self.config, codec=codec.config)
        self.codec = codec.requires_grad_(False)
        return self

    @torch.no_grad()
    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Pictures `b 3 h w` in [-1, 1] -> latents (the pictures themselves in pixel space)."""
        return image if self.codec is None else self.codec.encode(image, noise=noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures in [-1, 1]."""
        return decoded(self.codec, latents)


class NoisePredicting(ClassConditional):
    """A network that says the noise of DDPM's process, and perhaps the variance of a step; what it learns is its own.

    `config` also has the `process: Ddpm`, the `names` of the classes and what sampling takes, as in systems/dit.py.
    """

    def weigh(self, guidance: float) -> Weight:
        """The weight of guidance on the way: the same everywhere."""
        return guidance

    def generate_image(
        self,
        classes: Sequence[int | str],
        *,
        seed: int | Sequence[int] = 0,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Classes, by number or name -> pictures `b 3 h w` in [-1, 1].

        Item i has the seed `seed + i`, so a batch equals its items drawn alone. What is not given is the
        configuration's. Raises InputError for classes, sizes and samplers that there are not.
        """
        numbers = class_numbers(classes, count=self.config.backbone.classes, names=self.config.names)
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else guidance
        sampler = self.config.sampler if sampler is None else sampler
        if (
            sampler == "ddpm"
            and self.config.variance == "learned_range"
            and not self.config.backbone.learned_sigma
        ):
            raise InputError(
                "this model learned no variance: choose another sampler than 'ddpm', such as 'ddim'."
            )
        seeds = check_asked(len(numbers), seed, steps, guidance, sampler, SAMPLERS)
        check_decodes(self.codec, self.config.backbone.channels)  # before anything is drawn
        shape = latent_shape(self.config.backbone, self.codec, size)
        device = self.backbone.classes.weight.device
        latents = self.sample(
            torch.tensor(numbers, device=device),
            initial(shape, seeds, device),
            steps=int(steps),
            guidance=float(guidance),
            sampler=sampler,
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
        generator: diffusion.Generators | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Classes `b` and noise `b c h w` -> latents `b c h w`."""
        config = self.config
        points = config.process.points(
            steps, spacing=config.spacing, offset=config.offset, beyond=sampler in BY_LAMBDA
        )
        say = branches(self.backbone, classes, [point.t for point in points[:-1]])
        learned = sampler == "ddpm" and config.variance == "learned_range"
        channels = config.backbone.channels

        def predict(x: Tensor, point: Point) -> Tensor:
            out = say(x, point.t)
            x0 = to_x0("noise", out[:, :channels], x, point)
            return torch.cat([x0, out[:, channels:]], dim=1) if learned else x0

        options: dict[str, Any] = {"variance": config.variance} if sampler == "ddpm" else {}
        if sampler in ("ddpm", "ddim"):
            options["clip"] = config.clip
        return FUNCTIONS[sampler](
            guided(predict, self.weigh(guidance), channels=config.guided_channels or channels),
            noise, points, generator=generator, progress=progress, **options,
        )  # fmt: skip


def branches(
    network: Dit | Mdt, classes: Tensor, times: Sequence[float]
) -> Callable[[Tensor, float], Tensor]:
    """What the network says of a batch at one of `times`: with its classes, and where it comes twice, without them."""
    both = torch.cat([classes, torch.full_like(classes, network.null)])
    modulations = Modulations(network, times, both)

    def say(x: Tensor, t: float) -> Tensor:
        return network(x, modulations=[one[: len(x)] for one in modulations.at(t)])

    return say


def initial(shape: tuple[int, int, int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """Noise `b c h w`, an item for each seed."""
    return torch.stack([torch.randn(shape, generator=rng.generator(s, "noise")) for s in seeds]).to(device)


def decoded(codec: Vae | None, latents: Tensor) -> Tensor:
    """Pictures in [-1, 1]. InputError: latents without a codec."""
    check_decodes(codec, latents.shape[1])
    return (latents if codec is None else codec.decode(latents)).clamp(-1, 1)


def check_decodes(codec: Vae | None, channels: int) -> None:
    """InputError: latents without a codec."""
    if codec is None and channels != 3:
        raise InputError(
            "this model draws latents and has no autoencoder: give it the one that it learnt in, such as"
            " model.attach(reverie.load(FOLDER))."
        )


def latent_shape(backbone: DitConfig | MdtConfig, codec: Vae | None, size: Any) -> tuple[int, int, int]:
    """(c, h, w) of what is drawn for a picture of `size` (height, width); None: the size of the training."""
    if size is None:
        return backbone.channels, backbone.size, backbone.size
    stride = 1 if codec is None else codec.stride
    unit = stride * backbone.patch
    sides = list(size) if isinstance(size, Iterable) else []
    if len(sides) != 2 or any(not _whole(side) or side < unit or side % unit for side in sides):
        raise InputError(
            f"size {size!r:.60} cannot be drawn: give (height, width), both multiples of {unit}."
        )
    if isinstance(backbone, MdtConfig) and set(sides) != {backbone.size * stride}:
        only = backbone.size * stride
        raise InputError(
            f"size {size!r:.60} cannot be drawn: this model has learned places for {only} x {only} alone."
        )
    return backbone.channels, int(sides[0]) // stride, int(sides[1]) // stride


def class_numbers(classes: Any, *, count: int, names: Sequence[str]) -> list[int]:
    """Classes by number or by one of their names. InputError: there is none, or a name means several."""
    if isinstance(classes, Tensor):
        classes = classes.tolist()
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not classes:
        raise InputError(f"classes must be a list of one number or name or more, but is {classes!r:.60}.")
    meant: dict[str, list[int]] = {}
    for number, several in enumerate(names):
        for name in several.split(","):
            meant.setdefault(name.strip(), []).append(number)
    numbers = []
    for one in classes:
        if isinstance(one, str) and one.strip().isdecimal() and one.strip() not in meant:
            one = int(one)
        if isinstance(one, str):
            found = meant.get(one.strip(), []) if one.strip() else []
            if not found:
                some = ", ".join([name for name in meant if name][:5])
                listed = f"it has {len(names)}, such as {some}" if names else "it has no names, only numbers"
                raise InputError(f"this model has no class {one!r:.60}: {listed}.")
            if len(found) > 1:
                raise InputError(
                    f"{one!r:.60} means the classes {', '.join(map(str, found))}: give a number."
                )
            numbers.append(found[0])
        elif not _whole(one) or not 0 <= one < count:
            raise InputError(f"there is no class {one!r:.60}: give 0 to {count - 1}, or a name.")
        else:
            numbers.append(int(one))
    return numbers


def check_asked(
    count: int, seed: Any, steps: Any, guidance: Any, sampler: Any, samplers: Sequence[str]
) -> list[int]:
    """The seeds of `count` items. InputError: values that cannot be asked for."""
    if sampler not in samplers:
        raise InputError(f"there is no sampler {sampler!r:.60}: choose one of {', '.join(samplers)}.")
    if not _whole(steps) or steps < 1:
        raise InputError(f"{steps!r:.60} steps cannot be taken: give a whole number, 1 or more.")
    if not isinstance(guidance, Real) or not abs(float(guidance)) < float("inf"):
        raise InputError(f"guidance {guidance!r:.60} cannot be followed: give a finite number.")
    seeds = [seed + i for i in range(count)] if _whole(seed) else seed
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not all(_whole(one) for one in seeds):
        raise InputError(f"seed {seed!r:.60} is no whole number: give one, or a list with one each.")
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds were given for {count} classes: give one seed, or one each.")
    return [int(one) for one in seeds]


def check_names(names: Sequence[str], count: int) -> None:
    if names and len(names) != count:
        raise InputError(f"{len(names)} names were given for {count} classes: give one for each, or none.")


def check_codec(codec: Any, backbone: DitConfig | MdtConfig) -> None:
    if not isinstance(codec, Vae) or codec.channels != backbone.channels:
        has = f"{codec.channels} channels" if isinstance(codec, Vae) else type(codec).__name__
        raise InputError(f"the codec must be a Vae of {backbone.channels} channels, but has {has}.")


def finite(latents: Tensor, guidance: float) -> Tensor:
    if not latents.isfinite().all():
        raise InputError(f"guidance {guidance:g} is more than numbers can hold: ask for less, such as 4.")
    return latents


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
