"""Training on packs of pictures of any size: what a step reads, that it resumes, and that the model is of use."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

import reverie
from reverie import rng
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.encoders.navit import NavitConfig
from reverie.errors import InputError
from reverie.evals.zero_shot import zero_shot
from reverie.recipes import clip, clip_native, measure_clip
from reverie.recipes.clip_native import NativeRun, Source, native
from reverie.recipes.search import Query, open_folder, search
from reverie.systems.clip import Clip
from reverie.train.log import Run

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 40), "blue": (20, 40, 220), "black": (0, 0, 0)}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take a second of each run; tests/train/test_log.py draws them."""
    monkeypatch.setattr(Run, "curves", lambda self: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide, tall and square pictures of four colours; a disc stands somewhere in each."""
    place = tmp_path_factory.mktemp("shapes")
    for k, (name, colour) in enumerate(COLOURS.items()):
        (place / f"{name} disc").mkdir()
        for i in range(6):
            size = [(48, 16), (16, 48), (32, 32), (64, 24), (24, 40), (8, 8)][i]
            picture = Image.new("RGB", size, (255, 255, 255))
            u = torch.rand(2, generator=rng.generator(0, "disc", k, i))
            x, y = int(u[0] * (size[0] - 8)), int(u[1] * (size[1] - 8))
            ImageDraw.Draw(picture).ellipse((x, y, x + 7, y + 7), fill=colour)
            picture.save(place / f"{name} disc" / f"{i}.png")
    import_folder(place, val=0, quiet=True)
    return place


SMALL = {"size": 32, "patch": 8, "width": 64, "depth": 2, "budget": 64}


def config(index, **changes) -> tuple[NativeRun, Clip]:
    names = {name: changes.pop(name) for name in ("size", "positions") if name in changes}
    shaped = lambda vocab, end: clip_native.shape(vocab, end, **{"size": 32, "patch": 8, "width": 64, "depth": 2} | names)  # fmt: skip  # noqa: E731, E501
    model = clip.begin("", index, shaped, seed=0)
    return NativeRun(**{"model": model.config, "steps": 4, "budget": 64} | changes), model


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.6])
@pytest.mark.parametrize("smallest", [0, 16])
def test_packs_hold_every_picture_once_an_epoch_within_the_budget(folder, buckets, drop, smallest):
    index = Index.read(folder)
    run, model = config(index, buckets=buckets, drop=drop, smallest=smallest)
    source = Source(index, run, model.tokenizer)
    count = len(source.plan.packs(0))
    seen = []
    for step in range(count):
        batch = source(step)
        (pack,) = batch["packs"]
        lengths = [rgba.shape[1] * rgba.shape[2] // 64 for rgba in pack["rgba"]]
        if drop:
            assert all(kept.max() < n for kept, n in zip(pack["keep"], lengths, strict=True))
            lengths = [len(kept) for kept in pack["keep"]]
        assert sum(lengths) <= 64
        assert not buckets or len({rgba.shape for rgba in pack["rgba"]}) == 1
        assert max(rgba.shape[1] * rgba.shape[2] for rgba in pack["rgba"]) <= 32 * 32
        seen += batch["ids"]
    assert sorted(seen) == sorted(item.file_name for item in index)
    again = Source(index, run, model.tokenizer)(count - 1)
    for key, value in again["packs"][0].items():
        for one, other in zip(value, batch["packs"][0][key], strict=True):
            assert one.equal(other)
    first, second = (source.tokens(epoch) for epoch in (0, 1))
    assert (first == second) == (not drop and not smallest)


def test_a_picture_keeps_its_aspect(folder):
    index = Index.read(folder)
    run, model = config(index)
    source = Source(index, run, model.tokenizer)
    wide = next(i for i, item in enumerate(index) if (item.width, item.height) == (64, 24))
    assert source.pixels.shape(wide) == (1, 16, 48)  # 1536 pixels brought to less than 1024
    small = next(i for i, item in enumerate(index) if item.width == 8)
    assert source.pixels.shape(small) == (1, 8, 8)  # not enlarged


def test_the_loss_is_of_all_pictures_of_the_step_however_it_is_computed(folder, tmp_path):
    """In one sequence, pack by pack, and twice over with chunks: the same first losses."""
    told = []
    for name, changes in {"one": {}, "chunked": {"chunk": 1}}.items():
        out = tmp_path / name
        native(folder, out, steps=3, packs=2, seed=1, **SMALL, **changes)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        told.append(next(row for row in rows if "loss" in row)["loss"])
    assert told[0] == pytest.approx(told[1], rel=1e-5)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[Clip, object]:
    out = tmp_path_factory.mktemp("run") / "out"
    return native(
        folder, out, steps=60, lr=2e-3, drop=0.2, positions="fractional", **SMALL | {"budget": 200}
    ), out


def test_it_learns_saves_and_loads(folder, trained):
    model, out = trained
    assert isinstance(model.config.image, NavitConfig)
    index = Index.read(folder)
    paths = [index.path(item) for item in index]
    labels = [sorted({str(item.label) for item in index}).index(str(item.label)) for item in index]
    names = sorted({str(item.label) for item in index})
    with torch.no_grad():
        found = zero_shot(model.embed_image, model.embed_text, paths, labels, names)
        vectors = model.embed_image(paths)
        opened = [Image.open(path) for path in paths]
        torch.testing.assert_close(model.embed_image(opened), vectors, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.embed_image(model.prepare(paths)), vectors, atol=1e-5, rtol=1e-4)
        again = reverie.load(out / "model").embed_image(paths)
    assert found["top1"] > 0.6  # guessing: 0.25
    assert torch.equal(again, vectors)


def test_search_and_naming_read_pictures_at_their_own_size(folder, trained, tmp_path):
    model, out = trained
    vectors, _ = open_folder(model, folder, quiet=True)
    with torch.no_grad():
        own = model.embed_image([folder / name for name in vectors.names]).half()
    torch.testing.assert_close(vectors.vectors, own, atol=2e-3, rtol=1e-2)
    (answers,) = search(model, vectors, [Query(words="blue disc")], top=3)
    assert len(answers) == 3
    measured = measure_clip.zero_shot(folder, tmp_path / "naming", model=str(out / "model"))
    assert measured.numbers["all"]["images"] == 24
    assert measured.numbers["all"]["top1"] > 0.6


def test_tensors_of_any_size_are_brought_to_whole_patches(folder, trained):
    model, _ = trained
    images = [torch.rand(3, 40, 17) * 2 - 1, torch.rand(3, 300, 100) * 2 - 1, torch.rand(3, 8, 8) * 2 - 1]
    with torch.no_grad():
        together = model.embed_image(images)
        alone = torch.cat([model.embed_image(image[None]) for image in images])
        mixed = model.similarity(images, ["red disc"])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert mixed.shape == (3, 1)
    for wrong, said in ((images[0][:2], "3 h w"), (images[0] * 9, "must be in"), (images[0].int(), "float")):
        with pytest.raises(InputError, match=said):
            model.embed_image([wrong])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 4}, r"budget is 4 tokens a pack, but .*/\d.png may take 1\d: give 1\d or more"),
        ({"budget": 0}, r"budget is 0 tokens a pack, but .* give 1\d or more"),
        ({"drop": 1.0}, "drop is 0.0 to 1.0"),
        ({"smallest": 64}, "smallest is 64: give a side from the patch, 8, to the largest, 32"),
        ({"positions": "round"}, "positions is 'round'"),
        ({"size": 4}, "size is 4"),
        ({"depth": 1}, "depth is 1"),
        ({"start": "clip-stickers"}, "clip-stickers reads squares"),
    ],
)
def test_mistakes_are_named(folder, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        native(folder, tmp_path / "out", steps=1, **SMALL | changes)


def test_several_processes_are_refused_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_native, "team", lambda: SimpleNamespace(rank=0, count=2))
    monkeypatch.setattr(clip_native, "open_index", lambda _: pytest.fail("it had begun"))
    with pytest.raises(InputError, match="across the 2 processes that were started"):
        native(folder, tmp_path / "out", **SMALL)


def test_it_goes_on_from_a_model_of_its_kind(folder, trained, tmp_path):
    _, out = trained
    model = native(folder, tmp_path / "on", steps=1, start=str(out / "model"), budget=64)
    assert dataclasses.asdict(model.config) == dataclasses.asdict(trained[0].config)
