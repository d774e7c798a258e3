"""Which places of a clip are given in training, so that one network goes on, back, in between and around.

The kinds follow Open-Sora 1.2's mix (random frames, the head, the tail, both ends); a region of every frame is ours.
Convention: bool `f h w` on the grid of patches, True = given; at least one place stays to be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KINDS: Mapping[str, float] = {
    "first": 0.25,  # the first frame
    "head": 0.15,  # some of the first frames: extension forward
    "tail": 0.15,  # some of the last: extension backward
    "ends": 0.2,  # some of both: connecting, loops
    "frames": 0.1,  # each frame by the toss of a coin
    "region": 0.15,  # all but a box, or a box alone, in every frame
}
PICTURES: Mapping[str, float] = {"region": 1.0}  # one frame has nothing else to give


def draw_given(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """One mask `f h w` of a kind drawn by its share; of a clip of one frame, a region."""
    f, h, w = shape
    kinds = KINDS if f > 1 else PICTURES
    names = list(kinds)
    place = torch.multinomial(torch.tensor([kinds[name] for name in names]), 1, generator=generator)
    kind = names[int(place)]

    def below(n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(torch.randint(n, (), generator=generator))

    given = torch.zeros(f, h, w, dtype=torch.bool)
    if kind == "first":
        given[0] = True
    elif kind == "head":
        given[: 1 + below(f - 1)] = True
    elif kind == "tail":
        given[1 + below(f - 1) :] = True
    elif kind == "ends":
        start, stop = sorted((below(f), below(f)))  # what is drawn, both included
        given[:] = True
        given[start : stop + 1] = False
    elif kind == "frames":
        given[torch.rand(f, generator=generator) < 0.5] = True
    else:
        top, left = below(h), below(w)
        bottom, right = top + 1 + below(h - top), left + 1 + below(w - left)
        given[:, top:bottom, left:right] = True
        if below(2):
            given = ~given
    if given.all():
        given[below(f)] = False
    return given
