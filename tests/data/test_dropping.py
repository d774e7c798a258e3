"""What is left out: a share, by key, and of words never the frame that the tower reads."""

import pytest
import torch

from reverie.data.dropping import (
    drawn_share,
    drop_tokens,
    kept_count,
    kept_patches,
    kept_tokens,
    masked_pass,
    masked_share,
)
from reverie.errors import InputError

START, END, PAD = 8, 9, 0


def short(tokens, drop, **key):
    return drop_tokens(
        tokens, drop, end=END, pad=PAD, **{"seed": 0, "keys": [(0, i) for i in range(len(tokens))]} | key
    )


@pytest.mark.parametrize(("drop", "count"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.99, 1)])
def test_a_share_of_the_patches_stays(drop, count):
    keep = kept_patches(16, drop, seed=0, keys=[(0, i) for i in range(200)])
    assert keep.shape == (200, count)
    assert (keep.diff(dim=1) > 0).all(), "each once, ascending"
    assert keep.unique().tolist() == list(range(16)), "each has its turn"


def test_what_stays_depends_on_the_key_alone():
    whole = kept_patches(64, 0.5, seed=1, keys=[(0, 3), (0, 4), (1, 3)])
    assert torch.equal(kept_patches(64, 0.5, seed=1, keys=[(1, 3)]), whole[2:])
    assert len({tuple(row) for row in whole.tolist()}) == 3
    assert not torch.equal(kept_patches(64, 0.5, seed=2, keys=[(0, 3)])[0], whole[0])
    tokens = torch.tensor([[START, *range(10, 30), END, PAD]]).expand(2, -1)
    both = short(tokens, 0.5, keys=[(0, 3), (1, 3)])
    assert not torch.equal(*both)
    assert torch.equal(short(tokens[:1], 0.5, keys=[(1, 3)])[0], both[1])


def test_words_go_and_the_frame_stays():
    tokens = torch.tensor(
        [[START, 1, 2, 3, 4, END], [START, 5, END, PAD, PAD, PAD], [START, END, PAD, PAD, PAD, PAD]]
    )
    assert torch.equal(short(tokens, 0.0), tokens)
    half = short(tokens, 0.5)
    assert half.shape == tokens.shape
    assert torch.equal(half[1:], tokens[1:]), "at least one word stays, and of none there is none to take"
    row = half[0].tolist()
    assert row[0] == START
    assert row[3:] == [END, PAD, PAD]
    assert row[1] < row[2], "in their order"
    assert {row[1], row[2]} <= {1, 2, 3, 4}


@pytest.mark.parametrize("drop", [-0.1, 1.0, 50.0])
def test_shares_that_are_none_are_refused(drop):
    with pytest.raises(InputError, match=f"drop is {drop}"):
        kept_patches(16, drop, seed=0, keys=[(0, 0)])
    with pytest.raises(InputError, match=f"drop_text is {drop}"):
        short(torch.tensor([[START, END]]), drop)


def test_a_share_of_its_own_for_each_sample():
    shares = torch.tensor([drawn_share((0.2, 0.6), seed=0, epoch=0, sample=i) for i in range(400)])
    assert 0.2 <= shares.min() < 0.22
    assert 0.58 < shares.max() < 0.6
    assert abs(shares.mean() - 0.4) < 0.02
    keep = kept_tokens(40, kept_count(40, 0.75), seed=0, epoch=2, sample=5)
    assert keep.tolist() == sorted(set(keep.tolist()))
    assert len(keep) == 10
    assert 0 <= keep[0] <= keep[-1] < 40
    assert not keep.equal(kept_tokens(40, 10, seed=0, epoch=3, sample=5))
    assert kept_count(3, 0.99) == 1
    with pytest.raises(InputError, match=r"drop is 0\.5 to 1\.0"):
        drawn_share((0.5, 1.0), seed=0, epoch=0, sample=0)


def test_a_masked_pass_has_the_share_of_its_step_and_draws_of_its_own():
    assert masked_share(None, seed=0, step=1) is None
    shares = [masked_share((0.3, 0.5), seed=0, step=step) for step in range(50)]
    assert 0.3 <= min(shares) < 0.32
    assert 0.48 < max(shares) <= 0.5
    one, other = (masked_pass((3, 8, 8), 16, 0.5, seed=0, key=(kind, 2, 7)) for kind in ("clip", "picture"))
    assert one["masked_noise"].shape == (3, 8, 8)
    assert not one["masked_noise"].equal(other["masked_noise"])
    assert one["keep"].equal(other["keep"])
    assert one["keep"].equal(kept_patches(16, 0.5, seed=0, keys=[(2, 7)])[0])
