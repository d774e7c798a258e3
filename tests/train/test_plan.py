import dataclasses
import time

import torch
from torch import nn

from reverie.train import Ema, Plan, Player, adamw, estimate


class Net(nn.Module):
    def __init__(self, width=64, pause=0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))
        self.pause = pause

    def loss(self, batch):
        time.sleep(self.pause)
        return {"loss": self.body(batch["x"]).square().mean()}


def make(**arguments):
    torch.manual_seed(0)
    model = Net(**arguments)
    return Player(model, optimizer=adamw(model, lr=1e-3), ema=Ema(model))


def test_time_counts_passes_accumulation_and_loading():
    plan = estimate([make(pause=0.05)], {"x": torch.randn(8, 64)}, steps=100, accumulate=3, loading=0.1)
    assert 0.45 <= plan.step_seconds < 0.9
    assert plan.seconds == 100 * plan.step_seconds


def test_memory_is_added_up():
    player, batch = make(width=1024), {"x": torch.randn(512, 1024)}
    plan = estimate([player], batch, steps=1)
    weights = 1024 * 1024 * 4 + 2 * 1024 * 4
    assert plan.parameters == 1024 * 1024 + 2 * 1024
    assert (plan.weights, plan.ema, plan.optimizer) == (weights, weights, 3 * weights)
    kept = 512 * 1024 * 4  # the input of each layer, and the output that is squared
    assert 3 * kept <= plan.activations <= 3.1 * kept
    assert plan.memory > 5 * weights + plan.activations


def test_nothing_is_changed():
    player = make()
    before = {name: value.clone() for name, value in player.model.state_dict().items()}
    estimate([player], {"x": torch.randn(8, 64)}, steps=1)
    assert all(torch.equal(value, before[name]) for name, value in player.model.state_dict().items())
    assert all(p.grad is None for p in player.model.parameters())
    assert not player.optimizer.state
    assert player.ema.updates == 0


def test_it_says_what_it_found_and_when_memory_will_not_do():
    numbers = {
        "parameters": 21_000_000,
        "weights": 84e6,
        "optimizer": 252e6,
        "ema": 84e6,
        "activations": 1.5e9,
    }
    plan = Plan(steps=5000, step_seconds=0.25, memory=int(2.4e9), available=int(8e9), **numbers)
    assert str(plan) == (
        "21.0 M parameters · 5,000 steps of 0.25 s, about 21 min without evaluation · needs about 2.4 GB "
        "of memory (weights 84 MB, gradients and optimizer 252 MB, EMA 84 MB, activations 1.5 GB, the rest "
        "Python, libraries, data)"
    )
    assert "but only 1.0 GB are free: take smaller batches" in str(
        dataclasses.replace(plan, available=int(1e9))
    )
