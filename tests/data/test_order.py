from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.data.order import batch_ids, order
from reverie.errors import InputError


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    first = order(7, 0, 100)
    assert sorted(first.tolist()) == list(range(100))
    assert first.equal(order(7, 0, 100))
    assert not first.equal(order(7, 1, 100))
    assert not first.equal(order(8, 0, 100))
    first[0] = -1  # the caller's copy is the caller's
    assert sorted(order(7, 0, 100).tolist()) == list(range(100))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    share=st.integers(1, 6),
    world=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**40),
)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(n, share, world, seed):
    batch = 12 * share
    for step in (0, 1, 5):
        alone = batch_ids(step, batch, n, seed)
        together = [
            place
            for rank in range(world)
            for place in batch_ids(step, batch, n, seed, rank=rank, world=world)
        ]
        assert together == alone


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 50), batch=st.integers(1, 20), steps=st.integers(1, 30), seed=st.integers(0, 1000))
def test_nothing_is_lost_or_repeated_in_an_epoch(n, batch, steps, seed):
    places = [place for step in range(steps) for place in batch_ids(step, batch, n, seed)]
    assert len(places) == steps * batch
    assert len(set(places)) == len(places)
    for epoch in range(steps * batch // n):
        assert sorted(i for e, i in places if e == epoch) == list(range(n))
    assert [e for e, _ in places] == sorted(e for e, _ in places)  # epochs follow one another


def test_ranks_may_change_in_mid_epoch():
    n, batch, seed = 37, 12, 3
    seen = []
    for step in range(10):
        world = 2 if step < 5 else 4
        seen += [
            place
            for rank in range(world)
            for place in batch_ids(step, batch, n, seed, rank=rank, world=world)
        ]
    assert seen == [place for step in range(10) for place in batch_ids(step, batch, n, seed)]


def test_mistakes_are_named():
    with pytest.raises(InputError, match="batch of 10 cannot be shared by 4 ranks"):
        batch_ids(0, 10, 100, 0, world=4)
    with pytest.raises(InputError, match="no sample"):
        batch_ids(0, 10, 0, 0)
