"""Does it pay to filter by CLIP? A third of the training stickers is mislabelled; who trains on what is kept?

    python benchmarks/filtering.py STICKERS [--out runs/filtering] [--seeds 3] [--steps 1200] [--batch 64] [--go-on]

STICKERS is the corpus of `reverie data stickers`. The pictures are Fluent 3D and Noto (the training split, without
skin tones); for each seed a third of them, drawn by it, is given the captions and the label of another picture of that
third, never of the same thing. Then `reverie train clip-stickers`, in a small shape and for the same steps at the same
batch, learns from one of these

    all         everything, wrong captions and all
    filtered    what `reverie data score` and `reverie data filter --keep 0.667` leave, the filter being a CLIP that the
                same recipe trained on other hands' drawings (Noto 1, EmojiOne, FxEmoji)
    clean       the two thirds whose captions are right, which nobody knows in real life
    itself      what the filter leaves when it is the CLIP that was trained on `all` (asked for with --itself)

and each is asked to name every Twemoji among all Twemoji's labels, a hand that none of them has seen. The filter has
never seen the pictures that it judges, nor their captions on them; it has seen other drawings of the same things, as a
filter of photographs has seen other photographs. (Fluent flat and modern are left out: `reverie data dedupe` finds
more than a thousand of their drawings to be Fluent 3D's again.) `itself` is the filter without any help.

With --go-on every run begins with the filter's weights instead of random ones: somebody has a CLIP, filters new
pictures by it and trains it on with them. That takes far fewer steps.

One thread. What has been done is kept in --out: the same command goes on after an interruption, and the result is
written to OUT/results.json and OUT/table.md after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import reverie
from reverie import disk, rng
from reverie.data.augment import on_white
from reverie.data.index import FILE, Index, Item
from reverie.data.pixels import Pixels
from reverie.evals.zero_shot import zero_shot
from reverie.recipes import clip as recipe
from reverie.recipes.parts import plain_stickers
from reverie.systems.clip import Clip

SOURCES = ("fluent-3d", "noto")
OTHERS = ("noto-v1", "emojione", "fxemoji")
SHAPE: dict[str, Any] = {"width": 128, "depth": 3}
WRONG = 1 / 3
JUDGE = "other-hands"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path, help="the sticker corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/filtering"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--filter-steps", type=int, default=400)
    parser.add_argument("--filter-batch", type=int, default=96)
    parser.add_argument("--go-on", action="store_true", help="begin every run with the filter's weights")
    parser.add_argument("--itself", action="store_true", help="also filter by the CLIP that learnt from all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked)
    bench.judge()
    arms = ["all", "clean", "filtered"] + (["itself"] if asked.itself else [])
    for seed in range(asked.seeds):
        for arm in arms:
            bench.run(arm, seed)


class Bench:
    """The folders, the runs and what they gave, in `asked.out`."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out = asked, asked.out
        self.corpus = plain_stickers(Index.read(asked.data))
        self.learnt = self.corpus.select(split="train", video=False, sources=SOURCES)
        self.file = self.out / "results.json"
        self.found: dict[str, Any] = (
            json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        )
        setting = {"steps": asked.steps, "batch": asked.batch, "filter_steps": asked.filter_steps,
                   "go_on": asked.go_on, **SHAPE}  # fmt: skip
        if self.found.setdefault("setting", setting) != setting:
            raise SystemExit(
                f"{self.file} is of another setting, {self.found['setting']}: give another --out."
            )
        self.found.setdefault("filters", {})
        self.found.setdefault("runs", {})

    def judge(self) -> Path:
        """The CLIP of the other hands, trained once."""
        folder = self.folder(JUDGE, self.corpus.select(split="train", video=False, sources=OTHERS))
        model = self.train(JUDGE, folder, steps=self.asked.filter_steps, seed=0)
        if JUDGE not in self.found["runs"]:
            self.found["runs"][JUDGE] = {"arm": JUDGE, "seed": 0, "pictures": len(Index.read(folder)),
                                         **self.measure(model)}  # fmt: skip
            self.report()
        return self.out / "runs" / JUDGE / "model"

    def run(self, arm: str, seed: int) -> None:
        """Make the folder, mark what the filter rejects, train, measure; nothing if it has been done."""
        name = f"{arm}-{seed}"
        if name in self.found["runs"]:
            return
        items, wrong = mislabelled(self.learnt, seed)
        if arm == "clean":
            items = [item for item in items if item.file_name not in wrong]
        folder = self.folder(name, Index(self.learnt.folder, items))
        if arm in ("filtered", "itself"):
            model = self.judge() if arm == "filtered" else self.out / "runs" / f"all-{seed}" / "model"
            self.found["filters"][name] = sift(folder, model, wrong)
        begin = time.process_time()
        model = self.train(name, folder, steps=self.asked.steps, seed=seed)
        seconds = time.process_time() - begin
        self.found["runs"][name] = {"arm": arm, "seed": seed, "cpu_seconds": seconds,
                                    "pictures": len(Index.read(folder).select()), **self.measure(model)}  # fmt: skip
        self.report()

    def folder(self, name: str, index: Index) -> Path:
        """A dataset of links into the corpus with a table of its own; the decoded pixels are shared."""
        folder = self.out / "data" / name
        if (folder / FILE).exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        cache = self.out / "pixels"
        cache.mkdir(exist_ok=True)
        links = {item.file_name.partition("/")[0]: self.corpus.folder for item in index}
        for link, target in [*((n, f / n) for n, f in links.items()), (".reverie", cache)]:
            if not (folder / link).is_symlink():
                (folder / link).symlink_to(target.resolve(), target_is_directory=True)
        Index(folder, list(index)).write()
        return folder

    def train(self, name: str, folder: Path, *, steps: int, seed: int) -> Clip:
        out = self.out / "runs" / name
        if (out / "model").exists():
            return reverie.load(out / "model")
        start = str(self.judge()) if self.asked.go_on and name != JUDGE else ""
        batch = self.asked.filter_batch if name == JUDGE else self.asked.batch
        return recipe.stickers(folder, out, steps=steps, batch=batch, start=start, seed=seed, **SHAPE)

    @torch.no_grad()
    def measure(self, model: Clip) -> dict[str, Any]:
        """Top-1 and top-5 among all labels of Twemoji, and top-1 on the things that no training picture shows."""
        held = self.corpus.select(split="test", sources=("twemoji",))
        pixels = Pixels(held, size=64, cache=self.out / "pixels", quiet=True)
        items = [(i, str(held[i].label)) for i in pixels.good if held[i].label]
        names = sorted({label for _, label in items})
        targets = [names.index(label) for _, label in items]
        images = on_white(torch.stack([pixels[i][0] for i, _ in items]))
        found = zero_shot(model.embed_image, model.embed_text, images, targets, names)
        known = {item.label for item in self.learnt}
        hits = [p == t for p, t, (_, label) in zip(found["predicted"], targets, items, strict=True)
                if label not in known]  # fmt: skip
        return {key: found[key] for key in ("top1", "top5", "images", "ways")} | {
            "unseen_top1": statistics.mean(hits), "unseen": len(hits)}  # fmt: skip

    def report(self) -> None:
        runs = self.found["runs"].values()
        lines = ["| trained on | pictures | top-1 of each seed, % | mean | top-5 | unseen things, top-1 |",
                 "|---|---|---|---|---|---|"]  # fmt: skip
        for arm in dict.fromkeys(run["arm"] for run in runs):
            own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
            mean = {
                key: 100 * statistics.mean(run[key] for run in own) for key in ("top1", "top5", "unseen_top1")
            }
            each = ", ".join(f"{100 * run['top1']:.2f}" for run in own)
            lines.append(f"| {arm} | {own[0]['pictures']:,} | {each} | {mean['top1']:.2f} | {mean['top5']:.2f} | "
                         f"{mean['unseen_top1']:.2f} |")  # fmt: skip
        lines += [
            "",
            "| filter | kept | precision | recall | AUC by the best caption | by the mean |",
            "|---|---|---|---|---|---|",
        ]
        lines += [f"| {name} | {it['kept']:,} of {it['of']:,} | {it['precision']:.3f} | {it['recall']:.3f} | "
                  f"{it['auc_best']:.4f} | {it['auc_mean']:.4f} |"
                  for name, it in self.found["filters"].items()]  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        disk.write_json(self.file, self.found)
        disk.write(self.out / "table.md", "\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)


def mislabelled(index: Index, seed: int) -> tuple[list[Item], set[str]]:
    """The items, a third of which have the words of another of that third, and the names of those."""
    order = torch.randperm(len(index), generator=rng.generator(seed, "mislabel")).tolist()
    some = order[: round(len(order) * WRONG)]
    some.sort(
        key=lambda i: (str(index[i].label), i)
    )  # one thing's pictures stand together, so a long step leaves it
    most = max(sum(index[i].label == index[j].label for j in some) for i in some)
    step = most + rng.integer(seed, "mislabel", "step") % (len(some) - 2 * most)
    items = list(index)
    for place, i in enumerate(some):
        giver = index[some[(place + step) % len(some)]]
        assert giver.label != index[i].label
        items[i] = dataclasses.replace(index[i], captions=giver.captions, label=giver.label)
    return items, {index[i].file_name for i in some}


def sift(folder: Path, model: Path, wrong: set[str]) -> dict[str, Any]:
    """Score and mark the folder as the commands do; how well the mark finds what is wrong."""
    from reverie.data.marks import keep, undo
    from reverie.recipes.cleaning import EACH, score

    undo(folder, "filter")
    score(folder, model=model, device="cpu")
    keep(folder, share=1 - WRONG)
    index = Index.read(folder)
    marked = {item.file_name for item in index if item.marked == "filter"}
    scored = [
        (item, [s for s in index.extra_of(item.file_name)[EACH.format("clip")] if s is not None])
        for item in index
    ]
    best = {item.file_name: max(each) for item, each in scored if each}
    mean = {item.file_name: statistics.mean(each) for item, each in scored if each}
    return {
        "of": len(index), "kept": len(index) - len(marked), "wrong": len(wrong),
        "precision": len(marked & wrong) / len(marked), "recall": len(marked & wrong) / len(wrong),
        "auc_best": auc(best, wrong), "auc_mean": auc(mean, wrong),
    }  # fmt: skip


def auc(scores: dict[str, float], wrong: set[str]) -> float:
    """How often a right item scores above a wrong one (ties count half)."""
    bad = torch.tensor([value for name, value in scores.items() if name in wrong])
    good = torch.tensor([value for name, value in scores.items() if name not in wrong])
    return ((good[:, None] > bad).double().mean() + (good[:, None] == bad).double().mean() / 2).item()


if __name__ == "__main__":
    main()
