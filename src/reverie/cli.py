"""The command line: `reverie COMMAND ...`, one plain typed function for each command, its flags read from it by tyro.

The overview (`reverie`, `reverie --help`) needs nothing but this file, and tyro is asked about the one command that
was named (`reverie.command`). Whatever is heavy (torch, pyarrow, matplotlib) is imported inside the command that uses
it. A mistake of the user (`InputError`) is one sentence on stderr and exit code 2, as is an unknown command or flag or
a wrong value; Ctrl-C is 130.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.command import Command, asks_for_help, did_you_mean, nearest, restored
from reverie.errors import InputError, out_of_memory
from reverie.progress import MANNERS, SETTING, manner, say
from reverie.recipes.asked import Ask, CapFilt, Captioning, Chat, Telling

if TYPE_CHECKING:
    from torch import Tensor

ASK, CAPFILT, CAPTIONING, CHAT, TELLING = Ask(), CapFilt(), Captioning(), Chat(), Telling()

# ---------------------------------------------------------------- data


def data_import(
    folder: Path,
    /,
    *,
    out: Path | None = None,
    val: float = 0.05,
    need_captions: bool = True,
    source: str | None = None,
    licence: str | None = None,
) -> None:
    """Read a folder of pictures and clips with their captions, and write its index.

    Knows sidecars (.txt, .caption, .json), metadata.jsonl, .csv and .parquet, class-named folders and webdataset
    tars. The media are never changed.

    Args:
        folder: The folder to read.
        out: Where metadata.parquet goes; the folder itself if not given.
        val: The share that is kept from training, to measure on.
        need_captions: Reject files without words.
        source: Where the files come from, recorded with each.
        licence: Their licence, recorded with each.
    """
    from reverie.data.check import check
    from reverie.data.importers import import_folder

    index = import_folder(
        folder, out=out, val=val, need_captions=need_captions, source=source, licence=licence
    )
    print(check(index, quiet=True))


def data_check(folder: Path, /, *, contents: bool = False) -> None:
    """List every rejected file with its reason, and say what share was lost.

    Args:
        folder: A folder that was imported.
        contents: Compare the files' hashes with the index too, not only their sizes.
    """
    from reverie.data.check import check

    print(check(folder, contents=contents))


def data_show(
    folder: Path,
    /,
    *,
    out: Path = Path("sheet.png"),
    count: int = 48,
    size: int = 128,
    columns: int = 8,
    seed: int = 0,
) -> None:
    """Draw a contact sheet: pictures, clips and their words on one page.

    Args:
        folder: A folder that was imported.
        out: Where the PNG goes.
        count: How many are shown.
        size: Pixels a side.
        columns: Pictures in a row.
        seed: Another seed, another choice.
    """
    from reverie.data.index import Index
    from reverie.data.sheet import contact_sheet

    print(contact_sheet(Index.read(folder), out, count=count, size=size, columns=columns, seed=seed))


def data_report(
    folder: Path,
    /,
    *,
    out: Path = Path("report.html"),
    model: str = "clip-stickers",
    no_model: bool = False,
    sample: int = 5000,
    language: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Write all there is to know of a dataset as one page: counts, sizes, captions, scores, copies, a map.

    The page holds its pictures and needs no network; the numbers go into a .json beside it. Nothing in the folder is
    changed, but embeddings are kept there as for search.

    Args:
        folder: A folder that was imported.
        out: Where the page goes; its numbers beside it.
        model: The CLIP that says which captions fit and what is alike: a shipped name or a folder.
        no_model: Only what the index says, which takes seconds.
        sample: At most so many files are looked at by the model, drawn by lot; all are counted.
        language: Only captions in this language are compared with their pictures, such as en; all if not given.
        seed: Another seed, another choice.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.data_report import report

    looking = None if no_model else model
    written = report(folder, out, model=looking, sample=sample, language=language, seed=seed, device=device)
    for path in written:
        print(path)


def data_shrink(
    folder: Path,
    out: Path,
    /,
    *,
    size: int = 64,
    frames: int = 16,
    quality: int = 90,
    sources: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> None:
    """Write a small copy of a dataset: every picture and clip at one size, captions and all.

    Args:
        folder: A folder that was imported.
        out: A new folder for the copy.
        size: Pixels a side.
        frames: At most so many frames of a clip.
        quality: WebP's, 1 to 100.
        sources: Only items of these sources; all if not given.
        without: Leave out the items for which one of these scores of the index is above zero.
    """
    from reverie.data.index import Index
    from reverie.data.shrink import shrink

    index = Index.read(folder).select(sources=sources or None)
    items = [item for item in index if not any(item.scores.get(name, 0) > 0 for name in without)]
    print(shrink(Index(index.folder, items), out, size=size, frames=frames, quality=quality))


def data_pack(
    folder: Path,
    out: Path,
    /,
    *,
    size: str = "1GB",
    count: int | None = None,
    split: str | None = None,
    shuffle: bool = False,
) -> None:
    """Pack a dataset into webdataset tars with an index, by which they are read at any place.

    The media are not encoded again. After an interruption the same command goes on. What comes out is a folder for
    every other command, here or at an address such as s3://bucket/photos.

    Args:
        folder: A folder that was imported, or an address.
        out: A new folder for the tars and their index.
        size: Of a tar at most, such as 500MB.
        count: At most so many items in a tar.
        split: Only this split: train, val or test; all if not given, each in tars of its own.
        shuffle: Put the items into the tars in random order, for those who read tars from end to end.
    """
    from reverie.data.index import Index
    from reverie.data.shards import pack
    from reverie.progress import bytes_of

    index = Index.read(folder)
    wanted = index.select(split=split, accepted=None)
    print(pack(wanted, out, size=bytes_of(size), count=count, shuffle=shuffle))
    if len(wanted) < len(index):
        print(f"left in {folder}: {len(index) - len(wanted):,} items of other splits")


def data_stickers(
    folder: Path, /, *, sources: tuple[str, ...] = (), size: int = 256, jobs: int | None = None
) -> None:
    """Fetch the sticker corpus: 24,000 pictures and 2,000 animations with words in English and Chinese.

    Uses the npm and pip of this machine. Resumable: run it again after an interruption.

    Args:
        folder: Where the corpus goes.
        sources: Only these; all if not given.
        size: Larger pictures are shrunk to this many pixels a side.
        jobs: Drawings rasterised at a time; one for each processor if not given.
    """
    from reverie.data.stickers import stickers, summary

    print(summary(stickers(folder, sources=sources or None, size=size, jobs=jobs)))


def data_world(
    folder: Path,
    /,
    *,
    count: int = 1000,
    size: tuple[int, int] = (64, 64),
    frames: int = 1,
    kind: str | None = None,
    fps: float = 12.0,
    seed: int = 0,
) -> None:
    """Draw the procedural world: captioned scenes of coloured shapes with exact truth.

    Args:
        folder: A new folder for the scenes.
        count: How many.
        size: Height and width in pixels.
        frames: 1 draws pictures, more draws clips.
        kind: Only one kind of scene, such as count, relation or motion.
        fps: Frames per second of the clips.
        seed: Another seed, another world.
    """
    from reverie.data.world import write
    from reverie.progress import counting

    with counting("drawing") as progress:
        index = write(
            folder, count, seed=seed, size=size, frames=frames, kind=kind, fps=fps, progress=progress
        )
    print(f"{len(index):,} scenes in {folder}")


def data_score(
    folder: Path,
    /,
    *,
    model: str = "clip-stickers",
    name: str = "clip",
    language: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    device: str | None = None,
) -> None:
    """Score how well each caption fits its picture, by CLIP, into the index.

    The score of an item is the mean of its captions' cosines with it. What was scored before and has not changed is
    left alone.

    Args:
        folder: A folder that was imported.
        model: The CLIP that compares: a shipped name or a folder.
        name: What the score is called in the index.
        language: Only captions in this language count, such as en; all if not given.
        workers: Processes that share the work, by Ray; without it and --ray all is done in one.
        ray: The Ray cluster whose workers do it: auto, HOST:PORT, or local for this machine alone.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.cleaning import score

    with _pool(workers, ray, device) as pool:
        now, before, bad = score(folder, model=model, name=name, language=language, device=device, pool=pool)
    for it in bad:
        print(f"not scored: {it.path}: {it.reason}", file=sys.stderr)
    print(f"score_{name}: {now:,} scored now, {before:,} before, {len(bad):,} cannot be read")


def data_embed(
    folder: Path,
    /,
    *,
    model: str = "clip-stickers",
    dtype: str = "float16",
    workers: int | None = None,
    ray: str | None = None,
    device: str | None = None,
) -> None:
    """Embed a folder's pictures and clips, and keep the vectors there, where search, score and dedupe read them.

    What was embedded before and has not changed is left alone, so an interrupted command is gone on with.

    Args:
        folder: A folder that was imported, or any folder of pictures.
        model: The CLIP that embeds: a shipped name or a folder.
        dtype: What is kept: float16, which search and cleaning read, or float32, which eval reads.
        workers: Processes that share the work, by Ray; without it and --ray all is done in one.
        ray: The Ray cluster whose workers do it: auto, HOST:PORT, or local for this machine alone.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.search import embed

    if dtype not in ("float16", "float32"):
        raise InputError(f"dtype is {dtype!r}: give float16 or float32.")
    with _pool(workers, ray, device) as pool:
        found = embed(folder, model=model, dtype=dtype, device=device, pool=pool)
    for it in found.bad:
        print(f"not embedded: {it.path}: {it.reason}", file=sys.stderr)
    print(f"{len(found.names):,} files, {len(found.vectors):,} vectors, {len(found.bad):,} cannot be read")
    if found.place is None:
        raise InputError(f"{folder} cannot be written to, so nothing was kept.")
    print(found.place)


def data_encode(
    folder: Path,
    /,
    *,
    codec: str,
    size: int = 64,
    frames: int = 1,
    dtype: str = "float32",
    workers: int | None = None,
    ray: str | None = None,
    device: str | None = None,
) -> None:
    """Encode a folder's pictures and clips by an autoencoder of either, and keep the latents there.

    What was encoded before and has not changed is left alone, so an interrupted command is gone on with.

    Args:
        folder: A folder that was imported, or any folder of pictures.
        codec: The folder of a video autoencoder (video-vae-stickers makes one).
        size: Pixels a side that files are fitted into.
        frames: Frames of a clip, evenly spaced; with the usual codec 1, 5, 9 and so on. Pictures have one.
        dtype: What is kept: float32, exactly what the codec gives; float16 or bfloat16, rounded, half as large.
        workers: Processes that share the work, by Ray; without it and --ray all is done in one.
        ray: The Ray cluster whose workers do it: auto, HOST:PORT, or local for this machine alone.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.video_vae import encode

    with _pool(workers, ray, device) as pool:
        found = encode(folder, codec=codec, size=size, frames=frames, dtype=dtype, device=device, pool=pool)
    for it in found.bad:
        print(f"not encoded: {it.path}: {it.reason}", file=sys.stderr)
    print(f"{len(found.names):,} files, {len(found.bad):,} cannot be read")
    print(found.place)


def data_dedupe(
    folder: Path,
    /,
    *,
    by: str = "both",
    distance: float = 6.0,
    cosine: float = 0.98,
    model: str = "clip-stickers",
    sheet: Path | None = None,
    undo: bool = False,
    device: str | None = None,
) -> None:
    """Mark near duplicates, all but the best of each group; nothing is deleted.

    What is held out stays and its copies in the training split are marked, since they would flatter every score.

    Args:
        folder: A folder that was imported.
        by: hash (perceptual hash, no model), embedding, or both, where two files must be alike in both.
        distance: How many of the 64 bits of their hashes may differ.
        cosine: How close their embeddings must be.
        model: The CLIP that compares: a shipped name or a folder.
        sheet: Draw the groups to this PNG.
        undo: Take back the marks of this command.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    if undo:
        from reverie.data.marks import undo as take_back

        print(f"{take_back(folder, 'dedupe'):,} marks taken back")
        return
    from reverie.recipes.cleaning import copies_sheet, dedupe

    groups, bad = dedupe(folder, by=by, distance=distance, cosine=cosine, model=model, device=device)
    for it in bad:
        print(f"not compared: {it.path}: {it.reason}", file=sys.stderr)
    for group in groups:
        for copy in group:
            print(f"{copy.item.file_name}: {copy}")
    print(f"groups: {len(groups):,}, files marked: {sum(map(len, groups)):,}")
    leaks = sum(copy.leak for group in groups for copy in group)
    if leaks:
        print(
            f"warning: {leaks:,} of these files were leaks: copies, in the training split, of what is held out"
        )
    if sheet is not None and groups:
        print(copies_sheet(folder, groups, sheet))


def data_filter(
    folder: Path,
    /,
    *,
    keep: float | None = None,
    above: float | None = None,
    score: str = "clip",
    split: str = "train",
    undo: bool = False,
) -> None:
    """Mark the items that score too low, so that no recipe draws them; nothing is deleted.

    Running it again with another share starts from the items without its marks.

    Args:
        folder: A folder that was imported and scored.
        keep: The share of the best that stays, such as 0.3.
        above: The least score that stays, instead of a share.
        score: Which score of the index; clip is what data score writes.
        split: What is held out is measured on and stays as it is, unless another split is named.
        undo: Take back the marks of this command.
    """
    from reverie.data import marks

    if undo:
        if keep is not None or above is not None:
            raise InputError("undo takes back all marks: leave --keep and --above out.")
        print(f"{marks.undo(folder, 'filter'):,} marks taken back")
        return
    kept, marked, without = marks.keep(folder, share=keep, above=above, score=score, split=split)
    stay = f", {without:,} without a score stay" if without else ""
    print(f"{split}: {kept:,} kept, {marked:,} marked{stay}")


# ---------------------------------------------------------------- train


def train(
    recipe: str,
    data: Path,
    /,
    *,
    out: Path | None = None,
    device: str | None = None,
    precision: str = "auto",
    non_finite: str = "stop",
    recompute: bool = False,
    compile: bool = False,
    shard: bool = False,
    background: bool = False,
) -> None:
    """Train a system on a captioned folder: `reverie train RECIPE DATA`.

    Says before the first step how long it will take and how much memory it needs. The same command goes on after an
    interruption. Each recipe has flags of its own: `reverie train RECIPE --help`. On several processes or machines:
    `torchrun --nproc-per-node N -m -- reverie train RECIPE DATA`, where batches are those of all processes together.

    Args:
        recipe: Which system, and how.
        data: A folder that was imported, or one to import.
        out: The run's folder, in which the model goes to `model`; runs/RECIPE-DATA if not given.
        device: Where to train, such as cpu or cuda; the GPU if there is one.
        precision: fp32, bf16 or auto: bf16 where the processor has it.
        non_finite: When a loss is not finite: stop, skip that step, or rollback to the last checkpoint without it.
        recompute: Compute the blocks again on the way back instead of keeping what they did: less memory, more time.
        compile: Compile the blocks first (torch.compile), which needs a C++ compiler on a CPU.
        shard: Under torchrun, share out the weights over the processes (FSDP2); otherwise each has all (DDP).
        background: Write checkpoints while training goes on, from a copy.
    """
    from reverie.catalog import RECIPES

    raise InputError(f"There is no recipe {recipe!r}: there are {', '.join(RECIPES)}.")


def replay(run: Path, /, *, step: int = 0, data: Path | None = None, device: str | None = None) -> int:
    """Compute a step that stood out once more, from what the run kept of it, and say whether it gives the same.

    Nothing is trained, and the run is left as it is. Exit code 1: it gave something else.

    Args:
        run: The run's folder.
        step: Which step; the newest of which there is evidence if not given.
        data: Where the run's data lie now; where they lay if not given.
        device: Where to compute; the GPU if there is one.
    """
    import json
    from contextlib import chdir

    from reverie.catalog import RECIPES
    from reverie.data.index import FILE
    from reverie.data.remote import address

    path = run / "command.json"
    try:
        first = json.loads(path.read_text("utf-8"))
        told = [first, *first.get("resumed", ())][-1]
        name, folder, given = told["recipe"], Path(told["folder"]), dict(told["arguments"])
        where = Path(told["data"]) if data is None else data
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} does not say which command this run was: name a folder of `reverie train`."
        ) from None
    if not isinstance(name, str) or name not in RECIPES:
        raise InputError(
            f"{path} names the recipe {name!r}, which there is not: there are {', '.join(RECIPES)}."
        )
    if data is None and address(where):
        raise InputError(
            f"The run's data are at {address(where)}, which is not opened unasked: name it by --data."
        )
    if not address(where) and not any((where / part / FILE).is_file() for part in ("", "pictures")):
        raise InputError(f"{where} holds no index of the run's data: say by --data where they are now.")
    like = Command.of("reverie train", train)
    known = Command.of_recipe(f"reverie train {name}", RECIPES[name], like=like).parameters
    given = restored(known, given, where=str(path)) | {"device": device}
    run, where = run.resolve(), where if address(where) else where.resolve()
    with chdir(folder if folder.is_dir() else "."):  # against which the command named other folders
        return _carry_out(name, where, run, given, replay=step)


# ---------------------------------------------------------------- runs


def runs(folder: Path = Path("runs"), /, *, json: bool = False) -> None:
    """List the training runs below a folder: how far they are, how they go, how they ended.

    `reverie runs show` tells all of one, `runs compare` puts several beside each other, `runs curves` draws them.
    Nothing disturbs a run that is running.

    Args:
        folder: Where the runs are.
        json: Print a JSON document.
    """
    from dataclasses import asdict

    from reverie.train import runs as folders

    found = folders.find(folder)
    records = [folders.read(path, name=_below(path, folder)) for path in found]
    if json:
        _print_json([asdict(record) for record in records])
    else:
        print(folders.listing(records) if records else f"There are no runs below {folder}.")


def runs_show(run: str, /, *, json: bool = False) -> None:
    """Tell all of one run: state, time and memory as said and as used, the last and the best of each metric, files.

    Args:
        run: The run's folder, or its name below runs.
        json: Print a JSON document, with command and configuration.
    """
    from dataclasses import asdict

    from reverie.train import runs as folders

    folder = folders.named(run)
    record, more = folders.read(folder), folders.details(folder)
    if json:
        _print_json(asdict(record) | more)
    else:
        print(folders.showing(record, more))


def runs_compare(
    run: list[str], /, *, metrics: tuple[str, ...] = (), rows: int = 8, json: bool = False
) -> None:
    """Put runs beside each other: what differs in their configurations, and their metrics at the same steps.

    Where a metric has many steps, a row is the mean since the row above it.

    Args:
        run: Two or more runs: folders, or names below runs.
        metrics: Only these; all that the runs have in common if not given.
        rows: How many rows a metric has.
        json: Print a JSON document, with every step that the runs have in common.
    """
    from dataclasses import asdict

    from reverie.train import runs as folders

    if rows < 1:
        raise InputError(f"rows is {rows}; give at least 1.")
    chosen = _runs_named(run, least=2)
    changed = folders.differences(chosen)
    shared = folders.side_by_side(chosen, metrics=metrics, rows=None if json else rows)
    if json:
        _print_json({"differences": changed, "metrics": [asdict(each) for each in shared]})
    else:
        print(folders.comparison(chosen, changed, shared))


def runs_curves(
    run: list[str],
    /,
    *,
    out: Path = Path("curves.png"),
    metrics: tuple[str, ...] = (),
    json: bool = False,
) -> None:
    """Draw the curves of runs on one sheet: a panel to each metric, a colour to each run.

    Args:
        run: One or more runs: folders, or names below runs.
        out: The picture.
        metrics: Only these; all if not given.
        json: Print a JSON document of what was drawn.
    """
    from reverie.train.curves import sheet
    from reverie.train.runs import read_lines

    chosen = _runs_named(run, least=1)
    rows = {name: read_lines(folder / "metrics.jsonl") for name, folder in chosen.items()}
    if not (drawn := sheet(rows, out, metrics=metrics)):
        raise InputError(
            f"None of {', '.join(chosen)} has logged {' or '.join(metrics) or 'anything yet'}: nothing is drawn."
        )
    if json:
        _print_json({"picture": str(out), "runs": [*chosen], "metrics": drawn})
    else:
        print(out)


def plan(
    recipe: str = "",
    /,
    *,
    gpu: str = "a100-80",
    gpus: int = 1,
    batch: int | None = None,
    clips: int | None = None,
    steps: int | None = None,
    samples: float | None = None,
    size: int | None = None,
    precision: str = "",
    shard: str = "",
    recompute: bool = False,
    chunk: int = 0,
    accumulate: int = 1,
    words: int = 0,
    drop: float = 0.0,
    drop_text: float = 0.0,
    unmasked: float = 0.1,
    lock: str = "",
    lora: int = 0,
    fused: bool = True,
    price: float | None = None,
    json: bool = False,
    check: bool = False,
) -> None:
    """Say what a run needs on machines that are not here: FLOPs, memory, throughput, days and cost.

    The training step is counted from shapes alone and put against the GPU's roofline; docs/engine.md says how far off
    that is. Nothing is trained and no data is read.

    Args:
        recipe: A recipe of `reverie train`, a public CLIP such as clip:ViT-L-14, or sora-dit:B.
        gpu: v100-16, v100-32, a100-40, a100-80, h100, h200, b200, l40s, rtx4090, rtx3090, t4, or cpu, measured here.
        gpus: How many.
        batch: Items of a batch on all devices together; the recipe's own if not given.
        clips: Clips of a step, for recipes that have them.
        steps: How many steps; the recipe's own if not given.
        samples: How many items are seen in all, such as 12.8e9, instead of steps.
        size: Pixels a side; the recipe's own if not given.
        precision: fp32, tf32, bf16 or fp16; the quickest that is stable if not given.
        shard: ddp (weights whole on each device) or fsdp (divided); ddp if not given.
        recompute: Keep each block's input alone and compute the rest again in backward.
        chunk: Pictures embedded at a time, each twice, so that a batch beyond the memory fits. 0: all.
        accumulate: Batches of a step.
        words: Tokens of a text; as many as the text tower takes if not given.
        drop: The share of the patches that is left out.
        drop_text: The share of the words that is left out.
        unmasked: The share of the steps in which nothing is left out.
        lock: The tower that is not trained, image or text.
        lora: Train only adapters of this rank.
        fused: Attention keeps no scores; --no-fused for codes and devices without.
        price: Dollars an hour of one GPU; the table's, which is rounded and old, if not given.
        json: Print numbers for programs.
        check: Plan published runs instead, and print how far off each is.
    """
    if check:
        if recipe:
            raise InputError(f"--check plans published runs and no recipe: leave {recipe} or --check out.")
        from reverie.planning import published

        found = published.check()
        if json:
            _print_json([it.numbers() for it in found])
        else:
            print(published.told(found))
        return
    if not recipe:
        raise InputError(
            "`reverie plan` needs RECIPE, such as clip-paper-b32 or clip:ViT-L-14; or give --check."
        )
    from reverie.planning.plan import plan as plan_of

    told = plan_of(
        recipe, gpu=gpu, gpus=gpus, batch=batch, clips=clips, steps=steps, samples=samples, size=size,
        precision=precision, shard=shard, recompute=recompute, chunk=chunk, accumulate=accumulate, words=words,
        drop=drop, drop_text=drop_text, unmasked=unmasked, lock=lock, lora=lora, fused=fused, price=price,
    )  # fmt: skip
    if json:
        _print_json(told.numbers())
    else:
        print(told)


# ---------------------------------------------------------------- use


def sample(
    prompts: list[str],
    /,
    *,
    model: str = "sora-stickers",
    out: Path = Path("samples"),
    frames: int = 1,
    size: tuple[int, int] | None = None,
    draft: bool = False,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    top: int | None = None,
    p: float | None = None,
    given: Path | None = None,
    keep: int | None = None,
    too_long: str | None = None,
    negative: str | None = None,
    interval: tuple[float, float] | None = None,
    rescale: float | None = None,
    cache: float | None = None,
    first_frame: Path | None = None,
    best_of: int = 1,
    judge: str = "clip-stickers",
    fps: float | None = None,
    format: str | None = None,
    precision: str = "fp32",
    quantise: str | None = None,
    device: str | None = None,
) -> None:
    """Draw a picture, or with --frames a clip, for every prompt.

    Files are numbered on from those that the folder has. `reverie info FILE` says what made one.

    Args:
        prompts: What to draw; put each in quotes. For DiT and SiT a class, by its name or number.
        model: A shipped name, a folder that a run wrote, or a public one: a pipeline of Wan 2.1 or of DiT.
        out: The folder that the files go to.
        frames: 1 draws pictures, more draws clips; more than it was trained at, window by window.
        size: Height and width in pixels; what the model was trained at if not given.
        draft: Draw three quarters as high and wide, in half the time; `reverie edit` makes a draft large.
        seed: The same seed draws the same.
        steps: Sampling steps, 1 or more; the model's own number if not given.
        guidance: How strictly to follow the prompt: 1 as learnt, more is stricter; the model's own if not given.
        sampler: Such as euler, heun, dpmpp_2m or unipc; the model's own if not given.
        temperature: Of the codes that DALL-E and MaskGIT draw: 1 as learnt, less is surer.
        top: Draw each code among so many of the likeliest; all if not given. For DALL-E.
        p: Draw each code among the likeliest that together have this probability. For DALL-E.
        given: A picture whose upper part stays and is completed. For DALL-E and MaskGIT.
        keep: How many rows of pixels of it stay; half if not given.
        too_long: cut takes what fits of a prompt and shows where it ends; refuse draws nothing. For DALL-E and MaskGIT.
        negative: What not to draw: guidance leads away from these words.
        interval: The times that guidance acts at, from 0 (data) to 1 (noise).
        rescale: How much of the contrast that guidance adds is taken back, from 0 to 1.
        cache: Spare deep blocks until features have changed by so much, such as 0.15; quicker, and nearly the same.
        first_frame: A picture that the clip begins with.
        best_of: Draw so many of each, such as 512, and keep the one that the judge likes best; after Ctrl-C, of those
            that were drawn.
        judge: The CLIP that chooses: a shipped name or a folder.
        fps: Frames per second of the clips, 1 to 1000; the model's own if not given.
        format: png, webp, gif, mp4, webm or jpg; without it png for pictures and webp for clips, both lossless.
        precision: What weights are kept in, fp32 or bf16, which takes half the memory.
        quantise: int8 keeps the weights of the blocks in eight bits, a quarter of the memory.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.media import probe
    from reverie.output import check_folder, check_format, check_words, next_number, store
    from reverie.progress import counting

    if not prompts:
        raise InputError('Say what to draw, such as: reverie sample "a red rocket".')
    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise InputError(f"Prompt {empty[0]} of {len(prompts)} is empty: say what to draw, or leave it out.")
    for name, value in (("best_of", best_of), ("frames", frames), ("steps", steps)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: give 1 or more.")
    if size is not None and min(size) < 1:
        raise InputError(f"size is {size[0]} {size[1]}: give height and width in pixels, such as 64 64.")
    if fps is not None and not 1 <= fps <= 1000:
        raise InputError(f"fps is {fps:g}: a clip shows from 1 to 1000 frames a second.")
    if format is not None:
        check_format(format, frames, fps or 1)
    if first_frame is not None and frames == 1:
        raise InputError(
            "first_frame begins a clip: say with --frames how long it shall be, such as --frames 16."
        )
    for file in (first_frame, given):
        if file is not None:
            probe(file)
    for prompt in prompts:
        check_words(prompt, negative)
    check_folder(out)
    unread = [prompt for prompt in prompts if prompt.strip().isdecimal()]
    if best_of > 1 and unread:
        raise InputError(f"The judge cannot read {unread[0]!r}: name the class, or leave out --best-of.")
    import torch

    from reverie.nn.cache import check_threshold
    from reverie.pictures import to_signal
    from reverie.recipes.choosing import best_of_many
    from reverie.recipes.own_files import check_negative, long_clip, smaller
    from reverie.recipes.parts import capable, what_made
    from reverie.samplers.guidance import check_options
    from reverie.systems.sora_given import GOING_ON

    check_options(interval or (0.0, 1.0), rescale or 0.0)
    check_threshold(cache or 0.0)
    system = capable(model, "generate_image", device=device, precision=precision, quantise=quantise)
    clip = capable(judge, "embed_text", device=device) if best_of > 1 else None
    asked: dict[str, Any] = {
        "size": size, "steps": steps, "guidance": guidance, "sampler": sampler, "negative": negative,
        "interval": interval, "rescale": rescale, "cache": cache, "first_frame": first_frame,
        "temperature": temperature, "top": top, "p": p, "given": given, "keep": keep, "too_long": too_long,
    }  # fmt: skip
    asked = {key: value for key, value in asked.items() if value is not None}
    drawing = ("generate_image", "generate_video", "generate", "generate_latents")
    methods = [getattr(system, name) for name in drawing if hasattr(system, name)]
    takes = {name for method in methods for name in inspect.signature(method).parameters}
    if foreign := [key for key in asked if key not in takes]:
        raise InputError(
            f"{model} has no {foreign[0]} to choose: leave out --{foreign[0].replace('_', '-')}."
        )
    if frames > 1 and not hasattr(system, "generate_video"):
        raise InputError(f"{model} draws pictures and no clips: leave out --frames.")
    if draft:
        if not hasattr(system, "unit"):
            raise InputError(f"{model} draws no drafts: leave out --draft.")
        size = asked["size"] = smaller(size or system.size_of(frames), system.unit)
    long = hasattr(system, "stream") and frames > system.config.frames
    if first_frame is not None:
        picture = to_signal(first_frame, size=size or system.size_of(frames))
        asked["first_frame"] = torch.from_numpy(picture)[None]
        asked = GOING_ON | asked
    own = asked.get("guidance", getattr(system.config, "guidance", None))
    check_negative(negative, 0.0 if own is None else own)
    extra = {"precision": None if precision == "fp32" else precision, "quantise": quantise}
    made = what_made(system, model, **asked | extra | {"first_frame": first_frame})
    pace = fps or float(getattr(system.config, "fps", 1.0))
    if format is not None:
        check_format(format, frames, pace)
    for prompt in prompts:
        stem, best = out / f"{next_number(out):03d}-{_slug(prompt)}", 0
        with counting(prompt) as progress:
            if long and clip is None:  # written as it is drawn
                pieces = long_clip(system, [prompt], frames=frames, **asked, seed=seed, progress=progress)
                print(
                    store(
                        (piece[0] for piece in pieces), stem, fps=pace, format=format, made=made(prompt, seed)
                    )
                )
                continue

            def draw(seeds: list[int], tell: Callable[[int, int], None]) -> Tensor:
                """`b 3 f h w`, an item for each seed."""
                prompts = [prompt] * len(seeds)  # noqa: B023
                options = asked | {"seed": seeds[0], "progress": tell}
                if "first_frame" in options:
                    options["first_frame"] = options["first_frame"].repeat(len(seeds), 1, 1, 1)
                if long:
                    return torch.cat([*long_clip(system, prompts, frames=frames, **options)], dim=2)
                if frames > 1:
                    return system.generate_video(prompts, frames=frames, **options)
                return system.generate_image(prompts, **options)[:, :, None]

            if clip is None:
                drawn = draw([seed], progress)[0]
            else:
                drawn, best = best_of_many(draw, clip, prompt, seed=seed, count=best_of, progress=progress)
        print(store(drawn, stem, fps=pace, format=format, made=made(prompt, seed + best)))


def info(files: list[Path], /, *, json: bool = False) -> None:
    """Say what pictures and clips are, and what made them: prompt, seed, model, weights and the rest.

    Args:
        files: Files that Reverie wrote, or any others.
        json: Answer as one JSON list.
    """
    from reverie import output
    from reverie.media import probe

    if not files:
        raise InputError("Name a file, such as: reverie info samples/000-a-red-rocket.png.")
    told: list[dict[str, Any]] = []
    bad = []
    for file in files:
        try:
            found, made = probe(file), output.read(file)
        except InputError as error:
            if len(files) == 1:
                raise
            say(str(error))
            bad.append(file)
            continue
        seen = {"file": str(file), "kind": found.kind, "width": found.width, "height": found.height}
        seen |= {"frames": found.frames, "fps": found.fps} if found.frames > 1 else {}
        told.append(seen | {"made": made and made.values()})
        if not json:
            clip = f", {found.frames} frames at {found.fps:.4g} a second" if found.frames > 1 else ""
            print(f"{file}: {found.kind}, {found.width} x {found.height}{clip}")
            print(made or "It does not say what made it.")
    if json:
        _print_json(told)
    if bad:
        raise InputError(f"{len(bad)} of {len(files)} files could not be read, such as {bad[0]}.")


def expand(
    prompts: list[str],
    /,
    *,
    like: str = "stickers",
    seed: int = 0,
    endpoint: str | None = None,
    model: str = "",
    key: str = "REVERIE_CHAT_KEY",
    timeout: float = 60.0,
    cache: Path | None = None,
    json: bool = False,
) -> None:
    """Turn short prompts into captions such as the models learnt from, one a line.

    Offline by rules, which know the words of the stickers or of the procedural world; or by a language model behind any
    endpoint that speaks OpenAI's protocol, if one is named.

    Args:
        prompts: What to expand; put each in quotes.
        like: Whose captions: stickers or world.
        seed: Another seed, other choices of the rules.
        endpoint: The address of a chat up to /v1, such as http://localhost:8000/v1; without it nothing is sent.
        model: The model that answers, as the endpoint calls it.
        key: The environment variable that holds the endpoint's key, if it needs one.
        timeout: Seconds that an answer may take, above 0; it is asked for four times.
        cache: A file that keeps the answers, so that the same is not asked twice.
        json: Print prompts, captions and what was done to them as one JSON list.
    """
    from dataclasses import asdict

    from reverie.chat import Endpoint
    from reverie.recipes.expansion import expand as work

    if not prompts:
        raise InputError('Say what to expand, such as: reverie expand "rocket".')
    if endpoint is None and (model or cache):
        raise InputError("model and cache are of an endpoint: name one with --endpoint, or leave them out.")
    if endpoint is not None and not model:
        raise InputError(f"say which model of {endpoint} shall answer, with --model.")
    asked = (
        None
        if endpoint is None
        else Endpoint(base=endpoint, model=model, key=key, timeout=timeout, cache=cache)
    )
    found = work(prompts, kind=like, seed=seed, endpoint=asked)
    if json:
        _print_json([asdict(one) for one in found])
        return
    for one in found:
        print(one.text)
        short = one.prompt if len(one.prompt) <= 60 else f"{one.prompt[:57]}..."
        say(f"{short}: {one.how}.")


# ---------------------------------------------------------------- pictures and clips of one's own


def animate(
    picture: Path,
    prompt: str = "",
    /,
    *,
    frames: int | None = None,
    ask: Ask = ASK,
) -> None:
    """Draw a clip that begins with a picture.

    Args:
        picture: The picture; of a clip, its first frame.
        prompt: What happens, in quotes; the words that made the file if not given, or none.
        frames: How many frames the clip has, 2 or more; as many as the model was trained at if not given.
    """
    from reverie.recipes import own_files

    print(own_files.animate(picture, prompt, frames=frames, ask=ask))


def extend(
    clip: Path,
    prompt: str = "",
    /,
    *,
    forward: int = 0,
    backward: int = 0,
    ask: Ask = ASK,
) -> None:
    """Draw what comes after a clip, and what came before it; any number of frames, window by window.

    Args:
        clip: The clip; a picture is a clip of one frame.
        prompt: What it shows, in quotes; the words that made the file if not given, or none.
        forward: How many frames to draw after it.
        backward: How many frames to draw before it.
    """
    from reverie.recipes import own_files

    print(own_files.extend(clip, prompt, forward=forward, backward=backward, ask=ask))


def loop(
    clip: Path,
    prompt: str = "",
    /,
    *,
    between: int | None = None,
    ask: Ask = ASK,
) -> None:
    """Draw the frames that lead from a clip's end to its beginning, so that it goes round without a seam.

    Args:
        clip: The clip, of two frames or more.
        prompt: What it shows, in quotes; the words that made the file if not given, or none.
        between: How many frames to draw, 1 or more; as many as see both ends well if not given.
    """
    from reverie.recipes import own_files

    print(own_files.loop(clip, prompt, between=between, ask=ask))


def connect(
    first: Path,
    second: Path,
    prompt: str = "",
    /,
    *,
    between: int | None = None,
    start: float = 0.7,
    ask: Ask = ASK,
) -> None:
    """Draw the frames that lead from one clip or picture over to another.

    Args:
        first: What it begins with.
        second: What it ends with, cut to the size of the first.
        prompt: What it shows, in quotes; the words that made the file if not given, or none.
        between: How many frames to draw, 1 or more; as many as see both ends well if not given.
        start: They begin from a cross-fade of both ends with so much noise, above 0; 1 is noise alone.
    """
    from reverie.recipes import own_files

    print(own_files.connect(first, second, prompt, between=between, start=start, ask=ask))


def edit(
    file: Path,
    prompt: str = "",
    /,
    *,
    strength: float = 0.6,
    ask: Ask = ASK,
) -> None:
    """Draw a picture or clip again by the words, near to what it was; with --size, a draft in large.

    Args:
        file: The picture or clip.
        prompt: What it shall show, in quotes; the words that made the file if not given.
        strength: How much is drawn anew, above 0 and at most 1, which leaves nothing of it.
    """
    from reverie.recipes import own_files

    print(own_files.edit(file, prompt, strength=strength, ask=ask))


def inpaint(
    file: Path,
    prompt: str = "",
    /,
    *,
    box: tuple[int, ...] = (),
    mask: Path | None = None,
    frames: tuple[int, int] | None = None,
    strength: float = 1.0,
    ask: Ask = ASK,
) -> None:
    """Draw a part of a picture or clip anew: a box or what a mask shows, some frames, or that place in some frames.

    Args:
        file: The picture or clip.
        prompt: What the whole shows, in quotes; the words that made the file if not given, or none.
        box: LEFT TOP RIGHT BOTTOM in the file's pixels; a box or a mask, not both.
        mask: A picture of the file's size, nearer to white than to black where to draw; one that is transparent
            somewhere is read by that alone, transparent where to draw.
        frames: The first and the last frame to draw anew, counted from 0 as they are read; with a box or a mask, there
            alone.
        strength: Above 0; below 1, what stands there now shows through.
    """
    from reverie.recipes import own_files

    print(own_files.inpaint(file, prompt, box=box, mask=mask, frames=frames, strength=strength, ask=ask))


def search(
    folder: Path,
    words: list[str],
    /,
    *,
    plus: tuple[str, ...] = (),
    minus: tuple[str, ...] = (),
    image: tuple[str, ...] = (),
    minus_image: tuple[str, ...] = (),
    image_weight: float = 1.0,
    minus_weight: float = 0.5,
    top: int = 10,
    sources: tuple[str, ...] = (),
    split: str | None = None,
    model: str = "clip-stickers",
    approximate: bool = False,
    rerank: str | None = None,
    among: int = 50,
    json: bool = False,
    sheet: Path | None = None,
    device: str | None = None,
) -> None:
    """Find the pictures and clips of a folder that fit words best, or a picture, or both.

    A query is a sum: its words, plus others, plus pictures, minus others. Several queries at once are answered one
    after the other, and what is added or taken away counts for each. A folder's pictures are embedded once.

    Args:
        folder: A folder that was imported, or any folder of pictures.
        words: What to look for; each in quotes is a query of its own.
        plus: Words that are added to every query.
        minus: Words that are taken away from every query.
        image: Pictures that are added to every query; alone, what is like them is found.
        minus_image: Pictures that are taken away from every query.
        image_weight: How much a picture counts in the sum; words count 1.
        minus_weight: How much of what is taken away counts.
        top: How many to list of each query.
        sources: Only items of these sources; all if not given.
        split: Only this split: train, val or test; all if not given.
        model: The CLIP that compares: a shipped name or a folder.
        approximate: Search by faiss even where exact search is quick.
        rerank: A model that can match, such as blip-stickers: it looks at what was found again, each picture beside
            the words, and the order is by its probability, which is then the score.
        among: How many are looked at again.
        json: Answer as one JSON document.
        sheet: Draw what was found to this PNG as well.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.data.remote import address
    from reverie.recipes import search as finding
    from reverie.recipes.parts import capable

    if empty := [number for number, text in enumerate(words, 1) if not text.strip()]:
        raise InputError(f"Query {empty[0]} of {len(words)} is empty: say what to look for, or leave it out.")
    pictures, others = tuple(map(Path, image)), tuple(map(Path, minus_image))
    queries = [
        finding.Query(
            words=text,
            plus=plus,
            minus=minus,
            images=pictures,
            minus_images=others,
            image_weight=image_weight,
            minus_weight=minus_weight,
        )
        for text in (words or [""])
    ]
    if not (words or plus or minus or pictures or others):
        raise InputError("Say what to look for: words, --plus, --minus, or --image.")
    clip = capable(model, "embed_text", device=device)
    finding.vectors_of(clip, queries)  # a mistake in a query shows before a large folder is embedded
    found, items = finding.open_folder(clip, folder, sources=sources, split=split)
    for bad in found.bad[:5]:
        print(f"left out: {bad.path}: {bad.reason}", file=sys.stderr)
    if len(found.bad) > 5:
        print(f"left out: {len(found.bad) - 5:,} more, which --json lists", file=sys.stderr)
    first = top if rerank is None else max(top, among)
    answers = finding.search(clip, found, queries, top=first, approximate=approximate)
    if rerank is not None:
        answers = finding.rerank(rerank, found.folder, queries, answers, items, top=top, device=device)
    if json:
        print(_search_json(folder, model, found, queries, answers))
    else:
        for query, answer in zip(queries, answers, strict=True):
            if len(queries) > 1:
                print(f"# {query}")
            for it in answer:
                moment = f"  at {it.seconds:.1f} s" if it.seconds is not None else ""
                print(f"{it.score:.3f}  {address(folder) or folder}/{it.name}{moment}")
    if sheet is not None:
        path = finding.sheet(sheet, found.folder, queries, answers, items)
        if not json:
            print(path)


def caption(
    files: list[Path],
    /,
    *,
    model: str = "blip-stickers",
    how: Captioning = CAPTIONING,
    telling: Telling = TELLING,
    via: Chat = CHAT,
    show: bool = False,
    several: int = 1,
    batch: int = 16,
    json: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    device: str | None = None,
) -> int:
    """Say in words what pictures and clips show: of a folder in its index, beside the captions that are there.

    A folder is described by a model of this machine or by a chat endpoint that takes pictures, and what is written
    carries its style and writer as its source. A stop loses nothing: the same command goes on. Files, or a folder with
    --show, are described in lines and nothing is kept.

    Args:
        files: A folder; or pictures and clips, or several folders, to show the captions of.
        model: A shipped name or a folder of anything that describes pictures; or as the endpoint calls it.
        show: Print the captions of a folder, and keep none.
        several: Shown: so many captions of each, with --sampling nucleus.
        batch: Shown: pictures at a time.
        json: One JSON document in place of lines.
        workers: Processes that describe a folder, by Ray; without it and --ray all is done in one.
        ray: The Ray cluster whose workers do it: auto, HOST:PORT, or local for this machine alone.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    if len(files) == 1 and files[0].is_dir() and not show and several == 1:
        return _caption_folder(files[0], model, how, telling, via, json, workers, ray, device)
    if (how, via, workers, ray) != (CAPTIONING, CHAT, None, None):
        raise InputError(
            "style, trigger, hints, frames, tags, endpoint and workers are for a folder's index: give one folder,"
            " without --show and --several."
        )
    from reverie.recipes.measure_captions import Bad, describe

    bad: list[Bad] = []
    told = []
    for found in describe(
        files, model=model, telling=telling, several=several, batch=batch, bad=bad, device=device
    ):
        told.append({"path": found.path, "captions": list(found.captions)})
        for text in () if json else found.captions:
            print(f"{found.path}: {text}", flush=True)
    for one in bad:
        print(f"left out: {one.path}: {one.reason}", file=sys.stderr)
    if json:
        left_out = [{"path": one.path, "reason": one.reason} for one in bad]
        _print_json({"model": model, "pictures": told, "left_out": left_out})
    return 0 if told else 2


def _caption_folder(
    folder: Path,
    model: str,
    how: Captioning,
    telling: Telling,
    via: Chat,
    json: bool,
    workers: int | None,
    ray: str | None,
    device: str | None,
) -> int:
    from dataclasses import asdict

    from reverie.recipes.captioning import caption as write

    if via.endpoint is None and via != CHAT:
        raise InputError(
            "key, timeout, concurrency, budget and side are of an endpoint: name one, or leave them out."
        )
    if via.endpoint is not None and model == "blip-stickers":
        raise InputError(f"say which model of {via.endpoint} shall describe, with --model.")
    with _pool(workers, ray, device) as pool:
        done = write(folder, model=model, how=how, telling=telling, via=via, pool=pool, device=device)
    for name, why in list(done.failed.items())[:5]:
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(done.failed) > 5:
        print(f"left out: {len(done.failed) - 5:,} more, which --json lists", file=sys.stderr)
    if json:
        _print_json(asdict(done))
    else:
        cost = f"; {done.requests:,} requests, {done.tokens:,} tokens" if via.endpoint else ""
        counts = (
            f"{done.written:,} written, {done.had:,} there, {len(done.failed):,} failed, {done.left:,} left"
        )
        print(f"{done.source}: {counts}{cost}")
    return 0 if done.written or done.had else 2


def capfilt(
    folder: Path,
    /,
    *,
    how: CapFilt = CAPFILT,
    out: Path | None = None,
    undo: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    device: str | None = None,
) -> None:
    """Rewrite and filter a folder's captions by what is learnt from those you vouch for, and train on the result.

    A captioner and a filter learn from the captions of --trusted; the captioner writes one for every other file of the
    training split, and the filter drops the new and the old ones that do not match. The pictures stay as they are, what
    is dropped stays in the index with its reason, and a page shows both. It goes on where it was stopped.

    Args:
        folder: A folder that was imported, on a disk of this machine.
        out: Where the models and the pages go; runs/capfilt-NAME if not given.
        undo: Take back what this command did to the captions of a folder.
        workers: Processes that describe and judge, by Ray; without it and --ray all is done in one.
        ray: The Ray cluster whose workers do it: auto, HOST:PORT, or local for this machine alone.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes import capfilt as recipe

    if undo:
        print(f"the captions of {recipe.undo(folder):,} files are what they were")
        return
    from reverie.train.engine import Engine
    from reverie.train.parallel import processes

    place = out or Path("runs") / f"capfilt-{folder.resolve().name}"
    with processes(), _pool(workers, ray, device) as pool:
        counts = recipe.capfilt(folder, place, how, pool=pool, engine=Engine(device=device))
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    print(f"to look at: {place / f'round-{how.rounds}' / 'sheet.html'}")
    print(f"the model: {place / f'round-{how.rounds}' / 'retrained' / 'model'}")


def match(
    picture: Path,
    texts: list[str],
    /,
    *,
    model: str = "blip-stickers",
    json: bool = False,
    device: str | None = None,
) -> None:
    """Say how well texts fit a picture: the probability that they belong together, and the cosine.

    Args:
        picture: A picture, or a clip, of which the middle frame is looked at.
        texts: Each in quotes.
        model: A shipped name or a folder; anything that matches pictures and texts.
        json: One JSON document in place of lines.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from dataclasses import asdict

    from reverie.recipes.measure_captions import compare

    found = compare(picture, texts, model=model, device=device)
    if json:
        _print_json({"model": model, "picture": str(picture), "texts": [asdict(fit) for fit in found]})
        return
    for fit in found:
        cosine = "" if fit.cosine is None else f"  cosine {fit.cosine:.3f}"
        print(f"{fit.probability:6.1%}{cosine}  {fit.text}")


def ask(
    picture: Path,
    questions: list[str],
    /,
    *,
    model: str,
    choices: tuple[str, ...] = (),
    json: bool = False,
    device: str | None = None,
) -> None:
    """Answer questions about a picture.

    Args:
        picture: A picture, or a clip, of which the middle frame is looked at.
        questions: Each in quotes.
        model: What answers questions: the folder that blip-answers made, a public BLIP for VQA, or a BLIP-2.
        choices: The only answers that are considered; without any, the model writes its own.
        json: One JSON document in place of lines.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_captions import ask as answers_to

    found = answers_to(picture, questions, model=model, choices=choices, device=device)
    if json:
        told = [{"question": q, "answer": a} for q, a in zip(questions, found, strict=True)]
        _print_json({"model": model, "picture": str(picture), "answers": told})
        return
    for question, answer in zip(questions, found, strict=True):
        print(f"{question} {answer}" if len(questions) > 1 else answer)


def chat(
    picture: Path,
    /,
    *,
    model: str,
    ask: tuple[str, ...] = (),
    sampling: str = "beam",
    beams: int = 5,
    most: int = 20,
    p: float = 0.9,
    seed: int = 0,
    json: bool = False,
    device: str | None = None,
) -> None:
    """Talk about a picture: a BLIP-2 answers questions in turn, each with those before it in mind.

    Without --ask questions are read from the terminal, a line each; an empty line ends it.

    Args:
        picture: The picture.
        model: A BLIP-2 with a language model: the folder that blip2-stage2 made, or a public one.
        ask: The questions, in their order.
        sampling: How an answer is written: beam, greedy or nucleus.
        beams: How many beams are searched.
        most: The most tokens of an answer.
        p: The share of probability that nucleus draws from.
        seed: Another seed, other draws.
        json: Answer as one JSON document.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.parts import capable
    from reverie.recipes.picture_chat import talk

    system = capable(model, "chat", device=device)
    turns = []
    typed = (line.strip() for line in iter(partial(_asked, "> "), ""))
    how: dict[str, Any] = {"sampling": sampling, "beams": beams, "most": most, "p": p, "seed": seed}
    for question, answer in talk(system, picture, ask or typed, **how):
        turns.append({"question": question, "answer": answer})
        if not json:
            print(f"{question}\n  {answer}" if ask else f"  {answer}", flush=True)
    if json:
        _print_json({"picture": str(picture), "model": model, "turns": turns})


def _asked(sign: str) -> str:
    """A line from the terminal, "" at its end."""
    try:
        return input(sign if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


# ---------------------------------------------------------------- measure


def eval_zero_shot(
    data: Path,
    /,
    *,
    model: str = "clip-stickers",
    sources: tuple[str, ...] | None = None,
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    templates: tuple[str, ...] = ("{}",),
    ensemble: str | None = None,
    out: Path = Path("runs/eval-zero-shot"),
    device: str | None = None,
) -> None:
    """Measure how often a CLIP names a picture right among all labels, and how far its confidence can be believed.

    Args:
        data: A folder whose pictures have labels, such as one folder for each name.
        model: A shipped name or a folder.
        sources: Pictures by these, each by itself; without any, all together. If not given: twemoji and openmoji in
            the sticker corpus, all together elsewhere.
        split: Only this split: train, val or test; all if not given.
        without: Leave out the pictures for which one of these scores of the index is above zero.
        templates: Sentences with {} where the name goes; the mean over them is taken.
        ensemble: A list of templates by its name: openai (80 sentences for ImageNet) or simple (7 of them).
        out: Where the numbers, the tables and the pictures go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_clip import zero_shot

    print(
        zero_shot(
            data,
            out,
            model=model,
            sources=sources,
            split=split,
            without=without,
            templates=templates,
            ensemble=ensemble,
            device=device,
        )
    )
    print(f"\n{out}")


def eval_retrieval(
    data: Path,
    /,
    *,
    model: str = "clip-stickers",
    sources: tuple[str, ...] = (),
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    language: str | None = None,
    rerank: int | None = None,
    out: Path = Path("runs/eval-retrieval"),
    device: str | None = None,
) -> None:
    """Measure how often a CLIP finds a picture by its captions, and its captions by the picture.

    Args:
        data: A folder whose pictures have captions.
        model: A shipped name or a folder.
        sources: Only pictures of these sources; all if not given.
        split: Only this split: train, val or test; all if not given.
        without: Leave out the pictures for which one of these scores of the index is above zero.
        language: Only captions in this language, such as en or zh.
        rerank: Look at the first so many answers of each query again, with a model that can match, such as
            blip-stickers, and order them by cosine plus the logit of a match, as BLIP's authors do.
        out: Where the numbers, the table and the pictures go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_clip import retrieve

    print(
        retrieve(
            data,
            out,
            model=model,
            sources=sources,
            split=split,
            without=without,
            language=language,
            rerank=rerank,
            device=device,
        )
    )
    print(f"\n{out}")


def eval_captions(
    data: Path,
    /,
    *,
    model: str = "blip-stickers",
    clip: str = "clip-stickers",
    sources: tuple[str, ...] | None = None,
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    language: str = "en",
    count: int | None = None,
    telling: Telling = TELLING,
    batch: int = 16,
    out: Path = Path("runs/eval-captions"),
    device: str | None = None,
) -> None:
    """Measure how good captions are: beside people's, by a CLIP, against exact scenes, by the names of things.

    What the data allow is measured: captions give BLEU, ROUGE-L and CIDEr-D, labels whether a caption names the thing,
    a world that `reverie data world` drew what is right and what is missing. Of a clip the middle frame is shown.

    Args:
        data: A folder of pictures with captions, labels or scenes.
        model: A shipped name or a folder; anything that describes pictures.
        clip: The CLIP that gives CLIPScore; "" leaves it out.
        sources: Pictures by these; without any, all. If not given: twemoji and openmoji in the sticker corpus, all
            elsewhere.
        split: train, val, test or all; if not given test where there is one, else val, else all.
        without: Leave out the pictures for which one of these scores of the index is above zero.
        language: Of people's captions and of names, such as en or zh.
        count: At most so many pictures, drawn by --seed.
        batch: Pictures at a time.
        out: Where the numbers, the table and the sheet go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_captions import captions

    print(
        captions(
            data, out, model=model, clip=clip, sources=sources, split=split, without=without, language=language,
            count=count, telling=telling, batch=batch, seed=telling.seed, device=device,
        )
    )  # fmt: skip
    print(f"\n{out}")


def eval_answers(
    data: Path,
    /,
    *,
    model: str,
    split: str | None = None,
    kinds: tuple[str, ...] = (),
    language: str = "en",
    each: int = 1,
    count: int | None = None,
    choose: bool = False,
    batch: int = 16,
    seed: int = 0,
    out: Path = Path("runs/eval-answers"),
    device: str | None = None,
) -> None:
    """Measure how often questions about the procedural world are answered right, beside guessing.

    Args:
        data: A folder that `reverie data world` drew.
        model: What answers questions: the folder that blip-answers made, a public BLIP for VQA, or a BLIP-2.
        split: train, val, test or all; if not given test where there is one, else val, else all.
        kinds: Only such questions: colour, shape, count, there, relation, background, and of clips direction, turn,
            bounce, action; all if not given.
        language: en or zh.
        each: Questions of a kind about one scene.
        count: At most so many scenes, drawn by the seed.
        choose: Let the model choose among the answers of the kind, instead of writing its own.
        batch: Pictures at a time.
        seed: Another seed, other scenes and other questions left out for balance.
        out: Where the numbers, the table and the sheet go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.data.world_questions import KINDS
    from reverie.recipes.measure_captions import answers

    print(
        answers(
            data, out, model=model, split=split, kinds=kinds or KINDS, language=language, each=each, count=count,
            choose=choose, batch=batch, seed=seed, device=device,
        )
    )  # fmt: skip
    print(f"\n{out}")


def eval_probe(
    data: Path,
    /,
    *,
    model: str = "clip-stickers",
    sources: tuple[str, ...] = (),
    split: str | None = None,
    without: tuple[str, ...] = ("skin_tone",),
    shots: tuple[int, ...] = (),
    draws: int = 3,
    count: int | None = None,
    templates: tuple[str, ...] = ("{}",),
    ensemble: str | None = None,
    seed: int = 0,
    out: Path = Path("runs/eval-probe"),
    device: str | None = None,
) -> None:
    """Measure what a linear probe reads out of a model's features, with all examples or a few.

    Args:
        data: A folder whose pictures have labels and splits; the probe learns from the split train.
        model: A shipped name or a folder; anything that embeds pictures.
        sources: Only pictures of these sources; all if not given.
        split: Where it is measured: val or test; test where there is one if not given.
        without: Leave out the pictures for which one of these scores of the index is above zero.
        shots: Numbers of examples for each name, such as 1 2 4 8 16, for the few-shot curve.
        draws: How often examples are drawn for each number.
        count: At most so many names, drawn by the seed; all if not given.
        templates: Sentences with {} where the name goes, for zero-shot beside the probes.
        ensemble: A list of templates by its name: openai or simple.
        seed: Another seed, other names and examples.
        out: Where the numbers, the tables and the pictures go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_clip import probe

    print(
        probe(
            data,
            out,
            model=model,
            sources=sources,
            split=split,
            without=without,
            shots=shots,
            draws=draws,
            count=count,
            templates=templates,
            ensemble=ensemble,
            seed=seed,
            device=device,
        )
    )
    print(f"\n{out}")


def eval_pictures(
    data: Path,
    /,
    *,
    model: str = "sora-stickers",
    judges: tuple[str, ...] = ("clip-stickers", "judge-stickers"),
    source: str = "fluent-3d",
    split: str = "train",
    count: int = 200,
    seeds: int = 4,
    batch: int = 16,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    out: Path = Path("runs/eval-pictures"),
    device: str | None = None,
) -> None:
    """Measure a generator's pictures: judges name them, they vary, and none is copied.

    Args:
        data: The sticker corpus, or a folder that was imported, whose pictures have labels.
        model: A shipped name or a folder.
        judges: Systems that classify; each picks every picture's label out of all that were drawn.
        source: Labels of the pictures by this source.
        split: Labels of this split.
        count: How many labels are drawn.
        seeds: How often some labels are drawn, to see whether samples vary.
        batch: Pictures drawn at a time.
        steps: Sampling steps; the model's own number if not given.
        guidance: How strictly to follow the label; the model's own if not given.
        seed: Another seed, other labels and pictures.
        out: Where the numbers, the table and the pictures go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_generators import Draws, pictures

    ask = Draws(
        count=count, seeds=seeds, batch=batch, steps=steps, guidance=guidance, seed=seed, device=device
    )
    print(pictures(data, out, model=model, judges=judges, source=source, split=split, ask=ask))
    print(f"\n{out}")


def eval_clips(
    data: Path,
    /,
    *,
    model: str = "sora-stickers",
    judges: tuple[str, ...] = ("clip-stickers", "judge-stickers"),
    source: str = "fluent-anim",
    split: str = "train",
    frames: int | None = None,
    count: int = 200,
    seeds: int = 4,
    batch: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    out: Path = Path("runs/eval-clips"),
    device: str | None = None,
) -> None:
    """Measure a generator's clips: as its pictures, and how much they move.

    Args:
        data: The sticker corpus, or a folder that was imported, whose clips have labels.
        model: A shipped name or a folder.
        judges: Systems that classify; each picks every clip's label out of all that were drawn.
        source: Labels of the clips by this source.
        split: Labels of this split.
        frames: How long a clip is; the model's own length if not given.
        count: How many labels are drawn.
        seeds: How often some labels are drawn, to see whether samples vary.
        batch: Clips drawn at a time.
        steps: Sampling steps; the model's own number if not given.
        guidance: How strictly to follow the label; the model's own if not given.
        seed: Another seed, other labels and clips.
        out: Where the numbers, the table and the clips go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_generators import Draws, clips

    ask = Draws(
        count=count, seeds=seeds, batch=batch, steps=steps, guidance=guidance, seed=seed, device=device
    )
    print(clips(data, out, model=model, judges=judges, source=source, split=split, frames=frames, ask=ask))
    print(f"\n{out}")


def eval_world(
    model: str,
    /,
    *,
    frames: int = 1,
    kind: str | None = None,
    language: str = "en",
    count: int = 200,
    batch: int = 16,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    out: Path = Path("runs/eval-world"),
    device: str | None = None,
) -> None:
    """Measure a generator of the procedural world with its exact judge, which reads every picture back.

    Args:
        model: A shipped name, or the folder of a run of the recipe sora-world.
        frames: 1 measures pictures, more measures clips.
        kind: Only one kind of scene, such as count, relation or motion.
        language: Of the captions: en or zh.
        count: How many scenes are drawn.
        batch: Scenes drawn at a time.
        steps: Sampling steps; the model's own number if not given.
        guidance: How strictly to follow the caption; the model's own if not given.
        seed: Another seed, other noise.
        out: Where the numbers, the table and the pictures go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_generators import Draws, world

    ask = Draws(count=count, batch=batch, steps=steps, guidance=guidance, seed=seed, device=device)
    print(world(out, model=model, frames=frames, kind=kind, language=language, ask=ask))
    print(f"\n{out}")


def eval_continuation(
    model: str,
    /,
    *,
    count: int = 40,
    batch: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    out: Path = Path("runs/eval-continuation"),
    device: str | None = None,
) -> None:
    """Measure how many clips of the procedural world a Sora extends in the direction and at the speed they had.

    Args:
        model: A shipped name, or the folder of a run of the recipe sora-world.
        count: How many clips are extended.
        batch: Clips drawn at a time.
        steps: Sampling steps; the model's own number if not given.
        guidance: How strictly to follow the caption; the model's own if not given.
        seed: Another seed, other noise.
        out: Where the numbers, the table and the pictures go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_continuation import continuation
    from reverie.recipes.measure_generators import Draws

    ask = Draws(count=count, batch=batch, steps=steps, guidance=guidance, seed=seed, device=device)
    print(continuation(out, model=model, ask=ask))
    print(f"\n{out}")


def eval_reconstruction(
    data: Path,
    /,
    *,
    codec: str,
    size: int = 64,
    frames: int = 17,
    split: str = "val",
    source: str = "",
    count: int = 500,
    batch: int = 8,
    out: Path = Path("runs/eval-reconstruction"),
    device: str | None = None,
) -> None:
    """Measure what an autoencoder keeps of pictures and clips: PSNR, SSIM, motion, bits for a pixel, codes in use.

    Args:
        data: A folder that was imported, whose pictures and clips are encoded and decoded.
        codec: The folder of an autoencoder.
        size: Pixels a side.
        frames: Frames of a clip, evenly out of the whole; 1 measures pictures alone.
        split: Pictures and clips of this split; those of val were held out of training.
        source: Of this source alone, such as fluent-3d.
        count: At most so many pictures, and as many clips.
        batch: How many at a time.
        out: Where the numbers, the table and the pictures go.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.measure_codec import reconstructions

    print(
        reconstructions(
            data, out, codec=codec, size=size, frames=frames, split=split, source=source, count=count, batch=batch,
            device=device,
        )
    )  # fmt: skip
    print(f"\n{out}")


# ---------------------------------------------------------------- the rest


def demo(
    *,
    out: Path = Path("gallery"),
    seed: int = 0,
    clip: str = "clip-stickers",
    sora: str = "sora-stickers",
    blip: str | None = None,
    steps: int | None = None,
    device: str | None = None,
) -> None:
    """Draw pictures and clips, search, name, describe, and write it all into a gallery page. Needs no network.

    Args:
        out: The gallery's folder.
        seed: Another seed, other pictures.
        clip: The CLIP that chooses, finds and names: a shipped name or a folder.
        sora: The generator: a shipped name or a folder.
        blip: What describes and matches: a shipped name or a folder; blip-stickers where it ships if not given.
        steps: Sampling steps; the model's own number if not given.
        device: Where to compute, such as cpu or cuda; the GPU if there is one.
    """
    from reverie.recipes.demo import demo as show

    print(show(out, seed=seed, clip=clip, sora=sora, blip=blip, steps=steps, device=device))


def convert(source: Path, target: Path, /, *, format: str | None = None, config: str | None = None) -> None:
    """Turn a pickled checkpoint into safetensors, or a model into the folder of another library.

    A pickle or a TorchScript archive (.pt, .pth, .ckpt, .bin, .pkl) is read in a confined process, without running what
    it holds, and becomes the file TARGET; so does a folder with DALL-E's encoder.pkl and decoder.pkl. Any model that
    loads (a folder of Reverie, transformers, open_clip or diffusers, or a .safetensors file) becomes the folder TARGET.

    Args:
        source: The checkpoint, or the model's folder.
        target: The new file, which must end in .safetensors; or the new folder.
        format: Whose folder it becomes: reverie, transformers, open_clip, diffusers, salesforce or lavis; reverie if
            not given.
        config: Which model a .safetensors file holds, if it does not say so, such as ViT-B-32 or SiT-XL/2.
    """
    from reverie.weights.files import PICKLES

    halves = source.is_dir() and target.suffix == ".safetensors" and any(source.glob("encoder.p*"))
    if source.suffix.lower() not in PICKLES and not halves:
        import reverie

        if target.suffix == ".safetensors":
            raise InputError(f"A model becomes a folder, not the file {target}: name a folder.")
        if target.exists() and (target.is_file() or any(target.iterdir())):
            raise InputError(f"{target} exists already and is not written over: name a new folder.")
        system = reverie.load(source, config=config)
        print(reverie.save(system, target, format=format or "reverie"))  # type: ignore[arg-type]  # save refuses others
        return
    from reverie.weights.convert import convert as turn

    if format or config:
        raise InputError(
            f"{source} is a pickle, which becomes a .safetensors file first; convert that file then."
        )
    done = turn(source, target)
    print(f"{done.tensors:,} tensors in {done.path}")
    if done.left_out:
        print(
            f"left out, being no weights: {', '.join(done.left_out[:20])}{', ...' * (len(done.left_out) > 20)}"
        )


def blend(start: Path, tuned: Path, target: Path, /, *, share: float = 0.5) -> None:
    """Write the model between two of one shape, so that a fine-tuned one keeps more of what it knew (WiSE-FT).

    Args:
        start: The weights before fine-tuning: a folder or a shipped name.
        tuned: What was fine-tuned from them.
        target: The new folder.
        share: How far from START to TUNED, from 0 to 1.
    """
    import reverie
    from reverie.weights.blend import blend as between

    print(reverie.save(between(reverie.load(str(start)), reverie.load(str(tuned)), share=share), target))


def doctor() -> int:
    """Say what machine this is, what is installed, what is missing and how to get it."""
    from reverie.doctor import examine

    problems = 0
    for finding in examine():
        print(finding, flush=True)
        problems += finding.state == "!!"
    print(f"\n{problems} problem{'s' * (problems != 1)} found." if problems else "\nAll is well.")
    return 1 if problems else 0


COMMANDS: dict[str, Callable[..., int | None]] = {
    "data import": data_import,
    "data check": data_check,
    "data show": data_show,
    "data report": data_report,
    "data score": data_score,
    "data embed": data_embed,
    "data encode": data_encode,
    "data dedupe": data_dedupe,
    "data filter": data_filter,
    "data shrink": data_shrink,
    "data pack": data_pack,
    "data stickers": data_stickers,
    "data world": data_world,
    "train": train,
    "replay": replay,
    "runs": runs,
    "runs show": runs_show,
    "runs compare": runs_compare,
    "runs curves": runs_curves,
    "plan": plan,
    "sample": sample,
    "info": info,
    "expand": expand,
    "animate": animate,
    "extend": extend,
    "loop": loop,
    "connect": connect,
    "edit": edit,
    "inpaint": inpaint,
    "search": search,
    "caption": caption,
    "capfilt": capfilt,
    "match": match,
    "ask": ask,
    "chat": chat,
    "eval zero-shot": eval_zero_shot,
    "eval retrieval": eval_retrieval,
    "eval probe": eval_probe,
    "eval captions": eval_captions,
    "eval answers": eval_answers,
    "eval pictures": eval_pictures,
    "eval clips": eval_clips,
    "eval world": eval_world,
    "eval continuation": eval_continuation,
    "eval reconstruction": eval_reconstruction,
    "demo": demo,
    "convert": convert,
    "blend": blend,
    "doctor": doctor,
}


# ---------------------------------------------------------------- what several commands need


def _pool(workers: int | None, ray: str | None, device: str | None) -> AbstractContextManager[Any]:
    """The workers that a command asks for, or nothing."""
    if workers is None and ray is None:
        return nullcontext()
    from reverie.data.preparing import Pool

    return Pool(workers, ray, gpus=device != "cpu")


def _runs_named(words: Sequence[str], *, least: int) -> dict[str, Path]:
    """Short names -> folders, each once."""
    from reverie.train import runs as folders

    found = [*dict.fromkeys(folders.named(word) for word in words)]
    if len(found) < least:
        raise InputError(f"{len(found)} run is too few to compare: name {least} or more.")
    return dict(zip(folders.labels(found), found, strict=True))


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else path.resolve().name


def _print_json(document: Any) -> None:
    import json

    print(json.dumps(document, indent=1, ensure_ascii=False))


def _search_json(folder: Path, model: str, found: Any, queries: Sequence[Any], answers: Sequence[Any]) -> str:
    """The answers as one document: paths are relative to `folder`, `seconds` is null for pictures."""
    import json

    told = [
        {
            "words": query.words,
            "plus": query.plus,
            "minus": query.minus,
            "images": [str(path) for path in query.images],
            "minus_images": [str(path) for path in query.minus_images],
            "results": [{"path": it.name, "score": it.score, "seconds": it.seconds} for it in answer],
        }
        for query, answer in zip(queries, answers, strict=True)
    ]
    whole = {
        "folder": str(folder),
        "model": model,
        "files": len(found.names),
        "queries": told,
        "left_out": [{"path": bad.path, "reason": bad.reason} for bad in found.bad],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False)


def _slug(text: str) -> str:
    """The beginning of a prompt as a file name; letters of every script stay."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())[:60] or "untitled"


# ---------------------------------------------------------------- from words to functions


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except InputError as error:
        _complain(str(error))
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        within = isinstance(error, FileExistsError | NotADirectoryError)  # of mkdir
        what = f"it is, or lies in, a file and no folder ({error.strerror})" if within else error.strerror
        _complain(f"{error.filename}: {what}; name another place or mend this one.")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _complain("this needs more memory than there is; ask for a smaller size, batch or number of frames.")
        return 2
    except KeyboardInterrupt:
        print("reverie: stopped.", file=sys.stderr)
        return 130
    except SystemExit as stop:  # of tyro (help or a bad flag) or of a training run that was told to stop
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1


def _complain(text: str) -> None:
    """An error, in the manner that REVERIE_PROGRESS asks for."""
    rank = os.environ.get("RANK", "0")
    who = "reverie" if rank == "0" else f"reverie (process {rank})"
    say(text if manner() == "json" else f"{who}: {text}", kind="error")


def entry() -> None:
    """The `reverie` command."""
    sys.exit(main())


def _run(words: list[str]) -> int:
    if (asked := os.environ.get(SETTING, "")) not in ("", *MANNERS):
        raise InputError(f"{SETTING} is {asked!r}: give {' or '.join(MANNERS)}, or leave it out.")
    if words in (["--version"], ["version"]):
        from importlib.metadata import version

        print(f"reverie {version('reverie')}")
        return 0
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            rest = words[count:]
            if name == "train" and rest and not asks_for_help(rest[:1]):
                return _train(rest[0], rest[1:])
            command = Command.of(f"reverie {name}", COMMANDS[name])
            if name == "train":
                from reverie.catalog import RECIPES

                command = replace(command, about=f"{command.about}\n\nRecipes: {', '.join(RECIPES)}.")
            given = command.parse(rest)
            return 0 if given is None else command.call(COMMANDS[name], given) or 0
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    rest = words[1:] if group else words
    if not rest or asks_for_help(rest[:1]):
        print(_overview(group), file=sys.stdout if rest or not words else sys.stderr)
        return 0 if rest or not words else 2
    raise InputError(_unknown(group, rest[0]))


def _train(name: str, args: list[str]) -> int:
    """`reverie train NAME ...`: the flags are read first, and only then the recipe and torch are imported."""
    from reverie.catalog import RECIPES

    if name.startswith("-"):
        raise InputError(
            f"The recipe comes first, not {name}: write `reverie train RECIPE DATA`, and then the flags."
        )
    if name not in RECIPES:
        raise InputError(f"There is no recipe {name!r}: {did_you_mean(name, RECIPES, 'there are')}")
    command = Command.of_recipe(
        f"reverie train {name}", RECIPES[name], like=Command.of("reverie train", train)
    )
    given = command.parse(args)
    if given is not None:
        folder = given.pop("out") or Path("runs") / f"{name}-{given['data'].resolve().name}"
        return _carry_out(name, given.pop("data"), folder, given)
    return 0


def _carry_out(name: str, data: Path, folder: Path, given: dict[str, Any], **more: Any) -> int:
    """Run a recipe in this process, and in those beside it under torchrun; `given` are its flags and the engine's."""
    from dataclasses import fields

    from reverie.catalog import recipe

    run = recipe(name)  # torch is imported here
    from reverie.data.remote import address
    from reverie.train.engine import Engine
    from reverie.train.log import commanded
    from reverie.train.parallel import processes, team

    rest = dict(given)
    engine = {field.name: rest.pop(field.name) for field in fields(Engine) if field.name in rest}
    with processes():
        where = address(data) or data.resolve()
        kept = nullcontext() if more else commanded(folder, recipe=name, data=where, arguments=given)
        with kept:
            run(data, folder, engine=Engine(**engine, **more), **rest)
        if team().first:
            print(f"the model: {folder / 'model'}")
    return 0


def _overview(group: str) -> str:
    """Every command of `group` ("" for all) with the first line of its docstring."""
    names = [name for name in COMMANDS if name.startswith(f"{group} " if group else "")]
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {_headline(COMMANDS[name])}" for name in names]
    return "\n".join(
        [
            f"usage: reverie {f'{group} ' if group else ''}COMMAND ...",
            "",
            "From a captioned folder to pictures and clips from words: CLIP, Sora and their parts.",
            "",
            *lines,
            "",
            "`reverie COMMAND --help` tells a command's flags; `reverie --version` the version.",
        ]
    )


def _headline(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


def _unknown(group: str, word: str) -> str:
    prefix = f"{group} " if group else ""
    close = nearest(f"{prefix}{word}", COMMANDS)
    hint = f"did you mean `reverie {close}`?" if close else "`reverie --help` lists the commands."
    return f"There is no command {prefix}{word!r}; {hint}"


if __name__ == "__main__":
    entry()
