"""Flow-GRPO on the built-in tiny Stable Diffusion 3.5: grpo_tiny.py on a flow; on a CPU.

    python -m imagereward_jax.train --config configs/grpo_sd3_tiny.py

Steps add the noise of Flow-GRPO's SDE while it trains; evaluation follows the ODE. Hardware: 2 CPU cores. Time and
result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "grpo_tiny")
    config.model.path = "tiny-shapes-sd3"
    config.method.sampler = "flow_sde"
    config.method.eta = 0.7
    return config
