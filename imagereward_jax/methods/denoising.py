"""The ordinary denoising loss on image-text pairs (DDPM, arXiv 2006.11239; latent diffusion, arXiv 2112.10752)."""

import jax
import jax.numpy as jnp

from imagereward_jax.models.lora import dropout_key
from imagereward_jax.models.param_tree import join


def draw_timesteps(key, batch, num_timesteps, power=1.0):
    """[batch] int32 in [0, num_timesteps): uniform for power 1, denser towards the noisy end below 1."""
    if power == 1.0:
        return jax.random.randint(key, (batch,), 0, num_timesteps)
    share = jax.random.uniform(key, (batch,)) ** power
    return jnp.minimum(jnp.floor(num_timesteps * share), num_timesteps - 1).astype(jnp.int32)


def make_denoising_loss(pipeline, weight=1.0, *, timestep_power=1.0, snr_gamma=0.0):
    """Mean squared error between the network's output and its target at a random timestep.

    Args:
        timestep_power: timesteps are T * u^timestep_power with u uniform in [0, 1): 1 is the usual uniform draw, less
            than 1 draws noisy timesteps more often.
        snr_gamma: > 0 weighs each sample by `min_snr_weights`.

    Returns:
        (trainable, frozen, batch, key) -> (loss, metrics). batch: "image" [B, H, W, 3] in [0, 1] and "input_ids" from
        the pipeline's `tokenize`, or what was computed of them before, "latent_mean" and "latent_logvar" [B, h, w, c]
        and "cond"; for SDXL "time_ids" [B, 6]. The metric "mse" is not weighted.
    """
    schedule = pipeline.schedule
    num_timesteps = schedule.alphas_cumprod.shape[0]

    def loss(trainable, frozen, batch, key):
        params = join(frozen, trainable)
        encode_key, noise_key, time_key = jax.random.split(key, 3)
        latents = jax.lax.stop_gradient(_draw_latents(pipeline, params, batch, encode_key))
        noise = jax.random.normal(noise_key, latents.shape)
        timesteps = draw_timesteps(time_key, latents.shape[0], num_timesteps, timestep_power)
        cond = batch["cond"] if "cond" in batch else pipeline.encode_prompts(params, batch["input_ids"])
        if "time_ids" in batch:
            cond = {**cond, "time_ids": batch["time_ids"]}
        with dropout_key(jax.random.fold_in(key, 1)):
            output = pipeline.denoise(params, schedule.add_noise(latents, noise, timesteps), timesteps, cond)
        errors = jnp.mean(jnp.square(output - schedule.target(latents, noise, timesteps)), axis=(1, 2, 3))
        weights = min_snr_weights(schedule, timesteps, snr_gamma) if snr_gamma else 1.0
        return weight * jnp.mean(weights * errors), {"mse": errors.mean()}

    return loss


def _draw_latents(pipeline, params, batch, key):
    if "latent_mean" in batch:
        return pipeline.draw_latents(batch["latent_mean"], batch["latent_logvar"], key)
    return pipeline.encode(params, batch["image"], key)


def min_snr_weights(schedule, timesteps, gamma):
    """Min-SNR weights (arXiv 2303.09556, section 3.4) of the squared errors of the network's outputs, float32 [B].

    The error of the clean sample counts min(SNR, gamma) times; that of the noise SNR times less, that of the velocity
    SNR + 1 times less. Where nothing but noise is left (SNR 0), the noise's weight is 1, its limit.
    """
    snr = schedule.snr(timesteps)
    if schedule.prediction_type == "epsilon":
        return gamma / jnp.maximum(snr, gamma)
    clipped = jnp.minimum(snr, gamma)
    return clipped / (snr + 1) if schedule.prediction_type == "v_prediction" else clipped
