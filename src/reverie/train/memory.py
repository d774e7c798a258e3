"""What the machine says of its memory, in bytes: what this process held and holds, what it could hold, what it may.

On a CPU it is that of the whole process, on a GPU what torch has allocated there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from reverie.errors import InputError
from reverie.progress import bytes_of

TIGHT = 0.9  # of what is free: a plan beyond it says so, and what is chosen stays below
MACHINES = {"laptop": 8e9, "workstation": 32e9, "server": 128e9}
OURS = 0.75  # of a machine that is named, which has a system and other programs


def budget(memory: str, device: torch.device) -> int:
    """Bytes of a size ("6GB"), of "free", or of a laptop, workstation or server. InputError: something else."""
    if memory == "free":
        free = available(device)
        if free is None:
            raise InputError(
                "memory is 'free', but this system does not say what is: give a size such as 6GB."
            )
        return int(TIGHT * free)
    if memory in MACHINES:
        return int(OURS * MACHINES[memory])
    try:
        return bytes_of(memory)
    except InputError:
        raise InputError(
            f"memory is {memory!r}: give a size such as 6GB, or {', '.join(('free', *MACHINES))}."
        ) from None


def peak(device: torch.device) -> int:
    """The most memory this process has held so far, on the device or, on a CPU, altogether; 0: nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (high := _line("VmHWM")) is not None:  # the number below is the parent's, if that was larger
        return high
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held(device: torch.device) -> int:
    """What this process holds now; 0: nobody says."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _line("VmRSS") or 0


def available(device: torch.device, *, swap: bool = False) -> int | None:
    """What this process could hold: what is free, with swap if asked, within its limits, and what it holds already.

    Processes that torchrun started on one machine share what is free on its CPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo, held = Path("/proc/meminfo"), _line("VmRSS")
    if held is None or not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = sum(int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "SwapFree")[: 1 + swap])
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)  # `ulimit -v`, which counts what is only reserved, too
    asked = [] if most == resource.RLIM_INFINITY else [max(0, most - (_line("VmSize") or 0))]
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return held + min([min([free, *rooms()]) // sharing, *asked])


def rooms(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each cgroup around this process leaves it, as containers and batch systems limit it."""
    if not groups.exists():
        return
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names, cache = root / "memory", ("limit_in_bytes", "usage_in_bytes"), "total_inactive_file"
        elif not controllers:
            top, names, cache = root, ("max", "current"), "inactive_file"
        else:
            continue
        own = top / path.strip("/")
        for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            try:
                most, used = ((folder / f"memory.{name}").read_text().strip() for name in names)
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the root has none, and a container may not show its own
                continue
            if most != "max":
                yield max(0, int(most) - int(used) + int(stat.get(cache, 0)))


def _line(key: str) -> int | None:
    """A line of this process's status on Linux, in bytes."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
