"""Samplers: DDPM, DDIM, Euler, Euler ancestral and DPM-Solver++ (2M), each as diffusers' scheduler of it computes it.

Every one of them takes the same linear step: the next latents are a weighted sum of the latents, the predicted clean
latents, the predicted noise, the clean latents predicted one step earlier, and fresh noise. A sampler is therefore a
table of weights, one row a step, computed here in float64; stepping gathers a row for each sample of the batch, so
that samples may be at different steps of one compiled program.
"""

import dataclasses
import difflib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.diffusion.schedule import (
    PREDICTION_TYPES,
    SCHEDULE_DEFAULTS,
    alphas_cumprod_from_config,
    one_of,
    per_sample,
    stated,
    to_noise,
    to_original,
)

# A zero signal-to-noise ratio is an infinite sigma; samplers that count in sigmas use this instead, as diffusers does.
SMALLEST_ALPHA_CUMPROD = 2.0**-24

_SPACED = SCHEDULE_DEFAULTS | {"steps_offset": 0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0, "timestep_spacing": "leading", "thresholding": False}
_SIGMAS = {
    "timestep_spacing": "linspace",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
# The fields of scheduler_config.json that each sampler reads, with the defaults of diffusers' class.
DEFAULTS = {
    "ddpm": _SPACED | _CLIPPED | {"variance_type": "fixed_small"},
    "ddim": _SPACED | _CLIPPED | {"set_alpha_to_one": True},
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
        "thresholding": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
}
# Fields of the other schedulers that one checkpoint may be sampled with; they say nothing about these.
_OF_OTHER_SCHEDULERS = {
    *("disable_corrector", "dynamic_thresholding_ratio", "flow_shift", "predict_x0", "rho", "sample_max_value"),
    *("shift_terminal", "sigma_data", "sigma_schedule", "skip_prk_steps", "solver_p", "time_shift_type"),
}
_KNOWN = _OF_OTHER_SCHEDULERS.union(*DEFAULTS.values())

# The only values implemented. The solver types of other multistep schedulers mean midpoint, as in diffusers.
_ALLOWED = {
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "thresholding": (False,),
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


class SamplerState(NamedTuple):
    """Where a trajectory is: latents and the clean latents predicted last (zeros at first), float32 [B, h, w, c]."""

    latents: jax.Array
    original: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A trajectory of `num_steps` steps; `step` below is an int32 scalar or [B], traced or not, in [0, num_steps).

    Attributes:
        timesteps: numpy [S], what the network is told; int32, or float32 where sigmas fall between timesteps.
        init_noise_sigma: the standard deviation of the first latents.
        input_scale: numpy [S], the network sees latents * input_scale = alpha * x_0 + sigma * noise.
        alpha, sigma: numpy [S], as above.
        weights: maps "latents", "original" (x_0), "noise" (predicted), "previous" (x_0 of the step before) and
            "random" (fresh noise) to numpy [S].
        prediction_type: what the network outputs.
        clip: predicted clean latents are clipped to +-clip, or None.
    """

    timesteps: np.ndarray
    init_noise_sigma: float
    input_scale: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    weights: dict
    prediction_type: str
    clip: float | None = None

    @property
    def num_steps(self):
        return len(self.timesteps)

    @property
    def stochastic(self):
        """Whether `step` needs fresh noise."""
        return "random" in self.weights

    def init(self, noise):
        """The state to begin with. noise: standard normal [B, h, w, c]."""
        latents = noise.astype(jnp.float32) * self.init_noise_sigma
        return SamplerState(latents, jnp.zeros_like(latents))

    def timestep(self, step):
        """The network's timestep, of the shape of `step`."""
        return jnp.asarray(self.timesteps)[jnp.asarray(step)]

    def model_input(self, state, step):
        """What the network sees, float32 [B, h, w, c]."""
        return state.latents * per_sample(self.input_scale, step, state.latents.ndim)

    def pred_original(self, state, model_output, step):
        """The clean latents that `model_output` at `step` means, float32 [B, h, w, c]."""
        original = to_original(*self._prediction(state, model_output, step))
        return original if self.clip is None else jnp.clip(original, -self.clip, self.clip)

    def step(self, state, model_output, step, noise=None):
        """The state after `step`.

        Args:
            state: `SamplerState` before it.
            model_output: [B, h, w, c], the network's output for `model_input(state, step)`.
            noise: standard normal [B, h, w, c]; needed if the sampler is `stochastic`.

        Raises:
            ValueError: if noise is needed and not given.
        """
        if self.stochastic and noise is None:
            raise ValueError("this sampler is stochastic: pass standard normal noise of the shape of the latents")
        original = self.pred_original(state, model_output, step)
        terms = {"latents": state.latents, "original": original, "previous": state.original, "random": noise}
        if "noise" in self.weights:
            terms["noise"] = to_noise(*self._prediction(state, model_output, step))
        latents = sum(per_sample(table, step, original.ndim) * terms[name] for name, table in self.weights.items())
        return SamplerState(latents, original)

    def _prediction(self, state, model_output, step):
        alpha = per_sample(self.alpha, step, model_output.ndim)
        sigma = per_sample(self.sigma, step, model_output.ndim)
        return self.prediction_type, model_output.astype(jnp.float32), self.model_input(state, step), alpha, sigma


def check_sampler(name):
    """Raises ValueError, with the nearest name there is, unless `name` is a sampler."""
    if name not in _BUILDERS:
        close = difflib.get_close_matches(str(name), _BUILDERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown sampler {name!r}; did you mean {close!r}? There are: {', '.join(_BUILDERS)}")


def make_sampler(name, scheduler_config, num_steps, eta=0.0):
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
    sampler = _BUILDERS[name](config, num_steps, eta)
    if sampler.timesteps.max() > train_steps - 1:
        raise ValueError(
            f"num_steps={num_steps} with steps_offset={config['steps_offset']} begins at timestep "
            f"{sampler.timesteps.max()}, past the last training step {train_steps - 1}; take fewer steps"
        )
    if not all(np.isfinite(table).all() for table in sampler.weights.values()):
        raise ValueError(f"{name} cannot take num_steps={num_steps}: some steps would not move; take fewer steps")
    return sampler


def _read_config(name, scheduler_config):
    given = stated(scheduler_config)
    if unknown := sorted(given.keys() - _KNOWN):
        raise ValueError(f"scheduler_config.json: {unknown[0]}={given[unknown[0]]!r} is not a field that is known")
    config = {key: given.get(key, default) for key, default in DEFAULTS[name].items()}
    for field in config.keys() & _ALLOWED.keys():
        one_of(field, config[field], _ALLOWED[field])
    return config


def _make(weights, **fields):
    """A `Sampler` without the terms that are never added."""
    return Sampler(weights={name: table for name, table in weights.items() if np.any(table)}, **fields)


def _integer_timesteps(config, num_steps):
    """Timesteps of DDPM and DDIM (arXiv 2305.08891, table 2), falling, int64 [S]."""
    train_steps, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, num_steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(num_steps)[::-1] * (train_steps // num_steps) + config["steps_offset"]
    return _trailing(train_steps, train_steps, num_steps)


def _trailing(last, train_steps, num_steps):
    return np.round(np.arange(last, 0, -train_steps / num_steps))[:num_steps].astype(np.int64) - 1


def _noised(config, timesteps, alphas_cumprod):
    """What DDPM and DDIM share: latents that are x_t of the training schedule."""
    at = alphas_cumprod[np.minimum(timesteps, len(alphas_cumprod) - 1)]
    return at, {
        "timesteps": timesteps.astype(np.int32),
        "init_noise_sigma": 1.0,
        "input_scale": np.ones(len(at)),
        "alpha": np.sqrt(at),
        "sigma": np.sqrt(1 - at),
        "prediction_type": config["prediction_type"],
        "clip": config["clip_sample_range"] if config["clip_sample"] else None,
    }


def _ddpm(config, num_steps, _):
    """Ho et al. (arXiv 2006.11239, equations 6 and 7), over a part of the timesteps."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    timesteps = _integer_timesteps(config, num_steps)
    at, fields = _noised(config, timesteps, alphas_cumprod)
    before = np.append(at[1:], 1.0)
    beta = 1 - at / before
    variance = beta if config["variance_type"] == "fixed_large" else (1 - before) / (1 - at) * beta
    weights = {
        "latents": np.sqrt(at / before) * (1 - before) / (1 - at),
        "original": np.sqrt(before) * beta / (1 - at),
        "random": np.where(timesteps > 0, np.sqrt(variance), 0.0),
    }
    return _make(weights, **fields)


def _ddim(config, num_steps, eta):
    """Song et al. (arXiv 2010.02502, equations 12 and 16)."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    timesteps = _integer_timesteps(config, num_steps)
    at, fields = _noised(config, timesteps, alphas_cumprod)
    final = 1.0 if config["set_alpha_to_one"] else alphas_cumprod[0]
    previous = timesteps - config["num_train_timesteps"] // num_steps
    before = np.where(previous >= 0, alphas_cumprod[previous], final)
    variance = eta**2 * (1 - before) / (1 - at) * (1 - at / before)
    weights = {
        "original": np.sqrt(before),
        "noise": np.sqrt(np.maximum(1 - before - variance, 0.0)),
        "random": np.sqrt(variance),
    }
    return _make(weights, **fields)


def _training_sigmas(config):
    """Noise over signal at each training step, float64 [T], rising."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    if config["rescale_betas_zero_snr"]:
        alphas_cumprod[-1] = SMALLEST_ALPHA_CUMPROD
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def _karras(first, last, num_steps, rho=7.0):
    """Sigmas of Karras et al. (arXiv 2206.00364, equation 5)."""
    ramp = np.linspace(0, 1, num_steps)
    return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho


def _timesteps_of(sigmas, training):
    """Where sigmas lie between those of training, linear in log sigma."""
    return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))


def _close(sigmas, config, training):
    """Sigmas of a trajectory with the one that it ends at, float64 [S + 1]."""
    return np.append(sigmas, training[0] if config["final_sigmas_type"] == "sigma_min" else 0.0)


def _euler(config, num_steps, _):
    """Euler's method in sigma (Karras et al., arXiv 2206.00364, algorithm 2 without churn)."""
    training = _training_sigmas(config)
    timesteps = _euler_timesteps(config, num_steps)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if config["use_karras_sigmas"]:
        sigmas = _karras(sigmas[0], sigmas[-1], num_steps)
        timesteps = _timesteps_of(sigmas, training)
    sigmas = _close(sigmas, config, training)
    ratio = sigmas[1:] / sigmas[:-1]
    return _make({"latents": ratio, "original": 1 - ratio}, **_sigma_fields(config, timesteps, sigmas[:-1]))


def _euler_ancestral(config, num_steps, _):
    """Euler's method to less noise than the next step has, and fresh noise up to it (as k-diffusion has it)."""
    training = _training_sigmas(config)
    timesteps = _euler_timesteps(config, num_steps)
    sigmas = np.append(np.interp(timesteps, np.arange(len(training)), training), 0.0)
    here, there = sigmas[:-1], sigmas[1:]
    ratio = there**2 / here**2  # the noise that is left, there**2 / here, over that before
    weights = {"latents": ratio, "original": 1 - ratio, "random": there * np.sqrt(1 - ratio)}
    return _make(weights, **_sigma_fields(config, timesteps, here))


def _euler_timesteps(config, num_steps):
    """Timesteps of both of Euler's samplers, falling; with "linspace" they lie between those of training."""
    if config["timestep_spacing"] == "linspace":
        return np.linspace(0, config["num_train_timesteps"] - 1, num_steps, dtype=np.float32)[::-1]
    return _integer_timesteps(config, num_steps)


def _sigma_fields(config, timesteps, sigmas):
    """What both of Euler's samplers share: latents that are x_0 + sigma * noise."""
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    largest = sigmas.max()
    return {
        "timesteps": np.asarray(timesteps, np.float32),
        "init_noise_sigma": float(np.sqrt(largest**2 + 1) if config["timestep_spacing"] == "leading" else largest),
        "input_scale": alpha,
        "alpha": alpha,
        "sigma": sigmas * alpha,
        "prediction_type": config["prediction_type"],
    }


def _dpmpp_timesteps(config, num_steps, training):
    """DPM-Solver++'s timesteps: as `_integer_timesteps`, but leading and linspace leave out the last of S + 1."""
    last = len(training) - np.searchsorted(-np.log(training[::-1]), config["lambda_min_clipped"])
    if config["timestep_spacing"] == "linspace":
        return np.linspace(0, last - 1, num_steps + 1).round()[:0:-1].astype(np.int64)
    if config["timestep_spacing"] == "leading":
        return np.arange(num_steps + 1)[:0:-1] * (last // (num_steps + 1)) + config["steps_offset"]
    return _trailing(last, len(training), num_steps)


def _dpmpp_2m(config, num_steps, _):
    """Lu et al. (arXiv 2211.01095, algorithm 2): multistep, second order, midpoint."""
    training = _training_sigmas(config)
    if config["use_karras_sigmas"]:
        sigmas = _karras(training[-1], training[0], num_steps)
        timesteps = _timesteps_of(sigmas, training)
        timesteps = timesteps if config["beta_schedule"] == "squaredcos_cap_v2" else timesteps.round()
    else:
        timesteps = _dpmpp_timesteps(config, num_steps, training)
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
    sigmas = _close(sigmas, config, training)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    log_ratio = np.append(np.log(sigmas[:-2] / sigmas[1:-1]), np.inf)
    if sigmas[-1] > 0:
        log_ratio[-1] = np.log(sigmas[-2] / sigmas[-1])
    original = alpha[1:] * -np.expm1(-log_ratio)
    correction = 0.5 * original * _second_order(config, log_ratio, sigmas[-1])
    return _make(
        {
            "latents": sigmas[1:] * alpha[1:] / (sigmas[:-1] * alpha[:-1]),
            "original": original + correction,
            "previous": -correction,
        },
        timesteps=timesteps.astype(np.int32),
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        alpha=alpha[:-1],
        sigma=(sigmas * alpha)[:-1],
        prediction_type=config["prediction_type"],
    )


def _second_order(config, log_ratio, final_sigma):
    """h_i / h_{i-1} (1 / r_0 in the paper) of each step, 0 where the step is of first order, float64 [S]."""
    weight = np.zeros_like(log_ratio)
    few = config["lower_order_final"] and len(log_ratio) < 15
    stop = len(log_ratio) - (1 if config["euler_at_final"] or few or final_sigma == 0 else 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # steps of no length are refused by `make_sampler`
        weight[1:stop] = log_ratio[1:stop] / log_ratio[: max(stop - 1, 0)]
    return weight


_BUILDERS = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "euler": _euler,
    "euler_ancestral": _euler_ancestral,
    "dpmpp_2m": _dpmpp_2m,
}
SAMPLERS = tuple(_BUILDERS)
