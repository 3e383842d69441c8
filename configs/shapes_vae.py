"""The autoencoder of the built-in tiny model, trained from nothing on images of the shapes world.

    python -m imagereward_jax.train --config configs/shapes_vae.py

The first of the recipes that make `tiny-shapes`: 32 x 32 images become 8 x 8 x 4 latents. Its export is a whole
diffusers folder whose UNet and text encoder are still random; configs/shapes_pretrain.py starts from it.

Hardware: 2 CPU cores, some 8 minutes. Result to expect: eval/psnr 31 dB.
"""

import ml_collections

from imagereward_jax.recipes import default_config

ARCHITECTURE = {
    "unet": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "norm_num_groups": 16,
    },
    "vae": {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
        "scaling_factor": 1.0,
    },
    "text_encoder": {
        "vocab_size": 589,
        "bos_token_id": 587,
        "eos_token_id": 588,
        "pad_token_id": 588,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "hidden_act": "quick_gelu",
        "projection_dim": 64,
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
    },
}


def get_config():
    """The recipe."""
    config = default_config("autoencoder")
    config.steps = 2000
    config.batch_size = 16
    config.model.remat = "none"
    config.model.from_scratch = True
    config.model.architecture = ml_collections.ConfigDict(ARCHITECTURE)
    config.model.conv_bias_std = 1.0
    config.method.kl_weight = 1e-4
    config.data.pairs = "shapes:train"
    config.data.image_size = 32
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0
    config.ema_decay = 0.99
    config.log_every = 50
    config.writers = ("jsonl",)
    config.eval.every = 1000
    config.checkpoint.every = 1000
    return config
