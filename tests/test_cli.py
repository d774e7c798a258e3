"""The command line: help, mistakes, exit codes, and each command from end to end on small things."""

import inspect
import subprocess
import sys

import pytest

from reverie import cli
from reverie.errors import InputError


def reverie(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_the_overview_names_every_command(capsys):
    assert reverie("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert reverie() == 0
    assert capsys.readouterr().out == text


def test_a_group_has_its_own_overview(capsys):
    assert reverie("data", "--help") == 0
    text = capsys.readouterr().out
    assert "data import" in text
    assert "train" not in text
    assert reverie("data") == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_for_every_flag(name, capsys):
    assert reverie(*name.split(), "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert cli._headline(cli.COMMANDS[name]) in text
    doc = inspect.getdoc(cli.COMMANDS[name])
    for parameter in inspect.signature(cli.COMMANDS[name]).parameters:
        assert f"\n    {parameter}: " in doc, f"{name}: {parameter} has no line in the docstring"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["frobnicate"], "reverie --help"),
        (["sampel"], "`reverie sample`"),
        (["data", "imprt"], "`reverie data import`"),
    ],
)
def test_an_unknown_command_is_one_sentence(words, hint, capsys):
    assert reverie(*words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert hint in err


def test_an_unknown_flag_is_exit_code_2(capsys):
    assert reverie("doctor", "--frobnicate") == 2
    assert "--frobnicate" in capsys.readouterr().err


def test_a_mistake_of_the_user_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    assert reverie("data", "import", tmp_path / "absent") == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert "absent" in err
    assert err.startswith("reverie: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (InputError("no"), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(85), 85),
        (SystemExit(), 0),
        (SystemExit("x"), 1),
    ],
)
def test_exit_codes(monkeypatch, raised, code):
    def command() -> None:
        """Raise."""
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    assert reverie("doctor") == code


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def command() -> None:
        """Raise."""
        raise AssertionError("ours")

    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    with pytest.raises(AssertionError, match="ours"):
        reverie("doctor")


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "reverie.cli"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    with process.stderr:
        assert not process.stderr.read()
    assert process.wait(60) == 141
