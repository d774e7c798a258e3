"""Which samples stand together in a step when they are of unlike size: a function of (seed, epoch), as all order is.

Patch n' Pack, "NaViT" (Dehghani et al. 2023, 2307.06304, section 2): the tokens of several samples fill one sequence
under a budget, so that nothing is padded and each sample keeps its own size. `packed` fills such packs. `bucketed` is
the plain alternative: packs of one shape each, for networks that read batches. A `Plan` of either says what a step
reads, for any number of processes.

A sample's size may differ from epoch to epoch (section 2.2): `drawn_area` draws it, keyed by the sample; which of its
tokens are left out, data/dropping.py.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from reverie import rng
from reverie.data.order import order
from reverie.errors import InputError

WINDOW = 1024  # samples of the shuffled order that are packed together
Packs = list[list[int]]


def packed(lengths: Sequence[int], *, budget: int, seed: int, epoch: int, window: int = WINDOW) -> Packs:
    """All samples, each in one pack, whose `lengths` (tokens) add up to `budget` at most.

    Windows of the shuffled order are packed one after the other, long samples first, each into the fullest pack that
    has room (best fit decreasing); the samples of a window's emptiest pack wait for the next window. The packs of a
    window are shuffled, for the first ones hold its long samples. InputError: a sample is longer than the budget.
    """
    _check(lengths, budget)
    packs: Packs = []
    waiting: list[int] = []
    ordered = order(seed, epoch, len(lengths)).tolist()
    for number, start in enumerate(range(0, len(ordered), window)):
        made, room = _best_fit([*waiting, *ordered[start : start + window]], lengths, budget)
        waiting = []
        if start + window < len(ordered):
            waiting = made.pop(max(range(len(made)), key=room.__getitem__))
        packs += _shuffled(made, seed, epoch, number)
    return packs


def bucketed(
    shapes: Sequence[Hashable], lengths: Sequence[int], *, budget: int, seed: int, epoch: int
) -> Packs:
    """All samples in packs of one shape each, under the same budget. What is left of a shape is a smaller pack."""
    _check(lengths, budget)
    open_packs: dict[Hashable, list[int]] = {}
    packs: Packs = []
    for i in order(seed, epoch, len(lengths)).tolist():
        pack = open_packs.get(shapes[i])
        if pack is None or lengths[i] * (len(pack) + 1) > budget:
            pack = open_packs[shapes[i]] = []
            packs.append(pack)
        pack.append(i)
        assert lengths[i] == lengths[pack[0]], "samples of one shape have as many tokens"
    return _shuffled(packs, seed, epoch, 0)


@dataclass(frozen=True, kw_only=True)
class Fill:
    """How well an epoch's packs are filled. waste: the share of their budget that holds no token."""

    packs: int
    samples: int
    tokens: int
    waste: float


class Plan:
    """What each step reads: `together` packs of an epoch, the epochs following one another without a gap.

    `epoch` gives the packs of an epoch, as `packed` and `bucketed` do. The packs of a step are the same for every
    number of processes, of which each takes its contiguous share. A step in a late epoch asks for all epochs before
    it, since each may have another number of packs; that costs some microseconds a sample and epoch, once.
    """

    def __init__(self, epoch: Callable[[int], Packs], *, together: int = 1):
        if together < 1:
            raise InputError(f"a step of {together} packs reads nothing: give one or more.")
        self.together = together
        self._epoch = epoch
        self._starts = [0]  # the number of packs before each epoch
        self._made: dict[int, Packs] = {}  # a step needs few epochs
        self._lock = Lock()

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch, in their order: lists of samples."""
        with self._lock:
            return self._packs(epoch)

    def step(self, step: int, *, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
        """The packs that this rank has of `step` (counted from 0): lists of (epoch, sample).

        InputError: `world` processes cannot share a step's packs evenly.
        """
        if self.together % world:
            raise InputError(
                f"{self.together} packs of a step cannot be shared by {world} processes: make it a multiple of {world}."
            )
        assert step >= 0
        assert 0 <= rank < world
        share = self.together // world
        first = step * self.together + rank * share
        with self._lock:
            return [self._pack(place) for place in range(first, first + share)]

    def fill(self, epoch: int, lengths: Sequence[int], *, budget: int) -> Fill:
        """How well the packs of an epoch are filled, whose samples have these lengths."""
        packs = self.packs(epoch)
        tokens = sum(lengths[i] for pack in packs for i in pack)
        return Fill(
            packs=len(packs),
            samples=sum(map(len, packs)),
            tokens=tokens,
            waste=1 - tokens / (budget * len(packs)),
        )

    def _pack(self, place: int) -> list[tuple[int, int]]:
        while self._starts[-1] <= place:
            count = len(self._packs(len(self._starts) - 1))
            assert count, "an epoch without packs"
            self._starts.append(self._starts[-1] + count)
        epoch = next(e for e in range(len(self._starts) - 2, -1, -1) if self._starts[e] <= place)
        return [(epoch, i) for i in self._packs(epoch)[place - self._starts[epoch]]]

    def _packs(self, epoch: int) -> Packs:
        if epoch not in self._made:
            self._made[epoch] = self._epoch(epoch)
            while len(self._made) > 4:
                del self._made[min(self._made)]
        return self._made[epoch]


def drawn_area(sides: tuple[int, int], *, seed: int, epoch: int, sample: int) -> int:
    """Pixels that a sample has at most this time: the square of a side drawn evenly from `sides`, both included.

    `media.whole_patches` turns it into a height and a width at the sample's own aspect.
    """
    low, high = sides
    if not 1 <= low <= high:
        raise InputError(f"sides are {low} to {high}: give two numbers of pixels, the smaller one first.")
    return (low + rng.integer(seed, "side", epoch, sample) % (high - low + 1)) ** 2


def _check(lengths: Sequence[int], budget: int) -> None:
    if len(lengths) < 1:
        raise InputError("There is no sample to train on: import a folder with accepted media first.")
    if min(lengths) < 1:
        raise InputError(f"sample {_where(lengths, min(lengths))} has {min(lengths)} tokens: leave it out.")
    if max(lengths) > budget:
        raise InputError(
            f"sample {_where(lengths, max(lengths))} has {max(lengths):,} tokens, more than the {budget:,} of a pack:"
            " give a larger budget, or smaller pictures."
        )


def _where(lengths: Sequence[int], length: int) -> int:
    return next(i for i, other in enumerate(lengths) if other == length)


def _best_fit(samples: Sequence[int], lengths: Sequence[int], budget: int) -> tuple[Packs, list[int]]:
    """Packs, and how many tokens each has room for."""
    packs: Packs = []
    rooms: list[tuple[int, int]] = []  # (room, pack), ascending
    for i in sorted(samples, key=lambda i: -lengths[i]):  # stable: equal ones stay in their order
        at = bisect_left(rooms, (lengths[i], -1))
        if at == len(rooms):
            room, number = budget, len(packs)
            packs.append([])
        else:
            room, number = rooms.pop(at)
        packs[number].append(i)
        insort(rooms, (room - lengths[i], number))
    return packs, [room for room, _ in sorted(rooms, key=lambda pair: pair[1])]


def _shuffled(packs: Packs, seed: int, epoch: int, number: int) -> Packs:
    places = torch.randperm(len(packs), generator=rng.generator(seed, "packs", epoch, number)).tolist()
    return [packs[place] for place in places]
