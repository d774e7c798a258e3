"""`reverie demo`: what the shipped weights can do, computed while one waits, as a page (recipes/gallery.py).

    draw      prompts -> several pictures each, the best by CLIP first
    animate   prompts -> clips
    continue  the first frame of a clip that was kept from training -> clips
    find      the sample folder by words, by a picture in a style never trained on, by a picture just drawn
    name      Twemoji, a style never trained on, among all labels of the sample folder
    describe  Twemoji in words, and what was drawn once more: does a picture belong to its prompt? (where a BLIP ships)

Nothing is looked up: every picture, score, rank and time comes from this run. The score of a picture is the cosine
between its CLIP embedding and that of its prompt, the latter the mean over the phrases of data/wording.py; the score
of a clip is the mean over its frames. The rank says where the prompt comes, by that score, among the labels of the
sample folder in the prompt's language: 1 is before all of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import reverie
from reverie import rng
from reverie.data.index import Index, Item
from reverie.data.stickers import sample_folder
from reverie.data.wording import PHRASES
from reverie.errors import InputError
from reverie.evals.captions import label_recall
from reverie.evals.interval import bootstrap
from reverie.evals.retrieval import search_topk
from reverie.evals.zero_shot import class_embeddings, zero_shot
from reverie.media import decode_array, flatten
from reverie.output import Made, write
from reverie.pictures import to_bytes, to_signal
from reverie.progress import counting
from reverie.recipes import gallery
from reverie.recipes.measure_captions import names_of
from reverie.recipes.parts import capable, home, what_made
from reverie.train import memory
from reverie.weights.places import shipped

Pair = tuple[str, str]  # words and, for those who do not read Chinese, what they mean

DRAW: tuple[Pair, ...] = (
    ("red apple", ""), ("rocket", ""), ("octopus", ""), ("pizza", ""), ("dog face", ""), ("rainbow", ""),
    ("soccer ball", ""), ("blue heart", ""), ("青蛙", "frog"), ("草莓", "strawberry"), ("企鹅", "penguin"),
    ("仙人掌", "cactus"),
)  # fmt: skip
ANIMATE: tuple[Pair, ...] = (("rocket", ""), ("grinning face", ""), ("红心", "red heart"))
CONTINUE = ("cat face", "butterfly")  # labels of clips that were kept from training
FIND: tuple[Pair, ...] = (("fruit", ""), ("weather", ""), ("音乐", "music"), ("昆虫", "insect"))
FIND_LIKE = ("penguin", "sailboat")  # labels of Twemoji
SEVERAL, FOUND, NAMED, GUESSES = 4, 8, 12, 3
FOLDERS = ("drawn", "moving", "sample")
OURS = {*FOLDERS, "preview.png", "results.json", "index.html"}
STYLE = "twemoji"  # never trained on
ASKED = "a picture of"  # what a caption begins with: it asks for the name, in English


def demo(
    out: Path,
    *,
    seed: int = 0,
    clip: str | Path = "clip-stickers",
    sora: str | Path = "sora-stickers",
    blip: str | Path | None = None,
    steps: int | None = None,
    device: str | None = None,
) -> Path:
    """Draw, animate, continue, find, name and describe; write the gallery into the folder `out`; its index.html.

    Picture i of a prompt has the seed `seed + i`; `steps` are the sampler's, the model's own if not given; `device` is
    the GPU if there is one. `blip` describes, blip-stickers if not given; without one that part is left out. The same
    arguments give the same pictures and scores; only times and memory differ. Raises
    InputError when `out` holds something that is no gallery, or a model cannot do what is asked of it.
    """
    begun = time.perf_counter()
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}: give at least 1, or leave it out.")
    place = home(device)
    _own(out)
    with _stage("loading") as stage:
        reader = capable(clip, "embed_image", device=device)
        painter = capable(sora, "generate_video", device=device)
        blip = blip or ("blip-stickers" if "blip-stickers" in shipped() else None)
        teller = capable(blip, "caption", device=device) if blip else None
        index = Index.read(sample_folder()).select()
        judge = Judge(reader, index)
    made = what_made(painter, sora, steps=steps)
    run = _Run(out, index, judge, reader, painter, teller, seed, steps or painter.config.steps, made)
    results: dict[str, Any] = {
        "reverie": reverie.__version__,
        "seed": seed,
        "steps": run.steps,
        "guidance": painter.config.guidance,
        "models": [
            {"name": Path(str(name)).name, "parameters": sum(p.numel() for p in model.parameters())}
            for name, model in ((clip, reader), (sora, painter), (blip, teller))
            if model is not None
        ],
        "loading": {"seconds": stage.seconds},
    }
    with torch.no_grad():
        for name, part in (
            ("drawn", _draw),
            ("animated", _animate),
            ("continued", _continue),
            ("found", _find),
            ("named", _name),
            *([("described", _describe)] if teller is not None else []),
        ):
            results[name] = part(run)
    (out / "preview.png").write_bytes(gallery.preview(run.rows))
    results |= {
        "seconds": time.perf_counter() - begun,
        "peak_memory": memory.peak(place) or None,
        "device": str(place),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (out / "results.json").write_text(
        json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    page = out / "index.html"
    page.write_text(gallery.page(results), encoding="utf-8")
    return page


class Judge:
    """CLIP's opinion of pictures: how near each is to its words, and which labels come before them."""

    def __init__(self, clip: Any, index: Index):
        self.clip = clip
        told = [(c.language, c.text) for item in index for c in item.captions if c.source == "label"]
        self.names = {lang: sorted({text for own, text in told if own == lang}) for lang in PHRASES}
        self.vectors = {lang: self.embed(names, lang) for lang, names in self.names.items()}

    @torch.no_grad()
    def embed(self, texts: Sequence[str], language: str) -> Tensor:
        """Texts -> unit vectors `k d`, each the mean over the phrases of its language."""
        return class_embeddings(self.clip.embed_text, texts, phrases(language))

    def __call__(self, pictures: Tensor, words: str) -> list[dict[str, Any]]:
        """Pictures or clips `b 3 f h w` -> the score of each, and the rank of `words` `of` how many labels."""
        language = language_of(words)
        frames = self.clip.embed_image(rearrange(pictures, "b c f h w -> (b f) c h w"))
        mean = rearrange(frames, "(b f) d -> b f d", b=len(pictures)).mean(1)
        own = (mean @ self.embed([words], language).T)[:, 0]
        others = [i for i, name in enumerate(self.names[language]) if name != words]
        rank = (mean @ self.vectors[language][others].T >= own[:, None]).sum(1) + 1
        return [
            {"score": score, "rank": place, "of": len(others) + 1}
            for score, place in zip(own.tolist(), rank.tolist(), strict=True)
        ]


def language_of(text: str) -> str:
    """`zh` if the text holds a Chinese character, else `en`."""
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in text) else "en"


def phrases(language: str) -> list[str]:
    """The phrases that labels stand in while training, each once."""
    return list(dict.fromkeys(PHRASES[language]))


# --- the parts of the gallery ---------------------------------------------------------------------------------------


@dataclass
class _Run:
    out: Path
    index: Index
    judge: Judge
    clip: Any
    sora: Any
    blip: Any
    seed: int
    steps: int
    made: Callable[[str, int], Made]
    rows: list[gallery.Row] = field(default_factory=list)  # of the preview
    best: list[tuple[str, str, Tensor]] = field(default_factory=list)  # prompt, file and picture `3 h w`
    drawn: list[Tensor] = field(default_factory=list)  # of each prompt all pictures `b 3 h w`

    def prompt(self, words: str, meaning: str) -> dict[str, Any]:
        """What the page says of words: whether they were kept from training is read from the sample's index."""
        held = any(
            item.scores.get("held_out")
            and any(c.text == words and c.source == "label" for c in item.captions)
            for item in self.index
        )
        return {"prompt": words, "meaning": meaning, "language": language_of(words), "held_out": held}

    def item(self, label: str, *, source: str, video: bool = False) -> Item:
        return next(i for i in self.index if (i.label, i.source, i.frames > 1) == (label, source, video))

    def show(self, item: Item) -> dict[str, Any]:
        """A picture of the sample folder, on white as the models see it, beside the page."""
        name = f"sample/{'-'.join(item.file_name.split('/')).rpartition('.')[0]}.png"
        gallery.save_picture(self.out / name, flatten(decode_array(self.index.media(item), frames=1)[0]))
        return {"file": name, "label": item.label or "", "source": item.source or ""}

    def clip_files(self, stem: str, video: Tensor, made: Made) -> dict[str, Any]:
        """A clip `3 f h w` as a moving picture, its middle frame, and a strip of frames."""
        frames = to_bytes(rearrange(video, "c f h w -> f c h w"))
        moving, poster, strip = (f"moving/{stem}{end}" for end in (".webp", "-still.png", "-frames.png"))
        write(self.out / moving, frames, fps=self.sora.config.fps, made=made)
        gallery.save_picture(self.out / poster, frames[len(frames) // 2])
        some = frames[np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)]
        gallery.save_picture(self.out / strip, rearrange(some, "f h w c -> h (f w) c"))
        return {
            "file": moving,
            "poster": poster,
            "strip": strip,
            "frames": len(frames),
            "fps": self.sora.config.fps,
        }


def _draw(run: _Run) -> dict[str, Any]:
    """Several pictures for each prompt, the best by CLIP marked."""
    prompts = []
    with _stage("drawing", len(DRAW) * run.steps) as stage:
        for number, (words, meaning) in enumerate(DRAW):
            begun = time.perf_counter()
            pictures = run.sora.generate_image(
                [words] * SEVERAL, seed=run.seed, steps=run.steps, together=True, progress=stage.tick
            )
            opinions = run.judge(pictures[:, :, None], words)
            best = max(range(SEVERAL), key=lambda i: opinions[i]["score"])
            drawings = []
            for i, (pixels, opinion) in enumerate(zip(to_bytes(pictures), opinions, strict=True)):
                file = f"drawn/{number:02d}-{i}.png"
                write(run.out / file, [pixels], made=run.made(words, run.seed + i))
                drawings.append({"file": file, "seed": run.seed + i, **opinion})
            run.drawn.append(pictures)
            run.best.append((words, drawings[best]["file"], pictures[best]))
            prompts.append(
                {
                    **run.prompt(words, meaning),
                    "best": best,
                    "drawings": drawings,
                    "seconds": time.perf_counter() - begun,
                }
            )
    tiles = [pixels for _, _, picture in run.best for pixels in to_bytes(picture[None])]
    run.rows.append(gallery.Row(tiles=tiles, titles=[gallery.title(*pair) for pair in DRAW]))
    return {"prompts": prompts, "several": SEVERAL, "seconds": stage.seconds}


def _animate(run: _Run) -> dict[str, Any]:
    clips = []
    with _stage("animating", len(ANIMATE) * run.steps) as stage:
        for number, (words, meaning) in enumerate(ANIMATE):
            begun = time.perf_counter()
            video = run.sora.generate_video([words], seed=run.seed, steps=run.steps, progress=stage.tick)
            clips.append(
                {
                    **run.prompt(words, meaning),
                    **run.clip_files(f"animated-{number}", video[0], run.made(words, run.seed)),
                    "seed": run.seed,
                    **run.judge(video, words)[0],
                    "seconds": time.perf_counter() - begun,
                }
            )
            if number < 2:
                _film(run, video, gallery.title(words, meaning))
    return {"clips": clips, "seconds": stage.seconds}


def _continue(run: _Run) -> dict[str, Any]:
    """Clips that begin with a picture that the model has never seen, each beside what the artist made of it."""
    clips = []
    size = run.sora.size_of(run.sora.config.frames)
    with _stage("continuing a first frame", len(CONTINUE) * run.steps) as stage:
        for number, label in enumerate(CONTINUE):
            begun = time.perf_counter()
            item = run.item(label, source="fluent-anim", video=True)
            given = torch.from_numpy(to_signal(run.index.media(item), size=size))
            frames = run.sora.config.frames - 1
            video = run.sora.extend(
                given, [label], forward=frames, seed=run.seed, steps=run.steps, progress=stage.tick
            )
            made = replace(run.made(label, run.seed), asked={"extends": Path(item.file_name).name})
            original = flatten(decode_array(run.index.media(item)))
            file = f"sample/original-{number}.webp"
            write(run.out / file, original, fps=item.fps)
            clips.append(
                {
                    **run.prompt(label, ""),
                    **run.clip_files(f"continued-{number}", video[0], made),
                    "given": run.show(item),
                    "original": file,
                    "split": item.split,
                    "seed": run.seed,
                    **run.judge(video, label)[0],
                    "seconds": time.perf_counter() - begun,
                }
            )
            if number == 0:
                _film(run, video, f"{label}, its first frame given")
    return {"clips": clips, "seconds": stage.seconds}


def _film(run: _Run, video: Tensor, title: str) -> None:
    """A row of the preview: as many frames of `video 1 3 f h w` as there are prompts, evenly spaced."""
    frames = to_bytes(rearrange(video, "1 c f h w -> f c h w"))
    some = frames[np.linspace(0, len(frames) - 1, min(len(DRAW), len(frames))).round().astype(int)]
    run.rows.append(gallery.Row(tiles=list(some), titles=[title]))


def _find(run: _Run) -> dict[str, Any]:
    pictures = run.index.select(video=False)
    batches = [pictures.items[i : i + 64] for i in range(0, len(pictures), 64)]
    queries: list[dict[str, Any]] = []
    with _stage("finding", len(batches)) as stage:
        parts = []
        for batch in batches:
            parts.append(run.clip.embed_image([run.index.media(item) for item in batch]))
            stage.tick()
        vectors = torch.cat(parts)
        embedding = time.perf_counter() - stage.begun

        def answers(query: Tensor, words: str = "", without: int = -1) -> list[dict[str, Any]]:
            scores, places = search_topk(query, vectors, FOUND + 1)
            kept = [
                (s, p) for s, p in zip(scores[0].tolist(), places[0].tolist(), strict=True) if p != without
            ]
            return [
                {
                    **run.show(pictures[place]),
                    "score": score,
                    "says": bool(words) and any(words in c.text for c in pictures[place].captions),
                }
                for score, place in kept[:FOUND]
            ]

        for words, meaning in FIND:
            query = run.judge.embed([words], language_of(words))
            queries.append({"by": "words", **run.prompt(words, meaning), "answers": answers(query, words)})
        for label in FIND_LIKE:
            place = pictures.items.index(run.item(label, source=STYLE))
            found = answers(vectors[place : place + 1], without=place)
            queries.append({"by": "picture", "picture": run.show(pictures[place]), "answers": found})
        words, file, picture = run.best[1]
        drawn = {"file": file, "label": words, "source": "drawn"}
        found = answers(run.clip.embed_image(picture[None]))
        queries.append({"by": "picture", "picture": drawn, "answers": found})
    return {
        "queries": queries, "pictures": len(pictures), "embedding_seconds": embedding, "seconds": stage.seconds
    }  # fmt: skip


def _name(run: _Run) -> dict[str, Any]:
    """Pictures of a style never trained on, drawn by lot, with the names that CLIP gives them; and the score of all."""
    names, vectors = run.judge.names["en"], run.judge.vectors["en"]
    items = [item for item in run.index.select(video=False, sources=(STYLE,)) if item.label in names]
    shown = torch.randperm(len(items), generator=rng.generator(run.seed, "demo", "name"))[:NAMED].tolist()
    with _stage("naming", 1) as stage:
        embedded = run.clip.embed_image([run.index.media(item) for item in items])
        targets = [names.index(str(item.label)) for item in items]
        known = dict(zip(names, vectors, strict=True))  # the mean over the phrases, as the judge has it
        measured = zero_shot(
            lambda pictures: pictures,
            lambda texts: torch.stack([known[text] for text in texts]),
            embedded,
            targets,
            names,
        )
        cosines = embedded @ vectors.T
        chances = (run.clip.scale() * cosines).softmax(-1)
        pictures = []
        for i in shown:
            best = chances[i].argsort(descending=True, stable=True)[:GUESSES].tolist()
            guesses = [{"name": names[k], "probability": float(chances[i, k])} for k in best]
            rank = int((cosines[i] >= cosines[i, targets[i]]).sum())
            pictures.append({**run.show(items[i]), "guesses": guesses, "rank": rank})
        stage.tick()
    kept = ("top1", "top1_interval", "top5", "top5_interval", "images", "ways")
    measures = {key: measured[key] for key in kept}
    return {"pictures": pictures, "style": STYLE, **measures, "seconds": stage.seconds}


def _describe(run: _Run) -> dict[str, Any]:
    """Captions of a style never trained on, and how many name the thing; what was drawn, matched to its prompt."""
    items = [item for item in run.index.select(video=False, sources=(STYLE,)) if item.label]
    names = names_of(run.index, items)
    batches = [items[i : i + 32] for i in range(0, len(items), 32)]
    with _stage("describing", len(batches) + len(run.drawn)) as stage:
        captions: list[str] = []
        for batch in batches:
            captions += run.blip.caption([run.index.media(item) for item in batch], prompt=ASKED)
            stage.tick()
        score = label_recall(captions, [names[str(item.label)]["en"] for item in items])
        shown = torch.randperm(len(items), generator=rng.generator(run.seed, "demo", "describe"))[
            :NAMED
        ].tolist()
        pictures = [
            {**run.show(items[i]), "caption": captions[i], "named": bool(score.each[i])} for i in shown
        ]
        matched = []
        for (words, meaning), drawn in zip(DRAW, run.drawn, strict=True):
            chances = run.blip.match(drawn, [words] * len(drawn)).tolist()
            matched.append({**run.prompt(words, meaning), "probabilities": chances})
            stage.tick()
    return {
        "pictures": pictures, "matched": matched, "style": STYLE, "images": len(items), "named": score.all,
        "named_interval": bootstrap(torch.tensor(score.each, dtype=torch.double)), "seconds": stage.seconds,
    }  # fmt: skip


# --- what the parts need --------------------------------------------------------------------------------------------


def _own(out: Path) -> None:
    """Nothing of the user's is written over: `out` is new, empty, or a gallery, whole or begun."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder for the gallery with --out.")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if there - OURS or ("index.html" in there and "results.json" not in there):
        raise InputError(f"{out} is not empty and holds no gallery: give another folder with --out.")
    try:
        for folder in FOLDERS:
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        raise InputError(f"Cannot make the folder {out}: give another with --out.") from None


@dataclass
class _Stage:
    tick: Callable[..., None]  # also takes a sampler's (done, total)
    begun: float
    seconds: float = 0.0


@contextmanager
def _stage(name: str, total: int = 0) -> Iterator[_Stage]:
    """Times a part and shows how far it is."""
    begun, done = time.perf_counter(), 0
    with counting(name) as show:

        def tick(*_: int) -> None:
            nonlocal done
            done += 1
            show(done, total)

        stage = _Stage(tick, begun)
        yield stage
    stage.seconds = time.perf_counter() - begun
    print(f"{name}: done in {stage.seconds:.1f} s", file=sys.stderr, flush=True)
