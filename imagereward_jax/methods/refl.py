"""ReFL, reward feedback learning (ImageReward, arXiv 2304.05977, algorithm 1).

For each prompt the sampler runs from noise to a random late step without gradient; there the clean latents are
predicted in one step, decoded and scored, and the reward's gradient flows through that one step.
"""

import importlib.util

import jax
import jax.numpy as jnp

from imagereward_jax.config import ConfigError, field, require_given
from imagereward_jax.diffusion.rollout import Gradient, rollout
from imagereward_jax.diffusion.samplers import SAMPLERS, make_sampler
from imagereward_jax.methods import denoising
from imagereward_jax.methods.base import Loss, Method, MethodConfig, Phase
from imagereward_jax.models.lora import dropout_key
from imagereward_jax.models.quantized import KINDS
from imagereward_jax.rewards.mixed import apply_terms


class Config(MethodConfig):
    """config.method of ReFL."""

    uses = ("prompts", "pairs", "cache", "reward", "lora", "samples")
    defaults = {"reward.path": "ImageReward-v1.0", "eval.best": "eval/reward_mean"}

    sampler: str = field("ddpm", choices=SAMPLERS)
    num_steps: int = field(40, at_least=1)  # sampler steps of a whole generation
    stop_min: int = field(
        30, at_least=0
    )  # the step that carries gradient is drawn per sample from [stop_min, stop_max]
    stop_max: int = field(39, at_least=0)
    eta: float = field(0.0, at_least=0.0, at_most=1.0)  # noise of ddim's steps
    rollout_quantization: str = field("none", choices=KINDS)  # of the denoiser in steps without gradient; needs qwix
    guidance_scale: float = 1.0  # at most 1: no guidance while training, half the work
    negative_prompt: str = ""
    height: int = field(512, at_least=1)
    width: int = field(512, at_least=1)
    threshold: float = 2.0  # loss is relu(threshold - reward) * scale
    scale: float = 1e-3
    pretrain: str = field(
        "alternate", choices=("off", "alternate", "add")
    )  # denoising loss on pairs: an own update, or added
    pretrain_weight: float = field(1.0, at_least=0.0)
    snr_gamma: float = field(0.0, at_least=0.0)  # > 0: min-SNR weights of the denoising loss; 5 is usual

    def check(self, config):
        """Steps must be in order, and what the losses read must be given."""
        require_given(config, "model.path")
        require_given(config, "eval.prompts")
        if not config.reward.terms:
            require_given(config, "reward.path", " (or name several in config.reward.terms)")
        if self.pretrain != "off":
            require_given(config, "data.pairs", " (or config.method.pretrain='off' to tune without the denoising loss)")
        if not self.stop_min <= self.stop_max < self.num_steps:
            raise ConfigError(
                f"config.method: stop_min={self.stop_min}, stop_max={self.stop_max} must satisfy "
                f"0 <= stop_min <= stop_max < num_steps={self.num_steps}"
            )
        if self.rollout_quantization != "none" and importlib.util.find_spec("qwix") is None:
            raise ConfigError(
                f"config.method.rollout_quantization={self.rollout_quantization!r} needs qwix: "
                "pip install 'imagereward-jax[quantization]', or qwix alone"
            )


def make(config: Config, parts) -> Method:
    """ReFL's reward phase and, by `config.pretrain`, the denoising loss on pairs beside it."""
    pipeline = parts.pipeline
    sampler = make_sampler(config.sampler, pipeline.scheduler_config, config.num_steps, config.eta)
    negative = config.negative_prompt if config.guidance_scale > 1.0 else None
    refl = Phase("refl", make_loss(config, pipeline, parts.reward), parts.prompts(negative), sampler)
    phases = (refl,)
    if config.pretrain != "off":
        loss = denoising.make_loss(pipeline, config.pretrain_weight, snr_gamma=config.snr_gamma)
        pairs = Phase("denoising", loss, parts.pairs())
        phases = (refl, pairs)
        if config.pretrain == "add":
            phases = (Phase.sum("refl", {"refl": refl, "denoising": pairs}),)
    return Method(
        phases,
        trains=(pipeline.denoiser,),
        evaluate=parts.samples(config.height, config.width),
        shown="refl/reward",
        loop_trips=config.stop_max,
    )


def make_loss(config: Config, pipeline, reward) -> Loss:
    """The loss of one batch of prompts.

    Args:
        pipeline: gives `denoiser_for`, `decode`, `latent_shape`. reward: a differentiable reward; its parameters are
            the component "reward".

    Returns:
        (models, batch, key) -> (loss, metrics). batch: "cond", "negative_cond" (guided only), "reward" (its tokens).
        models.tables: the sampler.
    """
    shape = pipeline.latent_shape(config.height, config.width)

    def loss(models, batch, key):
        stop_key, image_key = jax.random.split(key)
        noise_key, sampler_key = jax.random.split(image_key)
        rows = pipeline.rows(batch["cond"])
        stop = draw_stop(stop_key, rows, config.stop_min, config.stop_max)
        denoise = pipeline.denoiser_for(batch["cond"], batch.get("negative_cond"), config.guidance_scale)

        def denoise_with_gradient(*arguments):
            with dropout_key(jax.random.fold_in(image_key, 1)):
                return denoise(*arguments)

        rolled = rollout(
            denoise,
            models.tables,
            jax.random.normal(noise_key, (rows, *shape)),
            jax.random.split(sampler_key, rows),
            params=models.policy,
            frozen=pipeline.quantized(jax.lax.stop_gradient(models.policy), config.rollout_quantization),
            stop=stop,
            gradient=Gradient(predict=True),
            denoise_with_gradient=denoise_with_gradient,
        )
        images = jnp.clip(pipeline.decode(models.policy, rolled.predicted), 0.0, 1.0)
        rewards, terms = apply_terms(reward, models.policy["reward"], images, batch["reward"])
        metrics = {"reward": rewards.mean(), "reward_std": rewards.std(), "stop": stop.mean()}
        metrics |= {f"reward_{name}": scores.mean() for name, scores in terms.items()}
        return hinge(rewards, threshold=config.threshold, scale=config.scale), metrics

    return loss


def draw_stop(key: jax.Array, rows: int, stop_min: int, stop_max: int) -> jax.Array:
    """[B] stop indices, uniform in [stop_min, stop_max]."""
    return jax.random.randint(key, (rows,), stop_min, stop_max + 1)


def hinge(rewards: jax.Array, *, threshold: float, scale: float) -> jax.Array:
    """mean(relu(threshold - reward)) * scale: an image past the threshold is left alone."""
    return jnp.mean(jax.nn.relu(threshold - rewards)) * scale
