"""The best of many: drawn a few at a time, so that memory stays flat however many there are, and judged as they come.

DALL-E draws 512 and lets a CLIP choose (Ramesh et al. 2021, 2102.12092, section 2.6).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOGETHER = 16  # drawn at a time

Tell = Callable[[int, int], None]


@torch.no_grad()
def best_of_many(
    draw: Callable[[list[int], Tell], Tensor],
    clip: Any,
    prompt: str,
    *,
    seed: int,
    count: int,
    progress: Tell,
) -> tuple[Tensor, int]:
    """Of what `draw(seeds, tell)` gives, `b 3 f h w`, for `count` seeds from `seed` on, the item that `clip` finds
    likest to the prompt in its middle frame, `3 f h w`, and its number.

    Ctrl-C ends the drawing: the best of what was drawn until then is given, and how much that was is said. If nothing
    was, it is raised.
    """
    words = clip.embed_text([prompt])
    best: Tensor | None = None
    found, highest, done = 0, -float("inf"), 0
    try:
        while done < count:
            seeds = list(range(seed + done, seed + min(done + TOGETHER, count)))

            def tell(step: int, steps: int, first: int = done, some: int = len(seeds)) -> None:
                progress(first * steps + some * step, count * steps)

            drawn = draw(seeds, tell)
            likeness = (clip.embed_image(drawn[:, :, drawn.shape[2] // 2]) @ words.T)[:, 0]
            at = int(likeness.argmax())
            if float(likeness[at]) > highest:
                best, found, highest = drawn[at].clone(), done + at, float(likeness[at])
            done += len(seeds)
    except KeyboardInterrupt:
        if best is None:
            raise
        print(f"\nstopped: the best of {done:,} of {count:,}", file=sys.stderr)
    assert best is not None
    return best, found
