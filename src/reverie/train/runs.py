"""Run folders read back, for `reverie runs`: how far each is and how it goes, two beside each other.

Nothing is written, and no lock is held: a folder's lock is looked at for a moment, which a trainer that starts at that
moment waits for. A run in which a trainer lives is "running"; one whose status.json says so and in which none lives
was killed. torch is not needed.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from reverie.errors import InputError
from reverie.progress import duration, size
from reverie.train.curves import ordered, series

LOCK = ".lock"  # held by the trainer for as long as it lives
DEEP = 4  # folders below the first in which runs are looked for
SILENT = 600.0  # seconds without a sign of life, after which a run on another machine counts as dead
SHOWN = 2  # measurements in a row of the list
REASON = 160  # letters of a reason below it


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run folder says. `state`: running, finished, stopped or failed; `changed`: its last sign of life, in
    seconds since 1970; `seconds_left`: of a run that is running; `loss`: the last that was logged; `measured`: the last
    of each metric that is no training step's, with its step; `bytes`: on the disk."""

    name: str
    folder: str
    recipe: str | None
    state: str
    reason: str
    step: int
    steps: int | None
    started: str | None
    changed: float
    seconds_left: float | None
    loss: float | None
    measured: dict[str, dict[str, float]]
    bytes: int


def is_run(folder: Path) -> bool:
    """Whether a training run made this folder, or left its log there."""
    begun = any((folder / name).is_file() for name in ("config.json", "command.json", "status.json"))
    return begun and ((folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file())


def find(root: Path) -> list[Path]:
    """The runs in `root` and below, by name. InputError: there is no such folder."""
    if not root.is_dir():
        raise InputError(f"There is no folder {root}: name the one that holds your runs.")
    return sorted(_below(root, DEEP))


def _below(folder: Path, deep: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    try:
        inside = [Path(e) for e in os.scandir(folder) if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
    except OSError:  # it vanished, or is not ours to read
        return
    if deep:
        for path in inside:
            yield from _below(path, deep - 1)


def named(word: str, *, runs: Path = Path("runs")) -> Path:
    """The run of a path, or of a name below `runs`. InputError: it is none."""
    for folder in (Path(word), runs / word):
        if is_run(folder):
            return folder
    raise InputError(f"{word} is no run's folder: `reverie runs` lists the runs below {runs}.")


def labels(folders: Sequence[Path]) -> list[str]:
    """Short names that differ: the folders' own, or their paths."""
    own = [folder.resolve().name for folder in folders]
    return own if len(set(own)) == len(own) else [str(folder) for folder in folders]


def locked(folder: Path) -> bool:
    """Whether a trainer of this machine lives in the folder."""
    try:
        import fcntl

        with (folder / LOCK).open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back as the file closes
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # Windows has no such lock; a run that never began has no file
        return False
    return False


# ---------------------------------------------------------------- one run


def read(folder: Path, *, name: str | None = None) -> Record:
    """What `folder` says now."""
    alive = locked(folder)
    rows = read_lines(folder / "metrics.jsonl")
    command, status = read_json(folder / "command.json"), read_json(folder / "status.json")
    config = read_json(folder / "config.json")
    logged = max((row["step"] for row in rows), default=0)
    step = max(status.get("step", 0), logged) if alive else status.get("step", logged)
    steps = status.get("steps", config.get("steps"))
    changed = max(
        _changed(folder / file) for file in ("status.json", "metrics.jsonl", "config.json", "command.json")
    )
    state, reason = _state(status, alive=alive, silent=time.time() - changed, step=step, steps=steps)
    if state == "finished" and command and not (folder / "model").is_dir():
        saving = status.get("host") == platform.node() and _lives(status.get("process"))
        state = "running" if saving else "failed"
        reason = "" if saving else "killed before its model was saved; the same command goes on"
    found, training = series(rows), trained(rows)
    return Record(
        name=name or folder.resolve().name,
        folder=str(folder),
        recipe=command.get("recipe"),
        state=state,
        reason=reason,
        step=step,
        steps=steps if isinstance(steps, int) else None,
        started=command.get("started", status.get("since")),
        changed=changed,
        seconds_left=status.get("seconds_left") if state == "running" else None,
        loss=found["loss"][1][-1] if "loss" in found else None,
        measured={
            metric: {"step": found[metric][0][-1], "value": found[metric][1][-1]}
            for metric in ordered(set(found) - training)
        },
        bytes=disk_usage(folder),
    )  # fmt: skip


def _state(
    status: Mapping[str, Any], *, alive: bool, silent: float, step: int, steps: int | None
) -> tuple[str, str]:
    state, reason = status.get("state"), str(status.get("reason", ""))
    if alive:
        return "running", ""
    if state == "running":
        host = status.get("host")
        if host != platform.node() and silent < SILENT:  # its lock is not seen from here
            return "running", f"on {host}"
        return "failed", f"killed, or the machine went down, after step {step}"
    if state in ("finished", "stopped", "failed"):
        return str(state), reason
    if steps is not None and step >= steps:
        return "finished", ""
    return "stopped", "it left no status"


def _lives(process: Any) -> bool:
    """Whether there is a process of this number here."""
    try:
        os.kill(process, 0)
    except (OSError, TypeError):
        return False
    return True


def trained(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The metrics of training steps: those that are logged with a learning rate."""
    return {name for row in rows if any(key.rsplit("/", 1)[-1] == "lr" for key in row) for name in row}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSONL file whose objects have a "step"; one that a kill tore is dropped."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of a nested configuration with its dotted name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder; empty where there is none, or no whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def disk_usage(folder: Path) -> int:
    """The bytes of all files below; those that vanish meanwhile count for nothing."""
    total = 0
    for where, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(where, file)).st_size
            except OSError:
                continue
    return total


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def details(folder: Path) -> dict[str, Any]:
    """Besides the record: command, configuration, resources, each metric's last and best, events, files."""
    rows, events = read_lines(folder / "metrics.jsonl"), read_lines(folder / "events.jsonl")
    kinds: dict[str, int] = {}
    for event in events:
        kinds[str(event.get("event"))] = kinds.get(str(event.get("event")), 0) + 1
    found = series(rows)
    return {
        "command": read_json(folder / "command.json"),
        "config": read_json(folder / "config.json"),
        "status": read_json(folder / "status.json"),
        "resources": read_json(folder / "resources.json"),
        "metrics": {
            name: {"step": xs[-1], "last": ys[-1], "lowest": min(ys), "highest": max(ys)}
            for name, (xs, ys) in ((name, found[name]) for name in ordered(found))
        },
        "events": kinds,
        "bad_samples": len(read_lines(folder / "bad_samples.jsonl")),
        "checkpoints": [path.name for path in sorted((folder / "checkpoints").glob("step-*"))],
        "samples": len([*(folder / "samples").glob("*")]),
        "evidence": [path.name for path in sorted((folder / "evidence").glob("step-*"))],
        "model": str(folder / "model") if (folder / "model").is_dir() else None,
    }


# ---------------------------------------------------------------- several


def differences(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Configuration values that differ: key -> run -> value, null where it is absent; first what was commanded."""
    found: dict[str, dict[str, Any]] = {}
    for run, folder in folders.items():
        command = read_json(folder / "command.json")
        told = {key: command[key] for key in ("recipe", "data", "version") if key in command}
        for key, value in (*told.items(), *leaves(read_json(folder / "config.json"))):
            found.setdefault(key, {})[run] = value
    return {
        key: {run: values.get(run) for run in folders}
        for key, values in found.items()
        if len({json.dumps(values.get(run), sort_keys=True) for run in folders}) > 1
    }


@dataclass(frozen=True, kw_only=True)
class Shared:
    """One metric of several runs at the same steps; `means`: each value is the mean since the step above."""

    metric: str
    steps: list[int]
    values: dict[str, list[float]]
    means: bool


def side_by_side(
    folders: Mapping[str, Path], *, metrics: Sequence[str] = (), rows: int | None = None
) -> list[Shared]:
    """What the runs logged at steps that all of them have; at `rows` steps or so, if given, evenly and with the last.

    A metric that not all of them have is left out; one without a step in common has no steps.
    """
    found = {run: series(read_lines(folder / "metrics.jsonl")) for run, folder in folders.items()}
    names = set.intersection(*map(set, found.values()))
    out = []
    for metric in ordered(names if not metrics else names & set(metrics)):
        points = {run: dict(zip(*each[metric], strict=True)) for run, each in found.items()}
        steps = sorted(set.intersection(*map(set, points.values())))
        means = rows is not None and len(steps) > 2 * rows
        count = rows if rows and means else len(steps)
        ends = [round(i * len(steps) / max(count, 1)) for i in range(count + 1)]
        spans = [*pairwise(ends)]
        values = {
            run: [sum(known[step] for step in steps[a:b]) / (b - a) for a, b in spans]
            for run, known in points.items()
        }
        out.append(Shared(metric=metric, steps=[steps[b - 1] for _, b in spans], values=values, means=means))
    return out


# ---------------------------------------------------------------- as text


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> str:
    """Aligned columns; those in `right` to the right."""
    every = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)
        ).rstrip()
        for row in every
    )


def listing(records: Sequence[Record]) -> str:
    """The list as text: a row to each, and a line to each that did not end as it should."""
    rows = []
    for each in records:
        some = [f"{name} {number(value['value'])}" for name, value in each.measured.items()]
        more = f" +{len(some) - SHOWN}" if len(some) > SHOWN else ""
        rows.append(
            [
                each.name,
                each.recipe or "",
                f"{each.step:,}{'' if each.steps is None else f'/{each.steps:,}'}",
                each.state,
                number(each.loss),
                ", ".join(some[:SHOWN]) + more,
                when(each),
                size(each.bytes),
            ]
        )
    head = ("run", "recipe", "step", "state", "loss", "measured", "age", "on disk")
    text = table(head, rows, right=frozenset((2, 4, 7)))
    troubled = [f"{each.name}: {_short(each.reason, REASON)}" for each in records if each.reason]
    return "\n".join([text, *([""] if troubled else []), *troubled])


def showing(record: Record, more: Mapping[str, Any]) -> str:
    """One run as text."""
    command, resources = more["command"], more["resources"]
    of = "" if record.steps is None else f" of {record.steps:,}"
    lines = {
        "run": record.folder,
        "recipe": record.recipe,
        "data": command.get("data"),
        "state": record.state + (f": {record.reason}" if record.reason else ""),
        "step": f"{record.step:,}{of}, {when(record)}",
        "started": _started(record, command),
        "time": _resources(resources),
        "events": ", ".join(f"{count} {kind}" for kind, count in more["events"].items()),
        "bad samples": str(more["bad_samples"] or ""),
        "evidence": ", ".join(more["evidence"]),
        "checkpoints": ", ".join(more["checkpoints"]),
        "model": more["model"],
        "on disk": size(record.bytes),
    }
    text = "\n".join(f"{name:12} {told}" for name, told in lines.items() if told)
    rows = [
        [name, f"{each['step']:,}", *(number(each[key]) for key in ("last", "lowest", "highest"))]
        for name, each in more["metrics"].items()
    ]
    head = ("metric", "step", "last", "lowest", "highest")
    return f"{text}\n\n{table(head, rows, right=frozenset((1, 2, 3, 4)))}" if rows else text


def _started(record: Record, command: Mapping[str, Any]) -> str:
    again = len(command.get("resumed", ()))
    if not record.started:
        return ""
    told = datetime.fromisoformat(record.started).astimezone().strftime("%Y-%m-%d %H:%M")
    return told + (f", and {again} time{'s' * (again != 1)} again" if again else "")


def _resources(resources: Mapping[str, Any]) -> str:
    if not resources:
        return ""
    said, used = resources["said"], resources["used"]
    most = "at most " if used["memory_is_at_most"] else ""
    text = f"{number(used['step_seconds'])} s a step, {most}{size(used['memory'])} of memory"
    if said:
        text += f" (said: {number(said['step_seconds'])} s, {size(said['memory'])})"
    return "; ".join([text, *resources["missed"]])


def comparison(
    folders: Mapping[str, Path], changed: Mapping[str, Mapping[str, Any]], shared: Sequence[Shared]
) -> str:
    """The comparison as text."""
    rows = [
        [key, *("absent" if v is None else _short(v) for v in each.values())] for key, each in changed.items()
    ]
    parts = [
        table(("differs", *folders), rows, right=frozenset())
        if rows
        else "No value of their configurations differs."
    ]
    for each in shared:
        if not each.steps:
            parts.append(f"{each.metric}: no step in common")
            continue
        head = (f"{each.metric}{', mean up to step' if each.means else ', at step'}", *folders)
        rows = [
            [f"{step:,}", *(number(values[i]) for values in each.values.values())]
            for i, step in enumerate(each.steps)
        ]
        parts.append(table(head, rows, right=frozenset(range(len(head)))))
    return "\n\n".join(parts)


def _short(value: Any, most: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def number(value: float | None) -> str:
    """Four digits that count; "" for none."""
    return "" if value is None else f"{value:.4g}"


def when(record: Record) -> str:
    """ "12 min left" of what runs, "3.5 h ago" of what does not."""
    if record.seconds_left is not None:
        return f"{duration(record.seconds_left)} left"
    return f"{duration(max(0.0, time.time() - record.changed))} ago"
