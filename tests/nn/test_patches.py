"""Patches lose nothing, and stand in the order that the docstring says."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.nn.patches import patchify, unpatchify

small = st.integers(1, 3)


@settings(max_examples=60, deadline=None)
@given(b=small, c=small, f=small, h=small, w=small, frames=small, side=small)
def test_round_trip(b, c, f, h, w, frames, side):
    x = torch.randn(b, c, f * frames, h * side, w * side)
    tokens = patchify(x, (frames, side))
    assert tokens.shape == (b, f * h * w, c * frames * side**2)
    assert unpatchify(tokens, (frames, side), tuple(x.shape[-3:])).equal(x)


@settings(max_examples=60, deadline=None)
@given(c=small, f=small, h=small, w=small, frames=small, side=small, data=st.data())
def test_tokens_run_frame_row_column_and_contents_channel_frame_row_column(c, f, h, w, frames, side, data):
    x = torch.zeros(1, c, f * frames, h * side, w * side)
    pick = lambda n: data.draw(st.integers(0, n - 1))  # noqa: E731
    channel, patch_f, patch_h, patch_w = pick(c), pick(f), pick(h), pick(w)
    in_f, in_h, in_w = pick(frames), pick(side), pick(side)
    x[0, channel, patch_f * frames + in_f, patch_h * side + in_h, patch_w * side + in_w] = 1
    token, content = patchify(x, (frames, side))[0].nonzero()[0].tolist()
    assert token == (patch_f * h + patch_h) * w + patch_w
    assert content == ((channel * frames + in_f) * side + in_h) * side + in_w
