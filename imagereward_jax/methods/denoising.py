"""The ordinary denoising loss on image-text pairs (DDPM, arXiv 2006.11239; latent diffusion, arXiv 2112.10752)."""

import jax
import jax.numpy as jnp

from imagereward_jax.models.lora import dropout_key
from imagereward_jax.models.params import join


def make_denoising_loss(pipeline, weight=1.0):
    """Mean squared error between the network's output and its target at a uniformly drawn timestep.

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
        timesteps = jax.random.randint(time_key, (latents.shape[0],), 0, num_timesteps)
        cond = pipeline.encode_prompts(params, batch["input_ids"])
        with dropout_key(jax.random.fold_in(key, 1)):
            output = pipeline.denoise(params, schedule.add_noise(latents, noise, timesteps), timesteps, cond)
        error = jnp.mean(jnp.square(output - schedule.target(latents, noise, timesteps)))
        return weight * error, {"mse": error}

    return loss
