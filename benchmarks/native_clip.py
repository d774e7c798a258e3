"""CLIP on pictures of mixed aspects: each at its own, against squares that are cut out or squashed.

    python benchmarks/native_clip.py --out DIR [--pictures 3000] [--steps 300] [--seeds 1]

Scenes of the procedural world are drawn in five shapes of about 4,096 pixels. Three folders hold them: as they are,
the middle square of each, and each squashed to a square, of 64 x 64 pixels. `clip-native` learns from each folder with
one seed, one budget of tokens and one number of steps, and is measured on what the world keeps for tests: of all
captions which is this picture's, and of all pictures which is this caption's. Squares have as many patches as a
picture at its own aspect has, or a few more. What is there is not made again. DIR/native.json and DIR/native.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image

import reverie
from reverie import disk
from reverie.data.index import FILE, Index
from reverie.data.world import write
from reverie.evals.retrieval import retrieval
from reverie.media import decode_array
from reverie.pictures import grid, save_png
from reverie.recipes.clip_native import native

SIDE = 64
SHAPES = ((64, 64), (48, 80), (80, 48), (40, 96), (96, 40))  # height, width
FITS = {"native": None, "cropped": "crop", "squashed": "squash"}


def drawn(folder: Path, count: int) -> Index:
    """The world in all shapes, one part of each."""
    items = []
    for k, size in enumerate(SHAPES):
        part = folder / f"part{k}"
        index = (
            Index.read(part)
            if (part / FILE).exists()
            else write(part, count // len(SHAPES), seed=k, size=size)
        )
        items += [dataclasses.replace(item, file_name=f"part{k}/{item.file_name}") for item in index]
    index = Index(folder, items)
    index.write()
    return index


def squares(index: Index, folder: Path, fit: str) -> Index:
    """The same pictures as squares."""
    if (folder / FILE).exists():
        return Index.read(folder)
    items = []
    for item in index:
        path = folder / item.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = decode_array(index.path(item), size=SIDE, frames=1, fit=fit)[0]
        Image.fromarray(pixels[..., :3].copy()).save(path)
        changed = {"hash": disk.sha256(path), "bytes": path.stat().st_size, "width": SIDE, "height": SIDE}
        items.append(dataclasses.replace(item, **changed))
    made = Index(folder, items)
    made.write()
    return made


def measured(model: reverie.Clip, index: Index, shapes: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Recall at 1, in percent, among the tests; also of the longest shapes alone, whose squares lose the most."""
    items = [item for item in index if item.split != "train"]
    found = {}
    for name, some in {
        "all": items,
        "longest": [item for item in items if sorted(shapes[item.file_name]) == [40, 96]],
    }.items():
        captions = [[caption.text for caption in item.captions if caption.language == "en"] for item in some]
        paths = [index.path(item) for item in some]
        result = retrieval(model.embed_image, model.embed_text, paths, captions, ks=(1, 5))
        for way in ("image_to_text", "text_to_image"):
            for k in (1, 5):
                found[f"{name} {way} recall@{k}"] = 100 * result[way][f"recall@{k}"]
            found[f"{name} {way} chance@1"] = 100 * result[way]["recall@1_chance"]
        found[f"{name} pictures"] = len(some)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    world = drawn(args.out / "native", args.pictures)
    folders = {
        name: world if fit is None else squares(world, args.out / name, fit) for name, fit in FITS.items()
    }
    shapes = {item.file_name: (item.height, item.width) for item in world}
    picked = [next(item for item in world if shapes[item.file_name] == shape) for shape in SHAPES[1:]]
    shown = [decode_array(index.path(item), frames=1)[0] for index in folders.values() for item in picked]
    titles = [name for name in folders for _ in picked]
    save_png(grid(shown, titles, columns=len(picked)), args.out / "native.png")
    path = args.out / "native.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(args.seeds):
        for name, index in folders.items():
            key = f"{name} {args.pictures} {args.steps} {args.budget} {seed}"
            if key in runs:
                continue
            out = args.out / "runs" / key.replace(" ", "-")
            native(
                index.folder, out, steps=args.steps, budget=args.budget, size=SIDE, patch=8, width=128, depth=4,
                seed=seed,
            )  # fmt: skip
            with torch.no_grad():
                runs[key] = measured(reverie.load(out / "model"), index, shapes)
            disk.write_json(path, runs)
            print(key, {k: round(v, 1) for k, v in runs[key].items()}, file=sys.stderr)
    keys = [
        f"{part} {way} recall@1" for part in ("all", "longest") for way in ("image_to_text", "text_to_image")
    ]
    print("| pictures | " + " | ".join(keys) + " |\n|" + "---|" * (len(keys) + 1))
    for name in folders:
        own = [
            runs[f"{name} {args.pictures} {args.steps} {args.budget} {seed}"] for seed in range(args.seeds)
        ]
        print(
            f"| {name} | "
            + " | ".join(f"{statistics.mean(run[key] for run in own):.1f}" for key in keys)
            + " |"
        )


if __name__ == "__main__":
    main()
