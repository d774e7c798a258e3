"""InfoNCE and the sigmoid loss by hand, and what must not change them."""

import math

import pytest
import torch
from torch.nn import functional as F

from reverie.objectives.contrastive import LARGEST_SCALE, bounded, info_nce, sigmoid_loss


def unit(n=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1) for _ in "ab"]


SCALE = torch.tensor([7.0], dtype=torch.float64)


def by_hand(a, b, scale, same):
    """The definition, in Python numbers."""
    n, total = len(a), 0.0
    for rows, columns, right in ((a, b, same), (b, a, same.T)):
        for i in range(n):
            scores = [scale * float(rows[i] @ columns[j]) for j in range(n)]
            norm = math.log(sum(math.exp(score) for score in scores))
            good = [j for j in range(n) if right[i, j]]
            total += sum(norm - scores[j] for j in good) / len(good)
    return total / (2 * n)


def test_it_is_the_cross_entropy_both_ways():
    a, b = unit()
    assert float(info_nce(a, b, SCALE)) == pytest.approx(by_hand(a, b, 7.0, torch.eye(6, dtype=torch.bool)))


def test_pairs_that_are_right_as_well_share_the_weight():
    a, b = unit()
    label = torch.tensor([0, 1, 0, 2, 0, 1])
    same = label[:, None] == label[None]
    assert float(info_nce(a, b, SCALE, same=same)) == pytest.approx(by_hand(a, b, 7.0, same))
    lopsided = torch.eye(6, dtype=torch.bool)
    lopsided[0, 3] = True  # caption 3 fits picture 0, but caption 0 not picture 3
    assert float(info_nce(a, b, SCALE, same=lopsided)) == pytest.approx(by_hand(a, b, 7.0, lopsided))


def test_the_diagonal_alone_is_the_plain_loss():
    a, b = unit()
    torch.testing.assert_close(
        info_nce(a, b, SCALE, same=torch.eye(6, dtype=torch.bool)), info_nce(a, b, SCALE)
    )


def test_symmetric_and_blind_to_the_order():
    a, b = unit()
    label = torch.tensor([0, 1, 0, 2, 3, 1])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for same in (None, label[:, None] == label[None]):
        loss = info_nce(a, b, SCALE, same=same)
        torch.testing.assert_close(info_nce(b, a, SCALE, same=None if same is None else same.T), loss)
        moved = None if same is None else same[order][:, order]
        torch.testing.assert_close(info_nce(a[order], b[order], SCALE, same=moved), loss)


def test_equal_embeddings_cost_the_logarithm_of_the_batch():
    a = torch.ones(6, 4, dtype=torch.float64) / 2
    torch.testing.assert_close(info_nce(a, a, SCALE), torch.tensor(math.log(6), dtype=torch.float64))


def test_perfect_embeddings_are_the_minimum_and_descent_goes_there():
    perfect = torch.eye(6, dtype=torch.float64)
    assert info_nce(perfect, perfect, 100 * torch.ones(1)) < 1e-9
    assert info_nce(perfect, perfect.roll(1, 0), 100 * torch.ones(1)) > 99
    a, b = unit()
    first = info_nce(a, b, SCALE).item()
    for _ in range(100):
        a, b = a.requires_grad_(), b.requires_grad_()
        loss = info_nce(a, b, SCALE)
        grads = torch.autograd.grad(loss, (a, b))
        a, b = (F.normalize((x - 0.5 * g).detach(), dim=-1) for x, g in zip((a, b), grads, strict=True))
    assert loss.item() < 0.05 < 1 < first
    assert ((a @ b.T).argmax(-1) == torch.arange(6)).all()


def test_the_scale_learns():
    scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    info_nce(torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64), scale).backward()
    assert scale.grad.item() < 0  # pairs that fit already: a larger scale lowers the loss


def test_the_scale_stops_at_a_hundred():
    log_scale = torch.tensor([9.0], requires_grad=True)
    assert bounded(log_scale).item() == LARGEST_SCALE
    bounded(log_scale).sum().backward()
    assert log_scale.grad.item() == 0
    assert bounded(torch.tensor(2.0)).item() == pytest.approx(math.exp(2.0))


@pytest.mark.parametrize("label", [None, [0, 1, 0, 2, 0, 1]])
def test_the_sigmoid_loss_asks_of_every_pair(label):
    """2303.15343, algorithm 1: labels are 1 on the diagonal and -1 elsewhere."""
    a, b = unit()
    same = torch.eye(6, dtype=torch.bool)
    if label is not None:
        same = torch.tensor(label)[:, None] == torch.tensor(label)[None]
    total = 0.0
    for i in range(6):
        for j in range(6):
            z = 1 if same[i, j] else -1
            total += math.log(1 + math.exp(-z * (7.0 * float(a[i] @ b[j]) - 2.0)))
    bias = torch.tensor([-2.0], dtype=torch.float64)
    found = sigmoid_loss(a, b, SCALE, bias, same=None if label is None else same)
    assert float(found) == pytest.approx(total / 6)
