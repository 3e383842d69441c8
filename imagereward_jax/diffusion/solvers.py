"""The tables of DDPM, DDIM, Euler, Euler ancestral and DPM-Solver++ (2M), each as diffusers' scheduler computes them.

A solver takes the fields of scheduler_config.json (all of them stated, see `samplers.DEFAULTS`), the number of steps
and eta, which DDIM alone reads. One of a flow takes the schedule, the number of steps, the tokens of the image, the
fields and eta, which the noisy ones read. Tables are computed in float64 and stored in float32.
"""

import numpy as np

from imagereward_jax.diffusion.sampler import Sampler, Weights
from imagereward_jax.diffusion.schedule import alphas_cumprod_from_config

# A zero signal-to-noise ratio is an infinite sigma; samplers that count in sigmas use this instead, as diffusers does.
SMALLEST_ALPHA_CUMPROD = 2.0**-24


def _make(prediction_type, weights, *, timesteps, init_noise_sigma, input_scale, alpha, sigma):
    """A `Sampler` of float32 tables; terms that `weights` leaves out weigh 0."""
    zeros = {name: np.zeros(len(timesteps)) for name in Weights._fields}
    return Sampler(
        timesteps=np.asarray(timesteps, np.float32),
        init_noise_sigma=np.asarray(init_noise_sigma, np.float32),
        input_scale=np.asarray(input_scale, np.float32),
        alpha=np.asarray(alpha, np.float32),
        sigma=np.asarray(sigma, np.float32),
        weights=Weights(**{name: np.asarray(table, np.float32) for name, table in (zeros | weights).items()}),
        prediction_type=prediction_type,
    )


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


def _noised(timesteps, alphas_cumprod):
    """Fields that DDPM and DDIM share: latents that are x_t of the training schedule."""
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
    timesteps = _integer_timesteps(config, num_steps)
    at, fields = _noised(timesteps, alphas_cumprod)
    before = np.append(at[1:], 1.0)
    beta = 1 - at / before
    variance = beta if config["variance_type"] == "fixed_large" else (1 - before) / (1 - at) * beta
    weights = {
        "latents": np.sqrt(at / before) * (1 - before) / (1 - at),
        "original": np.sqrt(before) * beta / (1 - at),
        "random": np.where(timesteps > 0, np.sqrt(variance), 0.0),
    }
    return _make(config["prediction_type"], weights, **fields)


def ddim(config, num_steps, eta):
    """Song et al. (arXiv 2010.02502, equations 12 and 16)."""
    alphas_cumprod = alphas_cumprod_from_config(config)
    timesteps = _integer_timesteps(config, num_steps)
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
    return _make(config["prediction_type"], weights, **fields)


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


def euler(config, num_steps, _):
    """Euler's method in sigma (Karras et al., arXiv 2206.00364, algorithm 2 without churn)."""
    training = _training_sigmas(config)
    timesteps = _euler_timesteps(config, num_steps)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if config["use_karras_sigmas"]:
        sigmas = _karras(sigmas[0], sigmas[-1], num_steps)
        timesteps = _timesteps_of(sigmas, training)
    sigmas = _close(sigmas, config, training)
    ratio = sigmas[1:] / sigmas[:-1]
    return _make(
        config["prediction_type"],
        {"latents": ratio, "original": 1 - ratio},
        **_sigma_fields(config, timesteps, sigmas[:-1]),
    )


def euler_ancestral(config, num_steps, _):
    """Euler's method to less noise than the next step has, and fresh noise up to it (as k-diffusion has it)."""
    training = _training_sigmas(config)
    timesteps = _euler_timesteps(config, num_steps)
    sigmas = np.append(np.interp(timesteps, np.arange(len(training)), training), 0.0)
    here, there = sigmas[:-1], sigmas[1:]
    ratio = there**2 / here**2  # the noise that is left, there**2 / here, over that before
    weights = {"latents": ratio, "original": 1 - ratio, "random": there * np.sqrt(1 - ratio)}
    return _make(config["prediction_type"], weights, **_sigma_fields(config, timesteps, here))


def _euler_timesteps(config, num_steps):
    """Timesteps of both of Euler's samplers, falling; with "linspace" they lie between those of training."""
    if config["timestep_spacing"] == "linspace":
        return np.linspace(0, config["num_train_timesteps"] - 1, num_steps, dtype=np.float32)[::-1]
    return _integer_timesteps(config, num_steps)


def _sigma_fields(config, timesteps, sigmas):
    """Fields that both of Euler's samplers share: latents that are x_0 + sigma * noise."""
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    largest = sigmas.max()
    return {
        "timesteps": timesteps,
        "init_noise_sigma": np.sqrt(largest**2 + 1) if config["timestep_spacing"] == "leading" else largest,
        "input_scale": alpha,
        "alpha": alpha,
        "sigma": sigmas * alpha,
    }


def _dpmpp_timesteps(config, num_steps, training):
    """DPM-Solver++'s timesteps: as `_integer_timesteps`, but leading and linspace leave out the last of S + 1."""
    last = len(training) - np.searchsorted(-np.log(training[::-1]), config["lambda_min_clipped"])
    if config["timestep_spacing"] == "linspace":
        return np.linspace(0, last - 1, num_steps + 1).round()[:0:-1].astype(np.int64)
    if config["timestep_spacing"] == "leading":
        return np.arange(num_steps + 1)[:0:-1] * (last // (num_steps + 1)) + config["steps_offset"]
    return _trailing(last, len(training), num_steps)


def dpmpp_2m(config, num_steps, _):
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
    return _make(
        config["prediction_type"],
        _dpmpp_weights(config, alpha, sigmas * alpha),
        timesteps=timesteps.astype(np.int32),
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps)),
        alpha=alpha[:-1],
        sigma=(sigmas * alpha)[:-1],
    )


def _dpmpp_weights(config, alpha, sigma):
    """Weights of DPM-Solver++'s steps between the latents alpha * x_0 + sigma * noise, float64 [S + 1] each."""
    ratio = sigma / alpha
    log_ratio = np.append(np.log(ratio[:-2] / ratio[1:-1]), np.inf)
    if sigma[-1] > 0:
        log_ratio[-1] = np.log(ratio[-2] / ratio[-1])
    original = alpha[1:] * -np.expm1(-log_ratio)
    correction = 0.5 * original * _second_order(config, log_ratio, sigma[-1])
    return {"latents": sigma[1:] / sigma[:-1], "original": original + correction, "previous": -correction}


def _second_order(config, log_ratio, final_sigma):
    """h_i / h_{i-1} (1 / r_0 in the paper) of each step, 0 where the step is of first order, float64 [S]."""
    weight = np.zeros_like(log_ratio)
    few = config["lower_order_final"] and len(log_ratio) < 15
    stop = len(log_ratio) - (1 if config["euler_at_final"] or few or final_sigma == 0 else 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # steps of no length are refused by `make_sampler`
        weight[1:stop] = log_ratio[1:stop] / log_ratio[: max(stop - 1, 0)]
    return weight


def flow_euler(schedule, num_steps, image_tokens, *_):
    """Euler's method along a flow (diffusers' FlowMatchEulerDiscreteScheduler)."""
    sigmas = np.append(schedule.sampling_sigmas(num_steps, image_tokens), 0.0)
    weights = {"original": 1 - sigmas[1:], "noise": sigmas[1:]}
    return _make(schedule.prediction_type, weights, **_flow_fields(schedule, sigmas[:-1]))


def flow_heun(schedule, num_steps, image_tokens, *_):
    """Heun's method along a flow (diffusers' FlowMatchHeunDiscreteScheduler), a table row per call of the network.

    Even rows are Euler's steps from one sigma to the next. The row after one corrects it at the sigma that it reached,
    by half the difference of the two velocities, which is that of the predicted clean latents over that sigma.
    """
    steps = np.append(schedule.sampling_sigmas((num_steps + 1) // 2, image_tokens), 0.0)
    corrected = np.arange(num_steps) % 2 == 1
    reached = np.repeat(steps[1:], 2)[:num_steps]
    half = np.repeat(np.diff(steps), 2)[:num_steps] / (2 * np.where(corrected, reached, 1.0))
    weights = {
        "latents": np.where(corrected, 1.0, 0.0),
        "original": np.where(corrected, -half, 1 - reached),
        "noise": np.where(corrected, 0.0, reached),
        "previous": np.where(corrected, half, 0.0),
    }
    return _make(schedule.prediction_type, weights, **_flow_fields(schedule, np.append(steps[0], reached)[:num_steps]))


def flow_dpmpp_2m(schedule, num_steps, image_tokens, config, _):
    """DPM-Solver++ along a flow (diffusers' DPMSolverMultistepScheduler with use_flow_sigmas)."""
    even = 1 - np.linspace(1, 1 / schedule.num_train_timesteps, num_steps + 1)[:0:-1]
    sigmas = schedule.shift_sigmas(even, image_tokens)
    timesteps = np.floor(sigmas * schedule.num_train_timesteps)  # diffusers' scheduler tells the network whole ones
    sigmas = np.append(sigmas.astype(np.float32), 0.0)
    fields = _flow_fields(schedule, sigmas[:-1]) | {"timesteps": timesteps}
    return _make(schedule.prediction_type, _dpmpp_weights(config, 1 - sigmas, sigmas), **fields)


def flow_sde(schedule, num_steps, image_tokens, _, eta):
    """The stochastic steps of Flow-GRPO (arXiv 2505.05470, equation 9; yifan123/flow_grpo): more noise, earlier.

    Its noise level eta sqrt(s / (1 - s)) has no value at s = 1, where the next sigma stands for s below.
    """

    def spread(here, there):
        return eta * np.sqrt(here / (1 - np.where(here == 1, there, here)))

    return _flow_noisy(schedule, num_steps, image_tokens, spread)


def flow_dance(schedule, num_steps, image_tokens, _, eta):
    """The stochastic steps of DanceGRPO (arXiv 2505.07818; XueZeyue/DanceGRPO): one noise level eta."""
    return _flow_noisy(schedule, num_steps, image_tokens, lambda here, there: np.full_like(here, eta))


def _flow_noisy(schedule, num_steps, image_tokens, spread):
    """Euler-Maruyama steps of dx = (v + g^2 / (2 s) x_1) ds + g dw, whose marginals are the flow's at every g.

    spread: (sigmas, sigmas after the steps) -> g. x_1 is the predicted noise.
    """
    sigmas = np.append(schedule.sampling_sigmas(num_steps, image_tokens), 0.0)
    here, there = sigmas[:-1], sigmas[1:]
    variance = spread(here, there) ** 2 * (here - there)
    weights = {"original": 1 - there, "noise": there - variance / (2 * here), "random": np.sqrt(variance)}
    return _make(schedule.prediction_type, weights, **_flow_fields(schedule, here))


def flow_cps(schedule, num_steps, image_tokens, _, eta):
    """Coefficients-preserving sampling (arXiv 2509.05952): sin(eta pi / 2) of a step's noise is fresh.

    As in DDIM, images are as clean as without: the last step adds no noise.
    """
    sigmas = np.append(schedule.sampling_sigmas(num_steps, image_tokens), 0.0)
    there, angle = sigmas[1:], eta * np.pi / 2
    weights = {"original": 1 - there, "noise": there * np.cos(angle), "random": there * np.sin(angle)}
    return _make(schedule.prediction_type, weights, **_flow_fields(schedule, sigmas[:-1]))


def _flow_fields(schedule, sigmas):
    """Fields that samplers of flows share: latents that are (1 - sigma) * x_0 + sigma * noise."""
    return {
        "timesteps": np.float32(sigmas) * np.float32(schedule.num_train_timesteps),
        "init_noise_sigma": 1.0,
        "input_scale": np.ones(len(sigmas)),
        "alpha": 1 - sigmas,
        "sigma": sigmas,
    }
