"""Kept latents: what the codec gives, exactly or rounded; one content once; gone on with as if left alone."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import reverie
from reverie.codecs.video_vae import VideoVae, VideoVaeConfig
from reverie.data import embeddings
from reverie.data.augment import on_white
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.latents import Latents
from reverie.data.media import decode
from reverie.errors import InputError
from reverie.recipes import video_vae
from reverie.recipes.search import key_of

SIZE = 16


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> SimpleNamespace:
    torch.manual_seed(0)
    model = VideoVae(VideoVaeConfig(channels=4, widths=(8, 8, 16), temporal=(True, True))).eval()
    model.mean.uniform_(-1, 1)
    path = tmp_path_factory.mktemp("codec") / "model"
    reverie.save(model, path)
    return SimpleNamespace(path=path, model=reverie.load(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "in"
    where.mkdir()
    draws = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(draws.integers(0, 256, (12, 9 + i, 4), np.uint8)).save(where / f"{i}.png")
        (where / f"{i}.txt").write_text(f"picture {i}")
    for name, length in (("long", 12), ("short", 3)):
        frames = [Image.fromarray(draws.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(length)]
        frames[0].save(
            where / f"{name}.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True
        )
        (where / f"{name}.txt").write_text(f"a {name} clip")
    import_folder(where)
    return where


def encode(folder: Path, codec: SimpleNamespace, **options) -> Latents:
    return video_vae.encode(folder, codec=codec.path, size=SIZE, quiet=True, **options)


def by_name(found: Latents, index: Index) -> dict[str, torch.Tensor]:
    return {item.file_name: found[item.hash].clone() for item in index if item.hash in found}


def signal(path: Path, frames: int) -> torch.Tensor:
    """`1 3 f h w`, as the recipes make it."""
    pixels = decode(path, size=SIZE, frames=frames, fit="pad")
    places = torch.linspace(0, len(pixels) - 1, frames).round().long()
    return on_white(pixels[places]).transpose(0, 1)[None]


@torch.no_grad()
def test_latents_are_those_of_the_codec(folder, codec):
    index = Index.read(folder)
    found = by_name(encode(folder, codec, frames=5), index)
    assert len(found) == 9
    for name, latents in found.items():
        want = codec.model.encode(signal(folder / name, 5 if name.endswith("webp") else 1))[0]
        torch.testing.assert_close(latents, want, atol=1e-5, rtol=1e-5)  # of another batch
    batch = torch.cat([signal(folder / f"{i}.png", 1) for i in range(7)])
    exact = codec.model.encode(batch)
    assert all(torch.equal(found[f"{i}.png"], exact[i]) for i in range(7))  # of the same one


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_rounded_once(dtype, folder, codec):
    index = Index.read(folder)
    exact = by_name(encode(folder, codec), index)
    half = by_name(encode(folder, codec, dtype=dtype), index)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    assert half.keys() == exact.keys()
    assert all(torch.equal(half[name], exact[name].to(kind)) for name in exact)


class Stop:
    """Encodes `after` batches, and no more."""

    def __init__(self, encode, after: int) -> None:
        self.encode, self.after, self.seen = encode, after, 0

    def __call__(self, videos: torch.Tensor) -> torch.Tensor:
        if self.after == 0:
            raise KeyboardInterrupt
        self.after -= 1
        self.seen += len(videos)
        return self.encode(videos)


@pytest.mark.parametrize("after", range(6))
def test_gone_on_with_is_left_alone(after, folder, codec, tmp_path):
    """Interrupted after any batch: all finished shares are kept, none is made twice, and the bits are the same."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".webp"))
    about = {"size": (SIZE, SIZE), "frames": 1, "dtype": "float32"}
    run = partial(video_vae.encode_folder, names=names, key="0" * 16, share=2, quiet=True, **about)

    def start(where: Path, encode) -> video_vae.Encoder:
        return video_vae.Encoder(media=where.__truediv__, encode=encode, stride=4, batch=2, **about)

    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    shutil.copytree(folder, alone)
    shutil.copytree(folder, stopped)
    whole = run(alone, start=lambda: start(alone, codec.model.encode))
    first, rest = Stop(codec.model.encode, after), Stop(codec.model.encode, -1)
    if after < 5:
        with pytest.raises(KeyboardInterrupt):
            run(stopped, start=lambda: start(stopped, first))
    else:
        run(stopped, start=lambda: start(stopped, first))
    found = run(stopped, start=lambda: start(stopped, rest))
    assert first.seen + rest.seen == len(names)
    index = Index.read(folder)
    want, have = by_name(whole, index), by_name(found, index)
    assert want.keys() == have.keys() == set(names)
    assert all(torch.equal(want[name], have[name]) for name in names)


def test_large_parts_are_written_at_once_and_read_together(folder, codec, monkeypatch):
    index = Index.read(folder)
    want = by_name(encode(folder, codec), index)
    shutil.rmtree(folder / ".reverie")
    monkeypatch.setattr(embeddings, "LARGE", 1)
    monkeypatch.setattr(video_vae, "encode_folder", partial(video_vae.encode_folder, share=2))
    found = encode(folder, codec)
    assert found.place is not None
    assert len(list(found.place.glob("*.safetensors"))) == 5
    have = by_name(found, index)
    assert have.keys() == want.keys()
    for name, latents in have.items():
        torch.testing.assert_close(latents, want[name], atol=1e-5, rtol=1e-5)  # of smaller batches


def test_bad_files_are_listed_and_the_recipe_leaves_them_out(folder, codec):
    from reverie.recipes.sora_batches import SoraRun, Source

    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    import_folder(folder, need_captions=False)
    index = Index.read(folder).select(video=False)
    found = encode(folder, codec)
    assert [bad.path for bad in found.bad] == ["3.png"]
    kept = Latents.open(index, key=key_of(codec.model), size=(SIZE, SIZE))
    assert set(kept.names) == {item.file_name for item in index}
    backbone = SimpleNamespace(masked=None, patch=(1, 1))
    config = SimpleNamespace(
        size=(SIZE, SIZE), clip_size=None, text=SimpleNamespace(length=8), backbone=backbone
    )
    words = SimpleNamespace(encode=lambda texts, length: torch.zeros(len(texts), length, dtype=torch.long))
    encode_now = torch.no_grad()(codec.model.encode)
    model = SimpleNamespace(
        codec=codec.model,
        encode=encode_now,
        tokenizer=words,
        parameters=codec.model.parameters,
        config=config,
    )
    run = {"model": config, "steps": 1, "batch": 4, "clips": 0}
    one, two = (
        Source(index, SoraRun(**run, latents=latents), model, frames=1).pictures(0)
        for latents in (True, False)
    )
    assert one["ids"] == two["ids"]
    torch.testing.assert_close(one["latents"], two["latents"], atol=1e-5, rtol=1e-5)
    assert torch.equal(one["noise"], two["noise"])


def test_what_is_not_encoded_is_told(folder, codec):
    index = Index.read(folder)
    about = {"key": key_of(codec.model), "size": (SIZE, SIZE)}
    with pytest.raises(InputError, match="has no latents"):
        Latents.open(index, **about)
    encode(folder, codec)
    Image.new("RGB", (9, 9), (3, 200, 7)).save(folder / "new.png")
    (folder / "new.txt").write_text("a new picture")
    with pytest.raises(InputError, match=r"1 files, such as new\.png"):
        Latents.open(import_folder(folder), **about)


def test_a_file_that_changed_after_the_import_is_left_out_with_its_reason(folder, codec):
    index = Index.read(folder)
    Image.new("RGB", (9, 9), (3, 200, 7)).save(folder / "2.png")
    encode(folder, codec)
    found = Latents.open(index, key=key_of(codec.model), size=(SIZE, SIZE))
    assert [(bad.path, "changed since the import" in bad.reason) for bad in found.bad] == [("2.png", True)]
    assert set(found.names) == {item.file_name for item in index} - {"2.png"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"size": 20}, "multiple of 8"), ({"frames": 4}, "such as 5"), ({"dtype": "int8"}, "choose one of")],
)
def test_what_cannot_be_encoded_is_refused(asked, words, folder, codec):
    with pytest.raises(InputError, match=words):
        video_vae.encode(folder, codec=codec.path, **{"size": SIZE, "quiet": True} | asked)


def test_another_system_is_no_codec(folder):
    with pytest.raises(InputError, match="is a Clip: give the folder of an autoencoder"):
        video_vae.encode(folder, codec="clip-stickers", size=SIZE)
