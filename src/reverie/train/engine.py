"""How a run is carried out: flags that every recipe takes, and that change no result beyond rounding.

model = engine.place(model)                      # before the optimizer takes its parameters
for step in train([player], batches, run=run, steps=config.steps, **engine.loop): ...
with averaged(player) as model: ...              # whole, wherever its weights were
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reverie.errors import InputError
from reverie.train.parallel import blocks_of, spread

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The flags of `reverie train`, where each is explained."""

    device: str | None = None
    precision: str = "auto"
    shard: bool = False
    recompute: bool = False
    compile: bool = False
    non_finite: str = "stop"
    background: bool = False
    replay: int | None = None

    @property
    def home(self) -> torch.device:
        """Where to train."""
        return home(self.device)

    @property
    def loop(self) -> dict[str, Any]:
        """What of it `train.loop.train` takes."""
        return {
            "precision": self.precision,
            "non_finite": self.non_finite,
            "background": self.background,
            "replay": self.replay,
        }

    def place(self, model: M) -> M:
        """The model itself, moved to its device, its blocks recomputed, compiled or sharded as asked for."""
        model.to(self.home)
        if self.shard and not spread(model):
            print(
                "shard: there is one process, which holds all weights; start more by torchrun",
                file=sys.stderr,
            )
        for block in blocks_of(model):
            if self.recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if self.compile:
                block.compile()
        return model


ENGINE = Engine()


def home(device: str | None = None) -> torch.device:
    """Where to run: the GPU if there is one, unless a device is named. InputError: this machine has no such device."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device or best)
        if device is not None and torch.empty(1, device=place).is_meta:
            raise RuntimeError("nothing is computed there")
    except (RuntimeError, AssertionError):  # the latter of a torch that was built without CUDA
        others = f", {best} or cpu" if best != "cpu" else " but cpu"
        raise InputError(
            f"device is {device!r}, which this machine does not have: it has none{others}."
        ) from None
    return place
