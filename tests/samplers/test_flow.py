"""Samplers on flows whose solution is known in closed form. A wrong sign or order of times cannot hide here.

Data N(m, s^2), noise N(0, 1): x_t is N((1 - t) m, (1 - t)^2 s^2 + t^2), and the exact velocity of rectified flow is
E[noise - x0 | x_t], linear in x_t. It carries (x - mean_t) / std_t unchanged along t, so noise z becomes m + s z.
"""

import math

import pytest
import torch

from reverie.processes import gaussian
from reverie.samplers.flow import SAMPLERS, euler, heun, times

M, S = 0.6, 0.3
NOISE = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(x, t):
    """E[noise - x0 | x_t = x]."""
    variance = (1 - t) ** 2 * S**2 + t**2
    return -M + (t - (1 - t) * S**2) / variance * (x - (1 - t) * M)


def error(sampler, steps, **options):
    return (sampler(exact, NOISE, steps=steps, **options) - (M + S * NOISE)).abs().max().item()


def orders(sampler, counts, **options):
    errors = [error(sampler, count, **options) for count in counts]
    return [math.log2(before / after) for before, after in zip(errors, errors[1:], strict=False)]


def test_the_exact_velocity_is_right():
    """The formula above against regression on drawn pairs: what a perfectly trained network would say."""
    x0 = M + S * torch.randn(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(400_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        x_t = gaussian.corrupt(x0, noise, torch.tensor(t, dtype=torch.float64))
        target = gaussian.velocity(x0, noise)
        slope = (((x_t - x_t.mean()) * (target - target.mean())).mean() / x_t.var()).item()
        ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        expected = target.mean() + slope * (ends - x_t.mean())
        torch.testing.assert_close(exact(ends, t), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_constant_velocity_is_solved_exactly(sampler, steps, factor):
    x0 = torch.tensor([-0.5, 0.25, 1.0], dtype=torch.float64)
    noise = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    out = sampler(lambda x, t: noise - x0, noise, steps=steps, factor=factor)
    torch.testing.assert_close(out, x0)
    half = gaussian.corrupt(x0, noise, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(
        sampler(lambda x, t: noise - x0, half, steps=steps, factor=factor, start=0.5), x0
    )


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_euler_is_of_first_order(factor):
    for order in orders(euler, (64, 128, 256), factor=factor):
        assert order == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_heun_is_of_second_order(factor):
    for order in orders(heun, (64, 128, 256), factor=factor):
        assert order == pytest.approx(2, abs=0.2)
    assert error(heun, 32, factor=factor) < error(euler, 64, factor=factor) / 2  # at the same cost


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_data_s_distribution_comes_out(sampler):
    out = sampler(exact, NOISE, steps=100)
    assert out.mean().item() == pytest.approx(M + S * NOISE.mean().item(), abs=0.01)
    assert out.std().item() == pytest.approx(S * NOISE.std().item(), abs=0.01)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("start", [0.3, 0.8])
def test_start_is_the_first_time(sampler, start):
    """A signal corrupted to `start` arrives where the closed form says, and a start near 0 gives it back."""
    seen = []
    std = math.sqrt((1 - start) ** 2 * S**2 + start**2)
    x = (1 - start) * M + std * NOISE

    def predict(x, t):
        seen.append(t)
        return exact(x, t)

    out = sampler(predict, x, steps=200, start=start)
    torch.testing.assert_close(out, M + S * NOISE, atol=0.03, rtol=0)
    assert max(seen) == seen[0] == start
    torch.testing.assert_close(sampler(exact, NOISE, steps=4, start=1e-6), NOISE, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_step_at_a_time_is_the_same_and_progress_is_told(sampler):
    told = []
    sampler(exact, NOISE, steps=5, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_start_is_left_as_it_is_and_nothing_is_random(sampler):
    x = NOISE.clone()
    first = sampler(exact, x, steps=6)
    assert x.equal(NOISE)
    assert sampler(exact, x, steps=6).equal(first)


def test_times_fall_from_start_to_zero():
    for factor in (1.0, 3.0):
        for start in (1.0, 0.4):
            line = times(10, factor=factor, start=start)
            assert len(line) == 11
            assert (line[0], line[-1]) == (start, 0)
            assert line == sorted(line, reverse=True)
    assert times(4) == [1, 0.75, 0.5, 0.25, 0]
    assert times(4, factor=3.0)[2] == 0.75  # 3 / 2 / (1 + 2 / 2): more steps among the noise


def test_heun_asks_twice_a_step_but_once_at_the_last():
    asked = []
    heun(lambda x, t: asked.append(t) or exact(x, t), NOISE, steps=4)
    assert asked == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]  # never at 0, where a prediction of x0 says nothing
