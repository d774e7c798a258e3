"""Datasets at an address: only what is asked for is fetched, nothing is written, and what is missing is said."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import reverie
from reverie.cli import main
from reverie.codecs.video_vae import VideoVae, VideoVaeConfig
from reverie.data import marks, remote
from reverie.data.check import check
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.pixels import Pixels
from reverie.data.preparing import Share
from reverie.data.shards import pack
from reverie.data.streaming import Streamed
from reverie.errors import InputError
from reverie.recipes.parts import open_index
from reverie.recipes.search import embed, open_folder
from reverie.recipes.video_vae import encode

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.fixture
def index(tmp_path, makers) -> Index:
    folder = tmp_path / "in"
    for i in range(6):
        path = folder / ("deep" if i % 2 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(makers.data(makers.picture(i), "png"))
        path.with_suffix(".txt").write_text(f"picture {i}")
    return import_folder(folder, quiet=True)


@pytest.fixture
def packed(index, tmp_path) -> Index:
    return pack(index, tmp_path / "packed", count=2, quiet=True).index


class Memory:
    """memory://data filled with a folder, and what was read of it: (path, start, end)."""

    def __init__(self, monkeypatch):
        from fsspec.implementations.memory import MemoryFileSystem

        self.files, self.read, whole = fsspec.filesystem("memory"), [], MemoryFileSystem.cat_file
        lock = threading.Lock()

        def cat_file(files, path, start=None, end=None, **options):
            with lock:
                self.read.append((path, start, end))
            return whole(files, path, start=start, end=end, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)

    def put(self, folder: Path, at: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.files.pipe_file(f"{at}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture
def memory(monkeypatch):
    yield Memory(monkeypatch)
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("form", ["loose", "packed"])
@pytest.mark.parametrize("through", [str, Path])
def test_it_is_read_as_the_folder_is(index, packed, memory, form, through):
    here = packed if form == "packed" else index
    memory.put(here.folder, "/data/set")
    there = open_index(through("memory://data/set"))
    assert there.items == here.items
    assert str(there.origin) == "memory://data/set"
    one, two, three = (
        Pixels(index, size=16, quiet=True),
        Pixels(there, size=16, quiet=True),
        Streamed(there, size=16),
    )
    assert one.good == two.good == three.good == list(range(6))
    assert all(torch.equal(one[i], two[i]) and torch.equal(one[i], three[i]) for i in one.good)
    if form == "packed":  # nothing but the ranges of the pictures
        places = {(f"/data/set/{item.shard}", item.offset, item.offset + item.bytes) for item in there}
        assert {read for read in memory.read if read[0].endswith(".tar")} == places
    one, two = (str(check(some, contents=True, quiet=True)).splitlines()[1:] for some in (there, here))
    assert one == two
    again = there.select(split="train")  # selections and copies of the index know where they are from
    assert Index(again.folder, again.items).bytes_of(again[0]) == here.bytes_of(here.select(split="train")[0])


def test_commands_take_addresses(packed, memory, tmp_path, capsys):
    memory.put(packed.folder, "/data/set")
    assert main(["data", "check", "memory://data/set"]) == 0
    assert "6 pictures" in capsys.readouterr().out
    assert main(["data", "show", "memory://data/set", "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 100
    assert main(["data", "pack", "memory://data/set", str(tmp_path / "again"), "--count", "2"]) == 0
    again = Index.read(tmp_path / "again")
    assert again.items == packed.items
    assert all(
        (tmp_path / "again" / item.shard).read_bytes() == (packed.folder / item.shard).read_bytes()
        for item in again
    )


class Clip:
    """Mean colours, under the names that search asks for."""

    config = "mean colour"

    def state_dict(self):
        return {"one": torch.ones(1)}

    def prepare(self, pictures):
        from reverie.pictures import to_signal

        return torch.stack([torch.from_numpy(to_signal(p, size=4)) for p in pictures])

    def embed_image(self, signals):
        return torch.nn.functional.normalize(signals.flatten(1)[:, ::7], dim=1)


def test_search_embeds_an_address_once(index, packed, memory):
    memory.put(packed.folder, "/data/set")
    loose, _ = open_folder(Clip(), index.folder, quiet=True)
    found, items = open_folder(Clip(), Path("memory://data/set"), quiet=True)
    assert sorted(found.names) == sorted(loose.names) == sorted(items)
    own = dict(zip(loose.names, loose.vectors, strict=True))
    assert all(
        torch.equal(vector, own[name]) for name, vector in zip(found.names, found.vectors, strict=True)
    )
    before = len([read for read in memory.read if read[0].endswith(".tar")])
    assert before == 6
    again, _ = open_folder(Clip(), Path("memory://data/set"), quiet=True)
    assert torch.equal(again.vectors, found.vectors)
    assert len([read for read in memory.read if read[0].endswith(".tar")]) == before


WORKER = """
import importlib, json, sys
from safetensors.torch import save_file
from reverie.data.preparing import _load, _share

module, name, given, cut, out = sys.argv[1:]
preparation = getattr(importlib.import_module(module), name)(*json.loads(given))
cut = [tuple(job) for job in json.loads(cut)]
share = _share(preparation, cut, (_load(preparation, job) for job in cut))
assert not share.bad and not share.killed, (share.bad, share.killed)
save_file(share.tensors, out)
"""


class Workers:
    """A pool without Ray: each cut is done by a process of its own, which knows what `start` carries there."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def each(self, cuts, start):
        from safetensors.torch import load_file

        for number, cut in enumerate(cuts):
            told = (start.func.__module__, start.func.__name__, json.dumps(start.args), json.dumps(cut))
            paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, "-c", WORKER, *told, self.out]
            subprocess.run(command, check=True, timeout=120, env=paths)
            yield number, Share(good=list(cut), tensors=load_file(self.out), bad={})


@pytest.mark.parametrize(("what", "form"), [("embed", "loose"), ("encode", "packed")])
def test_workers_open_the_address_themselves(index, packed, tmp_path, monkeypatch, what, form):
    here = packed if form == "packed" else index
    monkeypatch.chdir(tmp_path)  # fsspec's name for this machine's disk, by which it is no folder to us
    there, pool = Path(f"local://{here.folder.name}"), Workers(tmp_path / "share.safetensors")
    if what == "embed":
        one, two = embed(here.folder, quiet=True), embed(there, pool=pool, quiet=True)
        assert torch.equal(one.vectors, two.vectors)
    else:
        torch.manual_seed(0)
        config = VideoVaeConfig(channels=4, widths=(8, 8, 16), temporal=(True, True))
        reverie.save(VideoVae(config).eval(), tmp_path / "codec")
        options = {"codec": tmp_path / "codec", "size": 16, "quiet": True}
        one, two = encode(here.folder, **options), encode(there, pool=pool, **options)
        assert all(torch.equal(one[item.hash], two[item.hash]) for item in here)
    assert (one.names, one.bad) == (two.names, two.bad)
    assert len(two.names) == 6


def test_a_changed_index_is_fetched_again(index, memory):
    memory.put(index.folder, "/data/set")
    assert len(Index.read("memory://data/set")) == 6
    Index(index.folder, index.items[:4]).write()
    memory.put(index.folder, "/data/set")
    assert len(Index.read("memory://data/set")) == 4


def test_nothing_is_written_to_an_address(packed, memory):
    memory.put(packed.folder, "/data/set")
    there = Index.read("memory://data/set")
    with pytest.raises(InputError, match="memory://data/set is only read"):
        there.write()
    with pytest.raises(InputError, match="is only read"):
        marks.mark(there, "filter", {})
    with pytest.raises(InputError, match="nothing is imported"):
        import_folder("memory://data/set")
    with pytest.raises(InputError, match=r"use Index\.media"):
        there.path(there[0])


def test_damage_on_the_way_is_a_reason(packed, memory):
    memory.put(packed.folder, "/data/set")
    there = Index.read("memory://data/set")
    first, *others = there.select()
    changed = f"/data/set/{first.shard}"
    data = bytearray(memory.files.cat_file(changed))
    data[first.offset + 40] ^= 1
    memory.files.pipe_file(changed, bytes(data))
    cut, gone = (name for name in sorted({i.shard for i in others}) if name != first.shard)
    memory.files.pipe_file(f"/data/set/{cut}", b"short")
    pixels = Pixels(there, size=8, max_bad=0.9, quiet=True)
    reasons = {bad.path: bad.reason.partition(":")[0] for bad in pixels.bad}
    expected = {first.file_name: "changed since it was indexed"}
    expected |= {i.file_name: "cut short" for i in there if i.shard == cut}
    assert reasons == expected
    memory.files.rm(f"/data/set/{gone}")
    expected |= {i.file_name: "gone" for i in there if i.shard == gone}
    listed = check(there, quiet=True).rejected
    assert {name for name, _ in listed} == expected.keys() - {first.file_name}


def test_a_network_that_fails_for_a_moment(packed, memory, monkeypatch, tmp_path):
    memory.put(packed.folder, "/data/set")
    there = Index.read("memory://data/set")
    files, tries = type(memory.files), []
    read = files.cat_file

    def shaky(self, path, **options):
        tries.append(path)
        if len(tries) < 3:
            raise ConnectionError("reset by peer")
        return read(self, path, **options)

    monkeypatch.setattr(files, "cat_file", shaky)
    assert there.bytes_of(there[0]) == packed.bytes_of(packed[0])
    assert len(tries) == 3
    monkeypatch.setattr(files, "cat_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("down")))
    with pytest.raises(InputError, match="cannot be read"):
        there.bytes_of(there[0])
    cache = tmp_path / "pixels"
    with pytest.raises(
        InputError, match=r"shards/.* in memory://data/set cannot be read \(ConnectionError: down\)"
    ):
        Pixels(there, size=8, max_bad=0.9, cache=cache, quiet=True)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(files, "cat_file", read)
    assert Pixels(there, size=8, cache=cache, quiet=True).bad == []


def test_a_server_without_ranges_is_told_at_once(packed, memory, monkeypatch):
    """Not a reason for each picture: every one would fetch a whole tar."""
    memory.put(packed.folder, "/data/set")
    there = Index.read("memory://data/set")
    read = type(memory.files).cat_file
    monkeypatch.setattr(type(memory.files), "cat_file", lambda self, path, **_: read(self, path))
    with pytest.raises(InputError, match="serve it with byte ranges"):
        Pixels(there, size=8, quiet=True)


def test_what_is_missing_is_said_in_one_sentence(memory, monkeypatch):
    for address, words in (
        ("memory://nothing/here", "No index at memory://nothing/here: it needs a metadata.parquet there"),
        ("nope://bucket/set", "fsspec knows no protocol 'nope'"),
        ("adl://bucket/set", "fsspec lacks what it needs to open adl://bucket/set"),
    ):
        with pytest.raises(InputError, match=words):
            Index.read(address)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"pip install 'reverie\[remote\]'"):
        Index.read("s3://bucket/set")


def test_addresses_and_paths_are_told_apart(tmp_path, index, monkeypatch):
    assert remote.address(Path("s3://bucket/a/b")) == remote.address("s3://bucket/a/b") == "s3://bucket/a/b"
    for path in ("C:/pictures", "a/b:/c", "pictures", str(tmp_path), "file:///pictures", "odd:/name"):
        assert remote.address(path) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:").mkdir()
    assert remote.address(Path("odd:/")) is None
    monkeypatch.setitem(sys.modules, "fsspec", None)  # a folder of this machine needs none
    for place in (f"file://{index.folder}", Path(f"file://{index.folder}")):
        assert Index.read(place).folder == index.folder


class Handler(BaseHTTPRequestHandler):
    """A file server that knows ranges, as object stores do."""

    def __init__(self, *args, folder: Path, asked: list, **options):
        self.folder, self.asked = folder, asked
        super().__init__(*args, **options)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, span = path.read_bytes(), self.headers.get("Range")
        self.asked.append((self.path, span))
        first, last = 0, len(data) - 1
        if span:
            first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    def log_message(self, *_):
        pass


def test_a_web_server_is_asked_for_ranges_alone(index, packed):
    pytest.importorskip("aiohttp")
    asked: list[tuple[str, str | None]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folder=packed.folder, asked=asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        there = Index.read(f"http://127.0.0.1:{server.server_port}/")
        one, two = Pixels(index, size=16, quiet=True), Pixels(there, size=16, quiet=True)
        assert all(torch.equal(one[i], two[i]) for i in one.good)
        spans = {(f"/{i.shard}", f"bytes={i.offset}-{i.offset + i.bytes - 1}") for i in there}
        assert {a for a in asked if a[0].endswith(".tar")} == spans
        assert check(there, quiet=True).rejected == ()
        with pytest.raises(InputError, match="No index at"):
            Index.read(f"http://127.0.0.1:{server.server_port}/nothing")
    finally:
        server.shutdown()
        server.server_close()
