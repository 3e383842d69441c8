"""The BLIP score: the cosine of BLIP's embeddings of image and prompt (arXiv 2201.12086)."""

import functools

import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models.blip import BlipScoreModel
from imagereward_jax.rewards.base import Reward
from imagereward_jax.rewards.imagereward import check_vocabulary
from imagereward_jax.weights import mapping


class BlipScore(Reward):
    """The cosine of the two projected class tokens, as ImageReward's authors compare with it.

    Args:
        config: a `blip_config.BlipScoreConfig`.
        params: nested dict of arrays.
        tokenizer: a `PromptTokenizer`.
        **options: those of `Reward`.

    Raises:
        ValueError: the tokenizer has another vocabulary size than the network.
    """

    def __init__(self, config, params, tokenizer, **options):
        check_vocabulary(config, tokenizer)
        super().__init__(config, params, tokenizer, **options)

    @staticmethod
    def abstract(config, dtype):
        """See `Reward.abstract`."""
        return abstract_blip(config, dtype)


@functools.lru_cache(maxsize=8)
def abstract_blip(config, dtype=jnp.float32):
    """The network's structure without arrays; only to be read, as it is shared."""
    return mapping.abstract(lambda: BlipScoreModel(config, dtype=dtype, rngs=nnx.Rngs(0)))
