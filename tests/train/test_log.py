import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from reverie.cli import main
from reverie.errors import InputError
from reverie.progress import counting, duration, size
from reverie.train import Run
from reverie.train.log import Progress, refuse_difference, resolved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 1e-3
    steps: int = 10
    data: Path = Path("pictures")
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_the_folder_holds_the_resolved_configuration(tmp_path):
    run = Run(tmp_path / "run", Config())
    run.start(0)
    assert json.loads((tmp_path / "run/config.json").read_text()) == {
        "lr": 1e-3,
        "steps": 10,
        "data": "pictures",
        "inner": {"width": 8, "sizes": [1, 2]},
    }
    assert run.sample_path(7, "videos.webp") == tmp_path / "run/samples/videos-00000007.webp"
    assert run.samples.is_dir()


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(InputError, match=r"object object.*which JSON cannot"):
        resolved({"a": [object()]})


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Run(tmp_path / "run")


def test_differences_are_named_and_steps_may_only_grow(tmp_path):
    before = resolved(Config())
    refuse_difference(before, resolved(Config(steps=20)), where="x")
    refuse_difference(before, resolved(Config(data=Path("moved"))), where="x", free=frozenset({"data"}))
    with pytest.raises(InputError, match=r"steps \(was 10, is 5\)"):
        refuse_difference(before, resolved(Config(steps=5)), where="x")
    changed = resolved(Config(lr=2e-3, inner=Inner(width=9))) | {"new": None}
    with pytest.raises(InputError) as caught:
        refuse_difference(before, changed, where="x")
    assert re.findall(r"([\w.]+) \(was", str(caught.value)) == ["inner.width", "lr", "new"]


def test_metrics_are_exact_and_rewind_drops_later_and_torn_lines(tmp_path):
    run = Run(tmp_path)
    run.log(0, {"start": 1.0})
    for step in range(1, 6):
        run.log(step, {"loss": 1 / step, "bad": math.nan})
        run.event(step, event="skipped")
        run.bad(step, [(f"{step}.png", "truncated")])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run.log(0, {"start": 1.0})
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4, 5]
    run.rewind(3)
    run.log(4, {"loss": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[3] == {"step": 3, "loss": 1 / 3, "bad": None}
    for name in ("events.jsonl", "bad_samples.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2, 3]


def test_a_second_trainer_is_kept_out(tmp_path):
    first, second = Run(tmp_path), Run(tmp_path)
    first.open()
    with pytest.raises(InputError, match="in use by another"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_curves_are_drawn(tmp_path):
    run = Run(tmp_path)
    run.curves()
    assert not (tmp_path / "curves.png").exists()
    for step in range(1, 200):
        run.log(step, {"loss": 100 / step, "lr": 1e-3, "top1": step / 200})
    run.log(50, {"val_loss": 3.0, "only_none": math.nan})
    run.curves()
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert image.width > image.height
    assert (31, 119, 180) in colours  # training
    assert (255, 127, 14) in colours  # validation
    assert not list(tmp_path.glob(".*.tmp"))


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(tmp_path / "a", track=True)
    run.log(1, {"loss": 0.25})
    run.log(2, {"loss": 0.125})
    run.close()
    events = event.EventAccumulator(str(tmp_path / "a/tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25), (2, 0.125)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'reverie\[track\]'"):
        Run(tmp_path / "b", track=True)


def told(**more):
    return {"loss": 1.0, "items": 8, "seconds": 0.5, "lr": 1e-3, "memory": 2_400_000_000} | more


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("reverie.progress.EVERY", 0.0)
    progress = Progress()
    progress.update(1, 3, **told(loss=2.0))
    progress.update(2, 3, **told())
    progress.update(3, 3, **told(loss=math.nan, memory=0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/3 · loss 2 · ? items/s · lr 0.001 · 2.4 GB · ? left"
    assert re.fullmatch(r"step 2/3 · loss 1.9 · 16.0 items/s · lr 0.001 · 2.4 GB · \d+ s left", lines[1])
    assert lines[2] == "step 3/3 · loss 1.9 · 16.0 items/s · lr 0.001 · 0 s left"
    monkeypatch.setattr("reverie.progress.EVERY", 3600)
    quiet = Progress()
    for step in range(1, 4):
        quiet.update(step, 3, **told())
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress()
    for step in range(1, 4):
        progress.update(step, 3, **told(loss=0.5))
    progress.say("a word [in brackets]")
    progress.close()
    text = capsys.readouterr().err
    assert "a word [in brackets]" in text
    assert "3/3" in text
    assert "loss 0.5" in text


def test_throughput_is_that_of_the_steps_and_not_of_what_lies_between(capsys, monkeypatch):
    monkeypatch.setattr("reverie.progress.EVERY", 0.0)
    progress = Progress()
    for step, seconds in enumerate((9.0, 0.5, 0.25, 0.25), 1):  # the first one warms up
        progress.update(step, 9, **told(seconds=seconds))
    assert progress.numbers["items_per_second"] == pytest.approx(24 / (0.5 + 0.25 + 0.25))


def test_with_json_every_line_is_one_object(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REVERIE_PROGRESS", "json")
    monkeypatch.setattr("reverie.progress.EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = Run(tmp_path)
    run.progress(1, 3, **told(loss=math.nan))
    run.progress(2, 3, **told())
    run.say("a word")
    run.close()
    with counting("drawing") as show:
        show(1, 2)
    assert main(["train", "none", "data"]) == 2
    first, second, word, drawing, error = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["loss"] is None
    assert second.pop("seconds_left") >= 0
    assert second == {
        "kind": "progress", "label": "step", "done": 2, "total": 3, "loss": 1.0, "items_per_second": 16.0, "lr": 1e-3,
        "memory": 2_400_000_000,
    }  # fmt: skip
    assert word == {"kind": "line", "text": "a word"}
    assert (drawing["label"], drawing["done"]) == ("drawing", 1)
    assert error["kind"] == "error"
    assert "no recipe" in error["text"]


def test_plain_lines_on_a_terminal_when_asked_and_other_wishes_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("reverie.progress.EVERY", 0.0)
    monkeypatch.setenv("REVERIE_PROGRESS", "plain")
    progress = Progress()
    progress.update(1, 3, **told())
    assert capsys.readouterr().err == "step 1/3 · loss 1 · ? items/s · lr 0.001 · 2.4 GB · ? left\n"
    monkeypatch.setenv("REVERIE_PROGRESS", "loud")
    assert main(["runs"]) == 2
    assert (
        capsys.readouterr().err
        == "reverie: REVERIE_PROGRESS is 'loud': give plain or json, or leave it out.\n"
    )


def test_durations():
    assert [duration(s) for s in (40, 720, 12600, 181440)] == ["40 s", "12 min", "3.5 h", "2.1 days"]


def test_sizes():
    counts = (34_000, 1_500_000, 120_000_000, 2_400_000_000)
    assert [size(count) for count in counts] == ["34 kB", "1.5 MB", "120 MB", "2.4 GB"]


def test_a_saved_model_is_left_alone(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="holds a model"):
        Run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_run_of_another_kind_is_told_in_a_sentence():
    with pytest.raises(InputError, match=r"k04 .* and 15 more; give") as caught:
        refuse_difference({"a": 1}, {"a": 1} | {f"k{i:02}": i for i in range(20)}, where="run")
    assert "k05" not in str(caught.value)
