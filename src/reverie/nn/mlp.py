"""The feed-forward half of a block, and its activations by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.linear import Linear


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation in CLIP; written through SiLU, which is the same and quicker."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class GeluTanh(nn.Module):
    """GELU by its tanh formula, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    That is x sigmoid(x g) with g = A + B x^2. On a CPU in fp32 it is computed so, since torch's tanh takes three times
    as long as its sigmoid: 2.2 times as quick forward, 1.5 times with backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
        return _GeluTanh.apply(x) if plain else F.gelu(x, approximate="tanh")


class _GeluTanh(torch.autograd.Function):
    A, B = 1.5957691216057308, 0.07135481627159536  # 2 sqrt(2 / pi), and 0.044715 of it

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        g = torch.addcmul(x.new_tensor(_GeluTanh.A), x, x, value=_GeluTanh.B)
        return F.silu(x * g, inplace=True).div_(g)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """s (1 + (1 - s) x (A + 3 B x^2)) with s = sigmoid(x g), and A + 3 B x^2 = 3 g - 2 A."""
        (x,) = ctx.saved_tensors
        u = x * torch.addcmul(x.new_tensor(_GeluTanh.A), x, x, value=_GeluTanh.B)
        s = torch.sigmoid(u)
        slope = (3 * u).sub_(x, alpha=2 * _GeluTanh.A)
        return (slope - slope * s).add_(1).mul_(s).mul_(gradients[0])


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GeluTanh,
    "quick_gelu": QuickGELU,
}


class Mlp(nn.Module):
    """`... d -> ... d` through `hidden` channels."""

    def __init__(self, width: int, hidden: int, *, activation: str = "gelu"):
        super().__init__()
        self.up = Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))
