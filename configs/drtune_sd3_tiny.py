"""DRTune on the built-in tiny Stable Diffusion 3.5: drtune_tiny.py on a flow.

    python -m imagereward_jax.train --config configs/drtune_sd3_tiny.py

Hardware: 2 CPU cores, some five minutes. Result to expect, on 64 held-out prompts at guidance 3, mean of three seeds:
the share of fully right images goes from 0.84 to 0.94 (0.93 to 0.95), the mean reward from 1.72 to 1.91.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "drtune_tiny")
    config.steps = 40
    config.model.path = "tiny-shapes-sd3"
    config.reward.path = "tiny-shapes"  # the second saw no images of this model
    config.method.sampler = "euler"
    return config
