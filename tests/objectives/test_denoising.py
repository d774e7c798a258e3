"""The regression loss, and what its weight leaves out."""

import pytest
import torch

from reverie.objectives.denoising import velocity_loss


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 3, 4, 5, 5, generator=generator)


def test_mean_squared_error(pair):
    predicted, target = pair
    loss = velocity_loss(predicted, target)
    assert float(loss) == pytest.approx(((predicted - target) ** 2).mean().item())
    assert velocity_loss(target, target) == 0
    torch.testing.assert_close(velocity_loss(predicted, target, weight=torch.ones(1)), loss)


def test_what_has_no_weight_has_no_say(pair):
    """Known frames, one item's first and another's last: the mean is over the rest, whatever stands in them."""
    predicted, target = pair
    weight = torch.ones(2, 1, 4, 1, 1)
    weight[0, :, 0], weight[1, :, 3] = 0, 0
    loss = velocity_loss(predicted, target, weight=weight)
    rest = torch.cat([predicted[0, :, 1:] - target[0, :, 1:], predicted[1, :, :3] - target[1, :, :3]])
    assert float(loss) == pytest.approx((rest**2).mean().item())
    wild = predicted.clone()
    wild[0, :, 0], wild[1, :, 3] = 1e4, -1e4
    torch.testing.assert_close(velocity_loss(wild, target, weight=weight), loss)
    wild.requires_grad_()
    velocity_loss(wild, target, weight=weight).backward()
    assert ((wild.grad.abs().sum((1, 3, 4)) == 0) == (weight[:, 0, :, 0, 0] == 0)).all()


def test_nothing_to_predict_costs_nothing(pair):
    assert velocity_loss(*pair, weight=torch.zeros(2, 1, 4, 1, 1)) == 0
