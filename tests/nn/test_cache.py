"""A cache of deep features: exact at 0, nothing else computed where nothing changes, and Sora draws through it."""

import pytest
import torch
from torch import nn

from reverie import rng
from reverie.errors import InputError
from reverie.nn.cache import Cache, through


def stack(depth=4):
    generator = rng.generator(0, "blocks")
    blocks = [nn.Linear(8, 8) for _ in range(depth)]
    for block in blocks:
        nn.init.normal_(block.weight, generator=generator)
    return blocks


def walk(steps, size):
    """Tokens that change by about `size` of themselves from step to step."""
    x = torch.randn(2, 5, 8, generator=rng.generator(0, "x"))
    return [x * (1 + size * step) for step in range(steps)]


@torch.no_grad()
def test_a_threshold_of_0_is_exact():
    blocks, cache = stack(), Cache(0.0)
    for x in walk(5, 1e-7):
        assert torch.equal(cache(x, blocks), through(x, blocks, None))
    assert cache.computed == cache.asked == 5


@torch.no_grad()
def test_what_does_not_change_is_computed_once():
    blocks, cache = stack(), Cache(0.1)
    x = walk(1, 0)[0]
    for _ in range(5):
        assert torch.allclose(cache(x, blocks), through(x, blocks, None), atol=1e-5)
    assert cache.computed == 1


@torch.no_grad()
def test_small_changes_add_up():
    """Features that grow by a tenth each step are computed at the third step again, if a quarter is the threshold."""
    blocks, cache = stack(), Cache(0.25, first=0)
    fresh = []
    for x in walk(7, 0.1):
        before = cache.computed
        cache(x, blocks)
        fresh.append(cache.computed > before)
    assert fresh == [
        True,
        False,
        False,
        True,
        False,
        False,
        False,
    ]  # 0.1 + 0.091 + 0.083; 0.077 + 0.071 + 0.067


@torch.no_grad()
def test_another_batch_is_computed():
    blocks, cache = stack(), Cache(10.0)
    x = walk(1, 0)[0]
    for some in (x, x[:1], x):
        assert torch.equal(cache(some, blocks), through(some, blocks, None))


def test_what_is_no_threshold():
    from reverie.nn.cache import check_threshold

    for wrong in (-0.1, float("nan"), "much"):
        with pytest.raises(InputError, match="no threshold"):
            check_threshold(wrong)
