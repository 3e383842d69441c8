"""Weights of multistep solvers between latents alpha * x_0 + sigma * noise, of betas and of flows alike.

`alpha` and `sigma` are float64 [S + 1], the last sigma may be 0; weights are float64 [S].
"""

import numpy as np


def dpmpp_weights(config, alpha, sigma):
    """DPM-Solver++ (2M), arXiv 2211.01095."""
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


def unipc_weights(config, alpha, sigma):
    """UniPC of order 1 or 2 that predicts clean latents (arXiv 2302.04867, algorithms 1 and 2).

    A step corrects the latents that it begins with, once the network has seen them, and predicts the next ones from the
    corrected. Predicted and corrected latents differ in their share of predicted clean latents alone, so the step needs
    those of two steps before, and no latents but its own.
    """
    steps = len(alpha) - 1
    with np.errstate(divide="ignore", invalid="ignore"):  # steps of no length are refused by `make_sampler`
        half_snr = np.log(alpha / sigma)  # lambda in the paper, infinite at a sigma of 0
        length = np.diff(half_snr)  # h
        ratio = np.append(np.nan, -length[:-1] / length[1:])  # r_1 of each step, negative
    second = np.arange(steps) > 0 if config["solver_order"] == 2 else np.zeros(steps, bool)
    # A step to a sigma of 0 has no second order, whatever the config says; diffusers' is infinite there.
    if config["lower_order_final"] or sigma[-1] == 0:
        second[-1] = False
    phi = np.expm1(-length)
    scale = -alpha[1:] * (-length if config["solver_type"] == "bh1" else phi)  # of B(h)
    predicted = np.zeros(steps)
    predicted[second] = 0.5 * scale[second] / ratio[second]
    now, earlier = (np.append(0.0, part) for part in _corrections(config, second[:-1], length, ratio, scale))
    through = sigma[1:] / sigma[:-1]
    return {
        "latents": through,
        "original": -alpha[1:] * phi - predicted + through * now,
        "previous": predicted - through * (now + earlier),
        "earlier": through * earlier,
    }


def _corrections(config, second, length, ratio, scale):
    """Shares that correcting adds to the latents a step reaches: of the clean latents predicted there, and of those
    predicted a step before it began, each [S - 1]. The share of those between is minus both."""
    length, ratio, scale = (part[: len(second)] for part in (length, ratio, scale))
    phi = np.expm1(-length)
    factor = -length if config["solver_type"] == "bh1" else phi
    phi_2 = phi / -length - 1
    first, other = phi_2 / factor, 2 * (phi_2 / -length - 0.5) / factor  # b_1 and b_2 in the paper
    before = np.where(second, (first - other) / (1 - ratio), 0.0)
    now = np.where(second, first - before, 0.5) * scale
    earlier = np.where(second, (before - 0.5) / ratio, 0.0) * scale
    skipped = np.isin(np.arange(len(second)), config["disable_corrector"])
    return np.where(skipped, 0.0, now), np.where(skipped, 0.0, earlier)
