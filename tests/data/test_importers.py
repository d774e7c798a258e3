from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie.data.importers import import_folder
from reverie.data.index import Caption, Index
from reverie.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    path.mkdir()
    return path


@pytest.fixture
def add(make, makers):
    """Adds a small PNG (by seed) under a name in the folder, with a caption if one is given."""

    def put(name: str, seed: int = 0, caption: str | None = None) -> Path:
        path = make(f"set/{name}", makers.data(makers.picture(seed), "png"))
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return put


def run(folder: Path, **options) -> Index:
    return import_folder(folder, quiet=True, **options)


def texts(index: Index) -> dict[str, list[str]]:
    return {item.file_name: [caption.text for caption in item.captions] for item in index}


def reasons(index: Index) -> dict[str, str]:
    return {item.file_name: item.reject for item in index if item.reject is not None}


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "metadata.parquet" and "extracted" not in path.parts
    }


# --- the layouts ------------------------------------------------------------------------------------------------------


def test_sidecars(folder, add, make):
    add("a.png", 1, "a red rocket\n\n  the same in words \n")
    add("b.png", 2)
    make("set/b.caption", "\ufeff一个红色的火箭".encode())
    add("c.png", 3)
    make(
        "set/c.json",
        json.dumps(
            {"caption": "c", "tags": ["x", "y"], "caption_zh": "丙", "label": "sea", "score_q": 2}
        ).encode(),
    )
    add("deep/d.png", 4)
    make("set/deep/d.png.txt", "d".encode("utf-16"))
    add("e.png", 5)
    make("set/e.json", b'["one", "two"]')
    index = run(folder)
    assert texts(index) == {
        "a.png": ["a red rocket", "the same in words"],
        "b.png": ["一个红色的火箭"],
        "c.png": ["c", "x, y", "丙"],
        "deep/d.png": ["d"],
        "e.png": ["one", "two"],
    }
    assert reasons(index) == {}
    a, b, c = index[0], index[1], index[2]
    assert a.hash == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    assert (a.width, a.height, a.frames, a.bytes) == (24, 18, 1, (folder / "a.png").stat().st_size)
    assert b.captions == (Caption(text="一个红色的火箭", source="sidecar:caption", language="zh"),)
    assert c.captions[2] == Caption(text="丙", source="json:caption_zh", language="zh")
    assert (c.label, c.scores) == ("sea", {"q": 2.0})
    assert Index.read(folder).items == index.items


ROWS = [
    {"file_name": "a.png", "text": "a, \"thing\"\nand a line", "split": "validation", "licence": "CC0", "year": "1999"},
    {"file_name": "sub/b.png", "text": "\u2028 b", "split": "train", "licence": "MIT", "year": "2001"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables(tmp_path, folder, add, kind):
    add("a.png", 1)
    add("sub/b.png", 2)
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0].keys())
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        with pytest.raises(InputError, match="left alone"):  # its own table must not be overwritten
            run(folder)
    before = fingerprint(tmp_path)
    index = run(folder, out=tmp_path / "out") if kind == "parquet" else run(folder)
    prefix = "set/" if kind == "parquet" else ""
    assert texts(index) == {f"{prefix}a.png": [ROWS[0]["text"]], f"{prefix}sub/b.png": ["b"]}
    assert [item.split for item in index] == ["val", "train"]
    assert [item.licence for item in index] == ["CC0", "MIT"]
    assert index.extra_of(f"{prefix}a.png") == {"year": "1999"}
    assert fingerprint(tmp_path) | before == fingerprint(tmp_path)
    for item in Index.read(index.folder):
        assert Image.open(index.path(item)).size == (24, 18)


def test_a_table_in_a_sub_folder_and_lists_of_captions(folder, add):
    add("x/a.png", 1)
    add("b.png", 2)
    rows = [
        {
            "file_name": "a.png",
            "captions": [{"text": "one", "language": "fr"}, {"text": "two"}],
            "class": "ship",
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x" / "metadata.parquet")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "captions": ["three", "four"], "label": "old boat"}\n'
    )
    index = run(folder)
    assert texts(index) == {"b.png": ["three", "four"], "x/a.png": ["one", "two"]}
    assert [caption.language for caption in index[1].captions] == ["fr", "en"]
    assert [item.label for item in index] == ["old boat", "ship"]


def test_class_named_folders(folder, add):
    add("train/red_rocket/a.png", 1)
    add("train/红船/b.png", 2)
    add("val/red_rocket/c.png", 3)
    add("images/d.png", 4)  # a general name is no class
    add("mixed/e.png", 5, "has words")
    add("mixed/f.png", 6)
    index = run(folder)
    assert [
        (i.file_name, i.label, [c.text for c in i.captions], i.split) for i in index if i.reject is None
    ] == [
        ("mixed/e.png", None, ["has words"], index[1].split),
        ("train/red_rocket/a.png", "red_rocket", ["red rocket"], "train"),
        ("train/红船/b.png", "红船", ["红船"], "train"),
        ("val/red_rocket/c.png", "red_rocket", ["red rocket"], "val"),
    ]
    assert sorted(reasons(index)) == ["images/d.png", "mixed/f.png"]
    assert index[3].captions[0].language == "en"
    assert index[4].captions[0] == Caption(text="红船", source="class:folder", language="zh")


def pack(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_webdataset_tars(tmp_path, folder, makers, elsewhere):
    pictures = [makers.data(makers.picture(i), "png") for i in range(4)]
    pack(
        folder / "shard-000.tar",
        [
            ("0000.png", pictures[0]),
            ("0000.txt", b"zero"),
            ("0001.png", pictures[1]),
            ("0001.json", b'{"caption": "one"}'),
        ],
    )
    (folder / "b").mkdir()
    pack(
        folder / "b" / "shard-001.tar",
        [("0000.png", pictures[2]), ("0000.cls", b"7"), ("0000.txt", b"two"), ("0000.npy", b"?")],
    )
    before = fingerprint(folder)
    out = tmp_path / "out" if elsewhere else None
    index = run(folder, out=out)
    where = "set/" if elsewhere else ""
    assert texts(index) == {
        f"{where}b/shard-001.tar/0000.png": ["two"],
        f"{where}shard-000.tar/0000.png": ["zero"],
        f"{where}shard-000.tar/0001.png": ["one"],
    }
    assert index[0].label == "7"
    assert fingerprint(folder) == before
    again = Index.read(out or folder)
    assert [again.bytes_of(item) for item in again] == [pictures[i] for i in (2, 0, 1)]
    assert all((again.folder / item.shard).is_file() for item in again)
    assert not [*tmp_path.rglob("extracted")]
    assert run(folder, out=out).items == index.items


def test_a_tar_that_was_unpacked_before_stays_so(folder, makers):
    """Its names do not change, and nothing is there twice."""
    pictures = [makers.data(makers.picture(i), "png") for i in range(2)]
    pack(folder / "x.tar", [("0.png", pictures[0]), ("0.txt", b"zero"), ("1.png", pictures[1])])
    (folder / "extracted" / "x").mkdir(parents=True)
    (folder / "extracted" / "x" / "0.png").write_bytes(pictures[0])
    index = run(folder, need_captions=False)
    assert [(item.file_name, item.shard) for item in index] == [
        ("extracted/x/0.png", None),
        ("extracted/x/1.png", None),
    ]


def test_a_folder_of_tars_names_their_split(folder, makers):
    for i, name in enumerate(("train", "val")):
        (folder / name).mkdir()
        pack(folder / name / "0.tar", [("0.png", makers.data(makers.picture(i), "png")), ("0.txt", b"w")])
    assert [(item.file_name, item.split) for item in run(folder)] == [
        ("train/0.tar/0.png", "train"),
        ("val/0.tar/0.png", "val"),
    ]


def test_class_folders_within_a_tar(folder, makers):
    pack(
        folder / "a.tar",
        [
            ("cat/0.png", makers.data(makers.picture(), "png")),
            ("1.png", makers.data(makers.picture(1), "png")),
        ],
    )
    index = run(folder)
    assert [(item.file_name, item.label) for item in index] == [
        ("a.tar/1.png", None),
        ("a.tar/cat/0.png", "cat"),
    ]
    assert index[0].reject.startswith("no caption")  # the name of the shard is no class


@pytest.mark.parametrize("name", ["shard.tar.gz", "shard.TGZ", "shard.tar"])
def test_gzipped_tars(folder, makers, name):
    pictures = [makers.data(makers.picture(i), "png") for i in range(2)]
    members = [
        ("0.png", pictures[0]),
        ("0.txt", b"zero"),
        ("1.png", pictures[1]),
        ("1.txt", b"one"),
        ("1.npy", b"?"),
    ]
    pack(folder / name, members, "w:gz")
    index = run(folder)
    assert [(Path(item.file_name).name, item.reject) for item in index] == [("0.png", None), ("1.png", None)]
    assert [*texts(index).values()] == [["zero"], ["one"]]
    again = run(folder)
    assert [item.file_name for item in again] == [item.file_name for item in index]


@pytest.mark.hostile
def test_a_gzipped_tar_cannot_fill_the_disk(folder, add, makers):
    add("a.png", 1, "a")
    small = makers.data(makers.picture(), "png")
    pack(folder / "bomb.tar.gz", [("0.png", small), ("1.png", bytes(20_000_000)), ("2.png", small)], "w:gz")
    assert (folder / "bomb.tar.gz").stat().st_size < 50_000
    assert "more than 50 times its size" in reasons(run(folder))["bomb.tar.gz"]
    unpacked = [path for path in (folder / "extracted").rglob("*") if path.is_file()]
    assert [path.name for path in unpacked] == ["0.png"]
    whole = (folder / "bomb.tar.gz").read_bytes()
    for cut in (1, 30, len(whole) // 2):
        (folder / "bomb.tar.gz").write_bytes(whole[:cut])
        assert "bomb.tar.gz" in reasons(run(folder))


def test_other_tars_and_links_that_lead_nowhere_are_listed(folder, add, makers):
    add("a.png", 1, "a")
    pack(folder / "shard.tar.xz", [("0.png", makers.data(makers.picture(2), "png"))], "w:xz")
    for name in ("gone.png", "gone.tar", "folder"):
        (folder / name).symlink_to(folder / "nothing" / name)
    (folder / "linked.png").symlink_to(folder / "a.png")
    (folder / "linked.txt").write_text("a")
    index = run(folder)
    assert reasons(index) == {
        "folder": "a link that leads nowhere",
        "gone.png": "a link that leads nowhere",
        "gone.tar": "a link that leads nowhere",
        "shard.tar.xz": "not unpacked: unpack it, or pack it as .tar or .tar.gz",
    }
    assert texts(index)["linked.png"] == ["a"]


@pytest.mark.hostile
def test_a_hostile_tar_writes_nothing_outside(tmp_path, folder, makers):
    content = makers.data(makers.picture(), "png")
    path = folder / "evil.tar"
    with tarfile.open(path, "w") as archive:
        for name in (
            "../../canary.png",
            "/tmp/canary-of-reverie.png",
            "a/../../../canary.png",
            "..\\canary.png",
            "C:/canary.png",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.FIFOTYPE, "fifo.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("good.png", "good.txt", "good.png"):
            body = content if name.endswith("png") else b"words"
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        info = tarfile.TarInfo("long.txt")
        info.size = 2**20 + 1
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    index = run(folder)
    assert [item.file_name for item in index if item.reject is None] == ["evil.tar/good.png"]
    assert reasons(index)["evil.tar"].startswith("10 of its members not taken: '../../canary.png' leads out")
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert written == [
        "set/evil.tar",
        "set/metadata.parquet",
    ]
    assert not Path("/tmp/canary-of-reverie.png").exists()


@pytest.mark.hostile
@pytest.mark.parametrize("damage", ["cut", "bzip2", "rubbish", "empty"])
def test_a_damaged_tar_is_listed(folder, add, makers, damage):
    add("a.png", 1, "a")
    path = folder / "x.tar"
    members = [("0.png", makers.data(makers.picture(5), "png")), ("0.txt", b"w")]
    pack(path, members, "w:bz2" if damage == "bzip2" else "w")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "rubbish":
        path.write_bytes(b"rubbish" * 1000)
    elif damage == "empty":
        path.write_bytes(b"")
    index = run(folder)
    assert "damaged, compressed in a way not known, or cut short" in reasons(index)["x.tar"]
    assert index[0].file_name == "a.png"
    assert index[0].reject is None


# --- dirty data (R7) --------------------------------------------------------------------------------------------------


def dirty(folder: Path, make, makers) -> dict[str, str]:
    """Fills a folder with one of each bad kind; the reason of each, in part."""
    png = makers.data(makers.picture(90, 64, 64), "png")
    noise = makers.data(Image.effect_noise((80, 80), 90), "jpeg")

    def put(name: str, content: bytes, caption: bytes | None = b"words") -> None:
        path = make(f"{folder.name}/{name}", content)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)

    for i in range(12):
        put(f"good-{i:02}.png", makers.data(makers.picture(i), "png"))
    exif = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    sixteen = folder / "fine-16-bit.png"
    put(sixteen.name, b"")
    Image.linear_gradient("L").convert("I;16").save(sixteen)
    put("fine-cmyk.jpg", makers.data(makers.picture(20, mode="CMYK"), "jpeg"))
    put("fine-bad-exif.jpg", makers.data(makers.picture(21), "jpeg", exif=exif))
    put("fine-jpeg-named.png", makers.data(makers.picture(22), "jpeg"))
    put("fine-no-extension", makers.data(makers.picture(23), "webp"))
    put("fine-animated.webp", makers.clip("webp", 4, seed=30))
    put("truncated.jpg", noise[: len(noise) // 2])
    put("truncated.png", png[: len(png) // 2])
    put("truncated.gif", makers.clip("gif", 4, seed=40)[:-300])
    put("zero.png", b"")
    put("text.png", b"this is no picture")
    put("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    put("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    put("archive.png", b"PK\x03\x04" + bytes(60))
    put("bomb.png", makers.png(100_000, 100_000))
    put("frames.gif", makers.gif_bomb(3000))
    put("latin.png", makers.data(makers.picture(50), "png"), "caf\u00e9".encode("latin-1"))
    put("blank.png", makers.data(makers.picture(51), "png"), b" \n")
    put("bad-json.png", makers.data(makers.picture(52), "png"), None)
    make(f"{folder.name}/bad-json.json", b'{"caption": ')
    put("half.png", makers.data(makers.picture(53), "png"), None)
    make(f"{folder.name}/half.json", b'{"caption": "\\ud83d"}')
    put("missing.png", makers.data(makers.picture(54), "png"), None)
    make(f"{folder.name}/README.md", b"not media, and no matter")
    make(f"{folder.name}/.hidden.png", b"")
    return {
        "archive.png": "a zip archive", "bad-json.png": "bad-json.json is not valid JSON",
        "blank.png": "blank.txt is empty",
        "bomb.png": "100000 x 100000 pixels are more than the limit", "drawing.png": "an SVG drawing",
        "drawing.svg": "an SVG drawing", "frames.gif": "more than the limit of 2,000", "half.png": "not valid JSON",
        "latin.png": "latin.txt is not UTF-8", "missing.png": "no caption", "text.png": "it is text",
        "truncated.gif": "cut short", "truncated.jpg": "cut short", "truncated.png": "cut short",
        "zero.png": "the file is empty",
    }  # fmt: skip


def test_dirty_data_is_listed_exactly(folder, make, makers):
    expected = dirty(folder, make, makers)
    before = fingerprint(folder)
    index = run(folder)
    found = reasons(index)
    assert sorted(found) == sorted(expected)
    for name, words in expected.items():
        assert words in found[name], (name, found[name])
        assert str(folder) not in found[name]
    assert len(index) - len(found) == 18
    assert fingerprint(folder) == before
    from reverie.data.check import check

    report = check(folder, quiet=True)
    assert dict(report.rejected) == found
    assert "lost: 15 of 33 files (45.5%)" in str(report)
    for name, reason in found.items():
        assert f"  {name}: {reason}" in str(report).splitlines()


def test_damage_behind_a_sound_header_is_found_only_by_decoding(folder, add, make, makers):
    add("a.png", 1, "a")
    content = makers.data(Image.effect_noise((80, 80), 90), "jpeg")
    make("set/b.jpg", content[: len(content) // 2])
    make("set/b.txt", b"b")
    assert reasons(run(folder, verify=False)) == {}
    assert list(reasons(run(folder))) == ["b.jpg"]


def test_uncaptioned_files_are_taken_when_asked(folder, add):
    add("a.png", 1)
    add("b.png", 2, "b")
    assert list(reasons(run(folder))) == ["a.png"]
    assert reasons(run(folder, need_captions=False)) == {}


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16 there")
def test_a_name_that_is_not_utf8_is_listed(folder, add, makers):
    add("a.png", 1, "a")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(makers.data(makers.picture(), "png"))
    assert reasons(run(folder)) == {"caf\\xe9.png": "its name is not UTF-8: rename it"}


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("name", "content", "listed", "reason"),
    [
        ("metadata.jsonl", b'{"file_name": "../../etc/passwd", "text": "x"}\n', "metadata.jsonl", "outside the folder"),
        ("metadata.jsonl", b'{"file_name": "/etc/passwd", "text": "x"}\n', "metadata.jsonl", "outside the folder"),
        ("metadata.jsonl", b'{"file_name": "gone.png", "text": "x"}\n', "gone.png", "no such picture or clip"),
        ("metadata.jsonl", b'{"file_name": "a.png"\n', "metadata.jsonl", "not valid JSON in line 1"),
        ("metadata.jsonl", b"[" * 5000 + b"\n", "metadata.jsonl", "not valid JSON in line 1"),
        ("metadata.jsonl", b"3\n", "metadata.jsonl", "no object in line 1"),
        ("metadata.jsonl", b'{"image": "a.png"}\n', "metadata.jsonl", "no file_name in row 1"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "caf\xe9"}\n', "metadata.jsonl", "not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png", "score_x": "high"}\n', "a.png", "not a number"),
        ("metadata.jsonl", b'{"file_name": "a.png", "score_x": 1' + b"0" * 400 + b"}\n", "a.png", "not a number"),
        ("metadata.jsonl", b'{"file_name": "a.png", "split": "dark"}\n', "a.png", "unknown split 'dark'"),
        ("metadata.csv", b'file_name,text\na.png,"open', "metadata.csv", "not valid CSV"),
        ("metadata.csv", b"name,text\na.png,b\n", "metadata.csv", "columns are name, text"),
        ("metadata.csv", b"file_name,text\na.png,b\x00c\n", "metadata.csv", "not text"),
        ("sub/metadata.parquet", b"PAR1", "sub/metadata.parquet", "not a readable parquet"),
    ],
)  # fmt: skip
def test_a_bad_table_is_listed(folder, add, make, name, content, listed, reason):
    add("a.png", 1, "a")
    add("b.png", 2, "b")
    make(f"set/{name}", content)
    index = run(folder)
    found = reasons(index)
    assert list(found) == [listed]
    assert reason in found[listed]


def test_tables_that_disagree_about_a_column(folder, add):
    for i, name in enumerate("abc"):
        add(f"{name}/{name}.png", i, name)
    for name, value in zip("abc", ["7", '"seven"', "1" + "0" * 30], strict=True):
        (folder / name / "metadata.jsonl").write_text(f'{{"file_name": "{name}.png", "rank": {value}}}\n')
    run(folder)
    index = Index.read(folder)
    assert [index.extra_of(item.file_name)["rank"] for item in index] == ["7", "seven", "1" + "0" * 30]


KEYS = st.sampled_from(["text", "tags", "split", "score_a", "x", "captions"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.hostile
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=JSON,
    row=st.dictionaries(
        st.sampled_from(["text", "tags", "hash", "extra", "score_a", "label"]), JSON, max_size=4
    ),
)
def test_any_json_beside_a_picture_is_words_or_a_reason(folder, add, value, row):
    add("a.png", 1, "a")
    add("b.png", 2, "b")
    (folder / "a.json").write_text(json.dumps(value))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"} | row) + "\n")
    index = run(folder, verify=False, workers=1)
    assert [item.file_name for item in index] == ["a.png", "b.png"]
    assert Index.read(folder).items[1].reject is None


# --- splits, copies, imports over imports -----------------------------------------------------------------------------


def test_the_split_depends_on_content_alone(tmp_path, folder, add):
    for i in range(60):
        add(f"{i}.png", i, "words")
    add("copy/of-7.png", 7, "words")
    splits = {item.hash: item.split for item in run(folder, val=0.3)}
    index = Index.read(folder)
    assert 5 <= sum(item.split == "val" for item in index) <= 35
    assert index.items == sorted(index.items, key=lambda item: item.file_name)
    by_name = {item.file_name: item for item in index}
    assert by_name["copy/of-7.png"].split == by_name["7.png"].split
    other = tmp_path / "other"
    for i in range(0, 60, 2):
        (other / "x").mkdir(parents=True, exist_ok=True)
        (other / "x" / f"renamed {i}.png").write_bytes((folder / f"{i}.png").read_bytes())
    assert all(item.split == splits[item.hash] for item in run(other, val=0.3))


def test_a_small_folder_has_something_held_out(folder, add):
    for i in range(4):
        add(f"{i}.png", i, "words")
    first = run(folder, val=0.001)
    assert [item.split for item in first].count("val") == 1
    add("more.png", 9, "words")
    assert {i.hash: i.split for i in run(folder, val=0.001)} | {i.hash: i.split for i in first} == {
        i.hash: i.split for i in Index.read(folder)
    }
    assert [item.split for item in run(folder, val=0)].count("val") == 1  # what is held out stays so


def test_an_import_over_an_import_keeps_what_others_added(folder, add):
    add("a.png", 1, "a")
    add("b.png", 2, "b")
    add("c.png", 3, "c")
    path = folder / "metadata.parquet"
    index = run(folder, source="mine", licence="CC0")
    made = Caption(text="a machine's words", source="blip")
    index.items[0] = replace(
        index[0], scores={"clip": 0.25}, captions=(*index[0].captions, made), split="test"
    )
    index.write()
    table = pq.read_table(path)
    pq.write_table(
        table.append_column("vector", pa.array([[1.0], [2.0], None], pa.list_(pa.float32()))), path
    )
    (folder / "a.png").rename(folder / "z.png")
    (folder / "a.txt").rename(folder / "z.txt")
    (folder / "z.txt").write_text("new words")
    (folder / "c.png").unlink()
    (folder / "c.txt").unlink()
    again = run(folder)
    assert [item.file_name for item in again] == ["b.png", "z.png"]
    z = again[1]
    assert z.scores == {"clip": 0.25}
    assert [c.text for c in z.captions] == ["new words", "a machine's words"]
    assert (z.split, z.source, z.licence) == ("test", "mine", "CC0")
    read = pq.read_table(path)
    assert read.schema.field("vector").type == pa.list_(pa.float32())
    assert read["vector"].to_pylist() == [[2.0], [1.0]]


def test_the_result_does_not_depend_on_the_number_of_threads(folder, add):
    for i in range(12):
        add(f"{i}.png", i, "words")
    assert run(folder, workers=1).items == run(folder, workers=7).items


# --- where, and mistakes ----------------------------------------------------------------------------------------------


def test_out_leaves_the_folder_alone(tmp_path, folder, add):
    add("a.png", 1, "a")
    add("train/b.png", 2, "b")
    before = sorted(tmp_path.rglob("*"))
    index = run(folder, out=folder / "index")  # even below itself
    assert [item.file_name for item in index] == ["set/a.png", "set/train/b.png"]
    assert index[1].split == "train"
    assert all(Image.open(index.path(item)).size == (24, 18) for item in Index.read(folder / "index"))
    assert run(folder, out=folder / "index").items == index.items
    assert sorted(path for path in tmp_path.rglob("*") if "index" not in path.parts) == before
    (tmp_path / "taken" / "set").mkdir(parents=True)
    with pytest.raises(InputError, match="in the way"):
        run(folder, out=tmp_path / "taken")


def test_the_index_of_other_files_is_left_alone(tmp_path, folder, add):
    add("a.png", 1, "a")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    items = run(other).items
    with pytest.raises(InputError, match="lists other files"):
        run(folder, out=other)
    assert Index.read(other).items == items


def test_the_only_picture_is_there_to_train_on(folder, add):
    add("a.png", 1, "a")
    assert [item.split for item in run(folder, val=0.999)] == ["train"]


def test_a_folder_without_usable_media_says_what_it_saw(folder, make):
    with pytest.raises(InputError, match=r"No usable picture or clip in .*saw no file at all"):
        run(folder)
    for name in ("a.doc", "b.doc", "c.MP3", "LICENCE"):
        make(f"set/{name}", b"words")
    with pytest.raises(
        InputError, match=r"looked for \.png .*\.mp4.* and saw 2 \.doc, 1 \.mp3, 1 no extension\."
    ):
        run(folder)
    assert not (folder / "metadata.parquet").exists()
    make("set/d.png", b"")
    with pytest.raises(InputError, match=r"1 \.png, 1 no extension; rejected: the file is empty \(1\)"):
        run(folder)
    assert reasons(Index.read(folder)) == {"d.png": "the file is empty"}


def test_mistakes_are_named(tmp_path, folder, add):
    add("a.png", 1, "a")
    with pytest.raises(InputError, match="is not a folder"):
        run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="val must be"):
        run(folder, val=1.5)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Cannot write into"):
        run(folder, out=tmp_path / "file")


def test_progress_is_plain_lines_where_there_is_no_terminal(folder, add, capsys, monkeypatch):
    monkeypatch.setattr("reverie.progress.EVERY", 0)
    add("a.png", 1, "a")
    import_folder(folder)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["reading 1/1 · 0 s left"]
