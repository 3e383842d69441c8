"""The registry of samplers: which there are, which fields of scheduler_config.json they read, and how one is made."""

import difflib
from collections.abc import Mapping

import numpy as np

from imagereward_jax.diffusion import solvers
from imagereward_jax.diffusion.sampler import Sampler
from imagereward_jax.diffusion.schedule import PREDICTION_TYPES, SCHEDULE_DEFAULTS, check_has_betas, one_of, stated

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
SAMPLERS = tuple(_SOLVERS)


def check_sampler(name: str) -> None:
    """Raises ValueError, with the nearest name there is, unless `name` is a sampler."""
    if name not in _SOLVERS:
        close = difflib.get_close_matches(str(name), _SOLVERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown sampler {name!r}; did you mean {close!r}? There are: {', '.join(_SOLVERS)}")


def make_sampler(name: str, scheduler_config: Mapping, num_steps: int, eta: float = 0.0) -> Sampler:
    """A sampler configured from a checkpoint's scheduler, whichever class that names.

    Fields that the named diffusers class does not have are ignored, fields that the checkpoint lacks take its defaults
    (`DDIMScheduler.from_config(pndm_config)` does the same).

    Args:
        name: "ddpm", "ddim", "euler", "euler_ancestral" or "dpmpp_2m".
        scheduler_config: the content of scheduler_config.json.
        num_steps: how many times the network is called.
        eta: for DDIM, from 0 (deterministic) to 1 (as noisy as DDPM).

    Raises:
        ValueError: naming the argument or field, its value and what is supported.
    """
    check_sampler(name)
    config = _read_config(name, scheduler_config)
    train_steps = config["num_train_timesteps"]
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"num_steps={num_steps} should be from 1 to {train_steps}, the number of training steps")
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


def _read_config(name, scheduler_config):
    check_has_betas(scheduler_config)
    given = stated(scheduler_config)
    if unknown := sorted(given.keys() - _KNOWN):
        raise ValueError(f"scheduler_config.json: {unknown[0]}={given[unknown[0]]!r} is not a field that is known")
    config = {key: given.get(key, default) for key, default in DEFAULTS[name].items()}
    for field in config.keys() & _ALLOWED.keys():
        one_of(field, config[field], _ALLOWED[field])
    return config
