"""A tiny Stable Diffusion 1.x of the shapes world, trained by the denoising loss on noisily captioned images.

    python -m imagereward_jax.train --config configs/shapes_vae.py
    python -m imagereward_jax.train --config configs/shapes_pretrain.py

Starts from the first command's autoencoder and random UNet and text encoder. As with captions from the web, one in five
is wrong in a word (`config.data.caption_noise`). The model draws shapes well, but without guidance it heeds its prompts
only half: what tuning by reward then mends. The export is the diffusion half of the built-in model `tiny-shapes`.

Hardware: 2 CPU cores, some 20 minutes. Result to expect: eval/checker_rate 0.70 with guidance 2 (0.34 without).
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("denoising")
    config.steps = 4000
    config.batch_size = 32
    config.model.path = "runs/shapes_vae/export"
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
    config.eval.every = 1000
    config.checkpoint.every = 1000
    config.log_every = 50
    return config
