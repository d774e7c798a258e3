"""Clips that go on: what knows the truth reaches all, what stands still or turns back nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

import reverie
from reverie import cli
from reverie.data.world import World
from reverie.errors import InputError
from reverie.evals.continuation import kept, velocity
from reverie.recipes.measure_continuation import continuation
from reverie.recipes.measure_generators import UNSEEN, Draws

FRAMES, SIZE = 16, (64, 64)


@pytest.fixture(scope="module")
def films() -> torch.Tensor:
    """The clips that are measured on, whole."""
    world = World(120, frames=FRAMES, size=SIZE, kind="motion", first=UNSEEN)
    where = [i for i in range(120) if world.scene(i).things[0].motion.kind == "move"][:3]
    pixels = torch.stack([world[i].pixels[:, :3] for i in where])
    return rearrange(pixels.float() / 127.5 - 1, "b f c h w -> b c f h w")


class Painter:
    """Stands for Sora: `draws(whole, mask)` makes a clip of what it should be and what of it is given."""

    config = SimpleNamespace(frames=FRAMES, size=SIZE, fps=12.0)
    extend = generate_video = None

    def __init__(self, films, draws):
        self.films, self.draws, self.at = films, draws, 0

    def to(self, device):
        return self

    def size_of(self, frames):
        return SIZE

    def generate(self, prompts, *, frames, size, known, known_mask, seed, together, steps, guidance):
        some = self.films[self.at : self.at + len(prompts)]
        self.at = (self.at + len(prompts)) % len(self.films)
        out = torch.stack([self.draws(*one) for one in zip(some, known_mask, strict=True)])
        assert len(seed) == len(prompts)
        return torch.where(known_mask[:, None, :, None, None], known, out)


def true(whole, mask):
    return whole


def frozen(whole, mask):
    return whole[:, FRAMES // 2 - 1 : FRAMES // 2].expand_as(whole)


def back(whole, mask):
    return torch.cat([whole[:, : FRAMES // 2], whole[:, : FRAMES // 2].flip(1)], dim=1)


def slow(whole, mask):
    half = FRAMES // 2
    places = [*range(half), *(half - 1 + (i + 1) // 3 for i in range(half))]
    return whole[:, places]


@pytest.mark.parametrize(
    ("draws", "direction", "speed", "both"),
    [(true, 1.0, 1.0, 1.0), (frozen, 0.0, 0.0, 0.0), (back, 0.0, 1.0, 0.0), (slow, 1.0, 0.0, 0.0)],
)
def test_what_is_kept_is_told(films, tmp_path, monkeypatch, draws, direction, speed, both):
    monkeypatch.setattr(reverie, "load", lambda name, **_: Painter(films, draws))
    done = continuation(tmp_path, model="painter", ask=Draws(count=3, batch=2))
    numbers = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    for way in ("frames and words", "frames alone"):
        found = [numbers[f"{name}, {way}"] for name in ("direction", "speed", "motion")]
        assert found == [direction, speed, both]
    for name in ("there", "direction", "speed", "motion"):
        assert numbers[f"{name}, real"] == 1.0
    assert numbers["motion, other scenes"] < 0.5
    assert "in the same direction" in str(done)
    assert (tmp_path / "frames-alone.png").exists()


def test_a_thing_is_followed_and_missed(films):
    world = World(120, frames=FRAMES, size=SIZE, kind="motion", first=UNSEEN)
    scene = next(s for i in range(120) if (s := world.scene(i)).things[0].motion.kind == "move")
    thing = scene.things[0]
    like = {"shape": thing.shape, "colour": thing.colour}
    found = velocity(films[0], **like)
    step = (thing.track.dx / (FRAMES - 1), thing.track.dy / (FRAMES - 1))
    assert found == pytest.approx(step, abs=0.004)
    gone = films[0].clone()
    gone[:, -2:] = films[0][:, :1, :1, :1]  # nothing but the ground
    assert velocity(gone, **like) is None
    assert not kept(step, None).there
    turned = (step[0] - 0.42 * step[1], step[1] + 0.42 * step[0])  # by 22.8 degrees
    assert not kept(step, turned).direction
    assert kept(step, (0.95 * step[0], 0.95 * step[1])) == kept(step, step)


def test_mistakes_are_told(films, tmp_path, monkeypatch, capsys):
    painter = Painter(films, true)
    monkeypatch.setattr(reverie, "load", lambda name, **_: painter)
    painter.config = SimpleNamespace(frames=4, size=SIZE, fps=12.0)
    with pytest.raises(InputError, match="clips of 4 frames"):
        continuation(tmp_path, model="painter")
    monkeypatch.setattr(
        reverie, "load", lambda name, **_: SimpleNamespace(to=lambda d: SimpleNamespace(), generate_video=1)
    )
    assert cli.main(["eval", "continuation", "painter", "--out", str(tmp_path)]) == 2
    assert "takes no given frames" in capsys.readouterr().err
