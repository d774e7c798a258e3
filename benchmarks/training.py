"""A training step of CLIP beside open_clip and transformers: time, memory and share of the peak, in one run.

    python benchmarks/training.py [--model small b32] [--precision fp32] [--threads 1] [--rounds 5] [--json]
    python benchmarks/training.py --model b16 --drop 0 0.5 0.75 --sides reverie open_clip    # FLIP (2212.00794)
    python benchmarks/training.py --device cuda --model small b32 b16 --compile              # on a GPU

small   64 pixels in patches of 8, 256 x 6; text 256 x 4, 32 positions; batch 256 (8,192 on a GPU)
b32     ViT-B/32 at 224 pixels, 768 x 12; text 512 x 12, 77 positions; batch 16 (2,048 on a GPU)
b16     ViT-B/16, otherwise the same; batch 8 (1,024 on a GPU)

Every side trains on the same batches: random pictures, and as captions the lists of words that ship with the sample (13
tokens on average, 40 at most; labels alone would be 4). A step is forward, backward, the gradient clipped to 1,
and AdamW, each as its library trains:

reverie       the loop of `reverie.train`, checks and progress included, one `next()` a step
open_clip     `CLIP`, `ClipLoss`, its training's AdamW (betas 0.9 and 0.98, eps 1e-6, torch's default kernel), the scale
              clamped, texts padded to all positions, as its tokenizer does; `--fused` gives it the fused kernel
transformers  `CLIPModel(..., return_loss=True)`, texts padded to all positions with their mask, as in its run_clip.py;
              its Trainer's AdamW (fused)

First it is checked that from equal weights ours and open_clip's have equal loss and gradients, to 1e-5 of the largest
in fp32, and transformers' loss. Then each side has a process of its own, and a round is one step of each in turn. The
table has the medians. On a CPU with one thread the clock is the process's processor time, which other work disturbs
least; otherwise it is the time on the wall and the machine must be quiet. The JSON has both, and how long of the wall
forward, backward and update take. The share of the peak is the arithmetic that a side does, forward and twice for
backward, over what a product of two matrices of 2,048 reaches in the same rounds (8,192 on a GPU). Memory is
the most that the process held above its libraries.

`--drop`: the share of the patches that is not seen, drawn by each library in its own way; `tower` is the image tower
alone, forward and backward. bf16 is autocast; a CPU without bf16 arithmetic is left out of it unless it is asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clip import END, VOCAB, arithmetic
from peers import open_clip, torchvision_loads
from torch import Tensor, nn
from turns import Parts, by_processor, peak, running, serve, synchronised

from reverie import rng
from reverie.codecs.bpe import Bpe
from reverie.data.dropping import kept_patches
from reverie.data.index import Index
from reverie.data.stickers import sample_folder
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.systems.clip import Clip, ClipConfig
from reverie.train.log import Run
from reverie.train.loop import Player, train
from reverie.train.optimizers import adamw
from reverie.train.precision import autocast, native_bf16
from reverie.weights import clip_open_clip, clip_transformers, remap

SIDES = ("reverie", "open_clip", "transformers")
RATE, DECAY = 5e-4, 0.2  # open_clip's defaults
ENOUGH = 10**9  # steps: more than any round asks for


@dataclass(frozen=True, kw_only=True)
class Shape:
    size: int = 224
    patch: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    length: int = 77
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    space: int = 512
    batch: int
    gpu_batch: int

    def config(self) -> ClipConfig:
        return ClipConfig(
            image=VitConfig(size=self.size, patch=self.patch, width=self.width, depth=self.depth, heads=self.heads,
                            activation="gelu"),
            text=TextConfig(vocab=VOCAB, end=END, length=self.length, width=self.text_width, depth=self.text_depth,
                            heads=self.text_heads, activation="gelu", pool="argmax"),
            width=self.space,
        )  # fmt: skip

    def patches(self, drop: float) -> int:
        return round((self.size // self.patch) ** 2 * (1 - drop))

    def work(self, lengths: list[int], drop: float, *, one_at_last: bool) -> float:
        """Operations of a step on texts of these lengths; `one_at_last`: the last blocks compute only what is read."""
        stem = 2.0 * len(lengths) * self.patches(0) * 3 * self.patch**2 * self.width
        seen = [self.patches(drop) + 1] * len(lengths)
        total = stem
        for each, width, depth in (
            (seen, self.width, self.depth),
            (lengths, self.text_width, self.text_depth),
        ):
            total += arithmetic(each, width, depth - one_at_last)
            if one_at_last:  # keys and values of all positions, and of all a query that nobody asks
                total += sum(2.0 * (3 * width**2 * n + 9 * width**2 + 2 * width * n) for n in each)
        return 3 * total


SHAPES = {
    "small": Shape(size=64, patch=8, width=256, depth=6, heads=4, length=32, text_width=256, text_depth=4,
                   text_heads=4, space=256, batch=256, gpu_batch=8192),
    "b32": Shape(patch=32, batch=16, gpu_batch=2048),
    "b16": Shape(patch=16, batch=8, gpu_batch=1024),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: what every side is given."""

    model: str
    precision: str
    drop: float
    batch: int
    device: str
    compile: bool
    fused: bool

    def data(self) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1], tokens cut to the positions of the model: the same in every process."""
        shape, generator = SHAPES[self.model], torch.Generator().manual_seed(0)
        images = torch.rand(self.batch, 3, shape.size, shape.size, generator=generator) * 2 - 1
        tokens = captions()[:, : shape.length]
        tokens = tokens[(tokens == END).any(1)]  # those that fit
        tokens = tokens.repeat(math.ceil(self.batch / len(tokens)), 1)[: self.batch]
        return images.to(self.device), tokens.to(self.device)

    def lengths(self, side: str) -> list[int]:
        tokens = self.data()[1]
        if side != "reverie":
            return [tokens.shape[1]] * len(tokens)
        return ((tokens == END).int().argmax(1) + 1).tolist()


def captions() -> Tensor:
    """The lists of words that ship with the sample, in an order that mixes lengths, as CLIP's tokens `count 77`."""
    found = {c.text for item in Index.read(sample_folder()) for c in item.captions if c.source == "tags"}
    texts = sorted(text for text in found if text.isascii())
    order = torch.randperm(len(texts), generator=rng.generator(0, "captions"))
    return Bpe.clip().encode([texts[i] for i in order.tolist()], length=77)


# The sides: each a step, and the image tower alone, forward and backward ---------------------------------------------

Step = Callable[[], Parts]


def reverie(case: Case) -> tuple[Step, Step]:
    model = Clip(SHAPES[case.model].config()).to(case.device).train()
    images, tokens = case.data()
    if case.compile:
        for module in model.modules():
            if type(module).__name__ == "Block":
                module.compile()
    batch = {"image": images, "tokens": tokens}
    if case.drop:
        keys = [(0, i) for i in range(case.batch)]
        batch["keep"] = kept_patches(model.config.image.patches, case.drop, seed=0, keys=keys).to(case.device)
    optimizer = adamw(model, lr=RATE, weight_decay=DECAY, betas=(0.9, 0.98), eps=1e-6)
    parts: Parts = {}
    begun = {"at": 0.0}

    def loss(given: Any) -> Any:
        at = synchronised(case.device)
        found = model.loss(given)
        parts["forward"] = synchronised(case.device) - at
        return found

    def before(*_: Any) -> None:
        begun["at"] = synchronised(case.device)

    def after(*_: Any) -> None:
        parts["update"] = synchronised(case.device) - begun["at"]

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    folder = tempfile.TemporaryDirectory()
    steps = train(
        [Player(model, optimizer=optimizer, loss=loss, clip=1.0)], lambda step, micro: batch,
        run=Run(folder.name, {}), steps=ENOUGH, save_every=ENOUGH, precision=case.precision, estimate=False,
        device=case.device,
    )  # fmt: skip

    def step() -> Parts:
        assert folder  # which lives as long as the run
        assert not next(steps).skipped
        return parts

    def tower() -> Parts:
        with autocast(case.precision, torch.device(case.device)):
            vectors = model.embed_image(batch["image"], keep=batch.get("keep"))
        vectors.float().square().sum().backward()
        model.zero_grad()
        return {}

    return step, tower


def open_clip_model(shape: Shape, drop: float = 0.0) -> nn.Module:
    package = open_clip()
    vision = package.CLIPVisionCfg(layers=shape.depth, width=shape.width, head_width=shape.width // shape.heads,
                                   patch_size=shape.patch, image_size=shape.size, patch_dropout=drop)  # fmt: skip
    text = package.CLIPTextCfg(context_length=shape.length, vocab_size=VOCAB, width=shape.text_width,
                               heads=shape.text_heads, layers=shape.text_depth)  # fmt: skip
    return package.model.CLIP(shape.space, vision, text)


def coloured(images: Tensor) -> Tensor:
    """As their transforms give pictures."""
    config = ClipConfig()
    mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (config.mean, config.std))
    return ((images + 1) / 2 - mean) / std


def plain(case: Case, model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Step:
    """The step of a loop without anything else."""

    def step() -> Parts:
        at = synchronised(case.device)
        with autocast(case.precision, torch.device(case.device)):
            value = loss()
        forward = synchronised(case.device)
        value.backward()
        backward = synchronised(case.device)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value.item()
        return {
            "forward": forward - at,
            "backward": backward - forward,
            "update": synchronised(case.device) - backward,
        }

    return step


def open_clip_side(case: Case) -> tuple[Step, Step]:
    model = open_clip_model(SHAPES[case.model], case.drop).to(case.device).train()
    criterion = open_clip().ClipLoss()
    images, tokens = case.data()
    images = coloured(images)
    gains = [p for name, p in model.named_parameters() if p.ndim < 2 or "logit_scale" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}],
        lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True if case.fused else None,
    )  # fmt: skip
    whole = torch.compile(model) if case.compile else model
    inner = plain(case, model, lambda: criterion(*whole(images, tokens)), optimizer)

    def step() -> Parts:
        parts = inner()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return parts

    def tower() -> Parts:
        with autocast(case.precision, torch.device(case.device)):
            vectors = model.encode_image(images, normalize=True)
        vectors.float().square().sum().backward()
        model.zero_grad()
        return {}

    return step, tower


def transformers_model(shape: Shape) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torchvision_loads()
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": shape.width, "intermediate_size": 4 * shape.width, "num_hidden_layers": shape.depth,
              "num_attention_heads": shape.heads, "image_size": shape.size, "patch_size": shape.patch,
              "hidden_act": "gelu"}  # fmt: skip
    text = {"hidden_size": shape.text_width, "intermediate_size": 4 * shape.text_width,
            "num_hidden_layers": shape.text_depth, "num_attention_heads": shape.text_heads,
            "max_position_embeddings": shape.length, "vocab_size": VOCAB, "hidden_act": "gelu",
            "eos_token_id": END}  # fmt: skip
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=shape.space))


def masked(tokens: Tensor) -> dict[str, Tensor]:
    """Tokens with transformers' mask: the end token is the last that is read."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    ends = (tokens == END).int().argmax(1, keepdim=True)
    return {"input_ids": tokens, "attention_mask": (places <= ends).long()}


def transformers(case: Case) -> tuple[Step, Step]:
    if case.drop:
        raise SystemExit("transformers' CLIP drops no patches: leave --drop or that side out.")
    model = transformers_model(SHAPES[case.model]).to(case.device).train()
    images, tokens = case.data()
    given = {"pixel_values": coloured(images), **masked(tokens)}
    names = {"bias", "norm", "embedding.weight"}  # none of which decays in its Trainer
    gains = [p for name, p in model.named_parameters() if p.ndim < 2 or any(n in name for n in names)]
    rest = [p for name, p in model.named_parameters() if p.ndim >= 2 and not any(n in name for n in names)]
    optimizer = torch.optim.AdamW(
        [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}],
        lr=RATE, fused=True,
    )  # fmt: skip
    whole = torch.compile(model) if case.compile else model
    step = plain(case, model, lambda: whole(**given, return_loss=True).loss, optimizer)

    def tower() -> Parts:
        with autocast(case.precision, torch.device(case.device)):
            vectors = model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
        vectors.float().square().sum().backward()
        model.zero_grad()
        return {}

    return step, tower


MAKERS = {"reverie": reverie, "open_clip": open_clip_side, "transformers": transformers}


# Equal before anything is timed -----------------------------------------------------------------------------------


def check(case: Case, sides: list[str]) -> dict[str, float]:
    """The largest difference of loss and gradients from ours at equal weights, over the largest gradient; fp32."""
    shape = SHAPES[case.model]
    torch.manual_seed(0)
    ours = Clip(shape.config()).train()
    images, tokens = (x[:8].cpu() for x in case.data())
    value = ours.loss({"image": images, "tokens": tokens})["loss"]
    value.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    values = {"image": {"kind": "vit", "pool": "class"}, "text_bias": False}
    found = {}
    for side in sides:
        if side == "reverie":
            continue
        if side == "open_clip":
            table = clip_open_clip.table(values, text="")
            theirs = open_clip_model(shape)
            theirs.load_state_dict(
                remap.apply(remap.invert(table), ours.state_dict()), strict=False
            )  # but its mask
            other = open_clip().ClipLoss()(*theirs.train()(coloured(images), tokens))
            other.backward()
            given = remap.apply(
                table, {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
            )
            assert given.keys() == gradients.keys()
            largest = max(g.abs().max() for g in gradients.values())
            apart = max((given[name] - g).abs().max() for name, g in gradients.items())
            found["open_clip gradients"] = float(apart / largest)
        else:
            table = clip_transformers.CLIP
            theirs = transformers_model(shape)
            theirs.load_state_dict(remap.apply(remap.invert(table), ours.state_dict()), strict=False)
            other = theirs.train()(pixel_values=coloured(images), **masked(tokens), return_loss=True).loss
        found[f"{side} loss"] = abs(other.item() - value.item()) / value.item()
    for what, apart in found.items():
        if not apart <= 1e-5:
            raise SystemExit(f"{case.model}: {what} differ from ours by {apart:.1e}; nothing was timed.")
    return found


# A process for each side --------------------------------------------------------------------------------------------


def worker(side: str, case: Case) -> None:
    def libraries() -> None:
        if side == "open_clip":
            open_clip()
        elif side == "transformers":
            torchvision_loads()
            from transformers import CLIPModel  # noqa: F401

    def make() -> dict[str, Step]:
        step, tower = MAKERS[side](case)
        return {"step": step, "tower": tower}

    serve(libraries, make, device=case.device)


# The report -----------------------------------------------------------------------------------------------------------


def measure(case: Case, sides: list[str], rounds: int) -> list[dict[str, Any]]:
    words = ("step", "tower") if case.drop or case.model == "b16" else ("step",)
    taken: dict[tuple[str, str], list[dict[str, float]]] = {}
    memory: dict[str, float] = {}
    peaks = []
    # A GPU belongs to one side at a time, since each keeps what memory it once had there.
    for group in [[side] for side in sides] if case.device == "cuda" else [sides]:
        with running(__file__, group, json.dumps(case.__dict__), threads=torch.get_num_threads()) as found:
            for _ in range(rounds):
                peaks.append(peak(case.device, case.precision))
                for one in found:
                    for word in words:
                        taken.setdefault((one.name, word), []).append(one.ask(word))
                print(".", end="", file=sys.stderr, flush=True)
            memory |= {one.name: one.ask("memory")["mib"] for one in found}
    clock = "cpu" if by_processor(case.device) else "wall"
    rows = []
    for side in sides:
        steps = taken[side, "step"]
        row: dict[str, Any] = case.__dict__ | {
            "side": side,
            "clock": clock,
            "rounds": rounds,
            "mib": memory[side],
        }
        row |= {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        row["seconds"] = row[clock]
        row["least"], row["most"] = (choose(step[clock] for step in steps) for choose in (min, max))
        row["rate"] = case.batch / row["seconds"]
        lengths = case.lengths(side)
        row["tokens"] = sum(lengths) / len(lengths)
        row["peak"] = statistics.median(peaks)
        work = SHAPES[case.model].work(lengths, case.drop, one_at_last=side == "reverie")
        row["share"] = work / row["seconds"] / row["peak"]
        if "tower" in words:
            row["tower"] = statistics.median(one[clock] for one in taken[side, "tower"])
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], threads: int, device: str) -> str:
    names = [name for name in SIDES if any(row["side"] == name for row in rows)]
    clock = "processor time" if rows[0]["clock"] == "cpu" else "wall time"
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{threads} thread{'s' * (threads > 1)}, {clock}"
    )
    lines = [
        f"Samples a second (share of the matmul peak; peak memory), {where}, torch {torch.__version__}; others used "
        f"{statistics.fmean(row['others'] for row in rows):.1f} cores meanwhile.",
        "",
        f"| | tokens a text | {' | '.join(names)} |" + "".join(f" ours over {n} |" for n in names[1:]),
        f"|---|---:|{'---:|' * (2 * len(names) - 1)}",
    ]
    for key in dict.fromkeys((r["model"], r["precision"], r["batch"], r["drop"]) for r in rows):
        here = {r["side"]: r for r in rows if (r["model"], r["precision"], r["batch"], r["drop"]) == key}
        ours = here.get("reverie")
        cells = [
            f"{here[n]['rate']:.2f} ({here[n]['share']:.0%}; {here[n]['mib']:,} MiB)" if n in here else ""
            for n in names
        ]
        ratios = [f"{ours['rate'] / here[n]['rate']:.2f}" if ours and n in here else "" for n in names[1:]]
        dropped = f", {key[3]:.0%} dropped" if key[3] else ""
        read = f"{ours['tokens']:.1f}" if ours else ""
        lines.append(
            f"| {key[0]}, {key[1]}, batch {key[2]}{dropped} | {read} | {' | '.join(cells + ratios)} |"
        )
    gains = [row for row in rows if row["drop"]]
    whole = {(row["side"], row["model"], row["precision"]): row for row in rows if not row["drop"]}
    pairs = [
        (row, whole[key]) for row in gains if (key := (row["side"], row["model"], row["precision"])) in whole
    ]
    if pairs:
        lines += ["", "| patches dropped | | image tower, times as quick | step, times as quick |",
                  "|---|---|---:|---:|"]  # fmt: skip
        lines += [
            f"| {row['model']}, {row['precision']}, {row['drop']:.0%} | {row['side']} |"
            f" {full['tower'] / row['tower']:.2f} | {full['seconds'] / row['seconds']:.2f} |"
            for row, full in pairs
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["small", "b32"])
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), help="what the device has natively"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--drop", nargs="+", type=float, default=[0.0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="samples of a step, of every model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile, for all sides")
    parser.add_argument("--fused", action="store_true", help="open_clip with the fused AdamW")
    parser.add_argument("--json", action="store_true", help="the numbers to the screen, not the table")
    parser.add_argument("--out", type=Path, default=Path("runs/training-speed"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.worker:
        worker(asked.worker[0], Case(**json.loads(asked.worker[1])))
        return
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precisions = asked.precision or (["fp32", "bf16"] if native_bf16(torch.device(device)) else ["fp32"])
    rows: list[dict[str, Any]] = []
    equal: dict[str, Any] = {}
    for model in asked.model:
        shape = SHAPES[model]
        batch = asked.batch or (shape.gpu_batch if device == "cuda" else shape.batch)
        for precision in precisions:
            for drop in asked.drop:
                case = Case(model=model, precision=precision, drop=drop, batch=batch, device=device,
                            compile=asked.compile, fused=asked.fused)  # fmt: skip
                if model not in equal:
                    equal[model] = check(case, asked.sides)
                rows += measure(case, asked.sides, asked.rounds)
                text = table(rows, asked.threads, device)
                found = {"torch": torch.__version__, "threads": asked.threads, "rows": rows, "equal": equal}
                asked.out.mkdir(parents=True, exist_ok=True)  # after every case: the next may take long
                (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
                (asked.out / "table.md").write_text(text + "\n")
    print(file=sys.stderr)
    print(json.dumps(found, indent=1) if asked.json else text)


if __name__ == "__main__":
    main()
