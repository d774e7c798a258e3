"""Training at native sizes: what a step holds, how full it is, and that a run goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import reverie
from reverie.codecs.bpe import Bpe
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.recipes import sora, sora_batches
from reverie.systems.clip import Clip, ClipConfig
from reverie.systems.sora import Sora
from reverie.train.engine import Engine
from reverie.train.log import Run

SIZES = ((32, 32), (48, 16), (16, 48), (32, 48), (64, 16), (32, 16))  # width, height


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take a second of each run; tests/train/test_log.py draws them."""
    monkeypatch.setattr(Run, "curves", lambda self: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eighteen pictures of six sizes and six clips of two to seven frames, each with a caption."""
    place = tmp_path_factory.mktemp("mixed")
    for i in range(18):
        Image.new("RGB", SIZES[i % 6], (10 * i, 0, 90)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture {i}")
    for i in range(6):
        frames = [Image.new("RGB", SIZES[i], (0, 30 * k, 40 * i)) for k in range(i + 2)]
        frames[0].save(place / f"clip{i}.webp", save_all=True, append_images=frames[1:], duration=80)
        (place / f"clip{i}.txt").write_text(f"clip {i}")
    import_folder(place, val=0, quiet=True)
    return place


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of a CLIP of random weights."""
    torch.manual_seed(0)
    tokenizer = Bpe.train(["picture clip 0 1 2 3"], vocab=600)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=16, depth=1, heads=1, end=tokenizer.end)
    image = VitConfig(size=16, patch=16, width=16, depth=1, heads=1)
    place = tmp_path_factory.mktemp("clip")
    reverie.save(Clip(ClipConfig(image=image, text=text, width=16), tokenizer), place / "model")
    return place / "model"


def config_of(clip: Clip, **how) -> sora_batches.SoraRun:
    """A tiny network on packs of 32 tokens."""
    masked = how.pop("masked", False)
    shape = sora.shape(clip, size=48, sizes=(3 if masked else 1, 32, 1), patch=16, masked=masked)
    model = dataclasses.replace(shape, steps=1)
    settings = {"native": "packs", "budget": 32, "clip_frames": 5, "steps": 6} | how
    return sora_batches.SoraRun(model=model, batch=1, clips=1, **settings)


def packs_of(folder, reader, **how) -> sora_batches.Packs:
    clip = reverie.load(reader)
    config = config_of(clip, **how)
    system = Sora(config.model, clip.tokenizer)
    index = Index.read(folder)
    pictures, clips = index.select(video=False), index.select(video=True)
    sources = [
        sora_batches.Source(pictures, config, system, frames=1),
        sora_batches.Source(clips, config, system, frames=16),
    ]
    return sora_batches.Packs(sources, config)


def tokens(latents: torch.Tensor) -> int:
    _, f, h, w = latents.shape
    return f * (h // 16) * (w // 16)


@pytest.mark.parametrize("native", ["packs", "buckets"])
def test_a_step_holds_items_of_their_own_shape_within_the_budget(folder, reader, native):
    packs = packs_of(folder, reader, native=native)
    seen: Counter[str] = Counter()
    shapes = set()
    for step in range(len(packs.plan.packs(0))):
        batch = packs.batch(step, 0)
        assert sum(map(tokens, batch["latents"])) <= 32
        if native == "buckets":
            assert len({one.shape for one in batch["latents"]}) == 1
        seen.update(batch["ids"])
        for name, latents, known, pace in zip(
            batch["ids"], batch["latents"], batch["known"], batch["pace"], strict=True
        ):
            shapes.add(tuple(latents.shape[1:]))
            with Image.open(folder / name) as file:
                width, height = file.size
                assert latents.shape[2:] == (height, width)
                assert latents.shape[1] <= min(getattr(file, "n_frames", 1), 5)
            assert not known.all()
            assert pace in (1.0, 2.0)
    assert seen == Counter({path.name: 1 for path in folder.iterdir() if path.suffix in (".png", ".webp")})
    assert {shape[1:] for shape in shapes} == {(height, width) for width, height in SIZES}
    assert max(shape[0] for shape in shapes) > 2


def test_the_packs_of_a_step_are_shared_by_the_processes(folder, reader, monkeypatch):
    packs = packs_of(folder, reader, packs=2)
    assert packs.share == 2
    alone = [packs.batch(1, micro)["ids"] for micro in range(2)]
    monkeypatch.setattr(sora_batches, "team", lambda: SimpleNamespace(rank=1, count=2))
    assert packs.share == 1
    assert packs.batch(1, 0)["ids"] == alone[1]
    monkeypatch.setattr(sora_batches, "team", lambda: SimpleNamespace(rank=1, count=3))
    with pytest.raises(InputError, match="2 packs of a step cannot be shared by 3 processes"):
        packs.batch(0, 0)


def test_formats_vary_by_item_and_epoch(folder, reader):
    packs = packs_of(folder, reader, vary=0.5, budget=64)
    first, second = ([view.latents for view in packs.views(epoch)] for epoch in (0, 1))
    assert first != second
    own = [view.size is None for view in packs.views(0)]
    assert 4 < sum(own) < 20
    for (source, i), view in zip(packs.items, packs.views(1), strict=True):
        assert source.one(i, view).shape == view.latents


def test_a_mixed_folder_is_packed_with_less_than_a_twentieth_wasted(folder, reader):
    """A thousand items of these sizes and lengths."""
    packs = packs_of(folder, reader, budget=256)
    packs.items = packs.items * 42
    for native, low, high in (("packs", 0, 0.05), ("buckets", 0.05, 1)):
        packs.config = dataclasses.replace(packs.config, native=native)
        plan = sora_batches.Plan(packs._epoch)
        fill = plan.fill(0, packs._lengths(0), budget=256)
        assert fill.samples == 24 * 42
        assert low <= fill.waste < high


def test_a_run_on_packs_that_is_stopped_goes_on_to_the_same_bits(folder, reader, tmp_path, monkeypatch):
    def run(out):
        clip = reverie.load(reader)
        sora.fit(config_of(clip, seed=3), clip, Index.read(folder), out, prompts=("picture 1",))

    run(tmp_path / "whole")
    evaluated = sora.grid
    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluated(*args)

    monkeypatch.setattr(sora, "grid", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "twice")
    monkeypatch.setattr(sora, "grid", evaluated)
    run(tmp_path / "twice")
    one, two = (reverie.load(tmp_path / name / "model").state_dict() for name in ("whole", "twice"))
    assert all(one[name].equal(two[name]) for name in one)


def test_packs_have_masked_passes(folder, reader):
    """A share of each item goes, whatever its shape, and the loss is that of items alone, weighed by what they hold."""
    packs = packs_of(folder, reader, masked=True, known=0.0, known_pictures=0.0)
    for parameter in packs.model.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shares = set()
    for step in range(4):
        batch = packs.batch(step, 0)
        for one, kept in zip(batch["latents"], batch["keep"], strict=True):
            stays = max(round(tokens(one) * (1 - left_out(packs, step))), 1)
            assert len(set(kept.tolist())) == len(kept) == stays
            assert int(kept.max()) < tokens(one)
        shares.add(left_out(packs, step))
    assert len(shares) == 4
    assert all(0.3 <= share <= 0.5 for share in shares)
    together = packs.model.loss(batch)
    alone, weight = 0.0, 0
    for i, one in enumerate(batch["latents"]):
        single = {
            name: batch[name][i][None]
            for name in ("latents", "noise", "known", "keep", "masked_noise", "normal", "drop", "tokens")
        }
        alone += packs.model.loss(single | {"pace": batch["pace"][i]})["masked"] * one.numel()
        weight += one.numel()
    assert len({one.shape for one in batch["latents"]}) > 1
    torch.testing.assert_close(together["masked"], alone / weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together["loss"], together["whole"] + together["masked"])


def left_out(packs, step):
    return sora_batches.share_of(packs.config, step)


def test_what_cannot_be_packed_is_said(folder, reader):
    with pytest.raises(InputError, match="native is 'both': choose packs or buckets"):
        packs_of(folder, reader, native="both")
    with pytest.raises(
        InputError, match=r"budget is 4 tokens a pack, but clip3.webp may take 30: give 30 or"
    ):
        packs_of(folder, reader, budget=4)
    with pytest.raises(InputError, match="leave --latents out, or --native"):
        packs_of(folder, reader, latents=True)
    clip = reverie.load(reader)
    with pytest.raises(InputError, match="leave --compile out, or --native"):
        sora.fit(config_of(clip), clip, Index.read(folder), folder, prompts=(), engine=Engine(compile=True))
    with pytest.raises(InputError, match="nothing is cropped: leave crop out"):
        sora.fit(config_of(clip, crop=True), clip, Index.read(folder), folder, prompts=())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"budget": 512},
            "budget is 512, but batches of one shape have none: leave --budget out, or give --native",
        ),
        ({"packs": 2}, "packs is 2, but batches of one shape have none"),
        ({"native": "packs", "batch": 8}, "batch is 8, but with --native .* give --budget instead"),
        ({"native": "packs", "clips": 4}, "clips is 4, but with --native .* give 0 for none"),
        ({"native": "packs", "budget": 0}, "budget is 0: give 1 or more, such as 65536"),
        ({"native": "buckets", "packs": 0}, "packs is 0: give 1 or more, such as 1"),
    ],
)
def test_no_flag_is_ignored(folder, reader, tmp_path, asked, said):
    with pytest.raises(InputError, match=said):
        sora.dit(folder, tmp_path, clip=str(reader), **asked)


def test_what_is_not_said_is_usual(folder, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(sora, "fit", lambda config, *_, **__: config)

    def step(recipe, **asked):
        run = recipe(folder, tmp_path, clip=str(reader), **asked)
        return run.batch, run.clips, run.budget, run.packs

    assert step(sora.tiny) == (32, 2, 0, 1)
    assert step(sora.tiny, batch=8, clips=1) == (8, 1, 0, 1)
    assert step(sora.tiny, native="packs")[1:] == (2, 1024, 1)
    assert step(sora.dit, scale="S", native="packs", clips=0, packs=2)[1:] == (0, 65_536, 2)


def test_no_epoch_has_what_the_budget_cannot_hold(folder, reader):
    """Formats and paces differ from epoch to epoch; what may come is asked before the first step."""
    packs = packs_of(folder, reader, vary=0.5, budget=4096)
    largest = max(sora_batches.patches_of(source.largest(i), packs.model) for source, i in packs.items)
    seen = [max(packs._lengths(epoch)) for epoch in range(12)]
    assert max(seen) <= largest
    with pytest.raises(InputError, match=f"may take {largest}: give {largest}"):
        packs_of(folder, reader, vary=0.5, budget=largest - 1)
