"""Recipes go on bit for bit after a kill: CLIP with what it drops or its adapters, BLIP with its queue, Sora with
clips, the video autoencoder with its discriminator."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
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
    context.set_forkserver_preload(
        [
            "torch._dynamo",
            "reverie.train",
            "reverie.recipes.blip",
            "reverie.recipes.clip_finetune",
            "reverie.recipes.sora",
            "reverie.recipes.video_vae",
        ]
    )

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


@pytest.fixture(scope="module")
def alone(start, place, tmp_path_factory):
    """What a run leaves that nobody touched, by its way."""
    known: dict[str, dict] = {}

    def run(way: str) -> dict:
        if way not in known:
            folder = tmp_path_factory.mktemp("alone") / way
            assert start(tuner.run, place, folder, way=way) == 0
            known[way] = left_by(folder)
        return known[way]

    return run


KILLS = {
    "drop": [("after rename", 2), ("optimizer.safetensors", 3)],
    "lora": [("after rename", 2), ("optimizer.safetensors", 3)],
    "blip": [("after rename", 2), ("backward", 3), ("model.safetensors", 2)],
    "sora": [("backward", 5), ("manifest", 3), ("backward", 7)],
    "vae": [("backward", 7), ("discriminator-optimizer.safetensors", 5)],
}


@pytest.mark.parametrize("way", KILLS)
def test_a_killed_run_goes_on_bit_for_bit(start, place, alone, tmp_path, way):
    expected = alone(way)
    assert f"step-{tuner.STEPS:08d}" in expected
    assert ("lora.safetensors" in expected) == (way == "lora")
    rows = [json.loads(line) for line in str(expected["metrics"]).splitlines()]
    assert rows[-1]["step"] == tuner.STEPS
    for kill in KILLS[way]:
        code = start(tuner.run, place, tmp_path / "killed", way=way, kill=kill)
        assert code == -signal.SIGKILL, f"the run never came to {kill}"
    assert start(tuner.run, place, tmp_path / "killed", way=way) == 0
    assert left_by(tmp_path / "killed") == expected


@pytest.mark.slow
@pytest.mark.parametrize("way", ["drop", "blip", "sora", "vae"])
def test_killed_often(start, place, alone, tmp_path, way):
    """Twenty-five times: in a step, between its batches, at any sub-step of a save."""
    print("seed", seed := random.randrange(10**9))
    chance = random.Random(seed)
    points = [
        "mkdir",
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "state.json",
        "manifest",
    ]
    points += ["before rename", "after rename"]
    killed = 0
    while killed < 25:
        kill = (chance.choice(points), 1) if chance.random() < 0.5 else ("backward", chance.randint(1, 4))
        code = start(tuner.run, place, tmp_path / "killed", way=way, kill=kill)
        if code == 0:  # it came to its end first, so another run is killed from its start
            assert left_by(tmp_path / "killed") == alone(way)
            shutil.rmtree(tmp_path / "killed")
        else:
            assert code == -signal.SIGKILL
            killed += 1
    assert start(tuner.run, place, tmp_path / "killed", way=way) == 0
    assert left_by(tmp_path / "killed") == alone(way)
