"""One ReFL step against the same step written in PyTorch with diffusers' networks and scheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refl_reference import (
    PROMPTS,
    TinyReward,
    diffusers,
    draws,
    method_config,
    refl_batch,
    refl_function,
    saved_pair,
    torch,
    torch_step,
)

from imagereward_jax.methods import denoising
from imagereward_jax.methods.base import Models
from imagereward_jax.methods.reward_tuning import draw_guidance, draw_stop, hinge
from imagereward_jax.weights import mapping


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, params, diffusers' pipeline with the same weights)."""
    return saved_pair(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("sampler_name", "guidance"), [("ddpm", 1.0), ("ddim", 3.0)])
def test_loss_and_every_unet_gradient_agree_with_pytorch(made, sampler_name, guidance):
    """Within 1e-3 relative: the loss, and each gradient against its own largest entry."""
    pipeline, params, reference = made
    config, reward = method_config(guidance_scale=guidance), TinyReward()
    batch = refl_batch(pipeline, params, reward, guided=guidance > 1)
    loss = refl_function(pipeline, reward, config, sampler_name)
    frozen = {"vae": params["vae"], "text_encoder": params["text_encoder"], "reward": reward.params}
    key = jax.random.key(3)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        {"unet": params["unet"]}, frozen, batch, key
    )

    noise, step_noise, stop = draws(key, config, pipeline.latent_shape(config.height, config.width), len(PROMPTS))
    expected, expected_gradient = torch_step(
        reference, reward, sampler_name, config, pipeline.tokenize, batch, noise, step_noise, stop
    )

    assert len(set(stop.tolist())) > 1, "the samples must stop at different steps"
    assert metrics["stop"] == stop.mean()
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    ours = mapping.to_torch(pipeline.networks["unet"], gradient["unet"])
    assert ours.keys() == expected_gradient.keys()
    largest = max(np.abs(gradient).max() for gradient in expected_gradient.values())
    for name, theirs in expected_gradient.items():
        tolerance = 1e-3 * np.abs(theirs).max() + 1e-6 * largest  # some are zero but for rounding, as to_k's biases
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=tolerance, err_msg=name)


def test_hinge_by_hand():
    """mean(relu(2 - r)) * scale: rewards 3 and 0 give (0 + 2) / 2 * 0.001."""
    np.testing.assert_allclose(hinge(jnp.array([3.0, 0.0]), threshold=2.0, scale=1e-3), 1e-3, rtol=1e-6)


def test_stop_indices_cover_their_range_evenly():
    """4,000 draws in [30, 39]: each of the ten within a fifth of its share."""
    counts = np.bincount(np.asarray(draw_stop(jax.random.key(0), 4000, 30, 39)), minlength=40)
    assert counts[:30].sum() == 0 and len(counts) == 40
    assert (np.abs(counts[30:] - 400) < 80).all()


def test_denoising_loss_agrees_with_pytorch(made):
    """The loss on pairs and every UNet gradient, from the same latents, noise and timesteps, within 1e-3 relative."""
    pipeline, params, reference = made
    rng = np.random.default_rng(0)
    ids = pipeline.tokenize(PROMPTS[:3])
    cond = jax.jit(pipeline.encode_prompts)(params, ids)
    batch = {"image": rng.random((3, 16, 16, 3), np.float32), "cond": cond}
    loss, key = denoising.make_loss(pipeline), jax.random.key(5)

    def of_unet(unet, batch, key):
        return loss(Models({**params, "unet": unet}), batch, key)

    (value, _), gradient = jax.jit(jax.value_and_grad(of_unet, has_aux=True))(params["unet"], batch, key)

    encode_key, noise_key, time_key = jax.random.split(key, 3)
    latents = np.asarray(pipeline.encode(params, batch["image"], encode_key))
    noise = np.asarray(jax.random.normal(noise_key, latents.shape))
    timesteps = torch.from_numpy(np.asarray(jax.random.randint(time_key, (3,), 0, 1000))).long()
    latents, noise = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (latents, noise))
    scheduler = diffusers.DDPMScheduler.from_config(reference.scheduler.config)
    reference.unet.zero_grad()
    with torch.no_grad():
        embeds = reference.text_encoder(torch.from_numpy(ids["text_encoder"]).long())[0]
    output = reference.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample
    expected = torch.nn.functional.mse_loss(output, noise)
    expected.backward()

    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    ours = mapping.to_torch(pipeline.networks["unet"], gradient)
    largest = max(weight.grad.abs().max().item() for weight in reference.unet.parameters())
    for name, weight in reference.unet.named_parameters():
        tolerance = 1e-3 * weight.grad.abs().max().item() + 1e-6 * largest
        np.testing.assert_allclose(ours[name], weight.grad.numpy(), rtol=0, atol=tolerance, err_msg=name)


def test_each_samples_guidance_is_drawn_from_its_range(made):
    """Within [1, 5] and not all equal; the output is the sum of the two predictions that row's guidance means."""
    pipeline, params, _ = made
    guidance = draw_guidance(method_config(guidance_max=5.0), jax.random.key(0), 3)
    assert guidance.shape == (3, 1, 1, 1) and 1 <= guidance.min() < guidance.max() <= 5
    assert draw_guidance(method_config(guidance_scale=3.0), jax.random.key(0), 3) == 3.0
    ids = [pipeline.tokenize(texts) for texts in (PROMPTS[:3], [""] * 3)]
    cond, negative = (jax.jit(pipeline.encode_prompts)(params, part) for part in ids)
    latents = jax.random.normal(jax.random.key(1), (3, *pipeline.latent_shape(8, 8)))
    outputs = {
        name: jax.jit(pipeline.denoiser_for(*conditions))(params, latents, jnp.full(3, 500), 0)
        for name, conditions in {
            "positive": (cond,),
            "negative": (negative,),
            "guided": (cond, negative, guidance),
        }.items()
    }
    expected = outputs["negative"] + guidance * (outputs["positive"] - outputs["negative"])
    np.testing.assert_allclose(outputs["guided"], expected, rtol=1e-5, atol=1e-5)
