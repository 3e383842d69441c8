"""Tiny models whose settings show in the shapes of their tensors, as those of the published models do."""

import numpy as np
import tiny_sd1
import tiny_sdxl

from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer
from imagereward_jax.models import vae
from imagereward_jax.pipelines.published_settings import SCHEDULERS
from imagereward_jax.pipelines.sd1 import StableDiffusion1
from imagereward_jax.pipelines.sd3 import StableDiffusion3
from imagereward_jax.pipelines.sdxl import StableDiffusionXL

VAE = vae.SD1 | {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
UNET = {"sample_size": 64, "block_out_channels": [32, 64], "layers_per_block": 2, "cross_attention_dim": 64}
SD1_UNET = tiny_sd1.UNET | UNET | {"attention_head_dim": 8, "norm_num_groups": 32}
SDXL_UNET = (
    tiny_sdxl.UNET
    | UNET
    | {
        "sample_size": 128,
        "block_out_channels": [64, 128],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 64 + 128,
        "norm_num_groups": 32,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    }
)
MMDIT = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 208,
    "pooled_projection_dim": 64 + 80,
    "pos_embed_max_size": 8,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}


def text(vocab, **more):
    return tiny_sd1.text_encoder(vocab) | {"hidden_size": 64, "num_attention_heads": 1, "projection_dim": 64} | more


def make(kind, folder):
    """(pipeline, params): "sd1", "sd2" (its text encoder is OpenCLIP's), "sdxl" or "sd3" (without T5)."""
    vocab = write_clip_tokenizer(folder)
    wide = {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"}
    if kind in ("sd1", "sd2"):
        second = kind == "sd2"
        unet = SD1_UNET | ({"use_linear_projection": True, "attention_head_dim": [1, 1]} if second else {})
        configs = {"unet": unet, "vae": VAE, "text_encoder": text(vocab, hidden_act="gelu" if second else "quick_gelu")}
        pipeline = StableDiffusion1.from_configs(configs, SCHEDULERS["StableDiffusionPipeline"], folder)
    elif kind == "sdxl":
        projected = {"architectures": ["CLIPTextModelWithProjection"]}
        parts = {"text_encoder": text(vocab), "text_encoder_2": text(vocab, **wide, **projected)}
        configs = {"unet": SDXL_UNET, "vae": VAE | {"scaling_factor": 0.13025}, **parts}
        pipeline = StableDiffusionXL.from_configs(configs, SCHEDULERS["StableDiffusionXLPipeline"], folder)
    else:
        projected = {"architectures": ["CLIPTextModelWithProjection"]}
        # Wider than OpenAI's, by which readers tell them apart.
        wide |= {"hidden_size": 832, "num_attention_heads": 13, "projection_dim": 80}
        configs = {
            "transformer": MMDIT | {"joint_attention_dim": 64 + 832},
            "vae": vae.SD3 | {key: VAE[key] for key in ("block_out_channels", "down_block_types", "up_block_types")},
            "text_encoder": text(vocab, **projected),
            "text_encoder_2": text(vocab, **projected) | wide,
        }
        pipeline = StableDiffusion3.from_configs(configs, SCHEDULERS["StableDiffusion3Pipeline"], folder)
    params = tiny_sd1.random_params(pipeline)
    if kind == "sd3":
        params["text_encoder"]["text_projection"]["kernel"] = np.eye(64, dtype=np.float32)
    return pipeline, params
