"""A run that is killed, anywhere, and started again equals the run left alone: bit for bit, file by file."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from reverie.train import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import trainer

POINTS = ["mkdir", "model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest"]
POINTS += ["before rename", "after rename", "old renamed", "old deleted"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals")


@pytest.fixture(scope="module")
def start():
    """Starts the trainer in a child, forked in milliseconds from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "reverie.train.loop"]
    )  # torch.optim imports the first, late
    children = []

    def begin(folder: Path, **arguments):
        child = context.Process(target=trainer.run, args=(folder,), kwargs=arguments)
        child.start()
        children.append(child)
        return child

    yield begin
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    child = start(folder, points=folder / "points")
    child.join(120)
    assert child.exitcode == 0
    assert set((folder / "points").read_text().splitlines()) == set(POINTS), (
        "a sub-step of save that no test kills at"
    )
    return folder


def lines(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def assert_whole(folder: Path) -> None:
    for path in checkpoint.steps(folder / "checkpoints"):
        assert checkpoint.damage(path) is None


def assert_equal(folder: Path, alone: Path) -> None:
    """The same losses and norms in every digit, the same hashes of weights, EMA, optimizer and state."""
    assert lines(folder) == lines(alone)
    assert len(lines(alone)) == trainer.STEPS + trainer.STEPS // 10
    ours, theirs = ([p.name for p in checkpoint.steps(f / "checkpoints")] for f in (folder, alone))
    assert ours == theirs
    for name in ours:
        manifests = [
            json.loads((f / "checkpoints" / name / "MANIFEST.json").read_text()) for f in (folder, alone)
        ]
        assert manifests[0] == manifests[1]
        assert len(manifests[0]["files"]) == 4
    left = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step-")]
    assert left == []


def wait_for(folder: Path, step: int, child) -> None:
    end = time.monotonic() + 60
    while child.is_alive() and time.monotonic() < end:
        rows = lines(folder)
        if rows and rows[-1].endswith("}") and json.loads(rows[-1])["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"the trainer ended with {child.exitcode} before step {step}")


def killed_run(start, folder: Path, moments: list[int], chance: random.Random, **arguments) -> None:
    """Kills the trainer soon after it logs each of `moments`, then lets it end."""
    for count, moment in enumerate(moments):
        varied = {"prefetch": count % 3, "estimate": count % 2 == 1}  # neither may leave a trace
        child = start(folder, pace=0.004, **varied, **arguments)
        wait_for(folder, moment, child)
        time.sleep(chance.uniform(0, 0.03))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert_whole(folder)
    child = start(folder, **arguments)
    child.join(120)
    assert child.exitcode == 0


@pytest.mark.chaos
def test_killed_at_random_moments(start, alone, tmp_path):
    print("seed", seed := random.randrange(10**9))
    killed_run(start, tmp_path, [4, 17, 30, 47], random.Random(seed))
    assert_equal(tmp_path, alone)


@pytest.mark.chaos
def test_killed_at_every_sub_step_of_a_save(start, alone, tmp_path):
    for point in POINTS:
        child = start(tmp_path, kill=point)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, f"the save never came to {point!r}"
        assert_whole(tmp_path)
    child = start(tmp_path)
    child.join(60)
    assert child.exitcode == 0
    assert_equal(tmp_path, alone)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_often(start, tmp_path, precision):
    left_alone, killed = tmp_path / "alone", tmp_path / "killed"
    child = start(left_alone, precision=precision)
    child.join(120)
    print("seed", seed := random.randrange(10**9))
    chance = random.Random(seed)
    killed_run(start, killed, sorted(chance.choices(range(1, 56), k=25)), chance, precision=precision)
    assert_equal(killed, left_alone)


@pytest.mark.chaos
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 85), ("SIGINT", 130), ("SIGUSR1", 85)])
def test_a_signal_stops_with_a_checkpoint(start, alone, tmp_path, name, code):
    child = start(tmp_path, pace=0.01)
    wait_for(tmp_path, 9, child)
    os.kill(child.pid, getattr(signal, name))
    child.join(30)
    assert child.exitcode == code
    last = json.loads(lines(tmp_path)[-1])["step"]
    assert 9 <= last < trainer.STEPS
    assert checkpoint.latest(tmp_path / "checkpoints").name == f"step-{last:08d}"
    child = start(tmp_path)
    child.join(60)
    assert child.exitcode == 0
    assert lines(tmp_path) == lines(alone)


@pytest.mark.chaos
def test_a_signal_during_evaluation_waits_and_a_second_does_not(start, tmp_path):
    child = start(tmp_path, hold=8)
    wait_for(tmp_path, 8, child)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGTERM)
    child.join(5)
    assert child.exitcode == -signal.SIGTERM
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000006"
