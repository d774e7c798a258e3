"""What the bits of a run depend on besides its settings: the machine, and whether its kernels are deterministic."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reverie.train.parallel import team


def described(device: torch.device) -> dict[str, Any]:
    """The machine, in values that JSON can hold and that differ where results may differ in their last bits."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "arch": platform.machine(),
        "processes": team().count,
    }


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch takes deterministic kernels where it has them."""
    if not wanted:
        yield
        return
    memory: Any = torch.utils.deterministic  # a module with properties, which type checkers miss
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
