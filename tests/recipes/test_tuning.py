"""Training with parts left out, and going on from weights: which parts are seen, learnt, kept and saved."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

import reverie
from reverie.codecs.bpe import Bpe
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.encoders.clip_resnet import ClipResnetConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.nn.lora import load_lora
from reverie.recipes import clip
from reverie.recipes.clip import zero_shot_of
from reverie.recipes.clip_finetune import finetune
from reverie.systems.clip import Clip, ClipConfig
from reverie.train.log import Run
from reverie.weights import files

COLOURS = {
    "bright red wall": (220, 20, 20),
    "dark green wall": (20, 180, 40),
    "plain blue wall": (20, 40, 220),
}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take a second of each run; tests/train/test_log.py draws them."""
    monkeypatch.setattr(Run, "curves", lambda self: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures of each of three colours, in folders of their names."""
    place = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        (place / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), tuple(max(c - 9 * i, 0) for c in colour)).save(
                place / name / f"{i}.png"
            )
    import_folder(place, val=0, quiet=True)
    return place


@pytest.fixture(scope="module")
def words():
    return Bpe.train(list(COLOURS) * 3, vocab=600)


def small(words, seed=0, **image):
    torch.manual_seed(seed)
    text = TextConfig(vocab=words.vocab, length=10, width=32, depth=2, heads=2, end=words.end)
    vit = VitConfig(**{"size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2} | image)
    return Clip(ClipConfig(image=vit, text=text, width=16), words)


def run_of(model, **settings):
    return clip.ClipRun(
        **{"model": model.config, "steps": 4, "batch": 6, "strength": 0.0, "warmup": 1} | settings
    )


def test_steps_see_fewer_patches_and_words_until_the_last(folder, words, tmp_path):
    model = small(words)
    seen, read = [], []
    model.image.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    tokens = model.tokens

    def noted(texts):
        read.append(int((texts != words.pad).sum()))
        return tokens(texts)

    model.tokens = noted
    config = run_of(model, drop=0.75, drop_text=0.9, unmasked=0.5)
    clip.fit(config, model, Index.read(folder), tmp_path, measures={})
    assert seen[-4:] == [5, 5, 17, 17]  # of 16 patches, and the class token
    assert max(read[-4:-2]) < min(read[-2:])
    assert set(read[-4:-2]) == {6 * 3}, "start, one token, end"


def test_what_cannot_be_left_out_is_refused(folder, words, tmp_path):
    model = small(words)
    for settings, told in (
        ({"drop": 1.0}, "drop is 1.0"),
        ({"drop_text": -1.0}, "drop_text is -1.0"),
        ({"unmasked": 1.5}, "unmasked is 1.5"),
    ):
        with pytest.raises(InputError, match=told):
            clip.fit(run_of(model, **settings), model, Index.read(folder), tmp_path, measures={})
    resnet = dataclasses.replace(
        model.config, image=ClipResnetConfig(size=32, width=8, depths=(1, 1, 1, 1), heads=2, out=16)
    )
    fixed = dataclasses.replace(
        model.config, text=dataclasses.replace(model.config.text, pool="last", causal=False)
    )
    for config, settings, told in (
        (resnet, {"drop": 0.5}, "ResNet"),
        (fixed, {"drop_text": 0.5}, "fixed number"),
    ):
        with pytest.raises(InputError, match=told):
            clip.fit(run_of(Clip(config, words), **settings), Clip(config, words), Index.read(folder), tmp_path,
                     measures={})  # fmt: skip


# Fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(words, tmp_path_factory):
    """The folder of the weights that are fine-tuned."""
    return reverie.save(small(words), tmp_path_factory.mktemp("start") / "model")


def tune(folder, begun, out, **settings):
    settings = {"steps": 3, "batch": 6, "lr": 1e-2, "strength": 0.0} | settings
    return finetune(folder, out, start=str(begun), **settings)


def changed(model, start):
    """The names of what differs from the folder `start`."""
    before = reverie.load(start).state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_does_not_change(folder, begun, tmp_path, tower):
    found = changed(tune(folder, begun, tmp_path, lock=tower, layer_decay=0.8), begun)
    other = {"image": "text", "text": "image"}[tower]
    assert not any(name.startswith(tower) for name in found)
    assert {f"{other}_projection.weight", f"{other}.positions", "log_scale"} <= found


def test_adapters_alone_are_trained_and_saved(folder, begun, tmp_path):
    tuned = tune(folder, begun, tmp_path, lora=2, alpha=4.0, lock="text")
    stored = files.read(tmp_path / "lora.safetensors")
    layers = {name.partition(".lora.")[0] for name in stored}
    assert changed(tuned, begun) == {f"{name}.weight" for name in layers}
    assert all(name.startswith("image.blocks.") for name in layers)
    assert len(layers) == 8
    again = reverie.load(begun)
    load_lora(again, stored)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(again.embed_image(image), tuned.embed_image(image), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(reverie.load(begun).embed_image(image), tuned.embed_image(image), atol=1e-4)


def test_the_model_lies_between_start_and_end(folder, begun, tmp_path, capsys):
    model = tune(folder, begun, tmp_path, blend=0.25, known=folder)
    tuned, before = reverie.load(tmp_path / "tuned").state_dict(), reverie.load(begun).state_dict()
    assert changed(reverie.load(tmp_path / "tuned"), begun)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * tuned[name], msg=name)
    rows = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    assert list(rows) == ["start", "tuned", "blend 0.25"]
    measured = zero_shot_of(reverie.load(begun), val=Index.read(folder))
    assert rows["start"] == {f"known {key}": value for key, value in measured.items()}
    assert "blend 0.25" in capsys.readouterr().out
    assert changed(tune(folder, begun, tmp_path / "none", blend=0.0), begun) == set()


def test_fine_tuning_learns_the_names(folder, begun, tmp_path):
    tune(folder, begun, tmp_path, steps=25, batch=12, lr=5e-3, known=folder)
    rows = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    assert rows["tuned"]["known top1"] == 1.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lock": "both"}, "lock is 'both'"),
        ({"lora": -1}, "lora is -1"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"blend": 2.0}, "blend is 2.0"),
        ({"layer_decay": 0.0}, "layer decay is 0.0"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(folder, begun, tmp_path, settings, told):
    with pytest.raises(InputError, match=told):
        tune(folder, begun, tmp_path, **settings)


def test_what_was_known_needs_labels(folder, begun, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.new("RGB", (16, 16)).save(plain / "a.png")
    (plain / "a.txt").write_text("black")
    with pytest.raises(InputError, match="has a label"):
        tune(folder, begun, tmp_path / "run", known=plain)
