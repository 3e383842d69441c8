"""DiffusionNFT on the built-in tiny Stable Diffusion 3.5: nft_tiny.py on a flow; on a CPU.

    python -m imagereward_jax.train --config configs/nft_sd3_tiny.py

Hardware: 2 CPU cores. Time and result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "nft_tiny")
    config.model.path = "tiny-shapes-sd3"
    return config
