"""Metrics as pictures: one run's `curves.png`, and several runs on one sheet, a panel to each metric.

Rows are objects {"step": 120, "loss": 2.31, ...}, as in metrics.jsonl.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie import disk
from reverie.errors import InputError

Rows = Sequence[Mapping[str, Any]]
FEW = 30  # points, below which each has a dot
MANY = 60  # points, from which on a series is smoothed
INK = ("#4269d0", "#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#a87700", "#5c5f66")
DASHES = ("-", "--", ":", "-.")  # when the inks have run out


def series(rows: Rows) -> dict[str, tuple[list[int], list[float]]]:
    """Metric -> its steps and its values; what is null is left out."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                xs, ys = found.setdefault(name, ([], []))
                xs.append(row["step"])
                ys.append(float(value))
    return found


def ordered(names: Iterable[str]) -> list[str]:
    """Loss first, then its parts and measurements, the optimizer's last."""
    return sorted(
        names, key=lambda name: (name.endswith(("lr", "grad_norm")), name != "loss", "loss" not in name, name)
    )


def draw(rows: Rows, path: Path, *, title: str) -> None:
    """One run: each series raw and smoothed, validation over training."""
    found = series(rows)
    if not found:
        return
    panels: dict[str, list[str]] = {}
    for name in found:
        panels.setdefault(re.sub(r"^val[_/]", "", name), []).append(name)
    figure, cells = _figure(len(panels), title)
    for base, axes in zip(ordered(panels), cells, strict=True):
        _panel(axes, base, [found[name][1] for name in panels[base]])
        for name in sorted(panels[base]):
            validation = name.startswith(("val_", "val/"))
            smoothed = _line(
                axes,
                *found[name],
                colour="tab:orange" if validation else "tab:blue",
                label=name,
                smooth=not validation,
            )
            if smoothed:
                axes.lines[-1].set_label(f"{name} (smoothed)")
        if len(panels[base]) > 1:
            axes.legend(fontsize=8)
    _save(figure, path)


def sheet(runs: Mapping[str, Rows], path: Path, *, metrics: Sequence[str] = ()) -> list[str]:
    """Several runs on one sheet: a panel to each metric, a colour to each run; gives the metrics that were drawn.

    `metrics`: only these; all that any run has if none are named. Nothing is drawn where nothing is there.
    """
    found = {name: series(rows) for name, rows in runs.items()}
    there = ordered({metric for each in found.values() for metric in each})
    shown = [metric for metric in there if not metrics or metric in metrics]
    if not shown:
        return []
    last = max(each[metric][0][-1] for metric in shown for each in found.values() if metric in each) or 1
    figure, cells = _figure(len(shown), "")
    for metric, axes in zip(shown, cells, strict=True):
        _panel(axes, metric, [each[metric][1] for each in found.values() if metric in each])
        axes.set_xlim(-0.03 * last, 1.03 * last)  # one scale for all panels
        for at, each in enumerate(found.values()):
            if metric in each:
                _line(axes, *each[metric], colour=INK[at % len(INK)], label="", smooth=True, dash=_dash(at))
                axes.lines[-1].set_linewidth(max(1.2, 2.4 - 0.4 * at))  # those that coincide are seen
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=INK[at % len(INK)],
            linestyle=_dash(at),
            linewidth=2,
            label=name if each else f"{name} (no log)",
        )
        for at, (name, each) in enumerate(found.items())
    ]
    across = max(1, min(len(handles), int(figure.get_figwidth() * 11 / (max(map(len, found)) + 14))))
    figure.legend(handles=handles, loc="outside upper center", ncols=across, frameon=False, fontsize=10)
    _save(figure, path)
    return shown


def _dash(at: int) -> Any:
    return DASHES[at // len(INK) % len(DASHES)]


def _figure(panels: int, title: str) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if panels == 4 else min(3, panels)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure, [figure.add_subplot(lines, columns, at + 1) for at in range(panels)]


def _panel(axes: Any, title: str, values: list[list[float]]) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    low, high = min(map(min, values)), max(map(max, values))
    if "loss" in title and low > 0 and high > 20 * low:
        axes.set_yscale("log")


def _line(
    axes: Any, xs: list[int], ys: list[float], *, colour: str, label: str, smooth: bool, dash: str = "-"
) -> bool:
    """Draws a series, and whether it was smoothed: few points and schedules are drawn as they are."""
    many = len(xs) >= MANY
    if not (smooth and many) or axes.get_title().endswith("lr"):
        marker = "o" if len(xs) < FEW else None
        axes.plot(xs, ys, color=colour, marker=marker, markersize=3, label=label, linestyle=dash)
        return False
    axes.plot(xs, ys, color=colour, alpha=0.2, linewidth=0.7)
    axes.plot(xs, _smooth(ys), color=colour, linewidth=1.6, label=label, linestyle=dash)
    return True


def _smooth(values: list[float]) -> list[float]:
    """A running mean with a memory of about 2 % of the series, without the pull of a zero start."""
    keep = max(0.0, 1 - 50 / len(values)) if len(values) > 50 else 0.0
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _save(figure: Any, path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} would be a PNG: give a name that ends in .png.")
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font lacks
        figure.savefig(drawn, dpi=110, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, drawn.getvalue())
