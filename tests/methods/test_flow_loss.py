"""Flow matching under every weighting scheme against the functions of diffusers' training scripts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_flow import SD3, ToyFlow

from imagereward_jax.config import ConfigError
from imagereward_jax.diffusion.flow import FlowSchedule
from imagereward_jax.methods.base import Models
from imagereward_jax.methods.denoising import (
    WEIGHTINGS,
    Config,
    FlowLoss,
    draw_share,
    flow_timesteps,
    flow_weights,
    make_loss,
    share_of_draws,
)

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_shares_and_weights_are_those_of_diffusers(weighting, monkeypatch):
    """From the same draws, all sigmas of Stable Diffusion 3: within 1e-6 relative."""
    settings = FlowLoss(weighting, logit_mean=-0.3, logit_std=0.8, mode_scale=1.1, precondition_outputs=False)
    rng = np.random.default_rng(0)
    draws = (rng.standard_normal(500) if weighting == "logit_normal" else rng.random(500)).astype(np.float32)
    monkeypatch.setattr(torch, "normal", lambda mean, std, **_: mean + std * torch.tensor(draws))
    monkeypatch.setattr(torch, "rand", lambda **_: torch.tensor(draws))
    options = {"logit_mean": -0.3, "logit_std": 0.8, "mode_scale": 1.1}
    expected = training_utils.compute_density_for_timestep_sampling(weighting, 500, **options)
    np.testing.assert_allclose(share_of_draws(jnp.asarray(draws), settings), expected, rtol=1e-6, atol=1e-6)

    sigmas = FlowSchedule.from_config(SD3).train_sigmas()
    expected = training_utils.compute_loss_weighting_for_sd3(weighting, torch.tensor(sigmas))
    np.testing.assert_allclose(flow_weights(jnp.asarray(sigmas), settings), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "quartiles"),
    [
        (FlowLoss(), 1 / (1 + np.exp([0.6745, 0.0, -0.6745]))),
        (FlowLoss(logit_mean=-0.5, logit_std=0.5), 1 / (1 + np.exp([0.83724, 0.5, 0.16276]))),
        (FlowLoss("none"), [0.25, 0.5, 0.75]),
        # 1 - u - m (cos^2(pi u / 2) - 1 + u) at u = 3/4, 1/2, 1/4: it falls in u.
        (FlowLoss("mode"), [0.25 - 1.29 * (0.146447 - 0.25), 0.5, 0.75 - 1.29 * (0.853553 - 0.75)]),
    ],
    ids=str,
)
def test_draws_have_the_quartiles_of_their_distribution(settings, quartiles):
    """Of 20,000 draws, within 0.015."""
    share = draw_share(jax.random.key(0), 20000, settings)
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), quartiles, atol=0.015)


def test_timesteps_are_entries_of_the_training_table():
    """Small shares are noisy; a share that rounds to 1 is the last entry, which diffusers' scripts read past."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    schedule, share = FlowSchedule.from_config(SD3), jnp.array([0.0, 0.2501, 0.9999, 1.0])
    timesteps = flow_timesteps(schedule, share, "schedule", 256)
    np.testing.assert_allclose(timesteps, scheduler.timesteps[[0, 250, 999, 999]], rtol=1e-6)
    np.testing.assert_allclose(flow_timesteps(schedule, share, "none", 256), [1000, 750, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_shift_by_resolution_is_that_of_flux(tokens):
    """e^mu / (e^mu + 1/s - 1) of the unshifted sigmas, mu from 0.5 at 256 tokens to 1.15 at 4,096."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    share = jnp.array([0.0, 0.3001, 0.8001])
    sigmas = np.array([1.0, 0.7, 0.2])
    expected = 1000 * np.exp(mu) / (np.exp(mu) + 1 / sigmas - 1)
    for schedule in (FlowSchedule(shift=3.0), FlowSchedule(use_dynamic_shifting=True)):
        np.testing.assert_allclose(flow_timesteps(schedule, share, "resolution", tokens), expected, rtol=1e-6)


@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_and_gradient_are_those_of_diffusers_training_script(weighting, precondition):
    """Loss, and its gradient by the network's weight: 1e-6 relative, as train_dreambooth_sd3.py computes them."""
    pipeline, key = ToyFlow(), jax.random.key(5)
    settings = FlowLoss(weighting, precondition_outputs=precondition)
    batch = {"image": np.random.default_rng(0).random((4, 8, 8, 4)).astype(np.float32), "cond": {"x": np.zeros(4)}}
    loss = make_loss(pipeline, flow=settings)
    (value, metrics), slope = jax.value_and_grad(lambda w: loss(Models({"toy": w}), batch, key), has_aux=True)(0.7)

    _, noise_key, time_key = jax.random.split(key, 3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SD3)
    latents = torch.tensor(batch["image"])
    noise = torch.tensor(np.array(jax.random.normal(noise_key, latents.shape)))
    indices = (torch.tensor(np.array(draw_share(time_key, 4, settings))) * 1000).long()
    timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
    weight = torch.tensor(0.7, requires_grad=True)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    prediction = pipeline.network(weight, noisy, timesteps.reshape(-1, 1, 1, 1), torch.sin)
    mse = (prediction - (noise - latents)).square().mean()
    prediction = prediction * (-sigmas) + noisy if precondition else prediction
    target = latents if precondition else noise - latents
    weighting = training_utils.compute_loss_weighting_for_sd3(weighting, sigmas)
    expected = torch.mean((weighting.float() * (prediction - target) ** 2).reshape(4, -1), 1).mean()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    np.testing.assert_allclose(slope, weight.grad.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], mse.item(), rtol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr_gamma": 5.0}, r"snr_gamma=5.0: the model's schedule is a flow.*config.method.weighting"),
        ({"timestep_power": 0.5}, r"timestep_power=0.5: the model's schedule is a flow"),
    ],
)
def test_min_snr_is_not_for_flows(options, message):
    with pytest.raises(ConfigError, match=message):
        make_loss(ToyFlow(), **options)


@pytest.mark.parametrize(("name", "value"), [("weighting", "mode"), ("precondition_outputs", False)])
def test_flow_matching_is_not_for_schedules_of_betas(name, value):
    pipeline = ToyFlow({"_class_name": "DDIMScheduler"})
    make_loss(pipeline, flow=FlowLoss())
    with pytest.raises(ConfigError, match=rf"{name}={value}: the model's schedule is one of betas"):
        make_loss(pipeline, flow=FlowLoss()._replace(**{name: value}))


def test_fields_of_the_config_are_those_of_the_loss():
    """With the same defaults, so that a run that sets none trains by diffusers' own."""
    assert Config().flow == FlowLoss()
    changed = dataclasses.replace(Config(), weighting="mode", mode_scale=0.5, timestep_shift="none")
    assert changed.flow == FlowLoss("mode", mode_scale=0.5, timestep_shift="none")
