"""Does it pay to rewrite and filter captions? 40 % of them are wrong; who learns most from what is left?

    python benchmarks/capfilt.py OUT [--seeds 3] [--count 6000] [--steps 1200] [--tune 200] [--drawing 5000]

The procedural world, whose truth is known: pictures of one to five like things of six shapes, each with one English
caption. A tenth of the training pictures, drawn by the seed, is vouched for (source "human"). Of the others ("web")
40 %, drawn by the seed, get wrong words: a third another picture's caption, a third a caption cut off before it names
the thing, a third a text from the web that is about no picture. Then a Blip learns, from random weights, with the same
steps and batches, from one of these:

    all       everything, wrong captions and all
    clip      what `reverie data score` and `reverie data filter --keep` leave, by a CLIP that learnt from all of it;
              the share that is kept is the share that is right, which nobody knows in real life
    match     what CapFilt as in the paper makes of it: the filter's matching alone decides. Its first stage is the run
              of `all`; captions are drawn (nucleus), and searched for in `match-beam`
    capfilt   what `reverie capfilt` makes of it: the filter learns from the doubted captions too, and its matching is
              weighed with likeness on a fifth of what is vouched for; `beam` again searches
    clean     the same pictures with their right captions

and is asked of unseen pictures: to find pictures and captions among each other (recall), and to describe them, which
the world's reader checks word by word. A small video transformer (the recipe of Sora, of pictures) learns from all,
clip, match, capfilt and clean as well, for as many steps each, and the world's judge reads from its pixels whether what
a caption asks for is there.

One thread. What has been done is kept in OUT: the same command goes on after an interruption. OUT/blip.json,
OUT/sora.json, OUT/table.md and OUT/capfilt.png (validation on the way, by arm) are written after every run.
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
from reverie.data.index import FILE, Caption, Index, Item
from reverie.data.marks import keep
from reverie.data.pixels import Pixels
from reverie.data.world import scenes_of, write
from reverie.data.world_captions import captions
from reverie.evals.retrieval import retrieval
from reverie.evals.world_captions import told
from reverie.evals.world_judge import judge, score
from reverie.recipes import capfilt, clip, sora
from reverie.recipes.capfilt import CapFilt
from reverie.recipes.cleaning import score as score_by_clip
from reverie.recipes.parts import load_clip
from reverie.recipes.sora_batches import SoraRun
from reverie.scene import Scene
from reverie.systems.sora import Sora

ARMS = ("all", "clip", "match", "match-beam", "capfilt", "beam", "clean")
DRAWN = ("all", "clip", "match", "capfilt", "clean")
REWRITTEN = {  # how captions are drawn, and what the filter goes by
    "match": ("nucleus", "match"), "match-beam": ("beam", "match"),
    "capfilt": ("nucleus", "both"), "beam": ("beam", "both"),
}  # fmt: skip
SIDE, PATCH = 48, 8
SAID = ("right_all", "said_colour", "said_count", "said_shape")
SHAPES = {"circle", "square", "triangle", "star", "cross", "ring"}
WRONG, TRUSTED = 0.4, 0.1
WEB = (
    "click to enlarge", "IMG_2041.JPG", "free shipping on orders over 50", "buy now and save", "stock photo",
    "image 3 of 12", "our new collection is here", "best price guaranteed", "untitled", "home page",
    "sign up for the newsletter", "photo of the day", "DSC00417", "sale ends on sunday", "see more like this",
    "thumbnail", "picture not available", "all rights reserved", "follow us for more", "customers also bought",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--count", type=int, default=6000, help="pictures that are drawn, of which some are left out"
    )
    parser.add_argument("--steps", type=int, default=1200, help="of each training from scratch")
    parser.add_argument("--tune", type=int, default=200, help="of the captioner's and the filter's training")
    parser.add_argument("--drawing", type=int, default=5000, help="of each generator's training")
    parser.add_argument("--only", choices=("blip", "sora"), help="half of the work, such as in two processes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked)
    for seed in range(asked.seeds):
        for arm in ARMS:
            if asked.only != "sora":
                bench.describe(arm, seed)
            if asked.only != "blip" and arm in DRAWN:
                bench.draw(arm, seed)


# ---------------------------------------------------------------- the data


def pictures(folder: Path, count: int, seed: int) -> tuple[Index, dict[str, Scene]]:
    """Like things of the SHAPES, drawn once: the pictures, and what each shows."""
    kept, scenes = [], {}
    for kind in ("single", "count"):
        place = folder / kind
        own = Index.read(place) if (place / FILE).exists() else write(
            place, count // 2, kind=kind, seed=seed, size=(SIDE, SIDE)
        )  # fmt: skip
        truth = scenes_of(own)
        for item in own:
            if all(thing.shape in SHAPES for thing in truth[item.file_name].things):
                name = f"{kind}/{item.file_name}"
                kept.append(dataclasses.replace(item, file_name=name))
                scenes[name] = truth[item.file_name]
    return Index(folder, kept), scenes


def corrupted(items: list[Item], seed: int) -> tuple[list[Item], dict[str, str]]:
    """The items with one caption each, wrong ones among them, and file name -> how it is wrong."""
    order = torch.randperm(len(items), generator=rng.generator(seed, "corrupt")).tolist()
    mine, web = order[: round(TRUSTED * len(order))], order[round(TRUSTED * len(order)) :]
    bad = web[: round(WRONG * len(web))]
    swapped, cut, off = (bad[i::3] for i in range(3))
    out, wrong = list(items), {}
    for i in range(len(items)):
        text = items[i].captions[0].text
        if i in set(swapped):
            place = swapped.index(i)
            giver = next(
                j for j in swapped[place + 1 :] + swapped[:place] if items[j].captions[0].text != text
            )
            text, wrong[items[i].file_name] = items[giver].captions[0].text, "swapped"
        elif i in set(cut):
            words = text.split()
            text, wrong[items[i].file_name] = " ".join(words[: max(1, len(words) // 3)]), "cut"
        elif i in set(off):
            text, wrong[items[i].file_name] = WEB[rng.integer(seed, "web", i) % len(WEB)], "off topic"
        source = "human" if i in set(mine) else "web"
        out[i] = dataclasses.replace(items[i], split="train", captions=(Caption(text=text, source=source),))
    return out, wrong


def named(item: Item, text: str) -> Item:
    return dataclasses.replace(item, captions=(Caption(text=text, source="world"),))


class Bench:
    """The folders, the runs and what they gave, in `asked.out`."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.out = asked, asked.out
        index, _ = pictures(self.out / "pictures", asked.count, 0)
        self.items = [named(item, _english(item)) for item in index]
        test, scenes = pictures(self.out / "unseen", asked.count // 8, 1)
        first: dict[str, Item] = {}  # one picture of each kind, so that a caption has one right picture
        for item in test:
            scene = scenes[item.file_name]
            first.setdefault(f"{len(scene.things)} {scene.things[0].colour} {scene.things[0].shape}", item)
        self.test = Index(
            test.folder, [named(item, _plain(scenes[item.file_name])) for item in first.values()]
        )
        self.scenes = [scenes[item.file_name] for item in self.test]
        same = {"count": asked.count, "steps": asked.steps, "tune": asked.tune}
        same |= {"pictures": len(self.items), "unseen": len(self.test)}
        self.setting = {"blip": same, "sora": {**same, "drawing": asked.drawing}}
        for part, setting in self.setting.items():
            if self.found(part).get("setting", setting) != setting:
                raise SystemExit(f"{self.out / part}.json is of another setting: give another folder.")

    def found(self, part: str) -> dict[str, Any]:
        file = self.out / f"{part}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def record(self, part: str, key: str, value: Any) -> None:
        found = self.found(part)
        found["setting"], found[key] = self.setting[part], value
        disk.write_json(self.out / f"{part}.json", found)
        self.report()

    def settings(self, seed: int, sampling: str = "nucleus", judge: str = "both") -> CapFilt:
        return CapFilt(
            trusted=("human",), sampling=sampling, judge=judge, steps=self.asked.steps, tune_steps=self.asked.tune,
            size=SIDE, patch=PATCH, width=128, depth=3, strength=0.0, queue=512, most=16, tune_lr=3e-4, seed=seed,
        )  # fmt: skip

    # ------------------------------------------------------------ what each arm learns from

    def data(self, arm: str, seed: int) -> Index:
        """The folder of an arm, made if it is not there: links to the pictures, a table of its own."""
        folder = self.out / "data" / f"{arm}-{seed}"
        if self.there(arm, seed):
            return Index.read(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (self.out / "pixels").mkdir(exist_ok=True)
        for link in ("single", "count"):
            if not (folder / link).is_symlink():
                (folder / link).symlink_to((self.out / "pictures" / link).resolve(), target_is_directory=True)
        items, wrong = corrupted(self.items, seed)
        if arm == "clean":
            items = [
                dataclasses.replace(item, split="train", captions=right.captions)
                for item, right in zip(items, self.items, strict=True)
            ]
        index = Index(folder, items)
        if arm == "clip":
            self.sifted(index, seed, wrong)
        elif arm in REWRITTEN:
            self.bootstrapped(index, arm, seed, wrong)
        else:
            index.write()
        return Index.read(folder)

    def there(self, arm: str, seed: int) -> bool:
        """The data of an arm is made, and filtered if it is to be."""
        made = (self.out / "data" / f"{arm}-{seed}" / FILE).exists()
        return made and (arm in ("all", "clean") or f"filter-{arm}-{seed}" in self.found("blip"))

    def sifted(self, index: Index, seed: int, wrong: dict[str, str]) -> None:
        """Marked by a CLIP that learnt from all."""
        start = time.process_time()
        out = self.out / "runs" / f"clip-of-all-{seed}"
        every = self.data("all", seed).select()
        if not (out / "model").exists():
            model = clip.begin("", every, tower, seed=seed)
            config = clip.ClipRun(
                model=model.config, steps=self.asked.steps, batch=64, strength=0.0, ema=0.99, seed=seed
            )
            clip.fit(config, model, every, out, measures={})
        seconds = time.process_time() - start
        index.write()
        score_by_clip(index.folder, model=out / "model", device="cpu")
        keep(index.folder, share=1 - len(wrong) / len(index))
        after = Index.read(index.folder)
        marked = {item.file_name for item in after if item.marked == "filter"}
        self.record("blip", f"filter-clip-{seed}", {"seconds": seconds, **_caught(marked, wrong, len(index))})

    def bootstrapped(self, index: Index, arm: str, seed: int, wrong: dict[str, str]) -> None:
        """Rewritten and filtered by CapFilt, whose first Blip is that of `all`; its last is trained by `describe`."""
        start = time.process_time()
        settings = self.settings(seed, *REWRITTEN[arm])
        place = self.out / "runs" / f"{arm}-rounds-{seed}"
        before = self.out / "runs" / f"all-{seed}" / "model"
        mine, others = capfilt.parted(index, settings.trusted)
        for task, own in (("captioner", "captioner"), ("filter", f"filter-{settings.judge}")):
            place.mkdir(parents=True, exist_ok=True)
            shared = self.out / "runs" / f"{own}-{seed}"  # arms that have the same one
            shared.mkdir(parents=True, exist_ok=True)
            if not (place / task).is_symlink():
                (place / task).symlink_to(shared.resolve(), target_is_directory=True)
        capfilt.teach(mine, others, index, before, place, settings, val=_none(index))
        capfilt.weigh(mine, others, index, place, settings, device="cpu")
        seen = capfilt.look(others, index, place, settings, device="cpu")
        capfilt.decide(index, others, seen, settings, 1).write()
        after = Index.read(index.folder)
        dropped = {item.file_name for item in after if any(c.source == "web" for c in item.dropped)}
        truth = scenes_of_all(self.out / "pictures")
        new = [(c.text, item) for item in after for c in item.captions if c.source.startswith("synthetic")]
        every = [(seen[item.file_name].text, item) for item in others if item.file_name in seen]
        self.record("blip", f"filter-{arm}-{seed}", {
            "seconds": time.process_time() - start, **_caught(dropped, wrong, len(others)),
            "written": len(every), "different": len({text for text, _ in every}), "kept": len(new),
            "true_written": _true(every, truth), "true_kept": _true(new, truth),
            "verdicts": {v: sum(capfilt.verdict_of(after, i) == v for i in others) for v in capfilt.VERDICTS},
        })  # fmt: skip

    # ------------------------------------------------------------ what each arm learns

    def describe(self, arm: str, seed: int) -> None:
        """Train a Blip and measure it, if that has not been done."""
        if f"{arm}-{seed}" in self.found("blip"):
            return
        out, index = self.out / "runs" / f"{arm}-{seed}", self.data(arm, seed).select()
        index = Index(index.folder, [item for item in index if item.captions])
        start = time.process_time()
        capfilt.pretrain(index, out, self.settings(seed), val=self.test)
        seconds = time.process_time() - start
        model = reverie.load(out / "model")
        pixels = Pixels(self.test, size=SIDE, cache=self.out / "pixels", quiet=True)
        images = on_white(torch.stack([pixels[i][0] for i in range(len(self.test))]))
        with torch.no_grad():
            both = retrieval(
                model.embed_image,
                model.embed_text,
                images,
                [[i.captions[0].text] for i in self.test],
                ks=(1, 5),
            )
            said = [
                text for part in images.split(50) for text in model.caption(part, sampling="greedy", most=16)
            ]
        read = told(said, self.scenes)
        self.record("blip", f"{arm}-{seed}", {
            "pictures": len(index), "captions": sum(len(i.captions) for i in index), "cpu_seconds": seconds,
            **{f"{way}_{k}": both[way][f"recall@{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5)},
            **{f"right_{name}": read[name]["right"] for name in ("all", "shape", "colour", "count")},
            **{f"said_{name}": read[name]["said"] for name in ("shape", "colour", "count")},
            "examples": said[:8],
        })  # fmt: skip

    def draw(self, arm: str, seed: int) -> None:
        """Train a generator and judge what it draws, if that has not been done and its data is there."""
        if f"{arm}-{seed}" in self.found("sora"):
            return
        while self.asked.only and not self.there(arm, seed):
            time.sleep(20)  # the other process makes it
        index = self.data(arm, seed).select()
        index = Index(index.folder, [item for item in index if item.captions])
        reader = load_clip("clip-stickers")
        model = sora.shape(reader, size=SIDE, sizes=(4, 128, 2), patch=PATCH)
        model = dataclasses.replace(
            model, backbone=dataclasses.replace(model.backbone, head=0), steps=16, guidance=2.0
        )
        config = SoraRun(
            model=model, clip="clip-stickers", steps=self.asked.drawing, batch=32, clips=0, known_pictures=0.0,
            lr=2e-3, warmup=50, ema=0.995, vary=0.0, languages={"en": 1.0}, seed=seed,
        )  # fmt: skip
        start = time.process_time()
        system = sora.fit(
            config, reader, index, self.out / "runs" / f"sora-{arm}-{seed}", prompts=("a red circle",)
        )
        seconds = time.process_time() - start
        self.record(
            "sora", f"{arm}-{seed}", {"pictures": len(index), "cpu_seconds": seconds, **self.judged(system)}
        )

    @torch.no_grad()
    def judged(self, system: Sora) -> dict[str, float]:
        texts = [item.captions[0].text for item in self.test]
        images = torch.cat([
            system.generate_image(texts[i : i + 25], size=(SIDE, SIDE), seed=1000 + i, together=True)
            for i in range(0, len(texts), 25)
        ])  # fmt: skip
        rows = [score(judge(image), scene) for image, scene in zip(images, self.scenes, strict=True)]
        names = ("count", "shape", "colour")
        found = {name: statistics.mean(bool(row[name]) for row in rows) for name in names}
        return found | {"all": statistics.mean(all(bool(row[name]) for name in names) for row in rows)}

    # ------------------------------------------------------------ what came out

    def report(self) -> None:
        """table.md and capfilt.png of what there is so far."""
        described, drawn = self.found("blip"), self.found("sora")
        lines = [
            "| learnt from | pictures | captions | picture to text, first / among 5 | text to picture | all it says is "
            "true | colour | count | shape |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in ARMS:
            runs = _of(described, arm)
            if runs:
                lines.append(
                    f"| {arm} ({len(runs)}) | {_mean(runs, 'pictures', 1, 0)} | {_mean(runs, 'captions', 1, 0)} | "
                    f"{_mean(runs, 'image_to_text_1')} / {_mean(runs, 'image_to_text_5')} | "
                    f"{_mean(runs, 'text_to_image_1')} / {_mean(runs, 'text_to_image_5')} | "
                    + " | ".join(_mean(runs, f"{name}") for name in SAID)
                    + " |"
                )
        lines += [
            "",
            "| drawn after learning from | all as asked | colour | count | shape |",
            "|---|---|---|---|---|",
        ]
        for arm in DRAWN:
            runs = _of(drawn, arm)
            if runs:
                numbers = " | ".join(_mean(runs, name) for name in ("all", "colour", "count", "shape"))
                lines.append(f"| {arm} ({len(runs)}) | {numbers} |")
        lines += ["", "| filter | wrong ones dropped | right ones dropped | new captions true | those kept true |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for arm in ("clip", *REWRITTEN):
            runs = _of(described, f"filter-{arm}")
            if runs:
                new = [f"{_mean(runs, k)}" if k in runs[0] else "" for k in ("true_written", "true_kept")]
                lines.append(
                    f"| {arm} ({len(runs)}) | {_mean(runs, 'recall')} | {_mean(runs, 'lost')} | {' | '.join(new)} |"
                )
        disk.write(self.out / "table.md", "\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)
        self.curves()

    def curves(self) -> None:
        """Validation on the way, the mean over seeds, by arm."""
        from matplotlib import pyplot as plt

        figure, every = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
        shown = (
            ("val_image_to_text_recall@5", "picture to text, right among five"),
            ("val_text_to_image_recall@5", "text to picture, right among five"),
            ("val_writing", "loss of writing the right caption"),
        )
        for axes, (key, title) in zip(every, shown, strict=True):
            for arm in ARMS:
                series = [s for seed in range(self.asked.seeds) if (s := self.series(arm, seed, key))]
                if series:
                    steps = [step for step, _ in series[0]]
                    means = [statistics.mean(s[i][1] for s in series) for i in range(min(map(len, series)))]
                    axes.plot(steps[: len(means)], means, label=arm)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("step")
        if every[0].has_data():
            every[0].legend(fontsize=8)
        figure.savefig(self.out / "capfilt.png", dpi=110)
        plt.close(figure)

    def series(self, arm: str, seed: int, key: str) -> list[tuple[int, float]]:
        file = self.out / "runs" / f"{arm}-{seed}" / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [(row["step"], row[key]) for row in rows if key in row]


def tower(vocab: int, end: int) -> clip.ClipConfig:
    """A CLIP of the Blips' size, with their image tower."""
    config = clip.shape(vocab, end, size=SIDE, width=128, depth=3)
    return dataclasses.replace(config, image=dataclasses.replace(config.image, patch=PATCH))


def _english(item: Item) -> str:
    return next(caption.text for caption in item.captions if caption.language == "en")


def _plain(scene: Scene) -> str:
    return next(caption.text for caption in captions(scene) if caption.language == "en")


def scenes_of_all(folder: Path) -> dict[str, Scene]:
    return {
        f"{kind}/{name}": scene
        for kind in ("single", "count")
        for name, scene in scenes_of(Index.read(folder / kind)).items()
    }


def _true(texts: list[tuple[str, Item]], truth: dict[str, Scene]) -> float:
    if not texts:
        return 0.0
    return told([text for text, _ in texts], [truth[item.file_name] for _, item in texts])["all"]["right"]


def _caught(found: set[str], wrong: dict[str, str], of: int) -> dict[str, float]:
    """Of what is wrong and of what is right, the share that a filter takes out; of each kind of wrong too."""
    kinds = {
        kind: [name for name, own in wrong.items() if own == kind] for kind in dict.fromkeys(wrong.values())
    }
    return {
        "recall": len(found & wrong.keys()) / len(wrong), "lost": len(found - wrong.keys()) / (of - len(wrong)),
        **{kind: len(found & set(names)) / len(names) for kind, names in kinds.items()},
    }  # fmt: skip


def _none(index: Index) -> Index:
    return Index(index.folder, [])


def _of(found: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    return [run for key, run in sorted(found.items()) if key.rpartition("-")[0] == arm]


def _mean(runs: list[dict[str, Any]], key: str, scale: float = 100, digits: int = 1) -> str:
    values = [scale * run[key] for run in runs]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
