"""The run folder: everything one training run leaves behind, readable without Reverie.

    config.json         the resolved configuration
    metrics.jsonl       one object per logged step: {"step": 120, "loss": 2.31, ...}
    events.jsonl        skipped steps, with the reason and the sample ids
    bad_samples.jsonl   samples that could not be read and were replaced
    status.json         how far it is and how it ended: running, finished, stopped or failed, with the reason
    resources.json      time per step and memory, as said before the first step and as used
    curves.png          the metrics drawn
    samples/            grids at fixed prompts and noise, by step
    checkpoints/        step-00000100/...

A resumed run drops the lines beyond the step it resumes from, since these steps run again; so no step appears
twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from reverie import __version__, disk
from reverie.errors import InputError
from reverie.progress import Display, say, size
from reverie.train import curves
from reverie.train.runs import LOCK, leaves, read_json, read_lines

DIFFERENCES = 5  # so many are named
FREE = (
    "save_every",
    "keep",
    "log_every",
    "eval_every",
    "sample_every",
    "prefetch",
    "device",
    "chunk",
    "estimate",
    "track",
    "out",
)
"""Configuration keys that may change when a run resumes, since no result depends on them, save for rounding."""


class Run:
    """One run folder: `train` opens it and resumes what is in it, the recipe logs to it."""

    def __init__(
        self,
        folder: str | Path,
        config: Any = None,
        *,
        track: bool = False,
        progress: bool = True,
        free: Sequence[str] = FREE,
    ) -> None:
        """`config`: a dataclass or mapping; `track`: also for TensorBoard; `free`: keys that may change."""
        from reverie.train.parallel import team  # torch, which reading the folders needs not

        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; name a folder for the run.")
        if (self.folder / "model.safetensors").exists():
            raise InputError(
                f"{self.folder} holds a model, whose config.json a run would replace; name a new folder."
            )
        self.config = resolved(config if config is not None else {})
        self.free = frozenset(free)
        self.checkpoints = self.folder / "checkpoints"
        self.evidence = self.folder / "evidence"
        self.samples = self.folder / "samples"
        self.writes = team().first  # of several processes; what the others log is not kept
        for path in (self.folder, self.checkpoints, self.samples):
            path.mkdir(parents=True, exist_ok=True)
        if not self.writes:
            self._elsewhere = tempfile.TemporaryDirectory(prefix="reverie-")
            self.samples = Path(self._elsewhere.name)
        self._metrics = _Lines(self.folder / "metrics.jsonl")
        self._events = _Lines(self.folder / "events.jsonl")
        self._bad = _Lines(self.folder / "bad_samples.jsonl")
        self._progress = Progress() if progress and self.writes else None
        self._lock: Any = None
        self._writer: Any = None
        self._track = track and self.writes
        if track:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
            except ImportError as error:
                raise InputError(
                    "track=True needs TensorBoard; install it with: pip install 'reverie[track]'."
                ) from error

    # ------------------------------------------------------------ for the recipe

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line of numbers for `step`; curves.png draws val_loss over loss, and so on."""
        if not self.writes:
            return
        row = {name: float(value) for name, value in metrics.items()}
        self._metrics.append({"step": step} | {k: v if math.isfinite(v) else None for k, v in row.items()})
        if self._track:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = self._writer or SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
            for name, value in row.items():
                self._writer.add_scalar(name, value, step)

    def sample_path(self, step: int, name: str = "grid.png") -> Path:
        """Where the samples of `step` go: samples/grid-00000100.png."""
        stem, dot, suffix = name.partition(".")
        return self.samples / f"{stem}-{step:08d}{dot}{suffix}"

    def metrics(self) -> list[dict[str, float | None]]:
        """Every logged line so far."""
        return self._metrics.read()

    def curves(self) -> None:
        """Draws curves.png: each series raw and smoothed, validation over training."""
        if self.writes:
            curves.draw(self.metrics(), self.folder / "curves.png", title=self.folder.name)

    def say(self, text: str) -> None:
        """One line to the person who watches, beside the progress."""
        if self._progress is not None:
            self._progress.say(text)

    # ------------------------------------------------------------ for the loop

    def open(self) -> None:
        """Locks the folder against a second trainer; the lock dies with the process."""
        if not self.writes:
            return
        for again in range(5, -1, -1):  # `reverie runs` looks at the lock for a moment, and is no trainer
            handle = disk.hold(self.folder / LOCK)
            if handle is not None:
                break
            if not again:
                raise InputError(
                    f"{self.folder} is in use by another training process; wait for it or name another."
                )
            time.sleep(0.02)
        self._lock = handle

    def check(self) -> None:
        """Raises InputError when the folder's config.json differs from this run's configuration."""
        path = self.folder / "config.json"
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(
                    f"{path} is not JSON any more; restore it, or train in a new folder."
                ) from error
            refuse_difference(before, self.config, where=str(self.folder), free=self.free)

    def start(self, step: int) -> None:
        """Begins at `step` steps done: writes the configuration and drops later lines."""
        if not self.writes:
            return
        path = self.folder / "config.json"
        disk.write_json(path, self.config)
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forgets every line beyond `step`."""
        if not self.writes:
            return
        for lines in (self._metrics, self._events, self._bad):
            lines.rewind(step)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def event(self, step: int, **what: Any) -> None:
        """Records something that happened at `step`."""
        if self.writes:
            self._events.append({"step": step} | what)

    def bad(self, step: int, samples: Iterable[tuple[str, str]]) -> None:
        """Records samples (path, reason) that the batch of `step` had to replace."""
        for path, reason in samples if self.writes else ():
            self._bad.append({"step": step, "path": str(path), "reason": str(reason)})

    def keep(self, name: str, what: Mapping[str, Any], *, durable: bool = True) -> None:
        """Writes a small JSON file of the folder, in place of the one before."""
        if self.writes:
            disk.write_json(self.folder / name, what, durable=durable)

    def status(self, state: str, **what: Any) -> None:
        """Writes status.json: running, finished, stopped or failed; which process, and when."""
        who = {"process": os.getpid(), "host": platform.node()}
        self.keep("status.json", {"state": state, "at": now()} | what | who, durable=state != "running")

    def progress(self, step: int, steps: int, **told: Any) -> None:
        """Tells the person who watches that `step` of `steps` is done; `told` as in `Progress.update`."""
        if self._progress is not None:
            self._progress.update(step, steps, **told)

    def sync(self) -> None:
        """Flushes the logs to the disk, so that they are not behind a checkpoint after a power cut."""
        for lines in (self._metrics, self._events, self._bad):
            lines.sync()

    def close(self) -> None:
        """Draws the curves, ends the progress and gives the folder free."""
        for lines in (self._metrics, self._events, self._bad):
            lines.close()
        if self._progress is not None:
            self._progress.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def now() -> str:
    """The time in UTC, as in the files of a run: 2026-01-31T12:00:00.000+00:00."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def commanded(folder: Path, **command: Any) -> Iterator[None]:
    """Around a recipe: keeps `command` in the folder's command.json, and a failure in its status.json.

    The first command stays; those that go on are listed under "resumed". A recipe that is refused before its run
    begins leaves the folder as it was. Of several processes only the first writes.
    """
    from reverie.train.parallel import team

    path, begun = folder / "command.json", now()
    if not team().first or (folder.exists() and not folder.is_dir()):  # the latter Run refuses
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else None
    told = resolved(command) | {"folder": os.getcwd(), "version": __version__, "started": begun}
    if before is not None:
        first = read_json(path)
        told = first | {"resumed": [*first.get("resumed", ()), told]}
    disk.write_json(path, told)
    try:
        yield
    except BaseException as error:
        status = folder / "status.json"
        state = read_json(status)
        ours = state.get("process") == os.getpid() and state.get("since", "") >= begun
        if not ours:
            if before is not None:
                disk.write(path, before)
            else:
                path.unlink()
                if made and not any(folder.iterdir()):
                    folder.rmdir()
        elif (
            isinstance(error, Exception) and state.get("state") != "failed"
        ):  # between the steps, or after them
            told = {"state": "failed", "at": now(), "reason": str(error) or type(error).__name__}
            disk.write_json(status, state | told)
        raise


# ---------------------------------------------------------------- configuration


def resolved(config: Any) -> Any:
    """`config` as plain JSON values: dataclasses, mappings, sequences, paths, numbers, strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: resolved(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): resolved(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [resolved(value) for value in config]
    if isinstance(config, set | frozenset):
        return sorted(resolved(value) for value in config)
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, str | int | float | bool):
        return config
    raise InputError(
        f"The configuration holds {config!r}, which JSON cannot; use numbers, strings, lists or dataclasses."
    )


def refuse_difference(before: Any, now: Any, *, where: str, free: frozenset[str] = frozenset()) -> None:
    """Raises InputError naming the keys that differ; `steps` may grow, and `free` keys may change."""
    old, new = dict(leaves(before)), dict(leaves(now))
    differing = []
    for key in sorted(old.keys() | new.keys()):
        leaf = key.rsplit(".", 1)[-1]
        a, b = old.get(key, "absent"), new.get(key, "absent")
        grown = leaf == "steps" and isinstance(a, int) and isinstance(b, int) and b >= a
        if a != b and not grown and not free.intersection(key.split(".")):
            differing.append(f"{key} (was {a!r}, is {b!r})")
    if differing:
        more = f" and {len(differing) - DIFFERENCES} more" if len(differing) > DIFFERENCES else ""
        raise InputError(
            f"{where} holds a run with another configuration: {', '.join(differing[:DIFFERENCES])}{more}; "
            "give the same values to go on with it, or name a new folder."
        )


# ---------------------------------------------------------------- lines


class _Lines:
    """A JSONL file of objects with a "step", appended and flushed line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; a line that a kill tore is dropped."""
        return read_lines(self.path)

    def rewind(self, step: int) -> None:
        self.close()
        if self.path.exists():
            kept = [json.dumps(row, ensure_ascii=False) for row in self.read() if row["step"] <= step]
            kept = list(
                dict.fromkeys(kept)
            )  # what the recipe logs before the first step comes again on every resume
            disk.write(self.path, "".join(f"{line}\n" for line in kept))

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


# ---------------------------------------------------------------- progress


class Progress:
    """How far a run is, its smoothed loss, pace, learning rate and memory, on standard error."""

    def __init__(self) -> None:
        self._display: Display | None = None
        self._loss = self._pace = math.nan
        self._paced = 0

    def update(
        self, step: int, steps: int, *, loss: float, items: int, seconds: float, lr: float, memory: int
    ) -> None:
        """`items` and `seconds` are of this step alone; `memory` is the most that was held so far, 0: unknown."""
        if self._display is None:
            self._display = Display("step", first=step, stays=True)
        elif items and seconds > 0:  # a first step is slower than those that follow
            self._paced += 1
            pace, keep = items / seconds, min(0.9, 1 - 1 / self._paced)
            self._pace = pace if self._paced == 1 else 1 / (keep / self._pace + (1 - keep) / pace)
        if math.isfinite(loss):
            self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        rate = "?" if math.isnan(self._pace) else f"{self._pace:.{0 if self._pace >= 100 else 1}f}"
        told = [f"loss {self._loss:.4g}", f"{rate} items/s", f"lr {lr:.2g}"]
        if memory:
            told.append(size(memory))
        self._display.show(step, steps, " · ".join(told), self.numbers | {"lr": lr, "memory": memory or None})

    @property
    def numbers(self) -> dict[str, float | None]:
        """Smoothed loss and items a second, as told last."""
        return {
            "loss": None if math.isnan(self._loss) else self._loss,
            "items_per_second": None if math.isnan(self._pace) else self._pace,
        }

    def say(self, text: str) -> None:
        if self._display is not None:
            self._display.say(text)
        else:
            say(text)

    def close(self) -> None:
        if self._display is not None:
            self._display.close()
        self._display, self._pace, self._paced = None, math.nan, 0
