import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest

from reverie.cli import main
from reverie.errors import InputError
from reverie.train import Run
from reverie.train import runs as folders


def write(folder, rows, *, status=None, config=None, command=None, **kept):
    """A run folder by hand."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config or {"steps": 100, "lr": 0.1}))
    for name, what in {"status": status, "command": command, **kept}.items():
        if what is not None:
            (folder / f"{name}.json").write_text(json.dumps(what))
    return folder


def steps(n, *, scale=1.0, every=1):
    return [{"step": s, "loss": scale * s, "lr": 0.1, "grad_norm": 1.0} for s in range(every, n + 1, every)]


def here(state, step, **more):
    return {"state": state, "step": step, "steps": 100, "host": platform.node(), "process": 1} | more


def test_states_come_from_the_status_and_the_lock(tmp_path):
    write(tmp_path / "a", steps(100), status=here("finished", 100))
    write(tmp_path / "b", steps(40), status=here("stopped", 47, reason="by a signal, with a checkpoint"))
    write(tmp_path / "c", steps(40), status=here("failed", 41, reason="loss is nan"))
    write(tmp_path / "d", steps(40), status=here("running", 38))
    write(tmp_path / "e", steps(40), status=here("running", 38) | {"host": "another"})
    write(tmp_path / "f", steps(40), status=here("running", 38) | {"host": "another"})
    for file in (tmp_path / "f").glob("*.json*"):
        os.utime(file, (time.time() - 3600,) * 2)
    write(tmp_path / "old", steps(100))
    write(tmp_path / "older", steps(60))
    alive = Run(write(tmp_path / "sweep/g", steps(60), status=here("running", 55, seconds_left=90.0)))
    alive.open()
    try:
        found = {path.name: folders.read(path) for path in folders.find(tmp_path)}
    finally:
        alive.close()
    assert {name: (each.state, each.step) for name, each in found.items()} == {
        "a": ("finished", 100), "b": ("stopped", 47), "c": ("failed", 41), "d": ("failed", 38),
        "e": ("running", 38), "f": ("failed", 38), "old": ("finished", 100), "older": ("stopped", 60),
        "g": ("running", 60),
    }  # fmt: skip
    assert found["c"].reason == "loss is nan"
    assert "killed" in found["d"].reason
    assert found["g"].seconds_left == 90
    assert folders.read(tmp_path / "sweep/g").state == "failed", "its trainer has gone without a word"


def test_a_record_has_the_last_numbers_and_what_is_no_step_s(tmp_path):
    rows = [*steps(30), {"step": 10, "val_top1": 0.1}, {"step": 20, "val_top1": 0.3, "odd": None}]
    folder = write(
        tmp_path / "r", rows, command={"recipe": "clip-tiny", "started": "2026-01-31T12:00:00+00:00"}
    )
    (folder / "metrics.jsonl").open("a").write('{"step": 31, "lo')
    (folder / "model").mkdir()
    (folder / "model/weights").write_bytes(b"x" * 5000)
    record = folders.read(folder)
    assert (record.loss, record.recipe, record.steps) == (30, "clip-tiny", 100)
    assert record.measured == {"val_top1": {"step": 20, "value": 0.3}}
    assert record.bytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such lock")
def test_looking_disturbs_no_trainer_and_changes_no_file(tmp_path):
    folder = write(tmp_path / "r", steps(30), status=here("finished", 30))
    (folder / ".lock").touch()
    import fcntl

    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    look = (folder / ".lock").open()  # a trainer that starts at the very moment of a look is not refused
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.03, look.close).start()
    run = Run(folder)
    run.open()
    assert folders.locked(folder)
    folders.read(folder)
    folders.details(folder)
    run.close()
    assert not folders.locked(folder)
    (folder / "samples").rmdir()  # of Run
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()} == before


def test_differences_and_values_at_the_same_steps(tmp_path):
    config = {"lr": 0.1, "model": {"width": 8, "depth": 2}}
    chosen = {
        "a": write(tmp_path / "a", [*steps(100), {"step": 50, "val": 5.0}], config=config),
        "b": write(
            tmp_path / "b",
            [*steps(100, scale=2.0, every=2), {"step": 50, "val": 4.0}, {"step": 60, "val": 3.0}, {"step": 1, "x": 1}],
            config=config | {"lr": 0.2, "model": {"width": 8}},
        ),
    }  # fmt: skip
    assert folders.differences(chosen) == {
        "lr": {"a": 0.1, "b": 0.2},
        "model.depth": {"a": 2, "b": None},
    }
    exact = {each.metric: each for each in folders.side_by_side(chosen)}
    assert exact["loss"].steps == list(range(2, 101, 2))
    assert exact["loss"].values == {"a": [*range(2, 101, 2)], "b": [*range(4, 201, 4)]}
    assert (exact["val"].steps, exact["val"].values) == ([50], {"a": [5.0], "b": [4.0]})
    assert "x" not in exact
    few = {each.metric: each for each in folders.side_by_side(chosen, rows=5)}
    assert few["loss"].steps == [20, 40, 60, 80, 100]
    assert few["loss"].means
    assert not few["val"].means
    own = [sum(range(end - 18, end + 1, 2)) / 10 for end in few["loss"].steps]
    assert few["loss"].values == {"a": own, "b": [2 * value for value in own]}


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    resources = {
        "said": {"step_seconds": 0.1, "memory": 10**9},
        "used": {"step_seconds": 0.2, "memory": 2 * 10**9, "memory_is_at_most": False},
        "missed": ["the memory was 2 times what was said: a bad estimate"],
    }
    write(tmp_path / "runs/a", steps(100), status=here("finished", 100), resources=resources)
    write(tmp_path / "runs/b", steps(80), status=here("failed", 80, reason="no luck"), config={"lr": 0.3})
    assert main(["runs"]) == 0
    text = capsys.readouterr().out
    rows = [line.split()[:3] for line in text.splitlines()[1:3]]
    assert rows == [["a", "100/100", "finished"], ["b", "80/100", "failed"]]
    assert "b: no luck" in text
    assert main(["runs", "--json"]) == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["finished", "failed"]
    assert main(["runs", "show", "a"]) == 0
    text = capsys.readouterr().out
    assert "0.2 s a step, 2.0 GB of memory (said: 0.1 s, 1.0 GB); the memory was 2 times" in text
    assert main(["runs", "show", "runs/b", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert told == {"step": 80, "last": 80, "lowest": 1, "highest": 80}
    assert main(["runs", "compare", "a", "runs/b", "--metrics", "loss", "--rows", "2"]) == 0
    text = capsys.readouterr().out
    assert ["lr", "0.1", "0.3"] in [line.split() for line in text.splitlines()]
    assert ["80", "60.5", "60.5"] in [line.split() for line in text.splitlines()]
    assert main(["runs", "compare", "a", "b", "--json"]) == 0
    shared = json.loads(capsys.readouterr().out)["metrics"]
    assert shared[0]["metric"] == "loss"
    assert shared[0]["steps"] == [*range(1, 81)]
    assert main(["runs", "curves", "a", "b", "--out", "sheet.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == ["loss", "grad_norm", "lr"]
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    for words, match in (
        (["runs", "compare", "a", "a"], "too few"),
        (["runs", "show", "c"], "c is no run's folder"),
        (["runs", "none"], "There is no folder none"),
        (["runs", "curves", "a", "--metrics", "top1"], "logged top1"),
        (["runs", "compare", "a", "b", "--rows", "0"], "rows is 0"),
    ):
        assert main(words) == 2
        assert match in capsys.readouterr().err


def test_names_that_are_equal_become_paths(tmp_path):
    one, other = write(tmp_path / "x/r", []), write(tmp_path / "y/r", [])
    assert folders.labels([one, other]) == [str(one), str(other)]
    assert folders.labels([one]) == ["r"]
    with pytest.raises(InputError, match="no run's folder"):
        folders.named(str(tmp_path))


def test_reading_needs_no_torch(tmp_path):
    write(tmp_path / "a", steps(5))
    code = f"import sys; from reverie.cli import main; main(['runs', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


@pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals")
def test_a_killed_trainer_is_no_running_one(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=_train_for_ever, args=(tmp_path / "r",))
    child.start()
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "r/metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert folders.read(tmp_path / "r").state == "running"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    record = folders.read(tmp_path / "r")
    assert record.state == "failed"
    assert record.reason == "killed, or the machine went down, after step 3"


def _train_for_ever(folder):
    run = Run(folder, progress=False)
    run.open()
    run.status("running", step=3, steps=10)
    run.log(4, {"loss": 1.0})
    time.sleep(600)


def test_runs_without_a_step_in_common_have_none_to_show(tmp_path):
    write(tmp_path / "a", [{"step": 10, "loss": 1.0}])
    write(tmp_path / "b", [{"step": 4, "loss": 2.0}])
    both = {name: tmp_path / name for name in "ab"}
    for rows in (None, 8):
        (shared,) = folders.side_by_side(both, rows=rows)
        assert (shared.steps, shared.values) == ([], {"a": [], "b": []})
    assert "loss" in folders.comparison(both, folders.differences(both), [shared])


def test_a_run_is_finished_with_its_model_alone(tmp_path):
    here = {"state": "finished", "step": 3, "steps": 3, "host": platform.node()}
    write(
        tmp_path / "saving", steps(3), status=here | {"process": os.getpid()}, command={"recipe": "clip-tiny"}
    )
    write(
        tmp_path / "killed", steps(3), status=here | {"process": 2**22 + 1}, command={"recipe": "clip-tiny"}
    )
    write(
        tmp_path / "own", steps(3), status=here | {"process": 2**22 + 1}
    )  # of no recipe, so it owes no model
    states = [folders.read(tmp_path / name).state for name in ("saving", "killed", "own")]
    assert states == ["running", "failed", "finished"]
    (tmp_path / "killed" / "model").mkdir()
    assert folders.read(tmp_path / "killed").state == "finished"
