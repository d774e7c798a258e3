"""scheduler_config.json of diffusers: what is read, what is refused, and the same record back (numbers: reference/)."""

import dataclasses
import json

import pytest

from reverie.errors import InputError
from reverie.processes.gaussian import Ddpm, Flow
from reverie.samplers.configured import FUNCTIONS, SamplerConfig
from reverie.weights import diffusers_scheduler
from reverie.weights.files import ModelFileError
from reverie.weights.store import config_from


def test_published_files():
    """As they lie in the folders of the models, with keys left over from other classes."""
    dit = {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.12.0.dev0", "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": False, "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "set_alpha_to_one": True, "steps_offset": 0, "trained_betas": None,
    }  # fmt: skip
    assert diffusers_scheduler.read(dit) == SamplerConfig()
    stable = {
        "_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1,
        "use_karras_sigmas": True,
    }  # fmt: skip
    assert diffusers_scheduler.read(stable) == SamplerConfig(
        process=Ddpm(betas="scaled_linear", beta_start=0.00085, beta_end=0.012), offset=1, last="first"
    )
    sd3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    flow = SamplerConfig(process=Flow(shift=3.0), prediction="velocity", sampler="euler")
    assert diffusers_scheduler.read(sd3) == flow


@pytest.mark.parametrize(("record", "said"), [
    ([], "must be an object"),
    ({"_class_name": "PNDMScheduler"}, "PNDMScheduler.*known are DDPMScheduler"),
    ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding as True"),
    ({"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}, "linspace.*leading or trailing"),
    ({"_class_name": "DDIMScheduler", "something_new": 3}, "something_new"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type"),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "timestep_spacing": "trailing"}, "ends on noise"),
    ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule"),
    ({"_class_name": "DDPMScheduler", "trained_betas": [0.1]}, "trained_betas"),
    ({"_class_name": "DDPMScheduler", "steps_offset": "x"}, "steps_offset"),
    ({"_class_name": "DDPMScheduler", "beta_start": 2.0}, "betas"),
    ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas"),
    ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"}, "no flow"),
    ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, "clip_sample"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "order 3"),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type"),
    ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped"),
    ({"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}, "exponential"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
     "karras"),
    ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector"),
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "prediction_type"),
    ({"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, "unipc"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "stochastic_sampling"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True}, "karras"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "above 0"),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused(record, said):
    with pytest.raises(ModelFileError, match=said):
        diffusers_scheduler.read(record)


@pytest.mark.parametrize("config", [
    SamplerConfig(process=Flow(), prediction="velocity", sampler="euler_ancestral"),
    SamplerConfig(spacing="respaced"),
    SamplerConfig(sampler="ddpm", last="first"),
])  # fmt: skip
def test_what_diffusers_cannot_be_told_is_not_written(config):
    with pytest.raises(InputError):
        diffusers_scheduler.write(config)


def some(sampler):
    """Configurations of one sampler, as different as they may be."""
    unipc, multi = sampler == "unipc", sampler in ("unipc", "dpmpp_2m", "dpmpp_2m_sde")
    base = SamplerConfig(sampler=sampler, solver="bh2" if unipc else "midpoint")
    yield base
    yield dataclasses.replace(base, process=Ddpm(betas="cosine", steps=400, zero_snr=True), prediction="v")
    yield dataclasses.replace(base, spacing="trailing", offset=0, prediction="x0")
    if multi:
        yield dataclasses.replace(base, order=1, solver="bh1" if unipc else "heun", last="first")
    if sampler not in ("ddpm", "ddim", "euler_ancestral"):
        yield dataclasses.replace(base, sigmas="karras")
        yield dataclasses.replace(
            base, process=Flow(shift=3.0), prediction="velocity", times=500, spacing="leading"
        )


@pytest.mark.parametrize("sampler", FUNCTIONS)
def test_what_is_written_is_read_back(sampler):
    for config in some(sampler):
        if sampler == "heun" and getattr(config.process, "zero_snr", False):
            with pytest.raises(InputError, match="cannot be told"):
                diffusers_scheduler.write(config)
            continue
        record = json.loads(json.dumps(diffusers_scheduler.write(config)))
        assert diffusers_scheduler.read(record) == config


@pytest.mark.parametrize("sampler", FUNCTIONS)
def test_a_system_may_hold_it_in_its_config_file(sampler):
    for config in some(sampler):
        record = json.loads(json.dumps(dataclasses.asdict(config)))
        assert config_from(SamplerConfig, record, where="here") == config


@pytest.mark.parametrize(("options", "said"), [
    ({"sampler": "ddim", "process": Flow()}, "ddim needs a table"),
    ({"sampler": "dpmpp_2m", "order": 3}, "no order 3"),
    ({"sampler": "unipc"}, "unipc has no solver 'midpoint'"),
    ({"sampler": "dpmpp_2m", "solver": "bh2"}, "dpmpp_2m has no solver 'bh2'"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        SamplerConfig(**options)
