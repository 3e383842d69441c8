"""AlignProp on the built-in tiny model: draft_tiny.py with gradient in steps that are drawn anew at every step.

    python -m imagereward_jax.train --config configs/alignprop_tiny.py

Of the ten steps five carry gradient on average, late ones more often. Hardware: 2 CPU cores. Time and result to expect:
not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "draft_tiny")
    config.method.truncation = "per_step"
    config.method.eta = 1.0
    return config
