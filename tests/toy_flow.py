"""A flow of latents [8, 8, 4] whose network is one smooth function, and a reward, for losses without a real model."""

import jax.numpy as jnp

from imagereward_jax.diffusion.flow import read_schedule
from imagereward_jax.diffusion.samplers import make_sampler

SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


class ToyFlow:
    """What losses read of a `TextToImage`; the component "toy" is one weight. Conditions: {"x": [B]}."""

    family, denoiser = "toy", "toy"

    def __init__(self, scheduler_config=SD3):
        self.scheduler_config = scheduler_config
        self.schedule = read_schedule(scheduler_config)

    @staticmethod
    def network(weight, latents, timesteps, sin, x=0.0):
        """The output, the same in jax and torch; timesteps and conditions broadcast against the latents."""
        return weight * sin(1.3 * latents + 0.002 * timesteps + x) + 0.2 * weight * latents

    def denoise(self, params, latents, timesteps, cond):
        rows = (-1, 1, 1, 1)
        timesteps, x = jnp.asarray(timesteps).reshape(rows), jnp.asarray(cond["x"]).reshape(rows)
        return self.network(params["toy"], latents, timesteps, jnp.sin, x)

    def denoiser_for(self, cond, negative_cond=None, guidance_scale=1.0, **options):
        def denoise(params, latents, timesteps, step):
            copies = latents.shape[0] // len(cond["x"])
            return self.denoise(params, latents, timesteps, {"x": jnp.repeat(jnp.asarray(cond["x"]), copies)})

        return denoise

    def make_sampler(self, name, num_steps, eta, height, width):
        return make_sampler(name, self.scheduler_config, num_steps, eta)

    def rows(self, cond):
        return len(cond["x"])

    def latent_shape(self, height, width):
        return 8, 8, 4

    def image_tokens(self, latent_shape):
        return latent_shape[0] * latent_shape[1] // 4

    def quantized(self, params, kind):
        return params

    def encode(self, params, images, key):
        return images

    def decode(self, params, latents):
        return 0.5 + 0.1 * latents


class ToyReward:
    """sum of tanh of the pixels times a number of the prompt."""

    def apply(self, params, images, tokens):
        return self.score(images, jnp.asarray(tokens).reshape(-1, 1, 1, 1), jnp.tanh).sum((1, 2, 3))

    @staticmethod
    def score(images, number, tanh):
        return tanh(number * (images - 0.3))
