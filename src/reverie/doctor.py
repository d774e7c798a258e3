"""What machine this is, what is installed, what is missing and how to get it: `reverie doctor`.

Every finding is one line: `ok`, `--` (optional and absent, with the command that adds it) or `!!` (a problem, with the
remedy). It must work on a broken installation, so nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata as metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SHIPPED = Path(__file__).parent / "weights" / "shipped"
SUMS = "SHA256SUMS"
MEMORY = 2 * 2**30
DISK = 2 * 2**30
LARGE = "wan2.1-t2v-1.3b"
SPARE = 2**30  # beside the weights: a picture's or a short clip's activations
IMPORTS = {"pillow": "PIL", "resvg-py": "resvg_py", "faiss-cpu": "faiss"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "--", "!!"]
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state}  {self.what}" + (f"\n      -> {self.remedy}" if self.remedy else "")


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the report."""
    yield from machine()
    yield from installed()
    yield from accelerators()
    yield from shipped()
    yield from large()


def machine() -> Iterator[Finding]:
    """Python, processor, memory and disk."""
    python = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 11)
    yield Finding(
        state="ok" if fine else "!!",
        what=f"Python {python} at {sys.executable} ({platform.system()} {platform.machine()})",
        remedy="" if fine else "install Python 3.11 or newer and make the environment again",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(state="ok", what=f"processor: {_processor()}, {cores} cores for this process")
    total, free = _memory()
    if total is not None and free is not None:
        enough = free >= MEMORY
        yield Finding(
            state="ok" if enough else "!!",
            what=f"memory: {_gib(free)} free of {_gib(total)}",
            remedy=""
            if enough
            else f"the demo and the tiny recipes need {_gib(MEMORY)}: close other programs",
        )
    disk = shutil.disk_usage(Path.cwd()).free
    roomy = disk >= DISK
    yield Finding(
        state="ok" if roomy else "!!",
        what=f"disk: {_gib(disk)} free in {Path.cwd()}",
        remedy=""
        if roomy
        else f"runs and corpora need about {_gib(DISK)}: free some space or work in another folder",
    )


def installed() -> Iterator[Finding]:
    """Each direct dependency against its floor; then each extra."""
    needs = requirements()
    if not needs:
        yield Finding(
            state="!!",
            what="reverie is not installed",
            remedy="run `make demo` or `make test` in the checkout",
        )
    extras: dict[str, list[Need]] = {}
    for need in needs:
        if need.extra is None:
            yield _check(need, "!!")
        elif need.extra in ("video", "track", "stickers", "index", "remote", "ray", "interop"):
            extras.setdefault(need.extra, []).append(need)
    for extra, members in extras.items():
        for need in members:
            found = _check(need, "--")
            yield Finding(state=found.state, what=f"extra {extra}: {found.what}", remedy=found.remedy)


@dataclass(frozen=True, kw_only=True)
class Need:
    """One requirement of the package: `extra` is None for the base; `floor` is "" where none is set."""

    name: str
    floor: str
    extra: str | None


def requirements() -> list[Need]:
    """What the installed package says it needs; empty when it is not installed."""
    try:
        lines = metadata.requires("reverie") or []
    except metadata.PackageNotFoundError:
        return []
    needs = []
    for line in lines:
        found = re.match(
            r"""([\w.-]+)(?:\[.*?\])?(?:>=([\w.]+))?[^;]*(?:;.*extra\s*==\s*['"](\w+)['"])?""", line
        )
        assert found, f"cannot read the requirement {line!r}"
        needs.append(Need(name=found[1], floor=found[2] or "", extra=found[3]))
    return needs


def accelerators() -> Iterator[Finding]:
    """What torch can compute with, and whether bf16 is native."""
    try:
        import torch

        from reverie.train.precision import native_bf16
    except Exception:  # the import itself has been reported by `installed`
        return
    bf16 = native_bf16(torch.device("cpu"))
    yield Finding(
        state="ok",
        what=f"bf16 on the processor: {'native; training uses it' if bf16 else 'not native; training runs in fp32'}",
    )
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            yield Finding(state="ok", what=f"GPU {number}: {device.name}, {_gib(device.total_memory)}")
    elif torch.backends.mps.is_available():
        yield Finding(state="ok", what="GPU: Apple Metal, used only where --device mps asks for it (untried)")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            state="!!",
            what=f"this machine has NVIDIA's driver, but torch {torch.__version__} cannot use its GPU",
            remedy=f'{sys.executable} -m pip install --force-reinstall "torch==={torch.__version__.split("+")[0]}"',
        )
    else:
        yield Finding(state="ok", what="no GPU: everything runs on the processor")


def shipped(folder: Path = SHIPPED) -> Iterator[Finding]:
    """Each file of the shipped weights against its SHA-256."""
    remedy = "fetch the repository again (`git checkout -- src/reverie/weights/shipped`)"
    try:
        lines = (folder / SUMS).read_text("utf-8").splitlines()
    except OSError:
        yield Finding(state="!!", what=f"shipped weights: {folder / SUMS} is missing", remedy=remedy)
        return
    bad: list[str] = []
    sizes: dict[str, int] = {}
    for line in lines:
        expected, name = line.split(maxsplit=1)
        path = folder / name.lstrip("*")
        try:
            content = path.read_bytes()
        except OSError:
            bad.append(f"{name} is missing")
            continue
        if hashlib.sha256(content).hexdigest() != expected:
            bad.append(f"{name} is damaged")
        system = Path(name).parts[0]
        sizes[system] = sizes.get(system, 0) + len(content)
    for system, size in sizes.items():
        wrong = [text for text in bad if text.startswith(f"{system}/")]
        if not wrong:
            yield Finding(state="ok", what=f"shipped weights: {system}, {size / 2**20:.1f} MiB, hashes right")
    for text in bad:
        yield Finding(state="!!", what=f"shipped weights: {text}", remedy=remedy)


def large() -> Iterator[Finding]:
    """What memory the large public model needs, counted on its shapes, and whether this machine has it."""
    try:
        import torch

        from reverie.encoders.umt5 import sizes
        from reverie.nn.quantised import repeated
        from reverie.systems.wan import MODELS, Wan
    except Exception:  # the import itself has been reported by `installed`
        return
    with torch.device("meta"):
        wan = Wan(MODELS[LARGE])
    weights = sum(tensor.numel() for tensor in wan.state_dict().values())
    layers = sum(module.weight.numel() for module in wan.modules() if isinstance(module, torch.nn.Linear))
    blocks = sum(module.weight.numel() for module in repeated(wan).values())
    words = sizes()
    needs = {
        "fp32": (4 * weights, 4 * sum(words)),
        "bf16": (4 * weights - 2 * layers, 2 * sum(words)),
        "int8": (4 * weights - 2 * layers - blocks, words[0] + 2 * words[1]),
    }
    _, free = _memory()
    fits = [name for name, (model, _) in needs.items() if free is not None and model + SPARE <= free]
    reads = [name for name, (_, encoder) in needs.items() if free is not None and encoder + SPARE <= free]
    listed = ", ".join(
        f"{name} {_gib(model)} and {_gib(encoder)}" for name, (model, encoder) in needs.items()
    )
    what = f"{LARGE}, weights in memory (model, text encoder, one after the other): {listed}"
    if free is None:
        yield Finding(state="ok", what=what)
        return
    said = f"; free now for: model {_some(fits)}, text encoder {_some(reads)}"
    remedy = ""
    if not fits:
        remedy = "close other programs, or use a machine with more memory"
    elif not reads:
        remedy = (
            "the text encoder does not fit: compute the features elsewhere and give them in place of prompts"
        )
    yield Finding(state="--" if remedy else "ok", what=what + said, remedy=remedy)


def _some(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _check(need: Need, absent: Literal["!!", "--"]) -> Finding:
    wanted = f"{need.name}>={need.floor}" if need.floor else need.name
    remedy = f'{sys.executable} -m pip install "{wanted}"'
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Finding(state=absent, what=f"{need.name} is not installed", remedy=remedy)
    if need.floor and _numbers(version) < _numbers(need.floor):
        return Finding(state="!!", what=f"{need.name} {version} is older than {need.floor}", remedy=remedy)
    try:
        importlib.import_module(IMPORTS.get(need.name, need.name))
    except Exception as error:  # a broken library may raise anything
        return Finding(
            state="!!",
            what=f"{need.name} {version} does not import ({type(error).__name__}: {error})",
            remedy=f'{sys.executable} -m pip install --force-reinstall "{need.name}=={version.split("+")[0]}"',
        )
    return Finding(state="ok", what=f"{need.name} {version}")


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version: enough to compare with a floor."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _memory() -> tuple[int | None, int | None]:
    """Total and free bytes, within the control group's limit where there is one."""
    try:
        table = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
        total, free = int(table["MemTotal"]) * 1024, int(table["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return None, None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return total, free


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
