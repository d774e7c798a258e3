"""Pictures and clips of one's own in, clips out: the work behind `reverie animate`, `extend`, `loop` and the rest.

A file is read at the shape that it has and the number of pixels that the model learnt at, its sides rounded to whole
patches, which is said; its frames are taken as they are. If no words are given, those count that made the file
(`reverie.output`); without any the model goes by the frames alone. The tasks themselves are in systems/sora_given.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from reverie.errors import InputError
from reverie.media import Probe, decode_array, flatten, probe
from reverie.output import check_format, next_number, read, store
from reverie.progress import counting, say
from reverie.recipes.asked import Ask
from reverie.recipes.parts import capable, what_made
from reverie.systems.sora import Sora


def animate(picture: Path, prompt: str = "", *, frames: int | None = None, ask: Ask) -> Path:
    """A clip of `frames` that begins with a picture (of a clip, with its first frame)."""
    task = _Task(ask, picture, moving=True)
    count = task.sora.config.frames if frames is None else frames
    if count < 2:
        raise InputError(f"a clip of {count} frames does not move: ask for 2 or more.")
    first = task.read(picture)[:, :, :1]
    return task.draw(
        "animate", prompt, lambda **how: task.sora.extend(first, forward=count - 1, **how), frames=count
    )


def extend(clip: Path, prompt: str = "", *, forward: int = 0, backward: int = 0, ask: Ask) -> Path:
    """The clip with frames after it, and before it."""
    if forward < 0 or backward < 0 or not forward + backward:
        raise InputError(
            f"forward is {forward} and backward {backward}: say how many frames to add, such as --forward 16."
        )
    task = _Task(ask, clip, moving=True)
    given = task.read(clip)
    return task.draw(
        "extend",
        prompt,
        lambda **how: task.sora.extend(given, forward=forward, backward=backward, **how),
        forward=forward,
        backward=backward,
    )


def loop(clip: Path, prompt: str = "", *, between: int | None = None, ask: Ask) -> Path:
    """The clip and the frames that lead from its end to its beginning."""
    task = _Task(ask, clip, moving=True)
    given = task.read(clip, least=2)
    return task.draw(
        "loop", prompt, lambda **how: task.sora.loop(given, between=between, **how), between=between
    )


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
    _check_share("start", start)
    task = _Task(ask, first, moving=True)
    one, other = task.read(first), task.read(second)
    return task.draw(
        "connect",
        prompt,
        lambda **how: task.sora.connect(one, other, between=between, start=start, **how),
        second=second,
        between=between,
        start=start,
    )


def edit(file: Path, prompt: str = "", *, strength: float = 0.6, ask: Ask) -> Path:
    """A picture or clip drawn again by the words; with a larger size, what a draft shows in large."""
    _check_share("strength", strength)
    task = _Task(ask, file)
    given = task.read(file)
    return task.draw(
        "edit", prompt, lambda **how: task.sora.edit(given, strength=strength, **how), strength=strength
    )


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
    task = _Task(ask, file)
    given = task.read(file)
    count, size = given.shape[2], (given.shape[3], given.shape[4])
    region = torch.ones(count, *size, dtype=torch.bool)
    if box:
        region &= torch.from_numpy(_box(box, task.found, size))
    if mask is not None:
        region &= torch.from_numpy(_mask(mask, task.found, size))
    if frames is not None:
        first, last = frames
        if not 0 <= first <= last < count:
            raise InputError(
                f"{file.name} has the frames 0 to {count - 1}, so {first} to {last} cannot be drawn anew."
            )
        region[:first] = region[last + 1 :] = False
    chosen = region if box or mask is not None else region[:, 0, 0]
    if not chosen.any():
        raise InputError("what is to be drawn anew lies outside of what is seen: choose another place.")
    return task.draw(
        "inpaint",
        prompt,
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
    """The shape of `height` by `width` with about as many pixels as `like`, in whole patches of `unit` pixels."""
    scale = math.sqrt(like[0] * like[1] / (height * width))
    return _rounded(height * scale, unit), _rounded(width * scale, unit)


class _Task:
    """A loaded model, and the first file that it is asked about."""

    def __init__(self, ask: Ask, file: Path, *, moving: bool = False):
        self.ask = ask
        if self.ask.every < 1:
            raise InputError(f"every is {self.ask.every}: give 1 to read every frame, 2 for every other one.")
        if self.ask.fps is not None and not 1 <= self.ask.fps <= 1000:
            raise InputError(f"fps is {self.ask.fps:g}: a clip shows from 1 to 1000 frames a second.")
        self.file, self.found = file, _probe(file)
        frames = 2 if moving else -(-self.found.frames // self.ask.every)
        if self.ask.format is not None:
            check_format(self.ask.format, frames, self.ask.fps or self.pace or 1)
        self.sora: Sora = capable(self.ask.model, "extend", device=self.ask.device)
        self.size = self._size(self.sora.size_of(frames))

    @property
    def pace(self) -> float:
        """Frames a second of the file as it is read; 0 for a picture."""
        return self.found.fps / self.ask.every if self.found.frames > 1 else 0.0

    def _size(self, like: tuple[int, int]) -> tuple[int, int]:
        unit = self.sora.unit
        height, width = self.found.height, self.found.width
        asked = self.ask.size
        if asked is not None and min(asked) < 1:
            raise InputError(
                f"size is {asked[0]} {asked[1]}: give height and width in pixels, such as 96 96."
            )
        size = fitted(height, width, like, unit) if asked is None else tuple(_rounded(s, unit) for s in asked)
        if size != (asked or (height, width)):
            what = (
                f"{self.file.name} is {width} x {height}"
                if asked is None
                else f"{asked[1]} x {asked[0]} was asked for"
            )
            say(f"{what}: drawn at {size[1]} x {size[0]}, in whole patches of {unit}.")
        return size[0], size[1]

    def read(self, file: Path, *, least: int = 1) -> Tensor:
        """Frames `1 3 f h w`, cut to the task's size."""
        found = self.found if file == self.file else _probe(file)
        if (found.height, found.width) != (self.found.height, self.found.width):
            say(
                f"{file.name} is {found.width} x {found.height}: drawn at {self.size[1]} x {self.size[0]}, cut to fit."
            )
        there = -(-found.frames // self.ask.every)
        if there < least:
            raise InputError(
                f"{file.name} has {there} frame{'s' * (there != 1)}, but {least} or more are needed."
            )
        pixels = flatten(decode_array(file, size=self.size)[:: self.ask.every])
        signal = torch.from_numpy(pixels).float() / 127.5 - 1
        return rearrange(signal, "f h w c -> 1 c f h w")

    def draw(self, what: str, prompt: str, work: Callable[..., Tensor], **told: Any) -> Path:
        """The file of what `work` gives with the options that were asked for; `told` is written into it as well."""
        prompt = self.words(prompt)
        if what == "edit" and not prompt:
            raise InputError(f"say what {self.file.name} shall show: its own words are not in it.")
        if not prompt and (self.ask.guidance is not None or self.ask.negative is not None):
            raise InputError(
                "without words nothing is guided: give a prompt, or leave --guidance and --negative out."
            )
        options = {
            "seed": self.ask.seed, "steps": self.ask.steps, "sampler": self.ask.sampler, "negative": self.ask.negative,
            "guidance": self.ask.guidance if prompt else 0.0,  # without words, nothing leads away from none
        }  # fmt: skip
        options = {name: value for name, value in options.items() if value is not None}
        with counting(what) as progress:
            signal = work(prompts=[prompt], progress=progress, **options)[0]
        name = re.sub(r"^\d{3,9}-", "", self.file.stem)  # the number that it has itself
        own = self.pace or self.sora.config.fps
        asked = options | {"file": self.file.name, "size": self.size} | told
        asked |= {"every": self.ask.every} if self.ask.every > 1 else {}
        made = what_made(
            self.sora, self.ask.model, task=what, **{k: v for k, v in asked.items() if k != "seed"}
        )
        stem = self.ask.out / f"{next_number(self.ask.out):03d}-{name}-{what}"
        seen = made(prompt, self.ask.seed)
        return store(signal, stem, fps=self.ask.fps or own, format=self.ask.format, made=seen)

    def words(self, prompt: str) -> str:
        """The prompt, or if there is none the one that made the file."""
        if prompt.strip():
            return prompt
        made = read(self.file)
        if made is None or not made.prompt.strip():
            return ""
        say(f"{self.file.name} was made from {made.prompt!r}, which stays the prompt.")
        return made.prompt


def _probe(file: Path) -> Probe:
    if not file.is_file():
        raise InputError(f"There is no file {file}: name a picture or a clip.")
    return probe(file)


def _rounded(side: float, unit: int) -> int:
    return max(round(side / unit), 1) * unit


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name} is {value:g}: give a number above 0 and at most 1.")


def _box(box: tuple[int, ...], found: Probe, size: tuple[int, int]) -> np.ndarray:
    """Where a box of the file lies in what is drawn, `h w`, rounded outward."""
    if len(box) != 4:
        raise InputError(f"box has {len(box)} numbers: give four, LEFT TOP RIGHT BOTTOM.")
    left, top, right, bottom = box
    if not (0 <= left < right <= found.width and 0 <= top < bottom <= found.height):
        raise InputError(
            f"box {left} {top} {right} {bottom} does not lie in {found.width} x {found.height} pixels: give LEFT TOP"
            " RIGHT BOTTOM."
        )
    height, width = size
    scale = max(height / found.height, width / found.width)
    spare = (found.height * scale - height) / 2, (found.width * scale - width) / 2
    rows = slice(max(math.floor(top * scale - spare[0]), 0), max(math.ceil(bottom * scale - spare[0]), 0))
    columns = slice(max(math.floor(left * scale - spare[1]), 0), max(math.ceil(right * scale - spare[1]), 0))
    inside = np.zeros(size, bool)
    inside[rows, columns] = True
    return inside


def _mask(mask: Path, found: Probe, size: tuple[int, int]) -> np.ndarray:
    """Where a picture is white or transparent, `h w`."""
    own = _probe(mask)
    if (own.width, own.height) != (found.width, found.height):
        sizes = f"{own.width} x {own.height}, but the file {found.width} x {found.height}"
        raise InputError(f"{mask.name} is {sizes}: give a mask of its size.")
    return flatten(decode_array(mask, size=size, frames=1)[0]).mean(-1) > 127
