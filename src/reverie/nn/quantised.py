"""Linear layers in a quarter of the memory: weights in eight bits, one scale for each output.

    W ~ scale (int8), scale = max |W| of the row / 127

Products are in the precision of what comes in: the weight widens a part at a time, so that the part stays in the cache,
and the sums are scaled. On a CPU that takes as long as fp32 does; torch's own products of two int8 matrices take 10 to
60 times as long there (docs/systems/wan.md). Random weights give a result that is off by 0.4 % (uniform) to 0.8 %
(Gaussian). A few positions at a time, as a sequence is written, are bound by reading the weights: on a CPU that has
bf16 they are rounded to it, and torch multiplies the weights as they lie, 8 to 30 times as quick as widening, off by
0.5 % in place of 0.4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.linear import PART, Linear, cpu_has_bf16

FEW = 16  # positions


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`outputs inputs` -> int8 and the scale of each output, float32; a part at a time, which takes little memory."""
    small = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), device=weight.device)
    for part, out, size in zip(weight.split(PART), small.split(PART), scale.split(PART), strict=True):
        size.copy_(part.abs().amax(1).float().clamp(min=torch.finfo(torch.float32).tiny) / 127)
        out.copy_((part.float() / size[:, None]).round_())
    return small, scale


class Int8Linear(nn.Module):
    """A linear layer that keeps `weight` as int8 and `scale`; gradients flow to what comes in, not to these."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """The same layer in eight bits."""
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(*to_int8(layer.weight.detach()), bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._few(x):
            rows = x.reshape(-1, self.in_features).bfloat16()
            ones = torch.ones(self.out_features, dtype=torch.bfloat16)
            out = torch.ops.aten._weight_int8pack_mm(rows, self.weight, ones).float() * self.scale
            out = out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)
            return out if self.bias is None else out + self.bias.to(out.dtype)
        if x.device.type != "cpu":
            out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        else:
            wide = x.float()
            parts = zip(self.weight.split(PART), self.scale.split(PART), strict=True)
            out = torch.cat([F.linear(wide, part.float()) * scale for part, scale in parts], -1).to(x.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _few(self, x: Tensor) -> bool:
        """Whether these positions are so few that the weights are better not widened."""
        few = x.numel() <= FEW * self.in_features and self.in_features % 32 == self.out_features % 32 == 0
        return (
            few
            and x.device.type == "cpu"
            and cpu_has_bf16()
            and hasattr(torch.ops.aten, "_weight_int8pack_mm")
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def repeated(system: nn.Module) -> dict[str, nn.Linear]:
    """By name, the linear layers that are worth it: those of the blocks that a network repeats."""
    lists = tuple(f"{name}." for name, module in system.named_modules() if isinstance(module, nn.ModuleList))
    return {
        name: module
        for name, module in system.named_modules()
        if isinstance(module, Linear) and name.startswith(lists)
    }


def replace(system: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of that name."""
    parent, _, child = name.rpartition(".")
    setattr(system.get_submodule(parent), child, layer)
