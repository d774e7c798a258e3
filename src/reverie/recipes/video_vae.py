"""Training the small video autoencoder (codecs/video_vae.py) that `sora-stickers --codec FOLDER` can use.

    stickers   pictures and 5-frame clips together               reverie train video-vae-stickers DIR
    encode     the latents of a folder, kept beside it           reverie data encode FOLDER --codec CODEC

The shipped weights do without: docs/log.md says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

import reverie
from reverie import rng
from reverie.codecs.video_vae import VideoVae, VideoVaeConfig
from reverie.data.augment import on_white
from reverie.data.embeddings import TYPES
from reverie.data.index import Index
from reverie.data.latents import Encoder, Latents, encode_folder
from reverie.data.pixels import Pixels
from reverie.data.preparing import Pool
from reverie.data.remote import local
from reverie.errors import InputError
from reverie.media import Part
from reverie.pictures import grid, to_bytes
from reverie.recipes.parts import (
    CLIP_FRAMES,
    averaged,
    decoded,
    digest,
    keep,
    my_share,
    name_bad,
    open_index,
    plain_stickers,
)
from reverie.recipes.search import everywhere, key_of, media_of, searched, seen, the_same
from reverie.train.ema import Ema
from reverie.train.engine import ENGINE, Engine, home
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.schedule import cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeRun:
    """What a run depends on; it stands in the run folder's config.json."""

    model: VideoVaeConfig
    steps: int
    batch: int  # pictures of a step
    clips: int  # clips of a step
    clip_frames: int = 5
    size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.995
    seed: int = 0
    data: tuple[str, ...] = ()  # digests of the pictures and the clips that it learns from


def stickers(
    data: Path,
    out: Path,
    *,
    steps: int = 1000,
    batch: int = 16,
    clips: int = 2,
    seed: int = 0,
    engine: Engine = ENGINE,
) -> VideoVae:
    """Fluent's 3-D stickers and their animations.

    Args:
        data: The folder that `reverie data stickers` filled.
        out: The run's folder; the model is written to its `model`.
        steps: How many batches to learn from.
        batch: Pictures of a step.
        clips: Clips of a step, beside the pictures.
        seed: Another seed, another start and another order.
    """
    index = plain_stickers(open_index(data)).select(sources=("fluent-3d", "fluent-anim"))
    config = VaeRun(model=VideoVaeConfig(), steps=steps, batch=batch, clips=clips, seed=seed)
    return fit(config, index, out, engine=engine)


def fit(config: VaeRun, index: Index, out: Path, *, engine: Engine = ENGINE) -> VideoVae:
    """Train from random weights, report PSNR on the held-out pictures, save the averaged weights to `out/model`."""
    torch.manual_seed(rng.integer(config.seed, "weights"))
    model = engine.place(VideoVae(config.model))
    player = Player(
        model,
        optimizer=adamw(model, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.95)),
        schedule=partial(cosine, steps=config.steps, warmup=config.warmup, floor=0.02),
        ema=Ema(model, decay=config.ema),
        clip=1.0,
    )
    pictures = decoded(index.select(split="train", video=False), size=config.size)
    moving = decoded(index.select(split="train", video=True), size=config.size, frames=CLIP_FRAMES)
    held = decoded(index.select(split="val", video=False), size=config.size)
    val = torch.stack([_signal(held, i, slice(0, 1)) for i in held.good[:64]]).to(engine.home)

    def batches(step: int, micro: int) -> dict[str, Tensor]:
        source, count, frames = (
            (moving, config.clips, config.clip_frames) if micro else (pictures, config.batch, 1)
        )
        kind = "clip" if micro else "picture"
        shape = model.latent_shape(frames, (config.size, config.size))
        videos, noises = [], []
        for epoch, place in my_share(step, count, len(source.good), config.seed):
            i = source.good[place]
            u = torch.rand((), generator=rng.generator(config.seed, "window", epoch, i)).item()
            first = int(u * (source.counts[i] - frames + 1))
            videos.append(_signal(source, i, slice(first, first + frames)))
            noises.append(torch.randn(shape, generator=rng.generator(config.seed, "noise", kind, epoch, i)))
        return {"video": torch.stack(videos), "noise": torch.stack(noises)}

    sources = (pictures, moving)
    told = tuple(digest(source.index, source.good) for source in sources)
    run = Run(out, dataclasses.replace(config, data=told))
    for step in train([player], batches, run=run, steps=config.steps, accumulate=2, seed=config.seed,
                      save_every=max(config.steps // 4, 1), keep=1, prefetch=2, **engine.loop):  # fmt: skip
        if step.number == 1:
            name_bad(run, *sources)
        if step.every(20):
            run.log(step.number, step.metrics)
        if step.every(max(config.steps // 8, 1)):
            with averaged(player) as whole:
                drawn = whole.draw(whole.posterior(val)[0]).clamp(-1, 1)
                error = ((drawn - val) / 2).square().mean(dim=(1, 2, 3, 4))
                run.log(step.number, {"val_psnr": float(-10 * error.log10().mean())})
                pairs = torch.stack([val[:8, :, 0], drawn[:8, :, 0]], dim=1)
                grid(to_bytes(rearrange(pairs, "b two c h w -> (b two) c h w"))).save(
                    run.sample_path(step.number)
                )
            run.curves()
    with averaged(player) as whole:
        some = torch.stack([_signal(pictures, i, slice(0, 1)) for i in pictures.good[:512]])
        _normalise(whole, some.to(engine.home))
        keep(whole, out / "model")
    return reverie.load(out / "model")


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

    InputError: no autoencoder of video there, or a size or number of frames that it cannot encode.
    """
    if dtype not in TYPES:
        raise InputError(f"dtype is {dtype!r}: choose one of {', '.join(TYPES)}.")
    model = _codec(codec, "cpu" if pool is not None else device)
    time, space = model.config.stride
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
    return _encoder(the_same(_codec(codec, device), codec, key), media_of(seen(folder)), size, frames, dtype)


def _encoder(
    model: VideoVae, media: Callable[[str], Path | Part], size: tuple[int, int], frames: int, dtype: str
) -> Encoder:
    place = model.mean.device
    return Encoder(
        media=media, encode=lambda video: model.encode(video.to(place)), stride=model.config.stride[0],
        size=size, frames=frames, dtype=dtype,
    )  # fmt: skip


def _codec(folder: str | Path, device: str | None) -> VideoVae:
    model = reverie.load(folder)
    if not isinstance(model, VideoVae):
        raise InputError(
            f"{folder} is a {type(model).__name__}: give the folder of a video autoencoder, such as "
            "`reverie train video-vae-stickers` makes."
        )
    return model.to(home(device))


def _signal(pixels: Pixels, i: int, window: slice) -> Tensor:
    return rearrange(on_white(pixels[i][window]), "f c h w -> c f h w")


def _normalise(model: VideoVae, videos: Tensor) -> None:
    """Set the constants that make the latents of `videos` zero mean and unit variance per channel."""
    raw = torch.cat([model.posterior(part)[0] for part in videos.split(64)])
    model.mean.copy_(raw.mean(dim=(0, 2, 3, 4)))
    model.std.copy_(raw.std(dim=(0, 2, 3, 4)))
