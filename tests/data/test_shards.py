"""Packed datasets: the very bytes, the same bytes each time, whatever kills the packer; read in place, or refused."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reverie import disk
from reverie.codecs.bpe import Bpe
from reverie.data import shards
from reverie.data.check import check
from reverie.data.embeddings import Embedder, embed_folder
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.pixels import Pixels
from reverie.data.shards import pack, read_list
from reverie.data.sheet import contact_sheet
from reverie.data.shrink import shrink
from reverie.data.streaming import Streamed
from reverie.errors import InputError
from reverie.media import MediaError
from reverie.pictures import to_signal
from reverie.recipes import clip
from reverie.recipes.search import media_of
from reverie.systems.clip import Clip
from reverie.train.log import Run


def fill(folder: Path, makers, count: int = 12) -> Index:
    """Pictures of several kinds in two folders and a clip, each with words; a file that is no picture."""
    kinds = ("png", "jpeg", "webp")
    for i in range(count):
        kind = kinds[i % 3]
        path = folder / ("a" if i % 2 else "b.c") / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(makers.data(makers.picture(i), kind))
        path.with_suffix(".json").write_text(
            json.dumps(
                {
                    "captions": [f"picture {i}", f"图片 {i}"],
                    "score_q": i / 2,
                    "split": "val" if i > 9 else "train",
                }
            )
        )
    (folder / "clip.webp").write_bytes(makers.clip("webp"))
    (folder / "clip.txt").write_text("a clip\nthat moves")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "broken.txt").write_text("broken")
    return import_folder(folder, val=0, quiet=True)


@pytest.fixture
def index(tmp_path, makers) -> Index:
    return fill(tmp_path / "in", makers)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".reverie" not in path.parts
    }


def samples(path: Path) -> dict[str, dict[str, bytes]]:
    """As webdataset groups them: by what stands before the first dot, neighbours only."""
    found: dict[str, dict[str, bytes]] = {}
    last = ""
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            assert key == last or key not in found
            last = key
            found.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return found


# --- what is in the tars ----------------------------------------------------------------------------------------------


def test_the_bytes_and_the_words_are_those_of_the_files(index, tmp_path):
    made = pack(index, tmp_path / "out", count=4, quiet=True)
    packed = Index.read(tmp_path / "out")
    assert [replace(item, shard=None, offset=0) for item in packed] == index.items
    assert made.index.items == packed.items
    assert [shard.file.removeprefix("shards/") for shard in made.shards] == [
        "train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar",
    ]  # fmt: skip
    found = defaultdict(dict)
    for shard in made.shards:
        path = tmp_path / "out" / shard.file
        assert (path.stat().st_size, digests(path.parent)[path.name]) == (shard.bytes, shard.sha256)
        assert path.stat().st_size % tarfile.RECORDSIZE == 0
        for key, sample in samples(path).items():
            row = json.loads(sample.pop("json"))
            assert sample.pop("txt").decode() == row["captions"][0]["text"]
            ((suffix, data),) = sample.items()
            assert key.isdigit()
            found[row["file_name"]] = (suffix, data, row, shard.file)
    assert len(found) == 13
    for item in packed:
        if item.reject is not None:
            assert item.file_name == "broken.png"
            assert item.shard is None
            continue
        suffix, data, row, file = found[item.file_name]
        assert data == (index.folder / item.file_name).read_bytes() == packed.bytes_of(item)
        assert suffix == {".jpeg": "jpg", ".png": "png", ".webp": "webp"}[Path(item.file_name).suffix]
        assert item.shard == file
        assert file.startswith(f"shards/{item.split}")
        assert row["hash"] == item.hash
        assert [c["text"] for c in row["captions"]] == [c.text for c in item.captions]
        assert row.get("score_q") == item.scores.get("q")


def test_the_same_input_gives_the_same_tars(index, tmp_path):
    pack(index, tmp_path / "one", count=5, workers=1, quiet=True)
    for path in index.folder.rglob("*.png"):
        os.utime(path, (1, 1))
    pack(Index.read(index.folder), tmp_path / "two", count=5, workers=4, quiet=True)
    assert digests(tmp_path / "one" / "shards") == digests(tmp_path / "two" / "shards")
    pack(index, tmp_path / "three", count=5, shuffle=True, quiet=True)
    one, three = Index.read(tmp_path / "one"), Index.read(tmp_path / "three")
    assert [item.file_name for item in one] == [item.file_name for item in three]
    assert [item.shard for item in one] != [item.shard for item in three]
    assert [one.bytes_of(i) for i in one.select()] == [three.bytes_of(i) for i in three.select()]


def test_packing_what_is_packed_gives_the_same_tars(index, tmp_path):
    one = pack(index, tmp_path / "one", count=5, quiet=True).index
    pack(one, tmp_path / "two", count=5, quiet=True)
    assert digests(tmp_path / "one" / "shards") == digests(tmp_path / "two" / "shards")


@pytest.mark.parametrize("size", [20_000, 40_000])
def test_no_tar_is_larger_than_asked(index, tmp_path, size):
    made = pack(index, tmp_path / "out", size=size, quiet=True)
    assert all(shard.bytes <= size or shard.samples == 1 for shard in made.shards)
    assert sum(shard.samples for shard in made.shards) == 13
    assert len(made.shards) > 2


def test_a_split_alone_and_what_was_marked(index, tmp_path):
    index.items[0] = replace(index.items[0], reject="marked by filter: score_q 0 is below 1")
    index.write()
    made = pack(index.select(split="train", accepted=None), tmp_path / "out", quiet=True)
    assert {item.split for item in made.index} == {"train"}
    first = made.index.items[0]
    assert (first.shard, first.marked) == (None, None)
    assert first.reject == "not packed: marked by filter: score_q 0 is below 1"
    assert "2, listed with their reasons" in str(made)


def test_what_cannot_be_read_any_more_is_listed(index, tmp_path, makers):
    gone, changed = (item for item in index if item.file_name in ("a/1.jpeg", "a/3.png"))
    index.path(gone).unlink()
    index.path(changed).write_bytes(makers.data(makers.picture(77), "png"))
    made = pack(index, tmp_path / "out", quiet=True)
    reasons = {item.file_name: item.reject for item in made.index if item.reject}
    assert reasons.keys() == {"a/1.jpeg", "a/3.png", "broken.png"}
    assert reasons["a/1.jpeg"] == "there is no such file"
    assert "cannot be read any more: 2" in str(made)
    assert [made.index.bytes_of(i) for i in made.index.select()] == [
        (index.folder / i.file_name).read_bytes() for i in index.select() if i.file_name not in reasons
    ]


def test_folders_that_hold_something_else_are_left_alone(index, tmp_path, makers):
    other = fill(tmp_path / "other", makers, 3)
    before = digests(other.folder)
    with pytest.raises(InputError, match="already holds another index or other tars"):
        pack(index, other.folder, quiet=True)
    with pytest.raises(InputError, match="lies in the folder to pack"):
        pack(index, index.folder / "packed", quiet=True)
    assert digests(other.folder) == before
    theirs = makers.data(makers.picture(), "png")  # whatever it is, it has our name
    (tmp_path / "tars" / "shards").mkdir(parents=True)
    (tmp_path / "tars" / "shards" / "train-00000.tar").write_bytes(theirs)
    with pytest.raises(InputError, match="or other tars"):
        pack(index, tmp_path / "tars", quiet=True)
    assert (tmp_path / "tars" / "shards" / "train-00000.tar").read_bytes() == theirs
    pack(index, tmp_path / "out", quiet=True)
    before = digests(tmp_path / "out")
    with pytest.raises(InputError, match="complete packing of something else"):
        pack(index, tmp_path / "out", count=3, quiet=True)
    assert digests(tmp_path / "out") == before
    with pytest.raises(InputError, match="use it as it is"):
        import_folder(tmp_path / "out", quiet=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "shards.json").write_text('{"shards": [{"file": "../../a"}]}')
    with pytest.raises(InputError, match="not the list of a packing"):
        pack(index, tmp_path / "odd", quiet=True)


def test_a_disk_that_is_too_small_is_told_before(index, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="on a larger disk"):
        pack(index, tmp_path / "out", quiet=True)


# --- interruptions ----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from reverie import disk
from reverie.data.index import Index
from reverie.data.shards import pack
left = int(sys.argv[3])
publish = disk.publish
def dying(draft, path, **options):
    global left
    left -= path.suffix == ".tar"
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(draft, path, **options)
disk.publish = dying
pack(Index.read(sys.argv[1]), sys.argv[2], count=2, quiet=True)
"""


@pytest.mark.chaos
def test_a_killed_packer_goes_on(index, tmp_path):
    whole = pack(index, tmp_path / "whole", count=2, quiet=True)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(index.folder), str(out), "3"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert len([*(out / "shards").glob(".*")]) == 1  # what was being written
    with pytest.raises(InputError, match="was interrupted"):
        Index.read(out)
    with pytest.raises(InputError, match="was interrupted"):
        import_folder(out, quiet=True)
    third = out / read_list(out)[2].file
    third.write_bytes(third.read_bytes()[:-1] + b"x")  # a torn page
    made = pack(index, out, count=2, quiet=True)
    assert made.kept == 2
    assert digests(out) == digests(tmp_path / "whole")
    assert made.index.items == whole.index.items


@pytest.mark.chaos
def test_a_full_disk_costs_what_was_being_written(index, tmp_path, monkeypatch):
    publish, left = disk.publish, [2]

    def full(draft, path, **options):
        left[0] -= path.suffix == ".tar"
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(draft, path, **options)

    monkeypatch.setattr(disk, "publish", full)
    with pytest.raises(InputError, match=r"No space left on device.*the same command goes on"):
        pack(index, tmp_path / "out", count=2, quiet=True)
    monkeypatch.undo()
    assert not [*(tmp_path / "out" / "shards").glob(".*")]
    assert pack(index, tmp_path / "out", count=2, quiet=True).kept == 2
    pack(index, tmp_path / "whole", count=2, quiet=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_other_limits_after_an_interruption(index, tmp_path, monkeypatch):
    """What the first limits made goes, and nothing else does."""
    write = shards._write

    def stop(index, plan, *rest):
        if plan.file.endswith("00002.tar"):
            raise KeyboardInterrupt
        return write(index, plan, *rest)

    monkeypatch.setattr(shards, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(index, tmp_path / "out", count=2, quiet=True)
    monkeypatch.undo()
    listed = read_list(tmp_path / "out")
    shards._list(tmp_path / "out", listed[:1])  # as if killed between a tar and its line in the list
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "1 tars of another packing" in str(pack(index, tmp_path / "out", quiet=True))
    pack(index, tmp_path / "whole", quiet=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") | {
        "notes.txt": hashlib.sha256(b"mine").hexdigest()
    }


def test_a_damaged_tar_is_made_again_and_the_index_keeps_what_was_added(index, tmp_path):
    made = pack(index, tmp_path / "out", count=4, quiet=True)
    scored = Index.read(tmp_path / "out")
    scored.items = [replace(item, scores=item.scores | {"clip": 0.5}) for item in scored]
    scored.items[1] = replace(scored.items[1], reject="marked by filter: low")
    scored.write()
    before = digests(tmp_path / "out")
    path = tmp_path / "out" / made.shards[1].file
    path.write_bytes(path.read_bytes()[:5000])
    again = pack(index, tmp_path / "out", count=4, quiet=True)
    assert again.kept == len(made.shards) - 1
    assert digests(tmp_path / "out") == before


# --- a dataset like any other -----------------------------------------------------------------------------------------


@pytest.fixture
def packed(index, tmp_path) -> Index:
    pack(index, tmp_path / "out", count=4, quiet=True)
    return Index.read(tmp_path / "out")


def same_samples(one, two) -> None:
    assert one.good == two.good
    assert one.good
    assert all(torch.equal(one[i], two[i]) for i in one.good)


def test_it_is_read_as_the_folder_is(index, packed, tmp_path):
    loose = Pixels(index, size=16, frames=3, quiet=True)
    same_samples(loose, Pixels(packed, size=16, frames=3, quiet=True))
    same_samples(loose, Streamed(packed, size=16, frames=3))
    same_samples(loose, Streamed(index, size=16, frames=3))
    report = check(packed, contents=True, quiet=True)
    assert str(report).splitlines()[1:] == str(check(index, contents=True, quiet=True)).splitlines()[1:]
    one, two = (contact_sheet(i, tmp_path / f"{n}.png") for n, i in enumerate((index, packed)))
    assert one.read_bytes() == two.read_bytes()
    small = [
        shrink(i.select(), tmp_path / f"small-{n}", size=8, quiet=True) for n, i in enumerate((index, packed))
    ]
    assert small[0].items == small[1].items
    assert digests(small[0].folder) == digests(small[1].folder)


def embed(index: Index, shown: list[int]):
    def vectors(signals):
        shown.append(len(signals))
        return signals.flatten(1)[:, :8]

    def prepare(pictures):
        return torch.stack([torch.from_numpy(to_signal(p, size=4)) for p in pictures])

    names = [item.file_name for item in index.select()]
    worker = Embedder(media=media_of(index.folder, index), prepare=prepare, embed=vectors)
    return embed_folder(index.folder, names, key="0" * 16, start=lambda: worker, index=index, quiet=True)


def test_embeddings_are_those_of_the_folder_and_kept(index, packed):
    shown: list[int] = []
    loose = embed(index, [])
    one = embed(packed, shown)
    assert one.names == loose.names
    assert torch.equal(one.vectors, loose.vectors)
    assert sum(shown) == len(one.vectors)
    again = embed(Index.read(packed.folder), shown)
    assert torch.equal(again.vectors, one.vectors)
    assert sum(shown) == len(one.vectors)


def test_a_broken_tar_is_not_remembered_of_a_picture(packed):
    """Its content is sound elsewhere: when the tar is mended, the picture is embedded."""
    name = packed.select()[0].shard
    path = packed.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:600])
    lost = embed(packed, [])
    inside = {item.file_name for item in packed if item.shard == name}
    assert {bad.path for bad in lost.bad} == inside
    path.write_bytes(whole)
    assert not embed(packed, []).bad


def test_a_run_on_the_tars_is_the_run_on_the_folder(index, packed, tmp_path, monkeypatch):
    """Batches are functions of seed and step, and pixels of the bytes: every loss is equal, streamed or kept."""
    monkeypatch.setattr(Run, "curves", lambda _: None)  # drawing takes longer than learning here
    reader = Bpe.train([caption.text for item in index for caption in item.captions], vocab=600)
    config = clip.ClipRun(
        model=clip.shape(reader.vocab, reader.end, size=16, width=64, depth=2),
        steps=3,
        batch=4,
        warmup=2,
        ema=0.0,
    )

    def losses(some: Index, name: str, **options) -> list[tuple[int, float]]:
        torch.manual_seed(0)
        out = tmp_path / name
        clip.fit(config, Clip(config.model, reader), some.select(split="train"), out, measures={}, **options)
        rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    loose = losses(index, "loose")
    assert loose
    assert losses(packed, "packed") == loose
    (packed.folder / ".reverie").rename(tmp_path / "kept")
    assert losses(packed, "streamed", stream=True) == loose
    assert not (packed.folder / ".reverie").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.hostile
def test_damage_gives_reasons_not_crashes(packed):
    items = packed.select().items
    flipped = packed.folder / items[0].shard
    data = bytearray(flipped.read_bytes())
    data[items[0].offset + 50] ^= 1
    flipped.write_bytes(data)
    gone, cut = (packed.folder / "shards" / f"train-0000{i}.tar" for i in (1, 2))
    cut.write_bytes(cut.read_bytes()[:10])
    pixels = Pixels(packed.select(), size=8, max_bad=0.9, quiet=True)
    reasons = {bad.path: bad.reason for bad in pixels.bad}
    assert reasons.keys() == {items[0].file_name} | {
        i.file_name for i in items if i.shard == "shards/train-00002.tar"
    }
    assert (
        reasons[items[0].file_name] == "changed since it was indexed: its bytes do not match their checksum"
    )
    gone.unlink()
    lost = {i.file_name for i in items if i.shard == "shards/train-00001.tar"}
    listed = dict(check(packed, contents=True, quiet=True).rejected)
    assert listed.keys() == reasons.keys() | lost | {"broken.png"}
    quick = dict(check(packed, quiet=True).rejected)
    assert quick.keys() == listed.keys() - {items[0].file_name}
    assert {v for k, v in quick.items() if k != "broken.png"} == {
        "shards/train-00001.tar, which held it, is gone: copy or pack it again",
        "shards/train-00002.tar, which held it, is cut short: copy or pack it again",
    }


@pytest.mark.hostile
@pytest.mark.parametrize(("shard", "offset", "size"), [
    ("../in/secret", 0, 7), ("/etc/passwd", 0, 7), ("shards/train-00000.tar", -512, 7),
    ("shards/train-00000.tar", None, 7), ("shards/train-00000.tar", 0, -1),
])  # fmt: skip
def test_a_strangers_index_cannot_lead_outside(packed, shard, offset, size):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = packed.folder / "metadata.parquet"
    table = pq.read_table(path)
    for name, value in (("shard", shard), ("offset", offset), ("bytes", size)):
        at = table.column_names.index(name)
        values = [value, *table.column(name).to_pylist()[1:]]
        table = table.set_column(at, table.field(name), pa.array(values, table.field(name).type))
    pq.write_table(table, path)
    with pytest.raises(InputError, match=r"not a relative path|import the folder again"):
        Index.read(packed.folder)


def test_a_place_beyond_the_tar_is_a_reason(packed):
    item = packed.select()[0]
    far = replace(item, offset=10**9)
    with pytest.raises(MediaError, match="cut short: 0 of its"):
        packed.bytes_of(far)
    with pytest.raises(MediaError, match="more than the limit"):
        packed.bytes_of(replace(item, bytes=10**12))


# --- tars of others ---------------------------------------------------------------------------------------------------


def test_what_was_packed_can_be_imported_elsewhere(index, packed, tmp_path):
    """The tars alone are a dataset for any tool, and for our own importer: nothing but the names is lost."""
    again = import_folder(packed.folder / "shards", out=tmp_path / "again", quiet=True)
    by_hash = {item.hash: item for item in again}
    for item in packed.select():
        other = by_hash[item.hash]
        assert other.reject is None
        assert (other.shard, other.offset) == (item.shard, item.offset)
        assert (other.split, other.scores) == (item.split, item.scores)
        assert {(c.text, c.language) for c in item.captions} <= {(c.text, c.language) for c in other.captions}
    assert len(again) == len(packed.select())
    pixels = Pixels(again, size=8, quiet=True)
    assert len(pixels.good) == len(again)


# --- what cannot be reached for a moment ------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.parametrize("how", ["away", "unreadable"])
def test_a_tar_that_is_away_makes_no_item_bad(packed, tmp_path, how):
    chosen = packed.select()
    away = packed.folder / "shards" / "train-00001.tar"
    held = next(i for i, item in enumerate(chosen) if item.shard == "shards/train-00001.tar")
    cache, words = tmp_path / "cache", r"shards/train-00001\.tar in .*run the same command again\.$"
    stream = Streamed(chosen, size=8)
    away.rename(tmp_path / "away.tar")
    if how == "unreadable":  # not for root either
        away.mkdir()
    for options in ({"cache": cache}, {}):
        with pytest.raises(InputError, match=words):
            Pixels(chosen, size=8, max_bad=0.9, quiet=True, **options)
    assert list(cache.iterdir()) == []
    for ask in (lambda: stream.ready([(0, held)], stream.good), lambda: stream[held]):
        with pytest.raises(InputError, match=words):
            ask()
    with pytest.raises(InputError, match=words):
        pack(packed, tmp_path / "again", quiet=True)
    if how == "unreadable":
        away.rmdir()
    (tmp_path / "away.tar").rename(away)
    pixels = Pixels(chosen, size=8, cache=cache, quiet=True)
    assert pixels.good == list(range(len(chosen)))
    assert stream.ready([(0, held)], stream.good) == ([(0, held)], [])
    assert all(torch.equal(stream[i], pixels[i]) for i in pixels.good)
    assert not any(shard.left_out for shard in pack(packed, tmp_path / "again", quiet=True).shards)


def test_a_full_disk_is_refused_in_the_words_of_every_command(index, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: SimpleNamespace(free=1100))
    with pytest.raises(InputError, match=r"The tars need \d+ kB, and .* has 1 kB free"):
        pack(index, tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match=r"need 832 MB, and .* has 1 kB free"):
        Pixels(index.select(), size=4000, quiet=True)


def test_a_file_of_a_folder_that_is_gone_is_bad_with_its_reason(index, tmp_path):
    chosen = index.select(video=False)
    chosen.path(chosen[3]).unlink()
    pixels = Pixels(chosen, size=8, cache=tmp_path / "cache", quiet=True)
    assert pixels.bad == [(chosen[3].file_name, "there is no such file")]
    stream = Streamed(chosen, size=8)
    assert stream.ready([(0, 3)], stream.good) == ([(0, 4)], pixels.bad)


# --- decoded when asked for -------------------------------------------------------------------------------------------


def test_what_cannot_be_decoded_is_replaced_by_its_neighbour(index):
    chosen = index.select(video=False)
    chosen.folder.joinpath(chosen[3].file_name).write_bytes(b"")
    stream = Streamed(chosen, size=8)
    assert len(stream.good) == len(chosen)
    keys = [(0, 2), (0, 3), (1, 3), (1, len(chosen) - 1)]
    found, bad = stream.ready(keys, stream.good)
    assert found == [(0, 2), (0, 4), (1, 4), (1, len(chosen) - 1)]
    assert {b.path for b in bad} == {chosen[3].file_name}
    assert Streamed(chosen, size=8).ready(keys, stream.good)[0] == found  # by a run that is resumed as well
    without = [i for i in stream.good if i != 4]  # such as those without words
    assert stream.ready([(0, 3)], without)[0] == [(0, 5)]
    with pytest.raises(InputError, match="has no pixels"):
        stream[3]
    for item in chosen:
        index.path(item).write_bytes(b"")
    with pytest.raises(InputError, match="nor can any of the next"):
        Streamed(chosen, size=8).ready([(0, 0)], stream.good)


def test_a_cache_that_would_not_fit_says_what_to_do(index, tmp_path, monkeypatch):
    from reverie.data import pixels

    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="--stream"):
        Pixels(index, size=64, cache=tmp_path / "cache", quiet=True)
