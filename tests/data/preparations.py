"""Preparations for the tests of many workers, which import this file by its name."""

import os
import signal
import time
from pathlib import Path

import torch

from reverie.errors import InputError
from reverie.media import MediaError


class Cubes:
    """Each job's number cubed, shifted by the mean of its share; it keeps a diary of who did what."""

    def __init__(self, diary: str, *, pause: float = 0.0, deadly: str = "", wrong: str = "") -> None:
        self.diary, self.pause, self.deadly, self.wrong = Path(diary), pause, deadly, wrong
        self._write("started")

    def _write(self, words: str) -> None:
        with self.diary.open("a") as file:
            file.write(f"{os.getpid()} {words}\n")

    def load(self, job):
        if job[0] == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if job[0] == "broken":
            raise MediaError(Path("broken.png"), "not a number")
        return float(job[0])

    def make(self, loaded):
        numbers = torch.tensor(list(loaded))
        self._write(" ".join(str(int(n)) for n in numbers))
        time.sleep(self.pause)
        if self.wrong == "mistake":
            raise InputError("the wrong folder.")
        if self.wrong == "failure":
            raise ZeroDivisionError("within the worker")
        return {"rows": torch.stack([numbers**3 - numbers.mean(), numbers], dim=1)}
