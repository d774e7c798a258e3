"""What Sora makes of given frames: every task of its report as values of `generate` (systems/sora.py), its methods.

    extend     the last frames known, the next ones drawn; the first ones known, those before them drawn
    loop       the last and the first frames known, what leads from one to the other drawn
    connect    the last frames of one clip and the first of another known, what lies between drawn
    edit       nothing known, all begins from the given clip corrupted to the time `strength` (SDEdit, 2108.01073)
    inpaint    all known but a region of space or a stretch of time
    stream     clips of any length, of which no more than a window is held

Clips and pictures are `b 3 f h w` in [-1, 1], a picture one frame; `3 f h w` is taken for every prompt, and so are open
pictures and the paths of pictures and clips, which are cropped to `size`, or to the size that the model learnt. What
is longer than the model was trained at is drawn in windows of so many frames (`window`), each of which knows what was
drawn before it in `overlap` frames or more. Window i of an item of seed s has the seed (s, "window", i), the first one
s itself; backward (s, "backward", i). Other options are those of `generate`; what goes on from frames (extend, loop,
connect) has guidance 1 unless another is given, since more leads away from the frames, towards the words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from reverie import rng
from reverie.errors import InputError
from reverie.media import decode_array, flatten, probe
from reverie.pictures import to_signal

if TYPE_CHECKING:
    from reverie.systems.sora import Sora

Progress = Callable[[int, int], None]
Clip = Tensor | str | Path | Image.Image

GOING_ON = {"guidance": 1.0}
FAR = 2.0  # what a signal in [-1, 1] may reach by rounding and resizing, and no scale of 0 to 255


def extend(
    sora: Sora, clip: Clip, prompts: Sequence[str], *, forward: int = 0, backward: int = 0, **options: Any
) -> Tensor:
    """The clip with `forward` frames after it and `backward` frames before it; a picture is a clip of one frame."""
    options = GOING_ON | options
    clip = _clip(sora, clip, prompts, options, moving=True)
    if min(_count(forward, "forward"), _count(backward, "backward")) < 0 or forward + backward < 1:
        raise InputError(
            f"{forward} frames forward and {backward} backward extend nothing: give a number above 0 for one of them."
        )
    frames, progress = clip.shape[2], options.pop("progress", None)
    size, overlap = _window(sora, options.get("window"), options.get("overlap"))
    after = windows([False] * frames + [True] * forward, size, overlap)
    before = windows([True] * backward + [False] * (frames + forward), size, overlap, backward=True)
    total = len(after) + len(before)
    if forward:
        known = torch.arange(frames + forward).repeat(len(prompts), 1) < frames
        told = _share(progress, 0, total, of=len(after))
        clip = _fill(sora, prompts, torch.cat([clip, _blank(clip, forward)], 2), known, told=told, **options)
    if backward:
        known = torch.arange(backward + frames + forward).repeat(len(prompts), 1) >= backward
        told = _share(progress, len(after), total, of=len(before))
        whole = torch.cat([_blank(clip, backward), clip], 2)
        clip = _fill(sora, prompts, whole, known, backward=True, told=told, **options)
    return clip


def loop(
    sora: Sora, clip: Clip, prompts: Sequence[str], *, between: int | None = None, **options: Any
) -> Tensor:
    """The clip, and after it `between` frames that lead from its end to its beginning, so that it can go round.

    As many as leave `overlap` frames of either end in one window if `between` is not given.
    """
    clip = _clip(sora, clip, prompts, options, moving=True)
    if clip.shape[2] < 2:
        raise InputError(
            "a clip of 1 frame has no two ends that a loop could join: extend it first, or give a clip."
        )
    return torch.cat([clip, _between(sora, clip, clip, prompts, between, 1.0, GOING_ON | options)], dim=2)


def connect(
    sora: Sora,
    first: Clip,
    second: Clip,
    prompts: Sequence[str],
    *,
    between: int | None = None,
    start: float = 0.7,
    **options: Any,
) -> Tensor:
    """The first clip, `between` frames that lead over, and the second clip.

    What lies between begins from a cross-fade of the last frame and the first one, corrupted to the time `start`; 1 is
    noise alone.
    """
    size = options.get("size")
    first = _clip(sora, first, prompts, options, moving=True)
    like = tuple(first.shape[3:]) if size is None and not isinstance(second, Tensor) else size
    second = _clip(sora, second, prompts, {"size": like}, moving=True)
    if first.shape[3:] != second.shape[3:]:
        sizes = " and ".join(f"{clip.shape[3]} x {clip.shape[4]}" for clip in (first, second))
        raise InputError(f"clips of {sizes} pixels cannot be connected: give both at one size.")
    drawn = _between(sora, first, second, prompts, between, start, GOING_ON | options)
    return torch.cat([first, drawn, second], dim=2)


def edit(sora: Sora, clip: Clip, prompts: Sequence[str], *, strength: float = 0.6, **options: Any) -> Tensor:
    """The clip drawn again by the prompt: the larger `strength`, from 0 to 1, the less of the clip is left.

    A small draft, enlarged to the size that is wanted, becomes a large picture so.
    """
    _check_strength(strength)
    clip = _clip(sora, clip, prompts, options)
    known = torch.zeros(len(prompts), clip.shape[2], dtype=torch.bool)
    return _fill(sora, prompts, clip, known, start=strength, told=options.pop("progress", None), **options)


def inpaint(
    sora: Sora,
    clip: Clip,
    prompts: Sequence[str],
    *,
    region: Tensor,
    strength: float = 1.0,
    **options: Any,
) -> Tensor:
    """The clip with `region` drawn anew: bool, True there, `f` frames, `h w` pixels, `f h w` or `b f h w`.

    Below 1, `strength` lets the region begin from what it shows now, corrupted to that time.
    """
    _check_strength(strength)
    clip = _clip(sora, clip, prompts, options)
    b, _, f, h, w = clip.shape
    shapes = [(), (f,), (h, w), (f, h, w), (b, f, h, w)]
    if not isinstance(region, Tensor) or region.dtype != torch.bool or tuple(region.shape) not in shapes[1:]:
        raise InputError(
            f"region is {_what(region)}: give a bool tensor `{f}` (frames), `{h} {w}` (pixels) or `{f} {h} {w}`, True"
            " where to draw."
        )
    if not region.any():
        raise InputError(
            "region is False everywhere, so there is nothing to draw: mark what is to be drawn anew."
        )
    region = region.expand(b, f, h, w) if region.ndim > 1 else region.expand(b, f)
    return _fill(
        sora, prompts, clip, ~region.cpu(), start=strength, told=options.pop("progress", None), **options
    )


def stream(
    sora: Sora,
    prompts: Sequence[str],
    *,
    frames: int,
    given: Clip | None = None,
    window: int | None = None,
    overlap: int | None = None,
    seed: int | Sequence[int] = 0,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """`frames` new frames, piece by piece `b 3 f h w`, after the clip `given` or from the words alone.

    The first piece without `given` is what `generate` draws. No more than a window is held, whatever is asked for.
    """
    if _count(frames, "frames") < 1:
        raise InputError(f"{frames} frames cannot be drawn: give 1 or more.")
    window, overlap = _window(sora, window, overlap)
    seeds = _seeds(seed, len(prompts))
    if given is not None:
        options = GOING_ON | options
        given = _clip(sora, given, prompts, {"size": size}, moving=True)
    held = None if given is None else given[:, :, -window:]
    pieces = _pieces(frames, window, overlap, first=held is None)
    for number, count in enumerate(pieces):
        told = _share(progress, number, len(pieces))
        own = _of_window(seeds, number)
        if held is None:
            whole = _multiple(sora, count)
            piece = sora.generate(prompts, frames=whole, seed=own, size=size, progress=told, **options)
            held = piece = piece[:, :, :count]
        else:
            before = held[:, :, count - window :]
            known = torch.arange(before.shape[2] + count).repeat(len(prompts), 1) < before.shape[2]
            video = torch.cat([before, _blank(before, count)], dim=2)
            held = _fill(sora, prompts, video, known, seed=own, window=window, told=told, **options)
            piece = held[:, :, -count:]
        yield piece


# What they share ---------------------------------------------------------------------------------------------------


def _between(
    sora: Sora, first: Tensor, second: Tensor, prompts: Sequence[str], between: int | None, start: float,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The frames that lead from the end of one clip to the beginning of another."""
    window, overlap = _window(sora, options.get("window"), options.get("overlap"))
    count = max(window - 2 * overlap, 1) if between is None else _count(between, "between")
    if count < 1:
        raise InputError(f"{count} frames between lead nowhere: give 1 or more.")
    head, tail = first[:, :, -window:], second[:, :, :window]
    weight = torch.linspace(0, 1, count + 2)[1:-1].to(head).reshape(1, 1, -1, 1, 1)
    fade = torch.lerp(head[:, :, -1:], tail[:, :, :1], weight)
    before = head.shape[2]
    known = torch.ones(len(prompts), before + count + tail.shape[2], dtype=torch.bool)
    known[:, before : before + count] = False
    options = dict(options)
    told = options.pop("progress", None)
    video = torch.cat([head, fade, tail], dim=2)
    drawn = _fill(sora, prompts, video, known, start=start, told=told, **options)
    return drawn[:, :, before : before + count]


def _fill(
    sora: Sora,
    prompts: Sequence[str],
    video: Tensor,
    known: Tensor,
    *,
    start: float = 1.0,
    window: int | None = None,
    overlap: int | None = None,
    seed: int | Sequence[int] = 0,
    backward: bool = False,
    told: Progress | None = None,
    **options: Any,
) -> Tensor:
    """`video` with what is not `known` (`b f` or `b f h w`) drawn, window by window; each knows those before it."""
    window, overlap = _window(sora, window, overlap)
    seeds = _seeds(seed, len(prompts))
    frames = video.shape[2]
    if extra := _multiple(sora, frames) - frames if frames < window else 0:
        video = torch.cat([video, *[video[:, :, -1:]] * extra], dim=2)
        known = torch.cat([known, *[known[:, -1:]] * extra], dim=1)
    video, known = video.clone(), known.clone()
    unknown = (~known).flatten(2).any(-1).any(0) if known.ndim == 4 else (~known).any(0)
    plan = windows(unknown.tolist(), window, overlap, backward=backward)
    for number, (begin, end) in enumerate(plan):
        part = slice(begin, end)
        video[:, :, part] = sora.generate(
            prompts, frames=end - begin, known=video[:, :, part], known_mask=known[:, part], start=start,
            seed=_of_window(seeds, number, backward), size=(video.shape[3], video.shape[4]),
            progress=_share(told, number, len(plan)), **options,
        ).to(video)  # fmt: skip
        known[:, part] = True
    return video[:, :, :frames]


def windows(
    unknown: Sequence[bool], size: int, overlap: int, *, backward: bool = False
) -> list[tuple[int, int]]:
    """(begin, end) of windows of `size` frames that cover what is unknown in their order, from the end if `backward`.

    A stretch that fits is put in the middle of its window, so that it sees what comes before and after. A longer one is
    drawn from its beginning on, at least `overlap` frames before it in sight, until the rest fits.
    """
    n = len(unknown)
    if backward:
        return [(n - end, n - begin) for begin, end in windows(unknown[::-1], size, overlap)]
    plan: list[tuple[int, int]] = []
    at = 0
    while (at := next((i for i in range(at, n) if unknown[i]), n)) < n:
        run = next((i for i in range(at, n) if not unknown[i]), n) - at
        begin = max(min(at - max((size - run) // 2, overlap), n - size), 0)
        plan.append((begin, min(begin + size, n)))
        at = begin + size
    return plan


def _pieces(frames: int, window: int, overlap: int, *, first: bool) -> list[int]:
    """How many new frames each window gives: the first one all of it, if nothing was given."""
    pieces = [min(frames, window)] if first else []
    while (left := frames - sum(pieces)) > 0:
        pieces.append(min(left, window - overlap))
    return pieces


def _window(sora: Sora, window: int | None, overlap: int | None) -> tuple[int, int]:
    """As asked, or as many frames as the model was trained at and a quarter of them."""
    size = _multiple(sora, sora.config.frames) if window is None else _count(window, "window")
    if size < 2 or size != _multiple(sora, size):
        least = _multiple(sora, max(size, 2))
        raise InputError(
            f"a window of {size} frames cannot be drawn: give {f'{least} or more' if size < 2 else least}."
        )
    shared = max(size // 4, 1) if overlap is None else _count(overlap, "overlap")
    if not 1 <= shared < size:
        raise InputError(
            f"windows of {size} frames cannot share {shared}: give an overlap from 1 to {size - 1}."
        )
    return size, shared


def _multiple(sora: Sora, frames: int) -> int:
    """The least number of frames, at least so many, that patches fill."""
    together = sora.config.backbone.patch[0] if sora.codec is None else 1
    return -(-frames // together) * together


def _clip(
    sora: Sora, clip: Any, prompts: Sequence[str], options: dict[str, Any], *, moving: bool = False
) -> Tensor:
    """`b 3 f h w` for so many prompts; `size` is taken out of the options. InputError: it is none, or not of that size.

    moving: it becomes a part of a clip.
    """
    count = len(prompts) if hasattr(prompts, "__len__") and not isinstance(prompts, str) else 0
    if not count:
        raise InputError(f"prompts must be a list of one string or more, but is {prompts!r:.60}.")
    if taken := [name for name in ("frames", "known", "known_mask") if options.get(name) is not None]:
        raise InputError(f"{taken[0]} follows from the clip here: leave {taken[0]} out.")
    size = _size(options.pop("size", None))
    if isinstance(clip, str | Path | Image.Image):
        clip = _opened(sora, clip, size, moving=moving)
    if not isinstance(clip, Tensor) or clip.ndim not in (3, 4, 5) or not clip.is_floating_point():
        raise InputError(
            f"a clip must be float `b 3 f h w` or `3 f h w` in [-1, 1], a path or a picture, but is {_what(clip)}."
        )
    given = _what(clip)
    if clip.ndim == 3:
        clip = rearrange(clip, "c h w -> c 1 h w")
    elif clip.ndim == 4 and clip.shape[0] != 3 and clip.shape[1] == 3:
        raise InputError(
            f"a clip of {given} looks like pictures `b 3 h w`: give clips of one frame, pictures[:, :, None]."
        )
    clip = clip if clip.ndim == 5 else repeat(clip, "c f h w -> b c f h w", b=count)
    clip = repeat(clip, "1 c f h w -> b c f h w", b=count) if len(clip) == 1 else clip
    if len(clip) != count or clip.shape[1] != 3 or not clip.numel():
        many = f"{count} prompt{'s' * (count != 1)}"
        raise InputError(f"a clip of {given} does not fit {many}: give `b 3 f h w` or `3 f h w`.")
    if size is not None and size != (own := tuple(clip.shape[3:])):
        raise InputError(
            f"size is {size[0]} {size[1]}, but the clip is {own[0]} x {own[1]}: leave size out, or resize the clip."
        )
    if not (reach := clip.abs().max().item()) <= FAR:  # NaN neither
        raise InputError(f"the clip reaches {reach:.4g}: give frames in [-1, 1], such as x / 127.5 - 1.")
    return clip


def _opened(
    sora: Sora, clip: str | Path | Image.Image, size: tuple[int, int] | None, *, moving: bool
) -> Tensor:
    """A file, or a picture that is open, as `3 f h w`."""
    if isinstance(clip, Image.Image):
        signal = to_signal(clip, size=size or sora.size_of(2 if moving else 1))
        return rearrange(torch.from_numpy(signal), "c h w -> c 1 h w")
    if size is None:
        size = sora.size_of(2 if moving or probe(clip).frames > 1 else 1)
    pixels = torch.from_numpy(flatten(decode_array(clip, size=size)))
    return rearrange(pixels.float() / 127.5 - 1, "f h w c -> c f h w")


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(s, Integral) and int(s) > 0 for s in size)
    ):
        raise InputError(f"size must be (height, width) in whole pixels, but is {size!r:.60}.")
    return int(size[0]), int(size[1])


def _what(value: Any) -> str:
    """What was given, in a few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if hasattr(value, "__array__") and hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)} and no tensor (torch.from_numpy makes one)"
    return f"{value!r:.60}"


def _check_strength(strength: Any) -> None:
    if not isinstance(strength, Real) or not math.isfinite(strength) or not 0 < float(strength) <= 1:
        raise InputError(f"strength is {strength!r:.60}: give a number above 0 and at most 1.")


def _blank(like: Tensor, count: int) -> Tensor:
    b, c, _, h, w = like.shape
    return like.new_zeros(b, c, count, h, w)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One for each item, as `generate` numbers them, which refuses what is no seed."""
    if isinstance(seed, Sequence):
        return list(seed)
    if not isinstance(seed, Integral):
        raise InputError(f"seed {seed!r:.60} is no whole number: give one, or a list with one each.")
    return [int(seed) + i for i in range(count)]


def _of_window(seeds: Sequence[int], number: int, backward: bool = False) -> list[int]:
    if backward:
        return [rng.integer(seed, "backward", number) for seed in seeds]
    return [rng.integer(seed, "window", number) if number else seed for seed in seeds]


def _share(progress: Progress | None, number: int, total: int, *, of: int = 1) -> Progress | None:
    """The progress of `of` parts, from `number` on, as that of all of them."""
    if progress is None:
        return None
    return lambda done, steps: progress(number * steps // of + done, total * steps // of)


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} is {value!r:.60}: give a whole number of frames.")
    return value
