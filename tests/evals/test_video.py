"""Measures from frame to frame, on clips whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from einops import repeat

from reverie.errors import InputError
from reverie.evals.video import clip_score, consistency, flicker, frame_features


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_frames_are_embedded_one_by_one():
    """Each frame's feature is that of the frame alone, in the order of the clip."""
    clips = noise(3, 3, 5, 4, 4)

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        return pictures.flatten(1)[:, :10]

    found = frame_features(clips, embed, batch=4)
    assert found.shape == (3, 5, 10)
    assert torch.allclose(found[1, 3], F.normalize(embed(clips[1:2, :, 3]), dim=-1)[0])
    assert torch.equal(frame_features(clips[:, :, 2], embed), found[:, 2:3])


def test_the_clip_score_is_the_cosine_of_each_frame():
    text = F.normalize(noise(4, 6, seed=1), dim=-1)
    other = F.normalize(noise(4, 6, seed=2), dim=-1)
    features = torch.stack([text, -text, other], dim=1)
    found = clip_score(features, text)
    assert torch.allclose(found[:, 0], torch.ones(4))
    assert torch.allclose(found[:, 1], -torch.ones(4))
    assert torch.allclose(found[:, 2], (text * other).sum(-1))
    with pytest.raises(InputError):
        clip_score(features, text[:3])


def test_consistency_is_one_without_change_and_known_for_a_turn():
    still = repeat(F.normalize(noise(2, 6), dim=-1), "n d -> n f d", f=5)
    assert torch.allclose(consistency(still), torch.ones(2))
    angles = 0.3 * torch.arange(5.0)
    turning = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert consistency(turning).item() == pytest.approx(torch.tensor(0.3).cos().item())
    with pytest.raises(InputError):
        consistency(still[:, :1])


def test_flicker_has_its_three_landmarks():
    even = repeat(torch.linspace(-0.5, 0.5, 9), "f -> n c f h w", n=2, c=3, h=4, w=4)
    alternating = repeat(torch.tensor([0.3, -0.3] * 4), "f -> n c f h w", n=2, c=3, h=4, w=4)
    assert flicker(even).abs().max() < 1e-5
    assert torch.allclose(flicker(alternating), torch.full((2,), 2.0))
    assert flicker(noise(2, 3, 40, 16, 16)).mean().item() == pytest.approx(3**0.5, rel=0.02)
    assert (flicker(torch.zeros(2, 3, 8, 4, 4)) == 0).all()
    with pytest.raises(InputError):
        flicker(even[:, :, :2])
