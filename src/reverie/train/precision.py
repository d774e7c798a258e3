"""Which number format the forward pass runs in: fp32, or bf16 autocast where the processor has it natively.

bf16 keeps fp32's range, so no loss scaling is needed; weights, optimizer and EMA stay in fp32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from reverie.errors import InputError
from reverie.nn.linear import cpu_has_bf16


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware: AVX512-BF16, AMX, Arm BF16, NVIDIA since Ampere."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return cpu_has_bf16()
    return False


def resolve(precision: str, device: torch.device) -> str:
    """ "auto" -> "bf16" or "fp32" by what `device` has; the others stay."""
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"precision is {precision!r}; choose auto, fp32 or bf16.")
    if precision == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context for one forward pass in a resolved precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
