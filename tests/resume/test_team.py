"""Several processes train as one does, whatever their number, and whatever happens to one of them."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch

from reverie.disk import sha256
from reverie.train import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
import team
import tuner

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="groups are forked, and killed by POSIX signals"
)
STEPS = team.STEPS
LONG = [pytest.mark.chaos, pytest.mark.slow]


@pytest.fixture(scope="module")
def begin():
    """Starts a group of processes, forked in milliseconds from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "reverie.train", "reverie.systems.clip"])
    every = []

    def start(count: int, folder: Path, **how):
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = [
            context.Process(target=team.member, args=(rank, count, port, folder), kwargs=how)
            for rank in range(count)
        ]
        for process in group:
            process.start()
        every.extend(group)
        return group

    yield start
    for process in every:
        if process.is_alive():
            process.kill()
        process.join()


def ended(group) -> list[int]:
    """Exit codes. When one has failed, the others are ended, as torchrun does: by SIGTERM, and by SIGKILL later."""
    end = time.monotonic() + 300
    while any(process.is_alive() for process in group) and time.monotonic() < end:
        if any(process.exitcode not in (None, 0) for process in group):
            for process in group:
                process.terminate()
            time.sleep(0.5)
            for process in group:
                process.kill()
        time.sleep(0.01)
    for process in group:
        process.kill()
        process.join()
    return [process.exitcode for process in group]


def done(group) -> None:
    assert set(ended(group)) == {0}


@pytest.fixture(scope="module")
def alone(begin, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done(begin(1, folder))
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(folder: Path, alone: Path, *, tolerance: float = 1e-6) -> None:
    """The same losses and norms at every step and the same averaged weights at the end, but for rounding."""
    ours, theirs = rows(folder), rows(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [*range(1, STEPS + 1)]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert math.isclose(one[name], value, rel_tol=tolerance, abs_tol=1e-7), (name, one, other)
    ours, theirs = (json.loads((path / "weights.json").read_text()) for path in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        off = math.dist(ours[name], values) / max(math.hypot(*values), 1e-6)
        assert off < 30 * tolerance, (name, off)


@pytest.mark.parametrize(
    ("count", "how"),
    [
        (2, {}),
        (2, {"shard": True, "accumulate": 2}),
        pytest.param(4, {}, marks=LONG),
        pytest.param(2, {"shard": True, "recompute": True}, marks=LONG),
        pytest.param(4, {"shard": True}, marks=LONG),
    ],
    ids=str,
)
def test_a_group_trains_as_one_process_does(begin, alone, tmp_path, count, how):
    done(begin(count, tmp_path / "group", **how))
    if "accumulate" in how:  # contrastive batches are another loss when they are smaller
        done(begin(1, tmp_path / "one", accumulate=how["accumulate"]))
        alone = tmp_path / "one"
    assert_close(tmp_path / "group", alone)


@pytest.mark.parametrize(
    "way",
    [
        [(2, True), (1, False), (3, True)],
        pytest.param([(2, False), (1, False), (4, False)], marks=LONG),
        pytest.param([(1, False), (4, True), (2, False)], marks=LONG),
        pytest.param([(4, True), (3, True), (2, True)], marks=LONG),
    ],
    ids=lambda way: "-".join(f"{count}{'s' if shard else ''}" for count, shard in way),
)
def test_a_run_goes_on_with_another_number_of_processes(begin, alone, tmp_path, way):
    """Checkpoints of several processes, in parts or not, load on any other number; the data go on where they were."""
    for (count, shard), steps in zip(way, (6, 13, STEPS), strict=True):
        done(begin(count, tmp_path, steps=steps, shard=shard))
    assert_close(tmp_path, alone)
    seen: dict[int, list] = {}
    for path in sorted(tmp_path.glob("order-*.jsonl")):
        for line in path.read_text().splitlines():
            step, micro, count, places = json.loads(line)
            seen.setdefault(step, []).extend(map(tuple, places))
    drawn = Counter(place for step in range(STEPS) for place in set(seen[step]))
    assert all(len(seen[step]) == len(set(seen[step])) == team.BATCH for step in range(STEPS))
    whole_epochs = STEPS * team.BATCH // team.SAMPLES
    assert all(drawn[epoch, i] == 1 for epoch in range(whole_epochs) for i in range(team.SAMPLES))
    assert max(drawn.values()) == 1


def left_by(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {"metrics": (folder / "metrics.jsonl").read_text()}
    for path in checkpoint.steps(folder / "checkpoints"):
        assert checkpoint.damage(path) is None
        found[path.name] = (path / "state.json").read_text()
        for file in path.rglob("*.safetensors"):  # DCP writes tensors in no fixed order
            tensors = safetensors.torch.load_file(file)
            found[str(file.relative_to(folder))] = {name: value.tolist() for name, value in tensors.items()}
    assert not [p for p in (folder / "checkpoints").iterdir() if not p.name.startswith("step-")]
    return found | {"weights": sha256(folder / "weights.json")}


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize(("count", "shard"), [(2, False), (2, True), (4, True)])
def test_a_killed_group_goes_on_bit_for_bit(begin, tmp_path, count, shard):
    """Killed at random, and each rank in its turn in the middle of a save, mid-accumulation included."""
    print("seed", seed := random.randrange(10**9))
    chance = random.Random(seed)
    how = {"shard": shard, "accumulate": 2 if count == 2 else 3, "background": shard}
    done(begin(count, tmp_path / "alone", **how))
    for kill in (("before rename", 0), ("model.safetensors", 0), ("after rename", 0)):
        codes = ended(begin(count, tmp_path / "killed", kill=kill, **how))
        assert -signal.SIGKILL in codes
    for rank in (0, count - 1):
        group = begin(count, tmp_path / "killed", pace=0.02, **how)
        wait_for(tmp_path / "killed", chance.randint(1, 12), group)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(group[rank].pid, signal.SIGKILL)
        assert -signal.SIGKILL in ended(group)
    done(begin(count, tmp_path / "killed", **how))
    assert left_by(tmp_path / "killed") == left_by(tmp_path / "alone")


def wait_for(folder: Path, step: int, group) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and all(process.exitcode is None for process in group):
        path = folder / "seen-0.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[-1])[0] >= step:
            return
        time.sleep(0.005)
    assert any(process.exitcode == 0 for process in group), "the group did not come so far"


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_at_one_step(begin, alone, tmp_path, rank):
    group = begin(2, tmp_path, pace=0.05)
    wait_for(tmp_path, 3, group)
    os.kill(group[rank].pid, signal.SIGTERM)
    assert 85 in ended(group)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], "a checkpoint" in status["reason"]) == ("stopped", True)
    (last,) = {json.loads((tmp_path / f"seen-{r}.jsonl").read_text().splitlines()[-1])[0] for r in (0, 1)}
    assert checkpoint.latest(tmp_path / "checkpoints").name == f"step-{last:08d}"
    done(begin(1, tmp_path))
    assert_close(tmp_path, alone)


@pytest.mark.chaos
@pytest.mark.slow
def test_a_signal_to_one_asks_all_to_save_now(begin, tmp_path):
    group = begin(2, tmp_path, pace=0.05)
    wait_for(tmp_path, 5, group)
    os.kill(group[1].pid, signal.SIGUSR2)
    done(group)
    asked = [
        [
            number
            for number, *_, now in map(json.loads, (tmp_path / f"seen-{r}.jsonl").read_text().splitlines())
            if now
        ]
        for r in (0, 1)
    ]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 1


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=LONG)])
def test_what_is_not_finite_on_one_process_stops_all(begin, tmp_path, what):
    group = begin(2, tmp_path, poison=(what, 5, 1))
    assert 2 in ended(group)
    told, other = ((tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1))
    assert told == other
    assert told.startswith(f"{what} ")
    assert "at step 6" in told
    places = [json.loads(line) for line in (tmp_path / "order-1.jsonl").read_text().splitlines()]
    epoch, i = next(places for step, _, _, places in places if step == 5)[0]
    assert f"{epoch}/{i}" in told
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000004"
    assert rows(tmp_path)[-1]["step"] == 5


@pytest.mark.chaos
@pytest.mark.slow
def test_what_is_not_finite_on_one_process_is_skipped_by_all(begin, tmp_path):
    done(begin(2, tmp_path, poison=("loss", 5, 1), non_finite="skip"))
    assert rows(tmp_path)[5]["loss"] is None
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "skipped"
    assert len(event["ids"]) == team.BATCH // 2  # those of the process that had it


@pytest.mark.chaos
@pytest.mark.slow
def test_bad_samples_of_every_process_are_listed(begin, tmp_path):
    done(begin(2, tmp_path, ill=(3, 1, False)))
    listed = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["path"], row["reason"]) for row in listed] == [(4, "3-1.png", "torn")]


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_spike_on_one_process_is_kept_and_computed_again_by_all(begin, tmp_path, shard):
    done(begin(2, tmp_path, steps=50, poison=("spike", 40, 1), shard=shard))
    (path,) = checkpoint.steps(tmp_path / "evidence")
    state = checkpoint.read_state(path)
    assert path.name == "step-00000041"
    assert len(set(state["ids"])) == team.BATCH
    assert (path / "model").is_dir() == shard
    assert set(ended(begin(2, tmp_path, steps=50, poison=("spike", 40, 1), shard=shard, replay=41))) == {0}
    assert 1 in ended(
        begin(2, tmp_path, steps=50, shard=shard, replay=41)
    )  # without the poison it is another


@pytest.mark.chaos
@pytest.mark.slow
def test_too_many_bad_samples_of_one_process_stop_all(begin, tmp_path):
    assert 2 in ended(begin(2, tmp_path, ill=(0, 1, True)))
    listed = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert len(listed) == 6 * (64 // team.BATCH + 1)
    assert "more than the 20% allowed" in (tmp_path / "error-0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["drop", "chunk", "lora", "blip", "sora"])
def test_recipes_run_in_a_group(begin, tmp_path, way):
    """CLIP's, BLIP's and Sora's, with evaluation, samples and what they save: as one process, but for rounding."""
    tuner.prepare(tmp_path)
    runs = {"one": (1, {}), "two": (2, {}), "shards": (2, {"shard": True, "recompute": True})}
    for name, (count, engine) in runs.items():
        done(begin(count, tmp_path / name, place=tmp_path, way=way, **engine))
    one = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / "one")]
    weights = safetensors.torch.load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name in ("two", "shards"):
        found = rows(tmp_path / name)
        assert len(found) == len(one) >= 1
        for mine, theirs in zip(found, one, strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                assert math.isclose(mine[key], value, rel_tol=1e-3, abs_tol=1e-4), (name, key, mine, theirs)
        ours = safetensors.torch.load_file(tmp_path / name / "model" / "model.safetensors")
        assert ours.keys() == weights.keys()
        off = torch.cat([(ours[key] - value).flatten() for key, value in weights.items()]).norm()
        assert off < 1e-3 * torch.cat([value.flatten() for value in weights.values()]).norm(), name
        samples = [sorted(path.name for path in (tmp_path / n / "samples").iterdir()) for n in ("one", name)]
        assert samples[0] == samples[1]
        assert bool(samples[0]) == (way == "sora")


def children_of(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the children of a process from /proc")
def test_torchrun_begins_again_when_a_process_dies(tmp_path):
    """The command of the documentation, its processes killed two times, by torchrun's own restarts alone."""
    tuner.prepare(tmp_path)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--max-restarts", "3", "-m", "--", "reverie", "train", "clip-tiny", str(tmp_path / "data")]
    words += ["--start", str(tmp_path / "start"), "--steps", "50", "--batch", "6", "--shard"]

    def rows_of(name: str) -> list[str]:
        path = tmp_path / name / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    for name, kills in (("alone", []), ("killed", [10, 30])):
        told = tmp_path / f"{name}.txt"
        with told.open("w") as stream:
            run = subprocess.Popen(
                [*words, "--out", str(tmp_path / name)], stderr=stream, start_new_session=True
            )
        try:
            for step in kills:
                while run.poll() is None and not any(f'"step": {step},' in row for row in rows_of(name)):
                    time.sleep(0.05)
                assert run.poll() is None, told.read_text()
                os.kill(random.choice(children_of(run.pid)), signal.SIGKILL)
            assert run.wait(900) == 0, told.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended with all its processes
                os.killpg(run.pid, signal.SIGKILL)
        assert told.read_text().count("going on after step") == len(kills)
    assert rows_of("killed") == rows_of("alone")
    models = [sha256(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "killed")]
    assert models[0] == models[1]
