"""`reverie plan --check`: what published runs took beside what the plan says of them.

Each run is planned by the counting and the constants that every plan uses. One constant, `roofline.ATTAINED`, is the
rounded median over the runs of CLIP below, so for these the check is of how far they lie apart; the other runs had no
part in it. Systems that Reverie has not are counted from their shapes by the small modules here, built of its parts;
they cannot be trained.

Before 2023 there was no fused attention in these codes, so it is counted as products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.encoders.vit import Vit, VitConfig
from reverie.nn.attention import CrossAttention, SelfAttention, attend
from reverie.nn.block import ModulatedBlock, modulate
from reverie.nn.linear import Linear
from reverie.nn.mlp import Mlp
from reverie.objectives.contrastive import Peers
from reverie.planning.hardware import device
from reverie.planning.plan import How, Part, Plan, Subject, draw_up, subject
from reverie.planning.roofline import Setup
from reverie.progress import track

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run: `rate` in samples a second on each device, over `samples` in all."""

    name: str
    gpu: str
    gpus: int
    batch: int  # on each device
    samples: float
    rate: float
    precision: str
    recompute: bool = False
    fused: bool = False
    shard: str = "ddp"
    size: int | None = None
    of: Callable[[int], Subject] | None = None  # from the batch of all devices; None: the CLIP of that name
    source: str
    calibrates: bool = True  # had a part in `roofline.ATTAINED`
    memory: float = 0.0  # bytes on a device, where published
    remark: str = ""

    def plan(self) -> Plan:
        how = How(precision=self.precision, fused=self.fused, recompute=self.recompute)
        batch = self.batch * self.gpus
        if self.of is None:
            what = subject(f"clip:{self.name}", how, batch=batch, clips=None, steps=1, size=self.size)
        else:
            what = self.of(batch)
        setup = Setup(
            device=device(self.gpu), gpus=self.gpus, shard=self.shard if self.gpus > 1 else "none",
            precision=self.precision, ema=what.ema,
        )  # fmt: skip
        return draw_up(what, how, setup, advise=False)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run beside its plan; `error` is of the device-days, above 0 where the plan says more than was taken."""

    run: Run
    plan: Plan

    @property
    def published(self) -> float:
        """Device-days."""
        return self.run.samples / self.run.rate / DAY

    @property
    def predicted(self) -> float:
        return self.run.samples / (self.plan.rate / self.run.gpus) / DAY

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1

    @property
    def attained(self) -> float:
        """The share of the roofline that the run reached."""
        return self.run.rate * self.plan.time.ideal / self.run.batch

    def numbers(self) -> dict[str, Any]:
        return {
            "run": self.run.name, "gpu": self.run.gpu, "gpus": self.run.gpus, "source": self.run.source,
            "remark": self.run.remark, "calibrates": self.run.calibrates, "gpu_days_published": self.published,
            "gpu_days_planned": self.predicted, "error": self.error, "share_of_roofline": self.attained,
            "plan": self.plan.numbers(),
        }  # fmt: skip


# ---------------------------------------------------------------- systems that are counted alone


class QFormer(nn.Module):
    """BLIP-2's first stage (2301.12597): a frozen ViT-g, whose features 32 queries read in every second of 12 layers.

    BERT-base's sizes; three passes: queries, texts alone (twice, of which one is the captions' loss), and queries with
    texts for matching, for each pair and two hard negatives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image = Vit(VitConfig(patch=14, width=1408, depth=39, heads=16, hidden=6144, activation="gelu"))
        self.image.requires_grad_(False)
        self.queries = nn.Parameter(torch.empty(32, 768))
        self.words = nn.Embedding(30_523, 768)
        self.blocks = nn.ModuleList(QLayer(cross=layer % 2 == 0) for layer in range(12))

    def loss(self, items: int) -> Tensor:
        with torch.no_grad():
            features = self.image(torch.empty(items, 3, 224, 224, device="meta"))
        texts = self.words(torch.empty(items, 32, dtype=torch.long, device="meta"))
        queries = self.queries.expand(items, -1, -1)
        both = torch.cat([queries, texts], dim=1).repeat(3, 1, 1)
        passes = [
            (queries, features, 32),
            (texts, None, 0),
            (texts, None, 0),
            (both, features.repeat(3, 1, 1), 32),
        ]
        total = torch.zeros((), device="meta")
        for number, (x, context, seen) in enumerate(passes):
            for layer in self.blocks:
                x = layer(x, context, seen)
            if number == 2:
                x = F.linear(x, self.words.weight)
            total = total + x.float().square().mean()
        return total


class QLayer(nn.Module):
    """Queries and texts attend to all and have MLPs of their own; queries alone read the picture."""

    def __init__(self, *, cross: bool):
        super().__init__()
        self.attention, self.norm = SelfAttention(768, 12), nn.LayerNorm(768)
        self.cross = CrossAttention(768, 12, context_width=1408) if cross else None
        self.of_queries, self.of_texts = Mlp(768, 3072), Mlp(768, 3072)

    def forward(self, x: Tensor, context: Tensor | None, queries: int) -> Tensor:
        x = self.norm(x + self.attention(x))
        seen, words = x[:, :queries], x[:, queries:]
        if self.cross is not None and context is not None:
            seen = seen + self.cross(seen, context)
        return torch.cat([seen + self.of_queries(seen), words + self.of_texts(words)], dim=1)


class Dit(nn.Module):
    """DiT-XL/2 (2212.09748) at 256 pixels in latents of 32 x 32 x 4: our block without its cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(16, 1152), nn.Linear(1152, 32)
        self.time = nn.Sequential(nn.Linear(256, 1152), nn.SiLU(), nn.Linear(1152, 1152))
        self.label = nn.Embedding(1001, 1152)
        self.modulation = nn.Linear(1152, 2 * 1152)
        self.blocks = nn.ModuleList(ModulatedBlock(1152, 16, context_width=8) for _ in range(28))
        for block in self.blocks:
            assert isinstance(block, ModulatedBlock)
            block.cross = nn.Identity()  # type: ignore[assignment]
            block.norm_context = nn.Identity()  # type: ignore[assignment]
            block.forward = partial(_without_cross, block)  # type: ignore[method-assign]

    def loss(self, items: int) -> Tensor:
        x = self.embed(torch.empty(items, 256, 16, device="meta"))
        vector = self.time(torch.empty(items, 1, 256, device="meta"))
        vector = vector + self.label(torch.empty(items, 1, dtype=torch.long, device="meta"))
        for block in self.blocks:
            x = block(x, vector)
        shift, scale = self.modulation(F.silu(vector)).chunk(2, -1)
        return self.out(modulate(x, shift, scale)).float().square().mean()


def _without_cross(block: ModulatedBlock, x: Tensor, vector: Tensor) -> Tensor:
    parts = rearrange(block.modulation(vector), "b 1 (six d) -> six b 1 d", six=6)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    x = x + gate1 * block.attention(modulate(block.norm1(x), shift1, scale1))
    return x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))


class MMDit(nn.Module):
    """Open-Sora 2.0's transformer (2503.09642, FLUX's layout): 19 blocks of two streams, 38 of one, width 3072.

    As its stage1.py has it, all blocks but eleven of the first kind are computed again in backward.
    """

    def __init__(self, *, frames: int, text: int = 512, again: int = 8):
        super().__init__()
        self.places, self.text = frames * 256, text
        self.embed, self.context, self.out = (
            nn.Linear(*size) for size in ((64, 3072), (4096, 3072), (3072, 64))
        )
        self.vector = nn.Sequential(nn.Linear(256, 3072), nn.SiLU(), nn.Linear(3072, 3072))
        self.first = again
        self.blocks = nn.ModuleList([Two() for _ in range(again)] + [One() for _ in range(38)])
        self.kept = nn.Sequential(*(Two() for _ in range(19 - again)))  # in no list, so not computed again

    def loss(self, items: int) -> Tensor:
        x = self.embed(torch.empty(items, self.places, 64, device="meta"))
        words = self.context(torch.empty(items, self.text, 4096, device="meta"))
        vector = self.vector(torch.empty(items, 1, 256, device="meta"))
        for block in (*self.blocks[: self.first], *self.kept):
            x, words = block(x, words, vector)
        x = torch.cat([words, x], dim=1)
        for block in self.blocks[self.first :]:
            x = block(x, vector)
        return self.out(x[:, self.text :]).float().square().mean()


def _heads(qkv: Tensor) -> Tensor:
    return rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=24)


class Stream(nn.Module):
    """The weights of one of two kinds of tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation, self.norm = Linear(width, 6 * width), nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.mlp = Mlp(width, 4 * width, activation="gelu_tanh")

    def heads(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return _heads(self.qkv(modulate(self.norm(x), parts[0], parts[1])))

    def rest(self, x: Tensor, mixed: Tensor, parts: Sequence[Tensor]) -> Tensor:
        x = x + parts[2] * self.out(mixed)
        return x + parts[5] * self.mlp(modulate(self.norm(x), parts[3], parts[4]))


class Two(nn.Module):
    """A stream of patches and one of words, with weights of their own, that attend to each other as one sequence."""

    def __init__(self, width: int = 3072):
        super().__init__()
        self.words, self.patches = Stream(width), Stream(width)

    def forward(self, x: Tensor, words: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        own = self.patches.modulation(F.silu(vector)).chunk(6, -1)
        others = self.words.modulation(F.silu(vector)).chunk(6, -1)
        q, k, v = torch.cat([self.words.heads(words, others), self.patches.heads(x, own)], dim=3)
        mixed = rearrange(attend(q, k, v), "b heads n d -> b n (heads d)")
        before, after = mixed.split([words.shape[1], x.shape[1]], 1)
        return self.patches.rest(x, after, own), self.words.rest(words, before, others)


class One(nn.Module):
    """Attention and MLP side by side, each product shared by both."""

    def __init__(self, width: int = 3072):
        super().__init__()
        self.width = width
        self.modulation, self.norm = Linear(width, 3 * width), nn.LayerNorm(width, elementwise_affine=False)
        self.up, self.down = Linear(width, 7 * width), Linear(5 * width, width)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(vector)).chunk(3, -1)
        qkv, inner = self.up(modulate(self.norm(x), shift, scale)).split([3 * self.width, 4 * self.width], -1)
        mixed = rearrange(attend(*_heads(qkv)), "b heads n d -> b n (heads d)")
        return x + gate * self.down(torch.cat([mixed, F.gelu(inner, approximate="tanh")], dim=-1))


def _counted(build: Callable[[], nn.Module], what: str, batch: int) -> Subject:
    def loss(model: nn.Module, items: int, how: How, peers: Peers) -> Tensor:
        value: Tensor = model.loss(items)  # type: ignore[operator]
        return value

    part = Part(what=what, batch=batch, pixels=256**2, loss=loss)
    return Subject(name=what, build=build, parts=(part,), steps=1)


# ---------------------------------------------------------------- the runs

_CLIP = "2103.00020, section 2.5"
_LAION = "open_clip, docs/PRETRAINED.md"
_SCALING = "the runs of 2212.07143, trained_models_info.csv"
_NEMO = "NVIDIA NeMo's user guide, CLIP performance, 2023"

RUNS: Sequence[Run] = (
    Run(
        name="ViT-L-14", gpu="v100-32", gpus=256, batch=128, samples=12.8e9, rate=12.8e9 / (256 * 12 * DAY),
        precision="fp16", recompute=True, source=f"{_CLIP}: 12 days",
    ),
    Run(
        name="RN50x64", gpu="v100-32", gpus=592, batch=55, samples=12.8e9, rate=12.8e9 / (592 * 18 * DAY),
        precision="fp16", source=f"{_CLIP}: 18 days", remark="recompute, which it used, is not counted",
    ),
    Run(
        name="ViT-B-32", gpu="a100-40", gpus=128, batch=256, samples=12.8e9, rate=12.8e9 / (4600 * 3600),
        precision="fp16", source=f"{_LAION}: 4,600 hours",
    ),
    Run(
        name="ViT-B-16", gpu="a100-40", gpus=176, batch=192, samples=12.8e9, rate=12.8e9 / (10_700 * 3600),
        precision="fp16", source=f"{_LAION}: 10,700 hours",
    ),
    Run(
        name="ViT-L-14", gpu="a100-40", gpus=400, batch=96, samples=12.8e9, rate=12.8e9 / (50_800 * 3600),
        precision="fp16", recompute=True, source=f"{_LAION}: 50,800 hours",
    ),
    Run(
        name="ViT-B-32", gpu="a100-40", gpus=344, batch=256, samples=3e9, rate=219_759 / 344, precision="fp16",
        source=f"{_SCALING}: 219,759 samples/s",
    ),
    Run(
        name="ViT-B-16", gpu="a100-40", gpus=344, batch=256, samples=3e9, rate=136_371 / 344, precision="fp16",
        source=f"{_SCALING}: 136,371 samples/s",
    ),
    Run(
        name="ViT-L-14", gpu="a100-40", gpus=1024, batch=84, samples=34e9, rate=79_116 / 1024, precision="fp16",
        recompute=True, source=f"{_SCALING}: 79,116 samples/s",
    ),
    Run(
        name="ViT-g-14", gpu="a100-80", gpus=8, batch=80, samples=12.8e9, rate=559 / 8, precision="bf16",
        fused=True, source=f"{_NEMO}: 559 samples/s", remark="batch of each device not published",
    ),
    Run(
        name="ViT-g-14", gpu="h100", gpus=8, batch=80, samples=12.8e9, rate=935 / 8, precision="bf16",
        fused=True, source=f"{_NEMO}: 935 samples/s", remark="batch of each device not published",
    ),
    Run(
        name="DiT-XL/2", gpu="a100-80", gpus=1, batch=128, samples=400e3 * 256, rate=0.84 * 128, precision="fp16",
        recompute=True, fused=True, of=lambda batch: _counted(Dit, "DiT-XL/2", batch), memory=27_485 * 2**20,
        calibrates=False, source="chuanyangjin/fast-DiT, README: 0.84 steps/s at 128, 27,485 MB",
    ),
    Run(
        name="BLIP-2, stage 1", gpu="a100-40", gpus=16, batch=105, samples=250e3 * 1680,
        rate=250e3 * 1680 / (16 * 6 * DAY), precision="fp16",
        of=lambda batch: _counted(QFormer, "BLIP-2, stage 1", batch), calibrates=False,
        source="2301.12597, section 3.4: less than 6 days", remark="an upper bound; counted from shapes",
    ),
    Run(
        name="Open-Sora 2.0, stage 1", gpu="h200", gpus=224, batch=12, samples=85e3 * 12 * 224,
        rate=85e3 * 12 / (10 * DAY), precision="bf16", recompute=True, fused=True, shard="fsdp",
        of=lambda batch: _counted(lambda: MMDit(frames=9), "Open-Sora 2.0, stage 1", batch), calibrates=False,
        source="2503.09642: 85,000 steps, 2,240 GPU-days", memory=0.0,
        remark="all steps as 12 clips of 33 frames; its video codec and T5, computed in the step, are not counted",
    ),
)  # fmt: skip


def check(runs: Sequence[Run] = RUNS) -> list[Checked]:
    """Plans every run."""
    return [Checked(run=run, plan=run.plan()) for run in track(runs, total=len(runs), label="counting")]


def told(found: Sequence[Checked]) -> str:
    """The table, and what it comes to."""
    rows = [("run", "machine", "published", "planned", "error", "of roofline", "source")]
    rows += [
        (
            it.run.name,
            f"{it.run.gpus:,} x {it.run.gpu}",
            f"{it.published:,.0f}",
            f"{it.predicted:,.0f}",
            f"{it.error:+.0%}",
            f"{it.attained:.2f}",
            it.run.source + (f" ({it.run.remark})" if it.run.remark else ""),
        )
        for it in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join(
            [
                cell.rjust(w) if 2 <= i <= 5 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=False))
            ]
            + [row[-1]]
        )
        for row in rows
    ]
    lines.append("")
    lines.append("published and planned: GPU-days for the samples of the run")
    for name, some in (
        ("CLIP, whose median the constant is", [it for it in found if it.run.calibrates]),
        ("others, which had no part in it", [it for it in found if not it.run.calibrates]),
    ):
        if some:
            near = sum(abs(it.error) <= 0.3 for it in some)
            lines.append(
                f"{name}: {near} of {len(some)} within 30 %, median error {median(abs(it.error) for it in some):.0%},"
                f" share of the roofline {min(it.attained for it in some):.2f} to"
                f" {max(it.attained for it in some):.2f}, median {median(it.attained for it in some):.2f}"
            )
    for it in found:
        if it.run.memory:
            lines.append(
                f"memory of {it.run.name}: {it.run.memory / 1e9:.1f} GB published,"
                f" {it.plan.memory.total / 1e9:.1f} GB planned ({it.plan.memory.total / it.run.memory - 1:+.0%})"
            )
    return "\n".join(lines)
