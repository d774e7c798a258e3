"""How much is hidden: exact shares, and schedules that end."""

import pytest
import torch

from reverie.processes.masking import SHARES, counts, hidden


@pytest.mark.parametrize("name", SHARES)
def test_a_schedule_goes_from_all_to_nothing(name):
    share = SHARES[name]
    assert share(0.0) == pytest.approx(1)
    assert share(1.0) == pytest.approx(0, abs=1e-12)
    values = [share(i / 20) for i in range(21)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize(("n", "steps"), [(64, 8), (64, 64), (5, 100), (1, 3), (256, 1)])
def test_every_step_shows_something_and_the_last_everything(name, n, steps):
    left = counts(n, steps, schedule=name)
    assert left[-1] == 0
    before = [n, *left[:-1]]
    assert all(b < a for a, b in zip(before, left, strict=True) if a)
    assert len(left) == steps


def test_the_share_is_exact_and_the_order_decides():
    order = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    away = hidden(order, torch.tensor([0.0, 0.5, 1.0]), schedule="linear")
    assert away.sum(1).tolist() == [10, 5, 1]
    assert order[1][away[1]].max() < order[1][~away[1]].min()
