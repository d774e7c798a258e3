"""Transformer blocks: the plain pre-norm one, and the one that a vector modulates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.attention import CrossAttention, PackedContext, Runs, SelfAttention
from reverie.nn.linear import Linear
from reverie.nn.mlp import Mlp


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `b n d -> b n d` (CLIP, GPT-2, ViT).

    With `at`, `b`: only the vector at this position of each item, `b d`. A last block of which one position is read
    costs a quarter, with an equal result. With `runs`, x is packed, `t d` (attention.SelfAttention).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden or 4 * width, activation=activation)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        at: Tensor | None = None,
        runs: Runs | None = None,
    ) -> Tensor:
        mixed = self.attention(self.norm1(x), mask=mask, causal=causal, at=at, runs=runs)
        x = mixed + (x if at is None else pick(x, at, runs=runs))
        return x + self.mlp(self.norm2(x))


def pick(x: Tensor, at: Tensor, *, runs: Runs | None = None) -> Tensor:
    """The vector of each item at its position `at`, `b`: from `b n d`, or with `runs` from `t d` -> `b d`."""
    if runs is None:
        return x[torch.arange(len(x), device=x.device), at]
    lengths = torch.tensor([length for items, length in runs for _ in range(items)], device=x.device)
    return x[lengths.cumsum(0) - lengths + at]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift with one shift and scale per item, or per position (`b n d`)."""
    return x * (1 + scale) + shift


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`modulate` of the norm of `x b n d`, in one pass where one shift and scale, `1 1 d`, hold for all items."""
    if len(scale) == 1:
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class ModulatedBlock(nn.Module):
    """adaLN-zero (DiT, 2212.09748, section 3.2) with cross-attention to a context between attention and MLP.

    `x t d` is packed, as `runs` says (attention.py). Of `vector k d`, one for each different time and item, `rows t`
    names that which modulates a position: the modulation is computed k times, not t. It and the output of the
    cross-attention start at zero, so a new block is the identity.
    """

    def __init__(self, width: int, heads: int, *, context_width: int, ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, heads, qk_norm=True)
        self.norm_context = nn.LayerNorm(width, eps=1e-6)
        self.cross = CrossAttention(width, heads, context_width=context_width, qk_norm=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * ratio), activation="gelu_tanh")
        modulation = Linear(width, 6 * width)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)
        for zero in (modulation, self.cross.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self,
        x: Tensor,
        vector: Tensor,
        context: PackedContext,
        *,
        rows: Tensor,
        runs: Runs,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = spread(self.modulation(vector), rows, 6)
        mixed = self.attention(modulate(self.norm1(x), shift1, scale1), rotary=rotary, runs=runs)
        x = torch.addcmul(x, gate1, mixed)
        x = x + self.cross(self.norm_context(x), context, runs=runs)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


def spread(table: Tensor, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
    """`k (parts d)` -> `parts` tensors `t d`, position i having row `rows[i]` of the table."""
    # As an embedding: on a CPU its backward takes a third of the time of indexing's.
    return F.embedding(rows, table).chunk(parts, -1)
