"""AWM on the built-in tiny Stable Diffusion 3.5 with the built-in tiny reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/awm_sd3_tiny.py

As nft_sd3_tiny.py, by the present weights, with a policy gradient. Hardware: 2 CPU cores. Time and result to
expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "nft_sd3_tiny", method="awm")
    config.method.num_steps = 10
    config.method.noise_levels = 4
    return config
