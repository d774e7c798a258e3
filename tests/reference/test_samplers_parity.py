"""Every sampler beside diffusers' scheduler, step by step: the same network, the same noise, the same points.

What is compared at each step is what the network is given: the signal, and the time that it is told.
"""

import functools
import json
import math

import pytest
import torch

from reverie.errors import InputError
from reverie.processes import gaussian
from reverie.processes.gaussian import Ddpm, Edm, Flow
from reverie.samplers import diffusion
from reverie.samplers.guidance import guided
from reverie.weights import diffusers_scheduler

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 6, 5)
MIX = torch.randn(SHAPE[1], SHAPE[1], generator=torch.Generator().manual_seed(9)) / 2
SEED = 11


def network(x, t):
    """Something nonlinear of `x b c h w` and a time of about 0 to 1000."""
    mixed = torch.einsum("bchw,cd->bdhw", x, MIX) + math.cos(t / 150)
    return torch.tanh(mixed) + 0.3 * torch.sin(2 * x + t / 300)


def theirs(scheduler, noise, steps, *, output=network, set_options=None, **options):
    """What the network saw, what it was told, and the last sample."""
    scheduler.set_timesteps(steps, **(set_options or {}))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # as pipelines do: two points may be told alike
    x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    seen = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        seen.append((scaled, float(t)))
        x = scheduler.step(output(scaled, float(t)), t, x, **options).prev_sample
    return seen, x


def ours(config, noise, steps, *, output=network, tokens=None, **options):
    points = config.points(steps, tokens=tokens)
    unit = config.times if isinstance(config.process, Flow) else 1
    seen = []

    def predict(x, point):
        seen.append((x, point.t * unit))
        out = output(x, point.t * unit)
        out, v = out.chunk(2, dim=1) if out.shape[1] > x.shape[1] else (out, None)
        x0 = gaussian.to_x0(config.prediction, out, x, point)
        return x0 if v is None else torch.cat([x0, v], dim=1)

    generator = torch.Generator().manual_seed(SEED)
    x = config.run(predict, config.first(noise, points), points, generator=generator, **options)
    return seen, x, points


def compare(scheduler, steps, *, tolerance=1e-5, as_it_is=2e-4, told=1e-3, tokens=None, mu=None, **options):
    """Their scheduler beside what its file says here: as it is, and with its table of alphas in float64.

    In float32 the table's 1 - alpha^2 is off by up to 2e-4 where it is small; without that the steps agree to 1e-5.
    """
    config = diffusers_scheduler.read(json.loads(scheduler.to_json_string()))
    assert diffusers_scheduler.read(json.loads(json.dumps(diffusers_scheduler.write(config)))) == config
    error(scheduler, config, steps, as_it_is, told, tokens, mu, **options)
    if isinstance(config.process, Ddpm):
        scheduler.alphas_cumprod = exact_table(config.process, config.sampler not in ("ddpm", "ddim"))
        if config.last == "first":
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    error(scheduler, config, steps, tolerance, told, tokens, mu, **options)


@functools.cache
def exact_table(process, finite):
    at = process.finite if finite else process.at
    return torch.tensor([at(t).alpha ** 2 for t in range(process.steps)], dtype=torch.float64)


def error(scheduler, config, steps, tolerance, told, tokens, mu, *, eta=None, output=network):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    options = {} if eta is None else {"eta": eta}
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = torch.Generator().manual_seed(SEED)
    set_options = None if mu is None else {"mu": mu}
    expected, last = theirs(scheduler, noise, steps, output=output, set_options=set_options, **options)
    options.pop("generator", None)
    got, x, points = ours(config, noise, steps, output=output, tokens=tokens, **options)
    assert x.isfinite().all()
    assert len(got) == len(expected)
    for (_, t), (_, their_t) in zip(got, expected, strict=True):
        assert t == pytest.approx(their_t, abs=told)
    pairs = [(a, b) for (a, _), (b, _) in zip(got, expected, strict=True)]
    if points[-1].sigma > 0 and config.sampler in ("euler", "heun"):
        last = last * points[-1].alpha  # they end on x / alpha
    if config.solver == "bh1" and points[-1].sigma == 0:
        assert (
            last.isnan().all()
        )  # their last step divides by infinity: only the steps before can be compared
    else:
        pairs.append((x, last))
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    assert all(each < tolerance for each in errors), f"relative errors {errors}"


TABLES = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
]
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
# Every pair of table, spacing and prediction once.
SQUARE = [(TABLES[i], SPACINGS[j], PREDICTIONS[(i + j) % 3]) for i in range(3) for j in range(3)]


@pytest.mark.parametrize(
    ("table", "spacing", "prediction"), [each for each in SQUARE if each[1] != "linspace"]
)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(table, spacing, prediction, eta):
    for clip in (False, True):
        scheduler = diffusers.DDIMScheduler(
            **table, timestep_spacing=spacing, prediction_type=prediction, clip_sample=clip
        )
        compare(scheduler, 10, eta=eta)


@pytest.mark.parametrize("options", [
    {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, **TABLES[1]},  # Stable Diffusion's
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing", **TABLES[1]},
    {"clip_sample": True, "clip_sample_range": 0.3},
    {"num_train_timesteps": 400, "clip_sample": False},
])  # fmt: skip
def test_ddim_s_options(options):
    compare(diffusers.DDIMScheduler(**options), 20, eta=0.0)


@pytest.mark.parametrize("steps", [7, 25, 250])
def test_the_ddim_of_diffusers_dit_pipeline(steps):
    """scheduler_config.json of DiT-XL-2-256 and 512."""
    compare(diffusers.DDIMScheduler(clip_sample=False, steps_offset=0, set_alpha_to_one=True), steps, eta=0.0)


@pytest.mark.parametrize(("table", "spacing", "prediction"), SQUARE)
def test_ddpm(table, spacing, prediction):
    for steps, clip in ((10, False), (33, True)):
        scheduler = diffusers.DDPMScheduler(
            **table, timestep_spacing=spacing, prediction_type=prediction, clip_sample=clip
        )
        compare(scheduler, steps)


@pytest.mark.parametrize("variance", ["fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_ddpm_s_variances(variance, spacing):
    def output(x, t):
        out = network(x, t)
        return torch.cat([out, torch.sin(x + t)], dim=1) if variance == "learned_range" else out

    scheduler = diffusers.DDPMScheduler(
        variance_type=variance, timestep_spacing=spacing, clip_sample=variance == "fixed_large"
    )
    for steps in (8, 25):
        compare(scheduler, steps, output=output)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"])
def test_the_samplers_by_sigma(table, spacing, prediction, name):
    """diffusers counts in x / alpha, which begins at 20,000 on the cosine table, and loses digits of fp32 there."""
    huge = table == TABLES[2] and spacing != "leading"
    if huge and name == "HeunDiscrete":
        pytest.skip("two digits are left of the difference of slopes (in float64 it agrees to 4e-6)")
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        **table, timestep_spacing=spacing, prediction_type=prediction, steps_offset=int(spacing == "leading")
    )
    compare(scheduler, 12, **({"tolerance": 1e-3, "as_it_is": 1e-3} if huge else {}))


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_other_sigmas(name, spacing, kind):
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        **TABLES[1], timestep_spacing=spacing, **{f"use_{kind}_sigmas": True}
    )
    compare(scheduler, 9, told=2e-3)


@pytest.mark.parametrize("options", [
    {"final_sigmas_type": "sigma_min"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing", **TABLES[1]},
])  # fmt: skip
def test_euler_s_options(options):
    """Zero SNR: diffusers begins at x / alpha = 4,096."""
    compare(diffusers.EulerDiscreteScheduler(**options), 8, tolerance=5e-5)


@pytest.mark.parametrize(("table", "spacing", "prediction"), SQUARE)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpmpp(table, spacing, prediction, algorithm):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **table, timestep_spacing=spacing, prediction_type=prediction, algorithm_type=algorithm
    )
    compare(scheduler, 11)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("options", [
    {"solver_type": "heun"}, {"solver_order": 1}, {"use_karras_sigmas": True},
    {"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
    {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing", **TABLES[1]},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
])  # fmt: skip
def test_dpmpp_s_options(algorithm, options):
    for steps in (6, 20):
        compare(diffusers.DPMSolverMultistepScheduler(algorithm_type=algorithm, **options), steps)


@pytest.mark.parametrize(("table", "spacing", "prediction"), SQUARE)
def test_unipc(table, spacing, prediction):
    scheduler = diffusers.UniPCMultistepScheduler(
        **table, timestep_spacing=spacing, prediction_type=prediction
    )
    compare(scheduler, 11)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("options", [
    {}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
])  # fmt: skip
def test_unipc_s_options(order, solver, options):
    for steps in (2, 6, 20):
        compare(diffusers.UniPCMultistepScheduler(solver_order=order, solver_type=solver, **options), steps)


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_the_unipc_of_wan(shift, steps):
    """Wan 2.1's scheduler_config.json: shift 3 for 480p, 5 for 720p; the network is told whole thousandths."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    compare(scheduler, steps)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
def test_flow_match(shift, name):
    for steps in (1, 7, 28):
        compare(getattr(diffusers, f"{name}Scheduler")(shift=shift), steps)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_tokens(kind):
    """FLUX's: mu from the tokens, as its pipeline computes it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    compare(scheduler, 9, mu=mu, tokens=1024)
    config = diffusers_scheduler.read(json.loads(scheduler.to_json_string()))
    with pytest.raises(InputError, match="how many tokens"):
        config.points(9)


def test_edm():
    """diffusers' EDMEulerScheduler: c_skip, c_out, c_in, c_noise, and Karras's sigmas."""
    scheduler = diffusers.EDMEulerScheduler()
    edm, noise = Edm(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(12)
    x = noise * scheduler.init_noise_sigma
    expected = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        expected.append((scaled, float(t)))
        x = scheduler.step(network(scaled, float(t)), t, x).prev_sample
    got = []

    def predict(x, point):
        got.append((edm.scaled(x, point), point.t))
        return edm.x0(network(*got[-1]), x, point)

    points = edm.points(12)
    out = diffusion.euler(predict, noise * (points[0].sigma ** 2 + 1) ** 0.5, points)
    for (a, t), (b, their_t) in zip(got, expected, strict=True):
        assert t == pytest.approx(their_t, abs=1e-5)
        assert ((a - b).abs().max() / b.abs().max()).item() < 2e-5
    assert ((out - x).abs().max() / x.abs().max()).item() < 2e-5


def test_rescaled_guidance():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    point = Ddpm().at(600)
    with_text, without = network(x, 600.0), network(x, 100.0)

    def predict(both, point):
        return gaussian.to_x0("v", torch.cat([with_text, without]), both, point)

    expected = rescale_noise_cfg(without + 7.5 * (with_text - without), with_text, guidance_rescale=0.7)
    got = guided(predict, 7.5, rescale=0.7, spread_of="v")(x, point)
    torch.testing.assert_close(gaussian.from_x0("v", got, x, point), expected, atol=1e-4, rtol=1e-4)
