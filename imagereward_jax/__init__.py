"""Human-preference rewards and reward-gradient tuning of text-to-image diffusion models, in JAX.

import imagereward_jax as RM

model = RM.load("ImageReward-v1.0")
rewards = model.score("a painting of an ocean", ["1.webp", "2.webp"])
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagereward_jax.pipelines import load_pipeline
    from imagereward_jax.rewards.checkpoint import available_models, load
    from imagereward_jax.rewards.functions import jax_reward
    from imagereward_jax.rewards.registry import open_reward
    from imagereward_jax.rewards.scores import available_scores, load_score

__all__ = [
    "available_models",
    "available_scores",
    "jax_reward",
    "load",
    "load_pipeline",
    "load_score",
    "open_reward",
]

# Imported at first use, so that `import imagereward_jax` costs nothing.
_HOMES = {
    "available_models": "imagereward_jax.rewards.checkpoint",
    "available_scores": "imagereward_jax.rewards.scores",
    "jax_reward": "imagereward_jax.rewards.functions",
    "load": "imagereward_jax.rewards.checkpoint",
    "load_pipeline": "imagereward_jax.pipelines",
    "load_score": "imagereward_jax.rewards.scores",
    "open_reward": "imagereward_jax.rewards.registry",
}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
