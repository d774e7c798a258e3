"""Attention against its definition: every path, every mask, and who can see whom."""

import math

import pytest
import torch

from reverie.nn import attention
from reverie.nn.attention import CrossAttention, PackedContext, SelfAttention, attend, attend_packed
from reverie.nn.positions import grid, rotary


def by_hand(q, k, v, keep):
    """softmax(q k^T / sqrt(d)) v, one query at a time, in float64, over the keys that `keep` allows."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = keep[b, head, i]
                scores = k[b, head, seen].double() @ q[b, head, i].double() / math.sqrt(q.shape[-1])
                out[b, head, i] = scores.softmax(0) @ v[b, head, seen].double()
    return out


def some(*, n=5, m=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, n, 4), (2, 3, m, 4), (2, 3, m, 4))
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_path_is_the_definition(dtype, causal, masked):
    q, k, v = some(dtype=dtype)
    keep = torch.ones(2, 3, 5, 5, dtype=torch.bool)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, 5, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[..., 0] = True  # every query has a key
        keep &= mask
    if causal:
        keep &= torch.ones(5, 5, dtype=torch.bool).tril()
    out = attend(q, k, v, mask=mask, causal=causal)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    torch.testing.assert_close(out.double(), by_hand(q, k, v, keep), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_written_out_products_equal_the_fused_kernel_in_bf16(causal):
    """Both sides of the switch at 1024 keys: padding with keys that the mask hides changes the path, not the result."""
    q, k, v = some(n=6, m=6, dtype=torch.bfloat16)
    short = attend(q, k, v, causal=causal)
    more = torch.randn(2, 3, 1100, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    mask = torch.arange(1106)[None] < 6
    if causal:
        mask = mask & (torch.arange(1106)[None] <= torch.arange(6)[:, None])
    long = attend(q, torch.cat([k, more], 2), torch.cat([v, more], 2), mask=mask)
    torch.testing.assert_close(short.float(), long.float(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_flows_from_a_position_to_a_later_one(dtype):
    torch.manual_seed(0)
    layer = SelfAttention(8, 2).to(dtype)
    for i in range(6):
        x = torch.randn(1, 6, 8, dtype=dtype, requires_grad=True)
        layer(x, causal=True)[0, i].float().square().sum().backward()
        felt = x.grad[0].abs().sum(-1) > 0
        assert felt.tolist() == [j <= i for j in range(6)]


def test_without_causal_every_position_sees_every_other():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8, requires_grad=True)
    SelfAttention(8, 2)(x)[0, 0].square().sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_mask_hides_changes_nothing(dtype):
    torch.manual_seed(0)
    layer = CrossAttention(8, 2, context_width=12, qk_norm=True).to(dtype)
    x, context = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 4, 12).to(dtype)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    out = layer(x, context, mask)
    torch.testing.assert_close(layer(x, torch.where(mask[..., None], context, 1e4), mask), out)
    torch.testing.assert_close(layer(x[:1], context[:1, :2]), out[:1], atol=0.02, rtol=0.02)
    assert not torch.allclose(layer(x, context), out, atol=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_that_of_torch(causal):
    torch.manual_seed(0)
    ours, theirs = SelfAttention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias,
    })  # fmt: skip
    x = torch.randn(2, 5, 12)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected = theirs(x, x, x, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(ours(x, causal=causal), expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours = CrossAttention(12, 3, context_width=7)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, kdim=7, vdim=7)
    k, v = ours.kv.weight.chunk(2)
    theirs.load_state_dict({
        "q_proj_weight": ours.q.weight, "k_proj_weight": k, "v_proj_weight": v,
        "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
        "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias,
    })  # fmt: skip
    x, context = torch.randn(2, 5, 12), torch.randn(2, 4, 7)
    mask = torch.tensor([[True, True, False, True], [True] * 4])
    expected = theirs(x, context, context, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x, context, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_without_positions_does_not_know_the_order(qk_norm):
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, qk_norm=qk_norm)
    x, order = torch.randn(2, 7, 8), torch.randperm(7)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-5, rtol=1e-5)
    turns = rotary(grid(7), 4)
    assert not torch.allclose(layer(x[:, order], rotary=turns), layer(x, rotary=turns)[:, order], atol=1e-3)


def test_qk_norm_makes_the_scale_of_the_queries_matter_not():
    torch.manual_seed(0)
    plain, normed = SelfAttention(8, 2, bias=False), SelfAttention(8, 2, bias=False, qk_norm=True)
    x = torch.randn(1, 5, 8)
    for layer, same in ((plain, False), (normed, True)):
        before = layer(x)
        with torch.no_grad():
            layer.qkv.weight[:16] *= 10  # queries and keys, not values
        assert torch.allclose(layer(x), before, atol=1e-4) == same


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def test_the_kernel_for_packed_items_is_the_definition():
    """The way of a GPU in float32, which runs here as well."""
    torch.manual_seed(0)
    queries, keys = (3, 5, 5, 2), (4, 1, 6, 3)
    q, k, v = (torch.randn(3, sum(n), 8, requires_grad=True) for n in (queries, keys, keys))
    out = attend_packed(q, k, v, ends=(ends(queries), ends(keys)), longest=(5, 7))
    parts = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
    alone = torch.cat([attend(*(x[None] for x in part))[0] for part in parts], dim=1)
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(alone.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_layers_give_the_same_run_after_run_and_by_kernel(monkeypatch):
    torch.manual_seed(0)
    runs = ((2, 3), (1, 2))
    own, cross = SelfAttention(16, 2, qk_norm=True), CrossAttention(16, 2, context_width=6, qk_norm=True)
    x, context, turns = torch.randn(8, 16), torch.randn(3, 4, 6), rotary(torch.rand(8, 1), 8)
    words = PackedContext.of(
        context, torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])
    )
    by_runs = own(x, rotary=turns, runs=runs), cross(x, words, runs=runs)
    monkeypatch.setattr(attention, "_unlike", lambda x, runs: True)
    by_kernel = own(x, rotary=turns, runs=runs), cross(x, words, runs=runs)
    torch.testing.assert_close(by_kernel, by_runs, atol=1e-5, rtol=1e-5)


def test_packed_words_are_those_of_the_mask():
    context, mask = torch.randn(2, 3, 4), torch.tensor([[False, True, True], [True, False, False]])
    words = PackedContext.of(context, mask)
    assert words.real.equal(torch.stack([context[0, 1], context[0, 2], context[1, 0]]))
    assert words.padded(words.real, 2)[mask].equal(context[mask])
