"""The BLIP score: the cosine of BLIP's embeddings of image and prompt (arXiv 2201.12086)."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models.blip import BlipScoreModel
from imagereward_jax.models.blip_config import BlipScoreConfig
from imagereward_jax.rewards.base import Reward
from imagereward_jax.rewards.imagereward import check_vocabulary
from imagereward_jax.rewards.tokens import PromptTokenizer
from imagereward_jax.weights import mapping


class BlipScore(Reward):
    """Cosine of the two projected class tokens, the BLIP baseline of the ImageReward paper.

    Args:
        config: a `blip_config.BlipScoreConfig`.
        params: nested dict of arrays.
        tokenizer: a `PromptTokenizer`.
        **options: those of `Reward`.

    Raises:
        ValueError: the vocabulary sizes of tokenizer and network differ.
    """

    def __init__(
        self, config: BlipScoreConfig, params: dict[str, Any], tokenizer: PromptTokenizer, **options: Any
    ) -> None:
        check_vocabulary(config, tokenizer)
        super().__init__(config, params, tokenizer, **options)

    @staticmethod
    def abstract(config: BlipScoreConfig, dtype: DTypeLike) -> BlipScoreModel:
        """See `Reward.abstract`."""
        return abstract_blip(config, dtype)


@functools.lru_cache(maxsize=8)
def abstract_blip(config: BlipScoreConfig, dtype: DTypeLike = jnp.float32) -> BlipScoreModel:
    """Builds the network's structure without arrays; shared, so read-only."""
    return mapping.abstract(lambda: BlipScoreModel(config, dtype=dtype, rngs=nnx.Rngs(0)))
