"""Marks: what is left out is a function of scores alone, is taken back, outlives an import, and costs no file."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from reverie.data.check import check
from reverie.data.importers import import_folder
from reverie.data.index import FILE, Index
from reverie.data.marks import keep, mark, undo
from reverie.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten captioned pictures with scores 0.0 to 0.9, the last two held out, and a broken file."""
    for i in range(10):
        Image.new("RGB", (8 + i, 8), (25 * i, 0, 90)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    index = import_folder(tmp_path, quiet=True)
    index.items = [
        dataclasses.replace(
            item,
            scores={"clip": int(Path(item.file_name).stem) / 10},
            split="val" if item.file_name[0] in "89" else "train",
        )
        if item.reject is None
        else item
        for item in index
    ]
    index.write()
    return tmp_path


def accepted(folder: Path) -> set[str]:
    return {Path(item.file_name).stem for item in Index.read(folder).select()}


def test_the_best_share_of_the_training_split_stays(folder):
    assert keep(folder, share=0.25) == (2, 6, 0)
    assert accepted(folder) == {"6", "7", "8", "9"}  # what is held out is left alone


def test_another_share_starts_from_the_unmarked_state_and_undo_restores_it(folder):
    before = (folder / FILE).read_bytes()
    keep(folder, share=0.25)
    keep(folder, share=0.75)
    assert accepted(folder) == {"2", "3", "4", "5", "6", "7", "8", "9"}
    assert keep(folder, above=0.4) == (4, 4, 0)
    assert accepted(folder) == {"4", "5", "6", "7", "8", "9"}
    assert undo(folder, "filter") == 4
    assert (folder / FILE).read_bytes() == before
    assert undo(folder, "filter") == 0


def test_one_splits_marks_are_left_alone_by_anothers(folder):
    keep(folder, share=0.25)
    assert keep(folder, share=0.5, split="val") == (1, 1, 0)
    assert accepted(folder) == {"6", "7", "9"}
    assert undo(folder, "filter") == 7


def test_no_score_is_above_what_is_no_number(folder):
    with pytest.raises(InputError, match="above is nan"):
        keep(folder, above=float("nan"))


def test_a_duplicate_of_what_has_become_another_picture_is_no_duplicate(folder):
    mark(Index.read(folder), "dedupe", {"3.png": "duplicate of 4.png (0 of 64 bits differ)"})
    import_folder(folder, quiet=True)
    assert "3" not in accepted(folder)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "4.png")
    import_folder(folder, quiet=True)
    assert {"3", "4"} <= accepted(folder)


def test_no_file_is_touched(folder):
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.[pt][nx][gt]")}
    keep(folder, share=0.1)
    undo(folder, "filter")
    assert files == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.[pt][nx][gt]")
    }
    assert len(files) == 21


def test_check_tells_marks_from_broken_files(folder):
    keep(folder, share=0.25)
    report = check(folder, quiet=True)
    assert [name for name, _ in report.rejected] == ["broken.png"]
    assert [name for name, _ in report.marked] == [f"{i}.png" for i in range(6)]
    assert report.lost == 1 / 11
    assert "marked, which --undo takes back: 6 by `reverie data filter`" in str(report)
    assert "6 marked" in str(Index.read(folder))
    (folder / "0.png").unlink()  # a marked file can be lost too
    assert ("0.png", "gone since the import: import the folder again") in check(folder, quiet=True).rejected


def test_importing_again_keeps_marks_and_forgets_none_silently(folder):
    keep(folder, share=0.25)
    (folder / "0.png").rename(folder / "moved.png")
    (folder / "0.txt").rename(folder / "moved.txt")
    index = import_folder(folder, quiet=True)
    marks = {item.file_name for item in index if item.marked == "filter"}
    assert marks == {"moved.png", *(f"{i}.png" for i in range(1, 6))}
    (folder / "1.png").write_bytes(
        (folder / "broken.png").read_bytes()
    )  # changed: a new file, and a broken one
    index = import_folder(folder, quiet=True)
    (one,) = (item for item in index if item.file_name == "1.png")
    assert one.reject is not None
    assert one.marked is None


def test_a_duplicate_comes_back_when_its_original_has_gone(folder):
    mark(Index.read(folder), "dedupe", {"3.png": "duplicate of 2.png (1 of 64 bits differ)"})
    assert "3" not in {Path(i.file_name).stem for i in import_folder(folder, quiet=True).select()}
    keep(folder, above=0.35)  # the original, marked, is there still
    assert "3" not in {Path(i.file_name).stem for i in import_folder(folder, quiet=True).select()}
    (folder / "2.png").unlink()
    assert "3" in {Path(i.file_name).stem for i in import_folder(folder, quiet=True).select()}


def test_one_command_leaves_the_marks_of_the_other(folder):
    mark(Index.read(folder), "dedupe", {"7.png": "duplicate of 6.png (0 of 64 bits differ)"})
    assert keep(folder, share=0.5) == (4, 3, 0)  # of the seven that are left
    assert accepted(folder) == {"3", "4", "5", "6", "8", "9"}
    undo(folder, "filter")
    assert accepted(folder) == {"0", "1", "2", "3", "4", "5", "6", "8", "9"}


@pytest.mark.parametrize(
    "asked",
    [{}, {"share": 0.5, "above": 0.1}, {"share": 0}, {"share": 1.5}, {"share": 0.5, "score": "taste"},
     {"share": 0.5, "split": "tset"}],
)  # fmt: skip
def test_mistakes_are_named_and_change_nothing(folder, asked):
    before = (folder / FILE).read_bytes()
    with pytest.raises(InputError):
        keep(folder, **asked)
    assert (folder / FILE).read_bytes() == before
