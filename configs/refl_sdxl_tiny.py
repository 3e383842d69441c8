"""ReFL on a tiny Stable Diffusion XL of the shapes world: configs/refl_sdxl.py in small, on a CPU.

    python -m imagereward_jax.train --config configs/shapes_pretrain_sdxl.py
    python -m imagereward_jax.train --config configs/refl_sdxl_tiny.py

Tunes what the first command exports, by the built-in tiny reward. Hardware: 2 CPU cores. No run has been measured yet.
"""

from imagereward_jax.training.config import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.model.path = "runs/shapes_pretrain_sdxl/export"
    return config
