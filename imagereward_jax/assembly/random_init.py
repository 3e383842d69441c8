"""Networks that a recipe builds from nothing, with the shapes world's own tokenizers."""

import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax

from imagereward_jax.data.shapes import write_bert_vocab, write_clip_tokenizer, write_t5_tokenizer
from imagereward_jax.methods.base import Params
from imagereward_jax.models.blip import INIT_STD
from imagereward_jax.pipelines import families
from imagereward_jax.pipelines.base import TextToImage
from imagereward_jax.rewards.imagereward import ImageReward


def open_pipeline(config: Any, **options: Any) -> TextToImage:
    """The pipeline of `config.model.architecture`, without weights.

    The components of the architecture decide the family. If `config.model.vae_from` names a model, the autoencoder has
    that model's settings.

    Args:
        options: dtype, vae_dtype, remat.
    """
    architecture = config.model.architecture.to_dict()
    if config.model.vae_from:
        architecture["vae"] = families.open_pipeline(config.model.vae_from).configs["vae"].to_dict()
    folder = Path(tempfile.mkdtemp(prefix="shapes-tokenizers-"))
    write_clip_tokenizer(folder / "clip")
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2"), folder / "clip")
    if "text_encoder_3" in architecture:
        write_t5_tokenizer(folder / "t5")
        tokenizers["tokenizer_3"] = folder / "t5"
    return families.from_architecture(architecture, tokenizers, **options)


def init_params(config: Any, pipeline: TextToImage) -> Params:
    """Random float32 weights by `config.seed`, and the autoencoder of `config.model.vae_from` if there is one."""
    key = jax.random.key(config.seed)
    params = pipeline.init(key)
    if config.model.conv_bias_std:
        biased = with_conv_biases(params[pipeline.denoiser], config.model.conv_bias_std, jax.random.fold_in(key, 1))
        params[pipeline.denoiser] = biased
    if config.model.vae_from:
        source = families.open_pipeline(config.model.vae_from)
        params["vae"] = source.load_params({"vae": source.abstract_params()["vae"]})["vae"]
    return params


def with_conv_biases(unet: Params, std: float, key: jax.Array) -> Params:
    """The UNet with the biases of its convolutions drawn from N(0, std^2).

    A UNet knows its place in the image only by the zeros around it, which hardly show against small biases: a small
    model then learns late, or never, to draw things at the place that a prompt names.
    """

    def draw(path, value):
        names = [str(getattr(part, "key", part)) for part in path]
        if names[-1] != "bias" or not any("conv" in name for name in names):
            return value
        return std * jax.random.normal(jax.random.fold_in(key, zlib.crc32("/".join(names).encode())), value.shape)

    return jax.tree_util.tree_map_with_path(draw, unet)


def init_scorer(config: Any) -> ImageReward:
    """A random ImageReward of `config.reward.architecture` with the shapes world's vocabulary.

    BLIP's initial weights, N(0, 0.02), suit networks a thousand wide; in a small one they leave signals so weak that
    it hardly learns to compare image and prompt. `config.reward.unit_gain` scales each matrix to variance 1 / inputs,
    `config.reward.position_scale` enlarges the vision transformer's initial positions, `config.reward.head_scale` the
    head's initial matrices: five of N(0, 1 / (width + 1)) in a row give scores, and gradients, of almost nothing.
    """
    folder = tempfile.mkdtemp(prefix="shapes-vocabulary-")
    write_bert_vocab(folder)
    reward = ImageReward.from_config(
        config.reward.architecture.to_dict(), f"{folder}/vocab.txt", jax.random.key(config.seed)
    )
    blip = reward.params["blip"]
    if config.reward.unit_gain:
        blip = jax.tree_util.tree_map_with_path(_with_unit_gain, blip)
        reward.params["blip"] = blip
    blip["visual_encoder"]["pos_embed"] *= config.reward.position_scale
    reward.params["mlp"] = jax.tree.map(
        lambda weight: weight * config.reward.head_scale if weight.ndim == 2 else weight, reward.params["mlp"]
    )
    return reward


def _with_unit_gain(path, weight):
    is_matrix = path[-1].key == "kernel" and weight.ndim == 2
    return weight * (weight.shape[0] ** -0.5 / INIT_STD) if is_matrix else weight
