"""A step that stood out is computed again from what was kept of it, to the bit."""

import json
import math

import pytest
import torch
from torch import nn

from reverie import rng
from reverie.errors import InputError
from reverie.train import Ema, NonFiniteError, Player, Run, adamw, checkpoint, evidence, train
from reverie.train.loop import Replayed

AT = 45  # the step, from 0, whose batch is poisoned


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(Run, "curves", lambda self: None)


class Net(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4))
        self.factor = factor

    def loss(self, batch):
        fit = (self.body(batch["x"]) - batch["x"]).square().mean()
        return {"loss": fit * batch["scale"].mean(), "fit": fit}


def go(folder, *, value=300.0, players=1, said=None, **arguments):
    def batches(step, micro):
        x = torch.randn(6, 4, generator=rng.generator(0, "x", step, micro))
        scale = torch.full((6,), value if (step, micro) == (AT, 1) else 1.0)
        return {"x": x, "scale": scale, "ids": [f"{step}-{micro}-{i}" for i in range(6)]}

    torch.manual_seed(0)
    made = []
    for number in range(players):
        model = Net(1.0)
        name = f"p{number}" if players > 1 else ""
        made.append(Player(model, optimizer=adamw(model, lr=1e-2), ema=Ema(model, decay=0.9), name=name))
    run = Run(folder, progress=False)
    if said is not None:
        run.say = said.append
    settings = {"steps": 50, "save_every": 20, "accumulate": 2, "estimate": False} | arguments
    for step in train(made, batches, run=run, **settings):
        run.log(step.number, step.metrics)
    return made


def replayed(folder, step=0, **arguments) -> tuple[int, str]:
    """The exit code, and what was said."""
    said: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(Replayed) as stop:
        go(folder, replay=step, said=said, **arguments)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    return stop.value.code, "\n".join(said)


@pytest.mark.parametrize("players", [1, 2])
def test_a_spike_is_kept_and_computed_again_to_the_bit(tmp_path, players):
    go(tmp_path, players=players)
    names = [""] if players == 1 else ["p0", "p1"]
    for name in names:
        (path,) = checkpoint.steps(tmp_path / "evidence" / name)
        assert path.name == f"step-{AT + 1:08d}"
        assert checkpoint.read_state(path)["player"] == name
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"spike"}
    assert {event["step"] for event in events} == {AT + 1}
    assert events[0]["ids"] == [f"{AT}-{micro}-{i}" for micro in (0, 1) for i in range(6)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = "loss" if players == 1 else "p0/loss"
    assert rows[AT][last] > 20 * rows[AT - 1][last]
    code, text = replayed(tmp_path, players=players)
    assert code == 0
    assert text.count("the same to the bit") == players * (
        2 * 2 + 1
    )  # loss and fit of two batches, and the norm
    assert f"{AT}-1-5" in text
    assert "deviations over the last" in text


def test_other_samples_are_told_from_those_of_that_time(tmp_path):
    go(tmp_path)
    code, text = replayed(tmp_path, value=301.0)
    assert code == 1
    assert "it was" in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_was_not_finite_is_computed_again(tmp_path, value):
    with pytest.raises(NonFiniteError):
        go(tmp_path, value=value)
    assert replayed(tmp_path, AT + 1, value=value)[0] == 0
    with pytest.raises(InputError, match="there is of 46"):
        go(tmp_path, replay=7)


def test_without_a_spike_there_is_no_evidence(tmp_path):
    go(tmp_path / "a", value=1.0)
    assert not (tmp_path / "a" / "evidence").exists()
    with pytest.raises(InputError, match="no step of this run has stood out"):
        go(tmp_path / "a", replay=0)
    go(tmp_path / "b", spikes=0)
    assert not (tmp_path / "b" / "evidence").exists()


def test_damaged_evidence_is_refused(tmp_path):
    go(tmp_path)
    (path,) = checkpoint.steps(tmp_path / "evidence")
    (path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="is damaged"):
        go(tmp_path, replay=0)


def test_a_full_disk_costs_the_evidence_and_not_the_run(tmp_path, monkeypatch):
    save, said = checkpoint.save, []

    def full(folder, *given, **named):
        if folder.name == "evidence":
            raise InputError("the disk is full")
        return save(folder, *given, **named)

    monkeypatch.setattr(checkpoint, "save", full)
    go(tmp_path, said=said)
    assert any("no evidence" in line for line in said)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000050"


def test_what_a_spike_is():
    steady = [1.0 + 0.01 * (i % 5) for i in range(60)]
    assert "deviations" in evidence.spike(2.0, steady, sigmas=8)
    assert not evidence.spike(1.04, steady, sigmas=8)
    assert not evidence.spike(2.0, steady[:20], sigmas=8)  # too few to say
    assert not evidence.spike(2.0, steady, sigmas=0)
    assert not evidence.spike(0.1, steady, sigmas=8)
    assert evidence.spike(1.1, [1.0] * 60, sigmas=8)
