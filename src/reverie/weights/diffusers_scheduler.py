"""diffusers' `scheduler_config.json`, which says how a pipeline samples, as a `SamplerConfig` and back.

A key counts only where the named class takes it, as in diffusers: files keep keys of the classes that they came from.
What would give other numbers here is refused in one sentence, never passed over.
"""

from __future__ import annotations

import math
from typing import Any

from reverie.errors import InputError
from reverie.processes.gaussian import Ddpm, Flow
from reverie.samplers.configured import SamplerConfig
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import Fields

WHERE = "scheduler_config.json"
FLOW, FLOW_HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
DPMPP, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
CLASSES = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    DPMPP: "dpmpp_2m",
    UNIPC: "unipc",
    FLOW: "euler",
    FLOW_HEUN: "heun",
}
OF_SAMPLER = {"dpmpp_2m_sde": DPMPP} | {sampler: name for name, sampler in reversed(CLASSES.items())}

_TABLE = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
          "timestep_spacing", "steps_offset"}  # fmt: skip
_CLIPS = {
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
}
_SIGMAS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
_FLOWS = {"use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type"}
_ZERO = {"rescale_betas_zero_snr"}
_MULTI = _TABLE | _SIGMAS | _FLOWS | _ZERO | (_CLIPS - {"clip_sample", "clip_sample_range"}) | {
    "solver_order", "solver_type", "lower_order_final", "final_sigmas_type"
}  # fmt: skip
TAKES = {
    "DDPMScheduler": _TABLE | _CLIPS | _ZERO | {"variance_type"},
    "DDIMScheduler": _TABLE | _CLIPS | _ZERO | {"set_alpha_to_one"},
    "EulerDiscreteScheduler": _TABLE | _SIGMAS | _ZERO
    | {"interpolation_type", "sigma_min", "sigma_max", "timestep_type", "final_sigmas_type"},
    "EulerAncestralDiscreteScheduler": _TABLE | _ZERO,
    "HeunDiscreteScheduler": _TABLE | _SIGMAS | {"clip_sample", "clip_sample_range"},
    DPMPP: _MULTI | {"algorithm_type", "euler_at_final", "use_lu_lambdas", "lambda_min_clipped", "variance_type"},
    UNIPC: _MULTI | {"predict_x0", "disable_corrector", "solver_p", "sigma_min", "sigma_max", "shift_terminal"},
    FLOW: _SIGMAS | {"num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift",
                     "base_image_seq_len", "max_image_seq_len", "invert_sigmas", "shift_terminal",
                     "time_shift_type", "stochastic_sampling"},
    FLOW_HEUN: {"num_train_timesteps", "shift"},
}  # fmt: skip
KNOWN = {"_class_name", "_diffusers_version", "_use_default_values", "_name_or_path", "skip_prk_steps"}.union(
    *TAKES.values()
)
# Of the keys that a class takes: what Reverie can follow (the first is what counts where the key is absent).
ONLY: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,), "thresholding": (False,), "use_beta_sigmas": (False, None), "sigma_min": (None,),
    "sigma_max": (None,), "interpolation_type": ("linear",), "timestep_type": ("discrete",), "solver_p": (None,),
    "predict_x0": (True,), "disable_corrector": ([],), "use_lu_lambdas": (False,), "shift_terminal": (None,),
    "invert_sigmas": (False,), "stochastic_sampling": (False,), "lower_order_final": (True,),
}  # fmt: skip
PREDICTIONS = {"epsilon": "noise", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large",
             "learned_range": "learned_range"}  # fmt: skip


def read(record: Any) -> SamplerConfig:
    """The sampler that a record says; ModelFileError if it asks for what Reverie does not do."""
    given = Fields(record, where=WHERE)
    name = given.choice("_class_name", None, {each: each for each in CLASSES})
    given.only(KNOWN)
    given = Fields({key: value for key, value in given.record.items() if key in TAKES[name]}, where=WHERE)
    given.unlike(ONLY)
    try:
        return _flow(name, given) if _is_flow(name, given) else _table(name, given)
    except InputError as error:
        raise error if isinstance(error, ModelFileError) else ModelFileError(f"{WHERE}: {error}") from error


def _is_flow(name: str, given: Fields) -> bool:
    return name in (FLOW, FLOW_HEUN) or given.flag("use_flow_sigmas")


def _table(name: str, given: Fields) -> SamplerConfig:
    if given.flag("use_dynamic_shifting"):
        raise _refused("use_dynamic_shifting", True, "it needs use_flow_sigmas")
    heun = name == "HeunDiscreteScheduler"
    by_index = name in ("DDPMScheduler", "DDIMScheduler")
    process = Ddpm(
        steps=given.integer("num_train_timesteps", 1000),
        betas=given.choice("beta_schedule", "linear", BETAS),  # type: ignore[arg-type]  # ours, by the table
        beta_start=given.number("beta_start", 0.00085 if heun else 1e-4),
        beta_end=given.number("beta_end", 0.012 if heun else 0.02),
        zero_snr=given.flag("rescale_betas_zero_snr"),
    )
    prediction = given.choice("prediction_type", "epsilon", PREDICTIONS)
    if prediction == "velocity":
        raise _refused("prediction_type", "flow_prediction", "without use_flow_sigmas there is no flow")
    values: dict[str, Any] = {
        "process": process,
        "prediction": prediction,
        "sampler": CLASSES[name] if name != DPMPP else _dpmpp(given),
        "spacing": given.choice("timestep_spacing", "leading" if by_index else "linspace", SPACINGS),
        "offset": _offset(given),
        "sigmas": _sigmas(given),
    }
    final = given.choice("final_sigmas_type", "zero", {"zero": "clean", "sigma_min": "first"})
    values["last"] = final if given.flag("set_alpha_to_one", True) else "first"
    cut = name in (DPMPP, UNIPC) and values["sigmas"] == "exponential"
    if cut or (name == DPMPP and values["sigmas"] == "karras" and process.betas == "cosine"):
        raise _refused(
            f"use_{values['sigmas']}_sigmas",
            True,
            "diffusers tells this network times cut by rounding errors",
        )
    clip = given.flag("clip_sample", by_index)
    if clip and heun:
        raise _refused("clip_sample", True, "for this class it must be false")
    values["clip"] = given.number("clip_sample_range", 1.0) if clip else None
    if name == "DDPMScheduler":
        values["variance"] = given.choice("variance_type", "fixed_small", VARIANCES)
        ends_at_0 = values["spacing"] == "linspace" or (
            values["spacing"] == "leading" and not values["offset"]
        )
        if values["variance"] != "fixed_small" and not ends_at_0:
            raise _refused(
                "variance_type",
                given.record["variance_type"],
                "with these points diffusers ends on noise: use fixed_small",
            )
    if name == "DDIMScheduler" and values["spacing"] == "linspace":
        raise _refused(
            "timestep_spacing", "linspace", "diffusers' DDIM does not step along it: use leading or trailing"
        )
    return SamplerConfig(**values, **_multistep(name, given))


def _flow(name: str, given: Fields) -> SamplerConfig:
    if name in (DPMPP, UNIPC):
        if given.choice("prediction_type", "epsilon", PREDICTIONS) != "velocity":
            raise _refused(
                "prediction_type",
                given.record.get("prediction_type", "epsilon"),
                "a flow's is flow_prediction",
            )
        if given.record.get("final_sigmas_type", "zero") != "zero":
            raise _refused("final_sigmas_type", given.record["final_sigmas_type"], "a flow's is zero")
    if _sigmas(given) != "table":
        raise _refused("use_karras_sigmas or use_exponential_sigmas", True, "a flow has its own")
    dynamic = given.flag("use_dynamic_shifting")
    if dynamic and name != FLOW:
        raise _refused("use_dynamic_shifting", True, f"only {FLOW} says how")
    kind = given.choice("time_shift_type", "exponential", {"exponential": "log", "linear": "factor"})
    factor = given.number("flow_shift" if name in (DPMPP, UNIPC) else "shift", 1.0)
    tokens = tuple(
        given.number(key, default)
        for key, default in (
            ("base_image_seq_len", 256),
            ("max_image_seq_len", 4096),
            ("base_shift", 0.5),
            ("max_shift", 1.15),
        )
    )
    return SamplerConfig(
        process=Flow(shift=1.0 if dynamic else factor),
        prediction="velocity",
        sampler=CLASSES[name] if name != DPMPP else _dpmpp(given),  # type: ignore[arg-type]  # ours, by the table
        times=given.integer("num_train_timesteps", 1000),
        tokens=tokens if dynamic else None,  # type: ignore[arg-type]  # four of them
        tokens_log=kind == "log",
        **_multistep(name, given),
    )


def _multistep(name: str, given: Fields) -> dict[str, Any]:
    if name not in (DPMPP, UNIPC):
        return {}
    order = given.integer("solver_order", 2)
    if name == UNIPC:
        solver = given.choice("solver_type", "bh2", {"bh1": "bh1", "bh2": "bh2"})
        return {"order": order, "solver": solver}
    lowest = given.record.get("lambda_min_clipped", -math.inf)
    if lowest not in (None, -math.inf, "-inf", "-Infinity"):
        raise _refused("lambda_min_clipped", lowest, "it must be left out")
    if given.record.get("variance_type") is not None:
        raise _refused("variance_type", given.record["variance_type"], "for this class it must be null")
    return {
        "order": order,
        "solver": given.choice("solver_type", "midpoint", {"midpoint": "midpoint", "heun": "heun"}),
        "first_order_last": given.flag("euler_at_final"),
    }


def _dpmpp(given: Fields) -> str:
    kinds = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}
    return given.choice("algorithm_type", "dpmsolver++", kinds)


def _sigmas(given: Fields) -> str:
    kinds = [kind for kind in ("karras", "exponential") if given.record.get(f"use_{kind}_sigmas")]
    if len(kinds) > 1:
        raise _refused("use_karras_sigmas and use_exponential_sigmas", True, "one of both")
    return kinds[0] if kinds else "table"


def _offset(given: Fields) -> int:
    offset = given.record.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < 2**24:
        raise _refused("steps_offset", offset, "it must be a whole number of 0 or more")
    return offset


def _refused(key: str, value: Any, why: str) -> ModelFileError:
    return ModelFileError(f"{WHERE} gives {key} as {shorten(value)}, which Reverie cannot follow: {why}.")


def write(config: SamplerConfig) -> dict[str, Any]:
    """The record that `read` gives `config` for; InputError where diffusers has no such sampler."""
    flow = isinstance(config.process, Flow)
    lambdas = config.sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
    name = OF_SAMPLER[config.sampler]
    if flow and not lambdas:
        if config.sampler == "euler_ancestral":
            raise InputError("diffusers has no ancestral sampler of flows: choose another, such as euler.")
        name = FLOW if config.sampler == "euler" else FLOW_HEUN
    theirs = {ours: word for words in (PREDICTIONS, BETAS, SPACINGS) for word, ours in words.items()}
    record: dict[str, Any] = {"_class_name": name}
    if isinstance(config.process, Flow):
        record |= {"num_train_timesteps": config.times}
        shift = config.process.shift
        record |= {"flow_shift": shift, "use_flow_sigmas": True} if lambdas else {"shift": shift}
        if lambdas:
            record |= {"prediction_type": "flow_prediction"}
        if config.tokens is not None:
            keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            record |= {"use_dynamic_shifting": True, **dict(zip(keys, config.tokens, strict=True))}
        if name == FLOW:
            record |= {"time_shift_type": "exponential" if config.tokens_log else "linear"}
    else:
        if config.spacing not in SPACINGS:
            raise InputError(f"diffusers has no spacing {config.spacing!r}: linspace is nearest.")
        record |= {
            "num_train_timesteps": config.process.steps,
            "beta_start": config.process.beta_start,
            "beta_end": config.process.beta_end,
            "beta_schedule": theirs[config.process.betas],
            "prediction_type": theirs[config.prediction],
            "timestep_spacing": config.spacing,
            "steps_offset": config.offset,
            "rescale_betas_zero_snr": config.process.zero_snr,
            "use_karras_sigmas": config.sigmas == "karras",
            "use_exponential_sigmas": config.sigmas == "exponential",
            "final_sigmas_type": "sigma_min" if config.last == "first" else "zero",
            "set_alpha_to_one": config.last == "clean",
            "clip_sample": config.clip is not None,
            "clip_sample_range": config.clip or 1.0,
            "variance_type": config.variance if config.sampler == "ddpm" else None,
        }
    record |= {"solver_order": config.order, "solver_type": config.solver} if lambdas else {}
    if name == DPMPP:
        record["algorithm_type"] = "dpmsolver++" if config.sampler == "dpmpp_2m" else "sde-dpmsolver++"
        record["euler_at_final"] = config.first_order_last
    record = {key: value for key, value in record.items() if key == "_class_name" or key in TAKES[name]}
    if read(record) != config:
        raise InputError(f"diffusers' {name} cannot be told this sampler: {config}.")
    return record
