"""Sora: "Video generation models as world simulators" (OpenAI 2024), small and open.

    prompt --- CLIP's text tower (frozen) --- words, pooled vector
                                                    |
    noise --- spacetime patches --- VideoDit ------ x0 --- codec or pixels --- picture or video
                                      |
                     known frames, each frame's time

A picture is a video of one frame, so one network learns from both. Training follows rectified flow with logit-normal
times (SD3, 2403.03206); the network predicts the clean signal and is judged by the velocity that this implies
(2511.13720), or predicts the velocity itself. Given frames enter clean, with their time at 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from reverie import rng
from reverie.backbones.video_dit import VideoDit, VideoDitConfig
from reverie.codecs.bpe import Bpe
from reverie.codecs.pieces import Pieces
from reverie.codecs.video_vae import VideoVae, VideoVaeConfig
from reverie.encoders.text import Text, TextConfig
from reverie.errors import InputError
from reverie.nn.cache import Cache, check_threshold
from reverie.objectives.denoising import velocity_loss
from reverie.pictures import to_signal
from reverie.processes import gaussian
from reverie.processes.gaussian import Flow, Point
from reverie.samplers import diffusion, multistep
from reverie.samplers.guidance import check_options, guided
from reverie.systems import sora_given

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": diffusion.euler,
    "heun": diffusion.flow_heun,
    "dpmpp_2m": multistep.dpmpp_2m,
    "unipc": multistep.unipc,
    "euler_ancestral": diffusion.euler_ancestral,
    "dpmpp_2m_sde": multistep.dpmpp_2m_sde,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoraConfig:
    backbone: VideoDitConfig
    text: TextConfig
    codec: VideoVaeConfig | None = None  # None: pixels are the latents
    prediction: Literal["x0", "velocity"] = "x0"
    t_mean: float = 0.0  # of the logit-normal times
    t_std: float = 1.0
    size: tuple[int, int] = (64, 64)  # what it was trained at; any other may be asked for
    clip_size: tuple[int, int] | None = None  # of clips; None: as pictures
    frames: int = 16
    fps: float = 12.0
    steps: int = 24  # sampling defaults, measured on docs/systems/sora.md
    guidance: float = 4.0
    shift: float = 1.0


class Sora(nn.Module):
    """The backbone, the frozen text tower and, in latent space, the codec."""

    def __init__(self, config: SoraConfig, tokenizer: Bpe | Pieces | None = None):
        super().__init__()
        self.config = config
        if tokenizer is not None:
            tokenizer.fits(vocab=config.text.vocab, end=config.text.end)
        self.tokenizer = tokenizer
        self.text = Text(config.text).requires_grad_(False)
        self.codec = None if config.codec is None else VideoVae(config.codec).requires_grad_(False)
        self.backbone = VideoDit(config.backbone)

    # Words and signals ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, texts: Sequence[str] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Strings or tokens `b n` -> pooled `b d`, context `b m d`, context_mask `b m`."""
        texts = self._tokens(texts)
        self.text.check(texts)
        tokens = self.text.trim(texts.to(self.backbone.null_context.device))
        context = self.text(tokens)
        end = self.text.end_position(tokens)
        mask = torch.arange(tokens.shape[1], device=tokens.device) <= rearrange(end, "b -> b 1")
        return self.text.pool(context, tokens), context, mask

    def _tokens(self, texts: Sequence[str] | Tensor) -> Tensor:
        if isinstance(texts, Tensor):
            return texts
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: give token ids `b n`, or load it from a folder.")
        return self.tokenizer.encode(list(texts), length=self.config.text.length)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video `b 3 f h w` in [-1, 1] -> latents `b c f h w` (the video itself in pixel space)."""
        return video if self.codec is None else self.codec.encode(video)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> video in [-1, 1]."""
        return (latents if self.codec is None else self.codec.decode(latents)).clamp(-1, 1)

    @property
    def unit(self) -> int:
        """Pixels a side that a patch stands for: sides are multiples of it."""
        return self.config.backbone.patch[1] * (1 if self.codec is None else self.codec.config.stride[1])

    def size_of(self, frames: int) -> tuple[int, int]:
        """Height and width that it was trained at: of a picture, or of a clip."""
        return self.config.size if frames == 1 else self.config.clip_size or self.config.size

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(c, f, h, w) of the latents of a video of `frames` and `size`."""
        if self.codec is None:
            return (3, frames, *size)
        return self.codec.latent_shape(frames, size)

    # Training ------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The velocity's mean squared error where nothing is given.

        `latents b c f h w`, `tokens b n`, `noise` like the latents, `normal b` (standard normal, makes the times, or
        `t b` to fix them), `drop b` (True: no text), `known b f` (True: a given frame) or `b f h w` on the grid of
        patches; `pace` as the backbone takes it. Packed: `latents`, `noise` and `known` are lists with one for each
        item, of any shapes; every place of the pack counts as much. With `keep b k`, the patches that a masked pass
        sees, and `masked_noise` like the latents, its error is added (MDT, 2303.14389).
        """
        times = batch["t"] if "t" in batch else self.draw_times(batch["normal"])
        text = self.backbone.without_text(*self.read(batch["tokens"]), batch["drop"])
        whole = self._error(batch, batch["noise"], times, text)
        if "keep" not in batch:
            return {"loss": whole}
        masked = self._error(batch, batch["masked_noise"], times, text, keep=batch["keep"])
        return {"loss": whole + masked, "whole": whole, "masked": masked}

    def _error(
        self, batch: dict[str, Any], noise: Any, times: Tensor, text: Any, *, keep: Tensor | None = None
    ) -> Tensor:
        """Of one pass, whole or masked."""
        packed = isinstance(batch["latents"], list)

        def parts(of: Any) -> list[Tensor]:
            """The batch itself, or of a pack each item as a batch."""
            return [one[None] for one in of] if packed else [of]

        entered, targets, weights = [], list[Tensor](), list[Tensor]()
        each = (parts(of) for of in (batch["latents"], noise, batch["known"], times))
        for clean, noisy, known, time in zip(*each, strict=True):
            t = rearrange(time, f"b -> b{' 1' * (known.ndim - 1)}") * ~known
            wide = self.within(t)
            x_t = gaussian.corrupt(clean, noisy, Flow().at(wide))
            entered.append((x_t, t, wide))
            by_x0 = self.config.prediction == "x0"
            targets.append(self._velocity(clean, x_t, wide) if by_x0 else gaussian.velocity(clean, noisy))
            weights.append(self.within(~known).float().expand_as(clean))
        xs, ts, wides = zip(*entered, strict=True)
        x, t = ([one[0] for one in of] if packed else of[0] for of in (xs, ts))
        outs = parts(self.backbone(x, t, *text, pace=batch.get("pace", 1.0), keep=keep))
        predicted = list(map(self._velocity, outs, xs, wides))
        said, target, weight = (
            of[0] if len(of) == 1 else torch.cat([one.flatten() for one in of])
            for of in (predicted, targets, weights)
        )
        return velocity_loss(said, target, weight=weight)

    def draw_times(self, normal: Tensor) -> Tensor:
        """Standard normal numbers -> times, logit-normal and shifted as the configuration says."""
        t = gaussian.logit_normal(normal, mean=self.config.t_mean, std=self.config.t_std)
        return gaussian.shift(t, self.config.shift)

    def _velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return gaussian.velocity_from(out, x_t, t) if self.config.prediction == "x0" else out

    # Sampling ------------------------------------------------------------------------------------------------------

    extend, loop, connect = sora_given.extend, sora_given.loop, sora_given.connect
    edit, inpaint, stream = sora_given.edit, sora_given.inpaint, sora_given.stream

    def generate_image(self, prompts: Sequence[str], **options) -> Tensor:
        """Prompts -> pictures `b 3 h w` in [-1, 1]; options as for `generate`."""
        return rearrange(self.generate(prompts, frames=1, **options), "b c 1 h w -> b c h w")

    def generate_video(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None = None,
        first_frame: Tensor | str | Path | Image.Image | None = None,
        **options,
    ) -> Tensor:
        """Prompts -> videos `b 3 f h w` in [-1, 1].

        `first_frame`, if given, is continued: `b 3 h w` or `3 h w` in [-1, 1], or a picture or its path, which is
        cropped to the videos' size. Guidance is 1 then unless it is given (systems/sora_given.py).
        """
        frames = self.config.frames if frames is None else frames
        if first_frame is None:
            return self.generate(prompts, frames=frames, **options)
        frames = self._check_asked(prompts, frames)
        if isinstance(first_frame, str | Path | Image.Image):
            height, width = _sides(options.get("size") or self.size_of(frames))
            first_frame = torch.from_numpy(to_signal(first_frame, size=(height, width)))
        if not isinstance(first_frame, Tensor):
            raise InputError(
                f"first_frame must be a tensor `3 h w` in [-1, 1], a picture or a path, not a"
                f" {type(first_frame).__name__}."
            )
        first = first_frame[None] if first_frame.ndim == 3 else first_frame
        size = options["size"] = _sides(first.shape[-2:] if options.get("size") is None else options["size"])
        if tuple(first.shape) not in ((1, 3, *size), (len(prompts), 3, *size)):
            raise InputError(
                f"the first frame has shape {tuple(first_frame.shape)}, but the videos asked for are "
                f"{len(prompts)} of size {size}: give `3 h w` or `b 3 h w` of that size."
            )
        known = first.new_zeros(len(prompts), 3, frames, *size)
        known[:, :, 0] = first
        mask = torch.zeros(len(prompts), frames, dtype=torch.bool)
        mask[:, 0] = True
        options = sora_given.GOING_ON | options
        return self.generate(prompts, frames=frames, known=known, known_mask=mask, **options)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str] | Tensor,
        *,
        frames: int = 1,
        seed: int | Sequence[int] = 0,
        size: tuple[int, int] | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        start: float = 1.0,
        pace: float = 1.0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str = "euler",
        negative: str | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        cache: float = 0.0,
        together: bool | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Prompts -> `b 3 f h w` in [-1, 1]. One interface for every task:

        text alone          nothing is known
        first frame given   `known b 3 f h w` holds it, `known_mask b f` is True there; so for any other frames
        a region given      `known_mask b f h w` is True at its pixels
        video to video      `known` whole, `known_mask` all False, `start` < 1: from its corruption to that time

        What is known comes back unchanged. What is made of these values, such as `extend`, is in systems/sora_given.py.
        `pace` is the time between frames: 2 shows the same motion in half the frames. Item i has the seed `seed + i`.
        `together` draws the items in one batch, which is quicker and rounds otherwise; on a CPU they are drawn one by
        one unless it is True, so that a seed gives the same bytes whatever the batch. Guidance leads away from no text,
        or from the text `negative`, at times within `interval`; a share `rescale` of the contrast that it adds is taken
        back (samplers/guidance.py). With `cache` above 0 the deep blocks are computed only after features have changed
        so much in all, such as 0.15 (nn/cache.py). Raises InputError for sizes that are no multiple of the patch,
        unknown samplers, and an empty list of prompts.
        """
        frames, size, seeds, known_mask = self._check(
            prompts, frames, size, seed, known, known_mask, sampler, start, steps, guidance, pace
        )
        self._check_guided(negative, interval, rescale)
        check_threshold(cache)
        pace = float(pace)
        points = Flow(shift=self.config.shift).points(
            self.config.steps if steps is None else int(steps), start=start
        )
        low, high = map(float, interval)
        weight = self.config.guidance if guidance is None else float(guidance)
        alone = self.backbone.null_context.device.type == "cpu" if together is None else not together
        batches = [slice(i, i + 1) for i in range(len(prompts))] if alone else [slice(0, len(prompts))]

        def told(number: int) -> Callable[[int, int], None] | None:
            """The progress of batch `number` as that of all."""
            if progress is None:
                return None
            return lambda done, total: progress(number * total + done, len(batches) * total)

        drawn = [
            self._draw(
                prompts[some], frames, size, seeds[some], known if known is None else known[some], known_mask[some],
                points=points, pace=pace, negative=negative, sampler=SAMPLERS[sampler], progress=told(number),
                guidance=weight, interval=(low, high), rescale=float(rescale), cache=float(cache),
            )
            for number, some in enumerate(batches)
        ]  # fmt: skip
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def _draw(
        self,
        prompts: Sequence[str] | Tensor,
        frames: int,
        size: tuple[int, int],
        seeds: Sequence[int],
        known: Tensor | None,
        known_mask: Tensor,
        *,
        points: Sequence[Point],
        pace: float,
        negative: str | None,
        sampler: Callable[..., Tensor],
        guidance: float,
        interval: tuple[float, float],
        rescale: float,
        cache: float,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """One batch of `generate`."""
        device = self.backbone.null_context.device
        asked, pixels = known, known_mask.to(device)
        if self.codec is not None:  # fill the last latent frame; what is too much is cut off at the end
            known_mask = self._fill(known_mask, 1, frames)
            known = None if known is None else self._fill(known, 2, frames)
            if known is not None and points[0].t == 1:
                known = _covered(known, known_mask.to(known.device))
        shape = self.latent_shape(frames, size)
        noise = torch.stack([torch.randn(shape, generator=rng.generator(s, "noise")) for s in seeds]).to(
            device
        )
        given = torch.zeros_like(noise) if known is None else self.encode(known.to(noise))
        mask = known_mask.to(device)
        if self.codec is not None:
            mask = self.codec.latent_mask(mask)
        whole = self._whole(mask)  # the patches that enter clean
        wide, clean = _wide(mask), self.within(whole)
        if negative is None:
            text = self.read(prompts)
            everywhere = torch.ones(len(prompts), dtype=torch.bool, device=device)
            none = self.backbone.without_text(*text, everywhere)
            both = tuple(torch.cat(pair) for pair in zip(text, none, strict=True))
            if guidance == 0 and not rescale and interval[0] <= 0 and interval[1] >= points[0].t:
                both, guidance = none, 1.0  # no words count, at any time: half the work
        else:
            both = self.read(torch.cat(list(map(self._tokens, (prompts, [negative] * len(prompts))))))

        predict = self.predictor(
            both, given=given, whole=whole, known=wide, pace=pace, cache=Cache(cache) if cache else None
        )
        x = gaussian.corrupt(given, noise, points[0]) if points[0].t < 1 else noise
        partly = wide & ~clean
        x = torch.where(partly, gaussian.corrupt(given, noise, points[0]), torch.where(clean, given, x))
        led = guided(predict, guidance, interval=interval, rescale=rescale)
        x = sampler(
            lambda x, point: torch.where(wide, given, led(x, point)),  # what is known is not rescaled
            x,
            points,
            generator=[rng.generator(s, "sampling") for s in seeds],
            progress=progress,
        )
        if not x.isfinite().all():
            raise InputError(f"guidance {guidance:g} is more than numbers can hold: ask for less, such as 4.")
        drawn = self.decode(torch.where(wide, given, x))[:, :, :frames]
        return drawn if asked is None else torch.where(_wide(pixels), asked.to(drawn).clamp(-1, 1), drawn)

    def predictor(
        self,
        text: tuple[Tensor, ...],
        *,
        given: Tensor,
        whole: Tensor,
        known: Tensor | None = None,
        pace: Any = 1.0,
        cache: Cache | None = None,
    ) -> Callable[[Tensor, Point], Tensor]:
        """`predict(x, point)`, x0 of `x`: the items of `given b c f h w`, once, or as often as `text` has them.

        `whole`, `b f` or `b f h w` on the grid of patches, says what of `given` enters clean, with time 0; `known`,
        broadcast over the latents, what comes back as it is given: what is whole, if not said. A patch of which only a
        part is known is corrupted as all others are, its known part with the rest.
        """

        def predict(x: Tensor, point: Point) -> Tensor:
            copies = len(x) // len(given)
            given2, whole2 = (torch.cat([part] * copies) for part in (given, whole))
            clean2 = self.within(whole2)
            wide2 = clean2 if known is None else torch.cat([known] * copies)
            x = torch.where(clean2, given2, x)
            t = point.t * (~whole2).float()
            out = self.backbone(x, t, *(part[: len(x)] for part in text), pace=pace, cache=cache)
            velocity = self._velocity(out, x, point.t * (~clean2).float())
            return torch.where(wide2, given2, x - point.t * velocity)

        return predict

    def _whole(self, mask: Tensor) -> Tensor:
        """Known places `b f` or `b f h w` of the latents -> the patches of which all is known, on their grid."""
        frames, side = self.config.backbone.patch
        if mask.ndim == 2:
            together = rearrange(mask, "b (f p) -> b f p", p=frames).all(-1)
            return together.repeat_interleave(frames, 1)  # the backbone takes a time for each frame
        blocks = rearrange(mask, "b (f p) (h q) (w r) -> b f h w (p q r)", p=frames, q=side, r=side)
        return blocks.all(-1)

    def within(self, whole: Tensor) -> Tensor:
        """Frames `b f` or patches on their grid `b f h w` -> `b 1 f h w` of the latents, or what broadcasts to it."""
        if whole.ndim == 2:
            return _wide(whole)
        frames, side = self.config.backbone.patch
        grown = whole.repeat_interleave(frames, 1).repeat_interleave(side, 2).repeat_interleave(side, 3)
        return _wide(grown)

    def _fill(self, tensor: Tensor, dim: int, frames: int) -> Tensor:
        """Repeat the last frame up to a whole number of latent frames."""
        assert self.codec is not None
        last = tensor.narrow(dim, frames - 1, 1)
        return torch.cat([tensor, *[last] * (self.codec.whole(frames) - frames)], dim=dim)

    def _check_asked(self, prompts: Any, frames: Any) -> int:
        """What every drawing needs: prompts, and a number of frames, which is returned as an int."""
        some = hasattr(prompts, "__len__") and len(prompts) > 0 and not isinstance(prompts, str)
        if not some or not (isinstance(prompts, Tensor) or all(isinstance(text, str) for text in prompts)):
            raise InputError(f"prompts must be a list of one string or more, but is {prompts!r:.60}.")
        together = self.config.backbone.patch[0] if self.codec is None else 1
        if not _whole(frames) or frames < 1 or frames % together:
            least = "1 or more" if together == 1 else f"a multiple of {together}"
            raise InputError(f"{frames!r:.60} frames cannot be drawn: give {least}.")
        return int(frames)

    @staticmethod
    def _check_guided(negative: Any, interval: Any, rescale: Any) -> None:
        if negative is not None and not isinstance(negative, str):
            raise InputError(f"negative must be one string, but is {negative!r:.60}.")
        check_options(interval, rescale)

    def _check(self, prompts, frames, size, seed, known, known_mask, sampler, start, steps, guidance, pace):
        frames = self._check_asked(prompts, frames)
        size = _sides(self.size_of(frames) if size is None else size)
        stride = self.unit
        if len(size) != 2 or any(side < stride or side % stride for side in size):
            raise InputError(f"size {size} cannot be drawn: height and width must be multiples of {stride}.")
        if sampler not in tuple(SAMPLERS):
            raise InputError(f"there is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
        if not _finite(pace) or pace <= 0:
            raise InputError(f"pace {pace!r:.60} cannot be kept: give a number above 0, such as 1.")
        if not _finite(start) or not 0 < start <= 1 or (start < 1 and known is None):
            raise InputError(
                f"start {start!r:.60} must be above 0 and at most 1, and below 1 it needs a known video."
            )
        if steps is not None and (not _whole(steps) or steps < 1):
            raise InputError(f"{steps!r:.60} steps cannot be taken: give a whole number, 1 or more.")
        if guidance is not None and not _finite(guidance):
            raise InputError(f"guidance {guidance!r:.60} cannot be followed: give a finite number.")
        seeds = [seed + i for i in range(len(prompts))] if _whole(seed) else seed
        if not isinstance(seeds, Iterable) or not all(_whole(one) for one in seeds):
            raise InputError(f"seed {seed!r:.60} is no whole number: give one, or a list with one each.")
        seeds = [int(one) for one in seeds]
        if len(seeds) != len(prompts):
            raise InputError(
                f"{len(seeds)} seeds were given for {len(prompts)} prompts: give one seed, or one each."
            )
        if known is None and known_mask is not None:
            raise InputError("known_mask was given without known: give the frames as well.")
        if known is not None and known_mask is None and start == 1:
            raise InputError("known would change nothing: give known_mask, or a start below 1.")
        if known_mask is None:
            known_mask = torch.zeros(len(prompts), frames, dtype=torch.bool)
        for name, tensor, shape in (
            ("known", known, (len(prompts), 3, frames, *size)),
            ("known_mask", known_mask, (len(prompts), frames, *size)[: 4 if _of_pixels(known_mask) else 2]),
        ):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise InputError(
                    f"{name} must be a tensor, but is a {type(tensor).__name__}: torch.as_tensor makes one."
                )
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(f"{name} has shape {tuple(tensor.shape)}, but must have {shape}.")
        if known is not None and not known.is_floating_point():
            raise InputError(f"known must be float in [-1, 1], but is {known.dtype}.")
        if known is not None and not known.isfinite().all():
            raise InputError("known holds NaN or infinity: give frames in [-1, 1].")
        if known is not None and (furthest := known.abs().max().item()) > sora_given.FAR:
            raise InputError(f"known reaches {furthest:.4g}: give frames in [-1, 1], such as x / 127.5 - 1.")
        if known_mask.dtype != torch.bool:
            raise InputError(
                f"known_mask must be bool, True where a frame or pixel is known, but is {known_mask.dtype}."
            )
        return frames, size, seeds, known_mask


def _wide(mask: Tensor) -> Tensor:
    """`b f` or `b f h w` -> what broadcasts to `b c f h w`."""
    return rearrange(mask, "b f -> b 1 f 1 1" if mask.ndim == 2 else "b f h w -> b 1 f h w")


def _of_pixels(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4


def _covered(known: Tensor, mask: Tensor) -> Tensor:
    """What a codec may see of a video `b 3 f h w`: unknown pixels grey, unknown frames like the nearest known one."""
    seen = torch.where(_wide(mask), known, 0.0)
    there = mask if mask.ndim == 2 else mask.flatten(2).any(-1)
    places = torch.arange(there.shape[1], device=known.device)
    far = (rearrange(places, "f -> f 1") - places).abs() + len(places) * rearrange(~there, "b f -> b 1 f")
    nearest = far.argmin(-1)
    return torch.stack([video[:, frames] for video, frames in zip(seen, nearest, strict=True)])


def _sides(size: Any) -> tuple[int, ...]:
    if _finite(size):
        raise InputError(f"size must be (height, width), but is {size}: write ({size}, {size}).")
    if not isinstance(size, Iterable) or not all(_whole(side) for side in size):
        raise InputError(f"size must be (height, width) in whole pixels, but is {size!r:.60}.")
    return tuple(int(side) for side in size)


def _finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number, of Python's or of numpy's, and neither NaN nor infinite."""
    return isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value))


def _whole(value: Any) -> TypeGuard[int]:
    return _finite(value) and value % 1 == 0
