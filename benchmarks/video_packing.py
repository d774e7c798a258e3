"""The video transformer on pictures and clips of many sizes: packs, buckets and padding, in turn in one process.

    python benchmarks/video_packing.py [--pictures 24] [--clips 4] [--budget 1024] [--rounds 3] [--device cuda] [--json]

Pictures with sides from 64 to 192 and clips of 2 to 12 frames with sides from 48 to 96, patches of 16, times and texts
of their own; 6 blocks of width 256. Every way computes the loss and the gradients of all items once:

packs      `data/packing.py` fills the budget; one sequence without padding
buckets    batches of one shape under the same budget
padding    batches of 8 in their shuffled order, each sequence padded to the longest of its batch (not even masked)
largest    all padded to the longest of all, in batches of 8

Outputs of packs, buckets and items alone are compared first. Time is the processor's with one thread, which other work
disturbs least; the table has medians, and how many of the computed tokens are real.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from turns import by_processor, synchronised

from reverie import rng
from reverie.backbones.video_dit import VideoDit, VideoDitConfig
from reverie.data.packing import bucketed, packed

CONFIG = VideoDitConfig(width=256, depth=6, heads=4, context_width=192, bottleneck=128, waves=8)
SIDE = CONFIG.patch[1]
TOGETHER = 8  # items of a padded batch
WORDS = 12


@dataclass
class Items:
    """The mixed set: signals `c f h w`, a time for each frame, the texts."""

    x: list[Tensor]
    t: list[Tensor]
    text: tuple[Tensor, Tensor, Tensor]

    def some(self, numbers: list[int]) -> tuple:
        of = torch.tensor(numbers, device=self.text[0].device)
        return [self.x[i] for i in numbers], [self.t[i] for i in numbers], *(part[of] for part in self.text)

    def padded(self, numbers: list[int], length: int) -> tuple:
        """The same texts and times beside sequences of `length` patches: a row of them costs what padded ones do."""
        _, _, *text = self.some(numbers)
        x = torch.randn(len(numbers), 3, 1, SIDE, length * SIDE, device=self.text[0].device)
        return x, torch.rand(len(numbers), 1, device=x.device), *text


def mixed(pictures: int, clips: int, device: str) -> Items:
    generator = rng.generator(0, "mixed")

    def among(low: int, high: int, step: int) -> int:
        return low + step * int(torch.randint((high - low) // step + 1, (), generator=generator))

    shapes = [(1, among(64, 192, 32), among(64, 192, 32)) for _ in range(pictures)]
    shapes += [(among(2, 12, 1), among(48, 96, 16), among(48, 96, 16)) for _ in range(clips)]
    count = len(shapes)
    x = [torch.randn(3, *shape, generator=generator).to(device) for shape in shapes]
    t = [torch.rand(1, generator=generator).expand(shape[0]).to(device) for shape in shapes]
    mask = torch.arange(WORDS) < torch.randint(3, WORDS + 1, (count, 1), generator=generator)
    text = (
        torch.randn(count, 192, generator=generator),
        torch.randn(count, WORDS, 192, generator=generator),
        mask,
    )
    return Items(x, t, tuple(part.to(device) for part in text))  # type: ignore[arg-type]


def tokens(x: Tensor) -> int:
    return x.shape[1] * (x.shape[2] // SIDE) * (x.shape[3] // SIDE)


def ways(items: Items, budget: int) -> dict[str, tuple[list[Callable[[], tuple]], int]]:
    """The batches of each way, and how many tokens it computes."""
    lengths = [tokens(x) for x in items.x]
    shapes = [tuple(x.shape) for x in items.x]
    order = rng.generator(0, "order")
    shuffled = torch.randperm(len(lengths), generator=order).tolist()
    groups = [shuffled[i : i + TOGETHER] for i in range(0, len(shuffled), TOGETHER)]
    packs = packed(lengths, budget=budget, seed=0, epoch=0)
    buckets = bucketed(shapes, lengths, budget=budget, seed=0, epoch=0)
    longest = [max(lengths[i] for i in group) for group in groups]

    def all_of(parts: list[list[int]]) -> list[Callable[[], tuple]]:
        return [lambda part=part: items.some(part) for part in parts]  # type: ignore[misc]

    def padded(to: list[int]) -> list[Callable[[], tuple]]:
        return [lambda g=group, n=n: items.padded(g, n) for group, n in zip(groups, to, strict=True)]  # type: ignore[misc]

    real = sum(lengths)
    return {
        "packs": (all_of(packs), real),
        "buckets": (all_of(buckets), real),
        "padding": (padded(longest), sum(n * len(g) for n, g in zip(longest, groups, strict=True))),
        "largest": (padded([max(lengths)] * len(groups)), max(lengths) * len(lengths)),
    }


def compare(model: VideoDit, items: Items, budget: int) -> float:
    """The most by which packs, buckets and items alone differ in what comes out."""
    lengths, shapes = [tokens(x) for x in items.x], [tuple(x.shape) for x in items.x]
    worst = 0.0
    with torch.no_grad():
        alone = [
            model(items.x[i][None], items.t[i][None], *(part[i : i + 1] for part in items.text))[0]
            for i in range(len(lengths))
        ]
        for parts in (
            packed(lengths, budget=budget, seed=0, epoch=0),
            bucketed(shapes, lengths, budget=budget, seed=0, epoch=0),
        ):
            for part in parts:
                outs = model(*items.some(part))
                worst = max(
                    worst, *(float((out - alone[i]).abs().max()) for out, i in zip(outs, part, strict=True))
                )
    return worst


def once(model: VideoDit, batches: list[Callable[[], tuple]], device: str, train: bool) -> float:
    """Seconds of all batches, forward alone or with gradients."""
    given = [batch() for batch in batches]
    model.zero_grad(set_to_none=True)
    wall, cpu = synchronised(device), time.process_time()
    for batch in given:
        with torch.set_grad_enabled(train):
            outs = model(*batch)
            loss = sum(out.square().sum() for out in outs) if isinstance(outs, list) else outs.square().sum()
        if train:
            loss.backward()  # type: ignore[union-attr]
    wall, cpu = synchronised(device) - wall, time.process_time() - cpu
    return cpu if by_processor(device) else wall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    model = VideoDit(CONFIG)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(asked.device)
    items = mixed(asked.pictures, asked.clips, asked.device)
    apart = compare(model, items, asked.budget)
    assert apart < 1e-3, f"packs and items alone differ by {apart:g}"
    real = sum(map(tokens, items.x))
    table = ways(items, asked.budget)
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(asked.rounds):
        for name, (batches, _) in table.items():
            for what in ("forward", "train"):
                times.setdefault((name, what), []).append(once(model, batches, asked.device, what == "train"))
        last = {" ".join(key): round(some[-1], 2) for key, some in times.items()}
        print(f"round {number + 1}: {json.dumps(last)}", file=sys.stderr, flush=True)
    results = [
        {
            "way": name,
            "batches": len(batches),
            "real": round(real / computed, 3),
            **{f"{what} s": round(statistics.median(times[name, what]), 3) for what in ("forward", "train")},
            "train tokens/s": round(real / statistics.median(times[name, "train"])),
        }
        for name, (batches, computed) in table.items()
    ]
    if asked.json:
        print(json.dumps({"items": len(items.x), "tokens": real, "apart": apart, "ways": results}))
        return
    print(
        f"{len(items.x)} items with {real:,} tokens; packs, buckets and items alone differ by {apart:.1g} at most"
    )
    print("| way | batches | real tokens | forward, s | with gradients, s | real tokens a second, training |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in results:
        print(
            f"| {row['way']} | {row['batches']} | {row['real']:.0%} | {row['forward s']:.2f} | {row['train s']:.2f} |"
            f" {row['train tokens/s']:,} |"
        )


if __name__ == "__main__":
    main()
