"""The recipes of DiT, SiT and MDT: they learn from class folders and from the world, and go on bit for bit."""

import shutil

import pytest
import torch
from PIL import Image

import reverie
from reverie.codecs.vae import Vae, VaeConfig
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.world import write
from reverie.errors import InputError
from reverie.recipes import dit
from reverie.train.log import Run


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take a second of each run; tests/train/test_log.py draws them."""
    monkeypatch.setattr(Run, "curves", lambda self: None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of five pictures each."""
    monkeypatch.setattr(dit, "QUICK", 1)
    place = tmp_path / "pictures"
    for name, colour in (("red", (220, 10, 10)), ("blue", (10, 10, 220))):
        (place / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (16 + i, 16), colour).save(place / name / f"{i}.png")
    import_folder(place, val=0.2, quiet=True)
    return place


def small(folder, out, *, objective, codec="", steps=2, **changes):
    index = Index.read(folder)
    depth = 4 if objective == "mdt" else 1
    model = dit.shape(objective, index, codec=codec, size=16, patch=2 if codec else 8, sizes=(depth, 32, 2))
    config = dit.DitRun(model=model, codec=codec, size=16, steps=steps, batch=4, lr=1e-3, **changes)
    return dit.fit(config, index, out)


@pytest.mark.parametrize("objective", ["dit", "sit", "mdt"])
def test_a_run_goes_on_bit_for_bit(objective, folder, tmp_path):
    whole = small(
        folder, tmp_path / "run", objective=objective, streamed=objective == "sit", fit="crop", flip=0.5
    )
    assert whole.config.names == ("blue", "red")
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "run" / "model")
    again = small(
        folder, tmp_path / "run", objective=objective, streamed=objective == "sit", fit="crop", flip=0.5
    )
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


def test_a_step_masks_as_many_patches_of_every_picture(folder):
    index = Index.read(folder)
    model = dit.shape("mdt", index, codec="", size=16, patch=2, sizes=(4, 32, 2))
    assert model.backbone.decoder == 2
    config = dit.DitRun(model=model, size=16, steps=2, batch=4)
    source = dit.Source(index, config, dit._built(model))
    keys = [(0, i) for i in source.good[:4]]
    drawn = [source.masked(keys, step) for step in range(40)]
    counts = [part["keep"].shape[1] for part in drawn]
    assert 32 <= min(counts) < 37 < 41 < max(counts) <= 45  # of 64: 50 to 70 % stay, anew each step
    assert all(len(set(row.tolist())) == counts[0] for row in drawn[0]["keep"])
    whole = source.batch(keys)
    assert not torch.equal(drawn[0]["masked_noise"], whole["noise"])
    assert torch.equal(source.masked(keys[1:], 3)["masked_noise"], drawn[3]["masked_noise"][1:])
    assert torch.equal(source.masked(keys[1:], 3)["keep"], drawn[3]["keep"][1:])
    plain = dit.DitRun(
        model=dit.shape("dit", index, codec="", size=16, patch=2, sizes=(1, 32, 2)), size=16, steps=2, batch=4
    )
    assert dit.Source(index, plain, dit._built(plain.model)).masked(keys, 0) == {}


def test_a_run_in_latents_draws_pictures(folder, tmp_path):
    codec = Vae(VaeConfig(widths=(8, 8), depth=1, groups=4, scale=1.0))
    reverie.save(codec, tmp_path / "codec")
    model = small(folder, tmp_path / "run", objective="dit", codec=str(tmp_path / "codec"), steps=1)
    assert model.config.backbone.size == 8
    assert model.generate_image(["red"], steps=2).shape == (1, 3, 16, 16)
    assert all(
        torch.equal(value, model.codec.state_dict()[name]) for name, value in codec.state_dict().items()
    )


def test_the_world_has_classes_that_the_judge_reads(tmp_path):
    index = write(tmp_path / "world", 6, kind="single")
    assert all(len(item.label.split()) == 2 for item in index)
    names = tuple(sorted({item.label for item in index}))
    pixels = dit.open_pixels(index, size=64)

    class Exact:
        """Draws the picture of the set that has the class."""

        def generate_image(self, classes, **_):
            by_name = {item.label: i for i, item in enumerate(index)}
            return dit.on_white(torch.stack([pixels[by_name[names[one]]][0] for one in classes]))

    assert dit.judged(Exact(), names, count=8) == {
        "judged_count": 1.0, "judged_shape": 1.0, "judged_colour": 1.0, "judged_all": 1.0,
    }  # fmt: skip


def test_what_cannot_be_learnt(folder, tmp_path):
    index = Index.read(folder)
    with pytest.raises(InputError, match="objective"):
        dit.shape("gan", index, codec="", size=16, patch=2, sizes=(1, 32, 2))
    with pytest.raises(InputError, match="size 18"):
        dit.shape("dit", index, codec="", size=18, patch=4, sizes=(1, 32, 2))
    with pytest.raises(InputError, match="no size 'M'"):
        dit.imagenet(folder, tmp_path / "run", codec="", scale="M")
    with pytest.raises(InputError, match="not a picture autoencoder"):
        dit.shape("dit", index, codec="clip-stickers", size=16, patch=2, sizes=(1, 32, 2))
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (16, 16)).save(plain / "one.png")
    (plain / "one.txt").write_text("a black square")
    with pytest.raises(InputError, match="label"):
        dit.shape(
            "dit", import_folder(plain, val=0, quiet=True), codec="", size=16, patch=2, sizes=(1, 32, 2)
        )
