"""What of a clip is given in training: every kind occurs, and something is always left to be drawn."""

import pytest
import torch

from reverie.data.given import draw_given

SHAPES = [(1, 4, 4), (2, 1, 1), (8, 3, 3), (24, 3, 5), (1, 1, 1)]


def masks(shape, count=300):
    return [draw_given(shape, torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_something_is_left_to_be_drawn(shape):
    for mask in masks(shape):
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        assert not mask.all()


def test_every_way_of_going_on_is_drawn():
    frames = [mask.flatten(1) for mask in masks((8, 3, 3))]
    whole = [frame.all(1) for frame in frames if (frame.all(1) == frame.any(1)).all()]
    first = torch.arange(8) == 0
    assert any((mask == first).all() for mask in whole)  # from a picture
    assert any(mask[0] and not mask[-1] and mask.sum() > 2 for mask in whole)  # forward
    assert any(mask[-1] and not mask[0] for mask in whole)  # backward
    assert any(mask[0] and mask[-1] for mask in whole)  # between
    assert any((frame.any(1) & ~frame.all(1)).all() for frame in frames)  # a region of every frame


def test_a_picture_is_given_in_part():
    given = torch.stack([mask.float().mean() for mask in masks((1, 4, 4))])
    assert (given > 0).float().mean() > 0.9
    assert given.min() < 0.3
    assert given.max() > 0.7
