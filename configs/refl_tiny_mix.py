"""ReFL with a mixture of two rewards on the built-in tiny model: the built-in reward, and one trained beforehand.

    python -m imagereward_jax.train --config configs/imagereward_tiny.py
    python -m imagereward_jax.train --config configs/refl_tiny_mix.py

The metrics have refl/reward (the mixture) beside refl/reward_builtin and refl/reward_trained, the evaluation likewise;
report.html draws them all. Weight, normalisation and clip of a term: --config.reward.terms.trained.weight=0.5.

Hardware: one CPU core, 274 s of CPU time. Result to expect, on held-out prompts after 100 steps: the mixture from 1.42
to 2.25 (2.31 at step 50), the built-in reward from 1.05 to 1.69, the trained one from 0.81 to 1.33, and the share of
fully right images from 0.29 to 0.68. With the built-in reward's threshold, 2.0, it ends at 2.12, 1.58, 1.23, 0.59.
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
