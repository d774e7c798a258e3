"""The hinge has its optimum, the adaptive weight balances, and a discriminator judges patches by themselves."""

from __future__ import annotations

import torch
from torch import nn

from reverie.objectives.adversarial import adaptive_weight, discriminator_hinge, generator_hinge


def test_the_hinge_is_nothing_beyond_its_margins():
    assert discriminator_hinge(torch.full((4,), 1.5), torch.full((4,), -1.0)) == 0
    assert discriminator_hinge(torch.zeros(4), torch.zeros(4)) == 1
    assert discriminator_hinge(torch.full((4,), -1.0), torch.full((4,), 1.0)) == 2
    assert generator_hinge(torch.tensor([2.0, -1.0])) == -0.5


def test_the_best_discriminator_says_which_is_more_frequent():
    """Lim and Ye 2017: of the densities p and q at a place, the optimum is the sign of p - q."""
    places, p, q = 3, torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    logits = nn.Parameter(torch.zeros(places))
    optimizer = torch.optim.SGD([logits], lr=0.1)
    for _ in range(200):
        loss = 0.5 * ((p * (1 - logits).relu()).sum() + (q * (1 + logits).relu()).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(logits.data[[0, 2]], torch.tensor([1.0, -1.0]), atol=0.1, rtol=0)
    assert logits.data[1].abs() < 0.1
    real, drawn = (logits.data.repeat_interleave((10 * some).long()) for some in (p, q))
    torch.testing.assert_close(discriminator_hinge(real, drawn), loss.detach(), atol=0.05, rtol=0)


def test_the_weight_balances_the_gradients_at_the_last_layer():
    torch.manual_seed(0)
    body, last = nn.Linear(4, 8), nn.Linear(8, 4)
    x = torch.randn(16, 4)
    drawn = last(body(x).relu())
    main, adversarial = (drawn - x).abs().mean(), -1000 * drawn.square().mean()
    weight = adaptive_weight(main, adversarial, last.weight)
    assert not weight.requires_grad
    one, other = (
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
        for loss in (main, weight * adversarial)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
    (main + weight * adversarial).backward()  # the graphs are still there
    assert body.weight.grad.abs().sum() > 0
    vanished = adaptive_weight((last(body(x)) - x).abs().mean(), 0 * last(body(x)).sum(), last.weight)
    assert vanished <= 1e4
