"""The exponential moving average of the weights, in fp32, whatever the weights are stored in.

Convention: average <- decay * average + (1 - decay) * weights, after every update. The decay warms up as
min(decay, (1 + n) / (10 + n)) over the n updates so far, so that the start is forgotten (TensorFlow's rule).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reverie.train.parallel import local


class Ema:
    """Averages the trainable parameters of a model; the rest is taken as the model has it."""

    def __init__(self, model: nn.Module, *, decay: float = 0.999, warmup: bool = True) -> None:
        assert 0 <= decay < 1, f"decay {decay} is outside [0, 1)"
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.average: dict[str, Tensor] = {
            name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the weights of `model`; call once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        weights = dict(model.named_parameters())
        new = [local(weights[name].detach()).float() for name in self.average]
        torch._foreach_lerp_([local(value) for value in self.average.values()], new, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` holds the averaged weights; afterwards its own, bit for bit."""
        weights = dict(model.named_parameters())
        own = {name: weights[name].detach().clone() for name in self.average}
        try:
            self._copy(weights, self.average)
            yield
        finally:
            self._copy(weights, own)

    @staticmethod
    @torch.no_grad()
    def _copy(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            weights[name].copy_(value)
