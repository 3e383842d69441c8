"""DiffusionNFT (arXiv 2509.16117, NVlabs/DiffusionNFT): the forward process instead of the policy gradient.

An old policy, an average of the weights that trails them, makes the images. They are noised anew; the better an image
is within its group, the more is a mixture v+ of new and old prediction pulled to it, and the less its mirror image v-.
"""

from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import field
from imagereward_jax.methods.base import Loss, Method, Phase
from imagereward_jax.methods.forward_process import (
    NoisedConfig,
    make_choose,
    make_sample,
    mean_square,
    noised,
    sampler_of,
)
from imagereward_jax.methods.on_policy import bind_denoiser

OLD = "old"


class Config(NoisedConfig):
    """config.method of DiffusionNFT."""

    beta: float = field(1.0, above=0.0)  # how far v+ and v- are from the old policy: 1.0, or 0.1 (OCR, several rewards)
    # of the mean squared difference to the outputs of the weights that training starts from; no KL, as its code says
    base_penalty: float = field(1e-4, at_least=0.0)
    # After a step that ends with update n the old policy keeps min(old_rate (n - old_delay), old_most) of itself.
    old_rate: float = field(0.001, at_least=0.0)  # 0.0075 for OCR
    old_delay: int = field(0, at_least=0)  # 75 for OCR
    old_most: float = field(0.5, at_least=0.0, at_most=1.0)  # 0.999 for OCR


def make(config: Config, parts: Any) -> Method:
    """One phase, whose batches the old policy makes.

    Raises:
        ConfigError: the sampler does not fit the model's schedule.
    """
    pipeline = parts.pipeline
    sampler = sampler_of(config, pipeline)
    sample, choose = make_sample(config, pipeline, copy=OLD), make_choose(config)
    source = parts.explore(sample=sample, choose=choose, tables=sampler, copies=(OLD,), **config.group_options)
    return Method(
        (Phase("nft", make_loss(config, pipeline), source, sampler),),
        trains=(pipeline.denoiser,),
        copies={OLD: old_decay(config, source.updates)},
        reference=config.base_penalty > 0,
        evaluate=parts.samples(config.height, config.width),
        shown="nft/reward",
    )


def old_decay(config: Config, updates: int) -> Any:
    """update -> the share of itself that the old policy keeps after it; it changes after the last of a step alone."""

    def decay(update):
        share = jnp.clip(config.old_rate * (update + 1 - config.old_delay), 0.0, config.old_most)
        return jnp.where((update + 1) % updates == 0, share, 1.0)

    return decay


def make_loss(config: Config, pipeline: Any) -> Loss:
    """The loss of one noise level of each sample.

    batch: `CONDITIONS`, "clean" [B, h, w, c], "advantage", "step" [B]. models.tables: the sampler.
    """

    def loss(models, batch, key):
        sampler, step, clean = models.tables, batch["step"], batch["clean"]
        state = noised(sampler, clean, jax.random.normal(key, clean.shape), step)
        denoise = bind_denoiser(config, pipeline, batch)
        inputs = sampler.model_input(state, step), sampler.timestep(step), step
        new = denoise(models.policy, *inputs)
        old = jax.lax.stop_gradient(denoise(models.copies[OLD], *inputs))

        def error(output):
            difference = sampler.pred_original(state, output, step) - clean
            size = jnp.abs(difference).mean(tuple(range(1, clean.ndim)))
            return mean_square(difference) / jax.lax.stop_gradient(jnp.maximum(size, 1e-5))

        better = error(config.beta * new + (1 - config.beta) * old)
        worse = error((1 + config.beta) * old - config.beta * new)
        share = 0.5 + 0.5 * batch["advantage"] / config.advantage_clip
        value = config.advantage_clip / config.beta * (share * better + (1 - share) * worse).mean()
        metrics = {"policy": value, "old_deviation": mean_square(new - old).mean()}
        if models.reference is None:
            return value, metrics
        base = jax.lax.stop_gradient(denoise(models.reference, *inputs))
        deviation = mean_square(new - base).mean()
        return value + config.base_penalty * deviation, {**metrics, "base_deviation": deviation}

    return loss
