"""The numbers of a dataset, against some that are counted by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from reverie.data.index import Caption, Dropped, Index, Item, synthetic
from reverie.data.report import contents_of, length, reasons, spread
from reverie.errors import InputError


def item(name: str, *captions: str | Caption, **more) -> Item:
    said = tuple(c if isinstance(c, Caption) else Caption(text=c, source="sidecar:txt") for c in captions)
    return Item(
        **{"file_name": name, "hash": name, "bytes": 100, "width": 64, "height": 32} | more, captions=said
    )


def of(tmp_path, *items: Item):
    return contents_of(Index(tmp_path, list(items)))


@pytest.fixture
def contents(tmp_path):
    chinese = Caption(text="一只 红猫", source="alias", language="zh-Hant")
    written = Caption(text="a dog\non a sofa", source=synthetic("long", "blip"))
    tags = Caption(text="dog, sofa", source=synthetic("tags", "blip"))
    lost = Dropped(
        text="spam", source="x", reason="marked by capfilt: matches with probability 0.104, below 0.5"
    )
    return of(
        tmp_path,
        item("a.png", "a red cat", chinese, label="cat", source="web", licence="MIT", scores={"clip": 0.5}),
        item("b.png", "a red cat", width=128, hash="a.png", split="val", label="cat", scores={"clip": math.nan}),
        item("c.png", written, tags, height=64, dropped=(lost, replace(lost, reason=lost.reason.replace("104", "2")))),
        item("d.webp", frames=12, fps=6.0, bytes=900),
        item("e.webp", frames=12, fps=0.0, hash="d.webp"),
        item("f.png", "x", reject="the file is empty", width=0, height=0),
        item("g.png", "x", reject="1,500 bytes are more than the limit of 10"),
        item("h.png", "x", reject="20 bytes are more than the limit of 10"),
        item("i.png", "x", reject="marked by dedupe: leak into training of split val, duplicate of b.png (0 bits)"),
        item("j.png", "x", reject="marked by filter: score_clip 0.1 is below 0.2"),
    )  # fmt: skip


def test_files_are_counted_by_what_became_of_them(contents):
    assert (contents.total, contents.accepted, contents.left_out, contents.set_aside) == (10, 5, 3, 2)
    assert (contents.pictures, contents.clips, contents.bytes) == (3, 2, 1300)
    assert contents.splits == (("train", 4), ("val", 1))
    assert [(one.reason, [name for name, _ in one.files]) for one in contents.rejected] == [
        ("… bytes are more than the limit of …", ["g.png", "h.png"]),
        ("the file is empty", ["f.png"]),
    ]
    assert [one.reason for one in contents.marked] == ["marked by dedupe", "marked by filter"]
    assert contents.marked[1].files == (("j.png", "score_clip 0.1 is below 0.2"),)
    assert (contents.duplicates, contents.leaks) == (1, 1)
    assert contents.copies == (("a.png", "b.png"), ("d.webp", "e.webp"))
    assert contents.across == (("a.png", "b.png"),)


def test_sizes_and_lengths_are_those_of_accepted_files(contents):
    assert contents.sizes["width"].bars == ((64, 64, 4), (128, 128, 1))
    assert contents.shapes == (("64 x 32", 3), ("128 x 32", 1), ("64 x 64", 1))
    assert (contents.sizes["aspect"].least, contents.sizes["aspect"].most) == (1.0, 4.0)
    assert contents.clip_lengths["frames"].count == 2
    assert contents.clip_lengths["seconds"].bars == ((2.0, 2.0, 1),)  # the other has no frame rate


def test_captions_are_counted_by_language_source_and_kind(contents):
    assert (contents.captions, contents.distinct, contents.without_captions) == (5, 4, 2)
    languages = {one.name: one for one in contents.languages}
    assert languages["en"].words.bars == ((2, 2, 1), (3, 3, 2), (4, 4, 0), (5, 5, 1))
    assert languages["en"].characters is None
    assert languages["zh-Hant"].words is None
    assert languages["zh-Hant"].characters.most == 4  # the space is none
    assert {one.name: (one.captions, one.files) for one in contents.kinds} == {
        "people's": (3, 2),
        "synthetic, long": (1, 1),
        "synthetic, tags": (1, 1),
    }
    assert contents.sources_of_captions[0].name == "sidecar:txt"
    assert [(one.reason, len(one.files)) for one in contents.dropped] == [
        ("marked by capfilt: matches with probability …, below …", 2)
    ]
    assert contents.dropped[0].files[0] == ("c.png", "spam")


def test_the_commonest_words_are_those_of_most_files(contents):
    assert dict(contents.words["en"]) == {"cat": 2, "red": 2, "dog": 1, "sofa": 1}
    assert dict(contents.words["zh-Hant"]) == {"一只": 1, "红猫": 1}
    assert contents.repeated == (("a red cat", 2),)


def test_labels_sources_licences_and_scores(contents):
    assert contents.labels == (("cat", 2),)
    assert (contents.labels_in_all, contents.unlabelled) == (1, 3)
    assert contents.sources == (("not told", 4), ("web", 1))
    assert contents.licences == (("not told", 4), ("MIT", 1))
    (clip,) = contents.scores
    assert (clip.name, clip.without, clip.odd, clip.spread.count) == ("clip", 3, 1, 1)


def test_all_of_it_is_json_of_finite_numbers(contents):
    def refuse(word):
        raise AssertionError(word)

    text = json.dumps(asdict(contents))
    assert json.loads(text, parse_constant=refuse)["total"] == 10


def test_nothing_accepted_and_nothing_said(tmp_path):
    lost = of(tmp_path, item("a.png", "x", reject="the file is empty"))
    assert (lost.accepted, lost.captions, lost.sizes, lost.captions_each) == (0, 0, {}, None)
    assert of(tmp_path, item("a.png")).without_captions == 1
    silent = of(tmp_path, item("a.png", "", " \n", "\x00<b>"))
    assert silent.languages[0].words.least == 0
    assert silent.repeated == ()


def test_an_index_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="lists no file"):
        of(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [3, 3, 3],
        list(range(100)),
        [1, 2, 1000],
        [0.1 * i for i in range(77)],
        [1e-9, 1.0, 1e9],
        [-1e308, 1e308],
        [5e-324, 1e308],
        [1.0, math.nextafter(1.0, 2.0)],
        [-3.5, 2.25, 0.0] * 9,
        [0, 10**15],
    ],
    ids=str,
)
def test_every_number_is_in_one_bar_that_holds_it(values):
    found = spread([*values, math.nan, math.inf, -math.inf])
    assert found.count == len(values) == sum(count for _, _, count in found.bars)
    assert (found.least, found.most) == (min(values), max(values))
    assert found.least <= found.median <= found.most
    assert found.least <= found.mean <= found.most
    assert found.bars[0][0] == found.least
    assert found.bars[-1][1] >= found.most
    assert len(found.bars) <= 24
    for i, (low, high, count) in enumerate(found.bars):
        last = i == len(found.bars) - 1
        inside = [v for v in values if low <= v < high or (v == high and (last or low == high))]
        assert len(inside) == count, (low, high)


def test_bars_are_logarithmic_where_numbers_reach_far():
    assert spread([1.5, 300.0] * 9 + [20.5 + i for i in range(40)]).log
    assert not spread([0, 100_000]).log
    assert spread([math.nan]) is None
    assert spread([]) is None


def test_lengths_are_in_words_or_in_characters():
    assert length(Caption(text=" two  words ", source="x")) == 2
    assert length(Caption(text="两个 词", source="x", language="zh")) == 3
    assert length(Caption(text="สองคำ", source="x", language="TH")) == 5


def test_reasons_that_differ_in_numbers_alone_are_one():
    found = reasons([("a", "5 of 64"), ("b", "1.5 of 64"), ("c", "other"), ("d", "5 of 64")])
    assert [(one.reason, len(one.files)) for one in found] == [("… of …", 3), ("other", 1)]
    assert reasons([("a", "5 of 64")])[0].reason == "5 of 64"
