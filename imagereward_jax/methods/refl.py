"""ReFL, reward feedback learning (ImageReward, arXiv 2304.05977, algorithm 1).

For each prompt the sampler runs from noise to a random late step without gradient; there the clean latents are
predicted in one step, decoded and scored, and the reward's gradient flows through that one step.
"""

import jax

from imagereward_jax.config import MAX_STEPS, ConfigError, field
from imagereward_jax.diffusion.rollout import Gradient
from imagereward_jax.diffusion.samplers import SAMPLERS
from imagereward_jax.methods.base import Loss, Method
from imagereward_jax.methods.reward_tuning import (
    RewardTuningConfig,
    denoisers,
    draw_stop,
    hinge,
    roll,
    score,
    tuning_method,
)


class Config(RewardTuningConfig):
    """config.method of ReFL."""

    sampler: str = field("ddpm", choices=SAMPLERS)  # of the images that train
    num_steps: int = field(40, at_least=1, at_most=MAX_STEPS)  # sampler steps of a whole generation
    stop_min: int = field(
        30, at_least=0
    )  # the step that carries gradient is drawn per sample from [stop_min, stop_max]
    stop_max: int = field(39, at_least=0)  # see stop_min; below num_steps
    threshold: float = 2.0  # loss is relu(threshold - reward) * scale
    scale: float = 1e-3  # of the loss, beside the denoising loss
    pretrain: str = field(
        "alternate", choices=("off", "alternate", "add")
    )  # denoising loss on pairs: an own update, or added

    def check(self, config):
        """Steps must be in order, and what the losses read must be given."""
        super().check(config)
        if not self.stop_min <= self.stop_max < self.num_steps:
            raise ConfigError(
                f"config.method: stop_min={self.stop_min}, stop_max={self.stop_max} must satisfy "
                f"0 <= stop_min <= stop_max < num_steps={self.num_steps}"
            )


def make(config: Config, parts) -> Method:
    """ReFL's reward phase and, by `config.pretrain`, the denoising loss on pairs beside it."""
    return tuning_method("refl", make_loss, config, parts, loop_trips=config.stop_max)


def make_loss(config: Config, pipeline, reward) -> Loss:
    """The loss of one batch of prompts.

    Args:
        pipeline: gives `denoiser_for`, `decode`, `latent_shape`. reward: a differentiable reward; its parameters are
            the component "reward".

    Returns:
        (models, batch, key) -> (loss, metrics). batch: "cond", "negative_cond" (guided only), "reward" (its tokens).
        models.tables: the sampler.
    """

    def loss(models, batch, key):
        stop_key, image_key = jax.random.split(key)
        rows = pipeline.rows(batch["cond"])
        stop = draw_stop(stop_key, rows, config.stop_min, config.stop_max)
        denoise = denoisers(config, pipeline, batch, jax.random.fold_in(image_key, 1))
        options = {"stop": stop, "gradient": Gradient(predict=True)}
        rolled = roll(config, pipeline, models, denoise, jax.random.split(image_key), rows, **options)
        rewards, metrics = score(pipeline, reward, models.policy, rolled.predicted, batch["reward"])
        return hinge(rewards, threshold=config.threshold, scale=config.scale), {**metrics, "stop": stop.mean()}

    return loss
