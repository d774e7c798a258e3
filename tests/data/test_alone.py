"""Two runs on one folder exclude each other, and the lock dies with its process."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reverie.data.alone import LOCK, alone, exclusively
from reverie.errors import InputError

HOLD = """
import sys
from reverie.data.alone import alone
with alone(sys.argv[1], "reverie caption"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_is_there(tmp_path: Path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"reverie caption` \(process {other.pid} on .*wait for it"):
            with alone(tmp_path, "reverie data score"):
                pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with alone(tmp_path, "reverie data score"):  # nothing is left over that bars
            assert (tmp_path / LOCK).exists()
    finally:
        other.kill()
        other.communicate()
    assert not list(tmp_path.iterdir())


def _count(folder: Path, times: int) -> None:
    for _ in range(times):
        while True:
            try:
                with alone(folder, "count"):
                    file = folder / "count"
                    file.write_text(str(int(file.read_text()) + 1))
                break
            except InputError:
                pass


def test_no_update_is_lost_between_processes(tmp_path: Path):
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_count, args=(tmp_path, 150)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert (tmp_path / "count").read_text() == "450"


def test_a_command_may_call_another(tmp_path: Path):
    @exclusively("outer")
    def outer(folder: str | Path) -> str:
        with alone(folder, "inner"):
            assert (tmp_path / LOCK).exists()
        assert (tmp_path / LOCK).exists()
        return "done"

    assert outer(tmp_path) == "done"
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path: Path):
    with alone(tmp_path / "none", "anything"):
        pass
