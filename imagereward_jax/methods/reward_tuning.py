"""Shared by the methods that follow a reward's gradient: their fields, phases, guided denoisers and scored images."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import MAX_SIDE, MAX_STEPS, ConfigError, field, require_given
from imagereward_jax.diffusion.rollout import Denoise, Rolled, rollout
from imagereward_jax.diffusion.samplers import SAMPLERS
from imagereward_jax.methods import denoising
from imagereward_jax.methods.base import (
    Batch,
    Key,
    Loss,
    Method,
    MethodConfig,
    Metrics,
    Models,
    Params,
    Phase,
    require_sampling,
)
from imagereward_jax.models.lora import dropout_key
from imagereward_jax.models.quantized import KINDS
from imagereward_jax.rewards.mixed import apply_terms


class RewardTuningConfig(MethodConfig):
    """config.method of every such method."""

    uses = ("prompts", "pairs", "cache", "reward", "lora", "samples")
    defaults = {"reward.path": "ImageReward-v1.0", "eval.best": "eval/reward_mean"}

    sampler: str = field("ddim", choices=SAMPLERS)  # of the images that train
    num_steps: int = field(50, at_least=1, at_most=MAX_STEPS)  # sampler steps of a whole generation
    eta: float = field(0.0, at_least=0.0, at_most=1.0)  # noise of ddim's and tcd's steps
    rollout_quantization: str = field("none", choices=KINDS)  # of the denoiser in steps without gradient; needs qwix
    guidance_scale: float = 1.0  # at most 1: no guidance while training, half the work
    # if given, each sample's guidance is drawn from [guidance_scale, guidance_max], evenly in its logarithm
    guidance_max: float | None = None
    negative_prompt: str = ""  # what guidance leads away from
    negative_gradient: bool = True  # False: none through the negative prompt's branch, half the backward pass
    # with negative_gradient=False: the prompt's branch has its gradient without guidance's factor, so that samples of
    # any guidance weigh the same
    unit_gradient: bool = False
    height: int = field(512, at_least=1, at_most=MAX_SIDE)  # of the images that train, in pixels
    width: int = field(512, at_least=1, at_most=MAX_SIDE)  # in pixels
    pretrain: str = field(
        "off", choices=("off", "alternate", "add")
    )  # denoising loss on pairs: an own update, or added
    pretrain_weight: float = field(1.0, at_least=0.0)  # of the denoising loss
    snr_gamma: float = field(0.0, at_least=0.0)  # > 0: min-SNR weights of the denoising loss; 5 is usual

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is needed."""
        return max(self.guidance_scale, self.guidance_max or 0.0) > 1.0

    def check(self, config):
        """The losses' inputs and what they need installed must be given."""
        require_sampling(config)
        if self.pretrain != "off":
            require_given(config, "data.pairs", " (or config.method.pretrain='off' to tune without the denoising loss)")
        if self.guidance_max is not None and not 1.0 <= self.guidance_scale <= self.guidance_max:
            raise ConfigError(
                f"config.method: guidance_scale={self.guidance_scale:g} and guidance_max={self.guidance_max:g} must "
                "satisfy 1 <= guidance_scale <= guidance_max (or leave guidance_max at None for one guidance)"
            )
        if self.unit_gradient and self.negative_gradient:
            raise ConfigError("config.method.unit_gradient needs config.method.negative_gradient=False")
        if self.rollout_quantization != "none" and importlib.util.find_spec("qwix") is None:
            raise ConfigError(
                f"config.method.rollout_quantization={self.rollout_quantization!r} needs qwix: "
                "pip install 'imagereward-jax[quantization]', or qwix alone"
            )


def tuning_method(
    name: str, make_loss: Callable[..., Loss], config: RewardTuningConfig, parts: Any, **options: Any
) -> Method:
    """The method of one loss on prompts and, by `config.pretrain`, the denoising loss on pairs beside it.

    Args:
        name: of the loss's phase. make_loss: (config, pipeline, reward) -> loss. options: further fields of `Method`.
    """
    pipeline = parts.pipeline
    sampler = pipeline.make_sampler(config.sampler, config.num_steps, config.eta, config.height, config.width)
    negative = config.negative_prompt if config.guided else None
    tuning = Phase(name, make_loss(config, pipeline, parts.reward), parts.prompts(negative), sampler)
    phases = (tuning,)
    if config.pretrain != "off":
        loss = denoising.make_loss(pipeline, config.pretrain_weight, snr_gamma=config.snr_gamma)
        pairs = Phase("denoising", loss, parts.pairs())
        phases = (tuning, pairs)
        if config.pretrain == "add":
            phases = (Phase.sum(name, {name: tuning, "denoising": pairs}),)
    return Method(
        phases,
        trains=(pipeline.denoiser,),
        evaluate=parts.samples(config.height, config.width),
        shown=f"{name}/reward",
        **options,
    )


def denoisers(config: RewardTuningConfig, pipeline: Any, batch: Batch, key: Key) -> tuple[Denoise, Denoise]:
    """(for steps without gradient, for those with it: with the dropout of low-rank layers, drawn anew at each step).

    Args:
        key: of the dropout and of each sample's guidance.
    """
    guidance = draw_guidance(config, jax.random.fold_in(key, config.num_steps), pipeline.rows(batch["cond"]))
    conditions = batch["cond"], batch.get("negative_cond"), guidance
    options = {"negative_gradient": config.negative_gradient, "unit_gradient": config.unit_gradient}
    denoise = pipeline.denoiser_for(*conditions, **options)

    def with_gradient(params, latents, timesteps, step):
        with dropout_key(jax.random.fold_in(key, step[0])):
            return denoise(params, latents, timesteps, step)

    return pipeline.denoiser_for(*conditions), with_gradient


def roll(
    config: RewardTuningConfig,
    pipeline: Any,
    models: Models,
    denoise: tuple[Denoise, Denoise],
    keys: tuple[Key, Key],
    rows: int,
    **options: Any,
) -> Rolled:
    """A rollout of one image for each of `rows` samples.

    Args:
        denoise: from `denoisers`. keys: of the initial noise and of the steps. options: stop and gradient.
    """
    (plain, with_gradient), (noise_key, sampler_key) = denoise, keys
    return rollout(
        plain,
        models.tables,
        jax.random.normal(noise_key, (rows, *pipeline.latent_shape(config.height, config.width))),
        jax.random.split(sampler_key, rows),
        params=models.policy,
        frozen=pipeline.quantized(jax.lax.stop_gradient(models.policy), config.rollout_quantization),
        reference=models.reference,
        denoise_with_gradient=with_gradient,
        **options,
    )


def score(pipeline: Any, reward: Any, params: Params, latents: jax.Array, tokens: Any) -> tuple[jax.Array, Metrics]:
    """(rewards [B] of decoded latents, metrics of them and of the terms of a mixture)."""
    images = jnp.clip(pipeline.decode(params, latents), 0.0, 1.0)
    rewards, terms = apply_terms(reward, params.get("reward", {}), images, tokens)
    metrics = {"reward": rewards.mean(), "reward_std": rewards.std()}
    return rewards, metrics | {f"reward_{name}": scores.mean() for name, scores in terms.items()}


def draw_guidance(config: RewardTuningConfig, key: Key, rows: int) -> float | jax.Array:
    """The guidance scale, or one for each sample, [B, 1, 1, 1], log-uniform up to `config.guidance_max`."""
    if config.guidance_max is None:
        return config.guidance_scale
    share = jax.random.uniform(key, (rows, 1, 1, 1))
    return config.guidance_scale * (config.guidance_max / config.guidance_scale) ** share


def draw_stop(key: Key, rows: int, stop_min: int, stop_max: int) -> jax.Array:
    """[B] stop indices, uniform in [stop_min, stop_max]."""
    return jax.random.randint(key, (rows,), stop_min, stop_max + 1)


def hinge(rewards: jax.Array, *, threshold: float, scale: float) -> jax.Array:
    """mean(relu(threshold - reward)) * scale: an image past the threshold is left alone."""
    return jnp.mean(jax.nn.relu(threshold - rewards)) * scale
