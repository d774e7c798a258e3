"""Codecs of codes and transformers over them, trained end to end on the world, stopped, and drawn with."""

import json

import pytest
import torch

import reverie
from reverie.cli import main
from reverie.errors import InputError
from reverie.recipes import dalle, picture_codes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A little world, both codecs, and both models on it."""
    home = tmp_path_factory.mktemp("dalle")
    small = {"steps": 4, "batch": 4, "size": 32, "vocab": 16}
    picture_codes.dvae(home / "world", home / "dvae", world=40, width=8, **small)
    picture_codes.vqgan(
        home / "world",
        home / "vq",
        world=40,
        width=8,
        levels=2,
        dim=4,
        adversarial=0.5,
        adversarial_from=2,
        **small,
    )
    for objective, codec in (("dalle", "dvae"), ("maskgit", "vq")):
        dalle.world(
            home / "world", home / objective, codec=str(home / codec / "model"), objective=objective, count=40, steps=4,
            batch=4, size=32, width=64, depth=2,
        )  # fmt: skip
    return home


@pytest.mark.parametrize("name", ["dvae", "vq", "dalle", "maskgit"])
def test_a_run_leaves_a_model_metrics_and_pictures(made, name):
    folder = made / name
    assert reverie.load(folder / "model") is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = {"dvae": "val_usage", "vq": "val_perplexity", "dalle": "val_codes", "maskgit": "val_right"}[name]
    assert any(wanted in row for row in rows)
    assert any((folder / "samples").iterdir())


def test_a_codec_that_goes_on_is_the_same_as_one_that_was_not_stopped(tmp_path, made):
    """The codebook's averages are a part of the checkpoint."""
    asked = {
        "world": 40,
        "width": 8,
        "levels": 2,
        "dim": 4,
        "batch": 4,
        "size": 32,
        "vocab": 16,
        "perceptual": 0.0,
    }
    whole = picture_codes.vqgan(made / "world", tmp_path / "whole", steps=6, **asked)

    class Enough(Exception):
        pass

    original, count = picture_codes.Learner.advance, [0]

    def advance(self, seed, step):
        original(self, seed, step)
        count[0] += 1
        if count[0] == 4:
            raise Enough

    picture_codes.Learner.advance = advance
    try:
        with pytest.raises(Enough):
            picture_codes.vqgan(made / "world", tmp_path / "parts", steps=6, **asked)
    finally:
        picture_codes.Learner.advance = original
    again = picture_codes.vqgan(made / "world", tmp_path / "parts", steps=6, **asked)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_best_of_many_is_drawn_by_parts_and_a_stop_leaves_what_there_is(made, tmp_path, capsys):
    from reverie.recipes.choosing import TOGETHER, best_of_many

    asked = []

    def draw(seeds, tell):
        asked.append(len(seeds))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return torch.stack([torch.full((3, 1, 4, 4), seed / 100) for seed in seeds])

    class Judge:
        def embed_text(self, texts):
            return torch.ones(1, 1)

        def embed_image(self, images):
            return images.mean((1, 2, 3))[:, None]

    best, number = best_of_many(draw, Judge(), "x", seed=0, count=512, progress=lambda done, total: None)
    assert asked == [TOGETHER] * 3
    assert number == 2 * TOGETHER - 1
    assert float(best.mean()) == pytest.approx((2 * TOGETHER - 1) / 100)
    assert "the best of 32 of 512" in capsys.readouterr().err


def test_sample_draws_completes_and_chooses(made, tmp_path, capsys):
    model, out = str(made / "dalle" / "model"), tmp_path / "out"
    assert (
        main(["sample", "a red circle", "--model", model, "--out", str(out), "--best-of", "3", "--top", "4"])
        == 0
    )
    (first,) = out.glob("*.png")
    again = [
        "sample",
        "a red circle",
        "--model",
        model,
        "--out",
        str(out),
        "--given",
        str(first),
        "--keep",
        "16",
    ]
    assert main(again) == 0
    assert len(list(out.glob("*.png"))) == 2
    assert main(
        [
            "sample",
            "a red circle",
            "--model",
            str(made / "maskgit" / "model"),
            "--out",
            str(out),
            "--top",
            "4",
        ]
    )
    assert "has no top to choose" in capsys.readouterr().err
    long = "a big red circle left of a small green star " * 4
    assert main(["sample", long, "--model", model, "--out", str(out), "--too-long", "refuse"])
    assert "does not fit into 40" in capsys.readouterr().err


def test_the_world_s_judge_measures_both(made, tmp_path):
    from reverie.recipes.measure_generators import Draws, world

    for objective in ("dalle", "maskgit"):
        found = world(
            tmp_path / objective, model=str(made / objective / "model"), ask=Draws(count=4, batch=4)
        )
        assert "all" in found.numbers["generator"]


def test_what_cannot_be_trained_is_said(made, tmp_path):
    codec = str(made / "dvae" / "model")
    for wrong, said in (
        ({"codec": "clip-stickers"}, "is a Clip, which makes no codes"),
        ({"codec": codec, "size": 30}, "size 30 cannot be encoded: give a multiple of 4"),
        ({"codec": codec, "objective": "gan"}, "no objective 'gan'"),
        ({"codec": codec, "attention": "some"}, "attention is 'some'"),
        ({"codec": codec, "width": 65}, "width 65"),
    ):
        with pytest.raises(InputError, match=said):
            dalle.world(made / "world", tmp_path / "no", count=40, **wrong)
    with pytest.raises(InputError, match="size 33 cannot be encoded"):
        picture_codes.dvae(made / "world", tmp_path / "no", world=40, size=33, width=8)


@pytest.mark.parametrize(("name", "vocab"), [("dvae", 16), ("vq", 16)])
def test_what_a_codec_of_codes_keeps_is_measured(made, tmp_path, name, vocab):
    from reverie.recipes.measure_codec import reconstructions

    codec = made / name / "model"
    found = reconstructions(made / "world" / "pictures", tmp_path, codec=codec, size=32, split="train")
    stride = reverie.load(codec).stride
    assert found.numbers["pictures"]["codec"]["rate"]["bits"] == pytest.approx(4 / stride**2)
    assert 1 / vocab <= found.numbers["codebook"]["usage"] <= 1
    assert (tmp_path / "pictures.png").exists()
