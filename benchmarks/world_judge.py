"""How well the exact judge reads the procedural world: clean at several sizes, then under noise and blur.

    python benchmarks/world_judge.py [SCENES] [--seed 2000] [--kind occlusion]
    python benchmarks/world_judge.py --picture docs/images/world.png

Prints the tables of docs/world.md: percent of scenes read right, one attribute a column; half the scenes are images,
half are clips of 8 frames, or all are of one kind. Noise is Gaussian of the given standard deviation, blur Gaussian of
the given radius in pixels, pixels being in [-1, 1].
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections import Counter
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw
from PIL.ImageFont import truetype
from torch.nn import functional

from reverie import rng
from reverie.data.world import captions, render, world
from reverie.evals.world_judge import ATTRIBUTES, judge, score
from reverie.scene import Scene


def noisy(video: torch.Tensor, sigma: float, *, key: int) -> torch.Tensor:
    """`c f h w` with Gaussian noise."""
    return video + sigma * torch.randn(video.shape, generator=rng.generator(0, "world_judge noise", key))


def blurred(video: torch.Tensor, sigma: float) -> torch.Tensor:
    """`c f h w` convolved with a Gaussian of `sigma` pixels."""
    reach = max(1, round(3 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    line = (line / line.sum()).expand(video.shape[0], 1, -1)
    frames = video.transpose(0, 1)
    frames = functional.pad(frames, (reach,) * 4, mode="replicate")
    frames = functional.conv2d(frames, line[..., None, :], groups=video.shape[0])
    frames = functional.conv2d(frames, line[..., None], groups=video.shape[0])
    return frames.transpose(0, 1)


def measure(
    scenes: list[Scene], *, size: tuple[int, int], frames: int = 8, noise: float = 0.0, blur: float = 0.0
) -> dict[str, float]:
    """Percent right for each attribute, and "seconds" a picture or clip."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    seconds = 0.0
    for i, scene in enumerate(scenes):
        video = render(scene, size=size, frames=frames if scene.video else 1).permute(3, 0, 1, 2) / 127.5 - 1
        if blur:
            video = blurred(video, blur)
        if noise:
            video = noisy(video, noise, key=i).clamp(-1, 1)
        begun = time.process_time()
        reading = judge(video)
        seconds += time.process_time() - begun
        for name, holds in score(reading, scene).items():
            if holds is not None:
                asked[name] += 1
                right[name] += holds
    return {name: 100 * right[name] / asked[name] for name in asked} | {"seconds": seconds / len(scenes)}


def picture(path: Path) -> None:
    """Scenes of every topic with a caption each, and clips as strips."""
    font = truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 12)
    cell, gap, line = 176, 14, 16
    width = 6 * cell + 7 * gap
    stills = [("single", 12), ("count", 2), ("relation", 10), ("group", 9), ("relation", 23), ("count", 38)]
    stills += [("single", 7), ("relation", 34), ("group", 37), ("count", 10), ("relation", 30), ("group", 5)]
    strips = [("motion", 0), ("duet", 1), ("chorus", 0), ("merge", 0), ("motion", 21), ("motion", 9)]
    frame = (width - 3 * gap) // 2 // 6
    tall = 2 * (cell + 4 * line + gap) + 3 * (frame + 2 * line + gap) + gap
    sheet = Image.new("RGB", (width, tall), "white")
    draw = ImageDraw.Draw(sheet)

    def show(pixels: torch.Tensor, text: str, x: int, y: int, columns: int) -> None:
        sheet.paste(Image.fromarray(pixels.numpy()), (x, y))
        lines = "\n".join(textwrap.wrap(text, columns))
        draw.text((x, y + pixels.shape[0] + 4), lines, fill=(50, 50, 50), font=font, spacing=3)

    for k, (kind, i) in enumerate(stills):
        scene = world(i, kind=kind)
        x, y = gap + k % 6 * (cell + gap), gap + k // 6 * (cell + 4 * line + gap)
        show(
            render(scene, size=(cell, cell))[0], min((c.text for c in captions(scene)[:3]), key=len), x, y, 28
        )
    for k, (kind, i) in enumerate(strips):
        scene = world(i, kind=kind)
        frames = list(render(scene, size=(frame - 2, frame - 2), frames=6))
        frames = [functional.pad(one, (0, 0, 0, 2), value=255) for one in frames]
        x = gap + k % 2 * ((width - gap) // 2)
        y = gap + 2 * (cell + 4 * line + gap) + k // 2 * (frame + 2 * line + gap)
        show(torch.cat(frames, dim=1), captions(scene)[k % 3].text, x, y, 90)
    sheet.quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", type=int, nargs="?", default=400, help="scenes a row, half of them clips")
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--kind", help="scenes of this kind alone")
    parser.add_argument("--picture", type=Path, help="draw the page's picture there instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.picture:
        return picture(options.picture)

    kinds = (options.kind,) if options.kind else ("image", "video")

    def row(name: str, size: tuple[int, int], **change: float) -> None:
        scenes = [
            world(i, seed=options.seed, kind=kind, aspect=size[1] / size[0])
            for kind in kinds
            for i in range(options.scenes // len(kinds))
        ]
        found = measure(scenes, size=size, **change)
        cells = " | ".join(f"{found[key]:.1f}" if key in found else "-" for key in ATTRIBUTES)
        print(f"| {name} | {cells} | {1000 * found['seconds']:.0f} |", flush=True)

    for kind, frames in (("image", 1), ("video", 16)):
        begun = time.process_time()
        for i in range(300):
            render(world(i, seed=options.seed, kind=kind), size=(64, 64), frames=frames)
        drawn = 300 / (time.process_time() - begun)
        print(f"{drawn:.0f} {kind}s of {frames} x 64 x 64 made and drawn a second of one thread's time")
    print()
    heads = f"{' | '.join(ATTRIBUTES)} | ms |\n|---|{'---:|' * (len(ATTRIBUTES) + 1)}"
    print(f"| size (h x w) | {heads}")
    for size in ((128, 128), (96, 96), (64, 64), (64, 112), (112, 64), (48, 48), (40, 40), (32, 32)):
        row(f"{size[0]} x {size[1]}", size)
    print(f"\n| at 64 x 64 | {heads}")
    for sigma in (0.05, 0.1, 0.2, 0.3, 0.4):
        row(f"noise {sigma}", (64, 64), noise=sigma)
    for sigma in (0.5, 0.75, 1.0, 1.5, 2.0):
        row(f"blur {sigma}", (64, 64), blur=sigma)
    row("noise 0.1, blur 0.75", (64, 64), noise=0.1, blur=0.75)


if __name__ == "__main__":
    main()
