"""AWM on the built-in tiny model with the built-in tiny reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/awm_tiny.py

As nft_tiny.py, by the present weights, with a policy gradient. Hardware: one CPU core, some five minutes. Result to
expect: after 1,280 images the share of fully right images at guidance 3 has risen from 0.77 to 0.82 (0.78 to 0.85,
three seeds) and the mean reward from 1.66 to 1.72.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "nft_tiny", method="awm")
    config.method.num_steps = 10
    config.optimizer.learning_rate = 5e-5  # at 1e-4 the reward falls again after some 700 images
    return config
