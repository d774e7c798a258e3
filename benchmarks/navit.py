"""Pictures of mixed sizes without padding: ours beside vit-pytorch's NaViT, padding and buckets, in one run.

    pip install --no-deps vit-pytorch
    python benchmarks/navit.py [--quick] [--pictures 64] [--rounds 5] [--threads 1] [--sides ours] [--out runs/navit]

64 pictures with sides drawn from 64, 96, ..., 256 pixels, patches of 16, 384 channels, 6 blocks, 6 heads, an MLP of
1,536, 10 classes; a forward pass without gradients, and a training step (AdamW) of all 64.

ours              encoders/navit.py, all pictures in one sequence, AdamW fused
ours, packs       the same in packs of 1,024 tokens, their gradients added up
ours, buckets     the same tower on one shape at a time, gradients added up
masked            vit-pytorch's NaViT, packs of at most 256, 512 or 1,024 tokens under a mask: the best of these
nested            its NaViT on jagged tensors
padded            its SimpleViT, every picture padded to 256 x 256
square            its SimpleViT, every picture resized to the square of the mean number of tokens

First: with equal weights ours and vit-pytorch's agree, where the architectures do (without biases, without the two
norms around its patch projection, without ours behind the pooling). Sides take turns, in another order every round; all
run with freed memory kept, as our training loop has it. A time is the processor's with one thread, and counts where
other work took the least of the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import turns
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from reverie.data.packing import packed
from reverie.encoders.navit import Navit, NavitConfig
from reverie.train.allocator import kept_memory

CLASSES, BUDGET = 10, 1024
CONFIG = NavitConfig(patch=16, area=256 * 256, width=384, depth=6, heads=6, eps=1e-5)
THEIRS = {"patch_size": 16, "num_classes": CLASSES, "dim": 384, "depth": 6, "heads": 6, "mlp_dim": 1536}
BEST = (256, 512, 1024)
SIDES = ("ours", "ours, packs", "ours, buckets", "masked", "nested", "padded", "square")


def vit_pytorch(module: str) -> Any:
    """One module of the package, without its first file, which imports torchvision. SystemExit: it is not there."""
    if "vit_pytorch" not in sys.modules:
        found = importlib.util.find_spec("vit_pytorch")
        if found is None or found.submodule_search_locations is None:
            raise SystemExit("vit-pytorch is missing: `pip install --no-deps vit-pytorch` beside Reverie.")
        package = types.ModuleType("vit_pytorch")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["vit_pytorch"] = package
    return importlib.import_module(f"vit_pytorch.{module}")


class Ours(nn.Module):
    """The tower and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = Navit(CONFIG), nn.Linear(CONFIG.width, CLASSES, bias=False)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.head(self.tower.embed(images))


def pictures(count: int) -> tuple[list[Tensor], Tensor]:
    draw = random.Random(0)
    sizes = [(draw.choice(range(64, 257, 32)), draw.choice(range(64, 257, 32))) for _ in range(count)]
    made = torch.Generator().manual_seed(0)
    images = [torch.randn(3, height, width, generator=made) for height, width in sizes]
    return images, torch.randint(0, CLASSES, (count,), generator=made)


class Case:
    """One side: what computes the classes of which pictures, part by part, and its optimizer."""

    def __init__(
        self, model: nn.Module, parts: list[tuple[Callable[[], Tensor], Tensor]], *, fused: bool = False
    ):
        self.model, self.parts = model, parts
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=fused)
        self.count = sum(len(labels) for _, labels in parts)

    @torch.no_grad()
    def forward(self) -> None:
        for compute, _ in self.parts:
            compute()

    def loss(self, compute: Callable[[], Tensor], labels: Tensor) -> Tensor:
        return F.cross_entropy(compute(), labels, reduction="sum") / self.count

    def train(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for compute, labels in self.parts:
            self.loss(compute, labels).backward()
        self.optimizer.step()

    def operations(self) -> float:
        """Of a training step, by torch's counter, which does not know attention on a CPU by itself; nan if jagged."""
        aten = torch.ops.aten
        known = {
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
                sdpa_flop_count(q, k, v)
            ),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: (
                sdpa_backward_flop_count(g, q, k, v)
            ),
        }
        try:
            with FlopCounterMode(display=False, custom_mapping=known) as counter:
                self.train()
        except TypeError:  # it refuses jagged tensors
            self.train()
            return math.nan
        return counter.get_total_flops()


def cases(images: list[Tensor], labels: Tensor, wanted: set[str]) -> dict[str, Callable[[], Case]]:
    """Makers of the sides: only one is in memory when it is new, and weights are small."""
    lengths = [image.shape[1] * image.shape[2] // 256 for image in images]
    mean = round((sum(lengths) / len(images)) ** 0.5) * 16

    def some(model: nn.Module, places: list[int]) -> tuple[Callable[[], Tensor], Tensor]:
        part = [images[i] for i in places]
        return lambda: model(part), labels[places]

    def ours(groups: list[list[int]]) -> Case:
        model = Ours()
        return Case(model, [some(model, places) for places in groups], fused=True)

    def masked(longest: int) -> Case:
        model = vit_pytorch("na_vit").NaViT(image_size=256, **THEIRS)
        return Case(model, [(lambda: model(images, group_images=True, group_max_seq_len=longest), labels)])

    def nested() -> Case:
        model = vit_pytorch("na_vit_nested_tensor").NaViT(image_size=256, token_dropout_prob=0.0, **THEIRS)
        return Case(model, [(lambda: model(images), labels)])

    def simple(size: int, batch: Tensor) -> Case:
        model = vit_pytorch("simple_vit").SimpleViT(image_size=size, **THEIRS)
        return Case(model, [(lambda: model(batch), labels)])

    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        shapes.setdefault(tuple(image.shape), []).append(i)
    made: dict[str, Callable[[], Case]] = {
        "ours": lambda: ours([list(range(len(images)))]),
        "ours, packs": lambda: ours(packed(lengths, budget=BUDGET, seed=0, epoch=0)),
        "ours, buckets": lambda: ours(list(shapes.values())),
        **{f"masked {n}": lambda n=n: masked(n) for n in BEST},
        "nested": nested,
        "padded": lambda: simple(
            256, torch.stack([F.pad(x, (0, 256 - x.shape[2], 0, 256 - x.shape[1])) for x in images])
        ),
        "square": lambda: simple(
            mean, torch.cat([F.interpolate(x[None], size=(mean, mean), mode="bilinear") for x in images])
        ),
    }
    return {name: make for name, make in made.items() if name in wanted or name.split()[0] in wanted}


# ---------------------------------------------------------------- equal weights, equal results


@torch.no_grad()
def agree(images: list[Tensor]) -> dict[str, float]:
    """The greatest difference between ours, packed, and vit-pytorch's nested tensors, in units of their spread."""
    ours, theirs = (
        Navit(CONFIG).eval(),
        vit_pytorch("na_vit_nested_tensor").NaViT(image_size=256, **THEIRS).eval(),
    )
    ours.pooling.mlp.down.weight.zero_()
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    projection = theirs.to_patch_embedding
    projection[0] = projection[2] = theirs.mlp_head = theirs.attn_pool.norm = nn.Identity()
    theirs.attn_pool.query_norm = theirs.attn_pool.key_norm = nn.Identity()
    for parameter in theirs.parameters():
        parameter.zero_()
    rows = theirs.pos_embed_height.shape[0]
    pairs = [(projection[1].weight, ours.stem.weight), (theirs.pos_embed_height, ours.rows[:rows]),
             (theirs.pos_embed_width, ours.columns[:rows]), (theirs.transformer.norm.weight, ours.norm.weight),
             (theirs.attn_pool_queries, ours.pooling.query), (theirs.attn_pool.to_queries.weight, torch.eye(384)),
             (theirs.attn_pool.to_keys.weight, ours.pooling.k.weight),
             (theirs.attn_pool.to_values.weight, ours.pooling.v.weight),
             (theirs.attn_pool.to_out.weight, ours.pooling.out.weight)]  # fmt: skip
    for (attention, mlp), block in zip(theirs.transformer.layers, ours.blocks, strict=True):
        q, k, v = block.attention.qkv.weight.chunk(3)
        pairs += [(attention.norm.weight, block.norm1.weight), (attention.to_queries.weight, q),
                  (attention.to_keys.weight, k), (attention.to_values.weight, v),
                  (attention.query_norm.weight, block.attention.norm_q.weight),
                  (attention.key_norm.weight, block.attention.norm_k.weight),
                  (attention.to_out.weight, block.attention.out.weight), (mlp[0].weight, block.norm2.weight),
                  (mlp[1].weight, block.mlp.up.weight), (mlp[4].weight, block.mlp.down.weight)]  # fmt: skip
    for there, here in pairs:
        there.copy_(here)
    expected, found = theirs(images), ours.embed(images)
    return {"spread": expected.std().item(), "difference": (expected - found).abs().max().item()}


# ---------------------------------------------------------------- taking turns


def timed(action: Callable[[], None], clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and the cores that others used meanwhile."""
    whole, own, wall, at = turns.busy(), time.process_time(), time.perf_counter(), clock()
    action()
    took, wall = clock() - at, time.perf_counter() - wall
    return took, turns.others(wall, time.process_time() - own, whole)


def undisturbed(blocks: list[tuple[float, float]]) -> list[float]:
    """The times of the half of the blocks in which others used the least."""
    return [seconds for seconds, _ in sorted(blocks, key=lambda block: block[1])[: (len(blocks) + 1) // 2]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--quick", action="store_true", help="12 pictures, 2 rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/navit"))
    asked = parser.parse_args()
    count, rounds = (12, 2) if asked.quick else (asked.pictures, asked.rounds)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    images, labels = pictures(count)
    tokens = sum(image.shape[1] * image.shape[2] // 256 for image in images)
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    result: dict[str, Any] = {
        "pictures": count,
        "tokens": tokens,
        "threads": asked.threads,
        "torch": torch.__version__,
    }
    result["agreement"] = agree(images[:16])
    print(json.dumps(result), flush=True)
    assert result["agreement"]["difference"] < 1e-3 * result["agreement"]["spread"]
    with kept_memory(torch.device("cpu")):
        sides = {name: make() for name, make in cases(images, labels, set(asked.sides)).items()}
        work = {name: side.operations() for name, side in sides.items()}  # fills caches
        first = {name: timed(side.train, clock)[0] for name, side in sides.items()}
        print(json.dumps({"first": first, "operations": work}), flush=True)
        rivals = sorted((name for name in sides if name.startswith("masked")), key=first.__getitem__)
        for name in rivals[1:]:
            del sides[name]
        blocks: dict[tuple[str, str], list[tuple[float, float]]] = {}
        order = list(sides)
        for number in range(rounds):
            random.Random(number).shuffle(order)
            for name in order:
                for what in ("forward", "train"):
                    blocks.setdefault((name, what), []).append(timed(getattr(sides[name], what), clock))
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for name in sides:
        row: dict[str, Any] = {"side": name, "operations": work[name], "parameters": sum(
            p.numel() for p in sides[name].model.parameters())}  # fmt: skip
        for what in ("forward", "train"):
            times = undisturbed(blocks[name, what])
            row[what] = statistics.median(times)
            row[f"{what}_spread"] = (max(times) - min(times)) / row[what]
            row[f"{what}_others"] = statistics.median(load for _, load in blocks[name, what])
        rows.append(row)
    result |= {"rows": rows, "tried": {name: first[name] for name in rivals}}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "numbers.json").write_text(json.dumps(result, indent=1) + "\n")
    table = report(rows, count)
    (asked.out / "table.md").write_text(table)
    print(table)


def report(rows: list[dict[str, Any]], count: int) -> str:
    ours = next((row for row in rows if row["side"] == "ours"), rows[0])
    lines = ["| side | forward, pictures/s | ours is quicker | step, pictures/s | ours is quicker | spread | GFLOP |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['side']} | {count / row['forward']:.1f} | {row['forward'] / ours['forward']:.2f}"
            f" | {count / row['train']:.1f} | {row['train'] / ours['train']:.2f} | {row['train_spread']:.0%}"
            f" | {row['operations'] / 1e9:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
