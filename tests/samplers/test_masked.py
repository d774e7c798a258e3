"""MaskGIT's decoding: exact where the network is sure, what is given stays, and no draw depends on the batch."""

import pytest
import torch

from reverie import rng
from reverie.errors import InputError
from reverie.samplers.masked import masked


def sure(codes, hidden):
    """A network that knows: place i has the code i."""
    n = codes.shape[1]
    return torch.eye(n).mul(100).expand(len(codes), -1, -1)


def drawn(steps, **more):
    start = torch.zeros(2, 9, dtype=torch.long)
    return masked(
        sure, start, torch.ones(2, 9, dtype=torch.bool), steps=steps, generators=[rng.generator(i) for i in (0, 1)],
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3, 9, 50])
def test_what_the_network_knows_is_drawn(steps):
    assert drawn(steps).tolist() == [list(range(9))] * 2


def test_every_step_asks_about_fewer_and_the_given_stay():
    asked = []

    def predict(codes, hidden):
        asked.append(int(hidden.sum()))
        assert (codes[~hidden & (torch.arange(8) < 3)] == 7).all()
        return torch.zeros(1, 8, 8)

    codes = torch.tensor([[7, 7, 7, 0, 0, 0, 0, 0]])
    away = torch.arange(8)[None] >= 3
    found = masked(predict, codes, away, steps=4, generators=[rng.generator(0)])
    assert found[0, :3].tolist() == [7, 7, 7]
    assert asked[0] == 5
    assert asked == sorted(asked, reverse=True)


def test_draws_follow_the_network_and_not_the_batch():
    odds = torch.tensor([0.7, 0.2, 0.1])

    def predict(codes, hidden):
        return odds.log().expand(len(codes), codes.shape[1], -1)

    def draw(seeds):
        start = torch.zeros(len(seeds), 400, dtype=torch.long)
        return masked(
            predict, start, torch.ones_like(start, dtype=torch.bool), steps=1,
            generators=[rng.generator(s) for s in seeds],
        )  # fmt: skip

    both = draw([1, 2])
    assert torch.equal(both[1], draw([2])[0])
    shares = torch.bincount(draw(range(20)).flatten(), minlength=3) / 8000
    assert (shares - odds).abs().max() < 0.02


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2, "schedule": "round"}, "no schedule 'round'"),
        ({"steps": 2, "temperature": 0.0}, "temperature 0"),
        ({"steps": 2, "chance": -1.0}, "chance -1"),
    ],
)
def test_mistakes_are_named(wrong, said):
    with pytest.raises(InputError, match=said):
        drawn(**wrong)
