"""Guidance: between and beyond the two predictions, in one pass."""

import pytest
import torch

from reverie.samplers.flow import euler
from reverie.samplers.guidance import guided

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def conditional(x, t):
    return 2 * x + t


def unconditional(x, t):
    return x.sin() - t


def predict(x, t):
    """Half of `x` with its condition, half without."""
    with_it, without = x.chunk(2)
    assert with_it.equal(without)
    return torch.cat([conditional(with_it, t), unconditional(without, t)])


def test_weight_one_is_conditional_and_zero_unconditional():
    for t in (0.0, 0.4, 1.0):
        torch.testing.assert_close(guided(predict, 1.0)(X, t), conditional(X, t))
        torch.testing.assert_close(guided(predict, 0.0)(X, t), unconditional(X, t))


@pytest.mark.parametrize("weight", [-1.0, 0.5, 4.0])
def test_it_is_linear_in_the_weight(weight):
    expected = unconditional(X, 0.3) + weight * (conditional(X, 0.3) - unconditional(X, 0.3))
    torch.testing.assert_close(guided(predict, weight)(X, 0.3), expected)


def test_outside_the_interval_it_is_the_conditional_prediction():
    velocity = guided(predict, 5.0, interval=(0.2, 0.6))
    for t, inside in ((0.1, False), (0.2, True), (0.4, True), (0.6, True), (0.7, False), (1.0, False)):
        expected = guided(predict, 5.0)(X, t) if inside else conditional(X, t)
        assert velocity(X, t).equal(expected)


def test_a_stronger_weight_goes_further_towards_the_condition():
    """Two point masses, the condition's at 1 and everything at 0: samples go to weight x 1."""

    def masses(x, t):
        with_it, without = x.chunk(2)
        return torch.cat([(with_it - 1) / t, without / t])

    for weight in (0.0, 1.0, 3.0):
        out = euler(guided(masses, weight), X, steps=10)
        torch.testing.assert_close(out, torch.full_like(X, weight), atol=1e-4, rtol=0)
