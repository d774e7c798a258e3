import dataclasses
import re
import time

import pytest
import torch
from torch import nn

from reverie.errors import InputError
from reverie.train import Ema, Plan, Player, adamw, estimate, memory
from reverie.train import plan as plan_of
from reverie.train.gradient_cache import cached
from reverie.train.plan import chunk_within


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


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by `time.sleep` alone, however busy the machine is."""
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now)


def test_time_counts_passes_accumulation_and_loading(clock):
    plan = estimate([make(pause=0.05)], [{"x": torch.randn(8, 64)}], steps=100, accumulate=3, loading=0.1)
    assert plan.step_seconds == pytest.approx(3 * (0.05 + 0.1))
    assert plan.seconds == 100 * plan.step_seconds


def test_memory_is_added_up():
    player, batch = make(width=1024), {"x": torch.randn(512, 1024)}
    plan = estimate([player], [batch], steps=1)
    weights = 1024 * 1024 * 4 + 2 * 1024 * 4
    assert plan.parameters == 1024 * 1024 + 2 * 1024
    assert (plan.weights, plan.ema, plan.optimizer) == (weights, weights, 3 * weights)
    kept = 512 * 1024 * 4  # the input of each layer, and the output that is squared
    assert 3 * kept <= plan.activations <= 3.1 * kept
    assert plan.memory > 5 * weights + plan.activations


def test_nothing_is_changed():
    player = make()
    before = {name: value.clone() for name, value in player.model.state_dict().items()}
    estimate([player], [{"x": torch.randn(8, 64)}], steps=1)
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
    tight = dataclasses.replace(
        plan, available=int(2.5e9), items=64, per_item=int(20e6), settings={"batch": 64}
    )
    assert str(tight).endswith(
        "; 2.5 GB are free, which is tight: give --batch 32, which learns from fewer items a step"
    )
    tight.check()
    dataclasses.replace(plan, available=int(2e9), swap=int(1e9)).check()
    with pytest.raises(
        InputError, match=r"about 2.4 GB of memory, and 1.0 GB are free: take a smaller --batch"
    ):
        dataclasses.replace(plan, available=int(1e9)).check()


def test_times_of_batches_of_two_kinds_are_both_counted(clock):
    class Two(Net):
        def loss(self, batch):
            time.sleep(0.2 if len(batch["x"]) == 16 else 0.05)
            return super().loss(batch)

    torch.manual_seed(0)
    model = Two()
    player = Player(model, optimizer=adamw(model, lr=1e-3))
    small, large = {"x": torch.randn(8, 64)}, {"x": torch.randn(16, 64)}
    seconds = [
        estimate([player], batches, steps=1, accumulate=2).step_seconds
        for batches in ([small, large], [small], [large])
    ]
    assert seconds == pytest.approx([0.05 + 0.2, 2 * 0.05, 2 * 0.2])


class Tower(nn.Module):
    """Keeps 4 kB for each item, and remembers how many it has seen at once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1024, 1, bias=False)
        self.most = 0

    def loss(self, batch):
        self.most = max(self.most, len(batch["x"]))
        return {"loss": (self.body(batch["x"] + 1)).mean()}


def tower():
    torch.manual_seed(0)
    model = Tower()
    return Player(model, optimizer=adamw(model, lr=1e-3))


def test_what_would_not_fit_is_refused_before_it_is_tried(monkeypatch):
    player, batch = tower(), {"x": torch.randn(4096, 1024)}
    monkeypatch.setattr(memory, "held", lambda device: 10_000_000)
    monkeypatch.setattr(memory, "peak", lambda device: 0)
    monkeypatch.setattr(memory, "available", lambda device, swap=False: 20_000_000)
    with pytest.raises(InputError, match=r"and .* are free: give --batch") as caught:
        estimate([player], [batch], steps=1, settings={"batch": 4096})
    assert player.model.most == 4, "the whole batch was tried"
    asked = int(re.search(r"--batch (\d+)", str(caught.value))[1])
    assert asked == 1024  # the power of two within 90 % of 20 MB, less the 10 MB that are held, at 4 kB
    with pytest.raises(InputError, match=r"give --chunk (\d+), the same result .*, or --batch \1, another"):
        estimate([player], [batch], steps=1, settings={"batch": 4096, "chunk": 0})
    plan = estimate(
        [player], [{"x": batch["x"][:asked]}], steps=1, settings={"batch": asked}
    )  # the remedy helps
    assert plan.per_item == 4096
    monkeypatch.setattr(memory, "available", lambda device, swap=False: 9_000_000)
    with pytest.raises(InputError, match="not even one item"):
        estimate([player], [batch], steps=1, settings={"batch": 4096})


def test_chunks_count_and_not_the_batch():
    """Items of a chunk are embedded at a time, so these decide."""
    player = tower()
    player.loss = lambda batch: {
        "loss": cached(lambda b: (player.model.body(b["x"] + 1),), batch, chunk=64)[0].mean()
    }
    batch = {"x": torch.randn(1024, 1024)}
    assert estimate([player], [batch], steps=1, settings={"chunk": 64}).activations == 64 * 4096


def test_losses_that_need_all_of_a_batch_are_measured_on_all_of_it():
    player = make()
    plan = estimate([player], [{"x": torch.randn(3, 64)}], steps=1)  # batch norm refuses one item
    assert (plan.items, plan.per_item) == (3, 0)
    assert plan.activations > 0


def test_entries_with_several_rows_for_each_item_are_cut_alike():
    class Pairs(Tower):
        def loss(self, batch):
            one, other = batch["x"].chunk(2)
            assert len(one) == len(other) == len(batch["label"])
            return super().loss(batch)

    model = Pairs()
    player = Player(model, optimizer=adamw(model, lr=1e-3))
    plan = estimate([player], [{"x": torch.randn(32, 1024), "label": torch.zeros(16)}], steps=1)
    assert (plan.items, plan.per_item) == (16, 2 * 4096)


def test_the_end_of_the_memory_is_one_sentence(monkeypatch):
    player, batch = tower(), {"x": torch.randn(64, 1024)}

    def loss(batch):
        if len(batch["x"]) > 4:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return player.model.loss(batch)

    player.loss = loss
    with pytest.raises(InputError, match="did not suffice for one batch: give --batch 32"):
        estimate([player], [batch], steps=1, settings={"batch": 64})


def test_a_chunk_is_chosen_for_the_memory(tmp_path, monkeypatch):
    player, batch = tower(), {"x": torch.randn(1024, 1024)}
    held = memory.held(torch.device("cpu"))
    monkeypatch.setattr(memory, "held", lambda device: held)
    rest = held + plan_of.BARE + 3 * 4096
    for room, chunk in ((64.5, 64), (127.5, 64), (130, 128), (1025, 0)):
        asked = f"{(rest + room * 4096 * plan_of.PASSING) / 1e6:.6f}MB"
        assert chunk_within(asked, player, batch, folder=tmp_path) == chunk
    assert player.model.most == 4
    with pytest.raises(InputError, match="Two items at a time need"):
        chunk_within("1MB", player, batch, folder=tmp_path)
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"chunk": 8}')
    assert chunk_within("1MB", player, batch, folder=tmp_path) == 8, "a run goes on as it began"
