import json
import math
import os
import re
import signal

import pytest
import torch
from torch import nn

from reverie.errors import InputError
from reverie.train import NonFiniteError, Player, Run, Stopped, adamw, parallel, train
from reverie.train.log import commanded
from reverie.train.watch import missed


def player(fail=None):
    """Its loss calls `fail(number of the pass)`."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    passes = [0]

    def loss(batch):
        passes[0] += 1
        value = model(batch["x"]).square().mean()
        return {"loss": value if fail is None else value * fail(passes[0])}

    return Player(model, optimizer=adamw(model, lr=1e-3), loss=loss)


def go(folder, *, steps=4, fail=None, estimate=False, between=lambda step: None, config=None):
    run = Run(folder, config or {"steps": steps, "batch": 8})
    batches = lambda step, micro: {"x": torch.ones(8, 4)}  # noqa: E731
    for step in train([player(fail)], batches, run=run, steps=steps, estimate=estimate, save_every=2):
        run.log(step.number, step.metrics)
        between(step)


def status(folder):
    return json.loads((folder / "status.json").read_text())


def test_an_end_is_told_with_its_reason(tmp_path):
    go(tmp_path / "whole")
    told = status(tmp_path / "whole")
    assert (told["state"], told["step"], told["steps"]) == ("finished", 4, 4)
    with pytest.raises(NonFiniteError):
        go(tmp_path / "nan", fail=lambda n: math.nan if n == 3 else 1.0)
    told = status(tmp_path / "nan")
    assert (told["state"], told["step"]) == ("failed", 2)
    assert told["reason"].startswith("loss is nan at step 3")
    with pytest.raises(Stopped):
        go(tmp_path / "stop", between=lambda step: os.kill(os.getpid(), signal.SIGTERM))
    told = status(tmp_path / "stop")
    assert (told["state"], told["step"], told["reason"]) == ("stopped", 1, "by a signal, with a checkpoint")


def test_while_it_runs_the_file_says_so_and_a_refusal_leaves_it_alone(tmp_path):
    seen = []
    go(tmp_path, between=lambda step: seen.append(status(tmp_path)))
    assert [each["state"] for each in seen] == ["running"] * 4
    assert seen[0]["step"] == 1
    assert seen[0]["items_per_second"] > 0
    before = status(tmp_path)
    with pytest.raises(InputError, match="another configuration"):
        go(tmp_path, config={"steps": 4, "batch": 9})
    assert status(tmp_path) == before


def test_a_full_disk_costs_the_status_and_not_the_run(tmp_path, monkeypatch, capsys):
    def full(self, name, what, *, durable=True):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "keep", full)
    go(tmp_path)
    assert (tmp_path / "checkpoints/step-00000004").is_dir()
    assert "status.json could not be written (No space left on device)" in capsys.readouterr().err


def test_what_was_said_is_compared_with_what_was_used(tmp_path, capsys):
    go(tmp_path, estimate=True, steps=20)
    told = json.loads((tmp_path / "resources.json").read_text())
    assert told["steps"] == 20
    assert 0 < told["used"]["step_seconds"] < 1
    assert told["said"]["items"] == 8
    assert told["used"]["memory_altogether"] >= told["used"]["memory"] > 50e6
    assert told["seconds_in_steps"] <= told["seconds"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"said [\d.e-]+ s a step and .*B, took [\d.e-]+ s and (at most )?\d.*% of it in steps", last
    )


def test_a_big_miss_is_named():
    said = {"step_seconds": 0.2, "memory": 1e9}
    assert missed(said, {"step_seconds": 0.25, "memory": 1.2e9}) == []
    assert missed(said, {"step_seconds": 0.5, "memory": 2e9}) == [
        "the time of a step was 2.5 times what was said: a bad estimate, or others use the machine too",
        "the memory was 2 times what was said: a bad estimate",
    ]
    assert len(missed(said, {"step_seconds": 0.1, "memory": 0})) == 1  # memory that nobody knows is no miss


def test_the_end_of_the_memory_is_one_sentence_and_the_same_command_goes_on(tmp_path):
    def ends(number):
        if number == 4:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return 1.0

    with pytest.raises(
        InputError, match=r"did not suffice in step 4: take a smaller --batch; where others took it, the same"
    ):
        go(tmp_path, fail=ends)
    assert status(tmp_path)["state"] == "failed"
    go(tmp_path)
    assert status(tmp_path)["state"] == "finished"


def test_a_run_goes_on_with_another_chunk_and_not_with_another_batch(tmp_path):
    go(tmp_path, config={"steps": 4, "batch": 8, "chunk": 0})
    go(tmp_path, config={"steps": 6, "batch": 8, "chunk": 2}, steps=6)
    assert status(tmp_path)["step"] == 6
    with pytest.raises(InputError, match=r"batch \(was 8, is 4\)"):
        go(tmp_path, config={"steps": 8, "batch": 4, "chunk": 2}, steps=8)


# ---------------------------------------------------------------- the command's own file


def command(folder, **arguments):
    return commanded(folder, recipe="r", data=folder.parent / "data", arguments=arguments)


def test_the_first_command_stays_and_others_are_listed(tmp_path):
    folder = tmp_path / "run"
    with command(folder, steps=4):
        go(folder)
    told = json.loads((folder / "command.json").read_text())
    assert told["recipe"] == "r"
    assert told["arguments"] == {"steps": 4}
    assert told["started"] <= status(folder)["at"]
    with command(folder, steps=6):
        go(folder, steps=6)
    again = json.loads((folder / "command.json").read_text())
    assert [each["arguments"] for each in again.pop("resumed")] == [{"steps": 6}]
    assert again == told


def test_a_failure_between_the_steps_is_told(tmp_path):
    def between(step):
        if step.number == 3:
            raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"), command(tmp_path / "run"):
        go(tmp_path / "run", between=between)
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"] == "no such file"


def test_what_is_refused_before_it_begins_leaves_nothing(tmp_path):
    with pytest.raises(InputError), command(tmp_path / "run"):
        raise InputError("no data")
    assert not (tmp_path / "run").exists()
    with command(tmp_path / "run", steps=4):
        go(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json")}
    with pytest.raises(InputError), command(tmp_path / "run", steps=5):
        raise InputError("another configuration")
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json")} == before


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(parallel._teams, "steps", parallel.Team(rank=1, count=2))
    with command(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
