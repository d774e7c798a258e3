"""The video autoencoder: causal in time, exact in shape, its normalisation undone by decoding."""

from __future__ import annotations

import pytest
import torch

from reverie.codecs.video_vae import VideoVae, VideoVaeConfig

CONFIG = VideoVaeConfig(channels=4, widths=(8, 8, 16), temporal=(True, True))


def awake(config: VideoVaeConfig) -> VideoVae:
    """Random weights, also where a new model has zeros."""
    torch.manual_seed(0)
    vae = VideoVae(config).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vae


@pytest.fixture(scope="module")
def vae() -> VideoVae:
    return awake(CONFIG)


def video(frames: int, b: int = 1, size: tuple[int, int] = (16, 16), seed: int = 0) -> torch.Tensor:
    return torch.rand(b, 3, frames, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


near = {"atol": 1e-5, "rtol": 1e-4}


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_shapes_and_back(vae, frames, size):
    x = video(frames, b=2, size=size)
    latents = vae.encode(x)
    assert tuple(latents.shape) == (2, *vae.latent_shape(frames, size))
    assert vae.decode(latents).shape == x.shape
    assert CONFIG.stride == (4, 8)


@torch.no_grad()
@pytest.mark.parametrize("frames", range(1, 12))
def test_a_duration_is_filled_to_whole_latent_frames(vae, frames):
    whole = vae.whole(frames)
    assert frames <= whole < frames + 4
    assert vae.latent_shape(frames, (8, 8)) == vae.latent_shape(whole, (8, 8))
    assert vae.encode(video(whole, size=(8, 8))).shape[2] == vae.latent_shape(frames, (8, 8))[1]
    assert vae.decode(torch.zeros(1, *vae.latent_shape(frames, (8, 8)))).shape[2] == whole


@torch.no_grad()
def test_the_latents_of_a_beginning_are_the_beginning_of_the_latents(vae):
    x = video(9)
    latents = vae.encode(x)
    for frames, latent_frames in ((1, 1), (5, 2)):  # a picture is encoded as the first frame of a clip
        torch.testing.assert_close(vae.encode(x[:, :, :frames]), latents[:, :, :latent_frames], **near)
    for frames, latent_frames in ((1, 1), (5, 2)):
        beginning = vae.decode(latents[:, :, :latent_frames])
        torch.testing.assert_close(beginning, vae.decode(latents)[:, :, :frames], **near)


def test_which_frames_a_latent_frame_sees(vae):
    """By gradient: latent frame g sees its own four frames and those before; a frame comes of its latent and before."""
    x = video(9).requires_grad_()
    for g in range(3):
        (felt,) = torch.autograd.grad((vae.encode(x)[:, :, g] ** 2).sum(), x)
        seen = felt.abs().sum((0, 1, 3, 4)) > 0
        assert not seen[4 * g + 1 :].any()
        assert seen[max(4 * g - 3, 0) : 4 * g + 1].all()
    latents = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    for i in range(9):
        (felt,) = torch.autograd.grad((vae.decode(latents)[:, :, i] ** 2).sum(), latents)
        seen = felt.abs().sum((0, 1, 3, 4)) > 0
        own = -(-i // 4)
        assert seen[own]
        assert not seen[own + 1 :].any()


@torch.no_grad()
def test_a_clip_is_encoded_alike_in_any_batch(vae):
    x = torch.cat([video(5, seed=seed) for seed in range(3)])
    for i in range(3):
        torch.testing.assert_close(vae.encode(x[i : i + 1])[0], vae.encode(x)[i], **near)


@torch.no_grad()
def test_normalised_latents_are_the_raw_ones_to_the_decoder():
    torch.manual_seed(0)
    vae, x = VideoVae(CONFIG).eval(), video(5)
    raw = vae.posterior(x)[0]
    assert vae.encode(x).equal(raw)  # before anything was measured
    before = vae.decode(raw)
    vae.mean.copy_(raw.mean((0, 2, 3, 4)))
    vae.std.copy_(raw.std((0, 2, 3, 4)))
    latents = vae.encode(x)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), **near)
    torch.testing.assert_close(vae.decode(latents), before, atol=1e-4, rtol=1e-3)
    assert {"mean", "std"} <= vae.state_dict().keys()  # they travel with the weights


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([0], [0]),
        ([0, 1, 2, 3, 4], [0, 1]),
        ([0, 1, 2, 3], [0]),
        ([5, 6, 7, 8], [2]),
        ([1, 2, 3, 4, 5], [1]),
        (range(9), [0, 1, 2]),
        ([], []),
    ],
)
def test_a_latent_frame_is_known_when_all_its_frames_are(vae, known, expected):
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, list(known)] = True
    out = vae.latent_mask(mask)
    assert not out[0].any()
    assert out[1].nonzero().flatten().tolist() == expected
    assert vae.latent_mask(mask[:, :1]).equal(mask[:, :1])


def test_it_learns_to_give_back_a_clip():
    torch.manual_seed(0)
    vae = VideoVae(CONFIG)
    frames = torch.linspace(-0.8, 0.8, 5)[None, :, None, None]
    x = (frames * torch.tensor([1.0, -1.0, 0.5])[:, None, None, None]).expand(1, 3, 5, 16, 16).contiguous()
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    batch = {"video": x, "noise": torch.zeros(1, *vae.latent_shape(5, (16, 16)))}
    losses = []
    for _ in range(60):
        loss = vae.loss(batch)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        losses.append(loss["l1"].item())
    assert losses[-1] < 0.25 * losses[0]
    assert loss["kl"] > 0
    with torch.no_grad():
        assert (vae.decode(vae.encode(x)) - x).abs().mean() < 0.25 * losses[0]


@torch.no_grad()
def test_the_loss_is_l1_and_a_little_kl(vae):
    x, noise = video(5), torch.randn(1, *vae.latent_shape(5, (16, 16)))
    mean, log_variance = vae.posterior(x)
    parts = vae.loss({"video": x, "noise": noise}, kl=0.5)
    one = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(one, torch.distributions.Normal(0, 1)).mean()
    torch.testing.assert_close(parts["kl"], divergence)
    torch.testing.assert_close(parts["l1"], (vae.draw(mean + noise * one.scale) - x).abs().mean())
    torch.testing.assert_close(parts["loss"], parts["l1"] + 0.5 * divergence)
