from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from reverie.data.check import check
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.sheet import contact_sheet
from reverie.errors import InputError


@pytest.fixture
def folder(tmp_path, make, makers):
    for i in range(6):
        make(f"set/{i}.png", makers.data(makers.picture(i), "png"))
        make(f"set/{i}.txt", f"picture {i}".encode())
    make("set/copy.png", makers.data(makers.picture(3), "png"))
    make("set/copy.txt", "副本".encode())
    make("set/clip.webp", makers.clip("webp", 6, seed=10))
    make("set/clip.txt", b"a clip")
    make("set/bad.png", b"")
    import_folder(tmp_path / "set", quiet=True)
    return tmp_path / "set"


def test_the_report_counts_everything(folder):
    report = check(folder, quiet=True)
    assert (report.total, report.pictures, report.clips) == (9, 7, 1)
    assert report.rejected == (("bad.png", "the file is empty"),)
    assert report.lost == pytest.approx(1 / 9)
    assert report.copies == (("3.png", "copy.png"),)
    assert report.across == ()
    assert report.captions == {"en": 7, "zh": 1}
    assert sum(report.splits.values()) == 8
    text = str(report)
    assert "lost: 1 of 9 files (11.1%)" in text
    assert "  bad.png: the file is empty" in text
    assert "  3.png = copy.png" in text
    assert "warning" not in text


def test_files_that_went_or_changed_are_found(folder):
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes() + b"x")
    whole = bytearray((folder / "2.png").read_bytes())
    whole[-1] ^= 1
    (folder / "2.png").write_bytes(whole)
    assert [name for name, _ in check(folder, quiet=True).rejected] == ["0.png", "1.png", "bad.png"]
    report = dict(check(folder, contents=True, quiet=True).rejected)
    assert sorted(report) == ["0.png", "1.png", "2.png", "bad.png"]
    assert report["0.png"] == "gone since the import: import the folder again"
    assert report["2.png"] == "changed since the import: import the folder again"


def test_copies_on_both_sides_are_a_warning(folder):
    (folder / "train").mkdir()
    (folder / "val").mkdir()
    for split in ("train", "val"):
        (folder / split / "a.png").write_bytes((folder / "0.png").read_bytes())
        (folder / split / "a.txt").write_text("a")
    import_folder(folder, quiet=True)
    report = check(folder, quiet=True)
    assert len(report.across) == 1
    assert set(report.across[0]) >= {"train/a.png", "val/a.png"}
    assert "in more than one split" in str(report)


def test_a_folder_where_all_is_lost(folder):
    for path in folder.glob("*.*"):
        if path.suffix in (".png", ".webp"):
            path.unlink()
    with pytest.raises(
        InputError, match=r"saw 8 \.txt, 1 \.parquet; rejected: gone since the import.* \(8\)"
    ):
        check(folder, quiet=True)


def test_no_index(tmp_path):
    with pytest.raises(InputError, match="reverie data import"):
        check(tmp_path)


def test_the_contact_sheet_shows_pictures_clips_and_words(folder, tmp_path):
    path = contact_sheet(Index.read(folder), tmp_path / "sheets" / "sheet.png", size=64, columns=4)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] == 6 + 4 * (128 + 6)  # a clip is two pictures wide: its first and its middle frame
    coloured = (pixels.max(-1).astype(int) - pixels.min(-1)) > 30
    assert coloured.sum() > 8 * 64 * 48 * 0.5
    again = contact_sheet(Index.read(folder), tmp_path / "again.png", size=64, columns=4)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest()
    other = contact_sheet(Index.read(folder), tmp_path / "other.png", size=64, columns=4, seed=1)
    assert other.read_bytes() != path.read_bytes()


def test_the_contact_sheet_takes_what_is_asked_and_names_mistakes(folder, tmp_path):
    index = Index.read(folder)
    one = contact_sheet(index, tmp_path / "one.png", count=1)
    with Image.open(one) as sheet:
        assert sheet.height < 300
    (folder / "0.png").write_bytes(b"")  # went bad since: shown as such, not a crash
    contact_sheet(index, tmp_path / "all.png")
    with pytest.raises(InputError, match="cannot be drawn"):
        contact_sheet(index, tmp_path / "a.png", count=0)
    with pytest.raises(InputError, match="nothing to show"):
        contact_sheet(index.select(sources=["none"]), tmp_path / "a.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Cannot write"):
        contact_sheet(index, tmp_path / "file" / "a.png")
