"""Multi-head attention, over oneself or over a context (Vaswani et al. 2017, section 3.2).

Convention: `mask` is bool, True = may be attended to, broadcastable to `b heads n m`. `attend` alone also takes floats
in its place, which are added to the scores.

Packed: items of unlike length stand one after the other without padding, `t d`, those of like length together. `runs`
says so: pairs (items, length) in their order. Attention stays inside each item, and nothing else is computed: on a GPU
by kernels for sequences of any length, elsewhere run after run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.nn.keyvalues import Known, Past, Readers
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


Runs = Sequence[tuple[int, int]]


@lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0, and where each item ends."""
    return F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0))


def _unlike(x: Tensor, runs: Runs) -> bool:
    """Whether these packed items are one thing for the kernels of this device, and not for `attend`."""
    return x.device.type == "cuda" and len(runs) > 1


@lru_cache(maxsize=1)
def _varlen() -> Any:
    """torch's flash attention for sequences of any length (2.10), or None. It takes seconds to import."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, *, ends: tuple[Tensor, Tensor], longest: tuple[int, int]
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each item on its own: `heads t d` and twice `heads w d`, packed -> `heads t d`.

    `ends`: 0 and where each item ends, in q and in k; `longest`: their greatest length. Flash attention for any lengths
    where it is there (a GPU, half precision), else torch's jagged tensors, which have kernels for float32.
    """
    parts = [
        rearrange(x, "heads t d -> t heads d").to(v.dtype).contiguous() for x in (q, k, v)
    ]  # autocast mixes them
    half = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16)
    if half and (varlen_attn := _varlen()) is not None:
        out: Any = varlen_attn(parts[0], parts[1], parts[2], ends[0].int(), ends[1].int(), *longest)
        return rearrange(out, "t heads d -> heads t d")
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, at, min_seqlen=1, max_seqlen=most).transpose(1, 2)
        for x, at, most in zip(parts, (ends[0], *[ends[1]] * 2), (longest[0], *[longest[1]] * 2), strict=True)
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return rearrange(out.values(), "t heads d -> heads t d")


class PackedContext(NamedTuple):
    """What cross-attention reads without its padding: `context b m c` where `mask b m` is True, packed."""

    real: Tensor  # `w c`, item after item
    slots: Tensor | None = (
        None  # `b m`: where in `real` a place of the padded context stands; None: it is `(b m) c`
    )
    mask: Tensor | None = None  # `b m`

    @classmethod
    def of(cls, context: Tensor, mask: Tensor | None) -> PackedContext:
        """Of `context b m c` what `mask b m` leaves."""
        if mask is None:
            return cls(rearrange(context, "b m c -> (b m) c"))
        slots = rearrange(mask, "b m -> (b m)").cumsum(0) - 1
        return cls(context[mask], rearrange(slots.clamp(min=0), "(b m) -> b m", b=len(mask)), mask)

    def padded(self, x: Tensor, items: int) -> Tensor:
        """What was computed of the real words, `w d`, at their places in the padded context, `b m d`."""
        return rearrange(x, "(b m) d -> b m d", b=items) if self.slots is None else F.embedding(self.slots, x)


class SelfAttention(nn.Module):
    """`b n d -> b n d`; `rotary` is a (cos, sin) pair of `positions.rotary`; `qk_norm` as in SD3 (2403.03206, 5.3).

    With `at`, `b`: only the vector at this position of each item is wanted, `b d`, and only that one is computed.
    With `runs`: packed, `t d -> t d`, and `rotary` of all t. With `past`: x are the newest positions, which also read
    those that `past` keeps (keyvalues.py); `causal` is then among the newest.
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
        runs: Runs | None = None,
        past: Past | None = None,
    ) -> Tensor:
        # In three parts: the gradients of one rearranged whole would be copied twice.
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (rearrange(part, "... n (heads d) -> ... heads n d", heads=self.heads) for part in parts)
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if past is not None:
            assert runs is at is mask is None, "a past is of rows of one length"
            k, v = past(k, v)
            n, m = q.shape[-2], k.shape[-2]
            if causal and n < m:
                causal = False  # as a mask, since the first query is no longer the first position
                mask = None if n == 1 else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if runs is None:
            return self.out(self._mix(q, k, v, mask, causal, at))
        assert mask is None, "runs have no mask"
        if _unlike(x, runs) and not causal and at is None:
            ends = _ends(tuple(length for items, length in runs for _ in range(items)), x.device)
            longest = max(length for _, length in runs)
            mixed = attend_packed(q, k, v, ends=(ends, ends), longest=(longest, longest))
            return self.out(rearrange(mixed, "heads t d -> t (heads d)"))
        sizes = [items * length for items, length in runs]
        ats = [None] * len(runs) if at is None else at.split([items for items, _ in runs])
        done = []
        for (items, _), one, *each in zip(
            runs, ats, *(x.split(sizes, dim=-2) for x in (q, k, v)), strict=True
        ):
            q, k, v = (rearrange(x, "heads (b n) d -> b heads n d", b=items) for x in each)
            out = self._mix(q, k, v, None, causal, one)
            done.append(out if one is not None else rearrange(out, "b n d -> (b n) d"))
        return self.out(done[0] if len(done) == 1 else torch.cat(done))

    @staticmethod
    def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, at: Tensor | None) -> Tensor:
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
    """`b n d` reads `context b m c` where `context_mask b m` is True; with `runs`, packed `t d` a `PackedContext`.

    `known(context)` is what is computed of a context alone, once; it is then read in the context's place.
    """

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

    def forward(
        self,
        x: Tensor,
        context: Tensor | PackedContext | Known,
        context_mask: Tensor | None = None,
        *,
        runs: Runs | None = None,
    ) -> Tensor:
        if isinstance(context, Known):
            assert runs is context_mask is None, "what is known has its own mask"
            return self._read(x, context)
        if isinstance(context, Tensor):
            assert runs is None, "packed items read a PackedContext"
            b, n, _ = x.shape
            words = PackedContext(rearrange(context, "b m c -> (b m) c"), None, context_mask)
            packed = self(rearrange(x, "b n d -> (b n) d"), words, runs=((b, n),))
            return rearrange(packed, "(b n) d -> b n d", b=b)
        assert runs is not None
        q = self.norm_q(rearrange(self.q(x), "t (heads d) -> heads t d", heads=self.heads))
        kv = self.kv(context.real)
        if _unlike(x, runs):
            assert context.mask is not None
            k, v = rearrange(kv, "w (two heads d) -> two heads w d", two=2, heads=self.heads)
            lengths = tuple(length for items, length in runs for _ in range(items))
            ends = _ends(lengths, x.device), F.pad(context.mask.sum(1).cumsum(0), (1, 0))
            longest = max(lengths), context.mask.shape[1]
            out = attend_packed(q, self.norm_k(k), v, ends=ends, longest=longest)
            return self.out(rearrange(out, "heads t d -> t (heads d)"))
        counts = [items for items, _ in runs]
        k, v = rearrange(
            context.padded(kv, sum(counts)), "b m (two heads d) -> two b heads m d", two=2, heads=self.heads
        )
        mask = None if context.mask is None else rearrange(context.mask, "b m -> b 1 1 m")
        masks = [None] * len(runs) if mask is None else mask.split(counts)
        queries = q.split([items * length for items, length in runs], dim=-2)
        rests = zip(masks, self.norm_k(k).split(counts), v.split(counts), strict=True)
        done = []
        for items, query, (seen, *rest) in zip(counts, queries, rests, strict=True):
            out = attend(rearrange(query, "heads (b n) d -> b heads n d", b=items), *rest, mask=seen)
            done.append(rearrange(out, "b heads n d -> (b n) (heads d)"))
        return self.out(done[0] if len(done) == 1 else torch.cat(done))

    def known(self, context: Tensor, context_mask: Tensor | None, readers: Readers) -> Known:
        """The keys and values of `context b m c`, which `readers` say who reads."""
        kv = rearrange(self.kv(context), "b m (two heads d) -> two b heads m d", two=2, heads=self.heads)
        k, v = kv.contiguous()
        return Known(self.norm_k(k), v, context_mask, readers)

    def _read(self, x: Tensor, context: Known) -> Tensor:
        """All rows that read one item are queries of one attention, so that nothing of the context is repeated."""
        q, n = self.norm_q(rearrange(self.q(x), "r n (heads d) -> r n heads d", heads=self.heads)), x.shape[1]
        parts = q.split([items * each for _, items, each in context.readers.runs])
        done = []
        for part, (first, items, each) in zip(parts, context.readers.runs, strict=True):
            at = slice(first, first + items)
            mask = None if context.mask is None else rearrange(context.mask[at], "b m -> b 1 1 m")
            queries = rearrange(part, "(b each) n heads d -> b heads (each n) d", each=each)
            out = attend(queries, context.k[at], context.v[at], mask=mask)
            done.append(rearrange(out, "b heads (each n) d -> (b each) n (heads d)", n=n))
        return self.out(done[0] if len(done) == 1 else torch.cat(done))
