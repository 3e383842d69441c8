"""DDPO on the built-in tiny model with its second built-in reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/ddpo_tiny.py

`--config.reward.path=jpeg-compressibility`, or module:function (a Python function of yours), needs no other change.
Each step samples 64 images and makes two updates on the first three of their ten steps. Hardware: a CPU, eight minutes
with one core, five with two. Result to expect on 64 held-out prompts at guidance 3, mean of three seeds, after 3,840
images: the share of fully right images rises from 0.77 to 0.87 (0.85 to 0.89) and the mean reward from 1.27 to 1.44.
What follows the reward's gradient needs fewer images: docs/methods.md.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("ddpo")
    config.steps = 60
    config.batch_size = 32
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.reward.path = "tiny-shapes-v2"
    config.method.num_steps = 10
    config.method.guidance_scale = 2.0  # where more images are wrong than at 3: more to compare
    config.method.negative_gradient = False
    config.method.window_high = 3  # the first three move the reward most: benchmarks/step_variance.py
    config.method.height = 32
    config.method.width = 32
    config.method.rounds = 2
    config.method.clip_range = 1e-3  # of 256 latent numbers, where Stable Diffusion has 16,384
    config.method.prompt_buffer = 32
    config.method.prompt_min_count = 4  # of 176 prompts each comes once in three steps
    config.data.prompts = "shapes:train"
    config.optimizer.learning_rate = 3e-5  # docs/tried.md: others gain less
    config.optimizer.weight_decay = 1e-4
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 4
    config.eval.batch_size = 64
    config.eval.num_steps = 20
    config.eval.guidance_scale = 3.0
    config.eval.every = 20
    config.checkpoint.every = 10
    config.log_every = 1
    config.writers = ("jsonl", "tensorboard")
    return config
