"""Tunes the built-in model by a jax function, from Python; run at the top of the repository, minutes on a CPU."""

from functools import partial

from imagereward_jax import jax_reward
from imagereward_jax.assembly.run import assemble
from imagereward_jax.recipes import recipe_beside
from imagereward_jax.training.loop import train


@jax_reward
def warmth(images):
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))


config = recipe_beside("configs/here", "refl_tiny")
config.reward.path = "warmth"  # its name in the run's config.json
train(config, partial(assemble, reward=warmth), "runs/warmth")
