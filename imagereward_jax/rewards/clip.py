"""Rewards based on CLIP: CLIP score, PickScore, HPSv2.1 and the aesthetic predictor."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models.clip_score import AestheticModel, CLIPConfig, CLIPImageEncoder, CLIPScoreModel
from imagereward_jax.rewards import preprocess
from imagereward_jax.rewards.base import Reward
from imagereward_jax.rewards.tokens import CLIPPromptTokenizer
from imagereward_jax.weights import mapping


class CLIPScore(Reward):
    """Cosine of CLIP's embeddings of image and prompt, from -1 to 1 (about 0.2 for a matching image).

    Args:
        config: a `clip_score.CLIPConfig`.
        params: nested dict of arrays.
        tokenizer: a `CLIPPromptTokenizer`.
        **options: those of `Reward`.

    Raises:
        ValueError: the tokenizer has more tokens than the network.
    """

    def __init__(
        self, config: CLIPConfig, params: dict[str, Any], tokenizer: CLIPPromptTokenizer, **options: Any
    ) -> None:
        if tokenizer.vocab_size > config.text.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, the network {config.text.vocab_size:,}; pass the "
                "vocabulary that the network was trained with"
            )
        super().__init__(config, params, tokenizer, **options)

    @staticmethod
    def abstract(config: CLIPConfig, dtype: DTypeLike) -> CLIPImageEncoder:
        """See `Reward.abstract`."""
        return abstract_clip(CLIPScoreModel, config, dtype)


class PickScore(CLIPScore):
    """PickScore (arXiv 2305.01569): the cosine times the learnt scale, about 20; trained on 500,000 human choices."""

    preprocess = preprocess.RGB_CROP


class HPSv2(CLIPScore):
    """Human preference score v2 (arXiv 2306.09341): the cosine, about 0.28; the image is padded, not cropped."""

    preprocess = preprocess.PAD


class AestheticScore(Reward):
    """LAION's aesthetic predictor: the beauty of an image, about 1 to 10. The prompt is ignored.

    Images are preprocessed as in LAION's own code, in ddpo-pytorch and in TRL's DDPO: resized bicubically, cropped.
    `score` rounds to 8 bits as they do; `apply`, which has a gradient, rounds nothing.

    Args:
        config: a `clip_score.CLIPConfig`; its text tower is not used.
        params: nested dict of arrays.
        tokenizer: a `tokens.NoTokens`.
        **options: those of `Reward`.
    """

    @staticmethod
    def abstract(config: CLIPConfig, dtype: DTypeLike) -> CLIPImageEncoder:
        """See `Reward.abstract`."""
        return abstract_clip(AestheticModel, config, dtype)


class AlignPropAestheticScore(AestheticScore):
    """The aesthetic score of AlignProp's code, whose torchvision 0.15 resizes tensors without antialiasing."""

    preprocess = preprocess.BILINEAR


class TRLAlignPropAestheticScore(AestheticScore):
    """The aesthetic score of TRL's AlignProp: as AlignProp's, with the antialiasing of torchvision 0.17 and later."""

    preprocess = preprocess.BILINEAR_ANTIALIASED


@functools.lru_cache(maxsize=8)
def abstract_clip(
    network: type[CLIPImageEncoder], config: CLIPConfig, dtype: DTypeLike = jnp.float32
) -> CLIPImageEncoder:
    """Builds a CLIP network's structure without arrays; shared, so read-only."""
    return mapping.abstract(lambda: network(config, dtype=dtype, rngs=nnx.Rngs(0)))
