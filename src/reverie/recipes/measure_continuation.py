"""Whether a generator of clips goes on as a clip began: the measurement behind `reverie eval continuation`.

The first half of unseen clips of the procedural world, in which something moves straight on, is given; the model draws
the second half, once with the words that say what moves and where to, once by the frames alone, once by the words
alone. The exact judge follows the thing and compares its direction and speed with those of the given half
(evals/continuation.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from reverie.data.world import World
from reverie.errors import InputError
from reverie.evals import continuation as judged
from reverie.evals.interval import bootstrap
from reverie.output import write
from reverie.pictures import grid, save_png, to_bytes
from reverie.progress import counting
from reverie.recipes.measure_generators import UNSEEN, Draws
from reverie.recipes.measured import Measured, Row, fits, share
from reverie.recipes.parts import capable
from reverie.scene import Thing

WAYS = ("frames and words", "frames alone", "words alone")


def continuation(out: Path, *, model: str, world_seed: int = 0, ask: Draws | None = None) -> Measured:
    """Extend `ask.count` clips of the world by as many frames as are given; what is kept of direction and speed."""
    ask, out = ask or Draws(count=40, batch=4), fits(out)
    sora = capable(model, "generate_video", device=ask.device)
    if not hasattr(sora, "extend"):
        raise InputError(f"{model} takes no given frames: name a Sora, such as a run of sora-world.")
    frames, size = sora.config.frames, sora.size_of(sora.config.frames)
    if frames < 8:
        raise InputError(
            f"{model} draws clips of {frames} frames, but 8 are the least that show a motion twice."
        )
    clips, things, prompts = _moving(ask.count, frames, size, world_seed)
    half = frames // 2
    before = [_velocity(clip[:, :half], thing) for clip, thing in zip(clips, things, strict=True)]
    drawn: dict[str, Tensor] = {}
    with counting("extending") as progress:
        parts = range(0, ask.count, ask.batch)
        for number, way in enumerate(WAYS):
            known = torch.zeros(ask.count, frames, dtype=torch.bool)
            known[:, :half] = way != "words alone"
            options: dict[str, Any] = {"steps": ask.steps, "guidance": ask.guidance}
            if way == "frames alone":
                options["guidance"] = 0.0
            pieces = []
            for turn, at in enumerate(parts):
                some = slice(at, at + ask.batch)
                pieces.append(
                    sora.generate(
                        prompts[some], frames=frames, size=size, known=clips[some], known_mask=known[some],
                        seed=[ask.seed + i for i in range(ask.count)][some], together=True, **options,
                    ).cpu()
                )  # fmt: skip
                progress(number * len(parts) + turn + 1, len(WAYS) * len(parts))
            drawn[way] = torch.cat(pieces)
    after = {way: _after(some, things, half) for way, some in (drawn | {"real": clips}).items()}
    after["other scenes"] = [*after["real"][1:], after["real"][0]]
    numbers: dict[str, Any] = {
        "frames": frames, "given": half, "count": ask.count, "seed": ask.seed, "world_seed": world_seed,
        "prompts": prompts, "before": before, "after": after,
    }  # fmt: skip
    found = {
        way: judged.shares([judged.kept(one, two) for one, two in zip(before, some, strict=True)])
        for way, some in after.items()
    }
    told = {
        "there": "still there at the end",
        "direction": "in the same direction",
        "speed": f"as fast, within a factor of {judged.FACTOR:g}",
        "motion": "both",
    }
    rows: list[Row] = []
    for name, text in told.items():
        cells = []
        for way in found:
            holds = torch.tensor(found[way][name], dtype=torch.double)
            numbers[f"{name}, {way}"] = holds.mean().item()
            cells.append(share(holds.mean().item(), bootstrap(holds) if way in WAYS else None))
        rows.append((text, *cells))
    for way in WAYS[:2]:
        stem = way.replace(" ", "-")
        _sheet(drawn[way][:8], prompts[:8], half, out / f"{stem}.png")
        moving = (
            grid(shown, prompts[:16], lines=2)
            for shown in to_bytes(rearrange(drawn[way][:16], "b c f h w -> f b c h w"))
        )
        write(out / f"{stem}.webp", moving, fps=sora.config.fps, quality=80)
    title = f"{model} goes on with {ask.count} unseen clips of the world: {half} frames given, {frames - half} drawn"
    return Measured(title=title, columns=("", *found), rows=rows, numbers=numbers).write(out)


def _moving(
    count: int, frames: int, size: tuple[int, int], seed: int
) -> tuple[Tensor, list[Thing], list[str]]:
    """Clips `b 3 f h w` in which the first thing moves straight on, that thing, and an English caption of each."""
    world = World(20 * count, seed=seed, size=size, frames=frames, kind="motion", first=UNSEEN)
    where = [i for i in range(len(world)) if world.scene(i).things[0].motion.kind == "move"][:count]
    assert len(where) == count, "two of five scenes move so"
    examples = [world[i] for i in where]
    pixels = torch.stack([example.pixels[:, :3] for example in examples])
    clips = rearrange(pixels.float() / 127.5 - 1, "b f c h w -> b c f h w")
    texts = [next(c.text for c in example.captions if c.language == "en") for example in examples]
    return clips, [example.scene.things[0] for example in examples], texts


def _velocity(clip: Tensor, thing: Thing) -> judged.Velocity:
    found = judged.velocity(clip, shape=thing.shape, colour=thing.colour)
    assert found is not None, "the judge reads every clip of the world"
    return found


def _after(clips: Tensor, things: list[Thing], half: int) -> list[judged.Velocity | None]:
    """From the last given frame on."""
    return [
        judged.velocity(clip[:, half - 1 :], shape=thing.shape, colour=thing.colour)
        for clip, thing in zip(clips, things, strict=True)
    ]


def _sheet(clips: Tensor, prompts: list[str], half: int, path: Path) -> None:
    """A row for each clip, what was given framed."""
    places = torch.linspace(0, clips.shape[2] - 1, 8).round().long().tolist()
    tiles = rearrange(clips[:, :, places], "b c f h w -> (b f) c h w")
    titles = [prompt if not at else "" for prompt in prompts for at in range(8)]
    marks = [True if place < half else None for _ in prompts for place in places]
    save_png(grid(to_bytes(tiles), titles, columns=8, marks=marks), path)
