"""The bootstrap whole and small: what it leaves in the index, that it goes on after a stop, and can be undone."""

import dataclasses

import pytest
from PIL import Image

from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.errors import InputError
from reverie.recipes import capfilt as recipe
from reverie.recipes.asked import CapFilt

SMALL = CapFilt(
    trusted=("mine/*",),
    steps=3,
    tune_steps=2,
    batch=4,
    size=16,
    patch=8,
    width=64,
    depth=2,
    queue=4,
    most=6,
    strength=0.0,
    judge="match",
)


@pytest.fixture
def folder(tmp_path):
    """Four pictures with words that somebody vouches for, four with words from nowhere."""
    place = tmp_path / "walls"
    for i in range(8):
        file = place / ("mine" if i < 4 else "web") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * i, 200 - 20 * i, 40)).save(file)
        file.with_suffix(".txt").write_text(f"wall number {i}" if i < 4 else "grüße, click 你好")
    import_folder(place, val=0, quiet=True)
    return place


def captions(folder):
    return {item.file_name: item.captions for item in Index.read(folder)}


def test_every_file_gets_a_verdict_the_trusted_stay_and_undo_restores(folder, tmp_path):
    before = captions(folder)
    counts = recipe.capfilt(folder, tmp_path / "run", SMALL)
    assert sum(counts.values()) == 4
    index = Index.read(folder)
    for item in index:
        record = index.extra_of(item.file_name).get("capfilt")
        if item.file_name.startswith("mine/"):
            assert record is None
            assert item.captions == before[item.file_name]
            continue
        fits = {one["text"]: one for one in record["captions"]}
        assert "grüße, click 你好" in fits
        assert {c.text for c in item.captions} == {text for text, one in fits.items() if one["kept"]}
        assert {c.text for c in item.dropped} == {text for text, one in fits.items() if not one["kept"]}
        assert all(one["kept"] == (one["fit"] >= 0.5) for one in fits.values())
    page = (tmp_path / "run" / "round-1" / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<article") == 4
    assert "grüße, click 你好" in page
    assert recipe.undo(folder) == 4
    assert {name: set(own) for name, own in captions(folder).items()} == {
        name: set(own) for name, own in before.items()
    }


def test_a_stop_between_stages_loses_nothing(folder, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "judged", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.capfilt(folder, tmp_path / "run", SMALL)
    assert all(not item.dropped for item in Index.read(folder))
    written = (tmp_path / "run" / "round-1" / "written.jsonl").read_bytes()
    recipe.capfilt(folder, tmp_path / "run", SMALL)
    assert (tmp_path / "run" / "round-1" / "written.jsonl").read_bytes() == written


def test_whom_to_trust_must_be_said_and_found(folder, tmp_path):
    with pytest.raises(InputError, match="Say whose captions"):
        recipe.capfilt(folder, tmp_path / "run", CapFilt())
    with pytest.raises(InputError, match="fits 0 captioned files"):
        recipe.capfilt(folder, tmp_path / "other", CapFilt(trusted=("nobody",)))


def test_the_filter_is_weighed_by_captions_it_did_not_learn_from(tmp_path):
    place = tmp_path / "walls"
    for i in range(24):
        file = place / ("mine" if i < 20 else "web") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * i, 240 - 10 * i, 40)).save(file)
        file.with_suffix(".txt").write_text(f"wall number {i}")
    import_folder(place, val=0, quiet=True)
    settings = dataclasses.replace(SMALL, judge="both")
    mine, others = recipe.parted(Index.read(place), settings.trusted)
    assert len(others) == 4
    assert sum(recipe.capfilt(place, tmp_path / "run", settings).values()) == 4
    scale = recipe.scale_of(tmp_path / "run" / "round-1", settings)
    assert scale.weights != (1.0, 0.0)
    back = recipe.kept_back(mine, settings)
    assert len(back) == 4
    assert back == recipe.kept_back(mine[::-1], settings)
    with pytest.raises(InputError, match="vouch for 20 or more"):
        recipe.kept_back(mine[:19], settings)
