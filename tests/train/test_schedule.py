import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.train import schedule


def test_constant_warms_up_linearly_and_never_starts_at_zero():
    assert [schedule.constant(i, warmup=3) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.constant(0) == 1.0


def test_cosine_at_its_landmarks():
    def factor(step):
        return schedule.cosine(step, steps=110, warmup=10, floor=0.1)

    assert factor(0) == pytest.approx(1 / 11)
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.55)
    assert factor(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(110) == pytest.approx(0.1)
    assert factor(5000) == pytest.approx(0.1)


@given(st.integers(1, 500), st.integers(0, 600), st.floats(0, 1))
def test_cosine_stays_in_range_and_falls_after_the_warm_up(steps, warmup, floor):
    factors = [schedule.cosine(i, steps=steps, warmup=warmup, floor=floor) for i in range(steps + 5)]
    assert all(0 < f <= 1 or (f >= 0 and i >= steps) for i, f in enumerate(factors))
    top = min(warmup, steps)
    assert all(a <= b for a, b in pairwise(factors[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[warmup:]))


def test_exponential_falls_from_epoch_to_epoch():
    """BLIP's: 3,000 steps of warm-up, then 0.9 for each epoch that is done."""

    def factor(step):
        return schedule.exponential(step, epoch=1000.0, decay=0.9, warmup=9, floor=0.5)

    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(999) == 1.0
    assert factor(1000) == factor(1999) == pytest.approx(0.9)
    assert factor(3500) == pytest.approx(0.9**3)
    assert factor(50_000) == 0.5
