"""Both stages of BLIP-2 as runs: they resume bit for bit, leave bad files out by name, and their models talk."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import reverie
from reverie.cli import main
from reverie.codecs.pieces import Pieces
from reverie.data.importers import import_folder
from reverie.errors import InputError
from reverie.recipes.blip2 import stage1, stage2
from reverie.recipes.measure_clip import retrieve
from reverie.weights.files import header

transformers = pytest.importorskip("transformers")
CAPTIONS = [
    "a red apple",
    "two blue cars",
    "one small dog",
    "a green tree",
    "the old house",
    "six black birds",
]
SMALL = {"steps": 4, "batch": 4, "queries": 2, "width": 64, "depth": 2, "strength": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures with captions, the last of which is damaged after the import."""
    place = tmp_path_factory.mktemp("pictures")
    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (64, 64), (40 * i, 0, 90)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption)
    import_folder(place, val=0, quiet=True)
    (place / "5.png").write_bytes(b"")
    return place


@pytest.fixture(scope="module")
def first(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    stage1(folder, out, **SMALL)
    return out


def language(kind, folder):
    tokenizer = Pieces.train_words(CAPTIONS, vocab=60)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=3,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.Qwen2Config(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=48, eos_token_id=3, pad_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.write(folder)
    return folder


def losses(run):
    return [
        (row["step"], row["loss"])
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]


def bad(run):
    return [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_first_stage_goes_on_bit_for_bit_and_names_what_it_leaves_out(folder, first):
    """R1, R2, R7."""
    assert {Path(row["path"]).name for row in bad(first)} == {"5.png"}
    whole, rows = weights(first), losses(first)
    assert {path.name for path in (first / "checkpoints").iterdir()} != set()
    shutil.rmtree(max((first / "checkpoints").iterdir()))
    shutil.rmtree(first / "model")
    stage1(folder, first, **SMALL)
    assert weights(first) == whole
    assert losses(first) == rows


def test_its_checkpoints_and_model_do_not_repeat_the_tower(first):
    tower = sum(p.numel() for p in reverie.load("clip-stickers").image.parameters())
    for file in (first / "model" / "model.safetensors", *first.glob("checkpoints/*/model*.safetensors")):
        assert not any("image.blocks" in name for name in header(file))
    assert sum(p.numel() for p in reverie.load(first / "model").sight.image.parameters()) == tower


@pytest.mark.parametrize("kind", ["t5", "qwen2"])
def test_a_second_stage_goes_on_bit_for_bit_and_talks(kind, folder, first, tmp_path, capsys):
    spoken = language(kind, tmp_path / "language")
    how = {"first": str(first / "model"), "language": str(spoken), "steps": 4, "batch": 4, "strength": 0.0}
    made = stage2(folder, tmp_path / "run", **how)
    whole = weights(tmp_path / "run")
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    shutil.rmtree(tmp_path / "run" / "model")
    stage2(folder, tmp_path / "run", **how)
    assert weights(tmp_path / "run") == whole
    assert not any(name.startswith("language") for name in made.state_dict())
    picture = folder / "0.png"
    assert made.answer([picture], ["what?"], answers=["a dog", "two cars"])[0] in ("a dog", "two cars")
    capsys.readouterr()
    asked = ["--ask", "what is it?", "which colour?", "--most", "4", "--beams", "2", "--json"]
    assert main(["chat", str(picture), "--model", str(tmp_path / "run" / "model"), *asked]) in (0, None)
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert [turn["question"] for turn in turns] == ["what is it?", "which colour?"]
    before = [turns[0]["question"], turns[0]["answer"]] if turns[0]["answer"] else None
    if before:
        assert turns[1]["answer"] == made.chat([picture], [*before, "which colour?"], most=4, beams=2)
    with pytest.raises(InputError, match="the last turn must be a question"):
        made.chat([picture], ["what?", "a dog"])


def test_what_cannot_be_trained_is_refused(folder, first, tmp_path):
    with pytest.raises(InputError, match="learns from comparing"):
        stage1(folder, tmp_path / "one", **SMALL | {"batch": 1})
    with pytest.raises(InputError, match="give the first stage"):
        stage2(folder, tmp_path / "run", first="clip-stickers", language=str(tmp_path))
    with pytest.raises(InputError, match=r"config\.json"):
        stage2(folder, tmp_path / "run", first=str(first / "model"), language=str(tmp_path))


def test_many_vectors_of_a_picture_are_no_embedding_to_keep(folder, first, tmp_path):
    with pytest.raises(InputError, match="a Blip2 does not make one vector of a picture"):
        retrieve(folder, tmp_path / "out", model=str(first / "model"), split="train")
