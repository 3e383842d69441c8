"""ReFL with a mixture of two rewards on the built-in tiny model: the built-in reward, and one trained beforehand.

    python -m imagereward_jax.train --config configs/imagereward_tiny.py
    python -m imagereward_jax.train --config configs/refl_tiny_mix.py

The metrics have refl/reward (the mixture) beside refl/reward_builtin and refl/reward_trained, the evaluation likewise;
report.html draws them all. Weight, normalisation and clip of a term: --config.reward.terms.trained.weight=0.5.

Hardware: that of refl_tiny; each picture is scored twice. Only runs of a few steps have been made, by the tests.
"""

from imagereward_jax.training.config import recipe_beside, reward_term


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.reward.path = ""
    config.reward.terms.builtin = reward_term("tiny-shapes", clip=2.0)
    config.reward.terms.trained = reward_term("runs/imagereward_tiny/export", weight=0.5, clip=2.0)
    return config
