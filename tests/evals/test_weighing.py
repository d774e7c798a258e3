"""Weighed signs: the truth is found again, both kinds count equally, and certain signs stay finite."""

import math

import pytest
import torch

from reverie.evals.weighing import Scale, logits, weighed


def test_the_weights_that_made_the_examples_are_found_again():
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(20_000, 2, generator=generator) * torch.tensor([1.0, 0.1])
    odds = (2 * signs[:, 0] + 10 * signs[:, 1]).sigmoid()
    right = torch.rand(len(odds), generator=generator) < odds
    found = weighed(signs, right)
    assert found.weights == pytest.approx((2, 10), rel=0.06)
    assert found.bias == pytest.approx(0, abs=0.06)


def test_one_kind_ten_times_as_common_moves_nothing():
    signs = torch.cat([torch.full((10, 1), 1.0), torch.full((100, 1), 0.0)])
    signs += torch.linspace(-1, 1, 110)[torch.randperm(110, generator=torch.Generator().manual_seed(1))][
        :, None
    ]
    found = weighed(signs, torch.arange(110) < 10)
    middle = -found.bias / found.weights[0]
    assert 0.2 < middle < 0.8


def test_signs_that_never_fail_or_never_vary_have_finite_weights():
    signs = torch.tensor([[0.0, 3.0], [0.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
    found = weighed(signs, torch.tensor([False, False, True, True]))
    assert all(math.isfinite(x) for x in (*found.weights, found.bias))
    assert found.probability(signs)[0] < 0.1 < 0.9 < found.probability(signs)[3]


def test_one_kind_alone_teaches_nothing():
    with pytest.raises(ValueError, match="both kinds"):
        weighed(torch.rand(4, 2), torch.ones(4))


def test_a_scale_weighs_any_shape_and_certainty_has_an_end():
    scale = Scale(weights=(1.0, 0.0), bias=0.0)
    assert scale.probability(torch.zeros(2, 3, 2)).shape == (2, 3)
    assert logits([0.5, 1.0]) == pytest.approx([0, 13.8], abs=0.1)
