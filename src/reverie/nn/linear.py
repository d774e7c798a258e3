"""The linear layer, computed by the quickest equal way on this processor.

Two things that torch leaves to its libraries are mended on a CPU, without any state and with gradients:

- fp32 at few positions and many outputs: the library packs the whole weight before it multiplies, which is 4 to 29 %
  slower than a few hundred outputs at a time, and 7 % in a whole tower of 50 positions (one thread, AVX2, MKL).
- bf16 weights where the processor has no bf16 arithmetic: torch falls back to a loop that takes five to ten times as
  long as fp32. Here the weight widens to fp32 a part at a time, so that the part stays in the cache; sums are in fp32
  and only the result is rounded to bf16, which is also more exact. The weights take half the memory of fp32 and a call
  somewhat more time (`benchmarks/clip.py`). So may bf16 weights be used with fp32 signals, of which nothing is rounded.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

PART = 512  # outputs at a time
FEW = (24, 256)  # positions, from and below which fp32 is computed in parts
WIDE = 1536  # outputs from which it is


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware: AVX512-BF16, AMX, Arm BF16."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def widens(x: Tensor) -> bool:
    """Whether products with `x` are better done in fp32: bf16 on a CPU that has none, outside of autocast."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not cpu_has_bf16()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias for `... d`, `outputs d` and `outputs`, as `F.linear`; gives x's data type.

    The weight may be kept in less (bf16 beside x in fp32): where the device multiplies that, x is rounded to it.
    """
    # Shapes alone (planning) have no autocast of their own: the counter mixes their types.
    narrow = x.dtype != weight.dtype and not x.is_meta and not torch.is_autocast_enabled(x.device.type)
    if narrow and (x.device.type != "cpu" or (weight.dtype == torch.bfloat16 and cpu_has_bf16())):
        out = F.linear(x.to(weight.dtype), weight).to(x.dtype)
        return out if bias is None else out + bias.to(x.dtype)
    if narrow or widens(x):
        parts = weight.split(PART)
        biases = [None] * len(parts) if bias is None else bias.float().split(PART)
        wide = x.float()
        return torch.cat([F.linear(wide, w.float(), b) for w, b in zip(parts, biases, strict=True)], -1).to(x)
    outputs, positions = len(weight), x.numel() // x.shape[-1]
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")  # it keeps a weight that it rounded, but no part of one
        and outputs >= WIDE
        and FEW[0] <= positions < FEW[1]
    ):
        parts = weight.split(PART)
        biases = [None] * len(parts) if bias is None else bias.split(PART)
        return torch.cat([F.linear(x, w, b) for w, b in zip(parts, biases, strict=True)], -1)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` in name, weights and result, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PatchLinear(nn.Conv2d):
    """A convolution whose stride is its kernel, `b c (h p) (w p) -> b d h w`, computed as the matrix product it is."""

    def __init__(self, channels: int, width: int, patch: int, *, bias: bool = False):
        super().__init__(channels, width, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        p = self.kernel_size[0]
        x = x[..., : x.shape[-2] // p * p, : x.shape[-1] // p * p]  # as a convolution, only whole patches
        patches = rearrange(x, "b c (h ph) (w pw) -> b h w (c ph pw)", ph=p, pw=p)
        out = linear(patches, rearrange(self.weight, "d c ph pw -> d (c ph pw)"), self.bias)
        return rearrange(out, "b h w d -> b d h w")
