"""The registry of samplers: which there are, which fields of scheduler_config.json they read, and how one is made."""

import difflib
from collections.abc import Mapping

import numpy as np

from imagereward_jax.diffusion import flow, solvers
from imagereward_jax.diffusion.sampler import Sampler
from imagereward_jax.diffusion.schedule import (
    PREDICTION_TYPES,
    SCHEDULE_DEFAULTS,
    check_has_betas,
    one_of,
    stated,
)

_SPACED = SCHEDULE_DEFAULTS | {"steps_offset": 0}
_SIGMAS = {
    "timestep_spacing": "linspace",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
# The fields of scheduler_config.json that each sampler reads, with the defaults of diffusers' class.
DEFAULTS = {
    "ddpm": _SPACED | {"timestep_spacing": "leading", "variance_type": "fixed_small"},
    "ddim": _SPACED | {"timestep_spacing": "leading", "set_alpha_to_one": True},
    "euler": _SPACED
    | _SIGMAS
    | {"interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None, "sigma_max": None},
    "euler_ancestral": _SPACED | {"timestep_spacing": "linspace"},
    "dpmpp_2m": _SPACED
    | _SIGMAS
    | {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
}
# Pixels lie in [-1, 1], so schedulers bound the predicted sample, DDPM's and DDIM's by default. Latents have no bounds,
# and all models here are latent ones: no sampler clips, whatever these fields say.
_OF_PIXEL_SPACE = {
    *("clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "thresholding"),
}
# Fields of the other schedulers that one checkpoint may be sampled with; they say nothing about these.
_OF_OTHER_SCHEDULERS = {
    *("disable_corrector", "flow_shift", "predict_x0", "rho", "shift_terminal", "sigma_data", "sigma_schedule"),
    *("skip_prk_steps", "solver_p", "time_shift_type"),
}
_KNOWN = (_OF_PIXEL_SPACE | _OF_OTHER_SCHEDULERS).union(*DEFAULTS.values())
_FLOW_KNOWN = _KNOWN.union(flow.FIELDS, flow.ALLOWED)

# The only values implemented. The solver types of other multistep schedulers mean midpoint, as in diffusers.
_ALLOWED = {
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_order": (2,),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
}


_SOLVERS = {
    "ddpm": solvers.ddpm,
    "ddim": solvers.ddim,
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "dpmpp_2m": solvers.dpmpp_2m,
}
# Those of flows with fresh noise, and the largest eta that they take.
NOISY_FLOWS = {"flow_sde": np.inf, "dance_sde": np.inf, "cps": 1.0}
_FLOW_SOLVERS = {
    "euler": solvers.flow_euler,
    "heun": solvers.flow_heun,
    "dpmpp_2m": solvers.flow_dpmpp_2m,
    "flow_sde": solvers.flow_sde,
    "dance_sde": solvers.flow_dance,
    "cps": solvers.flow_cps,
}
SAMPLERS = tuple(_SOLVERS | _FLOW_SOLVERS)  # the schedule decides which of the two a name stands for


def check_sampler(name: str) -> None:
    """Raises ValueError, with the nearest name there is, unless `name` is a sampler."""
    if name not in SAMPLERS:
        close = difflib.get_close_matches(str(name), SAMPLERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown sampler {name!r}; did you mean {close!r}? There are: {', '.join(SAMPLERS)}")


def samplers_of(scheduler_config: Mapping) -> tuple[str, ...]:
    """The samplers that there are for the schedule of a scheduler_config.json."""
    return tuple(_FLOW_SOLVERS if flow.is_flow(scheduler_config) else _SOLVERS)


def make_sampler(
    name: str, scheduler_config: Mapping, num_steps: int, eta: float = 0.0, image_tokens: int | None = None
) -> Sampler:
    """A sampler configured from a checkpoint's scheduler, whichever class that names.

    Fields that the named diffusers class does not have are ignored, fields that the checkpoint lacks take its defaults
    (`DDIMScheduler.from_config(pndm_config)` does the same).

    Args:
        name: of a schedule of betas "ddpm", "ddim", "euler", "euler_ancestral" or "dpmpp_2m"; of a flow "euler",
            "heun" or "dpmpp_2m", and with fresh noise "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps".
        scheduler_config: the content of scheduler_config.json.
        num_steps: how many times the network is called. Heun's method calls it twice per step but the last: 2n - 1
            for diffusers' n steps.
        eta: for DDIM, from 0 (deterministic) to 1 (as noisy as DDPM); for "cps" from 0 to 1, for "flow_sde" and
            "dance_sde" from 0: each is euler at 0.
        image_tokens: of the image in the network's sequence; needed by flows with use_dynamic_shifting.

    Raises:
        ValueError: naming the argument or field, its value and what is supported.
    """
    check_sampler(name)
    if name not in (fitting := samplers_of(scheduler_config)):
        kind = "a flow" if flow.is_flow(scheduler_config) else "a schedule of betas"
        raise ValueError(
            f"sampler {name!r} does not fit scheduler_config.json ({_class_of(scheduler_config)}), which is {kind}: "
            f"take {', '.join(fitting)}"
        )
    if flow.is_flow(scheduler_config):
        return _make_flow_sampler(name, scheduler_config, num_steps, eta, image_tokens)
    config = _read_config(name, scheduler_config)
    train_steps = config["num_train_timesteps"]
    _check_num_steps(num_steps, train_steps)
    if not 0 <= eta <= (1 if name == "ddim" else 0):
        raise ValueError(f"eta={eta} should be in [0, 1] for ddim and 0 for other samplers (here {name})")
    sampler = _SOLVERS[name](config, num_steps, eta)
    if sampler.timesteps.max() > train_steps - 1:
        raise ValueError(
            f"num_steps={num_steps} with steps_offset={config['steps_offset']} begins at timestep "
            f"{sampler.timesteps.max():g}, past the last training step {train_steps - 1}; take fewer steps"
        )
    if not all(np.isfinite(table).all() for table in sampler.weights):
        raise ValueError(f"{name} cannot take num_steps={num_steps}: some steps would not move; take fewer steps")
    return sampler


def _make_flow_sampler(name, scheduler_config, num_steps, eta, image_tokens):
    schedule, config = flow.FlowSchedule.from_config(scheduler_config), _read_flow_config(name, scheduler_config)
    _check_num_steps(num_steps, schedule.num_train_timesteps)
    if not 0 <= eta <= NOISY_FLOWS.get(name, np.inf):
        raise ValueError(f"eta={eta} should be {'at least 0' if eta < 0 else 'in [0, 1]'} for {name}")
    if eta and name not in NOISY_FLOWS:
        raise ValueError(
            f"eta={eta} should be 0: {name} follows the flow's ordinary differential equation, whose steps add no "
            f"noise; those of {', '.join(NOISY_FLOWS)} do"
        )
    if name == "heun" and num_steps % 2 == 0:
        raise ValueError(
            f"num_steps={num_steps} should be odd for heun, which calls the network twice per step but the last: "
            f"take {num_steps - 1} or {num_steps + 1}"
        )
    return _FLOW_SOLVERS[name](schedule, num_steps, image_tokens, config, eta)


def _check_num_steps(num_steps, train_steps):
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"num_steps={num_steps} should be from 1 to {train_steps}, the number of training steps")


def _class_of(scheduler_config):
    return scheduler_config.get("_class_name", "no _class_name")


def _read_config(name, scheduler_config):
    check_has_betas(scheduler_config)
    given = stated(scheduler_config)
    _check_known(given, _KNOWN)
    config = {key: given.get(key, default) for key, default in DEFAULTS[name].items()}
    for field in config.keys() & _ALLOWED.keys():
        one_of(field, config[field], _ALLOWED[field])
    return config


def _read_flow_config(name, scheduler_config):
    """The fields that a sampler reads beside those of the flow: DPM-Solver++'s own."""
    given = stated(scheduler_config)
    _check_known(given, _FLOW_KNOWN)
    if name != "dpmpp_2m":
        return {}
    config = {key: given.get(key, default) for key, default in DEFAULTS[name].items() if key not in flow.ALLOWED}
    for field in config.keys() & _ALLOWED.keys():
        one_of(field, config[field], _ALLOWED[field])
    return config


def _check_known(given, known):
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"scheduler_config.json: {unknown[0]}={given[unknown[0]]!r} is not a field that is known")
