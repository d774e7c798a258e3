"""Runs that drop patches and words, and runs of adapters, go on bit for bit after a kill."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import pytest

from reverie.disk import sha256
from reverie.train import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import tuner

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals")]


@pytest.fixture(scope="module")
def start():
    """Runs a function in a child, forked from a server that has imported torch; gives its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "reverie.train", "reverie.recipes.clip_finetune"])

    def begin(function, *given, **named):
        child = context.Process(target=function, args=given, kwargs=named)
        child.start()
        child.join(120)
        return child.exitcode

    return begin


@pytest.fixture(scope="module")
def place(start, tmp_path_factory):
    place = tmp_path_factory.mktemp("tuning")
    assert start(tuner.prepare, place) == 0
    return place


def left_by(folder: Path) -> dict[str, object]:
    """What a run leaves: its metrics in every digit, the hashes of its checkpoints and of its models."""
    found: dict[str, object] = {"metrics": (folder / "metrics.jsonl").read_text()}
    for path in checkpoint.steps(folder / "checkpoints"):
        assert checkpoint.damage(path) is None
        found[path.name] = json.loads((path / "MANIFEST.json").read_text())
    return found | {str(path.relative_to(folder)): sha256(path) for path in folder.glob("**/*.safetensors")}


@pytest.mark.parametrize("way", ["drop", "lora"])
def test_a_killed_run_goes_on_bit_for_bit(start, place, tmp_path, way):
    assert start(tuner.run, place, tmp_path / "alone", way=way) == 0
    alone = left_by(tmp_path / "alone")
    assert f"step-{tuner.STEPS:08d}" in alone
    assert ("lora.safetensors" in alone) == (way == "lora")
    rows = [json.loads(line) for line in str(alone["metrics"]).splitlines()]
    assert rows[-1]["step"] == tuner.STEPS
    for kill in (("after rename", 2), ("optimizer.safetensors", 3)):
        code = start(tuner.run, place, tmp_path / "killed", way=way, kill=kill)
        assert code == -signal.SIGKILL, f"the run never came to {kill}"
    assert start(tuner.run, place, tmp_path / "killed", way=way) == 0
    assert left_by(tmp_path / "killed") == alone
