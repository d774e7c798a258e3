"""Multi-head attention, over oneself or over a context (Vaswani et al. 2017, section 3.2).

Convention: `mask` is bool, True = may be attended to, broadcastable to `b heads n m`.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.positions import rotate


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for `b heads n d`, by the quickest equal way on this device and length.

    On a CPU in bf16 the fused kernel loses to plain products below about a thousand positions (docs/engine.md).
    """
    by_products = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 1024
    if causal and (by_products or mask is not None):  # the fused kernel takes one of the two
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask, causal = keep if mask is None else mask & keep, False
    if by_products:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class SelfAttention(nn.Module):
    """`b n d -> b n d`; `rotary` is a (cos, sin) pair of `positions.rotary`; `qk_norm` as in SD3 (2403.03206, 5.3)."""

    def __init__(self, width: int, heads: int, *, bias: bool = True, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.norm_q = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.out(rearrange(attend(q, k, v, mask=mask, causal=causal), "b heads n d -> b n (heads d)"))


class CrossAttention(nn.Module):
    """`b n d` reads `context b m c` where `context_mask b m` is True."""

    def __init__(
        self, width: int, heads: int, *, context_width: int, bias: bool = True, qk_norm: bool = False
    ):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(context_width, 2 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.norm_q = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        k, v = rearrange(self.kv(context), "b m (two heads d) -> two b heads m d", two=2, heads=self.heads)
        mask = None if context_mask is None else rearrange(context_mask, "b m -> b 1 1 m")
        out = attend(self.norm_q(q), self.norm_k(k), v, mask=mask)
        return self.out(rearrange(out, "b heads n d -> b n (heads d)"))
