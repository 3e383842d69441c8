"""The tables of the samplers of schedules of betas, each as diffusers' scheduler computes them.

A solver takes the fields of scheduler_config.json (all of them stated, see `samplers.DEFAULTS`), the number of steps
and eta, which DDIM and TCD read. Tables are computed in float64 and stored in float32.
"""

import numpy as np

from imagereward_jax.diffusion.multistep import dpmpp_weights, unipc_weights
from imagereward_jax.diffusion.sampler import Sampler, Weights
from imagereward_jax.diffusion.schedule import alphas_cumprod_from_config
from imagereward_jax.diffusion.sigmas import (
    KARRAS,
    LU,
    distilled_timesteps,
    fractional_timesteps,
    integer_timesteps,
    multistep_timesteps,
    spaced,
    spacing_of,
    timesteps_of,
)

# A zero signal-to-noise ratio is an infinite sigma; samplers that count in sigmas use this instead, as diffusers does.
SMALLEST_ALPHA_CUMPROD = 2.0**-24
_SIGMA_DATA = 0.5  # of consistency models, as LCM was distilled


def make_tables(prediction_type, weights, *, timesteps, init_noise_sigma, input_scale, alpha, sigma):
    """A `Sampler` of float32 tables; terms that `weights` leaves out weigh 0, and `earlier` is left out."""
    zeros = {name: np.zeros(len(timesteps)) for name in Weights._fields if name != "earlier"}
    return Sampler(
        timesteps=np.asarray(timesteps, np.float32),
        init_noise_sigma=np.asarray(init_noise_sigma, np.float32),
        input_scale=np.asarray(input_scale, np.float32),
        alpha=np.asarray(alpha, np.float32),
        sigma=np.asarray(sigma, np.float32),
        weights=Weights(**{name: np.asarray(table, np.float32) for name, table in (zeros | weights).items()}),
        prediction_type=prediction_type,
    )


def _noised(timesteps, alphas_cumprod):
    """Fields that DDPM, DDIM, LCM and TCD share: latents that are x_t of the training schedule."""
    at = alphas_cumprod[np.minimum(timesteps, len(alphas_cumprod) - 1)]
    return at, {
        "timesteps": timesteps,
        "init_noise_sigma": 1.0,
        "input_scale": np.ones(len(at)),
        "alpha": np.sqrt(at),
        "sigma": np.sqrt(1 - at),
    }


def ddpm(config, num_steps, _):
    """Ho et al. (arXiv 2006.11239, equations 6 and 7), over a part of the timesteps."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    timesteps = integer_timesteps(config, num_steps)
    at, fields = _noised(timesteps, alphas_cumprod)
    before = np.append(at[1:], 1.0)
    beta = 1 - at / before
    variance = beta if config["variance_type"] == "fixed_large" else (1 - before) / (1 - at) * beta
    weights = {
        "latents": np.sqrt(at / before) * (1 - before) / (1 - at),
        "original": np.sqrt(before) * beta / (1 - at),
        "random": np.where(timesteps > 0, np.sqrt(variance), 0.0),
    }
    return make_tables(config["prediction_type"], weights, **fields)


def ddim(config, num_steps, eta):
    """Song et al. (arXiv 2010.02502, equations 12 and 16)."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    timesteps = integer_timesteps(config, num_steps)
    at, fields = _noised(timesteps, alphas_cumprod)
    final = 1.0 if config["set_alpha_to_one"] else alphas_cumprod[0]
    previous = timesteps - config["num_train_timesteps"] // num_steps
    before = np.where(previous >= 0, alphas_cumprod[previous], final)
    variance = eta**2 * (1 - before) / (1 - at) * (1 - at / before)
    weights = {
        "original": np.sqrt(before),
        "noise": np.sqrt(np.maximum(1 - before - variance, 0.0)),
        "random": np.sqrt(variance),
    }
    return make_tables(config["prediction_type"], weights, **fields)


def lcm(config, num_steps, _):
    """Latent consistency models (arXiv 2310.04378, algorithm 3): clean latents, noised anew to the next timestep.

    The clean latents are a mix with the latents that is the identity at timestep 0. The last step adds no noise.
    """
    timesteps = distilled_timesteps(config, num_steps)
    at, fields = _noised(timesteps, alphas_cumprod_from_config(config))
    before, scaled = np.append(at[1:], 1.0), timesteps * config["timestep_scaling"]
    weights = {
        "latents": np.sqrt(before) * _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2),
        "original": np.sqrt(before) * scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2),
        "random": np.sqrt(1 - before),
    }
    return make_tables(config["prediction_type"], weights, **fields)


def tcd(config, num_steps, eta):
    """Trajectory consistency (arXiv 2402.19159, algorithm 4): past the next timestep, by eta of it (the paper's gamma),
    and back to it with fresh noise. Without eta it is DDIM's step."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    timesteps = distilled_timesteps(config, num_steps)
    _, fields = _noised(timesteps, alphas_cumprod)
    following = np.append(timesteps[1:], 0)
    # In float32, as in diffusers: a product just below a whole number is another timestep.
    reached = np.floor(np.float32(1 - eta) * following.astype(np.float32)).astype(np.int64)
    kept = alphas_cumprod[following] / alphas_cumprod[reached]
    weights = {
        "original": np.sqrt(alphas_cumprod[following]),
        "noise": np.sqrt(kept * (1 - alphas_cumprod[reached])),
        "random": np.sqrt(1 - kept),
    }
    return make_tables(config["prediction_type"], weights, **fields)


def _training_sigmas(config):
    """Noise over signal at each training step, float64 [T], rising."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    if config["rescale_betas_zero_snr"]:
        alphas_cumprod[-1] = SMALLEST_ALPHA_CUMPROD
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def _respaced(config, first, last, num_steps):
    """Sigmas spaced anew between these ends, or between those that the config states."""
    first, last = config.get("sigma_max") or first, config.get("sigma_min") or last
    if first < last:
        raise ValueError(
            f"scheduler_config.json: sigmas would rise from {first:g} to {last:g}: expected sigma_max above sigma_min"
        )
    return spaced(spacing_of(config), first, last, num_steps)


def _close(sigmas, config, training):
    """Sigmas of a trajectory with the one that it ends at, float64 [S + 1]."""
    return np.append(sigmas, training[0] if config["final_sigmas_type"] == "sigma_min" else 0.0)


def _euler_sigmas(config, num_steps):
    """(timesteps, sigmas, those of training) of Euler's and Heun's samplers."""
    training = _training_sigmas(config)
    timesteps = fractional_timesteps(config, num_steps)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if spacing_of(config):
        sigmas = _respaced(config, sigmas[0], sigmas[-1], num_steps)
        timesteps = timesteps_of(sigmas, training)
    return timesteps, sigmas, training


def euler(config, num_steps, _):
    """Euler's method in sigma (Karras et al., arXiv 2206.00364, algorithm 2 without churn)."""
    timesteps, sigmas, training = _euler_sigmas(config, num_steps)
    sigmas = _close(sigmas, config, training)
    ratio = sigmas[1:] / sigmas[:-1]
    weights = {"latents": ratio, "original": 1 - ratio}
    return make_tables(config["prediction_type"], weights, **_sigma_fields(config, timesteps, sigmas[:-1]))


def euler_ancestral(config, num_steps, _):
    """Euler's method to less noise than the next step has, and fresh noise up to it (as k-diffusion has it)."""
    timesteps, here, _ = _euler_sigmas(config, num_steps)
    there = np.append(here[1:], 0.0)
    ratio = there**2 / here**2  # the noise that is left, there**2 / here, over that before
    weights = {"latents": ratio, "original": 1 - ratio, "random": there * np.sqrt(1 - ratio)}
    return make_tables(config["prediction_type"], weights, **_sigma_fields(config, timesteps, here))


def heun(config, num_steps, _):
    """Heun's method in sigma (Karras et al., algorithm 2 without churn), a table row per call of the network."""
    timesteps, sigmas, _ = _euler_sigmas(config, (num_steps + 1) // 2)
    here, weights = heun_steps(np.append(sigmas, 0.0), num_steps)
    return make_tables(
        config["prediction_type"],
        weights,
        **_sigma_fields(config, np.append(timesteps[:1], np.repeat(timesteps[1:], 2)), here),
    )


def heun_steps(sigmas, num_steps):
    """(sigma of each call [num_steps], weights) of Heun's method between sigmas that end at 0.

    Even rows are Euler's steps from one sigma to the next. The row after one corrects it at the sigma that it reached,
    by half the difference of the two slopes, which is that of the predicted clean latents over that sigma.
    """
    corrected = np.arange(num_steps) % 2 == 1
    start, reached = (np.repeat(part, 2)[:num_steps] for part in (sigmas[:-1], sigmas[1:]))
    half = (reached - start) / (2 * np.where(corrected, reached, 1.0))
    weights = {
        "latents": np.where(corrected, 1.0, reached / start),
        "original": np.where(corrected, -half, 1 - reached / start),
        "previous": np.where(corrected, half, 0.0),
    }
    return np.where(corrected, reached, start), weights


def _sigma_fields(config, timesteps, sigmas):
    """Fields that the samplers in sigma share: latents that are x_0 + sigma * noise."""
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    largest = sigmas.max()
    return {
        "timesteps": timesteps,
        "init_noise_sigma": np.sqrt(largest**2 + 1) if config["timestep_spacing"] == "leading" else largest,
        "input_scale": alpha,
        "alpha": alpha,
        "sigma": sigmas * alpha,
    }


def dpmpp_2m(config, num_steps, _):
    """Lu et al. (arXiv 2211.01095, algorithm 2): multistep, second order, midpoint."""
    return _multistep(config, num_steps, dpmpp_weights)


def unipc(config, num_steps, _):
    """Zhao et al. (arXiv 2302.04867): a multistep predictor, and a corrector of the latents that it gave."""
    if config["final_sigmas_type"] == "sigma_min" and spacing_of(config):
        raise ValueError(
            f"scheduler_config.json: final_sigmas_type='sigma_min' with {spacing_of(config)}=True makes unipc's last "
            "step one of no length, which it cannot take: state final_sigmas_type='zero'"
        )
    return _multistep(config, num_steps, unipc_weights)


def _multistep(config, num_steps, weigh):
    """A solver whose latents are x_t of the training schedule. weigh: (config, alpha, sigma [S + 1]) -> weights."""
    training, spacing = _training_sigmas(config), spacing_of(config)
    if spacing:
        sigmas = _respaced(config, training[-1], training[0], num_steps)
        timesteps = timesteps_of(sigmas, training)
        # diffusers cuts the others off, and with a cosine schedule all but UniPC's.
        if spacing in (KARRAS, LU) and (config["beta_schedule"] != "squaredcos_cap_v2" or weigh is unipc_weights):
            timesteps = timesteps.round()
    else:
        lowest = config.get("lambda_min_clipped", -np.inf)
        last = len(training) - np.searchsorted(-np.log(training[::-1]), lowest)
        timesteps = multistep_timesteps(config, num_steps, last)
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
    sigmas = _close(sigmas, config, training)
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return make_tables(
        config["prediction_type"],
        weigh(config, alpha, sigmas * alpha),
        timesteps=timesteps.astype(np.int32),
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        alpha=alpha[:-1],
        sigma=(sigmas * alpha)[:-1],
    )
