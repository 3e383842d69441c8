"""A tiny Stable Diffusion XL of the shapes world, trained by the denoising loss on noisily captioned images.

    python -m imagereward_jax.train --config configs/shapes_pretrain_sdxl.py

Starts from the autoencoder of `tiny-shapes` (`config.model.vae_from`) and a random UNet and text encoders with all that
makes SDXL: two encoders side by side, a pooled projection, original size and crop, transformers of different depth. As
in configs/shapes_pretrain.py many captions are wrong in a word. configs/refl_sdxl_tiny.py tunes its export.

Hardware: 2 CPU cores, some 20 minutes. Result to expect: eval/checker_rate 0.59 with guidance 2.
"""

import ml_collections

from imagereward_jax.recipes import recipe_beside

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
    config = recipe_beside(__file__, "shapes_pretrain")
    config.steps = 2000
    config.model.path = ""
    config.model.from_scratch = True
    config.model.vae_from = "tiny-shapes"
    config.model.architecture = ml_collections.ConfigDict(ARCHITECTURE)
    config.model.conv_bias_std = 1.0
    config.eval.every = 2000
    return config
