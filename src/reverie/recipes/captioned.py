"""Captioned pictures as CLIP, BLIP and BLIP-2 learn from them: which ones a step has, how they are seen and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reverie import rng
from reverie.data.augment import draws
from reverie.data.index import Index
from reverie.data.pixels import Bad, Size
from reverie.data.streaming import open_pixels
from reverie.data.wording import PHRASES, draw_caption, mix_of
from reverie.errors import InputError
from reverie.recipes.parts import digest, my_share, tell_lacking
from reverie.train.parallel import team

Keys = list[tuple[int, int]]  # epoch and item of each place of a batch


class Captioned:
    """The items of an index that can be read and have a caption; of several processes, the first one decodes.

    mix: how often captions of each kind are told (data/wording.py). InputError: there are none.
    """

    def __init__(self, index: Index, *, size: Size, stream: bool = False, mix: str = ""):
        self.index, self.mix = index, mix_of(mix, dropped=False)
        with team().in_turn():
            self.pixels = open_pixels(index, size=size, stream=stream)
        self.good = [i for i in self.pixels.good if index[i].captions]
        if not self.good:
            raise InputError(
                f"no picture in {index.folder} has a caption: run `reverie data check` to see why."
            )
        tell_lacking((index[i] for i in self.good), self.mix)
        self.digest = digest(index, self.good)
        names = sorted({self._name(i) for i in self.good})
        self._label = {name: number for number, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.good)

    def check_pairs(self, batch: int, what: str) -> None:
        """InputError: a step of so many has nothing to compare a picture with, from which a `what` learns."""
        if min(batch, len(self)) < 2:
            have = f"batch is {batch}" if batch < 2 else f"{self.index.folder} has one picture with a caption"
            raise InputError(f"{have}: a {what} learns from comparing, so give two or more.")

    def drawn(self, number: int, batch: int, *, seed: int) -> tuple[Keys, list[Bad]]:
        """What this process has of batch `number` of `batch` pictures, and the files that failed and were replaced."""
        keys = [(epoch, self.good[place]) for epoch, place in my_share(number, batch, len(self), seed)]
        return self.pixels.ready(keys, self.good)

    def told(
        self,
        keys: Keys,
        *,
        seed: int,
        languages: dict[str, float] | None,
        phrases: Mapping[str, Sequence[str]] = PHRASES,
    ) -> list[str]:
        """One wording of each item, as `draw_caption` draws it."""
        return [
            draw_caption(
                self.index[i],
                rng.generator(seed, "caption", epoch, i),
                languages=languages,
                phrases=phrases,
                mix=self.mix,
            )
            for epoch, i in keys
        ]

    def seen(self, keys: Keys, *, seed: int) -> dict[str, Any]:
        """Pixels `rgba` (b 4 h w, uint8), the draws of their `views`, a number `label` of each thing, files `ids`."""
        return {
            "rgba": torch.stack([self.pixels[i][0] for _, i in keys]),
            "views": draws(seed, keys),
            "label": torch.tensor([self._label[self._name(i)] for _, i in keys]),
            "ids": [self.index[i].file_name for _, i in keys],
        }

    def chances(self, keys: Keys, *, seed: int) -> Tensor:
        """Two numbers in [0, 1) for each place (b 2), by which its hard negatives are drawn."""
        return torch.stack(
            [torch.rand(2, generator=rng.generator(seed, "negatives", epoch, i)) for epoch, i in keys]
        )

    def _name(self, i: int) -> str:
        """Pictures of one label show the same, so that none is wrong for another; without labels, equal files."""
        return self.index[i].label or self.index[i].hash
