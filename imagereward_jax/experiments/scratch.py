"""Networks that a recipe builds from nothing, with the shapes world's own tokenizers."""

import tempfile
import zlib

import jax
import numpy as np

from imagereward_jax.data.shapes import write_bert_vocab, write_clip_tokenizer
from imagereward_jax.experiments.parts import open_pipeline
from imagereward_jax.models.blip import INIT_STD
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.pipelines.sdxl import StableDiffusionXL
from imagereward_jax.rewards.imagereward import ImageReward
from imagereward_jax.weights import mapping
from imagereward_jax.weights.diffusers import load_component, resolve_pipeline


def load_or_init_pipeline(config):
    """(pipeline, params) of `config.model.path`, or random ones of `config.model.architecture`.

    An architecture with "text_encoder_2" makes an SDXL. Where `config.model.vae_from` names a model, the autoencoder is
    that model's, weights and settings.
    """
    model = config.model
    if not model.from_scratch:
        return open_pipeline(config)
    architecture, vae_tensors = model.architecture.to_dict(), None
    if model.vae_from:
        architecture["vae"], vae_tensors = load_component(resolve_pipeline(model.vae_from), "vae")
    pipeline = _new_pipeline(architecture, dtype=config.dtype, vae_dtype=model.vae_dtype, remat=model.remat)
    key = jax.random.key(config.seed)
    params = pipeline.init(key)
    if model.conv_bias_std:
        params["unet"] = with_conv_biases(params["unet"], model.conv_bias_std, jax.random.fold_in(key, 1))
    if vae_tensors is not None:
        what = f"the autoencoder of {model.vae_from}"
        params["vae"] = mapping.from_torch(pipeline.networks["vae"], vae_tensors, what=what, dtype=np.float32)
    return pipeline, params


def _new_pipeline(architecture, **options):
    """A pipeline of config.json's by network, and "scheduler", with the tokenizer of the shapes world."""
    tokenizer = tempfile.mkdtemp(prefix="shapes-tokenizer-")
    write_clip_tokenizer(tokenizer)
    if "text_encoder_2" in architecture:
        options["tokenizer_2_folder"] = tokenizer
        return StableDiffusionXL.from_configs(**architecture, tokenizer_folder=tokenizer, **options)
    return StableDiffusion1.from_configs(**architecture, tokenizer_folder=tokenizer, **options)


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
