"""Tunes the built-in model by a jax function, from Python; run at the top of the repository, minutes on a CPU."""

from imagereward_jax import Trainer, jax_reward
from imagereward_jax.recipes import recipe_beside


@jax_reward
def warmth(images):
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))


config = recipe_beside("configs/here", "refl_tiny")
Trainer(config, reward=warmth, workdir="runs/warmth").train()
