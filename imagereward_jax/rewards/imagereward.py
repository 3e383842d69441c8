"""The ImageReward score: human preference for an image given a prompt (arXiv 2304.05977)."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models.blip import ImageRewardModel
from imagereward_jax.models.blip_config import BlipScoreConfig, ImageRewardConfig
from imagereward_jax.rewards.base import Reward, named_dtype
from imagereward_jax.rewards.tokens import PromptTokenizer
from imagereward_jax.weights import files, mapping

CONFIG_FILE, WEIGHTS_FILE, VOCAB_FILE = "config.json", "model.safetensors", "vocab.txt"


class ImageReward(Reward):
    """The ImageReward scorer, loaded by `imagereward_jax.load`. Scores are about N(0, 1) for v1.0.

    Args:
        config: an `ImageRewardConfig`.
        params: nested dict of arrays.
        tokenizer: a `PromptTokenizer`.
        **options: those of `Reward`.

    Raises:
        ValueError: the vocabulary sizes of tokenizer and network differ, or an argument is not valid.
    """

    def __init__(
        self, config: ImageRewardConfig, params: dict[str, Any], tokenizer: PromptTokenizer, **options: Any
    ) -> None:
        check_vocabulary(config, tokenizer)
        super().__init__(config, params, tokenizer, **options)

    @staticmethod
    def abstract(config: ImageRewardConfig, dtype: DTypeLike) -> ImageRewardModel:
        """See `Reward.abstract`."""
        return abstract_module(config, dtype)

    @classmethod
    def from_config(
        cls, config: ImageRewardConfig | dict[str, Any], vocab_file: str | os.PathLike, key: jax.Array, **options: Any
    ) -> "ImageReward":
        """Builds a scorer with random weights, for training.

        Args:
            config: an `ImageRewardConfig` or its dict.
            vocab_file: a BERT vocab.txt; two tokens are added to it.
            key: a `jax.random` key.
            **options: those of the class.
        """
        if isinstance(config, dict):
            config = ImageRewardConfig.from_dict(config)
        tokenizer = PromptTokenizer.from_file(vocab_file, config.max_prompt_tokens)
        check_vocabulary(config, tokenizer)
        params = mapping.params_of(ImageRewardModel(config, rngs=nnx.Rngs(params=key)))
        return cls(config, params, tokenizer, **options)

    def save(self, folder: str | os.PathLike, params: dict[str, Any] | None = None, *, overwrite: bool = False) -> None:
        """Writes config.json, model.safetensors (PyTorch's key names) and vocab.txt, which `load` reads.

        A new folder appears complete or not at all; in an existing folder this holds for each file.

        Args:
            params: parameters to save instead of `self.params`.

        Raises:
            FileExistsError: the folder holds a model and `overwrite` is False.
        """
        folder = Path(folder)
        if (folder / WEIGHTS_FILE).exists() and not overwrite:
            raise FileExistsError(f"{folder} already holds a model; choose another folder or pass overwrite=True")
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            config = json.dumps(self.config.to_dict(), indent=2) + "\n"
            (partial / CONFIG_FILE).write_text(config, encoding="utf-8")
            (partial / VOCAB_FILE).write_text(self.tokenizer.vocab, encoding="utf-8", newline="")
            params = self.params if params is None else params
            files.write_safetensors(partial / WEIGHTS_FILE, mapping.to_torch(self._module, params))
            folder.mkdir(exist_ok=True)
            for name in (VOCAB_FILE, CONFIG_FILE, WEIGHTS_FILE):
                os.replace(partial / name, folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@functools.lru_cache(maxsize=8)
def abstract_module(config: ImageRewardConfig, dtype: DTypeLike = jnp.float32, remat: str = "none") -> ImageRewardModel:
    """Builds the network's structure without arrays; shared, so read-only."""
    return mapping.abstract(lambda: ImageRewardModel(config, remat=remat, dtype=dtype, rngs=nnx.Rngs(0)))


def make_apply(
    config: ImageRewardConfig, dtype: DTypeLike, remat: str = "none"
) -> Callable[[dict[str, Any], jax.Array, dict[str, Any]], jax.Array]:
    """Makes a function (params, images, tokens) -> scores, like `Reward.apply`, for parameters of any dtype.

    Args:
        config: an `ImageRewardConfig`. dtype: of the computation. remat: a policy of `models.remat`.
    """
    graphdef = nnx.graphdef(abstract_module(config, named_dtype(dtype), remat))

    def apply(params, images, tokens):
        pixels = ImageReward.preprocess.device(images, config.vision.image_size)
        return nnx.merge(graphdef, params)(pixels, **tokens)

    return apply


def check_vocabulary(config: ImageRewardConfig | BlipScoreConfig, tokenizer: PromptTokenizer) -> None:
    """Raises ValueError if the vocabulary sizes of tokenizer and network differ."""
    if tokenizer.vocab_size != config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens (with [DEC] and [ENC]), the network "
            f"{config.text.vocab_size:,}; pass the vocab.txt that the network was trained with (for ImageReward-v1.0 "
            f"that of bert-base-uncased)"
        )
