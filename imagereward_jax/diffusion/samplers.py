"""The registry of samplers: which there are, which fields of scheduler_config.json they read, and how one is made."""

import difflib
from collections.abc import Mapping

import numpy as np

from imagereward_jax.diffusion import flow, flow_solvers, solvers
from imagereward_jax.diffusion.sampler import Sampler
from imagereward_jax.diffusion.schedule import PREDICTION_TYPES, SCHEDULE_DEFAULTS, schedule_defaults
from imagereward_jax.diffusion.scheduler_fields import check_has_betas, check_known, one_of, stated

_SPACED = SCHEDULE_DEFAULTS | {"steps_offset": 0}
_SPACINGS = {
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_ENDS = {"sigma_min": None, "sigma_max": None}  # of sigmas that are spaced anew
_MULTISTEP = {"final_sigmas_type": "zero", "solver_order": 2, "lower_order_final": True}
_DISTILLED = {"original_inference_steps": 50}
# The fields of scheduler_config.json that each sampler reads, with the defaults of diffusers' class.
DEFAULTS = {
    "ddpm": _SPACED | {"timestep_spacing": "leading", "variance_type": "fixed_small"},
    "ddim": _SPACED | {"timestep_spacing": "leading", "set_alpha_to_one": True},
    "lcm": _SPACED | _DISTILLED | {"timestep_scaling": 10.0},
    "tcd": _SPACED | _DISTILLED,
    "euler": _SPACED | _SPACINGS | _ENDS | {"final_sigmas_type": "zero", "interpolation_type": "linear"},
    "euler_ancestral": _SPACED | {"timestep_spacing": "linspace"},
    "heun": _SPACED | _SPACINGS,
    "dpmpp_2m": _SPACED
    | _SPACINGS
    | _MULTISTEP
    | {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
    },
    "unipc": _SPACED
    | _SPACINGS
    | _ENDS
    | _MULTISTEP
    | {"solver_type": "bh2", "predict_x0": True, "disable_corrector": (), "solver_p": None},
}
_READ = frozenset().union(*DEFAULTS.values())
_FLOW_FIELDS = frozenset(flow.FIELDS).union(flow.ALLOWED)
_FLOW_READ = _READ | _FLOW_FIELDS

# The only values implemented, of fields that a sampler reads. Names of other multistep schedulers' types mean the
# sampler's own type, as in diffusers.
_ALLOWED = {
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "algorithm_type": ("dpmsolver++", "deis", "data_prediction"),
}
_ALLOWED_OF = {
    "dpmpp_2m": {"solver_order": (2,), "solver_type": ("midpoint", "logrho", "bh1", "bh2")},
    "unipc": {
        "solver_order": (1, 2),
        "solver_type": ("bh1", "bh2", "midpoint", "heun", "logrho"),
        "predict_x0": (True,),
        "solver_p": (None,),
    },
}


_SOLVERS = {
    "ddpm": solvers.ddpm,
    "ddim": solvers.ddim,
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "heun": solvers.heun,
    "dpmpp_2m": solvers.dpmpp_2m,
    "unipc": solvers.unipc,
    "lcm": solvers.lcm,
    "tcd": solvers.tcd,
}
# Those of betas with fresh noise by eta, which is at most 1.
_NOISY = ("ddim", "tcd")
# Those of flows with fresh noise by eta, and the largest that they take.
NOISY_FLOWS = {"flow_sde": np.inf, "dance_sde": np.inf, "cps": 1.0}
_FLOW_SOLVERS = {
    "euler": flow_solvers.flow_euler,
    "heun": flow_solvers.flow_heun,
    "dpmpp_2m": flow_solvers.flow_dpmpp_2m,
    "unipc": flow_solvers.flow_unipc,
    "lcm": flow_solvers.flow_lcm,
    "flow_sde": flow_solvers.flow_sde,
    "dance_sde": flow_solvers.flow_dance,
    "cps": flow_solvers.flow_cps,
}
SAMPLERS = tuple(_SOLVERS | _FLOW_SOLVERS)  # the schedule decides which of the two a name stands for


def check_sampler(name: str) -> None:
    """Raises ValueError, with the nearest name there is, unless `name` is a sampler."""
    if name not in SAMPLERS:
        close = difflib.get_close_matches(str(name), SAMPLERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown sampler {name!r}; did you mean {close!r}? There are: {', '.join(SAMPLERS)}")


def check_scheduler_config(scheduler_config: Mapping) -> None:
    """Raises ValueError for a field of scheduler_config.json of which nobody knows what it changes."""
    check_known(scheduler_config, _FLOW_READ if flow.is_flow(scheduler_config) else _READ)


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
        name: of a schedule of betas "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m" or "unipc", for
            models distilled to few steps "lcm" or "tcd"; of a flow "euler", "heun", "dpmpp_2m", "unipc" or "lcm", and
            with fresh noise "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps".
        scheduler_config: the content of scheduler_config.json.
        num_steps: how many times the network is called. Heun's method calls it twice per step but the last: 2n - 1
            for diffusers' n steps.
        eta: for DDIM, from 0 (deterministic) to 1 (as noisy as DDPM); for TCD, where it is the paper's gamma, alike;
            for "cps" from 0 to 1, for "flow_sde" and "dance_sde" from 0: each is euler at 0.
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
    _check_num_steps(num_steps, config["num_train_timesteps"])
    if not 0 <= eta <= (1 if name in _NOISY else 0):
        raise ValueError(f"eta={eta} should be in [0, 1] for ddim and tcd, and 0 for other samplers (here {name})")
    _check_heun(name, num_steps)
    return _moving(_SOLVERS[name](config, num_steps, eta), name, num_steps)


def _make_flow_sampler(name, scheduler_config, num_steps, eta, image_tokens):
    schedule, config = flow.FlowSchedule.from_config(scheduler_config), _read_flow_config(name, scheduler_config)
    _check_num_steps(num_steps, schedule.num_train_timesteps)
    if not 0 <= eta <= NOISY_FLOWS.get(name, np.inf):
        raise ValueError(f"eta={eta} should be {'at least 0' if eta < 0 else 'in [0, 1]'} for {name}")
    if eta and name not in NOISY_FLOWS:
        raise ValueError(
            f"eta={eta} should be 0: {name} has no noise that eta scales; the steps of {', '.join(NOISY_FLOWS)} do"
        )
    _check_heun(name, num_steps)
    if schedule.spacing and name in _ALLOWED_OF:
        raise ValueError(
            f"scheduler_config.json: {schedule.spacing}=True is not implemented for {name} on a flow; take euler"
        )
    return _moving(_FLOW_SOLVERS[name](schedule, num_steps, image_tokens, config, eta), name, num_steps)


def _moving(sampler, name, num_steps):
    """The sampler, unless steps of no length made its weights infinite."""
    if not all(np.isfinite(table).all() for table in sampler.weights if table is not None):
        raise ValueError(f"{name} cannot take num_steps={num_steps}: some steps would not move; take fewer steps")
    return sampler


def _check_num_steps(num_steps, train_steps):
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"num_steps={num_steps} should be from 1 to {train_steps}, the number of training steps")


def _class_of(scheduler_config):
    return scheduler_config.get("_class_name", "no _class_name")


def _check_heun(name, num_steps):
    if name == "heun" and num_steps % 2 == 0:
        raise ValueError(
            f"num_steps={num_steps} should be odd for heun, which calls the network twice per step but the last: "
            f"take {num_steps - 1} or {num_steps + 1}"
        )


def _read_config(name, scheduler_config):
    check_has_betas(scheduler_config)
    check_scheduler_config(scheduler_config)
    return _fields(name, DEFAULTS[name] | schedule_defaults(scheduler_config), stated(scheduler_config))


def _read_flow_config(name, scheduler_config):
    """The fields that a sampler reads beside those of the flow: those of multistep solvers."""
    check_scheduler_config(scheduler_config)
    if name not in _ALLOWED_OF:
        return {}
    own = {field: default for field, default in DEFAULTS[name].items() if field not in _FLOW_FIELDS}
    return _fields(name, own, stated(scheduler_config))


def _fields(name, defaults, given):
    """The fields of `defaults`, checked, as given or by default."""
    config = {field: given.get(field, default) for field, default in defaults.items()}
    allowed = _ALLOWED | _ALLOWED_OF.get(name, {})
    for field in config.keys() & allowed.keys():
        one_of(field, config[field], allowed[field])
    return config
