"""What stands beside the steps of a run: how far it is, how it ended, and what it took beside what was said.

status.json says the first two (see `train/runs.py`), and is written anew every few seconds, so that whoever looks sees
a run that lives; resources.json compares time and memory with the plan.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reverie.errors import InputError, out_of_memory
from reverie.progress import EVERY, duration, size
from reverie.train import memory
from reverie.train.log import now
from reverie.train.runs import read_json

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from reverie.train.log import Run
    from reverie.train.loop import Step
    from reverie.train.plan import Plan

MISSED = {"step_seconds": 1.5, "memory": 1.25}  # factors, from which on an estimate was a bad one


class Watch:
    """Stands beside a run's steps: tells how far it is, how it ended, and what it took beside what was said.

        with Watch(run, device=device, steps=steps) as watch:
            watch.begin(step)
            watch.said = estimate(...)
            ...
            watch.start(); step = ...; watch.done(step)

    Where the memory ends, one sentence with the remedy is raised in place of torch's.
    """

    def __init__(self, run: Run, *, device: torch.device, steps: int) -> None:
        self.run, self.device, self.steps = run, device, steps
        self.said: Plan | None = None
        self._since = ""
        self._first = self._at = 0
        self._clock = self._told = self._in_steps = 0.0
        self._times: deque[float] = deque(maxlen=10_000)
        self._peak = self._before = 0
        self._rose = False

    def __enter__(self) -> Watch:
        return self

    def begin(self, step: int) -> None:
        """The folder is this run's, which goes on after `step` steps."""
        self._since, self._clock, self._first, self._at = now(), time.monotonic(), step, step
        self._keep("running")
        self._told = 0.0  # the first step is told at once

    def start(self) -> None:
        """A step begins."""
        self._before = memory.peak(self.device)

    def done(self, step: Step) -> None:
        """It is done."""
        most = memory.peak(self.device)
        if most > self._before or not self._peak:  # it rose in a step, and not in what is done between them
            self._rose, self._peak = self._rose or most > self._before, most
        self._at = step.number
        self._times.append(step.seconds)
        self._in_steps += step.seconds
        self.run.progress(
            step.number,
            self.steps,
            loss=step.loss,
            items=step.items,
            seconds=step.seconds,
            lr=step.lr,
            memory=most,
        )
        if time.monotonic() - self._told >= EVERY:
            passed = time.monotonic() - self._clock
            self._keep(
                "running",
                loss=step.loss if math.isfinite(step.loss) else None,
                lr=step.lr,
                items_per_second=step.items / statistics.median(self._times),
                seconds_left=passed / max(1, self._at - self._first) * (self.steps - self._at),
                memory=most or None,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._since:  # refused before it began: what stands in the folder is another's
            return
        told_already = read_json(self.run.folder / "status.json").get("state") == "failed"
        if isinstance(error, GeneratorExit) and told_already:  # of what the recipe did between the steps
            return
        if self._times:
            self._compare(aloud=error is None)
        if error is not None and isinstance(error, Exception) and out_of_memory(error):
            remedy = self.said.remedy() if self.said else "take a smaller --batch"
            chunk = " (also with another chunk)" if "chunk" in self.run.config else ""
            told = InputError(
                f"The memory did not suffice in step {self._at + 1}: {remedy}; where others took it, the same command "
                f"goes on{chunk}, and another batch needs a new folder."
            )
            self._keep("failed", reason=str(told))
            raise told from error
        if error is None and self._at >= self.steps:
            self._keep("finished")
        elif isinstance(error, Exception):
            self._keep("failed", reason=str(error) or type(error).__name__)
        else:
            by = error.code if isinstance(error, SystemExit) else None
            ways = {85: "by a signal, with a checkpoint", 130: "by Ctrl-C, with a checkpoint"}
            at_once = (
                "by Ctrl-C, at once" if isinstance(error, KeyboardInterrupt) else "the recipe left its loop"
            )
            self._keep("stopped", reason=ways.get(by, at_once) if isinstance(by, int) else at_once)

    def _keep(self, state: str, **more: Any) -> None:
        self._told = time.monotonic()
        try:
            self.run.status(state, step=self._at, steps=self.steps, since=self._since, **more)
        except OSError as error:  # a full disk, say: what counts is the checkpoint, which says so by itself
            self.run.say(f"status.json could not be written ({error.strerror})")

    def _compare(self, *, aloud: bool) -> None:
        """Writes what was said and what was used, and says so at the end."""
        used: dict[str, float] = {"step_seconds": statistics.median(self._times), "memory": self._peak}
        seconds = time.monotonic() - self._clock
        told: dict[str, Any] = {
            "device": str(self.device),
            "steps": self._at - self._first,
            "seconds": seconds,
            "seconds_in_steps": self._in_steps,
            "said": None,
            "used": used
            | {"memory_is_at_most": not self._rose, "memory_altogether": memory.peak(self.device)},
            "missed": [],
        }
        text = ""
        if self.said is not None:
            said = {"step_seconds": self.said.step_seconds, "memory": self.said.memory}
            told["said"] = {k: v for k, v in asdict(self.said).items() if k not in ("steps", "settings")}
            told["missed"] = missed(said, used if self._rose else used | {"memory": 0})
            text = f"said {said['step_seconds']:.2g} s a step and {size(said['memory'])}, "
        text += (
            f"took {used['step_seconds']:.2g} s and {'' if self._rose else 'at most '}{size(used['memory'])}"
        )
        between = told["used"]["memory_altogether"]
        if between > 1.02 * used["memory"]:
            text += f" ({size(between)} with what was done between the steps)"
        text += f"; {duration(seconds)}, {self._in_steps / max(seconds, 1e-9):.0%} of it in steps"
        try:
            self.run.keep("resources.json", told)
        except OSError as error:
            self.run.say(f"resources.json could not be written ({error.strerror})")
        if aloud and self.said is not None:
            self.run.say("; ".join([text, *told["missed"]]))


def missed(said: Mapping[str, float], used: Mapping[str, float]) -> list[str]:
    """What was far from what was said, in words."""
    names = {
        "step_seconds": ("the time of a step", ", or others use the machine too"),
        "memory": ("the memory", ""),
    }
    out = []
    for key, most in MISSED.items():
        times = used[key] / said[key] if said[key] > 0 and used[key] > 0 else 1.0
        if not 1 / most <= times <= most:
            out.append(f"{names[key][0]} was {times:.2g} times what was said: a bad estimate{names[key][1]}")
    return out
