"""Rectified flow: the conversions agree with each other, and the times are where they should be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.processes import gaussian

times = st.floats(gaussian.T_SMALLEST, 1)


def pair(seed=0):
    return torch.randn(2, 2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ends_of_the_line():
    x0, noise = pair()
    assert gaussian.corrupt(x0, noise, torch.tensor(0.0)).equal(x0)
    assert gaussian.corrupt(x0, noise, torch.tensor(1.0)).equal(noise)


@given(t=times, step=st.floats(-0.05, 0.05))
@settings(max_examples=30, deadline=None)
def test_the_velocity_leads_from_one_time_to_another(t, step):
    x0, noise = pair()
    now, after = (gaussian.corrupt(x0, noise, torch.tensor(at)) for at in (t, t + step))
    torch.testing.assert_close(now + step * gaussian.velocity(x0, noise), after, atol=1e-6, rtol=0)


@given(t=times)
@settings(max_examples=30, deadline=None)
def test_velocity_and_x0_say_the_same(t):
    x0, noise = pair()
    t = torch.tensor(t, dtype=torch.float64)
    x_t = gaussian.corrupt(x0, noise, t)
    torch.testing.assert_close(gaussian.velocity_from(x0, x_t, t), gaussian.velocity(x0, noise))


def test_every_frame_may_have_its_own_time():
    x0, noise = pair()
    t = torch.tensor([[0.0, 0.2, 0.7, 1.0]] * 2, dtype=torch.float64)
    x_t = gaussian.corrupt(x0, noise, t[:, None, :, None, None])
    for frame in range(4):
        one = gaussian.corrupt(x0[:, :, frame], noise[:, :, frame], t[0, frame])
        assert x_t[:, :, frame].equal(one)


@pytest.mark.parametrize("t", [0.0, 1e-6, 0.01])
def test_near_zero_the_velocity_stays_finite(t):
    x0, noise = pair()
    x_t = gaussian.corrupt(x0, noise, torch.tensor(t, dtype=torch.float64))
    out = gaussian.velocity_from(x0, x_t, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(out, gaussian.velocity(x0, noise) * t / gaussian.T_SMALLEST)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 1.0), (-1.0, 0.5)])
def test_logit_normal_times(mean, std):
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = gaussian.logit_normal(normal, mean=mean, std=std)
    assert 0 < t.min() < t.max() < 1
    logits = torch.log(t / (1 - t))
    assert abs(logits.mean() - mean) < 0.02
    assert abs(logits.std() - std) < 0.02
    assert abs(t.median() - 1 / (1 + math.exp(-mean))) < 0.01


@given(t=st.floats(0, 1), factor=st.floats(1, 8))
@settings(max_examples=50, deadline=None)
def test_shift(t, factor):
    at = torch.tensor(t, dtype=torch.float64)
    shifted = gaussian.shift(at, factor)
    assert 0 <= shifted <= 1
    assert shifted >= at - 1e-12  # towards noise
    torch.testing.assert_close(gaussian.shift(shifted, 1 / factor), at)
    torch.testing.assert_close(gaussian.shift(shifted, 2.0), gaussian.shift(at, 2 * factor))  # shifts compose
    assert gaussian.shift(at, 1.0) == at
    for end in (0.0, 1.0):
        torch.testing.assert_close(gaussian.shift(torch.tensor(end), factor), torch.tensor(end))


def test_shift_is_a_ratio_of_odds():
    """SD3, equation 23: the odds of noise to data grow by the factor."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    out = gaussian.shift(t, 3.0)
    torch.testing.assert_close(out / (1 - out), 3 * t / (1 - t))
