"""On Markov chains, whose best sequence and whose frequencies are known, and beside transformers' own search."""

import itertools
import math

import pytest
import torch

from reverie import rng
from reverie.errors import InputError
from reverie.samplers.autoregressive import beam, greedy, nucleus

END = 1


class Chain:
    """A decoder whose next token depends on the last alone; each row may have a chain of its own, `b v v`."""

    def __init__(self, logits: torch.Tensor, rows: int):
        self.logits = logits if logits.ndim == 3 else logits.expand(rows, -1, -1)
        self.computed = 0

    def __call__(self, tokens):
        assert len(tokens) == len(self.logits)
        self.computed += len(tokens)
        return self.logits[torch.arange(len(tokens)), tokens[:, -1]]

    def select(self, rows):
        self.logits = self.logits[rows]


def _chains(rows: int, vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def _start(rows: int) -> torch.Tensor:
    return torch.zeros(rows, 1, dtype=torch.long)


def _generators(rows, seed=0):
    return [rng.generator(seed, "row", row) for row in rows]


def test_greedy_follows_the_likeliest_token():
    logits = torch.full((4, 4), -9.0)
    for token, after in ((0, 2), (2, 3), (3, END)):
        logits[token, after] = 9.0
    assert greedy(Chain(logits, 2), _start(2), end=END, most=9) == [[2, 3, END]] * 2
    assert greedy(Chain(logits, 2), _start(2), end=END, most=2) == [[2, 3]] * 2


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_optimum(penalty):
    """Of all sequences of up to 4 tokens, by their likelihood."""
    vocab, most = 5, 4
    for seed in range(6):
        chain = _chains(1, vocab, seed)[0].log_softmax(-1)
        best = (-math.inf, [])
        for length in range(1, most + 1):
            for words in itertools.product(range(vocab), repeat=length):
                if END in words[:-1] or (length < most and words[-1] != END):
                    continue
                score = sum(float(chain[a, b]) for a, b in itertools.pairwise((0, *words)))
                best = max(best, (score / length**penalty, list(words)))
        found = beam(Chain(chain, 1), _start(1), end=END, most=most, beams=160, length_penalty=penalty)
        assert found == [best[1]]


def test_one_beam_and_one_token_to_draw_from_are_greedy():
    chains = _chains(6, 12)
    likeliest = greedy(Chain(chains, 6), _start(6), end=END, most=15)
    drawn = nucleus(Chain(chains, 6), _start(6), end=END, most=15, top=1, generators=_generators(range(6)))
    narrow = nucleus(Chain(chains, 6), _start(6), end=END, most=15, p=1e-9, generators=_generators(range(6)))
    assert drawn == likeliest
    assert narrow == likeliest
    assert beam(Chain(chains, 6), _start(6), end=END, most=15, beams=1) == likeliest


def test_a_batch_is_its_rows_one_by_one():
    chains, rows = _chains(7, 9, seed=3), range(7)
    ways = (
        lambda which: greedy(Chain(chains[which], len(which)), _start(len(which)), end=END, most=12),
        lambda which: beam(Chain(chains[which], len(which)), _start(len(which)), end=END, most=12, beams=4),
        lambda which: nucleus(
            Chain(chains[which], len(which)),
            _start(len(which)),
            end=END,
            most=12,
            generators=_generators(which),
        ),
    )
    for way in ways:
        together = way(list(rows))
        assert together == [way([row])[0] for row in rows]
        assert way([4, 0, 2]) == [together[4], together[0], together[2]]
        assert len(set(map(len, together))) > 1  # they do end at different places


def test_nucleus_draws_in_proportion_from_the_fewest_that_have_p():
    shares = torch.tensor([0.05, 0.1, 0.4, 0.25, 0.2])
    rows = 6000
    logits = shares.log().expand(5, 5)
    drawn = nucleus(
        Chain(logits, rows), _start(rows), end=9, most=1, p=0.7, generators=_generators(range(rows))
    )
    counts = torch.tensor(drawn).flatten().bincount(minlength=5) / rows
    expected = torch.tensor([0, 0, 0.4, 0.25, 0.2]) / 0.85
    assert (counts - expected).abs().max() < 0.025  # four standard deviations
    assert not counts[:2].any()
    warm = nucleus(
        Chain(logits, rows), _start(rows), end=9, most=1, p=1.0, temperature=0.5, top=3,
        generators=_generators(range(rows)),
    )  # fmt: skip
    counts = torch.tensor(warm).flatten().bincount(minlength=5) / rows
    expected = torch.tensor([0, 0, 0.4, 0.25, 0.2]).square()
    assert (counts - expected / expected.sum()).abs().max() < 0.025


def test_finished_rows_cost_nothing():
    logits = torch.full((4, 5, 5), -9.0)
    for row in range(4):  # row i writes i tokens of 2, 3, 4 and then ends
        for token, after in ((0, 2), (2, 3), (3, 4), (4, END)):
            logits[row, token, END if token == (0, 2, 3, 4)[row] else after] = 9.0
    chain = Chain(logits, 4)
    found = greedy(chain, _start(4), end=END, most=9)
    assert [len(one) for one in found] == [1, 2, 3, 4]
    assert chain.computed == 4 + 3 + 2 + 1


def test_least_and_most_count_new_tokens():
    chains = _chains(4, 8, seed=5)
    chains[:, :, END] = 5
    for write in (greedy, beam):
        found = write(Chain(chains, 4), torch.zeros(4, 3, dtype=torch.long), end=END, least=6, most=9)
        assert all(END not in one[:6] and 7 <= len(one) <= 9 for one in found)


def test_a_repeated_token_is_penalised():
    logits = torch.full((4, 4), -9.0)
    logits[:, 2], logits[:, 3], logits[:, END] = 2.0, 1.5, -3.0
    found = greedy(Chain(logits, 1), _start(1), end=END, most=2, repetition=1.5)
    assert found == [[2, 3]]
    assert greedy(Chain(logits, 1), _start(1), end=END, most=2) == [[2, 2]]


@pytest.mark.parametrize(
    "wrong", [{"most": 0}, {"most": 3, "least": 4}, {"most": 3, "repetition": 0.0}, {"most": 3, "beams": 0}]
)
def test_what_cannot_be_searched(wrong):
    with pytest.raises(InputError):
        beam(Chain(_chains(1, 4), 1), _start(1), end=END, **wrong)


@pytest.mark.parametrize("wrong", [{"p": 0.0}, {"p": 1.5}, {"temperature": 0.0}, {"top": 0}])
def test_what_cannot_be_drawn(wrong):
    with pytest.raises(InputError):
        nucleus(Chain(_chains(1, 4), 1), _start(1), end=END, most=2, generators=_generators([0]), **wrong)
