"""The tables of the samplers of flows, each as diffusers' scheduler or its authors' code computes them.

A solver takes the schedule, the number of steps, the tokens of the image, the fields of scheduler_config.json that it
reads (see `samplers.DEFAULTS`) and eta, which the noisy ones read.
"""

import numpy as np

from imagereward_jax.diffusion.multistep import dpmpp_weights, unipc_weights
from imagereward_jax.diffusion.solvers import heun_steps, make_tables

_BELOW_ONE = 1e-6  # that UniPC, which takes logarithms of alpha, keeps from a sigma of 1, as in diffusers


def flow_euler(schedule, num_steps, image_tokens, *_):
    """Euler's method along a flow (diffusers' FlowMatchEulerDiscreteScheduler)."""
    sigmas = np.append(schedule.sampling_sigmas(num_steps, image_tokens), 0.0)
    weights = {"original": 1 - sigmas[1:], "noise": sigmas[1:]}
    return make_tables(schedule.prediction_type, weights, **_flow_fields(schedule, sigmas[:-1]))


def flow_heun(schedule, num_steps, image_tokens, *_):
    """Heun's method along a flow (diffusers' FlowMatchHeunDiscreteScheduler), a table row per call of the network."""
    sigmas = np.append(schedule.sampling_sigmas((num_steps + 1) // 2, image_tokens, anew=False), 0.0)
    here, weights = heun_steps(sigmas, num_steps)
    return make_tables(schedule.prediction_type, weights, **_flow_fields(schedule, here))


def flow_lcm(schedule, num_steps, image_tokens, *_):
    """Clean latents, noised anew to the next sigma (diffusers' FlowMatchLCMScheduler)."""
    sigmas = np.append(schedule.sampling_sigmas(num_steps, image_tokens), 0.0)
    weights = {"original": 1 - sigmas[1:], "random": sigmas[1:]}
    return make_tables(schedule.prediction_type, weights, **_flow_fields(schedule, sigmas[:-1]))


def flow_dpmpp_2m(schedule, num_steps, image_tokens, config, _):
    """DPM-Solver++ along a flow (diffusers' DPMSolverMultistepScheduler with use_flow_sigmas)."""
    even = 1 - np.linspace(1, 1 / schedule.num_train_timesteps, num_steps + 1)[:0:-1]
    return _multistep(schedule, schedule.shift_sigmas(even, image_tokens), config, dpmpp_weights)


def flow_unipc(schedule, num_steps, image_tokens, config, _):
    """UniPC along a flow (diffusers' UniPCMultistepScheduler with use_flow_sigmas)."""
    even = np.linspace(1, 1 / schedule.num_train_timesteps, num_steps + 1)[:-1]
    sigmas = schedule.shift_sigmas(even, image_tokens)
    return _multistep(schedule, np.minimum(sigmas, 1 - _BELOW_ONE), config, unipc_weights)


def _multistep(schedule, sigmas, config, weigh):
    """A multistep solver along a flow. weigh: (config, alpha, sigma [S + 1]) -> weights."""
    timesteps = np.floor(sigmas * schedule.num_train_timesteps)  # diffusers' schedulers tell the network whole ones
    sigmas = np.append(sigmas.astype(np.float32), 0.0)
    fields = _flow_fields(schedule, sigmas[:-1]) | {"timesteps": timesteps}
    return make_tables(schedule.prediction_type, weigh(config, 1 - sigmas, sigmas), **fields)


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
    return make_tables(schedule.prediction_type, weights, **_flow_fields(schedule, here))


def flow_cps(schedule, num_steps, image_tokens, _, eta):
    """Coefficients-preserving sampling (arXiv 2509.05952): sin(eta pi / 2) of a step's noise is fresh.

    As in DDIM, images are as clean as without: the last step adds no noise.
    """
    sigmas = np.append(schedule.sampling_sigmas(num_steps, image_tokens), 0.0)
    there, angle = sigmas[1:], eta * np.pi / 2
    weights = {"original": 1 - there, "noise": there * np.cos(angle), "random": there * np.sin(angle)}
    return make_tables(schedule.prediction_type, weights, **_flow_fields(schedule, sigmas[:-1]))


def _flow_fields(schedule, sigmas):
    """Fields that samplers of flows share: latents that are (1 - sigma) * x_0 + sigma * noise."""
    return {
        "timesteps": np.float32(sigmas) * np.float32(schedule.num_train_timesteps),
        "init_noise_sigma": 1.0,
        "input_scale": np.ones(len(sigmas)),
        "alpha": 1 - sigmas,
        "sigma": sigmas,
    }
