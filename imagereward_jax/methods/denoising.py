"""The ordinary denoising loss on image-text pairs (DDPM, arXiv 2006.11239; latent diffusion, arXiv 2112.10752)."""

import jax
import jax.numpy as jnp

from imagereward_jax.models.lora import dropout_key
from imagereward_jax.models.params import join


def draw_timesteps(key, batch, num_timesteps, power=1.0):
    """[batch] int32 in [0, num_timesteps): uniform for power 1, denser towards the noisy end below 1."""
    if power == 1.0:
        return jax.random.randint(key, (batch,), 0, num_timesteps)
    share = jax.random.uniform(key, (batch,)) ** power
    return jnp.minimum(jnp.floor(num_timesteps * share), num_timesteps - 1).astype(jnp.int32)


def make_denoising_loss(pipeline, weight=1.0, timestep_power=1.0):
    """Mean squared error between the network's output and its target at a random timestep, T * u^timestep_power with u
    uniform in [0, 1): 1 is the usual uniform draw, less than 1 draws noisy timesteps more often.

    Returns:
        (trainable, frozen, batch, key) -> (loss, metrics). batch: "image" [B, H, W, 3] in [0, 1], "input_ids" [B, L].
    """
    schedule = pipeline.schedule
    num_timesteps = schedule.alphas_cumprod.shape[0]

    def loss(trainable, frozen, batch, key):
        params = join(frozen, trainable)
        encode_key, noise_key, time_key = jax.random.split(key, 3)
        latents = jax.lax.stop_gradient(pipeline.encode(params, batch["image"], encode_key))
        noise = jax.random.normal(noise_key, latents.shape)
        timesteps = draw_timesteps(time_key, latents.shape[0], num_timesteps, timestep_power)
        cond = pipeline.encode_prompts(params, batch["input_ids"])
        with dropout_key(jax.random.fold_in(key, 1)):
            output = pipeline.denoise(params, schedule.add_noise(latents, noise, timesteps), timesteps, cond)
        error = jnp.mean(jnp.square(output - schedule.target(latents, noise, timesteps)))
        return weight * error, {"mse": error}

    return loss
