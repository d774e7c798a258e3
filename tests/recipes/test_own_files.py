"""The commands for one's own pictures and clips, from file to file, with a small model of random weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

import reverie
from reverie import cli, output
from reverie.backbones.video_dit import VideoDitConfig
from reverie.codecs.bpe import Bpe
from reverie.encoders.text import TextConfig
from reverie.media import decode_array, flatten, probe
from reverie.recipes import own_files, parts
from reverie.recipes.own_files import fitted, smaller
from reverie.systems.sora import Sora, SoraConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    tokenizer = Bpe.train(["a red square", "green disc"], vocab=530)
    text = TextConfig(vocab=tokenizer.vocab, length=12, width=16, depth=1, heads=2, end=tokenizer.end)
    torch.manual_seed(0)
    sora = Sora(
        SoraConfig(
            backbone=VideoDitConfig(patch=(1, 8), width=16, depth=1, heads=2, context_width=16),
            text=text, size=(32, 32), clip_size=(16, 16), frames=6, fps=10.0, steps=2, guidance=2.0,
        ),
        tokenizer,
    )  # fmt: skip
    for parameter in sora.backbone.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return str(reverie.save(sora, tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture
def files(tmp_path):
    """A clip of seven frames, a wide picture, and a mask for it."""
    rng = np.random.Generator(np.random.PCG64(0))
    clip = rng.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    output.write(tmp_path / "clip.webp", clip, fps=5.0)
    Image.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    mask = np.zeros((40, 80), np.uint8)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


@pytest.fixture
def run(model, files, capsys):
    """`run(words...)`: the file that a command wrote, its pixels `f h w 3`, and what it said."""

    def call(command, *words):
        words = [files / word if str(word).endswith((".webp", ".png")) else word for word in words]
        code = cli.main([command, *map(str, words), "--model", model, "--out", str(files / "out")])
        out, err = capsys.readouterr()
        assert code == 0, err
        (path,) = out.split()
        return path, flatten(decode_array(path)), err

    return call


def source(files, name, **how):
    return flatten(decode_array(files / name, **how))


def test_a_picture_begins_a_clip(run, files):
    path, pixels, err = run("animate", "wide.png", "a red square", "--frames", 9)
    assert path.endswith("out/000-wide-animate.webp")
    assert pixels.shape == (9, 8, 16, 3)
    assert "wide.png is 80 x 40: drawn at 16 x 8" in err
    assert np.array_equal(pixels[0], source(files, "wide.png", size=(8, 16))[0])
    made = output.read(path)
    assert made.guidance == 1  # what goes on from frames
    assert (made.prompt, made.task, made.asked["frames"]) == ("a red square", "animate", 9)
    assert probe(path).fps == 10
    assert len(run("animate", "wide.png", "x")[1]) == 6


def test_a_clip_goes_on_and_back_and_round(run, files):
    given = source(files, "clip.webp")
    path, pixels, err = run("extend", "clip.webp", "--forward", 5, "--backward", 2)
    assert pixels.shape == (14, 16, 16, 3)
    assert np.array_equal(pixels[2:9], given)
    assert probe(path).fps == 5
    assert output.read(path).guidance == 0  # no words, no guidance
    assert not err
    path, pixels, _ = run("extend", "clip.webp", "--forward", 1, "--every", 3)
    assert output.read(path).asked["every"] == 3
    assert np.array_equal(pixels[:3], given[::3])
    pixels = run("loop", "clip.webp", "--between", 2)[1]
    assert len(pixels) == 9
    assert np.array_equal(pixels[:7], given)


def test_two_drawn_files_are_connected_by_the_words_of_both(run, files):
    one, other = (
        run("animate", "wide.png", words, "--frames", 2)[0] for words in ("a red square", "a blue disc")
    )
    path, _, err = run("connect", one, other, "--between", 1)
    assert output.read(path).prompt == "a red square, a blue disc"
    assert err.count("stays the prompt") == 2


def test_two_files_are_connected(run, files):
    path, pixels, said = run("connect", "clip.webp", "wide.png", "--between", 2, "--start", 0.5)
    assert "wide.png is 80 x 40: drawn at 16 x 16 like clip.webp, 50% of it cut off." in said
    assert path.endswith("-clip-connect.webp")
    assert pixels.shape == (10, 16, 16, 3)
    assert np.array_equal(pixels[:7], source(files, "clip.webp"))
    assert np.array_equal(pixels[9], source(files, "wide.png", size=16)[0])


def test_what_made_a_file_stays_its_prompt_and_a_draft_becomes_large(run, files, model, capsys):
    assert (
        cli.main(["sample", "green disc", "--draft", "--model", model, "--out", str(files / "drafts")]) == 0
    )
    draft = capsys.readouterr().out.strip()
    assert probe(draft).width == 24  # three quarters of 32
    path, pixels, err = run("edit", draft, "--size", 32, 32, "--strength", 0.7)
    assert path.endswith("out/000-green-disc-edit.png")  # without the draft's own number
    assert pixels.shape == (1, 32, 32, 3)
    assert "was made from 'green disc'" in err
    assert output.read(path).prompt == "green disc"
    small = source(files, draft, size=(32, 32))
    near = run("edit", draft, "--size", 32, 32, "--strength", 0.001)[1]
    assert abs(near.astype(int) - small).mean() < abs(pixels.astype(int) - small).mean()


def test_a_box_or_a_mask_is_drawn_anew_and_nothing_else(run, files):
    flags = ("wide.png", "a red square", "--size", 40, 80)
    given = source(files, "wide.png")[0]
    boxed, masked = (
        run("inpaint", *flags, "--box", 20, 10, 40, 30)[1][0],
        run("inpaint", *flags, "--mask", "mask.png")[1][0],
    )
    assert np.array_equal(boxed, masked)
    changed = (boxed != given).any(-1)
    assert changed[10:30, 20:40].mean() > 0.9
    changed[10:30, 20:40] = False
    assert not changed.any()
    small = run("inpaint", "wide.png", "a red square", "--box", 20, 10, 40, 30)[1][0]
    changed = (small != source(files, "wide.png", size=small.shape[:2])[0]).any(-1)
    assert small.shape[:2] == (24, 48)
    assert changed[6:18, 12:24].mean() > 0.9
    changed[6:18, 12:24] = False
    assert not changed.any()


def test_a_mask_with_transparency_is_read_by_that_alone(run, files):
    mask = np.full((40, 80, 4), 255, np.uint8)  # white all over
    mask[10:30, 20:40, 3] = 0
    Image.fromarray(mask).save(files / "clear.png")
    flags = ("wide.png", "a red square", "--size", 40, 80)
    _, clear, said = run("inpaint", *flags, "--mask", "clear.png")
    assert "clear.png is transparent in places" in said
    assert np.array_equal(clear, run("inpaint", *flags, "--mask", "mask.png")[1])


def test_what_is_not_taken_as_it_is_is_said(run):
    assert "clip.webp is a clip: its first frame begins" in run("animate", "clip.webp", "--frames", 2)[2]
    said = run("extend", "clip.webp", "--forward", 1, "--every", 9)[2]
    assert "clip.webp has 7 frames, of which --every 9 takes the first alone." in said
    assert "80 x 40: drawn at 16 x 16, 50% of it cut off" in run("edit", "wide.png", "x", "--size", 16, 16)[2]


def test_frames_are_drawn_anew(run, files):
    pixels, given = run("inpaint", "clip.webp", "--frames", 2, 4)[1], source(files, "clip.webp")
    same = (pixels == given).all((1, 2, 3))
    assert same.tolist() == [True, True, False, False, False, True, True]
    box = run("inpaint", "clip.webp", "--frames", 2, 4, "--box", 0, 0, 8, 8)[1]
    same = (box == given)[:, 8:].all((1, 2, 3)) & (box == given)[:, :, 8:].all((1, 2, 3))
    assert same.all()
    assert (box == given).all((1, 2, 3)).tolist() == [True, True, False, False, False, True, True]


def test_long_clips_are_written_window_by_window(files, model, monkeypatch, capsys):
    held = []
    store = output.store

    def listen(signal, *words, **how):
        def each():
            for part in signal:
                held.append(part.shape[1])
                yield part

        return store(signal if hasattr(signal, "shape") else each(), *words, **how)

    monkeypatch.setattr(output, "store", listen)
    words = ["sample", "a red square", "--frames", "15", "--model", model, "--out", str(files / "long")]
    assert cli.main(words) == 0
    assert held == [6, 5, 4]
    path = capsys.readouterr().out.strip()
    pixels = flatten(decode_array(path))
    assert len(pixels) == 15
    assert cli.main([*words, "--first-frame", str(files / "wide.png")]) == 0
    assert len(flatten(decode_array(capsys.readouterr().out.strip()))) == 15
    assert held[3:] == [1, 5, 5, 4]
    assert cli.main([*words[:2], "--model", model, "--frames", "6", "--out", str(files / "short")]) == 0
    assert np.array_equal(flatten(decode_array(capsys.readouterr().out.strip())), pixels[:6])


def test_weights_are_hashed_when_a_file_is_made_and_once(model, monkeypatch):
    hashed, sora = [], reverie.load(model)
    monkeypatch.setattr(parts, "hash_of", lambda system: hashed.append(system) or "0123")
    made = parts.what_made(sora, model)
    assert not hashed
    assert [made("x", seed).weights for seed in range(3)] == ["0123"] * 3
    assert hashed == [sora]


def test_shapes_are_fitted_to_patches():
    assert fitted(100, 100, (96, 96), 32) == (96, 96)
    assert fitted(480, 640, (96, 96), 16) == (80, 112)
    assert fitted(1, 1000, (96, 96), 32) == (32, 288)
    assert fitted(1000, 1, (96, 96), 32) == (288, 32)
    assert smaller((128, 128), 32) == (96, 96)
    assert smaller((32, 96), 32) == (32, 64)


def test_mistakes_are_one_sentence(files, model, capsys):
    clip, wide, mask = (str(files / name) for name in ("clip.webp", "wide.png", "mask.png"))
    (files / "notes.txt").write_text("no picture")
    Image.new("L", (80, 40)).save(files / "black.png")
    Image.new("L", (80, 40), 140).save(files / "grey.png")
    Image.new("RGBA", (80, 40), (255, 255, 255, 250)).save(files / "opaque.png")
    output.write(files / "shape.webp", np.zeros((2, 40, 80, 3), np.uint8))
    cases = {
        "There is no file": ["extend", str(files / "none.gif"), "--forward", "2"],
        "not a picture": ["extend", str(files / "notes.txt"), "--forward", "2"],
        "say how many frames to add": ["extend", clip],
        "forward is -3": ["extend", clip, "--forward=-3"],
        "wide.png has 1 frame, but 2 or more": ["loop", wide],
        "clip.webp has 1 frame, but 2 or more": ["loop", clip, "--every", "9"],
        "every is 0": ["loop", clip, "--every", "0"],
        "does not move": ["animate", wide, "--frames", "1"],
        "strength is 1.5": ["edit", clip, "x", "--strength", "1.5"],
        "start is 0": ["connect", clip, clip, "--start", "0"],
        "0 frames between": ["loop", clip, "--between", "0"],
        "no prompt is written in the file": ["edit", clip],
        "box 3 3 4 9 is smaller than a pixel": ["inpaint", wide, "--box", "3", "3", "4", "9"],
        "shape.webp is a clip of 2 frames": ["inpaint", wide, "--mask", str(files / "shape.webp")],
        "black.png is white nowhere": ["inpaint", wide, "--mask", str(files / "black.png")],
        "grey.png is grey in 100%": ["inpaint", wide, "--mask", str(files / "grey.png")],
        "opaque.png is transparent nowhere": ["inpaint", wide, "--mask", str(files / "opaque.png")],
        "has the frame 0 alone": ["inpaint", wide, "--frames", "0", "1"],
        "guidance is 1, which leads away from nothing": [
            "animate", wide, "x", "--guidance", "1", "--negative", "a cat"
        ],
        "steps is 0: give 1 or more": ["loop", clip, "--steps", "0"],
        "guidance is nan": ["loop", clip, "x", "--guidance", "nan"],
        "there is no sampler 'best'": ["loop", clip, "--sampler", "best"],
        "notes.txt: not a picture or clip that can be read: it is text; give one of png, jpeg, webp": [
            "connect", clip, str(files / "notes.txt")
        ],
        "say what to draw anew": ["inpaint", clip],
        "without words nothing is guided": ["loop", clip, "--negative", "a cat"],
        "give one of them": ["inpaint", wide, "--box", "0", "0", "9", "9", "--mask", mask],
        "does not lie in 80 x 40 pixels": ["inpaint", wide, "--box", "0", "0", "9", "41"],
        "box has 3 numbers": ["inpaint", wide, "--box", "0", "0", "9"],
        "mask.png is 80 x 40, but the file 16 x 16": ["inpaint", clip, "--mask", mask],
        "has the frames 0 to 6": ["inpaint", clip, "--frames", "3", "7"],
        "size is 0 16": ["edit", clip, "x", "--size", "0", "16"],
        "fps is 0": ["loop", clip, "--fps", "0"],
        "jpg holds pictures": ["loop", clip, "--format", "jpg"],
        "jpg holds pictures and": ["edit", clip, "x", "--format", "jpg"],
        "cannot extend": ["loop", clip, "--model", "clip-stickers"],
    }  # fmt: skip
    for words, call in cases.items():
        more = [] if "--model" in call else ["--model", model]
        assert cli.main([*call, *more, "--out", str(files / "out")]) == 2, words
        err = capsys.readouterr().err
        assert words in err.splitlines()[-1], err
        assert len([line for line in err.splitlines() if line.startswith("reverie: ")]) == 1
    assert not (files / "out").exists()
    words = ["loop", clip, "--out", str(files / "notes.txt"), "--model", model]
    assert cli.main(words) == 2
    assert "notes.txt is a file, not a folder" in capsys.readouterr().err


def test_what_is_cheap_is_refused_before_a_model_is_loaded(files, monkeypatch, capsys):
    def loaded(*words, **how):
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(own_files, "capable", loaded)
    monkeypatch.setattr(parts, "capable", loaded)
    clip, wide, file = (str(files / name) for name in ("clip.webp", "wide.png", "mask.png"))
    for call in (
        ["animate", wide, "--frames", "1"],
        ["loop", clip, "--between", "0"],
        ["loop", wide],
        ["loop", clip, "--out", file],
        ["connect", clip, str(files / "none.png")],
        ["edit", clip],
        ["edit", clip, "x", "--sampler", "best"],
        ["inpaint", clip, "--frames", "3", "7"],
        ["inpaint", wide, "--box", "0", "0", "9", "41"],
        ["inpaint", clip, "--mask", file],
        ["extend", clip, "x", "--forward", "1", "--negative", "a" * 70_000],
        ["sample", "x", "--steps", "0"],
        ["sample", "x", "--frames", "0"],
        ["sample", "x", "--frames", "4", "--format", "jpg"],
        ["sample", "x", "--out", file],
        ["sample", "a" * 70_000],
        ["sample", "x", "--frames", "4", "--first-frame", str(files / "none.png")],
        ["sample", "x", "--rescale", "2"],
        ["sample", "x", "--cache=-1"],
    ):
        assert cli.main(call) == 2, call
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("aspect", [(3, 4), (2, 3), (9, 16), (1, 1), (5, 2)])
def test_a_shape_is_kept_as_near_as_whole_patches_can(aspect):
    """What is cut off is no more than a patch's rounding at that size can explain."""
    for unit, side in ((32, 96), (16, 256), (8, 64)):
        height, width = fitted(aspect[0] * 120, aspect[1] * 120, (side, side), unit)
        assert height % unit == width % unit == 0
        assert 0.4 <= height * width / side**2 <= 2
        assert abs(math.log(height / width * aspect[1] / aspect[0])) <= 0.5 * unit / min(height, width)
        turned = fitted(aspect[1] * 120, aspect[0] * 120, (side, side), unit)
        assert turned == (width, height)
