"""Supervised LoRA on the built-in tiny Stable Diffusion 3.5, by flow matching on images with right captions.

    python -m imagereward_jax.train --config configs/lora_sd3_tiny.py

The model was pretrained on captions of which one in five is wrong in a word; these are all right.

Hardware: 2 CPU cores. Time and result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "shapes_pretrain_sd3")
    config.steps = 300
    config.model.path = "tiny-shapes-sd3"
    config.method.train_text_encoder = False
    config.lora.rank = 8
    config.data.caption_noise = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.ema_decay = 0.98
    config.eval.guidance_scale = 3.0
    config.eval.every = 100
    config.checkpoint.every = 100
    config.log_every = 10
    return config
