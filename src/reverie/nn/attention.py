"""Multi-head attention, over oneself or over a context (Vaswani et al. 2017, section 3.2).

Convention: `mask` is bool, True = may be attended to, broadcastable to `b heads n m`. `attend` alone also takes floats
in its place, which are added to the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.linear import Linear, widens
from reverie.nn.positions import rotate


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for `b heads n d`, by the quickest equal way on this device and length.

    On a CPU in bf16 the fused kernel loses to plain products below about a thousand positions, and
    both lose to fp32 where the processor has no bf16.
    """
    if widens(q):
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return attend(q.float(), k.float(), v.float(), mask=mask, causal=causal).to(q.dtype)
    by_products = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 1024
    if causal and (by_products or mask is not None):  # the fused kernel takes one of the two
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask, causal = keep if mask is None else mask & keep, False
    if by_products:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            float_mask = mask.is_floating_point()
            scores = scores + mask if float_mask else scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class SelfAttention(nn.Module):
    """`b n d -> b n d`; `rotary` is a (cos, sin) pair of `positions.rotary`; `qk_norm` as in SD3 (2403.03206, 5.3).

    With `at`, `b`: only the vector at this position of each item is wanted, `b d`, and only that one is computed.
    With `runs`: items of unlike length stand one after the other without padding, `t d`, like lengths together: pairs
    (items, length) in their order. Text towers alone use it: padded groups take them 1.9 times as long
    (docs/systems/clip.md).
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.out = Linear(width, width, bias=bias)
        self.norm_q = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        at: Tensor | None = None,
        runs: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        qkv = self.qkv(x)
        if runs is None:
            return self.out(self._mix(qkv, mask, causal, rotary, at))
        assert mask is None, "runs have no mask"
        assert rotary is None, "runs have no rotary positions"
        parts = qkv.split([items * length for items, length in runs])
        ats = [None] * len(runs) if at is None else at.split([items for items, _ in runs])
        mixed = []
        for (items, _), part, one in zip(runs, parts, ats, strict=True):
            out = self._mix(rearrange(part, "(b n) d -> b n d", b=items), None, causal, None, one)
            mixed.append(out if one is not None else rearrange(out, "b n d -> (b n) d"))
        return self.out(torch.cat(mixed))

    def _mix(
        self,
        qkv: Tensor,
        mask: Tensor | None,
        causal: bool,
        rotary: tuple[Tensor, Tensor] | None,
        at: Tensor | None,
    ) -> Tensor:
        # In three parts: the gradients of one rearranged whole would be copied twice.
        q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=self.heads) for x in qkv.chunk(3, -1))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if at is None:
            return rearrange(attend(q, k, v, mask=mask, causal=causal), "b heads n d -> b n (heads d)")
        items, n = torch.arange(len(q), device=q.device), k.shape[-2]
        if mask is not None:
            mask = mask.expand(len(q), -1, n, -1)[items, :, at][:, :, None]
        if causal:
            seen = rearrange(torch.arange(n, device=q.device) <= at[:, None], "b m -> b 1 1 m")
            mask = seen if mask is None else mask & seen
        return rearrange(attend(q[items, :, at][:, :, None], k, v, mask=mask), "b heads 1 d -> b (heads d)")


class CrossAttention(nn.Module):
    """`b n d` reads `context b m c` where `context_mask b m` is True."""

    def __init__(
        self, width: int, heads: int, *, context_width: int, bias: bool = True, qk_norm: bool = False
    ):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, bias=bias)
        self.kv = Linear(context_width, 2 * width, bias=bias)
        self.out = Linear(width, width, bias=bias)
        self.norm_q = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        q = rearrange(self.q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        k, v = rearrange(self.kv(context), "b m (two heads d) -> two b heads m d", two=2, heads=self.heads)
        mask = None if context_mask is None else rearrange(context_mask, "b m -> b 1 1 m")
        out = attend(self.norm_q(q), self.norm_k(k), v, mask=mask)
        return self.out(rearrange(out, "b heads n d -> b n (heads d)"))
