"""What the recipes share: opening data, where to run, the averaged weights, and what a run says of its files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reverie
from reverie.codecs.by_frame import ByFrame
from reverie.codecs.vae import Vae
from reverie.codecs.video_vae import VideoVae
from reverie.data.embeddings import media_below
from reverie.data.importers import import_folder
from reverie.data.index import FILE, Index, Item
from reverie.data.latents import Latents
from reverie.data.order import batch_ids
from reverie.data.pixels import Pixels, cache_of
from reverie.data.remote import address, local
from reverie.data.streaming import Streamed
from reverie.data.wording import DROPPED, lacking
from reverie.data.world import write as write_world
from reverie.errors import InputError
from reverie.output import Made
from reverie.systems.clip import Clip
from reverie.train.engine import home
from reverie.train.log import Run
from reverie.train.loop import Player
from reverie.train.parallel import team, whole
from reverie.weights.store import hash_of

CLIP_FRAMES = 16  # of the whole clip; a batch sees some of them


# ---------------------------------------------------------------- data


def open_index(data: Path) -> Index:
    """The index of a folder, imported first if it has none, or of an address.

    Files that came after the import are told of.
    """
    with team().in_turn():
        data = local(data)
        index = Index.read(data) if (data / FILE).exists() else import_folder(data)
    known = {item.file_name for item in index}
    if team().first and (new := [name for name in media_below(data) if name not in known]):
        print(
            f"{len(new):,} files, such as {new[0]}, are not in the index of {data} and are left out: run `reverie data"
            f" import {data}` to take them in.",
            file=sys.stderr,
        )
    return index


def tell_lacking(items: Iterable[Item], mix: Mapping[str, float]) -> None:
    """Says how many have no caption of the kinds that a mix tells."""
    if mix and team().first and (count := lacking(items, mix)):
        kinds = ", ".join(kind for kind in mix if kind != DROPPED)
        print(
            f"{count:,} files have no caption of the mix ({kinds}) and are told by what they have",
            file=sys.stderr,
        )


def open_world(
    data: Path,
    count: int,
    moving: int,
    hidden: int = 0,
    *,
    seed: int,
    frames: int = CLIP_FRAMES,
    size: int = 64,
    exact: bool = False,
) -> Index:
    """The procedural world in `data`: `count` pictures, `moving` clips of `frames`, `hidden` clips with a wall.

    What is not there is drawn first, `size` pixels a side. InputError, with `exact`: what is there has another number
    of frames or another size; before anything is drawn.
    """
    if where := address(data):
        raise InputError(
            f"The world is drawn into a folder and read from there, not from {where}: name a folder."
        )
    every = (
        ("pictures", count, 1, "image"),
        ("clips", moving, frames, "video"),
        ("hidden", hidden, frames, "occlusion"),
    )
    kinds = [one for one in every if one[1]]
    for name, _, length, _ in kinds if exact else ():
        for item in Index.read(data / name) if (Path(data) / name / FILE).exists() else ():
            has, asked = (item.frames, item.width, item.height), (length, size, size)
            if has != asked:
                raise InputError(
                    f"{data / name} holds {_shown(*has)}, but {_shown(*asked)} were asked for: ask for what is there"
                    " (--frames, --size), or name a new folder."
                )
    parts = []
    for name, number, length, kind in kinds:
        with team().in_turn():
            there = (Path(data) / name / FILE).exists()
            part = (
                Index.read(data / name)
                if there
                else write_world(data / name, number, frames=length, kind=kind, seed=seed, size=(size, size))
            )
        parts += [
            dataclasses.replace(
                item, file_name=f"{name}/{item.file_name}", shard=item.shard and f"{name}/{item.shard}"
            )
            for item in part
        ]
    return Index(data, parts)


def _shown(frames: int, width: int, height: int) -> str:
    return ("pictures" if frames == 1 else f"clips of {frames} frames") + f" of {width} x {height} pixels"


def decoded(index: Index, **how: Any) -> Pixels:
    """The pixels of an index (`Pixels` says `how`), kept beside it; of several processes, the first one decodes."""
    with team().in_turn():
        return Pixels(index, cache=cache_of(index), **how)


def my_share(step: int, batch: int, n: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, sample) of each place of the batch `step` that this process has, of `batch` in all and `n` samples."""
    return batch_ids(step, batch, n, seed, rank=team().rank, world=team().count)


def at_most(batch: int, there: int) -> int:
    """`batch`, or all that there are, which is said."""
    if batch > there and team().first:
        print(
            f"batch: there are {there:,} pictures, so a batch has {there:,} and not {batch:,}",
            file=sys.stderr,
        )
    return min(batch, there)


def digest(index: Index, good: Sequence[int]) -> str:
    """What a run learns from: the contents, in their order. A run goes on with the same alone."""
    contents = "\n".join(index[i].hash for i in good)
    return hashlib.blake2b(contents.encode(), digest_size=8).hexdigest()


def captioned(index: Index) -> Index:
    """The items that have a caption."""
    return Index(index.folder, [item for item in index if item.captions])


def plain_stickers(index: Index) -> Index:
    """The sticker corpus without skin-tone variants."""
    items = [item for item in index.select() if not item.scores.get("skin_tone")]
    return Index(index.folder, items)


def name_bad(run: Run, *sources: Pixels | Streamed | Latents) -> None:
    """The files that no batch can draw, into bad_samples.jsonl as of step 0, and how many to who watches."""
    bad = [entry for pixels in sources for entry in pixels.bad]
    run.bad(0, bad)
    if bad:
        run.say(
            f"{len(bad)} files cannot be used and are left out: {run.folder / 'bad_samples.jsonl'} says why"
        )


# ---------------------------------------------------------------- systems


def capable(
    name_or_folder: str | Path,
    capability: str,
    *,
    device: str | None = None,
    precision: str = "fp32",
    quantise: str | None = None,
) -> Any:
    """A loaded system that has the method `capability`, on `home(device)`, its weights kept as the two last say.

    InputError: it has not, or there is no such system or device.
    """
    place = home(device)
    if precision not in ("fp32", "bf16"):
        raise InputError(f"precision is {precision!r:.40}: choose fp32 or bf16.")
    dtype = torch.bfloat16 if precision == "bf16" else None
    system = reverie.load(name_or_folder, dtype=dtype, quantise=quantise)
    if not hasattr(system, capability):
        raise InputError(
            f"{name_or_folder} is a {type(system).__name__}, which cannot {capability.replace('_', ' ')}."
        )
    return system.to(place)


def check_embeds(system: Any) -> None:
    """InputError: it does not make one vector of a picture, as CLIP and BLIP do; a BLIP-2 makes one for each query."""
    if not hasattr(system, "prepare"):
        raise InputError(
            f"a {type(system).__name__} does not make one vector of a picture to be kept and compared: give a CLIP or"
            " a BLIP."
        )


def what_made(
    system: Any, model: str | Path, *, task: str = "sample", **asked: Any
) -> Callable[[str, int], Made]:
    """`made(prompt, seed)` for `reverie.output`, of what a system draws when it is asked so; hashed once, at the first.

    asked: what the caller was asked for, by the names that `generate` has; None is the model's own. A path becomes the
    name of its file.
    """
    config = system.config
    own = getattr(config, "sampler", None) or getattr(getattr(config, "sampling", None), "sampler", None)
    if own is None and hasattr(system, "generate"):
        default = inspect.signature(system.generate).parameters["sampler"].default
        own = default if isinstance(default, str) else None
    asked = {key: value for key, value in asked.items() if value is not None}
    asked = {key: value.name if isinstance(value, Path) else value for key, value in asked.items()}
    settings = {
        "steps": asked.pop("steps", getattr(config, "steps", None)),
        "guidance": asked.pop("guidance", getattr(config, "guidance", None)),
        "sampler": asked.pop("sampler", own),
        "asked": {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()},
    }
    name = Path(model).resolve().name if Path(model).exists() else str(model)
    weights = cache(lambda: hash_of(system))

    def made(prompt: str, seed: int) -> Made:
        return Made(prompt=prompt, seed=seed, model=name, weights=weights(), task=task, **settings)

    return made


def load_clip(name_or_folder: str, *, trainable: bool = False) -> Clip:
    """A CLIP that can read words, on the CPU. InputError: it cannot, or there is none."""
    clip = reverie.load(name_or_folder, trainable=trainable)
    if not isinstance(clip, Clip) or clip.tokenizer is None:
        raise InputError(
            f"{name_or_folder} is no CLIP with a tokenizer: give one that reverie.save wrote, or clip-stickers."
        )
    return clip


def load_codec(name_or_folder: str | Path, *, device: str | None = None) -> VideoVae | ByFrame:
    """A codec of videos, a codec of pictures frame by frame, on `home(device)`. InputError: it is neither, or none."""
    model = reverie.load(name_or_folder)
    if isinstance(model, Vae):
        model = ByFrame(model)
    if not isinstance(model, VideoVae | ByFrame):
        raise InputError(
            f"{name_or_folder} is a {type(model).__name__}: give the folder of an autoencoder, such as `reverie train "
            "video-vae-stickers` makes."
        )
    return model.to(home(device)).eval()


@contextlib.contextmanager
def averaged(player: Player) -> Iterator[Any]:
    """The model, whole, with the averaged weights if there are any, in eval mode, without gradients."""
    player.model.eval()  # until the loop's next step
    average = contextlib.nullcontext() if player.ema is None else player.ema.applied(player.model)
    with torch.no_grad(), average:
        yield whole(player.model)


def keep(system: nn.Module, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """What a run ends with: of several processes, all call it and the first one saves."""
    with team().in_turn():
        if team().first:
            reverie.save(system, folder, dtype=dtype)


def seldom(steps: int, times: int) -> int:
    """After how many steps to measure, for about so many `times` in a run; where that were every step, four at most."""
    return steps // times if steps >= 2 * times else max(-(-steps // 4), 1)


def heads_of(width: int) -> int:
    """Heads of 64 channels. InputError: a width that they do not fill."""
    if width < 64 or width % 64:
        raise InputError(f"width {width} is not made of heads of 64 channels: give a multiple of 64.")
    return width // 64
