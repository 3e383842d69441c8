"""Networks that a recipe builds from nothing, with the shapes world's own tokenizers."""

import tempfile
import zlib

import jax

from imagereward_jax.data.shapes import write_bert_vocab, write_clip_tokenizer
from imagereward_jax.experiments.parts import open_pipeline
from imagereward_jax.models.blip import INIT_STD
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.rewards.imagereward import ImageReward


def load_or_init_pipeline(config):
    """(pipeline, params) of `config.model.path`, or random ones of `config.model.architecture`."""
    if not config.model.from_scratch:
        return open_pipeline(config)
    tokenizer = tempfile.mkdtemp(prefix="shapes-tokenizer-")
    write_clip_tokenizer(tokenizer)
    architecture = config.model.architecture.to_dict()
    pipeline = StableDiffusion1.from_configs(
        architecture["unet"],
        architecture["vae"],
        architecture["text_encoder"],
        architecture["scheduler"],
        tokenizer,
        dtype=config.dtype,
        remat=config.model.remat,
    )
    key = jax.random.key(config.seed)
    params = pipeline.init(key)
    if config.model.conv_bias_std:
        params["unet"] = with_conv_biases(params["unet"], config.model.conv_bias_std, jax.random.fold_in(key, 1))
    return pipeline, params


def with_conv_biases(unet, std, key):
    """The UNet with the biases of its convolutions drawn from N(0, std^2).

    A UNet knows where it is in the picture by the zeros around it alone, and against small biases they hardly show: a
    small model then learns late, or never, to draw things at the place that a prompt names.
    """

    def draw(path, value):
        names = [str(getattr(part, "key", part)) for part in path]
        if names[-1] != "bias" or not any("conv" in name for name in names):
            return value
        return std * jax.random.normal(jax.random.fold_in(key, zlib.crc32("/".join(names).encode())), value.shape)

    return jax.tree_util.tree_map_with_path(draw, unet)


def init_reward(config):
    """A random ImageReward of `config.reward.architecture` with the shapes world's vocabulary.

    BLIP's initial weights, N(0, 0.02), suit networks a thousand wide; in a small one they leave signals so weak that
    it hardly learns to compare picture and prompt. `config.reward.unit_gain` scales each matrix to variance 1 / inputs,
    `config.reward.position_scale` enlarges the vision transformer's initial positions.
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
    return reward


def _with_unit_gain(path, weight):
    is_matrix = path[-1].key == "kernel" and weight.ndim == 2
    return weight * (weight.shape[0] ** -0.5 / INIT_STD) if is_matrix else weight
