"""Between two sets of weights: "Robust fine-tuning of zero-shot models" (WiSE-FT, Wortsman et al. 2021, 2109.01903).

    weights = (1 - share) start + share tuned

A fine-tuned model has learnt its task and forgotten some of what it knew; on the line between the two lie weights that
have most of both (section 4).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from reverie.errors import InputError
from reverie.nn.lora import adapted

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def blend(start: Module, tuned: Module, *, share: float) -> Module:
    """A new system, `share` of the way from `start` (0, bit for bit) to `tuned` (1, bit for bit); on tuned's device.

    What is counted rather than learnt (whole numbers) is taken from `tuned`. InputError: these are not two systems of
    one shape and one vocabulary, or the share is none.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share is {share}: give one from 0, the start, to 1, the fine-tuned end.")
    if type(start) is not type(tuned) or start.config != tuned.config:
        raise InputError(
            f"a {type(start).__name__} and a {type(tuned).__name__} of other shape have nothing in between: give "
            "weights and what was fine-tuned from them."
        )
    if _words(start) != _words(tuned):
        raise InputError(
            "the two have different vocabularies: give weights and what was fine-tuned from them."
        )
    for system in (start, tuned):
        assert not list(adapted(system)), "adapters are merged before weights are blended"
    between = copy.deepcopy(tuned)
    ends = start.state_dict()
    for name, value in between.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(ends[name].to(value), value, share))
    return between


def _words(system: nn.Module) -> tuple[str, list[str]]:
    """The kind of tokenizer and what each of its ids stands for."""
    tokenizer = getattr(system, "tokenizer", None)
    ids = range(tokenizer.vocab) if tokenizer is not None else ()
    return type(tokenizer).__name__, tokenizer.decode([[i] for i in ids]) if tokenizer is not None else []
