"""The noise schedule of betas that a diffusion model was trained with: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

`flow` has the schedule of flows, and `read_schedule`, which tells the two apart. Read from the `scheduler_config.json`
of a diffusers checkpoint, and the same as diffusers' schedulers give. Tables are computed once, in float64 numpy; what
the methods gather from them is float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from imagereward_jax.diffusion.scheduler_fields import check_has_betas, one_of, stated

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

# What the schedules of these classes are by default.
_RANGE = {"beta_start": 0.00085, "beta_end": 0.012}
_CLASS_DEFAULTS = {
    "HeunDiscreteScheduler": _RANGE,
    "KDPM2AncestralDiscreteScheduler": _RANGE,
    "KDPM2DiscreteScheduler": _RANGE,
    "LCMScheduler": _RANGE | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": _RANGE | {"beta_schedule": "scaled_linear"},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
}


def schedule_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule that a scheduler_config.json leaves unsaid: that of its class, with which the model was trained."""
    return SCHEDULE_DEFAULTS | _CLASS_DEFAULTS.get(config.get("_class_name"), {})


def betas_from_config(config):
    """The variance added at each training step, float64 [T].

    Args:
        config: the content of scheduler_config.json; absent fields take diffusers' defaults.

    Raises:
        ValueError: naming the field that is not supported or does not fit.
    """
    config = schedule_defaults(config) | stated(config)
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
        start, end = config["beta_start"], config["beta_end"]
        if kind != "squaredcos_cap_v2" and not 0 < start <= end < 1:
            raise ValueError(
                f"scheduler_config.json: beta_start={start!r}, beta_end={end!r}: expected 0 < beta_start <= beta_end "
                "< 1"
            )
        if kind == "linear":
            betas = np.linspace(start, end, steps)
        elif kind == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, steps) ** 2
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
    settings = schedule_defaults(config) | stated(config)
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
        prediction_type = (schedule_defaults(config) | stated(config))["prediction_type"]
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
