"""Views: what a row of numbers does, and that it alone decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.data.augment import DRAWS, draws, framed, on_white, view


def pictures(b: int = 4, side: int = 16) -> torch.Tensor:
    """Smooth colours, opaque in the middle, transparent at the rim."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(b, 4, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(small, size=(side, side), mode="bilinear")
    alpha = torch.zeros(side, side)
    alpha[4:-4, 4:-4] = 1
    return (torch.cat([x[:, :3], alpha.expand(b, 1, side, side)], 1) * 255).round().byte()


def neutral(b: int = 4) -> torch.Tensor:
    """The row of a view that changes nothing: no turn, white ground, no recolouring, nothing softened or wiped."""
    u = torch.full((b, DRAWS), 0.5)
    u[:, 0], u[:, 5], u[:, 18] = 0.2, 0.35, 0.9
    return u


def test_on_white():
    rgba = torch.tensor(
        [[[255, 0, 128, 10]], [[0, 0, 0, 20]], [[0, 255, 64, 30]], [[255, 255, 128, 0]]]
    ).byte()
    out = on_white(rgba)
    assert out.shape == (3, 1, 4)
    assert out[:, 0, 0].tolist() == [1, -1, -1]
    assert out[:, 0, 1].tolist() == [-1, -1, 1]
    torch.testing.assert_close(out[:, 0, 2], 2 * ((rgba[:3, 0, 2] / 255 - 1) * 128 / 255 + 1) - 1)
    assert out[:, 0, 3].tolist() == [1, 1, 1]  # wholly transparent is white, whatever lies behind
    batch = pictures()[None]
    assert on_white(batch).shape == (1, 4, 3, 16, 16)
    assert on_white(batch)[0, 2].equal(on_white(batch[0, 2]))


def test_strength_zero_and_the_neutral_row_change_nothing():
    rgba, u = pictures(), torch.rand(4, DRAWS, generator=torch.Generator().manual_seed(1))
    assert view(rgba, u, strength=0).equal(on_white(rgba))
    for strength in (0.5, 1.0):
        torch.testing.assert_close(
            view(rgba, neutral(), strength=strength), on_white(rgba), atol=2e-3, rtol=0
        )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
)
def test_views_are_pictures_of_the_same_size(seed, strength, h, w):
    rgba = torch.randint(0, 256, (3, 4, 2 * h, 2 * w), generator=torch.Generator().manual_seed(seed)).byte()
    out = view(rgba, draws(seed, [(0, i) for i in range(3)]), strength=strength)
    assert out.shape == (3, 3, 2 * h, 2 * w)
    assert out.isfinite().all()
    assert out.min() >= -1
    assert out.max() <= 1


def test_a_view_depends_on_its_row_alone():
    rgba, u = pictures(6), draws(0, [(0, i) for i in range(6)])
    together = view(rgba, u)
    for i in range(6):
        torch.testing.assert_close(view(rgba[i : i + 1], u[i : i + 1])[0], together[i], atol=1e-5, rtol=0)
    same = view(rgba[:1].expand(6, -1, -1, -1), u[:1].expand(6, -1))
    torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-5, rtol=0)


def test_the_global_state_of_randomness_does_not_matter():
    rgba, u = pictures(), draws(0, [(0, i) for i in range(4)])
    torch.manual_seed(1)
    first = view(rgba, u)
    torch.manual_seed(2)
    assert view(rgba, u).equal(first)


def test_draws_are_keyed_by_seed_purpose_epoch_and_sample():
    keys = [(0, 3), (1, 3), (0, 4)]
    rows = draws(0, keys)
    assert rows.shape == (3, DRAWS)
    assert rows.min() >= 0
    assert rows.max() < 1
    assert draws(0, keys[::-1]).equal(rows.flip(0))  # the place in the batch is no part of the key
    others = torch.cat([rows, draws(1, keys[:1]), draws(0, keys[:1], "other")])
    assert len({tuple(row.tolist()) for row in others}) == 5


GEOMETRY, COLOUR = (4, 5, 6, 7, 8, 9), (10, 11, 13, 14, 15)


@pytest.mark.parametrize("place", GEOMETRY + COLOUR)
def test_every_number_has_its_effect_and_strength_scales_it(place):
    rgba = pictures()
    u = neutral()
    u[:, place] = 0.9
    changes = [(view(rgba, u, strength=s) - on_white(rgba)).abs().mean().item() for s in (0.1, 0.5, 1.0)]
    assert 0 < changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("place", COLOUR)
def test_recolouring_is_of_each_pixel_alone(place):
    """A picture of one colour stays one, the same that this colour gets elsewhere."""
    u = neutral(1)
    u[:, place] = 0.9
    colours = torch.tensor([[200, 60, 90], [30, 120, 220]]).byte()
    halves = torch.full((1, 4, 8, 8), 255, dtype=torch.uint8)
    halves[0, :3, :, :4], halves[0, :3, :, 4:] = (colour[:, None, None] for colour in colours)
    out = view(halves, u)[0]
    for colour, half in zip(colours, (out[..., :4], out[..., 4:]), strict=True):
        flat = torch.cat([colour, torch.tensor([255]).byte()])[None, :, None, None].expand(1, 4, 8, 8)
        expected = view(flat, u)[0, :, 4, 4]
        torch.testing.assert_close(half, expected[:, None, None].expand(3, 8, 4), atol=1e-3, rtol=0)


def test_a_turn_and_what_lies_outside_is_ground():
    """A strength that makes the turn a right angle."""
    rgba, u = pictures(), neutral()
    u[:, 4] = 1.0
    turned = view(rgba, u, strength=3.5)
    errors = [(turned - on_white(rgba).rot90(k, (-2, -1))).abs().max() for k in (1, -1, 2, 0)]
    assert min(errors[:2]) < 5e-3 < 0.1 < min(errors[2:])
    u = neutral()
    u[:, 8] = 7.0  # moved out of sight
    assert (view(rgba, u) > 0.998).all()


def test_transparent_ground_may_have_a_colour():
    rgba, u = pictures(), neutral()
    u[:, 0] = 0.7
    u[:, 1:4] = torch.tensor([0.1, 0.6, 0.9])
    out = (view(rgba, u) + 1) / 2
    torch.testing.assert_close(out[:, :, 0, 0], torch.tensor([0.1, 0.6, 0.9]).expand(4, 3), atol=2e-3, rtol=0)
    middle = (slice(None), slice(None), slice(5, -5), slice(5, -5))
    torch.testing.assert_close(out[middle], (on_white(rgba)[middle] + 1) / 2, atol=2e-3, rtol=0)


def test_one_in_twelve_is_grey():
    u = neutral()
    u[:, 12] = 0.05
    out = view(pictures(), u)
    torch.testing.assert_close(out[:, :1].expand_as(out), out, atol=2e-3, rtol=0)
    luma = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * on_white(pictures())).sum(1)
    torch.testing.assert_close(out[:, 0], luma, atol=5e-3, rtol=0)


@pytest.mark.parametrize("which", [0.1, 0.9])
def test_softening_keeps_flat_colours_and_the_mean_but_takes_detail(which):
    u = neutral(1)
    u[:, 16] = which
    flat = torch.full((1, 4, 16, 16), 255, dtype=torch.uint8)
    flat[:, 0] = 60
    torch.testing.assert_close(view(flat, u), on_white(flat), atol=2e-3, rtol=0)
    noise = torch.randint(0, 256, (1, 4, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    noise[:, 3] = 255
    out, before = view(noise, u), on_white(noise)
    assert out.std() < 0.7 * before.std()
    torch.testing.assert_close(out.mean(), before.mean(), atol=0.05, rtol=0)
    assert view(noise[..., :15, :13], u).shape == (1, 3, 15, 13)  # sides need not be even


def test_a_wiped_rectangle_has_one_colour_and_at_most_a_third_of_the_sides():
    rgba, u = pictures(side=32), neutral()
    u[:, 18], u[:, 17] = 0.3, 0.999
    u[:, 21:24] = torch.tensor([0.25, 0.5, 0.75])
    out = view(rgba, u)
    wiped = (out - on_white(rgba)).abs().amax(1) > 5e-3
    colour = torch.tensor([0.25, 0.5, 0.75]) * 2 - 1
    for i in range(4):
        rows, columns = wiped[i].any(1).nonzero(), wiped[i].any(0).nonzero()
        assert 8 <= len(rows) <= 12
        assert 8 <= len(columns) <= 12
        inside = out[i][:, rows[1] : rows[-1], columns[1] : columns[-1]]
        torch.testing.assert_close(inside, colour[:, None, None].expand_as(inside))


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (8, 8), (24, 40)])
def test_a_square_stands_whole_in_the_middle_of_any_format(size):
    square = torch.full((2, 3, 16, 16), -0.5)
    out = framed(square, size)
    side, (height, width) = min(size), size
    top, left = (height - side) // 2, (width - side) // 2
    assert out.shape == (2, 3, *size)
    inner = out[:, :, top : top + side, left : left + side]
    torch.testing.assert_close(inner, torch.full_like(inner, -0.5))
    assert (out == 1).sum() == 2 * 3 * (height * width - side * side)


def test_a_picture_of_its_own_size_is_left_as_it_is():
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(framed(image, (16, 16)), image)
