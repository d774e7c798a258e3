"""What gradient caching costs and saves: steps of the sticker CLIP, direct and in chunks, up to the paper's batch.

    python benchmarks/contrastive.py STICKERS [--batch 128] [--chunks 0 64 32] [--large 32768] [--large-chunk 256]

STICKERS is the corpus of `reverie data stickers`, of which only the captions are read: pictures are noise, since what
they show costs nothing. The model, views, loss and optimizer are those of `reverie train clip-stickers` from random
weights, on one thread, in fp32. Every row is a process of its own. `peak MB` is the most that it held, Python and
libraries included; `tensors MB` is the most that tensors of one step took beside the model and the batch, which the
profiler counts in an extra step of batches up to 1,024. Times are of the processor: the best of `--repeats` steps, of
the large batch its only one, after a step of eight pictures. `--large 0` leaves it out, `--chunks` with nothing the
small one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie import rng
from reverie.data.augment import draws, view
from reverie.data.index import Index
from reverie.data.wording import draw_caption
from reverie.recipes import clip as recipe
from reverie.recipes.parts import load_clip, plain_stickers
from reverie.systems.clip import Clip
from reverie.train.gradient_cache import cached
from reverie.train.memory import peak as peak_memory
from reverie.train.optimizers import adamw

LANGUAGES = {"en": 0.85, "zh": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", type=Path, help="the sticker corpus")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--chunks", type=int, nargs="*", default=[0, 64, 32], help="0: direct")
    parser.add_argument("--large", type=int, default=32_768, help="one step of so many pictures")
    parser.add_argument("--large-chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--one", type=int, nargs=3, metavar=("BATCH", "CHUNK", "REPEATS"), help=argparse.SUPPRESS
    )
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.data, *asked.one)))
        return
    rows = [(asked.batch, chunk, asked.repeats) for chunk in asked.chunks]
    if asked.large:
        rows.append((asked.large, asked.large_chunk, 1))
    print(
        "| batch | chunk | processor s | of which loss | ms a picture | peak MB | tensors MB | loss | gradient |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        command = [sys.executable, __file__, str(asked.data), "--one", *map(str, row)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        tensors = f"{found['tensors'] / 1e6:.0f}" if found["tensors"] else "not counted"
        print(
            f"| {found['batch']:,} | {found['chunk'] or 'direct'} | {found['seconds']:.2f} "
            f"| {found['loss_seconds']:.3f} | {1000 * found['seconds'] / found['batch']:.2f} "
            f"| {found['peak'] / 1e6:.0f} | {tensors} | {found['loss']:.6f} | {found['norm']:.6f} |",
            flush=True,
        )


def measure(data: Path, size: int, chunk: int, repeats: int) -> dict[str, Any]:
    """The best of `repeats` steps. Loss and gradient norm are those of the first step that counts."""
    torch.set_num_threads(1)
    index = plain_stickers(Index.read(data)).select(split="train", video=False)
    tokenizer = load_clip("clip-stickers").tokenizer
    assert tokenizer is not None
    torch.manual_seed(rng.integer(0, "weights"))
    model = Clip(recipe.shape(tokenizer.vocab, tokenizer.end), tokenizer).train()
    optimizer = adamw(model, lr=0.0)
    step(
        model, optimizer, batch_of(model, index, min(size, chunk or size)), 0
    )  # libraries and optimizer state
    batch = batch_of(model, index, size)
    steps = [step(model, optimizer, batch, chunk) for _ in range(repeats)]
    best = min(steps, key=lambda found: found["seconds"])
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    tensors = allocated(lambda: step(model, optimizer, batch, chunk)) if size <= 1024 else None
    return {"batch": size, "chunk": chunk, "peak": peak, "tensors": tensors} | best


def batch_of(model: Clip, index: Index, size: int) -> dict[str, Tensor]:
    """As the recipe makes it, but for what is on the pictures."""
    assert model.tokenizer is not None
    keys = [divmod(place, len(index)) for place in range(size)]
    texts = [draw_caption(index[i], rng.generator(0, "caption", e, i), languages=LANGUAGES) for e, i in keys]
    names = {name: number for number, name in enumerate(sorted({item.label or item.hash for item in index}))}
    side = model.config.image.size
    return {
        "rgba": torch.randint(
            256, (size, 4, side, side), dtype=torch.uint8, generator=rng.generator(0, "noise")
        ),
        "draws": draws(0, keys),
        "tokens": model.tokenizer.encode(texts, length=model.config.text.length),
        "label": torch.tensor([names[index[i].label or index[i].hash] for _, i in keys]),
    }


def step(
    model: Clip, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], chunk: int
) -> dict[str, float]:
    """Forward, backward, update, at a learning rate of 0."""
    begin = time.process_time()
    vectors = cached(partial(embed, model), batch, chunk=chunk)
    embedded = time.process_time()
    loss = model.compare(*vectors, label=batch["label"])["loss"]
    compared = time.process_time()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "seconds": time.process_time() - begin,
        "loss_seconds": compared - embedded,
        "loss": float(loss.detach()),
        "norm": float(norm),
    }


def embed(model: Clip, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model.embed(batch | {"image": view(batch["rgba"], batch["draws"], strength=0.5)})


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` take at a time, by the profiler's account."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))


if __name__ == "__main__":
    main()
