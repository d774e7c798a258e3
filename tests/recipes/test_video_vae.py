"""The codec's recipes: what counts at which step, batches of random length, constants over pictures and clips."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import reverie
from reverie.backbones.discriminator import Discriminator, DiscriminatorConfig
from reverie.cli import main
from reverie.codecs.vae import Vae, VaeConfig
from reverie.codecs.video_vae import VideoVae, VideoVaeConfig
from reverie.data.index import Index
from reverie.data.latents import Latents
from reverie.errors import InputError
from reverie.evals.reconstruction import psnr, ssim
from reverie.recipes import video_vae
from reverie.recipes.measure_generators import Real
from reverie.recipes.parts import load_codec
from reverie.recipes.search import key_of
from reverie.recipes.video_vae import Game, Source, VaeRun, Weights, last_weight, shape
from reverie.train.log import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "resume"))
import tuner

SMALL = VideoVaeConfig(channels=4, widths=(8, 8), temporal=(True,))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("vae")
    tuner.prepare(where)
    return where


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """The folder of a run of two players."""
    before, Run.curves = Run.curves, lambda self: None
    try:
        tuner.run(place, place / "run", way="vae")
    finally:
        Run.curves = before
    return place / "run"


def config(**settings) -> VaeRun:
    return VaeRun(**{"model": SMALL, "steps": 1, "batch": 2, "clips": 1, "frames": 9, "size": 16} | settings)


def test_strides_have_their_shapes():
    for stride, expected in (("4x8x8", (4, 8)), ("1x8x8", (1, 8)), ("4x4x4", (4, 4))):
        assert shape(stride, channels=16, width=32).stride == expected
    with pytest.raises(InputError, match="stride is '2x2x2'"):
        shape("2x2x2", channels=16, width=32)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": 18}, "size 18"),
        ({"batch": 0}, "batch is 0"),
        ({"frames": 2}, "frames is 2"),
        ({"frames": 99}, "frames is 99"),
        ({"weights": Weights(kl=-1.0)}, "kl is -1.0"),
        ({"weights": Weights(perceptual_every=0)}, "perceptual_every is 0"),
    ],
)
def test_what_cannot_be_is_refused(place, tmp_path, settings, told):
    with pytest.raises(InputError, match=told):
        video_vae.fit(config(**settings), Index.read(place / "moving"), tmp_path / "run")


def test_the_players_play_when_they_should(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "l1", "kl", "grad_norm"} <= rows[-1].keys()
    assert {"discriminator/loss", "fooled", "perceptual"} <= rows[-1].keys()  # the last one is its turn
    weights = Weights(adversarial=0.5, adversarial_from=2, adversarial_every=2)
    assert [step for step in range(8) if weights.plays(step)] == [3, 5, 7]
    assert not any(Weights().plays(step) for step in range(8))


def test_each_loss_counts_at_its_steps():
    torch.manual_seed(0)
    weights = Weights(perceptual=0.2, perceptual_every=3, kl=0.01, adversarial=0.5, adversarial_from=2)
    model, judge = VideoVae(SMALL), Discriminator(DiscriminatorConfig(width=8, depth=1))
    game = Game(weights, model, judge, features=lambda x: [x.flatten(2).transpose(1, 2)])
    batch = {"video": torch.rand(2, 3, 3, 16, 16) * 2 - 1, "noise": torch.zeros(2, 4, 2, 4, 4)}
    for step in range(4):
        found = game.codec_loss(batch | {"step": step})
        assert ("perceptual" in found) == (step == 2)
        assert ("fooled" in found) == (step >= 2)
        expected = 0.5 * found["l1"] + 2 * found["l2"] + 0.01 * found["kl"]
        if step == 2:
            expected = expected + 3 * 0.2 * found["perceptual"]
        if step >= 2:
            expected = expected + 0.5 * found["adaptive"] * found["fooled"]
        torch.testing.assert_close(found["loss"].detach(), expected)
    assert game.judge_loss(batch | {"step": 2})["loss"].requires_grad
    game.judge_loss(batch | {"step": 2})["loss"].backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        drawn = model.decode(model.encode(batch["video"]))
    last_weight(model.decoder).data.zero_()
    assert not torch.allclose(model.decode(model.encode(batch["video"])), drawn)


def test_batches_have_as_many_frames_as_a_step_draws(place):
    index = Index.read(place / "moving").select(video=True)
    source = Source(index, config(), VideoVae(SMALL), frames=video_vae.KEPT_FRAMES)
    lengths = {source.batch(step, 1)["video"].shape[2] for step in range(40)}
    assert lengths == {3, 5, 7, 9}
    one, again = (source.batch(3, 2) for _ in range(2))
    assert one["video"].equal(again["video"])
    assert one["noise"].equal(again["noise"])
    assert one["noise"].shape[2:] == (1 + (one["video"].shape[2] - 1) // 2, 4, 4)
    moving = [batch["video"][0, 1, :, 0, 0].diff() for batch in (source.batch(step, 1) for step in range(12))]
    assert all((steps >= 0).all() for steps in moving)  # frames of these clips turn greener, in their order


def test_latents_are_normal_over_pictures_and_clips(place, trained):
    model = reverie.load(trained / "model")
    index = Index.read(place / "moving")
    raw = [
        model.encode(
            Source(index.select(video=kept > 1), config(frames=5), model, frames=kept).evenly(9, most)
        )
        for kept, most in ((1, 1), (video_vae.KEPT_FRAMES, 5))
    ]
    mean = torch.stack([some.mean((0, 2, 3, 4)) for some in raw]).mean(0)
    square = torch.stack([some.square().mean((0, 2, 3, 4)) for some in raw]).mean(0)
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(square, torch.ones(4), atol=1e-3, rtol=0)


def test_a_run_begins_from_a_folder(place, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "curves", lambda self: None)
    start = str(trained / "model")
    assert shape("4x8x8", channels=99, width=2, start=start) == SMALL
    begun = config(start=start, steps=1, lr=0.0, frames=5, weights=Weights(perceptual=0))
    model = video_vae.fit(begun, Index.read(place / "moving"), tmp_path / "run")
    before = reverie.load(trained / "model").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_measurement_is_what_the_codec_gives(place, trained, tmp_path, capsys):
    codec, out = trained / "model", tmp_path / "out"
    words = [
        "eval",
        "reconstruction",
        str(place / "moving"),
        "--codec",
        str(codec),
        "--size",
        "16",
        "--frames",
        "5",
    ]
    assert main([*words, "--split", "train", "--batch", "2", "--out", str(out)]) == 0
    assert "PSNR" in capsys.readouterr().out
    numbers = json.loads((out / "numbers.json").read_text())["numbers"]
    assert {path.name for path in out.iterdir()} >= {"table.md", "pictures.png", "clips.png", "clips.webp"}
    assert numbers["pictures"]["codec"]["count"] == numbers["clips"]["codec"]["count"] == 3
    index, model = Index.read(place / "moving"), reverie.load(codec)
    for kind, most in (("pictures", 1), ("clips", 5)):
        true = Real(index.select(video=most > 1), (16, 16), most)[:]
        true = true[:, :, None] if most == 1 else true
        drawn = model.decode(model.encode(true).half().float()).clamp(-1, 1)
        found = numbers[kind]["codec"]
        assert found["psnr"]["values"] == pytest.approx(psnr(drawn, true).tolist(), rel=1e-4)
        assert found["ssim"]["values"] == pytest.approx(ssim(drawn, true).tolist(), rel=1e-4)
        assert found["rate"]["numbers"] == pytest.approx(
            torch.Size(model.latent_shape(most, (16, 16))).numel() / (most * 256)
        )
    torch.manual_seed(0)
    of_pictures = Vae(VaeConfig(channels=3, widths=(8, 16), depth=1, groups=4)).eval()
    reverie.save(of_pictures, tmp_path / "vae")
    words[4] = str(tmp_path / "vae")
    assert main([*words, "--split", "train", "--out", str(out)]) == 0  # its frames one by one
    numbers = json.loads((out / "numbers.json").read_text())["numbers"]
    assert numbers["stride"] == [1, 2, 2]
    true = Real(index.select(video=True), (16, 16), 5)[:]
    drawn = torch.stack(
        [of_pictures.decode(of_pictures.encode(clip).half().float()) for clip in true.transpose(1, 2)]
    )
    found = numbers["clips"]["codec"]["psnr"]["values"]
    assert found == pytest.approx(psnr(drawn.transpose(1, 2).detach().clamp(-1, 1), true).tolist(), rel=1e-4)
    assert main(["data", "encode", str(place / "moving"), *words[3:7]]) == 0
    kept = Latents.open(index, key=key_of(load_codec(tmp_path / "vae")), size=(16, 16))
    name = next(item for item in index if item.frames == 1)
    still = Real(index.select(video=False), (16, 16), 1)[:1]
    torch.testing.assert_close(kept[name.hash][:, 0], of_pictures.encode(still)[0].detach())
    assert main([*words[:4], "clip-stickers"]) == 2
    assert "is a Clip: give the folder of an autoencoder" in capsys.readouterr().err
