"""Our CLIP recipe beside open_clip's classes, both from random weights on the same pictures for the same time.

    python benchmarks/clip_training.py STICKERS [--minutes 12] [--out runs/clip-training]

STICKERS is the corpus of `reverie data stickers`. Both learn Fluent 3D and Noto (the training split, without skin
tones) on one thread each, one after the other, for the same processor time, which is what a shared machine leaves
comparable; both are then asked to name every Twemoji among all Twemoji's labels, and neither has seen one. Ours is
`reverie train clip-stickers --sources fluent-3d noto` as it stands, for as many steps as fill the time by a short
timing; open_clip then gets exactly the processor time that ours took, batches, views and tokens included.

open_clip's side, each choice in its favour where we had one: ViT of 64 pixels in patches of 16, 256 x 6; text 256 x 4,
16 positions, its own vocabulary of 49,408 (21 M parameters); its loss and tokenizer; its training defaults for AdamW
(betas 0.9 and 0.98, eps 1e-6, no decay on gains, biases and the temperature, which it clamps at 100) but the fused
kernel; a cosine over the time it has; bf16 where the processor has it, as ours. `--peer-lr`, `--peer-batch`,
`--peer-decay` and `--peer-view` try others. Captions are drawn by
our rules in English alone, since its vocabulary has no Chinese and the names asked for are English.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peers import open_clip
from torch import Tensor

from reverie import rng
from reverie.data.augment import draws, on_white, view
from reverie.data.index import Index
from reverie.data.order import batch_ids
from reverie.data.pixels import Pixels, cache_of
from reverie.data.wording import draw_caption
from reverie.evals.zero_shot import zero_shot
from reverie.recipes import clip as recipe
from reverie.recipes.parts import plain_stickers
from reverie.train.precision import autocast, resolve

SOURCES = ("fluent-3d", "noto")
SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path, help="the sticker corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/clip-training"))
    parser.add_argument("--minutes", type=float, default=12.0, help="of processor time, each")
    parser.add_argument("--only", choices=("ours", "open_clip"), help="one side, to try settings")
    parser.add_argument("--peer-batch", type=int, default=128)
    parser.add_argument("--peer-lr", type=float, default=1e-3)
    parser.add_argument("--peer-decay", type=float, default=0.2)
    parser.add_argument("--peer-view", choices=("crop", "jitter", "ours"), default="ours")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.only != "ours":
        open_clip()  # what is missing shows before the first minute
    corpus = plain_stickers(Index.read(asked.data))
    seconds = 60 * asked.minutes
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        learnt = view_of(corpus.select(split="train", video=False, sources=SOURCES), Path(folder) / "data")
        Pixels(learnt, size=SIZE, cache=cache_of(learnt))  # decoded before the clock runs
        if asked.only != "open_clip":
            sides.append(ours(learnt, Path(folder), seconds))
            seconds = sides[0]["cpu_seconds"]
        if asked.only != "ours":
            sides.append(theirs(learnt, seconds, asked))
    held = corpus.select(split="test", sources=("twemoji",))
    for side in sides:
        side |= measure(held, *side.pop("embed"))
    report(sides, asked, len(learnt))


def view_of(index: Index, folder: Path) -> Index:
    """The items of `index` alone as a folder of links, so that a recipe neither sees nor measures anything else."""
    folder.mkdir()
    for name in {item.file_name.partition("/")[0] for item in index} | {".reverie"}:
        if (index.folder / name).exists():
            (folder / name).symlink_to((index.folder / name).resolve())
    part = Index(folder, list(index))
    part.write()
    return part


def ours(index: Index, folder: Path, seconds: float) -> dict[str, Any]:
    """The recipe for the steps that take `seconds` of processor time, by two short runs of it."""

    def run(name: str, **steps: int) -> tuple[Any, float]:
        begin = time.process_time()
        model = recipe.stickers(index.folder, folder / name, sources=SOURCES, **steps)
        return model, time.process_time() - begin

    short, long = 12, 36
    run("warm", steps=2)
    times = [run(f"{steps} steps", steps=steps)[1] for steps in (short, long)]
    steps = steps_in(seconds, (short, times[0]), (long, times[1]))
    model, taken = run("whole", steps=steps)
    config = json.loads((folder / "whole" / "config.json").read_text())
    return {
        "name": "reverie train clip-stickers",
        "parameters": parameters(model),
        "cpu_seconds": taken,
        "steps": steps,
        "batch": config["batch"],
        "settings": {key: config[key] for key in ("lr", "weight_decay", "strength", "languages")},
        "embed": (model.embed_image, model.embed_text),
    }


def steps_in(seconds: float, one: tuple[int, float], other: tuple[int, float]) -> int:
    """How many steps fit, from two runs (steps, seconds): what a run costs besides its steps is paid once."""
    rate = (other[1] - one[1]) / (other[0] - one[0])
    fixed = max(one[1] - rate * one[0], 0.0)
    return max(round((seconds - fixed) / rate), 10)


def theirs(index: Index, seconds: float, asked: argparse.Namespace) -> dict[str, Any]:
    """open_clip's classes, loss, tokenizer and views in a plain loop until `seconds` of processor time are used."""
    begin = time.process_time()
    package = open_clip()
    torch.manual_seed(rng.integer(0, "weights"))
    model = package.model.CLIP(
        256,
        package.CLIPVisionCfg(layers=6, width=256, head_width=64, patch_size=16, image_size=SIZE),
        package.CLIPTextCfg(context_length=16, vocab_size=49_408, width=256, heads=4, layers=4),
    )
    tokenizer = package.SimpleTokenizer(context_length=16)
    criterion = package.ClipLoss()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in
                 (package.OPENAI_DATASET_MEAN, package.OPENAI_DATASET_STD))  # fmt: skip
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "logit_scale" in name]
    others = [p for name, p in model.named_parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": asked.peer_decay}],
        lr=asked.peer_lr, betas=(0.9, 0.98), eps=1e-6, fused=True,
    )  # fmt: skip
    pixels = Pixels(index, size=SIZE, cache=cache_of(index), quiet=True)
    good = [i for i in pixels.good if index[i].captions]
    precision = resolve("auto", torch.device("cpu"))
    transform = _transform(package, asked.peer_view)
    step, warmup = 0, 50
    model.train()
    while (used := time.process_time() - begin) < seconds:
        keys = [(epoch, good[place]) for epoch, place in batch_ids(step, asked.peer_batch, len(good), 0)]
        rgba = torch.stack([pixels[i][0] for _, i in keys])
        if transform is None:
            images = ((view(rgba, draws(0, keys), strength=0.5) + 1) / 2 - mean) / std
        else:
            images = torch.stack([transform(picture) for picture in _pictures(rgba)])
        texts = [draw_caption(index[i], rng.generator(0, "caption", epoch, i), languages={"en": 1.0})
                 for epoch, i in keys]  # fmt: skip
        factor = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * used / seconds))
        for group in optimizer.param_groups:
            group["lr"] = asked.peer_lr * factor
        with autocast(precision, torch.device("cpu")):
            loss = criterion(*model(images, tokenizer(texts)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        step += 1
    model.eval()

    def embed_image(images: Tensor) -> Tensor:
        return model.encode_image(((images + 1) / 2 - mean) / std)

    return {
        "name": f"open_clip {package.__version__}",
        "parameters": parameters(model),
        "cpu_seconds": time.process_time() - begin,
        "steps": step,
        "batch": asked.peer_batch,
        "settings": {"lr": asked.peer_lr, "weight_decay": asked.peer_decay, "view": asked.peer_view,
                     "precision": precision, "last_loss": loss.item()},
        "embed": (embed_image, lambda texts: model.encode_text(tokenizer(texts))),
    }  # fmt: skip


def _transform(package: Any, name: str) -> Any:
    """open_clip's own views of a picture: its default crop, or with the jitter of its documentation; None: ours."""
    if name == "ours":
        return None
    options = {"scale": (0.9, 1.0)} if name == "crop" else {
        "scale": (0.6, 1.0), "color_jitter": (0.32, 0.32, 0.32, 0.08), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2,
    }  # fmt: skip
    return package.image_transform(SIZE, is_train=True, aug_cfg=package.AugmentationCfg(**options))


def _pictures(rgba: Tensor) -> list[Any]:
    from PIL import Image

    levels = ((on_white(rgba) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in levels]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def measure(held: Index, embed_image: Any, embed_text: Any) -> dict[str, Any]:
    """Top-1 and top-5 among all labels of `held`, with bootstrap intervals."""
    pixels = Pixels(held, size=SIZE, cache=cache_of(held), quiet=True)
    items = [(i, held[i].label) for i in pixels.good if held[i].label]
    names = sorted({label for _, label in items})
    images = on_white(torch.stack([pixels[i][0] for i, _ in items]))
    found = zero_shot(embed_image, embed_text, images, [names.index(label) for _, label in items], names)
    return {key: found[key] for key in ("top1", "top1_interval", "top5", "top5_interval", "images", "ways")}


def report(sides: list[dict[str, Any]], asked: argparse.Namespace, learnt: int) -> None:
    """results.json and table.md into `--out`, and the table to the screen."""
    lines = [
        f"Trained on {learnt:,} pictures ({' and '.join(SOURCES)}), asked to name {sides[0]['images']:,} Twemoji among "
        f"{sides[0]['ways']:,} names; one thread, torch {torch.__version__}.",
        "",
        "| | parameters | CPU minutes | steps x batch | top-1 | top-5 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for side in sides:
        cells = [f"{side[k]:.1%} [{side[f'{k}_interval'][0]:.1%}, {side[f'{k}_interval'][1]:.1%}]" for k in
                 ("top1", "top5")]  # fmt: skip
        lines.append(
            f"| {side['name']} | {side['parameters'] / 1e6:.1f} M | {side['cpu_seconds'] / 60:.1f} "
            f"| {side['steps']:,} x {side['batch']} | {cells[0]} | {cells[1]} |"
        )
    if len(sides) == 2:
        lines += ["", f"Ours over open_clip: {sides[0]['top1'] / max(sides[1]['top1'], 1e-9):.2f} times in top-1, "
                      f"{sides[0]['top5'] / max(sides[1]['top5'], 1e-9):.2f} times in top-5."]  # fmt: skip
    table = "\n".join(lines)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(
        json.dumps({"minutes": asked.minutes, "torch": torch.__version__, "sides": sides}, indent=1) + "\n"
    )
    (asked.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
