"""The store of embeddings: each content once, whatever its names; what changed again; nothing stale, nothing lost."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reverie import disk
from reverie.data import embeddings
from reverie.data.embeddings import Embedder, embed_folder, fingerprint, media_below
from reverie.errors import InputError
from reverie.pictures import to_signal


def paint(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 9, 3), np.uint8)).save(path)
    return path


def moving(path: Path, frames: int) -> Path:
    pictures = [Image.new("RGB", (8, 8), (20 * i, 0, 255 - 20 * i)) for i in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250, lossless=True)
    return path


class Model:
    """The mean colour and a little more: vectors by which pictures are told apart; counts what it was shown."""

    def __init__(self, width: int = 4) -> None:
        self.seen, self.width = 0, width

    def prepare(self, pictures: list[Path] | list[Image.Image]) -> torch.Tensor:
        return torch.stack(
            [torch.from_numpy(to_signal(picture, size=4, fit="squash")) for picture in pictures]
        )

    def embed(self, signals: torch.Tensor) -> torch.Tensor:
        self.seen += len(signals)
        return torch.nn.functional.normalize(signals.flatten(1)[:, :: 48 // self.width] + 0.01, dim=1)

    def run(
        self, folder: Path, names: list[str] | None = None, *, batch: int = 64, key: str = "0" * 16, **options
    ) -> embeddings.Embeddings:
        names = media_below(folder) if names is None else names
        worker = Embedder(
            media=folder.__truediv__, prepare=self.prepare, embed=self.embed, batch=batch,
            dtype=options.get("dtype", "float16"),
        )  # fmt: skip
        return embed_folder(
            folder, names, start=lambda: worker, key=key, share=batch, **{"quiet": True} | options
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        paint(tmp_path / "in" / f"{i}.png", i)
    return tmp_path / "in"


def by_name(found: embeddings.Embeddings) -> dict[str, list[list[float]]]:
    return {name: found.vectors[found.file == i].tolist() for i, name in enumerate(found.names)}


def test_a_second_call_embeds_nothing_and_maps_what_is_there(folder):
    model = Model()
    first = model.run(folder)
    again = model.run(folder)
    assert model.seen == 5
    assert by_name(first) == by_name(again)
    assert again.vectors.dtype == torch.float16
    # mapped: what the store's file says now, the tensor says too
    (part,) = again.place.glob("*.safetensors")
    start = part.read_bytes().index(again.vectors.numpy().tobytes())
    with part.open("r+b") as file:
        file.seek(start)
        file.write(np.float16(7).tobytes())
    assert model.run(folder).vectors[0, 0] == 7
    assert model.seen == 5


def test_only_what_changed_is_embedded_again(folder):
    model = Model()
    before = by_name(model.run(folder))
    (folder / "0.png").rename(folder / "sub.png")
    shutil.copy(folder / "1.png", folder / "copy.png")
    (folder / "2.png").unlink()
    found = model.run(folder)
    assert model.seen == 5  # a new name and a copy cost nothing
    assert found.names == ("1.png", "3.png", "4.png", "copy.png", "sub.png")
    now = by_name(found)
    assert now["sub.png"] == before["0.png"]
    assert now["copy.png"] == now["1.png"] == before["1.png"]
    paint(folder / "3.png", 99)
    assert by_name(model.run(folder))["3.png"] != before["3.png"]
    assert model.seen == 6


def test_a_file_of_equal_size_that_changed_is_seen_by_its_time(folder):
    model = Model()
    path = folder / "flat.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path, compress_level=0)
    size = path.stat().st_size
    before = by_name(model.run(folder))["flat.png"]
    Image.new("RGB", (4, 4), (0, 0, 255)).save(path, compress_level=0)
    assert path.stat().st_size == size
    assert by_name(model.run(folder))["flat.png"] != before


def test_contents_that_are_gone_leave_the_disk(folder):
    model = Model()
    model.run(folder)
    for i in range(3):
        (folder / f"{i}.png").unlink()
    found = model.run(folder)
    (part,) = found.place.glob("*.safetensors")
    assert len(embeddings._read(part, "float16").vectors) == 2
    assert model.seen == 5


def test_asking_for_some_keeps_the_others(folder):
    model = Model()
    names = media_below(folder)
    model.run(folder)
    assert model.run(folder, names[:1], present=names).names == ("0.png",)
    model.run(folder)
    assert model.seen == 5


def test_another_model_or_type_has_a_store_of_its_own(folder):
    model = Model()
    model.run(folder)
    exact = model.run(folder, dtype="float32")
    assert model.seen == 10
    assert exact.vectors.dtype == torch.float32
    assert torch.equal(exact.vectors.half(), model.run(folder).vectors)
    model.run(folder, ["0.png"], key="1" * 16)
    assert model.seen == 11


def test_the_fingerprint_is_of_every_weight_and_of_the_configuration():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    own = fingerprint(state, "clip", 64)
    assert own == fingerprint(dict(reversed(state.items())), "clip", 64)
    others = [
        fingerprint(state, "clip", 65),
        fingerprint(state | {"a": state["a"].view(3, 2)}, "clip", 64),
        fingerprint(state | {"a": torch.nextafter(state["a"], state["a"] + 1)}, "clip", 64),
        fingerprint(state | {"b": state["b"].half()}, "clip", 64),
        fingerprint({"a": state["a"]}, "clip", 64),
    ]
    assert len({own, *others}) == 6


def test_bad_files_are_listed_and_not_tried_again_before_they_change(folder, monkeypatch):
    model = Model()
    (folder / "bad.png").write_bytes(b"no picture")
    found = model.run(folder)
    assert [(bad.path, bool(bad.reason)) for bad in found.bad] == [("bad.png", True)]
    tried = []
    monkeypatch.setattr(embeddings, "frames_of", lambda path, **_: tried.append(path))
    assert model.run(folder).bad == found.bad
    assert not tried
    monkeypatch.undo()
    paint(folder / "bad.png", 7)
    assert "bad.png" in model.run(folder).names


def test_bad_files_alone_are_kept_too_and_good_ones_join_them(tmp_path):
    model = Model()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert model.run(tmp_path).names == ()
    paint(tmp_path / "good.png", 0)
    for _ in range(2):
        found = model.run(tmp_path)
        assert found.names == ("good.png",)
        assert found.vectors.shape == (1, 4)
        assert [bad.path for bad in found.bad] == ["bad.png"]
    assert model.seen == 1


def test_a_store_of_another_width_is_named(folder):
    Model(width=4).run(folder)
    paint(folder / "new.png", 50)
    with pytest.raises(InputError, match="4 numbers, but the model makes 6"):
        Model(width=6).run(folder)


def test_a_file_that_is_not_there_is_listed(folder):
    found = Model().run(folder, ["0.png", "absent.png"])
    assert found.names == ("0.png",)
    assert found.bad == (("absent.png", "there is no such file"),)


def test_an_interruption_keeps_what_was_done(folder):
    model, embed = Model(), Model.embed

    def stop(signals):
        if model.seen == 4:
            raise KeyboardInterrupt
        return embed(model, signals)

    model.embed = stop
    with pytest.raises(KeyboardInterrupt):
        model.run(folder, batch=2, workers=1)
    del model.embed
    assert len(model.run(folder).names) == 5
    assert model.seen == 5


def test_many_parts_are_joined_and_say_the_same(folder, monkeypatch):
    monkeypatch.setattr(embeddings, "EVERY", -1.0)  # a part for every batch
    monkeypatch.setattr(embeddings, "PARTS", 3)
    model = Model()
    some = model.run(folder, media_below(folder)[:3], batch=1)
    assert len(list(some.place.glob("*.safetensors"))) == 3
    for name in media_below(folder)[:3]:  # each part by itself, wherever it stands
        own = model.run(folder, [name], present=media_below(folder))
        assert by_name(own) == {name: by_name(some)[name]}
    found = model.run(folder, batch=1)
    assert len(list(found.place.glob("*.safetensors"))) == 1
    fresh = Model()
    shutil.rmtree(found.place)
    assert by_name(fresh.run(folder)) == by_name(found)


def test_a_spoilt_part_is_made_again(folder):
    model = Model()
    before = model.run(folder)
    want = by_name(before)
    (part,) = before.place.glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-3])
    assert by_name(model.run(folder)) == want
    assert model.seen == 10


@pytest.mark.hostile
@pytest.mark.parametrize("spoil", ["contents", "seconds", "vectors", "start", "bad"])
def test_a_part_that_somebody_else_made_up_is_made_again(spoil, folder):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = Model()
    before = model.run(folder)
    want = by_name(before)
    (part,) = before.place.glob("*.safetensors")
    with safe_open(part, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    strange = {
        "contents": torch.tensor(7, dtype=torch.uint8),
        "seconds": torch.zeros(1, len(tensors["vectors"])),
        "vectors": tensors["vectors"][:-1],
        "start": tensors["start"].flip(0),
    }
    about |= {"bad": "[" * 100_000} if spoil == "bad" else {}
    save_file(tensors | {spoil: strange[spoil].contiguous()} if spoil in strange else tensors, part, about)
    assert by_name(model.run(folder)) == want
    assert model.seen == 10


def test_a_folder_that_cannot_be_written_to_is_held_in_memory_and_it_says_so(folder, capsys):
    (folder / ".reverie").write_text("in the way")  # rights would not stop root
    model = Model()
    found = model.run(folder, quiet=False)
    assert found.place is None
    assert len(found.names) == 5
    assert "kept in memory only" in capsys.readouterr().err


def test_a_full_disk_costs_no_vector(folder, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "whole", full)
    found = Model().run(folder)
    assert len(found.names) == 5
    assert found.place is None
    assert "No space left" in capsys.readouterr().err


def test_a_clip_has_a_vector_for_each_of_its_moments(folder):
    moving(folder / "clip.webp", 12)
    model = Model()
    found = model.run(folder)
    own = found.file == found.names.index("clip.webp")
    assert int(own.sum()) == 8
    assert found.seconds[own].tolist() == pytest.approx([0.25 * (i * 12 // 8) for i in range(8)])
    assert found.seconds[~own].abs().max() == 0
    assert len({tuple(row) for row in found.vectors[own].tolist()}) == 8


def test_several_vectors_a_picture_are_refused(folder):
    class Several(Model):
        def embed(self, signals):
            return super().embed(signals)[:, None].expand(-1, 3, -1)

    with pytest.raises(InputError, match="3 vectors a picture"):
        Several().run(folder)


def test_vectors_that_are_no_numbers_are_refused(folder):
    model = Model()
    model.embed = lambda signals: torch.full((len(signals), 3), torch.nan)
    with pytest.raises(InputError, match="not finite"):
        model.run(folder)


def test_hidden_and_foreign_files_are_not_media(folder):
    (folder / "notes.txt").write_text("x")
    paint(folder / ".hidden" / "a.png", 1)
    paint(folder / "deep" / "b.PNG", 1)
    assert media_below(folder) == ["0.png", "1.png", "2.png", "3.png", "4.png", "deep/b.PNG"]
