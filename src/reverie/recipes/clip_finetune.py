"""Fine-tuning a CLIP, from public weights or one's own, on a small folder:    reverie train clip-finetune FOLDER

The loss is the one of training, as "Finetune like you pretrain" (2212.00638) has it: pictures against their captions or
names, equal names right for each other. What may be held back: a tower (LiT, 2111.07991: its vectors, and every index
made of them, stay valid), all weights but small adapters (LoRA, 2106.09685), the rate of the lower blocks. And the
result may lie between the start and the end (WiSE-FT, 2109.01903), so that what was known before is not lost.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

from reverie.data.index import Index
from reverie.errors import InputError
from reverie.nn.lora import add_lora, lora_state, merge_lora
from reverie.recipes.clip import ClipRun, Measure, fit, val_of, zero_shot_of
from reverie.recipes.measured import Measured
from reverie.recipes.measured import share as percent
from reverie.recipes.parts import at_most, keep, load_clip, open_index, plain_stickers
from reverie.systems.clip import Clip
from reverie.train.engine import ENGINE, Engine
from reverie.train.parallel import team
from reverie.weights import files
from reverie.weights.blend import blend as between

TOWERS = ("image", "text")


def finetune(
    data: Path,
    out: Path,
    *,
    start: str = "clip-stickers",
    steps: int = 200,
    batch: int = 64,
    chunk: int = 0,
    memory: str = "",
    lr: float = 1e-4,
    lock: str = "",
    lora: int = 0,
    alpha: float = 0.0,
    layer_decay: float = 1.0,
    blend: float = 1.0,
    known: Path | None = None,
    known_sources: tuple[str, ...] = (),
    strength: float = 0.5,
    drop: float = 0.0,
    unmasked: float = 0.1,
    mix: str = "",
    seed: int = 0,
    engine: Engine = ENGINE,
) -> Clip:
    """Fine-tune a CLIP on a captioned or labelled folder, and keep what it knew as far as you like.

    Leaves `model`; with --blend also the fine-tuned end, `tuned`; with --lora the adapters alone, `lora.safetensors`;
    and table.md, what start, end and model reach on the folder's split val and on --known.

    Args:
        data: A folder that was imported, or one to import.
        out: The run's folder; the model is written to its `model`.
        start: The CLIP to fine-tune: a shipped name, or a folder of Reverie, transformers or open_clip.
        steps: How many batches to learn from.
        batch: Pictures of a step.
        chunk: Pictures embedded at a time, each twice, so that a batch beyond the memory fits. 0: all.
        memory: Choose the chunk for this much memory, such as 6GB: free, or a laptop, workstation or server.
        lr: The highest learning rate; ten times as much suits --lora.
        lock: The tower that stays as it is, with its projection: image or text; none if not given.
        lora: Train only adapters of this rank on the linear layers of the towers; 0 trains the weights themselves.
        alpha: How strongly adapters count, over their rank; the rank itself if not given.
        layer_decay: The factor on the learning rate from each block to the one below, such as 0.8.
        blend: How far from the start to the fine-tuned end the model lies: 0.5 in the middle, 1 at the end.
        known: A labelled folder of what it knew before, to be named again at the end.
        known_sources: Only these sources of it; all if not given.
        strength: How strongly pictures are turned, cropped and tinted, 0 for not at all.
        drop: The share of the patches that is left out at random.
        unmasked: The share of the steps, the last ones, in which nothing is left out.
        mix: Shares of captions by kind (docs/data.md), such as dalle3; each is as likely if not given.
        seed: Another order and other adapters.
    """
    if not 0 <= blend <= 1:
        raise InputError(f"blend is {blend}: give a share from 0, the start, to 1, the fine-tuned end.")
    index = open_index(data)
    train_set = index.select(split="train")
    measures = _measures(index)
    ends = dict(measures)
    if known is not None:
        before = plain_stickers(open_index(known)).select(sources=known_sources or None)
        if not any(item.label for item in before):
            raise InputError(f"no picture in {known} that is wanted has a label: give a labelled folder.")
        ends["known"] = partial(zero_shot_of, val=before)
    model = load_clip(start, trainable=True)
    restrict(model, lock=lock, lora=lora, alpha=alpha, seed=seed)
    config = ClipRun(
        model=model.config, start=start, steps=steps, batch=at_most(batch, len(train_set)), chunk=chunk, lr=lr,
        warmup=max(steps // 10, 1), strength=strength, drop=drop, unmasked=unmasked, lock=lock, lora=lora,
        alpha=alpha, layer_decay=layer_decay, mix=mix, seed=seed,
    )  # fmt: skip

    def finish(model: Clip, out: Path) -> None:
        begun = load_clip(start).to(engine.home)
        tuned = copy.deepcopy(model)
        if lora:
            if team().first:
                files.write(out / "lora.safetensors", lora_state(tuned))
            merge_lora(tuned)
        final = between(begun, tuned, share=blend)
        if blend < 1:
            keep(tuned, out / "tuned")
        keep(final, out / "model")
        if ends:
            systems = {"start": begun, "tuned": tuned} | ({f"blend {blend:g}": final} if blend < 1 else {})
            table = _compared(systems, ends, f"{start} on {data}")
            if team().first:
                print(table.write(out))

    return fit(config, model, train_set, out, measures=measures, finish=finish, memory=memory, engine=engine)


def restrict(model: Clip, *, lock: str = "", lora: int = 0, alpha: float = 0.0, seed: int = 0) -> None:
    """Leave trainable what is neither locked nor beside adapters. InputError: there is no such tower or rank."""
    if lock and lock not in TOWERS:
        raise InputError(f"lock is {lock!r}: give one of {', '.join(TOWERS)}.")
    if lora < 0:
        raise InputError(f"lora is {lora}: give a rank of 1 or more, or 0 for none.")
    if alpha and not lora:
        raise InputError(f"alpha is {alpha}, but there are no adapters: give --lora, their rank.")
    if lora:
        patterns = [f"{tower}.*" for tower in TOWERS if tower != lock]
        add_lora(model, patterns, rank=lora, alpha=alpha or None, seed=seed)
    elif lock:
        for part in (getattr(model, lock), getattr(model, f"{lock}_projection")):
            part.requires_grad_(False)


def _measures(index: Index) -> dict[str, Measure]:
    """Of the split val: naming if it has labels, else retrieval."""
    val = index.select(split="val")
    if len({item.label for item in val if item.label}) > 1:
        return {"val": partial(zero_shot_of, val=val)}
    return val_of(index)


def _compared(systems: dict[str, Clip], ends: dict[str, Measure], title: str) -> Measured:
    numbers = {
        name: {
            f"{what} {key}": value for what, measure in ends.items() for key, value in measure(system).items()
        }
        for name, system in systems.items()
    }
    columns = ("", *next(iter(numbers.values())))
    rows = [(name, *(percent(value) for value in found.values())) for name, found in numbers.items()]
    return Measured(title=title, columns=columns, rows=rows, numbers=numbers)
