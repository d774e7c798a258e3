"""Samplers on processes whose solution is known in closed form. A wrong sign or order of points cannot hide here.

Data N(M, S^2): x_t is N(alpha M, alpha^2 S^2 + sigma^2), and a perfect network says E[x0 | x_t], linear in x_t.
The probability flow carries (x - mean_t) / std_t unchanged, so noise z becomes M + S z.
"""

import math

import pytest
import torch

from reverie.processes import gaussian
from reverie.processes.gaussian import Ddpm, Edm, Flow, Point
from reverie.samplers import diffusion, multistep

M, S = 0.6, 0.3
NOISE = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

EXACT = {
    "euler": diffusion.euler,
    "heun": diffusion.heun,
    "flow_heun": diffusion.flow_heun,
    "dpmpp_2m": multistep.dpmpp_2m,
    "unipc": multistep.unipc,
}
RANDOM = {
    "ddpm": diffusion.ddpm,
    "ddim": lambda *given, **options: diffusion.ddim(*given, eta=0.7, **options),
    "euler_ancestral": diffusion.euler_ancestral,
    "dpmpp_2m_sde": multistep.dpmpp_2m_sde,
}
EVERY = EXACT | RANDOM


def posterior(x, point):
    """E[x0 | x_t = x]."""
    _, alpha, sigma = point
    return M + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x - alpha * M)


def begun(point, z=NOISE):
    """x at a point, whose place among its like is z."""
    return point.alpha * M + math.sqrt(point.alpha**2 * S**2 + point.sigma**2) * z


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lines(steps):
    """Points of every process, down to the clean one."""
    return {
        "flow": Flow().points(steps, start=0.9),
        "ddpm": (*(smooth(1 - i / steps) for i in range(steps)), gaussian.CLEAN),
        "edm": Edm(sigma_max=20.0, sigma_min=0.02).points(steps),
    }


def smooth(t):
    """Of a variance-preserving process without a table, sigma = sin(t pi / 2) kept from 1."""
    angle = 0.9 * t * math.pi / 2
    return Point(t, math.cos(angle), math.sin(angle))


def error(sampler, points, **options):
    x = begun(points[0])
    return (sampler(posterior, x, points, **options) - (M + S * NOISE)).abs().max().item()


def test_the_posterior_mean_is_right():
    """The formula above against regression on drawn pairs."""
    x0 = M + S * torch.randn(100_000, generator=generator(1), dtype=torch.float64)
    noise = torch.randn(100_000, generator=generator(2), dtype=torch.float64)
    for point in (Flow().at(0.2), Flow().at(0.9), Ddpm().at(300), Edm().at(2.0)):
        x_t = gaussian.corrupt(x0, noise, point)
        slope = (((x_t - x_t.mean()) * (x0 - x0.mean())).mean() / x_t.var()).item()
        ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        torch.testing.assert_close(
            posterior(ends, point), x0.mean() + slope * (ends - x_t.mean()), atol=0.03, rtol=0
        )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("process", ["flow", "ddpm", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_point_mass_is_reached_exactly(name, process, steps):
    """Where all data is one point, every x0 is that point, and everybody ends there."""
    if name == "flow_heun" and process != "flow":
        pytest.skip("a flow's own")
    x0 = torch.tensor([[-0.5, 0.25, 1.0]], dtype=torch.float64)
    points = lines(steps)[process]
    x = gaussian.corrupt(x0, torch.randn(1, 3, generator=generator(), dtype=torch.float64), points[0])
    out = EVERY[name](lambda x, point: x0, x, points, generator=generator())
    torch.testing.assert_close(out, x0)


@pytest.mark.parametrize("name", ["euler", "flow_heun", "heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_constant_velocity_is_solved_exactly_on_the_way(name, steps):
    """x0 and noise known: the sampler passes through alpha x0 + sigma noise at each point of the line."""
    x0, noise = torch.randn(2, 1, 5, generator=generator(), dtype=torch.float64)
    points = Flow(shift=2.0).points(steps, start=0.9)
    seen = []

    def predict(x, point):
        torch.testing.assert_close(x, gaussian.corrupt(x0, noise, point))
        seen.append(point)
        return x0

    out = EXACT[name](predict, gaussian.corrupt(x0, noise, points[0]), points)
    torch.testing.assert_close(out, x0)
    assert seen[0] == points[0]


ORDERS = {"euler": 1, "heun": 2, "flow_heun": 2, "dpmpp_2m": 2, "unipc": 2}


WAYS = {
    "flow": Flow().at,
    "shifted": lambda u: Flow().at(gaussian.shift(u, 3.0)),
    "ddpm": smooth,
    "edm": lambda u: Edm().at(math.exp(3 * u - 2)),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("process", WAYS)
def test_order_of_convergence(name, process):
    """Between two fixed levels of noise the error falls by 2^order when the steps are halved."""
    if name == "flow_heun" and process not in ("flow", "shifted"):
        pytest.skip("a flow's own")
    errors = []
    for steps in (40, 80, 160):
        points = [WAYS[process](0.9 - 0.7 * i / steps) for i in range(steps + 1)]
        out = EXACT[name](posterior, begun(points[0]), points)
        errors.append((out - begun(points[-1])).abs().max().item())
    for before, after in zip(errors, errors[1:], strict=False):
        assert math.log2(before / after) > ORDERS[name] - 0.25, errors


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("process", ["flow", "ddpm", "edm"])
def test_the_data_s_distribution_comes_out(name, process):
    if name == "flow_heun" and process != "flow":
        pytest.skip("a flow's own")
    points = lines(100)[process]
    out = EVERY[name](posterior, begun(points[0]), points, generator=generator(5))
    assert out.mean().item() == pytest.approx(M, abs=0.03)
    assert out.std().item() == pytest.approx(S, abs=0.03)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_on_its_own_table(variance):
    points = Ddpm(steps=200, beta_end=0.1).points(200)
    out = diffusion.ddpm(posterior, NOISE, points, variance=variance, generator=generator(1))
    assert out.mean().item() == pytest.approx(M, abs=0.03)
    assert out.std().item() == pytest.approx(S, abs=0.03)


def test_a_learned_variance_lies_between_the_two_fixed_ones():
    points = Ddpm().points(10)
    x = NOISE.reshape(1, 4, 500)
    for v, name in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        both = diffusion.ddpm(
            lambda x, point, v=v: torch.cat([posterior(x, point), torch.full_like(x, v)], dim=1),
            x,
            points,
            variance="learned_range",
            generator=generator(2),
        )
        fixed = diffusion.ddpm(posterior, x, points, variance=name, generator=generator(2))
        torch.testing.assert_close(both, fixed)


def test_ddim_with_eta_1_is_ddpm_and_with_0_is_euler():
    points, x = Ddpm().points(12), NOISE[None]
    torch.testing.assert_close(
        diffusion.ddim(posterior, x, points, eta=1.0, generator=generator(3)),
        diffusion.ddpm(posterior, x, points, generator=generator(3)),
    )
    torch.testing.assert_close(
        diffusion.ddim(posterior, x, points), diffusion.euler(posterior, x, points), atol=0, rtol=0
    )


def test_euler_is_the_step_along_the_velocity():
    points, x = Flow(shift=3.0).points(9), NOISE.clone()
    for now, after in zip(points, points[1:], strict=False):
        x = x + (after.t - now.t) * gaussian.from_x0("velocity", posterior(x, now), x, now)
    torch.testing.assert_close(diffusion.euler(posterior, NOISE, points), x)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_clip_holds_x0(name):
    options = {"eta": 1.0} if name == "ddim" else {}
    out = getattr(diffusion, name)(
        lambda x, point: 5 + x, NOISE, Ddpm().points(5), clip=0.5, generator=generator(), **options
    )
    assert out.max() == 0.5  # the last step ends on x0


@pytest.mark.parametrize("name", RANDOM)
def test_an_item_does_not_depend_on_its_batch(name):
    points, x = Flow().points(5), NOISE.reshape(4, 500)
    whole = RANDOM[name](posterior, x, points, generator=[generator(seed) for seed in range(4)])
    alone = RANDOM[name](posterior, x[2:3], points, generator=[generator(2)])
    torch.testing.assert_close(whole[2:3], alone)
    again = RANDOM[name](posterior, x, points, generator=[generator(seed) for seed in range(1, 5)])
    assert not again.equal(whole)


@pytest.mark.parametrize("name", EVERY)
def test_progress_is_told_and_the_start_is_left_as_it_is(name):
    told, x = [], NOISE.clone()
    points = Flow().points(5, start=0.9)
    EVERY[name](posterior, x, points, generator=generator(), progress=lambda *done: told.append(done))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert x.equal(NOISE)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("start", [0.3, 1.0])
def test_from_any_start_of_a_flow(name, start):
    """Pure noise (alpha 0) counts in too; a signal corrupted to `start` arrives where the closed form says."""
    if name == "heun" and start == 1:
        pytest.skip("alpha must be above 0")
    points = Flow().points(200, start=start)
    out = EVERY[name](posterior, begun(points[0]), points, generator=generator(1))
    if name in EXACT:
        torch.testing.assert_close(out, M + S * NOISE, atol=0.03, rtol=0)
    else:
        assert out.std().item() == pytest.approx(S, abs=0.03)


@pytest.mark.parametrize("name", ["heun", "flow_heun"])
def test_heun_asks_twice_a_step_but_once_at_the_last(name):
    asked = []
    points = Flow().points(4, start=0.8)
    EXACT[name](lambda x, point: asked.append(point.t) or posterior(x, point), NOISE, points)
    assert asked == pytest.approx([0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2])  # never at 0


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_unipc_of_every_order(order, solver):
    """Of order + 1 by its corrector, seen where the lower orders of both ends go over tiny steps."""
    errors = []
    for steps in (20, 40, 80):
        line = [0.8 - 0.6 * i / steps for i in range(steps + 1)]
        tiny = [1e-5 * 2**i for i in range(order)]
        line = [*(0.8 + part for part in reversed(tiny)), *line, *(0.2 - part for part in tiny)]
        points = [Flow().at(t) for t in line]
        out = multistep.unipc(posterior, begun(points[0]), points, order=order, solver=solver)
        errors.append((out - begun(points[-1])).abs().max().item())
    orders = [math.log2(before / after) for before, after in zip(errors, errors[1:], strict=False)]
    assert orders[-1] > order + 0.6, (errors, orders)
