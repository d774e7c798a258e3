"""Gaussian processes: the conversions agree with each other, and points and times are where they should be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.errors import InputError
from reverie.processes import gaussian
from reverie.processes.gaussian import CLEAN, Ddpm, Edm, Flow, Point

times = st.floats(gaussian.T_SMALLEST, 1)


def pair(seed=0):
    return torch.randn(2, 2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ends_of_the_line():
    x0, noise = pair()
    assert gaussian.corrupt(x0, noise, Flow().at(torch.tensor(0.0))).equal(x0)
    assert gaussian.corrupt(x0, noise, Flow().at(torch.tensor(1.0))).equal(noise)


@given(t=times, step=st.floats(-0.05, 0.05))
@settings(max_examples=30, deadline=None)
def test_the_velocity_leads_from_one_time_to_another(t, step):
    x0, noise = pair()
    now, after = (gaussian.corrupt(x0, noise, Flow().at(torch.tensor(at))) for at in (t, t + step))
    torch.testing.assert_close(now + step * gaussian.velocity(x0, noise), after, atol=1e-6, rtol=0)


@given(t=times)
@settings(max_examples=30, deadline=None)
def test_velocity_and_x0_say_the_same(t):
    x0, noise = pair()
    t = torch.tensor(t, dtype=torch.float64)
    x_t = gaussian.corrupt(x0, noise, Flow().at(t))
    torch.testing.assert_close(gaussian.velocity_from(x0, x_t, t), gaussian.velocity(x0, noise))


def test_every_frame_may_have_its_own_time():
    x0, noise = pair()
    t = torch.tensor([[0.0, 0.2, 0.7, 1.0]] * 2, dtype=torch.float64)
    x_t = gaussian.corrupt(x0, noise, Flow().at(t[:, None, :, None, None]))
    for frame in range(4):
        one = gaussian.corrupt(x0[:, :, frame], noise[:, :, frame], Flow().at(t[0, frame]))
        assert x_t[:, :, frame].equal(one)


@pytest.mark.parametrize("t", [0.0, 1e-6, 0.01])
def test_near_zero_the_velocity_stays_finite(t):
    x0, noise = pair()
    x_t = gaussian.corrupt(x0, noise, Flow().at(torch.tensor(t, dtype=torch.float64)))
    out = gaussian.velocity_from(x0, x_t, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(out, gaussian.velocity(x0, noise) * t / gaussian.T_SMALLEST)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 1.0), (-1.0, 0.5)])
def test_logit_normal_times(mean, std):
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = gaussian.logit_normal(normal, mean=mean, std=std)
    assert 0 < t.min() < t.max() < 1
    logits = torch.log(t / (1 - t))
    assert abs(logits.mean() - mean) < 0.02
    assert abs(logits.std() - std) < 0.02
    assert abs(t.median() - 1 / (1 + math.exp(-mean))) < 0.01


@given(t=st.floats(0, 1), factor=st.floats(1, 8))
@settings(max_examples=50, deadline=None)
def test_shift(t, factor):
    at = torch.tensor(t, dtype=torch.float64)
    shifted = gaussian.shift(at, factor)
    assert 0 <= shifted <= 1
    assert shifted >= at - 1e-12  # towards noise
    torch.testing.assert_close(gaussian.shift(shifted, 1 / factor), at)
    torch.testing.assert_close(gaussian.shift(shifted, 2.0), gaussian.shift(at, 2 * factor))  # shifts compose
    assert gaussian.shift(at, 1.0) == at
    for end in (0.0, 1.0):
        torch.testing.assert_close(gaussian.shift(torch.tensor(end), factor), torch.tensor(end))


def test_shift_is_a_ratio_of_odds():
    """SD3, equation 23: the odds of noise to data grow by the factor."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    out = gaussian.shift(t, 3.0)
    torch.testing.assert_close(out / (1 - out), 3 * t / (1 - t))


# What a network predicts -------------------------------------------------------------------------------------------

POINTS = {
    "flow": Flow().at(0.3),
    "ddpm": Ddpm().at(400),
    "edm": Edm().at(1.7),
    "one for each item": Flow().at(torch.tensor([0.2, 0.9], dtype=torch.float64).reshape(2, 1, 1, 1, 1)),
}


@pytest.mark.parametrize("prediction", ["x0", "noise", "v", "velocity"])
@pytest.mark.parametrize("name", POINTS)
def test_every_prediction_says_the_same(prediction, name):
    x0, noise = pair()
    point = POINTS[name]
    x_t = gaussian.corrupt(x0, noise, point)
    out = gaussian.target(prediction, x0, noise, point)
    torch.testing.assert_close(gaussian.to_x0(prediction, out, x_t, point), x0)
    torch.testing.assert_close(gaussian.from_x0(prediction, x0, x_t, point), out)
    torch.testing.assert_close(gaussian.noise_from(x0, x_t, point), noise)


def test_v_is_the_slope_on_the_circle_and_velocity_the_slope_on_the_line():
    """d x / d angle where alpha = cos, sigma = sin; d x / d t where alpha = 1 - t, sigma = t."""
    x0, noise = pair()

    def circle(angle):
        return gaussian.corrupt(x0, noise, Point(0, math.cos(angle), math.sin(angle)))

    slope = (circle(0.7001) - circle(0.6999)) / 0.0002
    v = gaussian.target("v", x0, noise, Point(0, math.cos(0.7), math.sin(0.7)))
    torch.testing.assert_close(slope, v, atol=1e-6, rtol=0)
    slope = gaussian.corrupt(x0, noise, Flow().at(0.6)) - gaussian.corrupt(x0, noise, Flow().at(0.5))
    torch.testing.assert_close(slope / 0.1, gaussian.velocity(x0, noise))


# Points ------------------------------------------------------------------------------------------------------------


def test_flow_times_fall_from_start_to_zero():
    for factor in (1.0, 3.0):
        for start in (1.0, 0.4):
            points = Flow(shift=factor).points(10, start=start)
            line = [point.t for point in points]
            assert len(line) == 11
            assert (line[0], line[-1]) == (start, 0)
            assert line == sorted(line, reverse=True)
            assert all(point == (point.t, 1 - point.t, point.t) for point in points)
    assert [point.t for point in Flow().points(4)] == [1, 0.75, 0.5, 0.25, 0]
    assert Flow(shift=3.0).points(4)[2].t == 0.75  # 3 / 2 / (1 + 2 / 2): more steps among the noise


def product(betas):
    """alpha^2 at the last of these betas, by plain multiplication."""
    return math.prod(1 - beta for beta in betas)


@pytest.mark.parametrize("steps", [10, 1000])
def test_ddpm_tables(steps):
    start, end = 0.00085, 0.012
    part = [i / (steps - 1) for i in range(steps)]
    betas = {
        "linear": [start + p * (end - start) for p in part],
        "scaled_linear": [(start**0.5 + p * (end**0.5 - start**0.5)) ** 2 for p in part],
    }
    for name, line in betas.items():
        process = Ddpm(steps=steps, betas=name, beta_start=start, beta_end=end)
        for index in (0, steps // 2, steps - 1):
            _, alpha, sigma = process.at(index)
            assert alpha**2 == pytest.approx(product(line[: index + 1]), rel=1e-10)
            assert alpha**2 + sigma**2 == pytest.approx(1)
    cosine = Ddpm(steps=1000, betas="cosine")
    first = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    for index in (0, 500, 900):
        square = math.cos(((index + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / first
        assert cosine.at(index).alpha ** 2 == pytest.approx(square, rel=1e-9)
    assert cosine.at(999).alpha > 0  # betas stop at 0.999


def test_zero_terminal_snr():
    """Lin et al.: the first level stays, the last is noise alone, and roots are moved linearly."""
    before, after = Ddpm(betas="scaled_linear"), Ddpm(betas="scaled_linear", zero_snr=True)
    assert after.at(999)[1:] == (0, 1)
    assert after.at(0).alpha == pytest.approx(before.at(0).alpha)
    a, b, last = (before.at(index).alpha for index in (0, 700, 999))
    assert after.at(700).alpha == pytest.approx((b - last) * a / (a - last))


def test_ddpm_takes_tensors_of_indices():
    t = torch.tensor([[3], [999]])
    point = Ddpm().at(t)
    for row, index in enumerate((3, 999)):
        assert point.alpha[row].item() == pytest.approx(Ddpm().at(index).alpha)
        assert point.sigma[row].item() == pytest.approx(Ddpm().at(index).sigma)


def test_spacings():
    """Lin et al., table 2, at 10 of 1,000 steps."""

    def told(**options):
        points = Ddpm().points(10, **options)
        assert points[-1] == CLEAN
        assert len(points) == 11
        return [point.t for point in points[:-1]]

    assert told() == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert told(offset=1) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert told(spacing="trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert told(spacing="linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert told(beyond=True) == [900, 810, 720, 630, 540, 450, 360, 270, 180, 90]
    assert told(spacing="linspace", beyond=True) == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]


@pytest.mark.parametrize("process", [Ddpm(), Ddpm(betas="cosine"), Ddpm(zero_snr=True)])
def test_an_index_is_found_again_by_its_ratio(process):
    for index in (0, 1, 250, 997):
        point = process.at(index)
        assert process.of_ratio(point.sigma / point.alpha).t == pytest.approx(index, abs=1e-6)
    between = process.at(500.5)
    assert process.at(500).sigma < between.sigma < process.at(501).sigma
    assert process.of_ratio(1e-9).t == 0
    assert process.of_ratio(1e9).t == process.steps - 1
    assert 500 < process.of_ratio(between.sigma / between.alpha).t < 501
    assert process.finite(999).alpha > 0
    assert process.finite(400)[1:] == pytest.approx(process.at(400)[1:])


def test_what_cannot_be_spaced_is_said():
    with pytest.raises(InputError, match=r"1001 steps .* process of 1000"):
        Ddpm().points(1001)
    with pytest.raises(InputError, match="offset of 500"):
        Ddpm().points(10, offset=500)
    for bad in (lambda: Ddpm().points(0), lambda: Flow().points(0), lambda: Edm().points(0)):
        with pytest.raises(InputError, match="0 steps"):
            bad()
    with pytest.raises(InputError, match="betas"):
        Ddpm(beta_start=0.5, beta_end=0.1)


# EDM ---------------------------------------------------------------------------------------------------------------


def test_karras_sigmas():
    line = gaussian.karras(18, low=0.002, high=80)
    assert (line[0], line[-1]) == (pytest.approx(80), pytest.approx(0.002))
    roots = [sigma ** (1 / 7) for sigma in line]
    steps = [b - a for a, b in zip(roots, roots[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 17)
    logs = [math.log(sigma) for sigma in gaussian.exponential(5, low=0.1, high=10)]
    assert logs == pytest.approx([math.log(10), math.log(10) / 2, 0, -math.log(10) / 2, -math.log(10)])


@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_edm_scalings(sigma):
    """What they are made for (EDM, appendix B.6): in and target of unit variance, and c_out as small as can be."""
    edm, point = Edm(sigma_data=0.7), Edm().at(sigma)
    x0, noise = 0.7 * torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise / 0.7
    x_t = gaussian.corrupt(x0, noise, point)
    assert point.t == pytest.approx(math.log(sigma) / 4)
    assert edm.scaled(x_t, point).std().item() == pytest.approx(1, abs=0.01)
    wanted = edm.out(x0, x_t, point)
    assert wanted.std().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(edm.x0(wanted, x_t, point), x0)
    # a network that knows nothing says 0, and c_skip x is then the best linear guess: its error is uncorrelated to x
    guess = edm.x0(torch.zeros_like(x_t), x_t, point)
    assert abs(((x0 - guess) * x_t).mean().item()) < 0.02 * max(sigma, 1)


def test_edm_training_sigmas():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    log = Edm().draw(normal).log()
    assert log.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log.std().item() == pytest.approx(1.2, abs=0.02)


# Shifts ------------------------------------------------------------------------------------------------------------


def test_shifts_of_the_papers():
    assert gaussian.shift_sd3(4096, trained=1024) == 2
    assert gaussian.shift_flux(256) == pytest.approx(math.exp(0.5))
    assert gaussian.shift_flux(4096) == pytest.approx(math.exp(1.15))
    mu = math.log(gaussian.shift_flux(1024))
    for t in (0.1, 0.8):  # FLUX's own spelling of the same shift
        assert gaussian.shift(t, math.exp(mu)) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t - 1))
    assert gaussian.shift_open_sora(256) == 1
    assert gaussian.shift_open_sora(4096, frames=9) == 9
