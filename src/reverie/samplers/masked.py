"""Pictures of codes in a few steps, many codes at once: MaskGIT's parallel decoding (2202.04200, section 3.2).

At each step the network guesses every hidden code; the guesses that it is surest of stay, as many as the schedule asks
for, and the others are hidden again. Confidence is the logarithm of a guess's probability and Gumbel noise, which
weighs less and less: at first what stays is left to chance, so that pictures vary.

`predict(codes b n, hidden b n) -> logits b n v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reverie.errors import InputError
from reverie.processes.masking import SHARES, counts

Predict = Callable[[Tensor, Tensor], Tensor]


def masked(
    predict: Predict,
    codes: Tensor,
    hidden: Tensor,
    *,
    steps: int,
    generators: Sequence[torch.Generator],
    schedule: str = "cosine",
    chance: float = 4.5,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The codes `b n` with those that are `hidden b n` drawn, of every item as many; the others stay.

    chance: the weight of the noise in the confidence at first; 0 keeps the surest. temperature: of the guesses. Each
    item has a generator of its own, so that what is drawn for it does not depend on the batch.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}: give 1 or more.")
    if schedule not in SHARES:
        raise InputError(f"there is no schedule {schedule!r:.40}: choose one of {', '.join(SHARES)}.")
    if not temperature > 0 or not math.isfinite(temperature):
        raise InputError(f"temperature {temperature} cannot be drawn at: give one above 0.")
    if not chance >= 0:
        raise InputError(f"chance {chance} is no weight: give 0 or more.")
    number = hidden.sum(1)
    assert (number == number[0]).all(), "items with unlike numbers of hidden codes"
    left = counts(int(number[0]), steps, schedule=schedule)
    codes, hidden = codes.clone(), hidden.clone()
    for step, still in enumerate(left):
        shares = (predict(codes, hidden).float() / temperature).softmax(-1)
        noise = torch.stack([torch.rand(2, codes.shape[1], generator=one) for one in generators]).to(shares)
        sums = shares.cumsum(-1)
        draws = noise[:, 0, :, None] * sums[..., -1:]
        guess = torch.searchsorted(sums, draws, right=True).clamp(max=shares.shape[-1] - 1)
        sure = shares.gather(-1, guess)[..., 0].clamp(min=1e-30).log()
        gumbel = -(-noise[:, 1].clamp(1e-9, 1 - 1e-7).log()).log()
        sure = sure + chance * (1 - (step + 1) / len(left)) * gumbel
        codes = torch.where(hidden, guess[..., 0], codes)
        sure = sure.masked_fill(~hidden, float("inf"))  # what stays is sure
        again = sure.topk(still, largest=False).indices
        hidden = torch.zeros_like(hidden).scatter(1, again, True)
        if progress:
            progress(step + 1, len(left))
    return codes
