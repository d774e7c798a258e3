"""SiT's stochastic sampler on data whose flow is known: a normal distribution."""

import pytest
import torch

from reverie.samplers.diffusion import euler
from reverie.samplers.interpolants import DIFFUSIONS, euler_maruyama, stochastic_points

SPREAD, CENTRE = 0.5, 2.0


def exact(x, point):
    """E[x0 | x_t] where x0 is normal around CENTRE with standard deviation SPREAD."""
    variance = (point.alpha * SPREAD) ** 2 + point.sigma**2
    return CENTRE + point.alpha * SPREAD**2 / variance * (x - point.alpha * CENTRE)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_diffusion_draws_the_data(name):
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    x = euler_maruyama(
        exact, noise, stochastic_points(200, last=0.01), diffusion=DIFFUSIONS[name],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert x.mean() == pytest.approx(CENTRE, abs=0.03)
    assert x.std() == pytest.approx(SPREAD, abs=0.03)
    # The noise on the way is fresh: where one began says less than along the flow.
    flow = euler(exact, noise, stochastic_points(200, last=0.01))
    assert torch.corrcoef(torch.stack([flow, noise])[..., 0])[0, 1] > 0.999
    assert torch.corrcoef(torch.stack([x, noise])[..., 0])[0, 1] < 0.95


def test_without_diffusion_it_is_eulers_flow():
    noise, points = torch.randn(5, 3), stochastic_points(7)
    x = euler_maruyama(exact, noise, points, diffusion=lambda _: 0.0, generator=torch.Generator())
    assert torch.allclose(x, euler(exact, noise, points), atol=1e-5)
    assert points[0].t == 1
    assert points[-2].t == pytest.approx(0.04)
    assert points[-1].t == 0
    assert len(points) == 8
