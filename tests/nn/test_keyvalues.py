"""What was kept gives what would be computed anew."""

import pytest
import torch

from reverie.nn.attention import CrossAttention, SelfAttention
from reverie.nn.keyvalues import Past, Readers
from reverie.nn.positions import rotary


@pytest.mark.parametrize("steps", [(7,), (1,) * 7, (3, 1, 1, 2), (1, 4, 2)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_past_changes_nothing(steps, turned):
    torch.manual_seed(0)
    layer, x = SelfAttention(24, 3, qk_norm=turned).double(), torch.randn(5, 7, 24, dtype=torch.float64)
    pair = rotary(torch.arange(7)[:, None].double(), (8,)) if turned else None
    whole = layer(x, causal=True, rotary=pair)
    past, at, found = Past(9), 0, []
    for n in steps:
        part = None if pair is None else tuple(each[at : at + n] for each in pair)
        with torch.no_grad():
            found.append(layer(x[:, at : at + n], causal=True, past=past, rotary=part))
        at += n
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-12)


@torch.no_grad()
def test_rows_are_kept_in_any_order_and_more_of_them():
    torch.manual_seed(1)
    layer, x = SelfAttention(8, 2).double(), torch.randn(3, 6, 8, dtype=torch.float64)
    past = Past(6)
    layer(x[:, :4], causal=True, past=past)
    for rows in ([2, 0, 0, 1, 2], [4, 1], [1, 0, 1]):
        rows = torch.tensor(rows)
        past.select(rows)
        x = x[rows]
    new = layer(x[:, 4:], causal=True, past=past)
    assert torch.allclose(new, layer(x, causal=True)[:, 4:], atol=1e-12)


def test_a_past_takes_its_memory_once():
    past = Past(5)
    places = set()
    for _ in range(5):
        k, _ = past(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
        places.add(k.data_ptr())
    past.select(torch.tensor([1]))
    assert places == {past.kept.data_ptr()}
    with pytest.raises(AssertionError, match="room for 5"):
        past(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))


@pytest.mark.parametrize(
    "items", [[0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3], [3, 1], [1, 1, 1, 3, 0, 2, 2, 3], [2]]
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_known_context_reads_as_the_context_repeated(items, masked):
    torch.manual_seed(2)
    layer = CrossAttention(16, 2, context_width=12, qk_norm=True).double()
    context = torch.randn(4, 9, 12, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [6]]) if masked else None
    readers = Readers(4)
    known = layer.known(context, mask, readers)
    readers.set(items)
    x = torch.randn(len(items), 3, 16, dtype=torch.float64)
    repeated = layer(x, context[items], None if mask is None else mask[items])
    assert torch.allclose(layer(x, known), repeated, atol=1e-12)


def test_readers_in_order_are_one_run_and_groups_of_unlike_size_are_more():
    assert Readers(5, each=3).runs == [(0, 5, 3)]
    readers = Readers(4, each=2)
    readers.select([0, 1, 4, 5, 6, 7])
    assert readers.runs == [(0, 1, 2), (2, 2, 2)]
    readers.select([0, 0, 1, 2, 4, 5])
    assert readers.runs == [(0, 1, 3), (2, 1, 1), (3, 1, 2)]
