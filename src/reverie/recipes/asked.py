"""How a task on pictures and clips of one's own is asked for: the flags that its commands share. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is None is the model's own.

    Args:
        model: A shipped name, or a folder that a run of Sora wrote.
        out: The folder that the file goes to.
        size: Height and width in pixels, cut to; the file's shape at the model's number of pixels if not given.
        every: Take one of so many frames of a clip; 1 takes all.
        seed: The same seed draws the same.
        steps: Sampling steps, 1 or more; the model's own number if not given.
        guidance: How strictly to follow the words: 1 as learnt, more is stricter. If not given, the model's own to edit
            and inpaint, else 1, since more leads away from the given frames.
        sampler: Such as euler, heun, dpmpp_2m or unipc; euler if not given.
        negative: What not to draw: guidance, unless it is 1, leads away from these words.
        fps: Frames per second of what comes out, 1 to 1000; as the clip has them, or the model's own, if not given.
        format: png, webp, gif, mp4, webm or jpg; without it png for pictures and webp for clips, both lossless.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """

    model: str = "sora-stickers"
    out: Path = Path("samples")
    size: tuple[int, int] | None = None
    every: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    negative: str | None = None
    fps: float | None = None
    format: str | None = None
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Telling:
    """How captions are written.

    Args:
        sampling: beam weighs several wordings against each other, greedy takes the surest word, nucleus draws.
        prompt: What a caption begins with; the model's own if not given.
        beams: Wordings that are weighed.
        least: New tokens at least.
        most: New tokens at most.
        p: nucleus draws from the likeliest words that together have this probability.
        seed: The same seed draws the same; the others always say the same.
    """

    sampling: str = "beam"
    prompt: str | None = None
    beams: int = 3
    least: int = 0
    most: int = 20
    p: float = 0.9
    seed: int = 0
