"""The 16-channel autoencoder of the built-in `tiny-shapes-sd3`, trained from nothing on images of the shapes world.

    python -m imagereward_jax.train --config configs/shapes_vae_sd3.py

32 x 32 images become 8 x 8 x 16 latents. Its export is a whole diffusers folder of Stable Diffusion 3.5's architecture
in small (layers with a second attention, normalised queries and keys, two CLIP encoders and a T5), whose other networks
are still random; configs/shapes_pretrain_sd3.py starts from it.

Hardware: 2 CPU cores, some 8 minutes. Result to expect: not measured yet.
"""

import ml_collections

from imagereward_jax.recipes import recipe_beside

_CLIP = {
    "architectures": ("CLIPTextModelWithProjection",),
    "vocab_size": 589,
    "bos_token_id": 587,
    "eos_token_id": 588,
    "pad_token_id": 588,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 48,
}
ARCHITECTURE = {
    "transformer": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 6,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 128,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 96,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0, 1, 2),
        "qk_norm": "rms_norm",
    },
    "vae": {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {**_CLIP, "hidden_act": "quick_gelu"},
    "text_encoder_2": {**_CLIP, "hidden_act": "gelu"},
    "text_encoder_3": {
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 119,
        "feed_forward_proj": "gated-gelu",
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "shapes_vae")
    config.model.architecture = ml_collections.ConfigDict(ARCHITECTURE)
    config.model.conv_bias_std = 0.0
    return config
