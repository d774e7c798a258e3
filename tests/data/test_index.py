from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie.data.index import Caption, Index, Item
from reverie.errors import InputError

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
CAPTION = st.builds(Caption, text=TEXT, source=TEXT, language=st.sampled_from(["en", "zh"]))
ITEM = st.builds(
    Item,
    file_name=st.from_regex(r"[a-z\u4e00-\u4e10 ]{1,8}(/[a-z.]{1,8}x){0,2}", fullmatch=True),
    hash=st.just("ab" * 32),
    bytes=st.integers(0, 2**50),
    width=st.integers(0, 10**5),
    height=st.integers(0, 10**5),
    frames=st.integers(1, 2000),
    fps=st.floats(0, 1000),
    split=st.sampled_from(["train", "val", "test"]),
    captions=st.lists(CAPTION, max_size=3).map(tuple),
    label=st.none() | TEXT,
    source=st.none() | TEXT,
    licence=st.none() | TEXT,
    scores=st.dictionaries(st.sampled_from(["clip", "itm", "a b"]), st.floats(-10, 10), max_size=3),
    reject=st.none() | TEXT,
)


def item(name: str = "a.png", **changes) -> Item:
    return replace(Item(file_name=name, hash="0" * 64, bytes=1, width=2, height=3), **changes)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(ITEM, max_size=5, unique_by=lambda it: it.file_name))
def test_what_is_written_is_read(tmp_path, items):
    Index(tmp_path, items).write()
    assert Index.read(tmp_path).items == items


def test_other_tools_can_read_the_table(tmp_path):
    Index(
        tmp_path, [item(captions=(Caption(text="一个", source="s", language="zh"),), scores={"clip": 0.5})]
    ).write()
    row = pq.read_table(tmp_path / "metadata.parquet").to_pylist()[0]
    assert row["file_name"] == "a.png"
    assert row["captions"] == [{"text": "一个", "source": "s", "language": "zh"}]
    assert row["score_clip"] == 0.5
    assert not [path.name for path in tmp_path.iterdir() if path.name != "metadata.parquet"]


def test_columns_of_others_are_kept_with_their_types(tmp_path):
    path = Index(tmp_path, [item("a.png"), item("b.png")]).write()
    table = pq.read_table(path).append_column("colours", pa.array([[1, 2], None], pa.list_(pa.int8())))
    pq.write_table(table.append_column("score_text", pa.array(["x", "y"])), path)
    index = Index.read(tmp_path)
    assert index.extra_of("a.png") == {"colours": [1, 2], "score_text": "x"}
    index.items = [item("c.png"), *reversed(index.items)]
    index.write()
    again = pq.read_table(path)
    assert again.schema.field("colours").type == pa.list_(pa.int8())
    assert again.select(["file_name", "colours"]).to_pylist() == [
        {"file_name": "c.png", "colours": None},
        {"file_name": "b.png", "colours": None},
        {"file_name": "a.png", "colours": [1, 2]},
    ]


def test_select(tmp_path):
    items = [
        item("a", source="x"),
        item("b", split="val"),
        item("c", frames=9, source="x"),
        item("d", reject="why", source="x"),
    ]
    index = Index(tmp_path, items)

    def names(**conditions):
        return [it.file_name for it in index.select(**conditions)]

    assert names() == ["a", "b", "c"]
    assert names(accepted=None) == ["a", "b", "c", "d"]
    assert names(accepted=False) == ["d"]
    assert names(split="val") == ["b"]
    assert names(video=True) == ["c"]
    assert names(video=False, sources=["x"]) == ["a"]
    with pytest.raises(InputError, match="Unknown split 'validation'"):
        index.select(split="validation")
    assert str(index).endswith("2 pictures and 1 clips accepted (2 train, 1 val, 0 test), 1 rejected")


def test_a_selection_is_not_written_over_the_whole(tmp_path):
    index = Index(tmp_path, [item("a"), item("b", reject="why")])
    index.write()
    with pytest.raises(InputError, match="selection"):
        index.select().write()
    with pytest.raises(InputError, match="selection"):
        index.select().select().write()
    index.select(accepted=None).write()
    assert len(Index.read(tmp_path)) == 2


@pytest.mark.hostile
@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b", "..\\a.png", "", "a\x00b", None])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    path = Index(tmp_path, [item("a.png")]).write()
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "file_name", pa.array([name], pa.string())), path)
    with pytest.raises(InputError, match="not a relative path"):
        Index.read(tmp_path)


def test_no_index_a_strange_one_and_a_broken_one(tmp_path):
    with pytest.raises(InputError, match="reverie data import"):
        Index.read(tmp_path)
    pq.write_table(pa.table({"file_name": ["a.png"]}), tmp_path / "metadata.parquet")
    with pytest.raises(InputError, match="not written by Reverie"):
        Index.read(tmp_path)
    pq.write_table(
        pa.table({"file_name": ["a.png"]}).replace_schema_metadata({"reverie.index": "1"}),
        tmp_path / "metadata.parquet",
    )
    with pytest.raises(InputError, match="lacks the columns hash"):
        Index.read(tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(InputError, match="not a readable parquet"):
        Index.read(tmp_path)


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    Index(tmp_path, [item("a.png")]).write()

    def full(*_):
        raise OSError(28, "no space")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="no space"):
        Index(tmp_path, [item("b.png")]).write()
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.parquet"]
    assert Index.read(tmp_path)[0].file_name == "a.png"


def test_a_name_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'a.png' twice"):
        Index(tmp_path, [item("b.png"), item("a.png"), item("a.png")]).write()
