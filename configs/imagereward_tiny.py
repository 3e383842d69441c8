"""The training of ImageReward in small: the recipe of the shapes world's reward, validated and tested as the original.

    python -m imagereward_jax.train --config configs/imagereward_tiny.py

Network and data are those of configs/shapes_reward.py; the best evaluation's weights are exported and then tested on
groups that no evaluation has seen.

Hardware: 2 CPU cores, as shapes_reward, whose accuracy is to be expected; a whole run of this file was not timed.
"""

from imagereward_jax.training.config import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "shapes_reward")
    config.data.test_groups = "shapes:held_out"
    config.eval.best = "-eval/loss"
    config.checkpoint.export = "best"
    return config
