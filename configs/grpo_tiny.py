"""GRPO on the built-in tiny model with the built-in tiny reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/grpo_tiny.py

As ddpo_tiny.py but for the advantages, and with a quarter of its steps: eight groups of eight images per step, each
image compared with the others of its prompt. Hardware: one CPU core, some five minutes. Result to expect: after 1,280
images the share of fully right images at guidance 3 has risen from 0.77 to 0.80 (0.80 to 0.82, three seeds) and the
mean reward from 1.66 to 1.68.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "ddpo_tiny", method="flow_grpo")
    config.steps = 20
    config.reward.path = "tiny-shapes"  # this and the next three as measured, not ddpo_tiny.py's
    config.method.guidance_scale = 3.0
    config.method.negative_gradient = True
    config.method.window_high = None
    config.method.sampler = "ddim"
    config.method.eta = 1.0
    config.method.group_size = 8
    config.eval.every = 10
    config.checkpoint.every = 5
    return config
