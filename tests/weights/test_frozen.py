"""Frozen parts that a folder names: not repeated, found again, refused when they are gone or others."""

import dataclasses
import json
import shutil

import pytest
import torch

import reverie
from reverie.bridges.qformer import QformerConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.systems.blip2 import Blip2, Blip2Config, SightConfig, Source
from reverie.systems.clip import Clip, ClipConfig
from reverie.weights.store import hash_of

IMAGE = VitConfig(size=16, patch=8, width=24, depth=2, heads=2)
INNER = QformerConfig(
    queries=3,
    width=16,
    depth=2,
    heads=2,
    hidden=24,
    context_width=24,
    vocab=60,
    length=12,
    start=2,
    end=3,
    decode=4,
)


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    text = TextConfig(vocab=40, length=8, width=16, depth=1, heads=2)
    made = Clip(ClipConfig(image=IMAGE, text=text, width=8))
    reverie.save(made, tmp_path / "clip")
    return made


def asks(clip, folder) -> Blip2:
    source = Source(model=str(folder), hash=hash_of(clip.image))
    torch.manual_seed(1)
    return Blip2(
        Blip2Config(sight=SightConfig(image=IMAGE, qformer=INNER, source=source), width=8), None, clip.image
    )


@torch.no_grad()
def test_a_folder_names_its_tower_and_finds_it_again(clip, tmp_path):
    made = asks(clip, tmp_path / "clip").eval()
    assert not any("image." in name for name in made.state_dict())
    reverie.save(made, tmp_path / "blip2")
    found = reverie.load(tmp_path / "blip2")
    image = torch.rand(2, 3, 16, 16)
    assert torch.allclose(found.embed_image(image), made.embed_image(image), atol=1e-6)
    assert hash_of(found) == hash_of(made)
    assert all(
        torch.equal(value, clip.image.state_dict()[name])
        for name, value in found.sight.image.state_dict().items()
    )
    own = Blip2(
        dataclasses.replace(made.config, sight=dataclasses.replace(made.config.sight, source=Source()))
    )
    assert any("image." in name for name in own.state_dict())
    assert own.state_dict().keys() > made.state_dict().keys()


def test_weights_are_loaded_beside_a_tower_that_is_kept_elsewhere(clip, tmp_path):
    made, other = asks(clip, tmp_path / "clip"), asks(clip, tmp_path / "clip")
    with torch.no_grad():
        made.matching.weight.add_(1)
    before = hash_of(other.sight.image)
    other.load_state_dict(made.state_dict())
    assert hash_of(other) == hash_of(made)
    assert hash_of(other.sight.image) == before


def test_a_tower_that_is_gone_or_another_is_refused(clip, tmp_path):
    reverie.save(asks(clip, tmp_path / "clip"), tmp_path / "blip2")
    with torch.no_grad():
        clip.image.positions.add_(1)
    reverie.save(clip, tmp_path / "clip")
    with pytest.raises(InputError, match="holds other weights now"):
        reverie.load(tmp_path / "blip2")
    shutil.rmtree(tmp_path / "clip")
    with pytest.raises(InputError, match="cannot be loaded"):
        reverie.load(tmp_path / "blip2")


def test_a_tower_is_not_looked_for_in_a_ring(clip, tmp_path):
    made = asks(clip, tmp_path / "blip2")
    reverie.save(made, tmp_path / "blip2")
    with pytest.raises(InputError, match="frozen parts elsewhere"):
        reverie.load(tmp_path / "blip2")


def test_a_folder_that_moved_is_named_anew(clip, tmp_path):
    reverie.save(asks(clip, tmp_path / "clip"), tmp_path / "blip2")
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    record = json.loads((tmp_path / "blip2" / "config.json").read_text())
    record["config"]["sight"]["source"]["model"] = str(tmp_path / "elsewhere")
    (tmp_path / "blip2" / "config.json").write_text(json.dumps(record))
    assert isinstance(reverie.load(tmp_path / "blip2"), Blip2)
