"""InfoNCE and the sigmoid loss by hand, and what must not change them."""

import math

import pytest
import torch
from torch.nn import functional as F

from reverie.objectives import contrastive
from reverie.objectives.contrastive import LARGEST_SCALE, accuracy, bounded, info_nce, sigmoid_loss


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
    assert float(info_nce(a, b, SCALE, label=label)) == pytest.approx(by_hand(a, b, 7.0, same))


def test_labels_that_all_differ_are_the_plain_loss():
    a, b = unit()
    torch.testing.assert_close(info_nce(a, b, SCALE, label=torch.arange(6) * 3), info_nce(a, b, SCALE))


def test_symmetric_and_blind_to_the_order():
    a, b = unit()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for label in (None, torch.tensor([0, 1, 0, 2, 3, 1])):
        loss = info_nce(a, b, SCALE, label=label)
        torch.testing.assert_close(info_nce(b, a, SCALE, label=label), loss)
        moved = None if label is None else label[order]
        torch.testing.assert_close(info_nce(a[order], b[order], SCALE, label=moved), loss)


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
    found = sigmoid_loss(a, b, SCALE, bias, label=None if label is None else torch.tensor(label))
    assert float(found) == pytest.approx(total / 6)


# ---------------------------------------------------------------- piece by piece


def plain(kind, a, b, scale, bias, label):
    """The losses with all logits at once, as autograd differentiates them."""
    logits = scale * a @ b.T
    right = (label[:, None] == label[None]).to(a.dtype)
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits + bias, right, reduction="sum") / len(a)
    target = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def ours(kind, a, b, scale, bias, label):
    if kind == "sigmoid":
        return sigmoid_loss(a, b, scale, bias, label=label)
    return info_nce(a, b, scale, label=label)


def inputs(n, d=16, dtype=torch.float64, labels=None):
    a, b = (x.to(dtype).requires_grad_() for x in unit(n, d))
    scale, bias = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (9.0, -4.0))
    label = torch.arange(n) if labels is None else torch.arange(n) % labels
    return a, b, scale, bias, label


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("labels", [None, 29])
@pytest.mark.parametrize("at_once", [1, 300, 10_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_by_pieces_is_the_plain_loss_with_its_gradients(monkeypatch, kind, labels, at_once, dtype, tolerance):
    """Pieces of one row, of a few with a rest, and all at once."""
    monkeypatch.setattr(contrastive, "AT_ONCE", at_once)
    found, expected = [], []
    for loss, results in ((ours, found), (plain, expected)):
        values = inputs(40, dtype=dtype, labels=labels)
        results.append(loss(kind, *values))
        (2.5 * results[0]).backward()  # what comes from above scales the gradient
        results += [x.grad for x in values[:4] if x.grad is not None]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_is_linear_in_the_batch(monkeypatch, kind):
    """What is allocated at the worst moment, by the profiler's account; all logits of 1,024 alone are 4 MiB."""
    monkeypatch.setattr(contrastive, "AT_ONCE", 2**16)

    def peak(loss, n):
        values = inputs(n, d=8, dtype=torch.float32)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as seen:
            loss(kind, *values).backward()
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = worst = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            worst = max(worst, held)
        return worst / 2**20

    fixed = 9 * contrastive.AT_ONCE * 4 / 2**20
    assert peak(plain, 1024) > 3 * 4
    assert peak(ours, 1024) < fixed
    assert peak(ours, 2048) < fixed + 1  # plain: four times as much


def test_the_share_that_finds_its_own(monkeypatch):
    a, b = unit(40, 6)
    label = torch.arange(40) % 17
    nearest = (a @ b.T).argmax(1)
    for at_once in (1, 300, 10_000):
        monkeypatch.setattr(contrastive, "AT_ONCE", at_once)
        assert accuracy(a, b) == (nearest == torch.arange(40)).float().mean()
        assert accuracy(a, b, label=label) == (label[nearest] == label).float().mean()


def test_without_gradients_none_is_computed(monkeypatch):
    monkeypatch.setattr(contrastive._Gradients, "add", None)
    for kind in ("softmax", "sigmoid"):
        values = inputs(12)
        with torch.no_grad():
            torch.testing.assert_close(ours(kind, *values), plain(kind, *values))
        with pytest.raises(TypeError):
            ours(kind, *values)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_bf16_is_near_and_keeps_its_formats(kind):
    values = inputs(64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ours(kind, *values)
    low.backward()
    assert low.dtype == torch.float32
    exact = inputs(64, dtype=torch.float32)
    plain(kind, *exact).backward()
    for x, y in zip(values[:2], exact[:2], strict=True):
        assert (x.grad - y.grad).norm() < 0.05 * y.grad.norm()
    half = [x.detach().bfloat16().requires_grad_() for x in values[:2]]
    ours(kind, *half, *values[2:]).backward()
    assert half[0].grad.dtype == torch.bfloat16
