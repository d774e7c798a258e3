"""The pictures of docs/systems/sora.md, remade from the shipped weights: `python docs/figures.py`.

A strip shows up to twelve frames of a clip, evenly spaced; what was given has a green frame. Prints what each picture
took, and of the loop how large its seam is. `--only loop connect` makes these alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import reverie
from reverie.data.index import Index
from reverie.data.stickers import sample_folder
from reverie.media import decode_array, flatten
from reverie.output import write
from reverie.pictures import grid, to_bytes
from reverie.systems.sora import Sora

Strip = tuple[str, Tensor, list[bool]]  # a title, a clip `3 f h w`, and which of its frames were given
COLUMNS = 12


class Figures:
    """A loaded Sora, and pictures and clips of the shipped sample that it was not trained on."""

    def __init__(self, model: str, steps: int | None, seed: int):
        self.sora: Sora = reverie.load(model)
        self.config, self.options = self.sora.config, {"seed": seed, "steps": steps}
        self.index = Index.read(sample_folder())
        self.size = self.sora.size_of(self.config.frames)

    def clip(self, label: str) -> Tensor:
        """An animation of the sample `1 3 f h w`, as many frames as the model was trained at or fewer."""
        return self._read(label, "fluent-anim", self.size, frames=self.config.frames)

    def picture(self, label: str) -> Tensor:
        """A still sticker `1 3 1 h w` at the size of clips."""
        return self._read(label, "fluent-3d", self.size, frames=1)

    def _read(self, label: str, source: str, size: tuple[int, int], *, frames: int) -> Tensor:
        item = next(item for item in self.index if (item.label, item.source) == (label, source))
        pixels = flatten(decode_array(self.index.media(item), size=size, frames=frames))
        return rearrange(torch.from_numpy(pixels).float() / 127.5 - 1, "f h w c -> 1 c f h w")

    # One function a picture ------------------------------------------------------------------------------------------

    def words(self) -> list[Strip]:
        """Text to video."""
        prompts = ["rocket", "grinning face", "红心"]
        clips = self.sora.generate_video(prompts, **self.options)
        return [(prompt, clip, [False] * clip.shape[1]) for prompt, clip in zip(prompts, clips, strict=True)]

    def sizes(self) -> list[np.ndarray]:
        """Text to image at other sizes and aspects."""
        high, wide = self.config.size
        shapes = [(high, wide), (high, 3 * wide // 2), (3 * high // 2, wide), (high // 2, wide // 2)]
        unit = self.sora.unit
        shapes = [(h // unit * unit, w // unit * unit) for h, w in shapes]
        return [
            to_bytes(self.sora.generate_image([prompt], size=shape, **self.options))[0]
            for prompt in ("red apple", "dog face")
            for shape in shapes
        ]

    def animate(self) -> list[Strip]:
        """Picture to video."""
        strips = []
        for label in ("cat face", "red heart"):
            first = self.picture(label)
            clip = self.sora.extend(first, [label], forward=self.config.frames - 1, **self.options)[0]
            strips.append((label, clip, [i == 0 for i in range(clip.shape[1])]))
        return strips

    def extend(self) -> list[Strip]:
        """Forward and backward."""
        given = self.clip("cat face")[:, :, : self.config.frames // 2]
        count, more = given.shape[2], self.config.frames // 2
        ahead = self.sora.extend(given, ["cat face"], forward=more, **self.options)[0]
        back = self.sora.extend(given, ["cat face"], backward=more, **self.options)[0]
        marks = [True] * count + [False] * more
        return [("forward", ahead, marks), ("backward", back, marks[::-1])]

    def loop(self) -> list[Strip]:
        """The frames that close a loop, and the first given one again."""
        given = self.clip("sun")[:, :, : self.config.frames // 2]
        between = self.config.frames // 4
        clip = self.sora.loop(given, ["sun"], between=between, **self.options)
        steps = (clip - clip.roll(1, dims=2)).abs().mean((0, 1, 3, 4))
        jump = (given[:, :, 0] - given[:, :, -1]).abs().mean()
        print(
            f"loop: the seam {steps[0]:.4f}, its other steps up to {steps[1:].max():.4f}; without it {jump:.4f}",
            file=sys.stderr,
        )
        again = torch.cat([clip, clip[:, :, :1]], dim=2)[0]
        return [("a loop", again, [True] * given.shape[2] + [False] * between + [True])]

    def connect(self) -> list[Strip]:
        """From noise, and from a cross-fade."""
        few = self.config.frames // 3
        one, other = self.clip("cat face")[:, :, :few], self.clip("dog face")[:, :, :few]
        strips = []
        for start in (1.0, 0.7):
            clip = self.sora.connect(
                one, other, ["cat face, dog face"], between=few, start=start, **self.options
            )[0]
            marks = [True] * few + [False] * few + [True] * few
            strips.append((f"start {start:g}", clip, marks))
        return strips

    def edit(self) -> list[Strip]:
        """Video to video at several strengths."""
        given = self.clip("cat face")
        strips: list[Strip] = [("given: cat face", given[0], [True] * given.shape[2])]
        for strength in (0.4, 0.6, 0.8):
            clip = self.sora.edit(given, ["dog face"], strength=strength, **self.options)[0]
            strips.append((f"dog face, strength {strength:g}", clip, [False] * clip.shape[1]))
        return strips

    def inpaint(self) -> list[Strip]:
        """A region of space, and a stretch of time."""
        given = self.clip("cat face")
        (high, wide), count = self.size, given.shape[2]
        region = torch.zeros(self.size, dtype=torch.bool)
        region[: high // 2, : wide // 2] = True
        some = self.sora.inpaint(given, ["cat face"], region=region, **self.options)[0]
        stretch = torch.zeros(count, dtype=torch.bool)
        stretch[count // 3 : 2 * count // 3] = True
        then = self.sora.inpaint(given, ["cat face"], region=stretch, **self.options)[0]
        hole = torch.where(region, 0.0, given)[0]
        return [
            ("given but for a quarter", hole, [True] * count),
            ("the quarter drawn", some, [False] * count),
            ("a third of the time drawn", then, (~stretch).tolist()),
        ]

    def long(self) -> list[Strip]:
        """Two and a half windows and more."""
        pieces = self.sora.stream(["rocket"], frames=5 * self.config.frames // 2, **self.options)
        clip = torch.cat(list(pieces), dim=2)[0]
        return [(f"rocket, {clip.shape[1]} frames", clip, [False] * clip.shape[1])]

    def draft(self) -> list[np.ndarray]:
        """Drafts of three quarters the size, and large ones that began from them."""
        from reverie.recipes.own_files import smaller

        size, shown = self.config.size, []
        for prompt in ("red apple", "dog face", "rocket", "octopus"):
            small = self.sora.generate([prompt], size=smaller(size, self.sora.unit), **self.options)
            grown = torch.nn.functional.interpolate(small[:, :, 0], size=size, mode="bicubic", antialias=True)
            large = self.sora.edit(grown.clamp(-1, 1)[:, :, None], [prompt], strength=0.8, **self.options)
            shown += [to_bytes(small[:, :, 0])[0], to_bytes(large[:, :, 0])[0]]
        return shown


def strips(found: list[Strip]) -> Any:
    """One row of frames for each clip."""
    tiles, titles, marks = [], [], []
    for title, clip, given in found:
        places = torch.linspace(0, clip.shape[1] - 1, min(COLUMNS, clip.shape[1])).round().long().tolist()
        tiles += list(to_bytes(rearrange(clip[:, places], "c f h w -> f c h w")))
        titles += [title, *[""] * (len(places) - 1)]
        marks += [True if given[place] else None for place in places]
    return grid(tiles, titles, columns=COLUMNS, marks=marks)


def main() -> None:
    names = ("words", "sizes", "animate", "extend", "loop", "connect", "edit", "inpaint", "long", "draft")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--model", default="sora-stickers", help="a shipped name, or a folder that a run wrote"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--steps", type=int, help="the model's own number if not given")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    figures = Figures(asked.model, asked.steps, asked.seed)
    for name in asked.only:
        begun = time.process_time()
        found = getattr(figures, name)()
        sheet = strips(found) if isinstance(found[0], tuple) else grid(found, columns=8)
        path = write(asked.out / f"sora-{name}.webp", [sheet], quality=85)
        print(f"{name}: {time.process_time() - begun:.0f} s of one core, {path}", flush=True)


if __name__ == "__main__":
    main()
