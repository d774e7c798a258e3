"""Positions: what rotary and sinusoidal embeddings promise, on one to three axes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.nn.positions import grid, rotary, rotate, share, sinusoidal


@given(pairs=st.integers(1, 80), axes=st.integers(1, 4))
def test_the_shares_are_even_and_sum_to_the_channels(pairs, axes):
    parts = share(2 * pairs, axes)
    assert len(parts) == axes
    assert sum(parts) == 2 * pairs
    assert all(part % 2 == 0 for part in parts)
    assert max(parts) - min(parts) <= 2
    assert list(parts) == sorted(parts)  # what is left over goes to the last axes


def turned(x, places, channels, **options):
    return rotate(x.expand(1, 1, len(places), channels), rotary(places, channels, **options))[0, 0]


@settings(max_examples=40, deadline=None)
@given(
    axes=st.integers(1, 3),
    pairs=st.integers(3, 20),
    seed=st.integers(0, 1000),
    offset=st.lists(st.floats(-30, 30), min_size=3, max_size=3),
)
def test_inner_products_depend_on_differences_alone_and_norms_are_kept(axes, pairs, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    channels = 2 * pairs
    q, k = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    places = torch.randint(0, 12, (5, axes), generator=generator).float()
    moved = places + torch.tensor(offset[:axes])
    at, then = ([turned(x, where, channels) for x in (q, k)] for where in (places, moved))
    torch.testing.assert_close(at[0] @ at[1].T, then[0] @ then[1].T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(at[0].norm(dim=-1), q.norm().expand(5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_matters_and_turns_its_own_share(axis):
    channels = 20
    x = torch.ones(channels, dtype=torch.float64)
    places = torch.zeros(2, 3)
    places[1, axis] = 1
    here, there = turned(x, places, channels)
    torch.testing.assert_close(here, x)
    first = sum(share(channels, 3)[:axis])
    changed = (here - there).abs() > 1e-9
    assert changed.nonzero().flatten().tolist() == list(range(first, first + share(channels, 3)[axis]))


def test_a_pair_turns_by_position_times_frequency():
    """The first pair of an axis turns by one radian a position; the others ever more slowly, towards 1 / longest."""
    x = torch.tensor([1.0, 0.0]).repeat(8)
    out = turned(x, torch.tensor([[0.5]]), 16, longest=81.0)[0]
    angles = torch.atan2(out[1::2], out[::2])
    torch.testing.assert_close(angles, 0.5 * 81.0 ** (-torch.arange(8) / 8))


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_turning_by_a_sum_is_turning_twice(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 6, 12, generator=generator, dtype=torch.float64)
    one, other = torch.randint(0, 9, (2, 6, 3), generator=generator)
    twice = rotate(rotate(x, rotary(one, 12)), rotary(other, 12))
    torch.testing.assert_close(twice, rotate(x, rotary(one + other, 12)), atol=1e-4, rtol=1e-4)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_grid_runs_row_by_row(sizes):
    places = grid(*sizes)
    assert places.shape == (torch.Size(sizes).numel(), len(sizes))
    strides = torch.tensor([torch.Size(sizes[i + 1 :]).numel() for i in range(len(sizes))])
    assert ((places * strides).sum(-1) == torch.arange(len(places))).all()


def test_sinusoidal_is_cosines_then_sines():
    t = torch.tensor([0.0, 0.3, 1.0])
    out = sinusoidal(t, 64, scale=1000.0, longest=10_000.0)
    assert out.shape == (3, 64)
    torch.testing.assert_close(out[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    torch.testing.assert_close(out[:, :32] ** 2 + out[:, 32:] ** 2, torch.ones(3, 32))
    torch.testing.assert_close(out[1, [0, 32]], torch.tensor([300.0]).double().cos().float().repeat(2).index_put(
        (torch.tensor([1]),), torch.tensor([300.0]).double().sin().float()), atol=1e-4, rtol=0)  # fmt: skip
    slow = 1000 * 0.3 * 10_000 ** (-31 / 32)
    torch.testing.assert_close(out[1, 63], torch.tensor(slow).sin(), atol=1e-5, rtol=1e-5)


def test_sinusoidal_tells_near_times_apart():
    t = torch.linspace(0, 1, 101)
    out = sinusoidal(t, 256, scale=1000.0)
    apart = torch.cdist(out, out) + 100 * torch.eye(101)
    assert apart.min() > 1
