"""Tunes the built-in model by a Python function, from Python; run at the top of the repository, minutes on a CPU."""

from functools import partial

from imagereward_jax.assembly.run import assemble
from imagereward_jax.recipes import recipe_beside
from imagereward_jax.training.loop import train


def contrast(images, prompts, metadata):
    return images.std((1, 2, 3)) / 255


config = recipe_beside("configs/here", "ddpo_tiny")
config.reward.path = "contrast"  # its name in the run's config.json
train(config, partial(assemble, reward=contrast), "runs/contrast")
