"""Quicker pictures, and what they lose: `python benchmarks/quicker.py STICKERS [--student FOLDER]`.

Draws labels of the sticker corpus with the same noise: plainly in 24 steps, in fewer, by another sampler, with a cache
of deep features at several thresholds, and by a distilled student. For each: seconds of the processor a picture, how
often the deep blocks were computed, how near the pictures come to those of 24 plain steps (PSNR, and the cosine in
CLIP's features), and how often the judge, and CLIP, pick out the label. Writes table.md, numbers.json and quicker.png.
Some three minutes of one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reverie
from reverie.data.index import Index
from reverie.evals import generation
from reverie.recipes.measured import Measured, save_figure, share
from reverie.recipes.parts import plain_stickers

WAYS: list[tuple[str, dict[str, Any]]] = [
    *((f"euler, {steps} steps", {"steps": steps}) for steps in (24, 18, 12, 8, 4)),
    *((f"unipc, {steps} steps", {"steps": steps, "sampler": "unipc"}) for steps in (12, 8)),
    *((f"euler, 24 steps, cache {cache}", {"steps": 24, "cache": cache}) for cache in (0.1, 0.15, 0.2, 0.3)),
]
STUDENT = "student"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path, help="the folder that `reverie data stickers` filled")
    parser.add_argument(
        "--model", default="sora-stickers", help="a shipped name, or a folder that a run wrote"
    )
    parser.add_argument("--student", help="the folder of its distilled student")
    parser.add_argument("--only", nargs="+", help="those ways alone whose titles begin so, beside the first")
    parser.add_argument("--judge", default="judge-stickers")
    parser.add_argument("--clip", default="clip-stickers")
    parser.add_argument("--count", type=int, default=100, help="labels")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/quicker"))
    asked = parser.parse_args()
    sora, judge, clip = (reverie.load(name) for name in (asked.model, asked.judge, asked.clip))
    corpus = plain_stickers(Index.read(asked.data)).select(video=False, sources=("fluent-3d",), split="train")
    names = generation.choose([item.label for item in corpus if item.label], asked.count)
    student = reverie.load(asked.student) if asked.student else None
    ways = WAYS if student is None else [*WAYS, (f"{STUDENT}, {student.config.steps} steps", {})]
    if asked.only:
        ways = [ways[0], *(way for way in ways[1:] if way[0].startswith(tuple(asked.only)))]
    deep = Count(*(model.backbone.blocks[-1] for model in (sora, student) if model is not None))
    rows, numbers, exact, seen = [], {}, torch.empty(0), torch.empty(0)
    for title, options in ways:
        deep.times = 0
        drawing = student if title.startswith(STUDENT) else sora
        pictures, seconds = draw(drawing, names, asked.batch, options)
        with torch.no_grad():
            features = clip.embed_image(pictures)
        if not len(exact):
            exact, seen = pictures, features
        error = (pictures - exact).square().mean((1, 2, 3)).clamp(min=1e-10)
        psnr = float((10 * (4 / error).log10()).mean())
        alike = float((features * seen).sum(1).mean())
        picked = generation.pick(pictures, names, judge.classify)
        clips = generation.pick(pictures, names, clip.classify)
        batches = -(-len(names) // asked.batch)
        numbers[title] = {
            "options": options, "seconds": seconds, "deep": deep.times / batches, "psnr": psnr, "cosine": alike,
            "top1": picked["top1"], "interval": picked["top1_interval"], "top5": picked["top5"],
            "clip_top1": clips["top1"],
        }  # fmt: skip
        near = ("", "") if pictures is exact else (f"{psnr:.1f} dB", f"{alike:.3f}")
        right = (share(picked["top1"], picked["top1_interval"]), share(picked["top5"]), share(clips["top1"]))
        rows.append((title, f"{seconds:.3f}", f"{deep.times / batches:.1f}", *near, *right))
        print(*rows[-1], sep="  ", flush=True)
    columns = (
        "drawn by",
        "CPU seconds",
        "deep blocks",
        "PSNR",
        "CLIP cosine",
        "picked out",
        "first five",
        "by CLIP",
    )
    title = f"{asked.model} draws {len(names)} labels, ever quicker"
    print(Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(asked.out))
    picture(numbers, asked.out / "quicker.png")


class Count:
    """How often one of these modules was asked."""

    def __init__(self, *modules: nn.Module):
        self.times = 0
        for module in modules:
            module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.times += 1


def draw(sora: Any, names: list[str], batch: int, options: dict[str, Any]) -> tuple[Tensor, float]:
    """A picture of each name with the same seeds whatever the options, and the processor's seconds for one."""
    drawn, begun = [], time.process_time()
    for at in range(0, len(names), batch):
        some = names[at : at + batch]
        drawn.append(sora.generate_image(some, seed=at, together=True, **options))
    return torch.cat(drawn), (time.process_time() - begun) / len(names)


def picture(numbers: dict[str, Any], path: Path) -> None:
    """Nearness to the plain 24 steps, and the judge's accuracy, over the time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    near, right = figure.subplots(1, 2)
    for kind, mark in (("euler", "o-"), ("unipc", "s-"), ("cache", "^-"), (STUDENT, "*")):
        some = [
            it
            for title, it in numbers.items()
            if ("cache" if "cache" in title else title.split(",")[0]) == kind
        ]
        times = [it["seconds"] for it in some]
        compared = [it for it in some if it["psnr"] < 90]
        near.plot([it["seconds"] for it in compared], [it["psnr"] for it in compared], mark, label=kind)
        right.plot(times, [100 * it["top1"] for it in some], mark, label=kind)
    near.set(xlabel="CPU seconds a picture", ylabel="PSNR to 24 steps, dB")
    right.set(xlabel="CPU seconds a picture", ylabel="picked out by the judge, %")
    near.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
