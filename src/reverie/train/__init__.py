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

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reverie.train.ema import Ema
    from reverie.train.log import Run
    from reverie.train.loop import NonFiniteError, Player, Step, Stopped, train
    from reverie.train.optimizers import adamw
    from reverie.train.plan import Plan, estimate

__all__ = ["Ema", "NonFiniteError", "Plan", "Player", "Run", "Step", "Stopped", "adamw", "estimate", "train"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `reverie runs` reads folders without waiting for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reverie.train import ema, log, loop, optimizers, plan

    homes: dict[str, Any] = {
        "Ema": ema, "Plan": plan, "Run": log, "adamw": optimizers, "estimate": plan,
    }  # fmt: skip
    return getattr(homes.get(name, loop), name)
