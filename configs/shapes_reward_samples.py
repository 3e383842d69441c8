"""A tiny ImageReward of the shapes world trained further on what models made: as ImageReward's own data are.

    python -m imagereward_jax.train --config configs/shapes_reward.py --config.data.unclear=0.4
    python convert/shapes_groups.py runs/shapes_groups tiny-shapes runs/refl_tiny/export
    python -m imagereward_jax.train --config configs/shapes_reward_samples.py

A reward that has seen drawings alone takes some of a generator's misshapen images for right ones, and tuning finds
those. The groups are images of the untuned model and of models that were tuned with an earlier reward, ranked by the
checker, beside drawn ones. The built-in model `tiny-shapes` does not have this reward yet.

Hardware: 2 CPU cores, some five minutes. Result to expect: what ReFL makes of it, in docs/tried.md.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "shapes_reward")
    config.steps = 1500
    config.reward.path = "runs/shapes_reward/export"
    config.data.unclear = 0.4  # of the held-out groups
    config.data.groups = "runs/shapes_groups/groups.json"
    config.optimizer.learning_rate = 2e-4
    return config
