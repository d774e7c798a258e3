"""The run folder: everything one training run leaves behind, readable without Reverie.

    config.json         the resolved configuration
    metrics.jsonl       one object per logged step: {"step": 120, "loss": 2.31, ...}
    events.jsonl        skipped steps, with the reason and the sample ids
    bad_samples.jsonl   samples that could not be read and were replaced
    curves.png          the metrics drawn
    samples/            grids at fixed prompts and noise, by step
    checkpoints/        step-00000100/...

A resumed run drops the lines beyond the step it resumes from, since these steps run again; so no step appears
twice.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from reverie import disk
from reverie.errors import InputError
from reverie.progress import Display
from reverie.train.parallel import team

DIFFERENCES = 5  # so many are named
FREE = (
    "save_every",
    "keep",
    "log_every",
    "eval_every",
    "sample_every",
    "prefetch",
    "device",
    "estimate",
    "track",
    "out",
)
"""Configuration keys that may change when a run resumes, since no result depends on them."""


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
            _draw(self.metrics(), self.folder / "curves.png", title=self.folder.name)

    def say(self, text: str) -> None:
        """One line to the person who watches, beside the progress."""
        if self._progress is not None:
            self._progress.say(text)

    # ------------------------------------------------------------ for the loop

    def open(self) -> None:
        """Locks the folder against a second trainer; the lock dies with the process."""
        if not self.writes:
            return
        try:
            import fcntl
        except ImportError:  # Windows has no flock
            return
        handle = (self.folder / ".lock").open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            raise InputError(
                f"{self.folder} is in use by another training process; wait for it or name another."
            ) from error
        self._lock = handle

    def check(self) -> None:
        """Raises InputError when the folder's config.json differs from this run's configuration."""
        path = self.folder / "config.json"
        if path.exists():
            try:
                before = json.loads(path.read_text())
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
        disk.write(path, json.dumps(self.config, indent=1, sort_keys=True) + "\n")
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

    def progress(self, step: int, steps: int, *, loss: float, items: int) -> None:
        """Tells the person who watches that `step` of `steps` is done."""
        if self._progress is not None:
            self._progress.update(step, steps, loss=loss, items=items)

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
    old, new = dict(_leaves(before)), dict(_leaves(now))
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


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


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
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

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
    """How far a run is, its smoothed loss and its pace, on standard error."""

    def __init__(self) -> None:
        self._display: Display | None = None
        self._items = 0
        self._loss = math.nan

    def update(self, step: int, steps: int, *, loss: float, items: int) -> None:
        if self._display is None:
            self._display = Display("step", first=step, stays=True)
        else:
            self._items += items
        if math.isfinite(loss):
            self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        rate = f"{self._items / self._display.seconds:.1f}" if self._items else "?"
        self._display.show(step, steps, f"loss {self._loss:.4g} · {rate} items/s")

    def say(self, text: str) -> None:
        if self._display is not None:
            self._display.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._display is not None:
            self._display.close()
        self._display, self._items = None, 0


# ---------------------------------------------------------------- curves


def _series(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                xs, ys = series.setdefault(name, ([], []))
                xs.append(row["step"])
                ys.append(float(value))
    return series


def _smooth(values: list[float]) -> list[float]:
    """A running mean with a memory of about 2 % of the series, without the pull of a zero start."""
    keep = max(0.0, 1 - 50 / len(values)) if len(values) > 50 else 0.0
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    series = _series(rows)
    if not series:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for name in series:
        panels.setdefault(re.sub(r"^val[_/]", "", name), []).append(name)
    order = sorted(
        panels, key=lambda base: (base != "loss", "loss" not in base, base in ("lr", "grad_norm"), base)
    )
    columns = min(3, len(order))
    lines = math.ceil(len(order) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for at, base in enumerate(order):
        axes = figure.add_subplot(lines, columns, at + 1)
        axes.set_title(base, fontsize=10)
        axes.grid(alpha=0.25)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        values = [y for name in panels[base] for y in series[name][1]]
        if "loss" in base and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        for name in sorted(panels[base]):
            xs, ys = series[name]
            validation = name.startswith(("val_", "val/"))
            colour = "tab:orange" if validation else "tab:blue"
            if validation or len(xs) < 60 or base.endswith("lr"):
                axes.plot(
                    xs, ys, color=colour, marker=None if len(xs) >= 60 else "o", markersize=3, label=name
                )
            else:
                axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.7)
                axes.plot(xs, _smooth(ys), color=colour, linewidth=1.6, label=f"{name} (smoothed)")
        if len(panels[base]) > 1:
            axes.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    disk.write(path, drawn.getvalue())
