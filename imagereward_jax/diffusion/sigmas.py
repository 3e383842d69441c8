"""Where a trajectory's steps lie: timesteps of samplers, and sigmas that a scheduler_config.json spaces anew."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Fields that space sigmas anew, in the order in which diffusers looks at them. Lu's lambdas (arXiv 2211.01095) are even
# in the logarithm of sigma, as exponential sigmas are.
KARRAS, LU, EXPONENTIAL, BETA = (*("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"),)
SPACINGS = (KARRAS, LU, EXPONENTIAL, BETA)
_RHO = 7.0  # of Karras et al.
_BETA_SHAPE = 0.6  # both shapes of the beta distribution (arXiv 2407.12173)


def spacing_of(config: Mapping[str, Any]) -> str | None:
    """The field of `SPACINGS` by which a scheduler_config.json spaces its sigmas; None for the training schedule's.

    Raises:
        ValueError: it asks for two of them.
    """
    chosen = [name for name in SPACINGS if config.get(name)]
    if len(set(chosen) - {LU}) > 1:
        raise ValueError(f"scheduler_config.json: {' and '.join(chosen)} are true: only one of them can be")
    return chosen[0] if chosen else None


def spaced(spacing: str, first: float, last: float, num_steps: int) -> np.ndarray:
    """Sigmas from `first` to `last`, falling, float64 [S].

    spacing: one of `SPACINGS`: Karras et al. (arXiv 2206.00364, equation 5), even logarithms, or quantiles of a beta
    distribution, which has more of them at both ends.
    """
    ramp = np.linspace(0, 1, num_steps)
    if spacing == KARRAS:
        return (first ** (1 / _RHO) + ramp * (last ** (1 / _RHO) - first ** (1 / _RHO))) ** _RHO
    if spacing == BETA:
        from scipy.special import betaincinv

        return last + betaincinv(_BETA_SHAPE, _BETA_SHAPE, 1 - ramp) * (first - last)
    return np.exp(np.linspace(np.log(first), np.log(last), num_steps))


def integer_timesteps(config: Mapping[str, Any], num_steps: int) -> np.ndarray:
    """Timesteps of DDPM and DDIM (arXiv 2305.08891, table 2), falling, int64 [S]."""
    train_steps, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, num_steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return _leading(config, np.arange(num_steps)[::-1] * (train_steps // num_steps))
    return _trailing(train_steps, train_steps, num_steps)


def fractional_timesteps(config: Mapping[str, Any], num_steps: int) -> np.ndarray:
    """Timesteps of Euler's and Heun's samplers, falling; with "linspace" they lie between those of training."""
    if config["timestep_spacing"] == "linspace":
        return np.linspace(0, config["num_train_timesteps"] - 1, num_steps, dtype=np.float32)[::-1]
    return integer_timesteps(config, num_steps)


def multistep_timesteps(config: Mapping[str, Any], num_steps: int, last: int) -> np.ndarray:
    """Timesteps below `last` of multistep solvers: as `integer_timesteps`, but leading and linspace leave out the last
    of S + 1."""
    if config["timestep_spacing"] == "linspace":
        return np.linspace(0, last - 1, num_steps + 1).round()[:0:-1].astype(np.int64)
    if config["timestep_spacing"] == "leading":
        return _leading(config, np.arange(num_steps + 1)[:0:-1] * (last // (num_steps + 1)))
    return _trailing(last, config["num_train_timesteps"], num_steps)


def distilled_timesteps(config: Mapping[str, Any], num_steps: int) -> np.ndarray:
    """Timesteps of LCM and TCD, evenly chosen from those that the model was distilled on, falling, int64 [S].

    Raises:
        ValueError: there are fewer of those than steps.
    """
    train_steps, original = config["num_train_timesteps"], config["original_inference_steps"]
    if not num_steps <= original <= train_steps:
        raise ValueError(
            f"num_steps={num_steps}: should be at most original_inference_steps={original} (scheduler_config.json), "
            f"the steps that the model was distilled on, and those at most num_train_timesteps={train_steps}"
        )
    distilled = np.arange(original, 0, -1) * (train_steps // original) - 1
    return distilled[np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(np.int64)]


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Where sigmas lie between those of training, linear in log sigma."""
    return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))


def _leading(config, timesteps):
    """Timesteps moved on by steps_offset.

    Raises:
        ValueError: the first is past those of training.
    """
    offset, last = config["steps_offset"], config["num_train_timesteps"] - 1
    if timesteps[0] + offset > last:
        raise ValueError(
            f"num_steps={len(timesteps)} with steps_offset={offset} begins at timestep {timesteps[0] + offset}, past "
            f"the last training step {last}; take fewer steps"
        )
    return timesteps + offset


def _trailing(last, train_steps, num_steps):
    return np.round(np.arange(last, 0, -train_steps / num_steps))[:num_steps].astype(np.int64) - 1
