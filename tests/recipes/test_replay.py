"""`reverie replay` builds a run's last command again, from wherever it is called, and leaves everything as it is."""

import json
import sys
from pathlib import Path

import pytest

from reverie.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "resume"))
import tuner

FAR = "1e18"  # a learning rate after which nothing is finite


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run that went on with more steps and then failed, begun in its own folder with relative names."""
    monkeypatch.setattr("reverie.train.log.Run.curves", lambda self: None)
    (tmp_path / "elsewhere").mkdir()
    tuner.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["train", "clip-tiny", "data", "--out", "run", "--start", "start", "--batch", "6", "--lr", FAR]
    assert main([*words, "--steps", "1"]) == 0
    assert main([*words, "--steps", "4"]) == 2
    return tmp_path


def tree(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != ".lock"}


def test_from_anywhere_to_the_bit_and_nothing_changes(place, monkeypatch, capsys):
    before = tree(place)
    monkeypatch.chdir(place / "elsewhere")
    assert main(["replay", "../run"]) == 0
    told = capsys.readouterr().err
    assert "again, since" in told
    assert "the same to the bit" in told
    assert "it was" not in told
    assert tree(place) == before


def test_what_a_stranger_wrote_is_refused(place, capsys):
    path = place / "run" / "command.json"
    command = json.loads(path.read_text())
    last = command["resumed"][-1]
    for change, word in (
        ({"arguments": last["arguments"] | {"steps": "4"}}, "steps is '4'"),
        ({"arguments": last["arguments"] | {"drop": True}}, "drop is True"),
        ({"data": "memory://somewhere"}, "not opened unasked"),
        ({"data": str(place / "elsewhere")}, "no index"),
        ({"recipe": "os:system"}, "which there is not"),
        ({"recipe": ["clip-tiny"]}, "which there is not"),
        ({"arguments": 3}, "does not say which command"),
    ):
        path.write_text(json.dumps(command | {"resumed": [last | change]}))
        assert main(["replay", "run"]) == 2
        assert word in capsys.readouterr().err
    assert not (place / "elsewhere" / "metadata.parquet").exists()
    path.write_text(json.dumps(command | {"resumed": [last | {"data": str(place / "elsewhere")}]}))
    assert main(["replay", "run", "--data", "data"]) == 0


def test_a_folder_without_a_command_says_so(place, capsys):
    assert main(["replay", "elsewhere"]) == 2
    assert "does not say which command" in capsys.readouterr().err
