"""The denoising loss with SDXL's micro-conditioning and min-SNR weights, against PyTorch diffusers."""

import jax
import numpy as np
import pytest
import tiny_sdxl

from imagereward_jax.assembly.conditions import with_conditions
from imagereward_jax.assembly.rows import pair_batch
from imagereward_jax.diffusion.schedule import NoiseSchedule
from imagereward_jax.methods import denoising
from imagereward_jax.methods.base import HOST, Models
from imagereward_jax.methods.denoising import min_snr_weights

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")


def reference_weights(scheduler, timesteps, gamma):
    """As diffusers' training scripts weigh the squared errors."""
    snr = diffusers.training_utils.compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1).values
    return weights / (snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers(prediction_type):
    """At every timestep, relative 1e-4: theirs are computed in float32."""
    config = tiny_sdxl.SCHEDULER | {"prediction_type": prediction_type}
    scheduler = diffusers.DDPMScheduler.from_config(config)
    expected = reference_weights(scheduler, torch.arange(1000), 5.0)
    actual = min_snr_weights(NoiseSchedule.from_config(config), np.arange(1000), 5.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_min_snr_weights_without_signal():
    """Zero terminal SNR: finite; the clean sample's weight is the clipped ratio itself."""
    config = tiny_sdxl.SCHEDULER | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(config)
    assert min_snr_weights(schedule, np.array([999]), 5.0).tolist() == [0.0]
    sample = NoiseSchedule(schedule.alphas_cumprod, "sample")
    np.testing.assert_allclose(min_snr_weights(sample, np.array([0, 999]), 5.0), [5.0, 0.0], atol=1e-6)


def test_loss_agrees_with_diffusers(tmp_path):
    """Two pairs of other sizes and crops, one of them with its caption dropped: relative 1e-4; the sizes matter."""
    pipeline, params = tiny_sdxl.make(tmp_path / "tokenizers")
    pipeline.save(tmp_path / "saved", params)
    reference = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    pairs = {
        "image": np.random.default_rng(0).random((2, 16, 16, 3), np.float32),
        "prompt": ["a red circle", ""],
        "original_size": np.array([[32, 48], [20, 16]], np.int32),
        "crop_top_left": np.array([[0, 4], [2, 0]], np.int32),
    }
    batch = pair_batch(pipeline, pairs)
    assert batch["time_ids"].tolist() == [[32, 48, 0, 4, 16, 16], [20, 16, 2, 0, 16, 16]]
    loss_of = denoising.make_loss(pipeline, snr_gamma=5.0)

    @jax.jit
    def loss(params, batch, key):
        models = Models(params)
        return loss_of(models, with_conditions(pipeline, models, batch), key)

    batch.pop(HOST)
    key = jax.random.key(3)
    value, metrics = loss(params, batch, key)

    encode_key, noise_key, time_key = jax.random.split(key, 3)
    latents = np.asarray(jax.jit(pipeline.encode)(params, pairs["image"], encode_key))
    noise = np.asarray(jax.random.normal(noise_key, latents.shape))
    timesteps = torch.from_numpy(np.array(jax.random.randint(time_key, (2,), 0, 1000))).long()
    latents, noise = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (latents, noise))
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler_config)
    with torch.no_grad():
        embeds, zeros, pooled, zeros_pooled = reference.encode_prompt(["a red circle"])
        added = {"text_embeds": torch.cat([pooled, zeros_pooled]), "time_ids": torch.from_numpy(batch["time_ids"])}
        noisy = scheduler.add_noise(latents, noise, timesteps)
        output = reference.unet(noisy, timesteps, torch.cat([embeds, zeros]), added_cond_kwargs=added).sample
    errors = (output - noise).square().mean((1, 2, 3))
    np.testing.assert_allclose(value, (reference_weights(scheduler, timesteps, 5.0) * errors).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["mse"], errors.mean(), rtol=1e-4)
    elsewhere = loss(params, {**batch, "time_ids": batch["time_ids"] + 8}, key)[0]
    assert abs(elsewhere - value) > 3e-4 * value
