"""Networks that a recipe builds from nothing, with the shapes world's own tokenizers."""

import tempfile

import jax

from imagereward_jax.data.shapes import write_bert_vocab, write_clip_tokenizer
from imagereward_jax.experiments.parts import open_pipeline
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
    return pipeline, pipeline.init(jax.random.key(config.seed))


def init_reward(config):
    """A random ImageReward of `config.reward.architecture` with the shapes world's vocabulary.

    `config.reward.position_scale` enlarges the vision transformer's initial positions: with BLIP's, a small model takes
    long to notice where things are.
    """
    folder = tempfile.mkdtemp(prefix="shapes-vocabulary-")
    write_bert_vocab(folder)
    reward = ImageReward.from_config(
        config.reward.architecture.to_dict(), f"{folder}/vocab.txt", jax.random.key(config.seed)
    )
    reward.params["blip"]["visual_encoder"]["pos_embed"] *= config.reward.position_scale
    return reward
