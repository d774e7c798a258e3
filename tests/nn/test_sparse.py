"""Patterns of attention: real sparsity equals the dense mask, and a step at a time equals all at once."""

import pytest
import torch
from torch.nn import functional as F

from reverie.nn.keyvalues import Past
from reverie.nn.sparse import PatternAttention, attend_pattern, dense, patterns, reach

GRIDS = ((6, 6), (3, 5), (8, 4), (1, 4), (4, 1))
KINDS = ("row", "column", "conv", "full")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_sparse_is_dense_under_its_mask(kind, grid):
    torch.manual_seed(0)
    rows, columns = grid
    about = {"text": 5, "rows": rows, "columns": columns, "kernel": 5}
    q, k, v = torch.randn(3, 2, 3, 5 + rows * columns, 8)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=dense(kind, **about))
    torch.testing.assert_close(attend_pattern(q, k, v, pattern=kind, **about), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_mask(kind):
    torch.manual_seed(0)
    about = {"text": 3, "rows": 4, "columns": 4, "kernel": 3}
    parts = [torch.randn(1, 2, 19, 4, requires_grad=True) for _ in range(3)]
    ours = torch.autograd.grad(attend_pattern(*parts, pattern=kind, **about).square().sum(), parts)
    masked = F.scaled_dot_product_attention(*parts, attn_mask=dense(kind, **about))
    for a, b in zip(ours, torch.autograd.grad(masked.square().sum(), parts), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_is_all_at_once(kind):
    torch.manual_seed(0)
    layer = PatternAttention(16, 2, pattern=kind, text=4, rows=5, columns=3, kernel=3)
    x = torch.randn(2, 19, 16)
    with torch.no_grad():
        past = Past(19)
        found = [layer(x[:, :4], past=past), *(layer.step(x[:, i : i + 1], past) for i in range(4, 19))]
        torch.testing.assert_close(torch.cat(found, 1), layer(x), atol=1e-6, rtol=1e-5)


def test_the_patterns_are_those_of_the_paper():
    assert patterns(8) == ("row", "column", "row", "row", "row", "column", "row", "conv")
    assert len(patterns(64)) == 64
    assert patterns(64).count("column") == 16
    # Figure 11 of 2102.12092: on a 4 x 4 grid a row pattern reads 5 places, the last one right above.
    assert reach("row", 4, 4, 3) == (0, 1, 2, 3, 4)
    assert reach("column", 4, 4, 3) == (0, 4, 8, 12)
    assert reach("conv", 4, 4, 3) == (0, 1, 3, 4, 5)


def test_no_place_sees_what_comes_later():
    for kind in KINDS:
        mask = dense(kind, text=3, rows=4, columns=5, kernel=5)
        assert not mask.triu(1).any()
        assert mask.diagonal().all()
        assert mask[3:, :3].all()
