"""AWM on the built-in tiny model with the built-in tiny reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/awm_tiny.py

As nft_tiny.py, by the present weights, with a policy gradient. Hardware: 2 CPU cores. Time and result to expect: not
measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "nft_tiny", method="awm")
    config.method.num_steps = 10
    config.method.noise_levels = 4
    config.optimizer.learning_rate = 5e-5  # at 1e-4 the reward falls again after some 700 images
    return config
