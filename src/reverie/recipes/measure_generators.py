"""What generators of pictures and clips reach: the measurements behind `reverie eval`.

    pictures   a generator draws, judges name, nothing is copied       reverie eval pictures DIR
    clips      the same on clips, how much and how evenly they move    reverie eval clips DIR
    world      the exact judge reads a generator's scenes back         reverie eval world

Every number stands beside what real pictures reach and what guessing gives. Seeds and prompts are in the numbers, so
each sample can be drawn again with `reverie sample`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from reverie.data.augment import on_white
from reverie.data.index import Index
from reverie.data.pixels import Pixels, cache_of
from reverie.data.world import World
from reverie.errors import InputError
from reverie.evals import generation, video
from reverie.evals.frechet import frechet
from reverie.evals.interval import bootstrap
from reverie.evals.world_captions import read_caption
from reverie.output import write
from reverie.pictures import grid, save_png, to_bytes
from reverie.progress import counting
from reverie.recipes.measured import Measured, Row, fits, save_figure, share
from reverie.recipes.parts import capable, home, plain_stickers
from reverie.systems.dalle import Dalle
from reverie.systems.sora import Sora
from reverie.train import memory

JUDGES = ("clip-stickers", "judge-stickers")
UNSEEN = 1_000_000  # the first scene of the world that is measured; recipes train on the first thousands


class Real:
    """Real items as signals: `real[i]` is `3 h w`, or `3 f h w` with frames evenly out of the whole clip.

    A slice or a list of indices gives a batch.
    """

    def __init__(self, index: Index, size: tuple[int, int], frames: int):
        self.frames = frames
        self.pixels = Pixels(index, size=size, frames=frames, cache=cache_of(index))
        self.items = [index[i] for i in self.pixels.good]
        self.by_label = {item.label: i for i, item in enumerate(self.items) if item.label}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Tensor:
        if isinstance(which, slice):
            which = range(len(self))[which]
        if not isinstance(which, int):
            return torch.stack([self[i] for i in which])
        video = self.pixels[self.pixels.good[which]]
        places = torch.linspace(0, len(video) - 1, self.frames).round().long()
        signal = rearrange(on_white(video[places]), "f c h w -> c f h w")
        return signal[:, 0] if self.frames == 1 else signal

    def vectors(self, space: generation.Space, *, batch: int = 64) -> Tensor:
        """All items in a space, `n d`."""
        return torch.cat([space(self[at : at + batch]) for at in range(0, len(self), batch)])


# ---------------------------------------------------------------- generation of stickers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """How much is drawn to be measured, and how; a setting that is None is the model's own."""

    count: int = 200  # labels, or scenes
    varied: int = 16  # labels of which are drawn with several seeds
    seeds: int = 4
    batch: int = 16
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    device: str | None = None  # the GPU if there is one


def pictures(
    data: Path, out: Path, *, model: str = "sora-stickers", judges: Sequence[str] = JUDGES, source: str = "fluent-3d",
    split: str = "train", ask: Draws | None = None,
) -> Measured:  # fmt: skip
    """Draw labels of `source` in `split`; judges pick each out of all drawn; variety; nearest training pictures."""
    return _generation(data, out, model, judges, source, split, ask or Draws(), 1)


def clips(
    data: Path, out: Path, *, model: str = "sora-stickers", judges: Sequence[str] = JUDGES, source: str = "fluent-anim",
    split: str = "train", frames: int | None = None, ask: Draws | None = None,
) -> Measured:  # fmt: skip
    """The same on clips of `frames`: judges see every frame, their scores are averaged; and how much clips move."""
    if frames is not None and frames < 2:
        raise InputError(
            f"a clip of {frames} frames does not move: ask for two or more, or measure pictures."
        )
    return _generation(data, out, model, judges, source, split, ask or Draws(batch=4), frames)


def _generation(
    data: Path,
    out: Path,
    model: str,
    judges: Sequence[str],
    source: str,
    split: str,
    ask: Draws,
    frames: int | None,
) -> Measured:
    out = fits(out)
    draw = Drawing(model, frames, ask)
    panel = {Path(name).name: capable(name, "classify", device=ask.device) for name in judges}
    if len(panel) < len(judges) or not panel:
        raise InputError(f"the judges {', '.join(judges)} need names that differ: rename a folder.")
    size, frames = draw.size, draw.frames
    thing = "picture" if frames == 1 else "clip"
    corpus = plain_stickers(Index.read(data)).select(video=frames > 1, sources=(source,))
    part = corpus.select(split=split)
    names = generation.choose([item.label for item in part if item.label], ask.count, seed=ask.seed)
    if len(names) < 2:
        raise InputError(
            f"{data} has {len(names)} labelled {thing}s by {source!r} in {split!r}: two are the least."
        )
    with torch.no_grad():
        for judge in panel.values():  # a name that a judge does not know must not show after the drawing
            judge.classify(torch.zeros(1, 3, *size), names)

    samples, drawn = draw(names, [ask.seed + i for i in range(len(names))])
    real = Real(part, size, frames)
    names = [name for name in names if name in real.by_label]  # but those whose file is bad
    samples = samples[[drawn["prompts"].index(name) for name in names]]
    truth = real[[real.by_label[name] for name in names]]
    spaces: dict[str, generation.Space] = {"pixels": generation.pixels}
    spaces |= {name: generation.features(judge.embed_image) for name, judge in panel.items()}

    numbers: dict[str, Any] = {"drawn": drawn, "names": names}
    rows: list[Row] = []
    numbers["pick"] = _pick(panel, names, samples, truth, rows)
    numbers["frames"] = _frames(panel, names, samples, truth, rows)
    numbers["diversity"] = _variety(draw, names, samples, truth, spaces, rows, out) if ask.seeds > 1 else {}
    training, rest = Real(corpus.select(split="train"), size, frames), corpus.select(split="val")
    held = Real(rest, size, frames) if len(rest) else None
    numbers["frechet"] = _frechet(samples, training, held, spaces, rows)
    numbers["nearest"] = _nearest(names, samples, training, held, spaces, rows, out)
    if frames > 1:
        _animation(samples[:24], names[:24], out / "samples.webp", fps=draw.fps)
        _animation(truth[:24], names[:24], out / "real.webp", fps=draw.fps)
    rows += [(what, value, "", "") for what, value in draw.cost(drawn)]
    picked = [
        [found["generator"]["picked"][i] for found in numbers["pick"].values()] for i in range(len(names))
    ]
    titles = [f"{name}: {', '.join(guesses)}" for name, guesses in zip(names, picked, strict=True)]
    save_png(grid(to_bytes(_middle(samples[:96], frames)), titles[:96]), out / "samples.png")
    save_png(grid(to_bytes(_middle(truth[:96], frames)), names[:96]), out / "real.png")
    title = f"{model} draws {len(names)} {thing}s: labels of {source}, {split}"
    columns = ("", "generator", "real", "for comparison")
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


class Drawing:
    """A loaded generator, asked as `ask` says: `drawing(prompts, seeds)` gives samples and how they were made."""

    def __init__(self, model: str, frames: int | None, ask: Draws):
        self.sora = capable(model, "generate_image" if frames == 1 else "generate_video", device=ask.device)
        self.device = home(ask.device)
        self.frames = frames or self.sora.config.frames
        self.size, self.ask = self.sora.size_of(self.frames), ask
        self.fps = float(getattr(self.sora.config, "fps", 1.0))

    def __call__(self, prompts: list[str], seeds: list[int]) -> tuple[Tensor, dict[str, Any]]:
        with counting("drawing") as progress:
            samples, seconds = generation.draw(
                self.generate, prompts, seeds, batch=self.ask.batch, progress=progress
            )
        config = self.sora.config
        return samples, {
            "prompts": prompts, "seeds": seeds, "seconds": seconds, "batch": self.ask.batch,
            "device": str(self.device), "threads": torch.get_num_threads(),
            "peak_memory_bytes": memory.peak(self.device) or None,
            "frames": self.frames,
            "size": list(self.size), "steps": self.ask.steps or getattr(config, "steps", None),
            "guidance": config.guidance if self.ask.guidance is None else self.ask.guidance,
        }  # fmt: skip

    def generate(self, prompts: list[str], seeds: list[int]) -> Tensor:
        options = {"seed": seeds, "size": self.size, "guidance": self.ask.guidance}
        if not isinstance(self.sora, Dalle):
            options["steps"] = self.ask.steps
        elif self.ask.steps is not None:
            raise InputError("DALL-E draws code by code and has no steps to choose: leave --steps out.")
        if isinstance(self.sora, Sora):
            options["together"] = True
        if self.frames == 1:
            return self.sora.generate_image(prompts, **options)
        return self.sora.generate_video(prompts, frames=self.frames, **options)

    def cost(self, drawn: dict[str, Any]) -> list[Row]:
        """The rows of a table that say what a sample cost."""
        thing = "picture" if self.frames == 1 else f"clip of {self.frames} frames"
        most = drawn["peak_memory_bytes"]
        return [
            (
                f"seconds a {thing}, {drawn['batch']} at a time, {drawn['device']}, {drawn['threads']} threads",
                f"{drawn['seconds']:.2f}",
            ),
            ("peak memory of the process", "-" if most is None else f"{most / 2**20:,.0f} MiB"),
        ]


def _pick(
    panel: dict[str, Any], names: list[str], samples: Tensor, truth: Tensor, rows: list[Row]
) -> dict[str, Any]:
    """Each judge on the samples and on real pictures of the same names."""
    numbers = {}
    for name, judge in panel.items():
        ours, theirs = (generation.pick(some, names, judge.classify) for some in (samples, truth))
        numbers[name] = {"generator": ours, "real": theirs}
        for k, text in ((1, "picked out"), (5, "among the first five")):
            if k >= ours["ways"]:
                continue  # as many as there are says nothing
            rows.append((
                f"{text} of {ours['ways']}, by {name}", share(ours[f"top{k}"], ours[f"top{k}_interval"]),
                share(theirs[f"top{k}"], theirs[f"top{k}_interval"]), f"{share(ours[f'chance{k}'])} by guessing",
            ))  # fmt: skip
    return numbers


def _frames(
    panel: dict[str, Any], names: list[str], samples: Tensor, truth: Tensor, rows: list[Row]
) -> dict[str, Any]:
    """Frame by frame: whether it fits the words, by judges that read; of clips also how frames follow on each other."""
    numbers: dict[str, Any] = {}

    def row(text: str, kind: str, pair: Sequence[Tensor], compared: str, digits: int = 3) -> None:
        ours, theirs = pair
        numbers[kind] = {"generator": ours.tolist(), "real": theirs.tolist()}
        low, high = bootstrap(ours.double())
        mine = f"{ours.mean():.{digits}f}  [{low:.{digits}f}, {high:.{digits}f}]"
        rows.append((text, mine, f"{theirs.mean():.{digits}f}", compared))

    clips = samples.ndim == 5
    for name, judge in panel.items():
        ours, theirs = (video.frame_features(some, judge.embed_image) for some in (samples, truth))
        if hasattr(judge, "embed_text"):
            texts = judge.embed_text(names).float().cpu()
            scores = [video.clip_score(some, texts).mean(1) for some in (ours, theirs)]
            other = video.clip_score(theirs, texts.roll(1, dims=0)).mean()
            text = f"CLIP score{' of a frame' if clips else ''}: cosine with the name, {name}"
            row(text, f"clip_score {name}", scores, f"{other:.3f} real, of other names")
        if clips:
            pair = [video.consistency(some) for some in (ours, theirs)]
            row(f"cosine of neighbouring frames, {name}", f"consistency {name}", pair, "1: nothing changes")
    if clips:
        pair = [generation.motion(some) for some in (samples, truth)]
        row("motion: difference of neighbouring frames", "motion", pair, "0: still", 4)
    if clips and samples.shape[2] > 2:
        pair = [video.flicker(some) for some in (samples, truth)]
        row("flicker: second differences over first", "flicker", pair, "0: even, 1.73: noise", 2)
    return numbers


def _frechet(
    samples: Tensor, training: Real, held: Real | None, spaces: dict[str, generation.Space], rows: list[Row]
) -> dict[str, Any]:
    """Samples against the training items in each judge's features, beside as many held-out ones, the bias's floor."""
    numbers = {}
    count = len(samples) if held is None else min(len(samples), len(held))
    if count < 2 or len(training) < 2:
        return {}
    for name, space in spaces.items():
        if name == "pixels":
            continue
        known = training.vectors(space)
        numbers[name] = {"generator": frechet(space(samples[:count]), known)}
        floor = "-"
        if held is not None:
            numbers[name]["held_out"] = frechet(held.vectors(space)[:count], known)
            floor = f"{numbers[name]['held_out']['distance']:.4f} held out"
        rows.append((
            f"Frechet distance on features of {name}, {count} samples", f"{numbers[name]['generator']['distance']:.4f}",
            floor, "too high by about 1 / samples: compare equal numbers",
        ))  # fmt: skip
    return numbers


def _variety(
    draw: Drawing, names: list[str], samples: Tensor, truth: Tensor, spaces: dict[str, generation.Space],
    rows: list[Row], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Some of the names again with other seeds: `variety.png` has a row for each."""
    places = range(0, len(names), max(len(names) // draw.ask.varied, 1))[: draw.ask.varied]
    asked = [
        (names[i], draw.ask.seed + turn * len(names) + i) for i in places for turn in range(1, draw.ask.seeds)
    ]
    again, drawn = draw([name for name, _ in asked], [seed for _, seed in asked])
    again = rearrange(again, "(p s) ... -> p s ...", p=len(places))
    several = torch.cat([samples[list(places)][:, None], again], dim=1)
    numbers: dict[str, Any] = {"drawn": drawn}
    for name, space in spaces.items():
        found = generation.diversity(several, space) | {"between_real": generation.spread(truth, space)}
        numbers[name] = found
        ratio = "-" if found["ratio"] is None else f"{found['ratio']:.2f}"
        rows += [
            (
                f"variety within a prompt / between prompts, {name}",
                ratio,
                "",
                "0: one picture each, 1: prompt ignored",
            ),
            (
                f"distance between prompts, {name}",
                f"{found['between']:.3f}",
                f"{found['between_real']:.3f}",
                "",
            ),
        ]
    pictures = rearrange(_middle(several, draw.frames), "p s ... -> (p s) ...")
    titles = [names[i] for i in places for _ in range(draw.ask.seeds)]
    save_png(grid(to_bytes(pictures), titles, columns=draw.ask.seeds), out / "variety.png")
    return numbers


def _nearest(
    names: list[str], samples: Tensor, training: Real, held: Real | None, spaces: dict[str, generation.Space],
    rows: list[Row], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """How far the training items are, beside held-out ones; `nearest.png` and `distances.png` show it."""
    numbers, found = {}, {}
    for name, space in spaces.items():
        known = training.vectors(space)
        far, where = found[name] = generation.nearest(space(samples), known)
        files = [[training.items[j].file_name for j in row] for row in where.tolist()]
        numbers[name] = {"distance": far.tolist(), "file": files}
        theirs, compared = "-", "0: copies"
        if held is not None:
            other = generation.nearest(held.vectors(space), known)[0][:, 0]
            numbers[name] |= generation.copied(far[:, 0], other) | {"held_out_distance": other.tolist()}
            theirs = f"{other.median():.3f} held out"
            compared += f"; {numbers[name]['nearer']:.0%} nearer than held out (50%: as new, 100%: copies)"
        rows.append(
            (f"distance to the nearest training item, {name}", f"{far[:, 0].median():.3f}", theirs, compared)
        )
    order = found["pixels"][0][:, 0].argsort().tolist()
    pictures, titles = [], []
    for i in order[:12] + order[12 :: max((len(order) - 12) // 12, 1)][:12]:
        pictures.append(_middle(samples[i], training.frames))
        titles.append(f"drawn: {names[i]}")
        for name, (far, where) in found.items():
            for distance, j in zip(far[i].tolist(), where[i].tolist(), strict=True):
                pictures.append(_middle(training[j], training.frames))
                titles.append(f"{name} {distance:.3f}: {training.items[j].label}")
    columns = 1 + sum(far.shape[1] for far, _ in found.values())
    save_png(grid(to_bytes(torch.stack(pictures)), titles, columns=columns), out / "nearest.png")
    _histograms(numbers, out / "distances.png")
    return numbers


# ---------------------------------------------------------------- generation of the world


def world(
    out: Path, *, model: str, frames: int = 1, kind: str | None = None, language: str = "en", world_seed: int = 0,
    ask: Draws | None = None,
) -> Measured:  # fmt: skip
    """Draw captions of unseen scenes; the exact judge says for each attribute how often the picture keeps its word.

    Renders of the same scenes are the ceiling; renders of other scenes are what one gets without reading the text.
    """
    ask, out = ask or Draws(), fits(out)
    draw = Drawing(model, frames, ask)
    examples = World(ask.count, seed=world_seed, size=draw.size, frames=frames, kind=kind, first=UNSEEN)
    prompts, truth = [], []
    for i in range(ask.count):
        example = examples[i]
        texts = [caption.text for caption in example.captions if caption.language == language]
        if not texts:
            raise InputError(f"the world has no captions in {language!r}: choose en or zh.")
        prompts.append(texts[0])
        truth.append(rearrange(on_white(example.pixels), "f c h w -> c f h w"))
    real = torch.stack(truth)
    real = real[:, :, 0] if frames == 1 else real
    samples, drawn = draw(prompts, [ask.seed + i for i in range(ask.count)])
    said = [read_caption(prompt) for prompt in prompts]
    ours, ceiling, other = (generation.scenes(some, said) for some in (samples, real, real.roll(1, dims=0)))
    rows: list[Row] = [
        (name, f"{ours[name]['asked']}", share(ours[name]["right"], ours[name]["interval"]),
         share(ceiling[name]["right"]), share(other[name]["right"]))
        for name in ours
    ]  # fmt: skip
    rows += [(what, "", value, "", "") for what, value in draw.cost(drawn)]
    pairs = torch.stack([_middle(samples[:32], frames), _middle(real[:32], frames)], dim=1)
    titles = [text for prompt in prompts[:32] for text in (prompt, "as the world has it")]
    save_png(grid(to_bytes(rearrange(pairs, "n two ... -> (n two) ...")), titles), out / "samples.png")
    if frames > 1:
        _animation(samples[:24], prompts[:24], out / "samples.webp", fps=draw.fps)
    numbers = {
        "drawn": drawn, "generator": ours, "real": ceiling, "other_scenes": other, "first_scene": UNSEEN,
        "world_seed": world_seed, "kind": kind, "language": language,
    }  # fmt: skip
    title = f"{model} draws {ask.count} unseen scenes of the world, which the exact judge reads back"
    columns = ("said in the text", "asked", "generator", "real", "other scenes")
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers).write(out)


# ---------------------------------------------------------------- what they share


def _middle(samples: Tensor, frames: int) -> Tensor:
    """Of clips `... 3 f h w` the middle frame; pictures as they are."""
    return samples if frames == 1 else samples[..., frames // 2, :, :]


def _histograms(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The distances of samples and of held-out items to the nearest training item."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 3), layout="constrained")
    for axes, (name, numbers) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        series = {
            "samples": [row[0] for row in numbers["distance"]],
            "held out": numbers.get("held_out_distance", []),
        }
        top = max(value for values in series.values() for value in values) or 1.0
        for label, values in series.items():
            if values:
                axes.hist(values, bins=30, range=(0, top), density=True, histtype="step", label=label)
        axes.set_title(f"to the nearest training item, {name}", fontsize=9)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def _animation(clips: Tensor, titles: Sequence[str], path: Path, *, fps: float) -> None:
    """One moving sheet of clips, WebP."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = (grid(to_bytes(clips[:, :, f]), list(titles)) for f in range(clips.shape[2]))
    write(path, frames, fps=fps, quality=80)
