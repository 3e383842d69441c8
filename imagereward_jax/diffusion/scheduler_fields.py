"""The fields and classes of scheduler_config.json: which are read, which say nothing, and which are refused, and why.

A config may come from any scheduler of diffusers, with fields that another one left behind. So of each field it is
known whether a sampler reads it (`samplers.DEFAULTS`, `flow.FIELDS`), whether it is `HARMLESS`, which never refuses a
model, or `HARMFUL` at values that say that the network is of another kind, which always does, whatever the sampler.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from imagereward_jax.models.config import Fixed, check_unread

WHERE = "scheduler_config.json"
MAX_TIMESTEPS = 100_000
_LARGEST = 1e6  # of any number, up or down
_MOST = f"at most {_LARGEST:,.0f} in size"
_BETA_FIELDS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
# Fields of schedulers without betas (flow matching, EDM), by which a configuration without a class is told.
_WITHOUT_BETAS = ("shift", "base_shift", "max_shift", "stochastic_sampling", "sigma_data", "sigma_schedule")

# diffusers' schedulers whose configuration may leave out betas that are the default ones.
WITH_BETAS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
        *("DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete"),
        *("EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM"),
        *("RePaint", "SASolver", "TCD", "UnCLIP", "UniPCMultistep"),
    )
)
_EDM = "it scales the network's input and output by EDM's sigma_data, and has no betas"
_DISCRETE = "it replaces tokens by masks or other tokens, and adds no noise to latents"
_STAGES = "its flow runs in stages of rising resolution, as a video model's"
# diffusers' schedulers of models of other kinds, which no field beside makes readable, by the reason.
REFUSED_CLASSES = {
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "CMStochasticIterativeScheduler": "it is a consistency model's on EDM's sigmas, and has no betas",
    "CogVideoXDDIMScheduler": "its signal-to-noise ratio is scaled (snr_shift_scale), as CogVideoX was trained",
    "CogVideoXDPMScheduler": "its signal-to-noise ratio is scaled (snr_shift_scale), as CogVideoX was trained",
    "CosineDPMSolverMultistepScheduler": _EDM,
    "DDPMWuerstchenScheduler": "its schedule is a cosine of continuous time, and has no betas",
    "DiscreteDDIMScheduler": _DISCRETE,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "EDMEulerScheduler": _EDM,
    "EntropyBoundScheduler": _DISCRETE,
    "FlowMapEulerDiscreteScheduler": "its network is told a second timestep, at which the step ends",
    "HeliosDMDScheduler": _STAGES,
    "HeliosScheduler": _STAGES,
    "IPNDMScheduler": "its schedule is a sine of a time in [0, 1] that the network is told, not one of training steps",
    "KarrasVeScheduler": "its latents keep their scale while the noise grows (a variance-exploding process)",
    "LTXEulerAncestralRFScheduler": "it states no schedule: LTX-Video's program hands it the sigmas",
    "PiflowScheduler": "its network predicts a policy of many substeps, not a velocity",
    "SCMScheduler": "its latents are a sine and cosine mix of data and noise scaled by sigma_data (TrigFlow)",
    "ScoreSdeVeScheduler": "its latents keep their scale while the noise grows (a variance-exploding process)",
    "VQDiffusionScheduler": _DISCRETE,
}
# Fields that say that a network of betas is of another kind, with the values that do not.
HARMFUL = {
    "snr_shift_scale": Fixed((1.0,), "it replaces the schedule of betas by another (CogVideoX)"),
    "timestep_type": Fixed(("discrete",), "the network is told the logarithm of sigma, not a timestep"),
    "use_flow_sigmas": Fixed((False, None), "it replaces the schedule of betas by a flow, which this class has not"),
    "variance_type": Fixed(
        ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
        "the network outputs a variance beside its prediction",
    ),
}
# Fields that change nothing here.
HARMLESS = frozenset(
    {
        # Bounds of pixels, which lie in [-1, 1]. Latents have none, and all models here are latent ones: no sampler
        # clips, whatever these fields say (DDPM's and DDIM's do by default).
        *("clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "thresholding"),
        # Orders, starts and tolerances of PNDM's, SASolver's and others' own steps, which are not made here.
        *("corrector_order", "predictor_order", "skip_prk_steps", "solver_p", "tau_func"),
        # Noise that RePaint and LTX's sampler add by default; the caller states it here.
        *("eta", "s_noise"),
        # Left behind by a scheduler of EDM or a consistency model: a class with betas does not look at them.
        *("clip_denoised", "rho", "sigma_data", "sigma_schedule"),
        # Of flows: without use_flow_sigmas a class with betas does not look at them.
        *("base_image_seq_len", "base_shift", "flow_shift", "invert_sigmas", "max_image_seq_len", "max_shift", "shift"),
        *("shift_terminal", "stochastic_sampling", "time_shift_type", "use_dynamic_shifting"),
        "upscale_mode",  # how scale_factors enlarge latents; those are refused
    }
)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_positive(value):
    return _is_number(value) and value > 0


def _whole(least):
    return lambda value: type(value) is int and least <= value <= MAX_TIMESTEPS


def _list_of(fits):
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _or_null(fits):
    return lambda value: value is None or fits(value)


# {field: (whether a value fits, what is expected)}, of the fields that a schedule or a sampler reads.
_KINDS = {
    **dict.fromkeys(
        (
            *("beta_start", "beta_end", "shift", "base_shift", "max_shift", "flow_shift"),
            *("base_image_seq_len", "max_image_seq_len", "lambda_min_clipped"),
        ),
        (_is_number, f"a number, {_MOST}"),
    ),
    **dict.fromkeys(("sigma_min", "sigma_max"), (_or_null(_is_positive), f"a number above 0, {_MOST}, or null")),
    "timestep_scaling": (_is_positive, f"a number above 0, {_MOST}"),
    **dict.fromkeys(
        (
            *("rescale_betas_zero_snr", "use_dynamic_shifting", "use_flow_sigmas", "use_karras_sigmas"),
            *("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "lower_order_final"),
            *("set_alpha_to_one", "euler_at_final", "predict_x0"),
        ),
        (_or_null(lambda value: isinstance(value, bool)), "true or false"),
    ),
    **dict.fromkeys(
        ("_class_name", "beta_schedule", "prediction_type", "time_shift_type"),
        (_or_null(lambda value: isinstance(value, str)), "a text"),
    ),
    **dict.fromkeys(
        ("num_train_timesteps", "original_inference_steps", "solver_order"),
        (_whole(1), f"a whole number from 1 to {MAX_TIMESTEPS:,}"),
    ),
    "steps_offset": (_whole(0), f"a whole number from 0 to {MAX_TIMESTEPS:,}"),
    "trained_betas": (_or_null(_list_of(_is_number)), "a list of numbers, or null"),
    "disable_corrector": (_list_of(lambda step: type(step) is int), "a list of steps"),
    "_use_default_values": (_list_of(lambda name: isinstance(name, str)), "a list of names"),
}


def check_fields(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field of scheduler_config.json, for a value of another kind or beyond reason."""
    for field, value in config.items():
        # diffusers' default, which it writes to the file although JSON has no such number.
        if (field, value) == ("lambda_min_clipped", -math.inf):
            continue
        fits, expected = _KINDS.get(field, (lambda value: True, ""))
        if isinstance(value, float) and not math.isfinite(value):
            fits, expected = (lambda value: False), "a finite number"
        if not fits(value):
            raise ValueError(f"{WHERE}: {field}={value!r:.100}: expected {expected}")


def check_has_betas(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless a scheduler_config.json describes a noise schedule of betas.

    Flow-matching schedulers, EDM's and others have none; read as one of betas, they would train another model.
    """
    name, given = config.get("_class_name"), stated(config)
    advice = (
        "expected a schedule of betas (beta_start, beta_end and beta_schedule, or trained_betas; Stable Diffusion 1.x "
        "and SDXL have them) or a flow (FlowMatchEulerDiscreteScheduler, or use_flow_sigmas with "
        "prediction_type='flow_prediction'): open a model that was trained with one"
    )
    if name in REFUSED_CLASSES:
        raise ValueError(f"{WHERE}: _class_name={name!r}: {REFUSED_CLASSES[name]}; {advice}")
    has_betas = any(config.get(field) is not None for field in _BETA_FIELDS)
    if name is not None and name not in WITH_BETAS and not has_betas:
        raise ValueError(f"{WHERE}: _class_name={name!r} is a scheduler without betas; {advice}")
    if name is None and not has_betas:
        for field in _WITHOUT_BETAS:
            if field in given:
                raise ValueError(f"{WHERE}: {field}={given[field]!r} belongs to a scheduler without betas; {advice}")
    for field in HARMFUL.keys() & given.keys():
        # Of other predictions diffusers passes over it.
        if field != "timestep_type" or given.get("prediction_type") == "v_prediction":
            check_unread(WHERE, field, given[field], fixed=HARMFUL)


def check_known(config: Mapping[str, Any], read: Collection[str]) -> None:
    """Raises ValueError for a field that is neither `read` nor harmless. `check_has_betas` judges the harmful ones."""
    for field, value in stated(config).items():
        if field not in read and field not in HARMFUL:
            check_unread(WHERE, field, value, fixed={}, harmless=HARMLESS)


def one_of(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError, naming the field of scheduler_config.json and its value, unless `value` is in `allowed`."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{WHERE}: {field}={value!r} is not supported; supported: {choices}")


def stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a scheduler_config.json sets: no bookkeeping, and nothing that diffusers noted as a default."""
    defaulted = config.get("_use_default_values", ())
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in defaulted}
