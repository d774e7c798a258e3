"""The Q-Former: its modes agree with each other, what is shared changes nothing, and nothing sees what it must not."""

import dataclasses

import pytest
import torch

from reverie.bridges.qformer import Qformer, QformerConfig
from reverie.errors import InputError

CONFIG = QformerConfig(
    queries=4,
    width=32,
    depth=3,
    heads=2,
    hidden=48,
    context_width=24,
    vocab=40,
    length=12,
    start=2,
    end=3,
    decode=4,
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = Qformer(CONFIG).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return made


def context(b=3, m=7):
    return torch.randn(b, m, 24, generator=torch.Generator().manual_seed(1)).double()


TOKENS = torch.tensor([[2, 9, 8, 7, 3], [2, 11, 3, 0, 0], [2, 12, 13, 3, 0]])


@torch.no_grad()
def test_features_known_or_not_are_seen_alike(network):
    """Few queries go to the picture's channels, more bring it to theirs: both are the same products."""
    seen = context()
    known = network.known(seen)
    few = network.look(seen)
    assert network.blocks[0].look._few(torch.zeros(1, 2, 4, 16).double(), seen)  # else nothing is compared
    assert torch.allclose(few, network.look(known), rtol=1e-10, atol=1e-10)
    assert torch.allclose(network.both(TOKENS, seen), network.both(TOKENS, known), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_picture_is_looked_at_in_every_second_block_alone(network):
    assert [block.look is not None for block in network.blocks] == [True, False, True]
    assert [kv is not None for kv in network.known(context())] == [True, False, True]


@torch.no_grad()
def test_padding_changes_nothing(network):
    mask = TOKENS != 0
    short = TOKENS[1:2, :3]
    assert torch.allclose(network.read(TOKENS, mask=mask)[1:2], network.read(short))
    found = network.both(TOKENS, context(), mask=mask)
    assert torch.allclose(found[1:2], network.both(short, context()[1:2]))


@torch.no_grad()
def test_queries_that_read_no_word_are_those_that_look_alone(network):
    mask = torch.zeros_like(TOKENS, dtype=torch.bool)
    assert torch.allclose(network.both(TOKENS, context(), mask=mask), network.look(context()))


@torch.no_grad()
def test_a_word_is_written_from_the_queries_and_the_words_before_it(network):
    past = []
    network.look(context(), past=past)
    whole = network.write(TOKENS, past)
    changed = TOKENS.clone()
    changed[:, 3] = 20
    other = network.write(changed, past)
    assert torch.equal(whole[:, :3], other[:, :3])
    assert not torch.allclose(whole[:, 3], other[:, 3])
    past = []
    network.look(context().flip(0), past=past)
    assert not torch.allclose(network.write(TOKENS, past), whole)


@torch.no_grad()
def test_what_is_kept_gives_what_is_computed_anew(network):
    past = []
    network.look(context(), past=past)
    whole = network.write(TOKENS, past)
    writer = network.writer(context())
    assert torch.allclose(writer(TOKENS[:, :2]), whole[:, 1])
    assert torch.allclose(writer(TOKENS[:, 2:3]), whole[:, 2])
    rows = torch.tensor([2, 0, 0])
    writer.select(rows)
    assert torch.allclose(writer(TOKENS[rows, 3:4]), whole[rows, 3])


def test_what_cannot_be_is_refused():
    for how in ({"heads": 5}, {"reads": False}, {"every": 0}):
        with pytest.raises(InputError):
            Qformer(dataclasses.replace(CONFIG, **how))
