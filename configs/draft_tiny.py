"""DRaFT-1 on the built-in tiny model with its second built-in reward, on a CPU.

    python -m imagereward_jax.train --config configs/draft_tiny.py

Tunes all of the UNet through the last of the sampler's ten steps, with any guidance; more steps:
--config.method.gradient_steps=3. alignprop_tiny.py, draft_lv_tiny.py and drtune_tiny.py change the steps alone.

Hardware: one CPU core, some four minutes. Result to expect: on 64 held-out prompts at guidance 3, mean of three seeds,
the share of fully right images rises from 0.77 to 0.90 (0.89 to 0.91) and the mean reward from 1.27 to 1.49.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("reward_gradient")
    config.steps = 60
    config.batch_size = 32
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.reward.path = "tiny-shapes-v2"
    config.method.num_steps = 10
    config.method.guidance_scale = 1.0
    config.method.guidance_max = 5.0  # see refl_tiny.py for these three
    config.method.negative_gradient = False
    config.method.unit_gradient = True
    config.method.height = 32
    config.method.width = 32
    config.method.loss = "hinge"
    config.method.target = 2.0
    config.data.prompts = "shapes:train"
    config.data.image_size = 32
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 20
    config.ema_decay = 0.98
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 4
    config.eval.batch_size = 64
    config.eval.num_steps = 20
    config.eval.guidance_scale = 3.0
    config.eval.every = 20
    config.checkpoint.every = 20
    config.log_every = 5
    config.writers = ("jsonl", "tensorboard")
    return config
