"""Attention of a few queries: what torch's own multi-head attention gives, and no order among the features."""

import torch
from torch import nn

from reverie.nn.pooling import QueryAttention


@torch.no_grad()
def test_it_is_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = QueryAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    parts = (ours.q, ours.k, ours.v)
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    queries, features = torch.randn(3, 2, 16), torch.randn(3, 7, 16)
    torch.testing.assert_close(ours(queries, features), theirs(queries, features, features)[0])
    torch.testing.assert_close(ours(queries, features.flip(1)), ours(queries, features))


def test_it_may_leave_its_width():
    assert QueryAttention(16, 4, out=5)(torch.randn(2, 1, 16), torch.randn(2, 7, 16)).shape == (2, 1, 5)
