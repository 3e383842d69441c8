"""The noise schedule of betas that a diffusion model was trained with: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

`flow` has the schedule of flows, and `read_schedule`, which tells the two apart. Read from the `scheduler_config.json`
of a diffusers checkpoint, and the same as diffusers' schedulers give. Tables are computed once, in float64 numpy; what
the methods gather from them is float32.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW_PREDICTION = "flow_prediction"  # noise - x_0, where alpha = 1 - sigma (see `flow`)

# diffusers' defaults, which all of its schedulers for Stable Diffusion share.
SCHEDULE_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


MAX_TIMESTEPS = 100_000
_NUMBERS = (
    *("beta_start", "beta_end", "shift", "base_shift", "max_shift", "flow_shift"),
    *("base_image_seq_len", "max_image_seq_len"),
)
_SWITCHES = ("rescale_betas_zero_snr", "use_dynamic_shifting", "use_flow_sigmas")
_TEXTS = ("_class_name", "beta_schedule", "prediction_type", "time_shift_type")
_BETA_FIELDS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
# diffusers' schedulers whose configuration may leave out betas that are the default ones.
_WITH_BETAS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
        *("DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete"),
        *("EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM"),
        *("RePaint", "SASolver", "TCD", "UniPCMultistep"),
    )
)
# Fields of schedulers without betas (flow matching, EDM), by which a configuration without a class is told.
_WITHOUT_BETAS = ("shift", "base_shift", "max_shift", "stochastic_sampling", "sigma_data", "sigma_schedule")


def check_fields(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field of scheduler_config.json, for a value of another kind or beyond reason."""

    def refuse(field, expected):
        raise ValueError(f"scheduler_config.json: {field}={config[field]!r:.100}: expected {expected}")

    for field, value in config.items():
        if field in _NUMBERS and not _is_number(value):
            refuse(field, "a number")
        if field in _SWITCHES and not isinstance(value, bool | None):
            refuse(field, "true or false")
        if field in _TEXTS and not isinstance(value, str | None):
            refuse(field, "a text")
    steps = config.get("num_train_timesteps", 1)
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
        refuse("num_train_timesteps", f"a whole number from 1 to {MAX_TIMESTEPS:,}")
    betas, defaulted = config.get("trained_betas"), config.get("_use_default_values", [])
    if betas is not None and not (isinstance(betas, list | tuple) and all(map(_is_number, betas))):
        refuse("trained_betas", "a list of numbers, or null")
    if not isinstance(defaulted, list | tuple):
        refuse("_use_default_values", "a list of names")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_has_betas(config: Mapping) -> None:
    """Raises ValueError unless a scheduler_config.json describes a noise schedule of betas.

    Flow-matching schedulers, EDM's and others have none; read as one of betas, they would train another model.
    """
    name, given = config.get("_class_name"), stated(config)
    advice = (
        "expected a schedule of betas (beta_start, beta_end and beta_schedule, or trained_betas; Stable Diffusion 1.x "
        "and SDXL have them) or a flow (FlowMatchEulerDiscreteScheduler, or use_flow_sigmas with "
        "prediction_type='flow_prediction'): open a model that was trained with one"
    )
    has_betas = any(config.get(field) is not None for field in _BETA_FIELDS)
    if name is not None and name not in _WITH_BETAS and not has_betas:
        raise ValueError(f"scheduler_config.json: _class_name={name!r} is a scheduler without betas; {advice}")
    if name is None and not has_betas:
        for field in _WITHOUT_BETAS:
            if field in given:
                raise ValueError(
                    f"scheduler_config.json: {field}={given[field]!r} belongs to a scheduler without betas; {advice}"
                )
    for field, usual in (("use_flow_sigmas", False), ("snr_shift_scale", 1.0)):
        if given.get(field, usual) != usual:
            raise ValueError(
                f"scheduler_config.json: {field}={given[field]!r} ({name or 'no _class_name'}) replaces the schedule "
                f"of betas by another; {advice}"
            )


def one_of(field, value, allowed):
    """Raises ValueError, naming the field of scheduler_config.json and its value, unless `value` is in `allowed`."""
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"scheduler_config.json: {field}={value!r} is not supported; supported: {choices}")


def stated(config):
    """The fields that a scheduler_config.json sets: no bookkeeping, and nothing that diffusers noted as a default."""
    defaulted = config.get("_use_default_values", ())
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in defaulted}


def betas_from_config(config):
    """The variance added at each training step, float64 [T].

    Args:
        config: the content of scheduler_config.json; absent fields take diffusers' defaults.

    Raises:
        ValueError: naming the field that is not supported or does not fit.
    """
    config = SCHEDULE_DEFAULTS | stated(config)
    steps, kind = config["num_train_timesteps"], config["beta_schedule"]
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"scheduler_config.json: num_train_timesteps={steps!r} should be a positive integer")
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
        if betas.shape != (steps,):
            raise ValueError(
                f"scheduler_config.json: trained_betas has shape {betas.shape}, "
                f"num_train_timesteps={steps} needs ({steps},)"
            )
    else:
        one_of("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if kind == "linear":
            betas = np.linspace(config["beta_start"], config["beta_end"], steps)
        elif kind == "scaled_linear":
            betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, steps) ** 2
        else:
            betas = _cosine_betas(steps)
    # Models were trained with float32 betas; where a beta is close to 1 the rounding is visible in 1 - beta.
    betas = betas.astype(np.float32).astype(np.float64)
    if not ((betas >= 0) & (betas < 1)).all():
        raise ValueError(f"scheduler_config.json: betas run from {betas.min()} to {betas.max()}, should be in [0, 1)")
    return betas


def alphas_cumprod_from_config(config):
    """The share of signal variance left at each training step (a_t above), float64 [T].

    Raises:
        ValueError: as `betas_from_config`, and where nothing but noise is left at the last step
            (`rescale_betas_zero_snr`) although the model predicts noise, from which no image follows.
    """
    alphas_cumprod = np.cumprod(1 - betas_from_config(config))
    settings = SCHEDULE_DEFAULTS | stated(config)
    if settings["rescale_betas_zero_snr"]:
        one_of("prediction_type (with rescale_betas_zero_snr)", settings["prediction_type"], PREDICTION_TYPES[1:])
        alphas_cumprod = _rescale_to_zero_terminal_snr(alphas_cumprod)
    return alphas_cumprod


def _cosine_betas(steps, max_beta=0.999):
    """Nichol and Dhariwal's cosine schedule (arXiv 2102.09672, equation 17)."""
    grid = np.arange(steps + 1) / steps
    signal = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], max_beta)


def _rescale_to_zero_terminal_snr(alphas_cumprod):
    """Lin et al. (arXiv 2305.08891, algorithm 1): shifts sqrt(a) so that it ends at 0, keeps where it begins."""
    root = np.sqrt(alphas_cumprod)
    return np.square((root - root[-1]) * root[0] / (root[0] - root[-1]))


def per_sample(table, index, ndim):
    """Float32 entries of a table at `index` (scalar or [B]), shaped to multiply an array of `ndim` axes."""
    return along_rows(jnp.asarray(table, jnp.float32)[jnp.asarray(index)], ndim)


def along_rows(values, ndim):
    """Values [B], shaped to broadcast against an array [B, ...] of `ndim` axes; a scalar stays one."""
    return values if values.ndim == 0 else values.reshape(values.shape + (1,) * (ndim - values.ndim))


def to_original(prediction_type, model_output, sample, alpha, sigma):
    """The clean sample x_0 that a model output means, where sample = alpha * x_0 + sigma * noise."""
    if prediction_type == "epsilon":
        return (sample - sigma * model_output) / alpha
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * model_output
    if prediction_type == FLOW_PREDICTION:
        return sample - sigma * model_output
    return model_output


def to_noise(prediction_type, model_output, sample, alpha, sigma):
    """The noise that a model output means, where sample = alpha * x_0 + sigma * noise."""
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "v_prediction":
        return alpha * model_output + sigma * sample
    if prediction_type == FLOW_PREDICTION:
        return sample + alpha * model_output
    # At a sigma of 0 there is no noise to predict; the quotient would be NaN, also in a sum that weighs it by 0.
    return (sample - alpha * model_output) / jnp.where(sigma > 0, sigma, 1.0)


def to_target(prediction_type, x0, noise, alpha, sigma):
    """The output that a model should have for alpha * x0 + sigma * noise."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * x0
    return noise - x0 if prediction_type == FLOW_PREDICTION else x0


class Schedule:
    """Noising, and what a model output means. A subclass gives `prediction_type` and `coefficients`.

    All methods take arrays [B, ...] and `timesteps`, [B] or one for all, and compute in float32.
    """

    prediction_type: str

    def coefficients(self, timesteps, ndim=4):
        """(alpha, sigma): the shares of x_0 and of noise in x_t, each a scalar or [B, 1, ...] of `ndim` axes."""
        raise NotImplementedError

    def add_noise(self, x0, noise, timesteps):
        """x_t for clean samples and standard normal noise."""
        alpha, sigma = self.coefficients(timesteps, x0.ndim)
        return alpha * x0.astype(jnp.float32) + sigma * noise

    def target(self, x0, noise, timesteps):
        """The output that the network should have for x_t."""
        return to_target(self.prediction_type, x0.astype(jnp.float32), noise, *self.coefficients(timesteps, x0.ndim))

    def pred_original(self, model_output, sample, timesteps):
        """The clean sample that `model_output` at x_t = `sample` means."""
        sample, model_output = sample.astype(jnp.float32), model_output.astype(jnp.float32)
        return to_original(self.prediction_type, model_output, sample, *self.coefficients(timesteps, sample.ndim))

    def pred_noise(self, model_output, sample, timesteps):
        """The noise that `model_output` at x_t = `sample` means."""
        sample, model_output = sample.astype(jnp.float32), model_output.astype(jnp.float32)
        return to_noise(self.prediction_type, model_output, sample, *self.coefficients(timesteps, sample.ndim))


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule(Schedule):
    """A schedule of betas; `timesteps` are ints in [0, T).

    Attributes:
        alphas_cumprod: numpy [T], the share of signal variance left at each timestep, falling.
        prediction_type: "epsilon" (the noise), "v_prediction" (the velocity, arXiv 2202.00512) or "sample" (x_0).
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"

    @classmethod
    def from_config(cls, config):
        """From the content of scheduler_config.json. Raises ValueError naming what is not supported."""
        check_has_betas(config)
        prediction_type = (SCHEDULE_DEFAULTS | stated(config))["prediction_type"]
        one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        return cls(alphas_cumprod_from_config(config), prediction_type)

    @property
    def num_train_timesteps(self):
        return len(self.alphas_cumprod)

    def coefficients(self, timesteps, ndim=4):
        """See `Schedule`."""
        alpha = per_sample(np.sqrt(self.alphas_cumprod), timesteps, ndim)
        sigma = per_sample(np.sqrt(1 - self.alphas_cumprod), timesteps, ndim)
        return alpha, sigma

    def velocity(self, x0, noise, timesteps):
        """alpha * noise - sigma * x_0, the target of v-prediction."""
        return to_target("v_prediction", x0.astype(jnp.float32), noise, *self.coefficients(timesteps, x0.ndim))

    def snr(self, timesteps):
        """Signal-to-noise ratio a_t / (1 - a_t), of the shape of `timesteps`."""
        return per_sample(self.alphas_cumprod / (1 - self.alphas_cumprod), timesteps, np.ndim(timesteps))
