"""Sequences written token by token: greedily, by nucleus sampling, or by a search over several beams.

A decoder is an object with

    decoder(tokens r n) -> logits r v    of the next token, after the newest `n` tokens of each row, whose past it keeps
    decoder.select(rows)                 keep these rows, `r` of int64, in this order; some may come several times

and one row for each of `start r n`, the tokens that are given. What is written of a row are its new tokens up to the
token `end`, which is the last of them unless `most` came first; before `least` of them it cannot come. So `least` and
`most` count new tokens, `end` among them. A row that is finished is dropped from the decoder and costs nothing more.

`repetition` divides the score of a token that stands in its row already, be it given, if the score is positive, and
multiplies it if it is negative (CTRL, Keskar et al. 2019, 1909.05858, section 4.1, as transformers has it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

from reverie import rng
from reverie.errors import InputError

Sampling = Literal["beam", "greedy", "nucleus"]


class Decoder(Protocol):
    """What writes; see the module."""

    def __call__(self, tokens: Tensor, /) -> Tensor: ...

    def select(self, rows: Tensor, /) -> None: ...


def seeds_of(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """A seed for each of `count` rows: `seed` and those after it, or those given. InputError: too few or many."""
    if isinstance(seed, int):
        return range(seed, seed + count)
    if len(seed) != count:
        raise InputError(f"there are {len(seed)} seeds for {count} texts: give one for each.")
    return seed


def write(
    decoder: Decoder,
    start: Tensor,
    *,
    sampling: str,
    end: int,
    most: int,
    seeds: Sequence[int],
    least: int = 0,
    beams: int = 3,
    p: float = 0.9,
    top: int | None = None,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    repetition: float = 1.0,
) -> list[list[int]]:
    """By the sampling of that name, beam, greedy or nucleus, which takes of the rest what is its own.

    seeds: one for each row, from which its words are drawn. InputError: there is no such sampling.
    """
    if sampling == "beam":
        return beam(
            decoder, start, end=end, most=most, least=least, beams=beams, length_penalty=length_penalty,
            repetition=repetition,
        )  # fmt: skip
    if sampling == "greedy":
        return greedy(decoder, start, end=end, most=most, least=least, repetition=repetition)
    if sampling == "nucleus":
        return nucleus(
            decoder, start, end=end, most=most, generators=[rng.generator(seed, "words") for seed in seeds],
            least=least, p=p, top=top, temperature=temperature, repetition=repetition,
        )  # fmt: skip
    raise InputError(f"sampling is {sampling!r:.40}: choose beam, greedy or nucleus.")


def greedy(
    decoder: Decoder, start: Tensor, *, end: int, most: int, least: int = 0, repetition: float = 1.0
) -> list[list[int]]:
    """The likeliest token, each time."""
    return _one_by_one(
        decoder, start, lambda logits, rows: logits.argmax(-1),
        end=end, most=most, least=least, repetition=repetition,
    )  # fmt: skip


def nucleus(
    decoder: Decoder,
    start: Tensor,
    *,
    end: int,
    most: int,
    generators: Sequence[torch.Generator],
    least: int = 0,
    p: float = 0.9,
    top: int | None = None,
    temperature: float = 1.0,
    repetition: float = 1.0,
) -> list[list[int]]:
    """Drawn among the fewest tokens that together have the probability p (Holtzman et al. 2019, 1904.09751).

    Before that logits are divided by the temperature, and only the `top` likeliest are left. Each row has a generator
    of its own, one of `generators`, so that what is drawn for it does not depend on which rows stand beside it.
    """
    _check_drawn(p, top, temperature)
    assert len(generators) == len(start), "one generator for each row"

    def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
        draws = [torch.rand((), dtype=torch.float64, generator=generators[row]) for row in rows]
        return _drawn(logits, torch.stack(draws), p=p, top=top, temperature=temperature)

    return _one_by_one(decoder, start, choose, end=end, most=most, least=least, repetition=repetition)


def draw_codes(
    decoder: Decoder,
    start: Tensor,
    *,
    count: int,
    generators: Sequence[torch.Generator],
    p: float = 1.0,
    top: int | None = None,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """`count` codes of each row, `r count`, drawn as `nucleus` draws; there is no end before that.

    The decoder knows what comes before `start r n`, of which n may be 0: a text. Each row has a generator of its own.
    """
    _check_drawn(p, top, temperature)
    assert len(generators) == len(start), "one generator for each row"
    draws = torch.stack([torch.rand(count, dtype=torch.float64, generator=one) for one in generators]).to(
        start.device
    )
    written = start.new_empty(len(start), count)
    newest = start
    for at in range(count):
        chosen = _drawn(decoder(newest).float(), draws[:, at], p=p, top=top, temperature=temperature)
        written[:, at] = chosen
        newest = chosen[:, None]
        if progress:
            progress(at + 1, count)
    return written


def beam(
    decoder: Decoder,
    start: Tensor,
    *,
    end: int,
    most: int,
    least: int = 0,
    beams: int = 3,
    length_penalty: float = 1.0,
    repetition: float = 1.0,
) -> list[list[int]]:
    """The best of `beams` sequences of each row, by log-likelihood / tokens ** length_penalty.

    Token for token what transformers' `generate` gives with `early_stopping=False`, its default: of 2 x beams
    continuations those that end among the first half are finished; the others run on, until as many are finished and
    the best that runs, at its present length, is no better than the worst of them. One beam is `greedy`, as there.
    """
    _check(start, most, least, repetition)
    if beams < 1:
        raise InputError(f"beams {beams} search nothing: give 1 or more.")
    if beams == 1:
        return greedy(decoder, start, end=end, most=most, least=least, repetition=repetition)
    # Of each item that is not done: its number, its beams' tokens with the given ones, their scores, what is finished.
    alive = list(range(len(start)))
    tokens = repeat(start, "b n -> b k n", k=beams)
    scores = torch.full((len(start), beams), -1e9, device=start.device)
    scores[:, 0] = 0  # the beams are one yet
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in alive]
    logits = repeat(decoder(start), "b v -> (b k) v", k=beams)
    for count in range(1, most + 1):
        chances = logits.float().log_softmax(-1)
        chances = _penalised(chances, rearrange(tokens, "b k n -> (b k) n"), repetition)
        if count <= least:
            chances[:, end] = -math.inf
        vocab = chances.shape[-1]
        totals = scores[:, :, None] + rearrange(chances, "(b k) v -> b k v", k=beams)
        best, at = rearrange(totals, "b k v -> b (k v)").topk(2 * beams)
        parents, new = at // vocab, at % vocab
        ends = (new == end) | (count == most)
        written = tokens.gather(1, repeat(parents, "b c -> b c n", n=tokens.shape[-1]))
        written = torch.cat([written, new[:, :, None]], -1)
        final = (best / count**length_penalty).tolist()
        for i, item in enumerate(alive):
            for j in ends[i, :beams].nonzero()[:, 0].tolist():
                finished[item].append((final[i][j], written[i, j, start.shape[1] :].tolist()))
            finished[item] = sorted(finished[item], key=lambda one: -one[0])[:beams]
        if count == most:
            break
        # What ended falls behind what runs on: there are at most as many ends as beams.
        order = (best + ends * -1e9).topk(beams).indices
        scores = (best + ends * -1e9).gather(1, order)
        parents = parents.gather(1, order)
        tokens = written.gather(1, repeat(order, "b k -> b k n", n=written.shape[-1]))
        hopes = (scores[:, 0] / count**length_penalty).tolist()
        kept = [
            i for i, item in enumerate(alive)
            if len(finished[item]) < beams or hopes[i] > finished[item][-1][0]
        ]  # fmt: skip
        if not kept:
            break
        alive = [alive[i] for i in kept]
        which = torch.tensor(kept, device=start.device)
        tokens, scores, parents = tokens[which], scores[which], parents[which]
        # After the given tokens the decoder has one row of each item, from then on one of each beam.
        rows = which[:, None] if count == 1 else which[:, None] * beams + parents
        decoder.select(rearrange(rows.expand(-1, beams), "b k -> (b k)"))
        logits = decoder(rearrange(tokens[:, :, -1:], "b k one -> (b k) one"))
    return [found[0][1] for found in finished]


def _one_by_one(
    decoder: Decoder,
    start: Tensor,
    choose: Callable[[Tensor, Sequence[int]], Tensor],
    *,
    end: int,
    most: int,
    least: int,
    repetition: float,
) -> list[list[int]]:
    """`choose(logits r v, rows) -> tokens r`, until every row has ended."""
    _check(start, most, least, repetition)
    written: list[list[int]] = [[] for _ in start]
    rows, tokens, newest = list(range(len(start))), start, start
    for count in range(1, most + 1):
        logits = _penalised(decoder(newest).float(), tokens, repetition)
        if count <= least:
            logits[:, end] = -math.inf
        chosen = choose(logits, rows)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            written[row].append(token)
        kept = (chosen != end).nonzero()[:, 0]
        if count == most or not len(kept):
            break
        if len(kept) < len(rows):
            decoder.select(kept)
            rows = [rows[i] for i in kept.tolist()]
        newest = chosen[kept, None]
        tokens = torch.cat([tokens[kept], newest], 1)
    return written


def _penalised(scores: Tensor, tokens: Tensor, repetition: float) -> Tensor:
    """`scores r v`, a copy, in which those of the row's own `tokens r n` are penalised."""
    if repetition == 1:
        return scores.clone()
    found = scores.gather(1, tokens)
    return scores.scatter(1, tokens, torch.where(found < 0, found * repetition, found / repetition))


def _drawn(logits: Tensor, draws: Tensor, *, p: float, top: int | None, temperature: float) -> Tensor:
    """A token of each row, `r`, from `logits r v` by the uniform numbers `draws r`."""
    if p == 1 and top is None:  # nothing to sort
        sums = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        places = torch.searchsorted(sums, draws.to(sums)[:, None] * sums[:, -1:], right=True)
        return places.clamp(max=logits.shape[-1] - 1)[:, 0]
    kept = logits.shape[-1] if top is None else min(top, logits.shape[-1])
    if top is None:
        values, indices = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    else:
        values, indices = (logits / temperature).topk(kept, dim=-1)
    shares = values.double().softmax(-1)
    sums = shares.cumsum(-1)
    shares = shares.masked_fill(sums - shares >= p, 0)  # those before have p already; the first always stays
    sums = shares.cumsum(-1)
    places = torch.searchsorted(sums, draws.to(sums)[:, None] * sums[:, -1:], right=True)
    last = (shares > 0).sum(-1, keepdim=True) - 1  # rounding may put a draw behind all of them
    return indices.gather(-1, places.minimum(last))[:, 0]


def _check_drawn(p: float, top: int | None, temperature: float) -> None:
    if not 0 < p <= 1:
        raise InputError(f"p {p} is no share of the probability: give one above 0, up to 1.")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature {temperature} cannot be drawn at: give one above 0, or take greedy.")
    if top is not None and top < 1:
        raise InputError(f"top {top} leaves no token to draw: give 1 or more.")


def _check(start: Tensor, most: int, least: int, repetition: float) -> None:
    assert start.ndim == 2, "start is `r n`"
    assert start.shape[1], "a row starts with one token or more"
    if most < 1 or not 0 <= least <= most:
        raise InputError(
            f"from {least} to {most} new tokens cannot be written: give most from 1 on, and least from 0 to it."
        )
    if not repetition > 0:
        raise InputError(f"repetition {repetition} is no penalty: give one above 0; 1 is none.")
