"""DreamBooth (arXiv 2208.12242): a few images teach the model a new subject, under a prompt with a rare word.

With a class prompt the prior is preserved: beside each batch of instance images one of class images, as many, which the
untouched model made. The loss is that of `denoising`, mean over instances + `prior_weight` * mean over class images, as
in diffusers' train_dreambooth scripts.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import ConfigError, field
from imagereward_jax.diffusion.flow import FlowSchedule
from imagereward_jax.methods import denoising
from imagereward_jax.methods.base import JoinedSource, Loss, Method, Phase


class Config(denoising.Config):
    """config.method of DreamBooth; config.data.pairs are the instance images, config.batch_size counts them alone."""

    uses = ("pairs", "cache", "reward", "lora", "samples")
    defaults = {"data.caption_dropout": 0.0}

    instance_prompt: str = ""  # of every instance image, "a photo of sks dog"; "": each has a caption, as other pairs
    class_prompt: str = ""  # "a photo of dog": preserves the prior; "": does not
    class_prompts: str = ""  # several instead, a file as config.data.prompts; each class image then has its own .txt
    class_images: str = ""  # folder of class images, where missing ones are made; "": WORKDIR/class_images
    num_class_images: int = field(100, at_least=1)  # if the folder has fewer, the model makes the others first
    prior_weight: float = field(1.0, at_least=0.0)  # of the class images' loss

    def check(self, config):
        """Class images need a prompt, and a folder apart from the instances'."""
        super().check(config)
        if self.class_prompt and self.class_prompts:
            raise ConfigError(
                f"config.method.class_prompt={self.class_prompt!r} and class_prompts={self.class_prompts!r}: give one"
            )
        if not self.class_prompt and not self.class_prompts:
            if self.class_images:
                raise ConfigError(
                    f"config.method.class_images={self.class_images!r} has no effect without a class_prompt"
                )
            return
        if config.data.bucket_step:
            raise ConfigError(
                f"config.data.bucket_step={config.data.bucket_step}: a batch of instance and class images is of one "
                "size; pass --config.data.bucket_step=0, or no class prompt"
            )
        pairs, classes = (
            Path(os.path.expanduser(name)).absolute() for name in (config.data.pairs, self.class_images or "/")
        )
        if self.class_images and (classes.is_relative_to(pairs) or pairs.is_relative_to(classes)):
            raise ConfigError(
                f"config.method.class_images={self.class_images!r} and config.data.pairs={config.data.pairs!r}: one "
                "folder holds the other, so that images would be of both: choose folders side by side"
            )


def make(config: Config, parts: Any) -> Method:
    """One phase: the loss on instance images, and on class images if there is a class prompt.

    Raises:
        ConfigError: a field is for other schedules than the model's.
    """
    instances = parts.pairs(config.instance_prompt or None)
    if config.class_prompt or config.class_prompts:
        loss = make_loss(parts.pipeline, config.prior_weight, **config.loss_options)
        classes = parts.class_images(
            config.class_prompt, config.num_class_images, config.class_images, prompts=config.class_prompts
        )
        source = JoinedSource({"instance": instances, "class": classes})
    else:
        loss, source = denoising.make_loss(parts.pipeline, **config.loss_options), instances
    return denoising.supervised(Phase("dreambooth", loss, source), config, parts)


def make_loss(pipeline: Any, prior_weight: float, **options: Any) -> Loss:
    """The loss with prior preservation, of instances and class images in one call of the network.

    Args:
        pipeline, options: see `denoising.make_errors`. Min-SNR weights are the instances' alone, as in diffusers'
            scripts; a flow's weights are those of both.

    Returns:
        (models, batch, key) -> (loss, metrics). batch: {"instance", "class"}, each as for `denoising.make_errors`.
    """
    errors_of = denoising.make_errors(pipeline, **options)
    of_flow = isinstance(pipeline.schedule, FlowSchedule)

    def loss(models, batch, key):
        # An instance and a class image in turn: each device keeps its rows.
        both = jax.tree.map(
            lambda *rows: jnp.stack(rows, 1).reshape(-1, *rows[0].shape[1:]), batch["instance"], batch["class"]
        )
        errors, weights = (rows.reshape(-1, 2) for rows in errors_of(models, both, key))
        prior = errors[:, 1] * (weights[:, 1] if of_flow else 1.0)
        value = jnp.mean(errors[:, 0] * weights[:, 0]) + prior_weight * jnp.mean(prior)
        return value, {"mse": errors[:, 0].mean(), "class_mse": errors[:, 1].mean()}

    return loss
