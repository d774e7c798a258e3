"""Pictures and clips of one's own in, clips out: the work behind `reverie animate`, `extend`, `loop` and the rest.

A file is read at the shape that it has and the number of pixels that the model learnt at, its sides rounded to whole
patches, which is said; its frames are taken as they are. If no words are given, those count that made the file
(`reverie.output`); without any the model goes by the frames alone. The tasks themselves are in systems/sora_given.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from reverie.errors import InputError
from reverie.media import Probe, decode_array, flatten, probe
from reverie.output import check_folder, check_format, check_words, next_number, read, store
from reverie.progress import counting, say
from reverie.recipes.asked import Ask
from reverie.recipes.parts import capable, what_made
from reverie.systems.sora import SAMPLERS, Sora
from reverie.systems.sora_given import GOING_ON


def animate(picture: Path, prompt: str = "", *, frames: int | None = None, ask: Ask) -> Path:
    """A clip of `frames` that begins with a picture (of a clip, with its first frame)."""
    if frames is not None and frames < 2:
        raise InputError(f"a clip of {frames} frames does not move: ask for 2 or more.")
    task = _Task("animate", picture, prompt, ask=ask, moving=True)
    if task.found.frames > 1:
        say(
            f"{picture.name} is a clip: its first frame begins the new one; `reverie extend` goes on from all of it."
        )
    count = task.sora.config.frames if frames is None else frames
    first = task.read(picture, most=1)
    return task.draw(lambda **how: task.sora.extend(first, forward=count - 1, **how), frames=count)


def extend(clip: Path, prompt: str = "", *, forward: int = 0, backward: int = 0, ask: Ask) -> Path:
    """The clip with frames after it, and before it."""
    if forward < 0 or backward < 0 or not forward + backward:
        raise InputError(
            f"forward is {forward} and backward {backward}: say how many frames to add, such as --forward 16."
        )
    task = _Task("extend", clip, prompt, ask=ask, moving=True)
    given = task.read(clip)
    return task.draw(
        lambda **how: task.sora.extend(given, forward=forward, backward=backward, **how),
        forward=forward,
        backward=backward,
    )


def loop(clip: Path, prompt: str = "", *, between: int | None = None, ask: Ask) -> Path:
    """The clip and the frames that lead from its end to its beginning."""
    _check_between(between)
    task = _Task("loop", clip, prompt, ask=ask, moving=True)
    if task.frames < 2:
        raise InputError(f"{clip.name} has {task.frames} frame, but 2 or more are needed.")
    given = task.read(clip)
    return task.draw(lambda **how: task.sora.loop(given, between=between, **how), between=between)


def connect(
    first: Path,
    second: Path,
    prompt: str = "",
    *,
    between: int | None = None,
    start: float = 0.7,
    ask: Ask,
) -> Path:
    """The first clip, the frames that lead over, and the second clip, which takes the size of the first."""
    _check_between(between)
    _check_share("start", start)
    task = _Task("connect", first, prompt, ask=ask, moving=True, also=(second,))
    one, other = task.read(first), task.read(second)
    return task.draw(
        lambda **how: task.sora.connect(one, other, between=between, start=start, **how),
        second=second,
        between=between,
        start=start,
    )


def edit(file: Path, prompt: str = "", *, strength: float = 0.6, ask: Ask) -> Path:
    """A picture or clip drawn again by the words; with a larger size, what a draft shows in large."""
    _check_share("strength", strength)
    task = _Task("edit", file, prompt, ask=ask)
    if not task.prompt:
        raise InputError(
            f'say in words what {file.name} shall show, such as "a red rocket": no prompt is written in the file.'
        )
    given = task.read(file)
    return task.draw(lambda **how: task.sora.edit(given, strength=strength, **how), strength=strength)


def inpaint(
    file: Path,
    prompt: str = "",
    *,
    box: tuple[int, ...] = (),
    mask: Path | None = None,
    frames: tuple[int, int] | None = None,
    strength: float = 1.0,
    ask: Ask,
) -> Path:
    """A box (left, top, right, bottom in the file's pixels), the white of a mask picture, some frames, or both anew."""
    _check_share("strength", strength)
    if not box and mask is None and frames is None:
        raise InputError(
            "say what to draw anew: --box LEFT TOP RIGHT BOTTOM, --mask a picture that is white there, or --frames"
            " FIRST LAST."
        )
    if box and mask is not None:
        raise InputError("a box and a mask say both where to draw: give one of them.")
    task = _Task("inpaint", file, prompt, ask=ask)
    count = task.frames
    if frames is not None and not 0 <= frames[0] <= frames[1] < count:
        has = f"the frames 0 to {count - 1}" if count > 1 else "the frame 0 alone"
        raise InputError(f"{file.name} has {has}, so {frames[0]} to {frames[1]} cannot be drawn anew.")
    if box:
        _check_box(box, task.found)
    clear = mask is not None and _check_mask(mask, task.found)
    given = task.read(file)
    region = torch.ones(count, *task.size, dtype=torch.bool)
    if box:
        region &= torch.from_numpy(_box(box, task.found, task.size))
    if mask is not None:
        region &= torch.from_numpy(_values(mask, clear=clear, size=task.size) > 127)
    if frames is not None:
        region[: frames[0]] = region[frames[1] + 1 :] = False
    chosen = region if box or mask is not None else region[:, 0, 0]
    if not chosen.any():
        raise InputError("what is to be drawn anew lies outside of what is seen: choose another place.")
    return task.draw(
        lambda **how: task.sora.inpaint(given, region=chosen, strength=strength, **how),
        box=box or None,
        mask=mask,
        frames=frames,
        strength=strength,
    )


def long_clip(
    sora: Sora, prompts: list[str], *, frames: int, first_frame: Tensor | None = None, **options: Any
) -> Iterator[Tensor]:
    """A clip of any length window by window, `b 3 f h w`; `first_frame b 3 h w` begins it."""
    given = None
    if first_frame is not None:
        given = rearrange(first_frame, "b c h w -> b c 1 h w")
        yield given
    yield from sora.stream(prompts, frames=frames - (given is not None), given=given, **options)


def smaller(size: tuple[int, int], unit: int) -> tuple[int, int]:
    """The size of a draft: three quarters as high and wide, about half the patches."""
    return _rounded(size[0] * 0.75, unit), _rounded(size[1] * 0.75, unit)


def fitted(height: int, width: int, like: tuple[int, int], unit: int) -> tuple[int, int]:
    """The shape of `height` by `width` with about as many pixels as `like`, in whole patches of `unit` pixels.

    Of all such shapes the one that is nearest in aspect first, and half as much in area. What is narrower than a patch
    becomes one wide, and so much shorter.
    """
    scale = math.sqrt(like[0] * like[1] / (height * width))
    most = max(like[0] * like[1] // unit**2, 1)
    if min(height, width) * scale < unit:
        return min(_rounded(height * scale, unit), most * unit), min(
            _rounded(width * scale, unit), most * unit
        )
    shapes = [(high, wide) for high in range(1, 2 * most + 1) for wide in range(1, 2 * most // high + 1)]
    off = [
        abs(math.log(high * width / (wide * height))) + abs(math.log(high * wide / most)) / 2
        for high, wide in shapes
    ]
    high, wide = shapes[off.index(min(off))]
    return high * unit, wide * unit


class _Task:
    """What is asked of a file. The model is loaded when it is first needed, after all checks that are cheap."""

    def __init__(
        self,
        name: str,
        file: Path,
        prompt: str,
        *,
        ask: Ask,
        moving: bool = False,
        also: tuple[Path, ...] = (),
    ):
        _check_ask(ask)
        self.name, self.ask, self.file, self.found, self.moving = name, ask, file, _probe(file), moving
        if ask.format is not None:
            check_format(ask.format, 2 if moving else self.frames, ask.fps or self.pace or 1)
        for other in also:
            _probe(other)
        self.prompt = prompt if prompt.strip() else _words_of(file, *also)
        if not self.prompt and name != "edit" and (ask.guidance is not None or ask.negative is not None):
            raise InputError(
                "without words nothing is guided: give a prompt, or leave --guidance and --negative out."
            )
        check_words(self.prompt, ask.negative)
        if ask.every > 1 and 1 == self.frames < self.found.frames:
            say(
                f"{file.name} has {self.found.frames} frames, of which --every {ask.every} takes the first alone."
            )

    @cached_property
    def sora(self) -> Sora:
        return capable(self.ask.model, "extend", device=self.ask.device)

    @property
    def frames(self) -> int:
        """Of the file as it is read."""
        return -(-self.found.frames // self.ask.every)

    @property
    def pace(self) -> float:
        """Frames a second of the file as it is read; 0 for a picture."""
        return self.found.fps / self.ask.every if self.found.frames > 1 else 0.0

    @cached_property
    def size(self) -> tuple[int, int]:
        """What is drawn, height and width, which is said where the file or the person has it otherwise."""
        unit, found, asked = self.sora.unit, self.found, self.ask.size
        like = self.sora.size_of(2 if self.moving else self.frames)
        if asked is None:
            size = fitted(found.height, found.width, like, unit)
        else:
            size = _rounded(asked[0], unit), _rounded(asked[1], unit)
        cut, patches = _cut(found, size), f", in whole patches of {unit}"
        if asked is not None and size != asked:
            say(f"{asked[1]} x {asked[0]} was asked for: drawn at {size[1]} x {size[0]}{patches}{cut}.")
        elif cut or (asked is None and size != (found.height, found.width)):
            patches = patches if asked is None else ""
            say(
                f"{self.file.name} is {found.width} x {found.height}: drawn at {size[1]} x {size[0]}{patches}{cut}."
            )
        return size

    def read(self, file: Path, *, most: int | None = None) -> Tensor:
        """Frames `1 3 f h w`, `most` of them at most, cut to the task's size."""
        found = self.found if file == self.file else _probe(file)
        if (found.height, found.width) != (self.found.height, self.found.width):
            cut = _cut(found, self.size)
            say(
                f"{file.name} is {found.width} x {found.height}: drawn at {self.size[1]} x {self.size[0]} like"
                f" {self.file.name}{cut}."
            )
        pixels = flatten(decode_array(file, size=self.size, frames=most)[:: self.ask.every])
        signal = torch.from_numpy(pixels).float() / 127.5 - 1
        return rearrange(signal, "f h w c -> 1 c f h w")

    def draw(self, work: Callable[..., Tensor], **told: Any) -> Path:
        """The file of what `work` gives with the options that were asked for; `told` is written into it as well."""
        ask, own = self.ask, self.sora.config
        fps = ask.fps or self.pace or own.fps
        if ask.format is not None:
            check_format(ask.format, 2 if self.moving else self.frames, fps)
        usual = GOING_ON["guidance"] if self.moving else own.guidance
        guidance = usual if ask.guidance is None else ask.guidance
        check_negative(ask.negative, guidance)
        options = {
            "seed": ask.seed, "steps": ask.steps, "sampler": ask.sampler, "negative": ask.negative,
            "guidance": guidance if self.prompt else 0.0,  # without words, nothing leads away from none
        }  # fmt: skip
        options = {name: value for name, value in options.items() if value is not None}
        with counting(self.name) as progress:
            signal = work(prompts=[self.prompt], progress=progress, **options)[0]
        name = re.sub(r"^\d{3,9}-", "", self.file.stem)  # the number that it has itself
        asked = options | {"file": self.file.name, "size": self.size} | told
        asked |= {"every": ask.every} if ask.every > 1 else {}
        made = what_made(
            self.sora, ask.model, task=self.name, **{k: v for k, v in asked.items() if k != "seed"}
        )
        stem = ask.out / f"{next_number(ask.out):03d}-{name}-{self.name}"
        return store(signal, stem, fps=fps, format=ask.format, made=made(self.prompt, ask.seed))


def _words_of(*files: Path) -> str:
    """The prompts that made the files, which is said; nothing if they do not say."""
    prompts: list[str] = []
    for file in files:
        made = read(file)
        if made is not None and made.prompt.strip() and made.prompt not in prompts:
            say(f"{file.name} was made from {made.prompt!r:.80}, which stays the prompt.")
            prompts.append(made.prompt)
    return ", ".join(prompts)


def check_negative(negative: str | None, guidance: float) -> None:
    """InputError: words to lead away from, and a guidance that leads nowhere."""
    if negative is not None and guidance == 1:
        raise InputError(
            "guidance is 1, which leads away from nothing: give a larger --guidance, or leave --negative out."
        )


def _check_ask(ask: Ask) -> None:
    if ask.every < 1:
        raise InputError(f"every is {ask.every}: give 1 to read every frame, 2 for every other one.")
    if ask.fps is not None and not 1 <= ask.fps <= 1000:
        raise InputError(f"fps is {ask.fps:g}: a clip shows from 1 to 1000 frames a second.")
    if ask.size is not None and min(ask.size) < 1:
        raise InputError(
            f"size is {ask.size[0]} {ask.size[1]}: give height and width in pixels, such as 96 96."
        )
    if ask.steps is not None and ask.steps < 1:
        raise InputError(f"steps is {ask.steps}: give 1 or more.")
    if ask.guidance is not None and not math.isfinite(ask.guidance):
        raise InputError(f"guidance is {ask.guidance:g}: give a finite number, such as 4.")
    if ask.sampler is not None and ask.sampler not in SAMPLERS:
        raise InputError(f"there is no sampler {ask.sampler!r:.40}: choose one of {', '.join(SAMPLERS)}.")
    check_folder(ask.out)


def _probe(file: Path) -> Probe:
    if not file.is_file():
        what = f"{file} is a folder" if file.is_dir() else f"There is no file {file}"
        raise InputError(f"{what}: name a picture or a clip.")
    return probe(file)


def _rounded(side: float, unit: int) -> int:
    return max(round(side / unit), 1) * unit


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name} is {value:g}: give a number above 0 and at most 1.")


def _check_between(between: int | None) -> None:
    if between is not None and between < 1:
        raise InputError(f"{between} frames between lead nowhere: give 1 or more.")


def _cut(found: Probe, size: tuple[int, int]) -> str:
    """How much of a file is lost at another aspect, in words; nothing where that is little."""
    aspect = (found.height / found.width) / (size[0] / size[1])
    lost = 1 - min(aspect, 1 / aspect)
    return f", {lost:.0%} of it cut off" if lost > 0.05 else ""


def _check_box(box: tuple[int, ...], found: Probe) -> None:
    if len(box) != 4:
        raise InputError(f"box has {len(box)} numbers: give four, LEFT TOP RIGHT BOTTOM.")
    left, top, right, bottom = box
    if not (0 <= left < right <= found.width and 0 <= top < bottom <= found.height):
        raise InputError(
            f"box {left} {top} {right} {bottom} does not lie in {found.width} x {found.height} pixels: give LEFT TOP"
            " RIGHT BOTTOM, the first two the smaller ones."
        )


def _box(box: tuple[int, ...], found: Probe, size: tuple[int, int]) -> np.ndarray:
    """Where a box of the file lies in what is drawn, `h w`, rounded outward."""
    left, top, right, bottom = box
    height, width = size
    scale = max(height / found.height, width / found.width)
    if min(right - left, bottom - top) * scale < 1:
        raise InputError(
            f"box {left} {top} {right} {bottom} is smaller than a pixel of what is drawn, {width} x {height}: give a"
            " larger box or --size."
        )
    spare = (found.height * scale - height) / 2, (found.width * scale - width) / 2
    rows = slice(max(math.floor(top * scale - spare[0]), 0), max(math.ceil(bottom * scale - spare[0]), 0))
    columns = slice(max(math.floor(left * scale - spare[1]), 0), max(math.ceil(right * scale - spare[1]), 0))
    inside = np.zeros(size, bool)
    inside[rows, columns] = True
    return inside


def _check_mask(mask: Path, found: Probe) -> bool:
    """Whether a mask is read by its transparency, which is said, and not by its colours. InputError: by neither."""
    own = _probe(mask)
    if own.frames > 1:
        raise InputError(
            f"{mask.name} is a clip of {own.frames} frames: give a picture as a mask; --frames chooses frames."
        )
    if (own.width, own.height) != (found.width, found.height):
        sizes = f"{own.width} x {own.height}, but the file {found.width} x {found.height}"
        raise InputError(f"{mask.name} is {sizes}: give a mask of its size.")
    clear = bool((decode_array(mask)[..., 3] < 255).any())
    values, here = _values(mask, clear=clear), "transparent" if clear else "white"
    if clear:
        say(f"{mask.name} is transparent in places: these are drawn anew, whatever its colours are.")
    unsure = ((values > 63) & (values < 192)).mean()
    if unsure > 0.5:
        raise InputError(
            f"{mask.name} is {'half transparent' if clear else 'grey'} in {unsure:.0%} of it: make it {here} where to"
            f" draw and {'opaque' if clear else 'black'} elsewhere."
        )
    if not (values > 127).any():
        raise InputError(
            f"{mask.name} is {here} nowhere, so nothing is drawn anew: make it {here} where to draw."
        )
    return clear


def _values(mask: Path, *, clear: bool, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as a mask, `h w`: above 127 where it is more transparent than not, or nearer to white than to black."""
    pixels = decode_array(mask, size=size, frames=1)[0]
    return 255 - pixels[..., 3] if clear else pixels[..., :3].mean(-1)
