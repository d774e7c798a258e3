"""Linear layers in a quarter of the memory: weights in eight bits, one scale for each output.

    W ~ scale (int8), scale = max |W| of the row / 127

Products are in the precision of what comes in: the weight widens a part at a time, so that the part stays in the cache,
and the sums are scaled. On a CPU that takes as long as fp32 does; torch's own int8 products take 10 to 60 times as long
there (docs/systems/wan.md). Random weights give a result that is off by 0.4 % (uniform) to 0.8 % (Gaussian).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.linear import PART, Linear


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
        if x.device.type != "cpu":
            out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        else:
            wide = x.float()
            parts = zip(self.weight.split(PART), self.scale.split(PART), strict=True)
            out = torch.cat([F.linear(wide, part.float()) * scale for part, scale in parts], -1).to(x.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

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
