"""Hard negatives: never a right one, as often as they are alike; the loss of the pairs that are there."""

import torch
from torch.nn import functional as F

from reverie.objectives.matching import LEAST, hard_negatives, matching_loss


def test_negatives_come_as_often_as_they_are_alike():
    torch.manual_seed(0)
    logits = torch.randn(2, 5) * 2
    right = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    times = 20_000
    draw = (torch.arange(times) + 0.5) / times
    for row in range(2):
        chosen, found = hard_negatives(
            logits[row : row + 1].expand(times, -1), right[row : row + 1].expand(times, -1), draw
        )
        assert found.all()
        shares = torch.bincount(chosen, minlength=5) / times
        expected = (logits[row].softmax(0) + LEAST).masked_fill(right[row], 0)
        torch.testing.assert_close(shares, expected / expected.sum(), atol=2e-4, rtol=0)


def test_the_ends_of_the_draw_choose_the_first_and_the_last_that_may_be():
    right = torch.tensor([[1, 0, 0, 0, 1]]).bool().expand(2, -1)
    draw = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)
    chosen, _ = hard_negatives(torch.zeros(2, 5), right, draw)
    assert chosen.tolist() == [1, 3]


def test_who_has_no_negative_says_so():
    right = torch.tensor([[1, 1], [1, 0]]).bool()
    _, found = hard_negatives(torch.zeros(2, 2), right, torch.tensor([0.5, 0.5]))
    assert found.tolist() == [False, True]


def test_the_loss_is_of_the_pairs_that_are_there():
    logits = torch.randn(4, 2)
    right, real = torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([1, 1, 0, 1]).bool()
    expected = F.cross_entropy(logits[real], right[real].long())
    torch.testing.assert_close(matching_loss(logits, right, real), expected)
