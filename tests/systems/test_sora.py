"""Sora: it draws what it learnt, from the words and the frames that it is given, the same for the same seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.backbones.video_dit import VideoDitConfig
from reverie.codecs.video_vae import VideoVaeConfig
from reverie.errors import InputError
from reverie.pictures import to_signal
from reverie.systems.sora import SAMPLERS, Sora, SoraConfig

PROMPTS = ["red square", "green disc", "火箭"]
near = {"atol": 1e-4, "rtol": 1e-3}


@pytest.fixture(scope="module")
def config(small) -> SoraConfig:
    return SoraConfig(
        backbone=VideoDitConfig(patch=(1, 4), width=32, depth=2, heads=2, context_width=16),
        text=small.config.text, size=(8, 8), frames=4, steps=6, guidance=2.0,
    )  # fmt: skip


LATENT = {
    "codec": VideoVaeConfig(channels=4, widths=(8, 8, 16)),
    "backbone": VideoDitConfig(channels=4, patch=(1, 2), width=32, depth=2, heads=2, context_width=16),
    "size": (32, 32),
    "frames": 6,
}


def awake(config: SoraConfig, tokenizer) -> Sora:
    """Random weights, also where a new model has zeros."""
    torch.manual_seed(0)
    model = Sora(config, tokenizer).eval()
    for parameter in model.backbone.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.15)
    return model


@pytest.fixture(scope="module")
def sora(config, tokenizer) -> Sora:
    return awake(config, tokenizer)


@pytest.fixture(scope="module")
def latent(config, tokenizer) -> Sora:
    return awake(dataclasses.replace(config, **LATENT), tokenizer)


def learn(model: Sora, videos: torch.Tensor, prompts: list[str], *, steps: int, known: float = 0.0) -> None:
    """Some steps on these few videos alone, four noises of each a step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.backbone.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    latents = model.encode(videos).repeat(4, 1, 1, 1, 1)
    tokens = model.tokenizer.encode(prompts).repeat(4, 1)
    b, frames = latents.shape[0], latents.shape[2]
    for _ in range(steps):
        mask = torch.zeros(b, frames, dtype=torch.bool)
        mask[:, 0] = torch.rand(b, generator=generator) < known
        batch = {
            "latents": latents,
            "tokens": tokens,
            "known": mask,
            "noise": torch.randn(latents.shape, generator=generator),
            "normal": torch.randn(b, generator=generator),
            "drop": torch.rand(b, generator=generator) < 0.1,
        }
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
        schedule.step()


def flat(colours: list[list[float]], size: int = 8) -> torch.Tensor:
    """Videos of flat grey frames, one number each: `b 3 f h w`."""
    return torch.tensor(colours)[:, None, :, None, None].expand(-1, 3, -1, size, size).contiguous()


def pictures(b: int, frames: int = 1, size: int = 8) -> torch.Tensor:
    """Gradients of different colours, moving sideways over the frames."""
    x = torch.linspace(-0.9, 0.9, size)
    ramps = torch.stack([x.roll(2 * f).expand(size, size) for f in range(frames)])
    ramps = torch.stack([ramps, ramps.mT, -ramps])  # c f h w
    return torch.stack([ramps.roll(i, 0) * (-1) ** i for i in range(b)])


# What it learns ----------------------------------------------------------------------------------------------------


def test_it_draws_the_pictures_that_it_learnt(config, tokenizer):
    """End to end: a wrong sign, time or place, or text taken for no text, cannot pass."""
    torch.manual_seed(0)
    model = Sora(
        dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, waves=4)), tokenizer
    )
    assert not model.backbone.out.weight.any()
    wanted = pictures(2)
    learn(model, wanted, PROMPTS[:2], steps=200)
    for sampler in SAMPLERS:
        out = model.generate_image(PROMPTS[:2], steps=12, guidance=1.5, sampler=sampler, seed=3)
        error = (out[:, None] - wanted[None, :, :, 0]).abs().mean((2, 3, 4))
        assert error.diagonal().max() < 0.15
        assert error.flip(1).diagonal().min() > 0.4  # each prompt has its own


@pytest.mark.parametrize("kind", ["velocity", "latent"])
def test_so_it_does_by_velocities_and_in_latents(config, tokenizer, kind):
    torch.manual_seed(0)
    small_patch = dataclasses.replace(config.backbone, patch=(1, 2))  # noise must pass through the width
    by_velocity = {"prediction": "velocity", "backbone": small_patch, "size": (4, 4)}
    changes = by_velocity if kind == "velocity" else LATENT | {"size": (16, 16), "frames": 5}
    model = Sora(dataclasses.replace(config, **changes), tokenizer)
    wanted = flat([[0.6], [-0.4]], size=model.config.size[0])
    learn(model, wanted, PROMPTS[:2], steps=150)
    out = model.generate_image(PROMPTS[:2], steps=12, guidance=1.0, seed=3)
    wanted = model.decode(model.encode(wanted))[:, :, 0]
    error = (out[:, None] - wanted[None]).abs().mean((2, 3, 4))
    apart = (wanted[0] - wanted[1]).abs().mean()
    assert error.diagonal().max() < 0.2 * apart
    assert error.flip(1).diagonal().min() > 0.8 * apart


def test_it_goes_on_from_the_first_frame_that_it_is_given(config, tokenizer):
    """One prompt, two clips: the first frame alone says which it is, and the other two follow in their order."""
    torch.manual_seed(0)
    model = Sora(dataclasses.replace(config, size=(4, 4), t_mean=1.5), tokenizer)
    wanted = flat([[0.6, 0.0, -0.6], [-0.6, 0.3, 0.9]], size=4)
    learn(model, wanted, PROMPTS[:1] * 2, steps=200, known=0.9)
    out = model.generate_video(PROMPTS[:1] * 2, frames=3, first_frame=wanted[:, :, 0], guidance=1.0, steps=12)
    assert out[:, :, 0].equal(wanted[:, :, 0])
    assert (out - wanted).abs().mean((1, 3, 4)).max() < 0.25


@torch.no_grad()
def test_the_loss_is_that_of_the_velocity_on_unknown_frames(sora, tokenizer):
    latents = pictures(2, 3)
    batch = {
        "latents": latents,
        "tokens": tokenizer.encode(PROMPTS[:2]),
        "noise": torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)),
        "t": torch.tensor([0.3, 0.7]),
        "drop": torch.tensor([False, True]),
        "known": torch.tensor([[True, False, False], [False, False, True]]),
    }
    x_t = latents.clone()
    seen, t = [], torch.tensor([[0.0, 0.3, 0.3], [0.7, 0.7, 0.0]])
    x_t = (1 - t)[:, None, :, None, None] * latents + t[:, None, :, None, None] * batch["noise"]
    hook = sora.backbone.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        loss = sora.loss(batch)["loss"]
    finally:
        hook.remove()
    torch.testing.assert_close(seen[0][0], x_t)
    torch.testing.assert_close(seen[0][1], t)
    out = sora.backbone(*seen[0])
    errors = [(out[i, :, f] - latents[i, :, f]) / t[i, f] for i, f in ((0, 1), (0, 2), (1, 0), (1, 1))]
    torch.testing.assert_close(loss, torch.stack(errors).square().mean(), **near)
    wild = batch | {"noise": batch["noise"].clone()}
    wild["noise"][0, :, 0] = 50.0  # the noise of a known frame is never used
    torch.testing.assert_close(sora.loss(wild)["loss"], loss)
    other = batch | {"tokens": tokenizer.encode([PROMPTS[0], PROMPTS[2]])}
    torch.testing.assert_close(sora.loss(other)["loss"], loss, **near)  # the second item's text is dropped
    assert sora.loss(batch | {"known": torch.ones(2, 3, dtype=torch.bool)})["loss"] == 0


def pack_of(tokenizer) -> dict:
    """A picture, a clip with given frames, and one with a given region: three shapes."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((1, 8, 12), (3, 4, 8), (2, 8, 8))
    known = [torch.zeros(1, dtype=torch.bool), torch.tensor([True, False, True])]
    known.append(torch.tensor([[[True, False], [False, False]]]).repeat(2, 1, 1))
    return {
        "latents": [torch.rand(3, *shape, generator=generator) for shape in shapes],
        "noise": [torch.randn(3, *shape, generator=generator) for shape in shapes],
        "known": known,
        "t": torch.tensor([0.3, 0.9, 0.6]),
        "drop": torch.tensor([False, True, False]),
        "tokens": tokenizer.encode(PROMPTS),
        "pace": [1.0, 2.0, 1.0],
    }


def test_the_loss_of_a_pack_is_that_of_its_items_by_their_places(sora, tokenizer):
    pack = pack_of(tokenizer)
    pace = pack.pop("pace")
    items = [{name: part[i][None] for name, part in pack.items()} | {"pace": pace[i]} for i in range(3)]
    pack["pace"] = pace
    places = torch.tensor([8 * 12.0, 4 * 8, 2 * 8 * 8 * 3 / 4])  # of which each item's loss is the mean
    packed = sora.loss(pack)["loss"]
    alone = (torch.stack([sora.loss(item)["loss"] for item in items]) * places).sum() / places.sum()
    torch.testing.assert_close(packed, alone)
    parameters = [p for p in sora.backbone.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(packed, parameters), torch.autograd.grad(alone, parameters), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_one_batch_has_one_loss_packed_or_not(latent, tokenizer):
    generator = torch.Generator().manual_seed(3)
    batch = {
        "latents": torch.randn(2, 4, 2, 4, 8, generator=generator),
        "noise": torch.randn(2, 4, 2, 4, 8, generator=generator),
        "known": torch.tensor([[True, False], [False, False]]),
        "normal": torch.randn(2, generator=generator),
        "drop": torch.zeros(2, dtype=torch.bool),
        "tokens": tokenizer.encode(PROMPTS[:2]),
    }
    packed = batch | {name: list(batch[name]) for name in ("latents", "noise", "known")}
    torch.testing.assert_close(latent.loss(packed), latent.loss(batch))


def test_a_masked_pass_adds_its_own_error(config, tokenizer):
    """At the same times, on other noise, and on frames that are not given alone."""
    backbone = dataclasses.replace(config.backbone, masked=(0.3, 0.5), decoder=1)
    model = awake(dataclasses.replace(config, backbone=backbone), tokenizer)
    latents, generator = pictures(2, 3), torch.Generator().manual_seed(1)
    batch = {
        "latents": latents,
        "tokens": tokenizer.encode(PROMPTS[:2]),
        "noise": torch.randn(latents.shape, generator=generator),
        "normal": torch.tensor([-0.3, 0.7]),
        "drop": torch.tensor([False, True]),
        "known": torch.tensor([[True, False, False], [False, False, True]]),
    }
    other = torch.randn(latents.shape, generator=generator)
    patches = latents[0, 0].numel() // backbone.patch[1] ** 2
    whole = model.loss(batch)
    assert whole.keys() == {"loss"}
    every = torch.arange(patches).expand(2, -1)
    both = model.loss(batch | {"masked_noise": other, "keep": every})
    torch.testing.assert_close(both["whole"], whole["loss"])
    torch.testing.assert_close(both["masked"], model.loss(batch | {"noise": other})["loss"], **near)
    torch.testing.assert_close(both["loss"], both["whole"] + both["masked"])
    some = model.loss(batch | {"masked_noise": other, "keep": every[:, ::2]})
    assert not torch.allclose(some["masked"], both["masked"], rtol=1e-3)
    given = model.loss(
        batch | {"masked_noise": other, "keep": every[:, ::2], "known": torch.ones(2, 3, dtype=torch.bool)}
    )
    assert given["loss"] == 0


def test_times_are_logit_normal_and_shifted(sora, config, tokenizer):
    normal = torch.linspace(-2, 2, 9)
    shifted = Sora(dataclasses.replace(config, t_mean=0.4, t_std=0.5, shift=3.0), tokenizer)
    plain, moved = sora.draw_times(normal), shifted.draw_times(normal)
    torch.testing.assert_close(plain, normal.sigmoid())
    odds = (0.4 + 0.5 * normal).exp() * 3
    torch.testing.assert_close(moved, odds / (1 + odds))


def test_only_the_backbone_learns(latent):
    trained = {
        name.partition(".")[0] for name, parameter in latent.named_parameters() if parameter.requires_grad
    }
    assert trained == {"backbone"}


# How it draws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sora", "latent"])
def test_the_seed_decides_to_the_byte(kind, request):
    model = request.getfixturevalue(kind)
    first = model.generate_video(PROMPTS, seed=5)
    torch.manual_seed(9)
    assert model.generate_video(PROMPTS, seed=5).equal(first)
    assert not torch.allclose(model.generate_video(PROMPTS, seed=6), first, atol=1e-2)
    assert first.abs().max() <= 1


@pytest.mark.parametrize(
    ("kind", "sampler"), [("sora", each) for each in SAMPLERS] + [("latent", "euler"), ("latent", "heun")]
)
def test_a_batch_is_its_items_drawn_alone(kind, sampler, request):
    model = request.getfixturevalue(kind)
    options = {"frames": 2, "sampler": sampler, "steps": 3}
    batch = model.generate(PROMPTS, seed=4, **options)
    for i, prompt in enumerate(PROMPTS):
        assert model.generate([prompt], seed=4 + i, **options)[0].equal(batch[i])  # to the bit
    assert model.generate(PROMPTS[::-1], seed=[6, 5, 4], **options).flip(0).equal(batch)
    torch.testing.assert_close(model.generate(PROMPTS, seed=4, together=True, **options), batch, **near)


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 4)])
@pytest.mark.parametrize("frames", [1, 3, 7])
def test_any_size_duration_and_aspect(sora, size, frames):
    out = sora.generate_video(["red square"], frames=frames, size=size, steps=2)
    assert out.shape == (1, 3, frames, *size)
    assert out.isfinite().all()


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_any_duration_in_latents(latent, frames):
    out = latent.generate_video(["red square"], frames=frames, size=(16, 32), steps=2)
    assert out.shape == (1, 3, frames, 16, 32)


def test_a_picture_is_a_video_of_one_frame(sora):
    assert sora.generate_image(PROMPTS).equal(sora.generate_video(PROMPTS, frames=1)[:, :, 0])
    assert sora.generate_image(PROMPTS).shape == (3, 3, 8, 8)
    assert sora.generate_video(PROMPTS).shape == (3, 3, 4, 8, 8)  # as it was trained


def test_the_prompt_and_the_guidance_matter(sora):
    one, other = sora.generate_image(PROMPTS[:2], seed=[0, 0], guidance=3.0)
    assert not torch.allclose(one, other, atol=1e-2)
    one, other = sora.generate_image(PROMPTS[:2], seed=[0, 0], guidance=0.0)
    torch.testing.assert_close(one, other, **near)  # weight 0: no text is heard
    asked = {"guidance": 0.0, "seed": [0, 0], "interval": (-1.0, 1.0)}
    torch.testing.assert_close(sora.generate_image(PROMPTS[:2], **asked, rescale=1e-9)[0], one, **near)
    calls = []
    hook = sora.backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        sora.generate_image(PROMPTS[:1], guidance=0.0, steps=2)
        sora.generate_image(PROMPTS[:1], guidance=2.0, steps=2)
    finally:
        hook.remove()
    assert calls == [1, 1, 2, 2]  # nor paid for
    images = [sora.generate_image(PROMPTS[:1], guidance=w) for w in (0.0, 1.0, 3.0)]
    assert (images[2] - images[0]).abs().mean() > (images[1] - images[0]).abs().mean() > 1e-3


def test_tokens_are_prompts_too(sora, tokenizer):
    assert sora.generate_image(tokenizer.encode(PROMPTS)).equal(sora.generate_image(PROMPTS))


@pytest.mark.parametrize("changes", [{"shift": 3.0}, {"steps": 3}, {"guidance": 5.0}])
def test_the_defaults_are_those_of_the_configuration(sora, config, tokenizer, changes):
    model = Sora(dataclasses.replace(config, **changes), tokenizer).eval()
    model.load_state_dict(sora.state_dict())
    out = model.generate_image(PROMPTS)
    assert not torch.allclose(out, sora.generate_image(PROMPTS), atol=1e-3)
    if "shift" not in changes:
        assert out.equal(sora.generate_image(PROMPTS, **changes))


@torch.no_grad()
def test_pace_is_heard(sora, tokenizer):
    assert not torch.allclose(sora.generate_video(PROMPTS, pace=2.0), sora.generate_video(PROMPTS), atol=1e-3)
    seen = []
    hook = sora.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    batch = {"latents": pictures(1, 2), "noise": pictures(1, 2), "tokens": tokenizer.encode(PROMPTS[:1])}
    batch |= {"normal": torch.zeros(1), "drop": torch.tensor([False]), "known": torch.zeros(1, 2).bool()}
    try:
        sora.loss(batch)
        sora.loss(batch | {"pace": 2.0})
    finally:
        hook.remove()
    assert [asked["pace"] for asked in seen] == [1.0, 2.0]


def test_progress_and_steps(sora):
    told = []
    sora.generate_image(PROMPTS[:2], steps=2, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    sora.generate_image(PROMPTS[:1], steps=3, progress=lambda done, of: told.append((done, of)))
    sora.generate_image(PROMPTS[:1], progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)] + [(i + 1, 6) for i in range(6)]


# Guidance ----------------------------------------------------------------------------------------------------------


def test_away_from_a_negative_prompt(sora):
    """Guidance leads from the negative text to the prompt: the prompt itself as negative is no guidance."""
    plain = sora.generate_image(PROMPTS, guidance=1.0)
    torch.testing.assert_close(
        sora.generate_image(PROMPTS[:1] * 3, guidance=4.0, negative=PROMPTS[0]),
        sora.generate_image(PROMPTS[:1] * 3, guidance=1.0),
        **near,
    )
    torch.testing.assert_close(
        sora.generate_image(PROMPTS, guidance=0.0, negative=PROMPTS[1])[1], plain[1], **near
    )  # nothing but the negative
    usual = sora.generate_image(PROMPTS, guidance=4.0)
    assert not torch.allclose(usual, sora.generate_image(PROMPTS, guidance=4.0, negative="frog"), atol=1e-2)
    tokens = sora.tokenizer.encode(PROMPTS, length=sora.config.text.length)
    torch.testing.assert_close(
        sora.generate_image(tokens, negative="frog"), sora.generate_image(PROMPTS, negative="frog"), **near
    )


def test_guidance_within_an_interval_and_rescaled(sora):
    plain, usual = (sora.generate_image(PROMPTS, guidance=weight) for weight in (1.0, 4.0))
    torch.testing.assert_close(sora.generate_image(PROMPTS, guidance=4.0, interval=(1.5, 2.0)), plain, **near)
    torch.testing.assert_close(sora.generate_image(PROMPTS, guidance=4.0, interval=(0, 1)), usual, **near)
    part = sora.generate_image(PROMPTS, guidance=4.0, interval=(0.3, 0.7))
    assert not torch.allclose(part, usual, atol=1e-2)
    assert not torch.allclose(part, plain, atol=1e-2)
    assert not torch.allclose(sora.generate_image(PROMPTS, guidance=4.0, rescale=1.0), usual, atol=1e-2)


# Given frames ------------------------------------------------------------------------------------------------------


FRAMES = [[0], [3], [0, 3], [1, 2], [0, 1, 2, 3], []]


@pytest.mark.parametrize(
    ("frames", "sampler"), [(each, "euler") for each in FRAMES] + [([0, 3], each) for each in SAMPLERS]
)
def test_known_frames_come_back_unchanged_and_are_heard(sora, frames, sampler):
    known, mask = pictures(2, 4), torch.zeros(2, 4, dtype=torch.bool)
    mask[:, frames] = True
    options = {"frames": 4, "known_mask": mask, "sampler": sampler}
    out = sora.generate(PROMPTS[:2], known=known, **options)
    assert out[:, :, frames].equal(known[:, :, frames])
    rest = [i for i in range(4) if i not in frames]
    hidden = known.clone()
    hidden[:, :, rest] = 0.3  # what stands in unknown frames is not looked at
    assert sora.generate(PROMPTS[:2], known=hidden, **options).equal(out)
    rescaled = sora.generate(PROMPTS[:2], known=known, rescale=1.0, **options)
    assert rescaled[:, :, frames].equal(known[:, :, frames])
    if frames and rest:
        other = sora.generate(PROMPTS[:2], known=-known, **options)
        assert not torch.allclose(other[:, :, rest], out[:, :, rest], atol=1e-3)


def test_every_item_may_know_other_frames(sora):
    known, mask = pictures(2, 4), torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0], mask[1, 2:] = True, True
    both = sora.generate(PROMPTS[:2], frames=4, known=known, known_mask=mask)
    for i in range(2):
        one = sora.generate(
            [PROMPTS[i]], frames=4, known=known[i : i + 1], known_mask=mask[i : i + 1], seed=i
        )
        torch.testing.assert_close(one[0], both[i], **near)


def test_the_first_frame_may_be_a_picture_or_its_path(sora, tmp_path):
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    picture.save(tmp_path / "first.png")
    size = sora.config.size
    expected = sora.generate_video(
        PROMPTS[:1], first_frame=torch.from_numpy(to_signal(picture, size=size)), frames=2
    )
    for first in (picture, tmp_path / "first.png", str(tmp_path / "first.png")):
        assert sora.generate_video(PROMPTS[:1], first_frame=first, frames=2).equal(expected)


def test_first_frame_is_a_known_frame(sora):
    first = pictures(2)[:, :, 0]
    known, mask = torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 4, dtype=torch.bool)
    known[:, :, 0], mask[:, 0] = first, True
    for guidance in (1.0, 3.0):
        expected = sora.generate(PROMPTS[:2], frames=4, known=known, known_mask=mask, guidance=guidance)
        own = {} if guidance == 1 else {"guidance": guidance}
        assert sora.generate_video(PROMPTS[:2], first_frame=first, **own).equal(expected)
    shared = sora.generate_video(PROMPTS[:2], first_frame=first[0])
    assert shared[:, :, 0].equal(first[:1].expand(2, -1, -1, -1))
    assert shared.equal(sora.generate_video(PROMPTS[:2], first_frame=first[:1], size=None))
    tall = sora.generate_video(PROMPTS[:1], first_frame=torch.zeros(3, 12, 4), frames=2)
    assert tall.shape == (1, 3, 2, 12, 4)


def test_a_late_start_stays_near_the_known_video(config, tokenizer):
    """A new network predicts grey; the later the start, the more of the known video is left."""
    model, known = Sora(config, tokenizer), pictures(2, 4)
    starts = (0.001, 0.01, 0.05, 0.4, 0.9)
    options = {"frames": 4, "known": known, "steps": 12}
    videos = [model.generate(PROMPTS[:2], start=start, **options) for start in starts]
    distance = [(video - known).abs().mean().item() for video in videos]
    assert distance == sorted(distance)
    assert distance[0] < 0.02 < 0.3 < distance[-1]
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 1] = True
    out = model.generate(PROMPTS[:2], known_mask=mask, start=0.4, **options)
    assert out[:, :, 1].equal(known[:, :, 1])  # both at once
    rest = [0, 2, 3]
    torch.testing.assert_close(out[:, :, rest], videos[3][:, :, rest], **near)


def test_in_latents_too_what_is_known_comes_back_and_the_rest_is_as_the_codec_has_it(latent):
    first = pictures(2, size=32)[:, :, 0]
    out = latent.generate_video(PROMPTS[:2], first_frame=first, frames=6)
    assert out.shape == (2, 3, 6, 32, 32)
    assert out[:, :, 0].equal(first)
    known = pictures(2, 6, size=32)
    mask = torch.ones(2, 6, 32, 32, dtype=torch.bool)
    mask[:, :, :3, :3] = False  # less than a latent stands for
    some = latent.generate(PROMPTS[:2], frames=6, known=known, known_mask=mask)
    assert some[:, :, :, 3:].equal(known[:, :, :, 3:])
    assert not some[:, :, :, :3, :3].equal(known[:, :, :, :3, :3])
    options = {"frames": 6, "known_mask": mask[..., 0, 4].clone()}
    options["known_mask"][:, 5] = False
    once = latent.generate(PROMPTS[:2], known=known, **options)
    assert once[:, :, :5].equal(known[:, :, :5])
    hidden = known.clone()
    hidden[:, :, 5] = 0.3  # what stands in unknown frames is not looked at
    assert latent.generate(PROMPTS[:2], known=hidden, **options).equal(once)


# Mistakes ----------------------------------------------------------------------------------------------------------


def bad_calls(sora: Sora, latent: Sora) -> dict[str, tuple]:
    one, video, mask = ["cat"], torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 4, dtype=torch.bool)
    return {
        "one string": (lambda: sora.generate("cat"), "'cat'"),
        "no prompts": (lambda: sora.generate([]), r"\[\]"),
        "not words": (lambda: sora.generate([3]), r"\[3\]"),
        "a size that does not fit": (lambda: sora.generate(one, size=(8, 10)), "multiples of 4"),
        "size nothing": (lambda: sora.generate(one, size=(8, 0)), "multiples of 4"),
        "one side": (lambda: sora.generate(one, size=(8,)), r"\(8,\)"),
        "one number": (lambda: sora.generate_video(one, size=8, first_frame=video[:, :, 0]), r"write \(8, 8\)"),
        "a size for pixels": (lambda: latent.generate(one, size=(24, 32)), "multiples of 16"),
        "no frames": (lambda: sora.generate_video(one, frames=0), "0 frames"),
        "fewer": (lambda: latent.generate_video(one, frames=-1), "-1 frames"),
        "none after a first": (lambda: sora.generate_video(one, frames=0, first_frame=video[:, :, 0]), "0 frames"),
        "no steps": (lambda: sora.generate(one, steps=0), "0 steps"),
        "a sampler": (lambda: sora.generate(one, sampler="ddim"), "'ddim'.*euler, heun"),
        "a negative list": (lambda: sora.generate(one, negative=["a"]), r"\['a'\]"),
        "half an interval": (lambda: sora.generate(one, interval=(0.2,)), r"\(0.2,\)"),
        "an empty interval": (lambda: sora.generate(one, interval=(0.8, 0.2)), "holds no time"),
        "an interval of text": (lambda: sora.generate(one, interval="ab"), "'ab'"),
        "a share above 1": (lambda: sora.generate(one, rescale=2.0), "rescale 2.0"),
        "seeds": (lambda: sora.generate(one, seed=[1, 2]), "2 seeds were given for 1"),
        "start 0": (lambda: sora.generate(one, frames=4, known=video, start=0.0), "start 0.0"),
        "start above 1": (lambda: sora.generate(one, start=1.5), "start 1.5"),
        "a start from nothing": (lambda: sora.generate(one, start=0.5), "known video"),
        "another video": (lambda: sora.generate(one, frames=3, known=video, start=0.5), r"known has shape .*4, 8, 8"),
        "another mask": (
            lambda: sora.generate(one, frames=4, known=video, known_mask=mask[:, :2]),
            r"known_mask has shape \(1, 2\)",
        ),
        "a mask alone": (lambda: sora.generate(one, frames=4, known_mask=mask), "without known"),
        "frames alone": (lambda: sora.generate(one, frames=4, known=video), "known would change nothing"),
        "a mask of numbers": (lambda: sora.generate(one, frames=4, known=video, known_mask=mask.long()), "int64"),
        "bytes": (lambda: sora.generate(one, frames=4, known=video.byte(), known_mask=mask), "uint8"),
        "a first frame of another size": (
            lambda: sora.generate_video(one, first_frame=torch.zeros(3, 8, 8), size=(4, 4)),
            r"\(3, 8, 8\).*\(4, 4\)",
        ),
        "two first frames": (
            lambda: sora.generate_video(one, first_frame=torch.zeros(2, 3, 8, 8)), r"\(2, 3, 8, 8\).*1 of size"
        ),
        "a size of text": (lambda: sora.generate(one, size="64"), "'64'"),
        "a size of parts": (lambda: sora.generate(one, size=(8.5, 8)), "8.5"),
        "no side": (lambda: sora.generate(one, size=()), r"size \(\)"),
        "frames of text": (lambda: sora.generate(one, frames="4"), "'4' frames"),
        "steps of text": (lambda: sora.generate(one, steps="2"), "'2' steps"),
        "guidance of text": (lambda: sora.generate(one, guidance="4"), "guidance '4'"),
        "guidance beyond numbers": (lambda: sora.generate(one, guidance=1e300), "1e\\+300"),
        "half a seed": (lambda: sora.generate(one, seed=1.5), "seed 1.5"),
        "no seed": (lambda: sora.generate(one, seed=None), "seed None"),
        "a seed of text": (lambda: sora.generate(one, seed="7"), "seed '7'"),
        "an endless seed": (lambda: sora.generate(one, seed=float("inf")), "seed inf"),
        "seeds of text": (lambda: sora.generate(one, seed=["a"]), "'a'"),
        "no pace": (lambda: sora.generate(one, pace=0), "pace 0"),
        "an unknown pace": (lambda: sora.generate(one, pace=float("nan")), "pace nan"),
        "a start of text": (lambda: sora.generate(one, start="a"), "start 'a'"),
        "an unknown video": (lambda: sora.generate(one, frames=4, known=video / 0, known_mask=mask), "NaN"),
        "an array": (lambda: sora.generate(one, frames=4, known=video.numpy(), known_mask=mask), "as_tensor"),
        "a frame and no list": (lambda: sora.generate_video(None, first_frame=video[0, :, 0]), "None"),
        "a frame and text": (lambda: sora.generate_video(one, frames="a", first_frame=video[0, :, 0]), "'a'"),
        "no first frame": (lambda: sora.generate_video(one, first_frame=torch.zeros(8, 8)), r"\(8, 8\)"),
    }  # fmt: skip


def test_mistakes_are_told_in_a_sentence(sora, latent):
    for what, (call, words) in bad_calls(sora, latent).items():
        with pytest.raises(InputError, match=words) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message, what
        assert len(message) < 200, what


def test_without_a_tokenizer_it_asks_for_tokens(config, tokenizer):
    model = Sora(config)
    with pytest.raises(InputError, match="no tokenizer"):
        model.generate_image(["cat"])
    assert model.generate_image(tokenizer.encode(["cat"]), steps=1).shape == (1, 3, 8, 8)


def test_a_cache_spares_blocks_and_at_0_changes_nothing(sora):
    """The last block works in every step without a cache; with a threshold that nothing reaches, in the first alone."""
    times: list[int] = []
    handle = sora.backbone.blocks[-1].register_forward_hook(lambda *_: times.append(1))

    def draw(cache: float) -> tuple[torch.Tensor, int]:
        times.clear()
        return sora.generate_image(["red square"], seed=3, steps=6, cache=cache), len(times)

    plain, often = draw(0)
    assert often == 6
    same, often = draw(1e-9)
    assert often == 6
    assert torch.equal(plain, same)
    other, often = draw(1e9)
    assert often == 1
    assert not torch.equal(plain, other)
    with pytest.raises(InputError, match="no threshold"):
        draw(-1)
    handle.remove()


@torch.no_grad()
def test_numbers_of_numpy_are_numbers(sora, tokenizer):
    plain = sora.generate(PROMPTS[:1], size=(4, 4), steps=1, pace=2, seed=3)
    assert torch.equal(
        sora.generate(PROMPTS[:1], size=(4, 4), steps=1, pace=np.int64(2), seed=np.int64(3)), plain
    )
    assert torch.equal(
        sora.generate(PROMPTS[:1], size=(4, 4), steps=1, pace=np.float32(2), seed=3, cache=np.float32(0)),
        plain,
    )


@torch.no_grad()
def test_pixels_of_another_range_are_refused(sora):
    with pytest.raises(InputError, match=r"known reaches 255: give frames in \[-1, 1\]"):
        sora.generate(PROMPTS[:1], size=(4, 4), steps=1, start=0.5, known=torch.full((1, 3, 1, 4, 4), 255.0))
