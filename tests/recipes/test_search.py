"""Search and cleaning from end to end: answers equal to sorting, scores equal to the model's, marks honoured."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reverie as package
from reverie import cli
from reverie.codecs.bpe import Bpe
from reverie.data.importers import import_folder
from reverie.data.index import FILE, Caption, Index
from reverie.data.marks import mark
from reverie.errors import InputError
from reverie.recipes import clip as clip_recipe
from reverie.recipes import search, sora
from reverie.recipes.cleaning import dedupe, score
from reverie.systems.clip import Clip

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def reverie(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    tokenizer = Bpe.train([f"a {colour} picture" for colour in COLOURS], vocab=520)
    torch.manual_seed(0)
    config = clip_recipe.shape(tokenizer.vocab, tokenizer.end, size=32, width=64, depth=2)
    return Clip(config, tokenizer).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(clip, tmp_path_factory) -> Path:
    return package.save(clip, tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six pictures and a clip, imported; without an index it is any folder."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i, colour in enumerate(COLOURS):
        noise = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8)
        picture = Image.blend(Image.new("RGB", (5, 5), colour), Image.fromarray(noise), 0.4)
        picture.resize((60, 40), Image.Resampling.BICUBIC).save(place / f"{colour}.png")
        (place / f"{colour}.txt").write_text(f"a {colour} picture\n{colour}")
    frames = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    frames[0].save(place / "clip.webp", save_all=True, append_images=frames[1:], duration=500, lossless=True)
    (place / "clip.txt").write_text("a clip of colours")
    import_folder(place, val=0.2, quiet=True)
    return place


def test_the_answer_is_sorting_by_the_models_own_cosines(clip, folder):
    found, _ = search.open_folder(clip, folder, quiet=True)
    queries = [search.Query(words="a red picture"), search.Query(images=(folder / "blue.png",))]
    answers = search.search(clip, found, queries, top=20)
    paths = [folder / name for name in found.names]
    stills = [path for path in paths if path.suffix == ".png"]
    vectors = clip.embed_image(stills)
    asked = (clip.embed_text(["a red picture"]), clip.embed_image([folder / "blue.png"]))
    for query, own in zip(asked, answers, strict=True):
        want = {path.name: s for path, s in zip(stills, (vectors @ query[0]).tolist(), strict=True)}
        got = {it.name: it.score for it in own if it.seconds is None}
        assert got == pytest.approx(want, abs=2e-3)
        assert [it.score for it in own] == sorted((it.score for it in own), reverse=True)
        assert len(own) == 7
    assert answers[1][0].name == "blue.png"
    assert answers[1][0].score == pytest.approx(1, abs=1e-3)


def test_a_clip_scores_by_its_best_frame_and_says_when(clip, folder):
    (folder / "frame.png").unlink(missing_ok=True)
    Image.new("RGB", (32, 32), COLOURS[3]).save(folder.parent / "frame.png")
    found, _ = search.open_folder(clip, folder, quiet=True)
    (answer,) = search.search(clip, found, [search.Query(images=(folder.parent / "frame.png",))], top=1)
    assert answer[0].name == "clip.webp"
    assert answer[0].seconds == pytest.approx(1.5)
    assert answer[0].score == pytest.approx(1, abs=1e-3)


def test_a_combined_query_is_the_weighted_sum_of_unit_vectors(clip, folder):
    picture = folder / "green.png"
    query = search.Query(
        words="a red picture",
        plus=("blue",),
        minus=("white",),
        images=(picture,),
        image_weight=0.7,
        minus_weight=0.3,
    )
    texts = clip.embed_text(["a red picture", "blue", "white"])
    whole = texts[0] + texts[1] - 0.3 * texts[2] + 0.7 * clip.embed_image([picture])[0]
    torch.testing.assert_close(search.vectors_of(clip, [query])[0], whole / whole.norm(), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="cancel out"):
        search.vectors_of(clip, [search.Query(words="blue", minus=("blue",), minus_weight=1.0)])


def test_filters_take_some_and_a_retrained_model_embeds_anew(clip, folder):
    index = Index.read(folder)
    index.items = [
        dataclasses.replace(item, source="hand" if item.file_name > "d" else "camera") for item in index
    ]
    index.write()
    found, items = search.open_folder(clip, folder, sources=("camera",), quiet=True)
    assert set(found.names) == set(items) == {"black.png", "blue.png", "clip.webp"}
    held = tuple(item.file_name for item in index if item.split == "val")
    assert 0 < len(held) < 7
    assert search.open_folder(clip, folder, split="val", quiet=True)[0].names == held
    with pytest.raises(InputError, match="camera, hand"):
        search.open_folder(clip, folder, sources=("nobody",), quiet=True)
    before = search.key_of(clip)
    other = Clip(clip.config, clip.tokenizer)
    other.load_state_dict(clip.state_dict())
    assert search.key_of(other) == before
    with torch.no_grad():
        other.image_projection.weight[0, 0] += 1e-3
    assert search.key_of(other) != before


def test_the_command_answers_as_lines_as_json_and_as_a_sheet(model, folder, tmp_path, capsys):
    sheet = tmp_path / "deep" / "sheet.png"
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / FILE).unlink()  # any folder of pictures
    asked = ["search", folder, "a red picture", "green", "--top", 3, "--model", model]
    assert reverie(*asked, "--sheet", sheet) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == '# "a red picture"'
    assert len(lines) == 2 * (1 + 3) + 1
    assert "broken.png" in err
    with Image.open(sheet) as image:
        assert image.height > 2 * 128
    assert reverie(*asked, "--json", "--minus", "blue") == 0
    told = json.loads(capsys.readouterr().out)
    assert [len(query["results"]) for query in told["queries"]] == [3, 3]
    assert told["queries"][0]["minus"] == ["blue"]
    assert [it["path"] for it in told["left_out"]] == ["broken.png"]
    for result in told["queries"][0]["results"]:
        assert (folder / result["path"]).exists()
        assert (result["seconds"] is None) == (result["path"] != "clip.webp")


def test_scores_are_the_models_cosines_and_are_not_made_twice(clip, model, folder):
    assert score(folder, model=model, quiet=True)[:2] == (7, 0)
    index = Index.read(folder)
    item = next(item for item in index if item.file_name == "red.png")
    want = (clip.embed_image([folder / "red.png"]) @ clip.embed_text([c.text for c in item.captions]).T)[0]
    assert index.extra_of("red.png")["caption_scores_clip"] == pytest.approx(want.tolist(), abs=2e-3)
    assert item.scores["clip"] == pytest.approx(float(want.mean()), abs=2e-3)
    assert score(folder, model=model, quiet=True)[:2] == (0, 7)
    index.items = [
        dataclasses.replace(item, captions=(Caption(text="a green picture", source="me"),))
        if item.file_name == "red.png" else item for item in index
    ]  # fmt: skip
    index.write()
    assert score(folder, model=model, quiet=True)[:2] == (1, 6)
    assert len(Index.read(folder).extra_of("red.png")["caption_scores_clip"]) == 1
    assert len(Index.read(folder).extra_of("blue.png")["caption_scores_clip"]) == 2
    assert score(folder, model=model, name="zh", language="en", quiet=True)[:2] == (
        7,
        0,
    )  # a score of its own
    with pytest.raises(InputError, match="'zh'"):
        score(folder, model=model, language="zh", quiet=True)
    assert {i.file_name: i.scores for i in import_folder(folder, val=0.2, quiet=True)} == {
        i.file_name: i.scores for i in Index.read(folder)
    }


def test_with_an_index_too_everything_that_lies_there_is_found(clip, folder):
    """What came after the import, what was renamed, what has no caption; but nothing that is marked."""
    shutil.copy(folder / "red.png", folder / "new.png")
    (folder / "green.png").rename(folder / "renamed.png")
    (folder / "blue.txt").unlink()
    import_folder(folder, val=0.2, quiet=True)
    shutil.copy(folder / "red.png", folder / "newer.png")
    index = Index.read(folder)
    mark(index, "filter", {"white.png": "for no reason"})
    found, _ = search.open_folder(clip, folder, quiet=True)
    there = {
        "black.png",
        "blue.png",
        "clip.webp",
        "new.png",
        "newer.png",
        "red.png",
        "renamed.png",
        "yellow.png",
    }
    assert set(found.names) == there
    assert not found.bad


def test_dedupe_compares_by_any_system_that_embeds_pictures(folder, tmp_path):
    from reverie.systems.classifier import Classifier, ClassifierConfig

    torch.manual_seed(0)
    package.save(Classifier(ClassifierConfig(names=("a", "b"), size=32)), tmp_path / "judge")
    for end in ("png", "txt"):
        shutil.copy(folder / f"blue.{end}", folder / f"same.{end}")
    import_folder(folder, val=0, quiet=True)
    groups, bad = dedupe(folder, by="embedding", cosine=0.9999, model=tmp_path / "judge", quiet=True)
    assert not bad
    found = {copy.item.file_name: copy.original.file_name for group in groups for copy in group}
    assert found["same.png"] == "blue.png"


def test_dedupe_marks_copies_and_leaks_and_spares_the_rest(model, folder, tmp_path, capsys):
    with Image.open(folder / "red.png") as image:
        image.resize((30, 20)).save(folder / "smaller.png")
        image.save(folder / "squeezed.jpg", quality=60)
    shutil.copy(folder / "blue.png", folder / "z-copy.png")
    for name in ("smaller", "squeezed", "z-copy"):
        (folder / f"{name}.txt").write_text("a copy")
    index = import_folder(folder, val=0, quiet=True)
    splits = {"squeezed.jpg": "test"}
    index.items = [dataclasses.replace(i, split=splits.get(i.file_name, "train")) for i in index]
    index.write()
    sheet = tmp_path / "groups.png"
    assert reverie("data", "dedupe", folder, "--by", "hash", "--sheet", sheet) == 0
    out = capsys.readouterr().out
    marks = {item.file_name: item.reject for item in Index.read(folder) if item.marked}
    assert set(marks) == {"red.png", "smaller.png", "z-copy.png"}
    leak = "marked by dedupe: leak into training of split test, duplicate of squeezed.jpg ("
    assert marks["red.png"].startswith(leak)
    assert marks["z-copy.png"] == "marked by dedupe: duplicate of blue.png (0 of 64 bits differ)"
    assert "2 of these files were leaks" in out
    assert sheet.exists()
    dedupe(folder, by="both", model=model, quiet=True)
    both = {item.file_name: item.reject for item in Index.read(folder) if item.marked}
    assert set(both) == set(marks)
    assert "cosine 1.000" in both["z-copy.png"]
    assert reverie("data", "dedupe", folder, "--undo") == 0
    assert not any(item.marked for item in Index.read(folder))


def test_what_is_marked_reaches_no_batch(folder, tmp_path):
    names = {f"{colour}.png" for colour in COLOURS[:3]}
    index = Index.read(folder)
    index.items = [dataclasses.replace(item, split="train") for item in index]
    index.write()
    mark(Index.read(folder), "filter", dict.fromkeys(names, "a test"))
    seen: set[str] = set()
    for recipe, settings in ((clip_recipe.tiny, {"steps": 3, "batch": 3, "size": 16}), (sora.tiny, SORA)):
        seen = drawn(recipe, folder, tmp_path / recipe.__module__, settings)
        assert seen
        assert not seen & names


SORA = {"steps": 2, "batch": 3, "size": 16}


def drawn(recipe, folder: Path, out: Path, settings: dict) -> set[str]:
    """The files whose samples the recipe's batches named."""
    seen: set[str] = set()
    module = __import__(recipe.__module__, fromlist=["train"])
    train = module.train

    def watching(players, batches, **options):
        for step in range(3):
            seen.update(batches(step, 0)["ids"])
        yield from ()  # and nothing is trained

    module.train = watching
    try:
        recipe(folder, out, **settings)
    finally:
        module.train = train
    return seen


@pytest.mark.parametrize(
    "words",
    [
        ["search", "FOLDER", "--model", "MODEL"],
        ["search", "FOLDER", "red", " ", "--model", "MODEL"],
        ["search", "FOLDER", "red", "--top", "0", "--model", "MODEL"],
        ["search", "FOLDER", "red", "--split", "tset", "--model", "MODEL"],
        ["search", "FOLDER", "red", "--approximate", "--model", "MODEL"],
        ["data", "filter", "FOLDER", "--keep", "0.5"],
        ["data", "filter", "FOLDER"],
        ["data", "filter", "FOLDER", "--undo", "--keep", "0.5"],
        ["data", "dedupe", "FOLDER", "--by", "eye"],
        ["data", "dedupe", "FOLDER", "--by", "hash", "--distance", "40"],
        ["data", "score", "FOLDER", "--name", "a/b"],
        ["data", "score", "EMPTY"],
    ],
)
def test_mistakes_are_one_sentence(words, model, folder, tmp_path, capsys):
    places = {"FOLDER": folder, "MODEL": model, "EMPTY": tmp_path}
    before = (folder / FILE).read_bytes()
    assert reverie(*[places.get(word, word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1].startswith("reverie: ")
    assert (folder / FILE).read_bytes() == before
