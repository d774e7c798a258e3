"""BLIP's recipes: from nothing, from a CLIP's tower, from a Blip; with files that cannot be read; the mistakes."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import reverie
from reverie.data.importers import import_folder
from reverie.errors import InputError
from reverie.recipes import blip
from reverie.systems.blip import Blip
from reverie.systems.clip import Clip

WORDS = SimpleNamespace(vocab=30_524, pad=0, special={"[CLS]": 2, "[SEP]": 3, "[DEC]": 4, "[ENC]": 5})
NAMES = ("a bright red wall", "a dark green wall", "one plain blue wall")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of three colours, one damaged after the import, one that never was a picture."""
    place = tmp_path_factory.mktemp("walls")
    for i in range(12):
        colour = [20 + 4 * i] * 3
        colour[i % 3] = 220 - 5 * i
        Image.new("RGB", (20, 16), tuple(colour)).save(place / f"{i:02d}.png")
        (place / f"{i:02d}.txt").write_text(NAMES[i % 3])
    (place / "note.png").write_text("no picture")
    (place / "note.txt").write_text("a note")
    import_folder(place, val=0, quiet=True)
    (place / "11.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return place


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(blip, "shape", partial(blip.shape, width=64, depth=2))


@pytest.fixture(scope="module")
def learnt(folder, tmp_path_factory):
    """A small Blip that has learnt the three colours."""
    place = tmp_path_factory.mktemp("learnt")
    shape = blip.shape
    blip.shape = partial(shape, width=64, depth=2)
    try:
        blip.tiny(folder, place, steps=60, batch=9, lr=3e-3, size=16, queue=8)
    finally:
        blip.shape = shape
    return place


def walls(*colours):
    signal = torch.tensor(colours, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 16, 16)
    return signal / 127.5 - 1


PLAIN = walls((200, 30, 30), (30, 200, 30), (30, 30, 200))


def test_it_learns_to_describe_to_find_and_to_match(learnt):
    model = reverie.load(learnt / "model")
    for sampling in ("greedy", "beam"):
        captions = model.caption(PLAIN, sampling=sampling)
        assert ["red" in captions[0], "green" in captions[1], "blue" in captions[2]] == [True] * 3, captions
    similarity = model.embed_image(PLAIN) @ model.embed_text(list(NAMES)).T
    assert similarity.argmax(1).tolist() == [0, 1, 2]
    right, wrong = model.match(PLAIN, list(NAMES)), model.match(PLAIN, [*NAMES[1:], NAMES[0]])
    assert right.min() > wrong.max()


def test_bad_files_are_left_out_and_named(learnt):
    rows = [json.loads(line) for line in (learnt / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["11.png"]
    assert json.loads((learnt / "config.json").read_text())["batch"] == 9


def test_fine_tuning_for_captions_leaves_the_other_heads(learnt, folder, tmp_path):
    start = reverie.load(learnt / "model")
    tuned = blip.finetune(
        folder,
        tmp_path / "run",
        start=str(learnt / "model"),
        prompt="a picture of",
        steps=3,
        batch=6,
        strength=0.0,
    )
    assert tuned.config.prompt == "a picture of"
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "writing" in metrics
    assert "contrast" not in metrics
    changed = {
        name.split(".")[0]
        for name, value in tuned.state_dict().items()
        if not torch.equal(value, start.state_dict()[name])
    }
    assert changed == {"image", "text"}
    moved = [
        name
        for name, value in tuned.text.state_dict().items()
        if not torch.equal(value, start.text.state_dict()[name])
    ]
    assert not [name for name in moved if ".attention." in name]  # the reader's own
    assert not tuned.caption(PLAIN)[0].startswith("a picture of")
    assert tuned.caption(PLAIN, prompt="a picture of")[0].startswith("a picture of")


@pytest.mark.parametrize("task", blip.TASKS)
def test_captions_are_written_behind_the_prompt_and_read_without_it(
    learnt, folder, tmp_path, monkeypatch, task
):
    seen = {}
    loss = blip.BlipTraining.loss

    def kept(self, batch, **how):
        seen.update(batch)
        return loss(self, batch, **how)

    monkeypatch.setattr(blip.BlipTraining, "loss", kept)
    monkeypatch.setattr(blip, "PHRASES", {"en": ("never {}",), "zh": ("never {}",)})
    tuned = blip.finetune(
        folder,
        tmp_path / "run",
        start=str(learnt / "model"),
        task=task,
        prompt="a picture of",
        steps=1,
        batch=6,
        queue=0,
    )
    given = int(seen["given"])
    for read, written in zip(seen["tokens"].tolist(), seen["written"].tolist(), strict=True):
        texts = tuned.tokenizer.decode([read[1:], written[1:], written[given:]])
        assert texts == [texts[0], f"a picture of {texts[0]}", texts[0]]  # the last: what the loss counts
        assert texts[0] in NAMES


def test_fine_tuning_for_retrieval_leaves_the_words(learnt, folder, tmp_path):
    start = reverie.load(learnt / "model")
    tuned = blip.finetune(
        folder, tmp_path / "run", start=str(learnt / "model"), task="retrieval", steps=2, batch=6, queue=8
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(tuned.text.words.parameters(), start.text.words.parameters(), strict=True)
    )
    assert not torch.equal(tuned.matching.weight, start.matching.weight)


def test_the_image_tower_of_a_clip_is_taken_over(folder, tmp_path):
    clip = reverie.load("clip-stickers")
    index = blip.captioned(blip.open_index(folder))
    begun = blip.begin("clip-stickers", index, blip.shape, seed=0)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(
        begun.image.pool(begun.see(image)), clip.image.embed(clip._pixels(image, checked=False))
    )
    assert begun.config.fit == clip.config.fit
    assert isinstance(clip, Clip)
    assert isinstance(begun, Blip)


@pytest.mark.parametrize(
    ("recipe", "how", "said"),
    [
        (blip.tiny, {"batch": 1}, "batch is 1: a BLIP learns from comparing"),
        (blip.tiny, {"start": "sora-stickers"}, "sora-stickers"),
        (blip.finetune, {"start": "clip-stickers"}, "clip-stickers is a Clip, not a Blip"),
        (blip.finetune, {"task": "sing"}, "task is 'sing': choose all, caption, retrieval"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, small, recipe, how, said):
    with pytest.raises(InputError, match=said):
        recipe(folder, tmp_path / "run", steps=1, **how)


def test_a_folder_without_captions_is_refused(tmp_path, small):
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(tmp_path / "data" / f"{i}.png")
    with pytest.raises(InputError, match="no caption: write one into 0"):
        blip.tiny(tmp_path / "data", tmp_path / "run", steps=1)


@pytest.mark.parametrize(("recipe", "steps"), [(blip.paper_base, 97_000), (blip.paper_large, 117_000)])
def test_the_papers_runs_have_its_hyperparameters(recipe, steps, folder, tmp_path, monkeypatch):
    """Section 4.1, and the authors' configuration."""
    seen = {}
    monkeypatch.setattr(blip, "fit", lambda config, model, *_, **__: seen.update(config=config))
    monkeypatch.setattr(blip, "begin", lambda start, index, shape, **_: torch.nn.Module())
    with pytest.raises(AttributeError):
        recipe(folder, tmp_path / "run")
    monkeypatch.setattr(
        blip, "begin", lambda start, index, shape, **_: type("M", (), {"config": shape(WORDS)})
    )
    recipe(folder, tmp_path / "run")
    config = seen["config"]
    assert (config.steps, config.queue, config.momentum, config.alpha, config.warmup) == (
        steps,
        57_600,
        0.995,
        0.4,
        3000,
    )
    assert (config.decay, config.weight_decay, config.smoothing, config.length) == (0.9, 0.05, 0.1, 30)
    assert (config.model.image.size, config.model.width, config.model.text.depth) == (224, 256, 12)


def test_a_size_that_the_start_does_not_see_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="size is 32, but clip-stickers sees 64 pixels"):
        blip.tiny(folder, tmp_path / "run", steps=1, size=32, start="clip-stickers")
