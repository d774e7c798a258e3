"""Training autoencoders of pictures and clips (codecs/video_vae.py), and keeping the latents of folders.

    stickers   Fluent's 3-D stickers and their animations            reverie train video-vae-stickers DIR
    world      the procedural world                                  reverie train video-vae-world FOLDER
    encode     the latents of a folder, kept beside it               reverie data encode FOLDER --codec CODEC

A step has a batch of pictures and one of clips of as many frames as the step draws. The loss is L1 and L2, a
perceptual one on the layers of a CLIP, and a small KL; later, if asked for, a discriminator plays against the codec
(2112.10752, appendix G): it learns to tell frames and motions that were drawn from real ones. docs/codecs.md has what
was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import reverie
from reverie import rng
from reverie.backbones.discriminator import Discriminator, DiscriminatorConfig
from reverie.codecs.by_frame import ByFrame
from reverie.codecs.video_vae import VideoVae, VideoVaeConfig
from reverie.data.augment import on_white
from reverie.data.embeddings import TYPES
from reverie.data.index import Index
from reverie.data.latents import Encoder, Latents, encode_folder
from reverie.data.preparing import Pool
from reverie.data.remote import local
from reverie.errors import InputError
from reverie.evals.reconstruction import psnr, ssim
from reverie.media import Part
from reverie.objectives.adversarial import adaptive_weight, discriminator_hinge, generator_hinge
from reverie.objectives.perceptual import Features, perceptual, tiled
from reverie.pictures import grid, to_bytes
from reverie.recipes.parts import (
    averaged,
    decoded,
    digest,
    keep,
    load_clip,
    load_codec,
    my_share,
    name_bad,
    open_index,
    open_world,
    plain_stickers,
)
from reverie.recipes.search import everywhere, key_of, media_of, searched, seen, the_same
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.schedule import cosine

KEPT_FRAMES = 33  # of a whole clip, evenly; a batch sees some of them, neighbours or every other one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What the codec pays for, and how dearly."""

    l1: float = 0.5
    l2: float = 2.0  # brings small things on flat ground, whose median is the ground, long before L1 does
    perceptual: float = 0.1
    kl: float = 1e-5
    adversarial: float = 0.0  # of what pulls at the last layer as hard as all before; 0: no discriminator
    perceptual_every: int = (
        1  # at every so many steps, and then so many times as much (2006.06676, appendix B)
    )
    adversarial_every: int = 1  # the discriminator plays, and the codec against it, at every so many steps
    adversarial_from: int = 0  # the first step of it

    def plays(self, step: int) -> bool:
        """Whether the discriminator plays at `step`, counted from 0: of every so many steps at the last one."""
        turn = (step + 1) % self.adversarial_every == 0
        return bool(self.adversarial) and step >= self.adversarial_from and turn

    def looks(self, step: int) -> bool:
        """Whether the perceptual loss counts at `step`."""
        return bool(self.perceptual) and (step + 1) % self.perceptual_every == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: VideoVaeConfig
    weights: Weights = Weights()
    clip: str = ""  # whose layers the perceptual loss compares
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    start: str = ""  # the codec whose weights were taken over
    steps: int
    batch: int  # pictures of a step
    clips: int  # clips of a step
    frames: int = 17  # of a clip, at most
    size: int = 64
    lr: float = 1e-3
    judge_lr: float = 2e-4
    warmup: int = 50
    ema: float = 0.995
    seed: int = 0
    data: tuple[str, ...] = ()  # digests of the pictures and the clips that it learns from


def stickers(
    data: Path, out: Path, *, stride: str = "4x8x8", channels: int = 16, width: int = 24, steps: int = 4000,
    batch: int = 8, clips: int = 1, frames: int = 9, size: int = 64, lr: float = 1e-3, clip: str = "clip-stickers",
    l1: float = 0.5, l2: float = 2.0, perceptual: float = 0.1, kl: float = 1e-5, adversarial: float = 0.0,
    adversarial_from: int = 0, perceptual_every: int = 2, adversarial_every: int = 1, start: str = "", seed: int = 0,
    engine: Engine = ENGINE,
) -> VideoVae:  # fmt: skip
    """Fluent's 3-D stickers and their animations, without skin-tone variants.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        stride: Frames, rows and columns that a latent stands for: 4x8x8, 1x8x8 or 4x4x4.
        channels: Numbers of a latent.
        width: Channels of the network where it is widest in space, an even number.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        clips: Clips of a step, beside the pictures; 0 for none.
        frames: The most frames of a clip; each step draws a number up to it.
        size: Pixels a side, a multiple of the stride.
        lr: The highest learning rate.
        clip: The CLIP whose layers the perceptual loss compares: a shipped name or a folder.
        l1: Weight of the absolute difference of pixels.
        l2: Weight of the squared difference, which finds small things sooner.
        perceptual: Weight of the perceptual loss; 0 for none.
        kl: Weight of the divergence of latents from a normal distribution.
        adversarial: Weight of the discriminator, such as 0.5; 0 for none.
        adversarial_from: The first step of the discriminator, counted from 0.
        perceptual_every: The perceptual loss at every so many steps, then so many times as heavy.
        adversarial_every: The discriminator at every so many steps.
        start: The folder of a codec to go on from, which then also says its shape; random weights if not given.
        seed: Another seed, another start and another order.
    """
    index = plain_stickers(open_index(data)).select(sources=("fluent-3d", "fluent-anim"))
    weights = Weights(
        l1=l1, l2=l2, perceptual=perceptual, kl=kl, adversarial=adversarial, adversarial_from=adversarial_from,
        perceptual_every=perceptual_every, adversarial_every=adversarial_every,
    )  # fmt: skip
    config = VaeRun(
        model=shape(stride, channels=channels, width=width, start=start), weights=weights,
        clip=clip if perceptual else "", start=start, steps=steps, batch=batch, clips=clips, frames=frames, size=size,
        lr=lr, seed=seed,
    )  # fmt: skip
    return fit(config, index, out, engine=engine)


def world(
    data: Path, out: Path, *, count: int = 4000, moving: int = 500, stride: str = "4x8x8", channels: int = 16,
    width: int = 16, steps: int = 3000, batch: int = 8, clips: int = 1, frames: int = 9, size: int = 64,
    lr: float = 1e-3, clip: str = "clip-stickers", l1: float = 0.5, l2: float = 2.0, perceptual: float = 0.1,
    kl: float = 1e-5, adversarial: float = 0.0, adversarial_from: int = 0, perceptual_every: int = 2,
    adversarial_every: int = 1, start: str = "", seed: int = 0, engine: Engine = ENGINE,
) -> VideoVae:  # fmt: skip
    """The procedural world, which is drawn first if it is not there.

    Args:
        data: A folder of the world, or a new one for it.
        out: The run's folder; the model is written to its `model`.
        count: Pictures of the world, if it is to be drawn.
        moving: Clips of the world, if it is to be drawn.
        stride: Frames, rows and columns that a latent stands for: 4x8x8, 1x8x8 or 4x4x4.
        channels: Numbers of a latent.
        width: Channels of the network where it is widest in space, an even number.
        steps: How many batches to learn from.
        batch: Pictures of a step; more take longer and need more memory.
        clips: Clips of a step, beside the pictures; 0 for none.
        frames: The most frames of a clip; each step draws a number up to it.
        size: Pixels a side, a multiple of the stride.
        lr: The highest learning rate.
        clip: The CLIP whose layers the perceptual loss compares: a shipped name or a folder.
        l1: Weight of the absolute difference of pixels.
        l2: Weight of the squared difference, which finds small things sooner.
        perceptual: Weight of the perceptual loss; 0 for none.
        kl: Weight of the divergence of latents from a normal distribution.
        adversarial: Weight of the discriminator, such as 0.5; 0 for none.
        adversarial_from: The first step of the discriminator, counted from 0.
        perceptual_every: The perceptual loss at every so many steps, then so many times as heavy.
        adversarial_every: The discriminator at every so many steps.
        start: The folder of a codec to go on from, which then also says its shape; random weights if not given.
        seed: Another seed, another world, another start and another order.
    """
    index = open_world(data, count, moving, seed=seed, frames=KEPT_FRAMES)
    weights = Weights(
        l1=l1, l2=l2, perceptual=perceptual, kl=kl, adversarial=adversarial, adversarial_from=adversarial_from,
        perceptual_every=perceptual_every, adversarial_every=adversarial_every,
    )  # fmt: skip
    config = VaeRun(
        model=shape(stride, channels=channels, width=width, start=start), weights=weights,
        clip=clip if perceptual else "", start=start, steps=steps, batch=batch, clips=clips, frames=frames, size=size,
        lr=lr, seed=seed,
    )  # fmt: skip
    return fit(config, index, out, engine=engine)


SHAPES: dict[str, dict[str, Any]] = {
    "4x8x8": {"temporal": (True, True), "patch": 2},
    "1x8x8": {"temporal": (False, False), "patch": 2},
    "4x4x4": {"temporal": (True, True), "patch": 1},
}


def shape(stride: str, *, channels: int, width: int, start: str = "") -> VideoVaeConfig:
    """A small codec of that stride, or the shape of the codec in the folder `start`. InputError: there is none."""
    if start:
        return _begun(start).config
    if stride not in SHAPES:
        raise InputError(f"stride is {stride!r}: choose one of {', '.join(SHAPES)}.")
    return VideoVaeConfig(channels=channels, widths=(width, 2 * width, 4 * width), **SHAPES[stride])


def fit(config: VaeRun, index: Index, out: Path, *, engine: Engine = ENGINE) -> VideoVae:
    """Train, measure held-out pictures and clips and draw them on the way, save the averaged weights to `out/model`."""
    _refuse(config)
    if config.weights.adversarial and engine.shard:
        raise InputError(
            "shard and adversarial do not go together: the discriminator is weighed at the decoder's last weight, "
            "which would lie in parts. Leave --shard out: every process then holds the model."
        )
    torch.manual_seed(rng.integer(config.seed, "weights"))
    model = VideoVae(config.model)
    if config.start:
        model.load_state_dict(_begun(config.start).state_dict())
    model = engine.place(model)
    judge = engine.place(Discriminator(config.discriminator)) if config.weights.adversarial else None
    game = Game(config.weights, model, judge, features=_features(config, engine.home))
    schedule = partial(cosine, steps=config.steps, warmup=config.warmup, floor=0.02)
    players = [
        Player(
            model,
            optimizer=adamw(model, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.95)),
            schedule=schedule,
            ema=Ema(model, decay=config.ema),
            clip=1.0,
            loss=game.codec_loss,
        )
    ]
    if judge is not None:
        players.append(
            Player(
                judge,
                optimizer=adamw(judge, lr=config.judge_lr, weight_decay=0.0, betas=(0.5, 0.9)),
                schedule=schedule,
                clip=1.0,
                loss=game.judge_loss,
                name="discriminator",
                plays=config.weights.plays,
            )
        )
    sources = [Source(index.select(split="train", video=False), config, model, frames=1)]
    if config.clips:
        moving = index.select(split="train", video=True)
        if not len(moving):
            raise InputError(f"{index.folder} has no clips to train on: give --clips 0 for pictures alone.")
        sources.append(Source(moving, config, model, frames=KEPT_FRAMES))
    held = [
        Source(some, config, model, frames=source.kept).evenly(count, frames)
        for source, count, frames in zip(sources, (64, 16), (1, config.frames), strict=False)
        if len(some := index.select(split="val", video=source.kept > 1))
    ]

    def batches(step: int, micro: int) -> dict[str, Any]:
        return sources[micro].batch(step, config.clips if micro else config.batch)

    told = tuple(digest(source.pixels.index, source.pixels.good) for source in sources)
    run = Run(out, dataclasses.replace(config, data=told))
    for step in train(players, batches, run=run, steps=config.steps, accumulate=len(sources), seed=config.seed,
                      save_every=max(config.steps // 12, 1), keep=1, prefetch=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, *(source.pixels for source in sources))
        if step.every(20):
            run.log(step.number, step.metrics)
        if held and step.every(max(config.steps // 12, 1)):
            with averaged(players[0]) as whole:
                drawn = [_reconstructed(whole, videos) for videos in held]
            run.log(step.number, _measured(drawn, held))
            grid(to_bytes(_sheet(drawn, held)), columns=8).save(run.sample_path(step.number))
            run.curves()
    with averaged(players[0]) as whole:
        _normalise(whole, [source.evenly(256 if source.kept == 1 else 64, source.most) for source in sources])
        keep(whole, out / "model")
    return reverie.load(out / "model")


def _refuse(config: VaeRun) -> None:
    time, space = config.model.stride
    if config.size < space or config.size % space:
        raise InputError(f"size {config.size} cannot be encoded: give a multiple of {space}.")
    if config.batch < 1 or config.clips < 0:
        raise InputError(
            f"batch is {config.batch} and clips {config.clips}: a step needs a picture or more, and 0 clips or more."
        )
    if config.clips and not 2 <= 1 + time <= config.frames <= KEPT_FRAMES:
        raise InputError(
            f"frames is {config.frames}: clips of this codec have from {1 + time} to {KEPT_FRAMES} frames."
        )
    for name, value in dataclasses.asdict(config.weights).items():
        least = 1 if name.endswith("_every") else 0
        if value < least:
            raise InputError(f"{name} is {value}: give {least} or more.")


def _features(config: VaeRun, place: torch.device) -> Features | None:
    if not config.weights.perceptual:
        return None
    clip = load_clip(config.clip).to(place)
    return tiled(clip.layers, clip.config.image.size)


# ---------------------------------------------------------------- the losses


class Game:
    """The loss of the codec, and of the discriminator that plays against it, if there is one.

    A batch has `video b 3 f h w`, `noise` like its latents, and `step`, which says what counts this time.
    """

    def __init__(
        self, weights: Weights, codec: VideoVae, judge: Discriminator | None, *, features: Features | None
    ):
        self.weights, self.codec, self.judge, self.features = weights, codec, judge, features

    def codec_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """L1, L2, perceptual, KL, and what the discriminator holds against it, weighed at the decoder's last layer."""
        weights, step, video = self.weights, batch["step"], batch["video"]
        drawn, mean, log_variance = self._drawn(batch)
        l1 = F.l1_loss(drawn, video)
        found = {"l1": l1, "l2": F.mse_loss(drawn, video)}
        main = weights.l1 * l1 + weights.l2 * found["l2"]
        if self.features is not None and weights.looks(step):
            found["perceptual"] = perceptual(drawn, video, self.features)
            main = main + weights.perceptual_every * weights.perceptual * found["perceptual"]
        found["kl"] = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = main + weights.kl * found["kl"]
        if self.judge is not None and weights.plays(step):
            found["fooled"] = torch.stack([generator_hinge(logits) for logits in self.judge(drawn)]).mean()
            found["adaptive"] = adaptive_weight(main, found["fooled"], last_weight(self.codec.decoder))
            loss = loss + weights.adversarial * found["adaptive"] * found["fooled"]
        return {"loss": loss} | {name: value.detach() for name, value in found.items()}

    def judge_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The hinge between the videos and what the codec draws of them by now; `told` is how often it is right."""
        assert self.judge is not None
        with torch.no_grad():
            drawn = self._drawn(batch)[0]
        pairs = list(zip(self.judge(batch["video"]), self.judge(drawn), strict=True))
        loss = torch.stack([discriminator_hinge(*pair) for pair in pairs]).mean()
        told = torch.stack(
            [((real > 0).float().mean() + (fake < 0).float().mean()) / 2 for real, fake in pairs]
        )
        return {"loss": loss, "told": told.mean()}

    def _drawn(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.codec.posterior(batch["video"])
        return self.codec.draw(mean + batch["noise"] * (0.5 * log_variance).exp()), mean, log_variance


def last_weight(decoder: nn.Module) -> nn.Parameter:
    """The weight that a module applies last, by the order in which it names them."""
    return [p for p in decoder.parameters() if p.ndim > 1][-1]


# ---------------------------------------------------------------- batches


class Source:
    """Batches of pictures (`kept` is 1) or clips. Draws are keyed by (seed, purpose, epoch, item) or by the step."""

    def __init__(self, index: Index, config: VaeRun, model: VideoVae, *, frames: int):
        self.config, self.model, self.kept = config, model, frames
        self.pixels = decoded(index, size=config.size, frames=frames)
        if not self.pixels.good:
            raise InputError(f"nothing usable in {index.folder}: run `reverie data check` to see why.")
        self.most = config.frames if frames > 1 else 1
        self.lengths = [n for n in range(2, self.most + 1) if n == model.whole(n)] or [1]

    def batch(self, step: int, count: int) -> dict[str, Any]:
        """`video b 3 f h w` with as many frames as the step draws, neighbours or every other one."""
        seed, kind = self.config.seed, "clip" if self.kept > 1 else "picture"
        u = torch.rand(2, generator=rng.generator(seed, "frames", step))
        frames = self.lengths[int(u[0] * len(self.lengths))]
        pace = 2 if u[1] < 0.5 and 2 * (frames - 1) < self.kept else 1
        span = pace * (frames - 1) + 1
        shape = self.model.latent_shape(frames, (self.config.size, self.config.size))
        videos, noises, names = [], [], []
        for epoch, place in my_share(step, count, len(self.pixels.good), seed):
            i = self.pixels.good[place]
            v = torch.rand((), generator=rng.generator(seed, "window", epoch, i)).item()
            first = int(v * (self.kept - span + 1))
            videos.append(self._video(i, slice(first, first + span, pace)))
            noises.append(torch.randn(shape, generator=rng.generator(seed, "noise", kind, epoch, i)))
            names.append(self.pixels.index[i].file_name)
        return {"video": torch.stack(videos), "noise": torch.stack(noises), "step": step, "ids": names}

    def evenly(self, count: int, frames: int) -> Tensor:
        """At most `count` items, spread over all, with their frames spread over the whole clip: `n 3 f h w`."""
        good = self.pixels.good
        some = [good[i * len(good) // min(count, len(good))] for i in range(min(count, len(good)))]
        places = torch.linspace(0, self.kept - 1, self.model.whole(frames)).round().long()
        return torch.stack([self._video(i, places) for i in some])

    def _video(self, i: int, which: slice | Tensor) -> Tensor:
        """`which` frames of `self.kept`; a shorter clip repeats frames."""
        frames = self.pixels[i]
        places = torch.linspace(0, len(frames) - 1, self.kept).round().long()[which]
        return rearrange(on_white(frames[places]), "f c h w -> c f h w")


# ---------------------------------------------------------------- what is measured and shown


def _reconstructed(model: VideoVae, videos: Tensor) -> Tensor:
    place = model.mean.device
    parts = [model.decode(model.encode(some.to(place))).cpu() for some in videos.split(8)]
    return torch.cat(parts).clamp(-1, 1)


def _measured(drawn: list[Tensor], held: list[Tensor]) -> dict[str, float]:
    found: dict[str, float] = {}
    for a, b in zip(drawn, held, strict=True):
        kind = "val" if b.shape[2] == 1 else "val_clip"
        found[f"{kind}_psnr"] = psnr(a, b).mean().item()
        if min(b.shape[-2:]) >= 11:
            found[f"{kind}_ssim"] = ssim(a, b).mean().item()
    return found


def _sheet(drawn: list[Tensor], held: list[Tensor]) -> Tensor:
    """Rows of eight: originals, what came back; of pictures eight, of clips the frames of two."""
    rows = []
    for a, b in zip(drawn, held, strict=True):
        if b.shape[2] == 1:
            pairs = [(b[:8, :, 0], a[:8, :, 0])]
        else:
            places = torch.linspace(0, b.shape[2] - 1, 8).round().long()
            pairs = [
                (
                    rearrange(true[:, places], "c f h w -> f c h w"),
                    rearrange(back[:, places], "c f h w -> f c h w"),
                )
                for true, back in zip(b[:2], a[:2], strict=True)
            ]
        for pair in pairs:
            for row in pair:
                rows.append(torch.cat([row, row.new_ones(8 - len(row), *row.shape[1:])]))
    return torch.cat(rows)


def encode(
    folder: Path,
    *,
    codec: str | Path,
    size: int = 64,
    frames: int = 1,
    dtype: str = "float32",
    pool: Pool | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Latents:
    """Encode every picture and clip of a folder that is not marked, and keep the latents there.

    InputError: no autoencoder there, or a size or number of frames that it cannot encode.
    """
    if dtype not in TYPES:
        raise InputError(f"dtype is {dtype!r}: choose one of {', '.join(TYPES)}.")
    model = load_codec(codec, device="cpu" if pool is not None else device)
    time, space = model.stride
    if size < space or size % space:
        raise InputError(f"size {size} cannot be encoded: give a multiple of {space}.")
    if frames < 1 or frames != model.whole(frames):
        raise InputError(
            f"{frames} frames do not fill latent frames: give 1 and some times {time}, such as "
            f"{model.whole(max(frames, 2))}."
        )
    folder = local(folder)
    index, names = searched(folder)
    if not names:
        raise InputError(f"{folder} holds no pictures or clips to encode.")
    key, about = key_of(model), ((size, size), frames, dtype)
    if pool is None:
        start = partial(_encoder, model, media_of(folder, index), *about)
    else:
        start = partial(encoder, everywhere(codec), everywhere(folder), key, *about, device)
    return encode_folder(
        folder,
        names,
        index=index,
        key=key,
        start=start,
        size=about[0],
        frames=frames,
        dtype=dtype,
        pool=pool,
        quiet=quiet,
    )


def encoder(
    codec: str, folder: str, key: str, size: tuple[int, int], frames: int, dtype: str, device: str | None
) -> Encoder:
    """A worker's own codec, which must be what `key` says. InputError: it is another, or the folder is not there."""
    return _encoder(
        the_same(load_codec(codec, device=device), codec, key), media_of(seen(folder)), size, frames, dtype
    )


def _encoder(
    model: VideoVae | ByFrame,
    media: Callable[[str], Path | Part],
    size: tuple[int, int],
    frames: int,
    dtype: str,
) -> Encoder:
    place = next(model.parameters()).device
    return Encoder(
        media=media, encode=lambda video: model.encode(video.to(place)), stride=model.stride[0],
        size=size, frames=frames, dtype=dtype,
    )  # fmt: skip


def _begun(folder: str) -> VideoVae:
    """The codec to go on from. InputError: it is none of videos."""
    model = load_codec(folder, device="cpu")
    if not isinstance(model, VideoVae):
        raise InputError(
            f"{folder} is a codec of pictures: give the folder of a video autoencoder to start from."
        )
    return model


def _normalise(model: VideoVae, kinds: list[Tensor]) -> None:
    """Set the constants that make latents zero mean and unit variance per channel, where each kind counts equally."""
    place, first, second = model.mean.device, [], []
    for videos in kinds:
        raw = torch.cat([model.posterior(part.to(place))[0].double() for part in videos.split(8)])
        first.append(raw.mean(dim=(0, 2, 3, 4)))
        second.append(raw.square().mean(dim=(0, 2, 3, 4)))
    mean = torch.stack(first).mean(0)
    model.mean.copy_(mean)
    model.std.copy_((torch.stack(second).mean(0) - mean.square()).sqrt().clamp(min=1e-6))
