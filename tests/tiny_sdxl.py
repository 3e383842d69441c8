"""A Stable Diffusion XL of some 100,000 random numbers: images of 16 x 16, latents of 8 x 8, 16 tokens."""

import json
from pathlib import Path

import tiny_sd1

from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer
from imagereward_jax.pipelines.sdxl import StableDiffusionXL

# As SDXL base 1.0 has it.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
# As SDXL-Turbo has it.
TURBO = SCHEDULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
UNET = tiny_sd1.UNET | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24 + 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
VAE = tiny_sd1.VAE | {"scaling_factor": 0.13025}


def text_encoders(vocab_size):
    """config.json of both text encoders."""
    first = tiny_sd1.text_encoder(vocab_size) | {"architectures": ["CLIPTextModel"]}
    second = first | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "hidden_act": "gelu",
        "projection_dim": 20,
        "pad_token_id": 0,
    }
    return first, second


def write_tokenizers(folder):
    """Writes folder/tokenizer and folder/tokenizer_2, which pads with "!"; returns the vocabulary's size."""
    folder = Path(folder)
    size = write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "tokenizer_2" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    return size


def make(folder, scheduler=SCHEDULER, **options):
    """(pipeline, params): random weights of unit gain. The tokenizers' files are written into `folder`."""
    folder = Path(folder)
    first, second = text_encoders(write_tokenizers(folder))
    parts = {"unet": UNET, "vae": VAE, "text_encoder": first, "text_encoder_2": second}
    tokenizers = {name: folder / name for name in ("tokenizer", "tokenizer_2")}
    pipeline = StableDiffusionXL.from_configs(parts, scheduler, tokenizers, **options)
    return pipeline, tiny_sd1.random_params(pipeline)
