"""The feed-forward half of a block, and its activations by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.linear import Linear


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation in CLIP; written through SiLU, which is the same and quicker."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
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
