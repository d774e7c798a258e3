"""What Sora makes of given frames. A stand-in that knows whole films shows that all are asked for at their places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn

from reverie import output
from reverie.backbones.video_dit import VideoDitConfig
from reverie.data.world import world
from reverie.data.world_render import render
from reverie.errors import InputError
from reverie.media import decode_array, flatten
from reverie.systems.sora import Sora, SoraConfig
from reverie.systems.sora_given import windows

WORDS = ["red square"]
near = {"atol": 1e-4, "rtol": 0.0}
SIZE, WINDOW = (32, 32), 8


class Knowing(nn.Module):
    """Stands for the backbone: finds where in its films `n 3 f h w` the clean frames are, and says what is there."""

    def __init__(self, config: VideoDitConfig, films: torch.Tensor):
        super().__init__()
        self.config, self.films = config, films
        self.null_context = nn.Parameter(torch.zeros(config.context_width))

    def without_text(self, pooled, context, context_mask, drop):
        return pooled, context, context_mask

    def forward(self, x, t, pooled, context, context_mask, **more):
        said = []
        for clip, times in zip(x, t, strict=True):
            known, f = times == 0, clip.shape[1]
            places = [(film, at) for film in self.films for at in range(film.shape[1] - f + 1)]
            film, at = min(
                places, key=lambda it: (it[0][:, it[1] : it[1] + f][:, known] - clip[:, known]).abs().sum()
            )
            said.append(film[:, at : at + f])
        return torch.stack(said)


@pytest.fixture(scope="module")
def config(small) -> SoraConfig:
    return SoraConfig(
        backbone=VideoDitConfig(patch=(1, 8), width=32, depth=1, heads=2, context_width=16),
        text=small.config.text, size=SIZE, frames=WINDOW, steps=3, guidance=2.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def films() -> torch.Tensor:
    """Things of the world that move straight on for 40 frames."""
    scenes = [world(i, kind="motion") for i in range(40)]
    scenes = [scene for scene in scenes if scene.things[0].motion.kind == "move"][:4]
    return torch.stack([signal(render(scene, size=SIZE, frames=40)) for scene in scenes])


def signal(pixels: torch.Tensor) -> torch.Tensor:
    return rearrange(pixels.float() / 127.5 - 1, "f h w c -> c f h w")


def knowing(config: SoraConfig, tokenizer, films: torch.Tensor) -> Sora:
    sora = Sora(config, tokenizer).eval()
    sora.backbone = Knowing(config.backbone, films)
    return sora


@pytest.fixture(scope="module")
def oracle(config, tokenizer, films) -> Sora:
    return knowing(config, tokenizer, films)


@pytest.fixture(scope="module")
def sora(config, tokenizer) -> Sora:
    torch.manual_seed(0)
    model = Sora(config, tokenizer).eval()
    for parameter in model.backbone.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.15)
    return model


def wheel(period: int, count: int) -> torch.Tensor:
    """A film `1 3 f h w` that comes back to where it was after `period` frames: a bright bar that goes to and fro."""
    x = torch.arange(SIZE[1]) / SIZE[1]
    frames = [
        (-40 * (x - 0.5 - 0.3 * math.cos(2 * math.pi * i / period)).square()).exp() for i in range(count)
    ]
    return (2 * torch.stack(frames) - 1)[None, None, :, None, :].expand(1, 3, count, *SIZE).contiguous()


def steps(clip: torch.Tensor) -> torch.Tensor:
    """How much each frame differs from the one before it; the first, from the last."""
    return (clip - clip.roll(1, dims=2)).abs().mean((0, 1, 3, 4))


# At its place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forward", "backward"), [(1, 0), (0, 3), (5, 6), (12, 12)])
def test_what_goes_on_is_what_comes_next_and_what_was_before(oracle, films, forward, backward):
    begin, end = 12, 28
    given = films[:2, :, begin:end]
    out = oracle.extend(given, WORDS * 2, forward=forward, backward=backward, seed=1)
    assert out[:, :, backward : backward + end - begin].equal(given)
    torch.testing.assert_close(out, films[:2, :, begin - backward : end + forward], **near)


def test_a_picture_is_extended_as_a_first_frame(sora):
    picture = torch.rand(1, 3, 1, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for guidance in ({}, {"guidance": 3.0}):
        clip = sora.extend(picture, WORDS, forward=WINDOW - 1, seed=5, **guidance)
        own = {"guidance": 1.0} | guidance
        assert clip.equal(
            sora.generate_video(WORDS, first_frame=picture[:, :, 0], frames=WINDOW, seed=5, **own)
        )


def test_both_ways_have_noise_of_their_own(sora, films, monkeypatch):
    asked = watched(sora, monkeypatch)
    clip = films[:1, :, :6]
    both = sora.extend(clip, WORDS, forward=2, backward=9, seed=3)
    seeds = [turn["seed"][0] for turn in asked]
    assert len(seeds) == len(set(seeds)) == 3
    assert seeds[0] == 3
    assert both[:, :, 9:].equal(sora.extend(clip, WORDS, forward=2, seed=3))


def test_a_path_or_an_open_picture_is_taken_like_a_clip(sora, tmp_path):
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    path = output.write(tmp_path / "clip.webp", pixels)
    small = torch.from_numpy(flatten(decode_array(path, size=SIZE)))
    clip = rearrange(small.float() / 127.5 - 1, "f h w c -> 1 c f h w")
    assert sora.extend(str(path), WORDS, forward=1).equal(sora.extend(clip, WORDS, forward=1))
    assert sora.connect(clip, path, WORDS, between=1)[:, :, 4:].equal(clip)
    edited = sora.edit(Image.fromarray(pixels[0]), WORDS, size=(24, 16))
    assert edited.shape == (1, 3, 1, 24, 16)
    first = sora.extend(clip[:, :, 0][0], WORDS, forward=1)  # `3 h w`
    assert first.equal(sora.extend(clip[:, :, :1], WORDS, forward=1, size=SIZE))


@pytest.mark.parametrize("between", [1, 4, 11])
def test_a_loop_comes_back_and_its_seam_is_like_its_other_steps(config, tokenizer, between):
    period = 14 + between
    film = wheel(period, 4 * period)
    given = film[:, :, :14]
    out = knowing(config, tokenizer, film).loop(given, WORDS, between=between)
    assert out[:, :, :14].equal(given)
    torch.testing.assert_close(out, film[:, :, :period], **near)
    seam, others = steps(out)[0], steps(out)[1:]
    assert seam <= others.max() + 1e-5
    assert steps(given)[0] > 1.5 * others.max() or between == 1  # the clip alone jumps


@pytest.mark.parametrize("between", [2, 4, 9])
def test_two_clips_are_joined_by_what_lies_between(oracle, films, between):
    first, second = films[1:2, :, 3:13], films[1:2, :, 13 + between : 30]
    out = oracle.connect(first, second, WORDS, between=between)
    torch.testing.assert_close(out, films[1:2, :, 3:30], **near)
    assert out[:, :, :10].equal(first)
    assert out[:, :, 10 + between :].equal(second)


def test_clips_may_be_joined_from_a_cross_fade(sora):
    dark, light = (torch.full((1, 3, 3, *SIZE), grey) for grey in (-0.6, 0.6))
    out = sora.connect(dark, light, WORDS, between=2, start=1e-4)
    torch.testing.assert_close(out[0, 0, 3:5].mean((1, 2)), torch.tensor([-0.2, 0.2]), atol=0.01, rtol=0.0)
    other = sora.connect(dark, light, WORDS, between=2, start=1.0)
    assert not torch.allclose(out, other, atol=0.05)
    assert out[:, :, :3].equal(dark)


@pytest.mark.parametrize("stretch", [(2, 3), (8, 12), (17, 30), (0, 5)])
def test_a_stretch_of_time_is_drawn_as_it_was(oracle, films, stretch):
    region = torch.zeros(40, dtype=torch.bool)
    region[slice(*stretch)] = True
    spoilt = films[:1].clone()
    spoilt[:, :, region] = 0.9
    out = oracle.inpaint(spoilt, WORDS, region=region)
    torch.testing.assert_close(out, films[:1], **near)
    assert out[:, :, ~region].equal(films[:1, :, ~region])


def test_a_long_clip_is_drawn_in_windows_of_which_each_knows_the_one_before(sora, monkeypatch):
    asked = watched(sora, monkeypatch)
    pieces = list(sora.stream(WORDS, frames=21, overlap=3, seed=7))
    assert [piece.shape[2] for piece in pieces] == [8, 5, 5, 3]
    whole = torch.cat(pieces, dim=2)
    assert pieces[0].equal(asked[0]["out"])
    assert pieces[0].equal(sora.generate_video(WORDS, frames=WINDOW, seed=7))
    at = 0
    for turn, piece in zip(asked[:4], pieces, strict=True):
        assert turn["frames"] == WINDOW  # whatever the length, no more is ever held
        at += piece.shape[2]
        assert turn["out"].equal(whole[:, :, at - WINDOW : at])  # windows agree where they overlap
    assert len({turn["seed"][0] for turn in asked[:4]}) == 4  # other noise in every window
    assert torch.cat(list(sora.stream(WORDS, frames=21, overlap=3, seed=7)), dim=2).equal(whole)
    assert not torch.cat(list(sora.stream(WORDS, frames=8, seed=8)), dim=2).equal(whole[:, :, :8])


def test_a_stream_goes_on_from_a_clip(oracle, films):
    pieces = oracle.stream(WORDS, frames=23, given=films[:1, :, :10])
    torch.testing.assert_close(torch.cat(list(pieces), dim=2), films[:1, :, 10:33], **near)


def watched(sora, monkeypatch) -> list[dict]:
    """How `generate` is asked, and what it gives."""
    asked, generate = [], sora.generate

    def listen(prompts, **options):
        out = generate(prompts, **options)
        asked.append(options | {"out": out, "given": options.get("known_mask", torch.zeros(1)).sum().item()})
        return out

    monkeypatch.setattr(sora, "generate", listen)
    return asked


def test_long_clips_are_edited_in_windows_that_agree(sora, films, monkeypatch):
    asked = watched(sora, monkeypatch)
    out = sora.edit(films[:1, :, :20], WORDS, strength=0.4)
    assert out.shape == films[:1, :, :20].shape
    assert [turn["given"] for turn in asked] == [0, 2, 2]
    assert all(turn["start"] == 0.4 for turn in asked)
    torch.testing.assert_close(asked[1]["out"][:, :, :2], asked[0]["out"][:, :, 6:8], atol=0, rtol=0)


def test_the_stronger_the_edit_the_less_is_left(sora, films):
    clip = films[:1, :, :6]
    far = [
        (sora.edit(clip, WORDS, strength=strength) - clip).abs().mean().item()
        for strength in (1e-3, 0.1, 0.4)
    ]
    assert far == sorted(far)
    assert 2 * far[0] < 0.1 < far[-1]


@pytest.mark.parametrize("pixels", [False, True])
def test_a_region_is_drawn_and_nothing_around_it(sora, films, pixels):
    clip = films[:2, :, :11]
    region = torch.zeros(*SIZE, dtype=torch.bool)
    region[5:21, 8:16] = True
    if pixels:  # in some frames only, and in other places of each item
        region = region.expand(2, 11, *SIZE).clone()
        region[0, :4] = False
        region[1] = region[1].mT.clone()
    out = sora.inpaint(clip, WORDS * 2, region=region, seed=2)
    wide = region.expand(2, 11, *SIZE)[:, None].expand_as(clip)
    assert out[~wide].equal(clip[~wide])
    assert (out - clip)[wide].abs().mean() > 0.05
    hidden = torch.where(wide, 0.1, clip)
    assert sora.inpaint(hidden, WORDS * 2, region=region, seed=2).equal(
        out
    )  # what stands there is not looked at
    beside = clip.clone()
    beside[:, :, :, 22:24] = 0.8  # in the same patches as the region, but not in it
    assert not sora.inpaint(beside, WORDS * 2, region=region, seed=2)[wide].equal(out[wide])


def test_progress_counts_every_window(sora, films):
    told = []
    sora.extend(films[0, :, :9], WORDS, forward=9, backward=2, progress=lambda *it: told.append(it))
    assert told[-1][0] == told[-1][1] == len(told)
    assert [done for done, _ in told] == list(range(1, len(told) + 1))


# Windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_windows_cover_what_is_unknown_with_something_known_before_it(backward):
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, size = (int(torch.randint(low, 30, (), generator=generator)) for low in (1, 2))
        overlap = int(torch.randint(1, size, (), generator=generator))
        share = torch.rand((), generator=generator)
        unknown = (torch.rand(n, generator=generator) < share).tolist()
        drawn = [not it for it in unknown]
        for begin, end in windows(unknown, size, overlap, backward=backward):
            assert end - begin == min(n, size)
            fresh = [i for i in range(begin, end) if not drawn[i]]
            assert fresh
            if backward:
                assert end == n or end - 1 - fresh[-1] >= overlap
                assert all(drawn[i] for i in range(end, n))
            else:
                assert begin == 0 or fresh[0] - begin >= overlap
                assert all(drawn[i] for i in range(begin))
            drawn[begin:end] = [True] * (end - begin)
        assert all(drawn)


def test_a_stretch_that_fits_sees_both_sides():
    unknown = [10 <= i < 14 for i in range(30)]
    assert windows(unknown, 8, 2) == [(8, 16)]
    assert windows(unknown, 8, 2, backward=True) == [(8, 16)]


# Mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_a_sentence(sora, films):
    clip, one = films[:1, :, :4], films[:1, :, :1]
    region = torch.zeros(4, dtype=torch.bool)
    calls = {
        "0 frames forward and 0 backward": lambda: sora.extend(clip, WORDS),
        "-1 frames forward": lambda: sora.extend(clip, WORDS, forward=-1, backward=2),
        "forward is 1.5": lambda: sora.extend(clip, WORDS, forward=1.5),
        "no two ends": lambda: sora.loop(one, WORDS),
        "0 frames between": lambda: sora.loop(clip, WORDS, between=0),
        "one size": lambda: sora.connect(clip, clip[..., :16], WORDS),
        "start 2": lambda: sora.connect(clip, clip, WORDS, start=2),
        "strength is 0": lambda: sora.edit(clip, WORDS, strength=0),
        "strength is 2": lambda: sora.inpaint(clip, WORDS, region=~region, strength=2),
        "False everywhere": lambda: sora.inpaint(clip, WORDS, region=region),
        r"bool tensor `4` \(frames\)": lambda: sora.inpaint(clip, WORDS, region=~region[:3]),
        "torch.from_numpy": lambda: sora.inpaint(clip, WORDS, region=~region.numpy()),
        "region is 3": lambda: sora.inpaint(clip, WORDS, region=3),
        "torch.int64": lambda: sora.inpaint(clip, WORDS, region=region.long()),
        "'cat'": lambda: sora.extend(clip, "cat", forward=1),
        r"\[\]": lambda: sora.extend(clip, [], forward=1),
        "does not fit 3": lambda: sora.extend(films[:2, :, :4], WORDS * 3, forward=1),
        "torch.uint8": lambda: sora.extend(clip.byte(), WORDS, forward=1),
        "no-such.webp: there is no such file": lambda: sora.extend("no-such.webp", WORDS, forward=1),
        r"shape \(1, 3, 32, 32\) looks like pictures": lambda: sora.edit(one[:, :, 0], WORDS),
        r"shape \(2, 4, 32, 32\) does not fit 1 prompt:": lambda: sora.edit(clip[0, :2], WORDS),
        "size is 16 32, but the clip is 32 x 32": lambda: sora.extend(clip, WORDS, forward=1, size=(16, 32)),
        "size is 16 16, but": lambda: next(sora.stream(WORDS, frames=1, given=clip, size=(16, 16))),
        "size must be": lambda: sora.edit(clip, WORDS, size=32),
        "frames follows from the clip": lambda: sora.edit(clip, WORDS, frames=4),
        "the clip reaches 255": lambda: sora.edit(clip * 0 + 255, WORDS),
        "the clip reaches nan": lambda: sora.edit(clip * math.nan, WORDS),
        "a window of 1 frames cannot be drawn: give 2 or more": lambda: sora.extend(clip, WORDS, forward=1, window=1),
        "cannot share 8": lambda: sora.extend(clip, WORDS, forward=1, overlap=8),
        "0 frames cannot": lambda: next(sora.stream(WORDS, frames=0)),
        "multiples of 8": lambda: sora.extend(clip[..., :12], WORDS, forward=1),
    }  # fmt: skip
    for words, call in calls.items():
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value), words
        assert len(str(caught.value)) < 200, words
