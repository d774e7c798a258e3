"""How well near duplicates are found: planted copies of Fluent 3D, among all its drawings, which are the hard case.

    python benchmarks/duplicates.py STICKERS [--out runs/duplicates] [--model clip-stickers]

STICKERS is the corpus of `reverie data stickers`. Every ninth picture of Fluent 3D (without skin tones) is copied five
ways: half the size, JPEG of quality 50, half the size and JPEG of quality 30, darker by 15 %, cut by 5 % at each side.
The table says for several limits what share of each kind is found, and how many pairs of different drawings (without
skin tones) are taken for one picture. Among emoji many are drawn nearly alike: a man cook and a cook, two flags.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reverie.data.duplicates import hashes_of, pairs_above
from reverie.data.index import Index
from reverie.media import decode_array, flatten
from reverie.recipes.parts import capable, plain_stickers
from reverie.recipes.search import embed_pictures

KINDS = ("half", "jpeg 50", "half, jpeg 30", "darker", "cut")
LIMITS = ((6, None), (10, None), (None, 0.95), (None, 0.98), (6, 0.95), (6, 0.98), (10, 0.98))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path, help="the sticker corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/duplicates"))
    parser.add_argument("--model", default="clip-stickers")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    index = plain_stickers(Index.read(asked.data)).select(sources=("fluent-3d",))
    asked.out.mkdir(parents=True, exist_ok=True)
    if not (asked.out / "fluent-3d").exists():
        (asked.out / "fluent-3d").symlink_to((asked.data / "fluent-3d").resolve(), target_is_directory=True)
    names = [item.file_name for item in index]
    planted = [(k, kind, write(index.path(item), asked.out, k, kind))
               for k, item in enumerate(index) if k % 9 == 0 for kind in KINDS]  # fmt: skip
    clip = capable(asked.model, "embed_text")
    every = names + [name for _, _, name in planted]
    found = embed_pictures(clip, asked.out, every, present=set(every))
    place = {name: i for i, name in enumerate(found.names)}
    vectors = found.vectors.float()
    signs = (
        torch.from_numpy(np.stack([hashes_of(asked.out / name)[0] for name in found.names])).float() * 2 - 1
    )
    bits, own = signs / signs.shape[1] ** 0.5, {place[name] for name in names if name in place}
    copies = {kind: [(place[names[k]], place[name]) for k, its, name in planted if its == kind and names[k] in place]
              for kind in KINDS}  # fmt: skip
    lines = [f"| bits | cosine | {' | '.join(KINDS)} | other pairs of {len(own) * (len(own) - 1) // 2:,} |",
             f"|---|---|{'---|' * len(KINDS)}---|"]  # fmt: skip
    for most, least in LIMITS:
        far = 1 - 2 * (64 if most is None else most + 1e-4) / 64
        near = set(pairs_above(bits, far, also=vectors, also_least=-1 if least is None else least - 1e-6))
        shares = [f"{np.mean([tuple(sorted(pair)) in near for pair in copies[kind]]):.1%}" for kind in KINDS]
        wrong = sum(a in own and b in own for a, b in near)
        told = ("any" if limit is None else str(limit) for limit in (most, least))
        lines.append(f"| {' | '.join(told)} | {' | '.join(shares)} | {wrong:,} |")
    (asked.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def write(path: Path, out: Path, k: int, kind: str) -> str:
    """A copy of a picture, on white; its name in `out`."""
    name = f"planted/{k}-{kind.replace(' ', '-').replace(',', '')}.{'jpg' if 'jpeg' in kind else 'png'}"
    (out / "planted").mkdir(exist_ok=True)
    image = Image.fromarray(flatten(decode_array(path)[0]))
    width, height = image.size
    if "half" in kind:
        image = image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    elif kind == "darker":
        image = image.point([round(0.85 * level) for level in range(256)] * 3)
    elif kind == "cut":
        image = image.crop((width // 20, height // 20, width - width // 20, height - height // 20))
    image.save(out / name, **({"quality": int(kind[-2:])} if "jpeg" in kind else {}))
    return name


if __name__ == "__main__":
    main()
