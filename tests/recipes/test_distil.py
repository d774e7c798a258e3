"""A student against its teacher: no loss where both do the same, nearer after training, and no guidance of its own."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

import reverie
from reverie import rng
from reverie.backbones.video_dit import VideoDitConfig
from reverie.codecs.bpe import Bpe
from reverie.data.importers import import_folder
from reverie.encoders.text import TextConfig
from reverie.errors import InputError
from reverie.recipes import distil
from reverie.recipes.sora_batches import SoraRun
from reverie.systems.sora import Sora, SoraConfig
from reverie.train.log import Run


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take a second of each run; tests/train/test_log.py draws them."""
    monkeypatch.setattr(Run, "curves", lambda self: None)


@pytest.fixture(scope="module")
def teacher():
    """Random weights, also where a new model has zeros."""
    tokenizer = Bpe.train([f"picture {i}" for i in range(6)], vocab=600)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=32, depth=1, heads=1, end=tokenizer.end)
    backbone = VideoDitConfig(patch=(1, 8), width=32, depth=2, heads=1, context_width=32)
    torch.manual_seed(0)
    model = Sora(
        SoraConfig(backbone=backbone, text=text, size=(16, 16), frames=4, guidance=3.0), tokenizer
    ).eval()
    for parameter in model.backbone.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return model


def run_of(teacher, **changes):
    items = SoraRun(
        model=dataclasses.replace(teacher.config, steps=4, guidance=1.0), steps=1, batch=2, clips=1
    )
    run = distil.DistilRun(items=items, teacher="", weights="", inside=3, guidance=3.0, own=0.5)
    return dataclasses.replace(run, **changes)


def batch_of(teacher, **more):
    generator = rng.generator(0, "batch")
    latents, noise = torch.randn(2, 2, 3, 4, 16, 16, generator=generator)
    known = torch.zeros(2, 4, dtype=torch.bool)
    known[0, 0] = True
    tokens = teacher.tokenizer.encode(["picture 1", "picture 2"], length=8)
    given = {
        "latents": latents,
        "noise": noise,
        "known": known,
        "tokens": tokens,
        "drop": torch.zeros(2).bool(),
    }
    return given | {"pace": 2.0, "which": 1, "own": False} | more


@pytest.mark.parametrize("which", [0, 2, 3])
@pytest.mark.parametrize("own", [False, True])
def test_the_teacher_s_own_step_has_no_loss(teacher, which, own):
    """One step of the teacher without guidance in one of the student, who is the teacher."""
    batch = batch_of(teacher, which=which, own=own)
    same = run_of(teacher, inside=1, guidance=1.0)
    student = Sora(same.items.model, teacher.tokenizer)
    student.load_state_dict(teacher.state_dict())
    assert distil.loss(student, teacher, same, batch)["loss"] < 1e-9
    assert distil.loss(student, teacher, run_of(teacher), batch)["loss"] > 1e-4


def test_what_is_given_does_not_count(teacher):
    run, batch = run_of(teacher), batch_of(teacher)
    student = Sora(run.items.model, teacher.tokenizer)
    student.load_state_dict(teacher.state_dict())
    before = distil.loss(student, teacher, run, batch)["loss"]
    batch["noise"][0, :, 0] = 7.0
    assert torch.equal(distil.loss(student, teacher, run, batch)["loss"], before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Six pictures, each with a caption."""
    place = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 90)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture {i}")
    import_folder(place, val=0, quiet=True)
    return place


def test_a_student_comes_nearer_and_needs_no_guidance(teacher, place, tmp_path):
    folder = reverie.save(teacher, tmp_path / "teacher")
    out = tmp_path / "run"
    student = distil.sora(place, out, teacher=str(folder), teacher_steps=8, steps=20, batch=4, lr=5e-3)
    assert (student.config.steps, student.config.guidance) == (4, 1.0)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    far = [row["val_rmse"] for row in rows if "val_rmse" in row]
    assert len(far) == 4
    prompts = [f"picture {i}" for i in range(6)]
    goal = teacher.generate_image(prompts, steps=8, guidance=3.0, together=True)
    begun = teacher.generate_image(prompts, steps=4, guidance=1.0, together=True)
    assert far[-1] < 0.75 * (begun - goal).square().mean().sqrt()
    alone = student.generate_image(["picture 1"], seed=5)
    assert torch.equal(alone, student.generate_image(["picture 1"], seed=5, steps=4, guidance=1))
    for wrong in ({"teacher_steps": 10}, {"teacher_steps": 4}, {"student_steps": 0}):
        with pytest.raises(InputError, match="multiple"):
            distil.sora(place, tmp_path / "other", teacher=str(folder), **wrong)
    with pytest.raises(InputError, match="a Sora is distilled"):
        distil.sora(place, tmp_path / "other", teacher="clip-stickers")


def test_a_masked_teacher_s_student_has_no_masks(teacher, place, tmp_path):
    backbone = dataclasses.replace(teacher.config.backbone, masked=(0.3, 0.5), decoder=1)
    masked = Sora(dataclasses.replace(teacher.config, backbone=backbone), teacher.tokenizer)
    folder = reverie.save(masked, tmp_path / "teacher")
    student = distil.sora(place, tmp_path / "run", teacher=str(folder), teacher_steps=8, steps=1, batch=2)
    assert student.config.backbone.masked is None
    assert student.state_dict().keys() == teacher.state_dict().keys()


def test_a_student_draws_from_the_data_as_its_teacher_did(teacher, place, tmp_path, monkeypatch):
    run = SoraRun(
        model=teacher.config, steps=1, batch=2, clips=0, vary=0.4, crop=True, languages={"fr": 1.0}, known=0.2
    )
    folder = str(reverie.save(teacher, tmp_path / "run" / "model"))
    monkeypatch.setattr(distil, "fit", lambda config, *_, **__: config.items)

    def drawn(**asked):
        items = distil.sora(place, tmp_path / "out", teacher=folder, **asked)
        return items.vary, items.crop, items.languages, items.known

    usual = {"en": 0.8, "zh": 0.2}
    assert drawn() == (0.0, False, usual, 0.5)
    for told in (dataclasses.asdict(run), {"items": dataclasses.asdict(run), "teacher": "another"}):
        (tmp_path / "run" / "config.json").write_text(json.dumps(told))
        assert drawn() == (0.4, True, {"fr": 1.0}, 0.2)
        assert drawn(vary=0.0, english=1.0) == (0.0, True, {"en": 1.0, "zh": 0.0}, 0.2)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"system": "Sora", "config": {}}))
    assert drawn() == (0.0, False, usual, 0.5)
    with pytest.raises(InputError, match="english is 2: give a share"):
        drawn(english=2.0)
