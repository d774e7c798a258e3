from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from reverie.data import pixels as module
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.media import decode
from reverie.data.pixels import Native, Pixels
from reverie.data.streaming import Streamed
from reverie.errors import InputError
from reverie.media import whole_patches


@pytest.fixture
def index(tmp_path, make, makers) -> Index:
    for i in range(10):
        make(f"set/{i}.png", makers.data(makers.picture(i, 20 + i, 30 - i), "png"))
    make("set/x.webp", makers.clip("webp", 9, seed=20))
    make("set/y.gif", makers.clip("gif", 2, seed=30))
    return import_folder(tmp_path / "set", need_captions=False, quiet=True).select()


def make_pixels(index: Index, **options) -> Pixels:
    return Pixels(index, **({"size": 16, "frames": 4, "quiet": True} | options))


def forbid(monkeypatch):
    def decoded(*_, **__):
        raise AssertionError("decoded again")

    monkeypatch.setattr(module, "decode_array", decoded)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_each_item_is_what_decode_gives(index, tmp_path, fit):
    pixels = make_pixels(index, fit=fit, cache=tmp_path / "cache")
    assert len(pixels) == 12
    assert pixels.good == list(range(12))
    assert pixels.bad == []
    assert pixels.counts == [1] * 10 + [4, 2]
    for i, item in enumerate(index):
        assert pixels[i].dtype == torch.uint8
        assert pixels[i].equal(decode(index.path(item), size=16, frames=4, fit=fit))
    with pytest.raises(IndexError):
        pixels[12]
    pixels[0].zero_()  # a copy: the cache is not the caller's
    assert pixels[0].any()


def test_sizes_need_not_be_square(index):
    assert make_pixels(index, size=(8, 12))[10].shape == (4, 4, 8, 12)


def test_the_cache_is_used(index, tmp_path, monkeypatch):
    first = make_pixels(index, cache=tmp_path / "cache")
    forbid(monkeypatch)
    again = make_pixels(index, cache=tmp_path / "cache")
    assert all(first[i].equal(again[i]) for i in first.good)
    with pytest.raises(AssertionError):
        make_pixels(index, cache=tmp_path / "cache", size=8)
    with pytest.raises(AssertionError):
        make_pixels(index, cache=tmp_path / "cache", frames=3)
    with pytest.raises(AssertionError):
        make_pixels(index.select(video=False), cache=tmp_path / "cache")


@pytest.mark.chaos
@pytest.mark.parametrize("damage", ["cut", "flip", "record", "empty", "longer", "mark"])
def test_a_damaged_cache_is_made_again(index, tmp_path, damage):
    pixels = make_pixels(index, cache=tmp_path / "cache")
    first = [pixels[i] for i in range(12)]
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[100] ^= 1
    elif damage == "record":
        content[-30] ^= 1
    elif damage == "empty":
        content = bytearray()
    elif damage == "longer":
        content = bytearray(4096) + content
    else:
        content[-16:-8] = b"\xff" * 8
    path.write_bytes(content)
    again = make_pixels(index, cache=tmp_path / "cache")
    assert all(first[i].equal(again[i]) for i in range(12))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.name]


@pytest.mark.chaos
def test_an_interrupted_write_leaves_nothing(index, tmp_path, monkeypatch):
    true_decode, calls = module.decode_array, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return true_decode(*args, **options)

    monkeypatch.setattr(module, "decode_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pixels(index, cache=tmp_path / "cache", workers=1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_number_of_threads_does_not_matter(index, tmp_path):
    caches = []
    for workers in (1, 5):
        folder = tmp_path / f"cache-{workers}"
        make_pixels(index, cache=folder, workers=workers)
        (path,) = folder.iterdir()
        caches.append(path.read_bytes())
    assert caches[0] == caches[1]


def test_bad_files_are_listed_and_left_out(index, tmp_path):
    (index.folder / "3.png").write_bytes(b"")
    (index.folder / "5.png").write_bytes((index.folder / "6.png").read_bytes())
    pixels = make_pixels(index, cache=tmp_path / "cache")
    assert pixels.good == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
    assert [bad.path for bad in pixels.bad] == ["3.png", "5.png"]
    assert pixels.bad[0].reason == "the file is empty"
    assert "changed since the import" in pixels.bad[1].reason
    with pytest.raises(InputError, match=r"3\.png has no pixels \(the file is empty\)"):
        pixels[3]
    again = make_pixels(index, cache=tmp_path / "cache")
    assert (again.good, again.bad) == (pixels.good, pixels.bad)
    assert all(again[i].equal(decode(index.path(index[i]), size=16, frames=4, fit="pad")) for i in again.good)


def test_too_many_bad_files_stop_with_their_reasons(index):
    for i in range(7):
        (index.folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"of 12 files .* more than the 20% allowed: the file is empty \(3, such as 0\.png\)"
    ):
        make_pixels(index, workers=1)
    assert make_pixels(index, max_bad=0.6).good == [7, 8, 9, 10, 11]
    (index.folder / "7.png").write_bytes(b"")
    with pytest.raises(InputError, match="60% allowed"):
        make_pixels(index, max_bad=0.6)


def test_the_budget_holds_for_a_cache_as_well(index, tmp_path):
    for i in range(4):
        (index.folder / f"{i}.png").write_bytes(b"")
    make_pixels(index, cache=tmp_path / "cache", max_bad=0.5)
    with pytest.raises(InputError, match="20% allowed"):
        make_pixels(index, cache=tmp_path / "cache")


def test_nothing_left_is_an_error_whatever_the_budget(index):
    for item in index:
        index.path(item).write_bytes(b"")
    with pytest.raises(InputError, match="cannot be decoded"):
        make_pixels(index, max_bad=1.0)
    with pytest.raises(InputError, match="nothing to decode"):
        make_pixels(Index(index.folder, []))


def test_rejected_items_are_not_decoded(index):
    index.items[2] = replace(index[2], reject="blurred")
    pixels = make_pixels(index)
    assert pixels.bad == [("2.png", "blurred")]
    assert 2 not in pixels.good


def test_a_folder_that_cannot_hold_the_cache(index, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Cannot write the pixel cache"):
        make_pixels(index, cache=tmp_path / "file")


def test_the_data_lies_in_a_mapping_and_not_in_memory(index, tmp_path):
    pixels = make_pixels(index, cache=tmp_path / "cache")
    assert isinstance(pixels._data, np.memmap)
    assert not pixels._data.flags.writeable


def test_native_sizes_keep_each_items_aspect(index, tmp_path, monkeypatch):
    native = Native(patch=4, area=20 * 24)
    pixels = make_pixels(index, size=native, fit="squash", cache=tmp_path / "cache")
    for i, item in enumerate(index):
        size = whole_patches(item.height, item.width, patch=4, area=20 * 24)
        assert pixels.shape(i) == (min(item.frames, 4), *size)
        assert pixels[i].shape == (min(item.frames, 4), 4, *size)
        assert pixels[i].equal(decode(index.path(item), size=size, frames=4, fit="squash"))
    assert len({pixels.sizes[i] for i in pixels.good}) > 2
    streamed = Streamed(index, size=native, frames=4, fit="squash")
    assert all(streamed[i].equal(pixels[i]) and streamed.shape(i) == pixels.shape(i) for i in pixels.good)
    other = make_pixels(index, size=Native(patch=4, area=200), fit="squash", cache=tmp_path / "cache")
    assert max(h * w for h, w in other.sizes) <= 200
    forbid(monkeypatch)
    again = make_pixels(index, size=native, fit="squash", cache=tmp_path / "cache")
    assert all(again[i].equal(pixels[i]) for i in pixels.good)


def test_a_bad_file_has_no_native_pixels_and_the_others_keep_theirs(index, tmp_path):
    path = index.path(index[3])
    path.write_bytes(path.read_bytes()[:60])
    native = Native(patch=8, area=640)
    pixels = make_pixels(index, size=native, fit="squash", cache=tmp_path / "cache")
    assert [bad.path for bad in pixels.bad] == [index[3].file_name]
    assert pixels.shape(3)[0] == 0
    for i in pixels.good:
        assert pixels[i].equal(decode(index.path(index[i]), size=pixels.sizes[i], frames=4, fit="squash"))
