"""The perceptual loss: nothing between equal pictures, more the more is spoilt, and gradients for the drawing alone."""

from __future__ import annotations

import pytest
import torch

import reverie
from reverie.objectives.perceptual import perceptual, tiled


@pytest.fixture(scope="module")
def clip():
    return reverie.load("clip-stickers")


def picture(b: int = 2, size: int = 64) -> torch.Tensor:
    """Discs on white."""
    at = torch.linspace(-1, 1, size)
    inside = (at[:, None] ** 2 + at[None] ** 2 < 0.5).float()
    colours = torch.rand(b, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return inside * colours + (1 - inside)


def test_it_is_nothing_between_equal_pictures_and_grows(clip):
    true = picture()
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    assert perceptual(true, true, clip.layers) == 0
    losses = [perceptual(true + s * noise, true, clip.layers).item() for s in (0.02, 0.1, 0.3, 0.6)]
    assert losses == sorted(losses)
    assert losses[-1] < 4
    blurred = torch.nn.functional.avg_pool2d(true, 5, stride=1, padding=2, count_include_pad=False)
    shifted = true + (blurred - true).abs().mean()  # as far in L1, and nothing is lost
    assert perceptual(blurred, true, clip.layers) > 3 * perceptual(shifted, true, clip.layers)


def test_it_is_the_distance_of_unit_vectors_by_hand():
    def features(x):
        flat = x.flatten(2).transpose(1, 2)  # colours as features
        return [flat, 2 * flat[:, ::2]]  # lengths do not count

    a, b = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    angle = torch.cosine_similarity(a, b, dim=1).flatten(1)
    expected = torch.stack([(2 - 2 * angle).mean(), (2 - 2 * angle[:, ::2]).mean()]).mean()
    torch.testing.assert_close(perceptual(a, b, features), expected)
    clips = (rows[:, :, None].expand(-1, -1, 2, -1, -1) for rows in (a, b))
    torch.testing.assert_close(perceptual(*clips, features), expected)


def test_the_gradient_reaches_the_drawing_and_not_the_network(clip):
    true = picture()
    drawn = (true + 0.1).requires_grad_()
    perceptual(drawn, true, clip.layers).backward()
    assert drawn.grad is not None
    assert (drawn.grad.abs().sum((1, 2, 3)) > 0).all()
    assert drawn.grad.isfinite().all()
    assert all(p.grad is None for p in clip.parameters())


def test_following_it_brings_back_the_picture(clip):
    true = picture(1)
    drawn = (0.5 * true).requires_grad_()
    optimizer = torch.optim.Adam([drawn], lr=0.03)
    first = perceptual(drawn, true, clip.layers).item()
    for _ in range(30):
        loss = perceptual(drawn, true, clip.layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


@pytest.mark.parametrize(
    ("box", "tiles"), [((8, 8), 1), ((16, 8), 2), ((20, 17), 9), ((4, 4), 1), ((4, 10), 3)]
)
def test_tiles_cover_a_picture_of_any_size(box, tiles):
    seen = []

    def features(x):
        seen.append(x)
        return [x]

    image = torch.randn(2, 3, *box, requires_grad=True)
    tiled(features, 8)(image)
    assert seen[0].shape == (2 * tiles, 3, 8, 8)
    (felt,) = torch.autograd.grad(seen[0].sum(), image)
    assert (felt > 0).all()
    if box == (8, 8):
        assert seen[0].equal(image)


def test_layers_end_with_the_features_of_the_tower(clip):
    x = picture()
    layers = clip.layers(x)
    convolutions = [layer.shape[1] for layer in layers[: -len(clip.image.blocks)]]
    assert convolutions == [256, 64, 16]
    pooled = clip.image.norm_post(layers[-1]).mean(1)
    unit = torch.nn.functional.normalize(clip.image_projection(pooled), dim=-1)
    torch.testing.assert_close(unit, clip.embed_image(x))
