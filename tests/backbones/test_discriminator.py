"""A discriminator judges patches of frames and of clips, each item by itself."""

from __future__ import annotations

import pytest
import torch

from reverie.backbones.discriminator import Discriminator, DiscriminatorConfig, Patches


def video(b: int = 2, frames: int = 5, size: int = 64) -> torch.Tensor:
    return torch.randn(b, 3, frames, size, size, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
def test_pictures_have_no_motion_to_judge():
    model = Discriminator(DiscriminatorConfig(width=8))
    assert [logits.shape for logits in model(video(frames=1))] == [(2, 1, 8, 8)]
    assert [logits.shape for logits in model(video())] == [(2, 5, 8, 8)] * 2
    assert len(Discriminator(DiscriminatorConfig(width=8, clips=False))(video())) == 1


@torch.no_grad()
def test_items_and_frames_are_judged_by_themselves():
    torch.manual_seed(0)
    model, x = Discriminator(DiscriminatorConfig(width=8)).train(), video(3)
    for alone, together in zip(model(x[1:2]), model(x), strict=True):
        torch.testing.assert_close(alone[0], together[1])
    turned = x.flip(2)
    frames, clips = model(turned)
    torch.testing.assert_close(frames.flip(1), model(x)[0])  # a frame does not know its neighbours
    assert not torch.allclose(clips.flip(1), model(x)[1], atol=1e-3)  # a motion knows its direction


@pytest.mark.parametrize(("depth", "side"), [(1, 8), (2, 18), (3, 38)])
def test_a_patch_has_the_size_that_is_told(depth, side):
    """By gradient, without the norm, which sees the whole picture."""
    judge = Patches(DiscriminatorConfig(width=8, depth=depth), time=1)
    judge.body = torch.nn.Sequential(*(m for m in judge.body if not isinstance(m, torch.nn.GroupNorm)))
    x = video(1, 1).requires_grad_()
    logits = judge(x)
    (felt,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    seen = felt.abs().sum((0, 1, 2))
    assert (seen.sum(0) > 0).sum() == (seen.sum(1) > 0).sum() == side


def test_it_learns_to_tell_a_motion_from_its_reverse():
    torch.manual_seed(0)
    model = Discriminator(DiscriminatorConfig(width=8, depth=2))
    ramp = torch.linspace(-1, 1, 5)[:, None, None].expand(5, 16, 16)
    real = ramp.expand(2, 3, 5, 16, 16)
    drawn = real.flip(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = (1 - model(real)[1]).relu().mean() + (1 + model(drawn)[1]).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
