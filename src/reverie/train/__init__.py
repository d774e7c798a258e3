"""Training: one loop over players, and what it needs. The recipe logs, evaluates and samples between the
steps.

loop        the generator `train` over players (a loss and its optimizer); resumes exactly
checkpoint  atomic checkpoint folders with a manifest; safetensors and JSON only
log         the run folder: configuration, metrics, samples, progress
curves      metrics as pictures, of one run or of several
runs        run folders read back: how far each is, two compared; without torch
plan        how long it will take and how much memory it needs, before the first step and checked at the end
optimizers, schedule, ema, precision    what they say
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reverie.train.ema import Ema
    from reverie.train.log import Run
    from reverie.train.loop import NonFiniteError, Player, Step, Stopped, train
    from reverie.train.optimizers import adamw
    from reverie.train.plan import Plan, estimate

__all__ = ["Ema", "NonFiniteError", "Plan", "Player", "Run", "Step", "Stopped", "adamw", "estimate", "train"]

_HOMES = {"Ema": "ema", "Run": "log", "adamw": "optimizers", "Plan": "plan", "estimate": "plan"}


def __getattr__(name: str) -> Any:
    # Lazily, so that `reverie runs` reads folders without waiting for torch.
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'loop')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
