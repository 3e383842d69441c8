"""The second tiny ImageReward of the shapes world: trained further on what models made, as ImageReward's data are.

    python convert/shapes_groups.py runs/shapes_groups tiny-shapes runs/refl_tiny/export runs/drtune_tiny/export
    python -m imagereward_jax.train --config configs/shapes_reward_samples.py

A reward that has seen drawings alone takes some of a generator's misshapen images for right ones, and tuning finds
those. The groups are images of the untuned model and of models that were tuned with an earlier reward, ranked by the
checker, beside drawn ones; the prompts that models are evaluated with are in none of them. The export is the built-in
reward `tiny-shapes-v2`, but that it began at another reward (docs/tried.md, "Rewards that have seen more of what
models make") and had groups of seven models.

Hardware: one CPU core, seven minutes. Result to expect: of 2,826 pairs of images that two models made of held-out
prompts, `tiny-shapes-v2` orders 93.6 % as the checker does, `tiny-shapes` 88.0 %: docs/benchmarks.md.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "shapes_reward")
    config.reward.path = "tiny-shapes"
    config.data.unclear = 0.4  # of the held-out groups
    config.data.groups = "runs/shapes_groups/groups.json"
    return config
