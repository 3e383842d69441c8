"""ReFL on a tiny Stable Diffusion XL of the shapes world: configs/refl_sdxl.py in small, on a CPU.

    python -m imagereward_jax.train --config configs/shapes_pretrain_sdxl.py
    python -m imagereward_jax.train --config configs/refl_sdxl_tiny.py

Tunes what the first command exports, by the built-in tiny reward. Low-rank parameters alone: --config.lora.rank=8
--config.optimizer.learning_rate=2e-3.

Hardware: 2 CPU cores, some seven minutes. Result to expect: not measured since refl_tiny.py, which it changes, draws
guidance from 1 to 5.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.model.path = "runs/shapes_pretrain_sdxl/export"
    return config
