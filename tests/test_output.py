"""Every format: what is written is read back, what made it too, the same bytes twice, in flat memory."""

import json
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from reverie import media, output, rng
from reverie.errors import InputError
from reverie.output import Made

CLIPS = ("png", "webp", "gif", "mp4", "webm")
EXACT = ("png", "webp", "gif")
MADE = Made(
    prompt='a "red" rocket\n火箭 \ud800',
    seed=7,
    model="sora-stickers",
    weights="0123456789abcdef",
    steps=24,
    guidance=4.0,
    sampler="euler",
    asked={"size": [64, 48], "negative": "a car " * 200},
)


def moving(frames=7, height=33, width=47, channels=3):
    """A square that goes to the right, on odd sides, one frame of it standing still."""
    pixels = np.full((frames, height, width, channels), 255, np.uint8)
    for i in range(frames):
        at = min(2 * i, width - 20)
        pixels[i, 5:20, 3 + at : 18 + at, :3] = (255, 40, 0)
        if channels == 4:
            pixels[i, 25:, :, 3] = 100
    pixels[frames // 2] = pixels[frames // 2 - 1]
    return pixels


@pytest.mark.parametrize("kind", CLIPS)
def test_a_clip_comes_back_with_what_made_it(kind, tmp_path):
    pixels = moving()
    path = output.write(tmp_path / f"clip.{kind}", pixels, fps=12, made=MADE)
    found = media.probe(path)
    even = kind in ("mp4", "webm")
    assert (found.kind, found.frames) == (kind, 7)
    assert (found.height, found.width) == ((34, 48) if even else (33, 47))
    assert found.fps == pytest.approx(12, rel=0.01)
    assert output.read(path) == MADE
    back = media.decode_array(path)[:, :33, :47, :3].astype(int)
    if kind in EXACT:
        assert np.array_equal(back, pixels)
    else:  # colours lie four pixels apart, but inside of things they are right
        assert abs(back[:, 9:15, 0:2] - 255).max() <= 8
        for i in (0, 6):
            assert abs(back[i, 9:15, 10 + 2 * i] - (255, 40, 0)).max() <= 8
    assert output.read(output.write(tmp_path / f"bare.{kind}", pixels)) is None


@pytest.mark.parametrize("kind", [*CLIPS, "jpg"])
def test_a_picture_comes_back_with_what_made_it(kind, tmp_path):
    pixels = moving(2, 32, 48)[:1]
    path = output.write(tmp_path / f"one.{kind}", pixels, made=MADE)
    assert media.probe(path).frames == 1
    assert output.read(path) == MADE
    if kind in EXACT:
        assert np.array_equal(media.decode_array(path)[..., :3], pixels)


@pytest.mark.parametrize("kind", [*CLIPS, "jpg"])
def test_the_same_frames_give_the_same_bytes(kind, tmp_path):
    pixels = moving(1 if kind == "jpg" else 30)
    first, second = (
        output.write(tmp_path / f"{name}.{kind}", iter(pixels), fps=8, made=MADE).read_bytes()
        for name in "ab"
    )
    assert first == second
    assert len(list(tmp_path.iterdir())) == 2  # no draft is left


def test_transparency_stays_where_the_format_has_it(tmp_path):
    pixels = moving(4, channels=4)
    for kind in ("png", "webp"):
        back = media.decode_array(output.write(tmp_path / f"clear.{kind}", pixels))
        assert np.array_equal(back[..., 3], pixels[..., 3])
        assert np.array_equal(back[:, :25], pixels[:, :25])
    back = media.decode_array(output.write(tmp_path / "clear.gif", pixels))
    assert np.array_equal(back[..., :3], media.flatten(pixels))


def test_times_do_not_drift(tmp_path):
    """24 frames a second are 41.67 ms each: rounded alone, 240 of them would be off by 80 ms."""
    for kind, unit in (("webp", 0.001), ("png", 0.001), ("gif", 0.01)):
        path = output.write(tmp_path / f"long.{kind}", iter(moving(240, 8, 40)), fps=24)
        assert 240 / media.probe(path).fps == pytest.approx(10, abs=unit)


@pytest.mark.parametrize("kind", CLIPS)
def test_a_long_clip_takes_no_more_memory(kind, tmp_path):
    def peak(frames):
        many = (np.full((64, 64, 3), i % 256, np.uint8) for i in range(frames))
        tracemalloc.start()
        output.write(tmp_path / f"{frames}.{kind}", many)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(4)  # what is imported once
    assert peak(200) < peak(20) + 100_000  # 180 frames more would be 2 MB


def test_a_clip_in_parts_is_the_clip(tmp_path):
    signal = torch.rand(3, 6, 16, 16, generator=rng.generator(0, "clip")) * 2 - 1
    whole = output.store(signal, tmp_path / "new" / "whole", fps=10, made=MADE)
    parts = output.store((signal[:, i : i + 2] for i in (0, 2, 4)), tmp_path / "parts", fps=10, made=MADE)
    assert whole.name == "whole.webp"
    assert whole.read_bytes() == parts.read_bytes()
    assert output.store(signal[:, :1], tmp_path / "one").suffix == ".png"
    back = media.decode_array(whole)[..., :3].astype(float) / 127.5 - 1
    assert abs(back - signal.permute(1, 2, 3, 0).numpy()).max() < 1 / 127


def test_what_fails_leaves_nothing(tmp_path):
    def broken():
        yield from moving(3)
        raise KeyboardInterrupt

    for kind in CLIPS:
        with pytest.raises(KeyboardInterrupt):
            output.write(tmp_path / f"clip.{kind}", broken())
    assert not list(tmp_path.iterdir())


def test_files_of_others(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert output.read(tmp_path / "plain.png") is None
    for words in ("{", "[1]", '{"prompt": 3}', json.dumps(MADE.values() | {"seed": "x"}), "[" * 100_000):
        Image.new("P", (8, 8)).save(tmp_path / "odd.gif", comment=words.encode())
        assert output.read(tmp_path / "odd.gif") is None
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(media.MediaError):
        output.read(tmp_path / "text.png")


def test_numbers_go_on(tmp_path):
    assert output.next_number(tmp_path / "none") == 0
    for name in ("000-a.png", "011-b.webp", "notes.txt", "99-c.png"):
        (tmp_path / name).touch()
    assert output.next_number(tmp_path) == 12


def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    for name, frames, fps, words in (
        ("a.avi", 2, 12, "no format 'avi'"),
        ("a.jpg", 2, 12, "no clips"),
        ("a.gif", 2, 60, "50 frames"),
        ("a.webp", 2, 0, "fps is 0"),
    ):
        with pytest.raises(InputError, match=words):
            output.write(tmp_path / name, moving(frames), fps=fps)
    for quality in (0, 101, 80.5):
        with pytest.raises(InputError, match=f"quality is {quality}: give a whole number from 1 to 100"):
            output.write(tmp_path / "a.webp", moving(2), quality=quality)
    with pytest.raises(InputError, match="the words take 70,002 characters"):
        output.write(tmp_path / "a.jpg", moving(1), made=replace(MADE, prompt="a" * 70_000, asked={}))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="reverie\\[video\\]"):
        output.write(tmp_path / "a.mp4", moving(2))
    assert not list(tmp_path.iterdir())


def test_as_many_words_as_are_let_in_are_read_back(tmp_path):
    made = replace(MADE, prompt="\u706b" * 9_900, asked={"negative": "a"})
    for kind in (*CLIPS, "jpg"):
        assert output.read(output.write(tmp_path / f"long.{kind}", moving(1, 32, 48), made=made)) == made


def test_a_folder_that_cannot_be_is_refused_and_none_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below/it"):
        with pytest.raises(InputError, match="file is a file, not a folder"):
            output.check_folder(tmp_path / folder)
    output.check_folder(tmp_path / "new" / "deep")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="may not be written into"):
        output.check_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "\\x1b[31mred" in str(replace(MADE, prompt="\x1b[31mred"))
    assert str(replace(MADE, prompt="")).splitlines()[0].split() == ["prompt", "(none)"]


def test_half_precision_is_written_and_what_no_format_can_say_is_refused(tmp_path):
    signal = torch.linspace(-1, 1, 3 * 2 * 8 * 8).reshape(3, 2, 8, 8)
    path = output.store(signal.bfloat16(), tmp_path / "half", fps=0.02)
    assert media.probe(path).frames == 2
    for format in ("png", "gif", "webp"):
        assert media.probe(output.store(signal, tmp_path / "slow", fps=0.02, format=format)).frames == 2
    with pytest.raises(InputError, match=r"fps is 0.01: a webp shows 0.02 to 1000"):
        output.store(signal, tmp_path / "none", fps=0.01)
