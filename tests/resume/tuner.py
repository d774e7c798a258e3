"""Small runs of the recipes of CLIP, BLIP, Sora and the video autoencoder; the tests kill them in a child process."""

from __future__ import annotations

import os
import signal
from functools import partial
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
    (place / "moving").mkdir()
    for number in range(6):
        frames = [Image.new("RGB", (16, 16), (20 * number, 12 * moment, 90)) for moment in range(16)]
        save = (
            frames[0].save if number % 2 else partial(frames[0].save, save_all=True, append_images=frames[1:])
        )
        save(place / "moving" / f"{number}.webp", lossless=True)
        (place / "moving" / f"{number}.txt").write_text(names[number % 3])
    import_folder(place / "moving", val=0, quiet=True)
    words = Bpe.train([*names] * 3, vocab=600)
    torch.manual_seed(0)
    text = TextConfig(vocab=words.vocab, length=10, width=32, depth=1, heads=2, end=words.end)
    image = VitConfig(size=16, patch=4, width=32, depth=2, heads=2, registers=1)
    reverie.save(Clip(ClipConfig(image=image, text=text, width=16), words), place / "start")


def run(place: Path, out: Path, *, way: str, kill: tuple[str, int] | None = None, **engine) -> None:
    """`way`: "drop", "chunk", "lora", "blip", "sora" or "vae"; `kill`: the sub-step of a save to die at, or "backward",
    and the how manieth.

    Steps of Sora and of the autoencoder have two batches, so an odd backward pass is in the middle of one. The
    autoencoder's discriminator plays at every other step from the third on.
    """
    import torch

    from reverie.backbones.discriminator import DiscriminatorConfig
    from reverie.codecs.video_vae import VideoVaeConfig
    from reverie.data.index import Index
    from reverie.recipes import blip, sora, video_vae
    from reverie.recipes.clip import tiny
    from reverie.recipes.clip_finetune import finetune
    from reverie.train import Run, checkpoint
    from reverie.train.engine import Engine
    from reverie.train.parallel import processes

    torch.set_num_threads(1)
    times: dict[str, int] = {}

    def reached(point: str) -> None:
        times[point] = times.get(point, 0) + 1
        if (point, times[point]) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._reached = reached
    Run.curves = lambda self: None
    backward = torch.Tensor.backward

    def counted(self, *given, **named):
        backward(self, *given, **named)
        reached("backward")

    torch.Tensor.backward = counted  # type: ignore[method-assign]
    how = Engine(**engine)
    shared = {
        "start": str(place / "start"),
        "steps": STEPS,
        "batch": 6,
        "lr": 1e-2,
        "drop": 0.5,
        "engine": how,
    }
    with processes():
        if way == "sora":
            sora.shape = partial(sora.shape, sizes=(2, 64, 1))
            sora._some_captions = lambda index, count=8: (
                "bright red wall",
            )  # one picture is drawn at every step
            begun = str(place / "start")
            sora.tiny(place / "moving", out, clip=begun, steps=STEPS, batch=2, clips=2, size=16, engine=how)
        elif way == "vae":
            config = video_vae.VaeRun(
                model=VideoVaeConfig(channels=4, widths=(8, 8), temporal=(True,)),
                weights=video_vae.Weights(
                    adversarial=0.5, adversarial_from=2, adversarial_every=2, perceptual_every=2
                ),
                discriminator=DiscriminatorConfig(width=8, depth=2),
                clip=str(place / "start"), steps=STEPS, batch=2, clips=2, frames=5, size=16, lr=1e-2,
            )  # fmt: skip
            video_vae.fit(config, Index.read(place / "moving"), out, engine=how)
        elif way == "blip":
            blip.shape = partial(blip.shape, width=64, depth=2)
            blip.tiny(place / "data", out, steps=STEPS, batch=6, lr=1e-2, size=16, queue=16, engine=how)
        elif way == "chunk":
            tiny(place / "data", out, chunk=2, **shared)
        elif way == "drop":
            tiny(place / "data", out, drop_text=0.5, unmasked=0.3, **shared)
        else:
            finetune(place / "data", out, lora=2, lock="text", layer_decay=0.7, blend=0.5, **shared)
