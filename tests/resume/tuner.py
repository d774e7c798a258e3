"""A small run that drops patches and words or trains adapters; the tests kill it in a child process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

STEPS = 8


def prepare(place: Path) -> None:
    """A folder of labelled pictures, and a CLIP to begin with."""
    import torch
    from PIL import Image

    import reverie
    from reverie.codecs.bpe import Bpe
    from reverie.data.importers import import_folder
    from reverie.encoders.text import TextConfig
    from reverie.encoders.vit import VitConfig
    from reverie.systems.clip import Clip, ClipConfig

    names = ("bright red wall", "dark green wall", "plain blue wall")
    for number, name in enumerate(names):
        (place / "data" / name).mkdir(parents=True)
        for i in range(4):
            colour = [20 + 9 * i] * 3
            colour[number] = 200 - 9 * i
            Image.new("RGB", (16, 16), tuple(colour)).save(place / "data" / name / f"{i}.png")
    import_folder(place / "data", val=0, quiet=True)
    words = Bpe.train([*names] * 3, vocab=600)
    torch.manual_seed(0)
    text = TextConfig(vocab=words.vocab, length=10, width=32, depth=1, heads=2, end=words.end)
    image = VitConfig(size=16, patch=4, width=32, depth=2, heads=2, registers=1)
    reverie.save(Clip(ClipConfig(image=image, text=text, width=16), words), place / "start")


def run(place: Path, out: Path, *, way: str, kill: tuple[str, int] | None = None) -> None:
    """`way`: "drop" or "lora"; `kill`: the sub-step of a save to die at, and of which save."""
    import torch

    from reverie.recipes.clip import tiny
    from reverie.recipes.clip_finetune import finetune
    from reverie.train import Run, checkpoint

    torch.set_num_threads(1)
    times: dict[str, int] = {}

    def reached(point: str) -> None:
        times[point] = times.get(point, 0) + 1
        if (point, times[point]) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._reached = reached
    Run.curves = lambda self: None
    shared = {"start": str(place / "start"), "steps": STEPS, "batch": 6, "lr": 1e-2, "drop": 0.5}
    if way == "drop":
        tiny(place / "data", out, drop_text=0.5, unmasked=0.3, **shared)
    else:
        finetune(place / "data", out, lora=2, lock="text", layer_decay=0.7, blend=0.5, **shared)
