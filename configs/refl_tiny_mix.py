"""ReFL with a mixture of two rewards on the built-in tiny model: the built-in reward, and one trained beforehand.

    python -m imagereward_jax.train --config configs/imagereward_tiny.py
    python -m imagereward_jax.train --config configs/refl_tiny_mix.py

The metrics have refl/reward (the mixture) beside refl/reward_builtin and refl/reward_trained, the evaluation likewise;
report.html draws them all. Weight, normalisation and clip of a term: --config.reward.terms.trained.weight=0.5.

Hardware: one CPU core, 285 s of CPU time beside other work. Result to expect, on held-out prompts after 100 steps: the
mixture from 1.42 to 2.12, the built-in reward from 1.05 to 1.58, the trained one from 0.81 to 1.23, and the share of
fully right pictures from 0.29 to 0.59. At step 50 it was 2.20, 1.62, 1.29 and 0.57: with config.method.threshold=2.0,
which is the built-in reward's bound and not the mixture's (3.0), pictures above it are rewarded no further.
"""

from imagereward_jax.training.config import recipe_beside, reward_term


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.reward.path = ""
    config.reward.terms.builtin = reward_term("tiny-shapes", clip=2.0)
    config.reward.terms.trained = reward_term("runs/imagereward_tiny/export", weight=0.5, clip=2.0)
    return config
