"""The report whole: a page that loads nothing and runs nothing, whatever the data is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.cli import main
from reverie.data.importers import import_folder
from reverie.data.index import Caption, Index
from reverie.data.report import spread
from reverie.data.shards import pack
from reverie.errors import InputError
from reverie.recipes import data_report as recipe
from reverie.recipes.cleaning import score
from reverie.recipes.data_report import report
from reverie.recipes.data_report_page import colours, cut, histogram, number, weight

EVIL = (
    "</title><script>alert(1)</script><img src=x onerror=alert(2)> \x00\x1b[31m \u202e ' \" & ]]> --> 𓀀 שלום"
)


class Seen(HTMLParser):
    """The elements of a page, their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.words += data


def inert(path) -> Seen:
    """The page at `path`, which holds all that it shows."""
    seen = Seen(path.read_bytes().decode())
    assert not {"script", "iframe", "object", "link", "base", "form"} & set(seen.tags)
    assert seen.tags.count("img") == sum(tag == "img" and name == "src" for tag, name, _ in seen.attributes)
    for tag, name, value in seen.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "style", "the policy would not let it be"
        if name in ("src", "href", "srcset"):
            assert value.startswith(("data:image/webp;base64,", "#")), (tag, name, value[:80])
    return seen


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture
def folder(tmp_path):
    """Six pictures, one clip, a copy, one file that is none."""
    place = tmp_path / "set"
    place.mkdir()
    for i in range(6):
        picture(i).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture number {i}")
    frames = [picture(20 + i) for i in range(6)]
    frames[0].save(place / "clip.webp", save_all=True, append_images=frames[1:], duration=50)
    (place / "clip.txt").write_text("一个片段")
    (place / "bad.png").write_bytes(b"")
    (place / "copy.png").write_bytes((place / "0.png").read_bytes())
    (place / "copy.txt").write_text("picture number 0")
    import_folder(place, val=0, quiet=True)
    return place


def change(folder, **by_name) -> None:
    """Rewrites the index with other fields for all its items, or for `name=` alone."""
    index = Index.read(folder)
    items = [replace(item, **{field: of(item) for field, of in by_name.items()}) for item in index]
    Index(folder, items, extra=index.extra).write()


def test_the_page_and_its_numbers(folder, tmp_path):
    before = (folder / "metadata.parquet").read_bytes()
    page, numbers = report(folder, tmp_path / "new" / "report.html", quiet=True)
    seen, found = inert(page), json.loads(numbers.read_text())
    assert numbers == tmp_path / "new" / "report.json"
    assert (found["contents"]["accepted"], found["contents"]["clips"]) == (8, 1)
    assert found["contents"]["copies"] == [["0.png", "copy.png"]]
    assert found["look"]["pairs"]["count"] == found["look"]["files"] == 8
    assert len(found["look"]["map"]) == 8
    assert len({(place["column"], place["row"]) for place in found["look"]["map"]}) == 8
    cosines = [pair["cosine"] for pair in found["look"]["worst"]]
    assert cosines == sorted(cosines)
    for words in ("bad.png", "the file is empty", "picture number 3", "一个片段", "Least fitting", "Map"):
        assert words in seen.words
    assert (folder / "metadata.parquet").read_bytes() == before
    assert not (folder / ".reverie" / "report.html").exists()
    again, _ = report(folder, tmp_path / "again.html", quiet=True)
    assert again.read_bytes() == page.read_bytes()


def test_nothing_in_the_data_becomes_html(folder, tmp_path):
    evil = EVIL.replace("\x00", "")  # a file's name cannot hold it
    change(
        folder,
        captions=lambda item: (Caption(text=EVIL, source=EVIL, language=EVIL), *item.captions),
        label=lambda item: EVIL if item.file_name < "3" else "x",
        source=lambda item: EVIL,
        licence=lambda item: EVIL,
        split=lambda item: "train",
        scores=lambda item: {EVIL: float("nan"), "b": float("-inf"), "c": 1.0},
        reject=lambda item: f"marked by {evil}" if item.file_name == "5.png" else item.reject and evil,
    )
    page, numbers = report(folder, tmp_path / "report.html", quiet=True)
    seen = inert(page)
    assert "alert(2)" in seen.words
    assert "\x00" not in page.read_text()
    assert json.loads(numbers.read_text())["contents"]["labels"][0][0] in (EVIL, "x")


def test_without_a_model_the_index_alone_is_read(folder, tmp_path, monkeypatch):
    score(folder, quiet=True)

    def refuse(*args, **more):
        raise AssertionError

    monkeypatch.setattr(recipe, "capable", refuse)
    monkeypatch.setattr(recipe, "embed_pictures", refuse)
    page, numbers = report(folder, tmp_path / "report.html", model=None, quiet=True)
    look = json.loads(numbers.read_text())["look"]
    assert (look["model"], look["map"], look["pairs"]["count"]) == (None, [], 8)
    assert "Map" not in inert(page).words


def test_what_data_score_has_written_is_not_computed_again(folder, tmp_path, monkeypatch):
    _, fresh = report(folder, tmp_path / "fresh.html", quiet=True)
    score(folder, quiet=True)
    asked = []
    real = recipe.cosines
    monkeypatch.setattr(
        recipe,
        "cosines",
        lambda clip, items, *a, **more: asked.append([*items]) or real(clip, items, *a, **more),
    )
    _, kept = report(folder, tmp_path / "kept.html", quiet=True)
    assert asked == [[]]
    fresh, kept = (json.loads(path.read_text())["look"] for path in (fresh, kept))
    assert [p["file_name"] for p in fresh["worst"]] == [p["file_name"] for p in kept["worst"]]
    change(folder, captions=lambda item: (*item.captions, Caption(text="new", source="x")))
    report(folder, tmp_path / "new.html", quiet=True)
    assert len(asked[-1]) == 8  # what was scored are other captions


def test_the_sample_bounds_what_the_model_looks_at(folder, tmp_path):
    _, numbers = report(folder, tmp_path / "report.html", sample=3, quiet=True)
    found = json.loads(numbers.read_text())
    assert (found["look"]["files"], len(found["look"]["map"]), found["contents"]["accepted"]) == (3, 3, 8)
    _, english = report(folder, tmp_path / "en.html", language="en", quiet=True)
    assert json.loads(english.read_text())["look"]["files"] == 7


@pytest.mark.parametrize("model", ["clip-stickers", None])
def test_everything_rejected(folder, tmp_path, model):
    change(folder, reject=lambda item: "the file is empty")
    page, _ = report(folder, tmp_path / "report.html", model=model, quiet=True)
    assert "None of the 9 files is accepted" in inert(page).words


@pytest.mark.parametrize("model", ["clip-stickers", None])
def test_no_captions_and_one_file(folder, tmp_path, model):
    change(folder, captions=lambda item: ())
    assert (
        "No accepted file has a caption"
        in inert(report(folder, tmp_path / "a.html", model=model, quiet=True)[0]).words
    )
    index = Index.read(folder)
    Index(folder, [next(item for item in index if item.reject is None)]).write()
    page, numbers = report(folder, tmp_path / "b.html", model=model, quiet=True)
    assert "1 clip" in inert(page).words or "1 picture" in inert(page).words
    assert len(json.loads(numbers.read_text())["look"]["map"]) == (model is not None)


def test_files_that_cannot_be_read_are_named(folder, tmp_path):
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(b"no picture")
    page, numbers = report(folder, tmp_path / "report.html", quiet=True)
    look = json.loads(numbers.read_text())["look"]
    assert {name for name, _ in look["unread"]} == {"1.png", "2.png"}
    assert look["files"] == 6
    assert "Not to be read now" in inert(page).words
    for path in folder.glob("*.*"):
        if path.suffix in (".png", ".webp"):
            path.unlink()
    page, numbers = report(folder, tmp_path / "none.html", quiet=True)
    assert json.loads(numbers.read_text())["look"]["map"] == []
    inert(page)


def test_packed_datasets_and_tars_that_have_gone(folder, tmp_path):
    pack(Index.read(folder), tmp_path / "packed", quiet=True)
    _, there = report(folder, tmp_path / "a.html", quiet=True)
    _, packed = report(tmp_path / "packed", tmp_path / "b.html", quiet=True)
    there, packed = (json.loads(path.read_text())["look"] for path in (there, packed))
    assert sorted(p["cosine"] for p in packed["worst"]) == pytest.approx(
        sorted(p["cosine"] for p in there["worst"])
    )
    assert len(packed["map"]) == 8
    for tar in (tmp_path / "packed" / "shards").glob("*.tar"):
        tar.unlink()
    for kept in (tmp_path / "packed" / ".reverie").glob("embeddings-*/*"):
        kept.unlink()
    page, numbers = report(tmp_path / "packed", tmp_path / "c.html", quiet=True)
    assert {name for name, _ in json.loads(numbers.read_text())["look"]["unread"]} == {
        p["file_name"] for p in packed["map"]
    }
    assert "which holds it" in inert(page).words


def test_a_large_report_stays_small(folder, tmp_path):
    index = Index.read(folder)
    good = [item for item in index if item.reject is None]
    many = [
        replace(
            good[i % len(good)],
            file_name=f"{i:05}{'x' * 80}.png",
            captions=(Caption(text=f"{i} " * 300, source="x"),),
            reject=f"reason {'abc' * 50} {chr(65 + i % 200)}" if i % 2 else None,
            label=f"label {i}" * 20,
        )
        for i in range(5000)
    ]
    Index(folder, many).write()
    page, _ = report(folder, tmp_path / "report.html", model=None, quiet=True)
    assert page.stat().st_size < 3_000_000
    inert(page)


def test_mistakes_are_one_sentence(folder, tmp_path):
    with pytest.raises(InputError, match="give a name that ends"):
        report(folder, tmp_path / "report.json")
    with pytest.raises(InputError, match="sample is 0"):
        report(folder, tmp_path / "report.html", sample=0)
    with pytest.raises(InputError, match="reverie data import"):
        report(tmp_path, tmp_path / "report.html")
    Index(folder, []).write()
    with pytest.raises(InputError, match="lists no file"):
        report(folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "a" / "page.html"
    assert main(["data", "report", str(folder), "--out", str(out), "--no-model"]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(out.with_suffix(".json"))]
    assert main(["data", "report", str(folder), "--no-no-model"]) == 2
    assert "--no-no-model" not in capsys.readouterr().err.partition("its flags are")[2]


def test_the_map_shows_each_file_at_its_cell():
    places = tuple(recipe.Place(file_name=name, column=i, row=0) for i, name in enumerate("ab"))
    look = recipe.Look(
        model="m", files=0, pairs=None, best=(), worst=(), unread=(), map=places, columns=3, rows=2
    )
    sheet = np.asarray(recipe.drawn_map(look, {"a": Image.new("RGB", (92, 92), "red"), "b": "gone"}))
    assert sheet.shape == (192, 288, 4)
    assert sheet[48, 48].tolist() == [255, 0, 0, 255]
    assert sheet[48, 144].tolist() == [200, 200, 200, 255]
    assert (sheet[..., 3] == 0).mean() > 0.5


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 1500])
def test_there_is_a_cell_for_each(count):
    columns, rows = recipe.cells_for(count)
    assert columns * rows >= max(2 * count, 1)
    assert columns >= rows


def test_colours_are_what_tells_files_apart(folder):
    items = [item for item in Index.read(folder) if item.reject is None]
    assert colours(items)[0] == "split"
    by_source = [replace(item, source=item.file_name[0]) for item in items]
    assert colours(by_source)[0] == "source"
    labelled = [replace(item, label=str(i % 3)) for i, item in enumerate(by_source)]
    assert colours(labelled)[1][0] == ("0", 3)


def test_numbers_as_people_write_them():
    assert [number(v) for v in (0, 3.0, 12345, 0.12345, 1e300, -2.5)] == [
        "0",
        "3",
        "12,345",
        "0.123",
        "1e+300",
        "-2.5",
    ]
    assert [weight(v) for v in (162, 5000, 2.5e6)] == ["162 B", "5 kB", "2.5 MB"]
    assert cut("a  b\nc" * 3, 5) == "a b…"
    assert cut(None) == ""


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 5e-324],
        [-1e308, 1e308],
        [5e-324, 1e308],
        [1.0, 1.0 + 2**-52],
        [1, 2, 1000],
        [3.5] * 9 + [4.5] * 9,
    ],
    ids=str,
)
def test_any_numbers_can_be_drawn(values):
    drawn = histogram(spread(values))
    assert drawn.count("<rect") == len(spread(values).bars)
    assert not {"nan", "inf"} & set(re.findall(r"[a-z]+", drawn))


def test_middle_frames_stand_for_clips(folder, tmp_path):
    found = recipe.thumbnails(Index.read(folder), ["clip.webp"], 40, quiet=True)["clip.webp"]
    with Image.open(folder / "clip.webp") as clip:
        clip.seek(3)
        there = np.asarray(clip.convert("RGB").resize((40, 30))).astype(int)
    inside = np.asarray(found).astype(int)[5:35]
    assert np.abs(inside - there).mean() < 3
    assert torch.is_grad_enabled()
