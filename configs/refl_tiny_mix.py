"""ReFL with a mixture of two rewards on the built-in tiny model: the built-in reward, and one trained beforehand.

    python -m imagereward_jax.train --config configs/imagereward_tiny.py
    python -m imagereward_jax.train --config configs/refl_tiny_mix.py

The metrics have refl/reward (the mixture) beside refl/reward_builtin and refl/reward_trained, the evaluation likewise;
report.html draws them all. Weight, normalisation and clip of a term: --config.reward.terms.trained.weight=0.5.

Hardware: 2 CPU cores, some seven minutes. Result to expect: not measured since refl_tiny.py, which it changes, draws
guidance from 1 to 5.
"""

from imagereward_jax.recipes import recipe_beside, reward_term


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.reward.path = ""
    config.method.threshold = 3.0  # as much as the two bounded terms can give together
    config.reward.terms.builtin = reward_term("tiny-shapes", clip=2.0)
    config.reward.terms.trained = reward_term("runs/imagereward_tiny/export", weight=0.5, clip=2.0)
    return config
