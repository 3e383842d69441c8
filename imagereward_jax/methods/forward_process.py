"""Shared by the methods that train on noised samples of their own (NFT, AWM, online DPO): any sampler makes images,
whose clean latents alone are kept; no log-probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.config import MAX_STEPS, ConfigError, field
from imagereward_jax.diffusion.rollout import rollout
from imagereward_jax.diffusion.sampler import Sampler, SamplerState
from imagereward_jax.diffusion.samplers import SAMPLERS
from imagereward_jax.diffusion.schedule import per_sample
from imagereward_jax.methods.base import STEPS
from imagereward_jax.methods.on_policy import GroupConfig, bind_denoiser, conditions_of, draw_noise


class SampledConfig(GroupConfig):
    """config.method of every such method."""

    sampler: str = field("dpmpp_2m", choices=SAMPLERS)  # of the images that train
    num_steps: int = field(
        10, at_least=1, at_most=MAX_STEPS
    )  # sampler steps in training; evaluation takes more (config.eval.num_steps)
    eta: float = field(0.0, at_least=0.0)  # noise of the steps of ddim, flow_sde, dance_sde and cps
    guidance_scale: float = 1.0  # in sampling and in training; at most 1: no guidance, half the work


class NoisedConfig(SampledConfig):
    """config.method of those that noise an image to levels of the sampler's steps."""

    noise_levels: int = field(
        9, at_least=1
    )  # steps at which each sample trains, drawn anew, an accumulation round each
    first_step: int = field(0, at_least=0)  # of those drawn from; 1 leaves out the step from noise alone

    def check(self, config):
        """There must be so many steps."""
        if self.noise_levels > self.num_steps - self.first_step:
            raise ConfigError(
                f"config.method.noise_levels={self.noise_levels}: expected at most num_steps={self.num_steps} less "
                f"first_step={self.first_step}"
            )
        super().check(config)


def sampler_of(config: SampledConfig, pipeline: Any) -> Sampler:
    """The sampler of a config.

    Raises:
        ConfigError: it does not fit the model's schedule.
    """
    try:
        return pipeline.make_sampler(config.sampler, config.num_steps, config.eta, config.height, config.width)
    except ValueError as error:
        raise ConfigError(f"config.method: {error}") from error


def make_sample(config: SampledConfig, pipeline: Any, copy: str | None = None) -> Any:
    """(models, batch, key) -> (images, rows): the conditions and "clean" [B, h, w, c], the latents of the images.

    Args:
        copy: of `models.copies`, the weights that sample; None for the present ones. models.tables: the sampler.
    """
    shape = pipeline.latent_shape(config.height, config.width)

    def sample(models, batch, key):
        noise_key, step_key = jax.random.split(key)
        rows = pipeline.rows(batch["cond"])
        rolled = rollout(
            bind_denoiser(config, pipeline, batch),
            models.tables,
            draw_noise(config, noise_key, batch, shape, rows),
            jax.random.split(step_key, rows),
            params=models.copies[copy] if copy else models.policy,
        )
        clean = rolled.state.latents
        images = jnp.clip(pipeline.decode(models.policy, clean), 0.0, 1.0)
        return images, {**conditions_of(batch), "clean": clean}

    return sample


def make_choose(config: NoisedConfig) -> Any:
    """(rows, rng) -> batch: of each sample `noise_levels` steps of the sampler, in an order of its own, as "step"."""
    steps = np.arange(config.first_step, config.num_steps, dtype=np.int32)

    def choose(rows, rng):
        order = rng.permuted(np.tile(steps, (len(rows["clean"]), 1)), axis=1)
        return {**rows, STEPS: {"step": order[:, : config.noise_levels]}}

    return choose


def noised(sampler: Sampler, clean: jax.Array, noise: jax.Array, step: jax.Array) -> SamplerState:
    """The state before `step` [B] that clean latents and noise [B, h, w, c] give."""
    alpha, sigma, scale = (
        per_sample(table, step, clean.ndim) for table in (sampler.alpha, sampler.sigma, sampler.input_scale)
    )
    return SamplerState((alpha * clean + sigma * noise) / scale, jnp.zeros_like(clean))


def mean_square(x: jax.Array) -> jax.Array:
    """Mean square of each row, [B]."""
    return jnp.square(x).mean(tuple(range(1, x.ndim)))
