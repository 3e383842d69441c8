"""DiffusionNFT on the built-in tiny Stable Diffusion 3.5 with the built-in tiny reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/nft_sd3_tiny.py

Each step samples eight groups of eight images by DPM-Solver++ with the old policy, and makes one update, at four noise
levels of each image. Hardware: 2 CPU cores. Time and result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "grpo_sd3_tiny", method="nft")
    config.steps = 20
    config.batch_size = 64
    config.accumulation = 2
    config.method.sampler = "dpmpp_2m"
    config.method.eta = 0.0
    config.method.rounds = 1
    config.method.noise_levels = 4
    config.eval.every = 10
    return config
