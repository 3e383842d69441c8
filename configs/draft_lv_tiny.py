"""DRaFT-LV on the built-in tiny model: draft_tiny.py with two more gradients per image at the last step.

    python -m imagereward_jax.train --config configs/draft_lv_tiny.py

Hardware: 2 CPU cores. Time and result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "draft_tiny")
    config.method.noisings = 2
    return config
