"""ReFL on the built-in tiny Stable Diffusion 3.5: refl_tiny.py on a flow.

    python -m imagereward_jax.train --config configs/refl_sd3_tiny.py

All of the transformer is tuned by the built-in tiny reward, with the flow-matching loss in between; low-rank parameters
alone: --config.lora.rank=8 --config.optimizer.learning_rate=5e-4.

Hardware: 2 CPU cores. Time and result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.model.path = "tiny-shapes-sd3"
    config.method.sampler = "euler"
    return config
