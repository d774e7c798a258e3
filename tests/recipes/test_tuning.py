"""Training with parts left out, and going on from weights: which parts are seen, learnt, kept and saved."""

import dataclasses

import pytest
import torch
from PIL import Image

from reverie.codecs.bpe import Bpe
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.encoders.clip_resnet import ClipResnetConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.recipes import clip
from reverie.systems.clip import Clip, ClipConfig

COLOURS = {
    "bright red wall": (220, 20, 20),
    "dark green wall": (20, 180, 40),
    "plain blue wall": (20, 40, 220),
}


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
