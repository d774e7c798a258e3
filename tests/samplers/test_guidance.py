"""Guidance: between and beyond the predictions of several conditions, in one pass."""

import math

import pytest
import torch

from reverie.processes import gaussian
from reverie.processes.gaussian import Ddpm, Flow, Point
from reverie.samplers.diffusion import euler
from reverie.samplers.guidance import guided, power_cosine

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
T = Flow().at(0.3)
asked = []


def conditional(x, t):
    return 2 * x + t


def middle(x, t):
    return x.cos() * t


def unconditional(x, t):
    return x.sin() - t


def predict(x, point):
    """One, two or three copies of the batch: conditioned, and less and less so."""
    copies = x.split(len(X))
    assert all(copy.equal(copies[0]) for copy in copies)
    asked.append(len(copies))
    said = {1: [conditional], 2: [conditional, unconditional], 3: [conditional, middle, unconditional]}
    return torch.cat([say(X_, point.t) for say, X_ in zip(said[len(copies)], copies, strict=True)])


def test_weight_one_is_conditional_and_zero_unconditional():
    for t in (0.0, 0.4, 1.0):
        torch.testing.assert_close(guided(predict, 1.0)(X, Flow().at(t)), conditional(X, t))
        torch.testing.assert_close(guided(predict, 0.0)(X, Flow().at(t)), unconditional(X, t))


@pytest.mark.parametrize("weight", [-1.0, 0.5, 4.0])
def test_it_is_linear_in_the_weight(weight):
    expected = unconditional(X, 0.3) + weight * (conditional(X, 0.3) - unconditional(X, 0.3))
    torch.testing.assert_close(guided(predict, weight)(X, T), expected)


@pytest.mark.parametrize("prediction", ["noise", "v", "velocity"])
def test_guiding_x0_is_guiding_what_the_network_predicts(prediction):
    point = Ddpm().at(300)

    def network(x, point):
        return gaussian.from_x0(prediction, predict(x, point), x, point)

    both = network(torch.cat([X, X]), point).chunk(2)
    expected = gaussian.to_x0(prediction, both[1] + 3 * (both[0] - both[1]), X, point)
    torch.testing.assert_close(guided(predict, 3.0)(X, point), expected, atol=1e-4, rtol=1e-4)


def test_every_condition_has_its_weight():
    """InstructPix2Pix: null + image weight x (image - null) + text weight x (both - image)."""
    a, b, c = conditional(X, 0.3), middle(X, 0.3), unconditional(X, 0.3)
    torch.testing.assert_close(guided(predict, 7.0, 1.5)(X, T), c + 1.5 * (b - c) + 7 * (a - b))
    torch.testing.assert_close(guided(predict, 1.0, 0.0)(X, T), c + a - b)
    torch.testing.assert_close(guided(predict, 1.0, 1.0)(X, T), a)


def test_outside_the_interval_it_is_the_conditional_prediction_and_costs_no_more():
    limited = guided(predict, 5.0, interval=(0.2, 0.6))
    for t, inside in ((0.1, False), (0.2, True), (0.4, True), (0.6, True), (0.7, False), (1.0, False)):
        asked.clear()
        expected = guided(predict, 5.0)(X, Flow().at(t)) if inside else conditional(X, t)
        asked.clear()
        assert limited(X, Flow().at(t)).equal(expected)
        assert asked == [2 if inside else 1]
    point = Point(0, 0.6, 0.8)  # of any process: the share of noise is 0.8 / 1.4
    assert guided(predict, 5.0, interval=(0.58, 1.0))(X, point).equal(conditional(X, 0))
    assert not guided(predict, 5.0, interval=(0.57, 1.0))(X, point).equal(conditional(X, 0))


@pytest.mark.parametrize("prediction", ["x0", "noise", "v", "velocity"])
def test_rescale_brings_back_the_spread(prediction):
    def spread(x0):
        return gaussian.from_x0(prediction, x0, X, T).std(dim=1)

    whole = guided(predict, 6.0, rescale=1.0, spread_of=prediction)(X, T)
    torch.testing.assert_close(spread(whole), spread(conditional(X, 0.3)), atol=1e-4, rtol=1e-4)
    free, half = (guided(predict, 6.0, rescale=r, spread_of=prediction)(X, T) for r in (0.0, 0.5))
    torch.testing.assert_close(half, (free + whole) / 2, atol=1e-4, rtol=1e-4)


def test_power_cosine():
    weight = power_cosine(4.0, end=1000.0)
    assert weight(Ddpm().at(0)) == 4
    assert weight(Point(1000.0, 0, 1)) == 1
    assert weight(Ddpm().at(500)) == pytest.approx(1 + 3 * (1 - math.cos(math.pi / 16)) / 2)
    flow = guided(predict, power_cosine(4.0, power=2.0))
    w = 1 + 3 * (1 - math.cos(math.pi * 0.49)) / 2
    torch.testing.assert_close(flow(X, T), guided(predict, w)(X, T))


def test_only_the_first_channels():
    """Of 4 channels 3 are guided; what stands behind them is the conditional branch's."""
    out = guided(predict, 5.0, channels=3)(X, T)
    torch.testing.assert_close(out[:, :3], guided(predict, 5.0)(X, T)[:, :3])
    assert out[:, 3:].equal(conditional(X, 0.3)[:, 3:])


def test_a_stronger_weight_goes_further_towards_the_condition():
    """Two point masses, the condition's at 1 and everything at 0: samples go to weight x 1."""

    def masses(x, point):
        copies = x.split(len(X))
        return torch.cat(
            [torch.full_like(copy, mass) for copy, mass in zip(copies, (1.0, 0.0), strict=False)]
        )

    for weight in (0.0, 1.0, 3.0):
        out = euler(guided(masses, weight), X, Flow().points(10))
        torch.testing.assert_close(out, torch.full_like(X, weight), atol=1e-4, rtol=0)
