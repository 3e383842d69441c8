"""A Stable Diffusion 1.x of some 100,000 random numbers: images of 16 x 16, latents of 8 x 8, 16 tokens."""

import jax
import numpy as np

from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer
from imagereward_jax.pipelines.sd1 import StableDiffusion1

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
VAE = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}


def text_encoder(vocab_size):
    """config.json of the text encoder."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }


def configs(vocab_size):
    """config.json of every component."""
    return {"unet": UNET, "vae": VAE, "text_encoder": text_encoder(vocab_size)}


def make(folder, scheduler=SCHEDULER):
    """(pipeline, params): random weights of unit gain. The tokenizer's files are written into `folder`."""
    vocab_size = write_clip_tokenizer(folder)
    pipeline = StableDiffusion1.from_configs(configs(vocab_size), scheduler, folder)
    return pipeline, random_params(pipeline)


def make_one_level(folder):
    """As `make`, of one level of blocks with attention in the middle alone, and a VAE that halves nothing: it compiles
    in a third of the time."""
    unet = {"block_out_channels": [16], "down_block_types": ["DownBlock2D"]}
    vae = {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "layers_per_block": 1}
    parts = {
        "unet": UNET | unet | {"up_block_types": ["UpBlock2D"]},
        "vae": VAE | vae | {"up_block_types": ["UpDecoderBlock2D"]},
        "text_encoder": text_encoder(write_clip_tokenizer(folder)),
    }
    pipeline = StableDiffusion1.from_configs(parts, SCHEDULER, folder)
    return pipeline, random_params(pipeline)


def save_one_level(folder):
    """Saves a `make_one_level` in `folder`; returns the model's folder."""
    pipeline, params = make_one_level(folder / "tokenizer")
    pipeline.save(folder / "model", params)
    return folder / "model"


def random_params(pipeline):
    """Weights of unit gain for any pipeline; norms and biases are random too."""
    rng = np.random.default_rng(0)

    def random(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + np.float32(0.2) * noise
        stacked = len(leaf.shape) in (3, 5)  # kernels of a stack of layers (models.stack)
        return noise * np.float32(0.1 if path[-1].key == "bias" else np.prod(leaf.shape[stacked:-1]) ** -0.5)

    return jax.tree_util.tree_map_with_path(random, pipeline.abstract_params())
