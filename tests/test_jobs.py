"""The jobs: their flags exist, a stopped one goes on, and what they leave is small and few.

The interpreter that they call is a script here that records its words, so that what is tested is the jobs.
"""

import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest

from reverie.catalog import recipe

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "jobs"

PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in
    *steps.py*) echo 123 ;;
    "-m reverie train"*)
        [ ! -f "$STOP" ] || { rm "$STOP"; exit 85; }
        out=$(sed 's/.*--out \\([^ ]*\\).*/\\1/' <<< "$*")
        mkdir -p "$out/model" && echo {} > "$out/model/config.json" && echo 1 > "$out/metrics.jsonl" ;;
    "- "*) mkdir -p "$3" && echo {} > "$3/config.json" ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """`call(job, STEPS="5")` -> exit code and the words that the interpreter was given since the last call."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    for source in ("openmoji", "fluent-anim"):
        (tmp_path / "corpus" / source).mkdir(parents=True)
    calls = tmp_path / "calls"

    def run(job, *, stop=False, **environment):
        calls.write_text("")
        if stop:
            (tmp_path / "stop").touch()
        given = os.environ | environment | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "STOP": str(tmp_path / "stop"),
            "RUNS": str(tmp_path / "runs"),
        }  # fmt: skip
        words = [JOBS / job, tmp_path / "corpus", tmp_path / "out"]
        code = subprocess.run(words, env=given, capture_output=True, timeout=60).returncode
        return code, calls.read_text().splitlines()

    return run


def trains(calls):
    return [line for line in calls if line.startswith("-m reverie train")]


@pytest.mark.parametrize("job", ["clip-stickers", "blip-stickers", "sora-stickers", "judge-stickers"])
def test_a_job_asks_for_nothing_that_its_recipe_does_not_have(job):
    text = (JOBS / job).read_text().replace("\\\n", " ")
    command = next(line for line in text.splitlines() if line.startswith(f"train {job} "))
    flags = set(re.findall(r"--([a-z0-9-]+)", command)) | {"steps"}
    assert flags <= set(inspect.signature(recipe(job)).parameters)


def test_a_stopped_job_goes_on_with_the_steps_it_began_with(call, tmp_path):
    code, calls = call("clip-stickers", stop=True)
    assert code == 85
    assert "--steps 123" in trains(calls)[0]
    code, calls = call("clip-stickers")
    assert code == 0
    assert len(trains(calls)) == 1
    assert "--steps 123" in trains(calls)[0]
    assert not any("steps.py" in line for line in calls)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["clip-stickers", "clip-stickers.tar.gz"]
    assert trains(call("clip-stickers")[1]) == []


def test_steps_that_are_given_are_not_timed(call):
    _, calls = call("judge-stickers", STEPS="5")
    assert "--steps 5" in trains(calls)[0]
    assert not any("steps.py" in line for line in calls)


def test_a_call_without_time_stops_before_it_trains(call):
    code, calls = call("clip-stickers", STEPS="5", CALL="0")
    assert code == 85
    assert trains(calls) == []


def test_all_does_each_once_and_sora_reads_with_the_new_clip(call, tmp_path):
    code, calls = call("all", STEPS="5", stop=True)
    assert code == 85
    code, calls = call("all", STEPS="5")
    assert code == 0
    assert [line.split()[3] for line in trains(calls)] == [
        "clip-stickers",
        "blip-stickers",
        "judge-stickers",
        "sora-stickers",
    ]
    assert f"--clip {tmp_path / 'runs' / 'clip-stickers' / 'model'}" in trains(calls)[3]
    assert call("all", STEPS="5") == (0, [])
