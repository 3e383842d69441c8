"""A tiny Stable Diffusion XL of the shapes world, trained by the denoising loss on noisily captioned pictures.

    python -m imagereward_jax.train --config configs/shapes_pretrain_sdxl.py

Starts from the autoencoder of `tiny-shapes` (`config.model.vae_from`) and a random UNet and text encoders with all that
makes SDXL: two encoders side by side, a pooled projection, original size and crop, transformers of different depth. As
in configs/shapes_pretrain.py many captions are wrong in a word. configs/refl_sdxl_tiny.py tunes its export.

Hardware: 2 CPU cores, some 20 minutes. Result to expect: eval/checker_rate 0.59 with guidance 2.
"""

import ml_collections

from imagereward_jax.training.config import default_config

_TEXT = {
    "vocab_size": 589,
    "bos_token_id": 587,
    "eos_token_id": 588,
    "pad_token_id": 588,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "projection_dim": 48,
}
ARCHITECTURE = {
    "unet": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (48, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (4, 8),
        "cross_attention_dim": 96,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 96,
        "norm_num_groups": 16,
    },
    "text_encoder": {"architectures": ("CLIPTextModel",), **_TEXT},
    "text_encoder_2": {**_TEXT, "architectures": ("CLIPTextModelWithProjection",), "hidden_act": "gelu"},
    "scheduler": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "v_prediction",
    },
}


def get_config():
    """The recipe."""
    config = default_config("denoising")
    config.steps = 2000
    config.batch_size = 32
    config.model.from_scratch = True
    config.model.vae_from = "tiny-shapes"
    config.model.architecture = ml_collections.ConfigDict(ARCHITECTURE)
    config.model.conv_bias_std = 1.0
    config.model.remat = "none"
    config.method.train_text_encoder = True
    config.method.timestep_power = 0.6  # what is drawn, and where, is decided where the noise is strong
    config.data.pairs = "shapes:train"
    config.data.image_size = 32
    config.data.caption_noise = 0.2
    config.data.caption_dropout = 0.1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.ema_decay = 0.999
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 2
    config.eval.batch_size = 64
    config.eval.num_steps = 20
    config.eval.guidance_scale = 2.0
    config.writers = ("jsonl",)
    config.eval.every = 2000
    config.checkpoint.every = 1000
    config.log_every = 50
    return config
